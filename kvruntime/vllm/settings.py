"""The plugin's options, and what it refuses at start, in one line each.  Imports no vLLM."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from kvruntime import paged
from kvsim.layout import LayerShape, Method
from kvsim.methods import make_method
from kvsim.methods.defaults import COMPRESSED

NAME = "kvruntime"
CACHE_DTYPES: dict[str, dict[str, Any]] = {
    f"{method}{nbits}": {"method": method, "nbits": nbits}
    for method, widths in ((COMPRESSED, (2, 4)), ("turboquant", (3, 4)))
    for nbits in widths
}
"""``--kv-cache-dtype`` by these names, where vLLM takes names from outside (0.33 on): the method's options."""
DRAFTS = ("ngram", "ngram_gpu", "suffix")
"""Speculative methods without a model, whose drafts bring no layers of their own."""


def method_of(additional_config: Any, dtype: str, cache_dtype: str = "auto") -> Method:
    """The method that ``--additional-config`` or ``--kv-cache-dtype`` names, with exact tokens, if any, in ``dtype``.

    Raises ``ValueError`` where they name none, two, one that is not known, or one that does not fit pages.
    """
    given = additional_config.get(NAME) if isinstance(additional_config, Mapping) else None
    named = CACHE_DTYPES.get(cache_dtype)
    if named is not None and (given is None or isinstance(given, Mapping)):
        options = dict(given or {})
        other = {name: options[name] for name in named if options.get(name, named[name]) != named[name]}
        if other:
            raise ValueError(f"{NAME}: --kv-cache-dtype {cache_dtype} is {named}, the additional config says {other}")
        given = named | options
    if not isinstance(given, Mapping) or not isinstance(given.get("method"), str):
        raise ValueError(
            "attention backend CUSTOM is kvruntime's: give --additional-config "
            f'\'{{"{NAME}": {{"method": "{COMPRESSED}", "nbits": 2}}}}\''
        )
    options = dict(given)
    for key in options:
        if not isinstance(key, str):
            raise ValueError(f"{NAME}: option {key!r:.40}: allowed are names of options")
    name = options.pop("method")
    try:
        method = make_method(name, **options)
    except (LookupError, ValueError) as error:
        raise ValueError(f"{NAME}: {error.args[0]}") from None
    if options.get("dtype", dtype) != dtype:
        raise ValueError(f"{NAME}: dtype {options['dtype']!r} of exact tokens, allowed is the model's {dtype!r}")
    paged.check(method)
    return with_dtype(method, dtype)


def with_dtype(method: Method, dtype: str) -> Method:
    """``method`` with exact tokens in ``dtype``; one that keeps none as it is."""
    if not hasattr(method, "dtype"):
        return method
    made: Method = replace(method, dtype=dtype)  # type: ignore[call-arg, type-var]
    return made


def refuse(config: Any) -> None:
    """Raises ``ValueError`` for what an engine's configuration (``VllmConfig``) asks and the plugin does not do."""
    cache, scheduler, parallel = config.cache_config, config.scheduler_config, config.parallel_config
    drafts = getattr(config.speculative_config, "method", None)
    no_windows = scheduler.disable_hybrid_kv_cache_manager
    found = {
        f"--kv-cache-dtype {cache.cache_dtype}": cache.cache_dtype not in ("auto", *CACHE_DTYPES),
        "disable_hybrid_kv_cache_manager, which a connector may switch on: exact tokens would stay": no_windows,
        "a KV connector": getattr(config, "kv_transfer_config", None) is not None,
        "context parallelism": parallel.decode_context_parallel_size > 1
        or getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        f"speculative decoding by {drafts!r}, allowed are {', '.join(DRAFTS)}": drafts is not None
        and drafts not in DRAFTS,
        "a hybrid model of attention and states": bool(getattr(config.model_config, "is_hybrid", False)),
        "an encoder-decoder model": bool(getattr(config.model_config, "is_encoder_decoder", False)),
    }
    for what, is_asked in found.items():
        if is_asked:
            raise ValueError(f"{NAME}: not in vLLM with {what}")


def refuse_layer(**asked: Any) -> None:
    """Raises ``ValueError`` for what a layer's attention asks and the kernels do not do."""
    for what, value in asked.items():
        if value:
            raise ValueError(f"{NAME}: not in vLLM with a layer's {what.replace('_', ' ')} {value!r:.40}")


def check_block_size(method: Method, layer: LayerShape, block_size: int) -> paged.PageShape:
    """The layer's pages.  Raises ``ValueError`` for another block than a record."""
    shape = paged.page_shape(method, layer)
    if not shape.record_tokens:
        raise ValueError(f"{NAME}: {method.name} in vLLM: its tokens are exact, another attention backend has it")
    if block_size != shape.record_tokens:
        raise ValueError(
            f"{NAME}: --block-size {block_size}, allowed is {shape.record_tokens}, the tokens of a {method.name} record"
        )
    return shape


def check_pages(shapes: Iterable[paged.PageShape]) -> int:
    """Bytes of a page, of all layers' records.  Raises ``ValueError`` where no layer packs, or they differ."""
    found = sorted({shape.record_nbytes for shape in shapes})
    if len(found) != 1:
        what = f"records of {found[0]:,} to {found[-1]:,} bytes" if found else "sliding windows alone"
        raise ValueError(f"{NAME}: a model of {what} in vLLM: allowed are layers whose records are of one size")
    return found[0]
