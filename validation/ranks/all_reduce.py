"""Seconds of an all-reduce by size, launched one by one and in a CUDA graph, as a decode step holds them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist

from kvruntime.bench.harness.store import Row
from kvruntime.bench.harness.timing import timed_passes
from validation.ranks.group import Group

SIZES = tuple(2 << power for power in range(10, 26))
"""2 KiB to 64 MiB: a token's hidden state of a small model, and a prompt's of a large one."""
MANY, LEAST, PASSES = 40, 4, 9
"""All-reduces in a pass, of the shortest and of the longest; and passes."""
LONG = 16 << 20


def curve(group: Group, sizes: Sequence[int] = SIZES) -> Iterator[Row]:
    """A row a size and way: the median, least and most of ``PASSES`` passes, each of the rank that took longest."""
    for nbytes in sizes:
        tensor = torch.zeros(nbytes // 2, dtype=torch.bfloat16, device=group.device)
        count = max(LEAST, min(MANY, MANY * LONG // (8 * nbytes)))

        def reduce(tensor: torch.Tensor = tensor, count: int = count) -> None:
            for _ in range(count):
                dist.all_reduce(tensor)

        for way in ("eager", "graph") if group.device.type == "cuda" else ("eager",):
            replay = captured(reduce) if way == "graph" else reduce
            passes = group.slowest([seconds / count for seconds in _passes(group, replay)])
            found: Row = {"kind": "all_reduce", "way": way, "nbytes": nbytes}
            yield found | {"seconds": [median(passes), min(passes), max(passes)], "passes": PASSES, "calls": count}


def captured(work: Callable[[], None]) -> Callable[[], None]:
    """``work`` as the replay of a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    return graph.replay


def _passes(group: Group, replay: Callable[[], Any]) -> list[float]:
    replay()
    group.wait()
    if group.device.type == "cuda":
        return timed_passes(replay, PASSES, warm=2)
    out = []
    for _ in range(PASSES):
        start = perf_counter()
        replay()
        out.append(perf_counter() - start)
    return out
