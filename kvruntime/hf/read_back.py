"""What a packed layer's ``keys`` and ``values`` are to code that expects a stock cache's tensors: copies that refuse
to be written to, because nothing of it would reach what is held."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

REFUSED = (
    "a packed layer's keys and values are copies, read back, and {} would change nothing that the cache holds: clone() "
    "them for a copy of your own, update() stores more tokens"
)


class ReadBackTensor(Tensor):
    """A copy, and every view of it.  Raises ``ValueError`` where it is written to."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given, name = kwargs or {}, getattr(function, "__name__", "")
        own = args[0] if args and isinstance(args[0], cls) else None
        if (own is not None and _writes(name)) or isinstance(given.get("out"), cls):
            raise ValueError(REFUSED.format(name))
        with torch._C.DisableTorchFunctionSubclass():
            out = function(*args, **given)
            if own is not None and isinstance(out, Tensor) and not isinstance(out, cls) and _views(out, own):
                return out.as_subclass(cls)
        return out

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.clone().__reduce_ex__(protocol)


def _writes(name: str) -> bool:
    """Whether a tensor's method of this name changes its values: ``add_``, ``__setitem__``, ``__iadd__``."""
    inside = name.strip("_")
    if name.startswith("__"):
        return inside == "setitem" or name in ("__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__")
    return name.endswith("_") and name != "requires_grad_"


def _views(out: Tensor, own: Tensor) -> bool:
    """Whether ``out`` lies in ``own``'s memory."""
    there = out.untyped_storage().nbytes() and out.layout == torch.strided
    return bool(there) and out.untyped_storage().data_ptr() == own.untyped_storage().data_ptr()
