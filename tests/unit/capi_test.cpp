// The C interface from C++: texts, handles, one-call and planned runs, memory, threads and forks. errors_test.cpp
// provokes the errors.
#include <gtest/gtest.h>

#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "heed/heed.hpp"
#include "small_attention.h"

#if defined(__SANITIZE_THREAD__)
// Threads are started in a forked child. Visible, or the sanitizer's library does not find it.
extern "C" __attribute__((visibility("default"))) const char* __tsan_default_options() { return "die_after_fork=0"; }
#endif

namespace heed {
namespace {

// The formula itself, for plain inputs.
std::vector<float> textbook(const SmallAttention& s, bool causal = false) {
  using S = SmallAttention;
  std::vector<float> out(s.out.size());
  for (int64_t b = 0; b < S::kBatch; ++b) {
    for (int64_t i = 0; i < S::kSeqlenQ; ++i) {
      for (int64_t h = 0; h < S::kHeadsQ; ++h) {
        const int64_t g = h / (S::kHeadsQ / S::kHeadsKv);
        std::vector<double> weights(S::kSeqlenK, 0.0);
        double sum = 0;
        for (int64_t j = 0; j < S::kSeqlenK; ++j) {
          if (causal && j > i + S::kSeqlenK - S::kSeqlenQ) continue;
          double dot = 0;
          for (int64_t d = 0; d < S::kHeadDim; ++d) {
            dot += double{s.q[((b * S::kSeqlenQ + i) * S::kHeadsQ + h) * S::kHeadDim + d]} *
                   s.k[((b * S::kSeqlenK + j) * S::kHeadsKv + g) * S::kHeadDim + d];
          }
          sum += weights[j] = std::exp(dot / std::sqrt(double{S::kHeadDim}));
        }
        for (int64_t d = 0; d < S::kHeadDimV; ++d) {
          double value = 0;
          for (int64_t j = 0; j < S::kSeqlenK; ++j) {
            value += weights[j] / sum * s.v[((b * S::kSeqlenK + j) * S::kHeadsKv + g) * S::kHeadDimV + d];
          }
          out[((b * S::kSeqlenQ + i) * S::kHeadsQ + h) * S::kHeadDimV + d] = static_cast<float>(value);
        }
      }
    }
  }
  return out;
}

void expect_near(const std::vector<float>& got, const std::vector<float>& want) {
  ASSERT_EQ(got.size(), want.size());
  for (size_t i = 0; i < got.size(); ++i) ASSERT_NEAR(got[i], want[i], 1e-5) << i;
}

TEST(Core, VersionsAndNames) {
  EXPECT_EQ(heed_abi_version(), HEED_ABI_VERSION);
  EXPECT_STREQ(heed_version(), "0.1.0");
  EXPECT_STREQ(heed_status_name(HEED_NOT_SUPPORTED), "not_supported");
  EXPECT_STREQ(heed_status_name(99), "unknown");
  EXPECT_STREQ(heed_dtype_name(HEED_DTYPE_BF16), "bf16");
  EXPECT_STREQ(heed_dtype_name(77), "none");
  EXPECT_EQ(heed_dtype_bytes(HEED_DTYPE_F16), 2u);
}

TEST(Core, TextComesThroughTheCallersBuffer) {
  const Problem problem = Problem::parse("attention sq=3 sk=5 d=8");
  size_t needed = 0;
  ASSERT_EQ(heed_problem_print(problem.get(), nullptr, 0, &needed), HEED_OK);
  ASSERT_EQ(needed, problem.line().size() + 1);
  std::vector<char> buffer(needed, '?');
  ASSERT_EQ(heed_problem_print(problem.get(), buffer.data(), 6, nullptr), HEED_OK);
  EXPECT_STREQ(buffer.data(), "atten");
  EXPECT_EQ(buffer[6], '?') << "written past the end";
  ASSERT_EQ(heed_problem_print(problem.get(), buffer.data(), buffer.size(), nullptr), HEED_OK);
  EXPECT_EQ(problem.line(), buffer.data());
  EXPECT_EQ(heed_problem_print(problem.get(), nullptr, 5, nullptr), HEED_INVALID_ARGUMENT);
}

TEST(Core, ErrorTextIsPerThreadAndGoneAfterASuccess) {
  heed_problem* problem = nullptr;
  ASSERT_NE(heed_problem_parse("attention sq=x", &problem), HEED_OK);
  EXPECT_STRNE(heed_last_error(), "");
  std::thread([] { EXPECT_STREQ(heed_last_error(), ""); }).join();
  ASSERT_EQ(heed_info(nullptr, 0, nullptr), HEED_OK);
  EXPECT_STREQ(heed_last_error(), "");
}

TEST(Core, ALongErrorIsCutNotOverrun) {
  const std::string name(10000, 'n');
  const heed_plan_options options = {sizeof options, name.c_str()};
  SmallAttention small;
  EXPECT_EQ(heed_attention(&small.args, &options), HEED_NOT_FOUND);
  const std::string text = heed_last_error();
  EXPECT_LT(text.size(), 4096u);
  EXPECT_EQ(text.substr(text.size() - 3), "...");
}

TEST(Core, InfoNamesMachineBackendsAndConfiguration) {
  size_t needed = 0;
  ASSERT_EQ(heed_info(nullptr, 0, &needed), HEED_OK);
  std::string text(needed, '\0');
  ASSERT_EQ(heed_info(text.data(), needed, nullptr), HEED_OK);
  for (const char* part :
       {"cpu", "cores", "caches", "cpu/attention_fwd_neon", "ref/attention", "cpu/kv_append", "HEED_SPIN_US"}) {
    EXPECT_NE(text.find(part), std::string::npos) << part << " in\n" << text;
  }
}

TEST(Core, VerdictsOfEveryRow) {
  const Problem problem = Problem::parse("attention b=2 hq=4 sq=64 sk=64 d=64 bf16 causal");
  int chosen = 0;
  for (int32_t i = 0; i < heed_verdict_count(problem.get()); ++i) {
    heed_verdict verdict = {};
    verdict.struct_size = sizeof verdict;
    ASSERT_EQ(heed_verdict_get(problem.get(), nullptr, i, &verdict), HEED_OK) << heed_last_error();
    chosen += verdict.chosen;
    EXPECT_EQ(verdict.accepted != 0, verdict.cost_us >= 0);
    EXPECT_TRUE(verdict.accepted != 0 || *verdict.reason != '\0') << verdict.impl;
    EXPECT_EQ(verdict.chosen != 0, Plan(problem).impl() == verdict.impl);
  }
  EXPECT_EQ(chosen, 1);
}

TEST(Problems, OfArgumentsAndBack) {
  SmallAttention small;
  small.args.causal = 1;
  small.args.lse = tensor_of(small.lse.data(), HEED_DTYPE_F32, {2, 4, 3});
  const Problem problem = Problem::of(small.args);
  EXPECT_EQ(problem.op(), "attention");
  EXPECT_EQ(Problem::parse(problem.line()).line(), problem.line());
  EXPECT_GT(problem.flops(), 0);
  EXPECT_GT(problem.bytes(), 0);
  EXPECT_NE(problem.explain().find(problem.line()), std::string::npos);
}

// A NULL pointer counts as aligned to 128 bytes, and sizes 0 are ordinary.
TEST(Problems, WithoutData) {
  SmallAttention small;
  for (heed_tensor* tensor : {&small.args.q, &small.args.k, &small.args.v, &small.args.out}) tensor->data = nullptr;
  EXPECT_EQ(Problem::of(small.args).line().find("align"), std::string::npos) << Problem::of(small.args).line();
  small.args.k.shape[1] = small.args.v.shape[1] = 0;
  EXPECT_NE(Problem::of(small.args).line().find("sk=0"), std::string::npos);
}

// Strides that no address uses do not make another problem.
TEST(Problems, StridesOfSizeOneAreNoDifference) {
  SmallAttention small;
  for (heed_tensor* t : {&small.args.q, &small.args.k, &small.args.v, &small.args.out}) t->shape[0] = 1;
  const std::string plain = Problem::of(small.args).line();
  for (heed_tensor* t : {&small.args.q, &small.args.k, &small.args.v, &small.args.out}) t->stride[0] = 12345;
  EXPECT_EQ(Problem::of(small.args).line(), plain);
}

TEST(Attention, OneCall) {
  for (const char* backend : {static_cast<const char*>(nullptr), "ref", "cpu"}) {
    SmallAttention small;
    const heed_plan_options options = {sizeof options, backend};
    ASSERT_EQ(heed_attention(&small.args, &options), HEED_OK) << heed_last_error();
    expect_near(small.out, textbook(small));
    small.args.causal = 1;
    ASSERT_EQ(heed_attention(&small.args, nullptr), HEED_OK) << heed_last_error();
    expect_near(small.out, textbook(small, true));
  }
}

TEST(Attention, APlanRunsManyTimes) {
  SmallAttention small;
  const Plan plan{Problem::of(small.args)};
  std::vector<char> memory(plan.workspace_bytes() + 64);
  small.args.workspace = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64);
  small.args.workspace_bytes = plan.workspace_bytes();
  for (int i = 0; i < 3; ++i) {
    std::fill(small.out.begin(), small.out.end(), NAN);
    plan.run(small.args);
    expect_near(small.out, textbook(small));
  }
}

// Better aligned than promised, and other threads than planned, are fine.
const char kUnaligned[] =
    "attention b=2 hq=4 hkv=2 sq=3 sk=5 d=8 dv=16 threads=7 align.q=4 align.k=4 align.v=4 align.out=4";

TEST(Attention, APlanOfALineRuns) {
  SmallAttention small;
  const Plan plan{Problem::parse(kUnaligned)};
  std::vector<char> memory(plan.workspace_bytes() + 64);
  small.args.workspace = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64);
  small.args.workspace_bytes = plan.workspace_bytes();
  plan.run(small.args);
  expect_near(small.out, textbook(small));
}

