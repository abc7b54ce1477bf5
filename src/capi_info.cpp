// heed_info: what a person asks first about heed on this machine.
#include <filesystem>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include "base/config.h"
#include "base/machine.h"
#include "capi_error.h"
#include "capi_handles.h"
#include "cuda/device.h"
#include "cuda/disk_cache.h"
#include "cuda/nvrtc.h"
#include "ops/problem_line.h"
#include "plan/registry.h"

namespace heed {
namespace {

std::string size_text(int64_t bytes) {
  if (bytes <= 0) return "unknown";
  if (bytes >= 1 << 20 && bytes % (1 << 20) == 0) return heed::format("{} MiB", bytes >> 20);
  return heed::format("{} KiB", bytes >> 10);
}

std::string machine_text(const CpuFacts& cpu) {
  std::string sets;
  const auto add = [&sets](bool has, std::string_view name) {
    if (has) sets += heed::format("{}{}", sets.empty() ? "" : " ", name);
  };
  add(cpu.avx2, "avx2");
  add(cpu.avx512, "avx512");
  add(cpu.avx512_bf16, "avx512_bf16");
  add(cpu.amx_bf16, "amx_bf16");
  add(cpu.neon, "neon");
  std::string text = "machine\n";
  text += heed::format("  cpu               {} ({}, family {}, model {})\n", cpu.model.empty() ? "unknown" : cpu.model,
                       cpu.vendor.empty() ? "unknown" : cpu.vendor, cpu.family, cpu.model_number);
  text += heed::format("  cores             {}\n", cpu.num_cores);
  text += heed::format("  caches            L1d {}, L2 {} per core, L3 {}\n", size_text(cpu.l1d_bytes),
                       size_text(cpu.l2_bytes), size_text(cpu.l3_bytes));
  text += heed::format("  instruction sets  {}\n", sets.empty() ? "none that heed uses" : sets);
  if (cpu.avx512_bf16) {
    text += heed::format("  bf16 dot product  {} than f32 multiply-adds here\n",
                         cpu.bf16_dot_pays ? "faster" : "not faster");
  }
  return text;
}

// Sentences of several lines stay within their column.
std::string entry_text(std::string_view name, std::string text) {
  for (size_t at = text.find('\n'); at != std::string::npos; at = text.find('\n', at + 1)) text.insert(at + 1, 20, ' ');
  return heed::format("  {:<16}  {}\n", name, text);
}

std::string cache_text() {
  const std::string folder = cuda::default_cache_folder();
  std::error_code error;  // to ask makes no folder
  if (!folder.empty() && !std::filesystem::exists(folder, error) && !error)
    return heed::format("{}: nothing yet", folder);
  const cuda::DiskCache& cache = cuda::disk_cache();
  if (cache.folder().empty()) return "none: no folder that could be used; set HEED_CACHE_DIR";
  const cuda::DiskCache::Contents contents = cache.contents();
  return heed::format("{}: {} kernel{}, {} KiB", cache.folder(), contents.num_kernels,
                      contents.num_kernels == 1 ? "" : "s", (contents.bytes + 1023) >> 10);
}

std::string gpu_text() {
  std::string text = "gpu\n";
  const bool has_driver = cuda::driver().ok();
  const int32_t driver_version = has_driver ? cuda::driver().value()->version : 0;
  if (has_driver)
    text += entry_text("driver", heed::format("CUDA {}.{}", driver_version / 1000, driver_version % 1000 / 10));
  if (const auto& devices = cuda::devices(); devices.ok()) {
    for (const cuda::DeviceFacts& facts : devices.value()) {
      text += entry_text(heed::format("device {}", facts.index),
                         heed::format("{}, compute capability {}.{}, {} multiprocessors, {:.1f} GiB, L2 {}", facts.name,
                                      facts.major, facts.minor, facts.multiprocessors,
                                      static_cast<double>(facts.memory_bytes) / (1 << 30), size_text(facts.l2_bytes)));
    }
  } else {
    text += entry_text("devices", heed::format("none: {}", devices.status().message()));
  }
  if (const auto compiler = cuda::nvrtc(driver_version); compiler.ok()) {
    const cuda::NvrtcVersion version = cuda::nvrtc_version(*compiler.value());
    text += entry_text(
        "compiler", heed::format("NVRTC {}.{}, {}", version.major, version.minor, cuda::nvrtc_path(*compiler.value())));
  } else {
    text += entry_text("compiler", compiler.status().message());
  }
  return text + entry_text("kernel cache", cache_text());
}

// Small problems that a row of each kind does; a row is here if it does any of them.
std::vector<std::string_view> sample_lines(std::string_view op, bool backward, bool gpu) {
  if (gpu && op == "kv_append") return {"kv_append b=1 hkv=1 sn=1 sk=64 d=64 bf16 device=cuda"};
  if (gpu && backward) return {"attention b=1 hq=1 hkv=1 sq=64 sk=64 d=64 bf16 pass=bwd device=cuda"};
  if (gpu) {
    return {"attention b=1 hq=1 hkv=1 sq=64 sk=64 d=64 bf16 device=cuda",
            "attention b=1 hq=1 hkv=1 sq=1 sk=64 d=64 bf16 device=cuda",
            "attention b=1 hq=1 hkv=1 sq=64 sk=64 d=64 f32 device=cuda"};
  }
  if (op == "kv_append") return {"kv_append b=1 hkv=1 sn=1 sk=64 d=64 f32"};
  if (backward)
    return {"attention b=1 hq=1 hkv=1 sq=64 sk=64 d=64 f32 pass=bwd",
            "attention b=1 hq=1 hkv=1 sq=64 sk=64 d=64 bf16 pass=bwd"};
  return {"attention b=1 hq=1 hkv=1 sq=64 sk=64 d=64 f32", "attention b=1 hq=1 hkv=1 sq=64 sk=64 d=64 bf16"};
}

template <class Problem>
std::string row_text(const Impl<Problem>& row, std::string_view op) {
  std::string reason = "no sample problem of this row could be read";
  for (const std::string_view line :
       sample_lines(op, row.name.find("_bwd") != std::string_view::npos, row.name.starts_with("cuda/"))) {
    const Result<ProblemLine> parsed = parse_problem_line(line);
    if (!parsed.ok()) continue;
    const Verdict verdict = row.check(std::get<Problem>(parsed.value().problem), machine());
    if (verdict.accepted) return heed::format("  yes  {:<34} {}\n", row.name, row.summary);
    reason = verdict.reason;
  }
  return heed::format("  no   {:<34} {}\n", row.name, reason);
}

std::string config_text() {
  std::string text = "configuration\n";
  for (const ConfigEntry& entry : config_entries()) {
    text += heed::format("  {:<16} {:<10} {:<9} {}\n", entry.name, entry.value.empty() ? "\"\"" : entry.value,
                         entry.is_set ? "(set)" : "(default)", entry.help);
  }
  for (const std::string& warning : config_warnings()) text += heed::format("  warning: {}\n", warning);
  return text;
}

std::string info_text() {
  std::string text = heed::format("heed {} (C ABI {})\n", HEED_VERSION, HEED_ABI_VERSION);
  text += machine_text(machine().cpu);
  text += gpu_text();
  text += "backends\n";
  for (const Impl<AttentionProblem>* row : impls<AttentionProblem>()) text += row_text(*row, "attention");
  for (const Impl<KvAppendProblem>* row : impls<KvAppendProblem>()) text += row_text(*row, "kv_append");
  return text + config_text();
}

}  // namespace
}  // namespace heed

extern "C" heed_status heed_info(char* buffer, size_t buffer_bytes, size_t* needed) {
  return heed::guarded(
      [&]() -> heed::Status { return heed::copy_text(heed::info_text(), buffer, buffer_bytes, needed); });
}
