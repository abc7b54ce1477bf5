// What the decode kernels share: S^T = K Q^T and O^T = V^T P^T by m16n8k16, keys (and columns of V) being its m, rows its n, and
// the end of a block, where its warps, which have had different keys, meet. In what a lane holds of S^T, g = lane / 4, t = lane % 4:
// s[group][e] is key g + e / 2 * 8 of the step and row group * 8 + 2 t + e % 2.
#pragma once

#include "output.cuh"
#include "params.h"
#include "ptx.cuh"
#include "rows.cuh"

namespace heed::cuda {

constexpr int kStep = 16;  // keys of a warp's step

// Keys that row lane % tile_q sees: held by a lane each and asked for by shuffle, as registers are short in the loop.
struct LaneRow {
  i32 lo, hi;
};

// Hidden scores -inf, in units of log2.
template <int kGroups>
__device__ __forceinline__ void finish_scores(float (&s)[kGroups][4], const LaneRow& mine, i32 j0, i32 end, bool whole,
                                              float scale_log2, int lane) {
  const float kInf = __int_as_float(0x7f800000);
#pragma unroll
  for (int group = 0; group < kGroups; ++group)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      s[group][e] = __fmul_rn(s[group][e], scale_log2);  // one number, in the maximum and in the exponent
      if (!whole && j0 + lane / 4 + e / 2 * 8 >= end) s[group][e] = -kInf;
    }
  if (whole) return;
#pragma unroll
  for (int group = 0; group < kGroups; ++group)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int row = group * 8 + lane % 4 * 2 + e;
      const i32 lo = __shfl_sync(0xffffffffu, mine.lo, row), hi = __shfl_sync(0xffffffffu, mine.hi, row);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const i32 j = j0 + lane / 4 + half * 8;
        if (j < lo || j >= hi) s[group][half * 2 + e] = -kInf;
      }
    }
}

// Which keys the rows see, and those that every row sees: there nothing is hidden.
struct SeenKeys {
  LaneRow mine;
  i32 full_lo, full_hi;
};
template <auto kV>
__device__ __forceinline__ SeenKeys seen_keys(const AttentionFwdParams& p, const BlockWork& w, const RowMap& rows, i32 end,
                                              int lane) {
  const KeyRange seen = visible_keys(p, w.k_len, min(rows.query(lane % kV.tile_q), max(0, w.q_len - 1)) + w.offset);
  const LaneRow mine = {static_cast<i32>(seen.lo), static_cast<i32>(seen.hi)};
  return {mine, __shfl_sync(0xffffffffu, mine.lo, kV.tile_q - 1), min(end, __shfl_sync(0xffffffffu, mine.hi, 0))};
}

template <int kGroups, int kOut>
__device__ __forceinline__ void clear_sums(float (&acc_o)[kGroups][kOut][4], float (&top)[kGroups][2],
                                           float (&sum)[kGroups][2]) {
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
#pragma unroll
    for (int n = 0; n < kOut; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc_o[group][n][e] = 0.0f;
    top[group][0] = top[group][1] = -__int_as_float(0x7f800000);
    sum[group][0] = sum[group][1] = 0.0f;
  }
}

// The exact online step of one warp: maxima over the step's keys, O and sums rescaled.
template <int kGroups, int kOut>
__device__ __forceinline__ void raise_maxima(const float (&s)[kGroups][4], float (&top)[kGroups][2],
                                             float (&sum)[kGroups][2], float (&acc_o)[kGroups][kOut][4]) {
  const float kInf = __int_as_float(0x7f800000);
#pragma unroll
  for (int group = 0; group < kGroups; ++group)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float next = fmaxf(s[group][e], s[group][2 + e]);
#pragma unroll
      for (int step = 4; step < 32; step *= 2) next = fmaxf(next, __shfl_xor_sync(0xffffffffu, next, step));
      next = fmaxf(next, top[group][e]);
      const float alpha = ex2(top[group][e] - (next == -kInf ? 0.0f : next));
      top[group][e] = next;
      sum[group][e] *= alpha;
#pragma unroll
      for (int n = 0; n < kOut; ++n) acc_o[group][n][e] *= alpha, acc_o[group][n][2 + e] *= alpha;
    }
}

