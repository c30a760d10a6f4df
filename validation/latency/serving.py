"""Published serving measurements against :mod:`kvsim.latency.steps`: the fit, and its errors on groups held out.

A row is one load on one card (columns model_path, system, backend, precision, isl, osl, batch_size,
silicon_ttft_ms, silicon_tpot_ms): requests in flight, their lengths, the mean time to the first token and per
token after it.  What the columns leave open is decided once for all rows: weights as the precision says (4-bit
floats with a scale a 16 elements, 4.5 bits, or as the checkpoint was published), a cache in 8 bits where the
weights are quantized, else in 16; without a precision the weights have 16 bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from kvsim.hardware import Hardware, find_hardware
from kvsim.latency.roofline import Constants, Serving, constants
from kvsim.latency.steps import first_token, token_step
from kvsim.layout import Method
from kvsim.methods import make_method
from kvsim.models.load import load_model
from kvsim.models.model import Model
from kvsim.models.weight_storage import known_weights, weight_nbytes
from validation.latency.held_out import errors, inside, quantiles, read_csv

MEAN_BAR, MEDIAN_BAR, BAND_BAR = 0.15, 0.10, 0.90
NEEDED = (
    "model_path",
    "system",
    "backend",
    "precision",
    "isl",
    "osl",
    "batch_size",
    "silicon_ttft_ms",
    "silicon_tpot_ms",
)
WEIGHT_BITS = {
    "": 16.0,
    "bf16": 16.0,
    "fp16": 16.0,
    "bfloat16": 16.0,
    "fp8": 8.0,
    "int8": 8.0,
    "fp4": 4.5,
    "nvfp4": 4.5,
}
MXFP4 = 4.25
"""Bits of a 4-bit float with an 8-bit scale for 32 elements, as gpt-oss's experts were published."""

FITTED = ("weight_efficiency", "layer_seconds", "prefill_efficiency")
START, LOW, HIGH = (0.8, 3e-5, 0.6), (0.3, 0.0, 0.2), (1.0, 3e-4, 1.2)
FITTED_FIRST = ("prefill_seconds", "prefill_queue")
FIRST_START, FIRST_LOW, FIRST_HIGH = (0.05, 0.05), (0.0, 0.0), (1.0, 1.0)
NUM_CONSTANTS = len(FITTED) + len(FITTED_FIRST) + 1
"""And SGLang's share of the memory, read off the queues that its rows show."""


@dataclass(frozen=True)
class Row:
    """One measured load.  ``first`` and ``each``: seconds to the first token, and per token after it."""

    model: Model
    method: Method
    hardware: Hardware
    engine: str
    weight_bits: float
    batch_size: int
    input_len: int
    output_len: int
    first: float
    each: float

    @property
    def group(self) -> str:
        """Model, card and engine: what is held out together."""
        return f"{self.model.name.rpartition('/')[2]} {self.hardware.id} {self.engine}"

    def serving(self, fixed: Constants) -> Serving:
        return Serving(self.weight_bits, engine=self.engine, profile=fixed)

    def token(self, fixed: Constants) -> float:
        """Predicted seconds per output token."""
        loads = (self.batch_size, self.input_len, self.output_len)
        return token_step(self.model, self.method, self.hardware, *loads, self.serving(fixed)).seconds.value

    def first_token(self, fixed: Constants) -> float:
        """Predicted seconds to the first token."""
        loads = (self.batch_size, self.input_len, self.output_len)
        return first_token(self.model, self.method, self.hardware, *loads, self.serving(fixed)).seconds.value


