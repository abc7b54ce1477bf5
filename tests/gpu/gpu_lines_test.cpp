// Every line of tests/problems and random problems, on every row of the GPU that accepts them, against the reference:
// right within the bound, nothing written outside, the same bits whatever the workspace held before.
//
// HEED_TEST_RANDOM and HEED_TEST_SEED: how many random problems (2,000) and which. HEED_TEST_LINES: files of lines, with
// colons between, for GpuLines.OfFiles. HEED_TEST_LINE: one line.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <map>
#include <memory>
#include <mutex>
#include <set>

#include "gpu/gpu.h"
#include "unit/random_problems.h"

namespace heed {
namespace {

using testing::failure_of;
using testing::GpuTest;
using testing::kUnfilled;
using testing::LineRun;
using testing::note;
using testing::RunStyle;
using testing::Stream;

struct Failure {
  std::string line, row, reason;
};

// What a check makes of a line: the failures found, rows counted in `ran`.
class Tally {
 public:
  void count(const std::string& row) {
    const std::lock_guard lock(mutex_);
    ++ran_[row];
  }
  void fail(Failure failure) {
    const std::lock_guard lock(mutex_);
    if (lost_) return;  // what others meet after the context is lost is not theirs
    std::replace(failure.reason.begin(), failure.reason.end(), '\n', ' ');  // a failure is a line
    lost_ = testing::is_fatal(failure.reason);
    failures_.push_back(std::move(failure));
    if (lost_) suspects_.assign(in_flight_.begin(), in_flight_.end());
  }
  bool lost() const {
    const std::lock_guard lock(mutex_);
    return lost_;
  }
  void begin(const std::string& line) {
    const std::lock_guard lock(mutex_);
    in_flight_.insert(line);
  }
  void end(const std::string& line) {
    const std::lock_guard lock(mutex_);
    in_flight_.erase(in_flight_.find(line));
  }

  const std::vector<Failure>& failures() const { return failures_; }
  const std::vector<std::string>& suspects() const { return suspects_; }

  // The counts, and the first failures; every one of them goes to the file.
  void report(const std::string& title) const {
    std::string counts, first;
    for (const auto& [row, problems] : ran_) counts += "  " + row + ": " + std::to_string(problems);
    note(title + counts + (failures_.empty() ? "" : "  FAILURES: " + std::to_string(failures_.size())));
    size_t shown = 0;
    for (const Failure& failure : failures_) {
      const std::string text = failure.row + " | " + failure.line + " | " + failure.reason;
      if (shown++ < 3) first += "\n  " + text;
      testing::note_in_file("FAILED " + text);
    }
    EXPECT_TRUE(failures_.empty()) << failures_.size() << " failures, the first:" << first;
    // Each line that ran when the context was lost, in a process of its own.
    for (const std::string& line : suspects_) {
      const int status = testing::run_again("GpuLines.OneLine", {"HEED_TEST_LINE=" + line}, "/dev/null");
      note((status == 0 ? "innocent: " : "GUILTY: ") + line);
    }
  }

