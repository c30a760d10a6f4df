"""kvruntime, this project's own runtime: the method's buffers as they are, provided for in blocks of 256 tokens.

Without a known final length every layer's buffers provide for ``256 * ceil(n / 256)`` tokens a row
(kvruntime/methods/rows.py); with ``max_seq_len`` they are allocated for it once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvsim.engines.engine import Engine
from kvsim.engines.ideal import Ideal
from kvsim.layout import Method
from kvsim.methods import METHODS, placed
from kvsim.whole_numbers import check_whole

if TYPE_CHECKING:
    from kvsim.models.model import Model

GROW_TOKENS = 256
MOST = (1 << 31) - 1
"""The largest count that an option of a method takes here: kernels count in 32 bits."""


def stored(method: object) -> bool:
    """Whether kvruntime has a room for ``method``, and for the one inside it where there is one."""
    inner = getattr(method, "inner", None)
    return bool(getattr(method, "kvruntime", False)) and (inner is None or stored(inner))


def check_runs(method: object) -> None:
    """Raises ``ValueError`` for what is no method, one that kvruntime has no room for, a count beyond ``MOST``, or what
    the method's own ``check_runs`` refuses."""
    if not stored(method):
        name = getattr(method, "name", repr(method))
        raise ValueError(f"kvruntime does not run the method {name}: allowed are {', '.join(names())}")
    for name, value in vars(method).items():
        if isinstance(value, int) and value > MOST:
            raise ValueError(f"{name.replace('_', ' ')} {value}: allowed are at most {MOST:,}")
    own = getattr(method, "check_runs", None)
    if own is not None:
        own()


def names() -> list[str]:
    """The names of the methods that kvruntime stores."""
    return [name for name, make in METHODS.items() if stored(make())]


@dataclass(frozen=True)
class Kvruntime(Engine):
    """``max_seq_len``: tokens a row to allocate for at once; 0 grows in blocks of 256."""

    max_seq_len: int = 0

    def __post_init__(self) -> None:
        check_whole("max_seq_len", self.max_seq_len, least=0)

    @property
    def name(self) -> str:
        return "kvruntime"

    def provided(self, num_tokens: int) -> int:
        """Tokens a row that the buffers provide for.  Raises ``ValueError`` beyond ``max_seq_len``."""
        if not self.max_seq_len:
            return -(-num_tokens // GROW_TOKENS) * GROW_TOKENS
        if num_tokens > self.max_seq_len:
            raise ValueError(f"kvruntime: {num_tokens:,} tokens do not fit max_seq_len {self.max_seq_len:,}")
        return self.max_seq_len

    def parts(self, model: Model, method: Method, batch_size: int, num_tokens: int) -> dict[str, int]:
        if model.state_layers or model.index_layers:
            raise ValueError("kvruntime runs models of full-attention layers only: this one has states or index keys")
        for layer, chosen in placed(method, model.cache_layers):
            check_runs(chosen)
            if layer.window is not None or not layer.value_dim or layer.stride > 1:
                raise ValueError(f"kvruntime holds full-attention layers only, not {layer.kind} ones")
        exact = Ideal().parts(model, method, batch_size, num_tokens)
        provided = Ideal().parts(model, method, batch_size, self.provided(num_tokens))
        return exact | {"padding": sum(provided.values()) - sum(exact.values())}

    def notes(self, model: Model, method: Method) -> tuple[str, ...]:
        if self.max_seq_len:
            return (f"allocated for {self.max_seq_len:,} tokens a row at once",)
        return (f"grows in blocks of {GROW_TOKENS} tokens a row",)
