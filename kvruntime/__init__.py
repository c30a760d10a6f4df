"""kvruntime: the cache that kvsim weighs, running under unmodified transformers.

``make_cache(model, "kivi", nbits=2)`` gives what ``model.generate(..., past_key_values=cache)`` takes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvruntime.hf import Cache, make_cache

__all__ = ["Cache", "make_cache"]


def __getattr__(name: str) -> object:
    """``make_cache`` and ``Cache`` on first use: transformers is slow to import."""
    if name in __all__:
        from kvruntime import hf

        return getattr(hf, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
