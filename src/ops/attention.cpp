// What a valid attention problem is, and what a run of one has to bring.
#include "ops/attention.h"

#include <cmath>

#include "base/format.h"
#include "ops/attention_slots.h"

namespace heed {
namespace {

constexpr int64_t kMaxHeadDim = 512;

template <class Enum>
bool in_enum(Enum value, int32_t count) {
  return static_cast<int32_t>(value) >= 0 && static_cast<int32_t>(value) < count;
}

Status check_dtypes(const AttentionProblem& p) {
  if (!is_float(p.dtype)) {
    return invalid_argument(heed::format("dtype = {} must be f32, f16, bf16 or f64", dtype_name(p.dtype)));
  }
  if (p.out_dtype != p.dtype && p.out_dtype != Dtype::kF32 && p.out_dtype != Dtype::kF64) {
    return invalid_argument(heed::format("out_dtype = {} must be {} (as q, k, v), f32 or f64", dtype_name(p.out_dtype),
                                         dtype_name(p.dtype)));
  }
  if (p.bias() && p.bias_dtype != p.dtype && p.bias_dtype != Dtype::kF32) {
    return invalid_argument(
        heed::format("bias_dtype = {} must be f32 or {} (as q, k, v)", dtype_name(p.bias_dtype), dtype_name(p.dtype)));
  }
  return {};
}

Status check_enums(const AttentionProblem& p) {
  if (!in_enum(p.pass, 2)) {
    return invalid_argument(
        heed::format("pass = {} must be 0 (forward) or 1 (backward)", static_cast<int32_t>(p.pass)));
  }
  if (!in_enum(p.layout_q, 3)) {
    return invalid_argument(
        heed::format("layout_q = {} must be 0 (bshd), 1 (bhsd) or 2 (thd)", static_cast<int32_t>(p.layout_q)));
  }
  if (!in_enum(p.layout_kv, 3)) {
    return invalid_argument(
        heed::format("layout_kv = {} must be 0 (bshd), 1 (bhsd) or 2 (thd)", static_cast<int32_t>(p.layout_kv)));
  }
  HEED_RETURN_IF_ERROR(check_device(p.device, p.device_index, p.threads));
  if (!in_enum(p.offset_kind, 3)) {
    return invalid_argument(heed::format("offset_kind = {} must be 0 (bottom right), 1 (top left) or 2 (given)",
                                         static_cast<int32_t>(p.offset_kind)));
  }
  return {};
}

Status check_sizes(const AttentionProblem& p) {
  HEED_RETURN_IF_ERROR(check_range("batch", p.batch, 0, kMaxExtent));
  HEED_RETURN_IF_ERROR(check_range("nheads_q", p.nheads_q, 1, kMaxExtent));
  HEED_RETURN_IF_ERROR(check_range("nheads_kv", p.nheads_kv, 1, kMaxExtent));
  if (p.nheads_q % p.nheads_kv != 0) {
    return invalid_argument(
        heed::format("nheads_q = {} must be a multiple of nheads_kv = {}", p.nheads_q, p.nheads_kv));
  }
  HEED_RETURN_IF_ERROR(check_range("seqlen_q", p.seqlen_q, 0, kMaxExtent));
  HEED_RETURN_IF_ERROR(check_range("seqlen_k", p.seqlen_k, 0, kMaxExtent));
  HEED_RETURN_IF_ERROR(check_range("head_dim", p.head_dim, 1, kMaxHeadDim));
  HEED_RETURN_IF_ERROR(check_range("head_dim_v", p.head_dim_v, 1, kMaxHeadDim));
  HEED_RETURN_IF_ERROR(check_range("total_q", p.total_q, 0, p.packed_q() ? kMaxExtent : 0));
  HEED_RETURN_IF_ERROR(check_range("total_k", p.total_k, 0, p.packed_k() ? kMaxExtent : 0));
  HEED_RETURN_IF_ERROR(check_range("page_size", p.page_size, 0, kMaxExtent));
  HEED_RETURN_IF_ERROR(check_range("num_pages", p.num_pages, 0, p.paged() ? kMaxExtent : 0));
  HEED_RETURN_IF_ERROR(check_range("cache_batch", p.cache_batch, 0, kMaxExtent));
  HEED_RETURN_IF_ERROR(check_range("splits", p.splits, 0, kMaxExtent));
  return {};
}

Status check_storage(const AttentionProblem& p) {
  if (p.paged() && p.packed_k()) {
    return invalid_argument("layout_kv = thd must be bshd or bhsd (the layout of one page) with page_size > 0");
  }
  if (p.paged() && p.seqlen_k % p.page_size != 0) {
    return invalid_argument(
        heed::format("seqlen_k = {} must be a multiple of page_size = {}: a capacity is whole pages "
                     "(used_k states shorter sequences)",
                     p.seqlen_k, p.page_size));
  }
  if (p.cache_batch > 0 && p.packed_k()) {
    return invalid_argument(
        heed::format("cache_batch = {} must be 0 with layout_kv = thd: packed keys have no cache rows", p.cache_batch));
  }
  const uint8_t score_dims = static_cast<uint8_t>((p.bias() ? p.bias_dims : 0) | (p.mask ? p.mask_dims : 0));
  if ((score_dims & kDimI) != 0 && p.packed_q() && p.seqlen_q == 0 && p.total_q > 0) {
    return invalid_argument("seqlen_q = 0 must state the rows of the bias or mask, which packed queries do not tell");
  }
  if ((score_dims & kDimJ) != 0 && p.packed_k() && p.seqlen_k == 0 && p.total_k > 0) {
    return invalid_argument("seqlen_k = 0 must state the columns of the bias or mask, which packed keys do not tell");
  }
  return {};
}

Status check_scores(const AttentionProblem& p) {
  HEED_RETURN_IF_ERROR(check_range("window_left", p.window_left, -1, kMaxExtent));
  HEED_RETURN_IF_ERROR(check_range("window_right", p.window_right, -1, kMaxExtent));
  HEED_RETURN_IF_ERROR(check_range("chunk", p.chunk, 0, kMaxExtent));
  const int64_t offset_limit = p.offset_kind == OffsetKind::kGiven ? kMaxExtent : 0;
  HEED_RETURN_IF_ERROR(check_range("q_offset", p.q_offset, -offset_limit, offset_limit));
  HEED_RETURN_IF_ERROR(check_range("bias_dims", p.bias_dims, 0, p.bias() ? 15 : 0));
  HEED_RETURN_IF_ERROR(check_range("mask_dims", p.mask_dims, 0, p.mask ? 15 : 0));
  if (p.alibi_per_batch && !p.alibi) {
    return invalid_argument("alibi_per_batch = 1 must be 0 without alibi");
  }
  return {};
}

Status check_forward(const AttentionProblem& p) {
  if (p.dlse || p.dq || p.dk || p.dv || p.dbias || p.dsinks || p.dalibi) {
    return invalid_argument(
        "dlse and the gradients dq, dk, dv, dbias, dsinks, dalibi_slopes must be absent in the "
        "forward pass");
  }
  return {};
}

Status check_backward(const AttentionProblem& p) {
  if (p.paged()) {
    return invalid_argument(
        heed::format("page_size = {} must be 0 in the backward pass: paged caches are for the forward "
                     "pass only",
                     p.page_size));
  }
  if (p.cache_batch > 0) {
    return invalid_argument(
        heed::format("cache_batch = {} must be 0 in the backward pass: cache_batch_idx is for the "
                     "forward pass only",
                     p.cache_batch));
  }
  if (p.splits > 0) {
    return invalid_argument(
        heed::format("splits = {} must be 0 in the backward pass: splitting keys is for the forward pass "
                     "only",
                     p.splits));
  }
  if (!p.lse) return invalid_argument("lse must be present in the backward pass, which reads it");
  if (!(p.dq || p.dk || p.dv || p.dbias || p.dsinks || p.dalibi)) {
    return invalid_argument("one of dq, dk, dv, dbias, dsinks, dalibi_slopes must be present in the backward pass");
  }
  if (p.dbias && !p.bias()) return invalid_argument("dbias must be absent where bias is");
  if (p.dsinks && !p.sinks) return invalid_argument("dsinks must be absent where sinks are");
  if (p.dalibi && !p.alibi) return invalid_argument("dalibi_slopes must be absent where alibi_slopes are");
  return {};
}

// One problem, one form: a dimension that steps by 0 is broadcast, and its letter is left out.
Status check_letters(const TensorLayout& tensor) {
  for (int dim = 0; dim < 4; ++dim) {
    if ((tensor.dims >> dim & 1) != 0 && tensor.shape[dim] > 1 && tensor.stride[dim] == 0) {
      return invalid_argument(heed::format(
          "strides of {} = ({}, {}, {}, {}) must not be 0 in dimension {}, which is stated "
          "not to be broadcast",
          tensor.name, tensor.stride[0], tensor.stride[1], tensor.stride[2], tensor.stride[3], "bhij"[dim]));
    }
  }
  return {};
}

Status check_slots(const AttentionProblem& p) {
  for (int i = 0; i < kNumSlots; ++i) {
    const Slot slot = static_cast<Slot>(i);
    if (has_slot(p, slot)) {
      const TensorLayout tensor = slot_layout(p, slot);
      HEED_RETURN_IF_ERROR(check_layout(tensor, p.align[i]));
      if (slot == Slot::kBias || slot == Slot::kMask) HEED_RETURN_IF_ERROR(check_letters(tensor));
    } else if (p.align[i] != 0 || p.stride[i] != std::array<int64_t, 4>{}) {
      return invalid_argument(
          heed::format("strides and align of {} must be 0: the problem does not have it", slot_name(slot)));
    }
  }
  return {};
}

Status check_numbers(const AttentionProblem& p, const AttentionArgs& args) {
  if (!std::isfinite(args.softmax_scale)) {
    return invalid_argument(heed::format("softmax_scale = {} must be finite", args.softmax_scale));
  }
  if (!std::isfinite(args.softcap) || (p.softcap ? args.softcap <= 0.0f : args.softcap != 0.0f)) {
    return invalid_argument(heed::format("softcap = {} must be {}", args.softcap,
                                         p.softcap ? "finite and greater than 0, as the planned problem has softcap"
                                                   : "0, as the planned problem has no softcap"));
  }
  if (!(args.dropout_p >= 0.0f && args.dropout_p <= 1.0f)) {
    return invalid_argument(heed::format("dropout_p = {} must be from 0 to 1", args.dropout_p));
  }
  if (args.dropout_p > 0.0f && !p.dropout) {
    return invalid_argument(
        heed::format("dropout_p = {} must be 0, as the planned problem has no dropout", args.dropout_p));
  }
  return {};
}

Status check_slot_pointers(const AttentionProblem& p, const AttentionArgs& args) {
  const std::array<const void*, kNumSlots> pointers = {
      args.q,    args.k,  args.v,  args.out, args.lse,   args.bias,       args.mask,        args.dout,
      args.dlse, args.dq, args.dk, args.dv,  args.dbias, args.page_table, args.alibi_slopes};
  for (int i = 0; i < kNumSlots; ++i) {
    const Slot slot = static_cast<Slot>(i);
    if (pointers[i] == nullptr) {
      if (p.align[i] != 0 && has_elements(slot_shape(p, slot))) return missing_pointer(slot_name(slot));
    } else if (p.align[i] == 0) {
      return unexpected_pointer(slot_name(slot));
    } else if ((reinterpret_cast<uintptr_t>(pointers[i]) & static_cast<uintptr_t>(p.align[i] - 1)) != 0) {
      return misaligned_pointer(slot_name(slot), pointers[i], p.align[i]);
    }
  }
  return {};
}

// The vectors that have no slot: one number per head or sequence, always contiguous.
Status check_vector_pointers(const AttentionProblem& p, const AttentionArgs& args) {
  struct Vector {
    std::string_view name;
    const void* pointer;
    bool present;
    bool empty;
  };
  const bool no_sequences = p.batch == 0;
  const Vector vectors[] = {
      {"sinks", args.sinks, p.sinks, false},
      {"cu_seqlens_q", args.cu_seqlens_q, p.packed_q(), false},
      {"cu_seqlens_k", args.cu_seqlens_k, p.packed_k(), false},
      {"seqused_q", args.seqused_q, p.used_q, no_sequences},
      {"seqused_k", args.seqused_k, p.used_k, no_sequences},
      {"leftpad_k", args.leftpad_k, p.leftpad, no_sequences},
      {"cache_batch_idx", args.cache_batch_idx, p.cache_batch > 0, no_sequences},
      {"dsinks", args.dsinks, p.dsinks, false},
      {"dalibi_slopes", args.dalibi_slopes, p.dalibi, p.alibi_per_batch && no_sequences},
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
  return {};
}

}  // namespace

Status validate(const AttentionProblem& problem) {
  HEED_RETURN_IF_ERROR(check_enums(problem));
  HEED_RETURN_IF_ERROR(check_dtypes(problem));
  HEED_RETURN_IF_ERROR(check_sizes(problem));
  HEED_RETURN_IF_ERROR(check_scores(problem));
  HEED_RETURN_IF_ERROR(check_storage(problem));
  HEED_RETURN_IF_ERROR(problem.pass == Pass::kForward ? check_forward(problem) : check_backward(problem));
  return check_slots(problem);
}

Status validate(const AttentionProblem& problem, const AttentionArgs& args, size_t workspace_bytes) {
  HEED_RETURN_IF_ERROR(check_numbers(problem, args));
  HEED_RETURN_IF_ERROR(check_slot_pointers(problem, args));
  HEED_RETURN_IF_ERROR(check_vector_pointers(problem, args));
  if (args.executor == nullptr) return invalid_argument("executor = NULL must be an address");
  return check_workspace(args.workspace, args.workspace_bytes, workspace_bytes);
}

}  // namespace heed
