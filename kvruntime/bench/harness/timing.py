"""How long a kernel takes: calls captured in a CUDA graph and replayed, so that no launch from the host is in the time.

A timer takes *calls*, one for each of several independent copies of the data, which together exceed the L2 cache: each
call finds its data as cold as a model's next layer would.  Its answer is the time of one call.  A graph holds at least
``LEAST_CALLS`` of them, as a model's step holds its layers: the start of a graph, some microseconds, is not a layer's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from time import perf_counter
from typing import Any

import torch

Call = Callable[[], Any]
REPLAYS = (20, 200)
"""Least and most replays of a graph; between them, as many as fit into ``SECONDS``."""
SECONDS = 0.1
LEAST_CALLS = 16
"""Calls in a graph: all copies, over and over."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, 10th and 90th percentile of ``replays`` passes over ``copies`` calls."""

    seconds: float
    low: float
    high: float
    replays: int
    copies: int

    @property
    def spread(self) -> list[float]:
        return [self.seconds, self.low, self.high]


Timer = Callable[[Sequence[Call]], Timing]


def summary(passes: Sequence[float], copies: int) -> Timing:
    """``passes`` (seconds, each of ``copies`` calls) in one :class:`Timing`."""
    ordered = sorted(seconds / copies for seconds in passes)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]

    return Timing(at(0.5), at(0.1), at(0.9), len(ordered), copies)


def graph_timer(calls: Sequence[Call]) -> Timing:
    """The calls one after another in one CUDA graph, replayed; on the current device.

    Every call runs twice beforehand: to compile what it needs, then into the graph.  Raises what a call raises.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    rounds = -(-LEAST_CALLS // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in list(calls) * rounds:
            call()
    return replace(replay_timer(graph.replay, len(calls) * rounds), copies=len(calls))


def replay_timer(replay: Call, copies: int = 1, seconds: float = SECONDS, replays: tuple[int, int] = REPLAYS) -> Timing:
    """``replay()`` does ``copies`` calls on the current stream and does not wait; timed with events, back to back."""
    for _ in range(3):
        replay()
    torch.cuda.synchronize()
    one = timed_passes(replay, 3)
    count = max(replays[0], min(replays[1], int(seconds / max(min(one), 1e-7))))
    return summary(timed_passes(replay, count, warm=2), copies)


def timed_passes(replay: Call, count: int, warm: int = 0) -> list[float]:
    """Seconds of each of ``count`` replays back to back on the current device's stream, after ``warm`` untimed ones."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    for _ in range(warm):  # the device is busy when the first event comes: no launch from the host lies in between
        replay()
    events[0].record()
    for event in events[1:]:
        replay()
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in pairwise(events)]


def eager_timer(calls: Sequence[Call]) -> Timing:
    """The calls as Python makes them, launches included, for what cannot be captured; on the current device."""

    def replay() -> None:
        for call in calls:
            call()

    replay()
    return replay_timer(replay, len(calls), replays=(5, 20))


def wall_timer(calls: Sequence[Call]) -> Timing:
    """The host's clock around the calls: for a CPU."""
    passes = []
    for _ in range(3):
        start = perf_counter()
        for call in calls:
            call()
        passes.append(perf_counter() - start)
    return summary(passes, len(calls))


@dataclass(frozen=True)
class Bench:
    """Where and how it is measured: ``timer`` for kernels, ``eager`` for what Python drives.

    ``cold``: bytes that the copies of the data exceed together.
    """

    device: torch.device
    timer: Timer
    eager: Timer
    cold: int
    seed: int = 0

    def generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(self.seed)

    def copies(self, size: int) -> int:
        """Copies of ``size`` bytes that together are cold."""
        return max(1, min(MAX_COPIES, -(-self.cold // max(1, size))))


MAX_COPIES = 512
COLD_FACTOR = 4.4


def cuda_bench(device: torch.device, seed: int = 0) -> Bench:
    """On a CUDA device: graphs, and copies of 4.4 times its L2 cache (220 MB on an H100)."""
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 50 << 20)
    return Bench(device, graph_timer, eager_timer, int(COLD_FACTOR * cache), seed)


def cpu_bench(seed: int = 0) -> Bench:
    """On a CPU, where the PyTorch reference runs: one copy and the wall clock."""
    return Bench(torch.device("cpu"), wall_timer, wall_timer, 1, seed)
