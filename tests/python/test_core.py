"""heed._core: plans and runs over NumPy's memory against a formula in NumPy, typed errors, threads."""

import os
import pathlib
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

heed = pytest.importorskip("heed", reason="needs PYTHONPATH=<build>/python")
from conftest import Call, aligned, bf16_bits, bf16_values, textbook  # noqa: E402
from heed import _core  # noqa: E402

LINE = "attention b=2 hq=4 hkv=2 sq=33 sk=47 d=64 f32 causal"


def forward(normal, b=2, hq=4, hkv=2, sq=33, sk=47, d=64):
    q, k, v = normal(b, sq, hq, d), normal(b, sk, hkv, d), normal(b, sk, hkv, d)
    arrays = {"q": q, "k": k, "v": v, "out": np.full_like(q, np.nan), "lse": np.full((b, hq, sq), np.nan, np.float32)}
    return {name: aligned(array) for name, array in arrays.items()}


# ---- problems and plans ----------------------------------------------------------------------------------------------

def test_problem_line_both_ways():
    problem = _core.Problem(LINE)
    assert problem.op == "attention"
    assert str(_core.Problem(str(problem))) == str(problem)


def test_flops_and_bytes():
    full = _core.Problem("attention b=2 hq=4 hkv=4 sq=128 sk=128 d=64 f32")
    assert full.flops == 4 * 2 * 4 * 128 * 128 * 64
    assert full.bytes == 4 * 2 * 4 * 128 * 64 * 4


def test_explain_names_the_choice():
    verdicts = _core.Problem(LINE).verdicts()
    chosen = [verdict for verdict in verdicts if verdict["chosen"]]
    assert len(chosen) == 1 and chosen[0]["accepted"]
    plan = _core.Plan(_core.Problem(LINE))
    assert plan.impl == chosen[0]["impl"]
    text = heed.explain(LINE)
    assert all(verdict["impl"] in text for verdict in verdicts)
    assert plan.impl.split("/")[0] in str(plan)


def test_forced_backend():
    assert _core.Plan(_core.Problem(LINE), "ref").impl.startswith("ref/")


def test_facts():
    assert heed.version() == _core.version() == heed.__version__
    assert _core.abi_version() >= 1
    assert "cpu" in heed.info().lower()
    assert any(entry["name"] == "HEED_THREADS" for entry in _core.config())


# ---- runs over NumPy's memory ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("causal", [False, True])
def test_forward_f32(normal, causal):
    arrays = forward(normal)
    call = Call("f32", {"causal": causal}, **arrays)
    out, lse = textbook(arrays["q"], arrays["k"], arrays["v"], causal)
    np.testing.assert_allclose(call.run(), out, atol=3e-6)
    np.testing.assert_allclose(arrays["lse"], lse, atol=1e-5)


def test_strides_and_scale(normal):
    """bhsd memory seen as bshd, every second key, a scale of one's own."""
    b, hq, sq, sk, d = 1, 3, 20, 31, 48
    q = normal(b, hq, sq, d).transpose(0, 2, 1, 3)
    k, v = (normal(b, 2 * sk, hq, d)[:, ::2] for _ in range(2))
    call = Call("f32", {"softmax_scale": -0.3}, q=q, k=k, v=v, out=np.full((b, sq, hq, d), np.nan, np.float32))
    np.testing.assert_allclose(call.run(), textbook(q, k, v, scale=-0.3)[0], atol=3e-6)


def test_bhsd_layout(normal):
    b, h, s, d = 2, 2, 17, 32
    q, k, v = (normal(b, h, s, d) for _ in range(3))
    layouts = {"layout_q": _core.LAYOUT_BHSD, "layout_kv": _core.LAYOUT_BHSD}
    call = Call("f32", layouts, q=q, k=k, v=v, out=np.full_like(q, np.nan))
    out = textbook(*(x.transpose(0, 2, 1, 3) for x in (q, k, v)))[0]
    np.testing.assert_allclose(call.run().transpose(0, 2, 1, 3), out, atol=3e-6)