def load(path: Path) -> list[Row]:
    """The rows of a file.  Raises ``LookupError`` for a model or card that kvsim does not know, ``ValueError`` for a
    precision that is not in :data:`WEIGHT_BITS` or more than one card a row."""
    out = []
    for row in read_csv(path, NEEDED):
        model, precision = load_model(row["model_path"]), row["precision"].lower()
        if precision not in WEIGHT_BITS:
            raise ValueError(f"{path.name}: precision {precision!r}, allowed are {', '.join(WEIGHT_BITS)}")
        if row.get("tp_size") not in (None, "", "1"):
            raise ValueError(f"{path.name}: tp_size {row['tp_size']}, these are measurements of one card")
        bits = WEIGHT_BITS[precision]
        if model.model_type == "gpt_oss" and bits < 6:
            bits = MXFP4
        out.append(
            Row(
                model=replace(model, name=row["model_path"]),
                method=make_method("fp8" if bits <= 8 else "bf16"),
                hardware=find_hardware(row["system"].replace("_", "-")),
                engine=row["backend"],
                weight_bits=bits,
                batch_size=int(row["batch_size"]),
                input_len=int(row["isl"]),
                output_len=int(row["osl"]),
                first=float(row["silicon_ttft_ms"]) / 1e3,
                each=float(row["silicon_tpot_ms"]) / 1e3,
            )
        )
    return out


def fit(
    rows: Sequence[Row],
    fixed: Constants,
    names: Sequence[str],
    start: Sequence[float],
    bounds: tuple[Sequence[float], Sequence[float]],
    predict: Callable[[Row, Constants], float],
    measured: np.ndarray,
) -> Constants:
    """``fixed`` with the named constants replaced by those of the smallest relative error (soft-l1 of the log)."""
    scale = np.array(start)

    def residuals(values: np.ndarray) -> np.ndarray:
        trial = with_values(fixed, names, values * scale)
        return np.log(np.array([predict(row, trial) for row in rows]) / measured)

    found = least_squares(
        residuals,
        np.ones(len(names)),
        bounds=(np.array(bounds[0]) / scale, np.array(bounds[1]) / scale),
        loss="soft_l1",
        f_scale=0.1,
        xtol=1e-6,
        ftol=1e-6,
    )
    return with_values(fixed, names, found.x * scale)


def with_values(fixed: Constants, names: Sequence[str], values: np.ndarray) -> Constants:
    """``fixed`` with the named constants replaced."""
    given: dict[str, Any] = {name: float(value) for name, value in zip(names, values, strict=True)}
    return replace(fixed, **given)


def fit_tokens(rows: Sequence[Row], fixed: Constants) -> Constants:
    """The three constants of time per output token."""
    each = np.array([row.each for row in rows])
    return fit(rows, fixed, FITTED, START, (LOW, HIGH), Row.token, each)


def fit_first(rows: Sequence[Row], fixed: Constants) -> Constants:
    """The two constants of time to the first token, the others as they are."""
    first = np.array([row.first for row in rows])
    return fit(rows, fixed, FITTED_FIRST, FIRST_START, (FIRST_LOW, FIRST_HIGH), Row.first_token, first)


def peak(rows: Sequence[Row]) -> np.ndarray:
    """The roofline of the stated peaks, nothing else: seconds ``[num_rows]``."""
    return naive(traffic(rows), np.array([1.0, 1.0, 0.0]))


def traffic(rows: Sequence[Row]) -> np.ndarray:
    """Seconds ``[2, num_rows]`` that a step's bytes and its operations take at the stated peaks."""
    out = np.zeros((2, len(rows)))
    for index, row in enumerate(rows):
        weights, card = known_weights(row.model), row.hardware
        context = row.input_len + row.output_len // 2
        cache = sum(
            count * sum(row.method.read_parts(layer, row.batch_size, context).values())
            for layer, count in Counter(row.model.cache_layers).items()
        )
        stored = weight_nbytes(row.model, row.weight_bits) * weights.read(row.batch_size) / weights.total
        rate = (card.fp8_flops or card.fp16_flops) if row.weight_bits <= 8 else card.fp16_flops
        out[0, index] = (stored + cache) / (card.bandwidth or np.nan)
        out[1, index] = 2 * weights.active * row.batch_size / (rate or np.nan)
    return out


