from collections.abc import Sequence

from heed import (
    Error as Error,
    InitializationFailed as InitializationFailed,
    InvalidArgument as InvalidArgument,
    NotFound as NotFound,
    NotSupported as NotSupported,
    OperationFailed as OperationFailed,
    OutOfMemory as OutOfMemory
)


class Problem:
    """
    What is asked, without pointers. Reads a problem line; str() prints it.
    """

    def __init__(self, line: str) -> None: ...

    def __str__(self) -> str: ...

    @property
    def op(self) -> str: ...

    @property
    def flops(self) -> float: ...

    @property
    def bytes(self) -> float: ...

    def verdicts(self, backend: str | None = None) -> list:
        """What every implementation says of it."""

    def explain(self, backend: str | None = None) -> str:
        """As text: verdicts, the choice, its steps."""

class Plan:
    """
    How a problem will be done. Immutable; any number of threads may run it at once.
    """

    def __init__(self, problem: Problem, backend: str | None = None) -> None: ...

    def __str__(self) -> str: ...

    @property
    def impl(self) -> str: ...

    @property
    def workspace_bytes(self) -> int: ...

    @property
    def address(self) -> int:
        """The heed_plan*, for callers of the C interface."""

DEVICE_CPU: int = 0

DEVICE_CUDA: int = 1

LAYOUT_BSHD: int = 0

LAYOUT_BHSD: int = 1

LAYOUT_THD: int = 2

PASS_FORWARD: int = 0

PASS_BACKWARD: int = 1

OFFSET_BOTTOM_RIGHT: int = 0

OFFSET_TOP_LEFT: int = 1

OFFSET_GIVEN: int = 2

ROTARY_HALF: int = 0

ROTARY_INTERLEAVED: int = 1

STATUS_BAD_LENGTH_Q: int = 1

STATUS_BAD_LENGTH_K: int = 2

STATUS_BAD_PAGE: int = 4

STATUS_APPEND_PAST_CAPACITY: int = 8

