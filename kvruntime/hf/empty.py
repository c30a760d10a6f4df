"""An empty cache of the kind that a model's decode steps ask for: steps on the device where one GPU runs them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from kvruntime.hf.attention import attach
from kvruntime.hf.cache import Cache
from kvruntime.hf.exact import Kind, packed_methods
from kvruntime.hf.models import NAMES
from kvruntime.hf.stepped import SteppedCache
from kvruntime.methods import has_steps
from kvsim.engines.kvruntime import stored_shape
from kvsim.layout import Method
from kvsim.methods.evict import windowed

_TOLD: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()
"""What was said of a model's steps."""


def empty_cache(
    model: Any, method: Method, kinds: Sequence[Kind], max_seq_len: int | None, replays: bool = True
) -> Cache:
    """A cache of layers of ``kinds``, for :func:`attend_through`.

    Its decode steps are CUDA graphs where ``model`` lies on one GPU and its layers have such steps; elsewhere, and
    where ``replays`` is false, the host plans them.  Warns, once a model, where a GPU could have had graphs.
    """
    devices = devices_of(model)
    if not replays or not any(map(steps_on, devices)):
        return host_planned(method, kinds, max_seq_len)
    if without := without_graphs(model, method, kinds, devices):
        _warn(model, without)
        return host_planned(method, kinds, max_seq_len)
    return SteppedCache(method, _layers(kinds), max_seq_len)


def _warn(model: Any, without: str) -> None:
    told = _TOLD.setdefault(model, set())
    if without not in told:
        told.add(without)
        warnings.warn(
            f"kvruntime: every decode step of {type(model).__name__} waits for the host: no CUDA graph holds {without}",
            RuntimeWarning,
            stacklevel=4,
        )


def attend_through(cache: Cache, model: Any) -> None:
    """Lets ``model`` attend through ``cache`` and its like from now on."""
    attach(model, replays=isinstance(cache, SteppedCache))


def host_planned(method: Method, kinds: Sequence[Kind], max_seq_len: int | None) -> Cache:
    """A cache whose every step the host plans, of layers of ``kinds``."""
    return Cache(method, _layers(kinds), max_seq_len)


def _layers(kinds: Sequence[Kind]) -> int | Sequence[Kind]:
    """``kinds``, or their number where all are full attention."""
    plain = all(
        not kind.keeps and not kind.window and (kind.shape is None or kind.shape.kind == "full") for kind in kinds
    )
    return len(kinds) if plain else kinds


def devices_of(model: Any) -> list[str]:
    """The devices that a model's parameters lie on."""
    return sorted({str(parameter.device) for parameter in model.parameters()})


def steps_on(device: str) -> bool:
    """Whether decode steps there are worth CUDA graphs."""
    return device.startswith("cuda")


def without_graphs(model: Any, method: Method, kinds: Sequence[Kind], devices: Sequence[str]) -> str:
    """What no graph of a step can hold: layers on several devices, a pipeline's stage, whose first or last layer may be
    elsewhere, and methods whose steps the host decides, alone or behind a packed window; empty where nothing."""
    if getattr(model, "_pp_stage", None) is not None:
        return "pipeline stages"
    if len(devices) > 1:
        return f"layers on {' and '.join(devices)}"
    windows = {kind.window for kind in kinds if kind.shape and kind.window}
    for one in dict.fromkeys(packed_methods(method, kinds)):
        behind: list[Method] = [windowed(one, window) for window in windows]
        for each in behind or [one]:
            if not has_steps(each):
                return each.name
    return ""


def without_steps(method: Method, kinds: Sequence[Kind]) -> str:
    """What of a model's layers no compiled step runs: packed layers alone, of heads that the method packs as they are,
    do."""
    others = sorted({NAMES.get(kind.keeps, "layers without a cache") for kind in kinds if kind.keeps})
    if any(kind.shape and kind.window for kind in kinds):
        others.append("windows that are packed")
    if any(kind.shape and kind.shape.kind != "full" for kind in kinds):
        others.append("multi-head latent attention")
    odd = [kind.shape for kind in kinds if kind.shape and stored_shape(method, kind.shape) != kind.shape]
    return " and ".join(others) or (f"heads of {odd[0].key_dim}" if odd else "")
