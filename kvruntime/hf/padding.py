"""The padded sequence that transformers counts in, against the rows without padding that the layers hold.

A *column* is a position of the padded batch.  The mask of a forward says which columns hold a row's token; this
file reads it once for all layers, refuses any mask that the layers would not obey, and remembers on the host
which columns were padding.  Padding is mostly to the left, but it may lie anywhere: a second turn of a ragged batch
has it in the middle.
"""

from __future__ import annotations

import weakref
from itertools import groupby

import torch
from torch import Tensor

QUERY_BLOCK = 1024
"""Queries of a mask that are checked at a time."""

HIDES = (
    "the attention mask hides tokens that the cache holds or shows padding that it dropped: "
    "give the mask of the whole sequence, unchanged where it was cached"
)
SHAPE = "the attention mask is not causal over the tokens that are no padding: a kvruntime cache cannot follow it"


class Columns:
    """Which columns were padding, row by row: ``padding[b]`` lists them as ranges."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget every column."""
        self.padding: list[list[range]] = []
        self._seen: tuple[int, int, bool] | None = None
        self._mask: weakref.ref[Tensor] | None = None
        self._lengths: list[int] | None = None
        self.slides = False
        """Whether a mask was made of a window, which the layers see to."""
        self.scattered = False
        """Whether the columns last read have padding after a token of the same row."""
        self._checked: Tensor | None = None
        """What stands for the mask of a step that :meth:`step_mask` has checked: ``[batch_size, 1, 1, 1]``, true."""
        self._expected: Tensor | None = None
        """:meth:`tokens` of more columns than there are, where some are padding."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that steps are checked by."""
        held = (self._checked, self._expected)
        return sum(tensor.untyped_storage().nbytes() for tensor in held if tensor is not None)

    def step_mask(self, given: Tensor) -> Tensor | None:
        """A mask of one more column, ``given [batch_size, columns]`` bool on a GPU, held against what was cached: all
        rows' newest is a token.  Nothing waits for the device, which stops with the message.

        Returns what :meth:`read` knows as a mask that was checked; None where that needs a look at the mask itself.
        """
        start = given.shape[1] - 1
        if not (given.is_cuda and len(given) == len(self.padding) and start and self._hold_tokens(start)):
            return None
        if any(self.padding):
            if self._expected is None or self._expected.shape[1] <= start:
                self._expected = self.tokens(2 * start + 1, given.device)
            given = given == self._expected[:, : start + 1]
        torch._assert_async(given.all(), HIDES)
        if self._checked is None or len(self._checked) != len(given) or self._checked.device != given.device:
            self._checked = torch.ones(len(given), 1, 1, 1, dtype=torch.bool, device=given.device)
        return self._checked

    def _hold_tokens(self, start: int) -> bool:
        """Whether every row has a token among its first ``start`` columns, and no padding after them."""
        return all(not row or (row[-1].stop <= start and sum(map(len, row)) < start) for row in self.padding)

    def read(self, mask: Tensor | None, start: int, length: int, batch_size: int) -> list[int] | None:
        """How many of the columns ``start : start + length`` hold a token, row by row; None where all do.

        ``mask``: None (causal, all visible) or ``[batch_size or 1, 1, length, start + length]``, bool or additive.
        The first layer of a forward reads it, the others are given the same answer.
        Raises ``ValueError`` unless it is causal but for padding and agrees with what was cached.  In the first columns
        tokens may see later ones too (an image's see each other): these attend by the mask as it is.
        """
        seen = (start, length, mask is None)
        if seen != self._seen or (self._mask and self._mask()) is not mask:
            rows = self.padding or [[]] * batch_size
            self.padding = [[span for span in row if span.start < start] for row in rows]
            self.scattered = False
            self._lengths = self._count(mask, start, length, batch_size)
            self._seen, self._mask = seen, None if mask is None else weakref.ref(mask)
        return self._lengths

    def _count(self, mask: Tensor | None, start: int, length: int, batch_size: int) -> list[int] | None:
        if mask is None:
            if any(self.padding):
                raise ValueError(f"no attention mask was given: {HIDES}")
            return None
        if mask is self._checked:
            return None
        self._expected = None
        visible, biased = _visible(mask, length, start + length)
        visible = visible[:, 0].expand(batch_size, -1, -1)
        real = visible[:, -1]  # [batch_size, start + length]: the newest query sees every token
        stale = (real[:, :start] != self.tokens(start, mask.device)).any()
        if mask.is_cuda and length == 1 and start and min(self.row_lengths(start)):
            # As generate decodes: checked without waiting for the GPU, which stops with the message should it fail.
            torch._assert_async(~stale & real[:, -1].all(), HIDES)
            return None
        new = real[:, start:]
        other = biased | _not_causal(visible, real, start)
        scattered = (new[:, :-1] & ~new[:, 1:]).any()
        found = torch.cat([torch.stack([stale, other, scattered]).long(), new.sum(-1)])
        flags: list[int] = found.tolist()  # waits for the device, once a forward
        if flags[0] or flags[1]:
            raise ValueError(HIDES if flags[0] else SHAPE)
        self.scattered, counts = bool(flags[2]), flags[3:]
        if min(counts) == length:
            return None
        for spans, row in zip(self.padding, new.tolist(), strict=True):
            spans += padding_spans(row, start)
        return counts

    @property
    def is_split(self) -> bool:
        """Whether padding lies between a row's tokens, or behind them."""
        return any(len(row) > 1 or (row and row[0].start) for row in self.padding)

    def check_window(self, num_columns: int, window: int) -> None:
        """Raises ``ValueError`` where padding lies between tokens, so that a window of columns is none of tokens."""
        if num_columns > window and self.is_split:
            raise ValueError(
                f"padding between tokens and a packed window of {window}: allowed is padding to the left of each row"
            )

    def all_tokens(self, batch_size: int) -> None:
        """New columns, all of them tokens, that came without a mask."""
        self.padding = self.padding or [[] for _ in range(batch_size)]
        self._seen = None

    def __getstate__(self) -> dict[str, object]:
        """Without the mask last read, which nobody may keep."""
        return {**self.__dict__, "_seen": None, "_mask": None, "_checked": None, "_expected": None}

    def order(self, mask: Tensor, start: int) -> Tensor:
        """The new columns of ``mask`` with padding first and tokens after, in order: int64 ``[batch_size or 1, L]``."""
        newest = mask[:, 0, -1, start:]
        return (newest if mask.dtype == torch.bool else newest == 0).int().argsort(dim=1, stable=True)

    def row_lengths(self, num_columns: int) -> list[int]:
        """Tokens of each row among its first ``num_columns`` columns."""
        return [num_columns - sum(len(range(s.start, min(s.stop, num_columns))) for s in row) for row in self.padding]

    def tokens(self, num_columns: int, device: torch.device) -> Tensor:
        """Which of the first ``num_columns`` hold a token: bool ``[batch_size, num_columns]``."""
        column = torch.arange(num_columns, device=device)
        out = torch.ones(len(self.padding), num_columns, dtype=torch.bool, device=device)
        for turn in range(max((len(row) for row in self.padding), default=0)):
            spans = [row[turn] if turn < len(row) else range(0) for row in self.padding]
            first, last = torch.tensor([[span.start, span.stop] for span in spans]).to(device, non_blocking=True).T
            out &= (column < first[:, None]) | (column >= last[:, None])
        return out

    def reorder(self, rows: list[int]) -> None:
        """Rows become ``rows``."""
        self.padding = [list(self.padding[row]) for row in rows] if self.padding else []
        self._seen = self._expected = None

    def lost(self, num_columns: int, keep: int) -> int:
        """How many tokens every row loses with the columns from ``keep`` on.

        Raises ``ValueError`` where rows would lose different numbers of tokens.
        """
        before, after = self.row_lengths(num_columns), self.row_lengths(keep)
        lost = [old - new for old, new in zip(before, after, strict=True)]
        if len(set(lost)) > 1:
            raise ValueError(f"cannot crop to {keep} tokens: the rest is padding in some rows and tokens in others")
        return lost[0]

    def crop(self, keep: int) -> None:
        """Forget the columns from ``keep`` on."""
        self.padding = [[range(s.start, min(s.stop, keep)) for s in row if s.start < keep] for row in self.padding]
        self._seen = self._expected = None


