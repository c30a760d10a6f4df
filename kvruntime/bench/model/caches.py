"""Who takes part: one name, one way to make an empty cache, the same harness for all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from kvsim.layout import Method


@contextmanager
def plain_attention(model: Any) -> Iterator[None]:
    """The model with PyTorch's own attention, whatever a cache had set; put back afterwards."""
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@dataclass(frozen=True)
class Contender:
    """``build(model, max_seq_len)`` gives an empty cache; ``around(model)`` holds while it is used.

    ``method`` is kvsim's object where there is one, so that a prediction can stand beside the measurement.
    ``weighed(model, max_seq_len)`` gives the one whose memory is measured, where that is another.
    """

    name: str
    build: Callable[[Any, int], Any]
    method: Method | None = None
    package: str = "kvruntime"
    around: Callable[[Any], AbstractContextManager[None]] = lambda model: nullcontext()
    weighed: Callable[[Any, int], Any] | None = None


def ours(method: Method) -> Contender:
    """kvruntime's own cache under ``method``; weighed without the graph of a step, which has tensors of its own."""

    def build(model: Any, max_seq_len: int, compiled: bool | None = None) -> Any:
        from kvruntime import make_cache

        return make_cache(model, method, max_seq_len=max_seq_len, compiled=compiled)

    return Contender(method.name, build, method, weighed=partial(build, compiled=False))


def stock() -> Contender:
    """transformers' own uncompressed ``DynamicCache``, in the model's dtype."""

    def build(model: Any, max_seq_len: int) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=model.config)

    return Contender("transformers-dynamic", build, None, "transformers", plain_attention)
