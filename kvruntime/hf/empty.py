"""An empty cache of the kind that a model's decode steps ask for: steps on the device where one GPU runs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvruntime.hf.attention import attach
from kvruntime.hf.cache import Cache
from kvruntime.hf.exact import ExactPart, Kind, packed_shapes
from kvruntime.hf.models import NAMES
from kvruntime.hf.stepped import SteppedCache
from kvruntime.methods import room_of
from kvsim.engines.kvruntime import stored_shape
from kvsim.layout import Method
from kvsim.methods import in_order


def empty_cache(
    model: Any, method: Method, kinds: Sequence[Kind], max_seq_len: int | None, replays: bool = True
) -> Cache:
    """A cache of layers of ``kinds``, for :func:`attend_through`.

    Its decode steps are CUDA graphs where ``model`` lies on one GPU and its layers have such steps; elsewhere, and
    where ``replays`` is false, the host plans them.
    """
    devices, layer = devices_of(model), room_of(in_order(method, packed_shapes(kinds))[0]).layer
    steps = (
        replays
        and not without_graphs(model, kinds)
        and len(devices) == 1  # a graph is of one device
        and steps_on(devices[0])
        and layer.has_steps  # type: ignore[attr-defined]
    )
    if steps:
        return SteppedCache(method, kinds if any(kind.keeps for kind in kinds) else len(kinds), max_seq_len)
    return host_planned(method, kinds, max_seq_len)


def attend_through(cache: Cache, model: Any) -> None:
    """Lets ``model`` attend through ``cache`` and its like from now on."""
    attach(model, replays=isinstance(cache, SteppedCache))


def host_planned(method: Method, kinds: Sequence[Kind], max_seq_len: int | None) -> Cache:
    """A cache whose every step the host plans, of layers of ``kinds``."""
    return Cache(method, kinds if any(kind.keeps or kind.window for kind in kinds) else len(kinds), max_seq_len)


def devices_of(model: Any) -> list[str]:
    """The devices that a model's parameters lie on."""
    return sorted({str(parameter.device) for parameter in model.parameters()})


def steps_on(device: str) -> bool:
    """Whether decode steps there are worth CUDA graphs."""
    return device.startswith("cuda")


def without_graphs(model: Any, kinds: Sequence[Kind]) -> str:
    """What of a model's layers no graph of a step can hold: packed windows, chunks, which are no windows, and those of
    a pipeline's stage, whose first or last layer may be elsewhere."""
    if getattr(model, "_pp_stage", None) is not None:
        return "pipeline stages"
    if any(kind.shape and kind.window for kind in kinds):
        return "windows that are packed"
    config = model.config.get_text_config(decoder=True)
    chunked = getattr(config, "attention_chunk_size", None) and any(kind.keeps is ExactPart.WINDOW for kind in kinds)
    return "chunked attention" if chunked else ""


def without_steps(method: Method, kinds: Sequence[Kind]) -> str:
    """What of a model's layers no compiled step runs: packed layers alone, of heads that the method packs as they are,
    do."""
    others = sorted({NAMES.get(kind.keeps, "layers without a cache") for kind in kinds if kind.keeps})
    if any(kind.shape and kind.window for kind in kinds):
        others.append("windows that are packed")
    odd = [kind.shape for kind in kinds if kind.shape and stored_shape(method, kind.shape) != kind.shape]
    return " and ".join(others) or (f"heads of {odd[0].key_dim}" if odd else "")
