// Device time of work that is enqueued on a stream: captured into a graph, replayed between two events.
#pragma once

#include <cstdint>
#include <functional>

#include "base/status.h"
#include "cuda/device.h"

namespace heed::cuda {

// Enqueues one run on the stream.
using Enqueue = std::function<Status(CUstream)>;

class GraphTimer {
 public:
  GraphTimer() = default;
  GraphTimer(const GraphTimer&) = delete;
  GraphTimer& operator=(const GraphTimer&) = delete;
  ~GraphTimer();

  // The context of the device must be current from here to the destructor.
  Status open(int32_t device_index);
  // Microseconds of one run, roughly, from runs that are not captured; the first loads what the work needs.
  Result<double> rough_us(const Enqueue& work);
  // Captures `calls` runs, and replays them once: the first replay uploads the graph.
  Status capture(const Enqueue& work, int32_t calls);
  // One replay: microseconds per call on the device.
  Result<double> sample_us();
  // Microseconds until `calls` calls of `work` have returned, per call; the device was idle when they began.
  Result<double> host_us(const Enqueue& work, int32_t calls);

 private:
  Status wait();
  Result<double> between_events_us();

  int32_t device_index_ = 0;
  int32_t calls_ = 0;
  CUstream stream_ = nullptr;
  CUevent begin_ = nullptr, end_ = nullptr;
  CUgraphExec graph_ = nullptr;
};

}  // namespace heed::cuda
