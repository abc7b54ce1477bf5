#include "cuda/jit.h"

#include <cstring>
#include <map>
#include <optional>
#include <thread>
#include <utility>

#include "base/config.h"
#include "base/format.h"
#include "base/log.h"
#include "cuda/device.h"

namespace heed::cuda {

// A key's code, made or being made.
struct CodeTable::Entry {
  uint64_t hash;
  std::string text;
  std::mutex making;                  // held while one thread makes it
  std::atomic<bool> is_final{false};  // status and code no longer change
  Status status;
  KernelCode code;
};

namespace {

// What the disk keeps: the entry's name, a NUL, the cubin.
std::string pack(const KernelCode& code) { return code.entry + '\0' + code.cubin; }

bool unpack(const std::string& payload, KernelCode& code) {
  const size_t end = payload.find('\0');
  if (end == std::string::npos || end == 0 || end + 1 == payload.size()) return false;
  code.entry = payload.substr(0, end);
  code.cubin = payload.substr(end + 1);
  code.compile_seconds = 0;
  return true;
}

const EmbeddedFile* source_of(const char* name) {
  size_t count = 0;
  const EmbeddedFile* files = embedded_files(count);
  for (size_t i = 0; i < count; ++i)
    if (std::strcmp(files[i].name, name) == 0) return &files[i];
  return nullptr;
}

int32_t driver_version() { return driver().ok() ? driver().value()->version : 0; }

std::string compiler_name() {
  const Result<const NvrtcCompiler*> compiler = nvrtc(driver_version());
  if (!compiler.ok()) return {};
  const NvrtcVersion version = nvrtc_version(*compiler.value());
  return heed::format("nvrtc-{}.{}", version.major, version.minor);
}

Result<CompiledKernel> compile_here(const KernelKey& key, const std::string& arch) {
  Result<const NvrtcCompiler*> compiler = nvrtc(driver_version());
  if (!compiler.ok()) return compiler.status();
  return compile_embedded(*compiler.value(), key, arch);
}

Status load(const KernelCode& code, CUdevice device, Kernel& kernel) {
  const Driver& cuda = *driver().value();
  CUlibrary library = nullptr;
  if (const CUresult result =
          cuda.library_load_data(&library, code.cubin.data(), nullptr, nullptr, 0, nullptr, nullptr, 0);
      result != kCudaSuccess) {
    return driver_error(result, heed::format("cuLibraryLoadData({} bytes of {})", code.cubin.size(), code.entry));
  }
  if (const CUresult result = cuda.library_get_kernel(&kernel.handle, library, code.entry.c_str());
      result != kCudaSuccess) {
    cuda.library_unload(library);
    return driver_error(result, heed::format("cuLibraryGetKernel({})", code.entry));
  }
  cuda.kernel_get_attribute(&kernel.registers, kFunctionRegisters, kernel.handle, device);
  cuda.kernel_get_attribute(&kernel.local_bytes, kFunctionLocalBytes, kernel.handle, device);
  cuda.kernel_get_attribute(&kernel.shared_bytes, kFunctionSharedBytes, kernel.handle, device);
  kernel.compile_seconds = code.compile_seconds;
  return {};
}

Result<std::string> device_architecture(CUdevice device) {
  const Driver& cuda = *driver().value();
  int32_t major = 0, minor = 0;
  for (const auto& [attribute, value] :
       {std::pair{kComputeCapabilityMajor, &major}, {kComputeCapabilityMinor, &minor}}) {
    if (const CUresult result = cuda.device_get_attribute(value, attribute, device); result != kCudaSuccess)
      return driver_error(result,
                          heed::format("cuDeviceGetAttribute({}, device {})", static_cast<int>(attribute), device));
  }
  return architecture(major, minor);
}

// A kernel that the driver has loaded. Kernels of a library serve every device; shared memory is granted for each.
struct LoadedKernel {
  Kernel kernel;
  std::map<CUdevice, size_t> shared_granted;
};

Status grant_shared(LoadedKernel& loaded, CUdevice device, size_t bytes) {
  constexpr size_t kGrantedAnyway = 48 << 10;
  size_t& granted = loaded.shared_granted[device];
  if (bytes <= granted || bytes <= kGrantedAnyway) return {};
  const CUresult result = driver().value()->kernel_set_attribute(
      kFunctionMaxDynamicSharedBytes, static_cast<int32_t>(bytes), loaded.kernel.handle, device);
  if (result != kCudaSuccess)
    return driver_error(
        result, heed::format("cuKernelSetAttribute(MAX_DYNAMIC_SHARED_SIZE_BYTES, {}, device {})", bytes, device));
  granted = bytes;
  return {};
}

// Kernels of this process, by their code.
struct LoadedKernels {
  std::mutex mutex;
  std::map<const KernelCode*, LoadedKernel> kernels;  // nodes stay where they are
};

LoadedKernels& loaded_kernels() {
  static auto* loaded = new LoadedKernels;
  return *loaded;
}

bool is_loaded(const KernelKey& key, const std::string& arch) {
  const KernelCode* const code = code_table().find_made(key, arch);
  LoadedKernels& all = loaded_kernels();
  const std::lock_guard lock(all.mutex);
  const auto found = all.kernels.find(code);
  return found != all.kernels.end() && found->second.kernel.handle != nullptr;
}

struct CallInProgress {
  int32_t depth = 0;
  void* stream = nullptr;
};
thread_local CallInProgress call_in_progress;

// Compiling takes long and loading may wait for the device: neither belongs in a capture.
Status check_not_captured(const KernelKey& key, const std::string& arch) {
  if (call_in_progress.depth == 0 || is_loaded(key, arch)) return {};
  const Result<bool> capturing = is_capturing(static_cast<CUstream>(call_in_progress.stream));
  if (!capturing.ok()) return capturing.status();
  if (!capturing.value()) return {};
  return operation_failed(
      heed::format("stream = {}: is being captured into a graph, and {} is not loaded yet; make the same call once, or "
                   "heed_plan_create for its problem, before the capture",
                   call_in_progress.stream, key.expression));
}

}  // namespace

PreparingFor::PreparingFor(void* stream) {
  ++call_in_progress.depth;
  call_in_progress.stream = stream;
}

PreparingFor::~PreparingFor() { --call_in_progress.depth; }

CodeTable::~CodeTable() {
  for (std::atomic<Entry*>& slot : slots_) delete slot.load(std::memory_order_relaxed);
}

// Open addressing: `slot` is where the text is or would be; kSlots in a full table.
CodeTable::Entry* CodeTable::find(uint64_t hash, const std::string& text, size_t& slot) const {
  slot = hash % kSlots;
  for (size_t n = 0; n < kSlots; ++n, slot = (slot + 1) % kSlots) {
    Entry* entry = slots_[slot].load(std::memory_order_acquire);
    if (entry == nullptr || (entry->hash == hash && entry->text == text)) return entry;
  }
  slot = kSlots;
  return nullptr;
}

CodeTable::Entry* CodeTable::find_or_insert(uint64_t hash, const std::string& text) {
  size_t slot = 0;
  if (Entry* entry = find(hash, text, slot)) return entry;
  const std::lock_guard lock(insertion_);
  if (Entry* entry = find(hash, text, slot)) return entry;
  if (slot == kSlots) return nullptr;
  auto entry = std::make_unique<Entry>();
  entry->hash = hash;
  entry->text = text;
  slots_[slot].store(entry.get(), std::memory_order_release);
  return entry.release();
}

Status CodeTable::make(const KernelKey& key, const std::string& arch, const std::string& text, KernelCode& code) const {
  // A process that may not compile takes any compiler's code and opens none.
  const std::string compiler = policy_ == JitPolicy::kRequireCache ? std::string() : compiler_.name();
  if (const std::optional<std::string> stored = disk_.load(text, compiler, compiler_.newest_major);
      stored && unpack(*stored, code)) {
    return {};
  }
  if (policy_ == JitPolicy::kRequireCache) {
    return not_found(
        heed::format("HEED_JIT=require-cache: {} for {} is not in the kernel cache ({}); a process with HEED_JIT=on "
                     "that prepares the same problem puts it there",
                     key.expression, arch, disk_.folder().empty() ? "no folder" : disk_.folder()));
  }
  Result<CompiledKernel> compiled = compiler_.compile(key, arch);
  if (!compiled.ok()) return compiled.status();
  CompiledKernel& kernel = compiled.value();
  code = {std::move(kernel.entry), std::move(kernel.cubin), kernel.seconds};
  log_message(HEED_LOG_INFO,
              heed::format("compiled {} for {} in {:.2f} s", key.expression, arch, code.compile_seconds));
  // Where a compiler turned up after its name was asked for, the code is kept in memory only.
  if (!compiler.empty()) disk_.store(text, compiler, pack(code));
  return {};
}

Result<const KernelCode*> CodeTable::get(const KernelKey& key, const std::string& arch) {
  const std::string text = code_text(key, arch);
  Entry* entry = find_or_insert(std::hash<std::string>{}(text), text);
  if (entry == nullptr) return out_of_memory(heed::format("more than {} kernels in one process", kSlots));
  if (!entry->is_final.load(std::memory_order_acquire)) {
    const std::lock_guard lock(entry->making);
    if (!entry->is_final.load(std::memory_order_relaxed)) {
      Status status = make(key, arch, text, entry->code);
      if (!status.ok() && status.code() != StatusCode::kOperationFailed) return status;
      entry->status = std::move(status);
      entry->is_final.store(true, std::memory_order_release);
    }
  }
  if (!entry->status.ok()) return entry->status;
  return static_cast<const KernelCode*>(&entry->code);
}

const KernelCode* CodeTable::find_made(const KernelKey& key, const std::string& arch) const {
  const std::string text = code_text(key, arch);
  size_t slot = 0;
  const Entry* entry = find(std::hash<std::string>{}(text), text, slot);
  const bool made = entry != nullptr && entry->is_final.load(std::memory_order_acquire) && entry->status.ok();
  return made ? &entry->code : nullptr;
}

CodeTable& code_table() {
  static CodeTable* table = new CodeTable(  // outlives every thread that may still ask at exit
      {.name = compiler_name, .newest_major = driver_version() / 1000, .compile = compile_here}, disk_cache(),
      config().jit_require_cache ? JitPolicy::kRequireCache : JitPolicy::kOn);
  return *table;
}

std::string code_text(const KernelKey& key, const std::string& arch) {
  std::string text = heed::format("heed kernel\nsources {}\n{}\n{}\n", embedded_hash(), key.source, key.expression);
  for (const std::string& option : compile_options(arch)) text += option + "\n";
  return text;
}

std::string architecture(int major, int minor) {
  return heed::format("sm_{}{}{}", major, minor, major == 9 ? "a" : "");
}

const std::string& embedded_hash() {
  static const std::string hash = [] {
    std::string all;
    size_t count = 0;
    const EmbeddedFile* files = embedded_files(count);
    for (size_t i = 0; i < count; ++i) all += std::string(files[i].name) + '\0' + files[i].text + '\0';
    return hash_text(all);
  }();
  return hash;
}

Result<CompiledKernel> compile_embedded(const NvrtcCompiler& compiler, const KernelKey& key, const std::string& arch) {
  const EmbeddedFile* source = source_of(key.source);
  if (source == nullptr) return operation_failed(heed::format("no embedded kernel source is named {}", key.source));
  size_t count = 0;
  const EmbeddedFile* files = embedded_files(count);
  std::vector<SourceFile> headers;
  for (size_t i = 0; i < count; ++i) headers.push_back({files[i].name, files[i].text});
  const CompileRequest request = {
      .main_name = source->name, .main_text = source->text, .name_expression = key.expression, .arch = arch};
  return compile(compiler, request, headers);
}

void make_together(const std::vector<KernelKey>& keys, CUdevice device) {
  if (!driver().ok()) return;
  const Result<std::string> arch = device_architecture(device);
  if (!arch.ok()) return;
  std::vector<const KernelKey*> missing;
  for (const KernelKey& key : keys)
    if (code_table().find_made(key, arch.value()) == nullptr) missing.push_back(&key);
  if (missing.size() < 2 || !check_not_captured(*missing.front(), arch.value()).ok()) return;
  const auto make = [&arch](const KernelKey* key) noexcept {
    try {
      static_cast<void>(code_table().get(*key, arch.value()));
    } catch (...) {  // no memory: get_kernel will try by itself
    }
  };
  std::vector<std::thread> threads;
  try {
    threads.reserve(missing.size());
    for (size_t i = 1; i < missing.size(); ++i) threads.emplace_back(make, missing[i]);
  } catch (...) {  // no more threads: the rest is made one after the other
  }
  make(missing.front());
  for (std::thread& thread : threads) thread.join();
}

Result<const Kernel*> get_kernel(const KernelKey& key, CUdevice device, size_t dynamic_shared_bytes) {
  if (!driver().ok()) return driver().status();
  Result<std::string> arch = device_architecture(device);
  if (!arch.ok()) return arch.status();
  HEED_RETURN_IF_ERROR(check_not_captured(key, arch.value()));
  Result<const KernelCode*> code = code_table().get(key, arch.value());
  if (!code.ok()) return code.status();

  LoadedKernels& all = loaded_kernels();
  const std::lock_guard lock(all.mutex);
  LoadedKernel& loaded = all.kernels[code.value()];
  if (loaded.kernel.handle == nullptr) HEED_RETURN_IF_ERROR(load(*code.value(), device, loaded.kernel));
  HEED_RETURN_IF_ERROR(grant_shared(loaded, device, dynamic_shared_bytes));
  return static_cast<const Kernel*>(&loaded.kernel);
}

}  // namespace heed::cuda
