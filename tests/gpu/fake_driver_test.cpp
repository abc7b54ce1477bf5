// What heed does around its kernels on a GPU, without one: memory, inputs and their guards, the judge, validate,
// capture, errors of the driver. The driver is tests/gpu/fake_driver.cpp: the host cannot touch its device memory.
#include "gpu/fake_driver.h"

#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <fstream>

#include "capi_run.h"
#include "check/arg_tensors.h"
#include "check/inputs.h"
#include "cuda/jit.h"
#include "cuda/variants.h"
#include "unit/line_run.h"
#include "unit/small_attention.h"

namespace heed {
namespace {

using testing::LineRun;
using testing::Poke;
using testing::RunStyle;

void* const kStream = reinterpret_cast<void*>(0x1000);

bool said(const std::string& words) { return std::string(heed_last_error()).find(words) != std::string::npos; }

class FakeDriver : public ::testing::Test {
 protected:
  void TearDown() override { EXPECT_EQ(fake_cuda_live_allocations(), 0) << "device memory was not freed"; }
};

struct Memory {
  explicit Memory(size_t bytes) {
    EXPECT_EQ(heed_memory_allocate(HEED_DEVICE_CUDA, 0, bytes, &data), HEED_OK) << heed_last_error();
  }
  ~Memory() { EXPECT_EQ(heed_memory_free(HEED_DEVICE_CUDA, 0, data), HEED_OK) << heed_last_error(); }
  Memory(const Memory&) = delete;
  void* data = nullptr;
};

heed_status copy_in(void* to, const void* from, size_t bytes) {
  return heed_memory_copy(to, HEED_DEVICE_CUDA, from, HEED_DEVICE_CPU, 0, bytes);
}
heed_status copy_out(void* to, const void* from, size_t bytes) {
  return heed_memory_copy(to, HEED_DEVICE_CPU, from, HEED_DEVICE_CUDA, 0, bytes);
}

// ---- heed/device.h --------------------------------------------------------------------------------------------------

TEST_F(FakeDriver, DevicesHaveNames) {
  int32_t count = 0;
  ASSERT_EQ(heed_device_count(HEED_DEVICE_CUDA, &count), HEED_OK);
  EXPECT_EQ(count, 2);
  ASSERT_EQ(heed_device_count(HEED_DEVICE_CPU, &count), HEED_OK);
  EXPECT_EQ(count, 1);
  char name[64];
  size_t needed = 0;
  ASSERT_EQ(heed_device_name(HEED_DEVICE_CUDA, 1, name, sizeof name, &needed), HEED_OK);
  EXPECT_STREQ(name, "Fake GPU 1");
  EXPECT_EQ(needed, 11u);
  ASSERT_EQ(heed_device_name(HEED_DEVICE_CUDA, -1, name, sizeof name, nullptr), HEED_OK);
  EXPECT_STREQ(name, "Fake GPU 0");
  ASSERT_EQ(heed_device_name(HEED_DEVICE_CPU, 0, name, sizeof name, nullptr), HEED_OK);
  EXPECT_GT(std::strlen(name), 0u);
}

TEST_F(FakeDriver, CopiesInEveryDirection) {
  const char text[] = "seven and twenty bytes here";
  const Memory a(64), b(64);
  char back[64] = {}, host[64] = {};
  ASSERT_EQ(copy_in(a.data, text, sizeof text), HEED_OK);
  ASSERT_EQ(heed_memory_copy(b.data, HEED_DEVICE_CUDA, a.data, HEED_DEVICE_CUDA, 0, sizeof text), HEED_OK);
  ASSERT_EQ(heed_memory_fill(HEED_DEVICE_CUDA, 0, b.data, 'x', 5), HEED_OK);
  ASSERT_EQ(copy_out(back, b.data, sizeof text), HEED_OK);
  EXPECT_STREQ(back, "xxxxx and twenty bytes here");
  ASSERT_EQ(heed_memory_copy(host, HEED_DEVICE_CPU, back, HEED_DEVICE_CPU, -1, sizeof text), HEED_OK);
  EXPECT_STREQ(host, back);
  ASSERT_EQ(heed_stream_synchronize(HEED_DEVICE_CUDA, 0, kStream), HEED_OK);
  for (const heed_device device : {HEED_DEVICE_CPU, HEED_DEVICE_CUDA}) {
    void* pointer = host;
    ASSERT_EQ(heed_memory_allocate(device, 0, 0, &pointer), HEED_OK);
    EXPECT_EQ(pointer, nullptr);
    ASSERT_EQ(heed_memory_free(device, 0, nullptr), HEED_OK);
    ASSERT_EQ(heed_memory_fill(device, 0, nullptr, 0, 0), HEED_OK);
    ASSERT_EQ(heed_memory_copy(nullptr, device, nullptr, device, 0, 0), HEED_OK);
    ASSERT_EQ(heed_memory_allocate(device, 0, 100, &pointer), HEED_OK);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(pointer) % 128, 0u);
    ASSERT_EQ(heed_memory_fill(device, 0, pointer, 255, 100), HEED_OK);
    ASSERT_EQ(heed_memory_free(device, 0, pointer), HEED_OK);
  }
}

TEST_F(FakeDriver, WrongArgumentsAreNamed) {
  char byte = 0;
  void* pointer = &byte;
  const auto expect = [](heed_status got, const char* words) {
    EXPECT_EQ(got, HEED_INVALID_ARGUMENT);
    EXPECT_TRUE(said(words)) << heed_last_error();
  };
  expect(heed_device_count(2, nullptr), "device = 2: must be 0 (cpu) or 1 (cuda)");
  expect(heed_device_count(HEED_DEVICE_CUDA, nullptr), "count = NULL");
  expect(heed_device_name(HEED_DEVICE_CUDA, 2, &byte, 1, nullptr), "must be from 0 to 1, the GPUs of this machine");
  expect(heed_memory_allocate(HEED_DEVICE_CPU, 1, 4, &pointer), "index = 1: must be 0 or -1 with device 0 (cpu)");
  expect(heed_memory_allocate(HEED_DEVICE_CUDA, -2, 4, &pointer), "index = -2: must be -1 (the current one)");
  expect(heed_memory_allocate(HEED_DEVICE_CUDA, 0, 4, nullptr), "pointer = NULL");
  expect(heed_memory_copy(nullptr, HEED_DEVICE_CUDA, &byte, HEED_DEVICE_CPU, 0, 1), "to = NULL");
  expect(heed_memory_copy(&byte, HEED_DEVICE_CPU, nullptr, HEED_DEVICE_CUDA, 0, 1), "from = NULL");
  expect(heed_memory_copy(&byte, 3, &byte, HEED_DEVICE_CPU, 0, 1), "to_device = 3");
  expect(heed_memory_copy(&byte, HEED_DEVICE_CPU, &byte, -1, 0, 1), "from_device = -1");
  expect(heed_memory_copy(&byte, HEED_DEVICE_CPU, &byte, HEED_DEVICE_CPU, 1, 1), "index = 1");
  expect(heed_memory_fill(HEED_DEVICE_CUDA, 0, &byte, 256, 1), "value = 256: must be from 0 to 255");
  expect(heed_memory_fill(HEED_DEVICE_CUDA, 0, nullptr, 0, 1), "pointer = NULL");
  expect(heed_stream_synchronize(HEED_DEVICE_CPU, 0, kStream), "stream = 0x1000: must be NULL with device 0 (cpu)");
  EXPECT_EQ(heed_memory_allocate(HEED_DEVICE_CPU, 0, SIZE_MAX, &pointer), HEED_OUT_OF_MEMORY);
  EXPECT_EQ(pointer, &byte);
}

TEST_F(FakeDriver, ErrorsOfTheDriverNameTheCallAndItsArguments) {
  Memory memory(64);
  char bytes[64];
  void* pointer = bytes;
  const auto expect = [](heed_status got, heed_status want, const char* words) {
    EXPECT_EQ(got, want);
    EXPECT_TRUE(said(words)) << heed_last_error();
  };
  EXPECT_EQ(heed_memory_allocate(HEED_DEVICE_CUDA, 0, size_t{1} << 50, &pointer), HEED_OUT_OF_MEMORY);
  EXPECT_TRUE(said("cuMemAlloc(1125899906842624 bytes, device 0): CUDA_ERROR_OUT_OF_MEMORY")) << heed_last_error();
  EXPECT_EQ(pointer, bytes);
  expect(copy_out(bytes, memory.data, 65), HEED_OPERATION_FAILED, "65 bytes, device 0): CUDA_ERROR_INVALID_VALUE");
  expect(copy_in(bytes, bytes, 4), HEED_OPERATION_FAILED, "cuMemcpyHtoDAsync(to 0x");
  expect(heed_memory_free(HEED_DEVICE_CUDA, 0, bytes), HEED_OPERATION_FAILED, "cuMemFree(0x");
  fake_cuda_fail("cuMemsetD8Async", 801, 1);
  expect(heed_memory_fill(HEED_DEVICE_CUDA, 1, memory.data, 7, 3), HEED_OPERATION_FAILED,
         ", 7, 3 bytes, device 1): CUDA_ERROR_NOT_SUPPORTED (as the test asked)");
  fake_cuda_fail("cuStreamSynchronize", 700, 1);
  expect(heed_stream_synchronize(HEED_DEVICE_CUDA, 0, kStream), HEED_OPERATION_FAILED, "cuStreamSynchronize(0x1000");
}

// ---- inputs ---------------------------------------------------------------------------------------------------------

std::vector<std::string> lines_of(const char* file) {
  std::vector<std::string> lines;
  std::ifstream stream(std::string(HEED_SOURCE_DIR "/tests/problems/") + file + ".txt");
  for (std::string line; std::getline(stream, line);) {
    if (line.empty() || line[0] == '#' || line.find("threads=") != std::string::npos) continue;
    lines.push_back(line);
  }
  EXPECT_GT(lines.size(), 10u);
  return lines;
}

// Tensor by tensor: the same bits as for the CPU, at the same address modulo the alignment that the line states.
template <class Args>
void expect_same_bits(const LineRun& device, Args placed, Args host, const std::string& line) {
  std::vector<std::pair<std::string, heed_tensor>> ours, theirs;
  check::for_each_tensor(placed, [&](const char* name, heed_tensor& tensor) { ours.emplace_back(name, tensor); });
  check::for_each_tensor(host, [&](const char* name, heed_tensor& tensor) { theirs.emplace_back(name, tensor); });
  for (size_t n = 0; n < ours.size(); ++n) {
    const heed_tensor &a = ours[n].second, &b = theirs[n].second;
    ASSERT_EQ(a.dtype, b.dtype) << line << ": " << ours[n].first;
    if (a.dtype == HEED_DTYPE_NONE) continue;
    EXPECT_NE(a.data, b.data);
    EXPECT_EQ((reinterpret_cast<uintptr_t>(a.data) - reinterpret_cast<uintptr_t>(b.data)) % 128, 0u) << line;
    std::vector<unsigned char> memory;
    const heed_tensor copied = device.on_host(a, memory);
    EXPECT_EQ(std::memcmp(copied.data, b.data, testing::span_bytes(b)), 0) << line << ": " << ours[n].first;
  }
}

TEST_F(FakeDriver, InputsAreTheCpusBits) {
  for (const char* file : {"smoke", "paged", "varlen", "kv_append", "gqa"}) {
    for (const std::string& line : lines_of(file)) {
      LineRun device(line + " device=cuda"), host(line);
      ASSERT_EQ(device.error(), "") << line;
      ASSERT_EQ(host.error(), "") << line;
      if (device.attention() != nullptr) {
        EXPECT_EQ(device.attention()->device, HEED_DEVICE_CUDA);
        expect_same_bits(device, *device.attention(), *host.attention(), line);
      } else {
        expect_same_bits(device, *device.kv_append(), *host.kv_append(), line);
      }
    }
  }
}

TEST_F(FakeDriver, GuardsSeeWhatIsWrittenOnTheDevice) {
  heed_inputs* inputs = nullptr;
  ASSERT_EQ(heed_inputs_create("attention b=2 hq=2 sq=20 d=16 strides.out=1000,20,50 device=cuda:1", &inputs), HEED_OK)
      << heed_last_error();
  const std::unique_ptr<heed_inputs, testing::InputsDeleter> owner(inputs);
  heed_attention_args& args = *heed_inputs_attention(inputs);
  EXPECT_EQ(args.device_index, 1);
  const auto write = [](const heed_tensor& tensor, int64_t byte) {
    unsigned char* const at = static_cast<unsigned char*>(tensor.data) + byte;
    ASSERT_EQ(heed_memory_fill(HEED_DEVICE_CUDA, 1, at, 1, 1), HEED_OK) << heed_last_error();
  };
  ASSERT_EQ(heed_inputs_poison(inputs), HEED_OK);
  write(args.out, 0);
  EXPECT_EQ(heed_inputs_check_guards(inputs), HEED_OK) << heed_last_error();
  write(args.out, -1);
  EXPECT_EQ(heed_inputs_check_guards(inputs), HEED_INVALID_ARGUMENT);
  EXPECT_TRUE(said("out: byte -1 from its first element, which is before the tensor")) << heed_last_error();
  ASSERT_EQ(heed_inputs_poison(inputs), HEED_OK);
  EXPECT_EQ(heed_inputs_check_guards(inputs), HEED_OK) << "poison does not repair the guards";
  write(args.out, 4 * 18);
  EXPECT_EQ(heed_inputs_check_guards(inputs), HEED_INVALID_ARGUMENT);
  EXPECT_TRUE(said("in a gap between its elements")) << heed_last_error();
  ASSERT_EQ(heed_inputs_poison(inputs), HEED_OK);
  write(args.k, 9);
  EXPECT_EQ(heed_inputs_check_guards(inputs), HEED_INVALID_ARGUMENT);
  EXPECT_TRUE(said("k: an input, or memory beside it, changed")) << heed_last_error();
  ASSERT_EQ(heed_inputs_poison(inputs), HEED_OK);  // from now on that is the input
  EXPECT_EQ(heed_inputs_check_guards(inputs), HEED_OK) << heed_last_error();
}

TEST_F(FakeDriver, PoisonRestoresACacheOnTheDevice) {
  LineRun problem("kv_append b=2 hkv=2 sn=3 sk=20 d=16 lk=4,9 device=cuda");
  ASSERT_EQ(problem.error(), "");
  const heed_kv_append_args& args = *problem.kv_append();
  const std::vector<unsigned char> before = problem.outputs();
  ASSERT_EQ(heed_memory_fill(HEED_DEVICE_CUDA, 0, args.k_cache.data, 9, 100), HEED_OK);
  EXPECT_FALSE(problem.outputs() == before);
  ASSERT_EQ(problem.poison(), "");
  EXPECT_TRUE(problem.outputs() == before);
}

// ---- the judge ------------------------------------------------------------------------------------------------------

// The reference's results, put where a kernel would write them, are judged right; with one byte changed, wrong.
template <class Args>
void copy_outputs(const Args& from, const Args& to, std::initializer_list<heed_tensor Args::*> outputs) {
  for (const auto output : outputs) {
    const size_t bytes = testing::span_bytes(from.*output);
    ASSERT_EQ(bytes == 0 ? HEED_OK : copy_in((to.*output).data, (from.*output).data, bytes), HEED_OK)
        << heed_last_error();
  }
}

void expect_judged(const std::string& line) {
  SCOPED_TRACE(line);
  LineRun host(line), device(line + " device=cuda");
  ASSERT_EQ(host.error(), "");
  ASSERT_EQ(device.error(), "");
  const bool attention = host.attention() != nullptr;
  ASSERT_EQ(host.run(attention ? "ref/attention" : "ref/kv_append", RunStyle()), "");
  EXPECT_NE(device.judge(), "") << "nothing has been computed yet";
  heed_tensor spoilt = {};
  if (attention) {
    using A = heed_attention_args;
    copy_outputs(*host.attention(), *device.attention(),
                 {&A::out, &A::lse, &A::dq, &A::dk, &A::dv, &A::dbias, &A::dsinks, &A::dalibi_slopes, &A::status});
    spoilt = device.attention()->status;
  } else {
    using A = heed_kv_append_args;
    copy_outputs(*host.kv_append(), *device.kv_append(), {&A::k_cache, &A::v_cache, &A::q_out, &A::status});
    spoilt = device.kv_append()->status;
  }
  EXPECT_EQ(device.judge(), "");
  EXPECT_TRUE(device.outputs() == host.outputs());
  ASSERT_EQ(heed_memory_fill(HEED_DEVICE_CUDA, 0, spoilt.data, 8, 1), HEED_OK);
  EXPECT_NE(device.judge(), "");
}

TEST_F(FakeDriver, TheJudgeReadsDeviceMemory) {
  for (const std::string& line : lines_of("smoke")) {
    if (line.find("pass=bwd") == std::string::npos) expect_judged(line);
  }
  for (const std::string& line : lines_of("kv_append")) {
    if (line.find("b=0") == std::string::npos) expect_judged(line);
  }
}

TEST_F(FakeDriver, TheJudgeReadsSeedsInDeviceMemory) {
  const std::string line = "attention b=2 hq=2 sq=20 d=16 dropout p=0.3 seed=5";
  LineRun host(line), device(line + " device=cuda");
  ASSERT_EQ(host.run("ref/attention", RunStyle()), "");
  heed_attention_args& args = *device.attention();
  const Memory seeds(16);
  ASSERT_EQ(copy_in(seeds.data, &args.dropout_seed, 8), HEED_OK);
  ASSERT_EQ(copy_in(static_cast<char*>(seeds.data) + 8, &args.dropout_offset, 8), HEED_OK);
  args.dropout_seed = args.dropout_offset = 3;
  copy_outputs(*host.attention(), args, {&heed_attention_args::out, &heed_attention_args::status});
  EXPECT_NE(device.judge(), "");
  args.dropout_seed_ptr = static_cast<const uint64_t*>(seeds.data);
  args.dropout_offset_ptr = args.dropout_seed_ptr + 1;
  EXPECT_EQ(device.judge(), "");
}

TEST_F(FakeDriver, AnUnreadableTensorIsNamed) {
  LineRun device("attention b=2 hq=2 sq=20 d=16 device=cuda");
  heed_attention_args& args = *device.attention();
  char host[64];
  void* const data = std::exchange(args.k.data, reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(host) & ~63ull));
  heed_check_report report = {};
  report.struct_size = sizeof report;
  EXPECT_EQ(heed_attention_check(&args, &report), HEED_OPERATION_FAILED);
  EXPECT_TRUE(said("k: cuMemcpyDtoHAsync(")) << heed_last_error();
  args.k.data = data;
}

