// Appends new keys and values to a cache, turning keys (and queries, into q_out) by the rotary embedding on the way:
//
//   k_cache[start + t] = R(position + t) k_new[t]     v_cache[start + t] = v_new[t]     q_out[i] = R(position (+ i)) q[i]
//   R(n) turns the pair (x, y) = (r, r + rotary_dim / 2) or (2 r, 2 r + 1):  x cos[n][r] - y sin[n][r],  x sin[n][r] + y cos[n][r]
//
// in f32, rounded once. A block is one of `slices` of a sequence; a warp-sized group of threads takes a row (token, head) at a
// time. A sequence whose data is bad appends nothing, and its rows of q_out are 0. q_out may be q: a thread reads both
// elements of a pair before it writes either. No shared memory.
#include "params.h"
#include "ptx.cuh"

namespace heed::cuda {

struct KvAppendVariant {
  int element = kElementBf16;
  int threads = 128;
};

template <int kElement>
__device__ __forceinline__ float load_value(const void* base, i64 at) {
  if constexpr (kElement == kElementF32)
    return static_cast<const float*>(base)[at];
  else
    return cvt_to_float<kElement == kElementBf16>(static_cast<const unsigned short*>(base)[at]);
}
template <int kElement>
__device__ __forceinline__ void store_value(void* base, i64 at, float x) {
  if constexpr (kElement == kElementF32)
    static_cast<float*>(base)[at] = x;
  else
    static_cast<unsigned short*>(base)[at] = static_cast<unsigned short>(cvt_pair<kElement == kElementBf16>(x, 0.0f));
}
template <int kElement>
__device__ __forceinline__ void copy_value(const void* from, i64 from_at, void* to, i64 to_at) {
  if constexpr (kElement == kElementF32)
    static_cast<u32*>(to)[to_at] = static_cast<const u32*>(from)[from_at];
  else
    static_cast<unsigned short*>(to)[to_at] = static_cast<const unsigned short*>(from)[from_at];
}

struct AppendWork {
  i32 b;
  i32 status = 0;
  i64 start = 0, position = 0, cache_row = 0;
  i64 first_row = 0, num_rows = 0;  // of q
  i64 first_new = 0, num_new = 0;  // of k_new and v_new
  i64 rows = 0;  // of q_out, to be written whatever the status
};

// overlaps: the sequence's queries start before a sequence in front of it ends.
__device__ __forceinline__ AppendWork append_work(const KvAppendParams& p, i32 b, bool overlaps) {
  AppendWork w;
  w.b = b;
  if (p.q != nullptr) {
    w.num_rows = p.seqlen_q;
    if (p.cu_seqlens_q != nullptr) {
      const i64 begin = p.cu_seqlens_q[b], end = p.cu_seqlens_q[b + 1];
      const bool good = begin >= 0 && end >= begin && end <= p.total_q && !overlaps;
      w.first_row = good ? begin : 0, w.num_rows = good ? end - begin : 0;
      if (!good) w.status |= kStatusLengthQ;
    }
  }
  w.rows = w.num_rows;
  bool good = true;
  if (p.k_new != nullptr) {
    w.num_new = p.seqlen_new;
    if (p.cu_seqlens_new != nullptr) {
      const i64 begin = p.cu_seqlens_new[b], end = p.cu_seqlens_new[b + 1];
      good = begin >= 0 && end >= begin && end <= p.total_new;
      w.first_new = begin, w.num_new = end - begin;
    }
  }
  const i64 leftpad = p.leftpad_k != nullptr ? p.leftpad_k[b] : 0;
  w.start = p.cache_seqlens[b];
  w.position = p.rotary_seqlens != nullptr ? p.rotary_seqlens[b] : w.start - leftpad;
  w.cache_row = b;
  if (p.cache_batch_idx != nullptr) {
    w.cache_row = p.cache_batch_idx[b];
    if (w.cache_row < 0 || w.cache_row >= p.cache_rows) w.status |= kStatusPage;
  }
  if (!good || w.start < 0 || w.start > p.seqlen_k || leftpad < 0 || leftpad > w.start) w.status |= kStatusLengthK;
  if (w.status == 0 && p.rotary_dim > 0) {
    i64 last = w.num_new - 1;
    if (w.num_rows > 0) last = max(last, p.q_per_position ? w.num_rows - 1 : 0);
    if (last >= 0 && (w.position < 0 || w.position + last >= p.rotary_rows)) w.status |= kStatusLengthK;
  }
  if (w.status == 0 && w.start + w.num_new > p.seqlen_k) w.status |= kStatusAppend;
  return w;
}

__device__ __forceinline__ i32 page_of(const KvAppendParams& p, const AppendWork& w, i64 key) {
  return p.page_table[w.cache_row * p.page_table_stride + key / p.page_size * p.page_table_step];
}

// Whether a page that the new keys go to lies outside the cache; the same in all threads.
__device__ __forceinline__ bool page_outside(const KvAppendParams& p, const AppendWork& w, int threads) {
  if (p.page_size == 0) return false;
  bool outside = false;
  if (w.status == 0 && w.num_new > 0) {
    const i64 first = w.start / p.page_size, last = (w.start + w.num_new - 1) / p.page_size;
    for (i64 page = first + threadIdx.x; page <= last; page += threads) {
      const i32 id = page_of(p, w, page * p.page_size);
      outside = outside || id < 0 || id >= p.num_pages;
    }
  }
  return __syncthreads_or(outside) != 0;
}

__device__ __forceinline__ i64 cache_place(const KvAppendParams& p, const AppendWork& w, const Strides3& stride,
                                           i64 key) {
  if (p.page_size == 0) return w.cache_row * stride.b + key * stride.s;
  return page_of(p, w, key) * stride.b + key % p.page_size * stride.s;
}

template <int kElement>
__device__ __forceinline__ void turn_row(const KvAppendParams& p, const void* from, i64 from_at, void* to, i64 to_at,
                                         i64 position, int lane, int lanes) {
  const i32 pairs = p.rotary_dim / 2;
  for (i32 r = lane; r < pairs; r += lanes) {
    const i64 cos_at = position * p.cos_stride + r, sin_at = position * p.sin_stride + r;
    const float c =
        p.rotary_is_f32 ? static_cast<const float*>(p.rotary_cos)[cos_at] : load_value<kElement>(p.rotary_cos, cos_at);
    const float s =
        p.rotary_is_f32 ? static_cast<const float*>(p.rotary_sin)[sin_at] : load_value<kElement>(p.rotary_sin, sin_at);
    const i32 a = p.rotary_interleaved ? 2 * r : r, b = p.rotary_interleaved ? 2 * r + 1 : r + pairs;
    const float x = load_value<kElement>(from, from_at + a), y = load_value<kElement>(from, from_at + b);
    store_value<kElement>(to, to_at + a, x * c - y * s);
    store_value<kElement>(to, to_at + b, x * s + y * c);
  }
  for (i32 d = p.rotary_dim + lane; d < p.head_dim; d += lanes) copy_value<kElement>(from, from_at + d, to, to_at + d);
}

// Packed queries: whether some entry of cu_seqlens_q is negative, above the total or below one before it; and whether
// sequence b starts before a sequence in front of it ends. The same in all threads.
__device__ __forceinline__ bool out_of_order(const KvAppendParams& p, i32 b, int threads, bool& overlaps) {
  overlaps = false;
  if (p.cu_seqlens_q == nullptr) return false;
  const i32 begin = p.cu_seqlens_q[b];
  bool bad = false, late = false;
  for (i64 i = threadIdx.x; i <= p.batch; i += threads) {
    const i32 x = p.cu_seqlens_q[i];
    bad = bad || x < 0 || x > p.total_q || (i > 0 && x < p.cu_seqlens_q[i - 1]);
    late = late || (i < b && x > begin && x <= p.total_q);
  }
  overlaps = __syncthreads_or(late) != 0;
  return __syncthreads_or(bad) != 0;
}

// Offsets out of order: whether a sequence whose queries are turned holds the row.
__device__ __forceinline__ bool row_is_owned(const KvAppendParams& p, i64 row) {
  i64 end_before = 0;
  for (i64 b = 0; b < p.batch; ++b) {
    const i64 begin = p.cu_seqlens_q[b], end = p.cu_seqlens_q[b + 1];
    if (begin >= end_before && begin <= row && row < end && end <= p.total_q) return true;
    if (begin <= p.total_q) end_before = max(end_before, begin);
  }
  return false;
}

// Rows of q_out that lie between this sequence and the one before it, and after the last one.
template <int kElement>
__device__ __forceinline__ void clear_gap(const KvAppendParams& p, i64 begin, i64 end, i32 group, i32 groups, int lane,
                                          int lanes) {
  for (i64 unit = begin * p.nheads_q + group; unit < end * p.nheads_q; unit += groups) {
    const i64 at = unit % p.nheads_q * p.q_out_stride.h + unit / p.nheads_q * p.q_out_stride.s;
    for (i32 d = lane; d < p.head_dim; d += lanes) store_value<kElement>(p.q_out, at + d, 0.0f);
  }
}

template <KvAppendVariant kV>
__global__ void __launch_bounds__(kV.threads, 4) kv_append(const __grid_constant__ KvAppendParams p) {
  constexpr int kLanes = 32;
  const int lane = threadIdx.x % kLanes;
  const i32 slice = static_cast<i32>(blockIdx.x % p.slices);
  const i32 group = slice * (kV.threads / kLanes) + threadIdx.x / kLanes, groups = p.slices * (kV.threads / kLanes);
  if (p.batch == 0) {  // packed queries and no sequence: every row lies between sequences
    clear_gap<kV.element>(p, 0, p.total_q, group, groups, lane, kLanes);
    return;
  }
  const i32 b = static_cast<i32>(blockIdx.x / p.slices);
  bool overlaps;
  const bool disorder = out_of_order(p, b, kV.threads, overlaps);
  AppendWork w = append_work(p, b, overlaps);
  if (page_outside(p, w, kV.threads)) w.status |= kStatusPage;
  if (p.status != nullptr && slice == 0 && threadIdx.x == 0) p.status[w.b] = w.status;

  if (p.k_new != nullptr && w.status == 0) {
    for (i64 unit = group; unit < w.num_new * p.nheads_kv; unit += groups) {
      const i64 t = unit / p.nheads_kv, head = unit % p.nheads_kv;
      turn_row<kV.element>(p, p.k_new,
                           w.b * p.k_new_stride.b + head * p.k_new_stride.h + (w.first_new + t) * p.k_new_stride.s,
                           p.k_cache, cache_place(p, w, p.k_cache_stride, w.start + t) + head * p.k_cache_stride.h,
                           w.position + t, lane, kLanes);
      const i64 from = w.b * p.v_new_stride.b + head * p.v_new_stride.h + (w.first_new + t) * p.v_new_stride.s;
      const i64 to = cache_place(p, w, p.v_cache_stride, w.start + t) + head * p.v_cache_stride.h;
      for (i32 d = lane; d < p.head_dim_v; d += kLanes) copy_value<kV.element>(p.v_new, from + d, p.v_cache, to + d);
    }
  }
  if (p.q == nullptr) return;
  for (i64 unit = group; unit < w.rows * p.nheads_q; unit += groups) {
    const i64 i = unit / p.nheads_q, head = unit % p.nheads_q;
    const i64 to = w.b * p.q_out_stride.b + head * p.q_out_stride.h + (w.first_row + i) * p.q_out_stride.s;
    if (w.status == 0) {
      turn_row<kV.element>(p, p.q, w.b * p.q_stride.b + head * p.q_stride.h + (w.first_row + i) * p.q_stride.s, p.q_out,
                           to, w.position + (p.q_per_position ? i : 0), lane, kLanes);
    } else {
      for (i32 d = lane; d < p.head_dim; d += kLanes) store_value<kV.element>(p.q_out, to + d, 0.0f);
    }
  }
  if (p.cu_seqlens_q == nullptr) return;
  if (disorder) {
    if (w.b != 0) return;
    for (i64 row = group; row < p.total_q; row += groups)
      if (!row_is_owned(p, row)) clear_gap<kV.element>(p, row, row + 1, 0, 1, lane, kLanes);
    return;
  }
  if (w.b == 0)
    clear_gap<kV.element>(p, 0, min(max(0ll, static_cast<i64>(p.cu_seqlens_q[0])), p.total_q), group, groups, lane,
                          kLanes);
  if (w.b == p.batch - 1)
    clear_gap<kV.element>(p, max(0ll, static_cast<i64>(p.cu_seqlens_q[p.batch])), p.total_q, group, groups, lane,
                          kLanes);
}

}  // namespace heed::cuda
