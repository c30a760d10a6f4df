"""The engines by name: one table row an engine, one file each.

A *method* says which bytes a token needs; an *engine* says which bytes are taken for them: blocks and pages
rounded up, windows that hold more than their width, buffers grown in steps, and what lies beside weights and cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from kvsim.engines.ideal import Ideal
from kvsim.engines.kvruntime import Kvruntime
from kvsim.engines.llama_cpp import LlamaCpp
from kvsim.engines.transformers import Transformers
from kvsim.engines.vllm import Vllm
from kvsim.layout import Method

if TYPE_CHECKING:
    from kvsim.hardware import Hardware
    from kvsim.models.model import Model


@runtime_checkable
class Engine(Protocol):
    """What an engine takes for a cache.  Implementations are frozen dataclasses, one file each here."""

    @property
    def name(self) -> str:
        """Short name for tables: ``ideal``, ``vllm``."""

    def parts(self, model: Model, method: Method, batch_size: int, num_tokens: int) -> dict[str, int]:
        """Bytes that the engine takes for ``batch_size`` sequences of ``num_tokens`` tokens, by purpose.

        Constant-size state stands under names that start with ``state_``; whatever the engine adds by rounding
        and padding under names of its own.  Never falls as the batch or the context grows.  Raises ``ValueError``
        where the engine does not have the method, or not for such a model.
        """

    def overhead(self, model: Model, hardware: Hardware) -> dict[str, int]:
        """Estimated bytes beside weights and cache on one card, by name (workspaces, graphs, the runtime itself).

        An engine that has some also has ``overhead_band``: name -> (low, high) over the estimate.
        """

    def notes(self, model: Model, method: Method) -> tuple[str, ...]:
        """Why its bytes differ from ``ideal`` for this model and method, a line each."""


ENGINES: dict[str, Callable[..., Engine]] = {
    "ideal": Ideal,
    "transformers": Transformers,
    "vllm": Vllm,
    "llama.cpp": LlamaCpp,
    "kvruntime": Kvruntime,
}
"""Name -> factory; keyword arguments are the engine's own fields."""


def make_engine(name: str, **options: Any) -> Engine:
    """The named engine with its options.

    Raises ``LookupError`` for an unknown name and ``ValueError`` for an option that the engine does not have.
    """
    if name not in ENGINES:
        near = get_close_matches(name, ENGINES, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise LookupError(f"unknown engine {name!r}: {hint}allowed are {', '.join(ENGINES)}")
    wrong = sorted(options.keys() - engine_fields(name))
    if wrong:
        allowed = ", ".join(sorted(engine_fields(name))) or "none"
        raise ValueError(f"engine {name!r} does not take {', '.join(wrong)}: allowed are {allowed}")
    return ENGINES[name](**options)


def engine_fields(name: str) -> frozenset[str]:
    """The options that a named engine takes."""
    factory = ENGINES[name]
    return frozenset(field.name for field in fields(factory)) if is_dataclass(factory) else frozenset()


__all__ = [
    "ENGINES",
    "Engine",
    "Ideal",
    "Kvruntime",
    "LlamaCpp",
    "Transformers",
    "Vllm",
    "engine_fields",
    "make_engine",
]
