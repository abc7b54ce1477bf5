// One problem line, run by a row of the registry through the C interface and judged against the reference. On the device
// that the line says: tensors and workspace of a line with device=cuda are in the GPU's memory.
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

struct Place {
  heed_device device = HEED_DEVICE_CPU;
  int32_t index = 0;
};

// What is left of the workspace before a run must not matter. kUnfilled is for a tool that looks for reads of memory
// that nobody has written.
constexpr int kUnfilled = -1;

class GuardedWorkspace {
 public:
  GuardedWorkspace(Place place, size_t bytes, int fill) : place_(place), bytes_(bytes) {
    const size_t all = bytes + 2 * kGuard;  // a multiple of the alignment, so that the workspace is aligned
    if (heed_memory_allocate(place.device, place.index, all, &memory_) != HEED_OK) {
      error_ = std::string("workspace: ") + heed_last_error();
      return;
    }
    unsigned char* const base = static_cast<unsigned char*>(memory_);
    if (heed_memory_fill(place.device, place.index, base, kPattern, kGuard) != HEED_OK ||
        heed_memory_fill(place.device, place.index, base + kGuard + bytes, kPattern, kGuard) != HEED_OK ||
        (fill != kUnfilled && heed_memory_fill(place.device, place.index, base + kGuard, fill, bytes) != HEED_OK)) {
      error_ = std::string("workspace: ") + heed_last_error();
    }
  }
  ~GuardedWorkspace() { heed_memory_free(place_.device, place_.index, memory_); }
  GuardedWorkspace(const GuardedWorkspace&) = delete;
  GuardedWorkspace& operator=(const GuardedWorkspace&) = delete;

  const std::string& error() const { return error_; }
  void* data() const { return bytes_ > 0 ? static_cast<unsigned char*>(memory_) + kGuard : nullptr; }
  size_t bytes() const { return bytes_; }
  bool intact() const { return guard_intact(0) && guard_intact(kGuard + bytes_); }

 private:
  static constexpr size_t kGuard = 256;
  static constexpr unsigned char kPattern = 0x5c;

  bool guard_intact(size_t at) const {
    unsigned char guard[kGuard];
    const unsigned char* const from = static_cast<unsigned char*>(memory_) + at;
    if (heed_memory_copy(guard, HEED_DEVICE_CPU, from, place_.device, place_.index, kGuard) != HEED_OK) return false;
    for (const unsigned char byte : guard) {
      if (byte != kPattern) return false;
    }
    return true;
  }

  Place place_;
  size_t bytes_;
  void* memory_ = nullptr;
  std::string error_;
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

// Bytes from the first to the last element, gaps included; 0 if there is none.
inline size_t span_bytes(const heed_tensor& tensor) {
  if (tensor.dtype == HEED_DTYPE_NONE || tensor.data == nullptr) return 0;
  int64_t last = 0;
  for (int32_t dim = 0; dim < tensor.ndim; ++dim) {
    if (tensor.shape[dim] == 0) return 0;
    last += (tensor.shape[dim] - 1) * tensor.stride[dim];
  }
  return static_cast<size_t>(last + 1) * heed_dtype_bytes(tensor.dtype);
}

// A number that is other than the line says while the run lasts: bad data. The address is one of the line's device.
struct Poke {
  int32_t* address;
  int32_t value;
};

// How a run is carried out: none of it may show in the result.
struct RunStyle {
  const heed_executor* executor = nullptr;  // NULL: heed's pool
  int32_t threads = 0;
  int workspace_fill = 0xff;  // of every byte, or kUnfilled
  void* stream = nullptr;     // CUDA
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
    place_ = attention_ != nullptr ? Place{attention_->device, attention_->device_index}
                                   : Place{kv_append_->device, kv_append_->device_index};
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
    const bool threads_count = place_.device == HEED_DEVICE_CPU && style.threads > 0;
    set_style(style.executor, threads_count ? style.threads : own_threads, style.stream);
    const std::string failure = run_styled(impl, style, pokes);
    set_style(nullptr, own_threads, nullptr);
    return failure;
  }

  // On a GPU: from now on the forward pass's inputs, or those of kv_append, are copies that end where their memory ends,
  // for a tool that sees reads past it. What says that inputs do not change looks at the originals.
  void give_inputs_exact_memory() {
    if (place_.device == HEED_DEVICE_CPU) return;
    if (attention_ != nullptr) {
      heed_attention_args& a = *attention_;
      for (heed_tensor* tensor :
           {&a.q, &a.k, &a.v, &a.bias, &a.mask, &a.alibi_slopes, &a.sinks, &a.cu_seqlens_q, &a.cu_seqlens_k,
            &a.seqused_q, &a.seqused_k, &a.leftpad_k, &a.page_table, &a.cache_batch_idx}) {
        give_exact_memory(*tensor);
      }
    } else {
      heed_kv_append_args& a = *kv_append_;
      for (heed_tensor* tensor :
           {&a.k_new, &a.v_new, &a.q, &a.rotary_cos, &a.rotary_sin, &a.cu_seqlens_new, &a.cu_seqlens_q,
            &a.cache_seqlens, &a.rotary_seqlens, &a.leftpad_k, &a.page_table, &a.cache_batch_idx}) {
        give_exact_memory(*tensor);
      }
    }
  }

