// The calls that read what run never looks at on the host: lengths, offsets, page tables, cache rows.
#include <algorithm>

#include "base/format.h"
#include "capi_args.h"
#include "capi_error.h"
#include "capi_handles.h"
#include "check/host_copies.h"

namespace heed {
namespace {

// name[index] = value in [low, high], or a sentence that says what the limits are.
Status check_value(const char* name, int64_t index, int64_t value, int64_t low, int64_t high, const char* what) {
  if (value >= low && value <= high) return {};
  return invalid_argument(heed::format("{}[{}] = {}: must be from {} to {} ({})", name, index, value, low, high, what));
}

// Ascending from at least 0 to at most the rows of the packed tensor.
Status check_offsets(const char* name, const int32_t* offsets, int64_t batch, int64_t total) {
  if (offsets == nullptr) return {};
  for (int64_t i = 0; i <= batch; ++i) {
    const int64_t low = i == 0 ? 0 : offsets[i - 1];
    HEED_RETURN_IF_ERROR(check_value(name, i, offsets[i], low, total, "ascending, within the packed tensor"));
  }
  return {};
}

struct Pages {
  const int32_t* table;
  int64_t row_stride, page_size, num_pages;
};

Status check_pages(const Pages& pages, int64_t row, int64_t length) {
  const int64_t used = (length + pages.page_size - 1) / pages.page_size;
  for (int64_t page = 0; page < used; ++page) {
    const int32_t entry = pages.table[row * pages.row_stride + page];
    if (entry < 0 || entry >= pages.num_pages) {
      return invalid_argument(
          heed::format("page_table[{}, {}] = {}: must be from 0 to {} (num_pages - 1); {} keys need it", row, page,
                       entry, pages.num_pages - 1, length));
    }
  }
  return {};
}

Status check_cache_row(const int32_t* cache_batch_idx, int64_t sequence, int64_t rows, int64_t& row) {
  row = sequence;
  if (cache_batch_idx == nullptr) return {};
  row = cache_batch_idx[sequence];
  return check_value("cache_batch_idx", sequence, row, 0, rows - 1, "a row of the cache");
}

Status check_data(const AttentionProblem& p, const AttentionArgs& args) {
  HEED_RETURN_IF_ERROR(check_offsets("cu_seqlens_q", args.cu_seqlens_q, p.batch, p.total_q));
  HEED_RETURN_IF_ERROR(check_offsets("cu_seqlens_k", args.cu_seqlens_k, p.batch, p.total_k));
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t rows_q = p.packed_q() ? args.cu_seqlens_q[b + 1] - args.cu_seqlens_q[b] : p.seqlen_q;
    int64_t keys = p.packed_k() ? args.cu_seqlens_k[b + 1] - args.cu_seqlens_k[b] : p.seqlen_k;
    int64_t row = 0;
    if (args.seqused_q != nullptr) {
      HEED_RETURN_IF_ERROR(check_value("seqused_q", b, args.seqused_q[b], 0, rows_q, "rows of this sequence"));
    }
    if (args.seqused_k != nullptr) {
      HEED_RETURN_IF_ERROR(check_value("seqused_k", b, args.seqused_k[b], 0, keys, "capacity of this sequence"));
      keys = args.seqused_k[b];
    }
    if (args.leftpad_k != nullptr) {
      HEED_RETURN_IF_ERROR(check_value("leftpad_k", b, args.leftpad_k[b], 0, keys, "keys of this sequence"));
    }
    HEED_RETURN_IF_ERROR(check_cache_row(args.cache_batch_idx, b, p.cache_batch, row));
    if (p.paged()) {
      const Pages pages = {args.page_table, p.strides(Slot::kPageTable)[0], p.page_size, p.num_pages};
      HEED_RETURN_IF_ERROR(check_pages(pages, row, keys));
    }
  }
  return {};
}

Status check_rotary(const KvAppendProblem& p, const KvAppendArgs& args, int64_t b, int64_t added, int64_t queries) {
  if (!p.rotary()) return {};
  const int64_t leftpad = args.leftpad_k != nullptr ? args.leftpad_k[b] : 0;
  const int64_t first = args.rotary_seqlens != nullptr ? args.rotary_seqlens[b] : args.cache_seqlens[b] - leftpad;
  const int64_t turned =
      std::max(p.append ? added : 0, p.has_q() ? (p.q_per_position ? queries : std::min<int64_t>(queries, 1)) : 0);
  if (turned == 0 || (first >= 0 && first + turned <= p.rotary_rows)) return {};
  return invalid_argument(heed::format("{}[{}] = {}: positions {} to {} must be rows of rotary_cos, 0 to {}",
                                       args.rotary_seqlens != nullptr ? "rotary_seqlens" : "cache_seqlens", b,
                                       args.rotary_seqlens != nullptr ? args.rotary_seqlens[b] : args.cache_seqlens[b],
                                       first, first + turned - 1, p.rotary_rows - 1));
}

Status check_data(const KvAppendProblem& p, const KvAppendArgs& args) {
  HEED_RETURN_IF_ERROR(check_offsets("cu_seqlens_new", args.cu_seqlens_new, p.batch, p.total_new));
  HEED_RETURN_IF_ERROR(check_offsets("cu_seqlens_q", args.cu_seqlens_q, p.batch, p.total_q));
  for (int64_t b = 0; b < p.batch; ++b) {
    const auto rows = [b](const int32_t* offsets, int64_t dense) {
      return offsets != nullptr ? int64_t{offsets[b + 1]} - offsets[b] : dense;
    };
    const int64_t added = p.append ? rows(args.cu_seqlens_new, p.seqlen_new) : 0;
    const int64_t queries = rows(args.cu_seqlens_q, p.seqlen_q);
    const int64_t before = args.cache_seqlens[b];
    HEED_RETURN_IF_ERROR(check_value("cache_seqlens", b, before, 0, p.seqlen_k, "capacity of a cache row"));
    if (before + added > p.seqlen_k) {
      return invalid_argument(heed::format(
          "cache_seqlens[{}] = {}: must leave room for {} new keys in a capacity of {}", b, before, added, p.seqlen_k));
    }
    if (args.leftpad_k != nullptr) {
      HEED_RETURN_IF_ERROR(check_value("leftpad_k", b, args.leftpad_k[b], 0, before, "keys of this sequence"));
    }
    HEED_RETURN_IF_ERROR(check_rotary(p, args, b, added, queries));
    int64_t row = 0;
    HEED_RETURN_IF_ERROR(check_cache_row(args.cache_batch_idx, b, p.cache_batch, row));
    if (p.paged()) {
      const Pages pages = {args.page_table, p.strides(KvSlot::kPageTable)[0], p.page_size, p.num_pages};
      HEED_RETURN_IF_ERROR(check_pages(pages, row, before + added));
    }
  }
  return {};
}

template <class CArgs>
heed_status validate_data(const CArgs* args, const char* call) {
  return guarded([&]() -> Status {
    auto read = read_args(args);
    if (!read.ok()) return read.status();
    const auto problem = problem_of(read.value());
    if (!problem.ok()) return problem.status();
    check::HostCopies copies;
    HEED_RETURN_IF_ERROR(copies.indices(read.value(), problem.value().device_index, call));
    const auto pointers = args_of(read.value(), problem.value());
    HEED_RETURN_IF_ERROR(validate(problem.value(), pointers, 0));
    return check_data(problem.value(), pointers);
  });
}

}  // namespace
}  // namespace heed

extern "C" {

heed_status heed_attention_validate(const heed_attention_args* args) {
  return heed::validate_data(args, "heed_attention_validate");
}
heed_status heed_kv_append_validate(const heed_kv_append_args* args) {
  return heed::validate_data(args, "heed_kv_append_validate");
}

}  // extern "C"
