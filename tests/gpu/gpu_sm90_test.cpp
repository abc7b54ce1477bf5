// What cuda/attention_fwd_sm90 has alone: scores for which no maximum can be kept, tiles of rows handed out by a counter,
// whatever the workspace holds, tensors whose heads share memory.
#include <algorithm>
#include <atomic>
#include <string>
#include <vector>

#include "cuda/device.h"
#include "gpu/gpu.h"
#include "ops/problem_line.h"
#include "unit/random_problems.h"

namespace heed {
namespace {

using testing::failure_of;
using testing::LineRun;
using testing::RunStyle;
using testing::Stream;

constexpr const char* kRow = "cuda/attention_fwd_sm90";

class GpuHopper : public testing::GpuTest {
 protected:
  void SetUp() override {
    GpuTest::SetUp();
    if (IsSkipped()) return;
    const auto facts = cuda::device_facts(0);
    if (!facts.ok() || facts.value()->major != 9) GTEST_SKIP() << "no Hopper GPU";
  }

  // Right, and the same bits for every content of the workspace.
  static void expect_right(const std::string& line) {
    LineRun problem(line + " device=cuda");
    ASSERT_EQ(problem.error(), "") << line;
    const std::vector<std::string> rows = problem.accepting();
    ASSERT_NE(std::find(rows.begin(), rows.end(), kRow), rows.end()) << line;
    const Stream stream;
    EXPECT_EQ(failure_of(problem, kRow, stream, {0xff, 0x00, 0x7f, 0x13}), "") << line;
  }
};

// So large that a maximum times log2 e, rounded, is far from itself: no P may be more than 1 then.
TEST_F(GpuHopper, LargeScores) {
  for (const char* fill : {"huge", "huge*3"})
    expect_right(std::string("attention hq=2 sq=100 sk=400 d=128 f16 lse fill=") + fill);
  for (const char* fill : {"huge", "huge*10", "huge*1000"}) {
    expect_right(std::string("attention hq=2 sq=100 sk=400 d=128 bf16 causal lse fill=") + fill);
    expect_right(std::string("attention hq=2 sq=300 sk=300 d=64 bf16 lse fill=") + fill);
  }
}

TEST_F(GpuHopper, MoreTilesThanBlocks) {
  expect_right("attention b=40 hq=8 hkv=2 sq=300 d=128 bf16 causal lse");
  expect_right("attention b=40 hq=8 sq=300 d=64 f16 lse");
  expect_right("attention b=13 hq=16 sq=400 sk=500 d=256 bf16 causal");
  expect_right("attention b=13 hq=16 sq=400 sk=500 d=96 bf16 causal window=100,20 sinks");
}

// More tiles than blocks again, of sequences whose lengths the device alone knows.
TEST_F(GpuHopper, Lengths) {
  const std::string packed =
      "attention b=24 hq=8 hkv=2 sq=900 sk=900 layout_q=thd layout_kv=thd lq=uniform:0..900 lk=uniform:0..900 ";
  for (const char* rest :
       {"d=64 bf16 causal lse", "d=128 f16 causal window=200,0 lse seed=2", "d=256 bf16 sinks seed=3",
        "d=96 f16 chunk=200 causal lse seed=4", "d=192 dv=128 bf16 causal seed=5"})
    expect_right(packed + rest);
  expect_right(
      "attention b=9 hq=8 sq=700 sk=900 d=128 bf16 used_q used_k lq=uniform:0..700 lk=uniform:0..900 causal lse");
  expect_right(
      "attention b=70 hq=8 sq=40 sk=90 layout_q=thd layout_kv=thd lq=uniform:0..40 lk=uniform:0..90 d=64 bf16 causal "
      "lse");
}

TEST_F(GpuHopper, Pages) {
  for (const char* rest : {"d=128 bf16 page=16 causal lse", "d=64 f16 page=256 lse", "d=256 bf16 page=64 causal",
                           "d=96 bf16 page=8 window=300,0 lse", "d=128 f16 page=32 softcap causal lse"})
    expect_right(std::string("attention b=9 hq=8 hkv=2 sq=300 sk=1024 used_k lk=uniform:0..1024 pages=shuffled ") +
                 rest);
}

// Terms of the score, over more tiles than blocks; maxima that do not hold get their terms again.
TEST_F(GpuHopper, Terms) {
  for (const char* line :
       {"b=9 hq=8 sq=700 d=128 bf16 softcap causal lse", "b=9 hq=8 sq=700 d=64 f16 bias=f16:hij alibi lse",
        "b=9 hq=8 sq=701 d=64 bf16 bias=f32:bij lse", "b=5 hq=8 sq=600 d=256 bf16 mask=bij causal lse",
        "b=5 hq=8 sq=600 d=96 f16 dropout p=0.3 window=300,20 lse",
        "hq=8 sq=500 d=192 dv=128 bf16 softcap alibi mask=j",
        "hq=2 sq=300 sk=900 d=128 bf16 softcap softcap_value=300 lse fill=normal*12",
        "hq=2 sq=300 sk=900 d=64 f16 bias=f32:ij lse fill=normal*12"})
    expect_right(std::string("attention ") + line);
}

TEST_F(GpuHopper, SameBitsOnFiftyRuns) {
  const std::vector<std::string> lines = {
      "attention b=2 hq=8 hkv=2 sq=300 d=128 bf16 causal lse",
      "attention b=2 hq=8 sq=513 d=64 f16 lse",
      "attention hq=4 sq=60 sk=2048 d=128 bf16 lse",
      "attention b=3 hq=4 sq=200 d=96 bf16 window=70,0 sinks lse",
      "attention b=2 hq=2 sq=260 d=256 bf16 causal lse",
      "attention b=5 hq=4 sq=300 sk=300 layout_q=thd layout_kv=thd lq=uniform:0..300 lk=uniform:0..300 d=128 bf16 "
      "causal lse",
      "attention b=2 hq=4 sq=200 d=128 bf16 softcap causal lse",
      "attention b=2 hq=4 sq=200 d=64 bf16 bias=bf16:hij mask=ij alibi lse",
      "attention b=2 hq=4 sq=200 d=128 f16 dropout p=0.2 lse",
      "attention b=4 hq=8 hkv=2 sq=40 sk=512 d=128 bf16 page=16 used_k lk=uniform:1..512 pages=shuffled lse"};
  std::vector<int> fills;
  for (int n = 0; n < 50; ++n) fills.push_back((0xff + n * 37) % 256);
  testing::on_threads(lines.size(), [&](size_t i, const Stream& stream) {
    LineRun problem(lines[i] + " device=cuda");
    ASSERT_EQ(problem.error(), "") << lines[i];
    EXPECT_EQ(failure_of(problem, kRow, stream, fills), "") << lines[i];
  });
}

// A random problem, nearer to what the row takes: 16 bits, multiples of 8, no strides of its own.
std::string random_line(testing::Random& random) {
  for (;;) {
    const ProblemLine line = testing::random_attention(random, testing::Sizes::kRunnable);
    if (!testing::is_valid(line)) continue;
    std::string text;
    bool has_type = false;
    for (std::string word : testing::split(testing::on_gpu(to_string(line)), ' ')) {
      if (word.starts_with("align.") || word.starts_with("strides.")) continue;
      for (const std::string name : {"d=", "dv="})
        if (word.starts_with(name)) word = name + std::to_string((std::stoi(word.substr(name.size())) + 7) / 8 * 8);
      has_type = has_type || word == "f16" || word == "bf16";
      text += word + " ";
    }
    if (!has_type) text += random.chance(50) ? "bf16" : "f16";
    if (text.starts_with("attention ") && parse_problem_line(text).ok()) return text;
  }
}

TEST_F(GpuHopper, RandomProblemsAreRight) {
  constexpr size_t kProblems = 2000;
  std::atomic<size_t> drawn = 0, failed = 0;
  testing::on_threads(kProblems, [&](size_t i, const Stream& stream) {
    testing::Random random(20261130 + 0x9e3779b97f4a7c15u * (i + 1));
    for (;;) {
      const std::string line = random_line(random);
      ++drawn;
      LineRun problem(line);
      if (!problem.error().empty()) continue;
      const std::vector<std::string> rows = problem.accepting();
      if (std::find(rows.begin(), rows.end(), kRow) == rows.end()) continue;
      const std::string failure = failure_of(problem, kRow, stream, {0xff, 0x00});
      if (!failure.empty() && failed++ < 3) ADD_FAILURE() << line << ": " << failure;
      return;
    }
  });
  testing::note("Hopper: " + std::to_string(kProblems) + " random problems of " + std::to_string(drawn) + " drawn, " +
                std::to_string(failed) + " failures");
  EXPECT_EQ(failed, 0u);
}

// Many plans at once, each with a counter of its own.
TEST_F(GpuHopper, CountersOfManyRuns) {
  testing::on_threads(32, [](size_t i, const Stream& stream) {
    LineRun problem("attention b=40 hq=8 sq=" + std::to_string(250 + i) + " d=128 bf16 causal lse device=cuda");
    RunStyle style;
    style.workspace_fill = static_cast<int>(i);
    style.stream = stream.get();
    EXPECT_EQ(problem.run(kRow, style), "");
    EXPECT_EQ(problem.judge(), "");
  });
}

TEST_F(GpuHopper, HeadsThatShareMemory) {
  expect_right("attention b=2 hq=4 hkv=4 sq=70 sk=300 d=64 bf16 causal strides.k=19200,0,64 strides.v=0,64,256 lse");
}

}  // namespace
}  // namespace heed
