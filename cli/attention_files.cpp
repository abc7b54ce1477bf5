#include "attention_files.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>
#include <optional>

#include "format.h"
#include "job.h"

namespace heed::cli {
namespace {

enum class Kind { kData, kBias, kFloat32, kInt32, kMask, kGradient };

struct Input {
  const char* name;
  heed_tensor heed_attention_args::*view;
  Kind kind;
};
constexpr Input kInputs[] = {
    {"q", &heed_attention_args::q, Kind::kData},
    {"k", &heed_attention_args::k, Kind::kData},
    {"v", &heed_attention_args::v, Kind::kData},
    {"bias", &heed_attention_args::bias, Kind::kBias},
    {"mask", &heed_attention_args::mask, Kind::kMask},
    {"alibi_slopes", &heed_attention_args::alibi_slopes, Kind::kFloat32},
    {"sinks", &heed_attention_args::sinks, Kind::kFloat32},
    {"cu_seqlens_q", &heed_attention_args::cu_seqlens_q, Kind::kInt32},
    {"cu_seqlens_k", &heed_attention_args::cu_seqlens_k, Kind::kInt32},
    {"seqused_q", &heed_attention_args::seqused_q, Kind::kInt32},
    {"seqused_k", &heed_attention_args::seqused_k, Kind::kInt32},
    {"leftpad_k", &heed_attention_args::leftpad_k, Kind::kInt32},
    {"page_table", &heed_attention_args::page_table, Kind::kInt32},
    {"cache_batch_idx", &heed_attention_args::cache_batch_idx, Kind::kInt32},
    {"dout", &heed_attention_args::dout, Kind::kGradient},
    {"dlse", &heed_attention_args::dlse, Kind::kGradient},
};

// A gradient has the shape and dtype of what it is of.
struct Gradient {
  const char *name, *of;
  heed_tensor heed_attention_args::*view;
};
constexpr Gradient kGradients[] = {
    {"dq", "q", &heed_attention_args::dq},
    {"dk", "k", &heed_attention_args::dk},
    {"dv", "v", &heed_attention_args::dv},
    {"dbias", "bias", &heed_attention_args::dbias},
    {"dsinks", "sinks", &heed_attention_args::dsinks},
    {"dalibi_slopes", "alibi_slopes", &heed_attention_args::dalibi_slopes},
};

std::optional<ElementType> named_type(const std::string& name) {
  for (const ElementType type : {ElementType::kF16, ElementType::kBf16, ElementType::kF32, ElementType::kF64}) {
    if (element_name(type) == name) return type;
  }
  return std::nullopt;
}

// As the library wants it: the dtype asked for, small types widened to what they mean.
Tensor prepare(Tensor tensor, Kind kind, std::optional<ElementType> dtype, ElementType q_type) {
  switch (kind) {
    case Kind::kData: return dtype ? convert(tensor, *dtype) : tensor;
    case Kind::kBias:
      return tensor.type == q_type || tensor.type == ElementType::kF32 ? tensor : convert(tensor, ElementType::kF32);
    case Kind::kFloat32: return convert(tensor, ElementType::kF32);
    case Kind::kInt32: return convert(tensor, ElementType::kI32);
    case Kind::kGradient: return tensor;  // converted once the result's dtype is known
    case Kind::kMask: break;
  }
  if (tensor.type != ElementType::kBool) {
    throw FileError(
        cli::format("a mask is bool (true: may attend), not {}; additive masks are --bias", element_name(tensor.type)));
  }
  return tensor;
}

int32_t layout_value(const std::string& name, const char* option) {
  if (name == "bshd") return HEED_LAYOUT_BSHD;
  if (name == "bhsd") return HEED_LAYOUT_BHSD;
  if (name == "thd") return HEED_LAYOUT_THD;
  throw UsageError(cli::format("{} is '{}'; allowed are bshd, bhsd and thd", option, name));
}

template <class T>
void fill_nan(Tensor& tensor, T nan) {
  std::fill_n(tensor.as<T>(), tensor.num_elements(), nan);
}

// An output that is not written shows.
void fill_nan(Tensor& tensor) {
  switch (element_bytes(tensor.type)) {
    case 2: return fill_nan<uint16_t>(tensor, 0x7fff);
    case 4: return fill_nan<float>(tensor, std::numeric_limits<float>::quiet_NaN());
    default: return fill_nan<double>(tensor, std::numeric_limits<double>::quiet_NaN());
  }
}

}  // namespace

LoadedAttention::LoadedAttention(const AttentionFiles& files, bool lse) {
  heed_attention_args_init(&arguments_);
  read_tensors(files);
  const bool packed = inputs_.contains("cu_seqlens_q"), packed_kv = inputs_.contains("cu_seqlens_k");
  const std::string layout = !files.layout.empty() ? files.layout : packed ? "thd" : "bshd";
  const std::string layout_kv = !files.layout_kv.empty() ? files.layout_kv
                                : packed_kv              ? "thd"
                                : layout == "thd"        ? "bshd"
                                                         : layout;
  arguments_.layout_q = layout_value(layout, "--layout");
  arguments_.layout_kv = layout_value(layout_kv, "--layout-kv");
  fit_shapes();
  for (const Input& input : kInputs) {
    const auto found = inputs_.find(input.name);
    if (input.kind != Kind::kGradient && found != inputs_.end()) arguments_.*input.view = view_of(found->second);
  }
  set_options(files);
  if (files.backward && lse) throw UsageError("--lse is of the forward pass");
  make_outputs(files, lse || files.backward);
  if (files.backward) make_gradients();
}

void LoadedAttention::read_tensors(const AttentionFiles& files) {
  std::map<std::string, TensorRef> refs;
  for (const std::string& input : files.inputs) {
    const TensorRef file = parse_tensor_ref(input);
    const std::vector<std::string> names = tensor_names(file.path);
    size_t before = refs.size();
    for (const Input& known : kInputs) {
      if (known.kind == Kind::kGradient && !files.backward) continue;
      const std::string name = file.name + known.name;
      if (std::find(names.begin(), names.end(), name) != names.end()) refs[known.name] = {file.path, name};
    }
    if (refs.size() == before) {
      throw FileError(cli::format("{}: none of its tensors is named {}q, {}k, {}v, ...; it holds: {}", file.path,
                                  file.name, file.name, file.name, listed(names)));
    }
  }
  for (const auto& [name, ref] : files.tensors) refs[name] = parse_tensor_ref(ref);
  if (!files.backward && (refs.contains("dout") || refs.contains("dlse")))
    throw UsageError("--dout and --dlse are of the backward pass: --pass bwd");
  for (const char* name : {"q", "k", "v", "dout"}) {
    if (!refs.contains(name) && (files.backward || std::string_view(name) != "dout"))
      throw UsageError(
          cli::format("there is no {}: give --{} FILE[:NAME], or --input FILE with a tensor {}", name, name, name));
  }
  const std::optional<ElementType> dtype = named_type(files.dtype);
  for (const Input& input : kInputs) {
    const auto ref = refs.find(input.name);
    if (ref == refs.end()) continue;
    const std::string source = ref->second.path + (ref->second.name.empty() ? "" : ":" + ref->second.name);
    Tensor tensor = read_tensor(ref->second);
    try {
      const ElementType q_type = inputs_.contains("q") ? inputs_.at("q").type : tensor.type;
      inputs_[input.name] = prepare(std::move(tensor), input.kind, dtype, q_type);
    } catch (const FileError& error) {
      throw FileError(cli::format("{}: {}: {}", source, input.name, error.what()));
    }
    sources_.emplace_back(input.name, source);
  }
  if (inputs_.at("q").type == ElementType::kF64) {
    throw FileError(
        cli::format("{}: q is f64, which only the reference computes; add --dtype f32 (or bf16, f16)", source_of("q")));
  }
}

std::string LoadedAttention::source_of(const std::string& name) const {
  const auto found = std::find_if(sources_.begin(), sources_.end(), [&](const auto& row) { return row.first == name; });
  return found == sources_.end() ? name : found->second;
}

// Courtesies: one sequence without a batch dimension; bias and mask with leading dimensions left out.
void LoadedAttention::fit_shapes() {
  const auto add_front = [](Tensor& tensor, size_t ndim) {
    while (tensor.shape.size() < ndim) tensor.shape.insert(tensor.shape.begin(), 1);
  };
  batch_added_ = arguments_.layout_q != HEED_LAYOUT_THD && inputs_.at("q").shape.size() == 3;
  if (batch_added_) add_front(inputs_.at("q"), 4);
  if (batch_added_ && inputs_.contains("dout")) add_front(inputs_.at("dout"), 4);
  if (batch_added_ && inputs_.contains("dlse")) add_front(inputs_.at("dlse"), 3);
  for (const char* name : {"k", "v"}) {
    if (batch_added_ && arguments_.layout_kv != HEED_LAYOUT_THD) add_front(inputs_.at(name), 4);
  }
  for (const char* name : {"bias", "mask"}) {
    if (inputs_.contains(name)) add_front(inputs_.at(name), 4);
  }
  for (const char* name : {"q", "k", "v"}) {
    const int32_t layout = name[0] == 'q' ? arguments_.layout_q : arguments_.layout_kv;
    const size_t ndim = layout == HEED_LAYOUT_THD ? 3 : 4;
    const std::vector<int64_t>& shape = inputs_.at(name).shape;
    if (shape.size() == ndim) continue;
    constexpr const char* kForms[] = {"bshd [batch, seqlen, heads, head_dim]", "bhsd [batch, heads, seqlen, head_dim]",
                                      "thd [total, heads, head_dim]"};
    throw FileError(
        cli::format("{}: {} has shape {}, which is no {}", source_of(name), name, shape_text(shape), kForms[layout]));
  }
}

void LoadedAttention::set_options(const AttentionFiles& files) {
  arguments_.causal = files.causal;
  if (!files.window.empty()) {
    if (files.window.size() != 2) throw UsageError("--window takes two numbers, LEFT,RIGHT; -1 is unbounded");
    arguments_.window_left = files.window[0];
    arguments_.window_right = files.window[1];
  }
  if (files.offset == "top") {
    arguments_.offset_kind = HEED_OFFSET_TOP_LEFT;
  } else if (!files.offset.empty()) {
    const char* end = files.offset.data() + files.offset.size();
    const auto [at, error] = std::from_chars(files.offset.data(), end, arguments_.q_offset);
    if (error != std::errc() || at != end)
      throw UsageError(cli::format("--offset is '{}'; allowed are top and whole numbers", files.offset));
    arguments_.offset_kind = HEED_OFFSET_GIVEN;
  }
  arguments_.chunk = files.chunk;
  arguments_.num_splits = files.splits;
  arguments_.softcap = static_cast<float>(files.softcap);
  arguments_.dropout_p = static_cast<float>(files.dropout);
  arguments_.dropout_seed = files.seed;
  arguments_.has_softmax_scale = files.scale.has_value();
  arguments_.softmax_scale = static_cast<float>(files.scale.value_or(0.0));
  arguments_.batch_invariant = files.batch_invariant;
}

void LoadedAttention::make_outputs(const AttentionFiles& files, bool lse) {
  const Tensor &q = inputs_.at("q"), &v = inputs_.at("v");
  std::vector<int64_t> shape = q.shape;
  shape.back() = v.shape.back();
  out_ = Tensor(named_type(files.out_dtype).value_or(q.type), shape);
  fill_nan(out_);
  arguments_.out = view_of(out_);
  if (!lse) return;
  switch (arguments_.layout_q) {
    case HEED_LAYOUT_THD: shape = {q.shape[1], q.shape[0]}; break;
    case HEED_LAYOUT_BHSD: shape = {q.shape[0], q.shape[1], q.shape[2]}; break;
    default: shape = {q.shape[0], q.shape[2], q.shape[1]}; break;
  }
  lse_ = Tensor(ElementType::kF32, shape);
  fill_nan(lse_);
  arguments_.lse = view_of(lse_);
}

void LoadedAttention::make_gradients() {
  require(heed_attention(&arguments_, nullptr));
  arguments_.pass = HEED_PASS_BACKWARD;
  for (const Input& input : kInputs) {
    const auto found = inputs_.find(input.name);
    if (input.kind != Kind::kGradient || found == inputs_.end()) continue;
    found->second = convert(found->second, input.name == std::string_view("dout") ? out_.type : ElementType::kF32);
    arguments_.*input.view = view_of(found->second);
  }
  for (const Gradient& gradient : kGradients) {
    const auto of = inputs_.find(gradient.of);
    if (of == inputs_.end()) continue;
    Tensor& tensor = gradients_[gradient.name] = Tensor(of->second.type, of->second.shape);
    fill_nan(tensor);
    arguments_.*gradient.view = view_of(tensor);
  }
}

Tensor LoadedAttention::as_given(const std::string& name, const Tensor& output) const {
  Tensor given = output;
  const bool has_batch = name == "out" || name == "lse" || name == "dq" ||
                         ((name == "dk" || name == "dv") && arguments_.layout_kv != HEED_LAYOUT_THD);
  if (batch_added_ && has_batch) given.shape.erase(given.shape.begin());
  return given;
}

}  // namespace heed::cli
