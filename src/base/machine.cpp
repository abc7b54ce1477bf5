#include "base/machine.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <fstream>
#include <string_view>
#include <thread>

#include "base/fork.h"

#if defined(__linux__)
#include <sched.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace heed {
namespace {

std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

#if defined(__x86_64__)

struct Registers {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf = 0) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);  // zeroes where the leaf does not exist
  return r;
}

bool bit(unsigned word, int index) { return (word >> index & 1u) != 0; }

// Which register states the operating system saves at a context switch; without that the instructions fault.
uint64_t saved_states(const Registers& leaf1) {
  if (!bit(leaf1.ecx, 27)) return 0;  // OSXSAVE
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
}

std::string text_of(std::initializer_list<unsigned> words) {
  std::string text;
  for (const unsigned word : words) text.append(reinterpret_cast<const char*>(&word), sizeof word);
  text.erase(std::find(text.begin(), text.end(), '\0'), text.end());
  const size_t first = text.find_first_not_of(' ');
  const size_t last = text.find_last_not_of(' ');
  return first == std::string::npos ? std::string() : text.substr(first, last - first + 1);
}

void read_processor(CpuFacts& cpu) {
  const Registers leaf0 = cpuid(0), leaf1 = cpuid(1), leaf7 = cpuid(7), leaf7b = cpuid(7, 1);
  cpu.vendor = text_of({leaf0.ebx, leaf0.edx, leaf0.ecx});
  for (unsigned leaf = 0x80000002u; leaf <= 0x80000004u; ++leaf) {
    const Registers r = cpuid(leaf);
    cpu.model += text_of({r.eax, r.ebx, r.ecx, r.edx});
    if (leaf < 0x80000004u && r.edx >> 24 == ' ') cpu.model += ' ';  // text_of trims each part
  }
  cpu.model.erase(cpu.model.find_last_not_of(' ') + 1);
  const unsigned family = leaf1.eax >> 8 & 0xf, model = leaf1.eax >> 4 & 0xf;
  cpu.family = static_cast<int32_t>(family == 0xf ? family + (leaf1.eax >> 20 & 0xff) : family);
  cpu.model_number = static_cast<int32_t>(family == 0xf || family == 6 ? (leaf1.eax >> 16 & 0xf) << 4 | model : model);

  constexpr uint64_t kYmm = 0x6, kZmm = 0xe6, kTiles = 0x60000;
  const uint64_t states = saved_states(leaf1);
  const bool fma = bit(leaf1.ecx, 12), f16c = bit(leaf1.ecx, 29);
  const bool avx2 = bit(leaf7.ebx, 5), bmi1 = bit(leaf7.ebx, 3), bmi2 = bit(leaf7.ebx, 8);
  cpu.avx2 = (states & kYmm) == kYmm && bit(leaf1.ecx, 28) && avx2 && fma && f16c && bmi1 && bmi2;
  bool avx512 = true;
  for (const int feature : {16, 17, 28, 30, 31}) avx512 = avx512 && bit(leaf7.ebx, feature);  // F, DQ, CD, BW, VL
  cpu.avx512 = cpu.avx2 && (states & kZmm) == kZmm && avx512;
  cpu.avx512_bf16 = cpu.avx512 && bit(leaf7b.eax, 5);
  cpu.amx_bf16 = cpu.avx512 && (states & kTiles) == kTiles && bit(leaf7.edx, 22) && bit(leaf7.edx, 24);  // BF16, TILE
  cpu.bf16_dot_pays = cpu.avx512_bf16 && cpu.vendor == "AuthenticAMD" && cpu.family >= 0x19;
}

#else

// Linux names the model of some ARM machines in /proc/cpuinfo and of boards in the device tree.
void read_processor(CpuFacts& cpu) {
#if defined(__aarch64__)
  cpu.neon = true;
  cpu.vendor = "ARM";
#endif
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    const size_t colon = line.find(": ");
    if (colon == std::string::npos) continue;
    if (line.starts_with("model name") || line.starts_with("Model")) cpu.model = line.substr(colon + 2);
    if (line.starts_with("CPU part") && cpu.model.empty()) cpu.model = "CPU part " + line.substr(colon + 2);
  }
  if (cpu.model.empty()) cpu.model = first_line("/sys/firmware/devicetree/base/model");
}

#endif

// "1024K" -> 1048576; 0 if it is not a size.
int64_t parse_size(const std::string& text) {
  char unit = ' ';
  long long number = 0;
  if (std::sscanf(text.c_str(), "%lld%c", &number, &unit) < 1) return 0;
  return number << (unit == 'K' ? 10 : unit == 'M' ? 20 : unit == 'G' ? 30 : 0);
}

void read_caches(CpuFacts& cpu) {
  bool found = false;
  for (int index = 0; index < 8; ++index) {
    const std::string folder = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/";
    const std::string level = first_line(folder + "level");
    const int64_t size = parse_size(first_line(folder + "size"));
    if (level.empty() || size <= 0 || first_line(folder + "type") == "Instruction") continue;
    found = true;
    if (level == "1") cpu.l1d_bytes = size;
    if (level == "2") cpu.l2_bytes = size;
    if (level == "3") cpu.l3_bytes = size;
  }
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  if (found) return;
  const auto take = [](int name, int64_t& bytes) {
    if (const long value = sysconf(name); value > 0) bytes = value;
  };
  take(_SC_LEVEL1_DCACHE_SIZE, cpu.l1d_bytes);
  take(_SC_LEVEL2_CACHE_SIZE, cpu.l2_bytes);
  take(_SC_LEVEL3_CACHE_SIZE, cpu.l3_bytes);
#endif
}

// A container's share of CPU time counts as cores: more threads than that are stopped in the middle of a region while
// the others wait for them.
int32_t quota_cores() {
  long long quota = 0, period = 0;
  if (std::sscanf(first_line("/sys/fs/cgroup/cpu.max").c_str(), "%lld %lld", &quota, &period) != 2) {  // "max 100000"
    std::sscanf(first_line("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").c_str(), "%lld", &quota);
    std::sscanf(first_line("/sys/fs/cgroup/cpu/cpu.cfs_period_us").c_str(), "%lld", &period);
  }
  if (quota <= 0 || period <= 0) return 0;
  return static_cast<int32_t>(std::min<long long>((quota + period - 1) / period, 1 << 20));
}

int32_t available_cores() {
  int32_t cores = static_cast<int32_t>(std::thread::hardware_concurrency());
#if defined(__linux__)
  for (int32_t capacity = 1024; capacity <= 1 << 18; capacity *= 4) {  // EINVAL until the set holds the kernel's mask
    cpu_set_t* const set = CPU_ALLOC(capacity);
    if (set == nullptr) break;
    const size_t bytes = CPU_ALLOC_SIZE(capacity);
    const bool read = sched_getaffinity(0, bytes, set) == 0;
    if (read) cores = CPU_COUNT_S(bytes, set);
    CPU_FREE(set);
    if (read) break;
  }
#endif
  if (const int32_t quota = quota_cores(); quota > 0) cores = std::min(cores, quota);
  return std::max(cores, 1);
}

Machine read_machine() {
  Machine machine;
  read_processor(machine.cpu);
  read_caches(machine.cpu);
  machine.cpu.num_cores = available_cores();
  return machine;
}

}  // namespace

const Machine& machine() {
  static constinit std::atomic<bool> ready{false};
  return made_once(ready, []() -> const Machine& {
    static const Machine instance = read_machine();
    return instance;
  });
}

}  // namespace heed
