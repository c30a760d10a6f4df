"""Which layer object runs which method: one room and one row a method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from kvruntime.methods import evict, full, kivi, token
from kvruntime.methods.room import Layer, Room
from kvruntime.methods.rows import Fresh, Steps, make_shared
from kvsim.engines.kvruntime import check_runs
from kvsim.layout import LayerShape, Method, shared_buffers
from kvsim.methods import Evict, Full, Kivi, LayerMix, PerTokenHead, TurboQuant

LAYERS: dict[type, Room] = {
    Full: full.ROOM,
    Kivi: kivi.ROOM,
    PerTokenHead: token.ROOM,
    TurboQuant: token.TURBOQUANT_ROOM,
    Evict: evict.ROOM,
}
"""Method type -> its room, one row a method."""
SPELLED: tuple[type, ...] = (*LAYERS, LayerMix)
"""Method types that files may hold: a mix says by which of them each layer is stored."""


def room_of(method: Method) -> Room:
    """The method's row.  Raises ``ValueError``, naming it, where there is none."""
    if type(method) not in LAYERS:
        raise ValueError(f"kvruntime has no room for the method {getattr(method, 'name', repr(method))}")
    return LAYERS[type(method)]


def spelled(method: Method) -> dict[str, Any]:
    """A method as text and numbers, for files."""
    values = {field.name: getattr(method, field.name) for field in fields(method)}  # type: ignore[arg-type]
    inside = {name: spelled(x) if type(x) in SPELLED else x for name, x in values.items()}
    return {"type": type(method).__name__, "fields": inside}


def respelled(spelling: Mapping[str, Any]) -> Method:
    """The method that :func:`spelled` wrote.  Raises ``ValueError`` for a type that kvruntime does not run."""
    types = {kind.__name__: kind for kind in SPELLED}
    if spelling["type"] not in types:
        raise ValueError(f"a saved cache of the method {spelling['type']}: allowed are {', '.join(types)}")
    values = {name: respelled(x) if isinstance(x, dict) else x for name, x in spelling["fields"].items()}
    made: Method = types[spelling["type"]](**values)
    return made


def make_layer(
    method: Method,
    shape: LayerShape,
    batch_size: int,
    max_seq_len: int | None,
    device: torch.device,
    shared: Mapping[str, Tensor] | None = None,
) -> Layer:
    """The layer object of ``method``; raises ``ValueError`` where nothing runs it yet or it cannot hold ``shape``.

    A wrapper's layer makes that of the method inside it in the same way.  ``shared``: :func:`shared_tensors`; made
    here for this layer alone where it is ``None``.
    """
    check_runs(method)
    if shared is None:
        shared = shared_tensors(method, [shape], device)
    inside = {"make": make_layer} if hasattr(method, "inner") else {}
    return room_of(method).layer(method, shape, batch_size, max_seq_len, device, shared, **inside)


def changes_scores(method: Method, device: torch.device) -> bool:
    """Whether layers of ``method`` attend on ``device`` with sinks and softcaps: of a wrapper, its inner's."""
    inner = getattr(method, "inner", None)
    if inner is not None:
        return changes_scores(inner, device)
    found: bool = room_of(method).layer.changes_scores(device)  # type: ignore[attr-defined]
    return found


def holds_latents(method: Method, device: torch.device) -> bool:
    """Whether layers of ``method`` attend on ``device`` to latents of MLA; no wrapper's do."""
    found: bool = room_of(method).layer.holds_latents(method, device)  # type: ignore[attr-defined]
    return found


def has_steps(method: Method) -> bool:
    """Whether layers of ``method`` have a step that decides nothing on the host; of a wrapper a packed window alone,
    where the method inside lets tokens go in a step."""
    inner, window = getattr(method, "inner", None), getattr(method, "window", 0)
    if inner is not None:
        return bool(window) and bool(room_of(inner).layer.forgets_in_steps(inner, window))  # type: ignore[attr-defined]
    found: bool = room_of(method).layer.has_steps  # type: ignore[attr-defined]
    return found


def shared_tensors(method: Method, shapes: Sequence[LayerShape], device: torch.device) -> Mapping[str, Tensor]:
    """The tensors that layers of ``shapes`` share under ``method`` on one device: made once a model."""
    return make_shared(method, shared_buffers(method, shapes), _making(method), device)


def _making(method: Method) -> Any:
    """The innermost room's ``shared``."""
    inner = getattr(method, "inner", None)
    return room_of(method).shared or (None if inner is None else _making(inner))


__all__ = [
    "LAYERS",
    "Fresh",
    "Layer",
    "Room",
    "Steps",
    "changes_scores",
    "check_runs",
    "has_steps",
    "holds_latents",
    "make_layer",
    "respelled",
    "room_of",
    "shared_tensors",
    "spelled",
]
