// heed._core: the one-call functions over arrays of any framework. A call carries a struct of numbers (made once for each
// set of options and kept by the caller) and a tuple of arrays or None, in the order of the tables in tensor_names.h.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <string>
#include <vector>

#include "core.h"
#include "tensor_import.h"
#include "tensor_names.h"

namespace heed_python {
namespace {

std::string place_words(const ImportedTensor& tensor) {
  if (tensor.device == HEED_DEVICE_CPU) return "the cpu";
  return "cuda:" + std::to_string(tensor.device_index);
}

// The arrays of one call, in place in a copy of the caller's struct.
template <class Struct>
class Call {
 public:
  Call(const Struct& numbers, nb::tuple arrays) : args(numbers), arrays_(arrays) {}

  template <size_t kCount>
  void import_all(const TensorField<Struct> (&fields)[kCount], bool backward) {
    if (arrays_.size() != kCount) {
      throw StatusError(HEED_INVALID_ARGUMENT, "tensors has " + std::to_string(arrays_.size()) +
                                                   " entries: must have " + std::to_string(kCount) +
                                                   ", an array or None each");
    }
    for (size_t i = 0; i < kCount; ++i) {
      nb::handle array = arrays_[i];
      if (array.is_none()) continue;
      const TensorField<Struct>& field = fields[i];
      const bool read_back = backward && (field.member == out_member() || field.member == lse_member());
      import_one(array, field.name, field.expected, field.is_output && !read_back);
      args.*field.member = last_.tensor;
    }
    place();
  }

  // A tensor beside the table, on the same device.
  const ImportedTensor& import_one(nb::handle array, const char* name, Expected expected, bool is_output) {
    last_ = import_tensor(array, name, expected, is_output);
    if (last_.owner.is_valid()) owners_.push_back(last_.owner);
    if (first_name_ == nullptr) {
      first_name_ = name;
      first_ = last_;
      first_array_ = array;
    } else if (last_.device != first_.device || last_.device_index != first_.device_index) {
      throw StatusError(HEED_INVALID_ARGUMENT, std::string(name) + " is on " + place_words(last_) + ", " + first_name_ +
                                                   " on " + place_words(first_) + ": must be on one device");
    }
    return last_;
  }

  void place() {
    args.device = first_.device;
    args.device_index = first_.device_index;
  }

  void set_stream(std::optional<uintptr_t> stream) {
    if (first_.device != HEED_DEVICE_CUDA) return;
    args.stream =
        stream ? reinterpret_cast<void*>(*stream) : current_stream(first_array_, first_.device, first_.device_index);
  }

  Struct args;

 private:
  static heed_tensor Struct::*out_member();
  static heed_tensor Struct::*lse_member();

