// Attention forward for few queries over many keys on Hopper: one warp keeps a ring of K and V full by bulk tensor copies, from one
// (sequence, kv head, split of its keys) to the next, so that memory is asked without a pause.
//
//   S^T = K Q^T  [keys, rows]     O^T = V^T P^T  [Dv, rows]      f16 or bf16, sums in f32
//
// A block has a multiprocessor to itself and takes tiles of tile_q (8 or 16) rows, one after the other; which, the loading warp
// says. Its other warps have 16 keys of each stage, and meet at the end of a tile; that memory does not wait for it is what the
// ring is for.
//
// Memory     stage: K, then V, swizzled as bulk copies write: a box after the other, whose chunks of 64 columns come one after the
//            other, or a chunk after the other (StageShape) | where the warps meet: decode.cuh | what the next tiles are | barriers.
// Splits of the same rows: where blocks have shares of all keys (TileList), each warp writes its rows' partials and counts itself;
//            the last one merges them, in the order of splits. Else, combine.
//
// Barriers   full (the loading warp's arrival and the bytes) and empty (an arrival of each warp) for every stage; known (an
//            arrival of each of the loading warp's lanes) for every place of a tile; merged (an arrival of each lane): what the
//            warps brought to their meeting has been read.
#include "decode.cuh"
#include "mma_sm90.cuh"
#include "output.cuh"
#include "params.h"
#include "ptx.cuh"
#include "rows.cuh"
#include "work_sm90.h"

