"""Recorded, not predicted: prefill seconds and decode tokens a second, through ``kvruntime.bench``."""

from __future__ import annotations

from typing import Any

from kvruntime.bench.model.caches import ours
from kvruntime.bench.model.speed import measure_speed
from kvruntime.checkpoints.load import load, resolve, sha256_of
from kvsim.layout import Method
from validation.claims.subjects import describe_method
from validation.claims.tasks import Row, Task


def speed_tasks(
    name: str, methods: tuple[Method, ...], batches: list[int], device: str, settings: dict[str, Any], say: Any
) -> list[Task]:
    """One a method and batch size.  ``settings``: prompt_tokens, decode_tokens, warmup, repeats."""
    loaded: list[Any] = []
    source = resolve(name, offline=True, say=say)
    digest = sha256_of(source)

    def model() -> Any:
        if not loaded:
            loaded.append(load(source, device))
        return loaded[0]

    def task(method: Method, batch_size: int) -> Task:
        def measure() -> list[Row]:
            figures = measure_speed(model(), ours(method), batch_size, **settings, seed=0)
            held = settings["prompt_tokens"] + settings["decode_tokens"]
            base: Row = {"kind": "speed", "way": "generate", "model": name, "weights": model().source.weights}
            base |= {"method": describe_method(method), "batch_size": batch_size, "num_tokens": held, **settings}
            base |= {"dtype": model().dtype, "device": model().device.type}
            decode, prefill = figures["tokens_per_second"], figures["prefill_seconds"]
            return [
                {
                    **base,
                    "phase": "decode",
                    "unit": "tokens/s",
                    "measured": decode[0],
                    "low": decode[1],
                    "high": decode[2],
                },
                {
                    **base,
                    "phase": "prefill",
                    "unit": "s",
                    "measured": prefill[0],
                    "low": prefill[1],
                    "high": prefill[2],
                },
            ]

        about = {**settings, "method": describe_method(method), "model_sha256": digest}
        return Task(f"speed {name} {method.name} batch {batch_size}", batch_size, "speed", measure, about)

    return [task(method, batch_size) for batch_size in batches for method in methods]
