"""The tasks by name: one module and one row a task."""

from __future__ import annotations

from kvruntime.eval.tasks import agreement, gsm8k, lambada, longbench, needle, passkey, ruler
from kvruntime.eval.tasks.task import EvalTask, Example, Part, TaskRequest
from kvsim.nearest import hint

TASKS: dict[str, EvalTask] = {
    "needle": needle.TASK,
    "passkey": passkey.TASK,
    "ruler": ruler.TASK,
    "agreement": agreement.TASK,
    "lambada": lambada.TASK,
    "gsm8k": gsm8k.TASK,
    "longbench": longbench.TASK,
}
"""Name -> task."""


def task_named(name: str) -> EvalTask:
    """Raises ``LookupError`` for a name that is none, with the nearest one."""
    if name not in TASKS:
        raise LookupError(f"unknown task {name!r}: {hint(name, TASKS)}allowed are {', '.join(TASKS)}")
    return TASKS[name]


__all__ = ["TASKS", "EvalTask", "Example", "Part", "TaskRequest", "task_named"]
