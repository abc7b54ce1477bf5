"""FlashAttention-2's public functions: flash_attn.flash_attn_interface.

Layouts: dense (batch, seqlen, nheads, headdim), packed (total, nheads, headdim) with cu_seqlens int32 (batch + 1,);
causal and window_size (left, right), inclusive, are aligned bottom right. float32 is taken besides float16 and
bfloat16, any headdim from 1 to 512, on the CPU too. return_attn_probs gives (out, softmax_lse, None); softmax_lse
float32 (batch, nheads, seqlen_q), packed (nheads, total_q), is -inf where a row sees nothing.
"""

from ._calls import forward, hint, lengths_of, refuse_probabilities, with_kvcache

__all__ = ["flash_attn_func", "flash_attn_kvpacked_func", "flash_attn_qkvpacked_func", "flash_attn_varlen_func",
           "flash_attn_varlen_kvpacked_func", "flash_attn_varlen_qkvpacked_func", "flash_attn_with_kvcache"]


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                    alibi_slopes=None, deterministic=False, return_attn_probs=False):
    """q (batch, seqlen_q, nheads, headdim), k and v (batch, seqlen_k, nheads_k, headdim); alibi_slopes float32
    (nheads,) or (batch, nheads). Gives out, or (out, softmax_lse, None)."""
    refuse_probabilities(dropout_p, return_attn_probs)
    result = forward(q, k, v, window_size=window_size, dropout_p=dropout_p, softmax_scale=softmax_scale, causal=causal,
                     softcap=max(softcap, 0.0), alibi_slopes=alibi_slopes, deterministic=deterministic,
                     return_lse=return_attn_probs)
    return (*result, None) if return_attn_probs else result


def flash_attn_qkvpacked_func(qkv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                              alibi_slopes=None, deterministic=False, return_attn_probs=False):
    """flash_attn_func of qkv (batch, seqlen, 3, nheads, headdim)."""
    return flash_attn_func(*qkv.unbind(2), dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
                           deterministic, return_attn_probs)


def flash_attn_kvpacked_func(q, kv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                             alibi_slopes=None, deterministic=False, return_attn_probs=False):
    """flash_attn_func of q and kv (batch, seqlen_k, 2, nheads_k, headdim)."""
    return flash_attn_func(q, *kv.unbind(2), dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
                           deterministic, return_attn_probs)


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                           softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
                           deterministic=False, return_attn_probs=False, block_table=None):
    """q (total_q, nheads, headdim), k and v (total_k, nheads_k, headdim), or with block_table int32 (batch, max_blocks)
    (num_blocks, block_size, nheads_k, headdim), of which cu_seqlens_k then gives the lengths."""
    refuse_probabilities(dropout_p, return_attn_probs)
    keys = dict(cu_seqlens_k=cu_seqlens_k, max_seqlen_k=hint(max_seqlen_k))
    if block_table is not None:
        keys = dict(page_table=block_table, seqused_k=lengths_of(cu_seqlens_k), layout_kv="bshd")
    result = forward(q, k, v, window_size=window_size, dropout_p=dropout_p, softmax_scale=softmax_scale, causal=causal,
                     softcap=max(softcap, 0.0), alibi_slopes=alibi_slopes, deterministic=deterministic,
                     cu_seqlens_q=cu_seqlens_q, max_seqlen_q=hint(max_seqlen_q), return_lse=return_attn_probs,
                     names={"window": "window_size", "page_table": "block_table", "seqused_k": "cu_seqlens_k"}, **keys)
    return (*result, None) if return_attn_probs else result


def flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, dropout_p=0.0, softmax_scale=None, causal=False,
                                     window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
                                     return_attn_probs=False):
    """flash_attn_varlen_func of qkv (total, 3, nheads, headdim)."""
    return flash_attn_varlen_func(*qkv.unbind(1), cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p,
                                  softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
                                  return_attn_probs)


def flash_attn_varlen_kvpacked_func(q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                                    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                                    alibi_slopes=None, deterministic=False, return_attn_probs=False):
    """flash_attn_varlen_func of q and kv (total_k, 2, nheads_k, headdim)."""
    return flash_attn_varlen_func(q, *kv.unbind(1), cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
                                  softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
                                  return_attn_probs)


def flash_attn_with_kvcache(q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
                            cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None,
                            causal=False, window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None,
                            num_splits=0, return_softmax_lse=False):
    """Appends k and v (batch, seqlen_new, nheads_k, headdim) to the caches in place, at cache_seqlens (an int or int32
    (batch,)), turns them and q by rotary embedding, and attends. k_cache and v_cache (rows, seqlen_cache, nheads_k,
    headdim), or with block_table (num_blocks, block_size, nheads_k, headdim). Gives out, or (out, softmax_lse)."""
    result = with_kvcache(q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx,
                          cache_leftpad, block_table, "block_table", softmax_scale, causal, window_size, softcap,
                          rotary_interleaved, num_splits, alibi_slopes)
    return result if return_softmax_lse else result[0]
