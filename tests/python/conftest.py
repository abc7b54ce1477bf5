"""Run with PYTHONPATH=<build>/python, where a build with -DHEED_BUILD_PYTHON=ON has put the package."""

import numpy as np
import pytest


def bf16_bits(values):
    """f32 values rounded to nearest even as bf16, in uint16."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def bf16_values(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def textbook(q, k, v, causal=False, scale=None):
    """(out, lse) in double precision; q [b, sq, hq, d], k and v [b, sk, hkv, d]; causal is aligned bottom right."""
    q, k, v = (np.asarray(x, dtype=np.float64) for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    scores = np.einsum("bihd,bjhd->bhij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        i, j = np.indices(scores.shape[2:])
        scores = np.where(j <= i + k.shape[1] - q.shape[1], scores, -np.inf)
    peak = scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(peak), peak, 0.0))
    total = weights.sum(axis=-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        out = np.einsum("bhij,bjhd->bihd", np.where(total > 0, weights / total, 0.0), v)
        lse = np.where(total > 0, np.log(total) + np.where(np.isfinite(peak), peak, 0.0), -np.inf)[..., 0]
    return out, lse


def aligned(array):
    """A copy at a multiple of 128 bytes: what a plan is promised about addresses then holds for any such array."""
    memory = np.empty(array.nbytes + 128, np.uint8)
    start = -memory.ctypes.data % 128
    copy = memory[start:start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


class Call:
    """Arguments over NumPy arrays, a plan for them and its workspace; keeps all the memory alive."""

    def __init__(self, dtype, numbers=(), backend=None, **arrays):
        from heed import _core
        self.args = _core.AttentionArgs(**dict(numbers))
        self.arrays = arrays
        for name, array in arrays.items():
            kind = {"float32": "f32", "int32": "i32", "bool": "bool", "float64": "f64"}.get(array.dtype.name, dtype)
            strides = [stride // array.itemsize for stride in array.strides]
            self.args.set_tensor(name, array.ctypes.data, kind, list(array.shape), strides)
        self.problem = self.args.problem()
        self.plan = _core.Plan(self.problem, backend)
        self.workspace = _core.Buffer(max(self.plan.workspace_bytes, 64))
        self.args.workspace, self.args.workspace_bytes = self.workspace.pointer, self.plan.workspace_bytes

    def run(self):
        self.args.run(self.plan)
        return self.arrays["out"]


@pytest.fixture
def normal():
    """Random normal f32 arrays, the same in every run."""
    generator = np.random.default_rng(7)
    return lambda *shape: generator.standard_normal(shape, dtype=np.float32)
