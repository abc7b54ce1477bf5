// The problem line as a whole: which op it is, and the data fields that all ops share.
#include "ops/problem_line.h"

#include <exception>
#include <new>

#include "ops/line_reader.h"

namespace heed {
namespace {

constexpr std::string_view kFills[] = {"normal", "uniform", "ones", "zero", "arange", "maxlast", "huge", "tiny"};

Reason read_lengths(std::string_view text, Lengths& lengths) {
  static constexpr std::string_view kUniform = "uniform:";
  static constexpr std::string_view kAllowed =
      "must be lengths separated by commas, such as 3,0,9, or a range, such as uniform:17..2048; none negative";
  lengths = Lengths();
  if (text.starts_with(kUniform)) {
    text.remove_prefix(kUniform.size());
    const size_t dots = text.find("..");
    if (dots == std::string_view::npos || !read_integer(text.substr(0, dots), lengths.low).empty() ||
        !read_integer(text.substr(dots + 2), lengths.high).empty() || lengths.low < 0 || lengths.high < lengths.low) {
      return Reason(kAllowed);
    }
    return {};
  }
  for (bool more = true; more;) {
    const size_t comma = text.find(',');
    more = comma != std::string_view::npos;
    int64_t length = 0;
    if (!read_integer(text.substr(0, comma), length).empty() || length < 0) return Reason(kAllowed);
    lengths.values.push_back(length);
    if (more) text.remove_prefix(comma + 1);
  }
  return {};
}

Reason read_scale(LineDraft& draft, std::string_view text) {
  double scale = 0;
  Reason reason = read_real(text, scale);
  draft.data.scale = scale;
  return reason;
}

Reason read_softcap(LineDraft& draft, std::string_view text) {
  const Reason reason = read_real(text, draft.data.softcap_value);
  return !reason.empty() || draft.data.softcap_value <= 0 ? "must be a finite number greater than 0" : "";
}

Reason read_p(LineDraft& draft, std::string_view text) {
  const Reason reason = read_real(text, draft.data.p);
  return !reason.empty() || draft.data.p < 0 || draft.data.p > 1 ? "must be a number from 0 to 1" : "";
}

Reason read_pages(LineDraft& draft, std::string_view text) {
  if (text != "shuffled" && text != "ordered") return "must be shuffled or ordered";
  draft.data.pages_shuffled = text == "shuffled";
  return {};
}

Reason read_fill(LineDraft& draft, std::string_view text) {
  const size_t star = text.find('*');
  const std::string_view name = text.substr(0, star);
  std::string known;
  for (const std::string_view fill : kFills) {
    if (name == fill) {
      draft.data.fill = name;
      if (star == std::string_view::npos) return {};
      const Reason reason = read_real(text.substr(star + 1), draft.data.fill_factor);
      return reason.empty() ? reason : "must have a finite number after `*`";
    }
    known += heed::format("{}{}", known.empty() ? "" : ", ", fill);
  }
  return heed::format("must be one of {}, with *FACTOR after it or without", known);
}

constexpr FieldRule<LineDraft> kDataRules[] = {
    {"scale", FieldForm::kValue, read_scale},
    {"softcap_value", FieldForm::kValue, read_softcap},
    {"p", FieldForm::kValue, read_p},
    {"lq", FieldForm::kValue, [](LineDraft& d, std::string_view text) { return read_lengths(text, d.data.lq); }},
    {"lk", FieldForm::kValue, [](LineDraft& d, std::string_view text) { return read_lengths(text, d.data.lk); }},
    {"lpad", FieldForm::kValue, [](LineDraft& d, std::string_view text) { return read_lengths(text, d.data.leftpad); }},
    {"pages", FieldForm::kValue, read_pages},
    {"seed", FieldForm::kValue, [](LineDraft& d, std::string_view text) { return read_seed(text, d.data.seed); }},
    {"fill", FieldForm::kValue, read_fill},
    {"f32", FieldForm::kFlag, [](LineDraft& d, std::string_view) { return set_dtype(d, Dtype::kF32); }},
    {"f16", FieldForm::kFlag, [](LineDraft& d, std::string_view) { return set_dtype(d, Dtype::kF16); }},
    {"bf16", FieldForm::kFlag, [](LineDraft& d, std::string_view) { return set_dtype(d, Dtype::kBf16); }},
    {"f64", FieldForm::kFlag, [](LineDraft& d, std::string_view) { return set_dtype(d, Dtype::kF64); }},
};

void print_lengths(std::string& text, std::string_view name, const Lengths& lengths) {
  if (!lengths.given()) return;
  text += heed::format(" {}=", name);
  if (lengths.values.empty()) {
    text += heed::format("uniform:{}..{}", lengths.low, lengths.high);
    return;
  }
  for (size_t i = 0; i < lengths.values.size(); ++i) text += heed::format("{}{}", i > 0 ? "," : "", lengths.values[i]);
}

Result<ProblemLine> parse_line(std::string_view line) {
  Result<std::vector<Field>> split = split_line(line);
  if (!split.ok()) return split.status();
  const std::span<const Field> fields = split.value();
  if (fields[0].text == "attention") return parse_attention_line(fields.subspan(1));
  if (fields[0].text == "kv_append") return parse_kv_append_line(fields.subspan(1));
  return field_error(fields[0], "unknown op; it must be attention or kv_append");
}

}  // namespace

std::span<const FieldRule<LineDraft>> data_rules() { return kDataRules; }

void print_data(std::string& text, const DataFields& data) {
  const DataFields standard;
  if (data.scale) text += heed::format(" scale={}", *data.scale);
  if (data.softcap_value != standard.softcap_value) text += heed::format(" softcap_value={}", data.softcap_value);
  if (data.p != standard.p) text += heed::format(" p={}", data.p);
  print_lengths(text, "lq", data.lq);
  print_lengths(text, "lk", data.lk);
  print_lengths(text, "lpad", data.leftpad);
  if (data.pages_shuffled) text += " pages=shuffled";
  if (data.seed != standard.seed) text += heed::format(" seed={}", data.seed);
  if (data.fill != standard.fill || data.fill_factor != standard.fill_factor) {
    text += heed::format(" fill={}", data.fill);
    if (data.fill_factor != standard.fill_factor) text += heed::format("*{}", data.fill_factor);
  }
}

Result<ProblemLine> parse_problem_line(std::string_view line) {
  try {
    return parse_line(line);
  } catch (const std::bad_alloc&) {
    return out_of_memory("problem line");  // short enough to need no memory itself
  } catch (const std::exception& error) {
    return operation_failed(error.what());
  }
}

std::string to_string(const ProblemLine& line) {
  std::string text =
      std::visit([&](const auto& problem) { return print_plan_fields(problem, line.data); }, line.problem);
  print_data(text, line.data);
  return text;
}

}  // namespace heed