TEST(Attention, ManyThreadsShareAPlan) {
  const Plan plan{Problem::parse(kUnaligned)};
  const std::vector<float> want = textbook(SmallAttention());
  std::vector<std::thread> threads;
  std::atomic<int> failures{0};
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      SmallAttention small;
      void* const memory = std::aligned_alloc(64, (plan.workspace_bytes() + 127) / 64 * 64);
      small.args.workspace = memory;
      small.args.workspace_bytes = plan.workspace_bytes();
      for (int i = 0; i < 50; ++i) {
        std::fill(small.out.begin(), small.out.end(), NAN);
        if (heed_attention_run(plan.get(), &small.args) != HEED_OK) failures.fetch_add(1);
        for (size_t x = 0; x < want.size(); ++x) failures.fetch_add(!(std::fabs(small.out[x] - want[x]) < 1e-5f));
      }
      std::free(memory);
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(failures.load(), 0);
}

TEST(Attention, ThreadsAndExecutorsDoNotChangeTheResult) {
  SmallAttention small;
  small.args.executor = heed_executor_serial();
  ASSERT_EQ(heed_attention(&small.args, nullptr), HEED_OK) << heed_last_error();
  const std::vector<float> serial = small.out;
  std::atomic<int> regions{0};
  const Executor backwards(5, [&](int32_t num_tasks, const Executor::Task& task) {
    regions.fetch_add(1);
    for (int32_t i = num_tasks; i-- > 0;) task(i);
  });
  for (const heed_executor* executor : {heed_executor_pool(), backwards.get()}) {
    for (const int32_t threads : {0, 1, 2, 9}) {
      std::fill(small.out.begin(), small.out.end(), NAN);
      small.args.executor = executor;
      small.args.num_threads = threads;
      ASSERT_EQ(heed_attention(&small.args, nullptr), HEED_OK) << heed_last_error();
      EXPECT_EQ(std::memcmp(small.out.data(), serial.data(), serial.size() * sizeof(float)), 0);
    }
  }
}

