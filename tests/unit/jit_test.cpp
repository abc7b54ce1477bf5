// The way of a kernel from source to code without a GPU: the disk cache with everything that can be wrong with a folder
// or a file, the table that makes each key once, and the embedded sources. Compilers here are fakes; kernel_build_test
// has NVRTC.
#include <gtest/gtest.h>

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <set>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "cuda/jit.h"
#include "cuda/variants.h"
#include "heed/core.h"

namespace heed::cuda {
namespace {

namespace fs = std::filesystem;

constexpr const char* kBy = "nvrtc-13.0";

class DiskCacheTest : public ::testing::Test {
 protected:
  void SetUp() override {
    char name[] = "/tmp/heed_jit_test_XXXXXX";
    ASSERT_NE(mkdtemp(name), nullptr);
    root_ = name;
    ASSERT_EQ(heed_set_log(&hear, this, HEED_LOG_WARNING), HEED_OK);
  }
  void TearDown() override {
    heed_set_log(nullptr, nullptr, HEED_LOG_ERROR);
    fs::remove_all(root_);
  }

  static void hear(void* context, int32_t, const char* message) {
    static_cast<DiskCacheTest*>(context)->log_ += std::string(message) + "\n";
  }
  bool heard(const std::string& text) const { return log_.find(text) != std::string::npos; }

  std::string folder() const { return root_ + "/cache"; }
  int files() const {
    return static_cast<int>(std::distance(fs::directory_iterator(folder()), fs::directory_iterator()));
  }
  static std::string read(const std::string& file) {
    std::ifstream stream(file, std::ios::binary);
    std::ostringstream text;
    text << stream.rdbuf();
    return text.str();
  }
  static void write(const std::string& file, const std::string& data) {
    std::ofstream(file, std::ios::binary | std::ios::trunc) << data;
  }

