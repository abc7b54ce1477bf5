// Data that the host never reads, and that is bad (docs/conventions.md, section 8): that sequence gives 0 / -inf and
// sets its bits, the other sequences keep every bit of theirs, and nothing is touched outside the outputs.
#include "unit/bad_data.h"

namespace heed {
namespace {

using namespace testing;

// One thing that is wrong, in a line of three sequences of which [1] is hit; -1: the sequence after it as well.
struct Corruption {
  const char* line;
  std::function<std::vector<Poke>(const heed_attention_args&)> pokes;
  int32_t bits;
};

// The rows of sequence b in q-like tensors: dimension and range.
struct Rows {
  int dim;
  int64_t begin, end;
};

Rows rows_of(const heed_attention_args& a, int64_t b) {
  if (a.layout_q != HEED_LAYOUT_THD) return {0, b, b + 1};
  const int32_t* cu_seqlens = numbers(a.cu_seqlens_q);
  return {0, cu_seqlens[b], cu_seqlens[b + 1]};
}

Rows lse_rows_of(const heed_attention_args& a, int64_t b) {
  Rows rows = rows_of(a, b);
  if (a.layout_q == HEED_LAYOUT_THD) rows.dim = 1;
  return rows;
}

void expect_one_bad_sequence(const Corruption& corruption) {
  SCOPED_TRACE(corruption.line);
  LineRun problem(placed(corruption.line));
  ASSERT_EQ(problem.error(), "");
  heed_attention_args& args = *problem.attention();
  const std::vector<Poke> pokes = corruption.pokes(args);
  const std::vector<std::string> rows = problem.accepting();
  ASSERT_FALSE(rows.empty()) << "no row accepts it";
  for (const std::string& row : rows) {
    SCOPED_TRACE(row);
    ASSERT_EQ(problem.run(row, RunStyle()), "");
    std::vector<std::vector<double>> good;
    {
      const OnHost host(problem, args);
      const heed_attention_args& a = host.args;
      for (const int64_t b : {0, 2}) {
        const Rows rows_q = rows_of(a, b), lse_rows = lse_rows_of(a, b);
        good.push_back(elements(a.out, rows_q.dim, rows_q.begin, rows_q.end));
        good.push_back(elements(a.lse, lse_rows.dim, lse_rows.begin, lse_rows.end));
        EXPECT_EQ(numbers(a.status)[b], 0);
      }
      EXPECT_EQ(numbers(a.status)[1], 0);
    }
    const auto expect_one_hit = [&] {
      ASSERT_EQ(problem.run(row, RunStyle(), pokes), "");
      const OnHost host(problem, args);
      const heed_attention_args& a = host.args;
      const Rows hit = rows_of(a, 1), hit_lse = lse_rows_of(a, 1);
      expect_all(a.out, hit.dim, hit.begin, hit.end, 0.0, "out");
      expect_all(a.lse, hit_lse.dim, hit_lse.begin, hit_lse.end, -INFINITY, "lse");
      size_t place = 0;
      for (const int64_t b : {0, 2}) {
        const Rows rows_q = rows_of(a, b), lse_rows = lse_rows_of(a, b);
        EXPECT_TRUE(elements(a.out, rows_q.dim, rows_q.begin, rows_q.end) == good[place++]) << "out of sequence " << b;
        EXPECT_TRUE(elements(a.lse, lse_rows.dim, lse_rows.begin, lse_rows.end) == good[place++])
            << "lse of sequence " << b;
      }
      if (a.status.dtype == HEED_DTYPE_NONE) return;
      for (int64_t b = 0; b < 3; ++b) EXPECT_EQ(numbers(a.status)[b], b == 1 ? corruption.bits : 0) << b;
    };
    expect_one_hit();
    SCOPED_TRACE("without status");
    const heed_tensor status = std::exchange(args.status, heed_tensor());
    expect_one_hit();
    args.status = status;
  }
}

const char* kPadded = "attention b=3 hq=4 hkv=2 sq=6 sk=40 d=16 used_q used_k lq=6,4,3 lk=40,20,11 causal lse";
const char* kPadded16 = "attention b=3 hq=4 hkv=2 sq=6 sk=40 d=64 bf16 used_q used_k lq=6,4,3 lk=40,20,11 sinks lse";
const char* kPaged = "attention b=3 hq=4 hkv=2 sq=2 sk=64 d=16 page=16 used_k lk=64,40,11 causal pages=shuffled lse";
const char* kDecode = "attention b=3 hq=8 hkv=2 sq=1 sk=64 d=64 f16 page=4 used_k lk=64,40,11 pages=shuffled lse";
// Shared by several blocks where a GPU does it; splits that another kernel merges; a window.
const char* kLongDecodes[] = {
    "attention b=3 hq=8 hkv=2 sq=1 sk=2048 d=64 f16 page=16 used_k lk=64,2000,11 pages=shuffled lse",
    "attention b=3 hq=16 hkv=2 sq=2 sk=2048 d=128 bf16 page=16 used_k lk=64,2000,11 pages=shuffled causal sinks lse",
    "attention b=3 hq=8 hkv=2 sq=1 sk=2048 d=64 f16 page=16 used_k lk=64,2000,11 pages=shuffled splits=3 lse",
    "attention b=3 hq=8 hkv=2 sq=1 sk=2048 d=64 f16 page=16 used_k lk=64,2000,11 pages=shuffled window=100,0 lse"};
const char* kPadding = "attention b=3 hq=2 sq=5 sk=30 d=16 leftpad used_k lk=30,20,11 lpad=3,4,0 causal lse";
const char* kRows = "attention b=3 hq=2 sq=5 sk=30 d=16 cache_batch=4 used_k lk=30,20,11 lse";
const char* kPacked =
    "attention b=3 hq=4 hkv=2 d=16 layout_q=thd layout_kv=thd lq=6,4,3 lk=9,20,11 tq=20 tk=50 causal lse";

TEST_F(BadData, UsedLengthsOfQueries) {
  for (const char* line : {kPadded, kPadded16}) {
    for (const int32_t value : {-1, 7, kHuge, kLowest}) {
      expect_one_bad_sequence({line,
                               [=](const auto& a) {
                                 return std::vector<Poke>{{numbers(a.seqused_q) + 1, value}};
                               },
                               HEED_STATUS_BAD_LENGTH_Q});
    }
  }
}

TEST_F(BadData, UsedLengthsOfKeys) {
  for (const char* line : {kPadded, kPadded16}) {
    for (const int32_t value : {-1, 41, kHuge, kLowest}) {
      expect_one_bad_sequence({line,
                               [=](const auto& a) {
                                 return std::vector<Poke>{{numbers(a.seqused_k) + 1, value}};
                               },
                               HEED_STATUS_BAD_LENGTH_K});
    }
  }
  for (const char* line : {kPaged, kDecode}) {
    for (const int32_t value : {-1, 65, kHuge}) {
      expect_one_bad_sequence({line,
                               [=](const auto& a) {
                                 return std::vector<Poke>{{numbers(a.seqused_k) + 1, value}};
                               },
                               HEED_STATUS_BAD_LENGTH_K});
    }
  }
}

TEST_F(BadData, BothLengthsSetBothBits) {
  expect_one_bad_sequence({kPadded,
                           [](const auto& a) {
                             return std::vector<Poke>{{numbers(a.seqused_q) + 1, -3}, {numbers(a.seqused_k) + 1, -3}};
                           },
                           HEED_STATUS_BAD_LENGTH_Q | HEED_STATUS_BAD_LENGTH_K});
}

TEST_F(BadData, PagesOutOfRange) {
  for (const char* line : {kPaged, kDecode}) {
    for (const int32_t value : {-1, 48, kHuge, kLowest}) {
      for (const int64_t page : {0, 2}) {  // the first one read and, of 40 keys in pages of 16, the last
        expect_one_bad_sequence({line,
                                 [=](const auto& a) {
                                   const int64_t at = a.page_table.stride[0] + page * a.page_table.stride[1];
                                   return std::vector<Poke>{{numbers(a.page_table) + at, value}};
                                 },
                                 HEED_STATUS_BAD_PAGE});
      }
    }
  }
}

TEST_F(BadData, PagesOutOfRangeOfLongSequences) {
  for (const char* line : kLongDecodes) {
    for (const int64_t page : {0, 57, 124}) {  // of 2,000 keys in pages of 16 the last is 124
      expect_one_bad_sequence({line,
                               [=](const auto& a) {
                                 const int64_t at = a.page_table.stride[0] + page * a.page_table.stride[1];
                                 return std::vector<Poke>{{numbers(a.page_table) + at, page == 57 ? 3 * 128 : -1}};
                               },
                               HEED_STATUS_BAD_PAGE});
    }
  }
}

TEST_F(BadData, LeftPadding) {
  for (const int32_t value : {-1, 21, kHuge, kLowest}) {
    expect_one_bad_sequence({kPadding,
                             [=](const auto& a) {
                               return std::vector<Poke>{{numbers(a.leftpad_k) + 1, value}};
                             },
                             HEED_STATUS_BAD_LENGTH_K});
  }
}

TEST_F(BadData, CacheRows) {
  for (const int32_t value : {-1, 4, kHuge, kLowest}) {
    expect_one_bad_sequence({kRows,
                             [=](const auto& a) {
                               return std::vector<Poke>{{numbers(a.cache_batch_idx) + 1, value}};
                             },
                             HEED_STATUS_BAD_PAGE});
  }
}

TEST_F(BadData, LengthsWithinPackedSequences) {
  const char* line = "attention b=3 hq=2 d=16 layout_q=thd layout_kv=thd lq=6,4,3 lk=9,20,11 used_q used_k causal lse";
  for (const int32_t value : {-1, 5, kHuge}) {
    expect_one_bad_sequence({line,
                             [=](const auto& a) {
                               return std::vector<Poke>{{numbers(a.seqused_q) + 1, value}};
                             },
                             HEED_STATUS_BAD_LENGTH_Q});
  }
  for (const int32_t value : {-1, 21, kHuge}) {
    expect_one_bad_sequence({line,
                             [=](const auto& a) {
                               return std::vector<Poke>{{numbers(a.seqused_k) + 1, value}};
                             },
                             HEED_STATUS_BAD_LENGTH_K});
  }
}

// Longer than the bias or mask that every packed sequence shares.
TEST_F(BadData, PackedSequencesPastTheBias) {
  const char* line =
      "attention b=3 hq=2 sq=6 sk=20 d=16 layout_q=thd layout_kv=thd lq=6,4,3 lk=9,20,11 tq=20 tk=50 "
      "bias=f32:ij lse";
  LineRun problem(placed(line));
  ASSERT_EQ(problem.error(), "");
  const heed_attention_args& args = *problem.attention();
  const std::vector<std::string> rows = problem.accepting();
  ASSERT_FALSE(rows.empty()) << "no row accepts it";
  for (const std::string& row : rows) {
    SCOPED_TRACE(row);
    for (const auto& [poke, bits] : {std::pair(Poke{numbers(args.cu_seqlens_q) + 3, 17}, HEED_STATUS_BAD_LENGTH_Q),
                                     std::pair(Poke{numbers(args.cu_seqlens_k) + 3, 50}, HEED_STATUS_BAD_LENGTH_K)}) {
      ASSERT_EQ(problem.run(row, RunStyle(), {poke}), "");
      const OnHost host(problem, args);
      EXPECT_EQ(numbers(host.args.status)[2], bits);
      expect_all(host.args.out, 0, 10, 20, 0.0, "out");
    }
  }
}

// Offsets are shared by neighbours: what becomes of each sequence.
void expect_packed(const std::function<std::vector<Poke>(const heed_attention_args&)>& pokes,
                   const std::vector<int32_t>& bits) {
  LineRun problem(placed(kPacked));
  ASSERT_EQ(problem.error(), "");
  const heed_attention_args& args = *problem.attention();
  const std::vector<std::string> accepting = problem.accepting();
  ASSERT_FALSE(accepting.empty()) << "no row accepts it";
  for (const std::string& row : accepting) {
    SCOPED_TRACE(row);
    ASSERT_EQ(problem.run(row, RunStyle()), "");
    std::vector<std::vector<double>> good;
    {
      const OnHost host(problem, args);
      for (int64_t b = 0; b < 3; ++b) {
        const Rows rows = rows_of(host.args, b);
        good.push_back(elements(host.args.out, 0, rows.begin, rows.end));
      }
    }
    ASSERT_EQ(problem.run(row, RunStyle(), pokes(args)), "");
    const OnHost host(problem, args);
    const heed_attention_args& a = host.args;
    for (int64_t b = 0; b < 3; ++b) {
      SCOPED_TRACE(b);
      const Rows rows = rows_of(a, b);
      EXPECT_EQ(numbers(a.status)[b], bits[static_cast<size_t>(b)]);
      if (bits[static_cast<size_t>(b)] != 0) {
        expect_all(a.out, 0, rows.begin, rows.end, 0.0, "out");
        expect_all(a.lse, 1, rows.begin, rows.end, -INFINITY, "lse");
      } else {
        EXPECT_TRUE(elements(a.out, 0, rows.begin, rows.end) == good[static_cast<size_t>(b)]);
      }
    }
    expect_all(a.out, 0, 13, 20, 0.0, "out past the last sequence");
    expect_all(a.lse, 1, 13, 20, -INFINITY, "lse past the last sequence");
  }
}

TEST_F(BadData, PackedOffsets) {
  constexpr int32_t q = HEED_STATUS_BAD_LENGTH_Q, k = HEED_STATUS_BAD_LENGTH_K;
  const auto queries = [](int64_t index, int32_t value) {
    return [=](const heed_attention_args& a) { return std::vector<Poke>{{numbers(a.cu_seqlens_q) + index, value}}; };
  };
  const auto keys = [](int64_t index, int32_t value) {
    return [=](const heed_attention_args& a) { return std::vector<Poke>{{numbers(a.cu_seqlens_k) + index, value}}; };
  };
  for (const int32_t value : {-1, kLowest}) {
    expect_packed(queries(0, value), {q, 0, 0});
    expect_packed(queries(1, value), {q, q, 0});
    expect_packed(queries(3, value), {0, 0, q});
    expect_packed(keys(0, value), {k, 0, 0});
    expect_packed(keys(1, value), {k, k, 0});
  }
  for (const int32_t value : {51, kHuge}) {
    expect_packed(queries(2, value), {0, q, q});
    expect_packed(queries(3, value), {0, 0, q});
    expect_packed(keys(2, value), {0, k, k});
    expect_packed(keys(3, value), {0, 0, k});
  }
  expect_packed(queries(3, 9), {0, 0, q});  // falls
  expect_packed(keys(3, 20), {0, 0, k});
  expect_packed(
      [=](const heed_attention_args& a) {
        return std::vector<Poke>{{numbers(a.cu_seqlens_q) + 3, 5}, {numbers(a.cu_seqlens_k) + 3, 5}};
      },
      {0, 0, q | k});
}

// Offsets that fall and rise again would have two sequences write the same rows.
struct Offsets {
  std::vector<int32_t> values, bits;
};

const Offsets kFalling[] = {
    {{0, 6, 3, 9, 13}, {0, 1, 1, 0}},   // [3, 9) begins inside [0, 6)
    {{0, 13, 4, 4, 13}, {0, 1, 1, 1}},  // all rows are the first one's; a sequence without rows has its place too
    {{0, 9, 2, 7, 13}, {0, 1, 1, 1}},   // [7, 13) begins below 9
    {{8, 2, 6, 9, 13}, {1, 1, 1, 0}},   // 8 is an offset in range, though no good sequence ends there
    {{99, 2, 6, 9, 13}, {1, 0, 0, 0}},  // 99 is none
    {{0, 6, 99, 9, 13}, {0, 1, 1, 0}}, {{0, 0, 6, 6, 13}, {0, 0, 0, 0}},
};

template <class Args>
void set(const Args& args, const heed_tensor& tensor, const std::vector<int32_t>& values) {
  EXPECT_EQ(heed_memory_copy(tensor.data, args.device, values.data(), HEED_DEVICE_CPU, args.device_index,
                             values.size() * sizeof(int32_t)),
            HEED_OK)
      << heed_last_error();
}

template <class Args>
void expect_status(LineRun& problem, const Args& args, const std::vector<int32_t>& bits, int32_t bit) {
  const OnHost host(problem, args);
  for (size_t b = 0; b < bits.size(); ++b) {
    EXPECT_EQ(numbers(host.args.status)[b], bits[b] * bit) << "sequence " << b;
  }
}

TEST_F(BadData, FallingOffsetsOfQueriesAreNoTwoSequencesRows) {
  LineRun problem(
      placed("attention b=4 hq=4 hkv=2 d=16 layout_q=thd layout_kv=thd lq=4,2,3,4 lk=9,20,11,3 causal lse"));
  ASSERT_EQ(problem.error(), "");
  ASSERT_FALSE(problem.accepting().empty()) << "no row accepts it";
  for (const Offsets& offsets : kFalling) {
    SCOPED_TRACE(::testing::PrintToString(offsets.values));
    set(*problem.attention(), problem.attention()->cu_seqlens_q, offsets.values);
    for (const std::string& row : problem.accepting()) {
      SCOPED_TRACE(row);
      ASSERT_EQ(problem.run(row, RunStyle()), "");
      expect_status(problem, *problem.attention(), offsets.bits, HEED_STATUS_BAD_LENGTH_Q);
      EXPECT_EQ(problem.judge(), "");
    }
  }
}

TEST_F(BadData, SequencesMayReadTheSameKeys) {
  LineRun problem(placed("attention b=4 hq=4 hkv=2 d=16 layout_q=thd layout_kv=thd lq=4,2,3,4 lk=2,4,4,3 causal lse"));
  ASSERT_EQ(problem.error(), "");
  ASSERT_FALSE(problem.accepting().empty()) << "no row accepts it";
  set(*problem.attention(), problem.attention()->cu_seqlens_k, {0, 9, 2, 7, 13});
  for (const std::string& row : problem.accepting()) {
    SCOPED_TRACE(row);
    ASSERT_EQ(problem.run(row, RunStyle()), "");
    expect_status(problem, *problem.attention(), std::vector<int32_t>{0, 1, 0, 0}, HEED_STATUS_BAD_LENGTH_K);
    EXPECT_EQ(problem.judge(), "");
  }
}

TEST_F(BadData, FallingOffsetsInTheBackwardPass) {
  const char* line = "attention b=4 hq=2 d=16 pass=bwd layout_q=thd layout_kv=thd lq=4,2,3,4 lk=4,2,3,4";
  for (const bool keys : {false, true}) {
    LineRun problem(placed(line));
    ASSERT_EQ(problem.error(), "");
    const std::vector<std::string> rows = problem.accepting();
    if (rows.empty() && problem.attention()->device == HEED_DEVICE_CUDA) {
      GTEST_SKIP() << "no row does the backward pass on a GPU";
    }
    ASSERT_FALSE(rows.empty()) << "no row accepts it";
    heed_attention_args& a = *problem.attention();
    for (const Offsets& offsets : kFalling) {
      SCOPED_TRACE(::testing::PrintToString(offsets.values));
      set(a, keys ? a.cu_seqlens_k : a.cu_seqlens_q, offsets.values);
      for (const std::string& row : problem.accepting()) {
        SCOPED_TRACE(row);
        ASSERT_EQ(problem.run(row, RunStyle()), "");
        expect_status(problem, a, offsets.bits, keys ? HEED_STATUS_BAD_LENGTH_K : HEED_STATUS_BAD_LENGTH_Q);
        const std::vector<unsigned char> once = problem.outputs();
        const testing::TestExecutor reversed(3, false);
        ASSERT_EQ(problem.run(row, {&reversed.executor, 3}), "");
        EXPECT_TRUE(problem.outputs() == once) << "the order of tasks shows";
      }
    }
  }
}

TEST_F(BadData, EverySequence) {
  LineRun problem(placed(kPadded));
  ASSERT_EQ(problem.error(), "");
  const std::vector<std::string> rows = problem.accepting();
  ASSERT_FALSE(rows.empty()) << "no row accepts it";
  for (const std::string& row : rows) {
    SCOPED_TRACE(row);
    int32_t* used = numbers(problem.attention()->seqused_k);
    ASSERT_EQ(problem.run(row, RunStyle(), {{used, -1}, {used + 1, kHuge}, {used + 2, 41}}), "");
    const OnHost host(problem, *problem.attention());
    const heed_attention_args& a = host.args;
    expect_all(a.out, 0, 0, 3, 0.0, "out");
    expect_all(a.lse, 0, 0, 3, -INFINITY, "lse");
    for (int64_t b = 0; b < 3; ++b) EXPECT_EQ(numbers(a.status)[b], HEED_STATUS_BAD_LENGTH_K);
  }
}

TEST_F(BadData, BackwardGivesThatSequenceNoGradient) {
  const char* line = "attention b=3 hq=4 hkv=2 sq=6 sk=20 d=16 pass=bwd used_q used_k lq=6,4,3 lk=20,12,11 causal";
  LineRun problem(placed(line));
  ASSERT_EQ(problem.error(), "");
  const heed_attention_args& args = *problem.attention();
  const std::vector<std::string> rows = problem.accepting();
  if (rows.empty() && args.device == HEED_DEVICE_CUDA) GTEST_SKIP() << "no row does the backward pass on a GPU";
  ASSERT_FALSE(rows.empty()) << "no row accepts it";
  for (const std::string& row : rows) {
    SCOPED_TRACE(row);
    ASSERT_EQ(problem.run(row, RunStyle()), "");
    std::vector<std::vector<double>> good;
    for (const int64_t b : {0, 2}) {
      const OnHost host(problem, args);
      const heed_attention_args& a = host.args;
      for (const heed_tensor* tensor : {&a.dq, &a.dk, &a.dv}) good.push_back(elements(*tensor, 0, b, b + 1));
    }
    for (const auto& [poke, bits] : {std::pair(Poke{numbers(args.seqused_q) + 1, 7}, HEED_STATUS_BAD_LENGTH_Q),
                                     std::pair(Poke{numbers(args.seqused_k) + 1, -1}, HEED_STATUS_BAD_LENGTH_K)}) {
      ASSERT_EQ(problem.run(row, RunStyle(), {poke}), "");
      const OnHost host(problem, args);
      const heed_attention_args& a = host.args;
      size_t place = 0;
      for (const int64_t b : {0, 2}) {
        for (const heed_tensor* tensor : {&a.dq, &a.dk, &a.dv}) {
          EXPECT_TRUE(elements(*tensor, 0, b, b + 1) == good[place++]) << "sequence " << b;
        }
        EXPECT_EQ(numbers(a.status)[b], 0);
      }
      for (const heed_tensor* tensor : {&a.dq, &a.dk, &a.dv}) expect_all(*tensor, 0, 1, 2, 0.0, "a gradient");
      EXPECT_EQ(numbers(a.status)[1], bits);
    }
  }
}

// ---- kv_append ---------------------------------------------------------------------------------------

void expect_nothing_appended(const char* line, const std::function<Poke(const heed_kv_append_args&)>& poke,
                             int32_t bits) {
  SCOPED_TRACE(line);
  LineRun problem(placed(line)), before(placed(line));
  ASSERT_EQ(problem.error(), "");
  const heed_kv_append_args& args = *problem.kv_append();
  const OnHost untouched(before, *before.kv_append());
  // Rows of a cache without pages belong to their sequences.
  const bool own_rows = args.page_table.dtype == HEED_DTYPE_NONE && args.cache_batch_idx.dtype == HEED_DTYPE_NONE;
  const std::vector<std::string> accepting = problem.accepting();
  ASSERT_FALSE(accepting.empty()) << "no row accepts it";
  for (const std::string& row : accepting) {
    SCOPED_TRACE(row);
    ASSERT_EQ(problem.run(row, RunStyle()), "");
    std::vector<double> good_q, good_k;
    {
      const OnHost host(problem, args);
      for (int64_t b = 0; b < 3; ++b) EXPECT_EQ(numbers(host.args.status)[b], 0);
      good_q = elements(host.args.q_out, 0, 0, 1);
      if (own_rows) good_k = elements(host.args.k_cache, 0, 0, 1);
    }
    ASSERT_EQ(problem.run(row, RunStyle(), {poke(args)}), "");
    const OnHost host(problem, args);
    const heed_kv_append_args& a = host.args;
    EXPECT_EQ(numbers(a.status)[0], 0);
    EXPECT_EQ(numbers(a.status)[1], bits);
    EXPECT_EQ(numbers(a.status)[2], 0);
    EXPECT_TRUE(same(elements(a.q_out, 0, 0, 1), good_q));
    if (a.q_out.dtype != HEED_DTYPE_NONE) expect_all(a.q_out, 0, 1, 2, 0.0, "q_out");
    if (!own_rows) continue;
    EXPECT_TRUE(same(elements(a.k_cache, 0, 0, 1), good_k));
    // Bit by bit: what no sequence has appended may be NaN in the cache.
    const int64_t bytes = a.k_cache.stride[0] * static_cast<int64_t>(heed_dtype_bytes(a.k_cache.dtype));
    EXPECT_EQ(std::memcmp(static_cast<char*>(a.k_cache.data) + bytes,
                          static_cast<char*>(untouched.args.k_cache.data) + bytes, static_cast<size_t>(bytes)),
              0)
        << "the cache of the bad sequence";
  }
}

TEST_F(BadData, AppendLengths) {
  const char* line = "kv_append b=3 hkv=2 sn=3 sk=20 d=16 lk=4,9,17";
  const char* rotary = "kv_append b=3 hq=4 hkv=2 sn=3 sk=20 d=16 bf16 rotary=16 rotary_n=40 q_per_position lk=4,9,17";
  for (const char* each : {line, rotary}) {
    for (const int32_t value : {-1, 21, kHuge, kLowest}) {
      expect_nothing_appended(
          each,
          [=](const auto& a) {
            return Poke{numbers(a.cache_seqlens) + 1, value};
          },
          HEED_STATUS_BAD_LENGTH_K);
    }
    for (const int32_t value : {18, 20}) {
      expect_nothing_appended(
          each,
          [=](const auto& a) {
            return Poke{numbers(a.cache_seqlens) + 1, value};
          },
          HEED_STATUS_APPEND_PAST_CAPACITY);
    }
  }
}

TEST_F(BadData, AppendPagesRowsAndPadding) {
  const char* paged = "kv_append b=3 hkv=2 sn=3 sk=48 d=16 page=16 lk=4,30,17 pages=shuffled";
  for (const int32_t value : {-1, 9, kHuge, kLowest}) {
    for (const int64_t page : {1, 2}) {  // 30, 31 | 32
      expect_nothing_appended(
          paged,
          [=](const auto& a) {
            const int64_t at = a.page_table.stride[0] + page * a.page_table.stride[1];
            return Poke{numbers(a.page_table) + at, value};
          },
          HEED_STATUS_BAD_PAGE);
    }
  }
  for (const int32_t value : {-1, 10, kHuge}) {
    expect_nothing_appended(
        "kv_append b=3 hkv=2 sn=3 sk=20 d=16 rotary=16 leftpad lk=4,9,17 lpad=1,2,3",
        [=](const auto& a) {
          return Poke{numbers(a.leftpad_k) + 1, value};
        },
        HEED_STATUS_BAD_LENGTH_K);
  }
  for (const int32_t value : {-1, 5, kHuge}) {
    expect_nothing_appended(
        "kv_append b=3 hkv=2 sn=3 sk=20 d=16 cache_batch=5 lk=4,9,17",
        [=](const auto& a) {
          return Poke{numbers(a.cache_batch_idx) + 1, value};
        },
        HEED_STATUS_BAD_PAGE);
  }
  for (const int32_t value : {-1, 18, kHuge}) {  // rows of cos and sin: 20
    expect_nothing_appended(
        "kv_append b=3 hkv=2 sn=3 sk=20 d=16 rotary=16 rotary_seqlens lk=4,9,17",
        [=](const auto& a) {
          return Poke{numbers(a.rotary_seqlens) + 1, value};
        },
        HEED_STATUS_BAD_LENGTH_K);
  }
}

TEST_F(BadData, FallingOffsetsOfQueriesThatAreTurned) {
  LineRun problem(placed("kv_append b=4 hq=2 hkv=1 sk=20 d=16 rotary=16 layout_new=thd lq=4,2,3,4 tq=13 lk=4,9,7,1"));
  ASSERT_EQ(problem.error(), "");
  ASSERT_FALSE(problem.accepting().empty()) << "no row accepts it";
  const heed_kv_append_args& args = *problem.kv_append();
  for (const Offsets& offsets : kFalling) {
    SCOPED_TRACE(::testing::PrintToString(offsets.values));
    set(args, args.cu_seqlens_q, offsets.values);
    for (const std::string& row : problem.accepting()) {
      SCOPED_TRACE(row);
      ASSERT_EQ(problem.run(row, RunStyle()), "");
      expect_status(problem, args, offsets.bits, HEED_STATUS_BAD_LENGTH_Q);
      const OnHost host(problem, args);
      std::vector<bool> turned(13);
      for (size_t b = 0; b < 4; ++b) {
        for (int32_t i = offsets.values[b]; i < offsets.values[b + 1] && offsets.bits[b] == 0; ++i) turned[i] = true;
      }
      for (int64_t i = 0; i < 13; ++i) {
        if (!turned[i]) expect_all(host.args.q_out, 0, i, i + 1, 0.0, "q_out");
      }
    }
  }
}

}  // namespace
}  // namespace heed