struct Counter {
  int allocated = 0, freed = 0;
  size_t bytes = 0;
};

void* count_allocate(void* context, size_t bytes, size_t alignment, void*) {
  auto* const counter = static_cast<Counter*>(context);
  ++counter->allocated;
  counter->bytes = bytes;
  return std::aligned_alloc(alignment, bytes);
}

void count_free(void* context, void* pointer, size_t bytes, void*) {
  auto* const counter = static_cast<Counter*>(context);
  counter->freed += counter->bytes == bytes;
  std::free(pointer);
}

TEST(Attention, TheAllocatorGivesTheWorkspace) {
  SmallAttention small;
  const bool needs_memory = Plan(Problem::of(small.args)).workspace_bytes() > 0;
  Counter counter;
  const heed_allocator allocator = {sizeof allocator, &counter, &count_allocate, &count_free};
  small.args.allocator = &allocator;
  ASSERT_EQ(heed_attention(&small.args, nullptr), HEED_OK) << heed_last_error();
  EXPECT_EQ(counter.allocated, needs_memory ? 1 : 0);
  EXPECT_EQ(counter.freed, counter.allocated);
  expect_near(small.out, textbook(small));
}

TEST(Attention, BackwardThroughTheHeader) {
  SmallAttention small;
  using S = SmallAttention;
  const TensorView q(small.q.data(), {S::kBatch, S::kSeqlenQ, S::kHeadsQ, S::kHeadDim});
  const TensorView k(small.k.data(), {S::kBatch, S::kSeqlenK, S::kHeadsKv, S::kHeadDim});
  const TensorView v(small.v.data(), {S::kBatch, S::kSeqlenK, S::kHeadsKv, S::kHeadDimV});
  const TensorView out(small.out.data(), {S::kBatch, S::kSeqlenQ, S::kHeadsQ, S::kHeadDimV});
  const TensorView lse(small.lse.data(), {S::kBatch, S::kHeadsQ, S::kSeqlenQ});
  const AttentionOptions options = {.lse = lse, .causal = true};
  attention(q, k, v, out, options);
  std::vector<float> dout(small.out.size(), 1.0f), dq(small.q.size()), dv(small.v.size());
  const TensorView dout_view(dout.data(), {S::kBatch, S::kSeqlenQ, S::kHeadsQ, S::kHeadDimV});
  attention_backward(q, k, v, out, dout_view,
                     {.dq = TensorView(dq.data(), {S::kBatch, S::kSeqlenQ, S::kHeadsQ, S::kHeadDim}),
                      .dv = TensorView(dv.data(), {S::kBatch, S::kSeqlenK, S::kHeadsKv, S::kHeadDimV})},
                     options);
  double sum = 0;  // every row of P sums to 1, so with dout = 1 dv sums to the number of elements of out
  for (const float x : dv) sum += x;
  EXPECT_NEAR(sum, static_cast<double>(small.out.size()), 1e-3);
}

