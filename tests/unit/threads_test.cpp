// The pool: every task once, nested and concurrent callers, a forked child, the caller's rounding mode on every thread.
#include <gtest/gtest.h>

#include <fenv.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <set>
#include <thread>
#include <utility>
#include <vector>

#include "base/fork.h"
#include "base/threads.h"

#if defined(__SANITIZE_THREAD__)
// Threads are started in a forked child. Visible, or the sanitizer's library does not find it.
extern "C" __attribute__((visibility("default"))) const char* __tsan_default_options() { return "die_after_fork=0"; }
#endif

// Before anything reads the configuration: more threads than this machine may have, so that workers come and go.
static const int kSetThreads = setenv("HEED_THREADS", "4", 1);

namespace heed {
namespace {

using std::chrono::steady_clock;

void expect_every_task_once(const heed_executor& executor, int32_t num_tasks) {
  std::vector<std::atomic<int>> counts(static_cast<size_t>(num_tasks));
  run_tasks(executor, num_tasks, [&](int32_t i) { counts[static_cast<size_t>(i)].fetch_add(1); });
  for (int32_t i = 0; i < num_tasks; ++i) ASSERT_EQ(counts[static_cast<size_t>(i)].load(), 1) << i;
}

TEST(Threads, TheTableSaysHowMany) {
  EXPECT_EQ(kSetThreads, 0);
  EXPECT_EQ(pool_executor().num_threads, 4);
  EXPECT_EQ(serial_executor().num_threads, 1);
  EXPECT_EQ(pool_executor().struct_size, sizeof(heed_executor));
}

TEST(Threads, EveryTaskRunsOnce) {
  for (const int32_t num_tasks : {0, 1, 2, 3, 4, 5, 17, 1000}) {
    expect_every_task_once(pool_executor(), num_tasks);
    expect_every_task_once(serial_executor(), num_tasks);
  }
  for (int i = 0; i < 5000; ++i) expect_every_task_once(pool_executor(), 4);
}

TEST(Threads, WorkersTakePart) {
  const std::thread::id caller = std::this_thread::get_id();
  std::atomic<bool> other{false};
  const auto deadline = steady_clock::now() + std::chrono::seconds(20);
  while (!other.load() && steady_clock::now() < deadline) {
    run_tasks(pool_executor(), 64, [&](int32_t) {
      if (std::this_thread::get_id() != caller) other.store(true);
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    });
  }
  EXPECT_TRUE(other.load());
}

TEST(Threads, SleepersWake) {
  for (int i = 0; i < 30; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));  // longer than HEED_SPIN_US
    expect_every_task_once(pool_executor(), 8);
  }
}

// The last worker's task outlasts the caller's spinning, so that the caller has to sleep and be woken.
TEST(Threads, TheCallerWaitsForALongTask) {
  for (int i = 0; i < 10; ++i) {
    std::atomic<int> done{0};
    run_tasks(pool_executor(), 2, [&](int32_t) {
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
      done.fetch_add(1);
    });
    ASSERT_EQ(done.load(), 2);
  }
}

TEST(Threads, NestedCallsRunOnTheirOwnThread) {
  std::atomic<int> inner{0};
  run_tasks(pool_executor(), 8, [&](int32_t) {
    const std::thread::id here = std::this_thread::get_id();
    run_tasks(pool_executor(), 8, [&](int32_t) {
      EXPECT_EQ(std::this_thread::get_id(), here);
      inner.fetch_add(1);
    });
  });
  EXPECT_EQ(inner.load(), 64);
}

