// Any bytes as a .safetensors file: tensors or a FileError; and what was read, written again, reads as the same.
#include "safetensors.h"

#include <cstdlib>
#include <cstring>

using namespace heed::cli;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t size) {
  NamedTensors tensors;
  try {
    tensors = read_safetensors({reinterpret_cast<const std::byte*>(bytes), size});
  } catch (const FileError&) {
    return 0;
  }
  std::vector<const Tensor*> order;
  std::vector<std::byte> file = make_safetensors_header(tensors, order);
  for (const Tensor* tensor : order)
    file.insert(file.end(), tensor->data.data(), tensor->data.data() + tensor->data.size());
  const NamedTensors again = read_safetensors(file);
  if (again.size() != tensors.size()) std::abort();
  for (const auto& [name, tensor] : tensors) {
    const Tensor& copy = again.at(name);
    if (copy.type != tensor.type || copy.shape != tensor.shape || copy.data.size() != tensor.data.size()) std::abort();
    if (std::memcmp(copy.data.data(), tensor.data.data(), tensor.data.size()) != 0) std::abort();
  }
  return 0;
}
