"""Measured decode attention against :mod:`kvsim.latency.attention_curve`: the fit, and its errors on rows held out.

A row is one layer's attention of one engine's kernel (columns gpu, framework, kv_cache_dtype, batch, num_q_heads,
num_kv_heads, head_dim, seq_len, latency_ms), the same cache read again and again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from kvsim.hardware import Hardware, find_hardware
from kvsim.latency.attention_curve import Curve, Kernel
from kvsim.latency.constants import constants
from validation.latency import own
from validation.latency.held_out import errors, quantiles, read_csv

BAR = 0.12
KERNELS = Path(__file__).parents[1] / "results" / "kernels"
SHARED = ("power", "merge", "half", "warm", "l2_share")
SHARED_START = (1.6, 4e-6, 500.0, 0.7, 0.6)
SHARED_LOW, SHARED_HIGH = (1.0, 0.0, 50.0, 0.2, 0.2), (8.0, 2e-5, 4000.0, 1.0, 1.5)
START, LOW, HIGH = (8e-6, 2e-6, 0.85), (1e-7, 1e-8, 0.3), (1e-4, 1e-4, 1.1)
SCALE = np.array([1e-6, 1e-6, 1.0])

QUERY_HEADS = ("trtllm/fp16", "trtllm/fp16-mha", "trtllm/fp8-mha")
"""Kernels that deal out query heads (TensorRT-LLM's masked multi-head attention); the others deal out kv heads."""

STUDY = "speed-up over cuDNN's float16 on an H100, Llama-3-8B's shape: measured with a study kernel, an estimate"
FITTED_ON = "fitted on measured rows of this engine on an H100, python -m validation time"
MEAN_OF = "geometric mean over the engines measured, python -m validation time"
CARRIED = "kvruntime/packed, and what fp16 takes more than kvruntime/fp16: an estimate, no engine's was measured"
STUDY_BASE = {(8, 32768): 351e-6, (64, 4096): 350e-6, (1, 32768): 50.8e-6, (1, 8192): 18.6e-6}
STUDY_ROWS: dict[tuple[int, int], dict[tuple[int, int], float]] = {
    (8, 32768): {(2, 32): 4.54, (2, 64): 5.35, (2, 128): 5.66, (4, 64): 3.28},
    (64, 4096): {(2, 32): 4.15, (2, 64): 4.71, (2, 128): 4.95, (4, 64): 3.01},
    (1, 32768): {(2, 32): 3.07, (2, 64): 3.38, (2, 128): 3.65, (4, 64): 2.49},
    (1, 8192): {(2, 32): 2.04, (2, 64): 2.13, (2, 128): 2.17, (4, 64): 1.87},
}
"""(batch, tokens) -> (bits, group) -> speed-up, cache not in L2: what stands in until kernels are recorded."""


@dataclass(frozen=True)
class Rows:
    """Measured rows as arrays ``[num_rows]``; ``kernel`` names each row's kernel in ``timing.json``."""

    kernel: np.ndarray
    engine: np.ndarray
    batch: np.ndarray
    tokens: np.ndarray
    kv_heads: np.ndarray
    q_heads: np.ndarray
    nbytes: np.ndarray
    seconds: np.ndarray
    card: Hardware

    def __len__(self) -> int:
        return len(self.seconds)


def load(path: Path) -> Rows:
    """The rows of a file.  Raises ``ValueError`` for more than one card, an unknown card or type of cache."""
    rows = read_csv(path, ("gpu", "framework", "kv_cache_dtype", "batch", "seq_len", "latency_ms"))
    cards = {row["gpu"] for row in rows}
    if len(cards) != 1:
        raise ValueError(f"{path.name}: one card a file, not {', '.join(sorted(cards))}")
    widths = {"bfloat16": ("fp16", 2), "float16": ("fp16", 2), "fp8": ("fp8", 1)}
    for row in rows:
        if row["kv_cache_dtype"] not in widths:
            raise ValueError(f"{path.name}: kv_cache_dtype {row['kv_cache_dtype']!r}, allowed are {', '.join(widths)}")

    def numbers(name: str) -> np.ndarray:
        return np.array([int(row[name]) for row in rows])

    kv, q = numbers("num_kv_heads"), numbers("num_q_heads")
    names = []
    for row, each_kv, each_q in zip(rows, kv, q, strict=True):
        mha = "-mha" if each_kv == each_q and row["framework"] == "trtllm" and row["kv_cache_dtype"] == "fp8" else ""
        names.append(f"{row['framework']}/{widths[row['kv_cache_dtype']][0]}{mha}")
    size = np.array([widths[row["kv_cache_dtype"]][1] for row in rows])
    batch, tokens = numbers("batch"), numbers("seq_len")
    return Rows(
        kernel=np.array(names),
        engine=np.array([row["framework"] for row in rows]),
        batch=batch,
        tokens=tokens,
        kv_heads=kv,
        q_heads=q,
        nbytes=2.0 * batch * tokens * kv * numbers("head_dim") * size,
        seconds=np.array([float(row["latency_ms"]) for row in rows]) / 1e3,
        card=find_hardware(cards.pop().replace("_", "-")),
    )


def predict(rows: Rows, kernels: dict[str, Kernel], curve: Curve) -> np.ndarray:
    """Seconds ``[num_rows]``; a kernel that ``kernels`` lacks falls back to its width's mean."""
    out = np.zeros(len(rows))
    for name in np.unique(rows.kernel):
        each = rows.kernel == name
        plain = str(name).removesuffix("-mha")
        kernel = kernels.get(str(name)) or kernels.get(plain) or kernels[plain.partition("/")[2]]
        out[each] = seconds(rows, each, kernel, curve)
    return out


def seconds(rows: Rows, each: np.ndarray, kernel: Kernel, curve: Curve) -> np.ndarray:
    """The curve on the rows that ``each`` selects, as benchmarks read a cache: warm where it fits in L2."""
    heads = rows.q_heads if kernel.item_is == "query_head" else rows.kv_heads
    bandwidth = rows.card.bandwidth or 0.0
    stream = rows.nbytes[each] / (kernel.efficiency * bandwidth) * curve.miss(rows.nbytes[each], rows.card.l2_nbytes)
    items = (rows.batch * heads)[each]
    return np.asarray(curve.seconds(kernel, items, rows.tokens[each], stream, rows.card.num_sms, np.maximum))


def fit(rows: Rows, keep: np.ndarray) -> tuple[dict[str, Kernel], Curve]:
    """Constants from the rows that ``keep`` selects: three a kernel and five that all share, by relative error."""
    names = [str(name) for name in np.unique(rows.kernel[keep])]
    wanted = [keep & (rows.kernel == name) for name in names]

    def unpack(values: np.ndarray) -> tuple[dict[str, Kernel], Curve]:
        kernels = {}
        for name, three in zip(names, values[len(SHARED) :].reshape(-1, 3), strict=True):
            kernels[name] = kernel_of(three, "", item_is="query_head" if name in QUERY_HEADS else "kv_head")
        merge = values[1] * 1e-6
        return kernels, Curve(float(values[0]), float(merge), *(float(value) for value in values[2:5]))

    def residuals(values: np.ndarray) -> np.ndarray:
        kernels, curve = unpack(values)
        return np.concatenate(
            [
                np.log(seconds(rows, each, kernels[name], curve) / rows.seconds[each])
                for name, each in zip(names, wanted, strict=True)
            ]
        )

    def vector(shared: tuple[float, ...], each: tuple[float, ...]) -> np.ndarray:
        head = np.array(shared) * np.array([1, 1e6, 1, 1, 1])
        return np.concatenate([head, np.tile(np.array(each) / SCALE, len(names))])

    start = vector(SHARED_START, START)
    bounds = (vector(SHARED_LOW, LOW), vector(SHARED_HIGH, HIGH))
    found = least_squares(
        residuals, start, bounds=bounds, x_scale=np.abs(start), loss="soft_l1", f_scale=0.1, xtol=1e-9, ftol=1e-9
    )
    return unpack(found.x)


def kernel_of(values: np.ndarray, source: str, **more: Any) -> Kernel:
    """The kernel of three fitted values ``[fixed, item, efficiency]``, times :data:`SCALE`."""
    fixed, item, efficiency = (float(value) for value in values * SCALE)
    return Kernel(fixed, item, efficiency, source, **more)


def mean_kernels(kernels: dict[str, Kernel], q_per_kv: int = 4) -> dict[str, Kernel]:
    """``fp16`` and ``fp8`` for an engine that was not measured: geometric means over those that were."""
    out = {}
    for width in ("fp16", "fp8"):
        members = [kernel for name, kernel in kernels.items() if name.endswith(f"/{width}")]
        members = members or [kernel for name, kernel in kernels.items() if f"/{width}" in name]
        if not members:
            continue
        items = [kernel.item * (q_per_kv if kernel.item_is == "query_head" else 1) for kernel in members]
        three = ([kernel.fixed for kernel in members], items, [kernel.efficiency for kernel in members])
        means = np.array([np.exp(np.mean(np.log(values))) for values in three])
        out[width] = kernel_of(means / SCALE, "")
    return out


RECORDED = {"packed": ("attend", "fast"), "fp16": ("sdpa", None), "engine": ("full", None)}
"""Kind and kernel of ``bench kernels``' rows."""


@dataclass(frozen=True)
class RecordedRows:
    """Decode attention of this project's recorded runs, cache not in L2: arrays ``[num_rows]`` of work items, tokens,
    bytes read, outputs of an item and seconds, and where they come from."""

    items: np.ndarray
    tokens: np.ndarray
    nbytes: np.ndarray
    values: np.ndarray
    seconds: np.ndarray
    source: str


def study_rows() -> RecordedRows:
    """:data:`STUDY_ROWS`, codes and scales only."""
    rows = [
        (
            *(batch * 8, tokens, batch * tokens * 8 * 256 * (bits + 32 / group) / 8),
            *(4 * 128, STUDY_BASE[batch, tokens] / speed_up),
        )
        for (batch, tokens), found in STUDY_ROWS.items()
        for (bits, group), speed_up in found.items()
    ]
    return as_rows(rows, STUDY)


def recorded_rows(card: Hardware, width: str = "packed", folder: Path = KERNELS) -> RecordedRows | None:
    """What ``kvruntime bench kernels`` recorded on ``card``; ``None`` without any.

    ``width``: ``packed``, this project's kernel over codes; ``fp16``, the fastest of PyTorch's 16-bit kernels at every
    shape, measured in the same runs; ``engine``, this project's 16-bit kernel.
    """
    rows: dict[tuple[Any, ...], tuple[float, ...]] = {}
    names: list[str] = []
    for path in sorted(folder.glob("*.json")):
        file = json.loads(path.read_text(encoding="utf-8"))
        if card.id.partition("-")[0] not in file["device"]["name"].lower():
            continue
        for number, row in enumerate(file["rows"]):
            if (row["kind"], row.get("kernel")) != RECORDED[width] or row["ragged"] or "seconds" not in row:
                continue
            heads = row["num_kv_heads"]
            values = row["num_q_heads"] // heads * row["head_dim"]
            found = (row["batch_size"] * heads, row["num_tokens"], row["nbytes_read"], values, row["seconds"][0])
            shape = (number,) if width == "packed" else found[:4]
            rows[path.name, *shape] = min(rows.get((path.name, *shape), found), found, key=lambda each: each[4])
            names.append(path.name)
    if not rows:
        return None
    what = "PyTorch's fastest 16-bit kernels" if width == "fp16" else "this project's kernels"
    return as_rows(list(rows.values()), f"fitted on {what} on an H100, {', '.join(dict.fromkeys(names))}")


def as_rows(rows: Sequence[tuple[float, ...]], source: str) -> RecordedRows:
    """Rows of (items, tokens, bytes, values, seconds) as arrays."""
    items, tokens, nbytes, values, taken = np.array(rows, dtype=float).T
    return RecordedRows(items, tokens, nbytes, values, taken, source)


def fit_recorded(rows: RecordedRows, curve: Curve, card: Hardware) -> tuple[Kernel, dict[str, Any]]:
    """The kernel that fits the rows best, by its launch, its pieces and its stream, and its errors on them."""

    def predicted(point: np.ndarray) -> np.ndarray:
        kernel = kernel_of(point, rows.source, merges=True)
        stream = rows.nbytes / (kernel.efficiency * (card.bandwidth or np.nan))
        taken = curve.seconds(kernel, rows.items, rows.tokens, stream, card.num_sms, np.maximum, rows.values)
        return np.asarray(taken)

    found = least_squares(
        lambda point: np.log(predicted(point) / rows.seconds),
        np.array([3.0, 1.0, 0.9]),
        bounds=([0.1, 0.01, 0.3], [20.0, 20.0, 1.1]),
        loss="soft_l1",
        f_scale=0.1,
    )
    low, high = quantiles(rows.seconds / predicted(found.x))
    kernel = kernel_of(found.x, rows.source, merges=True, low=low, high=high)
    return kernel, errors(predicted(found.x), rows.seconds)


def carried(packed: Kernel, own: Kernel, engine: Kernel) -> Kernel:
    """``packed`` codes in an engine: as far from this project's kernel as ``engine``'s 16-bit kernel is from ``own``,
    the fastest in the packed kernel's own runs."""
    return replace(
        packed,
        fixed=packed.fixed + max(0.0, engine.fixed - own.fixed),
        item=packed.item + max(0.0, engine.item - own.item),
        efficiency=packed.efficiency * min(1.0, engine.efficiency / own.efficiency),
        merges=engine.merges,
        low=min(packed.low, engine.low),
        high=max(packed.high, engine.high),
        source=CARRIED,
    )


def recorded_kernels(curve: Curve, card: Hardware, engine: Kernel) -> tuple[dict[str, Kernel], dict[str, Any]]:
    """The kernels of the runs recorded on ``card`` (a study's until there are some), ``packed`` as carried over to an
    engine whose 16-bit kernel is ``engine``, and the errors by name."""
    rows = recorded_rows(card)
    if rows is None:
        kernel, found = fit_recorded(study_rows(), curve, card)
        return {"packed": kernel}, {"packed": found}
    packed, packed_errors = fit_recorded(rows, curve, card)
    plain = recorded_rows(card, "fp16")
    if plain is None:
        return {"packed": packed}, {"packed": packed_errors}
    kernels = {"packed": carried(packed, fit_recorded(plain, curve, card)[0], engine)}
    every = own.recorded_attention()  # of every card: these kernels' constants are one card's no more than another's
    fitted = own.kernels(every, replace(constants(), curve=curve))
    mine = {name: kernel for name, kernel in fitted.kernels.items() if name.startswith(f"{own.ENGINE}/")}
    return kernels | mine, own.judged(every, fitted)


FOLDS: dict[str, Callable[[Rows], np.ndarray]] = {
    "batch": lambda rows: rows.batch,
    "context": lambda rows: rows.tokens,
    "kernel and octave of bytes": lambda rows: np.array(
        [f"{name} 2^{int(np.log2(size) // 3 * 3)}" for name, size in zip(rows.kernel, rows.nbytes, strict=True)]
    ),
    "shape": lambda rows: np.where(rows.kv_heads == rows.q_heads, "no query head shares", ""),
    "engine": lambda rows: rows.engine,
}
"""What is held out together, one label at a time: whole batch sizes, contexts, octaves of size, the shape without
shared heads, engines (predicted by the others' mean).  Rows with an empty label are never held out."""


def cross_validate(rows: Rows, labels: np.ndarray) -> np.ndarray:
    """Predictions ``[num_rows]``, each by constants fitted without any row of its label; NaN without a label."""
    out = np.full(len(rows), np.nan)
    for label in np.unique(labels[labels.astype(str) != ""]):
        held = labels == label
        kernels, curve = fit(rows, ~held)
        out[held] = predict(rows, kernels | mean_kernels(kernels), curve)[held]
    return out


def study(path: Path, folds: Iterable[str] = FOLDS) -> dict[str, Any]:
    """Constants fitted on all rows, and the errors of rows held out, by kind of fold and by kernel."""
    rows = load(path)
    kernels, curve = fit(rows, np.ones(len(rows), dtype=bool))
    held_out: dict[str, Any] = {}
    spread: np.ndarray | None = None
    for name in folds:
        predicted = cross_validate(rows, FOLDS[name](rows))
        known = ~np.isnan(predicted)
        held_out[name] = errors(predicted[known], rows.seconds[known])
        spread = predicted if spread is None else spread
    if spread is not None:
        for name in kernels:
            each = rows.kernel == name
            low, high = quantiles(rows.seconds[each] / spread[each])
            kernels[name] = replace(kernels[name], low=low, high=high)
    means = mean_kernels(kernels)
    kernels = {name: replace(kernel, source=FITTED_ON) for name, kernel in kernels.items()}
    for width in means:
        members = [kernel for name, kernel in kernels.items() if f"/{width}" in name]
        low, high = min(kernel.low for kernel in members), max(kernel.high for kernel in members)
        means[width] = replace(means[width], low=low, high=high, source=MEAN_OF)
    fitted = predict(rows, kernels, curve)
    recorded, recorded_errors = recorded_kernels(curve, rows.card, means["fp16"])
    return {
        "num_rows": len(rows),
        "card": rows.card.id,
        "in_sample": errors(fitted, rows.seconds),
        "held_out": held_out,
        "by_kernel": {
            name: errors(spread[rows.kernel == name], rows.seconds[rows.kernel == name])
            for name in kernels
            if spread is not None
        },
        "recorded": {name: each | {"source": recorded[name].source} for name, each in recorded_errors.items()},
        "peak": errors(rows.nbytes / (rows.card.bandwidth or 0.0), rows.seconds),
        "kernels": {name: asdict(kernel) for name, kernel in (recorded | means | kernels).items()},
        "curve": asdict(curve),
    }


def tried(path: Path, kernels: dict[str, Kernel], curve: Curve) -> dict[str, Any]:
    """The errors of the constants in kvsim on a file that they were not fitted on, as on another card."""
    rows = load(path)
    return {"card": rows.card.id, "num_rows": len(rows), "errors": errors(predict(rows, kernels, curve), rows.seconds)}
