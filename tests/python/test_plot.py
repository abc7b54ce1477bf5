"""heed.plot: pictures come out of the files that the benches and `heed run` write, and errors are sentences."""

import json
import struct

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("heed", reason="needs PYTHONPATH=<build>/python")
from heed import plot  # noqa: E402


def bench_report():
    rows = []
    for threads in (1, 2):
        for line in ("attention b=1 hq=8 hkv=8 sq=1024 sk=1024 d=64 f32",
                     "attention b=1 hq=8 hkv=8 sq=1024 sk=1024 d=64 f32 causal",
                     "attention b=1 hq=8 hkv=8 sq=512 sk=512 d=64 f32 pass=bwd",
                     "attention b=1 hq=32 hkv=8 sq=1 sk=4096 d=128 bf16"):
            for peer, impl in (("heed", "cpu/attention_fwd_avx512"), ("torch", "torch"), ("another", "another")):
                rows.append({"problem": line, "impl": impl, "peer": peer, "threads": threads, "median_us": 100.0,
                             "p10_us": 90.0, "p90_us": 120.0, "gflops": 100.0 * threads, "gbs": 20.0})
    return {"heed": "0.1.0", "machine": "a machine", "date": "2026-01-01", "command": "heed bench",
            "peak_gflops": {"1": 120.0, "2": 240.0}, "read_gbs": {"1": 25.0, "2": 40.0}, "rows": rows}


def is_picture(path):
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def write_tokens(path, tokens):
    header = json.dumps({"__metadata__": {"tokens": json.dumps(tokens)}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def test_bench(tmp_path):
    source, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    source.write_text(json.dumps(bench_report()))
    assert plot.main([str(source), "-o", str(picture)]) == 0
    assert is_picture(picture)


def test_panels_are_apart():
    titles = [title for title, *_ in plot._panels(bench_report()["rows"])]
    assert len(titles) == len(set(titles)) == 8
    assert titles[0] == "forward, f32, full, 1 thread"


def test_map(tmp_path):
    source, tokens, picture = tmp_path / "map.npy", tmp_path / "t.safetensors", tmp_path / "map.png"
    np.save(source, np.random.default_rng(1).dirichlet(np.ones(12), size=10).astype(np.float32))
    write_tokens(tokens, [f"t{i}" for i in range(12)])
    assert plot.main(["map", str(source), "--tokens", str(tokens), "-o", str(picture)]) == 0
    assert is_picture(picture)


@pytest.mark.parametrize("content, reason",
                         [("{}", "no rows"), ('{"rows": [{"threads": 1}]}', "problem"), ("[", "line 1")])
def test_bad_bench_files(tmp_path, capsys, content, reason):
    source = tmp_path / "bad.json"
    source.write_text(content)
    assert plot.main([str(source), "-o", str(tmp_path / "x.png")]) == 1
    assert reason in capsys.readouterr().err


def test_bad_maps(tmp_path, capsys):
    source, tokens = tmp_path / "map.npy", tmp_path / "t.safetensors"
    np.save(source, np.zeros((2, 3, 4), np.float32))
    assert plot.main(["map", str(source)]) == 1
    assert "[queries, keys]" in capsys.readouterr().err
    np.save(source, np.zeros((3, 4), np.float32))
    write_tokens(tokens, ["one", "two"])
    assert plot.main(["map", str(source), "--tokens", str(tokens)]) == 1
    assert "2 tokens for 4 keys" in capsys.readouterr().err
    tokens.write_bytes(b"short")
    assert plot.main(["map", str(source), "--tokens", str(tokens)]) == 1
    assert "too short" in capsys.readouterr().err
    assert plot.main(["map", str(tmp_path / "absent.npy")]) == 1


# ---- what each query sees --------------------------------------------------------------------------------------------

def test_visible_is_what_the_rule_says():
    i, j = np.indices((5, 9))
    p = i + 4
    assert (plot.visible(5, 9) == True).all()  # noqa: E712
    assert (plot.visible(5, 9, causal=True) == (j <= p)).all()
    assert (plot.visible(5, 9, window=(2, 1)) == ((j >= p - 2) & (j <= p + 1))).all()
    assert (plot.visible(5, 9, causal=True, q_offset="top", chunk=3) == ((j <= i) & (i // 3 == j // 3))).all()
    given = np.random.default_rng(0).random((5, 9)) > 0.5
    assert (plot.visible(5, 9, mask=given, head=0) == given).all()
    lengths = np.array([9, 4], np.int32)
    assert (plot.visible(5, 9, seqused_k=lengths, batch=1) == (j < 4)).all()
    assert plot.visible(3, 1100, causal=True).sum() == 1098 + 1099 + 1100
    offsets = np.array([0, 2, 5], np.int32)
    packed = plot.visible(5, 5, cu_seqlens_q=offsets, cu_seqlens_k=offsets, causal=True)
    assert packed.sum(1).tolist() == [1, 2, 1, 2, 3]


def test_mask_draws(tmp_path):
    picture = tmp_path / "mask.png"
    figure = plot.mask(24, 32, causal=True, window=(8, 0), path=picture, title="a window")
    assert is_picture(picture) and figure.axes[0].get_title(loc="left") == "a window"
