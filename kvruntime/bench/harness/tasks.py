"""The order of work: what is to be measured, what is done already, and the row each measurement leaves."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kvruntime.bench.harness.progress import Progress
from kvruntime.bench.harness.results import Results, Row
from kvsim.finite_json import not_finite

Tick = Callable[[float], None]
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Task:
    """One measurement: ``key`` names it in the results, ``measure(tick)`` gives its figures.

    ``cost`` is its expected duration relative to the others.  ``guest``: another library's code, whose failure is a
    row and not an end.
    """

    key: Mapping[str, Any]
    measure: Callable[[Tick], Row]
    cost: float = 1.0
    guest: bool = False

    @property
    def label(self) -> str:
        shown = ("kind", "model", "method", "task", "part", "axes", "num_tokens", "window", "batch_size")
        units = {"num_tokens": " tokens", "window": "-token windows", "batch_size": " sequences"}
        return " ".join(f"{self.key[name]}{units.get(name, '')}" for name in shown if name in self.key)


class Interruption(Exception):
    """Ctrl-C: ``done`` of ``total`` measurements are in the file."""

    def __init__(self, done: int, total: int) -> None:
        super().__init__(f"{done} of {total}")
        self.done, self.total = done, total


def run(
    tasks: Iterable[Task],
    results: Results,
    told: Callable[[Row], str] | None = None,
    figures: Callable[[Row], str] | None = None,
) -> list[Row]:
    """Does every task that ``results`` does not hold yet, recording each as it ends; returns the rows of all tasks.

    ``told``: what to say of a row at once, failed or not; ``figures``: the same after the task's label, the only line
    of a task.  Raises ``Interruption`` on Ctrl-C, with the file in order.
    """
    everything = list(tasks)
    gc.freeze()  # what stands before it is measured is not looked through after every measurement
    todo = [task for task in everything if not results.done(task.key)]
    try:
        results.write()
        with Progress([task.cost for task in todo], figures is not None) as progress:
            if len(todo) < len(everything):
                progress.say(f"{len(everything) - len(todo)} of {len(everything)} measurements are in {results.path}")
                other = results.of_other_code()
                if other and not results.anew:
                    progress.say(f"{other} rows there are of other code than this: --anew measures them again")
            for task in todo:
                progress.begin(task.label)
                row = _measured(task, progress.tick)
                results.add(task.key, row)
                if told is not None:
                    progress.say(told({**task.key, **row}))
                elif "failed" in row:
                    progress.say(f"failed: {task.label}: {row['failed']}")
                progress.end(figures({**task.key, **row}) if figures is not None else "")
    except KeyboardInterrupt:
        done = sum(results.done(task.key) for task in everything)
        raise Interruption(done, len(everything)) from None
    finally:
        gc.unfreeze()
    return [row for task in everything for row in results.rows if _is(row, task.key)]


def _is(row: Row, key: Mapping[str, Any]) -> bool:
    return all(row.get(name) == value for name, value in key.items())


def _measured(task: Task, tick: Tick) -> Row:
    """The task's figures; out of memory, a figure that is no finite number and a guest's failure are a failed row."""
    import torch

    try:
        row = task.measure(tick)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {"failed": OUT_OF_MEMORY}
    except Exception as error:
        if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
            return {"failed": OUT_OF_MEMORY}
        if not task.guest:
            raise
        return {"failed": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"}
    wrong = not_finite(row)
    return row if wrong is None else {"failed": f"{wrong}: the weights, or what was computed with them, overflowed"}
