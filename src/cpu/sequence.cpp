#include "cpu/sequence.h"

namespace heed::cpu {
namespace {

// Where bias or mask has an extent of its own along i or j, a packed sequence must not be longer: it would read past
// it.
bool exceeds_extent(const AttentionProblem& problem, uint8_t letter, int64_t length, int64_t extent) {
  const bool bounded =
      (problem.bias() && (problem.bias_dims & letter) != 0) || (problem.mask && (problem.mask_dims & letter) != 0);
  return bounded && length > extent;
}

// Whether rows [begin, end) lie within the total and start below no offset before them, so that no row is written
// twice.
bool rows_are_good(int64_t begin, int64_t end, int64_t total, int64_t* highest) {
  const bool good = begin >= *highest && end >= begin && end <= total;
  if (begin <= total) *highest = std::max(*highest, begin);
  return good;
}

// Where sequence b's queries lie.
void locate_queries(const AttentionProblem& problem, const AttentionArgs& args, int64_t b, PackedRows* before,
                    Sequence* s) {
  int64_t capacity = problem.seqlen_q;
  if (problem.packed_q()) {
    const int64_t begin = args.cu_seqlens_q[b], end = args.cu_seqlens_q[b + 1];
    if (!rows_are_good(begin, end, problem.total_q, &before->highest_q)) {
      s->q_begin = before->end_q;
      s->status |= kBadLengthQ;
      return;
    }
    s->q_begin = begin;
    s->q_gap = begin - before->end_q;
    capacity = end - begin;
    before->end_q = end;
  }
  s->q_rows = capacity;
  const int64_t used = problem.used_q ? args.seqused_q[b] : capacity;
  if (used < 0 || used > capacity || exceeds_extent(problem, kDimI, used, problem.seqlen_q)) {
    s->status |= kBadLengthQ;
  } else {
    s->q_len = used;
  }
}

void locate_key_rows(const AttentionProblem& problem, const AttentionArgs& args, int64_t b, PackedRows* before,
                     Sequence* s) {
  int64_t capacity = problem.seqlen_k;
  s->cache_row = b;
  if (problem.packed_k()) {
    const int64_t begin = args.cu_seqlens_k[b], end = args.cu_seqlens_k[b + 1];
    int64_t any = 0;  // keys that are only read may be shared
    const bool written = problem.pass == Pass::kBackward;
    if (!rows_are_good(begin, end, problem.total_k, written ? &before->highest_k : &any)) {
      s->status |= kBadLengthK;
      return;
    }
    s->k_begin = begin;
    s->cache_row = 0;
    capacity = end - begin;
  } else if (problem.cache_batch > 0) {
    s->cache_row = args.cache_batch_idx[b];
    if (s->cache_row < 0 || s->cache_row >= problem.cache_batch) {
      s->cache_row = 0;
      s->status |= kBadPage;
      return;
    }
  }
  const int64_t used = problem.used_k ? args.seqused_k[b] : capacity;
  const int64_t leftpad = problem.leftpad ? args.leftpad_k[b] : 0;
  if (used < 0 || used > capacity || leftpad < 0 || leftpad > used ||
      exceeds_extent(problem, kDimJ, used - leftpad, problem.seqlen_k)) {
    s->status |= kBadLengthK;
    return;
  }
  s->k_begin += leftpad;
  s->k_len = used - leftpad;
}

bool pages_are_good(const AttentionProblem& problem, const AttentionArgs& args, const Sequence& s) {
  if (s.k_len == 0) return true;
  const auto& stride = problem.strides(Slot::kPageTable);
  const int32_t* pages = args.page_table + s.cache_row * stride[0];
  const int64_t first = s.k_begin / problem.page_size, last = (s.k_begin + s.k_len - 1) / problem.page_size;
  for (int64_t page = first; page <= last; ++page) {
    const int64_t id = pages[page * stride[1]];
    if (id < 0 || id >= problem.num_pages) return false;
  }
  return true;
}

int64_t query_offset(const AttentionProblem& problem, const Sequence& s) {
  switch (problem.offset_kind) {
    case OffsetKind::kBottomRight: return s.k_len - s.q_len;
    case OffsetKind::kTopLeft: return 0;
    case OffsetKind::kGiven: return std::clamp(problem.q_offset, -kFar, kFar);
  }
  return 0;
}

}  // namespace

Sequence locate_sequence(const AttentionProblem& problem, const AttentionArgs& args, int64_t b, PackedRows* before) {
  Sequence s;
  s.batch = b;
  locate_queries(problem, args, b, before, &s);
  locate_key_rows(problem, args, b, before, &s);
  if (s.status == 0 && problem.paged() && !pages_are_good(problem, args, s)) s.status |= kBadPage;
  if (s.status != 0) s.q_len = s.k_len = 0;
  s.offset = query_offset(problem, s);
  return s;
}

KeyRows locate_keys(const AttentionProblem& problem, const AttentionArgs& args, const Sequence& sequence, Slot slot,
                    int64_t kv_head) {
  const auto& stride = problem.strides(slot);
  KeyRows rows;
  rows.row_stride = stride[2];
  rows.base = kv_head * stride[1];
  if (problem.paged()) {
    const auto& table = problem.strides(Slot::kPageTable);
    rows.pages = args.page_table + sequence.cache_row * table[0];
    rows.page_step = table[1];
    rows.page_size = problem.page_size;
    rows.page_stride = stride[0];
    rows.first = sequence.k_begin;
  } else {
    rows.base += sequence.cache_row * stride[0] + sequence.k_begin * stride[2];
  }
  return rows;
}

}  // namespace heed::cpu
