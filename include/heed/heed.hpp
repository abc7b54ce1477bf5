// heed for C++20: the C interface (heed/heed.h) with views, exceptions and owning handles. Header-only.
//
//   heed::attention(heed::TensorView(q, {b, s, h, d}), heed::TensorView(k, {b, s, h, d}),
//                   heed::TensorView(v, {b, s, h, d}), heed::TensorView(out, {b, s, h, d}), {.causal = true});
#ifndef HEED_HEED_HPP
#define HEED_HEED_HPP

#include <array>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "heed/heed.h"

namespace heed {

// A failed call: heed's sentence, and the code it came with.
class Error : public std::runtime_error {
 public:
  Error(heed_status status, const std::string& message) : std::runtime_error(message), status_(status) {}
  heed_status status() const noexcept { return status_; }

 private:
  heed_status status_;
};

inline void check(heed_status status) {
  if (status != HEED_OK) throw Error(status, std::string(heed_status_name(status)) + ": " + heed_last_error());
}

// The dtype of a C++ type. Specialise it for a half type of your own: it has to be that type's bits.
template <class T>
inline constexpr heed_dtype kDtypeOf = HEED_DTYPE_NONE;
template <>
inline constexpr heed_dtype kDtypeOf<float> = HEED_DTYPE_F32;
template <>
inline constexpr heed_dtype kDtypeOf<double> = HEED_DTYPE_F64;
template <>
inline constexpr heed_dtype kDtypeOf<int32_t> = HEED_DTYPE_I32;
template <>
inline constexpr heed_dtype kDtypeOf<bool> = HEED_DTYPE_BOOL;
#if defined(__FLT16_MANT_DIG__)
template <>
inline constexpr heed_dtype kDtypeOf<_Float16> = HEED_DTYPE_F16;
#endif

// A view of memory that the caller owns. Default-constructed: no tensor.
class TensorView {
 public:
  TensorView() = default;

  // Contiguous, or with strides in elements.
  template <class T>
    requires(kDtypeOf<std::remove_const_t<T>> != HEED_DTYPE_NONE)
  TensorView(T* data, std::initializer_list<int64_t> shape, std::initializer_list<int64_t> strides = {})
      : TensorView(data, kDtypeOf<std::remove_const_t<T>>, shape, strides) {}

  // The same for 16-bit data behind any pointer: TensorView(pointer, HEED_DTYPE_BF16, {b, s, h, d}).
  TensorView(const void* data, heed_dtype dtype, std::span<const int64_t> shape,
             std::span<const int64_t> strides = {}) {
    if (shape.empty() || shape.size() > HEED_MAX_DIMS || (!strides.empty() && strides.size() != shape.size())) {
      throw Error(HEED_INVALID_ARGUMENT, "TensorView: shape must have 1 to 4 dimensions, and strides as many or none");
    }
    tensor_.data = const_cast<void*>(data);  // the C struct serves inputs and outputs alike
    tensor_.dtype = dtype;
    tensor_.ndim = static_cast<int32_t>(shape.size());
    int64_t contiguous = 1;
    for (size_t i = shape.size(); i-- > 0;) {
      tensor_.shape[i] = shape[i];
      tensor_.stride[i] = strides.empty() ? contiguous : strides[i];
      contiguous *= shape[i];
    }
  }
  TensorView(const void* data, heed_dtype dtype, std::initializer_list<int64_t> shape,
             std::initializer_list<int64_t> strides = {})
      : TensorView(data, dtype, std::span(shape.begin(), shape.size()), std::span(strides.begin(), strides.size())) {}

  const heed_tensor& tensor() const { return tensor_; }
  explicit operator bool() const { return tensor_.dtype != HEED_DTYPE_NONE; }

 private:
  heed_tensor tensor_ = {};
};

// An executor made of a function: run(num_tasks, task) calls task(i) for every i in [0, num_tasks) and returns when
// all are done. It must not throw.
class Executor {
 public:
  using Task = std::function<void(int32_t)>;
  using Run = std::function<void(int32_t num_tasks, const Task& task)>;

  Executor(int32_t num_threads, Run run) : run_(std::make_unique<Run>(std::move(run))) {
    executor_ = {sizeof(heed_executor), run_.get(), num_threads, 0, &Executor::call};
  }
  const heed_executor* get() const { return &executor_; }

