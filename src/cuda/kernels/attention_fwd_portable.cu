// Attention forward in plain multiply-adds: f32 inputs, head dims that the matrix-unit kernels do not take, any GPU.
//
//   O = softmax(scale Q K^T + terms) V      Q [rows, D]  K [keys, D]  V [keys, Dv], everything in f32 on chip
//
// No warp is assumed: threads meet at block barriers and in shared memory only, whatever the width of a wave. Every feature
// is a run-time branch that is uniform over the block; a variant is a type and a tile.
//
// Threads: 128 as 16 rows x 8 columns for the products: thread (y, x) holds rows y + 16 a and, of S, keys x + 8 c; of O,
// columns x + 8 c. For the softmax 128 / tile_q threads a row, each a column in so many, in rolled loops: terms are long.
// Shared memory, f32: Q [tile_q][D + 4] | K, then V, of one tile [tile_k][max(D, Dv) + 4] | S [tile_q][tile_k + 1]
//   | max, sum, alpha [tile_q] | partial [tile_q][8].
// Hidden and dropped keys have the weight -0: their rows of V are left out, since 0 times a NaN there would be NaN. A visible
// key's weight that underflows is +0.
#include "params.h"
#include "ptx.cuh"
#include "rows.cuh"
#include "score.cuh"

