// The way of a call whose plan is cached, down to the driver, without a GPU: what it asks of the driver and of the heap,
// and that each run's addresses get there. The driver is tests/gpu/fake_driver.cpp, whose kernels do nothing; their code
// comes from a kernel cache filled here, so that no compiler is needed.
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <new>

#include "capi_run.h"
#include "cuda/attention_fwd.h"
#include "cuda/device.h"
#include "cuda/disk_cache.h"
#include "cuda/jit.h"
#include "gpu/fake_driver.h"
#include "heed/heed.h"
#include "ops/problem_line.h"

namespace {
std::atomic<int64_t> num_allocations{0};
}

namespace heed::cuda {
namespace {

struct Row {
  const char* name;
  const char* line;
  Configurations (*configure)(const AttentionProblem&, const DeviceFacts&);
  int64_t launches;
};
constexpr Row kRows[] = {
    {"cuda/attention_fwd_sm90", "attention b=2 hq=4 hkv=2 sq=256 d=64 bf16 causal lse device=cuda",
     configure_attention_fwd_sm90, 1},
    {"cuda/attention_fwd_sm80", "attention b=2 hq=4 hkv=2 sq=256 d=64 f16 lse device=cuda",
     configure_attention_fwd_sm80, 1},
    {"cuda/attention_decode_sm90", "attention b=1 hq=8 hkv=2 sq=1 sk=65536 d=128 f16 device=cuda",
     configure_attention_decode_sm90, 1},
    {"cuda/attention_decode_sm80", "attention b=1 hq=8 hkv=2 sq=1 sk=65536 d=128 bf16 device=cuda",
     configure_attention_decode_sm80, 2},
    {"cuda/attention_fwd_portable", "attention b=2 hq=4 sq=64 d=64 device=cuda", configure_attention_fwd_portable, 1},
};

class CallPath : public ::testing::TestWithParam<Row> {
 protected:
  static void SetUpTestSuite() {  // before the configuration is read
    char name[] = "/tmp/heed_call_path_test_XXXXXX";
    ASSERT_NE(mkdtemp(name), nullptr);
    folder_ = name;
    setenv("HEED_CACHE_DIR", name, 1);
    setenv("HEED_JIT", "require-cache", 1);
    fake_cuda_accept_kernels(1);
  }
  static void TearDownTestSuite() { std::filesystem::remove_all(folder_); }

  void SetUp() override {
    const Result<ProblemLine> parsed = parse_problem_line(GetParam().line);
    ASSERT_TRUE(parsed.ok()) << parsed.status().message();
    const AttentionProblem& problem = std::get<AttentionProblem>(parsed.value().problem);
    const DeviceFacts& facts = *device_facts(0).value();
    for (const KernelVariant& variant : variants_of(problem, GetParam().configure(problem, facts))) {
      const std::string text = code_text(variant.key, architecture(facts.major, facts.minor));
      disk_cache().store(text, "nvrtc-13.0", std::string("entry") + '\0' + "code");
    }
    ASSERT_EQ(heed_inputs_create(GetParam().line, &inputs_), HEED_OK) << heed_last_error();
    args_ = heed_inputs_attention(inputs_);
    options_.struct_size = sizeof options_;
    options_.backend = GetParam().name;
    ASSERT_EQ(heed_plan_create(heed_inputs_problem(inputs_), &options_, &plan_), HEED_OK) << heed_last_error();
    args_->workspace_bytes = heed_plan_workspace_bytes(plan_);
    if (args_->workspace_bytes > 0) {
      ASSERT_EQ(heed_memory_allocate(HEED_DEVICE_CUDA, 0, args_->workspace_bytes, &args_->workspace), HEED_OK);
    }
  }
  void TearDown() override {
    if (args_->workspace != nullptr) {
      EXPECT_EQ(heed_memory_free(HEED_DEVICE_CUDA, 0, args_->workspace), HEED_OK);
    }
    heed_plan_destroy(plan_);
    heed_inputs_destroy(inputs_);
  }

  heed_status call() { return heed_attention(args_, &options_); }

