"""Tasks over several processes: on CUDA most of the time is the compiler's, and every process has its own allocator.

A worker builds the same list of tasks from the same settings and is told names.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from multiprocessing import get_context

from validation.claims.generated import generate_tasks
from validation.claims.memory import layer_tasks
from validation.claims.peak import peak_tasks
from validation.claims.subjects import grid_for
from validation.claims.tasks import Row, Task, judged


def default_jobs(device_type: str) -> int:
    """Processes: one on the CPU, whose cores a single one uses already; on CUDA most of the machine's cores."""
    return 1 if device_type == "cpu" else max(1, min(12, len(os.sched_getaffinity(0)) - 4))


def run_tasks(
    tasks: Sequence[Task], jobs: int, device: str, quick: bool, models: tuple[str, ...]
) -> Iterator[tuple[Task, list[Row]]]:
    """``(task, rows)`` of every task as it ends; tasks of one group run in one process, one after the other."""
    if jobs == 1:
        if device == "cpu":
            import torch

            torch.set_num_threads(1)  # small operators: a barrier on a core that others use costs more than it saves
        for task in tasks:
            yield task, judged(task)
        return
    groups: dict[str, list[Task]] = {}
    for task in tasks:
        groups.setdefault(task.group, []).append(task)
    heavy_first = sorted(groups.values(), key=lambda group: -sum(task.cost for task in group))
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        work = {
            pool.submit(_work, device, quick, models, [task.name for task in group]): group for group in heavy_first
        }
        try:
            for done in as_completed(work):
                yield from zip(work[done], done.result(), strict=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _work(device: str, quick: bool, models: tuple[str, ...], names: list[str]) -> list[list[Row]]:
    tasks = _tasks(device, quick, models)
    return [judged(tasks[name]) for name in names]


@cache
def _tasks(device: str, quick: bool, models: tuple[str, ...]) -> dict[str, Task]:
    return {task.name: task for task in memory_tasks(device, quick, models)}


def memory_tasks(device: str, quick: bool, models: tuple[str, ...]) -> list[Task]:
    """Layers alone, single layers' peaks, ``generate()``."""
    import torch

    place = torch.device(device)
    grid = grid_for(place.type, quick=quick, models=models)
    return [*layer_tasks(grid, place), *peak_tasks(grid, place), *generate_tasks(grid, place)]
