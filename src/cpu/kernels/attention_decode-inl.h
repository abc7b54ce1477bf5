// Forward for a sequence with few packed query rows (decode), lanes = head_dim: K and V are streamed once for the whole
// group of query heads, at the speed of memory. Per step of 64 keys:
//
//   scores  S[row][key]: one register tile of rows x keys holds as many dot products as a vector has lanes; adding the
//           vectors' transposes gives them all in one vector
//   softmax along the row
//   O[row][head_dim_v] += P V: V rows are vectors, P is broadcast
//
// 16-bit K and V are widened in registers, bf16 two vectors at once. Where the heads of a key lie side by side (layout
// bshd) a unit takes several kv heads, one after another within each step: their rows share pages and cache lines'
// neighbours, and a walk head by head would read a few lines of every page and come back for the next. The rows needed
// next are prefetched on the way. Compiled once per instruction set: include inside a foreach_target file, after
// hwy/highway.h.
#if defined(HEED_CPU_KERNELS_ATTENTION_DECODE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef HEED_CPU_KERNELS_ATTENTION_DECODE_INL_H_
#undef HEED_CPU_KERNELS_ATTENTION_DECODE_INL_H_
#else
#define HEED_CPU_KERNELS_ATTENTION_DECODE_INL_H_
#endif

#include <algorithm>
#include <type_traits>

#include "cpu/kernels/attention_fwd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::cpu::HWY_NAMESPACE {

constexpr int kScoreStride = kDecodeBlock + kRowPad;  // floats between rows of S
// Query rows that share a read of K and V, and vectors of a row of O in registers. Plain C++ gains nothing from more.
constexpr bool kPlain = HWY_TARGET == HWY_EMU128 || HWY_TARGET == HWY_SCALAR;
constexpr int kMostRows = kPlain ? 1 : 4;
constexpr int kMostVectors = kPlain ? 4 : 8;

// Sums of the lanes of kLanes vectors: lane t of the result is the sum of x[t].
HWY_INLINE F32 sum_each(F32* HWY_RESTRICT x) {
  const F32Tag f;
  const hn::Repartition<double, F32Tag> wide;
  // Within 128-bit blocks: after two rounds, block i of x[t/4] holds partial sums of x[t .. t+3].
  for (int t = 0; t < kLanes; t += 4) {
    const F32 a = hn::Add(hn::InterleaveLower(f, x[t], x[t + 1]), hn::InterleaveUpper(f, x[t], x[t + 1]));
    const F32 b = hn::Add(hn::InterleaveLower(f, x[t + 2], x[t + 3]), hn::InterleaveUpper(f, x[t + 2], x[t + 3]));
    const auto a2 = hn::BitCast(wide, a), b2 = hn::BitCast(wide, b);
    x[t / 4] =
        hn::Add(hn::BitCast(f, hn::InterleaveLower(wide, a2, b2)), hn::BitCast(f, hn::InterleaveUpper(wide, a2, b2)));
  }
  // Across blocks: block i of the result is the sum of x[i]'s blocks.
#if HWY_TARGET == HWY_AVX3
  const F32 even = hn::Add(hn::ConcatLowerLower(f, x[2], x[0]), hn::ConcatUpperUpper(f, x[2], x[0]));
  const F32 odd = hn::Add(hn::ConcatLowerLower(f, x[3], x[1]), hn::ConcatUpperUpper(f, x[3], x[1]));
  return hn::OddEvenBlocks(hn::Add(odd, hn::SwapAdjacentBlocks(odd)), hn::Add(even, hn::SwapAdjacentBlocks(even)));
#elif HWY_TARGET == HWY_AVX2
  return hn::Add(hn::ConcatLowerLower(f, x[1], x[0]), hn::ConcatUpperUpper(f, x[1], x[0]));
#else
  return x[0];
#endif
}

// Where the rows of a step's keys lie, and of the step after it, which are prefetched; the last key's again past the
// end.
template <class T>
struct StepRows {
  const T* at[2 * kDecodeBlock];

