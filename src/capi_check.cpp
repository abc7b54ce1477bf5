// heed/check.h: inputs for a problem line, and the judge.
#include <algorithm>
#include <optional>

#include "capi_args.h"
#include "capi_error.h"
#include "capi_handles.h"
#include "check/bound.h"
#include "check/host_copies.h"
#include "check/inputs.h"
#include "heed/check.h"

struct heed_inputs {
  heed::check::Inputs inputs;
  heed_problem problem;
  std::optional<heed::check::Expected> expected;
};

using heed::guarded;
using heed::Result;
using heed::Status;

namespace {

Status missing(const char* name) { return heed::invalid_argument(heed::format("{} = NULL: must be an address", name)); }

// Judged by C++ code, handed to C. What is not in the caller's struct, struct_size, stays the caller's.
Status fill_report(const heed::check::Report& judged, heed_check_report* report) {
  heed_check_report result = {};
  result.passed = judged.passed();
  result.num_tensors = static_cast<int32_t>(std::min<size_t>(judged.tensors.size(), HEED_CHECK_MAX_TENSORS));
  for (int32_t n = 0; n < result.num_tensors; ++n) result.tensors[n] = judged.tensors[n];
  return heed::fill_struct(report, "report", result);
}

// `expected`: where the reference's results are kept; null where they are not.
Status check_attention(const heed_attention_args* args, const char* call,
                       std::optional<heed::check::Expected>* expected, heed_check_report* report) {
  if (report == nullptr) return missing("report");
  HEED_RETURN_IF_ERROR(heed::check_struct(report, "report"));
  Result<heed_attention_args> read = heed::read_args(args);
  if (!read.ok()) return read.status();
  const Result<heed::AttentionProblem> problem = heed::problem_of(read.value());
  if (!problem.ok()) return problem.status();
  heed::check::HostCopies copies;
  HEED_RETURN_IF_ERROR(copies.all(read.value(), problem.value().device_index, call));
  const heed::AttentionArgs run_args = heed::args_of(read.value(), problem.value());
  HEED_RETURN_IF_ERROR(heed::validate(problem.value(), run_args, run_args.workspace_bytes));
  return fill_report(heed::check::judge_attention(problem.value(), run_args, expected), report);
}

}  // namespace

extern "C" {

heed_status heed_inputs_create(const char* line, heed_inputs** inputs) {
  return guarded([&]() -> Status {
    if (line == nullptr) return missing("line");
    if (inputs == nullptr) return missing("inputs");
    auto made = std::make_unique<heed_inputs>();
    HEED_RETURN_IF_ERROR(heed::check::make_inputs(line, made->inputs));
    made->problem.problem = made->inputs.problem;
    *inputs = made.release();
    return {};
  });
}

heed_attention_args* heed_inputs_attention(heed_inputs* inputs) {
  return inputs != nullptr && inputs->inputs.is_attention ? &inputs->inputs.attention : nullptr;
}

heed_kv_append_args* heed_inputs_kv_append(heed_inputs* inputs) {
  return inputs != nullptr && !inputs->inputs.is_attention ? &inputs->inputs.kv_append : nullptr;
}

const heed_problem* heed_inputs_problem(const heed_inputs* inputs) {
  return inputs != nullptr ? &inputs->problem : nullptr;
}

heed_status heed_inputs_poison(heed_inputs* inputs) {
  return guarded([&]() -> Status {
    if (inputs == nullptr) return missing("inputs");
    for (heed::check::GuardedTensor& tensor : inputs->inputs.tensors) HEED_RETURN_IF_ERROR(tensor.poison());
    return {};
  });
}

heed_status heed_inputs_check_guards(const heed_inputs* inputs) {
  return guarded([&]() -> Status {
    if (inputs == nullptr) return missing("inputs");
    for (const heed::check::GuardedTensor& tensor : inputs->inputs.tensors) HEED_RETURN_IF_ERROR(tensor.check());
    return {};
  });
}

void heed_inputs_destroy(heed_inputs* inputs) { delete inputs; }

heed_status heed_attention_check(const heed_attention_args* args, heed_check_report* report) {
  return guarded([&] { return check_attention(args, "heed_attention_check", nullptr, report); });
}

heed_status heed_inputs_check(heed_inputs* inputs, heed_check_report* report) {
  return guarded([&]() -> Status {
    if (inputs == nullptr) return missing("inputs");
    if (!inputs->inputs.is_attention)
      return heed::invalid_argument("inputs: must be of an attention line; kv_append's are for heed_kv_append_check");
    return check_attention(&inputs->inputs.attention, "heed_inputs_check", &inputs->expected, report);
  });
}

heed_status heed_kv_append_check(const heed_kv_append_args* before, const heed_kv_append_args* after,
                                 heed_check_report* report) {
  return guarded([&]() -> Status {
    if (report == nullptr) return missing("report");
    HEED_RETURN_IF_ERROR(heed::check_struct(report, "report"));
    heed::KvAppendProblem problems[2];
    heed::KvAppendArgs run_args[2];
    heed::check::HostCopies copies;
    for (int n = 0; n < 2; ++n) {
      Result<heed_kv_append_args> read = heed::read_args(n == 0 ? before : after);
      if (!read.ok()) return read.status();
      const Result<heed::KvAppendProblem> problem = heed::problem_of(read.value());
      if (!problem.ok()) return problem.status();
      problems[n] = problem.value();
      HEED_RETURN_IF_ERROR(copies.all(read.value(), problems[n].device_index, "heed_kv_append_check"));
      run_args[n] = heed::args_of(read.value(), problem.value());
      HEED_RETURN_IF_ERROR(heed::validate(problems[n], run_args[n], run_args[n].workspace_bytes));
    }
    for (int slot = 0; slot < heed::kNumKvSlots; ++slot) {
      const auto which = static_cast<heed::KvSlot>(slot);
      if (heed::slot_shape(problems[0], which) != heed::slot_shape(problems[1], which)) {
        return heed::invalid_argument(
            heed::format("after.{}: must have the shape that it has in before", slot_name(which)));
      }
    }
    return fill_report(heed::check::judge_kv_append(problems[0], run_args[0], problems[1], run_args[1]), report);
  });
}

}  // extern "C"
