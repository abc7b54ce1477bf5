// What a valid attention problem is: every refusal with its sentence; slots, strides, alignment, flops and bytes.
#include "ops/attention.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "base/threads.h"
#include "ops/problem_line.h"
#include "unit/random_problems.h"

namespace heed {
namespace {

AttentionProblem attention(std::string_view line) {
  const Result<ProblemLine> parsed = parse_problem_line(line);
  EXPECT_TRUE(parsed.ok()) << line << ": " << parsed.status().message();
  return parsed.ok() ? std::get<AttentionProblem>(parsed.value().problem) : AttentionProblem();
}

// With strides and alignment of what the problem has become.
void refill(AttentionProblem& p) {
  for (int i = 0; i < kNumSlots; ++i) {
    const Slot slot = static_cast<Slot>(i);
    p.stride[i] = contiguous_strides(p, slot);
    p.align[i] = natural_align(p, slot, nullptr);
  }
}

template <class Change>
std::string refusal(std::string_view line, Change change, bool refilled = true) {
  AttentionProblem p = attention(line);
  change(p);
  if (refilled) refill(p);
  const Status status = validate(p);
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << line;
  return status.message();
}

#define EXPECT_REFUSED(line, sentence, ...) EXPECT_EQ(refusal(line, [](AttentionProblem& p) { __VA_ARGS__; }), sentence)

constexpr const char* kForward = "attention b=2 hq=4 hkv=2 sq=5 sk=7 d=16";
constexpr const char* kBackward = "attention b=2 hq=4 hkv=2 sq=5 sk=7 d=16 pass=bwd";

TEST(AttentionProblem, RefusesEnumsOutsideTheirRange) {
  EXPECT_REFUSED(kForward, "pass = 2 must be 0 (forward) or 1 (backward)", p.pass = static_cast<Pass>(2));
  EXPECT_REFUSED(kForward, "layout_q = 3 must be 0 (bshd), 1 (bhsd) or 2 (thd)", p.layout_q = static_cast<Layout>(3));
  EXPECT_REFUSED(kForward, "layout_kv = -1 must be 0 (bshd), 1 (bhsd) or 2 (thd)",
                 p.layout_kv = static_cast<Layout>(-1));
  EXPECT_REFUSED(kForward, "device = 2 must be 0 (cpu) or 1 (cuda)", p.device = static_cast<Device>(2));
  EXPECT_REFUSED(kForward, "device_index = 1 must be 0: there is one CPU", p.device_index = 1);
  EXPECT_REFUSED(kForward, "offset_kind = 5 must be 0 (bottom right), 1 (top left) or 2 (given)",
                 p.offset_kind = static_cast<OffsetKind>(5));
}

TEST(AttentionProblem, RefusesDtypes) {
  EXPECT_REFUSED(kForward, "dtype = i32 must be f32, f16, bf16 or f64", p.dtype = Dtype::kI32);
  EXPECT_REFUSED(kForward, "dtype = none must be f32, f16, bf16 or f64", p.dtype = Dtype::kNone);
  EXPECT_REFUSED(kForward, "out_dtype = f16 must be f32 (as q, k, v), f32 or f64", p.out_dtype = Dtype::kF16);
  EXPECT_REFUSED(kForward, "bias_dtype = bool must be f32 or f32 (as q, k, v)", p.bias_dtype = Dtype::kBool);
}

TEST(AttentionProblem, RefusesSizes) {
  EXPECT_REFUSED(kForward, "batch = -1 must be from 0 to 2^60", p.batch = -1);
  EXPECT_REFUSED(kForward, "nheads_q = 0 must be from 1 to 2^60", p.nheads_q = 0);
  EXPECT_REFUSED(kForward, "nheads_kv = 0 must be from 1 to 2^60", p.nheads_kv = 0);
  EXPECT_REFUSED(kForward, "nheads_q = 4 must be a multiple of nheads_kv = 3", p.nheads_kv = 3);
  EXPECT_REFUSED(kForward, "seqlen_q = -1 must be from 0 to 2^60", p.seqlen_q = -1);
  EXPECT_REFUSED(kForward, "seqlen_k = -7 must be from 0 to 2^60", p.seqlen_k = -7);
  EXPECT_REFUSED(kForward, "head_dim = 0 must be from 1 to 512", p.head_dim = 0);
  EXPECT_REFUSED(kForward, "head_dim = 513 must be from 1 to 512", p.head_dim = 513);
  EXPECT_REFUSED(kForward, "head_dim_v = -1 must be from 1 to 512", p.head_dim_v = -1);
  EXPECT_REFUSED(kForward, "total_q = 3 must be from 0 to 0", p.total_q = 3);
  EXPECT_REFUSED(kForward, "total_k = 3 must be from 0 to 0", p.total_k = 3);
  EXPECT_REFUSED(kForward, "page_size = -1 must be from 0 to 2^60", p.page_size = -1);
  EXPECT_REFUSED(kForward, "num_pages = 4 must be from 0 to 0", p.num_pages = 4);
  EXPECT_REFUSED(kForward, "cache_batch = -4 must be from 0 to 2^60", p.cache_batch = -4);
  EXPECT_REFUSED(kForward, "threads = -1 must be from 0 to 2147483647", p.threads = -1);
  EXPECT_REFUSED(kForward, "splits = -1 must be from 0 to 2^60", p.splits = -1);
  EXPECT_REFUSED("attention b=2 d=8 layout_q=thd layout_kv=thd lq=1,2 lk=1,2", "total_q = -1 must be from 0 to 2^60",
                 p.total_q = -1);
}

TEST(AttentionProblem, RefusesProductsPast64Bits) {
  const std::string message = refusal(kForward, [](AttentionProblem& p) {
    p.batch = int64_t{1} << 31;
    p.seqlen_q = int64_t{1} << 24;
  });
  EXPECT_EQ(message.find("sizes of q = (2147483648, 4, 16777216, 16) with strides ("), 0u) << message;
  EXPECT_NE(message.find("must reach less than 2^63 bytes"), std::string::npos) << message;
  // More than 2^31 elements, more than 65,535 sequences: ordinary.
  AttentionProblem p = attention(kForward);
  p.batch = 70000;
  p.seqlen_q = p.seqlen_k = 1 << 20;
  refill(p);
  EXPECT_TRUE(validate(p).ok()) << validate(p).message();
}

TEST(AttentionProblem, RefusesScoreTerms) {
  EXPECT_REFUSED(kForward, "window_left = -2 must be from -1 to 2^60", p.window_left = -2);
  EXPECT_REFUSED(kForward, "window_right = -2 must be from -1 to 2^60", p.window_right = -2);
  EXPECT_REFUSED(kForward, "chunk = -1 must be from 0 to 2^60", p.chunk = -1);
  EXPECT_REFUSED(kForward, "q_offset = 3 must be from 0 to 0", p.q_offset = 3);
  EXPECT_EQ(refusal(kForward,
                    [](AttentionProblem& p) {
                      p.offset_kind = OffsetKind::kGiven;
                      p.q_offset = INT64_MIN;
                    }),
            "q_offset = -9223372036854775808 must be from -1152921504606846976 to 2^60");
  EXPECT_REFUSED(kForward, "bias_dims = 3 must be from 0 to 0", p.bias_dims = 3);
  EXPECT_REFUSED(kForward, "mask_dims = 1 must be from 0 to 0", p.mask_dims = 1);
  EXPECT_REFUSED("attention sq=5 d=16 mask=b", "mask_dims = 16 must be from 0 to 15", p.mask_dims = 16);
  EXPECT_REFUSED(kForward, "alibi_per_batch = 1 must be 0 without alibi", p.alibi_per_batch = true);
}

TEST(AttentionProblem, RefusesStorage) {
  EXPECT_REFUSED("attention sq=1 sk=8 d=16 page=4",
                 "layout_kv = thd must be bshd or bhsd (the layout of one page) with page_size > 0",
                 p.layout_kv = Layout::kThd);
  EXPECT_REFUSED("attention sq=1 sk=8 d=16 page=4",
                 "seqlen_k = 9 must be a multiple of page_size = 4: a capacity is whole pages (used_k states shorter "
                 "sequences)",
                 p.seqlen_k = 9);
  EXPECT_REFUSED("attention b=2 d=8 layout_q=thd layout_kv=thd lq=1,2 lk=1,2",
                 "cache_batch = 2 must be 0 with layout_kv = thd: packed keys have no cache rows", p.cache_batch = 2);
  const char* packed = "attention b=2 sq=3 sk=3 d=8 layout_q=thd layout_kv=thd bias=f32:ij lq=1,2 lk=1,2";
  EXPECT_REFUSED(packed, "seqlen_q = 0 must state the rows of the bias or mask, which packed queries do not tell",
                 p.seqlen_q = 0);
  EXPECT_REFUSED(packed, "seqlen_k = 0 must state the columns of the bias or mask, which packed keys do not tell",
                 p.seqlen_k = 0);
}

TEST(AttentionProblem, RefusesPasses) {
  EXPECT_REFUSED(kForward,
                 "dlse and the gradients dq, dk, dv, dbias, dsinks, dalibi_slopes must be absent in the forward pass",
                 p.dq = true);
  EXPECT_REFUSED(kForward,
                 "dlse and the gradients dq, dk, dv, dbias, dsinks, dalibi_slopes must be absent in the forward pass",
                 p.dlse = true);
  EXPECT_REFUSED("attention b=2 hq=2 sq=5 sk=8 d=16 pass=bwd",
                 "page_size = 4 must be 0 in the backward pass: paged caches are for the forward pass only",
                 p.page_size = 4);
  EXPECT_REFUSED(kBackward,
                 "cache_batch = 3 must be 0 in the backward pass: cache_batch_idx is for the forward pass only",
                 p.cache_batch = 3);
  EXPECT_REFUSED(kBackward, "splits = 2 must be 0 in the backward pass: splitting keys is for the forward pass only",
                 p.splits = 2);
  EXPECT_REFUSED(kBackward, "lse must be present in the backward pass, which reads it", p.lse = false);
  EXPECT_REFUSED(kBackward, "one of dq, dk, dv, dbias, dsinks, dalibi_slopes must be present in the backward pass",
                 p.dq = p.dk = p.dv = false);
  EXPECT_REFUSED(kBackward, "dbias must be absent where bias is", p.dbias = true);
  EXPECT_REFUSED(kBackward, "dsinks must be absent where sinks are", p.dsinks = true);
  EXPECT_REFUSED(kBackward, "dalibi_slopes must be absent where alibi_slopes are", p.dalibi = true);
}

#define EXPECT_LAYOUT_REFUSED(line, sentence, ...)                      \
  EXPECT_EQ(refusal(                                                    \
                line, [](AttentionProblem& p) { __VA_ARGS__; }, false), \
            sentence)

TEST(AttentionProblem, RefusesStridesAndAlignment) {
  EXPECT_LAYOUT_REFUSED(kForward, "strides of q = (-320, 16, 64, 1) must not be negative",
                        p.strides(Slot::kQ)[0] = -320);
  EXPECT_LAYOUT_REFUSED(kForward, "strides of k = (224, 16, 32, 2) must be 1 in the last dimension",
                        p.strides(Slot::kK)[3] = 2);
  EXPECT_LAYOUT_REFUSED(kForward,
                        "strides of out = (0, 16, 64, 1) must give every element of the output (2, 4, 5, 16) an "
                        "address of its own",
                        p.strides(Slot::kOut)[0] = 0);
  EXPECT_LAYOUT_REFUSED(kForward,
                        "strides of out = (320, 8, 64, 1) must give every element of the output (2, 4, 5, 16) an "
                        "address of its own",
                        p.strides(Slot::kOut)[1] = 8);
  EXPECT_LAYOUT_REFUSED(kBackward,
                        "strides of dk = (224, 16, 16, 1) must give every element of the output (2, 2, 7, 16) an "
                        "address of its own",
                        p.strides(Slot::kDk)[2] = 16);
  EXPECT_LAYOUT_REFUSED("attention b=2 sq=5 d=16 lse",
                        "strides of lse = (4, 5, 1, 0) must give every element of the output (2, 1, 5, 1) an address "
                        "of its own",
                        p.strides(Slot::kLse)[0] = 4);
  EXPECT_LAYOUT_REFUSED("attention b=2 sq=5 d=16 bias=f32:bj",
                        "strides of bias = (5, 0, 1, 1) must be 0 in a dimension that it does not have or broadcasts",
                        p.strides(Slot::kBias)[2] = 1);
  EXPECT_LAYOUT_REFUSED("attention b=2 sq=5 d=16 mask=bj",
                        "strides of mask = (5, 0, 0, 3) must be 1 in the last dimension",
                        p.strides(Slot::kMask)[3] = 3);
  EXPECT_LAYOUT_REFUSED("attention b=2 sq=5 d=16 bias=f32:bj",
                        "strides of bias = (0, 0, 0, 1) must not be 0 in dimension b, which is stated not to be "
                        "broadcast",
                        p.strides(Slot::kBias)[0] = 0);
  EXPECT_LAYOUT_REFUSED("attention b=2 d=8 layout_q=thd layout_kv=thd lq=1,2 lk=1,2",
                        "strides of q = (24, 8, 8, 1) must be 0 in a dimension that it does not have or broadcasts",
                        p.strides(Slot::kQ)[0] = 24);
  EXPECT_LAYOUT_REFUSED(kForward, "align of q = 3 must be a power of two from 4 (one f32 element) to 128",
                        p.align[static_cast<int>(Slot::kQ)] = 3);
  EXPECT_LAYOUT_REFUSED(kForward, "align of q = 2 must be a power of two from 4 (one f32 element) to 128",
                        p.align[static_cast<int>(Slot::kQ)] = 2);
  EXPECT_LAYOUT_REFUSED(kForward,
                        "align of v = 128 must divide its byte strides: at most 64 with strides (224, 16, 32, 1)",
                        p.align[static_cast<int>(Slot::kV)] = 128);
  EXPECT_LAYOUT_REFUSED(kForward, "strides and align of bias must be 0: the problem does not have it",
                        p.strides(Slot::kBias)[0] = 1);
  EXPECT_LAYOUT_REFUSED(kForward, "strides and align of lse must be 0: the problem does not have it",
                        p.align[static_cast<int>(Slot::kLse)] = 4);
}

TEST(AttentionProblem, AcceptsBroadcastInputsAndPaddedOutputs) {
  for (const char* line : {"attention b=2 hq=3 sq=20 d=16 strides.q=0,0,0 strides.k=0,0,16 strides.v=0,16,0",
                           "attention b=2 hq=3 sq=20 d=16 strides.out=5000,17,64 align.out=4",
                           "attention b=1 hq=1 sq=20 d=16 strides.out=0,0,16", "attention b=0 hq=2 sq=8 d=16",
                           "attention b=2 hq=2 sq=0 d=16 lse", "attention sq=4 d=16 f64 out=f64 pass=bwd"}) {
    EXPECT_TRUE(validate(attention(line)).ok()) << line;
  }
}

TEST(AttentionProblem, SlotsAndShapes) {
  const AttentionProblem p =
      attention("attention b=2 hq=4 hkv=2 sq=5 sk=12 d=16 dv=8 bf16 page=4 alibi bias=f32:hj lse");
  using Shape = std::array<int64_t, 4>;
  EXPECT_EQ(slot_shape(p, Slot::kQ), (Shape{2, 4, 5, 16}));
  EXPECT_EQ(slot_shape(p, Slot::kV), (Shape{6, 2, 4, 8}));
  EXPECT_EQ(slot_shape(p, Slot::kOut), (Shape{2, 4, 5, 8}));
  EXPECT_EQ(slot_shape(p, Slot::kLse), (Shape{2, 4, 5, 1}));
  EXPECT_EQ(slot_shape(p, Slot::kBias), (Shape{1, 4, 1, 12}));
  EXPECT_EQ(slot_shape(p, Slot::kPageTable), (Shape{2, 3, 1, 1}));
  EXPECT_EQ(slot_shape(p, Slot::kAlibi), (Shape{1, 4, 1, 1}));
  EXPECT_EQ(p.strides(Slot::kK), (Shape{128, 16, 32, 1}));
  EXPECT_EQ(p.strides(Slot::kLse), (Shape{20, 5, 1, 0}));
  EXPECT_EQ(p.strides(Slot::kBias), (Shape{0, 12, 0, 1}));
  EXPECT_EQ(p.strides(Slot::kPageTable), (Shape{3, 1, 0, 0}));
  EXPECT_EQ(p.strides(Slot::kAlibi), (Shape{0, 1, 0, 0}));
  EXPECT_EQ(slot_dtype(p, Slot::kLse), Dtype::kF32);
  EXPECT_EQ(slot_dtype(p, Slot::kPageTable), Dtype::kI32);
  EXPECT_EQ(slot_dtype(p, Slot::kMask), Dtype::kNone);
  EXPECT_FALSE(has_slot(p, Slot::kDq));
  const AttentionProblem packed = attention("attention b=2 hq=4 d=16 layout_q=thd layout_kv=thd lq=3,4 lk=5,6 lse");
  EXPECT_EQ(slot_shape(packed, Slot::kQ), (Shape{1, 4, 7, 16}));
  EXPECT_EQ(packed.strides(Slot::kQ), (Shape{0, 16, 64, 1}));
  EXPECT_EQ(packed.strides(Slot::kLse), (Shape{0, 7, 1, 0}));
  const AttentionProblem bhsd = attention("attention b=2 hq=4 hkv=2 sq=5 d=16 layout_q=bhsd pass=bwd");
  EXPECT_EQ(bhsd.strides(Slot::kDq), (Shape{320, 80, 16, 1}));
  EXPECT_EQ(bhsd.strides(Slot::kDk), (Shape{160, 16, 32, 1}));
  const AttentionProblem f64 = attention("attention sq=5 d=16 bf16 out=f64 pass=bwd");
  EXPECT_EQ(slot_dtype(f64, Slot::kDk), Dtype::kF64);
  EXPECT_EQ(slot_dtype(f64, Slot::kLse), Dtype::kF64);
  EXPECT_EQ(slot_dtype(f64, Slot::kQ), Dtype::kBf16);
}

TEST(AttentionProblem, NaturalAlignment) {
  const AttentionProblem p = attention("attention b=2 hq=4 sq=5 d=24 bf16 dv=3");
  const auto address = [](uintptr_t value) { return reinterpret_cast<const void*>(value); };
  EXPECT_EQ(natural_align(p, Slot::kQ, nullptr), 16);  // rows of 48 bytes
  EXPECT_EQ(natural_align(p, Slot::kQ, address(4096)), 16);
  EXPECT_EQ(natural_align(p, Slot::kQ, address(4098)), 2);
  EXPECT_EQ(natural_align(p, Slot::kV, nullptr), 2);
  EXPECT_EQ(natural_align(p, Slot::kBias, nullptr), 0);
  EXPECT_EQ(natural_align(attention("attention sq=1 d=3"), Slot::kQ, nullptr), 128);  // a single row
  EXPECT_EQ(natural_align(attention("attention sq=5 d=128"), Slot::kQ, nullptr), 128);
}

// ---- the work -----------------------------------------------------------------------------------

int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0) ? 1 : 0); }

