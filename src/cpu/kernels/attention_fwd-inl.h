// Forward, lanes = query rows. For a block of 64 packed query rows and a block of keys:
//
//   S^T = K Q^T          keys x lanes: K rows are broadcast, Q^T was transposed once per unit, multiplied by the scale
//   P^T = exp2(S^T - m)  the softmax is vertical: maximum and sum are plain vectors, nothing is reduced across lanes
//   O^T = V^T P^T        V rows are broadcast
//
// A unit is up to four such blocks side by side, so that K and V are copied, widened from 16 bits or gathered from
// pages once per key block and serve 256 rows. Only visible keys are touched: each 16 lanes ("granule") have their own
// key range, and masks are applied where a range cuts a granule. Out of a chunk come O^T [head_dim_v][64], m and l per
// block.
//
// Compiled once per instruction set: include inside a foreach_target file, after hwy/highway.h.
#if defined(HEED_CPU_KERNELS_ATTENTION_FWD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef HEED_CPU_KERNELS_ATTENTION_FWD_INL_H_
#undef HEED_CPU_KERNELS_ATTENTION_FWD_INL_H_
#else
#define HEED_CPU_KERNELS_ATTENTION_FWD_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/attention_fwd.h"
#include "cpu/attention_fwd_bf16.h"
#include "cpu/kernels/score-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::cpu::HWY_NAMESPACE {

constexpr int kGranule = 16;
constexpr int kGranules = kBlockLanes / kGranule;
constexpr int kGranuleVectors = kGranule / kLanes;
constexpr float kMinusInf = -std::numeric_limits<float>::infinity();

// ---- key ranges of granules
// ---------------------------------------------------------------------------------------------

// Keys [begin, end) of the key block, for granules [first, last).
struct Segment {
  int32_t begin, end, first, last;
};

// Which keys of the current key block each granule sees, and the rectangles that cover exactly those.
struct BlockSpan {
  int32_t begin[kGranules], end[kGranules];  // relative to the key block; equal: none
  bool cut[kGranules];                       // some lane sees less than the granule
  Segment segments[2 * kGranules];
  int32_t num_segments = 0;
};

inline void find_segments(BlockSpan* span) {
  constexpr int32_t kEnd = std::numeric_limits<int32_t>::max();
  span->num_segments = 0;
  int32_t key = kEnd;
  for (int g = 0; g < kGranules; ++g)
    if (span->begin[g] < span->end[g]) key = HWY_MIN(key, span->begin[g]);
  while (key != kEnd) {
    Segment segment{key, kEnd, kGranules, 0};
    int32_t next = kEnd;  // the nearest later key at which a granule begins or ends
    for (int g = 0; g < kGranules; ++g) {
      if (span->begin[g] >= span->end[g] || span->end[g] <= key) continue;
      if (span->begin[g] > key) {
        next = HWY_MIN(next, span->begin[g]);
        continue;
      }
      next = HWY_MIN(next, span->end[g]);
      segment.first = HWY_MIN(segment.first, g);
      segment.last = g + 1;
    }
    segment.end = next;
    if (segment.first < segment.last && next != kEnd) span->segments[span->num_segments++] = segment;
    key = next;
  }
}

inline void find_span(const LaneBlock& lanes, int64_t first_key, int64_t num_keys, BlockSpan* span) {
  for (int g = 0; g < kGranules; ++g) {
    span->begin[g] = span->end[g] = 0;
    span->cut[g] = false;
    if (g * kGranule >= lanes.count) continue;
    const int64_t* lo = lanes.lo + g * kGranule;
    const int64_t* hi = lanes.hi + g * kGranule;
    const int64_t begin = HWY_MAX(lo[0] - first_key, int64_t{0});
    const int64_t end = HWY_MIN(hi[kGranule - 1] - first_key, num_keys);
    if (begin >= end) continue;
    span->begin[g] = static_cast<int32_t>(begin);
    span->end[g] = static_cast<int32_t>(end);
    span->cut[g] = lo[kGranule - 1] - first_key > begin || hi[0] - first_key < end;
  }
  find_segments(span);
}

