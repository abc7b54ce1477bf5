#include "cuda/memory.h"

#include "base/format.h"
#include "cuda/device.h"

namespace heed::cuda {
namespace {

constexpr CUstream kLegacyStream = nullptr;

CUdeviceptr address(const void* pointer) { return reinterpret_cast<CUdeviceptr>(pointer); }

// call(driver) on the legacy default stream, with a context of the device; then waits for it. `text()` names the call.
template <class Call, class Text>
Status on_legacy_stream(int32_t device_index, Call&& call, Text&& text) {
  const ContextScope scope(device_index);
  if (!scope.status().ok()) return scope.status();
  const Driver& cuda = *driver().value();
  CUresult result = call(cuda);
  if (result == kCudaSuccess) result = cuda.stream_synchronize(kLegacyStream);
  return result == kCudaSuccess ? Status() : driver_error(result, text());
}

}  // namespace

Status allocate(int32_t device_index, size_t bytes, void*& pointer) {
  const ContextScope scope(device_index);
  if (!scope.status().ok()) return scope.status();
  CUdeviceptr made = 0;
  if (bytes > 0) {
    const CUresult result = driver().value()->mem_alloc(&made, bytes);
    if (result != kCudaSuccess) {
      return driver_error(result, heed::format("cuMemAlloc({} bytes, device {})", bytes, device_index));
    }
  }
  pointer = reinterpret_cast<void*>(made);
  return {};
}

Status release(int32_t device_index, void* pointer) {
  const ContextScope scope(device_index);
  if (!scope.status().ok()) return scope.status();
  if (pointer == nullptr) return {};
  const CUresult result = driver().value()->mem_free(address(pointer));
  return result == kCudaSuccess ? Status()
                                : driver_error(result, heed::format("cuMemFree({}, device {})", pointer, device_index));
}

Status copy_to_device(int32_t device_index, void* to, const void* from, size_t bytes) {
  return on_legacy_stream(
      device_index,
      [&](const Driver& cuda) {
        return bytes == 0 ? kCudaSuccess : cuda.memcpy_htod_async(address(to), from, bytes, kLegacyStream);
      },
      [&] {
        return heed::format("cuMemcpyHtoDAsync(to {}, from {}, {} bytes, device {})", to, from, bytes, device_index);
      });
}

Status copy_to_host(int32_t device_index, void* to, const void* from, size_t bytes) {
  return on_legacy_stream(
      device_index,
      [&](const Driver& cuda) {
        return bytes == 0 ? kCudaSuccess : cuda.memcpy_dtoh_async(to, address(from), bytes, kLegacyStream);
      },
      [&] {
        return heed::format("cuMemcpyDtoHAsync(to {}, from {}, {} bytes, device {})", to, from, bytes, device_index);
      });
}

Status copy_on_device(int32_t device_index, void* to, const void* from, size_t bytes) {
  return on_legacy_stream(
      device_index,
      [&](const Driver& cuda) {
        return bytes == 0 ? kCudaSuccess : cuda.memcpy_dtod_async(address(to), address(from), bytes, kLegacyStream);
      },
      [&] {
        return heed::format("cuMemcpyDtoDAsync(to {}, from {}, {} bytes, device {})", to, from, bytes, device_index);
      });
}

Status fill(int32_t device_index, void* pointer, uint8_t value, size_t bytes) {
  return on_legacy_stream(
      device_index,
      [&](const Driver& cuda) {
        return bytes == 0 ? kCudaSuccess : cuda.memset_d8_async(address(pointer), value, bytes, kLegacyStream);
      },
      [&] {
        return heed::format("cuMemsetD8Async({}, {}, {} bytes, device {})", pointer, value, bytes, device_index);
      });
}

Status synchronize(int32_t device_index, void* stream) {
  const ContextScope scope(device_index);
  if (!scope.status().ok()) return scope.status();
  const CUresult result = driver().value()->stream_synchronize(static_cast<CUstream>(stream));
  return result == kCudaSuccess
             ? Status()
             : driver_error(result, heed::format("cuStreamSynchronize({}, device {})", stream, device_index));
}

Status refuse_capture(int32_t device_index, void* stream, const char* call) {
  const ContextScope scope(device_index);
  if (!scope.status().ok()) return scope.status();
  const Result<bool> capturing = is_capturing(static_cast<CUstream>(stream));
  if (!capturing.ok()) return capturing.status();
  if (!capturing.value()) return {};
  return operation_failed(heed::format(
      "stream = {}: is being captured into a graph, and {} waits for the device; call it before the capture", stream,
      call));
}

}  // namespace heed::cuda
