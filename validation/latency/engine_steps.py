"""Whole decode steps that were recorded, on every card: what they cost besides attention, runtime by runtime.

The engine's (``kvruntime bench engine``): its weights stream at ``weight_efficiency`` while its lanes multiply what
comes (``weight_ops``), a layer takes ``engine_layer_seconds`` besides, and above ``engine_wide``'s rows the products
are other kernels, in more launches: ``layer_seconds`` a layer and ``row_seconds`` a layer and row more.  Those of stock
``generate()`` (``kvruntime bench generate``) are in :mod:`validation.latency.generated_steps`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from kvsim.finite_json import read_json
from kvsim.hardware import Hardware, find_hardware
from kvsim.latency.constants import Constants
from kvsim.latency.roofline import Serving
from kvsim.latency.steps import decode_step
from kvsim.layout import Method
from kvsim.methods import method_named
from kvsim.models.load import load_model
from kvsim.models.model import Model
from validation.latency.held_out import errors
from validation.latency.own import kernels, recorded_attention
from validation.latency.ways import served

RESULTS = Path(__file__).parents[1] / "results"
ENGINE = "kvruntime"
START = {"weight_efficiency": 0.9, "weight_ops": 12.0, "layer": 7.9e-6, "wide": 4e-6, "row": 1.2e-7}
BEST_EFFICIENCY = 0.95
"""No stream reaches more of a stated bandwidth: cards read 0.91 to 0.93 of it."""


@dataclass(frozen=True)
class RecordedStep:
    """``seconds`` of a step of ``batch_size`` rows up to ``num_tokens`` tokens, the median of its fillings."""

    runtime: str
    card: Hardware
    model: Model
    method: Method
    batch_size: int
    num_tokens: int
    seconds: float

    def parts(self, fixed: Constants) -> dict[str, float]:
        """kvsim's seconds by part."""
        load = (self.model, self.method, self.card, self.batch_size, self.num_tokens)
        return decode_step(*load, Serving(engine=served(self.runtime), profile=fixed)).parts


def load(folder: Path = RESULTS) -> list[RecordedStep]:
    """The steps of this project's engine; other libraries' are left out."""
    steps = []
    for path in sorted((folder / "engine").glob("*.json")):
        file = read_json(path, "record")
        card = find_hardware(file["device"]["name"])
        for row in file["rows"]:
            if row["kind"] == "step" and row.get("package") == "kvruntime" and "seconds_per_step" in row:
                about = ENGINE, card, load_model(row["model"]), method_named(row["method"])
                steps.append(RecordedStep(*about, row["batch_size"], row["num_tokens"], row["seconds_per_step"][0]))
    return steps


def fit(steps: Sequence[RecordedStep], fixed: Constants) -> Constants:
    """The engine's five numbers by least squares of the logarithms of the errors."""
    first = np.array(list(START.values()))
    own = [step for step in steps if step.runtime == ENGINE]

    def at(point: np.ndarray) -> Constants:
        found = dict(zip(START, (float(f"{value:.4g}") for value in first * point), strict=True))
        return with_engine(fixed, found)

    def residuals(point: np.ndarray) -> np.ndarray:
        found = with_engine(fixed, dict(zip(START, first * point, strict=True)))
        return np.log([sum(step.parts(found).values()) / step.seconds for step in own])

    high = np.array([BEST_EFFICIENCY / START["weight_efficiency"], 10.0, 10.0, 10.0, 10.0])
    found = least_squares(
        residuals, np.ones(len(first)), bounds=(0.01, high), loss="soft_l1", f_scale=0.05, diff_step=1e-3
    )
    return at(found.x)


def with_engine(fixed: Constants, found: dict[str, float]) -> Constants:
    """``fixed`` with the engine's numbers."""
    own = dict(fixed.overlapped[ENGINE]) | {name: found[name] for name in ("weight_efficiency", "weight_ops")}
    wide = {"rows": 1, "layer_seconds": found["wide"], "row_seconds": found["row"]}
    return replace(
        fixed,
        engine_layer_seconds={**fixed.engine_layer_seconds, ENGINE: found["layer"]},
        engine_wide={**fixed.engine_wide, ENGINE: wide},
        overlapped={**fixed.overlapped, ENGINE: own},
    )


def study(fixed: Constants, folder: Path = RESULTS) -> tuple[Constants, dict[str, Any]]:
    """The fits, and their errors: in sample, by rows, and of each card's constants on every other card's steps."""
    engine = load(folder)
    fitted = fit(engine, fixed)
    found = {}
    for card in dict.fromkeys(step.card.id for step in engine):
        own = [step for step in engine if step.card.id == card]
        found[f"engine, {card}, few rows"] = of([step for step in own if step.batch_size == 1], fitted)
        found[f"engine, {card}, many rows"] = of([step for step in own if step.batch_size > 1], fitted)
    found["engine, all"] = of(engine, fitted)
    return fitted, found | carried(engine, fixed)


def carried(steps: Sequence[RecordedStep], fixed: Constants) -> dict[str, Any]:
    """Each card's constants, those of its attention too, on every other card's steps: nothing of the other card is
    known but what is stated."""
    cards, rows = list(dict.fromkeys(step.card.id for step in steps)), recorded_attention()
    out = {}
    for one in cards:
        base = kernels([row for row in rows if row.card.id == one], fixed)
        own = fit([step for step in steps if step.card.id == one], base)
        for other in cards:
            if other != one:
                out[f"engine, {one} carried to {other}"] = of([s for s in steps if s.card.id == other], own)
    return out


def of(steps: Sequence[RecordedStep], fixed: Constants) -> dict[str, Any]:
    predicted = np.array([sum(step.parts(fixed).values()) for step in steps])
    return errors(predicted, np.array([step.seconds for step in steps]))
