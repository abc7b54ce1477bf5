"""docs/conventions.md in NumPy, in double precision, on dense arrays: written from the page, not from the C++ code.

One sequence at a time; masks, biases and dropout are dense [heads, queries, keys] arrays.
"""

import numpy

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


def philox(counter, key):
    """Philox4x32-10 of counters given as four arrays of uint64 that hold 32-bit words."""
    c = [numpy.asarray(word, dtype=numpy.uint64) & numpy.uint64(WORD) for word in counter]
    key = [int(word) & WORD for word in key]
    for _ in range(10):
        product_0 = c[0] * numpy.uint64(PHILOX_MULTIPLIERS[0])
        product_1 = c[2] * numpy.uint64(PHILOX_MULTIPLIERS[1])
        high = numpy.uint64(32)
        c = [
            (product_1 >> high) ^ c[1] ^ numpy.uint64(key[0]),
            product_1 & numpy.uint64(WORD),
            (product_0 >> high) ^ c[3] ^ numpy.uint64(key[1]),
            product_0 & numpy.uint64(WORD),
        ]
        key = [(k + w) & WORD for k, w in zip(key, PHILOX_WEYL)]
    return c


def dropout_keep(p, seed, offset, base, b, nheads, rows, keys):
    """1/(1-p) where key j of query i is kept, 0 where it is dropped: [nheads, rows, keys]."""
    j = numpy.arange(keys, dtype=numpy.int64) + base[3]
    i = numpy.arange(rows, dtype=numpy.int64) + base[2]
    h = (b + base[0]) * nheads + numpy.arange(nheads, dtype=numpy.int64) + base[1]
    block, line, head = numpy.broadcast_arrays(j // 4, i[:, None], h[:, None, None])
    counter = [block.astype(numpy.uint64), line.astype(numpy.uint64), head.astype(numpy.uint64),
               numpy.full(block.shape, offset & WORD, numpy.uint64)]
    words = numpy.stack(philox(counter, (seed, (seed >> 32) ^ (offset >> 32))))
    chosen = numpy.take_along_axis(words, numpy.broadcast_to(j % 4, block.shape)[None], 0)[0]
    p = float(numpy.float32(p))
    kept = chosen < numpy.uint64(round((1 - p) * 2**32))
    return numpy.where(kept, 1 / (1 - p) if p < 1 else 0.0, 0.0)


def visible(position, keys, window_left, window_right, chunk):
    """[rows, keys]: what causal (window_right = 0), windows and chunks let through."""
    p, j = position[:, None], numpy.arange(keys)[None, :]
    shown = numpy.ones((len(position), keys), bool)
    if window_left >= 0:
        shown &= j >= p - window_left
    if window_right >= 0:
        shown &= j <= p + window_right
    if chunk > 0:
        shown &= p // chunk == j // chunk
    return shown


def attend(q, k, v, *, scale, position, window=(-1, -1), chunk=0, softcap=0.0, bias=None, slopes=None, mask=None,
           sinks=None, keep=None):
    """One sequence. q [rows, hq, d], k [keys, hkv, d], v [keys, hkv, dv]; bias, mask, keep [hq, rows, keys].

    Returns out [rows, hq, dv], lse [hq, rows].
    """
    rows, hq, _ = q.shape
    keys, hkv, _ = k.shape
    group = hq // hkv
    k, v = numpy.repeat(k, group, 1), numpy.repeat(v, group, 1)
    with numpy.errstate(all="ignore"):
        s = scale * numpy.einsum("ihd,jhd->hij", q, k)
        if softcap > 0:
            s = softcap * numpy.tanh(s / softcap)
        if bias is not None:
            s = s + bias
        if slopes is not None:
            s = s - slopes[:, None, None] * abs(position[:, None] - numpy.arange(keys)[None, :])
        shown = numpy.broadcast_to(visible(position, keys, *window, chunk), s.shape)
        if mask is not None:
            shown = shown & mask
        s = numpy.where(shown, s, -numpy.inf)
        sink = numpy.full((hq, rows, 1), -numpy.inf) if sinks is None else numpy.broadcast_to(
            sinks[:, None, None], (hq, rows, 1))
        terms = numpy.concatenate([s, sink], 2)
        largest = terms.max(2, keepdims=True)
        largest = numpy.where(numpy.isneginf(largest), 0.0, largest)
        weights = numpy.exp(terms - largest)
        total = weights.sum(2, keepdims=True)
        lse = (largest + numpy.log(total))[..., 0]
        p = numpy.where(total > 0, weights / numpy.where(total > 0, total, 1.0), 0.0)[..., :-1]
        if keep is not None:
            p = p * keep
    return numpy.einsum("hij,jhd->ihd", p, v), lse


def rotate(x, positions, cos, sin, interleaved):
    """x [rows, heads, d], turned to positions [rows]; cos, sin [n, rotary_dim / 2]."""
    pairs = cos.shape[1]
    c, s = cos[positions][:, None, :], sin[positions][:, None, :]
    turned = x.copy()
    if interleaved:
        first, second = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
    else:
        first, second = slice(0, pairs), slice(pairs, 2 * pairs)
    turned[..., first] = x[..., first] * c - x[..., second] * s
    turned[..., second] = x[..., first] * s + x[..., second] * c
    return turned
