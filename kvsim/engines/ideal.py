"""The bytes that the method needs, and no more: nothing rounded, nothing beside them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvsim.engines.engine import Engine
from kvsim.layout import Layers, LayerShape, Method, check_parts, parts, shared_buffers, shared_tokens
from kvsim.methods import Full, placed

if TYPE_CHECKING:
    from kvsim.models.model import Model


INDEX = Full()
"""How index keys are weighed where no engine says otherwise: 16 bits each."""


def method_parts(method: Method, layers: Layers, batch_size: int, num_tokens: int) -> dict[str, int]:
    """Bytes by purpose of ``layers`` under ``method``, with what the layers share, once."""
    total: dict[str, int] = {}
    shared = check_parts(method, parts(shared_buffers(method, layers)))
    for (layer, chosen), count in placed(method, layers).items():
        for name, size in check_parts(chosen, parts(chosen.buffers(layer, batch_size, num_tokens))).items():
            total[name] = total.get(name, 0) + count * size
    for name, size in shared.items():
        total[name] = total.get(name, 0) + size
    return total


@dataclass(frozen=True)
class Ideal(Engine):
    """Every layer's own buffers at their exact size: keys and values by the method (with what its
    layers share, once), index keys at 16 bits, states.  A prefix is shared as far as the method can share it."""

    checkpoint_cache = True
    runtime = "pytorch"

    @property
    def name(self) -> str:
        return "ideal"

    def parts(self, model: Model, method: Method, batch_size: int, num_tokens: int) -> dict[str, int]:
        total = method_parts(method, model.cache_layers, batch_size, num_tokens)

        def add(prefix: str, one: dict[str, int], count: int) -> None:
            for name, size in one.items():
                total[prefix + name] = total.get(prefix + name, 0) + count * size

        for layer, count in Counter(model.index_layers).items():
            add("index_", parts(INDEX.buffers(layer, batch_size, num_tokens)), count)
        for state, count in Counter(model.state_layers).items():
            add("state_", parts(state.buffers(batch_size)), count)
        return total

    def shared_tokens(self, model: Model, method: Method, layer: LayerShape, chosen: Method, shared: int) -> int:
        return shared_tokens(chosen, layer, shared)
