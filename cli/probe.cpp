#include "probe.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

#include "machine_facts.h"
#include "tensor_file.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace heed::cli {
namespace {

// Enough independent sums to fill two units of latency four or five, and to stay in the registers there are.
constexpr int kSums = 12;

// One function an instruction set: `steps` rounds of kSums multiply-adds; what it returns depends on all of them.
using Loop = double (*)(int64_t steps);
struct FmaLoop {
  Loop run;
  int lanes;
};

#if defined(__x86_64__)

__attribute__((target("avx512f"))) double fma_avx512(int64_t steps) {
  __m512 sum[kSums], factor = _mm512_set1_ps(0.999f), term = _mm512_set1_ps(0.001f);
  for (int i = 0; i < kSums; ++i) sum[i] = _mm512_set1_ps(static_cast<float>(i));
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < kSums; ++i) sum[i] = _mm512_fmadd_ps(sum[i], factor, term);
  }
  double total = 0;
  for (int i = 0; i < kSums; ++i) total += _mm512_cvtss_f32(sum[i]);
  return total;
}

__attribute__((target("avx2,fma"))) double fma_avx2(int64_t steps) {
  __m256 sum[kSums], factor = _mm256_set1_ps(0.999f), term = _mm256_set1_ps(0.001f);
  for (int i = 0; i < kSums; ++i) sum[i] = _mm256_set1_ps(static_cast<float>(i));
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < kSums; ++i) sum[i] = _mm256_fmadd_ps(sum[i], factor, term);
  }
  double total = 0;
  for (int i = 0; i < kSums; ++i) total += _mm256_cvtss_f32(sum[i]);
  return total;
}

double fma_sse2(int64_t steps) {  // no fused form: one multiply and one add
  __m128 sum[kSums], factor = _mm_set1_ps(0.999f), term = _mm_set1_ps(0.001f);
  for (int i = 0; i < kSums; ++i) sum[i] = _mm_set1_ps(static_cast<float>(i));
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < kSums; ++i) sum[i] = _mm_add_ps(_mm_mul_ps(sum[i], factor), term);
  }
  double total = 0;
  for (int i = 0; i < kSums; ++i) total += _mm_cvtss_f32(sum[i]);
  return total;
}

FmaLoop fma_loop() {
  if (__builtin_cpu_supports("avx512f")) return {fma_avx512, 16};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {fma_avx2, 8};
  return {fma_sse2, 4};
}

#elif defined(__aarch64__)

double fma_neon(int64_t steps) {
  float32x4_t sum[kSums], factor = vdupq_n_f32(0.999f), term = vdupq_n_f32(0.001f);
  for (int i = 0; i < kSums; ++i) sum[i] = vdupq_n_f32(static_cast<float>(i));
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < kSums; ++i) sum[i] = vfmaq_f32(term, sum[i], factor);
  }
  double total = 0;
  for (int i = 0; i < kSums; ++i) total += vaddvq_f32(sum[i]);
  return total;
}

FmaLoop fma_loop() { return {fma_neon, 4}; }

#else
#error "write the multiply-add loop of this architecture"
#endif

// Sums a block of memory, a cache line a step in eight independent sums.
uint64_t read_block(const uint64_t* words, size_t count) {
  uint64_t sum[8] = {};
  for (size_t i = 0; i + 8 <= count; i += 8) {
    for (int j = 0; j < 8; ++j) sum[j] += words[i + j];
  }
  uint64_t total = 0;
  for (const uint64_t part : sum) total += part;
  return total;
}

std::atomic<uint64_t> sink{0};  // what the loops compute goes here, so that they are not removed

// Seconds from the moment all threads are ready to the moment the last is done; the best of `rounds`.
double best_seconds(int threads, int rounds, const std::function<void(int)>& task) {
  double best = 1e30;
  for (int round = 0; round < rounds; ++round) {
    std::atomic<int> ready{0};
    std::atomic<bool> go{false};
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i) {
      others.emplace_back([&, i] {
        ready.fetch_add(1);
        while (!go.load(std::memory_order_acquire)) std::this_thread::yield();
        task(i);
      });
    }
    while (ready.load() < threads - 1) std::this_thread::yield();
    const auto start = std::chrono::steady_clock::now();
    go.store(true, std::memory_order_release);
    task(0);
    for (std::thread& other : others) other.join();
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

}  // namespace

double probe_peak_gflops(int threads) {
  const FmaLoop loop = fma_loop();
  constexpr int64_t kSteps = 1'000'000;  // a few milliseconds
  const auto task = [&](int) { sink += static_cast<uint64_t>(loop.run(kSteps)); };
  const double seconds = best_seconds(threads, 8, task);
  return 2.0 * loop.lanes * kSums * kSteps * threads / seconds / 1e9;
}

double probe_read_gbs(int threads) {
  // Four times the last cache, within what a machine can spare; written first, so that every page is real.
  const size_t bytes =
      static_cast<size_t>(std::clamp<int64_t>(4 * last_cache_bytes(), int64_t{64} << 20, int64_t{1} << 29));
  const AlignedBytes memory(bytes);
  const size_t words = bytes / sizeof(uint64_t) / static_cast<size_t>(threads);
  const auto* first = reinterpret_cast<const uint64_t*>(memory.data());
  const auto task = [&](int i) { sink += read_block(first + static_cast<size_t>(i) * words, words); };
  const double seconds = best_seconds(threads, 5, task);
  return static_cast<double>(words * sizeof(uint64_t)) * threads / seconds / 1e9;
}

}  // namespace heed::cli