namespace heed::cuda {

constexpr int kPortableThreads = 128;

struct PortableVariant {
  int element = kElementF32;
  int dim = 64;  // both head dims at most this; a multiple of 8
  int tile_q = 64;
  int tile_k = 64;
  int split = 1;  // where partial_lse says so
  int mask = kMaskRange;
};

template <int kElement>
__device__ __forceinline__ void store_element(void* base, i64 at, float x, bool as_f32) {
  if (kElement == kElementF32 || as_f32)
    static_cast<float*>(base)[at] = x;
  else
    static_cast<unsigned short*>(base)[at] = static_cast<unsigned short>(cvt_pair<kElement == kElementBf16>(x, 0.0f));
}

// One tile of K or V to shared memory, zeros past the end and past the head dim.
template <PortableVariant kV>
__device__ __forceinline__ void load_tile(const AttentionFwdParams& p, const BlockWork& w, const void* data,
                                          const Strides3& stride, i32 dim, i32 j0, float* to) {
  constexpr int kPitch = kV.dim + 4;
  const i64 first = first_key(p, w, stride);
#pragma unroll 4
  for (int at = threadIdx.x; at < kV.tile_k * kV.dim; at += kPortableThreads) {
    const int r = at / kV.dim, c = at % kV.dim;
    i64 row = -1;
    if (j0 + r < w.k_len && c < dim) row = p.page_size > 0 ? paged_row(p, w, stride, j0 + r) : (j0 + r) * stride.s;
    to[r * kPitch + c] = row < 0 ? 0.0f : load_element<kV.element>(data, first + row + c);
  }
}

// Shared memory of a block.
template <PortableVariant kV>
struct PortableShared {
  static constexpr int kPitch = kV.dim + 4, kPitchS = kV.tile_k + 1;
  float *q, *kv, *s, *top, *sum, *alpha, *part;
  __device__ __forceinline__ explicit PortableShared(float* base)
      : q(base),
        kv(q + kV.tile_q * kPitch),
        s(kv + kV.tile_k * kPitch),
        top(s + kV.tile_q * kPitchS),
        sum(top + kV.tile_q),
        alpha(sum + kV.tile_q),
        part(alpha + kV.tile_q) {}
};

// Scores in `s` become probabilities; maxima, sums and alpha of every row. Ends with a barrier still to come.
template <PortableVariant kV>
__device__ __forceinline__ void portable_softmax(const AttentionFwdParams& p, const BlockWork& w, const RowMap& rows,
                                                 i32 j0, const PortableShared<kV>& shared) {
  constexpr int kPerRow = kPortableThreads / kV.tile_q;
  const float kInf = __int_as_float(0x7f800000);
  const int r = threadIdx.x / kPerRow, first = threadIdx.x % kPerRow;
  const i32 query = rows.query(r), head = rows.head(r);
  float* line = shared.s + r * PortableShared<kV>::kPitchS;
  KeyRange range = {0, 0};
  if (query < w.q_len) range = visible_keys(p, w.k_len, query + w.offset);
  float top = -kInf;
#pragma unroll 1
  for (int c = first; c < kV.tile_k; c += kPerRow) {
    const i32 j = j0 + c;
    const float x =
        j >= range.lo && j < range.hi ? score_of<kV.element>(p, w.b, line[c], query, head, j, w.offset) : -kInf;
    line[c] = x;
    top = fmaxf(top, x);
  }
  shared.part[r * kPerRow + first] = top;
  __syncthreads();
  const float before = shared.top[r];
  top = before;
#pragma unroll
  for (int i = 0; i < kPerRow; ++i) top = fmaxf(top, shared.part[r * kPerRow + i]);
  const float reference = top == -kInf ? 0.0f : top, alpha = exp2f(before - reference);
  const DropoutKey key(p);
  float sum = 0.0f;
#pragma unroll 1
  for (int c = first; c < kV.tile_k; c += kPerRow) {
    const float x = line[c];
    const float probability = exp2f(x - reference);
    sum += probability;
    const bool kept = !p.dropout_on || x == -kInf || dropout_keeps(p, key, w.b, head, query, j0 + c);
    line[c] = x == -kInf || !kept ? -0.0f : probability;
  }
  __syncthreads();  // maxima of the tile and of before have been read
  shared.part[r * kPerRow + first] = sum;
  if (first == 0) shared.alpha[r] = alpha, shared.top[r] = top;
}

template <PortableVariant kV>
__global__ void __launch_bounds__(kPortableThreads, __CUDA_ARCH__ >= 1000 && kV.dim <= 64 ? 3 : 0)  // or it spills
    attention_fwd_portable(const __grid_constant__ AttentionFwdParams p) {
  constexpr int kColumns = 8, kRowsApart = kPortableThreads / kColumns, kPerRow = kPortableThreads / kV.tile_q;
  constexpr int kRowsEach = kV.tile_q / kRowsApart, kKeysEach = kV.tile_k / kColumns, kOutEach = kV.dim / kColumns;
  constexpr int kPitch = kV.dim + 4, kPitchS = kV.tile_k + 1;
  constexpr float kLn2 = 0.693147180559945f, kLog2e = 1.44269504088896f;
  static_assert(kPerRow <= kColumns && kV.tile_q % kRowsApart == 0);
  const float kInf = __int_as_float(0x7f800000);
  extern __shared__ __align__(16) float memory[];
  wait_for_primary();
  const PortableShared<kV> shared(memory);
  const int thread = threadIdx.x, x = thread % kColumns, y = thread / kColumns;
  const BlockWork w = block_work<kV>(p, blockIdx.x);
  if (w.idle) return;
  const RowMap rows(p, w);

#pragma unroll 2
  for (int at = thread; at < kV.tile_q * kV.dim; at += kPortableThreads) {
    const int r = at / kV.dim, c = at % kV.dim;
    const i32 query = rows.query(r);
    const bool valid = query < w.q_len && c < p.head_dim;
    shared.q[r * kPitch + c] = !valid ? 0.0f
                                      : load_element<kV.element>(p.q, w.b * p.q_stride.b + rows.head(r) * p.q_stride.h +
                                                                          (w.q_begin + query) * p.q_stride.s + c);
  }
  for (int r = thread; r < kV.tile_q; r += kPortableThreads) shared.top[r] = -kInf, shared.sum[r] = 0.0f;

  float acc[kRowsEach][kOutEach];
#pragma unroll
  for (int a = 0; a < kRowsEach; ++a)
#pragma unroll
    for (int c = 0; c < kOutEach; ++c) acc[a][c] = 0.0f;

#pragma unroll 1
  for (int tile = w.tile_begin; tile < w.tile_end; ++tile) {
    const i32 j0 = tile * kV.tile_k;
    __syncthreads();  // everyone is done with V and the sums of the tile before
    load_tile<kV>(p, w, p.k, p.k_stride, p.head_dim, j0, shared.kv);
    __syncthreads();
    float s[kRowsEach][kKeysEach];
#pragma unroll
    for (int a = 0; a < kRowsEach; ++a)
#pragma unroll
      for (int c = 0; c < kKeysEach; ++c) s[a][c] = 0.0f;
#pragma unroll 1
    for (int d = 0; d < kV.dim; d += 4) {
      float4 q[kRowsEach];
#pragma unroll
      for (int a = 0; a < kRowsEach; ++a)
        q[a] = *reinterpret_cast<const float4*>(shared.q + (y + kRowsApart * a) * kPitch + d);
#pragma unroll
      for (int c = 0; c < kKeysEach; ++c) {
        const float4 k = *reinterpret_cast<const float4*>(shared.kv + (x + kColumns * c) * kPitch + d);
#pragma unroll
        for (int a = 0; a < kRowsEach; ++a)
          s[a][c] = fmaf(q[a].x, k.x, fmaf(q[a].y, k.y, fmaf(q[a].z, k.z, fmaf(q[a].w, k.w, s[a][c]))));
      }
    }
#pragma unroll
    for (int a = 0; a < kRowsEach; ++a)
#pragma unroll
      for (int c = 0; c < kKeysEach; ++c) shared.s[(y + kRowsApart * a) * kPitchS + x + kColumns * c] = s[a][c];
    __syncthreads();  // K has been used: V takes its place
    load_tile<kV>(p, w, p.v, p.v_stride, p.head_dim_v, j0, shared.kv);
    portable_softmax<kV>(p, w, rows, j0, shared);
    __syncthreads();
    if (thread < kV.tile_q) {
      float sum = shared.sum[thread] * shared.alpha[thread];
#pragma unroll
      for (int i = 0; i < kPerRow; ++i) sum += shared.part[thread * kPerRow + i];
      shared.sum[thread] = sum;
    }
#pragma unroll
    for (int a = 0; a < kRowsEach; ++a) {
      const float alpha = shared.alpha[y + kRowsApart * a];
#pragma unroll
      for (int c = 0; c < kOutEach; ++c) acc[a][c] *= alpha;
    }
#pragma unroll 1
    for (int k = 0; k < kV.tile_k; ++k) {
      float value[kOutEach];
#pragma unroll
      for (int c = 0; c < kOutEach; ++c) value[c] = shared.kv[k * kPitch + x + kColumns * c];
#pragma unroll
      for (int a = 0; a < kRowsEach; ++a) {
        const float weight = shared.s[(y + kRowsApart * a) * kPitchS + k];
        if (__float_as_uint(weight) == 0x80000000u) continue;
#pragma unroll
        for (int c = 0; c < kOutEach; ++c) acc[a][c] = fmaf(weight, value[c], acc[a][c]);
      }
    }
  }
  __syncthreads();

  const bool split = writes_partials<kV>(p);
#pragma unroll
  for (int a = 0; a < kRowsEach; ++a) {
    const int r = y + kRowsApart * a;
    const i32 query = rows.query(r), head = rows.head(r);
    if (query >= w.q_rows) continue;
    float top = shared.top[r], sum = shared.sum[r], factor = 1.0f;
    if (!split && p.sinks != nullptr && query < w.q_len) {
      const float sink = p.sinks[head] * kLog2e, both = fmaxf(top, sink);
      const float reference = both == -kInf ? 0.0f : both;
      factor = exp2f(top - reference);
      sum = sum * factor + exp2f(sink - reference);
      top = both;
    }
    const float inverse = sum == 0.0f ? 0.0f : factor * p.dropout_scale / sum;
    const float lse = sum == 0.0f ? -kInf : (top + log2f(sum)) * kLn2;
    const i64 slot = split ? partial_slot(p, w, head, query) : 0;
    const i64 at = w.b * p.out_stride.b + head * p.out_stride.h + (w.q_begin + query) * p.out_stride.s;
#pragma unroll
    for (int c = 0; c < kOutEach; ++c) {
      const int column = x + kColumns * c;
      if (column >= p.head_dim_v) continue;
      if (split)
        p.partial_out[slot * p.head_dim_v + column] = acc[a][c] * inverse;
      else
        store_element<kV.element>(p.out, at + column, acc[a][c] * inverse, p.out_is_f32 != 0);
    }
    if (x != 0) continue;
    if (split)
      p.partial_lse[slot] = query < w.q_len || w.split > 0 ? lse : __uint_as_float(kPaddingLse);
    else
      store_lse(p, w, head, query, lse);
  }
}

}  // namespace heed::cuda
