"""Caches on disk: plain tensors, numbers and text, which are read without running any code of the file."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils

from kvruntime.hf import exact
from kvruntime.hf.cache import Cache, CacheLayer
from kvruntime.hf.empty import attend_through, empty_cache, host_planned
from kvruntime.hf.models import layer_kinds, refuse_scores
from kvruntime.methods import check_runs, respelled, spelled
from kvsim.atomic import replace_file
from kvsim.engines.kvruntime import stored_shape
from kvsim.layout import LayerShape, nbytes

FORMAT = "kvruntime cache"
VERSION = 2


def save_cache(cache: Cache, path: str | Path) -> None:
    """Writes ``cache`` to a file that :func:`load_cache` reads, and ``torch.load(path, weights_only=True)``: a plain
    dict of tensors, numbers and text.

    Raises ``ValueError`` for a cache that holds no tokens, or one whose last forward ended half-way, and a path that
    cannot be written; a file that was there is then as it was.
    """
    if not isinstance(cache, Cache):
        raise ValueError(f"save_cache({type(cache).__name__}): allowed is a cache that make_cache made")
    cache.forward.check(cache.layers)
    if not cache.get_seq_length():
        raise ValueError("save_cache: the cache holds no tokens")
    state = {
        "format": FORMAT,
        "version": VERSION,
        "method": spelled(cache.method),
        "max_seq_len": cache.max_seq_len,
        "padding": [[[span.start, span.stop] for span in row] for row in cache.columns.padding],
        "layers": [_written(layer) for layer in cache.layers],
    }
    replace_file(path, lambda file: torch.save(state, file))


def load_cache(path: str | Path, model: Any) -> Cache:
    """The cache that :func:`save_cache` wrote, for ``model``, which attends through it as after ``make_cache``.

    Its tensors go where the model's layers lie.  No code of the file is run.  Raises ``ValueError`` for a file of
    another kind or version, one that is damaged, and a cache that is not one of ``model``; ``OSError`` for none.
    """
    state = _read(path)
    try:
        cache = _rebuilt(state, path, model)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(f"{path} is a damaged cache ({_first_line(error)})") from None
    attend_through(cache, model)
    return cache


def _first_line(error: Exception) -> str:
    """Of what was raised, its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _read(path: str | Path) -> dict[str, Any]:
    """The file's contents, each held to its checksum, which ``torch.load`` does not look at."""
    try:
        with zipfile.ZipFile(path) as archive:
            if (bad := archive.testzip()) is not None:
                raise ValueError(f"{bad} is not what was written")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of zip, pickle and torch, whatever the bytes make them stumble over
        raise ValueError(f"{path} is no cache that kvruntime saved, or a damaged one ({_first_line(error)})") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} is no cache that kvruntime saved")
    if state.get("version") != VERSION:
        raise ValueError(f"{path} is a saved cache of version {state.get('version')}: this kvruntime reads {VERSION}")
    return state


def _rebuilt(state: dict[str, Any], path: str | Path, model: Any) -> Cache:
    kinds = layer_kinds(model)
    method = respelled(state["method"])
    check_runs(method)
    cache = host_planned(method, kinds, state["max_seq_len"])
    own = [(isinstance(layer, CacheLayer), _kept(layer)) for layer in cache.layers]
    if own != [(layer["packed"] is not None, layer["kept"]) for layer in state["layers"]]:
        raise ValueError(f"{path} is not a cache of {type(model).__name__}: its layers are of other kinds")
    refuse_scores(model, method)
    cache = empty_cache(model, method, kinds, state["max_seq_len"])
    cache.columns.padding = [[range(*span) for span in row] for row in state["padding"]]
    for layer, written, device in zip(cache.layers, state["layers"], devices(model, len(cache.layers)), strict=True):
        if isinstance(layer, CacheLayer):
            _take_packed(layer, written["packed"], device)
            _check_lengths(cache, layer, path)
        _take_kept(layer, written["tensors"], written["numbers"], device)
    cache.forward.check(cache.layers)
    return cache


def _check_lengths(cache: Cache, layer: CacheLayer, path: str | Path) -> None:
    """Raises ``ValueError`` where a layer's rows are not as long as its columns without padding."""
    store, padding = layer.store, cache.columns.padding
    lengths = cache.columns.row_lengths(layer.num_columns) if padding else [layer.num_columns] * store.batch_size
    held = store.row_lengths
    fit = len(held) == store.batch_size and 0 <= min(held) <= max(held) <= store.num_provided
    if not fit or store.seq_lengths != lengths:
        rows = f"rows of {lengths!s:.80} tokens by its padding, {store.seq_lengths!s:.80} by a layer"
        raise ValueError(f"{path} is a damaged cache: {rows}")


