// The safetensors format: eight bytes of header length, a JSON object name -> {dtype, shape, data_offsets}, the data.
#pragma once

#include "tensor.h"

namespace heed::cli {

class InputFile;

struct SafetensorsEntry {
  std::string dtype;  // as written: "BF16"; some that heed cannot use are legal in a file
  std::vector<int64_t> shape;
  uint64_t begin = 0, end = 0;  // in the data, which starts at SafetensorsIndex::data_offset
};

struct SafetensorsIndex {
  std::map<std::string, SafetensorsEntry> entries;
  uint64_t data_offset = 0;
};

constexpr uint64_t kMaxSafetensorsHeaderBytes = 100'000'000;  // the format's own limit

// The header's length from a file's first eight bytes, checked against the file's size. Throws FileError.
uint64_t safetensors_header_bytes(std::span<const std::byte> first_bytes, uint64_t file_bytes);
// `header`: the JSON text. Checks that the entries fill the file's data without overlap or hole.
SafetensorsIndex parse_safetensors_header(std::span<const std::byte> header, uint64_t file_bytes);
// The element type of an entry, or a FileError that names what there is.
ElementType safetensors_type(const SafetensorsEntry& entry, std::string_view name);

NamedTensors read_safetensors(std::span<const std::byte> file);  // every tensor; those of unusable dtype are left out
SafetensorsIndex read_safetensors_index(const InputFile& file);
Tensor read_safetensors_tensor(const InputFile& file, const SafetensorsIndex& index, const std::string& name);
std::vector<std::byte> make_safetensors_header(const NamedTensors& tensors, std::vector<const Tensor*>& order);

}  // namespace heed::cli
