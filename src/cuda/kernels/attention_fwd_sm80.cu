// Attention forward with cp.async, ldmatrix and mma.sync: Ampere and every NVIDIA GPU since.
//
//   O = softmax(scale Q K^T + terms) V      Q [rows, D]  K [keys, D]  V [keys, Dv]  O [rows, Dv], f16 or bf16, sums in f32
//
// A block owns tile_q rows of one (sequence, head) and walks the keys in tiles of tile_k. Rows are (query, head of the GQA
// group) pairs, query-major, where rows_per_query > 1, so that a group shares each load of K and V.
//
// Roles: every warp owns tile_q / warps rows and does both products for them; all threads load.
// Shared memory: Q [tile_q][D + 8] | K [stages][tile_k][D + 8] | V [stages][tile_k][Dv + 8]. The 16 bytes of padding put the
//   eight rows that an ldmatrix reads into eight different bank groups, and keep every address an immediate offset.
// Kept maximum: once a row has met a visible key its maximum so far stays the reference of the exponent. Floats round alike
//   at any scale, so later tiles need no maximum, no shuffle and no rescale; a warp in which a tile's sum passes 2^15
//   computes that tile again from K, still in shared memory, and takes the exact step.
#include "output.cuh"
#include "params.h"
#include "ptx.cuh"
#include "rows.cuh"
#include "score.cuh"

