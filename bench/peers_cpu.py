#!/usr/bin/env python3
"""heed beside PyTorch, ONNX Runtime and oneDNN on this CPU: one process, one run, samples taken in turn.

    PYTHONPATH=build/python python bench/peers_cpu.py --quick
    PYTHONPATH=build/python python bench/peers_cpu.py --json out/peers.json --plot out/peers.png --gates

Every group of cells (say, all that compute f32 attention at S 1024) is measured round by round: each round takes one
sample of the machine's peak and one of every contender, so that whatever the machine does in between hits all alike.
Results are compared before they are timed. bench/README.md explains the fields of the JSON file.
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import re
import resource
import shlex
import statistics
import sys
import time

import torch

import gates
from contenders import Case, Tensors, available
from native import Probe, Unavailable

LONG_SECONDS = 0.05       # calls longer than this need no call ahead of them to be warm
SAMPLE_SECONDS = 0.002    # shorter calls are repeated until a sample takes about so long
DISTURBED = 0.05          # share of the machine that others may take before a group is measured again
TOLERANCE = {"f32": 2e-4, "bf16": 4e-2, "f16": 1e-2}  # of the largest value; says "same work", not "same rounding"


@dataclasses.dataclass
class Group:
    name: str
    entries: list             # (Case, threads, names of implementations)
    ceiling: str              # "fma" or "read"


def build_groups(options):
    """What is measured, in the order of the report."""
    lengths = [512, 1024] if options.quick else [512, 1024, 2048, 4096]
    cells = []

    def prefill(kind, dtype, s, d, causal):
        return Case(kind, 8, 8, s, s, d, dtype, causal)

    everyone = ("heed", "torch", "onnxruntime", "onednn")
    for threads in options.threads:
        for d in (64, 128):
            for s in lengths:
                entries = [(prefill("fwd", "f32", s, d, causal), threads, everyone) for causal in (False, True)]
                cells.append(Group(f"forward f32 s={s} d={d} threads={threads}", entries, "fma"))
            for s in [1024] if options.quick else [1024, 4096]:
                entries = [(prefill("fwd", "f32", s, d, False), threads, ("heed",))]
                entries += [(prefill("fwd", dtype, s, d, False), threads, everyone) for dtype in ("bf16", "f16")]
                entries += [(prefill("fwd", "bf16", s, d, True), threads, everyone)]
                cells.append(Group(f"forward 16-bit s={s} d={d} threads={threads}", entries, "fma"))
            for s in lengths[:3]:
                entries = [(prefill("bwd", "f32", s, d, causal), threads, everyone) for causal in (False, True)]
                cells.append(Group(f"backward f32 s={s} d={d} threads={threads}", entries, "fma"))
        for hq, hkv in ((8, 8), (32, 8)):
            for keys in [4096] if options.quick else [4096, 16384]:
                for dtype in ("f32", "bf16"):
                    case = Case("decode", hq, hkv, 1, keys, 128, dtype)
                    cells.append(Group(f"decode {dtype} heads={hq}/{hkv} keys={keys} threads={threads}",
                                       [(case, threads, everyone)], "read"))
    if len(options.threads) > 1:
        case = Case("decode", 1, 1, 1, 16384, 128)
        cells.append(Group("scaling f32 heads=1/1 keys=16384", [(case, n, ("heed",)) for n in options.threads], "read"))
    return [group for group in cells if re.search(options.only, group.name)]


class OtherLoad:
    """The share of the machine's CPU time that went to others since this object was made."""

    def __init__(self):
        self.begin = self._read()

    @staticmethod
    def _read():
        try:
            with open("/proc/stat") as stat:
                fields = [int(field) for field in stat.readline().split()[1:9]]
        except OSError:
            return None
        ticks = os.sysconf("SC_CLK_TCK")
        user, nice, system, _, _, irq, softirq, steal = fields
        return time.monotonic(), (user + nice + system + irq + softirq + steal) / ticks, time.process_time()

    def share(self):
        end = self._read()
        if end is None or self.begin is None:
            return float("nan")
        wall, busy, own = (b - a for a, b in zip(self.begin, end))
        return max(0.0, (busy - own) / (wall * os.cpu_count()))


def quantile(samples, q):
    ordered = sorted(samples)
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def prepare(group, implementations, notes):
    """Contenders that agree with each other, and how far each is from the first (heed, where it takes part)."""
    contenders, tensors = [], {}
    for case, threads, names in group.entries:
        key = dataclasses.replace(case, causal=False)
        if key not in tensors:
            tensors[key] = Tensors(case)
        torch.set_num_threads(threads)
        reference = None
        for implementation in implementations:
            if implementation.name not in names:
                continue
            try:
                contender = implementation.prepare(case, tensors[key], threads)
                contender.run()
                results = [result.clone() for result in contender.results()]
            except Unavailable as reason:
                notes.setdefault(f"{implementation.name}: {reason}", []).append(case.line)
                continue
            except RuntimeError as error:  # heed.Error is one
                notes.setdefault(f"{implementation.name}: {error}", []).append(case.line)
                continue
            reference = reference or results
            contender.max_diff = max(float((a - b).abs().max()) for a, b in zip(results, reference))
            largest = max(float(a.abs().max()) for a in reference)
            contender.agrees = contender.max_diff <= TOLERANCE[case.dtype] * largest
            contenders.append(contender)
    return contenders, tensors


