// attention_fwd_sm90 without a GPU: shared memory, the order of tiles, which keys are walked and which are masked.
#include <gtest/gtest.h>

#include <algorithm>
#include <bitset>
#include <cstddef>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda/kernels/work_sm90.h"
#include "cuda/tiles.h"
#include "unit/random_problems.h"

namespace heed::cuda {
namespace {

using testing::Random;

constexpr AttentionFwdSm90Variant variant_of(const AttentionFwdSm90Tile& t, bool lengths) {
  return {.head_dim = t.head_dim,
          .head_dim_v = t.head_dim_v,
          .consumers = t.consumers,
          .tile_k = t.tile_k,
          .stages = t.stages,
          .rings = t.rings,
          .q_in_registers = t.q_in_registers,
          .ping_pong = t.ping_pong,
          .blocks = t.blocks,
          .mask = t.ranges ? kMaskRange : kMaskNone,
          .lengths = lengths};
}

template <size_t kTile, bool kLengths>
void expect_host_and_device_agree() {
  constexpr AttentionFwdSm90Tile kRow = kAttentionFwdSm90Tiles[kTile];
  constexpr AttentionFwdSm90Variant kVariant = variant_of(kRow, kLengths);
  using L = Layout<kVariant>;
  const Barriers<kVariant> barriers{L::kBarriers};
  EXPECT_EQ(static_cast<int>(barriers.q_tile(kRow.consumers)), shared_bytes(kRow, kLengths)) << kTile;
  EXPECT_EQ(L::kTileQ, tile_q(kRow));
  EXPECT_EQ(L::kBarriers % 8, 0u);
  for (const u32 place : {L::kK, L::kVAt, L::kO, L::kBytesQ, L::kBytesK, L::kBytesV, L::kBytesO, L::kChunkK})
    EXPECT_EQ(place % 1024, 0u) << kTile;  // the swizzle's period
  EXPECT_EQ(L::kO + (L::kOutStaged ? kRow.consumers * L::kBytesO : 0), L::kBarriers) << kTile;
  if (kLengths) {  // one behind the other: this turn and the one before, rows
    EXPECT_EQ(barriers.sequence_work(0, 1) - barriers.sequence_work(0, 0), 4u * (kSequenceWorkWords + kStepWords));
    EXPECT_EQ(barriers.row_keys(0, 0), barriers.steps(0, 1) + 4 * kStepWords);
    EXPECT_EQ(barriers.row_keys(0, 64), barriers.q_tile(1));
  }
}

TEST(Sm90Work, SharedMemory) {
  [&]<size_t... kTiles>(std::index_sequence<kTiles...>) {
    (expect_host_and_device_agree<kTiles, false>(), ...);
    (expect_host_and_device_agree<kTiles, true>(), ...);
  }(std::make_index_sequence<std::size(kAttentionFwdSm90Tiles)>());
}

// Every unit of 16 bytes has a place of its own; the eight rows that a matrix instruction reads at once lie in eight
// different groups of four banks.
TEST(Sm90Work, Swizzle) {
  constexpr u32 kBox = 64 * 128;
  std::set<u32> places;
  for (int row = 0; row < 64; ++row)
    for (int column = 0; column < 128; column += 8) places.insert(staged(0, kBox, row, column));
  EXPECT_EQ(places.size(), 64u * 16);
  EXPECT_EQ(*places.rbegin(), 2 * kBox - 16);
  for (int row = 0; row < 64; row += 8)
    for (int column = 0; column < 128; column += 8) {
      std::bitset<8> groups;
      for (int r = row; r < row + 8; ++r) groups.set(staged(0, kBox, r, column) / 16 % 8);
      EXPECT_TRUE(groups.all());
    }
}

constexpr AttentionFwdSm90Variant kCausal = {.consumers = 2, .mask = kMaskRange},
                                  kFull = {.consumers = 2, .mask = kMaskNone},
                                  kWindow = {.consumers = 2, .mask = kMaskRange, .has_lower_end = 1};

// Every tile once; consumers without rows last or, under masks, first; under causal masks, within a section, no tile longer than the
// one before it, and full sections last.
TEST(Sm90Work, OrderOfTiles) {
  Random random(5);
  for (int n = 0; n < 200; ++n) {
    AttentionFwdSm90Params a = {};
    AttentionFwdParams& p = a.common;
    p.num_tiles_q = random.in(1, 20);
    constexpr i64 kRows = Layout<kCausal>::kTileQ;
    p.seqlen_q = p.num_tiles_q * kRows - random.in(0, kRows - 1);
    const i32 last = static_cast<i32>((p.seqlen_q + 63) / 64 * 64 - kRows);  // full, but for a consumer's rows
    p.nheads_q = static_cast<i32>(random.in(1, 9));
    p.batch = random.in(1, 9);
    p.longest_first = n % 2;
    const i32 heads = static_cast<i32>(p.nheads_q * p.batch);
    p.heads_per_section = static_cast<i32>(random.in(1, heads));
    std::set<std::tuple<i32, i32, i32>> causal, full;
    i32 before = 0, changes = 0, first_section = 0;
    for (u32 i = 0; i < static_cast<u32>(p.num_tiles_q) * heads; ++i) {
      const Work c = work_at<kCausal>(a, i), f = work_at<kFull>(a, i);
      causal.insert({c.row0, c.head, c.b});
      full.insert({f.row0, f.head, f.b});
      if (i > 0 && c.row0 > before) ++changes;
      if (changes == 0) first_section = static_cast<i32>(i) + 1;
      before = c.row0;
    }
    EXPECT_EQ(causal.size(), static_cast<size_t>(p.num_tiles_q) * heads);
    EXPECT_EQ(full.size(), causal.size());
    EXPECT_EQ(std::get<0>(*full.rbegin()), (p.num_tiles_q - 1) * kRows);
    EXPECT_EQ(std::get<0>(*causal.rbegin()), last);
    EXPECT_EQ(std::get<0>(*causal.begin()), last - (p.num_tiles_q - 1) * kRows);
    if (!p.longest_first || p.num_tiles_q == 1) continue;
    EXPECT_EQ(changes + 1, (heads + p.heads_per_section - 1) / p.heads_per_section);
    EXPECT_EQ(first_section, ((heads - 1) % p.heads_per_section + 1) * p.num_tiles_q);
  }
}

// Heads that share tiles: rows are (query, head), query-major.
TEST(Sm90Work, RowsOfAGroup) {
  constexpr AttentionFwdSm90Variant kShared = {.consumers = 2, .mask = kMaskRange, .has_lower_end = 1, .lengths = 1};
  for (i32 group = 1; group <= 64; ++group) {
    AttentionFwdSm90Params a = {};
    a.common.rows_per_query = group;
    set_sharing(a);
    EXPECT_EQ(rows_used<kShared>(a), 64 / group * group);
    EXPECT_EQ(queries_of_tile<kShared>(a), 2 * (64 / group));
    for (i32 row = 0; row < 64; ++row) {
      EXPECT_EQ(query_of_row<kShared>(a, row), row / group) << group;
      EXPECT_EQ(head_of_row<kShared>(a, row), row % group) << group;
    }
  }
}

// As Consumer::run walks them: what a row sees lies in the tiles of its consumer, which lie in the block's; tiles without a
// mask are seen whole by every row.
template <AttentionFwdSm90Variant kV>
void expect_every_visible_key(Random& random) {
  AttentionFwdSm90Params a = {};
  const i32 q_len = static_cast<i32>(random.in(1, 400)), k_len = static_cast<i32>(random.in(1, 900));
  constexpr i32 kFar = 1 << 30;
  a.hi_shift = random.chance(20) ? kFar : static_cast<i32>(random.in(-500, 1000));
  a.lo_shift = random.chance(20) ? -kFar : static_cast<i32>(random.in(-1000, 500));
  const Visible<kV> visible{a, k_len};
  const auto sees = [&](i32 row, i32 key) {
    return (kV.mask == kMaskNone || key < row + a.hi_shift) && (!kV.has_lower_end || key >= row + a.lo_shift);
  };
  constexpr i32 kRows = Layout<kV>::kTileQ, kKeys = kV.tile_k;
  for (i32 row0 = -rows_ahead<kV>(q_len); row0 < q_len; row0 += kRows) {
    const TileRange all = tiles_of_rows<kV>(visible, row0, std::min(row0 + kRows, q_len) - 1);
    for (i32 first = row0; first < row0 + kRows; first += 64) {
      const i32 last = std::min(first + 64, q_len) - 1;
      const TileRange own = tiles_of_rows<kV>(visible, first, last);
      if (own.end > own.begin) {
        ASSERT_TRUE(all.begin <= own.begin && own.end <= all.end);
      }
      if (first < 0) {
        ASSERT_EQ(own.end, own.begin) << "of a consumer without rows";
        continue;
      }
      const i32 unmasked_end = visible.hi(first) / kKeys;
      const i32 unmasked_begin = kV.has_lower_end ? (visible.lo(last) + kKeys - 1) / kKeys : 0;
      for (i32 row = first; row <= last; ++row)
        for (i32 key = 0; key < k_len; ++key) {
          const i32 tile = key / kKeys;
          ASSERT_EQ(sees(row, key), key >= visible.lo(row) && key < visible.hi(row)) << row << " " << key;
          if (sees(row, key)) {
            ASSERT_TRUE(tile >= own.begin && tile < own.end) << row << " " << key;
          } else if (tile >= own.begin && tile < own.end) {
            ASSERT_TRUE(tile >= unmasked_end || tile < unmasked_begin) << row << " " << key;
          }
        }
      if (own.end * kKeys > k_len) {
        ASSERT_LE(unmasked_end, own.end - 1);  // keys past the end are masked
      }
    }
  }
}

TEST(Sm90Work, EveryVisibleKeyIsWalkedAndNoHiddenOneUnmasked) {
  Random random(7);
  for (int n = 0; n < 60; ++n) {
    expect_every_visible_key<kFull>(random);
    expect_every_visible_key<kCausal>(random);
    expect_every_visible_key<kWindow>(random);
  }
}

TEST(Sm90Work, Ring) {
  Ring<3> ring{0, 1};
  for (int n = 0; n < 12; ++n) {
    EXPECT_EQ(ring.stage, n % 3);
    EXPECT_EQ(ring.parity, n / 3 % 2 == 0 ? 1u : 0u);
    ring.next();
  }
}

}  // namespace
}  // namespace heed::cuda
