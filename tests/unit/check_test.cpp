// The judge itself (docs/conventions.md, section 6): what it passes, what it fails, and what it says.
#include "check/tensor_judge.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <optional>

#include "check/bound.h"
#include "check/guarded_tensor.h"
#include "check/inputs.h"
#include "check/random.h"
#include "heed/heed.h"

namespace heed::check {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

heed_check_tensor judged(double got, double want, double plain, double smallest = 0, Dtype dtype = Dtype::kF32) {
  TensorJudge judge("out", dtype, "bhid");
  judge.compare({1, 3, 17, 5}, got, want, plain);
  return judge.finish(smallest);
}

TEST(Bound, IsTwicePlainPlusAnUlpPlusTheSmallTerm) {
  EXPECT_TRUE(judged(1.0 + 3e-3, 1.0, 1.0 + 2e-3).passed);
  EXPECT_FALSE(judged(1.0 + 5e-3, 1.0, 1.0 + 2e-3).passed);
  EXPECT_TRUE(judged(1.0 + 0x1p-23, 1.0, 1.0).passed);
  EXPECT_FALSE(judged(1.0 + 0x1p-22, 1.0, 1.0).passed);
  EXPECT_TRUE(judged(1.0 + 0x1p-22, 1.0, 1.0, 0x1p-22).passed);
  EXPECT_TRUE(judged(1.0 + 0x1p-7, 1.0, 1.0, 0, Dtype::kBf16).passed);
  EXPECT_FALSE(judged(1.0 + 0x1p-6, 1.0, 1.0, 0, Dtype::kBf16).passed);
}

TEST(Bound, FrobeniusNormHasItsOwn) {
  TensorJudge judge("out", Dtype::kF32, "bhid");
  judge.compare({0, 0, 0, 0}, 1.0, 1.0, 1.0 + 1e-3);  // the plain formula errs once, the result everywhere
  for (int64_t n = 1; n < 100; ++n) judge.compare({0, 0, 0, n}, 1.0 + 1e-3, 1.0, 1.0);
  const heed_check_tensor report = judge.finish(0);
  EXPECT_LT(report.max_error, report.max_bound);
  EXPECT_FALSE(report.passed);
  EXPECT_STREQ(report.reason, "out: error norm 0.00995 > bound 0.002 over 100 elements");
}

// Of a factor that every element of a row shares.
TEST(Bound, OneRoundingOfAFactorIsOneRows) {
  const auto judged_rows = [](double error, int64_t rows) {
    TensorJudge judge("dq", Dtype::kF16, "bhid");
    for (int64_t i = 0; i < 100; ++i)
      for (int64_t d = 0; d < 4; ++d) judge.compare({0, 0, i, d}, i < rows ? error : 0.0, 0, 0);
    return judge.finish(0, 0x1p-10, 4);
  };
  EXPECT_TRUE(judged_rows(0x1p-10, 1).passed);
  EXPECT_FALSE(judged_rows(0x1.1p-10, 1).passed);
  EXPECT_FALSE(judged_rows(0x1p-10, 2).passed);
  EXPECT_TRUE(judged_rows(0x1p-15, 100).passed);
}

TEST(Bound, TheReasonNamesTheWorstPlace) {
  const heed_check_tensor report = judged(0.113, 0.118, 0.1175);
  EXPECT_STREQ(report.reason, "out[b=1,h=3,i=17,d=5] = 0.113: want 0.118, error 0.005 > bound 0.001");
  EXPECT_EQ(report.worst[2], 17);
  EXPECT_EQ(report.worst_got, 0.113);
}

TEST(Bound, NanAndInfStandWhereTheReferenceHasThem) {
  EXPECT_TRUE(judged(kNan, kNan, kNan).passed);
  EXPECT_FALSE(judged(kNan, 1, 1).passed);
  EXPECT_FALSE(judged(kInf, 1, 1).passed);
  EXPECT_FALSE(judged(1, kNan, kNan).passed);
  EXPECT_FALSE(judged(kInf, kNan, kNan).passed);
  EXPECT_TRUE(judged(kInf, kInf, kInf).passed);
  EXPECT_TRUE(judged(kNan, kInf, kInf).passed);
  EXPECT_FALSE(judged(-kInf, kInf, kInf).passed);
  EXPECT_FALSE(judged(1, kInf, kInf).passed);
}

TEST(Bound, LseHasAnAbsoluteBoundOfItsOwn) {
  TensorJudge good("lse", Dtype::kF32, "bhi"), bad("lse", Dtype::kF32, "bhi"), empty("lse", Dtype::kF32, "bhi");
  good.compare_within({}, 100.0009, 100, 1e-4 + 1e-5 * 100);
  bad.compare_within({}, 100.0012, 100, 1e-4 + 1e-5 * 100);
  empty.compare_within({}, -1e30, -kInf, 1e-4);
  EXPECT_TRUE(good.finish(0).passed);
  EXPECT_FALSE(bad.finish(0).passed);
  EXPECT_FALSE(empty.finish(0).passed);
}

// A line run on the reference, then one element of its output spoilt.
class Spoilt : public ::testing::Test {
 protected:
  void run(const char* line) {
    ASSERT_EQ(heed_inputs_create(line, &inputs_), HEED_OK) << heed_last_error();
    args_ = heed_inputs_attention(inputs_);
    const heed_plan_options options = {sizeof(heed_plan_options), "ref"};
    ASSERT_EQ(heed_attention(args_, &options), HEED_OK) << heed_last_error();
  }
  heed_check_report check() {
    heed_check_report report = {};
    report.struct_size = sizeof report;
    EXPECT_EQ(heed_attention_check(args_, &report), HEED_OK) << heed_last_error();
    return report;
  }
  ~Spoilt() override { heed_inputs_destroy(inputs_); }
  heed_inputs* inputs_ = nullptr;
  heed_attention_args* args_ = nullptr;
};

// What is kept of the reference is of these inputs and options, and of no others.
class Kept : public Spoilt {
 protected:
  heed_check_report kept() {
    heed_check_report report = {};
    report.struct_size = sizeof report;
    EXPECT_EQ(heed_inputs_check(inputs_, &report), HEED_OK) << heed_last_error();
    return report;
  }
  void expect_alike(const char* what) {
    const heed_check_report mine = kept(), anew = check();
    ASSERT_EQ(mine.num_tensors, anew.num_tensors) << what;
    for (int n = 0; n < mine.num_tensors; ++n)
      EXPECT_EQ(std::memcmp(&mine.tensors[n], &anew.tensors[n], sizeof mine.tensors[n]), 0)
          << what << ": " << mine.tensors[n].reason << " | " << anew.tensors[n].reason;
  }
  // After a change without which the result would be wrong: it is seen before the next run, and accepted after it.
  void expect_seen(const char* what) {
    EXPECT_FALSE(kept().passed) << what;
    const heed_plan_options options = {sizeof(heed_plan_options), "ref"};
    ASSERT_EQ(heed_attention(args_, &options), HEED_OK) << what << ": " << heed_last_error();
    EXPECT_TRUE(kept().passed) << what;
    expect_alike(what);
  }
  static void negate(const heed_tensor& tensor, int n) { static_cast<unsigned char*>(tensor.data)[4 * n + 3] ^= 0x80; }
};

TEST_F(Kept, CountsForTheSameInputsAndNoOthers) {
  run("attention b=2 hq=2 sq=9 sk=12 d=8 lse causal used_k dropout lk=12,10 alibi sinks bias=f32:hij mask=hij");
  EXPECT_TRUE(kept().passed);
  expect_alike("first");
  std::memset(args_->out.data, 0x42, 4);
  EXPECT_FALSE(kept().passed);
  expect_seen("out");
  negate(args_->q, 9);
  expect_seen("q");
  negate(args_->k, 8), negate(args_->k, 9);
  expect_seen("k");
  negate(args_->v, 9);
  expect_seen("v");
  negate(args_->sinks, 0);
  expect_seen("sinks");
  negate(args_->alibi_slopes, 1);
  expect_seen("alibi_slopes");
  negate(args_->bias, 2);
  expect_seen("bias");
  static_cast<unsigned char*>(args_->mask.data)[0] ^= 1;
  expect_seen("mask");
  static_cast<int32_t*>(args_->seqused_k.data)[0] = 11;
  expect_seen("seqused_k");
  args_->softmax_scale = 0.7f, args_->has_softmax_scale = 1;
  expect_seen("softmax_scale");
  args_->dropout_seed += 1;
  expect_seen("dropout_seed");
  uint64_t seed = 77;
  args_->dropout_seed_ptr = &seed;
  expect_seen("dropout_seed_ptr");
  seed = 78;
  expect_seen("what dropout_seed_ptr points to");
}

TEST_F(Kept, BackwardToo) {
  run("attention b=2 hq=2 sq=9 sk=8 d=8 f16 pass=bwd bias=f32:hij sinks alibi");
  EXPECT_TRUE(kept().passed);
  expect_alike("first");
  for (const heed_tensor* tensor : {&args_->q, &args_->dout, &args_->v}) {
    static_cast<unsigned char*>(tensor->data)[31] ^= 0x80;
    EXPECT_FALSE(kept().passed);
    expect_alike("before the run");
    const heed_plan_options options = {sizeof(heed_plan_options), "ref"};
    ASSERT_EQ(heed_attention(args_, &options), HEED_OK) << heed_last_error();
    expect_alike("after it");
  }
}

// That it counts: a wrong number that is kept fails a right result, until an input changes.
TEST(Keeping, IsWhatCounts) {
  Inputs inputs;
  ASSERT_TRUE(make_inputs("attention b=1 hq=1 sq=3 sk=5 d=4", inputs).ok());
  const heed_plan_options options = {sizeof(heed_plan_options), "ref"};
  ASSERT_EQ(heed_attention(&inputs.attention, &options), HEED_OK);
  AttentionArgs args;
  args.q = inputs.attention.q.data, args.k = inputs.attention.k.data, args.v = inputs.attention.v.data;
  args.out = inputs.attention.out.data, args.softmax_scale = 0.5f;
  const auto& problem = std::get<AttentionProblem>(inputs.problem);
  std::optional<Expected> expected;
  EXPECT_TRUE(judge_attention(problem, args, &expected).passed());
  ASSERT_TRUE(expected->complete);
  expected->want[1] += 1, expected->plain[1] += 1;
  EXPECT_FALSE(judge_attention(problem, args, &expected).passed());
  args.softcap = 0.25f;  // another number: not looked at by this problem, but another run
  EXPECT_TRUE(judge_attention(problem, args, &expected).passed());
}

TEST_F(Kept, IsForAttention) {
  heed_check_report report = {};
  report.struct_size = sizeof report;
  EXPECT_EQ(heed_inputs_check(nullptr, &report), HEED_INVALID_ARGUMENT);
  ASSERT_EQ(heed_inputs_create("kv_append b=2 hkv=1 sn=1 sk=64 d=64 f16", &inputs_), HEED_OK);
  EXPECT_EQ(heed_inputs_check(inputs_, &report), HEED_INVALID_ARGUMENT);
  EXPECT_STREQ(heed_last_error(), "inputs: must be of an attention line; kv_append's are for heed_kv_append_check");
}

TEST_F(Spoilt, EveryElementHasToBeWritten) {
  run("attention b=2 hq=2 sq=9 sk=8 d=8 lse");
  EXPECT_TRUE(check().passed);
  std::memset(static_cast<char*>(args_->out.data) + 100 * 4, 0xff, 4);
  const heed_check_report report = check();
  EXPECT_FALSE(report.passed);
  EXPECT_STREQ(report.tensors[0].reason, "out[b=0,h=0,i=6,d=4]: never written");
}

TEST_F(Spoilt, PaddingHasToBeZero) {
  run("attention b=2 hq=1 sq=4 sk=8 d=8 used_q lq=4,2 lse");
  static_cast<float*>(args_->out.data)[(4 + 3) * 8] = 1e-9f;
  EXPECT_STREQ(check().tensors[0].reason, "out[b=1,h=0,i=3,d=0] = 1e-09: want 0, as no sequence has this row");
}

TEST_F(Spoilt, StatusIsJudged) {
  run("attention b=2 hq=1 sq=4 sk=8 d=8");
  static_cast<int32_t*>(args_->status.data)[1] = 2;
  EXPECT_FALSE(check().passed);
}

TEST_F(Spoilt, LargeProblemsAreSampledButWrittenInFull) {
  run("attention b=1 hq=2 sq=3000 sk=3000 d=32");
  const heed_check_report report = check();
  EXPECT_TRUE(report.passed);
  EXPECT_LT(report.tensors[0].num_checked, 2 * 3000 * 32);
  EXPECT_GE(report.tensors[0].num_checked, 256 * 32);
  std::memset(static_cast<char*>(args_->out.data) + (2 * 1777 * 32 + 5) * 4, 0xff, 4);
  EXPECT_FALSE(check().passed);
}

TEST_F(Spoilt, GradientsAreJudged) {
  run("attention b=1 hq=2 sq=9 sk=8 d=8 sinks alibi bias=f32:hij pass=bwd");
  heed_check_report report = check();
  EXPECT_TRUE(report.passed);
  EXPECT_EQ(report.num_tensors, 7);  // dq dk dv dbias dsinks dalibi_slopes status
  static_cast<float*>(args_->dsinks.data)[1] += 1e-3f;
  EXPECT_FALSE(check().passed);
}

TEST(Inputs, GuardsSeeAWriteBesideATensorAndInAGap) {
  for (const int64_t offset : {-1, 40, 9, 12}) {  // before; past; in a gap; the next row's first element
    GuardedTensor tensor("out", Dtype::kF32, {1, 1, 4, 8}, {0, 0, 10, 1}, 4, Role::kOutput);
    EXPECT_TRUE(tensor.check().ok());
    [[maybe_unused]] const bool element = offset == 12;
#if !defined(__SANITIZE_ADDRESS__)
    static_cast<float*>(tensor.data())[offset] = 1;
    EXPECT_EQ(tensor.check().ok(), element) << offset;
#endif
  }
}

TEST(Inputs, AnInputThatChangesIsSeen) {
  heed_inputs* inputs = nullptr;
  ASSERT_EQ(heed_inputs_create("attention b=1 sq=4 d=8", &inputs), HEED_OK);
  EXPECT_EQ(heed_inputs_check_guards(inputs), HEED_OK);
  static_cast<float*>(heed_inputs_attention(inputs)->k.data)[3] += 1;
  EXPECT_EQ(heed_inputs_check_guards(inputs), HEED_INVALID_ARGUMENT);
  EXPECT_STREQ(heed_last_error(), "k: an input, or memory beside it, changed");
  heed_inputs_destroy(inputs);
}

TEST(Inputs, BasesAreAlignedAsTheLineSaysAndNoMore) {
  for (const int64_t align : {2, 4, 16, 64, 128}) {
    const GuardedTensor tensor("q", Dtype::kBf16, {1, 1, 4, 64}, {0, 0, 64, 1}, align, Role::kInput);
    const auto address = reinterpret_cast<uintptr_t>(tensor.data());
    EXPECT_EQ(address % align, 0u);
    if (align < 128) {
      EXPECT_NE(address % (2 * align), 0u);
    }
  }
}

TEST(Inputs, TheSameLineMakesTheSameBits) {
  heed_inputs* inputs[2] = {};
  for (heed_inputs*& each : inputs) {
    ASSERT_EQ(heed_inputs_create("attention b=2 hq=2 sq=9 d=8 seed=5", &each), HEED_OK);
  }
  const heed_tensor &a = heed_inputs_attention(inputs[0])->q, &b = heed_inputs_attention(inputs[1])->q;
  EXPECT_EQ(std::memcmp(a.data, b.data, 2 * 2 * 9 * 8 * 4), 0);
  for (heed_inputs* each : inputs) heed_inputs_destroy(each);
}

TEST(Inputs, NormalNumbersAreNormal) {
  Random random(3, "q");
  double sum = 0, squares = 0;
  for (int64_t n = 0; n < 40000; ++n) {
    const double x = random.normal(n);
    sum += x;
    squares += x * x;
  }
  EXPECT_NEAR(sum / 40000, 0, 0.02);
  EXPECT_NEAR(squares / 40000, 1, 0.03);
  EXPECT_EQ(Random(3, "q").normal(777), random.normal(777));  // whatever was drawn before
  EXPECT_NE(Random(4, "q").normal(777), random.normal(777));
  EXPECT_NE(Random(3, "k").normal(777), random.normal(777));
}

TEST(Inputs, LinesThatCannotBeMadeSaySo) {
  heed_inputs* inputs = nullptr;
  EXPECT_EQ(heed_inputs_create("kv_append b=3 hkv=1 sn=1 sk=8 d=8 cache_batch=2", &inputs), HEED_INVALID_ARGUMENT);
  EXPECT_STREQ(heed_last_error(),
               "problem line: cache_batch=2 must be at least b=3: every sequence appends to a cache "
               "row of its own");
  EXPECT_EQ(heed_inputs_create("attention sq=4 d=8 frobnicate", &inputs), HEED_INVALID_ARGUMENT);
  EXPECT_EQ(heed_inputs_create(nullptr, &inputs), HEED_INVALID_ARGUMENT);
}

}  // namespace
}  // namespace heed::check
