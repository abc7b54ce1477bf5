// attention_fwd_sm90 on the host where keys are split: the partials, merged here as combine merges them.
#include <gtest/gtest.h>

#include "emulated_problem.h"

namespace heed::cuda {
namespace {

constexpr AttentionFwdSm90Variant kD64 = with_lengths(kTile64), kD128 = with_lengths(kTile128Low),
                                  kD64Alone = with_split(
                                      {.is_bf16 = 1, .consumers = 1, .tile_k = 64, .stages = 3, .blocks = 3}),
                                  kD256 = with_lengths(kTile256), kD256Alone = with_split(kTile256),
                                  kTerms = with_terms({.is_bf16 = 1, .consumers = 3, .tile_k = 64, .stages = 4});

TEST(EmulatedSm90Split, Merged) {
  Case c = {.batch = 2,
            .nheads_q = 2,
            .nheads_kv = 1,
            .seqlen_q = 70,
            .seqlen_k = 700,
            .head_dim = 64,
            .head_dim_v = 56,
            .counts_tiles = true,
            .splits = 3};
  EXPECT_EQ(failure_of<kD64>(c, 1), "");
  c.sinks = true, c.right = 0, c.hidden_nan = true;
  EXPECT_EQ(failure_of<kD64>(c, 2), "");
  c.head_dim = c.head_dim_v = 128, c.right = 3, c.splits = 4;
  EXPECT_EQ(failure_of<kD128>(c, 3), "");
  c.times = 20;
  EXPECT_EQ(failure_of<kD128>(c, 4), "");
  c.times = 1, c.head_dim = c.head_dim_v = 256, c.splits = 2;
  EXPECT_EQ(failure_of<kD256>(c, 5), "");
  EXPECT_EQ(failure_of<kD256Alone>(c, 6), "");
  c.head_dim = c.head_dim_v = 64, c.right = 0, c.splits = 5;
  EXPECT_EQ(failure_of<kD64Alone>(c, 7), "");
}

// More splits than there are key tiles, rows that see no key, one split.
TEST(EmulatedSm90Split, Ends) {
  Case c = {.nheads_q = 1, .seqlen_q = 150, .seqlen_k = 90, .head_dim = 64, .head_dim_v = 64, .right = 0, .splits = 5};
  EXPECT_EQ(failure_of<kD64>(c, 1), "");
  c.splits = 1, c.sinks = true;
  EXPECT_EQ(failure_of<kD64>(c, 2), "");
}

// Where lengths come from the device: a sequence that ends before a split begins, padding, packed rows, pages.
TEST(EmulatedSm90Split, Lengths) {
  Case c = {.batch = 4,
            .nheads_q = 2,
            .nheads_kv = 1,
            .seqlen_q = 70,
            .seqlen_k = 400,
            .head_dim = 64,
            .head_dim_v = 64,
            .right = 0,
            .sinks = true,
            .counts_tiles = true,
            .hidden_nan = true,
            .used_q = {70, 3, 0, 65},
            .used_k = {400, 90, 17, 0},
            .splits = 3};
  EXPECT_EQ(failure_of<kD64>(c, 3), "");
  c.page_size = 16;
  EXPECT_EQ(failure_of<kD64>(c, 4), "");
  c.head_dim = c.head_dim_v = 256, c.left = 100, c.sinks = false;
  EXPECT_EQ(failure_of<kD256>(c, 5), "");
  c = {.batch = 4,
       .nheads_q = 2,
       .head_dim = 128,
       .head_dim_v = 128,
       .right = 0,
       .hidden_nan = true,
       .packed_q = true,
       .packed_k = true,
       .rows_q = {0, 70, 1, 64},
       .rows_k = {5, 190, 330, 64},
       .splits = 4};
  EXPECT_EQ(failure_of<kD128>(c, 6), "");
}

// Bias, mask tensor and dropout in each split.
TEST(EmulatedSm90Split, Terms) {
  Case c = {.batch = 2,
            .nheads_q = 2,
            .nheads_kv = 1,
            .seqlen_q = 70,
            .seqlen_k = 300,
            .head_dim = 64,
            .head_dim_v = 64,
            .right = 0,
            .used_k = {300, 210},
            .splits = 2,
            .dropout = 0.2f,
            .bias = true,
            .mask = true};
  EXPECT_EQ(failure_of<kTerms>(c, 7), "");
}

}  // namespace
}  // namespace heed::cuda
