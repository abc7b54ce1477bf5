// The reference of kv_append: new keys, turned by the rotary embedding, and values go to position cache_seqlens + t of
// a cache; queries are turned into q_out. Rotary of the pair (x, y) at position n, in double precision, rounded once:
//   x' = x cos[n][r] - y sin[n][r]      y' = x sin[n][r] + y cos[n][r]
// Pair r of rotary_dim elements is (r, r + rotary_dim/2) in the half style, (2r, 2r + 1) in the interleaved one.
#include "ref/kv_append.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "plan/impl.h"
#include "ref/attention.h"

namespace heed::ref {
namespace {

bool in_range(int64_t value, int64_t low, int64_t high) { return value >= low && value <= high; }

struct Rows {
  bool good;
  int64_t first, length;
};

Rows rows_of(const int32_t* cu_seqlens, int64_t total, int64_t capacity, int64_t b) {
  if (cu_seqlens == nullptr) return {true, 0, capacity};
  const int64_t begin = cu_seqlens[b], end = cu_seqlens[b + 1];
  return {in_range(begin, 0, end) && end <= total, begin, end - begin};
}

int64_t page_of(const KvAppendProblem& p, const KvAppendArgs& a, const Append& s, int64_t key) {
  const auto& stride = p.strides(KvSlot::kPageTable);
  return a.page_table[s.cache_row * stride[0] + key / p.page_size * stride[1]];
}

bool pages_good(const KvAppendProblem& p, const KvAppendArgs& a, const Append& s) {
  for (int64_t key = s.start; key < s.start + s.num_new; key = (key / p.page_size + 1) * p.page_size) {
    if (!in_range(page_of(p, a, s, key), 0, p.num_pages - 1)) return false;
  }
  return true;
}

// Every position that the rotary embedding of this sequence needs has a row in cos and sin.
bool rotary_rows_good(const KvAppendProblem& p, const Append& s) {
  int64_t last = s.num_new - 1;
  if (p.has_q() && s.num_rows > 0) last = std::max(last, p.q_per_position ? s.num_rows - 1 : 0);
  return last < 0 || (s.position >= 0 && s.position + last < p.rotary_rows);
}

// in_order: of the queries, see starts_in_order.
Append append_of(const KvAppendProblem& p, const KvAppendArgs& a, int64_t b, bool in_order) {
  Append s;
  s.b = b;
  const Rows queries =
      p.has_q() ? rows_of(p.packed() ? a.cu_seqlens_q : nullptr, p.total_q, p.seqlen_q, b) : Rows{true, 0, 0};
  const Rows keys =
      p.append ? rows_of(p.packed() ? a.cu_seqlens_new : nullptr, p.total_new, p.seqlen_new, b) : Rows{true, 0, 0};
  const int64_t leftpad = p.leftpad ? a.leftpad_k[b] : 0;
  s.start = a.cache_seqlens[b];
  s.position = p.rotary_seqlens ? a.rotary_seqlens[b] : s.start - leftpad;
  s.cache_row = p.cache_batch > 0 ? a.cache_batch_idx[b] : b;
  s.first_row = queries.first, s.num_rows = queries.length;
  s.first_new = keys.first, s.num_new = keys.length;

  if (!queries.good || !in_order) s.status |= kBadLengthQ;
  if (p.cache_batch > 0 && !in_range(s.cache_row, 0, p.cache_batch - 1)) s.status |= kBadPage;
  if (!keys.good || !in_range(s.start, 0, p.seqlen_k) || !in_range(leftpad, 0, s.start)) s.status |= kBadLengthK;
  if (s.status == 0 && p.rotary() && !rotary_rows_good(p, s)) s.status |= kBadLengthK;
  if (s.status == 0 && s.start + s.num_new > p.seqlen_k) s.status |= kAppendPastCapacity;
  if (s.status == 0 && p.paged() && !pages_good(p, a, s)) s.status |= kBadPage;
  if (s.status != 0) s.num_rows = s.num_new = 0;
  return s;
}

}  // namespace

std::vector<Append> appends_of(const KvAppendProblem& p, const KvAppendArgs& a) {
  const std::vector<bool> in_order =
      starts_in_order(p.packed() && p.has_q() ? a.cu_seqlens_q : nullptr, p.batch, p.total_q);
  std::vector<Append> appends;
  for (int64_t b = 0; b < p.batch; ++b) appends.push_back(append_of(p, a, b, in_order[b]));
  return appends;
}

int64_t cache_index(const KvAppendProblem& p, const KvAppendArgs& a, const Append& s, int64_t key) {
  return p.paged() ? page_of(p, a, s, key) : s.cache_row;
}

int64_t cache_offset(const KvAppendProblem& p, const KvAppendArgs& a, const Append& s, KvSlot slot, int64_t hkv,
                     int64_t key) {
  const auto& stride = p.strides(slot);
  const int64_t place = p.paged() ? key % p.page_size : key;
  return cache_index(p, a, s, key) * stride[0] + hkv * stride[1] + place * stride[2];
}

int64_t row_offset(const KvAppendProblem& p, const Append& s, KvSlot slot, int64_t h, int64_t row) {
  const auto& stride = p.strides(slot);
  return (p.packed() ? 0 : s.b * stride[0]) + h * stride[1] + row * stride[2];
}

template <class Real>
void turned_row(const KvAppendProblem& p, const KvAppendArgs& a, const void* from, int64_t offset, int64_t position,
                std::vector<Real>& row) {
  for (size_t d = 0; d < row.size(); ++d) row[d] = static_cast<Real>(load_as_double(from, p.dtype, offset + d));
  const int64_t pairs = p.rotary_dim / 2;
  for (int64_t r = 0; r < pairs; ++r) {
    const auto c =
        static_cast<Real>(load_as_double(a.rotary_cos, p.rotary_dtype, position * p.strides(KvSlot::kCos)[2] + r));
    const auto s =
        static_cast<Real>(load_as_double(a.rotary_sin, p.rotary_dtype, position * p.strides(KvSlot::kSin)[2] + r));
    const bool half = p.rotary_style == RotaryStyle::kHalf;
    Real& x = row[half ? r : 2 * r];
    Real& y = row[half ? r + pairs : 2 * r + 1];
    const Real x_turned = x * c - y * s;
    y = x * s + y * c;
    x = x_turned;
  }
}

template void turned_row(const KvAppendProblem&, const KvAppendArgs&, const void*, int64_t, int64_t,
                         std::vector<double>&);
template void turned_row(const KvAppendProblem&, const KvAppendArgs&, const void*, int64_t, int64_t,
                         std::vector<float>&);

namespace {

void store_turned(const KvAppendProblem& p, const KvAppendArgs& a, const void* from, int64_t from_offset, void* to,
                  int64_t to_offset, int64_t position) {
  std::vector<double> row(p.head_dim);
  turned_row(p, a, from, from_offset, position, row);
  for (int64_t d = 0; d < p.head_dim; ++d) store_from_double(to, p.dtype, to_offset + d, row[d]);
}

void append_keys(const KvAppendProblem& p, const KvAppendArgs& a, const Append& s) {
  const int64_t v_bytes = p.head_dim_v * dtype_bytes(p.dtype);
  for (int64_t hkv = 0; hkv < p.nheads_kv; ++hkv) {
    for (int64_t t = 0; t < s.num_new; ++t) {
      store_turned(p, a, a.k_new, row_offset(p, s, KvSlot::kKNew, hkv, s.first_new + t), a.k_cache,
                   cache_offset(p, a, s, KvSlot::kKCache, hkv, s.start + t), s.position + t);
      const int64_t from = row_offset(p, s, KvSlot::kVNew, hkv, s.first_new + t);
      const int64_t to = cache_offset(p, a, s, KvSlot::kVCache, hkv, s.start + t);
      std::memcpy(static_cast<char*>(a.v_cache) + to * dtype_bytes(p.dtype),
                  static_cast<const char*>(a.v_new) + from * dtype_bytes(p.dtype), v_bytes);
    }
  }
}

void turn_queries(const KvAppendProblem& p, const KvAppendArgs& a, const Append& s) {
  for (int64_t h = 0; h < p.nheads_q; ++h) {
    for (int64_t i = 0; i < s.num_rows; ++i) {
      store_turned(p, a, a.q, row_offset(p, s, KvSlot::kQ, h, s.first_row + i), a.q_out,
                   row_offset(p, s, KvSlot::kQOut, h, s.first_row + i), s.position + (p.q_per_position ? i : 0));
    }
  }
}

// Rows of q_out that no sequence fills. q_out may be q itself, so only these may be zeroed.
void zero_other_rows(const KvAppendProblem& p, const KvAppendArgs& a, const std::vector<Append>& appends) {
  const int64_t rows_per_batch = p.packed() ? p.total_q : p.seqlen_q;
  std::vector<bool> filled((p.packed() ? 1 : p.batch) * rows_per_batch);
  for (const Append& s : appends) {
    const int64_t first = (p.packed() ? 0 : s.b * rows_per_batch) + s.first_row;
    for (int64_t i = 0; i < s.num_rows; ++i) filled[first + i] = true;
  }
  for (int64_t row = 0; row < static_cast<int64_t>(filled.size()); ++row) {
    if (filled[row]) continue;
    Append place;
    place.b = row / rows_per_batch;
    for (int64_t h = 0; h < p.nheads_q; ++h) {
      const int64_t first = row_offset(p, place, KvSlot::kQOut, h, row % rows_per_batch);
      for (int64_t d = 0; d < p.head_dim; ++d) store_from_double(a.q_out, p.dtype, first + d, 0.0);
    }
  }
}

}  // namespace

void kv_append(const KvAppendProblem& p, const KvAppendArgs& a) {
  const std::vector<Append> appends = appends_of(p, a);
  for (const Append& s : appends) {
    if (a.status != nullptr) a.status[s.b] = s.status;
    if (p.append) append_keys(p, a, s);
    if (p.has_q()) turn_queries(p, a, s);
  }
  if (p.has_q()) zero_other_rows(p, a, appends);
}

namespace {

Status run(const Plan<KvAppendProblem>& plan, const Step<KvAppendProblem>&, const KvAppendArgs& args) {
  kv_append(plan.problem, args);
  return {};
}

Verdict check(const KvAppendProblem& problem, const Machine&) {
  if (problem.device != Device::kCpu) return decline("reads host memory only: copy the tensors there");
  return accept("double precision, one thread");
}

double cost_us(const KvAppendProblem& p, const Machine&) { return bytes(p) / 1e3; }

Status prepare(const KvAppendProblem& p, const Machine&, Plan<KvAppendProblem>& plan) {
  Step<KvAppendProblem> step;
  step.kernel = "kv_append, f64";
  step.run = run;
  step.grid = p.batch;
  plan.steps.push_back(std::move(step));
  return {};
}

}  // namespace
}  // namespace heed::ref

namespace heed {

extern const Impl<KvAppendProblem> kRefKvAppend;
const Impl<KvAppendProblem> kRefKvAppend = {"ref/kv_append",
                                            "the textbook of the cache append: what results are judged against",
                                            true,
                                            ref::check,
                                            ref::cost_us,
                                            ref::prepare};

}  // namespace heed
