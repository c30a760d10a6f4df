"""Models with multi-head latent attention (DeepSeek, Kimi, GLM): how they attend to packed latents without expanding
them.

transformers' classes give a cache the latents and the rotary keys, then expand all that it gives back to every head's
keys and values (``expand_kv``).  With a kvruntime cache ``expand_kv`` hands its arguments on, and the attention
function takes the expansion into the query and the output instead: ``kv_b_proj`` is a matrix a head for keys and one
for values, ``q (W_k c) = (q W_k) c`` and ``sum p (W_v c) = W_v (sum p c)``.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kvruntime.hf.cache import CacheLayer, PendingUpdate, filled
from kvsim.layout import LayerShape

KIND = "mla"
"""The kind of a latent's shape: keys are latents, values the rotary keys beside them."""


class LatentExpansion:
    """A module's ``expand_kv``: what a kvruntime cache gave is handed on, all else expanded.

    Raises ``ValueError`` for a cache that takes latents for the keys and values of one head.
    """

    def __init__(self, original: Any) -> None:
        self.original = original

    def __call__(self, latent: Any, rope: Any) -> Any:
        if isinstance(latent, PendingUpdate):
            if latent.layer.kind != KIND:
                raise ValueError(
                    "the cache was made without the model and takes its latents for plain keys and values: "
                    "give compress() model="
                )
            return latent, rope
        return self.original(latent, rope)


def modules(model: Any) -> Iterator[Any]:
    """The attention modules of ``model`` that expand latents."""
    return (module for module in model.modules() if hasattr(module, "expand_kv") and hasattr(module, "kv_b_proj"))


def attach(model: Any) -> None:
    """Lets ``model``'s attention be given latents."""
    for module in modules(model):
        if not isinstance(module.__dict__.get("expand_kv"), LatentExpansion):
            module.expand_kv = LatentExpansion(module.expand_kv)


def let_go(module: Any) -> None:
    """Takes back what :func:`attach` did to a module."""
    if isinstance(module.__dict__.get("expand_kv"), LatentExpansion):
        del module.expand_kv


def shape(config: Any) -> LayerShape:
    """What a token leaves in a layer: a latent, and a rotary key beside it."""
    return LayerShape(1, config.kv_lora_rank, config.qk_rope_head_dim, kind=KIND)


def unsupported(model: Any, config: Any) -> str:
    """Why the latents of ``model`` cannot be packed, in words; empty where they can."""
    found = list(modules(model))
    said = f"multi-head latent attention (config key kv_lora_rank = {config.kv_lora_rank})"
    if not found or not getattr(config, "qk_rope_head_dim", 0):
        return f"{said} of another make"
    if getattr(model, "tp_size", None):
        return f"{said} among tensor-parallel ranks"
    for module in found:
        if "expand_kv(" not in inspect.getsource(type(module).forward):
            return f"{said} whose forward does not expand what the cache gives"
        weight = module.kv_b_proj.weight
        if not (type(module.kv_b_proj) is torch.nn.Linear and weight.dtype.itemsize > 1 and weight.is_floating_point()):
            return (
                f"{said} with kv_b_proj in {type(module.kv_b_proj).__name__} of {weight.dtype}, allowed are plain ones"
            )
    return ""


def expanded(module: Any, latent: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of every head, as the model itself makes them: for a prompt, whose tokens see only each other."""
    key, value = module.expand_kv(latent, rope)
    return key, value


def absorbed(module: Any, query: Tensor, layer: CacheLayer) -> Tensor:
    """``query [batch_size, num_q_heads, L, nope + rope]`` to ``[..., rank + rope]``, as the layer stores them."""
    assert layer.shape is not None
    rope, stored = layer.shape.value_dim, layer.store.shape
    plain, rotary = query[..., : query.shape[3] - rope], query[..., query.shape[3] - rope :]
    latent = plain @ _weights(module, layer)[:, : plain.shape[3]]
    return torch.cat([filled(latent, stored.key_dim), filled(rotary, stored.value_dim)], -1)


def projected(module: Any, out: Tensor, layer: CacheLayer, num_plain: int) -> Tensor:
    """Sums of latents ``[batch_size, num_q_heads, L, rank]`` to ``[..., value_dim]``; ``num_plain``: of a query's
    channels those without rotary embedding."""
    assert layer.shape is not None
    return out[..., : layer.shape.key_dim] @ _weights(module, layer)[:, num_plain:].transpose(1, 2)


def _weights(module: Any, layer: CacheLayer) -> Tensor:
    """``[num_q_heads, nope + value_dim, rank]``."""
    assert layer.shape is not None
    weight: Tensor = module.kv_b_proj.weight
    return weight.view(layer.num_q_heads, -1, layer.shape.key_dim)
