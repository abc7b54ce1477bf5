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

  // `work`: where the producer left what the rows are.
  __device__ __forceinline__ TermsOfRows(u32 work, i32 first_key) {
    const auto word = [work](int i) { return static_cast<i32>(load_shared(work + 4 * i)); };
    const int thread = thread_here();  // keeps all of this out of the loop's registers
    const i32 row = word(0) + thread / 32 * 16 + thread % 32 / 4;
    const i32 q_len = word(4);
    head = word(1), b = word(2), k_len = word(5), offset = word(10);
    query[0] = min(row, q_len - 1), query[1] = min(row + 8, q_len - 1);
    key = first_key + thread % 4 * 2;
  }
};

// s in, cap tanh(scale s / cap) in units of log2 out, within 2^-22 of the value: near 0 by a polynomial, beyond by the
// exponential. Scores that far are rare: a warp that has none takes the polynomial alone, on a unit that has room.
template <int kScores>
__device__ __forceinline__ void take_tanh(const AttentionFwdSm90Params& a, float (&acc_s)[kScores]) {
  constexpr float kTwoLog2e = 2.88539008177793f, kLog2e = 1.44269504088896f, kLn2 = 0.693147180559945f;
  constexpr int kChains = 4;  // one would be as long as the tile
  float largest[kChains] = {};
#pragma unroll
  for (int i = 0; i < kScores; ++i) largest[i % kChains] = fmaxf(largest[i % kChains], fabsf(acc_s[i]));
  const float most = fmaxf(fmaxf(largest[0], largest[1]), fmaxf(largest[2], largest[3]));
  if (__all_sync(0xffffffffu, most <= a.near_limit)) {
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      const float s2 = acc_s[i] * acc_s[i];
      acc_s[i] *= fmaf(fmaf(fmaf(fmaf(a.near[4], s2, a.near[3]), s2, a.near[2]), s2, a.near[1]), s2, a.near[0]);
    }
    return;
  }
  const float cap = a.common.softcap * kLog2e;
  const float to_caps = a.common.softmax_scale_log2 * __fdividef(kLn2, a.common.softcap);
#pragma unroll
  for (int i = 0; i < kScores; ++i) {
    const float y = acc_s[i] * to_caps, y2 = y * y;
    float sum = kNearTanh[4];
#pragma unroll
    for (int power = 3; power >= 0; --power) sum = fmaf(sum, y2, kNearTanh[power]);
    const float far = 1.0f - __fdividef(2.0f, 1.0f + ex2(y * kTwoLog2e));
    acc_s[i] = cap * (fabsf(y) <= kNearTanhLimit ? y * sum : far);
  }
}

template <bool kIsBf16>
__device__ __forceinline__ float bias_at(const AttentionFwdParams& p, i64 at) {
  return p.bias_is_f32 ? load_element<kElementF32>(p.bias, at)
                       : load_element<kIsBf16 ? kElementBf16 : kElementF16>(p.bias, at);
}

// Where this thread's two rows of bias and mask begin.
struct TermLines {
  i64 bias[2];
  u32 mask[2];  // words; memory has room for no more
  i32 k_len;

  __device__ __forceinline__ TermLines(const AttentionFwdSm90Params& a, u32 work) {
    const AttentionFwdParams& p = a.common;
    const TermsOfRows rows(work, 0);
    k_len = rows.k_len;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      bias[r] = rows.b * p.bias_stride.b + rows.head * p.bias_stride.h + rows.query[r] * p.bias_stride.i;
      mask[r] = static_cast<u32>(rows.b * a.mask_bits_b + rows.head * a.mask_bits_h +
                                 static_cast<i64>(rows.query[r]) * a.mask_bits_i);
    }
  }
};

// Bits of the mask and, where 16-bit elements lie in pairs, the bias of a tile of keys: asked for while its scores are being
// multiplied where there are registers for that, else when they are used.
template <AttentionFwdSm90Variant kV>
struct TermTile {
  static constexpr int kScores = Layout<kV>::kScores, kPairs = kScores / 2, kWords = kV.tile_k / 32;
  static_assert(kV.tile_k % 32 == 0);
  bool in_pairs = false;
  u32 bias[kPairs], bits[2][kWords];  // pair i = 2 n8 + r is of registers 2 i and 2 i + 1

