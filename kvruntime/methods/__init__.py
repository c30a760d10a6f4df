"""Which layer object runs which method: one row a method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from kvruntime.methods.full.cache import Fresh, FullLayer
from kvruntime.methods.kivi.cache import KiviLayer
from kvsim.engines.kvruntime import check_runs
from kvsim.layout import LayerShape, Method
from kvsim.methods import Full, Kivi


class Layer(Protocol):
    """One attention layer's cache: what ``method.buffers(shape, batch_size, num_provided)`` lists, filled and read."""

    shape: LayerShape
    batch_size: int
    device: torch.device
    row_lengths: list[int]
    """Tokens held, row by row."""
    num_provided: int
    """Tokens a row that the buffers provide for now."""
    tensors: dict[str, Tensor]

    @property
    def nbytes(self) -> int: ...
    @property
    def is_croppable(self) -> bool: ...
    def append(self, key: Tensor, value: Tensor, lengths: list[int] | None = None) -> None: ...
    @staticmethod
    def append_all(held: Sequence[Any]) -> None: ...
    def attend(self, query: Tensor, scale: float, fresh: Fresh | None = None) -> Tensor: ...
    def step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        positions: Tensor,
        ticket: Tensor,
        num_tokens: int,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor: ...
    def catch_up(self, positions: Tensor) -> None: ...
    def tokens(self, row: int) -> tuple[Tensor, Tensor]: ...
    def reset(self) -> None: ...
    def reorder(self, index: Tensor) -> None: ...
    def crop(self, num_tokens: int) -> None: ...


LAYERS: dict[type, Callable[..., Layer]] = {Full: FullLayer, Kivi: KiviLayer}


def make_layer(
    method: Method, shape: LayerShape, batch_size: int, max_seq_len: int | None, device: torch.device
) -> Layer:
    """The layer object of ``method``; raises ``ValueError`` where nothing runs it yet or it cannot hold ``shape``."""
    check_runs(method)
    return LAYERS[type(method)](method, shape, batch_size, max_seq_len, device)
