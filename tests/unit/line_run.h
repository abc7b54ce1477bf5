// One problem line, run by a row of the registry through the C interface and judged against the reference.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "heed/heed.h"

namespace heed::testing {

// ---- executors: results must not depend on who runs the tasks, when, or where ----------------------

// One thread that says it is `threads`, and does the tasks last to first.
inline void run_reversed(void*, int32_t num_tasks, void (*task)(void*, int32_t), void* argument) {
  for (int32_t i = num_tasks; i > 0; --i) task(argument, i - 1);
}

// `threads` threads, made for the occasion.
inline void run_threaded(void* context, int32_t num_tasks, void (*task)(void*, int32_t), void* argument) {
  std::atomic<int32_t> next{0};
  const auto work = [&] {
    for (int32_t i = next++; i < num_tasks; i = next++) task(argument, i);
  };
  std::vector<std::thread> workers;
  for (int32_t n = 1; n < *static_cast<int32_t*>(context); ++n) workers.emplace_back(work);
  work();
  for (std::thread& worker : workers) worker.join();
}

struct TestExecutor {
  explicit TestExecutor(int32_t num_threads, bool threaded) : threads(num_threads) {
    executor = {sizeof(heed_executor), &threads, num_threads, 0, threaded ? run_threaded : run_reversed};
  }
  TestExecutor(const TestExecutor&) = delete;
  int32_t threads;
  heed_executor executor;
};

// ---- memory of exactly the bytes asked for, guarded on both sides ----------------------------------

class GuardedWorkspace {
 public:
  GuardedWorkspace(size_t bytes, unsigned char fill) : bytes_(bytes), storage_(bytes + 2 * kGuard + 64, kPattern) {
    base_ = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(storage_.data()) + kGuard + 63) / 64 * 64);
    std::memset(base_, fill, bytes);  // stale or fresh memory must not matter
  }
  void* data() const { return bytes_ > 0 ? base_ : nullptr; }
  size_t bytes() const { return bytes_; }
  bool intact() const {
    for (const unsigned char* p = storage_.data(); p < storage_.data() + storage_.size(); ++p) {
      if ((p < base_ || p >= base_ + bytes_) && *p != kPattern) return false;
    }
    return true;
  }

 private:
  static constexpr size_t kGuard = 256;
  static constexpr unsigned char kPattern = 0x5c;
  size_t bytes_;
  std::vector<unsigned char> storage_;
  unsigned char* base_ = nullptr;
};

// ---- one line --------------------------------------------------------------------------------------

struct PlanDeleter {
  void operator()(heed_plan* plan) const { heed_plan_destroy(plan); }
};
struct ProblemDeleter {
  void operator()(heed_problem* problem) const { heed_problem_destroy(problem); }
};
struct InputsDeleter {
  void operator()(heed_inputs* inputs) const { heed_inputs_destroy(inputs); }
};

inline std::string last_error(const char* what) { return std::string(what) + ": " + heed_last_error(); }

// A number that is other than the line says while the run lasts: bad data.
struct Poke {
  int32_t* address;
  int32_t value;
};

// How a run is carried out: none of it may show in the result.
struct RunStyle {
  const heed_executor* executor = nullptr;   // NULL: heed's pool
  int32_t threads = 0;
  unsigned char workspace_fill = 0xff;
};

class LineRun {
 public:
  explicit LineRun(std::string line) : line_(std::move(line)) {
    heed_inputs* inputs = nullptr;
    if (heed_inputs_create(line_.c_str(), &inputs) != HEED_OK) {
      error_ = last_error("inputs");
      return;
    }
    inputs_.reset(inputs);
    attention_ = heed_inputs_attention(inputs);
    if (attention_ == nullptr) kv_append_ = heed_inputs_kv_append(inputs);
  }

  const std::string& error() const { return error_; }
  heed_attention_args* attention() { return attention_; }
  heed_kv_append_args* kv_append() { return kv_append_; }

  // Names of the rows that accept the line, in the registry's order.
  std::vector<std::string> accepting() {
    std::vector<std::string> names;
    const std::unique_ptr<heed_problem, ProblemDeleter> problem = pose();
    if (problem == nullptr) return names;
    for (int32_t i = 0; i < heed_verdict_count(problem.get()); ++i) {
      heed_verdict verdict = {};
      verdict.struct_size = sizeof verdict;
      heed_status status = heed_verdict_get(problem.get(), nullptr, i, &verdict);
      if (status == HEED_OK && std::string_view(verdict.impl).starts_with("ref/")) {  // it has to be asked for
        const heed_plan_options options = {sizeof(heed_plan_options), verdict.impl};
        status = heed_verdict_get(problem.get(), &options, i, &verdict);
      }
      if (status != HEED_OK) {
        error_ = last_error("verdict");
        return {};
      }
      if (verdict.accepted != 0) names.emplace_back(verdict.impl);
    }
    return names;
  }

  // Poisons the outputs, runs, looks at the guards. Empty, or what went wrong.
  std::string run(const std::string& impl, const RunStyle& style, const std::vector<Poke>& pokes = {}) {
    const int32_t own_threads = attention_ != nullptr ? attention_->num_threads : kv_append_->num_threads;
    set_style(style.executor, style.threads > 0 ? style.threads : own_threads);
    const std::string failure = run_styled(impl, style, pokes);
    set_style(nullptr, own_threads);
    return failure;
  }

