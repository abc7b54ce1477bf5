"""heed and its peers on a GPU behind one shape: an implementation prepares a Case into Contenders, whose run(i) does
the work once over the i-th set of inputs on torch's current stream.

Tensors are torch's and lie as [batch, seqlen, heads, head_dim] in memory. Everyone writes lse beside the output where
it can: torch's operators are called by name, because scaled_dot_product_attention leaves lse out without gradients.
"""

import dataclasses
import math

import torch

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
SEED, OFFSET = 1234567, 89


class Unavailable(Exception):
    """An implementation that does not do a case; the text says why."""


def aligned(shape, dtype, device):
    """Uninitialised, at a multiple of 128 bytes (the CPU's allocator promises 64), so one plan serves every set."""
    count = math.prod(shape) * dtype.itemsize
    memory = torch.empty(count + 128, dtype=torch.uint8, device=device)
    begin = -memory.data_ptr() % 128
    return memory[begin:begin + count].view(dtype).view(shape)


class Tensors:
    """Inputs of a case, normally distributed: `sets` of q, k, v; options that all sets share."""

    def __init__(self, case, device, sets=1):
        self.device = device
        self.generator = torch.Generator(device=device).manual_seed(1)
        self.dtype = DTYPES[case.dtype]
        q, kv = self.shapes(case)
        self.q, self.k, self.v = ([self.normal(*shape) for _ in range(sets)]
                                  for shape in (q, kv + (case.d,), kv + (case.head_dim_v,)))
        sizes = {"b": case.b, "h": case.hq, "i": case.sq, "j": case.sk}
        self.bias = self.normal(*(sizes[x] if x in case.bias else 1 for x in "bhij")) if case.bias else None
        self.mask = None
        if case.mask:
            shape = [sizes[x] if x in case.mask else 1 for x in "bhij"]
            self.mask = torch.rand(*shape, device=device, generator=self.generator) < 0.7
            self.mask[..., 0] = True  # every query sees a key: peers differ on rows that see none
        self.slopes = torch.exp2(-8.0 * torch.arange(1, case.hq + 1, device=device) / case.hq) if case.alibi else None
        self.sinks = self.normal(case.hq).float() if case.sinks else None
        self.cu_seqlens = None
        if case.lengths:
            self.cu_seqlens = torch.tensor([0, *case.lengths], device=device).cumsum(0).to(torch.int32)
        self.page_table = self.seqused = None
        if case.page:
            pages = -(-case.sk // case.page)
            order = torch.randperm(case.b * pages, device=device, generator=self.generator)
            self.page_table = order.to(torch.int32).view(case.b, pages)
            self.seqused = torch.full((case.b,), case.sk, dtype=torch.int32, device=device)
        if case.used:
            self.seqused = torch.tensor(case.used, dtype=torch.int32, device=device)

    @staticmethod
    def shapes(case):
        """(q's shape, k's and v's but for the head_dim)."""
        if case.lengths:
            return (sum(case.lengths), case.hq, case.d), (sum(case.lengths), case.hkv)
        if case.page:
            return (case.b, case.sq, case.hq, case.d), (case.b * -(-case.sk // case.page), case.page, case.hkv)
        return (case.b, case.sq, case.hq, case.d), (case.b, case.sk, case.hkv)

    def normal(self, *shape):
        return aligned(shape, self.dtype, self.device).normal_(generator=self.generator)

    def sequence(self, case, batch, index=0):
        """(q [sq, hq, d], k [sk, hkv, d], v) of one sequence."""
        if case.lengths:
            begin, end = (int(x) for x in self.cu_seqlens[batch:batch + 2])
            return self.q[index][begin:end], self.k[index][begin:end], self.v[index][begin:end]
        if case.page:
            rows = self.page_table[batch].long()
            k, v = (x[index][rows].flatten(0, 1)[:case.sk] for x in (self.k, self.v))
        else:
            k, v = self.k[index][batch], self.v[index][batch]
        keys = case.used[batch] if case.used else case.sk
        return self.q[index][batch], k[:keys], v[:keys]


@dataclasses.dataclass
class Contender:
    name: str                 # "heed", "heed:cuda/attention_fwd_portable", "fa2", "cudnn", ...
    impl: str                 # heed's row, or the peer's name again
    run: callable             # run(i) -> (out, lse) over set i; lse may be None
    problem: str = ""         # heed's line for it
    workspace_bytes: int = 0
    host: callable = None     # -> {"run_us", "call_us"}: heed's own time on the host, measured in C
    max_error: float = math.nan
    agrees: bool = True


# ---- heed ------------------------------------------------------------------------------------------------------------

class Heed:
    name = "heed"
    dearest = 5               # rows that the planner holds for so many times its choice's cost are not prepared

    def __init__(self, device):
        try:
            from heed import _core
        except ImportError as error:
            raise Unavailable(f"heed's Python module does not load ({error}); set PYTHONPATH") from None
        self.core, self.device, self.version = _core, device, _core.version()

    def arguments(self, case, tensors, index):
        """AttentionArgs over the i-th set, with outputs of their own; what they point to is kept in the list."""
        core, cuda = self.core, self.device.type == "cuda"
        args = core.AttentionArgs(device=core.DEVICE_CUDA if cuda else core.DEVICE_CPU, causal=case.causal,
                                  softcap=case.softcap, batch_invariant=case.batch_invariant)
        if case.window:
            args.window_left, args.window_right = case.window, 0
        if case.dropout:
            args.dropout_p, args.dropout_seed, args.dropout_offset = case.dropout, SEED, OFFSET
        q = tensors.q[index]
        out = aligned((*q.shape[:-1], case.head_dim_v), q.dtype, q.device).fill_(math.nan)
        lse_shape = (case.hq, q.shape[0]) if case.lengths else (case.b, case.hq, case.sq)
        lse = aligned(lse_shape, torch.float32, q.device).fill_(math.nan) if case.lse else None
        kept = {"q": q, "k": tensors.k[index], "v": tensors.v[index], "out": out, "lse": lse, "bias": tensors.bias,
                "mask": tensors.mask, "alibi_slopes": tensors.slopes, "sinks": tensors.sinks,
                "page_table": tensors.page_table, "seqused_k": tensors.seqused}
        if case.lengths:
            args.layout_q = args.layout_kv = core.LAYOUT_THD
            args.max_seqlen_q = args.max_seqlen_k = max(case.lengths)
            kept.update(cu_seqlens_q=tensors.cu_seqlens, cu_seqlens_k=tensors.cu_seqlens)
        kinds = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.int32: "i32",
                 torch.bool: "bool"}
        for name, tensor in kept.items():
            if tensor is not None:
                args.set_tensor(name, tensor.data_ptr(), kinds[tensor.dtype], list(tensor.shape), list(tensor.stride()))
        return args, out, lse

    def prepare(self, case, tensors):
        """The planner's choice, then every other row that accepts, each by name."""
        args = self.arguments(case, tensors, 0)[0]
        problem = args.problem()
        verdicts = problem.verdicts()
        chosen = next((v for v in verdicts if v["chosen"]), None)
        if chosen is None:
            raise Unavailable("; ".join(f"{v['impl']}: {v['reason']}" for v in verdicts if "ref/" not in v["impl"]))
        yield self.contender(case, tensors, None)
        for verdict in verdicts:
            if (verdict["accepted"] and not verdict["chosen"] and not verdict["impl"].startswith("ref/")
                    and verdict["cost_us"] < self.dearest * chosen["cost_us"]):
                yield self.contender(case, tensors, verdict["impl"])

    def contender(self, case, tensors, backend):
        calls = [self.arguments(case, tensors, i) for i in range(len(tensors.q))]
        problem = calls[0][0].problem()
        plan = self.core.Plan(problem, backend)
        workspace = torch.empty(max(plan.workspace_bytes, 64) + 64, dtype=torch.uint8, device=self.device)
        for args, _, _ in calls:
            args.workspace = (workspace.data_ptr() + 63) // 64 * 64
            args.workspace_bytes = plan.workspace_bytes

        def run(i, kept=(tensors, workspace)):
            args, out, lse = calls[i]
            args.stream = stream_of(self.device)
            args.run(plan)
            return out, lse

        def host():
            return self.core.attention_time(plan, calls[0][0], samples=15, pause_ms=0)
        name = self.name if backend is None else f"{self.name}:{plan.impl}"
        return Contender(name, plan.impl, run, str(problem), plan.workspace_bytes, host)


def stream_of(device):
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


# ---- peers -----------------------------------------------------------------------------------------------------------

def _refuse(case, **limits):
    """Raises for the first feature of the case that is named with a reason."""
    has = {"paged": case.page, "used": case.used, "packed": case.lengths, "bias": case.bias, "mask": case.mask,
           "softcap": case.softcap, "alibi": case.alibi, "sinks": case.sinks, "window": case.window,
           "dropout": case.dropout,
           "grouped": case.hq != case.hkv, "f32": case.dtype == "f32", "dv": case.head_dim_v != case.d,
           "offset": case.causal and case.sq != case.sk, "batch_invariant": case.batch_invariant}
    for feature, reason in limits.items():
        if has[feature]:
            raise Unavailable(reason)


class Flash2:
    """FlashAttention-2 as torch builds it."""
    name = "fa2"

    def __init__(self, device):
        self.device, self.version = device, f"torch {torch.__version__}"

    def prepare(self, case, tensors):
        _refuse(case, paged="no pages in torch's", used="no lengths beside padded keys", bias="no bias",
                mask="no mask tensor", sinks="no sinks", softcap="no softcap in torch's", f32="16-bit only",
                dv="head_dim_v as head_dim",
                batch_invariant="no such promise")
        window = {"window_size_left": case.window, "window_size_right": 0} if case.window else {}
        extra = {"alibi_slopes": tensors.slopes} if case.alibi else {}
        longest = max(case.lengths) if case.lengths else 0

        def run(i):
            out = torch.ops.aten._flash_attention_forward(
                tensors.q[i], tensors.k[i], tensors.v[i], tensors.cu_seqlens, tensors.cu_seqlens,
                longest or case.sq, longest or case.sk, case.dropout, case.causal and not case.window, False,
                scale=1.0 / math.sqrt(case.d), **window, **extra)
            return out[0], out[1]
        yield Contender(self.name, self.name, run)


class Sdpa:
    """One of torch's fused operators behind scaled_dot_product_attention, over [b, h, s, d] views."""

    def __init__(self, device):
        self.device, self.version = device, f"torch {torch.__version__}"

    def views(self, tensors, i):
        return (x[i].transpose(1, 2) for x in (tensors.q, tensors.k, tensors.v))

    def attn_bias(self, case, tensors):
        if case.bias:
            return tensors.bias.expand(case.b, case.hq, case.sq, case.sk)
        if case.mask:
            hidden = torch.zeros(tensors.mask.shape, dtype=tensors.dtype, device=self.device)
            hidden.masked_fill_(~tensors.mask, -math.inf)
            return hidden.expand(case.b, case.hq, case.sq, case.sk)
        return None


class CuDnn(Sdpa):
    name = "cudnn"

    def __init__(self, device):
        super().__init__(device)
        if torch.backends.cudnn.is_available():
            self.version = f"cuDNN {torch.backends.cudnn.version()}"

    def prepare(self, case, tensors):
        _refuse(case, paged="no pages in torch's", used="no lengths beside padded keys",
                packed="no packed input in torch's", softcap="no softcap", alibi="no ALiBi in torch's", sinks="no sinks",
                window="no window in torch's", f32="16-bit only",
                batch_invariant="no such promise")
        bias = self.attn_bias(case, tensors)

        def run(i):
            q, k, v = self.views(tensors, i)
            out = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, bias, case.lse, case.dropout, case.causal,
                                                                          False)
            return out[0].transpose(1, 2), out[1]
        yield Contender(self.name, self.name, run)


class MemoryEfficient(Sdpa):
    name = "efficient"

    def prepare(self, case, tensors):
        _refuse(case, paged="no pages", used="no lengths beside padded keys", packed="no packed input here",
                softcap="no softcap", alibi="no ALiBi", sinks="no sinks", window="no window in torch's",
                grouped="no grouped heads",
                batch_invariant="no such promise")
        bias = self.attn_bias(case, tensors)

        def run(i):
            q, k, v = self.views(tensors, i)
            out = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, case.lse, case.dropout,
                                                                             case.causal)
            return out[0].transpose(1, 2), None
        yield Contender(self.name, self.name, run)


