// Which sequence, head, rows and key tiles a block works on; where rows of Q, K, V and O lie; loading and storing them.
#pragma once

#include "params.h"
#include "ptx.cuh"

namespace heed::cuda {

constexpr i64 kFar = 1ll << 60;

struct BlockWork {
  bool idle = false;
  bool whole = false;   // its rows have no other split: O is written, though the run has partials
  i32 b = 0, head = 0;  // head: of kv where rows_per_query > 1, else of q
  i32 head_kv = 0;
  i32 q_len = 0, q_rows = 0;  // queries that count; queries whose rows are written
  i32 k_len = 0;
  i64 q_begin = 0, k_begin = 0, cache_row = 0;
  i64 offset = 0;  // position of query i: i + offset
  i32 row0 = 0;  // first row of the tile
  i32 tile_begin = 0, tile_end = 0;
  i32 split = 0;
};

struct KeyRange {
  i64 lo, hi;
};

// Keys that causal, window, chunk and length leave to a query at position pos: lo <= j < hi. Neither bound falls from one
// query to the next, so a tile's keys lie between its first query's lo and its last one's hi.
__device__ __forceinline__ KeyRange visible_keys(const AttentionFwdParams& p, i64 k_len, i64 pos) {
  i64 lo = 0, hi = k_len;
  if (p.window_left >= 0) lo = max(lo, pos - min(p.window_left, kFar));
  if (p.window_right >= 0) hi = min(hi, pos + min(p.window_right, kFar) + 1);
  if (p.chunk > 0) {
    const i64 c = min(p.chunk, kFar);
    const i64 floor = pos >= 0 ? pos / c : -((c - 1 - pos) / c);
    if (floor < 0) {
      hi = 0;
    } else if (floor > k_len / c) {
      lo = hi = k_len;
    } else {
      lo = max(lo, floor * c);
      hi = min(hi, floor * c + c);
    }
  }
  lo = min(max(lo, 0ll), k_len);
  return {lo, min(max(hi, lo), k_len)};
}

// Lengths of sequence w.b, with every value that the host never saw checked against what it stated. Returns status bits;
// all but pages, which check_sequences looks at, or attention_decode_sm90.
__device__ __forceinline__ i32 locate_sequence(const AttentionFwdParams& p, BlockWork& w) {
  const i32 b = w.b;
  i32 bad = 0;
  i64 q_len = p.seqlen_q, k_len = p.seqlen_k;
  if (p.cu_seqlens_q != nullptr) {
    const i64 begin = p.cu_seqlens_q[b], end = p.cu_seqlens_q[b + 1];
    const bool good = begin >= 0 && end >= begin && end <= p.total_q;
    w.q_begin = good ? begin : 0;
    q_len = good ? end - begin : 0;
    if (!good) bad |= kStatusLengthQ;
  }
  w.q_rows = static_cast<i32>(q_len);
  if (p.seqused_q != nullptr) {
    const i64 used = p.seqused_q[b];
    if (used < 0 || used > q_len) bad |= kStatusLengthQ;
    q_len = used;
  }
  if (p.q_limit > 0 && q_len > p.q_limit) bad |= kStatusLengthQ;
  w.cache_row = b;
  if (p.cu_seqlens_k != nullptr) {
    const i64 begin = p.cu_seqlens_k[b], end = p.cu_seqlens_k[b + 1];
    const bool good = begin >= 0 && end >= begin && end <= p.total_k;
    w.cache_row = 0;
    w.k_begin = good ? begin : 0;
    k_len = good ? end - begin : 0;
    if (!good) bad |= kStatusLengthK;
  } else if (p.cache_batch_idx != nullptr) {
    w.cache_row = p.cache_batch_idx[b];
    if (w.cache_row < 0 || w.cache_row >= p.cache_rows) bad |= kStatusPage, w.cache_row = 0;
  }
  i64 skip = 0;
  if ((bad & kStatusPage) == 0) {
    if (p.seqused_k != nullptr) {
      const i64 used = p.seqused_k[b];
      if (used < 0 || used > k_len) bad |= kStatusLengthK;
      k_len = used;
    }
    if (p.leftpad_k != nullptr) {
      skip = p.leftpad_k[b];
      if (skip < 0 || skip > k_len) bad |= kStatusLengthK;
      k_len -= skip;
    }
    if (p.k_limit > 0 && k_len > p.k_limit) bad |= kStatusLengthK;
  }
  if (bad != 0) q_len = k_len = skip = 0;
  w.k_begin += skip;
  w.q_len = static_cast<i32>(q_len);
  w.k_len = static_cast<i32>(k_len);
  w.offset = p.offset_kind == 0 ? k_len - q_len : p.offset_kind == 1 ? 0 : p.q_offset;
  return bad;
}

// Packed queries: sequence b owns the slots from cu[b] * rows_per_query / tile_q + b up to the next one's: as many tiles
// as it can need. Entries out of order count as the largest good one before them.
__device__ __forceinline__ u32 packed_tile(const AttentionFwdParams& p, u32 slot, i32 tile_q, BlockWork& w) {
  const i32 batch = static_cast<i32>(p.batch);
  auto first_slot = [&](i64 row, i32 b) { return row * p.rows_per_query / tile_q + b; };
  if (p.sequence_status == nullptr || p.sequence_status[batch] == 0) {
    i32 lo = 0, hi = batch - 1;
    while (lo < hi) {
      const i32 mid = (lo + hi + 1) / 2;
      if (first_slot(p.cu_seqlens_q[mid], mid) <= slot)
        lo = mid;
      else
        hi = mid - 1;
    }
    w.b = lo;
    return slot - static_cast<u32>(first_slot(p.cu_seqlens_q[lo], lo));
  }
  i64 row = 0, first = 0;
  for (i32 b = 0; b < batch; ++b) {
    const i64 begin = p.cu_seqlens_q[b];
    if (begin <= p.total_q) row = max(row, begin);
    if (first_slot(row, b) > slot) break;
    w.b = b;
    first = first_slot(row, b);
  }
  return slot - static_cast<u32>(first);
}

// A row of O that no query owns: 0 and -inf. `row` counts from the sequence's first query, packed from the first of all.
__device__ __forceinline__ void clear_row(const AttentionFwdParams& p, i64 b, i32 head, i64 row, int lane, int lanes) {
  const i64 at = b * p.out_stride.b + head * p.out_stride.h + row * p.out_stride.s;
  for (i32 column = lane; column < p.head_dim_v; column += lanes) {
    if (p.out_is_f32)
      static_cast<float*>(p.out)[at + column] = 0.0f;
    else
      static_cast<unsigned short*>(p.out)[at + column] = 0;
  }
  if (lane == 0 && p.lse != nullptr)
    p.lse[b * p.lse_stride.b + head * p.lse_stride.h + row * p.lse_stride.s] = -__int_as_float(0x7f800000);
}

// Whether the run writes partials, for combine, instead of O. (A branch at the end of a block: a variant of its own would be
// as fast, and be one more to compile.)
template <auto kV>
__device__ __forceinline__ bool writes_partials(const AttentionFwdParams& p) {
  return kV.split && p.partial_lse != nullptr;
}

// Where min_rows or max_rows is set: whether this kernel has anything to do in the tile. With max_rows it has rows of its
// own sequences only, and marks the partials of the others for combine; without, padding of every sequence as well, and
// where that is all, it is written here.
template <auto kV>
__device__ __forceinline__ bool takes_sequence(const AttentionFwdParams& p, BlockWork& w) {
  const i64 length = static_cast<i64>(w.q_len) * p.gqa_ratio;
  const bool mine = length >= p.min_rows && (p.max_rows == 0 || length <= p.max_rows);
  if (p.max_rows > 0) {
    if (!mine) w.q_len = w.k_len = 0;
    if (writes_partials<kV>(p)) {
      w.q_rows = static_cast<i32>(p.partial_queries);
      return mine || w.split == 0;
    }
    w.q_rows = w.q_len;
    return true;
  }
  if (mine) return true;
  constexpr int kLanes = 8;
  for (i32 r = threadIdx.x / kLanes; r < kV.tile_q; r += blockDim.x / kLanes) {
    const u32 row = w.row0 + r, per_query = p.rows_per_query;
    const i32 query = row / per_query, head = w.head * per_query + row % per_query;
    if (query >= w.q_len && query < w.q_rows) clear_row(p, w.b, head, w.q_begin + query, threadIdx.x % kLanes, kLanes);
  }
  return false;
}

template <auto kV>
__device__ __forceinline__ BlockWork block_work(const AttentionFwdParams& p, u32 block) {
  BlockWork w;
  const u32 heads = p.rows_per_query > 1 ? p.nheads_kv : p.nheads_q;
  const u32 tiles = static_cast<u32>(p.num_tiles_q);
  u32 index = block;
  if (writes_partials<kV>(p)) {
    w.split = index % p.max_splits;
    index /= p.max_splits;
  }
  u32 tile;
  if (p.cu_seqlens_q == nullptr || p.max_rows > 0) {
    // Sections of heads_per_section heads whose K and V fit the L2 cache together; in a section the heaviest tiles first.
    const u32 section_heads = p.heads_per_section;
    const u32 section_size = section_heads * tiles;
    const u32 section = index / section_size, rest = index % section_size;
    const u32 here = min(section_heads, heads * static_cast<u32>(p.batch) - section * section_heads);
    tile = rest / here;
    const u32 batch_head = section * section_heads + rest % here;
    if (p.longest_first) tile = tiles - 1 - tile;
    w.b = batch_head / heads;
    w.head = batch_head % heads;
  } else {
    w.head = index % heads;
    tile = packed_tile(p, index / heads, kV.tile_q, w);
  }
  w.head_kv = p.rows_per_query > 1 ? w.head : w.head / p.gqa_ratio;
  locate_sequence(p, w);
  if (p.sequence_status != nullptr && p.sequence_status[w.b] != 0) w.q_len = w.k_len = 0;
  w.row0 = static_cast<i32>(tile * kV.tile_q);
  if ((p.min_rows | p.max_rows) != 0 && !takes_sequence<kV>(p, w)) {
    w.idle = true;
    return w;
  }
  if (w.row0 >= static_cast<i64>(w.q_rows) * p.rows_per_query) {
    w.idle = true;
    return w;
  }
  u32 first_query = w.row0, last_query = w.row0 + kV.tile_q - 1;
  if (p.rows_per_query > 1) {
    first_query /= static_cast<u32>(p.rows_per_query);
    last_query /= static_cast<u32>(p.rows_per_query);
  }
  if (static_cast<i32>(first_query) < w.q_len) {
    last_query = min(last_query, static_cast<u32>(w.q_len) - 1);
    i64 lo = 0, hi = w.k_len;
    if constexpr (kV.mask != kMaskNone) {
      lo = visible_keys(p, w.k_len, first_query + w.offset).lo;
      hi = visible_keys(p, w.k_len, last_query + w.offset).hi;
    }
    w.tile_begin = static_cast<i32>(static_cast<u32>(lo) / kV.tile_k);
    w.tile_end = hi > lo ? static_cast<i32>((static_cast<u32>(hi) + kV.tile_k - 1) / kV.tile_k) : w.tile_begin;
    if (writes_partials<kV>(p)) {
      w.tile_begin = max(w.tile_begin, w.split * p.split_tiles);
      w.tile_end = min(w.tile_end, (w.split + 1) * p.split_tiles);
    }
  }
  return w;
}

// Row r of the block is query (row0 + r) / rows_per_query of head group member (row0 + r) % rows_per_query.
struct RowMap {
  i32 row0, per_query, head0;
  __device__ RowMap(const AttentionFwdParams& p, const BlockWork& w)
      : row0(w.row0), per_query(p.rows_per_query), head0(p.rows_per_query > 1 ? w.head * p.rows_per_query : w.head) {}
  __device__ __forceinline__ i32 query(i32 r) const {
    return per_query == 1 ? row0 + r : static_cast<u32>(row0 + r) / static_cast<u32>(per_query);
  }
  __device__ __forceinline__ i32 head(i32 r) const {
    return per_query == 1 ? head0 : head0 + static_cast<u32>(row0 + r) % static_cast<u32>(per_query);
  }
};

// Copies 16 bytes to shared memory element by element: rows that are not 16-byte aligned.
__device__ __forceinline__ void copy_16_unaligned(u32 dst, const void* src, bool valid) {
  const unsigned short* s = static_cast<const unsigned short*>(src);
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const unsigned short x = valid ? s[e] : static_cast<unsigned short>(0);
    store_shared_16(dst + e * 2, x);
  }
}

