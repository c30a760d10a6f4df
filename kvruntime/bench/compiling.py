"""Compile kernels in several processes before anything is timed; Triton's cache on disk hands them on."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing import TimeoutError, get_context
from time import perf_counter

import torch

from kvruntime.bench.attention import Shape, Tokens
from kvruntime.bench.timing import Bench, wall_timer
from kvruntime.kivi.cache import KiviLayer
from kvsim.methods import Kivi

Case = tuple[Shape, Kivi]
SECONDS = 150.0
MAX_JOBS = 8


def compile_ahead(cases: Sequence[Case], device: str, say: Callable[[str], None]) -> None:
    """Runs every case once, nearly empty, in other processes.  What fails there fails again where it is measured."""
    groups: dict[object, list[Case]] = {}
    for shape, method in cases:  # one process a kernel: cases that differ in lengths only share it
        key = (shape.num_q_heads, shape.num_kv_heads, shape.head_dim, shape.batch_size == 1, method)
        groups.setdefault(key, []).append((shape, method))
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


def one_step(layer: KiviLayer, tokens: Tokens) -> None:
    """One step of the engine, rotary embedding where the model has it."""
    shape, device = tokens.shape, tokens.device
    longest = max(shape.row_lengths)
    rotary = None
    if not shape.model.startswith("gpt2"):
        rotary = (tokens.draw(1, longest)[0, 0], tokens.draw(1, longest)[0, 0])
    zeros = torch.zeros(2, shape.batch_size, dtype=torch.int32, device=device)
    heads = shape.num_q_heads, shape.num_kv_heads, shape.num_kv_heads
    query, key, value = tokens.draw(sum(heads), 1).split(heads, 1)
    layer.step(query, key, value, shape.scale, zeros[0] + max(layer.row_lengths), zeros[1], longest, rotary)


def compile_group(work: tuple[list[Case], str]) -> list[str]:
    """Appends to and attends over a nearly empty layer of each case's size; a line for each that fails."""
    cases, device = work
    bench = Bench(torch.device(device), wall_timer, wall_timer, 1)
    failures = []
    for shape, method in cases:
        try:
            tokens = Tokens(bench, replace(shape, lengths=None), getattr(torch, method.dtype))
            layer = KiviLayer(method, shape.layer, shape.batch_size, max(shape.row_lengths), device)
            layer.append(*tokens.pair(method.residual_length + 2 * method.record_length))
            layer.attend(tokens.draw(shape.num_q_heads, 1), shape.scale)
            one_step(layer, tokens)
            if device != "cpu":
                torch.cuda.synchronize()
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            failures.append(f"{shape.model} {method.name}: {type(error).__name__}: {first}")
    return failures
