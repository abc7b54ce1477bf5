// heed_warm: which kernels problems need, what cannot be compiled, and, where HEED_TEST_NVRTC names a compiler, the
// kernels themselves.
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "cuda/warm.h"
#include "heed/heed.hpp"
#include "ops/problem_line.h"

namespace heed::cuda {
namespace {

namespace fs = std::filesystem;

std::vector<WantedKernel> kernels_of(const std::vector<std::string>& lines, std::string_view arch) {
  std::vector<WantedKernel> kernels;
  for (const std::string& line : lines) {
    const Result<ProblemLine> parsed = parse_problem_line(line);
    EXPECT_TRUE(parsed.ok()) << parsed.status().message();
    const Status status = add_kernels(parsed.value().problem, arch, kernels);
    EXPECT_TRUE(status.ok()) << status.message();
  }
  return kernels;
}

bool any_of(const std::vector<WantedKernel>& kernels, const std::string& part) {
  for (const WantedKernel& kernel : kernels) {
    if (kernel.key.expression.find(part) != std::string::npos) return true;
  }
  return false;
}

TEST(WantedKernels, EachOnceWithThoseAroundIt) {
  const auto plain = kernels_of({"attention b=16 hq=16 sq=512 d=64 bf16"}, "sm_90a");
  ASSERT_EQ(plain.size(), 1u);
  EXPECT_TRUE(any_of(plain, "attention_fwd_sm90"));
  EXPECT_TRUE(any_of(kernels_of({"attention b=16 hq=16 sq=512 d=64 bf16"}, "sm_89"), "attention_fwd_sm80"));
  EXPECT_EQ(plain[0].arch, "sm_90a");
  EXPECT_EQ(
      kernels_of({"attention b=64 hq=16 sq=512 d=64 bf16", "attention b=65 hq=16 sq=512 d=64 bf16"}, "sm_90a").size(),
      1u);
  const auto decode = kernels_of({"attention b=1 hq=8 hkv=1 sq=1 sk=100000 d=128 f16 used_k"}, "sm_80");
  EXPECT_TRUE(any_of(decode, "attention_decode_sm80") && any_of(decode, "combine") &&
              any_of(decode, "check_sequences"));
  EXPECT_TRUE(any_of(kernels_of({"kv_append b=2 hkv=1 sn=1 sk=64 d=64 f16"}, "sm_89"), "kv_append"));
  EXPECT_TRUE(any_of(kernels_of({"attention sq=64 d=64"}, "sm_120"), "attention_fwd_portable"));
}

class Warm : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {  // before the configuration is read
    char name[] = "/tmp/heed_warm_test_XXXXXX";
    ASSERT_NE(mkdtemp(name), nullptr);
    folder_ = name;
    setenv("HEED_CACHE_DIR", (folder_ + "/cache").c_str(), 1);
    const char* file = std::getenv("HEED_TEST_NVRTC");
    has_compiler_ = file != nullptr && *file != '\0';
    setenv("HEED_NVRTC", has_compiler_ ? file : "/no/libnvrtc.so", 1);
  }
  static void TearDownTestSuite() { fs::remove_all(folder_); }

  heed_problem* problem(const char* line) {
    heed_problem* made = nullptr;
    EXPECT_EQ(heed_problem_parse(line, &made), HEED_OK) << heed_last_error();
    problems_.push_back(made);
    return made;
  }
  void TearDown() override {
    for (heed_problem* made : problems_) heed_problem_destroy(made);
  }
  heed_warm_options options(const char* arch) {
    heed_warm_options options = {};
    options.struct_size = sizeof options;
    options.arch = arch;
    return options;
  }
  void expect_error(heed_status status, heed_status want, const char* sentence) {
    EXPECT_EQ(status, want);
    EXPECT_NE(std::string(heed_last_error()).find(sentence), std::string::npos) << heed_last_error();
  }

