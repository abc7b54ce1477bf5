#include "cpu/attention_fwd_bf16.h"

#if defined(__x86_64__) && (defined(__clang__) || defined(__GNUC__))
#define HEED_HAVE_BF16_TILES 1
#include <immintrin.h>
#endif

#include <cstring>

namespace heed::cpu {

#if HEED_HAVE_BF16_TILES
namespace {

// Compiled for these instructions whatever the rest of the library is compiled for; called only where the CPU has them.
#define HEED_BF16_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))

constexpr int kLaneWords = 64;  // words between rows of Q^T and P^T pairs, floats between rows of S^T and O^T
constexpr int kTileRows = 6;

// The two instructions of AVX512_BF16 themselves: clang 16 crashes on their intrinsics in a function with a target of
// its own.
HEED_BF16_TARGET inline __m512 dot(__m512 sum, __m512i a, __m512i b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}

HEED_BF16_TARGET inline __m512i narrow(__m512 high, __m512 low) {  // 32 bf16: those of low, then those of high
  __m512i both;
  asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(both) : "v"(high), "v"(low));
  return both;
}

HEED_BF16_TARGET inline __m512i broadcast(const void* pair) {
  int32_t word;
  std::memcpy(&word, pair, sizeof word);
  return _mm512_set1_epi32(word);
}

// Numbers but 0 below the magnitude whose bits are `bound`, among 32.
HEED_BF16_TARGET inline __mmask32 smaller_than(__m512i x, uint16_t bound) {
  const __m512i magnitude = _mm512_and_si512(x, _mm512_set1_epi16(0x7fff));
  return _mm512_cmplt_epu16_mask(_mm512_sub_epi16(magnitude, _mm512_set1_epi16(1)),
                                 _mm512_set1_epi16(static_cast<int16_t>(bound - 1)));  // 0 wraps round to the largest
}
constexpr uint16_t kSmallestNormal = 1 << 7;          // 2^-126
constexpr uint16_t kSmallestValue = (127 - 80) << 7;  // 2^-80

HEED_BF16_TARGET bool copy_keys(const uint16_t* src, int64_t count, uint16_t* dst) {
  __mmask32 small = 0;
  for (int64_t i = 0; i < count; i += 32) {
    const __mmask32 part = count - i >= 32 ? ~__mmask32{0} : (__mmask32{1} << (count - i)) - 1;
    const __m512i x = _mm512_maskz_loadu_epi16(part, src + i);
    small |= smaller_than(x, kSmallestNormal);
    _mm512_mask_storeu_epi16(dst + i, part, x);
  }
  return small == 0;
}

HEED_BF16_TARGET bool pack_queries(const uint16_t* const rows[16], int64_t head_dim, uint32_t* dst) {
  __mmask32 small = 0;
  for (int r = 0; r < 16; ++r) {
    for (int64_t i = 0; i < head_dim; i += 32) {
      const __mmask32 part = head_dim - i >= 32 ? ~__mmask32{0} : (__mmask32{1} << (head_dim - i)) - 1;
      small |= smaller_than(_mm512_maskz_loadu_epi16(part, rows[r] + i), kSmallestNormal);
    }
  }
  for (int r = 0; r < 16; r += 4) {
    int64_t i = 0;
    for (; i + 8 <= head_dim; i += 8) {  // 4 rows x 4 pairs
      const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[r] + i));
      const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[r + 1] + i));
      const __m128i c = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[r + 2] + i));
      const __m128i d = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[r + 3] + i));
      const __m128i ab = _mm_unpacklo_epi32(a, b), cd = _mm_unpacklo_epi32(c, d);
      const __m128i ab2 = _mm_unpackhi_epi32(a, b), cd2 = _mm_unpackhi_epi32(c, d);
      __m128i* out = reinterpret_cast<__m128i*>(dst + i / 2 * kLaneWords + r);
      _mm_storeu_si128(out, _mm_unpacklo_epi64(ab, cd));
      _mm_storeu_si128(out + kLaneWords / 4, _mm_unpackhi_epi64(ab, cd));
      _mm_storeu_si128(out + kLaneWords / 2, _mm_unpacklo_epi64(ab2, cd2));
      _mm_storeu_si128(out + kLaneWords / 4 * 3, _mm_unpackhi_epi64(ab2, cd2));
    }
    for (; i < head_dim; i += 2)
      for (int t = 0; t < 4; ++t) std::memcpy(dst + i / 2 * kLaneWords + r + t, rows[r + t] + i, sizeof(uint32_t));
  }
  return small == 0;
}

