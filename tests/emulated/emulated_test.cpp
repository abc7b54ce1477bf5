// attention_fwd_sm90 itself, on the host: the kernel's own source over emulated threads, copies and products
// (cuda_emulated.h), against plain arithmetic in double precision. The build puts the kernel's files beside stand-ins for
// ptx.cuh and mma_sm90.cuh.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "cuda_emulated.h"

namespace heed::cuda {
unsigned char smem[16];  // emulated::shared is what addresses mean
}

#include "attention_fwd_sm90.cu"

namespace heed::cuda {
namespace {

constexpr int kUnbounded = -1;

struct Case {
  int batch = 1, nheads_q = 1, nheads_kv = 1, seqlen_q, seqlen_k, head_dim, head_dim_v;
  int left = kUnbounded, right = kUnbounded;
  int offset = std::numeric_limits<int>::max();  // the default: the last row sees the last key
  float scale = 0.125f, times = 1.0f;            // of q
  bool sinks = false, counts_tiles = false;
  bool hidden_nan = false;  // in values that no row sees
};

class Problem {
 public:
  Problem(const Case& c, bool is_bf16, unsigned seed) : c_(c), is_bf16_(is_bf16), random_(seed) {
    offset_ = c.offset == std::numeric_limits<int>::max() ? c.seqlen_k - c.seqlen_q : c.offset;
    q = tensor(c.batch, c.seqlen_q, c.nheads_q, c.head_dim, c.times);
    k = tensor(c.batch, c.seqlen_k, c.nheads_kv, c.head_dim, 1.0f);
    v = tensor(c.batch, c.seqlen_k, c.nheads_kv, c.head_dim_v, 1.0f);
    out.assign(size_t(c.batch) * c.seqlen_q * c.nheads_q * c.head_dim_v, 0x7fff);
    lse.assign(size_t(c.batch) * c.seqlen_q * c.nheads_q, std::nanf(""));
    for (int h = 0; h < c.nheads_q; ++h) sinks.push_back(normal_(random_));
    for (int j = 0; j < c.seqlen_k && c.hidden_nan; ++j) {
      bool shown = false;
      for (int i = 0; i < c.seqlen_q; ++i) shown = shown || sees(i, j);
      for (int b = 0; b < c.batch && !shown; ++b)
        std::fill_n(v.begin() + (size_t(b) * c.seqlen_k + j) * c.nheads_kv * c.head_dim_v, c.nheads_kv * c.head_dim_v,
                    uint16_t{0x7fff});
    }
  }

  bool sees(int i, int j) const {
    return (c_.left < 0 || j >= i + offset_ - c_.left) && (c_.right < 0 || j <= i + offset_ + c_.right);
  }

  // All that the kernel reads but tensor maps and what depends on the tile.
  AttentionFwdSm90Params params() {
    constexpr int kFar = 1 << 30;
    AttentionFwdSm90Params a = {};
    AttentionFwdParams& p = a.common;
    p.q = q.data(), p.k = k.data(), p.v = v.data(), p.out = out.data(), p.lse = lse.data();
    p.sinks = c_.sinks ? sinks.data() : nullptr;
    p.q_stride = strides(c_.seqlen_q, c_.nheads_q, c_.head_dim);
    p.k_stride = strides(c_.seqlen_k, c_.nheads_kv, c_.head_dim);
    p.v_stride = strides(c_.seqlen_k, c_.nheads_kv, c_.head_dim_v);
    p.out_stride = strides(c_.seqlen_q, c_.nheads_q, c_.head_dim_v);
    p.lse_stride = {i64{c_.nheads_q} * c_.seqlen_q, c_.seqlen_q, 1};
    p.batch = c_.batch, p.seqlen_q = c_.seqlen_q, p.seqlen_k = c_.seqlen_k;
    p.nheads_q = c_.nheads_q, p.nheads_kv = c_.nheads_kv, p.gqa_ratio = c_.nheads_q / c_.nheads_kv;
    p.rows_per_query = 1, p.head_dim = c_.head_dim, p.head_dim_v = c_.head_dim_v;
    p.window_left = c_.left, p.window_right = c_.right, p.offset_kind = 2, p.q_offset = offset_;
    p.softmax_scale_log2 = c_.scale * 1.44269504f, p.dropout_scale = 1.0f;
    p.longest_first = c_.right >= 0 && c_.left < 0;
    p.heads_per_section = std::max(1, c_.nheads_q * c_.batch * 2 / 3);
    a.offset = offset_;
    a.lo_shift = c_.left >= 0 ? offset_ - c_.left : -kFar;
    a.hi_shift = c_.right >= 0 ? offset_ + c_.right + 1 : kFar;
    return a;
  }

