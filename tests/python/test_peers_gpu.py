"""bench/peers_gpu.py as far as it goes without a GPU: its cases on the CPU backend, its reference, options, report."""

import json
import pathlib
import sys

import pytest

BENCH = pathlib.Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))
import gpu_cases  # noqa: E402
import gpu_report  # noqa: E402
import peers_gpu  # noqa: E402


# ---- cases -----------------------------------------------------------------------------------------------------------

def test_forward_grid_is_the_one_that_is_claimed_on():
    cases = list(gpu_cases.forward())
    assert len(cases) == 36
    assert {(case.b * case.sq, case.hq * case.d) for case in cases} == {(16384, 2048)}
    assert {(case.d, case.causal, case.sq) for case in cases} == {
        (d, causal, 512 << i) for d in (64, 128, 256) for causal in (False, True) for i in range(6)}


def test_work_is_counted_as_the_field_does():
    full, causal = (gpu_cases.Case("g", "l", 2, 4, 4, 8, 8, 16, causal=c) for c in (False, True))
    assert full.flops == 4 * 2 * 4 * 8 * 8 * 16 and causal.flops == full.flops / 2
    window = gpu_cases.Case("g", "l", 1, 1, 1, 4, 4, 1, causal=True, window=1)
    assert window.pairs == 1 + 2 + 2 + 2
    packed = gpu_cases.Case("g", "l", 2, 1, 1, 5, 5, 1, lengths=(3, 5))
    assert packed.pairs == 9 + 25 and packed.kv_bytes == 8 * 2 * 2
    used = gpu_cases.Case("g", "l", 2, 4, 2, 1, 8, 16, used=(3, 5))
    assert used.pairs == 8 and used.kv_bytes == 8 * 2 * 32 * 2
    assert gpu_cases.Case("g", "l", 1, 32, 8, 1, 131072, 128).kv_bytes == 2 * 131072 * 8 * 128 * 2


def test_labels_name_one_cell_each():
    cases = gpu_cases.cases_of(list(gpu_cases.GRIDS))
    places = [(case.group, case.label) for case in cases]
    assert len(set(places)) == len(places)
    assert all((case.group, case.plain) in places for case in cases if case.plain)


# ---- options ---------------------------------------------------------------------------------------------------------

def test_options():
    options = peers_gpu.parse_options(["--grids", "decode,fwd", "--only", "d128 causal|B1 ", "--budget", "60"])
    labels = [f"{case.group} {case.label}" for case in peers_gpu.selected(options)]
    assert labels[0].startswith("fwd d128 causal") and labels[-1] == "decode B1 131k 32/8" and len(labels) == 7
    assert options.command.startswith("python3 bench/peers_gpu.py --grids decode,fwd")


@pytest.mark.parametrize("arguments, named", [
    (["--grids", "fwd,backwards"], "backwards"), (["--impls", "fa3"], "fa3"), (["--regimes", "warm"], "warm"),
    (["--samples", "0"], "positive"), (["--budget", "-1"], "positive"), (["--only", "("], "--only"),
    (["--grids", ""], "none named")])
def test_wrong_options_are_named(arguments, named, capsys):
    with pytest.raises(SystemExit) as stopped:
        peers_gpu.parse_options(arguments)
    assert stopped.value.code == 2 and named in capsys.readouterr().err


def test_nothing_selected(capsys):
    assert peers_gpu.main(["--only", "no such cell"]) == 2
    assert "no such cell" in capsys.readouterr().err


# ---- report ----------------------------------------------------------------------------------------------------------

def rows_for(case, times_us, regime="rested"):
    rows = []
    for name, us in times_us.items():
        rows.append({"group": case.group, "label": case.label, "name": name, "impl": name.removeprefix("heed:"),
                     "regime": regime, "median_us": us, "p10_us": 0.98 * us, "p90_us": 1.03 * us, "samples": 15,
                     "tflops": case.flops / us / 1e6, "tbs": case.kv_bytes / us / 1e6, "flops": case.flops,
                     "decode": case.is_decode, "plain": case.plain, "problem": "attention", "d": case.d,
                     "seqlen": case.sk, "causal": case.causal, "dtype": case.dtype,
                     "host_call_us": 2.5 if name == "heed" else None})
        if name == "heed":
            rows[-1]["impl"] = "cuda/chosen"
    return rows


def report_of(rows):
    return {"gpu": "a GPU", "machine": "a GPU", "driver": "580.1", "date": "2026-01-01", "command": "peers_gpu.py",
            "heed": "0.1.0", "peers": {"fa2": "torch 2", "cudnn": "cuDNN 9"}, "missing": {}, "rows": rows, "notes": {},
            "wrong": [], "cut": [], "seconds": 1.0}


