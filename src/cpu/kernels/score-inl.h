// From products to probabilities, on a tile S^T: keys [first_key, first_key + num_keys) are rows, query lanes are
// columns, vectors [first_vector, end_vector) of the block's lanes. `s` points at (first_key, lane 0); rows lie
// s_stride apart. Compiled once per instruction set: include inside a foreach_target file, after hwy/highway.h.
#if defined(HEED_CPU_KERNELS_SCORE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef HEED_CPU_KERNELS_SCORE_INL_H_
#undef HEED_CPU_KERNELS_SCORE_INL_H_
#else
#define HEED_CPU_KERNELS_SCORE_INL_H_
#endif

#include <limits>

#include "base/dtype.h"
#include "cpu/kernels/math-inl.h"
#include "cpu/kernels/tile-inl.h"
#include "cpu/score.h"

HWY_BEFORE_NAMESPACE();
namespace heed::cpu::HWY_NAMESPACE {

// A tile's place: which keys, which vectors of the lanes.
struct TileSpan {
  int64_t first_key = 0;
  int32_t num_keys = 0;
  int32_t first_vector = 0, end_vector = 0;
};

// ---- row conversions
// --------------------------------------------------------------------------------------------------

HWY_INLINE F32 widen(const float* p) { return hn::LoadU(F32Tag(), p); }
HWY_INLINE F32 widen(const Bf16* p) {
  const hn::Rebind<uint16_t, F32Tag> half;
  const auto bits = hn::LoadU(half, reinterpret_cast<const uint16_t*>(p));
  return hn::BitCast(F32Tag(), hn::ShiftLeft<16>(hn::PromoteTo(U32Tag(), bits)));
}
HWY_INLINE F32 widen(const F16* p) {
#if HWY_TARGET == HWY_EMU128 || HWY_TARGET == HWY_SCALAR  // whose conversion makes numbers of NaN and Inf
  HWY_ALIGN float lanes[kLanes];
  for (int k = 0; k < kLanes; ++k) lanes[k] = to_float(p[k]);
  return hn::Load(F32Tag(), lanes);
#else
  const hn::Rebind<hwy::float16_t, F32Tag> half;
  return hn::PromoteTo(F32Tag(), hn::LoadU(half, reinterpret_cast<const hwy::float16_t*>(p)));
#endif
}

inline float widen_one(float x) { return x; }
inline float widen_one(Bf16 x) { return to_float(x); }
inline float widen_one(F16 x) { return to_float(x); }

template <class T>
void widen_row(const T* src, int64_t count, float* HWY_RESTRICT dst) {
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) hn::StoreU(widen(src + k), F32Tag(), dst + k);
  for (; k < count; ++k) dst[k] = widen_one(src[k]);
}

// `count` elements of a float dtype, `stride` apart from element `index` on, as f32.
inline void widen_strided(const void* data, Dtype dtype, int64_t index, int64_t stride, int64_t count, float* dst) {
  const auto copy = [&](const auto* src) HWY_ATTR {
    if (stride == 1) return widen_row(src + index, count, dst);
    for (int64_t k = 0; k < count; ++k) dst[k] = widen_one(src[index + k * stride]);
  };
  if (dtype == Dtype::kBf16) return copy(static_cast<const Bf16*>(data));
  if (dtype == Dtype::kF16) return copy(static_cast<const F16*>(data));
  copy(static_cast<const float*>(data));
}

HWY_INLINE void narrow(F32 x, float* p) { hn::StoreU(x, F32Tag(), p); }
HWY_INLINE void narrow(F32 x, Bf16* p) {  // round to nearest even; NaN made quiet, not inf
  const U32Tag u;
  const hn::Rebind<uint16_t, U32Tag> half;
  const auto bits = hn::BitCast(u, x);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(u, 1));
  const auto rounded = hn::Add(bits, hn::Add(odd, hn::Set(u, 0x7fff)));
  const auto quiet = hn::Or(bits, hn::Set(u, 0x400000));
  const auto is_nan = hn::RebindMask(u, hn::Not(hn::Eq(x, x)));  // Highway's Ne is false for NaN on x86
  const auto top = hn::ShiftRight<16>(hn::IfThenElse(is_nan, quiet, rounded));
  hn::StoreU(hn::DemoteTo(half, hn::BitCast(I32Tag(), top)), half, reinterpret_cast<uint16_t*>(p));
}
HWY_INLINE void narrow(F32 x, F16* p) {
#if HWY_TARGET == HWY_EMU128 || HWY_TARGET == HWY_SCALAR
  HWY_ALIGN float lanes[kLanes];
  hn::Store(x, F32Tag(), lanes);
  for (int k = 0; k < kLanes; ++k) p[k] = to_f16(lanes[k]);
#else
  const hn::Rebind<hwy::float16_t, F32Tag> half;
  hn::StoreU(hn::DemoteTo(half, x), half, reinterpret_cast<hwy::float16_t*>(p));
#endif
}