def _visible(mask: Tensor, length: int, num_columns: int) -> tuple[Tensor, Tensor]:
    """The mask as bool, and whether it adds anything but nothing and minus infinity."""
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[2:] != (length, num_columns):
        want = f"[batch_size, 1, {length}, {num_columns}]"
        raise ValueError(f"attention mask of shape {list(mask.shape)}: allowed is {want}")
    if mask.dtype == torch.bool:
        return mask, torch.zeros((), dtype=torch.bool, device=mask.device)
    visible = mask == 0
    return visible, (~visible & (mask > torch.finfo(mask.dtype).min / 2)).any()


def padding_spans(tokens: list[bool], start: int) -> list[range]:
    """The runs of columns from ``start`` on that hold no token."""
    spans, at = [], start
    for is_token, run in groupby(tokens):
        end = at + len(list(run))
        if not is_token:
            spans.append(range(at, end))
        at = end
    return spans


def _not_causal(visible: Tensor, real: Tensor, start: int) -> Tensor:
    """Whether a token's query sees other columns than the tokens up to its own (padding queries may see anything).

    Of the first columns: whether it does not see all of those, or sees padding."""
    column = torch.arange(real.shape[1], device=real.device)
    wrong = torch.zeros((), dtype=torch.bool, device=real.device)
    for first in range(0, visible.shape[1], QUERY_BLOCK):
        queries = column[start + first : start + min(first + QUERY_BLOCK, visible.shape[1])]
        want = real[:, None] & (column <= queries[:, None])
        got = visible[:, first : first + QUERY_BLOCK]
        other = got != want if start else (want & ~got) | (got & ~real[:, None])
        wrong = wrong | (other & real[:, queries, None]).any()
    return wrong