  // The step that begins at first_key: what stood behind the last step moves up.
  void fill(const T* tensor, const KeyRows& rows, int64_t first_key, int64_t key_end, bool moved) {
    if (moved) {
      std::memcpy(at, at + kDecodeBlock, sizeof(at) / 2);
    } else {
      fill_half(at, tensor, rows, first_key, key_end);
    }
    fill_half(at + kDecodeBlock, tensor, rows, first_key + kDecodeBlock, key_end);
  }

 private:
  static void fill_half(const T** to, const T* tensor, const KeyRows& rows, int64_t first_key, int64_t key_end) {
    const int64_t first = HWY_MIN(first_key, key_end - 1);
    const T* row = tensor + rows.offset(first);
    int64_t run = HWY_MIN(rows.run(first), key_end - first_key);
    if (run >= kDecodeBlock) {
      for (int64_t t = 0; t < kDecodeBlock; ++t) to[t] = row + t * rows.row_stride;
      return;
    }
    for (int64_t t = 0; t < kDecodeBlock; ++t) {
      to[t] = row;
      if (--run > 0) {
        row += rows.row_stride;
      } else if (first_key + t + 1 < key_end) {  // the next page
        row = tensor + rows.offset(first_key + t + 1);
        run = HWY_MIN(rows.run(first_key + t + 1), key_end - first_key - t - 1);
      }
    }
  }
};

// The rows of one head: pointers for head 0 of the unit, plus an offset; and the rows to prefetch meanwhile.
template <class T>
struct HeadRows {
  const T* const* at;
  ptrdiff_t offset;
  const T* const* ahead;
  const T* ahead_rows[kDecodeBlock];

  // Head `head` of the unit. Prefetched are the next step's rows in the order of memory, key by key with all heads of a
  // key in turn, which is what page tables, row buffers and the hardware's own prefetching like; each head takes its
  // share.
  HeadRows(const StepRows<T>& rows, int64_t head, int64_t num_heads, int64_t head_stride)
      : at(rows.at), offset(head * head_stride), ahead(rows.at + kDecodeBlock) {
    if (num_heads == 1) return;
    ahead = ahead_rows;
    int64_t piece = head * kDecodeBlock % num_heads;
    const T* const* key = rows.at + kDecodeBlock + head * kDecodeBlock / num_heads;
    for (int64_t t = 0; t < kDecodeBlock; ++key, piece = 0) {
      const int64_t end = HWY_MIN(t + num_heads - piece, kDecodeBlock);
      for (const T* row = *key + piece * head_stride; t < end; ++t, row += head_stride) ahead_rows[t] = row;
    }
  }
  HeadRows(const HeadRows&) = delete;
};

// Two vectors of a row at once. Two bf16 in a word need one instruction each, where a vector of 16-bit numbers takes
// two: so the first vector is the even elements and the second the odd ones. Rows of Q and O lie in that order too, see
// to_pair_order.
template <class T>
HWY_INLINE void widen_two(const T* row, F32* x) {
  x[0] = widen(row);
  x[1] = widen(row + kLanes);
}
HWY_INLINE void widen_two(const Bf16* row, F32* x) {
  const U32Tag u;
  const auto words =
      hn::BitCast(u, hn::LoadU(hn::Repartition<uint16_t, U32Tag>(), reinterpret_cast<const uint16_t*>(row)));
  x[0] = hn::BitCast(F32Tag(), hn::ShiftLeft<16>(words));
  x[1] = hn::BitCast(F32Tag(), hn::And(words, hn::Set(u, 0xffff0000u)));
}

// kVectors vectors of a row, the last one alone where they are odd in number.
template <int kVectors, class T>
HWY_INLINE void widen_row_part(const T* row, F32* x) {
  for (int t = 0; t + 2 <= kVectors; t += 2) widen_two(row + t * kLanes, x + t);
  if (kVectors % 2 != 0) x[kVectors - 1] = widen(row + (kVectors - 1) * kLanes);
}

