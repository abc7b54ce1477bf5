#include "check/guarded_tensor.h"

#include <cstring>

#include "base/format.h"
#include "cuda/memory.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace heed::check {
namespace {

constexpr int64_t kGuardBytes = 128;
constexpr int64_t kMaxAlign = 128;
constexpr unsigned char kPoison = 0xff;        // all ones is NaN in every float dtype, -1 in i32
constexpr unsigned char kGuardPattern = 0xa5;  // around outputs: NaN there would hide a NaN written

int64_t count(const std::array<int64_t, 4>& shape) { return shape[0] * shape[1] * shape[2] * shape[3]; }

}  // namespace

GuardedTensor::GuardedTensor(std::string name, Dtype dtype, const std::array<int64_t, 4>& shape,
                             const std::array<int64_t, 4>& stride, int64_t align, Role role)
    : name_(std::move(name)),
      dtype_(dtype),
      shape_(shape),
      stride_(stride),
      role_(role),
      pattern_(role == Role::kInput ? kPoison : kGuardPattern) {
  const int64_t elements = count(shape);
  if (elements > 0) {
    span_ = 1;
    for (int dim = 0; dim < 4; ++dim) span_ += (shape[dim] - 1) * stride[dim];
  }
  gapless_ = span_ <= elements;
  const int64_t bytes = span_ * dtype_bytes(dtype);
  storage_.assign(bytes + 2 * kGuardBytes + 2 * kMaxAlign, pattern_);
  const auto address = reinterpret_cast<uintptr_t>(storage_.data()) + kGuardBytes;
  const uintptr_t aligned = (address + kMaxAlign - 1) / kMaxAlign * kMaxAlign + (align < kMaxAlign ? align : 0);
  base_ = storage_.data() + (aligned - reinterpret_cast<uintptr_t>(storage_.data()));
  if (!gapless_) {
    element_.assign(span_, false);
    for_each_element(*this,
                     [&](int64_t, int64_t offset, int64_t, int64_t, int64_t, int64_t) { element_[offset] = true; });
  }
  if (role == Role::kOutput) static_cast<void>(poison().ok());  // host memory only: cannot fail
  guard_reads(true);
}

GuardedTensor::~GuardedTensor() {
  guard_reads(false);
  // Freed or, where the device is in error already, beyond use: nobody is left to tell.
  if (device_memory_ != nullptr) static_cast<void>(cuda::release(device_index_, device_memory_).ok());
}

Status GuardedTensor::move_to_device(int32_t device_index) {
  guard_reads(false);
  device_index_ = device_index;
  HEED_RETURN_IF_ERROR(cuda::allocate(device_index, storage_.size() + kMaxAlign, device_memory_));
  const auto host = reinterpret_cast<uintptr_t>(storage_.data()), device = reinterpret_cast<uintptr_t>(device_memory_);
  mirror_ = static_cast<unsigned char*>(device_memory_) + (host - device) % kMaxAlign;
  return cuda::copy_to_device(device_index_, mirror_, storage_.data(), storage_.size());
}

void GuardedTensor::guard_reads([[maybe_unused]] bool on) const {
#if defined(__SANITIZE_ADDRESS__)
  const unsigned char* const end = base_ + span_ * dtype_bytes(dtype_);
  const unsigned char* const storage_end = storage_.data() + storage_.size();
  if (on && device_memory_ == nullptr) {  // what is copied to and from a device is copied whole
    ASAN_POISON_MEMORY_REGION(storage_.data(), base_ - storage_.data());
    ASAN_POISON_MEMORY_REGION(end, storage_end - end);
  } else {
    ASAN_UNPOISON_MEMORY_REGION(storage_.data(), storage_.size());
  }
#endif
}

uint64_t GuardedTensor::checksum(const std::vector<unsigned char>& storage) {
  uint64_t hash = 0xcbf29ce484222325u;  // FNV-1a, eight bytes a step
  size_t i = 0;
  for (; i + 8 <= storage.size(); i += 8) {
    uint64_t word;
    std::memcpy(&word, storage.data() + i, 8);
    hash = (hash ^ word) * 0x100000001b3u;
  }
  for (; i < storage.size(); ++i) hash = (hash ^ storage[i]) * 0x100000001b3u;
  return hash;
}

void GuardedTensor::seal() {
  guard_reads(false);
  sealed_ = checksum(storage_);
  if (role_ == Role::kUpdated) initial_ = storage_;
  guard_reads(true);
}

// A run begins: inputs that the caller has changed since are what must not change now.
Status GuardedTensor::poison() {
  const int64_t width = dtype_bytes(dtype_);
  if (role_ == Role::kInput) {
    if (device_memory_ != nullptr) {
      HEED_RETURN_IF_ERROR(cuda::copy_to_host(device_index_, storage_.data(), mirror_, storage_.size()));
    }
    seal();
    return {};
  }
  if (role_ == Role::kUpdated && !initial_.empty()) {
    const int64_t first = base_ - storage_.data();
    std::memcpy(base_, initial_.data() + first, span_ * width);
  } else if (role_ == Role::kOutput && gapless_) {
    std::memset(base_, kPoison, span_ * width);
  } else if (role_ == Role::kOutput) {
    for (int64_t n = 0; n < span_; ++n) {
      if (element_[n]) std::memset(base_ + n * width, kPoison, width);
    }
  }
  if (device_memory_ == nullptr) return {};
  return cuda::copy_to_device(device_index_, mirror_, storage_.data(), storage_.size());
}

Status GuardedTensor::check() const {
  if (device_memory_ != nullptr) {
    std::vector<unsigned char> now(storage_.size());
    HEED_RETURN_IF_ERROR(cuda::copy_to_host(device_index_, now.data(), mirror_, now.size()));
    return check(now);
  }
  guard_reads(false);
  Status status = check(storage_);
  guard_reads(true);
  return status;
}

Status GuardedTensor::check(const std::vector<unsigned char>& storage) const {
  if (role_ == Role::kInput) {
    if (checksum(storage) == sealed_) return {};
    return invalid_argument(heed::format("{}: an input, or memory beside it, changed", name_));
  }
  const int64_t width = dtype_bytes(dtype_), before = base_ - storage_.data();
  for (int64_t i = 0; i < static_cast<int64_t>(storage.size()); ++i) {
    const int64_t byte = i - before;
    if (byte >= 0 && byte < span_ * width && is_element(byte / width)) continue;
    if (storage[i] == pattern_) continue;
    return invalid_argument(heed::format("{}: byte {} from its first element, which is {}, was written", name_, byte,
                                         byte < 0                ? "before the tensor"
                                         : byte >= span_ * width ? "past its end"
                                                                 : "in a gap between its elements"));
  }
  return {};
}

}  // namespace heed::check
