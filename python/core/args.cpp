// heed._core: the argument structs. Tensors are set by name, numbers are attributes; a run copies the struct and then
// lets go of the interpreter lock, so that one object may be changed by its owner while an earlier run goes on.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "core.h"
#include "tensor_names.h"

namespace heed_python {
namespace {

template <class Struct, size_t kCount>
heed_tensor& find_tensor(const TensorField<Struct> (&fields)[kCount], Struct& args, const char* name) {
  std::string names;
  for (const auto& field : fields) {
    if (std::strcmp(field.name, name) == 0) return args.*field.member;
    names += std::string(names.empty() ? "" : ", ") + field.name;
  }
  throw StatusError(HEED_INVALID_ARGUMENT, std::string("there is no tensor `") + name + "`; the tensors are " + names);
}

template <class Struct, size_t kCount>
nb::list present_tensors(const TensorField<Struct> (&fields)[kCount], const Struct& args) {
  nb::list names;
  for (const auto& field : fields) {
    if ((args.*field.member).dtype != HEED_DTYPE_NONE) names.append(field.name);
  }
  return names;
}

heed_dtype dtype_of(const char* name) {
  std::string names;
  for (heed_dtype dtype = HEED_DTYPE_F32; dtype <= HEED_DTYPE_BOOL; ++dtype) {
    if (std::strcmp(heed_dtype_name(dtype), name) == 0) return dtype;
    names += std::string(names.empty() ? "" : ", ") + heed_dtype_name(dtype);
  }
  throw StatusError(HEED_INVALID_ARGUMENT, std::string("dtype is `") + name + "`; it must be one of " + names);
}

template <class PyArgs>
void set_tensor(PyArgs& self, const char* name, uintptr_t pointer, const char* dtype, const std::vector<int64_t>& shape,
                const std::optional<std::vector<int64_t>>& strides) {
  if (shape.size() > HEED_MAX_DIMS) {
    throw StatusError(HEED_INVALID_ARGUMENT, std::string(name) + " has " + std::to_string(shape.size()) +
                                                 " dimensions; at most 4 are allowed");
  }
  if (strides && strides->size() != shape.size()) {
    throw StatusError(HEED_INVALID_ARGUMENT, std::string(name) + " has " + std::to_string(shape.size()) +
                                                 " dimensions and " + std::to_string(strides->size()) + " strides");
  }
  heed_tensor tensor = {};
  tensor.data = reinterpret_cast<void*>(pointer);
  tensor.dtype = dtype_of(dtype);
  tensor.ndim = static_cast<int32_t>(shape.size());
  int64_t contiguous = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    tensor.shape[i] = shape[i];
    tensor.stride[i] = strides ? (*strides)[i] : contiguous;
    contiguous *= shape[i] > 0 ? shape[i] : 1;
  }
  tensor_of(self.get(), name) = tensor;
}

template <class PyArgs>
nb::object get_tensor(PyArgs& self, const char* name) {
  const heed_tensor& tensor = tensor_of(self.get(), name);
  if (tensor.dtype == HEED_DTYPE_NONE) return nb::none();
  nb::list shape, strides;
  for (int32_t i = 0; i < tensor.ndim; ++i) {
    shape.append(tensor.shape[i]);
    strides.append(tensor.stride[i]);
  }
  return nb::make_tuple(reinterpret_cast<uintptr_t>(tensor.data), heed_dtype_name(tensor.dtype), nb::tuple(shape),
                        nb::tuple(strides));
}

template <class PyArgs, class Struct, class Value>
void bind_number(nb::class_<PyArgs>& type, const char* name, Value Struct::*member) {
  type.def_prop_rw(
      name, [member](const PyArgs& self) { return self.get().*member; },
      [member](PyArgs& self, Value value) { self.get().*member = value; });
}

template <class PyArgs, class Struct, class Pointee>
void bind_pointer(nb::class_<PyArgs>& type, const char* name, Pointee* Struct::*member) {
  type.def_prop_rw(
      name, [member](const PyArgs& self) { return reinterpret_cast<uintptr_t>(self.get().*member); },
      [member](PyArgs& self, uintptr_t value) { self.get().*member = reinterpret_cast<Pointee*>(value); });
}

// What the two structs have alike.
template <class PyArgs>
void bind_common(nb::class_<PyArgs>& type) {
  using Struct = std::remove_reference_t<decltype(std::declval<PyArgs&>().get())>;
  type.def("__init__", [](PyArgs* self, const nb::kwargs& numbers) {
    new (self) PyArgs();
    nb::object object = nb::find(self);
    nb::inst_mark_ready(object);  // its attributes can be set from here on
    for (auto [name, value] : numbers) nb::setattr(object, name, value);
  });
  type.def("set_tensor", &set_tensor<PyArgs>, nb::arg("name"), nb::arg("pointer"), nb::arg("dtype"), nb::arg("shape"),
           nb::arg("strides").none() = nb::none(), "Strides in elements; None: contiguous.");
  type.def(
      "set_pointer",
      [](PyArgs& self, const char* name, uintptr_t pointer) {
        tensor_of(self.get(), name).data = reinterpret_cast<void*>(pointer);
      },
      nb::arg("name"), nb::arg("pointer"), "Other memory of the same dtype, shape and strides.");
  type.def(
      "clear_tensor", [](PyArgs& self, const char* name) { tensor_of(self.get(), name) = heed_tensor{}; },
      nb::arg("name"));
  type.def("tensor", &get_tensor<PyArgs>, nb::arg("name"), "(pointer, dtype, shape, strides), or None where absent.");
  type.def_prop_ro(
      "tensors", [](const PyArgs& self) { return tensor_names(self.get()); }, "Names of the tensors present.");
  type.def_prop_ro(
      "address", [](const PyArgs& self) { return reinterpret_cast<uintptr_t>(&self.get()); },
      "The C struct, for callers of the C interface.");
  type.def_prop_rw(
      "executor",
      [](const PyArgs& self) {
        const heed_executor* executor = self.get().executor;
        return executor == nullptr || executor == heed_executor_pool() ? "pool"
               : executor == heed_executor_serial()                    ? "serial"
                                                                       : "given";
      },
      [](PyArgs& self, const std::string& name) {
        if (name != "pool" && name != "serial") {
          throw StatusError(HEED_INVALID_ARGUMENT, "executor is `" + name + "`; it must be pool or serial");
        }
        self.get().executor = name == "pool" ? heed_executor_pool() : heed_executor_serial();
      });
  bind_number(type, "device", &Struct::device);
  bind_number(type, "device_index", &Struct::device_index);
  bind_number(type, "num_threads", &Struct::num_threads);
  bind_pointer(type, "stream", &Struct::stream);
}

// One call into the library without the interpreter lock, on a copy of the arguments. The error text is the calling
// thread's, so it is read before the lock is taken again.
template <class Call>
void call_unlocked(Call&& call) {
  nb::gil_scoped_release unlocked;
  check(call());
}

// heed_attention_time or heed_kv_append_time.
template <class PyArgs, auto kTime>
nb::dict time_plan(const Plan& plan, const PyArgs& args, int32_t samples, int32_t calls, double sample_us,
                   double pause_ms) {
  const auto copy = args.get();
  const heed_timing_options options = {sizeof(options), samples, calls, sample_us, pause_ms};
  heed_timing timing = {};
  timing.struct_size = sizeof(timing);
  call_unlocked([&] { return kTime(plan.get(), &copy, &options, &timing); });
  nb::dict row;
  row["median_us"] = timing.median_us;
  row["p10_us"] = timing.p10_us;
  row["p90_us"] = timing.p90_us;
  row["host_run_us"] = timing.host_run_us;
  row["host_call_us"] = timing.host_call_us;
  row["samples"] = timing.samples;
  row["calls"] = timing.calls;
  return row;
}

template <class PyArgs, auto kTime>
void bind_time(nb::module_& module, const char* name) {
  module.def(name, &time_plan<PyArgs, kTime>, nb::arg("plan"), nb::arg("args"), nb::arg("samples") = 0,
             nb::arg("calls") = 0, nb::arg("sample_us") = 0.0, nb::arg("pause_ms") = 0.0,
             "Microseconds of one run, on the device and of the calling thread; pause_ms=60: rested.");
}

void* pointer_of(uintptr_t address) { return reinterpret_cast<void*>(address); }

void bind_attention_args(nb::module_& module) {
  nb::class_<AttentionArgs> type(module, "AttentionArgs", "heed_attention_args: AttentionArgs(causal=True).");
  bind_common(type);
  using A = heed_attention_args;
  bind_number(type, "pass_", &A::pass);
  bind_number(type, "layout_q", &A::layout_q);
  bind_number(type, "layout_kv", &A::layout_kv);
  type.def_prop_rw(
      "softmax_scale",
      [](const AttentionArgs& self) -> std::optional<float> {
        if (self.get().has_softmax_scale == 0) return std::nullopt;
        return self.get().softmax_scale;
      },
      [](AttentionArgs& self, std::optional<float> scale) {
        self.get().has_softmax_scale = scale.has_value();
        self.get().softmax_scale = scale.value_or(0.0f);
      },
      nb::for_setter(nb::arg("value").none()), "None: 1/sqrt(head_dim).");
  bind_number(type, "softcap", &A::softcap);
  bind_number(type, "dropout_p", &A::dropout_p);
  bind_number(type, "causal", &A::causal);
  bind_number(type, "offset_kind", &A::offset_kind);
  bind_number(type, "q_offset", &A::q_offset);
  bind_number(type, "window_left", &A::window_left);
  bind_number(type, "window_right", &A::window_right);
  bind_number(type, "chunk", &A::chunk);
  bind_number(type, "max_seqlen_q", &A::max_seqlen_q);
  bind_number(type, "max_seqlen_k", &A::max_seqlen_k);
  bind_number(type, "num_splits", &A::num_splits);
  bind_number(type, "deterministic", &A::deterministic);
  bind_number(type, "batch_invariant", &A::batch_invariant);
  bind_number(type, "dropout_seed", &A::dropout_seed);
  bind_number(type, "dropout_offset", &A::dropout_offset);
  bind_pointer(type, "dropout_seed_ptr", &A::dropout_seed_ptr);
  bind_pointer(type, "dropout_offset_ptr", &A::dropout_offset_ptr);
  type.def_prop_rw(
      "index_base",
      [](const AttentionArgs& self) {
        const int64_t* base = self.get().index_base;
        return nb::make_tuple(base[0], base[1], base[2], base[3]);
      },
      [](AttentionArgs& self, const std::vector<int64_t>& base) {
        if (base.size() != 4) throw StatusError(HEED_INVALID_ARGUMENT, "index_base must have 4 numbers: b, h, i, j");
        for (int i = 0; i < 4; ++i) self.get().index_base[i] = base[i];
      });
  bind_pointer(type, "workspace", &A::workspace);
  bind_number(type, "workspace_bytes", &A::workspace_bytes);

  type.def(
      "problem",
      [](const AttentionArgs& self) {
        heed_problem* problem = nullptr;
        check(heed_attention_problem(&self.get(), &problem));
        return Problem(problem);
      },
      "The problem that these arguments pose.");
  type.def(
      "validate",
      [](const AttentionArgs& self) {
        heed_attention_args copy = self.get();
        call_unlocked([&] { return heed_attention_validate(&copy); });
      },
      "Reads the lengths, offsets and page table that a run never looks at, and raises where they are wrong.");
  type.def(
      "run",
      [](const AttentionArgs& self, const Plan& plan) {
        heed_attention_args copy = self.get();
        call_unlocked([&] { return heed_attention_run(plan.get(), &copy); });
      },
      nb::arg("plan"));
  type.def(
      "__call__",
      [](const AttentionArgs& self, const BackendName& backend) {
        heed_attention_args copy = self.get();
        PlanOptions options(backend);
        call_unlocked([&] { return heed_attention(&copy, &options.options); });
      },
      nb::arg("backend").none() = nb::none(), "Problem, cached plan, workspace and run in one.");

  module.def(
      "attention_run",
      [](const Plan& plan, const AttentionArgs& args, uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out,
         uintptr_t lse, uintptr_t workspace, size_t workspace_bytes) {
        heed_attention_args copy = args.get();
        copy.q.data = pointer_of(q);
        copy.k.data = pointer_of(k);
        copy.v.data = pointer_of(v);
        copy.out.data = pointer_of(out);
        copy.lse.data = pointer_of(lse);
        copy.workspace = pointer_of(workspace);
        copy.workspace_bytes = workspace_bytes;
        call_unlocked([&] { return heed_attention_run(plan.get(), &copy); });
      },
      nb::arg("plan"), nb::arg("args"), nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("out"), nb::arg("lse") = 0,
      nb::arg("workspace") = 0, nb::arg("workspace_bytes") = 0,
      "Runs a plan over these pointers, the rest taken from `args`, which stays as it is: threads may share it.");
}

void bind_kv_append_args(nb::module_& module) {
  nb::class_<KvAppendArgs> type(module, "KvAppendArgs", "heed_kv_append_args.");
  bind_common(type);
  using A = heed_kv_append_args;
  bind_number(type, "layout_new", &A::layout_new);
  bind_number(type, "layout_cache", &A::layout_cache);
  bind_number(type, "rotary_style", &A::rotary_style);
  bind_number(type, "q_positions", &A::q_positions);
  bind_pointer(type, "workspace", &A::workspace);
  bind_number(type, "workspace_bytes", &A::workspace_bytes);
  type.def("problem", [](const KvAppendArgs& self) {
    heed_problem* problem = nullptr;
    check(heed_kv_append_problem(&self.get(), &problem));
    return Problem(problem);
  });
  type.def("validate", [](const KvAppendArgs& self) {
    heed_kv_append_args copy = self.get();
    call_unlocked([&] { return heed_kv_append_validate(&copy); });
  });
  type.def(
      "run",
      [](const KvAppendArgs& self, const Plan& plan) {
        heed_kv_append_args copy = self.get();
        call_unlocked([&] { return heed_kv_append_run(plan.get(), &copy); });
      },
      nb::arg("plan"));
  type.def(
      "__call__",
      [](const KvAppendArgs& self, const BackendName& backend) {
        heed_kv_append_args copy = self.get();
        PlanOptions options(backend);
        call_unlocked([&] { return heed_kv_append(&copy, &options.options); });
      },
      nb::arg("backend").none() = nb::none());
}

}  // namespace

