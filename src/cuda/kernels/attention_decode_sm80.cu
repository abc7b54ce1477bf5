// Attention forward for few queries over many keys: as fast as memory delivers K and V. Ampere and later.
//
//   S^T = K Q^T  [keys, rows]     O^T = V^T P^T  [Dv, rows]      f16 or bf16, sums in f32
//
// A block owns tile_q (8 or 16) rows of one (sequence, kv head) and one split of its keys; its warps take the keys in steps
// of 16, round robin, and meet once, at the end. Keys are the m of the products, so that a row costs 8 columns, not 16.
//
// K and V go from memory straight into mma operands, 16 bytes a load; nothing passes through shared memory. A product does
// not care in which order its inner dimension is summed: lane (g, t) loads d = 8 t .. 8 t + 7 of every 32 of key g, and of Q
// alike, and these words are the fragments of two k16 steps. Of V it loads columns 8 g .. 8 g + 7 of every 64 of the four
// keys that it has in P, and interleaves pairs of keys.  g = lane / 4, t = lane % 4.
// In flight: K of the next step from the moment S is done, V of the next step from the moment O is: 512 B a lane at D 128.
//
// Shared memory only at the end, where the warps meet: decode.cuh.
#include "decode.cuh"
#include "output.cuh"
#include "params.h"
#include "ptx.cuh"
#include "rows.cuh"

namespace heed::cuda {

// What one lane has in flight of one step of keys.
template <AttentionFwdVariant kV>
struct KeyFragments {
  static constexpr int kChunks = kV.head_dim / 32, kHalves = kV.head_dim_v / 64;
  uint4 k[2][kChunks];  // keys g, g + 8
  uint4 v[4][kHalves];  // keys 2t, 2t + 1, 2t + 8, 2t + 9
};

// gather: keys lie in pages. Rows start on 16 bytes either way.
template <AttentionFwdVariant kV>
struct KeyReader {
  const AttentionFwdParams& p;
  const BlockWork& w;
  const char *k_base, *v_base;  // at this lane's column
  i32 end;  // keys at and past it are not read
  int lane;
  // Of key lane % 16: of the next step to load, and of the one after it, asked for a whole iteration before it is needed:
  // a look-up waits in the same queue as K and V.
  i32 page, later_page;
  u32 place, later_place;

  __device__ __forceinline__ KeyReader(const AttentionFwdParams& params, const BlockWork& work, i32 key_end, int l)
      : p(params), w(work), end(key_end), lane(l), page(0), later_page(0), place(0), later_place(0) {
    k_base = static_cast<const char*>(p.k) + (first_key(p, w, p.k_stride) + lane % 4 * 8) * 2;
    v_base = static_cast<const char*>(p.v) + (first_key(p, w, p.v_stride) + lane / 4 * 8) * 2;
  }

  // Looks up the pages of step j0; keys past the end count as the last one, whose scores and weights are hidden.
  __device__ __forceinline__ void look_up(i32 j0) {
    if constexpr (kV.gather) {
      const u32 key = static_cast<u32>(w.k_begin) + min(j0 + lane % kStep, end - 1), page_size = p.page_size;
      later_page = p.page_table[w.cache_row * p.page_table_stride + key / page_size * p.page_table_step];
      later_place = key % page_size;
    }
  }
  __device__ __forceinline__ void advance() { page = later_page, place = later_place; }

  __device__ __forceinline__ const char* row_of(const char* base, const Strides3& stride, i32 j0, int key) const {
    if constexpr (kV.gather) {
      const i64 page_of_key = __shfl_sync(0xffffffffu, page, key), place_of_key = __shfl_sync(0xffffffffu, place, key);
      return base + (page_of_key * stride.b + place_of_key * stride.s) * 2;
    } else {
      return base + min(j0 + key, end - 1) * stride.s * 2;
    }
  }

  __device__ __forceinline__ uint4 read(const char* from, bool in_dim) const {
    return in_dim ? load_streamed_16(from) : make_uint4(0, 0, 0, 0);
  }

