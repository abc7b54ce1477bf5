// Attention through the C interface: argument structs to a Problem and Args, plan, run.
#include <algorithm>
#include <cmath>

#include "base/format.h"
#include "base/threads.h"
#include "capi_args.h"
#include "capi_error.h"
#include "capi_handles.h"
#include "capi_posed.h"
#include "capi_run.h"
#include "capi_tensors.h"

namespace heed {
namespace {

Status check_options(const heed_attention_args& a) {
  HEED_RETURN_IF_ERROR(check_enum("pass", a.pass, 2, "0 (forward) or 1 (backward)"));
  HEED_RETURN_IF_ERROR(check_enum("layout_q", a.layout_q, 3, "0 (bshd), 1 (bhsd) or 2 (thd)"));
  HEED_RETURN_IF_ERROR(check_enum("layout_kv", a.layout_kv, 3, "0 (bshd), 1 (bhsd) or 2 (thd)"));
  HEED_RETURN_IF_ERROR(check_enum("device", a.device, 2, "0 (cpu) or 1 (cuda)"));
  HEED_RETURN_IF_ERROR(check_enum("offset_kind", a.offset_kind, 3, "0 (bottom right), 1 (top left) or 2 (given)"));
  if (a.offset_kind != HEED_OFFSET_GIVEN && a.q_offset != 0) {
    return invalid_argument(heed::format("q_offset = {}: must be 0 unless offset_kind is 2 (given)", a.q_offset));
  }
  if (!std::isfinite(a.softcap) || a.softcap < 0.0f) {
    return invalid_argument(heed::format("softcap = {}: must be 0 (off) or greater, and finite", a.softcap));
  }
  if (!(a.dropout_p >= 0.0f && a.dropout_p <= 1.0f)) {
    return invalid_argument(heed::format("dropout_p = {}: must be from 0 to 1", a.dropout_p));
  }
  if (a.has_softmax_scale != 0 && !std::isfinite(a.softmax_scale)) {
    return invalid_argument(heed::format("softmax_scale = {}: must be finite", a.softmax_scale));
  }
  for (const auto& [name, value] :
       {std::pair("window_left", a.window_left), std::pair("window_right", a.window_right)}) {
    if (value < -1) return invalid_argument(heed::format("{} = {}: must be -1 (unbounded) or greater", name, value));
  }
  return {};
}

// Which tensors have to be there, and which cannot be.
Status check_presence(const heed_attention_args& a) {
  HEED_RETURN_IF_ERROR(required("q", a.q, "attention needs it"));
  HEED_RETURN_IF_ERROR(required("k", a.k, "attention needs it"));
  HEED_RETURN_IF_ERROR(required("v", a.v, "attention needs it"));
  HEED_RETURN_IF_ERROR(
      required("out", a.out, a.pass == HEED_PASS_FORWARD ? "the result goes there" : "the backward pass reads it"));
  const char* const only_thd = "only with layout thd";
  HEED_RETURN_IF_ERROR(a.layout_q == HEED_LAYOUT_THD ? required("cu_seqlens_q", a.cu_seqlens_q, "layout_q thd needs it")
                                                     : absent("cu_seqlens_q", a.cu_seqlens_q, only_thd));
  HEED_RETURN_IF_ERROR(a.layout_kv == HEED_LAYOUT_THD
                           ? required("cu_seqlens_k", a.cu_seqlens_k, "layout_kv thd needs it")
                           : absent("cu_seqlens_k", a.cu_seqlens_k, only_thd));
  if (a.layout_kv == HEED_LAYOUT_THD) {
    HEED_RETURN_IF_ERROR(absent("page_table", a.page_table, "layout_kv is of one page, bshd or bhsd"));
    HEED_RETURN_IF_ERROR(absent("cache_batch_idx", a.cache_batch_idx, "packed keys have no cache rows"));
  }
  if (a.pass == HEED_PASS_BACKWARD) {
    HEED_RETURN_IF_ERROR(required("lse", a.lse, "the backward pass reads it"));
    HEED_RETURN_IF_ERROR(required("dout", a.dout, "the backward pass starts from it"));
    if (!present(a.bias)) HEED_RETURN_IF_ERROR(absent("dbias", a.dbias, "there is no bias"));
    if (!present(a.sinks)) HEED_RETURN_IF_ERROR(absent("dsinks", a.dsinks, "there are no sinks"));
    if (!present(a.alibi_slopes)) {
      HEED_RETURN_IF_ERROR(absent("dalibi_slopes", a.dalibi_slopes, "there are no alibi_slopes"));
    }
    return {};
  }
  const char* const backward = "only in the backward pass";
  HEED_RETURN_IF_ERROR(absent("dout", a.dout, backward));
  HEED_RETURN_IF_ERROR(absent("dlse", a.dlse, backward));
  HEED_RETURN_IF_ERROR(absent("dq", a.dq, backward));
  HEED_RETURN_IF_ERROR(absent("dk", a.dk, backward));
  HEED_RETURN_IF_ERROR(absent("dv", a.dv, backward));
  HEED_RETURN_IF_ERROR(absent("dbias", a.dbias, backward));
  HEED_RETURN_IF_ERROR(absent("dsinks", a.dsinks, backward));
  return absent("dalibi_slopes", a.dalibi_slopes, backward);
}

Status bind_like_q(Extents& extents, const char* name, const heed_tensor& t, int32_t layout, Dim last) {
  if (!present(t)) return {};
  switch (layout) {
    case HEED_LAYOUT_BSHD: return extents.bind(name, t, {Dim::kBatch, Dim::kSeqlenQ, Dim::kNheadsQ, last});
    case HEED_LAYOUT_BHSD: return extents.bind(name, t, {Dim::kBatch, Dim::kNheadsQ, Dim::kSeqlenQ, last});
    default: return extents.bind(name, t, {Dim::kTotalQ, Dim::kNheadsQ, last});
  }
}

Status bind_like_k(Extents& extents, const char* name, const heed_tensor& t, const heed_attention_args& a, Dim last) {
  if (!present(t)) return {};
  const bool paged = present(a.page_table);
  const Dim rows = paged ? Dim::kNumPages : present(a.cache_batch_idx) ? Dim::kCacheRows : Dim::kBatch;
  const Dim keys = paged ? Dim::kPageSize : Dim::kSeqlenK;
  switch (a.layout_kv) {
    case HEED_LAYOUT_BSHD: return extents.bind(name, t, {rows, keys, Dim::kNheadsKv, last});
    case HEED_LAYOUT_BHSD: return extents.bind(name, t, {rows, Dim::kNheadsKv, keys, last});
    default: return extents.bind(name, t, {Dim::kTotalK, Dim::kNheadsKv, last});
  }
}

Status bind_lse(Extents& extents, const char* name, const heed_tensor& t, int32_t layout) {
  if (!present(t)) return {};
  if (layout == HEED_LAYOUT_THD) return extents.bind(name, t, {Dim::kNheadsQ, Dim::kTotalQ}, true);
  return extents.bind(name, t, {Dim::kBatch, Dim::kNheadsQ, Dim::kSeqlenQ}, true);
}

Status bind_scores(Extents& extents, const char* name, const heed_tensor& t) {
  if (!present(t)) return {};
  return extents.bind_broadcast(name, t, {Dim::kBatch, Dim::kNheadsQ, Dim::kSeqlenQ, Dim::kSeqlenK});
}

Status bind_heads(Extents& extents, const char* name, const heed_tensor& t, bool per_batch, Dtype dtype = Dtype::kF32) {
  if (!present(t)) return {};
  HEED_RETURN_IF_ERROR(per_batch ? extents.bind(name, t, {Dim::kBatch, Dim::kNheadsQ})
                                 : extents.bind(name, t, {Dim::kNheadsQ}));
  return check_dtype(name, t, dtype);
}

Status bind_extents(const heed_attention_args& a, Extents& extents) {
  if (present(a.cu_seqlens_q)) HEED_RETURN_IF_ERROR(extents.bind_offsets("cu_seqlens_q", a.cu_seqlens_q));
  HEED_RETURN_IF_ERROR(bind_like_q(extents, "q", a.q, a.layout_q, Dim::kHeadDim));
  if (present(a.cu_seqlens_k)) HEED_RETURN_IF_ERROR(extents.bind_offsets("cu_seqlens_k", a.cu_seqlens_k));
  HEED_RETURN_IF_ERROR(bind_like_k(extents, "k", a.k, a, Dim::kHeadDim));
  HEED_RETURN_IF_ERROR(bind_like_k(extents, "v", a.v, a, Dim::kHeadDimV));
  if (present(a.page_table)) {
    const Dim rows = present(a.cache_batch_idx) ? Dim::kCacheRows : Dim::kBatch;
    HEED_RETURN_IF_ERROR(extents.bind("page_table", a.page_table, {rows, Dim::kMaxPages}));
    HEED_RETURN_IF_ERROR(check_dtype("page_table", a.page_table, Dtype::kI32));
    const int64_t page_size = extents[Dim::kPageSize], max_pages = extents[Dim::kMaxPages];
    int64_t capacity = 0;
    if (page_size < 1) return invalid_argument("k: page_size = 0: must be at least 1");
    if (__builtin_mul_overflow(page_size, max_pages, &capacity)) {
      return invalid_argument(
          heed::format("page_table.shape[1] = {}: that many pages of {} keys overflow 64 bits", max_pages, page_size));
    }
    extents.set(Dim::kSeqlenK, capacity, "page_table", 1);
  }
  HEED_RETURN_IF_ERROR(bind_like_q(extents, "out", a.out, a.layout_q, Dim::kHeadDimV));
  HEED_RETURN_IF_ERROR(bind_lse(extents, "lse", a.lse, a.layout_q));
  HEED_RETURN_IF_ERROR(bind_scores(extents, "bias", a.bias));
  HEED_RETURN_IF_ERROR(bind_scores(extents, "mask", a.mask));
  const bool alibi_per_batch = a.alibi_slopes.ndim == 2;
  HEED_RETURN_IF_ERROR(bind_heads(extents, "alibi_slopes", a.alibi_slopes, alibi_per_batch));
  HEED_RETURN_IF_ERROR(bind_heads(extents, "sinks", a.sinks, false));
  HEED_RETURN_IF_ERROR(check_batch_vector("seqused_q", a.seqused_q, extents));
  HEED_RETURN_IF_ERROR(check_batch_vector("seqused_k", a.seqused_k, extents));
  HEED_RETURN_IF_ERROR(check_batch_vector("leftpad_k", a.leftpad_k, extents));
  HEED_RETURN_IF_ERROR(check_batch_vector("cache_batch_idx", a.cache_batch_idx, extents));
  HEED_RETURN_IF_ERROR(check_batch_vector("status", a.status, extents));
  if (a.pass == HEED_PASS_FORWARD) return {};
  HEED_RETURN_IF_ERROR(bind_like_q(extents, "dout", a.dout, a.layout_q, Dim::kHeadDimV));
  HEED_RETURN_IF_ERROR(bind_lse(extents, "dlse", a.dlse, a.layout_q));
  HEED_RETURN_IF_ERROR(bind_like_q(extents, "dq", a.dq, a.layout_q, Dim::kHeadDim));
  HEED_RETURN_IF_ERROR(bind_like_k(extents, "dk", a.dk, a, Dim::kHeadDim));
  HEED_RETURN_IF_ERROR(bind_like_k(extents, "dv", a.dv, a, Dim::kHeadDimV));
  HEED_RETURN_IF_ERROR(bind_scores(extents, "dbias", a.dbias));
  const Dtype sums = a.out.dtype == HEED_DTYPE_F64 ? Dtype::kF64 : Dtype::kF32;  // out of f64: every output is
  HEED_RETURN_IF_ERROR(bind_heads(extents, "dsinks", a.dsinks, false, sums));
  HEED_RETURN_IF_ERROR(bind_heads(extents, "dalibi_slopes", a.dalibi_slopes, alibi_per_batch, sums));
  return check_contiguous("dalibi_slopes", a.dalibi_slopes);
}

// Letters of the dimensions that are not broadcast.
uint8_t score_dims(const heed_tensor& t) {
  uint8_t letters = 0;
  for (int i = 0; i < 4; ++i) {
    if (t.shape[i] != 1 && t.stride[i] != 0) letters = static_cast<uint8_t>(letters | 1 << i);
  }
  return letters;
}

// Strides with 0 in the broadcast dimensions.
std::array<int64_t, 4> score_strides(const heed_tensor& t, uint8_t letters) {
  std::array<int64_t, 4> strides = {};
  for (int i = 0; i < 4; ++i) strides[i] = (letters >> i & 1) != 0 ? t.stride[i] : 0;
  return strides;
}

void set_sizes(const heed_attention_args& a, const Extents& extents, AttentionProblem& p) {
  p.batch = extents[Dim::kBatch];
  p.nheads_q = extents[Dim::kNheadsQ];
  p.nheads_kv = extents[Dim::kNheadsKv];
  p.head_dim = extents[Dim::kHeadDim];
  p.head_dim_v = extents[Dim::kHeadDimV];
  p.total_q = extents[Dim::kTotalQ];
  p.total_k = extents[Dim::kTotalK];
  p.page_size = extents[Dim::kPageSize];
  p.num_pages = extents[Dim::kNumPages];
  p.cache_batch = extents[Dim::kCacheRows];
  // Packed: a bias or mask states the longest sequence it serves; else the caller's hint, which changes no result.
  p.seqlen_q = extents.known(Dim::kSeqlenQ) ? extents[Dim::kSeqlenQ] : std::max<int64_t>(a.max_seqlen_q, 0);
  p.seqlen_k = extents.known(Dim::kSeqlenK) ? extents[Dim::kSeqlenK] : std::max<int64_t>(a.max_seqlen_k, 0);
}

void set_options(const heed_attention_args& a, AttentionProblem& p) {
  p.pass = static_cast<Pass>(a.pass);
  p.dtype = static_cast<Dtype>(a.q.dtype);
  p.out_dtype = static_cast<Dtype>(a.out.dtype);
  p.layout_q = static_cast<Layout>(a.layout_q);
  p.layout_kv = static_cast<Layout>(a.layout_kv);
  p.device = static_cast<Device>(a.device);
  p.offset_kind = static_cast<OffsetKind>(a.offset_kind);
  p.q_offset = a.q_offset;
  p.window_left = a.window_left;
  p.window_right = a.causal != 0 ? 0 : a.window_right;
  p.chunk = a.chunk;
  p.splits = a.num_splits;
  p.softcap = a.softcap > 0.0f;
  p.dropout = a.dropout_p > 0.0f;
  p.deterministic = a.deterministic != 0;
  p.batch_invariant = a.batch_invariant != 0;
  p.sinks = present(a.sinks);
  p.leftpad = present(a.leftpad_k);
  p.used_q = present(a.seqused_q);
  p.used_k = present(a.seqused_k);
  p.lse = present(a.lse);
  p.alibi = present(a.alibi_slopes);
  p.alibi_per_batch = p.alibi && a.alibi_slopes.ndim == 2;
  if (present(a.bias)) {
    p.bias_dtype = static_cast<Dtype>(a.bias.dtype);
    p.bias_dims = score_dims(a.bias);
  }
  p.mask = present(a.mask);
  if (p.mask) p.mask_dims = score_dims(a.mask);
  p.dlse = present(a.dlse);
  p.dq = present(a.dq);
  p.dk = present(a.dk);
  p.dv = present(a.dv);
  p.dbias = present(a.dbias);
  p.dsinks = present(a.dsinks);
  p.dalibi = present(a.dalibi_slopes);
}

// dbias has bias's shape; where bias is broadcast by stride it may have extent 1 instead, or stride 0 likewise.
Status check_dbias(const heed_attention_args& a, const AttentionProblem& p) {
  for (int i = 0; i < 4; ++i) {
    const bool broadcast = (p.bias_dims >> i & 1) == 0;
    if (broadcast ? a.dbias.shape[i] > 1 && a.dbias.stride[i] != 0 : a.dbias.shape[i] != a.bias.shape[i]) {
      return invalid_argument(heed::format("dbias.shape[{}] = {}: must be {}, as bias {}", i, a.dbias.shape[i],
                                           broadcast ? 1 : a.bias.shape[i], broadcast ? "is broadcast there" : "has"));
    }
  }
  return {};
}

Status place_tensors(const heed_attention_args& a, AttentionProblem& p) {
  struct Item {
    Slot slot;
    const heed_tensor& tensor;
    std::array<int64_t, 4> strides;
  };
  const auto head = [](const heed_tensor& t) {  // (b, h, s, -) with any layout; packed (h, s)
    return t.ndim == 3 ? std::array<int64_t, 4>{t.stride[0], t.stride[1], t.stride[2], 0}
                       : std::array<int64_t, 4>{0, t.stride[0], t.stride[1], 0};
  };
  const auto put = [&p](Slot slot, const heed_tensor& t, const std::array<int64_t, 4>& strides) -> Status {
    HEED_RETURN_IF_ERROR(check_dtype(slot_name(slot).data(), t, slot_dtype(p, slot)));
    place(p, slot, strides, t.data);
    return {};
  };
  const Item wide[] = {
      {Slot::kQ, a.q, strides_bhsd(a.q, p.layout_q)},          {Slot::kK, a.k, strides_bhsd(a.k, p.layout_kv)},
      {Slot::kV, a.v, strides_bhsd(a.v, p.layout_kv)},         {Slot::kOut, a.out, strides_bhsd(a.out, p.layout_q)},
      {Slot::kDout, a.dout, strides_bhsd(a.dout, p.layout_q)}, {Slot::kDq, a.dq, strides_bhsd(a.dq, p.layout_q)},
      {Slot::kDk, a.dk, strides_bhsd(a.dk, p.layout_kv)},      {Slot::kDv, a.dv, strides_bhsd(a.dv, p.layout_kv)}};
  for (const Item& item : wide) {
    if (present(item.tensor)) HEED_RETURN_IF_ERROR(put(item.slot, item.tensor, item.strides));
  }
  if (p.lse) HEED_RETURN_IF_ERROR(put(Slot::kLse, a.lse, head(a.lse)));
  if (p.dlse) HEED_RETURN_IF_ERROR(put(Slot::kDlse, a.dlse, head(a.dlse)));
  if (p.bias()) HEED_RETURN_IF_ERROR(put(Slot::kBias, a.bias, score_strides(a.bias, p.bias_dims)));
  if (p.mask) HEED_RETURN_IF_ERROR(put(Slot::kMask, a.mask, score_strides(a.mask, p.mask_dims)));
  if (p.dbias) {
    HEED_RETURN_IF_ERROR(check_dbias(a, p));
    HEED_RETURN_IF_ERROR(put(Slot::kDbias, a.dbias, score_strides(a.dbias, p.bias_dims)));
  }
  if (p.paged()) {
    HEED_RETURN_IF_ERROR(put(Slot::kPageTable, a.page_table, {a.page_table.stride[0], a.page_table.stride[1], 0, 0}));
  }
  if (p.alibi) {
    const int64_t* s = a.alibi_slopes.stride;
    HEED_RETURN_IF_ERROR(
        put(Slot::kAlibi, a.alibi_slopes, {p.alibi_per_batch ? s[0] : 0, s[p.alibi_per_batch ? 1 : 0], 0, 0}));
  }
  return {};
}

// Everything but validate(problem), which a plan in the cache has behind it.
Status build_problem(const heed_attention_args& a, AttentionProblem& p) {
  HEED_RETURN_IF_ERROR(check_options(a));
  HEED_RETURN_IF_ERROR(check_presence(a));
  Extents extents;
  HEED_RETURN_IF_ERROR(bind_extents(a, extents));
  HEED_RETURN_IF_ERROR(check_dtype("k", a.k, static_cast<Dtype>(a.q.dtype)));
  HEED_RETURN_IF_ERROR(check_dtype("v", a.v, static_cast<Dtype>(a.q.dtype)));
  set_options(a, p);
  set_sizes(a, extents, p);
  if (present(a.cache_batch_idx) && p.cache_batch == 0 && p.batch > 0) {
    return invalid_argument(heed::format("{}.shape[0] = 0: must be at least 1, cache_batch_idx reads rows of it",
                                         p.paged() ? "page_table" : "k"));
  }
  HEED_RETURN_IF_ERROR(resolve_place(a, p));
  return place_tensors(a, p);
}

// The same, with a look at what this thread posed last.
Status pose(const heed_attention_args& a, AttentionProblem& problem) {
  thread_local constinit PosedProblem last;
  if (last.find(a, problem)) return {};
  HEED_RETURN_IF_ERROR(build_problem(a, problem));
  last.keep(a, problem);
  return {};
}

const void* data_of(const heed_tensor& tensor) { return present(tensor) ? tensor.data : nullptr; }
void* memory_of(const heed_tensor& tensor) { return present(tensor) ? tensor.data : nullptr; }
const int32_t* numbers_of(const heed_tensor& tensor) { return static_cast<const int32_t*>(data_of(tensor)); }
const float* floats_of(const heed_tensor& tensor) { return static_cast<const float*>(data_of(tensor)); }

// Letters and hints that change nothing: broadcast over one, the longest packed sequence.
void normalise(AttentionProblem& p) {
  const std::array<int64_t, 4> extents = {p.batch, p.nheads_q, p.packed_q() ? 2 : p.seqlen_q,
                                          p.packed_k() ? 2 : p.seqlen_k};
  for (int i = 0; i < 4; ++i) {
    if (extents[static_cast<size_t>(i)] != 1) continue;
    p.bias_dims = static_cast<uint8_t>(p.bias_dims & ~(1 << i));
    p.mask_dims = static_cast<uint8_t>(p.mask_dims & ~(1 << i));
  }
  const int letters = p.bias_dims | p.mask_dims;
  if (p.packed_q() && (letters & kDimI) == 0) p.seqlen_q = 0;
  if (p.packed_k() && (letters & kDimJ) == 0) p.seqlen_k = 0;
}

}  // namespace

Result<heed_attention_args> read_args(const heed_attention_args* args) {
  HEED_RETURN_IF_ERROR(check_struct(args, "args"));
  heed_attention_args copy = *args;
  copy.struct_size = sizeof copy;
  return copy;
}

Result<AttentionProblem> problem_of(const heed_attention_args& args) {
  AttentionProblem problem;
  HEED_RETURN_IF_ERROR(build_problem(args, problem));
  HEED_RETURN_IF_ERROR(validate(problem));
  return problem;
}

AttentionArgs args_of(const heed_attention_args& a, const AttentionProblem& problem) {
  AttentionArgs args;
  args.q = data_of(a.q);
  args.k = data_of(a.k);
  args.v = data_of(a.v);
  args.out = memory_of(a.out);
  args.lse = memory_of(a.lse);
  args.bias = data_of(a.bias);
  args.mask = static_cast<const uint8_t*>(data_of(a.mask));
  args.alibi_slopes = floats_of(a.alibi_slopes);
  args.sinks = floats_of(a.sinks);
  args.cu_seqlens_q = numbers_of(a.cu_seqlens_q);
  args.cu_seqlens_k = numbers_of(a.cu_seqlens_k);
  args.seqused_q = numbers_of(a.seqused_q);
  args.seqused_k = numbers_of(a.seqused_k);
  args.leftpad_k = numbers_of(a.leftpad_k);
  args.page_table = numbers_of(a.page_table);
  args.cache_batch_idx = problem.cache_batch > 0 ? numbers_of(a.cache_batch_idx) : nullptr;
  args.dout = data_of(a.dout);
  args.dlse = data_of(a.dlse);
  args.dq = memory_of(a.dq);
  args.dk = memory_of(a.dk);
  args.dv = memory_of(a.dv);
  args.dbias = memory_of(a.dbias);
  args.dsinks = memory_of(a.dsinks);
  args.dalibi_slopes = memory_of(a.dalibi_slopes);
  args.status = static_cast<int32_t*>(memory_of(a.status));
  args.softmax_scale = a.has_softmax_scale != 0
                           ? a.softmax_scale
                           : static_cast<float>(1.0 / std::sqrt(static_cast<double>(problem.head_dim)));
  args.softcap = a.softcap;
  args.dropout_p = a.dropout_p;
  args.dropout_seed = a.dropout_seed;
  args.dropout_offset = a.dropout_offset;
  args.dropout_seed_ptr = a.dropout_seed_ptr;
  args.dropout_offset_ptr = a.dropout_offset_ptr;
  std::copy_n(a.index_base, 4, args.index_base.begin());
  args.workspace = a.workspace;
  args.workspace_bytes = a.workspace_bytes;
  args.executor = a.executor != nullptr ? a.executor : &pool_executor();
  args.stream = a.stream;
  return args;
}

}  // namespace heed