// Asks for the cache line that begins with element c of a row, where one does (rows may lie across lines: good enough).
template <class T>
HWY_INLINE void prefetch_at(const T* row, int64_t c) {
  if (c * static_cast<int64_t>(sizeof(T)) % 64 == 0) __builtin_prefetch(row + c, 0, 2);  // into the second level
}

// S[key] for one query row and all keys of the step. kWords: vectors of head_dim, so that Q stays in registers; 0: any.
template <int kWords, class T>
void decode_scores_one(const HeadRows<T>& k, int64_t num_keys, int64_t head_dim, const float* HWY_RESTRICT q,
                       float* HWY_RESTRICT s) {
  const F32Tag f;
  F32 factor[kWords > 0 ? kWords : 1];
  for (int w = 0; w < kWords; ++w) factor[w] = hn::LoadU(f, q + w * kLanes);
  for (int64_t key = 0; key < num_keys; key += kLanes) {
    const T* const* rows = k.at + key;  // past num_keys lie the rows of the next step: sums that nobody reads
    F32 acc[kLanes];
    for (int t = 0; t < kLanes; ++t) {
      const T *row = rows[t] + k.offset, *ahead = k.ahead[key + t];
      acc[t] = hn::Zero(f);
      if (kWords > 0) {
        for (int w = 0; w < kWords; w += 2) {
          prefetch_at(ahead, w * kLanes);
          prefetch_at(ahead, (w + 1) * kLanes);
          F32 x[2];
          widen_two(row + w * kLanes, x);
          acc[t] = hn::MulAdd(x[1], factor[w + 1], hn::MulAdd(x[0], factor[w], acc[t]));
        }
      } else {
        int64_t c = 0;
        for (; c + 2 * kLanes <= head_dim; c += 2 * kLanes) {
          prefetch_at(ahead, c);
          prefetch_at(ahead, c + kLanes);
          F32 x[2];
          widen_two(row + c, x);
          acc[t] = hn::MulAdd(x[0], hn::LoadU(f, q + c), acc[t]);
          acc[t] = hn::MulAdd(x[1], hn::LoadU(f, q + c + kLanes), acc[t]);
        }
        if (c < head_dim) {
          prefetch_at(ahead, c);
          acc[t] = hn::MulAdd(widen(row + c), hn::LoadU(f, q + c), acc[t]);
        }
      }
    }
    hn::StoreU(sum_each(acc), f, s + key);
  }
}

// S[row][key] for kGroup query rows and all keys of the step.
template <int kGroup, class T>
void decode_scores(const HeadRows<T>& k, int64_t num_keys, int64_t head_dim, const float* HWY_RESTRICT q,
                   ptrdiff_t q_stride, float* HWY_RESTRICT s) {
  constexpr int kKeys = kLanes / kGroup;
  const F32Tag f;
  for (int64_t key = 0; key < num_keys; key += kKeys) {
    const T* const* row = k.at + key;
    F32 acc[kLanes];
    for (int t = 0; t < kLanes; ++t) acc[t] = hn::Zero(f);
    int64_t c = 0;
    for (; c + 2 * kLanes <= head_dim; c += 2 * kLanes) {
      F32 even[kGroup], odd[kGroup];
      for (int g = 0; g < kGroup; ++g) {
        even[g] = hn::LoadU(f, q + g * q_stride + c);
        odd[g] = hn::LoadU(f, q + g * q_stride + c + kLanes);
      }
      for (int t = 0; t < kKeys; ++t) {
        prefetch_at(k.ahead[key + t], c);
        prefetch_at(k.ahead[key + t], c + kLanes);
        F32 x[2];
        widen_two(row[t] + k.offset + c, x);
        for (int g = 0; g < kGroup; ++g) {
          F32& sum = acc[g * kKeys + t];
          sum = hn::MulAdd(x[1], odd[g], hn::MulAdd(x[0], even[g], sum));
        }
      }
    }
    if (c < head_dim) {
      for (int t = 0; t < kKeys; ++t) {
        prefetch_at(k.ahead[key + t], c);
        const F32 x = widen(row[t] + k.offset + c);
        for (int g = 0; g < kGroup; ++g)
          acc[g * kKeys + t] = hn::MulAdd(x, hn::LoadU(f, q + g * q_stride + c), acc[g * kKeys + t]);
      }
    }
    HWY_ALIGN float each[kLanes];
    hn::Store(sum_each(acc), f, each);
    for (int g = 0; g < kGroup; ++g) std::memcpy(s + g * kScoreStride + key, each + g * kKeys, kKeys * sizeof(float));
  }
}

