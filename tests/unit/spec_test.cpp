// docs/conventions.md, sections 1 and 3 to 8, sentence by sentence: each test sets up the case that its
// sentence is about, runs it on every row of the registry that accepts it, the reference included, and looks at the
// numbers. Where not said otherwise results are also judged against the reference.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cmath>
#include <limits>
#include <map>

#include "unit/spec_lines.h"

namespace heed {
namespace {

using namespace testing;

// ---- 1. tensors -----------------------------------------------------------------------------------------------------

TEST(SpecTensors, QueryHeadsReadTheKvHeadOfTheirGroup) {
  on_every_row(
      "attention b=2 hq=6 hkv=2 sq=5 sk=9 d=8",
      [](Args& a) { fill(a.v, [](int64_t, int64_t, int64_t hkv, int64_t) { return 1.0 + static_cast<double>(hkv); }); },
      [](Args& a) {
        for (int64_t h = 0; h < 6; ++h) EXPECT_NEAR(get(a.out, 1, 4, h, 7), 1.0 + static_cast<double>(h / 3), 1e-5);
      });
}

TEST(SpecTensors, LayoutsAreOneResult) {
  std::map<std::string, std::vector<double>> results;  // (bshd of one sequence) has the element order of thd
  on_every_row("attention hq=4 hkv=2 sq=37 sk=53 d=24 causal lse", nullptr,
               [&](Args& a) { results["lse"] = values(a.lse); });
  for (const char* layout : {"", " layout_q=bhsd layout_kv=bhsd", " layout_q=thd tq=37 layout_kv=thd tk=53",
                             " layout_q=thd tq=37", " layout_kv=bhsd"}) {
    on_every_row(std::string("attention hq=4 hkv=2 sq=37 sk=53 d=24 causal lse") + layout, nullptr, [&](Args& a) {
      const std::vector<double> lse = values(a.lse);
      for (size_t n = 0; n < lse.size(); ++n) ASSERT_NEAR(lse[n], results["lse"][n], 1e-5);
    });
  }
}

TEST(SpecTensors, AnyStridesAndNoAlignment) {
  on_every_row(
      "attention b=2 hq=4 hkv=2 sq=19 sk=23 d=24 dv=16 lse strides.q=5000,33,131 strides.k=0,0,25 "
      "strides.v=3001,1500,17 strides.out=4001,50,211 strides.lse=400,60,3 align.q=4 align.k=4 align.v=4 "
      "align.out=4",
      nullptr, nullptr);
  on_every_row(
      "attention b=2 hq=2 sq=19 sk=23 d=24 bf16 strides.q=1501,25,61 strides.k=0,0,25 align.q=2 align.k=2 "
      "align.v=2 align.out=2",
      nullptr, nullptr);
}

TEST(SpecTensors, HeadDimsMayDiffer) {
  for (const char* dims : {"d=8 dv=24", "d=40 dv=8", "d=1 dv=3", "d=512 dv=16"}) {
    on_every_row(std::string("attention hq=2 sq=9 sk=70 causal ") + dims, nullptr, nullptr);
  }
}

TEST(SpecTensors, OutputsInF32OnRequest) {
  on_every_row("attention hq=2 sq=9 sk=70 d=16 bf16 out=f32 lse", nullptr,
               [](Args& a) { EXPECT_EQ(a.out.dtype, HEED_DTYPE_F32); });
  on_every_row("attention hq=2 sq=9 sk=70 d=16 f16 out=f32 lse", nullptr, nullptr);
}

TEST(SpecTensors, LseIsTheNaturalLogOfEveryTerm) {
  on_every_row(
      "attention hq=2 sq=3 sk=7 d=8 sinks lse",
      [](Args& a) {
        all_zero(a.q);
        set(a.sinks, 1.5, 0);
        set(a.sinks, -kInf, 1);
      },
      [](Args& a) {
        EXPECT_NEAR(get(a.lse, 0, 0, 1), std::log(7 + std::exp(1.5)), 1e-5);
        EXPECT_NEAR(get(a.lse, 0, 1, 1), std::log(7.0), 1e-5);
      });
}

TEST(SpecTensors, SizesOfZeroAreOrdinary) {
  for (const char* sizes : {"b=0 sq=4 sk=4", "b=2 sq=0 sk=4", "b=2 sq=4 sk=0", "b=0 sq=0 sk=0"}) {
    on_every_row(std::string("attention hq=2 d=8 lse ") + sizes, nullptr, nullptr);
    on_every_row(std::string("attention hq=2 d=8 pass=bwd ") + sizes, nullptr, nullptr);
  }
}

TEST(SpecTensors, MoreSequencesThan65535) {
  on_every_row("attention b=66000 sq=1 sk=2 d=4 lse", nullptr, nullptr);
  on_every_row("attention b=66000 tq=66000 tk=132000 sq=1 sk=2 d=4 layout_q=thd layout_kv=thd lse", nullptr, nullptr);
}

TEST(SpecTensors, OffsetsPast31Bits) {
  constexpr int64_t kStride = (int64_t{1} << 32) + 64;  // elements between sequences
  constexpr size_t kBytes = 4 * (kStride + 4096);
  void* memory = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) GTEST_SKIP() << "no address space for 2^32 elements";
  on_every_row(
      "attention b=2 sq=4 sk=8 d=16 lse",
      [&](Args& a) {
        heed_tensor far = a.v;
        far.data = memory;
        far.stride[0] = kStride;
        const heed_tensor near = a.v;
        fill(far, [&](int64_t b, int64_t j, int64_t h, int64_t d) { return get(near, b, j, h, d); });
        a.v = far;
      },
      nullptr);
  munmap(memory, kBytes);
}

// ---- 3. nothing in them ---------------------------------------------------------------------------------------------

TEST(SpecEmpty, ARowWithoutVisibleKeysIsZero) {
  on_every_row("attention b=1 hq=2 sq=90 sk=20 d=16 causal lse", nullptr, [](Args& a) {
    for (int64_t i = 0; i < 70; ++i) {
      EXPECT_EQ(get(a.out, 0, i, 1, 3), 0);
      EXPECT_EQ(get(a.lse, 0, 1, i), -kInf);
    }
  });
  on_every_row("attention b=1 hq=2 sq=90 sk=20 d=16 causal sinks lse", nullptr, [](Args& a) {
    EXPECT_EQ(get(a.out, 0, 3, 1, 3), 0);
    EXPECT_NEAR(get(a.lse, 0, 1, 3), get(a.sinks, 1), 1e-6);
  });
  on_every_row("attention b=1 hq=2 sq=90 sk=20 d=16 causal pass=bwd", nullptr, [](Args& a) {
    for (int64_t i = 0; i < 70; ++i) EXPECT_EQ(get(a.dq, 0, i, 1, 3), 0);
  });
}

TEST(SpecEmpty, PaddingIsWrittenAsZero) {
  on_every_row("attention b=3 hq=2 sq=40 sk=50 d=16 used_q lq=7,0,40 used_k lk=50,3,0 lse", nullptr, [](Args& a) {
    EXPECT_EQ(get(a.out, 0, 7, 1, 3), 0);
    EXPECT_EQ(get(a.lse, 0, 1, 7), -kInf);
    EXPECT_EQ(get(a.out, 2, 39, 0, 0), 0);
  });
  on_every_row("attention b=3 hq=2 sq=40 sk=50 d=16 used_q lq=7,0,40 used_k lk=50,3,0 pass=bwd", nullptr, [](Args& a) {
    EXPECT_EQ(get(a.dq, 0, 7, 1, 3), 0);
    EXPECT_EQ(get(a.dk, 1, 3, 1, 3), 0);
    EXPECT_EQ(get(a.dv, 2, 49, 1, 3), 0);
  });
}

TEST(SpecEmpty, MemoryBetweenAndAfterPackedSequencesIsWrittenAsZero) {
  on_every_row("attention b=3 hq=2 tq=60 tk=70 d=16 layout_q=thd layout_kv=thd used_q used_k lq=20,0,25 lk=30,5,20 lse",
               nullptr, [](Args& a) {
                 const int32_t used = number(a.seqused_q, 0);
                 for (int64_t row = used; row < 20; ++row) {
                   EXPECT_EQ(get(a.out, row, 1, 3), 0);
                   EXPECT_EQ(get(a.lse, 1, row), -kInf);
                 }
                 for (int64_t row = 45; row < 60; ++row) EXPECT_EQ(get(a.out, row, 1, 3), 0);
               });
}

TEST(SpecEmpty, ZeroLengthSequencesAnywhere) {
  for (const char* lengths : {"lq=0,5,3 lk=0,7,9", "lq=5,0,3 lk=7,0,9", "lq=5,3,0 lk=9,7,0", "lq=0,0,0 lk=0,0,0",
                              "lq=5,3,0 lk=0,7,4", "lq=0,3,4 lk=6,0,0"}) {
    for (const char* pass : {"lse", "pass=bwd"}) {
      on_every_row(
          std::string("attention b=3 hq=2 tq=8 tk=16 d=16 layout_q=thd layout_kv=thd causal ") + pass + " " + lengths,
          nullptr, nullptr);
    }
  }
}

TEST(SpecEmpty, NanInAVisibleValueSpreadsToWhatDependsOnItAlone) {
  on_every_row(
      "attention b=2 hq=2 sq=80 sk=80 d=16 causal lse", [](Args& a) { set(a.v, kNan, 0, 40, 1, 3); },
      [](Args& a) {
        EXPECT_TRUE(std::isnan(get(a.out, 0, 40, 1, 3)));
        EXPECT_TRUE(std::isnan(get(a.out, 0, 79, 1, 3)));
        EXPECT_TRUE(std::isfinite(get(a.out, 0, 39, 1, 3)));  // does not see key 40, though in its block
        EXPECT_TRUE(std::isfinite(get(a.out, 0, 40, 1, 2)));
        EXPECT_TRUE(std::isfinite(get(a.out, 0, 40, 0, 3)));
        EXPECT_TRUE(std::isfinite(get(a.out, 1, 40, 1, 3)));
        EXPECT_TRUE(std::isfinite(get(a.lse, 0, 1, 40)));
      });
  on_every_row(
      "attention b=2 hq=2 sq=80 sk=80 d=16 causal lse", [](Args& a) { set(a.q, kNan, 1, 40, 1, 3); },
      [](Args& a) {
        EXPECT_TRUE(std::isnan(get(a.out, 1, 40, 1, 3)));
        EXPECT_TRUE(std::isfinite(get(a.out, 1, 41, 1, 3)));
      });
}

TEST(SpecEmpty, HiddenKeysInALoadedBlockHaveNoEffect) {
  for (const char* dtype : {"f32", "bf16", "f16"}) {
    on_every_row(
        std::string("attention b=2 hq=2 sq=30 sk=80 d=16 causal lse offset=20 ") + dtype,
        [](Args& a) {
          for (int64_t j = 50; j < 80; ++j) {
            for (int64_t d = 0; d < 16; ++d) set(a.k, kNan, 1, j, 1, d), set(a.v, kInf, 0, j, 1, d);
          }
        },
        [](Args& a) {
          for (const double x : values(a.out)) ASSERT_TRUE(std::isfinite(x));
        });
  }
}

// ---- 4. backward ----------------------------------------------------------------------------------------------------

TEST(SpecBackward, EveryFeatureAgainstTheReference) {
  for (const char* line : {"b=2 hq=4 hkv=2 sq=33 sk=47 d=16 dv=24 causal dlse",
                           "b=2 hq=4 hkv=1 sq=33 sk=47 d=16 window=9,3 softcap bias=f32:hij alibi sinks dlse",
                           "b=2 hq=2 sq=33 sk=47 d=16 mask=bhij dropout p=0.2 chunk=20 bf16",
                           "b=3 hq=2 tq=60 tk=70 d=16 layout_q=thd layout_kv=thd lq=20,0,25 lk=30,5,20 causal sinks"}) {
    on_every_row(std::string("attention pass=bwd ") + line, nullptr, nullptr);
  }
}

TEST(SpecBackward, GroupsAreSummedAndRoundedOnce) {
  on_every_row("attention b=1 hq=8 hkv=1 sq=40 sk=40 d=16 bf16 pass=bwd", nullptr, nullptr);
}

TEST(SpecBackward, OnlyTheGradientsAskedFor) {
  for (const char* grads : {"dq", "dk", "dv", "dq,dv", "dbias", "dsinks"}) {
    on_every_row(std::string("attention b=1 hq=2 sq=20 sk=20 d=16 bias=f32:h sinks pass=bwd grads=") + grads, nullptr,
                 nullptr);
  }
}

TEST(SpecBackward, BroadcastDimensionsOfDbiasAreSummed) {
  for (const char* letters : {"b", "h", "i", "j", "hij", "bhij"}) {
    on_every_row(std::string("attention b=2 hq=2 sq=20 sk=30 d=16 pass=bwd bias=f32:") + letters, nullptr, nullptr);
  }
}

TEST(SpecBackward, DeterministicIsTheSameBitsOnEveryRun) {
  std::vector<std::vector<double>> first;
  TestExecutor reversed(3, false);
  const std::string line = "attention b=2 hq=4 hkv=2 sq=100 sk=130 d=24 deterministic causal pass=bwd";
  on_every_row(line, nullptr, [&](Args& a) { first.push_back(values(a.dk)); });
  size_t n = 0;
  on_every_row(line, nullptr, [&](Args& a) { EXPECT_EQ(values(a.dk), first.at(n++)); }, true,
               {&reversed.executor, 3, 0x00});
}

TEST(SpecBackward, HiddenKeysGetNoGradient) {
  on_every_row(
      "attention b=1 hq=2 sq=30 sk=50 d=16 mask=j pass=bwd",
      [](Args& a) {
        set(a.mask, 0, 0, 0, 0, 20);
        for (int64_t d = 0; d < 16; ++d) set(a.k, kNan, 0, 20, 1, d), set(a.v, kNan, 0, 20, 1, d);
      },
      [](Args& a) {
        EXPECT_EQ(get(a.dk, 0, 20, 1, 3), 0);
        EXPECT_EQ(get(a.dv, 0, 20, 1, 3), 0);
        for (const double x : values(a.dq)) ASSERT_TRUE(std::isfinite(x));
      });
}

// ---- 5. serving -----------------------------------------------------------------------------------------------------

TEST(SpecServing, AnyPageSize) {
  for (const char* page : {"page=1", "page=3", "page=16", "page=64"}) {
    on_every_row(
        std::string("attention b=3 hq=4 hkv=2 sq=3 sk=192 d=16 used_k lk=192,50,1 causal pages=shuffled lse ") + page,
        nullptr, nullptr);
  }
}

// The inputs put numbers there that no page has.
TEST(SpecServing, PageEntriesPastTheLengthAreNeverRead) {
  on_every_row(
      "attention b=2 hq=2 sq=1 sk=64 d=16 page=8 used_k lk=17,3 lse",
      [](Args& a) {
        for (int64_t page = 3; page < 8; ++page) {
          EXPECT_TRUE(get(a.page_table, 0, page) < 0 || get(a.page_table, 0, page) > 1e9);
        }
      },
      [](Args& a) { EXPECT_EQ(number(a.status, 0), 0); });
}

TEST(SpecServing, CacheBatchIdxChoosesTheRow) {
  on_every_row(
      "attention b=3 hq=2 sq=1 sk=20 d=16 cache_batch=4",
      [](Args& a) {
        fill(a.k, [](int64_t, int64_t, int64_t, int64_t) { return 0.0; });
        fill(a.v, [](int64_t row, int64_t, int64_t, int64_t) { return static_cast<double>(row); });
        for (int32_t b = 0; b < 3; ++b) number(a.cache_batch_idx, b) = (2 * b + 1) % 4;
      },
      [](Args& a) {
        for (int64_t b = 0; b < 3; ++b) EXPECT_NEAR(get(a.out, b, 0, 1, 5), static_cast<double>((2 * b + 1) % 4), 1e-5);
      });
}

TEST(SpecServing, PackedQueriesOverAPagedCache) {
  on_every_row("attention b=3 hq=4 hkv=2 tq=9 sk=64 d=16 layout_q=thd lq=1,5,3 page=16 used_k lk=64,20,3 causal lse",
               nullptr, nullptr);
}

TEST(SpecServing, SplitsAreMergedInAFixedOrder) {
  for (const char* splits : {"splits=2", "splits=3", "splits=8", "splits=1000"}) {
    on_every_row(std::string("attention b=2 hq=4 hkv=2 sq=2 sk=1000 d=16 causal fill=maxlast lse ") + splits, nullptr,
                 nullptr);
  }
}

// Sequence `b` of a line whose other sequences have other lengths, alone and in company.
TEST(SpecServing, BatchInvariance) {
  const std::string features = " hq=4 hkv=2 d=16 causal batch_invariant lse layout_q=thd layout_kv=thd";
  std::vector<std::vector<double>> alone;
  const auto rows_of = [](const Args& a, int64_t begin, int64_t count) {
    std::vector<double> rows;
    for (int64_t row = begin; row < begin + count; ++row) {
      for (int64_t h = 0; h < 4; ++h) {
        for (int64_t d = 0; d < 16; ++d) rows.push_back(get(a.out, row, h, d));
      }
    }
    return rows;
  };
  const auto pattern = [](int64_t seed, int64_t n) { return std::sin(static_cast<double>(1 + seed * 131 + n * 17)); };
  for (const auto& [rows, keys] : {std::pair(1, 700), std::pair(37, 90)}) {
    const auto put = [&](Args& a, int64_t q_begin, int64_t k_begin) {
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t n = 0; n < 64; ++n) set(a.q, pattern(i, n), q_begin + i, n / 16, n % 16);
      }
      for (int64_t j = 0; j < keys; ++j) {
        for (int64_t n = 0; n < 32; ++n) {
          set(a.k, pattern(j + 5, n), k_begin + j, n / 16, n % 16);
          set(a.v, pattern(j + 9, n), k_begin + j, n / 16, n % 16);
        }
      }
    };
    const std::string q = std::to_string(rows), k = std::to_string(keys);
    alone.clear();
    on_every_row(
        "attention b=1 tq=" + q + " tk=" + k + features, [&](Args& a) { put(a, 0, 0); },
        [&](Args& a) { alone.push_back(rows_of(a, 0, rows)); });
    size_t n = 0;
    on_every_row(
        "attention b=3" + features + " lq=50," + q + ",3 lk=300," + k + ",900", [&](Args& a) { put(a, 50, 300); },
        [&](Args& a) { EXPECT_EQ(rows_of(a, 50, rows), alone.at(n++)) << "in company, " << q << " rows"; });
    n = 0;
    on_every_row(
        "attention b=2" + features + " lq=" + q + ",1 lk=" + k + ",5", [&](Args& a) { put(a, 0, 0); },
        [&](Args& a) { EXPECT_EQ(rows_of(a, 0, rows), alone.at(n++)) << "first of two, " << q << " rows"; });
  }
}

