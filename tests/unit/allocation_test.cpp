// What a run may take: nothing. What a call may take: the plan's workspace, and that does not grow with seqlen_k.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <string>
#include <vector>

#include "heed/heed.h"

namespace {

std::atomic<int64_t> num_allocations{0};

struct Plan {
  explicit Plan(const std::string& line) {
    EXPECT_EQ(heed_problem_parse(line.c_str(), &problem), HEED_OK) << heed_last_error();
    EXPECT_EQ(heed_plan_create(problem, nullptr, &plan), HEED_OK) << heed_last_error();
  }
  ~Plan() {
    heed_plan_destroy(plan);
    heed_problem_destroy(problem);
  }
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  heed_problem* problem = nullptr;
  heed_plan* plan = nullptr;
};

const char* const kLines[] = {
    "attention b=2 hq=4 hkv=2 sq=70 sk=130 d=32 causal lse threads=2",
    "attention b=3 hq=4 hkv=2 sq=1 sk=704 d=64 bf16 page=16 pages=shuffled used_k lk=3,700,129 threads=2",
    "attention b=2 hq=4 sq=33 sk=65 d=24 dv=40 f16 bias=f32:hij mask=bij softcap alibi sinks dropout lse threads=2",
    "attention b=3 hq=2 layout_q=thd layout_kv=thd lq=5,0,33 lk=7,4,33 d=16 causal threads=2",
    "attention pass=bwd b=2 hq=4 hkv=2 sq=40 sk=70 d=32 causal bias=f32:hij sinks alibi threads=2",
    "kv_append b=2 hq=4 hkv=2 sn=3 sk=20 d=16 rotary=16 lk=4,9 threads=2",
};

TEST(Allocation, RunTakesNothing) {
  for (const char* line : kLines) {
    Plan made(line);
    heed_inputs* inputs = nullptr;
    ASSERT_EQ(heed_inputs_create(line, &inputs), HEED_OK) << line << ": " << heed_last_error();
    const size_t bytes = heed_plan_workspace_bytes(made.plan);
    void* workspace = std::aligned_alloc(64, (bytes + 64) / 64 * 64);
    int64_t taken = -1;
    // The second run: the first one starts the pool's threads.
    for (int round = 0; round < 2; ++round) {
      heed_status status = HEED_OK;
      if (heed_attention_args* args = heed_inputs_attention(inputs)) {
        args->workspace = workspace, args->workspace_bytes = bytes;
        const int64_t before = num_allocations.load();
        status = heed_attention_run(made.plan, args);
        taken = num_allocations.load() - before;
      } else {
        heed_kv_append_args* append = heed_inputs_kv_append(inputs);
        append->workspace = workspace, append->workspace_bytes = bytes;
        const int64_t before = num_allocations.load();
        status = heed_kv_append_run(made.plan, append);
        taken = num_allocations.load() - before;
      }
      ASSERT_EQ(status, HEED_OK) << line << ": " << heed_last_error();
    }
    EXPECT_EQ(taken, 0) << line;
    heed_inputs_destroy(inputs);
    std::free(workspace);
  }
}

struct Meter {
  size_t live = 0, peak = 0;
  int32_t calls = 0;
  static void* allocate(void* context, size_t bytes, size_t alignment, void*) {
    auto& meter = *static_cast<Meter*>(context);
    meter.live += bytes;
    meter.peak = std::max(meter.peak, meter.live);
    ++meter.calls;
    return std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
  }
  static void deallocate(void* context, void* pointer, size_t bytes, void*) {
    static_cast<Meter*>(context)->live -= bytes;
    std::free(pointer);
  }
};

// The one-call form asks its allocator once, for the plan's workspace, and gives it back.
TEST(Allocation, CallTakesTheWorkspace) {
  for (const char* line : kLines) {
    heed_inputs* inputs = nullptr;
    ASSERT_EQ(heed_inputs_create(line, &inputs), HEED_OK) << line << ": " << heed_last_error();
    heed_attention_args* args = heed_inputs_attention(inputs);
    if (args != nullptr) {
      heed_problem* problem = nullptr;
      ASSERT_EQ(heed_attention_problem(args, &problem), HEED_OK) << heed_last_error();
      heed_plan* plan = nullptr;
      ASSERT_EQ(heed_plan_create(problem, nullptr, &plan), HEED_OK) << heed_last_error();
      Meter meter;
      const heed_allocator allocator = {sizeof allocator, &meter, Meter::allocate, Meter::deallocate};
      args->allocator = &allocator;
      ASSERT_EQ(heed_attention(args, nullptr), HEED_OK) << line << ": " << heed_last_error();
      EXPECT_EQ(meter.peak, heed_plan_workspace_bytes(plan)) << line;
      EXPECT_EQ(meter.live, 0u) << line;
      EXPECT_LE(meter.calls, 1) << line;
      heed_plan_destroy(plan);
      heed_problem_destroy(problem);
    }
    heed_inputs_destroy(inputs);
  }
}

TEST(Allocation, WorkspaceDoesNotGrowWithKeys) {
  for (const std::string shape :
       {"hq=32 hkv=8 sq=1 d=128 bf16", "hq=8 sq=512 d=64 causal", "hq=8 sq=512 d=64 pass=bwd"}) {
    size_t first = 0;
    for (const char* sk : {"8192", "65536", "1048576"}) {
      Plan made("attention " + shape + " sk=" + sk + " threads=2");
      const size_t bytes = heed_plan_workspace_bytes(made.plan);
      std::printf("workspace %9zu bytes: %s sk=%s\n", bytes, shape.c_str(), sk);
      if (first == 0) first = bytes;
      EXPECT_EQ(bytes, first) << shape << " sk=" << sk;
    }
  }
}

}  // namespace

// Counting stands in for the default operators; the sanitizers' own checks see malloc and free beneath. (Inlined alone, one
// of them looks to the compiler as if it took the other's memory.)
[[gnu::noinline]] void* operator new(size_t bytes) {
  num_allocations.fetch_add(1, std::memory_order_relaxed);
  if (void* pointer = std::malloc(bytes == 0 ? 1 : bytes)) return pointer;
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* pointer) noexcept { std::free(pointer); }
[[gnu::noinline]] void operator delete(void* pointer, size_t) noexcept { std::free(pointer); }
