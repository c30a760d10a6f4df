"""What ``kvsim plan`` answers, as an object: for the command, for the page and for files of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from kvsim.analysis.plan import Demand, Plan
from kvsim.analysis.request_lengths import Lengths
from kvsim.hardware import Hardware
from kvsim.memory.sharding import Sharding
from kvsim.models.model import Model
from kvsim.output.schema import envelope

Place = tuple[Hardware, int | Sharding | None]
"""A card, and how many of it share the model or how; ``None``: what suits."""


def cut(lengths: Lengths, longest: int | None) -> tuple[Lengths, list[str]]:
    """Requests held to ``longest`` tokens, and a note where any is longer."""
    if longest is None:
        return lengths, []
    lengths, share = lengths.cut(longest)
    return lengths, [f"{share:.2%} of the requests are longer than {longest:,} tokens and cut there"] if share else []


def plan_object(
    model: Model,
    places: Sequence[Place],
    layout: Sharding | None,
    demand: Demand,
    asked: dict[str, Any],
    notes: list[str],
    ways: Sequence[Plan],
) -> dict[str, Any]:
    """``kvsim.plan/1``.  ``asked``: what else was asked for, among the inputs."""
    inputs: dict[str, Any] = {"model": model.name}
    inputs["gpus"] = [{"card": card.id, "cards_per_replica": _count(given)} for card, given in places]
    inputs["layout"] = layout.label if layout else None
    inputs |= {"users": demand.users, "lengths": demand.lengths.label}
    inputs |= {"slo_tpot_seconds": demand.slo_tpot, "slo_ttft_seconds": demand.slo_ttft}
    inputs |= asked | {"risk": demand.risk, "occupancy": demand.occupancy}
    return envelope("plan", inputs, notes) | {"rows": [row(way) for way in ways]}


def _count(given: int | Sharding | None) -> int | None:
    return given.ranks if isinstance(given, Sharding) else given


def row(way: Plan) -> dict[str, Any]:
    """One way, refused or not."""
    return {
        "method": way.method.name,
        "gpu": way.card.id,
        "cards_per_replica": way.cards_per_replica,
        "layout": way.sharding.label,
        "copies": way.copies,
        "cached_tokens": way.cached_tokens,
        "fits": way.refusal is None,
        "refusal": way.refusal,
        "num_cards": way.num_cards,
        "num_replicas": way.num_replicas,
        "batch_per_replica": way.batch_size,
        "max_batch": way.max_batch,
        "batch_bound": way.batch_bound,
        "max_ctx": way.max_context,
        "tpot_seconds": way.tpot._asdict() if way.tpot else None,
        "ttft_seconds": way.ttft._asdict() if way.ttft else None,
        "bound": way.bound,
        "tokens_per_second": way.tokens_per_second,
        "out_of_memory_probability": way.runs_out,
        "usd_per_mtok": way.usd_per_mtok,
        "price": asdict(way.price) if way.price else None,
    }
