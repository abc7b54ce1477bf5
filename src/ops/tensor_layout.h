// What every op checks of a strided tensor: strides, overlap, alignment, and that no offset leaves 64 bits.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>

#include "base/dtype.h"
#include "base/status.h"

namespace heed {

// Positions, windows, chunks and single extents stay below this, so that sums of a few of them fit in 64 bits.
constexpr int64_t kMaxExtent = int64_t{1} << 60;
// The most that is asked of an address, bytes.
constexpr int64_t kMaxAlign = 128;

struct TensorLayout {
  std::string_view name;
  Dtype dtype = Dtype::kNone;
  std::array<int64_t, 4> shape = {1, 1, 1, 1};
  std::array<int64_t, 4> stride = {};
  uint8_t dims = 0;        // bit i: the tensor has dimension i; strides of the others are 0
  int inner = 3;           // the dimension that is contiguous in memory
  bool unit_inner = true;  // whether its stride has to be 1
  bool output = false;     // no two elements may share an address
};

// b, h, s, d and so on as bits of TensorLayout::dims.
constexpr uint8_t kDims4 = 0b1111, kDims3 = 0b0111, kDims2 = 0b0011;

bool has_elements(const std::array<int64_t, 4>& shape);
// Strides of a tensor whose dimensions lie in memory in `order`, outermost first; 0 where `dims` lacks the dimension.
// Wraps where the sizes overflow: check_layout refuses those.
std::array<int64_t, 4> packed_strides(const std::array<int64_t, 4>& shape, uint8_t dims,
                                      const std::array<int, 4>& order);
int32_t natural_align(const TensorLayout& tensor, const void* address);
Status check_layout(const TensorLayout& tensor, int32_t align);

Status check_range(std::string_view name, int64_t value, int64_t low, int64_t high);

// One pointer of a run against its tensor: there iff the problem has it, aligned as promised.
Status missing_pointer(std::string_view what);
Status unexpected_pointer(std::string_view what);
Status misaligned_pointer(std::string_view what, const void* pointer, int64_t align);
Status check_workspace(const void* workspace, size_t workspace_bytes, size_t needed);

}  // namespace heed
