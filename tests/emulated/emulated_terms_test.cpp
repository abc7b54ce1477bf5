// attention_fwd_sm90 on the host with terms of the score: softcap, bias, ALiBi, mask tensor, dropout.
#include <gtest/gtest.h>

#include "emulated_problem.h"

namespace heed::cuda {
namespace {

constexpr AttentionFwdSm90Variant
    kD64 = with_terms({.is_bf16 = 1, .consumers = 3, .tile_k = 64, .stages = 4}),
    kD128 = with_terms({.head_dim = 128, .head_dim_v = 128, .tile_k = 64, .stages = 4, .q_in_registers = 1}),
    kD256 = with_terms(kTile256),
    // A softcap alone leaves the tiles as they are without terms.
    kCapped128 =
        with_softcap({.is_bf16 = 1, .head_dim = 128, .head_dim_v = 128, .consumers = 3, .tile_k = 64, .stages = 4});

constexpr Case kOf64 = {
    .nheads_q = 2, .seqlen_q = 200, .seqlen_k = 301, .head_dim = 64, .head_dim_v = 64, .right = 0, .hidden_nan = true};
constexpr Case kOf128 = {.nheads_q = 2, .seqlen_q = 150, .seqlen_k = 330, .head_dim = 128, .head_dim_v = 120};

// Scores well below the cap, about as large, and far beyond; of either sign of the scale.
TEST(EmulatedSm90Terms, Softcap) {
  for (const float cap : {500.0f, 20.0f, 2.0f}) {
    Case c = kOf64;
    c.softcap = cap;
    EXPECT_EQ(failure_of<kD64>(c, 1), "") << cap;
    c = kOf128;
    c.softcap = cap, c.scale = -0.3f, c.times = 3, c.sinks = true;
    EXPECT_EQ(failure_of<kD128>(c, 2), "") << cap;
    EXPECT_EQ(failure_of<kCapped128>(c, 3), "") << cap;
    c.left = 90, c.right = 10, c.scale = 0.1f, c.hidden_nan = true;
    EXPECT_EQ(failure_of<kCapped128>(c, 4), "") << cap;
  }
}

// With a distance so steep that no first maximum holds, and the other way round.
TEST(EmulatedSm90Terms, Alibi) {
  Case c = kOf64;
  c.alibi = true, c.nheads_kv = 2;
  EXPECT_EQ(failure_of<kD64>(c, 3), "");
  c = kOf128;
  c.alibi = true, c.offset = -100;
  EXPECT_EQ(failure_of<kD128>(c, 4), "");
}

TEST(EmulatedSm90Terms, Bias) {
  for (const bool is_f32 : {false, true})
    for (const int seqlen_k : {301, 330}) {  // rows side by side that are and are not on an even element
      Case c = kOf64;
      c.bias = true, c.bias_is_f32 = is_f32, c.seqlen_k = seqlen_k, c.softcap = 30;
      EXPECT_EQ(failure_of<kD64>(c, 5), "") << is_f32 << " " << seqlen_k;
    }
  Case c = kOf128;
  c.batch = 2, c.bias = true, c.by_sequence = false, c.by_row = false, c.key_stride = 3;
  EXPECT_EQ(failure_of<kD128>(c, 6), "");
  c.key_stride = 1, c.by_head = false, c.by_row = true, c.bias_times = 60, c.left = 100, c.right = 5;
  EXPECT_EQ(failure_of<kD128>(c, 7), "");
  c.head_dim = c.head_dim_v = 256, c.batch = 1, c.alibi = true;
  EXPECT_EQ(failure_of<kD256>(c, 8), "");
}

TEST(EmulatedSm90Terms, Mask) {
  Case c = kOf64;
  c.mask = true;
  EXPECT_EQ(failure_of<kD64>(c, 9), "");
  c = kOf128;
  c.mask = true, c.by_head = false, c.scale = -0.2f;
  EXPECT_EQ(failure_of<kD128>(c, 10), "");
  c.key_stride = 2, c.bias = true, c.sinks = true;
  EXPECT_EQ(failure_of<kD128>(c, 11), "");
}

TEST(EmulatedSm90Terms, Dropout) {
  for (const int base : {0, 4, 3}) {
    Case c = kOf64;
    c.dropout = 0.3f, c.dropout_base = base;
    EXPECT_EQ(failure_of<kD64>(c, 12), "") << base;
  }
  Case c = kOf128;
  c.dropout = 0.6f, c.bias = true, c.alibi = true, c.mask = true;
  EXPECT_EQ(failure_of<kD128>(c, 13), "");
}

// Every term beside lengths: i and j of each count within the sequence.
TEST(EmulatedSm90Terms, Packed) {
  const Case c = {.batch = 4,
                  .nheads_q = 2,
                  .head_dim = 64,
                  .head_dim_v = 64,
                  .right = 0,
                  .counts_tiles = true,
                  .hidden_nan = true,
                  .packed_q = true,
                  .packed_k = true,
                  .rows_q = {70, 0, 193, 5},
                  .rows_k = {90, 4, 160, 200},
                  .gap = 3,
                  .softcap = 10,
                  .dropout = 0.2f,
                  .alibi = true,
                  .bias = true};
  EXPECT_EQ(failure_of<kD64>(c, 14), "");
}

TEST(EmulatedSm90Terms, Pages) {
  Case c = kOf128;
  c.batch = 2, c.used_k = {330, 170}, c.softcap = 12, c.bias = true;
  for (const int page_size : {16, 64}) {  // tiles of 80 keys
    c.page_size = page_size;
    EXPECT_EQ(failure_of<kD128>(c, 18), "") << page_size;
  }
}

// Scores whose first maximum does not hold get their terms again.
TEST(EmulatedSm90Terms, ExactSteps) {
  Case c = kOf64;
  c.right = kUnbounded, c.hidden_nan = false, c.times = 40, c.softcap = 300, c.bias = true, c.bias_times = 20;
  EXPECT_EQ(failure_of<kD64>(c, 15), "");
  c = kOf128;
  c.times = 40, c.mask = true;
  EXPECT_EQ(failure_of<kD128>(c, 16), "");
  c.head_dim = c.head_dim_v = 256, c.seqlen_k = 200;
  EXPECT_EQ(failure_of<kD256>(c, 17), "");
}

TEST(EmulatedSm90Terms, AnyOrder) {
  Case c = kOf128;
  c.softcap = 15, c.mask = true, c.left = 120, c.right = 20, c.counts_tiles = true;
  for (unsigned seed = 30; seed < 34; ++seed) EXPECT_EQ(failure_of<kD128>(c, seed), "");
  c.head_dim = c.head_dim_v = 256;
  for (unsigned seed = 34; seed < 36; ++seed) EXPECT_EQ(failure_of<kD256>(c, seed), "");
}

}  // namespace
}  // namespace heed::cuda