// Probabilities into `x`; false where a row's maximum has to be raised first (also where it is still -inf: inf or NaN here).
template <int kGroups>
__device__ __forceinline__ bool exponentials(const float (&s)[kGroups][4], const float (&top)[kGroups][2],
                                             float (&x)[kGroups][4], bool settled) {
  const float kInf = __int_as_float(0x7f800000);
  bool fits = true;
#pragma unroll
  for (int group = 0; group < kGroups; ++group)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float reference = settled && top[group][e % 2] == -kInf ? 0.0f : top[group][e % 2];
      x[group][e] = ex2(s[group][e] - reference);
      fits = fits && x[group][e] <= 16384.0f;
    }
  return settled || __all_sync(0xffffffffu, fits);
}

// A step of keys: scores to probabilities, by the kept maximum where it holds.
template <int kGroups, int kOut>
__device__ __forceinline__ void softmax_step(float (&s)[kGroups][4], const SeenKeys& seen, i32 j0, i32 end, float scale_log2,
                                             float (&top)[kGroups][2], float (&sum)[kGroups][2],
                                             float (&acc_o)[kGroups][kOut][4], float (&x)[kGroups][4], int lane) {
  finish_scores(s, seen.mine, j0, end, j0 >= seen.full_lo && j0 + kStep <= seen.full_hi, scale_log2, lane);
  if (!exponentials(s, top, x, false)) {
    raise_maxima(s, top, sum, acc_o);
    exponentials(s, top, x, true);
  }
#pragma unroll
  for (int group = 0; group < kGroups; ++group)
    sum[group][0] += x[group][0] + x[group][2], sum[group][1] += x[group][1] + x[group][3];
}

// P^T of a step, rounded, as B fragments: keys 2 t, 2 t + 1 (+ 8) of row g.
template <bool kIsBf16, int kGroups>
__device__ __forceinline__ void round_probabilities(const float (&x)[kGroups][4], u32 (&probability)[kGroups][2]) {
#pragma unroll
  for (int group = 0; group < kGroups; ++group)
#pragma unroll
    for (int i = 0; i < 2; ++i)
      probability[group][i] = movmatrix_trans(cvt_pair<kIsBf16>(x[group][2 * i], x[group][2 * i + 1]));
}
// And the part of P that rounding left out, as the error bound of f32 has no room for it.
template <bool kIsBf16, int kGroups>
__device__ __forceinline__ void round_rest(const float (&x)[kGroups][4], u32 (&rest)[kGroups][2]) {
#pragma unroll
  for (int group = 0; group < kGroups; ++group)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float *pair = x[group] + 2 * i;
      rest[group][i] =
          movmatrix_trans(rest_of_pair<kIsBf16>(pair[0], pair[1], cvt_pair<kIsBf16>(pair[0], pair[1])));
    }
}

// Where warps that have had different keys meet, f32: O [warps][tile_q][kStride], maxima [warps][tile_q], sums [warps][tile_q].
template <auto kV>
struct Meeting {
  static constexpr int kRows = kV.warps * kV.tile_q, kStride = kV.head_dim_v + kMeetingPad;
  float *o, *top, *sum;
  __device__ __forceinline__ explicit Meeting(float* memory)
      : o(memory), top(memory + kRows * kStride), sum(memory + kRows * (kStride + 1)) {}
  __device__ __forceinline__ float* row(int warp, int r) const { return o + (warp * kV.tile_q + r) * kStride; }
};

// Maxima and sums of a warp's rows.
template <auto kV, int kGroups>
__device__ __forceinline__ void bring_sums(const Meeting<kV>& m, const float (&top)[kGroups][2], const float (&sum)[kGroups][2],
                                           int warp, int lane) {
#pragma unroll
  for (int group = 0; group < kGroups; ++group)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float total = sum[group][e];
#pragma unroll
      for (int step = 4; step < 32; step *= 2) total += __shfl_xor_sync(0xffffffffu, total, step);
      const int at = warp * kV.tile_q + group * 8 + lane % 4 * 2 + e;
      if (lane / 4 == 0) m.top[at] = top[group][e], m.sum[at] = total;
    }
}

// Four columns of a row of O.
template <auto kV>
__device__ __forceinline__ void store_four(const AttentionFwdParams& p, i64 at, const float4& y) {
  if (p.out_is_f32)
    *reinterpret_cast<float4*>(static_cast<float*>(p.out) + at) = y;
  else
    *reinterpret_cast<uint2*>(static_cast<unsigned short*>(p.out) + at) =
        make_uint2(cvt_pair<kV.is_bf16>(y.x, y.y), cvt_pair<kV.is_bf16>(y.z, y.w));
}

