"""Which runtime a recorded row of a benchmark timed, by the names of kvsim's constants of time.

| runtime | what it is |
| --- | --- |
| ``kvruntime`` | :class:`kvruntime.engine.Engine` |
| ``kvruntime:generate`` | stock ``generate()``, this project's cache as it comes: a CUDA graph of the model's step |
| ``kvruntime:compiled`` | the same cache, compiled |
| ``transformers`` | the dynamic cache, at lengths that the process has seen: the host launches every kernel |
| ``transformers:new`` | the same at lengths that are new to it: cuDNN plans its attention every step |
| ``transformers:static`` | the static cache, compiled |

A row of the dynamic cache is two: its first call has only new lengths, the others only seen ones.  Of a call it is
the median step where the row has it, which a pause of the host does not move, else the mean; a first call that ran
beside other processes is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median_low
from typing import Any, NamedTuple

from kvsim.engines import Engine, make_engine

ENGINE, GENERATE, COMPILED = "kvruntime", "kvruntime:generate", "kvruntime:compiled"
SEEN, NEW, STATIC = "transformers", "transformers:new", "transformers:static"


def served(runtime: str) -> Engine | str:
    """What stores a model's layers under a runtime: this project's cache leaves windows and states exact."""
    engine, _, steps = runtime.partition(":")
    return make_engine(engine, steps=steps) if engine == ENGINE and steps else runtime


class Way(NamedTuple):
    """``seconds`` under a runtime, ``(median, least, most)``."""

    runtime: str
    seconds: tuple[float, float, float]


def ways(row: Mapping[str, Any]) -> list[Way]:
    """What a greedy row of ``bench generate`` timed steps of; nothing of another library's cache or a host's steps."""
    if row.get("call", "greedy") != "greedy" or row.get("runs") == "plain":
        return []
    middle, low, high = row["seconds_per_step"]
    package, compiled = row["package"], bool(row.get("runs"))
    if package == "kvruntime":
        return [Way(COMPILED if compiled else GENERATE, (middle, low, high))]
    if package != "transformers":
        return []
    if compiled:
        return [Way(STATIC, (middle, low, high))]
    first, *others = row.get("calls") or ([high] if row["repeats"] == 1 else [high, low])
    first, others = row.get("new_length_seconds", first), row.get("middle_steps", others)
    found = [] if row.get("beside") else [Way(NEW, (first, first, first))]
    return found + ([Way(SEEN, (median_low(others), min(others), max(others)))] if others else [])


def prompt_way(row: Mapping[str, Any]) -> Way:
    """Whose prompt a row timed: no runtime where it is another library's, or no prompt."""
    none = Way("", (0.0, 0.0, 0.0))
    if row["kind"] == "prefill" and "seconds" in row:
        return Way(ENGINE, tuple(row["seconds"]))
    if row["kind"] != "generate" or "first_token_seconds" not in row:
        return none
    found = ways(row)
    return Way(found[-1].runtime, tuple(row["first_token_seconds"])) if found else none
