// Merges the partial results of the splits of each row, in split order:
//
//   M = max_s lse_s     L = sum_s exp(lse_s - M) (+ exp(sink - M))     out = sum_s exp(lse_s - M) out_s / L     lse = M + ln L
//
// partial_out [rows, nheads_q, max_splits, head_dim_v] and partial_lse [rows, nheads_q, max_splits] in f32; a split without
// a visible key holds -inf, and its out is not read. A row that no query owns holds kPaddingLse in split 0: it becomes 0 and
// -inf, sink or not; with max_rows it is the other kernel's, and left alone. The sink counts here, once.
//
// Many splits: a block a row; warp i adds splits i, i + warps, ..., then the warps' sums are added in order. Up to as many
// splits as there are warps: a warp a row, which adds the same numbers in the same order, so that the bits are the same.
//
// Shared memory: sums [warps][512], 16 KB, for many splits.
#include "params.h"
#include "ptx.cuh"

namespace heed::cuda {

struct CombineVariant {
  int element = kElementBf16;
  int warps = 8;
  int rows = 1;  // of a block: 1 or as many as warps
};

constexpr float kCombineLn2 = 0.693147180559945f, kCombineLog2e = 1.44269504088896f;
constexpr int kCombineColumns = 16;  // of a lane: head_dim_v up to 512

// A row's place and, by all lanes of a warp, what its splits weigh: the same numbers in every warp that asks.
struct CombinedRow {
  i32 head;
  i64 b = 0, query;
  const float *lse_of, *out_of;
  bool padding = false;
  float reference = 0.0f, total = 0.0f;

  __device__ __forceinline__ CombinedRow(const AttentionFwdParams& p, i64 index)
      : head(static_cast<i32>(index % p.nheads_q)),
        query(index / p.nheads_q),
        lse_of(p.partial_lse + index * p.max_splits),
        out_of(p.partial_out + index * p.max_splits * p.head_dim_v) {
    if (p.partial_queries > 0 || p.cu_seqlens_q == nullptr) {
      const i64 queries = p.partial_queries > 0 ? p.partial_queries : p.seqlen_q;
      b = query / queries, query %= queries;
      if (p.cu_seqlens_q != nullptr) query += p.cu_seqlens_q[b];
    }
  }

  // Lane i has splits i, i + 32 and so on.
  __device__ __forceinline__ void weigh(const AttentionFwdParams& p, int lane) {
    const float kInf = __int_as_float(0x7f800000);
    padding = __float_as_uint(lse_of[0]) == kPaddingLse;
    const float sink = p.sinks != nullptr ? p.sinks[head] : -kInf;
    const float mine0 = lane < p.max_splits ? lse_of[lane] : -kInf,
                mine1 = lane + 32 < p.max_splits ? lse_of[lane + 32] : -kInf;
    float top = fmaxf(sink, fmaxf(mine0, mine1));
    for (int s = lane + 64; s < p.max_splits; s += 32) top = fmaxf(top, lse_of[s]);
#pragma unroll
    for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
    reference = top == -kInf ? 0.0f : top;
    total = ex2((mine0 - reference) * kCombineLog2e) + ex2((mine1 - reference) * kCombineLog2e);
    for (int s = lane + 64; s < p.max_splits; s += 32) total += ex2((lse_of[s] - reference) * kCombineLog2e);
#pragma unroll
    for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(0xffffffffu, total, step);
    total += ex2((sink - reference) * kCombineLog2e);
  }
  __device__ __forceinline__ float weight(float lse) const { return ex2((lse - reference) * kCombineLog2e); }