namespace heed::cuda {

struct DecodeWork : BlockWork {
  i32 splits = 0;      // of its rows' keys that have any, at least one; 0: no more tiles
  i32 first_block = 0;  // shares: which has the first of them, heads_together blocks before the next one's
  i32 first_slot = 0;   // where the partials of row 0 of the sequence would be
};
// What the loading warp says of a tile: what it is, and, before the tile's last stage is there, whether a page of its keys lies
// outside the cache.
struct DecodeTile {
  DecodeWork work;
  i32 bad = 0;
};
static_assert(sizeof(DecodeTile) == kDecodeTileBytes);

constexpr int kSplitBits = kTileBits / 2;  // of a counter; a tile has no more splits than there are blocks

// Shares: a block has at most two tiles that are not whole. The one that others have begun is in slot 2 block, the one that it
// begins in the next.
__device__ __forceinline__ i64 share_slot(const AttentionFwdSm90Params& a, i32 first_block, i32 split) {
  return 2 * (first_block + split * a.heads_together) + (split == 0);
}
__device__ __forceinline__ i64 partial_slot(const AttentionFwdParams& p, const DecodeWork& w, i32 head, i32 query) {
  if (p.split_tiles > 0) return partial_slot(p, static_cast<const BlockWork&>(w), head, query);
  return w.first_slot + query * p.rows_per_query + head % p.rows_per_query;
}

template <AttentionFwdVariant kV>
struct DecodeLayout {
  static constexpr int kChunks = kV.head_dim / 64, kChunksV = kV.head_dim_v / 64;  // across a row of K; of V
  static constexpr u32 kChunk = kV.tile_k * 128, kBytes = (kChunks + kChunksV) * kChunk;  // of a stage
  // Places of tiles: one more than stages as the tile behind the one whose first stage is being asked for is found before there is
  // a stage for it, and another as warps finish a tile's splits when the next one has begun.
  static constexpr int kPlaces = kV.stages + 2;
  static constexpr u32 kMeeting = kV.stages * kBytes,
                       kWork = kMeeting + 4 * kV.warps * kV.tile_q * (kV.head_dim_v + kMeetingPad + 2),
                       kBarriers = kWork + kPlaces * kDecodeTileBytes, kKnown = kBarriers + 16 * kV.stages,
                       kMerged = kKnown + 8 * kPlaces;
  static_assert(kV.tile_k == kStep * kV.warps && kV.head_dim % 64 == 0 && kV.head_dim_v % 64 == 0 && kWork % 8 == 0);
};

// A place in the ring, and its barriers.
template <AttentionFwdVariant kV>
struct DecodeRing {
  u32 shared;
  int stage = 0;
  u32 parity;
  __device__ __forceinline__ u32 full() const { return shared + DecodeLayout<kV>::kBarriers + 8 * stage; }
  __device__ __forceinline__ u32 empty() const { return full() + 8 * kV.stages; }
  __device__ __forceinline__ u32 data() const { return shared + DecodeLayout<kV>::kBytes * stage; }
  __device__ __forceinline__ void next() {
    if (++stage == kV.stages) stage = 0, parity ^= 1;
  }
};

// Where the next tile is written and read. When a tile is found, the stage has been given back that was asked for as many stages as
// there are before the first one of the tile ahead: its warps have done with all tiles before that stage's.
template <AttentionFwdVariant kV>
struct DecodePlace {
  using L = DecodeLayout<kV>;
  u32 shared;
  float* memory;  // the same
  int place = 0;
  u32 parity = 0;
  __device__ __forceinline__ u32 known() const { return shared + L::kKnown + 8 * place; }
  __device__ __forceinline__ DecodeTile& tile() const {
    return reinterpret_cast<DecodeTile*>(memory + L::kWork / 4)[place];
  }
  __device__ __forceinline__ void next() {
    if (++place == L::kPlaces) place = 0, parity ^= 1;
  }
};

// Where row r of a stage's K or V lies.
struct StageShape {
  u32 chunk, box;  // bytes from one to the next
  int shift;       // 2^shift rows of a box
  __device__ __forceinline__ StageShape(int box_rows, int chunks, bool whole, u32 chunk_of_tile)
      : chunk(whole ? box_rows * 128 : chunk_of_tile),
        box(whole ? chunks * box_rows * 128 : box_rows * 128),
        shift(31 - __clz(box_rows)) {}
  __device__ __forceinline__ u32 row(int r) const { return (r >> shift) * box + (r & ((1 << shift) - 1)) * 128; }
};
template <AttentionFwdVariant kV>
__device__ __forceinline__ int rows_of_box(const AttentionFwdSm90Params& a) {
  return a.page_box > 0 ? a.page_box : kV.tile_k;
}
template <AttentionFwdVariant kV>
__device__ __forceinline__ StageShape shape_of_k(const AttentionFwdSm90Params& a) {
  return {rows_of_box<kV>(a), DecodeLayout<kV>::kChunks, a.k_box_chunks > 1, DecodeLayout<kV>::kChunk};
}
template <AttentionFwdVariant kV>
__device__ __forceinline__ StageShape shape_of_v(const AttentionFwdSm90Params& a) {
  return {rows_of_box<kV>(a), DecodeLayout<kV>::kChunksV, a.v_box_chunks > 1, DecodeLayout<kV>::kChunk};
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

// What the loading warp keeps of a tile.
struct Source {
  i64 cache_row = 0;
  i32 tile_begin = 0, tile_end = 0, end = 0;  // end: of its stages, of which a tile without keys has one too
  i32 head_kv = 0, k_begin = 0, k_len = 0;
  bool any = false;
  Source() = default;
  __device__ __forceinline__ explicit Source(const DecodeWork& w)
      : cache_row(w.cache_row),
        tile_begin(w.tile_begin),
        tile_end(w.tile_end),
        end(max(w.tile_end, w.tile_begin + 1)),
        head_kv(w.head_kv),
        k_begin(static_cast<i32>(w.k_begin)),
        k_len(w.k_len),
        any(w.splits > 0) {}
};

// The loading warp, a lane a box. A lane also holds the page of one box of the next stages, 32 boxes of them: those of the next 32,
// or of the next tile's first, are looked up while these are loaded, as a look-up may take as long as a stage. Boxes behind the
// last key, whose pages nobody has stated, are asked for behind the end of a page and come as 0.
template <AttentionFwdVariant kV>
__device__ __forceinline__ void fill_ring(const AttentionFwdSm90Params& a, u32 shared, float* memory) {
  using L = DecodeLayout<kV>;
  const AttentionFwdParams& p = a.common;
  const int lane = threadIdx.x % 32;
  const bool paged = a.page_box > 0;
  const StageShape k_shape = shape_of_k<kV>(a), v_shape = shape_of_v<kV>(a);
  const i32 box_rows = rows_of_box<kV>(a), boxes = kV.tile_k / box_rows, stages_held = 32 / boxes;
  const i32 k_pieces = a.k_box_chunks > 1 ? 1 : L::kChunks, pieces = k_pieces + (a.v_box_chunks > 1 ? 1 : L::kChunksV);
  const u32 page_size = paged ? p.page_size : 1;
  const bool reads_lengths = p.cu_seqlens_q != nullptr || p.cu_seqlens_k != nullptr || p.seqused_q != nullptr ||
                             p.seqused_k != nullptr || p.leftpad_k != nullptr || p.cache_batch_idx != nullptr ||
                             p.sequence_status != nullptr;
  // The first tile is found while the kernel ahead still runs, where the arguments alone say what it is: 126.5 us became 125.0
  // for 16 x 8,192 keys.
  TileList<kV> list(a, lane);
  if (reads_lengths) wait_for_primary();
  DecodePlace<kV> place{shared, memory};
  bool waited = reads_lengths;
  const auto look_up = [&](const Source& w, i32 n) -> i32 {
    const u32 key = static_cast<u32>(n) * kV.tile_k + lane * box_rows;
    if (!paged || !w.any || n >= w.tile_end || key >= static_cast<u32>(w.k_len)) return 0;
    const i32 page = p.page_table[w.cache_row * p.page_table_stride + key / page_size * p.page_table_step];
    return page < p.num_pages ? page : -1;  // from a page below 0 copies bring 0
  };
  DecodeRing<kV> ring{shared, 0, 1};
  Source w, next;
  i32 pages = 0, later = 0, next_pages = 0, n = 0;
  // Once in the code, as it is long: what a kernel runs first is fetched from memory.
  DecodeTile *tile = nullptr, *next_tile = nullptr;
  for (bool find = true, first_stage = false;; find = first_stage) {
    if (find) {
      next_tile = &place.tile();
      if (lane == 0) next_tile->bad = 0;
      list.find(next_tile->work);
      mbarrier_arrive(place.known());
      next = Source(next_tile->work);
      place.next();
      if (!waited) wait_for_primary(), waited = true;
      next_pages = look_up(next, next.tile_begin);
    }
    first_stage = n >= w.end;
    if (first_stage) {
      if (!next.any) break;
      w = next, n = w.tile_begin, later = next_pages, tile = next_tile;
    }
    const i32 held = (n - w.tile_begin) % stages_held;
    if (held == 0) {
      pages = later, later = look_up(w, n + stages_held);
      if (paged && __any_sync(0xffffffffu, pages < 0) && lane == 0) tile->bad = 1;
    }
    mbarrier_wait(ring.empty(), ring.parity);
    __syncwarp();  // a stage without bytes is soon given back again: no lane may still be waiting
    if (lane == 0) mbarrier_arrive_expect_tx(ring.full(), n < w.tile_end ? L::kBytes : 0);
    __syncwarp();
    for (i32 first = 0; n < w.tile_end && first < boxes * pieces; first += 32) {
      const i32 copy = first + lane, box = copy / pieces, piece = copy % pieces, key = n * kV.tile_k + box * box_rows;
      i32 sequence = __shfl_sync(0xffffffffu, pages, held * boxes + box), row = static_cast<u32>(key) % page_size;
      if (!paged) sequence = static_cast<i32>(w.cache_row), row = w.k_begin + key;
      else if (key >= w.k_len) row = static_cast<i32>(page_size);
      if (box >= boxes) continue;
      if (piece < k_pieces)
        tma_load_chunks(ring.data() + piece * k_shape.chunk + box * k_shape.box, a.k_map, ring.full(), piece * 64, row, w.head_kv,
                        sequence, kEvictFirst);
      else
        tma_load_chunks(ring.data() + L::kChunks * L::kChunk + (piece - k_pieces) * v_shape.chunk + box * v_shape.box, a.v_map,
                        ring.full(), (piece - k_pieces) * 64, row, w.head_kv, sequence, kEvictFirst);
    }
    ring.next(), ++n;
  }
  launch_dependents();
}

// The rows of Q as B fragments: words at d = 16 kk + 2 t (+ 8) of row g.
template <AttentionFwdVariant kV, int kGroups>
__device__ __forceinline__ void load_queries(const AttentionFwdParams& p, const BlockWork& w, const RowMap& rows,
                                             u32 (&q)[kGroups][kV.head_dim / 16][2], int lane) {
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const int row = group * 8 + lane / 4;
    const i32 query = rows.query(row);
    const unsigned short* from = static_cast<const unsigned short*>(p.q) + w.b * p.q_stride.b + rows.head(row) * p.q_stride.h +
                                 (w.q_begin + query) * p.q_stride.s + lane % 4 * 2;
#pragma unroll
    for (int kk = 0; kk < kV.head_dim / 16; ++kk)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int d = kk * 16 + half * 8;
        q[group][kk][half] = query < w.q_len && d < p.head_dim ? *reinterpret_cast<const u32*>(from + d) : 0;
      }
  }
}

