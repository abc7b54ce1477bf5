"""Pictures of measurements and of attention.

    python -m heed.plot bench.json -o bench.png
    python -m heed.plot map map.npy --tokens input.safetensors -o map.png
"""

import argparse
import json
import math
import struct
import sys
import textwrap

# Okabe and Ito's colours keep apart under every common colour blindness; heed is always the same blue, hatching helps
# in grey print.
COLOURS = {"heed": "#0072B2", "torch": "#E69F00", "onnxruntime": "#009E73", "onednn": "#CC79A7"}
SPARE_COLOURS = ["#D55E00", "#56B4E9", "#F0E442", "#999999"]
HATCHES = {"torch": "//", "onnxruntime": "..", "onednn": "xx"}
NAMES = {"torch": "PyTorch", "onnxruntime": "ONNX Runtime", "onednn": "oneDNN"}
GPU_STYLES = {"heed": ("heed", "#0072B2", "o", None), "fa2": ("FlashAttention-2", "#E69F00", "s", "//"),
              "cudnn": ("cuDNN", "#009E73", "^", ".."), "efficient": ("memory-efficient", "#CC79A7", "v", "xx"),
              "flex": ("FlexAttention", "#D55E00", "D", "\\\\")}
INK, FAINT = "#222222", "#d9d9d9"


def _pyplot():
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("heed.plot draws with matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({
        "font.size": 9, "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK,
        "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
        "axes.grid": True, "axes.grid.axis": "y", "grid.color": FAINT, "grid.linewidth": 0.6, "hatch.linewidth": 0.5,
        "legend.frameon": False, "figure.dpi": 150})
    return plt


# ---- bench -----------------------------------------------------------------------------------------------------------

def _fields(line):
    """A problem line as a dict: name=value fields, bare flags as True."""
    return {name: value or True for name, _, value in (part.partition("=") for part in line.split()[1:])}


def _dtype(fields):
    return next((dtype for dtype in ("f32", "bf16", "f16", "e4m3", "f64") if dtype in fields), "f32")


def _panel_of(row):
    """Rows of one panel share the unit and differ in size only: (sort key, title, label under the bars)."""
    fields, threads = _fields(row["problem"]), row["threads"]
    sq, sk = int(fields.get("sq", 0)), int(fields.get("sk", 0))
    kind = "backward" if fields.get("pass") == "bwd" else "decode" if sq == 1 and sk > 1 else "forward"
    mask = "causal" if "causal" in fields and kind != "decode" else "full"
    dtype, head_dim = _dtype(fields), fields.get("d", "?")
    heads, heads_kv = fields.get("hq", "1"), fields.get("hkv", fields.get("hq", "1"))
    count = f"{threads} thread" + ("s" if threads != 1 else "")
    order = (("forward", "backward", "decode").index(kind), ("f32", "bf16", "f16", "e4m3", "f64").index(dtype), threads)
    if kind == "decode":
        return order, f"decode, {dtype}, {count}", (int(heads), sk), f"{heads}/{heads_kv}\n{_thousands(sk)}"
    order += (mask == "causal",)
    return order, f"{kind}, {dtype}, {mask}, {count}", (int(head_dim), sk), f"d{head_dim}\n{_thousands(sk)}"


def _thousands(n):
    return f"{n // 1024}k" if n >= 1024 and n % 1024 == 0 else str(n)


def _panels(rows):
    """[(title, is_decode, labels, impls, {(label index, impl): row})], in reading order."""
    grouped = {}
    for row in rows:
        order, title, place, label = _panel_of(row)
        cells = grouped.setdefault((order, title), {})
        cells.setdefault((place, label), {}).setdefault(_who(row), row)
    for (order, title), cells in sorted(grouped.items(), key=lambda item: item[0]):
        places = sorted(cells)
        names = {name for cell in cells.values() for name in cell}
        impls = sorted(names, key=_rank)
        found = {(i, name): cells[place][name] for i, place in enumerate(places) for name in cells[place]}
        yield title, order[0] == 2, [label for _, label in places], impls, found


def _rank(name):
    """heed first, known peers in the order of COLOURS, others by name."""
    return not _is_heed(name), list(COLOURS).index(name) if name in COLOURS else len(COLOURS), name


def _who(row):
    """Whose result it is; a row that does not say is named after its kernel."""
    return row.get("peer") or row["impl"]


def _is_heed(name):
    return name == "heed"


