#include "cuda/stream_memory.h"

#include <algorithm>
#include <array>
#include <bit>
#include <mutex>

#include "base/format.h"
#include "cuda/device.h"

namespace heed::cuda {
namespace {

constexpr size_t kLeastKept = 4096, kMostKept = size_t{4} << 20;  // bytes of a block
constexpr size_t kMostStreams = 16;                               // later ones go without
// One handle for as many streams as there are threads.
const auto kPerThreadStream = reinterpret_cast<void*>(uintptr_t{2});

// A block and whose it is. Ids, unlike handles, are never given again.
struct Slot {
  uint64_t context = 0, stream = 0;
  CUdeviceptr memory = 0;
  size_t bytes = 0;
  bool taken = false;  // by a call that is putting its work into the stream: a second one must not come between
};

struct Slots {
  std::mutex mutex;
  std::array<Slot, kMostStreams> all;
  size_t count = 0;
};

Slots& slots() {
  static auto* made = new Slots;  // outlives every thread that may still call at exit
  return *made;
}

CUdeviceptr address(const void* pointer) { return reinterpret_cast<CUdeviceptr>(pointer); }

CUresult allocate(size_t bytes, CUstream stream, CUdeviceptr& memory) {
  return driver().value()->mem_alloc_async(&memory, bytes, stream);
}

// Asked of a stream that is being captured, or while another thread captures one, either question would end that capture
// with an error (seen on driver 580): captures are told not to mind.
bool identify(CUstream stream, uint64_t& context_id, uint64_t& stream_id) {
  const Driver& cuda = *driver().value();
  constexpr int32_t kRelaxed = 2;
  int32_t mode = kRelaxed;
  CUcontext context = nullptr;
  if (cuda.thread_exchange_stream_capture_mode(&mode) != kCudaSuccess) return false;
  const bool known = cuda.ctx_get_current(&context) == kCudaSuccess &&
                     cuda.ctx_get_id(context, &context_id) == kCudaSuccess &&
                     cuda.stream_get_id(stream, &stream_id) == kCudaSuccess;
  return cuda.thread_exchange_stream_capture_mode(&mode) == kCudaSuccess && known;
}

// A block of the stream's own; none where it cannot have one now. What a graph uses has to be the graph's.
StreamBlock take_kept(size_t bytes, CUstream stream) {
  const Driver& cuda = *driver().value();
  int32_t capturing = 0;
  if (bytes > kMostKept || stream == kPerThreadStream || cuda.stream_is_capturing(stream, &capturing) != kCudaSuccess ||
      capturing != 0) {
    return {};
  }
  uint64_t context_id = 0, stream_id = 0;
  if (!identify(stream, context_id, stream_id)) return {};
  Slots& kept = slots();
  const std::lock_guard lock(kept.mutex);
  size_t i = 0;
  while (i < kept.count && (kept.all[i].context != context_id || kept.all[i].stream != stream_id)) ++i;
  if (i == kMostStreams || (i < kept.count && kept.all[i].taken)) return {};
  Slot& slot = kept.all[i];
  if (i == kept.count) {
    slot.context = context_id;
    slot.stream = stream_id;
    ++kept.count;
  }
  if (slot.bytes < bytes) {
    if (slot.bytes > 0) cuda.mem_free_async(slot.memory, stream);
    slot.bytes = 0;
    const size_t rounded = std::bit_ceil(std::max(bytes, kLeastKept));
    if (allocate(rounded, stream, slot.memory) != kCudaSuccess) return {};
    slot.bytes = rounded;
  }
  slot.taken = true;
  return {reinterpret_cast<void*>(slot.memory), static_cast<int32_t>(i)};
}

}  // namespace

Status allocate_on_stream(int32_t device_index, size_t bytes, void* stream, StreamBlock& block) {
  const ContextScope scope(device_index);
  if (!scope.status().ok()) return scope.status();
  block = take_kept(bytes, static_cast<CUstream>(stream));
  if (block.pointer != nullptr) return {};
  CUdeviceptr made = 0;
  if (const CUresult result = allocate(bytes, static_cast<CUstream>(stream), made); result != kCudaSuccess) {
    return driver_error(result,
                        heed::format("cuMemAllocAsync({} bytes, stream {}, device {})", bytes, stream, device_index));
  }
  block.pointer = reinterpret_cast<void*>(made);
  return {};
}

Status release_on_stream(int32_t device_index, const StreamBlock& block, void* stream) {
  if (block.slot >= 0) {
    Slots& kept = slots();
    const std::lock_guard lock(kept.mutex);
    kept.all[static_cast<size_t>(block.slot)].taken = false;
    return {};
  }
  const ContextScope scope(device_index);
  if (!scope.status().ok()) return scope.status();
  const CUresult result = driver().value()->mem_free_async(address(block.pointer), static_cast<CUstream>(stream));
  return result == kCudaSuccess ? Status()
                                : driver_error(result, heed::format("cuMemFreeAsync({}, stream {}, device {})",
                                                                    block.pointer, stream, device_index));
}

}  // namespace heed::cuda
