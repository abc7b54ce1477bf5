"""flash_attn.bert_padding: padded batches to packed rows and back, in torch's own differentiable operations."""

import torch

__all__ = ["index_first_axis", "index_put_first_axis", "pad_input", "unpad_input",
           "unpad_input_for_concatenated_sequences"]


def index_first_axis(input, indices):
    """Rows of input."""
    return input.index_select(0, indices)


def index_put_first_axis(values, indices, first_axis_dim):
    """values as rows of a tensor of zeros with first_axis_dim rows."""
    return values.new_zeros(first_axis_dim, *values.shape[1:]).index_copy(0, indices, values)


def _offsets(lengths):
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def _packed(hidden_states, kept, lengths):
    indices = kept.flatten().nonzero().flatten()
    longest = int(lengths.max()) if lengths.numel() else 0
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, _offsets(lengths), longest


def unpad_input(hidden_states, attention_mask, unused_mask=None):
    """hidden_states (batch, seqlen, ...) and a mask (batch, seqlen), 1 where a token is; unused_mask: 1 where there is
    room for one that is not used yet. Gives (rows (total, ...), their indices, cu_seqlens int32 (batch + 1,), the
    longest sequence, tokens in use int32 (batch,)). Waits for the GPU."""
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    rows, indices, offsets, longest = _packed(hidden_states, kept, kept.sum(-1, dtype=torch.int32))
    return rows, indices, offsets, longest, attention_mask.sum(-1, dtype=torch.int32)


def unpad_input_for_concatenated_sequences(hidden_states, attention_mask_in_length):
    """attention_mask_in_length (batch, seqlen): lengths of the samples that lie one after another in each row, then 0.
    Gives (rows, indices, cu_seqlens of the samples, the longest sample)."""
    used = attention_mask_in_length.sum(-1, keepdim=True)
    kept = torch.arange(attention_mask_in_length.shape[-1], device=used.device) < used
    lengths = attention_mask_in_length.flatten()
    return _packed(hidden_states, kept, lengths[lengths != 0].to(torch.int32))


def pad_input(hidden_states, indices, batch, seqlen):
    """Back again: (total, ...) to (batch, seqlen, ...), zeros where nothing was."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))
