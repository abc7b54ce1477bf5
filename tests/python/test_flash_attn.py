"""heed.flash_attn: signatures, defaults and return values of flash_attn's functions, results by a formula in torch."""

import inspect
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
heed = pytest.importorskip("heed", reason="needs PYTHONPATH=<build>/python")
from heed import flash_attn  # noqa: E402
from heed.flash_attn import bert_padding, hopper  # noqa: E402
from torch_device import DEVICE, needs_backward, seeded  # noqa: E402, F401

# Parameters in order with their defaults, as flash_attn 2.8 and flash_attn_3 publish them.
COMMON2 = ("dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
           "deterministic=False, return_attn_probs=False")
PACKED = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
DESCALES = "q_descale=None, k_descale=None, v_descale=None"
TAIL3 = "window_size=(-1, -1), attention_chunk=0, softcap=0.0"
HOW3 = "num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False"
SIGNATURES = {
    flash_attn.flash_attn_func: f"q, k, v, {COMMON2}",
    flash_attn.flash_attn_qkvpacked_func: f"qkv, {COMMON2}",
    flash_attn.flash_attn_kvpacked_func: f"q, kv, {COMMON2}",
    flash_attn.flash_attn_varlen_func: f"q, k, v, {PACKED}, {COMMON2}, block_table=None",
    flash_attn.flash_attn_varlen_qkvpacked_func: f"qkv, cu_seqlens, max_seqlen, {COMMON2}",
    flash_attn.flash_attn_varlen_kvpacked_func: f"q, kv, {PACKED}, {COMMON2}",
    flash_attn.flash_attn_with_kvcache:
        "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
        "cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, "
        "window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
        "return_softmax_lse=False",
    hopper.flash_attn_func: f"q, k, v, softmax_scale=None, causal=False, qv=None, {DESCALES}, {TAIL3}, {HOW3}",
    hopper.flash_attn_qkvpacked_func:
        f"qkv, softmax_scale=None, causal=False, {DESCALES}, {TAIL3}, deterministic=False, num_heads_q=None, "
        "sm_margin=0, return_attn_probs=False",
    hopper.flash_attn_varlen_func:
        f"q, k, v, {PACKED}, seqused_q=None, seqused_k=None, softmax_scale=None, causal=False, qv=None, {DESCALES}, "
        f"{TAIL3}, {HOW3}",
    hopper.flash_attn_with_kvcache:
        "q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
        "cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None, "
        f"max_seqlen_q=None, rotary_seqlens=None, {DESCALES}, softmax_scale=None, causal=False, {TAIL3}, "
        "rotary_interleaved=True, scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, "
        "return_softmax_lse=False",
    hopper.flash_attn_combine: "out_partial, lse_partial, out=None, out_dtype=None",
    hopper.get_scheduler_metadata:
        "batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, cache_seqlens, "
        "qkv_dtype=torch.bfloat16, headdim_v=None, cu_seqlens_q=None, cu_seqlens_k_new=None, cache_leftpad=None, "
        "page_size=None, max_seqlen_k_new=0, causal=False, window_size=(-1, -1), attention_chunk=0, has_softcap=False, "
        "num_splits=0, pack_gqa=None, sm_margin=0",
    flash_attn.apply_rotary_emb:
        "x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None, max_seqlen=None",
    flash_attn.apply_rotary_emb_qkv_:
        "qkv, cos, sin, cos_k=None, sin_k=None, interleaved=False, seqlen_offsets=0, num_heads_q=None",
    flash_attn.apply_rotary_emb_kv_: "kv, cos, sin, interleaved=False, seqlen_offsets=0",
    bert_padding.unpad_input: "hidden_states, attention_mask, unused_mask=None",
    bert_padding.pad_input: "hidden_states, indices, batch, seqlen",
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: f"{function.__module__}.{function.__name__}")
def test_signature(function):
    assert str(inspect.signature(function)) == f"({SIGNATURES[function]})"
    assert function.__doc__


