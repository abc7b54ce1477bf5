// Where one sequence of a batch lies in memory and which keys its queries see: worked out once per run from the
// lengths, offsets and page table, which only the run may read. Shared by the forward and the backward pass.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "ops/attention.h"

namespace heed::cpu {

constexpr int64_t kFar = std::numeric_limits<int64_t>::max() / 4;  // beyond any key: sums of two stay in range

// One sequence. A bad one (status != 0) has q_len = k_len = 0: its rows are padding, written as 0 / -inf.
struct Sequence {
  int64_t batch = 0;      // b: of q, out, bias, mask, alibi, status
  int64_t q_begin = 0;    // row of query 0: 0 dense, cu_seqlens_q[b] packed
  int64_t q_len = 0;      // queries that count
  int64_t q_rows = 0;     // rows from q_begin on that this sequence must write: q_len, then padding
  int64_t q_gap = 0;      // packed: rows before q_begin that no sequence owns, padding too
  int64_t k_begin = 0;    // row of key 0 within its cache row: left padding; packed: cu_seqlens_k[b] + left padding
  int64_t k_len = 0;      // keys that count, after left padding
  int64_t cache_row = 0;  // index of dimension b of k and v, or the row of the page table
  int64_t offset = 0;     // position of query i on the key axis: i + offset
  int32_t status = 0;     // StatusBit
};

// What the sequences before b say of packed rows; starts as zeroes, and locate_sequence updates it.
struct PackedRows {
  int64_t end_q = 0;      // query rows before this one are some sequence's, or the gap before one
  int64_t highest_q = 0;  // of the cu_seqlens_q so far that lie within the total; nothing starts below it
  int64_t highest_k = 0;  // likewise, in the backward pass, which writes rows of keys
};

// Geometry of sequence b. Rows that a broken cu_seqlens_q leaves to nobody become the gap of the next good sequence, or
// the tail after the last.
Sequence locate_sequence(const AttentionProblem& problem, const AttentionArgs& args, int64_t b, PackedRows* before);

struct KeyRange {
  int64_t lo = 0, hi = 0;  // visible keys: lo <= j < hi; empty if hi <= lo
};

// Keys that causal, window, chunk and length leave to a query at position p, 0 <= lo, hi <= k_len; lo and hi never fall
// as p grows. An empty range comes back as hi == lo.
inline KeyRange visible_keys(const AttentionProblem& problem, int64_t k_len, int64_t p) {
  int64_t lo = 0, hi = k_len;
  if (problem.window_left >= 0) lo = std::max(lo, p - std::min(problem.window_left, kFar));
  if (problem.window_right >= 0) hi = std::min(hi, p + std::min(problem.window_right, kFar) + 1);
  if (problem.chunk > 0) {
    const int64_t c = std::min(problem.chunk, kFar);
    const int64_t floor = p >= 0 ? p / c : -((-p + c - 1) / c);
    if (floor >= 0 && floor <= k_len / c) {
      lo = std::max(lo, floor * c);
      hi = std::min(hi, floor * c + c);
    } else {
      hi = floor < 0 ? 0 : lo;
      lo = floor < 0 ? 0 : std::max(lo, k_len);
    }
  }
  lo = std::clamp<int64_t>(lo, 0, k_len);
  return {lo, std::clamp<int64_t>(hi, lo, k_len)};
}

// Rows of k or v of one (sequence, kv head): element offset of the row of key j from the tensor's data pointer.
struct KeyRows {
  const int32_t* pages = nullptr;  // this sequence's row of the page table; null: not paged
  int64_t page_step = 1;           // between entries of the page table
  int64_t page_size = 0;
  int64_t page_stride = 0;
  int64_t row_stride = 0;
  int64_t base = 0;   // paged: of the head; else of key 0
  int64_t first = 0;  // paged: k_begin

  int64_t offset(int64_t j) const {
    if (pages == nullptr) return base + j * row_stride;
    const int64_t row = first + j;
    return base + pages[row / page_size * page_step] * page_stride + row % page_size * row_stride;
  }
  // Keys from j on that lie row_stride apart.
  int64_t run(int64_t j) const { return pages == nullptr ? kFar : page_size - (first + j) % page_size; }
};

KeyRows locate_keys(const AttentionProblem& problem, const AttentionArgs& args, const Sequence& sequence, Slot slot,
                    int64_t kv_head);

// Element offset of (query i, query head h) in q, out, dq, dout: strides in (b, h, s, d) order. lse likewise.
inline int64_t row_offset(const AttentionProblem& problem, Slot slot, const Sequence& s, int64_t h, int64_t i) {
  const auto& stride = problem.strides(slot);
  return s.batch * stride[0] + h * stride[1] + (s.q_begin + i) * stride[2];
}

}  // namespace heed::cpu
