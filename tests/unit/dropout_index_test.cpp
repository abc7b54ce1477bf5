// The dropout mask belongs to (seed, b, h, i, j) and nothing else: a rank that holds a part of the problem and says
// where it lies, by index_base, drops the same keys as one that holds the whole.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "unit/line_run.h"

namespace heed {
namespace {

using testing::LineRun;

constexpr int64_t kBatch = 2, kHeads = 3, kRows = 9, kKeys = 24, kDim = 16;

// f32, bshd, contiguous; parts are views of the same memory.
struct Whole {
  std::vector<float> q, k, v, out;
  std::vector<uint8_t> mask = std::vector<uint8_t>(kKeys, 1);
  heed_attention_args args;

  Whole() : q(kBatch * kRows * kHeads * kDim), k(kBatch * kKeys * kHeads * kDim), v(k.size()), out(q.size()) {
    uint32_t state = 1;
    for (std::vector<float>* tensor : {&q, &k, &v}) {
      for (float& x : *tensor) {
        state = state * 1664525u + 1013904223u;
        x = static_cast<float>(state >> 8) * 0x1p-23f - 1.0f;
      }
    }
    heed_attention_args_init(&args);
    args.q = tensor(q, kRows);
    args.k = tensor(k, kKeys);
    args.v = tensor(v, kKeys);
    args.out = tensor(out, kRows);
    args.mask.data = mask.data();
    args.mask.dtype = HEED_DTYPE_BOOL;
    args.mask.ndim = 4;
    for (int d = 0; d < 3; ++d) args.mask.shape[d] = 1;
    args.mask.shape[3] = kKeys;
    args.mask.stride[3] = 1;
    args.dropout_p = 0.5f;
    args.dropout_seed = 0x123456789abcdefu;
    args.dropout_offset = 0xfedcba987654321u;
  }

