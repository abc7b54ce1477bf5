// Every error of the C interface's kv_append functions, provoked: its code, and that the sentence names the argument,
// its value and what is allowed.
#include <gtest/gtest.h>

#include <functional>
#include <string>

#include "heed/heed.h"
#include "small_attention.h"

namespace heed {
namespace {

constexpr heed_dtype kF32 = HEED_DTYPE_F32, kI32 = HEED_DTYPE_I32;

float g_floats[4096];
int32_t g_numbers[64];

heed_tensor floats(std::initializer_list<int64_t> shape) { return tensor_of(g_floats, kF32, shape); }
heed_tensor numbers(std::initializer_list<int64_t> shape) { return tensor_of(g_numbers, kI32, shape); }

struct SmallAppend {
  int32_t lengths[2] = {3, 0};
  heed_kv_append_args args;

  SmallAppend() {
    heed_kv_append_args_init(&args);
    args.k_cache = tensor_of(g_floats, kF32, {2, 6, 2, 8});
    args.v_cache = tensor_of(g_floats + 1024, kF32, {2, 6, 2, 4});
    args.k_new = tensor_of(g_floats + 2048, kF32, {2, 2, 2, 8});
    args.v_new = tensor_of(g_floats + 3072, kF32, {2, 2, 2, 4});
    args.cache_seqlens = tensor_of(lengths, kI32, {2});
  }
};

TEST(Errors, OfKvAppend) {
  using AppendArgs = heed_kv_append_args;
  struct AppendCase {
    const char* message;
    std::function<void(AppendArgs&)> spoil;
  };
  const AppendCase cases[] = {
      {"layout_new = 3: must be", [](AppendArgs& a) { a.layout_new = 3; }},
      {"layout_cache = 2: must be 0 (bshd) or 1 (bhsd)", [](AppendArgs& a) { a.layout_cache = 2; }},
      {"device = 9: must be 0 (cpu) or 1 (cuda)", [](AppendArgs& a) { a.device = 9; }},
      {"rotary_style = 2: must be", [](AppendArgs& a) { a.rotary_style = 2; }},
      {"q_positions = 2: must be", [](AppendArgs& a) { a.q_positions = 2; }},
      {"k_cache: absent", [](AppendArgs& a) { a.k_cache = {}; }},
      {"v_cache: absent", [](AppendArgs& a) { a.v_cache = {}; }},
      {"cache_seqlens: absent", [](AppendArgs& a) { a.cache_seqlens = {}; }},
      {"v_new: absent (dtype none); k_new is given", [](AppendArgs& a) { a.v_new = {}; }},
      {"v_new: given (dtype f32); k_new is not", [](AppendArgs& a) { a.k_new = {}; }},
      {"rotary_sin: absent",
       [](AppendArgs& a) {
         a.rotary_cos = floats({8, 2});
       }},
      {"q: given (dtype f32); without rotary_cos nothing turns it",
       [](AppendArgs& a) {
         a.q = floats({2, 1, 4, 8}), a.q_out = floats({2, 1, 4, 8});
       }},
      {"q_out: absent",
       [](AppendArgs& a) {
         a.q = floats({2, 1, 4, 8});
       }},
      {"rotary_seqlens: given", [](AppendArgs& a) { a.rotary_seqlens = numbers({2}); }},
      {"rotary_cos.shape[1] = 5: must be rotary_dim / 2, from 1 to 4",
       [](AppendArgs& a) {
         a.rotary_cos = a.rotary_sin = floats({8, 5});
       }},
      {"rotary_dtype = f16 must be f32",
       [](AppendArgs& a) {
         a.rotary_cos = a.rotary_sin = tensor_of(g_floats, HEED_DTYPE_F16, {8, 2});
       }},
      {"rotary_sin.shape[0] = 7: must equal rotary_cos.shape[0] = 8",
       [](AppendArgs& a) {
         a.rotary_cos = floats({8, 2}), a.rotary_sin = floats({7, 2});
       }},
      {"k_new.shape[3] = 4: must equal k_cache.shape[3] = 8 (head_dim)", [](AppendArgs& a) { a.k_new.shape[3] = 4; }},
      {"k_new.dtype = bf16: must be f32", [](AppendArgs& a) { a.k_new.dtype = HEED_DTYPE_BF16; }},
      {"cu_seqlens_new: given", [](AppendArgs& a) { a.cu_seqlens_new = numbers({3}); }},
      {"cu_seqlens_new: absent",
       [](AppendArgs& a) {
         a.layout_new = 2, a.k_new = floats({4, 2, 8}), a.v_new = floats({4, 2, 4});
       }},
      {"num_threads = -2", [](AppendArgs& a) { a.num_threads = -2; }},
      {"cache_seqlens = NULL must be an address", [](AppendArgs& a) { a.cache_seqlens.data = nullptr; }},
      {"struct_size = 1", [](AppendArgs& a) { a.struct_size = 1; }},
  };
  const heed_plan_options ref = {sizeof ref, "ref"};
  for (const AppendCase& c : cases) {
    SmallAppend small;
    c.spoil(small.args);
    EXPECT_EQ(heed_kv_append(&small.args, &ref), HEED_INVALID_ARGUMENT) << c.message;
    EXPECT_NE(std::string(heed_last_error()).find(c.message), std::string::npos)
        << "want: " << c.message << "\ngot:  " << heed_last_error();
  }
  SmallAppend small;
  EXPECT_EQ(heed_kv_append(&small.args, &ref), HEED_OK) << heed_last_error();
}

TEST(Validate, DataOfKvAppend) {
  SmallAppend small;
  EXPECT_EQ(heed_kv_append_validate(&small.args), HEED_OK) << heed_last_error();
  const auto expect = [&](const char* message) {
    EXPECT_EQ(heed_kv_append_validate(&small.args), HEED_INVALID_ARGUMENT);
    EXPECT_NE(std::string(heed_last_error()).find(message), std::string::npos)
        << "want: " << message << "\ngot:  " << heed_last_error();
  };
  small.lengths[0] = 7;
  expect("cache_seqlens[0] = 7: must be from 0 to 6");
  small.lengths[0] = 5;
  expect("cache_seqlens[0] = 5: must leave room for 2 new keys in a capacity of 6");
  small.lengths[0] = 3;
  int32_t leftpad[2] = {4, 0};
  small.args.leftpad_k = tensor_of(leftpad, kI32, {2});
  expect("leftpad_k[0] = 4: must be from 0 to 3");
  leftpad[0] = 0;
  small.args.rotary_cos = small.args.rotary_sin = floats({4, 2});
  expect("cache_seqlens[0] = 3: positions 3 to 4 must be rows of rotary_cos, 0 to 3");
  int32_t starts[2] = {-1, 0};
  small.args.rotary_seqlens = tensor_of(starts, kI32, {2});
  expect("rotary_seqlens[0] = -1");
  starts[0] = 2;
  int32_t rows[2] = {0, 2};
  small.args.cache_batch_idx = tensor_of(rows, kI32, {2});
  expect("cache_batch_idx[1] = 2: must be from 0 to 1");
  rows[1] = 1;
  EXPECT_EQ(heed_kv_append_validate(&small.args), HEED_OK) << heed_last_error();
  int32_t table[4] = {0, 1, 9, 1};
  small.args.page_table = tensor_of(table, kI32, {2, 2});  // two pages of six keys
  expect("page_table[1, 0] = 9: must be from 0 to 1");
}

}  // namespace
}  // namespace heed