def _style(name, others):
    if _is_heed(name):
        return COLOURS["heed"], None
    colour = COLOURS.get(name) or SPARE_COLOURS[others.index(name) % len(SPARE_COLOURS)]
    return colour, HATCHES.get(name, "\\\\")


def _ceilings(report, found, labels, is_decode):
    """The limit over each place: what the rows say, else the report's peak for their thread count."""
    limits = []
    for i in range(len(labels)):
        row = next(row for (place, _), row in found.items() if place == i)
        general = report.get("read_gbs" if is_decode else "peak_gflops") or {}
        limits.append(row.get("ceiling") or general.get(str(row["threads"])) or math.nan)
    return limits


def _draw_panel(axes, report, panel, others):
    title, is_decode, labels, impls, found = panel
    unit = "gbs" if is_decode else "gflops"
    width = 0.8 / len(impls)
    # A gap where the head dim, or the number of heads, changes.
    places = [i + 0.45 * sum(a.split("\n")[0] != b.split("\n")[0] for a, b in zip(labels[:i], labels[1:i + 1]))
              for i in range(len(labels))]
    for n, name in enumerate(impls):
        colour, hatch = _style(name, others)
        for i in range(len(labels)):
            row = found.get((i, name))
            if row is None:
                continue
            value, median = row[unit], row["median_us"]
            at = places[i] - 0.4 + (n + 0.5) * width
            # Slow samples make the low end of the rate.
            low, high = value * median / row["p90_us"], value * median / row["p10_us"]
            axes.bar(at, value, width * 0.92, color=colour, hatch=hatch, edgecolor="white", linewidth=0.4, zorder=2)
            axes.plot([at, at], [low, high], color=INK, linewidth=0.8, zorder=3)
            if _is_heed(name):
                axes.annotate(f"{value:.0f}", (at, max(value, high)), xytext=(0, 2), textcoords="offset points",
                              ha="center", va="bottom", fontsize=6.5, color=INK, zorder=5,
                              bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4, "alpha": 0.85})
    limits = _ceilings(report, found, labels, is_decode)
    for place, limit in zip(places, limits):
        axes.plot([place - 0.45, place + 0.45], [limit, limit], color=INK, linewidth=1.1, linestyle=(0, (4, 2)),
                  zorder=4)
    axes.set_title(title, loc="left", fontsize=9, fontweight="bold")
    axes.set_xticks(places, labels, fontsize=7)
    axes.set_xlim(-0.6, max(places[-1] + 0.6, 2.4))  # or one group alone would be as wide as the panel
    axes.tick_params(axis="x", length=0)
    axes.set_ylim(bottom=0)
    axes.margins(y=0.12)
    axes.set_ylabel("GB/s of keys and values" if is_decode else "GFLOP/s")


def _gpu_panels(rows):
    """[(title, kind, rows)]: panels of lines for each head_dim and mask of the forward grid, of bars for the rest."""
    forward = [row for row in rows if row["group"] == "fwd"]
    for d in sorted({row["d"] for row in forward}):
        for causal in (False, True):
            cells = [row for row in forward if (row["d"], row["causal"]) == (d, causal)]
            if cells:
                yield f"forward, d{d}, {'causal' if causal else 'full'}", "lines", cells
    for group in dict.fromkeys(row["group"] for row in rows if row["group"] != "fwd"):
        yield group, "bars", [row for row in rows if row["group"] == group]


def _draw_gpu_panel(axes, title, kind, rows):
    unit = "tbs" if all(row["decode"] for row in rows) else "tflops"
    labels = list(dict.fromkeys(row["seqlen"] if kind == "lines" else row["label"] for row in rows))
    labels = sorted(labels) if kind == "lines" else labels
    names = [name for name in GPU_STYLES if any(row["name"] == name for row in rows)]
    for n, name in enumerate(names):
        _, colour, marker, hatch = GPU_STYLES[name]
        own = [row for row in rows if row["name"] == name]
        at = [labels.index(row["seqlen"] if kind == "lines" else row["label"]) for row in own]
        rates = [row[unit] for row in own]
        spread = [[rate - rate * row["median_us"] / row["p90_us"] for rate, row in zip(rates, own)],
                  [rate * row["median_us"] / row["p10_us"] - rate for rate, row in zip(rates, own)]]
        if kind == "lines":
            axes.errorbar(at, rates, yerr=spread, color=colour, marker=marker, markersize=4, linewidth=1.4, zorder=3)
        else:
            width = 0.8 / len(names)
            axes.bar([x - 0.4 + (n + 0.5) * width for x in at], rates, width * 0.92, color=colour, hatch=hatch,
                     edgecolor="white", linewidth=0.4, yerr=spread, error_kw={"linewidth": 0.8}, zorder=2)
    turned = kind == "bars" and len(labels) > 3
    axes.set_xticks(range(len(labels)), [_thousands(x) if kind == "lines" else x for x in labels],
                    rotation=35 if turned else 0, ha="right" if turned else "center", fontsize=7)
    axes.set_title(title, loc="left", fontsize=9, fontweight="bold")
    axes.set_ylabel("TB/s of keys and values" if unit == "tbs" else "TFLOP/s")
    axes.set_ylim(bottom=0)