def test_bf16_as_bits(normal):
    arrays = {name: bf16_bits(array) for name, array in forward(normal).items() if name != "lse"}
    call = Call("bf16", {"causal": True}, **arrays)
    out = textbook(*(bf16_values(arrays[name]) for name in ("q", "k", "v")), causal=True)[0]
    np.testing.assert_allclose(bf16_values(call.run()), out, atol=2e-2, rtol=1e-2)


def test_f16_as_bits(normal):
    arrays = forward(normal)
    del arrays["lse"]
    arrays = {name: array.astype(np.float16).view(np.uint16) for name, array in arrays.items()}
    call = Call("f16", **arrays)
    out = textbook(*(arrays[name].view(np.float16) for name in ("q", "k", "v")))[0]
    np.testing.assert_allclose(call.run().view(np.float16).astype(np.float32), out, atol=2e-3, rtol=2e-3)


def test_backward_f32(normal):
    arrays = forward(normal, b=1, sq=9, sk=13, d=16)
    Call("f32", {"causal": True}, **arrays).run()
    dout = normal(*arrays["out"].shape)
    gradients = {"d" + name: np.full_like(arrays[name], np.nan) for name in ("q", "k", "v")}
    numbers = {"causal": True, "pass_": _core.PASS_BACKWARD}
    Call("f32", numbers, **arrays, dout=dout, **gradients).run()
    # One direction in the space of q, k and v: the slope of <out, dout> along it, by central differences in f64.
    step, total = {name: normal(*arrays[name].shape).astype(np.float64) for name in ("q", "k", "v")}, []
    for sign in (1, -1):
        moved = [arrays[name] + sign * 1e-6 * step[name] for name in ("q", "k", "v")]
        total.append(np.sum(textbook(*moved, causal=True)[0] * dout))
    slope = sum(np.sum(gradients["d" + name] * step[name]) for name in step)
    assert slope == pytest.approx((total[0] - total[1]) / 2e-6, rel=1e-4)


def test_one_call_plans_itself(normal):
    arrays = forward(normal)
    call = Call("f32", **arrays)
    before = _core.plan_cache()
    call.args()
    call.args()
    after = _core.plan_cache()
    assert after["hits"] > before["hits"] and after["capacity"] > 0
    np.testing.assert_allclose(arrays["out"], textbook(arrays["q"], arrays["k"], arrays["v"])[0], atol=3e-6)


def test_raw_run_leaves_args_alone(normal):
    first, second = forward(normal), forward(normal)
    call = Call("f32", **first)
    pointers = [second[name].ctypes.data for name in ("q", "k", "v", "out", "lse")]
    _core.attention_run(call.plan, call.args, *pointers, call.workspace.pointer, call.workspace.bytes)
    np.testing.assert_allclose(second["out"], textbook(second["q"], second["k"], second["v"])[0], atol=3e-6)
    assert np.isnan(first["out"]).all()
    assert call.args.tensor("q")[0] == first["q"].ctypes.data


# ---- arguments -------------------------------------------------------------------------------------------------------

def test_args_remember(normal):
    q = normal(2, 5, 4, 8)
    args = _core.AttentionArgs(causal=True, window_left=3, num_threads=2)
    assert (args.causal, args.window_left, args.window_right, args.num_threads) == (1, 3, -1, 2)
    args.set_tensor("q", q.ctypes.data, "f32", q.shape)
    assert args.tensor("q") == (q.ctypes.data, "f32", (2, 5, 4, 8), (160, 32, 8, 1))
    assert args.tensors == ["q"]
    args.clear_tensor("q")
    assert args.tensor("q") is None
    assert args.softmax_scale is None
    args.softmax_scale = 0.0
    assert args.softmax_scale == 0.0
    args.index_base = (1, 2, 3, 4)
    assert args.index_base == (1, 2, 3, 4)
    assert args.executor == "pool"
    args.executor = "serial"
    assert args.executor == "serial"
    with pytest.raises(AttributeError):
        _core.AttentionArgs(casual=True)


def test_buffer_alignment():
    assert _core.Buffer(100, 4096).pointer % 4096 == 0
    with pytest.raises(heed.InvalidArgument, match="alignment is 48"):
        _core.Buffer(100, 48)


