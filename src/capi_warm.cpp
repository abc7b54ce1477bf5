// heed_warm: GPU kernels compiled ahead of time.
#include <string_view>
#include <vector>

#include "capi_error.h"
#include "capi_handles.h"
#include "capi_tensors.h"
#include "cuda/warm.h"

namespace heed {
namespace {

Status warm(const heed_problem* const* problems, int32_t num_problems, const heed_warm_options* options,
            heed_warm_result* result) {
  if (num_problems < 0) return invalid_argument(heed::format("num_problems = {}: must be 0 or more", num_problems));
  if (problems == nullptr && num_problems > 0)
    return invalid_argument(heed::format("problems = NULL: must be the address of {} problems", num_problems));
  heed_warm_options chosen = {};
  if (options != nullptr) {
    HEED_RETURN_IF_ERROR(check_struct(options, "options"));
    chosen = *options;
  }
  int32_t threads = 0;
  HEED_RETURN_IF_ERROR(resolve_executor(chosen.executor, 0, threads));
  if (result != nullptr) HEED_RETURN_IF_ERROR(check_struct(result, "result"));
  for (int32_t i = 0; i < num_problems; ++i) {
    if (problems[i] == nullptr) return invalid_argument(heed::format("problems[{}] = NULL: must be a problem", i));
  }
  std::vector<cuda::WantedKernel> kernels;
  Status first;  // a problem that has no kernel does not keep the others from theirs
  for (int32_t i = 0; i < num_problems; ++i) {
    Status status = cuda::add_kernels(problems[i]->problem, chosen.arch != nullptr ? chosen.arch : "", kernels);
    if (first.ok()) first = std::move(status);
  }
  if (kernels.empty()) return first;
  const auto total = static_cast<int32_t>(kernels.size());
  const auto tell = [&](int32_t done, const cuda::WantedKernel* last) {
    chosen.progress(chosen.progress_context, done, total, last != nullptr ? last->key.expression.c_str() : "");
  };
  const auto warmed = chosen.progress != nullptr ? cuda::warm(kernels, *chosen.executor, tell)
                                                 : cuda::warm(kernels, *chosen.executor, {});
  if (!warmed.ok()) return warmed.status();
  if (!first.ok()) return first;
  if (result == nullptr) return {};
  heed_warm_result filled = {};
  filled.num_kernels = warmed.value().num_kernels;
  filled.num_compiled = warmed.value().num_compiled;
  filled.compile_seconds = warmed.value().compile_seconds;
  return fill_struct(result, "result", filled);
}

}  // namespace
}  // namespace heed

extern "C" heed_status heed_warm(const heed_problem* const* problems, int32_t num_problems,
                                 const heed_warm_options* options, heed_warm_result* result) {
  return heed::guarded([&] { return heed::warm(problems, num_problems, options, result); });
}