  static inline std::string folder_;
  heed_plan* plan_ = nullptr;
  heed_inputs* inputs_ = nullptr;
  heed_attention_args* args_ = nullptr;
  heed_plan_options options_ = {};
};

TEST_P(CallPath, ACachedPlanAsksForItsLaunchesOnly) {
  ASSERT_EQ(call(), HEED_OK) << heed_last_error();
  ASSERT_EQ(call(), HEED_OK) << heed_last_error();
  const int64_t launches = fake_cuda_launches(), maps = fake_cuda_encoded_maps(), taken = num_allocations;
  ASSERT_EQ(call(), HEED_OK) << heed_last_error();
  EXPECT_EQ(fake_cuda_launches() - launches, GetParam().launches);
  EXPECT_EQ(fake_cuda_encoded_maps(), maps) << "tensor maps are encoded when the plan is made";
  EXPECT_EQ(num_allocations, taken);
}

TEST_P(CallPath, EveryRunsAddressesGetToTheKernel) {
  const auto q = reinterpret_cast<uintptr_t>(args_->q.data);
  for (const uintptr_t address : {q, q + 4096, q}) {
    args_->q.data = reinterpret_cast<void*>(address);
    ASSERT_EQ(call(), HEED_OK) << heed_last_error();
    if (GetParam().launches == 1) {
      EXPECT_EQ(fake_cuda_first_parameter(), address);
    }
  }
}

// Prints what a call takes of the host but for the driver.
TEST_P(CallPath, HostTime) {
  ASSERT_EQ(call(), HEED_OK) << heed_last_error();
  double best = 1e9;
  for (int sample = 0; sample < 20; ++sample) {
    constexpr int kCalls = 1000;
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < kCalls; ++i) ASSERT_EQ(call(), HEED_OK);
    const std::chrono::duration<double, std::micro> elapsed = std::chrono::steady_clock::now() - start;
    best = std::min(best, elapsed.count() / kCalls);
  }
  std::printf("%s: %.3f us a call, stand-in driver\n", GetParam().name, best);
  EXPECT_LT(best, 1000);
}

TEST_P(CallPath, AWorkspaceIsTakenOnceAStream) {
  void* const given = args_->workspace;
  args_->workspace = nullptr;
  args_->stream = reinterpret_cast<void*>(0x3000);
  ASSERT_EQ(call(), HEED_OK) << heed_last_error();
  const int64_t made = fake_cuda_calls("cuMemAllocAsync"), freed = fake_cuda_calls("cuMemFreeAsync");
  for (int i = 0; i < 3; ++i) ASSERT_EQ(call(), HEED_OK) << heed_last_error();
  if (heed_plan_workspace_bytes(plan_) <= size_t{1} << 20) {
    EXPECT_EQ(fake_cuda_calls("cuMemAllocAsync"), made);
    EXPECT_EQ(fake_cuda_calls("cuMemFreeAsync"), freed);
  }
  args_->stream = nullptr;
  args_->workspace = given;
}

class StreamMemory : public CallPath {};

TEST_P(StreamMemory, StaysWithItsStream) {
  void* const one = reinterpret_cast<void*>(0x1000);
  void* const other = reinterpret_cast<void*>(0x2000);
  void* first = nullptr;
  {
    Workspace a, b, c;
    ASSERT_TRUE(a.allocate(1000, Device::kCuda, 0, nullptr, one).ok());
    ASSERT_TRUE(b.allocate(1000, Device::kCuda, 0, nullptr, one).ok());
    ASSERT_TRUE(c.allocate(1000, Device::kCuda, 0, nullptr, other).ok());
    first = a.pointer();
    EXPECT_NE(b.pointer(), first) << "a call that is still putting its work into the stream has that block";
    EXPECT_NE(c.pointer(), first) << "another stream's work runs at the same time";
  }
  const int64_t made = fake_cuda_calls("cuMemAllocAsync");
  {
    Workspace again;
    ASSERT_TRUE(again.allocate(4000, Device::kCuda, 0, nullptr, one).ok());
    EXPECT_EQ(again.pointer(), first);
  }
  EXPECT_EQ(fake_cuda_calls("cuMemAllocAsync"), made);
  const int64_t live = fake_cuda_live_allocations();
  {
    Workspace larger;
    ASSERT_TRUE(larger.allocate(100000, Device::kCuda, 0, nullptr, one).ok());
    EXPECT_EQ(fake_cuda_live_allocations(), live) << "the small block went back to the driver";
  }
  {
    Workspace large;
    ASSERT_TRUE(large.allocate(size_t{2} << 20, Device::kCuda, 0, nullptr, one).ok());
  }
  EXPECT_EQ(fake_cuda_live_allocations(), live) << "a large block does not stay";
  fake_cuda_capture(one, 1);
  const int64_t asked = fake_cuda_calls("cuStreamGetId") + fake_cuda_calls("cuCtxGetId");
  {
    Workspace captured;
    ASSERT_TRUE(captured.allocate(1000, Device::kCuda, 0, nullptr, one).ok());
    EXPECT_EQ(fake_cuda_live_allocations(), live + 1) << "what a graph uses is the graph's";
  }
  EXPECT_EQ(fake_cuda_calls("cuStreamGetId") + fake_cuda_calls("cuCtxGetId"), asked) << "would end the capture";
  fake_cuda_capture(one, 0);
  EXPECT_EQ(fake_cuda_live_allocations(), live);
  Workspace per_thread;  // one handle for many streams
  ASSERT_TRUE(per_thread.allocate(1000, Device::kCuda, 0, nullptr, reinterpret_cast<void*>(2)).ok());
  EXPECT_EQ(fake_cuda_live_allocations(), live + 1);
}

TEST_P(StreamMemory, StreamsWithoutAPlaceGoWithout) {
  const int64_t live = fake_cuda_live_allocations();
  for (uintptr_t stream = 1; stream <= 40; ++stream) {
    Workspace workspace;
    ASSERT_TRUE(workspace.allocate(1000, Device::kCuda, 0, nullptr, reinterpret_cast<void*>(stream << 16)).ok());
  }
  EXPECT_LE(fake_cuda_live_allocations() - live, 16);
}

INSTANTIATE_TEST_SUITE_P(Blocks, StreamMemory, ::testing::Values(kRows[1]));
INSTANTIATE_TEST_SUITE_P(Rows, CallPath, ::testing::ValuesIn(kRows),
                         [](const auto& row) { return std::string(row.param.name).substr(5); });

}  // namespace
}  // namespace heed::cuda

// Counting stands in for the default operators.
[[gnu::noinline]] void* operator new(size_t bytes) {
  ++num_allocations;
  if (void* memory = std::malloc(bytes == 0 ? 1 : bytes)) return memory;
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, size_t) noexcept { std::free(memory); }
