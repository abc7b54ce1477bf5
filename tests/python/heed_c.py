"""The C interface through ctypes: no build, NumPy views of the tensors that heed_inputs_create makes.

The library is $HEED_LIBRARY, else libheed.so of the usual build folder.
"""

import ctypes
import os
import pathlib

import numpy

MAX_DIMS = 4
F32, F16, BF16, F64, I32, BOOL = 1, 2, 3, 4, 5, 6


class Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("shape", ctypes.c_int64 * MAX_DIMS),
        ("stride", ctypes.c_int64 * MAX_DIMS),
    ]

    def array(self):
        """A view of the memory; None if absent. bf16 comes as its bits (uint16): see values()."""
        if self.dtype == 0:
            return None
        dtype = {F32: "f4", F16: "f2", BF16: "u2", F64: "f8", I32: "i4", BOOL: "u1"}[self.dtype]
        shape, stride = self.shape[: self.ndim], self.stride[: self.ndim]
        if 0 in shape:
            return numpy.zeros(shape, dtype)
        span = 1 + sum((n - 1) * s for n, s in zip(shape, stride))
        memory = (ctypes.c_char * (span * numpy.dtype(dtype).itemsize)).from_address(self.data)
        flat = numpy.frombuffer(memory, dtype)
        return numpy.lib.stride_tricks.as_strided(flat, shape, [s * flat.itemsize for s in stride], writeable=True)

    def values(self):
        """A copy as float64 (integers as they are); None if absent."""
        array = self.array()
        if array is None or self.dtype in (I32, BOOL):
            return array
        if self.dtype == BF16:
            return (array.astype(numpy.uint32) << 16).view(numpy.float32).astype(numpy.float64)
        return array.astype(numpy.float64)


def _tensors(names):
    return [(name, Tensor) for name in names.split()]


class AttentionArgs(ctypes.Structure):
    _fields_ = (
        [("struct_size", ctypes.c_uint64)]
        + [(name, ctypes.c_int32) for name in "pass_ layout_q layout_kv device".split()]
        + _tensors(
            "q k v bias mask alibi_slopes sinks cu_seqlens_q cu_seqlens_k seqused_q seqused_k leftpad_k page_table"
            " cache_batch_idx out lse dout dlse dq dk dv dbias dsinks dalibi_slopes status"
        )
        + [
            ("has_softmax_scale", ctypes.c_int32),
            ("softmax_scale", ctypes.c_float),
            ("softcap", ctypes.c_float),
            ("dropout_p", ctypes.c_float),
            ("causal", ctypes.c_int32),
            ("offset_kind", ctypes.c_int32),
        ]
        + [
            (name, ctypes.c_int64)
            for name in "q_offset window_left window_right chunk max_seqlen_q max_seqlen_k num_splits".split()
        ]
        + [
            ("deterministic", ctypes.c_int32),
            ("batch_invariant", ctypes.c_int32),
            ("dropout_seed", ctypes.c_uint64),
            ("dropout_offset", ctypes.c_uint64),
            ("dropout_seed_ptr", ctypes.POINTER(ctypes.c_uint64)),
            ("dropout_offset_ptr", ctypes.POINTER(ctypes.c_uint64)),
            ("index_base", ctypes.c_int64 * 4),
            ("workspace", ctypes.c_void_p),
            ("workspace_bytes", ctypes.c_size_t),
            ("allocator", ctypes.c_void_p),
            ("executor", ctypes.c_void_p),
            ("stream", ctypes.c_void_p),
            ("num_threads", ctypes.c_int32),
            ("device_index", ctypes.c_int32),
        ]
    )


class KvAppendArgs(ctypes.Structure):
    _fields_ = (
        [("struct_size", ctypes.c_uint64)]
        + [(name, ctypes.c_int32) for name in "layout_new layout_cache device rotary_style".split()]
        + _tensors(
            "k_new v_new k_cache v_cache q q_out rotary_cos rotary_sin cu_seqlens_new cu_seqlens_q cache_seqlens"
            " rotary_seqlens leftpad_k page_table cache_batch_idx status"
        )
        + [
            ("q_positions", ctypes.c_int32),
            ("num_threads", ctypes.c_int32),
            ("executor", ctypes.c_void_p),
            ("stream", ctypes.c_void_p),
            ("workspace", ctypes.c_void_p),
            ("workspace_bytes", ctypes.c_size_t),
            ("allocator", ctypes.c_void_p),
            ("device_index", ctypes.c_int32),
            ("reserved", ctypes.c_int32),
        ]
    )


class PlanOptions(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_uint64), ("backend", ctypes.c_char_p)]


def _load():
    root = pathlib.Path(__file__).resolve().parents[2]
    library = ctypes.CDLL(os.environ.get("HEED_LIBRARY", str(root / "build" / "libheed.so")))
    library.heed_last_error.restype = ctypes.c_char_p
    library.heed_inputs_create.argtypes = [ctypes.c_char_p, ctypes.POINTER(ctypes.c_void_p)]
    library.heed_inputs_attention.argtypes = [ctypes.c_void_p]
    library.heed_inputs_attention.restype = ctypes.POINTER(AttentionArgs)
    library.heed_inputs_kv_append.argtypes = [ctypes.c_void_p]
    library.heed_inputs_kv_append.restype = ctypes.POINTER(KvAppendArgs)
    library.heed_inputs_check_guards.argtypes = [ctypes.c_void_p]
    library.heed_inputs_destroy.argtypes = [ctypes.c_void_p]
    library.heed_attention.argtypes = [ctypes.POINTER(AttentionArgs), ctypes.POINTER(PlanOptions)]
    library.heed_kv_append.argtypes = [ctypes.POINTER(KvAppendArgs), ctypes.POINTER(PlanOptions)]
    return library


LIBRARY = _load()


def check(status):
    if status != 0:
        raise RuntimeError(LIBRARY.heed_last_error().decode())


class Inputs:
    """The tensors of a problem line, as `args`; run() runs it on a backend."""

    def __init__(self, line):
        self._handle = ctypes.c_void_p()
        check(LIBRARY.heed_inputs_create(line.encode(), ctypes.byref(self._handle)))
        self.is_attention = bool(LIBRARY.heed_inputs_attention(self._handle))
        get = LIBRARY.heed_inputs_attention if self.is_attention else LIBRARY.heed_inputs_kv_append
        self.args = get(self._handle).contents

    def run(self, backend="ref"):
        options = PlanOptions(ctypes.sizeof(PlanOptions), backend.encode())
        call = LIBRARY.heed_attention if self.is_attention else LIBRARY.heed_kv_append
        check(call(ctypes.byref(self.args), ctypes.byref(options)))
        check(LIBRARY.heed_inputs_check_guards(self._handle))

    def __del__(self):
        if getattr(self, "_handle", None):
            LIBRARY.heed_inputs_destroy(self._handle)