def draw_gpu(report, path, regime="rested"):
    """Draws a report of bench/peers_gpu.py: the planner's choice beside the peers."""
    rows = [row for row in report["rows"] if row["regime"] == regime and row["name"] in GPU_STYLES]
    if not rows:
        raise ValueError(f"the bench file has no {regime} rows to draw")
    plt = _pyplot()
    from matplotlib.patches import Patch
    panels = list(_gpu_panels(rows))
    lines = math.ceil(len(panels) / 2)
    figure, grid = plt.subplots(lines, 2, figsize=(12.4, 2.9 * lines + 1.2), squeeze=False)
    for axes, panel in zip(grid.flat, panels):
        _draw_gpu_panel(axes, *panel)
    for axes in list(grid.flat)[len(panels):]:
        axes.set_axis_off()
    versions = {**(report.get("peers") or {}), "heed": report.get("heed")}
    handles = [Patch(facecolor=colour, hatch=hatch, edgecolor="white", label=f"{label} ({versions.get(name)})")
               for name, (label, colour, _, hatch) in GPU_STYLES.items() if any(row["name"] == name for row in rows)]
    height = figure.get_figheight()
    figure.tight_layout(rect=(0, 0.4 / height, 1, 1 - 0.72 / height), h_pad=1.4, w_pad=2.0)
    figure.legend(handles=handles, loc="upper left", ncols=len(handles), bbox_to_anchor=(0.01, 1 - 0.26 / height),
                  fontsize=8)
    figure.text(0.015, 1 - 0.16 / height, f"Exact attention on {report['gpu']}, {regime}: higher is better",
                fontsize=11, fontweight="bold", va="center")
    source = "  ·  ".join(str(report[key]) for key in ("driver", "date", "command") if report.get(key))
    figure.text(0.015, 0.08 / height, textwrap.fill(f"Medians, bars from p10 to p90  ·  driver {source}", width=220),
                fontsize=6.5, color="#555555", va="bottom")
    figure.savefig(path)
    plt.close(figure)


def draw_bench(report, path):
    """Draws a bench report (the parsed JSON) into the file `path`: heed beside its peers under the machine's limits."""
    if not report.get("rows"):
        raise ValueError("the bench file has no rows to draw")
    if report.get("gpu"):
        return draw_gpu(report, path)
    plt = _pyplot()
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    panels = list(_panels(report["rows"]))
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure, grid = plt.subplots(lines, columns, figsize=(6.2 * columns, 2.6 * lines + 1.3), squeeze=False)
    shown = []
    for panel in panels:
        shown += [name for name in panel[3] if name not in shown]
    others = [name for name in shown if name not in COLOURS and not _is_heed(name)]
    for axes, panel in zip(grid.flat, panels):
        _draw_panel(axes, report, panel, others)
    for axes in list(grid.flat)[len(panels):]:
        axes.set_axis_off()
    handles = []
    for name in sorted(shown, key=lambda name: not _is_heed(name)):
        colour, hatch = _style(name, others)
        version = report.get("heed") if name == "heed" else (report.get("peers") or {}).get(name)
        handles.append(Patch(facecolor=colour, hatch=hatch, edgecolor="white",
                             label=f"{NAMES.get(name, name)} {version or ''}".strip()))
    handles.append(Line2D([], [], color=INK, linestyle=(0, (4, 2)), label="measured limit: FMA peak, or reading K, V"))
    height = figure.get_figheight()
    figure.tight_layout(rect=(0, 0.4 / height, 1, 1 - 0.72 / height), h_pad=1.4, w_pad=2.0)
    figure.legend(handles=handles, loc="upper left", ncols=min(len(handles), 3 if columns == 1 else 5),
                  bbox_to_anchor=(0.01, 1 - 0.26 / height), fontsize=8)
    figure.text(0.015, 1 - 0.16 / height, "Exact attention: higher is better", fontsize=11, fontweight="bold",
                va="center")
    source = "  ·  ".join(str(report[key]) for key in ("machine", "date", "command") if report.get(key))
    source = textwrap.fill(f"Medians, lines from p10 to p90  ·  {source}", width=110 * columns)
    figure.text(0.015, 0.08 / height, source, fontsize=6.5, color="#555555", va="bottom")
    figure.savefig(path)
    plt.close(figure)


