// What is special to the CPU's backward pass: blocks of keys that add to dQ in turns, tiles trimmed to what is visible,
// the exact path for NaN and Inf, gradients that are summed over broadcast dimensions.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "unit/line_run.h"

namespace heed {
namespace {

using testing::LineRun;
using testing::RunStyle;
using testing::TestExecutor;

std::vector<std::string> backward_rows(LineRun& problem) {
  std::vector<std::string> rows;
  for (const std::string& row : problem.accepting()) {
    if (row.starts_with("cpu/attention_bwd_")) rows.push_back(row);
  }
  return rows;
}

// Right, and the same bits whatever the threads and the order of the executor's tasks.
void expect_right(const std::string& line) {
  SCOPED_TRACE(line);
  LineRun problem(line);
  ASSERT_EQ(problem.error(), "");
  const std::vector<std::string> rows = backward_rows(problem);
  ASSERT_FALSE(rows.empty());
  TestExecutor reversed(5, false), threaded(4, true);
  for (const std::string& row : rows) {
    SCOPED_TRACE(row);
    ASSERT_EQ(problem.run(row, {heed_executor_serial(), 1, 0xff}), "");
    EXPECT_EQ(problem.judge(), "");
    const std::vector<unsigned char> outputs = problem.outputs();
    for (const RunStyle& style : {RunStyle{&threaded.executor, 4, 0x00}, RunStyle{&reversed.executor, 5, 0x7f}}) {
      ASSERT_EQ(problem.run(row, style), "");
      EXPECT_TRUE(problem.outputs() == outputs) << style.threads << " threads";
    }
  }
}

// Lengths on both sides of the blocks' edges (96 queries, 128 keys; 48 and 64 for wide heads).
TEST(AttentionBwd, LengthsAroundBlocks) {
  for (const char* lengths :
       {"sq=95 sk=127", "sq=96 sk=128", "sq=97 sk=129", "sq=1 sk=257", "sq=193 sk=1", "sq=289 sk=385"}) {
    for (const char* rest :
         {"d=16 hq=2 pass=bwd", "d=16 hq=2 pass=bwd causal", "d=24 dv=40 hq=2 hkv=1 pass=bwd window=50,70"}) {
      expect_right(std::string("attention ") + lengths + " " + rest);
    }
  }
  expect_right("attention sq=49 sk=65 d=257 dv=300 pass=bwd causal");
  expect_right("attention sq=97 sk=129 d=130 dv=200 pass=bwd causal");
}

// One head: every thread works on it, and all but the first wait for their turns.
TEST(AttentionBwd, ManyBlocksOfOneHead) {
  expect_right("attention hq=1 sq=700 sk=1100 d=16 pass=bwd causal");
  expect_right("attention hq=4 hkv=1 sq=300 sk=700 d=16 bf16 pass=bwd window=200,0");
  expect_right("attention hq=2 hkv=1 sq=300 sk=700 d=16 pass=bwd alibi causal sinks dlse");
}

TEST(AttentionBwd, TrimmedTiles) {
  for (const char* shape : {"causal", "causal offset=top", "causal offset=-40", "causal offset=250", "window=0,0",
                            "window=7,130", "chunk=50", "chunk=130 causal", "chunk=33 window=10,100 offset=-90"}) {
    expect_right(std::string("attention hq=2 sq=250 sk=300 d=20 pass=bwd ") + shape);
  }
  expect_right("attention b=3 hq=2 d=16 pass=bwd layout_q=thd layout_kv=thd lq=130,0,220 lk=300,40,129 causal");
  expect_right(
      "attention b=3 hq=4 hkv=2 sq=200 sk=300 d=16 f16 pass=bwd used_q used_k leftpad lq=130,0,200 lk=300,40,129 "
      "lpad=129,3,0 causal");
}

TEST(AttentionBwd, AnySubsetOfOutputs) {
  const std::vector<std::string> names = {"dq", "dk", "dv", "dbias", "dsinks", "dalibi"};
  for (int subset = 1; subset < 64; ++subset) {
    std::string grads;
    for (int n = 0; n < 6; ++n) {
      if ((subset >> n & 1) != 0) grads += (grads.empty() ? "" : ",") + names[n];
    }
    LineRun problem("attention hq=2 hkv=1 sq=100 sk=130 d=16 pass=bwd causal bias=f32:hij alibi sinks grads=" + grads);
    ASSERT_EQ(problem.error(), "");
    for (const std::string& row : backward_rows(problem)) {
      ASSERT_EQ(problem.run(row, {heed_executor_serial(), 1, 0xff}), "") << grads;
      EXPECT_EQ(problem.judge(), "") << row << ' ' << grads;
    }
  }
}

TEST(AttentionBwd, EveryBroadcastOfBias) {
  for (int dims = 0; dims < 16; ++dims) {
    std::string letters;
    for (int n = 0; n < 4; ++n) {
      if ((dims >> n & 1) != 0) letters += "bhij"[n];
    }
    expect_right("attention b=2 hq=2 hkv=1 sq=100 sk=140 d=8 pass=bwd causal bias=f32:" + letters);
    expect_right("attention b=2 hq=2 sq=100 sk=140 d=8 bf16 pass=bwd softcap bias=bf16:" + letters);
    expect_right(
        "attention b=2 hq=2 d=8 pass=bwd layout_q=thd layout_kv=thd sq=110 sk=140 lq=110,20 lk=33,140 bias=f32:" +
        letters);
  }
}

TEST(AttentionBwd, DropoutAcrossBlocks) {
  expect_right("attention b=2 hq=2 hkv=1 sq=150 sk=270 d=16 pass=bwd dropout p=0.4 causal");
  expect_right("attention b=2 hq=2 sq=150 sk=270 d=16 pass=bwd dropout p=0.9 mask=bhij softcap alibi sinks dlse");
}

// ---- NaN and Inf: what sees them, and nothing else ------------------------------------------------------------------

class Poisoned {
 public:
  explicit Poisoned(const std::string& line) : problem_(line) {}
  LineRun& problem() { return problem_; }

