// attention_fwd_sm90 on the host where the heads of a group share tiles: rows are (query, head), query-major.
#include <gtest/gtest.h>

#include "emulated_problem.h"

namespace heed::cuda {
namespace {

constexpr AttentionFwdSm90Variant kD64 = with_lengths(kTile64), kD64Cap = with_softcap(kTile64),
                                  kD128 = with_lengths(kTile128Low), kD256 = with_lengths(kTile256);

// Groups that divide 64 and groups that leave rows over, one of them larger than half of it.
TEST(EmulatedSm90Shared, Groups) {
  for (const int group : {2, 4, 7, 12, 40, 64}) {
    Case c = {.batch = 2,
              .nheads_q = 2 * group,
              .nheads_kv = 2,
              .seqlen_q = 150 / group + 3,
              .seqlen_k = 200,
              .head_dim = 64,
              .head_dim_v = 56,
              .right = 0,
              .sinks = true,
              .hidden_nan = true,
              .shares = true};
    EXPECT_EQ(failure_of<kD64>(c, group), "") << group;
    c.right = kUnbounded, c.head_dim = c.head_dim_v = 128, c.seqlen_q = 5, c.counts_tiles = true;
    EXPECT_EQ(failure_of<kD128>(c, group), "") << group;
  }
}

TEST(EmulatedSm90Shared, Lengths) {
  Case c = {.batch = 5,
            .nheads_q = 6,
            .nheads_kv = 2,
            .head_dim = 64,
            .head_dim_v = 64,
            .right = 0,
            .counts_tiles = true,
            .hidden_nan = true,
            .packed_q = true,
            .packed_k = true,
            .rows_q = {0, 70, 1, 21, 150},
            .rows_k = {5, 90, 130, 64, 180},
            .gap = 9,
            .shares = true};
  EXPECT_EQ(failure_of<kD64>(c, 1), "");
  c.left = 30, c.right = 2, c.softcap = 2;
  EXPECT_EQ(failure_of<kD64Cap>(c, 2), "");
  c = {.batch = 3,
       .nheads_q = 4,
       .nheads_kv = 1,
       .seqlen_q = 40,
       .seqlen_k = 200,
       .head_dim = 256,
       .head_dim_v = 256,
       .right = 0,
       .hidden_nan = true,
       .used_q = {40, 5, 33},
       .used_k = {200, 150, 70},
       .shares = true,
       .page_size = 24};
  EXPECT_EQ(failure_of<kD256>(c, 3), "");
  c.times = 20;
  EXPECT_EQ(failure_of<kD256>(c, 4), "");
}

TEST(EmulatedSm90Shared, Splits) {
  Case c = {.batch = 2,
            .nheads_q = 10,
            .nheads_kv = 2,
            .seqlen_q = 19,
            .seqlen_k = 500,
            .head_dim = 128,
            .head_dim_v = 128,
            .right = 0,
            .sinks = true,
            .hidden_nan = true,
            .used_q = {19, 7},
            .used_k = {500, 100},
            .splits = 3,
            .shares = true};
  for (unsigned seed = 5; seed < 8; ++seed) EXPECT_EQ(failure_of<kD128>(c, seed), "");
  c.head_dim = c.head_dim_v = 64, c.seqlen_q = 60, c.used_q = {60, 50};
  EXPECT_EQ(failure_of<kD64>(c, 8), "");
}

}  // namespace
}  // namespace heed::cuda
