// The row cuda/attention_decode_sm80: a few queries over many keys, as fast as memory delivers them.
#include <algorithm>

#include "base/format.h"
#include "cuda/attention_fwd.h"

namespace heed::cuda {
namespace {

constexpr Rates kRates = {0.6e6, 30e3};
constexpr int64_t kMostRows = 16;  // queries of a sequence, heads of a group counted

Configuration configuration_of(const AttentionProblem& p, const DecodeTile& tile) {
  Configuration c;
  c.tile_q = tile.tile_q;
  c.tile_k = tile.tile_k;
  c.rows_per_query = static_cast<int32_t>(p.gqa_ratio());
  cut_rows(p, c);
  return c;
}

void finish(const AttentionProblem& p, const DecodeTile& tile, const DeviceFacts& facts, Configuration& c) {
  c.kernel = heed::format("attention_decode_sm80 rows {} k{} d{}/{}{}{}", tile.tile_q, tile.tile_k, tile.head_dim,
                          tile.head_dim_v, p.paged() ? " pages" : "", c.split ? " split" : "");
  c.variant = attention_decode_variant(p.dtype == Dtype::kBf16, p.paged(), tile);
  c.cost_us = roofline_us(p, facts, kRates) + (c.split ? 2.0 : 0.0);
}

}  // namespace

int64_t usual_rows(const AttentionProblem& p) { return usual_queries(p) * p.gqa_ratio(); }

std::string decode_limits(const AttentionProblem& p, int64_t rows) {
  if (p.dtype != Dtype::kF16 && p.dtype != Dtype::kBf16)
    return heed::format("multiplies f16 and bf16, not {}; cuda/attention_fwd_portable takes it", dtype_name(p.dtype));
  if (p.softcap || p.bias() || p.alibi || p.dropout || p.mask)
    return "takes no softcap, bias, ALiBi, dropout or mask tensor; cuda/attention_fwd_sm80 takes them";
  if (p.head_dim % 8 != 0 || p.head_dim_v % 8 != 0 || row_align(p) < 16)
    return "takes rows that start on 16 bytes and multiples of 8 as head dims; cuda/attention_fwd_portable takes any";
  if (p.out_dtype == Dtype::kF32 && rows > 8)
    return "writes out in f32 for at most 8 queries, heads of a group counted; cuda/attention_fwd_sm80 takes more";
  return {};
}

Verdict check_attention_decode_sm80(const AttentionProblem& p, const DeviceFacts& facts) {
  if (const std::string limit = common_limits(p, facts); !limit.empty()) return decline(limit);
  if (const std::string limit = decode_limits(p, usual_rows(p)); !limit.empty()) return decline(limit);
  if (usual_rows(p) > kMostRows) {
    return decline(
        heed::format("is for at most {} queries of a sequence, heads of a group counted, not {}; "
                     "cuda/attention_fwd_sm80 is for more",
                     kMostRows, usual_rows(p)));
  }
  if (decode_tile(p.head_dim, p.head_dim_v, usual_rows(p)) == nullptr) {
    return decline(
        heed::format("takes head_dim and head_dim_v up to 128 (192 and 128 with 8 rows), not {} and {}; "
                     "cuda/attention_fwd_sm80 takes up to 256",
                     p.head_dim, p.head_dim_v));
  }
  if (p.batch_invariant) {
    const Configurations alone = configure_invariant_decode(p, facts);
    if (alone.empty() || p.packed_q() || usual_rows(p) > alone.front().max_rows) {
      return decline(
          "cannot promise batch_invariant alone, as sequences may have more queries than it takes; "
          "cuda/attention_fwd_sm80 gives it those that have few");
    }
  }
  return accept_if_it_fits(configure_attention_decode_sm80(p, facts));
}

Configurations configure_attention_decode_sm80(const AttentionProblem& p, const DeviceFacts& facts) {
  if (p.batch_invariant) {  // no sequence has more queries than decode takes: it has the batch to itself
    Configurations alone = configure_invariant_decode(p, facts);
    for (Configuration& c : alone) c.max_rows = c.partial_queries = 0;
    return alone;
  }
  // Two blocks of four warps share a multiprocessor; more in flight lose bandwidth (kernels/README.md).
  constexpr int64_t kBlocksEach = 2;
  const DecodeTile& tile = *decode_tile(p.head_dim, p.head_dim_v, usual_rows(p));
  Configuration c = configuration_of(p, tile);
  cut_keys(p, kBlocksEach * facts.multiprocessors, 4, c);
  finish(p, tile, facts, c);
  return {c};
}

Configurations configure_invariant_decode(const AttentionProblem& p, const DeviceFacts& facts) {
  const DecodeTile* const tile = decode_tile(p.head_dim, p.head_dim_v, p.gqa_ratio());
  if (tile == nullptr || !decode_limits(p, p.gqa_ratio()).empty()) return {};
  Configuration c = configuration_of(p, *tile);
  c.max_rows = tile->tile_q;
  c.partial_queries = tile->tile_q / p.gqa_ratio();
  if (!p.packed_q()) c.partial_queries = std::min(c.partial_queries, p.seqlen_q);
  if (c.partial_queries == 0) return {};
  c.num_tiles_q = (c.partial_queries * c.rows_per_query + tile->tile_q - 1) / tile->tile_q;
  c.blocks = c.num_tiles_q * p.nheads_kv * p.batch;
  cut_keys(p, 0, 0, c);
  finish(p, *tile, facts, c);
  return {c};
}

}  // namespace heed::cuda

namespace heed {

extern const Impl<AttentionProblem> kCudaAttentionDecodeSm80;
constinit const Impl<AttentionProblem> kCudaAttentionDecodeSm80 =
    cuda::forward_row<cuda::check_attention_decode_sm80, cuda::configure_attention_decode_sm80>(
        "cuda/attention_decode_sm80", "up to 16 queries of a kv head, f16 and bf16");

}  // namespace heed
