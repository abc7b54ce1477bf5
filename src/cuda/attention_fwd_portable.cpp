// The row cuda/attention_fwd_portable: f32, any head dim up to 512, any alignment, in plain multiply-adds.
#include <algorithm>

#include "base/format.h"
#include "cuda/attention_fwd.h"

namespace heed::cuda {
namespace {

constexpr Rates kRates = {0.15e6, 10e3};

}  // namespace

Verdict check_attention_fwd_portable(const AttentionProblem& p, const DeviceFacts& facts) {
  if (const std::string limit = common_limits(p, facts); !limit.empty()) return decline(limit);
  if (portable_tile(p.head_dim, p.head_dim_v) == nullptr) {
    return decline(heed::format("takes head_dim and head_dim_v up to 512, not {} and {}", p.head_dim, p.head_dim_v));
  }
  if (p.batch_invariant && check_attention_fwd_sm80(p, facts).accepted) {  // the choice must not hang on the batch
    return decline("with batch_invariant leaves to cuda/attention_fwd_sm80 what that takes, whatever the batch");
  }
  return accept_if_it_fits(configure_attention_fwd_portable(p, facts));
}

Configurations configure_attention_fwd_portable(const AttentionProblem& p, const DeviceFacts& facts) {
  constexpr int kBlocksEach = 2;
  const PortableTile& tile = *portable_tile(p.head_dim, p.head_dim_v);
  Configuration c;
  c.tile_q = tile.tile_q;
  c.tile_k = tile.tile_k;
  const bool few = 2 * usual_queries(p) < tile.tile_q && !p.batch_invariant;
  c.rows_per_query = few ? static_cast<int32_t>(p.gqa_ratio()) : 1;
  cut_rows(p, c);
  if (!p.batch_invariant) cut_keys(p, int64_t{kBlocksEach} * facts.multiprocessors, 256 / tile.tile_k, c);
  c.kernel = heed::format("attention_fwd_portable {} q{} k{} d{}{}", dtype_name(p.dtype), tile.tile_q, tile.tile_k,
                          tile.dim, c.split ? " split" : "");
  c.variant = attention_fwd_portable_variant(p.dtype, tile);
  const Rates rates = {kRates.flops_per_us_sm / waste_of(p, c, facts), kRates.bytes_per_us_sm};
  c.cost_us = roofline_us(p, facts, rates) + (c.split ? 2.0 : 0.0);
  return {c};
}

}  // namespace heed::cuda

namespace heed {

extern const Impl<AttentionProblem> kCudaAttentionFwdPortable;
constinit const Impl<AttentionProblem> kCudaAttentionFwdPortable =
    cuda::forward_row<cuda::check_attention_fwd_portable, cuda::configure_attention_fwd_portable>(
        "cuda/attention_fwd_portable", "f32, f16 and bf16 in f32, any head dim up to 512");

}  // namespace heed