  // Works out where the rows of step j0 lie, while the loads before it are under way: no arithmetic stands between the
  // arrival of one step and the loads of the next. Sixteen rows have no registers for it, and D 64 would lose a block by it.
  static constexpr bool kAhead = kV.tile_q == 8 && kV.head_dim > 64;
  const char *k_row[2], *v_row[4];
  __device__ __forceinline__ const char* row_of_k(i32 j0, int r) const {
    return row_of(k_base, p.k_stride, j0, lane / 4 + r * 8);
  }
  __device__ __forceinline__ const char* row_of_v(i32 j0, int r) const {
    return row_of(v_base, p.v_stride, j0, lane % 4 * 2 + r % 2 + r / 2 * 8);
  }
  __device__ __forceinline__ void locate(i32 j0) {
    if constexpr (kAhead) {
#pragma unroll
      for (int r = 0; r < 2; ++r) k_row[r] = row_of_k(j0, r);
#pragma unroll
      for (int r = 0; r < 4; ++r) v_row[r] = row_of_v(j0, r);
    }
  }

  __device__ __forceinline__ void load_k(KeyFragments<kV>& f, i32 j0) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const char* row = kAhead ? k_row[r] : row_of_k(j0, r);
#pragma unroll
      for (int c = 0; c < KeyFragments<kV>::kChunks; ++c)
        f.k[r][c] = read(row + c * 64, c * 32 + lane % 4 * 8 < p.head_dim);
    }
  }
  __device__ __forceinline__ void load_v(KeyFragments<kV>& f, i32 j0) const {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const char* row = kAhead ? v_row[r] : row_of_v(j0, r);
#pragma unroll
      for (int h = 0; h < KeyFragments<kV>::kHalves; ++h)
        f.v[r][h] = read(row + h * 128, h * 64 + lane / 4 * 8 < p.head_dim_v);
    }
  }
};

__device__ __forceinline__ u32 word_of(const uint4& x, int i) {
  return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w;
}

// O^T += V^T P^T for a step of keys.
template <AttentionFwdVariant kV, int kGroups, int kOut>
__device__ __forceinline__ void multiply_pv(float (&acc_o)[kGroups][kOut][4], const KeyFragments<kV>& f,
                                            const u32 (&probability)[kGroups][2]) {
#pragma unroll
  for (int h = 0; h < KeyFragments<kV>::kHalves; ++h)
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // columns 8 g + 2 i and 8 g + 2 i + 1
      const u32 v0 = word_of(f.v[0][h], i), v1 = word_of(f.v[1][h], i), v2 = word_of(f.v[2][h], i),
                v3 = word_of(f.v[3][h], i);
      const u32 a[4] = {__byte_perm(v0, v1, 0x5410), __byte_perm(v0, v1, 0x7632), __byte_perm(v2, v3, 0x5410),
                        __byte_perm(v2, v3, 0x7632)};
#pragma unroll
      for (int group = 0; group < kGroups; ++group)
        mma_m16n8k16<kV.is_bf16>(acc_o[group][h * 4 + i], a, probability[group][0], probability[group][1]);
    }
}

// Blocks of a multiprocessor that registers have to leave room for, 0: ptxas decides. Eight warps are what memory wants;
// for the sake of one more block ptxas spills a few words, at D 64 of 16 rows and on Blackwell at D 128.
template <AttentionFwdVariant kV>
__device__ constexpr int least_blocks() {
  constexpr int kWanted = 8 / kV.warps;
  if (kV.head_dim > 64) return __CUDA_ARCH__ >= 1000 ? kWanted : 0;
  return kV.tile_q == 16 ? kWanted : kWanted + 1;
}

