#include "machine_facts.h"

#include <sched.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <ctime>
#include <fstream>
#include <set>
#include <sstream>
#include <thread>

#include "format.h"

namespace heed::cli {
namespace {

// The value of the first line "key : value" of /proc/cpuinfo.
std::string processor_fact(std::string_view key) {
  std::ifstream file("/proc/cpuinfo");
  std::string line;
  while (std::getline(file, line)) {
    if (!line.starts_with(key)) continue;
    const size_t colon = line.find(": ");
    if (colon != std::string::npos) return line.substr(colon + 2);
  }
  return {};
}

// Of the many flags, those that an implementation's choice can depend on.
std::vector<std::string> instruction_sets() {
  const std::set<std::string> wanted = {"avx2",        "fma",         "f16c",     "avx512f", "avx512bw", "avx512vl",
                                        "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd",   "bf16",     "sve"};
  std::istringstream flags(processor_fact("flags") + " " + processor_fact("Features"));
  std::vector<std::string> found;
  for (std::string flag; flags >> flag;) {
    if (wanted.contains(flag)) found.push_back(flag);
  }
  return found;
}

}  // namespace

int usable_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (::sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

int64_t last_cache_bytes() {
  int64_t bytes = 0;
#if defined(_SC_LEVEL3_CACHE_SIZE)
  bytes = std::max<int64_t>(::sysconf(_SC_LEVEL3_CACHE_SIZE), ::sysconf(_SC_LEVEL2_CACHE_SIZE));
#endif
  return bytes > 0 ? bytes : int64_t{32} << 20;
}

nlohmann::json machine_facts() {
  utsname system = {};
  ::uname(&system);
  const int64_t memory = static_cast<int64_t>(::sysconf(_SC_PHYS_PAGES)) * ::sysconf(_SC_PAGE_SIZE);
  return {{"cpu", processor_fact("model name")},
          {"cores", usable_cores()},
          {"instruction_sets", instruction_sets()},
          {"last_cache_bytes", last_cache_bytes()},
          {"memory_bytes", memory},
          {"arch", system.machine},
          {"system", cli::format("{} {}", system.sysname, system.release)}};
}

std::string utc_date() {
  const std::time_t now = std::time(nullptr);
  std::tm utc = {};
  ::gmtime_r(&now, &utc);
  char text[sizeof "2026-01-31T23:59:59Z"];
  return {text, std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", &utc)};
}

}  // namespace heed::cli
