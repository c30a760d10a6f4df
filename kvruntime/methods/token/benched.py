"""What benchmarks call of tokens that are coded one by one.  No layout is timed unless it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from kvruntime.methods.token.cache import TokenLayer


def packs(method: Any, num_tokens: int) -> bool:
    """Every token is coded at once."""
    return num_tokens > 0


def scratch(layer: TokenLayer, num_q_heads: int) -> Tensor:
    """Each row's tokens, int32, on the device."""
    return torch.tensor(layer.row_lengths, dtype=torch.int32, device=layer.device)


def run(layer: TokenLayer, query: Tensor, scale: float, scratch: Tensor, **options: Any) -> Tensor:
    """The kernel over what ``layer`` stores; on a CPU the reference."""
    if layer.device.type != "cuda":
        return layer.attend(query, scale)
    kernels = import_module("kvruntime.methods.token.attention")
    longest = max(layer.row_lengths)
    out: Tensor = kernels.attend(query, layer.stored(scratch), layer.layout, scale, num_tokens=longest, **options)
    return out


def attend(layer: TokenLayer, query: Tensor, scale: float, scratch: Tensor) -> Tensor:
    """``TokenLayer.attend`` with its lengths on the device already."""
    return run(layer, query, scale, scratch)


def portable(layer: TokenLayer, query: Tensor, scale: float, scratch: Tensor) -> Tensor:
    """The kernel without instructions of NVIDIA's."""
    return run(layer, query, scale, scratch, portable=True)


def with_splits(layer: TokenLayer, query: Tensor, scale: float, scratch: Tensor, number: int) -> Tensor:
    """The kernel with another number of splits than it plans."""
    return run(layer, query, scale, scratch, num_splits=number)


def splits(layer: TokenLayer, query: Tensor) -> int:
    """How many ways the kernel splits the tokens, as it plans it."""
    kernels: Any = import_module("kvruntime.methods.token.attention")
    answers: list[int] = []
    real = kernels.plan_splits

    def listening(*given: Any) -> int:
        answers.append(real(*given))
        return answers[-1]

    kernels.plan_splits = listening
    try:
        layer.attend(query, 1.0)
    finally:
        kernels.plan_splits = real
    return answers[-1] if answers else 1


def about(layer: TokenLayer, query: Tensor, plain: bool) -> dict[str, Any]:
    """Which kernel attends, and how it splits the tokens."""
    if layer.device.type == "cpu":
        return {"kernel": "reference"}
    quick = import_module("kvruntime.methods.token.fast_plan").supports(query, layer.stored(), layer.layout, None, None)
    return {"kernel": "portable" if plain else "Gluon" if quick else "Triton", "splits": splits(layer, query)}


def equal_shares(layer: TokenLayer, query: Tensor, scale: float) -> Tensor:
    """Raises ``ValueError``: rows of different lengths have no other plan."""
    raise ValueError("the kernel of tokens coded one by one shares out each row alone")


def packers(layer: TokenLayer, key: Tensor, value: Tensor) -> dict[str, Callable[[], Any]]:
    """Other packers: none."""
    return {}


def room_beside(method: Any) -> int:
    """Tokens a row that a layer provides for besides."""
    return 1


def check_flushes(method: Any, num_tokens: int) -> None:
    """Nothing leaves a ring."""


def rewinder(layer: TokenLayer) -> Callable[[], None]:
    """Puts the layer's lengths back to what they are now."""
    rows = list(layer.row_lengths)

    def rewind() -> None:
        layer.row_lengths = list(rows)

    return rewind


def storer(layer: TokenLayer, num_q_heads: int) -> Callable[..., None]:
    """``store(layer, query, key, value)``: the step's storing kernel alone, without the rotary embedding.

    Raises ``ValueError`` elsewhere than on CUDA.
    """
    if layer.device.type != "cuda":
        raise ValueError("the step's kernel runs on CUDA only")
    kernel = import_module("kvruntime.methods.token.store").step
    lengths = scratch(layer, num_q_heads)

    def store(layer: TokenLayer, query: Tensor, key: Tensor, value: Tensor) -> None:
        kernel(query, key, value, layer.stored(lengths), layer.layout, lengths)

    return store


def filling(method: Any) -> int:
    """Tokens that compile every kernel of the layer."""
    return 64
