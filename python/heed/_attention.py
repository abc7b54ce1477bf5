"""heed.attention, heed.kv_append and heed.explain: arguments as people write them, to the library's one call."""

import functools
import math
import pathlib
import re

from . import _core
from ._core import Error, InvalidArgument, NotSupported
from ._frameworks import Jax, dtype_name, framework_of, known_frameworks

LAYOUTS = {"bshd": _core.LAYOUT_BSHD, "bhsd": _core.LAYOUT_BHSD, "thd": _core.LAYOUT_THD}
NO_BACKWARD = (None,) * 8  # dout, dlse, dq, dk, dv, dbias, dsinks, dalibi_slopes


def invalid(name, value, allowed):
    return InvalidArgument(f"{name} = {value!r}: must be {allowed}")


def renamed(error, names):
    """The same error in the caller's argument names."""
    text = str(error)
    for ours, theirs in names.items():
        text = re.sub(rf"(?<![\w.]){ours}(?!\w)", theirs, text)
    return type(error)(text)


def _whole(name, value, allowed="a whole number", least=None):
    try:
        number = value.__index__()
    except AttributeError:
        raise invalid(name, value, allowed) from None
    if (least is not None and number < least) or not -2**63 <= number < 2**63:
        raise invalid(name, value, allowed)
    return number


def _real(name, value, allowed):
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise invalid(name, value, allowed) from None
    if not math.isfinite(number):
        raise invalid(name, value, allowed)
    return number


def check_window(window):
    try:
        left, right = window
    except (TypeError, ValueError):
        raise invalid("window", window, "two whole numbers, left and right, -1 for unbounded") from None
    return tuple(_whole("window", side, "two whole numbers, -1 for unbounded or greater", -1) for side in (left, right))


@functools.lru_cache(maxsize=1024)
def numbers_of(causal, window, softmax_scale, softcap, dropout_p, layout, layout_kv, q_offset, chunk, max_seqlen_q,
               max_seqlen_k, num_splits, deterministic, batch_invariant, num_threads, seed=0, offset=0, backward=False):
    """The struct of numbers for these options, which a call copies and nobody changes."""
    for name, value in (("layout", layout), ("layout_kv", layout_kv)):
        if value not in LAYOUTS:
            raise invalid(name, value, '"bshd", "bhsd" or "thd"')
    left, right = check_window(window)
    numbers = _core.AttentionArgs(
        layout_q=LAYOUTS[layout], layout_kv=LAYOUTS[layout_kv], causal=bool(causal), window_left=left,
        window_right=right, softcap=_real("softcap", softcap, "0 (off) or greater, and finite"),
        dropout_p=_real("dropout_p", dropout_p, "from 0 to 1"), chunk=_whole("chunk", chunk, "0 (off) or greater", 0),
        max_seqlen_q=_whole("max_seqlen_q", max_seqlen_q, "0 (unknown) or greater", 0),
        max_seqlen_k=_whole("max_seqlen_k", max_seqlen_k, "0 (unknown) or greater", 0),
        num_splits=_whole("num_splits", num_splits, "0 (chosen) or greater", 0),
        num_threads=_whole("num_threads", num_threads, "0 (all) or greater", 0), deterministic=bool(deterministic),
        batch_invariant=bool(batch_invariant), dropout_seed=seed % 2**64, dropout_offset=offset % 2**64,
        pass_=_core.PASS_BACKWARD if backward else _core.PASS_FORWARD)
    if softmax_scale is not None:
        numbers.softmax_scale = _real("softmax_scale", softmax_scale, "finite")
    if q_offset == "top":
        numbers.offset_kind = _core.OFFSET_TOP_LEFT
    elif q_offset is not None:
        numbers.offset_kind = _core.OFFSET_GIVEN
        numbers.q_offset = _whole("q_offset", q_offset, 'None (bottom right), "top" or a whole number')
    return numbers


def layouts_of(layout, layout_kv, cu_seqlens_q, cu_seqlens_k, page_table):
    """Offsets make a side packed; pages are never; else both sides are alike."""
    layout_q = "thd" if cu_seqlens_q is not None else layout
    if layout_kv is None:
        if cu_seqlens_k is not None:
            layout_kv = "thd"
        elif layout == "thd" and (page_table is not None or cu_seqlens_q is not None):
            layout_kv = "bshd"
        else:
            layout_kv = layout
    return layout_q, layout_kv


