#include "cuda/nvrtc.h"

#include <dlfcn.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <mutex>

#include "base/config.h"
#include "base/format.h"

namespace heed::cuda {
namespace {

using nvrtcResult = int32_t;
using nvrtcProgram = struct NvrtcProgramOpaque*;
constexpr nvrtcResult kErrorOutOfMemory = 1, kErrorCompilation = 6;

}  // namespace

struct NvrtcCompiler {
  std::string path;
  NvrtcVersion version;
  nvrtcResult (*get_version)(int*, int*) = nullptr;
  const char* (*get_error_string)(nvrtcResult) = nullptr;
  nvrtcResult (*create)(nvrtcProgram*, const char*, const char*, int, const char* const*, const char* const*) = nullptr;
  nvrtcResult (*destroy)(nvrtcProgram*) = nullptr;
  nvrtcResult (*add_name_expression)(nvrtcProgram, const char*) = nullptr;
  nvrtcResult (*compile)(nvrtcProgram, int, const char* const*) = nullptr;
  nvrtcResult (*get_lowered_name)(nvrtcProgram, const char*, const char**) = nullptr;
  nvrtcResult (*get_cubin_size)(nvrtcProgram, size_t*) = nullptr;
  nvrtcResult (*get_cubin)(nvrtcProgram, char*) = nullptr;
  nvrtcResult (*get_log_size)(nvrtcProgram, size_t*) = nullptr;
  nvrtcResult (*get_log)(nvrtcProgram, char*) = nullptr;
};

namespace {

std::mutex folder_mutex;
std::string& given_folder() {
  static std::string folder;
  return folder;
}

template <class Function>
bool load(void* library, const char* symbol, Function& out) {
  out = reinterpret_cast<Function>(dlsym(library, symbol));
  return out != nullptr;
}

// The symbols of an opened library, or the one that is missing.
Status bind(void* library, NvrtcCompiler& c) {
  const bool complete =
      load(library, "nvrtcVersion", c.get_version) && load(library, "nvrtcGetErrorString", c.get_error_string) &&
      load(library, "nvrtcCreateProgram", c.create) && load(library, "nvrtcDestroyProgram", c.destroy) &&
      load(library, "nvrtcAddNameExpression", c.add_name_expression) &&
      load(library, "nvrtcCompileProgram", c.compile) && load(library, "nvrtcGetLoweredName", c.get_lowered_name) &&
      load(library, "nvrtcGetCUBINSize", c.get_cubin_size) && load(library, "nvrtcGetCUBIN", c.get_cubin) &&
      load(library, "nvrtcGetProgramLogSize", c.get_log_size) && load(library, "nvrtcGetProgramLog", c.get_log);
  if (!complete) return not_supported("lacks a function heed needs (NVRTC 11.1 or later has them all)");
  if (c.get_version(&c.version.major, &c.version.minor) != 0) return operation_failed("nvrtcVersion failed");
  return {};
}

constexpr const char* kSonames[] = {"libnvrtc.so.13", "libnvrtc.so.12"};

// The wheel of CUDA 13 keeps its builtins without a run path: NVRTC finds them only if they are open already.
void open_builtins(const std::filesystem::path& folder) {
  std::error_code ignored;
  for (const auto& entry : std::filesystem::directory_iterator(folder, ignored)) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with("libnvrtc-builtins.so.")) dlopen(entry.path().c_str(), RTLD_NOW | RTLD_GLOBAL);
  }
}

// NULL where there is no such file, or, with a line in `tried`, where it does not open.
void* open_in_folder(const std::filesystem::path& folder, const char* soname, std::string& path, std::string& tried) {
  std::error_code ignored;
  const std::filesystem::path file = folder / soname;
  if (!std::filesystem::exists(file, ignored)) return nullptr;
  open_builtins(folder);
  path = file.string();
  void* library = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) tried += heed::format("\n  {}: {}", path, dlerror());
  return library;
}

