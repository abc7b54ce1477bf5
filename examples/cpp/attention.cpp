// A training step's attention: forward with lse, backward, planned once and run many times without allocating.
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <heed/heed.hpp>
#include <memory>
#include <random>
#include <vector>

constexpr int64_t kBatch = 2, kSeqlen = 128, kHeads = 4, kHeadDim = 32, kSize = kBatch * kSeqlen * kHeads * kHeadDim;

std::vector<float> normal_numbers(uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> numbers(kSize);
  for (float& x : numbers) x = normal(generator);
  return numbers;
}

heed::TensorView bshd(std::vector<float>& data) { return {data.data(), {kBatch, kSeqlen, kHeads, kHeadDim}}; }

// A plan with the workspace that it asked for.
struct Planned {
  heed::Plan plan;
  std::unique_ptr<std::byte[]> memory;
  explicit Planned(heed_attention_args& args) : plan(heed::Problem::of(args)) {
    size_t space = plan.workspace_bytes() + 64;
    memory = std::make_unique<std::byte[]>(space);
    args.workspace = memory.get();
    args.workspace_bytes = plan.workspace_bytes();
    std::align(64, plan.workspace_bytes(), args.workspace, space);
  }
};

int main() {
  std::vector<float> q = normal_numbers(1), k = normal_numbers(2), v = normal_numbers(3), dout = normal_numbers(4);
  std::vector<float> out(kSize), dq(kSize), dk(kSize), dv(kSize), lse(kBatch * kHeads * kSeqlen);
  const heed::AttentionOptions options = {.lse = {lse.data(), {kBatch, kHeads, kSeqlen}}, .causal = true};

  heed_attention_args forward_args = heed::attention_args(bshd(q), bshd(k), bshd(v), bshd(out), options);
  heed_attention_args backward_args = heed::attention_backward_args(
      bshd(q), bshd(k), bshd(v), bshd(out), bshd(dout), {.dq = bshd(dq), .dk = bshd(dk), .dv = bshd(dv)}, options);
  const Planned forward(forward_args), backward(backward_args);
  std::printf("%s\n%s", forward.plan.text().c_str(), backward.plan.text().c_str());

  forward.plan.run(forward_args);
  backward.plan.run(backward_args);

  // The loss sum(dout * out) is linear in v: dv · v gives it again.
  double loss = 0, from_gradient = 0;
  for (int64_t i = 0; i < kSize; ++i) loss += dout[i] * out[i], from_gradient += dv[i] * v[i];
  std::printf("loss %.6f, from dv %.6f\n", loss, from_gradient);
  return std::abs(loss - from_gradient) < 1e-3 * (1 + std::abs(loss)) ? 0 : 1;
}
