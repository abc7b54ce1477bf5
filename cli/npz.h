// NumPy's .npz format: a zip archive with one .npy a tensor, stored or deflated. Read and written through libzip.
#pragma once

#include "tensor.h"

namespace heed::cli {

std::vector<std::string> npz_names(const std::string& path);  // without the ".npy" at their ends
Tensor read_npz_tensor(const std::string& path, const std::string& name);
void write_npz(const std::string& path, const NamedTensors& tensors);

}  // namespace heed::cli