template <AttentionFwdVariant kV>
__device__ __forceinline__ void load_q(const AttentionFwdParams& p, const BlockWork& w, const RowMap& rows, u32 q_base,
                                       int thread) {
  constexpr int kChunks = kV.head_dim / 8, kPerPass = kV.warps * 32 / kChunks, kPitch = kV.head_dim + 8;
  const int column = thread % kChunks, first = thread / kChunks;
  if (kPerPass * kChunks != kV.warps * 32 && first >= kPerPass) return;
  const char* base = static_cast<const char*>(p.q) + (w.b * p.q_stride.b + w.q_begin * p.q_stride.s + column * 8) * 2;
  const bool in_dim = column * 8 < p.head_dim;
  if (rows.per_query == 1 && (!kV.gather || p.aligned)) {  // a stride a row: nothing to divide
    const i64 step = kPerPass * p.q_stride.s * 2;
    const char* src = base + (rows.head0 * p.q_stride.h + (rows.row0 + first) * p.q_stride.s) * 2;
#pragma unroll 4
    for (int r = first; r < kV.tile_q; r += kPerPass) {
      const bool valid = in_dim && rows.row0 + r < w.q_len;
      cp_async_16(q_base + (r * kPitch + column * 8) * 2, valid ? src : static_cast<const char*>(p.q), valid ? 16 : 0);
      src += step;
    }
    return;
  }
#pragma unroll 1
  for (int r = first; r < kV.tile_q; r += kPerPass) {
    const i32 query = rows.query(r);
    const bool valid = in_dim && query < w.q_len;
    const char* src =
        valid ? base + (rows.head(r) * p.q_stride.h + query * p.q_stride.s) * 2 : static_cast<const char*>(p.q);
    const u32 dst = q_base + (r * kPitch + column * 8) * 2;
    if (kV.gather && !p.aligned)
      copy_16_unaligned(dst, src, valid);
    else
      cp_async_16(dst, src, valid ? 16 : 0);
  }
}

