// attention_fwd_sm90: what is added to a score between Q K^T and the softmax, and dropout behind it. Each term is a branch
// that all threads take alike. What of the sequence a term needs is read from shared memory where it is needed.
#pragma once

#include "mma_sm90.cuh"
#include "params.h"
#include "ptx.cuh"
#include "score.cuh"
#include "work_sm90.h"

namespace heed::cuda {

// A tile of scores of this thread: rows g and g + 8 of its warp's 16, keys 2 t and 2 t + 1 of every eight (g = lane / 4,
// t = lane % 4), laid out as in softmax_sm90.cuh.
struct TermsOfRows {
  i32 query[2];  // of the sequence, at most its last
  i32 key;       // of register 0
  i32 b, head, k_len, offset;
  bool inside;  // every key of the tile lies before the sequence's end

  // `work`: where the producer left what the rows are.
  __device__ __forceinline__ TermsOfRows(u32 work, i32 first_key, i32 keys) {
    const auto word = [work](int i) { return static_cast<i32>(load_shared(work + 4 * i)); };
    const int thread = thread_here();  // keeps all of this out of the loop's registers
    const i32 row = word(0) + thread / 32 * 16 + thread % 32 / 4;
    const i32 q_len = word(4);
    head = word(1), b = word(2), k_len = word(5), offset = word(10);
    inside = first_key + keys <= k_len;
    query[0] = min(row, q_len - 1), query[1] = min(row + 8, q_len - 1);
    key = first_key + thread % 4 * 2;
  }
};

// y in, cap tanh(y / cap) / cap out, y in units of the cap. Up to 1 by a polynomial, within 2^-22 of the value; beyond by
// the exponential. Scores that far are rare: a warp that has none takes the polynomial alone, on a unit that has room.
constexpr float kTanh[] = {1.0f, -0.33332840f, 0.13325204f, -0.05345703f, 0.02028998f, -0.00620338f, 0.00104102f};

__device__ __forceinline__ float tanh_near(float y, float y2) {
  float sum = kTanh[6];
#pragma unroll
  for (int i = 5; i >= 0; --i) sum = fmaf(sum, y2, kTanh[i]);
  return y * sum;
}

template <int kScores>
__device__ __forceinline__ void take_tanh(float (&acc_s)[kScores], float to_caps) {
  constexpr float kTwoLog2e = 2.88539008177793f;
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < kScores; ++i) acc_s[i] *= to_caps, largest = fmaxf(largest, fabsf(acc_s[i]));
  if (__all_sync(0xffffffffu, largest <= 1.0f)) {
#pragma unroll
    for (int i = 0; i < kScores; ++i) acc_s[i] = tanh_near(acc_s[i], acc_s[i] * acc_s[i]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kScores; ++i) {
    const float far = 1.0f - __fdividef(2.0f, 1.0f + ex2(acc_s[i] * kTwoLog2e));
    acc_s[i] = fabsf(acc_s[i]) <= 1.0f ? tanh_near(acc_s[i], acc_s[i] * acc_s[i]) : far;
  }
}

template <bool kIsBf16>
__device__ __forceinline__ float bias_at(const AttentionFwdParams& p, i64 at) {
  return p.bias_is_f32 ? load_element<kElementF32>(p.bias, at)
                       : load_element<kIsBf16 ? kElementBf16 : kElementF16>(p.bias, at);
}

// Keys past the end read the last key's bias; they are hidden later.
template <bool kIsBf16, int kScores>
__device__ __forceinline__ void add_bias(const AttentionFwdSm90Params& a, float (&acc_s)[kScores],
                                         const TermsOfRows& rows) {
  constexpr float kLog2e = 1.44269504088896f;
  const AttentionFwdParams& p = a.common;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const i64 line = rows.b * p.bias_stride.b + rows.head * p.bias_stride.h + rows.query[r] * p.bias_stride.i;
    if (rows.inside && a.bias_in_pairs) {
      if (p.bias_is_f32) {
        const float2* from = reinterpret_cast<const float2*>(static_cast<const float*>(p.bias) + line + rows.key);
#pragma unroll
        for (int n = 0; n < kScores / 4; ++n) {
          const float2 pair = from[n * 4];
          acc_s[4 * n + 2 * r] = fmaf(pair.x, kLog2e, acc_s[4 * n + 2 * r]);
          acc_s[4 * n + 2 * r + 1] = fmaf(pair.y, kLog2e, acc_s[4 * n + 2 * r + 1]);
        }
      } else {
        const u32* from =
            reinterpret_cast<const u32*>(static_cast<const unsigned short*>(p.bias) + line + rows.key);
#pragma unroll
        for (int n = 0; n < kScores / 4; ++n) {
          const u32 pair = from[n * 4];
          const float x = cvt_to_float<kIsBf16>(static_cast<unsigned short>(pair)),
                      y = cvt_to_float<kIsBf16>(static_cast<unsigned short>(pair >> 16));
          acc_s[4 * n + 2 * r] = fmaf(x, kLog2e, acc_s[4 * n + 2 * r]);
          acc_s[4 * n + 2 * r + 1] = fmaf(y, kLog2e, acc_s[4 * n + 2 * r + 1]);
        }
      }
      continue;
    }
#pragma unroll
    for (int n = 0; n < kScores / 4; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const i32 j = min(rows.key + n * 8 + c, rows.k_len - 1);
        acc_s[4 * n + 2 * r + c] =
            fmaf(bias_at<kIsBf16>(p, line + j * p.bias_stride.j), kLog2e, acc_s[4 * n + 2 * r + c]);
      }
  }
}