// ---- rows of K and V as f32
// ---------------------------------------------------------------------------------------------

struct RowBlock {
  const float* data;
  ptrdiff_t stride;
};

template <class T>
RowBlock copy_rows(const T* tensor, const KeyRows& rows, int64_t first_key, int64_t num_keys, int64_t width,
                   float* scratch) {
  for (int64_t key = 0; key < num_keys; ++key)
    widen_row(tensor + rows.offset(first_key + key), width, scratch + key * width);
  return {scratch, static_cast<ptrdiff_t>(width)};
}

// Keys [first_key, first_key + num_keys) as f32 rows: in place where they are f32 in one run and `copy` does not ask.
inline RowBlock load_rows(const void* tensor, Dtype dtype, const KeyRows& rows, int64_t first_key, int64_t num_keys,
                          int64_t width, bool copy, float* scratch) {
  if (dtype == Dtype::kBf16)
    return copy_rows(static_cast<const Bf16*>(tensor), rows, first_key, num_keys, width, scratch);
  if (dtype == Dtype::kF16)
    return copy_rows(static_cast<const F16*>(tensor), rows, first_key, num_keys, width, scratch);
  const float* data = static_cast<const float*>(tensor);
  if (copy || rows.run(first_key) < num_keys) return copy_rows(data, rows, first_key, num_keys, width, scratch);
  return {data + rows.offset(first_key), static_cast<ptrdiff_t>(rows.row_stride)};
}

// ---- softmax of one vector of lanes
// ---------------------------------------------------------------------------------------

// Of keys [begin, end) of column `s`, whose rows lie kBlockLanes apart.
HWY_INLINE F32 largest_of_column(const float* s, int32_t begin, int32_t end) {
  const F32Tag f;
  const F32 minus_inf = hn::Set(f, kMinusInf);
  F32 max0 = minus_inf, max1 = minus_inf, max2 = minus_inf, max3 = minus_inf;
  int32_t key = begin;
  for (; key + 4 <= end; key += 4) {
    max0 = hn::Max(max0, hn::LoadU(f, s + (key + 0) * kBlockLanes));
    max1 = hn::Max(max1, hn::LoadU(f, s + (key + 1) * kBlockLanes));
    max2 = hn::Max(max2, hn::LoadU(f, s + (key + 2) * kBlockLanes));
    max3 = hn::Max(max3, hn::LoadU(f, s + (key + 3) * kBlockLanes));
  }
  for (; key < end; ++key) max0 = hn::Max(max0, hn::LoadU(f, s + key * kBlockLanes));
  return hn::Max(hn::Max(max0, max1), hn::Max(max2, max3));
}

// What scores are measured from. With every key hidden so far the maximum is -inf, and -inf - -inf would be NaN: then
// 0.
HWY_INLINE F32 reference_of(F32 maximum) {
  return hn::IfThenZeroElse(hn::Eq(maximum, hn::Set(F32Tag(), kMinusInf)), maximum);
}

// Products x to how far their scores lie below the reference, which is the largest of x * scale. One multiply-add does
// it where scores are small. A large score's rounding is worth more than 1: then x * scale is rounded as the reference
// was, so that the largest gives 0.
constexpr float kLargeScore = 8192.0f;
template <bool kFused>
HWY_INLINE F32 scale_below(F32 x, F32 scale, F32 reference) {
  return kFused ? hn::MulSub(x, scale, reference) : hn::Sub(hn::Mul(x, scale), reference);
}
HWY_INLINE bool may_fuse(F32 reference) {
  return hn::AllTrue(F32Tag(), hn::Lt(hn::Abs(reference), hn::Set(F32Tag(), kLargeScore)));
}