// Byte offset of key j's row from the start of its tensor's (sequence, head); -1 where its page lies outside the cache.
__device__ __forceinline__ i64 paged_row(const AttentionFwdParams& p, const BlockWork& w, const Strides3& stride,
                                         i32 j) {
  const u32 key = static_cast<u32>(w.k_begin) + j, page_size = p.page_size;
  const i32 page = p.page_table[w.cache_row * p.page_table_stride + key / page_size * p.page_table_step];
  return page >= 0 && page < p.num_pages ? page * stride.b + key % page_size * stride.s : -1;
}

// Where key 0 of a sequence and head lies; pages: where the head lies in page 0.
__device__ __forceinline__ i64 first_key(const AttentionFwdParams& p, const BlockWork& w, const Strides3& stride) {
  const i64 head = w.head_kv * stride.h;
  return p.page_size > 0 ? head : w.cache_row * stride.b + head + w.k_begin * stride.s;
}

// This thread's share of the loads of one of K and V.
template <AttentionFwdVariant kV, int kDim>
struct KeyLoader {
  static constexpr int kChunks = kDim / 8, kThreads = kV.warps * 32;
  static constexpr int kPerPass = kThreads / kChunks;
  const char* base;
  int first, column_bytes, bytes;

  __device__ __forceinline__ KeyLoader(const AttentionFwdParams& p, const BlockWork& w, const void* data,
                                       const Strides3& stride, i32 dim, int thread)
      : first(thread / kChunks), column_bytes(thread % kChunks * 16) {
    base = static_cast<const char*>(data) + first_key(p, w, stride) * 2 + column_bytes;
    bytes = column_bytes < dim * 2 ? 16 : 0;
    if (kPerPass * kChunks != kThreads && first >= kPerPass) first = kV.tile_k;
  }

