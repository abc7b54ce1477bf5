// Every error of the C interface's core and attention functions, provoked: its code, and that the sentence
// names the argument, its value and what is allowed. On an error no output is written.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "heed/heed.h"
#include "small_attention.h"

namespace heed {
namespace {

constexpr heed_dtype kF32 = HEED_DTYPE_F32, kI32 = HEED_DTYPE_I32;

struct Case {
  const char* message;  // the error's text, or a part of it
  std::function<void(heed_attention_args&)> spoil;
  heed_status status = HEED_INVALID_ARGUMENT;
};

float g_floats[4096];
int32_t g_numbers[64];

heed_tensor floats(std::initializer_list<int64_t> shape) { return tensor_of(g_floats, kF32, shape); }
heed_tensor numbers(std::initializer_list<int64_t> shape) { return tensor_of(g_numbers, kI32, shape); }

void run_cases(const std::vector<Case>& cases, const std::function<void(heed_attention_args&)>& prepare = {}) {
  for (const Case& c : cases) {
    SmallAttention small;
    if (prepare) prepare(small.args);
    c.spoil(small.args);
    EXPECT_EQ(heed_attention(&small.args, nullptr), c.status) << c.message << "\n" << heed_last_error();
    EXPECT_NE(std::string(heed_last_error()).find(c.message), std::string::npos)
        << "want: " << c.message << "\ngot:  " << heed_last_error();
    EXPECT_TRUE(small.out_untouched()) << c.message;
  }
}

using Args = heed_attention_args;

TEST(Errors, Options) {
  run_cases({
      {"pass = 2: must be 0 (forward) or 1 (backward)", [](Args& a) { a.pass = 2; }},
      {"layout_q = 3: must be", [](Args& a) { a.layout_q = 3; }},
      {"layout_kv = -1: must be", [](Args& a) { a.layout_kv = -1; }},
      {"device = 2: must be 0 (cpu) or 1 (cuda)", [](Args& a) { a.device = 2; }},
      {"offset_kind = 3: must be", [](Args& a) { a.offset_kind = 3; }},
      {"q_offset = 5: must be 0 unless offset_kind is 2", [](Args& a) { a.q_offset = 5; }},
      {"softcap = -1: must be 0 (off) or greater", [](Args& a) { a.softcap = -1; }},
      {"softcap = nan", [](Args& a) { a.softcap = NAN; }},
      {"softcap = inf", [](Args& a) { a.softcap = INFINITY; }},
      {"dropout_p = 1.5: must be from 0 to 1", [](Args& a) { a.dropout_p = 1.5f; }},
      {"dropout_p = nan", [](Args& a) { a.dropout_p = NAN; }},
      {"softmax_scale = inf: must be finite", [](Args& a) { a.has_softmax_scale = 1, a.softmax_scale = INFINITY; }},
      {"window_left = -2: must be -1 (unbounded) or greater", [](Args& a) { a.window_left = -2; }},
      {"window_right = -9: must be -1", [](Args& a) { a.window_right = -9; }},
      {"chunk = -1 must be from 0", [](Args& a) { a.chunk = -1; }},
      {"splits = -1 must be from 0", [](Args& a) { a.num_splits = -1; }},
      {"num_threads = -1: must not be negative", [](Args& a) { a.num_threads = -1; }},
      {"device_index = 1: must be 0 or -1 with device 0 (cpu)", [](Args& a) { a.device_index = 1; }},
  });
}

TEST(Errors, OneTensorByItself) {
  run_cases({
      {"q: absent", [](Args& a) { a.q = {}; }},
      {"k: absent", [](Args& a) { a.k = {}; }},
      {"v: absent", [](Args& a) { a.v = {}; }},
      {"out: absent (dtype none); the result goes there", [](Args& a) { a.out = {}; }},
      {"q.dtype = 7: must be from 1 (f32) to 6 (bool)", [](Args& a) { a.q.dtype = 7; }},
      {"q.ndim = 3: must be 4, [batch, seqlen_q, nheads_q, head_dim]", [](Args& a) { a.q.ndim = 3; }},
      {"q.shape[1] = -3: must not be negative", [](Args& a) { a.q.shape[1] = -3; }},
      {"k.stride[1] = -16: must not be negative", [](Args& a) { a.k.stride[1] = -16; }},
      {"v.stride[3] = 2: must be 1", [](Args& a) { a.v.stride[3] = 2; }},
      {"dtype = i32 must be f32, f16, bf16 or f64", [](Args& a) { a.q.dtype = a.k.dtype = a.v.dtype = kI32; }},
      {"out_dtype = bf16 must be f32", [](Args& a) { a.out.dtype = HEED_DTYPE_BF16; }},
      {"strides of out", [](Args& a) { a.out.stride[0] = 0; }},
      {"q = NULL must be an address", [](Args& a) { a.q.data = nullptr; }},
      {"must be a power of two from 4", [](Args& a) { a.q.data = static_cast<char*>(a.q.data) + 2; }},
      {"head_dim = 513 must be from 1 to 512",
       [](Args& a) { a.q.shape[3] = a.k.shape[3] = 513, a.q.data = a.k.data = g_floats; }},
  });
}

TEST(Errors, TensorsAgainstEachOther) {
  run_cases({
      {"k.shape[3] = 4: must equal q.shape[3] = 8 (head_dim)", [](Args& a) { a.k.shape[3] = 4; }},
      {"k.shape[0] = 1: must equal q.shape[0] = 2 (batch)", [](Args& a) { a.k.shape[0] = 1; }},
      {"v.shape[1] = 4: must equal k.shape[1] = 5 (seqlen_k)", [](Args& a) { a.v.shape[1] = 4; }},
      {"v.shape[2] = 1: must equal k.shape[2] = 2 (nheads_kv)", [](Args& a) { a.v.shape[2] = 1; }},
      {"out.shape[3] = 8: must equal v.shape[3] = 16 (head_dim_v)", [](Args& a) { a.out.shape[3] = 8; }},
      {"out.shape[1] = 2: must equal q.shape[1] = 3 (seqlen_q)", [](Args& a) { a.out.shape[1] = 2; }},
      {"nheads_q = 4 must be a multiple of nheads_kv = 3", [](Args& a) { a.k.shape[2] = a.v.shape[2] = 3; }},
      {"k.dtype = bf16: must be f32", [](Args& a) { a.k.dtype = HEED_DTYPE_BF16; }},
      {"v.dtype = f16: must be f32", [](Args& a) { a.v.dtype = HEED_DTYPE_F16; }},
      {"lse.shape[2] = 4: must equal q.shape[1] = 3 (seqlen_q)",
       [](Args& a) {
         a.lse = floats({2, 4, 4});
       }},
      {"lse.dtype = f16: must be f32",
       [](Args& a) {
         a.lse = floats({2, 4, 3}), a.lse.dtype = HEED_DTYPE_F16;
       }},
      {"bias.shape[3] = 4: must equal k.shape[1] = 5 (seqlen_k)",
       [](Args& a) {
         a.bias = floats({1, 1, 3, 4});
       }},
      {"bias.stride[3] = 2: must be 1, or 0",
       [](Args& a) {
         a.bias = floats({1, 1, 3, 5}), a.bias.stride[3] = 2;
       }},
      {"bias_dtype = f16 must be f32",
       [](Args& a) {
         a.bias = floats({1, 1, 3, 5}), a.bias.dtype = HEED_DTYPE_F16;
       }},
      {"mask.dtype = f32: must be bool",
       [](Args& a) {
         a.mask = floats({2, 4, 3, 5});
       }},
      {"mask.ndim = 2: must be 4",
       [](Args& a) {
         a.mask = floats({3, 5});
       }},
      {"alibi_slopes.shape[0] = 2: must equal q.shape[2] = 4 (nheads_q)",
       [](Args& a) { a.alibi_slopes = floats({2}); }},
      {"alibi_slopes.dtype = i32: must be f32",
       [](Args& a) {
         a.alibi_slopes = numbers({2, 4});
       }},
      {"sinks.shape[0] = 2: must equal q.shape[2] = 4", [](Args& a) { a.sinks = floats({2}); }},
      {"seqused_k.shape[0] = 3: must equal q.shape[0] = 2 (batch)", [](Args& a) { a.seqused_k = numbers({3}); }},
      {"seqused_q.dtype = f32: must be i32", [](Args& a) { a.seqused_q = floats({2}); }},
      {"leftpad_k.stride[0] = 2: must be 1", [](Args& a) { a.leftpad_k = numbers({2}), a.leftpad_k.stride[0] = 2; }},
      {"status.ndim = 2: must be 1, [batch]",
       [](Args& a) {
         a.status = numbers({2, 1});
       }},
  });
}

TEST(Errors, WhatGoesTogether) {
  run_cases({
      {"dq: given (dtype f32); only in the backward pass",
       [](Args& a) {
         a.dq = floats({2, 3, 4, 8});
       }},
      {"dout: given",
       [](Args& a) {
         a.dout = floats({2, 3, 4, 16});
       }},
      {"cu_seqlens_q: given (dtype i32); only with layout thd", [](Args& a) { a.cu_seqlens_q = numbers({3}); }},
      {"cu_seqlens_k: given", [](Args& a) { a.cu_seqlens_k = numbers({3}); }},
      {"cu_seqlens_q: absent (dtype none); layout_q thd needs it",
       [](Args& a) {
         a.layout_q = HEED_LAYOUT_THD, a.q = floats({6, 4, 8}), a.out = floats({6, 4, 16});
       }},
      {"page_table: given (dtype i32); layout_kv is of one page",
       [](Args& a) {
         a.layout_kv = HEED_LAYOUT_THD, a.cu_seqlens_k = numbers({3}), a.page_table = numbers({2, 3});
       }},
      {"cache_batch_idx: given (dtype i32); packed keys",
       [](Args& a) { a.layout_kv = HEED_LAYOUT_THD, a.cu_seqlens_k = numbers({3}), a.cache_batch_idx = numbers({2}); }},
      {"page_table.shape[0] = 3: must equal q.shape[0] = 2 (batch)",
       [](Args& a) {
         a.page_table = numbers({3, 2});
       }},
      {"page_size = 0: must be at least 1",
       [](Args& a) {
         a.page_table = numbers({2, 2}), a.k.shape[1] = a.v.shape[1] = 0;
       }},
      {"k.shape[0] = 0: must be at least 1, cache_batch_idx reads rows of it",
       [](Args& a) { a.cache_batch_idx = numbers({2}), a.k.shape[0] = a.v.shape[0] = 0; }},
      {"overflow 64 bits",
       [](Args& a) {
         a.page_table = numbers({2, 2}), a.page_table.shape[1] = int64_t{1} << 62;
       }},
  });
}

void packed(Args& a) {
  a.layout_q = a.layout_kv = HEED_LAYOUT_THD;
  a.q = floats({6, 4, 8});
  a.k = floats({10, 2, 8});
  a.v = floats({10, 2, 16});
  void* const out = a.out.data;
  a.out = tensor_of(out, kF32, {6, 4, 16});
  a.cu_seqlens_q = numbers({3});
  a.cu_seqlens_k = numbers({3});
}

TEST(Errors, Packed) {
  run_cases(
      {
          {"cu_seqlens_k.shape[0] = 4: must equal cu_seqlens_q.shape[0] = 3 (batch)",
           [](Args& a) { a.cu_seqlens_k = numbers({4}); }},
          {"cu_seqlens_q.shape[0] = 0: must be batch + 1", [](Args& a) { a.cu_seqlens_q = numbers({0}); }},
          {"cu_seqlens_q.dtype = f32: must be i32", [](Args& a) { a.cu_seqlens_q = floats({3}); }},
          {"q.ndim = 4: must be 3, [total_q, nheads_q, head_dim]", [](Args& a) { a.q.ndim = 4; }},
          {"out.shape[0] = 5: must equal q.shape[0] = 6 (total_q)", [](Args& a) { a.out.shape[0] = 5; }},
          {"lse.ndim = 3: must be 2, [nheads_q, total_q]",
           [](Args& a) {
             a.lse = floats({2, 4, 3});
           }},
          {"cu_seqlens_k = NULL must be an address", [](Args& a) { a.cu_seqlens_k.data = nullptr; }},
          {"seqused_k.shape[0] = 3: must equal cu_seqlens_q.shape[0] - 1 = 2 (batch)",
           [](Args& a) { a.seqused_k = numbers({3}); }},
      },
      packed);
}

void backward(Args& a) {
  a.pass = HEED_PASS_BACKWARD;
  a.lse = floats({2, 4, 3});
  a.dout = floats({2, 3, 4, 16});
  a.dq = tensor_of(g_floats + 2048, kF32, {2, 3, 4, 8});
}

TEST(Errors, Backward) {
  run_cases(
      {
          {"lse: absent (dtype none); the backward pass reads it", [](Args& a) { a.lse = {}; }},
          {"dout: absent", [](Args& a) { a.dout = {}; }},
          {"one of dq, dk, dv, dbias, dsinks, dalibi_slopes must be present", [](Args& a) { a.dq = {}; }},
          {"dq.shape[3] = 16: must equal q.shape[3] = 8 (head_dim)",
           [](Args& a) {
             a.dq = floats({2, 3, 4, 16});
           }},
          {"dq.dtype = bf16: must be f32", [](Args& a) { a.dq.dtype = HEED_DTYPE_BF16; }},
          {"dbias: given (dtype f32); there is no bias",
           [](Args& a) {
             a.dbias = floats({2, 4, 3, 5});
           }},
          {"dsinks: given (dtype f32); there are no sinks", [](Args& a) { a.dsinks = floats({4}); }},
          {"dalibi_slopes: given", [](Args& a) { a.dalibi_slopes = floats({4}); }},
          {"dbias.shape[0] = 2: must be 1, as bias is broadcast there",
           [](Args& a) {
             a.bias = floats({1, 4, 3, 5}), a.dbias = floats({2, 4, 3, 5});
           }},
          {"dbias.shape[1] = 1: must be 4, as bias has",
           [](Args& a) {
             a.bias = floats({1, 4, 3, 5}), a.dbias = floats({1, 1, 3, 5});
           }},
          {"dalibi_slopes.ndim = 1: must be 2",
           [](Args& a) {
             a.alibi_slopes = floats({2, 4}), a.dalibi_slopes = floats({4});
           }},
          {"page_size = 5 must be 0 in the backward pass",
           [](Args& a) {
             a.page_table = numbers({2, 2});
           }},
          {"splits = 2 must be 0 in the backward pass", [](Args& a) { a.num_splits = 2; }},
      },
      backward);
}

TEST(Errors, HowToRun) {
  static heed_executor executor = *heed_executor_serial();
  static heed_allocator allocator = {sizeof(heed_allocator), nullptr, nullptr, [](void*, void*, size_t, void*) {}};
  run_cases({
      {"executor.struct_size = 8", [](Args& a) { executor.struct_size = 8, a.executor = &executor; }},
      {"executor.num_threads = 0: must be at least 1",
       [](Args& a) { executor = *heed_executor_serial(), executor.num_threads = 0, a.executor = &executor; }},
      {"executor.run = NULL",
       [](Args& a) { executor = *heed_executor_serial(), executor.run = nullptr, a.executor = &executor; }},
      {"allocator.struct_size = 3", [](Args& a) { allocator.struct_size = 3, a.allocator = &allocator; }},
  });
}

// A plan that needs memory, whatever the machine: more workers than one, each with scratch.
TEST(Errors, Workspace) {
  SmallAttention small;
  heed_problem* problem = nullptr;
  heed_plan* plan = nullptr;
  small.args.num_threads = 1;
  ASSERT_EQ(heed_attention_problem(&small.args, &problem), HEED_OK) << heed_last_error();
  ASSERT_EQ(heed_plan_create(problem, nullptr, &plan), HEED_OK) << heed_last_error();
  if (heed_plan_workspace_bytes(plan) == 0) GTEST_SKIP() << "the plan needs no workspace";
  alignas(64) static char memory[128];
  EXPECT_EQ(heed_attention_run(plan, &small.args), HEED_INVALID_ARGUMENT);
  EXPECT_NE(std::string(heed_last_error()).find("workspace = NULL must be an address"), std::string::npos);
  small.args.workspace = memory;
  small.args.workspace_bytes = 64;
  EXPECT_EQ(heed_attention_run(plan, &small.args), HEED_INVALID_ARGUMENT);
  EXPECT_NE(std::string(heed_last_error()).find("workspace_bytes = 64 must be at least"), std::string::npos);
  EXPECT_EQ(heed_attention(&small.args, nullptr), HEED_INVALID_ARGUMENT) << "the one-call form uses what it is given";
  small.args.workspace = memory + 1;
  small.args.workspace_bytes = size_t{1} << 40;
  EXPECT_EQ(heed_attention_run(plan, &small.args), HEED_INVALID_ARGUMENT);
  EXPECT_NE(std::string(heed_last_error()).find("must be a multiple of 64 bytes"), std::string::npos);

  static heed_allocator none = {sizeof none, nullptr, [](void*, size_t, size_t, void*) -> void* { return nullptr; },
                                [](void*, void*, size_t, void*) {}};
  small.args.workspace = nullptr;
  small.args.workspace_bytes = 0;
  small.args.allocator = &none;
  EXPECT_EQ(heed_attention(&small.args, nullptr), HEED_OUT_OF_MEMORY);
  EXPECT_NE(std::string(heed_last_error()).find("workspace: no memory for"), std::string::npos);
  none.deallocate = nullptr;
  EXPECT_EQ(heed_attention(&small.args, nullptr), HEED_INVALID_ARGUMENT);
  EXPECT_TRUE(small.out_untouched());
  heed_plan_destroy(plan);
  heed_problem_destroy(problem);
}

TEST(Errors, AnotherProblemThanPlanned) {
  SmallAttention small;
  heed_problem* problem = nullptr;
  heed_plan* plan = nullptr;
  ASSERT_EQ(heed_attention_problem(&small.args, &problem), HEED_OK);
  ASSERT_EQ(heed_plan_create(problem, nullptr, &plan), HEED_OK);
  const auto expect = [&](const char* part, const std::function<void(Args&)>& change) {
    SmallAttention other;
    other.args.q.data = small.args.q.data, other.args.k.data = small.args.k.data, other.args.v.data = small.args.v.data;
    change(other.args);
    EXPECT_EQ(heed_attention_run(plan, &other.args), HEED_INVALID_ARGUMENT);
    EXPECT_NE(std::string(heed_last_error()).find(part), std::string::npos) << part << "\n" << heed_last_error();
    EXPECT_TRUE(other.out_untouched());
  };
  expect("`causal` is in theirs only", [](Args& a) { a.causal = 1; });
  expect("`sk=4` is in theirs only; `sk=5` is in the plan's only", [](Args& a) { a.k.shape[1] = a.v.shape[1] = 4; });
  expect("strides.k", [](Args& a) { a.k.stride[1] = 20, a.k.shape[0] = a.v.shape[0] = 2; });
  expect("softcap", [](Args& a) { a.softcap = 3; });
  expect("lse", [](Args& a) { a.lse = floats({2, 4, 3}); });
  heed_plan_destroy(plan);
  heed_problem_destroy(problem);

  heed_kv_append_args append;
  heed_kv_append_args_init(&append);
  ASSERT_EQ(heed_problem_parse("kv_append b=1 hkv=1 sn=1 sk=8 d=8 f32", &problem), HEED_OK) << heed_last_error();
  const heed_plan_options ref = {sizeof ref, "ref"};
  ASSERT_EQ(heed_plan_create(problem, &ref, &plan), HEED_OK) << heed_last_error();
  EXPECT_EQ(heed_attention_run(plan, &small.args), HEED_INVALID_ARGUMENT);
  EXPECT_STREQ(heed_last_error(), "plan: made for another op, must be of attention");
  heed_plan_destroy(plan);
  heed_problem_destroy(problem);
}

TEST(Errors, StructSize) {
  SmallAttention small;
  small.args.struct_size = 0;
  EXPECT_EQ(heed_attention(&small.args, nullptr), HEED_INVALID_ARGUMENT);
  EXPECT_NE(std::string(heed_last_error()).find("args.struct_size = 0: must be the struct's size"), std::string::npos);
  small.args.struct_size = sizeof small.args - 8;
  EXPECT_EQ(heed_attention(&small.args, nullptr), HEED_INVALID_ARGUMENT);

  // A later version's longer struct: fine while what it adds is zero.
  std::vector<char> longer(sizeof small.args + 24, 0);
  small.args.struct_size = longer.size();
  std::memcpy(longer.data(), &small.args, sizeof small.args);
  auto* const args = reinterpret_cast<heed_attention_args*>(longer.data());
  EXPECT_EQ(heed_attention(args, nullptr), HEED_OK) << heed_last_error();
  longer[sizeof small.args + 9] = 1;
  EXPECT_EQ(heed_attention(args, nullptr), HEED_NOT_SUPPORTED);
  EXPECT_NE(std::string(heed_last_error()).find("knows only the first"), std::string::npos);

  heed_plan_options options = {};
  small.args.struct_size = sizeof small.args;
  EXPECT_EQ(heed_attention(&small.args, &options), HEED_INVALID_ARGUMENT);
  heed_verdict verdict = {};
  heed_problem* problem = nullptr;
  ASSERT_EQ(heed_attention_problem(&small.args, &problem), HEED_OK);
  EXPECT_EQ(heed_verdict_get(problem, nullptr, 0, &verdict), HEED_INVALID_ARGUMENT);
  heed_problem_destroy(problem);
  heed_plan_cache_stats stats = {};
  EXPECT_EQ(heed_plan_cache_get(&stats), HEED_INVALID_ARGUMENT);
  heed_config_entry entry = {};
  EXPECT_EQ(heed_config_get(0, &entry), HEED_INVALID_ARGUMENT);
}

TEST(Errors, NullPointers) {
  SmallAttention small;
  heed_problem* problem = nullptr;
  heed_plan* plan = nullptr;
  ASSERT_EQ(heed_attention_problem(&small.args, &problem), HEED_OK);
  EXPECT_EQ(heed_problem_parse(nullptr, &problem), HEED_INVALID_ARGUMENT);
  EXPECT_STREQ(heed_last_error(), "line = NULL: must be an address");
  EXPECT_EQ(heed_problem_parse("attention sq=1 sk=1 d=8", nullptr), HEED_INVALID_ARGUMENT);
  EXPECT_EQ(heed_problem_print(nullptr, nullptr, 0, nullptr), HEED_INVALID_ARGUMENT);
  EXPECT_EQ(heed_plan_create(nullptr, nullptr, &plan), HEED_INVALID_ARGUMENT);
  EXPECT_EQ(heed_plan_create(problem, nullptr, nullptr), HEED_INVALID_ARGUMENT);
  EXPECT_EQ(heed_plan_print(nullptr, nullptr, 0, nullptr), HEED_INVALID_ARGUMENT);
  EXPECT_EQ(heed_explain(nullptr, nullptr, nullptr, 0, nullptr), HEED_INVALID_ARGUMENT);
  EXPECT_EQ(heed_verdict_get(nullptr, nullptr, 0, nullptr), HEED_INVALID_ARGUMENT);
  EXPECT_EQ(heed_verdict_get(problem, nullptr, 0, nullptr), HEED_INVALID_ARGUMENT);
  EXPECT_EQ(heed_attention(nullptr, nullptr), HEED_INVALID_ARGUMENT);
  EXPECT_EQ(heed_attention_run(nullptr, &small.args), HEED_INVALID_ARGUMENT);
  EXPECT_EQ(heed_attention_problem(nullptr, &problem), HEED_INVALID_ARGUMENT);
  EXPECT_EQ(heed_attention_problem(&small.args, nullptr), HEED_INVALID_ARGUMENT);
  EXPECT_EQ(heed_attention_validate(nullptr), HEED_INVALID_ARGUMENT);
  EXPECT_EQ(heed_kv_append(nullptr, nullptr), HEED_INVALID_ARGUMENT);
  EXPECT_EQ(heed_kv_append_validate(nullptr), HEED_INVALID_ARGUMENT);
  EXPECT_EQ(heed_config_get(0, nullptr), HEED_INVALID_ARGUMENT);
  EXPECT_EQ(heed_plan_cache_get(nullptr), HEED_INVALID_ARGUMENT);
  EXPECT_EQ(heed_verdict_count(nullptr), 0);
  EXPECT_STREQ(heed_problem_op(nullptr), "");
  EXPECT_STREQ(heed_plan_impl(nullptr), "");
  EXPECT_EQ(heed_plan_workspace_bytes(nullptr), 0u);
  heed_problem_destroy(nullptr);
  heed_plan_destroy(nullptr);
  heed_attention_args_init(nullptr);
  heed_problem_destroy(problem);
}

TEST(Errors, IndicesAndBackends) {
  SmallAttention small;
  heed_problem* problem = nullptr;
  ASSERT_EQ(heed_attention_problem(&small.args, &problem), HEED_OK);
  heed_verdict verdict = {};
  verdict.struct_size = sizeof verdict;
  EXPECT_EQ(heed_verdict_get(problem, nullptr, -1, &verdict), HEED_INVALID_ARGUMENT);
  EXPECT_EQ(heed_verdict_get(problem, nullptr, heed_verdict_count(problem), &verdict), HEED_INVALID_ARGUMENT);
  const heed_plan_options unknown = {sizeof unknown, "cpu/attention_fwd_sse"};
  heed_plan* plan = nullptr;
  EXPECT_EQ(heed_plan_create(problem, &unknown, &plan), HEED_NOT_FOUND);
  EXPECT_NE(std::string(heed_last_error()).find("cpu/attention_fwd_avx2"), std::string::npos);
  EXPECT_EQ(plan, nullptr);
  const heed_plan_options other_pass = {sizeof other_pass, "cpu/attention_bwd_generic"};
  EXPECT_EQ(heed_attention(&small.args, &other_pass), HEED_NOT_SUPPORTED);
  EXPECT_TRUE(small.out_untouched());
  EXPECT_EQ(heed_set_log(nullptr, nullptr, 4), HEED_INVALID_ARGUMENT);
  heed_problem_destroy(problem);
}

// ---- data that only validate reads ----

void expect_invalid(const heed_attention_args& args, const char* message) {
  EXPECT_EQ(heed_attention_validate(&args), HEED_INVALID_ARGUMENT);
  EXPECT_NE(std::string(heed_last_error()).find(message), std::string::npos)
      << "want: " << message << "\ngot:  " << heed_last_error();
}

TEST(Validate, LengthsOfAttention) {
  SmallAttention small;
  EXPECT_EQ(heed_attention_validate(&small.args), HEED_OK) << heed_last_error();
  int32_t used_q[2] = {3, 4}, used_k[2] = {5, 5}, leftpad[2] = {0, 6}, rows[2] = {1, 2};
  small.args.seqused_q = tensor_of(used_q, kI32, {2});
  expect_invalid(small.args, "seqused_q[1] = 4: must be from 0 to 3");
  used_q[1] = 3;
  small.args.seqused_k = tensor_of(used_k, kI32, {2});
  used_k[0] = -1;
  expect_invalid(small.args, "seqused_k[0] = -1: must be from 0 to 5");
  used_k[0] = 2;
  small.args.leftpad_k = tensor_of(leftpad, kI32, {2});
  expect_invalid(small.args, "leftpad_k[1] = 6: must be from 0 to 5");
  leftpad[1] = 5;
  small.args.cache_batch_idx = tensor_of(rows, kI32, {2});
  expect_invalid(small.args, "cache_batch_idx[1] = 2: must be from 0 to 1");
  rows[1] = 0;
  EXPECT_EQ(heed_attention_validate(&small.args), HEED_OK) << heed_last_error();
}

TEST(Validate, OffsetsOfAttention) {
  SmallAttention small;
  packed(small.args);
  int32_t cu_q[3] = {0, 2, 6}, cu_k[3] = {0, 8, 4};
  small.args.cu_seqlens_q = tensor_of(cu_q, kI32, {3});
  small.args.cu_seqlens_k = tensor_of(cu_k, kI32, {3});
  expect_invalid(small.args, "cu_seqlens_k[2] = 4: must be from 8 to 10");
  cu_k[2] = 11;
  expect_invalid(small.args, "cu_seqlens_k[2] = 11");
  cu_k[2] = 10;
  cu_q[0] = -1;
  expect_invalid(small.args, "cu_seqlens_q[0] = -1: must be from 0 to 6");
  cu_q[0] = 0;
  EXPECT_EQ(heed_attention_validate(&small.args), HEED_OK) << heed_last_error();
}

TEST(Validate, PagesOfAttention) {
  SmallAttention small;
  int32_t table[6] = {0, 1, 7, 1, 2, -5}, used[2] = {10, 6};
  small.args.k = floats({3, 5, 2, 8});  // three pages of five keys
  small.args.v = floats({3, 5, 2, 16});
  small.args.page_table = tensor_of(table, kI32, {2, 3});
  small.args.seqused_k = tensor_of(used, kI32, {2});
  EXPECT_EQ(heed_attention_validate(&small.args), HEED_OK)
      << heed_last_error() << ": entries past the length are never read";
  used[0] = 11;
  expect_invalid(small.args, "page_table[0, 2] = 7: must be from 0 to 2 (num_pages - 1); 11 keys need it");
  used[0] = 5;
  used[1] = 15;
  expect_invalid(small.args, "page_table[1, 2] = -5");
}

}  // namespace
}  // namespace heed
