"""A method's place: a mix stores layers differently, by where they stand; every other method does not care."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache

from kvsim.layout import LayerShape, Method

LayerMethod = tuple[LayerShape, Method]
"""A layer and the method for it."""


def at(method: Method, layer: LayerShape, index: int, num_layers: int) -> Method:
    """What ``method`` is for ``layer``, the ``index``-th of ``num_layers`` with a cache."""
    chosen = getattr(method, "at", None)
    return method if chosen is None else chosen(layer, index, num_layers)


def within(method: Method, first: int, count: int, num_layers: int) -> Method:
    """What ``method`` is for a model of ``count`` layers: those from ``first`` on of ``num_layers`` with a cache."""
    part = getattr(method, "within", None)
    return method if part is None else part(first, count, num_layers)


def in_order(method: Method, layers: Sequence[LayerShape]) -> list[Method]:
    """What ``method`` is for each of ``layers``, first to last."""
    return [at(method, layer, index, len(layers)) for index, layer in enumerate(layers)]


@lru_cache(maxsize=256)
def _placed(method: Method, layers: tuple[LayerShape, ...]) -> Counter[LayerMethod]:
    if getattr(method, "at", None) is None:
        return Counter({(layer, method): count for layer, count in Counter(layers).items()})
    return Counter((layer, at(method, layer, index, len(layers))) for index, layer in enumerate(layers))


def placed(method: Method, layers: tuple[LayerShape, ...]) -> Mapping[LayerMethod, int]:
    """How often each (layer, method for it) occurs among ``layers``, in first-seen order."""
    return _placed(method, layers)  # type: ignore[arg-type]  # every method is frozen
