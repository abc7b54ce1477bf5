"""heed for PyTorch: operators that autograd, torch.compile and CUDA graphs know, and ``sdpa`` with
``torch.nn.functional.scaled_dot_product_attention``'s arguments and meaning.

``heed.attention`` calls this module by itself where a gradient is wanted or a graph is being traced; the operators are
``torch.ops.heed.attention``, ``attention_backward`` and ``kv_append``.
"""

import torch
from torch import Tensor, is_grad_enabled
from torch.compiler import is_compiling

from . import _core
from ._attention import (_whole, append_numbers, attention as straight_attention, check_ndims, layouts_of, lse_shape,
                         numbers_of, refuse_descales, renamed, wants_f32)
from ._core import Error, InvalidArgument, NotSupported
from ._frameworks import NumPy, dtype_name

if not hasattr(Tensor, "__dlpack_c_exchange_api__"):
    raise NotSupported(f"PyTorch {torch.__version__}: heed.torch needs 2.10 or later, whose tensors tell their stream; "
                       "the nearest is an array of NumPy or CuPy over the same memory")

_library = torch.library.Library("heed", "DEF")

_INPUTS = ("Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, Tensor? alibi_slopes, Tensor? sinks, "
           "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_q, Tensor? seqused_k, Tensor? leftpad, "
           "Tensor? page_table, Tensor? cache_batch_idx, Tensor? seed, float? softmax_scale, float softcap, "
           "float dropout_p, bool causal, SymInt window_left, SymInt window_right, SymInt chunk, bool top_left, "
           "SymInt? q_offset, SymInt max_seqlen_q, SymInt max_seqlen_k, int num_splits, bool deterministic, "
           "bool batch_invariant, str layout_q, str layout_kv, str? backend, int num_threads")
