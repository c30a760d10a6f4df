"""Whole decode steps that ``kvruntime bench engine`` recorded against kvsim's: a layer's cost in that engine.

A step takes what kvsim's weights and attention take and ``engine_layer_seconds`` a layer.  Above ``engine_wide``'s rows
the products are other kernels, in more launches: its ``layer_seconds`` a layer more.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kvsim.hardware import find_hardware
from kvsim.latency.constants import Constants
from kvsim.latency.roofline import Serving
from kvsim.latency.steps import decode_step
from kvsim.layout import Method
from kvsim.methods import method_named
from kvsim.models.load import load_model
from kvsim.models.model import Model
from validation.latency.held_out import errors

STEPS = Path(__file__).parents[1] / "results" / "engine" / "nvidia-h100-80gb-hbm3.json"
CARD, ENGINE = "h100-sxm", "kvruntime"


@dataclass(frozen=True)
class RecordedStep:
    """``seconds`` of a step of ``batch_size`` rows up to ``num_tokens`` tokens, the median of its fillings."""

    model: Model
    method: Method
    batch_size: int
    num_tokens: int
    seconds: float

    def parts(self, fixed: Constants) -> dict[str, float]:
        """kvsim's seconds by part."""
        load = (self.model, self.method, find_hardware(CARD), self.batch_size, self.num_tokens)
        return decode_step(*load, Serving(engine=ENGINE, profile=fixed)).parts


def load(path: Path = STEPS) -> list[RecordedStep]:
    """This engine's recorded steps, other libraries' left out."""
    steps = []
    for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        if row["kind"] == "step" and row["package"] == "kvruntime" and "seconds_per_step" in row:
            size = row["batch_size"], row["num_tokens"], row["seconds_per_step"][0]
            steps.append(RecordedStep(load_model(row["model"]), method_named(row["method"]), *size))
    return steps


def fit(steps: Sequence[RecordedStep], fixed: Constants) -> Constants:
    """The engine's two numbers by least squares of the relative errors."""
    free = replace(fixed, engine_layer_seconds=dict(fixed.engine_layer_seconds) | {ENGINE: 0.0}, engine_wide={})
    rows = fixed.engine_wide[ENGINE]["rows"]
    left, right = [], []
    for step in steps:
        parts, layers = step.parts(free), step.model.num_blocks
        wide = step.batch_size > rows
        left.append([layers / step.seconds, wide * layers / step.seconds])
        right.append(1 - sum(parts.values()) / step.seconds)
    layer, more = (float(f"{value:.3g}") for value in np.linalg.lstsq(np.array(left), np.array(right))[0])
    return replace(
        fixed,
        engine_layer_seconds=dict(fixed.engine_layer_seconds) | {ENGINE: layer},
        engine_wide={ENGINE: {"rows": rows, "layer_seconds": more}},
    )


def study(fixed: Constants, path: Path = STEPS) -> tuple[Constants, dict[str, Any]]:
    """The fit, and its errors in sample: of few rows, of many, and of many where these take nothing more."""
    steps = load(path)
    fitted = fit(steps, fixed)
    wide = [step for step in steps if step.batch_size > fitted.engine_wide[ENGINE]["rows"]]
    narrow = [step for step in steps if step not in wide]
    return fitted, {
        "few rows": of(narrow, fitted),
        "many rows": of(wide, fitted),
        "many rows, nothing more for them": of(wide, replace(fitted, engine_wide={})),
        "all": of(steps, fitted),
    }


def of(steps: Sequence[RecordedStep], fixed: Constants) -> dict[str, Any]:
    predicted = np.array([sum(step.parts(fixed).values()) for step in steps])
    return errors(predicted, np.array([step.seconds for step in steps]))
