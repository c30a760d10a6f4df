"""The one scale: bytes of every storage that an object keeps alive, found by asking the garbage collector.

Independent of ``cache.nbytes``, of kvsim, and of how a cache is written: whatever Python reference leads to a tensor
is followed (attributes, slots, containers, closures, bound methods, the parts of other libraries' packed formats),
and each storage counts once and whole, however small the view that holds it.
"""

from __future__ import annotations

import gc
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch

SHARED = (type, ModuleType, BuiltinFunctionType, torch.nn.Module)
"""Not entered: code, and models, whose weights are their own."""


def weigh(root: Any) -> int:
    """Bytes of the distinct storages behind every tensor reachable from ``root``."""
    return sum(storages(root).values())


def storages(root: Any) -> dict[tuple[str, int], int]:
    """``(device, address) -> bytes`` of every storage reachable from ``root``."""
    found: dict[tuple[str, int], int] = {}
    seen: dict[int, Any] = {}  # holds the objects, so that no id comes twice
    stack = [root]
    while stack:
        item = stack.pop()
        if id(item) in seen or isinstance(item, SHARED):
            continue
        seen[id(item)] = item
        if isinstance(item, torch.Tensor):
            parts = _parts(item)
            if not parts and item.device.type != "meta":
                storage = item.untyped_storage()
                if storage.nbytes():
                    found[str(item.device), storage.data_ptr()] = storage.nbytes()
            stack += [*parts, *([item.grad] if item.is_leaf else [])]
        if isinstance(item, FunctionType):  # not its globals
            stack += [*(item.__closure__ or ()), *(item.__defaults__ or ()), item.__dict__]
        else:
            stack += gc.get_referents(item)
    return found


def _parts(tensor: torch.Tensor) -> list[Any]:
    """The tensors that a wrapper subclass is made of; empty for an ordinary tensor."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter) or not hasattr(tensor, "__tensor_flatten__"):
        return []
    return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