// Append two keys behind what the cache holds, then the cache read back shows them there and nothing else changed.
TEST(KvAppend, ThroughTheHeader) {
  std::vector<float> k_cache(2 * 6 * 1 * 8, -1.0f), v_cache(2 * 6 * 1 * 4, -1.0f);
  std::vector<float> k_new(2 * 2 * 1 * 8), v_new(2 * 2 * 1 * 4);
  for (size_t i = 0; i < k_new.size(); ++i) k_new[i] = static_cast<float>(i);
  for (size_t i = 0; i < v_new.size(); ++i) v_new[i] = 100.0f + static_cast<float>(i);
  const std::vector<int32_t> lengths = {3, 0};
  for (const char* backend : {static_cast<const char*>(nullptr), "ref"}) {
    std::fill(k_cache.begin(), k_cache.end(), -1.0f);
    std::fill(v_cache.begin(), v_cache.end(), -1.0f);
    Counter counter;
    const heed_allocator allocator = {sizeof allocator, &counter, &count_allocate, &count_free};
    kv_append(TensorView(k_cache.data(), {2, 6, 1, 8}), TensorView(v_cache.data(), {2, 6, 1, 4}),
              TensorView(lengths.data(), {2}),
              {.k_new = TensorView(k_new.data(), {2, 2, 1, 8}),
               .v_new = TensorView(v_new.data(), {2, 2, 1, 4}),
               .allocator = &allocator,
               .backend = backend});
    EXPECT_EQ(counter.freed, counter.allocated);
    for (int64_t b = 0; b < 2; ++b) {
      for (int64_t j = 0; j < 6; ++j) {
        const int64_t t = j - lengths[static_cast<size_t>(b)];
        const bool added = t >= 0 && t < 2;
        EXPECT_EQ(k_cache[static_cast<size_t>((b * 6 + j) * 8)], added ? static_cast<float>((b * 2 + t) * 8) : -1.0f);
        EXPECT_EQ(v_cache[static_cast<size_t>((b * 6 + j) * 4)],
                  added ? 100.0f + static_cast<float>((b * 2 + t) * 4) : -1.0f);
      }
    }
  }
}

