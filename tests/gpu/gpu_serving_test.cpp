// What serving needs of the GPU: batch invariance, graphs, streams, threads and contexts side by side.
#include <atomic>
#include <cstring>
#include <thread>

#include "cuda/device.h"
#include "gpu/gpu.h"

namespace heed {
namespace {

using testing::CapturedGraph;
using testing::DeviceMemory;
using testing::GpuTest;
using testing::LineRun;
using testing::Place;
using testing::RunStyle;
using testing::Stream;
using testing::test_calls;

constexpr Place kGpu = {HEED_DEVICE_CUDA, 0};

void set_numbers(const heed_tensor& tensor, const std::vector<int32_t>& values) {
  ASSERT_EQ(heed_memory_copy(tensor.data, HEED_DEVICE_CUDA, values.data(), HEED_DEVICE_CPU, 0, values.size() * 4),
            HEED_OK)
      << heed_last_error();
}

std::vector<int32_t> numbers(const heed_tensor& tensor) {
  std::vector<int32_t> values(static_cast<size_t>(tensor.shape[0]));
  EXPECT_EQ(heed_memory_copy(values.data(), HEED_DEVICE_CPU, tensor.data, HEED_DEVICE_CUDA, 0, values.size() * 4),
            HEED_OK)
      << heed_last_error();
  return values;
}

class GpuServing : public GpuTest {};

// ---- batch invariance -----------------------------------------------------------------------------------------------

void skip_first(heed_tensor& tensor, int32_t dim, int64_t count) {
  if (tensor.dtype == HEED_DTYPE_NONE) return;
  tensor.data = static_cast<char*>(tensor.data) +
                count * tensor.stride[dim] * static_cast<int64_t>(heed_dtype_bytes(tensor.dtype));
  tensor.shape[dim] -= count;
}

// The arguments of sequences [first, first + count) alone, over the same memory; packed ones' offsets are in `memory`.
heed_attention_args part_of(const heed_attention_args& whole, int64_t first, int64_t count,
                            std::vector<std::unique_ptr<DeviceMemory>>& memory) {
  heed_attention_args part = whole;
  const auto narrow = [&](heed_tensor& tensor, int32_t dim, int64_t begin, int64_t size) {
    if (tensor.dtype == HEED_DTYPE_NONE) return;
    skip_first(tensor, dim, begin);
    tensor.shape[dim] = size;
  };
  const auto packed = [&](heed_tensor& offsets, std::initializer_list<std::pair<heed_tensor*, int32_t>> tensors) {
    std::vector<int32_t> values = numbers(offsets);
    values.assign(values.begin() + first, values.begin() + first + count + 1);
    const int32_t begin = values.front(), end = values.back();
    for (int32_t& value : values) value -= begin;
    memory.push_back(std::make_unique<DeviceMemory>(values));
    offsets.data = memory.back()->data();
    offsets.shape[0] = count + 1;
    for (const auto& [tensor, dim] : tensors) narrow(*tensor, dim, begin, end - begin);
  };
  if (whole.layout_q == HEED_LAYOUT_THD) {
    packed(part.cu_seqlens_q, {{&part.q, 0}, {&part.out, 0}, {&part.lse, 1}});
  } else {
    for (heed_tensor* tensor : {&part.q, &part.out, &part.lse}) narrow(*tensor, 0, first, count);
  }
  if (whole.layout_kv == HEED_LAYOUT_THD) {
    packed(part.cu_seqlens_k, {{&part.k, 0}, {&part.v, 0}});
  } else if (whole.page_table.dtype == HEED_DTYPE_NONE) {
    for (heed_tensor* tensor : {&part.k, &part.v}) narrow(*tensor, 0, first, count);
  }
  for (heed_tensor* tensor : {&part.page_table, &part.seqused_q, &part.seqused_k, &part.status}) {
    narrow(*tensor, 0, first, count);
  }
  return part;
}

// `row`: "" is the planner's choice for each batch by itself.
void expect_same_bits_in_parts(LineRun& problem, const std::string& row) {
  SCOPED_TRACE(row);
  const heed_plan_options forced = {sizeof forced, row.c_str()}, *const options = row.empty() ? nullptr : &forced;
  const heed_attention_args& whole = *problem.attention();
  ASSERT_EQ(problem.poison(), "");
  ASSERT_EQ(heed_attention(&whole, options), HEED_OK) << heed_last_error();
  ASSERT_EQ(heed_stream_synchronize(HEED_DEVICE_CUDA, 0, nullptr), HEED_OK) << heed_last_error();
  EXPECT_EQ(problem.judge(), "");
  const std::vector<unsigned char> together = problem.outputs();
  const int64_t batch = whole.status.shape[0];
  for (int64_t size = 1; size < batch; ++size) {
    ASSERT_EQ(problem.poison(), "");
    for (int64_t first = 0; first < batch; first += size) {
      std::vector<std::unique_ptr<DeviceMemory>> memory;
      const heed_attention_args part = part_of(whole, first, std::min(size, batch - first), memory);
      ASSERT_EQ(heed_attention(&part, options), HEED_OK) << heed_last_error();
      ASSERT_EQ(heed_stream_synchronize(HEED_DEVICE_CUDA, 0, nullptr), HEED_OK) << heed_last_error();
    }
    EXPECT_TRUE(problem.outputs() == together) << "other bits in batches of " << size;
  }
}

void expect_batch_invariant(const std::string& line) {
  SCOPED_TRACE(line);
  LineRun problem(line + " batch_invariant lse device=cuda");
  ASSERT_EQ(problem.error(), "");
  expect_same_bits_in_parts(problem, "");
  for (const std::string& row : problem.accepting()) expect_same_bits_in_parts(problem, row);
}

TEST_F(GpuServing, BatchInvariance) {
  for (const char* type : {"d=64 bf16", "d=128 f16", "d=40 dv=72 bf16", "d=48", "d=33 dv=17 f16"}) {
    const std::string heads = std::string("attention b=5 hq=8 hkv=2 ") + type;
    expect_batch_invariant(heads + " sq=1 sk=3000 used_k lk=3000,17,1,2048,0");
    expect_batch_invariant(heads + " sq=3 sk=1500 causal used_q used_k lq=3,1,0,2,3 lk=700,1500,3,64,999");
    expect_batch_invariant(heads + " sq=150 sk=400 causal used_k lk=400,150,399,128,1");
    expect_batch_invariant(heads +
                           " layout_q=thd layout_kv=thd lq=1,130,7,64,0 lk=900,130,64,65,7 causal window=300,0");
    expect_batch_invariant(heads + " layout_q=thd layout_kv=thd lq=1,1,2,1,1 lk=900,13,4097,64,0");
    expect_batch_invariant(heads + " sq=1 sk=2048 page=16 used_k lk=2000,3,777,2048,16 pages=shuffled");
    expect_batch_invariant(heads + " layout_q=thd lq=1,40,0,2,9 sk=1024 page=64 used_k lk=1000,40,777,1024,16 causal");
  }
}

// ---- graphs ---------------------------------------------------------------------------------------------------------

// A planned run in a graph gives the run's own bits, also for lengths that change between its launches.
void expect_replays(const std::string& line, const std::vector<std::vector<int32_t>>& lengths) {
  SCOPED_TRACE(line);
  LineRun problem(line);
  ASSERT_EQ(problem.error(), "");
  heed_attention_args& args = *problem.attention();
  const Stream stream;
  for (const bool planned : {true, false}) {
    SCOPED_TRACE(planned ? "plan and workspace" : "one call");
    heed_problem* posed = nullptr;
    ASSERT_EQ(heed_attention_problem(&args, &posed), HEED_OK) << heed_last_error();
    const std::unique_ptr<heed_problem, testing::ProblemDeleter> posed_owner(posed);
    heed_plan* plan = nullptr;
    ASSERT_EQ(heed_plan_create(posed, nullptr, &plan), HEED_OK) << heed_last_error();
    const std::unique_ptr<heed_plan, testing::PlanDeleter> plan_owner(plan);
    const testing::GuardedWorkspace workspace(kGpu, heed_plan_workspace_bytes(plan), 0xff);
    ASSERT_EQ(workspace.error(), "");
    args.stream = stream.get();
    if (planned) {
      args.workspace = workspace.data();
      args.workspace_bytes = workspace.bytes();
    }
    CapturedGraph graph;
    ASSERT_EQ(graph.begin(stream), "");
    const heed_status status = planned ? heed_attention_run(plan, &args) : heed_attention(&args, nullptr);
    const std::string said = heed_last_error();
    ASSERT_EQ(graph.end(stream), "");
    ASSERT_EQ(status, HEED_OK) << said;
    const std::vector<int32_t> own = numbers(args.seqused_k);
    for (const std::vector<int32_t>& values : lengths) {
      SCOPED_TRACE(::testing::PrintToString(values));
      set_numbers(args.seqused_k, values);
      ASSERT_EQ(problem.poison(), "");
      for (int launch = 0; launch < 3; ++launch) ASSERT_EQ(graph.launch(stream), "");
      EXPECT_EQ(problem.judge(), "");
      const std::vector<unsigned char> replayed = problem.outputs();
      ASSERT_EQ(problem.poison(), "");
      ASSERT_EQ(heed_attention(&args, nullptr), HEED_OK) << heed_last_error();
      ASSERT_EQ(stream.synchronize(), "");
      EXPECT_TRUE(problem.outputs() == replayed) << "other bits than a run outside the graph";
    }
    set_numbers(args.seqused_k, own);
    args.workspace = nullptr;
    args.workspace_bytes = 0;
    args.stream = nullptr;
    EXPECT_TRUE(workspace.intact());
  }
}

// A call on one stream leaves what another stream captures alone.
TEST_F(GpuServing, ACallBesideACapture) {
  LineRun problem("attention b=2 hq=8 hkv=2 sq=1 sk=8192 d=128 bf16 lse device=cuda");
  ASSERT_EQ(problem.error(), "");
  const Stream captured, other;
  problem.attention()->stream = other.get();
  ASSERT_EQ(heed_attention(problem.attention(), nullptr), HEED_OK) << heed_last_error();
  CapturedGraph graph;
  ASSERT_EQ(graph.begin(captured), "");
  const heed_status status = heed_attention(problem.attention(), nullptr);
  const std::string said = heed_last_error();
  EXPECT_EQ(graph.end(captured), "");
  EXPECT_EQ(status, HEED_OK) << said;
}

TEST_F(GpuServing, GraphsReplayWithOtherLengths) {
  const std::vector<std::vector<int32_t>> lengths = {{1, 2000, 33, 64}, {2048, 5, 512, 1024}, {7, 7, 7, 7}};
  expect_replays("attention b=4 hq=8 hkv=2 sq=1 sk=2048 d=128 bf16 page=16 used_k lse device=cuda", lengths);
  expect_replays("attention b=4 hq=8 hkv=2 sq=1 sk=2048 d=64 f16 used_k lse device=cuda", lengths);
  expect_replays("attention b=4 hq=4 hkv=2 sq=100 sk=2048 d=64 bf16 used_k causal lse device=cuda", lengths);
  expect_replays("attention b=4 hq=4 hkv=2 layout_q=thd lq=1,7,0,90 sk=2048 d=64 bf16 used_k causal lse device=cuda",
                 lengths);
  expect_replays("attention b=4 hq=2 sq=3 sk=2048 d=24 used_k splits=3 lse device=cuda", lengths);
}

// A step of decoding: append, then attention over what the cache holds then.
TEST_F(GpuServing, AppendIsPartOfAGraph) {
  LineRun append(
      "kv_append b=3 hq=4 hkv=2 sn=1 sk=64 d=64 bf16 rotary=64 page=16 lk=10,29,14 pages=shuffled device=cuda");
  ASSERT_EQ(append.error(), "");
  ASSERT_EQ(append.run("cuda/kv_append", RunStyle()), "");
  const std::vector<unsigned char> eager = append.outputs();
  heed_kv_append_args& args = *append.kv_append();
  const Stream stream;
  args.stream = stream.get();
  CapturedGraph graph;
  ASSERT_EQ(graph.begin(stream), "");
  const heed_status status = heed_kv_append(&args, nullptr);
  const std::string said = heed_last_error();
  ASSERT_EQ(graph.end(stream), "");
  ASSERT_EQ(status, HEED_OK) << said;
  ASSERT_EQ(append.poison(), "");
  ASSERT_EQ(graph.launch(stream), "");
  EXPECT_TRUE(append.outputs() == eager);
  EXPECT_EQ(append.judge(), "");
}

TEST_F(GpuServing, ACaptureNeitherCompilesNorWaits) {
  // Head dims that no other test has: the kernel is not loaded.
  LineRun problem("attention b=2 hq=2 sq=70 sk=90 d=216 dv=232 f16 softcap window=40,3 lse device=cuda");
  ASSERT_EQ(problem.error(), "");
  heed_attention_args& args = *problem.attention();
  const Stream stream;
  args.stream = stream.get();
  CapturedGraph first;
  ASSERT_EQ(first.begin(stream), "");
  EXPECT_EQ(heed_attention(&args, nullptr), HEED_OPERATION_FAILED);
  const std::string said = heed_last_error();
  EXPECT_NE(said.find("is being captured into a graph"), std::string::npos) << said;
  EXPECT_NE(said.find("heed_plan_create"), std::string::npos) << said;
  EXPECT_EQ(heed_attention_validate(&args), HEED_OPERATION_FAILED);
  heed_check_report report = {};
  report.struct_size = sizeof report;
  EXPECT_EQ(heed_attention_check(&args, &report), HEED_OPERATION_FAILED);
  EXPECT_EQ(first.end(stream), "") << "the capture is lost";

  heed_problem* posed = nullptr;  // planning is enough: no run before the capture
  ASSERT_EQ(heed_attention_problem(&args, &posed), HEED_OK) << heed_last_error();
  heed_plan* plan = nullptr;
  ASSERT_EQ(heed_plan_create(posed, nullptr, &plan), HEED_OK) << heed_last_error();
  heed_problem_destroy(posed);
  CapturedGraph second;
  ASSERT_EQ(second.begin(stream), "");
  const heed_status status = heed_attention(&args, nullptr);
  const std::string then = heed_last_error();
  ASSERT_EQ(second.end(stream), "");
  EXPECT_EQ(status, HEED_OK) << then;
  heed_plan_destroy(plan);
  ASSERT_EQ(second.launch(stream), "");
  EXPECT_EQ(heed_attention_validate(&args), HEED_OK) << heed_last_error();
  EXPECT_EQ(problem.judge(), "");
}

// ---- side by side ---------------------------------------------------------------------------------------------------

// One plan on eight threads and streams at once, each with a workspace of its own.
TEST_F(GpuServing, OnePlanOnManyThreadsAndStreams) {
  for (const char* line : {"attention b=2 hq=8 hkv=2 sq=1 sk=5000 d=128 bf16 lse device=cuda",
                           "attention b=2 hq=4 sq=300 d=64 f16 causal lse device=cuda",
                           "attention b=2 hq=4 sq=60 d=40 causal lse device=cuda"}) {
    SCOPED_TRACE(line);
    LineRun first(line);
    ASSERT_EQ(first.error(), "");
    heed_problem* posed = nullptr;
    ASSERT_EQ(heed_attention_problem(first.attention(), &posed), HEED_OK) << heed_last_error();
    heed_plan* plan = nullptr;
    ASSERT_EQ(heed_plan_create(posed, nullptr, &plan), HEED_OK) << heed_last_error();
    heed_problem_destroy(posed);
    ASSERT_EQ(first.run(heed_plan_impl(plan), RunStyle()), "");
    const std::vector<unsigned char> alone = first.outputs();
    std::atomic<int> wrong{0};
    std::vector<std::thread> threads;
    for (int n = 0; n < 8; ++n) {
      threads.emplace_back([&] {
        LineRun own(line);
        const Stream stream;
        const testing::GuardedWorkspace workspace(kGpu, heed_plan_workspace_bytes(plan), 0x7f);
        heed_attention_args& args = *own.attention();
        args.stream = stream.get();
        args.workspace = workspace.data();
        args.workspace_bytes = workspace.bytes();
        for (int run = 0; run < 50; ++run) wrong += heed_attention_run(plan, &args) != HEED_OK;
        wrong += !stream.synchronize().empty() || !workspace.intact() || own.outputs() != alone;
      });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(wrong, 0);
    heed_plan_destroy(plan);
  }
}

// Calls in a context that the caller made, while another thread calls in the primary one.
TEST_F(GpuServing, ContextsOfTheCaller) {
  if (test_calls().ctx_create == nullptr) GTEST_SKIP() << "the driver lacks cuCtxCreate_v2";
  const char* line = "attention b=2 hq=4 hkv=2 sq=150 d=64 bf16 causal lse device=cuda";
  const auto run = [&](const Stream* stream) -> std::vector<unsigned char> {
    LineRun problem(line);
    EXPECT_EQ(problem.error(), "");
    for (const std::string& row : problem.accepting()) {
      RunStyle style;
      style.stream = stream != nullptr ? stream->get() : nullptr;
      EXPECT_EQ(problem.run(row, style), "") << row;
      EXPECT_EQ(problem.judge(), "") << row;
    }
    return problem.outputs();
  };
  const std::vector<unsigned char> primary = run(nullptr);
  const cuda::Driver& driver = *cuda::driver().value();
  cuda::CUcontext own = nullptr, popped = nullptr;
  ASSERT_EQ(test_calls().ctx_create(&own, 0, 0), cuda::kCudaSuccess);  // current from now on
  std::vector<unsigned char> beside;
  std::thread other([&] {
    const Stream stream;
    beside = run(&stream);
  });
  EXPECT_TRUE(run(nullptr) == primary);
  {
    const Stream stream;
    EXPECT_TRUE(run(&stream) == primary);
  }
  other.join();
  EXPECT_TRUE(beside == primary);
  cuda::CUcontext current = nullptr;
  EXPECT_EQ(driver.ctx_get_current(&current), cuda::kCudaSuccess);
  EXPECT_EQ(current, own) << "a call left another context current";
  EXPECT_EQ(driver.ctx_pop_current(&popped), cuda::kCudaSuccess);
  EXPECT_EQ(test_calls().ctx_destroy(own), cuda::kCudaSuccess);
  EXPECT_TRUE(run(nullptr) == primary);  // kernels outlive a context
}

TEST_F(GpuServing, SeedsOfDropoutInDeviceMemory) {
  LineRun problem("attention b=2 hq=2 sq=40 sk=70 d=32 bf16 dropout p=0.3 lse device=cuda");
  ASSERT_EQ(problem.error(), "");
  heed_attention_args& args = *problem.attention();
  for (const std::string& row : problem.accepting()) {
    SCOPED_TRACE(row);
    ASSERT_EQ(problem.run(row, RunStyle()), "");
    const std::vector<unsigned char> outputs = problem.outputs();
    DeviceMemory memory(16, 0);
    memory.write(0, &args.dropout_seed, 8);
    memory.write(8, &args.dropout_offset, 8);
    const uint64_t seed = std::exchange(args.dropout_seed, 1), offset = std::exchange(args.dropout_offset, 2);
    args.dropout_seed_ptr = static_cast<const uint64_t*>(memory.data());
    args.dropout_offset_ptr = args.dropout_seed_ptr + 1;
    EXPECT_EQ(problem.run(row, RunStyle()), "");
    EXPECT_TRUE(problem.outputs() == outputs);
    EXPECT_EQ(problem.judge(), "");
    args.dropout_seed = seed;
    args.dropout_offset = offset;
    args.dropout_seed_ptr = args.dropout_offset_ptr = nullptr;
  }
}

}  // namespace
}  // namespace heed
