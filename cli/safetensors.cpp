#include "safetensors.h"

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>

#include "format.h"
#include "input_file.h"

namespace heed::cli {
namespace {

struct Dtype {
  std::string_view name;
  size_t bytes;
  std::optional<ElementType> type;  // none: legal in a file, unusable here
};
constexpr Dtype kDtypes[] = {
    {"BOOL", 1, ElementType::kBool},
    {"I32", 4, ElementType::kI32},
    {"I64", 8, ElementType::kI64},
    {"F16", 2, ElementType::kF16},
    {"BF16", 2, ElementType::kBf16},
    {"F32", 4, ElementType::kF32},
    {"F64", 8, ElementType::kF64},
    {"U8", 1, {}},
    {"I8", 1, {}},
    {"I16", 2, {}},
    {"U16", 2, {}},
    {"U32", 4, {}},
    {"U64", 8, {}},
    {"F8_E4M3", 1, {}},
    {"F8_E5M2", 1, {}},
};

const Dtype* find_dtype(std::string_view name) {
  const auto* row =
      std::find_if(std::begin(kDtypes), std::end(kDtypes), [&](const Dtype& d) { return d.name == name; });
  return row == std::end(kDtypes) ? nullptr : row;
}

// What JSON libraries leave to the caller: a name given twice, and nesting deeper than the format's three levels.
class StrictReader {
 public:
  bool operator()(int depth, nlohmann::json::parse_event_t event, nlohmann::json& value) {
    using Event = nlohmann::json::parse_event_t;
    if (depth > 4) throw FileError("its safetensors header nests too deeply");
    if (event == Event::object_start) names_.emplace_back();
    if (event == Event::object_end) names_.pop_back();
    if (event == Event::key && !names_.back().insert(value.get<std::string>()).second) {
      throw FileError(cli::format("its safetensors header has '{}' twice", value.get<std::string>()));
    }
    return true;
  }