# ---- errors ----------------------------------------------------------------------------------------------------------

def test_invalid_argument():
    with pytest.raises(heed.InvalidArgument, match="hq") as caught:
        _core.Problem("attention b=1 hq=abc hkv=1 sq=1 sk=1 d=8 f32")
    assert isinstance(caught.value, (heed.Error, ValueError)) and caught.value.status == "invalid_argument"


def test_unknown_names_say_what_there_is():
    with pytest.raises(ValueError, match="cu_seqlens_q"):
        _core.AttentionArgs().set_tensor("queries", 0, "f32", [1, 1, 1, 8])
    with pytest.raises(ValueError, match="bf16"):
        _core.AttentionArgs().set_tensor("q", 0, "float32", [1, 1, 1, 8])
    with pytest.raises(ValueError, match="at most 4"):
        _core.AttentionArgs().set_tensor("q", 0, "f32", [1, 1, 1, 1, 8])


def test_not_found():
    with pytest.raises(heed.NotFound) as caught:
        _core.Plan(_core.Problem(LINE), "abacus")
    assert isinstance(caught.value, LookupError) and "abacus" in str(caught.value)


def test_not_supported():
    with pytest.raises(heed.NotSupported) as caught:
        _core.Plan(_core.Problem("attention b=1 hq=1 hkv=1 sq=4 sk=4 d=8 f64"), "cpu")
    assert isinstance(caught.value, NotImplementedError) and "cpu" in str(caught.value)


def test_small_workspace_writes_nothing(normal):
    arrays = forward(normal, sq=1, sk=4096)
    call = Call("f32", **arrays)
    if call.plan.workspace_bytes == 0:
        pytest.skip("this plan needs no workspace")
    call.args.workspace_bytes = call.plan.workspace_bytes - 1
    with pytest.raises(heed.InvalidArgument, match="workspace"):
        call.run()
    assert np.isnan(arrays["out"]).all()


def test_error_classes():
    for kind in (heed.InvalidArgument, heed.NotSupported, heed.NotFound, heed.OutOfMemory, heed.InitializationFailed,
                 heed.OperationFailed):
        assert issubclass(kind, heed.Error) and issubclass(kind, RuntimeError) and kind.__module__ == "heed"
    assert issubclass(heed.OutOfMemory, MemoryError)


# ---- timing and the GPU ----------------------------------------------------------------------------------------------

def test_times_are_ordered(normal):
    call = Call("f32", **forward(normal))
    timing = _core.attention_time(call.plan, call.args, samples=5, calls=2)
    assert 0 < timing["p10_us"] <= timing["median_us"] <= timing["p90_us"]
    assert (timing["samples"], timing["calls"]) == (5, 2) and timing["host_call_us"] > 0
    with pytest.raises(heed.InvalidArgument, match="options.samples = -1"):
        _core.attention_time(call.plan, call.args, samples=-1)


def test_a_gpu_or_a_reason(normal):
    """The module neither needs a GPU nor falls back silently where there is none."""
    arguments = forward(normal)
    args = _core.AttentionArgs(device=_core.DEVICE_CUDA, device_index=0)
    assert (args.device, args.device_index) == (_core.DEVICE_CUDA, 0)
    for name, array in arguments.items():
        args.set_tensor(name, 0, "f32", array.shape)
    try:
        plan = _core.Plan(args.problem())
        assert plan.impl.startswith("cuda/")
    except heed.Error as error:
        assert "CUDA" in str(error) or "GPU" in str(error)


def test_stream_synchronize():
    _core.stream_synchronize(_core.DEVICE_CPU)
    with pytest.raises(heed.InvalidArgument, match="device"):
        _core.stream_synchronize(7)


def test_nvrtc_folder(tmp_path):
    with pytest.raises(heed.NotFound, match="libnvrtc.so.13"):
        _core.set_nvrtc_folder(str(tmp_path))
    (tmp_path / "libnvrtc.so.13").write_bytes(b"")
    _core.set_nvrtc_folder(str(tmp_path))
    _core.set_nvrtc_folder("")


