// Random valid problems over every feature, and a failing problem line made shorter.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "ops/problem_line.h"

namespace heed::testing {

// The same numbers with every standard library: std's distributions differ between them.
class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int64_t in(int64_t low, int64_t high) {  // both inclusive
    return low + static_cast<int64_t>(engine_() % static_cast<uint64_t>(high - low + 1));
  }
  bool chance(int percent) { return in(0, 99) < percent; }
  template <class T, size_t kCount>
  T pick(const T (&choices)[kCount]) {
    return choices[in(0, static_cast<int64_t>(kCount) - 1)];
  }
  uint64_t bits() { return engine_(); }

 private:
  std::mt19937_64 engine_;
};

enum class Sizes {
  kRunnable,  // tiny, made to be run and judged by the thousand
  kAny,       // anything that is valid, far beyond memory
};

inline int64_t random_length(Random& random, Sizes sizes) {
  if (sizes == Sizes::kAny && random.chance(30)) return int64_t{1} << random.in(0, 24);
  const int64_t kind = random.in(0, 99);
  if (kind < 5) return 0;
  if (kind < 75) return random.in(1, 20);
  return kind < 97 ? random.in(1, 70) : random.in(1, 200);
}

inline int64_t random_head_dim(Random& random) {
  const int64_t kind = random.in(0, 99);
  if (kind < 45) return random.in(1, 20);
  if (kind < 85) return random.pick<int64_t>({8, 16, 24, 32, 40, 48, 64});
  return kind < 97 ? random.in(1, 140) : random.in(1, 512);
}

inline Lengths random_lengths(Random& random, int64_t batch, int64_t high) {
  Lengths lengths;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t kind = random.in(0, 9);
    lengths.values.push_back(kind == 0 ? 0 : kind == 1 ? high : random.in(0, high));
  }
  return lengths;
}

// Strides of any order of the outer dimensions, padded; inputs sometimes broadcast one dimension.
template <class SlotType, class Problem>
void random_strides(Random& random, Problem& problem, SlotType slot, bool one_address_each) {
  auto& stride = problem.stride[static_cast<int>(slot)];
  const auto standard = stride;
  const auto shape = slot_shape(problem, slot);
  std::array<int, 4> order = {0, 1, 2, 3};
  for (int i = 3; i > 0; --i) std::swap(order[i], order[random.in(0, i)]);
  int64_t next = 1;
  if (standard[3] == 1) {
    next = std::max<int64_t>(shape[3], 1) + random.in(0, 3);
  } else if (slot == static_cast<SlotType>(Slot::kPageTable)) {
    next = std::max<int64_t>(shape[1], 1) + random.in(0, 3);
  }
  for (const int dim : order) {
    if (standard[dim] == 0 || (dim == 3 && standard[3] == 1)) continue;
    stride[dim] = next;
    if (!one_address_each && random.chance(8)) {
      stride[dim] = 0;
      continue;
    }
    next = next * std::max<int64_t>(shape[dim], 1) + random.in(0, 3);
  }
}

inline bool strides_may_vary(Slot slot) { return slot != Slot::kPageTable && slot != Slot::kAlibi; }
inline bool strides_may_vary(KvSlot slot) { return slot != KvSlot::kPageTable; }
// Written by the problem, or before it (out and lse of a backward problem), or never broadcast by a stride of 0.
inline bool one_address_each(Slot slot) {
  return slot != Slot::kQ && slot != Slot::kK && slot != Slot::kV && slot != Slot::kDout && slot != Slot::kDlse;
}
inline bool one_address_each(KvSlot slot) {
  return slot == KvSlot::kKCache || slot == KvSlot::kVCache || slot == KvSlot::kQOut;
}

template <class SlotType, class Problem>
void fill_slots(Random& random, Problem& problem) {
  for (int i = 0; i < static_cast<int>(SlotType::kCount); ++i) {
    const SlotType slot = static_cast<SlotType>(i);
    if (!has_slot(problem, slot)) continue;
    problem.stride[i] = contiguous_strides(problem, slot);
    if (strides_may_vary(slot) && random.chance(12)) random_strides(random, problem, slot, one_address_each(slot));
    problem.align[i] = natural_align(problem, slot, nullptr);
    if (random.chance(15)) {
      const int32_t least = static_cast<int32_t>(dtype_bytes(slot_dtype(problem, slot)));
      while (problem.align[i] > least && random.chance(75)) problem.align[i] /= 2;
    }
  }
}

