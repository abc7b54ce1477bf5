#include "capi_tensors.h"

#include <algorithm>
#include <string>

#include "base/dtype.h"
#include "base/format.h"
#include "base/threads.h"
#include "capi_handles.h"
#include "cuda/device.h"

namespace heed {
namespace {

constexpr std::array<std::string_view, static_cast<size_t>(Dim::kCount)> kDimNames = {
    "batch",      "total_q",   "total_k",    "total_new",   "seqlen_q",      "seqlen_k",
    "seqlen_new", "nheads_q",  "nheads_kv",  "head_dim",    "head_dim_v",    "num_pages",
    "page_size",  "max_pages", "cache rows", "rotary rows", "rotary_dim / 2"};

std::string shape_words(std::initializer_list<Dim> dims) {
  std::string text;
  for (const Dim dim : dims) {
    text += heed::format("{}{}", text.empty() ? "" : ", ", kDimNames[static_cast<size_t>(dim)]);
  }
  return "[" + text + "]";
}

Status check_ndim(const char* name, const heed_tensor& tensor, std::initializer_list<Dim> dims) {
  if (tensor.ndim != static_cast<int32_t>(dims.size())) {
    return invalid_argument(
        heed::format("{}.ndim = {}: must be {}, {}", name, tensor.ndim, dims.size(), shape_words(dims)));
  }
  return check_tensor(name, tensor, tensor.ndim);
}

}  // namespace

Status check_tensor(const char* name, const heed_tensor& tensor, int32_t ndim) {
  if (tensor.dtype < HEED_DTYPE_F32 || tensor.dtype > HEED_DTYPE_BOOL) {
    return invalid_argument(heed::format("{}.dtype = {}: must be from {} (f32) to {} (bool), or 0 if there is none",
                                         name, tensor.dtype, HEED_DTYPE_F32, HEED_DTYPE_BOOL));
  }
  if (tensor.ndim != ndim) return invalid_argument(heed::format("{}.ndim = {}: must be {}", name, tensor.ndim, ndim));
  for (int32_t i = 0; i < ndim; ++i) {
    if (tensor.shape[i] < 0) {
      return invalid_argument(heed::format("{}.shape[{}] = {}: must not be negative", name, i, tensor.shape[i]));
    }
    if (tensor.stride[i] < 0 && tensor.shape[i] > 1) {
      return invalid_argument(heed::format("{}.stride[{}] = {}: must not be negative", name, i, tensor.stride[i]));
    }
  }
  return {};
}

Status check_dtype(const char* name, const heed_tensor& tensor, Dtype want) {
  if (tensor.dtype == static_cast<int32_t>(want)) return {};
  const auto has = static_cast<Dtype>(tensor.dtype);
  return invalid_argument(heed::format("{}.dtype = {}: must be {}", name, dtype_name(has), dtype_name(want)));
}

Status check_contiguous(const char* name, const heed_tensor& tensor) {
  int64_t want = 1;
  bool empty = false;
  for (int32_t i = 0; i < tensor.ndim; ++i) empty = empty || tensor.shape[i] == 0;
  for (int32_t i = tensor.ndim - 1; i >= 0 && !empty; --i) {
    if (tensor.shape[i] > 1 && tensor.stride[i] != want) {
      return invalid_argument(
          heed::format("{}.stride[{}] = {}: must be {}, {} is contiguous", name, i, tensor.stride[i], want, name));
    }
    want *= tensor.shape[i];
  }
  return {};
}

Status required(const char* name, const heed_tensor& tensor, const char* why) {
  if (present(tensor)) return {};
  return invalid_argument(heed::format("{}: absent (dtype none); {}", name, why));
}

Status absent(const char* name, const heed_tensor& tensor, const char* why) {
  if (!present(tensor)) return {};
  return invalid_argument(
      heed::format("{}: given (dtype {}); {}", name, dtype_name(static_cast<Dtype>(tensor.dtype)), why));
}

Status check_enum(const char* name, int32_t value, int32_t count, const char* allowed) {
  if (value >= 0 && value < count) return {};
  return invalid_argument(heed::format("{} = {}: must be {}", name, value, allowed));
}

Status Extents::agree(const char* name, int index, int64_t extent, Dim dim, int32_t one_less) {
  Source& known = source(dim);
  if (known.tensor == nullptr) {
    known = {extent - one_less, name, index, one_less};
    return {};
  }
  if (known.value == extent - one_less) return {};
  const std::string_view word = kDimNames[static_cast<size_t>(dim)];
  const int32_t more = one_less - known.one_less;
  return invalid_argument(heed::format("{}.shape[{}] = {}: must equal {}.shape[{}]{} = {} ({})", name, index, extent,
                                       known.tensor, known.index,
                                       more > 0   ? " + 1"
                                       : more < 0 ? " - 1"
                                                  : "",
                                       known.value + one_less, word));
}

Status Extents::bind(const char* name, const heed_tensor& tensor, std::initializer_list<Dim> dims,
                     bool any_last_stride) {
  HEED_RETURN_IF_ERROR(check_ndim(name, tensor, dims));
  int index = 0;
  for (const Dim dim : dims) {
    HEED_RETURN_IF_ERROR(agree(name, index, tensor.shape[index], dim, 0));
    ++index;
  }
  const int last = index - 1;
  const bool empty = std::any_of(tensor.shape, tensor.shape + index, [](int64_t extent) { return extent == 0; });
  if (!any_last_stride && tensor.shape[last] > 1 && !empty && tensor.stride[last] != 1) {
    return invalid_argument(heed::format("{}.stride[{}] = {}: must be 1, elements of the last dimension are neighbours",
                                         name, last, tensor.stride[last]));
  }
  return {};
}

Status Extents::bind_broadcast(const char* name, const heed_tensor& tensor, std::initializer_list<Dim> dims) {
  HEED_RETURN_IF_ERROR(check_ndim(name, tensor, dims));
  int index = 0;
  for (const Dim dim : dims) {
    if (tensor.shape[index] != 1) HEED_RETURN_IF_ERROR(agree(name, index, tensor.shape[index], dim, 0));
    ++index;
  }
  const int last = index - 1;
  if (tensor.shape[last] > 1 && tensor.stride[last] > 1) {
    return invalid_argument(
        heed::format("{}.stride[{}] = {}: must be 1, or 0 to broadcast", name, last, tensor.stride[last]));
  }
  return {};
}

Status Extents::bind_offsets(const char* name, const heed_tensor& tensor) {
  HEED_RETURN_IF_ERROR(check_tensor(name, tensor, 1));
  HEED_RETURN_IF_ERROR(check_dtype(name, tensor, Dtype::kI32));
  HEED_RETURN_IF_ERROR(check_contiguous(name, tensor));
  if (tensor.shape[0] < 1) return invalid_argument(heed::format("{}.shape[0] = 0: must be batch + 1", name));
  return agree(name, 0, tensor.shape[0], Dim::kBatch, 1);
}

Status check_batch_vector(const char* name, const heed_tensor& tensor, Extents& extents) {
  if (!present(tensor)) return {};
  HEED_RETURN_IF_ERROR(extents.bind(name, tensor, {Dim::kBatch}));
  return check_dtype(name, tensor, Dtype::kI32);
}

Status resolve_executor(const heed_executor*& executor, int32_t num_threads, int32_t& threads) {
  if (num_threads < 0) return invalid_argument(heed::format("num_threads = {}: must not be negative", num_threads));
  if (executor == nullptr) {
    executor = &pool_executor();
  } else {
    HEED_RETURN_IF_ERROR(check_struct(executor, "executor"));
    if (executor->run == nullptr) return invalid_argument("executor.run = NULL: must be a function");
    if (executor->num_threads < 1) {
      return invalid_argument(heed::format("executor.num_threads = {}: must be at least 1", executor->num_threads));
    }
  }
  threads = num_threads == 0 ? executor->num_threads : std::min(num_threads, executor->num_threads);
  return {};
}

Status resolve_device(int32_t device_index, int32_t num_threads, int32_t& resolved, const char* name) {
  if (num_threads != 0) {
    return invalid_argument(
        heed::format("num_threads = {}: must be 0 with device 1 (cuda): threads are the CPU's", num_threads));
  }
  if (device_index < -1 || device_index > kMaxDeviceIndex) {
    return invalid_argument(
        heed::format("{} = {}: must be -1 (the current one) or from 0 to {}", name, device_index, kMaxDeviceIndex));
  }
  resolved = device_index == -1 ? cuda::current_device() : device_index;
  return {};
}

std::array<int64_t, 4> strides_bhsd(const heed_tensor& tensor, Layout layout) {
  const int64_t* s = tensor.stride;
  switch (layout) {
    case Layout::kBshd: return {s[0], s[2], s[1], s[3]};
    case Layout::kBhsd: return {s[0], s[1], s[2], s[3]};
    case Layout::kThd: break;
  }
  return {0, s[1], s[0], s[2]};
}

}  // namespace heed