heed_tensor& tensor_of(heed_attention_args& args, const char* name) {
  return find_tensor(kAttentionTensors, args, name);
}

heed_tensor& tensor_of(heed_kv_append_args& args, const char* name) {
  return find_tensor(kKvAppendTensors, args, name);
}

nb::list tensor_names(const heed_attention_args& args) { return present_tensors(kAttentionTensors, args); }
nb::list tensor_names(const heed_kv_append_args& args) { return present_tensors(kKvAppendTensors, args); }

void bind_args(nb::module_& module) {
  module.attr("DEVICE_CPU") = static_cast<int>(HEED_DEVICE_CPU);
  module.attr("DEVICE_CUDA") = static_cast<int>(HEED_DEVICE_CUDA);
  module.attr("LAYOUT_BSHD") = static_cast<int>(HEED_LAYOUT_BSHD);
  module.attr("LAYOUT_BHSD") = static_cast<int>(HEED_LAYOUT_BHSD);
  module.attr("LAYOUT_THD") = static_cast<int>(HEED_LAYOUT_THD);
  module.attr("PASS_FORWARD") = static_cast<int>(HEED_PASS_FORWARD);
  module.attr("PASS_BACKWARD") = static_cast<int>(HEED_PASS_BACKWARD);
  module.attr("OFFSET_BOTTOM_RIGHT") = static_cast<int>(HEED_OFFSET_BOTTOM_RIGHT);
  module.attr("OFFSET_TOP_LEFT") = static_cast<int>(HEED_OFFSET_TOP_LEFT);
  module.attr("OFFSET_GIVEN") = static_cast<int>(HEED_OFFSET_GIVEN);
  module.attr("ROTARY_HALF") = static_cast<int>(HEED_ROTARY_HALF);
  module.attr("ROTARY_INTERLEAVED") = static_cast<int>(HEED_ROTARY_INTERLEAVED);
  module.attr("STATUS_BAD_LENGTH_Q") = static_cast<int>(HEED_STATUS_BAD_LENGTH_Q);
  module.attr("STATUS_BAD_LENGTH_K") = static_cast<int>(HEED_STATUS_BAD_LENGTH_K);
  module.attr("STATUS_BAD_PAGE") = static_cast<int>(HEED_STATUS_BAD_PAGE);
  module.attr("STATUS_APPEND_PAST_CAPACITY") = static_cast<int>(HEED_STATUS_APPEND_PAST_CAPACITY);
  bind_attention_args(module);
  bind_kv_append_args(module);
  bind_time<AttentionArgs, &heed_attention_time>(module, "attention_time");
  bind_time<KvAppendArgs, &heed_kv_append_time>(module, "kv_append_time");
}

}  // namespace heed_python
