// Every HEED_* environment variable, in one table (config.cpp). Read once.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace heed {

struct Config {
  std::string_view backend;        // HEED_BACKEND: "" or a name to force
  int32_t threads = 0;             // HEED_THREADS: 0: one per core
  int32_t log_level = -1;          // HEED_LOG: error|warning|info|debug -> 0..3; -1 off
  int64_t spin_us = 50;            // HEED_SPIN_US: how long idle threads spin before they sleep
  int64_t plan_cache = 1024;       // HEED_PLAN_CACHE: entries
  bool jit_require_cache = false;  // HEED_JIT=require-cache: a GPU kernel that is not on disk is an error
  std::string_view cache_dir;      // HEED_CACHE_DIR: "": $XDG_CACHE_HOME/heed, else ~/.cache/heed
  std::string_view nvrtc;          // HEED_NVRTC: "" or the file of the run-time compiler
};

struct ConfigEntry {
  const char* name;
  const char* default_value;
  const char* help;
  std::string value;
  bool is_set = false;
};

const Config& config();
std::span<const ConfigEntry> config_entries();
// What was wrong with the environment, one sentence each; told to the log callback when it is set.
std::span<const std::string> config_warnings();

}  // namespace heed
