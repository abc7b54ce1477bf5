// docs/conventions.md, section 2 (the score), sentence by sentence: each test sets up the case that its
// sentence is about, runs it on every row of the registry that accepts it, the reference included, and looks at the
// numbers. Where not said otherwise results are also judged against the reference.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "base/philox.h"
#include "unit/spec_lines.h"

namespace heed {
namespace {

using namespace testing;

// ---- 2. the score ---------------------------------------------------------------------------------------------------

// With one key lse is the score itself.
void expect_scores(const std::string& line, const std::function<double(Args&, int64_t h, int64_t i, double dot)>& score,
                   const std::function<void(Args&)>& prepare = nullptr) {
  on_every_row(line + " b=1 hq=2 sq=4 sk=1 d=4 lse", prepare, [&](Args& a) {
    for (int64_t h = 0; h < 2; ++h) {
      for (int64_t i = 0; i < 4; ++i) {
        double dot = 0;
        for (int64_t d = 0; d < 4; ++d) dot += get(a.q, 0, i, h, d) * get(a.k, 0, 0, h, d);
        const double want = score(a, h, i, dot);
        EXPECT_NEAR(get(a.lse, 0, h, i), want, 1e-4 + 1e-5 * std::fabs(want));
      }
    }
  });
}

TEST(SpecScore, ScaleDefaultsToOneOverRootHeadDim) {
  expect_scores("attention", [](Args&, int64_t, int64_t, double dot) { return dot / 2; });
}

TEST(SpecScore, AnyFiniteScale) {
  for (const double scale : {0.0, -3.0, 100.0}) {
    expect_scores("attention scale=" + std::to_string(scale),
                  [scale](Args&, int64_t, int64_t, double dot) { return scale * dot; });
  }
}

TEST(SpecScore, SoftcapThenBiasThenAlibi) {
  expect_scores("attention softcap softcap_value=1.5 scale=2 bias=f32:hij alibi offset=3",
                [](Args& a, int64_t h, int64_t i, double dot) {
                  return 1.5 * std::tanh(2 * dot / 1.5) + get(a.bias, 0, h, i, 0) -
                         get(a.alibi_slopes, h) * std::fabs(static_cast<double>(i + 3));
                });
}

TEST(SpecScore, PositionsAlignBottomRightUnlessToldOtherwise) {
  expect_visible("attention b=1 hq=2 sq=5 sk=9 d=8 causal",
                 [](int64_t, int64_t, int64_t i, int64_t j) { return j <= i + 4; });
  expect_visible("attention b=1 hq=2 sq=9 sk=5 d=8 causal",
                 [](int64_t, int64_t, int64_t i, int64_t j) { return j <= i - 4; });
  expect_visible("attention b=1 hq=2 sq=5 sk=9 d=8 causal offset=top",
                 [](int64_t, int64_t, int64_t i, int64_t j) { return j <= i; });
  expect_visible("attention b=1 hq=2 sq=5 sk=9 d=8 causal offset=-2",
                 [](int64_t, int64_t, int64_t i, int64_t j) { return j <= i - 2; });
}

TEST(SpecScore, PositionsAreOfEachSequencesOwnLengths) {
  const int64_t rows[] = {5, 2, 5}, keys[] = {9, 4, 3};
  expect_visible("attention b=3 hq=2 sq=5 sk=9 d=8 causal used_q used_k lq=5,2,5 lk=9,4,3",
                 [&](int64_t b, int64_t, int64_t i, int64_t j) {
                   return i < rows[b] && j < keys[b] && j <= i + keys[b] - rows[b];
                 });
}

TEST(SpecScore, LeftPaddingMovesTheSequencesStart) {
  const int64_t keys[] = {9, 6, 4}, pad[] = {2, 0, 4};
  expect_visible("attention b=3 hq=2 sq=5 sk=9 d=8 window=3,1 chunk=4 used_k leftpad lk=9,6,4 lpad=2,0,4",
                 [&](int64_t b, int64_t, int64_t i, int64_t j) {
                   const int64_t length = keys[b] - pad[b], p = i + length - 5;
                   return j < length && j >= p - 3 && j <= p + 1 && floor_div(p, 4) == floor_div(j, 4);
                 });
}

TEST(SpecScore, WindowEndsAreInclusiveAndMinusOneIsUnbounded) {
  expect_visible("attention b=1 hq=2 sq=70 sk=90 d=8 window=7,3",
                 [](int64_t, int64_t, int64_t i, int64_t j) { return j >= i + 20 - 7 && j <= i + 20 + 3; });
  expect_visible("attention b=1 hq=2 sq=70 sk=90 d=8 window=-1,3",
                 [](int64_t, int64_t, int64_t i, int64_t j) { return j <= i + 23; });
  expect_visible("attention b=1 hq=2 sq=70 sk=90 d=8 window=7,-1",
                 [](int64_t, int64_t, int64_t i, int64_t j) { return j >= i + 13; });
  expect_visible("attention b=1 hq=2 sq=70 sk=90 d=8 window=0,0",
                 [](int64_t, int64_t, int64_t i, int64_t j) { return j == i + 20; });
}

TEST(SpecScore, CausalIsAWindowOfNothingToTheRight) {
  std::vector<std::vector<double>> causal;
  on_every_row("attention hq=2 sq=40 sk=60 d=16 causal lse", nullptr,
               [&](Args& a) { causal.push_back(values(a.out)); });
  size_t n = 0;
  on_every_row("attention hq=2 sq=40 sk=60 d=16 window=-1,0 lse", nullptr,
               [&](Args& a) { EXPECT_EQ(values(a.out), causal.at(n++)); });
}

TEST(SpecScore, ChunksAreOfPositionsNegativeOnesToo) {
  expect_visible("attention b=1 hq=2 sq=40 sk=30 d=8 chunk=7",
                 [](int64_t, int64_t, int64_t i, int64_t j) { return floor_div(i - 10, 7) == floor_div(j, 7); });
}

TEST(SpecScore, MasksConjoin) {
  LineRun probe("attention b=2 hq=2 sq=20 sk=30 d=8 causal window=9,-1 chunk=16 mask=bhij");
  const heed_tensor mask = probe.attention()->mask;
  expect_visible("attention b=2 hq=2 sq=20 sk=30 d=8 causal window=9,-1 chunk=16 mask=bhij",
                 [&](int64_t b, int64_t h, int64_t i, int64_t j) {
                   const int64_t p = i + 10;
                   return j <= p && j >= p - 9 && p / 16 == j / 16 && get(mask, b, h, i, j) != 0;
                 });
}

TEST(SpecScore, MaskAndBiasBroadcast) {
  LineRun probe("attention b=2 hq=2 sq=20 sk=30 d=8 mask=hj");
  const heed_tensor mask = probe.attention()->mask;
  expect_visible("attention b=2 hq=2 sq=20 sk=30 d=8 mask=hj",
                 [&](int64_t, int64_t h, int64_t, int64_t j) { return get(mask, 0, h, 0, j) != 0; });
  for (const char* letters : {"b", "h", "i", "j", "bi", "hj", "bhij"}) {
    on_every_row(std::string("attention b=2 hq=2 sq=20 sk=30 d=8 lse bias=f32:") + letters, nullptr, nullptr);
    on_every_row(std::string("attention b=2 hq=2 sq=20 sk=30 d=8 bf16 lse bias=bf16:") + letters, nullptr, nullptr);
  }
}

TEST(SpecScore, AScoreOfMinusInfHidesItsKey) {
  on_every_row(
      "attention hq=2 sq=70 sk=100 d=16 bias=f32:ij lse",
      [](Args& a) {
        for (int64_t i = 0; i < 70; ++i) set(a.bias, -kInf, 0, 0, i, 40);
        for (int64_t j = 0; j < 100; ++j) set(a.bias, -kInf, 0, 0, 5, j);  // a row of nothing else
        for (int64_t h = 0; h < 2; ++h) set(a.v, kNan, 0, 40, h, 3);
      },
      [](Args& a) {
        for (const double x : values(a.out)) ASSERT_TRUE(std::isfinite(x));
        EXPECT_EQ(get(a.out, 0, 5, 1, 2), 0);
        EXPECT_EQ(get(a.lse, 0, 1, 5), -kInf);
      });
}

TEST(SpecScore, AScoreOfPlusInfOrNanGivesNan) {
  for (const double bad : {kInf, kNan}) {
    on_every_row(
        "attention hq=2 sq=70 sk=100 d=16 bias=f32:ij lse", [&](Args& a) { set(a.bias, bad, 0, 0, 7, 33); },
        [](Args& a) {
          EXPECT_TRUE(std::isnan(get(a.out, 0, 7, 1, 2)));
          EXPECT_TRUE(std::isnan(get(a.lse, 0, 1, 7)));
          EXPECT_TRUE(std::isfinite(get(a.out, 0, 6, 1, 2)));
          EXPECT_TRUE(std::isfinite(get(a.lse, 0, 0, 8)));
        });
  }
}

TEST(SpecScore, AMaskedKeyHasNoEffectWhateverItsMemoryHolds) {
  for (const double bad : {kNan, kInf, -kInf}) {
    on_every_row(
        "attention b=2 hq=2 sq=70 sk=100 d=16 mask=j lse",
        [&](Args& a) {
          for (int64_t j = 30; j < 50; ++j) {
            set(a.mask, 0, 0, 0, 0, j);
            for (int64_t d = 0; d < 16; ++d) set(a.k, bad, 1, j, 0, d), set(a.v, bad, 1, j, 1, d);
          }
        },
        [](Args& a) {
          for (const double x : values(a.out)) ASSERT_TRUE(std::isfinite(x));
          for (const double x : values(a.lse)) ASSERT_TRUE(std::isfinite(x));
        });
  }
}

TEST(SpecScore, SinksCountOnceHoweverTheKeysAreSplit) {
  for (const char* splits : {"", " splits=1", " splits=2", " splits=3", " splits=9"}) {
    on_every_row(
        std::string("attention b=2 hq=4 hkv=2 sq=2 sk=700 d=16 sinks causal lse") + splits,
        [](Args& a) {
          all_zero(a.q);
          for (int64_t h = 0; h < 4; ++h) set(a.sinks, 3.0 + static_cast<double>(h), h);
        },
        [](Args& a) {
          for (int64_t h = 0; h < 4; ++h) {
            EXPECT_NEAR(get(a.lse, 1, h, 1), std::log(700 + std::exp(3.0 + static_cast<double>(h))), 2e-4);
          }
        });
  }
}

// Value e_j for key j: out_ij is the key's weight, so the mask can be read off it.
void expect_dropout_mask(const std::string& line, const RunStyle& style = {}) {
  on_every_row(
      line + " hq=2 sq=9 sk=40 d=8 dv=40 dropout p=0.4 seed=77 lse",
      [](Args& a) {
        all_zero(a.q);
        fill(a.v, [](int64_t, int64_t j, int64_t, int64_t d) { return j == d ? 1.0 : 0.0; });
      },
      [](Args& a) {
        const uint64_t below = dropout_threshold(a.dropout_p);
        for (int64_t b = 0; b < a.q.shape[0]; ++b) {
          for (int64_t h = 0; h < 2; ++h) {
            for (int64_t i = 0; i < 9; ++i) {
              for (int64_t j = 0; j < 40; ++j) {
                const auto words = philox4x32_10(
                    {static_cast<uint32_t>(j / 4), static_cast<uint32_t>(i), static_cast<uint32_t>(b * 2 + h),
                     static_cast<uint32_t>(a.dropout_offset)},
                    {static_cast<uint32_t>(a.dropout_seed),
                     static_cast<uint32_t>(a.dropout_seed >> 32) ^ static_cast<uint32_t>(a.dropout_offset >> 32)});
                const double want = words[j % 4] < below ? 1 / (1 - static_cast<double>(a.dropout_p)) / 40 : 0;
                ASSERT_NEAR(get(a.out, b, i, h, j), want, 1e-5) << "b=" << b << " h=" << h << " i=" << i << " j=" << j;
              }
              ASSERT_NEAR(get(a.lse, b, h, i), std::log(40.0), 1e-4);  // lse does not see dropout
            }
          }
        }
      },
      true, style);
}

TEST(SpecScore, DropoutMaskIsTheSameOnEveryRowSplitAndThread) {
  TestExecutor reversed(3, false);
  for (const char* splits : {"", " splits=2", " splits=5"}) expect_dropout_mask(std::string("attention b=2") + splits);
  expect_dropout_mask("attention b=2", {&reversed.executor, 3, 0x00});
}

TEST(SpecScore, DropoutOfZeroIsExactAndOfOneGivesZero) {
  std::vector<std::vector<double>> plain;
  on_every_row("attention b=2 hq=2 sq=20 sk=30 d=8", nullptr, [&](Args& a) { plain.push_back(values(a.out)); });
  size_t n = 0;
  on_every_row("attention b=2 hq=2 sq=20 sk=30 d=8 dropout p=0", nullptr,
               [&](Args& a) { EXPECT_EQ(values(a.out), plain.at(n++)); });
  on_every_row("attention b=2 hq=2 sq=20 sk=30 d=8 dropout p=1", nullptr, [](Args& a) {
    for (const double x : values(a.out)) ASSERT_EQ(x, 0);
  });
}

TEST(SpecScore, ADroppedKeyHasNoEffectWhateverItsValueHolds) {
  on_every_row(
      "attention hq=1 sq=1 sk=40 d=8 dv=8 dropout p=0.5 seed=3",
      [](Args& a) {
        for (int64_t j = 0; j < 40; ++j) {
          const auto words =
              philox4x32_10({static_cast<uint32_t>(j / 4), 0, 0, static_cast<uint32_t>(a.dropout_offset)},
                            {static_cast<uint32_t>(a.dropout_seed), static_cast<uint32_t>(a.dropout_seed >> 32) ^
                                                                        static_cast<uint32_t>(a.dropout_offset >> 32)});
          if (words[j % 4] >= dropout_threshold(a.dropout_p)) set(a.v, kNan, 0, j, 0, 2);
        }
      },
      [](Args& a) {
        for (const double x : values(a.out)) ASSERT_TRUE(std::isfinite(x));
      });
}

}  // namespace
}  // namespace heed