  // Every row against double precision; "" or the first that is wrong.
  std::string judge() const {
    const double of_p = is_bf16_ ? 1.6e-2 : 2e-3;  // rounding of P and of O
    for (int b = 0; b < c_.batch; ++b)
      for (int h = 0; h < c_.nheads_q; ++h)
        for (int i = 0; i < c_.seqlen_q; ++i) {
          std::vector<double> want(c_.head_dim_v);
          const double want_lse = row(b, h, i, want);
          const std::string where = " of row " + std::to_string(i) + ", head " + std::to_string(h);
          const float got = lse[(size_t(b) * c_.nheads_q + h) * c_.seqlen_q + i];
          const double bound = 1e-4 + 1e-5 * std::fabs(want_lse);
          if (std::isinf(want_lse) ? got != want_lse : !(std::fabs(got - want_lse) <= bound))
            return "lse " + std::to_string(got) + where + ", want " + std::to_string(want_lse);
          for (int d = 0; d < c_.head_dim_v; ++d) {
            const float x = number(out[((size_t(b) * c_.seqlen_q + i) * c_.nheads_q + h) * c_.head_dim_v + d]);
            if (!(std::fabs(x - want[d]) <= of_p * (1 + std::fabs(want[d]))))
              return "out " + std::to_string(x) + where + ", want " + std::to_string(want[d]);
          }
        }
    return {};
  }

  std::vector<uint16_t> q, k, v, out;
  std::vector<float> lse, sinks;

 private:
  std::vector<uint16_t> tensor(int batch, int rows, int heads, int columns, float times) {
    std::vector<uint16_t> t(size_t(batch) * rows * heads * columns);
    for (uint16_t& x : t) {
      const float value = normal_(random_) * times;
      x = is_bf16_ ? to_bf16(value).bits : to_f16(value).bits;
    }
    return t;
  }
  static Strides3 strides(i64 rows, i64 heads, i64 columns) {
    return {rows * heads * columns, columns, heads * columns};
  }
  float number(uint16_t bits) const { return is_bf16_ ? to_float(Bf16{bits}) : to_float(F16{bits}); }

  double row(int b, int h, int i, std::vector<double>& o) const {
    const int h_kv = h / (c_.nheads_q / c_.nheads_kv);
    std::vector<double> s(c_.seqlen_k, -std::numeric_limits<double>::infinity());
    double top = c_.sinks ? sinks[h] : -std::numeric_limits<double>::infinity(), sum = 0;
    for (int j = 0; j < c_.seqlen_k; ++j) {
      if (!sees(i, j)) continue;
      double dot = 0;
      for (int d = 0; d < c_.head_dim; ++d)
        dot += double{number(q[((size_t(b) * c_.seqlen_q + i) * c_.nheads_q + h) * c_.head_dim + d])} *
               number(k[((size_t(b) * c_.seqlen_k + j) * c_.nheads_kv + h_kv) * c_.head_dim + d]);
      s[j] = dot * c_.scale;
      top = std::max(top, s[j]);
    }
    if (std::isinf(top)) return top;
    for (int j = 0; j < c_.seqlen_k; ++j) {
      if (std::isinf(s[j])) continue;
      const double p = std::exp(s[j] - top);
      sum += p;
      for (int d = 0; d < c_.head_dim_v; ++d)
        o[d] += p * number(v[((size_t(b) * c_.seqlen_k + j) * c_.nheads_kv + h_kv) * c_.head_dim_v + d]);
    }
    if (c_.sinks) sum += std::exp(sinks[h] - top);
    for (double& x : o) x /= sum;
    return top + std::log(sum);
  }

