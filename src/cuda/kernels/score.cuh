// What happens to a score between Q K^T and the exponential: softcap, bias, ALiBi, masks; and dropout after it.
#pragma once

#include "params.h"
#include "ptx.cuh"
#include "rows.cuh"

namespace heed::cuda {

// Philox4x32-10 (Salmon et al., SC 2011).
__device__ __forceinline__ void philox(u32 (&c)[4], u32 k0, u32 k1) {
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const u32 hi0 = __umulhi(0xD2511F53u, c[0]), lo0 = 0xD2511F53u * c[0];
    const u32 hi1 = __umulhi(0xCD9E8D57u, c[2]), lo1 = 0xCD9E8D57u * c[2];
    c[0] = hi1 ^ c[1] ^ k0;
    c[1] = lo1;
    c[2] = hi0 ^ c[3] ^ k1;
    c[3] = lo0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// Dropout's words of one run.
struct DropoutKey {
  u32 k0, k1, offset;
  __device__ __forceinline__ explicit DropoutKey(const AttentionFwdParams& p) {
    const u64 seed = p.dropout_seed_ptr != nullptr ? *p.dropout_seed_ptr : p.dropout_seed;
    const u64 position = p.dropout_offset_ptr != nullptr ? *p.dropout_offset_ptr : p.dropout_offset;
    k0 = static_cast<u32>(seed);
    k1 = static_cast<u32>(seed >> 32) ^ static_cast<u32>(position >> 32);
    offset = static_cast<u32>(position);
  }
  // The Philox block of keys 4 * quad .. + 3 of a query; b, h, i with index_base added.
  __device__ __forceinline__ void words(u32 (&w)[4], u64 quad, u32 i, u32 bh) const {
    w[0] = static_cast<u32>(quad), w[1] = i, w[2] = bh, w[3] = offset;
    philox(w, k0, k1);
  }
};

__device__ __forceinline__ u32 dropout_head(const AttentionFwdParams& p, i32 b, i32 head) {
  return static_cast<u32>((b + p.index_base[0]) * p.nheads_q + head + p.index_base[1]);
}

// Whether dropout keeps key j of query i: word j mod 4 of the Philox block of (j / 4, i, b h) is below the threshold.
__device__ __forceinline__ bool dropout_keeps(const AttentionFwdParams& p, const DropoutKey& key, i32 b, i32 head,
                                              i32 i, i32 j) {
  const i64 column = j + p.index_base[3];
  u32 words[4];
  key.words(words, static_cast<u64>(column >> 2), static_cast<u32>(i + p.index_base[2]), dropout_head(p, b, head));
  const u32 word = column & 2 ? (column & 1 ? words[3] : words[2]) : (column & 1 ? words[1] : words[0]);
  return word < p.dropout_threshold;
}

// Which of this lane's keys dropout keeps in two neighbouring eights of keys, from the first lane's on: bits 0 and 1 of the
// first, 2 and 3 of the second. A Philox block has the words of four keys: of lanes t and t ^ 1 here, so each draws that of
// one of the eights (`quad`: its own one's, of the second where the lane is odd) and they swap halves.
__device__ __forceinline__ u32 kept_in_pair(const AttentionFwdParams& p, const DropoutKey& key, u64 quad, u32 i, u32 bh,
                                            bool odd) {
  u32 word[4];
  key.words(word, quad, i, bh);
  const u32 give0 = odd ? word[0] : word[2], give1 = odd ? word[1] : word[3];
  const u32 keep0 = odd ? word[2] : word[0], keep1 = odd ? word[3] : word[1];
  const u32 got0 = __shfl_xor_sync(0xffffffffu, give0, 1), got1 = __shfl_xor_sync(0xffffffffu, give1, 1);
  const u32 mine = (keep0 < p.dropout_threshold) | (keep1 < p.dropout_threshold) << 1;
  const u32 theirs = (got0 < p.dropout_threshold) | (got1 < p.dropout_threshold) << 1;
  return odd ? theirs | mine << 2 : mine | theirs << 2;
}

template <int kElement>
__device__ __forceinline__ float load_element(const void* base, i64 at) {
  if constexpr (kElement == kElementF32)
    return static_cast<const float*>(base)[at];
  else
    return cvt_to_float<kElement == kElementBf16>(static_cast<const unsigned short*>(base)[at]);
}

// cap tanh(x / cap) for x in units of log2. tanh y = 1 - 2 / (1 + e^2y), which near 0 keeps cap 2^-23 of error and no
// more; there the series, whose first term left out is below 2^-24 of the sum at 0.3.
__device__ __forceinline__ float capped(float x, float cap) {
  constexpr float kLog2e = 1.44269504088896f, kLn2 = 0.693147180559945f;
  const float y = x * (kLn2 / cap), y2 = y * y;
  float series = fmaf(y2, 62.0f / 2835.0f, -17.0f / 315.0f);
  series = fmaf(y2, fmaf(y2, fmaf(y2, series, 2.0f / 15.0f), -1.0f / 3.0f), 1.0f);
  const float far = cap * kLog2e * (1.0f - __fdividef(2.0f, 1.0f + ex2(x * (2.0f / cap))));
  return fabsf(y) < 0.3f ? x * series : far;
}

// From here on a maximum, times log2 e and rounded, may be so far from what it stands for that P shows it.
constexpr float kLargeScore = 1048576.0f;

// From here on the error of the exponential's form, cap 2^-22, shows beside that of P in 16 bits.
constexpr float kLargeCap = 256.0f;

// One score with every term but the interval of visible keys, in units of log2; -inf where the mask tensor hides the key.
// For key j < k_len and query < q_len.
template <int kElement>
__device__ __forceinline__ float score_of(const AttentionFwdParams& p, i32 b, float dot, i32 query, i32 head, i32 j,
                                          i64 offset) {
  constexpr float kLog2e = 1.44269504088896f;
  if (p.mask != nullptr &&
      p.mask[b * p.mask_stride.b + head * p.mask_stride.h + query * p.mask_stride.i + j * p.mask_stride.j] == 0)
    return -__int_as_float(0x7f800000);
  float x = __fmul_rn(dot, p.softmax_scale_log2);  // one number, in the maximum and in the exponent
  if (p.softcap > 0.0f) x = capped(x, p.softcap);
  if (p.bias != nullptr) {
    const i64 at = b * p.bias_stride.b + head * p.bias_stride.h + query * p.bias_stride.i + j * p.bias_stride.j;
    x = fmaf(p.bias_is_f32 ? static_cast<const float*>(p.bias)[at] : load_element<kElement>(p.bias, at), kLog2e, x);
  }
  if (p.alibi_slopes != nullptr)
    x -= p.alibi_slopes[b * p.alibi_stride_b + head] * kLog2e * fabsf(static_cast<float>(query + offset - j));
  return x;
}

// The scale that variants without terms multiply by: a hidden score times it must be -inf, so 0 becomes the least number
// above it.
__device__ __forceinline__ float plain_scale(const AttentionFwdParams& p) {
  return p.softmax_scale_log2 == 0.0f ? __int_as_float(1) : p.softmax_scale_log2;
}

// This thread's view: rows g, g + 8 of each row tile; columns 2t, 2t + 1 of each key tile (g = lane / 4, t = lane % 4).
// Each term is a pass of its own over the scores, so that only the passes asked for are run.
template <AttentionFwdVariant kV>
struct ScoreTerms {
  static constexpr int kRowTiles = kV.tile_q / (kV.warps * 16), kKeyTiles = kV.tile_k / 8;
  const AttentionFwdParams& p;
  const BlockWork& w;
  const RowMap& rows;
  int row_base, lane;
  i32 row_lo, row_hi;  // keys that row `lane` of this warp sees: worked out once, by one lane a row
  i32 some_lo, some_hi;  // keys outside are hidden from every row of this warp
  i32 full_lo, full_hi;  // keys that every row of this warp sees

  __device__ __forceinline__ ScoreTerms(const AttentionFwdParams& params, const BlockWork& work, const RowMap& map,
                                        int warp, int l)
      : p(params),
        w(work),
        rows(map),
        row_base(warp * kRowTiles * 16 + l / 4),
        lane(l),
        row_lo(0),
        row_hi(work.k_len),
        some_lo(0),
        some_hi(work.k_len),
        full_lo(0),
        full_hi(work.k_len) {
    static_assert(kRowTiles <= 2);
    if constexpr (kV.mask != kMaskNone) {
      const i32 query = min(rows.query(warp * kRowTiles * 16 + lane % (kRowTiles * 16)), max(0, w.q_len - 1));
      const KeyRange range = visible_keys(p, w.k_len, query + w.offset);
      row_lo = static_cast<i32>(range.lo), row_hi = static_cast<i32>(range.hi);
      some_lo = __reduce_min_sync(0xffffffffu, row_lo), full_hi = __reduce_min_sync(0xffffffffu, row_hi);
      full_lo = __reduce_max_sync(0xffffffffu, row_lo), some_hi = __reduce_max_sync(0xffffffffu, row_hi);
    }
  }

  // Whether some row of this warp may see a key of the tile.
  __device__ __forceinline__ bool meets(int tile) const {
    return kV.mask == kMaskNone || (tile * kV.tile_k < some_hi && (tile + 1) * kV.tile_k > some_lo);
  }

  // Scores in, scores with every term out; in units of log2 where the variant is modified. True where a key of the tile may
  // be hidden from a row.
  __device__ __forceinline__ bool apply(float (&acc_s)[kRowTiles][kKeyTiles][4], int tile) const {
    const i32 j0 = tile * kV.tile_k + lane % 4 * 2;
    if constexpr (kV.modified) add_terms(acc_s, j0), hide_elements(acc_s, j0);
    const bool partial = tile * kV.tile_k < full_lo || (tile + 1) * kV.tile_k > full_hi;
    if (partial) hide_outside(acc_s, j0);
    return partial || (kV.modified && p.mask != nullptr);
  }

  __device__ __forceinline__ void hide_outside(float (&acc_s)[kRowTiles][kKeyTiles][4], i32 j0) const {
    const float hidden = hidden_score();
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        i32 lo = 0, hi = w.k_len - j0;
        if constexpr (kV.mask != kMaskNone) {
          lo = __shfl_sync(0xffffffffu, row_lo, m * 16 + r * 8 + lane / 4) - j0;
          hi = __shfl_sync(0xffffffffu, row_hi, m * 16 + r * 8 + lane / 4) - j0;
        }
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
          for (int c = 0; c < 2; ++c)
            if ((kV.mask != kMaskNone && n * 8 + c < lo) || n * 8 + c >= hi) acc_s[m][n][2 * r + c] = hidden;
      }
  }

  // A hidden score: after multiplication by the scale it must be -inf, whatever the scale's sign.
  __device__ __forceinline__ float hidden_score() const {
    const float kInf = __int_as_float(0x7f800000);
    return !kV.modified && p.softmax_scale_log2 < 0.0f ? kInf : -kInf;
  }

  __device__ __forceinline__ void add_terms(float (&acc_s)[kRowTiles][kKeyTiles][4], i32 j0) const {
    constexpr float kLog2e = 1.44269504088896f;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) acc_s[m][n][e] = __fmul_rn(acc_s[m][n][e], p.softmax_scale_log2);
    if (p.softcap > kLargeCap) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) acc_s[m][n][e] = capped(acc_s[m][n][e], p.softcap);
    } else if (p.softcap > 0.0f) {
      const float slope = 2.0f / p.softcap, cap = p.softcap * kLog2e;
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            acc_s[m][n][e] = fmaf(-2.0f * cap, __fdividef(1.0f, 1.0f + ex2(acc_s[m][n][e] * slope)), cap);
    }
    if (p.bias != nullptr) {
      if (p.bias_is_f32)
        add_bias<kElementF32>(acc_s, j0);
      else
        add_bias<kV.is_bf16 ? kElementBf16 : kElementF16>(acc_s, j0);
    }
    if (p.alibi_slopes != nullptr) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const i32 row = row_base + m * 16 + r * 8;
          const float slope = -kLog2e * p.alibi_slopes[w.b * p.alibi_stride_b + rows.head(row)];
          const i64 distance = rows.query(row) + w.offset - j0;
