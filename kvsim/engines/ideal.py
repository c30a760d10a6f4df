"""The bytes that the method needs, and no more: nothing rounded, nothing beside them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvsim.layout import LayerShape, Method, parts

if TYPE_CHECKING:
    from kvsim.hardware import Hardware
    from kvsim.model import Model


@dataclass(frozen=True)
class Ideal:
    """Every layer's own buffers at their exact size: the lower bound of every engine."""

    @property
    def name(self) -> str:
        return "ideal"

    def parts(self, model: Model, method: Method, batch_size: int, num_tokens: int) -> dict[str, int]:
        total: dict[str, int] = {}
        for layer, count in Counter(model.layers).items():
            if isinstance(layer, LayerShape):
                one, prefix = parts(method.buffers(layer, batch_size, num_tokens)), ""
            else:
                one, prefix = parts(layer.buffers(batch_size)), "state_"
            for name, size in one.items():
                total[prefix + name] = total.get(prefix + name, 0) + count * size
        return total

    def overhead(self, model: Model, hardware: Hardware) -> dict[str, int]:
        return {}

    def notes(self, model: Model, method: Method) -> tuple[str, ...]:
        return ()
