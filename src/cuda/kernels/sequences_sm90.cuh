// attention_fwd_sm90: which rows of which sequence a turn of the block's loop has, where lengths come from the device. The
// loading thread alone works this out, and leaves it beside Q in shared memory.
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
__device__ __forceinline__ bool packed_rows(const AttentionFwdParams& p, u32 index, Work& work) {
  const i32 batch = static_cast<i32>(p.batch);
  const u32 heads = p.nheads_q;
  const auto first_of = [&](i64 row, i32 b) { return static_cast<u32>(row / Layout<kV>::kTileQ + b) * heads; };
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
  work.head = static_cast<i32>(section * at_once + rest % here);
  work.row0 = static_cast<i32>((p.longest_first ? tiles - 1 - tile : tile) * Layout<kV>::kTileQ);
  return true;
}

// False where the turn has no row to write.
template <AttentionFwdSm90Variant kV>
__device__ __forceinline__ bool locate(const AttentionFwdSm90Params& a, u32 index, Work& work, KeyPlace& keys) {
  const AttentionFwdParams& p = a.common;
  const bool packed = p.cu_seqlens_q != nullptr;
  if (packed) {
    if (!packed_rows<kV>(p, index, work)) return false;
  } else {
    work = work_at<kV>(p, index);
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
  if (work.row0 >= work.written_end || work.row0 + Layout<kV>::kTileQ <= work.written_begin) return false;
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
                       work.written_begin, work.written_end, work.lo_shift, work.hi_shift, work.offset};
  static_assert(sizeof words == 4 * kSequenceWorkWords);
#pragma unroll
  for (int i = 0; i < kSequenceWorkWords; ++i) store_shared(place + 4 * i, static_cast<u32>(words[i]));
}
// By a whole warp; what the producer has left after the last turn is a row0 of kNoMore.
__device__ __forceinline__ Work load_work(u32 place) {
  const auto word = [&](int i) { return uniform(static_cast<i32>(load_shared(place + 4 * i))); };
  return {word(0), word(1), word(2), word(3), word(4), word(5), word(6), word(7), word(8), word(9), word(10)};
}

}  // namespace heed::cuda
