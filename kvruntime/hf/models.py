"""Which models run, and what each of their layers keeps: everything else is refused by the name of what stands in
the way.

Full attention is packed, and long windows where a model has nothing else.  Other windows and states stay in
transformers' own kinds of layers (:mod:`kvruntime.hf.exact`).
"""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import replace
from typing import Any

from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from kvruntime.hf import latents
from kvruntime.hf.exact import EMPTY, ExactPart, Kind
from kvruntime.hf.handed_on import touched
from kvruntime.methods import changes_scores, holds_latents
from kvsim.engines.kvruntime import LONG_WINDOW, latent_names
from kvsim.layout import LayerShape, Method
from kvsim.methods import METHODS, in_order, make_method
from kvsim.specs import parse_method

REFUSED_KEYS = {
    "is_encoder_decoder": "an encoder-decoder",
    "add_cross_attention": "cross-attention",
    "cross_attention_layers": "cross-attention",
    "alibi": "ALiBi position biases",
    "num_kv_shared_layers": "layers that share another's cache",
}
"""Config keys that, when set, change what a layer caches or how it attends."""

SOFTCAP = "attn_logit_softcapping"
"""The config key of soft-capped attention scores."""

CROSS = re.compile(r"cross_?att|encoder_?att", re.IGNORECASE)
"""Names of cross-attention's modules and classes."""

NAMES = {"window": "sliding or chunked windows", "states": "linear-attention or state-space layers"}
"""What layers that stay as they are are called."""


def layer_kinds(model: Any) -> list[Kind]:
    """What each layer of ``model`` keeps, read from its text config.

    Raises ``ValueError``, naming the reason, for a model with layers of another kind, with none that could be packed,
    or that does not attend through transformers' attention interface to what the cache gives.
    """
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        raise ValueError(f"{name} is not supported: an encoder-decoder (config key is_encoder_decoder)")
    for key, meaning in REFUSED_KEYS.items():
        if getattr(config, key, None):
            raise ValueError(f"{name} is not supported: {meaning} (config key {key} = {getattr(config, key)})")
    if getattr(config, "kv_lora_rank", None) and (why := latents.unsupported(model, config)):
        raise ValueError(f"{name} is not supported: {why}")
    _refuse_encoder(model, name)
    _refuse_cross_attention(model, name, config)
    _refuse_other_sinks(model, name)
    kinds = _long_windows(_kinds(name, config), config)
    interface = model._supports_attention_backend or model._is_stateful
    if not (interface and model._can_set_attn_implementation()):
        raise ValueError(f"{name} is not supported: it does not go through transformers' attention interface")
    if found := touched(model):
        raise ValueError(f"{name} is not supported: {found}")
    if not any(kind.shape for kind in kinds):
        held = sorted({NAMES[kind.keeps] for kind in kinds if kind.keeps in NAMES})
        slides = any(kind.window for kind in kinds) and not getattr(config, "attention_chunk_size", None)
        short = f" of fewer than {LONG_WINDOW:,} tokens" if slides else ""
        raise ValueError(f"{name} is not supported: nothing to pack, its layers are {' and '.join(held)} only{short}")
    _refuse_sharding(model, name, next(kind.shape for kind in kinds if kind.shape).num_kv_heads)
    return kinds


def config_shapes(name: str, config: Any) -> list[LayerShape]:
    """What one token leaves in each packed layer, from the transformers ``config`` of the model called ``name`` alone.

    Raises ``ValueError`` for layers that are cached in another way; :func:`layer_kinds` sees to what else is refused.
    """
    return [kind.shape for kind in _kinds(name, config.get_text_config(decoder=True)) if kind.shape]