// Rows of V behind the last key become 0: what lies there reaches no row then. By the warp that has them.
template <AttentionFwdVariant kV>
__device__ __forceinline__ void clear_values(u32 v, const StageShape& shape, int first_row, int last_row, int lane) {
  for (int row = first_row; row < last_row; ++row)
#pragma unroll
    for (int c = 0; c < kV.head_dim_v / 64; ++c) store_shared(v + c * shape.chunk + shape.row(row) + lane * 4, 0);
  __syncwarp();
  fence_proxy_async();
}

// O^T += V^T P^T for a step of keys. rows: where the eight of this lane's begin.
template <AttentionFwdVariant kV, int kGroups>
__device__ __forceinline__ void multiply_values(float (&acc_o)[kGroups][kV.head_dim_v / 16][4], u32 rows, u32 chunk,
                                                const u32 (&probability)[kGroups][2], int lane) {
#pragma unroll
  for (int m = 0; m < kV.head_dim_v / 16; ++m) {
    u32 values[4];
    ldmatrix_x4_trans(values, staged(rows, chunk, lane % 8, m * 16 + lane / 8 % 2 * 8));
#pragma unroll
    for (int group = 0; group < kGroups; ++group)
      mma_m16n8k16<kV.is_bf16>(acc_o[group][m], values, probability[group][0], probability[group][1]);
  }
}

