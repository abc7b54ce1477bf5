"""Every command of heed, its exit codes and its messages: python3 tests/cli_test.py path/to/heed [TestCase...]

Plain Python: the files are written and read here by hand, so that the test has its own opinion of the formats.
"""

import json
import math
import os
import random
import struct
import subprocess
import sys
import tempfile
import unittest
import zipfile

HEED = os.path.abspath(sys.argv.pop(1)) if len(sys.argv) > 1 else "heed"
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LAYER = os.path.join(ROOT, "examples", "data", "minilm_layer.safetensors")
SMALL = "attention hq=2 sq=20 d=16 causal"


def heed(*words, stdin=None, **environment):
    return subprocess.run(
        [HEED, *map(str, words)],
        capture_output=True,
        text=True,
        input=stdin,
        timeout=120,
        env={**os.environ, **environment},
    )


def elements(shape):
    return math.prod(shape)


def npy(shape, values, code="f", descr="<f4", fortran=False):
    header = f"{{'descr': '{descr}', 'fortran_order': {fortran}, 'shape': {tuple(shape)}, }}\n".encode()
    return (
        b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + struct.pack(f"<{len(values)}{code}", *values)
    )


def read_npy(content):
    (size,) = struct.unpack("<H", content[8:10])
    header = eval(content[10 : 10 + size].decode(), {"__builtins__": {}})  # a literal of our own making
    data = content[10 + size :]
    code = {"<f4": "f", "<f2": "e", "<f8": "d"}[header["descr"]]
    return header["shape"], struct.unpack(f"<{len(data) // struct.calcsize(code)}{code}", data)


def safetensors(tensors):
    """tensors: name -> (dtype, shape, bytes)"""
    header, data = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def read_safetensors(content):
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    header.pop("__metadata__", None)
    return {
        name: (e["dtype"], e["shape"], content[8 + size + e["data_offsets"][0] : 8 + size + e["data_offsets"][1]])
        for name, e in header.items()
    }


def floats(values):
    return struct.pack(f"<{len(values)}f", *values)


def textbook(q, k, v, sq, sk, d, causal=False):
    """One head, row by row: (out, probabilities, lse)."""
    out, probabilities, lse = [], [], []
    for i in range(sq):
        scores = [sum(q[i * d + x] * k[j * d + x] for x in range(d)) / math.sqrt(d) for j in range(sk)]
        visible = [not causal or j <= i + sk - sq for j in range(sk)]
        total = sum(math.exp(s) for s, seen in zip(scores, visible) if seen)
        row = [math.exp(s) / total if seen else 0.0 for s, seen in zip(scores, visible)]
        probabilities += row
        out += [sum(row[j] * v[j * d + x] for j in range(sk)) for x in range(d)]
        lse.append(math.log(total))
    return out, probabilities, lse


class CommandTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="heed_cli_test_")
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def path(self, name, content=None):
        path = os.path.join(self.folder, name)
        if content is not None:
            with open(path, "wb") as file:
                file.write(content)
        return path

    def content(self, name):
        with open(os.path.join(self.folder, name), "rb") as file:
            return file.read()

    def ok(self, *words, **more):
        done = heed(*words, **more)
        self.assertEqual(done.returncode, 0, done.stderr + done.stdout)
        self.assertEqual(done.stderr, "")
        return done.stdout

    def fails(self, code, sentence, *words, **more):
        """Fails with the code and one line that holds the sentence, and nothing else."""
        done = heed(*words, **more)
        self.assertEqual(done.returncode, code, done.stderr + done.stdout)
        self.assertTrue(done.stderr.startswith("heed: "), done.stderr)
        self.assertEqual(done.stderr.count("\n"), 1, done.stderr)
        self.assertIn(sentence, done.stderr)
        return done

    def near(self, got, want, tolerance=2e-5):
        self.assertEqual(len(got), len(want))
        for a, b in zip(got, want):
            self.assertLessEqual(abs(a - b), tolerance)