 private:
  static void call(void* context, int32_t num_tasks, void (*task)(void*, int32_t), void* argument) {
    (*static_cast<Run*>(context))(num_tasks, [task, argument](int32_t index) { task(argument, index); });
  }

  std::unique_ptr<Run> run_;  // at an address that moving does not change
  heed_executor executor_ = {};
};

// Everything of heed_attention_args but q, k, v, what a pass writes or starts from, and the workspace. Names and
// meanings are the same.
struct AttentionOptions {
  int32_t layout_q = HEED_LAYOUT_BSHD;
  int32_t layout_kv = HEED_LAYOUT_BSHD;
  TensorView lse = {};
  bool causal = false;
  std::optional<float> softmax_scale = {};  // 1/sqrt(head_dim)
  float softcap = 0.0f;
  int64_t window_left = -1, window_right = -1;
  int64_t chunk = 0;
  int32_t offset_kind = HEED_OFFSET_BOTTOM_RIGHT;
  int64_t q_offset = 0;
  TensorView bias = {}, mask = {}, alibi_slopes = {}, sinks = {};
  TensorView cu_seqlens_q = {}, cu_seqlens_k = {}, seqused_q = {}, seqused_k = {}, leftpad_k = {};
  int64_t max_seqlen_q = 0, max_seqlen_k = 0;
  TensorView page_table = {}, cache_batch_idx = {};
  float dropout_p = 0.0f;
  uint64_t dropout_seed = 0, dropout_offset = 0;
  const uint64_t *dropout_seed_ptr = nullptr, *dropout_offset_ptr = nullptr;
  std::array<int64_t, 4> index_base = {};
  bool deterministic = false, batch_invariant = false;
  int64_t num_splits = 0;
  TensorView status = {};
  const heed_executor* executor = nullptr;
  int32_t num_threads = 0;
  void* stream = nullptr;
  const heed_allocator* allocator = nullptr;
  const char* backend = nullptr;  // the one-call functions; a plan has its own
};

// What the backward pass writes; leave out what is not wanted.
struct AttentionGradients {
  TensorView dq = {}, dk = {}, dv = {}, dbias = {}, dsinks = {}, dalibi_slopes = {};
};

inline heed_attention_args attention_args(const TensorView& q, const TensorView& k, const TensorView& v,
                                          const TensorView& out, const AttentionOptions& options = {}) {
  heed_attention_args args;
  heed_attention_args_init(&args);
  args.q = q.tensor();
  args.k = k.tensor();
  args.v = v.tensor();
  args.out = out.tensor();
  args.lse = options.lse.tensor();
  args.layout_q = options.layout_q;
  args.layout_kv = options.layout_kv;
  args.causal = options.causal;
  args.has_softmax_scale = options.softmax_scale.has_value();
  args.softmax_scale = options.softmax_scale.value_or(0.0f);
  args.softcap = options.softcap;
  args.window_left = options.window_left;
  args.window_right = options.window_right;
  args.chunk = options.chunk;
  args.offset_kind = options.offset_kind;
  args.q_offset = options.q_offset;
  args.bias = options.bias.tensor();
  args.mask = options.mask.tensor();
  args.alibi_slopes = options.alibi_slopes.tensor();
  args.sinks = options.sinks.tensor();
  args.cu_seqlens_q = options.cu_seqlens_q.tensor();
  args.cu_seqlens_k = options.cu_seqlens_k.tensor();
  args.seqused_q = options.seqused_q.tensor();
  args.seqused_k = options.seqused_k.tensor();
  args.leftpad_k = options.leftpad_k.tensor();
  args.max_seqlen_q = options.max_seqlen_q;
  args.max_seqlen_k = options.max_seqlen_k;
  args.page_table = options.page_table.tensor();
  args.cache_batch_idx = options.cache_batch_idx.tensor();
  args.dropout_p = options.dropout_p;
  args.dropout_seed = options.dropout_seed;
  args.dropout_offset = options.dropout_offset;
  args.dropout_seed_ptr = options.dropout_seed_ptr;
  args.dropout_offset_ptr = options.dropout_offset_ptr;
  for (size_t i = 0; i < 4; ++i) args.index_base[i] = options.index_base[i];
  args.deterministic = options.deterministic;
  args.batch_invariant = options.batch_invariant;
  args.num_splits = options.num_splits;
  args.status = options.status.tensor();
  args.executor = options.executor;
  args.num_threads = options.num_threads;
  args.stream = options.stream;
  args.allocator = options.allocator;
  return args;
}

// options.lse is the forward pass's, and needed.
inline heed_attention_args attention_backward_args(const TensorView& q, const TensorView& k, const TensorView& v,
                                                   const TensorView& out, const TensorView& dout,
                                                   const AttentionGradients& gradients, const AttentionOptions& options,
                                                   const TensorView& dlse = {}) {
  heed_attention_args args = attention_args(q, k, v, out, options);
  args.pass = HEED_PASS_BACKWARD;
  args.dout = dout.tensor();
  args.dlse = dlse.tensor();
  args.dq = gradients.dq.tensor();
  args.dk = gradients.dk.tensor();
  args.dv = gradients.dv.tensor();
  args.dbias = gradients.dbias.tensor();
  args.dsinks = gradients.dsinks.tensor();
  args.dalibi_slopes = gradients.dalibi_slopes.tensor();
  return args;
}

namespace detail {

inline heed_plan_options plan_options(const char* backend) { return {sizeof(heed_plan_options), backend}; }

// Text by the C interface's size query.
template <class Query>
std::string text_of(Query query) {
  size_t needed = 0;
  check(query(nullptr, 0, &needed));
  std::string text(needed, '\0');
  check(query(text.data(), text.size(), &needed));
  text.resize(needed - 1);
  return text;
}

}  // namespace detail

// One call: plans through the cache, allocates the workspace, runs.
inline void attention(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& out,
                      const AttentionOptions& options = {}) {
  const heed_attention_args args = attention_args(q, k, v, out, options);
  const heed_plan_options plan = detail::plan_options(options.backend);
  check(heed_attention(&args, &plan));
}

inline void attention_backward(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& out,
                               const TensorView& dout, const AttentionGradients& gradients,
                               const AttentionOptions& options, const TensorView& dlse = {}) {
  const heed_attention_args args = attention_backward_args(q, k, v, out, dout, gradients, options, dlse);
  const heed_plan_options plan = detail::plan_options(options.backend);
  check(heed_attention(&args, &plan));
}

// What is asked, without pointers.
class Problem {
 public:
  static Problem parse(const std::string& line) {
    heed_problem* problem = nullptr;
    check(heed_problem_parse(line.c_str(), &problem));
    return Problem(problem);
  }
  static Problem of(const heed_attention_args& args) {
    heed_problem* problem = nullptr;
    check(heed_attention_problem(&args, &problem));
    return Problem(problem);
  }
  static Problem of(const heed_kv_append_args& args) {
    heed_problem* problem = nullptr;
    check(heed_kv_append_problem(&args, &problem));
    return Problem(problem);
  }

