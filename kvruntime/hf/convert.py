"""A cache that stock ``generate()`` filled, packed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import cache_utils

from kvruntime.hf import exact
from kvruntime.hf.cache import Cache, CacheLayer
from kvruntime.hf.empty import attend_through, empty_cache, host_planned
from kvruntime.hf.exact import EMPTY, ExactPart, Kind
from kvruntime.hf.models import layer_kinds, method_given, refuse_scores
from kvruntime.hf.padding import padding_spans
from kvruntime.methods import check_runs
from kvsim.layout import LayerShape, Method
from kvsim.methods.defaults import COMPRESSED


def compress(
    cache: Any,
    method: str | Method = COMPRESSED,
    *,
    model: Any = None,
    attention_mask: Tensor | None = None,
    max_seq_len: int | None = None,
    **options: object,
) -> Cache:
    """A kvruntime cache with the tokens of ``cache``, a ``DynamicCache`` or ``StaticCache`` that a model filled.

    Full attention is packed, windows and states are copied.  ``method``, ``max_seq_len`` and ``options`` as
    :func:`kvruntime.make_cache` takes them; ``dtype`` is that of the keys.  ``model``: lets it attend to what is
    packed, as ``make_cache`` does; without it a model reads the tokens back whole.  A model with multi-head latent
    attention that ``make_cache`` was given before needs it.
    ``attention_mask [batch_size, columns]``: which columns hold a token; padding is not stored.  ``cache`` stays.

    Raises ``ValueError`` for a cache of another kind, an empty one, or a mask of another shape.
    """
    layers = list(getattr(cache, "layers", ()))
    if isinstance(cache, Cache) or not isinstance(cache, cache_utils.Cache) or not layers:
        raise ValueError(
            f"compress({type(cache).__name__}): allowed is a DynamicCache or StaticCache that holds tokens"
        )
    kinds = [_kind(layer) for layer in layers]
    held = [layer for layer, kind in zip(layers, kinds, strict=True) if kind.shape is not None]
    if not held:
        raise ValueError("compress: none of the cache's layers is full attention that holds tokens")
    num_columns, dtype = int(held[0].get_seq_length()), held[0].keys.dtype
    if any(int(layer.get_seq_length()) != num_columns for layer in held):
        raise ValueError("compress: the cache's layers hold unlike numbers of tokens")
    method = method_given(method, options, dtype)
    check_runs(method)
    if model is not None:
        own = layer_kinds(model)
        wanted = [bool(kind.shape) for kind in own]
        if wanted != [bool(kind.shape) for kind in kinds]:
            raise ValueError(f"the cache is not one of {type(model).__name__}: its layers are of other kinds")
        refuse_scores(model, method)
        for index, theirs in enumerate(own):
            shape = theirs.shape if theirs.shape and theirs.shape.kind != "full" else kinds[index].shape
            kinds[index] = replace(kinds[index], chunked=theirs.chunked, shape=shape)
        out = empty_cache(model, method, kinds, max_seq_len)
        attend_through(out, model)
    else:
        out = host_planned(method, kinds, max_seq_len)
    lengths, order = _placed(attention_mask, held[0].keys.shape[0], num_columns, out)
    for ours, theirs in zip(out.layers, layers, strict=True):
        if isinstance(ours, CacheLayer):
            _fill(ours, theirs, num_columns, lengths, order)
        if not isinstance(ours, CacheLayer) or isinstance(ours, cache_utils.LinearAttentionLayer):
            _copy(ours, theirs)
    return out


def _kind(layer: Any) -> Kind:
    """What a stock layer becomes.  Raises ``ValueError`` for one that is not known to hold plain keys and values."""
    kind = type(layer)
    if kind in (cache_utils.DynamicLayer, cache_utils.StaticLayer):
        return Kind(shape=_shape(layer))
    if kind in (cache_utils.DynamicSlidingWindowLayer, exact.WindowLayer):
        return Kind(keeps=ExactPart.WINDOW, window=int(layer.sliding_window))
    if kind is cache_utils.LinearAttentionLayer:
        return Kind(keeps=ExactPart.STATES, num_states=layer.number_of_states)
    if kind is cache_utils.LinearAttentionAndFullAttentionLayer:
        return Kind(shape=_shape(layer), keeps=ExactPart.STATES, num_states=layer.number_of_states)
    if kind.__name__ == "DummyLayer":
        return EMPTY
    raise ValueError(f"compress: layers of kind {kind.__name__} are not read")


def _shape(layer: Any) -> LayerShape:
    if layer.keys is None or not int(layer.get_seq_length()):
        raise ValueError("compress: the cache holds no tokens")
    return LayerShape(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3])


def _placed(
    mask: Tensor | None, batch_size: int, num_columns: int, cache: Cache
) -> tuple[list[int] | None, Tensor | None]:
    """Each row's tokens, and the columns' order with padding first; None where all are tokens."""
    cache.columns.padding = [[] for _ in range(batch_size)]
    if mask is None or bool(mask.all()):
        return None, None
    if mask.shape != (batch_size, num_columns):
        raise ValueError(f"attention mask of shape {list(mask.shape)}: allowed is [{batch_size}, {num_columns}]")
    real = mask.bool()
    cache.columns.padding = [padding_spans(row, 0) for row in real.tolist()]
    return real.sum(1).tolist(), real.int().argsort(dim=1, stable=True)


def _fill(ours: CacheLayer, theirs: Any, num_columns: int, lengths: list[int] | None, order: Tensor | None) -> None:
    key, value = (x[:, :, :num_columns] for x in (theirs.keys, theirs.values))
    if order is not None:
        key, value = (x.take_along_dim(order.to(x.device)[:, None, :, None], 2) for x in (key, value))
    CacheLayer.lazy_initialization(ours, key, value)
    ours.dtype = key.dtype
    ours.append(key, value, lengths)


def _copy(ours: Any, theirs: Any) -> None:
    """A window or a state."""
    names = ("cumulative_length", "is_initialized", "device", "dtype", "record_past")
    states = (
        *("conv_states", "recurrent_states", "is_conv_states_initialized", "is_recurrent_states_initialized"),
        *("has_previous_state", "conv_kernel_size"),
    )
    for name in states if isinstance(ours, cache_utils.LinearAttentionLayer) else names:
        if hasattr(theirs, name):
            value = getattr(theirs, name)
            value = {at: _cloned(each) for at, each in value.items()} if isinstance(value, dict) else _cloned(value)
            setattr(ours, name, value)
    if isinstance(ours, cache_utils.LinearAttentionLayer):
        ours.device = theirs.device
    elif isinstance(ours, exact.WindowLayer) and theirs.is_initialized:
        ours.keys, ours.values = (exact.roomed(x, ours.sliding_window) for x in (theirs.keys, theirs.values))


def _cloned(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