class General(CommandTest):
    def test_help_has_examples_everywhere(self):
        text = self.ok("--help")
        for command in ("info", "explain", "run", "check", "bench", "warm"):
            self.assertIn(command, text)
            self.assertIn(f"  heed {command}", self.ok(command, "--help"))

    def test_version(self):
        self.assertRegex(self.ok("--version"), r"^heed \d+\.\d+\.\d+\n$")

    def test_usage_errors_are_code_2(self):
        self.fails(2, "subcommand is required")
        self.fails(2, "there is no command 'foo'; there are info, explain, run, check, bench and warm", "foo")
        self.fails(2, "--wrong", "info", "--wrong")
        self.fails(2, "problem is required", "explain")
        self.fails(2, "column 11: `hq=x`", "explain", "attention hq=x")
        self.fails(2, "--threads", "check", SMALL, "--threads", "0")
        self.fails(2, "'nonsense' is neither a problem line", "check", "nonsense")


class Info(CommandTest):
    def test_text(self):
        text = self.ok("info")
        for part in ("machine", "gpu", "kernel cache", "cpu/attention_fwd_", "ref/attention", "HEED_THREADS"):
            self.assertIn(part, text)

    def test_looking_makes_no_folder(self):
        with tempfile.TemporaryDirectory() as folder:
            cache = os.path.join(folder, "kernels")
            self.assertIn(f"{cache}: nothing yet", self.ok("info", HEED_CACHE_DIR=cache))
            self.assertFalse(os.path.exists(cache))

    def test_json(self):
        facts = json.loads(self.ok("info", "--json", HEED_THREADS="1"))
        self.assertGreaterEqual(facts["machine"]["cores"], 1)
        self.assertIn("compiler", facts["gpu"])
        self.assertTrue("device 0" in facts["gpu"] or facts["gpu"]["devices"].startswith("none: "), facts["gpu"])
        self.assertTrue(any(row["accepted"] and row["chosen"] for row in facts["implementations"]))
        for row in facts["implementations"]:
            self.assertTrue(row["accepted"] or row["reason"], row)
        threads = [row for row in facts["config"] if row["name"] == "HEED_THREADS"]
        self.assertEqual((threads[0]["value"], threads[0]["set"]), ("1", True))


class Explain(CommandTest):
    def test_words_and_quotes_are_the_same(self):
        self.assertEqual(self.ok("explain", *SMALL.split()), self.ok("explain", SMALL))
        self.assertIn("attention", self.ok("explain", SMALL))

    def test_json_and_forcing(self):
        (problem,) = json.loads(self.ok("explain", SMALL, "--json", "--backend", "ref"))
        chosen = [row["impl"] for row in problem["verdicts"] if row["chosen"]]
        self.assertEqual(chosen, ["ref/attention"])
        self.assertGreater(problem["flops"], 0)

    def test_a_backend_that_is_not_there(self):
        self.fails(2, "nothing", "explain", SMALL, "--json", "--backend", "nothing")
        explained = heed("explain", SMALL, "--backend", "nothing")
        self.assertEqual(explained.returncode, 1)
        self.assertIn('"nothing": no such backend', explained.stdout)


