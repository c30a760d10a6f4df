"""What the records cover, and what they do not: points by axis, methods and runtimes without any, rows left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from kvsim.engines.kvruntime import names as stored_methods
from kvsim.methods import make_method, method_named
from kvsim.models.load import load_model
from validation.report.collection import Collection, Point

Table = tuple[list[str], list[list[str]]]

TIMED = (
    *("attention", "engine", "generate", "generate, compiled"),
    *("stock generate", "stock generate, new lengths", "stock generate, compiled", "first token", "short prompts"),
    "engine, several cards",
)
"""Claims of time, without those that predict the same rows again by a profile."""


def timed(points: Sequence[Point]) -> list[Point]:
    """The recorded figures of time, each once."""
    return [point for point in points if point.claim in TIMED]


def axes(points: Sequence[Point]) -> Table:
    """Recorded figures of time by runtime and axis: how many, and which values of the axis."""
    body = []
    every = timed(points)
    for claim in TIMED:
        own = [point for point in every if point.claim == claim]
        for axis, value in AXES.items():
            counts = Counter(found for point in own if (found := value(point)))
            if counts:
                said = ", ".join(f"{name} ({count})" for name, count in sorted(counts.items(), key=_order))
                body.append([claim, axis, f"{sum(counts.values())}", said])
    body.append(["all", "points", f"{len(every)}", ""])
    return ["what", "axis", "points", "values"], body


def gaps(found: Collection) -> Table:
    """What has no point: rows left out with the reason, and methods, runtimes and cards that nothing was timed of."""
    body = [[each.what, f"{each.rows}", each.reason] for each in found.uncovered]
    steps = [point for point in found.points if point.claim == "engine"]
    timed_names = {type(method_named(point.factors["method"])).__name__ for point in steps}
    for name in stored_methods():
        if type(make_method(name)).__name__ not in timed_names:
            body.append([f"method {name}", "0", "no step of the engine was recorded with it"])
    for claim in ("engine", "generate", "stock generate", "stock generate, new lengths"):
        cards = {point.factors["card"] for point in found.points if point.claim == claim}
        profiled = {point.factors["card"] for point in found.points if point.claim.startswith(f"{claim}, calibrated")}
        body += [[f"{claim}, {card}", "0", "no profile of this card has a part for it"] for card in cards - profiled]
    return ["what", "rows", "why"], body


def heads(point: Point) -> str:
    """Query heads a key/value head, and the head's width."""
    model = load_model(point.factors["model"])
    layer = model.cache_layers[0]
    return f"{model.num_q_heads // layer.num_kv_heads} of {layer.key_dim}"


def layout(point: Point) -> str:
    """Bits and group, without the residual."""
    name = point.factors["method"]
    return name.rpartition("-r")[0] if "-g" in name else name


AXES = {
    "card": lambda point: point.factors["card"],
    "model": lambda point: point.factors["model"],
    "method, bits and group": layout,
    "rows": lambda point: point.factors["rows"].partition(" ")[0],
    "tokens": lambda point: point.factors["size"].partition(" x ")[2],
    "query heads a key head, width": heads,
}


def _order(item: tuple[str, int]) -> tuple[float, str]:
    """Numbers by size, words by letters."""
    plain = item[0].replace(",", "")
    return (float(plain), "") if plain.isdecimal() else (float("inf"), item[0])