def full_report():
    rows = []
    for case in gpu_cases.forward():
        rows += rows_for(case, {"heed": 100.0, "heed:cuda/other": 90.0 if case.label == "d64 full 512" else 120.0,
                                "fa2": 80.0 if case.label == "d256 causal 512" else 125.0, "cudnn": 60.0})
        rows += rows_for(case, {"heed": 110.0, "fa2": 150.0}, "hot")
    for case in gpu_cases.decode():
        rows += rows_for(case, {"heed": 100.0, "cudnn": 101.0, "fa2": 110.0})
    for case in gpu_cases.paged():
        rows += rows_for(case, {"heed": {0: 100.0, 256: 101.0, 16: 104.0, 1: 140.0}[case.page]})
    for case in gpu_cases.features():
        rows += rows_for(case, {"heed": 1000.0 if not case.window else 1000.0 * 1.2 * case.window / 8192})
    return report_of(rows)


def test_gates_say_what_falls_short():
    gates = {gate["gate"]: gate for gate in gpu_report.gates(full_report())}
    mean = gates["forward of FlashAttention-2, geometric mean: aim"]
    assert mean["measured"] == pytest.approx((1.25 ** 35 * 0.8) ** (1 / 36)) and mean["passed"]
    least = gates["forward of FlashAttention-2, least cell"]
    assert least["measured"] == pytest.approx(0.8) and least["note"] == "d256 causal 512" and least["passed"]
    assert gates["decode of cuDNN, geometric mean"]["measured"] == pytest.approx(1.01)
    assert gates["page 16, time of unpaged, worst cell"]["passed"]
    page = gates["page 1, time of unpaged, worst cell"]
    assert page["measured"] == pytest.approx(1.4) and not page["passed"]
    assert gates["window, time over its share of the plain call's work, worst"]["passed"]
    assert gates["host time of a call with its plan cached, from C, median of cells"]["measured"] == 2.5


def test_gates_of_hopper():
    rows = []
    for case in gpu_cases.forward():
        rows += rows_for(case, {"heed": 100.0, "cudnn": 140.0})
    for case in gpu_cases.short():
        rows += rows_for(case, {"heed": 9.0})
    for case in gpu_cases.features():
        rows += rows_for(case, {"heed": case.flops / (0.9e9 if "GQA" in case.label else 1e9)})
    report = report_of(rows)
    over = {label: ratio for label, _, ratio in gpu_report.Rows(rows).over_best()}
    assert over["d64 full 512"] == pytest.approx(1.4)  # cuDNN is ahead of FlashAttention-3 there
    assert over["d64 full 16384"] == pytest.approx(1.4 * 466 / 583)
    gates = {gate["gate"]: gate for gate in gpu_report.gates(report)}
    assert gates["forward of cuDNN, d64, geometric mean"]["measured"] == pytest.approx(1.4)
    name = "forward of the better of cuDNN and FlashAttention-3"
    least = gates[f"{name}, least cell"]
    assert least["measured"] == pytest.approx(min(over.values())) and least["note"] == "d64 full 16384"
    assert 1.15 < gates[f"{name}, geometric mean"]["measured"] < 1.4
    assert gates["short, B1 H16 S1024 causal"]["passed"] and not gates["short, B1 H16 S128"]["passed"]
    work = "time over its share of the plain call's work"
    assert gates[f"packed, mean 2k, {work}"]["passed"] and gates[f"window 1024 at 16k, {work}"]["passed"]
    assert gates[f"GQA 32/8, {work}"]["measured"] == pytest.approx(1 / 0.9)
    assert "the better of cuDNN and FlashAttention-3" in gpu_report.text(report)


def test_gates_of_first_calls():
    report = report_of([])
    report["startup"] = [{"cache": cache, "problem": "p", "first_call_ms": ms, "second_call_ms": 0.1, "import_ms": 1.0,
                          "context_ms": 2.0} for cache, ms in (("empty", 900.0), ("empty", 1600.0), ("warm", 20.0))]
    assert [(gate["measured"], gate["passed"]) for gate in gpu_report.gates(report)] == [(1600.0, False), (20.0, True)]
    assert "first call, empty kernel cache: 900 ms" in gpu_report.text(report)


def test_gates_of_a_slow_run():
    rows = []
    for case in gpu_cases.forward():
        rows += rows_for(case, {"heed": 100.0, "fa2": 70.0})
    for case in gpu_cases.decode():
        rows += rows_for(case, {"heed": 100.0, "cudnn": 90.0})
    assert not any(gate["passed"] for gate in gpu_report.gates(report_of(rows)) if "host" not in gate["gate"])


