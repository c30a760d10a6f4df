"""Eviction: a row keeps at most ``budget`` tokens, its first ``sink_length`` among them; another method stores them.

``policy`` says which others a head keeps, every head of its own:

| policy | keeps | source |
|---|---|---|
| ``recent`` | the newest | StreamingLLM, arXiv 2309.17453 |
| ``snapkv`` | those that a prompt's last ``observed`` queries attend to most | SnapKV, arXiv 2404.14469 |
| ``h2o`` | those that were attended to most in all, by the prompt and since | H2O, arXiv 2306.14048 |
| ``expected`` | those that queries like a prompt's last ``observed`` would attend to most, times the value's length | \
expected attention, arXiv 2510.00636 |

Under the last three the newest ``recent_length`` stay besides.  The choice does not change the bytes of what is kept;
these policies also keep a score, float32, of every head's tokens, or of the tokens that leave ``inner`` together.
``ratio`` in place of ``budget`` keeps that share of the tokens seen, so that bytes follow the prompt's length.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from kvsim.layout import Buffer, LayerShape, Method, edges, leaving, mean_read_nbytes
from kvsim.methods.by_layer import at, within
from kvsim.methods.formulas import Formula, Number, Written, kv_rows, rows_number, written
from kvsim.methods.full import Full
from kvsim.whole_numbers import check_whole

BUDGET = 1024
"""Tokens kept where neither a budget nor a ratio is given."""

OBSERVED: dict[str, int] = {"recent": 0, "snapkv": 32, "h2o": 0, "expected": 512}
"""Policy -> how many of a prompt's last queries score its tokens; 0 of ``h2o``: all of them."""

RECENT_SHARE: dict[str, int] = {"snapkv": 4, "h2o": 2, "expected": 4}
"""Policy -> the part of the budget that the newest tokens have: a quarter, half (as H2O's own code), a quarter."""

INTERVAL: dict[str, int] = {"recent": 1, "snapkv": 1, "h2o": 16, "expected": 1}
"""Policy -> tokens between two evictions."""

PARTS = 10_000
"""A ratio is a whole number of these parts, so that budgets are whole-number arithmetic."""