// Column `s` (rows kBlockLanes apart), keys [begin, end): scores become probabilities relative to the new maximum.
// kFactor: scores are products yet, to be multiplied by a positive factor.
template <bool kFactor>
HWY_INLINE void softmax_column(float* HWY_RESTRICT s, int32_t begin, int32_t end, float factor, float* m, float* l,
                               float* alpha) {
  const F32Tag f;
  const F32 scale = hn::Set(f, factor);
  F32 largest = largest_of_column(s, begin, end);
  if (kFactor) largest = hn::Mul(largest, scale);
  const F32 old = hn::LoadU(f, m);
  const F32 maximum = hn::Max(old, largest), reference = reference_of(maximum);
  F32 sum = hn::Zero(f);
  const auto exponentiate = [&](const auto& below) HWY_ATTR {
    for (int32_t key = begin; key < end; ++key) {
      float* at = s + key * kBlockLanes;
      const F32 p = exp2_score(below(hn::LoadU(f, at)));
      hn::StoreU(p, f, at);
      sum = hn::Add(sum, p);
    }
  };
  if (!kFactor) {
    exponentiate([&](F32 x) HWY_ATTR { return hn::Sub(x, reference); });
  } else if (may_fuse(reference)) {
    exponentiate([&](F32 x) HWY_ATTR { return scale_below<true>(x, scale, reference); });
  } else {
    exponentiate([&](F32 x) HWY_ATTR { return scale_below<false>(x, scale, reference); });
  }
  const F32 decay = exp2_score(hn::Sub(old, reference));
  hn::StoreU(maximum, f, m);
  hn::StoreU(hn::MulAdd(hn::LoadU(f, l), decay, sum), f, l);
  hn::StoreU(decay, f, alpha);
}

// ---- one unit
// -----------------------------------------------------------------------------------------------------------

constexpr bool kMayPair = HWY_TARGET == HWY_AVX3;  // products of bf16 come with AVX-512 only

// Operands of products of bf16, and which blocks of lanes or keys must not use them (see Bf16Tiles).
struct Bf16Blocks {
  const Bf16Tiles* tiles = nullptr;  // null: all products in f32
  uint32_t *q, *v, *p;               // AMX: v holds V^T
  uint16_t* k;
  uint32_t unsafe_queries = 0;  // bit per block of lanes
  uint32_t f32_queries = 0;     // blocks whose Q^T stands in f32 as well
  bool safe_keys = false;       // of the current block of keys
};

// A worker's scratch, and what of the unit does not change from chunk to chunk.
struct RowUnit {
  const ForwardRun& run;
  const Sequence& sequence;
  int64_t kv_head;
  int64_t num_blocks = 0;  // of 64 lanes
  LaneBlock* lanes;
  float *q, *s, *tile, *row, *k, *v;
  KeyRows k_rows, v_rows;
  Bf16Blocks pairs;

  int64_t head_dim() const { return run.shape.head_dim; }
  int64_t head_dim_v() const { return run.shape.head_dim_v; }
  int64_t block_floats() const { return round_up(head_dim_v(), kRowPad) * kBlockLanes; }  // of O^T of one block
};

// Where a chunk's result goes: O^T, m and l, block after block.
struct RowPartial {
  float *o, *m, *l;
};

// Q^T of one block of lanes in f32, times the scale.
inline void transpose_queries(RowUnit& unit, int64_t block) {
  const AttentionProblem& problem = *unit.run.problem;
  const int64_t d = unit.head_dim();
  const LaneBlock& lanes = unit.lanes[block];
  const auto index = [&](int64_t lane) {
    return row_offset(problem, Slot::kQ, unit.sequence, lanes.head[lane], lanes.query[lane]);
  };
  float* out = unit.q + block * d * kBlockLanes;
  const int64_t count = round_up(lanes.count, kGranule);  // lanes past the count repeat the last row
  if (problem.dtype == Dtype::kF32) {
    const float* q = static_cast<const float*>(unit.run.args->q);
    transpose_rows([&](int64_t lane) { return q + index(lane); }, count, d, unit.run.q_factor, out, kBlockLanes);
    return;
  }
  for (int64_t lane = 0; lane < count; lane += kGranule) {
    float* rows = unit.row;  // [16][d]
    for (int64_t t = 0; t < kGranule; ++t)
      widen_strided(unit.run.args->q, problem.dtype, index(lane + t), 1, d, rows + t * d);
    transpose_rows([&](int64_t t) { return rows + t * d; }, kGranule, d, unit.run.q_factor, out + lane, kBlockLanes);
  }
}