template <class T>
void decode_scores_one_row(const HeadRows<T>& k, int64_t num_keys, int64_t head_dim, const float* q, float* s) {
  constexpr int kFour = kPlain ? 0 : 4, kEight = kPlain ? 0 : 8;
  if (head_dim == kFour * kLanes) return decode_scores_one<kFour>(k, num_keys, head_dim, q, s);
  if (head_dim == kEight * kLanes) return decode_scores_one<kEight>(k, num_keys, head_dim, q, s);
  decode_scores_one<0>(k, num_keys, head_dim, q, s);
}

// O[row][c ...] = O * decay + sum over keys of P[row][key] V[key][c ...], kGroup rows by kVectors vectors.
template <int kGroup, int kVectors, class T>
HWY_INLINE void decode_values_tile(const HeadRows<T>& v, int64_t num_keys, int64_t c, const float* HWY_RESTRICT p,
                                   const float* HWY_RESTRICT decay, float* HWY_RESTRICT o, ptrdiff_t o_stride) {
  const F32Tag f;
  F32 acc[kGroup][kVectors];
  for (int g = 0; g < kGroup; ++g)
    for (int t = 0; t < kVectors; ++t)
      acc[g][t] = hn::Mul(hn::LoadU(f, o + g * o_stride + c + t * kLanes), hn::Set(f, decay[g]));
  for (int64_t key = 0; key < num_keys; ++key) {
    const T *row = v.at[key] + v.offset + c, *ahead = v.ahead[key] + c;
    F32 x[kVectors];
    for (int t = 0; t < kVectors; ++t) prefetch_at(ahead, t * kLanes);
    widen_row_part<kVectors>(row, x);
    for (int g = 0; g < kGroup; ++g) {
      const F32 factor = hn::Set(f, p[g * kScoreStride + key]);
      for (int t = 0; t < kVectors; ++t) acc[g][t] = hn::MulAdd(factor, x[t], acc[g][t]);
    }
  }
  for (int g = 0; g < kGroup; ++g)
    for (int t = 0; t < kVectors; ++t) hn::StoreU(acc[g][t], f, o + g * o_stride + c + t * kLanes);
}

template <int kGroup, class T>
void decode_values(const HeadRows<T>& v, int64_t num_keys, int64_t head_dim_v, const float* p, const float* decay,
                   float* o, ptrdiff_t o_stride) {
  constexpr int kWide = kGroup == 4 ? 4 : kMostVectors;
  int64_t c = 0;
  for (; kWide > 4 && c + kWide * kLanes <= head_dim_v; c += kWide * kLanes)
    decode_values_tile<kGroup, kWide>(v, num_keys, c, p, decay, o, o_stride);
  for (; c + 4 * kLanes <= head_dim_v; c += 4 * kLanes)
    decode_values_tile<kGroup, 4>(v, num_keys, c, p, decay, o, o_stride);
  for (; c + 2 * kLanes <= head_dim_v; c += 2 * kLanes)
    decode_values_tile<kGroup, 2>(v, num_keys, c, p, decay, o, o_stride);
  for (; c < head_dim_v; c += kLanes) decode_values_tile<kGroup, 1>(v, num_keys, c, p, decay, o, o_stride);
}

// One query row of the unit.
struct DecodeRow {
  int64_t query, head, position;
  KeyRange keys;
  float slope;
};

struct DecodePartial {
  float *o, *m, *l;  // o: [row][width_v]
};

