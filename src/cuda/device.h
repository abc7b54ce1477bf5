// The GPUs of this machine, and the context that calls to the driver run in.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "cuda/driver.h"

namespace heed::cuda {

struct DeviceFacts {
  int32_t index = 0;  // the driver's order, which CUDA_VISIBLE_DEVICES shapes
  CUdevice handle = 0;
  std::string name;              // "NVIDIA H200"
  int32_t major = 0, minor = 0;  // compute capability
  int32_t multiprocessors = 0;
  int32_t shared_per_block = 0;  // bytes a block may be granted
  int64_t l2_bytes = 0;
  int64_t memory_bytes = 0;
};

// Read once. An error: no driver, no GPU, a driver that is too old.
const Result<std::vector<DeviceFacts>>& devices();

// invalid_argument where there is no device of that index.
Result<const DeviceFacts*> device_facts(int32_t index);

// A usual device of an architecture ("sm_90a"), for plans and kernels made where there is none; its index is 0.
Result<DeviceFacts> typical_device(std::string_view architecture);

// The device of the calling thread's current context, 0 where it has none.
int32_t current_device();

// While it lives, a context of the device is current: the caller's own where that is one, else the device's primary
// context, the one the CUDA runtime and every framework use, which is kept for the life of the process.
class ContextScope {
 public:
  explicit ContextScope(int32_t device_index);
  ~ContextScope();
  ContextScope(const ContextScope&) = delete;
  ContextScope& operator=(const ContextScope&) = delete;
  const Status& status() const { return status_; }

 private:
  bool pushed_ = false;
  Status status_;
};

// Whether work on the stream is being recorded into a graph instead of run.
Result<bool> is_capturing(CUstream stream);

}  // namespace heed::cuda
