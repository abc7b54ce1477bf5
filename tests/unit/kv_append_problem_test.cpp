// What a valid kv_append problem is: every refusal with its sentence; slots, strides, flops and bytes.
#include "ops/kv_append.h"

#include <gtest/gtest.h>

#include "base/threads.h"
#include "ops/problem_line.h"

namespace heed {
namespace {

KvAppendProblem kv_append(std::string_view line) {
  const Result<ProblemLine> parsed = parse_problem_line(line);
  EXPECT_TRUE(parsed.ok()) << line << ": " << parsed.status().message();
  return parsed.ok() ? std::get<KvAppendProblem>(parsed.value().problem) : KvAppendProblem();
}

void refill(KvAppendProblem& p) {
  for (int i = 0; i < kNumKvSlots; ++i) {
    const KvSlot slot = static_cast<KvSlot>(i);
    p.stride[i] = contiguous_strides(p, slot);
    p.align[i] = natural_align(p, slot, nullptr);
  }
}

template <class Change>
std::string refusal(std::string_view line, Change change, bool refilled) {
  KvAppendProblem p = kv_append(line);
  change(p);
  if (refilled) refill(p);
  const Status status = validate(p);
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << line;
  return status.message();
}

#define EXPECT_REFUSED(line, sentence, ...)                           \
  EXPECT_EQ(refusal(                                                  \
                line, [](KvAppendProblem& p) { __VA_ARGS__; }, true), \
            sentence)
#define EXPECT_LAYOUT_REFUSED(line, sentence, ...)                     \
  EXPECT_EQ(refusal(                                                   \
                line, [](KvAppendProblem& p) { __VA_ARGS__; }, false), \
            sentence)

constexpr const char* kPlain = "kv_append b=2 hkv=2 sn=3 sk=20 d=16";
constexpr const char* kRotary = "kv_append b=2 hq=4 hkv=2 sn=3 sk=20 d=16 bf16 rotary=16";

TEST(KvAppendProblem, RefusesEnumsAndDtypes) {
  EXPECT_REFUSED(kPlain, "dtype = bool must be f32, f16, bf16 or f64", p.dtype = Dtype::kBool);
  EXPECT_REFUSED(kPlain, "layout_new = 3 must be 0 (bshd), 1 (bhsd) or 2 (thd)", p.layout_new = static_cast<Layout>(3));
  EXPECT_REFUSED(kPlain, "layout_cache = 2 must be 0 (bshd) or 1 (bhsd)", p.layout_cache = Layout::kThd);
  EXPECT_REFUSED(kPlain, "device = 7 must be 0 (cpu) or 1 (cuda)", p.device = static_cast<Device>(7));
  EXPECT_REFUSED(kRotary, "rotary_style = 2 must be 0 (half) or 1 (interleaved)",
                 p.rotary_style = static_cast<RotaryStyle>(2));
  EXPECT_REFUSED(kRotary, "rotary_dtype = f16 must be f32 or bf16 (as the cache)", p.rotary_dtype = Dtype::kF16);
  EXPECT_REFUSED(kRotary, "rotary_dtype = none must be f32 or bf16 (as the cache)", p.rotary_dtype = Dtype::kNone);
  EXPECT_REFUSED(kPlain, "rotary_dtype = f32 must be none without rotary", p.rotary_dtype = Dtype::kF32);
}

TEST(KvAppendProblem, RefusesSizes) {
  EXPECT_REFUSED(kPlain, "batch = -1 must be from 0 to 2^60", p.batch = -1);
  EXPECT_REFUSED(kPlain, "nheads_q = -1 must be from 0 to 2^60", p.nheads_q = -1);
  EXPECT_REFUSED(kPlain, "nheads_kv = 0 must be from 1 to 2^60", p.nheads_kv = 0);
  EXPECT_REFUSED(kRotary, "nheads_q = 4 must be a multiple of nheads_kv = 3", p.nheads_kv = 3);
  EXPECT_REFUSED(kPlain, "seqlen_q = 2 must be from 0 to 0", p.seqlen_q = 2);
  EXPECT_REFUSED(kPlain, "seqlen_new = -2 must be from 0 to 2^60", p.seqlen_new = -2);
  EXPECT_REFUSED(kPlain, "seqlen_k = -2 must be from 0 to 2^60", p.seqlen_k = -2);
  EXPECT_REFUSED(kPlain, "total_q = 2 must be from 0 to 0", p.total_q = 2);
  EXPECT_REFUSED(kPlain, "total_new = 2 must be from 0 to 0", p.total_new = 2);
  EXPECT_REFUSED(kPlain, "head_dim = 513 must be from 1 to 512", p.head_dim = 513);
  EXPECT_REFUSED(kPlain, "head_dim_v = 0 must be from 1 to 512", p.head_dim_v = 0);
  EXPECT_REFUSED(kPlain, "page_size = -3 must be from 0 to 2^60", p.page_size = -3);
  EXPECT_REFUSED(kPlain, "num_pages = 3 must be from 0 to 0", p.num_pages = 3);
  EXPECT_REFUSED(kPlain, "cache_batch = -3 must be from 0 to 2^60", p.cache_batch = -3);
  EXPECT_REFUSED(kPlain, "threads = -3 must be from 0 to 2147483647", p.threads = -3);
  EXPECT_REFUSED(kPlain, "seqlen_k = 20 must be a multiple of page_size = 16: a capacity is whole pages",
                 p.page_size = 16);
  EXPECT_NE(refusal(
                kPlain, [](KvAppendProblem& p) { p.batch = p.seqlen_k = int64_t{1} << 40; }, true)
                .find("sizes of "),
            std::string::npos);
}

TEST(KvAppendProblem, RefusesRotary) {
  EXPECT_REFUSED(kRotary, "rotary_dim = 18 must be from 0 to 16", p.rotary_dim = 18);
  EXPECT_REFUSED(kRotary, "rotary_dim = -2 must be from 0 to 16", p.rotary_dim = -2);
  EXPECT_REFUSED(kRotary, "rotary_dim = 7 must be even", p.rotary_dim = 7);
  EXPECT_REFUSED(kRotary, "rotary_rows = -1 must be from 0 to 2^60", p.rotary_rows = -1);
  EXPECT_REFUSED(kPlain, "rotary_rows = 4 must be from 0 to 0", p.rotary_rows = 4);
  EXPECT_REFUSED(kPlain, "rotary_style = 1 (interleaved) must be 0 without rotary",
                 p.rotary_style = RotaryStyle::kInterleaved);
  EXPECT_REFUSED(kPlain, "rotary_seqlens must be absent without rotary: nothing is turned", p.rotary_seqlens = true);
  EXPECT_REFUSED(kPlain, "q must be absent without rotary: nothing is turned", p.nheads_q = 2);
  EXPECT_REFUSED("kv_append b=2 hkv=2 sn=3 sk=20 d=16 rotary=16", "q_per_position = 1 must be 0 without q",
                 p.q_per_position = true);
  EXPECT_REFUSED("kv_append b=2 hkv=2 sn=0 sk=20 d=16",
                 "one of k_new (with v_new) and q must be present: nothing to append and nothing to turn",
                 p.append = false);
}

TEST(KvAppendProblem, RefusesStridesAndAlignment) {
  EXPECT_LAYOUT_REFUSED(kPlain,
                        "strides of k_cache = (0, 16, 32, 1) must give every element of the output (2, 2, 20, 16) an "
                        "address of its own",
                        p.strides(KvSlot::kKCache)[0] = 0);
  EXPECT_LAYOUT_REFUSED(kRotary,
                        "strides of q_out = (192, 16, 16, 1) must give every element of the output (2, 4, 3, 16) an "
                        "address of its own",
                        p.strides(KvSlot::kQOut)[2] = 16);
  EXPECT_LAYOUT_REFUSED(kPlain, "strides of v_new = (96, 16, 32, 2) must be 1 in the last dimension",
                        p.strides(KvSlot::kVNew)[3] = 2);
  EXPECT_LAYOUT_REFUSED(kRotary,
                        "strides of rotary_cos = (1, 0, 8, 1) must be 0 in a dimension that it does not have or "
                        "broadcasts",
                        p.strides(KvSlot::kCos)[0] = 1);
  EXPECT_LAYOUT_REFUSED(kPlain, "strides of k_new = (96, -16, 32, 1) must not be negative",
                        p.strides(KvSlot::kKNew)[1] = -16);
  EXPECT_LAYOUT_REFUSED(kPlain, "align of k_new = 1 must be a power of two from 4 (one f32 element) to 128",
                        p.align[static_cast<int>(KvSlot::kKNew)] = 1);
  EXPECT_LAYOUT_REFUSED(kPlain, "strides and align of q must be 0: the problem does not have it",
                        p.align[static_cast<int>(KvSlot::kQ)] = 4);
}

TEST(KvAppendProblem, SlotsAndShapes) {
  using Shape = std::array<int64_t, 4>;
  const KvAppendProblem p = kv_append(
      "kv_append b=2 hq=4 hkv=2 sn=3 sq=5 sk=48 d=16 dv=8 bf16 rotary=12 rotary_n=60 page=16 "
      "layout_cache=bhsd");
  EXPECT_EQ(slot_shape(p, KvSlot::kKNew), (Shape{2, 2, 3, 16}));
  EXPECT_EQ(slot_shape(p, KvSlot::kVNew), (Shape{2, 2, 3, 8}));
  EXPECT_EQ(slot_shape(p, KvSlot::kVCache), (Shape{6, 2, 16, 8}));
  EXPECT_EQ(slot_shape(p, KvSlot::kQOut), (Shape{2, 4, 5, 16}));
  EXPECT_EQ(slot_shape(p, KvSlot::kSin), (Shape{1, 1, 60, 6}));
  EXPECT_EQ(slot_shape(p, KvSlot::kPageTable), (Shape{2, 3, 1, 1}));
  EXPECT_EQ(p.strides(KvSlot::kKCache), (Shape{512, 256, 16, 1}));
  EXPECT_EQ(p.strides(KvSlot::kCos), (Shape{0, 0, 6, 1}));
  EXPECT_EQ(slot_dtype(p, KvSlot::kCos), Dtype::kF32);
  EXPECT_EQ(slot_dtype(p, KvSlot::kQOut), Dtype::kBf16);
  const KvAppendProblem rows = kv_append("kv_append b=2 hkv=2 sn=3 sk=20 d=16 cache_batch=5");
  EXPECT_EQ(slot_shape(rows, KvSlot::kKCache), (Shape{5, 2, 20, 16}));
  EXPECT_FALSE(has_slot(rows, KvSlot::kCos));
  EXPECT_EQ(slot_dtype(rows, KvSlot::kQ), Dtype::kNone);
}

TEST(KvAppendProblem, FlopsAndBytes) {
  const KvAppendProblem p = kv_append(kRotary);
  EXPECT_EQ(flops(p), 3.0 * 16 * 2 * 3 * (2 + 4));
  const double moved = 2.0 * (2 * 2 * 3 * 2 * 32 + 2 * 2 * 3 * 4 * 16);  // read and written, bf16
  EXPECT_EQ(bytes(p), moved + 2 * 3 * 16 * 4 + 4 * 2);
  EXPECT_EQ(flops(kv_append(kPlain)), 0.0);
}

TEST(KvAppendProblem, Pointers) {
  alignas(128) static char memory[1024];
  const KvAppendProblem p = kv_append(
      "kv_append b=2 hq=4 hkv=2 sk=48 d=16 layout_new=thd lq=3,4 rotary=16 page=16 "
      "cache_batch=3 rotary_seqlens leftpad");
  const auto full = [&] {
    KvAppendArgs args;
    args.k_new = args.v_new = args.q = args.rotary_cos = args.rotary_sin = memory;
    args.k_cache = args.v_cache = args.q_out = memory;
    args.cu_seqlens_new = args.cu_seqlens_q = args.cache_seqlens = args.rotary_seqlens = args.leftpad_k =
        args.page_table = args.cache_batch_idx = reinterpret_cast<const int32_t*>(memory);
    args.executor = &serial_executor();
    return args;
  };
  EXPECT_TRUE(validate(p, full(), 0).ok()) << validate(p, full(), 0).message();
  const auto sweep = [&](auto member, const std::string& name) {
    KvAppendArgs args = full();
    args.*member = nullptr;
    EXPECT_EQ(validate(p, args, 0).message(), name + " = NULL must be an address: the problem has this tensor");
    args.*member = reinterpret_cast<std::decay_t<decltype(args.*member)>>(memory + 1);
    EXPECT_EQ(validate(p, args, 0).message().find(name + " = 0x"), 0u) << validate(p, args, 0).message();
  };
  sweep(&KvAppendArgs::k_new, "k_new"), sweep(&KvAppendArgs::v_new, "v_new"), sweep(&KvAppendArgs::q, "q");
  sweep(&KvAppendArgs::k_cache, "k_cache"), sweep(&KvAppendArgs::v_cache, "v_cache");
  sweep(&KvAppendArgs::q_out, "q_out"), sweep(&KvAppendArgs::rotary_cos, "rotary_cos");
  sweep(&KvAppendArgs::rotary_sin, "rotary_sin"), sweep(&KvAppendArgs::page_table, "page_table");
  sweep(&KvAppendArgs::cu_seqlens_new, "cu_seqlens_new"), sweep(&KvAppendArgs::cu_seqlens_q, "cu_seqlens_q");
  sweep(&KvAppendArgs::cache_seqlens, "cache_seqlens"), sweep(&KvAppendArgs::rotary_seqlens, "rotary_seqlens");
  sweep(&KvAppendArgs::leftpad_k, "leftpad_k"), sweep(&KvAppendArgs::cache_batch_idx, "cache_batch_idx");

  const KvAppendProblem plain = kv_append("kv_append b=2 hkv=2 sn=3 sk=48 d=16");
  KvAppendArgs args;
  args.k_new = args.v_new = memory;
  args.k_cache = args.v_cache = memory;
  args.cache_seqlens = reinterpret_cast<const int32_t*>(memory);
  args.executor = &serial_executor();
  EXPECT_TRUE(validate(plain, args, 0).ok());
  EXPECT_EQ(validate(plain, args, 8).message(), "workspace = NULL must be an address: the plan needs 8 bytes");
  args.q = memory;
  EXPECT_EQ(validate(plain, args, 0).message(),
            "q must be NULL: the problem that was planned does not have this tensor");
  args.q = nullptr;
  args.leftpad_k = args.cache_seqlens;
  EXPECT_EQ(validate(plain, args, 0).message(),
            "leftpad_k must be NULL: the problem that was planned does not have this tensor");
  args.leftpad_k = nullptr;
  args.status = reinterpret_cast<int32_t*>(memory + 1);
  EXPECT_EQ(validate(plain, args, 0).message().find("status = 0x"), 0u);
  args.status = nullptr;
  args.executor = nullptr;
  EXPECT_EQ(validate(plain, args, 0).message(), "executor = NULL must be an address");
}

}  // namespace
}  // namespace heed
