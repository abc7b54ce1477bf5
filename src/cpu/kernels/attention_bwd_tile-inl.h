// One tile of the backward pass: queries are rows, keys are lanes. From the products S = Q K^T and dP = dO V^T to P and
// dS. Compiled once per instruction set: include inside a foreach_target file, after hwy/highway.h.
#if defined(HEED_CPU_KERNELS_ATTENTION_BWD_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef HEED_CPU_KERNELS_ATTENTION_BWD_TILE_INL_H_
#undef HEED_CPU_KERNELS_ATTENTION_BWD_TILE_INL_H_
#else
#define HEED_CPU_KERNELS_ATTENTION_BWD_TILE_INL_H_
#endif

#include <limits>

#include "cpu/attention_bwd.h"
#include "cpu/kernels/math-inl.h"
#include "cpu/kernels/score-inl.h"
#include "cpu/kernels/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::cpu::HWY_NAMESPACE {

constexpr int32_t kMaxTileRows = 192;
constexpr int kPanelKeys = kTileVectors * kLanes;  // lanes of a panel of K^T or V^T: what one register tile takes

// Rows [first_query, first_query + num_rows) of one head against keys [first_key, first_key + num_keys).
struct BackwardTile {
  const Sequence* sequence = nullptr;
  int64_t head = 0;
  int64_t first_query = 0, first_key = 0;
  int32_t num_rows = 0, num_keys = 0;
  bool partial = false;      // some pair is hidden by causal, window or chunk
  bool exact = false;        // NaN or Inf in what was loaded: 0 times it must not reach what does not see it
  int32_t lo[kMaxTileRows];  // lanes that a row sees: lo <= lane < hi; both never fall from row to row
  int32_t hi[kMaxTileRows];
  float lse[kMaxTileRows];  // +inf for rows that see nothing, whose P is so 0
  float delta[kMaxTileRows];
};

inline int32_t vectors_for(int32_t lanes) { return (lanes + kLanes - 1) / kLanes; }

// lo and hi of the tile's rows, as lanes; and whether any pair is hidden.
inline void set_visible_lanes(const BackwardRun& run, BackwardTile* tile) {
  tile->partial = false;
  for (int32_t r = 0; r < tile->num_rows; ++r) {
    const int64_t position = tile->first_query + r + tile->sequence->offset;
    const KeyRange range = visible_keys(*run.problem, tile->sequence->k_len, position);
    tile->lo[r] = static_cast<int32_t>(HWY_MIN(HWY_MAX(range.lo - tile->first_key, 0), tile->num_keys));
    tile->hi[r] = static_cast<int32_t>(HWY_MIN(HWY_MAX(range.hi - tile->first_key, tile->lo[r]), tile->num_keys));
    tile->partial = tile->partial || tile->lo[r] > 0 || tile->hi[r] < tile->num_keys;
  }
}

// Rows to be brought into the second-level cache, a few at a time, between register tiles.
struct RowPrefetch {
  const char* at = nullptr;
  int64_t stride = 0, bytes = 0;
  int32_t num_rows = 0;

  HWY_INLINE void take(int32_t rows) {
    for (; rows > 0 && num_rows > 0; --rows, --num_rows, at += stride)
      for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(at + byte, 0, 2);
  }
};

// C[row][key] = sum_d A[row][d] * lanes[d][key], only where some row of six sees some key of a vector.
HWY_NOINLINE void multiply_visible(const BackwardTile& tile, int64_t num_d, const float* a, int64_t a_stride,
                                   const float* panels, float* c, int64_t c_stride) {
  const int32_t num_vectors = vectors_for(tile.num_keys);
  for (int32_t first = 0; first < num_vectors; first += kTileVectors, panels += num_d * kPanelKeys) {
    const int32_t end = HWY_MIN(first + kTileVectors, num_vectors);
    for (int32_t r = 0; r < tile.num_rows; r += kTileRows) {
      const int32_t rows = HWY_MIN(kTileRows, tile.num_rows - r);
      const int32_t from = HWY_MAX(first, tile.lo[r] / kLanes), to = HWY_MIN(end, vectors_for(tile.hi[r + rows - 1]));
      if (from >= to) continue;
      multiply<AOrder::kRows>(rows, to - from, num_d, a + r * a_stride, a_stride, panels + (from - first) * kLanes,
                              kPanelKeys, c + r * c_stride + from * kLanes, c_stride, Start::kZero);
    }
  }
}