# ---- attention map ---------------------------------------------------------------------------------------------------

def read_tokens(path):
    """The token strings in a .safetensors file: its metadata `tokens`, a JSON list."""
    with open(path, "rb") as file:
        prefix = file.read(8)
        if len(prefix) != 8:
            raise ValueError(f"{path} is too short to be a .safetensors file")
        (size,) = struct.unpack("<Q", prefix)
        if size > 100 << 20:
            raise ValueError(f"{path} is not a .safetensors file: its header would be {size} bytes")
        header = json.loads(file.read(size))
    tokens = header.get("__metadata__", {}).get("tokens")
    if tokens is None:
        raise ValueError(f"{path} has no metadata `tokens`")
    return [str(token) for token in json.loads(tokens)]


def draw_map(weights, tokens, path, title=None):
    """Draws attention probabilities [sq, sk] into the file `path`; `tokens` (sk of them, or None) label both axes."""
    import numpy as np
    plt = _pyplot()
    weights = np.squeeze(np.asarray(weights, dtype=np.float64))
    if weights.ndim != 2:
        raise ValueError(f"the map has shape {list(weights.shape)}; it must be [queries, keys]")
    rows, columns = weights.shape
    if tokens is not None and len(tokens) < columns:
        raise ValueError(f"{len(tokens)} tokens for {columns} keys")
    cell = 0.15 if max(rows, columns) <= 120 else 16.0 / max(rows, columns)
    font = max(3.5, min(7.0, cell * 46))
    figure, axes = plt.subplots(figsize=(cell * columns + 2.6, cell * rows + 2.0))
    # A root spreads the many small weights over the colours; the bar shows the true values.
    from matplotlib.colors import PowerNorm
    image = axes.imshow(weights, cmap="cividis", norm=PowerNorm(0.5, 0.0, max(float(np.nanmax(weights)), 1e-12)),
                        interpolation="nearest", aspect="equal")
    axes.grid(False)
    for side in axes.spines.values():
        side.set_visible(False)
    if tokens is not None:
        offset = columns - rows  # the queries are the last tokens of the keys
        axes.set_xticks(range(columns), tokens[:columns], rotation=90, fontsize=font)
        axes.set_yticks(range(rows), tokens[max(offset, 0):max(offset, 0) + rows], fontsize=font)
    axes.tick_params(length=0, pad=2)
    axes.set_xlabel("key: is attended to")
    axes.set_ylabel("query: attends")
    if title:
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.015)
    bar.set_label("probability (colour scale: square root)", fontsize=7)
    bar.ax.tick_params(labelsize=6.5)
    bar.outline.set_visible(False)
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


# ---- what each query sees --------------------------------------------------------------------------------------------

def visible(seqlen_q, seqlen_k=None, *, batch=0, head=0, nheads_q=1, **options):
    """Which keys each query sees under these options of heed.attention: a boolean array [seqlen_q, seqlen_k].

    It is asked of heed itself, by attention over values of which each key has one of its own. With cu_seqlens_q or
    cu_seqlens_k the lengths are the totals, and each sequence's keys stand in columns 0, 1, ... of its queries' rows.
    """
    import numpy as np
    from heed import attention
    seqlen_k = seqlen_q if seqlen_k is None else seqlen_k
    sizes = [len(options[name]) for name in ("seqused_q", "seqused_k", "leftpad") if options.get(name) is not None]
    for name in ("mask", "bias"):
        if options.get(name) is not None:
            options[name] = np.asarray(options[name])
            options[name] = options[name].reshape((1,) * (4 - options[name].ndim) + options[name].shape)
            sizes.append(options[name].shape[0])
            nheads_q = max(nheads_q, options[name].shape[1])
    num_batches = max([batch + 1, *sizes])
    seen = np.zeros((seqlen_q, seqlen_k), bool)
    packed_q, packed_k = options.get("cu_seqlens_q") is not None, options.get("cu_seqlens_k") is not None
    q = np.zeros((seqlen_q, nheads_q, 1) if packed_q else (num_batches, seqlen_q, nheads_q, 1), np.float32)
    k = np.zeros((seqlen_k, 1, 1) if packed_k else (num_batches, seqlen_k, 1, 1), np.float32)
    for first in range(0, seqlen_k, 512):  # head_dim_v is at most 512
        last = min(first + 512, seqlen_k)
        columns = np.eye(seqlen_k, dtype=np.float32)[:, first:last]
        if packed_k:
            offsets = np.asarray(options["cu_seqlens_k"])
            columns = np.concatenate([np.eye(seqlen_k, dtype=np.float32)[:b - a, first:last]
                                      for a, b in zip(offsets, offsets[1:])]
                                     + [np.zeros((seqlen_k - int(offsets[-1]), last - first), np.float32)])
        v = columns[:, None]
        if not packed_k:
            v = np.broadcast_to(v, (num_batches, *v.shape))
        v = np.ascontiguousarray(v)
        weights = attention(q, k, v, **options)
        seen[:, first:last] = (weights[:, head] if packed_q else weights[batch, :, head]) > 0
    return seen


