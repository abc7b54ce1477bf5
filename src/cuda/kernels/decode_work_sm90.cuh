// attention_decode_sm90: which tiles a block does, of which sequence, head, rows and keys, and where partials of shared rows lie.
#pragma once

#include "params.h"
#include "rows.cuh"

namespace heed::cuda {

struct DecodeWork : BlockWork {
  i32 splits = 0;      // of its rows' keys that have any, at least one; 0: no more tiles
  i32 first_block = 0;  // shares: which has the first of them, heads_together blocks before the next one's
  i32 first_slot = 0;   // where the partials of row 0 of the sequence would be
};

// Shares: a block has at most two tiles that are not whole. The one that others have begun is in slot 2 block, the one that it
// begins in the next.
__device__ __forceinline__ i64 share_slot(const AttentionFwdSm90Params& a, i32 first_block, i32 split) {
  return 2 * (first_block + split * a.heads_together) + (split == 0);
}
__device__ __forceinline__ i64 partial_slot(const AttentionFwdParams& p, const DecodeWork& w, i32 head, i32 query) {
  if (p.split_tiles > 0) return partial_slot(p, static_cast<const BlockWork&>(w), head, query);
  return w.first_slot + query * p.rows_per_query + head % p.rows_per_query;
}

// What this block does, in order, found by one warp: a lane has one of 32 sequences, which are gone through as it is asked. In units:
//
// Tiles    A unit is a tile; only splits that have keys are among them (and one of a sequence without). A block takes every so
//          many'th, another place every turn: blocks may be a multiple of a sequence's tiles, of which the last are shorter.
// Shares   A unit is a tile of keys of a tile of rows, one where there are no keys. A block has `share` of them, one after the other:
//          as much as any other, however lengths differ. What begins or ends amid a tile of rows is a split of its keys. A share is
//          that of heads_together blocks, a head each, as heads of the same keys lie side by side in memory.
template <AttentionFwdVariant kV>
struct TileList {
  const AttentionFwdSm90Params& a;
  const AttentionFwdParams& p;
  const int lane;
  const bool shares;
  const u32 together, my_share;    // blocks that have the same share, each of another head; this block's share
  const u32 my_head, heads;        // the first of its heads, `together` apart; how many they are
  u32 index = 0, turn = 0;         // the unit that comes next
  u32 share = 0, share_end = 0;    // 0: not known yet, as all sequences are gone through once for
  u32 all_units = 0, most_keys = 1;
  i64 group = -32, located = -32;  // the first of the 32; as `mine` has it
  u32 before = 0, all = 0;         // units ahead of the 32; of the 32
  BlockWork mine;                  // this lane's sequence
  i32 key_begin = 0, key_end = 0;  // the tiles of keys that its rows see
  u32 splits = 0, of_split = 0;    // tiles: those with keys; tiles of keys of each
  u32 count = 0, end = 0;          // units of this lane's sequence; those of the lanes before as well

  __device__ __forceinline__ TileList(const AttentionFwdSm90Params& params, int my_lane)
      : a(params),
        p(params.common),
        lane(my_lane),
        shares(params.arrived != nullptr),
        together(shares ? a.heads_together : 1),
        my_share(blockIdx.x / together),
        my_head(blockIdx.x - my_share * together),
        heads(p.nheads_kv / together) {}

  __device__ __forceinline__ u32 keys_or_one() const { return max(key_end - key_begin, 1); }
  // A share is no shorter than 256 keys, which take about as long as a block takes to start; and a whole number of tiles' keys, or
  // they of it, where that is within 6 %: sequences that are all alike are then cut less, or not at all.
  __device__ __forceinline__ void choose_share() {
    constexpr u32 kLeast = kLeastShare / kV.tile_k;
    all_units = __reduce_add_sync(0xffffffffu, all_units), most_keys = __reduce_max_sync(0xffffffffu, most_keys);
    const u32 blocks = gridDim.x / together, least = max(kLeast, (all_units + blocks - 1) / blocks);
    const u32 cuts = most_keys / least;
    const u32 even = cuts > 0 ? (most_keys + cuts - 1) / cuts : (least + most_keys - 1) / most_keys * most_keys;
    share = (even - least) * 16 <= least ? even : least;
    index = my_share * share, share_end = index + share;
  }

