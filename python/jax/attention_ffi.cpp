// heed for JAX: one XLA FFI handler a platform, for both passes. Built where jaxlib's headers are installed; uses neither
// Python nor jaxlib's libraries, so that one file serves all versions of both.
//
// Operands and results come in the order of kAttentionTensors, those whose bits are set in `inputs` and `outputs`; XLA's
// buffers are dense. python/heed/jax.py fills the attributes.
#include <xla/ffi/api/ffi.h>

#include <cmath>
#include <string>
#include <string_view>

#include "../core/tensor_names.h"
#include "heed/heed.h"

namespace heed_jax {
namespace {

namespace ffi = xla::ffi;
using heed_python::kAttentionTensors;

// The integers of a call, in the order of heed.jax's _NUMBERS.
enum Number : size_t {
  kPass,
  kLayoutQ,
  kLayoutKv,
  kCausal,
  kOffsetKind,
  kQOffset,
  kWindowLeft,
  kWindowRight,
  kChunk,
  kMaxSeqlenQ,
  kMaxSeqlenK,
  kNumSplits,
  kDeterministic,
  kBatchInvariant,
  kNumThreads,
  kHasScale,
  kHasSeed,
  kInputs,
  kOutputs,
  kNumNumbers
};
enum Real : size_t { kSoftmaxScale, kSoftcap, kDropoutP, kNumReals };

ffi::Error error_of(heed_status status) {
  static constexpr ffi::ErrorCode kCodes[] = {
      ffi::ErrorCode::kOk,       ffi::ErrorCode::kInvalidArgument,   ffi::ErrorCode::kUnimplemented,
      ffi::ErrorCode::kNotFound, ffi::ErrorCode::kResourceExhausted, ffi::ErrorCode::kFailedPrecondition,
      ffi::ErrorCode::kInternal};
  return ffi::Error(kCodes[status], heed_last_error());
}

heed_dtype dtype_of(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::DataType::F32: return HEED_DTYPE_F32;
    case ffi::DataType::F16: return HEED_DTYPE_F16;
    case ffi::DataType::BF16: return HEED_DTYPE_BF16;
    case ffi::DataType::F64: return HEED_DTYPE_F64;
    case ffi::DataType::S32: return HEED_DTYPE_I32;
    case ffi::DataType::PRED: return HEED_DTYPE_BOOL;
    default: return HEED_DTYPE_NONE;
  }
}

ffi::Error set_tensor(const ffi::AnyBuffer& buffer, const char* name, heed_tensor& tensor) {
  const auto shape = buffer.dimensions();
  tensor.dtype = dtype_of(buffer.element_type());
  if (tensor.dtype == HEED_DTYPE_NONE || shape.size() > HEED_MAX_DIMS) {
    return ffi::Error(ffi::ErrorCode::kInvalidArgument,
                      std::string(name) + ": a dtype or a number of dimensions that no tensor of heed has");
  }
  tensor.data = buffer.untyped_data();
  tensor.ndim = static_cast<int32_t>(shape.size());
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    tensor.shape[i] = shape[i];
    tensor.stride[i] = stride;
    stride *= shape[i] > 0 ? shape[i] : 1;
  }
  return ffi::Error::Success();
}

void set_numbers(ffi::Span<const int64_t> numbers, ffi::Span<const double> reals, heed_attention_args& args) {
  args.pass = static_cast<int32_t>(numbers[kPass]);
  args.layout_q = static_cast<int32_t>(numbers[kLayoutQ]);
  args.layout_kv = static_cast<int32_t>(numbers[kLayoutKv]);
  args.causal = numbers[kCausal] != 0;
  args.offset_kind = static_cast<int32_t>(numbers[kOffsetKind]);
  args.q_offset = numbers[kQOffset];
  args.window_left = numbers[kWindowLeft];
  args.window_right = numbers[kWindowRight];
  args.chunk = numbers[kChunk];
  args.max_seqlen_q = numbers[kMaxSeqlenQ];
  args.max_seqlen_k = numbers[kMaxSeqlenK];
  args.num_splits = numbers[kNumSplits];
  args.deterministic = numbers[kDeterministic] != 0;
  args.batch_invariant = numbers[kBatchInvariant] != 0;
  args.num_threads = static_cast<int32_t>(numbers[kNumThreads]);
  args.has_softmax_scale = numbers[kHasScale] != 0;
  args.softmax_scale = static_cast<float>(reals[kSoftmaxScale]);
  args.softcap = static_cast<float>(reals[kSoftcap]);
  args.dropout_p = static_cast<float>(reals[kDropoutP]);
}