// Q^T of one block of lanes as pairs of bf16, as it is: their products are exact, the scale comes after them.
inline void pair_queries(RowUnit& unit, int64_t block) {
  const AttentionProblem& problem = *unit.run.problem;
  const LaneBlock& lanes = unit.lanes[block];
  const int64_t pairs = unit.run.shape.operand_dim() / 2;
  for (int64_t lane = 0; lane < round_up(lanes.count, kGranule); lane += kGranule) {
    const uint16_t* rows[kGranule];
    for (int64_t t = 0; t < kGranule; ++t) {
      rows[t] = static_cast<const uint16_t*>(unit.run.args->q) +
                row_offset(problem, Slot::kQ, unit.sequence, lanes.head[lane + t], lanes.query[lane + t]);
    }
    uint32_t* out = unit.pairs.q + block * pairs * kBlockLanes + lane;
    if (!unit.pairs.tiles->pack_queries(rows, unit.head_dim(), out)) unit.pairs.unsafe_queries |= 1u << block;
    for (int64_t i = unit.head_dim() / 2; i < pairs; ++i) std::fill_n(out + i * kBlockLanes, kGranule, 0u);
  }
}

// O^T *= alpha for the granules that a block touched; skipped where nothing changes.
inline void rescale(float* o, int64_t head_dim_v, const float* alpha, int first_vector, int end_vector) {
  const F32Tag f;
  for (int v = first_vector; v < end_vector; ++v) {
    const F32 scale = hn::LoadU(f, alpha + v * kLanes);
    if (hn::AllTrue(f, hn::Eq(scale, hn::Set(f, 1.0f)))) continue;
    for (int64_t c = 0; c < head_dim_v; ++c) {
      float* at = o + c * kBlockLanes + v * kLanes;
      hn::StoreU(hn::Mul(hn::LoadU(f, at), scale), f, at);
    }
  }
}

// S^T to P^T for one block of lanes: factor (of the products) and the other terms, ranges, softmax, dropout. alpha:
// what O must be multiplied by.
inline void probabilities(RowUnit& unit, int64_t block, const BlockSpan& span, int64_t first_key, float factor,
                          float* m, float* l, float* alpha) {
  const ForwardRun& run = unit.run;
  const LaneBlock& lanes = unit.lanes[block];
  ScoreTerms terms = run.terms;
  terms.factor = factor;
  // A positive factor and nothing else: it goes into the softmax's own subtraction.
  const bool fold = factor > 0.0f && terms.softcap == 0.0f && terms.bias == nullptr && terms.mask == nullptr &&
                    terms.slopes == nullptr;
  const auto place = [&](int32_t begin, int32_t end, int first, int last) {
    return TileSpan{first_key + begin, end - begin, first * kGranuleVectors, last * kGranuleVectors};
  };
  if (!fold) {
    for (int i = 0; i < span.num_segments; ++i) {
      const Segment& g = span.segments[i];
      finish_scores(terms, lanes, place(g.begin, g.end, g.first, g.last), unit.s + g.begin * kBlockLanes, kBlockLanes,
                    unit.tile, unit.row);
    }
  }
  for (int g = 0; g < kGranules; ++g) {
    const int32_t begin = span.begin[g], end = span.end[g];
    if (begin >= end) continue;
    if (span.cut[g]) hide_range(lanes, place(begin, end, g, g + 1), unit.s + begin * kBlockLanes, kBlockLanes);
    for (int v = g * kGranuleVectors; v < (g + 1) * kGranuleVectors; ++v) {
      const int at = v * kLanes;
      if (fold && factor != 1.0f) {
        softmax_column<true>(unit.s + at, begin, end, factor, m + at, l + at, alpha + at);
      } else {
        softmax_column<false>(unit.s + at, begin, end, 1.0f, m + at, l + at, alpha + at);
      }
    }
    if (run.terms.dropout)
      drop_keys(run.terms, lanes, place(begin, end, g, g + 1), unit.s + begin * kBlockLanes, kBlockLanes);
  }
}

