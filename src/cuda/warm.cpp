#include "cuda/warm.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <new>

#include "base/format.h"
#include "base/threads.h"
#include "cuda/attention_fwd.h"
#include "cuda/disk_cache.h"

namespace heed::cuda {
namespace {

std::vector<KernelVariant> variants_of(const KvAppendProblem& problem, const DeviceFacts& facts) {
  if (problem.dtype == Dtype::kF64 || facts.major < 8) return {};
  return {kv_append_variant(problem.dtype)};
}

struct Target {
  DeviceFacts facts;
  std::string arch;
};

Result<Target> target_of(const AnyProblem& problem, std::string_view arch) {
  if (!arch.empty()) {
    Result<DeviceFacts> facts = typical_device(arch);
    if (!facts.ok()) return facts.status();
    return Target{std::move(facts).value(), std::string(arch)};
  }
  const auto [device, index] = std::visit([](const auto& p) { return std::pair(p.device, p.device_index); }, problem);
  if (device != Device::kCuda) {
    return invalid_argument(
        "device = cpu: must be cuda, or arch must name the GPU's architecture: nothing is compiled "
        "for a CPU at run time");
  }
  const Result<const DeviceFacts*> facts = device_facts(index);
  if (!facts.ok()) return facts.status();
  return Target{*facts.value(), architecture(facts.value()->major, facts.value()->minor)};
}

// Makes sure that the kernel is on disk; how long this process compiled it, 0 where it did not. Does not throw: it runs
// on threads of an executor.
Result<double> compile_seconds(const WantedKernel& kernel) {
  try {
    const Result<const KernelCode*> code = code_table().get(kernel.key, kernel.arch);
    if (!code.ok()) return code.status();
    const double seconds = code.value()->compile_seconds;
    if (seconds > 0 && !disk_cache().load(code_text(kernel.key, kernel.arch), "")) {
      return operation_failed(
          heed::format("{} was compiled but could not be kept in {}", kernel.key.expression, disk_cache().folder()));
    }
    return seconds;
  } catch (const std::bad_alloc&) {
    return Status(StatusCode::kOutOfMemory, "");
  }
}

}  // namespace

bool WantedKernel::operator==(const WantedKernel& other) const {
  return std::strcmp(key.source, other.key.source) == 0 && key.expression == other.key.expression && arch == other.arch;
}

Status add_kernels(const AnyProblem& problem, std::string_view arch, std::vector<WantedKernel>& wanted) {
  const Result<Target> target = target_of(problem, arch);
  if (!target.ok()) return target.status();
  const auto variants = std::visit(
      [&](auto on_gpu) {
        on_gpu.device = Device::kCuda;
        on_gpu.threads = 0;
        return variants_of(on_gpu, target.value().facts);
      },
      problem);
  if (variants.empty()) {
    return not_supported(heed::format("no GPU kernel does \"{}\" on {}; heed explain says why not",
                                      std::visit([](const auto& p) { return to_string(p); }, problem),
                                      target.value().arch));
  }
  for (const KernelVariant& variant : variants) {
    WantedKernel kernel = {variant.key, target.value().arch};
    if (std::find(wanted.begin(), wanted.end(), kernel) == wanted.end()) wanted.push_back(std::move(kernel));
  }
  return {};
}

Result<WarmResult> warm(const std::vector<WantedKernel>& kernels, const heed_executor& executor,
                        const std::function<void(int32_t done, const WantedKernel* last)>& progress) {
  if (disk_cache().folder().empty()) {
    return operation_failed(
        "there is no folder for compiled kernels that could be used: set HEED_CACHE_DIR to one that "
        "can be written");
  }
  WarmResult result;
  Status first;
  int32_t done = 0;
  std::mutex mutex;  // of the three, and of progress
  if (progress) progress(0, nullptr);
  run_tasks(executor, static_cast<int32_t>(kernels.size()), [&](int32_t i) {
    const WantedKernel& kernel = kernels[static_cast<size_t>(i)];
    const Result<double> seconds = compile_seconds(kernel);
    const std::lock_guard lock(mutex);
    ++result.num_kernels;
    if (seconds.ok()) {
      result.num_compiled += seconds.value() > 0;
      result.compile_seconds += seconds.value();
    } else if (first.ok()) {
      first = seconds.status();
    }
    if (progress) progress(++done, &kernel);
  });
  if (!first.ok()) return first;
  return result;
}

}  // namespace heed::cuda
