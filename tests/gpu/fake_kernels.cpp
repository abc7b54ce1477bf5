// Kernels of the driver that is none: any code loads once fake_cuda_accept_kernels says so, launches are remembered and do
// nothing.
#include <atomic>
#include <cstdint>
#include <cstring>

#include "gpu/fake_driver.h"

namespace {

using Result = int32_t;
constexpr Result kSuccess = 0, kNotSupported = 801;

std::atomic<bool> accepting{false};
std::atomic<int64_t> num_launches{0}, num_maps{0};
std::atomic<uint64_t> first_word{0};
char module = 0, kernel = 0;

}  // namespace

extern "C" {

void fake_cuda_accept_kernels(int32_t on) { accepting = on != 0; }
int64_t fake_cuda_launches() { return num_launches; }
int64_t fake_cuda_encoded_maps() { return num_maps; }
uint64_t fake_cuda_first_parameter() { return first_word; }

Result cuLibraryLoadData(void** library, const void*, void*, void**, uint32_t, void*, void**, uint32_t) {
  if (const Result failure = fake_cuda_enter(__func__); failure != kSuccess) return failure;
  return *library = &module, accepting ? kSuccess : kNotSupported;
}
Result cuLibraryGetKernel(void** found, void*, const char*) { return *found = &kernel, kSuccess; }
Result cuKernelGetAttribute(int32_t* value, int32_t, void*, int32_t) { return *value = 0, kSuccess; }
Result cuKernelSetAttribute(int32_t, int32_t, void*, int32_t) { return kSuccess; }

Result cuThreadExchangeStreamCaptureMode(int32_t* mode) {
  static thread_local int32_t held = 0;
  const int32_t before = held;
  held = *mode, *mode = before;
  return kSuccess;
}
Result cuCtxGetId(void*, uint64_t* id) {
  if (const Result failure = fake_cuda_enter(__func__); failure != kSuccess) return failure;
  return *id = 1, accepting ? kSuccess : kNotSupported;
}
Result cuStreamGetId(void* stream, uint64_t* id) {
  if (const Result failure = fake_cuda_enter(__func__); failure != kSuccess) return failure;
  return *id = 100 + reinterpret_cast<uintptr_t>(stream), accepting ? kSuccess : kNotSupported;
}

Result cuLaunchKernelEx(const void*, void*, void** parameters, void**) {
  if (!accepting) return kNotSupported;
  uint64_t word = 0;
  std::memcpy(&word, parameters[0], sizeof word);
  first_word = word;
  ++num_launches;
  return kSuccess;
}

// The address, then what else was asked for.
Result cuTensorMapEncodeTiled(uint64_t* map, int32_t dtype, uint32_t rank, void* address, const uint64_t* sizes,
                              const uint64_t* strides, const uint32_t* box, const uint32_t*, int32_t, int32_t, int32_t,
                              int32_t) {
  if (!accepting) return kNotSupported;
  std::memset(map, 0, 128);
  map[0] = reinterpret_cast<uintptr_t>(address);
  map[1] = static_cast<uint64_t>(dtype);
  for (uint32_t i = 0; i < rank && i < 5; ++i) map[2 + i] = sizes[i] ^ static_cast<uint64_t>(box[i]) << 40;
  for (uint32_t i = 0; i + 1 < rank && i < 4; ++i) map[8 + i] = strides[i];
  ++num_maps;
  return kSuccess;
}

}  // extern "C"
