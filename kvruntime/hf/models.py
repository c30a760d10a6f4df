"""Which models run: everything else is refused by the name of what stands in the way."""

from __future__ import annotations

import re
from typing import Any

from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvsim.layout import LayerShape

REFUSED_KEYS = {
    "kv_lora_rank": "multi-head latent attention",
    "attn_logit_softcapping": "soft-capped attention scores",
    "is_encoder_decoder": "an encoder-decoder",
    "add_cross_attention": "cross-attention",
    "cross_attention_layers": "cross-attention",
    "alibi": "ALiBi position biases",
    "num_kv_shared_layers": "layers that share another's cache",
}
"""Config keys that, when set, change what a layer caches or how it attends."""

WINDOWS = {
    "sliding_window": ("sliding windows", "sliding_attention"),
    "attention_chunk_size": ("chunked attention", "chunked_attention"),
}
"""Config keys of windows: what they are called, and the kind of layer in ``layer_types`` that has one."""

CROSS = re.compile(r"cross_?att|encoder_?att", re.IGNORECASE)
"""Names of cross-attention's modules and classes."""


def layer_shapes(model: Any) -> list[LayerShape]:
    """What one token leaves in each layer of ``model``, read from its text config.

    Raises ``ValueError``, naming the reason, for a model whose layers are not all plain full attention behind
    transformers' attention interface.
    """
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        raise ValueError(f"{name} is not supported: an encoder-decoder (config key is_encoder_decoder)")
    for key, meaning in REFUSED_KEYS.items():
        if getattr(config, key, None):
            raise ValueError(f"{name} is not supported: {meaning} (config key {key} = {getattr(config, key)})")
    _refuse_cross_attention(model, name, config)
    _refuse_layer_kinds(name, config)
    if any(hasattr(module, "sinks") for module in model.modules()):
        raise ValueError(f"{name} is not supported: attention sinks (parameter sinks)")
    if not (model._supports_attention_backend and model._supports_sdpa):
        raise ValueError(f"{name} is not supported: it does not go through transformers' attention interface")
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    _refuse_sharding(model, name, heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return [LayerShape(heads, head_dim, head_dim)] * config.num_hidden_layers


def window_applies(window: int | None, config: Any) -> bool:
    """Whether a token may ever lie out of ``window``: one no shorter than the positions is full attention."""
    positions = getattr(config, "max_position_embeddings", None)
    return bool(window) and not (positions and window >= positions)


def _refuse_cross_attention(model: Any, name: str, config: Any) -> None:
    """By the names of modules, where no config key says it; what a vision tower or its adapter does is not cached."""
    for decoder in model.modules():
        if not (isinstance(decoder, PreTrainedModel) and isinstance(decoder.config, type(config))):
            continue
        for path, module in decoder.named_modules():
            if CROSS.search(path.rpartition(".")[2]) or CROSS.search(type(module).__name__):
                raise ValueError(f"{name} is not supported: cross-attention (module {path})")


def _refuse_layer_kinds(name: str, config: Any) -> None:
    kinds, whole = getattr(config, "layer_types", None), {"full_attention"}
    for key, (meaning, kind) in WINDOWS.items():
        window = getattr(config, key, None)
        if window and not window_applies(window, config):
            whole.add(kind)
        elif window and not kinds:
            raise ValueError(f"{name} is not supported: {meaning} (config key {key} = {window})")
    for kind in kinds or ():
        if kind not in whole:
            raise ValueError(f"{name} is not supported: layers of kind {kind} (config key layer_types)")
    stock = [type(layer) for layer in DynamicCache(config=config).layers]
    windowed = [DynamicSlidingWindowLayer] if len(whole) > 1 else []
    others = sorted({kind.__name__ for kind in stock if kind not in (DynamicLayer, *windowed)})
    if others:
        raise ValueError(f"{name} is not supported: transformers caches some of its layers in a {others[0]}")
    if len(stock) != config.num_hidden_layers:
        raise ValueError(f"{name} is not supported: {len(stock)} of {config.num_hidden_layers} layers have a cache")


def _refuse_sharding(model: Any, name: str, num_kv_heads: int) -> None:
    """transformers does not shard a model without a plan, silently, and fails obscurely on indivisible heads."""
    ranks = getattr(model, "tp_size", None) or 1
    if ranks > 1 and not model.supports_tp_plan:
        raise ValueError(f"{name} is not supported with tp_size {ranks}: it has no tensor-parallel plan")
    if num_kv_heads % ranks:
        raise ValueError(f"{name} is not supported with tp_size {ranks}: it does not divide {num_kv_heads} kv heads")