  // sum: of the weighted splits, of one column.
  template <int kElement>
  __device__ __forceinline__ void store(const AttentionFwdParams& p, int column, float sum) const {
    const float inverse = padding || total == 0.0f ? 0.0f : 1.0f / total;
    const i64 at = b * p.out_stride.b + head * p.out_stride.h + query * p.out_stride.s;
    const float x = padding ? 0.0f : sum * inverse;
    if (kElement == kElementF32 || p.out_is_f32)
      static_cast<float*>(p.out)[at + column] = x;
    else
      static_cast<unsigned short*>(p.out)[at + column] =
          static_cast<unsigned short>(cvt_pair<kElement == kElementBf16>(x, 0.0f));
  }
  __device__ __forceinline__ void store_lse(const AttentionFwdParams& p) const {
    if (p.lse != nullptr)
      p.lse[b * p.lse_stride.b + head * p.lse_stride.h + query * p.lse_stride.s] =
          padding || total == 0.0f ? -__int_as_float(0x7f800000) : reference + lg2(total) * kCombineLn2;
  }
};

// A warp a row, of few splits.
template <CombineVariant kV>
__device__ __forceinline__ void combine_few(const AttentionFwdParams& p, int warp, int lane) {
  constexpr int kAtOnce = 4;  // columns of a lane
  const i64 sequences = p.cu_seqlens_q != nullptr && p.partial_queries == 0 ? 1 : p.batch;
  const i64 queries = p.partial_queries > 0        ? p.partial_queries
                      : p.cu_seqlens_q != nullptr ? p.total_q
                                                  : p.seqlen_q;
  const i64 index = static_cast<i64>(blockIdx.x) * kV.rows + warp;
  if (index >= sequences * queries * p.nheads_q) return;
  CombinedRow row(p, index);
  wait_for_primary();
  float lse[kV.warps];
#pragma unroll
  for (int s = 0; s < kV.warps; ++s) lse[s] = s < p.max_splits ? row.lse_of[s] : -__int_as_float(0x7f800000);
#pragma unroll 1
  for (int first = lane; first - lane < p.head_dim_v; first += kAtOnce * 32) {
    // Asked for before the weights are known: what a split without a key holds is not used.
    float part[kV.warps][kAtOnce];
#pragma unroll
    for (int s = 0; s < kV.warps; ++s)
#pragma unroll
      for (int c = 0; c < kAtOnce; ++c)
        part[s][c] = s < p.max_splits && first + c * 32 < p.head_dim_v ? row.out_of[s * p.head_dim_v + first + c * 32]
                                                                       : 0.0f;
    if (first == lane) {
      row.weigh(p, lane);
      if (row.padding && p.max_rows > 0) return;
    }
    float sum[kAtOnce] = {};
#pragma unroll
    for (int s = 0; s < kV.warps; ++s) {
      if (lse[s] == -__int_as_float(0x7f800000)) continue;
#pragma unroll
      for (int c = 0; c < kAtOnce; ++c) sum[c] = __fadd_rn(sum[c], __fmul_rn(row.weight(lse[s]), part[s][c]));
    }
#pragma unroll
    for (int c = 0; c < kAtOnce; ++c)
      if (first + c * 32 < p.head_dim_v) row.template store<kV.element>(p, first + c * 32, sum[c]);
  }
  if (lane == 0) row.store_lse(p);
}

template <CombineVariant kV>
__global__ void __launch_bounds__(kV.warps * 32) combine(const __grid_constant__ AttentionFwdParams p) {
  constexpr int kColumns = kCombineColumns;
  const float kInf = __int_as_float(0x7f800000);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  if constexpr (kV.rows > 1) {
    combine_few<kV>(p, warp, lane);
  } else {
    __shared__ float sums[kV.warps][512];
    CombinedRow row(p, blockIdx.x);
    const float *lse_of = row.lse_of, *out_of = row.out_of;
    wait_for_primary();

    // The first splits' columns are asked for before the weights are known: what a split without a key holds is not used.
    constexpr int kAhead = 4, kFirst = 4;  // splits of this warp; columns of a lane
    float ahead[kAhead][kFirst];
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
#pragma unroll
      for (int c = 0; c < kFirst; ++c) {
        const i32 s = warp + i * kV.warps;
        ahead[i][c] = s < p.max_splits && lane + c * 32 < p.head_dim_v
                          ? out_of[static_cast<i64>(s) * p.head_dim_v + lane + c * 32]
                          : 0.0f;
      }
    row.weigh(p, lane);
    if (row.padding && p.max_rows > 0) return;

    float acc[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) acc[c] = 0.0f;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const i32 s = warp + i * kV.warps;
      const float lse = s < p.max_splits ? lse_of[s] : -kInf, weight = row.weight(lse);
      if (lse == -kInf) continue;
#pragma unroll
      for (int c = 0; c < kFirst; ++c) acc[c] = fmaf(weight, ahead[i][c], acc[c]);
      if (p.head_dim_v > kFirst * 32) {
#pragma unroll
        for (int c = kFirst; c < kColumns; ++c)
          if (lane + c * 32 < p.head_dim_v)
            acc[c] = fmaf(weight, out_of[static_cast<i64>(s) * p.head_dim_v + lane + c * 32], acc[c]);
      }
    }
#pragma unroll 4
    for (int s = warp + kAhead * kV.warps; s < p.max_splits; s += kV.warps) {
      const float lse = lse_of[s], weight = row.weight(lse);
      const float* from = out_of + static_cast<i64>(s) * p.head_dim_v;
      if (lse == -kInf) continue;
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
        if (lane + c * 32 < p.head_dim_v) acc[c] = fmaf(weight, from[lane + c * 32], acc[c]);
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      if (lane + c * 32 < p.head_dim_v) sums[warp][lane + c * 32] = acc[c];
    __syncthreads();

    for (int column = thread; column < p.head_dim_v; column += kV.warps * 32) {
      float x = 0.0f;
#pragma unroll
      for (int i = 0; i < kV.warps; ++i) x += sums[i][column];
      row.template store<kV.element>(p, column, x);
    }
    if (thread == 0) row.store_lse(p);
  }
}

}  // namespace heed::cuda
