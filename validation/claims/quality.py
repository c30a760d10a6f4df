"""Recorded, not predicted: perplexity of a real model on real text, read back through each cache."""

from __future__ import annotations

from typing import Any

from kvruntime.bench.model.caches import ours
from kvruntime.bench.model.quality import measure_quality
from kvruntime.checkpoints.load import Source, load
from kvruntime.eval.text import Text, token_windows
from kvsim.layout import Method
from validation.claims.subjects import describe_method
from validation.claims.tasks import Row, Task


def quality_tasks(
    source: Source, text: Text, methods: tuple[Method, ...], device: str, settings: dict[str, int]
) -> list[Task]:
    """One a method.  ``settings``: window, max_tokens (0: all), chunk, batch.

    Raises ``ValueError`` for a model without a tokenizer or a window beyond its positions.
    """
    loaded = load(source, device)
    if loaded.tokenizer is None:
        raise ValueError(f"{source.name} {loaded.no_tokenizer}: text cannot be scored")
    if loaded.max_positions is not None and settings["window"] > loaded.max_positions:
        raise ValueError(f"window {settings['window']} exceeds the model's {loaded.max_positions} positions")
    windows = token_windows(loaded.tokenizer, text, settings["window"], settings["max_tokens"] or None)
    batch = min(settings["batch"], len(windows))

    def task(method: Method) -> Task:
        def measure() -> list[Row]:
            figures: dict[str, Any] = measure_quality(
                loaded, ours(method), windows, chunk=settings["chunk"], batch=batch
            )
            row: Row = {"kind": "quality", "way": "generate", "model": source.name, "weights": source.weights}
            row |= {"method": describe_method(method), "batch_size": batch, "num_tokens": figures["num_tokens"]}
            row |= {
                "window": windows.shape[1],
                "chunk": settings["chunk"],
                "text": text.name,
                "text_sha256": text.sha256,
            }
            row |= {"dtype": loaded.dtype, "device": loaded.device.type, "unit": "perplexity"}
            return [row | {"measured": figures["ppl"], "nll": figures["nll"], "seconds": figures["seconds"]}]

        shown = f"{text.name} {windows.shape[0]}x{windows.shape[1]} chunk {settings['chunk']}"
        about = {"model_sha256": loaded.sha256, "text_sha256": text.sha256, "batch_size": batch}
        about["method"] = describe_method(method)
        return Task(f"quality {source.name} {method.name} {shown}", windows.numel(), "quality", measure, about)

    return [task(method) for method in methods]