inline void narrow_one(float x, float* p) { *p = x; }
inline void narrow_one(float x, Bf16* p) { *p = to_bf16(x); }
inline void narrow_one(float x, F16* p) { *p = to_f16(x); }

template <class T>
void narrow_row(const float* HWY_RESTRICT src, int64_t count, T* dst) {
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) narrow(hn::LoadU(F32Tag(), src + k), dst + k);
  for (; k < count; ++k) narrow_one(src[k], dst + k);
}

// ---- terms of the score
// -----------------------------------------------------------------------------------------------

// factor, then softcap: s = cap * tanh(s * factor / cap).
inline void cap_scores(const ScoreTerms& terms, const TileSpan& span, float* s, ptrdiff_t s_stride) {
  const F32Tag f;
  if (terms.factor == 1.0f && terms.softcap == 0.0f) return;
  const F32 factor = hn::Set(f, terms.softcap > 0.0f ? terms.factor / terms.softcap : terms.factor);
  const F32 cap = hn::Set(f, terms.softcap);
  for (int32_t key = 0; key < span.num_keys; ++key, s += s_stride) {
    for (int32_t v = span.first_vector; v < span.end_vector; ++v) {
      const F32 x = hn::Mul(hn::LoadU(f, s + v * kLanes), factor);
      hn::StoreU(terms.softcap > 0.0f ? hn::Mul(cap, tanh_score(x)) : x, f, s + v * kLanes);
    }
  }
}

// A tile of bias (b, h, i, j) laid out like S^T: tile[key][lane], rows s_stride apart, values as stored (natural
// units). row: scratch of num_keys floats rounded up to 4, times 4.
inline void load_bias(const ScoreTerms& terms, const LaneBlock& lanes, const TileSpan& span, float* tile,
                      ptrdiff_t s_stride, float* row) {
  const int32_t first = span.first_vector * kLanes, end = HWY_MIN(span.end_vector * kLanes, lanes.count);
  const int64_t row_floats = (span.num_keys + 3) & ~3;
  for (int32_t lane = first; lane < span.end_vector * kLanes; lane += 4) {
    for (int32_t t = 0; t < 4; ++t) {
      const int32_t from = HWY_MIN(lane + t, HWY_MAX(end, first + 1) - 1);
      const int64_t index = lanes.batch * terms.bias_stride[0] + lanes.head[from] * terms.bias_stride[1] +
                            lanes.query[from] * terms.bias_stride[2] + span.first_key * terms.bias_stride[3];
      widen_strided(terms.bias, terms.bias_dtype, index, terms.bias_stride[3], span.num_keys, row + t * row_floats);
    }
    transpose_rows([&](int64_t t) { return row + t * row_floats; }, 4, span.num_keys, 1.0f, tile + lane, s_stride);
  }
}

// + bias. tile: scratch like S^T, row: as in load_bias.
inline void add_bias(const ScoreTerms& terms, const LaneBlock& lanes, const TileSpan& span, float* s,
                     ptrdiff_t s_stride, float* tile, float* row) {
  const F32Tag f;
  load_bias(terms, lanes, span, tile, s_stride, row);
  const F32 log2e = hn::Set(f, kLog2e);
  for (int32_t key = 0; key < span.num_keys; ++key, s += s_stride, tile += s_stride) {
    for (int32_t v = span.first_vector; v < span.end_vector; ++v)
      hn::StoreU(hn::MulAdd(hn::LoadU(f, tile + v * kLanes), log2e, hn::LoadU(f, s + v * kLanes)), f, s + v * kLanes);
  }
}

// |p - j| of a lane's position and a key, for the vector's lanes: `to_first` holds p - first_key.
HWY_INLINE F32 key_distance(F32 to_first, int32_t key) {
  return hn::Abs(hn::Sub(to_first, hn::Set(F32Tag(), static_cast<float>(key))));
}

// p - first_key of a vector's lanes as f32: exact up to 2^24.
inline F32 positions_from(const LaneBlock& lanes, int32_t vector, int64_t first_key) {
  HWY_ALIGN float to_first[kLanes];
  for (int32_t t = 0; t < kLanes; ++t)
    to_first[t] = static_cast<float>(lanes.position[vector * kLanes + t] - first_key);
  return hn::Load(F32Tag(), to_first);
}

// - slope * |p - j|.
inline void add_alibi(const LaneBlock& lanes, const TileSpan& span, float* s, ptrdiff_t s_stride) {
  const F32Tag f;
  for (int32_t v = span.first_vector; v < span.end_vector; ++v) {
    const F32 to_first = positions_from(lanes, v, span.first_key), slope = hn::LoadU(f, lanes.slope + v * kLanes);
    for (int32_t key = 0; key < span.num_keys; ++key) {
      float* p = s + key * s_stride + v * kLanes;
      hn::StoreU(hn::NegMulAdd(slope, key_distance(to_first, key), hn::LoadU(f, p)), f, p);
    }
  }
}