// What the warps have brought, summed in their order, becomes rows of out or of partials. A warp has tile_q / warps rows, a lane
// four columns of one of them at a time. Its rows that come out as NaN: a bit each.
template <auto kV, class Work>
__device__ __forceinline__ u32 merge_rows(const AttentionFwdParams& p, const Work& w, const RowMap& rows,
                                          const Meeting<kV>& m, int warp, int lane) {
  constexpr int kRows = kV.tile_q / kV.warps, kLanes = 32 / kRows;  // of a warp; of a row
  static_assert(kV.tile_q % kV.warps == 0 && kRows <= 4);
  constexpr float kLn2 = 0.693147180559945f, kLog2e = 1.44269504088896f;
  const float kInf = __int_as_float(0x7f800000);
  const int row = warp * kRows + lane / kLanes;
  const i32 query = rows.query(row), head = rows.head(row);
  bool nan = false;
  if (query < w.q_rows) {
    float best = -kInf, total = 0.0f, weight[kV.warps];
#pragma unroll
    for (int i = 0; i < kV.warps; ++i) weight[i] = m.top[i * kV.tile_q + row], best = fmaxf(best, weight[i]);
    float sink = -kInf;
    const bool split = writes_partials<kV>(p) && !w.whole;
    if (!split && p.sinks != nullptr && query < w.q_len) sink = p.sinks[head] * kLog2e;
    best = fmaxf(best, sink);
    const float reference = best == -kInf ? 0.0f : best;
#pragma unroll
    for (int i = 0; i < kV.warps; ++i) {
      weight[i] = ex2(weight[i] - reference);
      total += m.sum[i * kV.tile_q + row] * weight[i];
    }
    total += ex2(sink - reference);
    const bool counts = query < w.q_len;
    if (!counts) total = 0.0f;
    const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
    const i64 slot = split ? partial_slot(p, w, head, query) : 0;
    const i64 at = w.b * p.out_stride.b + head * p.out_stride.h + (w.q_begin + query) * p.out_stride.s;
    for (int column = lane % kLanes * 4; column < p.head_dim_v; column += kLanes * 4) {
      float4 y = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
      for (int i = 0; i < kV.warps; ++i) {
        const float4 x = *reinterpret_cast<const float4*>(m.row(i, row) + column);
        y.x = fmaf(weight[i], x.x, y.x), y.y = fmaf(weight[i], x.y, y.y);
        y.z = fmaf(weight[i], x.z, y.z), y.w = fmaf(weight[i], x.w, y.w);
      }
      y = counts ? float4{y.x * inverse, y.y * inverse, y.z * inverse, y.w * inverse} : float4{0.0f, 0.0f, 0.0f, 0.0f};
      nan = nan || y.x != y.x || y.y != y.y || y.z != y.z || y.w != y.w;
      if (split)
        *reinterpret_cast<float4*>(p.partial_out + slot * p.head_dim_v + column) = y;
      else
        store_four<kV>(p, at + column, y);
    }
    if (lane % kLanes == 0) {
      const float lse = total == 0.0f ? -kInf : (reference + lg2(total)) * kLn2;
      if (split)
        p.partial_lse[slot] = query < w.q_len || w.split > 0 ? lse : __uint_as_float(kPaddingLse);
      else
        store_lse(p, w, head, query, lse);
    }
  }
  __syncwarp();  // what the warps brought has been read, and these rows are written
  const u32 lanes = __ballot_sync(0xffffffffu, nan);
  u32 bad = 0;
#pragma unroll
  for (int r = 0; r < kRows; ++r) bad |= ((lanes >> r * kLanes & ~0u >> (32 - kLanes)) != 0 ? 1u : 0u) << r;
  return bad;
}

// Rows of a warp that came out as NaN, where a mask hides keys: those must not count.
template <auto kV, AttentionFwdVariant kRedo, class Work>
__device__ __forceinline__ void redo_rows(const AttentionFwdParams& p, const Work& w, const RowMap& rows, u32 bad, int warp,
                                          int lane) {
  constexpr int kRows = kV.tile_q / kV.warps;
  for (; bad != 0; bad &= bad - 1) {
    const int row = warp * kRows + __ffs(static_cast<int>(bad)) - 1;
    redo_row<kRedo>(p, w, rows.query(row), rows.head(row), lane);
  }
}

}  // namespace heed::cuda
