// What attention.cpp and attention_slots.cpp share: a slot of a problem as a strided tensor.
#pragma once

#include "ops/attention.h"
#include "ops/tensor_layout.h"

namespace heed {

TensorLayout slot_layout(const AttentionProblem& problem, Slot slot);

// Rows of k and v, or of the page table.
inline int64_t cache_rows(const AttentionProblem& problem) {
  return problem.cache_batch > 0 ? problem.cache_batch : problem.batch;
}

}  // namespace heed
