"""heed: exact attention, explained.

``attention`` and ``kv_append`` take arrays of NumPy, PyTorch, CuPy, JAX or anything with DLPack as they lie in memory;
``explain`` says how a call would be done and why, ``info`` what this machine has, ``warm`` compiles for a GPU ahead.
``heed.torch``, ``heed.flash_attn``, ``heed.transformers`` and ``heed.jax`` are for their libraries, ``heed.plot`` draws,
``heed._core`` is the C interface.
"""

import importlib as _importlib
import importlib.util as _importlib_util
import os as _os

from . import _core
from ._attention import attention, kv_append, problem_of as _problem_of
from ._core import (Error, InitializationFailed, InvalidArgument, NotFound, NotSupported, OperationFailed, OutOfMemory)

__version__ = _core.version()

__all__ = ["Error", "InitializationFailed", "InvalidArgument", "NotFound", "NotSupported", "OperationFailed",
           "OutOfMemory", "attention", "explain", "info", "kv_append", "version", "warm"]


def version() -> str:
    """The library's version, e.g. "0.1.0"."""
    return _core.version()


def info() -> str:
    """The machine, its backends and why any is missing, as text."""
    return _core.info()


def explain(problem, k=None, v=None, *, backend=None, **options) -> str:
    """How a call would be done: what every implementation says of it, the choice and its steps.

    Takes a problem line, or what ``attention`` takes; nothing is computed and no output is needed.

    >>> print(heed.explain("attention b=1 hq=8 hkv=8 sq=1024 sk=1024 d=64 f32 causal"))
    >>> print(heed.explain(q, k, v, causal=True))
    """
    if isinstance(problem, str):
        if k is not None or v is not None or options:
            raise InvalidArgument("problem: a problem line says everything; no tensors or options beside it")
        return _core.Problem(problem).explain(backend)
    return _problem_of(problem, k, v, **options).explain(backend)


def warm(problems, *, arch=None) -> dict:
    """Compiles the GPU kernels that problems launch, and keeps them on disk for every later process.

    problems: a problem line, or several; arch "sm_90a" is for the usual GPU of that architecture, none needs to be here,
    None for the GPU that each line names. Returns num_kernels, num_compiled (the others were on disk) and
    compile_seconds.

    >>> heed.warm("attention b=4 hq=32 hkv=8 sq=4096 d=128 bf16 causal", arch="sm_90a")
    """
    lines = [problems] if isinstance(problems, str) else problems
    return _core.warm([_core.Problem(line) for line in lines], arch)


def _wheel_folder():
    """The folder in which NVIDIA's wheels (the extra `cuda` brings one, PyTorch too) have laid libnvrtc, or None."""
    try:
        spec = _importlib_util.find_spec("nvidia")
    except (ImportError, ValueError):
        return None
    for place in (spec.submodule_search_locations or ()) if spec else ():
        for part in ("cu13/lib", "cuda_nvrtc/lib"):
            folder = _os.path.join(place, part)
            if any(_os.path.exists(_os.path.join(folder, name)) for name in ("libnvrtc.so.13", "libnvrtc.so.12")):
                return folder
    return None


def __getattr__(name):
    """heed.torch and the like are imported when they are first asked for."""
    if name in ("flash_attn", "jax", "plot", "torch", "transformers"):
        return _importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_folder = _wheel_folder()
if _folder is not None:
    _core.set_nvrtc_folder(_folder)
