"""One sitting on a device: measurements whose failure is a row, in an order that a stopped run goes on with."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from kvruntime.bench.harness.results import Results, Row
from kvruntime.bench.harness.tasks import Interruption, Task, run

LOST = ("illegal memory access", "unspecified launch failure", "device-side assert", "misaligned address", "ECC error")
"""Errors after which nothing more runs in this process."""
AGAIN = 3
"""Exit code where the device was lost: the same command with ``--resume`` goes on."""


class DeviceLost(Exception):
    """An error that this process cannot leave behind."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def task(key: Row, measure: Callable[[], Row], cost: float = 1.0) -> Task:
    """A measurement whose failure is a row, and after which the device's memory is free again."""

    def measured(tick: Callable[[float], None]) -> Row:
        try:
            return measure()
        finally:
            release()

    return Task(key, measured, cost=cost, guest=True)


def release() -> None:
    """Give the device's memory back: what an ended measurement still holds in cycles, too."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def in_order(tasks: Iterable[Task], results: Results) -> list[Task]:
    """The first task of each key; those that failed before come last, for they may fail again."""
    first: dict[tuple[Any, ...], Task] = {}
    for one in tasks:
        first.setdefault(tuple(one.key.items()), one)
    failed = [row for row in results.rows if "failed" in row]

    def tried(one: Task) -> bool:
        return any(all(row.get(name) == value for name, value in one.key.items()) for row in failed)

    return sorted(first.values(), key=tried)


def carry_out(
    tasks: Sequence[Task],
    results: Results,
    line: Callable[[Row, Sequence[Row]], str],
    tables: Callable[[Sequence[Row]], str],
) -> int:
    """Measures what ``results`` does not hold yet, tells each row as it comes, prints the tables; the exit code."""

    def told(row: Row) -> str:
        if "failed" not in row:
            return line({**row, "commit": results.header.get("commit")}, results.rows)  # ratios are within a commit
        if any(words in row["failed"] for words in LOST):
            raise DeviceLost(row["failed"])
        return f"    failed: {row['failed']}"

    code, again = 0, "--anew" if results.anew else "--resume"
    try:
        run(in_order(tasks, results), results, told=told)
    except Interruption as stop:
        say(f"interrupted: {stop.done} of {stop.total} measurements are in {results.path}; go on with {again}")
        return 130
    except DeviceLost as error:
        say(f"the device is lost to this process ({error}); go on with {again}, which leaves what failed to the end")
        code = AGAIN
    with results.shown():
        print(tables(results.rows))
    print(f"\nrecorded in {results.path}")
    return code
