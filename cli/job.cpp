#include "job.h"

#include <cstring>
#include <utility>

#include "format.h"

namespace heed::cli {
namespace {

InputsPtr make_inputs(const std::string& line) {
  parse_problem(line);  // its errors are slips in the line; what comes after are failures
  heed_inputs* inputs = nullptr;
  require(heed_inputs_create(line.c_str(), &inputs));
  return InputsPtr(inputs);
}

struct AttentionTensor {
  const char* name;
  heed_tensor heed_attention_args::*view;
};
constexpr AttentionTensor kForwardInputs[] = {
    {"q", &heed_attention_args::q},
    {"k", &heed_attention_args::k},
    {"v", &heed_attention_args::v},
    {"bias", &heed_attention_args::bias},
    {"mask", &heed_attention_args::mask},
    {"alibi_slopes", &heed_attention_args::alibi_slopes},
    {"sinks", &heed_attention_args::sinks},
    {"cu_seqlens_q", &heed_attention_args::cu_seqlens_q},
    {"cu_seqlens_k", &heed_attention_args::cu_seqlens_k},
    {"seqused_q", &heed_attention_args::seqused_q},
    {"seqused_k", &heed_attention_args::seqused_k},
    {"leftpad_k", &heed_attention_args::leftpad_k},
    {"page_table", &heed_attention_args::page_table},
    {"cache_batch_idx", &heed_attention_args::cache_batch_idx},
};
constexpr AttentionTensor kForwardOutputs[] = {{"out", &heed_attention_args::out}, {"lse", &heed_attention_args::lse}};
constexpr AttentionTensor kBackwardInputs[] = {{"dout", &heed_attention_args::dout},
                                               {"dlse", &heed_attention_args::dlse}};
constexpr AttentionTensor kBackwardOutputs[] = {
    {"dq", &heed_attention_args::dq},         {"dk", &heed_attention_args::dk},
    {"dv", &heed_attention_args::dv},         {"dbias", &heed_attention_args::dbias},
    {"dsinks", &heed_attention_args::dsinks}, {"dalibi_slopes", &heed_attention_args::dalibi_slopes},
};

struct AppendTensor {
  const char* name;
  heed_tensor heed_kv_append_args::*view;
};
constexpr AppendTensor kAppendInputs[] = {
    {"k_new", &heed_kv_append_args::k_new},
    {"v_new", &heed_kv_append_args::v_new},
    {"q", &heed_kv_append_args::q},
    {"rotary_cos", &heed_kv_append_args::rotary_cos},
    {"rotary_sin", &heed_kv_append_args::rotary_sin},
    {"cu_seqlens_new", &heed_kv_append_args::cu_seqlens_new},
    {"cu_seqlens_q", &heed_kv_append_args::cu_seqlens_q},
    {"cache_seqlens", &heed_kv_append_args::cache_seqlens},
    {"rotary_seqlens", &heed_kv_append_args::rotary_seqlens},
    {"leftpad_k", &heed_kv_append_args::leftpad_k},
    {"page_table", &heed_kv_append_args::page_table},
    {"cache_batch_idx", &heed_kv_append_args::cache_batch_idx},
};
constexpr AppendTensor kAppendOutputs[] = {
    {"k_cache", &heed_kv_append_args::k_cache},
    {"v_cache", &heed_kv_append_args::v_cache},
    {"q_out", &heed_kv_append_args::q_out},
};

template <class Args, class Rows>
void collect(const Args& arguments, const Rows& rows, NamedTensors& tensors) {
  for (const auto& row : rows) {
    const heed_tensor& view = arguments.*row.view;
    if (view.dtype != HEED_DTYPE_NONE)
      tensors.emplace(row.name, copy_view(view, arguments.device, arguments.device_index));
  }
}

}  // namespace

// ---- Job ------------------------------------------------------------------------------------------------------------

Job::Job(const std::string& line) : inputs_(make_inputs(line)) {
  attention_ = heed_inputs_attention(inputs_.get());
  append_ = heed_inputs_kv_append(inputs_.get());
  if (append_ != nullptr) before_ = make_inputs(line);
}

Job::Job(const heed_attention_args& arguments) : attention_(&arguments) {}

ProblemPtr Job::problem(int threads) const {
  heed_problem* problem = nullptr;
  if (attention_ != nullptr) {
    heed_attention_args arguments = *attention_;
    if (threads > 0) arguments.num_threads = threads;
    require(heed_attention_problem(&arguments, &problem));
  } else {
    heed_kv_append_args arguments = *append_;
    if (threads > 0) arguments.num_threads = threads;
    require(heed_kv_append_problem(&arguments, &problem));
  }
  return ProblemPtr(problem);
}

heed_check_report Job::check() const {
  heed_check_report report = {};
  report.struct_size = sizeof report;
  if (attention_ != nullptr) {
    require(inputs_ ? heed_inputs_check(inputs_.get(), &report) : heed_attention_check(attention_, &report));
  } else {
    require(heed_kv_append_check(heed_inputs_kv_append(before_.get()), append_, &report));
  }
  return report;
}

void Job::poison() {
  if (inputs_) require(heed_inputs_poison(inputs_.get()));
}

void Job::check_guards() const {
  if (inputs_) require(heed_inputs_check_guards(inputs_.get()));
}

NamedTensors Job::tensors(bool outputs) const {
  NamedTensors tensors;
  if (append_ != nullptr) {
    const heed_kv_append_args& arguments = outputs ? *append_ : *heed_inputs_kv_append(before_.get());
    if (!outputs) collect(arguments, kAppendInputs, tensors);
    collect(arguments, kAppendOutputs, tensors);
    if (!outputs) tensors.erase("q_out");
    return tensors;
  }
  const bool backward = attention_->pass == HEED_PASS_BACKWARD;
  if (!outputs) collect(*attention_, kForwardInputs, tensors);
  if (backward != outputs) collect(*attention_, kForwardOutputs, tensors);
  if (backward && !outputs) collect(*attention_, kBackwardInputs, tensors);
  if (backward && outputs) collect(*attention_, kBackwardOutputs, tensors);
  return tensors;
}

// ---- PlannedJob -----------------------------------------------------------------------------------------------------

PlannedJob::PlannedJob(const Job& job, const std::string& backend, int threads)
    : backend_(backend),
      problem_(job.problem(threads)),
      plan_(make_plan(problem_.get(), backend)),
      workspace_(job.device(), job.device_index(), heed_plan_workspace_bytes(plan_.get())),
      is_attention_(job.attention() != nullptr) {
  if (is_attention_) {
    attention_ = *job.attention();
    if (threads > 0) attention_.num_threads = threads;
    attention_.workspace = workspace_.data();
    attention_.workspace_bytes = workspace_.size();
  } else {
    append_ = *job.append();
    if (threads > 0) append_.num_threads = threads;
    append_.workspace = workspace_.data();
    append_.workspace_bytes = workspace_.size();
  }
}

void PlannedJob::run() const {
  require(is_attention_ ? heed_attention_run(plan_.get(), &attention_) : heed_kv_append_run(plan_.get(), &append_));
}

void PlannedJob::call() const {
  const heed_plan_options options = plan_options(backend_);
  require(is_attention_ ? heed_attention(&attention_, &options) : heed_kv_append(&append_, &options));
}

heed_timing PlannedJob::time(const heed_timing_options& options) const {
  heed_timing timing = {};
  timing.struct_size = sizeof timing;
  require(is_attention_ ? heed_attention_time(plan_.get(), &attention_, &options, &timing)
                        : heed_kv_append_time(plan_.get(), &append_, &options, &timing));
  return timing;
}

// ---- views ----------------------------------------------------------------------------------------------------------

heed_dtype dtype_of(ElementType type) {
  switch (type) {
    case ElementType::kBool: return HEED_DTYPE_BOOL;
    case ElementType::kI32: return HEED_DTYPE_I32;
    case ElementType::kF16: return HEED_DTYPE_F16;
    case ElementType::kBf16: return HEED_DTYPE_BF16;
    case ElementType::kF32: return HEED_DTYPE_F32;
    case ElementType::kF64: return HEED_DTYPE_F64;
    case ElementType::kI64: break;
  }
  throw Failure("i64 has no place in a problem");
}

ElementType type_of(heed_dtype dtype) {
  switch (dtype) {
    case HEED_DTYPE_BOOL: return ElementType::kBool;
    case HEED_DTYPE_I32: return ElementType::kI32;
    case HEED_DTYPE_F16: return ElementType::kF16;
    case HEED_DTYPE_BF16: return ElementType::kBf16;
    case HEED_DTYPE_F32: return ElementType::kF32;
    case HEED_DTYPE_F64: return ElementType::kF64;
    default: throw Failure(cli::format("a tensor of dtype {} cannot be written to a file", heed_dtype_name(dtype)));
  }
}

size_t extent_bytes(const heed_tensor& view) {
  int64_t last = 0;
  for (int32_t d = 0; d < view.ndim; ++d) {
    if (view.shape[d] == 0) return 0;
    last += (view.shape[d] - 1) * view.stride[d];
  }
  return static_cast<size_t>(last + 1) * heed_dtype_bytes(view.dtype);
}

Tensor copy_view(const heed_tensor& view, heed_device device, int32_t device_index) {
  Tensor tensor(type_of(view.dtype), std::vector<int64_t>(view.shape, view.shape + view.ndim));
  const size_t bytes = element_bytes(tensor.type);
  const auto* from = static_cast<const std::byte*>(view.data);
  AlignedBytes on_host;
  if (device != HEED_DEVICE_CPU) {
    on_host = AlignedBytes(extent_bytes(view));
    require(heed_memory_copy(on_host.data(), HEED_DEVICE_CPU, from, device, device_index, on_host.size()));
    from = on_host.data();
  }
  int64_t index[HEED_MAX_DIMS] = {};
  int64_t at = 0;
  for (int64_t to = 0; to < tensor.num_elements(); ++to) {
    std::memcpy(tensor.data.data() + to * static_cast<int64_t>(bytes), from + at * static_cast<int64_t>(bytes), bytes);
    for (int d = view.ndim; d-- > 0;) {
      at += view.stride[d];
      if (++index[d] < view.shape[d]) break;
      at -= view.stride[d] * view.shape[d];
      index[d] = 0;
    }
  }
  return tensor;
}

heed_tensor view_of(Tensor& tensor) {
  if (tensor.shape.size() > HEED_MAX_DIMS) {
    throw Failure(cli::format("shape {} has more than {} dimensions", shape_text(tensor.shape), HEED_MAX_DIMS));
  }
  heed_tensor view = {};
  view.data = tensor.data.data();
  view.dtype = dtype_of(tensor.type);
  view.ndim = static_cast<int32_t>(tensor.shape.size());
  int64_t stride = 1;
  for (int d = view.ndim; d-- > 0;) {
    view.shape[d] = tensor.shape[d];
    view.stride[d] = stride;
    stride *= tensor.shape[d];
  }
  return view;
}

}  // namespace heed::cli