int64_t counted_pairs(const AttentionProblem& p) {
  int64_t pairs = 0;
  for (int64_t i = 0; i < p.seqlen_q; ++i) {
    const int64_t offset = p.offset_kind == OffsetKind::kTopLeft ? 0
                           : p.offset_kind == OffsetKind::kGiven ? p.q_offset
                                                                 : p.seqlen_k - p.seqlen_q;
    const int64_t position = i + offset;
    for (int64_t j = 0; j < p.seqlen_k; ++j) {
      if (p.window_left >= 0 && j < position - p.window_left) continue;
      if (p.window_right >= 0 && j > position + p.window_right) continue;
      if (p.chunk > 0 && floor_div(position, p.chunk) != floor_div(j, p.chunk)) continue;
      ++pairs;
    }
  }
  return pairs;
}

TEST(AttentionProblem, FlopsCountVisiblePairs) {
  testing::Random random(7);
  for (int round = 0; round < 20000; ++round) {
    AttentionProblem p;
    p.seqlen_q = random.in(0, 20);
    p.seqlen_k = random.in(0, 20);
    p.head_dim = 8;
    p.head_dim_v = 16;
    p.nheads_q = 3;
    p.batch = 2;
    if (random.chance(50)) p.window_left = random.in(-1, 12);
    if (random.chance(50)) p.window_right = random.in(-1, 12);
    if (random.chance(50)) p.chunk = random.in(1, 9);
    p.offset_kind = random.pick({OffsetKind::kBottomRight, OffsetKind::kTopLeft, OffsetKind::kGiven});
    if (p.offset_kind == OffsetKind::kGiven) p.q_offset = random.in(-30, 30);
    refill(p);
    ASSERT_EQ(flops(p), static_cast<double>(counted_pairs(p) * 2 * 3 * 2 * 24)) << to_string(p);
  }
  EXPECT_EQ(flops(attention("attention b=2 hq=3 sq=64 d=32 pass=bwd")), 2.5 * 4 * 2 * 3 * 64 * 64 * 32);
  EXPECT_EQ(flops(attention("attention sq=10 d=8 window=2,2 offset=1152921504606846976")), 0);
}

