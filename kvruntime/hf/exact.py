"""Layers of a cache that stay as they are, beside the packed ones: windows and states, in transformers' own layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin, LinearAttentionLayer

from kvsim.engines.kvruntime import check_alike
from kvsim.layout import LayerShape, Method
from kvsim.methods import in_order


class ExactPart(StrEnum):
    """What a layer keeps that is not packed."""

    NOTHING = ""
    WINDOW = "window"
    STATES = "states"
    EMPTY = "empty"
    """The layer has no cache at all (experts or an MLP alone)."""


@dataclass(frozen=True)
class Kind:
    """What one layer keeps: ``shape`` of packed attention, full or over ``window`` tokens, and what stays as it is
    beside or in place of it."""

    shape: LayerShape | None = None
    keeps: ExactPart = ExactPart.NOTHING
    window: int = 0
    num_states: int = 0
    chunked: bool = False
    """Whether the window is a chunk: a query sees back to a multiple of ``window`` tokens."""


PACKED = Kind()
"""Full attention of whatever shape comes."""
EMPTY = Kind(keeps=ExactPart.EMPTY)
ANY = LayerShape(1, 16, 16)
"""Stands for a shape that is not known yet, where a method is asked by a layer's place."""


def packed_shapes(kinds: Sequence[Kind]) -> list[LayerShape]:
    """The shapes of those that are packed, in order."""
    return [kind.shape or ANY for kind in kinds if kind.shape is not None or not kind.keeps]


def packed_methods(method: Method, kinds: Sequence[Kind]) -> list[Method]:
    """What stores each of those that are packed, in order.  Raises ``ValueError`` for a choice by layer beside layers
    that are not packed alike."""
    methods = in_order(method, packed_shapes(kinds))
    check_alike(method, methods, any(kind.keeps or kind.window for kind in kinds))
    return methods


class WindowLayer(DynamicSlidingWindowLayer):  # type: ignore[misc]
    """transformers' window, which keeps the memory of ``min(tokens, window)`` tokens between forwards.

    The stock layer keeps a view of all that a forward brought: after a prompt, the whole prompt.
    """

    _sliding_window_tensor = property(
        lambda self: torch.tensor(self.sliding_window, dtype=torch.long), lambda self, to: None
    )
    """Made where ``DynamicCache``'s data is asked for it: no tensor that lies beside the keys and values."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if self.record_past:  # 5.17 returns all that is recorded, of which its mask knows a window's
            seen = self.sliding_window - 1 + key_states.shape[2]
            return keys[:, :, -seen:], values[:, :, -seen:]
        self._let_go()
        return keys, values

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self._let_go()

    def reset(self) -> None:
        """Forget every token."""
        self.keys = self.values = None
        self.is_initialized, self.cumulative_length = False, 0

    def _let_go(self) -> None:
        """Of the memory of tokens that have left the window.  One more than is kept may stay."""
        for name in ("keys", "values"):
            kept = getattr(self, name)
            a_token = kept[:, :, :1].numel() * kept.element_size()
            if kept.untyped_storage().nbytes() > self.sliding_window * a_token and a_token:
                setattr(self, name, roomed(kept, self.sliding_window))


def roomed(kept: Tensor, window: int) -> Tensor:
    """A window's newest tokens ``[batch_size, num_kv_heads, n, dim]`` in memory of ``window`` tokens where they are one
    less, else of their own."""
    num_tokens = window if kept.shape[2] == window - 1 else kept.shape[2]
    room = kept.new_empty(*kept.shape[:2], num_tokens, kept.shape[3])
    out = room[:, :, num_tokens - kept.shape[2] :]
    out.copy_(kept)
    return out


def made(kind: Kind) -> Any:
    """An empty layer of a kind that packs nothing."""
    if kind.keeps is ExactPart.WINDOW:
        return WindowLayer(kind.window)
    return (
        cache_utils.DummyLayer()
        if kind.keeps is ExactPart.EMPTY
        else LinearAttentionLayer(number_of_states=kind.num_states)
    )


def tensors(layer: Any) -> dict[str, Tensor]:
    """The tensors that a layer keeps as they are, by name: ``keys`` and ``values``, ``conv_states.0`` ..."""
    held: dict[str, Tensor | None] = {}
    if isinstance(layer, WindowLayer):
        held = {"keys": layer.keys, "values": layer.values}
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        for name in ("conv_states", "recurrent_states"):
            held |= {f"{name}.{index}": tensor for index, tensor in getattr(layer, name).items()}
    return {name: tensor for name, tensor in held.items() if tensor is not None}


def check_crop(layer: Any, tokens_to_remove: int) -> None:
    """Raises ``ValueError`` where a window or a state cannot take back ``-tokens_to_remove`` tokens."""
    if not tokens_to_remove:
        return
    if isinstance(layer, WindowLayer) and layer.cumulative_length >= layer.sliding_window and not layer.record_past:
        raise ValueError(
            f"cannot crop: a window of {layer.sliding_window} tokens has let go of those that would come back, "
            "call activate_past_recording() before they come"
        )
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        if any(layer.is_recurrent_states_initialized.values()):
            raise ValueError("cannot crop: a recurrent state does not give back tokens")
        if any(layer.is_conv_states_initialized.values()) and not layer.record_past:
            raise ValueError("cannot crop: a state has let go of them, call activate_past_recording() before they come")


def stop_recording(layer: Any) -> None:
    """Lets go of what a layer recorded so that it could come back, and of the memory that held it."""
    if not getattr(layer, "record_past", False):
        return
    crop(layer, 0)
    layer.record_past = False
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        held = layer.conv_states
        held.update({index: state.clone() for index, state in held.items() if state is not None})


def crop(layer: Any, tokens_to_remove: int) -> None:
    """Takes tokens back after :func:`check_crop`; what was recorded meanwhile is let go."""
    if isinstance(layer, WindowLayer) and layer.is_initialized and (tokens_to_remove or layer.record_past):
        layer.crop(tokens_to_remove)
    is_state = isinstance(layer, LinearAttentionCacheLayerMixin) and layer.record_past
    if is_state and all(layer.is_conv_states_initialized.values()):
        LinearAttentionCacheLayerMixin.crop(layer, tokens_to_remove)