// Lanes lo <= lane < hi of a vector that starts at lane `first`; iota: 0, 1, 2, ..., which costs to make.
HWY_INLINE hn::Mask<F32Tag> lanes_in(hn::Vec<I32Tag> iota, int32_t first, int32_t lo, int32_t hi) {
  const I32Tag i;
  const auto lane = hn::Add(iota, hn::Set(i, first));
  return hn::RebindMask(F32Tag(), hn::And(hn::Not(hn::Lt(lane, hn::Set(i, lo))), hn::Lt(lane, hn::Set(i, hi))));
}

// P from log2 P. Where scores are so large that lse's rounding is more than 1, the difference of the two may be any
// number, and P nothing a backward pass can know; but it is a probability. NaN stays NaN.
HWY_INLINE F32 probability(F32 x) { return exp2_score(hn::Sub(x, hn::Max(hn::Zero(F32Tag()), x))); }

// Scores that are nothing but scale * q.k, all finite: P and dS in place of S and dP, 0 where a row does not see a key.
HWY_NOINLINE void finish_plain_rows(const BackwardRun& run, const BackwardTile& tile, float* s, float* dp) {
  const F32Tag f;
  const F32 log2e = hn::Set(f, kLog2e), scale = hn::Set(f, run.args->softmax_scale);
  const auto iota = hn::Iota(I32Tag(), 0);
  const int64_t stride = run.shape.tile_stride;
  const int32_t num_vectors = vectors_for(tile.num_keys);
  for (int32_t r = 0; r < tile.num_rows; ++r, s += stride, dp += stride) {
    const F32 lse = hn::Set(f, tile.lse[r]), delta = hn::Set(f, tile.delta[r]);
    const int32_t lo = tile.lo[r], hi = tile.hi[r];
    const auto vector = [&](int32_t v, auto whole) HWY_ATTR {
      // The difference first, in one rounding: where P counts it is small, and log2(e) adds no error to speak of.
      F32 p = probability(hn::Mul(hn::MulSub(hn::LoadU(f, s + v * kLanes), scale, lse), log2e));
      F32 ds = hn::Mul(p, hn::Sub(hn::LoadU(f, dp + v * kLanes), delta));
      if constexpr (!decltype(whole)::value) {
        const auto seen = lanes_in(iota, v * kLanes, lo, hi);
        p = hn::IfThenElseZero(seen, p);
        ds = hn::IfThenElseZero(seen, ds);
      }
      hn::StoreU(p, f, s + v * kLanes);
      hn::StoreU(ds, f, dp + v * kLanes);
    };
    const int32_t from = lo / kLanes, to = HWY_MAX(from, vectors_for(hi));
    const int32_t whole_from = vectors_for(lo), whole_to = hi / kLanes;
    for (int32_t v = 0; v < from; ++v) {
      hn::StoreU(hn::Zero(f), f, s + v * kLanes);
      hn::StoreU(hn::Zero(f), f, dp + v * kLanes);
    }
    int32_t v = from;
    for (; v < HWY_MIN(whole_from, to); ++v) vector(v, std::false_type());
    for (; v < whole_to; ++v) vector(v, std::true_type());
    for (; v < to; ++v) vector(v, std::false_type());
    for (; v < num_vectors; ++v) {
      hn::StoreU(hn::Zero(f), f, s + v * kLanes);
      hn::StoreU(hn::Zero(f), f, dp + v * kLanes);
    }
  }
}

// ---- every term of the score ----------------------------------------------------------------------------------------

// Rows of keys, filled for one query at a time.
struct KeyRowBuffers {
  float* bias = nullptr;
  float* may_see = nullptr;  // 1 or 0
  float* keep = nullptr;     // the dropout's factor: 1/(1-p) or 0
  float* ds = nullptr;       // at the additive bias
};