TEST(AttentionProblem, BytesCountEveryTensorOnce) {
  EXPECT_EQ(bytes(attention("attention b=2 hq=4 hkv=2 sq=5 sk=7 d=16")), 4.0 * 2 * (2 * 4 * 5 * 16 + 2 * 2 * 7 * 16));
  EXPECT_EQ(bytes(attention("attention sq=1 sk=1000 d=8 window=9,0")), 4.0 * 8 * (2 + 2 * 10));
  EXPECT_EQ(bytes(attention("attention sq=1 sk=1000 d=8 causal chunk=400 offset=top")), 4.0 * 8 * (2 + 2 * 1));
  EXPECT_EQ(bytes(attention("attention hq=2 sq=1 sk=8 d=8 page=4 used_k sinks num_pages=100")),
            4.0 * (2 * 8 * 2 + 2 * 2 * 8 * 8 + 2 + 1 + 2));
}

// ---- one run's numbers and pointers -------------------------------------------------------------

class AttentionArguments : public ::testing::Test {
 protected:
  void pose(std::string_view line) {
    problem = attention(line);
    args = AttentionArgs();
    args.executor = &serial_executor();
    args.softcap = problem.softcap ? 1.0f : 0.0f;
    const auto give = [&](auto& pointer, bool present) {
      pointer = present ? reinterpret_cast<decltype(+pointer)>(memory) : nullptr;
    };
    const auto slot = [&](auto& pointer, Slot which) { give(pointer, has_slot(problem, which)); };
    slot(args.q, Slot::kQ);
    slot(args.k, Slot::kK);
    slot(args.v, Slot::kV);
    slot(args.out, Slot::kOut);
    slot(args.lse, Slot::kLse);
    slot(args.bias, Slot::kBias);
    slot(args.mask, Slot::kMask);
    slot(args.alibi_slopes, Slot::kAlibi);
    slot(args.page_table, Slot::kPageTable);
    slot(args.dout, Slot::kDout);
    slot(args.dlse, Slot::kDlse);
    slot(args.dq, Slot::kDq);
    slot(args.dk, Slot::kDk);
    slot(args.dv, Slot::kDv);
    slot(args.dbias, Slot::kDbias);
    give(args.sinks, problem.sinks);
    give(args.dsinks, problem.dsinks);
    give(args.dalibi_slopes, problem.dalibi);
    give(args.cu_seqlens_q, problem.packed_q());
    give(args.cu_seqlens_k, problem.packed_k());
    give(args.seqused_q, problem.used_q);
    give(args.seqused_k, problem.used_k);
    give(args.leftpad_k, problem.leftpad);
    give(args.cache_batch_idx, problem.cache_batch > 0);
  }
  std::string refusal(size_t workspace = 0) {
    const Status status = validate(problem, args, workspace);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    return status.message();
  }

