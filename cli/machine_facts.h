// The machine as figures must name it: processor, cores, caches, memory, operating system.
#pragma once

#include <nlohmann/json.hpp>

namespace heed::cli {

nlohmann::json machine_facts();
int usable_cores();          // that this process may run on
int64_t last_cache_bytes();  // the largest cache; a guess of 32 MiB where the system does not say
std::string utc_date();      // "2026-11-21T12:00:00Z"

}  // namespace heed::cli
