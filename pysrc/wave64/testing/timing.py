"""Clocks: how long a call takes, and the most that this machine was seen to do in the same run.

On a GPU a call is captured in a graph, so that the host's part of it does not count; a time is the median of the
graph's replays between two events, each after the L2 cache was overwritten, since a server's layers leave nothing of
a cache that is read again a step later. On a CPU it is the median of the wall clock: enough to test what uses it.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from wave64.op import Cost

#: More than any L2 cache, so that writing as much leaves nothing else in it.
FLUSH_BYTES = 2**28


@dataclass(frozen=True)
class Peaks:
    """Measured, not a data sheet's: gigabytes read per second, and TFLOP/s of a large bf16 matrix product."""

    read_gbs: float
    matmul_tflops: float

    def min_ms(self, cost: Cost) -> float:
        """The roofline: what the call would take if it did nothing but the larger of its reading and its products."""
        return max(cost.bytes / self.read_gbs / 1e6, cost.flops / self.matmul_tflops / 1e9)


@dataclass(frozen=True)
class Speed:
    """A time, and what it comes to for the bytes and operations of `Cost`; shares are of 1."""

    us: float
    gbs: float
    read_share: float
    roofline_share: float
    tflops: float


def speed(ms: float, cost: Cost, peaks: Peaks) -> Speed:
    gbs = cost.bytes / ms / 1e6
    return Speed(ms * 1e3, gbs, gbs / peaks.read_gbs, peaks.min_ms(cost) / ms, cost.flops / ms / 1e9)


def measure_peaks(device: str) -> Peaks:
    """Reads 2 GiB and multiplies two matrices of 8192 x 8192 (on a CPU much less: the figure is for show there)."""
    gpu = device == "cuda"
    n = 8192 if gpu else 512
    a, b = torch.randn(2, n, n, dtype=torch.bfloat16, device=device)
    product = torch.empty_like(a)
    multiply = median_ms(lambda: torch.mm(a, b, out=product), device)
    block = torch.randn(2**30 if gpu else 2**24, dtype=torch.bfloat16, device=device)
    read = median_ms(lambda: block.sum(), device)
    return Peaks(block.nbytes / read / 1e6, 2 * n**3 / multiply / 1e9)


def captured(call: Callable[[], Any], device: str) -> Callable[[], Any]:
    """The same call as a replay of one graph, whose result is written anew each time, where it was. (CPU: `call`.)"""
    if device != "cuda":
        return call
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # what compiles, or allocates once, does so before the capture
        call()
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay():
        graph.replay()
        return result

    return replay


def median_ms(run: Callable[[], Any], device: str, warm_up_ms: float = 50, repeat_ms: float = 200) -> float:
    """Milliseconds that `run` takes, the median of as many runs as last about `repeat_ms` with the flushes between."""
    if device != "cuda":
        return _wall_ms(run)
    run()
    cache = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    once = _event_ms(lambda: (cache.zero_(), run()), 5)
    for _ in range(max(1, int(warm_up_ms / once))):
        run()
    count = max(1, int(repeat_ms / once))
    begin, end = ([torch.cuda.Event(enable_timing=True) for _ in range(count)] for _ in range(2))
    for i in range(count):
        cache.zero_()
        begin[i].record()
        run()
        end[i].record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in zip(begin, end, strict=True))


def _event_ms(run: Callable[[], Any], times: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(times):
        run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / times


def _wall_ms(run: Callable[[], Any], times: int = 3) -> float:
    taken = []
    for _ in range(times):
        begin = time.perf_counter()
        run()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken) * 1e3
