#!/usr/bin/env python3
"""heed beside FlashAttention-2, cuDNN, the memory-efficient kernel and FlexAttention (all as torch has them) on one
GPU: one process, one run, samples taken in turn. docs/measuring.md has the protocol.

    PYTHONPATH=build/gpu python3 bench/peers_gpu.py --json out/gpu.json --plot out/gpu.png
    PYTHONPATH=build/gpu python3 bench/peers_gpu.py --grids fwd,decode --budget 300
    PYTHONPATH=build/gpu python3 bench/peers_gpu.py --only 'd128 causal' --regimes rested,hot
"""

import argparse
import datetime
import gc
import json
import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time

import gpu_cases
import gpu_report

PEERS = ("heed", "fa2", "cudnn", "efficient", "flex")
# Where nothing would be learnt, time is saved: the memory-efficient kernel is far behind on the large grids, and rows
# that the planner did not choose are timed where choices are close.
WITHOUT_EFFICIENT = ("fwd", "gqa", "without_lse")
WITH_FORCED_ROWS = ("fwd", "decode", "serving", "short", "gqa", "varlen", "dims", "dtypes", "models")
REGIMES = ("rested", "hot")
STARTUP_LINES = ("attention hq=16 sq=1024 d=128 bf16 causal lse device=cuda",
                 "attention hq=32 hkv=8 sq=1 sk=8192 d=128 bf16 lse device=cuda")


def some_of(allowed):
    def read(text):
        names = [name for name in text.split(",") if name]
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"\"{name}\" is none of {', '.join(allowed)}")
        if not names:
            raise argparse.ArgumentTypeError(f"none named; there are {', '.join(allowed)}")
        return names
    return read


def parse_options(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grids", type=some_of(gpu_cases.GRIDS), default=list(gpu_cases.GRIDS),
                        help=f"what to measure, in this order: {','.join(gpu_cases.GRIDS)}")
    parser.add_argument("--only", default="", metavar="REGEX", help="cells whose \"group label\" matches")
    parser.add_argument("--impls", type=some_of(PEERS), default=list(PEERS[:4]),
                        help=f"default {','.join(PEERS[:4])}; flex compiles for seconds a cell")
    parser.add_argument("--regimes", type=some_of(REGIMES), default=["rested"],
                        help="rested (claims are made on it), hot, or both")
    parser.add_argument("--samples", type=int, default=15, help="of each contender and regime (15)")
    parser.add_argument("--budget", type=float, default=540.0, metavar="SECONDS",
                        help="begin no cell after so long (540); cells left out are listed")
    parser.add_argument("--no-startup", dest="startup", action="store_false", help="leave out first calls of processes")
    parser.add_argument("--chosen-only", action="store_true", help="heed's planner's choice alone, no forced rows")
    parser.add_argument("--json", metavar="FILE", help="write the report, after each cell too")
    parser.add_argument("--plot", metavar="FILE", help="draw it with matplotlib, if that is installed")
    parser.add_argument("--list", action="store_true", help="print the cells and stop")
    options = parser.parse_args(arguments)
    if options.samples < 1 or options.budget <= 0:
        parser.error(f"--samples {options.samples}, --budget {options.budget:g}: must be positive")
    try:
        re.compile(options.only)
    except re.error as error:
        parser.error(f"--only \"{options.only}\": {error}")
    options.command = shlex.join(["python3", "bench/peers_gpu.py", *(sys.argv[1:] if arguments is None else arguments)])
    return options


def selected(options):
    return [case for case in gpu_cases.cases_of(options.grids)
            if re.search(options.only, f"{case.group} {case.label}")]


class Broken(Exception):
    """The GPU's context is gone."""


