// The tile tables: which specialisation of each GPU kernel does what, and why. Pure functions of the host, tested
// without a GPU; kernel_build_test compiles every row.
#pragma once

#include <cstddef>
#include <iterator>

#include "cuda/kernels/params.h"

namespace heed::cuda {

// ---- attention_fwd_sm80 ---------------------------------------------------------------------------------------------

// kFull: every key of the sequence; kRange: causal, window or chunk; kModified: softcap, bias, ALiBi, dropout or a
// boolean mask as well. Each holds more per score than the one before, so a row serves those before it too.
enum class ScoreKind { kFull, kRange, kModified };
// Where the grid is small the tile is low, so that every multiprocessor has a block; splits and gathered loads always
// take the low one.
enum class TileHeight { kTall, kLow };

struct AttentionFwdTile {
  int head_dim, head_dim_v;  // padded
  ScoreKind score;
  TileHeight height;
  int tile_q, tile_k, warps, stages;
  int blocks;       // of a multiprocessor: what registers are shared among
  int spill_bytes;  // what ptxas may spill, at most 64 and outside the loop
  const char* why;
  int since = 0;  // major compute capability from which on the row serves
};

// TFLOP/s in the reasons: bf16, 16k tokens, hidden 2048, on an H200.
inline constexpr AttentionFwdTile kAttentionFwdTiles[] = {
    {32, 32, ScoreKind::kRange, TileHeight::kTall, 128, 64, 4, 2, 2, 0, "a third block would spill"},
    {32, 32, ScoreKind::kRange, TileHeight::kLow, 64, 64, 4, 2, 3, 0, "a fourth block would spill"},
    {32, 32, ScoreKind::kModified, TileHeight::kLow, 64, 32, 4, 2, 2, 0, "64 keys spill on Blackwell", 10},
    {32, 32, ScoreKind::kModified, TileHeight::kLow, 64, 64, 4, 2, 2, 0, "a third block would spill"},

    {64, 64, ScoreKind::kRange, TileHeight::kTall, 128, 32, 4, 2, 3, 0, "512 keys: 277 against 243 of 64 keys, twice"},
    {64, 64, ScoreKind::kRange, TileHeight::kLow, 64, 64, 4, 1, 3, 0, "512 keys: 204"},
    {64, 64, ScoreKind::kModified, TileHeight::kLow, 64, 32, 4, 2, 2, 0, "64 keys spill on Blackwell", 10},
    {64, 64, ScoreKind::kModified, TileHeight::kLow, 64, 64, 4, 2, 2, 0, "a third block would spill"},

    {96, 96, ScoreKind::kRange, TileHeight::kTall, 128, 64, 4, 1, 2, 0, "as tall as registers allow"},
    {96, 96, ScoreKind::kRange, TileHeight::kLow, 64, 64, 4, 2, 2, 0, "as d128"},
    {96, 96, ScoreKind::kModified, TileHeight::kLow, 64, 32, 4, 1, 2, 0, "64 keys spill on Blackwell", 10},
    {96, 96, ScoreKind::kModified, TileHeight::kLow, 64, 64, 4, 1, 2, 0, "as d128"},

    {128, 128, ScoreKind::kRange, TileHeight::kTall, 128, 48, 4, 1, 2, 0, "64 keys spill on sm_100", 10},
    {128, 128, ScoreKind::kRange, TileHeight::kTall, 128, 64, 4, 1, 2, 0, "4k keys: 367 against 347 of 32 keys", 9},
    {128, 128, ScoreKind::kRange, TileHeight::kTall, 128, 32, 4, 1, 2, 0, "64 keys would spill, two stages too"},
    {128, 128, ScoreKind::kRange, TileHeight::kLow, 64, 64, 4, 2, 2, 0, "causal, 4k: 253 against 313 of 128 rows"},
    {128, 128, ScoreKind::kModified, TileHeight::kLow, 64, 32, 4, 1, 2, 0, "64 keys spill on Blackwell", 10},
    {128, 128, ScoreKind::kModified, TileHeight::kLow, 64, 48, 4, 1, 2, 0, "64 keys and a mask tensor spill"},

    {192, 128, ScoreKind::kRange, TileHeight::kLow, 64, 64, 4, 1, 2, 0, "128 rows would not fit 99 KB"},
    {192, 128, ScoreKind::kModified, TileHeight::kLow, 64, 32, 4, 1, 2, 0, "64x64 spills"},

    {256, 256, ScoreKind::kFull, TileHeight::kLow, 64, 48, 4, 1, 2, 0, "4k keys: 307 against 297 of 64, 274 of 128x64"},
    {256, 256, ScoreKind::kRange, TileHeight::kLow, 64, 48, 4, 1, 2, 0,
     "4k keys: 307 against 297 of 64, 274 of 128x64"},
    {256, 256, ScoreKind::kModified, TileHeight::kLow, 64, 32, 4, 1, 2, 0, "64x64 spills where keys are hidden"},
};

constexpr int kPaddingElements = 8;  // behind each row in shared memory (attention_fwd_sm80.cu)

constexpr int shared_bytes(const AttentionFwdTile& t) {
  const int pitch = t.head_dim + kPaddingElements, pitch_v = t.head_dim_v + kPaddingElements;
  return 2 * (t.tile_q * pitch + t.stages * t.tile_k * (pitch + pitch_v));
}

// The padded pair of head dims that takes head_dim and head_dim_v, by index; -1 where none does (the portable kernel
// does).
struct HeadDims {
  int head_dim, head_dim_v;
};
inline constexpr HeadDims kAttentionFwdHeadDims[] = {{32, 32}, {64, 64}, {96, 96}, {128, 128}, {192, 128}, {256, 256}};

constexpr const HeadDims* padded_head_dims(long long head_dim, long long head_dim_v) {
  for (const HeadDims& dims : kAttentionFwdHeadDims)
    if (head_dim <= dims.head_dim && head_dim_v <= dims.head_dim_v) return &dims;
  return nullptr;
}

// Index of the row for padded dims on a device of that major compute capability that grants a block `shared_limit` bytes,
// -1 where there is none: of the height wanted, else low; of the score wanted, else the nearest that serves it. (An
// index, because a comparison with nullptr is no constant expression under g++'s undefined-behaviour sanitizer.)
constexpr int attention_fwd_row(HeadDims dims, ScoreKind score, TileHeight height, int major, int shared_limit) {
  for (const TileHeight wanted : {height, TileHeight::kLow}) {
    for (size_t i = 0; i < std::size(kAttentionFwdTiles); ++i) {  // scores stand in rising order
      const AttentionFwdTile& t = kAttentionFwdTiles[i];
      if (t.head_dim == dims.head_dim && t.head_dim_v == dims.head_dim_v && t.height == wanted && t.score >= score &&
          shared_bytes(t) <= shared_limit && major >= t.since)
        return static_cast<int>(i);
    }
  }
  return -1;
}

inline const AttentionFwdTile* attention_fwd_tile(HeadDims dims, ScoreKind score, TileHeight height, int major,
                                                  int shared_limit) {
  const int row = attention_fwd_row(dims, score, height, major, shared_limit);
  return row < 0 ? nullptr : &kAttentionFwdTiles[row];
}

// ---- attention_fwd_sm90 ---------------------------------------------------------------------------------------------

struct AttentionFwdSm90Tile {
  int head_dim, head_dim_v;  // padded
  bool ranges;               // causal, window, chunk, lengths; else every key of the sequence
  int consumers, tile_k, stages, rings, q_in_registers, ping_pong, blocks;
  int spill_bytes;
  double rate;  // TFLOP/s of a whole H200 that does nothing but whole key tiles: what the planner reckons with
  const char* why;
  bool terms = false;  // bias, ALiBi, mask tensor, dropout, for which the tile leaves registers
};

// Several rows may serve the same head dims: the planner takes the one whose tiles suit the grid. Reasons: bf16, 16k tokens
// and hidden 2048 where nothing else is said, with lse, on an H200, hot, TFLOP/s (docs/kernels/attention_fwd_sm90.md).
inline constexpr AttentionFwdSm90Tile kAttentionFwdSm90Tiles[] = {
    {64, 64, false, 4, 64, 4, 1, 0, 0, 1, 0, 590, "more warps overlap best: 3 x 64 rows, 128 keys lost 10 %"},
    {64, 64, true, 4, 64, 4, 1, 0, 0, 1, 64, 570, "as without ranges; spills around the loops, not in them"},
    {64, 64, false, 1, 128, 2, 1, 0, 0, 2, 0, 520, "two blocks: 16 heads of 1k 11.5 us, three of 64 keys 13.7"},
    {64, 64, true, 1, 128, 2, 1, 0, 0, 2, 0, 490, "two blocks: 16 heads of 1k 10.7 us, three of 64 keys 11.4"},
    {64, 64, false, 1, 64, 3, 1, 0, 0, 3, 0, 560, "three blocks: 2048 heads of 64 keys 19.3 us, two of 128 keys 23.3"},
    {64, 64, true, 1, 64, 3, 1, 0, 0, 3, 0, 530, "three blocks: 256 heads of 256 keys 156, two of 128 keys 131"},
    {96, 96, false, 2, 128, 2, 1, 1, 1, 1, 0, 690, "1k keys: 573 against 530 of 3 x 64 rows"},
    {96, 96, false, 3, 96, 2, 2, 0, 0, 1, 0, 725, "4k keys: 700 against 676 of 2 x 64 rows"},
    {96, 96, true, 3, 64, 4, 1, 0, 0, 1, 0, 690, "1k keys: 415 against 378 of 96 keys; 16k: 694 against 690"},
    {128, 128, false, 2, 128, 2, 1, 1, 1, 1, 0, 800, "Q in registers: a quarter less shared memory traffic"},
    {128, 128, true, 3, 64, 4, 1, 0, 0, 1, 0, 790,
     "1k keys: 458 against 428 of 2 x 64 rows, 128 keys; 16k: 801 against 765"},
    {128, 128, false, 1, 64, 2, 1, 1, 0, 2, 0, 720, "two blocks: 16 heads of 512 7.7 us against 9.5 of 128 rows"},
    {128, 128, true, 1, 64, 2, 1, 1, 0, 2, 0, 680, "two blocks: 16 heads of 512 8.2 us against 9.8 of 128 rows"},
    {192, 128, false, 2, 128, 2, 1, 0, 1, 1, 0, 760, "as d128"},
    {192, 128, true, 2, 96, 2, 2, 0, 0, 1, 0, 720, "96 keys fill the memory"},
    {256, 256, false, 2, 64, 2, 2, 0, 0, 1, 0, 760,
     "1k keys: 619 against 607 of 80 keys in turn; 16k: 738 against 732"},
    {256, 256, true, 2, 64, 2, 2, 0, 0, 1, 0, 760, "1k keys: 477 against 460 of 80 keys; 16k: 692 against 683"},
    // With terms: of an additive bias to a mask tensor, hq=64 sq=4096 d=128 causal 315 to 520.
    {64, 64, true, 3, 64, 4, 1, 0, 0, 1, 0, 350, "a fourth consumer would spill", true},
    {64, 64, true, 1, 64, 3, 1, 0, 0, 2, 0, 280, "two blocks, for few rows", true},
    {96, 96, true, 2, 64, 4, 1, 0, 0, 1, 0, 400, "a third consumer would spill", true},
    {128, 128, true, 2, 64, 4, 1, 1, 0, 1, 0, 480, "96 keys or a third consumer would spill", true},
    {128, 128, true, 1, 64, 2, 1, 1, 0, 2, 0, 380, "two blocks, for few rows", true},
    {192, 128, true, 2, 64, 3, 1, 0, 0, 1, 0, 450, "80 keys compile for more than three seconds", true},
    {256, 256, true, 2, 64, 2, 2, 0, 0, 1, 0, 480, "as without terms", true},
};

constexpr int tile_q(const AttentionFwdSm90Tile& t) { return 64 * t.consumers; }

// Layout in work_sm90.h.
constexpr int shared_bytes(const AttentionFwdSm90Tile& t, bool lengths = false) {
  const int boxes = (t.head_dim + 63) / 64, boxes_v = (t.head_dim_v + 63) / 64;
  const int out = t.head_dim > 128 ? 0 : t.consumers * boxes_v * 64 * 128;  // else it leaves straight from registers
  const int stages_v = t.stages + (t.rings == 2 && t.head_dim > 192 ? 1 : 0);
  return t.consumers * boxes * 64 * 128 + t.tile_k * 128 * (t.stages * boxes + stages_v * boxes_v) + out +
         8 * (2 * (t.stages + stages_v) + (lengths ? 3 : 2) * t.consumers) +
         4 * t.consumers * (lengths ? kSequenceWords : 1);
}

// Where a turn is short, what the variant with lengths adds to it counts: 51 queries and 867 keys of D 256 12.5 us without it,
// 14.3 us with it in another run. Those tiles have a variant for splits alone.
constexpr bool splits_alone(const AttentionFwdSm90Tile& t) {
  return t.ranges && !t.terms && (t.head_dim == 256 || (t.head_dim == 64 && t.blocks == 3));
}

// Head dims at which a softcap without any of those runs on the tiles for ranges. (At D 64 it would spill, above 128 compile
// for nearly three seconds: the tiles with terms do it.)
constexpr bool caps_scores(int head_dim) { return head_dim == 96 || head_dim == 128; }

constexpr bool serves(const AttentionFwdSm90Tile& t, long long head_dim, long long head_dim_v, bool ranges,
                      bool terms) {
  return head_dim <= t.head_dim && head_dim_v <= t.head_dim_v && t.ranges == ranges && t.terms == terms;
}

// ---- attention_decode_sm80 ------------------------------------------------------------------------------------------

// Few rows (queries of all heads of a group) over many keys. Its steps of K take 32 columns, of V 64.
struct DecodeTile {
  int head_dim, head_dim_v;  // padded
  int tile_q, tile_k, warps;
  int spill_bytes;
  const char* why;
};

inline constexpr DecodeTile kDecodeTiles[] = {
    {64, 64, 8, 64, 4, 0, "up to eight heads of a group"},
    {64, 64, 16, 64, 4, 0, "up to sixteen"},
    {128, 128, 8, 64, 4, 0, "up to eight heads of a group"},
    {128, 128, 16, 64, 4, 0, "up to sixteen"},
    {192, 128, 8, 64, 4, 0, "sixteen rows spill, as D 256 does with eight: attention_fwd_sm80 takes those"},
};

constexpr int shared_bytes(const DecodeTile& t) {  // f32: O, maxima, sums
  return 4 * t.warps * t.tile_q * (t.head_dim_v + kMeetingPad + 2);
}

// The first, which is the least, that takes so much; null where none does.
template <class Tile, std::size_t kCount>
constexpr const Tile* least_tile(const Tile (&tiles)[kCount], long long head_dim, long long head_dim_v,
                                 long long rows) {
  for (const Tile& t : tiles)
    if (head_dim <= t.head_dim && head_dim_v <= t.head_dim_v && rows <= t.tile_q) return &t;
  return nullptr;
}
constexpr const DecodeTile* decode_tile(long long head_dim, long long head_dim_v, long long rows) {
  return least_tile(kDecodeTiles, head_dim, head_dim_v, rows);
}

// ---- attention_decode_sm90 ------------------------------------------------------------------------------------------

// A tile of keys is a stage of the ring: 16 of each warp.
struct DecodeSm90Tile {
  int head_dim, head_dim_v;  // padded
  int tile_q, warps, stages;
  int spill_bytes;
  const char* why;
};

inline constexpr DecodeSm90Tile kDecodeSm90Tiles[] = {
    {64, 64, 8, 8, 6, 0, "192 KB under way"},
    {64, 64, 16, 8, 5, 0, "160 KB: as much as fits"},
    {128, 128, 8, 8, 3, 0, "192 KB under way"},
    {128, 128, 16, 4, 6, 0, "192 KB under way; eight warps would leave 128"},
    {192, 128, 8, 4, 5, 0, "200 KB: as much as fits"},
};

// Layout in kernels/attention_decode_sm90.cu.
constexpr int tile_k(const DecodeSm90Tile& t) { return 16 * t.warps; }
constexpr int shared_bytes(const DecodeSm90Tile& t) {
  return t.stages * tile_k(t) * 2 * (t.head_dim + t.head_dim_v) +
         4 * t.warps * t.tile_q * (t.head_dim_v + kMeetingPad + 2) + (t.stages + 2) * (kDecodeTileBytes + 8) +
         16 * t.stages + 8;
}
constexpr const DecodeSm90Tile* decode_sm90_tile(long long head_dim, long long head_dim_v, long long rows) {
  return least_tile(kDecodeSm90Tiles, head_dim, head_dim_v, rows);
}

// ---- attention_fwd_portable -----------------------------------------------------------------------------------------

struct PortableTile {
  int dim;  // of both head dims, padded
  int tile_q, tile_k;
  int spill_bytes;
  const char* why;
};

inline constexpr PortableTile kPortableTiles[] = {
    {64, 64, 64, 0, "4 x 8 sums a thread"},
    {128, 64, 32, 0, "4 x 16 sums a thread"},
    {256, 32, 32, 0, "2 x 32 sums a thread; 64 rows would not fit 99 KB"},
    {512, 16, 16, 0, "64 sums a thread; 32 keys would not fit 99 KB"},
};
constexpr int kPortableThreads = 128;

constexpr int shared_bytes(const PortableTile& t) {
  const int pitch = t.dim + 4;
  return 4 * (t.tile_q * pitch + t.tile_k * pitch + t.tile_q * (t.tile_k + 1) + 11 * t.tile_q);
}

constexpr const PortableTile* portable_tile(long long head_dim, long long head_dim_v) {
  for (const PortableTile& t : kPortableTiles)
    if (head_dim <= t.dim && head_dim_v <= t.dim) return &t;
  return nullptr;
}

// ---- devices --------------------------------------------------------------------------------------------------------

// Shared memory that a block may be granted, by what NVRTC compiles for.
struct Architecture {
  const char* name;
  int major;
  int shared_limit;
};
inline constexpr Architecture kArchitectures[] = {{"sm_80", 8, 163 << 10},   {"sm_86", 8, 99 << 10},
                                                  {"sm_89", 8, 99 << 10},    {"sm_90a", 9, 227 << 10},
                                                  {"sm_100", 10, 227 << 10}, {"sm_120", 12, 99 << 10}};

// ---- checks ---------------------------------------------------------------------------------------------------------

constexpr bool tiles_are_sound() {
  for (const AttentionFwdTile& t : kAttentionFwdTiles) {
    if (t.head_dim % 16 != 0 || t.head_dim_v % 16 != 0 || t.tile_k % 16 != 0) return false;  // steps of the matrix unit
    if (t.tile_q % (t.warps * 16) != 0 || t.stages < 1 || t.stages > 2) return false;
    if (t.spill_bytes < 0 || t.spill_bytes > 64 || t.blocks * t.warps * 32 * 128 > 65536) return false;
  }
  for (const AttentionFwdSm90Tile& t : kAttentionFwdSm90Tiles) {
    if (t.head_dim % 16 != 0 || t.head_dim_v % 16 != 0 || t.tile_k % 16 != 0 || t.tile_k > 256) return false;
    if (t.consumers < 1 || t.consumers > 4 || t.rings < 1 || t.rings > 2) return false;
    if (t.ping_pong != 0 && (t.consumers != 2 || t.ranges)) return false;  // consumers in turn take the same steps
    if (t.spill_bytes < 0 || t.spill_bytes > 64 || t.rate <= 0) return false;
    if (t.terms && t.tile_k % 32 != 0) return false;                              // words of a mask's bits
    if (t.head_dim > 128 && t.head_dim_v % 32 != 0) return false;                 // O is traded in groups of 32 columns
    if (t.blocks * (shared_bytes(t, t.ranges) + 1024) > 228 << 10) return false;  // of an H100 or H200
  }
  for (const DecodeTile& t : kDecodeTiles)
    if (t.head_dim % 32 != 0 || t.head_dim_v % 64 != 0 || t.tile_q % 8 != 0 || t.tile_k % 16 != 0) return false;
  for (const DecodeSm90Tile& t : kDecodeSm90Tiles) {
    if (t.head_dim % 64 != 0 || t.head_dim_v % 64 != 0 || t.tile_q % t.warps != 0) return false;
    if (shared_bytes(t) > 227 << 10) return false;
  }
  for (const PortableTile& t : kPortableTiles)
    if (t.tile_q % 16 != 0 || t.tile_k % 8 != 0 || t.dim % 8 != 0) return false;  // 16 x 8 threads
  return true;
}
constexpr bool every_device_has_a_tile() {
  for (const Architecture& arch : kArchitectures) {
    for (const HeadDims& dims : kAttentionFwdHeadDims)
      for (const ScoreKind score : {ScoreKind::kFull, ScoreKind::kRange, ScoreKind::kModified})
        if (attention_fwd_row(dims, score, TileHeight::kLow, arch.major, arch.shared_limit) < 0) return false;
    for (const DecodeTile& t : kDecodeTiles)
      if (shared_bytes(t) > arch.shared_limit) return false;
    for (const PortableTile& t : kPortableTiles)
      if (shared_bytes(t) > arch.shared_limit) return false;
  }
  return true;
}
static_assert(tiles_are_sound());
static_assert(every_device_has_a_tile());

}  // namespace heed::cuda
