// Serving: two conversations grow token by token in a paged cache. Each step appends the new keys and values with rotary
// embedding and attends to everything so far, one call each. Pages need not be in order.
#include <cmath>
#include <cstdio>
#include <heed/heed.hpp>
#include <random>
#include <vector>

constexpr int64_t kBatch = 2, kHeadsQ = 8, kHeadsKv = 2, kHeadDim = 64, kPageSize = 16, kPages = 8, kMaxPages = 4;
constexpr int64_t kRotary = kHeadDim / 2;  // angles

int main() {
  std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  const auto fill = [&](std::vector<float>& x) {
    for (float& value : x) value = normal(generator);
  };

  std::vector<float> k_cache(kPages * kPageSize * kHeadsKv * kHeadDim), v_cache(k_cache.size());
  std::vector<int32_t> page_table = {5, 0, 3, 6, /* second conversation */ 2, 7, 1, 4};
  std::vector<int32_t> lengths = {0, 0};
  std::vector<float> cos(kMaxPages * kPageSize * kRotary), sin(cos.size());
  for (int64_t i = 0; i < static_cast<int64_t>(cos.size()); ++i) {
    const double angle =
        static_cast<double>(i / kRotary) * std::pow(10000.0, -static_cast<double>(i % kRotary) / kRotary);
    cos[i] = static_cast<float>(std::cos(angle)), sin[i] = static_cast<float>(std::sin(angle));
  }
  std::vector<float> q(kBatch * kHeadsQ * kHeadDim), out(q.size()), k(kBatch * kHeadsKv * kHeadDim), v(k.size());

  const heed::TensorView keys(k_cache.data(), {kPages, kPageSize, kHeadsKv, kHeadDim});
  const heed::TensorView values(v_cache.data(), {kPages, kPageSize, kHeadsKv, kHeadDim});
  const heed::TensorView queries(q.data(), {kBatch, 1, kHeadsQ, kHeadDim});
  const heed::TensorView result(out.data(), {kBatch, 1, kHeadsQ, kHeadDim});
  const heed::TensorView table(page_table.data(), {kBatch, kMaxPages}), used(lengths.data(), {kBatch});

  const heed::AttentionOptions attend = {.causal = true, .seqused_k = used, .page_table = table};
  for (int step = 0; step < 50; ++step) {
    fill(q), fill(k), fill(v);
    heed::kv_append(keys, values, used,
                    {.k_new = {k.data(), {kBatch, 1, kHeadsKv, kHeadDim}},
                     .v_new = {v.data(), {kBatch, 1, kHeadsKv, kHeadDim}},
                     .q = queries,
                     .q_out = queries,
                     .rotary_cos = {cos.data(), {kMaxPages * kPageSize, kRotary}},
                     .rotary_sin = {sin.data(), {kMaxPages * kPageSize, kRotary}},
                     .page_table = table});
    for (int32_t& length : lengths) ++length;
    heed::attention(queries, keys, values, result, attend);
  }

  const heed_attention_args args = heed::attention_args(queries, keys, values, result, attend);
  heed_check_report report = {};
  report.struct_size = sizeof report;
  heed::check(heed_attention_check(&args, &report));
  std::printf("%s\nlast token: largest error %.3g, allowed %.3g\n", heed::Problem::of(args).line().c_str(),
              report.tensors[0].max_error, report.tensors[0].max_bound);
  return report.passed ? 0 : 1;
}
