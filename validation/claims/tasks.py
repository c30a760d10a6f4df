"""One piece of measuring: a name, what it costs beside the others, and the rows it leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from kvsim.finite_json import not_finite
from validation.claims.predict import error, predict

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """``measure()`` gives rows without ``predicted`` and ``error``; ``name`` is the same in every run.

    Tasks of one ``group`` share compiled kernels.  ``about``: fields of every row that the name does not say.
    """

    name: str
    cost: float
    group: str
    measure: Callable[[], list[Row]]
    about: Row = field(default_factory=dict)


def judged(task: Task) -> list[Row]:
    """The task's rows with kvsim's figure and the error beside the measured one.

    Raises ``ValueError`` for a measured figure that is no finite number.
    """
    start = perf_counter()
    rows = task.measure()
    seconds = {"seconds": round(perf_counter() - start, 3)}
    out = []
    for row in rows:
        wrong = not_finite(row)
        if wrong is not None:
            raise ValueError(f"{task.name}: {wrong}: the weights, or what was computed with them, overflowed")
        row = {**row, **task.about}
        predicted = predict(row)
        out.append(
            {"task": task.name, **row, "predicted": predicted, "error": error(row["measured"], predicted), **seconds}
        )
    return out
