#include "base/config.h"

#include <array>
#include <charconv>
#include <cstdlib>
#include <vector>

#include "base/format.h"

namespace heed {
namespace {

struct State {
  Config config;
  std::array<char, 128> backend = {};
  std::array<ConfigEntry, 5> entries = {{
      {"HEED_BACKEND", "", "force one backend: a folder (cpu, ref) or a full name; that one or an error", {}, false},
      {"HEED_THREADS", "0", "CPU threads of heed's own pool, the caller's included; 0: one per core", {}, false},
      {"HEED_LOG", "off", "what the log callback hears: off, error, warning, info or debug, and worse", {}, false},
      {"HEED_SPIN_US", "50", "microseconds that an idle thread of the pool spins before it sleeps", {}, false},
      {"HEED_PLAN_CACHE", "1024", "plans kept by the one-call functions; 0: none", {}, false},
  }};
  std::vector<std::string> warnings;

  State() {
    take(entries[0], "shorter than 128 characters", [&](const std::string& text) { return read_backend(text); });
    take(entries[1], "an integer from 0 to 1024",
         [&](const std::string& text) { return read(text, 0, 1024, config.threads); });
    take(entries[2], "off, error, warning, info or debug", [&](const std::string& text) { return read_level(text); });
    take(entries[3], "an integer from 0 to 1000000",
         [&](const std::string& text) { return read(text, 0, 1000000, config.spin_us); });
    take(entries[4], "an integer from 0 to 1000000",
         [&](const std::string& text) { return read(text, 0, 1000000, config.plan_cache); });
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

  bool read_backend(const std::string& text) {
    if (text.size() >= backend.size()) return false;
    text.copy(backend.data(), text.size());
    config.backend = {backend.data(), text.size()};
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
  static const State instance;
  return instance;
}

}  // namespace

const Config& config() { return state().config; }
std::span<const ConfigEntry> config_entries() { return state().entries; }
std::span<const std::string> config_warnings() { return state().warnings; }

}  // namespace heed
