// The problem that this thread's last call posed. Most calls pose it again, of other addresses: to compare the arguments is
// a small part of the work of reading them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cuda/device.h"
#include "heed/attention.h"
#include "ops/attention.h"
#include "ops/tensor_layout.h"

namespace heed {

// Do two addresses promise the same alignment? NULL promises all of it.
inline bool aligned_alike(const void* a, const void* b) {
  return (a == nullptr) == (b == nullptr) &&
         ((reinterpret_cast<uintptr_t>(a) ^ reinterpret_cast<uintptr_t>(b)) & (kMaxAlign - 1)) == 0;
}

// Do the bytes [begin, end) of two structs agree?
template <class Struct>
bool same_bytes(const Struct& a, const Struct& b, size_t begin, size_t end) {
  return std::memcmp(reinterpret_cast<const char*>(&a) + begin, reinterpret_cast<const char*>(&b) + begin,
                     end - begin) == 0;
}

// Do two structs ask the same of tensors that differ in their addresses at most? False may be said of any two.
inline bool same_question(const heed_attention_args& a, const heed_attention_args& b) {
  using Args = heed_attention_args;
  static_assert(offsetof(Args, has_softmax_scale) == offsetof(Args, status) + sizeof(heed_tensor));
  constexpr size_t kFirst = offsetof(Args, q), kEnd = offsetof(Args, has_softmax_scale);
  if (!same_bytes(a, b, offsetof(Args, pass), kFirst) || !same_bytes(a, b, kEnd, offsetof(Args, dropout_seed)) ||
      !same_bytes(a, b, offsetof(Args, num_threads), sizeof(Args))) {
    return false;
  }
  for (size_t at = kFirst; at < kEnd; at += sizeof(heed_tensor)) {
    heed_tensor x, y;
    std::memcpy(&x, reinterpret_cast<const char*>(&a) + at, sizeof x);
    std::memcpy(&y, reinterpret_cast<const char*>(&b) + at, sizeof y);
    if (x.dtype == HEED_DTYPE_NONE && y.dtype == HEED_DTYPE_NONE) continue;
    if (!aligned_alike(x.data, y.data) || !same_bytes(x, y, offsetof(heed_tensor, dtype), sizeof x)) return false;
  }
  return true;
}

// What a call takes from its thread's surroundings, besides the arguments.
inline bool same_place(const heed_attention_args& args, const AttentionProblem& problem) {
  if (args.device == HEED_DEVICE_CUDA) return args.device_index != -1 || cuda::current_device() == problem.device_index;
  return args.executor == nullptr;  // heed's pool never changes
}

class PosedProblem {
 public:
  // True, and the problem of these arguments, if they pose the one that is kept.
  bool find(const heed_attention_args& args, AttentionProblem& problem) const {
    if (!known_ || !same_question(args, args_) || !same_place(args, problem_)) return false;
    problem = problem_;
    return true;
  }
  // Keeps what was read of the arguments without an error. A caller's executor may change what it says of itself.
  void keep(const heed_attention_args& args, const AttentionProblem& problem) {
    args_ = args;
    problem_ = problem;
    known_ = args.device == HEED_DEVICE_CUDA || args.executor == nullptr;
  }

 private:
  bool known_ = false;
  heed_attention_args args_ = {};
  AttentionProblem problem_;
};

}  // namespace heed
