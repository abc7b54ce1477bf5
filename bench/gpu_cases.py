"""What peers_gpu.py measures: cases, and the grids that they form. Imports no framework."""

import dataclasses
import random

TOKENS, HIDDEN = 16384, 2048  # the forward grid: tokens of a problem and heads times head_dim, the same in every cell


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem. Memory is [batch, seqlen, heads, head_dim] for everyone."""
    group: str
    label: str
    b: int
    hq: int
    hkv: int
    sq: int
    sk: int
    d: int
    dv: int = 0               # 0: d
    dtype: str = "bf16"
    causal: bool = False
    window: int = 0           # with causal: keys at most so many before the query
    softcap: float = 0.0
    alibi: bool = False
    sinks: bool = False
    bias: str = ""            # "hij": dimensions that are not broadcast
    mask: str = ""            # likewise, boolean
    dropout: float = 0.0
    lengths: tuple = ()       # packed input: one length per sequence, queries and keys alike
    used: tuple = ()          # keys in use of each sequence, of the sk that it has room for
    page: int = 0             # keys and values in shuffled pages of so many positions
    batch_invariant: bool = False
    lse: bool = True          # written beside the output
    cold: bool = False        # inputs come from memory, not from L2
    plain: str = ""           # the label, in the same group, that this one is compared with

    @property
    def head_dim_v(self):
        return self.dv or self.d

    @property
    def is_decode(self):
        return self.sq == 1 and self.sk > 1

    @property
    def pairs(self):
        """(query, key) pairs that count as work: half the square when causal, as the field counts; a window's band."""
        if self.lengths:
            return sum(n * n for n in self.lengths) * (0.5 if self.causal else 1.0)
        if self.used:
            return self.sq * sum(self.used)
        if self.window:
            return self.b * sum(min(i + self.sk - self.sq, self.window) + 1 for i in range(self.sq))
        return self.b * self.sq * self.sk * (0.5 if self.causal else 1.0)

    @property
    def flops(self):
        return 2.0 * self.pairs * self.hq * (self.d + self.head_dim_v)

    @property
    def element_bytes(self):
        return 4 if self.dtype == "f32" else 2

    @property
    def kv_bytes(self):
        rows = sum(self.lengths or self.used) or self.b * self.sk
        return rows * self.hkv * (self.d + self.head_dim_v) * self.element_bytes

    @property
    def set_bytes(self):
        """Of one set of q, k, v, out."""
        rows = sum(self.lengths) if self.lengths else self.b * self.sq
        return self.kv_bytes + rows * self.hq * (self.d + self.head_dim_v) * self.element_bytes


def forward():
    for d in (128, 64, 256):
        for s in (512, 1024, 2048, 4096, 8192, 16384):
            for causal in (False, True):
                heads = HIDDEN // d
                yield Case("fwd", f"d{d} {'causal' if causal else 'full'} {s}", TOKENS // s, heads, heads, s, s, d,
                           causal=causal)


DECODE = [("B1 131k 32/8", 1, 131072, 32, 8), ("B16 8k 32/8", 16, 8192, 32, 8), ("B64 4k 32/8", 64, 4096, 32, 8),
          ("B128 1k 32/32", 128, 1024, 32, 32), ("B8 32k 64/8", 8, 32768, 64, 8)]


def decode():
    for label, b, keys, hq, hkv in DECODE:
        yield Case("decode", label, b, hq, hkv, 1, keys, 128, cold=True)


def paged():
    for label, b, keys, hq, hkv in DECODE:
        for page in (0, 256, 16, 1):
            yield Case("paged", f"{label} page {page}" if page else label, b, hq, hkv, 1, keys, 128, page=page,
                       cold=True, plain=label if page else "")