  std::string root_, log_;
};

std::string some_payload(size_t bytes, char seed) {
  std::string payload(bytes, '\0');
  for (size_t i = 0; i < bytes; ++i) payload[i] = static_cast<char>(seed + i * 7 + i / 251);
  return payload;
}

TEST_F(DiskCacheTest, RoundTrip) {
  const DiskCache cache(folder());
  struct stat facts = {};
  ASSERT_EQ(stat(folder().c_str(), &facts), 0);
  EXPECT_EQ(facts.st_mode & 0777, 0700u);
  EXPECT_FALSE(cache.load("key", kBy));
  for (const size_t bytes : {0, 1, 7, 8, 9, 65537}) {
    const std::string key = "key " + std::to_string(bytes), payload = some_payload(bytes, 'a');
    cache.store(key, kBy, payload);
    EXPECT_EQ(cache.load(key, kBy), payload);
    ASSERT_EQ(stat(cache.file(key, kBy).c_str(), &facts), 0);
    EXPECT_EQ(facts.st_mode & 0777, 0600u);
  }
  cache.store("key 7", kBy, "another");
  EXPECT_EQ(cache.load("key 7", kBy), "another");
  EXPECT_EQ(DiskCache(folder() + "//").load("key 7", kBy), "another");  // the next process
  EXPECT_EQ(files(), 6);
  EXPECT_EQ(log_, "");
}

TEST_F(DiskCacheTest, CompilersAreKeptApart) {
  const DiskCache cache(folder());
  for (const char* by : {"nvrtc-13.9", "nvrtc-13.10", "nvrtc-12.9"}) cache.store("key", by, by);
  EXPECT_EQ(cache.load("key", "nvrtc-13.9"), "nvrtc-13.9");
  EXPECT_FALSE(cache.load("key", "nvrtc-13.0"));
  EXPECT_EQ(cache.load("key", ""), "nvrtc-13.10");     // the newest
  EXPECT_EQ(cache.load("key", "", 12), "nvrtc-12.9");  // that a driver of CUDA 12 runs
  EXPECT_FALSE(cache.load("key", "", 11));
}

TEST_F(DiskCacheTest, EveryTruncationAndEveryChangedByteIsFound) {
  const DiskCache cache(folder());
  const std::string key = "a key", payload = some_payload(61, 'p'), file = cache.file(key, kBy);
  cache.store(key, kBy, payload);
  const std::string whole = read(file);
  for (size_t bytes = 0; bytes < whole.size(); ++bytes) {
    write(file, whole.substr(0, bytes));
    EXPECT_FALSE(cache.load(key, kBy)) << bytes << " bytes";
    EXPECT_FALSE(fs::exists(file)) << bytes << " bytes";
  }
  for (size_t at = 0; at < whole.size(); ++at) {
    std::string changed = whole;
    changed[at] = static_cast<char>(changed[at] ^ 0x10);
    write(file, changed);
    EXPECT_FALSE(cache.load(key, kBy)) << "byte " << at;
    EXPECT_FALSE(fs::exists(file)) << "byte " << at;
  }
  write(file, whole + "x");
  EXPECT_FALSE(cache.load(key, kBy));
  EXPECT_TRUE(heard("damaged"));
  cache.store(key, kBy, payload);
  EXPECT_EQ(cache.load(key, kBy), payload);
}

TEST_F(DiskCacheTest, AFileOfAnotherKeyIsRemoved) {
  const DiskCache cache(folder());
  cache.store("one", kBy, "code of one");
  fs::copy_file(cache.file("one", kBy), cache.file("two", kBy));
  EXPECT_FALSE(cache.load("two", kBy));
  EXPECT_FALSE(fs::exists(cache.file("two", kBy)));
  EXPECT_EQ(cache.load("one", kBy), "code of one");
}

TEST_F(DiskCacheTest, LinksFifosAndFoldersAreRefused) {
  const DiskCache cache(folder());
  cache.store("key", kBy, "code");
  const std::string file = cache.file("key", kBy), elsewhere = root_ + "/elsewhere";
  fs::rename(file, elsewhere);
  fs::create_symlink(elsewhere, file);
  EXPECT_FALSE(cache.load("key", kBy));
  cache.store("key", kBy, "new code");  // takes the link's place, does not follow it
  EXPECT_EQ(cache.load("key", kBy), "new code");
  EXPECT_FALSE(fs::is_symlink(file));
  EXPECT_NE(read(elsewhere).find("code"), std::string::npos);

  fs::remove(file);
  ASSERT_EQ(mkfifo(file.c_str(), 0600), 0);
  EXPECT_FALSE(cache.load("key", kBy));  // and does not wait for a writer
  fs::remove(file);
  fs::create_directory(file);
  EXPECT_FALSE(cache.load("key", kBy));
  cache.store("key", kBy, "code");  // cannot be: said, and no temporary file is left
  EXPECT_FALSE(cache.load("key", kBy));
  EXPECT_TRUE(heard("kept in memory only"));
  EXPECT_EQ(files(), 1);
}

TEST_F(DiskCacheTest, WhatBelongsToAnotherUserIsRefused) {
  if (geteuid() != 0) GTEST_SKIP() << "only root can give files away";
  constexpr uid_t kNobody = 65534;
  const DiskCache cache(folder());
  cache.store("key", kBy, "code");
  const std::string file = cache.file("key", kBy);
  ASSERT_EQ(chown(file.c_str(), kNobody, kNobody), 0);
  EXPECT_FALSE(cache.load("key", kBy));
  EXPECT_TRUE(fs::exists(file));
  EXPECT_TRUE(heard("another user"));
  ASSERT_EQ(chown(folder().c_str(), kNobody, kNobody), 0);
  log_.clear();
  EXPECT_EQ(DiskCache(folder()).folder(), "");
  EXPECT_TRUE(heard("belongs to another user: kernels are kept in memory only"));
}

TEST_F(DiskCacheTest, NoFolderMeansMemoryOnly) {
  const DiskCache none("");
  none.store("key", kBy, "code");
  EXPECT_FALSE(none.load("key", kBy));
  EXPECT_EQ(log_, "");

  write(root_ + "/file", "");  // no HOME can be made below a file, whoever asks
  const DiskCache below_a_file(root_ + "/file/.cache/heed");
  EXPECT_EQ(below_a_file.folder(), "");
  EXPECT_TRUE(heard("kernels are kept in memory only"));
  below_a_file.store("key", kBy, "code");
  EXPECT_FALSE(below_a_file.load("key", kBy));
}

template <class Body>
bool in_child(Body body) {
  const pid_t child = fork();
  if (child == 0) _exit(body() ? 0 : 1);
  int status = 0;
  return waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

TEST_F(DiskCacheTest, AFolderThatMayOnlyBeRead) {
  { DiskCache(folder()).store("key", kBy, "code"); }
  ASSERT_EQ(chmod(folder().c_str(), 0500), 0);
  if (geteuid() != 0) {
    const DiskCache cache(folder());
    cache.store("other", kBy, "code");
    EXPECT_TRUE(heard("kept in memory only"));
    EXPECT_EQ(cache.load("key", kBy), "code");
    EXPECT_EQ(files(), 1);
  }
  ASSERT_EQ(chmod(folder().c_str(), 0700), 0);
}

TEST_F(DiskCacheTest, AFullDisk) {
  EXPECT_TRUE(in_child([&] {
    const DiskCache cache(folder());
    signal(SIGXFSZ, SIG_IGN);
    const rlimit small = {100, 100};  // write fails part of the way, as it does on a full disk
    setrlimit(RLIMIT_FSIZE, &small);
    cache.store("key", kBy, some_payload(5000, 'x'));
    return !cache.load("key", kBy) && heard("kept in memory only") && files() == 0;
  }));
}

TEST_F(DiskCacheTest, AKilledWriterLeavesNoHalf) {
  const DiskCache cache(folder());
  // What a killed writer leaves: a temporary file, cut short, under the very name that this process would use next.
  for (int serial = 0; serial < 40; ++serial)
    write(cache.file("key", kBy) + "." + std::to_string(getpid()) + "." + std::to_string(serial) + ".tmp", "half");
  EXPECT_FALSE(cache.load("key", kBy));
  cache.store("key", kBy, "code");
  EXPECT_EQ(cache.load("key", kBy), "code");
  EXPECT_EQ(files(), 41);  // young: somebody may be writing them
  const auto long_ago = fs::file_time_type::clock::now() - std::chrono::hours(2);
  for (const auto& entry : fs::directory_iterator(folder())) fs::last_write_time(entry.path(), long_ago);
  const DiskCache later(folder());
  later.store("another key", kBy, "code");
  EXPECT_EQ(files(), 2);
  EXPECT_EQ(later.load("key", kBy), "code");
}

TEST_F(DiskCacheTest, WritersKilledAtAnyTime) {
  const std::string payload = some_payload(4 << 20, 'k');
  for (int round = 0; round < 20; ++round) {
    const pid_t child = fork();
    if (child == 0) {
      const DiskCache cache(folder());
      for (;;) cache.store("key", kBy, payload);
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(1 + round));
    kill(child, SIGKILL);
    waitpid(child, nullptr, 0);
    const DiskCache cache(folder());
    const std::optional<std::string> found = cache.load("key", kBy);
    EXPECT_TRUE(!found || *found == payload);
    EXPECT_FALSE(heard("damaged"));
  }
}

TEST_F(DiskCacheTest, EightProcessesAtOnce) {
  const std::string payloads[2] = {some_payload(50000, 'a'), some_payload(70000, 'b')};
  std::vector<pid_t> children;
  for (int i = 0; i < 8; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      bool good = true;
      const DiskCache cache(folder());  // each makes the folder
      for (int round = 0; round < 40 && good; ++round) {
        cache.store("key", kBy, payloads[(i + round) % 2]);
        const std::optional<std::string> found = cache.load("key", kBy);
        good = found && (*found == payloads[0] || *found == payloads[1]);
      }
      _exit(good && log_.empty() ? 0 : 1);
    }
    children.push_back(child);
  }
  for (const pid_t child : children) {
    int status = 0;
    waitpid(child, &status, 0);
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  }
  EXPECT_EQ(files(), 1);
}

// ---- the table ------------------------------------------------------------------------------------------------------

const KernelKey kKey = {"combine.cu", "an expression"};

struct FakeCompiler {
  std::atomic<int> calls{0};
  std::string name = kBy;
  Status failure;

