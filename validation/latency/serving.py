"""Published serving measurements against :mod:`kvsim.latency.steps`: the fit, and its errors on groups held out.

A row is one load on one card or on several (columns model_path, system, backend, precision, isl, osl, batch_size,
silicon_ttft_ms, silicon_tpot_ms, and where there is one tp_size): requests in flight, their lengths, the mean time to
the first token and per token after it.  What the columns leave open is decided once for all rows: weights as the
precision says (4-bit floats with a scale a 16 elements, 4.5 bits, or as the checkpoint was published), a cache in 8
bits where the weights are quantized, else in 16; without a precision the weights have 16 bits.

The constants of a token's time are fitted to the relative errors of all rows (soft-l1), each drawn to an estimate that
was made before (:data:`FITTED`): one that few rows tell stays near it.  A row weighs by the fourth root of its group's
size, and the rows of one card as much as those of several.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from kvsim.hardware import Hardware, find_hardware
from kvsim.latency.constants import Constants, constants
from kvsim.latency.roofline import Roofline, Serving
from kvsim.latency.steps import first_token, running, token_parts, token_step
from kvsim.layout import Method
from kvsim.methods import make_method
from kvsim.models.load import load_model
from kvsim.models.model import Model
from kvsim.models.weight_storage import known_weights, weight_nbytes
from validation.latency.held_out import errors, inside, quantiles, read_csv

MEAN_BAR, MEDIAN_BAR, BAND_BAR = 0.12, 0.09, 0.90
PARALLEL_MEAN_BAR, PARALLEL_MEDIAN_BAR = 0.15, 0.11
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
    "int4": 4.125,
}
MXFP4 = 4.25
"""Bits of a 4-bit float with an 8-bit scale for 32 elements, as gpt-oss's experts were published."""
PUBLISHERS = {"zhipuai": "zai-org"}
"""Publishers that rows name as they were once called."""

FITTED: dict[str, tuple[float, float, float]] = {
    "weight_efficiency": (0.88, 0.5, 1.0),
    "expert_efficiency": (0.85, 0.5, 0.95),
    "routing_spread": (0.95, 0.5, 1.0),
    "layer_seconds": (3e-5, 1e-7, 1e-3),
    "expert_layer_seconds": (2e-5, 1e-7, 1e-3),
    "latent_layer_seconds": (2e-5, 1e-7, 1e-3),
    "state_layer_seconds": (3e-5, 1e-7, 1e-3),
    "index_layer_seconds": (6e-5, 1e-7, 1e-3),
    "narrow_layer_seconds": (1e-5, 1e-7, 1e-3),
    "sequence_seconds": (2.5e-5, 1e-7, 1e-3),
    "prefill_efficiency": (0.7, 0.3, 0.8),
    "routed_efficiency/vllm": (0.15, 1e-3, 1.0),
    "routed_efficiency/sglang": (0.15, 1e-3, 1.0),
    "routed_efficiency/trtllm": (0.15, 1e-3, 1.0),
    "link_efficiency": (0.5, 0.1, 1.0),
    "link_seconds": (4e-6, 1e-8, 1e-4),
}
"""Constants of a token's time -> the estimate that a fit starts from and is drawn to, the least and the most."""
DRAWN = 1.0
"""How strongly: a constant that is e times its estimate weighs as a row that is missed by so much."""
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
    tensor_parallel: int
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
        return Serving(self.weight_bits, self.tensor_parallel, self.engine, fixed)

    @property
    def load(self) -> tuple[Model, Method, Hardware, int, int, int]:
        return self.model, self.method, self.hardware, self.batch_size, self.input_len, self.output_len

    def token(self, fixed: Constants) -> float:
        """Predicted seconds per output token."""
        return token_step(*self.load, self.serving(fixed)).seconds.value

    def first_token(self, fixed: Constants) -> float:
        """Predicted seconds to the first token."""
        return first_token(*self.load, self.serving(fixed)).seconds.value


