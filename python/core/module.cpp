// heed._core: errors, problems, plans, facts about the machine.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <cstdlib>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include "core.h"

namespace heed_python {
namespace {

struct ErrorType {
  heed_status status;
  const char* name;
  const char* doc;
  PyObject** builtin;  // second base, so that `except ValueError` works too
  PyObject* type;
};

PyObject* error_base = nullptr;

ErrorType error_types[] = {
    {HEED_INVALID_ARGUMENT, "InvalidArgument",
     "An argument is wrong; the sentence names it, its value and what is allowed.", &PyExc_ValueError, nullptr},
    {HEED_NOT_SUPPORTED, "NotSupported",
     "Right, but done by no backend asked; the sentence says by which and what is nearest.", &PyExc_NotImplementedError,
     nullptr},
    {HEED_NOT_FOUND, "NotFound", "No backend, file or variable of that name.", &PyExc_LookupError, nullptr},
    {HEED_OUT_OF_MEMORY, "OutOfMemory", "Memory could not be had.", &PyExc_MemoryError, nullptr},
    {HEED_INITIALIZATION_FAILED, "InitializationFailed", "A device or a thread pool could not be started.", nullptr,
     nullptr},
    {HEED_OPERATION_FAILED, "OperationFailed", "The operation was begun and failed.", nullptr, nullptr},
};

// `except heed.Error` catches them all; `status` is the C name, e.g. "invalid_argument".
PyObject* new_error(const char* name, const char* doc, PyObject* bases, const char* status) {
  nb::dict members;
  members["status"] = status;
  const std::string qualified = std::string("heed.") + name;
  PyObject* type = PyErr_NewExceptionWithDoc(qualified.c_str(), doc, bases, members.ptr());
  if (type == nullptr) nb::raise_python_error();
  return type;
}

void bind_errors(nb::module_& module) {
  error_base = new_error("Error", "Anything that the library refused or failed to do.", PyExc_RuntimeError, "");
  module.attr("Error") = nb::handle(error_base);
  for (ErrorType& error : error_types) {
    nb::object bases = error.builtin == nullptr
                           ? nb::borrow(nb::handle(error_base))
                           : nb::object(nb::make_tuple(nb::handle(error_base), nb::handle(*error.builtin)));
    error.type = new_error(error.name, error.doc, bases.ptr(), heed_status_name(error.status));
    module.attr(error.name) = nb::handle(error.type);
  }
  nb::register_exception_translator([](const std::exception_ptr& thrown, void*) {
    try {
      std::rethrow_exception(thrown);
    } catch (const StatusError& error) {
      PyObject* type = error_base;
      for (const ErrorType& known : error_types) {
        if (known.status == error.status()) type = known.type;
      }
      PyErr_SetString(type, error.what());
    }
  });
}

nb::list verdicts(const Problem& problem, const BackendName& backend) {
  PlanOptions options(backend);
  nb::list rows;
  const int32_t count = heed_verdict_count(problem.get());
  for (int32_t i = 0; i < count; ++i) {
    heed_verdict verdict = {};
    verdict.struct_size = sizeof(verdict);
    check(heed_verdict_get(problem.get(), &options.options, i, &verdict));
    nb::dict row;
    row["impl"] = verdict.impl;
    row["accepted"] = verdict.accepted != 0;
    row["chosen"] = verdict.chosen != 0;
    row["reason"] = verdict.reason == nullptr ? "" : verdict.reason;
    row["cost_us"] = verdict.cost_us;
    rows.append(row);
  }
  return rows;
}

std::string explain(const Problem& problem, const BackendName& backend) {
  PlanOptions options(backend);
  return text_of([&](char* buffer, size_t bytes, size_t* needed) {
    return heed_explain(problem.get(), &options.options, buffer, bytes, needed);
  });
}

void bind_problem_and_plan(nb::module_& module) {
  nb::class_<Problem>(module, "Problem", "What is asked, without pointers. Reads a problem line; str() prints it.")
      .def(nb::init<const char*>(), nb::arg("line"))
      .def("__str__",
           [](const Problem& problem) {
             return text_of([&](char* buffer, size_t bytes, size_t* needed) {
               return heed_problem_print(problem.get(), buffer, bytes, needed);
             });
           })
      .def_prop_ro("op", [](const Problem& problem) { return heed_problem_op(problem.get()); })
      .def_prop_ro("flops", [](const Problem& problem) { return heed_problem_flops(problem.get()); })
      .def_prop_ro("bytes", [](const Problem& problem) { return heed_problem_bytes(problem.get()); })
      .def("verdicts", &verdicts, nb::arg("backend").none() = nb::none(), "What every implementation says of it.")
      .def("explain", &explain, nb::arg("backend").none() = nb::none(), "As text: verdicts, the choice, its steps.");

  nb::class_<Plan>(module, "Plan", "How a problem will be done. Immutable; any number of threads may run it at once.")
      .def(nb::init<const Problem&, const BackendName&>(), nb::arg("problem"), nb::arg("backend").none() = nb::none())
      .def("__str__",
           [](const Plan& plan) {
             return text_of([&](char* buffer, size_t bytes, size_t* needed) {
               return heed_plan_print(plan.get(), buffer, bytes, needed);
             });
           })
      .def_prop_ro("impl", [](const Plan& plan) { return heed_plan_impl(plan.get()); })
      .def_prop_ro("workspace_bytes", [](const Plan& plan) { return heed_plan_workspace_bytes(plan.get()); })
      .def_prop_ro(
          "address", [](const Plan& plan) { return reinterpret_cast<uintptr_t>(plan.get()); },
          "The heed_plan*, for callers of the C interface.");
}

nb::list config() {
  nb::list rows;
  for (int32_t i = 0; i < heed_config_count(); ++i) {
    heed_config_entry entry = {};
    entry.struct_size = sizeof(entry);
    check(heed_config_get(i, &entry));
    nb::dict row;
    row["name"] = entry.name;
    row["value"] = entry.value;
    row["default"] = entry.default_value;
    row["help"] = entry.help;
    row["is_set"] = entry.is_set != 0;
    rows.append(row);
  }
  return rows;
}

nb::dict plan_cache() {
  heed_plan_cache_stats stats = {};
  stats.struct_size = sizeof(stats);
  check(heed_plan_cache_get(&stats));
  nb::dict row;
  row["hits"] = stats.hits;
  row["misses"] = stats.misses;
  row["entries"] = stats.entries;
  row["capacity"] = stats.capacity;
  return row;
}

nb::dict warm(nb::sequence problems, const std::optional<std::string>& arch) {
  std::vector<const heed_problem*> handles;
  for (nb::handle problem : problems) handles.push_back(nb::cast<const Problem&>(problem).get());
  heed_warm_options options = {};
  options.struct_size = sizeof options;
  options.arch = arch ? arch->c_str() : nullptr;
  heed_warm_result result = {};
  result.struct_size = sizeof result;
  heed_status status = HEED_OK;
  std::string message;  // the error text is this thread's, and to be read before the lock is taken again
  {
    nb::gil_scoped_release unlocked;
    status = heed_warm(handles.data(), static_cast<int32_t>(handles.size()), &options, &result);
    if (status != HEED_OK) message = heed_last_error();
  }
  if (status != HEED_OK) throw StatusError(status, message);
  nb::dict row;
  row["num_kernels"] = result.num_kernels;
  row["num_compiled"] = result.num_compiled;
  row["compile_seconds"] = result.compile_seconds;
  return row;
}

// Memory with a known alignment: workspaces, and tensors of callers that have no array library at hand.
class Buffer {
 public:
  Buffer(size_t bytes, size_t alignment) : bytes_(bytes) {
    if (alignment == 0 || (alignment & (alignment - 1)) != 0 || alignment < sizeof(void*)) {
      throw StatusError(HEED_INVALID_ARGUMENT,
                        "alignment is " + std::to_string(alignment) + "; it must be a power of two, at least 8");
    }
    if (posix_memalign(&data_, alignment, bytes == 0 ? alignment : bytes) != 0) throw std::bad_alloc();
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }
  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_;
};

}  // namespace

NB_MODULE(_core, module) {
  nb::set_leak_warnings(false);  // what modules hold until the process ends is no leak, and nothing here prints
  bind_errors(module);
  bind_problem_and_plan(module);
  bind_args(module);
  bind_inputs(module);
  bind_calls(module);

  nb::class_<Buffer>(module, "Buffer", "Uninitialised memory, aligned; freed with the object.")
      .def(nb::init<size_t, size_t>(), nb::arg("bytes"), nb::arg("alignment") = 64)
      .def_prop_ro("pointer", [](const Buffer& buffer) { return reinterpret_cast<uintptr_t>(buffer.data()); })
      .def_prop_ro("bytes", [](const Buffer& buffer) { return buffer.bytes(); });

  module.def("version", &heed_version);
  module.def("abi_version", &heed_abi_version);
  module.def(
      "info", [] { return text_of(&heed_info); }, "The machine, its backends and why any is missing, as text.");
  module.def(
      "stream_synchronize",
      [](heed_device device, int32_t index, uintptr_t stream) {
        heed_status status = HEED_OK;
        std::string message;  // the error text is this thread's, and to be read before the lock is taken again
        {
          nb::gil_scoped_release unlocked;
          status = heed_stream_synchronize(device, index, reinterpret_cast<void*>(stream));
          if (status != HEED_OK) message = heed_last_error();
        }
        if (status != HEED_OK) throw StatusError(status, message);
      },
      nb::arg("device"), nb::arg("index") = -1, nb::arg("stream") = 0, "Waits for the work on a stream.");
  module.def(
      "set_nvrtc_folder", [](const std::string& folder) { check(heed_set_nvrtc_folder(folder.c_str())); },
      nb::arg("folder"), "Where libnvrtc lies, if neither HEED_NVRTC nor the system says; \"\" forgets it.");
  module.def("config", &config, "Every HEED_* variable: a list of dicts.");
  module.def("plan_cache", &plan_cache, "Hits, misses, entries and capacity of the one-call functions' cache.");
  module.def("plan_cache_clear", &heed_plan_cache_clear);
  module.def("warm", &warm, nb::arg("problems"), nb::arg("arch").none() = nb::none(),
             "heed_warm: what it did. The caller keeps the problems meanwhile.");
}

}  // namespace heed_python
