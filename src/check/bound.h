// The judge: results of a run against the double-precision reference, within the error bound of docs/conventions.md,
// section 6. Host memory only.
#pragma once

#include <vector>

#include "heed/check.h"
#include "ops/attention.h"
#include "ops/kv_append.h"

namespace heed::check {

struct Report {
  std::vector<heed_check_tensor> tensors;
  bool passed() const {
    for (const heed_check_tensor& tensor : tensors) {
      if (tensor.passed == 0) return false;
    }
    return true;
  }
};

// Problems above this many operations (forward) are judged on a sample: seeded rows, and every kind of edge.
constexpr double kWholeFlops = 2e9;

Report judge_attention(const AttentionProblem& problem, const AttentionArgs& args);
Report judge_kv_append(const KvAppendProblem& before_problem, const KvAppendArgs& before,
                       const KvAppendProblem& after_problem, const KvAppendArgs& after);

}  // namespace heed::check
