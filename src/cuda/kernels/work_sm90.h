// attention_fwd_sm90: where things lie in shared memory, which rows a block takes, and which keys those see. Host-clean, so
// that tests need no GPU.
#pragma once

#include "params.h"

#ifdef __CUDACC_RTC__
#define HEED_DEVICE __device__ __forceinline__
#else
#define HEED_DEVICE inline
#endif

namespace heed::cuda {

// The rows of one turn of the block's loop. Behind b: variants with lengths only.
struct Work {
  i32 row0, head, b;  // first query, or below 0 by rows_ahead; first head of those that share the tile
  i32 q_begin = 0, q_len = 0, k_len = 0;   // row of query 0 in q, out and lse; queries and keys that count
  i32 written_begin = 0, written_end = 0;  // queries whose rows are written: from q_len on, padding
  i32 lo_shift = 0, hi_shift = 0;          // as in AttentionFwdSm90Params, of this sequence
  i32 offset = 0;                          // position of query i: i + offset
  i32 split = 0;                           // of the keys
};
static_assert(sizeof(Work) == 4 * kSequenceWorkWords);

template <AttentionFwdSm90Variant kV>
struct Layout {
  static constexpr int kChunks = (kV.head_dim + 63) / 64, kChunksV = (kV.head_dim_v + 63) / 64;  // boxes across a row
  static constexpr u32 kChunkQ = 64 * 128, kChunkK = kV.tile_k * 128;
  static constexpr u32 kBytesQ = kChunks * kChunkQ, kBytesO = kChunksV * kChunkQ;  // of a consumer
  static constexpr u32 kBytesK = kChunks * kChunkK, kBytesV = kChunksV * kChunkK;  // of a stage
  static constexpr bool kOutStaged = kV.head_dim <= 128;  // else O leaves straight from registers: memory is short
  // A stage of V is given back at the end of the step that uses it, one of K before: one more where memory has room for it.
  static constexpr int kStagesV = kV.stages + (kV.rings == 2 && kV.head_dim > 192 ? 1 : 0);
  static constexpr u32 kK = kV.consumers * kBytesQ, kVAt = kK + kV.stages * kBytesK, kO = kVAt + kStagesV * kBytesV,
                       kBarriers = kO + (kOutStaged ? kV.consumers * kBytesO : 0);

