
#include <algorithm>
#include <cmath>

#include "commands.h"
#include "format.h"
#include "job.h"
#include "report.h"

namespace heed::cli {
namespace {

// Which implementations to judge for one problem: the chosen one (""), a forced one, or each that accepts but the
// reference, which is the judge.
std::vector<std::string> impls_to_check(const Job& job, const CheckRequest& request) {
  if (request.impl.empty()) return {request.backend};
  if (request.impl != "all") return {request.impl};
  const ProblemPtr problem = job.problem(request.threads);
  std::vector<std::string> names;
  for (const Verdict& verdict : verdicts(problem.get())) {
    const bool in_backend =
        request.backend.empty() || verdict.impl.starts_with(request.backend + "/") || verdict.impl == request.backend;
    if (verdict.accepted && in_backend && !verdict.impl.starts_with("ref/")) names.push_back(verdict.impl);
  }
  if (names.empty()) throw Failure("no implementation accepts it; `heed explain` says why");
  return names;
}

struct Outcome {
  std::string line, impl, why;
  bool passed = false;
  bool judged = false;
  heed_check_report report = {};
};

Outcome judge(Job& job, const std::string& line, const std::string& backend, int threads) {
  Outcome outcome{line, backend, "", false, false, {}};
  try {
    job.poison();
    const PlannedJob planned(job, backend, threads);
    outcome.impl = planned.impl();
    planned.run();
    job.check_guards();
    outcome.report = job.check();
    outcome.judged = true;
    outcome.passed = outcome.report.passed != 0;
  } catch (const Failure& failure) {
    outcome.why = failure.what();
  }
  return outcome;
}

// The tensor nearest to its bound, or the first that failed.
const heed_check_tensor* worst_tensor(const heed_check_report& report) {
  const heed_check_tensor* worst = nullptr;
  const auto ratio = [](const heed_check_tensor& tensor) {
    const double share = tensor.max_bound > 0 ? tensor.max_error / tensor.max_bound : 0.0;
    return tensor.passed ? share : HUGE_VAL;
  };
  for (int32_t i = 0; i < report.num_tensors; ++i) {
    if (worst == nullptr || ratio(report.tensors[i]) > ratio(*worst)) worst = &report.tensors[i];
  }
  return worst;
}

std::vector<std::string> row(const Outcome& outcome) {
  const heed_check_tensor* worst = outcome.judged ? worst_tensor(outcome.report) : nullptr;
  std::string share = "-", name = "-", why = outcome.why;
  if (worst != nullptr) {
    name = worst->name;
    share = worst->max_bound > 0 ? cli::format("{:.3f}", worst->max_error / worst->max_bound)
                                 : cli::format("{:.3g}/0", worst->max_error);
    why = worst->reason;
  }
  return {outcome.line, outcome.impl.empty() ? "-" : outcome.impl, name, outcome.passed ? "ok" : "FAILED", share, why};
}

std::vector<Outcome> check_line(const std::string& line, const CheckRequest& request) {
  std::vector<Outcome> outcomes;
  try {
    Job job(line);
    for (const std::string& impl : impls_to_check(job, request))
      outcomes.push_back(judge(job, line, impl, request.threads));
  } catch (const Failure& failure) {
    outcomes.push_back({line, "", failure.what(), false, false, {}});
  }
  return outcomes;
}

}  // namespace

int run_check(const CheckRequest& request) {
  std::vector<std::string> lines = problem_lines(request.words);
  for (std::string& line : lines) line = with_device(line, request.device);
  Table table({"problem", "impl", "tensor", "", "error/bound", ""}, 4);
  nlohmann::json rows = nlohmann::json::array();
  Progress progress;
  int passed = 0, failed = 0;
  for (size_t i = 0; i < lines.size(); ++i) {
    progress.show(cli::format("{}/{} {}", i + 1, lines.size(), lines[i]));
    for (const Outcome& outcome : check_line(lines[i], request)) {
      ++(outcome.passed ? passed : failed);
      table.add(row(outcome));
      nlohmann::json json = {
          {"problem", outcome.line}, {"impl", outcome.impl}, {"passed", outcome.passed}, {"reason", outcome.why}};
      if (outcome.judged) json["report"] = check_json(outcome.report);
      rows.push_back(json);
    }
  }
  progress.clear();
  if (request.json) {
    cli::print(
        "{}\n",
        nlohmann::json{{"heed", heed_version()}, {"passed", passed}, {"failed", failed}, {"rows", rows}}.dump(2));
  } else {
    cli::print("{}\n{} passed, {} failed\n", table.text(), passed, failed);
  }
  return failed > 0 ? 1 : 0;
}

}  // namespace heed::cli