// Which keys of lanes [0, num_keys) the dropout keeps for one query: lanes are keys, so a Philox counter serves four of
// them. Writes kKeepBefore floats at most before keep, and kKeepAfter past the last key.
inline void fill_keep(const ScoreTerms& terms, const BackwardTile& tile, int64_t query, float* keep) {
  const F32Tag f;
  const U32Tag u;
  if (terms.keep_below == 0 || terms.keep_below > 0xffffffffu) {
    const F32 all = hn::Set(f, terms.keep_below == 0 ? 0.0f : terms.keep_scale);
    for (int32_t k = 0; k < tile.num_keys; k += kLanes) hn::StoreU(all, f, keep + k);
    return;
  }
  const auto below = hn::Set(u, static_cast<uint32_t>(terms.keep_below));
  const auto c1 = hn::Set(u, static_cast<uint32_t>(query + terms.index_base[2]));
  const auto c2 = hn::Set(u, static_cast<uint32_t>((tile.sequence->batch + terms.index_base[0]) * terms.nheads_q +
                                                   tile.head + terms.index_base[1]));
  const auto c3 = hn::Set(u, terms.philox_offset);
  const F32 scale = hn::Set(f, terms.keep_scale);
  const uint64_t first = static_cast<uint64_t>(tile.first_key + terms.index_base[3]);
  const int32_t skew = static_cast<int32_t>(first % 4);
  for (int32_t key = -skew; key < tile.num_keys; key += 4 * kLanes) {
    const uint32_t quad = static_cast<uint32_t>((first + static_cast<uint64_t>(static_cast<int64_t>(key))) / 4);
    const PhiloxWords drawn = philox(hn::Iota(u, quad), c1, c2, c3, terms.philox_key[0], terms.philox_key[1]);
    F32 factor[4];
    for (int w = 0; w < 4; ++w) factor[w] = hn::IfThenElseZero(hn::RebindMask(f, hn::Lt(drawn.word[w], below)), scale);
    hn::StoreInterleaved4(factor[0], factor[1], factor[2], factor[3], f, keep + key);
  }
}

HWY_NOINLINE void fill_row_buffers(const ScoreTerms& terms, const BackwardTile& tile, int32_t r,
                                   const KeyRowBuffers& rows) {
  const int64_t i = tile.first_query + r, b = tile.sequence->batch;
  const int32_t lo = tile.lo[r], count = tile.hi[r] - lo;
  if (terms.bias != nullptr) {
    const auto* stride = terms.bias_stride;
    const int64_t index = b * stride[0] + tile.head * stride[1] + i * stride[2] + (tile.first_key + lo) * stride[3];
    widen_strided(terms.bias, terms.bias_dtype, index, stride[3], count, rows.bias + lo);
  }
  if (terms.mask != nullptr) {
    const auto* stride = terms.mask_stride;
    const uint8_t* may =
        terms.mask + b * stride[0] + tile.head * stride[1] + i * stride[2] + tile.first_key * stride[3];
    if (stride[3] == 1) {
      for (int32_t k = lo; k < tile.hi[r]; ++k) rows.may_see[k] = may[k] != 0 ? 1.0f : 0.0f;
    } else {
      for (int32_t k = lo; k < tile.hi[r]; ++k) rows.may_see[k] = may[k * stride[3]] != 0 ? 1.0f : 0.0f;
    }
  }
  if (terms.dropout) fill_keep(terms, tile, i, rows.keep);
}

// What a finished row adds up to elsewhere.
struct RowSums {
  F32 dalibi;  // sum of -|p - j| dS so far, lane by lane
};