def serving():
    """Decoding for one user, and for many with as many keys each as it happens."""
    for keys in (1024, 4096, 16384):
        yield Case("serving", f"B1 {keys // 1024}k 32/8", 1, 32, 8, 1, keys, 128, cold=True)
    draw = random.Random(64)
    for b, room in ((16, 8192), (64, 4096), (64, 32768)):
        used = tuple(draw.randint(1, room) for _ in range(b))
        for page in (0, 16):
            label = f"B{b} 1..{room // 1024}k 32/8" + (f" page {page}" if page else "")
            yield Case("serving", label, b, 32, 8, 1, room, 128, used=used, page=page, cold=True)


def features():
    """Each beside the plain call of the same sizes: 4096 keys, and 16384 for the windows."""
    base = Case("features", "plain", 4, 16, 16, 4096, 4096, 128, causal=True)
    yield base

    def with_(label, **changes):
        return dataclasses.replace(base, label=label, plain="plain", **changes)
    yield with_("bias hij", bias="hij")
    yield with_("bias bhij", bias="bhij")
    yield with_("mask ij", mask="ij")
    yield with_("softcap", softcap=30.0)
    yield with_("alibi", alibi=True)
    yield with_("sinks", sinks=True)
    yield with_("dropout", dropout=0.1)
    long = Case("features", "plain 16k", 1, 16, 16, 16384, 16384, 128, causal=True)
    yield long
    for window in (512, 1024, 2048, 4096):
        yield dataclasses.replace(long, label=f"window {window} at 16k", window=window, plain="plain 16k")
    ungrouped = dataclasses.replace(base, label="plain 32/32", hq=32, hkv=32)
    yield ungrouped
    yield dataclasses.replace(ungrouped, label="GQA 32/8", hkv=8, plain="plain 32/32")
    even = dataclasses.replace(base, label="plain 2k", b=8, sq=2048, sk=2048)
    yield even
    lengths = random_lengths(random.Random(2048), 1024, 3072)
    yield dataclasses.replace(even, label="packed, mean 2k", b=len(lengths), sq=max(lengths), sk=max(lengths),
                              lengths=lengths, plain="plain 2k")


def random_lengths(draw, low, high):
    """Of packed sequences, TOKENS in all."""
    lengths = []
    while sum(lengths) < TOKENS:
        lengths.append(min(draw.randint(low, high), TOKENS - sum(lengths)))
    return tuple(lengths)


def short():
    """Whole calls of little work, inputs in L2 as after the layer before."""
    for b, h, s in ((1, 16, 1024), (16, 16, 1024), (1, 16, 512), (1, 16, 128), (256, 8, 64), (32, 8, 256)):
        yield Case("short", f"B{b} H{h} S{s}", b, h, h, s, s, 64)
    yield Case("short", "B1 H16 S1024 causal", 1, 16, 16, 1024, 1024, 64, causal=True)
    yield Case("short", "B1 H8 S8192", 1, 8, 8, 8192, 8192, 64)


def invariant():
    """What batch_invariant costs where it may."""
    for label, b, keys, hq, hkv in DECODE[:4]:
        plain = Case("invariant", label, b, hq, hkv, 1, keys, 128, cold=True)
        yield plain
        yield dataclasses.replace(plain, label=f"{label} batch_invariant", batch_invariant=True, plain=label)
    plain = Case("invariant", "B1 S1024", 1, 16, 16, 1024, 1024, 128, causal=True)
    yield plain
    yield dataclasses.replace(plain, label="B1 S1024 batch_invariant", batch_invariant=True, plain="B1 S1024")


