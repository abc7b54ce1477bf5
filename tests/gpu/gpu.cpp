#include "gpu/gpu.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <mutex>
#include <thread>

#include "cuda/device.h"
#include "ops/problem_line.h"

extern char** environ;

namespace heed::testing {
namespace {

std::string failed(const char* call, cuda::CUresult result) {
  return result == cuda::kCudaSuccess ? "" : cuda::driver_error(result, call).message();
}

const cuda::Driver& driver() { return *cuda::driver().value(); }

TestCalls load_test_calls() {
  TestCalls calls;
  void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  const auto load = [&](auto& member, const char* name) {
    member = reinterpret_cast<std::remove_reference_t<decltype(member)>>(dlsym(library, name));
  };
  load(calls.mem_get_info, "cuMemGetInfo_v2");
  load(calls.ctx_create, "cuCtxCreate_v2");
  load(calls.ctx_destroy, "cuCtxDestroy_v2");
  return calls;
}

double work_of(const std::string& line) {
  const Result<ProblemLine> parsed = parse_problem_line(line);
  return parsed.ok() ? std::visit([](const auto& p) { return flops(p); }, parsed.value().problem) : 0;
}

pid_t start_again(const std::string& filter, const std::vector<std::string>& environment, const std::string& log) {
  std::vector<std::string> words = {"/proc/self/exe", "--gtest_filter=" + filter};
  std::vector<char*> arguments, variables;
  for (std::string& word : words) arguments.push_back(word.data());
  arguments.push_back(nullptr);
  std::vector<std::string> added = environment;
  for (std::string& variable : added) variables.push_back(variable.data());  // the first of a name counts
  for (char** variable = environ; *variable != nullptr; ++variable) {
    const std::string name = std::string(*variable).substr(0, std::string(*variable).find('=') + 1);
    const bool replaced =
        std::any_of(environment.begin(), environment.end(), [&](const auto& own) { return own.starts_with(name); });
    if (!replaced) variables.push_back(*variable);
  }
  variables.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, 1, log.c_str(), O_WRONLY | O_CREAT | O_APPEND, 0600);
  posix_spawn_file_actions_adddup2(&actions, 1, 2);
  pid_t child = -1;
  const std::string self = std::filesystem::read_symlink("/proc/self/exe").string();
  arguments[0] = const_cast<char*>(self.c_str());
  if (posix_spawn(&child, self.c_str(), &actions, nullptr, arguments.data(), variables.data()) != 0) child = -1;
  posix_spawn_file_actions_destroy(&actions);
  return child;
}

int end_of(pid_t child) {
  int status = 0;
  if (child < 0 || waitpid(child, &status, 0) != child) return -1;
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

}  // namespace

const std::string& no_gpu() {
  static const std::string reason = [] {
    int32_t count = 0;
    return heed_device_count(HEED_DEVICE_CUDA, &count) == HEED_OK ? std::string() : std::string(heed_last_error());
  }();
  return reason;
}

const TestCalls& test_calls() {
  static const TestCalls calls = load_test_calls();
  return calls;
}

Stream::Stream(bool blocking) {
  const cuda::ContextScope scope(0);
  const uint32_t flags = blocking ? 0 : cuda::kStreamNonBlocking;
  const std::string failure = failed("cuStreamCreate", driver().stream_create(&stream_, flags));
  if (!failure.empty()) ADD_FAILURE() << failure;
}

Stream::~Stream() {
  const cuda::ContextScope scope(0);
  if (stream_ != nullptr) driver().stream_destroy(stream_);
}

std::string Stream::synchronize() const {
  return heed_stream_synchronize(HEED_DEVICE_CUDA, 0, stream_) == HEED_OK ? "" : last_error("synchronize");
}

CapturedGraph::~CapturedGraph() {
  if (exec_ != nullptr) driver().graph_exec_destroy(exec_);
  if (graph_ != nullptr) driver().graph_destroy(graph_);
}

std::string CapturedGraph::begin(const Stream& stream) {
  return failed("cuStreamBeginCapture", driver().stream_begin_capture(stream.get(), cuda::kCaptureThreadLocal));
}

std::string CapturedGraph::end(const Stream& stream) {
  const cuda::ContextScope scope(0);
  std::string failure = failed("cuStreamEndCapture", driver().stream_end_capture(stream.get(), &graph_));
  if (failure.empty()) failure = failed("cuGraphInstantiate", driver().graph_instantiate(&exec_, graph_, 0));
  return failure;
}

std::string CapturedGraph::launch(const Stream& stream) const {
  const std::string failure = failed("cuGraphLaunch", driver().graph_launch(exec_, stream.get()));
  return failure.empty() ? stream.synchronize() : failure;
}

DeviceMemory::DeviceMemory(size_t bytes, int fill) : bytes_(bytes) {
  EXPECT_EQ(heed_memory_allocate(HEED_DEVICE_CUDA, 0, bytes, &data_), HEED_OK) << heed_last_error();
  EXPECT_EQ(heed_memory_fill(HEED_DEVICE_CUDA, 0, data_, fill, bytes), HEED_OK) << heed_last_error();
}

DeviceMemory::DeviceMemory(const std::vector<int32_t>& numbers) : DeviceMemory(numbers.size() * 4, 0) {
  write(0, numbers.data(), bytes_);
}

void DeviceMemory::write(size_t at, const void* from, size_t bytes) {
  unsigned char* const to = static_cast<unsigned char*>(data_) + at;
  EXPECT_EQ(heed_memory_copy(to, HEED_DEVICE_CUDA, from, HEED_DEVICE_CPU, 0, bytes), HEED_OK) << heed_last_error();
}

std::vector<unsigned char> DeviceMemory::read(size_t at, size_t bytes) const {
  std::vector<unsigned char> to(bytes);
  const unsigned char* const from = static_cast<const unsigned char*>(data_) + at;
  EXPECT_EQ(heed_memory_copy(to.data(), HEED_DEVICE_CPU, from, HEED_DEVICE_CUDA, 0, bytes), HEED_OK)
      << heed_last_error();
  return to;
}

std::string on_gpu(const std::string& text) {
  Result<ProblemLine> parsed = parse_problem_line(text);
  EXPECT_TRUE(parsed.ok()) << text << ": " << parsed.status().message();
  if (!parsed.ok()) return {};
  ProblemLine& line = parsed.value();
  if (const auto* p = std::get_if<AttentionProblem>(&line.problem); p != nullptr) {
    if (p->pass == Pass::kBackward || p->dtype == Dtype::kF64 || p->out_dtype == Dtype::kF64) return {};
  }
  std::visit(
      [](auto& p) {
        p.device = Device::kCuda;
        p.device_index = 0;
        p.threads = 0;
      },
      line.problem);
  return to_string(line);
}

std::string source_folder() { return std::filesystem::exists("tests/problems/smoke.txt") ? "." : HEED_SOURCE_DIR; }

std::vector<std::string> problem_files() {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(source_folder() + "/tests/problems")) {
    names.push_back(entry.path().stem().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

std::vector<std::string> gpu_lines(const std::string& file, int& left_out) {
  std::vector<std::string> lines;
  std::ifstream stream(source_folder() + "/tests/problems/" + file + ".txt");
  EXPECT_TRUE(stream.good()) << file;
  for (std::string line; std::getline(stream, line);) {
    if (line.empty() || line[0] == '#') continue;
    const std::string moved = on_gpu(line);
    moved.empty() ? static_cast<void>(++left_out) : lines.push_back(moved);
  }
  std::stable_sort(lines.begin(), lines.end(), [](const auto& a, const auto& b) { return work_of(a) > work_of(b); });
  return lines;
}

void on_threads(size_t count, const std::function<void(size_t i, const Stream& stream)>& body) {
  std::atomic<size_t> next{0};
  const auto work = [&] {
    const Stream stream;
    for (size_t i = next++; i < count; i = next++) body(i, stream);
  };
  std::vector<std::thread> threads;
  const size_t wanted = std::min<size_t>(count, std::max(1u, std::thread::hardware_concurrency()));
  for (size_t n = 1; n < wanted; ++n) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
}

bool is_fatal(const std::string& failure) {
  for (const char* name : {"ILLEGAL_ADDRESS", "MISALIGNED_ADDRESS", "LAUNCH_FAILED", "ILLEGAL_INSTRUCTION",
                           "INVALID_ADDRESS_SPACE", "INVALID_PC", "HARDWARE_STACK_ERROR", "LAUNCH_TIMEOUT"}) {
    if (failure.find(std::string("CUDA_ERROR_") + name) != std::string::npos) return true;
  }
  return false;
}

int run_again(const std::string& filter, const std::vector<std::string>& environment, const std::string& log) {
  return end_of(start_again(filter, environment, log));
}

int run_again_together(int processes, const std::string& filter, const std::vector<std::string>& environment,
                       const std::string& log) {
  std::vector<pid_t> children;
  for (int n = 0; n < processes; ++n) children.push_back(start_again(filter, environment, log));
  int good = 0;
  for (const pid_t child : children) good += end_of(child) == 0;
  return good;
}

void note(const std::string& text) {
  std::cout << text << std::endl;
  note_in_file(text);
}

void note_in_file(const std::string& text) {
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  if (const char* folder = std::getenv("HEED_OUT_DIR"); folder != nullptr && *folder != '\0') {
    std::ofstream(std::string(folder) + "/gpu_test.txt", std::ios::app) << text << '\n';
  }
}

std::string failure_of(LineRun& problem, const std::string& row, const Stream& stream, const std::vector<int>& fills) {
  std::vector<unsigned char> outputs;
  for (size_t n = 0; n < fills.size(); ++n) {
    RunStyle style;
    style.workspace_fill = fills[n];
    style.stream = stream.get();
    std::string failure = problem.run(row, style);
    if (failure.empty() && n == 0) {
      failure = problem.judge();
      outputs = problem.outputs();
    } else if (failure.empty() && problem.outputs() != outputs) {
      failure = "other bits in run " + std::to_string(n + 1) + ", workspace of " + std::to_string(fills[n]);
    }
    if (!failure.empty()) return failure;
  }
  return {};
}

}  // namespace heed::testing