def load(path: Path) -> list[Row]:
    """The rows of a file.  Raises ``LookupError`` for a model or card that kvsim does not know, ``ValueError`` for a
    precision that is not in :data:`WEIGHT_BITS`."""
    out = []
    for row in read_csv(path, NEEDED):
        publisher, _, own = row["model_path"].partition("/")
        model = load_model(f"{PUBLISHERS.get(publisher, publisher)}/{own}" if own else publisher)
        precision = row["precision"].lower()
        if precision not in WEIGHT_BITS:
            raise ValueError(f"{path.name}: precision {precision!r}, allowed are {', '.join(WEIGHT_BITS)}")
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
                tensor_parallel=int(row.get("tp_size") or 1),
                batch_size=int(row["batch_size"]),
                input_len=int(row["isl"]),
                output_len=int(row["osl"]),
                first=float(row["silicon_ttft_ms"]) / 1e3,
                each=float(row["silicon_tpot_ms"]) / 1e3,
            )
        )
    return out


class Loads:
    """Rows that differ in load alone, as arrays; what no constant that is fitted changes is computed once."""

    def __init__(self, rows: Sequence[Row], places: Sequence[int], fixed: Constants) -> None:
        self.first, self.places = rows[0], np.array(places)
        row = rows[0]
        serving = row.serving(fixed)
        self.input_len = np.array([each.input_len for each in rows])
        self.output_len = np.array([each.output_len for each in rows])
        loads = [(each.batch_size, each.input_len, each.output_len) for each in rows]
        self.held = np.array([running(row.model, row.method, row.hardware, *load, serving) for load in loads])
        roofline, context = self.roofline(fixed), self.input_len + self.output_len // 2
        self.attention = roofline.attention(row.method, self.held, context, np.maximum)
        self.prompt = np.array([roofline.prompt_attention(each.input_len, each.input_len) for each in rows])

    def roofline(self, fixed: Constants) -> Roofline:
        return Roofline(self.first.model, self.first.hardware, self.first.serving(fixed))

    def token(self, fixed: Constants) -> np.ndarray:
        """:meth:`Row.token` of every row."""
        lengths = (self.held, self.input_len, self.output_len, self.input_len)
        given = (np.maximum, self.attention, self.prompt)
        return np.asarray(sum(token_parts(self.roofline(fixed), self.first.method, *lengths, *given).values()))


def gathered(rows: Sequence[Row], fixed: Constants) -> list[Loads]:
    """The rows by what they share."""
    places: dict[Any, list[int]] = {}
    for place, row in enumerate(rows):
        key = (row.model.name, row.method, row.hardware.id, row.engine, row.weight_bits, row.tensor_parallel)
        places.setdefault(key, []).append(place)
    return [Loads([rows[place] for place in each], each, fixed) for each in places.values()]


def tokens(loads: Sequence[Loads], fixed: Constants, num_rows: int) -> np.ndarray:
    """Predicted seconds per output token ``[num_rows]``, 0 of rows in no load."""
    out = np.zeros(num_rows)
    for each in loads:
        out[each.places] = each.token(fixed)
    return out


def row_weights(rows: Sequence[Row]) -> np.ndarray:
    """How much each row weighs in a fit, in the mean 1."""
    sizes = Counter(row.group for row in rows)
    weights = np.array([sizes[row.group] ** -0.25 for row in rows])
    single = np.array([row.tensor_parallel == 1 for row in rows])
    if single.any() and not single.all():
        weights[single] *= np.sqrt((weights[~single] ** 2).sum() / (weights[single] ** 2).sum())
    return np.asarray(weights / weights.mean())


def fit_tokens(rows: Sequence[Row], fixed: Constants, loads: Sequence[Loads] | None = None) -> Constants:
    """The constants of time per output token.  ``loads``: the rows, gathered."""
    loads, measured, weights = loads or gathered(rows, fixed), np.array([row.each for row in rows]), row_weights(rows)
    estimate, least, most = (np.log([entry[index] for entry in FITTED.values()]) for index in range(3))

    def residuals(values: np.ndarray) -> np.ndarray:
        trial = with_values(fixed, tuple(FITTED), np.exp(values))
        missed = (tokens(loads, trial, len(rows)) / measured - 1) * weights
        return np.concatenate([missed, DRAWN * (values - estimate)])

    inner = np.clip(estimate, least + 1e-6, most - 1e-6)
    found = least_squares(residuals, inner, bounds=(least, most), loss="soft_l1", f_scale=0.15, xtol=1e-5, ftol=1e-5)
    return with_values(fixed, tuple(FITTED), np.exp(found.x))


