"""The constants of a runtime's part of a profile, fitted to the steps that were measured of it.

What is fitted predicts by kvsim's own model of time (:func:`kvsim.latency.steps.decode_step`): logarithms of the
constants by damped least squares of the logarithms of predicted over measured, each held a little to where it starts,
so that one that the steps say nothing of stays there.  What an attention kernel takes however little it reads is not
fitted: two engines of one layout that are made one after the other differ by more of a step than it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import mean
from typing import Any

import numpy as np

from kvruntime.calibrate.steps import COMPILED, ENGINE, GENERATE, NEW, STOCK, Step
from kvsim.hardware import Hardware
from kvsim.latency.constants import Constants, constants
from kvsim.latency.profile import Part, Rates, with_part
from kvsim.latency.roofline import Serving, method_width, packed_layout, scales_a_code
from kvsim.latency.steps import decode_step
from kvsim.layout import Method

HELD = 0.03
"""How much a constant is held to its start, against a step that is mispredicted."""
FEW = {GENERATE: 0.3, COMPILED: 0.1}
"""The same where there are hardly more steps than constants, and the start is what other records gave: many of them, or
few."""
ROUNDS = 30
WIDE = {"layer": "wide", "channel": "channel"}
GRAPHS = (GENERATE, COMPILED)
"""Runtimes of ``generate()`` whose steps are CUDA graphs."""
FEWEST = 4
"""Steps below which nothing is fitted."""


def fit(runtime: str, steps: Sequence[Step], base: Constants, card: Hardware, start: Part) -> Part:
    """The part of ``runtime`` that predicts ``steps`` best, by least squares from ``start``.

    ``base``: the constants of everything else.  Raises ``ValueError`` for fewer than :data:`FEWEST` steps.
    """
    least = FEWEST if runtime == ENGINE else 2
    if len(steps) < least:
        raise ValueError(f"{runtime}: {len(steps)} steps were measured, {least} and more are needed")
    if runtime == NEW:  # the host launches what it does at lengths that it has seen
        start = replace(start, layer_seconds=base.engine_layer_seconds[STOCK])
    names, first = variables(runtime, start, steps)

    def part_at(point: np.ndarray) -> Part:
        return part_of(runtime, start, dict(zip(names, (first * np.exp(point)).tolist(), strict=True)), steps)

    def residuals(point: np.ndarray) -> np.ndarray:
        return np.log(predicted(runtime, part_at(point), steps, base, card) / [step.seconds for step in steps])

    found = part_at(damped(residuals, len(names), FEW.get(runtime, HELD)))
    ratios = np.array([step.seconds for step in steps]) / predicted(runtime, found, steps, base, card)
    return replace(found, low=float(ratios.min()), high=float(ratios.max()))


def predicted(runtime: str, part: Part, steps: Sequence[Step], base: Constants, card: Hardware) -> np.ndarray:
    """Seconds ``[num_steps]`` by ``part``."""
    fixed = with_part(base, runtime, part, card)
    serving = {bits: Serving(bits, engine=runtime, profile=fixed) for bits in (16, 32)}
    return np.array(
        [
            decode_step(
                step.model,
                step.method,
                card,
                step.batch_size,
                step.num_tokens,
                serving[32 if getattr(step.method, "dtype", "") == "float32" else 16],
            ).seconds.value
            for step in steps
        ]
    )


def first_guess(read: float) -> Part:
    """Where a fit starts: the stated constants of the engine, at the rate at which the card reads."""
    stated = constants()
    full, packed = stated.kernels[f"{ENGINE}/fp16"], stated.kernels[f"{ENGINE}/packed"]
    wide = stated.engine_wide[ENGINE]
    ops = packed.code_ops or 2.6
    return Part(
        weight_bandwidth=0.95 * read,
        layer_seconds=stated.engine_layer_seconds[ENGINE],
        weight_ops=stated.overlapped[ENGINE].get("weight_ops", 12.0),
        wide={
            "rows": wide["rows"],
            "layer_seconds": wide["layer_seconds"],
            "row_seconds": wide.get("row_seconds", 1e-7),
        },
        kernels={
            "fp16": Rates(full.fixed, 0.95 * read, full.value, full.merge or 3e-6, full.half or 100.0),
            "packed": Rates(
                packed.fixed, 0.95 * read, packed.value, packed.merge or 2e-6, packed.half or 2000.0, ops, 14.0
            ),
        },
    )


def guess_of(runtime: str, card: Part) -> Part:
    """Where the fit of a runtime of ``generate()`` starts: PyTorch's stream of weights as it was measured, and what a
    layer and a step take as stated; of a runtime whose host launches everything, as the card's own layer."""
    stated = constants()
    if runtime not in GRAPHS:
        return card
    return replace(
        card,
        layer_seconds=stated.engine_layer_seconds[runtime],
        step_seconds=stated.engine_step_seconds[runtime],
        wide=stated.engine_wide[runtime],
    )


