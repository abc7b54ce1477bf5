// From a Problem to a Plan: ask every Impl, keep every Verdict, take the cheapest that accepts, or the one forced.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "plan/impl.h"

namespace heed {

template <class Problem>
struct Candidate {
  const Impl<Problem>* impl = nullptr;
  Verdict verdict;
  double cost_us = -1.0;  // where accepted
  bool chosen = false;
};

// One per registry row, in its order. `backend`: "" (then HEED_BACKEND counts), a folder ("cpu") or a full name.
template <class Problem>
Result<std::vector<Candidate<Problem>>> judge(const Problem& problem, std::string_view backend);

template <class Problem>
Result<std::shared_ptr<const Plan<Problem>>> make_plan(const Problem& problem, std::string_view backend);

// The same through the plan cache (LRU, HEED_PLAN_CACHE entries; key: the problem's bytes and the backend).
template <class Problem>
Result<std::shared_ptr<const Plan<Problem>>> cached_plan(const Problem& problem, std::string_view backend);

struct PlanCacheStats {
  int64_t hits = 0, misses = 0, entries = 0, capacity = 0;
};
PlanCacheStats plan_cache_stats();
void plan_cache_clear();

template <class Problem>
std::string to_string(const Plan<Problem>& plan);
// The problem, flops, bytes, every verdict, the choice and its steps: `heed explain`.
template <class Problem>
std::string explain(const Problem& problem, std::string_view backend);

// Runs the steps in order after validate(problem, args, workspace).
template <class Problem>
Status run(const Plan<Problem>& plan, const typename ArgsOf<Problem>::type& args);

}  // namespace heed
