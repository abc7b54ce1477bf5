// attention_fwd_sm90: where things lie in shared memory, which rows a block takes, and which keys those see.
#pragma once

#include "mma_sm90.cuh"
#include "params.h"

namespace heed::cuda {

template <AttentionFwdSm90Variant kV>
struct Layout {
  static constexpr int kChunks = (kV.head_dim + 63) / 64, kChunksV = (kV.head_dim_v + 63) / 64;  // boxes across a row
  static constexpr u32 kChunkQ = 64 * 128, kChunkK = kV.tile_k * 128;
  static constexpr u32 kBytesQ = kChunks * kChunkQ, kBytesO = kChunksV * kChunkQ;  // of a consumer
  static constexpr u32 kBytesK = kChunks * kChunkK, kBytesV = kChunksV * kChunkK;  // of a stage
  static constexpr bool kOutOverQ = kV.head_dim > 128;
  static constexpr u32 kK = kV.consumers * kBytesQ, kVAt = kK + kV.stages * kBytesK, kAfter = kVAt + kV.stages * kBytesV;
  static constexpr u32 kO = kOutOverQ ? 0 : kAfter, kStepO = kOutOverQ ? kBytesQ : kBytesO;  // from one consumer to the next
  static constexpr u32 kBarriers = kAfter + (kOutOverQ ? 0 : kV.consumers * kBytesO);

  static constexpr int kThreads = 128 * (kV.consumers + 1), kTileQ = 64 * kV.consumers;
  static constexpr int kScores = kV.tile_k / 2, kOut = kV.head_dim_v / 2, kKeySteps = kV.tile_k / 16;  // registers; steps
  // What the block starts with, a thread, and what becomes of it.
  static constexpr int kShare = 65536 / (kThreads * kV.blocks) / 8 * 8, kRegisters = kShare < 248 ? kShare : 248;
  static constexpr int kOfConsumer = kV.consumers == 1   ? 232
                                     : kV.consumers == 2 ? (kV.head_dim > 128 ? 240 : 232)
                                     : kV.consumers == 3 ? 160
                                                         : 112;
  static constexpr int kOfProducer = kV.consumers == 2 && kV.head_dim <= 128 ? 40 : kV.consumers == 3 ? 32 : 24;
  static_assert(kOfProducer + kV.consumers * kOfConsumer <= (kV.consumers + 1) * kRegisters,
                "setmaxnreg would wait for ever");
  static_assert(!kOutOverQ || kBytesO <= kBytesQ);
};

template <AttentionFwdSm90Variant kV>
struct Barriers {
  u32 base;
  __device__ __forceinline__ u32 k_full(int stage) const { return base + 8 * stage; }
  __device__ __forceinline__ u32 k_empty(int stage) const { return base + 8 * (kV.stages + stage); }
  __device__ __forceinline__ u32 v_full(int stage) const { return base + 8 * (2 * kV.stages + stage); }
  __device__ __forceinline__ u32 v_empty(int stage) const { return base + 8 * (3 * kV.stages + stage); }
  __device__ __forceinline__ u32 q_full(int consumer) const { return base + 8 * (4 * kV.stages + consumer); }
  __device__ __forceinline__ u32 q_empty(int consumer) const {
    return base + 8 * (4 * kV.stages + kV.consumers + consumer);
  }
  // Where the producer says which tile of rows a consumer's Q is of; kNoMore after the last.
  __device__ __forceinline__ u32 q_tile(int consumer) const {
    return base + 8 * (4 * kV.stages + 2 * kV.consumers) + 4 * consumer;
  }
};

constexpr u32 kNoMore = 0xffffffffu;

template <int kStages>
struct Ring {  // a place in a ring of stages; the parity to wait for
  int stage = 0;
  u32 parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// ---- which rows, which keys -------------------------------------------------------------------------------------------

// The keys that rows see: lo(i) <= j < hi(i), neither of which falls from one row to the next.
template <AttentionFwdSm90Variant kV>
struct Visible {
  const AttentionFwdSm90Params& a;
  i32 k_len;

  __device__ __forceinline__ i32 lo(i32 row) const {
    return kV.has_lower_end ? min(max(row + a.lo_shift, 0), k_len) : 0;
  }
  __device__ __forceinline__ i32 hi(i32 row) const {
    return kV.mask == kMaskNone ? k_len : max(min(row + a.hi_shift, k_len), 0);
  }
};

struct TileRange {
  i32 begin = 0, end = 0;
};

template <AttentionFwdSm90Variant kV>
__device__ __forceinline__ TileRange tiles_of_rows(const Visible<kV>& visible, i32 first, i32 last) {
  const i32 lo = visible.lo(first), hi = visible.hi(last);
  const i32 begin = static_cast<u32>(lo) / kV.tile_k;
  return {begin, hi > lo && last >= first ? static_cast<i32>((static_cast<u32>(hi) + kV.tile_k - 1) / kV.tile_k) : begin};
}

// The rows of one turn of the block's loop.
struct Work {
  i32 row0, head, b;
};

// Full: rows of a head one after the other, so that blocks that run together share its K and V. Ranges: the heaviest rows
// first, within sections of heads whose K and V fit the L2 cache together; a section that is not full comes first, as a
// few heads' longest rows at the end would keep a few blocks busy alone.
template <AttentionFwdSm90Variant kV>
__device__ __forceinline__ Work work_at(const AttentionFwdParams& p, u32 index) {
  const u32 tiles = static_cast<u32>(p.num_tiles_q), heads = p.nheads_q;
  u32 tile, batch_head;
  if (kV.mask == kMaskNone || !p.longest_first) {
    tile = index % tiles;
    batch_head = index / tiles;
  } else {
    const u32 section_heads = p.heads_per_section, section_size = section_heads * tiles;
    const u32 all_heads = heads * static_cast<u32>(p.batch), from_end = all_heads * tiles - 1 - index;
    const u32 section = from_end / section_size, rest = from_end % section_size;
    const u32 here = min(section_heads, all_heads - section * section_heads);
    tile = rest / here;
    batch_head = section * section_heads + rest % here;
  }
  return {static_cast<i32>(tile * Layout<kV>::kTileQ), static_cast<i32>(batch_head % heads),
          static_cast<i32>(batch_head / heads)};
}

// Starts the counter of tiles, unless another block has. (A block that finds it unmarked just before another marks it does
// nothing either.)
__device__ __forceinline__ void mark_counter(const AttentionFwdSm90Params& a) {
  const u64 held = *static_cast<volatile const u64*>(a.next_tile);
  if ((held ^ a.mark) >> kTileBits != 0) atomicCAS(a.next_tile, held, a.mark);
}

// The tile after `index`. Blocks ask once for every tile they do, so that the last to ask knows it is.
__device__ __forceinline__ u32 tile_after(const AttentionFwdSm90Params& a, u32 index) {
  if (a.next_tile == nullptr) return index + gridDim.x;
  const u32 taken = static_cast<u32>(atomicAdd(a.next_tile, 1ull)) & ((1u << kTileBits) - 1);
  if (taken + 1 == static_cast<u32>(a.num_work_tiles)) atomicExch(a.next_tile, 0ull);
  return gridDim.x + taken;
}

}  // namespace heed::cuda