HEED_BF16_TARGET bool pack_values(const uint16_t* row0, const uint16_t* row1, int64_t head_dim_v, uint32_t* dst) {
  __mmask32 small = 0;
  for (int64_t i = 0; i < head_dim_v; i += 16) {
    const __mmask16 part = head_dim_v - i >= 16 ? ~__mmask16{0} : static_cast<__mmask16>((1u << (head_dim_v - i)) - 1);
    const __m512i low = _mm512_maskz_cvtepu16_epi32(part, _mm256_maskz_loadu_epi16(part, row0 + i));
    const __m512i high = row1 == nullptr ? _mm512_setzero_si512()
                                         : _mm512_maskz_cvtepu16_epi32(part, _mm256_maskz_loadu_epi16(part, row1 + i));
    const __m512i pairs = _mm512_or_si512(low, _mm512_maskz_slli_epi32(part, high, 16));
    small |= smaller_than(pairs, kSmallestValue);
    _mm512_mask_storeu_epi32(dst + i, part, pairs);
  }
  return small == 0;
}

// 16 rows of 16 words, turned in place. (Masks of ones: g++ 12 takes the plain forms' own code for a use of undefined
// values.)
HEED_BF16_TARGET inline void transpose_words(__m512i x[16]) {
  constexpr __mmask8 kAll = 0xff;
  constexpr __mmask16 kAllWords = 0xffff;
  __m512i t[16];
  for (int r = 0; r < 16; r += 4) {  // t[r + j]: in 128-bit block i, column 4i + j of rows r to r + 3
    const __m512i a = _mm512_maskz_unpacklo_epi32(kAllWords, x[r], x[r + 1]);
    const __m512i b = _mm512_maskz_unpackhi_epi32(kAllWords, x[r], x[r + 1]);
    const __m512i c = _mm512_maskz_unpacklo_epi32(kAllWords, x[r + 2], x[r + 3]);
    const __m512i d = _mm512_maskz_unpackhi_epi32(kAllWords, x[r + 2], x[r + 3]);
    t[r] = _mm512_maskz_unpacklo_epi64(kAll, a, c);
    t[r + 1] = _mm512_maskz_unpackhi_epi64(kAll, a, c);
    t[r + 2] = _mm512_maskz_unpacklo_epi64(kAll, b, d);
    t[r + 3] = _mm512_maskz_unpackhi_epi64(kAll, b, d);
  }
  for (int j = 0; j < 4; ++j) {
    const __m512i even0 = _mm512_maskz_shuffle_i32x4(kAllWords, t[j], t[4 + j], 0x88);
    const __m512i odd0 = _mm512_maskz_shuffle_i32x4(kAllWords, t[j], t[4 + j], 0xdd);
    const __m512i even1 = _mm512_maskz_shuffle_i32x4(kAllWords, t[8 + j], t[12 + j], 0x88);
    const __m512i odd1 = _mm512_maskz_shuffle_i32x4(kAllWords, t[8 + j], t[12 + j], 0xdd);
    x[j] = _mm512_maskz_shuffle_i32x4(kAllWords, even0, even1, 0x88);
    x[4 + j] = _mm512_maskz_shuffle_i32x4(kAllWords, odd0, odd1, 0x88);
    x[8 + j] = _mm512_maskz_shuffle_i32x4(kAllWords, even0, even1, 0xdd);
    x[12 + j] = _mm512_maskz_shuffle_i32x4(kAllWords, odd0, odd1, 0xdd);
  }
}