// Where combine merges: splits of the tile's rows that have no keys, and therefore no tile.
template <AttentionFwdVariant kV>
__device__ __forceinline__ void empty_splits(const AttentionFwdParams& p, const BlockWork& w, const RowMap& rows, i32 splits, int warp,
                                             int lane) {
  for (int row = warp; row < kV.tile_q; row += kV.warps) {
    const i32 query = rows.query(row);
    if (query >= w.q_rows) return;
    float* const lse = p.partial_lse + partial_slot(p, w, rows.head(row), query);
    for (i32 split = splits + lane; split < p.max_splits; split += 32) lse[split] = -__int_as_float(0x7f800000);
  }
}

// Shares: where a warp's rows count the splits that are done; null where there is but one, or no row.
template <AttentionFwdVariant kV>
__device__ __forceinline__ u64* counter_of(const AttentionFwdSm90Params& a, const DecodeWork& w, const RowMap& rows, int warp) {
  constexpr int kRows = kV.tile_q / kV.warps;
  if (a.arrived == nullptr || w.whole || rows.query(warp * kRows) >= w.q_rows) return nullptr;
  return a.arrived + (w.first_block * kV.tile_q + warp * kRows);
}

// A row from the partials of its splits, by a warp (combine.cu has the same formula, for several warps and any width):
//
//   M = max_s lse_s     L = sum_s exp(lse_s - M) (+ exp(sink - M))     out = sum_s exp(lse_s - M) out_s / L     lse = M + ln L
template <AttentionFwdVariant kV>
__device__ __forceinline__ void merge_splits(const AttentionFwdSm90Params& a, const DecodeWork& w, i32 row, i32 query, i32 head,
                                             int lane) {
  const AttentionFwdParams& p = a.common;
  constexpr float kLn2 = 0.693147180559945f, kLog2e = 1.44269504088896f;
  constexpr int kAtOnce = 16;  // splits
  static_assert(kV.head_dim_v <= 128);
  const float kInf = __int_as_float(0x7f800000);
  const i32 splits = w.splits;
  const auto slot = [&](i32 split) { return share_slot(a, w.first_block, split) * kV.tile_q + row; };
  const auto lse_of = [&](i32 split) { return split < splits ? load_from_l2(p.partial_lse + slot(split)) : -kInf; };
  const float sink = p.sinks != nullptr ? p.sinks[head] : -kInf;
  const int column = lane * 4;
  float4 x[kAtOnce];
  const auto load = [&](i32 first) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      x[i] = {0.0f, 0.0f, 0.0f, 0.0f};
      if (first + i < splits && column < p.head_dim_v)
        x[i] = load_from_l2_16(p.partial_out + slot(first + i) * p.head_dim_v + column);
    }
  };
  load(0);  // while lse come
  float lse = lse_of(lane), top = fmaxf(sink, lse);
#pragma unroll 1
  for (i32 s = lane + 32; s < splits; s += 32) top = fmaxf(top, lse_of(s));