class Run:
    """One run over many cases; the report grows and is written after each."""

    def __init__(self, options, device, facts, implementations, missing):
        self.options, self.device, self.implementations = options, device, implementations
        self.l2_bytes = facts.pop("l2_bytes", 0)
        self.started = time.monotonic()
        self.report = {
            **facts, "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": options.command, "peers": {i.name: i.version for i in implementations if i.name != "heed"},
            "heed": next((i.version for i in implementations if i.name == "heed"), None), "missing": missing,
            "rows": [], "notes": {}, "wrong": [], "cut": [], "startup": [], "seconds": 0.0}

    def seconds(self):
        return time.monotonic() - self.started

    def note(self, reason, case):
        self.report["notes"].setdefault(reason, []).append(f"{case.group} {case.label}")

    def refused(self, name, error, case):
        """Notes why a contender does not take part; raises where the context, and every later figure, is lost."""
        if re.search(r"CUDA error: |CUDA_ERROR_(ILLEGAL|LAUNCH_FAILED|MISALIGNED|ASSERT|HARDWARE)", str(error)):
            raise Broken(f"{case.group} {case.label}: {name}: {str(error).splitlines()[0][:300]}") from error
        lines = str(error).splitlines() or [type(error).__name__]
        self.note(f"{name}: {lines[0][:300]}", case)

    def contenders(self, case, tensors):
        """Those whose result stands beside the reference in double precision."""
        import gpu_reference
        found = []
        for implementation in self.implementations:
            if implementation.name == "efficient" and case.group in WITHOUT_EFFICIENT:
                continue
            try:
                for contender in implementation.prepare(case, tensors):
                    gpu_reference.compare(case, tensors, contender, contender.run(0))
                    if contender.agrees:
                        found.append(contender)
                    else:
                        self.report["wrong"].append(
                            f"{case.group} {case.label}: {contender.name}, off by {contender.max_error:.1e} of the "
                            f"largest: {contender.problem}")
                    if self.options.chosen_only or case.group not in WITH_FORCED_ROWS:
                        break
            except Exception as error:  # compilers and libraries behind torch raise what they like
                self.refused(implementation.name, error, case)
        return found

    def measure(self, case):
        """Rows of one case."""
        import gpu_timing
        from gpu_contenders import Tensors
        sets = 1
        if case.cold and case.set_bytes < 3 * self.l2_bytes:
            sets = min(64, -(-3 * self.l2_bytes // case.set_bytes))
        tensors = Tensors(case, self.device, sets)
        graphs, host = [], {}
        for contender in self.contenders(case, tensors):
            try:
                graph = gpu_timing.Graph(contender, sets)
                if (contender.name.startswith("heed:") and graphs
                        and graph.rough_seconds > gpu_timing.SLOW * graphs[0].rough_seconds):
                    self.note(f"{contender.name}: over {gpu_timing.SLOW:g} times the planner's choice's time", case)
                    continue
                graph.capture()
                graphs.append(graph)
                host[contender.name] = self.host_times(graph)
            except Exception as error:
                self.refused(contender.name, error, case)
        rows = []
        for regime in self.options.regimes:
            for graph, seconds in zip(graphs, gpu_timing.race(graphs, self.options.samples, regime)):
                timing = gpu_timing.summary(seconds)
                rows.append(row_of(case, graph.contender, regime, timing, graph.calls, sets,
                                   host.get(graph.contender.name, {})))
        return rows

    def host_times(self, graph):
        """Of the calling thread, from Python and from C, of the planner's choice. It does not depend on the size, so it
        is taken where the device is soon done."""
        import gpu_timing
        contender = graph.contender
        if contender.name != "heed" or graph.rough_seconds > 2e-4:
            return {}
        timing = contender.host()
        return {"host_python_us": gpu_timing.python_host_us(contender), "host_run_us": timing["host_run_us"],
                "host_call_us": timing["host_call_us"]}

    def all(self, cases):
        for number, case in enumerate(cases):
            if self.seconds() > self.options.budget:
                self.report["cut"] += [f"{c.group} {c.label}" for c in cases[number:]]
                break
            try:
                rows = self.measure(case)
            except Broken as error:
                self.report["wrong"].append(str(error))
                self.report["cut"] += [f"{c.group} {c.label}" for c in cases[number:]]
                break
            self.report["rows"] += rows
            self.report["seconds"] = round(self.seconds(), 1)
            print(f"[{number + 1}/{len(cases)} {self.seconds():.0f} s] {case.group} {case.label}: " + "  ".join(
                f"{row['name']}{'' if row['regime'] == 'rested' else ' ' + row['regime']} {gpu_report.rate_text(row)}"
                f" ({row['median_us']:.1f} us)" for row in rows), flush=True)
            self.write()
            gc.collect()  # graphs and their memory go before the next case's come

    def startup(self):
        """First calls of fresh processes: an empty kernel cache, then the one that this left."""
        program = pathlib.Path(__file__).with_name("gpu_startup.py")
        for line in STARTUP_LINES:
            with tempfile.TemporaryDirectory() as folder:
                for cache in ("empty", "warm"):
                    done = subprocess.run([sys.executable, str(program), line], capture_output=True, text=True,
                                          env={**os.environ, "HEED_CACHE_DIR": folder})
                    if done.returncode:
                        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
                        self.report["notes"].setdefault(f"startup: {reason}", []).append(line)
                        break
                    self.report["startup"].append({"cache": cache, **json.loads(done.stdout)})
        self.write()

    def write(self):
        if self.options.json:
            write_json(self.report, self.options.json)


def row_of(case, contender, regime, timing, calls, sets, host):
    seconds = timing["median_us"] * 1e-6
    return {"group": case.group, "label": case.label, "name": contender.name, "impl": contender.impl, "regime": regime,
            **timing, "calls": calls, "sets": sets, "tflops": case.flops / seconds / 1e12,
            "tbs": case.kv_bytes / seconds / 1e12, "flops": case.flops, "kv_bytes": case.kv_bytes,
            "decode": case.is_decode, "plain": case.plain, "problem": contender.problem, "d": case.d,
            "seqlen": case.sk, "causal": case.causal, "dtype": case.dtype, "workspace_bytes": contender.workspace_bytes,
            "max_error": contender.max_error if contender.max_error == contender.max_error else None, **host}


def write_json(report, path):
    """Whole or not at all: a run that is killed leaves the cells before it."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path + ".part", "w") as file:
        json.dump(report, file, indent=1)
    os.replace(path + ".part", path)


def gpu_facts(torch, device):
    properties = torch.cuda.get_device_properties(device)
    try:
        driver = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], text=True,
                                capture_output=True, check=True, timeout=60).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        driver = "unknown"
    return {"gpu": properties.name, "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count, "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size, "driver": driver, "cuda": torch.version.cuda,
            "torch": torch.__version__, "python": platform.python_version(), "machine": properties.name}


def draw(report, path):
    try:
        from heed import plot
        plot.draw_bench(report, path)
    except (ImportError, SystemExit) as error:
        print(f"{path} is not drawn ({error}); later: python -m heed.plot REPORT.json -o {path}")
        return
    print(f"wrote {path}")


def main(arguments=None):
    options = parse_options(arguments)
    cases = selected(options)
    if options.list:
        print("\n".join(f"{case.group} {case.label}" for case in cases))
        return 0
    if not cases:
        print(f"no cell matches --only \"{options.only}\"", file=sys.stderr)
        return 2
    try:
        import torch
    except ImportError:
        print("peers_gpu.py needs a Python with PyTorch for CUDA", file=sys.stderr)
        return 1
    if not torch.cuda.is_available():
        print("there is no GPU that PyTorch can use here", file=sys.stderr)
        return 1
    from gpu_contenders import available
    device = torch.device("cuda", torch.cuda.current_device())
    implementations, missing = available(options.impls, device)
    if "heed" in missing:
        print(missing["heed"], file=sys.stderr)
        return 1
    run = Run(options, device, gpu_facts(torch, device), implementations, missing)
    facts = run.report
    print(f"{facts['gpu']}, driver {facts['driver']}, torch {facts['torch']}; " +
          ", ".join(f"{i.name}: {i.version}" for i in implementations), flush=True)
    with torch.inference_mode():
        run.all(cases)
    if options.startup:
        run.startup()
    run.report["gates"] = gpu_report.gates(run.report)
    run.report["seconds"] = round(run.seconds(), 1)
    run.write()
    for reason, cells in run.report["notes"].items():
        print(f"not measured, {reason}: {len(cells)} cells, the first: {cells[0]}")
    print("\n" + gpu_report.text(run.report))
    if options.json:
        print(f"wrote {options.json}, {run.report['seconds']:.0f} s")
    if options.plot:
        draw(run.report, options.plot)
    return 1 if run.report["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
