#include "base/threads.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>

#include "base/config.h"
#include "base/fork.h"
#include "base/machine.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace heed {
namespace {

constexpr int32_t kMaxWorkers = 1023;

void pause_cpu() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");  // "yield" is a no-op on most cores; this waits some ten cycles
#endif
}

// Rounding mode and flushing of denormals. They belong to a thread, and a caller may have changed its own: workers take
// them over for the caller's job, or results would depend on which thread computed them.
#if defined(__x86_64__)
constexpr uint64_t kFloatControlMask = 0xffc0;  // MXCSR without the sticky exception flags
uint64_t float_control() { return _mm_getcsr() & kFloatControlMask; }
void set_float_control(uint64_t control) { _mm_setcsr(static_cast<unsigned>(control)); }
#elif defined(__aarch64__)
uint64_t float_control() {
  uint64_t control;
  asm volatile("mrs %0, fpcr" : "=r"(control));
  return control;
}
void set_float_control(uint64_t control) { asm volatile("msr fpcr, %0" ::"r"(control)); }
#else
uint64_t float_control() { return 0; }
void set_float_control(uint64_t) {}
#endif

// True until `spin_us` have passed; the clock is read once in 32 turns.
class Spin {
 public:
  explicit Spin(int64_t spin_us) : limit_(std::chrono::microseconds(spin_us)) {}
  bool again() {
    pause_cpu();
    if (++turns_ % 32 != 0) return true;
    const auto now = std::chrono::steady_clock::now();
    if (turns_ == 32) start_ = now;
    return now - start_ < limit_;
  }

 private:
  std::chrono::steady_clock::duration limit_;
  std::chrono::steady_clock::time_point start_;
  uint32_t turns_ = 0;
};

// One job at a time. Its caller opens it, works on it, closes it and waits for the workers that joined it; a worker
// that slept through the whole job is not waited for. What a worker may look at without having joined is atomic.
class Pool {
 public:
  void run(int32_t num_tasks, void (*task)(void*, int32_t), void* argument);
  void stop();            // joins the workers; later calls run on the caller's thread
  void reset_in_child();  // after fork: the workers are gone, whatever they were doing

 private:
  // state_: how many workers are inside the job, whether it is open, whether its caller sleeps until they have left,
  // and the job's number, by which a worker knows a job that it has already left.
  static constexpr uint32_t kInsideMask = 0xfff, kOpen = 1u << 12, kCallerSleeps = 1u << 13, kJobUnit = 1u << 14;

  void start();
  void work();
  void sleep_until_job(uint32_t seen);
  void wait_for_workers();
  void* worker_main();
  static bool joinable(uint32_t state, uint32_t seen) { return (state & kOpen) != 0 && state / kJobUnit != seen; }

  // Each on a cache line of its own: the caller writes one while workers poll another.
  alignas(64) std::atomic<bool> busy_{false};
  alignas(64) std::atomic<uint32_t> state_{0};
  alignas(64) std::atomic<int64_t> next_task_{0};
  alignas(64) std::atomic<int32_t> num_asleep_{0};
  std::atomic<int32_t> wake_count_{0};
  std::atomic<bool> stopping_{false};

  alignas(64) void (*task_)(void*, int32_t) = nullptr;
  void* argument_ = nullptr;
  int32_t num_tasks_ = 0;
  uint64_t float_control_ = 0;

  bool started_ = false;  // like the rest below: the holder of busy_ alone
  int32_t num_workers_ = 0;
  int64_t spin_us_ = 0;
  std::array<pthread_t, kMaxWorkers> workers_ = {};
};

void Pool::run(int32_t num_tasks, void (*task)(void*, int32_t), void* argument) {
  // Taken by another caller, or by the caller whose task this is: the workers are in use, the caller's thread is not.
  if (num_tasks <= 1 || busy_.exchange(true, std::memory_order_acquire)) {
    for (int32_t i = 0; i < num_tasks; ++i) task(argument, i);
    return;
  }
  if (!started_) start();
  task_ = task;
  argument_ = argument;
  num_tasks_ = num_tasks;
  float_control_ = float_control();
  next_task_.store(0, std::memory_order_relaxed);
  const uint32_t job = state_.load(std::memory_order_relaxed) / kJobUnit + 1;
  // Sequentially consistent, as in sleep_until_job: either this sees the sleeper, or the sleeper sees the job.
  state_.store(job * kJobUnit | kOpen, std::memory_order_seq_cst);
  const int32_t asleep = num_asleep_.load(std::memory_order_seq_cst);
  if (asleep > 0) {
    wake_count_.fetch_add(1, std::memory_order_release);
    if (num_tasks - 1 >= asleep) {
      wake_count_.notify_all();
    } else {
      for (int32_t i = 1; i < num_tasks; ++i) wake_count_.notify_one();
    }
  }
  work();
  wait_for_workers();
  busy_.store(false, std::memory_order_release);
}

void Pool::work() {
  while (true) {
    const int64_t i = next_task_.fetch_add(1, std::memory_order_relaxed);
    if (i >= num_tasks_) return;
    task_(argument_, static_cast<int32_t>(i));
  }
}

