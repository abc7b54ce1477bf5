// A tensor with guards: 128 bytes on either side and every gap between its elements hold a pattern, so that a byte
// written where it should not be is found, and what is read there is NaN. It is made in host memory; for a GPU it has a
// mirror in the device's, guards included, which the run then works on.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "base/status.h"

namespace heed::check {

enum class Role {
  kInput,   // guards and gaps hold NaN; nothing in it may change
  kOutput,  // guards and gaps hold a pattern; poison() fills the elements with NaN (integers: -1)
  kUpdated  // read and written: poison() restores what seal() saw
};

class GuardedTensor {
 public:
  // The base address is a multiple of `align` bytes and, below 128, of no larger power of two.
  GuardedTensor(std::string name, Dtype dtype, const std::array<int64_t, 4>& shape,
                const std::array<int64_t, 4>& stride, int64_t align, Role role);
  ~GuardedTensor();
  GuardedTensor(const GuardedTensor&) = delete;
  GuardedTensor& operator=(const GuardedTensor&) = delete;

  const std::string& name() const { return name_; }
  Dtype dtype() const { return dtype_; }
  const std::array<int64_t, 4>& shape() const { return shape_; }
  const std::array<int64_t, 4>& stride() const { return stride_; }
  void* data() const { return base_; }
  int64_t offset(int64_t a, int64_t b, int64_t c, int64_t d) const {
    return a * stride_[0] + b * stride_[1] + c * stride_[2] + d * stride_[3];
  }
  void store(int64_t offset, double value) { store_from_double(base_, dtype_, offset, value); }

  void seal();  // the inputs are filled: remember them
  Status poison();
  Status check() const;  // which byte changed that should not have

  // From now on runs work on a copy in this GPU's memory, at the same address modulo 128.
  Status move_to_device(int32_t device_index);
  void* device_data() const { return mirror_ + (base_ - storage_.data()); }  // after move_to_device

 private:
  Status check(const std::vector<unsigned char>& storage) const;
  static uint64_t checksum(const std::vector<unsigned char>& storage);
  bool is_element(int64_t offset) const { return gapless_ || (offset < span_ && element_[offset]); }
  void guard_reads(bool on) const;  // under the address sanitizer, guards cannot be read either

  std::string name_;
  Dtype dtype_;
  std::array<int64_t, 4> shape_, stride_;
  Role role_;
  unsigned char pattern_;
  std::vector<unsigned char> storage_, initial_;
  unsigned char* base_ = nullptr;
  int64_t span_ = 0;  // elements from the first to the last, gaps included
  bool gapless_ = true;
  std::vector<bool> element_;  // of the span, where there are gaps
  uint64_t sealed_ = 0;

  int32_t device_index_ = 0;
  void* device_memory_ = nullptr;    // what was allocated; null: the tensor is in host memory
  unsigned char* mirror_ = nullptr;  // storage_'s first byte in it
};

// body(index, offset, a, b, c, d) for every element, index row-major.
template <class Body>
void for_each_element(const GuardedTensor& tensor, Body&& body) {
  const auto& shape = tensor.shape();
  int64_t index = 0;
  for (int64_t a = 0; a < shape[0]; ++a) {
    for (int64_t b = 0; b < shape[1]; ++b) {
      for (int64_t c = 0; c < shape[2]; ++c) {
        for (int64_t d = 0; d < shape[3]; ++d, ++index) body(index, tensor.offset(a, b, c, d), a, b, c, d);
      }
    }
  }
}

}  // namespace heed::check