def with_values(fixed: Constants, names: Sequence[str], values: np.ndarray) -> Constants:
    """``fixed`` with the named constants replaced; ``name/engine`` is an engine's, and ``ideal`` their mean."""
    given: dict[str, Any] = {}
    for name, value in zip(names, values, strict=True):
        name, _, engine = name.partition("/")
        if engine:
            given.setdefault(name, {})[engine] = float(value)
        else:
            given[name] = float(value)
    for entry in given.values():
        if isinstance(entry, dict):
            entry["ideal"] = float(np.exp(np.mean(np.log(list(entry.values())))))
    return replace(fixed, **given)


@dataclass(frozen=True)
class Waits:
    """Of every row ``[num_rows]`` the seconds of its own prefill, of its wait for a place, and the requests before."""

    own: np.ndarray
    place: np.ndarray
    others: np.ndarray

    def first(self, fixed: Constants) -> np.ndarray:
        """Seconds to the first token."""
        return np.asarray(fixed.prefill_seconds + self.own * (1 + fixed.prefill_queue * self.others) + self.place)


def waits(rows: Sequence[Row], fixed: Constants) -> Waits:
    """What :data:`FITTED_FIRST` multiply and add to."""
    bare = replace(fixed, prefill_seconds=0.0, prefill_queue=0.0)
    steps = [first_token(*row.load, row.serving(bare)) for row in rows]
    place = np.array([step.parts["queue"] for step in steps])
    own = np.array([step.seconds.value for step in steps]) - place
    return Waits(own, place, np.array([row.batch_size - 1 for row in rows]))


def fit_first(rows: Sequence[Row], fixed: Constants, given: Waits | None = None) -> Constants:
    """The two constants of time to the first token, the others as they are."""
    each, measured = given or waits(rows, fixed), np.array([row.first for row in rows])
    weights = row_weights(rows)
    scale = np.array(FIRST_START)

    def residuals(values: np.ndarray) -> np.ndarray:
        missed = np.log(each.first(with_values(fixed, FITTED_FIRST, values * scale)) / measured)
        return np.asarray(missed * weights)

    bounds = np.array(FIRST_LOW) / scale, np.array(FIRST_HIGH) / scale
    found = least_squares(residuals, np.ones(2), bounds=bounds, loss="soft_l1", f_scale=0.1, xtol=1e-6, ftol=1e-6)
    return with_values(fixed, FITTED_FIRST, found.x * scale)


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
        out[0, index] = (stored + cache) / (card.bandwidth or np.nan) / row.tensor_parallel
        out[1, index] = 2 * weights.active * row.batch_size / (rate or np.nan) / row.tensor_parallel
    return out