  static heed_tensor tensor(std::vector<float>& memory, int64_t rows) {
    const int64_t row = kHeads * kDim;
    return {memory.data(), HEED_DTYPE_F32, 4, {kBatch, rows, kHeads, kDim}, {rows * row, row, kDim, 1}};
  }
};

// Elements [from, shape) along one dimension.
heed_tensor part(heed_tensor tensor, int dim, int64_t from) {
  const int64_t bytes = from * tensor.stride[dim] * static_cast<int64_t>(heed_dtype_bytes(tensor.dtype));
  tensor.data = static_cast<char*>(tensor.data) + bytes;
  tensor.shape[dim] -= from;
  return tensor;
}

float at(const heed_tensor& t, int64_t b, int64_t s, int64_t h, int64_t d) {
  return static_cast<const float*>(t.data)[b * t.stride[0] + s * t.stride[1] + h * t.stride[2] + d];
}

void run(heed_attention_args& args, const std::string& row) {
  const heed_plan_options options = {sizeof(heed_plan_options), row.c_str()};
  ASSERT_EQ(heed_attention(&args, &options), HEED_OK) << heed_last_error();
}

void expect_close(const heed_tensor& got, const heed_tensor& want) {
  for (int64_t b = 0; b < got.shape[0]; ++b) {
    for (int64_t s = 0; s < got.shape[1]; ++s) {
      for (int64_t h = 0; h < got.shape[2]; ++h) {
        for (int64_t d = 0; d < got.shape[3]; ++d) {
          ASSERT_NEAR(at(got, b, s, h, d), at(want, b, s, h, d), 1e-5) << b << ' ' << s << ' ' << h << ' ' << d;
        }
      }
    }
  }
}

std::vector<std::string> forward_rows() {
  return LineRun("attention b=2 hq=3 sq=9 sk=24 d=16 dropout p=0.5 mask=j").accepting();
}

class DropoutIndex : public ::testing::TestWithParam<std::string> {};

TEST_P(DropoutIndex, PartOfTheBatchHeadsRowsAndKeys) {
  Whole whole;
  run(whole.args, GetParam());
  std::vector<float> memory(whole.out.size());
  const auto rerun = [&](auto change) {
    std::fill(memory.begin(), memory.end(), NAN);
    heed_attention_args args = whole.args;
    args.out = Whole::tensor(memory, kRows);
    change(args);
    run(args, GetParam());
    return args.out;
  };
  {
    SCOPED_TRACE("batch");
    const heed_tensor out = rerun([](heed_attention_args& a) {
      for (heed_tensor* t : {&a.q, &a.k, &a.v, &a.out}) *t = part(*t, 0, 1);
      a.index_base[0] = 1;
    });
    expect_close(out, part(whole.args.out, 0, 1));
  }
  {
    SCOPED_TRACE("heads");  // of sequence 0: (b, h) counts as b * nheads_q + h
    const heed_tensor out = rerun([](heed_attention_args& a) {
      for (heed_tensor* t : {&a.q, &a.k, &a.v, &a.out}) {
        *t = part(*t, 2, 1);
        t->shape[0] = 1;
      }
      a.index_base[1] = 1;
    });
    expect_close(out, part(whole.args.out, 2, 1));
  }
  {
    SCOPED_TRACE("rows");
    const heed_tensor out = rerun([](heed_attention_args& a) {
      for (heed_tensor* t : {&a.q, &a.out}) *t = part(*t, 1, 4);
      a.index_base[2] = 4;
    });
    expect_close(out, part(whole.args.out, 1, 4));
  }
  {
    SCOPED_TRACE("keys");  // the first five hidden, or not there
    Whole masked;
    for (int j = 0; j < 5; ++j) masked.mask[static_cast<size_t>(j)] = 0;
    run(masked.args, GetParam());
    const heed_tensor out = rerun([](heed_attention_args& a) {
      for (heed_tensor* t : {&a.k, &a.v}) *t = part(*t, 1, 5);
      a.mask = part(a.mask, 3, 5);
      a.index_base[3] = 5;
    });
    expect_close(out, masked.args.out);
  }
}

TEST_P(DropoutIndex, IndicesCountModulo32Bits) {
  Whole whole;
  run(whole.args, GetParam());
  const std::vector<float> plain = whole.out;
  for (const int64_t turns : {1, -1, 3000}) {
    for (int64_t& each : whole.args.index_base) each = turns << 32;
    whole.args.index_base[3] *= 4;  // the counter holds j / 4
    run(whole.args, GetParam());
    EXPECT_EQ(whole.out, plain) << turns;
  }
  whole.args.index_base[2] = 1;
  run(whole.args, GetParam());
  EXPECT_NE(whole.out, plain);
  whole.args.index_base[2] = 0;
  whole.args.index_base[3] = int64_t{1} << 32;
  run(whole.args, GetParam());
  EXPECT_NE(whole.out, plain);
}

TEST_P(DropoutIndex, SeedsThroughPointersAreSeeds) {
  Whole whole;
  run(whole.args, GetParam());
  const std::vector<float> plain = whole.out;
  const uint64_t seed = whole.args.dropout_seed, offset = whole.args.dropout_offset;
  whole.args.dropout_seed = whole.args.dropout_offset = 77;
  run(whole.args, GetParam());
  EXPECT_NE(whole.out, plain);
  whole.args.dropout_seed_ptr = &seed;
  whole.args.dropout_offset_ptr = &offset;
  run(whole.args, GetParam());
  EXPECT_EQ(whole.out, plain);
}

TEST_P(DropoutIndex, KeepsTheShareThatPSays) {
  // v of ones and keys all alike: out is the kept share over 1 - p.
  Whole whole;
  std::fill(whole.k.begin(), whole.k.end(), 0.0f);
  std::fill(whole.v.begin(), whole.v.end(), 1.0f);
  for (const float p : {0.0f, 0.25f, 1.0f}) {
    whole.args.dropout_p = p;
    run(whole.args, GetParam());
    double sum = 0;
    for (const float x : whole.out) sum += x;
    const double mean = sum / static_cast<double>(whole.out.size());
    if (p == 0.0f || p == 1.0f) {
      EXPECT_NEAR(mean, p == 0.0f ? 1.0 : 0.0, 1e-6);
    } else {
      EXPECT_NEAR(mean, 1.0, 5 * std::sqrt(p / (1 - p) / (kBatch * kHeads * kRows * kKeys)));
    }
  }
}

std::string test_name(const ::testing::TestParamInfo<std::string>& info) {
  std::string name = info.param;
  for (char& c : name) {
    if (c == '/') c = '_';
  }
  return name;
}

INSTANTIATE_TEST_SUITE_P(Rows, DropoutIndex, ::testing::ValuesIn(forward_rows()), test_name);

// The judge reads index_base too: forward and backward, numbers that wrap.
TEST(DropoutIndexJudged, ForwardAndBackward) {
  for (const char* line : {"attention b=2 hq=3 sq=20 sk=33 d=16 dropout p=0.4 causal lse",
                           "attention b=2 hq=4 hkv=2 sq=20 sk=33 d=16 bf16 dropout p=0.4",
                           "attention b=2 hq=4 hkv=2 sq=20 sk=33 d=16 pass=bwd dropout p=0.4"}) {
    SCOPED_TRACE(line);
    LineRun problem(line);
    ASSERT_EQ(problem.error(), "");
    heed_attention_args& args = *problem.attention();
    if (args.pass == HEED_PASS_FORWARD) {  // backward: out and lse were made without the base
      args.index_base[0] = 5;
      args.index_base[1] = -3;
      args.index_base[2] = (int64_t{1} << 40) + 7;
      args.index_base[3] = 4294967295;
    }
    for (const std::string& row : problem.accepting()) {
      SCOPED_TRACE(row);
      ASSERT_EQ(problem.run(row, {}), "");
      EXPECT_EQ(problem.judge(), "");
    }
  }
}

}  // namespace
}  // namespace heed
