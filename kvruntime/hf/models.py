"""Which models run: everything else is refused by the name of what stands in the way."""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kvsim.layout import LayerShape

REFUSED_KEYS = {
    "kv_lora_rank": "multi-head latent attention",
    "attn_logit_softcapping": "soft-capped attention scores",
    "is_encoder_decoder": "an encoder-decoder",
    "add_cross_attention": "cross-attention",
    "alibi": "ALiBi position biases",
    "num_kv_shared_layers": "layers that share another's cache",
    "attention_chunk_size": "chunked attention",
}
"""Config keys that, when set, change what a layer caches or how it attends."""


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
    _refuse_layer_kinds(name, config)
    if any(hasattr(module, "sinks") for module in model.modules()):
        raise ValueError(f"{name} is not supported: attention sinks (parameter sinks)")
    if not (model._supports_attention_backend and model._supports_sdpa):
        raise ValueError(f"{name} is not supported: it does not go through transformers' attention interface")
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    _refuse_sharding(model, name, heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return [LayerShape(heads, head_dim, head_dim)] * config.num_hidden_layers


def _refuse_layer_kinds(name: str, config: Any) -> None:
    for kind in getattr(config, "layer_types", None) or ():
        if kind != "full_attention":
            raise ValueError(f"{name} is not supported: layers of kind {kind} (config key layer_types)")
    if not getattr(config, "layer_types", None) and getattr(config, "sliding_window", None):
        window = config.sliding_window
        raise ValueError(f"{name} is not supported: sliding windows (config key sliding_window = {window})")
    stock = [type(layer) for layer in DynamicCache(config=config).layers]
    others = sorted({kind.__name__ for kind in stock if kind is not DynamicLayer})
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
