// Merges the partial results of the splits of each row, in split order:
//
//   M = max_s lse_s     L = sum_s exp(lse_s - M) (+ exp(sink - M))     out = sum_s exp(lse_s - M) out_s / L     lse = M + ln L
//
// partial_out [rows, nheads_q, max_splits, head_dim_v] and partial_lse [rows, nheads_q, max_splits] in f32; a split without
// a visible key holds -inf, and its out is not read. A row that no query owns holds kPaddingLse in split 0: it becomes 0 and
// -inf, sink or not; with max_rows it is the other kernel's, and left alone. A block a row: warp i adds splits i, i + warps, ..., then the warps' sums are added in order; the sink
// counts here, once.
//
// Shared memory: sums [warps][512], 16 KB.
#include "params.h"
#include "ptx.cuh"

namespace heed::cuda {

struct CombineVariant {
  int element = kElementBf16;
  int warps = 8;
};

template <CombineVariant kV>
__global__ void __launch_bounds__(kV.warps * 32) combine(const __grid_constant__ AttentionFwdParams p) {
  constexpr float kLn2 = 0.693147180559945f, kLog2e = 1.44269504088896f;
  constexpr int kColumns = 16;  // of a lane: head_dim_v up to 512
  const float kInf = __int_as_float(0x7f800000);
  __shared__ float sums[kV.warps][512];
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const i64 row = blockIdx.x / p.nheads_q;
  const i32 head = static_cast<i32>(blockIdx.x % p.nheads_q);
  i64 b = 0, query = row;
  if (p.partial_queries > 0 || p.cu_seqlens_q == nullptr) {
    const i64 queries = p.partial_queries > 0 ? p.partial_queries : p.seqlen_q;
    b = row / queries, query = row % queries;
    if (p.cu_seqlens_q != nullptr) query += p.cu_seqlens_q[b];
  }
  const float* lse_of = p.partial_lse + static_cast<i64>(blockIdx.x) * p.max_splits;
  const float* out_of = p.partial_out + static_cast<i64>(blockIdx.x) * p.max_splits * p.head_dim_v;
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

  // Every warp reads every lse: maximum and sum are the same numbers in all of them. Lane i keeps splits i and i + 32.
  const bool padding = __float_as_uint(lse_of[0]) == kPaddingLse;
  if (padding && p.max_rows > 0) return;
  const float sink = p.sinks != nullptr ? p.sinks[head] : -kInf;
  const float mine0 = lane < p.max_splits ? lse_of[lane] : -kInf,
              mine1 = lane + 32 < p.max_splits ? lse_of[lane + 32] : -kInf;
  float top = fmaxf(sink, fmaxf(mine0, mine1));
  for (int s = lane + 64; s < p.max_splits; s += 32) top = fmaxf(top, lse_of[s]);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
  const float reference = top == -kInf ? 0.0f : top;
  float total = ex2((mine0 - reference) * kLog2e) + ex2((mine1 - reference) * kLog2e);
  for (int s = lane + 64; s < p.max_splits; s += 32) total += ex2((lse_of[s] - reference) * kLog2e);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(0xffffffffu, total, step);
  total += ex2((sink - reference) * kLog2e);

  float acc[kColumns];
#pragma unroll
  for (int c = 0; c < kColumns; ++c) acc[c] = 0.0f;
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    const i32 s = warp + i * kV.warps;
    const float lse = s < p.max_splits ? lse_of[s] : -kInf, weight = ex2((lse - reference) * kLog2e);
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
    const float lse = lse_of[s], weight = ex2((lse - reference) * kLog2e);
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

  const float inverse = padding || total == 0.0f ? 0.0f : 1.0f / total;
  const i64 at = b * p.out_stride.b + head * p.out_stride.h + query * p.out_stride.s;
  for (int column = thread; column < p.head_dim_v; column += kV.warps * 32) {
    float x = 0.0f;
#pragma unroll
    for (int i = 0; i < kV.warps; ++i) x += sums[i][column];
    x = padding ? 0.0f : x * inverse;
    if (kV.element == kElementF32 || p.out_is_f32)
      static_cast<float*>(p.out)[at + column] = x;
    else
      static_cast<unsigned short*>(p.out)[at + column] =
          static_cast<unsigned short>(cvt_pair<kV.element == kElementBf16>(x, 0.0f));
  }
  if (p.lse != nullptr && thread == 0)
    p.lse[b * p.lse_stride.b + head * p.lse_stride.h + query * p.lse_stride.s] =
        padding || total == 0.0f ? -kInf : reference + lg2(total) * kLn2;
}

}  // namespace heed::cuda