#pragma unroll
  for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
  const float reference = top == -kInf ? 0.0f : top;
  float total = 0.0f;
  float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 1
  for (i32 first = 0; first < splits; first += kAtOnce) {
    if (first > 0) load(first);
    if (first > 0 && first % 32 == 0) lse = lse_of(first + lane);
    const float weight = ex2((lse - reference) * kLog2e);
    if (first % 32 == 0) total += weight;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const float of_split = __shfl_sync(0xffffffffu, weight, first % 32 + i);
      sum.x = fmaf(of_split, x[i].x, sum.x), sum.y = fmaf(of_split, x[i].y, sum.y);
      sum.z = fmaf(of_split, x[i].z, sum.z), sum.w = fmaf(of_split, x[i].w, sum.w);
    }
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(0xffffffffu, total, step);
  total += ex2((sink - reference) * kLog2e);
  const bool counts = query < w.q_len && total != 0.0f;
  const float inverse = counts ? 1.0f / total : 0.0f;
  const i64 at = w.b * p.out_stride.b + head * p.out_stride.h + (w.q_begin + query) * p.out_stride.s + column;
  const float4 y = counts ? float4{sum.x * inverse, sum.y * inverse, sum.z * inverse, sum.w * inverse}
                          : float4{0.0f, 0.0f, 0.0f, 0.0f};
  if (column < p.head_dim_v) store_four<kV>(p, at, y);
  if (lane == 0) store_lse(p, w, head, query, counts ? reference + lg2(total) * kLn2 : -kInf);
}

// This warp's rows of a tile that is done, of several splits.
template <AttentionFwdVariant kV>
__device__ __forceinline__ void finish_split(const AttentionFwdSm90Params& a, const DecodeTile& tile, int warp, int lane) {
  constexpr int kRows = kV.tile_q / kV.warps;
  DecodeWork w = tile.work;
  const RowMap rows(a.common, w);
  u64* const counter = counter_of<kV>(a, w, rows, warp);
  if (counter == nullptr) return;
  __syncwarp();
  // Splits that are done, and, above those, that have a bad page: all of the sequence's rows are 0 then.
  u32 done = 0;
  if (lane == 0) {
    const u32 mine = tile.bad ? 1u << kSplitBits | 1 : 1;
    done = (static_cast<u32>(count_arrival(counter, mine)) & ((1u << kTileBits) - 1)) + mine;
  }
  done = __shfl_sync(0xffffffffu, done, 0);
  if (static_cast<i32>(done & ((1u << kSplitBits) - 1)) < w.splits) return;
  if (lane == 0) *counter = 0;
  if (done >> kSplitBits != 0) w.q_len = 0;
  __syncwarp();
#pragma unroll 1
  for (int row = warp * kRows; row < (warp + 1) * kRows && rows.query(row) < w.q_rows; ++row)
    merge_splits<kV>(a, w, row, rows.query(row), rows.head(row), lane);
}

