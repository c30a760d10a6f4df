"""Recorded steps of stock ``generate()``: what a layer and a step take in each of its ways
(:mod:`validation.latency.ways`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from kvsim.finite_json import read_json
from kvsim.hardware import find_hardware
from kvsim.latency.constants import Constants
from kvsim.methods import method_named
from kvsim.models.load import load_model
from kvsim.models.model import Model
from validation.latency.engine_steps import RESULTS, RecordedStep, of
from validation.latency.ways import COMPILED, GENERATE, NEW, SEEN, STATIC, ways

WIDE = {"layer_seconds": "wide", "channel_seconds": "channel"}
"""Of ``engine_wide``, the fitted number each is."""
START: dict[str, dict[str, float]] = {
    GENERATE: {"efficiency": 0.74, "layer": 3.3e-5, "step": 4.8e-4, "wide": 6e-6, "channel": 2e-10},
    COMPILED: {"layer": 5e-5, "step": 1e-3, "wide": 4e-5},
    SEEN: {"layer": 7.5e-4, "step": 8e-4, "table": 0.57},
    NEW: {"step": 4.7e-2},
    STATIC: {"efficiency": 0.8, "layer": 7e-5, "step": 5e-4, "wide": 9e-6, "channel": 5e-10},
}
"""What is fitted of each way, in this order, and where it starts: seconds of a layer and of a step, and where there is
more than one row of each layer, and of each layer, row and channel; the share of the bandwidth at which weights stream;
the share of a layer's seconds that one takes in a model with a table of positions."""
KINDS: dict[str, Callable[[Model], bool]] = {
    "state": lambda model: bool(model.state_layers),
    "window": lambda model: any(layer.window is not None for layer in model.cache_layers),
    "norm": lambda model: bool(model.more_norms),
}
"""Kinds of layers beside full attention whose share of a layer's seconds is fitted, and norms beyond two a layer, and
which models have them."""
SHARES = {"state": 1.0, "window": 1.0, "norm": 0.15}
"""Where these begin."""
PASSES = (GENERATE,)
"""Ways in which the card is not ahead of the host, so that how often states are read shows."""


def load(folder: Path = RESULTS) -> list[RecordedStep]:
    """The recorded steps of every way."""
    steps = []
    kinds = ("generate", "again", "compiled")
    for path in (path for kind in kinds for path in sorted((folder / kind).glob("*.json"))):
        file = read_json(path, "record")
        card = find_hardware(file["device"]["name"])
        for row in file["rows"]:
            if row["kind"] != "generate" or "seconds_per_step" not in row:
                continue
            for runtime, seconds in ways(row):
                method = method_named(row["method"] if row["package"] == "kvruntime" else "bf16")
                about = runtime, card, load_model(row["model"]), method
                steps.append(RecordedStep(*about, row["batch_size"], row["num_tokens"], seconds[0]))
    return steps


def fit(steps: Sequence[RecordedStep], fixed: Constants) -> Constants:
    """The constants of every way that has steps, one after the other, by least squares of the logarithms."""
    for runtime in START:
        own = [step for step in steps if step.runtime == runtime]
        if own:
            fixed = _fitted(runtime, own, fixed)
    return fixed


def _fitted(runtime: str, steps: Sequence[RecordedStep], fixed: Constants) -> Constants:
    kinds = [name for name, has in KINDS.items() if any(has(step.model) for step in steps)]
    start = START[runtime] | ({kind: SHARES[kind] for kind in kinds} if runtime != NEW else {})
    if runtime in PASSES and "state" in kinds:
        start |= {"passes": 4.0}
    first = np.array(list(start.values()))

    def at(point: np.ndarray, short: Callable[[float], float] = float) -> Constants:
        values = (short(float(value)) for value in first * np.exp(point))
        return with_way(fixed, runtime, dict(zip(start, values, strict=True)))

    def residuals(point: np.ndarray) -> np.ndarray:
        found = at(point)
        return np.log([sum(step.parts(found).values()) / step.seconds for step in steps])

    found = least_squares(residuals, np.zeros(len(first)), loss="soft_l1", f_scale=0.1, diff_step=1e-3)
    return at(found.x, lambda value: float(f"{value:.4g}"))


def with_way(fixed: Constants, runtime: str, found: Mapping[str, float]) -> Constants:
    """``fixed`` with the numbers of one way; a dynamic cache's layers take as long at new lengths as at seen ones, and
    a compiled step streams its weights as a graph of the model's own does."""
    layer = found.get("layer", fixed.engine_layer_seconds.get(SEEN, 0.0))
    efficiency = found.get("efficiency")
    if runtime == COMPILED:
        efficiency = fixed.overlapped[GENERATE]["weight_efficiency"]
    own = dict(fixed.overlapped[runtime]) | ({} if efficiency is None else {"weight_efficiency": efficiency})
    wide = {key: found[name] for key, name in WIDE.items() if name in found}
    table = {runtime: found["table"]} if "table" in found else {}
    shares = {name: found[name] for name in KINDS if name in found}
    if runtime == NEW:
        table = {runtime: fixed.engine_table_share.get(SEEN, 1.0)}
        shares = dict(fixed.engine_layer_shares.get(SEEN, {}))
    passes = {runtime: found["passes"]} if "passes" in found else {}
    return replace(
        fixed,
        engine_state_passes={**fixed.engine_state_passes, **passes},
        engine_layer_seconds={**fixed.engine_layer_seconds, runtime: layer},
        engine_step_seconds={**fixed.engine_step_seconds, runtime: found.get("step", 0.0)},
        engine_wide={**fixed.engine_wide, **({runtime: {"rows": 1, **wide}} if wide else {})},
        overlapped={**fixed.overlapped, runtime: own},
        engine_table_share={**fixed.engine_table_share, **table},
        engine_layer_shares={**fixed.engine_layer_shares, **({runtime: shares} if shares else {})},
    )


def study(fixed: Constants, folder: Path = RESULTS) -> tuple[Constants, dict[str, Any]]:
    """The fits, and their errors in sample."""
    steps = load(folder)
    fitted = fit(steps, fixed)
    found = {}
    for runtime in START:
        own = [step for step in steps if step.runtime == runtime]
        if own:
            found[f"{runtime}, in sample"] = of(own, fitted)
    return fitted, found
