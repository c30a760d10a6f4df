"""Models whose keys carry large biases (Qwen2, Qwen2.5), which few bits hold badly: one line where it matters."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, TypeGuard
from weakref import WeakSet

import torch

from kvsim.engines.kvruntime import stored_shape
from kvsim.layout import LayerShape, Method, nbytes

LARGE = 10.0
"""Times the spread of a layer's keys: a bias from here on is large."""
LONG = 1 << 16
UNCOMPRESSED_BITS = 16

_JUDGED: WeakSet[Any] = WeakSet()


def warn_of_biases(model: Any, method: Method, shapes: Sequence[LayerShape]) -> None:
    """Warns, once a model, where ``method`` compresses keys of ``shapes`` and some layers' have large biases."""
    if model in _JUDGED or not _compresses(method, shapes):
        return
    _JUDGED.add(model)
    found = {index: ratio for index, ratio in enumerate(key_bias_ratios(model)) if ratio >= LARGE}
    if found:
        layers = f"layer{'s' if len(found) > 1 else ''} "
        layers += ", ".join(map(str, list(found)[:6])) + (", ..." if len(found) > 6 else "")
        most = f"{max(found.values()):,.0f}"
        warnings.warn(
            f"{type(model).__name__}: keys of {layers} have biases of up to {most} times their spread, which "
            "few bits hold badly: `kvruntime doctor` says what it costs",
            UserWarning,
            stacklevel=3,
        )


def key_bias_ratios(model: Any) -> list[float]:
    """Of each layer with a ``k_proj``, in order: its largest bias over the median spread of its key channels.

    The spread is that of keys of independent inputs of root mean square 1 after the layer's norm: the length of a row
    of the projection times the norm's weights.  0 without a bias; read from the weights alone.
    """
    modules = dict(model.named_modules())
    ratios: list[torch.Tensor | None] = []
    for name, module in modules.items():
        if name.rpartition(".")[2] != "k_proj":
            continue
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if not (_plain(bias, 1) and _plain(weight, 2)):
            ratios.append(None)
            continue
        norm = getattr(modules.get(name.rpartition(".")[0].rpartition(".")[0]), "input_layernorm", None)
        gain = getattr(norm, "weight", None)
        with torch.no_grad():
            rows = weight.float()
            if _plain(gain, 1) and gain.shape == rows.shape[1:]:
                rows = rows * gain.float()
            spread = rows.norm(dim=1).median().clamp(min=torch.finfo(torch.float32).tiny)
            ratios.append(bias.detach().float().abs().max() / spread)
    there = [ratio for ratio in ratios if ratio is not None]
    values = iter(torch.stack([ratio.cpu() for ratio in there]).tolist() if there else [])
    return [0.0 if ratio is None else next(values) for ratio in ratios]


def _plain(tensor: Any, num_dims: int) -> TypeGuard[torch.Tensor]:
    """Whether it is an ordinary tensor of numbers that lie somewhere: no shard, no packed weight, no placeholder."""
    if not isinstance(tensor, torch.Tensor) or type(tensor.data) is not torch.Tensor:
        return False
    return tensor.dim() == num_dims and tensor.is_floating_point() and not tensor.is_meta


def _compresses(method: Method, shapes: Sequence[LayerShape]) -> bool:
    """Whether the innermost method holds keys in fewer bits than a plain 16-bit cache."""
    while getattr(method, "inner", None) is not None:
        method = method.inner  # type: ignore[attr-defined]
    shape = stored_shape(method, shapes[0])
    plain = shape.num_kv_heads * (shape.key_dim + shape.value_dim) * LONG * UNCOMPRESSED_BITS
    return 8 * nbytes(method.buffers(shape, 1, LONG)) < plain
