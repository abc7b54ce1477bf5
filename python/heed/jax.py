"""heed for JAX: attention as an XLA custom call, under jax.jit, differentiable, on the CPU and on NVIDIA GPUs.

Needs the file heed/_jax.so, which a build makes where jaxlib is installed (docs/python.md).
"""

import ctypes
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from . import _core
from ._attention import (_real, _whole, check_ndims, jax_is_built, layouts_of, lse_shape, numbers_of, refuse_descales,
                         renamed, wants_f32)
from ._core import Error, InvalidArgument, NotSupported

__all__ = ["attention"]

_TARGET = "heed_attention"
_NUMBERS = ("pass_", "layout_q", "layout_kv", "causal", "offset_kind", "q_offset", "window_left", "window_right",
            "chunk", "max_seqlen_q", "max_seqlen_k", "num_splits", "deterministic", "batch_invariant", "num_threads")
_PLACES = {name: place for place, name in enumerate(_core.ATTENTION_TENSORS)}
_INPUTS = _core.ATTENTION_TENSORS[:14]
_DIFFERENTIABLE = ("q", "k", "v", "bias", "sinks", "alibi_slopes")
_DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "float64": "f64", "int32": "i32", "bool": "bool"}


@functools.cache
def _register():
    if not jax_is_built():
        raise NotSupported("heed.jax: this heed was built where jaxlib was not installed; the nearest is a build with "
                           "jaxlib (pip install --no-build-isolation .), or heed.attention, which takes JAX arrays on "
                           "the CPU")
    library = ctypes.CDLL(str(pathlib.Path(__file__).with_name("_jax.so")))
    for platform in ("cpu", "cuda"):
        handler = getattr(library, f"heed_jax_attention_{platform}")
        jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(
            handler), platform="CUDA" if platform == "cuda" else "cpu")


def _problem(numbers, tensors):
    """Raises what the library would, in heed's own errors, while JAX traces; there is no memory yet."""
    args = _core.AttentionArgs()
    for name in (*_NUMBERS, "softcap", "dropout_p", "softmax_scale"):
        setattr(args, name, getattr(numbers, name))
    for name, array in tensors.items():
        if str(array.dtype) not in _DTYPES:
            raise InvalidArgument(f"{name}.dtype = {array.dtype}: must be one of {', '.join(_DTYPES)}")
        args.set_tensor(name, 0, _DTYPES[str(array.dtype)], list(array.shape))
    return args.problem()


def _call(numbers, backend, tensors, outputs, seed):
    """The custom call: tensors by name, outputs as shapes by name; gives the outputs by name."""
    try:
        _problem(numbers, {**tensors, **outputs})
    except Error as error:
        raise renamed(error, {"leftpad_k": "leftpad"}) from None
    bits = [sum(1 << _PLACES[name] for name in names) for names in (tensors, outputs)]
    scale = numbers.softmax_scale
    integers = [int(getattr(numbers, name)) for name in _NUMBERS] + [scale is not None, seed is not None, *bits]
    order = sorted(outputs, key=_PLACES.get)
    results = jax.ffi.ffi_call(_TARGET, [outputs[name] for name in order], vmap_method="sequential")(
        *(tensors[name] for name in sorted(tensors, key=_PLACES.get)), *(() if seed is None else (seed,)),
        numbers=np.array(integers, np.int64), backend=backend or "",
        reals=np.array([scale or 0.0, numbers.softcap, numbers.dropout_p], np.float64))
    return dict(zip(order, results))


def _forward(static, given):
    options, backend, out_dtype, with_lse = static
    numbers = numbers_of(*options)
    tensors = {name: array for name, array in given.items() if name != "seed"}
    q, v = tensors["q"], tensors["v"]
    outputs = {"out": jax.ShapeDtypeStruct((*q.shape[:-1], v.shape[-1]), out_dtype)}
    if with_lse:
        outputs["lse"] = jax.ShapeDtypeStruct(lse_shape(q, options[5]), jnp.float32)
    found = _call(numbers, backend, tensors, outputs, given.get("seed"))
    return found["out"], found.get("lse")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static, given):
    return _forward(static, given)


def _attention_forward(static, given):
    out, lse = _forward((*static[:3], True), given)
    return (out, lse if static[3] else None), (given, out, lse)


