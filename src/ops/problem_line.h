// The problem line: `op name=value flag ...`, one grammar for every op. Plan fields make a Problem; data fields say how
// tests, benches and `heed run` make inputs for it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "base/status.h"
#include "ops/attention.h"
#include "ops/kv_append.h"

namespace heed {

// Per-sequence lengths: `lq=3,0,9` or `lk=uniform:17..2048` (drawn with the line's seed).
struct Lengths {
  std::vector<int64_t> values;  // empty: not given as a list
  int64_t low = -1, high = -1;  // uniform, both inclusive; -1: not given
  bool given() const { return !values.empty() || low >= 0; }
  bool operator==(const Lengths&) const = default;
};

struct DataFields {
  std::optional<double> scale;  // softmax_scale
  double softcap_value = 30.0;
  double p = 0.1;               // dropout
  Lengths lq, lk;               // thd: lengths; used_q, used_k: used lengths; kv_append: lk = cache_seqlens, lq = new
  Lengths leftpad;              // lpad=
  bool pages_shuffled = false;  // pages=shuffled; default in order
  uint64_t seed = 1;
  std::string fill = "normal";  // normal | uniform | ones | zero | arange | maxlast | huge | tiny
  double fill_factor = 1.0;     // normal*12
  bool operator==(const DataFields&) const = default;
};

struct ProblemLine {
  std::variant<AttentionProblem, KvAppendProblem> problem;
  DataFields data;
};

// Errors point at the place: "problem line, column 23: `hq=abc`: ...". The problem is validated.
Result<ProblemLine> parse_problem_line(std::string_view line);
std::string to_string(const ProblemLine& line);  // plan fields, then data fields that differ from their defaults

}  // namespace heed