// One row with every term of the score. Writes P (dropped keys 0, the others scaled) over s, dS times the softcap's
// slope over dp, dS before it into rows.ds; shown (may be null): per key 1 if it counts, 3 if dropout keeps it too.
HWY_NOINLINE void finish_row(const BackwardRun& run, const BackwardTile& tile, int32_t r, const KeyRowBuffers& rows,
                             float* s, float* dp, uint8_t* shown, RowSums* sums) {
  const F32Tag f;
  const ScoreTerms& terms = run.terms;
  const F32 zero = hn::Zero(f), one = hn::Set(f, 1.0f), hidden = hn::Set(f, -std::numeric_limits<float>::infinity());
  const float softcap = run.args->softcap;
  const F32 cap = hn::Set(f, softcap), log2e = hn::Set(f, kLog2e);
  const F32 factor = hn::Set(f, softcap > 0.0f ? run.args->softmax_scale / softcap : run.args->softmax_scale);
  const F32 lse = hn::Set(f, tile.lse[r]), delta = hn::Set(f, tile.delta[r]);
  const bool row_counts = tile.lse[r] != std::numeric_limits<float>::infinity();
  const int64_t b = tile.sequence->batch;
  const float slope =
      terms.slopes == nullptr ? 0.0f : terms.slopes[b * terms.slope_stride[0] + tile.head * terms.slope_stride[1]];
  const bool has_bias = terms.bias != nullptr, has_slope = terms.slopes != nullptr, has_mask = terms.mask != nullptr;
  const bool has_dropout = terms.dropout;
  const int32_t lo = tile.lo[r], hi = row_counts ? tile.hi[r] : 0, num_vectors = vectors_for(tile.num_keys);
  F32 dalibi = sums->dalibi;
  const auto iota = hn::Iota(I32Tag(), 0);
  const F32 iota_f = hn::ConvertTo(f, iota);
  const float to_first = static_cast<float>(tile.first_key - (tile.first_query + r + tile.sequence->offset));
  for (int32_t v = 0; v < num_vectors; ++v) {
    const int32_t k = v * kLanes;
    F32 x = hn::Mul(hn::LoadU(f, s + k), factor), cap_slope = one;
    if (softcap > 0.0f) {
      const F32 t = tanh_score(x);
      x = hn::Mul(cap, t);
      cap_slope = hn::NegMulAdd(t, t, one);
    }
    if (has_bias) x = hn::Add(x, hn::LoadU(f, rows.bias + k));
    const F32 distance = hn::Abs(hn::Add(iota_f, hn::Set(f, to_first + static_cast<float>(k))));
    if (has_slope) x = hn::NegMulAdd(hn::Set(f, slope), distance, x);
    auto seen = hn::And(lanes_in(iota, k, lo, hi), hn::Not(hn::Eq(x, hidden)));
    if (has_mask) seen = hn::And(seen, hn::Gt(hn::LoadU(f, rows.may_see + k), zero));
    F32 p = hn::IfThenElseZero(seen, probability(hn::Mul(hn::Sub(x, lse), log2e)));
    F32 gradient = hn::LoadU(f, dp + k), kept = one;
    F32 weight = p;
    if (has_dropout) {  // by selection, not by a factor of 0: a dropped key's dP or P may be NaN
      kept = hn::LoadU(f, rows.keep + k);
      const auto keep = hn::Gt(kept, zero);
      gradient = hn::IfThenElseZero(keep, hn::Mul(gradient, kept));
      weight = hn::IfThenElseZero(keep, hn::Mul(p, kept));
    }
    const F32 ds = hn::IfThenElseZero(seen, hn::Mul(p, hn::Sub(gradient, delta)));
    if (has_slope) dalibi = hn::NegMulAdd(distance, ds, dalibi);
    hn::StoreU(weight, f, s + k);
    hn::StoreU(hn::IfThenElseZero(seen, hn::Mul(ds, cap_slope)), f, dp + k);
    hn::StoreU(ds, f, rows.ds + k);
    if (shown != nullptr) {
      HWY_ALIGN float flags[kLanes];
      hn::Store(hn::IfThenElseZero(seen, hn::IfThenElse(hn::Gt(kept, zero), hn::Set(f, 3.0f), one)), f, flags);
      for (int32_t t = 0; t < kLanes; ++t) shown[k + t] = static_cast<uint8_t>(flags[t]);
    }
  }
  sums->dalibi = dalibi;
}

}  // namespace heed::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // include guard, flipped per target
