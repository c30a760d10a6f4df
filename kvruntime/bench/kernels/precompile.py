"""Compile kernels in several processes before anything is timed; Triton's cache on disk hands them on."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing import TimeoutError, get_context
from time import perf_counter
from typing import NamedTuple

import torch

from kvruntime.bench.harness.timing import Bench, wall_timer
from kvruntime.bench.kernels.attention import Shape, Tokens, dtype_of
from kvruntime.methods import Steps, make_layer, room_of
from kvsim.layout import Method

SECONDS = 150.0
MAX_JOBS = 8
FILLING = 256
"""Tokens that a layer is given where its room does not say how many use every kernel."""


class Case(NamedTuple):
    """A layer's size and method; ``steps``: what stores one token at a time is wanted too."""

    shape: Shape
    method: Method
    steps: bool = False


def compile_ahead(cases: Sequence[Case], device: str, say: Callable[[str], None]) -> None:
    """Runs every case once, nearly empty, in other processes.  What fails there fails again where it is measured."""
    groups: dict[object, list[Case]] = {}
    for case in cases:  # one process a kernel: cases that differ in lengths only share it
        shape = case.shape
        key = (shape.num_q_heads, shape.num_kv_heads, shape.head_dim, shape.batch_size == 1, case.method)
        groups.setdefault(key, []).append(case)
    jobs = min(MAX_JOBS, (os.cpu_count() or 2) // 2, len(groups))
    if jobs < 2:
        return
    start = perf_counter()
    say(f"compiling {len(groups)} kernels in {jobs} processes")
    with get_context("spawn").Pool(jobs) as pool:
        work = pool.map_async(compile_group, [(group, device) for group in groups.values()], chunksize=1)
        try:
            failures = [failure for found in work.get(SECONDS) for failure in found]
        except TimeoutError:
            failures = [f"not all within {SECONDS:.0f} s"]
        except Exception as error:
            failures = [f"{type(error).__name__}: {error}"]
    for failure in failures:
        say(f"not compiled ahead: {failure}")
    say(f"compiled in {perf_counter() - start:.0f} s")


def compile_group(work: tuple[Sequence[Case], str]) -> list[str]:
    """Appends to and attends over a nearly empty layer of each case's size; a line for each that fails."""
    cases, device = work
    bench = Bench(torch.device(device), wall_timer, wall_timer, 1)
    failures = []
    for case in cases:
        try:
            run_once(bench, case)
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            failures.append(f"{case.shape.model} {case.method.name}: {type(error).__name__}: {first}")
    return failures


def run_once(bench: Bench, case: Case) -> None:
    """Fill the layer, attend; with ``steps``, store single tokens as ``append`` and as the engine do."""
    shape, method = replace(case.shape, lengths=None), case.method
    longest = max(case.shape.row_lengths)
    own = room_of(method).measures
    tokens = Tokens(bench, shape, dtype_of(method))
    layer = make_layer(method, shape.layer, shape.batch_size, longest, bench.device)
    layer.append(*tokens.pair(min(longest - 4, own.filling(method) if hasattr(own, "filling") else FILLING)))
    query = tokens.draw(shape.num_q_heads, 1)
    if own:
        own.attend(layer, query, shape.scale, own.scratch(layer, shape.num_q_heads))
    else:
        layer.attend(query, shape.scale)
    if case.steps:
        layer.append(*tokens.pair(1))  # of a method that packs some, this packs from those kept exact
        table = tokens.draw(1, longest)[0, 0]
        lengths = torch.full((shape.batch_size,), layer.row_lengths[0], dtype=torch.int32, device=bench.device)
        heads = (shape.num_q_heads, shape.num_kv_heads, shape.num_kv_heads)
        for rotary in (None, (table, table)):
            query, key, value = tokens.draw(sum(heads), 1).split(heads, 1)
            steps = Steps(lengths, lengths, layer.scratch(shape.num_q_heads)[: shape.batch_size], longest)
            layer.step(query, key, value, shape.scale, steps, rotary)
    if bench.device.type == "cuda":
        torch.cuda.synchronize()
