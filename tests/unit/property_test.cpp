// Random problems over every feature: each is run by one of the rows that accept it, twice in different styles, and
// judged against the reference. HEED_TEST_RANDOM sets how many, HEED_TEST_SEED which. A failing line is made shorter.
#include <gtest/gtest.h>

#include <chrono>
#include <iostream>
#include <map>

#include "unit/line_run.h"
#include "unit/random_problems.h"

namespace heed {
namespace {

using testing::LineRun;
using testing::RunStyle;
using testing::TestExecutor;

// Runs the line with the row; empty, or what went wrong.
std::string failure_of(const std::string& line, const std::string& row) {
  static TestExecutor reversed(3, false);
  LineRun problem(line);
  if (!problem.error().empty()) return problem.error();
  std::string failure = problem.run(row, {heed_executor_serial(), 1, 0xff});
  if (!failure.empty()) return failure;
  failure = problem.judge();
  if (!failure.empty()) return failure;
  const std::vector<unsigned char> outputs = problem.outputs();
  failure = problem.run(row, {&reversed.executor, 3, 0x00});
  if (!failure.empty()) return failure;
  return problem.outputs() == outputs ? "" : "other bits with 3 threads, tasks in reverse, workspace of zeros";
}

bool accepts(const std::string& line, const std::string& row) {
  LineRun problem(line);
  if (!problem.error().empty()) return false;
  for (const std::string& name : problem.accepting()) {
    if (name == row) return true;
  }
  return false;
}

// In parts that cores share, each from a seed of its own.
constexpr int kParts = 4;
class Property : public ::testing::TestWithParam<int> {};

TEST_P(Property, RandomProblemsAreRight) {
  const int64_t wanted = (testing::environment_number("HEED_TEST_RANDOM", 20000) + GetParam()) / kParts;
  const uint64_t seed = static_cast<uint64_t>(testing::environment_number("HEED_TEST_SEED", 20261121) + GetParam());
  std::cout << "seed " << seed << ", " << wanted << " problems\n";
  const auto start = std::chrono::steady_clock::now();
  testing::Random random(seed);
  std::map<std::string, int64_t> ran;
  int failures = 0;
  for (int64_t done = 0; done < wanted && failures < 3;) {
    const ProblemLine line = random.chance(85) ? testing::random_attention(random, testing::Sizes::kRunnable)
                                               : testing::random_kv_append(random, testing::Sizes::kRunnable);
    if (!testing::is_valid(line)) continue;
    const std::string text = to_string(line);
    LineRun problem(text);
    ASSERT_EQ(problem.error(), "") << text;
    const std::vector<std::string> rows = problem.accepting();
    ASSERT_FALSE(rows.empty()) << text << "\nno row accepts it " << problem.error();
    // The reference is last and judges itself: seldom.
    const int64_t last = static_cast<int64_t>(rows.size()) - (rows.size() > 1 && random.chance(80) ? 2 : 1);
    const std::string row = rows[static_cast<size_t>(random.in(0, last))];
    ++ran[row];
    ++done;
    const std::string failure = failure_of(text, row);
    if (failure.empty()) continue;
    ++failures;
    const std::string shorter = testing::reduce(text, [&](const std::string& candidate) {
      return accepts(candidate, row) && !failure_of(candidate, row).empty();
    });
    ADD_FAILURE() << "seed " << seed << ", problem " << done << ", " << row << "\n  " << text << "\n  " << failure
                  << "\nmade shorter:\n  " << shorter << "\n  " << failure_of(shorter, row);
  }
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  for (const auto& [row, problems] : ran) std::cout << "  " << row << ": " << problems << " problems\n";
  std::cout << "  " << elapsed.count() << " s\n";
}
INSTANTIATE_TEST_SUITE_P(Parts, Property, ::testing::Range(0, kParts));

}  // namespace
}  // namespace heed
