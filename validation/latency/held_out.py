"""Reading measured rows from CSV, and the errors and bands of predictions on rows that were held out."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

BAND = 0.94
"""Share of the held-out rows that a band is drawn around."""


def read_csv(path: Path, needed: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a CSV file.  Raises ``ValueError`` for one without rows or without a column of ``needed``."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"{path.name} has no rows")
    missing = [name for name in needed if name not in rows[0]]
    if missing:
        raise ValueError(f"{path.name} lacks the columns {', '.join(missing)}")
    return rows


def digest(path: Path) -> str:
    """The file's SHA-256."""
    return sha256(path.read_bytes()).hexdigest()


def errors(predicted: np.ndarray, measured: np.ndarray) -> dict[str, Any]:
    """Relative to what was measured: mean and median absolute error, bias, 90th percentile and worst."""
    relative = predicted / measured - 1
    away = np.abs(relative)
    return {
        "num_rows": len(away),
        "mean": round(float(away.mean()), 4),
        "median": round(float(np.median(away)), 4),
        "bias": round(float(relative.mean()), 4),
        "p90": round(float(np.quantile(away, 0.9)), 4),
        "worst": round(float(away.max()), 4),
    }


def quantiles(ratios: np.ndarray, share: float = BAND) -> tuple[float, float]:
    """Factors (low, high) around a prediction that ``share`` of the ratios measured / predicted lie within.

    The conformal ranks: the k-th smallest and largest with ``k = floor((n + 1) * (1 - share) / 2)``, at least 1.
    """
    ordered = np.sort(ratios)
    rank = max(1, int((len(ordered) + 1) * (1 - share) / 2))
    return round(float(ordered[rank - 1]), 4), round(float(ordered[-rank]), 4)


def inside(ratios: np.ndarray, band: tuple[float, float]) -> float:
    """Share of the ratios measured / predicted within a band."""
    return round(float(np.mean((ratios >= band[0]) & (ratios <= band[1]))), 4)
