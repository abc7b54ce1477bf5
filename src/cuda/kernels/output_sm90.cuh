// attention_fwd_sm90: the end of a tile of rows.
#pragma once

#include "mma_sm90.cuh"
#include "output.cuh"
#include "params.h"
#include "ptx.cuh"
#include "softmax_sm90.cuh"
#include "work_sm90.h"

namespace heed::cuda {

// Whose a row is that a consumer has: of the queries from `first` on. Behind the last there are rows of nobody's.
struct RowPlace {
  i32 query, head;
};
template <AttentionFwdSm90Variant kV>
__device__ __forceinline__ RowPlace place_of_row(const AttentionFwdSm90Params& a, const Work& work, i32 first, i32 row) {
  constexpr i32 kNobody = 0x7fffffff;
  if constexpr (!Layout<kV>::kShares) return {first + row, work.head};
  return {row < rows_used<kV>(a) ? first + query_of_row<kV>(a, row) : kNobody, work.head + head_of_row<kV>(a, row)};
}

template <class Element>
__device__ __forceinline__ Element* out_row(const AttentionFwdParams& p, const Work& work, const RowPlace& at) {
  return static_cast<Element*>(p.out) + work.b * p.out_stride.b + at.head * p.out_stride.h +
         (static_cast<i64>(work.q_begin) + at.query) * p.out_stride.s;
}
template <AttentionFwdSm90Variant kV>
__device__ __forceinline__ bool is_written(const AttentionFwdParams& p, const Work& work, i32 query) {
  return kV.lengths ? query >= work.written_begin && query < work.written_end : query < p.seqlen_q;
}

// Rows of this warp whose O came out as NaN, computed again without hidden keys, to where O waits to be stored. `row0`: the
// first of them, of the consumer's.
template <AttentionFwdSm90Variant kV>
__device__ __forceinline__ void redo_rows(const AttentionFwdSm90Params& a, const Work& work, i32 first, i32 row0, u32 rows,
                                          u32 out, int lane) {
  constexpr AttentionFwdVariant kScalar = {.is_bf16 = kV.is_bf16,
                                           .head_dim_v = kV.head_dim_v,
                                           .tile_k = kV.tile_k,
                                           .modified = kV.terms || kV.softcap,
                                           .gather = kV.lengths,
                                           .split = kV.lengths || kV.split};
  const AttentionFwdParams& p = a.common;
  BlockWork w;
  w.b = work.b, w.cache_row = work.b;
  w.head_kv = work.head / p.gqa_ratio;
  if constexpr (kV.lengths) {
    locate_sequence(p, w);
  } else {
    w.k_len = static_cast<i32>(p.seqlen_k);
    w.offset = a.offset;
  }
  w.tile_end = w.k_len / kV.tile_k + 1;
  if (splits_keys<kV>(p)) {
    w.split = work.split;
    w.tile_begin = w.split * p.split_tiles, w.tile_end = w.tile_begin + p.split_tiles;
  }
#pragma unroll 1
  for (; rows != 0; rows &= rows - 1) {
    const int row = row0 + __ffs(static_cast<int>(rows)) - 1;
    const RowPlace at = place_of_row<kV>(a, work, first, row);
    if (at.query >= (kV.lengths ? work.q_len : p.seqlen_q)) return;
    redo_row<kScalar>(p, w, at.query, at.head, lane, [&](int column, float y) {
      if (kV.lengths && p.out_is_f32) {
        out_row<float>(p, work, at)[column] = y;
        return;
      }
      const unsigned short bits = static_cast<unsigned short>(cvt_pair<kV.is_bf16>(y, 0.0f));
      if constexpr (Layout<kV>::kOutStaged)
        store_shared_16(staged(out, Layout<kV>::kChunkQ, row, column), bits);
      else
        out_row<unsigned short>(p, work, at)[column] = bits;
    });
  }
}

// This warp's rows of O from where they wait, in pieces of 16 bytes: where the rows behind them are another sequence's.
template <AttentionFwdSm90Variant kV>
__device__ __forceinline__ void store_rows(const AttentionFwdSm90Params& a, const Work& work, i32 first, i32 row0, u32 out,
                                           int lane) {
  __syncwarp();
#pragma unroll 1
  for (int row = row0; row < row0 + 16; ++row) {
    const RowPlace at = place_of_row<kV>(a, work, first, row);
    if (!is_written<kV>(a.common, work, at.query) || lane * 8 >= a.common.head_dim_v) continue;
    const uint4 x = load_shared_16(staged(out, Layout<kV>::kChunkQ, row, lane * 8));
    *reinterpret_cast<uint4*>(out_row<unsigned short>(a.common, work, at) + lane * 8) = x;
  }
}

// O straight from registers. The four lanes that share a row have two columns of every eight each: they trade words, a
// 4 x 4 transpose in two exchanges, so that each has all of every fourth eight, 16 bytes.
template <AttentionFwdSm90Variant kV>
__device__ __forceinline__ void store_registers(const AttentionFwdParams& p, const Work& work,
                                                const float (&acc_o)[Layout<kV>::kOut], const RowPlace (&at)[2],
                                                int lane) {
  static_assert(kV.head_dim_v % 32 == 0);
  const bool odd = lane & 1, upper = lane & 2;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const bool writes = is_written<kV>(p, work, at[r].query);
    unsigned short* const to = out_row<unsigned short>(p, work, at[r]);
#pragma unroll
    for (int n = 0; n < kV.head_dim_v / 8; n += 4) {
      u32 word[4];  // of eights n .. n + 3
#pragma unroll
      for (int e = 0; e < 4; ++e)
        word[e] = cvt_pair<kV.is_bf16>(acc_o[(n + e) * 4 + r * 2], acc_o[(n + e) * 4 + r * 2 + 1]);
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        const u32 got = __shfl_xor_sync(0xffffffffu, odd ? word[e] : word[e + 1], 1);
        word[e] = odd ? got : word[e], word[e + 1] = odd ? word[e + 1] : got;
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const u32 got = __shfl_xor_sync(0xffffffffu, upper ? word[e] : word[e + 2], 2);
        word[e] = upper ? got : word[e], word[e + 2] = upper ? word[e + 2] : got;
      }
      const int column = (n + lane % 4) * 8;
      if (writes && column < p.head_dim_v)
        *reinterpret_cast<uint4*>(to + column) = make_uint4(word[0], word[1], word[2], word[3]);
    }
  }
}

