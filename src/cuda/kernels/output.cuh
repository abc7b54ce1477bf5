// The last step: division by the row sums, the sink, O and lse to memory; and the rows that have to be computed again.
#pragma once

#include "params.h"
#include "ptx.cuh"
#include "rows.cuh"
#include "score.cuh"

namespace heed::cuda {

// A row whose output is NaN, computed again key by key with hidden and dropped rows of V left out: 0 times the NaN or Inf
// that such a row may hold is NaN. By one warp, 32 keys at a time: a lane a key for the scores, a lane a column for O.
// Cold: it happens only where the inputs hold NaN or Inf. Short, as every variant with a mask has it: terms where the
// variant is modified, pages where it gathers.
// store(column, value) takes O where it is no partial.
// Work: BlockWork, or what is one and has its partials elsewhere.
template <AttentionFwdVariant kV, class Work, class Store>
__device__ __forceinline__ void redo_row(const AttentionFwdParams& p, const Work& w, i32 query, i32 head, int lane,
                                         const Store& store) {
  constexpr int kElement = kV.is_bf16 ? kElementBf16 : kElementF16, kColumns = (kV.head_dim_v + 31) / 32;
  constexpr float kLog2e = 1.44269504088896f, kLn2 = 0.693147180559945f;
  const float kInf = __int_as_float(0x7f800000);
  const i64 q_at = w.b * p.q_stride.b + head * p.q_stride.h + (w.q_begin + query) * p.q_stride.s;
  const i64 k_first = first_key(p, w, p.k_stride), v_first = first_key(p, w, p.v_stride);
  const KeyRange range = visible_keys(p, w.k_len, query + w.offset);
  const i32 lo = max(static_cast<i32>(range.lo), w.tile_begin * kV.tile_k);
  const i32 hi = min(static_cast<i32>(range.hi), w.tile_end * kV.tile_k);
  float acc[kColumns], top = -kInf, sum = 0.0f;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) acc[c] = 0.0f;
#pragma unroll 1
  for (i32 j0 = lo; j0 < hi; j0 += 32) {
    const i32 j = j0 + lane;
    float x = -kInf;
    bool kept = true;
    if (j < hi) {
      const i64 row = kV.gather && p.page_size > 0 ? paged_row(p, w, p.k_stride, j) : j * p.k_stride.s;
      float dot = 0.0f;
#pragma unroll 1
      for (int d = 0; d < p.head_dim; ++d)
        dot = fmaf(load_element<kElement>(p.q, q_at + d), load_element<kElement>(p.k, k_first + row + d), dot);
      if constexpr (kV.modified) {
        x = score_of<kElement>(p, w.b, dot, query, head, j, w.offset);
        if (p.dropout_on) kept = dropout_keeps(p, DropoutKey(p), w.b, head, query, j);
      } else {
        x = __fmul_rn(dot, p.softmax_scale_log2);
      }
    }
    float block_top = x;
#pragma unroll
    for (int step = 16; step > 0; step /= 2)
      block_top = fmaxf(block_top, __shfl_xor_sync(0xffffffffu, block_top, step));
    const float next = fmaxf(top, block_top), reference = next == -kInf ? 0.0f : next, alpha = ex2(top - reference);
    const float probability = ex2(x - reference);
    top = next;
    sum = fmaf(sum, alpha, probability);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) acc[c] *= alpha;
    u32 shown = __ballot_sync(0xffffffffu, x != -kInf && kept);
#pragma unroll 1
    for (; shown != 0; shown &= shown - 1) {
      const int from = __ffs(static_cast<int>(shown)) - 1;
      const float weight = __shfl_sync(0xffffffffu, probability, from);
      const i64 row = v_first + (kV.gather && p.page_size > 0 ? paged_row(p, w, p.v_stride, j0 + from) : (j0 + from) * p.v_stride.s);
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
        if (c * 32 + lane < p.head_dim_v)
          acc[c] = fmaf(weight, load_element<kElement>(p.v, row + c * 32 + lane), acc[c]);
    }
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  float factor = 1.0f;
  const bool split = writes_partials<kV>(p) && !w.whole;
  if (!split && p.sinks != nullptr) {
    const float sink = p.sinks[head] * kLog2e, both = fmaxf(top, sink), reference = both == -kInf ? 0.0f : both;
    factor = ex2(top - reference);
    sum = fmaf(sum, factor, ex2(sink - reference));
    top = both;
  }
  const float inverse = sum == 0.0f ? 0.0f : factor * p.dropout_scale / sum;
  const i64 at = split ? partial_slot(p, w, head, query) * p.head_dim_v : 0;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const int column = c * 32 + lane;
    if (column >= p.head_dim_v) continue;
    if (split)
      p.partial_out[at + column] = acc[c] * inverse;
    else
      store(column, acc[c] * inverse);
  }
  const float lse = sum == 0.0f ? -kInf : (top + lg2(sum)) * kLn2;
  if (lane == 0) {
    if (split)
      p.partial_lse[partial_slot(p, w, head, query)] = lse;
    else
      store_lse(p, w, head, query, lse);
  }
}

