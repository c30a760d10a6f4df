"""``kvruntime bench kernels``: decode attention, quantizing and storing against what the card can do."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvruntime.bench.harness.results import Results, Row, describe
from kvruntime.bench.harness.session import carry_out, say, task
from kvsim.methods import Kivi
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
SMALL = tuple(f"llama-3-8b:{size}" for size in ("1x2k", "1x4k", "2x2k", "2x4k", "4x2k", "8x2k"))
"""From 2k tokens on nothing may be slower than float16: the small end."""
SHORT = ("llama-3-8b:1x512", "llama-3-8b:1x1k", "gpt2:1x128", "gpt2:1x512")
"""What a launch costs, for the time model: hardly anything is packed."""
RAGGED_BLOCKS = (323, 768, 249, 446, 305, 692, 645, 668)
"""Lengths of eight rows in blocks of 64 tokens; together as many as eight rows of 32k."""


def kivi(nbits: int, group: int, residual: int, **options: Any) -> Kivi:
    return Kivi(nbits=nbits, group_size=group, residual_length=residual, **options)


METHODS = (
    *(kivi(2, 32, residual) for residual in (64, 128)),
    *(kivi(2, 64, residual) for residual in (64, 128)),
    kivi(2, 128, 128),
    *(kivi(4, 64, residual) for residual in (64, 128)),
)
PACKED = (kivi(2, 32, 128), kivi(2, 64, 128), kivi(4, 64, 128))
MIXED = kivi(2, 64, 64, key_nbits=4, value_nbits=2)
BFLOAT16 = kivi(2, 64, 64, dtype="bfloat16")
MORE: tuple[tuple[str, tuple[Kivi, ...]], ...] = (
    *((spec, (kivi(2, 64, 64), kivi(2, 32, 128), kivi(4, 64, 64))) for spec in SMALL),
    *((spec, (kivi(2, 64, 64), kivi(4, 64, 64))) for spec in SHORT),
    ("llama-3-8b:8x32k", (kivi(8, 64, 64), MIXED, BFLOAT16)),
    ("llama-3-8b:ragged", (kivi(2, 64, 64), kivi(2, 32, 128))),
    ("gemma-7b:8x4k", (kivi(2, 64, 64), kivi(4, 64, 64))),
    ("phi-3-mini-4k-instruct:8x4k", (kivi(2, 32, 64), kivi(4, 32, 64))),
)
"""Small batches and short contexts, other bits and types, rows of different lengths, heads of 256 and 96 channels."""
PORTABLE = ("llama-3-8b:8x32k", (kivi(2, 64, 64), kivi(3, 64, 64)))
"""What the plain Triton kernel is timed on though another may take it."""


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


def fits(shape: Shape, method: Kivi) -> bool:
    """Whether the method can hold the shape's heads and packs anything of it."""
    try:
        method.record(shape.layer)
    except ValueError:
        return False
    return method.num_packed(min(shape.row_lengths)) > 0


def key_of(kind: str, bench: Bench, shape: Shape, **rest: Any) -> Row:
    heads = {"num_q_heads": shape.num_q_heads, "num_kv_heads": shape.num_kv_heads, "head_dim": shape.head_dim}
    size = {"batch_size": shape.batch_size, "num_tokens": shape.num_tokens, "ragged": shape.lengths is not None}
    return {"kind": kind, "model": shape.model, **size, **heads, **rest, "seed": bench.seed}


def ceiling_tasks(bench: Bench) -> list[Task]:
    from kvruntime.bench.harness.ceilings import CEILINGS

    return [
        task({"kind": "ceiling", "what": what, "seed": bench.seed}, lambda ceiling=ceiling: ceiling(bench))  # type: ignore[misc]
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
    bench: Bench, shape: Shape, methods: Iterable[Kivi], *, splits: bool = False, portable: bool = False
) -> list[Task]:
    """One a method that can hold the shape."""
    from kvruntime.bench.kernels.attention import measure_kivi

    return [
        task(
            key_of(
                "attend",
                bench,
                shape,
                dtype=method.dtype,
                method=method.name,
                portable=portable,
                tries_splits=splits,
            ),
            lambda method=method: measure_kivi(bench, shape, method, splits=splits, portable=portable),  # type: ignore[misc]
            cost=3.0,
        )
        for method in methods
        if fits(shape, method)
    ]


