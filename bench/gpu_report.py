"""What a run of peers_gpu.py says at its end: ratios, gates, a compact table. Imports no framework."""

import math

PEERS = {"fa2": "FlashAttention-2", "cudnn": "cuDNN", "efficient": "memory-efficient", "flex": "FlexAttention"}


# FlashAttention-3 is not where this runs. Its speed over cuDNN's, 512 to 16k keys, as measured in one run on an H200 (its
# release of August 2026, cuDNN 9.19, bf16, the cells of `fwd`, rested): a run's cuDNN times it stands for FlashAttention-3.
FA3_OVER_CUDNN = {
    (64, False): (334 / 393, 387 / 441, 501 / 465, 528 / 478, 574 / 486, 583 / 466),
    (64, True): (232 / 269, 304 / 343, 427 / 395, 485 / 432, 548 / 454, 569 / 467),
    (128, False): (549 / 553, 648 / 620, 698 / 655, 722 / 672, 737 / 677, 747 / 668),
    (128, True): (340 / 354, 509 / 445, 623 / 523, 694 / 578, 731 / 612, 750 / 633),
    (256, False): (560 / 549, 693 / 638, 754 / 697, 780 / 727, 794 / 740, 807 / 742),
    (256, True): (361 / 361, 514 / 470, 632 / 550, 728 / 603, 775 / 632, 802 / 651),
}
SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)

# Whole calls of little work, microseconds at most.
SHORT_US = {"B1 H16 S1024": 9.6, "B1 H16 S1024 causal": 9.0, "B16 H16 S1024": 122.0, "B1 H16 S512": 5.6,
            "B1 H16 S128": 3.4, "B256 H8 S64": 20.0, "B32 H8 S256": 12.5, "B1 H8 S8192": 240.0}


class Rows:
    """Rows of one regime, by (group, label, name)."""

    def __init__(self, rows, regime="rested"):
        self.by_place = {(row["group"], row["label"], row["name"]): row for row in rows if row["regime"] == regime}
        self.cells = list(dict.fromkeys((group, label) for group, label, _ in self.by_place))

    def get(self, group, label, name="heed"):
        return self.by_place.get((group, label, name))

    def ratios(self, group, peer):
        """[(label, peer's time over heed's)]: above 1 heed is faster."""
        found = []
        for place, label in self.cells:
            own, other = self.get(place, label), self.get(place, label, peer)
            if place == group and own and other:
                found.append((label, other["median_us"] / own["median_us"]))
        return found

    def over_best(self):
        """[(label, d, heed's speed over the better of cuDNN and FlashAttention-3)] of the forward grid."""
        found = []
        for label, ratio in self.ratios("fwd", "cudnn"):
            row = self.get("fwd", label)
            fa3 = FA3_OVER_CUDNN[row["d"], row["causal"]][SEQLENS.index(row["seqlen"])]
            found.append((label, row["d"], ratio / max(1.0, fa3)))
        return found

    def groups(self):
        return list(dict.fromkeys(group for group, _ in self.cells))

    def misplanned(self):
        """[(group, label, row, times)]: heed rows that were faster than the planner's choice by more than 2 %; and how many
        cells had other rows beside it."""
        found, compared = [], 0
        for group, label in self.cells:
            own = self.get(group, label)
            forced = [row for (g, l, name), row in self.by_place.items()
                      if (g, l) == (group, label) and name.startswith("heed:")]
            if not own or not forced:
                continue
            compared += 1
            best = min(forced, key=lambda row: row["median_us"])
            if best["median_us"] < 0.98 * own["median_us"]:
                found.append((group, label, best["impl"], own["median_us"] / best["median_us"]))
        return found, compared

    def against_plain(self):
        """[(group, label, plain's label, time over plain's, work over plain's)]."""
        found = []
        for (group, label, name), row in self.by_place.items():
            plain = self.get(group, row["plain"], name) if row["plain"] else None
            if name == "heed" and plain:
                found.append((group, label, row["plain"], row["median_us"] / plain["median_us"],
                              row["flops"] / plain["flops"]))
        return found


