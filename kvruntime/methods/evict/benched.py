"""What ``bench kernels`` times of eviction: the attention of the method inside over what is left.  No layout is timed
unless it is asked for.  Policies that score ask for a prompt's queries, which a benchmark's layer is not given."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import Tensor

from kvruntime.methods.evict.layer import EvictLayer
from kvsim.methods.evict import Evict


def inside(method: Any) -> Any:
    """What the room of the method inside measures.  Raises ``ValueError`` for one that has no such."""
    own = import_module("kvruntime.methods").room_of(method).measures
    if own is None:
        raise ValueError(f"method {method.name}: its room does not say how its attention is timed under eviction")
    return own


def packs(method: Evict, num_tokens: int) -> bool:
    """Whether what is left of so many tokens has any that are packed."""
    return num_tokens > 0


def scratch(layer: EvictLayer, num_q_heads: int) -> Tensor:
    """That of the method inside."""
    out: Tensor = inside(layer.method.inner).scratch(layer.inner, num_q_heads)
    return out


def attend(layer: EvictLayer, query: Tensor, scale: float, scratch: Tensor) -> Tensor:
    """The kernel of the method inside over what is left."""
    out: Tensor = inside(layer.method.inner).attend(layer.inner, query, scale, scratch)
    return out


def portable(layer: EvictLayer, query: Tensor, scale: float, scratch: Tensor) -> Tensor:
    """Its portable kernel."""
    out: Tensor = inside(layer.method.inner).portable(layer.inner, query, scale, scratch)
    return out


def with_splits(layer: EvictLayer, query: Tensor, scale: float, scratch: Tensor, number: int) -> Tensor:
    """Its kernel with another number of splits than it plans."""
    out: Tensor = inside(layer.method.inner).with_splits(layer.inner, query, scale, scratch, number)
    return out


def about(layer: EvictLayer, query: Tensor, plain: bool) -> dict[str, Any]:
    """Which kernel attends, and how many tokens of the first row are left."""
    own = inside(layer.method.inner)
    row = own.about(layer.inner, query, plain) if hasattr(own, "about") else {"kernel": layer.kernel}
    return {**row, "kept_tokens": layer.inner.row_lengths[0]}


def packers(layer: EvictLayer, key: Tensor, value: Tensor) -> dict[str, Any]:
    """Other packers: none."""
    return {}


def check_flushes(method: Evict, num_tokens: int) -> None:
    """Raises ``ValueError``: who leaves is decided on the host."""
    raise ValueError(f"method {method.name}: a token is stored by its host, which no kernel's time says")


def filling(method: Evict) -> int:
    """Tokens that compile every kernel of the layer."""
    return 512
