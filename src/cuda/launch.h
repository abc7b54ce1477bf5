// One kernel launch: what the plan fixed, and the parameter block of this run.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "base/status.h"
#include "cuda/driver.h"
#include "cuda/kernels/params.h"
#include "cuda/variants.h"

namespace heed::cuda {

// Of sequence, head and row, as kernels take them.
inline Strides3 strides3(const std::array<int64_t, 4>& s) { return {s[0], s[1], s[2]}; }

struct Launch {
  std::string name;  // for messages: the kernel's template and its variant
  CUkernel kernel = nullptr;
  uint32_t blocks = 0;
  uint32_t threads = 0;
  uint32_t shared_bytes = 0;       // dynamic
  bool overlaps_previous = false;  // may begin before the launch ahead of it has ended: the kernel waits by itself
};

// The variant's kernel, compiled or found, ready for this device.
Result<Launch> prepare_launch(const KernelVariant& variant, int64_t blocks, CUdevice device);

// Puts it into the stream. `parameters` is the kernel's one argument, copied before this returns.
Status launch(const Launch& launch, const void* parameters, CUstream stream);

}  // namespace heed::cuda
