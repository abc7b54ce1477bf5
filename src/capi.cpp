// The C interface's core: status text, configuration, problems, plans, verdicts. Struct in, status out.
#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "base/config.h"
#include "base/log.h"
#include "base/threads.h"
#include "capi_error.h"
#include "capi_handles.h"
#include "capi_run.h"
#include "cuda/nvrtc.h"
#include "ops/problem_line.h"
#include "plan/planner.h"
#include "plan/registry.h"

namespace heed {
namespace {

// Per-thread text without a destructor: threads may use it until their last instruction, and storing it cannot fail.
using TextBuffer = std::array<char, 2048>;
thread_local TextBuffer last_error = {};
thread_local TextBuffer verdict_reason = {};

void store(TextBuffer& buffer, std::string_view text) {
  constexpr std::string_view kCut = "...";
  const size_t length = std::min(text.size(), buffer.size() - 1);
  std::memcpy(buffer.data(), text.data(), length);
  if (length < text.size()) std::memcpy(buffer.data() + length - kCut.size(), kCut.data(), kCut.size());
  buffer[length] = '\0';
}

template <class Problem>
using PlanPointer = std::shared_ptr<const Plan<Problem>>;

Status missing(std::string_view name) { return invalid_argument(heed::format("{} = NULL: must be an address", name)); }

// visit(problem) for whatever op it is of.
template <class Visit>
auto with_problem(const heed_problem* problem, Visit visit) {
  return std::visit(visit, problem->problem);
}

}  // namespace

heed_status report(StatusCode code, std::string_view message) noexcept {
  if (code == StatusCode::kOk) {
    last_error[0] = '\0';
  } else {
    store(last_error, message);
    if (log_enabled(HEED_LOG_ERROR)) {
      try {
        log_message(HEED_LOG_ERROR, std::string(message));
      } catch (...) {  // no memory for the log's copy: the caller still has the status
      }
    }
  }
  return static_cast<heed_status>(code);
}

Status copy_text(std::string_view text, char* buffer, size_t buffer_bytes, size_t* needed) {
  if (buffer == nullptr && buffer_bytes > 0) {
    return invalid_argument(heed::format("buffer = NULL: must be an address with buffer_bytes = {}", buffer_bytes));
  }
  if (needed != nullptr) *needed = text.size() + 1;
  if (buffer_bytes > 0) {
    const size_t length = std::min(text.size(), buffer_bytes - 1);
    std::memcpy(buffer, text.data(), length);
    buffer[length] = '\0';
  }
  return {};
}

Status differs(const std::string& planned_line, const std::string& asked_line) {
  const auto fields = [](std::string_view line) {
    std::vector<std::string_view> list;
    while (!line.empty()) {
      const size_t end = std::min(line.find(' '), line.size());
      if (end > 0) list.push_back(line.substr(0, end));
      line.remove_prefix(std::min(end + 1, line.size()));
    }
    return list;
  };
  // A field that one line has and the other has not, of this side; threads are no difference.
  const auto only_in = [](const std::vector<std::string_view>& here, const std::vector<std::string_view>& there) {
    for (const std::string_view field : here) {
      if (!field.starts_with("threads=") && std::find(there.begin(), there.end(), field) == there.end()) return field;
    }
    return std::string_view();
  };
  const auto planned = fields(planned_line), asked = fields(asked_line);
  const std::string_view in_plan = only_in(planned, asked), in_args = only_in(asked, planned);
  std::string text = "args: pose another problem than the plan's";
  if (!in_args.empty()) text += heed::format("; `{}` is in theirs only", in_args);
  if (!in_plan.empty()) text += heed::format("; `{}` is in the plan's only", in_plan);
  return invalid_argument(heed::format("{} (args: \"{}\"; plan: \"{}\")", text, asked_line, planned_line));
}

Status read_backend(const heed_plan_options* options, std::string_view& backend) {
  backend = {};
  if (options == nullptr) return {};
  HEED_RETURN_IF_ERROR(check_struct(options, "options"));
  if (options->backend != nullptr) backend = options->backend;
  return {};
}

}  // namespace heed

