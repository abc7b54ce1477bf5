// heed on OpenMP's threads, through heed/openmp.hpp: the same bits as on the caller's thread alone, also from inside a
// parallel region.
#include <heed/heed.hpp>
#include <heed/openmp.hpp>

#include <cstdio>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t kBatch = 2, kSeqlen = 40, kHeads = 4, kHeadDim = 16;

std::vector<float> attend(const std::vector<float>& x, const heed_executor* executor) {
  std::vector<float> out(x.size());
  const auto view = [](const std::vector<float>& data) {
    return heed::TensorView(data.data(), {kBatch, kSeqlen, kHeads, kHeadDim});
  };
  heed::attention(view(x), view(x), view(x), view(out), {.causal = true, .executor = executor});
  return out;
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

}  // namespace

int main() {
  std::vector<float> x(kBatch * kSeqlen * kHeads * kHeadDim);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i * 7919 % 1000) / 500.0f - 1.0f;
  const std::vector<float> serial = attend(x, heed_executor_serial());
  int failures = same(attend(x, heed::openmp_executor()), serial) ? 0 : 1;
#pragma omp parallel for reduction(+ : failures)
  for (int i = 0; i < 8; ++i) failures += same(attend(x, heed::openmp_executor()), serial) ? 0 : 1;
  std::printf("%d threads, %d failures\n", heed::openmp_executor()->num_threads, failures);
  return failures == 0 ? 0 : 1;
}
