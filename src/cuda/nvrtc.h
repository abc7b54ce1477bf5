// NVRTC, NVIDIA's run-time compiler, opened at run time. It needs neither GPU nor driver: tests compile every kernel
// with it.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"

namespace heed::cuda {

struct NvrtcCompiler;  // one opened library

struct NvrtcVersion {
  int32_t major = 0, minor = 0;
};

// A file handed to the compiler in memory; `#include "name"` finds it.
struct SourceFile {
  const char* name;
  const char* text;
};

struct CompileRequest {
  std::string_view main_name;  // "attention_fwd_sm80.cu"
  std::string_view main_text;
  std::string name_expression;  // "attention_fwd_sm80<Variant{.tile_q = 128}>"; its mangled name comes back
  std::string arch;             // "sm_90a"
};

struct CompiledKernel {
  std::string cubin;
  std::string entry;  // the kernel's name in the cubin
  std::string log;    // with ptxas's report of registers and spills
  double seconds = 0;
};

// The first candidate that opens, in this order: HEED_NVRTC (a file), a libnvrtc that the process has already loaded,
// the folder a Python package hands in (set_nvrtc_folder), CUDA_HOME and CUDA_PATH, the system's loader. A candidate
// newer in major version than `driver_version` allows (13000 for 13.0; 0: no driver, any version) is passed over; the
// error names each candidate and why it was not taken.
Result<const NvrtcCompiler*> nvrtc(int32_t driver_version);
// not_found where no libnvrtc lies in it; "" forgets the last one.
Status set_nvrtc_folder(const std::string& folder);

NvrtcVersion nvrtc_version(const NvrtcCompiler& compiler);
const std::string& nvrtc_path(const NvrtcCompiler& compiler);

// The options of every compilation for this architecture.
std::vector<std::string> compile_options(const std::string& arch);

// operation_failed: the source does not compile, and will not the next time; the compiler's log is in the text. Any
// other code: it might (no memory, say).
Result<CompiledKernel> compile(const NvrtcCompiler& compiler, const CompileRequest& request,
                               const std::vector<SourceFile>& headers);

}  // namespace heed::cuda
