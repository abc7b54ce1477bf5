// The table of HEED_* variables: values, and what happens to bad ones. Each case runs in a child with its own
// environment, because a process reads the table once.
#include <gtest/gtest.h>

#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "base/config.h"
#include "base/log.h"
#include "heed/core.h"

namespace heed {
namespace {

template <class Body>
void in_child(std::vector<std::pair<const char*, const char*>> variables, Body body) {
  const pid_t child = fork();
  if (child == 0) {
    for (const auto& [name, value] : variables) setenv(name, value, 1);
    _exit(body() ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

TEST(Config, Defaults) {
  in_child({}, [] {
    for (const char* name : {"HEED_BACKEND", "HEED_THREADS", "HEED_LOG", "HEED_SPIN_US", "HEED_PLAN_CACHE", "HEED_JIT",
                             "HEED_CACHE_DIR", "HEED_NVRTC"})
      unsetenv(name);
    const Config& c = config();
    return c.backend.empty() && c.threads == 0 && c.log_level == -1 && c.spin_us == 50 && c.plan_cache == 1024 &&
           !c.jit_require_cache && c.cache_dir.empty() && c.nvrtc.empty() && config_warnings().empty();
  });
}

TEST(Config, ValuesFromTheEnvironment) {
  in_child({{"HEED_BACKEND", "ref"},
            {"HEED_THREADS", "3"},
            {"HEED_LOG", "info"},
            {"HEED_SPIN_US", "0"},
            {"HEED_PLAN_CACHE", "7"},
            {"HEED_JIT", "require-cache"},
            {"HEED_CACHE_DIR", "/a/folder"},
            {"HEED_NVRTC", "/a/file"}},
           [] {
             const Config& c = config();
             bool all_set = true;
             for (const ConfigEntry& entry : config_entries()) all_set = all_set && entry.is_set;
             return c.backend == "ref" && c.threads == 3 && c.log_level == HEED_LOG_INFO && c.spin_us == 0 &&
                    c.plan_cache == 7 && c.jit_require_cache && c.cache_dir == "/a/folder" && c.nvrtc == "/a/file" &&
                    all_set;
           });
}

TEST(Config, BadValuesAreWarnedOfAndTheDefaultHolds) {
  for (const char* bad : {"-1", "1025", "four", "4 ", "99999999999999999999", "0x4"}) {
    in_child({{"HEED_THREADS", bad}}, [bad] {
      const bool warned = config_warnings().size() == 1 && config_warnings()[0].find(bad) != std::string::npos &&
                          config_warnings()[0].find("HEED_THREADS") != std::string::npos;
      return config().threads == 0 && !config_entries()[1].is_set && warned;
    });
  }
  in_child({{"HEED_LOG", "loud"}}, [] { return config().log_level == -1 && config_warnings().size() == 1; });
}

std::vector<std::string>& messages() {
  static std::vector<std::string> list;
  return list;
}

void keep(void* context, int32_t level, const char* message) {
  *static_cast<int*>(context) += 1;
  messages().push_back(std::to_string(level) + " " + message);
}

TEST(Config, TheLogHearsOfBadValues) {
  in_child({{"HEED_SPIN_US", "soon"}, {"HEED_PLAN_CACHE", "-5"}}, [] {
    config();  // read before there is a callback: nothing may be lost
    int calls = 0;
    return heed_set_log(&keep, &calls, HEED_LOG_WARNING) == HEED_OK && calls == 2 &&
           messages()[0].find("1 HEED_SPIN_US = \"soon\"") == 0 &&
           messages()[1].find("HEED_PLAN_CACHE") != std::string::npos;
  });
}

TEST(Log, TheLevelIsTheOneThatSaysMore) {
  in_child({{"HEED_LOG", "info"}}, [] {
    int calls = 0;
    if (log_enabled(HEED_LOG_ERROR)) return false;  // no callback yet
    if (heed_set_log(&keep, &calls, HEED_LOG_ERROR) != HEED_OK) return false;
    const bool louder = log_enabled(HEED_LOG_INFO) && !log_enabled(HEED_LOG_DEBUG);
    log_message(HEED_LOG_INFO, "heard");
    log_message(HEED_LOG_DEBUG, "not heard");
    heed_set_log(nullptr, nullptr, HEED_LOG_ERROR);
    log_message(HEED_LOG_ERROR, "not heard either");
    return louder && calls == 1 && messages().back() == "2 heard";
  });
}

TEST(Log, FailuresAreLogged) {
  in_child({}, [] {
    int calls = 0;
    heed_set_log(&keep, &calls, HEED_LOG_ERROR);
    return heed_set_log(&keep, &calls, 9) == HEED_INVALID_ARGUMENT && calls == 1 &&
           messages()[0].find("level = 9") != std::string::npos;
  });
}

TEST(TableThroughC, EveryEntry) {
  EXPECT_EQ(heed_config_count(), 8);
  for (int32_t i = 0; i < heed_config_count(); ++i) {
    heed_config_entry entry = {};
    entry.struct_size = sizeof entry;
    ASSERT_EQ(heed_config_get(i, &entry), HEED_OK) << heed_last_error();
    EXPECT_EQ(std::string(entry.name).rfind("HEED_", 0), 0u);
    EXPECT_NE(entry.value, nullptr);
    EXPECT_NE(std::string(entry.help), "");
  }
  heed_config_entry entry = {};
  entry.struct_size = sizeof entry;
  EXPECT_EQ(heed_config_get(8, &entry), HEED_INVALID_ARGUMENT);
  EXPECT_STREQ(heed_last_error(), "index = 8: must be from 0 to 7");
}

}  // namespace
}  // namespace heed
