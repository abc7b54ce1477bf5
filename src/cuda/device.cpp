#include "cuda/device.h"

#include <array>
#include <mutex>

#include "base/format.h"
#include "cuda/tiles.h"

namespace heed::cuda {
namespace {

constexpr int kMaxDevices = 64;

Result<DeviceFacts> read_facts(const Driver& cuda, int32_t index) {
  DeviceFacts facts;
  facts.index = index;
  if (const CUresult result = cuda.device_get(&facts.handle, index); result != kCudaSuccess)
    return driver_error(result, heed::format("cuDeviceGet({})", index));
  char name[256] = {};
  if (const CUresult result = cuda.device_get_name(name, sizeof name, facts.handle); result != kCudaSuccess)
    return driver_error(result, heed::format("cuDeviceGetName(device {})", index));
  facts.name = name;
  int32_t l2 = 0;
  const std::pair<DeviceAttribute, int32_t*> attributes[] = {{kComputeCapabilityMajor, &facts.major},
                                                             {kComputeCapabilityMinor, &facts.minor},
                                                             {kMultiprocessorCount, &facts.multiprocessors},
                                                             {kMaxSharedBytesOptin, &facts.shared_per_block},
                                                             {kL2CacheBytes, &l2}};
  for (const auto& [attribute, value] : attributes) {
    if (const CUresult result = cuda.device_get_attribute(value, attribute, facts.handle); result != kCudaSuccess)
      return driver_error(result,
                          heed::format("cuDeviceGetAttribute({}, device {})", static_cast<int>(attribute), index));
  }
  facts.l2_bytes = l2;
  size_t memory = 0;
  if (const CUresult result = cuda.device_total_mem(&memory, facts.handle); result != kCudaSuccess)
    return driver_error(result, heed::format("cuDeviceTotalMem(device {})", index));
  facts.memory_bytes = static_cast<int64_t>(memory);
  return facts;
}

Result<std::vector<DeviceFacts>> read_devices() {
  if (!driver().ok()) return driver().status();
  const Driver& cuda = *driver().value();
  int32_t count = 0;
  if (const CUresult result = cuda.device_get_count(&count); result != kCudaSuccess)
    return driver_error(result, "cuDeviceGetCount()");
  if (count <= 0) return Status(StatusCode::kInitializationFailed, "the CUDA driver finds no GPU");
  std::vector<DeviceFacts> found;
  for (int32_t index = 0; index < count && index < kMaxDevices; ++index) {
    Result<DeviceFacts> facts = read_facts(cuda, index);
    if (!facts.ok()) return facts.status();
    found.push_back(std::move(facts).value());
  }
  return found;
}

// Retained once and never released: others in the process use it as well, and kernels stay loaded in it.
Result<CUcontext> primary_context(const DeviceFacts& facts) {
  static std::array<CUcontext, kMaxDevices> contexts = {};
  static auto* mutex = new std::mutex;
  const std::lock_guard lock(*mutex);
  CUcontext& context = contexts[static_cast<size_t>(facts.index)];
  if (context == nullptr) {
    if (const CUresult result = driver().value()->primary_ctx_retain(&context, facts.handle); result != kCudaSuccess) {
      context = nullptr;
      return driver_error(result, heed::format("cuDevicePrimaryCtxRetain(device {})", facts.index));
    }
  }
  return context;
}

}  // namespace

const Result<std::vector<DeviceFacts>>& devices() {
  static const auto* found = new Result<std::vector<DeviceFacts>>(read_devices());
  return *found;
}

Result<const DeviceFacts*> device_facts(int32_t index) {
  if (!devices().ok()) return devices().status();
  const std::vector<DeviceFacts>& all = devices().value();
  if (index < 0 || static_cast<size_t>(index) >= all.size()) {
    return invalid_argument(
        heed::format("device_index = {}: must be from 0 to {}, the GPUs of this machine", index, all.size() - 1));
  }
  return &all[static_cast<size_t>(index)];
}

Result<DeviceFacts> typical_device(std::string_view architecture) {
  struct Typical {
    const char* name;
    int32_t major, minor, multiprocessors;
    int64_t l2_mib;
  };
  constexpr Typical kTypical[] = {{"sm_80", 8, 0, 108, 40},  {"sm_86", 8, 6, 84, 6},      {"sm_89", 8, 9, 128, 72},
                                  {"sm_90a", 9, 0, 132, 50}, {"sm_100", 10, 0, 148, 126}, {"sm_120", 12, 0, 170, 96}};
  std::string known;
  for (const Typical& typical : kTypical) {
    known += heed::format("{}{}", known.empty() ? "" : ", ", typical.name);
    if (architecture != typical.name) continue;
    DeviceFacts facts;
    facts.name = heed::format("a device of {}", typical.name);
    facts.major = typical.major;
    facts.minor = typical.minor;
    facts.multiprocessors = typical.multiprocessors;
    for (const Architecture& arch : kArchitectures)
      if (architecture == arch.name) facts.shared_per_block = arch.shared_limit;
    facts.l2_bytes = typical.l2_mib << 20;
    return facts;
  }
  return invalid_argument(heed::format("architecture = \"{}\": must be one of {}", architecture, known));
}

int32_t current_device() {
  if (!driver().ok()) return 0;
  const Driver& cuda = *driver().value();
  CUcontext context = nullptr;
  CUdevice device = 0;
  if (cuda.ctx_get_current(&context) != kCudaSuccess || context == nullptr) return 0;
  return cuda.ctx_get_device(&device) == kCudaSuccess ? device : 0;  // a device's handle is its index
}

ContextScope::ContextScope(int32_t device_index) {
  const Result<const DeviceFacts*> facts = device_facts(device_index);
  if (!facts.ok()) {
    status_ = facts.status();
    return;
  }
  const Driver& cuda = *driver().value();
  CUdevice current = 0;
  CUcontext context = nullptr;
  if (cuda.ctx_get_current(&context) == kCudaSuccess && context != nullptr &&
      cuda.ctx_get_device(&current) == kCudaSuccess && current == facts.value()->handle) {
    return;
  }
  const Result<CUcontext> primary = primary_context(*facts.value());
  if (!primary.ok()) {
    status_ = primary.status();
    return;
  }
  if (const CUresult result = cuda.ctx_push_current(primary.value()); result != kCudaSuccess)
    status_ = driver_error(result, heed::format("cuCtxPushCurrent(primary context of device {})", device_index));
  else
    pushed_ = true;
}

ContextScope::~ContextScope() {
  CUcontext context = nullptr;
  if (pushed_) driver().value()->ctx_pop_current(&context);
}

Result<bool> is_capturing(CUstream stream) {
  int32_t status = 0;
  if (const CUresult result = driver().value()->stream_is_capturing(stream, &status); result != kCudaSuccess)
    return driver_error(result, heed::format("cuStreamIsCapturing({})", static_cast<const void*>(stream)));
  return status != 0;  // 1: capturing, 2: a capture that has gone wrong
}

}  // namespace heed::cuda
