// What the machine can do at most, measured beside the attention calls: multiply-adds a second, bytes read a second,
// and the host's share of a call. Compiled on demand by peers_cpu.py with -O3 -march=native.
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

using Clock = std::chrono::steady_clock;

double seconds_between(Clock::time_point begin, Clock::time_point end) {
  return std::chrono::duration<double>(end - begin).count();
}

// Runs body(i) on `threads` threads that start together; seconds from the first start to the last end.
template <class Body>
double timed_together(int threads, Body&& body) {
  std::vector<Clock::time_point> begin(threads), end(threads);
  std::atomic<int> ready{0};
  auto work = [&](int i) {
    ready.fetch_add(1);
    while (ready.load() < threads) {
    }
    begin[i] = Clock::now();
    body(i);
    end[i] = Clock::now();
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(work, i);
  work(0);
  for (auto& other : others) other.join();
  Clock::time_point first = begin[0], last = end[0];
  for (int i = 1; i < threads; ++i) {
    first = begin[i] < first ? begin[i] : first;
    last = end[i] > last ? end[i] : last;
  }
  return seconds_between(first, last);
}

// Independent chains, enough of them to cover latency times throughput of any core there is (4 cycles x 2 units, or
// 4 x 4 on ARM), spelled out as variables: an array that an asm touches would live in memory. The empty asm makes the
// compiler forget the value, so that it can neither drop nor fold a multiply-add.
#define HEED_PROBE_TWELVE(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
#define HEED_PROBE_DOZEN_MORE(X) X(12) X(13) X(14) X(15) X(16) X(17) X(18) X(19) X(20) X(21) X(22) X(23)

#if defined(__AVX512F__)
using Vector = __m512;
constexpr int kLanes = 16, kChains = 24;
inline Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
inline Vector splat(float x) { return _mm512_set1_ps(x); }
#define HEED_PROBE_KEEP(x) asm volatile("" : "+v"(x))
#define HEED_PROBE_CHAINS(X) HEED_PROBE_TWELVE(X) HEED_PROBE_DOZEN_MORE(X)
#elif defined(__AVX2__)
using Vector = __m256;
constexpr int kLanes = 8, kChains = 12;  // of 16 registers
inline Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
inline Vector splat(float x) { return _mm256_set1_ps(x); }
#define HEED_PROBE_KEEP(x) asm volatile("" : "+x"(x))
#define HEED_PROBE_CHAINS(X) HEED_PROBE_TWELVE(X)
#elif defined(__ARM_NEON)
using Vector = float32x4_t;
constexpr int kLanes = 4, kChains = 24;
inline Vector fma(Vector a, Vector b, Vector c) { return vfmaq_f32(c, a, b); }
inline Vector splat(float x) { return vdupq_n_f32(x); }
#define HEED_PROBE_KEEP(x) asm volatile("" : "+w"(x))
#define HEED_PROBE_CHAINS(X) HEED_PROBE_TWELVE(X) HEED_PROBE_DOZEN_MORE(X)
#else
#error "the probe knows AVX-512, AVX2 and NEON"
#endif

#define HEED_PROBE_DECLARE(i) Vector sum##i = splat(static_cast<float>(i));
#define HEED_PROBE_FMA(i)     \
  sum##i = fma(a, sum##i, b); \
  HEED_PROBE_KEEP(sum##i);
#define HEED_PROBE_DOT(i)                  \
  sum##i = _mm512_dpbf16_ps(sum##i, a, a); \
  HEED_PROBE_KEEP(sum##i);

void multiply_add(int64_t rounds) {
  HEED_PROBE_CHAINS(HEED_PROBE_DECLARE)
  Vector a = splat(0.999f), b = splat(0.001f);
  HEED_PROBE_KEEP(a);
  HEED_PROBE_KEEP(b);
  for (int64_t round = 0; round < rounds; ++round) {
    HEED_PROBE_CHAINS(HEED_PROBE_FMA)
  }
}

#if defined(__AVX512BF16__)
void dot_bf16(int64_t rounds) {
  HEED_PROBE_CHAINS(HEED_PROBE_DECLARE)
  __m512i bits = _mm512_set1_epi32(0x3f803f80);  // ones
  HEED_PROBE_KEEP(bits);
  const __m512bh a = (__m512bh)bits;
  for (int64_t round = 0; round < rounds; ++round) {
    HEED_PROBE_CHAINS(HEED_PROBE_DOT)
  }
}
#endif

// Loads every byte once; nothing is computed with them but an or, so that the loads are what is timed.
void read_range(const char* data, size_t bytes) {
  size_t at = 0;
#if defined(__AVX512F__)
  __m512i sum[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
  for (; at + 512 <= bytes; at += 512) {
    _mm_prefetch(data + at + 4096, _MM_HINT_T0);
    _mm_prefetch(data + at + 4096 + 64, _MM_HINT_T0);
    _mm_prefetch(data + at + 4096 + 128, _MM_HINT_T0);
    _mm_prefetch(data + at + 4096 + 192, _MM_HINT_T0);
    _mm_prefetch(data + at + 4096 + 256, _MM_HINT_T0);
    _mm_prefetch(data + at + 4096 + 320, _MM_HINT_T0);
    _mm_prefetch(data + at + 4096 + 384, _MM_HINT_T0);
    _mm_prefetch(data + at + 4096 + 448, _MM_HINT_T0);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      sum[i % 4] = _mm512_or_si512(sum[i % 4], _mm512_loadu_si512(data + at + 64 * i));
    }
  }
  for (auto& part : sum) HEED_PROBE_KEEP(part);
#else
  uint64_t sum[4] = {};
  for (; at + 32 <= bytes; at += 32) {
    for (int i = 0; i < 4; ++i) {
      uint64_t word;
      std::memcpy(&word, data + at + 8 * i, 8);
      sum[i] |= word;
    }
  }
  for (auto& part : sum) asm volatile("" : "+r"(part));
#endif
  unsigned char rest = 0;
  for (; at < bytes; ++at) rest |= static_cast<unsigned char>(data[at]);
  asm volatile("" : "+r"(rest));
}

}  // namespace

extern "C" {

// f32 flops per second, all threads together.
double probe_fma(int threads, int64_t rounds) {
  const double seconds = timed_together(threads, [&](int) { multiply_add(rounds); });
  return 2.0 * kLanes * kChains * static_cast<double>(rounds) * threads / seconds;
}

// Flops per second of the bf16 dot instruction; 0 where this build has none.
double probe_bf16(int threads, int64_t rounds) {
#if defined(__AVX512BF16__)
  const double seconds = timed_together(threads, [&](int) { dot_bf16(rounds); });
  return 4.0 * kLanes * kChains * static_cast<double>(rounds) * threads / seconds;
#else
  (void)threads, (void)rounds;
  return 0;
#endif
}

// Seconds to read all the ranges once, each thread an equal share of every range.
double probe_read(int threads, int num_ranges, const void* const* data, const size_t* bytes) {
  return timed_together(threads, [&](int i) {
    for (int r = 0; r < num_ranges; ++r) {
      const size_t begin = bytes[r] / threads * i, end = i + 1 == threads ? bytes[r] : bytes[r] / threads * (i + 1);
      read_range(static_cast<const char*>(data[r]) + begin, end - begin);
    }
  });
}

// Seconds per call of `call(a, b)`, from here because the loop in Python would be most of it. `before`, where given,
// runs ahead of each call and is not counted. Returns a negative number where a call fails.
double probe_calls(int32_t (*call)(const void*, const void*), const void* a, const void* b, int64_t calls,
                   void (*before)()) {
  if (before == nullptr) {
    const auto begin = Clock::now();
    for (int64_t i = 0; i < calls; ++i) {
      if (call(a, b) != 0) return -1;
    }
    return seconds_between(begin, Clock::now()) / static_cast<double>(calls);
  }
  double total = 0;
  for (int64_t i = 0; i < calls; ++i) {
    before();
    const auto begin = Clock::now();
    if (call(a, b) != 0) return -1;
    total += seconds_between(begin, Clock::now());
  }
  return total / static_cast<double>(calls);
}

}  // extern "C"