  alignas(128) static char memory[4096];
  AttentionProblem problem;
  AttentionArgs args;
};
char AttentionArguments::memory[4096];

TEST_F(AttentionArguments, Numbers) {
  pose(kForward);
  EXPECT_TRUE(validate(problem, args, 0).ok());
  args.softmax_scale = std::numeric_limits<float>::infinity();
  EXPECT_EQ(refusal(), "softmax_scale = inf must be finite");
  args.softmax_scale = std::nanf("");
  EXPECT_EQ(refusal(), "softmax_scale = nan must be finite");
  args.softmax_scale = -3.0f;
  EXPECT_TRUE(validate(problem, args, 0).ok());
  args.softcap = 2.0f;
  EXPECT_EQ(refusal(), "softcap = 2 must be 0, as the planned problem has no softcap");
  args.softcap = 0.0f;
  args.dropout_p = 1.5f;
  EXPECT_EQ(refusal(), "dropout_p = 1.5 must be from 0 to 1");
  args.dropout_p = std::nanf("");
  EXPECT_EQ(refusal(), "dropout_p = nan must be from 0 to 1");
  args.dropout_p = 0.5f;
  EXPECT_EQ(refusal(), "dropout_p = 0.5 must be 0, as the planned problem has no dropout");
  pose("attention sq=5 d=16 softcap dropout");
  EXPECT_TRUE(validate(problem, args, 0).ok());  // p = 0 with dropout is legal
  args.dropout_p = 1.0f;
  EXPECT_TRUE(validate(problem, args, 0).ok());
  args.softcap = 0.0f;
  EXPECT_EQ(refusal(), "softcap = 0 must be finite and greater than 0, as the planned problem has softcap");
  args.softcap = std::numeric_limits<float>::infinity();
  EXPECT_EQ(refusal(), "softcap = inf must be finite and greater than 0, as the planned problem has softcap");
}