template <int kScores>
__device__ __forceinline__ void add_alibi(const AttentionFwdParams& p, float (&acc_s)[kScores],
                                          const TermsOfRows& rows) {
  constexpr float kLog2e = 1.44269504088896f;
  const float slope = -kLog2e * p.alibi_slopes[rows.b * p.alibi_stride_b + rows.head];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float distance = static_cast<float>(rows.query[r] + rows.offset - rows.key);
#pragma unroll
    for (int n = 0; n < kScores / 4; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c)
        acc_s[4 * n + 2 * r + c] =
            fmaf(slope, fabsf(distance - static_cast<float>(n * 8 + c)), acc_s[4 * n + 2 * r + c]);
  }
}

template <int kScores>
__device__ __forceinline__ void hide_elements(const AttentionFwdSm90Params& a, float (&acc_s)[kScores],
                                              const TermsOfRows& rows, float hidden) {
  const AttentionFwdParams& p = a.common;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const unsigned char* line =
        p.mask + rows.b * p.mask_stride.b + rows.head * p.mask_stride.h + rows.query[r] * p.mask_stride.i;
    if (rows.inside && a.mask_in_pairs) {
      const unsigned short* from = reinterpret_cast<const unsigned short*>(line + rows.key);
#pragma unroll
      for (int n = 0; n < kScores / 4; ++n) {
        const u32 pair = from[n * 4];
        if ((pair & 0xff) == 0) acc_s[4 * n + 2 * r] = hidden;
        if (pair >> 8 == 0) acc_s[4 * n + 2 * r + 1] = hidden;
      }
      continue;
    }
#pragma unroll
    for (int n = 0; n < kScores / 4; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const i32 j = min(rows.key + n * 8 + c, rows.k_len - 1);
        if (line[j * p.mask_stride.j] == 0) acc_s[4 * n + 2 * r + c] = hidden;
      }
  }
}

// A hidden score: times the scale it is -inf.
__device__ __forceinline__ float hidden_by(float scale_log2) {
  return __int_as_float(scale_log2 < 0.0f ? 0x7f800000 : 0xff800000);
}

// Scores of the keys from first_key on with all terms; what is still to be multiplied by is returned, so that the softmax
// does it, as it does without terms.
template <AttentionFwdSm90Variant kV>
__device__ __forceinline__ float add_terms(const AttentionFwdSm90Params& a, float (&acc_s)[Layout<kV>::kScores],
                                           u32 work, i32 first_key) {
  constexpr float kLog2e = 1.44269504088896f, kLn2 = 0.693147180559945f;
  const AttentionFwdParams& p = a.common;
  float scale_log2 = p.softmax_scale_log2;
  if (p.softcap > 0.0f) {
    take_tanh(acc_s, scale_log2 * __fdividef(kLn2, p.softcap));
    scale_log2 = p.softcap * kLog2e;
  }
  if (p.bias == nullptr && p.alibi_slopes == nullptr && p.mask == nullptr) return scale_log2;
  const TermsOfRows rows(work, first_key, kV.tile_k);
  if (p.bias != nullptr || p.alibi_slopes != nullptr) {
#pragma unroll
    for (int i = 0; i < Layout<kV>::kScores; ++i) acc_s[i] *= scale_log2;
    scale_log2 = 1.0f;
  }
  if (p.bias != nullptr) add_bias<kV.is_bf16 != 0>(a, acc_s, rows);
  if (p.alibi_slopes != nullptr) add_alibi(p, acc_s, rows);
  if (p.mask != nullptr) hide_elements(a, acc_s, rows, hidden_by(scale_log2));
  return scale_log2;
}

// Dropout on probabilities. Bit 2 n + c: eight n, key c is kept. Rolled loops: Philox is long.
template <AttentionFwdSm90Variant kV>
__device__ __forceinline__ void drop(const AttentionFwdParams& p, float (&acc_s)[Layout<kV>::kScores], u32 work,
                                     i32 first_key) {
  constexpr int kEights = Layout<kV>::kScores / 4;
  static_assert(kEights % 2 == 0 && kEights <= 16);
  const DropoutKey key(p);
  const TermsOfRows rows(work, first_key, kV.tile_k);
  const bool in_step = p.index_base[3] % 4 == 0, odd = thread_here() % 2 != 0;
  const u32 bh = dropout_head(p, rows.b, rows.head);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const u32 i = static_cast<u32>(rows.query[r] + p.index_base[2]);
    u32 kept = 0;
    if (in_step) {
#pragma unroll 1
      for (int n = 0; n < kEights; n += 2)
        kept |= kept_in_pair(p, key, static_cast<u64>(rows.key + (n + odd) * 8 + p.index_base[3]) >> 2, i, bh, odd)
                << (2 * n);
    } else {
#pragma unroll 1
      for (int n = 0; n < 2 * kEights; ++n)
        kept |= static_cast<u32>(
                    dropout_keeps(p, key, rows.b, rows.head, rows.query[r], rows.key + n / 2 * 8 + n % 2))
                << n;
    }
#pragma unroll
    for (int n = 0; n < kEights; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c)
        if ((kept >> (2 * n + c) & 1) == 0) acc_s[4 * n + 2 * r + c] = 0.0f;
  }
}

}  // namespace heed::cuda
