// Text formatting for messages: fmt, compiled once into the library (format.cpp), nothing linked at run time.
#pragma once

#include <fmt/core.h>

#include <string>

namespace heed {

std::string vformat(fmt::string_view text, fmt::format_args args);

template <class... Args>
std::string format(fmt::format_string<Args...> text, Args&&... args) {
  return heed::vformat(text, fmt::make_format_args(args...));
}

}  // namespace heed