@dataclass(frozen=True)
class Evict:
    """At most ``budget`` tokens a row and layer, ``sink_length`` of them the first; ``inner`` stores them.

    ``window``: attention sees so many newest tokens of those kept; 0: all (:func:`windowed`).
    ``policy``: ``recent``, ``snapkv``, ``h2o`` or ``expected``.  ``observed``: the last queries of a prompt that score
    its tokens (32, all, 512).  ``kernel_size``: of ``snapkv``, the tokens over which a score is pooled (odd).
    ``ratio``: the share of the tokens seen that is kept, 0.25 or ``25%``, in place of ``budget``.  ``recent_length``:
    the newest tokens that stay whatever their score (a quarter of the budget, of ``h2o`` half).  ``interval``: how many
    generated tokens pass between evictions, and of ``h2o`` between queries that score (16; of the others 1).
    A layer whose own window is shorter keeps that.  Raises ``ValueError`` for a budget below 1, or a sink, observed or
    recent tokens beyond it.
    """

    budget: int | None = None
    sink_length: int = 4
    inner: Method = field(default_factory=Full)
    policy: str = "recent"
    observed: int | None = None
    kernel_size: int = 7
    window: int = 0
    ratio: float | None = None
    recent_length: int | None = None
    interval: int | None = None

    kvruntime = True

    def __post_init__(self) -> None:
        if self.policy not in OBSERVED:
            raise ValueError(f"policy {str(self.policy)[:40]!r}: allowed are {', '.join(OBSERVED)}")
        check_whole("sink_length", self.sink_length, least=0)
        for name, default in (("observed", OBSERVED), ("interval", INTERVAL)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default[self.policy])
        check_whole("observed", self.observed, least=min(1, OBSERVED[self.policy]))
        check_whole("interval", self.interval)
        check_whole("kernel_size", self.kernel_size)
        check_whole("window", self.window, least=0)
        if not self.kernel_size % 2:
            raise ValueError(f"kernel_size {self.kernel_size}: allowed are odd numbers")
        if self.recent_length is not None:
            check_whole("recent_length", self.recent_length, least=0)
        if self.window and (self.ratio is not None or self.sink_length or self.policy != "recent"):
            raise ValueError(f"window {self.window}: allowed are a budget, with policy recent and no sink")
        if self.ratio is not None:
            if self.budget is not None:
                raise ValueError(f"budget {self.budget} and ratio {self.ratio}: allowed is one of them")
            object.__setattr__(self, "ratio", _share(self.ratio))
            return
        if self.budget is None:
            object.__setattr__(self, "budget", BUDGET)
        check_whole("budget", self.budget)
        self._check_budget()

    def _check_budget(self) -> None:
        assert self.budget is not None
        assert self.observed is not None
        if self.window > self.budget:
            raise ValueError(f"window {self.window}: allowed are 1 to the budget {self.budget}")
        most = self.budget - self.sink_length
        if most < 0:
            raise ValueError(f"sink_length {self.sink_length}: allowed are 0 to the budget {self.budget}")
        if self.policy == "snapkv" and self.observed > most:
            raise ValueError(f"observed {self.observed}: allowed are 1 to {most}, the budget less the sink")
        if self.recent_length is not None and self.recent_length > most:
            raise ValueError(f"recent_length {self.recent_length}: allowed are 0 to {most}, the budget less the sink")

    @property
    def name(self) -> str:
        """``evict-1024-s4(fp16)``, ``h2o-25%-s4(kivi-2bit-g32-r128)``: what is not the policy's own default is said."""
        if self.window:
            return f"window-{self.window}({self.inner.name})"
        kept = f"{self.ratio:.6%}".rstrip("%").rstrip("0").rstrip(".") + "%" if self.ratio else str(self.budget)
        observed = f"-o{self.observed}" if self.observed and self.policy != "recent" else ""
        recent = "" if self.recent_length is None else f"-w{self.recent_length}"
        interval = f"-i{self.interval}" if self.interval != INTERVAL[self.policy] else ""
        sink = f"-s{self.sink_length}" if self.sink_length else ""
        policy = "evict" if self.policy == "recent" else self.policy
        return f"{policy}{observed}-{kept}{sink}{recent}{interval}({self.inner.name})"

    @property
    def scores(self) -> bool:
        """Whether heads choose among their tokens by a score."""
        return self.policy != "recent"

    @property
    def block(self) -> int:
        """Tokens that leave ``inner`` together; 1 where nothing says so."""
        try:
            return leaving(self.inner, self.sink_length)
        except ValueError:
            return 1

    @property
    def least(self) -> int:
        """Tokens below which eviction does not work: kept under any ratio."""
        observed = self.observed if self.policy == "snapkv" and self.observed else 0
        return self.sink_length + max(1, observed, 2 * self.block if self.block > 1 else 0)

    def check_runs(self) -> None:
        """Raises ``ValueError`` where kvruntime cannot evict tokens of ``inner``, or not within this budget."""
        block = leaving(self.inner, self.sink_length)
        exact = getattr(self.inner, "residual_length", 0)
        if self.window and exact > self.window:
            raise ValueError(f"residual_length {exact}: allowed are up to the window of {self.window} tokens")
        least = self.sink_length + (2 * block if block > 1 else 1)
        if self.budget is not None and self.budget < least:
            why = f", which forgets {block} tokens at a time" if block > 1 else ""
            raise ValueError(f"budget {self.budget}: allowed are {least} and above over {self.inner.name}{why}")

    def at(self, layer: LayerShape, index: int, num_layers: int) -> Evict:
        """This method with ``inner`` for one place (:func:`kvsim.methods.by_layer.at`)."""
        return replace(self, inner=at(self.inner, layer, index, num_layers))

    def within(self, first: int, count: int, num_layers: int) -> Evict:
        """This method over a pipeline stage's ``inner`` (:func:`kvsim.methods.by_layer.within`)."""
        return replace(self, inner=within(self.inner, first, count, num_layers))

    def num_kept(self, layer: LayerShape, num_tokens: int) -> int:
        """Tokens of a row that are kept after ``num_tokens`` were seen, prompt and generated alike."""
        held = layer.num_tokens(num_tokens)
        if self.ratio is None:
            assert self.budget is not None
            return min(held, self.budget)
        return min(held, max(self.least, held * round(self.ratio * PARTS) // PARTS))

    def num_recent(self, kept: int) -> int:
        """Of ``kept`` tokens the newest that stay whatever their score."""
        if not self.scores:
            return 0
        share = kept // RECENT_SHARE[self.policy] if self.recent_length is None else self.recent_length
        return min(share, max(0, kept - self.sink_length - 1))

    def score_buffers(self, layer: LayerShape, batch_size: int, kept: int) -> list[Buffer]:
        """``scores [batch_size, num_kv_heads, blocks]`` float32 for ``kept`` tokens a row; none of ``recent``."""
        if not self.scores:
            return []
        return [Buffer("scores", (batch_size, layer.num_kv_heads, self._num_blocks(kept)), "float32")]

    def _num_blocks(self, kept: int) -> int:
        return -(-max(0, kept - self.sink_length) // self.block)

    def edges(self, longest: int) -> list[int]:
        """Those of ``inner``, and around a budget."""
        around = [] if self.budget is None else [self.budget - 1, self.budget, self.budget + 1]
        return [*edges(self.inner, longest), *around]

    def buffers(self, layer: LayerShape, batch_size: int, num_tokens: int) -> list[Buffer]:
        kept = self.num_kept(layer, num_tokens)
        inner = self.inner.buffers(replace(layer, window=None, stride=1), batch_size, kept)
        return inner + self.score_buffers(layer, batch_size, kept)

    def formulas(self, layer: LayerShape, count: int, batch_size: int, num_tokens: int) -> Written:
        """The bytes of ``count`` layers as products (:mod:`kvsim.methods.formulas`)."""
        kept = self.num_kept(layer, num_tokens)
        numbers, out = written(self.inner, replace(layer, window=None, stride=1), count, batch_size, kept)
        rule = f"budget {self.budget:,}" if self.ratio is None else f"{self.ratio:.4g} of them, {self.least} at least"
        numbers = [Number("kept", kept, f"min({num_tokens:,} tokens, {rule})"), *numbers]
        if self.scores:
            blocks = self._num_blocks(kept)
            if not any(number.name == "rows" for number in numbers):
                numbers.append(rows_number(layer, count, batch_size))
            numbers.append(Number("blocks", blocks, f"ceil((kept - sink {self.sink_length}) / {self.block})"))
            rows = kv_rows(layer, count, batch_size)
            out = [*out, Formula("scores", "scores", (rows, (blocks, "blocks"), (4, "bytes a score")))]
        return numbers, out

    def read_parts(self, layer: LayerShape, batch_size: int, num_tokens: int) -> dict[str, int]:
        """What ``inner`` reads, and the scores among which an evicting step chooses."""
        kept = self.num_kept(layer, num_tokens)
        own = {buffer.name: buffer.nbytes for buffer in self.score_buffers(layer, batch_size, kept)}
        return self.inner.read_parts(replace(layer, window=None, stride=1), batch_size, kept) | own

    def mean_read_nbytes(self, layer: LayerShape, batch_size: int, num_tokens: int) -> int:
        """What ``inner`` reads of the kept tokens (:func:`kvsim.layout.mean_read_nbytes`), and the scores."""
        kept = self.num_kept(layer, num_tokens)
        own = sum(buffer.nbytes for buffer in self.score_buffers(layer, batch_size, kept))
        return own + mean_read_nbytes(self.inner, replace(layer, window=None, stride=1), batch_size, kept)


def windowed(method: Method, window: int) -> Evict:
    """``method`` in a layer whose queries see ``window`` tokens: what has left it goes as soon as ``method`` can forget
    it.  Raises ``ValueError`` where ``method`` cannot, or keeps first tokens that would leave.
    """
    sink = int(getattr(method, "sink_length", 0))
    if sink:
        raise ValueError(f"sink_length {sink}: allowed is 0 where the first tokens leave a window of {window}")
    return Evict(window + leaving(method, 0), 0, method, window=window)


def _share(given: Any) -> float:
    """``0.25``, ``"0.25"`` or ``"25%"`` -> 0.25.  Raises ``ValueError`` where it is no whole number of ``PARTS``."""
    try:
        text = str(given)
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        share = 0.0
    parts = round(share * PARTS) if 0 < share <= 1 else 0
    if not parts or abs(share * PARTS - parts) > 1e-6:
        raise ValueError(f"ratio {str(given)[:40]!r}: allowed are 0.0001 to 1, four digits at most, or 0.01% to 100%")
    return parts / PARTS
