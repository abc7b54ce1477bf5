// The row cuda/attention_decode_sm90: a few queries over many keys, by a ring of bulk copies that is never empty.
#include <algorithm>

#include "base/format.h"
#include "cuda/attention_fwd.h"

namespace heed::cuda {
namespace {

constexpr Rates kRates = {0.6e6, 33e3};
constexpr int64_t kLeastKeys =
    256;  // of a split: a block that has only these is done in about the time that it takes to start

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
  cut_rows(p, c);
  cut_keys(p, std::max(1, facts.multiprocessors), kLeastKeys / c.tile_k, c);
  c.grid = std::min<int64_t>(c.blocks, std::max(1, facts.multiprocessors));
  c.kernel = heed::format("attention_decode_sm90 rows {} k{} d{}/{}{}{}", tile.tile_q, c.tile_k, tile.head_dim,
                          tile.head_dim_v, p.paged() ? " pages" : "", c.split ? " split" : "");
  c.variant = attention_decode_sm90_variant(p.dtype == Dtype::kBf16, tile);
  c.cost_us = roofline_us(p, facts, kRates) + (c.split ? 2.0 : 0.0);
  return {c};
}

}  // namespace heed::cuda

namespace heed {

extern const Impl<AttentionProblem> kCudaAttentionDecodeSm90;
constinit const Impl<AttentionProblem> kCudaAttentionDecodeSm90 =
    cuda::forward_row<cuda::check_attention_decode_sm90, cuda::configure_attention_decode_sm90>(
        "cuda/attention_decode_sm90", "up to 16 queries of a kv head, f16 and bf16, by bulk copies, Hopper");

}  // namespace heed
