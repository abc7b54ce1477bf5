// Textbook kv_append: what each sequence appends and where, and a row turned by the rotary embedding.
#pragma once

#include <cstdint>
#include <vector>

#include "ops/kv_append.h"

namespace heed::ref {

// One sequence of the batch. One whose data is bad has status bits and neither queries nor new keys.
struct Append {
  int64_t b = 0;
  int32_t status = 0;                    // HEED_STATUS_* bits
  int64_t num_rows = 0, num_new = 0;     // queries, new keys
  int64_t first_row = 0, first_new = 0;  // their places in q and k_new
  int64_t cache_row = 0;
  int64_t start = 0;     // place in the cache row of the first new key
  int64_t position = 0;  // its rotary position
};
std::vector<Append> appends_of(const KvAppendProblem& problem, const KvAppendArgs& args);

// The page, or the cache row, that a key lies in.
int64_t cache_index(const KvAppendProblem& problem, const KvAppendArgs& args, const Append& append, int64_t key);
// Element (key, 0) of head hkv in k_cache or v_cache.
int64_t cache_offset(const KvAppendProblem& problem, const KvAppendArgs& args, const Append& append, KvSlot slot,
                     int64_t hkv, int64_t key);
// Element (row, 0) of head h in k_new, v_new, q or q_out.
int64_t row_offset(const KvAppendProblem& problem, const Append& append, KvSlot slot, int64_t h, int64_t row);

// The head_dim numbers at `from` + offset, the first rotary_dim of them turned to `position`. Real = double: the
// reference, float: the plain formula of the error bound.
template <class Real>
void turned_row(const KvAppendProblem& problem, const KvAppendArgs& args, const void* from, int64_t offset,
                int64_t position, std::vector<Real>& row);

// What row "ref/kv_append" of the registry runs. Unlike a backend's, it allocates.
void kv_append(const KvAppendProblem& problem, const KvAppendArgs& args);

}  // namespace heed::ref