  static constexpr int kThreads = 128 * (kV.consumers + 1), kTileQ = 64 * kV.consumers;
  // Heads of a group may share a tile: rows are (query, head), query-major. (Terms differ from head to head.)
  static constexpr bool kShares = kV.lengths && !kV.terms;
  static constexpr int kTileWords = kV.lengths ? kSequenceWords : 1;  // that say which rows a consumer's Q holds
  static constexpr int kScores = kV.tile_k / 2, kOut = kV.head_dim_v / 2,
                       kKeySteps = kV.tile_k / 16;  // registers; steps
  // What the block starts with, a thread, and what becomes of it.
  static constexpr int kShare = 65536 / (kThreads * kV.blocks) / 8 * 8, kRegisters = kShare < 248 ? kShare : 248;
  static constexpr int kOfConsumer = kV.consumers == 1   ? (kV.blocks == 3 ? 128
                                                            : kV.terms     ? 232
                                                                           : 224)
                                     : kV.consumers == 2 ? (kV.head_dim > 128 ? 240 : 232)
                                     : kV.consumers == 3 ? 160
                                                         : 112;
  static constexpr int kOfProducer = kV.consumers == 2                                ? (kV.head_dim > 128 ? 24 : 40)
                                     : kV.consumers == 1 && kV.terms && kV.blocks < 3 ? 24
                                                                                      : 32;
  static_assert(kOfProducer + kV.consumers * kOfConsumer <= (kV.consumers + 1) * kRegisters,
                "setmaxnreg would wait for ever");
};

template <AttentionFwdSm90Variant kV>
struct Barriers {
  static constexpr int kStagesV = Layout<kV>::kStagesV, kOfStages = 2 * (kV.stages + kStagesV);
  u32 base;
  HEED_DEVICE u32 k_full(int stage) const { return base + 8 * stage; }
  HEED_DEVICE u32 k_empty(int stage) const { return base + 8 * (kV.stages + stage); }
  HEED_DEVICE u32 v_full(int stage) const { return base + 8 * (2 * kV.stages + stage); }
  HEED_DEVICE u32 v_empty(int stage) const { return base + 8 * (2 * kV.stages + kStagesV + stage); }
  HEED_DEVICE u32 q_full(int consumer) const { return base + 8 * (kOfStages + consumer); }
  HEED_DEVICE u32 q_empty(int consumer) const { return base + 8 * (kOfStages + kV.consumers + consumer); }
  // Where the producer says which tile of rows a consumer's Q is of; kNoMore after the last.
  HEED_DEVICE u32 q_tile(int consumer) const {
    return base + 8 * (kOfStages + (kV.lengths ? 3 : 2) * kV.consumers) + Layout<kV>::kTileWords * 4 * consumer;
  }
  // Lengths: the same, one place for even turns and one for odd ones, so that a consumer may look again; what there is to do,
  // likewise; and the keys that its rows see, [lo, hi), which it has read when it gives Q back.
  HEED_DEVICE u32 work_full(int consumer) const { return base + 8 * (kOfStages + 2 * kV.consumers + consumer); }
  HEED_DEVICE u32 sequence_work(int consumer, u32 parity) const {
    return q_tile(consumer) + parity * (4 * (kSequenceWorkWords + kStepWords));
  }
  HEED_DEVICE u32 steps(int consumer, u32 parity) const {
    return sequence_work(consumer, parity) + 4 * kSequenceWorkWords;
  }
  HEED_DEVICE u32 row_keys(int consumer, int row) const { return sequence_work(consumer, 2) + 8 * row; }
};

// What a consumer is to do about its rows of a turn, in tiles of keys, from the last on: hand back those from kOwnEnd on, which
// only other consumers' rows see; its own, of which those from kFreeBegin up to kFreeEnd need no mask; and hand back others down
// to kStop. kRows: of the consumer's that are queries.
enum StepWord : int { kAllEnd, kOwnEnd, kOwnBegin, kFreeBegin, kFreeEnd, kStop, kRows };

constexpr u32 kNoMore = 0xffffffffu;

template <int kStages>
struct Ring {  // a place in a ring of stages; the parity to wait for
  int stage = 0;
  u32 parity = 0;
  HEED_DEVICE void next() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// ---- which rows, which keys -------------------------------------------------------------------------------------------

HEED_DEVICE i32 at_least(i32 x, i32 least) { return x > least ? x : least; }
HEED_DEVICE i32 at_most(i32 x, i32 most) { return x < most ? x : most; }

// The keys that rows see: lo(i) <= j < hi(i), neither of which falls from one row to the next.
template <AttentionFwdSm90Variant kV>
struct Visible {
  const AttentionFwdSm90Params& a;
  i32 k_len;
  i32 lo_shift = 0, hi_shift = 0, offset = 0;  // of the sequence, with lengths

  HEED_DEVICE i32 lo(i32 row) const {
    if constexpr (kV.lengths) {
      const i32 lo = at_most(at_least(row + lo_shift, 0), k_len);
      return a.chunk > 0 ? at_least(lo, chunk_begin(row)) : lo;
    }
    return kV.has_lower_end ? at_most(at_least(row + a.lo_shift, 0), k_len) : 0;
  }
  HEED_DEVICE i32 hi(i32 row) const {
    if constexpr (kV.lengths) {
      const i32 hi = at_least(at_most(row + hi_shift, k_len), 0);
      if (a.chunk == 0) return hi;
      if (row + offset < 0) return 0;  // chunks of their own, where no key lies
      const u32 end = static_cast<u32>(chunk_begin(row)) + static_cast<u32>(a.chunk);
      return end < static_cast<u32>(hi) ? static_cast<i32>(end) : hi;
    }
    return kV.mask == kMaskNone ? k_len : at_least(at_most(row + a.hi_shift, k_len), 0);
  }