// ---- 6. accuracy ----------------------------------------------------------------------------------------------------

TEST(SpecAccuracy, EveryFillIsWithinTheBound) {
  for (const char* fill : {"normal", "uniform", "ones", "zero", "arange", "maxlast", "huge", "tiny", "normal*3"}) {
    for (const char* dtype : {"f32", "bf16", "f16"}) {
      on_every_row(std::string("attention b=1 hq=2 sq=40 sk=150 d=32 causal lse ") + dtype + " fill=" + fill, nullptr,
                   nullptr);
    }
  }
}

TEST(SpecAccuracy, InfWhereTheReferenceHasInfOrNan) {
  on_every_row(
      "attention b=1 hq=2 sq=40 sk=60 d=16 causal",
      [](Args& a) { set(a.v, kInf, 0, 10, 1, 3), set(a.v, -kInf, 0, 12, 1, 4); }, nullptr);
}

// ---- 8. what the host does not see ----------------------------------------------------------------------------------

TEST(SpecData, StatusIsOverwrittenByEveryRun) {
  on_every_row(
      "attention b=3 hq=2 sq=4 sk=20 d=8 used_k lk=20,3,7 lse",
      [](Args& a) {
        for (int64_t b = 0; b < 3; ++b) number(a.status, b) = 0x7fff;
        number(a.seqused_k, 1) = 21;
      },
      [](Args& a) {
        EXPECT_EQ(number(a.status, 0), 0);
        EXPECT_EQ(number(a.status, 1), HEED_STATUS_BAD_LENGTH_K);
        EXPECT_EQ(number(a.status, 2), 0);
        EXPECT_EQ(get(a.out, 1, 2, 1, 3), 0);
        EXPECT_EQ(get(a.lse, 1, 1, 2), -kInf);
      });
}

TEST(SpecData, HintsNeverChangeResults) {
  std::vector<std::vector<double>> results;
  const std::string line =
      "attention b=2 hq=2 tq=40 tk=90 d=16 layout_q=thd layout_kv=thd lq=30,10 lk=60,30 causal lse";
  on_every_row(line, nullptr, [&](Args& a) { results.push_back(values(a.lse)); });
  for (const auto& [hint_q, hint_k] : {std::pair(30, 60), std::pair(1, 1), std::pair(1000000, 1000000)}) {
    size_t n = 0;
    on_every_row(
        line, [&](Args& a) { a.max_seqlen_q = hint_q, a.max_seqlen_k = hint_k; },
        [&](Args& a) {
          const std::vector<double> lse = values(a.lse);
          for (size_t i = 0; i < lse.size(); ++i) ASSERT_NEAR(lse[i], results[n][i], 2e-4);
          ++n;
        });
  }
}

}  // namespace
}  // namespace heed
