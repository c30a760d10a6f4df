"""``kvruntime bench kernels``: decode attention, quantizing and storing against what the card can do."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvruntime.bench.harness.results import Results, Row, describe
from kvruntime.bench.harness.session import carry_out, say, task
from kvruntime.bench.harness.store import check_writable
from kvsim.layout import Method
from kvsim.specs import parse_size

if TYPE_CHECKING:
    from kvruntime.bench.harness.tasks import Task
    from kvruntime.bench.harness.timing import Bench
    from kvruntime.bench.kernels.attention import Shape

HEADS = {
    "llama-3-8b": (32, 8, 128),
    "llama-2-7b": (32, 32, 128),
    "gpt2": (12, 12, 64),
    "gemma-7b": (16, 16, 256),
    "phi-3-mini-4k-instruct": (32, 32, 96),
}
"""Query heads, key/value heads and head dimension; a test holds them to the catalogue."""

SHAPES = (
    *("llama-3-8b:8x32k", "llama-3-8b:1x128k", "llama-3-8b:64x4k", "llama-3-8b:1x32k", "llama-3-8b:1x8k"),
    *("llama-2-7b:8x4k", "gpt2:64x1k", "gpt2:1x1k"),
)
QUICK = ("llama-3-8b:8x32k", "llama-3-8b:1x8k", "gpt2:1x1k")
RAGGED_BLOCKS = (323, 768, 249, 446, 305, 692, 645, 668)
"""Lengths of eight rows in blocks of 64 tokens; together as many as eight rows of 32k."""


def layouts() -> tuple[Method, ...]:
    """What is timed: the layouts of every room that has some."""
    from kvruntime.methods import LAYERS

    return tuple(method for room in LAYERS.values() for method in room.benched)


def measures() -> list[Any]:
    """What the rooms with layouts have to be measured besides."""
    from kvruntime.methods import LAYERS

    return [room.measures for room in LAYERS.values() if room.benched and room.measures is not None]


def packed() -> tuple[Method, ...]:
    """What storing is timed with."""
    return tuple(method for own in measures() for method in own.PACKED)


def more() -> tuple[tuple[str, tuple[Method, ...]], ...]:
    """Other shapes, and the layouts that each is timed with."""
    return tuple(pair for own in measures() for pair in own.MORE)


def make_shape(spec: str) -> Shape:
    """``model:BATCHxTOKENS`` or ``model:ragged``; raises ``ValueError`` or ``LookupError``."""
    from kvruntime.bench.kernels.attention import Shape

    model, _, size = spec.partition(":")
    if model not in HEADS:
        raise LookupError(f"unknown shape {spec!r}: allowed are MODEL:BATCHxTOKENS with the models {', '.join(HEADS)}")
    if size == "ragged":
        lengths = tuple(64 * blocks for blocks in RAGGED_BLOCKS)
        return Shape(model, *HEADS[model], len(lengths), sum(lengths) // len(lengths), lengths)
    batch, cross, tokens = size.lower().partition("x")
    if not cross or not batch.isascii() or not batch.isdigit() or len(batch) > 9 or not int(batch):
        raise ValueError(f"shape {spec!r}: expected MODEL:BATCHxTOKENS, such as llama-3-8b:8x32k")
    return Shape(model, *HEADS[model], int(batch), parse_size(tokens, "tokens"))


def fits(shape: Shape, method: Method) -> bool:
    """Whether the method can hold the shape's heads and packs anything of it."""
    from kvruntime.methods import room_of

    try:
        method.buffers(shape.layer, 1, 1)
    except ValueError:
        return False
    own = room_of(method).measures
    return own is None or bool(own.packs(method, min(shape.row_lengths)))


def dtype_name(method: Method) -> str:
    """The type of the method's exact tokens, float16 where it does not say: its baseline's."""
    return getattr(method, "dtype", "float16")


def key_of(kind: str, bench: Bench, shape: Shape, **rest: Any) -> Row:
    heads = {"num_q_heads": shape.num_q_heads, "num_kv_heads": shape.num_kv_heads, "head_dim": shape.head_dim}
    size = {"batch_size": shape.batch_size, "num_tokens": shape.num_tokens, "ragged": shape.lengths is not None}
    return {"kind": kind, "model": shape.model, **size, **heads, **rest, "seed": bench.seed}


def ceiling_tasks(bench: Bench) -> list[Task]:
    from kvruntime.bench.harness.ceilings import CEILINGS

    return [
        task(
            {"kind": "ceiling", "what": what, "seed": bench.seed},
            lambda ceiling=ceiling: ceiling(bench),  # type: ignore[misc]
        )
        for what, ceiling in CEILINGS.items()
    ]


def sdpa_tasks(bench: Bench, shape: Shape, dtype: str = "float16") -> list[Task]:
    """The baselines of one shape, and beside them the uncompressed engine's kernel."""
    from kvruntime.bench.kernels.attention import BACKENDS, measure_full, measure_sdpa

    out = [
        task(
            key_of("sdpa", bench, shape, dtype=dtype, method=name),
            lambda backend=backend: measure_sdpa(bench, shape, backend, dtype),  # type: ignore[misc]
        )
        for name, backend in BACKENDS.items()
    ]
    key = key_of("full", bench, shape, dtype=dtype, method="fp16-engine")
    return [*out, task(key, lambda: measure_full(bench, shape, dtype))]


