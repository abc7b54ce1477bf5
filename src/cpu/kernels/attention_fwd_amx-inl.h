// Forward, lanes = query rows, products of bf16 on AMX. The division into units, blocks and chunks, the score terms and
// the layouts are those of attention_fwd-inl.h; only who multiplies differs. A tile product takes rows of numbers (A)
// and rows of pairs (B):
//
//   S^T = K Q^T     A = K rows as they lie, copied side by side   B = Q^T in pairs along head_dim, once per unit
//   O^T += V^T P^T  A = V^T, transposed once per key block        B = P^T in pairs of keys, rounded to bf16 by the softmax
//
// AMX does 16 times the multiply-adds of f32 FMA, so at head_dim 64 the softmax takes more time than both products.
// Both run at once: work goes by items of 32 lanes, and while vectors turn item t's scores into probabilities, tiles
// make the scores of item t + 1 and the outputs of item t - 1. Nothing but the order of independent instructions says
// so: a product is begun, a piece of softmax follows, then the product's tiles are stored.
//
// Compiled for AVX-512 only: include inside a foreach_target file, after hwy/highway.h.
#if defined(HEED_CPU_KERNELS_ATTENTION_FWD_AMX_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef HEED_CPU_KERNELS_ATTENTION_FWD_AMX_INL_H_
#undef HEED_CPU_KERNELS_ATTENTION_FWD_AMX_INL_H_
#else
#define HEED_CPU_KERNELS_ATTENTION_FWD_AMX_INL_H_
#endif

#include "hwy/highway.h"

#if HWY_TARGET == HWY_AVX3

#include <immintrin.h>

#include <type_traits>

#include "cpu/kernels/amx_tiles.h"
#include "cpu/kernels/attention_fwd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::cpu::HWY_NAMESPACE {

constexpr int kItemLanes = 32;       // two tiles of 16
constexpr int kStepKeys = 32;        // of a product: two tiles of S^T, or what one product of P^T takes
constexpr int kMaxAmxBlocks = 8;     // of a unit
constexpr int kMaxAmxProducts = 24;  // of an item: 128 / 32 for S^T, 512 / 32 for O^T

// This thread's tiles, while a unit is done.
class AmxInUse {
 public:
  explicit AmxInUse(bool use) : use_(use) {
    if (use_) AmxTiles::configure();
  }
  ~AmxInUse() {
    if (use_) AmxTiles::release();
  }
  AmxInUse(const AmxInUse&) = delete;

 private:
  bool use_;
};

// ---- products
// ---------------------------------------------------------------------------------------------------------------

// C [32 or 16 rows][32 lanes] = or += A B over 32 * num_k; rows of C lie kBlockLanes floats apart.
struct TileProduct {
  const uint16_t* a;
  ptrdiff_t a_stride;  // bf16 between rows
  const uint32_t* b;
  ptrdiff_t b_stride;  // pairs between rows
  float* c;
  int64_t num_k;
  bool two_rows;  // of tiles
  bool add;
};

constexpr ptrdiff_t kTileC = kBlockLanes * sizeof(float);  // bytes between rows of C

// Tiles 0 to 3 are C, 4 and 5 A, 6 and 7 B: four sums on the way at once hide the product's latency.
HWY_INLINE void begin_product(const TileProduct& p) {
  if (p.add) {
    AmxTiles::load<0>(p.c, kTileC);
    AmxTiles::load<1>(p.c + 16, kTileC);
    if (p.two_rows) {
      AmxTiles::load<2>(p.c + 16 * kBlockLanes, kTileC);
      AmxTiles::load<3>(p.c + 16 * kBlockLanes + 16, kTileC);
    }
  } else {
    AmxTiles::zero<0>();
    AmxTiles::zero<1>();
    AmxTiles::zero<2>();
    AmxTiles::zero<3>();
  }
  const ptrdiff_t a_bytes = p.a_stride * 2, b_bytes = p.b_stride * 4;
  for (int64_t k = 0; k < p.num_k; ++k) {
    const uint16_t* a = p.a + k * 32;
    const uint32_t* b = p.b + k * 16 * p.b_stride;
    AmxTiles::load<6>(b, b_bytes);
    AmxTiles::load<7>(b + 16, b_bytes);
    AmxTiles::load<4>(a, a_bytes);
    AmxTiles::dot<0, 4, 6>();
    AmxTiles::dot<1, 4, 7>();
    if (!p.two_rows) continue;
    AmxTiles::load<5>(a + 16 * p.a_stride, a_bytes);
    AmxTiles::dot<2, 5, 6>();
    AmxTiles::dot<3, 5, 7>();
  }
}

