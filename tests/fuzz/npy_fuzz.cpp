// Any bytes as a .npy file: a tensor or a FileError; and what was read, written again, reads as the same.
#include "npy.h"

#include <cstdlib>
#include <cstring>

using namespace heed::cli;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t size) {
  Tensor tensor;
  try {
    tensor = read_npy({reinterpret_cast<const std::byte*>(bytes), size});
  } catch (const FileError&) {
    return 0;
  }
  std::vector<std::byte> file = make_npy_header(tensor.type, tensor.shape);
  if (file.size() % 64 != 0) std::abort();
  file.insert(file.end(), tensor.data.data(), tensor.data.data() + tensor.data.size());
  const Tensor again = read_npy(file);
  if (again.type != tensor.type || again.shape != tensor.shape || again.data.size() != tensor.data.size()) std::abort();
  if (std::memcmp(again.data.data(), tensor.data.data(), tensor.data.size()) != 0) std::abort();
  return 0;
}