  // Element (0, position, head, 0) of a bshd tensor of f32.
  static float& at(const heed_tensor& tensor, int64_t position, int64_t head) {
    return static_cast<float*>(tensor.data)[position * tensor.stride[1] + head * tensor.stride[2]];
  }
  static bool row_is_finite(const heed_tensor& tensor, int64_t position, int64_t head) {
    const float* row = &at(tensor, position, head);
    for (int64_t d = 0; d < tensor.shape[3]; ++d) {
      if (!std::isfinite(row[d])) return false;
    }
    return true;
  }

 private:
  LineRun problem_;
};

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

// Causal, 300 x 300: the key is seen by the queries from its own position on, in tiles whole and partial.
TEST(AttentionBwd, NanInVReachesOnlyWhatSeesIt) {
  for (const float poison : {kNan, kInf}) {
    Poisoned run("attention hq=1 sq=300 sk=300 d=16 pass=bwd causal grads=dq,dk,dv");
    heed_attention_args& args = *run.problem().attention();
    constexpr int64_t kKey = 203;
    Poisoned::at(args.v, kKey, 0) = poison;
    for (int64_t i = kKey; i < 300; ++i) Poisoned::at(args.out, i, 0) = kNan;  // as the forward pass has it
    for (const std::string& row : backward_rows(run.problem())) {
      ASSERT_EQ(run.problem().run(row, {heed_executor_serial(), 1, 0xff}), "");
      for (int64_t i = 0; i < 300; ++i) {
        EXPECT_EQ(Poisoned::row_is_finite(args.dq, i, 0), i < kKey) << row << " dq " << i;
        EXPECT_TRUE(Poisoned::row_is_finite(args.dv, i, 0)) << row << " dv " << i;  // dV = P^T dO knows no V
      }
    }
  }
}

TEST(AttentionBwd, NanInDoutReachesOnlyTheKeysOfItsRow) {
  Poisoned run("attention hq=2 hkv=1 sq=300 sk=300 d=16 pass=bwd causal grads=dq,dk,dv");
  heed_attention_args& args = *run.problem().attention();
  constexpr int64_t kQuery = 150;
  Poisoned::at(args.dout, kQuery, 1) = kNan;
  for (const std::string& row : backward_rows(run.problem())) {
    ASSERT_EQ(run.problem().run(row, {heed_executor_serial(), 1, 0xff}), "");
    for (int64_t i = 0; i < 300; ++i) {
      EXPECT_TRUE(Poisoned::row_is_finite(args.dq, i, 0)) << row << " dq of the other head, " << i;
      EXPECT_EQ(Poisoned::row_is_finite(args.dq, i, 1), i != kQuery) << row << " dq " << i;
      EXPECT_EQ(Poisoned::row_is_finite(args.dk, i, 0), i > kQuery) << row << " dk " << i;
      EXPECT_EQ(Poisoned::row_is_finite(args.dv, i, 0), i > kQuery) << row << " dv " << i;
    }
  }
}

TEST(AttentionBwd, HiddenKeysMayHoldAnything) {
  for (const char* line : {"attention hq=1 sq=200 sk=300 d=16 pass=bwd used_k lk=170 grads=dq,dk,dv",
                           "attention hq=1 sq=200 sk=300 d=16 pass=bwd causal offset=top grads=dq,dk,dv"}) {
    Poisoned run(line);
    heed_attention_args& args = *run.problem().attention();
    for (const std::string& row : backward_rows(run.problem())) {
      Poisoned::at(args.k, 201, 0) = kNan;  // no query sees keys from 200 (or 170) on
      Poisoned::at(args.v, 201, 0) = kInf;
      ASSERT_EQ(run.problem().run(row, {heed_executor_serial(), 1, 0xff}), "");
      EXPECT_EQ(run.problem().judge(), "") << row;
      for (int64_t j = 200; j < 300; ++j) {
        EXPECT_EQ(Poisoned::at(args.dk, j, 0), 0.0f);
        EXPECT_EQ(Poisoned::at(args.dv, j, 0), 0.0f);
      }
    }
  }
}

}  // namespace
}  // namespace heed
