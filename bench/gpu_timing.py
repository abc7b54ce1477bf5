"""Device time of contenders: replayed CUDA graphs, samples of all contenders in turn.

rested   60 ms of rest before each sample: the chip is cool and clocks as high as they get
hot      samples back to back after a run-in: the chip's power limit rules
"""

import statistics
import time

import torch

REST_SECONDS = 0.060
SAMPLE_SECONDS = 0.005    # calls are repeated within a sample until it takes about so long
RUN_IN_SECONDS = 0.2
MAX_CALLS = 200
SLOW = 4.0                # contenders this many times slower than the first are noted, not timed


def quantile(samples, q):
    ordered = sorted(samples)
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def calls_of(seconds, sets):
    """Calls of one sample: a multiple of the sets, so that each is used alike."""
    calls = max(1, min(MAX_CALLS, round(SAMPLE_SECONDS / max(seconds, 1e-7))))
    return -(-calls // sets) * sets


class Graph:
    """Calls of one contender, captured once."""

    def __init__(self, contender, sets):
        self.contender = contender
        self.stream = torch.cuda.Stream()
        self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self.stream):
            for i in range(sets):
                contender.run(i)
            self.begin.record()
            for i in range(3 * sets):
                contender.run(i % sets)
            self.end.record()
        self.stream.synchronize()
        self.rough_seconds = self.begin.elapsed_time(self.end) * 1e-3 / (3 * sets)
        self.calls = calls_of(self.rough_seconds, sets)
        self.graph, self.sets = None, sets

    def capture(self):
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            for i in range(self.calls):
                self.contender.run(i % self.sets)
        self.sample()  # the first replay uploads the graph

    def sample(self):
        """Seconds per call."""
        with torch.cuda.stream(self.stream):
            self.begin.record()
            self.graph.replay()
            self.end.record()
        self.end.synchronize()
        return self.begin.elapsed_time(self.end) * 1e-3 / self.calls


def race(graphs, samples, regime):
    """[[seconds, ...] for each graph], taken in turn, forwards and backwards."""
    taken = [[] for _ in graphs]
    if regime == "hot":
        until = time.perf_counter() + RUN_IN_SECONDS
        while time.perf_counter() < until:
            for graph in graphs:
                graph.sample()
    for sample in range(samples):
        order = range(len(graphs)) if sample % 2 == 0 else range(len(graphs) - 1, -1, -1)
        for i in order:
            if regime == "rested":
                time.sleep(REST_SECONDS)
            taken[i].append(graphs[i].sample())
    return taken


def summary(seconds):
    return {"median_us": statistics.median(seconds) * 1e6, "p10_us": quantile(seconds, 0.1) * 1e6,
            "p90_us": quantile(seconds, 0.9) * 1e6, "samples": len(seconds)}


def python_host_us(contender, calls=64, samples=15):
    """Microseconds of the calling thread for one call from Python; too few calls to fill the driver's queue."""
    taken = []
    for _ in range(samples):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            contender.run(0)
        taken.append((time.perf_counter() - begin) / calls)
    torch.cuda.synchronize()
    return statistics.median(taken) * 1e6
