"""What the CPU backend must show, beside what a run measured: ratios within one run, whatever the machine."""

import ctypes
import math
import pathlib
import statistics


def _vendor():
    """("intel"|"amd"|"other", family): which of the targets applies."""
    vendor, family = "other", 0
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("vendor_id"):
                vendor = {"GenuineIntel": "intel", "AuthenticAMD": "amd"}.get(line.split(":")[1].strip(), "other")
            elif line.startswith("cpu family"):
                family = int(line.split(":")[1])
    except OSError:
        pass
    return vendor, family


class Rows:
    """The rows of a report, found by what they measured."""

    def __init__(self, rows):
        self.rows = rows

    def find(self, peer, threads, group=None, **case):
        for row in self.rows:
            if (row["peer"] == peer and row["threads"] == threads and row["group"].startswith(group or "")
                    and all(row["case"][key] == value for key, value in case.items())):
                return row
        return None

    def best_peer(self, threads, group, **case):
        """The quickest peer that computes the same thing."""
        found = [row for row in self.rows if row["peer"] != "heed" and row["agrees"] and row["threads"] == threads
                 and row["group"].startswith(group) and all(row["case"][k] == v for k, v in case.items())]
        return min(found, key=lambda row: row["median_us"], default=None)


def _gate(name, measured, required, unit="x", below=False, note=""):
    passed = measured <= required if below else measured >= required
    return {"gate": name, "measured": measured, "required": required, "unit": unit, "below": below,
            "passed": bool(passed), "note": note}


def _forward(rows, threads, gates):
    vendor, family = _vendor()
    zen5 = vendor == "amd" and family >= 26
    for d, intel in ((64, 0.80), (128, 0.82)):
        for s in (512, 1024, 2048, 4096):
            cell = dict(group="forward f32", kind="fwd", dtype="f32", sq=s, d=d)
            full, causal = (rows.find("heed", threads, causal=c, **cell) for c in (False, True))
            where = f"s={s} d={d} {threads} thr"
            if full and s >= 1024:
                share = full["gflops"] / full["ceiling"]
                note = "" if zen5 or vendor == "intel" else "stated for Intel"
                required = 0.70 if zen5 else intel
                gates.append(_gate(f"forward f32 full, of FMA peak, {where}", share, required, note=note))
            if full and causal and s == 1024:
                gates.append(_gate(f"forward f32 causal, of own full, {where}", causal["gflops"] / full["gflops"], 0.9))
            for row, required in ((full, 1.2), (causal, 1.5)):
                if row is None:
                    continue
                kind = "causal" if row["case"]["causal"] else "full"
                peer = rows.best_peer(threads, causal=row["case"]["causal"], **cell)
                if peer:
                    ceiling = f"the peer is at {peer['gflops'] / peer['ceiling']:.0%} of peak"
                    gates.append(_gate(f"forward f32 {kind}, of best peer ({peer['peer']}), {where}",
                                       peer["median_us"] / row["median_us"], required, note=ceiling))


def _sixteen_bit(rows, threads, gates, bf16_pays):
    for d in (64, 128):
        for s in (1024, 4096):
            cell = dict(group="forward 16-bit", kind="fwd", sq=s, d=d)
            where = f"s={s} d={d} {threads} thr"
            own = rows.find("heed", threads, dtype="f32", causal=False, **cell)
            for dtype in ("bf16", "f16"):
                row = rows.find("heed", threads, dtype=dtype, causal=False, **cell)
                if own and row:
                    pays = dtype == "bf16" and (bf16_pays or row["impl"].endswith("_amx"))
                    gates.append(_gate(f"forward {dtype} full, of own f32, {where}", row["gflops"] / own["gflops"],
                                       1.4 if pays else 0.95))
            for causal, required in ((False, 1.2), (True, 1.5)):
                row = rows.find("heed", threads, dtype="bf16", causal=causal, **cell)
                peer = rows.best_peer(threads, dtype="bf16", causal=causal, **cell)
                if row and peer:
                    kind = "causal" if causal else "full"
                    gates.append(_gate(f"forward bf16 {kind}, of best peer ({peer['peer']}), {where}",
                                       peer["median_us"] / row["median_us"], required, note=f"heed is {row['impl']}"))


