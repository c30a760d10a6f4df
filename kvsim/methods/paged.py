"""Paging: a row's tokens are provided for in blocks of ``block_size`` (arXiv 2309.06180); another method fills them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from kvsim.layout import Buffer, LayerShape, Method, mean_read_nbytes, tokens_alone
from kvsim.methods.by_layer import at, within
from kvsim.methods.formulas import Number, Written, written
from kvsim.methods.full import Full
from kvsim.whole_numbers import check_whole


@dataclass(frozen=True)
class Paged:
    """Whole blocks of ``block_size`` tokens a row and layer; ``inner`` stores the tokens.

    A window of W tokens can begin inside a block, so once it slides it is provided for with the most blocks that W
    consecutive tokens touch, ``ceil((W - 1) / block_size) + 1``.  The block table (4 bytes a block) is not counted.
    Raises ``ValueError`` for a block below 1.
    """

    block_size: int = 16
    inner: Method = field(default_factory=Full)

    def __post_init__(self) -> None:
        check_whole("block_size", self.block_size)

    @property
    def tokens_alone(self) -> bool:
        return tokens_alone(self.inner)

    @property
    def name(self) -> str:
        return f"paged-{self.block_size}({self.inner.name})"

    def at(self, layer: LayerShape, index: int, num_layers: int) -> Paged:
        """This method with ``inner`` for one place (:func:`kvsim.methods.by_layer.at`)."""
        return replace(self, inner=at(self.inner, layer, index, num_layers))

    def within(self, first: int, count: int, num_layers: int) -> Paged:
        """This method over a pipeline stage's ``inner`` (:func:`kvsim.methods.by_layer.within`)."""
        return replace(self, inner=within(self.inner, first, count, num_layers))

    def num_provided(self, layer: LayerShape, num_tokens: int) -> int:
        """Tokens of a row that the blocks provide for."""
        held = layer.num_tokens(num_tokens)
        blocks = -(-held // self.block_size)
        if layer.window is not None and num_tokens // layer.stride > layer.window:
            blocks = -(-(layer.window - 1) // self.block_size) + 1
        return blocks * self.block_size

    def shared_tokens(self, layer: LayerShape, shared: int) -> int:
        """Whole blocks, none of them where a window slides (:func:`kvsim.layout.shared_tokens`)."""
        return 0 if layer.window is not None else shared // self.block_size * self.block_size

    def buffers(self, layer: LayerShape, batch_size: int, num_tokens: int) -> list[Buffer]:
        provided = self.num_provided(layer, num_tokens)
        return self.inner.buffers(replace(layer, window=None, stride=1), batch_size, provided)

    def formulas(self, layer: LayerShape, count: int, batch_size: int, num_tokens: int) -> Written:
        """The bytes of ``count`` layers as products (:mod:`kvsim.methods.formulas`)."""
        provided = self.num_provided(layer, num_tokens)
        numbers, out = written(self.inner, replace(layer, window=None, stride=1), count, batch_size, provided)
        rule = f"{provided // self.block_size:,} blocks of {self.block_size}"
        return [Number("provided", provided, rule), *numbers], out

    def read_parts(self, layer: LayerShape, batch_size: int, num_tokens: int) -> dict[str, int]:
        return self.inner.read_parts(layer, batch_size, num_tokens)

    def mean_read_nbytes(self, layer: LayerShape, batch_size: int, num_tokens: int) -> int:
        """What ``inner`` reads (:func:`kvsim.layout.mean_read_nbytes`)."""
        return mean_read_nbytes(self.inner, layer, batch_size, num_tokens)