HWY_INLINE void end_product(const TileProduct& p) {
  AmxTiles::store<0>(p.c, kTileC);
  AmxTiles::store<1>(p.c + 16, kTileC);
  if (!p.two_rows) return;
  AmxTiles::store<2>(p.c + 16 * kBlockLanes, kTileC);
  AmxTiles::store<3>(p.c + 16 * kBlockLanes + 16, kTileC);
}

struct TileProducts {
  TileProduct list[kMaxAmxProducts];
  int count = 0;
};

// Does all products, and piece(0), piece(1), ... on the way, spread evenly.
template <class Piece>
HWY_INLINE void multiply_beside(const TileProducts& products, int num_pieces, const Piece& piece) {
  int next = 0;
  for (int i = 0; i < num_pieces; ++i) {
    const int end = products.count * (i + 1) / num_pieces;
    for (; next + 1 < end; ++next) {
      begin_product(products.list[next]);
      end_product(products.list[next]);
    }
    if (next < end) begin_product(products.list[next]);
    piece(i);
    if (next < end) end_product(products.list[next++]);
  }
  for (; next < products.count; ++next) {
    begin_product(products.list[next]);
    end_product(products.list[next]);
  }
}

// ---- softmax of 16 lanes
// -------------------------------------------------------------------------------------------------

