"""Prefixes in files under transformers: a prompt's beginning is computed once, and later caches begin behind it."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from kvruntime.hf.cache import Cache
from kvruntime.hf.empty import attend_through, empty_cache
from kvruntime.hf.models import layer_kinds, layer_shapes, method_given, refuse_scores, refuse_stages, tensor_ranks
from kvruntime.hf.saved import devices
from kvruntime.methods import room_of
from kvruntime.prefix_store import LayerPrefix, PrefixStore
from kvsim.engines.kvruntime import stored_shape
from kvsim.layout import Method
from kvsim.methods.defaults import COMPRESSED

SAMPLED = 64
"""Numbers of each parameter that tell a model's weights from others'."""


def open_prefixes(folder: str | Path, model: Any, method: str | Method = COMPRESSED, **options: object) -> PrefixStore:
    """A store of ``model``'s prefixes in ``folder``; ``method`` and ``options`` as ``make_cache`` takes them.

    Raises ``ValueError`` for a method that does not fit pages, and for a model whose layers are not all plain full
    attention on one rank.
    """
    method = method_given(method, options, model.dtype)
    refuse_stages(model)
    if tensor_ranks(model) > 1:
        raise ValueError(
            f"{type(model).__name__} is split over {tensor_ranks(model)} ranks: prefixes are of whole models"
        )
    shapes = layer_shapes(model)
    if any(stored_shape(method, shape) != shape for shape in shapes):
        raise ValueError(f"heads of {shapes[0].key_dim}: allowed are those that {method.name} packs as they are")
    refuse_scores(model, method)
    return PrefixStore(folder, method, shapes, name_of(model))


def put_prefix(store: PrefixStore, cache: Any, tokens: Sequence[int], row: int = 0) -> Path:
    """Keeps what ``row`` of ``cache`` holds, which is exactly ``tokens``: the cache right after a prompt.

    Raises ``ValueError`` for a cache of another method, one that holds another number of tokens, and a row with
    padding, whose keys may have been turned for other positions.
    """
    if not isinstance(cache, Cache) or cache.method != store.method:
        held = cache.method.name if isinstance(cache, Cache) else type(cache).__name__
        raise ValueError(f"a cache of {held} for a store of {store.method.name}")
    cache.forward.check(cache.layers)
    if any(cache.columns.padding[row : row + 1]):
        raise ValueError(
            f"row {row} of the cache has padding: allowed are rows whose first token is their first column"
        )
    layers, used = [], [layer for layer in cache.layers if layer.is_initialized]
    for layer in used:  # all, before one may be refused: their books agree
        layer.settle()
    for layer in cache.layers:
        count = layer.store.row_lengths[row] if layer.is_initialized else 0
        if count != len(tokens):
            raise ValueError(f"row {row} of the cache holds {count:,} tokens: allowed are the {len(tokens):,} given")
        layers.append(LayerPrefix(*room_of(store.method).paged.read_row(layer.store, row)))
    return store.put(tokens, layers)


def get_prefix(store: PrefixStore, model: Any, tokens: Sequence[int], batch_size: int = 1) -> Cache | None:
    """A cache for ``model`` whose ``batch_size`` rows hold the longest stored prefix of ``tokens``, or None.

    It leaves one token to compute, so ``model.generate(ids, cache=cache)`` goes on behind it.  It attends as
    after ``make_cache``.  Raises ``ValueError`` for a model that the store is not of, and a file that is damaged.
    """
    if name_of(model) != store.model:
        raise ValueError(f"a store of prefixes of another model than this {type(model).__name__}: {store.folder}")
    found = store.get(tokens)
    if found is None:
        return None
    cache = empty_cache(model, store.method, layer_kinds(model), None)
    placed = zip(cache.layers, found.layers, store.shapes, devices(model, len(store.shapes)), strict=True)
    for layer, held, shape, device in placed:
        with torch.inference_mode(False), torch.no_grad():
            layer.make_store(shape, batch_size, device)
            own = (None if x is None else x.to(device) for x in held)
            room_of(store.method).paged.write_rows(layer.store, found.num_tokens, *own)
        layer.num_columns, layer.dtype = found.num_tokens, model.dtype
        layer.num_q_heads = model.config.get_text_config(decoder=True).num_attention_heads
    cache.columns.all_tokens(batch_size)
    attend_through(cache, model)
    return cache


def name_of(model: Any) -> str:
    """A model's class and a hash of its config and of the first numbers of each parameter."""
    seen = sha256(model.config.get_text_config(decoder=True).to_json_string().encode())
    for name, parameter in model.named_parameters():
        some = parameter.detach().flatten()[:SAMPLED].contiguous().view(torch.uint8).cpu()
        seen.update(f"{name} {tuple(parameter.shape)}".encode() + some.numpy().tobytes())
    return f"{type(model).__name__}-{seen.hexdigest()[:32]}"
