// Every row of the registry times every problem of tests/problems that it accepts: right within the error bound,
// nothing written outside, and the same bits whatever the threads, the order of tasks, the run or the workspace's
// earlier contents.
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <map>

#include "base/machine.h"
#include "cpu/amx.h"
#include "ops/problem_line.h"
#include "plan/registry.h"
#include "unit/line_run.h"
#include "unit/random_problems.h"

namespace heed {
namespace {

using testing::LineRun;
using testing::RunStyle;
using testing::TestExecutor;

std::map<std::string, int> ran;  // row -> problems

std::vector<std::string> problem_files() {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(HEED_SOURCE_DIR "/tests/problems")) {
    names.push_back(entry.path().stem().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

// The sanitizers multiply what a line takes by up to 50, most of all in the generic rows, whose vectors are emulated:
// `dev test` leaves the largest lines to the other stages there.
constexpr int64_t kNoLimit = 1 << 20;

double megaflops(const std::string& line) {
  const Result<ProblemLine> parsed = parse_problem_line(line);
  if (!parsed.ok()) return 0;  // run_line says why
  return std::visit([](const auto& problem) { return flops(problem); }, parsed.value().problem) / 1e6;
}

void run_line(const std::string& line) {
  SCOPED_TRACE(line);
  const bool is_long = megaflops(line) > testing::environment_number("HEED_TEST_GENERIC_MEGAFLOPS", kNoLimit);
  LineRun problem(line);
  ASSERT_EQ(problem.error(), "");
  TestExecutor reversed(3, false), threaded(2, true);
  const std::vector<std::string> rows = problem.accepting();
  ASSERT_EQ(problem.error(), "");
  EXPECT_FALSE(rows.empty()) << "no row accepts it";
  for (const std::string& row : rows) {
    if (is_long && row.ends_with("_generic")) continue;
    SCOPED_TRACE(row);
    ++ran[row];
    ASSERT_EQ(problem.run(row, {heed_executor_serial(), 1, 0xff}), "");
    EXPECT_EQ(problem.judge(), "");
    const std::vector<unsigned char> outputs = problem.outputs();
    if (row.starts_with("ref/")) continue;  // one thread, no workspace: nothing more to vary
    for (const RunStyle& style : {RunStyle{heed_executor_serial(), 1, 0x00}, RunStyle{&threaded.executor, 2, 0xff},
                                  RunStyle{&reversed.executor, 3, 0x7f}}) {
      ASSERT_EQ(problem.run(row, style), "");
      EXPECT_TRUE(problem.outputs() == outputs)
          << "other bits with " << style.threads << " threads, workspace of " << static_cast<int>(style.workspace_fill);
    }
  }
}

class ProblemFile : public ::testing::TestWithParam<std::string> {};

TEST_P(ProblemFile, EveryRowIsRight) {
  std::ifstream stream(std::string(HEED_SOURCE_DIR "/tests/problems/") + GetParam() + ".txt");
  ASSERT_TRUE(stream.good());
  ran.clear();
  int lines = 0, left_out = 0;
  for (std::string line; std::getline(stream, line);) {
    if (line.empty() || line[0] == '#') continue;
    ++lines;
    if (megaflops(line) > testing::environment_number("HEED_TEST_MEGAFLOPS", kNoLimit)) {
      ++left_out;
      continue;
    }
    run_line(line);
    if (HasFatalFailure()) return;
  }
  EXPECT_GT(lines, 10);
  EXPECT_LT(left_out, lines);
  if (left_out > 0) std::cout << "  " << left_out << " lines of more than HEED_TEST_MEGAFLOPS left out\n";
  for (const auto& [row, problems] : ran) std::cout << "  " << row << ": " << problems << " problems\n";
}

INSTANTIATE_TEST_SUITE_P(All, ProblemFile, ::testing::ValuesIn(problem_files()),
                         [](const auto& info) { return info.param; });

// What the machine must offer for a row to run at all, by the row's name.
bool machine_supports(std::string_view row) {
  const CpuFacts& cpu = machine().cpu;
  if (row.ends_with("_amx")) return cpu::amx_refusal().empty();
  if (row.ends_with("_avx512_bf16")) return cpu.avx512_bf16;
  if (row.ends_with("_avx512")) return cpu.avx512;
  if (row.ends_with("_avx2")) return cpu.avx2;
  if (row.ends_with("_neon")) return cpu.neon;
  int32_t gpus = 0;
  if (row.starts_with("cuda/")) return heed_device_count(HEED_DEVICE_CUDA, &gpus) == HEED_OK;
  return true;
}

template <class Problem>
void expect_rows_accept_something(const std::vector<std::string>& lines) {
  for (const Impl<Problem>* impl : impls<Problem>()) {
    int accepted = 0;
    for (const std::string& line : lines) {
      const Result<ProblemLine> parsed = parse_problem_line(line);
      ASSERT_TRUE(parsed.ok()) << parsed.status().message();
      if (!std::holds_alternative<Problem>(parsed.value().problem)) continue;
      Problem problem = std::get<Problem>(parsed.value().problem);
      if (impl->name.starts_with("cuda/")) {
        problem.device = Device::kCuda;
        problem.threads = 0;
      }
      accepted += impl->check(problem, machine()).accepted;
    }
    std::cout << "  " << impl->name << ": accepts " << accepted << '\n';
    EXPECT_EQ(accepted > 0, machine_supports(impl->name)) << impl->name;
  }
}

TEST(Registry, EveryRowThatTheMachineSupportsRunsSomeProblem) {
  std::vector<std::string> lines;
  for (const std::string& file : problem_files()) {
    std::ifstream stream(std::string(HEED_SOURCE_DIR "/tests/problems/") + file + ".txt");
    for (std::string line; std::getline(stream, line);) {
      if (!line.empty() && line[0] != '#') lines.push_back(line);
    }
  }
  expect_rows_accept_something<AttentionProblem>(lines);
  expect_rows_accept_something<KvAppendProblem>(lines);
}

}  // namespace
}  // namespace heed
