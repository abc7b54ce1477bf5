// Tensors in files: .npy, .npz and .safetensors, read and written. The readers trust nothing that a file says: every
// length, offset and name is checked against what is there before it is used.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "tensor.h"

namespace heed::cli {

// "FILE" or "FILE:NAME". The colon counts only after one of the three endings, so that paths may hold colons.
struct TensorRef {
  std::string path;
  std::string name;  // empty: the file's only tensor
};
TensorRef parse_tensor_ref(std::string_view text);

// The names in a file; a .npy file holds one tensor, named "".
std::vector<std::string> tensor_names(const std::string& path);
Tensor read_tensor(const TensorRef& ref);
// Format by the path's ending. A .npy file takes exactly one tensor.
void write_tensors(const std::string& path, const NamedTensors& tensors);

}  // namespace heed::cli