def refuse_descales(q_descale, k_descale, v_descale):
    for name, value in (("q_descale", q_descale), ("k_descale", k_descale), ("v_descale", v_descale)):
        if value is not None:
            raise NotSupported(
                f"{name}: is for inputs of float8, which no backend takes; the nearest is bfloat16 without it")


def wants_f32(out_dtype, q):
    """None, q's own dtype, or float32."""
    if out_dtype is None:
        return False
    name = dtype_name(out_dtype)
    if name == "float32":
        return True
    if name != dtype_name(q.dtype):
        raise invalid("out_dtype", out_dtype, f"float32 or q's own, {dtype_name(q.dtype)}")
    return False


def lse_shape(q, layout):
    shape = tuple(q.shape)
    if layout == "thd":
        return (shape[1], shape[0])
    return (shape[0], shape[2], shape[1]) if layout == "bshd" else shape[:3]


@functools.cache
def jax_is_built():
    return pathlib.Path(__file__).with_name("_jax.so").exists()


def check_ndims(q, v, layout):
    """What making the outputs needs; the library checks the rest."""
    for name, array in (("q", q), ("v", v)):
        if not hasattr(array, "shape") or not hasattr(array, "dtype"):
            raise InvalidArgument(f"{name} is of type {type(array).__name__}: must be an array of NumPy, PyTorch, "
                                  "CuPy, JAX or another library with DLPack")
    if len(q.shape) != (3 if layout == "thd" else 4) or len(v.shape) == 0:
        wanted = {"bshd": "4, [batch, seqlen_q, nheads_q, head_dim]",
                  "bhsd": "4, [batch, nheads_q, seqlen_q, head_dim]",
                  "thd": "3, [total_q, nheads_q, head_dim]"}
        name, array = ("v", v) if len(v.shape) == 0 else ("q", q)
        raise InvalidArgument(f"{name}.ndim = {len(array.shape)}: must be {wanted.get(layout, 4)}")


