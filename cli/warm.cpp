
#include <algorithm>
#include <atomic>
#include <thread>

#include "commands.h"
#include "format.h"
#include "library.h"
#include "machine_facts.h"
#include "report.h"

namespace heed::cli {
namespace {

// As many threads as were asked for, made for the occasion: a kernel takes most of a second to compile.
class Threads {
 public:
  explicit Threads(int count) : executor_{sizeof executor_, this, count, 0, run} {}
  Threads(const Threads&) = delete;
  const heed_executor* executor() const { return &executor_; }

 private:
  static void run(void* self, int32_t num_tasks, void (*task)(void*, int32_t), void* argument) {
    std::atomic<int32_t> next{0};
    const auto work = [&] {
      for (int32_t i = next++; i < num_tasks; i = next++) task(argument, i);
    };
    std::vector<std::jthread> workers;
    const int32_t count = static_cast<const Threads*>(self)->executor_.num_threads;
    for (int32_t n = 1; n < std::min(count, num_tasks); ++n) workers.emplace_back(work);
    work();
  }

  heed_executor executor_;
};

struct Shown {
  Progress progress;
  int64_t total = 0;
};

void show(void* context, int32_t done, int32_t total, const char* kernel) {
  constexpr int kWidth = 24;
  auto& shown = *static_cast<Shown*>(context);
  const int filled = total > 0 ? kWidth * done / total : kWidth;
  shown.total = total;
  shown.progress.show(cli::format("[{:=<{}}{:{}}] {}/{} {}", "", filled, "", kWidth - filled, done, total, kernel));
}

}  // namespace

int run_warm(const WarmRequest& request) {
  std::vector<ProblemPtr> owners;
  std::vector<const heed_problem*> problems;
  for (const std::string& line : problem_lines(request.words)) {
    owners.push_back(parse_problem(with_device(line, "cuda")));
    problems.push_back(owners.back().get());
  }
  const Threads threads(request.jobs > 0 ? request.jobs : usable_cores());
  Shown shown;
  heed_warm_options options = {};
  options.struct_size = sizeof options;
  options.arch = request.arch.empty() ? nullptr : request.arch.c_str();
  options.executor = threads.executor();
  options.progress = show;
  options.progress_context = &shown;
  heed_warm_result result = {};
  result.struct_size = sizeof result;
  const auto start = std::chrono::steady_clock::now();
  const heed_status status = heed_warm(problems.data(), static_cast<int32_t>(problems.size()), &options, &result);
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  shown.progress.clear();
  require(status);
  if (request.json) {
    const nlohmann::json json = {{"heed", heed_version()},
                                 {"problems", problems.size()},
                                 {"kernels", result.num_kernels},
                                 {"compiled", result.num_compiled},
                                 {"compile_seconds", result.compile_seconds},
                                 {"seconds", elapsed.count()}};
    cli::print("{}\n", json.dump(2));
  } else {
    cli::print("{} problem{}: {} kernel{}, {} compiled now in {:.1f} s ({:.1f} s of compiling)\n", problems.size(),
               problems.size() == 1 ? "" : "s", result.num_kernels, result.num_kernels == 1 ? "" : "s",
               result.num_compiled, elapsed.count(), result.compile_seconds);
  }
  return 0;
}

}  // namespace heed::cli
