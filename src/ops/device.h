// Where a problem is computed.
#pragma once

#include <cstdint>
#include <string>

#include "base/status.h"

namespace heed {

enum class Device : int32_t { kCpu = 0, kCuda = 1 };  // values as in heed/core.h

constexpr int32_t kMaxDeviceIndex = 1023;

// A GPU has an index and no threads, the CPU the other way round.
Status check_device(Device device, int32_t device_index, int32_t threads);

// "cpu", "cuda", "cuda:1"; device 0 goes without its number.
std::string device_text(Device device, int32_t device_index);

}  // namespace heed