def test_text_ends_with_what_matters():
    report = full_report()
    report["gates"] = gpu_report.gates(report)
    report["wrong"].append("fwd d64 full 512: heed:cuda/other, off by 1e+00")
    text = gpu_report.text(report)
    assert "planner's choice not the fastest row in 1 of 36 cells with other rows" in text and "cuda/other is 1.11x as fast" in text
    assert "fa2 1.235x (0.80x d256 causal 512)" in text and "fa2 hot 1.364x" in text
    assert "cudnn 0.600x" in text and "WRONG, not timed: fwd d64 full 512" in text
    assert "FALLS SHORT page 1, time of unpaged, worst cell: 1.400 <= 1.30" in text


def test_report_of_nothing():
    assert gpu_report.gates(report_of([])) == []
    assert "0 of 0 cells" in gpu_report.text(report_of([]))


def test_json_is_whole_or_not_there(tmp_path):
    file = tmp_path / "new" / "gpu.json"
    peers_gpu.write_json(full_report(), str(file))
    assert len(json.loads(file.read_text())["rows"]) > 150
    with pytest.raises(TypeError):
        peers_gpu.write_json({"rows": object()}, str(file))
    assert len(json.loads(file.read_text())["rows"]) > 150


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("heed", reason="needs PYTHONPATH=<build>/python")
    from heed import plot
    source, picture = tmp_path / "gpu.json", tmp_path / "gpu.png"
    source.write_text(json.dumps(full_report()))
    assert [title for title, *_ in plot._gpu_panels(full_report()["rows"])][:2] == ["forward, d64, full",
                                                                                   "forward, d64, causal"]
    assert plot.main([str(source), "-o", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20000


# ---- computing: every case, shrunk, on the CPU backend ---------------------------------------------------------------

def computed(case, sets=2):
    torch = pytest.importorskip("torch")
    pytest.importorskip("heed", reason="needs PYTHONPATH=<build>/python")
    import gpu_contenders
    import gpu_reference
    case = gpu_cases.shrunk(case)
    tensors = gpu_contenders.Tensors(case, torch.device("cpu"), sets)
    contenders = list(gpu_contenders.Heed(torch.device("cpu")).prepare(case, tensors))
    for contender in contenders:
        contender.run(sets - 1)
        gpu_reference.compare(case, tensors, contender, contender.run(0))
    return case, tensors, contenders


@pytest.mark.parametrize("grid", list(gpu_cases.GRIDS))
def test_heed_stands_beside_the_reference(grid):
    for case in list(gpu_cases.GRIDS[grid]())[:12]:
        shrunk, _, contenders = computed(case)
        assert contenders[0].name == "heed"
        for contender in contenders:
            assert contender.agrees, (case.label, contender.name, contender.max_error, contender.problem)
        for feature, flag in ((case.page, "page="), (case.used or case.page, "used_k"), (case.bias, "bias="),
                              (case.mask, "mask="),
                              (case.softcap, "softcap"), (case.alibi, "alibi"),
                              (case.sinks, "sinks"), (case.dropout, "dropout"),
                              (case.window, "window="), (case.lengths, "layout_q=thd"), (case.causal, "causal"),
                              (case.batch_invariant, "batch_invariant"), (case.lse, "lse")):
            named = flag in contenders[0].problem or (flag == "causal" and "window=" in contenders[0].problem)
            assert named == bool(feature) or (flag == "causal" and case.sq == 1), (flag, contenders[0].problem)


def test_a_wrong_result_is_seen():
    pytest.importorskip("torch")
    import gpu_reference
    case, tensors, (contender, *_) = computed(next(gpu_cases.forward()))
    out, lse = contender.run(0)
    gpu_reference.compare(case, tensors, contender, (out, lse))
    assert contender.agrees
    wrong = out.clone()
    wrong[0, 0, 0, 0] += 0.1
    gpu_reference.compare(case, tensors, contender, (wrong, lse))
    assert not contender.agrees and contender.max_error > 0.02
    gpu_reference.compare(case, tensors, contender, (out, lse + 0.01))
    assert not contender.agrees
    gpu_reference.compare(case, tensors, contender, (out * float("nan"), lse))
    assert not contender.agrees and contender.max_error == float("inf")


def test_peers_say_what_they_do_not_do():
    torch = pytest.importorskip("torch")
    import gpu_contenders
    case = gpu_cases.shrunk(next(case for case in gpu_cases.features() if case.softcap))
    tensors = gpu_contenders.Tensors(case, torch.device("cpu"))
    for kind in (gpu_contenders.Flash2, gpu_contenders.CuDnn, gpu_contenders.MemoryEfficient):
        with pytest.raises(gpu_contenders.Unavailable, match="softcap"):
            next(kind(torch.device("cpu")).prepare(case, tensors))


def test_calls_of_a_sample():
    pytest.importorskip("torch")
    import gpu_timing
    assert [gpu_timing.calls_of(seconds, 1) for seconds in (1e-3, 1.0, 1e-6)] == [5, 1, 200]
    assert gpu_timing.calls_of(1e-3, 3) == 6 and gpu_timing.calls_of(1.0, 7) == 7
    assert gpu_timing.summary([3e-6, 1e-6, 2e-6])["median_us"] == pytest.approx(2.0)


# ---- a whole run, with a clock in place of graphs --------------------------------------------------------------------

class ClockedGraph:
    """gpu_timing.Graph's shape over the CPU."""
    rough_seconds = 1e-3

    def __init__(self, contender, sets):
        self.contender, self.calls = contender, sets
        contender.run(sets - 1)

    def capture(self):
        self.contender.run(0)

    def sample(self):
        self.contender.run(0)
        return 1e-3


@pytest.fixture
def run(monkeypatch, tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("heed", reason="needs PYTHONPATH=<build>/python")
    import gpu_contenders
    import gpu_timing
    monkeypatch.setattr(gpu_timing, "Graph", ClockedGraph)
    monkeypatch.setattr(gpu_timing, "REST_SECONDS", 0.0)
    monkeypatch.setattr(gpu_timing, "RUN_IN_SECONDS", 0.0)
    options = peers_gpu.parse_options(["--samples", "3", "--regimes", "rested,hot", "--impls",
                                       "heed,fa2,cudnn,efficient", "--json", str(tmp_path / "gpu.json")])
    implementations, missing = gpu_contenders.available(options.impls, torch.device("cpu"))
    return peers_gpu.Run(options, torch.device("cpu"), {"gpu": "none", "l2_bytes": 100_000}, implementations, missing)


def test_run_writes_after_each_cell(run):
    run.implementations[0].dearest = 1000
    run.all([gpu_cases.shrunk(case) for case in [*gpu_cases.decode()][:2]])
    report = json.loads(pathlib.Path(run.options.json).read_text())
    chosen = [row for row in report["rows"] if row["name"] == "heed"]
    assert [(row["label"], row["regime"], row["samples"]) for row in chosen] == [
        (case.label, regime, 3) for case in [*gpu_cases.decode()][:2] for regime in ("rested", "hot")]
    assert all(row["sets"] > 1 and row["max_error"] < 0.02 for row in chosen)
    assert all(row["median_us"] == pytest.approx(1000) for row in chosen)
    assert any(row["name"].startswith("heed:cpu/") for row in report["rows"])
    assert any(note.startswith(("fa2: ", "cudnn: ")) for note in report["notes"])  # no CPU kernel of theirs
    assert report["wrong"] == [] and report["cut"] == []
    report["gates"] = gpu_report.gates(report)
    assert "decode" in gpu_report.text(report)


def test_first_calls_are_noted_where_there_is_no_gpu(run):
    run.startup()
    if run.report["startup"]:
        assert [row["cache"] for row in run.report["startup"]] == ["empty", "warm"] * 2
    else:
        assert any(note.startswith("startup: ") and "CUDA" in note for note in run.report["notes"])


def test_run_stops_at_its_budget(run):
    run.options.budget = 1e-9
    run.all([*gpu_cases.decode()])
    assert run.report["rows"] == [] and run.report["cut"] == [f"decode {label}" for label, *_ in gpu_cases.DECODE]


def test_run_does_not_time_what_is_wrong(run, monkeypatch):
    import gpu_reference
    monkeypatch.setattr(gpu_reference, "TOLERANCE", {"bf16": 1e-9})
    run.all([gpu_cases.shrunk(next(gpu_cases.forward()))])
    assert run.report["rows"] == [] and run.report["wrong"][0].startswith("fwd d128 full 512: heed")
    assert "attention " in run.report["wrong"][0]


def test_run_ends_when_the_context_is_gone(run, monkeypatch):
    def lost(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(run.implementations[0], "prepare", lost)
    run.all([gpu_cases.shrunk(case) for case in gpu_cases.decode()])
    assert "illegal memory access" in run.report["wrong"][0] and len(run.report["cut"]) == 5
