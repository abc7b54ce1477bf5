"""heed for Hugging Face transformers: ``import heed.transformers``, then ``attn_implementation="heed"``.

Importing this module registers an attention function and the mask function that belongs to it. Without the second,
transformers hands over no mask at all for a name that it does not know, and padding is lost without a word.
"""

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ._attention import attention
from ._core import NotSupported

__all__ = ["attention_forward", "attention_mask"]

# What models hand on that says nothing about attention, or what the mask says already.
_ELSEWHERE = frozenset((
    "cache_position", "deterministic", "inputs_embeds", "labels", "layer_idx", "logits_to_keep", "max_length_k",
    "max_length_q", "num_items_in_batch", "output_hidden_states", "output_router_logits", "past_key_values",
    "position_ids", "return_dict", "sliding_window", "use_cache"))
_SENTENCES = {
    "output_attentions": "the matrix of probabilities is never formed; the nearest is attn_implementation=\"eager\"",
    "head_mask": "probabilities cannot be scaled by head; the nearest is attn_implementation=\"eager\"",
}


def attention_mask(*arguments, **options):
    """The mask of a layer: boolean [batch, 1, seqlen_q, seqlen_k], true where a query may attend, or None where it says
    no more than causal (or nothing) does. It is transformers' own mask for scaled_dot_product_attention, made from
    whatever arguments this version of transformers passes: cache_position up to 5.3, q_length and q_offset after."""
    return sdpa_mask(*arguments, **options)


def attention_forward(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None,
                      softcap=None, s_aux=None, position_bias=None, cu_seq_lens_q=None, cu_seq_lens_k=None,
                      sliding_window=None, **others):
    """transformers' attention function: query [batch, heads, seqlen_q, head_dim], key and value [batch, kv_heads,
    seqlen_k, head_dim]; gives ([batch, seqlen_q, heads, head_dim_v], None). An argument that it does not honour is
    refused by name."""
    if "sinks" in others and s_aux is None:
        s_aux = others.pop("sinks")
    for name, value_given in others.items():
        if name not in _ELSEWHERE and value_given is not None and value_given is not False:
            raise NotSupported(f"{name}: {_SENTENCES.get(name, 'is nothing that heed knows of attention')}; it was "
                               f"passed by {type(module).__name__}")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    options = dict(softmax_scale=scaling, softcap=softcap or 0.0, dropout_p=dropout,
                   sinks=None if s_aux is None else s_aux.reshape(-1).float())
    if cu_seq_lens_q is not None:
        if attention_mask is not None or position_bias is not None or query.shape[0] != 1:
            raise NotSupported("cu_seq_lens_q: packed sequences come in a batch of one, without attention_mask and "
                               f"position_bias; it was passed by {type(module).__name__}")
        keys_packed = cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k
        out = attention(query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1),
                        cu_seqlens_q=cu_seq_lens_q.to(torch.int32), cu_seqlens_k=keys_packed.to(torch.int32),
                        causal=is_causal, window=_window(sliding_window, is_causal), **options)
        return out.unsqueeze(0), None
    mask, bias = _mask_and_bias(attention_mask, position_bias, query, key)
    # Without a mask the queries are the last of the keys, or all of them see all.
    causal = bool(is_causal) and mask is None and attention_mask is None and query.shape[2] > 1
    out = attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), causal=causal, mask=mask,
                    bias=bias, **options)
    return out, None


def _window(sliding_window, is_causal):
    if sliding_window is None:
        return (-1, -1)
    return (sliding_window - 1, 0 if is_causal else sliding_window - 1)


def _mask_and_bias(attention_mask, position_bias, query, key):
    """A boolean mask as it is; what is added to scores, of which there may be two, as one."""
    mask = bias = None
    if attention_mask is not None:
        if attention_mask.dim() != 4:
            raise NotSupported(f"attention_mask has {attention_mask.dim()} dimensions; the nearest is boolean or float "
                               "[batch, heads or 1, seqlen_q, seqlen_k], which heed's mask function makes")
        attention_mask = attention_mask[..., :key.shape[2]]
        if attention_mask.dtype == torch.bool:
            mask = attention_mask
        else:
            bias = attention_mask
    if position_bias is not None:
        while position_bias.dim() < 4:
            position_bias = position_bias.unsqueeze(0)
        bias = position_bias if bias is None else bias + position_bias
    if bias is not None and bias.dtype not in (torch.float32, query.dtype):
        bias = bias.to(query.dtype)
    if mask is not None and mask.stride(-1) > 1:
        mask = mask.contiguous()
    if bias is not None and bias.stride(-1) > 1:
        bias = bias.contiguous()
    return mask, bias


AttentionInterface.register("heed", attention_forward)
AttentionMaskInterface.register("heed", attention_mask)
