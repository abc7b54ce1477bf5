// Kernels compiled before anyone runs them, into the disk cache. Needs NVRTC; neither GPU nor driver where the
// architecture is named.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "base/status.h"
#include "cuda/variants.h"
#include "heed/core.h"
#include "ops/attention.h"
#include "ops/kv_append.h"

namespace heed::cuda {

using AnyProblem = std::variant<AttentionProblem, KvAppendProblem>;

// A kernel for one architecture.
struct WantedKernel {
  KernelKey key;
  std::string arch;  // "sm_90a"

  bool operator==(const WantedKernel& other) const;
};

// Adds what a problem launches, each kernel once. `arch` "": on the GPU that it names; else on the usual GPU of that
// architecture. not_supported where no GPU row takes it.
Status add_kernels(const AnyProblem& problem, std::string_view arch, std::vector<WantedKernel>& wanted);

struct WarmResult {
  int32_t num_kernels = 0;
  int32_t num_compiled = 0;    // by this process; the others came from the disk
  double compile_seconds = 0;  // of all of them, one after another
};

// Brings every kernel into memory and the disk cache, many at a time. `progress` (may be empty) is called once before
// the first and after each, never twice at the same time. All are tried; the first error is returned.
Result<WarmResult> warm(const std::vector<WantedKernel>& kernels, const heed_executor& executor,
                        const std::function<void(int32_t done, const WantedKernel* last)>& progress);

}  // namespace heed::cuda