def attention(q, k, v, *, causal=False, window=(-1, -1), softmax_scale=None, softcap=0.0, bias=None, mask=None,
              alibi_slopes=None, sinks=None, dropout_p=0.0, seed=None, cu_seqlens_q=None, cu_seqlens_k=None,
              seqused_q=None, seqused_k=None, page_table=None, layout="bshd", num_splits=0, return_lse=False, out=None,
              backend=None, layout_kv=None, q_offset=None, chunk=0, leftpad=None, cache_batch_idx=None, max_seqlen_q=0,
              max_seqlen_k=0, out_dtype=None, q_descale=None, k_descale=None, v_descale=None, deterministic=False,
              batch_invariant=False, validate=None, num_threads=0, status=None):
    """Exact attention: softmax(softmax_scale q k^T + ...) v over arrays as they lie in memory, without a copy.

    q [batch, seqlen_q, nheads_q, head_dim], k [batch, seqlen_k, nheads_kv, head_dim] and v [batch, seqlen_k, nheads_kv,
    head_dim_v] are arrays of one library on one device: NumPy (bfloat16 of ml_dtypes too), PyTorch, CuPy, JAX or
    anything with DLPack; float32, float16 or bfloat16, any strides with the last one 1. The result is [batch, seqlen_q,
    nheads_q, head_dim_v], a new array of the same library, in q's dtype; on a GPU it is ready on the library's current
    stream. Torch tensors that require a gradient get one. nheads_q is a multiple of nheads_kv.

    causal: key j is seen by query i iff j <= i + offset. window: (left, right) keys around it, inclusive, -1 unbounded.
    q_offset: None (bottom right: seqlen_k - seqlen_q), "top" (0) or a number. chunk: only keys of the same chunk.
    softmax_scale: None is 1/sqrt(head_dim). softcap: 0 is off. bias: added to the scores, [batch|1, nheads_q|1,
    seqlen_q|1, seqlen_k|1], float32 or q's dtype. mask: the same shape, bool, true where a query may attend.
    alibi_slopes: float32 [nheads_q] or [batch, nheads_q]. sinks: float32 [nheads_q], one more logit each. dropout_p:
    with seed None drawn (torch: from its generator, else from `random`), a number, (seed, offset), or int64 [2].
    layout: "bshd", "bhsd" (heads first) or "thd" (packed, with cu_seqlens_q and cu_seqlens_k int32 [batch + 1], which
    imply it); layout_kv where k and v lie otherwise. seqused_q, seqused_k, leftpad: int32 [batch], lengths in use and
    keys to skip. page_table: int32 [batch, max_pages], k and v then [num_pages, page_size, nheads_kv, head_dim];
    cache_batch_idx: int32 [batch], the row of k and v that a sequence reads. max_seqlen_q, max_seqlen_k: hints.
    num_splits: 0 is chosen. out: where the result goes. out_dtype: float32 or q's. return_lse: (out, lse), float32
    [batch, nheads_q, seqlen_q] (packed [nheads_q, total_q]), natural logarithms. backend: one of heed.info()'s, that
    one or an error. deterministic, batch_invariant: promises about bits. validate: None reads the lengths and pages
    before the run where there is a page_table, outside graph capture; on a GPU that waits. num_threads: of the CPU, 0
    is all. status: int32 [batch], receives what was wrong with a sequence's data.

    Raises InvalidArgument (a ValueError), NotSupported (a NotImplementedError), NotFound (a LookupError), OutOfMemory
    (a MemoryError); all are heed.Error, a RuntimeError. q_descale, k_descale and v_descale are not supported by any
    backend.
    """
    framework = known_frameworks.get(type(q)) or framework_of(q)
    if framework.is_torch and framework.needs_op(q, k, v, bias, sinks, alibi_slopes):
        from . import torch as for_torch
        return for_torch.attention(
            q, k, v, causal=causal, window=window, softmax_scale=softmax_scale, softcap=softcap, bias=bias,
            mask=mask, alibi_slopes=alibi_slopes, sinks=sinks, dropout_p=dropout_p, seed=seed,
            cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seqused_q=seqused_q, seqused_k=seqused_k,
            page_table=page_table, layout=layout, num_splits=num_splits, return_lse=return_lse, out=out,
            backend=backend, layout_kv=layout_kv, q_offset=q_offset, chunk=chunk, leftpad=leftpad,
            cache_batch_idx=cache_batch_idx, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
            out_dtype=out_dtype, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale,
            deterministic=deterministic, batch_invariant=batch_invariant, validate=validate,
            num_threads=num_threads, status=status)
    if framework is Jax:
        if out is not None or status is not None:
            raise InvalidArgument("out, status: must be None with JAX arrays, which nothing may change")
        if jax_is_built():
            from . import jax as for_jax
            return for_jax.attention(
                q, k, v, causal=causal, window=window, softmax_scale=softmax_scale, softcap=softcap, bias=bias,
                mask=mask, alibi_slopes=alibi_slopes, sinks=sinks, dropout_p=dropout_p, seed=seed,
                cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seqused_q=seqused_q, seqused_k=seqused_k,
                page_table=page_table, layout=layout, num_splits=num_splits, return_lse=return_lse, backend=backend,
                layout_kv=layout_kv, q_offset=q_offset, chunk=chunk, leftpad=leftpad, cache_batch_idx=cache_batch_idx,
                max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, out_dtype=out_dtype, q_descale=q_descale,
                k_descale=k_descale, v_descale=v_descale, deterministic=deterministic,
                batch_invariant=batch_invariant, num_threads=num_threads)
    if q_descale is not None or k_descale is not None or v_descale is not None:
        refuse_descales(q_descale, k_descale, v_descale)
    layout_q, layout_kv = layouts_of(layout, layout_kv, cu_seqlens_q, cu_seqlens_k, page_table)
    seed_array, made = None, numbers_of
    words = (0, 0)
    if dropout_p:
        seed_array, words = seed_of(framework, q, seed)
        made = numbers_of.__wrapped__  # a seed is seldom met again
    numbers = made(causal, tuple(window) if isinstance(window, list) else window,
                   None if softmax_scale is None else _real(
                       "softmax_scale", softmax_scale, "finite"), softcap, dropout_p,
                   layout_q, layout_kv, q_offset, chunk, max_seqlen_q, max_seqlen_k, num_splits, deterministic,
                   batch_invariant, num_threads, *words)
    q_shape, v_shape = getattr(q, "shape", ()), getattr(v, "shape", ())
    if len(q_shape) != (3 if layout_q == "thd" else 4) or len(v_shape) == 0:
        check_ndims(q, v, layout_q)
    given = out
    if out is None:
        f32 = out_dtype is not None and wants_f32(out_dtype, q)
        if f32 or q_shape[-1] != v_shape[-1]:
            out = framework.empty(q, (*q_shape[:-1], v_shape[-1]), f32)
        else:
            out = framework.empty_like(q)
    elif out_dtype is not None and dtype_name(out.dtype) != dtype_name(out_dtype):
        raise invalid("out_dtype", out_dtype, f"out's own, {dtype_name(out.dtype)}, or absent")
    lse = framework.empty(q, lse_shape(q, layout_q), True) if return_lse else None
    if validate is None:
        validate = page_table is not None and not framework.is_capturing(q)
    try:
        _core.attention_call(
            numbers,
            (q, k, v, bias, mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, leftpad,
             page_table, cache_batch_idx, out, lse, *NO_BACKWARD, status), backend, seed_array, framework.stream(q),
            validate)
    except Error as error:
        raise renamed(error, {"leftpad_k": "leftpad"}) from None
    out = framework.finish(out) if given is None else given
    return (out, framework.finish(lse)) if return_lse else out


