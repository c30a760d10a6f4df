"""Paired bootstrap over windows: how far a figure may move had other windows of the same text been drawn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

DRAWS = 2000
COVERAGE = 0.95
SEED = 0


def resampled_means(*columns: Sequence[float], draws: int = DRAWS, seed: int = SEED) -> list[NDArray[np.float64]]:
    """Means of each column over ``draws`` samples of its entries, drawn with replacement, the same ones for all.

    Columns are paired: entry i of each belongs to window i.  Raises ``ValueError`` for columns of unlike lengths or
    without entries.
    """
    lengths = {len(column) for column in columns}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"columns of {', '.join(map(str, sorted(lengths)))} windows: allowed are equal, at least one")
    generator = np.random.default_rng(seed)
    picks = generator.integers(0, lengths.pop(), size=(draws, len(columns[0])))
    return [np.asarray(column, dtype=np.float64)[picks].mean(1) for column in columns]


def interval(samples: NDArray[np.float64], coverage: float = COVERAGE) -> tuple[float, float]:
    """The central interval that holds ``coverage`` of ``samples``."""
    tail = 100 * (1 - coverage) / 2
    low, high = np.percentile(samples, [tail, 100 - tail])
    return float(low), float(high)


def perplexity_change(nll: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """``(change, low, high)`` of the perplexity against ``base``, as shares: 0.02 is two percent more.

    Both are mean negative log-likelihoods of the same windows, in the same order, each of equally many tokens.
    """
    own, plain = resampled_means(nll, base)
    change = float(np.expm1(np.mean(nll) - np.mean(base)))
    return (change, *interval(np.expm1(own - plain)))


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """``(mean, low, high)`` of one column."""
    return (float(np.mean(values)), *interval(resampled_means(values)[0]))
