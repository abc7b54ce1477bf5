#include "ops/line_reader.h"

#include <algorithm>
#include <charconv>
#include <cmath>

#include "ops/tensor_layout.h"

namespace heed {
namespace {

constexpr size_t kQuotedChars = 60;

// Fit to print: short, and without bytes that a terminal would act on.
std::string quoted(std::string_view text) {
  std::string out = "`";
  for (const char c : text.substr(0, kQuotedChars)) {
    const unsigned char byte = static_cast<unsigned char>(c);
    if (byte >= 0x20 && byte < 0x7f) {
      out += c;
    } else {
      out += heed::format("\\x{:02x}", byte);
    }
  }
  if (text.size() > kQuotedChars) out += "...";
  return out + "`";
}

Status line_error(size_t column, std::string_view reason) {
  return invalid_argument(heed::format("problem line, column {}: {}", column, reason));
}

template <class Number>
Reason read_number(std::string_view text, Number& number, std::string_view kind) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error == std::errc::result_out_of_range) return heed::format("must be {} that fits in 64 bits", kind);
  if (error != std::errc() || end != text.data() + text.size()) return heed::format("must be {}", kind);
  return {};
}

size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t substitute = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({substitute, row[j] + 1, row[j - 1] + 1});
    }
  }
  return row[b.size()];
}

}  // namespace

Result<std::vector<Field>> split_line(std::string_view line) {
  if (line.empty()) return line_error(1, "the line is empty; it must start with `attention` or `kv_append`");
  std::vector<Field> fields;
  for (size_t i = 0; i < line.size(); ++i) {
    const unsigned char byte = static_cast<unsigned char>(line[i]);
    if (byte < 0x20 || byte > 0x7e) {
      return line_error(i + 1,
                        heed::format("byte 0x{:02x} must not be in a problem line: it is one line of ASCII", byte));
    }
    if (byte != ' ') continue;
    if (i == 0) return line_error(1, "the line must start with `attention` or `kv_append`, not with a space");
    if (line[i - 1] == ' ') return line_error(i + 1, "fields must be separated by single spaces");
    if (i + 1 == line.size()) return line_error(i + 1, "the line must not end with a space");
  }
  for (size_t start = 0; start < line.size();) {
    const size_t end = std::min(line.find(' ', start), line.size());
    Field field;
    field.text = line.substr(start, end - start);
    field.column = start + 1;
    const size_t equals = field.text.find('=');
    field.has_value = equals != std::string_view::npos;
    field.name = field.text.substr(0, equals);
    if (field.has_value) field.value = field.text.substr(equals + 1);
    if (field.name.empty()) return field_error(field, "must have a name before `=`");
    fields.push_back(field);
    start = end + 1;
  }
  return fields;
}

Status field_error(const Field& field, std::string_view reason) {
  return line_error(field.column, heed::format("{}: {}", quoted(field.text), reason));
}

const Field* find_field(std::span<const Field> fields, std::string_view name) {
  for (const Field& field : fields) {
    if (field.name == name) return &field;
  }
  return nullptr;
}

Status check_form(const Field& field, FieldForm form) {
  if (form == FieldForm::kFlag && field.has_value) return field_error(field, "must stand alone: it is a flag");
  if (form == FieldForm::kValue && !field.has_value) {
    return field_error(field, heed::format("must have a value: `{}=...`", field.name));
  }
  return {};
}

Status unknown_field(const Field& field, std::span<const std::string> known) {
  constexpr size_t kLongestName = 40;  // of interest: the comparison is quadratic
  size_t best = 3;                     // three edits away is another word
  std::string_view nearest;
  if (field.name.size() <= kLongestName) {
    for (const std::string& name : known) {
      const size_t distance = edit_distance(field.name, name);
      if (distance < best && distance < name.size()) {
        best = distance;
        nearest = name;
      }
    }
  }
  if (!nearest.empty())
    return field_error(field, heed::format("unknown field; the nearest known one is `{}`", nearest));
  std::string all;
  for (const std::string& name : known) {
    if (name.find('.') == std::string::npos) all += heed::format("{}{}", all.empty() ? "" : " ", name);
  }
  return field_error(field, heed::format("unknown field; known are {} strides.NAME align.NAME", all));
}

Status point_at_field(const Status& status, std::span<const Field> fields, std::span<const MemberField> members) {
  const std::string_view message = status.message();
  const size_t space = message.find(' ');
  const std::string_view member = message.substr(0, space);
  const Field* field = nullptr;
  if (member == "strides" || member == "align") {  // "strides of q = ..."
    const std::string_view rest = message.substr(std::min(message.size(), space + 4));
    field = find_field(fields, heed::format("{}.{}", member, rest.substr(0, rest.find(' '))));
  } else {
    for (const MemberField& each : members) {
      if (field == nullptr && each.member == member) field = find_field(fields, each.field);
    }
  }
  if (field != nullptr) return field_error(*field, message);
  return {status.code(), heed::format("problem line: {}", message)};
}