def _backward(rows, threads, gates):
    for d in (64, 128):
        for s in (512, 1024, 2048):
            for causal, required in ((False, 1.15), (True, 1.5)):
                cell = dict(group="backward", kind="bwd", sq=s, d=d, causal=causal)
                own, peer = rows.find("heed", threads, **cell), rows.find("torch", threads, **cell)
                if own and peer and peer["agrees"] and not (causal and s > 1024):
                    kind = "causal" if causal else "full"
                    gates.append(_gate(f"backward f32 {kind}, of torch, s={s} d={d} {threads} thr",
                                       peer["median_us"] / own["median_us"], required))


def _decode(rows, threads, gates):
    for dtype in ("f32", "bf16"):
        for keys in (4096, 16384):
            cell = dict(group="decode", kind="decode", dtype=dtype, sk=keys)
            single = rows.find("heed", threads, hq=8, **cell)
            if single:
                gates.append(_gate(f"decode {dtype} 8/8, of the read probe, keys={keys} {threads} thr",
                                   single["gbs"] / single["ceiling"], 0.90))
            grouped, peer = (rows.find(name, threads, hq=32, **cell) for name in ("heed", "torch"))
            if grouped and peer and peer["agrees"]:
                gates.append(_gate(f"decode {dtype} 32/8, of torch, keys={keys} {threads} thr",
                                   peer["median_us"] / grouped["median_us"], 2.5))


def evaluate(report):
    """Every gate that the rows of this report can answer."""
    rows, gates = Rows(report["rows"]), []
    for threads in sorted({row["threads"] for row in report["rows"]}):
        peak, dot = (report[key].get(str(threads), 0) for key in ("peak_gflops", "peak_bf16_gflops"))
        _forward(rows, threads, gates)
        _sixteen_bit(rows, threads, gates, bf16_pays=dot > 1.3 * peak)
        _backward(rows, threads, gates)
        _decode(rows, threads, gates)
    one, two = (rows.find("heed", n, "scaling") for n in (1, 2))
    if one and two:
        note = f"the read probe itself scales {two['ceiling'] / one['ceiling']:.2f}x"
        gates.append(_gate("decode f32 1/1, 2 threads of 1, keys=16384", one["median_us"] / two["median_us"], 1.8,
                           note=note))
    for name, required in (("cached call", 1.0), ("plan run", 1.0), ("plan miss", 20.0)):
        value = report.get("call_us", {}).get(name)
        if value is not None:
            gates.append(_gate(f"host time of a {name}, 1 thread", value, required, "us", below=True))
    return gates


def show(gates):
    if not gates:
        print("\nno gate can be answered by what was measured")
        return
    width = max(len(gate["gate"]) for gate in gates)
    print(f"\n{'gate':<{width}}  measured   required")
    for gate in gates:
        unit, sign = gate["unit"], "<=" if gate["below"] else ">="
        print(f"{gate['gate']:<{width}}  {gate['measured']:>7.2f}{unit:<2} {sign} {gate['required']:>5.2f}{unit:<2}  "
              f"{'PASS' if gate['passed'] else 'FALLS SHORT'}" + (f"  ({gate['note']})" if gate["note"] else ""))
    print(f"{sum(gate['passed'] for gate in gates)} of {len(gates)} pass")


def call_overhead(heed, probe, samples=15, calls=2000):
    """Microseconds of a call that has next to nothing to compute: over a cached plan, over a plan in hand, and what a
    plan that is not in the cache adds. Timed in C; medians."""
    core = heed.core
    library = ctypes.CDLL(str(next(pathlib.Path(core.__file__).parent.glob("libheed.so*"))))

    def address(name):
        return ctypes.cast(getattr(library, name), ctypes.c_void_p)
    inputs = core.Inputs("attention b=1 hq=1 hkv=1 sq=1 sk=1 d=8 f32")
    args = inputs.args
    args.num_threads = 1
    plan = core.Plan(args.problem())
    workspace = core.Buffer(max(plan.workspace_bytes, 64))
    args.workspace, args.workspace_bytes = workspace.pointer, plan.workspace_bytes

    def median(function, a, b, count, before=None):
        values = [probe.call_seconds(address(function), a, b, count, before) for _ in range(samples)]
        return statistics.median(values) * 1e6
    cached = median("heed_attention", args.address, None, calls)
    in_hand = median("heed_attention_run", plan.address, args.address, calls)
    missed = median("heed_attention", args.address, None, 200, address("heed_plan_cache_clear"))
    found = {"cached call": cached, "plan run": in_hand, "plan miss": missed - cached}
    return {name: value for name, value in found.items() if not math.isnan(value)}
