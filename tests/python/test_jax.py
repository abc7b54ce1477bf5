"""heed.jax beside a formula in JAX: under jit, with gradients, errors while it traces."""

import pathlib

import numpy as np
import pytest

jax = pytest.importorskip("jax")
heed = pytest.importorskip("heed", reason="needs PYTHONPATH=<build>/python")
if not (pathlib.Path(heed.__file__).parent / "_jax.so").exists():
    pytest.skip("heed was built without jaxlib", allow_module_level=True)
import jax.numpy as jnp  # noqa: E402

import heed.jax  # noqa: E402

needs_backward = pytest.mark.skipif(jax.default_backend() == "gpu" and "cuda/attention_bwd" not in heed.info(),
                                    reason="no backward pass on this GPU")


def formula(q, k, v, bias=None, sinks=None, causal=True):
    group = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, group, 2), jnp.repeat(v, group, 2)
    scores = jnp.einsum("bihd,bjhd->bhij", q, k, precision="highest") * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    if causal:
        i, j = jnp.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1], jnp.arange(k.shape[1])
        scores = jnp.where(j <= i, scores, -jnp.inf)
    if sinks is not None:
        scores = jnp.concatenate([scores, jnp.broadcast_to(sinks[None, :, None, None], (*scores.shape[:3], 1))], -1)
    weights = jax.nn.softmax(scores, -1)[..., :k.shape[1]]
    return jnp.einsum("bhij,bjhd->bihd", weights, v, precision="highest"), jax.nn.logsumexp(scores, -1)


def arrays(dtype=jnp.float32, b=2, sq=9, sk=13, hq=4, hkv=2, d=32):
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = (b, sq, hq, d), (b, sk, hkv, d), (b, sk, hkv, d), (1, hq, sq, sk), (hq,)
    return [jax.random.normal(key, shape).astype(dtype if n < 3 else jnp.float32)
            for n, (key, shape) in enumerate(zip(keys, shapes))]


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_forward(dtype, jit):
    q, k, v, bias, sinks = arrays(dtype)

    def call(q, k, v, bias, sinks):
        return heed.jax.attention(q, k, v, causal=True, bias=bias, sinks=sinks, return_lse=True)

    out, lse = (jax.jit(call) if jit else call)(q, k, v, bias, sinks)
    want, want_lse = formula(*(x.astype(jnp.float32) for x in (q, k, v)), bias, sinks)
    assert out.dtype == dtype and lse.dtype == jnp.float32
    tolerance = {jnp.float32: 3e-6, jnp.float16: 3e-3, jnp.bfloat16: 3e-2}[dtype]
    np.testing.assert_allclose(out.astype(jnp.float32), want, atol=tolerance, rtol=tolerance)
    np.testing.assert_allclose(lse, want_lse, atol=1e-4)


@needs_backward
def test_gradients_under_jit():
    inputs = arrays(d=16)
    weights = jax.random.normal(jax.random.key(1), (2, 9, 4, 16)), jax.random.normal(jax.random.key(2), (2, 4, 9))

    def loss(function):
        def of(*inputs):
            out, lse = function(*inputs)
            return (out * weights[0]).sum() + (lse * weights[1]).sum()
        return jax.jit(jax.grad(of, argnums=range(5)))

    ours = loss(lambda q, k, v, bias, sinks: heed.jax.attention(
        q, k, v, causal=True, bias=bias, sinks=sinks, return_lse=True))
    for name, got, want in zip(("q", "k", "v", "bias", "sinks"), ours(*inputs), loss(formula)(*inputs)):
        np.testing.assert_allclose(got, want, atol=2e-5, rtol=2e-4, err_msg=name)


@needs_backward
def test_packed_with_a_gradient():
    q, k, v, *_ = arrays(b=1, sq=12, sk=12)
    offsets = jnp.array([0, 5, 12], jnp.int32)

    def ours(q, k, v):
        return heed.jax.attention(q[0], k[0], v[0], cu_seqlens_q=offsets, cu_seqlens_k=offsets, causal=True)

    def want(q, k, v):
        return jnp.concatenate([formula(q[:, a:b], k[:, a:b], v[:, a:b])[0][0] for a, b in ((0, 5), (5, 12))])

    np.testing.assert_allclose(ours(q, k, v), want(q, k, v), atol=3e-6)
    gradients = [jax.grad(lambda *x, f=f: (f(*x) ** 2).sum(), argnums=(0, 1, 2))(q, k, v) for f in (ours, want)]
    for got, expected in zip(*gradients):
        np.testing.assert_allclose(got, expected, atol=2e-5, rtol=1e-4)


def test_dropout_by_key():
    q, k, v, *_ = arrays()
    key = jax.random.key(3)
    call = jax.jit(lambda key: heed.jax.attention(q, k, v, dropout_p=0.5, seed=key))
    assert (call(key) == call(key)).all() and (call(key) != call(jax.random.key(4))).any()
    same = heed.attention(*(np.asarray(x) for x in (q, k, v)), dropout_p=0.5, seed=(2**40 + 3, 7))
    got = heed.jax.attention(q, k, v, dropout_p=0.5, seed=(2**40 + 3, 7))
    np.testing.assert_allclose(got, same, atol=3e-6)  # the same mask, on a GPU too


def test_vmap():
    q, k, v, *_ = arrays()
    stacked = [jnp.stack([x, 2 * x]) for x in (q, k, v)]
    got = jax.vmap(lambda q, k, v: heed.jax.attention(q, k, v))(*stacked)
    np.testing.assert_allclose(got[1], heed.jax.attention(2 * q, 2 * k, 2 * v), atol=1e-6)


def test_errors_while_tracing():
    q, k, v, *_ = arrays()
    for call, kind, sentence in (
            (lambda: heed.jax.attention(q, k[..., :16], v), heed.InvalidArgument, r"k.shape\[3\] = 16"),
            (lambda: heed.jax.attention(q, k, v, leftpad=jnp.zeros(3, jnp.int32)), heed.InvalidArgument, "^leftpad"),
            (lambda: heed.jax.attention(q, k, v, dropout_p=0.1), heed.InvalidArgument, "seed = None"),
            (lambda: heed.jax.attention(q, k, v, mask=jnp.zeros((1, 1, 9, 13), jnp.uint8)), heed.InvalidArgument,
             "mask.dtype"),
            (lambda: heed.jax.attention(q, k, v, q_descale=q), heed.NotSupported, "q_descale")):
        with pytest.raises(kind, match=sentence):
            jax.jit(call)()
    with pytest.raises(Exception, match="tpu"):
        jax.block_until_ready(heed.jax.attention(q, k, v, backend="tpu"))
