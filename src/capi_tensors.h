// heed_tensors of a call: each is checked by itself and against the others, sizes are collected on the way.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>

#include "base/format.h"
#include "base/status.h"
#include "heed/core.h"
#include "ops/attention.h"
#include "ops/kv_append.h"

namespace heed {

// What the dimensions of tensors count.
// clang-format off
enum class Dim : int32_t {
  kBatch,
  kTotalQ, kTotalK, kTotalNew,                                // packed rows
  kSeqlenQ, kSeqlenK, kSeqlenNew,
  kNheadsQ, kNheadsKv, kHeadDim, kHeadDimV,
  kNumPages, kPageSize, kMaxPages, kCacheRows,
  kRotaryRows, kRotaryPairs,
  kCount
};
// clang-format on

inline bool present(const heed_tensor& tensor) { return tensor.dtype != HEED_DTYPE_NONE; }

// Sizes as the tensors state them. The first tensor with a dimension sets it, the others have to agree.
class Extents {
 public:
  // `dims` in the order of the tensor's shape. Also checks the tensor by itself; the last stride has to be 1 unless
  // `any_last_stride`.
  Status bind(const char* name, const heed_tensor& tensor, std::initializer_list<Dim> dims,
              bool any_last_stride = false);
  // The same for a tensor whose dimensions may be 1 instead (bias, mask).
  Status bind_broadcast(const char* name, const heed_tensor& tensor, std::initializer_list<Dim> dims);
  // i32 [batch + 1].
  Status bind_offsets(const char* name, const heed_tensor& tensor);

  bool known(Dim dim) const { return source(dim).tensor != nullptr; }
  int64_t operator[](Dim dim) const { return source(dim).value; }
  void set(Dim dim, int64_t value, const char* tensor, int index) { source(dim) = {value, tensor, index, 0}; }

 private:
  struct Source {
    int64_t value = 0;
    const char* tensor = nullptr;
    int32_t index = 0;
    int32_t one_less = 0;  // offsets: the size is one less than the extent
  };
  const Source& source(Dim dim) const { return sources_[static_cast<size_t>(dim)]; }
  Source& source(Dim dim) { return sources_[static_cast<size_t>(dim)]; }
  Status agree(const char* name, int index, int64_t extent, Dim dim, int32_t one_less);

  std::array<Source, static_cast<size_t>(Dim::kCount)> sources_ = {};
};

// Dtype in range, sizes and strides not negative, the last stride 1. Vectors: also contiguous.
Status check_tensor(const char* name, const heed_tensor& tensor, int32_t ndim);
Status check_dtype(const char* name, const heed_tensor& tensor, Dtype want);
Status check_contiguous(const char* name, const heed_tensor& tensor);
Status required(const char* name, const heed_tensor& tensor, const char* why);
Status absent(const char* name, const heed_tensor& tensor, const char* why);
Status check_enum(const char* name, int32_t value, int32_t count, const char* allowed);
Status check_batch_vector(const char* name, const heed_tensor& tensor, Extents& extents);  // i32 [batch], may be absent

// The calling threads: the executor, checked; null means heed's pool. Then how many of its threads may be used.
Status resolve_executor(const heed_executor*& executor, int32_t num_threads, int32_t& threads);

// Which CUDA device: as said, or for -1 the calling thread's current one.
Status resolve_device(int32_t device_index, int32_t num_threads, int32_t& resolved, const char* name = "device_index");

// Device and threads of a problem.
template <class CArgs, class Problem>
Status resolve_place(const CArgs& args, Problem& problem) {
  if (args.device == HEED_DEVICE_CUDA) return resolve_device(args.device_index, args.num_threads, problem.device_index);
  if (args.device_index != 0 && args.device_index != -1) {
    return invalid_argument(heed::format("device_index = {}: must be 0 or -1 with device 0 (cpu)", args.device_index));
  }
  const heed_executor* executor = args.executor;
  return resolve_executor(executor, args.num_threads, problem.threads);
}

// Strides of a tensor with dimensions in `layout`, in the order (b, h, s, d).
std::array<int64_t, 4> strides_bhsd(const heed_tensor& tensor, Layout layout);

// Puts a tensor's strides and alignment into the problem. Strides that no address uses (sizes 0 and 1) become those of
// a contiguous tensor, so that equal questions have equal keys.
template <class Problem, class SlotOf>
void place(Problem& problem, SlotOf slot, std::array<int64_t, 4> strides, const void* data) {
  const std::array<int64_t, 4> shape = slot_shape(problem, slot);
  const bool empty = shape[0] == 0 || shape[1] == 0 || shape[2] == 0 || shape[3] == 0;
  if (empty || shape[0] == 1 || shape[1] == 1 || shape[2] == 1 || shape[3] == 1) {
    const std::array<int64_t, 4> contiguous = contiguous_strides(problem, slot);
    for (size_t dim = 0; dim < 4; ++dim) {
      if (empty || shape[dim] == 1) strides[dim] = contiguous[dim];
    }
  }
  problem.strides(slot) = strides;
  problem.align[static_cast<size_t>(slot)] = natural_align(problem, slot, data);
}

}  // namespace heed
