"""Quantized and read back at once, in plain PyTorch: what error a quantizer makes, with nothing packed."""

from __future__ import annotations

import torch
from torch import Tensor

CHANNEL, TOKEN = "channel", "token"
"""The axis along which a group lies in order of tokens: ``group_size`` tokens of a channel, or channels of a token."""


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