// ---- validate and capture -------------------------------------------------------------------------------------------

TEST_F(FakeDriver, ValidateReadsDeviceMemory) {
  LineRun problem("attention b=3 hq=4 hkv=2 sq=2 sk=64 d=16 page=16 used_k lk=64,40,11 pages=shuffled device=cuda");
  ASSERT_EQ(problem.error(), "");
  heed_attention_args& args = *problem.attention();
  args.stream = kStream;
  EXPECT_EQ(heed_attention_validate(&args), HEED_OK) << heed_last_error();
  const int32_t bad = 65, good = 40;
  int32_t* const length = static_cast<int32_t*>(args.seqused_k.data) + 1;
  ASSERT_EQ(copy_in(length, &bad, 4), HEED_OK);
  EXPECT_EQ(heed_attention_validate(&args), HEED_INVALID_ARGUMENT);
  EXPECT_TRUE(said("seqused_k[1] = 65: must be from 0 to 64")) << heed_last_error();
  ASSERT_EQ(copy_in(length, &good, 4), HEED_OK);
  fake_cuda_capture(kStream, 1);
  EXPECT_EQ(heed_attention_validate(&args), HEED_OPERATION_FAILED);
  EXPECT_TRUE(said("stream = 0x1000: is being captured into a graph, and heed_attention_validate waits"))
      << heed_last_error();
  heed_check_report report = {};
  report.struct_size = sizeof report;
  EXPECT_EQ(heed_attention_check(&args, &report), HEED_OPERATION_FAILED);
  fake_cuda_capture(kStream, 0);
  EXPECT_EQ(heed_attention_validate(&args), HEED_OK) << heed_last_error();

  LineRun append("kv_append b=2 hkv=2 sn=3 sk=20 d=16 lk=4,9 device=cuda");
  EXPECT_EQ(heed_kv_append_validate(append.kv_append()), HEED_OK) << heed_last_error();
  const int32_t full = 18;
  ASSERT_EQ(copy_in(append.kv_append()->cache_seqlens.data, &full, 4), HEED_OK);
  EXPECT_EQ(heed_kv_append_validate(append.kv_append()), HEED_INVALID_ARGUMENT);
  EXPECT_TRUE(said("cache_seqlens[0] = 18: must leave room for 3 new keys")) << heed_last_error();
}