template <AttentionFwdVariant kV, class Work>
__device__ __forceinline__ void redo_row(const AttentionFwdParams& p, const Work& w, i32 query, i32 head, int lane) {
  const i64 at = w.b * p.out_stride.b + head * p.out_stride.h + (w.q_begin + query) * p.out_stride.s;
  redo_row<kV>(p, w, query, head, lane, [&](int column, float y) {
    if (p.out_is_f32)
      static_cast<float*>(p.out)[at + column] = y;
    else
      static_cast<unsigned short*>(p.out)[at + column] = static_cast<unsigned short>(cvt_pair<kV.is_bf16>(y, 0.0f));
  });
}

// One row of O straight from registers: partials, f32 output, unaligned rows.
template <AttentionFwdVariant kV, int kOutTiles>
__device__ __forceinline__ void store_row(const AttentionFwdParams& p, const BlockWork& w,
                                          const float (&acc)[kOutTiles][4], int r, i32 query, i32 head, float inverse,
                                          int lane) {
  const i64 at = w.b * p.out_stride.b + head * p.out_stride.h + (w.q_begin + query) * p.out_stride.s;
  const bool split = writes_partials<kV>(p);
  const i64 partial_at = split ? partial_slot(p, w, head, query) * p.head_dim_v : 0;
#pragma unroll
  for (int n = 0; n < kOutTiles; ++n) {
    const int column = n * 8 + lane % 4 * 2;
    if (column >= p.head_dim_v) continue;
    const float x = acc[n][2 * r] * inverse, y = acc[n][2 * r + 1] * inverse;
    if (split) {
      *reinterpret_cast<float2*>(p.partial_out + partial_at + column) = make_float2(x, y);
    } else if (p.out_is_f32) {
      float* dst = static_cast<float*>(p.out) + at + column;
      dst[0] = x, dst[1] = y;
    } else {
      unsigned short* dst = static_cast<unsigned short*>(p.out) + at + column;
      const u32 pair = cvt_pair<kV.is_bf16>(x, y);
      dst[0] = static_cast<unsigned short>(pair), dst[1] = static_cast<unsigned short>(pair >> 16);
    }
  }
}

// Bit r: row r of this warp has a NaN in O; the same in every lane.
template <AttentionFwdVariant kV, int kRowTiles, int kOutTiles>
__device__ __forceinline__ u32 rows_with_nan(const float (&acc_o)[kRowTiles][kOutTiles][4], int lane) {
  static_assert(kRowTiles <= 2);
  u32 mine = 0;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      bool nan = false;
#pragma unroll
      for (int n = 0; n < kOutTiles; ++n)
        nan = nan || acc_o[m][n][2 * r] != acc_o[m][n][2 * r] || acc_o[m][n][2 * r + 1] != acc_o[m][n][2 * r + 1];
      if (nan) mine |= 1u << (m * 16 + r * 8 + lane / 4);
    }
  if (!__any_sync(0xffffffffu, mine != 0)) return 0;
  return __reduce_or_sync(0xffffffffu, mine);
}