_library.define(f"attention({_INPUTS}, bool out_f32, bool with_lse, bool validate) -> (Tensor, Tensor)")
_library.define("attention_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, bool[6] wanted, "
                f"{_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
_library.define(
    "kv_append(Tensor? k_new, Tensor? v_new, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_seqlens, Tensor? q, "
    "Tensor? rotary_cos, Tensor? rotary_sin, Tensor? rotary_seqlens, Tensor? leftpad, Tensor? page_table, "
    "Tensor? cache_batch_idx, Tensor? cu_seqlens_new, Tensor? cu_seqlens_q, bool rotary_interleaved, "
    "bool q_per_position, str layout, str layout_cache, str? backend, bool validate, int num_threads) -> Tensor")

_NAMES = {"leftpad_k": "leftpad"}
_NUM_INPUTS = 33
_GRADIENTS = ("q", "k", "v", "bias", "sinks", "alibi_slopes")
_GRADIENT_PLACES = (0, 1, 2, 3, 6, 5)  # among the inputs


def _numbers(softmax_scale, softcap, dropout_p, causal, window_left, window_right, chunk, top_left, q_offset,
             max_seqlen_q, max_seqlen_k, num_splits, deterministic, batch_invariant, layout_q, layout_kv, num_threads,
             backward=False):
    return numbers_of(causal, (window_left, window_right), softmax_scale, softcap, dropout_p, layout_q, layout_kv,
                      "top" if top_left else q_offset, chunk, max_seqlen_q, max_seqlen_k, num_splits, deterministic,
                      batch_invariant, num_threads, 0, 0, backward)


def _out_shape(q, v):
    return (*q.shape[:-1], v.shape[-1])


def _attention(q, k, v, bias, mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, leftpad,
               page_table, cache_batch_idx, seed, softmax_scale, softcap, dropout_p, causal, window_left, window_right,
               chunk, top_left, q_offset, max_seqlen_q, max_seqlen_k, num_splits, deterministic, batch_invariant,
               layout_q, layout_kv, backend, num_threads, out_f32, with_lse, validate):
    numbers = _numbers(softmax_scale, softcap, dropout_p, causal, window_left, window_right, chunk, top_left, q_offset,
                       max_seqlen_q, max_seqlen_k, num_splits, deterministic, batch_invariant, layout_q, layout_kv,
                       num_threads)
    check_ndims(q, v, layout_q)
    out = q.new_empty(_out_shape(q, v), dtype=torch.float32 if out_f32 else q.dtype)
    lse = q.new_empty(lse_shape(q, layout_q) if with_lse else (0,), dtype=torch.float32)
    try:
        _core.attention_call(
            numbers, (q, k, v, bias, mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k,
                      leftpad, page_table, cache_batch_idx, out, lse if with_lse else None, None, None, None, None,
                      None, None, None, None, None), backend, seed, None, validate and not _is_capturing(q))
    except Error as error:
        raise renamed(error, _NAMES) from None
    return out, lse


def _attention_fake(*arguments):
    q, v = arguments[0], arguments[2]
    layout_q, out_f32, with_lse = arguments[29], arguments[33], arguments[34]
    out = q.new_empty(_out_shape(q, v), dtype=torch.float32 if out_f32 else q.dtype)
    return out, q.new_empty(lse_shape(q, layout_q) if with_lse else (0,), dtype=torch.float32)


def _gradients(wanted, inputs):
    return [inputs[place].new_empty(inputs[place].shape) if want else inputs[0].new_empty((0,))
            for want, place in zip(wanted, _GRADIENT_PLACES)]


def _rows(tensor):
    """As the library takes it: elements of the last dimension are neighbours."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _attention_backward(dout, dlse, out, lse, wanted, *inputs):
    (q, k, v, bias, mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, leftpad, page_table,
     cache_batch_idx, seed, *scalars, backend, num_threads) = inputs
    numbers = _numbers(*scalars, num_threads, backward=True)
    gradients = _gradients(wanted, inputs)
    dq, dk, dv, dbias, dsinks, dalibi = (gradient if want else None for want, gradient in zip(wanted, gradients))
    try:
        _core.attention_call(
            numbers, (q, k, v, bias, mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k,
                      leftpad, page_table, cache_batch_idx, out, lse, _rows(dout), dlse, dq, dk, dv, dbias, dsinks,
                      dalibi, None), backend, seed)
    except Error as error:
        raise renamed(error, _NAMES) from None
    return tuple(gradients)


def _attention_backward_fake(dout, dlse, out, lse, wanted, *inputs):
    return tuple(_gradients(wanted, inputs))


def _keep_for_backward(ctx, inputs, output):
    out, lse = output
    tensors, others = inputs[:15], inputs[15:_NUM_INPUTS]
    ctx.with_lse = inputs[34]
    ctx.others = others
    ctx.absent = [tensor is None for tensor in tensors]
    ctx.save_for_backward(*(tensor for tensor in tensors if tensor is not None), out, lse)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse):
    if dout is None and dlse is None:
        return (None,) * (_NUM_INPUTS + 3)
    *given, out, lse = ctx.saved_tensors
    if not ctx.with_lse:
        raise InvalidArgument("with_lse = False: must be True where a gradient is wanted, the backward pass reads lse")
    given = iter(given)
    tensors = [None if absent else next(given) for absent in ctx.absent]
    if dout is None:
        dout = torch.zeros_like(out)
    wanted = [ctx.needs_input_grad[place] for place in _GRADIENT_PLACES]
    found = torch.ops.heed.attention_backward(dout, dlse, out, lse, wanted, *tensors, *ctx.others)
    gradients = [None] * (_NUM_INPUTS + 3)
    for want, place, gradient in zip(wanted, _GRADIENT_PLACES, found):
        if want:
            gradients[place] = gradient
    return tuple(gradients)


def _kv_append(k_new, v_new, k_cache, v_cache, cache_seqlens, q, rotary_cos, rotary_sin, rotary_seqlens, leftpad,
               page_table, cache_batch_idx, cu_seqlens_new, cu_seqlens_q, rotary_interleaved, q_per_position, layout,
               layout_cache, backend, validate, num_threads):
    numbers = append_numbers(layout, layout_cache, rotary_interleaved, q_per_position, num_threads)
    q_out = k_cache.new_empty((0,)) if q is None else q.new_empty(q.shape)
    try:
        _core.kv_append_call(
            numbers, (k_new, v_new, k_cache, v_cache, q, None if q is None else q_out, rotary_cos, rotary_sin,
                      cu_seqlens_new, cu_seqlens_q, cache_seqlens, rotary_seqlens, leftpad, page_table,
                      cache_batch_idx, None), backend, None, validate and not _is_capturing(k_cache))
    except Error as error:
        raise renamed(error, {**_NAMES, "layout_new": "layout"}) from None
    return q_out


def _kv_append_fake(k_new, v_new, k_cache, v_cache, cache_seqlens, q, *others):
    return k_cache.new_empty((0,)) if q is None else q.new_empty(q.shape)


for _device in ("CPU", "CUDA"):
    _library.impl("attention", _attention, _device)
    _library.impl("attention_backward", _attention_backward, _device)
    _library.impl("kv_append", _kv_append, _device)
torch.library.register_fake("heed::attention", _attention_fake, lib=_library)
torch.library.register_fake("heed::attention_backward", _attention_backward_fake, lib=_library)
torch.library.register_fake("heed::kv_append", _kv_append_fake, lib=_library)
torch.library.register_autograd("heed::attention", _backward, setup_context=_keep_for_backward, lib=_library)


# ---- functions -------------------------------------------------------------------------------------------------------

_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_contiguous = torch.contiguous_format
_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
_any_autocast = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)


def _is_capturing(tensor):
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _wants_gradient(*tensors):
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def needs_op(q, k, v, bias=None, sinks=None, alibi_slopes=None):
    """Must the call go through the operator (gradients, tracing, tensor subclasses), or may it go straight?"""
    if is_compiling() or type(q) not in _PLAIN or type(k) not in _PLAIN or type(v) not in _PLAIN or _modes():
        return True
    return is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad or
        bias is not None and bias.requires_grad or sinks is not None and sinks.requires_grad or
        alibi_slopes is not None and alibi_slopes.requires_grad)


def draw_seed(like: Tensor) -> Tensor:
    """Seed and offset for dropout from torch's generator of like's device: what torch.manual_seed sets."""
    return torch.randint(-2**63, 2**63 - 1, (2,), dtype=torch.int64, device=like.device)


class Torch(NumPy):
    """What heed.attention asks of an array library."""
    is_torch = True
    needs_op = staticmethod(needs_op)
    seed = staticmethod(draw_seed)

    @staticmethod
    def empty(like, shape, f32):
        return torch.empty(shape, dtype=torch.float32 if f32 else like.dtype, device=like.device)

    @staticmethod
    def empty_like(q):  # half the time of torch.empty
        return torch.empty_like(q, memory_format=_contiguous)

    is_capturing = staticmethod(_is_capturing)


def _seed_tensor(q, seed):
    if seed is None:
        return draw_seed(q)
    if isinstance(seed, Tensor) and seed.dim() == 1:
        return seed
    words = seed if isinstance(seed, tuple) and len(seed) == 2 else (seed, 0)
    words = [_whole("seed", word, "None, a whole number, a pair (seed, offset) or an int64 [2] tensor")
                    for word in words]
    signed = [(word + 2**63) % 2**64 - 2**63 for word in words]
    return torch.tensor(signed, dtype=torch.int64, device=q.device)


def attention(q, k, v, *, causal=False, window=(-1, -1), softmax_scale=None, softcap=0.0, bias=None, mask=None,
              alibi_slopes=None, sinks=None, dropout_p=0.0, seed=None, cu_seqlens_q=None, cu_seqlens_k=None,
              seqused_q=None, seqused_k=None, page_table=None, layout="bshd", num_splits=0, return_lse=False, out=None,
              backend=None, layout_kv=None, q_offset=None, chunk=0, leftpad=None, cache_batch_idx=None, max_seqlen_q=0,
              max_seqlen_k=0, out_dtype=None, q_descale=None, k_descale=None, v_descale=None, deterministic=False,
              batch_invariant=False, validate=None, num_threads=0, status=None):
    """heed.attention for torch tensors, always through the operator: differentiable in q, k, v, bias, sinks and
    alibi_slopes, traceable by torch.compile. What it takes and gives is heed.attention's."""
    refuse_descales(q_descale, k_descale, v_descale)
    if status is not None:
        raise NotSupported("status: is not an argument of the operator; the nearest is heed.attention on plain "
                           "tensors, without gradients and outside torch.compile")
    grad = _wants_gradient(q, k, v, bias, sinks, alibi_slopes)
    if out is not None and grad:
        raise InvalidArgument("out: must be None where a gradient is wanted; autograd keeps the operator's own result")
    layout_q, layout_kv = layouts_of(layout, layout_kv, cu_seqlens_q, cu_seqlens_k, page_table)
    left, right = window
    top_left = isinstance(q_offset, str) and q_offset == "top"
    result, lse = torch.ops.heed.attention(
        q, k, v, bias, mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, leftpad, page_table,
        cache_batch_idx, _seed_tensor(q, seed) if dropout_p else None, softmax_scale, softcap, dropout_p, causal, left,
        right, chunk, top_left, None if top_left else q_offset, max_seqlen_q or 0, max_seqlen_k or 0, num_splits,
        deterministic, batch_invariant, layout_q, layout_kv, backend, num_threads,
        out_dtype is not None and wants_f32(out_dtype, q) or out is not None and dtype_name(out.dtype) == "float32",
        return_lse or grad, page_table is not None if validate is None else validate)
    if out is not None:
        result = out.copy_(result)
    return (result, lse) if return_lse else result


def kv_append(k_new, v_new, k_cache, v_cache, cache_seqlens, *, q=None, q_out=None, rotary_cos=None, rotary_sin=None,
              rotary_interleaved=False, q_per_position=True, rotary_seqlens=None, leftpad=None, page_table=None,
              cache_batch_idx=None, cu_seqlens_new=None, cu_seqlens_q=None, layout="bshd", layout_cache="bshd",
              backend=None, validate=None, num_threads=0, status=None):
    """heed.kv_append for torch tensors, always through the operator. It has no gradient."""
    if status is not None:
        raise NotSupported("status: is not an argument of the operator; the nearest is heed.kv_append on plain tensors")
    for name, tensor in (("k_new", k_new), ("v_new", v_new), ("k_cache", k_cache), ("v_cache", v_cache), ("q", q)):
        if tensor is not None and torch.is_grad_enabled() and tensor.requires_grad:
            raise NotSupported(f"{name} requires a gradient: no backend differentiates kv_append; the nearest is the "
                               "same call under torch.no_grad()")
    packed = cu_seqlens_new is not None or cu_seqlens_q is not None
    turned = torch.ops.heed.kv_append(
        k_new, v_new, k_cache, v_cache, cache_seqlens, q, rotary_cos, rotary_sin, rotary_seqlens, leftpad, page_table,
        cache_batch_idx, cu_seqlens_new, cu_seqlens_q, bool(rotary_interleaved), bool(q_per_position),
        "thd" if packed else layout, layout_cache, backend, True if validate is None else validate, num_threads)
    if q is None:
        return q_out
    return turned if q_out is None else q_out.copy_(turned)


def sdpa(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """torch.nn.functional.scaled_dot_product_attention by heed: the same arguments, the same meaning.

    query [..., heads, L, E], key [..., heads, S, E], value [..., heads, S, Ev]; attn_mask is boolean (true: may attend)
    or is added to the scores, and broadcasts to [..., heads, L, S]. is_causal is aligned top left, as torch's is, and
    excludes attn_mask. Dropout follows torch.manual_seed, with a mask of its own. Under autocast the inputs are cast as
    torch casts them. A row that sees nothing gives 0.
    """
    if _any_autocast() and torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        if attn_mask is not None and attn_mask.dtype != torch.bool:
            attn_mask = attn_mask.to(dtype)
    if is_causal and attn_mask is not None:
        raise InvalidArgument("is_causal = True: must be False where attn_mask is given")
    # The usual call first: every look at a tensor costs a tenth of a microsecond.
    shape, key_shape, value_shape = query.shape, key.shape, value.shape
    if (attn_mask is None and len(shape) == 4 and len(key_shape) == 4 and len(value_shape) == 4 and
            shape[0] == key_shape[0] == value_shape[0] and (enable_gqa or shape[1] == key_shape[1]) and
            (scale is None or isinstance(scale, (float, int)))):
        return straight_attention(_rows(query), _rows(key), _rows(value), causal=is_causal, q_offset="top",
                                  softmax_scale=scale, dropout_p=dropout_p, layout="bhsd")
    if query.dim() < 2 or key.dim() != query.dim() or value.dim() != query.dim():
        raise InvalidArgument(f"query, key and value have {query.dim()}, {key.dim()} and {value.dim()} dimensions: "
                              "must have equally many, at least 2")
    lead = query.shape[:-2]
    if query.dim() != 4:
        query, key, value = (_four_dimensions(tensor) for tensor in (query, key, value))
    batch = max(tensor.shape[0] for tensor in (query, key, value))
    query, key, value = (tensor if tensor.shape[0] == batch or tensor.shape[0] != 1 else
                         tensor.expand(batch, *tensor.shape[1:]) for tensor in (query, key, value))
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise InvalidArgument(f"key.shape[-3] = {key.shape[1]}: must be query's {query.shape[1]} unless enable_gqa")
    bias = mask = None
    if attn_mask is not None:
        attn_mask = _four_dimensions(attn_mask, lead if len(lead) > 2 else None)
        if attn_mask.stride(-1) > 1 and attn_mask.shape[-1] > 1:
            attn_mask = attn_mask.contiguous()
        if attn_mask.dtype == torch.bool:
            mask = attn_mask
        else:
            bias = attn_mask
    if scale is not None and not isinstance(scale, (float, int)):
        scale = float(scale)
    out = straight_attention(_rows(query), _rows(key), _rows(value), causal=is_causal, q_offset="top",
                             softmax_scale=scale, bias=bias, mask=mask, dropout_p=dropout_p, layout="bhsd")
    return out if len(lead) == 2 else out.reshape(*lead, *out.shape[-2:])


def _four_dimensions(tensor, lead=None):
    """[..., heads, L, E] as [batch, heads, L, E]; a mask is expanded to `lead` first, so that its batch can be one."""
    if lead is not None:
        tensor = tensor.expand(*lead, *tensor.shape[-2:])
    if tensor.dim() > 4:
        return tensor.flatten(0, -4)  # a copy only where strides force one
    while tensor.dim() < 4:
        tensor = tensor.unsqueeze(0)
    return tensor

