// Streams, events and graphs of the driver that is none: time is what fake_cuda_work says work takes.
#include <atomic>

#include "gpu/fake_driver.h"

namespace {

using Result = int32_t;
constexpr Result kSuccess = 0, kInvalidValue = 1;

struct Graph {
  double us = 0;
};
struct Stream {
  double now_us = 0;
  Graph* capturing = nullptr;
};
struct Event {
  double at_us = 0;
};

std::atomic<int64_t> live_objects{0};

template <class Object>
Result make(Object** object) {
  *object = new Object;
  ++live_objects;
  return kSuccess;
}

template <class Object>
Result destroy(Object* object) {
  if (object == nullptr) return kInvalidValue;
  delete object;
  --live_objects;
  return kSuccess;
}

}  // namespace

extern "C" {

void fake_cuda_work(void* stream, double us) {
  Stream& s = *static_cast<Stream*>(stream);
  (s.capturing != nullptr ? s.capturing->us : s.now_us) += us;
}
int64_t fake_cuda_live_objects() { return live_objects; }

#define FAKE_ENTER \
  if (const Result failure = fake_cuda_enter(__func__); failure != kSuccess) return failure

Result cuStreamCreate(Stream** stream, uint32_t flags) {
  FAKE_ENTER;
  return flags == 1 ? make(stream) : kInvalidValue;
}
Result cuStreamDestroy_v2(Stream* stream) {
  FAKE_ENTER;
  return destroy(stream);
}
Result cuStreamBeginCapture_v2(Stream* stream, int32_t mode) {
  FAKE_ENTER;
  if (stream->capturing != nullptr || mode != 1) return kInvalidValue;
  fake_cuda_capture(stream, 1);
  return make(&stream->capturing);
}
Result cuStreamEndCapture(Stream* stream, Graph** graph) {
  FAKE_ENTER;
  if (stream->capturing == nullptr) return kInvalidValue;
  fake_cuda_capture(stream, 0);
  *graph = stream->capturing;
  stream->capturing = nullptr;
  return kSuccess;
}
Result cuGraphInstantiateWithFlags(Graph** executable, Graph* graph, uint64_t) {
  FAKE_ENTER;
  make(executable);
  **executable = *graph;
  return kSuccess;
}
Result cuGraphLaunch(Graph* graph, Stream* stream) {
  FAKE_ENTER;
  fake_cuda_work(stream, graph->us);
  return kSuccess;
}
Result cuGraphDestroy(Graph* graph) {
  FAKE_ENTER;
  return destroy(graph);
}
Result cuGraphExecDestroy(Graph* graph) {
  FAKE_ENTER;
  return destroy(graph);
}
Result cuEventCreate(Event** event, uint32_t) {
  FAKE_ENTER;
  return make(event);
}
Result cuEventDestroy_v2(Event* event) {
  FAKE_ENTER;
  return destroy(event);
}
Result cuEventRecord(Event* event, Stream* stream) {
  FAKE_ENTER;
  event->at_us = stream->now_us;
  return kSuccess;
}
Result cuEventSynchronize(Event*) {
  FAKE_ENTER;
  return kSuccess;
}
Result cuEventElapsedTime(float* ms, Event* begin, Event* end) {
  FAKE_ENTER;
  *ms = static_cast<float>((end->at_us - begin->at_us) * 1e-3);
  return kSuccess;
}

}  // extern "C"