// Where a library that someone else has loaded lies; "" where that cannot be told.
std::string path_of(void* library) {
  Dl_info info = {};
  void* symbol = dlsym(library, "nvrtcVersion");
  if (symbol == nullptr || dladdr(symbol, &info) == 0 || info.dli_fname == nullptr) return {};
  return info.dli_fname;
}

struct Candidate {
  std::string path;
  void* library = nullptr;
};

std::vector<std::string> candidate_folders() {
  std::vector<std::string> folders;
  {
    const std::lock_guard lock(folder_mutex);
    if (!given_folder().empty()) folders.push_back(given_folder());
  }
  for (const char* variable : {"CUDA_HOME", "CUDA_PATH"}) {
    if (const char* root = std::getenv(variable); root != nullptr && *root != '\0') {
      folders.push_back(std::string(root) + "/lib64");
      folders.push_back(std::string(root) + "/lib");
    }
  }
  folders.push_back("/usr/local/cuda/lib64");
  return folders;
}

// Every library that opens, in order of preference.
std::vector<Candidate> candidates(std::string& tried) {
  std::vector<Candidate> found;
  if (const std::string_view file = config().nvrtc; !file.empty()) {
    std::string path;
    const std::filesystem::path p(file);
    void* library = open_in_folder(p.parent_path(), p.filename().c_str(), path, tried);
    if (library != nullptr) {
      found.push_back({path, library});
    } else {
      tried += heed::format("\n  HEED_NVRTC={}: cannot be opened", file);
    }
    return found;  // named by the user: that one or none
  }
  for (const char* soname : kSonames) {
    if (void* library = dlopen(soname, RTLD_NOW | RTLD_NOLOAD)) {
      const std::string path = path_of(library);
      if (!path.empty()) open_builtins(std::filesystem::path(path).parent_path());
      found.push_back({path.empty() ? std::string(soname) + " (loaded)" : path, library});
    }
  }
  for (const std::string& folder : candidate_folders()) {
    for (const char* soname : kSonames) {
      std::string path;
      if (void* library = open_in_folder(folder, soname, path, tried)) found.push_back({path, library});
    }
  }
  for (const char* soname : kSonames) {
    if (void* library = dlopen(soname, RTLD_NOW | RTLD_LOCAL)) found.push_back({soname, library});
  }
  if (found.empty())
    tried += "\n  libnvrtc.so.13, libnvrtc.so.12: not loaded, not in CUDA_HOME, not known to the loader";
  return found;
}

// A driver runs what compilers of its own major version and of older ones make.
bool suits(const NvrtcVersion& version, int32_t driver_version) {
  return driver_version == 0 || version.major <= driver_version / 1000;
}

Result<const NvrtcCompiler*> open_nvrtc(int32_t driver_version) {
  std::string tried;
  for (const Candidate& candidate : candidates(tried)) {
    auto compiler = std::make_unique<NvrtcCompiler>();
    compiler->path = candidate.path;
    if (const Status status = bind(candidate.library, *compiler); !status.ok()) {
      tried += heed::format("\n  {}: {}", candidate.path, status.message());
      continue;
    }
    if (!suits(compiler->version, driver_version)) {
      tried += heed::format("\n  {}: NVRTC {}.{} is newer than the driver, which is of CUDA {}.{}", candidate.path,
                            compiler->version.major, compiler->version.minor, driver_version / 1000,
                            driver_version % 1000 / 10);
      continue;
    }
    return static_cast<const NvrtcCompiler*>(compiler.release());  // lives as long as the process
  }
  return Status(
      StatusCode::kInitializationFailed,
      heed::format("no NVRTC (pip install nvidia-cuda-nvrtc, a CUDA toolkit, or HEED_NVRTC=FILE gives one):{}", tried));
}

// An error that says nothing of the source.
Status transient(nvrtcResult result, std::string text) {
  return {result == kErrorOutOfMemory ? StatusCode::kOutOfMemory : StatusCode::kInitializationFailed, std::move(text)};
}