def seed_of(framework, q, seed):
    """(array or None, (seed, offset)) of None (drawn), a number, a pair, or an int64 [2] array where q is."""
    if seed is None:
        seed = framework.seed(q)
    if isinstance(seed, tuple) and len(seed) == 2:
        return None, (_whole("seed", seed[0]), _whole("seed", seed[1]))
    if hasattr(seed, "shape") and len(seed.shape) > 0:
        return seed, (0, 0)
    return None, (_whole("seed", seed, "None, a whole number, a pair (seed, offset) or an int64 [2] array"), 0)


def problem_of(q, k, v, *, causal=False, window=(-1, -1), softmax_scale=None, softcap=0.0, bias=None, mask=None,
               alibi_slopes=None, sinks=None, dropout_p=0.0, seed=None, cu_seqlens_q=None, cu_seqlens_k=None,
               seqused_q=None, seqused_k=None, page_table=None, layout="bshd", num_splits=0, return_lse=False, out=None,
               layout_kv=None, q_offset=None, chunk=0, leftpad=None, cache_batch_idx=None, max_seqlen_q=0,
               max_seqlen_k=0, out_dtype=None, q_descale=None, k_descale=None, v_descale=None, deterministic=False,
               batch_invariant=False, validate=None, num_threads=0, status=None):
    """The problem that the same call of attention poses."""
    refuse_descales(q_descale, k_descale, v_descale)
    layout_q, layout_kv = layouts_of(layout, layout_kv, cu_seqlens_q, cu_seqlens_k, page_table)
    numbers = numbers_of(causal, tuple(window), softmax_scale, softcap, dropout_p, layout_q, layout_kv, q_offset, chunk,
                         max_seqlen_q, max_seqlen_k, num_splits, deterministic, batch_invariant, num_threads)
    check_ndims(q, v, layout_q)
    tensors = (q, k, v, bias, mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, leftpad,
               page_table, cache_batch_idx, out, None, *NO_BACKWARD, status)
    try:
        return _core.attention_problem(numbers, tensors, return_lse, wants_f32(out_dtype, q))
    except Error as error:
        raise renamed(error, {"leftpad_k": "leftpad"}) from None


@functools.lru_cache(maxsize=256)
def append_numbers(layout, layout_cache, rotary_interleaved, q_per_position, num_threads):
    for name, value in (("layout", layout), ("layout_cache", layout_cache)):
        if value not in LAYOUTS or (name == "layout_cache" and value == "thd"):
            raise invalid(name, value, '"bshd", "bhsd" or "thd"' if name == "layout" else '"bshd" or "bhsd"')
    return _core.KvAppendArgs(
        layout_new=LAYOUTS[layout], layout_cache=LAYOUTS[layout_cache],
        rotary_style=_core.ROTARY_INTERLEAVED if rotary_interleaved else _core.ROTARY_HALF,
        q_positions=1 if q_per_position else 0,
        num_threads=_whole("num_threads", num_threads, "0 (all) or greater", 0))