struct DecodeUnit {
  const ForwardRun& run;
  const UnitTask& task;
  int64_t head_rows;  // query rows per kv head
  int64_t num_rows;   // of all the unit's kv heads
  DecodeRow rows[kDecodeHeads * kDecodeRows];
  float *q, *s, *tmp, *k, *v;
  KeyRows k_rows, v_rows;

  // Rows of K and V are read where they lie; else they are copied beside zeros, as f32. Plain C++ widens them once so.
  bool in_place() const {
    return run.shape.head_dim % kLanes == 0 && run.shape.head_dim_v % kLanes == 0 &&
           (!kPlain || run.problem->dtype == Dtype::kF32);
  }
  int64_t width() const { return round_up(run.shape.head_dim, kRowPad); }
  int64_t width_v() const { return round_up(run.shape.head_dim_v, kRowPad); }
};

// Rows of Q and O in the order in which widen_two gives the elements of rows beside them: for each two vectors of bf16,
// even elements first.
inline bool in_pairs(const DecodeUnit& unit) { return unit.run.problem->dtype == Dtype::kBf16 && unit.in_place(); }
inline void to_pair_order(const float* HWY_RESTRICT row, int64_t count, float* HWY_RESTRICT pairs) {
  int64_t c = 0;
  for (; c + 2 * kLanes <= count; c += 2 * kLanes) {
    for (int64_t t = 0; t < kLanes; ++t) pairs[c + t] = row[c + 2 * t];
    for (int64_t t = 0; t < kLanes; ++t) pairs[c + kLanes + t] = row[c + 2 * t + 1];
  }
  std::copy(row + c, row + count, pairs + c);
}
inline void from_pair_order(const float* HWY_RESTRICT pairs, int64_t count, float* HWY_RESTRICT row) {
  int64_t c = 0;
  for (; c + 2 * kLanes <= count; c += 2 * kLanes) {
    for (int64_t t = 0; t < kLanes; ++t) row[c + 2 * t] = pairs[c + t];
    for (int64_t t = 0; t < kLanes; ++t) row[c + 2 * t + 1] = pairs[c + kLanes + t];
  }
  std::copy(pairs + c, pairs + count, row + c);
}

// The terms of finish_scores for one query row, keys along the lanes.
inline void finish_score_row(const ForwardRun& run, const DecodeRow& row, int64_t batch, int64_t first_key,
                             int64_t num_keys, float* s, float* tmp) {
  const F32Tag f;
  const ScoreTerms& terms = run.terms;
  cap_scores(terms, TileSpan{first_key, 1, 0, static_cast<int32_t>((num_keys + kLanes - 1) / kLanes)}, s, 0);
  if (terms.bias != nullptr) {
    const int64_t index = batch * terms.bias_stride[0] + row.head * terms.bias_stride[1] +
                          row.query * terms.bias_stride[2] + first_key * terms.bias_stride[3];
    widen_strided(terms.bias, terms.bias_dtype, index, terms.bias_stride[3], num_keys, tmp);
    for (int64_t key = 0; key < num_keys; key += kLanes)
      hn::StoreU(hn::MulAdd(hn::LoadU(f, tmp + key), hn::Set(f, kLog2e), hn::LoadU(f, s + key)), f, s + key);
  }
  if (terms.slopes != nullptr) {
    const float to_first = static_cast<float>(row.position - first_key);
    for (int64_t key = 0; key < num_keys; ++key) s[key] -= row.slope * std::fabs(to_first - static_cast<float>(key));
  }
  if (terms.mask != nullptr) {
    const uint8_t* may = terms.mask + batch * terms.mask_stride[0] + row.head * terms.mask_stride[1] +
                         row.query * terms.mask_stride[2] + first_key * terms.mask_stride[3];
    for (int64_t key = 0; key < num_keys; ++key)
      if (may[key * terms.mask_stride[3]] == 0) s[key] = kMinusInf;
  }
}

inline void drop_row_keys(const ForwardRun& run, const DecodeRow& row, int64_t batch, int64_t first_key,
                          int64_t num_keys, float* p) {
  for (int64_t key = 0; key < num_keys; ++key)
    if (!key_is_kept(run.terms, batch, row.head, row.query, first_key + key)) p[key] = 0.0f;
}