def mask(seqlen_q, seqlen_k=None, *, batch=0, head=0, path=None, title=None, **options):
    """Draws what each query sees under these options of heed.attention (causal, window, chunk, q_offset, mask,
    lengths).

    Rows are queries, columns keys. Gives matplotlib's figure, and writes it to `path` where one is given.

    >>> heed.plot.mask(24, 32, causal=True, window=(8, 0), path="mask.png")
    """
    plt = _pyplot()
    from matplotlib.colors import ListedColormap
    seen = visible(seqlen_q, seqlen_k, batch=batch, head=head, **options)
    rows, columns = seen.shape
    cell = min(0.22, 9.0 / max(rows, columns, 1))
    figure, axes = plt.subplots(figsize=(cell * columns + 1.6, cell * rows + 1.4))
    axes.imshow(seen, cmap=ListedColormap([FAINT, COLOURS["heed"]]),
                vmin=0, vmax=1, interpolation="nearest", aspect="equal")
    axes.grid(False)
    for side in axes.spines.values():
        side.set_visible(False)
    if max(rows, columns) <= 64:  # a white line around each cell
        axes.set_xticks([x - 0.5 for x in range(columns + 1)], minor=True)
        axes.set_yticks([y - 0.5 for y in range(rows + 1)], minor=True)
        axes.grid(True, which="minor", axis="both", color="white", linewidth=0.8)
    axes.tick_params(length=0, which="both")
    axes.set_xlabel("key")
    axes.set_ylabel("query")
    axes.set_title(title or f"{seen.sum()} of {seen.size} pairs are seen", loc="left", fontsize=9)
    if path is not None:
        figure.savefig(path, bbox_inches="tight")
    plt.close(figure)  # the figure lives on; pyplot lets go of it
    return figure


# ---- command ---------------------------------------------------------------------------------------------------------

def _bench_command(arguments):
    parser = argparse.ArgumentParser(prog="python -m heed.plot", description="Draw a bench's JSON file.",
                                     epilog="python -m heed.plot map --help: attention maps")
    parser.add_argument("file", help="JSON written by `heed bench`, bench/peers_cpu.py or peers_gpu.py")
    parser.add_argument("-o", "--output", default="bench.png", help="picture to write (default bench.png)")
    options = parser.parse_args(arguments)
    with open(options.file) as file:
        draw_bench(json.load(file), options.output)
    return options.output


def _map_command(arguments):
    import numpy as np
    parser = argparse.ArgumentParser(prog="python -m heed.plot map", description="Draw an attention map.")
    parser.add_argument("file", help=".npy with probabilities [queries, keys]")
    parser.add_argument("--tokens", metavar="FILE", help=".safetensors whose metadata `tokens` names the keys")
    parser.add_argument("--title", help="line above the picture")
    parser.add_argument("-o", "--output", default="map.png", help="picture to write (default map.png)")
    options = parser.parse_args(arguments)
    tokens = read_tokens(options.tokens) if options.tokens else None
    draw_map(np.load(options.file), tokens, options.output, options.title)
    return options.output


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        path = _map_command(arguments[1:]) if arguments[:1] == ["map"] else _bench_command(arguments)
    except (OSError, ValueError, KeyError) as error:
        reason = f"field {error} is missing" if isinstance(error, KeyError) else error
        print(f"heed.plot: {reason}", file=sys.stderr)
        return 1
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