std::string program_log(const NvrtcCompiler& c, nvrtcProgram program) {
  size_t bytes = 0;
  std::string log;
  if (c.get_log_size(program, &bytes) == 0 && bytes > 1) {
    log.resize(bytes);
    c.get_log(program, log.data());
    log.resize(bytes - 1);
  }
  return log;
}

}  // namespace

Status set_nvrtc_folder(const std::string& folder) {
  std::error_code ignored;
  bool found = folder.empty();
  for (const char* soname : kSonames) found |= std::filesystem::exists(std::filesystem::path(folder) / soname, ignored);
  if (!found) {
    return not_found(heed::format(
        "folder = \"{}\": must hold libnvrtc.so.13 or libnvrtc.so.12 (pip install nvidia-cuda-nvrtc)", folder));
  }
  const std::lock_guard lock(folder_mutex);
  given_folder() = folder;
  return {};
}

Result<const NvrtcCompiler*> nvrtc(int32_t driver_version) {
  static std::mutex mutex;
  static const NvrtcCompiler* opened = nullptr;
  const std::lock_guard lock(mutex);
  if (opened == nullptr || !suits(opened->version, driver_version)) {
    Result<const NvrtcCompiler*> result = open_nvrtc(driver_version);
    if (!result.ok()) return result;  // not kept: a later call may have a folder or a library loaded meanwhile
    opened = result.value();
  }
  return opened;
}

NvrtcVersion nvrtc_version(const NvrtcCompiler& compiler) { return compiler.version; }
const std::string& nvrtc_path(const NvrtcCompiler& compiler) { return compiler.path; }

std::vector<std::string> compile_options(const std::string& arch) {
  // ptxas's report costs nothing and is how tests see registers and spills.
  return {"--std=c++20", "--gpu-architecture=" + arch, "--ptxas-options=-v", "--no-source-include"};
}

Result<CompiledKernel> compile(const NvrtcCompiler& c, const CompileRequest& request,
                               const std::vector<SourceFile>& headers) {
  const auto start = std::chrono::steady_clock::now();
  std::vector<const char*> names, texts;
  for (const SourceFile& header : headers) {
    names.push_back(header.name);
    texts.push_back(header.text);
  }
  const std::string main_name(request.main_name), main_text(request.main_text);
  nvrtcProgram program = nullptr;
  if (const nvrtcResult result = c.create(&program, main_text.c_str(), main_name.c_str(),
                                          static_cast<int>(names.size()), texts.data(), names.data());
      result != 0) {
    return transient(result, heed::format("nvrtcCreateProgram({}): {}", main_name, c.get_error_string(result)));
  }
  struct Destroy {
    const NvrtcCompiler& c;
    nvrtcProgram program;
    ~Destroy() { c.destroy(&program); }
  } destroy{c, program};

  c.add_name_expression(program, request.name_expression.c_str());
  const std::vector<std::string> options = compile_options(request.arch);
  std::vector<const char*> option_pointers;
  for (const std::string& option : options) option_pointers.push_back(option.c_str());
  const nvrtcResult compiled = c.compile(program, static_cast<int>(option_pointers.size()), option_pointers.data());
  CompiledKernel kernel;
  kernel.log = program_log(c, program);
  if (compiled != 0) {
    std::string text = heed::format("NVRTC {}.{} cannot compile {} for {} ({}): {}", c.version.major, c.version.minor,
                                    request.name_expression, request.arch, c.get_error_string(compiled), kernel.log);
    return compiled == kErrorCompilation ? operation_failed(std::move(text)) : transient(compiled, std::move(text));
  }
  const char* lowered = nullptr;
  size_t bytes = 0;
  if (c.get_lowered_name(program, request.name_expression.c_str(), &lowered) != 0 ||
      c.get_cubin_size(program, &bytes) != 0 || bytes == 0) {
    return operation_failed(heed::format("NVRTC {}.{} made no code of {} for {}", c.version.major, c.version.minor,
                                         request.name_expression, request.arch));
  }
  kernel.entry = lowered;
  kernel.cubin.resize(bytes);
  c.get_cubin(program, kernel.cubin.data());
  kernel.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return kernel;
}

}  // namespace heed::cuda
