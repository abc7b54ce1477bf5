// attention_fwd_sm90: from scores to probabilities, against a kept maximum or by the exact online step.
#pragma once

#include "params.h"
#include "ptx.cuh"
#include "score.cuh"
#include "work_sm90.h"

namespace heed::cuda {

// This thread's rows, g and g + 8 of its warp's 16. Maxima in units of log2; sums of this thread's columns, until the end.
// Register i of scores is row i / 2 % 2, key i / 4 * 8 + i % 2 (behind the thread's first).
struct Softmax {
  float row_max[2], row_sum[2], alpha[2];
};

// Keys at or past hi, and before lo, of this thread's two rows; both counted from the thread's first key of the tile.
template <int kScores>
__device__ __forceinline__ void hide_from(float (&acc_s)[kScores], const i32 (&hi)[2], float hidden) {
#pragma unroll
  for (int i = 0; i < kScores; ++i)
    if (i / 4 * 8 + i % 2 >= hi[i / 2 % 2]) acc_s[i] = hidden;
}
template <int kScores>
__device__ __forceinline__ void hide_before(float (&acc_s)[kScores], const i32 (&lo)[2], float hidden) {
#pragma unroll
  for (int i = 0; i < kScores; ++i)
    if (i / 4 * 8 + i % 2 < lo[i / 2 % 2]) acc_s[i] = hidden;
}

template <int kScores>
__device__ __forceinline__ void multiply(float (&acc_s)[kScores], float& scale_log2) {
#pragma unroll
  for (int i = 0; i < kScores; ++i) acc_s[i] = __fmul_rn(acc_s[i], scale_log2);
  scale_log2 = 1.0f;
}

// The exact online step; O is still to be multiplied by alpha.
template <int kScores>
__device__ __forceinline__ void softmax_exact(float (&acc_s)[kScores], Softmax& state, float scale_log2) {
  const float kInf = __int_as_float(0x7f800000);
  if (scale_log2 < 0.0f) multiply(acc_s, scale_log2);  // the maximum below is that of scale * s for a positive scale only
  float top[2] = {-kInf, -kInf};
#pragma unroll
  for (int i = 0; i < kScores; ++i) top[i / 2 % 2] = fmaxf(top[i / 2 % 2], acc_s[i]);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 1));
    top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 2));
    const float next = fmaxf(state.row_max[r], __fmul_rn(top[r], scale_log2));
    top[r] = next == -kInf ? 0.0f : next;
    state.alpha[r] = ex2(state.row_max[r] - top[r]);
    state.row_max[r] = next;
    state.row_sum[r] *= state.alpha[r];
  }
  // Large scores are rounded as their maximum was, so that no P exceeds 1.
  if (__any_sync(0xffffffffu, fmaxf(fabsf(top[0]), fabsf(top[1])) >= kLargeScore)) multiply(acc_s, scale_log2);
#pragma unroll
  for (int i = 0; i < kScores; ++i) {
    acc_s[i] = ex2(fmaf(acc_s[i], scale_log2, -top[i / 2 % 2]));
    state.row_sum[i / 2 % 2] += acc_s[i];
  }
}

// Against the kept maxima. False where some row of the warp needs the exact step; then the sums are as they were.
template <int kScores>
__device__ __forceinline__ bool softmax_kept(float (&acc_s)[kScores], Softmax& state, float scale_log2) {
  float sum[2] = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < kScores; ++i) {
    acc_s[i] = ex2(fmaf(acc_s[i], scale_log2, -state.row_max[i / 2 % 2]));
    sum[i / 2 % 2] += acc_s[i];
  }
  // No term is negative. False for NaN too, and for a row that has seen no key yet.
  const float largest = fmaxf(fabsf(state.row_max[0]), fabsf(state.row_max[1]));
  if (!__all_sync(0xffffffffu, sum[0] + sum[1] <= 32768.0f && largest < kLargeScore)) return false;
  state.row_sum[0] += sum[0], state.row_sum[1] += sum[1];
  return true;
}

template <AttentionFwdSm90Variant kV>
__device__ __forceinline__ void round_p(u32 (&probability)[Layout<kV>::kKeySteps][4],
                                        const float (&acc_s)[Layout<kV>::kScores]) {
#pragma unroll
  for (int j = 0; j < Layout<kV>::kKeySteps; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      probability[j][e] = cvt_pair<kV.is_bf16>(acc_s[j * 8 + e * 2], acc_s[j * 8 + e * 2 + 1]);
}

template <int kOut>
__device__ __forceinline__ void rescale(float (&acc_o)[kOut], const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < kOut; ++i) acc_o[i] *= factor[i / 2 % 2];
}

}  // namespace heed::cuda
