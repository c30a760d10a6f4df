"""Eviction: a row keeps at most ``budget`` tokens, its first ``sink_length`` among them; another method stores them.

``policy`` says which: ``recent`` the newest (StreamingLLM, arXiv 2309.17453); ``snapkv`` of a prompt those that its
last ``observed`` queries attend to most, a head's own (SnapKV, arXiv 2404.14469), and afterwards the newest.  The
choice does not change the bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from kvsim.layout import Buffer, LayerShape, Method, leaving, mean_read_nbytes
from kvsim.methods.by_layer import at
from kvsim.methods.formulas import Number, Written, written
from kvsim.methods.full import Full
from kvsim.whole_numbers import check_whole

POLICIES = ("recent", "snapkv")


@dataclass(frozen=True)
class Evict:
    """At most ``budget`` tokens a row and layer, ``sink_length`` of them the first; ``inner`` stores them.

    ``window``: attention sees so many newest tokens of those kept; 0: all (:func:`windowed`).  ``policy``: ``recent``
    or ``snapkv``.  ``observed``, ``kernel_size``: of ``snapkv``, the last queries of a prompt
    that score its tokens, and the tokens over which a score is pooled (odd).  A layer whose own window is shorter keeps
    that.  Raises ``ValueError`` for a budget below 1, or a sink or observed tokens beyond it.
    """

    budget: int = 1024
    sink_length: int = 4
    inner: Method = field(default_factory=Full)
    policy: str = "recent"
    observed: int = 32
    kernel_size: int = 7
    window: int = 0

    kvruntime = True

    def __post_init__(self) -> None:
        check_whole("budget", self.budget)
        check_whole("sink_length", self.sink_length, least=0)
        if self.sink_length > self.budget:
            raise ValueError(f"sink_length {self.sink_length}: allowed are 0 to the budget {self.budget}")
        if self.policy not in POLICIES:
            raise ValueError(f"policy {str(self.policy)[:40]!r}: allowed are {', '.join(POLICIES)}")
        check_whole("observed", self.observed)
        check_whole("kernel_size", self.kernel_size)
        if self.policy == "snapkv" and self.sink_length + self.observed > self.budget:
            most = self.budget - self.sink_length
            raise ValueError(f"observed {self.observed}: allowed are 1 to {most}, the budget less the sink")
        check_whole("window", self.window, least=0)
        if self.window and (self.window > self.budget or self.sink_length or self.policy != "recent"):
            raise ValueError(
                f"window {self.window}: allowed are 1 to the budget {self.budget}, with policy recent and no sink"
            )
        if not self.kernel_size % 2:
            raise ValueError(f"kernel_size {self.kernel_size}: allowed are odd numbers")

    @property
    def name(self) -> str:
        if self.window:
            return f"window-{self.window}({self.inner.name})"
        sink = f"-s{self.sink_length}" if self.sink_length else ""
        policy = "evict" if self.policy == "recent" else f"{self.policy}-o{self.observed}"
        return f"{policy}-{self.budget}{sink}({self.inner.name})"

    def check_runs(self) -> None:
        """Raises ``ValueError`` where kvruntime cannot evict tokens of ``inner``, or not within this budget."""
        granule = leaving(self.inner, self.sink_length)
        exact = getattr(self.inner, "residual_length", 0)
        if self.window and exact > self.window:
            raise ValueError(f"residual_length {exact}: allowed are up to the window of {self.window} tokens")
        least = self.sink_length + 2 * granule
        if self.budget < least and granule > 1:
            raise ValueError(
                f"budget {self.budget}: allowed are {least} and above over {self.inner.name}, which forgets "
                f"{granule} tokens at a time"
            )

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


def windowed(method: Method, window: int) -> Evict:
    """``method`` in a layer whose queries see ``window`` tokens: what has left it goes as soon as ``method`` can forget
    it.  Raises ``ValueError`` where ``method`` cannot, or keeps first tokens that would leave.
    """
    sink = int(getattr(method, "sink_length", 0))
    if sink:
        raise ValueError(f"sink_length {sink}: allowed is 0 where the first tokens leave a window of {window}")
    return Evict(window + leaving(method, 0), 0, method, window=window)