def _written(layer: Any) -> dict[str, Any]:
    packed = None
    if isinstance(layer, CacheLayer):
        if not layer.is_initialized or layer.shape is None:
            raise ValueError("save_cache: a layer of the cache holds no tokens")
        layer.settle()
        packed = {
            "shape": _numbers(layer.shape),
            "batch_size": layer.store.batch_size,
            "num_columns": layer.num_columns,
            "num_q_heads": layer.num_q_heads,
            "dtype": str(layer.dtype).removeprefix("torch."),
            "num_provided": layer.store.num_provided,
            "books": layer.store.books(),
            "tensors": {name: tensor.cpu() for name, tensor in layer.store.tensors.items()},
        }
    tensors = {name: tensor.contiguous().cpu() for name, tensor in exact.tensors(layer).items()}
    numbers = {"cumulative_length": layer.cumulative_length} if isinstance(layer, exact.WindowLayer) else {}
    return {"packed": packed, "kept": _kept(layer), "tensors": tensors, "numbers": numbers}


def _kept(layer: Any) -> str:
    """What a layer keeps as it is, in a word, with its size."""
    if isinstance(layer, exact.WindowLayer):
        return f"window {layer.sliding_window}"
    return f"states {layer.number_of_states}" if isinstance(layer, cache_utils.LinearAttentionLayer) else ""


def _take_packed(layer: CacheLayer, written: dict[str, Any], device: torch.device) -> None:
    shape = LayerShape(*written["shape"])
    buffers = layer.method.buffers(stored_shape(layer.method, shape), written["batch_size"], written["num_provided"])
    size = sum(tensor.nbytes for tensor in written["tensors"].values())
    if size != nbytes(buffers):  # before memory is asked for
        raise ValueError(f"the file's tensors of a layer are {size:,} B, its method says {nbytes(buffers):,}")
    with torch.inference_mode(False):
        layer.make_store(shape, written["batch_size"], device)
        store = layer.store
        store.provide(written["num_provided"])
        found = {name: (list(x.shape), x.dtype) for name, x in written["tensors"].items()}
        wanted = {name: (list(x.shape), x.dtype) for name, x in store.tensors.items()}
        if found != wanted:
            raise ValueError(f"the file's tensors of a layer are {found}, its method says {wanted}")
        for name, tensor in written["tensors"].items():
            store.tensors[name].copy_(tensor)
        store.take_books(written["books"])
    layer.num_columns, layer.num_q_heads = written["num_columns"], written["num_q_heads"]
    layer.dtype = getattr(torch, written["dtype"])


def _take_kept(layer: Any, tensors: dict[str, Tensor], numbers: dict[str, int], device: torch.device) -> None:
    if isinstance(layer, exact.WindowLayer):
        window = layer.sliding_window
        layer.lazy_initialization(tensors["keys"].to(device), tensors["values"].to(device))
        layer.keys, layer.values = (exact.roomed(tensors[name].to(device), window) for name in ("keys", "values"))
        layer.cumulative_length = numbers["cumulative_length"]
    if isinstance(layer, cache_utils.LinearAttentionLayer):
        for name, tensor in tensors.items():
            what, _, index = name.rpartition(".")
            conv = what == "conv_states"
            given = {what: tensor.to(device)}
            cache_utils.LinearAttentionLayer.lazy_initialization(layer, state_idx=int(index), **given)
            getattr(layer, what)[int(index)].copy_(tensor)
            layer.has_previous_state[int(index)] = True
            layer.device = device if conv or layer.device is None else layer.device


def devices(model: Any, num_layers: int) -> Iterator[torch.device]:
    """Where each layer of the model lies."""
    found = getattr(model, "hf_device_map", None) or {}
    layers = {
        int(name.rpartition(".")[2]): device for name, device in found.items() if name.rpartition(".")[2].isdigit()
    }
    for index in range(num_layers):
        device = layers.get(index, model.device)
        yield torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


def _numbers(shape: LayerShape) -> list[int]:
    return [shape.num_kv_heads, shape.key_dim, shape.value_dim]
