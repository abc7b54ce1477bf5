// heed/device.h: memory and queues of a device.
#include "heed/device.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "base/format.h"
#include "base/machine.h"
#include "capi_error.h"
#include "capi_handles.h"
#include "capi_tensors.h"
#include "cuda/device.h"
#include "cuda/memory.h"

namespace heed {
namespace {

constexpr size_t kHostAlignment = 128;

Status missing(const char* name) { return invalid_argument(heed::format("{} = NULL: must be an address", name)); }

// Device and index; an index of -1 becomes that of the current device.
Status resolve(heed_device device, int32_t& index) {
  HEED_RETURN_IF_ERROR(check_enum("device", device, 2, "0 (cpu) or 1 (cuda)"));
  if (device == HEED_DEVICE_CUDA) {
    int32_t resolved = 0;
    HEED_RETURN_IF_ERROR(resolve_device(index, 0, resolved, "index"));
    index = resolved;
    return cuda::device_facts(index).status();
  }
  if (index == 0 || index == -1) return {};
  return invalid_argument(heed::format("index = {}: must be 0 or -1 with device 0 (cpu)", index));
}

Status allocate_on_host(size_t bytes, void** pointer) {
  void* made = nullptr;
  if (bytes > 0) {
    const bool fits = bytes <= SIZE_MAX / 2;
    if (fits) made = std::aligned_alloc(kHostAlignment, (bytes + kHostAlignment - 1) / kHostAlignment * kHostAlignment);
    if (made == nullptr) return out_of_memory(heed::format("bytes = {}: the host has no memory for that", bytes));
  }
  *pointer = made;
  return {};
}

Status name_of(heed_device device, int32_t index, std::string& name) {
  HEED_RETURN_IF_ERROR(resolve(device, index));
  if (device == HEED_DEVICE_CPU) {
    name = machine().cpu.model.empty() ? "unknown" : machine().cpu.model;
    return {};
  }
  name = cuda::device_facts(index).value()->name;
  return {};
}

Status copy(void* to, heed_device to_device, const void* from, heed_device from_device, int32_t index, size_t bytes) {
  HEED_RETURN_IF_ERROR(check_enum("to_device", to_device, 2, "0 (cpu) or 1 (cuda)"));
  HEED_RETURN_IF_ERROR(check_enum("from_device", from_device, 2, "0 (cpu) or 1 (cuda)"));
  const bool to_cuda = to_device == HEED_DEVICE_CUDA, from_cuda = from_device == HEED_DEVICE_CUDA;
  HEED_RETURN_IF_ERROR(resolve(to_cuda || from_cuda ? HEED_DEVICE_CUDA : HEED_DEVICE_CPU, index));
  if (bytes == 0) return {};
  if (to == nullptr) return missing("to");
  if (from == nullptr) return missing("from");
  if (to_cuda && from_cuda) return cuda::copy_on_device(index, to, from, bytes);
  if (to_cuda) return cuda::copy_to_device(index, to, from, bytes);
  if (from_cuda) return cuda::copy_to_host(index, to, from, bytes);
  std::memmove(to, from, bytes);
  return {};
}

}  // namespace
}  // namespace heed

using heed::guarded;
using heed::Status;

extern "C" {

heed_status heed_device_count(heed_device device, int32_t* count) {
  return guarded([&]() -> Status {
    HEED_RETURN_IF_ERROR(heed::check_enum("device", device, 2, "0 (cpu) or 1 (cuda)"));
    if (count == nullptr) return heed::missing("count");
    if (device == HEED_DEVICE_CPU) {
      *count = 1;
      return {};
    }
    if (!heed::cuda::devices().ok()) return heed::cuda::devices().status();
    *count = static_cast<int32_t>(heed::cuda::devices().value().size());
    return {};
  });
}

heed_status heed_device_name(heed_device device, int32_t index, char* buffer, size_t buffer_bytes, size_t* needed) {
  return guarded([&]() -> Status {
    std::string name;
    HEED_RETURN_IF_ERROR(heed::name_of(device, index, name));
    return heed::copy_text(name, buffer, buffer_bytes, needed);
  });
}

heed_status heed_memory_allocate(heed_device device, int32_t index, size_t bytes, void** pointer) {
  return guarded([&]() -> Status {
    HEED_RETURN_IF_ERROR(heed::resolve(device, index));
    if (pointer == nullptr) return heed::missing("pointer");
    return device == HEED_DEVICE_CPU ? heed::allocate_on_host(bytes, pointer)
                                     : heed::cuda::allocate(index, bytes, *pointer);
  });
}

heed_status heed_memory_free(heed_device device, int32_t index, void* pointer) {
  return guarded([&]() -> Status {
    HEED_RETURN_IF_ERROR(heed::resolve(device, index));
    if (device == HEED_DEVICE_CUDA) return heed::cuda::release(index, pointer);
    std::free(pointer);
    return {};
  });
}

heed_status heed_memory_copy(void* to, heed_device to_device, const void* from, heed_device from_device, int32_t index,
                             size_t bytes) {
  return guarded([&]() -> Status { return heed::copy(to, to_device, from, from_device, index, bytes); });
}

heed_status heed_memory_fill(heed_device device, int32_t index, void* pointer, int32_t value, size_t bytes) {
  return guarded([&]() -> Status {
    HEED_RETURN_IF_ERROR(heed::resolve(device, index));
    if (value < 0 || value > 255) {
      return heed::invalid_argument(heed::format("value = {}: must be from 0 to 255", value));
    }
    if (bytes == 0) return {};
    if (pointer == nullptr) return heed::missing("pointer");
    if (device == HEED_DEVICE_CUDA) {
      return heed::cuda::fill(index, pointer, static_cast<uint8_t>(value), bytes);
    }
    std::memset(pointer, value, bytes);
    return {};
  });
}

heed_status heed_stream_synchronize(heed_device device, int32_t index, void* stream) {
  return guarded([&]() -> Status {
    HEED_RETURN_IF_ERROR(heed::resolve(device, index));
    if (device == HEED_DEVICE_CUDA) return heed::cuda::synchronize(index, stream);
    if (stream == nullptr) return {};
    return heed::invalid_argument(heed::format("stream = {}: must be NULL with device 0 (cpu)", stream));
  });
}

}  // extern "C"
