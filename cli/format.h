// Text: fmt, compiled once into the command line (format.cpp); the rest of it sees declarations only.
#pragma once

#include <fmt/core.h>

#include <cstdio>
#include <string>

namespace heed::cli {

std::string vformat(fmt::string_view text, fmt::format_args args);
void vprint(std::FILE* file, fmt::string_view text, fmt::format_args args);

template <class... Args>
std::string format(fmt::format_string<Args...> text, Args&&... args) {
  return cli::vformat(text, fmt::make_format_args(args...));
}

template <class... Args>
void print(std::FILE* file, fmt::format_string<Args...> text, Args&&... args) {
  cli::vprint(file, text, fmt::make_format_args(args...));
}

template <class... Args>
void print(fmt::format_string<Args...> text, Args&&... args) {
  cli::vprint(stdout, text, fmt::make_format_args(args...));
}

// "2, 3, 4".
template <class Range>
std::string listed(const Range& range) {
  std::string text;
  for (const auto& item : range) text += cli::format("{}{}", text.empty() ? "" : ", ", item);
  return text;
}

}  // namespace heed::cli