// One block of lanes against one block of keys, all products in f32.
inline void attend_block(RowUnit& unit, int64_t block, const BlockSpan& span, int64_t first_key, const RowBlock& k,
                         const RowBlock& v, const RowPartial& to) {
  const int64_t d = unit.head_dim(), dv = unit.head_dim_v();
  const float* q = unit.q + block * d * kBlockLanes;
  float* o = to.o + block * unit.block_floats();
  HWY_ALIGN float alpha[kBlockLanes];
  for (int i = 0; i < span.num_segments; ++i) {
    const Segment& g = span.segments[i];
    multiply<AOrder::kRows>(g.end - g.begin, (g.last - g.first) * kGranuleVectors, d, k.data + g.begin * k.stride,
                            k.stride, q + g.first * kGranule, kBlockLanes,
                            unit.s + g.begin * kBlockLanes + g.first * kGranule, kBlockLanes, Start::kZero);
  }
  probabilities(unit, block, span, first_key, unit.run.terms.factor, to.m + block * kBlockLanes,
                to.l + block * kBlockLanes, alpha);
  const bool one_segment = span.num_segments == 1;
  for (int g = 0; g < kGranules && !one_segment; ++g)
    if (span.begin[g] < span.end[g]) rescale(o, dv, alpha, g * kGranuleVectors, (g + 1) * kGranuleVectors);
  for (int i = 0; i < span.num_segments; ++i) {
    const Segment& g = span.segments[i];
    multiply<AOrder::kColumns>(dv, (g.last - g.first) * kGranuleVectors, g.end - g.begin, v.data + g.begin * v.stride,
                               v.stride, unit.s + g.begin * kBlockLanes + g.first * kGranule, kBlockLanes,
                               o + g.first * kGranule, kBlockLanes, one_segment ? Start::kScaled : Start::kLoad,
                               alpha + g.first * kGranule);
  }
}

// K and V of one block of keys as operands of the bf16 dot product: K rows side by side, V rows in pairs.
inline void pair_keys(RowUnit& unit, int64_t first_key, int64_t num_keys) {
  const uint16_t *k = static_cast<const uint16_t*>(unit.run.args->k),
                 *v = static_cast<const uint16_t*>(unit.run.args->v);
  const int64_t d = unit.head_dim(), dv = unit.head_dim_v();
  bool safe = true;
  for (int64_t key = 0; key < num_keys; ++key)
    safe &= unit.pairs.tiles->copy_keys(k + unit.k_rows.offset(first_key + key), d, unit.pairs.k + key * d);
  for (int64_t key = 0; key < num_keys; key += 2) {
    const uint16_t* row0 = v + unit.v_rows.offset(first_key + key);
    const uint16_t* row1 = key + 1 < num_keys ? v + unit.v_rows.offset(first_key + key + 1) : nullptr;
    safe &= unit.pairs.tiles->pack_values(row0, row1, dv, unit.pairs.v + key / 2 * dv);
  }
  unit.pairs.safe_keys = safe;
}

