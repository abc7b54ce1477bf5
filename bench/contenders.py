"""heed and its peers behind one shape: an implementation prepares a Case into a Contender, whose run() does the work
once and whose results() are compared before anything is timed.

Every peer gets the layout it likes best, its output allocated beforehand where its interface allows, and the same
values.
"""

import ctypes
import dataclasses
import math

import numpy as np
import torch

from native import Unavailable, load_onednn

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Case:
    kind: str                 # fwd | bwd | decode
    hq: int
    hkv: int
    sq: int
    sk: int
    d: int
    dtype: str = "f32"
    causal: bool = False
    b: int = 1

    @property
    def line(self):
        """The problem line, as `heed explain` and `heed check` read it."""
        parts = [f"attention b={self.b} hq={self.hq} hkv={self.hkv} sq={self.sq} sk={self.sk} d={self.d} {self.dtype}"]
        parts += ["pass=bwd"] * (self.kind == "bwd") + ["causal"] * self.causal
        return " ".join(parts)

    @property
    def flops(self):
        """4 b h sq sk d, half when causal, backward 2.5 times: as the field counts them."""
        full = 4.0 * self.b * self.hq * self.sq * self.sk * self.d
        return full * (0.5 if self.causal else 1.0) * (2.5 if self.kind == "bwd" else 1.0)

    @property
    def bytes(self):
        """Keys and values when decoding (the rest is nothing beside them), else every input and output once."""
        heads = 2 * self.hkv * self.sk + (0 if self.kind == "decode" else 2 * self.hq * self.sq)
        if self.kind == "bwd":
            heads += 2 * self.hkv * self.sk + 2 * self.hq * self.sq
        return self.b * heads * self.d * (4 if self.dtype == "f32" else 2)


class Tensors:
    """One set of values per case, [b, h, s, d] in memory; q, k, v of causal and full cases of a size are the same."""

    def __init__(self, case):
        generator = torch.Generator().manual_seed(1)
        kind = DTYPES[case.dtype]

        def normal(heads, rows):
            return torch.randn(case.b, heads, rows, case.d, generator=generator).to(kind)

        self.q, self.k, self.v = normal(case.hq, case.sq), normal(case.hkv, case.sk), normal(case.hkv, case.sk)
        self.dout = normal(case.hq, case.sq) if case.kind == "bwd" else None


@dataclasses.dataclass
class Contender:
    peer: str                 # whose: "heed", "torch", ...
    case: Case
    threads: int
    run: callable
    results: callable         # -> list of f32 tensors [b, h, s, d]: out, or dq, dk, dv
    impl: str = ""            # by which kernel, where it can be told
    max_diff: float = 0.0     # from the first contender's results
    agrees: bool = True


class Heed:
    name = "heed"

    def __init__(self):
        try:
            from heed import _core
        except ImportError as error:
            raise Unavailable(f"heed's Python module does not load ({error}); set PYTHONPATH=<build>/python") from None
        self.core = _core
        self.version = _core.version()

    def prepare(self, case, tensors, threads):
        core = self.core
        args = core.AttentionArgs(layout_q=core.LAYOUT_BHSD, layout_kv=core.LAYOUT_BHSD, num_threads=threads,
                                  causal=case.causal)
        kept = {"q": tensors.q, "k": tensors.k, "v": tensors.v, "out": torch.empty_like(tensors.q),
                "lse": torch.empty(case.b, case.hq, case.sq)}
        self._set(args, case, kept)
        forward = self._planned(args)
        if case.kind != "bwd":
            return Contender(self.name, case, threads, lambda: args.run(forward.plan),
                             lambda: [kept["out"].float()], forward.plan.impl)
        args.run(forward.plan)
        args.pass_ = core.PASS_BACKWARD
        gradients = {"dq": torch.empty_like(tensors.q), "dk": torch.empty_like(tensors.k),
                     "dv": torch.empty_like(tensors.v)}
        kept.update(dout=tensors.dout, **gradients)
        self._set(args, case, {"dout": tensors.dout, **gradients})
        backward = self._planned(args)
        return Contender(self.name, case, threads, lambda: args.run(backward.plan),
                         lambda: [kept[name].float() for name in ("dq", "dk", "dv")], backward.plan.impl)

    @dataclasses.dataclass
    class _Planned:
        plan: object
        workspace: object

    def _set(self, args, case, tensors):
        for name, tensor in tensors.items():
            dtype = "f32" if name == "lse" else case.dtype
            args.set_tensor(name, tensor.data_ptr(), dtype, list(tensor.shape), list(tensor.stride()))

    def _planned(self, args):
        plan = self.core.Plan(args.problem())
        workspace = self.core.Buffer(max(plan.workspace_bytes, 64))
        args.workspace, args.workspace_bytes = workspace.pointer, plan.workspace_bytes
        return self._Planned(plan, workspace)


class Torch:
    name = "torch"

    def __init__(self):
        self.version = torch.__version__

    def prepare(self, case, tensors, threads):
        attention = torch.nn.functional.scaled_dot_product_attention
        options = {"is_causal": case.causal}
        if case.hq != case.hkv:
            options["enable_gqa"] = True
        result = []
        if case.kind != "bwd":
            def run():
                with torch.inference_mode():
                    result[:] = [attention(tensors.q, tensors.k, tensors.v, **options)]
            return Contender(self.name, case, threads, run, lambda: [result[0].float()])
        leaves = [t.detach().clone().requires_grad_() for t in (tensors.q, tensors.k, tensors.v)]
        out = attention(*leaves, **options)

        def backward():
            result[:] = torch.autograd.grad(out, leaves, tensors.dout, retain_graph=True)
        return Contender(self.name, case, threads, backward, lambda: [g.float() for g in result])