def formula(q, k, v, causal=False, window=(-1, -1), scale=None, softcap=0.0, alibi=None, chunk=0):
    """(out, lse) of one dense batch; bottom right."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) * (scale or q.shape[-1] ** -0.5)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    p = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
    j = torch.arange(k.shape[1])
    if alibi is not None:
        scores = scores - alibi.double()[..., None, None] * (p - j).abs()
    hidden = torch.zeros(p.shape[0], j.shape[0], dtype=torch.bool)
    if causal:
        hidden |= j > p
    if window[0] >= 0:
        hidden |= j < p - window[0]
    if window[1] >= 0:
        hidden |= j > p + window[1]
    if chunk:
        hidden |= p // chunk != j // chunk
    scores = scores.masked_fill(hidden, -torch.inf)
    return (torch.einsum("bhij,bjhd->bihd", scores.softmax(-1).nan_to_num(0.0), v.double()).float(),
            scores.logsumexp(-1).float())


def close(got, want):
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def qkv(b=2, sq=33, sk=47, hq=4, hkv=2, d=32):
    return torch.randn(b, sq, hq, d), torch.randn(b, sk, hkv, d), torch.randn(b, sk, hkv, d)


OPTIONS = [{}, {"causal": True}, {"window_size": (7, 2)}, {"window_size": (-1, 0)}, {"softmax_scale": 0.3},
           {"softcap": 4.0, "causal": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("module", [flash_attn, hopper])
def test_func(module, options):
    q, k, v = qkv()
    want, want_lse = formula(q, k, v, options.get("causal", False), options.get("window_size", (-1, -1)),
                             options.get("softmax_scale"), options.get("softcap", 0.0))
    close(module.flash_attn_func(q, k, v, **options), want)
    got = module.flash_attn_func(q, k, v, **options, return_attn_probs=True)
    close(got[0], want)
    close(got[1], want_lse)
    assert got[2:] == ((None,) if module is flash_attn else ())


def test_alibi_and_chunk():
    q, k, v = qkv()
    slopes = torch.rand(2, 4)
    close(flash_attn.flash_attn_func(q, k, v, alibi_slopes=slopes), formula(q, k, v, alibi=slopes)[0])
    close(hopper.flash_attn_func(q, k, v, causal=True, attention_chunk=8), formula(q, k, v, True, chunk=8)[0])


def test_packed_in_one_tensor():
    q, k, v = qkv(sq=20, sk=20, hq=4, hkv=4)
    want = formula(q, k, v, True)[0]
    close(flash_attn.flash_attn_qkvpacked_func(torch.stack([q, k, v], 2), causal=True), want)
    close(flash_attn.flash_attn_kvpacked_func(q, torch.stack([k, v], 2), causal=True), want)
    close(hopper.flash_attn_qkvpacked_func(torch.stack([q, k, v], 2), causal=True), want)
    q, k, v = qkv(sq=20, sk=20)
    close(hopper.flash_attn_qkvpacked_func(torch.cat([q, k, v], 2),
          causal=True, num_heads_q=4), formula(q, k, v, True)[0])


def packed():
    lengths_q, lengths_k = [5, 0, 9], [7, 3, 9]
    cu_q, cu_k = (torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (lengths_q, lengths_k))
    q, k, v = torch.randn(14, 4, 32), torch.randn(19, 2, 32), torch.randn(19, 2, 32)
    outs = [formula(q[None, cu_q[b]:cu_q[b + 1]], k[None, cu_k[b]:cu_k[b + 1]], v[None, cu_k[b]:cu_k[b + 1]], True)
            for b in range(3)]
    return q, k, v, cu_q, cu_k, torch.cat([out[0] for out, _ in outs]), torch.cat([lse[0] for _, lse in outs], 1)


def test_varlen():
    q, k, v, cu_q, cu_k, want, want_lse = packed()
    out, lse, nothing = flash_attn.flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, 9, 9, causal=True, return_attn_probs=True)
    close(out, want)
    close(lse, want_lse)
    assert nothing is None and lse.shape == (4, 14)
    close(flash_attn.flash_attn_varlen_kvpacked_func(q, torch.stack([k, v], 1), cu_q, cu_k, 9, 9, causal=True), want)
    close(hopper.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 9, 9, causal=True), want)
    x = torch.randn(14, 3, 4, 32)
    close(flash_attn.flash_attn_varlen_qkvpacked_func(x, cu_q, 9),
          flash_attn.flash_attn_varlen_func(*x.unbind(1), cu_q, cu_q, 9, 9))
    shorter = hopper.flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, 9, 9, seqused_k=torch.tensor([6, 3, 9], dtype=torch.int32))
    close(shorter[:5][None], formula(q[None, :5], k[None, :6], v[None, :6])[0])


def test_varlen_over_pages():
    q, k, v, cu_q, cu_k, want, _ = packed()
    pages = torch.tensor([[4, 2, 9], [0, 6, 1], [3, 8, 5]], dtype=torch.int32)
    k_pages, v_pages = torch.randn(10, 4, 2, 32), torch.randn(10, 4, 2, 32)
    for b in range(3):
        for j in range(cu_k[b + 1] - cu_k[b]):
            k_pages[pages[b, j // 4], j % 4], v_pages[pages[b, j // 4], j % 4] = k[cu_k[b] + j], v[cu_k[b] + j]
    got = flash_attn.flash_attn_varlen_func(q, k_pages, v_pages, cu_q, cu_k, 9, 9, causal=True, block_table=pages)
    close(got, want)


@needs_backward
@pytest.mark.parametrize("function", ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_qkvpacked_func"])
def test_gradients(function):
    if function == "flash_attn_varlen_func":
        q, k, v, cu_q, cu_k, _, _ = packed()
        arguments, rest = (q, k, v), (cu_q, cu_k, 9, 9)

        def want(q, k, v):
            return torch.cat([formula(q[None, cu_q[b]:cu_q[b + 1]], k[None, cu_k[b]:cu_k[b + 1]],
                                      v[None, cu_k[b]:cu_k[b + 1]], True)[0][0] for b in range(3)])
    elif function == "flash_attn_func":
        arguments, rest, want = qkv(), (), lambda q, k, v: formula(q, k, v, True)[0]
    else:
        arguments, rest, want = (torch.randn(2, 20, 3, 4, 32),), (), lambda x: formula(*x.unbind(2), True)[0]
    for x in arguments:
        x.requires_grad_()
    out = getattr(flash_attn, function)(*arguments, *rest, causal=True)
    dout = torch.randn_like(out)
    for got, expected in zip(torch.autograd.grad(out, arguments, dout),
                             torch.autograd.grad(want(*arguments), arguments, dout)):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def rotated(x, angles, position, interleaved):
    """x [..., d] turned at one position."""
    pairs = angles.shape[1]
    first, second = (x[..., :2 * pairs:2], x[..., 1:2 * pairs:2]
                     ) if interleaved else (x[..., :pairs], x[..., pairs:2 * pairs])
    cos, sin = angles[position].cos(), angles[position].sin()
    turned = first * cos - second * sin, first * sin + second * cos
    part = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat([part, x[..., 2 * pairs:]], -1)


ANGLES = torch.outer(torch.arange(64.0), 10000.0 ** (-torch.arange(8) / 8)).to(DEVICE)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("module", [flash_attn, hopper])
def test_with_kvcache(module, paged, interleaved, causal):
    b, new, capacity = 2, 3, 24
    lengths = torch.tensor([9, 14], dtype=torch.int32)
    q, k, v = torch.randn(b, new, 4, 32), torch.randn(b, new, 2, 32), torch.randn(b, new, 2, 32)
    k_rows, v_rows = torch.randn(b, capacity, 2, 32), torch.randn(b, capacity, 2, 32)
    table = torch.randperm(12).view(2, 6).int()
    if paged:
        k_cache, v_cache = torch.empty(12, 4, 2, 32), torch.empty(12, 4, 2, 32)
        for cache, rows in ((k_cache, k_rows), (v_cache, v_rows)):
            cache[table.flatten().long()] = rows.view(12, 4, 2, 32)
    else:
        k_cache, v_cache = k_rows.clone(), v_rows.clone()
    pages = {("block_table" if module is flash_attn else "page_table"): table} if paged else {}
    result = module.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, rotary_cos=ANGLES.cos(), rotary_sin=ANGLES.sin(),
                                            cache_seqlens=lengths, causal=causal, rotary_interleaved=interleaved,
                                            return_softmax_lse=True, **pages)
    assert len(result) == (2 if module is flash_attn else 4)
    assert lengths.tolist() == [9, 14]
    for n in range(b):
        start = int(lengths[n])
        for t in range(new):
            k_rows[n, start + t], v_rows[n, start + t] = rotated(k[n, t], ANGLES, start + t, interleaved), v[n, t]
        q_turned = torch.stack([rotated(q[n, t], ANGLES, start + (t if causal else 0), interleaved)
                               for t in range(new)])
        out, lse = formula(q_turned[None], k_rows[n:n + 1, :start + new], v_rows[n:n + 1, :start + new], causal)
        close(result[0][n:n + 1], out)
        close(result[1][n:n + 1], lse)
    seen = k_cache[table.flatten().long()].view(b, capacity, 2, 32) if paged else k_cache
    close(seen, k_rows)


def test_with_kvcache_whole_number_leftpad_and_batch_index():
    q, cache_k, cache_v = torch.randn(2, 1, 4, 32), torch.randn(3, 20, 2, 32), torch.randn(3, 20, 2, 32)
    close(flash_attn.flash_attn_with_kvcache(q, cache_k[:2], cache_v[:2], cache_seqlens=11, causal=True),
          formula(q, cache_k[:2, :11], cache_v[:2, :11], True)[0])
    close(flash_attn.flash_attn_with_kvcache(q, cache_k[:2], cache_v[:2]), formula(q, cache_k[:2], cache_v[:2])[0])
    got = flash_attn.flash_attn_with_kvcache(q, cache_k, cache_v, cache_seqlens=11, causal=True,
                                             cache_batch_idx=torch.tensor([2, 0], dtype=torch.int32),
                                             cache_leftpad=torch.tensor([4, 0], dtype=torch.int32))
    close(got[:1], formula(q[:1], cache_k[2:, 4:11], cache_v[2:, 4:11], True)[0])
    close(got[1:], formula(q[1:], cache_k[:1, :11], cache_v[:1, :11], True)[0])


def test_hopper_with_kvcache_packed():
    """Queries and new keys packed, over pages, positions of the rotary embedding given."""
    counts, lengths = [2, 3], torch.tensor([5, 9], dtype=torch.int32)
    offsets = torch.tensor([0, 2, 5], dtype=torch.int32)
    first = torch.tensor([6, 1], dtype=torch.int32)
    q, k, v = torch.randn(5, 4, 32), torch.randn(5, 2, 32), torch.randn(5, 2, 32)
    k_cache, v_cache = torch.randn(8, 4, 2, 32), torch.randn(8, 4, 2, 32)
    table = torch.tensor([[7, 1, 4, 2], [0, 3, 6, 5]], dtype=torch.int32)
    rows = [cache[table.flatten().long()].view(2, 16, 2, 32).clone() for cache in (k_cache, v_cache)]
    out, lse, *rest = hopper.flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, rotary_cos=ANGLES.cos(), rotary_sin=ANGLES.sin(), cache_seqlens=lengths,
        page_table=table, cu_seqlens_q=offsets, cu_seqlens_k_new=offsets, max_seqlen_q=3, rotary_seqlens=first,
        causal=True, rotary_interleaved=False, return_softmax_lse=True)
    assert out.shape == (5, 4, 32) and lse.shape == (4, 5) and rest == [None, None]
    for b in range(2):
        start, end = int(lengths[b]), int(lengths[b]) + counts[b]
        new = slice(int(offsets[b]), int(offsets[b + 1]))
        turned = [torch.stack([rotated(x[new][t], ANGLES, int(first[b]) + t, False) for t in range(counts[b])])
                  for x in (q, k)]
        rows[0][b, start:end], rows[1][b, start:end] = turned[1], v[new]
        close(out[None, new], formula(turned[0][None], rows[0][b:b + 1, :end], rows[1][b:b + 1, :end], True)[0])


def test_combine_of_parts_is_the_whole():
    q, k, v = qkv()
    parts = [hopper.flash_attn_func(q, k[:, a:b], v[:, a:b], return_attn_probs=True) for a, b in ((0, 20), (20, 47))]
    hidden = torch.full_like(parts[0][0], torch.nan), torch.full_like(parts[0][1], -torch.inf)
    parts.append(hidden)  # a part in which nothing was seen
    out, lse = flash_attn.flash_attn_combine(torch.stack([out for out, _ in parts]),
                                             torch.stack([lse.transpose(1, 2) for _, lse in parts]))
    want, want_lse = formula(q, k, v)
    close(out, want)
    close(lse.transpose(1, 2), want_lse)
    assert flash_attn.flash_attn_combine(out[None], lse[None], out_dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_scheduler_metadata_is_accepted():
    q, k, v = qkv()
    lengths = torch.tensor([40, 47], dtype=torch.int32)
    metadata = flash_attn.get_scheduler_metadata(2, 33, 47, 4, 2, 32, lengths)
    assert metadata.dtype == torch.int32
    close(hopper.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, scheduler_metadata=metadata)[1],
          formula(q[1:], k[1:], v[1:])[0][0])


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary(interleaved):
    x = torch.randn(2, 5, 3, 20)
    cos, sin = ANGLES.cos(), ANGLES.sin()
    want = torch.stack([rotated(x[:, t], ANGLES, 7 + t, interleaved) for t in range(5)], 1)
    close(flash_attn.apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=7), want)
    close(flash_attn.apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=torch.tensor([7, 7])), want)
    cu_seqlens = torch.tensor([0, 5, 10], dtype=torch.int32)
    close(flash_attn.apply_rotary_emb(x.flatten(0, 1), cos, sin, interleaved, seqlen_offsets=7, cu_seqlens=cu_seqlens,
                                      max_seqlen=5), want.flatten(0, 1))
    for packed_qkv, heads in ((torch.stack([x, x, x], 2), None), (torch.cat([x, x, x], 2), 3)):
        turned = flash_attn.apply_rotary_emb_qkv_(packed_qkv, cos, sin, interleaved=interleaved, seqlen_offsets=7,
                                                  num_heads_q=heads)
        assert turned is packed_qkv
        q, k, v = turned.unbind(2) if heads is None else turned.split(3, 2)
        close(q, want), close(k, want), close(v, x)
    close(flash_attn.apply_rotary_emb_kv_(torch.stack([x, x], 2), cos, sin, interleaved, 7)[:, :, 0], want)
    y = x.clone()
    assert flash_attn.apply_rotary_emb(y, cos, sin, interleaved, True, 7) is y
    close(y, want)
    leaf = x.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: flash_attn.apply_rotary_emb(
        x, cos, sin, interleaved), leaf, atol=1e-3, eps=1e-2)


def test_bert_padding():
    x, mask = torch.randn(2, 5, 3, requires_grad=True), torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    rows, indices, cu_seqlens, longest, used = bert_padding.unpad_input(x, mask)
    assert (cu_seqlens.tolist(), longest, used.tolist(), cu_seqlens.dtype) == ([0, 3, 7], 4, [3, 4], torch.int32)
    assert torch.equal(rows, torch.cat([x[0, :3], x[1, 1:]]))
    back = bert_padding.pad_input(rows, indices, 2, 5)
    assert torch.equal(back, x * mask[..., None])
    back.sum().backward()
    assert torch.equal(x.grad, mask[..., None].expand(2, 5, 3).float())
    _, _, cu_seqlens, longest, used = bert_padding.unpad_input(x, mask, torch.tensor([[0, 0, 0, 1, 0], [0] * 5]))
    assert (cu_seqlens.tolist(), longest, used.tolist()) == ([0, 4, 8], 4, [3, 4])
    lengths = torch.tensor([[2, 1, 0, 0, 0], [4, 0, 0, 0, 0]])
    rows, _, cu_seqlens, longest = bert_padding.unpad_input_for_concatenated_sequences(x, lengths)
    assert (rows.shape[0], cu_seqlens.tolist(), longest) == (7, [0, 2, 3, 7], 4)


def test_what_is_declined_says_so():
    q, k, v = qkv()
    for call, word in ((lambda: hopper.flash_attn_func(q, k, v, qv=q), "qv"),
                       (lambda: hopper.flash_attn_func(q, k, v, k_descale=torch.ones(2, 2)), "k_descale"),
                       (lambda: flash_attn.flash_attn_func(q, k, v, 0.1, return_attn_probs=True), "return_attn_probs"),
                       (lambda: flash_attn.flash_attn_with_kvcache(q.requires_grad_(), k, v), "q requires a gradient")):
        with pytest.raises(heed.NotSupported, match=word):
            call()
    q = q.detach()
    table = torch.tensor([[9]], dtype=torch.int32)
    for call, sentence in (
            (lambda: flash_attn.flash_attn_func(q, k, v, window_size=3), "window_size = 3"),
            (lambda: flash_attn.flash_attn_with_kvcache(q[:1], k, v,
             block_table=table, cache_seqlens=4), r"block_table.*9"),
            (lambda: flash_attn.flash_attn_with_kvcache(
                q, k, v, cache_seqlens=torch.tensor([1, 2])), "cache_seqlens.dtype"),
            (lambda: flash_attn.flash_attn_with_kvcache(q, k, v, k[:, :1], v[:, :1]), "cache_seqlens = None"),
            (lambda: flash_attn.flash_attn_with_kvcache(
                q, k, v, k[:, :1], v[:, :1], cache_seqlens=47), "cache_seqlens"),
            (lambda: flash_attn.flash_attn_with_kvcache(q, k[..., :16], v), r"k_cache.shape\[3\] = 16"),
            (lambda: flash_attn.flash_attn_varlen_func(q[0], k[0], v[0], torch.tensor([0, 33]), torch.tensor([0, 47]),
                                                       33, 47),
             "cu_seqlens_q.dtype = int64")):
        with pytest.raises(heed.InvalidArgument, match=sentence):
            call()


def test_install():
    script = """
import sys, heed
heed.flash_attn.install()
heed.flash_attn.install()
import flash_attn, flash_attn_interface
from flash_attn import flash_attn_func, flash_attn_varlen_func
from flash_attn.flash_attn_interface import flash_attn_with_kvcache
from flash_attn.bert_padding import pad_input, unpad_input
from flash_attn.layers.rotary import apply_rotary_emb
assert flash_attn_interface.flash_attn_func is heed.flash_attn.hopper.flash_attn_func
assert flash_attn_func is heed.flash_attn.flash_attn_func and flash_attn.__version__ >= "2.8"
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    script = """
import sys, types, heed
sys.modules["flash_attn"] = types.ModuleType("flash_attn")
try:
    heed.flash_attn.install()
except heed.InvalidArgument:
    pass
else:
    raise SystemExit("installed over another flash_attn")
"""
    subprocess.run([sys.executable, "-c", script], check=True)
