"""What the records cover, and what they do not: points by axis, methods and runtimes without any, rows left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from kvsim.engines.kvruntime import names as stored_methods
from kvsim.methods import make_method, method_named
from kvsim.models.load import load_model
from kvsim.models.model import Model
from validation.report.claims import RUNTIMES
from validation.report.collection import Collection, Point

Table = tuple[list[str], list[list[str]]]

TIMED = (
    *("attention", "attention, coded tokens", "engine", "generate", "generate, compiled"),
    *("stock generate", "stock generate, new lengths", "stock generate, compiled", "first token", "short prompts"),
    "engine, several cards",
)
"""Claims of time, without those that predict the same rows again by a profile."""

WHOLE = {
    "figure of memory": ("bytes", "memory by phase", "largest batch"),
    "whole step": ("engine", "generate", "generate, compiled"),
}
"""Claims of what this project's cache holds, and of whole steps with it."""
PROFILED = ("engine", "generate", "generate, compiled", "stock generate", "stock generate, new lengths")
"""Runtimes that a profile may have a part for."""
KINDS: dict[str, Callable[[Model], bool]] = {
    "windows": lambda model: any(layer.window is not None for layer in model.cache_layers),
    "constant states": lambda model: bool(model.state_layers),
    "latents": lambda model: any(layer.kind == "mla" for layer in model.cache_layers),
}
"""Layers beside full attention, and which models have them."""


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
    """What has no point: rows left out with the reason, and methods, models and runtimes that nothing was weighed or
    timed of."""
    body = [[each.what, f"{each.rows}", each.reason] for each in found.uncovered]
    body += [[what, f"{rows}", reason] for (what, reason), rows in sorted(found.parts_left.items())]
    for words, claims in WHOLE.items():
        points = [point for point in found.points if point.claim in claims]
        known = {_type(point.factors["method"]) for point in points}
        body += [
            [f"method {name}", "0", f"no {words} was recorded with it"]
            for name in stored_methods()
            if type(make_method(name)).__name__ not in known
        ]
        models = [load_model(name) for name in sorted({point.factors["model"] for point in points})]
        body += [
            [f"models with {kind}", "0", f"no {words} was recorded of one"]
            for kind, has in KINDS.items()
            if not any(map(has, models))
        ]
    for claim in RUNTIMES:
        cards = {point.factors["card"] for point in found.points if point.claim == claim}
        profiled = {point.factors["card"] for point in found.points if point.claim.startswith(f"{claim}, calibrated")}
        why = "no profile of this card has a part for it" if claim in PROFILED else "a profile has no part for it"
        body += [[f"{claim}, {card}", "0", why] for card in sorted(cards - profiled)]
    return ["what", "rows", "why"], body


def _type(method: str) -> str:
    """The class of a method by its recorded name; empty for what kvsim does not make."""
    try:
        return type(method_named(method)).__name__
    except LookupError:
        return ""


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
