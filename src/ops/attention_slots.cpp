// The tensors of an attention problem: which there are, their shapes, dtypes, contiguous strides and alignment.
#include "ops/attention_slots.h"

namespace heed {
namespace {

constexpr std::array<int, 4> kOrderBhsd = {0, 1, 2, 3};
constexpr std::array<int, 4> kOrderBshd = {0, 2, 1, 3};  // also thd: its batch is no dimension

bool like_q(Slot slot) { return slot == Slot::kQ || slot == Slot::kDq || slot == Slot::kOut || slot == Slot::kDout; }

bool like_k(Slot slot) { return slot == Slot::kK || slot == Slot::kV || slot == Slot::kDk || slot == Slot::kDv; }

bool is_output(const AttentionProblem& p, Slot slot) {
  switch (slot) {
    case Slot::kOut:
    case Slot::kLse: return p.pass == Pass::kForward;
    case Slot::kDq:
    case Slot::kDk:
    case Slot::kDv:
    case Slot::kDbias: return true;
    default: return false;
  }
}

uint8_t broadcast_letters(const AttentionProblem& p, Slot slot) {
  return slot == Slot::kMask ? p.mask_dims : p.bias_dims;
}

uint8_t slot_dims(const AttentionProblem& p, Slot slot) {
  switch (slot) {
    case Slot::kLse:
    case Slot::kDlse: return p.packed_q() ? kDims3 & ~1 : kDims3;
    case Slot::kBias:
    case Slot::kMask:
    case Slot::kDbias: return broadcast_letters(p, slot);  // DimBit's values are the dimensions' bits
    case Slot::kPageTable: return kDims2;
    case Slot::kAlibi: return p.alibi_per_batch ? kDims2 : kDims2 & ~1;
    default: break;
  }
  const bool packed = like_q(slot) ? p.packed_q() : p.packed_k();
  return packed ? kDims4 & ~1 : kDims4;
}

std::array<int64_t, 4> q_shape(const AttentionProblem& p, int64_t last) {
  return {p.packed_q() ? 1 : p.batch, p.nheads_q, p.packed_q() ? p.total_q : p.seqlen_q, last};
}

std::array<int64_t, 4> k_shape(const AttentionProblem& p, int64_t last) {
  if (p.packed_k()) return {1, p.nheads_kv, p.total_k, last};
  if (p.paged()) return {p.num_pages, p.nheads_kv, p.page_size, last};
  return {cache_rows(p), p.nheads_kv, p.seqlen_k, last};
}

std::array<int64_t, 4> score_shape(const AttentionProblem& p, uint8_t letters) {
  return {(letters & kDimB) != 0 ? p.batch : 1, (letters & kDimH) != 0 ? p.nheads_q : 1,
          (letters & kDimI) != 0 ? p.seqlen_q : 1, (letters & kDimJ) != 0 ? p.seqlen_k : 1};
}

}  // namespace

std::string_view slot_name(Slot slot) {
  static constexpr std::array<std::string_view, kNumSlots> kNames = {
      "q",    "k",  "v",  "out", "lse",   "bias",       "mask",        "dout",
      "dlse", "dq", "dk", "dv",  "dbias", "page_table", "alibi_slopes"};
  return kNames[static_cast<int>(slot)];
}

bool has_slot(const AttentionProblem& p, Slot slot) {
  const bool backward = p.pass == Pass::kBackward;
  switch (slot) {
    case Slot::kQ:
    case Slot::kK:
    case Slot::kV:
    case Slot::kOut: return true;
    case Slot::kLse: return p.lse;
    case Slot::kBias: return p.bias();
    case Slot::kMask: return p.mask;
    case Slot::kDout: return backward;
    case Slot::kDlse: return backward && p.dlse;
    case Slot::kDq: return backward && p.dq;
    case Slot::kDk: return backward && p.dk;
    case Slot::kDv: return backward && p.dv;
    case Slot::kDbias: return backward && p.dbias;
    case Slot::kPageTable: return p.paged();
    case Slot::kAlibi: return p.alibi;
    case Slot::kCount: break;
  }
  return false;
}

Dtype slot_dtype(const AttentionProblem& p, Slot slot) {
  if (!has_slot(p, slot)) return Dtype::kNone;
  const bool f64_outputs = p.out_dtype == Dtype::kF64;
  switch (slot) {
    case Slot::kQ:
    case Slot::kK:
    case Slot::kV: return p.dtype;
    case Slot::kOut:
    case Slot::kDout: return p.out_dtype;
    case Slot::kLse:
    case Slot::kDlse: return f64_outputs ? Dtype::kF64 : Dtype::kF32;
    case Slot::kBias: return p.bias_dtype;
    case Slot::kMask: return Dtype::kBool;
    case Slot::kDq:
    case Slot::kDk:
    case Slot::kDv: return f64_outputs ? Dtype::kF64 : p.dtype;
    case Slot::kDbias: return f64_outputs ? Dtype::kF64 : p.bias_dtype;
    case Slot::kPageTable: return Dtype::kI32;
    case Slot::kAlibi: return Dtype::kF32;
    case Slot::kCount: break;
  }
  return Dtype::kNone;
}

std::array<int64_t, 4> slot_shape(const AttentionProblem& p, Slot slot) {
  switch (slot) {
    case Slot::kQ:
    case Slot::kDq: return q_shape(p, p.head_dim);
    case Slot::kOut:
    case Slot::kDout: return q_shape(p, p.head_dim_v);
    case Slot::kLse:
    case Slot::kDlse: return q_shape(p, 1);
    case Slot::kK:
    case Slot::kDk: return k_shape(p, p.head_dim);
    case Slot::kV:
    case Slot::kDv: return k_shape(p, p.head_dim_v);
    case Slot::kBias:
    case Slot::kMask:
    case Slot::kDbias: return score_shape(p, broadcast_letters(p, slot));
    case Slot::kPageTable: return {cache_rows(p), p.paged() ? p.seqlen_k / p.page_size : 0, 1, 1};
    case Slot::kAlibi: return {p.alibi_per_batch ? p.batch : 1, p.nheads_q, 1, 1};
    case Slot::kCount: break;
  }
  return {1, 1, 1, 1};
}

TensorLayout slot_layout(const AttentionProblem& p, Slot slot) {
  TensorLayout tensor;
  tensor.name = slot_name(slot);
  tensor.dtype = slot_dtype(p, slot);
  tensor.shape = slot_shape(p, slot);
  tensor.stride = p.strides(slot);
  tensor.dims = slot_dims(p, slot);
  const bool rows_of_numbers = slot == Slot::kLse || slot == Slot::kDlse;
  if (rows_of_numbers) {
    tensor.inner = 2;
    tensor.unit_inner = false;  // read and written one number at a time
  } else if (slot == Slot::kPageTable || slot == Slot::kAlibi) {
    tensor.inner = 1;
  }
  tensor.output = is_output(p, slot);
  return tensor;
}

std::array<int64_t, 4> contiguous_strides(const AttentionProblem& p, Slot slot) {
  if (!has_slot(p, slot)) return {};
  const bool sequence_first =
      (like_q(slot) && p.layout_q != Layout::kBhsd) || (like_k(slot) && p.layout_kv != Layout::kBhsd);
  return packed_strides(slot_shape(p, slot), slot_dims(p, slot), sequence_first ? kOrderBshd : kOrderBhsd);
}

int32_t natural_align(const AttentionProblem& p, Slot slot, const void* address) {
  return has_slot(p, slot) ? natural_align(slot_layout(p, slot), address) : 0;
}

}  // namespace heed
