"""A mix by layer: the first and last layers (and, if asked, those with a window) one way, all others another."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvsim.layout import Buffer, LayerShape, Method
from kvsim.methods.by_layer import at
from kvsim.methods.full import Full
from kvsim.methods.kivi import Kivi
from kvsim.whole_numbers import check_whole


@dataclass(frozen=True)
class LayerMix:
    """``exact`` stores the ``first`` and the ``last`` layers with a cache, ``inner`` those between.

    ``windows``: 1 lets ``exact`` store every layer with a window too (for methods that hold full attention only).
    Layers are counted among those with a cache.  Ask :func:`kvsim.methods.by_layer.placed` for the method of a layer:
    a layer whose place is not known cannot be weighed, and ``buffers`` says so with ``ValueError``.
    """

    first: int = 2
    last: int = 2
    windows: int = 0
    exact: Method = field(default_factory=Full)
    inner: Method = field(default_factory=Kivi)

    def __post_init__(self) -> None:
        for label, given in (("first", self.first), ("last", self.last)):
            check_whole(label, given, least=0)
        if type(self.windows) is not int or self.windows not in (0, 1):
            raise ValueError(f"windows {str(self.windows)[:40]}: allowed are 0 and 1")

    @property
    def name(self) -> str:
        windows = "-w" if self.windows else ""
        return f"mix-{self.first}-{self.last}{windows}({self.exact.name},{self.inner.name})"

    def at(self, layer: LayerShape, index: int, num_layers: int) -> Method:
        """The method of one place (:func:`kvsim.methods.by_layer.at`)."""
        outer = index < self.first or index >= num_layers - self.last
        chosen = self.exact if outer or (self.windows and layer.window is not None) else self.inner
        return at(chosen, layer, index, num_layers)

    def buffers(self, layer: LayerShape, batch_size: int, num_tokens: int) -> list[Buffer]:
        raise ValueError(f"{self.name}: a mix stores layers by their place in the model, and this one's is not known")

    def read_parts(self, layer: LayerShape, batch_size: int, num_tokens: int) -> dict[str, int]:
        raise ValueError(f"{self.name}: a mix stores layers by their place in the model, and this one's is not known")
