"""Plain PyTorch for the parts of a decode step: what the kernels beside it compute, rounding where they round.

Everything sums in float32 where the device does, and rounds to the model's dtype where a stock model does: after the
norm (an RMS norm before its weight, too), after a product and its bias, after the activation, after the residual.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

ACTIVATIONS = ("gelu", "silu")
"""``gelu`` in its tanh form; ``silu`` is gated: the weight holds the gate's rows, then as many of its factor's."""


@dataclass(frozen=True)
class Norm:
    """A layer norm with ``weight [K]`` and ``bias [K]``; an RMS norm where ``bias`` is None."""

    weight: Tensor
    bias: Tensor | None
    eps: float


def check(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm | None, activation: str | None, residual: Tensor | None
) -> int:
    """``N``, the width of what :func:`linear` returns; raises ``ValueError`` for arguments that do not fit together."""
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, not None or one of {', '.join(ACTIVATIONS)}")
    gated = activation == "silu"
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or (gated and weight.shape[0] % 2):
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(weight.shape)} are not [M, K] and [N, K]")
    width = weight.shape[0] // 2 if gated else weight.shape[0]
    sizes = {
        "bias": (bias, weight.shape[:1]),
        "norm.weight": (None if norm is None else norm.weight, x.shape[1:]),
        "norm.bias": (None if norm is None else norm.bias, x.shape[1:]),
        "residual": (residual, (x.shape[0], width)),
    }
    for name, (tensor, shape) in sizes.items():
        if tensor is not None and tensor.shape != torch.Size(shape):
            raise ValueError(f"{name} is {tuple(tensor.shape)}, not {tuple(shape)}")
    for name, (tensor, _) in (sizes | {"x": (x, ()), "weight": (weight, ())}).items():
        if tensor is not None and (not tensor.is_contiguous() or tensor.dtype != weight.dtype):
            raise ValueError(f"{name} is not a contiguous tensor of the weight's dtype, {weight.dtype}")
    return width


def embed(tokens: Tensor, positions: Tensor, table: Tensor, position_table: Tensor | None = None) -> Tensor:
    """Rows of ``table [V, K]``, plus the positions' rows of theirs where there is one -> ``[M, K]``."""
    hidden = table[tokens]
    return hidden if position_table is None else hidden + position_table[positions]


def normalize(x: Tensor, norm: Norm) -> Tensor:
    """``x [M, K]`` -> the same shape and dtype."""
    if norm.bias is not None:
        return functional.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    exact = x.float()
    return norm.weight * (exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + norm.eps)).to(x.dtype)


def add_norm(hidden: Tensor, partial: Tensor, bias: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
    """``hidden [M, K]`` plus a product in parts, ``[S, M, K]`` float32, and its bias -> ``(sum, normalized sum)``."""
    product = partial.sum(0)
    hidden = hidden + (product if bias is None else product + bias).to(hidden.dtype)
    return hidden, normalize(hidden, norm)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``residual + activation(norm(x) @ weight.T + bias)``: the shapes are :func:`kvruntime.engine.linear.linear`'s."""
    check(x, weight, bias, norm, activation, residual)
    out = functional.linear(x if norm is None else normalize(x, norm), weight, bias)
    if activation == "gelu":
        out = functional.gelu(out, approximate="tanh")
    elif activation == "silu":
        gate, factor = out.chunk(2, 1)
        out = functional.silu(gate) * factor
    return out if residual is None else residual + out