class RunProblem(CommandTest):
    def test_prints_what_it_did(self):
        text = self.ok("run", *SMALL.split(), "--check", "--explain", "--samples", 1)
        for part in ("problem", "backend    cpu/attention_fwd_", "GFLOP/s", "workspace", "max error", "ok"):
            self.assertIn(part, text)

    def test_json(self):
        run = json.loads(self.ok("run", SMALL, "--json", "--check", "--samples", 3, "--backend", "ref", "--threads", 1))
        self.assertEqual((run["impl"], run["samples"]), ("ref/attention", 3))
        self.assertTrue(run["check"]["passed"])
        self.assertLessEqual(run["p10_us"], run["median_us"])

    def test_backward_and_append(self):
        self.ok("run", SMALL + " pass=bwd", "--check", "--samples", 1, "-o", self.path("grads.safetensors"))
        self.assertEqual(sorted(read_safetensors(self.content("grads.safetensors"))), ["dk", "dq", "dv"])
        self.ok("run", "kv_append hkv=2 sn=2 sk=8 d=16 lk=3", "--check", "--samples", 1, "-o", self.path("cache.npz"))
        with zipfile.ZipFile(self.path("cache.npz")) as archive:
            self.assertEqual(sorted(archive.namelist()), ["k_cache.npy", "v_cache.npy"])

    def test_inputs_saved_and_run_again_give_the_same_bits(self):
        features = "b=2 hq=4 hkv=2 sq=9 sk=13 d=16 bias=f32:hij mask=bj sinks alibi softcap softcap_value=5 lse"
        for dtype, flags in (("", []), (" bf16", ["--layout", "bshd"])):
            saved, first, again = (
                self.path(name) for name in ("in.safetensors", "first.safetensors", "again.safetensors")
            )
            self.ok(
                "run", f"attention {features} causal window=6,0{dtype}", "--samples", 1, "--save-inputs", saved, "-o",
                first
            )
            self.ok(
                "run", "--input", saved, "--causal", "--window", "6,0", "--softcap", 5, *flags, "--samples", 1,
                "--check", "-o", again, "--lse", self.path("lse.safetensors")
            )
            want, got = (
                read_safetensors(self.content("first.safetensors")),
                read_safetensors(self.content("again.safetensors")),
            )
            self.assertEqual(got["out"], want["out"])
            self.assertEqual(read_safetensors(self.content("lse.safetensors"))["lse"], want["lse"])

    def test_packed_inputs_saved_and_run_again(self):
        line = "attention b=3 hq=2 d=16 layout_q=thd layout_kv=thd lq=5,0,20 lk=9,3,31 causal"
        self.ok("run", line, "--samples", 1, "--save-inputs", self.path("in.npz"), "-o", self.path("first.npy"))
        self.ok("run", self.path("in.npz"), "--causal", "--samples", 1, "--check", "-o", self.path("again.npy"))
        self.assertEqual(self.content("again.npy"), self.content("first.npy"))

    def test_gradients_from_files(self):
        features = "b=2 hq=4 hkv=2 sq=9 sk=13 d=16 sinks bias=f32:hij dlse pass=bwd"
        saved, first, again = (self.path(name) for name in ("in.safetensors", "first.safetensors", "again.npz"))
        self.ok("run", f"attention {features} causal", "--samples", 1, "--save-inputs", saved, "-o", first)
        words = ("run", saved, "--causal", "--pass", "bwd", "--samples", 1)
        self.ok(*words, "--check", "-o", again)
        with zipfile.ZipFile(again) as archive:
            got = {name[:-4]: read_npy(archive.read(name)) for name in archive.namelist()}
        want = read_safetensors(self.content("first.safetensors"))
        self.assertEqual(sorted(got), ["dbias", "dk", "dq", "dsinks", "dv"])
        for name, (dtype, shape, content) in want.items():
            self.assertEqual((dtype, tuple(shape)), ("F32", got[name][0]), name)
            self.near(got[name][1], struct.unpack(f"<{len(content) // 4}f", content))
        self.fails(2, "of the forward pass", *words, "--lse", self.path("lse.npy"))
        self.fails(2, "--pass bwd", "run", saved, "--dout", f"{saved}:dout")
        self.ok("run", SMALL, "--samples", 1, "--save-inputs", saved)
        self.fails(2, "there is no dout", "run", saved, "--pass", "bwd")

    def test_contradictions(self):
        self.fails(2, "says everything itself", "run", SMALL, "--causal")
        self.fails(2, "takes one problem line", "run", SMALL, "attention sq=4 d=8")
        self.fails(2, "nothing to run", "run")
        self.fails(2, "no lse output", "run", SMALL, "--lse", self.path("lse.npy"))
        self.fails(2, "only attention has a map", "run", "kv_append sn=1 sk=4 d=8", "--map", self.path("m.npy"))
        self.fails(1, "holds one tensor", "run", SMALL + " pass=bwd", "-o", self.path("x.npy"))
        self.fails(1, "ends in none of", "run", SMALL, "-o", self.path("x.txt"))
        self.fails(1, "No such file or directory", "run", SMALL, "-o", self.path("no/folder/x.npy"))


