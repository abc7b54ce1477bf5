// NumPy's .npy format, versions 1 to 3: magic, version, header length, a Python dictionary as text, then the elements.
// bfloat16 has no descriptor of its own: it is read and written as the two-byte void '<V2', as ml_dtypes does.
#pragma once

#include "tensor.h"

namespace heed::cli {

class InputFile;

struct NpyHeader {
  ElementType type = ElementType::kF32;
  bool fortran_order = false;
  std::vector<int64_t> shape;
  size_t data_offset = 0;
  size_t data_bytes = 0;
};

// No header is longer than this (version 1 cannot be; NumPy itself refuses above 10,000 characters).
constexpr size_t kMaxNpyHeaderBytes = 65536 + 12;

// `prefix`: the first kMaxNpyHeaderBytes of the file, or all of it. Throws FileError.
NpyHeader parse_npy_header(std::span<const std::byte> prefix);
Tensor read_npy(std::span<const std::byte> file);
Tensor read_npy(const InputFile& file);
std::vector<std::byte> make_npy_header(ElementType type, std::span<const int64_t> shape);

}  // namespace heed::cli
