// attention_fwd_sm90: the end of a tile of rows.
#pragma once

#include "mma_sm90.cuh"
#include "output.cuh"
#include "params.h"
#include "ptx.cuh"
#include "softmax_sm90.cuh"
#include "work_sm90.h"

namespace heed::cuda {

template <class Element>
__device__ __forceinline__ Element* out_row(const AttentionFwdParams& p, const Work& work, i32 query) {
  return static_cast<Element*>(p.out) + work.b * p.out_stride.b + work.head * p.out_stride.h +
         (static_cast<i64>(work.q_begin) + query) * p.out_stride.s;
}

// Rows of this warp whose O came out as NaN, computed again without hidden keys, to where O waits to be stored.
template <AttentionFwdSm90Variant kV>
__device__ __forceinline__ void redo_rows(const AttentionFwdSm90Params& a, const Work& work, i32 warp_row, u32 rows,
                                          u32 out, int lane) {
  constexpr AttentionFwdVariant kScalar = {.is_bf16 = kV.is_bf16,
                                           .head_dim_v = kV.head_dim_v,
                                           .tile_k = kV.tile_k,
                                           .modified = kV.terms || kV.softcap,
                                           .gather = kV.lengths,
                                           .split = kV.split};
  const AttentionFwdParams& p = a.common;
  BlockWork w;
  w.b = work.b, w.cache_row = work.b;
  w.head = work.head, w.head_kv = work.head / p.gqa_ratio;
  if constexpr (kV.lengths) {
    locate_sequence(p, w);
  } else {
    w.k_len = static_cast<i32>(p.seqlen_k);
    w.offset = a.offset;
  }
  w.tile_end = w.k_len / kV.tile_k + 1;
  if constexpr (kV.split) {
    w.split = work.split;
    w.tile_begin = w.split * p.split_tiles, w.tile_end = w.tile_begin + p.split_tiles;
  }
#pragma unroll 1
  for (; rows != 0; rows &= rows - 1) {
    const int r = __ffs(static_cast<int>(rows)) - 1, row = warp_row % 64 + r;
    if (warp_row + r >= (kV.lengths ? work.q_len : p.seqlen_q)) return;
    redo_row<kScalar>(p, w, warp_row + r, work.head, lane, [&](int column, float y) {
      if (kV.lengths && p.out_is_f32) {
        out_row<float>(p, work, warp_row + r)[column] = y;
        return;
      }
      const unsigned short bits = static_cast<unsigned short>(cvt_pair<kV.is_bf16>(y, 0.0f));
      if constexpr (Layout<kV>::kOutStaged)
        store_shared_16(staged(out, Layout<kV>::kChunkQ, row, column), bits);
      else
        out_row<unsigned short>(p, work, warp_row + r)[column] = bits;
    });
  }
}

// This warp's rows of O from where they wait, in pieces of 16 bytes: where the rows behind them are another sequence's.
template <AttentionFwdSm90Variant kV>
__device__ __forceinline__ void store_rows(const AttentionFwdParams& p, const Work& work, i32 warp_row, u32 out,
                                           int lane) {
  __syncwarp();
#pragma unroll 1
  for (int r = 0; r < 16; ++r) {
    const i32 query = warp_row + r;
    if (query < work.written_begin || query >= work.written_end || lane * 8 >= p.head_dim_v) continue;
    const uint4 x = load_shared_16(staged(out, Layout<kV>::kChunkQ, warp_row % 64 + r, lane * 8));
    *reinterpret_cast<uint4*>(out_row<unsigned short>(p, work, query) + lane * 8) = x;
  }
}

// O straight from registers. The four lanes that share a row have two columns of every eight each: they trade words, a
// 4 x 4 transpose in two exchanges, so that each has all of every fourth eight, 16 bytes.
template <AttentionFwdSm90Variant kV>
__device__ __forceinline__ void store_registers(const AttentionFwdParams& p, const Work& work,
                                                const float (&acc_o)[Layout<kV>::kOut], i32 warp_row, int lane) {
  static_assert(kV.head_dim_v % 32 == 0);
  const bool odd = lane & 1, upper = lane & 2;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const i32 query = warp_row + lane / 4 + r * 8;
    const bool writes =
        kV.lengths ? query >= work.written_begin && query < work.written_end : query < p.seqlen_q;
    unsigned short* const to = out_row<unsigned short>(p, work, query);
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

// O and lse of one split, f32. One without a key adds nothing: 0 and -inf.
template <AttentionFwdSm90Variant kV>
__device__ __forceinline__ void store_partials(const AttentionFwdSm90Params& a, const Work& work,
                                               const float (&acc_o)[Layout<kV>::kOut], const float (&lse)[2],
                                               i32 warp_row, u32 redo, int lane) {
  const AttentionFwdParams& p = a.common;
  BlockWork w;
  w.b = work.b, w.split = work.split;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const i32 query = warp_row + lane / 4 + r * 8;
    if (query >= p.seqlen_q) continue;
    const i64 slot = partial_slot(p, w, work.head, query);
    store_floats<kV>(p.partial_out + slot * p.head_dim_v, acc_o, r, p.head_dim_v, lane);
    if (lane % 4 == 0) p.partial_lse[slot] = lse[r];
  }
  if (kV.mask != kMaskNone && redo != 0) {
    __syncwarp();
    redo_rows<kV>(a, work, warp_row, redo, 0, lane);
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
  const i32 first = work.row0 + group * 64, warp_row = first + warp * 16;
  u32 redo = 0;
  if constexpr (kV.mask != kMaskNone) {
    bool nan[2] = {false, false};
#pragma unroll
    for (int i = 0; i < L::kOut; ++i) nan[i / 2 % 2] = nan[i / 2 % 2] || acc_o[i] != acc_o[i];
    if (__any_sync(0xffffffffu, nan[0] || nan[1]))
      redo = __reduce_or_sync(0xffffffffu, (nan[0] ? 1u << lane / 4 : 0) | (nan[1] ? 256u << lane / 4 : 0));
  }
  float factor[2], lse[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const i32 query = warp_row + lane / 4 + r * 8;
    float sum = state.row_sum[r], top = state.row_max[r], of_keys = 1.0f;
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (kV.lengths && query >= work.q_len) sum = 0.0f;
    if (!kV.split && p.sinks != nullptr && (!kV.lengths || query < work.q_len)) {
      const float sink = p.sinks[work.head] * kLog2e, both = fmaxf(top, sink), reference = both == -kInf ? 0.0f : both;
      of_keys = ex2(top - reference);
      sum = sum * of_keys + ex2(sink - reference);
      top = both;
    }
    if constexpr (kV.terms) of_keys *= p.dropout_scale;
    factor[r] = sum == 0.0f ? 0.0f : __fdividef(of_keys, sum);
    lse[r] = sum == 0.0f ? -kInf : (top + lg2(sum)) * kLn2;
    if constexpr (kV.split) continue;
    const i32 row = kV.lengths ? work.q_begin + query : query;
    if (lane % 4 == 0 && (kV.lengths ? query >= work.written_begin && query < work.written_end : query < p.seqlen_q) &&
        p.lse != nullptr)
      p.lse[work.b * p.lse_stride.b + work.head * p.lse_stride.h + row * p.lse_stride.s] = lse[r];
  }
  rescale(acc_o, factor);
  if constexpr (kV.lengths) {  // padding is 0, even behind keys whose values are NaN
    if (first + 64 > work.q_len) {
#pragma unroll
      for (int i = 0; i < L::kOut; ++i)
        if (warp_row + lane / 4 + i / 2 % 2 * 8 >= work.q_len) acc_o[i] = 0.0f;
    }
  }
  if constexpr (kV.split) {
    store_partials<kV>(a, work, acc_o, lse, warp_row, redo, lane);
    return;
  }
  // f32 and, where shared memory is short, all leave straight from registers.
  const bool is_direct = !L::kOutStaged || (kV.lengths && p.out_is_f32);
  if (kV.lengths && p.out_is_f32) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const i32 query = warp_row + lane / 4 + r * 8;
      if (query >= work.written_begin && query < work.written_end)
        store_floats<kV>(out_row<float>(p, work, query), acc_o, r, p.head_dim_v, lane);
    }
  } else if constexpr (!L::kOutStaged) {
    store_registers<kV>(p, work, acc_o, warp_row, lane);
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
    redo_rows<kV>(a, work, warp_row, redo, out, lane);
  }
  if (is_direct) return;
  if constexpr (kV.lengths) {
    if (first < work.written_begin || (p.cu_seqlens_q != nullptr && first + 64 > work.written_end)) {
      store_rows<kV>(p, work, warp_row, out, lane);
      return;
    }
  }
  fence_proxy_async();
  bar_sync(1 + group, 128);
  if (thread == 0) {
#pragma unroll
    for (int c = 0; c < L::kChunksV; ++c)
      tma_store(a.out_map, out + c * L::kChunkQ, c * 64, work.q_begin + first, work.head, sequence_of_q<kV>(a, work));
    tma_store_commit();
  }
}

}  // namespace heed::cuda