using heed::guarded;
using heed::Status;

extern "C" {

int32_t heed_abi_version(void) { return HEED_ABI_VERSION; }
const char* heed_version(void) { return HEED_VERSION; }
const char* heed_last_error(void) { return heed::last_error.data(); }

const char* heed_status_name(heed_status status) {
  switch (status) {
    case HEED_OK: return "ok";
    case HEED_INVALID_ARGUMENT: return "invalid_argument";
    case HEED_NOT_SUPPORTED: return "not_supported";
    case HEED_NOT_FOUND: return "not_found";
    case HEED_OUT_OF_MEMORY: return "out_of_memory";
    case HEED_INITIALIZATION_FAILED: return "initialization_failed";
    case HEED_OPERATION_FAILED: return "operation_failed";
    default: return "unknown";
  }
}

const char* heed_dtype_name(heed_dtype dtype) {
  return heed::dtype_name(static_cast<heed::Dtype>(dtype)).data();  // string literals: terminated
}

size_t heed_dtype_bytes(heed_dtype dtype) {
  return static_cast<size_t>(heed::dtype_bytes(static_cast<heed::Dtype>(dtype)));
}

int32_t heed_config_count(void) { return static_cast<int32_t>(heed::config_entries().size()); }

heed_status heed_config_get(int32_t index, heed_config_entry* entry) {
  return guarded([&]() -> Status {
    const auto entries = heed::config_entries();
    if (index < 0 || static_cast<size_t>(index) >= entries.size()) {
      return heed::invalid_argument(heed::format("index = {}: must be from 0 to {}", index, entries.size() - 1));
    }
    const heed::ConfigEntry& from = entries[static_cast<size_t>(index)];
    return heed::fill_struct(entry, "entry",
                             {0, from.name, from.value.c_str(), from.default_value, from.help, from.is_set, 0});
  });
}

heed_status heed_set_log(heed_log_fn callback, void* context, int32_t level) {
  return guarded([&]() -> Status {
    if (level < HEED_LOG_ERROR || level > HEED_LOG_DEBUG) {
      return heed::invalid_argument(heed::format("level = {}: must be from 0 (error) to 3 (debug)", level));
    }
    heed::set_log(callback, context, level);
    return {};
  });
}

heed_status heed_set_nvrtc_folder(const char* folder) {
  return guarded([&]() -> Status { return heed::cuda::set_nvrtc_folder(folder == nullptr ? "" : folder); });
}

const heed_executor* heed_executor_pool(void) { return &heed::pool_executor(); }
const heed_executor* heed_executor_serial(void) { return &heed::serial_executor(); }

heed_status heed_problem_parse(const char* line, heed_problem** problem) {
  return guarded([&]() -> Status {
    if (line == nullptr) return heed::missing("line");
    if (problem == nullptr) return heed::missing("problem");
    heed::Result<heed::ProblemLine> parsed = heed::parse_problem_line(line);
    if (!parsed.ok()) return parsed.status();
    *problem = new heed_problem{std::move(parsed).value().problem};
    return {};
  });
}

heed_status heed_problem_print(const heed_problem* problem, char* buffer, size_t buffer_bytes, size_t* needed) {
  return guarded([&]() -> Status {
    if (problem == nullptr) return heed::missing("problem");
    const std::string text = heed::with_problem(problem, [](const auto& p) { return to_string(p); });
    return heed::copy_text(text, buffer, buffer_bytes, needed);
  });
}

const char* heed_problem_op(const heed_problem* problem) {
  if (problem == nullptr) return "";
  return std::holds_alternative<heed::AttentionProblem>(problem->problem) ? "attention" : "kv_append";
}

double heed_problem_flops(const heed_problem* problem) {
  return problem == nullptr ? 0.0 : heed::with_problem(problem, [](const auto& p) { return flops(p); });
}

double heed_problem_bytes(const heed_problem* problem) {
  return problem == nullptr ? 0.0 : heed::with_problem(problem, [](const auto& p) { return bytes(p); });
}

void heed_problem_destroy(heed_problem* problem) { delete problem; }

heed_status heed_plan_create(const heed_problem* problem, const heed_plan_options* options, heed_plan** plan) {
  return guarded([&]() -> Status {
    if (problem == nullptr) return heed::missing("problem");
    if (plan == nullptr) return heed::missing("plan");
    std::string_view backend;
    HEED_RETURN_IF_ERROR(heed::read_backend(options, backend));
    return heed::with_problem(problem, [&](const auto& p) -> Status {
      auto made = heed::make_plan(p, backend);
      if (!made.ok()) return made.status();
      *plan = new heed_plan{std::move(made).value()};
      return {};
    });
  });
}

void heed_plan_destroy(heed_plan* plan) { delete plan; }

size_t heed_plan_workspace_bytes(const heed_plan* plan) {
  return plan == nullptr ? 0 : std::visit([](const auto& p) { return p->workspace_bytes; }, plan->plan);
}

const char* heed_plan_impl(const heed_plan* plan) {
  return plan == nullptr ? "" : std::visit([](const auto& p) { return p->impl->name.data(); }, plan->plan);
}

heed_status heed_plan_print(const heed_plan* plan, char* buffer, size_t buffer_bytes, size_t* needed) {
  return guarded([&]() -> Status {
    if (plan == nullptr) return heed::missing("plan");
    const std::string text = std::visit([](const auto& p) { return to_string(*p); }, plan->plan);
    return heed::copy_text(text, buffer, buffer_bytes, needed);
  });
}

int32_t heed_verdict_count(const heed_problem* problem) {
  if (problem == nullptr) return 0;
  return heed::with_problem(
      problem, []<class Problem>(const Problem&) { return static_cast<int32_t>(heed::impls<Problem>().size()); });
}

heed_status heed_verdict_get(const heed_problem* problem, const heed_plan_options* options, int32_t index,
                             heed_verdict* verdict) {
  return guarded([&]() -> Status {
    if (problem == nullptr) return heed::missing("problem");
    std::string_view backend;
    HEED_RETURN_IF_ERROR(heed::read_backend(options, backend));
    const int32_t count = heed_verdict_count(problem);
    if (index < 0 || index >= count) {
      return heed::invalid_argument(heed::format("index = {}: must be from 0 to {}", index, count - 1));
    }
    return heed::with_problem(problem, [&](const auto& p) -> Status {
      auto candidates = heed::judge(p, backend);
      if (!candidates.ok()) return candidates.status();
      const auto& candidate = candidates.value()[static_cast<size_t>(index)];
      heed::store(heed::verdict_reason, candidate.verdict.reason);
      return heed::fill_struct(verdict, "verdict",
                               {0, candidate.impl->name.data(), candidate.verdict.accepted, candidate.chosen,
                                heed::verdict_reason.data(), candidate.cost_us});
    });
  });
}

heed_status heed_explain(const heed_problem* problem, const heed_plan_options* options, char* buffer,
                         size_t buffer_bytes, size_t* needed) {
  return guarded([&]() -> Status {
    if (problem == nullptr) return heed::missing("problem");
    std::string_view backend;
    HEED_RETURN_IF_ERROR(heed::read_backend(options, backend));
    const std::string text = heed::with_problem(problem, [&](const auto& p) { return heed::explain(p, backend); });
    return heed::copy_text(text, buffer, buffer_bytes, needed);
  });
}

heed_status heed_plan_cache_get(heed_plan_cache_stats* stats) {
  return guarded([&]() -> Status {
    const heed::PlanCacheStats now = heed::plan_cache_stats();
    return heed::fill_struct(stats, "stats", {0, now.hits, now.misses, now.entries, now.capacity});
  });
}

void heed_plan_cache_clear(void) {
  guarded([&]() -> Status {
    heed::plan_cache_clear();
    return {};
  });
}

}  // extern "C"
