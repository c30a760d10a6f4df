"""The bytes that the method needs, and no more: nothing rounded, nothing beside them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvsim.engines.engine import Engine
from kvsim.layout import LayerShape, Method, check_parts, parts, shared_buffers, shared_tokens
from kvsim.methods import Full, placed

if TYPE_CHECKING:
    from kvsim.models.model import Model


INDEX = Full()
"""How index keys are weighed where no engine says otherwise: 16 bits each."""


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
        total: dict[str, int] = {}

        def add(prefix: str, one: dict[str, int], count: int) -> None:
            for name, size in one.items():
                total[prefix + name] = total.get(prefix + name, 0) + count * size

        for (layer, chosen), count in placed(method, model.cache_layers).items():
            add("", check_parts(chosen, parts(chosen.buffers(layer, batch_size, num_tokens))), count)
        add("", check_parts(method, parts(shared_buffers(method, model.cache_layers))), 1)
        for layer, count in Counter(model.index_layers).items():
            add("index_", parts(INDEX.buffers(layer, batch_size, num_tokens)), count)
        for state, count in Counter(model.state_layers).items():
            add("state_", parts(state.buffers(batch_size)), count)
        return total

    def shared_tokens(self, model: Model, method: Method, layer: LayerShape, chosen: Method, shared: int) -> int:
        return shared_tokens(chosen, layer, shared)
