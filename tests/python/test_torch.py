"""heed.torch: the same call on torch tensors, gradients, torch.compile, scaled_dot_product_attention's meaning."""

import subprocess
import sys
import threading

import pytest

torch = pytest.importorskip("torch")
heed = pytest.importorskip("heed", reason="needs PYTHONPATH=<build>/python")
import heed.torch  # noqa: E402
from torch_device import DEVICE, needs_backward, seeded  # noqa: E402, F401

sdpa = torch.nn.functional.scaled_dot_product_attention


def tensors(device=None, b=2, sq=33, sk=47, hq=4, hkv=2, d=64, dtype=torch.float32):
    return tuple(torch.randn(b, s, h, d, dtype=dtype, device=device) for s, h in ((sq, hq), (sk, hkv), (sk, hkv)))


def textbook(q, k, v, causal=False, bias=None, sinks=None, alibi=None, softcap=0.0):
    """(out, lse) by torch's own operations, which autograd differentiates."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    sq, sk = scores.shape[-2:]
    i, j = torch.arange(sq, device=q.device)[:, None] + sk - sq, torch.arange(sk, device=q.device)
    if bias is not None:
        scores = scores + bias
    if alibi is not None:
        scores = scores - alibi[:, None, None] * (i - j).abs()
    if causal:
        scores = scores.masked_fill(j > i, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weights[..., :sk], v), scores.logsumexp(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_forward(dtype):
    q, k, v = tensors(dtype=dtype)
    out, lse = heed.attention(q, k, v, causal=True, return_lse=True)
    want, want_lse = textbook(*(x.float() for x in (q, k, v)), causal=True)
    assert out.dtype == dtype and out.device == q.device and out.is_contiguous()
    tolerance = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(out.float(), want, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse, want_lse, atol=1e-4, rtol=1e-5)
    assert heed.attention(q, k, v, out_dtype=torch.float32).dtype == torch.float32


@needs_backward
def test_every_gradient():
    q, k, v = (x.requires_grad_() for x in tensors(sq=9, sk=13, d=16))
    bias, sinks, alibi = (torch.randn(*shape).requires_grad_() for shape in ((1, 4, 9, 13), (4,), (4,)))
    inputs = (q, k, v, bias, sinks, alibi)
    dout, dlse = torch.randn(2, 9, 4, 16), torch.randn(2, 4, 9)
    out, lse = heed.attention(q, k, v, causal=True, bias=bias, sinks=sinks, alibi_slopes=alibi, softcap=3.0,
                              return_lse=True)
    got = torch.autograd.grad((out, lse), inputs, (dout, dlse))
    want = torch.autograd.grad(textbook(q, k, v, True, bias, sinks, alibi, 3.0), inputs, (dout, dlse))
    for name, g, w in zip(("q", "k", "v", "bias", "sinks", "alibi_slopes"), got, want):
        torch.testing.assert_close(g, w, atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@needs_backward
def test_one_gradient_and_none():
    q, k, v = tensors(d=16)
    k.requires_grad_()
    heed.attention(q, k, v).sum().backward()  # dout is broadcast: its rows are not contiguous
    assert k.grad is not None and q.grad is None
    with torch.no_grad():
        assert not heed.attention(q, k, v).requires_grad
    with pytest.raises(heed.InvalidArgument, match="out"):
        heed.attention(q, k, v, out=torch.empty_like(q))


@needs_backward
def test_gradients_of_packed_sequences():
    lengths = torch.tensor([0, 3, 3, 12], dtype=torch.int32)
    q, k, v = (torch.randn(12, h, 32, requires_grad=True) for h in (4, 2, 2))
    dout = torch.randn(12, 4, 32)
    got = torch.autograd.grad(heed.attention(q, k, v, cu_seqlens_q=lengths, cu_seqlens_k=lengths, causal=True),
                              (q, k, v), dout)
    outs = [textbook(q[None, a:b], k[None, a:b], v[None, a:b], True)[0][0] for a, b in ((0, 3), (3, 12))]
    for g, w in zip(got, torch.autograd.grad(torch.cat(outs), (q, k, v), dout)):
        torch.testing.assert_close(g, w, atol=1e-5, rtol=1e-5)


@needs_backward
def test_dropout_follows_manual_seed_and_has_its_gradient():
    q, k, v = tensors(d=16)
    q.requires_grad_()
    torch.manual_seed(5)
    first = heed.attention(q, k, v, dropout_p=0.4)
    second = heed.attention(q, k, v, dropout_p=0.4)
    torch.manual_seed(5)
    assert torch.equal(first, heed.attention(q, k, v, dropout_p=0.4)) and not torch.equal(first, second)
    # The same mask forward and backward: the slope along a direction is the difference quotient.
    seed, step = torch.tensor([3, 4]), torch.randn_like(q)
    dout = torch.randn_like(q)
    (gradient,) = torch.autograd.grad(heed.attention(q, k, v, dropout_p=0.4, seed=seed), q, dout)
    with torch.no_grad():
        ends = [(heed.attention(q + side * 1e-2 * step, k, v, dropout_p=0.4, seed=seed) * dout).double().sum()
                for side in (1, -1)]
    assert (gradient * step).sum().item() == pytest.approx((ends[0] - ends[1]).item() / 2e-2, rel=2e-2)


@pytest.mark.parametrize("gradient", [False, pytest.param(True, marks=needs_backward)])
def test_opcheck(gradient):
    q, k, v = tensors(sq=5, sk=7, d=16)
    for x in (q, k, v):
        x.requires_grad_(gradient)
    arguments = (q, k, v, torch.randn(1, 4, 5, 7), None, None, torch.randn(4)) + (None,) * 8 + (
        None, 0.0, 0.0, True, -1, -1, 0, False, None, 0, 0, 0, False, False, "bshd", "bshd", None, 0, False, True,
        False)
    torch.library.opcheck(torch.ops.heed.attention, arguments)


def test_opcheck_of_kv_append():
    k_new, cache = torch.randn(2, 3, 2, 16), torch.zeros(2, 10, 2, 16)
    angles = torch.outer(torch.arange(10.0), 10000.0 ** (-torch.arange(8) / 8))
    arguments = (k_new, k_new.clone(), cache, cache.clone(), torch.tensor([1, 4], dtype=torch.int32),
                 torch.randn(2, 3, 4, 16), angles.cos(), angles.sin()) + (None,) * 6 + (
                     False, True, "bshd", "bshd", None, False, 0)
    torch.library.opcheck(torch.ops.heed.kv_append, arguments)


def test_compile_without_breaks_or_recompiling():
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()

    def layer(q, k, v):
        return heed.attention(q * 2, k, v, causal=True, window=(20, 0)) + 1

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for length in (16, 17, 40, 100):
        q, k, v = tensors(sq=length, sk=length + 3)
        torch.testing.assert_close(compiled(q, k, v), layer(q, k, v))
    assert counter.frame_count == 1


@needs_backward
def test_compile_of_a_gradient():
    def loss(q, k, v):
        return heed.torch.sdpa(q, k, v, is_causal=True).square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (8, 13):
        inputs = [torch.randn(2, 4, length, 16, requires_grad=True) for _ in range(3)]
        got = torch.autograd.grad(compiled(*inputs), inputs)
        for g, w in zip(got, torch.autograd.grad(loss(*inputs), inputs)):
            torch.testing.assert_close(g, w)


def test_compile_of_kv_append():
    def step(k_new, cache, lengths):
        heed.kv_append(k_new, k_new * 2, cache, cache_v, lengths)
        return cache.sum()

    cache_v = torch.zeros(2, 10, 2, 16)
    caches = [torch.zeros(2, 10, 2, 16) for _ in range(2)]
    k_new, lengths = torch.randn(2, 3, 2, 16), torch.tensor([1, 4], dtype=torch.int32)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(k_new, caches[0], lengths), step(k_new, caches[1], lengths))
    assert torch.equal(caches[0], caches[1]) and (caches[0] != 0).any()


# ---- scaled_dot_product_attention ------------------------------------------------------------------------------------

def arrangements():
    x = torch.randn
    yield "plain", (x(2, 4, 9, 16), x(2, 4, 13, 16), x(2, 4, 13, 16)), {}
    yield "causal, top left", (x(2, 4, 9, 16), x(2, 4, 13, 16), x(2, 4, 13, 8)), {"is_causal": True}
    yield "scale", (x(2, 4, 9, 16), x(2, 4, 13, 16), x(2, 4, 13, 16)), {"scale": 0.7}
    yield "boolean mask", (x(2, 4, 9, 16), x(2, 4, 13, 16), x(2, 4, 13, 16)), {"attn_mask": x(9, 13) > -0.5}
    yield "added mask", (x(2, 4, 9, 16), x(2, 4, 13, 16), x(2, 4, 13, 16)), {"attn_mask": x(2, 1, 9, 13)}
    yield "transposed mask", (x(2, 4, 9, 16), x(2, 4, 13, 16), x(2, 4, 13, 16)), {"attn_mask": x(13, 9).T}
    yield "a row sees nothing", (x(1, 1, 2, 8),) * 3, {"attn_mask": torch.tensor([[True, False], [False, False]])}
    yield "grouped", (x(2, 6, 9, 16), x(2, 2, 13, 16), x(2, 2, 13, 16)), {"enable_gqa": True}
    yield "three dimensions", (x(4, 9, 16), x(4, 13, 16), x(4, 13, 16)), {"attn_mask": x(4, 9, 13)}
    yield "two dimensions", (x(9, 16), x(13, 16), x(13, 16)), {}
    yield "five dimensions", (x(2, 3, 4, 9, 16), x(2, 3, 4, 13, 16), x(2, 3, 4, 13, 16)), {"attn_mask": x(3, 1, 9, 13)}
    yield "batch of one key", (x(2, 4, 9, 16), x(1, 4, 13, 16), x(1, 4, 13, 16)), {}
    yield "transposed tensors", tuple(x(2, 9, 4, 16).transpose(1, 2) for _ in range(3)), {"is_causal": True}
    yield "strided last dimension", tuple(x(2, 4, 16, 9).transpose(2, 3) for _ in range(3)), {}


@pytest.mark.parametrize("name", [name for name, _, _ in arrangements()])
def test_sdpa_means_what_torch_means(name):
    inputs, options = next((inputs, options) for found, inputs, options in arrangements() if found == name)
    with torch.no_grad():
        torch.testing.assert_close(heed.torch.sdpa(*inputs, **options), sdpa(*inputs, **options), atol=3e-6, rtol=1e-5)
    if needs_backward.args[0]:
        return
    inputs = [x.detach().requires_grad_() for x in inputs]
    got, want = heed.torch.sdpa(*inputs, **options), sdpa(*inputs, **options)
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, atol=3e-6, rtol=1e-5)
    dout = torch.randn_like(want)
    for g, w in zip(torch.autograd.grad(got, inputs, dout), torch.autograd.grad(want, inputs, dout)):
        torch.testing.assert_close(g, w, atol=2e-5, rtol=1e-4)


def test_sdpa_under_autocast():
    q = torch.randn(1, 2, 8, 16)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got, want = heed.torch.sdpa(q, q, q), sdpa(q, q, q)
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, atol=3e-2, rtol=3e-2)


def test_sdpa_dropout_follows_manual_seed():
    q = torch.randn(1, 2, 64, 16)
    torch.manual_seed(1)
    first = heed.torch.sdpa(q, q, q, dropout_p=0.3)
    torch.manual_seed(1)
    assert torch.equal(first, heed.torch.sdpa(q, q, q, dropout_p=0.3))
    kept = heed.torch.sdpa(torch.zeros(1, 1, 64, 8), torch.zeros(1, 1, 400, 8), torch.ones(1, 1, 400, 8), dropout_p=0.3)
    assert kept.mean().item() == pytest.approx(1.0, abs=0.02)


# ---- errors ----------------------------------------------------------------------------------------------------------

def test_errors():
    q, k, v = tensors()
    with pytest.raises(heed.InvalidArgument, match=r"k\.dtype"):
        heed.attention(q, k.half(), v)
    with pytest.raises(heed.InvalidArgument, match="is_causal"):
        heed.torch.sdpa(q, q, q, is_causal=True, attn_mask=torch.ones(4, 4, dtype=torch.bool))
    with pytest.raises(heed.InvalidArgument, match="enable_gqa"):
        heed.torch.sdpa(*(x.transpose(1, 2) for x in (q, k, v)))
    with pytest.raises(heed.InvalidArgument, match="q"):
        heed.attention(q.to("meta"), k, v)
    with pytest.raises(heed.NotSupported, match="k_new requires a gradient"):
        heed.kv_append(k.requires_grad_(), v, torch.zeros(2, 60, 2, 64), torch.zeros(2, 60, 2, 64),
                       torch.zeros(2, dtype=torch.int32))
    with pytest.raises(heed.InvalidArgument, match="seed"):
        heed.attention(q, k.detach(), v, dropout_p=0.5, seed=torch.zeros(3, dtype=torch.int64))


def test_importing_heed_imports_no_framework():
    script = "import sys, heed; assert not {'torch', 'jax', 'numpy', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_host_time_beside_torch():
    """Plan cached, one thread, one query and one key: what remains is the way there. Prints the table."""
    import timeit
    q = torch.randn(1, 1, 1, 64)
    heads_first, array = q.transpose(1, 2), q.cpu().numpy()
    calls = {"torch: q + q": lambda: q + q, "F.scaled_dot_product_attention": lambda: sdpa(*(heads_first,) * 3),
             "heed.attention, torch": lambda: heed.attention(q, q, q),
             "heed.torch.sdpa": lambda: heed.torch.sdpa(*(heads_first,) * 3),
             "heed.attention, numpy": lambda: heed.attention(array, array, array)}
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(300):
        for name, call in calls.items():
            best[name] = min(best[name], timeit.timeit(call, number=10) * 1e5)
    for name, microseconds in best.items():
        print(f"{name:32} {microseconds:6.2f} us")
    assert best["heed.attention, torch"] < 2.5 * best["F.scaled_dot_product_attention"]


# ---- CUDA ------------------------------------------------------------------------------------------------------------

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@cuda
def test_cuda_tensors_on_two_devices_are_refused():
    q, k, v = tensors("cuda")
    with pytest.raises(heed.InvalidArgument, match="k is on the cpu, q on cuda:0"):
        heed.attention(q, k.cpu(), v)


@cuda
def test_cuda_graph_capture_and_replay():
    q, k, v = tensors("cuda", dtype=torch.float16)
    heed.attention(q, k, v, causal=True)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = heed.attention(q, k, v, causal=True)
    for _ in range(3):
        for x in (q, k, v):
            x.normal_()
        graph.replay()
        torch.testing.assert_close(out, heed.attention(q, k, v, causal=True), atol=0, rtol=0)


@cuda
def test_cuda_streams_and_threads():
    q, k, v = tensors("cuda", b=4, sq=512, sk=512, dtype=torch.float16)
    want, wrong = heed.attention(q, k, v), []

    def work():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(20):
                torch.cuda._sleep(100_000)  # what comes next has to wait for it: 0 until then
                late = torch.zeros_like(q)
                torch.cuda._sleep(100_000)
                late.copy_(q)
                if not torch.equal(heed.attention(late, k, v), want):
                    wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@cuda
def test_cuda_tensors_may_die_right_after_the_call():
    q, k, v = tensors("cuda", b=8, sq=1024, sk=1024, dtype=torch.float16)
    want = heed.attention(q, k, v)
    for _ in range(20):
        torch.cuda._sleep(1_000_000)
        out = heed.attention(q.clone(), k.clone(), v.clone())
        torch.full_like(q, 7.0)  # takes the memory that the clones have left
        torch.full_like(k, 7.0)
        assert torch.equal(out, want)


@cuda
def test_cuda_backward_says_who_has_it():
    q, k, v = (x.requires_grad_() for x in tensors("cuda", dtype=torch.float16))
    out = heed.attention(q, k, v)
    try:
        out.sum().backward()
    except heed.NotSupported as error:
        assert "cpu/" in str(error) or "device" in str(error)
    else:
        want = torch.autograd.grad(textbook(*(x.float() for x in (q, k, v)))[0].sum(), (q, k, v))
        torch.testing.assert_close(q.grad.float(), want[0].float(), atol=3e-3, rtol=1e-2)