def gqa():
    for s in (1024, 4096, 16384):
        yield Case("gqa", f"32/8 causal {s}", TOKENS // s, 32, 8, s, s, 128, causal=True)


def varlen():
    """Packed sequences of random lengths, some 16k tokens in all."""
    for d, low, high in ((64, 16, 512), (128, 64, 2048), (128, 1024, 8192)):
        lengths = random_lengths(random.Random(d + high), low, high)
        heads = HIDDEN // d
        for causal in (False, True):
            yield Case("varlen", f"d{d} {'causal' if causal else 'full'} {low}..{high}", len(lengths), heads, heads,
                       max(lengths), max(lengths), d, causal=causal, lengths=lengths)


def dtypes():
    for d in (64, 128):
        for causal in (False, True):
            kind = "causal" if causal else "full"
            yield Case("dtypes", f"f16 d{d} {kind} 4096", 4, HIDDEN // d, HIDDEN // d, 4096, 4096, d, dtype="f16",
                       causal=causal)
    for d in (64, 128):
        yield Case("dtypes", f"f32 d{d} full 1024", 2, 8, 8, 1024, 1024, d, dtype="f32")


def dims():
    for d, dv, heads in ((32, 0, 32), (72, 0, 16), (80, 0, 16), (96, 0, 16), (192, 128, 16)):
        name = f"d{d}/{dv}" if dv else f"d{d}"
        for causal in (False, True):
            yield Case("dims", f"{name} {'causal' if causal else 'full'} 4096", 4, heads, heads, 4096, 4096, d, dv=dv,
                       causal=causal)


MODELS = [  # queries, keys, query heads, key heads, head_dim, causal
    ("OpenVLA 280", 280, 280, 32, 32, 128, True), ("pi0 51x867", 51, 867, 8, 1, 256, False),
    ("SigLIP 256", 256, 256, 16, 16, 72, False), ("GR00T DiT 49x1024", 49, 1024, 32, 32, 48, False),
    ("SmolVLA 50x200", 50, 200, 15, 5, 64, False), ("ACT 302", 302, 302, 8, 8, 64, False),
    ("ACT 1202", 1202, 1202, 8, 8, 64, False), ("RDT-1B 67x4374", 67, 4374, 32, 32, 64, False),
    ("Perceiver IO 512x50k", 512, 51200, 8, 8, 64, False), ("Octo-Base 690", 690, 690, 12, 12, 64, False)]


def without_lse():
    for case in forward():
        if case.d < 256 and case.sq in (1024, 4096, 16384):
            yield dataclasses.replace(case, group="without_lse", lse=False)


def models():
    for b in (1, 16):
        for label, sq, sk, hq, hkv, d, causal in MODELS:
            # Octo's mask is by blocks of tokens: a mask tensor, as its own code passes it.
            yield Case("models", f"{label} B{b}", b, hq, hkv, sq, sk, d, causal=causal, cold=True,
                       mask="ij" if label.startswith("Octo") else "")


GRIDS = {"fwd": forward, "decode": decode, "paged": paged, "serving": serving, "short": short, "features": features,
         "gqa": gqa, "varlen": varlen, "dims": dims, "dtypes": dtypes, "invariant": invariant, "models": models,
         "without_lse": without_lse}


def cases_of(names):
    """Of the grids named, in the order of GRIDS: the most important first."""
    unknown = [name for name in names if name not in GRIDS]
    if unknown:
        raise ValueError(f"--grids: \"{unknown[0]}\" is none of {', '.join(GRIDS)}")
    return [case for name, grid in GRIDS.items() if name in names for case in grid()]


def shrunk(case):
    """The same features at sizes that a CPU does at once."""
    group = case.hq // case.hkv
    hkv = min(case.hkv, 2)
    changes = {"b": min(case.b, 2), "hkv": hkv, "hq": hkv * group, "sq": min(case.sq, 96), "sk": min(case.sk, 128)}
    if case.sq == case.sk:
        changes["sk"] = changes["sq"]
    if case.lengths:
        lengths = tuple(min(n, 40 + 7 * i) for i, n in enumerate(case.lengths[:3]))
        changes.update(lengths=lengths, b=len(lengths), sq=max(lengths), sk=max(lengths))
    if case.used:
        changes["used"] = tuple(min(n, 40 + 7 * i) for i, n in enumerate(case.used[:changes["b"]]))
    if case.page:
        changes["page"] = min(case.page, 16)
    if case.window:
        changes["window"] = 17
    return dataclasses.replace(case, **changes)