// One block of lanes against one block of keys on the bf16 dot product. P is rounded to bf16 for the second product;
// its sums l are those of the f32 numbers.
inline void attend_block_bf16(RowUnit& unit, int64_t block, const BlockSpan& span, int64_t first_key,
                              const RowPartial& to) {
  const int64_t d = unit.head_dim(), dv = unit.head_dim_v();
  const Bf16Tiles& tiles = *unit.pairs.tiles;
  const uint32_t* q = unit.pairs.q + block * d / 2 * kBlockLanes;
  float* o = to.o + block * unit.block_floats();
  HWY_ALIGN float alpha[kBlockLanes];
  for (int i = 0; i < span.num_segments; ++i) {
    const Segment& g = span.segments[i];
    tiles.multiply_keys(g.end - g.begin, g.last - g.first, d / 2, unit.pairs.k + g.begin * d, d, q + g.first * kGranule,
                        unit.s + g.begin * kBlockLanes + g.first * kGranule);
  }
  probabilities(unit, block, span, first_key, unit.run.scale, to.m + block * kBlockLanes, to.l + block * kBlockLanes,
                alpha);
  BlockSpan even = span;  // whole pairs of keys; the ones added have probability 0
  for (int g = 0; g < kGranules; ++g) {
    if (span.begin[g] >= span.end[g]) continue;
    tiles.pack_probabilities(unit.s, span.begin[g], span.end[g], g, unit.pairs.p);
    even.begin[g] &= ~1;
    even.end[g] = (even.end[g] + 1) & ~1;
  }
  find_segments(&even);
  const bool one_segment = even.num_segments == 1;
  for (int g = 0; g < kGranules && !one_segment; ++g)
    if (span.begin[g] < span.end[g]) rescale(o, dv, alpha, g * kGranuleVectors, (g + 1) * kGranuleVectors);
  for (int i = 0; i < even.num_segments; ++i) {
    const Segment& g = even.segments[i];
    tiles.multiply_values(dv, g.last - g.first, (g.end - g.begin) / 2, unit.pairs.v + g.begin / 2 * dv, dv,
                          unit.pairs.p + g.begin / 2 * kBlockLanes + g.first * kGranule, o + g.first * kGranule,
                          one_segment ? alpha + g.first * kGranule : nullptr);
  }
}

// K and V of one block of keys, brought in at the first block of lanes that needs them, in the form that it needs.
struct KeyBlock {
  int64_t first, count;
  bool have_f32 = false, have_pairs = false;
  RowBlock k{}, v{};
};

inline void attend_key_block_f32(RowUnit& unit, int64_t block, const BlockSpan& span, KeyBlock& keys,
                                 const RowPartial& to) {
  const ForwardRun& run = unit.run;
  if (kMayPair && unit.pairs.tiles != nullptr && (unit.pairs.f32_queries >> block & 1u) == 0) {
    transpose_queries(unit, block);
    unit.pairs.f32_queries |= 1u << block;
  }
  if (!keys.have_f32) {
    const bool copy = unit.num_blocks > 1;  // rows of one head side by side: read again by every block of lanes
    keys.k =
        load_rows(run.args->k, run.problem->dtype, unit.k_rows, keys.first, keys.count, unit.head_dim(), copy, unit.k);
    keys.v = load_rows(run.args->v, run.problem->dtype, unit.v_rows, keys.first, keys.count, unit.head_dim_v(), copy,
                       unit.v);
    keys.have_f32 = true;
  }
  attend_block(unit, block, span, keys.first, keys.k, keys.v, to);
}

inline void attend_key_block(RowUnit& unit, int64_t block, const BlockSpan& span, KeyBlock& keys,
                             const RowPartial& to) {
  if (kMayPair && unit.pairs.tiles != nullptr && (unit.pairs.unsafe_queries >> block & 1u) == 0) {
    if (!keys.have_pairs) pair_keys(unit, keys.first, keys.count);
    keys.have_pairs = true;
    if (unit.pairs.safe_keys) return attend_block_bf16(unit, block, span, keys.first, to);
  }
  attend_key_block_f32(unit, block, span, keys, to);
}