TEST_F(AttentionArguments, EveryPointerIsThereIffTheProblemHasIt) {
  const char* full_forward =
      "attention b=2 hq=2 sk=8 d=16 layout_q=thd lq=1,2 page=4 cache_batch=3 used_q used_k leftpad alibi sinks lse";
  const char* full_backward =
      "attention b=2 hq=2 sq=8 sk=8 d=16 layout_q=thd layout_kv=thd pass=bwd bias=f32:ij mask=j alibi sinks dlse";
  const auto sweep = [&](const char* line, auto member, const char* name) {
    pose(line);
    ASSERT_TRUE(validate(problem, args, 0).ok()) << validate(problem, args, 0).message();
    args.*member = nullptr;
    EXPECT_EQ(refusal(), std::string(name) + " = NULL must be an address: the problem has this tensor");
    pose(line);
    const char* address = reinterpret_cast<const char*>(args.*member);
    args.*member = reinterpret_cast<std::decay_t<decltype(args.*member)>>(const_cast<char*>(address) + 1);
    const std::string misaligned = refusal();
    EXPECT_EQ(misaligned.find(std::string(name) + " = 0x"), 0u) << misaligned;
    EXPECT_NE(misaligned.find("must be a multiple of"), std::string::npos) << misaligned;
  };
  const auto absent = [&](auto member, const char* name) {
    pose(kForward);
    args.*member = reinterpret_cast<std::decay_t<decltype(args.*member)>>(memory);
    EXPECT_EQ(refusal(), std::string(name) + " must be NULL: the problem that was planned does not have this tensor");
  };
#define SWEEP(line, member) sweep(line, &AttentionArgs::member, #member)
#define ABSENT(member) absent(&AttentionArgs::member, #member)
  SWEEP(full_forward, q), SWEEP(full_forward, k), SWEEP(full_forward, v), SWEEP(full_forward, out);
  SWEEP(full_forward, lse), SWEEP(full_forward, alibi_slopes), SWEEP(full_forward, page_table);
  SWEEP(full_forward, sinks), SWEEP(full_forward, cu_seqlens_q), SWEEP(full_forward, seqused_q);
  SWEEP(full_forward, seqused_k), SWEEP(full_forward, leftpad_k), SWEEP(full_forward, cache_batch_idx);
  SWEEP(full_backward, bias), SWEEP(full_backward, cu_seqlens_k), SWEEP(full_backward, dout);
  SWEEP(full_backward, dlse), SWEEP(full_backward, dq), SWEEP(full_backward, dk), SWEEP(full_backward, dv);
  SWEEP(full_backward, dbias), SWEEP(full_backward, dsinks), SWEEP(full_backward, dalibi_slopes);
  ABSENT(lse), ABSENT(bias), ABSENT(mask), ABSENT(alibi_slopes), ABSENT(page_table), ABSENT(sinks);
  ABSENT(cu_seqlens_q), ABSENT(cu_seqlens_k), ABSENT(seqused_q), ABSENT(seqused_k), ABSENT(leftpad_k);
  ABSENT(cache_batch_idx), ABSENT(dout), ABSENT(dlse), ABSENT(dq), ABSENT(dk), ABSENT(dv), ABSENT(dbias);
  ABSENT(dsinks), ABSENT(dalibi_slopes);
#undef SWEEP
#undef ABSENT
  pose("attention sq=5 d=16 mask=j");
  args.mask = nullptr;
  EXPECT_EQ(refusal(), "mask = NULL must be an address: the problem has this tensor");
  pose(kForward);
  args.executor = nullptr;
  EXPECT_EQ(refusal(), "executor = NULL must be an address");
  pose(kForward);
  args.status = reinterpret_cast<int32_t*>(memory + 2);
  EXPECT_NE(refusal().find("status = 0x"), std::string::npos);
}

TEST_F(AttentionArguments, EmptyTensorsMayBeNull) {
  pose("attention b=2 hq=2 sq=0 sk=0 d=16 lse");
  args.q = args.k = args.v = nullptr;
  args.out = args.lse = nullptr;
  EXPECT_TRUE(validate(problem, args, 0).ok());
  pose("attention b=0 hq=2 sq=4 d=16 used_k");
  args.seqused_k = nullptr;
  EXPECT_TRUE(validate(problem, args, 0).ok());
}

TEST_F(AttentionArguments, Workspace) {
  pose(kForward);
  EXPECT_EQ(refusal(100), "workspace = NULL must be an address: the plan needs 100 bytes");
  args.workspace = memory;
  args.workspace_bytes = 99;
  EXPECT_EQ(refusal(100), "workspace_bytes = 99 must be at least 100, which the plan needs");
  args.workspace_bytes = 100;
  EXPECT_TRUE(validate(problem, args, 100).ok());
  args.workspace = memory + 32;
  EXPECT_NE(refusal(100).find("must be a multiple of 64 bytes"), std::string::npos);
}

}  // namespace
}  // namespace heed
