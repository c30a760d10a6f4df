"""A mix by layer: the first, the last and the named layers one way (if asked, those with a window), others another."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from kvsim.layout import Buffer, LayerShape, Method
from kvsim.methods.by_layer import at, within
from kvsim.methods.full import Full
from kvsim.methods.kivi import Kivi
from kvsim.whole_numbers import check_whole

RANGES = re.compile(r"\d{1,4}(-\d{1,4})?(\+\d{1,4}(-\d{1,4})?)*")


@dataclass(frozen=True)
class LayerMix:
    """``exact`` stores the ``first`` and the ``last`` layers with a cache and those named, ``inner`` the others.

    ``layers``: numbers from 0 and ranges, ends included, with ``+`` between them: ``3+7-9``; empty for none.
    ``windows``: 1 lets ``exact`` store every layer with a window too (for methods that hold full attention only).
    Layers are counted among those with a cache.  ``inner`` may be a mix, for more than two ways.  Ask
    :func:`kvsim.methods.by_layer.placed` for the method of a layer: a layer whose place is not known cannot be weighed,
    and ``buffers`` says so with ``ValueError``.
    """

    first: int = 2
    last: int = 2
    windows: int = 0
    exact: Method = field(default_factory=Full)
    inner: Method = field(default_factory=Kivi)
    layers: str | int = ""

    def __post_init__(self) -> None:
        for label, given in (("first", self.first), ("last", self.last)):
            check_whole(label, given, least=0)
        if type(self.windows) is not int or self.windows not in (0, 1):
            raise ValueError(f"windows {str(self.windows)[:40]}: allowed are 0 and 1")
        object.__setattr__(self, "layers", str(self.layers))
        if self.layers and not RANGES.fullmatch(str(self.layers)):
            raise ValueError(f"layers {str(self.layers)[:40]!r}: allowed are numbers and ranges such as 3+7-9")
        for part in str(self.layers).split("+") if self.layers else ():
            low, _, high = part.partition("-")
            if int(high or low) < int(low):
                raise ValueError(f"layers {part!r}: allowed are ranges from the lower number to the higher")

    @cached_property
    def numbers(self) -> frozenset[int]:
        """The layers that ``layers`` names."""
        out: set[int] = set()
        for part in str(self.layers).split("+") if self.layers else ():
            low, _, high = part.partition("-")
            out.update(range(int(low), int(high or low) + 1))
        return frozenset(out)

    @property
    def name(self) -> str:
        windows = "-w" if self.windows else ""
        outer = f"-{self.first}-{self.last}" if self.first or self.last or not self.layers else ""
        layers = f"-l{self.layers}" if self.layers else ""
        return f"mix{outer}{layers}{windows}({self.exact.name},{self.inner.name})"

    def at(self, layer: LayerShape, index: int, num_layers: int) -> Method:
        """The method of one place (:func:`kvsim.methods.by_layer.at`).

        Raises ``ValueError`` where ``layers`` names one that the model does not have.
        """
        self._check(num_layers)
        outer = index < self.first or index >= num_layers - self.last or index in self.numbers
        chosen = self.exact if outer or (self.windows and layer.window is not None) else self.inner
        return at(chosen, layer, index, num_layers)

    def _check(self, num_layers: int) -> None:
        if self.numbers and max(self.numbers) >= num_layers:
            raise ValueError(f"layers {self.layers}: allowed are 0 to {num_layers - 1} of {num_layers} with a cache")

    def within(self, first: int, count: int, num_layers: int) -> Method:
        """The mix of a pipeline stage (:func:`kvsim.methods.by_layer.within`).  Raises ``ValueError`` as :meth:`at`."""
        self._check(num_layers)
        last = num_layers - self.last
        outer = [n - first for n in range(first, first + count) if n < self.first or n >= last or n in self.numbers]
        exact, inner = (within(each, first, count, num_layers) for each in (self.exact, self.inner))
        if len(outer) == count:
            return exact
        if not outer and not self.windows:
            return inner
        return replace(self, first=0, last=0, layers="+".join(map(str, outer)), exact=exact, inner=inner)

    def buffers(self, layer: LayerShape, batch_size: int, num_tokens: int) -> list[Buffer]:
        raise ValueError(f"{self.name}: a mix stores layers by their place in the model, and this one's is not known")

    def read_parts(self, layer: LayerShape, batch_size: int, num_tokens: int) -> dict[str, int]:
        raise ValueError(f"{self.name}: a mix stores layers by their place in the model, and this one's is not known")


def mixed(methods: Sequence[Method]) -> Method:
    """The method that stores layer after layer as ``methods`` say: a mix of named layers, or the one that all have."""
    by_count = sorted(dict.fromkeys(methods), key=methods.count, reverse=True)
    out = by_count[0]
    for each in by_count[1:]:
        out = LayerMix(
            first=0, last=0, layers=_ranges([i for i, m in enumerate(methods) if m == each]), exact=each, inner=out
        )
    return out


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending ``numbers`` as ``layers`` takes them: ``[3, 7, 8, 9]`` -> ``3+7-9``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return "+".join(f"{low}" if low == high else f"{low}-{high}" for low, high in runs)
