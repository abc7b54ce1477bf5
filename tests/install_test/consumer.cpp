#include <heed/heed.hpp>

#include <cstdio>
#include <vector>

int main() {
  const std::vector<float> q(2 * 8, 0.5f), k(3 * 8, 0.25f), v(3 * 8, 2.0f);
  std::vector<float> out(2 * 8);
  heed::attention(heed::TensorView(q.data(), {1, 2, 1, 8}), heed::TensorView(k.data(), {1, 3, 1, 8}),
                  heed::TensorView(v.data(), {1, 3, 1, 8}), heed::TensorView(out.data(), {1, 2, 1, 8}),
                  {.causal = true});
  try {
    heed::Problem::parse("attention wings=2");
    return 1;
  } catch (const heed::Error& error) {
    if (error.status() != HEED_INVALID_ARGUMENT) return 1;
  }
  std::printf("heed %s from C++: %g\n", heed_version(), out[0]);
  return out[0] == 2.0f ? 0 : 1;
}
