#include "cuda/launch.h"

#include "base/format.h"

namespace heed::cuda {

Result<Launch> prepare_launch(const KernelVariant& variant, int64_t blocks, CUdevice device) {
  Launch made;
  made.name = variant.key.expression;
  made.blocks = static_cast<uint32_t>(blocks);
  made.threads = static_cast<uint32_t>(variant.threads);
  made.shared_bytes = static_cast<uint32_t>(variant.shared_bytes);
  const Result<const Kernel*> kernel = get_kernel(variant.key, device, made.shared_bytes);
  if (!kernel.ok()) return kernel.status();
  made.kernel = kernel.value()->handle;
  return made;
}

Status launch(const Launch& l, const void* parameters, CUstream stream) {
  CUlaunchAttribute attribute = {};
  attribute.id = kLaunchAttributeProgrammatic;
  attribute.value.programmatic = 1;
  const CUlaunchConfig config = {.grid_x = l.blocks,
                                 .grid_y = 1,
                                 .grid_z = 1,
                                 .block_x = l.threads,
                                 .block_y = 1,
                                 .block_z = 1,
                                 .shared_bytes = l.shared_bytes,
                                 .stream = stream,
                                 .attributes = l.overlaps_previous ? &attribute : nullptr,
                                 .num_attributes = l.overlaps_previous ? 1u : 0u};
  void* arguments[] = {const_cast<void*>(parameters)};
  // A kernel of a library may stand where a function is asked for; the driver takes the current context's instance.
  const CUresult result =
      driver().value()->launch_kernel_ex(&config, reinterpret_cast<CUfunction>(l.kernel), arguments, nullptr);
  if (result == kCudaSuccess) return {};
  return driver_error(
      result, heed::format("cuLaunchKernelEx({}, {} blocks of {} threads, {} bytes of shared memory, stream {}{})",
                           l.name, l.blocks, l.threads, l.shared_bytes, static_cast<const void*>(stream),
                           l.overlaps_previous ? ", programmatic" : ""));
}

}  // namespace heed::cuda
