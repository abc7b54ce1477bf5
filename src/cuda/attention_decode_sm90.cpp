// The row cuda/attention_decode_sm90: a few queries over many keys, by a ring of bulk copies that is never empty.
#include <algorithm>

#include "base/format.h"
#include "cuda/attention_fwd.h"

namespace heed::cuda {
namespace {

constexpr Rates kRates = {0.6e6, 33e3};
// Whether blocks have equal shares of all keys, whose splits the kernel merges itself, or the plan cuts keys, or nobody. Shares are
// for lengths that the device has, and for few splits: combine has more warps for a row but starts when all blocks have ended. (1 x 1,024
// keys in 4 splits take 7.0 us and 9.0, 1 x 16,384 in 16 take 22.5 and 22.9, 1 x 131,072 in 15 take 134.1 and 128.8.)
// `c`: as cut_keys leaves it; row_blocks: tiles of rows.
bool has_shares(const AttentionProblem& p, const Configuration& c, int64_t row_blocks) {
  constexpr int64_t kManyKeys = 4096, kMost31 = INT32_MAX;
  // Each block looks at all of them first: 2,048 of 1 to 1,024 keys take 1,115 us, and 1,087 without shares; but 1,100 of 128 keys beside
  // one of 65,536 89 and 758.
  constexpr int64_t kMostSequences = 2048;
  constexpr int32_t kFewSplits = 4;
  const int64_t key_tiles = std::max<int64_t>(1, (most_keys(p) + c.tile_k - 1) / c.tile_k);
  if (p.splits > 0 || row_blocks == 0 || key_tiles == 1 || row_blocks > kMost31 / key_tiles) return false;
  if (p.used_k || p.packed_k() || p.leftpad) return p.batch <= kMostSequences;
  return c.split && (c.max_splits <= kFewSplits || int64_t{c.split_tiles} * c.tile_k < kManyKeys);
}

// Kv heads whose blocks have the same share: as many as divide those and leave at most a tenth of the multiprocessors without.
int32_t heads_together(const AttentionProblem& p, int64_t multiprocessors) {
  for (int64_t heads = std::min(p.nheads_kv, multiprocessors); heads > 1; --heads)
    if (p.nheads_kv % heads == 0 && multiprocessors / heads * heads * 10 >= multiprocessors * 9)
      return static_cast<int32_t>(heads);
  return 1;
}

// Whether each head of a sequence meets all of its pages: then the kernel finds bad ones by itself. (Where splits are combine's, it
// is not told of them.)
bool meets_all_pages(const AttentionProblem& p, const Configuration& c) {
  if (!p.paged() || p.packed_q() || (c.split && !c.shares) || p.window_left >= 0 || p.chunk > 0) return false;
  return p.window_right < 0 || p.offset_kind == OffsetKind::kBottomRight;  // one tile of rows has all queries
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
  // Memory is shared by pairs of multiprocessors: where some pairs have two blocks and others one, the former end late. (1 x 131,072
  // keys, 8 kv heads: 8, 12, 14, 15, 16 splits take 124.0, 140.4, 130.6, 126.8, 123.7 us.)
  constexpr double kNearlyAll = 0.95;
  cut_keys(p, multiprocessors, kLeastShare / c.tile_k, c, kNearlyAll);
  c.shares = has_shares(p, c, row_blocks);
  if (c.shares) {
    c.split = true, c.max_splits = 1, c.split_tiles = 0;
    c.blocks = row_blocks;
    c.heads_together = heads_together(p, multiprocessors);
    // Shares of the keys that there can be at most, for each of those heads.
    const int64_t units = row_blocks / c.heads_together * ((most_keys(p) + c.tile_k - 1) / c.tile_k),
                  least = kLeastShare / c.tile_k;
    c.grid = std::min(multiprocessors / c.heads_together, (units + least - 1) / least) * c.heads_together;
  } else {
    // Packed keys may be a single sequence's, which room for partials of all sequences would have to allow for.
    if (p.packed_k() && p.splits == 0) c.split = false, c.max_splits = 1, c.split_tiles = 0, c.blocks = row_blocks;
    c.grid = std::min(c.blocks, multiprocessors);
  }
  c.finds_bad_pages = meets_all_pages(p, c);
  c.kernel = heed::format("attention_decode_sm90 rows {} k{} d{}/{}{}{}", tile.tile_q, c.tile_k, tile.head_dim,
                          tile.head_dim_v, p.paged() ? " pages" : "",
                          c.shares  ? " shares"
                          : c.split ? " split"
                                    : "");
  c.variant = attention_decode_sm90_variant(p.dtype == Dtype::kBf16, tile);
  c.cost_us = roofline_us(p, facts, kRates) + (c.shares ? 1.0 : c.split ? 2.0 : 0.0);
  return {c};
}

}  // namespace heed::cuda

namespace heed {

extern const Impl<AttentionProblem> kCudaAttentionDecodeSm90;
constinit const Impl<AttentionProblem> kCudaAttentionDecodeSm90 =
    cuda::forward_row<cuda::check_attention_decode_sm90, cuda::configure_attention_decode_sm90>(
        "cuda/attention_decode_sm90", "up to 16 queries of a kv head, f16 and bf16, by bulk copies, Hopper");

}  // namespace heed