 private:
  mutable std::mutex mutex_;
  std::map<std::string, int> ran_;
  std::vector<Failure> failures_;
  std::multiset<std::string> in_flight_;
  std::vector<std::string> suspects_;
  bool lost_ = false;
};

enum class Memory { kGuarded, kExact };

void check_line(const std::string& line, const Stream& stream, const std::vector<int>& fills, Tally& tally,
                Memory memory = Memory::kGuarded) {
  if (tally.lost()) return;
  tally.begin(line);
  LineRun problem(line);
  if (memory == Memory::kExact && problem.error().empty()) problem.give_inputs_exact_memory();
  const std::vector<std::string> rows = problem.error().empty() ? problem.accepting() : std::vector<std::string>();
  if (!problem.error().empty()) {
    tally.fail({line, "-", problem.error()});
  } else if (rows.empty()) {
    tally.fail({line, "-", "no row accepts it"});
  }
  for (const std::string& row : rows) {
    const std::string failure = failure_of(problem, row, stream, fills);
    tally.count(row);
    if (!failure.empty()) tally.fail({line, row, failure});
  }
  tally.end(line);
}

class GpuProblemFile : public GpuTest, public ::testing::WithParamInterface<std::string> {};

TEST_P(GpuProblemFile, EveryRowIsRight) {
  int left_out = 0;
  const std::vector<std::string> lines = testing::gpu_lines(GetParam(), left_out);
  Tally tally;
  testing::on_threads(lines.size(), [&](size_t i, const Stream& stream) {
    check_line(lines[i], stream, {0xff, 0x00, 0x7f}, tally);
  });
  tally.report(GetParam() + ": " + std::to_string(lines.size()) + " lines, " + std::to_string(left_out) +
               " of the backward pass or f64 left out;");
}

INSTANTIATE_TEST_SUITE_P(All, GpuProblemFile, ::testing::ValuesIn(testing::problem_files()),
                         [](const auto& info) { return info.param; });

class GpuLines : public GpuTest {};

TEST_F(GpuLines, SameBitsOnTwentyRuns) {
  std::vector<std::string> lines;
  int left_out = 0;
  for (const char* file : {"smoke", "decode", "varlen", "paged", "kv_append"}) {
    for (const std::string& line : testing::gpu_lines(file, left_out)) lines.push_back(line);
  }
  Tally tally;
  std::vector<int> fills;
  for (int n = 0; n < 20; ++n) fills.push_back(n * 13 % 256);
  testing::on_threads(lines.size(),
                      [&](size_t i, const Stream& stream) { check_line(lines[i], stream, fills, tally); });
  tally.report("20 runs: " + std::to_string(lines.size()) + " lines;");
}

TEST_F(GpuLines, MoreSequencesThan65535) {
  Tally tally;
  const std::vector<std::string> lines = {
      "attention b=70000 hq=2 hkv=1 sq=1 sk=3 d=16 bf16 used_k lk=uniform:0..3 lse device=cuda",
      "attention b=70000 hq=1 sq=2 sk=3 d=8 causal lse device=cuda",
      "attention b=70000 hq=2 hkv=1 d=16 f16 layout_q=thd layout_kv=thd lq=uniform:0..2 lk=uniform:0..3 tq=150000 "
      "tk=220000 causal lse device=cuda",
      "attention b=70000 hq=2 hkv=1 sq=1 sk=4 d=16 bf16 page=2 used_k lk=uniform:0..4 pages=shuffled device=cuda",
      "kv_append b=70000 hq=2 hkv=1 sn=1 sk=4 d=16 bf16 rotary=16 page=2 lk=uniform:0..3 pages=shuffled device=cuda"};
  testing::on_threads(lines.size(), [&](size_t i, const Stream& stream) {
    check_line(lines[i], stream, {0xff, 0x00}, tally);
  });
  tally.report("70,000 sequences:");
}

TEST_F(GpuLines, OneLine) {
  const char* const line = std::getenv("HEED_TEST_LINE");
  if (line == nullptr || *line == '\0') GTEST_SKIP() << "HEED_TEST_LINE names no line";
  Tally tally;
  testing::on_threads(1, [&](size_t, const Stream& stream) { check_line(line, stream, {0xff, 0x00, 0x7f}, tally); });
  for (const Failure& failure : tally.failures()) ADD_FAILURE() << failure.row << ": " << failure.reason;
}

// For a tool that watches every access (compute-sanitizer): one thread, workspaces that nobody has filled, inputs that
// end where their memory does.
TEST_F(GpuLines, OfFiles) {
  const char* const files = std::getenv("HEED_TEST_LINES");
  if (files == nullptr || *files == '\0') GTEST_SKIP() << "HEED_TEST_LINES names no file";
  Tally tally;
  int num_lines = 0;
  const Stream stream;
  for (const std::string& file : testing::split(files, ':')) {
    std::ifstream lines(file);
    ASSERT_TRUE(lines.good()) << file;
    for (std::string line; std::getline(lines, line);) {
      if (line.empty() || line[0] == '#') continue;
      const std::string moved = testing::on_gpu(line);
      if (moved.empty()) continue;
      ++num_lines;
      check_line(moved, stream, {kUnfilled}, tally, Memory::kExact);
    }
  }
  EXPECT_GT(num_lines, 0);
  tally.report(std::string(files) + ": " + std::to_string(num_lines) + " lines;");
}

// ---- random problems ------------------------------------------------------------------------------------------------

std::string random_line(uint64_t seed, size_t index) {
  testing::Random random(seed + 0x9e3779b97f4a7c15u * (index + 1));
  for (;;) {
    ProblemLine line = random.chance(85) ? testing::random_attention(random, testing::Sizes::kRunnable)
                                         : testing::random_kv_append(random, testing::Sizes::kRunnable);
    if (!testing::is_valid(line)) continue;
    const std::string moved = testing::on_gpu(to_string(line));
    if (!moved.empty()) return moved;
  }
}

bool still_fails(const std::string& line, const std::string& row, const Stream& stream) {
  LineRun problem(line);
  if (!problem.error().empty()) return false;
  const std::vector<std::string> rows = problem.accepting();
  if (std::find(rows.begin(), rows.end(), row) == rows.end()) return false;
  return !failure_of(problem, row, stream, {0xff, 0x00}).empty();
}

TEST_F(GpuLines, RandomProblemsAreRight) {
  const auto wanted = static_cast<size_t>(testing::environment_number("HEED_TEST_RANDOM", 2000));
  const auto seed = static_cast<uint64_t>(testing::environment_number("HEED_TEST_SEED", 20261129));
  const auto start = std::chrono::steady_clock::now();
  Tally tally;
  testing::on_threads(wanted, [&](size_t i, const Stream& stream) {
    check_line(random_line(seed, i), stream, {0xff, 0x00}, tally);
  });
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  tally.report("seed " + std::to_string(seed) + ", " + std::to_string(wanted) + " random problems in " +
               std::to_string(elapsed.count()) + " s;");
  if (tally.lost()) return;
  const Stream stream;
  for (size_t n = 0; n < std::min<size_t>(3, tally.failures().size()); ++n) {
    const Failure& failure = tally.failures()[n];
    const std::string shorter =
        testing::reduce(failure.line, [&](const std::string& line) { return still_fails(line, failure.row, stream); });
    note("FAILED, made shorter: " + failure.row + " | " + shorter);
  }
}

// A long while of changing shapes, rows and workspaces on every thread at once. A thread has its own problems, each with its
// own memory; every 1,000th launch is judged against the reference, every 16th has the bits that its row had before.
struct SoakProblem {
  explicit SoakProblem(std::string text) : line(std::move(text)), run(line) {
    if (run.error().empty()) rows = run.accepting();
    bits.resize(rows.size());
  }
  std::string line;
  LineRun run;
  std::vector<std::string> rows;
  std::vector<std::vector<unsigned char>> bits;  // of each row, once it has run
};

std::string soak_launch(SoakProblem& problem, size_t row, int fill, bool judged, bool compared, const Stream& stream) {
  RunStyle style;
  style.workspace_fill = fill;
  style.stream = stream.get();
  std::string failure = problem.run.run(problem.rows[row], style);
  if (failure.empty() && judged) failure = problem.run.judge();
  if (!failure.empty() || !(judged || compared)) return failure;
  std::vector<unsigned char> bits = problem.run.outputs();
  if (problem.bits[row].empty())
    problem.bits[row] = std::move(bits);
  else if (problem.bits[row] != bits)
    return "other bits than before";
  return {};
}

TEST_F(GpuLines, LongRunOverChangingShapes) {
  constexpr size_t kThreads = 16, kProblems = 24;
  const auto launches = static_cast<size_t>(testing::environment_number("HEED_TEST_LAUNCHES", 100000)) / kThreads;
  std::vector<std::string> lines;
  int left_out = 0;
  for (const char* file : {"smoke", "varlen", "gqa", "decode", "paged", "robotics"})
    for (const std::string& line : testing::gpu_lines(file, left_out)) lines.push_back(line);
  Tally tally;
  std::atomic<int> num_judged{0};
  testing::on_threads(kThreads, [&](size_t thread, const Stream& stream) {
    testing::Random random(20261129 + thread);
    std::vector<std::unique_ptr<SoakProblem>> problems;
    for (size_t n = 0; n < kProblems; ++n) {
      const bool from_file = n % 2 == 0;  // the others are random
      const std::string line = from_file ? lines[random.in(0, static_cast<int64_t>(lines.size()) - 1)]
                                         : random_line(20261129, thread * kProblems + n);
      problems.push_back(std::make_unique<SoakProblem>(line));
      if (!problems.back()->run.error().empty()) return tally.fail({line, "-", problems.back()->run.error()});
    }
    for (size_t n = 0; n < launches && !tally.lost(); ++n) {
      SoakProblem& problem = *problems[random.in(0, kProblems - 1)];
      if (problem.rows.empty()) continue;
      const auto row = static_cast<size_t>(random.in(0, static_cast<int64_t>(problem.rows.size()) - 1));
      const bool judged = n % 1000 == 15 * thread;
      const std::string failure =
          soak_launch(problem, row, static_cast<int>(random.in(0, 255)), judged, n % 16 == 0, stream);
      num_judged += judged;
      tally.count(problem.rows[row]);
      if (!failure.empty()) tally.fail({problem.line, problem.rows[row], failure});
    }
  });
  EXPECT_GE(num_judged.load(), static_cast<int>(launches * kThreads / 1000));
  tally.report("long run, " + std::to_string(num_judged.load()) + " results judged;");
}

}  // namespace
}  // namespace heed