// 2^x, relative error 3e-6: enough beside a rounding to bf16, and with the exponent's own instructions 7 of
// exp2_score's 12, which is what this kernel's time is made of. Otherwise as there: exactly 1 at 0, exactly 0 below
// -126, NaN stays NaN.
HWY_INLINE F32 exp2_short(F32 x) {
  const F32Tag f;
  const __mmask16 normal = _mm512_cmp_ps_mask(x.raw, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  const F32 r{_mm512_maskz_reduce_ps(__mmask16{0xffff}, x.raw, 0x09)};  // x - floor(x)
  F32 y = hn::MulAdd(hn::Set(f, 1.342668571e-2f), r, hn::Set(f, 5.224247277e-2f));
  y = hn::MulAdd(y, r, hn::Set(f, 2.412802130e-1f));
  y = hn::MulAdd(y, r, hn::Set(f, 6.930448413e-1f));
  y = hn::MulAdd(y, r, hn::Set(f, 1.0f));
  return F32{_mm512_maskz_scalef_ps(normal, y.raw, x.raw)};  // y * 2^floor(x)
}

// Two rows of P^T as bf16 pairs: `low` in the low halves, `high` in the high ones; to nearest, halves away from 0.
HWY_INLINE hn::Vec<U32Tag> pair_of(F32 low, F32 high) {
  const U32Tag u;
  const hn::Repartition<uint16_t, U32Tag> half;
  const auto round = hn::Set(u, 0x8000);
  const auto a = hn::ShiftRight<16>(hn::Add(hn::BitCast(u, low), round)), b = hn::Add(hn::BitCast(u, high), round);
  return hn::BitCast(u, hn::OddEven(hn::BitCast(half, b), hn::BitCast(half, a)));
}

// kStepKeys rows of one column of S^T to pairs of P^T, kItemLanes apart; gives sum plus their sum.
template <bool kFused>
HWY_INLINE F32 exp_step(const float* HWY_RESTRICT s, float factor, F32 reference, F32 sum, uint32_t* HWY_RESTRICT p) {
  const F32Tag f;
  const F32 scale = hn::Set(f, factor);
  for (int key = 0; key < kStepKeys; key += 2, s += 2 * kBlockLanes, p += kItemLanes) {
    const F32 low = exp2_short(scale_below<kFused>(hn::LoadU(f, s), scale, reference));
    const F32 high = exp2_short(scale_below<kFused>(hn::LoadU(f, s + kBlockLanes), scale, reference));
    sum = hn::Add(hn::Add(sum, low), high);
    hn::StoreU(pair_of(low, high), U32Tag(), p);
  }
  return sum;
}

// ---- one block of keys
// ---------------------------------------------------------------------------------------------------

// K and V of one block of keys as operands: K rows side by side, V^T. Says whether both are safe (see Bf16Tiles).
inline bool load_amx_keys(RowUnit& unit, int64_t first_key, int64_t num_keys) {
  const uint16_t *k = static_cast<const uint16_t*>(unit.run.args->k),
                 *v = static_cast<const uint16_t*>(unit.run.args->v);
  const int64_t d = unit.head_dim(), width = unit.run.shape.operand_dim(), stride = unit.run.shape.key_block;
  bool safe = true;
  for (int64_t key = 0; key < num_keys; ++key) {
    uint16_t* row = unit.pairs.k + key * width;
    safe &= unit.pairs.tiles->copy_keys(k + unit.k_rows.offset(first_key + key), d, row);
    std::fill(row + d, row + width, uint16_t{0});
  }
  for (int64_t key = 0; key < num_keys; key += kStepKeys) {
    const uint16_t* rows[kStepKeys];
    for (int64_t t = 0; t < kStepKeys; ++t)
      rows[t] = key + t < num_keys ? v + unit.v_rows.offset(first_key + key + t) : nullptr;
    uint16_t* to = reinterpret_cast<uint16_t*>(unit.pairs.v) + key;
    safe &= unit.pairs.tiles->transpose_values(rows, unit.head_dim_v(), to, stride);
  }
  return safe;
}

// 32 lanes of a block that see some of the key block.
struct AmxItem {
  int64_t block;
  int half;            // of the block
  int32_t begin, end;  // keys that some lane sees, in whole steps
  const BlockSpan* span;
  float* s;     // S^T: where lane 0 of the block would be, if all its lanes had a place
  uint32_t* p;  // P^T in pairs, of the item's lanes

  int first_granule() const { return 2 * half; }
};

// Lanes outside a granule's [begin, end) within the item's: hidden.
inline void hide_outside(const AmxItem& item, int granule) {
  const F32Tag f;
  const F32 hidden = hn::Set(f, kMinusInf);
  const bool none = item.span->begin[granule] >= item.span->end[granule];
  const int32_t begin = none ? item.end : item.span->begin[granule], end = none ? item.end : item.span->end[granule];
  float* s = item.s + granule * kGranule;
  for (int32_t key = item.begin; key < begin; ++key) hn::StoreU(hidden, f, s + key * kBlockLanes);
  for (int32_t key = end; key < item.end; ++key) hn::StoreU(hidden, f, s + key * kBlockLanes);
}

struct AmxBlock {
  RowUnit& unit;
  const RowPartial& to;
  int64_t first_key;
  AmxItem items[2 * kMaxAmxBlocks];
  int num_items = 0;

  float* m(const AmxItem& item, int g) const { return to.m + item.block * kBlockLanes + g * kGranule; }
  float* l(const AmxItem& item, int g) const { return to.l + item.block * kBlockLanes + g * kGranule; }
  float* o(const AmxItem& item) const { return to.o + item.block * unit.block_floats() + item.half * kItemLanes; }
};

inline void add_items(AmxBlock& work, int64_t block, const BlockSpan& span) {
  const int64_t key_block = work.unit.run.shape.key_block;
  for (int half = 0; half < 2; ++half) {
    int32_t begin = static_cast<int32_t>(key_block), end = 0;
    for (int g = 2 * half; g < 2 * half + 2; ++g) {
      if (span.begin[g] >= span.end[g]) continue;
      begin = HWY_MIN(begin, span.begin[g]);
      end = HWY_MAX(end, span.end[g]);
    }
    if (begin >= end) continue;
    const int slot = work.num_items % 2;  // an item's S^T and P^T outlive the next item's beginning
    work.items[work.num_items++] = {block,
                                    half,
                                    begin / kStepKeys * kStepKeys,
                                    (end + kStepKeys - 1) / kStepKeys * kStepKeys,
                                    &span,
                                    work.unit.s + (slot - half) * kItemLanes,
                                    work.unit.pairs.p + slot * (key_block / 2) * kItemLanes};
  }
}

inline void add_score_products(const AmxBlock& work, const AmxItem& item, TileProducts& products) {
  const ForwardShape& shape = work.unit.run.shape;
  const int64_t width = shape.operand_dim();
  const uint32_t* q = work.unit.pairs.q + item.block * width / 2 * kBlockLanes + item.half * kItemLanes;
  for (int32_t key = item.begin; key < item.end; key += kStepKeys)
    products.list[products.count++] = {work.unit.pairs.k + key * width,
                                       width,
                                       q,
                                       kBlockLanes,
                                       item.s + key * kBlockLanes + item.half * kItemLanes,
                                       width / 32,
                                       true,
                                       false};
}

inline void add_output_products(const AmxBlock& work, const AmxItem& item, TileProducts& products) {
  const int64_t stride = work.unit.run.shape.key_block, rows = round_up(work.unit.head_dim_v(), 16);
  const uint16_t* v = reinterpret_cast<const uint16_t*>(work.unit.pairs.v) + item.begin;
  for (int64_t c = 0; c < rows; c += 32)
    products.list[products.count++] = {v + c * stride,
                                       stride,
                                       item.p + item.begin / 2 * kItemLanes,
                                       kItemLanes,
                                       work.o(item) + c * kBlockLanes,
                                       (item.end - item.begin) / kStepKeys,
                                       c + 16 < rows,
                                       true};
}

// From products to scores of an item: the terms of the score and what hides keys.
inline void finish_item_scores(AmxBlock& work, const AmxItem& item, const ScoreTerms& terms, bool fold) {
  RowUnit& unit = work.unit;
  for (int g = item.first_granule(); g < item.first_granule() + 2; ++g) {
    const int32_t begin = item.span->begin[g], end = item.span->end[g];
    if (begin < end) {
      const TileSpan place{work.first_key + begin, end - begin, g, g + 1};
      float* s = item.s + begin * kBlockLanes;
      if (!fold) finish_scores(terms, unit.lanes[item.block], place, s, kBlockLanes, unit.tile, unit.row);
      if (item.span->cut[g]) hide_range(unit.lanes[item.block], place, s, kBlockLanes);
    }
    hide_outside(item, g);
  }
}

// Scores to probabilities of an item, while tiles do `products`; O^T of the item is brought to the new maximum.
inline void attend_item(AmxBlock& work, const AmxItem& item, const TileProducts& products) {
  const F32Tag f;
  RowUnit& unit = work.unit;
  ScoreTerms terms = unit.run.terms;
  terms.factor = unit.run.scale;
  const bool fold = terms.factor > 0.0f && terms.softcap == 0.0f && terms.bias == nullptr && terms.mask == nullptr &&
                    terms.slopes == nullptr;
  finish_item_scores(work, item, terms, fold);
  const float factor = fold ? terms.factor : 1.0f;
  F32 reference[2], sum[2];
  HWY_ALIGN float alpha[kItemLanes];
  for (int t = 0; t < 2; ++t) {
    const int g = item.first_granule() + t;
    const F32 largest = largest_of_column(item.s + g * kGranule, item.begin, item.end);
    const F32 old = hn::LoadU(f, work.m(item, g)), maximum = hn::Max(old, hn::Mul(largest, hn::Set(f, factor)));
    reference[t] = reference_of(maximum);
    hn::Store(exp2_score(hn::Sub(old, reference[t])), f, alpha + t * kGranule);
    hn::StoreU(maximum, f, work.m(item, g));
    sum[t] = hn::Zero(f);
  }
  const int steps = (item.end - item.begin) / kStepKeys;
  const auto exponentiate = [&](auto fused) HWY_ATTR {
    multiply_beside(products, 2 * steps, [&](int i) HWY_ATTR {
      const int t = i / steps;
      const int32_t key = item.begin + i % steps * kStepKeys;
      sum[t] = exp_step<fused>(item.s + key * kBlockLanes + (item.first_granule() + t) * kGranule, factor, reference[t],
                               sum[t], item.p + key / 2 * kItemLanes + t * kGranule);
    });
  };
  if (may_fuse(reference[0]) && may_fuse(reference[1])) {
    exponentiate(std::true_type());
  } else {
    exponentiate(std::false_type());
  }
  for (int t = 0; t < 2; ++t) {
    float* l = work.l(item, item.first_granule() + t);
    hn::StoreU(hn::MulAdd(hn::LoadU(f, l), hn::Load(f, alpha + t * kGranule), sum[t]), f, l);
  }
  rescale(work.o(item), unit.head_dim_v(), alpha, 0, 2);
}

// Dropout on an item's probabilities, rounded and in pairs.
inline void drop_item_keys(const AmxBlock& work, const AmxItem& item) {
  const U32Tag u;
  const hn::Repartition<uint16_t, U32Tag> half;
  const RowUnit& unit = work.unit;
  for (int t = 0; t < 2; ++t) {
    const int g = item.first_granule() + t;
    if (item.span->begin[g] >= item.span->end[g]) continue;
    const TileSpan place{work.first_key + item.begin, item.end - item.begin, g, g + 1};
    for_kept(unit.run.terms, unit.lanes[item.block], place, [&](int32_t key, int32_t, hn::Mask<F32Tag> kept) HWY_ATTR {
      uint32_t* at = item.p + (item.begin + key) / 2 * kItemLanes + t * kGranule;
      const auto both = hn::LoadU(u, at);
      const auto pair = hn::BitCast(half, both),
                 zeroed = hn::BitCast(half, hn::IfThenElseZero(hn::RebindMask(u, kept), both));
      hn::StoreU(hn::BitCast(u, key % 2 == 0 ? hn::OddEven(pair, zeroed) : hn::OddEven(zeroed, pair)), u, at);
    });
  }
}

inline void attend_items(AmxBlock& work) {
  TileProducts products;
  if (work.num_items > 0) add_score_products(work, work.items[0], products);
  multiply_beside(products, 0, [](int) {});
  for (int t = 0; t <= work.num_items; ++t) {
    products.count = 0;
    if (t > 0) add_output_products(work, work.items[t - 1], products);
    if (t == work.num_items) break;
    if (t + 1 < work.num_items) add_score_products(work, work.items[t + 1], products);
    attend_item(work, work.items[t], products);
    if (work.unit.run.terms.dropout) drop_item_keys(work, work.items[t]);
  }
  multiply_beside(products, 0, [](int) {});
}

inline void attend_rows_chunk_amx(RowUnit& unit, int64_t origin, int64_t key_lo, int64_t key_hi, const RowPartial& to) {
  clear_partial(unit, to);
  for_key_blocks(unit, origin, key_lo, key_hi, [&](KeyBlock keys) HWY_ATTR {
    AmxBlock work{unit, to, keys.first};
    BlockSpan spans[kMaxAmxBlocks];
    for (int64_t block = 0; block < unit.num_blocks; ++block) {
      BlockSpan& span = spans[block];
      find_span(unit.lanes[block], keys.first, keys.count, &span);
      if (span.num_segments == 0) continue;
      const bool safe_queries = (unit.pairs.unsafe_queries >> block & 1u) == 0;
      if (safe_queries && !keys.have_pairs) {
        unit.pairs.safe_keys = load_amx_keys(unit, keys.first, keys.count);
        keys.have_pairs = true;
      }
      if (safe_queries && unit.pairs.safe_keys) {
        add_items(work, block, span);
      } else {
        attend_key_block_f32(unit, block, span, keys, to);
      }
    }
    attend_items(work);
  });
}

}  // namespace heed::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // HWY_AVX3

#endif  // include guard, flipped per target
