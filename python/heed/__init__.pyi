# Types of the package's functions. Arrays are those of any library, all of one call of the same.
from collections.abc import Iterable
from typing import Any, Literal, TypeVar, overload

class Error(RuntimeError):
    status: str

class InvalidArgument(Error, ValueError): ...
class NotSupported(Error, NotImplementedError): ...
class NotFound(Error, LookupError): ...
class OutOfMemory(Error, MemoryError): ...
class InitializationFailed(Error): ...
class OperationFailed(Error): ...

__version__: str
__all__: list[str]

Array = TypeVar("Array")
Layout = Literal["bshd", "bhsd", "thd"]

def version() -> str: ...
def info() -> str: ...
def warm(problems: str | Iterable[str], *, arch: str | None = None) -> dict[str, float]: ...
@overload
def explain(problem: str, k: None = None, v: None = None, *, backend: str | None = None) -> str: ...
@overload
def explain(problem: Array, k: Array, v: Array, *, backend: str | None = None, **options: Any) -> str: ...
@overload
def attention(
    q: Array, k: Array, v: Array, *, causal: bool = False, window: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None, softcap: float = 0.0, bias: Array | None = None, mask: Array | None = None,
    alibi_slopes: Array | None = None, sinks: Array | None = None, dropout_p: float = 0.0,
    seed: int | tuple[int, int] | Array | None = None, cu_seqlens_q: Array | None = None,
    cu_seqlens_k: Array | None = None, seqused_q: Array | None = None, seqused_k: Array | None = None,
    page_table: Array | None = None, layout: Layout = "bshd", num_splits: int = 0, return_lse: Literal[False] = False,
    out: Array | None = None, backend: str | None = None, layout_kv: Layout | None = None,
    q_offset: int | Literal["top"] | None = None, chunk: int = 0, leftpad: Array | None = None,
    cache_batch_idx: Array | None = None, max_seqlen_q: int = 0, max_seqlen_k: int = 0, out_dtype: Any = None,
    q_descale: None = None, k_descale: None = None, v_descale: None = None, deterministic: bool = False,
    batch_invariant: bool = False, validate: bool | None = None, num_threads: int = 0,
    status: Array | None = None) -> Array: ...
@overload
def attention(
    q: Array, k: Array, v: Array, *, causal: bool = False, window: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None, softcap: float = 0.0, bias: Array | None = None, mask: Array | None = None,
    alibi_slopes: Array | None = None, sinks: Array | None = None, dropout_p: float = 0.0,
    seed: int | tuple[int, int] | Array | None = None, cu_seqlens_q: Array | None = None,
    cu_seqlens_k: Array | None = None, seqused_q: Array | None = None, seqused_k: Array | None = None,
    page_table: Array | None = None, layout: Layout = "bshd", num_splits: int = 0, return_lse: Literal[True],
    out: Array | None = None, backend: str | None = None, layout_kv: Layout | None = None,
    q_offset: int | Literal["top"] | None = None, chunk: int = 0, leftpad: Array | None = None,
    cache_batch_idx: Array | None = None, max_seqlen_q: int = 0, max_seqlen_k: int = 0, out_dtype: Any = None,
    q_descale: None = None, k_descale: None = None, v_descale: None = None, deterministic: bool = False,
    batch_invariant: bool = False, validate: bool | None = None, num_threads: int = 0,
    status: Array | None = None) -> tuple[Array, Array]: ...
def kv_append(
    k_new: Array | None, v_new: Array | None, k_cache: Array, v_cache: Array, cache_seqlens: Array, *,
    q: Array | None = None, q_out: Array | None = None, rotary_cos: Array | None = None,
    rotary_sin: Array | None = None, rotary_interleaved: bool = False, q_per_position: bool = True,
    rotary_seqlens: Array | None = None, leftpad: Array | None = None, page_table: Array | None = None,
    cache_batch_idx: Array | None = None, cu_seqlens_new: Array | None = None, cu_seqlens_q: Array | None = None,
    layout: Layout = "bshd", layout_cache: Literal["bshd", "bhsd"] = "bshd", backend: str | None = None,
    validate: bool | None = None, num_threads: int = 0, status: Array | None = None) -> Array | None: ...