  std::string line() const {
    return detail::text_of([&](char* b, size_t n, size_t* needed) { return heed_problem_print(get(), b, n, needed); });
  }
  std::string op() const { return heed_problem_op(get()); }
  double flops() const { return heed_problem_flops(get()); }
  double bytes() const { return heed_problem_bytes(get()); }
  std::string explain(const char* backend = nullptr) const {
    const heed_plan_options options = detail::plan_options(backend);
    return detail::text_of(
        [&](char* b, size_t n, size_t* needed) { return heed_explain(get(), &options, b, n, needed); });
  }
  const heed_problem* get() const { return problem_.get(); }

 private:
  explicit Problem(heed_problem* problem) : problem_(problem, &heed_problem_destroy) {}
  std::unique_ptr<heed_problem, decltype(&heed_problem_destroy)> problem_;
};

// How it will be done. Any number of threads may run one plan at once, each with its own workspace.
class Plan {
 public:
  explicit Plan(const Problem& problem, const char* backend = nullptr)
      : plan_(create(problem, backend), &heed_plan_destroy) {}

  size_t workspace_bytes() const { return heed_plan_workspace_bytes(get()); }
  std::string impl() const { return heed_plan_impl(get()); }
  std::string text() const {
    return detail::text_of([&](char* b, size_t n, size_t* needed) { return heed_plan_print(get(), b, n, needed); });
  }
  // With args.workspace of workspace_bytes(), aligned to 64 bytes.
  void run(const heed_attention_args& args) const { check(heed_attention_run(get(), &args)); }
  void run(const heed_kv_append_args& args) const { check(heed_kv_append_run(get(), &args)); }
  const heed_plan* get() const { return plan_.get(); }