inline void random_backward(Random& random, AttentionProblem& p) {
  p.pass = Pass::kBackward;
  p.lse = true;
  p.dlse = random.chance(25);
  p.dq = p.dk = p.dv = true;
  p.dbias = p.bias();
  p.dsinks = p.sinks;
  p.dalibi = p.alibi;
  if (random.chance(20)) {
    p.dq = random.chance(50);
    p.dk = random.chance(50);
    p.dv = !p.dq && !p.dk;
    p.dbias = p.bias() && random.chance(50);
    p.dsinks = p.sinks && random.chance(50);
    p.dalibi = p.alibi && random.chance(50);
  }
}

inline void random_masks(Random& random, AttentionProblem& p) {
  if (random.chance(40)) p.window_right = 0;
  if (random.chance(15)) {
    p.window_left = random.in(-1, 40);
    p.window_right = random.chance(50) ? 0 : random.in(-1, 30);
  }
  const int64_t offset = random.in(0, 99);
  if (offset < 10) p.offset_kind = OffsetKind::kTopLeft;
  if (offset >= 90) {
    p.offset_kind = OffsetKind::kGiven;
    p.q_offset = random.chance(5) ? random.in(-1000000000000, 1000000000000) : random.in(-30, 60);
  }
  if (random.chance(10)) p.chunk = random.chance(10) ? 1 : random.in(1, 40);
  p.softcap = random.chance(10);
  p.alibi = random.chance(12);
  p.alibi_per_batch = p.alibi && random.chance(30);
  p.sinks = random.chance(12);
  if (random.chance(15)) {
    p.bias_dtype = random.chance(50) ? Dtype::kF32 : p.dtype;
    p.bias_dims = static_cast<uint8_t>(random.in(0, 15));
  }
  if (random.chance(12)) {
    p.mask = true;
    p.mask_dims = static_cast<uint8_t>(random.in(0, 15));
  }
  p.dropout = random.chance(12);
}

inline void random_storage(Random& random, Sizes sizes, AttentionProblem& p, DataFields& data) {
  p.layout_q = random.pick({Layout::kBshd, Layout::kBshd, Layout::kBhsd, Layout::kThd});
  p.layout_kv = p.layout_q == Layout::kThd ? Layout::kThd : random.pick({Layout::kBshd, Layout::kBshd, Layout::kBhsd});
  if (random.chance(5)) p.layout_kv = random.pick({Layout::kBshd, Layout::kBhsd, Layout::kThd});
  const bool forward = p.pass == Pass::kForward;
  if (forward && random.chance(20)) {
    if (p.packed_k()) p.layout_kv = Layout::kBshd;
    p.page_size = random.pick<int64_t>({1, 2, 3, 4, 5, 8, 16});
    p.seqlen_k = (p.seqlen_k + p.page_size - 1) / p.page_size * p.page_size;
    data.pages_shuffled = random.chance(70);
  }
  if (forward && !p.packed_k() && random.chance(10)) p.cache_batch = p.batch + random.in(0, 3);
  if (p.paged()) {
    const int64_t rows = p.cache_batch > 0 ? p.cache_batch : p.batch;
    p.num_pages = rows * (p.seqlen_k / p.page_size) + (random.chance(30) ? random.in(0, 5) : 0);
  }
  p.used_q = random.chance(p.packed_q() ? 3 : 12);
  p.used_k = random.chance(p.packed_k() ? 3 : p.paged() ? 80 : 15);
  p.leftpad = random.chance(6);
  if (p.packed_q()) {
    data.lq = random_lengths(random, p.batch, p.seqlen_q);
    for (const int64_t length : data.lq.values) p.total_q += length;
    if (random.chance(15)) p.total_q += random.in(0, 9);
  } else if (p.used_q && p.batch > 0 && random.chance(90)) {
    data.lq = random_lengths(random, p.batch, p.seqlen_q);
  }
  if (p.packed_k()) {
    data.lk = random_lengths(random, p.batch, p.seqlen_k);
    for (const int64_t length : data.lk.values) p.total_k += length;
    if (random.chance(15)) p.total_k += random.in(0, 9);
  } else if (p.used_k && p.batch > 0 && random.chance(90)) {
    data.lk = random_lengths(random, p.batch, p.seqlen_k);
  }
  if (p.leftpad && p.batch > 0) {
    data.leftpad = random_lengths(random, p.batch, std::min(p.packed_k() ? p.total_k : p.seqlen_k, int64_t{9}));
  }
  // Packed capacities are hints; a bias or mask needs them as its extents.
  if (p.bias_dims == 0 && p.mask_dims == 0 && sizes == Sizes::kRunnable && random.chance(50)) {
    if (p.packed_q()) p.seqlen_q = 0;
    if (p.packed_k()) p.seqlen_k = 0;
  }
}

