"""The engines by name: one table row an engine, one file each.

A *method* says which bytes a token needs; an *engine* says which bytes are taken for them: blocks and pages
rounded up, windows that hold more than their width, buffers grown in steps, and what lies beside weights and cache.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from kvsim.engines.engine import Engine, Pool
from kvsim.engines.ideal import Ideal
from kvsim.engines.kvruntime import Kvruntime
from kvsim.engines.llama_cpp import LlamaCpp
from kvsim.engines.sglang import Sglang
from kvsim.engines.transformers import Transformers
from kvsim.engines.trtllm import Trtllm
from kvsim.engines.vllm import Vllm
from kvsim.nearest import hint

if TYPE_CHECKING:
    from kvsim.hardware import Hardware

ENGINES: dict[str, type[Engine]] = {
    "ideal": Ideal,
    "transformers": Transformers,
    "vllm": Vllm,
    "sglang": Sglang,
    "trtllm": Trtllm,
    "llama.cpp": LlamaCpp,
    "kvruntime": Kvruntime,
}
"""Name -> class; keyword arguments are the engine's own fields."""

IDEAL: Engine = Ideal()


def make_engine(name: str, **options: Any) -> Engine:
    """The named engine with its options.

    Raises ``LookupError`` for an unknown name and ``ValueError`` for an option that the engine does not have.
    """
    check_engine(name)
    wrong = sorted(options.keys() - engine_fields(name))
    if wrong:
        allowed = ", ".join(sorted(engine_fields(name))) or "none"
        raise ValueError(f"engine {name!r} does not take {', '.join(wrong)}: allowed are {allowed}")
    return ENGINES[name](**options)


def check_engine(name: str) -> None:
    """Raises ``LookupError``, with the nearest names, for an engine that is not known."""
    if name not in ENGINES:
        meant = hint(name, ENGINES, cutoff=0.4)
        raise LookupError(f"unknown engine {name!r}: {meant}allowed are {', '.join(ENGINES)}")


def engine_fields(name: str) -> dict[str, str]:
    """The options that a named engine takes -> the type of each: ``int``, ``float``, ``bool`` or ``str``."""
    own = fields(ENGINES[name])  # type: ignore[arg-type]  # every engine is a dataclass
    return {each.name: each.type if isinstance(each.type, str) else each.type.__name__ for each in own}


def label(name: str) -> str:
    """A named engine in a sentence: ``vLLM``."""
    return ENGINES[name].label or name


def owner(flag: str) -> str:
    """The engine that an option of the command line chooses (:attr:`Engine.own_flags`).  Raises ``LookupError``."""
    for name, kind in ENGINES.items():
        if flag in kind.own_flags:
            return name
    raise LookupError(f"no engine has --{flag.replace('_', '-')} for itself")


def own_flags() -> tuple[str, ...]:
    """The options of the command line that choose an engine."""
    return tuple(flag for kind in ENGINES.values() for flag in kind.own_flags)


@dataclass(frozen=True)
class EngineChoice:
    """An engine and the options given for it, before it is known on which card it serves.

    Raises ``LookupError`` for an unknown name and ``ValueError`` for an option that the engine does not have.
    """

    name: str = "ideal"
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        make_engine(self.name, **dict(self.options))

    def on(self, card: Hardware | None, num_cards: int = 1) -> Engine:
        """The engine as it serves on ``num_cards`` of ``card``: its defaults there, and the options given."""
        defaults = ENGINES[self.name].on(card, num_cards)
        return make_engine(self.name, **defaults | dict(self.options))


__all__ = [
    "ENGINES",
    "IDEAL",
    "Engine",
    "EngineChoice",
    "Ideal",
    "Kvruntime",
    "LlamaCpp",
    "Pool",
    "Sglang",
    "Transformers",
    "Trtllm",
    "Vllm",
    "check_engine",
    "engine_fields",
    "label",
    "make_engine",
    "own_flags",
    "owner",
]