// S of one row, keys [0, num_keys), to P; updates m and l, gives what O must be multiplied by.
inline float decode_softmax(float* s, int64_t num_keys, float* m, float* l) {
  const F32Tag f;
  const int64_t padded = round_up(num_keys, kLanes);
  for (int64_t key = num_keys; key < padded; ++key) s[key] = kMinusInf;
  F32 largest = hn::Set(f, *m);
  for (int64_t key = 0; key < padded; key += kLanes) largest = hn::Max(largest, hn::LoadU(f, s + key));
  const float maximum = hn::GetLane(hn::MaxOfLanes(f, largest));
  const float reference = maximum == kMinusInf ? 0.0f : maximum;
  F32 sum = hn::Zero(f);
  for (int64_t key = 0; key < padded; key += kLanes) {
    const F32 p = exp2_score(hn::Sub(hn::LoadU(f, s + key), hn::Set(f, reference)));
    hn::StoreU(p, f, s + key);
    sum = hn::Add(sum, p);
  }
  const float decay = hn::GetLane(exp2_score(hn::Set(f, *m - reference)));
  *m = maximum;
  *l = *l * decay + hn::GetLane(hn::SumOfLanes(f, sum));
  return decay;
}

// Calls each(r, number of rows) for rows [r, end), in groups as large as registers allow.
template <class Each>
HWY_INLINE void for_row_groups(int64_t r, int64_t end, const Each& each) {
  if constexpr (kMostRows >= 4)
    for (; end - r >= 4; r += 4) each(r, std::integral_constant<int, 4>());
  if constexpr (kMostRows >= 2)
    for (; end - r >= 2; r += 2) each(r, std::integral_constant<int, 2>());
  for (; r < end; ++r) each(r, std::integral_constant<int, 1>());
}

// One step of one kv head, whose query rows are [first_row, first_row + head_rows) of the unit.
template <class T>
void decode_step(DecodeUnit& unit, int64_t first_row, const HeadRows<T>& k, const HeadRows<T>& v, int64_t first_key,
                 int64_t num_keys, const DecodePartial& to) {
  const ForwardRun& run = unit.run;
  const int64_t d = unit.width(), dv = unit.width_v(), d_end = round_up(run.shape.head_dim, kLanes),
                dv_end = round_up(run.shape.head_dim_v, kLanes), batch = unit.task.work->where.batch;
  const int64_t end = first_row + unit.head_rows;
  float decay[kDecodeRows];
  for_row_groups(first_row, end, [&](int64_t r, auto rows) HWY_ATTR {
    float *s = unit.s + (r - first_row) * kScoreStride, *q = unit.q + r * d;
    if constexpr (rows() == 1) {
      decode_scores_one_row(k, num_keys, d_end, q, s);
    } else {
      decode_scores<rows()>(k, num_keys, d_end, q, d, s);
    }
  });
  const bool plain = run.terms.plain();
  for (int64_t r = first_row; r < end; ++r) {
    float* s = unit.s + (r - first_row) * kScoreStride;
    const DecodeRow& row = unit.rows[r];
    if (!plain) finish_score_row(run, row, batch, first_key, num_keys, s, unit.tmp);
    const int64_t lo = HWY_MIN(row.keys.lo - first_key, num_keys), hi = HWY_MAX(row.keys.hi - first_key, int64_t{0});
    for (int64_t key = 0; key < lo; ++key) s[key] = kMinusInf;
    for (int64_t key = hi; key < num_keys; ++key) s[key] = kMinusInf;
    decay[r - first_row] = decode_softmax(s, num_keys, to.m + r, to.l + r);
    if (run.terms.dropout) drop_row_keys(run, row, batch, first_key, num_keys, s);
  }
  for_row_groups(first_row, end, [&](int64_t r, auto rows) HWY_ATTR {
    const int64_t at = r - first_row;
    decode_values<rows()>(v, num_keys, dv_end, unit.s + at * kScoreStride, decay + at, to.o + r * dv, dv);
  });
}

