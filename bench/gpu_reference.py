"""Attention in double precision on a few rows of a case: nothing is timed whose result does not stand beside it."""

import math

import torch

from gpu_contenders import OFFSET, SEED

TOLERANCE = {"bf16": 2.0 ** -6, "f16": 2.0 ** -9, "f32": 2.0 ** -15}  # of the largest value
LSE_TOLERANCE = 2e-3
MASK32 = 0xFFFFFFFF


def _multiply(a, b):
    """(high, low) words of a 32-bit product; int64 tensors, b a number. The product may pass 2^63: in halves."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16)
    middle = (low >> 16) + (high & 0xFFFF)
    return (high >> 16) + (middle >> 16), ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter, key):
    """Philox4x32-10: four int64 tensors holding 32-bit words, and a key of two numbers, give four tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high1, low1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c0, c1, c2, c3


def kept(case, batch, head, rows, keys):
    """Which probabilities dropout keeps, [rows, keys], as docs/conventions.md has it."""
    device = rows.device
    words = torch.arange(-(-keys // 4), device=device)
    j, i = torch.meshgrid(words, rows, indexing="xy")
    constant = torch.zeros_like(i)
    draws = philox((j, i, constant + batch * case.hq + head, constant + (OFFSET & MASK32)),
                   (SEED & MASK32, (SEED >> 32) ^ (OFFSET >> 32)))
    threshold = round((1.0 - case.dropout) * 2.0 ** 32)
    return (torch.stack(draws, dim=-1).flatten(1)[:, :keys] < threshold)


def rows_of(case, tensors, batch, head, rows):
    """(out [rows, dv], lse [rows]) in double precision."""
    q, k, v = tensors.sequence(case, batch)
    group = case.hq // case.hkv
    q, k, v = q[rows, head].double(), k[:, head // group].double(), v[:, head // group].double()
    keys = k.shape[0]
    scores = q @ k.T / math.sqrt(case.d)
    if case.softcap:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    position = (rows + keys - (case.lengths[batch] if case.lengths else case.sq)).view(-1, 1)
    j = torch.arange(keys, device=rows.device)

    def option(tensor):  # of [b|1, h|1, i|1, j|1]
        full = tensor.expand(case.b, case.hq, case.sq, case.sk)
        return full[batch, head][rows]
    if case.bias:
        scores = scores + option(tensors.bias).double()
    if case.alibi:
        scores = scores - tensors.slopes[head].double() * (position - j).abs()
    visible = torch.ones_like(scores, dtype=torch.bool)
    if case.causal:
        visible &= j <= position
    if case.window:
        visible &= j >= position - case.window
    if case.mask:
        visible &= option(tensors.mask)
    scores = scores.masked_fill(~visible, -math.inf)
    lse = scores.logsumexp(-1)
    if case.sinks:
        lse = torch.logaddexp(lse, tensors.sinks[head].double())
    weights = torch.exp(scores - lse.view(-1, 1))
    if case.dropout:
        weights = weights * kept(case, batch, head, rows, keys) / (1.0 - case.dropout)
    return weights @ v, lse


def places(case, device):
    """A few (batch, head, rows): the first and last of each, and rows between."""
    for batch, head in {(0, 0), (case.b - 1, case.hq - 1), (case.b // 2, case.hq // 2)}:
        length = case.lengths[batch] if case.lengths else case.sq
        rows = torch.linspace(0, length - 1, min(length, 48), device=device).round().long().unique()
        yield batch, head, rows


def compare(case, tensors, contender, result):
    """Sets max_error and agrees of a contender whose run(0) gave `result`. Errors are relative to the largest value; a
    peer's dropout draws other random numbers and cannot be compared."""
    if case.dropout and not contender.name.startswith("heed"):
        return
    out, lse = result
    worst, agrees = 0.0, True
    for batch, head, rows in places(case, out.device):
        want, want_lse = rows_of(case, tensors, batch, head, rows)
        first = sum(case.lengths[:batch]) if case.lengths else 0
        got = (out[rows + first, head] if case.lengths else out[batch, rows, head]).double()
        error = float((got - want).abs().max() / want.abs().max().clamp_min(1e-30))
        worst = max(worst, error) if math.isfinite(error) else math.inf
        if lse is not None and contender.name.startswith("heed"):
            got_lse = (lse[head, rows + first] if case.lengths else lse[batch, head, rows]).double()
            agrees &= bool(((got_lse - want_lse).abs() <= LSE_TOLERANCE).all())
    contender.max_error = worst
    contender.agrees = agrees and worst <= TOLERANCE[case.dtype]