  const Case c_;
  const bool is_bf16_;
  int offset_ = 0;
  std::mt19937 random_;
  std::normal_distribution<float> normal_;
};

// As mma_sm90.cuh of this folder reads it.
void map_tensor(TensorMap& map, void* data, i64 columns, i64 rows, i64 heads, i64 sequences, const Strides3& stride,
                int box_rows) {
  const i64 words[] = {reinterpret_cast<i64>(data),
                       columns,
                       rows,
                       heads,
                       sequences,
                       stride.s * 2,
                       stride.h * 2,
                       stride.b * 2,
                       i64{box_rows}};
  std::copy(std::begin(words), std::end(words), map.opaque);
}

// Runs every block of the grid, one after the other: "" or what is wrong.
template <AttentionFwdSm90Variant kV>
std::string failure_of(const Case& c, unsigned seed) {
  Problem problem(c, kV.is_bf16 != 0, seed);
  AttentionFwdSm90Params a = problem.params();
  AttentionFwdParams& p = a.common;
  p.num_tiles_q = (c.seqlen_q + Layout<kV>::kTileQ - 1) / Layout<kV>::kTileQ;
  a.num_work_tiles = static_cast<i32>(p.num_tiles_q * c.nheads_q * c.batch);
  u64 counter = 0x0123456789abcdefull;
  if (c.counts_tiles) a.next_tile = &counter, a.mark = 0x5a5a5a5a5aull << kTileBits;
  map_tensor(a.q_map, problem.q.data(), c.head_dim, c.seqlen_q, c.nheads_q, c.batch, p.q_stride, 64);
  map_tensor(a.k_map, problem.k.data(), c.head_dim, c.seqlen_k, c.nheads_kv, c.batch, p.k_stride, kV.tile_k);
  map_tensor(a.v_map, problem.v.data(), c.head_dim_v, c.seqlen_k, c.nheads_kv, c.batch, p.v_stride, kV.tile_k);
  map_tensor(a.out_map, problem.out.data(), c.head_dim_v, c.seqlen_q, c.nheads_q, c.batch, p.out_stride, 64);
  const unsigned grid = std::min(3u, static_cast<unsigned>(a.num_work_tiles));
  for (unsigned index = 0; index < grid; ++index) {
    const std::string failure =
        emulated::run_block(Layout<kV>::kThreads, index, grid, seed * 16 + index, [&a] { attention_fwd_sm90<kV>(a); });
    if (!failure.empty()) return failure;
  }
  if (c.counts_tiles && counter != 0) return "the counter is left at " + std::to_string(counter);
  return problem.judge();
}

// One variant of each schedule in the tile table.
constexpr AttentionFwdSm90Variant
    kD64 = {.is_bf16 = 1, .consumers = 4, .tile_k = 64, .stages = 4},
    kD64Causal = {.is_bf16 = 1, .consumers = 4, .tile_k = 64, .stages = 4, .mask = kMaskRange},
    kD64Window = {.consumers = 4, .tile_k = 64, .stages = 4, .mask = kMaskRange, .has_lower_end = 1},
    kD64Short = {.is_bf16 = 1, .consumers = 1, .blocks = 2, .mask = kMaskRange},
    kD96Causal =
        {.is_bf16 = 1, .head_dim = 96, .head_dim_v = 96, .consumers = 3, .tile_k = 96, .rings = 2, .mask = kMaskRange},
    kD128 = {.is_bf16 = 1, .head_dim = 128, .head_dim_v = 128, .q_in_registers = 1, .ping_pong = 1},
    kD128Window =
        {.head_dim = 128, .head_dim_v = 128, .rings = 2, .q_in_registers = 1, .mask = kMaskRange, .has_lower_end = 1},
    kD192 = {.is_bf16 = 1, .head_dim = 192, .head_dim_v = 128, .ping_pong = 1},
    kD256Causal = {.is_bf16 = 1, .head_dim = 256, .head_dim_v = 256, .tile_k = 64, .rings = 2, .mask = kMaskRange};

TEST(EmulatedSm90, EveryKey) {
  EXPECT_EQ(failure_of<kD64>({.nheads_q = 2, .seqlen_q = 300, .seqlen_k = 200, .head_dim = 64, .head_dim_v = 56}, 1),
            "");
  EXPECT_EQ(failure_of<kD128>({.nheads_q = 2, .seqlen_q = 200, .seqlen_k = 270, .head_dim = 128, .head_dim_v = 128}, 2),
            "");
  EXPECT_EQ(failure_of<kD192>({.seqlen_q = 130, .seqlen_k = 290, .head_dim = 192, .head_dim_v = 120}, 3), "");
}

TEST(EmulatedSm90, Ranges) {
  EXPECT_EQ(failure_of<kD64Causal>({.batch = 2,
                                    .nheads_q = 2,
                                    .seqlen_q = 300,
                                    .seqlen_k = 333,
                                    .head_dim = 64,
                                    .head_dim_v = 64,
                                    .right = 0,
                                    .counts_tiles = true},
                                   4),
            "");
  EXPECT_EQ(failure_of<kD64Short>({.nheads_q = 4,
                                   .nheads_kv = 2,
                                   .seqlen_q = 90,
                                   .seqlen_k = 290,
                                   .head_dim = 48,
                                   .head_dim_v = 64,
                                   .right = 0,
                                   .sinks = true},
                                  5),
            "");
  EXPECT_EQ(failure_of<kD96Causal>({.seqlen_q = 260, .seqlen_k = 200, .head_dim = 88, .head_dim_v = 96, .right = 0}, 6),
            "");
  EXPECT_EQ(
      failure_of<kD256Causal>({.seqlen_q = 150, .seqlen_k = 210, .head_dim = 256, .head_dim_v = 248, .right = 0}, 7),
      "");
}

// Whole tiles hidden at either end, rows that see nothing, hidden values that are NaN.
TEST(EmulatedSm90, Windows) {
  for (const int offset : {-150, 0, 60, 500}) {
    EXPECT_EQ(failure_of<kD64Window>({.seqlen_q = 300,
                                      .seqlen_k = 400,
                                      .head_dim = 64,
                                      .head_dim_v = 64,
                                      .left = 40,
                                      .right = 10,
                                      .offset = offset,
                                      .hidden_nan = true},
                                     8),
              "")
        << offset;
    EXPECT_EQ(failure_of<kD128Window>({.seqlen_q = 150,
                                       .seqlen_k = 600,
                                       .head_dim = 128,
                                       .head_dim_v = 128,
                                       .left = 130,
                                       .right = 3,
                                       .offset = offset,
                                       .sinks = true,
                                       .hidden_nan = true},
                                      9),
              "")
        << offset;
  }
}

// Scores whose first maximum does not hold; scales of either sign; scores so large that rounding shows.
TEST(EmulatedSm90, ExactSteps) {
  const Case of_64 = {.seqlen_q = 70, .seqlen_k = 400, .head_dim = 64, .head_dim_v = 64, .times = 40};
  EXPECT_EQ(failure_of<kD64>(of_64, 10), "");
  for (const float scale : {-1.0f, 3e8f}) {
    Case c = of_64;
    c.scale = scale, c.left = 390, c.right = 0, c.times = 1;
    EXPECT_EQ(failure_of<kD64Window>(c, 11), "") << scale;
  }
  const Case of_128 = {
      .seqlen_q = 70, .seqlen_k = 500, .head_dim = 128, .head_dim_v = 128, .left = 400, .right = 0, .times = 40};
  EXPECT_EQ(failure_of<kD128Window>(of_128, 12), "");
}

// The same problem with threads, copies and products in another order each time.
TEST(EmulatedSm90, AnyOrder) {
  const Case c = {.nheads_q = 3,
                  .seqlen_q = 140,
                  .seqlen_k = 420,
                  .head_dim = 128,
                  .head_dim_v = 128,
                  .left = 200,
                  .right = 20,
                  .counts_tiles = true};
  for (unsigned seed = 20; seed < 26; ++seed) EXPECT_EQ(failure_of<kD128Window>(c, seed), "");
}

}  // namespace
}  // namespace heed::cuda
