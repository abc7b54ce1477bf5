"""The two small C++ libraries of this folder, compiled when first needed and kept in the user's cache folder."""

import ctypes
import glob
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent


class Unavailable(Exception):
    """A peer that cannot take part; the text says why."""


def cache_folder():
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = pathlib.Path(base) / "heed-bench"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def compile_library(source, flags):
    """The path of the shared library made of `source`, built unless the same text, flags and CPU were built before."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        raise Unavailable("no C++ compiler (g++ or clang++)")
    text = (HERE / source).read_bytes()
    native = subprocess.run([compiler, "-march=native", "-E", "-dM", "-x", "c++", os.devnull],
                            capture_output=True).stdout
    key = hashlib.sha256(b"\0".join([text, native, compiler.encode(), " ".join(flags).encode()])).hexdigest()[:16]
    library = cache_folder() / f"{pathlib.Path(source).stem}-{key}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
            made = pathlib.Path(folder) / library.name
            command = [compiler, "-std=c++20", "-fPIC", "-shared", str(HERE / source), "-o", str(made), *flags]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:300])
                raise Unavailable(f"{source} does not compile: {first}")
            os.replace(made, library)
    return library


class Probe:
    """Multiply-adds a second, bytes read a second, host time of a call: bench/probe.cpp."""

    def __init__(self):
        library = ctypes.CDLL(str(compile_library("probe.cpp", ["-O3", "-march=native", "-pthread"])))
        for name in ("probe_fma", "probe_bf16", "probe_read", "probe_calls"):
            getattr(library, name).restype = ctypes.c_double
        library.probe_calls.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64, ctypes.c_void_p]
        self._library = library

    def gflops(self, threads, rounds=150_000):
        """f32 multiply-add peak; some 30 ms on one core."""
        return self._library.probe_fma(threads, ctypes.c_int64(rounds)) / 1e9

    def bf16_gflops(self, threads, rounds=150_000):
        """Peak of the bf16 dot instruction, 0 without one."""
        return self._library.probe_bf16(threads, ctypes.c_int64(rounds)) / 1e9

    def read_seconds(self, threads, ranges):
        """Seconds to read every (address, bytes) range once."""
        count = len(ranges)
        data = (ctypes.c_void_p * count)(*[address for address, _ in ranges])
        sizes = (ctypes.c_size_t * count)(*[size for _, size in ranges])
        return self._library.probe_read(threads, count, data, sizes)

    def call_seconds(self, function, a, b, calls, before=None):
        """Seconds per call of the C function `function(a, b)`; NaN where it fails."""
        seconds = self._library.probe_calls(function, a, b, calls, before)
        return seconds if seconds >= 0 else float("nan")


def load_onednn():
    """The oneDNN driver, over the wheels onednn, onednn-devel and tbb-devel."""
    prefix = pathlib.Path(sys.prefix)
    lib, include = prefix / "lib", prefix / "include"
    if not (lib / "libdnnl.so").exists() or not (include / "oneapi/dnnl/dnnl_graph.hpp").exists():
        raise Unavailable("oneDNN is not installed: pip install onednn onednn-devel tbb-devel")
    if not (include / "oneapi/tbb/global_control.h").exists():
        raise Unavailable("oneDNN's driver needs TBB's headers: pip install tbb-devel")
    # The wheel's CPU engine is a SYCL device, which the OpenCL CPU runtime beside it provides; and its libraries find
    # each other only if they are loaded already.
    os.environ.setdefault("OCL_ICD_FILENAMES", str(lib / "libintelocl.so"))
    library_file = compile_library("onednn_sdpa.cpp", [
        "-O2", f"-I{include}", f"-L{lib}", "-ldnnl", "-ltbb", "-Wl,--allow-shlib-undefined", f"-Wl,-rpath,{lib}"])
    for stem in ("libtbb.so", "libimf.so", "libintlc.so", "libsvml.so", "libsycl.so"):
        for name in sorted(glob.glob(str(lib / (stem + ".*[0-9]"))) or [str(lib / stem)], key=len)[:1]:
            try:
                ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
            except OSError as error:
                raise Unavailable(f"oneDNN's {stem} does not load: {error}") from None
    try:
        library = ctypes.CDLL(str(library_file))
    except OSError as error:
        raise Unavailable(f"oneDNN does not load: {error}") from None
    library.onednn_version.restype = ctypes.c_char_p
    library.onednn_create.argtypes = ([ctypes.c_int64] * 6 + [ctypes.c_int, ctypes.c_int, ctypes.c_size_t,
                                      ctypes.POINTER(ctypes.c_void_p), ctypes.c_char_p, ctypes.c_size_t])
    library.onednn_run.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_char_p, ctypes.c_size_t]
    library.onednn_destroy.argtypes = [ctypes.c_void_p]
    return library