inline void clear_partial(const RowUnit& unit, const RowPartial& to) {
  std::fill_n(to.m, unit.num_blocks * kBlockLanes, kMinusInf);
  std::fill_n(to.l, unit.num_blocks * kBlockLanes, 0.0f);
  std::memset(to.o, 0, static_cast<size_t>(unit.num_blocks * unit.block_floats()) * sizeof(float));
}

// Calls attend(keys) for the key blocks that cover [key_lo, key_hi), which lie in one chunk: they start at multiples of
// key_block from the chunk's start `origin`, whatever part of it is visible.
template <class Attend>
void for_key_blocks(const RowUnit& unit, int64_t origin, int64_t key_lo, int64_t key_hi, const Attend& attend) {
  const int64_t step = unit.run.shape.key_block;
  for (int64_t at = origin + (key_lo - origin) / step * step; at < key_hi; at += step)
    attend(KeyBlock{at, HWY_MIN(at + step, key_hi) - at});
}

inline void attend_rows_chunk(RowUnit& unit, int64_t origin, int64_t key_lo, int64_t key_hi, const RowPartial& to) {
  clear_partial(unit, to);
  for_key_blocks(unit, origin, key_lo, key_hi, [&](KeyBlock keys) HWY_ATTR {
    for (int64_t block = 0; block < unit.num_blocks; ++block) {
      BlockSpan span;
      find_span(unit.lanes[block], keys.first, keys.count, &span);
      if (span.num_segments > 0) attend_key_block(unit, block, span, keys, to);
    }
  });
}

// sum = sum (+) part, the one way in which partials are ever joined.
inline void merge_rows(const RowUnit& unit, const RowPartial& part, const RowPartial& sum) {
  const F32Tag f;
  const F32 minus_inf = hn::Set(f, kMinusInf);
  const int64_t dv = unit.head_dim_v();
  for (int64_t i = 0; i < unit.num_blocks * kBlockLanes; i += kLanes) {
    const F32 ma = hn::LoadU(f, sum.m + i), mb = hn::LoadU(f, part.m + i), maximum = hn::Max(ma, mb);
    const F32 reference = hn::IfThenZeroElse(hn::Eq(maximum, minus_inf), maximum);
    const F32 a = exp2_score(hn::Sub(ma, reference)), b = exp2_score(hn::Sub(mb, reference));
    hn::StoreU(maximum, f, sum.m + i);
    hn::StoreU(hn::MulAdd(hn::LoadU(f, part.l + i), b, hn::Mul(hn::LoadU(f, sum.l + i), a)), f, sum.l + i);
    const int64_t first = i / kBlockLanes * unit.block_floats() + i % kBlockLanes;
    for (int64_t c = 0; c < dv; ++c) {
      float* at = sum.o + first + c * kBlockLanes;
      const F32 other = hn::LoadU(f, part.o + first + c * kBlockLanes);
      hn::StoreU(hn::MulAdd(other, b, hn::Mul(hn::LoadU(f, at), a)), f, at);
    }
  }
}

// The last factor of a row and its lse: the sink joins the sum here, once; 1/(1-p) of dropout too.
struct RowEnd {
  float scale, lse;
};

inline RowEnd end_row(const ForwardRun& run, int64_t head, float m, float l) {
  float rest = 1.0f;
  if (run.args->sinks != nullptr && run.problem->sinks) {
    const float sink = run.args->sinks[head] * kLog2e, maximum = std::fmax(m, sink);
    const float reference = maximum == kMinusInf ? 0.0f : maximum;
    rest = std::exp2(m - reference);
    l = l * rest + std::exp2(sink - reference);
    m = maximum;
  }
  if (l == 0.0f) return {0.0f, kMinusInf};
  return {rest / l * run.terms.keep_scale, (m + std::log2(l)) * kLn2};
}

template <class T>
void store_row(const float* row, int64_t count, void* tensor, int64_t offset) {
  narrow_row(row, count, static_cast<T*>(tensor) + offset);
}

