// Memory: the calls of heed/device.h on a GPU, tensors of more than 2^31 elements, a million keys, and that a run needs
// its workspace and nothing beside it.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/dtype.h"
#include "cuda/device.h"
#include "gpu/gpu.h"
#include "unit/small_attention.h"

namespace heed {
namespace {

using testing::DeviceMemory;
using testing::GpuTest;
using testing::LineRun;
using testing::RunStyle;

constexpr size_t kMiB = size_t{1} << 20;

size_t free_memory() {
  const cuda::ContextScope scope(0);
  size_t free_bytes = 0, total = 0;
  if (testing::test_calls().mem_get_info == nullptr) {
    ADD_FAILURE() << "the driver lacks cuMemGetInfo_v2";
    return 0;
  }
  EXPECT_EQ(testing::test_calls().mem_get_info(&free_bytes, &total), cuda::kCudaSuccess);
  return free_bytes;
}

class GpuMemory : public GpuTest {};

TEST_F(GpuMemory, CopiesAndFills) {
  size_t needed = 0;
  char name[256] = {};
  ASSERT_EQ(heed_device_name(HEED_DEVICE_CUDA, 0, name, sizeof name, &needed), HEED_OK) << heed_last_error();
  EXPECT_EQ(needed, std::strlen(name) + 1);
  DeviceMemory a(1000, 0x11), b(1000, 0x22);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(a.data()) % 128, 0u);
  EXPECT_EQ(a.read(0, 1000), std::vector<unsigned char>(1000, 0x11));
  const unsigned char bytes[3] = {1, 2, 3};
  a.write(997, bytes, 3);
  ASSERT_EQ(heed_memory_copy(b.data(), HEED_DEVICE_CUDA, a.data(), HEED_DEVICE_CUDA, 0, 1000), HEED_OK);
  EXPECT_EQ(b.read(996, 4), (std::vector<unsigned char>{0x11, 1, 2, 3}));
  void* nothing = &needed;
  EXPECT_EQ(heed_memory_allocate(HEED_DEVICE_CUDA, 0, 0, &nothing), HEED_OK);
  EXPECT_EQ(nothing, nullptr);
  EXPECT_EQ(heed_memory_free(HEED_DEVICE_CUDA, 0, nullptr), HEED_OK);
  void* const before = &needed;
  void* far_too_much = before;
  EXPECT_EQ(heed_memory_allocate(HEED_DEVICE_CUDA, 0, size_t{1} << 50, &far_too_much), HEED_OUT_OF_MEMORY);
  EXPECT_NE(std::string(heed_last_error()).find("cuMemAlloc(1125899906842624 bytes, device 0)"), std::string::npos)
      << heed_last_error();
  EXPECT_EQ(far_too_much, before);
  EXPECT_EQ(heed_device_name(HEED_DEVICE_CUDA, 500, name, sizeof name, &needed), HEED_INVALID_ARGUMENT);
  EXPECT_EQ(heed_memory_copy(a.data(), HEED_DEVICE_CUDA, nullptr, HEED_DEVICE_CPU, 0, 4), HEED_INVALID_ARGUMENT);
}

TEST_F(GpuMemory, ForcedBackends) {
  LineRun problem("attention b=1 hq=1 sq=8 d=16 device=cuda");
  ASSERT_EQ(problem.error(), "");
  const auto status_of = [&](const char* backend) {
    const heed_plan_options options = {sizeof options, backend};
    return heed_attention(problem.attention(), &options);
  };
  EXPECT_EQ(status_of("cuda/attention_fwd_sm10"), HEED_NOT_FOUND);
  EXPECT_EQ(status_of("cpu"), HEED_NOT_SUPPORTED);
  EXPECT_EQ(status_of("ref"), HEED_NOT_SUPPORTED);
  EXPECT_EQ(status_of("cuda"), HEED_OK) << heed_last_error();
  const heed_plan_options cuda = {sizeof cuda, "cuda"};
  LineRun host("attention b=1 hq=1 sq=8 d=16");
  EXPECT_EQ(heed_attention(host.attention(), &cuda), HEED_NOT_SUPPORTED);
}

// 16-bit patterns.
constexpr uint16_t kOneBf16 = 0x3f80, kTwoBf16 = 0x4000, kEightBf16 = 0x4100;

struct Large {
  int64_t hq, hkv, sq, sk, d;
};

heed_attention_args args_of(const Large& size, const DeviceMemory& q, const DeviceMemory& k, const DeviceMemory& v,
                            const DeviceMemory& out) {
  heed_attention_args args;
  heed_attention_args_init(&args);
  args.device = HEED_DEVICE_CUDA;
  args.device_index = 0;
  args.q = tensor_of(q.data(), HEED_DTYPE_BF16, {1, size.sq, size.hq, size.d});
  args.k = tensor_of(k.data(), HEED_DTYPE_BF16, {1, size.sk, size.hkv, size.d});
  args.v = tensor_of(v.data(), HEED_DTYPE_BF16, {1, size.sk, size.hkv, size.d});
  args.out = tensor_of(out.data(), HEED_DTYPE_BF16, {1, size.sq, size.hq, size.d});
  return args;
}

void fill_with(DeviceMemory& memory, size_t element, size_t count, uint16_t value) {
  const std::vector<uint16_t> values(count, value);
  memory.write(2 * element, values.data(), 2 * count);
}

void expect_elements(const DeviceMemory& memory, size_t element, size_t count, float want) {
  const std::vector<unsigned char> bytes = memory.read(2 * element, 2 * count);
  for (size_t n = 0; n < count; ++n) {
    const double got = load_as_double(bytes.data(), Dtype::kBf16, static_cast<int64_t>(n));
    ASSERT_NEAR(got, want, 0.02 * want) << "element " << element + n;
  }
}

std::vector<std::string> accepting_rows(const heed_attention_args& args) {
  std::vector<std::string> rows;
  heed_problem* problem = nullptr;
  EXPECT_EQ(heed_attention_problem(&args, &problem), HEED_OK) << heed_last_error();
  for (int32_t i = 0; problem != nullptr && i < heed_verdict_count(problem); ++i) {
    heed_verdict verdict = {};
    verdict.struct_size = sizeof verdict;
    EXPECT_EQ(heed_verdict_get(problem, nullptr, i, &verdict), HEED_OK) << heed_last_error();
    if (verdict.accepted != 0) rows.emplace_back(verdict.impl);
  }
  heed_problem_destroy(problem);
  return rows;
}

void run_row(const heed_attention_args& args, const std::string& row) {
  const heed_plan_options options = {sizeof options, row.c_str()};
  ASSERT_EQ(heed_attention(&args, &options), HEED_OK) << row << ": " << heed_last_error();
  ASSERT_EQ(heed_stream_synchronize(HEED_DEVICE_CUDA, 0, nullptr), HEED_OK) << row << ": " << heed_last_error();
}

// The last key, past element 2^31 of k and v, is the only one whose score is not 0, and takes all the weight.
TEST_F(GpuMemory, MoreThan2To31ElementsOfKeys) {
  const Large size = {8, 8, 1, (int64_t{1} << 21) + 1000, 128};
  const auto elements = static_cast<size_t>(size.sk * size.hkv * size.d);
  ASSERT_GT(elements, size_t{1} << 31);
  if (free_memory() < 4 * elements + 4096 * kMiB) GTEST_SKIP() << "needs " << 4 * elements / kMiB << " MiB";
  DeviceMemory q(2 * 8 * 128, 0), k(2 * elements, 0), v(2 * elements, 0), out(2 * 8 * 128, 0xff);
  fill_with(q, 0, 8 * 128, kEightBf16);
  fill_with(k, elements - 8 * 128, 8 * 128, kOneBf16);  // a score of 8 * 128 / sqrt(128): 90
  fill_with(v, elements - 8 * 128, 8 * 128, kTwoBf16);
  const heed_attention_args args = args_of(size, q, k, v, out);
  const std::vector<std::string> rows = accepting_rows(args);
  EXPECT_GE(rows.size(), 2u);
  for (const std::string& row : rows) {
    SCOPED_TRACE(row);
    run_row(args, row);
    expect_elements(out, 0, 8 * 128, 2.0f);
    ASSERT_EQ(heed_memory_fill(HEED_DEVICE_CUDA, 0, out.data(), 0xff, out.bytes()), HEED_OK);
  }
}

TEST_F(GpuMemory, MoreThan2To31ElementsOfQueries) {
  const Large size = {8, 1, (int64_t{1} << 21) + 1000, 16, 128};
  const auto elements = static_cast<size_t>(size.sq * size.hq * size.d);
  ASSERT_GT(elements, size_t{1} << 31);
  if (free_memory() < 4 * elements + 4096 * kMiB) GTEST_SKIP() << "needs " << 4 * elements / kMiB << " MiB";
  DeviceMemory q(2 * elements, 0), k(2 * 16 * 128, 0), v(2 * 16 * 128, 0), out(2 * elements, 0xff);
  fill_with(k, 5 * 128, 128, kEightBf16);  // the one key that the last query looks for
  fill_with(v, 5 * 128, 128, kTwoBf16);
  fill_with(q, elements - 128, 128, kOneBf16);
  const heed_attention_args args = args_of(size, q, k, v, out);
  for (const std::string& row : accepting_rows(args)) {
    SCOPED_TRACE(row);
    run_row(args, row);
    expect_elements(out, elements - 128, 128, 2.0f);
    expect_elements(out, elements - 256, 128, 0.125f);  // the mean of v
    expect_elements(out, 0, 256, 0.125f);
    expect_elements(out, (size_t{1} << 31) - 256, 512, 0.125f);
    ASSERT_EQ(heed_memory_fill(HEED_DEVICE_CUDA, 0, out.data(), 0xff, out.bytes()), HEED_OK);
  }
}

size_t workspace_of(const std::string& line) {
  heed_problem* problem = nullptr;
  EXPECT_EQ(heed_problem_parse(line.c_str(), &problem), HEED_OK) << heed_last_error();
  heed_plan* plan = nullptr;
  EXPECT_EQ(heed_plan_create(problem, nullptr, &plan), HEED_OK) << heed_last_error();
  const size_t bytes = heed_plan_workspace_bytes(plan);
  heed_plan_destroy(plan);
  heed_problem_destroy(problem);
  return bytes;
}

TEST_F(GpuMemory, WorkspaceDoesNotGrowWithTheKeys) {
  for (const char* rest :
       {" sq=1 d=128 bf16 hq=8 hkv=2 device=cuda", " sq=512 d=64 f16 hq=4 causal lse device=cuda",
        " sq=64 d=64 hq=4 device=cuda", " sq=4 d=128 bf16 hq=8 hkv=2 causal batch_invariant device=cuda"}) {
    SCOPED_TRACE(rest);
    const size_t some = workspace_of("attention sk=65536" + std::string(rest));
    const size_t many = workspace_of("attention sk=1048576" + std::string(rest));
    EXPECT_LE(many, std::max(2 * some, 64 * kMiB)) << some << " bytes with 65,536 keys, " << many << " with 1,048,576";
  }
}

// A run with a workspace leaves the device's free memory where it was.
TEST_F(GpuMemory, ARunOfAMillionKeysNeedsItsWorkspaceAlone) {
  for (const int64_t queries : {1, 256}) {
    const Large size = {8, 2, queries, int64_t{1} << 20, 128};
    const auto keys = static_cast<size_t>(size.sk * size.hkv * size.d);
    const auto rows = static_cast<size_t>(size.sq * size.hq * size.d);
    DeviceMemory q(2 * rows, 0), k(2 * keys, 0), v(2 * keys, 0), out(2 * rows, 0xff);
    fill_with(v, 0, size_t{1} << 20, kOneBf16);  // of 2^28
    const heed_attention_args once = args_of(size, q, k, v, out);
    for (const std::string& row : accepting_rows(once)) {
      SCOPED_TRACE(row);
      heed_problem* problem = nullptr;
      ASSERT_EQ(heed_attention_problem(&once, &problem), HEED_OK) << heed_last_error();
      const heed_plan_options options = {sizeof options, row.c_str()};
      heed_plan* plan = nullptr;
      ASSERT_EQ(heed_plan_create(problem, &options, &plan), HEED_OK) << heed_last_error();
      heed_problem_destroy(problem);
      const size_t bytes = heed_plan_workspace_bytes(plan);
      DeviceMemory workspace(std::max<size_t>(bytes, 256), 0xff);
      heed_attention_args args = once;
      args.workspace = workspace.data();
      args.workspace_bytes = bytes;
      ASSERT_EQ(heed_attention_run(plan, &args), HEED_OK) << heed_last_error();  // the kernel's own memory, once
      ASSERT_EQ(heed_stream_synchronize(HEED_DEVICE_CUDA, 0, nullptr), HEED_OK) << heed_last_error();
      const size_t before = free_memory();
      size_t least = before;
      for (int run = 0; run < 5; ++run) {
        ASSERT_EQ(heed_attention_run(plan, &args), HEED_OK) << heed_last_error();
        least = std::min(least, free_memory());
      }
      ASSERT_EQ(heed_stream_synchronize(HEED_DEVICE_CUDA, 0, nullptr), HEED_OK) << heed_last_error();
      EXPECT_EQ(least, before) << "of " << bytes << " bytes of workspace";
      expect_elements(out, 0, 128, 1.0f / 256);
      heed_plan_destroy(plan);
    }
  }
}

}  // namespace
}  // namespace heed
