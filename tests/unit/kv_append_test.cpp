// kv_append, sentence by sentence (docs/conventions.md, section 5): numbers looked at directly, and judged.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>

#include "base/dtype.h"
#include "unit/line_run.h"

namespace heed {
namespace {

using testing::LineRun;
using Args = heed_kv_append_args;

double get(const heed_tensor& t, int64_t a, int64_t b = 0, int64_t c = 0, int64_t d = 0) {
  const int64_t offset = a * t.stride[0] + b * t.stride[1] + c * t.stride[2] + d * t.stride[3];
  return load_as_double(t.data, static_cast<Dtype>(t.dtype), offset);
}

int32_t& number(const heed_tensor& t, int64_t n) { return static_cast<int32_t*>(t.data)[n]; }

void on_every_row(const std::string& line, const std::function<void(Args&)>& look) {
  SCOPED_TRACE(line);
  LineRun probe(line);
  ASSERT_EQ(probe.error(), "");
  const std::vector<std::string> rows = probe.accepting();
  ASSERT_GE(rows.size(), 2u);
  for (const std::string& row : rows) {
    SCOPED_TRACE(row);
    LineRun run(line);
    ASSERT_EQ(run.run(row, {}), "");
    EXPECT_EQ(run.judge(), "");
    look(*run.kv_append());
  }
}

void expect_appended(Args& a, bool rotary) {
  for (int64_t b = 0; b < a.k_new.shape[0]; ++b) {
    const int64_t start = number(a.cache_seqlens, b);
    for (int64_t t = 0; t < a.k_new.shape[1]; ++t) {
      for (int64_t h = 0; h < a.k_new.shape[2]; ++h) {
        EXPECT_EQ(get(a.v_cache, b, start + t, h, 1), get(a.v_new, b, t, h, 1));
        if (!rotary) {
          EXPECT_EQ(get(a.k_cache, b, start + t, h, 1), get(a.k_new, b, t, h, 1));
        }
      }
    }
  }
}

TEST(KvAppend, NewKeysGoToPositionCacheSeqlensPlusT) {
  for (const char* dtype : {"f32", "f16", "bf16"}) {
    on_every_row(std::string("kv_append b=3 hkv=2 sn=4 sk=20 d=16 lk=0,16,7 ") + dtype,
                 [](Args& a) { expect_appended(a, false); });
  }
}

TEST(KvAppend, RotaryHalfTurnsPairsHalfTheRotaryDimApart) {
  on_every_row("kv_append b=2 hkv=1 sn=3 sk=20 d=16 rotary=8 lk=5,9", [](Args& a) {
    expect_appended(a, true);
    for (int64_t b = 0; b < 2; ++b) {
      for (int64_t t = 0; t < 3; ++t) {
        const int64_t place = number(a.cache_seqlens, b) + t;
        const double c = get(a.rotary_cos, place, 2), s = get(a.rotary_sin, place, 2);
        const double x = get(a.k_new, b, t, 0, 2), y = get(a.k_new, b, t, 0, 6);
        EXPECT_NEAR(get(a.k_cache, b, place, 0, 2), x * c - y * s, 1e-5);
        EXPECT_NEAR(get(a.k_cache, b, place, 0, 6), x * s + y * c, 1e-5);
        EXPECT_EQ(get(a.k_cache, b, place, 0, 8), get(a.k_new, b, t, 0, 8));  // past rotary_dim: as it is
      }
    }
  });
}

TEST(KvAppend, RotaryInterleavedTurnsNeighbours) {
  on_every_row("kv_append b=2 hkv=1 sn=3 sk=20 d=16 rotary=8 interleaved lk=5,9", [](Args& a) {
    const int64_t place = number(a.cache_seqlens, 1) + 2;
    const double c = get(a.rotary_cos, place, 2), s = get(a.rotary_sin, place, 2);
    const double x = get(a.k_new, 1, 2, 0, 4), y = get(a.k_new, 1, 2, 0, 5);
    EXPECT_NEAR(get(a.k_cache, 1, place, 0, 4), x * c - y * s, 1e-5);
    EXPECT_NEAR(get(a.k_cache, 1, place, 0, 5), x * s + y * c, 1e-5);
  });
}

// Query i at the first new position + i if causal or windowed, else all at the first.
TEST(KvAppend, QueriesTurnAtTheFirstPositionOrOneEach) {
  for (const bool each : {false, true}) {
    on_every_row(std::string("kv_append b=2 hq=2 sn=3 sk=20 d=16 rotary=16 lk=5,9") + (each ? " q_per_position" : ""),
                 [each](Args& a) {
                   const int64_t position = number(a.cache_seqlens, 1) + (each ? 2 : 0);
                   const double c = get(a.rotary_cos, position, 1), s = get(a.rotary_sin, position, 1);
                   EXPECT_NEAR(get(a.q_out, 1, 2, 1, 1), get(a.q, 1, 2, 1, 1) * c - get(a.q, 1, 2, 1, 9) * s, 1e-5);
                 });
  }
}

TEST(KvAppend, RotarySeqlensStateTheFirstPosition) {
  on_every_row("kv_append b=2 hkv=1 sn=2 sk=20 d=8 rotary=8 rotary_seqlens rotary_n=50 lk=5,9", [](Args& a) {
    const int64_t position = number(a.rotary_seqlens, 0) + 1, place = number(a.cache_seqlens, 0) + 1;
    const double c = get(a.rotary_cos, position, 0), s = get(a.rotary_sin, position, 0);
    EXPECT_NEAR(get(a.k_cache, 0, place, 0, 0), get(a.k_new, 0, 1, 0, 0) * c - get(a.k_new, 0, 1, 0, 4) * s, 1e-5);
  });
}

TEST(KvAppend, RotaryCountsFromTheFirstKeyAfterTheLeftPadding) {
  on_every_row("kv_append b=2 hkv=1 sn=2 sk=20 d=8 rotary=8 leftpad lk=5,9 lpad=3,0", [](Args& a) {
    const double c = get(a.rotary_cos, 2, 0), s = get(a.rotary_sin, 2, 0);
    EXPECT_NEAR(get(a.k_cache, 0, 5, 0, 0), get(a.k_new, 0, 0, 0, 0) * c - get(a.k_new, 0, 0, 0, 4) * s, 1e-5);
  });
}

TEST(KvAppend, NothingElseIsTouched) {
  for (const char* line : {"kv_append b=3 hkv=2 sn=4 sk=20 d=16 page=4 pages=shuffled num_pages=30 lk=1,16,7",
                           "kv_append b=3 hkv=2 sn=4 sk=20 d=16 cache_batch=7 layout_cache=bhsd lk=1,16,7 bf16",
                           "kv_append b=3 hkv=2 tn=12 sk=20 d=16 layout_new=thd lq=5,0,4 lk=1,16,7",
                           "kv_append b=3 hq=2 noappend sq=3 sk=20 d=16 rotary=6"}) {
    on_every_row(line, [](Args&) {});
  }
}

TEST(KvAppend, PastTheCapacityAppendsNothing) {
  on_every_row("kv_append b=3 hq=2 sn=4 sk=20 d=16 rotary=4 rotary_n=40 lk=17,16,20", [](Args& a) {
    EXPECT_EQ(number(a.status, 0), HEED_STATUS_APPEND_PAST_CAPACITY);
    EXPECT_EQ(number(a.status, 1), 0);
    EXPECT_EQ(number(a.status, 2), HEED_STATUS_APPEND_PAST_CAPACITY);
    EXPECT_EQ(get(a.q_out, 0, 1, 1, 3), 0);
  });
}

// The key that was appended is seen by attention over cache_seqlens + 1 keys.
TEST(KvAppend, AttentionSeesWhatWasAppended) {
  LineRun append("kv_append b=2 hkv=2 sn=1 sk=32 d=16 page=8 pages=shuffled lk=11,4");
  ASSERT_EQ(append.run("cpu/kv_append", {}), "");
  Args& a = *append.kv_append();
  LineRun attend("attention b=2 hq=4 hkv=2 sq=1 sk=32 d=16 page=8 used_k lk=12,5 causal lse");
  heed_attention_args& at = *attend.attention();
  at.k = a.k_cache;
  at.v = a.v_cache;
  at.page_table = a.page_table;
  for (const std::string& row : attend.accepting()) {
    SCOPED_TRACE(row);
    ASSERT_EQ(attend.run(row, {}), "");
    EXPECT_EQ(attend.judge(), "");
    EXPECT_TRUE(std::isfinite(get(at.out, 1, 0, 3, 7)));
  }
}

}  // namespace
}  // namespace heed