inline ProblemLine random_attention(Random& random, Sizes sizes) {
  ProblemLine line;
  AttentionProblem p;
  DataFields& data = line.data;
  p.dtype = random.pick({Dtype::kF32, Dtype::kF32, Dtype::kBf16, Dtype::kF16});
  p.out_dtype = random.chance(20) ? Dtype::kF32 : p.dtype;
  p.batch = random.chance(2) ? 0 : random.in(1, 4);
  p.nheads_kv = random.in(1, 3);
  p.nheads_q = p.nheads_kv * random.pick<int64_t>({1, 1, 1, 2, 2, 3, 4, 8});
  p.head_dim = random_head_dim(random);
  p.head_dim_v = random.chance(70) ? p.head_dim : random_head_dim(random);
  p.seqlen_q = random.chance(20) ? random.in(1, 4) : random_length(random, sizes);
  p.seqlen_k = random.chance(40) ? p.seqlen_q : random_length(random, sizes);
  random_masks(random, p);
  if (random.chance(30)) random_backward(random, p);
  p.lse = p.lse || random.chance(40);
  random_storage(random, sizes, p, data);
  if (p.pass == Pass::kForward && random.chance(12)) p.splits = random.in(1, 6);
  p.deterministic = random.chance(8);
  p.batch_invariant = random.chance(8);
  p.threads = random.chance(40) ? static_cast<int32_t>(random.in(1, 3)) : 0;
  if (sizes == Sizes::kAny && random.chance(10)) p.dtype = p.out_dtype = Dtype::kF64;
  if (p.bias() && p.bias_dtype != Dtype::kF32) p.bias_dtype = p.dtype;
  if (random.chance(sizes == Sizes::kAny ? 10 : 0)) p.out_dtype = Dtype::kF64;
  fill_slots<Slot>(random, p);

  // Scores of ordinary size: an ulp of a score of 100 is an error of 1e-5 in its probability, so with few rows the bound,
  // which takes the largest of their errors, becomes a matter of luck. edge.txt has scores of any size.
  if (random.chance(15)) {
    data.scale = static_cast<double>(random.in(-16, 16)) / 8.0 / std::sqrt(static_cast<double>(p.head_dim));
  }
  if (p.softcap && random.chance(60)) data.softcap_value = static_cast<double>(random.in(1, 80)) / 4.0;
  if (p.dropout && random.chance(60)) data.p = static_cast<double>(random.in(0, 8)) / 8.0;
  data.seed = random.chance(90) ? static_cast<uint64_t>(random.in(1, 1000000)) : random.bits();
  if (random.chance(10)) data.fill = random.pick({"uniform", "ones", "zero", "arange", "tiny"});
  if (random.chance(8)) data.fill_factor = static_cast<double>(random.in(1, 8)) / 4.0;
  line.problem = p;
  return line;
}

inline ProblemLine random_kv_append(Random& random, Sizes sizes) {
  ProblemLine line;
  KvAppendProblem p;
  DataFields& data = line.data;
  p.dtype = random.pick({Dtype::kF32, Dtype::kBf16, Dtype::kF16});
  p.batch = random.chance(3) ? 0 : random.in(1, 4);
  p.nheads_kv = random.in(1, 3);
  p.head_dim = random_head_dim(random);
  p.head_dim_v = random.chance(70) ? p.head_dim : random_head_dim(random);
  p.seqlen_k = random_length(random, sizes);
  p.append = random.chance(90);
  if (p.head_dim >= 2 && (random.chance(70) || !p.append)) {
    p.rotary_dim = 2 * (random.chance(50) ? p.head_dim / 2 : random.in(1, p.head_dim / 2));
    p.rotary_dtype = random.chance(60) ? Dtype::kF32 : p.dtype;
    p.rotary_style = random.chance(50) ? RotaryStyle::kHalf : RotaryStyle::kInterleaved;
    p.rotary_seqlens = random.chance(15);
    p.rotary_rows = p.seqlen_k + (random.chance(20) ? random.in(0, 40) : 0);
    if (random.chance(60) || !p.append) p.nheads_q = p.nheads_kv * random.in(1, 4);
    p.q_per_position = p.has_q() && random.chance(50);
  } else {
    p.append = true;
  }
  p.layout_new = random.pick({Layout::kBshd, Layout::kBhsd, Layout::kThd});
  p.layout_cache = random.pick({Layout::kBshd, Layout::kBhsd});
  if (random.chance(35)) {
    p.page_size = random.pick<int64_t>({1, 2, 3, 4, 5, 8, 16});
    p.seqlen_k = (p.seqlen_k + p.page_size - 1) / p.page_size * p.page_size;
    data.pages_shuffled = random.chance(70);
  }
  if (random.chance(15)) p.cache_batch = p.batch + random.in(0, 3);
  if (p.paged()) {
    const int64_t rows = p.cache_batch > 0 ? p.cache_batch : p.batch;
    p.num_pages = rows * (p.seqlen_k / p.page_size) + (random.chance(30) ? random.in(0, 5) : 0);
  }
  const int64_t most_new = std::min(p.seqlen_k, int64_t{9});
  p.seqlen_new = p.append ? random.in(0, most_new) : 0;
  p.seqlen_q = !p.has_q() ? 0 : random.chance(60) ? p.seqlen_new : random.in(0, most_new);
  if (p.packed() && p.append) {
    data.lq = random_lengths(random, p.batch, p.seqlen_new);
    for (const int64_t length : data.lq.values) p.total_new += length;
  }
  if (p.packed() && p.has_q()) {
    p.total_q = p.append && p.seqlen_q == p.seqlen_new ? p.total_new : p.batch * p.seqlen_q;
  }
  p.leftpad = random.chance(10);
  if (p.leftpad && p.batch > 0) data.leftpad = random_lengths(random, p.batch, most_new);
  if (p.batch > 0 && random.chance(80)) {  // such that the new keys mostly fit
    data.lk = random_lengths(random, p.batch, std::max<int64_t>(0, p.seqlen_k - p.seqlen_new));
  }
  p.threads = random.chance(40) ? static_cast<int32_t>(random.in(1, 3)) : 0;
  fill_slots<KvSlot>(random, p);
  data.seed = static_cast<uint64_t>(random.in(1, 1000000));
  line.problem = p;
  return line;
}