def naive(peaks: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Three global constants on :func:`traffic`: shares of bandwidth and arithmetic, and milliseconds a step."""
    return np.maximum(peaks[0] / values[0], peaks[1] / values[1]) + values[2] * 1e-3


def fit_naive(peaks: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """The three constants of :func:`naive`."""
    found = least_squares(
        lambda values: np.log(naive(peaks, values) / measured),
        [0.8, 0.7, 2.0],
        bounds=([0.2, 0.1, 0.0], [1.0, 1.0, 10.0]),
        loss="soft_l1",
        f_scale=0.1,
    )
    return np.asarray(found.x)


PEAK = np.array([1.0, 1.0, 0.0])
"""The roofline of the stated peaks, nothing else."""


def study(paths: Sequence[Path], fixed: Constants | None = None) -> tuple[Constants, dict[str, Any]]:
    """The constants fitted on all rows, and the errors on each group by constants fitted on the others."""
    rows, fixed = [row for path in paths for row in load(path)], fixed or constants()
    labels = np.array([row.group for row in rows])
    each, first = np.array([row.each for row in rows]), np.array([row.first for row in rows])
    predicted, predicted_first, three = cross_validate(rows, labels, fixed)
    final = fit_tokens(rows, fixed)
    refit, own = tokens(gathered(rows, final), final, len(rows)), waits(rows, final)
    final = fit_first(rows, final, own)
    single = np.array([row.tensor_parallel == 1 for row in rows])
    ratios, first_ratios = each / predicted, first / predicted_first
    final = replace(final, prefill_band=quantiles(first_ratios, 0.9))
    parts = {}
    for name, chosen, field in (("token", single, "decode_band"), ("parallel", ~single, "parallel_band")):
        if not chosen.any():
            continue
        band: dict[str, Any] = {field: quantiles(ratios[chosen])}
        final = replace(final, **band)
        parts[name] = judged(labels[chosen], predicted[chosen], refit[chosen], each[chosen], getattr(final, field))
    peaks = traffic(rows)
    return final, {
        "num_rows": len(rows),
        "covered": 1.0,
        "num_constants": NUM_CONSTANTS,
        **parts,
        "first": {
            "held_out": errors(predicted_first, first),
            "in_sample": errors(own.first(final), first),
            "by_group": by_group(labels, predicted_first, first),
            "band": final.prefill_band,
            "in_band": inside(first_ratios, final.prefill_band),
        },
        "baselines": {
            "peak roofline": errors(naive(peaks, PEAK)[single], each[single]),
            "three global constants, held out": errors(three[single], each[single]),
        },
        "parallel_baselines": {
            "peak roofline": errors(naive(peaks, PEAK)[~single], each[~single]),
            "three global constants, held out": errors(three[~single], each[~single]),
        },
    }


def judged(
    labels: np.ndarray, predicted: np.ndarray, refit: np.ndarray, each: np.ndarray, band: tuple[float, float]
) -> dict[str, Any]:
    """The errors of predictions by constants that never saw a row's group, in sample, by group, and the band's."""
    ratios = each / predicted
    nested = [
        inside(ratios[labels == label], quantiles(ratios[labels != label])) * int(np.sum(labels == label))
        for label in np.unique(labels)
    ]
    return {
        "held_out": errors(predicted, each),
        "in_sample": errors(refit, each),
        "by_group": by_group(labels, predicted, each),
        "band": band,
        "in_band": inside(ratios, band),
        "in_band_of_other_groups": round(sum(nested) / len(each), 4),
        "in_band_refitted": inside(each / refit, band),
    }


def cross_validate(
    rows: Sequence[Row], labels: np.ndarray, fixed: Constants
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per token, to the first token, and per token by :func:`naive`: each row by constants that never saw its group."""
    out, peaks = np.zeros((3, len(rows))), traffic(rows)
    each = np.array([row.each for row in rows])
    for label in np.unique(labels):
        held = labels == label
        others = [row for row, away in zip(rows, held, strict=True) if not away]
        own = [row for row, away in zip(rows, held, strict=True) if away]
        found = fit_tokens(others, fixed)
        found = fit_first(others, found)
        out[0, held] = tokens(gathered(own, found), found, len(own))
        out[1, held] = waits(own, found).first(found)
        out[2, held] = naive(peaks[:, held], fit_naive(peaks[:, ~held], each[~held]))
    return out[0], out[1], out[2]


def by_group(labels: np.ndarray, predicted: np.ndarray, measured: np.ndarray) -> dict[str, Any]:
    """The errors of each label's rows."""
    return {str(each): errors(predicted[labels == each], measured[labels == each]) for each in np.unique(labels)}


def tried(path: Path, fixed: Constants) -> dict[str, Any]:
    """The errors of the constants in kvsim on a file that they were not fitted on."""
    rows = load(path)
    each, first = np.array([row.each for row in rows]), np.array([row.first for row in rows])
    predicted = tokens(gathered(rows, fixed), fixed, len(rows))
    low, high = np.array([fixed.decode_band if row.tensor_parallel == 1 else fixed.parallel_band for row in rows]).T
    within = (each >= low * predicted) & (each <= high * predicted)
    return {
        "num_rows": len(rows),
        "token": errors(predicted, each) | {"in_band": round(float(within.mean()), 4)},
        "by_group": by_group(np.array([row.group for row in rows]), predicted, each),
        "first": errors(waits(rows, fixed).first(fixed), first),
    }