HEED_BF16_TARGET bool transpose_values(const uint16_t* const rows[32], int64_t head_dim_v, uint16_t* dst,
                                       ptrdiff_t dst_stride) {
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                              6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  __mmask32 small = 0;
  for (int64_t i = 0; i < head_dim_v; i += 16) {
    const __mmask16 part = head_dim_v - i >= 16 ? ~__mmask16{0} : static_cast<__mmask16>((1u << (head_dim_v - i)) - 1);
    const auto row = [&](int r) HEED_BF16_TARGET {
      return rows[r] == nullptr ? _mm256_setzero_si256() : _mm256_maskz_loadu_epi16(part, rows[r] + i);
    };
    __m512i pairs[16];  // word n of pairs[k]: rows 2k and 2k + 1 at i + n
    for (int k = 0; k < 16; ++k) {
      const __m512i two = _mm512_maskz_inserti64x4(0xff, _mm512_castsi256_si512(row(2 * k)), row(2 * k + 1), 1);
      small |= smaller_than(two, kSmallestValue);
      pairs[k] = _mm512_permutexvar_epi16(interleave, two);
    }
    transpose_words(pairs);
    for (int k = 0; k < 16; ++k) _mm512_storeu_si512(dst + (i + k) * dst_stride, pairs[k]);
  }
  return small == 0;
}

HEED_BF16_TARGET void pack_probabilities(const float* p, int32_t begin, int32_t end, int32_t vector, uint32_t* dst) {
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                              6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  p += vector * 16;
  dst += vector * 16;
  for (int32_t key = begin & ~1; key < end; key += 2) {
    const __m512 low = key >= begin ? _mm512_loadu_ps(p + key * kLaneWords) : _mm512_setzero_ps();
    const __m512 high = key + 1 < end ? _mm512_loadu_ps(p + (key + 1) * kLaneWords) : _mm512_setzero_ps();
    _mm512_storeu_si512(dst + key / 2 * kLaneWords, _mm512_permutexvar_epi16(interleave, narrow(high, low)));
  }
}

template <int kRows, int kVectors>
HEED_BF16_TARGET void keys_tile(int64_t num_pairs, const uint16_t* k, ptrdiff_t k_stride, const uint32_t* q, float* s) {
  __m512 acc[kRows][kVectors];
  for (int m = 0; m < kRows; ++m)
    for (int v = 0; v < kVectors; ++v) acc[m][v] = _mm512_setzero_ps();
  for (int64_t i = 0; i < num_pairs; ++i, k += 2, q += kLaneWords) {
    __m512i lanes[kVectors];
    for (int v = 0; v < kVectors; ++v) lanes[v] = _mm512_loadu_si512(q + v * 16);
    for (int m = 0; m < kRows; ++m) {
      const __m512i pair = broadcast(k + m * k_stride);
      for (int v = 0; v < kVectors; ++v) acc[m][v] = dot(acc[m][v], pair, lanes[v]);
    }
  }
  for (int m = 0; m < kRows; ++m)
    for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(s + m * kLaneWords + v * 16, acc[m][v]);
}

template <int kRows, int kVectors>
HEED_BF16_TARGET void values_tile(int64_t num_pairs, const uint32_t* v, ptrdiff_t v_stride, const uint32_t* p, float* o,
                                  const float* alpha) {
  __m512 acc[kRows][kVectors];
  for (int m = 0; m < kRows; ++m)
    for (int t = 0; t < kVectors; ++t) acc[m][t] = _mm512_loadu_ps(o + m * kLaneWords + t * 16);
  if (alpha != nullptr) {
    for (int t = 0; t < kVectors; ++t) {
      const __m512 scale = _mm512_loadu_ps(alpha + t * 16);
      for (int m = 0; m < kRows; ++m) acc[m][t] = _mm512_mul_ps(acc[m][t], scale);
    }
  }
  for (int64_t i = 0; i < num_pairs; ++i, v += v_stride, p += kLaneWords) {
    __m512i lanes[kVectors];
    for (int t = 0; t < kVectors; ++t) lanes[t] = _mm512_loadu_si512(p + t * 16);
    for (int m = 0; m < kRows; ++m) {
      const __m512i pair = broadcast(v + m);
      for (int t = 0; t < kVectors; ++t) acc[m][t] = dot(acc[m][t], pair, lanes[t]);
    }
  }
  for (int m = 0; m < kRows; ++m)
    for (int t = 0; t < kVectors; ++t) _mm512_storeu_ps(o + m * kLaneWords + t * 16, acc[m][t]);
}

