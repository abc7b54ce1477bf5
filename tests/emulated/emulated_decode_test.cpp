// attention_decode_sm90 on the host: the kernel's own source over emulated threads and copies.
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>

#include "emulated_problem.h"

#include "attention_decode_sm90.cu"

namespace heed::cuda {
namespace {

constexpr AttentionFwdVariant decode_variant(int head_dim, int head_dim_v, int tile_q, int warps, int stages,
                                             int is_bf16) {
  return {.is_bf16 = is_bf16,
          .head_dim = head_dim,
          .head_dim_v = head_dim_v,
          .tile_q = tile_q,
          .tile_k = 16 * warps,
          .warps = warps,
          .stages = stages,
          .mask = kMaskRange,
          .split = 1};
}
constexpr AttentionFwdVariant kD64 = decode_variant(64, 64, 8, 8, 6, 1),
                              kD64Rows16 = decode_variant(64, 64, 16, 8, 5, 0),
                              kD128 = decode_variant(128, 128, 8, 8, 3, 0),
                              kD128Rows16 = decode_variant(128, 128, 16, 4, 6, 1),
                              kD192 = decode_variant(192, 128, 8, 4, 5, 1);

// Runs every block of the grid, one after the other, in some order: "" or what is wrong. With splits blocks have shares, or the plan cuts keys
// and combine merges.
enum class Cut { kShares, kPlanned };
template <AttentionFwdVariant kV>
std::string failure_of_decode(Case c, unsigned seed, Cut cut = Cut::kShares, unsigned blocks = 3, int together = 1) {
  c.shares = c.nheads_q > c.nheads_kv;
  Problem problem(c, kV.is_bf16 != 0, seed);
  AttentionFwdSm90Params a = problem.params();
  AttentionFwdParams& p = a.common;
  const int heads = c.nheads_q / p.rows_per_query;
  p.num_tiles_q = c.packed_q ? problem.q_rows * p.rows_per_query / kV.tile_q + c.batch
                             : (c.seqlen_q * p.rows_per_query + kV.tile_q - 1) / kV.tile_q;
  p.heads_per_section = std::max(1, heads * c.batch * 2 / 3);
  p.max_splits = std::max(1, c.splits);
  p.split_tiles = (std::max(c.seqlen_k, problem.k_rows) + kV.tile_k - 1) / kV.tile_k / p.max_splits + 1;
  a.num_work_tiles = static_cast<i32>(p.num_tiles_q * heads * problem.q_batch * p.max_splits);
  const bool shares = c.splits > 0 && cut == Cut::kShares;
  const unsigned grid = shares ? blocks : std::min(blocks, static_cast<unsigned>(a.num_work_tiles));
  std::vector<float> partial_lse(c.splits == 0 ? 0
                                 : shares      ? 2 * grid * kV.tile_q
                                               : problem.lse.size() * p.max_splits,
                                 std::nanf(""));
  std::vector<float> partial_out(partial_lse.size() * c.head_dim_v, std::nanf(""));
  if (c.splits > 0) p.partial_out = partial_out.data(), p.partial_lse = partial_lse.data();
  a.mark = u64{seed + 1} << kTileBits;
  std::vector<u64> arrived(grid * kV.tile_q, 12345);
  if (shares) a.arrived = arrived.data(), p.split_tiles = 0, a.heads_together = together;
  a.page_box = c.page_size > 0 ? std::gcd(c.page_size, kV.tile_k) : 0;
  const int box = c.page_size > 0 ? a.page_box : kV.tile_k;
  const auto map = [&](TensorMap& of, void* data, int dim, int padded, const Strides3& stride) {
    const bool whole = dim % 64 == 0;
    map_tensor(of, data, whole ? 64 : dim, problem.k_rows, c.nheads_kv, problem.k_batch, stride, box);
    of.opaque[10] = whole ? dim / 64 : 1, of.opaque[11] = whole ? padded / 64 : 1;
    return static_cast<i32>(of.opaque[11]);
  };
  a.k_box_chunks = map(a.k_map, problem.k.data(), c.head_dim, kV.head_dim, p.k_stride);
  a.v_box_chunks = map(a.v_map, problem.v.data(), c.head_dim_v, kV.head_dim_v, p.v_stride);
  std::vector<unsigned> order(grid);  // any block may be the last one of a tile
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), std::mt19937(seed));
  for (const unsigned index : order) {
    const std::string failure =
        emulated::run_block(kV.warps * 32 + 32, index, grid, seed * 16 + index, [&a] { attention_decode_sm90<kV>(a); });
    if (!failure.empty()) return failure;
  }
  for (const u64 count : arrived)
    if (count != 0 && count != 12345) return "a counter is left at " + std::to_string(count);
  if (c.splits > 0 && !shares) problem.merge(partial_out, partial_lse, p.max_splits);
  return problem.judge();
}