def naive(peaks: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Three global constants on :func:`traffic`: shares of bandwidth and arithmetic, and milliseconds a step."""
    return np.maximum(peaks[0] / values[0], peaks[1] / values[1]) + values[2] * 1e-3


def fit_naive(rows: Sequence[Row]) -> np.ndarray:
    """The three constants of :func:`naive`."""
    measured, peaks = np.array([row.each for row in rows]), traffic(rows)
    found = least_squares(
        lambda values: np.log(naive(peaks, values) / measured),
        [0.8, 0.7, 2.0],
        bounds=([0.2, 0.1, 0.0], [1.0, 1.0, 10.0]),
        loss="soft_l1",
        f_scale=0.1,
    )
    return np.asarray(found.x)


def study(path: Path, fixed: Constants | None = None) -> tuple[Constants, dict[str, Any]]:
    """The constants fitted on all rows, and the errors on each group by constants fitted on the others."""
    rows, fixed = load(path), fixed or constants()
    labels = np.array([row.group for row in rows])
    each, first = np.array([row.each for row in rows]), np.array([row.first for row in rows])
    predicted, predicted_first, three = cross_validate(rows, labels, fixed)
    one_share = replace(fixed, memory_share={"ideal": fixed.memory_share["ideal"]})
    plain = held_out_tokens(rows, labels, one_share)
    final = fit_first(rows, fit_tokens(rows, fixed))
    ratios, first_ratios = each / predicted, first / predicted_first
    final = replace(final, decode_band=quantiles(ratios), prefill_band=quantiles(first_ratios, 0.9))
    nested = [
        inside(ratios[labels == label], quantiles(ratios[labels != label])) * int(np.sum(labels == label))
        for label in np.unique(labels)
    ]
    refit = np.array([row.token(final) for row in rows])
    refit_first = np.array([row.first_token(final) for row in rows])
    return final, {
        "num_rows": len(rows),
        "covered": 1.0,
        "num_constants": NUM_CONSTANTS,
        "token": {
            "held_out": errors(predicted, each),
            "in_sample": errors(refit, each),
            "held_out_one_memory_share": errors(plain, each),
            "by_group": by_group(labels, predicted, each),
            "band": final.decode_band,
            "in_band": inside(ratios, final.decode_band),
            "in_band_of_other_groups": round(sum(nested) / len(rows), 4),
            "in_band_refitted": inside(each / refit, final.decode_band),
        },
        "first": {
            "held_out": errors(predicted_first, first),
            "in_sample": errors(refit_first, first),
            "by_group": by_group(labels, predicted_first, first),
            "band": final.prefill_band,
            "in_band": inside(first_ratios, final.prefill_band),
        },
        "baselines": {
            "peak roofline": errors(peak(rows), each),
            "three global constants, held out": errors(three, each),
        },
    }


def cross_validate(
    rows: Sequence[Row], labels: np.ndarray, fixed: Constants
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per token, to the first token, and per token by :func:`naive`: each row by constants that never saw its group."""
    out = np.zeros((3, len(rows)))
    for label in np.unique(labels):
        held = labels == label
        others = [row for row, away in zip(rows, held, strict=True) if not away]
        found = fit_first(others, fit_tokens(others, fixed))
        simple = fit_naive(others)
        for index in np.flatnonzero(held):
            row = rows[int(index)]
            out[:, index] = row.token(found), row.first_token(found), naive(traffic([row]), simple)[0]
    return out[0], out[1], out[2]


def held_out_tokens(rows: Sequence[Row], labels: np.ndarray, fixed: Constants) -> np.ndarray:
    """Per token only, as :func:`cross_validate`."""
    out = np.zeros(len(rows))
    for label in np.unique(labels):
        found = fit_tokens([row for row, each in zip(rows, labels, strict=True) if each != label], fixed)
        for index in np.flatnonzero(labels == label):
            out[index] = rows[int(index)].token(found)
    return out


def by_group(labels: np.ndarray, predicted: np.ndarray, measured: np.ndarray) -> dict[str, Any]:
    """The errors of each label's rows."""
    return {str(each): errors(predicted[labels == each], measured[labels == each]) for each in np.unique(labels)}


def tried(path: Path, fixed: Constants) -> dict[str, Any]:
    """The errors of the constants in kvsim on a file that they were not fitted on."""
    rows = load(path)
    each, first = np.array([row.each for row in rows]), np.array([row.first for row in rows])
    predicted = np.array([row.token(fixed) for row in rows])
    return {
        "num_rows": len(rows),
        "token": errors(predicted, each) | {"in_band": inside(each / predicted, fixed.decode_band)},
        "first": errors(np.array([row.first_token(fixed) for row in rows]), first),
    }