def packing_tasks(bench: Bench, prompt: Shape, steps: Iterable[Shape], methods: Iterable[Kivi]) -> list[Task]:
    """Storing ``prompt`` at once, and one token after each of ``steps``."""
    from kvruntime.bench.kernels.packing import measure_append, measure_pack

    compiled = bench.device.type == "cuda"
    out = []
    for method in methods:
        for shape in steps:
            key = key_of("append", bench, shape, dtype=method.dtype, method=method.name)
            out.append(task(key, lambda method=method, shape=shape: measure_append(bench, shape, method), cost=4.0))  # type: ignore[misc]
    for method in methods:
        key = key_of("pack", bench, prompt, dtype=method.dtype, method=method.name)
        out.append(task(key, lambda method=method: measure_pack(bench, prompt, method, compiled=compiled), cost=10.0))  # type: ignore[misc]
    return out


def more_tasks(bench: Bench, splits: bool) -> list[Task]:
    """:data:`MORE` and :data:`PORTABLE`, each after its baselines."""
    out: list[Task] = []
    for spec, methods in MORE:
        shape = make_shape(spec)
        for dtype in dict.fromkeys(method.dtype for method in methods):
            out += sdpa_tasks(bench, replace(shape, lengths=None), dtype)
        out += attend_tasks(bench, shape, methods, splits=splits)
    return out + attend_tasks(bench, make_shape(PORTABLE[0]), PORTABLE[1], portable=True)


def kernel_tasks(bench: Bench, shapes: Sequence[Shape], methods: Sequence[Kivi], *, splits: bool) -> list[Task]:
    """The baselines and every method, shape by shape."""
    out: list[Task] = []
    for shape in shapes:
        out += sdpa_tasks(bench, shape) + attend_tasks(bench, shape, methods, splits=splits)
    return out


def kernels(**given: Any) -> int:
    """``kvruntime bench kernels``; its exit code.

    Raises ``ValueError`` on a machine without CUDA, for a bad shape, or for a method that is not KIVI's.
    """
    from kvruntime.bench.kernels.report import line, tables
    from kvruntime.checkpoints.load import pick_device

    shapes = [make_shape(spec) for spec in given["shapes"] or (QUICK if given["quick"] else SHAPES)]
    methods = kivi_methods(given["specs"]) or METHODS
    device = pick_device(given["device"])
    if not device.startswith("cuda"):
        raise ValueError(f"bench kernels times CUDA graphs: it needs a CUDA device, not {device}")
    import torch

    from kvruntime.bench.harness.timing import cuda_bench
    from kvruntime.bench.kernels.precompile import Case, compile_ahead

    torch.cuda.set_device(device)
    bench = cuda_bench(torch.device(device), given["seed"])
    header = describe(device, ["kvruntime", *sys.argv[1:]]) | {"seed": bench.seed}
    out = given["out"] or Path("kvruntime-kernels.json")
    results = Results(out, header, resume=given["resume"], anew=given["anew"])
    parts = given["parts"] or (("attend",) if given["quick"] else ("attend", "pack"))
    tasks, cases = ceiling_tasks(bench), []
    if "attend" in parts:
        tasks += kernel_tasks(bench, shapes, methods, splits=given["splits"])
        cases += [Case(shape, method) for shape in shapes for method in methods]
    if "more" in parts or given["more"]:
        tasks += more_tasks(bench, given["splits"])
        cases += [Case(make_shape(spec), method) for spec, own in MORE for method in own]
    if "pack" in parts:
        steps = [make_shape("llama-3-8b:1x8k"), make_shape("llama-3-8b:64x4k")]
        tasks += packing_tasks(bench, make_shape("llama-3-8b:1x128k"), steps, PACKED)
        cases += [Case(shape, method, steps=True) for shape in steps for method in PACKED]

    if given["compile_ahead"]:
        compile_ahead([case for case in dict.fromkeys(cases) if fits(case.shape, case.method)], device, say)
    with torch.no_grad():
        return carry_out(tasks, results, line, tables)


def kivi_methods(specs: Sequence[str]) -> list[Kivi]:
    from kvruntime.specs import chosen_methods

    methods = chosen_methods(specs, None, {}, baseline=False) if specs else []
    for method in methods:
        if not isinstance(method, Kivi):
            raise ValueError(f"method {method.name}: bench kernels takes kivi only; float16 is its baseline")
    return methods  # type: ignore[return-value]
