// The problem line: what it reads, what it prints, that the two agree, and every error it can give.
#include "ops/problem_line.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <iostream>

#include "unit/random_problems.h"

namespace heed {
namespace {

AttentionProblem attention(std::string_view line) {
  const Result<ProblemLine> parsed = parse_problem_line(line);
  EXPECT_TRUE(parsed.ok()) << line << ": " << parsed.status().message();
  return parsed.ok() ? std::get<AttentionProblem>(parsed.value().problem) : AttentionProblem();
}

KvAppendProblem kv_append(std::string_view line) {
  const Result<ProblemLine> parsed = parse_problem_line(line);
  EXPECT_TRUE(parsed.ok()) << line << ": " << parsed.status().message();
  return parsed.ok() ? std::get<KvAppendProblem>(parsed.value().problem) : KvAppendProblem();
}

DataFields data(std::string_view line) {
  const Result<ProblemLine> parsed = parse_problem_line(line);
  EXPECT_TRUE(parsed.ok()) << line << ": " << parsed.status().message();
  return parsed.ok() ? parsed.value().data : DataFields();
}

std::string error(std::string_view line) {
  const Result<ProblemLine> parsed = parse_problem_line(line);
  EXPECT_FALSE(parsed.ok()) << line;
  if (parsed.ok()) return "accepted";
  EXPECT_EQ(parsed.status().code(), StatusCode::kInvalidArgument);
  return parsed.status().message();
}

std::string reprinted(std::string_view line) {
  const Result<ProblemLine> parsed = parse_problem_line(line);
  EXPECT_TRUE(parsed.ok()) << line << ": " << parsed.status().message();
  return parsed.ok() ? to_string(parsed.value()) : std::string();
}

TEST(ProblemLine, Defaults) {
  const AttentionProblem p = attention("attention sq=7 d=24");
  EXPECT_EQ(p.batch, 1);
  EXPECT_EQ(p.nheads_q, 1);
  EXPECT_EQ(p.nheads_kv, 1);
  EXPECT_EQ(p.seqlen_k, 7);
  EXPECT_EQ(p.head_dim_v, 24);
  EXPECT_EQ(p.dtype, Dtype::kF32);
  EXPECT_EQ(p.out_dtype, Dtype::kF32);
  EXPECT_EQ(p.layout_q, Layout::kBshd);
  EXPECT_EQ(p.layout_kv, Layout::kBshd);
  EXPECT_EQ(p.offset_kind, OffsetKind::kBottomRight);
  EXPECT_EQ(p.window_left, -1);
  EXPECT_EQ(p.window_right, -1);
  EXPECT_FALSE(p.lse);
  EXPECT_EQ(p.strides(Slot::kQ), (std::array<int64_t, 4>{168, 24, 24, 1}));
  EXPECT_EQ(attention("attention hq=8 hkv=2 sq=1 d=8 bf16").out_dtype, Dtype::kBf16);
  const KvAppendProblem a = kv_append("kv_append sn=2 sk=9 d=8");
  EXPECT_EQ(a.nheads_q, 0);
  EXPECT_EQ(a.nheads_kv, 1);
  EXPECT_TRUE(a.append);
  EXPECT_FALSE(a.rotary());
  EXPECT_EQ(a.rotary_dtype, Dtype::kNone);
  EXPECT_EQ(kv_append("kv_append hq=4 sn=2 sk=9 d=8 rotary=8").seqlen_q, 2);
  EXPECT_EQ(kv_append("kv_append sn=2 sk=9 d=8 rotary=8").rotary_rows, 9);
}

TEST(ProblemLine, EveryAttentionField) {
  EXPECT_EQ(attention("attention sq=1 d=8 f16").dtype, Dtype::kF16);
  EXPECT_EQ(attention("attention sq=1 d=8 f64").dtype, Dtype::kF64);
  EXPECT_EQ(attention("attention sq=1 d=8 bf16 out=f32").out_dtype, Dtype::kF32);
  EXPECT_EQ(attention("attention sq=1 d=8 bf16 out=f64").out_dtype, Dtype::kF64);
  EXPECT_EQ(attention("attention sq=1 d=8 layout_q=bhsd").layout_q, Layout::kBhsd);
  EXPECT_EQ(attention("attention sq=1 d=8 layout_kv=bhsd").layout_kv, Layout::kBhsd);
  EXPECT_TRUE(attention("attention sq=1 d=8 causal").causal());
  EXPECT_EQ(attention("attention sq=1 d=8 window=3,4").window_left, 3);
  EXPECT_EQ(attention("attention sq=1 d=8 window=3,4").window_right, 4);
  EXPECT_EQ(attention("attention sq=1 d=8 offset=top").offset_kind, OffsetKind::kTopLeft);
  EXPECT_EQ(attention("attention sq=1 d=8 offset=-5").q_offset, -5);
  EXPECT_EQ(attention("attention sq=1 d=8 offset=-5").offset_kind, OffsetKind::kGiven);
  EXPECT_EQ(attention("attention sq=1 d=8 chunk=5").chunk, 5);
  EXPECT_TRUE(attention("attention sq=1 d=8 softcap").softcap);
  EXPECT_TRUE(attention("attention sq=1 d=8 alibi").alibi);
  EXPECT_FALSE(attention("attention sq=1 d=8 alibi").alibi_per_batch);
  EXPECT_TRUE(attention("attention sq=1 d=8 alibi=bh").alibi_per_batch);
  EXPECT_TRUE(attention("attention sq=1 d=8 sinks").sinks);
  EXPECT_TRUE(attention("attention sq=1 d=8 dropout").dropout);
  EXPECT_TRUE(attention("attention sq=1 d=8 leftpad").leftpad);
  EXPECT_TRUE(attention("attention sq=1 d=8 used_q").used_q);
  EXPECT_TRUE(attention("attention sq=1 d=8 used_k").used_k);
  EXPECT_TRUE(attention("attention sq=1 d=8 lse").lse);
  EXPECT_TRUE(attention("attention sq=1 d=8 deterministic").deterministic);
  EXPECT_TRUE(attention("attention sq=1 d=8 batch_invariant").batch_invariant);
  EXPECT_EQ(attention("attention sq=1 d=8 splits=3").splits, 3);
  EXPECT_EQ(attention("attention sq=1 d=8 threads=3").threads, 3);
  EXPECT_EQ(attention("attention sq=1 d=8 device=cpu").device, Device::kCpu);
  EXPECT_EQ(attention("attention sq=1 d=8 bias=f32:jh").bias_dims, kDimH | kDimJ);
  EXPECT_EQ(attention("attention sq=1 d=8 bias=f32:").bias_dims, 0);
  EXPECT_TRUE(attention("attention sq=1 d=8 bias=f32:").bias());
  EXPECT_TRUE(attention("attention sq=1 d=8 mask=").mask);
  EXPECT_EQ(attention("attention sq=1 d=8 mask=bi").mask_dims, kDimB | kDimI);
  const AttentionProblem paged = attention("attention b=3 sq=1 sk=64 d=8 page=16 cache_batch=5");
  EXPECT_EQ(paged.page_size, 16);
  EXPECT_EQ(paged.num_pages, 20);
  EXPECT_EQ(paged.cache_batch, 5);
  EXPECT_EQ(attention("attention b=3 sq=1 sk=64 d=8 page=16 num_pages=4").num_pages, 4);
  const AttentionProblem strided = attention("attention b=2 hq=3 sq=5 d=8 strides.q=1000,8,40 align.q=16");
  EXPECT_EQ(strided.strides(Slot::kQ), (std::array<int64_t, 4>{1000, 8, 40, 1}));
  EXPECT_EQ(strided.align[static_cast<int>(Slot::kQ)], 16);
}

TEST(ProblemLine, CausalAndWindowConjoin) {
  EXPECT_EQ(reprinted("attention sq=1 d=8 causal window=4,-1"), "attention sq=1 d=8 window=4,0");
  EXPECT_EQ(reprinted("attention sq=1 d=8 window=4,9 causal"), "attention sq=1 d=8 window=4,0");
  EXPECT_EQ(reprinted("attention sq=1 d=8 window=-1,0"), "attention sq=1 d=8 causal");
  EXPECT_EQ(reprinted("attention sq=1 d=8 window=-1,-1"), "attention sq=1 d=8");
}

TEST(ProblemLine, Packed) {
  const AttentionProblem p = attention("attention b=3 d=8 layout_q=thd layout_kv=thd lq=3,0,9 lk=1,1,1");
  EXPECT_EQ(p.total_q, 12);
  EXPECT_EQ(p.total_k, 3);
  EXPECT_EQ(p.seqlen_q, 0);
  EXPECT_EQ(p.strides(Slot::kQ)[0], 0);
  EXPECT_EQ(attention("attention b=3 sq=5 d=8 layout_q=thd layout_kv=thd").total_q, 15);
  EXPECT_EQ(attention("attention b=3 sq=5 d=8 layout_q=thd layout_kv=thd tq=2 tk=9").total_k, 9);
  EXPECT_EQ(reprinted("attention b=2 d=8 layout_q=thd layout_kv=thd tq=5 lq=2,3 lk=1,1"),
            "attention b=2 d=8 layout_q=thd layout_kv=thd lq=2,3 lk=1,1");
  EXPECT_EQ(kv_append("kv_append b=2 hq=2 sk=8 d=8 layout_new=thd rotary=8 lq=3,4").total_q, 7);
}

TEST(ProblemLine, Gradients) {
  const AttentionProblem all = attention("attention sq=4 d=8 pass=bwd sinks bias=f32:j alibi");
  EXPECT_TRUE(all.lse && all.dq && all.dk && all.dv && all.dbias && all.dsinks && all.dalibi);
  EXPECT_FALSE(attention("attention sq=4 d=8 pass=bwd").dbias);
  const AttentionProblem some = attention("attention sq=4 d=8 pass=bwd grads=dk,dq dlse");
  EXPECT_TRUE(some.dq && some.dk && !some.dv && some.dlse);
  EXPECT_EQ(to_string(some), "attention sq=4 d=8 pass=bwd grads=dq,dk dlse");
}

TEST(ProblemLine, EveryKvAppendField) {
  const KvAppendProblem p = kv_append(
      "kv_append b=2 hq=4 hkv=2 sn=3 sq=2 sk=64 d=32 dv=16 bf16 rotary=16 rotary_n=100 interleaved cos=bf16 "
      "q_per_position rotary_seqlens leftpad layout_new=bhsd layout_cache=bhsd page=16 num_pages=9 cache_batch=3 "
      "threads=2 strides.rotary_cos=0,0,10 align.rotary_cos=2");
  EXPECT_EQ(p.nheads_q, 4);
  EXPECT_EQ(p.seqlen_new, 3);
  EXPECT_EQ(p.seqlen_q, 2);
  EXPECT_EQ(p.head_dim_v, 16);
  EXPECT_EQ(p.rotary_dim, 16);
  EXPECT_EQ(p.rotary_rows, 100);
  EXPECT_EQ(p.rotary_style, RotaryStyle::kInterleaved);
  EXPECT_EQ(p.rotary_dtype, Dtype::kBf16);
  EXPECT_TRUE(p.q_per_position && p.rotary_seqlens && p.leftpad);
  EXPECT_EQ(p.layout_new, Layout::kBhsd);
  EXPECT_EQ(p.layout_cache, Layout::kBhsd);
  EXPECT_EQ(p.num_pages, 9);
  EXPECT_EQ(p.threads, 2);
  EXPECT_EQ(p.strides(KvSlot::kCos)[2], 10);
  EXPECT_EQ(p.align[static_cast<int>(KvSlot::kCos)], 2);
  EXPECT_FALSE(kv_append("kv_append hq=4 hkv=2 sq=3 sk=8 d=8 rotary=8 noappend").append);
}

TEST(ProblemLine, DataFields) {
  EXPECT_EQ(*data("attention sq=1 d=8 scale=-0.5").scale, -0.5);
  EXPECT_EQ(data("attention sq=1 d=8 softcap softcap_value=2.5").softcap_value, 2.5);
  EXPECT_EQ(data("attention sq=1 d=8 dropout p=1").p, 1.0);
  EXPECT_EQ(data("attention sq=1 d=8 seed=18446744073709551615").seed, UINT64_MAX);
  EXPECT_EQ(data("attention sq=1 d=8 fill=normal*12").fill_factor, 12.0);
  EXPECT_EQ(data("attention sq=1 d=8 fill=maxlast").fill, "maxlast");
  EXPECT_EQ(data("attention b=2 sq=9 d=8 used_k lk=3,9").lk.values, (std::vector<int64_t>{3, 9}));
  EXPECT_EQ(data("attention b=2 sq=9 d=8 used_k lk=uniform:2..9").lk.low, 2);
  EXPECT_EQ(data("attention b=2 sq=9 d=8 leftpad lpad=3,0").leftpad.values, (std::vector<int64_t>{3, 0}));
  EXPECT_TRUE(data("attention sq=1 sk=8 d=8 page=4 pages=shuffled").pages_shuffled);
  EXPECT_FALSE(data("attention sq=1 sk=8 d=8 page=4 pages=ordered").pages_shuffled);
  EXPECT_EQ(reprinted("attention sq=1 d=8 seed=1 fill=normal p=0.1 dropout"), "attention sq=1 d=8 dropout");
  EXPECT_EQ(reprinted("attention d=8 fill=ones*0.1 sq=1 scale=1e-3"), "attention sq=1 d=8 scale=0.001 fill=ones*0.1");
}

TEST(ProblemLine, OrderIsFreeAndDefaultsAreLeftOut) {
  EXPECT_EQ(reprinted("attention causal bf16 d=128 dv=128 sk=4096 sq=4096 hkv=8 hq=32 b=4 device=cpu"),
            "attention b=4 hq=32 hkv=8 sq=4096 d=128 bf16 causal");
  EXPECT_EQ(reprinted("attention sq=1 d=8 align.q=32 align.k=16"), "attention sq=1 d=8 align.q=32 align.k=16");
}

struct BadLine {
  const char* line;
  const char* text;  // a part of the sentence
};

TEST(ProblemLine, ErrorsPointAtThePlace) {
  const BadLine lines[] = {
      {"", "column 1: the line is empty"},
      {" attention sq=1 d=8", "column 1: the line must start with"},
      {"attention  sq=1 d=8", "column 11: fields must be separated by single spaces"},
      {"attention sq=1 d=8 ", "column 19: the line must not end with a space"},
      {"attention sq=1 d=8\n", "column 19: byte 0x0a must not be in a problem line"},
      {"attention sq=1\td=8", "column 15: byte 0x09 must not be"},
      {"attention sq=1 d=8 \xc3\xa9", "column 20: byte 0xc3 must not be"},
      {"attenton sq=1", "column 1: `attenton`: unknown op; it must be attention or kv_append"},
      {"attention=3", "column 1: `attention=3`: unknown op"},
      {"attention =3", "column 11: `=3`: must have a name before `=`"},
      {"attention sq=1 d=8 hqq=3", "column 20: `hqq=3`: unknown field; the nearest known one is `hq`"},
      {"attention sq=1 d=8 wndow=3,4", "`wndow=3,4`: unknown field; the nearest known one is `window`"},
      {"attention sq=1 d=8 stride.q=3,4,5", "the nearest known one is `strides.q`"},
      {"attention sq=1 d=8 somethingelse", "`somethingelse`: unknown field; known are b hq hkv sq"},
      {"attention sq=1 d=8 sn=4", "column 20: `sn=4`: unknown field; the nearest known one is"},
      {"attention sq=1 d=8 sq=1", "column 20: `sq=1`: given before, at column 11; each field at most once"},
      {"attention sq=1 d=8 causal causal", "column 27: `causal`: given before"},
      {"attention sq=1 d=8 causal=1", "column 20: `causal=1`: must stand alone: it is a flag"},
      {"attention sq=1 d", "column 16: `d`: must have a value: `d=...`"},
      {"attention sq=1 d=8 mask", "`mask`: must have a value"},
      {"attention sq=1 d=8 hq=abc", "column 20: `hq=abc`: must be a whole number"},
      {"attention sq=1 d=8 hq=", "`hq=`: must be a whole number"},
      {"attention sq=1 d=8 hq=4x", "`hq=4x`: must be a whole number"},
      {"attention sq=1 d=8 hq=+4", "`hq=+4`: must be a whole number"},
      {"attention sq=1 d=8 hq=4.0", "`hq=4.0`: must be a whole number"},
      {"attention sq=99999999999999999999 d=8", "`sq=99999999999999999999`: must be a whole number that fits in 64"},
      {"attention sq=-1 d=8", "`sq=-1`: must not be negative"},
      {"attention sq=1 d=8 b=-1", "column 20: `b=-1`: batch = -1 must be from 0 to 2^60"},
      {"attention sq=1 d=8 f32 bf16", "column 24: `bf16`: the dtype is f32 already"},
      {"attention sq=1 d=8 out=e4m3", "`out=e4m3`: must be f32, f16, bf16 or f64"},
      {"attention sq=1 d=8 pass=both", "`pass=both`: must be fwd or bwd"},
      {"attention sq=1 d=8 pass=bwd grads=dx", "must be some of dq,dk,dv,dbias,dsinks,dalibi"},
      {"attention sq=1 d=8 pass=bwd grads=dq,dq", "must be some of dq,dk,dv,dbias,dsinks,dalibi"},
      {"attention sq=1 d=8 pass=bwd grads=", "must be some of dq,dk,dv,dbias,dsinks,dalibi"},
      {"attention sq=1 d=8 layout_q=sbhd", "`layout_q=sbhd`: must be bshd, bhsd or thd"},
      {"attention sq=1 d=8 window=3", "`window=3`: must be two whole numbers, left,right"},
      {"attention sq=1 d=8 window=3,4,5", "must be two whole numbers, left,right"},
      {"attention sq=1 d=8 window=-2,0", "`window=-2,0`: window_left = -2 must be from -1 to 2^60"},
      {"attention sq=1 d=8 offset=bottom", "`offset=bottom`: must be top or a whole number"},
      {"attention sq=1 d=8 chunk=-3", "`chunk=-3`: chunk = -3 must be from 0 to 2^60"},
      {"attention sq=1 d=8 alibi=h", "`alibi=h`: must be bh (slopes for every sequence and head) or stand alone"},
      {"attention sq=1 d=8 alibi=", "`alibi=`: must be bh"},
      {"attention sq=1 d=8 bias=f32", "`bias=f32`: must be DTYPE:LETTERS, such as f32:bhij"},
      {"attention sq=1 d=8 bias=f8:bhij", "`bias=f8:bhij`: must be f32, f16, bf16 or f64"},
      {"attention sq=1 d=8 bias=f32:bhk", "must name the dimensions that are not broadcast"},
      {"attention sq=1 d=8 mask=bb", "`mask=bb`: must name the dimensions that are not broadcast"},
      {"attention sq=1 d=8 device=tpu", "`device=tpu`: must be cpu, cuda or cuda:N, N from 0 to 1023"},
      {"attention sq=1 d=8 device=cuda:1024", "`device=cuda:1024`: must be cpu, cuda or cuda:N"},
      {"attention sq=1 d=8 device=cuda threads=2", "threads = 2 must be 0"},
      {"attention sq=1 d=8 threads=-1", "`threads=-1`: must be a whole number from 0 to 2147483647"},
      {"attention sq=1 d=8 threads=3000000000", "must be a whole number from 0 to 2147483647"},
      {"attention sq=1 d=8 strides.q=1,2", "`strides.q=1,2`: must be 3 whole numbers separated by commas"},
      {"attention sq=1 d=8 strides.q=1,2,3,4", "must be 3 whole numbers separated by commas"},
      {"attention sq=1 d=8 strides.q", "`strides.q`: must have a value"},
      {"attention sq=1 d=8 strides.bias=1,2,3,4", "`strides.bias=1,2,3,4`: must be left out: the problem has no bias"},
      {"attention sq=1 d=8 align.lse=4", "`align.lse=4`: must be left out: the problem has no lse"},
      {"attention sq=1 d=8 align.q=3", "`align.q=3`: align of q = 3 must be a power of two"},
      {"attention sq=1 d=8 align.q=256", "`align.q=256`: must be a power of two from 1 to 128"},
      {"attention sq=1 d=8 align.q=x", "`align.q=x`: must be a whole number"},
      {"attention sq=2 d=3 align.q=16", "`align.q=16`: align of q = 16 must divide its byte strides: at most 4"},
      {"attention b=2 sq=2 d=4 strides.q=-8,4,4",
       "`strides.q=-8,4,4`: strides of q = (-8, 4, 4, 1) must not be negative"},
      {"attention d=8", "`sq=` (seqlen_q) must be given unless layout_q=thd"},
      {"attention sq=8", "`d=` (head_dim) must be given"},
      {"attention sq=8 d=0", "`d=0`: head_dim = 0 must be from 1 to 512"},
      {"attention sq=8 d=8 hq=6 hkv=4", "column 20: `hq=6`: nheads_q = 6 must be a multiple of nheads_kv = 4"},
      {"attention sq=8 d=8 tq=4", "`tq=4`: total_q = 4 must be from 0 to 0"},
      {"attention sq=8 sk=9 d=8 page=4", "`sk=9`: seqlen_k = 9 must be a multiple of page_size = 4"},
      {"attention sq=8 d=8 scale=inf", "`scale=inf`: must be a finite number"},
      {"attention sq=8 d=8 scale=1e999", "`scale=1e999`: must be a number that fits in 64 bits"},
      {"attention sq=8 d=8 scale=one", "`scale=one`: must be a number"},
      {"attention sq=8 d=8 softcap softcap_value=0", "`softcap_value=0`: must be a finite number greater than 0"},
      {"attention sq=8 d=8 softcap_value=3", "`softcap_value=3`: must be left out without `softcap`"},
      {"attention sq=8 d=8 dropout p=1.5", "`p=1.5`: must be a number from 0 to 1"},
      {"attention sq=8 d=8 p=0.5", "`p=0.5`: must be left out without `dropout`"},
      {"attention sq=8 d=8 seed=-1", "`seed=-1`: must be a whole number that is not negative"},
      {"attention sq=8 d=8 pages=shuffled", "`pages=shuffled`: must be left out without `page=`"},
      {"attention sq=8 d=8 page=4 pages=sorted", "`pages=sorted`: must be shuffled or ordered"},
      {"attention sq=8 d=8 fill=gauss", "`fill=gauss`: must be one of normal, uniform, ones"},
      {"attention sq=8 d=8 fill=normal*x", "`fill=normal*x`: must have a finite number after `*`"},
      {"attention sq=8 d=8 lq=3", "`lq=3`: must be left out without `layout_q=thd` or `used_q`"},
      {"attention sq=8 d=8 lk=3", "`lk=3`: must be left out without `layout_kv=thd` or `used_k`"},
      {"attention sq=8 d=8 lpad=3", "`lpad=3`: must be left out without `leftpad`"},
      {"attention sq=8 d=8 used_k lk=3,4", "`lk=3,4`: must have one length for each of the 1 sequences, not 2"},
      {"attention sq=8 d=8 used_k lk=9", "`lk=9`: lengths must be at most 8, the capacity"},
      {"attention sq=8 d=8 used_k lk=uniform:1..9", "lengths must be at most 8, the capacity"},
      {"attention sq=8 d=8 used_k lk=uniform:5..3", "must be lengths separated by commas"},
      {"attention sq=8 d=8 used_k lk=uniform:5", "must be lengths separated by commas"},
      {"attention sq=8 d=8 used_k lk=-3", "must be lengths separated by commas"},
      {"attention sq=8 d=8 used_k lk=3,", "must be lengths separated by commas"},
      {"attention b=2 d=8 layout_q=thd layout_kv=thd tq=5 lq=3,3 lk=1,1", "lengths must sum to at most 5"},
      {"kv_append sn=1 d=8", "`sk=` (seqlen_k, the cache's capacity) must be given"},
      {"kv_append sn=1 sk=8", "`d=` (head_dim) must be given"},
      {"kv_append sk=8 d=8", "`sn=` (seqlen_new) must be given unless noappend or layout_new=thd"},
      {"kv_append sn=1 sk=8 d=8 scale=1", "`scale=1`: must be left out: it is for attention"},
      {"kv_append sn=1 sk=8 d=8 lq=1", "`lq=1`: must be left out without `layout_new=thd` and new keys"},
      {"kv_append sn=1 sk=8 d=8 lk=9", "`lk=9`: lengths must be at most 8"},
      {"kv_append sn=1 sk=8 d=8 lpad=1", "`lpad=1`: must be left out without `leftpad`"},
      {"kv_append sn=1 sk=8 d=8 pages=shuffled", "must be left out without `page=`"},
      {"kv_append sn=1 sk=8 d=8 causal", "`causal`: unknown field"},
      {"kv_append sn=1 sk=8 d=8 rotary=9", "`rotary=9`: rotary_dim = 9 must be from 0 to 8"},
      {"kv_append sn=1 sk=8 d=8 cos=f32", "`cos=f32`: rotary_dtype = f32 must be none without rotary"},
      {"kv_append sn=1 sk=8 d=8 layout_cache=thd", "`layout_cache=thd`: layout_cache = 2 must be 0 (bshd) or 1 (bhsd)"},
      {"kv_append sn=1 sk=8 d=8 strides.q=1,2,3", "must be left out: the problem has no q"},
  };
  for (const BadLine& bad : lines) {
    const std::string message = error(bad.line);
    EXPECT_TRUE(message.starts_with("problem line")) << bad.line << ": " << message;
    EXPECT_NE(message.find(bad.text), std::string::npos) << bad.line << ": " << message;
  }
}

TEST(ProblemLine, OverflowIsAnError) {
  for (const char* line :
       {"attention b=1152921504606846976 sq=1152921504606846976 d=8", "attention b=4611686018427387904 sq=1 d=8",
        "attention b=1000000000 hq=1000000000 sq=1000 d=8",
        "attention b=1000000000 sq=1000000000 d=8 layout_q=thd layout_kv=thd tk=5 sk=5 hq=100",
        "attention b=2 sq=4 d=8 strides.q=9223372036854775807,8,8 align.q=4",
        "attention sq=1 d=8 offset=9223372036854775807", "attention sq=1 d=8 window=9223372036854775807,0",
        "kv_append b=1000000000 hkv=1000000000 sn=1000 sk=8 d=8"}) {
    EXPECT_NE(error(line).find("must"), std::string::npos) << line;
  }
}

TEST(ProblemLine, HostileBytesAreErrorsAndNothingElse) {
  testing::Random random(20261121);
  const std::string seeds[] = {"attention b=2 hq=4 hkv=2 sq=30 d=16 pass=bwd bias=f32:hij alibi sinks strides.q=1,2,3",
                               "kv_append b=2 hq=4 hkv=2 sn=3 sk=48 d=16 rotary=16 page=16 lk=10,29 fill=normal*3"};
  for (int round = 0; round < 20000; ++round) {
    std::string line = seeds[round % 2];
    for (int64_t edits = random.in(1, 6); edits > 0; --edits) {
      const size_t place = static_cast<size_t>(random.in(0, static_cast<int64_t>(line.size()) - 1));
      switch (random.in(0, 2)) {
        case 0: line[place] = static_cast<char>(random.in(0, 255)); break;
        case 1: line.erase(place, static_cast<size_t>(random.in(1, 5))); break;
        default: line.insert(place, 1, "=,*. 9-"[random.in(0, 6)]); break;
      }
      if (line.empty()) line.assign(1, ' ');
    }
    const Result<ProblemLine> parsed = parse_problem_line(line);
    if (parsed.ok()) {
      EXPECT_TRUE(testing::is_valid(parsed.value())) << line;
    } else {
      EXPECT_FALSE(parsed.status().message().empty());
      for (const char c : parsed.status().message()) EXPECT_TRUE(c >= 0x20 && c < 0x7f) << line;
    }
  }
  EXPECT_LT(error("attention " + std::string(1 << 20, 'x')).size(), 2000u);
}

TEST(ProblemLine, PrintAndParseAgreeOnRandomProblems) {
  const int64_t wanted = testing::environment_number("HEED_TEST_RANDOM", 20000);
  const uint64_t seed = static_cast<uint64_t>(testing::environment_number("HEED_TEST_SEED", 1));
  std::cout << "seed " << seed << ", " << wanted << " problems\n";
  testing::Random random(seed);
  int64_t valid = 0;
  for (int64_t tried = 0; valid < wanted && tried < 4 * wanted; ++tried) {
    const testing::Sizes sizes = random.chance(50) ? testing::Sizes::kAny : testing::Sizes::kRunnable;
    const ProblemLine line =
        random.chance(75) ? testing::random_attention(random, sizes) : testing::random_kv_append(random, sizes);
    if (!testing::is_valid(line)) continue;
    ++valid;
    const std::string text = to_string(line);
    const Result<ProblemLine> parsed = parse_problem_line(text);
    ASSERT_TRUE(parsed.ok()) << text << "\n" << parsed.status().message();
    ASSERT_TRUE(parsed.value().problem == line.problem) << text << "\n" << to_string(parsed.value());
    ASSERT_TRUE(parsed.value().data == line.data) << text << "\n" << to_string(parsed.value());
    // The problem alone, without data fields, names itself too.
    const std::string alone = std::visit([](const auto& problem) { return to_string(problem); }, line.problem);
    const Result<ProblemLine> again = parse_problem_line(alone);
    ASSERT_TRUE(again.ok()) << alone << "\n" << again.status().message();
    ASSERT_TRUE(again.value().problem == line.problem) << alone;
  }
  EXPECT_EQ(valid, wanted);
}

TEST(ProblemLine, ProblemFilesParseAndPrintInOrder) {
  int lines = 0;
  for (const auto& file : std::filesystem::directory_iterator(HEED_SOURCE_DIR "/tests/problems")) {
    std::ifstream stream(file.path());
    for (std::string line; std::getline(stream, line);) {
      if (line.empty() || line[0] == '#') continue;
      ++lines;
      const Result<ProblemLine> parsed = parse_problem_line(line);
      ASSERT_TRUE(parsed.ok()) << file.path() << ": " << parsed.status().message();
      const Result<ProblemLine> again = parse_problem_line(to_string(parsed.value()));
      ASSERT_TRUE(again.ok()) << to_string(parsed.value());
      EXPECT_TRUE(again.value().problem == parsed.value().problem) << line;
    }
  }
  EXPECT_GT(lines, 250);
}

TEST(ReduceLine, KeepsWhatFails) {
  const std::string line = "attention b=3 hq=4 sq=30 d=16 causal used_k softcap lk=3,20,7 seed=9";
  const auto fails = [](const std::string& text) {
    const Result<ProblemLine> parsed = parse_problem_line(text);
    const AttentionProblem& p = std::get<AttentionProblem>(parsed.value().problem);
    return p.softcap && p.seqlen_q >= 5;
  };
  EXPECT_EQ(testing::reduce(line, fails), "attention sq=5 d=1 softcap");
}

}  // namespace
}  // namespace heed
