"""Decoding over a paged cache: tokens come one by one, each is appended to its page and attends to all before it."""

import numpy as np

import heed

BATCH, HEADS, KV_HEADS, DIM, PAGE, STEPS = 2, 8, 2, 64, 4, 10
random = np.random.default_rng(0)
pages = np.arange(BATCH * 3, dtype=np.int32).reshape(BATCH, 3)[:, ::-1].copy()  # which pages hold a sequence's keys
k_cache, v_cache = (np.zeros((BATCH * 3, PAGE, KV_HEADS, DIM), np.float32) for _ in range(2))
angles = np.outer(np.arange(64), 10000.0 ** (-np.arange(DIM // 2) / (DIM // 2))).astype(np.float32)

lengths = np.zeros(BATCH, np.int32)
for step in range(STEPS):
    q = random.standard_normal((BATCH, 1, HEADS, DIM), np.float32)
    k, v = (random.standard_normal((BATCH, 1, KV_HEADS, DIM), np.float32) for _ in range(2))
    q = heed.kv_append(k, v, k_cache, v_cache, lengths, q=q, rotary_cos=np.cos(angles), rotary_sin=np.sin(angles),
                       page_table=pages)
    lengths += 1
    out = heed.attention(q, k_cache, v_cache, page_table=pages, seqused_k=lengths, causal=True)

# The same without pages: each sequence's keys in a row.
keys, values = (cache[pages].reshape(BATCH, 3 * PAGE, KV_HEADS, DIM)[:, :STEPS] for cache in (k_cache, v_cache))
difference = abs(out - heed.attention(q, keys, values, causal=True)).max()
print(f"{STEPS} tokens in pages of {PAGE}; beside keys in a row the largest difference is {difference:.1e}")
assert difference < 1e-6
