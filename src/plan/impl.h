// An Impl is one row of the registry: one way to do a Problem. Backends define rows; they see this header and nothing
// else of plan/.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/machine.h"
#include "base/status.h"
#include "ops/attention.h"
#include "ops/kv_append.h"

namespace heed {

template <class Problem>
struct ArgsOf;
template <>
struct ArgsOf<AttentionProblem> {
  using type = AttentionArgs;
};
template <>
struct ArgsOf<KvAppendProblem> {
  using type = KvAppendArgs;
};

// Yes, or no with a sentence, given at the line that declines.
struct [[nodiscard]] Verdict {
  bool accepted = false;
  std::string
      reason;  // why not, in a sentence that names the nearest that would do; or a remark on how it will be done
};
inline Verdict accept(std::string remark = {}) { return {true, std::move(remark)}; }
inline Verdict decline(std::string reason) { return {false, std::move(reason)}; }

template <class Problem>
struct Plan;

// One launch of one kernel.
template <class Problem>
struct Step {
  using Args = typename ArgsOf<Problem>::type;
  std::string kernel;  // what explain prints: "attention_fwd avx512 q64 k128"
  Status (*run)(const Plan<Problem>& plan, const Step& step, const Args& args) = nullptr;
  int64_t grid = 0;             // units of work at capacity
  size_t scratch_bytes = 0;     // GPU: shared memory of a block; CPU: scratch of one worker, inside the workspace
  size_t workspace_offset = 0;  // this step's slice
  size_t workspace_bytes = 0;
  std::shared_ptr<const void> params;  // the backend's own parameter block
};

template <class Problem>
struct Impl;

// Immutable once prepared; owns no mutable memory.
template <class Problem>
struct Plan {
  Problem problem;  // threads resolved
  const Impl<Problem>* impl = nullptr;
  std::vector<Step<Problem>> steps;
  size_t workspace_bytes = 0;
};

template <class Problem>
struct Impl {
  std::string_view name;     // "cpu/attention_fwd_avx512"
  std::string_view summary;  // one line for `heed info` and the support table
  bool only_forced = false;  // the reference: never chosen by the planner itself
  Verdict (*check)(const Problem& problem, const Machine& machine) = nullptr;
  double (*cost_us)(const Problem& problem, const Machine& machine) = nullptr;
  Status (*prepare)(const Problem& problem, const Machine& machine,
                    Plan<Problem>& plan) = nullptr;  // fills steps, workspace
};

}  // namespace heed
