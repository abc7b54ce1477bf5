"""heed: exact attention, explained.

``explain`` says how a problem would be done and why, ``info`` what this machine has; ``heed._core`` is the C interface
over raw pointers (problems, plans, runs, inputs and the judge).
"""

import importlib.util
import os

from . import _core
from ._core import (Error, InitializationFailed, InvalidArgument, NotFound, NotSupported, OperationFailed, OutOfMemory)

__version__ = _core.version()


def _wheel_folder():
    """The folder in which NVIDIA's wheels (PyTorch brings one) have laid libnvrtc, or None."""
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations or []) if spec else []:
        for part in ("cu13/lib", "cuda_nvrtc/lib"):
            folder = os.path.join(place, part)
            if any(os.path.exists(os.path.join(folder, name)) for name in ("libnvrtc.so.13", "libnvrtc.so.12")):
                return folder
    return None


if _wheel_folder():
    _core.set_nvrtc_folder(_wheel_folder())

__all__ = ["Error", "InitializationFailed", "InvalidArgument", "NotFound", "NotSupported", "OperationFailed",
           "OutOfMemory", "explain", "info", "version"]


def version() -> str:
    """The library's version, e.g. "0.1.0"."""
    return _core.version()


def info() -> str:
    """The machine, its backends and why any is missing, as text."""
    return _core.info()


def explain(problem: str, backend: "str | None" = None) -> str:
    """How a problem line would be done: what every implementation says of it, the choice and its steps.

    >>> print(heed.explain("attention b=1 hq=8 hkv=8 sq=1024 sk=1024 d=64 f32 causal"))
    """
    return _core.Problem(problem).explain(backend)