def variables(runtime: str, start: Part, steps: Sequence[Step]) -> tuple[list[str], np.ndarray]:
    """Names of what is fitted, and where each starts."""
    if runtime in GRAPHS:
        wide = {each: start.wide[f"{name}_seconds"] for name, each in WIDE.items() if f"{name}_seconds" in start.wide}
        return ["layer", "step", *wide], np.array([start.layer_seconds, start.step_seconds, *wide.values()])
    if runtime == NEW:
        return ["step"], np.array([min(step.seconds for step in steps) / 2])
    if runtime != ENGINE:  # two constants, of which a card's first guess says nothing
        each = min(step.seconds / step.model.num_blocks for step in steps)
        return ["layer", "step"], np.array([each / 2, min(step.seconds for step in steps) / 4])
    full, packed = start.kernels["fp16"], start.kernels["packed"]
    found = {
        "weights": start.weight_bandwidth,
        "ops": start.weight_ops,
        "layer": start.layer_seconds,
        "wide": start.wide["layer_seconds"],
        "row": start.wide["row_seconds"],
        "cache": full.bandwidth,
    }
    for layout, method in layouts(steps).items():
        found[layout] = packed.code_ops + packed.scale_ops * scales_a_code(method, cache_layer(steps, method))
    return list(found), np.array(list(found.values()))


def layouts(steps: Sequence[Step]) -> dict[str, Method]:
    """The packed layouts that were measured: name -> a method of it."""
    out: dict[str, Method] = {}
    for step in steps:
        layer = step.model.cache_layers[0]
        if method_width(step.method, layer) == "packed":  # type: ignore[arg-type]  # every method is frozen
            out.setdefault(packed_layout(step.method, layer), step.method)
    return out


def cache_layer(steps: Sequence[Step], method: Method) -> Any:
    return next(step.model.cache_layers[0] for step in steps if step.method == method)


def part_of(runtime: str, start: Part, found: dict[str, float], steps: Sequence[Step]) -> Part:
    """The part with the fitted constants in it."""
    if runtime != ENGINE:
        wide = {**start.wide, **{f"{name}_seconds": found[each] for name, each in WIDE.items() if each in found}}
        layer = found.get("layer", start.layer_seconds)
        return replace(start, layer_seconds=layer, step_seconds=found["step"], wide=wide)
    full, packed = (replace(start.kernels[name], bandwidth=found["cache"]) for name in ("fp16", "packed"))
    kernels = {"fp16": full}
    ops = {name: found[name] for name in layouts(steps)}
    for name, each in ops.items():
        kernels[f"packed-{name}"] = replace(packed, code_ops=each, scale_ops=0.0)
    if ops:
        scales = [scales_a_code(method, cache_layer(steps, method)) for method in layouts(steps).values()]
        kernels["packed"] = replace(packed, **line(scales, list(ops.values())))
    wide = {**start.wide, "layer_seconds": found["wide"], "row_seconds": found["row"]}
    streams = {"weight_bandwidth": found["weights"], "weight_ops": found["ops"]}
    return replace(start, **streams, layer_seconds=found["layer"], wide=wide, kernels=kernels)


def line(scales: Sequence[float], ops: Sequence[float]) -> dict[str, float]:
    """Operations a code and a scale of the layouts that were not measured, from those that were."""
    if len(set(scales)) < 2:
        return {"code_ops": mean(ops), "scale_ops": 0.0}
    slope, at_zero = np.polyfit(scales, ops, 1)
    if slope <= 0 or at_zero <= 0:
        return {"code_ops": mean(ops), "scale_ops": 0.0}
    return {"code_ops": float(at_zero), "scale_ops": float(slope)}


def damped(residuals: Callable[[np.ndarray], np.ndarray], size: int, held: float = HELD) -> np.ndarray:
    """The point ``[size]`` of least squares of ``residuals`` and of ``held`` times the point itself, from zero
    (Levenberg-Marquardt).

    >>> damped(lambda point: np.array([100 * (point[0] - 1.0)]), 1).round(4)
    array([1.])
    """

    def both(point: np.ndarray) -> np.ndarray:
        return np.concatenate([residuals(point), held * point])

    point, damping = np.zeros(size), 1e-2
    errors = both(point)
    for _ in range(ROUNDS):
        columns = [(both(point + step) - errors) / 1e-4 for step in 1e-4 * np.eye(size)]
        jacobian = np.stack(columns, 1)
        normal, gradient = jacobian.T @ jacobian, jacobian.T @ errors
        before = errors @ errors
        while damping < 1e6:
            moved = point - np.linalg.solve(normal + damping * np.diag(np.diag(normal)), gradient)
            moved = np.clip(moved, -6.0, 6.0)
            there = both(moved)
            if there @ there < before:
                point, errors, damping = moved, there, damping / 5
                break
            damping *= 5
        if before - errors @ errors < 1e-9 * before:
            break
    return point
