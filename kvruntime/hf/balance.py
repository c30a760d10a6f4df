"""Keys rescaled so that their widest channels are those that matter to the queries; the model computes the same.

Boosted key channels (:mod:`kvsim.methods.kivi`) are the widest of a head.  What a channel's error costs is its range
times what the queries hold there.  Multiplying a key channel by a power of two, and dividing the query channel by it,
changes no score and rounds nothing, and a scale and zero a channel take any factor: the choice alone follows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

MOST = 8
"""Largest exponent of a factor, either way: float16 keys stay far from its ends."""


def balance_keys(model: Any, ids: Tensor) -> int:
    """Rescales the query and key projections of ``model`` in place, by what its queries hold on ``ids`` (int64
    ``[rows, tokens]``); returns how many layers.

    The factors are powers of two, one a key head and pair of channels that the rotary embedding turns together.  Raises
    ``ValueError``, naming the reason, for a model whose projections are not plain linear ones, or that answers
    otherwise afterwards (keys are normed or clipped, channels turn in other pairs): its weights are then as they were.
    """
    layers = list(_layers(model))
    if not layers:
        raise ValueError(f"{type(model).__name__} has no query and key projections (q_proj, k_proj) to balance")
    squares: list[Tensor] = []
    hooks = [
        module.q_proj.register_forward_hook(lambda _, args, out: squares.append(out.float().square().mean((0, 1))))
        for module in layers
    ]
    try:
        before = _logits(model, ids)
    finally:
        for hook in hooks:
            hook.remove()
    exponents = [
        _exponents(square, module.head_dim, module.k_proj.out_features // module.head_dim)
        for module, square in zip(layers, squares, strict=True)
    ]
    _scale(layers, exponents, 1)
    after = _logits(model, ids)
    if not torch.allclose(after, before, rtol=1e-3, atol=1e-3 * before.abs().max().item()):
        _scale(layers, exponents, -1)
        raise ValueError(f"{type(model).__name__} answers otherwise with rescaled keys: nothing was changed")
    return len(layers)


def _logits(model: Any, ids: Tensor) -> Tensor:
    """Of the last token of every row, float32."""
    with torch.inference_mode():
        out: Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits[:, -1].float()
    return out


def _layers(model: Any) -> Iterator[Any]:
    """Attention modules in order."""
    for name, module in model.named_modules():
        if not (hasattr(module, "q_proj") and hasattr(module, "k_proj")):
            continue
        for linear in (module.q_proj, module.k_proj):
            if type(linear) is not torch.nn.Linear or type(linear.weight.data) is not torch.Tensor:
                raise ValueError(f"{type(model).__name__}: {name} has projections that are no plain linear ones")
        if not isinstance(getattr(module, "head_dim", None), int):
            raise ValueError(f"{type(model).__name__}: {name} does not say its heads' channels")
        yield module


def _exponents(square: Tensor, dim: int, num_kv_heads: int) -> Tensor:
    """Powers of two ``[num_kv_heads, dim]`` from the mean squares ``[query heads * dim]`` of queries."""
    heads = square.view(num_kv_heads, -1, dim).mean(1)
    pairs = (heads[:, : dim // 2] + heads[:, dim // 2 :]) / 2
    log = pairs.clamp(min=torch.finfo(torch.float32).tiny).log2() / 2
    exponent = (log - log.median(1, keepdim=True).values).round().clamp(-MOST, MOST)
    return torch.cat([exponent, exponent], 1)


def _scale(layers: list[Any], exponents: list[Tensor], sign: int) -> None:
    """Multiplies keys by the factors and divides queries by them; ``sign`` -1 takes it back."""
    with torch.no_grad():
        for module, exponent in zip(layers, exponents, strict=True):
            groups = module.q_proj.out_features // module.k_proj.out_features
            queries = exponent.repeat_interleave(groups, 0)
            for linear, power in ((module.k_proj, sign * exponent), (module.q_proj, -sign * queries)):
                factors = torch.exp2(power.flatten()).to(linear.weight)
                linear.weight.mul_(factors[:, None])
                if linear.bias is not None:
                    linear.bias.mul_(factors)