def kv_append(k_new, v_new, k_cache, v_cache, cache_seqlens, *, q=None, q_out=None, rotary_cos=None, rotary_sin=None,
              rotary_interleaved=False, q_per_position=True, rotary_seqlens=None, leftpad=None, page_table=None,
              cache_batch_idx=None, cu_seqlens_new=None, cu_seqlens_q=None, layout="bshd", layout_cache="bshd",
              backend=None, validate=None, num_threads=0, status=None):
    """Writes new keys and values into a cache, in place, and turns them and q by rotary embedding; gives the turned q.

    k_new [batch, seqlen_new, nheads_kv, head_dim], v_new likewise (both None: only turn q); k_cache [rows, seqlen_k,
    nheads_kv, head_dim], or with page_table int32 [batch, max_pages] pages [num_pages, page_size, nheads_kv, head_dim];
    cache_seqlens int32 [batch]: keys before this call. The new ones go to cache_seqlens + t; cache_seqlens stays as it
    is. q [batch, seqlen_q, nheads_q, head_dim] gives q_out (made where it is None; it may be q). rotary_cos, rotary_sin
    [n, rotary_dim/2], float32 or the cache's dtype; rotary_interleaved: pairs (2r, 2r + 1), else halves.
    q_per_position: query i turns at the first new position + i (causal, windows), else all at the first.
    rotary_seqlens: int32 [batch], first positions other than cache_seqlens. leftpad, cache_batch_idx: int32 [batch].
    cu_seqlens_new, cu_seqlens_q: int32 [batch + 1], k_new, v_new and q packed. layout of k_new, v_new, q; layout_cache.
    validate: None or True reads lengths and pages first, outside graph capture; on a GPU that waits. Else bad data, an
    append past the capacity too, appends nothing to that sequence and sets bits in status, int32 [batch].

    Raises what heed.attention raises.
    """
    framework = framework_of(k_cache)
    if framework.is_torch and (framework.needs_op(k_cache, k_cache if k_new is None else k_new,
                                                  v_cache if v_new is None else v_new, q)):
        from . import torch as for_torch
        return for_torch.kv_append(
            k_new, v_new, k_cache, v_cache, cache_seqlens, q=q, q_out=q_out, rotary_cos=rotary_cos,
            rotary_sin=rotary_sin, rotary_interleaved=rotary_interleaved, q_per_position=q_per_position,
            rotary_seqlens=rotary_seqlens, leftpad=leftpad, page_table=page_table, cache_batch_idx=cache_batch_idx,
            cu_seqlens_new=cu_seqlens_new, cu_seqlens_q=cu_seqlens_q, layout=layout, layout_cache=layout_cache,
            backend=backend, validate=validate, num_threads=num_threads, status=status)
    if framework is Jax:
        raise NotSupported("k_cache is a JAX array, which nothing may change: kv_append writes into the caches; "
                           "the nearest is an array of NumPy, PyTorch or CuPy")
    packed = cu_seqlens_new is not None or cu_seqlens_q is not None
    numbers = append_numbers("thd" if packed else layout, layout_cache, bool(rotary_interleaved), bool(q_per_position),
                             num_threads)
    if q is not None and q_out is None:
        q_out = framework.empty(q, tuple(q.shape), False)
    if validate is None:
        validate = not framework.is_capturing(k_cache)
    try:
        _core.kv_append_call(
            numbers,
            (k_new, v_new, k_cache, v_cache, q, q_out, rotary_cos, rotary_sin, cu_seqlens_new, cu_seqlens_q,
             cache_seqlens, rotary_seqlens, leftpad, page_table, cache_batch_idx, status), backend,
            framework.stream(k_cache), validate)
    except Error as error:
        raise renamed(error, {"leftpad_k": "leftpad", "layout_new": "layout"}) from None
    return q_out
