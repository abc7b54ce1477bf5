// Python arrays as heed_tensors, without a copy: PyTorch and others by DLPack's C exchange functions (some 30 ns),
// NumPy by its array interface (bf16 of ml_dtypes, read-only arrays), anything else by __dlpack__.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>

#include "heed/heed.h"
#include "tensor_names.h"

namespace heed_python {

namespace nb = nanobind;

struct ImportedTensor {
  heed_tensor tensor = {};
  heed_device device = HEED_DEVICE_CPU;
  int32_t device_index = 0;
  bool read_only = false;
  nb::object owner;  // keeps what __dlpack__ gave alive; empty where the array itself is enough
};

// `name` is the argument's, for errors. The array has to outlive the result.
ImportedTensor import_tensor(nb::handle array, const char* name, Expected expected, bool is_output);

// The CUstream on which the array's framework works now; null where the framework does not say.
void* current_stream(nb::handle array, heed_device device, int32_t device_index);

}  // namespace heed_python
