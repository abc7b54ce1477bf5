#include "check/host_copies.h"

#include <string_view>
#include <utility>

#include "base/dtype.h"
#include "base/format.h"
#include "check/arg_tensors.h"
#include "cuda/memory.h"

namespace heed::check {
namespace {

constexpr uintptr_t kMaxAlign = 128;

bool is_index(std::string_view name) {
  constexpr std::string_view kNames[] = {"cu_seqlens_q",   "cu_seqlens_k",   "cu_seqlens_new", "seqused_q",
                                         "seqused_k",      "leftpad_k",      "cache_seqlens",  "page_table",
                                         "rotary_seqlens", "cache_batch_idx"};
  for (const std::string_view index : kNames) {
    if (name == index) return true;
  }
  return false;
}

}  // namespace

Status HostCopies::copy_bytes(const void*& pointer, size_t bytes, const char* name) {
  std::vector<unsigned char>& memory = memory_.emplace_back(bytes + kMaxAlign);
  const auto host = reinterpret_cast<uintptr_t>(memory.data()), device = reinterpret_cast<uintptr_t>(pointer);
  unsigned char* const copy = memory.data() + (device - host) % kMaxAlign;
  const Status status = cuda::copy_to_host(device_index_, copy, pointer, bytes);
  if (!status.ok()) return {status.code(), heed::format("{}: {}", name, status.message())};
  pointer = copy;
  return {};
}

Status HostCopies::copy_tensor(heed_tensor& tensor, const char* name) {
  if (tensor.dtype == HEED_DTYPE_NONE || tensor.data == nullptr) return {};
  int64_t last = 0;
  for (int32_t dim = 0; dim < tensor.ndim; ++dim) {
    if (tensor.shape[dim] == 0) return {};
    last += (tensor.shape[dim] - 1) * tensor.stride[dim];
  }
  const void* data = tensor.data;
  const auto width = static_cast<size_t>(dtype_bytes(static_cast<Dtype>(tensor.dtype)));
  HEED_RETURN_IF_ERROR(copy_bytes(data, static_cast<size_t>(last + 1) * width, name));
  tensor.data = const_cast<void*>(data);  // the copy's, which is ours
  return {};
}

template <class Args>
Status HostCopies::copy(Args& args, int32_t device_index, const char* call, bool indices_only) {
  if (args.device != HEED_DEVICE_CUDA) return {};
  device_index_ = device_index;
  HEED_RETURN_IF_ERROR(cuda::refuse_capture(device_index, args.stream, call));
  HEED_RETURN_IF_ERROR(cuda::synchronize(device_index, args.stream));
  Status status;
  for_each_tensor(args, [&](const char* name, heed_tensor& tensor) {
    if (status.ok() && (!indices_only || is_index(name))) status = copy_tensor(tensor, name);
  });
  return status;
}

Status HostCopies::all(heed_attention_args& args, int32_t device_index, const char* call) {
  HEED_RETURN_IF_ERROR(copy(args, device_index, call, false));
  if (args.device != HEED_DEVICE_CUDA) return {};
  for (const auto& [name, pointer] : {std::pair("dropout_seed_ptr", &args.dropout_seed_ptr),
                                      std::pair("dropout_offset_ptr", &args.dropout_offset_ptr)}) {
    if (*pointer == nullptr) continue;
    const void* number = *pointer;
    HEED_RETURN_IF_ERROR(copy_bytes(number, sizeof(uint64_t), name));
    *pointer = static_cast<const uint64_t*>(number);
  }
  return {};
}

Status HostCopies::all(heed_kv_append_args& args, int32_t device_index, const char* call) {
  return copy(args, device_index, call, false);
}

Status HostCopies::indices(heed_attention_args& args, int32_t device_index, const char* call) {
  return copy(args, device_index, call, true);
}

Status HostCopies::indices(heed_kv_append_args& args, int32_t device_index, const char* call) {
  return copy(args, device_index, call, true);
}

}  // namespace heed::check
