// Text formatting for messages: fmt, compiled once into the library (format.cpp), nothing linked at run time.
#pragma once

#include <fmt/core.h>

namespace heed {
using fmt::format;
}
