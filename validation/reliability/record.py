"""``validation reliability``: the runs one by one, a row each, with what a row of this repository is measured in."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvruntime.bench.harness.store import Store, rows_as_lines
from kvsim.models.load import load_model
from validation.recorded import FOLDER, circumstances, slug
from validation.reliability import memory, phases, processes, resident, runs, subjects
from validation.reliability.findings import Findings
from validation.reliability.subjects import Scale

if TYPE_CHECKING:
    from kvruntime.bench.kernels.precompile import Case

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
    if place.type == "cuda" and (cases := kernels(place, scale, names)):
        from kvruntime.bench.kernels.precompile import compile_ahead

        compile_ahead(cases, device, say)
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


def kernels(device: torch.device, scale: Scale, names: Collection[str]) -> list[Case]:
    """What the runs of these names attend and store with, to be compiled in several processes."""
    from kvruntime.bench.kernels.attention import Shape
    from kvruntime.bench.kernels.precompile import Case

    out = []
    if MANY & set(names):
        out += [Case(Shape("reliability", 4, 2, 64, 3, 512), method) for method in subjects.every_layout(scale)]
    if "memory by phase" in names:
        for name, prompt in phases.chosen(device, scale).items():
            model = load_model(name)
            layer = model.cache_layers[0]
            heads = (model.num_q_heads, layer.num_kv_heads, layer.key_dim)
            shapes = [Shape(name, *heads, rows, prompt) for rows in (1, len(phases.BEAMS))]
            out += [Case(shape, each, steps=True) for shape in shapes for each in subjects.layouts(device, scale)]
    return out


def keep(path: Path, found: Sequence[Any]) -> None:
    """Puts rows into the file, in place of older ones of the same run."""
    store = Store(path, SCHEMA, "run")
    store.put(list(found), lambda one, other: all(one.get(name, "") == other.get(name, "") for name in KEY))
    store.write(rows_as_lines(SCHEMA, store.rows))


def default_path(device: str) -> Path:
    """Where the rows of a device are recorded."""
    name = "cpu" if not device.startswith("cuda") else slug(torch.cuda.get_device_name(device))
    return FOLDER / "reliability" / f"{name}.json"
