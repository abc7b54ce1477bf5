"""What the array libraries do each in their own way: an output like q, a seed, the stream they work on."""

import random
import sys

from ._core import InvalidArgument, NotSupported


def dtype_name(dtype):
    """"float32" of numpy.float32, torch.float32, numpy.dtype("f4") or the name itself; heed's own names too."""
    if isinstance(dtype, type):
        name = dtype.__name__
    else:
        name = str(dtype)
    name = name.rpartition(".")[2]
    return {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "f64": "float64"}.get(name, name)


class NumPy:
    is_torch = False

    @staticmethod
    def needs_op(*arrays):
        return False

    @staticmethod
    def empty(like, shape, f32):
        import numpy
        return numpy.empty(shape, numpy.float32 if f32 else like.dtype)

    @classmethod
    def empty_like(cls, q):
        return cls.empty(q, q.shape, False)

    @staticmethod
    def seed(like):
        return random.getrandbits(63), 0

    @staticmethod
    def stream(like):
        return None

    @staticmethod
    def is_capturing(like):
        return False

    @staticmethod
    def finish(result):
        return result


class CuPy(NumPy):
    @staticmethod
    def empty(like, shape, f32):
        import cupy
        with like.device:
            return cupy.empty(shape, cupy.float32 if f32 else like.dtype)

    @staticmethod
    def stream(like):
        import cupy
        with like.device:
            return cupy.cuda.get_current_stream().ptr

    @staticmethod
    def is_capturing(like):
        import cupy
        with like.device:
            return cupy.cuda.get_current_stream().is_capturing()


class Jax(NumPy):
    """Arrays on the CPU, outside jax.jit, in a build without heed.jax: the result is made in NumPy's memory, which JAX
    then takes over as it is."""

    @staticmethod
    def empty(like, shape, f32):
        import numpy
        if not hasattr(like, "devices") or next(iter(like.devices())).platform != "cpu":
            raise NotSupported("q is a JAX array on a GPU or inside jax.jit: needs heed.jax, which this heed was built "
                               "without; the nearest is a build where jaxlib is installed")
        return numpy.empty(shape, numpy.float32 if f32 else like.dtype)

    @staticmethod
    def finish(result):
        import jax
        return jax.numpy.asarray(result)


class AnyDlpack(NumPy):
    """Anything else that hands out DLPack: its array namespace takes the result back, or the caller gives out."""

    @staticmethod
    def empty(like, shape, f32):
        space = getattr(like, "__array_namespace__", None)
        if space is None:
            raise InvalidArgument(f"out = None: must be given, heed does not know how to make a "
                                  f"{type(like).__module__}.{type(like).__qualname__}")
        space = space()
        options = {"dtype": space.float32 if f32 else like.dtype}
        if hasattr(like, "device"):
            options["device"] = like.device
        return space.empty(shape, **options)


known_frameworks = {}


def framework_of(array):
    found = known_frameworks.get(type(array))
    return found if found is not None else _find(array)


def _find(array):
    found = AnyDlpack
    for module, name, framework in (("torch", "Tensor", None), ("numpy", "ndarray", NumPy), ("cupy", "ndarray", CuPy),
                                    ("jax", "Array", Jax)):
        base = getattr(sys.modules.get(module), name, None)
        if base is not None and isinstance(array, base):
            found = framework
            if framework is None:
                from .torch import Torch as found
            break
    if len(known_frameworks) < 256:
        known_frameworks[type(array)] = found
    return found
