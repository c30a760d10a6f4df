"""kvruntime: the cache that kvsim weighs, running under unmodified transformers.

``make_cache(model, "kivi-boost")`` gives what ``model.generate(..., cache=cache)`` takes (``past_key_values`` before
transformers 5.24); ``compress`` packs what stock ``generate()`` filled; ``save_cache`` and ``load_cache`` keep it;
``open_prefixes``, ``put_prefix`` and ``get_prefix`` keep what many prompts begin with;
``Engine(model, "kivi", batch_size=1, max_seq_len=4096)`` decodes without transformers' loop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvruntime.engine import Engine
    from kvruntime.hf import (
        Cache,
        compress,
        get_prefix,
        load_cache,
        make_cache,
        open_prefixes,
        put_prefix,
        restore,
        save_cache,
    )

__all__ = [
    "Cache",
    "Engine",
    "compress",
    "get_prefix",
    "load_cache",
    "make_cache",
    "open_prefixes",
    "put_prefix",
    "restore",
    "save_cache",
]


def __getattr__(name: str) -> object:
    """All of ``__all__`` on first use: transformers is slow to import."""
    if name == "Engine":
        from kvruntime.engine import Engine

        return Engine
    if name in __all__:
        from kvruntime import hf

        return getattr(hf, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
