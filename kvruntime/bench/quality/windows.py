"""Windows of text through each cache: perplexity, divergence and agreement, and the bits of an element beside them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import torch

from kvruntime.bench.harness.results import Row
from kvruntime.bench.harness.session import release
from kvruntime.bench.harness.tables import BASE, of_kernel
from kvruntime.bench.harness.tasks import Task, Tick
from kvruntime.bench.model.caches import Contender, stock
from kvruntime.bench.model.memory import layer_shapes, measure_memory
from kvruntime.bench.model.tasks import subject
from kvruntime.checkpoints.load import LoadedModel
from kvruntime.eval.bits import elements_a_token, held_bits, packed_bits
from kvruntime.eval.windows import pieces, score_windows

KIND = "windows"
WEIGHED_ROWS = 4
"""Rows that another library's cache is weighed with: hqq 0.2.8 packs an odd number of groups wrongly."""


@dataclass(frozen=True)
class Windows:
    """``ids`` (int64 ``[num_windows, window]``) of the text called ``text`` with ``sha256``, and how they are fed."""

    text: str
    sha256: str
    ids: torch.Tensor
    chunk: int
    batch: int
    reference_chunk: int
    prompt_length: int = 0


def window_tasks(
    loaded: LoadedModel, contenders: Sequence[Contender], given: Sequence[Windows], seed: int, kind: str = KIND
) -> list[Task]:
    """One a length of window and contender, the uncompressed first: the others are compared with it."""

    def task(windows: Windows, contender: Contender) -> Task:
        num_windows, window = windows.ids.shape
        key = {"kind": kind, **subject(loaded, contender, seed), "text": windows.text, "text_sha256": windows.sha256}
        key |= {"window": window, "num_windows": num_windows, "chunk": windows.chunk, "batch_size": windows.batch}
        key |= {"prompt_length": windows.prompt_length, "reference_chunk": windows.reference_chunk}
        fed = len(pieces(window, windows.chunk, windows.prompt_length))
        steps = -(-num_windows // windows.batch) * fed
        work = (num_windows * window + 40 * steps) * (1 if contender.name in BASE else 2)
        measure = partial(measure_windows, loaded, contender, windows, seed)
        return Task(key, measure, cost=work, guest=contender.package != "kvruntime")

    return [task(windows, contender) for windows in given for contender in contenders]


def measure_windows(loaded: LoadedModel, contender: Contender, windows: Windows, seed: int, tick: Tick) -> Row:
    """The row's figures: means over tokens, by position and by window, ``bits``, ``held_bits`` and the seconds.

    The reference is transformers' own uncompressed cache, fed ``windows.reference_chunk`` tokens at a time.  Of another
    library ``kernel`` says what attended.
    """
    plain = stock()
    caches: list[Any] = []

    def build(window: int) -> Any:
        caches[:] = [contender.build(loaded.model, window)]
        return caches[0]

    def around(who: Contender) -> AbstractContextManager[None]:
        return who.around(loaded.model)

    start = perf_counter()
    scores = score_windows(
        loaded.model,
        windows.ids,
        build,
        chunk=windows.chunk,
        prompt_length=windows.prompt_length,
        batch=windows.batch,
        make_reference=lambda window: plain.build(loaded.model, window),
        reference_chunk=windows.reference_chunk,
        around=partial(around, contender),
        around_reference=partial(around, plain),
        tick=tick,
    )
    seconds = perf_counter() - start
    kernel = of_kernel(caches.pop()) if contender.package != "kvruntime" else {}
    release()
    bits = element_bits(loaded, contender, windows.ids.shape[1], seed)
    return {**scores.figures(), **bits, **kernel, "seconds": seconds}


def element_bits(loaded: LoadedModel, contender: Contender, num_tokens: int, seed: int) -> Row:
    """``bits`` of an element of a long sequence and ``held_bits`` at ``num_tokens``, everything counted; ``elements``
    that a token leaves in all layers.

    From kvsim's buffers, which are the cache's own; another library's cache is filled and weighed, at ``num_tokens``
    and at half as many.
    """
    shapes = layer_shapes(loaded.model)
    if contender.method is not None:
        method = contender.method
        held = held_bits(method, shapes, num_tokens)
        return {"bits": packed_bits(method, shapes), "held_bits": held, "elements": elements_a_token(shapes)}
    few = max(2, num_tokens // 2)
    half, whole = (
        measure_memory(loaded, contender, count, WEIGHED_ROWS, seed)["nbytes"] / WEIGHED_ROWS
        for count in (few, num_tokens)
    )
    elements = elements_a_token(shapes)
    bits = 8 * (whole - half) / ((num_tokens - few) * elements) if num_tokens > few else 0.0
    return {"bits": bits, "held_bits": 8 * whole / (num_tokens * elements), "elements": elements}