namespace heed::cuda {

template <AttentionFwdVariant kV>
struct Tile {
  static constexpr int kThreads = kV.warps * 32;
  static constexpr int kRowTiles = kV.tile_q / (kV.warps * 16);  // m16 tiles of a warp
  static constexpr int kKeyTiles = kV.tile_k / 8;  // n8 tiles of S
  static constexpr int kOutTiles = kV.head_dim_v / 8;  // n8 tiles of O
  static constexpr int kPitch = kV.head_dim + 8;  // elements
  static constexpr int kPitchV = kV.head_dim_v + 8;
  static constexpr int kBytesQ = kV.tile_q * kPitch * 2;
  static constexpr int kBytesK = kV.tile_k * kPitch * 2;
  static constexpr int kBytesV = kV.tile_k * kPitchV * 2;
  // Q fragments stay in registers where O leaves room; of three blocks only Hopper's compiler finds it.
#if __CUDA_ARCH__ == 900
  static constexpr int kRoomForQ = 168;
#else
  static constexpr int kRoomForQ = kV.blocks > 2 ? 120 : 168;
#endif
  static constexpr bool kQInRegisters = kRowTiles * (kV.head_dim / 4 + kV.head_dim_v / 2 + kV.tile_k / 2) <= kRoomForQ;
  // P is half the registers when the next loads are issued. Under masks (4k keys causal at d128: 295 against 316 TFLOP/s)
  // only where registers are short.
  static constexpr bool kRoundEarly = __CUDA_ARCH__ != 900 || kV.mask == kMaskNone || kV.gather || kV.blocks > 2;
  // Blocks that the register budget leaves room for, with some 48 registers for addresses and bounds; more where terms,
  // page look-ups or, before Hopper, masks would spill.
#if __CUDA_ARCH__ >= 900
  static constexpr int kMaskRegisters = 0;
#else
  static constexpr int kMaskRegisters = kV.mask != kMaskNone ? 16 : 0;
#endif
  static constexpr int kRegisters =
      kRowTiles * (kV.head_dim_v / 2 + kV.tile_k / 2 + (kQInRegisters ? kV.head_dim / 4 : 0)) + 48 + kMaskRegisters +
      (kV.modified || kV.gather ? 64 : 0);
  static constexpr int kBytes = kBytesQ + kV.stages * (kBytesK + kBytesV);
  static constexpr int kByRegisters = 65536 / (kThreads * kRegisters), kByMemory = 227 * 1024 / (kBytes + 1024);
  static constexpr int kEstimate = kByRegisters < kByMemory ? kByRegisters : kByMemory;
  static constexpr int kBlocks = kV.blocks > 0 ? kV.blocks : kEstimate < 1 ? 1 : kEstimate;
};

// S = Q K^T for this warp's rows and one key tile. acc_s: [row tile][key tile][4].
template <AttentionFwdVariant kV>
__device__ __forceinline__ void multiply_qk(float (&acc_s)[Tile<kV>::kRowTiles][Tile<kV>::kKeyTiles][4],
                                            const u32 (&q_registers)[Tile<kV>::kRowTiles][kV.head_dim / 16][4],
                                            u32 q_lane, u32 k_lane) {
  using T = Tile<kV>;
#pragma unroll
  for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
    for (int n = 0; n < T::kKeyTiles; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc_s[m][n][e] = 0.0f;
#pragma unroll
  for (int kk = 0; kk < kV.head_dim / 16; ++kk) {
    u32 a[T::kRowTiles][4];
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m) {
      if constexpr (T::kQInRegisters) {
#pragma unroll
        for (int e = 0; e < 4; ++e) a[m][e] = q_registers[m][kk][e];
      } else {
        ldmatrix_x4(a[m], q_lane + (m * 16 * T::kPitch + kk * 16) * 2);
      }
    }
#pragma unroll
    for (int n = 0; n < T::kKeyTiles; n += 2) {
      u32 b[4];  // keys n*8..+7: d lower, upper; keys n*8+8..+15: d lower, upper
      ldmatrix_x4(b, k_lane + (n * 8 * T::kPitch + kk * 16) * 2);
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m) {
        mma_m16n8k16<kV.is_bf16>(acc_s[m][n], a[m], b[0], b[1]);
        mma_m16n8k16<kV.is_bf16>(acc_s[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// Keys kk * 16 to kk * 16 + 15 of P rounded to the inputs' type, as fragments of the second product.
template <AttentionFwdVariant kV>
__device__ __forceinline__ void round_p(u32 (&p)[Tile<kV>::kRowTiles][kV.tile_k / 16][4],
                                        const float (&s)[Tile<kV>::kRowTiles][Tile<kV>::kKeyTiles][4], int kk) {
#pragma unroll
  for (int m = 0; m < Tile<kV>::kRowTiles; ++m)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      p[m][kk][e] = cvt_pair<kV.is_bf16>(s[m][2 * kk + e / 2][e % 2 * 2], s[m][2 * kk + e / 2][e % 2 * 2 + 1]);
}

// The part of P that rounding left out, for O in f32, whose error bound has no room for it.
template <AttentionFwdVariant kV>
__device__ __forceinline__ void rest_of_p(u32 (&rest)[Tile<kV>::kRowTiles][kV.tile_k / 16][4],
                                          const float (&s)[Tile<kV>::kRowTiles][Tile<kV>::kKeyTiles][4],
                                          const u32 (&p)[Tile<kV>::kRowTiles][kV.tile_k / 16][4]) {
#pragma unroll
  for (int m = 0; m < Tile<kV>::kRowTiles; ++m)
#pragma unroll
    for (int kk = 0; kk < kV.tile_k / 16; ++kk)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        rest[m][kk][e] = rest_of_pair<kV.is_bf16>(s[m][2 * kk + e / 2][e % 2 * 2], s[m][2 * kk + e / 2][e % 2 * 2 + 1],
                                                  p[m][kk][e]);
}

// O += P V. kRound: P comes from s, a step of keys at a time.
template <AttentionFwdVariant kV, bool kRound>
__device__ __forceinline__ void multiply_pv(float (&acc_o)[Tile<kV>::kRowTiles][Tile<kV>::kOutTiles][4],
                                            u32 (&p)[Tile<kV>::kRowTiles][kV.tile_k / 16][4],
                                            const float (&s)[Tile<kV>::kRowTiles][Tile<kV>::kKeyTiles][4], u32 v_lane) {
  using T = Tile<kV>;
#pragma unroll
  for (int kk = 0; kk < kV.tile_k / 16; ++kk) {
    if constexpr (kRound) round_p<kV>(p, s, kk);
#pragma unroll
    for (int n = 0; n < T::kOutTiles; n += 2) {
      u32 b[4];  // columns n*8..+7: keys lower, upper; columns n*8+8..+15: keys lower, upper
      ldmatrix_x4_trans(b, v_lane + (kk * 16 * T::kPitchV + n * 8) * 2);
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m) {
        mma_m16n8k16<kV.is_bf16>(acc_o[m][n], p[m][kk], b[0], b[1]);
        mma_m16n8k16<kV.is_bf16>(acc_o[m][n + 1], p[m][kk], b[2], b[3]);
      }
    }
  }
}

// Running softmax of this thread's rows: rows g and g + 8 of each row tile. Maxima in units of log2.
template <AttentionFwdVariant kV>
struct Softmax {
  float row_max[Tile<kV>::kRowTiles][2];
  float row_sum[Tile<kV>::kRowTiles][2];  // this thread's columns only, until finish
};

// Turns scores into probabilities against the kept maxima. False where some row needs the exact step; then acc_s is spoilt
// and the row sums are as they were.
template <AttentionFwdVariant kV>
__device__ __forceinline__ bool softmax_kept(float (&acc_s)[Tile<kV>::kRowTiles][Tile<kV>::kKeyTiles][4],
                                             Softmax<kV>& state, float scale_log2) {
  using T = Tile<kV>;
  float sum[T::kRowTiles][2];
  bool fits = true;
#pragma unroll
  for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float reference = -state.row_max[m][r];
      // Terms are added to scores that are multiplied by then: there the difference is exact, however large.
      if constexpr (!kV.modified) fits = fits && fabsf(reference) < kLargeScore;
      float s0 = 0.0f, s1 = 0.0f;
#pragma unroll
      for (int n = 0; n < T::kKeyTiles; ++n) {
        acc_s[m][n][2 * r] = ex2(fmaf(acc_s[m][n][2 * r], scale_log2, reference));
        acc_s[m][n][2 * r + 1] = ex2(fmaf(acc_s[m][n][2 * r + 1], scale_log2, reference));
        s0 += acc_s[m][n][2 * r];
        s1 += acc_s[m][n][2 * r + 1];
      }
      sum[m][r] = s0 + s1;
      fits = fits && sum[m][r] <= 32768.0f;  // false for NaN; a maximum of -inf makes every term inf or NaN
    }
  }
  if (!__all_sync(0xffffffffu, fits)) return false;
#pragma unroll
  for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) state.row_sum[m][r] += sum[m][r];
  return true;
}

// The exact online step: new maxima, O and sums rescaled, scores turned into probabilities.
template <AttentionFwdVariant kV>
__device__ __forceinline__ void softmax_exact(float (&acc_s)[Tile<kV>::kRowTiles][Tile<kV>::kKeyTiles][4],
                                              float (&acc_o)[Tile<kV>::kRowTiles][Tile<kV>::kOutTiles][4],
                                              Softmax<kV>& state, float scale_log2) {
  using T = Tile<kV>;
#pragma unroll
  for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      // The maximum of scale * s: of s for a positive scale, and the scale's sign goes with the product otherwise.
      float block_max = -__int_as_float(0x7f800000);
#pragma unroll
      for (int n = 0; n < T::kKeyTiles; ++n)
        block_max = fmaxf(block_max, fmaxf(__fmul_rn(acc_s[m][n][2 * r], scale_log2),
                                           __fmul_rn(acc_s[m][n][2 * r + 1], scale_log2)));
      block_max = fmaxf(block_max, __shfl_xor_sync(0xffffffffu, block_max, 1));
      block_max = fmaxf(block_max, __shfl_xor_sync(0xffffffffu, block_max, 2));
      const float new_max = fmaxf(state.row_max[m][r], block_max);
      const float reference = new_max == -__int_as_float(0x7f800000) ? 0.0f : new_max;
      const float alpha = ex2(state.row_max[m][r] - reference);
      state.row_max[m][r] = new_max;
      float sum = state.row_sum[m][r] * alpha;
      // Large scores are rounded as their maximum was: it is one of them, so that no P exceeds 1. (Rounded in any case, and in
      // place, they would cost spills at d128.)
      if (!kV.modified && fabsf(reference) >= kLargeScore) {
#pragma unroll
        for (int n = 0; n < T::kKeyTiles; ++n) {
          acc_s[m][n][2 * r] = __fmul_rn(acc_s[m][n][2 * r], scale_log2) - reference;
          acc_s[m][n][2 * r + 1] = __fmul_rn(acc_s[m][n][2 * r + 1], scale_log2) - reference;
        }
      } else {
#pragma unroll
        for (int n = 0; n < T::kKeyTiles; ++n) {
          acc_s[m][n][2 * r] = fmaf(acc_s[m][n][2 * r], scale_log2, -reference);
          acc_s[m][n][2 * r + 1] = fmaf(acc_s[m][n][2 * r + 1], scale_log2, -reference);
        }
      }
#pragma unroll
      for (int n = 0; n < T::kKeyTiles; ++n) {
        acc_s[m][n][2 * r] = ex2(acc_s[m][n][2 * r]);
        acc_s[m][n][2 * r + 1] = ex2(acc_s[m][n][2 * r + 1]);
        sum += acc_s[m][n][2 * r] + acc_s[m][n][2 * r + 1];
      }
      state.row_sum[m][r] = sum;
#pragma unroll
      for (int n = 0; n < T::kOutTiles; ++n) {
        acc_o[m][n][2 * r] *= alpha;
        acc_o[m][n][2 * r + 1] *= alpha;
      }
    }
  }
}

