"""Latency and bandwidth of recorded all-reduces."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvruntime.bench.harness.store import Row


def fitted(rows: Sequence[Row]) -> tuple[float, float]:
    """``(seconds, bytes a second)`` such that an all-reduce of n ranks takes the former times log2(2 n), and a ring's
    ``2 (n - 1) / n`` of its bytes by the latter: least squares of the relative errors.

    ``rows``: of one way, two sizes or more.
    """
    ranks, nbytes = (np.array([row[name] for row in rows], dtype=float) for name in ("ranks", "nbytes"))
    seconds = np.array([row["seconds"][0] for row in rows])
    parts = np.stack([np.log2(2 * ranks), 2 * (ranks - 1) / ranks * nbytes], 1)
    latency, inverse = np.linalg.lstsq(parts / seconds[:, None], np.ones(len(rows)), rcond=None)[0]
    return float(latency), float(1 / inverse)
