#include "cuda/graph_timer.h"

#include <chrono>
#include <utility>

#include "base/format.h"

namespace heed::cuda {
namespace {

constexpr int32_t kRoughRuns = 3;

// A call of the driver, by the name of its member in the table.
#define HEED_CUDA_TRY(call, text) \
  if (const CUresult result_ = driver().value()->call; result_ != kCudaSuccess) return driver_error(result_, text)

}  // namespace

Status GraphTimer::open(int32_t device_index) {
  device_index_ = device_index;
  const std::string where = heed::format("device {}", device_index);
  HEED_CUDA_TRY(stream_create(&stream_, kStreamNonBlocking), "cuStreamCreate(non-blocking, " + where + ")");
  HEED_CUDA_TRY(event_create(&begin_, 0), "cuEventCreate(" + where + ")");
  HEED_CUDA_TRY(event_create(&end_, 0), "cuEventCreate(" + where + ")");
  return {};
}

GraphTimer::~GraphTimer() {
  if (stream_ == nullptr) return;
  const Driver& cuda = *driver().value();
  cuda.stream_synchronize(stream_);
  if (graph_ != nullptr) cuda.graph_exec_destroy(graph_);
  if (begin_ != nullptr) cuda.event_destroy(begin_);
  if (end_ != nullptr) cuda.event_destroy(end_);
  cuda.stream_destroy(stream_);
}

Status GraphTimer::wait() {
  HEED_CUDA_TRY(stream_synchronize(stream_), heed::format("cuStreamSynchronize(timing, device {})", device_index_));
  return {};
}

Result<double> GraphTimer::between_events_us() {
  float ms = 0;
  HEED_CUDA_TRY(event_synchronize(end_), "cuEventSynchronize(end)");
  HEED_CUDA_TRY(event_elapsed_time(&ms, begin_, end_), "cuEventElapsedTime(begin, end)");
  return static_cast<double>(ms) * 1e3;
}

Result<double> GraphTimer::rough_us(const Enqueue& work) {
  HEED_RETURN_IF_ERROR(work(stream_));
  HEED_RETURN_IF_ERROR(wait());
  HEED_CUDA_TRY(event_record(begin_, stream_), "cuEventRecord(begin)");
  for (int32_t i = 0; i < kRoughRuns; ++i) HEED_RETURN_IF_ERROR(work(stream_));
  HEED_CUDA_TRY(event_record(end_, stream_), "cuEventRecord(end)");
  const Result<double> elapsed = between_events_us();
  if (!elapsed.ok()) return elapsed.status();
  return elapsed.value() / kRoughRuns;
}

Status GraphTimer::capture(const Enqueue& work, int32_t calls) {
  const Driver& cuda = *driver().value();
  if (graph_ != nullptr) cuda.graph_exec_destroy(std::exchange(graph_, nullptr));
  calls_ = calls;
  HEED_CUDA_TRY(stream_begin_capture(stream_, kCaptureThreadLocal), "cuStreamBeginCapture(thread-local)");
  Status status;
  for (int32_t i = 0; i < calls && status.ok(); ++i) status = work(stream_);
  CUgraph graph = nullptr;
  const CUresult ended = cuda.stream_end_capture(stream_, &graph);  // also where the work failed
  if (status.ok() && ended != kCudaSuccess)
    status = driver_error(ended, heed::format("cuStreamEndCapture({} calls)", calls));
  if (status.ok()) {
    if (const CUresult result = cuda.graph_instantiate(&graph_, graph, 0); result != kCudaSuccess)
      status = driver_error(result, heed::format("cuGraphInstantiateWithFlags({} calls)", calls));
  }
  if (graph != nullptr) cuda.graph_destroy(graph);
  if (!status.ok()) return status;
  return sample_us().status();
}

Result<double> GraphTimer::sample_us() {
  HEED_CUDA_TRY(event_record(begin_, stream_), "cuEventRecord(begin)");
  HEED_CUDA_TRY(graph_launch(graph_, stream_), heed::format("cuGraphLaunch({} calls)", calls_));
  HEED_CUDA_TRY(event_record(end_, stream_), "cuEventRecord(end)");
  const Result<double> elapsed = between_events_us();
  if (!elapsed.ok()) return elapsed.status();
  return elapsed.value() / calls_;
}

Result<double> GraphTimer::host_us(const Enqueue& work, int32_t calls) {
  HEED_RETURN_IF_ERROR(work(stream_));
  HEED_RETURN_IF_ERROR(wait());
  const auto start = std::chrono::steady_clock::now();
  for (int32_t i = 0; i < calls; ++i) HEED_RETURN_IF_ERROR(work(stream_));
  const std::chrono::duration<double, std::micro> elapsed = std::chrono::steady_clock::now() - start;
  HEED_RETURN_IF_ERROR(wait());
  return elapsed.count() / calls;
}

}  // namespace heed::cuda