TEST(Threads, ConcurrentCallersAllFinish) {
  std::vector<std::thread> callers;
  std::atomic<int64_t> total{0};
  for (int t = 0; t < 6; ++t) {
    callers.emplace_back([&] {
      for (int i = 0; i < 2000; ++i) {
        std::atomic<int> mine{0};
        run_tasks(pool_executor(), 5, [&](int32_t) { mine.fetch_add(1); });
        total.fetch_add(mine.load());
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(total.load(), 6 * 2000 * 5);
}

// 1/3 and -1/3 in the rounding mode of this thread; fegetround would tell the x87 unit's, which computes nothing here.
std::pair<float, float> thirds() {
  volatile float one = 1.0f, three = 3.0f;
  return {one / three, -one / three};
}

TEST(Threads, TasksHaveTheCallersRoundingMode) {
  const int before = fegetround();
  std::set<std::pair<float, float>> seen;
  for (const int mode : {FE_UPWARD, FE_TONEAREST, FE_DOWNWARD, before}) {
    ASSERT_EQ(fesetround(mode), 0);
    const std::pair<float, float> want = thirds();
    seen.insert(want);
    std::atomic<int> wrong{0};
    for (int i = 0; i < 200; ++i) {
      run_tasks(pool_executor(), 8, [&](int32_t) { wrong.fetch_add(thirds() != want); });
    }
    EXPECT_EQ(wrong.load(), 0);
  }
  EXPECT_EQ(seen.size(), 3u);
}

int wait_for(pid_t child) {
  int status = 0;
  EXPECT_EQ(waitpid(child, &status, 0), child);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

int tasks_run_in_child() {
  std::atomic<int> count{0};
  for (int i = 0; i < 200; ++i) run_tasks(pool_executor(), 8, [&](int32_t) { count.fetch_add(1); });
  return count.load() == 1600 ? 0 : 1;
}

TEST(Threads, AForkedChildHasItsOwnPool) {
  expect_every_task_once(pool_executor(), 100);
  for (int i = 0; i < 5; ++i) {
    const pid_t child = fork();
    if (child == 0) _exit(tasks_run_in_child());
    EXPECT_EQ(wait_for(child), 0);
    expect_every_task_once(pool_executor(), 100);
  }
}

// The pool is in the middle of another thread's job when this one forks; the child has neither that thread nor workers.
TEST(Threads, AForkInTheMiddleOfAJob) {
  std::atomic<bool> stop{false};
  std::thread busy([&] {
    while (!stop.load())
      run_tasks(pool_executor(), 16, [](int32_t) { std::this_thread::sleep_for(std::chrono::microseconds(20)); });
  });
  for (int i = 0; i < 20; ++i) {
    std::this_thread::sleep_for(std::chrono::microseconds(300));
    const pid_t child = fork();
    if (child == 0) _exit(tasks_run_in_child());
    EXPECT_EQ(wait_for(child), 0);
  }
  stop.store(true);
  busy.join();
}

// Another thread is making something for the first time when this one forks: the child must not wait for that thread.
TEST(Threads, AForkedChildFindsNothingHalfMade) {
  static constinit std::atomic<bool> ready{false}, begun{false};
  const auto value = [] {
    return made_once(ready, []() -> const int& {
      static const int made = [] {
        begun.store(true);
        std::this_thread::sleep_for(std::chrono::milliseconds(100));
        return 42;
      }();
      return made;
    });
  };
  std::atomic<bool> stop{false};
  std::thread maker([&] {
    EXPECT_EQ(value(), 42);
    while (!stop.load()) std::this_thread::yield();  // a thread that has ended would count as leaked in the child
  });
  while (!begun.load()) std::this_thread::yield();
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);  // instead of waiting for ever
    _exit(value() == 42 && tasks_run_in_child() == 0 ? 0 : 1);
  }
  EXPECT_EQ(wait_for(child), 0);
  stop.store(true);
  maker.join();
}

TEST(Threads, CostOfARegionIsPrinted) {
  constexpr int kRegions = 20000;
  double best = 1e30;
  for (int attempt = 0; attempt < 5; ++attempt) {
    const auto start = steady_clock::now();
    for (int i = 0; i < kRegions; ++i) run_tasks(pool_executor(), 2, [](int32_t) {});
    best = std::min(best, std::chrono::duration<double, std::micro>(steady_clock::now() - start).count() / kRegions);
  }
  std::printf("[   note   ] an empty region of 2 tasks: %.2f us\n", best);
}

}  // namespace
}  // namespace heed