class Flex(Sdpa):
    """FlexAttention: compiled for each case, tens of seconds of it; only when asked for."""
    name = "flex"

    def prepare(self, case, tensors):
        from torch.nn.attention import flex_attention as flex
        _refuse(case, paged="not built here", used="no lengths beside padded keys", packed="not built here",
                dropout="no dropout", sinks="no sinks", batch_invariant="no such promise")
        offset = case.sk - case.sq
        score, visible = None, None
        if case.softcap:
            def score(s, b, h, i, j):
                return case.softcap * torch.tanh(s / case.softcap)
        elif case.alibi:
            slopes = tensors.slopes

            def score(s, b, h, i, j):
                return s - slopes[h] * (i + offset - j).abs()
        elif case.bias:
            bias = tensors.bias.expand(case.b, case.hq, case.sq, case.sk)

            def score(s, b, h, i, j):
                return s + bias[b, h, i, j]
        if case.mask:
            mask = tensors.mask.expand(case.b, case.hq, case.sq, case.sk)

            def visible(b, h, i, j):
                return mask[b, h, i, j] & (j <= i + offset) if case.causal else mask[b, h, i, j]
        elif case.window:
            def visible(b, h, i, j):
                return (j <= i + offset) & (j >= i + offset - case.window)
        elif case.causal:
            def visible(b, h, i, j):
                return j <= i + offset
        block = None
        if visible is not None:
            block = flex.create_block_mask(visible, None, None, case.sq, case.sk, device=str(self.device))
        attention = torch.compile(flex.flex_attention, dynamic=False)

        def run(i):
            q, k, v = self.views(tensors, i)
            out, lse = attention(q, k, v, score_mod=score, block_mask=block, enable_gqa=case.hq != case.hkv,
                                 return_lse=True)
            return out.transpose(1, 2), lse
        yield Contender(self.name, self.name, run)


IMPLEMENTATIONS = {kind.name: kind for kind in (Heed, Flash2, CuDnn, MemoryEfficient, Flex)}


def available(names, device):
    """(implementations, {name: why not})."""
    found, missing = [], {}
    for name in names:
        try:
            found.append(IMPLEMENTATIONS[name](device))
        except Unavailable as error:
            missing[name] = str(error)
    return found, missing