// Divides by the row sums, adds the sink, stores O and lse. `staging`: shared memory of this warp's own rows of Q, which
// nobody else reads: O passes through it so that rows leave in 16-byte pieces.
template <AttentionFwdVariant kV, int kRowTiles, int kOutTiles>
__device__ __forceinline__ void write_out(const AttentionFwdParams& p, const BlockWork& w, const RowMap& rows,
                                          float (&acc_o)[kRowTiles][kOutTiles][4], const float (&row_max)[kRowTiles][2],
                                          const float (&row_sum)[kRowTiles][2], int warp, int lane, u32 staging) {
  constexpr float kLn2 = 0.693147180559945f, kLog2e = 1.44269504088896f;
  constexpr int kPitch = kV.head_dim_v + 8;
  // Only gathered variants meet O in f32 or rows that do not start on 16 bytes: in the others the way past shared memory,
  // several thousand instructions, is not compiled.
  const bool split = writes_partials<kV>(p);
  const bool staged = kV.head_dim_v <= kV.head_dim && !split && (!kV.gather || (!p.out_is_f32 && p.aligned));
  const float kInf = __int_as_float(0x7f800000);
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = row_sum[m][r];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      const int row = (warp * kRowTiles + m) * 16 + lane / 4 + r * 8;
      const i32 query = rows.query(row), head = rows.head(row);
      const bool writes = query < w.q_rows;
      float top = row_max[m][r], factor = 1.0f;
      if (query >= w.q_len) {  // padding: 0 and -inf
        sum = 0.0f;
#pragma unroll
        for (int n = 0; n < kOutTiles; ++n) acc_o[m][n][2 * r] = acc_o[m][n][2 * r + 1] = 0.0f;
      }
      if (!split && p.sinks != nullptr && query < w.q_len) {
        const float sink = p.sinks[head] * kLog2e;
        const float both = fmaxf(top, sink), reference = both == -kInf ? 0.0f : both;
        factor = ex2(top - reference);
        sum = sum * factor + ex2(sink - reference);
        top = both;
      }
      const float inverse = sum == 0.0f ? 0.0f : __fdividef(factor * (kV.modified ? p.dropout_scale : 1.0f), sum);
      const float lse = sum == 0.0f ? -kInf : (top + lg2(sum)) * kLn2;
      if (staged) {
        const u32 dst = staging + ((m * 16 + lane / 4 + r * 8) * kPitch + lane % 4 * 2) * 2;
#pragma unroll
        for (int n = 0; n < kOutTiles; ++n) {
          const u32 pair = cvt_pair<kV.is_bf16>(acc_o[m][n][2 * r] * inverse, acc_o[m][n][2 * r + 1] * inverse);
          asm volatile("st.shared.b32 [%0], %1;" ::"r"(dst + n * 16), "r"(pair) : "memory");
        }
      } else if (writes) {
        store_row<kV, kOutTiles>(p, w, acc_o[m], r, query, head, inverse, lane);
      }
      if (writes && lane % 4 == 0) {
        if (split)
          p.partial_lse[partial_slot(p, w, head, query)] =
              query < w.q_len || w.split > 0 ? lse : __uint_as_float(kPaddingLse);
        else
          store_lse(p, w, head, query, lse);
      }
    }
  }
  if (!staged) return;
  __syncwarp();
  constexpr int kChunks = kV.head_dim_v / 8;
#pragma unroll
  for (int c0 = 0; c0 < kRowTiles * 16 * kChunks; c0 += 32) {
    const int c = c0 + lane, r = c / kChunks, column = c % kChunks * 8;
    const int row = warp * kRowTiles * 16 + r;
    const i32 query = rows.query(row);
    if (query >= w.q_rows || column >= p.head_dim_v) continue;
    uint4 x;
    asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(staging + (r * kPitch + column) * 2));
    unsigned short* dst = static_cast<unsigned short*>(p.out) + w.b * p.out_stride.b + rows.head(row) * p.out_stride.h +
                          (w.q_begin + query) * p.out_stride.s + column;
    *reinterpret_cast<uint4*>(dst) = x;
  }
}

}  // namespace heed::cuda