 private:
  static heed_plan* create(const Problem& problem, const char* backend) {
    const heed_plan_options options = detail::plan_options(backend);
    heed_plan* plan = nullptr;
    check(heed_plan_create(problem.get(), &options, &plan));
    return plan;
  }
  std::unique_ptr<heed_plan, decltype(&heed_plan_destroy)> plan_;
};

// heed_warm: compiles the GPU kernels that the problems launch and keeps them in the cache on disk. arch as in
// heed_warm_options: "sm_90a", or nullptr for the GPU that each problem names.
inline heed_warm_result warm(std::span<const Problem> problems, const char* arch = nullptr,
                             const heed_executor* executor = nullptr) {
  std::vector<const heed_problem*> handles;
  for (const Problem& problem : problems) handles.push_back(problem.get());
  heed_warm_options options = {};
  options.struct_size = sizeof options;
  options.arch = arch;
  options.executor = executor;
  heed_warm_result result = {};
  result.struct_size = sizeof result;
  check(heed_warm(handles.data(), static_cast<int32_t>(handles.size()), &options, &result));
  return result;
}

// Options of kv_append; names and meanings are those of heed_kv_append_args.
struct KvAppendOptions {
  int32_t layout_new = HEED_LAYOUT_BSHD;
  int32_t layout_cache = HEED_LAYOUT_BSHD;
  TensorView k_new = {}, v_new = {};
  TensorView q = {}, q_out = {};
  TensorView rotary_cos = {}, rotary_sin = {};
  int32_t rotary_style = HEED_ROTARY_HALF;
  bool q_per_position = false;  // query i at the first new position + i, for causal and windowed attention
  TensorView cu_seqlens_new = {}, cu_seqlens_q = {}, rotary_seqlens = {}, leftpad_k = {};
  TensorView page_table = {}, cache_batch_idx = {}, status = {};
  const heed_executor* executor = nullptr;
  int32_t num_threads = 0;
  void* stream = nullptr;
  const heed_allocator* allocator = nullptr;
  const char* backend = nullptr;  // the one-call function; a plan has its own
};

inline heed_kv_append_args kv_append_args(const TensorView& k_cache, const TensorView& v_cache,
                                          const TensorView& cache_seqlens, const KvAppendOptions& options) {
  heed_kv_append_args args;
  heed_kv_append_args_init(&args);
  args.k_cache = k_cache.tensor();
  args.v_cache = v_cache.tensor();
  args.cache_seqlens = cache_seqlens.tensor();
  args.layout_new = options.layout_new;
  args.layout_cache = options.layout_cache;
  args.k_new = options.k_new.tensor();
  args.v_new = options.v_new.tensor();
  args.q = options.q.tensor();
  args.q_out = options.q_out.tensor();
  args.rotary_cos = options.rotary_cos.tensor();
  args.rotary_sin = options.rotary_sin.tensor();
  args.rotary_style = options.rotary_style;
  args.q_positions = options.q_per_position ? 1 : 0;
  args.cu_seqlens_new = options.cu_seqlens_new.tensor();
  args.cu_seqlens_q = options.cu_seqlens_q.tensor();
  args.rotary_seqlens = options.rotary_seqlens.tensor();
  args.leftpad_k = options.leftpad_k.tensor();
  args.page_table = options.page_table.tensor();
  args.cache_batch_idx = options.cache_batch_idx.tensor();
  args.status = options.status.tensor();
  args.executor = options.executor;
  args.num_threads = options.num_threads;
  args.stream = options.stream;
  args.allocator = options.allocator;
  return args;
}

inline void kv_append(const TensorView& k_cache, const TensorView& v_cache, const TensorView& cache_seqlens,
                      const KvAppendOptions& options) {
  const heed_kv_append_args args = kv_append_args(k_cache, v_cache, cache_seqlens, options);
  const heed_plan_options plan = detail::plan_options(options.backend);
  check(heed_kv_append(&args, &plan));
}

}  // namespace heed
#endif  // HEED_HEED_HPP
