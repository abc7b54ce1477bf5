// kv_append through the C interface: argument structs to a Problem and Args, plan, run.
#include "base/format.h"
#include "base/threads.h"
#include "capi_args.h"
#include "capi_error.h"
#include "capi_handles.h"
#include "capi_run.h"
#include "capi_tensors.h"

namespace heed {
namespace {

Status check_options(const heed_kv_append_args& a) {
  HEED_RETURN_IF_ERROR(check_enum("layout_new", a.layout_new, 3, "0 (bshd), 1 (bhsd) or 2 (thd)"));
  HEED_RETURN_IF_ERROR(check_enum("layout_cache", a.layout_cache, 2, "0 (bshd) or 1 (bhsd)"));
  HEED_RETURN_IF_ERROR(check_enum("device", a.device, 2, "0 (cpu) or 1 (cuda)"));
  if (a.reserved != 0) return invalid_argument(heed::format("reserved = {}: must be 0", a.reserved));
  HEED_RETURN_IF_ERROR(check_enum("rotary_style", a.rotary_style, 2, "0 (half) or 1 (interleaved)"));
  return check_enum("q_positions", a.q_positions, 2, "0 (all at the first) or 1 (query i at the first + i)");
}

Status check_presence(const heed_kv_append_args& a) {
  HEED_RETURN_IF_ERROR(required("k_cache", a.k_cache, "kv_append needs it"));
  HEED_RETURN_IF_ERROR(required("v_cache", a.v_cache, "kv_append needs it"));
  HEED_RETURN_IF_ERROR(required("cache_seqlens", a.cache_seqlens, "kv_append needs it"));
  HEED_RETURN_IF_ERROR(present(a.k_new) ? required("v_new", a.v_new, "k_new is given")
                                        : absent("v_new", a.v_new, "k_new is not"));
  HEED_RETURN_IF_ERROR(present(a.rotary_cos) ? required("rotary_sin", a.rotary_sin, "rotary_cos is given")
                                             : absent("rotary_sin", a.rotary_sin, "rotary_cos is not"));
  HEED_RETURN_IF_ERROR(present(a.q) ? required("q_out", a.q_out, "q is given; it may be q itself")
                                    : absent("q_out", a.q_out, "q is not"));
  if (!present(a.rotary_cos)) {
    HEED_RETURN_IF_ERROR(absent("q", a.q, "without rotary_cos nothing turns it"));
    HEED_RETURN_IF_ERROR(absent("rotary_seqlens", a.rotary_seqlens, "without rotary_cos nothing is turned"));
  }
  const bool packed = a.layout_new == HEED_LAYOUT_THD;
  const char* const only_thd = "only with layout_new thd and its tensor";
  HEED_RETURN_IF_ERROR(packed && present(a.k_new)
                           ? required("cu_seqlens_new", a.cu_seqlens_new, "layout_new thd needs it")
                           : absent("cu_seqlens_new", a.cu_seqlens_new, only_thd));
  return packed && present(a.q) ? required("cu_seqlens_q", a.cu_seqlens_q, "layout_new thd needs it")
                                : absent("cu_seqlens_q", a.cu_seqlens_q, only_thd);
}

struct RowDims {
  Dim packed, rows, sequence, heads;
};

Status bind_rows(Extents& extents, const char* name, const heed_tensor& t, int32_t layout, const RowDims& dims,
                 Dim last) {
  if (!present(t)) return {};
  switch (layout) {
    case HEED_LAYOUT_BSHD: return extents.bind(name, t, {dims.rows, dims.sequence, dims.heads, last});
    case HEED_LAYOUT_BHSD: return extents.bind(name, t, {dims.rows, dims.heads, dims.sequence, last});
    default: return extents.bind(name, t, {dims.packed, dims.heads, last});
  }
}

Status bind_pages(const heed_kv_append_args& a, Extents& extents) {
  const Dim rows = present(a.cache_batch_idx) ? Dim::kCacheRows : Dim::kBatch;
  HEED_RETURN_IF_ERROR(extents.bind("page_table", a.page_table, {rows, Dim::kMaxPages}));
  HEED_RETURN_IF_ERROR(check_dtype("page_table", a.page_table, Dtype::kI32));
  int64_t capacity = 0;
  if (extents[Dim::kPageSize] < 1) return invalid_argument("k_cache: page_size = 0: must be at least 1");
  if (__builtin_mul_overflow(extents[Dim::kPageSize], extents[Dim::kMaxPages], &capacity)) {
    return invalid_argument(heed::format("page_table.shape[1] = {}: that many pages of {} keys overflow 64 bits",
                                         extents[Dim::kMaxPages], extents[Dim::kPageSize]));
  }
  extents.set(Dim::kSeqlenK, capacity, "page_table", 1);
  return {};
}

Status bind_extents(const heed_kv_append_args& a, Extents& extents) {
  HEED_RETURN_IF_ERROR(check_batch_vector("cache_seqlens", a.cache_seqlens, extents));
  const RowDims added = {Dim::kTotalNew, Dim::kBatch, Dim::kSeqlenNew, Dim::kNheadsKv};
  const RowDims queries = {Dim::kTotalQ, Dim::kBatch, Dim::kSeqlenQ, Dim::kNheadsQ};
  const bool paged = present(a.page_table);
  const Dim rows = paged ? Dim::kNumPages : present(a.cache_batch_idx) ? Dim::kCacheRows : Dim::kBatch;
  const RowDims cache = {Dim::kCount, rows, paged ? Dim::kPageSize : Dim::kSeqlenK, Dim::kNheadsKv};
  HEED_RETURN_IF_ERROR(bind_rows(extents, "k_cache", a.k_cache, a.layout_cache, cache, Dim::kHeadDim));
  HEED_RETURN_IF_ERROR(bind_rows(extents, "v_cache", a.v_cache, a.layout_cache, cache, Dim::kHeadDimV));
  if (paged) HEED_RETURN_IF_ERROR(bind_pages(a, extents));
  HEED_RETURN_IF_ERROR(bind_rows(extents, "k_new", a.k_new, a.layout_new, added, Dim::kHeadDim));
  HEED_RETURN_IF_ERROR(bind_rows(extents, "v_new", a.v_new, a.layout_new, added, Dim::kHeadDimV));
  HEED_RETURN_IF_ERROR(bind_rows(extents, "q", a.q, a.layout_new, queries, Dim::kHeadDim));
  HEED_RETURN_IF_ERROR(bind_rows(extents, "q_out", a.q_out, a.layout_new, queries, Dim::kHeadDim));
  if (present(a.rotary_cos)) {
    HEED_RETURN_IF_ERROR(extents.bind("rotary_cos", a.rotary_cos, {Dim::kRotaryRows, Dim::kRotaryPairs}));
    HEED_RETURN_IF_ERROR(extents.bind("rotary_sin", a.rotary_sin, {Dim::kRotaryRows, Dim::kRotaryPairs}));
    if (extents[Dim::kRotaryPairs] < 1 || extents[Dim::kRotaryPairs] > extents[Dim::kHeadDim] / 2) {
      return invalid_argument(
          heed::format("rotary_cos.shape[1] = {}: must be rotary_dim / 2, from 1 to {} (half of head_dim)",
                       extents[Dim::kRotaryPairs], extents[Dim::kHeadDim] / 2));
    }
  }
  if (present(a.cu_seqlens_new)) HEED_RETURN_IF_ERROR(extents.bind_offsets("cu_seqlens_new", a.cu_seqlens_new));
  if (present(a.cu_seqlens_q)) HEED_RETURN_IF_ERROR(extents.bind_offsets("cu_seqlens_q", a.cu_seqlens_q));
  HEED_RETURN_IF_ERROR(check_batch_vector("rotary_seqlens", a.rotary_seqlens, extents));
  HEED_RETURN_IF_ERROR(check_batch_vector("leftpad_k", a.leftpad_k, extents));
  HEED_RETURN_IF_ERROR(check_batch_vector("cache_batch_idx", a.cache_batch_idx, extents));
  return check_batch_vector("status", a.status, extents);
}

void set_fields(const heed_kv_append_args& a, const Extents& extents, KvAppendProblem& p) {
  p.dtype = static_cast<Dtype>(a.k_cache.dtype);
  p.rotary_dtype = static_cast<Dtype>(a.rotary_cos.dtype);
  p.layout_new = static_cast<Layout>(a.layout_new);
  p.layout_cache = static_cast<Layout>(a.layout_cache);
  p.device = static_cast<Device>(a.device);
  p.rotary_style = present(a.rotary_cos) ? static_cast<RotaryStyle>(a.rotary_style) : RotaryStyle::kHalf;
  p.batch = extents[Dim::kBatch];
  p.nheads_q = extents[Dim::kNheadsQ];
  p.nheads_kv = extents[Dim::kNheadsKv];
  p.seqlen_q = extents[Dim::kSeqlenQ];
  p.seqlen_new = extents[Dim::kSeqlenNew];
  p.seqlen_k = extents[Dim::kSeqlenK];
  p.total_q = extents[Dim::kTotalQ];
  p.total_new = extents[Dim::kTotalNew];
  p.head_dim = extents[Dim::kHeadDim];
  p.head_dim_v = extents[Dim::kHeadDimV];
  p.page_size = extents[Dim::kPageSize];
  p.num_pages = extents[Dim::kNumPages];
  p.cache_batch = extents[Dim::kCacheRows];
  p.rotary_dim = 2 * extents[Dim::kRotaryPairs];
  p.rotary_rows = extents[Dim::kRotaryRows];
  p.append = present(a.k_new);
  p.q_per_position = present(a.q) && a.q_positions != 0;
  p.rotary_seqlens = present(a.rotary_seqlens);
  p.leftpad = present(a.leftpad_k);
}

Status build_problem(const heed_kv_append_args& a, KvAppendProblem& p) {
  HEED_RETURN_IF_ERROR(check_options(a));
  HEED_RETURN_IF_ERROR(check_presence(a));
  Extents extents;
  HEED_RETURN_IF_ERROR(bind_extents(a, extents));
  set_fields(a, extents, p);
  if (present(a.cache_batch_idx) && p.cache_batch == 0 && p.batch > 0) {
    return invalid_argument(heed::format("{}.shape[0] = 0: must be at least 1, cache_batch_idx reads rows of it",
                                         p.paged() ? "page_table" : "k_cache"));
  }
  HEED_RETURN_IF_ERROR(resolve_place(a, p));
  struct Item {
    KvSlot slot;
    const heed_tensor& tensor;
    std::array<int64_t, 4> strides;
  };
  const Layout fresh = p.layout_new, cache = p.layout_cache;
  const Item items[] = {{KvSlot::kKNew, a.k_new, strides_bhsd(a.k_new, fresh)},
                        {KvSlot::kVNew, a.v_new, strides_bhsd(a.v_new, fresh)},
                        {KvSlot::kKCache, a.k_cache, strides_bhsd(a.k_cache, cache)},
                        {KvSlot::kVCache, a.v_cache, strides_bhsd(a.v_cache, cache)},
                        {KvSlot::kQ, a.q, strides_bhsd(a.q, fresh)},
                        {KvSlot::kQOut, a.q_out, strides_bhsd(a.q_out, fresh)},
                        {KvSlot::kCos, a.rotary_cos, {0, 0, a.rotary_cos.stride[0], a.rotary_cos.stride[1]}},
                        {KvSlot::kSin, a.rotary_sin, {0, 0, a.rotary_sin.stride[0], a.rotary_sin.stride[1]}},
                        {KvSlot::kPageTable, a.page_table, {a.page_table.stride[0], a.page_table.stride[1], 0, 0}}};
  for (const Item& item : items) {
    if (!present(item.tensor)) continue;
    HEED_RETURN_IF_ERROR(check_dtype(slot_name(item.slot).data(), item.tensor, slot_dtype(p, item.slot)));
    place(p, item.slot, item.strides, item.tensor.data);
  }
  return {};
}

void* memory_of(const heed_tensor& tensor) { return present(tensor) ? tensor.data : nullptr; }
const int32_t* numbers_of(const heed_tensor& tensor) { return static_cast<const int32_t*>(memory_of(tensor)); }

}  // namespace

Result<heed_kv_append_args> read_args(const heed_kv_append_args* args) {
  HEED_RETURN_IF_ERROR(check_struct(args, "args"));
  heed_kv_append_args copy = *args;
  copy.struct_size = sizeof copy;
  return copy;
}

Result<KvAppendProblem> problem_of(const heed_kv_append_args& args) {
  KvAppendProblem problem;
  HEED_RETURN_IF_ERROR(build_problem(args, problem));
  HEED_RETURN_IF_ERROR(validate(problem));
  return problem;
}

KvAppendArgs args_of(const heed_kv_append_args& a, const KvAppendProblem& problem) {
  KvAppendArgs args;
  args.k_new = memory_of(a.k_new);
  args.v_new = memory_of(a.v_new);
  args.q = memory_of(a.q);
  args.k_cache = memory_of(a.k_cache);
  args.v_cache = memory_of(a.v_cache);
  args.q_out = memory_of(a.q_out);
  args.rotary_cos = memory_of(a.rotary_cos);
  args.rotary_sin = memory_of(a.rotary_sin);
  args.cu_seqlens_new = numbers_of(a.cu_seqlens_new);
  args.cu_seqlens_q = numbers_of(a.cu_seqlens_q);
  args.cache_seqlens = numbers_of(a.cache_seqlens);
  args.rotary_seqlens = numbers_of(a.rotary_seqlens);
  args.leftpad_k = numbers_of(a.leftpad_k);
  args.page_table = numbers_of(a.page_table);
  args.cache_batch_idx = problem.cache_batch > 0 ? numbers_of(a.cache_batch_idx) : nullptr;
  args.status = static_cast<int32_t*>(memory_of(a.status));
  args.executor = a.executor != nullptr ? a.executor : &pool_executor();
  args.stream = a.stream;
  args.workspace = a.workspace;
  args.workspace_bytes = a.workspace_bytes;
  return args;
}

}  // namespace heed