def undisturbed(take, settle):
    """(take(), preempted): taken again, twice at most, if someone else was given one of our cores meanwhile."""
    for _ in range(3):
        time.sleep(settle)  # the workers of whoever ran before stop spinning
        before = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
        value = take()
        if resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw == before:
            return value, False
    return value, True


def sample_of(contender, estimate):
    """A function that takes one sample: seconds per call."""
    calls = max(1, min(1000, round(SAMPLE_SECONDS / estimate)))

    def take():
        if estimate < LONG_SECONDS:
            contender.run()
        begin = time.perf_counter()
        for _ in range(calls):
            contender.run()
        return (time.perf_counter() - begin) / calls
    return take


def ceiling_of(group, probe, threads, tensors):
    """A function that takes one sample: GFLOP/s of multiply-adds, or GB/s of reading the same keys and values."""
    if group.ceiling == "fma":
        return lambda: probe.gflops(threads)
    (values,) = tensors.values()
    ranges = [(t.data_ptr(), t.nbytes) for t in (values.k, values.v)]

    def read():
        probe.read_seconds(threads, ranges)
        return sum(size for _, size in ranges) / probe.read_seconds(threads, ranges) / 1e9
    return read


def measure(group, contenders, tensors, probe, samples):
    """Samples of every contender and of the ceiling per thread count, taken in turn, and the others' load meanwhile: a
    sample is (seconds, preempted)."""
    threads = sorted({contender.threads for contender in contenders})
    settle = 0.006 if max(threads) > 1 else 0.001
    estimates = []
    for contender in contenders:
        torch.set_num_threads(contender.threads)
        begin = time.perf_counter()
        contender.run()
        estimates.append(max(time.perf_counter() - begin, 1e-7))
    seconds = [[] for _ in contenders]
    ceilings = {n: [] for n in threads}
    take_ceiling = {n: ceiling_of(group, probe, n, tensors) for n in threads}
    take = [sample_of(*pair) for pair in zip(contenders, estimates)]
    load = OtherLoad()
    for _ in range(samples):
        for n in threads:
            ceilings[n].append(undisturbed(take_ceiling[n], settle)[0])
        for i, contender in enumerate(contenders):
            torch.set_num_threads(contender.threads)
            seconds[i].append(undisturbed(take[i], settle))
    return seconds, {n: statistics.median(values) for n, values in ceilings.items()}, load.share()


def rows_of(group, contenders, seconds, ceilings, load):
    rows = []
    for contender, taken in zip(contenders, seconds):
        samples = [sample for sample, _ in taken]
        case, median = contender.case, statistics.median(samples)
        rows.append({
            "problem": case.line, "peer": contender.peer, "impl": contender.impl or contender.peer,
            "threads": contender.threads,
            "median_us": median * 1e6, "p10_us": quantile(samples, 0.1) * 1e6, "p90_us": quantile(samples, 0.9) * 1e6,
            "gflops": case.flops / median / 1e9, "gbs": case.bytes / median / 1e9,
            "samples": len(samples),
            "preempted": sum(preempted for _, preempted in taken) / len(taken), "other_load": round(load, 4),
            "group": group.name,
            "ceiling": ceilings[contender.threads], "ceiling_kind": group.ceiling,
            "max_diff": contender.max_diff, "agrees": contender.agrees, "case": dataclasses.asdict(case),
        })
    return rows


def print_group(group, rows, repeats):
    ceiling = {row["threads"]: row["ceiling"] for row in rows}
    unit = "GFLOP/s FMA peak" if group.ceiling == "fma" else "GB/s read probe, same bytes"
    print(f"\n{group.name}: " + ", ".join(f"{value:.1f} {unit} ({n} thr)" for n, value in ceiling.items()) +
          f", others {100 * rows[0]['other_load']:.0f} %" + (f" after {repeats} repeats" if repeats else ""))
    width = max(len(row["problem"]) for row in rows)
    print(f"  {'problem':<{width}} thr {'who':<12}{'median us':>11}{'p10':>11}{'p90':>11}{'GFLOP/s':>9}{'GB/s':>8}"
          f"{'ceiling':>9}{'heed is':>9}{'max diff':>10}")
    heed = {(row["problem"], row["threads"]): row["median_us"] for row in rows if row["peer"] == "heed"}
    for row in rows:
        rate = row["gflops"] if group.ceiling == "fma" else row["gbs"]
        own = heed.get((row["problem"], row["threads"]))
        ratio = f"{row['median_us'] / own:.2f}x" if own and row["peer"] != "heed" else ""
        print(f"  {row['problem']:<{width}} {row['threads']:>3} {row['peer']:<12}{row['median_us']:>11.1f}"
              f"{row['p10_us']:>11.1f}{row['p90_us']:>11.1f}{row['gflops']:>9.1f}{row['gbs']:>8.1f}"
              f"{rate / row['ceiling']:>8.0%} {ratio:>9}{row['max_diff']:>10.1e}{'' if row['agrees'] else '  DIFFERS'}")
    sys.stdout.flush()