def attend_tasks(
    bench: Bench, shape: Shape, methods: Iterable[Method], *, splits: bool = False, portable: bool = False
) -> list[Task]:
    """One a method that can hold the shape."""
    from kvruntime.bench.kernels.attention import measure_attend

    return [
        task(
            key_of(
                "attend",
                bench,
                shape,
                dtype=dtype_name(method),
                method=method.name,
                portable=portable,
                tries_splits=splits,
            ),
            lambda method=method: measure_attend(  # type: ignore[misc]
                bench, shape, method, splits=splits, portable=portable
            ),
            cost=3.0,
        )
        for method in methods
        if fits(shape, method)
    ]


def packing_tasks(bench: Bench, prompt: Shape, steps: Iterable[Shape], methods: Iterable[Method]) -> list[Task]:
    """Storing ``prompt`` at once, and one token after each of ``steps``."""
    from kvruntime.bench.kernels.packing import measure_append, measure_pack

    compiled = bench.device.type == "cuda"
    out = []
    for method in methods:
        key = key_of("pack", bench, prompt, dtype=dtype_name(method), method=method.name)
        out.append(
            task(
                key,
                lambda method=method: measure_pack(bench, prompt, method, compiled=compiled),  # type: ignore[misc]
                cost=10.0,
            )
        )
    for method in methods:
        for shape in steps:
            key = key_of("append", bench, shape, dtype=dtype_name(method), method=method.name)
            out.append(
                task(
                    key,
                    lambda method=method, shape=shape: measure_append(bench, shape, method),  # type: ignore[misc]
                    cost=4.0,
                )
            )
    return out


def more_tasks(bench: Bench, splits: bool) -> list[Task]:
    """:func:`more` and what the plain Triton kernel is timed on, each after its baselines."""
    out: list[Task] = []
    for spec, methods in more():
        shape = make_shape(spec)
        for dtype in dict.fromkeys(dtype_name(method) for method in methods):
            out += sdpa_tasks(bench, replace(shape, lengths=None), dtype)
        out += attend_tasks(bench, shape, methods, splits=splits)
    for own in measures():
        spec, methods = own.PORTABLE
        out += attend_tasks(bench, make_shape(spec), methods, portable=True)
    return out


def kernel_tasks(bench: Bench, shapes: Sequence[Shape], methods: Sequence[Method], *, splits: bool) -> list[Task]:
    """The baselines and every method, shape by shape."""
    out: list[Task] = []
    for shape in shapes:
        out += sdpa_tasks(bench, shape) + attend_tasks(bench, shape, methods, splits=splits)
    return out


def kernels(**given: Any) -> int:
    """``kvruntime bench kernels``; its exit code.

    Raises ``ValueError`` on a machine without CUDA, for a bad shape, or for a method whose room has no layouts.
    """
    from kvruntime.bench.kernels.report import line, tables
    from kvruntime.checkpoints.load import pick_device

    shapes = [make_shape(spec) for spec in given["shapes"] or (QUICK if given["quick"] else SHAPES)]
    named = named_methods(given["specs"])
    methods = named or layouts()
    out = given["out"] or Path("kvruntime-kernels.json")
    check_writable(out)
    device = pick_device(given["device"])
    if not device.startswith("cuda"):
        raise ValueError(f"bench kernels times CUDA graphs: it needs a CUDA device, not {device}")
    import torch

    from kvruntime.bench.harness.timing import cuda_bench
    from kvruntime.bench.kernels.precompile import Case, compile_ahead

    torch.cuda.set_device(device)
    bench = cuda_bench(torch.device(device), given["seed"])
    header = describe(device, ["kvruntime", *sys.argv[1:]]) | {"seed": bench.seed}
    results = Results(out, header, resume=given["resume"], anew=given["anew"])
    parts = given["parts"] or (("attend",) if given["quick"] else ("attend", "pack"))
    tasks, cases = ceiling_tasks(bench), []
    if "attend" in parts:
        tasks += kernel_tasks(bench, shapes, methods, splits=given["splits"])
        cases += [Case(shape, method) for shape in shapes for method in methods]
    if "more" in parts or given["more"]:
        tasks += more_tasks(bench, given["splits"])
        cases += [Case(make_shape(spec), method) for spec, own in more() for method in own]
    if "pack" in parts:
        steps = [make_shape("llama-3-8b:1x8k"), make_shape("llama-3-8b:64x4k")]
        stored = named or packed()
        tasks += packing_tasks(bench, make_shape("llama-3-8b:1x128k"), steps, stored)
        cases += [Case(shape, method, steps=True) for shape in steps for method in stored]

    if given["compile_ahead"]:
        compile_ahead([case for case in dict.fromkeys(cases) if fits(case.shape, case.method)], device, say)
    with torch.no_grad():
        return carry_out(tasks, results, line, tables)


def is_timed(room: Any) -> bool:
    """Whether a room has layouts to time, or can be measured in all that is timed where a layout is named."""
    return bool(room.benched) or hasattr(room.measures, "about")


def named_methods(specs: Sequence[str]) -> list[Method]:
    """The methods that ``specs`` name.  Raises ``ValueError`` for one whose room does not say how to measure it."""
    from kvruntime.methods import LAYERS, room_of
    from kvruntime.specs import chosen_methods

    methods = chosen_methods(specs, None, {}, baseline=False) if specs else []
    for method in methods:
        if not is_timed(room_of(method)):
            timed = ", ".join(room.examples[0].name for room in LAYERS.values() if is_timed(room))
            raise ValueError(f"method {method.name}: bench kernels takes {timed} and the like; float16 is its baseline")
    return methods
