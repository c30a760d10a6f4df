"""What is weighed: models, methods and lengths, each list in one place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from typing import TYPE_CHECKING, Any

from kvsim.layout import Method, edges
from kvsim.methods import METHODS

if TYPE_CHECKING:
    from kvruntime.methods.room import Claims

MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "smollm2-135m", "llama-3.2-1b")
"""GPT-2 in three sizes, and two models whose query heads share key/value heads (3 and 4 each)."""

BLOCK_EDGES = (255, 256, 257)
LONG = (1024, 2048)


def claims() -> Claims:
    """What the rooms of all methods have recorded, one after the other; a room without claims gives its examples."""
    from kvruntime.methods import LAYERS
    from kvruntime.methods.room import Claims, Room

    def own(room: Room) -> Claims:
        return room.claims or Claims(**{name: room.examples for name in Claims._fields if name != "variants"})

    return Claims(*(sum(each, ()) for each in zip(*map(own, LAYERS.values()), strict=True)))


def lengths(method: Method, longest: int = LONG[-1]) -> list[int]:
    """The lengths at which something changes, ascending: 1, the method's edges, around a growth block, and long."""
    points = {1, *BLOCK_EDGES, *LONG, *edges(method, longest)}
    return sorted(point for point in points if point <= longest)


def describe_method(method: Method) -> dict[str, Any]:
    """``{"name", "type", and every field}``: enough to build the method again."""
    own = {field.name: getattr(method, field.name) for field in fields(method)}  # type: ignore[arg-type]
    if "inner" in own:  # a wrapper's: described in turn
        own["inner"] = describe_method(own["inner"])
    return {"name": method.name, "type": type(method).__name__, **own}


def rebuild_method(described: dict[str, Any]) -> Method:
    """The method that :func:`describe_method` described.  Raises ``ValueError`` for one that kvsim does not know."""
    types = _types(tuple(METHODS.values()))
    if described["type"] not in types:
        raise ValueError(f"method type {described['type']!r}: allowed are {', '.join(types)}")
    own = {key: value for key, value in described.items() if key not in ("name", "type")}
    if "inner" in own:
        own["inner"] = rebuild_method(own["inner"])
    method: Method = types[described["type"]](**own)
    return method


@cache
def _types(makers: tuple[Callable[..., Method], ...]) -> dict[str, type[Method]]:
    """Every method's class by its name, of these factories."""
    return {type(method).__name__: type(method) for method in (make() for make in makers)}


Run = tuple[str, int, int, tuple[Method, ...]]


@dataclass(frozen=True)
class Grid:
    """How much is weighed.  ``fill_layers``: layers filled without a model; ``None`` for all of the model's.

    ``generated``: (model, prompt tokens, new tokens, methods) run through ``generate()``.  Peaks of single layers are
    taken on ``peak_models`` with ``peak_lengths`` tokens.
    """

    models: tuple[str, ...]
    fill_layers: int | None
    grid: tuple[Method, ...]
    core: tuple[Method, ...]
    longest: int
    steps: int
    step_methods: tuple[Method, ...]
    generated: tuple[Run, ...]
    peak_models: tuple[str, ...]
    peak_lengths: tuple[int, ...]


def grid_for(device: str, *, quick: bool, models: tuple[str, ...] = ()) -> Grid:
    """The grid of a device: everything on CUDA, what 2 cores do in a minute elsewhere, and the quick one for CI.

    ``models`` replaces the default models.
    """
    chosen, own = models or MODELS, claims()
    base, grid = chosen[0], (*own.core, *own.variants)
    if quick:
        small = "gpt2" if not models else base
        few, run = (*own.few, *own.variants[::5]), (small, 120, 16, own.one)
        return Grid(chosen, 1, few, own.one, 257, 100, own.few, (run,), (base,), (512,))
    if device == "cpu":
        runs: list[Run] = [(base, 120, 60, own.few)]
        runs += [(name, 96, 8, own.other) for name in chosen[1:] if name in ("gpt2-medium", "smollm2-135m")]
        peaks = tuple(dict.fromkeys((base, chosen[-1])))
        return Grid(chosen, 2, grid, own.core, LONG[-1], 300, own.core, tuple(runs), peaks, LONG)
    runs = [(base, 120, 300, own.core), (base, 1000, 20, own.core)]
    runs += [(name, 1000, 20, own.one) for name in chosen[1:]]
    peaks = tuple(dict.fromkeys((base, chosen[len(chosen) // 2], chosen[-1])))
    return Grid(chosen, None, grid, own.core, LONG[-1], 300, own.core, tuple(runs), peaks, LONG)
