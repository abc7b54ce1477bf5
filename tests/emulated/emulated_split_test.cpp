// attention_fwd_sm90 on the host where keys are split: the partials, merged here as combine merges them.
#include <gtest/gtest.h>

#include "emulated_problem.h"

namespace heed::cuda {
namespace {

constexpr AttentionFwdSm90Variant
    kD64 = with_split(kTile64),
    kD128 = with_split(
        {.head_dim = 128, .head_dim_v = 128, .consumers = 1, .tile_k = 64, .q_in_registers = 1, .blocks = 2}),
    kD256 = with_split(kTile256);

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
}

// More splits than there are key tiles, rows that see no key, one split.
TEST(EmulatedSm90Split, Ends) {
  Case c = {.nheads_q = 1, .seqlen_q = 150, .seqlen_k = 90, .head_dim = 64, .head_dim_v = 64, .right = 0, .splits = 5};
  EXPECT_EQ(failure_of<kD64>(c, 1), "");
  c.splits = 1, c.sinks = true;
  EXPECT_EQ(failure_of<kD64>(c, 2), "");
}

}  // namespace
}  // namespace heed::cuda
