// The CUDA driver, opened at run time: nothing of CUDA is needed to build heed or to start it. Types and constants are
// those of the driver's documented binary interface, spelled out here so that no CUDA header is needed either.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>

#include "base/status.h"

namespace heed::cuda {

using CUresult = int32_t;
using CUdevice = int32_t;
using CUdeviceptr = uint64_t;
using CUcontext = struct CUctx_st*;
using CUlibrary = struct CUlib_st*;
using CUkernel = struct CUkern_st*;
using CUfunction = struct CUfunc_st*;
using CUstream = struct CUstream_st*;
using CUevent = struct CUevent_st*;
using CUgraph = struct CUgraph_st*;
using CUgraphExec = struct CUgraphExec_st*;

struct CUlaunchAttribute {
  int32_t id;
  int32_t pad;
  union {
    char bytes[64];
    struct {
      uint32_t x, y, z;
    } cluster;
    int32_t programmatic;
  } value;
};
static_assert(sizeof(CUlaunchAttribute) == 72);
constexpr int32_t kLaunchAttributeCluster = 4;
constexpr int32_t kLaunchAttributeProgrammatic = 6;  // this launch may begin before the one ahead of it has ended

struct CUlaunchConfig {
  uint32_t grid_x, grid_y, grid_z;
  uint32_t block_x, block_y, block_z;
  uint32_t shared_bytes;
  CUstream stream;
  CUlaunchAttribute* attributes;
  uint32_t num_attributes;
};

struct alignas(64) CUtensorMap {
  uint64_t opaque[16];
};

constexpr uint32_t kStreamNonBlocking = 1;  // does not wait for the legacy default stream
constexpr int32_t kCaptureThreadLocal = 1;  // other threads go on as if nothing were captured

constexpr CUresult kCudaSuccess = 0;
constexpr CUresult kCudaNotReady = 600;

enum DeviceAttribute : int32_t {
  kMaxSharedBytesPerBlock = 8,
  kMultiprocessorCount = 16,
  kL2CacheBytes = 38,
  kComputeCapabilityMajor = 75,
  kComputeCapabilityMinor = 76,
  kMaxSharedBytesOptin = 97,
};
enum FunctionAttribute : int32_t {
  kFunctionSharedBytes = 1,
  kFunctionLocalBytes = 3,
  kFunctionRegisters = 4,
  kFunctionMaxDynamicSharedBytes = 8,
};
enum PointerAttribute : int32_t { kPointerMemoryType = 2, kPointerDeviceOrdinal = 9 };

// One pointer per driver function heed calls; X(name in the library, member, signature).
#define HEED_CUDA_DRIVER_FUNCTIONS(X)                                                                   \
  X("cuInit", init, CUresult(uint32_t))                                                                 \
  X("cuDriverGetVersion", driver_get_version, CUresult(int32_t*))                                       \
  X("cuGetErrorName", get_error_name, CUresult(CUresult, const char**))                                 \
  X("cuGetErrorString", get_error_string, CUresult(CUresult, const char**))                             \
  X("cuDeviceGetCount", device_get_count, CUresult(int32_t*))                                           \
  X("cuDeviceGet", device_get, CUresult(CUdevice*, int32_t))                                            \
  X("cuDeviceGetName", device_get_name, CUresult(char*, int32_t, CUdevice))                             \
  X("cuDeviceGetAttribute", device_get_attribute, CUresult(int32_t*, int32_t, CUdevice))                \
  X("cuDeviceTotalMem_v2", device_total_mem, CUresult(size_t*, CUdevice))                               \
  X("cuDevicePrimaryCtxRetain", primary_ctx_retain, CUresult(CUcontext*, CUdevice))                     \
  X("cuDevicePrimaryCtxRelease_v2", primary_ctx_release, CUresult(CUdevice))                            \
  X("cuCtxGetCurrent", ctx_get_current, CUresult(CUcontext*))                                           \
  X("cuCtxPushCurrent_v2", ctx_push_current, CUresult(CUcontext))                                       \
  X("cuCtxPopCurrent_v2", ctx_pop_current, CUresult(CUcontext*))                                        \
  X("cuCtxGetDevice", ctx_get_device, CUresult(CUdevice*))                                              \
  X("cuLibraryLoadData", library_load_data,                                                             \
    CUresult(CUlibrary*, const void*, void*, void**, uint32_t, void*, void**, uint32_t))                \
  X("cuLibraryUnload", library_unload, CUresult(CUlibrary))                                             \
  X("cuLibraryGetKernel", library_get_kernel, CUresult(CUkernel*, CUlibrary, const char*))              \
  X("cuKernelGetAttribute", kernel_get_attribute, CUresult(int32_t*, int32_t, CUkernel, CUdevice))      \
  X("cuKernelSetAttribute", kernel_set_attribute, CUresult(int32_t, int32_t, CUkernel, CUdevice))       \
  X("cuLaunchKernelEx", launch_kernel_ex, CUresult(const CUlaunchConfig*, CUfunction, void**, void**))  \
  X("cuStreamIsCapturing", stream_is_capturing, CUresult(CUstream, int32_t*))                           \
  X("cuThreadExchangeStreamCaptureMode", thread_exchange_stream_capture_mode, CUresult(int32_t*))       \
  X("cuCtxGetId", ctx_get_id, CUresult(CUcontext, uint64_t*))                                           \
  X("cuStreamGetId", stream_get_id, CUresult(CUstream, uint64_t*))                                      \
  X("cuStreamSynchronize", stream_synchronize, CUresult(CUstream))                                      \
  X("cuStreamCreate", stream_create, CUresult(CUstream*, uint32_t))                                     \
  X("cuStreamDestroy_v2", stream_destroy, CUresult(CUstream))                                           \
  X("cuStreamBeginCapture_v2", stream_begin_capture, CUresult(CUstream, int32_t))                       \
  X("cuStreamEndCapture", stream_end_capture, CUresult(CUstream, CUgraph*))                             \
  X("cuGraphInstantiateWithFlags", graph_instantiate, CUresult(CUgraphExec*, CUgraph, uint64_t))        \
  X("cuGraphLaunch", graph_launch, CUresult(CUgraphExec, CUstream))                                     \
  X("cuGraphDestroy", graph_destroy, CUresult(CUgraph))                                                 \
  X("cuGraphExecDestroy", graph_exec_destroy, CUresult(CUgraphExec))                                    \
  X("cuEventCreate", event_create, CUresult(CUevent*, uint32_t))                                        \
  X("cuEventDestroy_v2", event_destroy, CUresult(CUevent))                                              \
  X("cuEventRecord", event_record, CUresult(CUevent, CUstream))                                         \
  X("cuEventSynchronize", event_synchronize, CUresult(CUevent))                                         \
  X("cuEventElapsedTime", event_elapsed_time, CUresult(float*, CUevent, CUevent))                       \
  X("cuMemAlloc_v2", mem_alloc, CUresult(CUdeviceptr*, size_t))                                         \
  X("cuMemFree_v2", mem_free, CUresult(CUdeviceptr))                                                    \
  X("cuMemAllocAsync", mem_alloc_async, CUresult(CUdeviceptr*, size_t, CUstream))                       \
  X("cuMemFreeAsync", mem_free_async, CUresult(CUdeviceptr, CUstream))                                  \
  X("cuMemcpyHtoDAsync_v2", memcpy_htod_async, CUresult(CUdeviceptr, const void*, size_t, CUstream))    \
  X("cuMemcpyDtoDAsync_v2", memcpy_dtod_async, CUresult(CUdeviceptr, CUdeviceptr, size_t, CUstream))    \
  X("cuMemcpyDtoHAsync_v2", memcpy_dtoh_async, CUresult(void*, CUdeviceptr, size_t, CUstream))          \
  X("cuMemsetD8Async", memset_d8_async, CUresult(CUdeviceptr, uint8_t, size_t, CUstream))               \
  X("cuPointerGetAttribute", pointer_get_attribute, CUresult(void*, int32_t, CUdeviceptr))              \
  X("cuTensorMapEncodeTiled", tensor_map_encode_tiled,                                                  \
    CUresult(CUtensorMap*, int32_t, uint32_t, void*, const uint64_t*, const uint64_t*, const uint32_t*, \
             const uint32_t*, int32_t, int32_t, int32_t, int32_t))

struct Driver {
#define HEED_DECLARE(symbol, member, signature) std::add_pointer_t<signature> member = nullptr;
  HEED_CUDA_DRIVER_FUNCTIONS(HEED_DECLARE)
#undef HEED_DECLARE
  int32_t version = 0;  // 13000 for 13.0
};

// The driver, initialised, or why there is none ("libcuda.so.1 cannot be opened: ..."). Asked once per process.
const Result<const Driver*>& driver();

// "cuLaunchKernelEx(grid=..., ...): CUDA_ERROR_INVALID_VALUE (invalid argument)".
Status driver_error(CUresult result, const std::string& call);

}  // namespace heed::cuda