inline bool is_valid(const ProblemLine& line) {
  return std::visit([](const auto& problem) { return validate(problem).ok(); }, line.problem);
}

// ---- making a failing line shorter --------------------------------------------------------------

inline std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts(1);
  for (const char c : text) {
    if (c == separator) {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  return parts;
}

inline std::string join(const std::vector<std::string>& parts, char separator) {
  std::string text;
  for (size_t i = 0; i < parts.size(); ++i) {
    if (i > 0) text += separator;
    text += parts[i];
  }
  return text;
}

// Smaller values worth trying for the field; empty for those that are not numbers.
inline std::vector<std::string> smaller_values(const std::string& value) {
  if (value.empty() || value.find_first_not_of("0123456789") != std::string::npos) return {};
  const int64_t number = std::strtoll(value.c_str(), nullptr, 10);
  std::vector<std::string> out;
  for (const int64_t smaller : {int64_t{0}, int64_t{1}, number / 2, number - 1}) {
    if (smaller >= 0 && smaller < number) out.push_back(std::to_string(smaller));
  }
  return out;
}

// Without the last sequence.
inline std::string drop_sequence(const std::string& line) {
  std::vector<std::string> fields = split(line, ' ');
  for (std::string& field : fields) {
    if (field.starts_with("b=")) {
      field = "b=" + std::to_string(std::strtoll(field.c_str() + 2, nullptr, 10) - 1);
    } else if (field.starts_with("lq=") || field.starts_with("lk=") || field.starts_with("lpad=")) {
      const size_t comma = field.rfind(',');
      if (comma != std::string::npos) field.resize(comma);
    }
  }
  return join(fields, ' ');
}

// Greedy: drops fields and shrinks numbers as long as the line is valid and still fails.
inline std::string reduce(const std::string& failing, const std::function<bool(const std::string&)>& fails) {
  std::string best = failing;
  const auto attempt = [&](const std::string& line) {
    if (line == best || !parse_problem_line(line).ok() || !fails(line)) return false;
    best = line;
    return true;
  };
  for (bool improved = true; improved;) {
    improved = false;
    while (best.find(" b=") != std::string::npos && attempt(drop_sequence(best))) improved = true;
    for (size_t i = 1; i < split(best, ' ').size(); ++i) {
      std::vector<std::string> fields = split(best, ' ');
      const std::string field = fields[i];
      fields.erase(fields.begin() + static_cast<std::ptrdiff_t>(i));
      if (attempt(join(fields, ' '))) {
        improved = true;
        --i;
        continue;
      }
      const size_t equals = field.find('=');
      if (equals == std::string::npos) continue;
      std::vector<std::string> numbers = split(field.substr(equals + 1), ',');
      for (std::string& number : numbers) {
        const std::string before = number;
        bool shrunk = false;
        for (const std::string& smaller : smaller_values(before)) {
          number = smaller;
          fields = split(best, ' ');
          fields[i] = field.substr(0, equals + 1) + join(numbers, ',');
          if (attempt(join(fields, ' '))) {
            improved = shrunk = true;
            break;
          }
        }
        if (!shrunk) number = before;
      }
    }
  }
  return best;
}

// HEED_TEST_RANDOM and HEED_TEST_SEED override how many problems and which.
inline int64_t environment_number(const char* name, int64_t standard) {
  const char* text = std::getenv(name);
  return text == nullptr || *text == '\0' ? standard : std::strtoll(text, nullptr, 10);
}

}  // namespace heed::testing