TEST(EmulatedDecode, Dense) {
  Case c = {
      .batch = 3, .nheads_q = 6, .nheads_kv = 2, .seqlen_q = 1, .seqlen_k = 700, .head_dim = 64, .head_dim_v = 56};
  EXPECT_EQ(failure_of_decode<kD64>(c, 1), "");
  c.sinks = true, c.seqlen_q = 5, c.right = 0;
  EXPECT_EQ(failure_of_decode<kD64Rows16>(c, 2), "");
  c.head_dim = 120, c.head_dim_v = 128, c.seqlen_k = 333, c.seqlen_q = 3;  // a tile of rows that is not full
  EXPECT_EQ(failure_of_decode<kD128>(c, 3), "");
  EXPECT_EQ(failure_of_decode<kD128Rows16>(c, 4), "");
  c.head_dim = 192;
  EXPECT_EQ(failure_of_decode<kD192>(c, 5), "");
}

// Keys that no row sees on either side, NaN in their values; every key hidden.
TEST(EmulatedDecode, Windows) {
  for (const int offset : {-150, 0, 60, 500})
    EXPECT_EQ(failure_of_decode<kD128>({.nheads_q = 2,
                                        .seqlen_q = 7,
                                        .seqlen_k = 300,
                                        .head_dim = 128,
                                        .head_dim_v = 128,
                                        .left = 70,
                                        .right = 2,
                                        .offset = offset,
                                        .sinks = true,
                                        .hidden_nan = true},
                                       6),
              "")
        << offset;
}

TEST(EmulatedDecode, Lengths) {
  Case c = {.batch = 4,
            .nheads_q = 4,
            .nheads_kv = 2,
            .seqlen_q = 3,
            .seqlen_k = 300,
            .head_dim = 128,
            .head_dim_v = 128,
            .right = 0,
            .hidden_nan = true,
            .used_q = {3, 0, 2, 1},
            .used_k = {300, 150, 0, 65},
            .cache_rows = {3, 0, 4, 1}};
  EXPECT_EQ(failure_of_decode<kD128>(c, 7), "");
  c.leftpad = {0, 140, 0, 64};
  EXPECT_EQ(failure_of_decode<kD128Rows16>(c, 8), "");
  EXPECT_EQ(failure_of_decode<kD64>({.batch = 5,
                                     .nheads_q = 4,
                                     .nheads_kv = 1,
                                     .head_dim = 64,
                                     .head_dim_v = 64,
                                     .right = 0,
                                     .hidden_nan = true,
                                     .packed_q = true,
                                     .packed_k = true,
                                     .rows_q = {2, 0, 1, 5, 3},
                                     .rows_k = {200, 70, 0, 131, 64},
                                     .gap = 2},
                                    9),
            "");
}

// Boxes of eight rows and more, more of them than the warp has lanes, and pages that hold a tile; look-ups of several turns.
TEST(EmulatedDecode, Pages) {
  for (const int page_size : {8, 16, 24, 64, 256}) {
    Case c = {.batch = 3,
              .nheads_q = 4,
              .nheads_kv = 2,
              .seqlen_q = 2,
              .seqlen_k = 900,
              .head_dim = 64,
              .head_dim_v = 64,
              .right = 0,
              .hidden_nan = true,
              .used_k = {900, 0, 131},
              .page_size = page_size};
    EXPECT_EQ(failure_of_decode<kD64>(c, 10), "") << page_size;
    c.head_dim = 192, c.head_dim_v = 128, c.splits = 2;
    EXPECT_EQ(failure_of_decode<kD192>(c, 11), "") << page_size;
  }
}

// Of one block or several: all heads of the sequence are 0, and no other's.
TEST(EmulatedDecode, BadPages) {
  for (const int page_size : {8, 32, 256}) {
    Case c = {.batch = 4,
              .nheads_q = 8,
              .nheads_kv = 2,
              .seqlen_q = 2,
              .seqlen_k = 1100,
              .head_dim = 64,
              .head_dim_v = 128,
              .right = 0,
              .sinks = true,
              .hidden_nan = true,
              .used_k = {1100, 0, 700, 90},
              .page_size = page_size,
              .bad_pages = {2}};
    EXPECT_EQ(failure_of_decode<kD128>(c, 50), "") << page_size;
    c.splits = 1;
    for (const unsigned blocks : {4u, 14u}) {
      c.bad_pages = {0};
      EXPECT_EQ(failure_of_decode<kD128>(c, 51, Cut::kShares, blocks, 2), "") << page_size;
      c.bad_pages = {2, 3};
      EXPECT_EQ(failure_of_decode<kD128Rows16>(c, 52, Cut::kShares, blocks), "") << page_size;
    }
  }
}

TEST(EmulatedDecode, Splits) {
  Case c = {.batch = 2,
            .nheads_q = 8,
            .nheads_kv = 2,
            .seqlen_q = 1,
            .seqlen_k = 900,
            .head_dim = 128,
            .head_dim_v = 128,
            .sinks = true,
            .hidden_nan = true,
            .used_k = {900, 77},
            .splits = 3};
  EXPECT_EQ(failure_of_decode<kD128>(c, 12), "");
  EXPECT_EQ(failure_of_decode<kD128>(c, 12, Cut::kPlanned), "");
  EXPECT_EQ(failure_of_decode<kD128Rows16>(c, 13), "");
  c.used_k = {}, c.used_q = {1, 0}, c.splits = 7, c.left = 300,
  c.right = 0;  // splits before and behind those that have keys
  EXPECT_EQ(failure_of_decode<kD128>(c, 31), "");
  EXPECT_EQ(failure_of_decode<kD128Rows16>(c, 32, Cut::kPlanned), "");
}

