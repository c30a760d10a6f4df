"""A method's place: a mix stores layers differently, by where they stand; every other method does not care."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from kvsim.layout import LayerShape, Method

Placed = tuple[LayerShape, Method]


def at(method: Method, layer: LayerShape, index: int, num_layers: int) -> Method:
    """What ``method`` is for ``layer``, the ``index``-th of ``num_layers`` with a cache."""
    chosen = getattr(method, "at", None)
    return method if chosen is None else chosen(layer, index, num_layers)


def placed(method: Method, layers: Sequence[LayerShape]) -> Counter[Placed]:
    """How often each (layer, method for it) occurs among ``layers``, in first-seen order."""
    if getattr(method, "at", None) is None:
        return Counter((layer, method) for layer in layers)
    return Counter((layer, at(method, layer, index, len(layers))) for index, layer in enumerate(layers))
