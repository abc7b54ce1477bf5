"""heed.attention, heed.kv_append and heed.explain over NumPy arrays and whatever has DLPack."""

import threading
import time

import numpy as np
import pytest

heed = pytest.importorskip("heed", reason="needs PYTHONPATH=<build>/python")
from conftest import textbook  # noqa: E402


class Foreign:
    """An array library of its own: DLPack and nothing else."""

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.ndim = array, array.shape, array.dtype, array.ndim

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class OldForeign(Foreign):
    """From before DLPack 1: knows no max_version."""

    def __dlpack__(self, stream=None):
        return self.array.__dlpack__()


@pytest.fixture
def qkv(normal):
    return normal(2, 33, 4, 64), normal(2, 47, 2, 64), normal(2, 47, 2, 64)


@pytest.mark.parametrize("causal", [False, True])
def test_numpy(qkv, causal):
    out, lse = heed.attention(*qkv, causal=causal, return_lse=True)
    want, want_lse = textbook(*qkv, causal)
    assert type(out) is np.ndarray and out.dtype == np.float32
    np.testing.assert_allclose(out, want, atol=3e-6)
    np.testing.assert_allclose(lse, want_lse, atol=1e-5)


def test_bfloat16_of_ml_dtypes(qkv):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    rounded = [array.astype(ml_dtypes.bfloat16) for array in qkv]
    out = heed.attention(*rounded)
    assert out.dtype == ml_dtypes.bfloat16
    want = textbook(*(array.astype(np.float32) for array in rounded))[0]
    np.testing.assert_allclose(out.astype(np.float32), want, atol=2e-2, rtol=1e-2)
    np.testing.assert_allclose(heed.attention(*rounded, out_dtype="float32"), want, atol=1e-2)


def test_float16(qkv):
    rounded = [array.astype(np.float16) for array in qkv]
    want = textbook(*(array.astype(np.float32) for array in rounded))[0]
    np.testing.assert_allclose(heed.attention(*rounded).astype(np.float32), want, atol=2e-3, rtol=2e-3)


def test_read_only_inputs_and_no_copies(qkv):
    for array in qkv:
        array.flags.writeable = False
    out = np.full(qkv[0].shape, np.nan, np.float32)
    assert heed.attention(*qkv, out=out) is out
    np.testing.assert_allclose(out, textbook(*qkv)[0], atol=3e-6)
    out.flags.writeable = False
    with pytest.raises(heed.InvalidArgument, match="out is read-only"):
        heed.attention(*qkv, out=out)


def test_strides(normal):
    """Heads first in memory, every second key, one key head for all by stride 0."""
    q = normal(2, 3, 20, 48).transpose(0, 2, 1, 3)
    k, v = (np.broadcast_to(normal(2, 62, 1, 48)[:, ::2], (2, 31, 3, 48)) for _ in range(2))
    np.testing.assert_allclose(heed.attention(q, k, v), textbook(q, k, v)[0], atol=3e-6)


def test_layout_bhsd(qkv):
    heads_first = [array.transpose(0, 2, 1, 3) for array in qkv]
    out = heed.attention(*heads_first, layout="bhsd")
    np.testing.assert_allclose(out.transpose(0, 2, 1, 3), textbook(*qkv)[0], atol=3e-6)


def test_packed(normal):
    lengths_q, lengths_k = [3, 0, 9], [5, 4, 11]
    q, k, v = normal(12, 4, 32), normal(20, 2, 32), normal(20, 2, 32)
    cu_q, cu_k = (np.cumsum([0, *lengths], dtype=np.int32) for lengths in (lengths_q, lengths_k))
    out, lse = heed.attention(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, causal=True, return_lse=True)
    assert lse.shape == (4, 12)
    for b in range(3):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        np.testing.assert_allclose(out[rows], textbook(
            q[None, rows], k[None, keys], v[None, keys], True)[0][0], atol=3e-6)


def test_every_score_option(normal, qkv):
    """Against the reference backend, forced by name: what differs from it beyond rounding is an option lost."""
    options = dict(window=(11, 3), softmax_scale=0.2, softcap=5.0, bias=normal(1, 4, 33, 47), sinks=normal(4),
                   mask=normal(2, 1, 33, 47) > -0.5, alibi_slopes=abs(normal(2, 4)), q_offset=7, chunk=16,
                   dropout_p=0.3, seed=(12, 5), seqused_q=np.array([33, 20], np.int32),
                   seqused_k=np.array([47, 31], np.int32), leftpad=np.array([0, 4], np.int32))
    got = heed.attention(*qkv, **options)
    np.testing.assert_allclose(got, heed.attention(*qkv, **options, backend="ref"), atol=3e-6)
    for name in options:
        less = {key: value for key, value in options.items() if key != name and (name != "dropout_p" or key != "seed")}
        if name != "seed":
            assert abs(heed.attention(*qkv, **less) - got).max() > 1e-4, name
    assert abs(heed.attention(*qkv, **{**options, "q_offset": "top"}) - got).max() > 1e-4


