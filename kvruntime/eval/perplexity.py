"""Perplexity through the cache: a window is fed in chunks, and every chunk reads its past back from the cache.

With ``chunk=1`` each token sees exactly what it would see while generating.  A larger chunk is faster and kinder to
a lossy cache, because the tokens of one chunk see each other before they are stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import exp, inf
from typing import Any

import torch

Tick = Callable[[float], None]


@dataclass(frozen=True)
class Score:
    """``nll`` is the mean negative log-likelihood in nats over ``num_tokens`` predicted tokens."""

    nll: float
    num_tokens: int

    @property
    def ppl(self) -> float:
        """``exp(nll)``; infinity where that is beyond a float."""
        try:
            return exp(self.nll)
        except OverflowError:
            return inf


def perplexity(
    model: Any,
    windows: torch.Tensor,
    make_cache: Callable[[int], Any],
    *,
    chunk: int = 1,
    batch: int = 1,
    tick: Tick = lambda _: None,
) -> Score:
    """Scores ``windows`` (int64 ``[num_windows, window]``), ``batch`` of them at a time.

    ``make_cache(window)`` gives an empty cache for one batch.  The first token of a window is not predicted.  Log
    probabilities are taken in float32 and summed in float64.  ``tick`` is told the share of the work just done.
    """
    from kvruntime.hf.cache import argument

    if chunk < 1 or batch < 1:
        raise ValueError(f"chunk {chunk} and batch {batch}: allowed are 1 and above")
    num_windows, window = windows.shape
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    with torch.inference_mode():
        for first in range(0, num_windows, batch):
            ids = windows[first : first + batch].to(model.device)
            cache = make_cache(window)
            for start in range(0, window - 1, chunk):
                stop = min(start + chunk, window - 1)  # the last token has nothing to predict
                logits = model(input_ids=ids[:, start:stop], **argument(cache), use_cache=True).logits
                target = ids[:, start + 1 : stop + 1]
                total += torch.nn.functional.cross_entropy(
                    logits.float().flatten(0, 1), target.flatten(), reduction="sum"
                ).double()
                tick(len(ids) * (stop - start) / (num_windows * (window - 1)))
    num_tokens = num_windows * (window - 1)
    return Score(total.item() / num_tokens, num_tokens)