// Keys that the boolean mask hides become -inf. row: num_keys floats rounded up to 4, times 4; tile like S^T.
inline void hide_masked(const ScoreTerms& terms, const LaneBlock& lanes, const TileSpan& span, float* s,
                        ptrdiff_t s_stride, float* tile, float* row) {
  const F32Tag f;
  const int32_t first = span.first_vector * kLanes,
                end = HWY_MAX(HWY_MIN(span.end_vector * kLanes, lanes.count), first + 1);
  const int64_t row_floats = (span.num_keys + 3) & ~3;
  for (int32_t lane = first; lane < span.end_vector * kLanes; lane += 4) {
    for (int32_t t = 0; t < 4; ++t) {
      const int32_t from = HWY_MIN(lane + t, end - 1);
      const uint8_t* may = terms.mask + lanes.batch * terms.mask_stride[0] + lanes.head[from] * terms.mask_stride[1] +
                           lanes.query[from] * terms.mask_stride[2] + span.first_key * terms.mask_stride[3];
      float* to = row + t * row_floats;
      for (int32_t key = 0; key < span.num_keys; ++key) to[key] = may[key * terms.mask_stride[3]] != 0 ? 1.0f : 0.0f;
    }
    transpose_rows([&](int64_t t) { return row + t * row_floats; }, 4, span.num_keys, 1.0f, tile + lane, s_stride);
  }
  const F32 hidden = hn::Set(f, -std::numeric_limits<float>::infinity());
  for (int32_t key = 0; key < span.num_keys; ++key, s += s_stride, tile += s_stride) {
    for (int32_t v = span.first_vector; v < span.end_vector; ++v) {
      const auto may = hn::Gt(hn::LoadU(f, tile + v * kLanes), hn::Zero(f));
      hn::StoreU(hn::IfThenElse(may, hn::LoadU(f, s + v * kLanes), hidden), f, s + v * kLanes);
    }
  }
}

// Keys outside a lane's [lo, hi) become -inf. Only the keys that some lane of a vector does not see are touched.
inline void hide_range(const LaneBlock& lanes, const TileSpan& span, float* s, ptrdiff_t s_stride) {
  const F32Tag f;
  const F32 hidden = hn::Set(f, -std::numeric_limits<float>::infinity());
  const int64_t n = span.num_keys;
  for (int32_t v = span.first_vector; v < span.end_vector; ++v) {
    HWY_ALIGN float lo[kLanes], hi[kLanes];
    int64_t lo_max = 0, hi_min = n;
    for (int32_t t = 0; t < kLanes; ++t) {
      const int64_t from = HWY_MIN(HWY_MAX(lanes.lo[v * kLanes + t] - span.first_key, int64_t{0}), n);
      const int64_t to = HWY_MIN(HWY_MAX(lanes.hi[v * kLanes + t] - span.first_key, int64_t{0}), n);
      lo_max = HWY_MAX(lo_max, from);
      hi_min = HWY_MIN(hi_min, to);
      lo[t] = static_cast<float>(from);
      hi[t] = static_cast<float>(to);
    }
    const F32 from = hn::Load(f, lo), to = hn::Load(f, hi);
    for (int64_t key = 0; key < n; ++key) {
      if (key == lo_max && lo_max < hi_min) key = hi_min;  // what all lanes see
      if (key >= n) break;
      const F32 j = hn::Set(f, static_cast<float>(key));
      float* p = s + key * s_stride + v * kLanes;
      const auto seen = hn::And(hn::Ge(j, from), hn::Lt(j, to));
      hn::StoreU(hn::IfThenElse(seen, hn::LoadU(f, p), hidden), f, p);
    }
  }
}

// ---- dropout
// ----------------------------------------------------------------------------------------------------------

// Philox4x32-10 on vectors: one counter a lane.
struct PhiloxWords {
  hn::Vec<U32Tag> word[4];
};

HWY_INLINE void multiply_wide(hn::Vec<U32Tag> a, hn::Vec<U32Tag> b, hn::Vec<U32Tag>* high, hn::Vec<U32Tag>* low) {
  const U32Tag u;
  const hn::Repartition<uint64_t, U32Tag> wide;
  const auto even = hn::MulEven(a, b);
  const auto odd = hn::MulEven(hn::BitCast(u, hn::ShiftRight<32>(hn::BitCast(wide, a))),
                               hn::BitCast(u, hn::ShiftRight<32>(hn::BitCast(wide, b))));
  *low = hn::OddEven(hn::BitCast(u, hn::ShiftLeft<32>(odd)), hn::BitCast(u, even));
  *high = hn::OddEven(hn::BitCast(u, odd), hn::BitCast(u, hn::ShiftRight<32>(even)));
}

