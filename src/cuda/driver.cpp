#include "cuda/driver.h"

#include <dlfcn.h>

#include "base/format.h"

namespace heed::cuda {
namespace {

Result<const Driver*> open_driver() {
  // RTLD_LOCAL: the process's other users of the driver find their own; the library itself is the same one.
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    return Status(StatusCode::kInitializationFailed, heed::format("no CUDA driver: {}", dlerror()));
  }
  static Driver driver;
#define HEED_LOAD(symbol, member, signature)                                                                      \
  driver.member = reinterpret_cast<decltype(driver.member)>(dlsym(library, symbol));                              \
  if (driver.member == nullptr) {                                                                                 \
    return Status(StatusCode::kInitializationFailed,                                                              \
                  heed::format("the CUDA driver lacks {}: heed needs the driver of CUDA 12.0 or later", symbol)); \
  }
  HEED_CUDA_DRIVER_FUNCTIONS(HEED_LOAD)
#undef HEED_LOAD
  if (const CUresult result = driver.init(0); result != kCudaSuccess) {
    const char* name = nullptr;
    driver.get_error_name(result, &name);
    return Status(StatusCode::kInitializationFailed,
                  heed::format("cuInit(0): {} ({}): no usable GPU", name != nullptr ? name : "unknown", result));
  }
  driver.driver_get_version(&driver.version);
  return static_cast<const Driver*>(&driver);
}

}  // namespace

const Result<const Driver*>& driver() {
  static const Result<const Driver*> opened = open_driver();
  return opened;
}

Status driver_error(CUresult result, const std::string& call) {
  const char *name = nullptr, *text = nullptr;
  if (driver().ok()) {
    driver().value()->get_error_name(result, &name);
    driver().value()->get_error_string(result, &text);
  }
  const StatusCode code = result == 2 ? StatusCode::kOutOfMemory : StatusCode::kOperationFailed;
  return {code, heed::format("{}: {} ({})", call, name != nullptr ? name : "unknown CUDA error",
                             text != nullptr ? text : "")};
}

}  // namespace heed::cuda
