// The tensors of the argument structs: their names, where they are, what they have to be.
#pragma once

#include "heed/heed.h"

namespace heed_python {

// What a tensor has to be, for the sentence where it is something else.
enum class Expected { kFloat, kInt32, kBool, kInt64 };

template <class Struct>
struct TensorField {
  const char* name;
  heed_tensor Struct::*member;
  Expected expected;
  bool is_output;  // of the forward pass; the backward pass reads out and lse
};

inline constexpr TensorField<heed_attention_args> kAttentionTensors[] = {
    {"q", &heed_attention_args::q, Expected::kFloat, false},
    {"k", &heed_attention_args::k, Expected::kFloat, false},
    {"v", &heed_attention_args::v, Expected::kFloat, false},
    {"bias", &heed_attention_args::bias, Expected::kFloat, false},
    {"mask", &heed_attention_args::mask, Expected::kBool, false},
    {"alibi_slopes", &heed_attention_args::alibi_slopes, Expected::kFloat, false},
    {"sinks", &heed_attention_args::sinks, Expected::kFloat, false},
    {"cu_seqlens_q", &heed_attention_args::cu_seqlens_q, Expected::kInt32, false},
    {"cu_seqlens_k", &heed_attention_args::cu_seqlens_k, Expected::kInt32, false},
    {"seqused_q", &heed_attention_args::seqused_q, Expected::kInt32, false},
    {"seqused_k", &heed_attention_args::seqused_k, Expected::kInt32, false},
    {"leftpad_k", &heed_attention_args::leftpad_k, Expected::kInt32, false},
    {"page_table", &heed_attention_args::page_table, Expected::kInt32, false},
    {"cache_batch_idx", &heed_attention_args::cache_batch_idx, Expected::kInt32, false},
    {"out", &heed_attention_args::out, Expected::kFloat, true},
    {"lse", &heed_attention_args::lse, Expected::kFloat, true},
    {"dout", &heed_attention_args::dout, Expected::kFloat, false},
    {"dlse", &heed_attention_args::dlse, Expected::kFloat, false},
    {"dq", &heed_attention_args::dq, Expected::kFloat, true},
    {"dk", &heed_attention_args::dk, Expected::kFloat, true},
    {"dv", &heed_attention_args::dv, Expected::kFloat, true},
    {"dbias", &heed_attention_args::dbias, Expected::kFloat, true},
    {"dsinks", &heed_attention_args::dsinks, Expected::kFloat, true},
    {"dalibi_slopes", &heed_attention_args::dalibi_slopes, Expected::kFloat, true},
    {"status", &heed_attention_args::status, Expected::kInt32, true},
};

inline constexpr TensorField<heed_kv_append_args> kKvAppendTensors[] = {
    {"k_new", &heed_kv_append_args::k_new, Expected::kFloat, false},
    {"v_new", &heed_kv_append_args::v_new, Expected::kFloat, false},
    {"k_cache", &heed_kv_append_args::k_cache, Expected::kFloat, true},
    {"v_cache", &heed_kv_append_args::v_cache, Expected::kFloat, true},
    {"q", &heed_kv_append_args::q, Expected::kFloat, false},
    {"q_out", &heed_kv_append_args::q_out, Expected::kFloat, true},
    {"rotary_cos", &heed_kv_append_args::rotary_cos, Expected::kFloat, false},
    {"rotary_sin", &heed_kv_append_args::rotary_sin, Expected::kFloat, false},
    {"cu_seqlens_new", &heed_kv_append_args::cu_seqlens_new, Expected::kInt32, false},
    {"cu_seqlens_q", &heed_kv_append_args::cu_seqlens_q, Expected::kInt32, false},
    {"cache_seqlens", &heed_kv_append_args::cache_seqlens, Expected::kInt32, false},
    {"rotary_seqlens", &heed_kv_append_args::rotary_seqlens, Expected::kInt32, false},
    {"leftpad_k", &heed_kv_append_args::leftpad_k, Expected::kInt32, false},
    {"page_table", &heed_kv_append_args::page_table, Expected::kInt32, false},
    {"cache_batch_idx", &heed_kv_append_args::cache_batch_idx, Expected::kInt32, false},
    {"status", &heed_kv_append_args::status, Expected::kInt32, true},
};

}  // namespace heed_python