  static std::string folder_;
  static bool has_compiler_;
  std::vector<heed_problem*> problems_;
};
std::string Warm::folder_;
bool Warm::has_compiler_ = false;

TEST_F(Warm, Errors) {
  heed_problem* plain = problem("attention sq=64 d=64 bf16 device=cuda");
  heed_problem* on_cpu = problem("attention sq=64 d=64 bf16");
  heed_problem* backward = problem("attention sq=64 d=64 bf16 device=cuda pass=bwd");
  heed_warm_options sm_90a = options("sm_90a"), sm_1 = options("sm_1"), sized = options("sm_90a");
  heed_warm_result result = {};
  result.struct_size = sizeof result;
  expect_error(heed_warm(nullptr, 1, &sm_90a, &result), HEED_INVALID_ARGUMENT, "problems = NULL");
  expect_error(heed_warm(&plain, -1, &sm_90a, &result), HEED_INVALID_ARGUMENT, "num_problems = -1");
  heed_problem* missing = nullptr;
  expect_error(heed_warm(&missing, 1, &sm_90a, &result), HEED_INVALID_ARGUMENT, "problems[0] = NULL");
  expect_error(heed_warm(&plain, 1, &sm_1, &result), HEED_INVALID_ARGUMENT,
               "architecture = \"sm_1\": must be one of sm_80");
  expect_error(heed_warm(&on_cpu, 1, nullptr, &result), HEED_INVALID_ARGUMENT, "device = cpu: must be cuda");
  expect_error(heed_warm(&backward, 1, &sm_90a, &result), HEED_NOT_SUPPORTED,
               "no GPU kernel does \"attention sq=64 d=64 bf16");
  sized.struct_size = 3;
  expect_error(heed_warm(&plain, 1, &sized, &result), HEED_INVALID_ARGUMENT, "options.struct_size = 3");
  heed_executor broken = {sizeof broken, nullptr, 1, 0, nullptr};
  sized = options("sm_90a");
  sized.executor = &broken;
  expect_error(heed_warm(&plain, 1, &sized, &result), HEED_INVALID_ARGUMENT, "executor.run = NULL");
  if (!has_compiler_) expect_error(heed_warm(&plain, 1, &sm_90a, &result), HEED_INITIALIZATION_FAILED, "no NVRTC");
  EXPECT_EQ(result.num_kernels, 0);
  EXPECT_EQ(heed_warm(nullptr, 0, nullptr, &result), HEED_OK);
}

TEST_F(Warm, InCpp) {
  EXPECT_EQ(heed::warm({}).num_kernels, 0);
  const heed::Problem known[] = {heed::Problem::parse("attention sq=64 d=64 pass=bwd device=cuda")};
  try {
    heed::warm(known, "sm_1");
    FAIL() << "sm_1 is no architecture";
  } catch (const heed::Error& error) {
    EXPECT_NE(std::string(error.what()).find("architecture = \"sm_1\""), std::string::npos) << error.what();
  }
  EXPECT_THROW(heed::warm(known, "sm_80"), heed::Error);  // no kernel does it
}

struct Heard {
  std::vector<int32_t> done;
  int32_t total = 0;
};

TEST_F(Warm, CompilesWhatIsMissingAndNothingTwice) {
  if (!has_compiler_) GTEST_SKIP() << "HEED_TEST_NVRTC names no compiler";
  const heed_problem* problems[] = {problem("attention hq=4 sq=64 d=32 f16 used_k device=cuda"),
                                    problem("attention sq=64 d=64 pass=bwd device=cuda"),
                                    problem("kv_append hkv=1 sn=1 sk=64 d=64 f16 device=cuda")};
  Heard heard;
  heed_warm_options sm_80 = options("sm_80");
  sm_80.progress_context = &heard;
  sm_80.progress = [](void* context, int32_t done, int32_t total, const char*) {
    static_cast<Heard*>(context)->done.push_back(done);
    static_cast<Heard*>(context)->total = total;
  };
  heed_warm_result result = {};
  result.struct_size = sizeof result;
  // The problem without a kernel is the error; the others have theirs all the same.
  expect_error(heed_warm(problems, 3, &sm_80, &result), HEED_NOT_SUPPORTED, "pass=bwd");
  EXPECT_EQ(result.num_kernels, 0);
  std::vector<int32_t> count;
  for (int32_t i = 0; i <= heard.total; ++i) count.push_back(i);
  EXPECT_EQ(heard.done, count);
  EXPECT_GE(heard.total, 3);
  EXPECT_EQ(std::distance(fs::directory_iterator(folder_ + "/cache"), fs::directory_iterator()), heard.total);
  problems[1] = problems[2];
  ASSERT_EQ(heed_warm(problems, 2, &sm_80, &result), HEED_OK) << heed_last_error();
  EXPECT_EQ(result.num_kernels, heard.total);
  EXPECT_GT(result.compile_seconds, 0);
}

TEST(DiskCacheContents, CountKernelsOnly) {
  char name[] = "/tmp/heed_contents_test_XXXXXX";
  ASSERT_NE(mkdtemp(name), nullptr);
  const DiskCache cache(name);
  EXPECT_EQ(cache.contents().num_kernels, 0);
  cache.store("one", "nvrtc-13.0", std::string(1000, 'x'));
  cache.store("two", "nvrtc-13.0", std::string(500, 'x'));
  std::ofstream(std::string(name) + "/else.txt") << "no kernel";
  EXPECT_EQ(cache.contents().num_kernels, 2);
  EXPECT_GT(cache.contents().bytes, 1500);
  EXPECT_LT(cache.contents().bytes, 2000);
  EXPECT_EQ(DiskCache("").contents().num_kernels, 0);
  fs::remove_all(name);
}

}  // namespace
}  // namespace heed::cuda
