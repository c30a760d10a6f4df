"""What an object really holds on to: the unique storages of every tensor reachable from it."""

from __future__ import annotations

from collections.abc import Iterable
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch

OPAQUE = (str, bytes, int, float, complex, bool, type(None), type, ModuleType, BuiltinFunctionType, torch.nn.Module)
"""Not entered: plain values, code, and modules (weights belong to the model, not to a cache)."""


def weigh(root: Any) -> int:
    """Bytes of all storages reachable from ``root``, each counted once and whole.

    Attributes, slots, containers and closures are followed; tensors inside tensors (packed formats of other
    libraries) too.  A view counts the whole storage that it keeps alive.
    """
    return sum(storages(root).values())


def storages(root: Any) -> dict[tuple[str, int], int]:
    """``(device, address) -> bytes`` of all storages reachable from ``root``."""
    found: dict[tuple[str, int], int] = {}
    seen: dict[int, Any] = {}  # holds the objects, so that no id is used twice
    stack = [root]
    while stack:
        item = stack.pop()
        if isinstance(item, OPAQUE) or id(item) in seen:
            continue
        seen[id(item)] = item
        if isinstance(item, torch.Tensor):
            inner = _inner_tensors(item)
            if not inner and item.device.type != "meta":
                storage = item.untyped_storage()
                if storage.nbytes():
                    found[str(item.device), storage.data_ptr()] = storage.nbytes()
            stack += inner
        stack += _children(item)
    return found


def _inner_tensors(tensor: torch.Tensor) -> list[Any]:
    """The tensors that a wrapper subclass is made of; empty for an ordinary tensor."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter) or not hasattr(tensor, "__tensor_flatten__"):
        return []
    return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]


def _children(item: Any) -> Iterable[Any]:
    out: list[Any] = list(getattr(item, "__dict__", {}).values())
    if isinstance(item, dict):
        out += [*item.keys(), *item.values()]
    elif isinstance(item, (list, tuple, set, frozenset)) or type(item).__name__ in ("deque", "odict_values"):
        out += list(item)
    elif isinstance(item, FunctionType):
        out += [cell.cell_contents for cell in item.__closure__ or () if _filled(cell)]
        out += list(item.__defaults__ or ())
    elif isinstance(item, MethodType):
        out += [item.__self__, item.__func__]
    elif hasattr(item, "func") and hasattr(item, "args"):  # functools.partial
        out += [item.func, *item.args]
    for kind in type(item).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        names = (slots,) if isinstance(slots, str) else slots
        out += [getattr(item, name) for name in names if name != "__weakref__" and hasattr(item, name)]
    return out


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents
    except ValueError:
        return False
    return True