// A row's columns of this thread, in f32.
template <AttentionFwdSm90Variant kV>
__device__ __forceinline__ void store_floats(float* row, const float (&acc_o)[Layout<kV>::kOut], int r, int columns,
                                             int lane) {
#pragma unroll
  for (int n = 0; n < kV.head_dim_v / 8; ++n) {
    const int column = n * 8 + lane % 4 * 2;
    if (column < columns)
      *reinterpret_cast<float2*>(row + column) = make_float2(acc_o[n * 4 + r * 2], acc_o[n * 4 + r * 2 + 1]);
  }
}

// Divides by the row sums, adds the sink, stores lse and, by one bulk copy where all rows are the sequence's, O.
template <AttentionFwdSm90Variant kV>
__device__ __forceinline__ void finish(const AttentionFwdSm90Params& a, const Work& work,
                                       float (&acc_o)[Layout<kV>::kOut], const Softmax& state, u32 out, int group) {
  using L = Layout<kV>;
  constexpr float kLn2 = 0.693147180559945f, kLog2e = 1.44269504088896f;
  const float kInf = __int_as_float(0x7f800000);
  const AttentionFwdParams& p = a.common;
  const int thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32;
  const i32 each = queries_each<kV>(a), first = work.row0 + group * each;
  if (kV.mask != kMaskNone && !kV.lengths && first < 0) return;  // a consumer without rows
  const bool split = splits_keys<kV>(p);
  u32 redo = 0;
  if constexpr (kV.mask != kMaskNone) {
    bool nan[2] = {false, false};
#pragma unroll
    for (int i = 0; i < L::kOut; ++i) nan[i / 2 % 2] = nan[i / 2 % 2] || acc_o[i] != acc_o[i];
    if (__any_sync(0xffffffffu, nan[0] || nan[1]))
      redo = __reduce_or_sync(0xffffffffu, (nan[0] ? 1u << lane / 4 : 0) | (nan[1] ? 256u << lane / 4 : 0));
  }
  BlockWork w;  // of partials
  w.b = work.b, w.q_begin = work.q_begin, w.split = work.split;
  RowPlace at[2];
  float factor[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    at[r] = place_of_row<kV>(a, work, first, warp * 16 + lane / 4 + r * 8);
    const bool counts = !kV.lengths || at[r].query < work.q_len;
    float sum = state.row_sum[r], top = state.row_max[r], of_keys = 1.0f;
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (!counts) sum = 0.0f;
    if (p.sinks != nullptr && counts && !split) {
      const float sink = p.sinks[at[r].head] * kLog2e, both = fmaxf(top, sink), reference = both == -kInf ? 0.0f : both;
      of_keys = ex2(top - reference);
      sum = sum * of_keys + ex2(sink - reference);
      top = both;
    }
    if constexpr (kV.terms) of_keys *= p.dropout_scale;
    factor[r] = sum == 0.0f ? 0.0f : __fdividef(of_keys, sum);
    const float lse = sum == 0.0f ? -kInf : (top + lg2(sum)) * kLn2;
    if (lane % 4 != 0 || !is_written<kV>(p, work, at[r].query)) continue;
    if (split)  // one without a key adds nothing: 0 and -inf
      p.partial_lse[partial_slot(p, w, at[r].head, at[r].query)] =
          counts || work.split > 0 ? lse : __uint_as_float(kPaddingLse);
    else if (p.lse != nullptr)
      p.lse[work.b * p.lse_stride.b + at[r].head * p.lse_stride.h +
            (kV.lengths ? work.q_begin + at[r].query : at[r].query) * p.lse_stride.s] = lse;
  }
  rescale(acc_o, factor);
  if constexpr (kV.lengths) {  // padding is 0, even behind keys whose values are NaN
    if (first + each > work.q_len) {
      const bool counts[2] = {at[0].query < work.q_len, at[1].query < work.q_len};
#pragma unroll
      for (int i = 0; i < L::kOut; ++i)
        if (!counts[i / 2 % 2]) acc_o[i] = 0.0f;
    }
  }
  // f32 and, where shared memory is short, all leave straight from registers.
  const bool is_f32 = split || (kV.lengths && p.out_is_f32), is_direct = !L::kOutStaged || is_f32;
  if (is_f32) {
#pragma unroll
    for (int r = 0; r < 2; ++r)
      if (is_written<kV>(p, work, at[r].query))
        store_floats<kV>(split ? p.partial_out + partial_slot(p, w, at[r].head, at[r].query) * p.head_dim_v
                               : out_row<float>(p, work, at[r]),
                         acc_o, r, p.head_dim_v, lane);
  } else if constexpr (!L::kOutStaged) {
    store_registers<kV>(p, work, acc_o, at, lane);
  } else {
    if (thread == 0) tma_store_wait_read();  // the last tile's store has left the place
    bar_sync(1 + group, 128);
#pragma unroll
    for (int c = 0; c < kV.head_dim_v / 16; ++c)
      stmatrix_x4(staged(out, L::kChunkQ, warp * 16 + lane % 16, c * 16 + lane / 16 * 8),
                  cvt_pair<kV.is_bf16>(acc_o[c * 8], acc_o[c * 8 + 1]),
                  cvt_pair<kV.is_bf16>(acc_o[c * 8 + 2], acc_o[c * 8 + 3]),
                  cvt_pair<kV.is_bf16>(acc_o[c * 8 + 4], acc_o[c * 8 + 5]),
                  cvt_pair<kV.is_bf16>(acc_o[c * 8 + 6], acc_o[c * 8 + 7]));
  }
  if (kV.mask != kMaskNone && redo != 0) {
    __syncwarp();
    redo_rows<kV>(a, work, first, warp * 16, redo, out, lane);
  }
  if (is_direct) return;
  if constexpr (kV.lengths) {
    if (first < work.written_begin || (p.cu_seqlens_q != nullptr && first + each > work.written_end)) {
      store_rows<kV>(a, work, first, warp * 16, out, lane);
      return;
    }
  }
  fence_proxy_async();
  bar_sync(1 + group, 128);
  if (thread == 0) {
    const MapPlace place = place_of_rows<kV>(a, work, first);
#pragma unroll
    for (int c = 0; c < L::kChunksV; ++c)
      tma_store(a.out_map, out + c * L::kChunkQ, c * 64, place.inner, place.outer, sequence_of_q<kV>(a, work));
    tma_store_commit();
  }
}

}  // namespace heed::cuda
