// Reading and writing the fields of a problem line; attention_line.cpp and kv_append_line.cpp hold each op's fields.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/format.h"
#include "base/status.h"
#include "ops/problem_line.h"

namespace heed {

struct Field {
  std::string_view text;  // the whole of it, as written
  std::string_view name;
  std::string_view value;
  bool has_value = false;
  size_t column = 0;  // from 1
};

// The op, then its fields: fields[0] is the op.
Result<std::vector<Field>> split_line(std::string_view line);
Status field_error(const Field& field, std::string_view reason);
const Field* find_field(std::span<const Field> fields, std::string_view name);

// Readers of values: the empty string, or what the value has to be.
using Reason = std::string;
Reason read_integer(std::string_view text, int64_t& number);
Reason read_seed(std::string_view text, uint64_t& number);
Reason read_real(std::string_view text, double& number);
Reason read_integers(std::string_view text, std::span<int64_t> numbers);  // exactly so many, separated by commas
Reason read_dtype(std::string_view text, Dtype& dtype);
Reason read_layout(std::string_view text, Layout& layout);
Reason read_device(std::string_view text, Device& device, int32_t& device_index);
std::string_view layout_name(Layout layout);

enum class FieldForm { kFlag, kValue, kEither };

template <class Draft>
struct FieldRule {
  std::string_view name;
  FieldForm form;
  Reason (*read)(Draft& draft, std::string_view value);
};

// What is read of a line besides the problem itself.
struct LineDraft {
  DataFields data;
  std::optional<Dtype> dtype;
};
std::span<const FieldRule<LineDraft>> data_rules();
Reason set_dtype(LineDraft& draft, Dtype dtype);  // the dtype flags: at most one
void print_data(std::string& text, const DataFields& data);

// Strides and alignments as given, before the problem says which tensors there are.
template <int kSlots>
struct SlotDraft : LineDraft {
  std::array<std::optional<std::array<int64_t, 4>>, kSlots> stride;
  std::array<std::optional<int64_t>, kSlots> align;
};

Status unknown_field(const Field& field, std::span<const std::string> known);
Status check_form(const Field& field, FieldForm form);
// Points a sentence of validate(), which starts with the name of a problem's member, at the field that set it.
struct MemberField {
  std::string_view member, field;
};
Status point_at_field(const Status& status, std::span<const Field> fields, std::span<const MemberField> members);

// How many leading strides of a tensor are written; the rest is given by what the tensor is.
template <class SlotType>
int written_strides(SlotType slot);

template <class Draft>
const FieldRule<Draft>* find_rule(std::span<const FieldRule<Draft>> rules, std::string_view name) {
  for (const FieldRule<Draft>& rule : rules) {
    if (rule.name == name) return &rule;
  }
  return nullptr;
}

// strides.NAME= and align.NAME=; false if the field is neither.
template <class SlotType, int kSlots>
bool read_slot_field(const Field& field, SlotDraft<kSlots>& draft, Status& status) {
  for (int i = 0; i < kSlots; ++i) {
    const SlotType slot = static_cast<SlotType>(i);
    const bool strides = field.name == heed::format("strides.{}", slot_name(slot));
    if (!strides && field.name != heed::format("align.{}", slot_name(slot))) continue;
    status = check_form(field, FieldForm::kValue);
    if (!status.ok()) return true;
    Reason reason;
    if (strides) {
      const size_t count = static_cast<size_t>(written_strides(slot));
      draft.stride[i].emplace();
      reason = read_integers(field.value, std::span(*draft.stride[i]).first(count));
    } else {
      draft.align[i].emplace();
      reason = read_integer(field.value, *draft.align[i]);
    }
    if (!reason.empty()) status = field_error(field, reason);
    return true;
  }
  return false;
}

template <class SlotType, class Draft, int kSlots>
Status read_fields(std::span<const Field> fields, std::span<const FieldRule<Draft>> rules, SlotDraft<kSlots>& slots,
                   Draft& draft) {
  for (size_t i = 0; i < fields.size(); ++i) {
    const Field& field = fields[i];
    if (const Field* first = find_field(fields.first(i), field.name)) {
      return field_error(field, heed::format("given before, at column {}; each field at most once", first->column));
    }
    Status status;
    Reason reason;
    if (const FieldRule<Draft>* rule = find_rule(rules, field.name)) {
      HEED_RETURN_IF_ERROR(check_form(field, rule->form));
      reason = rule->read(draft, field.value);
    } else if (const FieldRule<LineDraft>* data_rule = find_rule(data_rules(), field.name)) {
      HEED_RETURN_IF_ERROR(check_form(field, data_rule->form));
      reason = data_rule->read(draft, field.value);
    } else if (!read_slot_field<SlotType>(field, slots, status)) {
      std::vector<std::string> known;
      for (const auto& each : rules) known.emplace_back(each.name);
      for (const auto& each : data_rules()) known.emplace_back(each.name);
      for (int slot = 0; slot < kSlots; ++slot) {
        known.push_back(heed::format("strides.{}", slot_name(static_cast<SlotType>(slot))));
        known.push_back(heed::format("align.{}", slot_name(static_cast<SlotType>(slot))));
      }
      return unknown_field(field, known);
    }
    if (!reason.empty()) status = field_error(field, reason);
    HEED_RETURN_IF_ERROR(status);
  }
  return {};
}

// Fills the problem's strides and alignments: as given, else contiguous and natural.
template <class SlotType, class Problem, int kSlots>
Status place_slots(std::span<const Field> fields, const SlotDraft<kSlots>& draft, Problem& problem) {
  for (int i = 0; i < kSlots; ++i) {
    const SlotType slot = static_cast<SlotType>(i);
    if (!has_slot(problem, slot)) {
      for (const char* prefix : {"strides", "align"}) {
        if (const Field* field = find_field(fields, heed::format("{}.{}", prefix, slot_name(slot)))) {
          return field_error(*field, heed::format("must be left out: the problem has no {}", slot_name(slot)));
        }
      }
      continue;
    }
    problem.stride[i] = contiguous_strides(problem, slot);
    if (draft.stride[i]) {
      for (int dim = 0; dim < written_strides(slot); ++dim) problem.stride[i][dim] = (*draft.stride[i])[dim];
    }
    const int64_t align = draft.align[i] ? *draft.align[i] : natural_align(problem, slot, nullptr);
    if (align < 1 || align > 128) {
      return field_error(*find_field(fields, heed::format("align.{}", slot_name(slot))),
                         "must be a power of two from 1 to 128");
    }
    problem.align[i] = static_cast<int32_t>(align);
  }
  return {};
}

template <class SlotType, class Problem>
void print_slots(std::string& text, const Problem& problem) {
  const int slots = static_cast<int>(SlotType::kCount);
  for (int i = 0; i < slots; ++i) {
    const SlotType slot = static_cast<SlotType>(i);
    if (!has_slot(problem, slot) || problem.stride[i] == contiguous_strides(problem, slot)) continue;
    text += heed::format(" strides.{}=", slot_name(slot));
    for (int dim = 0; dim < written_strides(slot); ++dim) {
      text += heed::format("{}{}", dim > 0 ? "," : "", problem.stride[i][dim]);
    }
  }
  for (int i = 0; i < slots; ++i) {
    const SlotType slot = static_cast<SlotType>(i);
    if (!has_slot(problem, slot) || problem.align[i] == natural_align(problem, slot, nullptr)) continue;
    text += heed::format(" align.{}={}", slot_name(slot), problem.align[i]);
  }
}

// Writes fields that differ from their defaults.
class LineWriter {
 public:
  explicit LineWriter(std::string_view op) : text_(op) {}
  void number(std::string_view name, int64_t value, int64_t standard) {
    if (value != standard) text_ += heed::format(" {}={}", name, value);
  }
  void word(std::string_view name, std::string_view value, std::string_view standard) {
    if (value != standard) text_ += heed::format(" {}={}", name, value);
  }
  void flag(std::string_view name, bool value) {
    if (value) text_ += heed::format(" {}", name);
  }
  std::string& text() { return text_; }

 private:
  std::string text_;
};

// Packed totals that a line leaves out: the sum of a list of lengths, else batch * seqlen; INT64_MAX past 2^60.
int64_t default_total(const Lengths& lengths, int64_t batch, int64_t seqlen);
// A list has one length per sequence, none above the capacity (packed: their sum; then `capacity` is the total).
Status check_lengths(std::span<const Field> fields, std::string_view name, const Lengths& lengths, int64_t batch,
                     int64_t capacity, bool packed);
Status forbid_field(std::span<const Field> fields, std::string_view name, std::string_view reason);

Result<ProblemLine> parse_attention_line(std::span<const Field> fields);
Result<ProblemLine> parse_kv_append_line(std::span<const Field> fields);
std::string print_plan_fields(const AttentionProblem& problem, const DataFields& data);
std::string print_plan_fields(const KvAppendProblem& problem, const DataFields& data);

}  // namespace heed
