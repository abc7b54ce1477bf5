// Tensors for a problem line: what is behind heed_inputs.
#pragma once

#include <deque>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "check/guarded_tensor.h"
#include "check/random.h"
#include "heed/attention.h"
#include "heed/check.h"
#include "ops/problem_line.h"

namespace heed::check {

struct Inputs {
  std::variant<AttentionProblem, KvAppendProblem> problem;
  DataFields data;
  bool is_attention = false;
  heed_attention_args attention = {};
  heed_kv_append_args kv_append = {};
  std::deque<GuardedTensor> tensors;  // a deque: they stay where they are
};

// Fills `inputs`, whose line is parsed, in host memory.
Status make_attention_inputs(Inputs& inputs);
Status make_kv_append_inputs(Inputs& inputs);
// The same from a line, in the memory of its device.
Status make_inputs(std::string_view line, Inputs& inputs);

// ---- what the two ops share -------------------------------------------------------------------------------------

GuardedTensor& add_integers(Inputs& inputs, std::string name, const std::vector<int64_t>& values);
GuardedTensor& add_vector(Inputs& inputs, std::string name, Dtype dtype, int64_t size, Role role);

// The C view of a tensor in (b, h, s, d) order as a layout has it; packed: (total, h, d).
heed_tensor in_layout(const GuardedTensor& tensor, Layout layout);
// The first `ndim` dimensions, as they are.
heed_tensor leading(const GuardedTensor& tensor, int32_t ndim);
// The last `ndim` dimensions.
heed_tensor trailing(const GuardedTensor& tensor, int32_t ndim);

// Lengths of packed sequences within `total` rows: as listed, drawn, or the total in equal parts.
std::vector<int64_t> packed_lengths(const Lengths& lengths, uint64_t seed, std::string_view name, int64_t batch,
                                    int64_t total);
std::vector<int64_t> offsets_of(const std::vector<int64_t>& lengths);  // [0, l0, l0 + l1, ...]
// One number per sequence: as listed, or drawn from the lengths' range, none above its limit; `standard` where neither.
std::vector<int64_t> drawn(const Lengths& lengths, uint64_t seed, std::string_view name,
                           const std::vector<int64_t>& limits, const std::vector<int64_t>& standard);
std::vector<int64_t> permutation(int64_t size, uint64_t seed, std::string_view name);

// Entries of a page table [rows][max_pages]: row r needs pages [needed[r].first, needed[r].last). Others hold numbers
// that crash whoever follows them.
struct PageRange {
  int64_t first = 0, last = 0;
};
std::vector<int64_t> page_entries(const std::vector<PageRange>& needed, int64_t max_pages, int64_t num_pages,
                                  bool shuffled, uint64_t seed);

// What a line's fill= puts in element `index` of q, k, v and the like. `along` runs from 0 to 1 over a sequence's keys,
// negative where the tensor is no k or q.
class Fill {
 public:
  Fill(const DataFields& data, std::string_view tensor, int64_t head_dim);
  double operator()(int64_t index, double along);

 private:
  enum class Kind { kNormal, kUniform, kOnes, kZero, kArange, kMaxlast, kHuge, kTiny };
  Kind kind_;
  double factor_;
  double maxlast_step_;
  bool is_q_, is_k_;
  Random random_;
};

}  // namespace heed::check