def _attention_backward(static, kept, gradients):
    options, backend = static[:2]
    given, out, lse = kept
    dout, dlse = gradients
    numbers = numbers_of(*options, 0, 0, True)
    tensors = {name: array for name, array in given.items() if name != "seed"}
    outputs = {f"d{name}": jax.ShapeDtypeStruct(tensors[name].shape, tensors[name].dtype)
               for name in _DIFFERENTIABLE if name in tensors}
    tensors.update(out=out, lse=lse, dout=dout)
    if dlse is not None:
        tensors["dlse"] = dlse
    found = _call(numbers, backend, tensors, outputs, given.get("seed"))

    def gradient(name, array):
        if f"d{name}" in found:
            return found[f"d{name}"]
        return np.zeros(array.shape, jax.dtypes.float0)  # whole numbers and masks have none

    return ({name: gradient(name, array) for name, array in given.items()},)


_attention.defvjp(_attention_forward, _attention_backward)


def _seed_words(seed):
    if seed is None:
        raise InvalidArgument("seed = None: must be given with dropout_p > 0; JAX draws from keys: a jax.random key, a "
                              "whole number, a pair (seed, offset) or uint32 [4]")
    if isinstance(seed, int) or isinstance(seed, tuple) and len(seed) == 2:
        seed, offset = seed if isinstance(seed, tuple) else (seed, 0)
        return jnp.array(np.array([word % 2**64 for word in (_whole("seed", seed), _whole("seed", offset))],
                                  np.uint64).view(np.uint32))
    if jnp.issubdtype(seed.dtype, jax.dtypes.prng_key) or seed.shape == (2,) and seed.dtype == jnp.uint32:
        return jax.random.bits(seed, (4,), jnp.uint32)
    if seed.shape != (4,) or seed.dtype != jnp.uint32:
        raise InvalidArgument(f"seed: {seed.dtype} {list(seed.shape)}: must be a jax.random key, a whole number, a "
                              "pair (seed, offset) or uint32 [4]")
    return seed


def attention(q, k, v, *, causal=False, window=(-1, -1), softmax_scale=None, softcap=0.0, bias=None, mask=None,
              alibi_slopes=None, sinks=None, dropout_p=0.0, seed=None, cu_seqlens_q=None, cu_seqlens_k=None,
              seqused_q=None, seqused_k=None, page_table=None, layout="bshd", num_splits=0, return_lse=False,
              backend=None, layout_kv=None, q_offset=None, chunk=0, leftpad=None, cache_batch_idx=None, max_seqlen_q=0,
              max_seqlen_k=0, out_dtype=None, q_descale=None, k_descale=None, v_descale=None, deterministic=False,
              batch_invariant=False, num_threads=0):
    """heed.attention for JAX arrays, inside jax.jit or outside, with gradients for q, k, v, bias, sinks, alibi_slopes
    and through lse where a backward implementation exists. Options are static. The seed of dropout is a jax.random key
    (or a whole number, a pair, uint32 [4]) and has to be given. Lengths and pages are never read on the host: bad data
    gives 0 for its sequence. jax.vmap calls it once an element.

    Raises heed's errors while JAX traces; what shows only when it runs is JAX's own error with heed's sentence.
    """
    _register()
    refuse_descales(q_descale, k_descale, v_descale)
    layout_q, layout_kv = layouts_of(layout, layout_kv, cu_seqlens_q, cu_seqlens_k, page_table)
    options = (bool(causal), tuple(window),
               None if softmax_scale is None else _real("softmax_scale", softmax_scale, "finite"), softcap, dropout_p,
               layout_q, layout_kv, q_offset, chunk, max_seqlen_q, max_seqlen_k, num_splits, deterministic,
               batch_invariant, num_threads)
    numbers_of(*options)
    values = (q, k, v, bias, mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, leftpad,
              page_table, cache_batch_idx)
    given = {name: jnp.asarray(array) for name, array in zip(_INPUTS, values) if array is not None}
    for name in ("q", "k", "v"):
        if name not in given:
            raise InvalidArgument(f"{name} = None: must be a JAX array")
    check_ndims(given["q"], given["v"], layout_q)
    if dropout_p:
        given["seed"] = _seed_words(seed)
    out_type = jnp.float32 if wants_f32(out_dtype, given["q"]) else given["q"].dtype
    out, lse = _attention((options, backend, jnp.dtype(out_type), bool(return_lse)), given)
    return (out, lse) if return_lse else out