class AttentionArgs:
    """heed_attention_args: AttentionArgs(causal=True)."""

    def __init__(self, **kwargs) -> None: ...

    def set_tensor(self, name: str, pointer: int, dtype: str, shape: Sequence[int], strides: Sequence[int] | None = None) -> None:
        """Strides in elements; None: contiguous."""

    def set_pointer(self, name: str, pointer: int) -> None:
        """Other memory of the same dtype, shape and strides."""

    def clear_tensor(self, name: str) -> None: ...

    def tensor(self, name: str) -> object:
        """(pointer, dtype, shape, strides), or None where absent."""

    @property
    def tensors(self) -> list:
        """Names of the tensors present."""

    @property
    def address(self) -> int:
        """The C struct, for callers of the C interface."""

    @property
    def executor(self) -> str: ...

    @executor.setter
    def executor(self, arg: str, /) -> None: ...

    @property
    def device(self) -> int: ...

    @device.setter
    def device(self, arg: int, /) -> None: ...

    @property
    def device_index(self) -> int: ...

    @device_index.setter
    def device_index(self, arg: int, /) -> None: ...

    @property
    def num_threads(self) -> int: ...

    @num_threads.setter
    def num_threads(self, arg: int, /) -> None: ...

    @property
    def stream(self) -> int: ...

    @stream.setter
    def stream(self, arg: int, /) -> None: ...

    @property
    def layout_q(self) -> int: ...

    @layout_q.setter
    def layout_q(self, arg: int, /) -> None: ...

    @property
    def layout_kv(self) -> int: ...

    @layout_kv.setter
    def layout_kv(self, arg: int, /) -> None: ...

    @property
    def softmax_scale(self) -> float | None:
        """None: 1/sqrt(head_dim)."""

    @softmax_scale.setter
    def softmax_scale(self, value: float | None) -> None: ...

    @property
    def softcap(self) -> float: ...

    @softcap.setter
    def softcap(self, arg: float, /) -> None: ...

    @property
    def dropout_p(self) -> float: ...

    @dropout_p.setter
    def dropout_p(self, arg: float, /) -> None: ...

    @property
    def causal(self) -> int: ...

    @causal.setter
    def causal(self, arg: int, /) -> None: ...

    @property
    def offset_kind(self) -> int: ...

    @offset_kind.setter
    def offset_kind(self, arg: int, /) -> None: ...

    @property
    def q_offset(self) -> int: ...

    @q_offset.setter
    def q_offset(self, arg: int, /) -> None: ...

    @property
    def window_left(self) -> int: ...

    @window_left.setter
    def window_left(self, arg: int, /) -> None: ...

    @property
    def window_right(self) -> int: ...

    @window_right.setter
    def window_right(self, arg: int, /) -> None: ...

    @property
    def chunk(self) -> int: ...

    @chunk.setter
    def chunk(self, arg: int, /) -> None: ...

    @property
    def max_seqlen_q(self) -> int: ...

    @max_seqlen_q.setter
    def max_seqlen_q(self, arg: int, /) -> None: ...

    @property
    def max_seqlen_k(self) -> int: ...

    @max_seqlen_k.setter
    def max_seqlen_k(self, arg: int, /) -> None: ...

    @property
    def num_splits(self) -> int: ...

    @num_splits.setter
    def num_splits(self, arg: int, /) -> None: ...

    @property
    def deterministic(self) -> int: ...

    @deterministic.setter
    def deterministic(self, arg: int, /) -> None: ...

    @property
    def batch_invariant(self) -> int: ...

    @batch_invariant.setter
    def batch_invariant(self, arg: int, /) -> None: ...

    @property
    def dropout_seed(self) -> int: ...

    @dropout_seed.setter
    def dropout_seed(self, arg: int, /) -> None: ...

    @property
    def dropout_offset(self) -> int: ...

    @dropout_offset.setter
    def dropout_offset(self, arg: int, /) -> None: ...

    @property
    def dropout_seed_ptr(self) -> int: ...

    @dropout_seed_ptr.setter
    def dropout_seed_ptr(self, arg: int, /) -> None: ...

    @property
    def dropout_offset_ptr(self) -> int: ...

    @dropout_offset_ptr.setter
    def dropout_offset_ptr(self, arg: int, /) -> None: ...

    @property
    def index_base(self) -> tuple: ...

    @index_base.setter
    def index_base(self, arg: Sequence[int], /) -> None: ...

    @property
    def workspace(self) -> int: ...

    @workspace.setter
    def workspace(self, arg: int, /) -> None: ...

    @property
    def workspace_bytes(self) -> int: ...

    @workspace_bytes.setter
    def workspace_bytes(self, arg: int, /) -> None: ...

    def problem(self) -> Problem:
        """The problem that these arguments pose."""

    def validate(self) -> None:
        """
        Reads the lengths, offsets and page table that a run never looks at, and raises where they are wrong.
        """

    def run(self, plan: Plan) -> None: ...

    def __call__(self, backend: str | None = None) -> None:
        """Problem, cached plan, workspace and run in one."""

def attention_run(plan: Plan, args: AttentionArgs, q: int, k: int, v: int, out: int, lse: int = 0, workspace: int = 0, workspace_bytes: int = 0) -> None:
    """
    Runs a plan over these pointers, the rest taken from `args`, which stays as it is: threads may share it.
    """

class KvAppendArgs:
    """heed_kv_append_args."""

    def __init__(self, **kwargs) -> None: ...

    def set_tensor(self, name: str, pointer: int, dtype: str, shape: Sequence[int], strides: Sequence[int] | None = None) -> None:
        """Strides in elements; None: contiguous."""

    def set_pointer(self, name: str, pointer: int) -> None:
        """Other memory of the same dtype, shape and strides."""

    def clear_tensor(self, name: str) -> None: ...

    def tensor(self, name: str) -> object:
        """(pointer, dtype, shape, strides), or None where absent."""

    @property
    def tensors(self) -> list:
        """Names of the tensors present."""

    @property
    def address(self) -> int:
        """The C struct, for callers of the C interface."""

    @property
    def executor(self) -> str: ...

    @executor.setter
    def executor(self, arg: str, /) -> None: ...

    @property
    def device(self) -> int: ...

    @device.setter
    def device(self, arg: int, /) -> None: ...

    @property
    def device_index(self) -> int: ...

    @device_index.setter
    def device_index(self, arg: int, /) -> None: ...

    @property
    def num_threads(self) -> int: ...

    @num_threads.setter
    def num_threads(self, arg: int, /) -> None: ...

    @property
    def stream(self) -> int: ...

    @stream.setter
    def stream(self, arg: int, /) -> None: ...

    @property
    def layout_new(self) -> int: ...

    @layout_new.setter
    def layout_new(self, arg: int, /) -> None: ...

    @property
    def layout_cache(self) -> int: ...

    @layout_cache.setter
    def layout_cache(self, arg: int, /) -> None: ...

    @property
    def rotary_style(self) -> int: ...

    @rotary_style.setter
    def rotary_style(self, arg: int, /) -> None: ...

    @property
    def q_positions(self) -> int: ...

    @q_positions.setter
    def q_positions(self, arg: int, /) -> None: ...

    @property
    def workspace(self) -> int: ...

    @workspace.setter
    def workspace(self, arg: int, /) -> None: ...

    @property
    def workspace_bytes(self) -> int: ...

    @workspace_bytes.setter
    def workspace_bytes(self, arg: int, /) -> None: ...

    def problem(self) -> Problem: ...

    def validate(self) -> None: ...

    def run(self, plan: Plan) -> None: ...

    def __call__(self, backend: str | None = None) -> None: ...