template <int kVectors>
HEED_BF16_TARGET void keys_tiles(int64_t num_keys, int64_t num_pairs, const uint16_t* k, ptrdiff_t k_stride,
                                 const uint32_t* q, float* s) {
  for (; num_keys >= kTileRows; num_keys -= kTileRows, k += kTileRows * k_stride, s += kTileRows * kLaneWords)
    keys_tile<kTileRows, kVectors>(num_pairs, k, k_stride, q, s);
  switch (num_keys) {
    case 5: keys_tile<5, kVectors>(num_pairs, k, k_stride, q, s); break;
    case 4: keys_tile<4, kVectors>(num_pairs, k, k_stride, q, s); break;
    case 3: keys_tile<3, kVectors>(num_pairs, k, k_stride, q, s); break;
    case 2: keys_tile<2, kVectors>(num_pairs, k, k_stride, q, s); break;
    case 1: keys_tile<1, kVectors>(num_pairs, k, k_stride, q, s); break;
    default: break;
  }
}

template <int kVectors>
HEED_BF16_TARGET void values_tiles(int64_t num_rows, int64_t num_pairs, const uint32_t* v, ptrdiff_t v_stride,
                                   const uint32_t* p, float* o, const float* alpha) {
  for (; num_rows >= kTileRows; num_rows -= kTileRows, v += kTileRows, o += kTileRows * kLaneWords)
    values_tile<kTileRows, kVectors>(num_pairs, v, v_stride, p, o, alpha);
  switch (num_rows) {
    case 5: values_tile<5, kVectors>(num_pairs, v, v_stride, p, o, alpha); break;
    case 4: values_tile<4, kVectors>(num_pairs, v, v_stride, p, o, alpha); break;
    case 3: values_tile<3, kVectors>(num_pairs, v, v_stride, p, o, alpha); break;
    case 2: values_tile<2, kVectors>(num_pairs, v, v_stride, p, o, alpha); break;
    case 1: values_tile<1, kVectors>(num_pairs, v, v_stride, p, o, alpha); break;
    default: break;
  }
}

void multiply_keys(int64_t num_keys, int64_t num_vectors, int64_t num_pairs, const uint16_t* k, ptrdiff_t k_stride,
                   const uint32_t* q, float* s) {
  switch (num_vectors) {
    case 4: return keys_tiles<4>(num_keys, num_pairs, k, k_stride, q, s);
    case 3: return keys_tiles<3>(num_keys, num_pairs, k, k_stride, q, s);
    case 2: return keys_tiles<2>(num_keys, num_pairs, k, k_stride, q, s);
    default: return keys_tiles<1>(num_keys, num_pairs, k, k_stride, q, s);
  }
}

void multiply_values(int64_t head_dim_v, int64_t num_vectors, int64_t num_pairs, const uint32_t* v, ptrdiff_t v_stride,
                     const uint32_t* p, float* o, const float* alpha) {
  switch (num_vectors) {
    case 4: return values_tiles<4>(head_dim_v, num_pairs, v, v_stride, p, o, alpha);
    case 3: return values_tiles<3>(head_dim_v, num_pairs, v, v_stride, p, o, alpha);
    case 2: return values_tiles<2>(head_dim_v, num_pairs, v, v_stride, p, o, alpha);
    default: return values_tiles<1>(head_dim_v, num_pairs, v, v_stride, p, o, alpha);
  }
}

const Bf16Tiles kTiles = {copy_keys,          pack_queries,  pack_values,    transpose_values,
                          pack_probabilities, multiply_keys, multiply_values};

}  // namespace

const Bf16Tiles* bf16_tiles() { return &kTiles; }

#else

const Bf16Tiles* bf16_tiles() { return nullptr; }

#endif

}  // namespace heed::cpu