template <AttentionFwdVariant kV>
__device__ __forceinline__ void decode(const AttentionFwdSm90Params& a, u32 shared, float* memory) {
  using L = DecodeLayout<kV>;
  constexpr int kGroups = kV.tile_q / 8, kKeySteps = kV.head_dim / 16, kOut = kV.head_dim_v / 16;
  const AttentionFwdParams& p = a.common;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = warp * kStep;
  const Meeting<kV> meeting(memory + L::kMeeting / 4);
  const float scale_log2 = plain_scale(p);
  const StageShape k_shape = shape_of_k<kV>(a), v_shape = shape_of_v<kV>(a);
  const u32 k_rows = k_shape.row(first + lane / 8 % 2 * 8), v_rows = v_shape.row(first + lane / 16 * 8);  // eight of them
  DecodeRing<kV> ring{shared, 0, 0};
  DecodePlace<kV> place{shared, memory};
  u32 merged = 1;  // parity
  const DecodeTile* unfinished = nullptr;  // the tile ahead, where its splits are not
  const bool shares = a.arrived != nullptr;
  wait_for_primary();
  for (;; place.next()) {
    mbarrier_wait(place.known(), place.parity);
    DecodeWork w = place.tile().work;
    const bool is_last = w.splits == 0;
    const RowMap rows(p, w);
    const i32 end = min(w.tile_end * kV.tile_k, w.k_len);
    u32 q[kGroups][kKeySteps][2] = {};
    if (!is_last) load_queries<kV>(p, w, rows, q, lane);
    if (unfinished != nullptr) finish_split<kV>(a, *unfinished, warp, lane);  // while those come
    if (is_last) break;
    float acc_o[kGroups][kOut][4], top[kGroups][2], sum[kGroups][2];
    clear_sums(acc_o, top, sum);
    if (w.split == 0 && !shares && writes_partials<kV>(p))
      empty_splits<kV>(p, w, rows, w.splits, warp, lane);
    if (lane == 0) {
      u64* const counter = counter_of<kV>(a, w, rows, warp);
      if (counter != nullptr) mark_counter(counter, a.mark);
    }
    const SeenKeys seen = seen_keys<kV>(p, w, rows, end, lane);

    i32 n = w.tile_begin;
#pragma unroll 1
    do {
      const i32 j0 = n * kV.tile_k + first;
      const u32 k = ring.data(), v = k + L::kChunks * L::kChunk;
      mbarrier_wait(ring.full(), ring.parity);
      if (j0 < end) {
        if (j0 + kStep > end) clear_values<kV>(v, v_shape, first + end - j0, first + kStep, lane);
        float s[kGroups][4] = {}, odd[kGroups][4] = {};  // two chains, half as long
#pragma unroll
        for (int kk = 0; kk < kKeySteps; ++kk) {
          u32 keys[4];
          ldmatrix_x4(keys, staged(k + k_rows, k_shape.chunk, lane % 8, kk * 16 + lane / 16 * 8));
#pragma unroll
          for (int group = 0; group < kGroups; ++group)
            mma_m16n8k16<kV.is_bf16>(kk % 2 == 0 ? s[group] : odd[group], keys, q[group][kk][0], q[group][kk][1]);
        }
#pragma unroll
        for (int group = 0; group < kGroups; ++group)
#pragma unroll
          for (int e = 0; e < 4; ++e) s[group][e] += odd[group][e];
        float x[kGroups][4];
        softmax_step(s, seen, j0, end, scale_log2, top, sum, acc_o, x, lane);
        u32 probability[kGroups][2];
        round_probabilities<kV.is_bf16 != 0>(x, probability);
        multiply_values<kV>(acc_o, v + v_rows, v_shape.chunk, probability, lane);
        if (kGroups == 1 && p.out_is_f32) {
          round_rest<kV.is_bf16 != 0>(x, probability);
          multiply_values<kV>(acc_o, v + v_rows, v_shape.chunk, probability, lane);
        }
      }
      __syncwarp();
      if (lane == 0) mbarrier_arrive(ring.empty());
      ring.next();
    } while (++n < w.tile_end);

    if (place.tile().bad) w.q_len = 0;  // O is 0 then
    mbarrier_wait(shared + L::kMerged, merged);
    merged ^= 1;
    bring_sums<kV>(meeting, top, sum, warp, lane);
#pragma unroll
    for (int group = 0; group < kGroups; ++group)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float* const to = meeting.row(warp, group * 8 + lane % 4 * 2 + e) + lane / 4;
#pragma unroll
        for (int m = 0; m < kOut; ++m) to[m * 16] = acc_o[group][m][e], to[m * 16 + 8] = acc_o[group][m][2 + e];
      }
    bar_sync(1, kV.warps * 32);
    const u32 bad = merge_rows<kV>(p, w, rows, meeting, warp, lane);
    mbarrier_arrive(shared + L::kMerged);
    constexpr AttentionFwdVariant kScalar = [] {
      AttentionFwdVariant v = kV;
      v.gather = 1;
      return v;
    }();
    redo_rows<kV, kScalar>(p, w, rows, bad, warp, lane);
    unfinished = shares && !w.whole ? &place.tile() : nullptr;
  }
}

template <AttentionFwdVariant kV>
__global__ void __launch_bounds__(kV.warps * 32 + 32, 1)
    attention_decode_sm90(const __grid_constant__ AttentionFwdSm90Params a) {
  extern __shared__ __align__(1024) unsigned char smem[];
  const u32 shared = smem_address(smem);
  if (threadIdx.x == 0) {
    prefetch_tensormap(a.k_map), prefetch_tensormap(a.v_map);
    for (int i = 0; i < kV.stages; ++i) {
      const DecodeRing<kV> ring{shared, i, 0};
      mbarrier_init(ring.full(), 1), mbarrier_init(ring.empty(), kV.warps);
    }
    for (int i = 0; i < DecodeLayout<kV>::kPlaces; ++i) mbarrier_init(shared + DecodeLayout<kV>::kKnown + 8 * i, 32);
    mbarrier_init(shared + DecodeLayout<kV>::kMerged, kV.warps * 32);
    fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x >= kV.warps * 32)
    fill_ring<kV>(a, shared, reinterpret_cast<float*>(smem));
  else
    decode<kV>(a, shared, reinterpret_cast<float*>(smem));
}

}  // namespace heed::cuda
