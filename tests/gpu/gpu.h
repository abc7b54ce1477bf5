// What the tests of the GPU share: the driver's calls that heed itself has no need of, memory and streams with owners,
// problem lines moved to the GPU, work spread over the host's threads.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "cuda/driver.h"
#include "heed/heed.h"
#include "unit/line_run.h"

namespace heed::testing {

// Why there is no GPU to test on; "" if there is one.
const std::string& no_gpu();

class GpuTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!no_gpu().empty()) GTEST_SKIP() << no_gpu();
  }
};

// Of the driver, what only tests call; null where this driver has it no longer.
struct TestCalls {
  cuda::CUresult (*mem_get_info)(size_t* free_bytes, size_t* total) = nullptr;
  cuda::CUresult (*ctx_create)(cuda::CUcontext*, uint32_t flags, cuda::CUdevice) = nullptr;
  cuda::CUresult (*ctx_destroy)(cuda::CUcontext) = nullptr;
};
const TestCalls& test_calls();

// A stream of the calling thread's current context, else of device 0's primary one.
class Stream {
 public:
  explicit Stream(bool blocking = false);
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  cuda::CUstream get() const { return stream_; }
  std::string synchronize() const;  // "" or what went wrong

 private:
  cuda::CUstream stream_ = nullptr;
};

// What is recorded between begin and end, to be launched any number of times.
class CapturedGraph {
 public:
  ~CapturedGraph();
  std::string begin(const Stream& stream);
  std::string end(const Stream& stream);
  std::string launch(const Stream& stream) const;  // and waits

 private:
  cuda::CUgraph graph_ = nullptr;
  cuda::CUgraphExec exec_ = nullptr;
};

class DeviceMemory {
 public:
  DeviceMemory(size_t bytes, int fill);
  explicit DeviceMemory(const std::vector<int32_t>& numbers);
  ~DeviceMemory() { heed_memory_free(HEED_DEVICE_CUDA, 0, data_); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  void write(size_t at, const void* from, size_t bytes);
  std::vector<unsigned char> read(size_t at, size_t bytes) const;

 private:
  size_t bytes_;
  void* data_ = nullptr;
};

// The line with device=cuda instead of its device and threads; "" for what no GPU row does: the backward pass and f64.
std::string on_gpu(const std::string& line);
// Lines of tests/problems/NAME.txt that on_gpu keeps, largest first; `left_out` counts the others.
std::vector<std::string> gpu_lines(const std::string& file, int& left_out);
std::vector<std::string> problem_files();
// The repository's folder: the current one if it is that, else where the tests were built.
std::string source_folder();

// body(i) for every i below `count`, on as many threads as the host has cores, each with a stream of its own.
void on_threads(size_t count, const std::function<void(size_t i, const Stream& stream)>& body);

// After an error like this the context is lost, and with it every later call of the process.
bool is_fatal(const std::string& failure);

// This test program again with a filter and more environment ("NAME=value"); its exit status, -1 if it did not start.
int run_again(const std::string& filter, const std::vector<std::string>& environment, const std::string& log);
// Several at once: how many ended with 0.
int run_again_together(int processes, const std::string& filter, const std::vector<std::string>& environment,
                       const std::string& log);

// A line for a person, on the terminal and in $HEED_OUT_DIR/gpu_test.txt, or there alone.
void note(const std::string& text);
void note_in_file(const std::string& text);

// "" or what is wrong with the row's results: in the first run by the judge, later by other bits. `fills`: what the workspace
// holds before each run.
std::string failure_of(LineRun& problem, const std::string& row, const Stream& stream, const std::vector<int>& fills);

}  // namespace heed::testing
