// A force sensor at 1 kHz: each sample attends to the last 250 ms. Live, one sample at a time, with the buffer that a robot
// keeps; and offline over the whole recording with a window. Both must agree, as a policy is trained on one and runs on the other.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <heed/heed.hpp>
#include <vector>

constexpr int64_t kSamples = 1000, kWindow = 250, kHeads = 2, kHeadDim = 32, kRow = kHeads * kHeadDim;

// Features of one sample of a recording: a push with a vibration on it, seen at many frequencies.
void features(int64_t sample, double phase, float* row) {
  const double seconds = static_cast<double>(sample) * 1e-3;
  const double force = 5 * std::exp(-20 * (seconds - 0.5) * (seconds - 0.5)) + 0.3 * std::sin(2 * M_PI * 60 * seconds);
  for (int64_t i = 0; i < kRow; ++i)
    row[i] = static_cast<float>(std::sin(force * (1 + 0.1 * double(i)) + phase * double(i)));
}

int main() {
  std::vector<float> q(kSamples * kRow), k(q.size()), v(q.size()), offline(q.size()), live(kRow);
  for (int64_t t = 0; t < kSamples; ++t) {
    features(t, 0.1, &q[t * kRow]);
    features(t, 0.7, &k[t * kRow]);
    features(t, 1.9, &v[t * kRow]);
  }
  const auto view = [](std::vector<float>& data, int64_t first, int64_t count) {
    return heed::TensorView(&data[first * kRow], {1, count, kHeads, kHeadDim});
  };

  // Offline: window_left counts the past samples that are seen besides the sample itself.
  heed::attention(view(q, 0, kSamples), view(k, 0, kSamples), view(v, 0, kSamples), view(offline, 0, kSamples),
                  {.causal = true, .window_left = kWindow - 1});

  // Live: the buffer holds the window and nothing else, so no mask is needed.
  double worst = 0;
  for (int64_t t = 0; t < kSamples; ++t) {
    const int64_t first = std::max<int64_t>(0, t - kWindow + 1), count = t - first + 1;
    heed::attention(view(q, t, 1), view(k, first, count), view(v, first, count), view(live, 0, 1));
    for (int64_t i = 0; i < kRow; ++i) worst = std::max(worst, std::abs(double(live[i]) - offline[t * kRow + i]));
  }
  std::printf("%lld samples, window %lld: live and offline differ by at most %.3g\n", static_cast<long long>(kSamples),
              static_cast<long long>(kWindow), worst);
  return worst < 1e-5 ? 0 : 1;
}
