#include "gpu/fake_driver.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>

namespace {

using Result = int32_t;
using Address = uint64_t;
constexpr Result kSuccess = 0, kInvalidValue = 1, kOutOfMemory = 2, kInvalidDevice = 101, kNotSupported = 801,
                 kCaptureUnsupported = 900;
constexpr size_t kRoom = size_t{16} << 30;  // of addresses; memory is taken when it is touched

struct State {
  std::mutex mutex;
  unsigned char* device = nullptr;  // what callers get: no access
  unsigned char* shadow = nullptr;  // where the bytes are
  size_t next = 0;
  std::map<Address, size_t> live;
  std::map<std::string, std::pair<Result, int32_t>> failing;
  std::map<std::string, int64_t> calls;
  std::set<void*> capturing;
  void* last_stream = nullptr;
};

State& state() {
  static auto* made = [] {
    auto* s = new State;
    const auto map = [](int access) {
      return static_cast<unsigned char*>(
          mmap(nullptr, kRoom, access, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    };
    s->device = map(PROT_NONE);
    s->shadow = map(PROT_READ | PROT_WRITE);
    return s;
  }();
  return *made;
}

// Counts the call, and whether it has to fail. The lock is the caller's.
Result enter(const char* function) {
  State& s = state();
  ++s.calls[function];
  const auto found = s.failing.find(function);
  if (found == s.failing.end() || found->second.second == 0) return kSuccess;
  --found->second.second;
  return found->second.first;
}

// The bytes behind device addresses that lie in one live allocation; null otherwise.
unsigned char* bytes_at(Address address, size_t count) {
  State& s = state();
  auto after = s.live.upper_bound(address);
  if (after == s.live.begin()) return nullptr;
  const auto& [base, size] = *std::prev(after);
  if (address - base > size || count > size - (address - base)) return nullptr;
  return s.shadow + (address - reinterpret_cast<Address>(s.device));
}

Result allocate(Address* pointer, size_t bytes) {
  State& s = state();
  if (bytes == 0) return kInvalidValue;
  if (bytes > kRoom - s.next) return kOutOfMemory;
  *pointer = reinterpret_cast<Address>(s.device) + s.next;
  s.live[*pointer] = bytes;
  std::memset(s.shadow + s.next, 0xcd, bytes);
  s.next += (bytes + 511) / 512 * 512;
  return kSuccess;
}

// Work on a stream, recorded or not; what is asked of the legacy stream while another is captured is an error.
Result copy(void* to, const void* from, size_t bytes, void* stream) {
  if (to == nullptr || from == nullptr) return kInvalidValue;
  if (stream == nullptr && !state().capturing.empty()) return kCaptureUnsupported;
  std::memcpy(to, from, bytes);
  return kSuccess;
}

}  // namespace

extern "C" {

void fake_cuda_fail(const char* function, int32_t code, int32_t times) {
  const std::lock_guard lock(state().mutex);
  state().failing[function] = {code, times};
}
void fake_cuda_capture(void* stream, int32_t on) {
  const std::lock_guard lock(state().mutex);
  on != 0 ? static_cast<void>(state().capturing.insert(stream)) : static_cast<void>(state().capturing.erase(stream));
}
int64_t fake_cuda_live_allocations() {
  const std::lock_guard lock(state().mutex);
  return static_cast<int64_t>(state().live.size());
}
int64_t fake_cuda_calls(const char* function) {
  const std::lock_guard lock(state().mutex);
  return state().calls[function];
}
int32_t fake_cuda_enter(const char* function) {
  const std::lock_guard lock(state().mutex);
  return enter(function);
}
void* fake_cuda_last_stream() { return state().last_stream; }

#define FAKE_ENTER                           \
  const std::lock_guard lock(state().mutex); \
  if (const Result failure = enter(__func__); failure != kSuccess) return failure

Result cuInit(uint32_t) { return kSuccess; }
Result cuDriverGetVersion(int32_t* version) { return *version = 13000, kSuccess; }
Result cuGetErrorName(Result code, const char** name) {
  *name = code == kOutOfMemory          ? "CUDA_ERROR_OUT_OF_MEMORY"
          : code == kInvalidValue       ? "CUDA_ERROR_INVALID_VALUE"
          : code == kNotSupported       ? "CUDA_ERROR_NOT_SUPPORTED"
          : code == kCaptureUnsupported ? "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"
                                        : "CUDA_ERROR_UNKNOWN";
  return kSuccess;
}
Result cuGetErrorString(Result, const char** text) { return *text = "as the test asked", kSuccess; }
Result cuDeviceGetCount(int32_t* count) { return *count = 2, kSuccess; }
Result cuDeviceGet(int32_t* device, int32_t index) {
  return *device = index, index >= 0 && index < 2 ? kSuccess : kInvalidDevice;
}
Result cuDeviceGetName(char* name, int32_t bytes, int32_t device) {
  return std::snprintf(name, static_cast<size_t>(bytes), "Fake GPU %d", device), kSuccess;
}
Result cuDeviceGetAttribute(int32_t* value, int32_t attribute, int32_t) {
  switch (attribute) {
    case 75: *value = 9; break;  // compute capability
    case 76: *value = 0; break;
    case 16: *value = 132; break;     // multiprocessors
    case 81: *value = 233472; break;  // shared memory
    case 97:
    case 8: *value = 232448; break;
    case 38: *value = 50 << 20; break;  // L2
    default: *value = 0;
  }
  return kSuccess;
}
Result cuDeviceTotalMem_v2(size_t* bytes, int32_t) { return *bytes = kRoom, kSuccess; }
Result cuDevicePrimaryCtxRetain(void** context, int32_t device) {
  static char contexts[2];
  return *context = &contexts[device], kSuccess;
}
Result cuDevicePrimaryCtxRelease_v2(int32_t) { return kSuccess; }

static thread_local void* stack[16];
static thread_local int depth = 0;
Result cuCtxGetCurrent(void** context) { return *context = depth > 0 ? stack[depth - 1] : nullptr, kSuccess; }
Result cuCtxPushCurrent_v2(void* context) { return stack[depth++] = context, kSuccess; }
Result cuCtxPopCurrent_v2(void** context) { return *context = stack[--depth], kSuccess; }
Result cuCtxGetDevice(int32_t* device) {
  void* first = nullptr;
  cuDevicePrimaryCtxRetain(&first, 0);
  return *device = depth > 0 && stack[depth - 1] != first ? 1 : 0, kSuccess;
}

// NVRTC looks for it and, where it is missing, does not look whether it found it.
Result cuGetExportTable(const void**, const void*) { return kNotSupported; }

Result cuStreamIsCapturing(void* stream, int32_t* status) {
  FAKE_ENTER;
  return *status = state().capturing.contains(stream) ? 1 : 0, kSuccess;
}
Result cuStreamSynchronize(void* stream) {
  FAKE_ENTER;
  return state().capturing.contains(stream) ? kCaptureUnsupported : kSuccess;
}
Result cuMemAlloc_v2(Address* pointer, size_t bytes) {
  FAKE_ENTER;
  return allocate(pointer, bytes);
}
Result cuMemFree_v2(Address pointer) {
  FAKE_ENTER;
  return state().live.erase(pointer) == 1 ? kSuccess : kInvalidValue;
}
Result cuMemAllocAsync(Address* pointer, size_t bytes, void* stream) {
  FAKE_ENTER;
  state().last_stream = stream;
  return allocate(pointer, bytes);
}
Result cuMemFreeAsync(Address pointer, void* stream) {
  FAKE_ENTER;
  state().last_stream = stream;
  return state().live.erase(pointer) == 1 ? kSuccess : kInvalidValue;
}
Result cuMemcpyHtoDAsync_v2(Address to, const void* from, size_t bytes, void* stream) {
  FAKE_ENTER;
  return copy(bytes_at(to, bytes), from, bytes, stream);
}
Result cuMemcpyDtoHAsync_v2(void* to, Address from, size_t bytes, void* stream) {
  FAKE_ENTER;
  return copy(to, bytes_at(from, bytes), bytes, stream);
}
Result cuMemcpyDtoDAsync_v2(Address to, Address from, size_t bytes, void* stream) {
  FAKE_ENTER;
  return copy(bytes_at(to, bytes), bytes_at(from, bytes), bytes, stream);
}
Result cuMemsetD8Async(Address to, uint8_t value, size_t bytes, void* stream) {
  FAKE_ENTER;
  unsigned char* const memory = bytes_at(to, bytes);
  if (memory == nullptr) return kInvalidValue;
  if (stream == nullptr && !state().capturing.empty()) return kCaptureUnsupported;
  std::memset(memory, value, bytes);
  return kSuccess;
}

}  // extern "C"