inline void store_output_row(const ForwardRun& run, const Sequence& sequence, int64_t head, int64_t query,
                             const float* row) {
  const int64_t offset = row_offset(*run.problem, Slot::kOut, sequence, head, query), dv = run.shape.head_dim_v;
  switch (run.problem->out_dtype) {
    case Dtype::kBf16: return store_row<Bf16>(row, dv, run.args->out, offset);
    case Dtype::kF16: return store_row<F16>(row, dv, run.args->out, offset);
    default: return store_row<float>(row, dv, run.args->out, offset);
  }
}

inline void store_lse(const ForwardRun& run, const Sequence& sequence, int64_t head, int64_t query, float lse) {
  if (run.args->lse == nullptr || !run.problem->lse) return;
  static_cast<float*>(run.args->lse)[row_offset(*run.problem, Slot::kLse, sequence, head, query)] = lse;
}

// O^T / l, transposed back to rows and stored.
inline void finish_rows(RowUnit& unit, const RowPartial& sum) {
  const F32Tag f;
  const int64_t dv = unit.head_dim_v(), pad = round_up(dv, kRowPad);
  float* rows = unit.v;  // [16][pad]
  for (int64_t block = 0; block < unit.num_blocks; ++block) {
    const LaneBlock& lanes = unit.lanes[block];
    float* o = sum.o + block * unit.block_floats();
    const float *m = sum.m + block * kBlockLanes, *l = sum.l + block * kBlockLanes;
    for (int32_t first = 0; first < lanes.count; first += kGranule) {
      HWY_ALIGN float scale[kGranule], lse[kGranule];
      for (int t = 0; t < kGranule; ++t) {
        const RowEnd end = end_row(unit.run, lanes.head[first + t], m[first + t], l[first + t]);
        scale[t] = end.scale;
        lse[t] = end.lse;
      }
      uint32_t bad = 0;  // lanes with a NaN
      for (int v = 0; v < kGranuleVectors; ++v) {
        const F32 factor = hn::Load(f, scale + v * kLanes);
        const auto empty = hn::Eq(factor, hn::Zero(f));  // no visible key: 0, even if a hidden V row made O NaN
        F32 probe = hn::Zero(f);
        float* column = o + first + v * kLanes;
        for (int64_t c = 0; c < dv; ++c, column += kBlockLanes) {
          const F32 x = hn::IfThenZeroElse(empty, hn::Mul(hn::LoadU(f, column), factor));
          probe = hn::MulAdd(x, hn::Zero(f), probe);  // NaN once any x is NaN or Inf
          hn::StoreU(x, f, column);
        }
        if (hn::AllTrue(f, hn::Eq(probe, probe))) continue;  // Ne is false for NaN on x86
        HWY_ALIGN float probes[kLanes];
        hn::Store(probe, f, probes);
        for (int t = 0; t < kLanes; ++t)
          if (probes[t] != probes[t]) bad |= 1u << (v * kLanes + t);
      }
      const int32_t count = HWY_MIN(lanes.count - first, kGranule);
      transpose_rows([&](int64_t c) { return o + first + c * kBlockLanes; }, dv, kGranule, 1.0f, rows, pad);
      for (int32_t t = 0; t < count; ++t) {
        float* row = rows + t * pad;
        const int32_t lane = first + t;
        if ((bad >> t & 1u) != 0 && l[lane] == l[lane]) {
          const int64_t packed = int64_t{lanes.query[lane]} * unit.run.problem->gqa_ratio() +
                                 lanes.head[lane] % unit.run.problem->gqa_ratio();
          attend_row_exactly(unit.run, unit.sequence, unit.kv_head, packed, row);
        }
        store_output_row(unit.run, unit.sequence, lanes.head[lane], lanes.query[lane], row);
        store_lse(unit.run, unit.sequence, lanes.head[lane], lanes.query[lane], lse[t]);
      }
    }
  }
}

}  // namespace heed::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // include guard, flipped per target
