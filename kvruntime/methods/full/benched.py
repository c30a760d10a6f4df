"""What the benchmarks time of the uncompressed layer: the attention of the engine's step."""

from __future__ import annotations

import torch
from torch import Tensor

from kvruntime.methods.full.cache import FullLayer


def scratch(layer: FullLayer, num_q_heads: int) -> Tensor:
    """Each row's tokens, int32: what the kernel is told of how many it attends to."""
    return torch.tensor(layer.row_lengths, dtype=torch.int32, device=layer.device)


def attend(layer: FullLayer, query: Tensor, scale: float, scratch: Tensor) -> Tensor:
    """The engine's kernel over what ``layer`` stores."""
    from kvruntime.methods.full import decode

    stored = decode.Stored(layer.tensors["key"], layer.tensors["value"], scratch)
    return decode.attend(query, stored, scale, num_tokens=layer.num_provided)
