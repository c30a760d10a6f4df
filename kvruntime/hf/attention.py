"""How a model attends through the cache: one attention function and one mask function in transformers' interfaces.

Given plain tensors (another cache, or none) both are the stock ``sdpa`` ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from kvruntime.hf.cache import CacheLayer, Length, Pending
from kvruntime.hf.compiled import StepLength

NAME = "kvruntime"
"""Holds none of the words and signs by which transformers recognizes flash, sdpa, flex, paged or hub kernels."""

REFUSED = ("softcap", "s_aux", "position_bias", "head_mask", "sliding_window", "output_attentions")
"""Keyword arguments that would change the scores or ask for them."""


def attach(model: Any) -> None:
    """Lets ``model`` attend through a kvruntime cache; raises ``ValueError`` where transformers does not allow it."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
    if model.config._attn_implementation != NAME:
        model.set_attn_implementation(NAME)
    if model.config.get_text_config(decoder=True)._attn_implementation != NAME:
        raise ValueError(f"{type(model).__name__} is not supported: its attention implementation cannot be set")


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor | Pending,
    value: Tensor | Pending,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """``query [batch_size, num_q_heads, L, key_dim]`` -> ``(out [batch_size, L, num_q_heads, value_dim], None)``.

    The first tokens attend to each other as stock sdpa does it, then are stored.  One later token is stored and
    attends to all that is; several attend to the stored ones and to each other, then are stored.
    """
    if not (isinstance(key, Pending) and isinstance(value, Pending)):
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out, None
    _refuse(module, query, dropout, kwargs)
    layer, fresh_key, fresh_value = key.layer, key.fresh, value.fresh
    if key.steps is not None:
        if attention_mask is not None and attention_mask.shape[3] > 1:
            shape = list(attention_mask.shape)
            raise ValueError(f"attention mask of shape {shape}: a compiled cache's step takes a 2-D one or none")
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        return layer.step(query, fresh_key, fresh_value, scale, key.steps).transpose(1, 2), None
    run = _uncompiled if torch.compiler.is_compiling() else _attend
    return run(module, layer, query, fresh_key, fresh_value, attention_mask, scaling), None


def _attend(
    module: torch.nn.Module,
    layer: CacheLayer,
    query: Tensor,
    fresh_key: Tensor,
    fresh_value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
) -> Tensor:
    """:func:`attention` as the host plans it."""
    length = query.shape[2]
    lengths = layer.read_mask(attention_mask, length)
    if not layer.num_columns:
        out, _ = sdpa_attention_forward(module, query, fresh_key, fresh_value, attention_mask, scaling=scaling)
        order = layer.order(attention_mask)
        layer.append_first(_ordered(fresh_key, order), _ordered(fresh_value, order), lengths)
        return out
    if layer.held is not None:
        layer.held.store()  # a model that runs a layer twice reads what it stored
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    if length == 1:
        layer.append(fresh_key, fresh_value, lengths)
        out = layer.store.attend(query, scale)
    else:
        order = layer.order(attention_mask)
        query, fresh_key, fresh_value = (_ordered(x, order) for x in (query, fresh_key, fresh_value))
        out = layer.store.attend(query, scale, (fresh_key, fresh_value, lengths))
        layer.append(fresh_key, fresh_value, lengths)
        out = _ordered(out, None if order is None else order.argsort(1))
    return out.transpose(1, 2).contiguous()


_uncompiled = torch.compiler.disable(_attend)


def _ordered(x: Tensor, order: Tensor | None) -> Tensor:
    """``x [batch_size, heads, L, dim]``, each row's L in the order ``[batch_size or 1, L]``; None as they are."""
    return x if order is None else x.take_along_dim(order[:, None, :, None], 2)


def _refuse(module: torch.nn.Module, query: Tensor, dropout: float, kwargs: dict[str, Any]) -> None:
    for name in REFUSED:
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise ValueError(f"{type(module).__name__} attends with {name}, which a kvruntime cache does not support")
    if kwargs.get("is_causal", getattr(module, "is_causal", True)) is False:
        raise ValueError(f"{type(module).__name__} attends without a causal mask: a kvruntime cache cannot")
    if dropout:
        raise ValueError(f"attention dropout {dropout}: a kvruntime cache is for inference, call model.eval()")
    if query.requires_grad:
        raise ValueError("a kvruntime cache keeps no gradients: run the model under torch.no_grad()")


def mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Stock ``sdpa_mask``; but for one token on a kvruntime cache it never waits for the device to skip the mask."""
    length = kwargs.get("kv_length")
    if isinstance(length, StepLength):
        return length.counts.mask(kwargs.get("attention_mask"))
    if isinstance(length, Length) and kwargs.get("q_length") == 1:
        if kwargs.get("attention_mask") is None:
            return None
        kwargs["allow_is_causal_skip"] = False
    return sdpa_mask(*args, **kwargs)