using heed::guarded;
using heed::Status;

extern "C" {

void heed_attention_args_init(heed_attention_args* args) {
  if (args == nullptr) return;
  *args = {};
  args->struct_size = sizeof *args;
  args->window_left = -1;
  args->window_right = -1;
  args->device_index = -1;
}

heed_status heed_attention_problem(const heed_attention_args* args, heed_problem** problem) {
  return guarded([&]() -> Status {
    HEED_RETURN_IF_ERROR(heed::check_struct(args, "args"));
    if (problem == nullptr) return heed::invalid_argument("problem = NULL: must be an address");
    heed::Result<heed::AttentionProblem> made = heed::problem_of(*args);
    if (!made.ok()) return made.status();
    *problem = new heed_problem{std::move(made).value()};
    return {};
  });
}

heed_status heed_attention_run(const heed_plan* plan, const heed_attention_args* args) {
  return guarded([&]() -> Status {
    HEED_RETURN_IF_ERROR(heed::check_struct(args, "args"));
    const heed::Plan<heed::AttentionProblem>* planned = nullptr;
    HEED_RETURN_IF_ERROR(heed::plan_of(plan, "attention", planned));
    heed::AttentionProblem asked;
    HEED_RETURN_IF_ERROR(heed::pose(*args, asked));
    HEED_RETURN_IF_ERROR(heed::check_same<heed::Slot>(planned->problem, asked, heed::normalise));
    return heed::run(*planned, heed::args_of(*args, planned->problem));
  });
}

heed_status heed_attention(const heed_attention_args* args, const heed_plan_options* options) {
  return guarded([&]() -> Status {
    HEED_RETURN_IF_ERROR(heed::check_struct(args, "args"));
    std::string_view backend;
    HEED_RETURN_IF_ERROR(heed::read_backend(options, backend));
    if (args->allocator != nullptr) HEED_RETURN_IF_ERROR(heed::check_struct(args->allocator, "allocator"));
    heed::AttentionProblem problem;
    HEED_RETURN_IF_ERROR(heed::pose(*args, problem));
    return heed::run_once(problem, heed::args_of(*args, problem), backend, args->allocator);
  });
}

}  // extern "C"