def attention_time(plan: Plan, args: AttentionArgs, samples: int = 0, calls: int = 0, sample_us: float = 0.0, pause_ms: float = 0.0) -> dict:
    """
    Microseconds of one run, on the device and of the calling thread; pause_ms=60: rested.
    """

def kv_append_time(plan: Plan, args: KvAppendArgs, samples: int = 0, calls: int = 0, sample_us: float = 0.0, pause_ms: float = 0.0) -> dict:
    """
    Microseconds of one run, on the device and of the calling thread; pause_ms=60: rested.
    """

class Inputs:
    """
    Tensors made from a problem line: the same line, the same bits, everywhere.
    """

    def __init__(self, line: str) -> None: ...

    @property
    def problem(self) -> Problem: ...

    @property
    def args(self) -> object:
        """Arguments over these tensors, to run as they are."""

    def tensor(self, name: str) -> object:
        """
        A NumPy array over the tensor; f16 and bf16 as their bits (uint16); None where absent.
        """

    def poison(self) -> None:
        """Fills the outputs with NaN again."""

    def check_guards(self) -> None:
        """Raises where a byte was written outside the outputs' elements."""

def attention_check(args: AttentionArgs) -> dict:
    """
    Judges the outputs that `args` holds against the double-precision reference.
    """

def kv_append_check(before: KvAppendArgs, after: KvAppendArgs) -> dict: ...

ATTENTION_TENSORS: tuple = ...

KV_APPEND_TENSORS: tuple = ...

def attention_call(numbers: AttentionArgs, tensors: tuple, backend: str | None = None, seed: object | None = None, stream: int | None = None, validate: bool = False) -> None:
    """
    One call over arrays: `tensors` in the order of ATTENTION_TENSORS, each an array or None; the numbers of `numbers`; `seed` int64 [2] on the arrays' device; `stream` a CUstream as a number, None: the one that the arrays' framework works on. The interpreter lock is released meanwhile.
    """

def attention_problem(numbers: AttentionArgs, tensors: tuple, with_lse: bool = False, out_f32: bool = False) -> Problem:
    """The problem of such a call; out may be None."""

def kv_append_call(numbers: KvAppendArgs, tensors: tuple, backend: str | None = None, stream: int | None = None, validate: bool = False) -> None:
    """As attention_call, in the order of KV_APPEND_TENSORS."""

class Buffer:
    """Uninitialised memory, aligned; freed with the object."""

    def __init__(self, bytes: int, alignment: int = 64) -> None: ...

    @property
    def pointer(self) -> int: ...

    @property
    def bytes(self) -> int: ...

def version() -> str: ...

def abi_version() -> int: ...

def info() -> str:
    """The machine, its backends and why any is missing, as text."""

def stream_synchronize(device: int, index: int = -1, stream: int = 0) -> None:
    """Waits for the work on a stream."""

def set_nvrtc_folder(folder: str) -> None:
    """
    Where libnvrtc lies, if neither HEED_NVRTC nor the system says; "" forgets it.
    """

def config() -> list:
    """Every HEED_* variable: a list of dicts."""

def plan_cache() -> dict:
    """Hits, misses, entries and capacity of the one-call functions' cache."""

def plan_cache_clear() -> None: ...

def warm(problems: Sequence, arch: str | None = None) -> dict:
    """heed_warm: what it did. The caller keeps the problems meanwhile."""
