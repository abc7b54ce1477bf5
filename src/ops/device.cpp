#include "ops/device.h"

#include "base/format.h"

namespace heed {

Status check_device(Device device, int32_t device_index, int32_t threads) {
  if (device != Device::kCpu && device != Device::kCuda) {
    return invalid_argument(heed::format("device = {} must be 0 (cpu) or 1 (cuda)", static_cast<int32_t>(device)));
  }
  const bool cuda = device == Device::kCuda;
  if (device_index < 0 || device_index > (cuda ? kMaxDeviceIndex : 0)) {
    return invalid_argument(cuda ? heed::format("device_index = {} must be from 0 to {}", device_index, kMaxDeviceIndex)
                                 : heed::format("device_index = {} must be 0: there is one CPU", device_index));
  }
  if (threads < 0 || (cuda && threads != 0)) {
    return invalid_argument(cuda ? heed::format("threads = {} must be 0: threads are the CPU's", threads)
                                 : heed::format("threads = {} must be from 0 to {}", threads, INT32_MAX));
  }
  return {};
}

std::string device_text(Device device, int32_t device_index) {
  if (device == Device::kCpu) return "cpu";
  return device_index == 0 ? "cuda" : heed::format("cuda:{}", device_index);
}

}  // namespace heed
