"""What heed says of GPUs on any machine, and does on one that has none: python3 tests/cli_device_test.py path/to/heed"""

import json
import os
import unittest

from cli_test import SMALL, CommandTest, heed


def has_gpu():
    return "device 0" in json.loads(heed("info", "--json").stdout)["gpu"]


class Warm(CommandTest):
    LINE = "attention b=2 hq=2 sq=64 d=64 bf16"

    def test_what_cannot_be_compiled(self):
        self.fails(1, 'architecture = "sm_1": must be one of sm_80', "warm", self.LINE, "--arch", "sm_1")
        self.fails(1, "no GPU kernel does", "warm", self.LINE + " pass=bwd", "--arch", "sm_90a")
        missing = {"HEED_NVRTC": self.path("no-libnvrtc.so"), "HEED_CACHE_DIR": self.path("cache")}
        done = heed("warm", self.LINE, "--arch", "sm_90a", **missing)
        self.assertEqual(done.returncode, 1)
        self.assertIn("no-libnvrtc.so: cannot be opened", done.stderr)
        self.fails(1, "no folder for compiled kernels", "warm", self.LINE, "--arch", "sm_90a", HEED_CACHE_DIR="/dev/null/x")
        self.fails(2, "--jobs", "warm", self.LINE, "--jobs", "0")

    @unittest.skipUnless(os.environ.get("HEED_TEST_NVRTC"), "HEED_TEST_NVRTC names no compiler")
    def test_compiles_once(self):
        where = {"HEED_NVRTC": os.environ["HEED_TEST_NVRTC"], "HEED_CACHE_DIR": self.path("cache")}
        words = ("warm", self.LINE, self.LINE + " used_k", "--arch", "sm_80", "--json", "--jobs", "2")
        first = json.loads(self.ok(*words, **where))
        self.assertEqual((first["problems"], first["compiled"]), (2, first["kernels"]))
        self.assertEqual(len(os.listdir(self.path("cache"))), first["kernels"])
        again = json.loads(self.ok(*words, **where))
        self.assertEqual((again["kernels"], again["compiled"]), (first["kernels"], 0))
        self.assertIn(f"{first['kernels']} kernel", json.loads(self.ok("info", "--json", **where))["gpu"]["kernel cache"])


class Devices(CommandTest):
    def test_names(self):
        for command in ("explain", "check", "bench"):
            self.fails(2, "is 'gpu'; allowed are cpu, cuda and cuda:N", command, SMALL, "--device", "gpu")
        self.fails(2, "is 'cuda:x'; allowed are auto, cpu, cuda and cuda:N", "run", SMALL, "--device", "cuda:x")

    def test_the_option_wins_over_the_line(self):
        (problem,) = json.loads(self.ok("explain", SMALL + " device=cuda", "--device", "cpu", "--json"))
        self.assertTrue(any(row["chosen"] and row["impl"].startswith("cpu/") for row in problem["verdicts"]))
        done = heed("explain", SMALL + " threads=1", "--device", "cuda:0")
        self.assertIn("device=cuda", done.stdout)
        self.assertNotIn("threads=1", done.stdout)

    def test_run_says_where(self):
        run = json.loads(self.ok("run", SMALL, "--json", "--samples", 1, "--device", "cpu"))
        self.assertEqual(run["device"], "cpu")
        run = json.loads(self.ok("run", SMALL, "--json", "--samples", 1, "--backend", "ref"))
        self.assertEqual(run["device"], "cpu: --backend ref")
        run = json.loads(self.ok("run", SMALL, "--json", "--samples", 1, "--threads", 1))
        self.assertEqual(run["device"], "cpu: --threads is of the CPU")

    def test_auto_takes_what_there_is(self):
        run = json.loads(self.ok("run", SMALL, "--json", "--samples", 1, "--check"))
        if has_gpu():
            self.assertTrue(run["device"].startswith("cuda: "), run["device"])
            self.assertTrue(run["impl"].startswith("cuda/"), run["impl"])
        else:
            self.assertRegex(run["device"], "^cpu: .*CUDA driver|^cpu: .*GPU")
            self.assertTrue(run["impl"].startswith("cpu/"), run["impl"])
        run = json.loads(self.ok("run", SMALL + " pass=bwd", "--json", "--samples", 1))
        self.assertTrue(run["impl"].startswith("cpu/"), run["impl"])

    @unittest.skipIf(has_gpu(), "there is a GPU")
    def test_no_gpu_is_an_error_that_says_so(self):
        for words in (("run", SMALL, "--device", "cuda"), ("run", SMALL + " device=cuda"), ("warm", SMALL)):
            done = heed(*words)
            self.assertEqual(done.returncode, 1, done.stdout)
            self.assertRegex(done.stderr, "libcuda|GPU")
        done = heed("check", SMALL, "--device", "cuda")
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stdout, "libcuda|GPU")
        self.assertEqual(heed("explain", SMALL, "--device", "cuda").returncode, 1)

    @unittest.skipUnless(has_gpu(), "there is no GPU")
    def test_files_on_the_gpu_as_on_the_cpu(self):
        line = "attention b=2 hq=4 hkv=2 sq=70 sk=90 d=64 bf16 causal"
        saved = self.path("in.npz")
        self.ok("run", line, "--samples", 1, "--device", "cuda", "--save-inputs", saved, "-o", self.path("a.npy"))
        self.ok("run", line, "--samples", 1, "--device", "cpu", "--save-inputs", self.path("cpu.npz"))
        self.assertEqual(self.content("in.npz"), self.content("cpu.npz"))
        words = ("run", saved, "--causal", "--samples", 1, "--check")
        text = self.ok(*words, "--device", "cuda", "-o", self.path("b.npy"), "--map", self.path("map.npy"))
        self.assertIn("cuda/", text)
        self.assertEqual(self.content("a.npy"), self.content("b.npy"))


if __name__ == "__main__":
    unittest.main()