// From one block to more than there are keys for: tiles cut once, often and not at all, shares that end with a tile, rows and
// sequences without keys between them.
TEST(EmulatedDecode, Shares) {
  Case c = {.batch = 4,
            .nheads_q = 6,
            .nheads_kv = 2,
            .seqlen_q = 4,
            .seqlen_k = 1500,
            .head_dim = 128,
            .head_dim_v = 128,
            .right = 0,
            .sinks = true,
            .hidden_nan = true,
            .used_q = {4, 1, 0, 3},
            .used_k = {1500, 3, 0, 600},
            .splits = 1};
  for (const unsigned blocks : {1u, 2u, 5u, 8u, 13u, 60u})
    EXPECT_EQ(failure_of_decode<kD128>(c, 40 + blocks, Cut::kShares, blocks), "") << blocks;
  for (const unsigned blocks : {2u, 6u, 14u, 40u})
    EXPECT_EQ(failure_of_decode<kD128>(c, 80 + blocks, Cut::kShares, blocks, 2), "") << blocks;
  c.nheads_q = 12, c.nheads_kv = 6;
  EXPECT_EQ(failure_of_decode<kD128>(c, 100, Cut::kShares, 15, 3), "");
  c.left = 200, c.used_k = {1500, 1024, 1, 512};
  EXPECT_EQ(failure_of_decode<kD128Rows16>(c, 101, Cut::kShares, 7), "");
  c.used_k = {}, c.used_q = {};
  EXPECT_EQ(failure_of_decode<kD128>(c, 102, Cut::kShares, 4), "");
}

// More sequences than lanes, most of them short, some without keys or queries; whole rows in a box, of fewer chunks than the tile
// has.
TEST(EmulatedDecode, ManySequences) {
  Case c = {.batch = 37,
            .nheads_q = 4,
            .nheads_kv = 2,
            .seqlen_q = 1,
            .seqlen_k = 700,
            .head_dim = 64,
            .head_dim_v = 128,
            .hidden_nan = true,
            .splits = 4};
  for (int b = 0; b < c.batch; ++b) c.used_k.push_back(b == 33 ? 700 : b % 5 * 33);
  EXPECT_EQ(failure_of_decode<kD128>(c, 18), "");
  c.page_size = 16;
  EXPECT_EQ(failure_of_decode<kD128>(c, 19), "");
  c.page_size = 0, c.packed_q = true;
  for (int b = 0; b < c.batch; ++b) c.rows_q.push_back(b % 3);
  EXPECT_EQ(failure_of_decode<kD128Rows16>(c, 30), "");
}

// In f32 what P's rounding leaves out counts.
TEST(EmulatedDecode, OutInF32) {
  Case c = {.nheads_q = 4,
            .nheads_kv = 2,
            .seqlen_q = 3,
            .seqlen_k = 500,
            .head_dim = 64,
            .head_dim_v = 64,
            .right = 0,
            .out_is_f32 = true};
  EXPECT_EQ(failure_of_decode<kD64>(c, 15), "");
  c.head_dim = c.head_dim_v = 120;
  EXPECT_EQ(failure_of_decode<kD128>(c, 16), "");
}

TEST(EmulatedDecode, ChunksAndBadSequences) {
  EXPECT_EQ(failure_of_decode<kD64>({.batch = 3,
                                     .nheads_q = 2,
                                     .seqlen_q = 6,
                                     .seqlen_k = 400,
                                     .head_dim = 64,
                                     .head_dim_v = 64,
                                     .right = 0,
                                     .hidden_nan = true,
                                     .bad = {1},
                                     .chunk = 130},
                                    17),
            "");
}

// Scores whose first maximum does not hold.
TEST(EmulatedDecode, ExactSteps) {
  EXPECT_EQ(failure_of_decode<kD64>(
                {.nheads_q = 3, .seqlen_q = 2, .seqlen_k = 900, .head_dim = 64, .head_dim_v = 64, .times = 40}, 14),
            "");
}

// The same problem with threads and copies in another order each time.
TEST(EmulatedDecode, AnyOrder) {
  const Case c = {.batch = 3,
                  .nheads_q = 4,
                  .nheads_kv = 2,
                  .seqlen_q = 2,
                  .seqlen_k = 700,
                  .head_dim = 128,
                  .head_dim_v = 128,
                  .right = 0,
                  .hidden_nan = true,
                  .used_k = {700, 0, 170},
                  .splits = 3};
  for (unsigned seed = 20; seed < 32; ++seed) EXPECT_EQ(failure_of_decode<kD128>(c, seed), "");
}

}  // namespace
}  // namespace heed::cuda
