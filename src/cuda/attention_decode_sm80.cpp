// The row cuda/attention_decode_sm80: a few queries over many keys, as fast as memory delivers them.
#include <algorithm>

#include "base/format.h"
#include "cuda/attention_fwd.h"

namespace heed::cuda {
namespace {

constexpr Rates kRates = {0.6e6, 30e3};
constexpr int64_t kMostRows = 16;  // queries of a sequence, heads of a group counted

int64_t usual_rows(const AttentionProblem& p) { return usual_queries(p) * p.gqa_ratio(); }

}  // namespace

Verdict check_attention_decode_sm80(const AttentionProblem& p, const DeviceFacts& facts) {
  if (const std::string limit = common_limits(p, facts); !limit.empty()) return decline(limit);
  if (p.dtype != Dtype::kF16 && p.dtype != Dtype::kBf16) {
    return decline(format("multiplies f16 and bf16, not {}; cuda/attention_fwd_portable takes it", dtype_name(p.dtype)));
  }
  if (usual_rows(p) > kMostRows) {
    return decline(format("is for at most {} queries of a sequence, heads of a group counted, not {}; "
                          "cuda/attention_fwd_sm80 is for more",
                          kMostRows, usual_rows(p)));
  }
  if (p.softcap || p.bias() || p.alibi || p.dropout || p.mask) {
    return decline("takes no softcap, bias, ALiBi, dropout or mask tensor; cuda/attention_fwd_sm80 takes them");
  }
  if (p.head_dim % 8 != 0 || p.head_dim_v % 8 != 0 || row_align(p) < 16) {
    return decline("takes rows that start on 16 bytes and multiples of 8 as head dims; cuda/attention_fwd_portable takes any");
  }
  if (decode_tile(p.head_dim, p.head_dim_v, usual_rows(p)) == nullptr) {
    return decline(format("takes head_dim and head_dim_v up to 128 (192 and 128 with 8 rows), not {} and {}; "
                          "cuda/attention_fwd_sm80 takes up to 256",
                          p.head_dim, p.head_dim_v));
  }
  return accept_if_it_fits(configure_attention_decode_sm80(p, facts), "");
}

Configuration configure_attention_decode_sm80(const AttentionProblem& p, const DeviceFacts& facts) {
  constexpr int kBlocksEach = 2;  // of a multiprocessor: more in flight lose bandwidth (kernels/README.md)
  const DecodeTile& tile = *decode_tile(p.head_dim, p.head_dim_v, usual_rows(p));
  Configuration c;
  c.tile_q = tile.tile_q;
  c.tile_k = tile.tile_k;
  c.rows_per_query = static_cast<int32_t>(p.gqa_ratio());
  cut_rows(p, c);
  cut_keys(p, int64_t{kBlocksEach} * facts.multiprocessors, 4, c);
  c.kernel = format("attention_decode_sm80 rows {} k{} d{}/{}{}{}", tile.tile_q, tile.tile_k, tile.head_dim,
                    tile.head_dim_v, p.paged() ? " pages" : "", c.split ? " split" : "");
  c.variant = attention_decode_variant(p.dtype == Dtype::kBf16, p.paged(), c.split, tile);
  c.cost_us = roofline_us(p, facts, kRates) + (c.split ? 2.0 : 0.0);
  return c;
}

namespace {

Verdict check(const AttentionProblem& problem, const Machine&) {
  return check_on_device(problem, check_attention_decode_sm80);
}

double cost_us(const AttentionProblem& problem, const Machine&) {
  return configure_attention_decode_sm80(problem, *device_facts(problem.device_index).value()).cost_us;
}

Status prepare(const AttentionProblem& problem, const Machine&, Plan<AttentionProblem>& plan) {
  const DeviceFacts& facts = *device_facts(problem.device_index).value();
  return prepare_attention_fwd(problem, facts, configure_attention_decode_sm80(problem, facts), plan);
}

}  // namespace
}  // namespace heed::cuda

namespace heed {

extern const Impl<AttentionProblem> kCudaAttentionDecodeSm80;
const Impl<AttentionProblem> kCudaAttentionDecodeSm80 = {"cuda/attention_decode_sm80",
                                                         "up to 16 queries of a kv head, f16 and bf16",
                                                         false,
                                                         cuda::check,
                                                         cuda::cost_us,
                                                         cuda::prepare};

}  // namespace heed