def test_dropout_seed(qkv):
    import random
    assert (heed.attention(*qkv, dropout_p=0.5, seed=3) == heed.attention(*qkv, dropout_p=0.5, seed=(3, 0))).all()
    assert (heed.attention(*qkv, dropout_p=0.5, seed=np.array([3, 0]))
            == heed.attention(*qkv, dropout_p=0.5, seed=3)).all()
    random.seed(1)
    first, second = heed.attention(*qkv, dropout_p=0.5), heed.attention(*qkv, dropout_p=0.5)
    assert (first != second).any()
    random.seed(1)
    assert (first == heed.attention(*qkv, dropout_p=0.5)).all()


def paged(normal, page_size=4):
    lengths = np.array([9, 14], np.int32)
    table = np.array([[5, 1, 7, 0], [2, 6, 3, 4]], np.int32)
    k, v = normal(8, page_size, 2, 32), normal(8, page_size, 2, 32)
    return normal(2, 1, 4, 32), k, v, lengths, table


def test_pages(normal):
    q, k, v, lengths, table = paged(normal)
    out = heed.attention(q, k, v, page_table=table, seqused_k=lengths, causal=True)
    for b in range(2):
        keys, values = (cache[table[b]].reshape(16, 2, 32)[None, :lengths[b]] for cache in (k, v))
        np.testing.assert_allclose(out[b], textbook(q[b:b + 1], keys, values)[0][0], atol=3e-6)


def test_pages_out_of_range_are_an_error_before_the_run(normal):
    q, k, v, lengths, table = paged(normal)
    table[1, 2] = 99
    out = np.full_like(q, 7)
    with pytest.raises(heed.InvalidArgument, match="page_table.*99"):
        heed.attention(q, k, v, page_table=table, seqused_k=lengths, out=out)
    assert (out == 7).all()
    status = np.full(2, -1, np.int32)
    heed.attention(q, k, v, page_table=table, seqused_k=lengths, validate=False, status=status)
    assert list(status) == [0, heed._core.STATUS_BAD_PAGE]


@pytest.mark.parametrize("interleaved", [False, True])
def test_kv_append(normal, interleaved):
    q, k_new, v_new = normal(2, 3, 4, 16), normal(2, 3, 2, 16), normal(2, 3, 2, 16)
    k_cache, v_cache = np.zeros((2, 10, 2, 16), np.float32), np.zeros((2, 10, 2, 16), np.float32)
    lengths = np.array([4, 6], np.int32)
    angles = np.outer(np.arange(10), 10000.0 ** (-np.arange(8) / 8)).astype(np.float32)
    turned = heed.kv_append(k_new, v_new, k_cache, v_cache, lengths, q=q, rotary_cos=np.cos(angles),
                            rotary_sin=np.sin(angles), rotary_interleaved=interleaved)

    def turn(x, position):
        first, second = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :8], x[..., 8:])
        cos, sin = np.cos(angles[position]), np.sin(angles[position])
        pair = first * cos - second * sin, first * sin + second * cos
        return np.stack(pair, -1).reshape(x.shape) if interleaved else np.concatenate(pair, -1)

    for b in range(2):
        for t in range(3):
            np.testing.assert_allclose(k_cache[b, lengths[b] + t], turn(k_new[b, t], lengths[b] + t), atol=1e-6)
            np.testing.assert_allclose(turned[b, t], turn(q[b, t], lengths[b] + t), atol=1e-6)
            assert (v_cache[b, lengths[b] + t] == v_new[b, t]).all()
        assert (k_cache[b, :lengths[b]] == 0).all()


def test_append_past_the_capacity(normal):
    k_new, cache = normal(1, 3, 2, 16), np.zeros((1, 10, 2, 16), np.float32)
    with pytest.raises(heed.InvalidArgument, match="cache_seqlens"):
        heed.kv_append(k_new, k_new, cache, cache.copy(), np.array([8], np.int32))
    assert (cache == 0).all()


# ---- other libraries -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("library", [Foreign, OldForeign])
def test_anything_with_dlpack(qkv, library):
    out = np.empty_like(qkv[0])
    heed.attention(*(library(array) for array in qkv), out=library(out))
    np.testing.assert_allclose(out, textbook(*qkv)[0], atol=3e-6)
    with pytest.raises(heed.InvalidArgument, match="out = None"):
        heed.attention(*(library(array) for array in qkv))


