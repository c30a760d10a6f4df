"""Quality: perplexity through the cache, for any contender."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch

from kvruntime.bench.model.caches import Contender
from kvruntime.checkpoints.load import LoadedModel
from kvruntime.eval.perplexity import perplexity


def measure_quality(
    loaded: LoadedModel,
    contender: Contender,
    windows: torch.Tensor,
    *,
    chunk: int,
    batch: int,
    tick: Callable[[float], None] = lambda _: None,
) -> dict[str, Any]:
    """``nll`` (nats a token), ``ppl``, ``num_tokens`` predicted, and the seconds it took."""
    start = perf_counter()
    with contender.around(loaded.model):
        score = perplexity(
            loaded.model,
            windows,
            lambda window: contender.build(loaded.model, window),
            chunk=chunk,
            batch=batch,
            tick=tick,
        )
    return {"nll": score.nll, "ppl": score.ppl, "num_tokens": score.num_tokens, "seconds": perf_counter() - start}
