"""``validation reliability``: the runs one by one, a row each, with what a row of this repository is measured in."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from kvruntime.bench.harness.store import Store, rows_as_lines
from validation.recorded import FOLDER, circumstances, slug
from validation.reliability import memory, processes, resident, runs, subjects
from validation.reliability.findings import Findings
from validation.reliability.subjects import Scale

SCHEMA = "validation.reliability/1"
KEY = ("run", "device", "size", "of")

RUNS: dict[str, Callable[[torch.device, Scale], Findings]] = {
    **runs.RUNS,
    "a killed benchmark": processes.killed,
    "two processes": processes.together,
    **memory.RUNS,
    "resident memory": resident.resident,
}


MANY = {"a row of NaN", "fuzzed calls"}
"""Runs through every layout of every room."""


def rows(
    names: Sequence[str],
    device: str,
    quick: bool,
    say: Callable[[str], None],
    command: str,
    layouts: Sequence[str] = (),
    models: Sequence[str] = (),
) -> Iterator[Any]:
    """A row a run: whether its promise holds, and what was found.  A run that fails is a row, and the next begins.

    ``layouts``, ``models``: what the runs are limited to, none: everything (:class:`Scale`).
    """
    place = torch.device(device)
    scale = (subjects.CI if quick else subjects.CARD)._replace(layouts=tuple(layouts), models=tuple(models))
    facts = circumstances(device, command)
    if place.type == "cuda" and MANY & set(names):
        _compile(device, scale, say)
    for name in names:
        started = time.perf_counter()
        say(f"{name} ...")
        figures: Sequence[Any] = ()
        try:
            found, figures = RUNS[name](place, scale)
            holds = True
        except Exception as error:  # whatever it is, the promise is not kept
            found, holds = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}", False
            figures = getattr(error, "figures", ())
        finally:
            if place.type == "cuda":
                torch.cuda.empty_cache()
        seconds = round(time.perf_counter() - started, 2)
        say(f"{name}: {'holds' if holds else 'FAILS'} ({seconds} s): {found}")
        row = {"run": name, "device": facts["device_name"], "size": "quick" if quick else "full"}
        row |= {"of": ", ".join((*models, *layouts)), "holds": holds, "found": found, "seconds": seconds} | facts
        yield row | ({"figures": list(figures)} if figures else {})


def _compile(device: str, scale: Scale, say: Callable[[str], None]) -> None:
    """The kernels of the layouts that the runs go through, in several processes."""
    from kvruntime.bench.kernels.attention import Shape
    from kvruntime.bench.kernels.precompile import Case, compile_ahead

    shape = Shape("reliability", 4, 2, 64, 3, 512)
    compile_ahead([Case(shape, method) for method in subjects.every_layout(scale)], device, say)


def keep(path: Path, found: Sequence[Any]) -> None:
    """Puts rows into the file, in place of older ones of the same run."""
    store = Store(path, SCHEMA, "run")
    store.put(list(found), lambda one, other: all(one.get(name, "") == other.get(name, "") for name in KEY))
    store.write(rows_as_lines(SCHEMA, store.rows))


def default_path(device: str) -> Path:
    """Where the rows of a device are recorded."""
    name = "cpu" if not device.startswith("cuda") else slug(torch.cuda.get_device_name(device))
    return FOLDER / "reliability" / f"{name}.json"
