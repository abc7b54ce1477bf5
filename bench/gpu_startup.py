#!/usr/bin/env python3
"""What the first call of a process costs on a GPU: a program of its own, without PyTorch, run by peers_gpu.py with an
empty kernel cache and with a warm one. Prints one JSON object of milliseconds.

    HEED_CACHE_DIR=/tmp/empty PYTHONPATH=build/gpu \\
        python3 bench/gpu_startup.py 'attention hq=8 sq=512 d=64 bf16 device=cuda'
"""

import json
import sys
import time


def main(line):
    begin = time.perf_counter()
    from heed import _core
    imported = time.perf_counter()
    inputs = _core.Inputs(line)  # the driver, a context, tensors in the device's memory
    args = inputs.args

    def call():
        start = time.perf_counter()
        args()
        _core.stream_synchronize(args.device, args.device_index, args.stream)
        return (time.perf_counter() - start) * 1e3
    ready = time.perf_counter()
    first, second = call(), call()
    print(json.dumps({"problem": line, "import_ms": (imported - begin) * 1e3, "context_ms": (ready - imported) * 1e3,
                      "first_call_ms": first, "second_call_ms": second}))


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]))
