// Any text as a problem line: a problem or a sentence that points at the place; and what was read, printed, reads as
// the same and prints as the same.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "ops/problem_line.h"

namespace {

[[noreturn]] void fail(const char* what, const std::string& first, const std::string& second) {
  std::fprintf(stderr, "%s\n  %s\n  %s\n", what, first.c_str(), second.c_str());
  std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t size) {
  const std::string text(reinterpret_cast<const char*>(bytes), size);
  const heed::Result<heed::ProblemLine> parsed = heed::parse_problem_line(text);
  if (!parsed.ok()) {
    if (parsed.status().message().empty()) fail("an error without a sentence", text, "");
    return 0;
  }
  const std::string printed = heed::to_string(parsed.value());
  const heed::Result<heed::ProblemLine> again = heed::parse_problem_line(printed);
  if (!again.ok()) fail("its print is refused", printed, again.status().message());
  if (again.value().problem != parsed.value().problem) fail("its print is another problem", text, printed);
  if (!(again.value().data == parsed.value().data)) fail("its print has other data", text, printed);
  const std::string reprinted = heed::to_string(again.value());
  if (reprinted != printed) fail("its print changes", printed, reprinted);
  return 0;
}
