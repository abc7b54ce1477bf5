// The row cuda/attention_fwd_sm80: f16 and bf16 on the matrix units of Ampere and later.
#include <algorithm>
#include <cmath>

#include "base/format.h"
#include "cuda/attention_fwd.h"

namespace heed::cuda {
namespace {

constexpr Rates kRates = {2.2e6, 20e3};  // of an H200's multiprocessor, large problems

AttentionFwdFeatures features_of(const AttentionProblem& p) {
  const bool range = p.window_left >= 0 || p.window_right >= 0 || p.chunk > 0;
  return {.is_bf16 = p.dtype == Dtype::kBf16,
          .mask = range ? kMaskRange : kMaskNone,
          .modified = p.softcap || p.bias() || p.alibi || p.mask || p.dropout,
          // O in f32 takes P in two parts, which only gathered kernels do: the others stay lean.
          .gather = p.paged() || row_align(p) < 16 || p.out_dtype == Dtype::kF32};
}

Configuration configuration_of(const AttentionProblem& p, AttentionFwdFeatures features, TileHeight height,
                               const DeviceFacts& facts) {
  features = reachable(features);
  const HeadDims& dims = *padded_head_dims(p.head_dim, p.head_dim_v);
  const AttentionFwdTile& tile = *attention_fwd_tile(features, dims, height, facts.major, facts.shared_per_block);
  Configuration c;
  c.kernel =
      heed::format("attention_fwd_sm80 q{} k{} d{}/{}{}{}{}", tile.tile_q, tile.tile_k, tile.head_dim, tile.head_dim_v,
                   features.modified ? " terms" : "", features.gather ? " gather" : "", features.split ? " split" : "");
  c.variant = attention_fwd_variant(features, tile);
  c.tile_q = tile.tile_q;
  c.tile_k = tile.tile_k;
  // Where a sequence's queries would leave a tile half empty, the heads of a group share it, and each load of K and V.
  const bool few = usual_queries(p) < 64 && !p.batch_invariant;
  c.rows_per_query = few ? static_cast<int32_t>(p.gqa_ratio()) : 1;
  cut_rows(p, c);
  return c;
}

// Time in units of key-rows of a multiprocessor: blocks that share one share its speed, and a device that is not full
// takes as long as its fullest multiprocessor.
double time_of(const AttentionProblem& p, const Configuration& c, int blocks_each, double speed,
               const DeviceFacts& facts) {
  const double of_each = static_cast<double>(c.blocks) / std::max(1, facts.multiprocessors);
  double keys = static_cast<double>(usual_keys(p));
  if (p.causal()) keys = std::min(keys, keys / 2 + c.tile_q / 2.0 + c.tile_k / 2.0);
  return (of_each < blocks_each ? std::ceil(of_each) : of_each) * c.tile_q * keys / speed;
}

int blocks_each(const AttentionProblem& p, AttentionFwdFeatures features, TileHeight height, const DeviceFacts& facts) {
  features = reachable(features);
  return std::max(1, attention_fwd_tile(features, *padded_head_dims(p.head_dim, p.head_dim_v), height, facts.major,
                                        facts.shared_per_block)
                         ->blocks);
}

// Few blocks and many keys: splits, where they fill the device better. Partials of many rows would cost more than the
// idle multiprocessors do (b1, 16 heads of 64, 1k x 1k keys: 36 TFLOP/s split, FlashAttention-2 180).
bool split_pays(const AttentionProblem& p, const Configuration& whole, int64_t slots) {
  constexpr int64_t kMostRows = 8192, kLeastKeys = 1024;
  if (p.batch_invariant) return false;
  if (p.splits > 0) return p.splits > 1;
  return whole.blocks > 0 && 4 * whole.blocks <= slots && usual_keys(p) >= kLeastKeys &&
         total_rows(p) * p.nheads_q <= kMostRows;
}

double cost_of(const AttentionProblem& p, const Configuration& c, const DeviceFacts& facts) {
  // Of a call's first loads, and of partials with the merge behind them: 16 heads of 128 keys, D 64, 6.2 us; 32 heads of 49
  // queries and 1024 keys, split, 16.2 us. What gathers is half as fast, what adds terms (16 x 12 heads of 690, D 64, a mask
  // tensor: 275 us) less; at D 32 exponentials are what takes time.
  constexpr double kFirstLoads = 1.5, kSplit = 4.0, kSlow = 2.0, kTerms = 3.5, kSmall = 1.4;
  const AttentionFwdFeatures features = features_of(p);
  const double slow = (features.modified            ? kTerms
                       : c.split || features.gather ? kSlow
                                                    : 1.0) *
                      (p.head_dim <= 32 && p.head_dim_v <= 32 ? kSmall : 1.0);
  const Rates rates = {kRates.flops_per_us_sm / (slow * waste_of(p, c, facts)), kRates.bytes_per_us_sm};
  return kFirstLoads + roofline_us(p, facts, rates) + (c.split ? kSplit : 0.0);
}

}  // namespace

Verdict check_attention_fwd_sm80(const AttentionProblem& p, const DeviceFacts& facts) {
  if (const std::string limit = common_limits(p, facts); !limit.empty()) return decline(limit);
  if (p.dtype != Dtype::kF16 && p.dtype != Dtype::kBf16) {
    return decline(
        heed::format("multiplies f16 and bf16, not {}; cuda/attention_fwd_portable takes it", dtype_name(p.dtype)));
  }
  if (padded_head_dims(p.head_dim, p.head_dim_v) == nullptr) {
    return decline(heed::format(
        "takes head_dim and head_dim_v up to 256, not {} and {}; cuda/attention_fwd_portable takes up to 512",
        p.head_dim, p.head_dim_v));
  }
  if (p.head_dim % 8 != 0 || p.head_dim_v % 8 != 0) {
    return decline(
        heed::format("takes multiples of 8 as head_dim and head_dim_v, not {} and {}; cuda/attention_fwd_portable "
                     "takes any",
                     p.head_dim, p.head_dim_v));
  }
  return accept_if_it_fits(configure_attention_fwd_sm80(p, facts));
}

Configurations configure_attention_fwd_sm80(const AttentionProblem& p, const DeviceFacts& facts) {
  AttentionFwdFeatures features = features_of(p);
  Configuration low = configuration_of(p, features, TileHeight::kLow, facts);
  const int64_t slots = int64_t{blocks_each(p, features, TileHeight::kLow, facts)} * facts.multiprocessors;
  if (split_pays(p, low, slots)) {
    features.split = true;
    Configuration split = configuration_of(p, features, TileHeight::kLow, facts);
    cut_keys(p, slots, 4, split);
    if (split.split) {
      split.cost_us = cost_of(p, split, facts);
      return {split};
    }
    features.split = false;
  }
  if (!p.batch_invariant) {
    Configuration tall = configuration_of(p, features, TileHeight::kTall, facts);
    const double low_speed = p.causal() ? 0.88 : 0.78;  // of a full device, beside the tall tile (kernels/README.md)
    if (tall.tile_q != low.tile_q &&
        time_of(p, tall, blocks_each(p, features, TileHeight::kTall, facts), 1.0, facts) <
            time_of(p, low, blocks_each(p, features, TileHeight::kLow, facts), low_speed, facts)) {
      low = std::move(tall);
    }
  }
  low.cost_us = cost_of(p, low, facts);
  if (!p.batch_invariant) return {low};
  Configurations shared = {low};
  for (Configuration& decode : configure_invariant_decode(p, facts)) {
    shared.front().min_rows = decode.max_rows + 1;
    shared.front().cost_us += decode.cost_us;
    shared.push_back(std::move(decode));
  }
  return shared;
}

}  // namespace heed::cuda

namespace heed {

extern const Impl<AttentionProblem> kCudaAttentionFwdSm80;
constinit const Impl<AttentionProblem> kCudaAttentionFwdSm80 =
    cuda::forward_row<cuda::check_attention_fwd_sm80, cuda::configure_attention_fwd_sm80>(
        "cuda/attention_fwd_sm80", "f16 and bf16 on the matrix units, Ampere and later");

}  // namespace heed