  __device__ __forceinline__ void load_bits(const AttentionFwdSm90Params& a, const TermLines& lines, i32 n) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const u32* from = a.mask_bits + lines.mask[r] + static_cast<u32>(n) * static_cast<u32>(a.mask_bits_tile);
      if constexpr (kWords == 2) {
        const uint2 pair = *reinterpret_cast<const uint2*>(from);
        bits[r][0] = pair.x, bits[r][1] = pair.y;
      } else {
#pragma unroll
        for (int i = 0; i < kWords; ++i) bits[r][i] = from[i];
      }
    }
  }
  __device__ __forceinline__ void load_bias(const AttentionFwdSm90Params& a, const TermLines& lines, i32 n) {
    in_pairs = a.bias_in_pairs && !a.common.bias_is_f32 && (n + 1) * kV.tile_k <= lines.k_len;
    if (!in_pairs) return;
    const int key = n * kV.tile_k + thread_here() % 4 * 2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const u32* from =
          reinterpret_cast<const u32*>(static_cast<const unsigned short*>(a.common.bias) + lines.bias[r] + key);
#pragma unroll
      for (int n8 = 0; n8 < kScores / 4; ++n8) bias[2 * n8 + r] = from[n8 * 4];
    }
  }

  static __device__ __forceinline__ void add_pair(float (&acc_s)[kScores], int i, u32 pair) {
    constexpr float kLog2e = 1.44269504088896f;
    acc_s[2 * i] = fmaf(cvt_to_float<kV.is_bf16>(static_cast<unsigned short>(pair)), kLog2e, acc_s[2 * i]);
    acc_s[2 * i + 1] =
        fmaf(cvt_to_float<kV.is_bf16>(static_cast<unsigned short>(pair >> 16)), kLog2e, acc_s[2 * i + 1]);
  }

  // Scores in units of log2 in and out. Keys past the end read the last key's bias; they are hidden later.
  __device__ __forceinline__ void add_bias(const AttentionFwdSm90Params& a, const TermLines& lines,
                                           float (&acc_s)[kScores], i32 n) const {
    constexpr float kLog2e = 1.44269504088896f;
    const AttentionFwdParams& p = a.common;
    if (in_pairs) {
#pragma unroll
      for (int i = 0; i < kPairs; ++i) add_pair(acc_s, i, bias[i]);
      return;
    }
    const int key = n * kV.tile_k + thread_here() % 4 * 2;
    const bool pairs = a.bias_in_pairs && (n + 1) * kV.tile_k <= lines.k_len;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (pairs && !p.bias_is_f32) {  // not asked for ahead
        const u32* from =
            reinterpret_cast<const u32*>(static_cast<const unsigned short*>(p.bias) + lines.bias[r] + key);
#pragma unroll
        for (int n8 = 0; n8 < kScores / 4; ++n8) add_pair(acc_s, 2 * n8 + r, from[n8 * 4]);
        continue;
      }
      if (pairs) {
        const float2* from = reinterpret_cast<const float2*>(static_cast<const float*>(p.bias) + lines.bias[r] + key);
#pragma unroll
        for (int n8 = 0; n8 < kScores / 4; ++n8) {
          const float2 pair = from[n8 * 4];
          acc_s[4 * n8 + 2 * r] = fmaf(pair.x, kLog2e, acc_s[4 * n8 + 2 * r]);
          acc_s[4 * n8 + 2 * r + 1] = fmaf(pair.y, kLog2e, acc_s[4 * n8 + 2 * r + 1]);
        }
        continue;
      }
#pragma unroll
      for (int n8 = 0; n8 < kScores / 4; ++n8)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const i32 j = min(key + n8 * 8 + c, lines.k_len - 1);
          acc_s[4 * n8 + 2 * r + c] = fmaf(bias_at<kV.is_bf16 != 0>(p, lines.bias[r] + j * p.bias_stride.j), kLog2e,
                                           acc_s[4 * n8 + 2 * r + c]);
        }
    }
  }

  __device__ __forceinline__ void hide(float (&acc_s)[kScores], float hidden) const {
    const int first = thread_here() % 4 * 2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      u32 mine[kWords];  // this thread's first key at bit 0
#pragma unroll
      for (int i = 0; i < kWords; ++i) mine[i] = bits[r][i] >> first;
#pragma unroll
      for (int n8 = 0; n8 < kScores / 4; ++n8)
#pragma unroll
        for (int c = 0; c < 2; ++c)
          if ((mine[n8 / 4] & 1u << (n8 % 4 * 8 + c)) == 0) acc_s[4 * n8 + 2 * r + c] = hidden;
    }
  }
};