  CodeCompiler hooks(int newest_major = 13) {
    return {.name = [this] { return name; },
            .newest_major = newest_major,
            .compile = [this](const KernelKey& key, const std::string&) -> Result<CompiledKernel> {
              ++calls;
              std::this_thread::sleep_for(std::chrono::milliseconds(20));
              if (!failure.ok()) return failure;
              return CompiledKernel{.cubin = "code of " + key.expression, .entry = "entry", .log = "", .seconds = 0.5};
            }};
  }
};

class CodeTableTest : public DiskCacheTest {};

TEST_F(CodeTableTest, SixteenThreadsOnOneKeyCompileOnce) {
  const DiskCache disk(folder());
  FakeCompiler fake;
  CodeTable table(fake.hooks(), disk, JitPolicy::kOn);
  const KernelCode* found[16] = {};
  std::vector<std::thread> threads;
  for (int i = 0; i < 16; ++i) {
    threads.emplace_back([&, i] {
      const Result<const KernelCode*> code = table.get(kKey, "sm_80");
      if (code.ok()) found[i] = code.value();
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(fake.calls, 1);
  ASSERT_NE(found[0], nullptr);
  for (const KernelCode* code : found) EXPECT_EQ(code, found[0]);
  EXPECT_EQ(found[0]->cubin, "code of an expression");
  EXPECT_EQ(found[0]->compile_seconds, 0.5);
}

TEST_F(CodeTableTest, ThreadsOnManyKeysCompileEachOnce) {
  const DiskCache disk("");
  FakeCompiler fake;
  CodeTable table(fake.hooks(), disk, JitPolicy::kOn);
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([&, i] {
      for (int n = 0; n < 24; ++n) {
        const std::string expression = std::to_string((n + i * 3) % 24);
        const Result<const KernelCode*> code = table.get({"combine.cu", expression}, "sm_80");
        if (!code.ok() || code.value()->cubin != "code of " + expression) ++wrong;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_EQ(fake.calls, 24);
}

TEST_F(CodeTableTest, TheNextProcessFindsItOnDisk) {
  const DiskCache disk(folder());
  FakeCompiler first, second;
  ASSERT_TRUE(CodeTable(first.hooks(), disk, JitPolicy::kOn).get(kKey, "sm_80").ok());
  CodeTable table(second.hooks(), disk, JitPolicy::kOn);
  const Result<const KernelCode*> code = table.get(kKey, "sm_80");
  ASSERT_TRUE(code.ok());
  EXPECT_EQ(code.value()->cubin, "code of an expression");
  EXPECT_EQ(code.value()->entry, "entry");
  EXPECT_EQ(code.value()->compile_seconds, 0);
  EXPECT_EQ(second.calls, 0);
  ASSERT_TRUE(table.get(kKey, "sm_86").ok());  // another architecture is another key
  EXPECT_EQ(second.calls, 1);
  second.name = "nvrtc-13.1";  // as is another compiler
  ASSERT_TRUE(CodeTable(second.hooks(), disk, JitPolicy::kOn).get(kKey, "sm_80").ok());
  EXPECT_EQ(second.calls, 2);
}

TEST_F(CodeTableTest, DamagedCodeIsCompiledAnew) {
  const DiskCache disk(folder());
  FakeCompiler fake;
  ASSERT_TRUE(CodeTable(fake.hooks(), disk, JitPolicy::kOn).get(kKey, "sm_80").ok());
  const std::string file = disk.file(code_text(kKey, "sm_80"), kBy), whole = read(file);
  write(file, whole.substr(0, whole.size() / 2));
  ASSERT_TRUE(CodeTable(fake.hooks(), disk, JitPolicy::kOn).get(kKey, "sm_80").ok());
  EXPECT_EQ(fake.calls, 2);
  EXPECT_EQ(read(file), whole);
}

TEST_F(CodeTableTest, ErrorsOfTheSourceStickOthersAreTriedAgain) {
  const DiskCache disk(folder());
  FakeCompiler fake;
  CodeTable table(fake.hooks(), disk, JitPolicy::kOn);
  fake.failure = Status(StatusCode::kInitializationFailed, "no NVRTC");
  EXPECT_EQ(table.get(kKey, "sm_80").status().message(), "no NVRTC");
  fake.failure = {};
  EXPECT_TRUE(table.get(kKey, "sm_80").ok());
  EXPECT_EQ(fake.calls, 2);

  const KernelKey bad = {"combine.cu", "no such kernel"};
  fake.failure = operation_failed("line 1: error");
  for (int i = 0; i < 3; ++i) EXPECT_EQ(table.get(bad, "sm_80").status().message(), "line 1: error");
  EXPECT_EQ(fake.calls, 3);
}

TEST_F(CodeTableTest, RequireCache) {
  const DiskCache disk(folder());
  FakeCompiler fake;
  const Status refused = CodeTable(fake.hooks(), disk, JitPolicy::kRequireCache).get(kKey, "sm_80").status();
  EXPECT_EQ(refused.code(), StatusCode::kNotFound);
  for (const std::string& part :
       {std::string("HEED_JIT=require-cache"), kKey.expression, std::string("sm_80"), folder()})
    EXPECT_NE(refused.message().find(part), std::string::npos) << refused.message();
  EXPECT_EQ(fake.calls, 0);
  ASSERT_TRUE(CodeTable(fake.hooks(), disk, JitPolicy::kOn).get(kKey, "sm_80").ok());
  EXPECT_TRUE(CodeTable(fake.hooks(), disk, JitPolicy::kRequireCache).get(kKey, "sm_80").ok());
  EXPECT_FALSE(CodeTable(fake.hooks(12), disk, JitPolicy::kRequireCache).get(kKey, "sm_80").ok());  // older driver
  EXPECT_EQ(fake.calls, 1);
}

TEST_F(CodeTableTest, ACacheServesAMachineWithoutCompiler) {
  const DiskCache disk(folder());
  FakeCompiler fake, none;
  ASSERT_TRUE(CodeTable(fake.hooks(), disk, JitPolicy::kOn).get(kKey, "sm_80").ok());
  none.name = "";
  none.failure = Status(StatusCode::kInitializationFailed, "no NVRTC");
  CodeTable table(none.hooks(), disk, JitPolicy::kOn);
  EXPECT_TRUE(table.get(kKey, "sm_80").ok());
  EXPECT_FALSE(table.get(kKey, "sm_90a").ok());
}

// ---- sources, libraries, names --------------------------------------------------------------------------------------

TEST(EmbeddedSources, IncludeEachOtherAndNothingElse) {
  size_t count = 0;
  const EmbeddedFile* files = embedded_files(count);
  std::set<std::string> names;
  for (size_t i = 0; i < count; ++i) names.insert(files[i].name);
  EXPECT_TRUE(names.contains("attention_fwd_sm80.cu") && names.contains("params.h"));
  EXPECT_EQ(names.size(), count);
  for (size_t i = 0; i < count; ++i) {
    std::ifstream original(std::string(HEED_SOURCE_DIR) + "/src/cuda/kernels/" + files[i].name);
    std::ostringstream text;
    text << original.rdbuf();
    EXPECT_EQ(text.str(), files[i].text) << files[i].name << ": not what was embedded";
    std::istringstream lines(files[i].text);
    for (std::string line; std::getline(lines, line);) {
      if (line.find("include") == std::string::npos || line.find('#') == std::string::npos) continue;
      if (line.substr(line.find_first_not_of(" \t"), 1) != "#") continue;
      const size_t open = line.find('"'), close = line.rfind('"');
      ASSERT_TRUE(open != std::string::npos && open < close) << files[i].name << ": " << line;
      EXPECT_TRUE(names.contains(line.substr(open + 1, close - open - 1))) << files[i].name << ": " << line;
    }
  }
}

TEST(Nvrtc, TheReasonNamesEveryCandidate) {
  // Nothing of CUDA is needed to build heed or to start it; where there is no NVRTC the answer says what was tried.
  const Result<const NvrtcCompiler*> none = nvrtc(11000);  // no candidate is that old
  ASSERT_FALSE(none.ok());
  EXPECT_EQ(none.status().code(), StatusCode::kInitializationFailed);
  EXPECT_NE(none.status().message().find("HEED_NVRTC"), std::string::npos) << none.status().message();
}

TEST(Nvrtc, AFileThatIsNone) {
  const char* file = std::getenv("HEED_NVRTC");
  if (file == nullptr || std::strcmp(file, "/dev/null") != 0) {  // variables are read once: another process
    EXPECT_TRUE(in_child([] {
      setenv("HEED_NVRTC", "/dev/null", 1);
      execl("/proc/self/exe", "jit_test", "--gtest_filter=Nvrtc.AFileThatIsNone", nullptr);
      return false;
    }));
    return;
  }
  const Result<const NvrtcCompiler*> none = nvrtc(0);
  ASSERT_FALSE(none.ok());
  EXPECT_NE(none.status().message().find("HEED_NVRTC=/dev/null: cannot be opened"), std::string::npos);
}

TEST(Nvrtc, AFolderHandedIn) {
  char name[] = "/tmp/heed_nvrtc_test_XXXXXX";
  ASSERT_NE(mkdtemp(name), nullptr);
  EXPECT_EQ(heed_set_nvrtc_folder(name), HEED_NOT_FOUND);
  EXPECT_NE(std::string(heed_last_error()).find(name), std::string::npos) << heed_last_error();
  EXPECT_NE(std::string(heed_last_error()).find("libnvrtc.so.13"), std::string::npos) << heed_last_error();

  const std::string file = std::string(name) + "/libnvrtc.so.13";
  std::ofstream(file) << "no library";
  ASSERT_EQ(heed_set_nvrtc_folder(name), HEED_OK) << heed_last_error();
  if (std::getenv("HEED_NVRTC") == nullptr) {  // it goes first, alone
    const Result<const NvrtcCompiler*> none = nvrtc(11000);
    ASSERT_FALSE(none.ok());
    EXPECT_NE(none.status().message().find(file + ": "), std::string::npos) << none.status().message();
    ASSERT_EQ(heed_set_nvrtc_folder(nullptr), HEED_OK);
    EXPECT_EQ(nvrtc(11000).status().message().find(file), std::string::npos);
  }
  EXPECT_EQ(heed_set_nvrtc_folder(""), HEED_OK);
  fs::remove_all(name);
}

TEST(Driver, ThereOrAReason) {
  if (driver().ok()) {
    EXPECT_GE(driver().value()->version, 12000);
    return;
  }
  EXPECT_EQ(driver().status().code(), StatusCode::kInitializationFailed);
  EXPECT_NE(driver().status().message(), "");
  const Result<const Kernel*> kernel = get_kernel(kKey, 0, 0);
  EXPECT_EQ(kernel.status().message(), driver().status().message());
}

TEST(Architecture, Names) {
  EXPECT_EQ(architecture(8, 0), "sm_80");
  EXPECT_EQ(architecture(9, 0), "sm_90a");
  EXPECT_EQ(architecture(12, 0), "sm_120");
}

TEST(Tiles, EveryHeadDimUpTo256) {
  for (int d = 8; d <= 256; d += 8) {
    for (int dv = 8; dv <= 256; dv += 8) {
      const HeadDims* dims = padded_head_dims(d, dv);
      ASSERT_NE(dims, nullptr);
      EXPECT_TRUE(dims->head_dim >= d && dims->head_dim_v >= dv);
    }
  }
  EXPECT_EQ(padded_head_dims(257, 64), nullptr);
  EXPECT_EQ(padded_head_dims(192, 128)->head_dim, 192);
  EXPECT_NE(portable_tile(512, 512), nullptr);
  EXPECT_EQ(portable_tile(513, 8), nullptr);
}

TEST(Variants, FewAndWithinTheDevice) {
  for (const Architecture& arch : kArchitectures) {
    const std::vector<KernelVariant> variants = reachable_variants(arch);
    EXPECT_LT(variants.size(), 200u);
    for (const KernelVariant& variant : variants) {
      EXPECT_LE(variant.shared_bytes, arch.shared_limit) << variant.key.expression;
      EXPECT_NE(std::string(variant.why), "") << variant.key.expression;
    }
    std::cout << arch.name << ": " << variants.size() << " variants\n";
  }
  for (int bits = 0; bits < 32; ++bits) {  // what is reachable stays as it is
    const AttentionFwdFeatures once = reachable({.is_bf16 = (bits & 1) != 0,
                                                 .mask = static_cast<MaskKind>(bits / 16),
                                                 .modified = (bits & 2) != 0,
                                                 .gather = (bits & 4) != 0,
                                                 .split = (bits & 8) != 0});
    EXPECT_EQ(reachable(once), once);
  }
}

}  // namespace
}  // namespace heed::cuda