class RunFiles(CommandTest):
    def setUp(self):
        super().setUp()
        draw = random.Random(1)
        self.sq, self.sk, self.d = 5, 7, 8
        self.q, self.k, self.v = ([draw.gauss(0, 1) for _ in range(n * self.d)] for n in (self.sq, self.sk, self.sk))
        self.want = textbook(self.q, self.k, self.v, self.sq, self.sk, self.d)
        self.want_causal = textbook(self.q, self.k, self.v, self.sq, self.sk, self.d, causal=True)
        self.files = []
        for name, values in (("q", self.q), ("k", self.k), ("v", self.v)):
            n = len(values) // self.d
            self.files += [f"--{name}", self.path(f"{name}.npy", npy((1, n, 1, self.d), values))]

    def layer(self, prefix=""):
        return safetensors(
            {
                prefix + name: ("F32", (1, len(values) // self.d, 1, self.d), floats(values))
                for name, values in (("q", self.q), ("k", self.k), ("v", self.v))
            }
        )

    def test_npy_against_the_textbook(self):
        text = self.ok("run", *self.files, "--check", "-o", self.path("out.npy"), "--lse", self.path("lse.npy"))
        self.assertIn("sq=5", text)
        shape, out = read_npy(self.content("out.npy"))
        self.assertEqual(shape, (1, self.sq, 1, self.d))
        self.near(out, self.want[0])
        shape, lse = read_npy(self.content("lse.npy"))
        self.assertEqual(shape, (1, 1, self.sq))
        self.near(lse, self.want[2])

    def test_causal_layouts_prefixes_and_map(self):
        file = self.path("layer.safetensors", self.layer("model.3."))
        self.ok(
            "run", "--input", file + ":model.3.", "--causal", "-o", self.path("out.npy"), "--map",
            self.path("map.npy"), "--samples", 1
        )
        self.near(read_npy(self.content("out.npy"))[1], self.want_causal[0])
        shape, probabilities = read_npy(self.content("map.npy"))
        self.assertEqual(shape, (self.sq, self.sk))
        self.near(probabilities, self.want_causal[1])
        refs = [f"{file}:model.3.{name}" for name in "qkv"]
        self.ok(
            "run", "--q", refs[0], "--k", refs[1], "--v", refs[2], "--causal", "--samples", 1, "-o",
            self.path("again.npy")
        )
        self.assertEqual(self.content("again.npy"), self.content("out.npy"))

    def test_a_sequence_without_batch(self):
        files = []
        for name, values in (("q", self.q), ("k", self.k), ("v", self.v)):
            files += [f"--{name}", self.path(f"{name}3.npy", npy((1, len(values) // self.d, self.d), values))]
        self.ok(
            "run", *files, "--layout", "bhsd", "--samples", 1, "-o", self.path("out.npy"), "--lse", self.path("lse.npy")
        )
        shape, out = read_npy(self.content("out.npy"))
        self.assertEqual(shape, (1, self.sq, self.d))
        self.near(out, self.want[0])
        self.assertEqual(read_npy(self.content("lse.npy"))[0], (1, self.sq))

    def test_npz_deflated_fortran_order_and_f64(self):
        transposed = [self.q[i * self.d + x] for x in range(self.d) for i in range(self.sq)]
        with zipfile.ZipFile(self.path("layer.npz"), "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("q.npy", npy((1, self.sq, 1, self.d), transposed, fortran=True))
            archive.writestr("k.npy", npy((1, self.sk, 1, self.d), self.k, "d", "<f8"))
            archive.writestr("v.npy", npy((1, self.sk, 1, self.d), self.v, "d", "<f8"))
        self.ok("run", self.path("layer.npz"), "--dtype", "f32", "--samples", 1, "-o", self.path("out.npy"))
        self.near(read_npy(self.content("out.npy"))[1], self.want[0])

    def test_dtypes(self):
        self.ok("run", *self.files, "--dtype", "f16", "--check", "--samples", 1, "-o", self.path("out.npy"))
        self.near(read_npy(self.content("out.npy"))[1], self.want[0], 5e-3)
        self.ok(
            "run", *self.files, "--dtype", "bf16", "--out-dtype", "f32", "--check", "--samples", 1, "-o",
            self.path("out.npy")
        )
        self.near(read_npy(self.content("out.npy"))[1], self.want[0], 5e-2)
        self.ok("run", *self.files, "--dtype", "bf16", "--samples", 1, "-o", self.path("out.npy"))
        self.assertIn(b"'descr': '<V2'", self.content("out.npy"))
        self.ok(
            "run", "--q", self.path("q.npy"), "--k", self.path("k.npy"), "--v", self.path("v.npy"), "--dtype", "bf16",
            "--samples", 1, "--save-inputs", self.path("bf16.safetensors"), "-o", self.path("first.npy")
        )
        self.ok("run", self.path("bf16.safetensors"), "--samples", 1, "-o", self.path("again.npy"))
        self.assertEqual(self.content("again.npy"), self.content("first.npy"))

    def test_packed_with_i64_lengths_and_the_map_of_its_second_sequence(self):
        starts = self.path("cu.npy", npy((3,), [0, 0, self.sq], "q", "<i8"))
        starts_k = self.path("cuk.npy", npy((3,), [0, 0, self.sk], "q", "<i8"))
        files = []
        for name, values in (("q", self.q), ("k", self.k), ("v", self.v)):
            files += [f"--{name}", self.path(f"{name}3.npy", npy((len(values) // self.d, 1, self.d), values))]
        files += ["--cu-seqlens-q", starts, "--cu-seqlens-k", starts_k]
        self.ok(
            "run", *files, "--causal", "--samples", 1, "-o", self.path("out.npy"), "--map", self.path("map.npy"),
            "--batch", 1
        )
        self.near(read_npy(self.content("out.npy"))[1], self.want_causal[0])
        self.near(read_npy(self.content("map.npy"))[1], self.want_causal[1])
        self.ok("run", *files, "--samples", 1, "--map", self.path("map.npy"), "--batch", 0)
        self.assertEqual(read_npy(self.content("map.npy"))[0], (0, 0))
        bad = self.path("bad.npy", npy((3,), [0, 99, self.sq], "q", "<i8"))
        self.fails(1, "cu_seqlens_k", "run", *files[:-1], bad)

    def test_a_mask_of_two_dimensions(self):
        mask = [1 if j <= i + self.sk - self.sq else 0 for i in range(self.sq) for j in range(self.sk)]
        file = self.path("mask.npy", npy((self.sq, self.sk), mask, "B", "|b1"))
        self.ok(
            "run", *self.files, "--mask", file, "--samples", 1, "-o", self.path("out.npy"), "--map",
            self.path("map.npy")
        )
        self.near(read_npy(self.content("out.npy"))[1], self.want_causal[0])
        self.near(read_npy(self.content("map.npy"))[1], self.want_causal[1])

    def test_the_real_layer(self):
        run = json.loads(self.ok("run", LAYER, "--check", "--json", "--map", self.path("map.npy"), "--head", 1))
        self.assertTrue(run["check"]["passed"])
        (rows, columns), probabilities = read_npy(self.content("map.npy"))
        for row in range(rows):
            self.assertAlmostEqual(sum(probabilities[row * columns : (row + 1) * columns]), 1.0, places=4)

    def test_every_fault_is_one_sentence(self):
        q, k, v = self.files[0:2], self.files[2:4], self.files[4:6]
        none, good = self.path("none.npy"), self.content("q.npy")
        self.fails(1, "none.npy: No such file or directory", "run", "--q", none, *k, *v)
        self.fails(
            1,
            "truncated: shape [1, 5, 1, 8] of f32 needs 160 bytes, 159 are there",
            "run",
            "--q",
            self.path("cut.npy", good[:-1]),
            *k,
            *v,
        )
        self.fails(1, "dtype is '<u2'", "run", "--q", self.path("u2.npy", npy((2,), [1, 2], "H", "<u2")), *k, *v)
        self.fails(
            1, "q has shape [5], which is no bshd", "run", "--q", self.path("flat.npy", npy((5,), [0.0] * 5)), *k, *v
        )
        self.fails(1, "k", "run", *q, "--k", self.path("d4.npy", npy((1, 7, 1, 4), [0.0] * 28)), *v)
        self.fails(
            1, "add --dtype f32", "run", "--q", self.path("f64.npy", npy((1, 5, 1, 8), self.q, "d", "<f8")), *k, *v
        )
        self.fails(1, "mask is bool", "run", *self.files, "--mask", self.path("m.npy", npy((5, 7), [0.0] * 35)))
        self.fails(2, "there is no v: give --v FILE[:NAME]", "run", *q, *k)
        self.fails(
            1, "none of its tensors is named x.q", "run", "--input", self.path("l.safetensors", self.layer()) + ":x."
        )
        self.fails(
            1, "it has no tensor 'w'; it holds: k, q, v", "run", "--q", self.path("l.safetensors") + ":w", *k, *v
        )
        self.fails(1, "truncated", "run", self.path("cut.safetensors", self.layer()[:-3]))
        self.fails(1, "no readable .npz archive", "run", self.path("x.npz", b"nothing"))
        self.fails(2, "--offset is 'left'; allowed are top and whole numbers", "run", *self.files, "--offset", "left")
        self.fails(2, "--layout", "run", *self.files, "--layout", "hsbd")
        self.fails(2, "--window", "run", *self.files, "--window", "3")
        self.fails(
            2,
            "--head is 3; there are 1 heads",
            "run",
            *self.files,
            "--samples",
            1,
            "--map",
            self.path("m.npy"),
            "--head",
            3,
        )
        self.fails(2, "nobody", "run", *self.files, "--backend", "nobody")
        self.assertFalse(os.path.exists(self.path("out.npy")))


class Check(CommandTest):
    def test_lines_files_and_stdin(self):
        self.assertIn("1 passed, 0 failed", self.ok("check", SMALL))
        self.assertIn("2 passed, 0 failed", self.ok("check", *SMALL.split(), *"attention sq=3 d=8 bf16".split()))
        file = self.path(
            "lines.txt", f"# three\n{SMALL}\n\n{SMALL} pass=bwd  # backward\nkv_append sn=1 sk=4 d=8\n".encode()
        )
        self.assertIn("3 passed, 0 failed", self.ok("check", file))
        self.assertIn("1 passed, 0 failed", self.ok("check", "-", stdin=SMALL + "\n"))

    def test_every_implementation(self):
        rows = json.loads(self.ok("check", SMALL, "--impl", "all", "--json"))["rows"]
        self.assertGreaterEqual(len(rows), 1)
        self.assertEqual(len({row["impl"] for row in rows}), len(rows))
        self.assertTrue(all(row["passed"] and row["report"]["tensors"] for row in rows))
        rows = json.loads(self.ok("check", SMALL, "--impl", "ref/attention", "--json", "--threads", 1))["rows"]
        self.assertEqual([row["impl"] for row in rows], ["ref/attention"])

    def test_what_cannot_be_done_is_a_failure(self):
        done = heed("check", SMALL, "attention sq=3 d=8 f64", "--backend", "cpu")
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertIn("1 passed, 1 failed", done.stdout)
        self.assertIn("FAILED", done.stdout)

    def test_faults(self):
        self.fails(
            2,
            "lines.txt:2: ",
            "check",
            self.path("lines.txt", b"attention sq=3 d=8\nattention sq=3 d=8 causal causal\n"),
        )
        self.fails(2, "no problem line in it", "check", self.path("empty.txt", b"# nothing\n"))
        self.fails(2, "nowhere", "check", SMALL, "--backend", "nowhere")


class Bench(CommandTest):
    def test_table_and_json(self):
        text = self.ok(
            "bench", SMALL, "attention sq=1 sk=64 d=16", "--threads", "1,2", "--samples", 3, "--min-time", 0.1,
            "--backend", "all", "--json", self.path("bench.json")
        )
        for part in ("GFLOP/s", "% peak", "GB/s", "peak on 1 thread", "peak on 2 threads", "plan cached"):
            self.assertIn(part, text)
        report = json.loads(self.content("bench.json"))
        self.assertEqual(
            sorted(report), ["command", "date", "gpu_rows", "heed", "host", "machine", "peak_gflops", "read_gbs", "rows"]
        )
        self.assertTrue(report["command"].startswith("heed bench"))
        self.assertEqual(sorted(report["peak_gflops"]), ["1", "2"])
        cells = {(row["problem"], row["impl"], row["threads"]) for row in report["rows"]}
        self.assertEqual(len(cells), len(report["rows"]))
        for row in report["rows"]:
            self.assertEqual((row["peer"], row["samples"]), ("heed", 3))
            self.assertLessEqual(row["p10_us"], row["median_us"])
            self.assertLessEqual(row["median_us"], row["p90_us"])
            self.assertGreater(row["gflops"], 0)
            self.assertGreater(row["gbs"], 0)

    def test_a_gpu_has_its_own_table_or_a_reason(self):
        line = "attention sq=3 d=8 bf16 device=cuda"
        done = heed("bench", line, SMALL, "--hot", "--threads", 1, "--samples", 2, "--min-time", 0.1, "--json",
                    self.path("gpu.json"))
        rows = json.loads(self.content("gpu.json"))["gpu_rows"]
        self.assertIn("GFLOP/s", done.stdout)
        if done.returncode == 0:
            self.assertEqual([(row["problem"], row["regime"], row["samples"]) for row in rows], [(line, "hot", 2)])
            self.assertGreater(rows[0]["host_call_us"], 0)
            self.assertIn("host call", done.stdout)
        else:
            self.assertEqual((done.returncode, rows), (1, []))
            self.assertTrue(done.stderr.startswith(f"heed: {line}: "), done.stderr)
            self.assertIn("CUDA", done.stderr)

    def test_one_that_cannot_be_done_does_not_stop_the_others(self):
        done = heed(
            "bench",
            "attention sq=3 d=8 f64",
            SMALL,
            "--backend",
            "cpu",
            "--threads",
            1,
            "--samples",
            1,
            "--min-time",
            0.1,
        )
        self.assertEqual(done.returncode, 1)
        self.assertIn(SMALL, done.stdout)
        self.assertTrue(done.stderr.startswith("heed: attention sq=3 d=8 f64: "), done.stderr)

    def test_faults(self):
        self.fails(2, "nobody", "bench", SMALL, "--backend", "nobody")
        self.fails(2, "--threads", "bench", SMALL, "--threads", "0")
        self.fails(
            1,
            "cannot be written",
            "bench",
            SMALL,
            "--samples",
            1,
            "--threads",
            1,
            "--json",
            self.path("no/such/x.json"),
        )


if __name__ == "__main__":
    unittest.main()
