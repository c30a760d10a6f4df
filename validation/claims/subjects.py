"""What is weighed: models, methods and lengths, each list in one place."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from kvsim.layout import Method, edges
from kvsim.methods import METHODS, Full, Kivi, kivi_seed

MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "smollm2-135m", "llama-3.2-1b")
"""GPT-2 in three sizes, and two models whose query heads share key/value heads (3 and 4 each)."""

CORE: tuple[Method, ...] = (Full(), Kivi(2), Kivi(4), Kivi(8), kivi_seed())
"""The methods that every model is weighed with, and :func:`others`."""

JUDGED: tuple[Method, ...] = (Full(), Kivi(8), Kivi(4), Kivi(2))
"""The methods whose speed and quality are recorded, and :func:`others`."""

GROUPS = ((32, 32, 32), (32, 32, 256), (64, 64, 128), (128, 64, 256))
"""(tokens a key scale, channels a value scale, residual) beside the default 32, 32, 128."""

GRID: tuple[Method, ...] = (
    *CORE,
    *(
        Kivi(nbits, key_group_size=key, value_group_size=value, residual_length=residual)
        for nbits in (2, 4, 8)
        for key, value, residual in GROUPS
    ),
    Kivi(2, sink_length=4),
    Kivi(key_nbits=4, value_nbits=2),
    Kivi(key_nbits=2, value_nbits=4, key_group_size=64, value_group_size=16),
    Kivi(2, dtype="float32"),
)
"""The methods that the first model is weighed with, and :func:`others`."""

BLOCK_EDGES = (255, 256, 257)
LONG = (1024, 2048)


def others() -> tuple[Method, ...]:
    """The examples of every method that kvruntime has a room for and the lists here do not name."""
    from kvruntime.methods import LAYERS

    named = {type(method) for method in (*GRID, *JUDGED)}
    return tuple(example for kind, room in LAYERS.items() if kind not in named for example in room.examples)


def judged() -> tuple[Method, ...]:
    """The methods whose speed and quality are recorded."""
    return (*JUDGED, *others())


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
    types = {type(make()).__name__: type(make()) for make in METHODS.values()}
    if described["type"] not in types:
        raise ValueError(f"method type {described['type']!r}: allowed are {', '.join(types)}")
    own = {key: value for key, value in described.items() if key not in ("name", "type")}
    if "inner" in own:
        own["inner"] = rebuild_method(own["inner"])
    method: Method = types[described["type"]](**own)
    return method


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
    chosen, more = models or MODELS, others()
    base, grid, core = chosen[0], (*GRID, *more), (*CORE, *more)
    if quick:
        few: tuple[Method, ...] = (Full(), Kivi(2), kivi_seed(), *more)
        small = "gpt2" if not models else base
        one: tuple[Method, ...] = (Kivi(2), *more)
        return Grid(
            chosen, 1, (*GRID[::5], *more), one, 257, 100, few, ((small, 120, 16, one),), (base,), (512,)
        )  # fmt: skip
    if device == "cpu":
        runs: list[Run] = [(base, 120, 60, (Full(), Kivi(2), kivi_seed(), *more))]
        runs += [(name, 96, 8, (Kivi(4), *more)) for name in chosen[1:] if name in ("gpt2-medium", "smollm2-135m")]
        peaks = tuple(dict.fromkeys((base, chosen[-1])))
        return Grid(chosen, 2, grid, core, LONG[-1], 300, core, tuple(runs), peaks, LONG)
    runs = [(base, 120, 300, core), (base, 1000, 20, core)]
    runs += [(name, 1000, 20, (Full(), Kivi(2), *more)) for name in chosen[1:]]
    peaks = tuple(dict.fromkeys((base, chosen[len(chosen) // 2], chosen[-1])))
    return Grid(chosen, None, grid, core, LONG[-1], 300, core, tuple(runs), peaks, LONG)
