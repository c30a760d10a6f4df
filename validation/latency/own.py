"""This project's own kernels and steps on every card that was recorded: the constants that all of them share.

What differs between cards is their stated bandwidth, multiprocessors and clock, nothing fitted: so the constants of one
card's rows are tried on the other's, both ways (:func:`carried`).
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
from kvsim.latency.attention_curve import Kernel
from kvsim.latency.constants import Constants
from kvsim.latency.profile import ITEM
from kvsim.latency.roofline import Roofline, Serving, coded
from kvsim.layout import LayerShape, Method
from kvsim.methods import method_named
from kvsim.models.load import load_model
from kvsim.models.model import Model
from validation.latency.held_out import errors, quantiles

RESULTS = Path(__file__).parents[1] / "results"
ENGINE = "kvruntime"
KINDS = {"fp16": "full", "packed": "attend"}
SOURCE = "fitted on this project's kernels on {}, python -m validation time"


@dataclass(frozen=True)
class Attention:
    """A recorded layer's attention: by which kernel (``fp16``, ``packed`` or :func:`kvsim.latency.roofline.coded`), of
    what, on which card."""

    width: str
    model: Model
    layer: LayerShape
    method: Method
    card: Hardware
    batch_size: int
    num_tokens: int
    seconds: float


def recorded_attention(folder: Path = RESULTS / "kernels") -> list[Attention]:
    """The rows of this project's kernels, KIVI's portable one and ragged rows left out."""
    out = []
    for path in sorted(folder.glob("*.json")):
        file = read_json(path, "record")
        card = find_hardware(file["device"]["name"])
        for row in file["rows"]:
            width = next((name for name, kind in KINDS.items() if kind == row["kind"]), None)
            if width is None or row["ragged"] or "seconds" not in row:
                continue
            try:
                method = method_named("fp16" if width == "fp16" else row["method"])
            except LookupError:
                continue
            if hasattr(method, "inner"):
                continue
            width = coded(method) or width
            if width == "packed" and row.get("kernel", "fast") != "fast":
                continue
            model = load_model(row["model"])
            layer = LayerShape(row["num_kv_heads"], row["head_dim"], row["head_dim"])
            size = row["batch_size"], row["num_tokens"], row["seconds"][0]
            out.append(Attention(width, model, layer, method, card, *size))
    return out


def seconds(rows: Sequence[Attention], fixed: Constants) -> np.ndarray:
    """Predictions ``[num_rows]``."""
    serving = Serving(engine=ENGINE, profile=fixed)
    found = []
    for row in rows:
        roofline = Roofline(row.model, row.card, serving)
        found.append(sum(roofline.layer_attention(row.method, row.layer, row.batch_size, row.num_tokens)))
    return np.array(found)


def with_kernel(fixed: Constants, width: str, kernel: Kernel) -> Constants:
    return replace(fixed, kernels={**fixed.kernels, f"{ENGINE}/{width}": kernel})


PACKED = {"fixed": 2.6, "value": 1.6, "merge": 1.8, "half": 1.9, "code_ops": 2.6, "scale_ops": 12.0}
CODED = {"fixed": 3.0, "code_ops": 4.0}
"""Fitted of each kernel of coded tokens, of which a few shapes are recorded: all else is that of packed codes."""
FULL = {"fixed": 0.5, "value": 0.6, "merge": 3.5, "half": 0.1, "efficiency": 0.91}
UNITS = {"fixed": 1e-6, "value": 1e-6 / 512, "merge": 1e-6, "half": 1e3}
"""Of the fitted numbers: microseconds a launch, for 512 values, a split; thousands of tokens."""


def kernel_at(names: Sequence[str], point: Sequence[float], **more: Any) -> Kernel:
    values: dict[str, Any] = {
        name: float(value) * UNITS.get(name, 1.0) for name, value in zip(names, point, strict=True)
    }
    start: dict[str, Any] = {"item": ITEM, "efficiency": 1.0, "source": ""}
    return Kernel(**(start | more | values))


def fit(
    rows: Sequence[Attention], fixed: Constants, width: str, efficiency: float | None = None,
    packed: Kernel | None = None,
) -> Kernel:  # fmt: skip
    """The kernel of ``width`` that fits its rows best, by relative error; with ``packed`` but for :data:`CODED` that.

    ``efficiency``: the share of the bandwidth that packed codes stream at, which is that of the 16-bit kernel: where
    one card alone is fitted, its unpacking and its stream take about as long, and could not be told apart.
    """
    start = CODED if packed else PACKED if width == "packed" else FULL
    own = [row for row in rows if row.width == width]
    measured = np.array([row.seconds for row in own])
    more: dict[str, Any] = {} if efficiency is None else {"efficiency": efficiency}
    if packed:
        same = ("value", "merge", "half", "efficiency")
        more = {name: getattr(packed, name) for name in same}
    first = np.array(list(start.values()))

    def residuals(point: np.ndarray) -> np.ndarray:
        return np.log(seconds(own, with_kernel(fixed, width, kernel_at(list(start), first * point, **more))) / measured)

    found = least_squares(
        residuals, np.ones(len(first)), bounds=(0.02, 10.0), loss="soft_l1", f_scale=0.1, diff_step=1e-3
    )
    kernel = kernel_at(list(start), first * found.x, **more)
    low, high = quantiles(measured / seconds(own, with_kernel(fixed, width, kernel)))
    names = " and ".join(dict.fromkeys(row.card.id for row in own))
    return replace(kernel, low=low, high=high, source=SOURCE.format(names))


def kernels(rows: Sequence[Attention], fixed: Constants) -> Constants:
    """``fixed`` with this project's kernels fitted to ``rows``."""
    full = fit(rows, fixed, "fp16")
    fixed = with_kernel(fixed, "fp16", full)
    packed = fit(rows, fixed, "packed", full.efficiency)
    fixed = with_kernel(fixed, "packed", packed)
    for width in widths_of_codes(rows):
        fixed = with_kernel(fixed, width, fit(rows, fixed, width, packed=packed))
    return fixed