def test_mixed_libraries_on_one_device(qkv):
    q, k, v = qkv
    np.testing.assert_allclose(heed.attention(q, Foreign(k), v), textbook(*qkv)[0], atol=3e-6)


# ---- errors ----------------------------------------------------------------------------------------------------------

ERRORS = {
    "a list": (lambda q, k, v: heed.attention(q.tolist(), k, v), heed.InvalidArgument, "q is of type list"),
    "a list as k": (lambda q, k, v: heed.attention(q, k.tolist(), v), heed.InvalidArgument, "k is of type list"),
    "int64": (lambda q, k, v: heed.attention(q.astype(np.int64), k, v), heed.InvalidArgument,
              r"q.dtype = int64: must be float32, float16 or bfloat16"),
    "byte order": (lambda q, k, v: heed.attention(q.astype(">f4"), k, v), heed.InvalidArgument, "byte order"),
    "two dtypes": (lambda q, k, v: heed.attention(q, k.astype(np.float16), v), heed.InvalidArgument, r"k\.dtype"),
    "offsets in int64": (lambda q, k, v: heed.attention(q[0], k[0], v[0], cu_seqlens_q=np.array([0, 33]),
                                                        cu_seqlens_k=np.array([0, 47])),
                         heed.InvalidArgument, r"cu_seqlens_q.dtype = int64: must be int32"),
    "mask of bytes": (lambda q, k, v: heed.attention(q, k, v, mask=np.ones((1, 1, 33, 47), np.uint8)),
                      heed.InvalidArgument, r"mask.dtype = uint8: must be bool"),
    "shape": (lambda q, k, v: heed.attention(q, k[:, :, :, :32], v), heed.InvalidArgument, r"k.shape\[3\] = 32"),
    "heads": (lambda q, k, v: heed.attention(q[:, :, :3], k, v), heed.InvalidArgument, "nheads_q"),
    "dimensions": (lambda q, k, v: heed.attention(q[0], k, v), heed.InvalidArgument, "q.ndim = 3: must be 4"),
    "last stride": (lambda q, k, v: heed.attention(q[..., ::2], k[..., ::2], v), heed.InvalidArgument,
                    r"q.stride\[3\] = 2"),
    "NaN scale": (lambda q, k, v: heed.attention(q, k, v, softmax_scale=float("nan")), heed.InvalidArgument,
                  "softmax_scale = nan: must be finite"),
    "window": (lambda q, k, v: heed.attention(q, k, v, window=(-5, 0)), heed.InvalidArgument, r"window = -5"),
    "one-sided window": (lambda q, k, v: heed.attention(q, k, v, window=3), heed.InvalidArgument, "window = 3"),
    "softcap": (lambda q, k, v: heed.attention(q, k, v, softcap=-1.0), heed.InvalidArgument, "softcap = -1"),
    "dropout": (lambda q, k, v: heed.attention(q, k, v, dropout_p=1.5, seed=1), heed.InvalidArgument,
                "dropout_p = 1.5"),
    "layout": (lambda q, k, v: heed.attention(q, k, v, layout="sbhd"), heed.InvalidArgument, "layout = 'sbhd'"),
    "offset": (lambda q, k, v: heed.attention(q, k, v, q_offset="bottom"), heed.InvalidArgument, "q_offset = 'bottom'"),
    "left padding by our name": (lambda q, k, v: heed.attention(q, k, v, leftpad=np.zeros(3, np.int32)),
                                 heed.InvalidArgument, r"^leftpad.shape\[0\] = 3"),
    "unknown backend": (lambda q, k, v: heed.attention(q, k, v, backend="tpu"), heed.NotFound, "tpu"),
    "descale": (lambda q, k, v: heed.attention(q, k, v, k_descale=q), heed.NotSupported, "k_descale"),
    "output dtype": (lambda q, k, v: heed.attention(q, k, v, out_dtype=np.int32), heed.InvalidArgument, "out_dtype"),
    "a line and tensors": (lambda q, k, v: heed.explain("attention sq=1 d=8", k), heed.InvalidArgument, "problem line"),
}
BUILTINS = {heed.InvalidArgument: ValueError, heed.NotSupported: NotImplementedError, heed.NotFound: LookupError,
            heed.OutOfMemory: MemoryError}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(qkv, name):
    call, kind, sentence = ERRORS[name]
    with pytest.raises(kind, match=sentence) as raised:
        call(*qkv)
    assert isinstance(raised.value, heed.Error) and isinstance(raised.value, RuntimeError)
    assert isinstance(raised.value, BUILTINS[kind])