  nb::tuple arrays_;
  std::vector<nb::object> owners_;
  ImportedTensor first_, last_;
  const char* first_name_ = nullptr;
  nb::handle first_array_;
};

template <>
heed_tensor heed_attention_args::*Call<heed_attention_args>::out_member() {
  return &heed_attention_args::out;
}
template <>
heed_tensor heed_attention_args::*Call<heed_attention_args>::lse_member() {
  return &heed_attention_args::lse;
}
template <>
heed_tensor heed_kv_append_args::*Call<heed_kv_append_args>::out_member() {
  return nullptr;
}
template <>
heed_tensor heed_kv_append_args::*Call<heed_kv_append_args>::lse_member() {
  return nullptr;
}

template <class Function>
void call_unlocked(Function&& call) {
  nb::gil_scoped_release unlocked;
  check(call());
}

using Stream = std::optional<uintptr_t>;

Call<heed_attention_args> attention_arguments(const AttentionArgs& numbers, nb::tuple tensors) {
  Call<heed_attention_args> call(numbers.get(), tensors);
  call.import_all(kAttentionTensors, numbers.get().pass == HEED_PASS_BACKWARD);
  return call;
}

void attention_call(const AttentionArgs& numbers, nb::tuple tensors, const BackendName& backend, nb::handle seed,
                    Stream stream, bool validate) {
  Call<heed_attention_args> call = attention_arguments(numbers, tensors);
  if (!seed.is_none()) {
    const ImportedTensor& words = call.import_one(seed, "seed", Expected::kInt64, false);
    if (words.tensor.ndim != 1 || words.tensor.shape[0] != 2 || words.tensor.stride[0] != 1) {
      throw StatusError(HEED_INVALID_ARGUMENT, "seed: must be contiguous int64 [2], seed and offset");
    }
    const auto* pointer = static_cast<const uint64_t*>(words.tensor.data);
    call.args.dropout_seed_ptr = pointer;
    call.args.dropout_offset_ptr = pointer + 1;
  }
  call.set_stream(stream);
  PlanOptions options(backend);
  call_unlocked([&] {
    if (validate) {
      const heed_status status = heed_attention_validate(&call.args);
      if (status != HEED_OK) return status;
    }
    return heed_attention(&call.args, &options.options);
  });
}

void make_contiguous(heed_tensor& tensor) {
  int64_t stride = 1;
  for (int32_t i = tensor.ndim; i-- > 0;) {
    tensor.stride[i] = stride;
    stride *= tensor.shape[i] > 0 ? tensor.shape[i] : 1;
  }
}

// The problem of a call; outputs that are absent are taken as contiguous ones of their own.
Problem attention_problem(const AttentionArgs& numbers, nb::tuple tensors, bool with_lse, bool out_f32) {
  Call<heed_attention_args> call = attention_arguments(numbers, tensors);
  heed_attention_args& args = call.args;
  if (args.out.dtype == HEED_DTYPE_NONE && args.q.dtype != HEED_DTYPE_NONE && args.v.ndim > 0) {
    args.out = args.q;
    args.out.data = nullptr;
    if (args.q.ndim > 0) args.out.shape[args.q.ndim - 1] = args.v.shape[args.v.ndim - 1];
    if (out_f32) args.out.dtype = HEED_DTYPE_F32;
    make_contiguous(args.out);
  }
  if (with_lse && args.lse.dtype == HEED_DTYPE_NONE && args.q.ndim >= 3) {
    args.lse.dtype = HEED_DTYPE_F32;
    args.lse.ndim = args.q.ndim - 1;
    const int64_t* q = args.q.shape;
    if (args.layout_q == HEED_LAYOUT_THD) {
      args.lse.shape[0] = q[1], args.lse.shape[1] = q[0];
    } else {
      const bool heads_first = args.layout_q == HEED_LAYOUT_BHSD;
      args.lse.shape[0] = q[0], args.lse.shape[1] = q[heads_first ? 1 : 2], args.lse.shape[2] = q[heads_first ? 2 : 1];
    }
    make_contiguous(args.lse);
  }
  heed_problem* problem = nullptr;
  check(heed_attention_problem(&args, &problem));
  return Problem(problem);
}

void kv_append_call(const KvAppendArgs& numbers, nb::tuple tensors, const BackendName& backend, Stream stream,
                    bool validate) {
  Call<heed_kv_append_args> call(numbers.get(), tensors);
  call.import_all(kKvAppendTensors, false);
  call.set_stream(stream);
  PlanOptions options(backend);
  call_unlocked([&] {
    if (validate) {
      const heed_status status = heed_kv_append_validate(&call.args);
      if (status != HEED_OK) return status;
    }
    return heed_kv_append(&call.args, &options.options);
  });
}

template <class Struct, size_t kCount>
nb::tuple names_of(const TensorField<Struct> (&fields)[kCount]) {
  nb::list names;
  for (const auto& field : fields) names.append(field.name);
  return nb::tuple(names);
}

}  // namespace

void bind_calls(nb::module_& module) {
  module.attr("ATTENTION_TENSORS") = names_of(kAttentionTensors);
  module.attr("KV_APPEND_TENSORS") = names_of(kKvAppendTensors);
  module.def(
      "attention_call", &attention_call, nb::arg("numbers"), nb::arg("tensors"), nb::arg("backend").none() = nb::none(),
      nb::arg("seed").none() = nb::none(), nb::arg("stream").none() = nb::none(), nb::arg("validate") = false,
      "One call over arrays: `tensors` in the order of ATTENTION_TENSORS, each an array or None; the numbers of "
      "`numbers`; `seed` int64 [2] on the arrays' device; `stream` a CUstream as a number, None: the one that the "
      "arrays' framework works on. The interpreter lock is released meanwhile.");
  module.def("attention_problem", &attention_problem, nb::arg("numbers"), nb::arg("tensors"),
             nb::arg("with_lse") = false, nb::arg("out_f32") = false, "The problem of such a call; out may be None.");
  module.def("kv_append_call", &kv_append_call, nb::arg("numbers"), nb::arg("tensors"),
             nb::arg("backend").none() = nb::none(), nb::arg("stream").none() = nb::none(), nb::arg("validate") = false,
             "As attention_call, in the order of KV_APPEND_TENSORS.");
}

}  // namespace heed_python