// The tile that is asked for ahead, if there is one.
template <AttentionFwdSm90Variant kV, bool kAhead>
struct TermsAhead {
  __device__ __forceinline__ TermsAhead(const AttentionFwdSm90Params&, u32) {}
  __device__ __forceinline__ void ask(const AttentionFwdSm90Params&, i32) {}
  __device__ __forceinline__ void add_bias(const AttentionFwdSm90Params& a, float (&acc_s)[Layout<kV>::kScores],
                                           u32 work, i32 n) const {
    TermTile<kV>().add_bias(a, TermLines(a, work), acc_s, n);
  }
  __device__ __forceinline__ void hide(const AttentionFwdSm90Params& a, float (&acc_s)[Layout<kV>::kScores], u32 work,
                                       i32 n, float hidden) const {
    TermTile<kV> tile;
    tile.load_bits(a, TermLines(a, work), n);
    tile.hide(acc_s, hidden);
  }
};
template <AttentionFwdSm90Variant kV>
struct TermsAhead<kV, true> {
  const TermLines lines;
  TermTile<kV> tile;
  __device__ __forceinline__ TermsAhead(const AttentionFwdSm90Params& a, u32 work) : lines(a, work) {}
  __device__ __forceinline__ void ask(const AttentionFwdSm90Params& a, i32 n) {
    if (a.common.mask != nullptr) tile.load_bits(a, lines, n);
    if (a.common.bias != nullptr) tile.load_bias(a, lines, n);
  }
  __device__ __forceinline__ void add_bias(const AttentionFwdSm90Params& a, float (&acc_s)[Layout<kV>::kScores], u32,
                                           i32 n) const {
    tile.add_bias(a, lines, acc_s, n);
  }
  __device__ __forceinline__ void hide(const AttentionFwdSm90Params&, float (&acc_s)[Layout<kV>::kScores], u32, i32,
                                       float hidden) const {
    tile.hide(acc_s, hidden);
  }
};
template <AttentionFwdSm90Variant kV>
using TermsOf = TermsAhead<kV, kV.consumers <= 2 && kV.head_dim_v <= 128>;

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

// A hidden score: times the scale it is -inf.
__device__ __forceinline__ float hidden_by(float scale_log2) {
  return __int_as_float(scale_log2 < 0.0f ? 0x7f800000 : 0xff800000);
}

// Scores of key tile n with all terms; what is still to be multiplied by is returned, so that the softmax does it, as it does
// without terms.
template <AttentionFwdSm90Variant kV>
__device__ __forceinline__ float add_terms(const AttentionFwdSm90Params& a, float (&acc_s)[Layout<kV>::kScores],
                                           const TermsOf<kV>& terms, u32 work, i32 n) {
  const AttentionFwdParams& p = a.common;
  float scale_log2 = p.softmax_scale_log2;
  if (p.softcap > 0.0f) {
    take_tanh(a, acc_s);
    scale_log2 = 1.0f;
  }
  if (p.bias != nullptr || p.alibi_slopes != nullptr) {
    if (p.softcap == 0.0f) {
#pragma unroll
      for (int i = 0; i < Layout<kV>::kScores; ++i) acc_s[i] *= scale_log2;
      scale_log2 = 1.0f;
    }
    if (p.bias != nullptr) terms.add_bias(a, acc_s, work, n);
    if (p.alibi_slopes != nullptr) add_alibi(p, acc_s, TermsOfRows(work, n * kV.tile_k));
  }
  if (p.mask != nullptr) terms.hide(a, acc_s, work, n, hidden_by(scale_log2));
  return scale_log2;
}

// Dropout on probabilities. Bit 2 n + c: eight n, key c is kept. Loops rolled, or nearly: Philox is long, and two at a time
// hide each other's latency (7 % faster).
template <AttentionFwdSm90Variant kV>
__device__ __forceinline__ void drop(const AttentionFwdParams& p, float (&acc_s)[Layout<kV>::kScores], u32 work,
                                     i32 first_key) {
  constexpr int kEights = Layout<kV>::kScores / 4;
  static_assert(kEights % 2 == 0 && kEights <= 16);
  const DropoutKey key(p);
  const TermsOfRows rows(work, first_key);
  const bool in_step = p.index_base[3] % 4 == 0, odd = thread_here() % 2 != 0;
  const u32 bh = dropout_head(p, rows.b, rows.head);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const u32 i = static_cast<u32>(rows.query[r] + p.index_base[2]);
    u32 kept = 0;
    if (in_step) {
#pragma unroll 2
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