#pragma unroll
          for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
            for (int c = 0; c < 2; ++c)
              acc_s[m][n][2 * r + c] =
                  fmaf(slope, fabsf(static_cast<float>(distance - (n * 8 + c))), acc_s[m][n][2 * r + c]);
        }
    }
  }

  // Keys past the end read the last key's bias; they are hidden later.
  template <int kElement>
  __device__ __forceinline__ void add_bias(float (&acc_s)[kRowTiles][kKeyTiles][4], i32 j0) const {
    constexpr float kLog2e = 1.44269504088896f;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const i32 row = row_base + m * 16 + r * 8, query = min(rows.query(row), w.q_len - 1);
        const i64 line = w.b * p.bias_stride.b + rows.head(row) * p.bias_stride.h + query * p.bias_stride.i;
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const i32 j = min(j0 + n * 8 + c, w.k_len - 1);
            acc_s[m][n][2 * r + c] =
                fmaf(load_element<kElement>(p.bias, line + j * p.bias_stride.j), kLog2e, acc_s[m][n][2 * r + c]);
          }
      }
  }

  __device__ __forceinline__ void hide_elements(float (&acc_s)[kRowTiles][kKeyTiles][4], i32 j0) const {
    if (p.mask == nullptr) return;
    const float hidden = hidden_score();
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const i32 row = row_base + m * 16 + r * 8, query = min(rows.query(row), w.q_len - 1);
        const unsigned char* line =
            p.mask + w.b * p.mask_stride.b + rows.head(row) * p.mask_stride.h + query * p.mask_stride.i;
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const i32 j = min(j0 + n * 8 + c, w.k_len - 1);
            if (line[j * p.mask_stride.j] == 0) acc_s[m][n][2 * r + c] = hidden;
          }
      }
  }

  // Dropout on probabilities. Bit 2 n + c: key tile n, column c is kept. Rolled loops: Philox is long.
  __device__ __forceinline__ void drop(float (&acc_s)[kRowTiles][kKeyTiles][4], int tile) const {
    if (!p.dropout_on) return;
    const DropoutKey key(p);
    const i32 j0 = tile * kV.tile_k + lane % 4 * 2;
    const bool in_step = p.index_base[3] % 4 == 0, odd = lane % 2 != 0;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      u32 bits[2] = {0, 0};
#pragma unroll 1
      for (int r = 0; r < 2; ++r) {
        const i32 row = row_base + m * 16 + r * 8, query = rows.query(row), head = rows.head(row);
        const u32 i = static_cast<u32>(query + p.index_base[2]), bh = dropout_head(p, w.b, head);
        u32 kept = 0;
        if (in_step) {
#pragma unroll 1
          for (int n = 0; n < kKeyTiles; n += 2)
            kept |= kept_in_pair(p, key, static_cast<u64>(j0 + (n + odd) * 8 + p.index_base[3]) >> 2, i, bh, odd)
                    << (2 * n);
        } else {
#pragma unroll 1
          for (int n = 0; n < 2 * kKeyTiles; ++n)
            kept |= static_cast<u32>(dropout_keeps(p, key, w.b, head, query, j0 + n / 2 * 8 + n % 2)) << n;
        }
        if (r == 0)
          bits[0] = kept;
        else
          bits[1] = kept;
      }
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
          for (int c = 0; c < 2; ++c)
            if ((bits[r] >> (2 * n + c) & 1) == 0) acc_s[m][n][2 * r + c] = 0.0f;
    }
  }
};

}  // namespace heed::cuda
