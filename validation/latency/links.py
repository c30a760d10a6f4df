"""All-reduces that were recorded (``python -m validation all-reduce``), and steps of models split over ranks.

This project's engine and transformers reduce by NCCL, two all-reduces a layer.  ``engine_link`` has what one takes
however short, times log2(2 x ranks), and the share of a link's one direction that a ring reaches: both fitted on the
curve of CUDA graphs, as a decode step holds them.  The servers' ``link_seconds`` and ``link_efficiency`` are fitted on
published loads, because they reduce short messages by kernels of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kvruntime.bench.harness.store import Row
from kvsim.engines import make_engine
from kvsim.finite_json import read_json
from kvsim.hardware import find_hardware
from kvsim.latency.constants import Constants
from kvsim.latency.roofline import Roofline, Serving
from kvsim.latency.steps import decode_step
from kvsim.memory.sharding import Deployment, Sharding
from kvsim.methods import Full, method_named
from kvsim.models.load import load_config, load_model
from kvsim.models.model import Model
from validation.latency.held_out import errors
from validation.ranks.fit import fitted

RESULTS = Path(__file__).parents[1] / "results"
ENGINES = ("kvruntime", "transformers")
"""Those whose all-reduces are NCCL's."""
STOCK = "DynamicCache"
TIMED_AS = {"model": "kvruntime:generate", "engine": "kvruntime"}
"""Whose constants a way's steps have with this project's cache."""


def load(folder: Path = RESULTS) -> list[Row]:
    """The rows of every device with links that were recorded."""
    rows: list[Row] = []
    for path in sorted((folder / "ranks").glob("*.json")):
        rows += [row for row in read_json(path, "record")["rows"] if "failed" not in row]
    return rows


def study(fixed: Constants, folder: Path = RESULTS) -> tuple[Constants, dict[str, Any]]:
    """``engine_link`` by the recorded curve, its errors, and those of split models' steps with it."""
    rows = load(folder)
    curve = [row for row in rows if row["kind"] == "all_reduce" and row["way"] == "graph"]
    if not curve:
        return fixed, {}
    card = find_hardware(curve[0]["device"])
    assert card.link_bandwidth is not None
    seconds, speed = fitted(curve)
    link = {"seconds": float(f"{seconds:.4g}"), "efficiency": float(f"{2 * speed / card.link_bandwidth:.4g}")}
    fixed = replace(fixed, engine_link=dict.fromkeys(ENGINES, link))
    measured = np.array([row["seconds"][0] for row in curve])
    predicted = np.array([_seconds(row, seconds, speed) for row in curve])
    found = {f"all-reduces, {card.id}, 2 KiB to 64 MiB": errors(predicted, measured)}
    steps = [row for row in rows if row["kind"] == "step" and (row["way"] in TIMED_AS)]
    groups: dict[str, list[Row]] = {}
    for row in steps:
        what = STOCK if row["method"] == STOCK else row["way"]
        groups.setdefault(f"split over {row['ranks']} x {find_hardware(row['device']).id}, {what}", []).append(row)
    for name, own in groups.items():
        times = np.array([sum(parts(row, fixed).values()) for row in own])
        found[name] = errors(times, np.array([row["seconds_per_step"][0] for row in own]))
    return fixed, found


def parts(row: Row, fixed: Constants | None = None) -> dict[str, float]:
    """kvsim's seconds by part of a recorded step of a split model, with ``fixed`` in place of the stated constants; of
    one without all-reduces those of the others."""
    stock = row["method"] == STOCK
    method = Full(row["dtype"]) if stock else method_named(row["method"])
    way, _, without = row["way"].partition(" without ")
    serving = Serving(engine="transformers" if stock else TIMED_AS[way], profile=fixed, sharding=_split(row))
    load = (model_of(row), method, find_hardware(row["device"]), row["batch_size"], row["num_tokens"])
    found = decode_step(*load, serving).parts
    return {name: seconds for name, seconds in found.items() if not (without and name == "communication")}


def all_reduce(row: Row) -> float:
    """kvsim's seconds of one recorded all-reduce, by the stated constants."""
    model = load_model("llama-3-8b")
    roofline = Roofline(model, find_hardware(row["device"]), Serving(engine=ENGINES[0], sharding=_split(row)))
    return float(roofline.all_reduces(row["nbytes"] / (2 * model.hidden_size)) / (2 * model.num_blocks))


def rank_nbytes(row: Row) -> int:
    """kvsim's bytes of the cache on one rank of a recorded step."""
    engine = make_engine("kvruntime", max_seq_len=row["num_tokens"])
    deployed = Deployment(model_of(row), method_named(row["method"]), engine, _split(row))
    return deployed.rank_nbytes(row["batch_size"], row["num_tokens"])


def model_of(row: Row) -> Model:
    """The model of a recorded step, with as many layers as ran."""
    config = load_config(row["model"])[1]
    return Model.from_config({**config.get("text_config", config), "num_hidden_layers": row["num_layers"]})


def _split(row: Row) -> Sharding:
    return Sharding(tensor_parallel_size=row["ranks"])


def _seconds(row: Row, latency: float, speed: float) -> float:
    ranks = row["ranks"]
    return float(latency * np.log2(2 * ranks) + 2 * (ranks - 1) / ranks * row["nbytes"] / speed)


def reduced(rows: Sequence[Row]) -> list[tuple[Row, float]]:
    """Steps of ``Engine`` and the seconds of each that all-reduces take: it less the same step without any."""
    names = ("model", "num_layers", "method", "batch_size", "num_tokens", "ranks", "device")
    silent = {
        tuple(row[name] for name in names): row["seconds_per_step"][0]
        for row in rows
        if row.get("way") == "engine without all-reduces"
    }
    own = [(row, tuple(row[name] for name in names)) for row in rows if row.get("way") == "engine"]
    return [(row, row["seconds_per_step"][0] - silent[key]) for row, key in own if key in silent]