  // gather: where this thread's piece of key j lies; `base` where there is none.
  __device__ __forceinline__ const char* gathered(const AttentionFwdParams& p, const BlockWork& w,
                                                  const Strides3& stride, i32 j, bool& valid) const {
    valid = bytes != 0 && j < w.k_len;
    i64 row = j * (stride.s * 2);
    if (p.page_size > 0 && valid) {
      row = paged_row(p, w, stride, j) * 2;
      valid = row >= 0;
    }
    return valid ? base + row : base;
  }

  // kAll: every key of the tile lies before the sequence's end.
  template <bool kAll>
  __device__ __forceinline__ void load(const AttentionFwdParams& p, const BlockWork& w, const Strides3& stride,
                                       int tile, u32 dst_base) const {
    constexpr int kPitch = kDim + 8;
    const u32 dst = dst_base + first * (kPitch * 2) + column_bytes;
    if constexpr (kV.gather) {
      if (!p.aligned) {
#pragma unroll 1
        for (int r0 = 0; r0 < kV.tile_k; r0 += kPerPass) {
          if (r0 + first >= kV.tile_k) return;
          bool valid;
          const char* src = gathered(p, w, stride, tile * kV.tile_k + r0 + first, valid);
          copy_16_unaligned(dst + r0 * (kPitch * 2), src, valid);
        }
        return;
      }
#pragma unroll(kV.modified ? 1 : 4)
      for (int r0 = 0; r0 < kV.tile_k; r0 += kPerPass) {
        if (r0 + first >= kV.tile_k) return;
        bool valid;
        const char* src = gathered(p, w, stride, tile * kV.tile_k + r0 + first, valid);
        cp_async_16(dst + r0 * (kPitch * 2), src, valid ? 16 : 0);
      }
    } else {
      const char* src = base + (static_cast<i64>(tile) * kV.tile_k + first) * (stride.s * 2);
#pragma unroll(kV.mask == kMaskNone ? 4 : 64)  // what leaves d128 without spills
      for (int r0 = 0; r0 < kV.tile_k; r0 += kPerPass) {
        if ((kV.tile_k % kPerPass != 0 || kPerPass * kChunks != kThreads) && r0 + first >= kV.tile_k) return;
        const bool valid = kAll || tile * kV.tile_k + r0 + first < w.k_len;
        cp_async_16(dst + r0 * (kPitch * 2), valid ? src : base, valid ? bytes : 0);
        src += kPerPass * (stride.s * 2);
      }
    }
  }
};

