// The row cuda/attention_decode_sm90: a few queries over many keys, by a ring of bulk copies that is never empty.
#include <algorithm>

#include "base/format.h"
#include "cuda/attention_fwd.h"

namespace heed::cuda {
namespace {

constexpr Rates kRates = {0.6e6, 33e3};
constexpr int64_t kLeastKeys =
    256;  // of a split: a block that has only these is done in about the time that it takes to start

// Whether the kernel merges splits or leaves that to combine, which has more warps for a row but starts when all blocks have ended:
// 1 x 1,024 keys in 4 splits take 7.0 us and 9.0, 1 x 16,384 in 16 take 22.5 and 22.9, 1 x 131,072 in 15 take 134.1 and 128.8. Where
// the device chooses splits few rows may have any.
bool merges_itself(const Configuration& c) {
  constexpr int64_t kManyKeys = 4096;
  constexpr int32_t kFewSplits = 4;
  return c.split_tiles == 0 || c.max_splits <= kFewSplits || int64_t{c.split_tiles} * c.tile_k < kManyKeys;
}

// Where lengths come from the device it chooses how many keys a split has, so that all blocks have as much to do; how many splits
// there is room for: of 512 keys, or as short as can be where those are few, in at most kMostBytes of partials. 0: the plan cuts keys.
int64_t most_splits(const AttentionProblem& p, const Configuration& c, int64_t row_blocks, int64_t multiprocessors) {
  constexpr int64_t kUsualKeys = 512, kMost = 128, kTurns = 4, kMost31 = INT32_MAX, kMostBytes = 128 << 20;
  if (p.splits > 0 || row_blocks == 0 || !(p.used_k || p.packed_k() || p.leftpad)) return 0;
  if (total_rows(p) > kMost31 / p.nheads_q) return 0;
  // Packed sequences have no length that the host knows: four times the mean's splits are room enough, or they are longer.
  const int64_t keys = p.packed_k() ? std::min(most_keys(p), 4 * usual_keys(p)) : most_keys(p);
  const int64_t wanted = std::max(
      (keys + kUsualKeys - 1) / kUsualKeys,
      std::min((keys + kLeastKeys - 1) / kLeastKeys, (kTurns * multiprocessors + row_blocks - 1) / row_blocks));
  const int64_t bytes_of_split = total_rows(p) * p.nheads_q * (p.head_dim_v + 1) * 4;
  const int64_t splits =
      std::clamp<int64_t>(std::min(wanted, kMostBytes / std::max<int64_t>(1, bytes_of_split)), 1, kMost);
  return keys > c.tile_k && row_blocks <= kMost31 / splits ? splits : 0;
}

}  // namespace

Verdict check_attention_decode_sm90(const AttentionProblem& p, const DeviceFacts& facts) {
  constexpr const char* kNearest = "cuda/attention_decode_sm80 takes it";
  if (const std::string limit = common_limits(p, facts); !limit.empty()) return decline(limit);
  if (const std::string limit = hopper_limits(facts); !limit.empty()) return decline(limit);
  if (const std::string limit = decode_limits(p, usual_rows(p)); !limit.empty()) return decline(limit);
  if (decode_sm90_tile(p.head_dim, p.head_dim_v, usual_rows(p)) == nullptr) {
    return decline(
        heed::format("takes head_dim and head_dim_v up to 128 (192 and 128 with 8 rows) and at most 16 queries of a "
                     "sequence, heads of a group counted, not {}, {} and {}; cuda/attention_fwd_sm90 is for more",
                     p.head_dim, p.head_dim_v, usual_rows(p)));
  }
  if (p.batch_invariant) return decline(heed::format("does not promise batch_invariant; {}", kNearest));
  if (const std::string limit = map_limits(p, kNearest); !limit.empty()) return decline(limit);
  return accept_if_it_fits(configure_attention_decode_sm90(p, facts));
}

Configurations configure_attention_decode_sm90(const AttentionProblem& p, const DeviceFacts& facts) {
  const DecodeSm90Tile& tile = *decode_sm90_tile(p.head_dim, p.head_dim_v, usual_rows(p));
  Configuration c;
  c.tile_q = tile.tile_q;
  c.tile_k = tile_k(tile);
  c.rows_per_query = static_cast<int32_t>(p.gqa_ratio());
  c.maps_tensors = true;
  // A box brings all of a row where that is whole chunks: behind it lies the next head.
  constexpr int kChunk = 64;
  c.mapping.k_chunks = p.head_dim % kChunk == 0 ? tile.head_dim / kChunk : 1;
  c.mapping.v_chunks = p.head_dim_v % kChunk == 0 ? tile.head_dim_v / kChunk : 1;
  cut_rows(p, c);
  const int64_t multiprocessors = std::max(1, facts.multiprocessors), row_blocks = c.blocks;
  cut_keys(p, multiprocessors, kLeastKeys / c.tile_k, c);
  if (const int64_t most = most_splits(p, c, row_blocks, multiprocessors); most > 0) {
    c.max_splits = static_cast<int32_t>(most);
    c.split_tiles = 0;
    c.split = most > 1;
    c.blocks = row_blocks * most;
  }
  c.merges = c.split && merges_itself(c);
  c.grid = std::min<int64_t>(c.blocks, std::max(1, facts.multiprocessors));
  c.kernel = heed::format("attention_decode_sm90 rows {} k{} d{}/{}{}{}", tile.tile_q, c.tile_k, tile.head_dim,
                          tile.head_dim_v, p.paged() ? " pages" : "", c.split ? " split" : "");
  c.variant = attention_decode_sm90_variant(p.dtype == Dtype::kBf16, tile);
  c.cost_us = roofline_us(p, facts, kRates) + (c.split ? c.merges ? 1.0 : 2.0 : 0.0);
  return {c};
}

}  // namespace heed::cuda

namespace heed {

extern const Impl<AttentionProblem> kCudaAttentionDecodeSm90;
constinit const Impl<AttentionProblem> kCudaAttentionDecodeSm90 =
    cuda::forward_row<cuda::check_attention_decode_sm90, cuda::configure_attention_decode_sm90>(
        "cuda/attention_decode_sm90", "up to 16 queries of a kv head, f16 and bf16, by bulk copies, Hopper");

}  // namespace heed