using heed::guarded;
using heed::Status;

extern "C" {

void heed_kv_append_args_init(heed_kv_append_args* args) {
  if (args == nullptr) return;
  *args = {};
  args->struct_size = sizeof *args;
  args->device_index = -1;
}

heed_status heed_kv_append_problem(const heed_kv_append_args* args, heed_problem** problem) {
  return guarded([&]() -> Status {
    HEED_RETURN_IF_ERROR(heed::check_struct(args, "args"));
    if (problem == nullptr) return heed::invalid_argument("problem = NULL: must be an address");
    heed::Result<heed::KvAppendProblem> made = heed::problem_of(*args);
    if (!made.ok()) return made.status();
    *problem = new heed_problem{std::move(made).value()};
    return {};
  });
}

heed_status heed_kv_append_run(const heed_plan* plan, const heed_kv_append_args* args) {
  return guarded([&]() -> Status {
    HEED_RETURN_IF_ERROR(heed::check_struct(args, "args"));
    const heed::Plan<heed::KvAppendProblem>* planned = nullptr;
    HEED_RETURN_IF_ERROR(heed::plan_of(plan, "kv_append", planned));
    heed::KvAppendProblem asked;
    HEED_RETURN_IF_ERROR(heed::build_problem(*args, asked));
    HEED_RETURN_IF_ERROR(heed::check_same<heed::KvSlot>(planned->problem, asked, [](heed::KvAppendProblem&) {}));
    return heed::run(*planned, heed::args_of(*args, planned->problem));
  });
}

heed_status heed_kv_append(const heed_kv_append_args* args, const heed_plan_options* options) {
  return guarded([&]() -> Status {
    HEED_RETURN_IF_ERROR(heed::check_struct(args, "args"));
    std::string_view backend;
    HEED_RETURN_IF_ERROR(heed::read_backend(options, backend));
    if (args->allocator != nullptr) HEED_RETURN_IF_ERROR(heed::check_struct(args->allocator, "allocator"));
    heed::KvAppendProblem problem;
    HEED_RETURN_IF_ERROR(heed::build_problem(*args, problem));
    return heed::run_once(problem, heed::args_of(*args, problem), backend, args->allocator);
  });
}

}  // extern "C"