// Starts a counter whose bits above the low kTileBits are `mark` while it counts, unless another has. (One that finds it unmarked
// just before another marks it does nothing either.)
__device__ __forceinline__ void mark_counter(u64* counter, u64 mark) {
  const u64 held = *static_cast<volatile const u64*>(counter);
  if ((held ^ mark) >> kTileBits != 0) atomicCAS(counter, held, mark);
}

// Which of the partials' rows, all sequences counted, a query of a head has; and where its partial result lies.
__device__ __forceinline__ i64 partial_row(const AttentionFwdParams& p, const BlockWork& w, i32 head, i32 query) {
  i64 row = query;
  if (p.partial_queries > 0)
    row += w.b * p.partial_queries;
  else
    row += p.cu_seqlens_q != nullptr ? w.q_begin : w.b * p.seqlen_q;
  return row * p.nheads_q + head;
}
__device__ __forceinline__ i64 partial_slot(const AttentionFwdParams& p, const BlockWork& w, i32 head, i32 query) {
  return partial_row(p, w, head, query) * p.max_splits + w.split;
}

__device__ __forceinline__ void store_lse(const AttentionFwdParams& p, const BlockWork& w, i32 head, i32 query,
                                          float lse) {
  if (p.lse != nullptr)
    p.lse[w.b * p.lse_stride.b + head * p.lse_stride.h + (w.q_begin + query) * p.lse_stride.s] = lse;
}

}  // namespace heed::cuda
