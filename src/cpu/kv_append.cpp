// kv_append on the CPU: new keys and values into a cache, rotary embedding of keys and queries on the way.
//
//   pair (x, y) at position n:   x' = x cos[n] - y sin[n],   y' = x sin[n] + y cos[n]       in f32, rounded once
//
// Pair r is (r, r + rotary_dim/2) in the half style and (2r, 2r + 1) in the interleaved one. What a sequence does is
// worked out for all of them first; then the rows (one token, every head) are shared out among the threads.
#include <algorithm>
#include <cstring>
#include <memory>
#include <new>

#include "base/format.h"
#include "base/threads.h"
#include "plan/impl.h"

namespace heed::cpu {
namespace {

// What one sequence appends, and where; and how many rows of work that is.
struct Append {
  int64_t batch = 0;
  int64_t first_work = 0;                // rows of work of the sequences before
  int64_t num_new = 0, first_new = 0;    // new keys; place of the first in k_new
  int64_t num_q = 0, first_q = 0;        // queries to turn
  int64_t num_zero = 0, first_zero = 0;  // rows of q_out that nobody fills
  int64_t cache_row = 0;
  int64_t start = 0;     // place of the first new key in the cache row
  int64_t position = 0;  // its rotary position
  int32_t status = 0;
};

struct Rows {
  bool good = true;
  int64_t first = 0, length = 0;
};

Rows rows_of(const int32_t* cu_seqlens, int64_t total, int64_t capacity, int64_t b) {
  if (cu_seqlens == nullptr) return {true, 0, capacity};
  const int64_t begin = cu_seqlens[b], end = cu_seqlens[b + 1];
  if (begin < 0 || end < begin || end > total) return {false, 0, 0};
  return {true, begin, end - begin};
}

int64_t page_of(const KvAppendProblem& problem, const KvAppendArgs& args, const Append& a, int64_t key) {
  const auto& stride = problem.strides(KvSlot::kPageTable);
  return args.page_table[a.cache_row * stride[0] + key / problem.page_size * stride[1]];
}

bool pages_are_good(const KvAppendProblem& problem, const KvAppendArgs& args, const Append& a) {
  for (int64_t key = a.start; key < a.start + a.num_new; key = (key / problem.page_size + 1) * problem.page_size) {
    const int64_t page = page_of(problem, args, a, key);
    if (page < 0 || page >= problem.num_pages) return false;
  }
  return true;
}

// Every position that this sequence needs has a row in cos and sin.
bool rotary_rows_are_good(const KvAppendProblem& problem, const Append& a) {
  int64_t last = a.num_new - 1;
  if (a.num_q > 0) last = std::max(last, problem.q_per_position ? a.num_q - 1 : 0);
  return last < 0 || (a.position >= 0 && a.position + last < problem.rotary_rows);
}

int32_t find_status(const KvAppendProblem& problem, const KvAppendArgs& args, const Append& a, const Rows& q,
                    const Rows& keys, int64_t leftpad) {
  int32_t status = 0;
  if (!q.good) status |= kBadLengthQ;
  if (problem.cache_batch > 0 && (a.cache_row < 0 || a.cache_row >= problem.cache_batch)) status |= kBadPage;
  if (!keys.good || a.start < 0 || a.start > problem.seqlen_k || leftpad < 0 || leftpad > a.start)
    status |= kBadLengthK;
  if (status == 0 && problem.rotary() && !rotary_rows_are_good(problem, a)) status |= kBadLengthK;
  if (status == 0 && a.start + a.num_new > problem.seqlen_k) status |= kAppendPastCapacity;
  if (status == 0 && problem.paged() && !pages_are_good(problem, args, a)) status |= kBadPage;
  return status;
}

// Packed query rows of the sequences before this one.
struct PackedQueries {
  int64_t end = 0;      // rows between it and this sequence's are to be zeroed
  int64_t highest = 0;  // of the cu_seqlens_q so far that lie within the total; nothing starts below it
};

Append locate_append(const KvAppendProblem& problem, const KvAppendArgs& args, int64_t b, PackedQueries* before) {
  Append a;
  a.batch = b;
  Rows q, keys;
  if (problem.has_q())
    q = rows_of(problem.packed() ? args.cu_seqlens_q : nullptr, problem.total_q, problem.seqlen_q, b);
  if (problem.append)
    keys = rows_of(problem.packed() ? args.cu_seqlens_new : nullptr, problem.total_new, problem.seqlen_new, b);
  if (problem.packed() && problem.has_q()) {
    const int64_t begin = args.cu_seqlens_q[b];
    q.good = q.good && begin >= before->highest;
    if (begin <= problem.total_q) before->highest = std::max(before->highest, begin);
  }
  const int64_t leftpad = problem.leftpad ? args.leftpad_k[b] : 0;
  a.start = args.cache_seqlens[b];
  a.position = problem.rotary_seqlens ? args.rotary_seqlens[b] : a.start - leftpad;
  a.cache_row = problem.cache_batch > 0 ? args.cache_batch_idx[b] : b;
  a.num_new = keys.length;
  a.first_new = keys.first;
  a.num_q = q.length;
  a.first_q = q.first;
  a.status = find_status(problem, args, a, q, keys, leftpad);
  if (a.status != 0) a.num_new = a.num_q = 0;
  if (!problem.has_q()) return a;
  if (!problem.packed()) {
    a.num_zero = problem.seqlen_q - a.num_q;  // all rows of a bad sequence
  } else if (a.num_q > 0) {
    a.first_zero = before->end;
    a.num_zero = a.first_q - before->end;
    before->end = a.first_q + a.num_q;
  }
  return a;
}

int64_t cache_offset(const KvAppendProblem& problem, const KvAppendArgs& args, const Append& a, KvSlot slot,
                     int64_t head, int64_t key) {
  const auto& stride = problem.strides(slot);
  if (!problem.paged()) return a.cache_row * stride[0] + head * stride[1] + key * stride[2];
  return page_of(problem, args, a, key) * stride[0] + head * stride[1] + key % problem.page_size * stride[2];
}

int64_t row_offset(const KvAppendProblem& problem, const Append& a, KvSlot slot, int64_t head, int64_t row) {
  const auto& stride = problem.strides(slot);
  return (problem.packed() ? 0 : a.batch * stride[0]) + head * stride[1] + row * stride[2];
}

float widen_one(float x) { return x; }
float widen_one(Bf16 x) { return to_float(x); }
float widen_one(F16 x) { return to_float(x); }
void narrow_one(float x, float* p) { *p = x; }
void narrow_one(float x, Bf16* p) { *p = to_bf16(x); }
void narrow_one(float x, F16* p) { *p = to_f16(x); }

// Pairs (from[r * step], from[r * step + apart]); `to` may be `from`.
template <class T, class R>
void turn_pairs(const T* from, T* to, int64_t pairs, int64_t step, int64_t apart, const R* cos, const R* sin) {
  for (int64_t r = 0; r < pairs; ++r) {
    const float c = widen_one(cos[r]), s = widen_one(sin[r]);
    const float x = widen_one(from[r * step]), y = widen_one(from[r * step + apart]);
    narrow_one(x * c - y * s, to + r * step);
    narrow_one(x * s + y * c, to + r * step + apart);
  }
}

// A row of width elements, turned to `position`.
template <class T>
void turn_row(const KvAppendProblem& problem, const KvAppendArgs& args, const T* from, T* to, int64_t width,
              int64_t position) {
  const int64_t pairs = problem.rotary_dim / 2;
  const bool half = problem.rotary_style == RotaryStyle::kHalf;
  const int64_t step = half ? 1 : 2, apart = half ? pairs : 1;
  const int64_t cos_at = position * problem.strides(KvSlot::kCos)[2],
                sin_at = position * problem.strides(KvSlot::kSin)[2];
  if (problem.rotary_dtype == Dtype::kF32) {
    turn_pairs(from, to, pairs, step, apart, static_cast<const float*>(args.rotary_cos) + cos_at,
               static_cast<const float*>(args.rotary_sin) + sin_at);
  } else if constexpr (!std::is_same_v<T, float>) {
    turn_pairs(from, to, pairs, step, apart, static_cast<const T*>(args.rotary_cos) + cos_at,
               static_cast<const T*>(args.rotary_sin) + sin_at);
  }
  if (from != to) std::copy(from + problem.rotary_dim, from + width, to + problem.rotary_dim);
}

template <class T>
void append_token(const KvAppendProblem& problem, const KvAppendArgs& args, const Append& a, int64_t t) {
  const T *k_new = static_cast<const T*>(args.k_new), *v_new = static_cast<const T*>(args.v_new);
  T *k_cache = static_cast<T*>(args.k_cache), *v_cache = static_cast<T*>(args.v_cache);
  for (int64_t head = 0; head < problem.nheads_kv; ++head) {
    const T* k = k_new + row_offset(problem, a, KvSlot::kKNew, head, a.first_new + t);
    const T* v = v_new + row_offset(problem, a, KvSlot::kVNew, head, a.first_new + t);
    T* k_to = k_cache + cache_offset(problem, args, a, KvSlot::kKCache, head, a.start + t);
    T* v_to = v_cache + cache_offset(problem, args, a, KvSlot::kVCache, head, a.start + t);
    if (problem.rotary()) {
      turn_row(problem, args, k, k_to, problem.head_dim, a.position + t);
    } else {
      std::copy(k, k + problem.head_dim, k_to);
    }
    std::copy(v, v + problem.head_dim_v, v_to);
  }
}

template <class T>
void turn_query(const KvAppendProblem& problem, const KvAppendArgs& args, const Append& a, int64_t i) {
  const int64_t position = a.position + (problem.q_per_position ? i : 0);
  for (int64_t head = 0; head < problem.nheads_q; ++head) {
    const T* q = static_cast<const T*>(args.q) + row_offset(problem, a, KvSlot::kQ, head, a.first_q + i);
    T* to = static_cast<T*>(args.q_out) + row_offset(problem, a, KvSlot::kQOut, head, a.first_q + i);
    turn_row(problem, args, q, to, problem.head_dim, position);
  }
}

template <class T>
void zero_query(const KvAppendProblem& problem, const KvAppendArgs& args, const Append& a, int64_t row) {
  for (int64_t head = 0; head < problem.nheads_q; ++head) {
    T* to = static_cast<T*>(args.q_out) + row_offset(problem, a, KvSlot::kQOut, head, row);
    std::memset(to, 0, static_cast<size_t>(problem.head_dim) * sizeof(T));
  }
}

// Rows of work [begin, end) of all sequences.
template <class T>
void run_rows(const KvAppendProblem& problem, const KvAppendArgs& args, const Append* appends, int64_t num_appends,
              int64_t begin, int64_t end) {
  const Append* a = std::upper_bound(appends, appends + num_appends, begin,
                                     [](int64_t row, const Append& x) { return row < x.first_work; }) -
                    1;
  for (int64_t row = begin; row < end; ++row) {
    while (row - a->first_work >= a->num_new + a->num_q + a->num_zero) ++a;
    const int64_t at = row - a->first_work;
    if (at < a->num_new) {
      append_token<T>(problem, args, *a, at);
    } else if (at < a->num_new + a->num_q) {
      turn_query<T>(problem, args, *a, at - a->num_new);
    } else {
      zero_query<T>(problem, args, *a, a->first_zero + at - a->num_new - a->num_q);
    }
  }
}

struct AppendParams {
  int32_t threads = 1;
};

Status run(const Plan<KvAppendProblem>& plan, const Step<KvAppendProblem>& step, const KvAppendArgs& args) {
  const KvAppendProblem& problem = plan.problem;
  Append* appends = reinterpret_cast<Append*>(static_cast<char*>(args.workspace) + step.workspace_offset);
  PackedQueries before;
  int64_t work = 0;
  for (int64_t b = 0; b <= problem.batch; ++b) {
    Append* a = new (appends + b) Append;
    if (b < problem.batch) {
      *a = locate_append(problem, args, b, &before);
      if (args.status != nullptr) args.status[b] = a->status;
    } else if (problem.has_q() && problem.packed()) {  // rows after every sequence
      a->first_zero = before.end;
      a->num_zero = problem.total_q - before.end;
    }
    a->first_work = work;
    work += a->num_new + a->num_q + a->num_zero;
  }
  constexpr int64_t kRowsPerTask = 16;
  const int64_t threads = static_cast<const AppendParams*>(step.params.get())->threads;
  const int64_t tasks = std::min(threads, (work + kRowsPerTask - 1) / kRowsPerTask);
  run_tasks(*args.executor, static_cast<int32_t>(tasks), [&](int32_t task) {
    const int64_t begin = work * task / tasks, end = work * (task + 1) / tasks;
    if (problem.dtype == Dtype::kBf16) return run_rows<Bf16>(problem, args, appends, problem.batch + 1, begin, end);
    if (problem.dtype == Dtype::kF16) return run_rows<F16>(problem, args, appends, problem.batch + 1, begin, end);
    run_rows<float>(problem, args, appends, problem.batch + 1, begin, end);
  });
  return {};
}

Verdict check(const KvAppendProblem& problem, const Machine&) {
  if (problem.device != Device::kCpu) return decline("runs on the CPU only");
  if (problem.dtype == Dtype::kF64) return decline("takes f32, f16 and bf16, not f64; ref/kv_append takes f64");
  return accept("rows are shared out among the threads");
}

double cost_us(const KvAppendProblem& problem, const Machine&) {
  return 1.0 + bytes(problem) / 10e3 / std::max(1, problem.threads);
}

Status prepare(const KvAppendProblem& problem, const Machine&, Plan<KvAppendProblem>& plan) {
  auto params = std::make_shared<AppendParams>();
  params->threads = std::max(1, problem.threads);
  Step<KvAppendProblem> step;
  step.kernel = heed::format("kv_append {}", dtype_name(problem.dtype));
  step.run = run;
  step.grid = problem.batch;
  step.workspace_bytes = static_cast<size_t>(problem.batch + 1) * sizeof(Append);
  plan.workspace_bytes = step.workspace_bytes;
  step.params = std::move(params);
  plan.steps.push_back(std::move(step));
  return {};
}

}  // namespace
}  // namespace heed::cpu

namespace heed {

extern const Impl<KvAppendProblem> kCpuKvAppend;
const Impl<KvAppendProblem> kCpuKvAppend = {
    "cpu/kv_append", "cache append with rotary embedding", false, cpu::check, cpu::cost_us, cpu::prepare};

}  // namespace heed
