#include "plan/planner.h"

#include <algorithm>

#include "base/config.h"
#include "base/format.h"
#include "base/log.h"
#include "base/threads.h"
#include "plan/registry.h"

namespace heed {
namespace {

template <class Problem>
constexpr std::string_view kOpName = "attention";
template <>
constexpr std::string_view kOpName<KvAppendProblem> = "kv_append";

// "cpu" names every row of that folder, "cpu/kv_append" one row.
bool names(std::string_view backend, std::string_view row) {
  return row == backend || (row.starts_with(backend) && row.substr(backend.size()).starts_with('/'));
}

template <class Problem>
bool any_row(std::string_view backend) {
  const auto rows = impls<Problem>();
  return std::any_of(rows.begin(), rows.end(), [&](const auto* row) { return names(backend, row->name); });
}

template <class Problem>
std::string row_names() {
  std::string text;
  for (const Impl<Problem>* row : impls<Problem>()) text += (text.empty() ? "" : ", ") + std::string(row->name);
  return text;
}

// What is forced: the caller's word, else HEED_BACKEND's.
struct Forced {
  std::string_view backend;
  std::string_view said_by;  // for messages
};

Forced forced_by(std::string_view backend) {
  if (!backend.empty()) return {backend, "backend"};
  return {config().backend, "HEED_BACKEND"};
}

template <class Problem>
Status unknown_backend(const Forced& forced) {
  if (any_row<AttentionProblem>(forced.backend) || any_row<KvAppendProblem>(forced.backend)) {
    return not_supported(heed::format("{} = \"{}\": that backend does not do {}; one of {} does", forced.said_by,
                                      forced.backend, kOpName<Problem>, row_names<Problem>()));
  }
  return not_found(heed::format("{} = \"{}\": no such backend; it must be a folder (cpu, ref) or one of {}",
                                forced.said_by, forced.backend, row_names<Problem>()));
}

template <class Problem>
Problem with_threads(Problem problem) {
  if (problem.device == Device::kCpu && problem.threads <= 0) problem.threads = pool_executor().num_threads;
  return problem;
}

template <class Problem>
Verdict verdict_of(const Impl<Problem>& row, const Problem& problem, const Forced& forced) {
  if (!forced.backend.empty() && !names(forced.backend, row.name)) {
    return decline(heed::format("not asked: {} = \"{}\"", forced.said_by, forced.backend));
  }
  if (forced.backend.empty() && row.only_forced) {
    return decline(
        heed::format("runs only when forced (backend \"{}\"): it is the yardstick, not a fallback", row.name));
  }
  return row.check(problem, machine());
}

template <class Problem>
Candidate<Problem>* chosen_of(std::vector<Candidate<Problem>>& candidates) {
  const auto it = std::find_if(candidates.begin(), candidates.end(), [](const auto& c) { return c.chosen; });
  return it == candidates.end() ? nullptr : &*it;
}

// Why nothing does it: each reason once, with the rows that give it.
template <class Problem>
Status nothing_accepts(const Problem& problem, const Forced& forced,
                       const std::vector<Candidate<Problem>>& candidates) {
  std::vector<std::pair<std::string, std::string>> reasons;  // sentence, rows
  for (const Candidate<Problem>& candidate : candidates) {
    const Impl<Problem>& row = *candidate.impl;
    if (forced.backend.empty() ? row.only_forced : !names(forced.backend, row.name)) continue;
    const auto same = std::find_if(reasons.begin(), reasons.end(),
                                   [&](const auto& reason) { return reason.first == candidate.verdict.reason; });
    if (same == reasons.end()) {
      reasons.emplace_back(candidate.verdict.reason, row.name);
    } else {
      same->second += ", " + std::string(row.name);
    }
  }
  std::string text = forced.backend.empty() ? heed::format("no backend does \"{}\"", to_string(problem))
                                            : heed::format("{} = \"{}\" does not do \"{}\"", forced.said_by,
                                                           forced.backend, to_string(problem));
  for (const auto& [sentence, rows] : reasons) text += heed::format("; {}: {}", rows, sentence);
  for (const Impl<Problem>* row : impls<Problem>()) {
    if (forced.backend.empty() && row->only_forced && row->check(problem, machine()).accepted) {
      text += heed::format("; nearest: {} does it when forced", row->name);
    }
  }
  return not_supported(std::move(text));
}

template <class Problem>
Result<std::shared_ptr<const Plan<Problem>>> plan_of(const Problem& problem, const Forced& forced,
                                                     std::vector<Candidate<Problem>>& candidates) {
  const Candidate<Problem>* const chosen = chosen_of(candidates);
  if (chosen == nullptr) return nothing_accepts(problem, forced, candidates);
  auto plan = std::make_shared<Plan<Problem>>();
  plan->problem = problem;
  plan->impl = chosen->impl;
  HEED_RETURN_IF_ERROR(chosen->impl->prepare(problem, machine(), *plan));
  if (log_enabled(HEED_LOG_DEBUG)) {
    log_message(HEED_LOG_DEBUG, heed::format("planned \"{}\": {}", to_string(problem), plan->impl->name));
  }
  return std::shared_ptr<const Plan<Problem>>(std::move(plan));
}

std::string amount(double value, std::string_view unit) {
  constexpr std::string_view kPrefixes[] = {"", "k", "M", "G", "T", "P"};
  size_t prefix = 0;
  for (; value >= 1000 && prefix + 1 < std::size(kPrefixes); ++prefix) value /= 1000;
  return heed::format("{:.3g} {}{}", value, kPrefixes[prefix], unit);
}

}  // namespace

template <class Problem>
Result<std::vector<Candidate<Problem>>> judge(const Problem& asked, std::string_view backend) {
  HEED_RETURN_IF_ERROR(validate(asked));
  const Problem problem = with_threads(asked);
  const Forced forced = forced_by(backend);
  if (!forced.backend.empty() && !any_row<Problem>(forced.backend)) return unknown_backend<Problem>(forced);

  std::vector<Candidate<Problem>> candidates;
  candidates.reserve(impls<Problem>().size());
  size_t best = impls<Problem>().size();
  for (const Impl<Problem>* row : impls<Problem>()) {
    Candidate<Problem> candidate{row, verdict_of(*row, problem, forced), -1.0, false};
    if (candidate.verdict.accepted) {
      candidate.cost_us = row->cost_us(problem, machine());
      if (best == impls<Problem>().size() || candidate.cost_us < candidates[best].cost_us) best = candidates.size();
    }
    candidates.push_back(std::move(candidate));
  }
  if (best < candidates.size()) candidates[best].chosen = true;
  return candidates;
}

template <class Problem>
Result<std::shared_ptr<const Plan<Problem>>> make_plan(const Problem& problem, std::string_view backend) {
  Result<std::vector<Candidate<Problem>>> candidates = judge(problem, backend);
  if (!candidates.ok()) return candidates.status();
  return plan_of(with_threads(problem), forced_by(backend), candidates.value());
}

template <class Problem>
std::string to_string(const Plan<Problem>& plan) {
  std::string text =
      heed::format("{} · {} thread{} · workspace {}\n", plan.impl->name, plan.problem.threads,
                   plan.problem.threads == 1 ? "" : "s", amount(static_cast<double>(plan.workspace_bytes), "B"));
  for (size_t i = 0; i < plan.steps.size(); ++i) {
    const Step<Problem>& step = plan.steps[i];
    text += heed::format("  step {}: {} · {} unit{} of work · scratch {} per worker · workspace {} at {}\n", i + 1,
                         step.kernel, step.grid, step.grid == 1 ? "" : "s",
                         amount(static_cast<double>(step.scratch_bytes), "B"),
                         amount(static_cast<double>(step.workspace_bytes), "B"), step.workspace_offset);
  }
  return text;
}

template <class Problem>
std::string explain(const Problem& asked, std::string_view backend) {
  const Problem problem = with_threads(asked);
  std::string text = heed::format("problem   {}\n", to_string(problem));
  Result<std::vector<Candidate<Problem>>> candidates = judge(problem, backend);
  if (!candidates.ok()) return text + heed::format("error     {}\n", candidates.status().message());

  const double work = flops(problem), moved = bytes(problem);
  text += heed::format("work      {}, {} read and written once", amount(work, "FLOP"), amount(moved, "B"));
  if (moved > 0) text += heed::format(": {:.3g} FLOP per byte", work / moved);
  text += "\nbackends\n";
  size_t width = 0;
  for (const Candidate<Problem>& candidate : candidates.value()) width = std::max(width, candidate.impl->name.size());
  for (const Candidate<Problem>& candidate : candidates.value()) {
    std::string says = candidate.verdict.reason;
    if (candidate.verdict.accepted) {
      says = heed::format("about {:.4g} us{}{}", candidate.cost_us, says.empty() ? "" : "; ", says);
    }
    text += heed::format("  {} {:<{}}  {:<3}  {}\n", candidate.chosen ? '>' : ' ', candidate.impl->name, width,
                         candidate.verdict.accepted ? "yes" : "no", says);
  }
  const auto plan = plan_of(problem, forced_by(backend), candidates.value());
  if (!plan.ok()) return text + heed::format("error     {}\n", plan.status().message());
  return text + "plan      " + to_string(*plan.value());
}

template <class Problem>
Status run(const Plan<Problem>& plan, const typename ArgsOf<Problem>::type& args) {
  HEED_RETURN_IF_ERROR(validate(plan.problem, args, plan.workspace_bytes));
  for (const Step<Problem>& step : plan.steps) HEED_RETURN_IF_ERROR(step.run(plan, step, args));
  return {};
}

#define HEED_INSTANTIATE(Problem)                                                                    \
  template Result<std::vector<Candidate<Problem>>> judge(const Problem&, std::string_view);          \
  template Result<std::shared_ptr<const Plan<Problem>>> make_plan(const Problem&, std::string_view); \
  template std::string to_string(const Plan<Problem>&);                                              \
  template std::string explain(const Problem&, std::string_view);                                    \
  template Status run(const Plan<Problem>&, const typename ArgsOf<Problem>::type&);
HEED_INSTANTIATE(AttentionProblem)
HEED_INSTANTIATE(KvAppendProblem)
#undef HEED_INSTANTIATE

}  // namespace heed