def cpu_name():
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="bench/README.md has more.")
    parser.add_argument("--quick", action="store_true", help="S 512 and 1024, decode over 4096 keys, 5 samples")
    parser.add_argument("--only", default="", metavar="REGEX", help="groups whose name matches, e.g. 'decode bf16'")
    parser.add_argument("--impls", default="heed,torch,onnxruntime,onednn", metavar="A,B", help="who takes part")
    parser.add_argument("--threads", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2], metavar="N,M")
    parser.add_argument("--samples", type=int, metavar="N", help="per contender; default 15, with --quick 5")
    parser.add_argument("--repeats", type=int, default=1, metavar="N",
                        help="measure a group again, up to N times, while others use more than 5%% of the machine")
    parser.add_argument("--json", metavar="FILE", help="write all figures")
    parser.add_argument("--plot", metavar="FILE.png", help="draw them")
    parser.add_argument("--gates", action="store_true", help="print what is required beside what was measured")
    parser.add_argument("--list", action="store_true", help="print the groups and stop")
    options = parser.parse_args()
    options.samples = options.samples or (5 if options.quick else 15)
    return options


def measured_group(group, implementations, probe, options, notes):
    """Rows of the least disturbed of the repeats."""
    contenders, tensors = prepare(group, implementations, notes)
    if not contenders:
        return [], 0
    best = None
    for repeat in range(options.repeats + 1):
        seconds, ceilings, load = measure(group, contenders, tensors, probe, options.samples)
        if best is None or load < best[2]:
            best = seconds, ceilings, load
        if not load > DISTURBED:
            break
    return rows_of(group, contenders, *best), repeat


def report_of(options, implementations, missing, probe, rows, notes):
    peak = {str(n): statistics.median([probe.gflops(n) for _ in range(5)]) for n in options.threads}
    read = {n: [row["ceiling"] for row in rows if row["ceiling_kind"] == "read" and row["threads"] == n]
            for n in options.threads}
    peak_bf16 = {str(n): statistics.median([probe.bf16_gflops(n) for _ in range(5)]) for n in options.threads}
    return {
        "heed": next((i.version for i in implementations if i.name == "heed"), None),
        "machine": f"{cpu_name()}, {os.cpu_count()} CPUs, {platform.system()} {platform.machine()}",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "bench/peers_cpu.py", *sys.argv[1:]]),
        "peers": {i.name: i.version for i in implementations if i.name != "heed"},
        "missing": missing,
        "peak_gflops": peak,
        "peak_bf16_gflops": peak_bf16,
        "read_gbs": {str(n): statistics.median(values) for n, values in read.items() if values},
        "notes": notes,
        "rows": rows,
    }


def draw(report, path):
    try:
        from heed import plot
    except ImportError as error:
        print(f"{path} is not drawn: {error}")
        return
    plot.draw_bench(report, path)
    print(f"wrote {path}")


def main():
    options = parse_options()
    groups = build_groups(options)
    if options.list:
        print("\n".join(group.name for group in groups))
        return 0
    probe = Probe()
    implementations, missing = available(options.impls.split(","))
    if "heed" in missing:
        print(missing["heed"], file=sys.stderr)
        return 1
    print(f"{cpu_name()}, {os.cpu_count()} CPUs; " + ", ".join(f"{i.name} {i.version}" for i in implementations))
    for name, reason in missing.items():
        print(f"without {name}: {reason}")
    rows, notes = [], {}
    for number, group in enumerate(groups):
        if sys.stderr.isatty():
            print(f"[{number + 1}/{len(groups)}] {group.name}", end="\r", file=sys.stderr)
        found, repeats = measured_group(group, implementations, probe, options, notes)
        if found:
            print_group(group, found, repeats)
        rows += found
    for note, lines in notes.items():
        print(f"\nnot measured, {note}\n    {len(lines)} cells, the first: {lines[0]}")
    report = report_of(options, implementations, missing, probe, rows, notes)
    if options.gates:
        heed = next((i for i in implementations if i.name == "heed"), None)
        report["call_us"] = gates.call_overhead(heed, probe) if heed else {}
        report["gates"] = gates.evaluate(report)
        gates.show(report["gates"])
    if options.json:
        os.makedirs(os.path.dirname(options.json) or ".", exist_ok=True)
        with open(options.json, "w") as file:
            json.dump(report, file, indent=1)
        print(f"\nwrote {options.json}")
    if options.plot:
        draw(report, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
