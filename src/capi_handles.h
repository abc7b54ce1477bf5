// Opaque handles of the C interface, and its rules for struct_size and for text in a caller's buffer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string_view>
#include <utility>
#include <variant>

#include "base/format.h"
#include "base/status.h"
#include "heed/core.h"
#include "plan/planner.h"

struct heed_problem {
  std::variant<heed::AttentionProblem, heed::KvAppendProblem> problem;
};

struct heed_plan {
  std::variant<std::shared_ptr<const heed::Plan<heed::AttentionProblem>>,
               std::shared_ptr<const heed::Plan<heed::KvAppendProblem>>>
      plan;
};

namespace heed {

// A struct that starts with struct_size, as this version knows it. No version had a shorter one, so a shorter one is an
// error; a longer one is from a later heed and is understood as long as what it adds is zero.
template <class Struct>
Status check_struct(const Struct* object, std::string_view name) {
  if (object == nullptr) return invalid_argument(heed::format("{} = NULL: must be an address", name));
  if (object->struct_size == sizeof(Struct)) return {};
  if (object->struct_size < sizeof(Struct)) {
    return invalid_argument(heed::format("{}.struct_size = {}: must be the struct's size, {} in heed {}", name,
                                         object->struct_size, sizeof(Struct), HEED_VERSION));
  }
  const auto* const bytes = reinterpret_cast<const unsigned char*>(object);
  for (uint64_t i = sizeof(Struct); i < object->struct_size; ++i) {
    if (bytes[i] != 0) {
      return not_supported(heed::format("{}: byte {} is set, but heed {} knows only the first {}; a later heed may",
                                        name, i, HEED_VERSION, sizeof(Struct)));
    }
  }
  return {};
}

// Writes an output struct but its struct_size, which stays the caller's.
template <class Struct>
Status fill_struct(Struct* object, std::string_view name, Struct value) {
  HEED_RETURN_IF_ERROR(check_struct(object, name));
  value.struct_size = object->struct_size;
  std::memcpy(object, &value, sizeof value);
  return {};
}

Status copy_text(std::string_view text, char* buffer, size_t buffer_bytes, size_t* needed);

// "" where nothing is forced.
Status read_backend(const heed_plan_options* options, std::string_view& backend);

}  // namespace heed
