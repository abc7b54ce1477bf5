// The judge: results of a run against the double-precision reference, within the error bound of docs/conventions.md,
// section 6. Host memory only.
#pragma once

#include <optional>
#include <vector>

#include "check/fingerprint.h"
#include "heed/check.h"
#include "ops/attention.h"
#include "ops/kv_append.h"
#include "ref/attention.h"

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

// What a problem's reference and plain formula give, in the order in which they are compared: most of the judge's work.
struct Expected {
  bool complete = false;
  Fingerprint of = {};
  std::vector<double> want;
  std::vector<float> plain;
  ref::Magnitudes magnitudes;
  ref::SummedGradients<double> sums;
  ref::SummedGradients<float> plain_sums;
  explicit Expected(const AttentionProblem& problem) : sums(problem), plain_sums(problem) {}
};

// `kept`: what an earlier call has left there counts again where it is of the same problem, numbers and contents; else it is worked out
// anew and, where it is not too much, left there.
Report judge_attention(const AttentionProblem& problem, const AttentionArgs& args,
                       std::optional<Expected>* kept = nullptr);
Report judge_kv_append(const KvAppendProblem& before_problem, const KvAppendArgs& before,
                       const KvAppendProblem& after_problem, const KvAppendArgs& after);

}  // namespace heed::check