// Steps over rows where they lie.
template <class T>
void decode_in_place(DecodeUnit& unit, int64_t first_key, int64_t key_end, const DecodePartial& to) {
  const T *k = static_cast<const T*>(unit.run.args->k), *v = static_cast<const T*>(unit.run.args->v);
  const int64_t heads = unit.task.num_heads;
  const int64_t k_stride = unit.run.problem->strides(Slot::kK)[1], v_stride = unit.run.problem->strides(Slot::kV)[1];
  StepRows<T> k_rows, v_rows;
  for (int64_t at = first_key; at < key_end; at += kDecodeBlock) {
    k_rows.fill(k, unit.k_rows, at, key_end, at > first_key);
    v_rows.fill(v, unit.v_rows, at, key_end, at > first_key);
    for (int64_t head = 0; head < heads; ++head) {
      decode_step<T>(unit, head * unit.head_rows, HeadRows<T>(k_rows, head, heads, k_stride),
                     HeadRows<T>(v_rows, head, heads, v_stride), at, HWY_MIN(kDecodeBlock, key_end - at), to);
    }
  }
}

// Rows copied first, head by head.
inline void decode_copied(DecodeUnit& unit, int64_t first_key, int64_t key_end, const DecodePartial& to) {
  const ForwardRun& run = unit.run;
  const int64_t d = unit.width(), dv = unit.width_v();
  const int64_t k_stride = run.problem->strides(Slot::kK)[1], v_stride = run.problem->strides(Slot::kV)[1];
  StepRows<float> k_rows, v_rows;
  for (int64_t at = first_key; at < key_end; at += kDecodeBlock) {
    const int64_t n = HWY_MIN(kDecodeBlock, key_end - at);
    for (int64_t t = 0; t < 2 * kDecodeBlock; ++t) {
      k_rows.at[t] = unit.k + HWY_MIN(t, n - 1) * d;
      v_rows.at[t] = unit.v + HWY_MIN(t, n - 1) * dv;
    }
    for (int64_t head = 0; head < unit.task.num_heads; ++head) {
      for (int64_t t = 0; t < n; ++t) {
        float *k = unit.k + t * d, *v = unit.v + t * dv;
        std::fill(k + run.shape.head_dim, k + d, 0.0f);
        std::fill(v + run.shape.head_dim_v, v + dv, 0.0f);
        widen_strided(run.args->k, run.problem->dtype, unit.k_rows.offset(at + t) + head * k_stride, 1,
                      run.shape.head_dim, k);
        widen_strided(run.args->v, run.problem->dtype, unit.v_rows.offset(at + t) + head * v_stride, 1,
                      run.shape.head_dim_v, v);
      }
      decode_step<float>(unit, head * unit.head_rows, HeadRows<float>(k_rows, 0, 1, 0),
                         HeadRows<float>(v_rows, 0, 1, 0), at, n, to);
    }
  }
}

template <class T>
void decode_in_place_if_ever(DecodeUnit& unit, int64_t first_key, int64_t key_end, const DecodePartial& to) {
  if constexpr (!kPlain) decode_in_place<T>(unit, first_key, key_end, to);
}

inline void decode_chunk(DecodeUnit& unit, int64_t origin, int64_t key_lo, int64_t key_hi, const DecodePartial& to) {
  const ForwardRun& run = unit.run;
  std::fill(to.m, to.m + unit.num_rows, kMinusInf);
  std::fill(to.l, to.l + unit.num_rows, 0.0f);
  std::memset(to.o, 0, static_cast<size_t>(unit.num_rows * unit.width_v()) * sizeof(float));
  const int64_t first = origin + (key_lo - origin) / kDecodeBlock * kDecodeBlock;
  if (!unit.in_place()) return decode_copied(unit, first, key_hi, to);
  if (run.problem->dtype == Dtype::kBf16) return decode_in_place_if_ever<Bf16>(unit, first, key_hi, to);
  if (run.problem->dtype == Dtype::kF16) return decode_in_place_if_ever<F16>(unit, first, key_hi, to);
  decode_in_place<float>(unit, first, key_hi, to);
}