Reason read_integer(std::string_view text, int64_t& number) { return read_number(text, number, "a whole number"); }

Reason read_seed(std::string_view text, uint64_t& number) {
  return read_number(text, number, "a whole number that is not negative");
}

Reason read_real(std::string_view text, double& number) {
  const Reason reason = read_number(text, number, "a number");
  if (!reason.empty()) return reason;
  return std::isfinite(number) ? Reason() : Reason("must be a finite number");
}

Reason read_integers(std::string_view text, std::span<int64_t> numbers) {
  for (size_t i = 0; i < numbers.size(); ++i) {
    const size_t comma = text.find(',');
    const bool last = i + 1 == numbers.size();
    if ((comma == std::string_view::npos) != last || !read_integer(text.substr(0, comma), numbers[i]).empty()) {
      return heed::format("must be {} whole numbers separated by commas", numbers.size());
    }
    text = last ? std::string_view() : text.substr(comma + 1);
  }
  return {};
}

Reason read_dtype(std::string_view text, Dtype& dtype) {
  for (const Dtype each : {Dtype::kF32, Dtype::kF16, Dtype::kBf16, Dtype::kF64}) {
    if (text == dtype_name(each)) {
      dtype = each;
      return {};
    }
  }
  return "must be f32, f16, bf16 or f64";
}

std::string_view layout_name(Layout layout) {
  switch (layout) {
    case Layout::kBshd: return "bshd";
    case Layout::kBhsd: return "bhsd";
    case Layout::kThd: return "thd";
  }
  return "unknown";
}

Reason read_layout(std::string_view text, Layout& layout) {
  for (const Layout each : {Layout::kBshd, Layout::kBhsd, Layout::kThd}) {
    if (text == layout_name(each)) {
      layout = each;
      return {};
    }
  }
  return "must be bshd, bhsd or thd";
}

Reason read_device(std::string_view text, Device& device, int32_t& device_index) {
  const Reason allowed = heed::format("must be cpu, cuda or cuda:N, N from 0 to {}", kMaxDeviceIndex);
  const std::string_view kind = text.substr(0, text.find(':'));
  device = kind == "cuda" ? Device::kCuda : Device::kCpu;
  device_index = 0;
  if (kind.size() == text.size()) return kind == "cpu" || kind == "cuda" ? Reason() : allowed;
  int64_t index = 0;
  if (device == Device::kCpu || !read_integer(text.substr(kind.size() + 1), index).empty() || index < 0 ||
      index > kMaxDeviceIndex) {
    return allowed;
  }
  device_index = static_cast<int32_t>(index);
  return {};
}

Reason set_dtype(LineDraft& draft, Dtype dtype) {
  if (draft.dtype)
    return heed::format("the dtype is {} already; give one of f32, f16, bf16, f64", dtype_name(*draft.dtype));
  draft.dtype = dtype;
  return {};
}

int64_t default_total(const Lengths& lengths, int64_t batch, int64_t seqlen) {
  int64_t total = 0;
  if (lengths.values.empty()) {
    return __builtin_mul_overflow(batch, seqlen, &total) || total > kMaxExtent ? INT64_MAX : total;
  }
  for (const int64_t length : lengths.values) {
    if (__builtin_add_overflow(total, length, &total) || total > kMaxExtent) return INT64_MAX;
  }
  return total;
}

Status check_lengths(std::span<const Field> fields, std::string_view name, const Lengths& lengths, int64_t batch,
                     int64_t capacity, bool packed) {
  const Field* field = find_field(fields, name);
  if (field == nullptr) return {};
  if (!lengths.values.empty() && static_cast<int64_t>(lengths.values.size()) != batch) {
    return field_error(*field, heed::format("must have one length for each of the {} sequences, not {}", batch,
                                            lengths.values.size()));
  }
  int64_t largest = std::max<int64_t>(lengths.high, 0);
  for (const int64_t length : lengths.values) largest = std::max(largest, length);
  if (largest > capacity)
    return field_error(*field, heed::format("lengths must be at most {}, the capacity", capacity));
  if (packed && !lengths.values.empty()) {
    const int64_t sum = default_total(lengths, batch, 0);
    if (sum > capacity) {
      return field_error(*field, heed::format("lengths must sum to at most {}, the packed total", capacity));
    }
  }
  return {};
}

Status forbid_field(std::span<const Field> fields, std::string_view name, std::string_view reason) {
  const Field* field = find_field(fields, name);
  return field == nullptr ? Status() : field_error(*field, reason);
}

}  // namespace heed