template <AttentionFwdVariant kV>
__global__ void __launch_bounds__(kV.warps * 32, least_blocks<kV>())
    attention_decode_sm80(const __grid_constant__ AttentionFwdParams p) {
  using F = KeyFragments<kV>;
  constexpr int kGroups = kV.tile_q / 8, kOut = F::kHalves * 4;
  extern __shared__ __align__(16) float shared[];
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  wait_for_primary();
  launch_dependents();
  const BlockWork w = block_work<kV>(p, blockIdx.x);
  if (w.idle) return;
  const RowMap rows(p, w);
  const float scale_log2 = plain_scale(p);
  const i32 begin = w.tile_begin * kV.tile_k, end = min(w.tile_end * kV.tile_k, w.k_len);

  float acc_o[kGroups][kOut][4], top[kGroups][2], sum[kGroups][2];
  u32 q[kGroups][F::kChunks][4];
  clear_sums(acc_o, top, sum);

  i32 j0 = begin + warp * kStep;
  if (j0 < end) {
    KeyReader<kV> reader(p, w, end, lane);
    KeyFragments<kV> f;
    reader.look_up(j0);
    reader.advance();
    reader.locate(j0);
    reader.load_k(f, j0);
    reader.load_v(f, j0);
    reader.look_up(j0 + kV.warps * kStep);
    reader.advance();
    reader.look_up(j0 + 2 * kV.warps * kStep);
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const int row = group * 8 + lane / 4;
      const i32 query = rows.query(row);
      const char* from =
          static_cast<const char*>(p.q) +
          (w.b * p.q_stride.b + rows.head(row) * p.q_stride.h + (w.q_begin + query) * p.q_stride.s + lane % 4 * 8) * 2;
#pragma unroll
      for (int c = 0; c < F::kChunks; ++c) {
        const uint4 x = reader.read(from + c * 64, query < w.q_len && c * 32 + lane % 4 * 8 < p.head_dim);
        q[group][c][0] = x.x, q[group][c][1] = x.y, q[group][c][2] = x.z, q[group][c][3] = x.w;
      }
    }
    const SeenKeys seen = seen_keys<kV>(p, w, rows, end, lane);

#pragma unroll 1
    for (; j0 < end; j0 += kV.warps * kStep) {
      const i32 next = j0 + kV.warps * kStep;
      reader.locate(next);
      float s[kGroups][4];
#pragma unroll
      for (int group = 0; group < kGroups; ++group)
#pragma unroll
        for (int e = 0; e < 4; ++e) s[group][e] = 0.0f;
#pragma unroll
      for (int c = 0; c < F::kChunks; ++c) {
        const u32 a0[4] = {f.k[0][c].x, f.k[1][c].x, f.k[0][c].y, f.k[1][c].y};
        const u32 a1[4] = {f.k[0][c].z, f.k[1][c].z, f.k[0][c].w, f.k[1][c].w};
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
          mma_m16n8k16<kV.is_bf16>(s[group], a0, q[group][c][0], q[group][c][1]);
          mma_m16n8k16<kV.is_bf16>(s[group], a1, q[group][c][2], q[group][c][3]);
        }
      }
      reader.load_k(f, next);  // past the end: the last key again, which is not used

      float x[kGroups][4];
      softmax_step(s, seen, j0, end, scale_log2, top, sum, acc_o, x, lane);
      u32 probability[kGroups][2];
      round_probabilities<kV.is_bf16 != 0>(x, probability);
      multiply_pv<kV>(acc_o, f, probability);
      if (kGroups == 1 && p.out_is_f32) {  // sixteen rows have no registers for it
        round_rest<kV.is_bf16 != 0>(x, probability);
        multiply_pv<kV>(acc_o, f, probability);
      }
      reader.load_v(f, next);
      reader.advance();
      reader.look_up(next + 2 * kV.warps * kStep);
    }
  }

  const Meeting<kV> meeting(shared);
  bring_sums<kV>(meeting, top, sum, warp, lane);
#pragma unroll
  for (int group = 0; group < kGroups; ++group)
#pragma unroll
    for (int e = 0; e < 2; ++e)
#pragma unroll
      for (int n = 0; n < kOut; ++n)
        *reinterpret_cast<float2*>(meeting.row(warp, group * 8 + lane % 4 * 2 + e) + n / 4 * 64 + lane / 4 * 8 + n % 4 * 2) =
            make_float2(acc_o[group][n][e], acc_o[group][n][2 + e]);
  __syncthreads();
  const u32 bad = merge_rows<kV>(p, w, rows, meeting, warp, lane);
  redo_rows<kV, kV>(p, w, rows, bad, warp, lane);
}

}  // namespace heed::cuda