  // Judges what the last run wrote.
  std::string judge() {
    heed_check_report report = {};
    report.struct_size = sizeof report;
    if (attention_ != nullptr) {
      if (heed_attention_check(attention_, &report) != HEED_OK) return last_error("check");
    } else {
      heed_inputs* before = nullptr;
      if (heed_inputs_create(line_.c_str(), &before) != HEED_OK) return last_error("inputs");
      const std::unique_ptr<heed_inputs, InputsDeleter> owner(before);
      const heed_status status = heed_kv_append_check(heed_inputs_kv_append(before), kv_append_, &report);
      if (status != HEED_OK) return last_error("check");
    }
    if (report.passed != 0) return {};
    std::string text;
    for (int32_t i = 0; i < report.num_tensors; ++i) {
      const heed_check_tensor& tensor = report.tensors[i];
      if (tensor.passed == 0) text += std::string(text.empty() ? "" : "; ") + tensor.name + ": " + tensor.reason;
    }
    return text.empty() ? "failed without a reason" : text;
  }

  // Every byte of the outputs, gaps included.
  std::vector<unsigned char> outputs() const {
    std::vector<unsigned char> bytes;
    const auto add = [&](const heed_tensor& tensor) {
      if (tensor.dtype == HEED_DTYPE_NONE || tensor.data == nullptr) return;
      int64_t last = 0;
      for (int32_t dim = 0; dim < tensor.ndim; ++dim) {
        if (tensor.shape[dim] == 0) return;
        last += (tensor.shape[dim] - 1) * tensor.stride[dim];
      }
      const unsigned char* data = static_cast<const unsigned char*>(tensor.data);
      bytes.insert(bytes.end(), data, data + static_cast<size_t>(last + 1) * heed_dtype_bytes(tensor.dtype));
    };
    if (attention_ != nullptr) {
      const heed_attention_args& a = *attention_;
      for (const heed_tensor* tensor : {&a.out, &a.lse, &a.dq, &a.dk, &a.dv, &a.dbias, &a.dsinks, &a.dalibi_slopes,
                                        &a.status}) {
        add(*tensor);
      }
    } else {
      for (const heed_tensor* tensor : {&kv_append_->k_cache, &kv_append_->v_cache, &kv_append_->q_out,
                                        &kv_append_->status}) {
        add(*tensor);
      }
    }
    return bytes;
  }

  size_t workspace_bytes() const { return workspace_bytes_; }

 private:
  void set_style(const heed_executor* executor, int32_t threads) {
    if (attention_ != nullptr) {
      attention_->executor = executor;
      attention_->num_threads = threads;
    } else {
      kv_append_->executor = executor;
      kv_append_->num_threads = threads;
    }
  }

  std::unique_ptr<heed_problem, ProblemDeleter> pose() {
    heed_problem* problem = nullptr;
    const heed_status status = attention_ != nullptr ? heed_attention_problem(attention_, &problem)
                                                     : heed_kv_append_problem(kv_append_, &problem);
    if (status != HEED_OK) error_ = last_error("problem");
    return std::unique_ptr<heed_problem, ProblemDeleter>(problem);
  }

  std::string run_styled(const std::string& impl, const RunStyle& style, std::vector<Poke> pokes) {
    const std::unique_ptr<heed_problem, ProblemDeleter> problem = pose();
    if (problem == nullptr) return error_;
    const heed_plan_options options = {sizeof(heed_plan_options), impl.c_str()};
    heed_plan* made = nullptr;
    if (heed_plan_create(problem.get(), &options, &made) != HEED_OK) return last_error("plan");
    const std::unique_ptr<heed_plan, PlanDeleter> plan(made);
    if (heed_plan_impl(made) != impl) return "plan: forced " + impl + ", got " + heed_plan_impl(made);
    workspace_bytes_ = heed_plan_workspace_bytes(made);
    const GuardedWorkspace workspace(workspace_bytes_, style.workspace_fill);
    if (heed_inputs_poison(inputs_.get()) != HEED_OK) return last_error("poison");
    for (Poke& poke : pokes) std::swap(*poke.address, poke.value);
    heed_status status = HEED_OK;
    if (attention_ != nullptr) {
      attention_->workspace = workspace.data();
      attention_->workspace_bytes = workspace.bytes();
      status = heed_attention_run(made, attention_);
      attention_->workspace = nullptr;
      attention_->workspace_bytes = 0;
    } else {
      kv_append_->workspace = workspace.data();
      kv_append_->workspace_bytes = workspace.bytes();
      status = heed_kv_append_run(made, kv_append_);
      kv_append_->workspace = nullptr;
      kv_append_->workspace_bytes = 0;
    }
    for (auto poke = pokes.rbegin(); poke != pokes.rend(); ++poke) std::swap(*poke->address, poke->value);
    if (status != HEED_OK) return last_error("run");
    if (!workspace.intact()) return "wrote outside the workspace of " + std::to_string(workspace_bytes_) + " bytes";
    if (heed_inputs_check_guards(inputs_.get()) != HEED_OK) return last_error("guards");
    return {};
  }

  std::string line_, error_;
  std::unique_ptr<heed_inputs, InputsDeleter> inputs_;
  heed_attention_args* attention_ = nullptr;
  heed_kv_append_args* kv_append_ = nullptr;
  size_t workspace_bytes_ = 0;
};

}  // namespace heed::testing