def widths_of_codes(rows: Sequence[Attention]) -> list[str]:
    """The kernels of coded tokens in the order of ``rows``."""
    return list(dict.fromkeys(row.width for row in rows if row.width not in KINDS))


def left_out(rows: Sequence[Attention], fixed: Constants) -> dict[str, Any]:
    """Errors of each kernel of coded tokens on its rows, each by the constants of its others."""
    out = {}
    for width in widths_of_codes(rows):
        own = [row for row in rows if row.width == width]
        found = []
        for row in own:
            others = [other for other in own if other is not row]
            kernel = fit(others, fixed, width, packed=fixed.kernels[f"{ENGINE}/packed"])
            found.append(seconds([row], with_kernel(fixed, width, kernel))[0])
        out[f"{ENGINE}/{width}"] = errors(np.array(found), np.array([row.seconds for row in own]))
    return out


def judged(rows: Sequence[Attention], fixed: Constants) -> dict[str, Any]:
    """Errors by kernel."""
    out = {}
    for width in (*KINDS, *widths_of_codes(rows)):
        own = [row for row in rows if row.width == width]
        if own:
            out[f"{ENGINE}/{width}"] = errors(seconds(own, fixed), np.array([row.seconds for row in own]))
    return out


def carried(rows: Sequence[Attention], fixed: Constants) -> dict[str, Any]:
    """Each card's kernels tried on every other card's rows: ``h100-sxm to h200-sxm`` -> errors by kernel."""
    cards = list(dict.fromkeys(row.card.id for row in rows))
    out = {}
    for one in cards:
        own = kernels([row for row in rows if row.card.id == one], fixed)
        for other in cards:
            if other != one:
                out[f"{one} to {other}"] = judged([row for row in rows if row.card.id == other], own)
    return out
