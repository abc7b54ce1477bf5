// attention_fwd_sm90: which rows of which sequence a turn of the block's loop has, where lengths come from the device. The
// loading thread works this out, and leaves it beside Q in shared memory; the warp behind it works out what keys they see.
#pragma once

#include "mma_sm90.cuh"
#include "params.h"
#include "ptx.cuh"
#include "rows.cuh"
#include "work_sm90.h"

namespace heed::cuda {

// Where the loading thread finds a turn's keys.
struct KeyPlace {
  i32 row = 0;       // of key 0 in k and v; pages: in the sequence's row of the page table
  i32 sequence = 0;  // of k and v; pages: row of the page table
};

__device__ __forceinline__ i32 within_far(i64 shift) {
  constexpr i64 kMost = 1 << 30;
  return static_cast<i32>(min(max(shift, -kMost), kMost));
}

// Packed queries: sequence b owns the slots from cu[b] / tile_q + b up to the next one's, as many tiles as it can need, and
// each slot is one of every head. Within a sequence the last rows come first under causal masks, for as many heads at a time
// as share the L2 cache. False where no sequence owns the slot. `b` starts where the block's turn before this was.
template <AttentionFwdSm90Variant kV>
__device__ __forceinline__ bool packed_rows(const AttentionFwdSm90Params& a, u32 index, Work& work) {
  const AttentionFwdParams& p = a.common;
  const i32 batch = static_cast<i32>(p.batch), of_tile = queries_of_tile<kV>(a);
  const u32 sharing = rows_per_query<kV>(a), heads = p.nheads_q / sharing;
  const auto first_of = [&](i64 row, i32 b) {  // divided by a constant where that is what it is
    const u32 place = static_cast<u32>(row);
    return ((sharing == 1 ? place / Layout<kV>::kTileQ : place / static_cast<u32>(of_tile)) + b) * heads;
  };
  u32 first = 0, next = 0;
  if (p.sequence_status[batch] == 0) {
    i32 b = work.b, step = 1;
    for (; b + step < batch && first_of(p.cu_seqlens_q[b + step], b + step) <= index; step *= 2) b += step;
    for (; step > 0; step /= 2)
      if (b + step < batch && first_of(p.cu_seqlens_q[b + step], b + step) <= index) b += step;
    work.b = b;
    first = first_of(p.cu_seqlens_q[b], b), next = first_of(p.cu_seqlens_q[b + 1], b + 1);
    if (index >= next) return false;
  } else {  // entries out of order count as the largest good one before them; all rows have been cleared
    i64 row = 0;
    i32 b = 0;
    for (; b <= batch; ++b) {
      if (p.cu_seqlens_q[b] <= p.total_q) row = max(row, static_cast<i64>(p.cu_seqlens_q[b]));
      next = first_of(row, b);
      if (next > index) break;
      first = next;
    }
    work.b = b - 1;
    if (b > batch || p.sequence_status[work.b] != 0) return false;
  }
  const u32 tiles = (next - first) / heads, at_once = min(static_cast<u32>(p.heads_per_section), heads);
  const u32 section = (index - first) / (at_once * tiles), rest = (index - first) % (at_once * tiles);
  const u32 here = min(at_once, heads - section * at_once), tile = rest / here;
  work.head = static_cast<i32>((section * at_once + rest % here) * sharing);
  work.row0 = static_cast<i32>(p.longest_first ? tiles - 1 - tile : tile) * of_tile;
  return true;
}

// False where the turn has no row to write.
template <AttentionFwdSm90Variant kV>
__device__ __forceinline__ bool locate(const AttentionFwdSm90Params& a, u32 index, Work& work, KeyPlace& keys) {
  const AttentionFwdParams& p = a.common;
  if (p.cu_seqlens_q != nullptr) {
    const u32 splits = splits_keys<kV>(p) ? static_cast<u32>(p.max_splits) : 1;
    if (!packed_rows<kV>(a, index / splits, work)) return false;
    work.split = static_cast<i32>(index % splits);
  } else {
    work = work_at<kV>(a, index);
  }
  if (a.lengths_known) {
    work.q_begin = work.written_begin = 0;
    work.q_len = work.written_end = static_cast<i32>(p.seqlen_q), work.k_len = static_cast<i32>(p.seqlen_k);
    work.lo_shift = a.lo_shift, work.hi_shift = a.hi_shift, work.offset = a.offset;
    keys.row = 0, keys.sequence = work.b;
    return true;
  }
  BlockWork w;
  w.b = work.b;
  locate_sequence(p, w);
  if (p.sequence_status != nullptr && p.sequence_status[w.b] != 0) w.q_len = w.k_len = 0;
  work.written_begin = 0, work.written_end = w.q_rows;
  const i64 rows = static_cast<i64>(w.q_len) * p.gqa_ratio;
  if (rows < p.min_rows) {  // decode's: padding only
    work.written_begin = w.q_len;
    w.q_len = w.k_len = 0;
  }
  if (work.row0 >= work.written_end || work.row0 + queries_of_tile<kV>(a) <= work.written_begin) return false;
  work.q_begin = static_cast<i32>(w.q_begin), work.q_len = w.q_len, work.k_len = w.k_len;
  const i64 left = p.window_left, right = p.window_right;
  constexpr i64 kMost = 1 << 30;
  work.lo_shift = left >= 0 ? within_far(w.offset - min(left, 2 * kMost)) : -static_cast<i32>(kMost);
  work.hi_shift = right >= 0 ? within_far(w.offset + 1 + min(right, 2 * kMost)) : static_cast<i32>(kMost);
  work.offset = within_far(w.offset);
  keys.row = static_cast<i32>(w.k_begin), keys.sequence = static_cast<i32>(w.cache_row);
  return true;
}

// A tile of K or V out of pages, a box of which lies in one page each; boxes behind the sequence's last key, whose pages
// nobody has stated, come as 0.
template <AttentionFwdSm90Variant kV>
__device__ __forceinline__ void load_pages(const AttentionFwdSm90Params& a, const TensorMap& map, u32 dst, int chunks,
                                           u32 barrier, i32 first_key, i32 k_len, i32 head, i32 table_row) {
  constexpr int kAtOnce = 4;  // look-ups under way together
  const AttentionFwdParams& p = a.common;
  const u32 page_size = p.page_size;
  const i32* table = p.page_table + table_row * p.page_table_stride;
#pragma unroll 1
  for (i32 row = 0; row < kV.tile_k; row += kAtOnce * a.page_box) {
    i32 page[kAtOnce], row_of_page[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const u32 key = first_key + row + i * a.page_box;
      const bool has_keys = static_cast<i32>(key) < k_len;
      page[i] = has_keys ? table[key / page_size * p.page_table_step] : 0;
      row_of_page[i] = static_cast<i32>(has_keys ? key % page_size : page_size);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const i32 at = row + i * a.page_box;
#pragma unroll 1
      for (int c = 0; c < chunks && at < kV.tile_k; ++c)
        tma_load(dst + c * Layout<kV>::kChunkK + at * 128, map, barrier, c * 64, row_of_page[i], head, page[i],
                 kEvictLast);
    }
  }
}

__device__ __forceinline__ void store_work(u32 place, const Work& work) {
  const i32 words[] = {work.row0,  work.head,          work.b,           work.q_begin,  work.q_len, work.k_len,
                       work.written_begin, work.written_end, work.lo_shift, work.hi_shift, work.offset, work.split};
  static_assert(sizeof words == 4 * kSequenceWorkWords);
#pragma unroll
  for (int i = 0; i < kSequenceWorkWords; ++i) store_shared(place + 4 * i, static_cast<u32>(words[i]));
}
// What the producer has left after the last turn is a row0 of kNoMore.
__device__ __forceinline__ Work load_work(u32 place) {
  const auto word = [&](int i) { return static_cast<i32>(load_shared(place + 4 * i)); };
  return {word(0), word(1), word(2), word(3), word(4),  word(5),
          word(6), word(7), word(8), word(9), word(10), word(11)};
}

// The steps of a consumer, and what keys each of its rows sees, by a warp.
template <AttentionFwdSm90Variant kV>
__device__ __forceinline__ void scout_rows(const AttentionFwdSm90Params& a, const Barriers<kV>& barriers, int consumer,
                                           u32 parity, int lane) {
  const auto word = [&](int i) {
    return static_cast<i32>(load_shared(barriers.sequence_work(consumer, parity) + 4 * i));
  };
  const i32 row0 = word(0), q_len = word(4), each = queries_each<kV>(a), first = row0 + consumer * each;
  const Visible<kV> visible{a, word(5), word(8), word(9), word(10)};
  const i32 last = at_most(first + each, q_len) - 1, tile_last = at_most(row0 + queries_of_tile<kV>(a), q_len) - 1;
  i32 lo, hi;
#pragma unroll 1
  for (int row = lane; row < 96; row += 32) {  // behind the rows, the ends of the tile's and the consumer's
    const i32 query = row < 64    ? first + at_most(query_of_row<kV>(a, row), each - 1)
                      : lane == 0 ? row0
                      : lane == 1 ? tile_last
                      : lane == 2 ? first
                                  : last;
    lo = visible.lo(query), hi = visible.hi(query);
    if (row < 64) store_shared(barriers.row_keys(consumer, row), lo), store_shared(barriers.row_keys(consumer, row) + 4, hi);
  }
  const auto at = [](i32 x, int lane) { return __shfl_sync(0xffffffffu, x, lane); };
  Work work = {};
  work.split = word(11);
  const TileRange all = of_split<kV>(a.common, work, tiles_between<kV>(at(lo, 0), at(hi, 1), tile_last >= row0));
  TileRange own = of_split<kV>(a.common, work, tiles_between<kV>(at(lo, 2), at(hi, 3), last >= first));
  if (own.end <= own.begin) own.begin = own.end = all.begin;
  // No key of the tiles between these is hidden from a row. (With one ring a tile of rows has a stage more, which holds the
  // last V.)
  const i32 free_begin = at_least((at(lo, 3) + kV.tile_k - 1) / kV.tile_k, own.begin);
  const i32 free_end = at_least(at(hi, 2) / kV.tile_k, own.begin);
  const i32 stop = all.begin - (kV.rings == 1 && all.end > all.begin ? 1 : 0);
  const i32 words[] = {all.end, own.end, own.begin, free_begin, free_end, stop, (last + 1 - first) * rows_per_query<kV>(a)};
  static_assert(sizeof words <= 4 * kStepWords);  // in the order of StepWord
  if (lane != 0) return;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof words / 4); ++i)
    store_shared(barriers.steps(consumer, parity) + 4 * i, static_cast<u32>(words[i]));
}
// By a whole warp. `steps`: where the scout has left them.
__device__ __forceinline__ i32 step_word(u32 steps, StepWord word) {
  return uniform(static_cast<i32>(load_shared(steps + 4 * word)));
}
// Of every turn of every consumer.
template <AttentionFwdSm90Variant kV>
__device__ __forceinline__ void scout(const AttentionFwdSm90Params& a, const Barriers<kV>& barriers) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (u32 parity = 0, left = kV.consumers; left > 0; parity ^= 1) {
#pragma unroll 1
    for (int consumer = 0; consumer < kV.consumers; ++consumer) {
      mbarrier_wait(barriers.work_full(consumer), parity);
      if (load_shared(barriers.sequence_work(consumer, parity ^ 1)) == kNoMore)
        --left;
      else
        scout_rows<kV>(a, barriers, consumer, parity ^ 1, lane);
      mbarrier_arrive(barriers.q_full(consumer));  // every lane, as every lane has written
    }
  }
}

}  // namespace heed::cuda
