// attention_fwd_sm90 itself, on the host: the kernel's own source over emulated threads, copies and products
// (cuda_emulated.h), for dense tensors.
#include <gtest/gtest.h>

#include "emulated_problem.h"

namespace heed::cuda {
namespace {

// One variant of each schedule in the tile table.
constexpr AttentionFwdSm90Variant
    kD64 = {.is_bf16 = 1, .consumers = 4, .tile_k = 64, .stages = 4},
    kD64Causal = {.is_bf16 = 1, .consumers = 4, .tile_k = 64, .stages = 4, .mask = kMaskRange},
    kD64Window = {.consumers = 4, .tile_k = 64, .stages = 4, .mask = kMaskRange, .has_lower_end = 1},
    kD64Short = {.is_bf16 = 1, .consumers = 1, .blocks = 2, .mask = kMaskRange},
    kD96Causal =
        {.is_bf16 = 1, .head_dim = 96, .head_dim_v = 96, .consumers = 3, .tile_k = 96, .rings = 2, .mask = kMaskRange},
    kD128 = {.is_bf16 = 1, .head_dim = 128, .head_dim_v = 128, .q_in_registers = 1, .ping_pong = 1},
    kD128Window =
        {.head_dim = 128, .head_dim_v = 128, .rings = 2, .q_in_registers = 1, .mask = kMaskRange, .has_lower_end = 1},
    kD192 = {.is_bf16 = 1, .head_dim = 192, .head_dim_v = 128, .ping_pong = 1},
    kD256Causal = {.is_bf16 = 1, .head_dim = 256, .head_dim_v = 256, .tile_k = 64, .rings = 2, .mask = kMaskRange};

TEST(EmulatedSm90, EveryKey) {
  EXPECT_EQ(failure_of<kD64>({.nheads_q = 2, .seqlen_q = 300, .seqlen_k = 200, .head_dim = 64, .head_dim_v = 56}, 1),
            "");
  EXPECT_EQ(failure_of<kD128>({.nheads_q = 2, .seqlen_q = 200, .seqlen_k = 270, .head_dim = 128, .head_dim_v = 128}, 2),
            "");
  EXPECT_EQ(failure_of<kD192>({.seqlen_q = 130, .seqlen_k = 290, .head_dim = 192, .head_dim_v = 120}, 3), "");
}

TEST(EmulatedSm90, Ranges) {
  EXPECT_EQ(failure_of<kD64Causal>({.batch = 2,
                                    .nheads_q = 2,
                                    .seqlen_q = 300,
                                    .seqlen_k = 333,
                                    .head_dim = 64,
                                    .head_dim_v = 64,
                                    .right = 0,
                                    .counts_tiles = true},
                                   4),
            "");
  EXPECT_EQ(failure_of<kD64Short>({.nheads_q = 4,
                                   .nheads_kv = 2,
                                   .seqlen_q = 90,
                                   .seqlen_k = 290,
                                   .head_dim = 48,
                                   .head_dim_v = 64,
                                   .right = 0,
                                   .sinks = true},
                                  5),
            "");
  EXPECT_EQ(failure_of<kD96Causal>({.seqlen_q = 260, .seqlen_k = 200, .head_dim = 88, .head_dim_v = 96, .right = 0}, 6),
            "");
  EXPECT_EQ(
      failure_of<kD256Causal>({.seqlen_q = 150, .seqlen_k = 210, .head_dim = 256, .head_dim_v = 248, .right = 0}, 7),
      "");
}

// Consumers without rows are those of the first tile.
TEST(EmulatedSm90, ConsumersWithoutRows) {
  constexpr AttentionFwdSm90Variant kD128Causal = {.head_dim = 128,
                                                   .head_dim_v = 128,
                                                   .consumers = 3,
                                                   .tile_k = 64,
                                                   .stages = 4,
                                                   .q_in_registers = 1,
                                                   .mask = kMaskRange};
  for (const int queries : {1, 64, 65, 191, 192, 193, 257}) {
    const Case c = {.nheads_q = 2,
                    .seqlen_q = queries,
                    .seqlen_k = 260,
                    .head_dim = 128,
                    .head_dim_v = 128,
                    .right = 0,
                    .offset = queries % 2 == 0 ? 0 : kBottomRight,
                    .hidden_nan = true};
    EXPECT_EQ(failure_of<kD128Causal>(c, 30), "") << queries;
  }
}

// Whole tiles hidden at either end, rows that see nothing, hidden values that are NaN.
TEST(EmulatedSm90, Windows) {
  for (const int offset : {-150, 0, 60, 500}) {
    EXPECT_EQ(failure_of<kD64Window>({.seqlen_q = 300,
                                      .seqlen_k = 400,
                                      .head_dim = 64,
                                      .head_dim_v = 64,
                                      .left = 40,
                                      .right = 10,
                                      .offset = offset,
                                      .hidden_nan = true},
                                     8),
              "")
        << offset;
    EXPECT_EQ(failure_of<kD128Window>({.seqlen_q = 150,
                                       .seqlen_k = 600,
                                       .head_dim = 128,
                                       .head_dim_v = 128,
                                       .left = 130,
                                       .right = 3,
                                       .offset = offset,
                                       .sinks = true,
                                       .hidden_nan = true},
                                      9),
              "")
        << offset;
  }
}

// Scores whose first maximum does not hold; scales of either sign; scores so large that rounding shows.
TEST(EmulatedSm90, ExactSteps) {
  const Case of_64 = {.seqlen_q = 70, .seqlen_k = 400, .head_dim = 64, .head_dim_v = 64, .times = 40};
  EXPECT_EQ(failure_of<kD64>(of_64, 10), "");
  for (const float scale : {-1.0f, 3e8f}) {
    Case c = of_64;
    c.scale = scale, c.left = 390, c.right = 0, c.times = 1;
    EXPECT_EQ(failure_of<kD64Window>(c, 11), "") << scale;
  }
  const Case of_128 = {
      .seqlen_q = 70, .seqlen_k = 500, .head_dim = 128, .head_dim_v = 128, .left = 400, .right = 0, .times = 40};
  EXPECT_EQ(failure_of<kD128Window>(of_128, 12), "");
}

// The same problem with threads, copies and products in another order each time.
TEST(EmulatedSm90, AnyOrder) {
  const Case c = {.nheads_q = 3,
                  .seqlen_q = 140,
                  .seqlen_k = 420,
                  .head_dim = 128,
                  .head_dim_v = 128,
                  .left = 200,
                  .right = 20,
                  .counts_tiles = true};
  for (unsigned seed = 20; seed < 26; ++seed) EXPECT_EQ(failure_of<kD128Window>(c, seed), "");
}

}  // namespace
}  // namespace heed::cuda
