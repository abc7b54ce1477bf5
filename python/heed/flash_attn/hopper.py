"""FlashAttention-3's public functions: its module flash_attn_interface.

Layouts and alignment are FlashAttention-2's. attention_chunk, seqused_q, seqused_k, num_splits and deterministic are
honoured; pack_gqa, sm_margin and scheduler_metadata say how to run and change nothing here; qv and the descales of
float8 are not supported. softmax_lse is -inf where a row sees nothing.
"""

import torch

from .._core import InvalidArgument
from ._calls import forward, hint, refuse, with_kvcache

__all__ = ["flash_attn_combine", "flash_attn_func", "flash_attn_qkvpacked_func", "flash_attn_varlen_func",
           "flash_attn_with_kvcache", "get_scheduler_metadata"]


def flash_attn_func(q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
                    window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None,
                    deterministic=False, sm_margin=0, return_attn_probs=False):
    """q (batch, seqlen_q, nheads, headdim), k (batch, seqlen_k, nheads_k, headdim), v with its own headdim. Gives out,
    or (out, softmax_lse)."""
    refuse(qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    return forward(q, k, v, window_size=window_size, softmax_scale=softmax_scale, causal=causal, chunk=attention_chunk,
                   softcap=max(softcap, 0.0), num_splits=num_splits, deterministic=deterministic,
                   return_lse=return_attn_probs)


def flash_attn_qkvpacked_func(qkv, softmax_scale=None, causal=False, q_descale=None, k_descale=None, v_descale=None,
                              window_size=(-1, -1), attention_chunk=0, softcap=0.0, deterministic=False,
                              num_heads_q=None, sm_margin=0, return_attn_probs=False):
    """flash_attn_func of qkv (batch, seqlen, 3, nheads, headdim), or (batch, seqlen, num_heads_q + 2 * num_heads_k,
    headdim) with num_heads_q."""
    if qkv.dim() == 5:
        q, k, v = qkv.unbind(-3)
    elif num_heads_q is None or (qkv.shape[2] - num_heads_q) % 2 != 0:
        raise InvalidArgument(f"num_heads_q = {num_heads_q}: must be given where qkv has 4 dimensions, and leave an "
                              f"even number of its {qkv.shape[2]} heads")
    else:
        num_heads_k = (qkv.shape[2] - num_heads_q) // 2
        q, k, v = qkv.split([num_heads_q, num_heads_k, num_heads_k], dim=-2)
    return flash_attn_func(q, k, v, softmax_scale, causal, None, q_descale, k_descale, v_descale, window_size,
                           attention_chunk, softcap, 0, None, deterministic, sm_margin, return_attn_probs)


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None,
                           seqused_k=None, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
                           v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1,
                           pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False):
    """Packed: q (total_q, nheads, headdim), k and v (total_k, nheads_k, headdim); where a cu_seqlens is None that side
    is dense. seqused_q, seqused_k int32 (batch,) shorten sequences. Gives out, or (out, softmax_lse)."""
    refuse(qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    return forward(q, k, v, window_size=window_size, softmax_scale=softmax_scale, causal=causal, chunk=attention_chunk,
                   softcap=max(softcap, 0.0), num_splits=num_splits, deterministic=deterministic,
                   cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seqused_q=seqused_q, seqused_k=seqused_k,
                   max_seqlen_q=hint(max_seqlen_q), max_seqlen_k=hint(max_seqlen_k), return_lse=return_attn_probs)


def flash_attn_with_kvcache(q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None,
                            cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, page_table=None,
                            cu_seqlens_q=None, cu_seqlens_k_new=None, max_seqlen_q=None, rotary_seqlens=None,
                            q_descale=None, k_descale=None, v_descale=None, softmax_scale=None, causal=False,
                            window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True,
                            scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0,
                            return_softmax_lse=False):
    """As FlashAttention-2's; q may be packed with cu_seqlens_q, k and v with cu_seqlens_k_new. Gives out, or (out,
    softmax_lse, None, None): partial results are not handed out."""
    refuse(qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    out, lse = with_kvcache(q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx,
                            cache_leftpad, page_table, "page_table", softmax_scale, causal, window_size, softcap,
                            rotary_interleaved, num_splits, None, attention_chunk, cu_seqlens_q, cu_seqlens_k_new,
                            max_seqlen_q, rotary_seqlens)
    return (out, lse, None, None) if return_softmax_lse else out


def flash_attn_combine(out_partial, lse_partial, out=None, out_dtype=None):
    """Results over parts of the keys made one: out_partial float32 (splits, batch, seqlen, nheads, headdim),
    lse_partial float32 (splits, batch, seqlen, nheads). Gives (out, lse (batch, seqlen, nheads))."""
    if out_partial.dim() < 2 or lse_partial.shape != out_partial.shape[:-1]:
        raise InvalidArgument(f"lse_partial {tuple(lse_partial.shape)}: must be out_partial's shape without headdim, "
                              f"{tuple(out_partial.shape[:-1])}")
    lse = lse_partial.float().logsumexp(0)
    weights = (lse_partial - lse.masked_fill(lse == -torch.inf, 0.0)).exp().unsqueeze(-1)
    parts = out_partial.masked_fill(weights == 0, 0.0)  # a part that saw nothing counts for nothing, whatever it holds
    result = (weights * parts).sum(0).to(out_dtype or (out_partial.dtype if out is None else out.dtype))
    return (result if out is None else out.copy_(result)), lse


def get_scheduler_metadata(batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, cache_seqlens,
                           qkv_dtype=torch.bfloat16, headdim_v=None, cu_seqlens_q=None, cu_seqlens_k_new=None,
                           cache_leftpad=None, page_size=None, max_seqlen_k_new=0, causal=False, window_size=(-1, -1),
                           attention_chunk=0, has_softcap=False, num_splits=0, pack_gqa=None, sm_margin=0):
    """An int32 tensor for scheduler_metadata. It carries nothing: heed's kernels read the live lengths themselves."""
    return torch.zeros(1, dtype=torch.int32, device=cache_seqlens.device)
