// The forward kernel for AMX on any machine with AVX-512: compiled beside a plain C++ stand-in for the tiles, which
// takes the place of the library's own object. Every line of tests/problems and random problems, as bf16, against the
// reference.
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iostream>

#include "base/machine.h"
#include "cpu/amx.h"
#include "ops/problem_line.h"
#include "unit/line_run.h"
#include "unit/random_problems.h"

namespace heed::cpu {

// In place of the library's: these tiles need nobody's leave.
const std::string& amx_refusal() {
  static const std::string none;
  return none;
}

}  // namespace heed::cpu

namespace heed {
namespace {

using testing::LineRun;
using testing::RunStyle;
using testing::TestExecutor;

constexpr char kRow[] = "cpu/attention_fwd_amx";

bool accepts(const std::string& line) {
  LineRun problem(line);
  if (!problem.error().empty()) return false;
  const std::vector<std::string> rows = problem.accepting();
  return std::find(rows.begin(), rows.end(), kRow) != rows.end();
}

// Empty, or what went wrong.
std::string failure_of(const std::string& line) {
  static TestExecutor reversed(3, false), threaded(2, true);
  LineRun problem(line);
  std::string failure = problem.run(kRow, {heed_executor_serial(), 1, 0xff});
  if (failure.empty()) failure = problem.judge();
  if (!failure.empty()) return failure;
  const std::vector<unsigned char> outputs = problem.outputs();
  for (const RunStyle& style : {RunStyle{&threaded.executor, 2, 0x00}, RunStyle{&reversed.executor, 3, 0x7f}}) {
    failure = problem.run(kRow, style);
    if (!failure.empty()) return failure;
    if (problem.outputs() != outputs) return "other bits with " + std::to_string(style.threads) + " threads";
  }
  return {};
}

// The line as a bf16 forward problem; empty where there is none such.
std::string as_bf16(ProblemLine line) {
  AttentionProblem* problem = std::get_if<AttentionProblem>(&line.problem);
  if (problem == nullptr || problem->pass != Pass::kForward) return {};
  problem->dtype = problem->out_dtype = Dtype::kBf16;
  return testing::is_valid(line) ? to_string(line) : std::string();
}

class Amx : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!machine().cpu.avx512) GTEST_SKIP() << "needs a CPU with AVX-512";
  }
};

TEST_F(Amx, EveryProblemFile) {
  int ran = 0, lines = 0;
  for (const auto& file : std::filesystem::directory_iterator(HEED_SOURCE_DIR "/tests/problems")) {
    std::ifstream stream(file.path());
    for (std::string text; std::getline(stream, text);) {
      if (text.empty() || text[0] == '#') continue;
      const Result<ProblemLine> parsed = parse_problem_line(text);
      ASSERT_TRUE(parsed.ok()) << text;
      const std::string line = as_bf16(parsed.value());
      if (line.empty()) continue;
      const double megaflops = flops(std::get<AttentionProblem>(parsed.value().problem)) / 1e6;
      if (megaflops > testing::environment_number("HEED_TEST_MEGAFLOPS", 2000)) continue;  // the stand-in is slow
      ++lines;
      if (!accepts(line)) continue;
      ++ran;
      EXPECT_EQ(failure_of(line), "") << line;
    }
  }
  std::cout << "  " << ran << " of " << lines << " lines\n";
  EXPECT_GT(ran, lines / 3);
}

// In parts that cores share, each from a seed of its own.
constexpr int kParts = 4;
class AmxProperty : public Amx, public ::testing::WithParamInterface<int> {};

TEST_P(AmxProperty, RandomProblems) {
  const int64_t wanted = (testing::environment_number("HEED_TEST_RANDOM", 3000) + GetParam()) / kParts;
  const uint64_t seed = static_cast<uint64_t>(testing::environment_number("HEED_TEST_SEED", 20261129) + GetParam());
  std::cout << "  seed " << seed << ", " << wanted << " problems\n";
  testing::Random random(seed);
  int failures = 0;
  for (int64_t done = 0; done < wanted && failures < 3;) {
    const std::string line = as_bf16(testing::random_attention(random, testing::Sizes::kRunnable));
    if (line.empty() || !accepts(line)) continue;
    ++done;
    const std::string failure = failure_of(line);
    if (failure.empty()) continue;
    ++failures;
    const std::string shorter = testing::reduce(
        line, [](const std::string& candidate) { return accepts(candidate) && !failure_of(candidate).empty(); });
    ADD_FAILURE() << line << "\n  " << failure << "\nmade shorter:\n  " << shorter << "\n  " << failure_of(shorter);
  }
}
INSTANTIATE_TEST_SUITE_P(Parts, AmxProperty, ::testing::Range(0, kParts));

}  // namespace
}  // namespace heed
