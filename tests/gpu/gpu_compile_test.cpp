// Kernels with the real compiler and the real disk: one compilation a key whatever the threads, one cache whatever the
// processes.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <filesystem>
#include <thread>

#include "cuda/jit.h"
#include "cuda/nvrtc.h"
#include "cuda/variants.h"
#include "gpu/gpu.h"

namespace heed::cuda {
namespace {

namespace fs = std::filesystem;

class CacheFolder {
 public:
  CacheFolder() {
    char name[] = "/tmp/heed_gpu_test_XXXXXX";
    EXPECT_NE(mkdtemp(name), nullptr);
    root_ = name;
  }
  ~CacheFolder() { fs::remove_all(root_); }
  std::string folder() const { return root_ + "/cache"; }
  std::string log() const { return root_ + "/log"; }
  std::vector<std::string> files() const {
    std::vector<std::string> names;
    if (!fs::exists(folder())) return names;
    for (const auto& entry : fs::directory_iterator(folder())) names.push_back(entry.path().filename().string());
    std::sort(names.begin(), names.end());
    return names;
  }

 private:
  std::string root_;
};

TEST(GpuCompile, SixteenThreadsCompileAKeyOnce) {
  const Result<const NvrtcCompiler*> compiler = nvrtc(0);
  if (!compiler.ok()) GTEST_SKIP() << compiler.status().message();
  const CacheFolder cache;
  const DiskCache disk(cache.folder());
  std::atomic<int> compiled{0};
  CodeTable table({.name = [] { return std::string("nvrtc-test"); },
                   .newest_major = 0,
                   .compile =
                       [&](const KernelKey& key, const std::string& arch) {
                         ++compiled;
                         return compile_embedded(*compiler.value(), key, arch);
                       }},
                  disk, JitPolicy::kOn);
  const std::string arch = "sm_90a";
  const KernelKey key = kv_append_variant(Dtype::kBf16).key;
  std::vector<std::thread> threads;
  std::vector<const KernelCode*> codes(16);
  for (size_t n = 0; n < codes.size(); ++n) {
    threads.emplace_back([&, n] {
      const Result<const KernelCode*> code = table.get(key, arch);
      if (code.ok()) codes[n] = code.value();
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(compiled, 1);
  ASSERT_NE(codes[0], nullptr);
  EXPECT_GT(codes[0]->cubin.size(), 1000u);
  for (const KernelCode* code : codes) EXPECT_EQ(code, codes[0]);
  EXPECT_EQ(table.find_made(key, arch), codes[0]);
  EXPECT_EQ(cache.files().size(), 1u);
}

class GpuCache : public testing::GpuTest {};

TEST_F(GpuCache, EightProcessesOnOneEmptyFolder) {
  const CacheFolder cache;
  const std::string line = "HEED_TEST_LINE=attention b=2 hq=4 hkv=2 sq=33 sk=70 d=64 bf16 causal lse device=cuda";
  const std::vector<std::string> environment = {line, "HEED_CACHE_DIR=" + cache.folder()};
  EXPECT_EQ(testing::run_again_together(8, "GpuLines.OneLine", environment, cache.log()), 8);
  const std::vector<std::string> files = cache.files();
  EXPECT_GE(files.size(), 2u);
  for (const std::string& file : files) EXPECT_EQ(file.find(".tmp"), std::string::npos) << file << " was left";
  // All that is needed is there now.
  std::vector<std::string> closed = environment;
  closed.emplace_back("HEED_JIT=require-cache");
  closed.emplace_back("HEED_NVRTC=/nowhere");
  EXPECT_EQ(testing::run_again("GpuLines.OneLine", closed, cache.log()), 0);
  EXPECT_EQ(cache.files(), files);
}

TEST_F(GpuCache, WithoutTheKernelRequireCacheSaysSo) {
  const CacheFolder cache;
  const std::vector<std::string> environment = {
      "HEED_TEST_LINE=attention b=2 hq=4 hkv=2 sq=33 sk=70 d=64 bf16 causal lse device=cuda",
      "HEED_CACHE_DIR=" + cache.folder(), "HEED_JIT=require-cache"};
  EXPECT_EQ(testing::run_again("GpuLines.OneLine", environment, cache.log()), 1);
  EXPECT_TRUE(cache.files().empty());
}

}  // namespace
}  // namespace heed::cuda
