// What cuda/attention_fwd_sm90 has alone: scores for which no maximum can be kept, tiles of rows handed out by a counter,
// whatever the workspace holds, tensors whose heads share memory.
#include <algorithm>
#include <string>
#include <vector>

#include "cuda/device.h"
#include "gpu/gpu.h"

namespace heed {
namespace {

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
    std::vector<unsigned char> outputs;
    for (const int fill : {0xff, 0x00, 0x7f, 0x13}) {
      RunStyle style;
      style.workspace_fill = fill;
      style.stream = stream.get();
      ASSERT_EQ(problem.run(kRow, style), "") << line;
      if (outputs.empty()) {
        EXPECT_EQ(problem.judge(), "") << line;
        outputs = problem.outputs();
      }
      EXPECT_TRUE(problem.outputs() == outputs) << line << ", workspace of " << fill;
    }
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
