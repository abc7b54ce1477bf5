#include "base/config.h"

#include <array>
#include <atomic>
#include <charconv>
#include <cstdlib>
#include <vector>

#include "base/fork.h"
#include "base/format.h"

namespace heed {
namespace {

struct State {
  Config config;
  std::array<char, 128> backend = {};
  std::array<char, 4096> cache_dir = {}, nvrtc = {};
  std::array<ConfigEntry, 8> entries = {{
      {"HEED_BACKEND", "", "force one backend: a folder (cpu, ref) or a full name; that one or an error", {}, false},
      {"HEED_THREADS", "0", "CPU threads of heed's own pool, the caller's included; 0: one per core", {}, false},
      {"HEED_LOG", "off", "what the log callback hears: off, error, warning, info or debug, and worse", {}, false},
      {"HEED_SPIN_US", "50", "microseconds that an idle thread of the pool spins before it sleeps", {}, false},
      {"HEED_PLAN_CACHE", "1024", "plans kept by the one-call functions; 0: none", {}, false},
      {"HEED_JIT",
       "on",
       "GPU kernels: on (compile what the kernel cache lacks) or require-cache (that is an error)",
       {},
       false},
      {"HEED_CACHE_DIR",
       "",
       "folder of compiled GPU kernels; $XDG_CACHE_HOME/heed or ~/.cache/heed if empty",
       {},
       false},
      {"HEED_NVRTC", "", "the file of NVIDIA's run-time compiler, libnvrtc.so; searched for if empty", {}, false},
  }};
  std::vector<std::string> warnings;

  State() {
    take(entries[0], "shorter than 128 characters",
         [&](const std::string& text) { return read(text, backend, config.backend); });
    take(entries[1], "an integer from 0 to 1024",
         [&](const std::string& text) { return read(text, 0, 1024, config.threads); });
    take(entries[2], "off, error, warning, info or debug", [&](const std::string& text) { return read_level(text); });
    take(entries[3], "an integer from 0 to 1000000",
         [&](const std::string& text) { return read(text, 0, 1000000, config.spin_us); });
    take(entries[4], "an integer from 0 to 1000000",
         [&](const std::string& text) { return read(text, 0, 1000000, config.plan_cache); });
    take(entries[5], "on or require-cache", [&](const std::string& text) {
      config.jit_require_cache = text == "require-cache";
      return config.jit_require_cache || text == "on";
    });
    take(entries[6], "shorter than 4096 characters",
         [&](const std::string& text) { return read(text, cache_dir, config.cache_dir); });
    take(entries[7], "shorter than 4096 characters",
         [&](const std::string& text) { return read(text, nvrtc, config.nvrtc); });
  }

  // A value that `read_value` does not take leaves the default in force: a typo in the environment must not stop a
  // program that runs well without it, but it must be seen.
  template <class Read>
  void take(ConfigEntry& entry, const char* allowed, Read read_value) {
    entry.value = entry.default_value;
    const char* text = std::getenv(entry.name);
    if (text == nullptr || *text == '\0') return;
    if (read_value(std::string(text))) {
      entry.value = text;
      entry.is_set = true;
    } else {
      warnings.push_back(heed::format("{} = \"{}\": must be {}; the default \"{}\" is used", entry.name, text, allowed,
                                      entry.default_value));
    }
  }

  template <class Int>
  static bool read(const std::string& text, int64_t low, int64_t high, Int& out) {
    int64_t value = 0;
    const char* end = text.data() + text.size();
    const auto [stop, error] = std::from_chars(text.data(), end, value);
    if (error != std::errc() || stop != end || value < low || value > high) return false;
    out = static_cast<Int>(value);
    return true;
  }

  template <size_t kBytes>
  static bool read(const std::string& text, std::array<char, kBytes>& memory, std::string_view& out) {
    if (text.size() >= kBytes) return false;
    text.copy(memory.data(), text.size());
    out = {memory.data(), text.size()};
    return true;
  }

  bool read_level(const std::string& text) {
    constexpr std::array<std::string_view, 5> kNames = {"off", "error", "warning", "info", "debug"};
    for (size_t i = 0; i < kNames.size(); ++i) {
      if (text == kNames[i]) return config.log_level = static_cast<int32_t>(i) - 1, true;
    }
    return false;
  }
};

// Threads that still compute while the process exits may ask after this is destroyed. What they ask for (Config) lies in
// static memory and nowhere else, so it is still there; only what `heed info` prints owns memory.
const State& state() {
  static constinit std::atomic<bool> ready{false};
  return made_once(ready, []() -> const State& {
    static const State instance;
    return instance;
  });
}

}  // namespace

const Config& config() { return state().config; }
std::span<const ConfigEntry> config_entries() { return state().entries; }
std::span<const std::string> config_warnings() { return state().warnings; }

}  // namespace heed