void Pool::wait_for_workers() {
  uint32_t state = state_.fetch_and(~kOpen, std::memory_order_acq_rel) & ~kOpen;
  Spin spin(spin_us_);
  while ((state & kInsideMask) != 0) {
    if (spin.again()) {
      state = state_.load(std::memory_order_acquire);
    } else {
      state = state_.fetch_or(kCallerSleeps, std::memory_order_acq_rel) | kCallerSleeps;
      if ((state & kInsideMask) != 0) state_.wait(state, std::memory_order_acquire);
      state = state_.load(std::memory_order_acquire);
    }
  }
}

void* Pool::worker_main() {
  uint32_t seen = 0;
  while (true) {
    uint32_t state = state_.load(std::memory_order_acquire);
    for (Spin spin(spin_us_); !joinable(state, seen) && !stopping_.load(std::memory_order_relaxed);) {
      if (!spin.again()) sleep_until_job(seen);
      state = state_.load(std::memory_order_acquire);
    }
    if (stopping_.load(std::memory_order_relaxed)) return nullptr;
    if (!state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) continue;
    seen = state / kJobUnit;
    if (float_control() != float_control_) set_float_control(float_control_);
    work();
    const uint32_t before = state_.fetch_sub(1, std::memory_order_acq_rel);
    if ((before & kInsideMask) == 1 && (before & kCallerSleeps) != 0) state_.notify_all();
  }
}

void Pool::sleep_until_job(uint32_t seen) {
  const int32_t count = wake_count_.load(std::memory_order_acquire);
  num_asleep_.fetch_add(1, std::memory_order_seq_cst);
  if (!joinable(state_.load(std::memory_order_seq_cst), seen) && !stopping_.load(std::memory_order_seq_cst)) {
    wake_count_.wait(count, std::memory_order_acquire);
  }
  num_asleep_.fetch_sub(1, std::memory_order_relaxed);
}

void Pool::start() {
  started_ = true;
  spin_us_ = config().spin_us;
  const int32_t wanted = std::min(pool_executor().num_threads - 1, kMaxWorkers);
  sigset_t all, before;  // the program's signals are for the program's own threads
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  while (num_workers_ < wanted) {  // where the system refuses a thread, fewer do the same work
    auto entry = [](void* pool) { return static_cast<Pool*>(pool)->worker_main(); };
    if (pthread_create(&workers_[num_workers_], nullptr, entry, this) != 0) break;
#if defined(__linux__)
    pthread_setname_np(workers_[num_workers_], "heed");
#endif
    ++num_workers_;
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

void Pool::stop() {
  // A caller that holds the pool keeps the few tasks it has; nobody gets it again.
  Spin spin(1000000);
  while (busy_.exchange(true, std::memory_order_acquire) && spin.again()) {
  }
  stopping_.store(true, std::memory_order_seq_cst);
  wake_count_.fetch_add(1, std::memory_order_seq_cst);
  wake_count_.notify_all();
  for (int32_t i = 0; i < num_workers_; ++i) pthread_join(workers_[i], nullptr);
  num_workers_ = 0;
}

void Pool::reset_in_child() {
  busy_.store(false, std::memory_order_relaxed);
  state_.store(0, std::memory_order_relaxed);
  num_asleep_.store(0, std::memory_order_relaxed);
  started_ = false;
  num_workers_ = 0;
}

// The pool has no destructor: a thread still computing while the process exits finds it whole, without workers.
constinit Pool g_pool;

// Stops the workers when the process exits or the library is unloaded.
struct PoolStopper {
  PoolStopper() { add_fork_hook(hook_); }
  ~PoolStopper() { g_pool.stop(); }

 private:
  static constinit ForkHook hook_;
};
constinit ForkHook PoolStopper::hook_ = {nullptr, nullptr, [] { g_pool.reset_in_child(); }};

void run_on_pool(void*, int32_t num_tasks, void (*task)(void*, int32_t), void* argument) {
  static constinit std::atomic<bool> ready{false};
  made_once(ready, []() -> const PoolStopper& {
    static const PoolStopper stopper;
    return stopper;
  });
  g_pool.run(num_tasks, task, argument);
}

void run_serially(void*, int32_t num_tasks, void (*task)(void*, int32_t), void* argument) {
  for (int32_t i = 0; i < num_tasks; ++i) task(argument, i);
}

heed_executor make_pool_executor() {
  const int32_t threads = config().threads > 0 ? config().threads : machine().cpu.num_cores;
  return {sizeof(heed_executor), nullptr, std::clamp(threads, 1, kMaxWorkers + 1), 0, run_on_pool};
}

constinit const heed_executor kSerialExecutor = {sizeof(heed_executor), nullptr, 1, 0, run_serially};

}  // namespace

const heed_executor& pool_executor() {
  static constinit std::atomic<bool> ready{false};
  return made_once(ready, []() -> const heed_executor& {
    static const heed_executor executor = make_pool_executor();
    return executor;
  });
}

const heed_executor& serial_executor() { return kSerialExecutor; }

}  // namespace heed
