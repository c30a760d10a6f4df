"""Eviction: a row keeps its first ``sink_length`` tokens and its newest, ``budget`` in all (arXiv 2309.17453).

How the kept tokens are chosen does not change the bytes, so a budget of heavy hitters (H2O, SnapKV) is the same
method here.  What is kept is stored by another method.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from kvsim.layout import Buffer, LayerShape, Method, mean_read_nbytes
from kvsim.methods.by_layer import at
from kvsim.methods.formulas import Number, Written, written
from kvsim.methods.full import Full
from kvsim.whole_numbers import check_whole


@dataclass(frozen=True)
class Evict:
    """At most ``budget`` tokens a row and layer, ``sink_length`` of them the first; ``inner`` stores them.

    A layer whose own window is shorter keeps that.  Raises ``ValueError`` for a budget below 1 or a sink beyond it.
    """

    budget: int = 1024
    sink_length: int = 4
    inner: Method = field(default_factory=Full)

    def __post_init__(self) -> None:
        check_whole("budget", self.budget)
        check_whole("sink_length", self.sink_length, least=0)
        if self.sink_length > self.budget:
            raise ValueError(f"sink_length {self.sink_length}: allowed are 0 to the budget {self.budget}")

    @property
    def name(self) -> str:
        sink = f"-s{self.sink_length}" if self.sink_length else ""
        return f"evict-{self.budget}{sink}({self.inner.name})"

    def at(self, layer: LayerShape, index: int, num_layers: int) -> Evict:
        """This method with ``inner`` for one place (:func:`kvsim.methods.by_layer.at`)."""
        return replace(self, inner=at(self.inner, layer, index, num_layers))

    def num_kept(self, layer: LayerShape, num_tokens: int) -> int:
        """Tokens of a row that are kept after ``num_tokens`` were seen."""
        return min(layer.num_tokens(num_tokens), self.budget)

    def buffers(self, layer: LayerShape, batch_size: int, num_tokens: int) -> list[Buffer]:
        kept = self.num_kept(layer, num_tokens)
        return self.inner.buffers(replace(layer, window=None, stride=1), batch_size, kept)

    def formulas(self, layer: LayerShape, count: int, batch_size: int, num_tokens: int) -> Written:
        """The bytes of ``count`` layers as products (:mod:`kvsim.methods.formulas`)."""
        kept = self.num_kept(layer, num_tokens)
        numbers, out = written(self.inner, replace(layer, window=None, stride=1), count, batch_size, kept)
        return [Number("kept", kept, f"min({num_tokens:,} tokens, budget {self.budget:,})"), *numbers], out

    def read_parts(self, layer: LayerShape, batch_size: int, num_tokens: int) -> dict[str, int]:
        kept = self.num_kept(layer, num_tokens)
        return self.inner.read_parts(replace(layer, window=None, stride=1), batch_size, kept)

    def mean_read_nbytes(self, layer: LayerShape, batch_size: int, num_tokens: int) -> int:
        """What ``inner`` reads of the kept tokens (:func:`kvsim.layout.mean_read_nbytes`)."""
        kept = self.num_kept(layer, num_tokens)
        return mean_read_nbytes(self.inner, replace(layer, window=None, stride=1), batch_size, kept)