  // The outputs are NaN again, the caches as they were.
  std::string poison() { return heed_inputs_poison(inputs_.get()) == HEED_OK ? "" : last_error("poison"); }

  // Judges what the last run wrote.
  std::string judge() {
    heed_check_report report = {};
    report.struct_size = sizeof report;
    if (attention_ != nullptr) {
      if (heed_inputs_check(inputs_.get(), &report) != HEED_OK) return last_error("check");
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

  // A tensor of the arguments as it is now, gaps included: where it lies, or a copy of what the GPU has.
  heed_tensor on_host(heed_tensor tensor, std::vector<unsigned char>& memory) const {
    if (place_.device == HEED_DEVICE_CPU) return tensor;
    memory.resize(span_bytes(tensor));
    if (memory.empty()) return tensor;
    if (heed_memory_copy(memory.data(), HEED_DEVICE_CPU, tensor.data, place_.device, place_.index, memory.size()) !=
        HEED_OK) {
      tensor.dtype = HEED_DTYPE_NONE;  // whoever compares it finds nothing to be equal
    }
    tensor.data = memory.data();
    return tensor;
  }

  // Every byte of the outputs, gaps included.
  std::vector<unsigned char> outputs() const {
    std::vector<unsigned char> bytes, memory;
    const auto add = [&](const heed_tensor& tensor) {
      const unsigned char* const data = static_cast<const unsigned char*>(on_host(tensor, memory).data);
      bytes.insert(bytes.end(), data, data + span_bytes(tensor));
    };
    if (attention_ != nullptr) {
      const heed_attention_args& a = *attention_;
      for (const heed_tensor* tensor :
           {&a.out, &a.lse, &a.dq, &a.dk, &a.dv, &a.dbias, &a.dsinks, &a.dalibi_slopes, &a.status}) {
        add(*tensor);
      }
    } else {
      for (const heed_tensor* tensor :
           {&kv_append_->k_cache, &kv_append_->v_cache, &kv_append_->q_out, &kv_append_->status}) {
        add(*tensor);
      }
    }
    return bytes;
  }

  size_t workspace_bytes() const { return workspace_bytes_; }

 private:
  void set_style(const heed_executor* executor, int32_t threads, void* stream) {
    const auto set = [&](auto& args) {
      args.executor = executor;
      args.num_threads = threads;
      args.stream = stream;
    };
    attention_ != nullptr ? set(*attention_) : set(*kv_append_);
  }

  // At the same address modulo 128.
  void give_exact_memory(heed_tensor& tensor) {
    const size_t bytes = span_bytes(tensor), before = reinterpret_cast<uintptr_t>(tensor.data) % 128;
    if (bytes == 0) return;
    void* memory = nullptr;
    if (heed_memory_allocate(place_.device, place_.index, before + bytes, &memory) != HEED_OK) {
      error_ = last_error("exact memory");
      return;
    }
    exact_.emplace_back(memory,
                        [place = place_](void* pointer) { heed_memory_free(place.device, place.index, pointer); });
    void* const to = static_cast<unsigned char*>(memory) + before;
    if (heed_memory_copy(to, place_.device, tensor.data, place_.device, place_.index, bytes) != HEED_OK) {
      error_ = last_error("exact memory");
      return;
    }
    tensor.data = to;
  }

  // Writes the pokes' values and keeps what was there, in turn: a second time, backwards, it restores.
  bool exchange(Poke& poke) const {
    int32_t before = 0;
    const auto copy = [&](void* to, heed_device to_device, const void* from, heed_device from_device) {
      return heed_memory_copy(to, to_device, from, from_device, place_.index, sizeof(int32_t)) == HEED_OK;
    };
    const bool done = copy(&before, HEED_DEVICE_CPU, poke.address, place_.device) &&
                      copy(poke.address, place_.device, &poke.value, HEED_DEVICE_CPU);
    poke.value = before;
    return done;
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
    const GuardedWorkspace workspace(place_, workspace_bytes_, style.workspace_fill);
    if (!workspace.error().empty()) return workspace.error();
    if (const std::string failure = poison(); !failure.empty()) return failure;
    for (Poke& poke : pokes) {
      if (!exchange(poke)) return last_error("poke");
    }
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
    std::string failure = status != HEED_OK ? last_error("run") : "";
    if (heed_stream_synchronize(place_.device, place_.index, style.stream) != HEED_OK && failure.empty()) {
      failure = last_error("synchronize");
    }
    for (auto poke = pokes.rbegin(); poke != pokes.rend(); ++poke) {
      if (!exchange(*poke) && failure.empty()) failure = last_error("poke");
    }
    if (!failure.empty()) return failure;
    if (!workspace.intact()) return "wrote outside the workspace of " + std::to_string(workspace_bytes_) + " bytes";
    if (heed_inputs_check_guards(inputs_.get()) != HEED_OK) return last_error("guards");
    return {};
  }

  std::string line_, error_;
  Place place_;
  std::vector<std::shared_ptr<void>> exact_;
  std::unique_ptr<heed_inputs, InputsDeleter> inputs_;
  heed_attention_args* attention_ = nullptr;
  heed_kv_append_args* kv_append_ = nullptr;
  size_t workspace_bytes_ = 0;
};

}  // namespace heed::testing
