"""flash_attn.layers.rotary's functions, in torch's own operations: float32 arithmetic, rounded once, differentiable."""

import torch

from ..._core import InvalidArgument

__all__ = ["apply_rotary_emb", "apply_rotary_emb_func", "apply_rotary_emb_kv_", "apply_rotary_emb_qkv_"]


def _rows_of(table, x, seqlen_offsets, cu_seqlens):
    """cos or sin at the position of each row of x, with a dimension for the heads: [batch or 1, seqlen, 1, pairs]."""
    if cu_seqlens is not None:
        token = torch.arange(x.shape[0], device=x.device)
        sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True).clamp(max=cu_seqlens.shape[0] - 2)
        offset = seqlen_offsets[sequence] if isinstance(seqlen_offsets, torch.Tensor) else seqlen_offsets
        position = (token - cu_seqlens[sequence] + offset).clamp(max=table.shape[0] - 1)
        return table[position].unsqueeze(-2)
    if isinstance(seqlen_offsets, torch.Tensor):
        position = seqlen_offsets[:, None] + torch.arange(x.shape[1], device=x.device)
        return table[position].unsqueeze(-2)
    if seqlen_offsets < 0 or seqlen_offsets + x.shape[1] > table.shape[0]:
        raise InvalidArgument(f"cos.shape[0] = {table.shape[0]}: must be at least seqlen_offsets + seqlen = "
                              f"{seqlen_offsets} + {x.shape[1]}, and seqlen_offsets not negative")
    return table[None, seqlen_offsets:seqlen_offsets + x.shape[1], None]


def _turned(x, cos, sin, interleaved, seqlen_offsets, cu_seqlens):
    """The first rotary_dim elements of x's rows, turned."""
    pairs = cos.shape[-1]
    if x.dim() != (3 if cu_seqlens is not None else 4):
        raise InvalidArgument(f"x has {x.dim()} dimensions: must be (total, nheads, headdim) with cu_seqlens, "
                              "(batch, seqlen, nheads, headdim) without")
    if cos.shape != sin.shape or cos.dim() != 2 or not 0 < 2 * pairs <= x.shape[-1]:
        raise InvalidArgument(f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)}: must both be (seqlen, rotary_dim / "
                              f"2), rotary_dim at most headdim = {x.shape[-1]}")
    cos, sin = (_rows_of(table.float(), x, seqlen_offsets, cu_seqlens) for table in (cos, sin))
    part = x[..., :2 * pairs].float()
    first, second = (part[..., ::2], part[..., 1::2]) if interleaved else (part[..., :pairs], part[..., pairs:])
    turned = first * cos - second * sin, first * sin + second * cos
    return (torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)).to(x.dtype)


def apply_rotary_emb(x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None, max_seqlen=None):
    """x (batch, seqlen, nheads, headdim), or (total, nheads, headdim) with cu_seqlens (batch + 1,): its first
    rotary_dim elements turned by cos, sin (seqlen_rotary, rotary_dim / 2) at seqlen_offsets (an int or (batch,)) +
    position."""
    turned = _turned(x, cos, sin, interleaved, seqlen_offsets, cu_seqlens)
    if inplace:
        x[..., :turned.shape[-1]].copy_(turned)
        return x
    return torch.cat([turned, x[..., turned.shape[-1]:]], -1)


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_qkv_(qkv, cos, sin, cos_k=None, sin_k=None, interleaved=False, seqlen_offsets=0, num_heads_q=None):
    """Turns q and k inside qkv, in place: (batch, seqlen, 3, nheads, headdim), or (batch, seqlen, num_heads_q + 2 *
    num_heads_k, headdim) with num_heads_q."""
    if qkv.dim() == 5:
        q, k = qkv[:, :, 0], qkv[:, :, 1]
    elif num_heads_q is None:
        raise InvalidArgument("num_heads_q = None: must be given where qkv has 4 dimensions")
    else:
        num_heads_k = (qkv.shape[2] - num_heads_q) // 2
        q, k = qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q:num_heads_q + num_heads_k]
    apply_rotary_emb(q, cos, sin, interleaved, True, seqlen_offsets)
    apply_rotary_emb(k, cos if cos_k is None else cos_k, sin if sin_k is None else sin_k, interleaved, True,
                     seqlen_offsets)
    return qkv


def apply_rotary_emb_kv_(kv, cos, sin, interleaved=False, seqlen_offsets=0):
    """Turns k inside kv (batch, seqlen, 2, nheads, headdim), in place."""
    apply_rotary_emb(kv[:, :, 0], cos, sin, interleaved, True, seqlen_offsets)
    return kv