  __device__ __forceinline__ u32 row_tiles() const {
    return (static_cast<u32>(mine.q_rows) * p.rows_per_query + kV.tile_q - 1) / kV.tile_q;
  }
  __device__ __forceinline__ void locate(i64 b) {
    mine = BlockWork(), key_begin = key_end = 0;
    if (b >= p.batch) return;
    mine.b = static_cast<i32>(b);
    locate_sequence(p, mine);
    if (p.sequence_status != nullptr && p.sequence_status[b] != 0) {
      mine.q_len = mine.k_len = 0;
      // Where offsets are out of order check_sequences has cleared all rows: this one's may be another's.
      if (p.cu_seqlens_q != nullptr && p.sequence_status[p.batch] != 0) mine.q_rows = 0;
    }
    if (mine.q_len > 0) set_keys(mine, 0, mine.q_len - 1, key_begin, key_end);
  }
  // Tiles of the keys that queries first..last see: as visible_keys, but short, and with chunks only where their positions are 31
  // bits, as what no row sees may be loaded.
  __device__ __forceinline__ void set_keys(const BlockWork& w, i32 first, i32 last, i32& begin, i32& tile_end) const {
    const i64 from = first + w.offset, to = last + w.offset;
    i64 lo = 0, hi = w.k_len;
    if (p.window_left >= 0) lo = max(lo, from - min(p.window_left, kFar));
    if (p.window_right >= 0) hi = min(hi, to + min(p.window_right, kFar) + 1);
    if (p.chunk > 0 && from >= 0 && to <= kMost31 && p.chunk <= kMost31) {
      const u32 chunk = static_cast<u32>(p.chunk);
      lo = max(lo, static_cast<i64>(static_cast<u32>(from) / chunk * chunk));
      hi = min(hi, static_cast<i64>(static_cast<u32>(to) / chunk * chunk) + p.chunk);
    }
    begin = static_cast<i32>(static_cast<u32>(min(lo, static_cast<i64>(w.k_len))) / kV.tile_k);
    tile_end = hi > lo ? static_cast<i32>((static_cast<u32>(hi) + kV.tile_k - 1) / kV.tile_k) : begin;
  }
  static constexpr i64 kMost31 = 0x7fffffff;

  // The block's next tile to `to`; no tile where there are no more.
  __device__ __forceinline__ void find(DecodeWork& to) {
    if (!shares) index = turn * gridDim.x + (blockIdx.x + turn) % gridDim.x, ++turn;
    bool choosing = shares && share == 0;
    while (choosing || index - before >= all) {
      before += all, all = 0, group += 32;
      if (group >= p.batch && choosing) {
        choose_share();
        choosing = false, group = -32;
        continue;
      }
      if (group >= p.batch || (shares && !choosing && index >= share_end)) {
        if (lane == 0) to.splits = 0;
        __syncwarp();
        return;
      }
      if (group != located) locate(group + lane), located = group;
      const u32 tiles = row_tiles() * heads, keys = keys_or_one();
      if (choosing) {
        all_units += tiles * keys;
        if (tiles > 0) most_keys = max(most_keys, keys);
        continue;
      }
      splits = writes_partials<kV>(p) && !shares ? min((keys + p.split_tiles - 1) / p.split_tiles, static_cast<u32>(p.max_splits)) : 1;
      of_split = (keys + splits - 1) / splits, splits = (keys + of_split - 1) / of_split;
      end = count = tiles * (shares ? keys : splits);
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const u32 ahead = __shfl_sync(0xffffffffu, end, lane >= step ? lane - step : lane);
        if (lane >= step) end += ahead;
      }
      all = __shfl_sync(0xffffffffu, end, 31);
    }
    const u32 at = index - before - (end - count);
    u32 units = 0;
    if (at < count && !(shares && index >= share_end)) {
      static_cast<BlockWork&>(to) = mine;
      u32 tile = 0, skipped = 0, first_share = 0;
      if (shares) {
        const u32 keys = keys_or_one(), first = index - at % keys;
        tile = at / keys, skipped = at % keys, units = min(keys - skipped, share_end - index);
        first_share = first / share;
        to.splits = static_cast<i32>((first + keys - 1) / share - first_share + 1);
        to.first_block = static_cast<i32>(first_share * together + my_head);
      } else {
        const u32 each = heads * splits;  // heads of a split's keys side by side
        const u32 split = at % each / heads;
        tile = at / each * heads + at % heads, skipped = split * of_split, units = of_split;
        to.split = static_cast<i32>(split), to.splits = static_cast<i32>(splits);
      }
      to.whole = shares && to.splits == 1;
      to.head = to.head_kv = static_cast<i32>(tile % heads * together + my_head);
      to.row0 = static_cast<i32>(tile / heads * kV.tile_q);
      if (shares)
        to.first_slot = static_cast<i32>(share_slot(a, to.first_block, my_share - first_share)) * kV.tile_q - to.row0;
      set_tiles(to, static_cast<i32>(skipped), static_cast<i32>(units));
    }
    if (shares) {
      units = __reduce_max_sync(0xffffffffu, units), index += units;
      if (units == 0 && lane == 0) to.splits = 0;
    }
    __syncwarp();
  }
  // The tiles of keys that a tile of rows has in its split, of those that the sequence's rows see.
  __device__ __forceinline__ void set_tiles(BlockWork& w, i32 skipped, i32 count_of_split) const {
    const u32 each = p.rows_per_query;
    const i32 first = static_cast<i32>(static_cast<u32>(w.row0) / each),
              last = min(static_cast<i32>(static_cast<u32>(w.row0 + kV.tile_q - 1) / each), w.q_len - 1);
    if (first >= w.q_len) return;
    w.tile_begin = key_begin, w.tile_end = key_end;
    if (row_tiles() > 1) set_keys(w, first, last, w.tile_begin, w.tile_end);
    if (!writes_partials<kV>(p)) return;
    const i32 begin = key_begin + skipped;
    w.tile_begin = max(w.tile_begin, begin);
    w.tile_end = max(min(w.tile_end, begin + count_of_split), w.tile_begin);
  }
};

}  // namespace heed::cuda
