"""Along which axis to quantize: a study of error only.

Keys and values of the past are quantized and dequantized along any axis, in place, and kept in the model's own
type.  So this cache saves no memory at all; it says what the choice of axes costs in quality (arXiv 2402.02750,
table 2).  Which tokens are exact at every step follows ``Kivi.num_packed``, as in the real cache, so that KIVI's
own axes give the real cache's numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kvsim.methods import Kivi

CHANNEL, TOKEN = "channel", "token"

LADDER: dict[str, tuple[str, str] | None] = {
    "exact": None,
    "keys per channel, values per token (KIVI)": (CHANNEL, TOKEN),
    "keys per token, values per token": (TOKEN, TOKEN),
    "keys per channel, values per channel": (CHANNEL, CHANNEL),
    "keys per token, values per channel": (TOKEN, CHANNEL),
}
"""Rung -> (axis of the keys, axis of the values); None quantizes nothing.  Per channel: a group is ``group_size``
tokens of one channel.  Per token: ``group_size`` channels of one token.  Both cost the same bits."""


@dataclass(frozen=True)
class Axes:
    """``key`` and ``value``: ``"channel"`` or ``"token"``."""

    key: str
    value: str


def fake_quantize(x: Tensor, nbits: int, group_size: int, axis: str) -> Tensor:
    """``x [..., tokens, channels]`` quantized and read back; float16 scale and minimum a group, as stored.

    Raises ``ValueError`` when the group does not divide the tokens (``channel``) or the channels (``token``).
    """
    dim = {CHANNEL: -2, TOKEN: -1}[axis]
    if x.shape[dim] % group_size:
        raise ValueError(
            f"group size {group_size} does not divide {x.shape[dim]} {'tokens' if dim == -2 else 'channels'}"
        )
    groups = x.float().unflatten(dim, (-1, group_size))
    low, high = groups.amin(dim, keepdim=True), groups.amax(dim, keepdim=True)
    scale, zero = ((high - low) / (2**nbits - 1)).half().float(), low.half().float()
    code = ((groups - zero) * torch.where(scale > 0, 1 / scale, 0.0)).clamp(0, 2**nbits - 1).round()
    return (code * scale + zero).reshape(x.shape).to(x.dtype)


class SimulatedLayer(DynamicLayer):
    """A stock layer whose older tokens went through ``fake_quantize``, each once, when a real cache would pack it."""

    keys: Tensor
    values: Tensor

    def __init__(self, method: Kivi, axes: Axes) -> None:
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


def simulated_cache(config: Any, method: Kivi, axes: Axes) -> DynamicCache:
    """A transformers cache of ``SimulatedLayer``; raises ``ValueError`` for a model with other than full attention."""
    cache = DynamicCache(config=config)
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        raise ValueError("the study of axes takes models whose layers are all full attention")
    cache.layers = [SimulatedLayer(method, axes) for _ in cache.layers]
    return cache
