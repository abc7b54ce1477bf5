#include "ops/tensor_layout.h"

#include <algorithm>
#include <utility>

#include "base/format.h"

namespace heed {
namespace {

constexpr size_t kWorkspaceAlign = 64;

bool has_dim(const TensorLayout& tensor, int dim) { return (tensor.dims >> dim & 1) != 0; }

// Bytes from the first element to the end of the last, or -1 where that does not fit in 63 bits.
int64_t span_bytes(const TensorLayout& tensor) {
  int64_t last = 0;
  for (int dim = 0; dim < 4; ++dim) {
    int64_t reach = 0;
    if (__builtin_mul_overflow(tensor.shape[dim] - 1, tensor.stride[dim], &reach)) return -1;
    if (__builtin_add_overflow(last, reach, &last)) return -1;
  }
  int64_t bytes = 0;
  if (__builtin_add_overflow(last, int64_t{1}, &last)) return -1;
  if (__builtin_mul_overflow(last, dtype_bytes(tensor.dtype), &bytes)) return -1;
  return bytes;
}

// Sorted by stride, each dimension has to step past everything that the smaller ones cover.
bool overlaps(const TensorLayout& tensor) {
  std::array<std::pair<int64_t, int64_t>, 4> dims;  // (stride, extent)
  for (int dim = 0; dim < 4; ++dim) dims[dim] = {tensor.stride[dim], tensor.shape[dim]};
  std::sort(dims.begin(), dims.end());
  int64_t covered = 0;
  for (const auto& [stride, extent] : dims) {
    if (extent <= 1) continue;
    if (stride <= covered) return true;
    covered += (extent - 1) * stride;
  }
  return false;
}

std::string list(const std::array<int64_t, 4>& numbers) {
  return heed::format("({}, {}, {}, {})", numbers[0], numbers[1], numbers[2], numbers[3]);
}

}  // namespace

bool has_elements(const std::array<int64_t, 4>& shape) {
  return shape[0] > 0 && shape[1] > 0 && shape[2] > 0 && shape[3] > 0;
}

std::array<int64_t, 4> packed_strides(const std::array<int64_t, 4>& shape, uint8_t dims,
                                      const std::array<int, 4>& order) {
  std::array<int64_t, 4> strides = {};
  uint64_t next = 1;
  for (int place = 3; place >= 0; --place) {
    const int dim = order[place];
    if ((dims >> dim & 1) == 0) continue;
    strides[dim] = static_cast<int64_t>(next);
    next *= static_cast<uint64_t>(shape[dim]);
  }
  return strides;
}

int32_t natural_align(const TensorLayout& tensor, const void* address) {
  uint64_t bits = static_cast<uint64_t>(kMaxAlign) | reinterpret_cast<uintptr_t>(address);
  for (int dim = 0; dim < 4; ++dim) {
    if (dim == tensor.inner || tensor.shape[dim] <= 1) continue;  // a stride that no address uses
    bits |= static_cast<uint64_t>(tensor.stride[dim]) * static_cast<uint64_t>(dtype_bytes(tensor.dtype));
  }
  return static_cast<int32_t>(bits & (~bits + 1));
}

Status check_layout(const TensorLayout& tensor, int32_t align) {
  for (int dim = 0; dim < 4; ++dim) {
    const int64_t stride = tensor.stride[dim];
    if (!has_dim(tensor, dim) && stride != 0) {
      return invalid_argument(
          heed::format("strides of {} = {} must be 0 in a dimension that it does not have or broadcasts", tensor.name,
                       list(tensor.stride)));
    }
    if (stride < 0) {
      return invalid_argument(
          heed::format("strides of {} = {} must not be negative", tensor.name, list(tensor.stride)));
    }
  }
  if (tensor.unit_inner && has_dim(tensor, tensor.inner) && tensor.stride[tensor.inner] != 1) {
    return invalid_argument(
        heed::format("strides of {} = {} must be 1 in the last dimension", tensor.name, list(tensor.stride)));
  }
  if (has_elements(tensor.shape)) {
    if (span_bytes(tensor) < 0) {
      return invalid_argument(heed::format("sizes of {} = {} with strides {} must reach less than 2^63 bytes",
                                           tensor.name, list(tensor.shape), list(tensor.stride)));
    }
    if (tensor.output && overlaps(tensor)) {
      return invalid_argument(
          heed::format("strides of {} = {} must give every element of the output {} an address of its own", tensor.name,
                       list(tensor.stride), list(tensor.shape)));
    }
  }
  const int64_t least = dtype_bytes(tensor.dtype);
  if (align < least || align > kMaxAlign || (align & (align - 1)) != 0) {
    return invalid_argument(heed::format("align of {} = {} must be a power of two from {} (one {} element) to {}",
                                         tensor.name, align, least, dtype_name(tensor.dtype), kMaxAlign));
  }
  if (const int32_t natural = natural_align(tensor, nullptr); align > natural) {
    return invalid_argument(heed::format("align of {} = {} must divide its byte strides: at most {} with strides {}",
                                         tensor.name, align, natural, list(tensor.stride)));
  }
  return {};
}

Status check_range(std::string_view name, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return {};
  const std::string limit = high == kMaxExtent ? std::string("2^60") : heed::format("{}", high);
  return invalid_argument(heed::format("{} = {} must be from {} to {}", name, value, low, limit));
}

Status missing_pointer(std::string_view what) {
  return invalid_argument(heed::format("{} = NULL must be an address: the problem has this tensor", what));
}

Status unexpected_pointer(std::string_view what) {
  return invalid_argument(
      heed::format("{} must be NULL: the problem that was planned does not have this tensor", what));
}

Status misaligned_pointer(std::string_view what, const void* pointer, int64_t align) {
  return invalid_argument(heed::format("{} = {:#x} must be a multiple of {} bytes, as the planned problem promises",
                                       what, reinterpret_cast<uintptr_t>(pointer), align));
}

Status check_workspace(const void* workspace, size_t workspace_bytes, size_t needed) {
  if (needed == 0) return {};
  if (workspace == nullptr) {
    return invalid_argument(heed::format("workspace = NULL must be an address: the plan needs {} bytes", needed));
  }
  if (workspace_bytes < needed) {
    return invalid_argument(
        heed::format("workspace_bytes = {} must be at least {}, which the plan needs", workspace_bytes, needed));
  }
  if (reinterpret_cast<uintptr_t>(workspace) % kWorkspaceAlign != 0) {
    return invalid_argument(heed::format("workspace = {:#x} must be a multiple of {} bytes",
                                         reinterpret_cast<uintptr_t>(workspace), kWorkspaceAlign));
  }
  return {};
}

}  // namespace heed