class OnnxRuntime:
    """MultiHeadAttention over [b, s, h*d] for full attention (measured faster than 4-D keys and than the Attention op),
    GroupQueryAttention where causal (skips what is hidden) and for decoding (cache in place)."""
    name = "onnxruntime"

    def __init__(self):
        try:
            import onnx
            import onnxruntime
        except ImportError as error:
            raise Unavailable(f"{error}: pip install onnx onnxruntime") from None
        self.onnx, self.ort = onnx, onnxruntime
        self.version = onnxruntime.__version__

    def prepare(self, case, tensors, threads):
        if case.kind == "bwd":
            raise Unavailable("ONNX Runtime's inference package has no backward pass")
        if case.dtype != "f32":
            raise Unavailable(f"no CPU attention kernel for {case.dtype}")
        rows = {"q": self._rows(tensors.q), "k": self._rows(tensors.k), "v": self._rows(tensors.v)}
        outputs = {"out": np.empty_like(rows["q"])}
        if case.kind == "decode":
            # The last key is given as the new one and appended into the cache where it already stands.
            cache = {"past_key": tensors.k.numpy(), "past_value": tensors.v.numpy()}
            inputs = {"q": rows["q"], "k": rows["k"][:, -1:].copy(), "v": rows["v"][:, -1:].copy(), **cache}
            outputs.update(present_key=cache["past_key"], present_value=cache["past_value"])
        else:
            inputs = rows
            if case.causal:
                shape = (case.b, case.hkv, case.sk, case.d)
                outputs.update(present_key=np.empty(shape, np.float32), present_value=np.empty(shape, np.float32))
        if case.causal or case.kind == "decode":
            inputs["seqlens_k"] = np.full(case.b, case.sk - 1, np.int32)
            inputs["total"] = np.array([case.sk], np.int32)
            past = ["past_key", "past_value"] if case.kind == "decode" else ["", ""]
            node = self.onnx.helper.make_node(
                "GroupQueryAttention", ["q", "k", "v", *past, "seqlens_k", "total"], list(outputs),
                domain="com.microsoft", num_heads=case.hq, kv_num_heads=case.hkv)
        else:
            node = self.onnx.helper.make_node("MultiHeadAttention", ["q", "k", "v"], ["out"], domain="com.microsoft",
                                              num_heads=case.hq)
        session = self._session(node, inputs, outputs, threads)
        binding = session.io_binding()
        value = self.ort.OrtValue.ortvalue_from_numpy
        bound = {name: value(array) for name, array in {**inputs, **outputs}.items()}
        for name in inputs:
            binding.bind_ortvalue_input(name, bound[name])
        for name in outputs:
            same = {"present_key": "past_key", "present_value": "past_value"}.get(name)
            binding.bind_ortvalue_output(name, bound[same] if same in bound else bound[name])

        def results():
            out = torch.from_numpy(bound["out"].numpy().copy())
            return [out.view(case.b, case.sq, case.hq, case.d).transpose(1, 2)]
        return Contender(self.name, case, threads, lambda: session.run_with_iobinding(binding), results, node.op_type)

    @staticmethod
    def _rows(tensor):
        b, _, s, _ = tensor.shape
        return tensor.transpose(1, 2).reshape(b, s, -1).contiguous().numpy()

    def _session(self, node, inputs, outputs, threads):
        helper, types = self.onnx.helper, self.onnx.TensorProto

        def info(name, array):
            return helper.make_tensor_value_info(name, types.INT32 if array.dtype == np.int32 else types.FLOAT,
                                                 array.shape)
        graph = helper.make_graph([node], "attention", [info(*item) for item in inputs.items()],
                                  [info(*item) for item in outputs.items()])
        model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21),
                                                                      helper.make_opsetid("com.microsoft", 1)])
        options = self.ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Its workers would otherwise spin on while the next contender runs.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        return self.ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


class OneDnn:
    name = "onednn"
    codes = {"f32": 0, "bf16": 1, "f16": 2}

    def __init__(self):
        self.library = load_onednn()
        self.version = self.library.onednn_version().decode()
        self._error = ctypes.create_string_buffer(1024)

    def prepare(self, case, tensors, threads):
        if case.kind == "bwd":
            raise Unavailable("no backward pass of attention in oneDNN's graph on the CPU")
        handle = ctypes.c_void_p()
        masked = case.causal
        if self.library.onednn_create(case.b, case.hq, case.hkv, case.sq, case.sk, case.d, self.codes[case.dtype],
                                      masked, threads, ctypes.byref(handle), self._error, len(self._error)):
            raise Unavailable(self._error.value.decode(errors="replace").splitlines()[0][:160])
        out = torch.empty_like(tensors.q)
        mask = torch.zeros(case.sq, case.sk)
        if masked:
            mask.masked_fill_(torch.ones(case.sq, case.sk, dtype=torch.bool).triu(1), -math.inf)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (tensors.q, tensors.k, tensors.v, mask, out)]
        owner = _OneDnnHandle(self.library, handle)

        def run(kept=(owner, mask)):
            if self.library.onednn_run(handle, *pointers, self._error, len(self._error)):
                raise RuntimeError(self._error.value.decode(errors="replace"))
        return Contender(self.name, case, threads, run, lambda: [out.float()])


class _OneDnnHandle:
    def __init__(self, library, handle):
        self.library, self.handle = library, handle

    def __del__(self):
        self.library.onednn_destroy(self.handle)


def available(names):
    """(implementations, {name: why not})."""
    found, missing = [], {}
    for kind in (Heed, Torch, OnnxRuntime, OneDnn):
        if kind.name not in names:
            continue
        try:
            found.append(kind())
        except Unavailable as error:
            missing[kind.name] = str(error)
    return found, missing
