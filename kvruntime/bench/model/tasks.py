"""A model's tasks, in order: memory, speed and quality of each cache, and the rows they leave."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from kvruntime.bench.harness.results import Row
from kvruntime.bench.harness.tasks import OUT_OF_MEMORY, Task
from kvruntime.bench.model.caches import Contender
from kvruntime.bench.model.peers import package_version
from kvruntime.checkpoints.load import LoadedModel
from kvsim.methods import placed


def went_wrong(rows: Iterable[Row]) -> bool:
    """Whether a measurement of our own failed, otherwise than for want of memory."""
    return any(
        row.get("failed", OUT_OF_MEMORY) != OUT_OF_MEMORY and str(row.get("package")).startswith("kvruntime")
        for row in rows
    )


@dataclass(frozen=True)
class Speed:
    """How speed is measured."""

    batches: tuple[int, ...]
    prompt_tokens: int
    decode_tokens: int
    warmup: int
    repeats: int


@dataclass(frozen=True)
class Quality:
    """What quality is measured on: ``text`` and ``sha256`` name it, ``windows`` are its token ids."""

    text: str
    sha256: str
    windows: Any
    chunk: int
    batch: int


def subject(loaded: LoadedModel, contender: Contender, seed: int) -> dict[str, Any]:
    """The part of every key that says what was measured: model and weights by name and content, dtype, method.

    ``cache_dtype`` is the type of the method's exact tokens, which its name leaves out; ``package_version`` that of
    another library's cache.
    """
    source = loaded.source
    key = {
        "model": source.name,
        "weights": source.weights,
        "model_sha256": loaded.sha256,
        "dtype": loaded.dtype,
        "method": contender.name,
        "package": contender.package,
        "seed": seed,
    }
    cache_dtype = getattr(contender.method, "dtype", None)
    if cache_dtype is not None:
        key["cache_dtype"] = cache_dtype
    if not contender.package.startswith("kvruntime"):
        key["package_version"] = package_version(contender.package)
    return key


def memory_tasks(loaded: LoadedModel, contenders: list[Contender], contexts: list[int], seed: int) -> list[Task]:
    """One a context and contender, batch size 1."""
    from kvruntime.bench.model.memory import measure_memory

    def task(contender: Contender, num_tokens: int) -> Task:
        key = {"kind": "memory", **subject(loaded, contender, seed), "batch_size": 1, "num_tokens": num_tokens}
        return Task(
            key,
            lambda tick: measure_memory(loaded, contender, num_tokens, 1, seed),
            cost=num_tokens * (1 if contender.method is None or contender.name in BASELINES else 3),
            guest=contender.package != "kvruntime",
        )

    return [task(contender, num_tokens) for contender in contenders for num_tokens in contexts]


def speed_tasks(loaded: LoadedModel, contenders: list[Contender], speed: Speed, seed: int) -> list[Task]:
    """One a batch size and contender."""
    from kvruntime.bench.model.speed import measure_speed

    def task(contender: Contender, batch_size: int) -> Task:
        shape = {"prompt_tokens": speed.prompt_tokens, "decode_tokens": speed.decode_tokens}
        turns = {"warmup": speed.warmup, "repeats": speed.repeats}
        key = {"kind": "speed", **subject(loaded, contender, seed), "batch_size": batch_size, **shape, **turns}
        work = (speed.warmup + speed.repeats) * (batch_size * speed.prompt_tokens + 20 * speed.decode_tokens)
        return Task(
            key,
            lambda tick: measure_speed(loaded, contender, batch_size, **shape, **turns, seed=seed, tick=tick),
            cost=work * (1 if contender.name in BASELINES else 4),
            guest=contender.package != "kvruntime",
        )

    return [task(contender, batch_size) for contender in contenders for batch_size in speed.batches]


def quality_tasks(loaded: LoadedModel, contenders: list[Contender], quality: Quality, seed: int) -> list[Task]:
    """One a contender."""
    from kvruntime.bench.model.quality import measure_quality

    num_windows, window = quality.windows.shape
    steps = -(-num_windows // quality.batch) * -(-window // quality.chunk)

    def task(contender: Contender) -> Task:
        key = {
            "kind": "quality",
            **subject(loaded, contender, seed),
            "text": quality.text,
            "text_sha256": quality.sha256,
        }
        key |= {"window": window, "num_windows": num_windows, "chunk": quality.chunk, "batch_size": quality.batch}
        return Task(
            key,
            lambda tick: measure_quality(
                loaded, contender, quality.windows, chunk=quality.chunk, batch=quality.batch, tick=tick
            ),
            cost=(num_windows * window + 40 * steps) * (1 if contender.name in BASELINES else 3),
            guest=contender.package != "kvruntime",
        )

    return [task(contender) for contender in contenders]


BASELINES = ("fp16", "bf16", "fp32", "transformers-dynamic")
"""What the others are compared with: kvruntime's uncompressed cache, and transformers' own."""


def check_methods(loaded: LoadedModel, contenders: list[Contender]) -> None:
    """Raises ``ValueError`` for a method or model that cannot be run, before anything is measured."""
    from kvruntime.bench.model.memory import layer_shapes

    for contender in contenders:
        if contender.method is not None:
            for shape, method in placed(contender.method, tuple(layer_shapes(loaded.model))):
                method.buffers(shape, 1, 1)
