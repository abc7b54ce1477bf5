// heed._core: the C interface as Python sees it. Pointers are integers; the caller keeps the memory alive.
#pragma once

#include <nanobind/nanobind.h>

#include <cstddef>
#include <optional>
#include <stdexcept>
#include <string>

#include "heed/heed.h"

namespace heed_python {

namespace nb = nanobind;

// A status that is not HEED_OK, on its way to becoming heed.InvalidArgument and the like.
class StatusError : public std::runtime_error {
 public:
  StatusError(heed_status status, const std::string& message) : std::runtime_error(message), status_(status) {}
  heed_status status() const { return status_; }

 private:
  heed_status status_;
};

// Must be called on the thread that made the call: the error text is that thread's.
inline void check(heed_status status) {
  if (status != HEED_OK) throw StatusError(status, heed_last_error());
}

// Text from the functions that fill a caller's buffer: `call(buffer, bytes, &needed)`.
template <class Call>
std::string text_of(Call&& call) {
  std::string text;
  size_t needed = 0;
  check(call(nullptr, 0, &needed));
  while (needed > text.size()) {  // again where the text has grown between the calls
    text.resize(needed);
    check(call(text.data(), text.size(), &needed));
  }
  text.resize(needed > 0 ? needed - 1 : 0);
  return text;
}

class Problem {
 public:
  explicit Problem(const char* line) {
    check(heed_problem_parse(line, &owned_));
    handle_ = owned_;
  }
  // Takes the handle over; `view` looks at one that something else keeps alive.
  explicit Problem(heed_problem* owned) : owned_(owned), handle_(owned) {}
  static Problem view(const heed_problem* handle) {
    Problem problem(static_cast<heed_problem*>(nullptr));
    problem.handle_ = handle;
    return problem;
  }
  Problem(Problem&& other) noexcept : owned_(other.owned_), handle_(other.handle_) { other.owned_ = nullptr; }
  Problem& operator=(Problem&&) = delete;
  ~Problem() {
    if (owned_ != nullptr) heed_problem_destroy(owned_);
  }
  const heed_problem* get() const { return handle_; }

 private:
  heed_problem* owned_ = nullptr;
  const heed_problem* handle_ = nullptr;
};

using BackendName = std::optional<std::string>;  // none: the library chooses

struct PlanOptions {  // looks at the name, does not keep it
  explicit PlanOptions(const BackendName& backend)
      : options{sizeof(heed_plan_options), backend ? backend->c_str() : nullptr} {}
  heed_plan_options options;
};

class Plan {
 public:
  Plan(const Problem& problem, const BackendName& backend) {
    PlanOptions options(backend);
    check(heed_plan_create(problem.get(), &options.options, &handle_));
  }
  Plan(const Plan&) = delete;
  ~Plan() { heed_plan_destroy(handle_); }
  const heed_plan* get() const { return handle_; }

 private:
  heed_plan* handle_ = nullptr;
};

// The C struct of arguments, owned, or one that a heed_inputs owns.
template <class Struct, void (*kInit)(Struct*)>
class Args {
 public:
  Args() : owned_(new Struct), args_(owned_) { kInit(owned_); }
  explicit Args(Struct* borrowed) : args_(borrowed) {}
  Args(Args&& other) noexcept : owned_(other.owned_), args_(other.args_) { other.owned_ = nullptr; }
  Args& operator=(Args&&) = delete;
  ~Args() { delete owned_; }
  Struct& get() { return *args_; }
  const Struct& get() const { return *args_; }

 private:
  Struct* owned_ = nullptr;
  Struct* args_;
};
using AttentionArgs = Args<heed_attention_args, heed_attention_args_init>;
using KvAppendArgs = Args<heed_kv_append_args, heed_kv_append_args_init>;

void bind_args(nb::module_& module);
void bind_inputs(nb::module_& module);
void bind_calls(nb::module_& module);

// The tensors of an argument struct by name; throws where there is none of that name.
heed_tensor& tensor_of(heed_attention_args& args, const char* name);
heed_tensor& tensor_of(heed_kv_append_args& args, const char* name);
nb::list tensor_names(const heed_attention_args& args);  // of those present
nb::list tensor_names(const heed_kv_append_args& args);

}  // namespace heed_python
