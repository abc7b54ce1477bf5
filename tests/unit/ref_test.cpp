// The reference's own traits; its numbers are compared with an independent formula in
// tests/python/test_reference_numpy.py and looked at directly in spec_test.cpp and spec_score_test.cpp.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "heed/heed.h"
#include "plan/registry.h"
#include "ref/attention.h"
#include "unit/line_run.h"

namespace heed {
namespace {

using testing::LineRun;

TEST(Reference, IsTakenOnlyWhenForced) {
  for (const Impl<AttentionProblem>* impl : impls<AttentionProblem>()) {
    EXPECT_EQ(impl->only_forced, impl->name.starts_with("ref/")) << impl->name;
  }
  for (const Impl<KvAppendProblem>* impl : impls<KvAppendProblem>()) {
    EXPECT_EQ(impl->only_forced, impl->name.starts_with("ref/")) << impl->name;
  }
}

TEST(Reference, OutOfF64MakesEveryOutputF64) {
  for (const char* dtype : {"f32", "f16", "bf16", "f64"}) {
    LineRun run(std::string("attention b=1 hq=2 sq=9 sk=12 d=8 sinks alibi bias=f32:h pass=bwd dlse out=f64 ") + dtype);
    ASSERT_EQ(run.error(), "");
    ASSERT_EQ(run.run("ref/attention", {}), "");
    EXPECT_EQ(run.judge(), "");
    const heed_attention_args& a = *run.attention();
    for (const heed_tensor* t : {&a.dq, &a.dk, &a.dv, &a.dbias, &a.dsinks, &a.dalibi_slopes, &a.lse, &a.dlse}) {
      EXPECT_EQ(t->dtype, HEED_DTYPE_F64);
    }
  }
}

// The gradients come from q, k, v and dout alone: out and lse that are off change nothing.
TEST(Reference, BackwardDoesNotDependOnTheResultsHandedIn) {
  LineRun run("attention b=1 hq=2 sq=9 sk=12 d=8 causal pass=bwd");
  ASSERT_EQ(run.run("ref/attention", {}), "");
  const std::vector<unsigned char> gradients = run.outputs();
  heed_attention_args& a = *run.attention();
  std::vector<float> out(9 * 2 * 8, 3.0f), lse(2 * 9, -4.0f);
  a.out.data = out.data();
  a.lse.data = lse.data();
  ASSERT_EQ(run.run("ref/attention", {}), "");
  const heed_attention_args& b = *run.attention();
  const size_t bytes = 9 * 2 * 8 * sizeof(float), skipped = out.size() * 4 + lse.size() * 4;
  EXPECT_EQ(std::memcmp(b.dq.data, gradients.data() + skipped, bytes), 0);
}

// A row that sees nothing but its sink: lse is the sink, so is its derivative.
TEST(Reference, ASinkAloneIsItsRowsLse) {
  LineRun run("attention b=1 hq=1 sq=5 sk=2 d=8 causal sinks pass=bwd dlse f64");
  heed_attention_args& a = *run.attention();
  std::vector<double> zeros(5 * 8, 0.0);
  a.dout.data = zeros.data();
  auto* dlse = static_cast<double*>(a.dlse.data);
  for (int i = 0; i < 5; ++i) dlse[i] = i < 3 ? 2.0 : 0.0;  // rows 0, 1, 2 see no key
  ASSERT_EQ(run.run("ref/attention", {}), "");
  EXPECT_DOUBLE_EQ(*static_cast<double*>(a.dsinks.data), 6.0);
}

}  // namespace
}  // namespace heed
