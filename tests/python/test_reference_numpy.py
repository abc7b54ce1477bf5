"""The reference backend against the conventions in NumPy: forward, gradients by central differences, kv_append."""

import numpy
import pytest

from attention_numpy import attend, dropout_keep, rotate
from heed_c import Inputs

BSHD, BHSD, THD = 0, 1, 2


class Sequence:
    """Where one sequence's rows and keys are in the tensors of `args`."""

    def __init__(self, args, b):
        def number(name, standard, index=b):
            array = getattr(args, name).array()
            return standard if array is None else int(array[index])

        self.b = b
        seqlen = {BSHD: 1, BHSD: 2}
        if args.layout_q == THD:
            self.q_start, end = number("cu_seqlens_q", 0), number("cu_seqlens_q", 0, b + 1)
            rows = end - self.q_start
        else:
            self.q_start, rows = 0, args.q.shape[seqlen[args.layout_q]]
        self.rows = number("seqused_q", rows)
        self.table = args.page_table.array()
        if args.layout_kv == THD:
            k_start, end = number("cu_seqlens_k", 0), number("cu_seqlens_k", 0, b + 1)
            keys = end - k_start
        elif self.table is not None:
            k_start, keys = 0, self.table.shape[1] * args.k.shape[seqlen[args.layout_kv]]
        else:
            k_start, keys = 0, args.k.shape[seqlen[args.layout_kv]]
        leftpad = number("leftpad_k", 0)
        self.k_start = k_start + leftpad
        self.keys = number("seqused_k", keys) - leftpad
        self.k_row = number("cache_batch_idx", b)
        offset = [self.keys - self.rows, 0, args.q_offset][args.offset_kind]
        self.position = numpy.arange(self.rows) + offset

    def q_index(self, layout):
        """Index of [rows, heads, ...] in a tensor like q once its heads stand before the last dimension."""
        rows = slice(self.q_start, self.q_start + self.rows)
        return (rows,) if layout == THD else (self.b, rows)

    def k_index(self, args):
        keys = numpy.arange(self.k_start, self.k_start + self.keys)
        if args.layout_kv == THD:
            return (keys,)
        if self.table is None:
            return (self.k_row, keys)
        page_size = args.k.shape[1 if args.layout_kv == BSHD else 2]
        return (self.table[self.k_row][keys // page_size], keys % page_size)


def sequence_first(array, layout):
    return array.swapaxes(1, 2) if layout == BHSD else array


def score_part(array, b, rows, keys):
    """[heads or 1, rows, keys] of a bias or mask that may be broadcast in any dimension."""
    if array is None:
        return None
    part = array[b if array.shape[0] > 1 else 0]
    part = part[:, : rows if part.shape[1] > 1 else 1, : keys if part.shape[2] > 1 else 1]
    return numpy.broadcast_to(part, (part.shape[0], rows, keys))


DIFFERENTIABLE = {"q": "dq", "k": "dk", "v": "dv", "bias": "dbias", "sinks": "dsinks", "alibi_slopes": "dalibi_slopes"}


def forward(args, values):
    """out and lse as the tensors of `args` have them, from float64 values of the differentiable inputs."""
    q, k, v = (sequence_first(values[n], args.layout_q if n == "q" else args.layout_kv) for n in "qkv")
    hq, head_dim = q.shape[-2:]
    scale = args.softmax_scale if args.has_softmax_scale else float(numpy.float32(1 / numpy.sqrt(head_dim)))
    out = numpy.zeros(q.shape[:-1] + v.shape[-1:])
    lse = numpy.full((hq, len(q)) if args.layout_q == THD else (len(q), hq, q.shape[1]), -numpy.inf)
    mask = args.mask.array()
    slopes = values.get("alibi_slopes")
    for b in range(args.status.shape[0]):
        s = Sequence(args, b)
        keep = None
        if args.dropout_p > 0:
            keep = dropout_keep(args.dropout_p, args.dropout_seed, args.dropout_offset, list(args.index_base), b, hq,
                                s.rows, s.keys)
        part, part_lse = attend(
            q[s.q_index(args.layout_q)], k[s.k_index(args)], v[s.k_index(args)], scale=scale, position=s.position,
            window=(args.window_left, 0 if args.causal else args.window_right), chunk=args.chunk,
            softcap=args.softcap, bias=score_part(values.get("bias"), b, s.rows, s.keys),
            slopes=slopes[b] if slopes is not None and slopes.ndim == 2 else slopes,
            mask=score_part(None if mask is None else mask != 0, b, s.rows, s.keys), sinks=values.get("sinks"),
            keep=keep)
        out[s.q_index(args.layout_q)] = part
        rows = slice(s.q_start, s.q_start + s.rows)
        lse[(slice(None), rows) if args.layout_q == THD else (b, slice(None), rows)] = part_lse
    return sequence_first(out, args.layout_q), lse


def values_of(args):
    present = {name: getattr(args, name).values() for name in DIFFERENTIABLE}
    return {name: value for name, value in present.items() if value is not None}


FORWARD = """
b=2 hq=3 hkv=1 sq=7 sk=9 d=5 dv=4 lse
b=2 hq=2 sq=7 sk=9 d=8 causal lse layout_q=bhsd layout_kv=bhsd
b=2 hq=2 sq=9 sk=7 d=8 causal lse
b=2 hq=2 sq=9 sk=7 d=8 window=3,2 offset=top lse
b=2 hq=2 sq=9 sk=20 d=8 window=-1,4 offset=5 lse
b=2 hq=2 sq=9 sk=20 d=8 causal offset=-4 sinks lse
b=1 hq=2 sq=20 sk=20 d=8 causal chunk=6 lse
b=1 hq=2 sq=20 sk=20 d=8 chunk=6 offset=-9 lse
b=2 hq=4 hkv=2 sq=6 sk=8 d=8 softcap softcap_value=2 scale=-1.5 lse
b=2 hq=4 hkv=2 sq=6 sk=8 d=8 scale=0 lse
b=2 hq=4 sq=6 sk=8 d=8 alibi causal lse
b=2 hq=4 sq=6 sk=8 d=8 alibi=bh lse
b=2 hq=4 sq=6 sk=8 d=8 bias=f32:bhij lse
b=2 hq=4 sq=6 sk=8 d=8 bias=f32:j mask=bi sinks lse
b=2 hq=4 sq=6 sk=8 d=8 bias=f64:hj mask=hij lse
b=2 hq=4 sq=6 sk=8 d=8 mask=bhij causal lse
b=2 hq=3 sq=6 sk=11 d=8 dropout p=0.3 seed=9 lse
b=2 hq=3 sq=6 sk=11 d=8 dropout p=1 lse
b=3 hq=2 sq=8 sk=12 d=8 used_q used_k lq=8,0,3 lk=12,5,0 causal lse
b=3 hq=2 tq=15 tk=20 d=8 layout_q=thd layout_kv=thd lq=4,0,9 lk=7,3,8 causal sinks lse
b=3 hq=2 tq=15 sk=12 d=8 layout_q=thd lq=1,6,8 used_k lk=3,0,12 window=4,0 lse
b=3 hq=2 tq=15 tk=20 d=8 layout_q=thd layout_kv=thd used_q used_k lq=5,5,5 lk=7,5,8 dropout chunk=3 lse
b=3 hq=4 hkv=2 sq=2 sk=24 d=8 page=4 used_k lk=24,3,0 pages=shuffled causal lse
b=3 hq=4 hkv=2 sq=2 sk=24 d=8 page=1 used_k lk=24,3,7 pages=shuffled layout_kv=bhsd leftpad lpad=3,3,0 alibi lse
b=4 hq=4 hkv=2 sq=2 sk=24 d=8 page=8 cache_batch=3 used_k lk=uniform:3..24 leftpad causal lse
b=4 hq=2 sq=3 sk=9 d=8 cache_batch=2 used_k lk=uniform:1..9 bias=f32:bhij lse
b=3 hq=2 sq=5 sk=15 d=8 used_k leftpad lk=15,8,4 lpad=2,8,1 window=5,1 chunk=7 dropout mask=bhij lse
"""


@pytest.mark.parametrize("line", FORWARD.strip().splitlines())
@pytest.mark.parametrize("dtype", ["f64", "f32 out=f64", "bf16 out=f64", "f16 out=f64"])
def test_forward(line, dtype):
    if "bias=f64" in line and dtype != "f64":
        pytest.skip("bias has the inputs' dtype or f32")
    inputs = Inputs(f"attention {line} {dtype}")
    inputs.run("ref")
    out, lse = forward(inputs.args, values_of(inputs.args))
    numpy.testing.assert_allclose(inputs.args.out.values(), out, rtol=1e-12, atol=1e-13)
    numpy.testing.assert_allclose(inputs.args.lse.values(), lse, rtol=1e-12, atol=1e-12)
    assert (inputs.args.status.array() == 0).all()


@pytest.mark.parametrize("dtype, bits", [("f32", 23), ("f16", 10), ("bf16", 7)])
def test_outputs_are_rounded_once(dtype, bits):
    inputs = Inputs(f"attention b=2 hq=2 sq=30 sk=30 d=16 causal {dtype} lse")
    inputs.run("ref")
    out, _ = forward(inputs.args, values_of(inputs.args))
    half_ulp = 2.0 ** (numpy.floor(numpy.log2(abs(out))) - bits - 1)
    assert (abs(inputs.args.out.values() - out) <= half_ulp * (1 + 1e-9)).all()


def test_dropout_index_base():
    inputs = Inputs("attention b=2 hq=3 sq=6 sk=11 d=8 f64 dropout p=0.5 lse")
    inputs.args.index_base[:] = [3, 1, 1000, 2**33 + 3]
    inputs.run("ref")
    out, lse = forward(inputs.args, values_of(inputs.args))
    numpy.testing.assert_allclose(inputs.args.out.values(), out, rtol=1e-12, atol=1e-13)
    numpy.testing.assert_allclose(inputs.args.lse.values(), lse, rtol=1e-12)


BACKWARD = """
b=2 hq=2 hkv=1 sq=3 sk=4 d=3 dv=2
b=1 hq=2 sq=4 sk=5 d=3 causal dlse layout_q=bhsd layout_kv=bhsd
b=1 hq=2 sq=5 sk=3 d=3 causal sinks dlse
b=1 hq=2 sq=4 sk=5 d=3 softcap softcap_value=1.5 scale=0.9 dlse
b=2 hq=2 sq=3 sk=4 d=3 bias=f64:bhij alibi dlse
b=2 hq=2 sq=3 sk=4 d=3 bias=f32:j alibi=bh sinks
b=2 hq=2 sq=3 sk=4 d=3 bias=f64:hi mask=bhij
b=1 hq=2 sq=4 sk=6 d=3 dropout p=0.4 seed=3 sinks dlse
b=1 hq=2 sq=4 sk=6 d=3 dropout p=1 dlse
b=2 hq=2 sq=4 sk=6 d=3 window=2,1 chunk=3 used_q used_k lq=4,2 lk=6,3
b=3 hq=2 hkv=1 tq=8 tk=9 sq=4 sk=5 d=3 layout_q=thd layout_kv=thd lq=3,0,4 lk=2,2,5 causal bias=f64:ij
b=2 hq=4 hkv=2 sq=4 sk=5 d=3 dv=4 causal window=3,0 softcap softcap_value=2 alibi bias=f64:hij sinks dropout p=0.2 mask=bij used_k leftpad lk=5,4 lpad=1,0 dlse
"""


@pytest.mark.parametrize("line", BACKWARD.strip().splitlines())
def test_backward(line):
    inputs = Inputs(f"attention {line} f64 pass=bwd")
    args = inputs.args
    inputs.run("ref")
    values = values_of(args)
    dout = args.dout.values()
    dlse = args.dlse.values()

    def loss():
        out, lse = forward(args, values)
        total = numpy.sum(out * dout, where=~numpy.isnan(dout))
        if dlse is not None:
            total += numpy.sum(lse * dlse, where=numpy.isfinite(lse))
        return total

    step = 1e-5
    for name, gradient in DIFFERENTIABLE.items():
        if name not in values:
            continue
        x = values[name]
        want = numpy.zeros_like(x)
        for place in numpy.ndindex(x.shape):
            if numpy.isnan(x[place]):
                continue  # no sequence shows it: its gradient is 0
            kept, ends = x[place], []
            for sign in (1, -1):
                x[place] = kept + sign * step
                ends.append(loss())
            x[place] = kept
            want[place] = (ends[0] - ends[1]) / (2 * step)
        numpy.testing.assert_allclose(getattr(args, gradient).values(), want, rtol=1e-6, atol=1e-8, err_msg=gradient)


KV_APPEND = """
b=3 hkv=2 sn=2 sk=9 d=8
b=3 hkv=2 sn=2 sk=9 d=8 dv=5 lk=0,7,3 layout_cache=bhsd layout_new=bhsd
b=3 hq=4 hkv=2 sn=2 sk=12 d=8 rotary=6
b=3 hq=4 hkv=2 sn=2 sk=12 d=8 rotary=8 interleaved q_per_position
b=3 hq=4 hkv=2 sn=2 sq=2 sk=12 d=8 rotary=4 rotary_seqlens q_per_position rotary_n=30
b=3 hq=2 hkv=2 sn=2 sk=12 d=8 rotary=4 leftpad lk=7,3,5 lpad=2,0,5 interleaved
b=3 hkv=2 tn=6 sk=12 d=8 layout_new=thd lq=1,0,4 rotary=2
b=3 hq=4 hkv=2 tn=6 sk=12 d=8 layout_new=thd lq=1,0,5 rotary=8 q_per_position
b=3 hkv=2 sn=3 sk=12 d=8 page=4 pages=shuffled
b=3 hq=2 hkv=2 sn=3 sk=12 d=8 page=3 num_pages=20 pages=shuffled cache_batch=5 rotary=8 interleaved leftpad
b=3 hq=2 noappend sq=2 sk=12 d=8 rotary=8
"""


@pytest.mark.parametrize("line", KV_APPEND.strip().splitlines())
@pytest.mark.parametrize("dtype", ["f64", "f32", "bf16"])
def test_kv_append(line, dtype):
    inputs = Inputs(f"kv_append {line} {dtype}")
    args = inputs.args
    caches = {name: getattr(args, name).values() for name in ("k_cache", "v_cache")}
    inputs.run("ref")
    assert (args.status.array() == 0).all()
    tolerance = dict(f64=1e-14, f32=1e-6, bf16=1e-2)[dtype]
    new = {n: getattr(args, n).values() for n in ("k_new", "v_new", "q")}
    new = {n: None if x is None else sequence_first(x, args.layout_new) for n, x in new.items()}
    caches = {n: sequence_first(x, args.layout_cache) for n, x in caches.items()}
    cos, sin = args.rotary_cos.values(), args.rotary_sin.values()
    table, interleaved = args.page_table.array(), args.rotary_style == 1
    q_out = None if new["q"] is None else numpy.zeros_like(new["q"])

    for b in range(args.status.shape[0]):
        def number(name, standard, index=b):
            array = getattr(args, name).array()
            return standard if array is None else int(array[index])

        def rows(tensor, offsets):
            if args.layout_new != THD:
                return (b,)
            return (slice(number(offsets, 0), number(offsets, 0, b + 1)),)

        start, cache_row = number("cache_seqlens", 0), number("cache_batch_idx", b)
        position = number("rotary_seqlens", start - number("leftpad_k", 0))
        if new["k_new"] is not None:
            k, v = (new[n][rows(n, "cu_seqlens_new")] for n in ("k_new", "v_new"))
            if cos is not None:
                k = rotate(k, position + numpy.arange(len(k)), cos, sin, interleaved)
            places = start + numpy.arange(len(k))
            page_size = caches["k_cache"].shape[1]
            index = (cache_row, places) if table is None else (table[cache_row][places // page_size], places % page_size)
            caches["k_cache"][index] = k
            caches["v_cache"][index] = v
        if q_out is not None:
            q = new["q"][rows("q", "cu_seqlens_q")]
            steps = numpy.arange(len(q)) if args.q_positions else numpy.zeros(len(q), int)
            q_out[rows("q", "cu_seqlens_q")] = rotate(q, position + steps, cos, sin, interleaved)

    for name, want in caches.items():
        got = sequence_first(getattr(args, name).values(), args.layout_cache)
        numpy.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance, err_msg=name)
    if q_out is not None:
        got = sequence_first(args.q_out.values(), args.layout_new)
        numpy.testing.assert_allclose(got, q_out, rtol=tolerance, atol=tolerance)
