// Looks at the data that the host never saw, once, before attention runs: lengths, offsets, page tables.
//
// Blocks 0 .. batch * check_slices - 1, check_slices a sequence, each for a part of its pages: status bits to sequence_status[b] and, where given, status[b]; block 0 also whether
// cu_seqlens_q is out of order, to sequence_status[batch]. Later blocks, packed queries only: rows that lie in no
// sequence's rows are written as 0 and -inf (split: marked as padding for combine).
//
// Needed for packed queries, pages that the attention kernel does not look at itself, and wherever status is asked for. In the first
// two cases attention kernels read sequence_status.
#include "params.h"
#include "ptx.cuh"
#include "rows.cuh"

namespace heed::cuda {

struct CheckSequencesVariant {
  int threads = 256;
};

// Packed: whether an entry of cu_seqlens_q[0 .. count) is negative, above the total or below one before it.
__device__ __forceinline__ bool out_of_order(const AttentionFwdParams& p, i64 count, int threads) {
  bool bad = false;
  for (i64 i = threadIdx.x; i < count; i += threads) {
    const i32 x = p.cu_seqlens_q[i];
    bad = bad || x < 0 || x > p.total_q || (i > 0 && x < p.cu_seqlens_q[i - 1]);
  }
  return __syncthreads_or(bad) != 0;
}

// Packed: whether sequence b starts before a sequence in front of it ends.
__device__ __forceinline__ bool overlaps(const AttentionFwdParams& p, i32 b, int threads) {
  const i32 begin = p.cu_seqlens_q[b];
  bool bad = false;
  for (i32 i = threadIdx.x; i < b; i += threads)
    bad = bad || (p.cu_seqlens_q[i] > begin && p.cu_seqlens_q[i] <= p.total_q);
  return __syncthreads_or(bad) != 0;
}

__device__ __forceinline__ void check_sequence(const AttentionFwdParams& p, i32 b, i32 slice, int threads) {
  BlockWork w;
  w.b = b;
  i32 bad = locate_sequence(p, w);
  if (p.cu_seqlens_q != nullptr && overlaps(p, b, threads)) bad |= kStatusLengthQ;
  if (p.page_size > 0 && bad == 0 && w.k_len > 0) {
    const i32* pages = p.page_table + w.cache_row * p.page_table_stride;
    const i64 first = w.k_begin / p.page_size, last = (w.k_begin + w.k_len - 1) / p.page_size;
    bool outside = false;
#pragma unroll 8
    for (i64 page = first + slice * threads + threadIdx.x; page <= last; page += p.check_slices * threads) {
      const i32 id = pages[page * p.page_table_step];
      outside = outside || id < 0 || id >= p.num_pages;
    }
    if (__syncthreads_or(outside) != 0) bad |= kStatusPage;
  }
  if (threadIdx.x != 0) return;
  if (p.check_slices > 1) {
    if (bad != 0 && p.sequence_status != nullptr) atomicOr(p.sequence_status + b, bad);
    if (bad != 0 && p.status != nullptr) atomicOr(p.status + b, bad);
    return;
  }
  if (p.sequence_status != nullptr) p.sequence_status[b] = bad;
  if (p.status != nullptr) p.status[b] = bad;
}

// Whether a sequence whose rows attention writes holds the row. In order: by bisection.
__device__ __forceinline__ bool row_is_owned(const AttentionFwdParams& p, i64 row) {
  i32 lo = 0, hi = static_cast<i32>(p.batch);  // the last entry that is <= row
  if (p.cu_seqlens_q[0] > row || p.cu_seqlens_q[hi] <= row) return false;
  while (hi - lo > 1) {
    const i32 mid = (lo + hi) / 2;
    if (p.cu_seqlens_q[mid] <= row)
      lo = mid;
    else
      hi = mid;
  }
  return true;
}

// Split keys whose partials have a row for every packed one: combine writes the row when it finds the mark.
__device__ __forceinline__ void clear_packed_row(const AttentionFwdParams& p, i64 row, int lane, int lanes) {
  for (i32 head = 0; head < p.nheads_q; ++head) {
    if (p.partial_lse == nullptr || p.partial_queries > 0)
      clear_row(p, 0, head, row, lane, lanes);
    else if (lane == 0)
      p.partial_lse[(row * p.nheads_q + head) * p.max_splits] = __uint_as_float(kPaddingLse);
  }
}

template <CheckSequencesVariant kV>
__global__ void __launch_bounds__(kV.threads) check_sequences(const __grid_constant__ AttentionFwdParams p) {
  constexpr int kLanes = 16, kRows = kV.threads / kLanes;
  launch_dependents();
  const i64 checking = p.batch * p.check_slices;
  if (blockIdx.x < checking) {
    const u32 slices = p.check_slices;
    check_sequence(p, static_cast<i32>(blockIdx.x / slices), static_cast<i32>(blockIdx.x % slices), kV.threads);
    if (blockIdx.x == 0 && p.cu_seqlens_q != nullptr) {
      const bool bad = out_of_order(p, p.batch + 1, kV.threads);
      if (threadIdx.x == 0 && p.sequence_status != nullptr) p.sequence_status[p.batch] = bad;
    }
    return;
  }
  // Attention runs after this and writes every row of the sequences it finds, so clearing too much does no harm.
  const bool bad = p.batch == 0 || out_of_order(p, p.batch + 1, kV.threads);
  const i64 step = static_cast<i64>(gridDim.x - checking) * kRows;
  for (i64 row = (blockIdx.x - checking) * kRows + threadIdx.x / kLanes; row < p.total_q; row += step)
    if (bad || !row_is_owned(p, row)) clear_packed_row(p, row, threadIdx.x % kLanes, kLanes);
}

}  // namespace heed::cuda