TEST(Attention, AForkedChildComputes) {
  SmallAttention small;
  ASSERT_EQ(heed_attention(&small.args, nullptr), HEED_OK) << heed_last_error();
  const std::vector<float> want = small.out;
  std::atomic<bool> stop{false};
  // The cache's locks and the pool are in use while this thread forks; memory is not: the address sanitizer's allocator does
  // not survive a fork that finds another thread inside it.
  std::vector<char> workspace(1 << 20);
  std::thread other([&] {
    SmallAttention mine;
    mine.args.workspace = workspace.data() + (64 - reinterpret_cast<uintptr_t>(workspace.data()) % 64);
    mine.args.workspace_bytes = workspace.size() - 64;
    while (!stop.load()) heed_attention(&mine.args, nullptr);
  });
  for (int i = 0; i < 10; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      std::fill(small.out.begin(), small.out.end(), NAN);
      bool good = heed_attention(&small.args, nullptr) == HEED_OK && small.out == want;
      small.args.window_left = 2;  // a plan that the parent does not have
      good = good && heed_attention(&small.args, nullptr) == HEED_OK;
      _exit(good ? 0 : 1);
    }
    int status = 0;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  }
  stop.store(true);
  other.join();
}

TEST(Cache, CountsAndClears) {
  heed_plan_cache_clear();
  SmallAttention small;
  for (int i = 0; i < 3; ++i) ASSERT_EQ(heed_attention(&small.args, nullptr), HEED_OK);
  heed_plan_cache_stats stats = {};
  stats.struct_size = sizeof stats;
  ASSERT_EQ(heed_plan_cache_get(&stats), HEED_OK);
  EXPECT_EQ(stats.hits, 2);
  EXPECT_EQ(stats.misses, 1);
  EXPECT_EQ(stats.entries, 1);
  EXPECT_GT(stats.capacity, 0);
  EXPECT_EQ(stats.struct_size, sizeof stats);
}

// The whole of a call but the kernel: an empty sequence leaves nothing to compute. Time of this thread, so that what
// else the machine does is not in it.
TEST(Cost, OfACallIsPrinted) {
  const auto thread_us = [] {
    timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return static_cast<double>(now.tv_sec) * 1e6 + static_cast<double>(now.tv_nsec) * 1e-3;
  };
  SmallAttention small;
  small.args.num_threads = 1;
  small.args.lse = tensor_of(small.lse.data(), HEED_DTYPE_F32, {2, 4, 3});
  small.args.q.shape[1] = small.args.out.shape[1] = small.args.lse.shape[2] = 0;
  double best = 1e30;
  for (int attempt = 0; attempt < 10; ++attempt) {
    const double start = thread_us();
    for (int i = 0; i < 5000; ++i) ASSERT_EQ(heed_attention(&small.args, nullptr), HEED_OK) << heed_last_error();
    best = std::min(best, (thread_us() - start) / 5000);
  }
  std::printf("[   note   ] heed_attention with a cached plan and nothing to compute, 1 thread: %.2f us\n", best);
}

}  // namespace
}  // namespace heed