 private:
  // First key of the row's chunk, if there is one; at most k_len.
  HEED_DEVICE i32 chunk_begin(i32 row) const {
    const i32 position = row + offset;
    if (position < 0) return 0;
    return at_most(static_cast<i32>(static_cast<u32>(position) / static_cast<u32>(a.chunk) * static_cast<u32>(a.chunk)),
                   k_len);
  }
};

// What the rows of a turn see.
template <AttentionFwdSm90Variant kV>
HEED_DEVICE Visible<kV> visible_of(const AttentionFwdSm90Params& a, const Work& work) {
  if constexpr (kV.lengths) return {a, work.k_len, work.lo_shift, work.hi_shift, work.offset};
  return {a, static_cast<i32>(a.common.seqlen_k)};
}
// Of the tensor maps of q and out.
template <AttentionFwdSm90Variant kV>
HEED_DEVICE i32 sequence_of_q(const AttentionFwdSm90Params& a, const Work& work) {
  return kV.lengths && a.common.cu_seqlens_q != nullptr ? 0 : work.b;
}
struct TileRange {
  i32 begin = 0, end = 0;
};

// Of rows from `row` on, the first that is a query.
template <AttentionFwdSm90Variant kV>
HEED_DEVICE i32 first_query(i32 row) {
  return kV.mask == kMaskNone || kV.lengths ? row : at_least(row, 0);
}

// Tiles of the keys that rows see, the first of them from lo on, the last of them up to hi.
template <AttentionFwdSm90Variant kV>
HEED_DEVICE TileRange tiles_between(i32 lo, i32 hi, bool has_rows) {
  const i32 begin = static_cast<u32>(lo) / kV.tile_k;
  return {begin, hi > lo && has_rows ? static_cast<i32>((static_cast<u32>(hi) + kV.tile_k - 1) / kV.tile_k) : begin};
}
// Whether the run writes f32 partials, for combine. (Decided at run time without lengths too, it would cost the products of
// every step: the compiler then no longer sees that all lanes have the same descriptors.)
template <AttentionFwdSm90Variant kV>
HEED_DEVICE bool splits_keys(const AttentionFwdParams& p) {
  return kV.split || (kV.lengths && p.partial_lse != nullptr);
}
// Those of them that the turn's split has.
template <AttentionFwdSm90Variant kV>
HEED_DEVICE TileRange of_split(const AttentionFwdParams& p, const Work& work, TileRange range) {
  if (!splits_keys<kV>(p)) return range;
  const i32 begin = at_least(range.begin, work.split * p.split_tiles);
  return {begin, at_least(at_most(range.end, (work.split + 1) * p.split_tiles), begin)};
}
template <AttentionFwdSm90Variant kV>
HEED_DEVICE TileRange tiles_of_rows(const Visible<kV>& visible, i32 first, i32 last) {
  const i32 query = first_query<kV>(first);
  return tiles_between<kV>(visible.lo(query), visible.hi(last), last >= query);
}

// From rows_per_query.
HEED_DEVICE void set_sharing(AttentionFwdSm90Params& a) {
  const u32 sharing = a.common.rows_per_query;
  a.queries_each = 64 / sharing, a.row_to_query = (0xffff + sharing) / sharing;
}

// Queries of a consumer and of a tile of rows; the query, counted from the consumer's first, and the head, from the turn's, of
// a consumer's row.
template <AttentionFwdSm90Variant kV>
HEED_DEVICE i32 queries_each(const AttentionFwdSm90Params& a) {
  return Layout<kV>::kShares ? a.queries_each : 64;
}
template <AttentionFwdSm90Variant kV>
HEED_DEVICE i32 queries_of_tile(const AttentionFwdSm90Params& a) {
  return kV.consumers * queries_each<kV>(a);
}
template <AttentionFwdSm90Variant kV>
HEED_DEVICE i32 query_of_row(const AttentionFwdSm90Params& a, i32 row) {
  return Layout<kV>::kShares ? static_cast<i32>(static_cast<u32>(row) * a.row_to_query >> 16) : row;
}
template <AttentionFwdSm90Variant kV>
HEED_DEVICE i32 head_of_row(const AttentionFwdSm90Params& a, i32 row) {
  return Layout<kV>::kShares ? row - query_of_row<kV>(a, row) * a.common.rows_per_query : 0;
}
template <AttentionFwdSm90Variant kV>
HEED_DEVICE i32 rows_per_query(const AttentionFwdSm90Params& a) {
  return Layout<kV>::kShares ? a.common.rows_per_query : 1;
}
// Rows of a consumer that are some head's: 64 where the heads that share it divide that.
template <AttentionFwdSm90Variant kV>
HEED_DEVICE i32 rows_used(const AttentionFwdSm90Params& a) {
  return queries_each<kV>(a) * rows_per_query<kV>(a);
}
// Where the tensor maps of q and out find a consumer's rows, the first of them of `query`.
struct MapPlace {
  i32 inner, outer;
};
template <AttentionFwdSm90Variant kV>
HEED_DEVICE MapPlace place_of_rows(const AttentionFwdSm90Params& a, const Work& work, i32 query) {
  const i32 row = work.q_begin + query;
  if (rows_per_query<kV>(a) > 1) return {work.head, row};
  return {row, work.head};
}

// Where later rows see more keys, consumers without rows are best in the first tile, whose rows see the fewest: tiles begin so
// many rows before row 0. They are moved by whole consumers, whose diagonals go along with tiles of keys. (With lengths it
// cost more than it gave.)
template <AttentionFwdSm90Variant kV>
HEED_DEVICE i32 rows_ahead(i64 queries) {
  if (kV.mask == kMaskNone || kV.lengths || kV.consumers == 1) return 0;
  const u32 used = (static_cast<u32>(queries) + 63) / 64 % kV.consumers;  // of the tile that is not full
  return used == 0 ? 0 : static_cast<i32>((kV.consumers - used) * 64);
}

// Full: rows of a head one after the other, so that blocks that run together share its K and V. Ranges: the heaviest rows
// first, within sections of heads whose K and V fit the L2 cache together; a section that is not full comes first, as a
// few heads' longest rows at the end would keep a few blocks busy alone.
template <AttentionFwdSm90Variant kV>
HEED_DEVICE Work work_at(const AttentionFwdSm90Params& a, u32 index) {
  const AttentionFwdParams& p = a.common;
  i32 split = 0;
  if (splits_keys<kV>(p)) {  // those of the same rows one after the other
    const u32 splits = static_cast<u32>(p.max_splits);
    split = static_cast<i32>(index % splits);
    index /= splits;
  }
  const u32 sharing = rows_per_query<kV>(a);
  const u32 tiles = static_cast<u32>(p.num_tiles_q), heads = p.nheads_q / sharing;
  u32 tile, batch_head;
  if (kV.mask == kMaskNone || !p.longest_first) {
    tile = index % tiles;
    batch_head = index / tiles;
  } else {
    const u32 section_heads = p.heads_per_section, section_size = section_heads * tiles;
    const u32 all_heads = heads * static_cast<u32>(p.batch), from_end = all_heads * tiles - 1 - index;
    const u32 section = from_end / section_size, rest = from_end % section_size;
    const u32 left = all_heads - section * section_heads, here = left < section_heads ? left : section_heads;
    tile = rest / here;
    batch_head = section * section_heads + rest % here;
  }
  Work work = {static_cast<i32>(tile) * queries_of_tile<kV>(a) - rows_ahead<kV>(p.seqlen_q),
               static_cast<i32>(batch_head % heads * sharing), static_cast<i32>(batch_head / heads)};
  work.split = split;
  return work;
}

// ---- softcap ------------------------------------------------------------------------------------------------------------

// tanh(y) / y as a polynomial in y^2, within 2^-23 of it for |y| <= 0.6 (relative minimax fit).
constexpr float kNearTanh[] = {0.99999993f, -0.3333231f, 0.13310174f, -0.05210148f, 0.01547543f}, kNearTanhLimit = 0.6f;

// From the scale and the cap of this run; a limit below 0 where the powers would leave what a float holds well.
HEED_DEVICE void set_softcap(AttentionFwdSm90Params& a) {
  constexpr float kLn2 = 0.693147180559945f, kLeast = 1e-4f, kMost = 1e3f, kMostScale = 1e9f;
  const float scale = a.common.softmax_scale_log2, to_caps = scale * kLn2 / a.common.softcap;
  const float size = to_caps < 0.0f ? -to_caps : to_caps, scale_size = scale < 0.0f ? -scale : scale;
  a.near_limit = size > kLeast && size < kMost && scale_size < kMostScale ? kNearTanhLimit / size : -1.0f;
  float power = scale;
  for (int i = 0; i < 5; ++i, power *= to_caps * to_caps) a.near[i] = kNearTanh[i] * power;
}

// Where element (row, column) of a tile lies: boxes of 64 columns one after the other, 16-byte units of a row swizzled.
HEED_DEVICE u32 staged(u32 base, u32 chunk_bytes, int row, int column) {
  return base + column / 64 * chunk_bytes + row * 128 + ((column % 64 / 8 ^ row % 8) << 4) + column % 8 * 2;
}

}  // namespace heed::cuda

#undef HEED_DEVICE
