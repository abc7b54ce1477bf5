// fmt's implementation is compiled here and nowhere else in the command line.
#define FMT_HEADER_ONLY 1
#include <fmt/format.h>

#include "format.h"

namespace heed::cli {

std::string vformat(fmt::string_view text, fmt::format_args args) { return fmt::vformat(text, args); }

void vprint(std::FILE* file, fmt::string_view text, fmt::format_args args) { fmt::vprint(file, text, args); }

}  // namespace heed::cli
