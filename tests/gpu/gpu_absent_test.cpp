// A machine without a GPU: device=cuda is an error that names what is missing, and nothing is written.
#include <cstring>

#include "gpu/gpu.h"
#include "unit/small_attention.h"

namespace heed {
namespace {

class GpuAbsent : public ::testing::Test {
 protected:
  void SetUp() override {
    if (testing::no_gpu().empty()) GTEST_SKIP() << "there is a GPU";
  }

  // The code, and a sentence that says what is missing: the driver's library or the GPU.
  static void expect_missing(heed_status got, heed_status want) {
    EXPECT_EQ(got, want) << heed_last_error();
    const std::string text = heed_last_error();
    EXPECT_TRUE(text.find("libcuda.so.1") != std::string::npos || text.find("cuInit") != std::string::npos ||
                text.find("finds no GPU") != std::string::npos)
        << text;
  }
};

TEST_F(GpuAbsent, PlansAndCalls) {
  heed_problem* problem = nullptr;
  ASSERT_EQ(heed_problem_parse("attention b=1 hq=2 sq=8 d=16 bf16 device=cuda", &problem), HEED_OK);
  heed_plan* plan = nullptr;
  expect_missing(heed_plan_create(problem, nullptr, &plan), HEED_NOT_SUPPORTED);
  EXPECT_EQ(plan, nullptr);
  const heed_plan_options cuda = {sizeof cuda, "cuda"};
  expect_missing(heed_plan_create(problem, &cuda, &plan), HEED_NOT_SUPPORTED);
  EXPECT_EQ(plan, nullptr);
  int with_reason = 0;
  for (int32_t i = 0; i < heed_verdict_count(problem); ++i) {
    heed_verdict verdict = {};
    verdict.struct_size = sizeof verdict;
    ASSERT_EQ(heed_verdict_get(problem, nullptr, i, &verdict), HEED_OK);
    EXPECT_EQ(verdict.accepted, 0) << verdict.impl;
    with_reason += std::strncmp(verdict.impl, "cuda/", 5) == 0 && std::strlen(verdict.reason) > 0;
  }
  EXPECT_GE(with_reason, 3);
  heed_problem_destroy(problem);

  std::vector<float> q(2 * 8 * 16), out(q.size(), -7.0f);
  heed_attention_args args;
  heed_attention_args_init(&args);
  args.device = HEED_DEVICE_CUDA;
  args.q = args.k = args.v = tensor_of(q.data(), HEED_DTYPE_F32, {1, 8, 2, 16});
  args.out = tensor_of(out.data(), HEED_DTYPE_F32, {1, 8, 2, 16});
  expect_missing(heed_attention(&args, nullptr), HEED_NOT_SUPPORTED);
  EXPECT_EQ(out, std::vector<float>(q.size(), -7.0f));
  expect_missing(heed_attention_validate(&args), HEED_INITIALIZATION_FAILED);
  heed_check_report report = {};
  report.struct_size = sizeof report;
  report.num_tensors = 77;
  expect_missing(heed_attention_check(&args, &report), HEED_INITIALIZATION_FAILED);
  EXPECT_EQ(report.num_tensors, 77);
}

TEST_F(GpuAbsent, InputsAndMemory) {
  heed_inputs* inputs = nullptr;
  for (const char* line : {"attention sq=8 d=16 device=cuda", "kv_append sn=1 sk=8 d=16 device=cuda"}) {
    expect_missing(heed_inputs_create(line, &inputs), HEED_INITIALIZATION_FAILED);
    EXPECT_EQ(inputs, nullptr);
  }
  int32_t count = 77;
  expect_missing(heed_device_count(HEED_DEVICE_CUDA, &count), HEED_INITIALIZATION_FAILED);
  EXPECT_EQ(count, 77);
  char name[4] = "abc";
  expect_missing(heed_device_name(HEED_DEVICE_CUDA, 0, name, sizeof name, nullptr), HEED_INITIALIZATION_FAILED);
  EXPECT_STREQ(name, "abc");
  void* pointer = name;
  expect_missing(heed_memory_allocate(HEED_DEVICE_CUDA, 0, 64, &pointer), HEED_INITIALIZATION_FAILED);
  EXPECT_EQ(pointer, name);
  expect_missing(heed_memory_free(HEED_DEVICE_CUDA, 0, nullptr), HEED_INITIALIZATION_FAILED);
  expect_missing(heed_memory_copy(name, HEED_DEVICE_CPU, name, HEED_DEVICE_CUDA, 0, 2), HEED_INITIALIZATION_FAILED);
  expect_missing(heed_memory_fill(HEED_DEVICE_CUDA, -1, name, 0, 2), HEED_INITIALIZATION_FAILED);
  expect_missing(heed_stream_synchronize(HEED_DEVICE_CUDA, 0, nullptr), HEED_INITIALIZATION_FAILED);
  EXPECT_STREQ(name, "abc");
}

}  // namespace
}  // namespace heed