inline void merge_decode(const DecodeUnit& unit, const DecodePartial& part, const DecodePartial& sum) {
  const F32Tag f;
  const int64_t dv = unit.width_v();
  for (int64_t r = 0; r < unit.num_rows; ++r) {
    const float maximum = std::fmax(sum.m[r], part.m[r]), reference = maximum == kMinusInf ? 0.0f : maximum;
    const F32 a = exp2_score(hn::Set(f, sum.m[r] - reference)), b = exp2_score(hn::Set(f, part.m[r] - reference));
    sum.m[r] = maximum;
    sum.l[r] = sum.l[r] * hn::GetLane(a) + part.l[r] * hn::GetLane(b);
    for (int64_t c = 0; c < dv; c += kLanes) {
      float* at = sum.o + r * dv + c;
      hn::StoreU(hn::MulAdd(hn::LoadU(f, part.o + r * dv + c), b, hn::Mul(hn::LoadU(f, at), a)), f, at);
    }
  }
}

inline void finish_decode(DecodeUnit& unit, const DecodePartial& sum) {
  const Sequence& sequence = unit.task.work->where;
  const int64_t dv = unit.run.shape.head_dim_v;
  for (int64_t r = 0; r < unit.num_rows; ++r) {
    const DecodeRow& row = unit.rows[r];
    const RowEnd end = end_row(unit.run, row.head, sum.m[r], sum.l[r]);
    float* o = sum.o + r * unit.width_v();
    float probe = 0.0f;
    for (int64_t c = 0; c < dv; ++c) {
      o[c] = end.scale == 0.0f ? 0.0f : o[c] * end.scale;
      probe += o[c] * 0.0f;
    }
    if (in_pairs(unit)) {
      from_pair_order(o, dv, unit.v);  // scratch for rows of V, no longer read
      o = unit.v;
    }
    if (probe != probe && sum.l[r] == sum.l[r]) {
      const int64_t group = unit.run.problem->gqa_ratio();
      attend_row_exactly(unit.run, sequence, row.head / group, row.query * group + row.head % group, o);
    }
    store_output_row(unit.run, sequence, row.head, row.query, o);
    store_lse(unit.run, sequence, row.head, row.query, end.lse);
  }
}

// Query rows of the unit as f32 beside zeros, and their place.
inline void load_decode_rows(DecodeUnit& unit) {
  const ForwardRun& run = unit.run;
  const AttentionProblem& problem = *run.problem;
  const Sequence& sequence = unit.task.work->where;
  const int64_t group = problem.gqa_ratio(), d = unit.width();
  for (int64_t r = 0; r < unit.num_rows; ++r) {
    DecodeRow& row = unit.rows[r];
    const int64_t in_head = r % unit.head_rows;
    row.query = in_head / group;
    row.head = (unit.task.kv_head + r / unit.head_rows) * group + in_head % group;
    row.position = row.query + sequence.offset;
    row.keys = visible_keys(problem, sequence.k_len, row.position);
    row.slope =
        run.terms.slopes == nullptr
            ? 0.0f
            : run.terms.slopes[sequence.batch * run.terms.slope_stride[0] + row.head * run.terms.slope_stride[1]] *
                  kLog2e;
    float *q = unit.q + r * d, *to = in_pairs(unit) ? unit.k : q;  // scratch for rows of K, not yet read
    widen_strided(run.args->q, problem.dtype, row_offset(problem, Slot::kQ, sequence, row.head, row.query), 1,
                  run.shape.head_dim, to);
    for (int64_t c = 0; c < run.shape.head_dim; ++c) to[c] *= run.q_factor;
    if (in_pairs(unit)) to_pair_order(to, run.shape.head_dim, q);
    std::fill(q + run.shape.head_dim, q + d, 0.0f);
  }
}

}  // namespace heed::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // include guard, flipped per target
