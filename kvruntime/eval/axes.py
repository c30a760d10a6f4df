"""Along which axis to quantize: a study of error only.

Keys and values of the past are quantized and dequantized along any axis, in place, and kept in the model's own
type.  So this cache saves no memory at all; it says what the choice of axes costs in quality (arXiv 2402.02750,
table 2).  Which tokens are exact at every step follows ``Kivi.num_packed``, as in the real cache, so that KIVI's
own axes give the real cache's numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kvruntime.kernels.fake_quantize import CHANNEL, TOKEN, fake_quantize

LADDER: dict[str, tuple[str, str] | None] = {
    "exact": None,
    "keys per channel, values per token (KIVI)": (CHANNEL, TOKEN),
    "keys per token, values per token": (TOKEN, TOKEN),
    "keys per channel, values per channel": (CHANNEL, CHANNEL),
    "keys per token, values per channel": (TOKEN, CHANNEL),
}
"""Rung -> (axis of the keys, axis of the values); None quantizes nothing.  Per channel: a group is ``group_size``
tokens of one channel.  Per token: ``group_size`` channels of one token.  Both cost the same bits."""


@runtime_checkable
class GroupQuantizer(Protocol):
    """A method of which the study can be made: it packs its older tokens in groups that share a scale, as KIVI does."""

    @property
    def sink_length(self) -> int: ...
    @property
    def k_bits(self) -> int: ...
    @property
    def v_bits(self) -> int: ...
    @property
    def k_group(self) -> int | str: ...
    @property
    def v_group(self) -> int | str: ...
    def num_packed(self, num_tokens: int) -> int: ...


@dataclass(frozen=True)
class Axes:
    """``key`` and ``value``: ``"channel"`` or ``"token"``."""

    key: str
    value: str


class SimulatedLayer(DynamicLayer):
    """A stock layer whose older tokens went through ``fake_quantize``, each once, when a real cache would pack it."""

    keys: Tensor
    values: Tensor

    def __init__(self, method: GroupQuantizer, axes: Axes) -> None:
        super().__init__()
        if method.sink_length or isinstance(method.k_group, str) or isinstance(method.v_group, str):
            raise ValueError("the study of axes takes numbers for both group sizes, and no sink")
        self.method, self.axes, self.num_quantized = method, axes, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        before, length = self.get_seq_length(), key_states.shape[-2]
        key, value = super().update(key_states, value_states, *args, **kwargs)
        if length == 1:  # stored first, then read: as the real cache decodes
            self._quantize(before + 1)
            return self.keys, self.values
        self.keys, self.values = key.clone(), value.clone()  # read first: new tokens see each other exactly
        self._quantize(before + length)
        return key, value

    def _quantize(self, num_tokens: int) -> None:
        start, stop = self.num_quantized, self.method.num_packed(num_tokens)
        if stop <= start:
            return
        method = self.method
        for name, nbits, group, axis in (
            ("keys", method.k_bits, method.k_group, self.axes.key),
            ("values", method.v_bits, method.v_group, self.axes.value),
        ):
            stored = getattr(self, name)
            stored[..., start:stop, :] = fake_quantize(stored[..., start:stop, :], nbits, int(group), axis)
        self.num_quantized = stop


def simulated_cache(config: Any, method: GroupQuantizer, axes: Axes) -> DynamicCache:
    """A transformers cache of ``SimulatedLayer``; raises ``ValueError`` for a model with other than full attention."""
    cache = DynamicCache(config=config)
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        raise ValueError("the study of axes takes models whose layers are all full attention")
    cache.layers = [SimulatedLayer(method, axes) for _ in cache.layers]
    return cache
