// The library's only voice: the caller's callback. With none set a message costs one relaxed load.
#pragma once

#include <string>

#include "heed/core.h"

namespace heed {

void set_log(heed_log_fn callback, void* context, int32_t level);
bool log_enabled(int32_t level);
void log_message(int32_t level, const std::string& message);

}  // namespace heed
