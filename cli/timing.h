// Times of repeated calls, in microseconds.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <vector>

namespace heed::cli {

struct Timing {
  double median_us = 0, p10_us = 0, p90_us = 0;
  int samples = 0;
};

Timing summarize(std::vector<double> samples_us);

// One sample: the mean of `calls` calls back to back.
template <class Call>
double sample_us(int64_t calls, Call call) {
  const auto start = std::chrono::steady_clock::now();
  for (int64_t i = 0; i < calls; ++i) call();
  const std::chrono::duration<double, std::micro> elapsed = std::chrono::steady_clock::now() - start;
  return elapsed.count() / static_cast<double>(calls);
}

// Warms up, and finds how many calls make a sample of `least_us`.
template <class Call>
int64_t calls_per_sample(double least_us, Call call) {
  int64_t calls = 1;
  call();
  while (true) {
    const double each = sample_us(calls, call);
    if (each * static_cast<double>(calls) >= least_us || calls >= (int64_t{1} << 30)) return calls;
    const double wanted = each > 0 ? 1.1 * least_us / each : 1e9;
    calls = std::max<int64_t>(calls + 1, std::min<int64_t>(calls * 16, static_cast<int64_t>(wanted) + 1));
  }
}

}  // namespace heed::cli