def geometric_mean(values):
    values = list(values)
    return math.exp(sum(math.log(v) for v in values) / len(values)) if values else math.nan


def _gate(name, measured, required, below=False, unit="x", note=""):
    return {"gate": name, "measured": measured, "required": required, "unit": unit, "below": below,
            "passed": bool(measured <= required if below else measured >= required), "note": note}


def _forward_of_best(rows):
    """The forward grid beside the best that there is for Hopper."""
    best = rows.over_best()
    if not best:
        return []
    label, _, least = min(best, key=lambda item: item[2])
    name = "forward of the better of cuDNN and FlashAttention-3"
    mean = geometric_mean(r for _, _, r in best)
    found = [_gate(f"{name}, geometric mean", mean, 1.08, note=f"{len(best)} cells"),
             _gate(f"{name}, geometric mean: aim", mean, 1.12, note=f"{len(best)} cells"),
             _gate(f"{name}, least cell", least, 1.00, note=label)]
    for d, least in ((64, 1.30), (128, 1.18), (256, 1.10)):
        ratios = [r for label, r in rows.ratios("fwd", "cudnn") if rows.get("fwd", label)["d"] == d]
        if ratios:
            found.append(_gate(f"forward of cuDNN, d{d}, geometric mean", geometric_mean(ratios), least,
                               note=f"{len(ratios)} cells"))
    return found