ffi::Error run(heed_device device, int32_t device_index, void* stream, ffi::RemainingArgs operands,
               ffi::RemainingRets results, ffi::Span<const int64_t> numbers, ffi::Span<const double> reals,
               std::string_view backend) {
  if (numbers.size() != kNumNumbers || reals.size() != kNumReals) {
    return ffi::Error(ffi::ErrorCode::kInvalidArgument,
                      "numbers, reals: not those that this version of heed.jax passes");
  }
  heed_attention_args args;
  heed_attention_args_init(&args);
  set_numbers(numbers, reals, args);
  args.device = device;
  args.device_index = device_index;
  args.stream = stream;
  size_t operand = 0, result = 0, field_index = 0;
  for (const auto& field : kAttentionTensors) {
    const int64_t bit = int64_t{1} << field_index++;
    if (numbers[kInputs] & bit) {
      const auto buffer = operands.get<ffi::AnyBuffer>(operand++);
      if (!buffer.has_value()) return buffer.error();
      if (ffi::Error error = set_tensor(*buffer, field.name, args.*field.member); error.failure()) return error;
    } else if (numbers[kOutputs] & bit) {
      auto buffer = results.get<ffi::AnyBuffer>(result++);
      if (!buffer.has_value()) return buffer.error();
      if (ffi::Error error = set_tensor(**buffer, field.name, args.*field.member); error.failure()) return error;
    }
  }
  if (numbers[kHasSeed] != 0) {  // uint32 [4]: seed low, high, offset low, high
    const auto buffer = operands.get<ffi::AnyBuffer>(operand);
    if (!buffer.has_value()) return buffer.error();
    const auto* words = static_cast<const uint64_t*>(buffer->untyped_data());
    args.dropout_seed_ptr = words;
    args.dropout_offset_ptr = words + 1;
  }
  const std::string name(backend);
  heed_plan_options options = {sizeof(heed_plan_options), name.empty() ? nullptr : name.c_str()};
  const heed_status status = heed_attention(&args, &options);
  return status == HEED_OK ? ffi::Error::Success() : error_of(status);
}

ffi::Error run_cpu(ffi::RemainingArgs operands, ffi::RemainingRets results, ffi::Span<const int64_t> numbers,
                   ffi::Span<const double> reals, std::string_view backend) {
  return run(HEED_DEVICE_CPU, 0, nullptr, operands, results, numbers, reals, backend);
}

ffi::Error run_cuda(void* stream, int32_t device_index, ffi::RemainingArgs operands, ffi::RemainingRets results,
                    ffi::Span<const int64_t> numbers, ffi::Span<const double> reals, std::string_view backend) {
  return run(HEED_DEVICE_CUDA, device_index, stream, operands, results, numbers, reals, backend);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* heed_jax_attention_cpu(XLA_FFI_CallFrame* call_frame);
extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* heed_jax_attention_cuda(XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(heed_jax_attention_cpu, run_cpu,
                              ffi::Ffi::Bind()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<ffi::Span<const int64_t>>("numbers")
                                  .Attr<ffi::Span<const double>>("reals")
                                  .Attr<std::string_view>("backend"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(heed_jax_attention_cuda, run_cuda,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<void*>>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<ffi::Span<const int64_t>>("numbers")
                                  .Attr<ffi::Span<const double>>("reals")
                                  .Attr<std::string_view>("backend"));

}  // namespace heed_jax