inline PhiloxWords philox(hn::Vec<U32Tag> c0, hn::Vec<U32Tag> c1, hn::Vec<U32Tag> c2, hn::Vec<U32Tag> c3, uint32_t key0,
                          uint32_t key1) {
  const U32Tag u;
  const auto mul0 = hn::Set(u, 0xD2511F53u), mul1 = hn::Set(u, 0xCD9E8D57u);
  for (int round = 0; round < 10; ++round) {
    hn::Vec<U32Tag> high0, low0, high1, low1;
    multiply_wide(mul0, c0, &high0, &low0);
    multiply_wide(mul1, c2, &high1, &low1);
    c0 = hn::Xor(hn::Xor(high1, c1), hn::Set(u, key0));
    c1 = low1;
    c2 = hn::Xor(hn::Xor(high0, c3), hn::Set(u, key1));
    c3 = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Calls keep(key, vector, mask) for every key of the tile and every vector of lanes: mask says which lanes keep the
// key.
template <class Keep>
void for_kept(const ScoreTerms& terms, const LaneBlock& lanes, const TileSpan& span, const Keep& keep) {
  const U32Tag u;
  if (terms.keep_below == 0 || terms.keep_below > 0xffffffffu) {
    const auto mask =
        terms.keep_below == 0 ? hn::MaskFromVec(hn::Zero(F32Tag())) : hn::Eq(hn::Zero(F32Tag()), hn::Zero(F32Tag()));
    for (int32_t v = span.first_vector; v < span.end_vector; ++v)
      for (int32_t key = 0; key < span.num_keys; ++key) keep(key, v, mask);
    return;
  }
  const auto below = hn::Set(u, static_cast<uint32_t>(terms.keep_below));
  const uint64_t first_j = static_cast<uint64_t>(span.first_key + terms.index_base[3]);
  for (int32_t v = span.first_vector; v < span.end_vector; ++v) {
    HWY_ALIGN uint32_t i[kLanes], bh[kLanes];
    for (int32_t t = 0; t < kLanes; ++t) {
      const int32_t lane = v * kLanes + t;
      i[t] = static_cast<uint32_t>(lanes.query[lane] + terms.index_base[2]);
      bh[t] = static_cast<uint32_t>((lanes.batch + terms.index_base[0]) * terms.nheads_q + lanes.head[lane] +
                                    terms.index_base[1]);
    }
    const auto c1 = hn::Load(u, i), c2 = hn::Load(u, bh), c3 = hn::Set(u, terms.philox_offset);
    for (uint64_t quad = first_j / 4; quad * 4 < first_j + static_cast<uint64_t>(span.num_keys); ++quad) {
      const PhiloxWords words =
          philox(hn::Set(u, static_cast<uint32_t>(quad)), c1, c2, c3, terms.philox_key[0], terms.philox_key[1]);
      for (int w = 0; w < 4; ++w) {
        const int64_t key = static_cast<int64_t>(quad * 4 + w - first_j);
        if (key < 0 || key >= span.num_keys) continue;
        keep(static_cast<int32_t>(key), v, hn::RebindMask(F32Tag(), hn::Lt(words.word[w], below)));
      }
    }
  }
}

// Probabilities of dropped keys become 0; the scale 1/(1-p) is left to the caller.
inline void drop_keys(const ScoreTerms& terms, const LaneBlock& lanes, const TileSpan& span, float* p,
                      ptrdiff_t p_stride) {
  const F32Tag f;
  for_kept(terms, lanes, span, [&](int32_t key, int32_t v, hn::Mask<F32Tag> kept) HWY_ATTR {
    float* at = p + key * p_stride + v * kLanes;
    hn::StoreU(hn::IfThenElseZero(kept, hn::LoadU(f, at)), f, at);
  });
}

// ---- all terms in order
// -------------------------------------------------------------------------------------------------

// Products to scores: factor, softcap, bias, ALiBi, boolean mask; hide_range is the caller's, who knows where it is
// needed. tile: scratch like S^T; row: 4 * (num_keys rounded up to 4) floats. Neither is touched unless there is a bias
// or mask.
inline void finish_scores(const ScoreTerms& terms, const LaneBlock& lanes, const TileSpan& span, float* s,
                          ptrdiff_t s_stride, float* tile, float* row) {
  cap_scores(terms, span, s, s_stride);
  if (terms.bias != nullptr) add_bias(terms, lanes, span, s, s_stride, tile, row);
  if (terms.slopes != nullptr) add_alibi(lanes, span, s, s_stride);
  if (terms.mask != nullptr) hide_masked(terms, lanes, span, s, s_stride, tile, row);
}

}  // namespace heed::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // include guard, flipped per target