template <AttentionFwdVariant kV>
__global__ void __launch_bounds__(kV.warps * 32, Tile<kV>::kBlocks)
    attention_fwd_sm80(const __grid_constant__ AttentionFwdParams p) {
  using T = Tile<kV>;
  extern __shared__ __align__(16) unsigned char smem[];
  wait_for_primary();
  const int thread = threadIdx.x, warp = uniform(thread / 32), lane = thread % 32;

  BlockWork work = block_work<kV>(p, blockIdx.x);
  if (work.idle) return;
  work.tile_begin = uniform(work.tile_begin), work.tile_end = uniform(work.tile_end);
  if constexpr (kV.mask != kMaskNone || kV.blocks > 2) work.k_len = uniform(work.k_len);
  if constexpr (kV.blocks > 2)
    work.q_len = uniform(work.q_len), work.q_rows = uniform(work.q_rows), work.row0 = uniform(work.row0);
  const RowMap rows(p, work);
  const float scale_log2 = kV.modified ? 1.0f : plain_scale(p);

  const u32 q_base = smem_address(smem), k_base = q_base + T::kBytesQ, v_base = k_base + kV.stages * T::kBytesK;
  // Where this lane's ldmatrix rows start. Q: rows 0-15 of a tile by lane % 16, column half by lane / 16. K: keys by
  // lane % 8 and lane / 16, column half by (lane / 8) % 2. V transposed: keys by lane % 16, column half by lane / 16.
  const u32 q_lane = q_base + ((warp * T::kRowTiles * 16 + lane % 16) * T::kPitch + lane / 16 * 8) * 2;
  const u32 k_lane = (((lane / 16) * 8 + lane % 8) * T::kPitch + lane / 8 % 2 * 8) * 2;
  const u32 v_lane = (lane % 16 * T::kPitchV + lane / 16 * 8) * 2;

  const int first = work.tile_begin, last = work.tile_end;  // key tiles [first, last), walked downward

  float acc_o[T::kRowTiles][T::kOutTiles][4];
  Softmax<kV> state;
#pragma unroll
  for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < T::kOutTiles; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc_o[m][n][e] = 0.0f;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      state.row_max[m][r] = -__int_as_float(0x7f800000);
      state.row_sum[m][r] = 0.0f;
    }
  }

  if (first < last) {
    const KeyLoader<kV, kV.head_dim> keys(p, work, p.k, p.k_stride, p.head_dim, thread);
    const KeyLoader<kV, kV.head_dim_v> values(p, work, p.v, p.v_stride, p.head_dim_v, thread);
    load_q<kV>(p, work, rows, q_base, thread);
    keys.template load<false>(p, work, p.k_stride, last - 1, k_base);
    if constexpr (kV.stages > 1) values.template load<false>(p, work, p.v_stride, last - 1, v_base);
    cp_async_commit();
    u32 q_registers[T::kRowTiles][kV.head_dim / 16][4];
    const ScoreTerms<kV> terms(p, work, rows, warp, lane);
    bool started = false;

#pragma unroll 1
    for (int tile = last - 1; tile >= first; --tile) {
      const u32 slot = kV.stages > 1 ? (last - 1 - tile) % kV.stages : 0;
      const u32 next_slot = kV.stages > 1 ? (last - tile) % kV.stages : 0;
      // Wait for K (and V): issued an iteration ago. The barrier also says that everyone has left the slot filled next.
      cp_async_wait<0>();
      __syncthreads();
      if constexpr (kV.stages > 1) {
        if (tile > first) {
          keys.template load<true>(p, work, p.k_stride, tile - 1, k_base + next_slot * T::kBytesK);
          values.template load<true>(p, work, p.v_stride, tile - 1, v_base + next_slot * T::kBytesV);
        }
      } else {
        if (kV.gather || tile == last - 1)
          values.template load<false>(p, work, p.v_stride, tile, v_base);
        else
          values.template load<true>(p, work, p.v_stride, tile, v_base);
      }
      cp_async_commit();
      if constexpr (T::kQInRegisters) {
        if (tile == last - 1) {
#pragma unroll
          for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
            for (int kk = 0; kk < kV.head_dim / 16; ++kk)
              ldmatrix_x4(q_registers[m][kk], q_lane + (m * 16 * T::kPitch + kk * 16) * 2);
        }
      }

      const bool visible = terms.meets(tile);
      u32 probability[T::kRowTiles][kV.tile_k / 16][4], rest[T::kRowTiles][kV.tile_k / 16][4];
      float acc_s[T::kRowTiles][T::kKeyTiles][4];
      if (visible) {
        bool exact = !started;
#pragma unroll 1
        while (true) {  // once, or again where the kept maxima did not hold
          multiply_qk<kV>(acc_s, q_registers, q_lane, k_base + slot * T::kBytesK + k_lane);
          const bool partial = terms.apply(acc_s, tile);
          if (exact || partial) {
            softmax_exact<kV>(acc_s, acc_o, state, scale_log2);
            break;
          }
          if (softmax_kept<kV>(acc_s, state, scale_log2)) break;
          exact = true;
        }
        started = true;
        if constexpr (kV.modified) terms.drop(acc_s, tile);
        if constexpr (T::kRoundEarly) {
#pragma unroll
          for (int kk = 0; kk < kV.tile_k / 16; ++kk) round_p<kV>(probability, acc_s, kk);
        }
        if (kV.gather && p.out_is_f32) rest_of_p<kV>(rest, acc_s, probability);
      }

      if constexpr (kV.stages == 1) {  // V has arrived; everyone is done with K, so the next may come
        cp_async_wait<0>();
        __syncthreads();
        if (tile > first) keys.template load<true>(p, work, p.k_stride, tile - 1, k_base);
        cp_async_commit();
      }
      const u32 v_here = v_base + slot * T::kBytesV + v_lane;
      if (visible) multiply_pv<kV, !T::kRoundEarly>(acc_o, probability, acc_s, v_here);
      if (kV.gather && p.out_is_f32 && visible) multiply_pv<kV, false>(acc_o, rest, acc_s, v_here);
    }
  }
  __syncwarp();  // O takes Q's place: every lane has read Q
  const u32 redo = kV.mask != kMaskNone || kV.modified ? rows_with_nan<kV>(acc_o, lane) : 0;
  write_out<kV>(p, work, rows, acc_o, state.row_max, state.row_sum, warp, lane,
                q_base + warp * T::kRowTiles * 16 * T::kPitch * 2);
  if constexpr (kV.mask != kMaskNone || kV.modified) {
    if (redo == 0) return;
    __syncwarp();
#pragma unroll 1
    for (u32 left = redo; left != 0; left &= left - 1) {
      const int row = warp * T::kRowTiles * 16 + __ffs(static_cast<int>(left)) - 1;
      if (rows.query(row) < work.q_len) redo_row<kV>(p, work, rows.query(row), rows.head(row), lane);
    }
  }
}

}  // namespace heed::cuda
