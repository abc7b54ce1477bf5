// attention_fwd_sm90 on the host where lengths come from the device: packed and padded sequences, chunks, and what lies
// outside of them.
#include <gtest/gtest.h>

#include "emulated_problem.h"

namespace heed::cuda {
namespace {

constexpr AttentionFwdSm90Variant kD64 = with_lengths(kTile64),
                                  kD64Short = with_lengths({.is_bf16 = 1, .consumers = 1, .blocks = 2}),
                                  kD128 = with_lengths(
                                      {.head_dim = 128, .head_dim_v = 128, .rings = 2, .q_in_registers = 1}),
                                  kD256 = with_lengths(kTile256);

// None, one, many; the next one's rows begin where a tile is half full.
TEST(EmulatedSm90Lengths, Packed) {
  Case c = {.batch = 6,
            .nheads_q = 2,
            .nheads_kv = 1,
            .head_dim = 64,
            .head_dim_v = 56,
            .right = 0,
            .counts_tiles = true,
            .hidden_nan = true,
            .packed_q = true,
            .packed_k = true,
            .rows_q = {0, 70, 1, 64, 300, 0},
            .rows_k = {5, 90, 130, 64, 280, 0},
            .gap = 9};
  EXPECT_EQ(failure_of<kD64>(c, 1), "");
  EXPECT_EQ(failure_of<kD64Short>(c, 2), "");
  c.right = kUnbounded, c.sinks = true, c.counts_tiles = false;
  EXPECT_EQ(failure_of<kD64>(c, 3), "");
  c.head_dim = c.head_dim_v = 128, c.left = 40, c.right = 3;
  EXPECT_EQ(failure_of<kD128>(c, 4), "");
  c.head_dim = c.head_dim_v = 256, c.rows_q = {3, 20, 65, 64, 0, 7};
  EXPECT_EQ(failure_of<kD256>(c, 5), "");
}

// One of q and k packed, the other padded; seqused on top of either; left padding; rows of a cache.
TEST(EmulatedSm90Lengths, PackedAndPadded) {
  EXPECT_EQ(failure_of<kD64>({.batch = 3,
                              .nheads_q = 2,
                              .seqlen_k = 200,
                              .head_dim = 64,
                              .head_dim_v = 64,
                              .right = 0,
                              .hidden_nan = true,
                              .packed_q = true,
                              .rows_q = {30, 0, 129},
                              .used_q = {30, 0, 100},
                              .used_k = {200, 11, 70},
                              .cache_rows = {3, 0, 1}},
                             6),
            "");
  EXPECT_EQ(failure_of<kD128>({.batch = 3,
                               .nheads_q = 2,
                               .seqlen_q = 150,
                               .head_dim = 120,
                               .head_dim_v = 128,
                               .left = 60,
                               .right = 0,
                               .hidden_nan = true,
                               .packed_k = true,
                               .rows_k = {150, 0, 260},
                               .used_q = {150, 40, 3},
                               .gap = 3},
                              7),
            "");
  EXPECT_EQ(failure_of<kD64Short>({.batch = 4,
                                   .nheads_q = 2,
                                   .seqlen_q = 90,
                                   .seqlen_k = 300,
                                   .head_dim = 64,
                                   .head_dim_v = 64,
                                   .right = 0,
                                   .sinks = true,
                                   .hidden_nan = true,
                                   .used_q = {90, 0, 64, 5},
                                   .used_k = {300, 150, 1, 129},
                                   .leftpad = {0, 140, 1, 64}},
                                  8),
            "");
}

TEST(EmulatedSm90Lengths, Chunks) {
  for (const int offset : {-70, 0, 33, kBottomRight})
    EXPECT_EQ(failure_of<kD64>({.batch = 2,
                                .nheads_q = 1,
                                .seqlen_q = 300,
                                .seqlen_k = 340,
                                .head_dim = 64,
                                .head_dim_v = 64,
                                .right = offset == 0 ? kUnbounded : 0,
                                .offset = offset,
                                .hidden_nan = true,
                                .used_k = {340, 200},
                                .chunk = 96},
                               9),
              "")
        << offset;
}

// Several pages a tile, several tiles a page, and neither; entries past the last key point outside the cache.
TEST(EmulatedSm90Lengths, Pages) {
  for (const int page_size : {8, 16, 24, 64, 256}) {
    Case c = {.batch = 3,
              .nheads_q = 2,
              .seqlen_q = 70,
              .seqlen_k = 300,
              .head_dim = 64,
              .head_dim_v = 64,
              .right = 0,
              .hidden_nan = true,
              .used_k = {300, 0, 131},
              .page_size = page_size};
    EXPECT_EQ(failure_of<kD64>(c, 13), "") << page_size;
    c.cache_rows = {2, 0, 3}, c.used_q = {70, 5, 1}, c.left = 100;
    c.head_dim = c.head_dim_v = 128;
    EXPECT_EQ(failure_of<kD128>(c, 14), "") << page_size;
  }
}

// A sequence whose data are bad is 0; with offsets out of order the rest is still found, and nothing else is written.
TEST(EmulatedSm90Lengths, BadSequences) {
  Case c = {.batch = 4,
            .nheads_q = 2,
            .head_dim = 64,
            .head_dim_v = 64,
            .right = 0,
            .packed_q = true,
            .packed_k = true,
            .rows_q = {70, 80, 3, 130},
            .rows_k = {70, 80, 3, 130},
            .bad = {1}};
  EXPECT_EQ(failure_of<kD64>(c, 10), "");
  c.bad = {1, 2}, c.wrong_cu = 2;
  EXPECT_EQ(failure_of<kD64>(c, 15), "");
  EXPECT_EQ(failure_of<kD64Short>(c, 16), "");
}

// Sequences of few queries are another kernel's: only their padding is written.
TEST(EmulatedSm90Lengths, ThoseOfAnotherKernel) {
  Case c = {.batch = 4,
            .nheads_q = 4,
            .nheads_kv = 2,
            .seqlen_q = 100,
            .seqlen_k = 130,
            .head_dim = 64,
            .head_dim_v = 64,
            .right = 0,
            .used_q = {4, 100, 0, 5},
            .used_k = {130, 100, 0, 60},
            .min_rows = 9};
  EXPECT_EQ(failure_of<kD64Short>(c, 11), "");
  EXPECT_EQ(failure_of<kD64>(c, 12), "");
  c.shares = true;  // heads of a group in one tile
  EXPECT_EQ(failure_of<kD64>(c, 13), "");
}

// The same problem with threads, copies and products in another order each time.
TEST(EmulatedSm90Lengths, AnyOrder) {
  const Case c = {.batch = 3,
                  .nheads_q = 2,
                  .head_dim = 128,
                  .head_dim_v = 128,
                  .right = 0,
                  .counts_tiles = true,
                  .hidden_nan = true,
                  .packed_q = true,
                  .packed_k = true,
                  .rows_q = {140, 1, 70},
                  .rows_k = {150, 40, 200}};
  for (unsigned seed = 20; seed < 25; ++seed) EXPECT_EQ(failure_of<kD128>(c, seed), "");
}

}  // namespace
}  // namespace heed::cuda
