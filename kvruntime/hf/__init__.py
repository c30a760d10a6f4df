"""The caches under unmodified transformers: ``model.generate(..., cache=make_cache(model, "kivi"))``."""

from __future__ import annotations

from typing import Any

from kvruntime.hf.attention import attach, restore
from kvruntime.hf.biases import warn_of_biases
from kvruntime.hf.cache import Cache
from kvruntime.hf.compiled import CompiledCache
from kvruntime.hf.convert import compress
from kvruntime.hf.empty import attend_through, devices_of, empty_cache, without_steps
from kvruntime.hf.exact import packed_methods
from kvruntime.hf.models import changed_scores, layer_kinds, method_given, refuse_scores
from kvruntime.hf.prefixes import get_prefix, open_prefixes, put_prefix
from kvruntime.hf.saved import load_cache, save_cache
from kvruntime.methods import room_of
from kvsim.engines.kvruntime import check_runs, stored_shape
from kvsim.layout import Method
from kvsim.methods.defaults import COMPRESSED
from kvsim.methods.evict import windowed

__all__ = [
    "Cache",
    "compress",
    "get_prefix",
    "load_cache",
    "make_cache",
    "open_prefixes",
    "put_prefix",
    "restore",
    "save_cache",
]


def make_cache(
    model: Any,
    method: str | Method = COMPRESSED,
    *,
    max_seq_len: int | None = None,
    compiled: bool | None = None,
    **options: object,
) -> Cache:
    """A cache for ``model``, which from now on attends through it wherever it is given one (:func:`restore` ends that).

    ``method``: a name, with the method's fields as ``options`` (``nbits=2, group_size=32, residual_length=128``;
    ``dtype``, that of the exact tokens, is the model's unless said otherwise), a spec as commands take it
    (``kivi:nbits=4,group_size=64``), or a kvsim method object.
    ``max_seq_len``: tokens a row to allocate for at once; None grows in blocks of 256.  Batch size and device are
    learnt from the first forward.  With any other cache, or none, the model runs as before.
    ``compiled``: None: where the model lies on one GPU, its decode steps are CUDA graphs of what it runs itself
    (:mod:`kvruntime.hf.graphs`).  False: every step is planned by the host.  True: a cache for ``max_seq_len`` tokens a
    row whose decode step ``torch.compile`` takes whole; on CUDA ``generate()`` compiles it by itself
    (:mod:`kvruntime.hf.compiled`).

    Warns of keys with large biases, once a model (:mod:`kvruntime.hf.biases`).  Raises ``LookupError`` for an unknown
    method, ``ValueError`` for an option or a model that cannot be run right.
    """
    if not hasattr(model, "config"):
        is_named = hasattr(model, "to_dict") or hasattr(model, "parameters")
        what = f"a {type(model).__name__}" if is_named else f"{model!r:.80}"
        raise ValueError(f"model {what}: allowed are loaded transformers models")
    if max_seq_len is not None and not isinstance(max_seq_len, int):
        raise ValueError(f"max_seq_len {max_seq_len!r}: allowed are whole numbers")
    kinds = layer_kinds(model)
    shapes = [kind.shape for kind in kinds if kind.shape is not None]
    if max_seq_len is not None and max_seq_len < 1:
        raise ValueError(f"max_seq_len {max_seq_len}: allowed are 1 and above")
    method = method_given(method, options, model.dtype)
    check_runs(method)
    methods = packed_methods(method, kinds)
    for window in {kind.window for kind in kinds if kind.shape and kind.window}:
        check_runs(windowed(method, window))
    for shape, each in set(zip(shapes, methods, strict=True)):
        each.buffers(stored_shape(each, shape), 1, 1)  # says what it cannot hold before anything runs
    refuse_scores(model, method)
    warn_of_biases(model, method, shapes)
    if not compiled:
        cache = empty_cache(model, method, kinds, max_seq_len, replays=compiled is None)
        attend_through(cache, model)
        return cache
    if without := without_steps(method, kinds) or changed_scores(model):
        name = type(model).__name__
        raise ValueError(f"{name} has {without}, which a compiled cache does not run: leave compiled=True out")
    if len(set(methods)) > 1:
        raise ValueError(f"{method.name} stores layers in unlike ways: leave compiled=True out")
    if not room_of(methods[0]).layer.has_steps:  # type: ignore[attr-defined]
        raise ValueError(f"{method.name} has no step that a compiled cache could run: leave compiled=True out")
    if max_seq_len is None:
        raise ValueError("max_seq_len None: a compiled cache's buffers do not grow, give the tokens a row will hold")
    if len(devices := devices_of(model)) > 1:
        raise ValueError(f"the model lies on {', '.join(devices)}: a compiled cache's steps run on one device")
    attach(model)
    return CompiledCache(method, len(shapes), max_seq_len)
