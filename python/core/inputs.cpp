// heed._core: inputs made from a problem line, and the judge.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include "core.h"

namespace heed_python {
namespace {

class Inputs {
 public:
  explicit Inputs(const char* line) {
    nb::gil_scoped_release unlocked;
    check(heed_inputs_create(line, &handle_));
  }
  Inputs(const Inputs&) = delete;
  ~Inputs() { heed_inputs_destroy(handle_); }
  heed_inputs* get() const { return handle_; }

 private:
  heed_inputs* handle_ = nullptr;
};

// f16 and bf16 come as their bits: NumPy has no bf16, and both should read alike.
nb::dlpack::dtype array_dtype(heed_dtype dtype) {
  switch (dtype) {
    case HEED_DTYPE_F32: return nb::dtype<float>();
    case HEED_DTYPE_F64: return nb::dtype<double>();
    case HEED_DTYPE_I32: return nb::dtype<int32_t>();
    case HEED_DTYPE_BOOL: return nb::dtype<bool>();
    default: return nb::dtype<uint16_t>();
  }
}

nb::object array_of(const heed_tensor& tensor, nb::handle owner) {
  size_t shape[HEED_MAX_DIMS];
  for (int32_t i = 0; i < tensor.ndim; ++i) shape[i] = static_cast<size_t>(tensor.shape[i]);
  nb::ndarray<nb::numpy> array(tensor.data, static_cast<size_t>(tensor.ndim), shape, owner, tensor.stride,
                               array_dtype(tensor.dtype));
  return array.cast();
}

nb::object tensor_array(Inputs& self, const char* name) {
  heed_attention_args* attention = heed_inputs_attention(self.get());
  const heed_tensor& tensor =
      attention != nullptr ? tensor_of(*attention, name) : tensor_of(*heed_inputs_kv_append(self.get()), name);
  if (tensor.dtype == HEED_DTYPE_NONE) return nb::none();
  return array_of(tensor, nb::find(self));
}

nb::dict report_dict(const heed_check_report& report) {
  nb::list tensors;
  for (int32_t i = 0; i < report.num_tensors; ++i) {
    const heed_check_tensor& t = report.tensors[i];
    nb::dict row;
    row["name"] = t.name;
    row["passed"] = t.passed != 0;
    row["num_checked"] = t.num_checked;
    row["max_error"] = t.max_error;
    row["max_bound"] = t.max_bound;
    row["norm_error"] = t.norm_error;
    row["norm_bound"] = t.norm_bound;
    row["worst"] = nb::make_tuple(t.worst[0], t.worst[1], t.worst[2], t.worst[3]);
    row["worst_got"] = t.worst_got;
    row["worst_want"] = t.worst_want;
    row["reason"] = t.reason;
    tensors.append(row);
  }
  nb::dict result;
  result["passed"] = report.passed != 0;
  result["tensors"] = tensors;
  return result;
}

nb::dict attention_check(const AttentionArgs& args) {
  heed_check_report report = {};
  report.struct_size = sizeof(report);
  const heed_attention_args copy = args.get();
  {
    nb::gil_scoped_release unlocked;
    check(heed_attention_check(&copy, &report));
  }
  return report_dict(report);
}

nb::dict kv_append_check(const KvAppendArgs& before, const KvAppendArgs& after) {
  heed_check_report report = {};
  report.struct_size = sizeof(report);
  const heed_kv_append_args copy_before = before.get(), copy_after = after.get();
  {
    nb::gil_scoped_release unlocked;
    check(heed_kv_append_check(&copy_before, &copy_after, &report));
  }
  return report_dict(report);
}

}  // namespace

void bind_inputs(nb::module_& module) {
  nb::class_<Inputs>(module, "Inputs", "Tensors made from a problem line: the same line, the same bits, everywhere.")
      .def(nb::init<const char*>(), nb::arg("line"))
      .def_prop_ro(
          "problem", [](const Inputs& self) { return Problem::view(heed_inputs_problem(self.get())); },
          nb::keep_alive<0, 1>())
      .def_prop_ro(
          "args",
          [](const Inputs& self) -> nb::object {
            heed_attention_args* attention = heed_inputs_attention(self.get());
            if (attention != nullptr) return nb::cast(AttentionArgs(attention));
            return nb::cast(KvAppendArgs(heed_inputs_kv_append(self.get())));
          },
          nb::keep_alive<0, 1>(), "Arguments over these tensors, to run as they are.")
      .def("tensor", &tensor_array, nb::arg("name"),
           "A NumPy array over the tensor; f16 and bf16 as their bits (uint16); None where absent.")
      .def(
          "poison", [](Inputs& self) { check(heed_inputs_poison(self.get())); }, "Fills the outputs with NaN again.")
      .def(
          "check_guards", [](const Inputs& self) { check(heed_inputs_check_guards(self.get())); },
          "Raises where a byte was written outside the outputs' elements.");
  module.def("attention_check", &attention_check, nb::arg("args"),
             "Judges the outputs that `args` holds against the double-precision reference.");
  module.def("kv_append_check", &kv_append_check, nb::arg("before"), nb::arg("after"));
}

}  // namespace heed_python