def test_a_forced_backend_that_is_not_here(qkv):
    backend = "cuda" if "cuda/" in heed.info() else "cpu/attention_fwd_neon"
    with pytest.raises(heed.NotSupported):
        heed.attention(*qkv, backend=backend)


# ---- explain, threads ------------------------------------------------------------------------------------------------

def test_explain_takes_the_same_arguments(qkv):
    text = heed.explain(*qkv, causal=True, window=(5, 0), return_lse=True)
    line = next(row for row in text.splitlines() if row.startswith("problem"))
    for word in ("b=2", "hq=4", "hkv=2", "sq=33", "sk=47", "d=64", "lse"):
        assert word in line.split(), line
    assert heed.explain(line.split(None, 1)[1]).splitlines()[0] == line
    assert "ref/attention" in heed.explain(*qkv, backend="ref")


def test_other_threads_run_meanwhile(normal):
    q, k, v = normal(1, 2048, 8, 64), normal(1, 2048, 8, 64), normal(1, 2048, 8, 64)
    counted, stop = [0], threading.Event()

    def count():
        while not stop.is_set():
            counted[0] += 1
            time.sleep(0)

    thread = threading.Thread(target=count)
    thread.start()
    try:
        time.sleep(0.02)
        before, start = counted[0], time.perf_counter()
        while time.perf_counter() - start < 0.2:
            heed.attention(q, k, v, num_threads=1)
        during = counted[0] - before
    finally:
        stop.set()
        thread.join()
    assert during > 20


def test_threads_call_at_once(qkv):
    want, wrong = heed.attention(*qkv, causal=True), []

    def work():
        for _ in range(50):
            if not (heed.attention(*qkv, causal=True) == want).all():
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_jax_arrays(qkv, monkeypatch):
    jax = pytest.importorskip("jax")
    out, lse = heed.attention(*(jax.numpy.asarray(array) for array in qkv), causal=True, return_lse=True)
    assert isinstance(out, jax.Array)
    np.testing.assert_allclose(out, textbook(*qkv, True)[0], atol=3e-6)
    np.testing.assert_allclose(lse, textbook(*qkv, True)[1], atol=1e-4)
    with pytest.raises(heed.InvalidArgument, match="out, status"):
        heed.attention(*(jax.numpy.asarray(array) for array in qkv), out=jax.numpy.zeros((2, 33, 4, 64)))
    for built in (True, False):
        if not built:
            monkeypatch.setattr(heed._attention, "jax_is_built", lambda: False)
            if jax.default_backend() != "cpu":
                break
        elif not heed._attention.jax_is_built():
            continue
        out = heed.attention(*(jax.numpy.asarray(array) for array in qkv))
        np.testing.assert_allclose(out, textbook(*qkv)[0], atol=3e-6)


def test_cupy_arrays(qkv):
    cupy = pytest.importorskip("cupy")
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError:
        pytest.skip("no GPU")
    with cupy.cuda.Stream(non_blocking=True) as stream:
        out, lse = heed.attention(*(cupy.asarray(array) for array in qkv), causal=True, return_lse=True)
        assert isinstance(out, cupy.ndarray)
        stream.synchronize()
    np.testing.assert_allclose(out.get(), textbook(*qkv, True)[0], atol=3e-6)
    np.testing.assert_allclose(lse.get(), textbook(*qkv, True)[1], atol=1e-5)


def test_the_package_links_no_framework_and_no_cuda():
    import pathlib
    import re
    import shutil
    import subprocess
    if shutil.which("readelf") is None:
        pytest.skip("no readelf")
    files = list(pathlib.Path(heed.__file__).parent.glob("*.so*"))
    assert len(files) >= 2
    for file in files:
        needed = re.findall(r"NEEDED.*\[(.+)\]", subprocess.run(["readelf", "-d", file], capture_output=True, text=True,
                                                              check=True).stdout)
        system = {"libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "libgcc_s.so.1", "libstdc++.so.6"}
        foreign = {name for name in needed if name not in system and not name.startswith(("libheed.so", "ld-linux"))}
        assert not foreign, f"{file.name} needs {foreign}"


# ---- warm ------------------------------------------------------------------------------------------------------------

def test_warm_says_what_it_did_or_why_not():
    assert heed.warm([]) == {"num_kernels": 0, "num_compiled": 0, "compile_seconds": 0.0}
    with pytest.raises(heed.InvalidArgument, match='architecture = "sm_1"'):
        heed.warm("attention sq=64 d=64 bf16", arch="sm_1")
    with pytest.raises(heed.NotSupported, match="no GPU kernel does"):
        heed.warm("attention sq=64 d=64 pass=bwd", arch="sm_90a")
    with pytest.raises(heed.InvalidArgument, match="problem line"):
        heed.warm(["nonsense"])
