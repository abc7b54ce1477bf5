// fmt's implementation is compiled here and nowhere else; the rest of heed sees its declarations only.
#define FMT_HEADER_ONLY 1
#include <fmt/format.h>

#include "base/format.h"

namespace heed {

std::string vformat(fmt::string_view text, fmt::format_args args) { return fmt::vformat(text, args); }

}  // namespace heed