def gates(report):
    """Every gate that this run can answer, on rested figures."""
    rows, found = Rows(report["rows"]), []
    forward = rows.ratios("fwd", "fa2")
    if forward:
        count = f"{len(forward)} cells"
        mean = geometric_mean(r for _, r in forward)
        found.append(_gate("forward of FlashAttention-2, geometric mean: aim", mean, 1.00, note=count))
        found.append(_gate("forward of FlashAttention-2, geometric mean: floor", mean, 0.90, note=count))
        label, least = min(forward, key=lambda item: item[1])
        found.append(_gate("forward of FlashAttention-2, least cell", least, 0.75, note=label))
    found += _forward_of_best(rows)
    for label, most in SHORT_US.items():
        row = rows.get("short", label)
        if row:
            found.append(_gate(f"short, {label}", row["median_us"], most, below=True, unit="us"))
    decode = rows.ratios("decode", "cudnn")
    if decode:
        found.append(_gate("decode of cuDNN, geometric mean", geometric_mean(r for _, r in decode), 1.00,
                           note=f"{len(decode)} cells"))
        label, least = min(decode, key=lambda item: item[1])
        found.append(_gate("decode of cuDNN, least cell", least, 0.95, note=label))
    plain = rows.against_plain()
    for page, most in ((16, 1.05), (1, 1.30)):
        times = [(label, t) for group, label, _, t, _ in plain if group == "paged" and label.endswith(f"page {page}")]
        if times:
            label, worst = max(times, key=lambda item: item[1])
            found.append(_gate(f"page {page}, time of unpaged, worst cell", worst, most, below=True, note=label))
    windows = [(label, t / work) for group, label, _, t, work in plain if label.startswith("window")]
    if len(windows) > 1:
        # Proportional: time per unit of work does not grow as the window shrinks, but for the edges of its tiles.
        label, worst = max(windows, key=lambda item: item[1])
        found.append(_gate("window, time over its share of the plain call's work, worst", worst, 1.5, below=True,
                           note=label))
    for label in ("softcap", "sinks", "window 1024 at 16k", "GQA 32/8", "packed, mean 2k"):
        found += [_gate(f"{label}, time over its share of the plain call's work", t / work, 1.05, below=True)
                  for group, l, _, t, work in plain if group == "features" and l == label]
    calls = [row["host_call_us"] for row in report["rows"] if row.get("host_call_us")]
    if calls:
        found.append(_gate("host time of a call with its plan cached, from C, median of cells",
                           sorted(calls)[len(calls) // 2], 3.0, below=True, unit="us"))
    for cache, most in (("empty", 1500.0), ("warm", 50.0)):
        times = [row["first_call_ms"] for row in report.get("startup", []) if row["cache"] == cache]
        if times:
            found.append(_gate(f"first call of a process, {cache} kernel cache, worst", max(times), most, below=True,
                               unit="ms"))
    return found


def rate_text(row):
    return f"{row['tbs']:.2f}" if row["decode"] else f"{row['tflops']:.0f}"


def _table(rows, group):
    """The cells of one group: heed beside each peer, as a rate (TFLOP/s; TB/s when decoding) and a ratio."""
    names = [name for name in PEERS if any(g == group and n == name for g, _, n in rows.by_place)]
    labels = [label for g, label in rows.cells if g == group]
    width = max(len(label) for label in labels)
    lines = [f"{group}: TFLOP/s, TB/s of keys and values when decoding; (x): the peer's time over heed's",
             f"  {'':<{width}}{'us':>9}{'heed':>7}" + "".join(f"{name:>16}" for name in names) + "  by"]
    for label in labels:
        own = rows.get(group, label)
        line = f"  {label:<{width}}"
        line += f"{own['median_us']:>9.1f}{rate_text(own):>7}" if own else f"{'-':>9}{'-':>7}"
        for name in names:
            peer = rows.get(group, label, name)
            ratio = f"({peer['median_us'] / own['median_us']:.2f}x)" if peer and own else ""
            line += f"{rate_text(peer) + ' ' + ratio if peer else '-':>16}"
        lines.append(line + (f"  {own['impl'].removeprefix('cuda/')}" if own else ""))
    return lines


def text(report, regime="rested"):
    """The whole run for a person; what matters most comes last."""
    rows, lines = Rows(report["rows"], regime), []
    for group in rows.groups():
        lines += _table(rows, group) + [""]
    plain = rows.against_plain()
    if plain:
        lines.append("beside the plain call: time, work")
        lines += [f"  {group}: {label}: {time:.3f}x, {work:.3f}x of {of}" for group, label, of, time, work in plain]
        lines.append("")
    hot = Rows(report["rows"], "hot")
    lines.append("heed of peers, geometric mean (least cell):")
    for group in rows.groups():
        parts = []
        for peer in PEERS:
            for name, found in (("", rows.ratios(group, peer)), (" hot", hot.ratios(group, peer))):
                if found and not (name and regime != "rested"):
                    label, least = min(found, key=lambda item: item[1])
                    parts.append(f"{peer}{name} {geometric_mean(r for _, r in found):.3f}x ({least:.2f}x {label})")
        if parts:
            lines.append(f"  {group}: " + "; ".join(parts))
    best = rows.over_best()
    if best:
        label, _, least = min(best, key=lambda item: item[2])
        lines.append(f"  fwd: the better of cuDNN and FlashAttention-3 {geometric_mean(r for _, _, r in best):.3f}x "
                     f"({least:.2f}x {label}); FlashAttention-3 is cuDNN times its ratio of an earlier run")
    missed, compared = rows.misplanned()
    lines.append(f"planner's choice not the fastest row in {len(missed)} of {compared} cells with other rows")
    lines += [f"  {group}: {label}: {impl} is {times:.2f}x as fast" for group, label, impl, times in missed]
    lines += [f"first call, {row['cache']} kernel cache: {row['first_call_ms']:.0f} ms, the second "
              f"{row['second_call_ms']:.2f} ms; before, import {row['import_ms']:.0f} ms, context and inputs "
              f"{row['context_ms']:.0f} ms: {row['problem']}" for row in report.get("startup", [])]
    lines += [f"WRONG, not timed: {line}" for line in report["wrong"]]
    lines += [f"cut short: {line}" for line in report["cut"]]
    for gate in report.get("gates", []):
        sign = "<=" if gate["below"] else ">="
        lines.append(f"{'PASS       ' if gate['passed'] else 'FALLS SHORT'} {gate['gate']}: {gate['measured']:.3f}"
                     f" {sign} {gate['required']:.2f} {gate['unit']}" + (f" ({gate['note']})" if gate["note"] else ""))
    return "\n".join(lines)
