"""What FlashAttention-2's and -3's functions have alike: their words for heed's arguments."""

import torch

from .. import _attention
from .._core import Error, InvalidArgument, NotSupported

NAMES = {"window": "window_size", "chunk": "attention_chunk", "leftpad": "cache_leftpad", "layout_new": "layout"}


def forward(q, k, v, *, window_size, names=NAMES, **options):
    """heed.attention; its errors in flash_attn's names. A side of the window that is negative is unbounded."""
    try:
        left, right = window_size
    except (TypeError, ValueError):
        raise InvalidArgument(f"window_size = {window_size!r}: must be two whole numbers, -1 for unbounded") from None
    try:
        return _attention.attention(q, k, v, window=(max(left, -1), max(right, -1)), **options)
    except Error as error:
        raise _attention.renamed(error, names) from None


def hint(length):
    """A longest length as heed takes it: a number that changes nothing; a tensor would have to be waited for."""
    return length if isinstance(length, int) else 0


def refuse(**arguments):
    """Arguments that no backend honours."""
    for name, value in arguments.items():
        if value is None:
            continue
        if name == "qv":
            raise NotSupported(
                "qv: a second query is not supported; the nearest is q and k with the two parts side by side")
        raise NotSupported(
            f"{name}: is for inputs of float8, which no backend takes; the nearest is bfloat16 without it")


def refuse_probabilities(dropout_p, return_attn_probs):
    if return_attn_probs and dropout_p > 0:
        raise NotSupported("return_attn_probs = True with dropout_p > 0: the matrix of probabilities is never formed; "
                           "the nearest is dropout_p = 0, which returns (out, softmax_lse, None)")


def lengths_of(offsets):
    """cu_seqlens as lengths."""
    return offsets[1:] - offsets[:-1]


def with_kvcache(q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad,
                 page_table, page_table_name, softmax_scale, causal, window_size, softcap, rotary_interleaved,
                 num_splits, alibi_slopes=None, attention_chunk=0, cu_seqlens_q=None, cu_seqlens_k_new=None,
                 max_seqlen_q=None, rotary_seqlens=None):
    """(out, lse): appends k and v, turns q, attends. cache_seqlens stays as it is."""
    if torch.is_grad_enabled():
        for name, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache), ("k", k), ("v", v)):
            if tensor is not None and tensor.requires_grad:
                raise NotSupported(f"{name} requires a gradient: flash_attn_with_kvcache has none; the nearest is the "
                                   "same call under torch.no_grad(), or flash_attn_func")
    if k is not None and cache_seqlens is None:
        raise InvalidArgument("cache_seqlens = None: must be given where k is, the new keys go there")
    if rotary_cos is not None and k is None:
        raise InvalidArgument("rotary_cos: must be None where k is, flash_attn turns q only while it appends")
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    if isinstance(cache_seqlens, int):
        cache_seqlens = torch.full((batch,), cache_seqlens, dtype=torch.int32, device=k_cache.device)
    places = {"leftpad": cache_leftpad, "page_table": page_table, "cache_batch_idx": cache_batch_idx}
    lengths = cache_seqlens
    if k is not None:
        if rotary_cos is not None and (cu_seqlens_q is None) != (cu_seqlens_k_new is None):
            raise NotSupported("cu_seqlens_q, cu_seqlens_k_new: with rotary_cos both or neither are supported")
        names = {"k_new": "k", "v_new": "v", "cu_seqlens_new": "cu_seqlens_k_new", "leftpad": "cache_leftpad",
                 "page_table": page_table_name}
        turned = {}
        if rotary_cos is not None:
            per_position = causal or tuple(window_size) != (-1, -1)
            turned = dict(q=q, rotary_cos=rotary_cos, rotary_sin=rotary_sin, rotary_interleaved=rotary_interleaved,
                          q_per_position=per_position, rotary_seqlens=rotary_seqlens, cu_seqlens_q=cu_seqlens_q)
        try:
            q_turned = _attention.kv_append(k, v, k_cache, v_cache, cache_seqlens, cu_seqlens_new=cu_seqlens_k_new,
                                            **turned, **places)
        except Error as error:
            raise _attention.renamed(error, names) from None
        if rotary_cos is not None:
            q = q_turned
        lengths = cache_seqlens + (k.shape[1] if cu_seqlens_k_new is None else lengths_of(cu_seqlens_k_new))
    names = {**NAMES, "k": "k_cache", "v": "v_cache", "seqused_k": "cache_seqlens", "page_table": page_table_name}
    return forward(q, k_cache, v_cache, window_size=window_size, names=names, causal=causal,
                   softmax_scale=softmax_scale, softcap=max(softcap, 0.0), alibi_slopes=alibi_slopes,
                   chunk=attention_chunk, seqused_k=lengths, cu_seqlens_q=cu_seqlens_q, max_seqlen_q=hint(max_seqlen_q),
                   num_splits=num_splits, layout_kv="bshd", return_lse=True, **places)
