// attention_fwd_sm90: S = Q K^T and O += P V of one consumer and one tile of keys.
#pragma once

#include "mma_sm90.cuh"
#include "params.h"
#include "ptx.cuh"
#include "work_sm90.h"

namespace heed::cuda {

// Q of a consumer: fragments in registers, or the low word of its descriptor.
template <AttentionFwdSm90Variant kV>
struct Queries {
  u32 fragments[kV.q_in_registers ? kV.head_dim / 16 : 1][4];
  u32 low;
};

template <AttentionFwdSm90Variant kV>
__device__ __forceinline__ void multiply_qk(float (&acc_s)[Layout<kV>::kScores], const Queries<kV>& q, u32 k_low) {
#pragma unroll
  for (int j = 0; j < kV.head_dim / 16; ++j) {
    const u64 b = descriptor(k_low + j / 4 * (Layout<kV>::kChunkK / 16) + j % 4 * 2);
    if constexpr (kV.q_in_registers) {
      if (j == 0)
        wgmma_rs<kV.is_bf16, false, false>(acc_s, q.fragments[j], b);
      else
        wgmma_rs<kV.is_bf16, true, false>(acc_s, q.fragments[j], b);
    } else {
      const u64 x = descriptor(q.low + j / 4 * (Layout<kV>::kChunkQ / 16) + j % 4 * 2);
      if (j == 0)
        wgmma_ss<kV.is_bf16, false>(acc_s, x, b);
      else
        wgmma_ss<kV.is_bf16, true>(acc_s, x, b);
    }
  }
  wgmma_commit();
}

template <AttentionFwdSm90Variant kV>
__device__ __forceinline__ void multiply_pv(float (&acc_o)[Layout<kV>::kOut],
                                            const u32 (&probability)[Layout<kV>::kKeySteps][4], u32 v_low) {
#pragma unroll
  for (int j = 0; j < Layout<kV>::kKeySteps; ++j)
    wgmma_rs<kV.is_bf16, true, true>(acc_o, probability[j], descriptor(v_low + j * 128));
  wgmma_commit();
}

// S of this warp's 16 rows once more, where the kept maximum did not hold.
template <AttentionFwdSm90Variant kV>
__device__ __forceinline__ void multiply_qk_again(float (&acc_s)[Layout<kV>::kScores], u32 q, u32 k) {
  const int thread = thread_here();  // keeps these addresses out of the loop's registers
  const int lane = thread % 32, warp = thread / 32 % 4;
#pragma unroll
  for (int i = 0; i < Layout<kV>::kScores; ++i) acc_s[i] = 0.0f;
#pragma unroll 1
  for (int kk = 0; kk < kV.head_dim / 16; ++kk) {
    u32 a[4], b[4];
    const int chunk = kk / 4, unit = kk % 4 * 2, row = warp * 16 + lane % 16, key = lane % 8 + lane / 16 * 8;
    ldmatrix_x4(a, q + chunk * Layout<kV>::kChunkQ + row * 128 + (((unit + lane / 16) ^ (row % 8)) << 4));
    const u32 k_lane = k + chunk * Layout<kV>::kChunkK + key * 128 + (((unit + lane / 8 % 2) ^ (key % 8)) << 4);
#pragma unroll
    for (int j = 0; j < Layout<kV>::kKeySteps; ++j) {
      ldmatrix_x4(b, k_lane + j * 16 * 128);
      mma_m16n8k16<kV.is_bf16>(reinterpret_cast<float(&)[4]>(acc_s[j * 8]), a, b[0], b[1]);
      mma_m16n8k16<kV.is_bf16>(reinterpret_cast<float(&)[4]>(acc_s[j * 8 + 4]), a, b[2], b[3]);
    }
  }
}

// Rows of Q at and past `rows`, which are another sequence's or padding, become 0: what they hold changes no bit of the
// sequence's own rows then, and takes no exact step.
template <AttentionFwdSm90Variant kV>
__device__ __forceinline__ void clear_rows_behind(u32 q, i32 rows, int group) {
  if (rows <= 0 || rows >= 64) return;  // where there are none, no product is taken
  const int thread = threadIdx.x % 128, lane = thread % 32;
#pragma unroll 1
  for (int row = rows + thread / 32; row < 64; row += 4)
#pragma unroll
    for (int c = 0; c < Layout<kV>::kChunks; ++c) store_shared(q + c * Layout<kV>::kChunkQ + row * 128 + lane * 4, 0);
  fence_proxy_async();
  bar_sync(1 + group, 128);
}

}  // namespace heed::cuda