TEST_F(FakeDriver, ACaptureNeitherCompilesNorLoads) {
  LineRun problem("attention b=1 hq=2 sq=20 d=64 bf16 device=cuda");
  ASSERT_EQ(problem.error(), "");
  heed_attention_args& args = *problem.attention();
  args.stream = kStream;
  fake_cuda_capture(kStream, 1);
  const int64_t loads = fake_cuda_calls("cuLibraryLoadData");
  EXPECT_EQ(heed_attention(&args, nullptr), HEED_OPERATION_FAILED);
  EXPECT_TRUE(said("stream = 0x1000: is being captured into a graph")) << heed_last_error();
  EXPECT_TRUE(said("make the same call once, or heed_plan_create for its problem, before the capture"))
      << heed_last_error();
  EXPECT_EQ(fake_cuda_calls("cuLibraryLoadData"), loads);
  fake_cuda_capture(kStream, 0);
  // Not captured, it goes on to the compiler or, where there is one, to the driver, which loads nothing.
  EXPECT_NE(heed_attention(&args, nullptr), HEED_OK);
  EXPECT_FALSE(said("captured")) << heed_last_error();
}

TEST_F(FakeDriver, WorkspaceComesAndGoesInTheStreamsOrder) {
  const int64_t synchronized = fake_cuda_calls("cuStreamSynchronize");
  {
    Workspace workspace;
    ASSERT_TRUE(workspace.allocate(1000, Device::kCuda, 0, nullptr, kStream).ok());
    EXPECT_EQ(fake_cuda_last_stream(), kStream);
    EXPECT_EQ(workspace.bytes(), 1024u);
    EXPECT_EQ(fake_cuda_live_allocations(), 1);
  }
  EXPECT_EQ(fake_cuda_live_allocations(), 0);
  EXPECT_EQ(fake_cuda_calls("cuStreamSynchronize"), synchronized) << "the host waited";
  fake_cuda_fail("cuMemAllocAsync", 2, 1);
  Workspace none;
  const Status status = none.allocate(1000, Device::kCuda, 0, nullptr, kStream);
  EXPECT_EQ(status.code(), StatusCode::kOutOfMemory);
  EXPECT_NE(status.message().find("workspace: cuMemAllocAsync(1024 bytes, stream 0x1000, device 0)"), std::string::npos)
      << status.message();
}

TEST_F(FakeDriver, NoMemoryForTheInputsIsAnError) {
  for (const char* function : {"cuMemAlloc_v2", "cuMemcpyHtoDAsync_v2"}) {
    fake_cuda_fail(function, 2, 1);
    heed_inputs* inputs = nullptr;
    EXPECT_EQ(heed_inputs_create("attention sq=20 d=16 device=cuda", &inputs), HEED_OUT_OF_MEMORY);
    EXPECT_EQ(inputs, nullptr);
    EXPECT_EQ(fake_cuda_live_allocations(), 0);
  }
}

}  // namespace
}  // namespace heed
