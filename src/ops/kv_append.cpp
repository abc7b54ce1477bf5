#include "ops/kv_append.h"

#include "base/format.h"
#include "ops/tensor_layout.h"

namespace heed {
namespace {

constexpr int64_t kMaxHeadDim = 512;
constexpr std::array<int, 4> kOrderBhsd = {0, 1, 2, 3};
constexpr std::array<int, 4> kOrderBshd = {0, 2, 1, 3};

bool is_cache(KvSlot slot) { return slot == KvSlot::kKCache || slot == KvSlot::kVCache; }
bool is_table(KvSlot slot) { return slot == KvSlot::kCos || slot == KvSlot::kSin; }

int64_t cache_rows(const KvAppendProblem& p) { return p.cache_batch > 0 ? p.cache_batch : p.batch; }

// Rows of k_new and of q over all sequences (0 where absent), as double: their product with the rest may pass 64 bits.
double new_rows(const KvAppendProblem& p) {
  if (p.packed()) return static_cast<double>(p.total_new);
  return static_cast<double>(p.batch) * static_cast<double>(p.seqlen_new);
}

double q_rows(const KvAppendProblem& p) {
  if (p.packed()) return static_cast<double>(p.total_q);
  return static_cast<double>(p.batch) * static_cast<double>(p.seqlen_q);
}

uint8_t slot_dims(const KvAppendProblem& p, KvSlot slot) {
  if (slot == KvSlot::kPageTable) return kDims2;
  if (is_table(slot)) return 0b1100;
  return p.packed() && !is_cache(slot) ? kDims4 & ~1 : kDims4;
}

TensorLayout slot_layout(const KvAppendProblem& p, KvSlot slot) {
  TensorLayout tensor;
  tensor.name = slot_name(slot);
  tensor.dtype = slot_dtype(p, slot);
  tensor.shape = slot_shape(p, slot);
  tensor.stride = p.strides(slot);
  tensor.dims = slot_dims(p, slot);
  tensor.inner = slot == KvSlot::kPageTable ? 1 : 3;
  tensor.output = is_cache(slot) || slot == KvSlot::kQOut;
  return tensor;
}

Status check_enums(const KvAppendProblem& p) {
  if (!is_float(p.dtype)) {
    return invalid_argument(heed::format("dtype = {} must be f32, f16, bf16 or f64", dtype_name(p.dtype)));
  }
  if (static_cast<uint32_t>(p.layout_new) > 2) {
    return invalid_argument(
        heed::format("layout_new = {} must be 0 (bshd), 1 (bhsd) or 2 (thd)", static_cast<int32_t>(p.layout_new)));
  }
  if (static_cast<uint32_t>(p.layout_cache) > 1) {
    return invalid_argument(
        heed::format("layout_cache = {} must be 0 (bshd) or 1 (bhsd)", static_cast<int32_t>(p.layout_cache)));
  }
  HEED_RETURN_IF_ERROR(check_device(p.device, p.device_index, p.threads));
  if (static_cast<uint32_t>(p.rotary_style) > 1) {
    return invalid_argument(
        heed::format("rotary_style = {} must be 0 (half) or 1 (interleaved)", static_cast<int32_t>(p.rotary_style)));
  }
  return {};
}

Status check_sizes(const KvAppendProblem& p) {
  HEED_RETURN_IF_ERROR(check_range("batch", p.batch, 0, kMaxExtent));
  HEED_RETURN_IF_ERROR(check_range("nheads_q", p.nheads_q, 0, kMaxExtent));
  HEED_RETURN_IF_ERROR(check_range("nheads_kv", p.nheads_kv, 1, kMaxExtent));
  if (p.nheads_q % p.nheads_kv != 0) {
    return invalid_argument(
        heed::format("nheads_q = {} must be a multiple of nheads_kv = {}", p.nheads_q, p.nheads_kv));
  }
  const bool dense_q = p.has_q();
  HEED_RETURN_IF_ERROR(check_range("seqlen_q", p.seqlen_q, 0, dense_q ? kMaxExtent : 0));
  HEED_RETURN_IF_ERROR(check_range("seqlen_new", p.seqlen_new, 0, p.append ? kMaxExtent : 0));
  HEED_RETURN_IF_ERROR(check_range("seqlen_k", p.seqlen_k, 0, kMaxExtent));
  HEED_RETURN_IF_ERROR(check_range("total_q", p.total_q, 0, p.packed() && p.has_q() ? kMaxExtent : 0));
  HEED_RETURN_IF_ERROR(check_range("total_new", p.total_new, 0, p.packed() && p.append ? kMaxExtent : 0));
  HEED_RETURN_IF_ERROR(check_range("head_dim", p.head_dim, 1, kMaxHeadDim));
  HEED_RETURN_IF_ERROR(check_range("head_dim_v", p.head_dim_v, 1, kMaxHeadDim));
  HEED_RETURN_IF_ERROR(check_range("page_size", p.page_size, 0, kMaxExtent));
  HEED_RETURN_IF_ERROR(check_range("num_pages", p.num_pages, 0, p.paged() ? kMaxExtent : 0));
  HEED_RETURN_IF_ERROR(check_range("cache_batch", p.cache_batch, 0, kMaxExtent));
  if (p.paged() && p.seqlen_k % p.page_size != 0) {
    return invalid_argument(heed::format(
        "seqlen_k = {} must be a multiple of page_size = {}: a capacity is whole pages", p.seqlen_k, p.page_size));
  }
  return {};
}

Status check_rotary(const KvAppendProblem& p) {
  HEED_RETURN_IF_ERROR(check_range("rotary_dim", p.rotary_dim, 0, p.head_dim));
  if (p.rotary_dim % 2 != 0) return invalid_argument(heed::format("rotary_dim = {} must be even", p.rotary_dim));
  HEED_RETURN_IF_ERROR(check_range("rotary_rows", p.rotary_rows, 0, p.rotary() ? kMaxExtent : 0));
  if (p.rotary() ? p.rotary_dtype != Dtype::kF32 && p.rotary_dtype != p.dtype : p.rotary_dtype != Dtype::kNone) {
    return invalid_argument(heed::format("rotary_dtype = {} must be {}", dtype_name(p.rotary_dtype),
                                         p.rotary() ? heed::format("f32 or {} (as the cache)", dtype_name(p.dtype))
                                                    : std::string("none without rotary")));
  }
  if (!p.rotary() && p.rotary_style != RotaryStyle::kHalf) {
    return invalid_argument("rotary_style = 1 (interleaved) must be 0 without rotary");
  }
  if (!p.rotary() && p.rotary_seqlens) {
    return invalid_argument("rotary_seqlens must be absent without rotary: nothing is turned");
  }
  if (!p.rotary() && p.has_q()) {
    return invalid_argument("q must be absent without rotary: nothing is turned");
  }
  if (p.q_per_position && !p.has_q()) {
    return invalid_argument("q_per_position = 1 must be 0 without q");
  }
  return {};
}

}  // namespace

std::string_view slot_name(KvSlot slot) {
  static constexpr std::array<std::string_view, kNumKvSlots> kNames = {
      "k_new", "v_new", "k_cache", "v_cache", "q", "q_out", "rotary_cos", "rotary_sin", "page_table"};
  return kNames[static_cast<int>(slot)];
}

bool has_slot(const KvAppendProblem& p, KvSlot slot) {
  switch (slot) {
    case KvSlot::kKNew:
    case KvSlot::kVNew: return p.append;
    case KvSlot::kKCache:
    case KvSlot::kVCache: return true;  // without append they still state the capacity
    case KvSlot::kQ:
    case KvSlot::kQOut: return p.has_q();
    case KvSlot::kCos:
    case KvSlot::kSin: return p.rotary();
    case KvSlot::kPageTable: return p.paged();
    case KvSlot::kCount: break;
  }
  return false;
}

Dtype slot_dtype(const KvAppendProblem& p, KvSlot slot) {
  if (!has_slot(p, slot)) return Dtype::kNone;
  if (slot == KvSlot::kPageTable) return Dtype::kI32;
  return is_table(slot) ? p.rotary_dtype : p.dtype;
}

std::array<int64_t, 4> slot_shape(const KvAppendProblem& p, KvSlot slot) {
  const int64_t rows = p.packed() ? 1 : p.batch;
  switch (slot) {
    case KvSlot::kKNew:
    case KvSlot::kVNew:
      return {rows, p.nheads_kv, p.packed() ? p.total_new : p.seqlen_new,
              slot == KvSlot::kKNew ? p.head_dim : p.head_dim_v};
    case KvSlot::kKCache:
    case KvSlot::kVCache: {
      const int64_t last = slot == KvSlot::kKCache ? p.head_dim : p.head_dim_v;
      if (p.paged()) return {p.num_pages, p.nheads_kv, p.page_size, last};
      return {cache_rows(p), p.nheads_kv, p.seqlen_k, last};
    }
    case KvSlot::kQ:
    case KvSlot::kQOut: return {rows, p.nheads_q, p.packed() ? p.total_q : p.seqlen_q, p.head_dim};
    case KvSlot::kCos:
    case KvSlot::kSin: return {1, 1, p.rotary_rows, p.rotary_dim / 2};
    case KvSlot::kPageTable: return {cache_rows(p), p.paged() ? p.seqlen_k / p.page_size : 0, 1, 1};
    case KvSlot::kCount: break;
  }
  return {1, 1, 1, 1};
}

std::array<int64_t, 4> contiguous_strides(const KvAppendProblem& p, KvSlot slot) {
  if (!has_slot(p, slot)) return {};
  const Layout layout = is_cache(slot) ? p.layout_cache : p.layout_new;
  const bool sequence_first = layout != Layout::kBhsd && slot != KvSlot::kPageTable;
  return packed_strides(slot_shape(p, slot), slot_dims(p, slot), sequence_first ? kOrderBshd : kOrderBhsd);
}

int32_t natural_align(const KvAppendProblem& p, KvSlot slot, const void* address) {
  return has_slot(p, slot) ? natural_align(slot_layout(p, slot), address) : 0;
}

Status validate(const KvAppendProblem& p) {
  HEED_RETURN_IF_ERROR(check_enums(p));
  HEED_RETURN_IF_ERROR(check_sizes(p));
  HEED_RETURN_IF_ERROR(check_rotary(p));
  if (!p.append && !p.has_q()) {
    return invalid_argument("one of k_new (with v_new) and q must be present: nothing to append and nothing to turn");
  }
  for (int i = 0; i < kNumKvSlots; ++i) {
    const KvSlot slot = static_cast<KvSlot>(i);
    if (has_slot(p, slot)) {
      HEED_RETURN_IF_ERROR(check_layout(slot_layout(p, slot), p.align[i]));
    } else if (p.align[i] != 0 || p.stride[i] != std::array<int64_t, 4>{}) {
      return invalid_argument(
          heed::format("strides and align of {} must be 0: the problem does not have it", slot_name(slot)));
    }
  }
  return {};
}

Status validate(const KvAppendProblem& p, const KvAppendArgs& args, size_t workspace_bytes) {
  const std::array<const void*, kNumKvSlots> pointers = {args.k_new,      args.v_new,      args.k_cache,
                                                         args.v_cache,    args.q,          args.q_out,
                                                         args.rotary_cos, args.rotary_sin, args.page_table};
  for (int i = 0; i < kNumKvSlots; ++i) {
    const KvSlot slot = static_cast<KvSlot>(i);
    if (pointers[i] == nullptr) {
      if (p.align[i] != 0 && has_elements(slot_shape(p, slot))) return missing_pointer(slot_name(slot));
    } else if (p.align[i] == 0) {
      return unexpected_pointer(slot_name(slot));
    } else if ((reinterpret_cast<uintptr_t>(pointers[i]) & static_cast<uintptr_t>(p.align[i] - 1)) != 0) {
      return misaligned_pointer(slot_name(slot), pointers[i], p.align[i]);
    }
  }
  struct Vector {
    std::string_view name;
    const void* pointer;
    bool present;
    bool empty;
  };
  const bool no_sequences = p.batch == 0;
  const Vector vectors[] = {
      {"cu_seqlens_new", args.cu_seqlens_new, p.packed() && p.append, false},
      {"cu_seqlens_q", args.cu_seqlens_q, p.packed() && p.has_q(), false},
      {"cache_seqlens", args.cache_seqlens, true, no_sequences},
      {"rotary_seqlens", args.rotary_seqlens, p.rotary_seqlens, no_sequences},
      {"leftpad_k", args.leftpad_k, p.leftpad, no_sequences},
      {"cache_batch_idx", args.cache_batch_idx, p.cache_batch > 0, no_sequences},
  };
  for (const Vector& vector : vectors) {
    if (vector.pointer == nullptr) {
      if (vector.present && !vector.empty) return missing_pointer(vector.name);
    } else if (!vector.present) {
      return unexpected_pointer(vector.name);
    } else if (reinterpret_cast<uintptr_t>(vector.pointer) % sizeof(int32_t) != 0) {
      return misaligned_pointer(vector.name, vector.pointer, sizeof(int32_t));
    }
  }
  if (reinterpret_cast<uintptr_t>(args.status) % sizeof(int32_t) != 0) {
    return misaligned_pointer("status", args.status, sizeof(int32_t));
  }
  if (args.executor == nullptr) return invalid_argument("executor = NULL must be an address");
  return check_workspace(args.workspace, args.workspace_bytes, workspace_bytes);
}

double flops(const KvAppendProblem& p) {
  // A turned pair (x, y) is x cos - y sin, x sin + y cos: 3 operations an element.
  return 3.0 * static_cast<double>(p.rotary_dim) *
         (new_rows(p) * static_cast<double>(p.nheads_kv) + q_rows(p) * static_cast<double>(p.nheads_q));
}

double bytes(const KvAppendProblem& p) {
  const double element = static_cast<double>(dtype_bytes(p.dtype));
  const double sequences = static_cast<double>(p.batch);
  const double dims = static_cast<double>(p.head_dim + p.head_dim_v);
  const double kv = 2.0 * new_rows(p) * static_cast<double>(p.nheads_kv) * dims;
  const double q = 2.0 * q_rows(p) * static_cast<double>(p.nheads_q) * static_cast<double>(p.head_dim);
  const double turned_rows = p.append ? new_rows(p) : q_rows(p);  // rows of cos and of sin read, rotary_dim/2 wide
  const double tables =
      turned_rows * static_cast<double>(p.rotary_dim) * static_cast<double>(dtype_bytes(p.rotary_dtype));
  const int per_sequence = 1 + 2 * p.packed() + p.rotary_seqlens + p.leftpad + (p.cache_batch > 0 ? 1 : 0);
  const double pages = p.paged() ? new_rows(p) / static_cast<double>(p.page_size) + sequences : 0.0;
  return element * (kv + q) + tables + sizeof(int32_t) * (per_sequence * sequences + pages);
}

}  // namespace heed