def test_nvrtc_of_a_wheel(tmp_path):
    """Importing heed hands in the folder of NVIDIA's wheels, wherever `nvidia` is importable from."""
    package = tmp_path / "nvidia" / "cu13" / "lib"
    package.mkdir(parents=True)
    program = "import sys; sys.path.insert(0, sys.argv[1]); import heed; print(heed._wheel_folder())"

    def answer():
        done = subprocess.run([sys.executable, "-S", "-c", program, str(tmp_path)], capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH": str(pathlib.Path(heed.__file__).parents[1])})
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()
    assert answer() == "None"
    (package / "libnvrtc.so.13").write_bytes(b"")
    assert answer() == str(package)


# ---- threads ---------------------------------------------------------------------------------------------------------

def test_interpreter_goes_on_during_a_run(normal):
    """While one thread is inside a run of a tenth of a second, another gets the interpreter again and again."""
    call = Call("f32", {"executor": "serial"}, **forward(normal, b=1, hq=8, hkv=8, sq=2048, sk=2048))
    started, finished = threading.Event(), threading.Event()

    def work():
        started.set()
        call.run()
        finished.set()
    thread = threading.Thread(target=work)
    thread.start()
    started.wait()
    turns = 0
    while not finished.is_set():
        time.sleep(0.001)
        turns += 1
    thread.join()
    assert turns >= 10  # two at most, around the call, if the run kept the lock


def test_one_plan_on_many_threads(normal):
    """The same plan and Args, pointers of each thread's own."""
    arrays = [forward(normal, sq=64, sk=300) for _ in range(4)]
    call = Call("f32", {"causal": True}, **arrays[0])

    def work(mine):
        workspace = _core.Buffer(max(call.plan.workspace_bytes, 64))
        pointers = [mine[name].ctypes.data for name in ("q", "k", "v", "out", "lse")]
        for _ in range(5):
            _core.attention_run(call.plan, call.args, *pointers, workspace.pointer, workspace.bytes)
    threads = [threading.Thread(target=work, args=(mine,)) for mine in arrays]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine in arrays:
        np.testing.assert_allclose(mine["out"], textbook(mine["q"], mine["k"], mine["v"], True)[0], atol=3e-6)


# ---- inputs and the judge --------------------------------------------------------------------------------------------

def test_inputs_are_judged():
    inputs = _core.Inputs(LINE + " lse")
    args = inputs.args
    plan = _core.Plan(inputs.problem)
    workspace = _core.Buffer(max(plan.workspace_bytes, 64))
    args.workspace, args.workspace_bytes = workspace.pointer, plan.workspace_bytes
    out = inputs.tensor("out")
    assert out.dtype == np.float32 and np.isnan(out).all()
    args.run(plan)
    inputs.check_guards()
    expected = textbook(*(inputs.tensor(name) for name in ("q", "k", "v")), causal=True)[0]
    np.testing.assert_allclose(out, expected, atol=3e-6)
    report = _core.attention_check(args)
    assert report["passed"] and {row["name"] for row in report["tensors"]} >= {"out", "lse"}

    out[1, 2, 3, 4] += 0.25
    report = _core.attention_check(args)
    (row,) = [row for row in report["tensors"] if row["name"] == "out"]
    assert not report["passed"] and not row["passed"] and row["reason"]
    assert row["max_error"] == pytest.approx(0.25, rel=1e-3) and row["worst"] == (1, 3, 2, 4)

    inputs.poison()
    assert np.isnan(out).all()


def test_inputs_outlive_their_name():
    """Arrays and arguments keep the memory that they look at."""
    q, args = (lambda inputs: (inputs.tensor("q"), inputs.args))(_core.Inputs(LINE))
    assert np.isfinite(q).all() and args.tensor("q")[0] == q.ctypes.data


def test_sixteen_bit_inputs_are_bits():
    assert _core.Inputs("attention b=1 hq=1 hkv=1 sq=4 sk=4 d=8 bf16").tensor("q").dtype == np.uint16
