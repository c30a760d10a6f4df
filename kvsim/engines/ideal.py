"""The bytes that the method needs, and no more: nothing rounded, nothing beside them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvsim.layout import Method, parts, shared_buffers
from kvsim.methods import Full, placed

if TYPE_CHECKING:
    from kvsim.hardware import Hardware
    from kvsim.models.model import Model


INDEX = Full()
"""How index keys are weighed where no engine says otherwise: 16 bits each."""


@dataclass(frozen=True)
class Ideal:
    """Every layer's own buffers at their exact size: keys and values by the method (with what its
    layers share, once), index keys at 16 bits, states."""

    @property
    def name(self) -> str:
        return "ideal"

    def parts(self, model: Model, method: Method, batch_size: int, num_tokens: int) -> dict[str, int]:
        total: dict[str, int] = {}

        def add(prefix: str, one: dict[str, int], count: int) -> None:
            for name, size in one.items():
                total[prefix + name] = total.get(prefix + name, 0) + count * size

        for (layer, chosen), count in placed(method, model.cache_layers).items():
            add("", parts(chosen.buffers(layer, batch_size, num_tokens)), count)
        add("", parts(shared_buffers(method, model.cache_layers)), 1)
        for layer, count in Counter(model.index_layers).items():
            add("index_", parts(INDEX.buffers(layer, batch_size, num_tokens)), count)
        for state, count in Counter(model.state_layers).items():
            add("state_", parts(state.buffers(batch_size)), count)
        return total

    def overhead(self, model: Model, hardware: Hardware) -> dict[str, int]:
        return {}

    def notes(self, model: Model, method: Method) -> tuple[str, ...]:
        return ()