def layer_shapes(model: Any) -> list[LayerShape]:
    """What one token leaves in each layer of ``model``, of tensor parallel's ranks in this one.

    Raises ``ValueError``, naming the reason, for a model whose layers are not all plain full attention behind
    transformers' attention interface.
    """
    name, kinds = type(model).__name__, layer_kinds(model)
    for kind in kinds:
        if kind.shape and kind.shape.kind == latents.KIND:
            raise ValueError(f"{name} is not supported here: multi-head latent attention")
        if kind.keeps or kind.window:
            kept = kind.keeps or ExactPart.WINDOW
            raise ValueError(f"{name} is not supported here: {NAMES.get(kept, 'layers without a cache')}")
    changed = changed_scores(model)
    if changed:
        raise ValueError(f"{name} is not supported here: {changed}")
    ranks = tensor_ranks(model)
    return [replace(kind.shape, num_kv_heads=kind.shape.num_kv_heads // ranks) for kind in kinds if kind.shape]


def method_given(method: str | Method, options: dict[str, object], dtype: Any) -> Method:
    """``method`` itself, or the one of that name with ``options`` for its fields, or of that spec (``kivi:nbits=4``);
    exact tokens in ``dtype``.

    Raises ``LookupError`` for an unknown name, and ``ValueError`` for an option that it does not take.
    """
    if isinstance(method, str) and ":" in method:
        if options:
            raise ValueError(
                f"options {', '.join(sorted(options))}: allowed with a method's name only, not with a spec"
            )
        return parse_method(method, {}, str(dtype).removeprefix("torch."))
    if isinstance(method, str):
        if method in METHODS and "dtype" in inspect.signature(METHODS[method]).parameters:
            options = {"dtype": str(dtype).removeprefix("torch."), **options}
        return make_method(method, **options)
    if options:
        raise ValueError(f"options {', '.join(sorted(options))}: allowed with a method's name only, not with an object")
    return method


def tensor_ranks(model: Any) -> int:
    """Ranks among which transformers has split the heads of each layer of ``model``."""
    return getattr(model, "tp_size", None) or 1


def refuse_stages(model: Any) -> None:
    """Raises ``ValueError`` where ``model`` is one stage of a pipeline."""
    if getattr(model, "_pp_stage", None) is not None:
        raise ValueError(
            f"{type(model).__name__} is split into pipeline stages: the engine takes whole models, generate() these too"
        )


def changed_scores(model: Any) -> str:
    """What ``model`` does to attention scores besides scaling them, in words; empty where nothing."""
    config = model.config.get_text_config(decoder=True)
    if getattr(config, SOFTCAP, None):
        return f"soft-capped attention scores (config key {SOFTCAP} = {getattr(config, SOFTCAP)})"
    return "attention sinks (parameter sinks)" if any(hasattr(x, "sinks") for x in model.modules()) else ""


def refuse_scores(model: Any, method: Method) -> None:
    """Raises ``ValueError`` where ``method`` does not attend as ``model`` does on its device."""
    config = model.config.get_text_config(decoder=True)
    rank = getattr(config, "kv_lora_rank", None)
    chosen = in_order(method, [latents.shape(config)] * config.num_hidden_layers) if rank else []
    if not all(holds_latents(one, model.device) for one in chosen):
        raise ValueError(
            f"{type(model).__name__} is not supported: multi-head latent attention (config key kv_lora_rank = {rank}), "
            f"whose latents {method.name} does not hold on {model.device.type}: allowed are {', '.join(latent_names())}"
        )
    changed = changed_scores(model)
    if changed and not changes_scores(method, model.device):
        name, device = type(model).__name__, model.device.type
        raise ValueError(f"{name} has {changed}, which {method.name} does not run on {device}")


def window_applies(window: int | None, config: Any) -> bool:
    """Whether a token may ever lie out of ``window``: one no shorter than the positions is full attention."""
    positions = getattr(config, "max_position_embeddings", None)
    return bool(window) and not (positions and window >= positions)


def _kinds(name: str, config: Any) -> list[Kind]:
    """Each layer's kind, from the layer that transformers' own cache has for it."""
    stock = DynamicCache(config=config).layers
    if len(stock) != config.num_hidden_layers:
        raise ValueError(f"{name} is not supported: {len(stock)} of {config.num_hidden_layers} layers have a cache")
    if DynamicLayer in map(type, stock) and not hasattr(config, "num_attention_heads"):
        raise ValueError(f"{name} is not supported: it has no attention (no config key num_attention_heads)")
    kinds, each = [], list(getattr(config, "per_layer_config", None) or [config] * len(stock))
    for layer, config in zip(stock, each, strict=True):
        if type(layer) is DynamicLayer:
            kinds.append(Kind(shape=_shape(config)))
        elif type(layer) is DynamicSlidingWindowLayer:
            window = int(layer.sliding_window)
            if window_applies(window, config):
                chunked = getattr(config, "attention_chunk_size", None) == window
                kinds.append(Kind(keeps=ExactPart.WINDOW, window=window, chunked=chunked))
            else:
                kinds.append(Kind(shape=_shape(config)))
        elif type(layer) is LinearAttentionLayer:
            kinds.append(Kind(keeps=ExactPart.STATES, num_states=layer.number_of_states))
        elif type(layer) is LinearAttentionAndFullAttentionLayer:
            kinds.append(Kind(shape=_shape(config), keeps=ExactPart.STATES, num_states=layer.number_of_states))
        elif type(layer).__name__ == "DummyLayer":
            kinds.append(EMPTY)
        else:
            kind = type(layer).__name__
            raise ValueError(f"{name} is not supported: transformers caches some of its layers in a {kind}")
    return kinds


def _long_windows(kinds: list[Kind], config: Any) -> list[Kind]:
    """Windows that are packed, where a model has no other layers and they are long; chunks are no windows."""
    windows = {kind.window for kind in kinds}
    if {kind.keeps for kind in kinds} != {ExactPart.WINDOW} or len(windows) > 1 or min(windows) < LONG_WINDOW:
        return kinds
    if getattr(config, "attention_chunk_size", None):
        return kinds
    return [Kind(shape=_shape(config), window=kind.window) for kind in kinds]


def _shape(config: Any) -> LayerShape:
    """Of a full-attention layer, as the config says it: what a layer really brings is checked when it comes."""
    if getattr(config, "kv_lora_rank", None):
        return latents.shape(config)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    head_dim = getattr(config, "global_head_dim", None) or head_dim
    return LayerShape(heads, head_dim, getattr(config, "v_head_dim", None) or head_dim)


def _refuse_encoder(model: Any, name: str) -> None:
    """A model of which no layer attends causally; the vision tower of one that does may.  And one whose past is no
    cache of transformers' own."""
    code = sys.modules[type(model).__module__]
    own = [each for each in vars(code).values() if isinstance(each, type) and each.__module__ == code.__name__]
    if caches := [each.__name__ for each in own if issubclass(each, DynamicCache)]:
        raise ValueError(f"{name} is not supported: it takes a cache of its own alone, {caches[0]}")
    causal = [module.is_causal for module in model.modules() if isinstance(getattr(module, "is_causal", None), bool)]
    if causal and not any(causal):
        raise ValueError(f"{name} is not supported: an encoder, whose layers attend without a causal mask")


def _refuse_cross_attention(model: Any, name: str, config: Any) -> None:
    """By the names of modules, where no config key says it; what a vision tower or its adapter does is not cached."""
    for decoder in model.modules():
        if not (isinstance(decoder, PreTrainedModel) and isinstance(decoder.config, type(config))):
            continue
        for path, module in decoder.named_modules():
            if CROSS.search(path.rpartition(".")[2]) or CROSS.search(type(module).__name__):
                raise ValueError(f"{name} is not supported: cross-attention (module {path})")


def _refuse_other_sinks(model: Any, name: str) -> None:
    """Sinks that are not given to the attention function as transformers' models give them."""
    for module in model.modules():
        if hasattr(module, "sinks") and "s_aux" not in inspect.getsource(type(module)):
            raise ValueError(f"{name} is not supported: attention sinks that {type(module).__name__} applies itself")


def _refuse_sharding(model: Any, name: str, num_kv_heads: int) -> None:
    """transformers does not shard a model without a plan, silently, and fails obscurely on indivisible heads."""
    ranks = tensor_ranks(model)
    if ranks > 1 and not model.supports_tp_plan:
        raise ValueError(f"{name} is not supported with tp_size {ranks}: it has no tensor-parallel plan")
    if num_kv_heads % ranks:
        raise ValueError(f"{name} is not supported with tp_size {ranks}: it does not divide {num_kv_heads} kv heads")
