"""A method's bytes as products of named numbers: what ``kvsim explain`` writes out.

A method states its own in ``formulas`` (:class:`kvsim.layout.Method`), from what it *means*, beside the ``buffers``
that are weighed; a test holds the products of the one to the bytes of the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from kvsim.layout import DTYPE_BITS, Buffer, LayerShape, Method

Factor = tuple[int, str]


@dataclass(frozen=True)
class Formula:
    """One section's bytes: the product of ``factors``, over 8 where the last factor counts bits.

    ``layer`` says which layers, where the model or the method has several kinds; ``apart`` marks bytes beside the
    cache that the method stores (constant state, index keys).
    """

    buffer: str
    section: str
    factors: tuple[Factor, ...]
    per_byte: int = 1
    layer: str = ""
    apart: bool = False

    @property
    def nbytes(self) -> int:
        return prod(number for number, _ in self.factors) // self.per_byte

    @property
    def text(self) -> str:
        """``256 rows x 960 packed x 64 head dim x 2 bits / 8``."""
        product = " x ".join(f"{number:,} {what}" for number, what in self.factors)
        return product + (f" / {self.per_byte}" if self.per_byte > 1 else "")


@dataclass(frozen=True)
class Number:
    """A number of the formulas: its value, and the config key, option or rule that it came from."""

    name: str
    value: int | str
    origin: str


Written = tuple[list[Number], list[Formula]]


def written(method: Method, layer: LayerShape, count: int, batch_size: int, num_tokens: int) -> Written:
    """The numbers and formulas of ``count`` layers alike: the method's own, else the shapes as they are."""
    own = getattr(method, "formulas", None)
    if own is not None:
        out: Written = own(layer, count, batch_size, num_tokens)
        return out
    return [], [
        formula
        for buffer in method.buffers(layer, batch_size, num_tokens)
        for formula in _sections(buffer, ((count, "layers"),))
    ]


def shared(buffers: list[Buffer]) -> list[Formula]:
    """The formulas of tensors that a model's layers share, counted once."""
    return [formula for buffer in buffers for formula in _sections(buffer, ())]


def _sections(buffer: Buffer, leading: tuple[Factor, ...]) -> list[Formula]:
    if buffer.sections:
        return [Formula(buffer.name, name, (*leading, (size, "B"))) for name, size in buffer.sections]
    axes = tuple((size, f"[{axis}]") for axis, size in enumerate(buffer.shape))
    return [Formula(buffer.name, buffer.name, (*leading, *axes, (DTYPE_BITS[buffer.dtype], "bits")), 8)]


def held(layer: LayerShape, count: int, batch_size: int, num_tokens: int) -> tuple[Factor, Factor, list[Number]]:
    """The rows, the tokens that a row holds, and both as numbers."""
    tokens = layer.num_tokens(num_tokens)
    numbers = [rows_number(layer, count, batch_size)]
    if tokens != num_tokens:
        entries = f"{num_tokens:,} // stride {layer.stride}" if layer.stride > 1 else f"{num_tokens:,}"
        origin = f"min({entries}, window {layer.window:,})" if layer.window is not None else entries
        numbers.append(Number("held", tokens, origin))
    return kv_rows(layer, count, batch_size), (tokens, "tokens"), numbers


def kv_rows(layer: LayerShape, count: int, batch_size: int) -> Factor:
    """Layers, sequences and kv heads together."""
    return (count * batch_size * layer.num_kv_heads, "rows")


def rows_number(layer: LayerShape, count: int, batch_size: int) -> Number:
    """:func:`kv_rows` as a number with its origin."""
    origin = f"layers x batch x kv heads = {count:,} x {batch_size:,} x {layer.num_kv_heads:,}"
    return Number("rows", count * batch_size * layer.num_kv_heads, origin)
