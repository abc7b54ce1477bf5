// Where a sequence's rows and keys lie, and whether the data that says so is good.
#include "ref/attention.h"

#include <algorithm>

namespace heed::ref {
namespace {

bool in_range(int64_t value, int64_t low, int64_t high) { return value >= low && value <= high; }

// A run of rows: cu_seqlens where packed, all the capacity else; then the used part of it.
struct Span {
  bool good = true;
  int64_t first = 0, length = 0;
};

Span span_of(const int32_t* cu_seqlens, int64_t total, int64_t capacity, const int32_t* used, int64_t b) {
  Span span;
  span.length = capacity;
  if (cu_seqlens != nullptr) {
    const int64_t begin = cu_seqlens[b], end = cu_seqlens[b + 1];
    if (!in_range(begin, 0, end) || !in_range(end, begin, total)) return {false, 0, 0};
    span.first = begin;
    span.length = end - begin;
  }
  if (used != nullptr) {
    if (!in_range(used[b], 0, span.length)) return {false, 0, 0};
    span.length = used[b];
  }
  return span;
}

// bias and mask of packed input end at the lengths that the problem states: a longer sequence would read past them.
bool past_extent(const AttentionProblem& p, uint8_t letter, int64_t length, int64_t extent) {
  const bool bounded = (p.bias() && (p.bias_dims & letter) != 0) || (p.mask && (p.mask_dims & letter) != 0);
  return bounded && length > extent;
}

bool pages_good(const AttentionProblem& p, const Sequence& s, int64_t end) {
  for (int64_t key = s.first_key; key < end; key = (key / p.page_size + 1) * p.page_size) {
    if (!in_range(s.pages[key / p.page_size * p.strides(Slot::kPageTable)[1]], 0, p.num_pages - 1)) return false;
  }
  return true;
}

// in_order_q, in_order_k: of the rows that this pass writes, see starts_in_order.
Sequence sequence_of(const AttentionProblem& p, const AttentionArgs& a, int64_t b, bool in_order_q, bool in_order_k) {
  Sequence s;
  s.b = b;
  s.q_batch = p.packed_q() ? 0 : b;
  s.kv_batch = p.packed_k() ? 0 : b;

  const Span rows =
      span_of(p.packed_q() ? a.cu_seqlens_q : nullptr, p.total_q, p.seqlen_q, p.used_q ? a.seqused_q : nullptr, b);
  if (!rows.good || !in_order_q || past_extent(p, kDimI, rows.length, p.seqlen_q)) s.status |= kBadLengthQ;

  const Span keys =
      span_of(p.packed_k() ? a.cu_seqlens_k : nullptr, p.total_k, p.seqlen_k, p.used_k ? a.seqused_k : nullptr, b);
  const int64_t leftpad = p.leftpad ? a.leftpad_k[b] : 0;
  s.first_key = keys.first + leftpad;
  s.num_keys = keys.length - leftpad;
  if (p.cache_batch > 0) s.kv_batch = a.cache_batch_idx[b];
  if (p.cache_batch > 0 && !in_range(s.kv_batch, 0, p.cache_batch - 1)) {
    s.status |= kBadPage;
  } else if (!keys.good || !in_order_k || !in_range(leftpad, 0, keys.length) ||
             past_extent(p, kDimJ, s.num_keys, p.seqlen_k)) {
    s.status |= kBadLengthK;
  } else if (p.paged() && s.status == 0) {
    s.pages = a.page_table + s.kv_batch * p.strides(Slot::kPageTable)[0];
    if (!pages_good(p, s, keys.length)) s.status |= kBadPage;
  }
  if (s.status != 0) {
    s.num_keys = 0;
    return s;
  }

  s.first_row = rows.first;
  s.num_rows = rows.length;
  switch (p.offset_kind) {
    case OffsetKind::kBottomRight: s.offset = s.num_keys - s.num_rows; break;
    case OffsetKind::kTopLeft: s.offset = 0; break;
    case OffsetKind::kGiven: s.offset = p.q_offset; break;
  }
  return s;
}

}  // namespace

std::vector<bool> starts_in_order(const int32_t* cu_seqlens, int64_t batch, int64_t total) {
  std::vector<bool> in_order(batch, true);
  int64_t highest = 0;
  for (int64_t b = 0; b < batch && cu_seqlens != nullptr; ++b) {
    in_order[b] = cu_seqlens[b] >= highest;
    if (cu_seqlens[b] <= total) highest = std::max<int64_t>(highest, cu_seqlens[b]);
  }
  return in_order;
}

std::vector<Sequence> sequences_of(const AttentionProblem& p, const AttentionArgs& a) {
  const bool keys_are_written = p.packed_k() && p.pass == Pass::kBackward;
  const std::vector<bool> in_order_q = starts_in_order(p.packed_q() ? a.cu_seqlens_q : nullptr, p.batch, p.total_q);
  const std::vector<bool> in_order_k = starts_in_order(keys_are_written ? a.cu_seqlens_k : nullptr, p.batch, p.total_k);
  std::vector<Sequence> sequences;
  for (int64_t b = 0; b < p.batch; ++b) sequences.push_back(sequence_of(p, a, b, in_order_q[b], in_order_k[b]));
  return sequences;
}

int64_t key_offset(const AttentionProblem& p, const Sequence& s, Slot slot, int64_t hkv, int64_t j) {
  const auto& stride = p.strides(slot);
  const int64_t key = s.first_key + j;
  if (!p.paged()) return s.kv_batch * stride[0] + hkv * stride[1] + key * stride[2];
  const int64_t page = s.pages[key / p.page_size * p.strides(Slot::kPageTable)[1]];
  return page * stride[0] + hkv * stride[1] + key % p.page_size * stride[2];
}

int64_t row_offset(const AttentionProblem& p, const Sequence& s, Slot slot, int64_t h, int64_t i) {
  const auto& stride = p.strides(slot);
  return s.q_batch * stride[0] + h * stride[1] + (s.first_row + i) * stride[2];
}

}  // namespace heed::ref
