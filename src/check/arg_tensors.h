// The tensors of an argument struct, one by one, with their names.
#pragma once

#include "heed/attention.h"

namespace heed::check {

// visit(name, heed_tensor&) for every tensor member, absent ones included.
template <class Visit>
void for_each_tensor(heed_attention_args& a, Visit&& visit) {
  visit("q", a.q), visit("k", a.k), visit("v", a.v);
  visit("bias", a.bias), visit("mask", a.mask), visit("alibi_slopes", a.alibi_slopes), visit("sinks", a.sinks);
  visit("cu_seqlens_q", a.cu_seqlens_q), visit("cu_seqlens_k", a.cu_seqlens_k);
  visit("seqused_q", a.seqused_q), visit("seqused_k", a.seqused_k), visit("leftpad_k", a.leftpad_k);
  visit("page_table", a.page_table), visit("cache_batch_idx", a.cache_batch_idx);
  visit("out", a.out), visit("lse", a.lse), visit("dout", a.dout), visit("dlse", a.dlse);
  visit("dq", a.dq), visit("dk", a.dk), visit("dv", a.dv), visit("dbias", a.dbias);
  visit("dsinks", a.dsinks), visit("dalibi_slopes", a.dalibi_slopes), visit("status", a.status);
}

template <class Visit>
void for_each_tensor(heed_kv_append_args& a, Visit&& visit) {
  visit("k_new", a.k_new), visit("v_new", a.v_new), visit("k_cache", a.k_cache), visit("v_cache", a.v_cache);
  visit("q", a.q), visit("q_out", a.q_out), visit("rotary_cos", a.rotary_cos), visit("rotary_sin", a.rotary_sin);
  visit("cu_seqlens_new", a.cu_seqlens_new), visit("cu_seqlens_q", a.cu_seqlens_q);
  visit("cache_seqlens", a.cache_seqlens), visit("rotary_seqlens", a.rotary_seqlens), visit("leftpad_k", a.leftpad_k);
  visit("page_table", a.page_table), visit("cache_batch_idx", a.cache_batch_idx), visit("status", a.status);
}

}  // namespace heed::check