 private:
  std::vector<std::set<std::string>> names_;
};

nlohmann::json parse_json(std::span<const std::byte> header) {
  const auto* text = reinterpret_cast<const char*>(header.data());
  if (header.empty() || text[0] != '{') throw FileError("its safetensors header does not start with '{'");
  try {
    StrictReader strict;
    return nlohmann::json::parse(text, text + header.size(), [&](int depth, auto event, nlohmann::json& value) {
      return strict(depth, event, value);
    });
  } catch (const nlohmann::json::exception& error) {
    throw FileError("its safetensors header is no JSON object");
  }
}

SafetensorsEntry parse_entry(const std::string& name, const nlohmann::json& value, uint64_t data_bytes) {
  const auto refuse = [&](std::string_view why) { throw FileError(cli::format("tensor '{}' {}", name, why)); };
  const auto is_size = [](const nlohmann::json& number) {
    return number.is_number_unsigned() && number.get<uint64_t>() <= static_cast<uint64_t>(INT64_MAX);
  };
  if (!value.is_object() || !value.contains("dtype") || !value.contains("shape") || !value.contains("data_offsets")) {
    refuse("lacks one of dtype, shape, data_offsets");
  }
  const nlohmann::json &dtype = value["dtype"], &shape = value["shape"], &offsets = value["data_offsets"];
  if (!dtype.is_string()) refuse("has a dtype that is no name");
  if (!shape.is_array() || !std::all_of(shape.begin(), shape.end(), is_size))
    refuse("has a shape that is no list of sizes");
  if (!offsets.is_array() || offsets.size() != 2 || !is_size(offsets[0]) || !is_size(offsets[1])) {
    refuse("has data_offsets that are no two sizes");
  }
  SafetensorsEntry entry{dtype.get<std::string>(), shape.get<std::vector<int64_t>>(), offsets[0], offsets[1]};
  if (entry.begin > entry.end || entry.end > data_bytes) {
    refuse(cli::format("lies at bytes {} to {} of {}: the file is truncated or its offsets are wrong", entry.begin,
                       entry.end, data_bytes));
  }
  if (const Dtype* known = find_dtype(entry.dtype)) {
    const size_t bytes = checked_bytes(entry.shape, known->bytes, cli::format("tensor '{}' of shape", name));
    if (bytes != entry.end - entry.begin) {
      refuse(cli::format("of shape {} and dtype {} needs {} bytes, its offsets give {}", shape_text(entry.shape),
                         entry.dtype, bytes, entry.end - entry.begin));
    }
  }
  return entry;
}

void check_layout(const SafetensorsIndex& index, uint64_t data_bytes) {
  std::vector<std::pair<const SafetensorsEntry*, const std::string*>> order;
  for (const auto& [name, entry] : index.entries) order.emplace_back(&entry, &name);
  std::sort(order.begin(), order.end(), [](const auto& a, const auto& b) {
    return std::pair(a.first->begin, a.first->end) < std::pair(b.first->begin, b.first->end);
  });
  uint64_t at = 0;
  for (const auto& [entry, name] : order) {
    if (entry->begin < at) throw FileError(cli::format("tensor '{}' overlaps the one before it", *name));
    if (entry->begin > at)
      throw FileError(cli::format("{} bytes before tensor '{}' belong to none", entry->begin - at, *name));
    at = entry->end;
  }
  if (at != data_bytes) throw FileError(cli::format("{} bytes at its end belong to no tensor", data_bytes - at));
}

}  // namespace

uint64_t safetensors_header_bytes(std::span<const std::byte> first_bytes, uint64_t file_bytes) {
  if (first_bytes.size() < 8) throw FileError("it is too short for a safetensors file");
  uint64_t bytes = 0;
  for (int i = 7; i >= 0; --i) bytes = bytes << 8 | std::to_integer<uint64_t>(first_bytes[i]);
  if (bytes > kMaxSafetensorsHeaderBytes) {
    throw FileError(
        cli::format("its safetensors header claims {} bytes, at most {} are legal", bytes, kMaxSafetensorsHeaderBytes));
  }
  if (bytes > file_bytes - 8) throw FileError("it is truncated inside its safetensors header");
  return bytes;
}

SafetensorsIndex parse_safetensors_header(std::span<const std::byte> header, uint64_t file_bytes) {
  const nlohmann::json json = parse_json(header);
  SafetensorsIndex index;
  index.data_offset = 8 + header.size();
  const uint64_t data_bytes = file_bytes - index.data_offset;
  for (const auto& [name, value] : json.items()) {
    if (name == "__metadata__") continue;
    index.entries.emplace(name, parse_entry(name, value, data_bytes));
  }
  check_layout(index, data_bytes);
  return index;
}

ElementType safetensors_type(const SafetensorsEntry& entry, std::string_view name) {
  const Dtype* dtype = find_dtype(entry.dtype);
  if (dtype == nullptr || !dtype->type) {
    throw FileError(
        cli::format("tensor '{}' has dtype {}; heed reads F16, BF16, F32, F64, I32, I64 and BOOL", name, entry.dtype));
  }
  return *dtype->type;
}

NamedTensors read_safetensors(std::span<const std::byte> file) {
  const uint64_t header_bytes = safetensors_header_bytes(file.first(std::min<size_t>(file.size(), 8)), file.size());
  const SafetensorsIndex index = parse_safetensors_header(file.subspan(8, header_bytes), file.size());
  NamedTensors tensors;
  for (const auto& [name, entry] : index.entries) {
    const Dtype* dtype = find_dtype(entry.dtype);
    if (dtype == nullptr || !dtype->type) continue;
    Tensor tensor(*dtype->type, entry.shape);
    const size_t bytes = tensor.data.size();
    if (bytes > 0) std::memcpy(tensor.data.data(), file.data() + index.data_offset + entry.begin, bytes);
    tensors.emplace(name, std::move(tensor));
  }
  return tensors;
}

SafetensorsIndex read_safetensors_index(const InputFile& file) {
  std::vector<std::byte> first(std::min<uint64_t>(file.size(), 8));
  file.read(0, first);
  std::vector<std::byte> header(safetensors_header_bytes(first, file.size()));
  file.read(8, header);
  return parse_safetensors_header(header, file.size());
}

Tensor read_safetensors_tensor(const InputFile& file, const SafetensorsIndex& index, const std::string& name) {
  const SafetensorsEntry& entry = index.entries.at(name);
  Tensor tensor(safetensors_type(entry, name), entry.shape);
  file.read(index.data_offset + entry.begin, {tensor.data.data(), tensor.data.size()});
  return tensor;
}

std::vector<std::byte> make_safetensors_header(const NamedTensors& tensors, std::vector<const Tensor*>& order) {
  // Wide elements first: then every tensor is aligned to its element, whatever the shapes.
  std::vector<std::pair<const Tensor*, const std::string*>> sorted;
  for (const auto& [name, tensor] : tensors) sorted.emplace_back(&tensor, &name);
  std::stable_sort(sorted.begin(), sorted.end(), [](const auto& a, const auto& b) {
    return element_bytes(a.first->type) > element_bytes(b.first->type);
  });
  nlohmann::ordered_json json = nlohmann::ordered_json::object();
  uint64_t at = 0;
  for (const auto& [tensor, name] : sorted) {
    const auto* dtype =
        std::find_if(std::begin(kDtypes), std::end(kDtypes), [&](const Dtype& d) { return d.type == tensor->type; });
    json[*name] = {{"dtype", dtype->name}, {"shape", tensor->shape}, {"data_offsets", {at, at + tensor->data.size()}}};
    at += tensor->data.size();
    order.push_back(tensor);
  }
  std::string text = json.dump();
  text.append((8 - text.size() % 8) % 8, ' ');
  std::vector<std::byte> header(8 + text.size());
  for (int i = 0; i < 8; ++i) header[i] = static_cast<std::byte>(text.size() >> (8 * i));
  std::memcpy(header.data() + 8, text.data(), text.size());
  return header;
}

}  // namespace heed::cli
