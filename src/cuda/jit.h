// Kernels by name: compiled once per process and key, kept in memory and on disk.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "base/status.h"
#include "cuda/disk_cache.h"
#include "cuda/driver.h"
#include "cuda/nvrtc.h"

namespace heed::cuda {

// One specialisation of one kernel; with the architecture the whole identity: equal text is the same code.
struct KernelKey {
  const char* source = nullptr;  // "attention_fwd_sm80.cu", an embedded file
  std::string expression;        // "heed::cuda::attention_fwd_sm80<heed::cuda::AttentionFwdVariant{.head_dim=64,...}>"
};

// A kernel as bytes: what needs neither GPU nor driver.
struct KernelCode {
  std::string entry;           // its name in the cubin
  std::string cubin;           // stays: the driver may load lazily from it
  double compile_seconds = 0;  // 0: came from the disk
};

// What a CodeTable compiles with; tests bring their own.
struct CodeCompiler {
  std::function<std::string()> name;  // "nvrtc-13.0", part of the file's name on disk; "" while there is none
  int newest_major = 0;               // without a compiler: code on disk by a newer one is passed over (0: none is)
  std::function<Result<CompiledKernel>(const KernelKey&, const std::string& arch)> compile;
};

enum class JitPolicy { kOn, kRequireCache };

// Code by key, for any number of threads. What was made once is found by a lock-free probe; of threads that ask for the
// same missing key one makes it, from disk or by compiling, while the others wait. Source that does not compile
// (operation_failed) is remembered; any other failure is tried again by the next call, as a compiler may turn up.
class CodeTable {
 public:
  CodeTable(CodeCompiler compiler, const DiskCache& disk, JitPolicy policy)
      : compiler_(std::move(compiler)), disk_(disk), policy_(policy) {}
  ~CodeTable();
  CodeTable(const CodeTable&) = delete;
  CodeTable& operator=(const CodeTable&) = delete;

  // The pointer is good for as long as the table.
  Result<const KernelCode*> get(const KernelKey& key, const std::string& arch);
  // The same if it is made already, else null.
  const KernelCode* find_made(const KernelKey& key, const std::string& arch) const;

 private:
  struct Entry;
  Entry* find(uint64_t hash, const std::string& text, size_t& slot) const;
  Entry* find_or_insert(uint64_t hash, const std::string& text);
  Status make(const KernelKey& key, const std::string& arch, const std::string& text, KernelCode& code) const;

  static constexpr size_t kSlots = 4096;  // some ten times the variants that can be reached
  const CodeCompiler compiler_;
  const DiskCache& disk_;
  const JitPolicy policy_;
  std::mutex insertion_;
  std::atomic<Entry*> slots_[kSlots] = {};  // entries are never removed
};

// The process's table: NVRTC, the disk cache, HEED_JIT. It needs no GPU.
CodeTable& code_table();

// Key and architecture with all that decides the code, as stored on disk.
std::string code_text(const KernelKey& key, const std::string& arch);

struct Kernel {
  CUkernel handle = nullptr;
  int32_t registers = 0;
  int32_t local_bytes = 0;
  int32_t shared_bytes = 0;    // static
  double compile_seconds = 0;  // 0: came from the disk cache
};

// While it lives, this thread prepares for a call on `stream`: where that is being captured into a graph, get_kernel
// gives what is loaded already and refuses to compile or load, which the capture would not survive.
class PreparingFor {
 public:
  explicit PreparingFor(void* stream);
  ~PreparingFor();
  PreparingFor(const PreparingFor&) = delete;
  PreparingFor& operator=(const PreparingFor&) = delete;
};

// The kernel, ready to launch on `device` with `dynamic_shared_bytes`. Called by prepare, never by run, so a run that
// is being captured into a graph finds nothing left to do.
Result<const Kernel*> get_kernel(const KernelKey& key, CUdevice device, size_t dynamic_shared_bytes);

// Makes the code of several kernels at the same time, before get_kernel is asked for them: each that is missing but one in a
// thread of its own. What goes wrong is said by get_kernel. Nothing while the call's stream is being captured.
void make_together(const std::vector<KernelKey>& keys, CUdevice device);

// "sm_90a": what NVRTC compiles for on a device of this compute capability; 'a' where the kernels use its own
// instructions.
std::string architecture(int major, int minor);

// The embedded kernel sources (generated at build time): files by name, for NVRTC and for tests.
struct EmbeddedFile {
  const char* name;
  const char* text;
};
const EmbeddedFile* embedded_files(size_t& count);
// Content hash of all embedded sources: part of every key on disk.
const std::string& embedded_hash();

// Compiles an embedded source with NVRTC.
Result<CompiledKernel> compile_embedded(const NvrtcCompiler& compiler, const KernelKey& key, const std::string& arch);

}  // namespace heed::cuda
