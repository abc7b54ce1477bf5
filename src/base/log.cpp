#include "base/log.h"

#include <algorithm>
#include <atomic>

#include "base/config.h"

namespace heed {
namespace {

// The level stands alone, so that a message nobody wants costs one relaxed load.
std::atomic<int32_t> g_level{-1};
std::atomic<heed_log_fn> g_callback{nullptr};
std::atomic<void*> g_context{nullptr};

}  // namespace

void set_log(heed_log_fn callback, void* context, int32_t level) {
  g_level.store(-1, std::memory_order_relaxed);
  g_context.store(context, std::memory_order_relaxed);
  g_callback.store(callback, std::memory_order_release);
  if (callback == nullptr) return;
  g_level.store(std::max(level, config().log_level), std::memory_order_relaxed);
  for (const std::string& warning : config_warnings()) log_message(HEED_LOG_WARNING, warning);
}

bool log_enabled(int32_t level) { return level <= g_level.load(std::memory_order_relaxed); }

void log_message(int32_t level, const std::string& message) {
  if (!log_enabled(level)) return;
  const heed_log_fn callback = g_callback.load(std::memory_order_acquire);
  if (callback != nullptr) callback(g_context.load(std::memory_order_relaxed), level, message.c_str());
}

}  // namespace heed
