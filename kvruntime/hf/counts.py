"""What a decode step counts, in device memory, so that nothing about a step is decided on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvruntime.hf.cache import CacheLayer, Length
from kvruntime.hf.padding import HIDES, Columns
from kvruntime.methods import Layer, Steps
from kvsim.layout import Method

FULL = "a row of the cache is full"

AHEAD = 4096
"""Tokens a row that are provided for at once at the most, or half of those held where that is more, of those that
``generate()`` says it may need: a bound of 100,000 new tokens is seldom reached."""
GROWTH = 1024
"""Tokens a row that more is provided for where nobody says how long rows will get, or a quarter of those held."""


class Counts:
    """What a step counts, in device memory, for all layers of a cache; and the masks that it may be given."""

    positions: Tensor
    """``[batch_size]`` int32: the tokens that each row holds."""
    scratch: Tensor
    """``Layer.scratch``: zeros between steps."""
    num_columns: Tensor
    """int64: the columns of the padded batch."""
    visible: Tensor
    """``[batch_size, 1, 1, 1]``, all true: the mask of every step."""
    tokens: Tensor | None
    """``[batch_size, columns]`` bool: which columns hold a token; None where all do."""
    columns: int
    """How many there are when the longest row is full."""
    turn = 0
    """Which step is next, or under way."""

    def __init__(self, method: Method, max_seq_len: int) -> None:
        self.method, self.max_seq_len = repr(method), max_seq_len
        self.started = False
        """Whether a prompt was stored, so that one more token is a step."""
        self.padded = False
        self.dtype: torch.dtype | None = None
        """Of the tokens that came."""

    def write(self, store: Layer, num_q_heads: int, num_columns: int, columns: Columns) -> None:
        """Takes over the host's books of a layer: each row's tokens, and the columns that they stand in."""
        lengths, device = store.row_lengths, store.device
        with torch.inference_mode(False), torch.no_grad():
            place = torch.Size([len(lengths)]), device
            if not hasattr(self, "positions") or (self.positions.shape, self.positions.device) != place:
                self.positions = torch.zeros(len(lengths), dtype=torch.int32, device=device)
                self.scratch = store.scratch(num_q_heads)
                self.num_columns = torch.zeros((), dtype=torch.int64, device=device)
                self.visible = torch.ones(len(lengths), 1, 1, 1, dtype=torch.bool, device=device)
                for tensor in (self.positions, self.scratch, self.num_columns, self.visible):
                    torch._dynamo.mark_static_address(tensor, guard=False)
            self.positions.copy_(torch.tensor(lengths, dtype=torch.int32), non_blocking=True)
            self.num_columns.fill_(num_columns)
            self.padded, self.started = any(columns.padding), True
            self.columns = num_columns + self.max_seq_len - max(store.seq_lengths)
            self.tokens = columns.tokens(self.columns, device) if self.padded else None

    @property
    def nbytes(self) -> int:
        """Bytes of all this."""
        held = [getattr(self, name, None) for name in ("positions", "scratch", "num_columns", "visible", "tokens")]
        return sum(tensor.untyped_storage().nbytes() for tensor in held if tensor is not None)

    def mask(self, given: Tensor | None) -> Tensor:
        """The mask of a step, for ``given`` ``[batch_size, columns]`` bool, which says the same or is refused."""
        if given is None:
            if self.padded:
                raise ValueError(f"no attention mask was given: {HIDES}")
            return self.visible
        if len(given) != len(self.positions):
            return self.visible  # update() says what is wrong
        length = given.shape[1]
        if length > self.columns:
            raise ValueError(f"{FULL}: it was made for max_seq_len {self.max_seq_len}")
        same = given.all() if self.tokens is None else (given == self.tokens[:, :length]).all()
        other = ~same | (self.num_columns != length - 1)
        if given.is_cuda or torch.compiler.is_compiling():
            torch._assert_async(~other, HIDES)  # without waiting for the device, which stops with the message
        elif other:
            raise ValueError(HIDES)
        return self.visible


class StepLength(Length):
    """The mask length of a step: always that of a full cache.  The mask function finds ``counts`` here."""

    counts: Any
    """:class:`Counts`."""
    chunk: int = 0
    """Tokens of a chunk, where the layer has chunks."""

    @classmethod
    def of(cls, counts: Counts, length: int, chunk: int = 0) -> StepLength:
        """``length`` columns, by whose mask ``counts`` goes."""
        out = cls(length)
        out.counts, out.chunk = counts, chunk
        return out

    def mask(self, given: Tensor | None) -> Tensor:
        """The step's, for ``given`` as :meth:`Counts.mask`; of a chunk ``[batch_size, 1, 1, chunk]``: a query sees the
        tokens since the last multiple of ``chunk``, which are the newest of those kept."""
        visible = self.counts.mask(given)
        if not self.chunk:
            return visible
        at, positions = torch.arange(self.chunk, device=visible.device), self.counts.positions[:, None, None, None]
        return visible & (at >= self.chunk - 1 - positions % self.chunk)


class StepCounts(Counts):
    """What the steps of a cache count, on the device and on the host."""

    steps: Steps
    """For :meth:`Layer.step`."""
    counter: Layer
    """The layer that says how a step changes the tokens held: all count alike."""

    def __init__(self, method: Method, max_seq_len: int | None) -> None:
        super().__init__(method, max_seq_len or 0)
        self.is_fixed = max_seq_len is not None
        self.layers: Sequence[CacheLayer] = ()
        """The packed ones."""
        self.exact: Sequence[Any] = ()
        """Those with a window or a state, which stay as they are."""
        self.replayed = 0
        """Columns that came by replays of a graph, ever."""
        self.clear_from = 0
        """Columns from which on no window reaches back to padding."""
        self.ahead = 0
        """Columns that the layers' books do not know of."""
        self.longest = 0
        """Tokens that the longest row has seen, in those books."""
        self.expected = 0
        """Columns that ``generate()`` will need at the most."""
        self.tracing = False
        """Whether a CUDA graph of the step is being captured: nothing runs, and what changes from step to step lies on
        the device."""
        self.addresses: tuple[int, ...] = ()
        """Of all that a step reads and writes."""
        self.is_split = False
        """Whether padding lies between a row's tokens."""
        self.at_once = 1
        """Tokens a row that the forward under way brings, if it is a step."""
        self.partial: list[Any] = []
        """Layers that have stored the step under way, which is counted once the last one has."""

    def write(self, store: Layer, num_q_heads: int, num_columns: int, columns: Columns) -> None:
        self.longest, self.ahead, self.counter = max(store.seq_lengths), 0, store
        self.max_seq_len = store.num_provided
        super().write(store, num_q_heads, num_columns, columns)
        padded_to = max((row[-1].stop for row in columns.padding if row), default=0)
        windows = [layer.sliding_window for layer in self.exact if hasattr(layer, "sliding_window")]
        self.clear_from = padded_to + max(windows) if padded_to and windows else 0
        self.steps = Steps(self.positions, self.positions, self.scratch, store.most_held)
        self.is_split = columns.is_split
        self.started = min(store.row_lengths) > 0  # a row without a token may be given padding
        stores = [layer.store for layer in self.layers if layer.is_initialized]
        held = [tensor for one in stores for tensor in one.tensors.values()]
        here = self.positions, self.scratch, self.num_columns, self.visible
        self.addresses = (*(tensor.data_ptr() for tensor in (*held, *here)), store.most_held)

    @property
    def kind(self) -> tuple[object, ...]:
        """What kernels of a step are compiled for, besides its arguments."""
        return (self.method, self.dtype, str(self.positions.device), self.max_seq_len, self.steps.num_tokens)

    @property
    def is_fixed_beside(self) -> bool:
        """Whether what lies beside the packed layers stays where it is."""
        return not self.moves_beside

    @property
    def moves_beside(self) -> str:
        """Why what lies beside the packed layers does not stay where it is, or is no window of tokens alone, in words;
        empty where it does."""
        if not self.exact:
            return ""
        if any(layer.record_past for layer in self.exact):
            return "while windows and states record what could come back"
        if not all(getattr(layer, "is_full", True) for layer in self.exact):
            return "until windows are full"
        if self.is_split and any(getattr(layer, "chunk", 0) for layer in self.exact):
            return "with padding between tokens, which chunks count"
        cleared = self.layers[-1].num_columns + self.ahead + 1 >= self.clear_from
        return "" if cleared else "until windows have let go of padding"

    @property
    def addresses_beside(self) -> tuple[int, ...]:
        """Of windows and states."""
        out: list[int] = []
        for layer in self.exact:
            if hasattr(layer, "addresses"):
                out += layer.addresses
            else:
                states = (*layer.conv_states.values(), *layer.recurrent_states.values())
                out += [state.data_ptr() for state in states if state is not None]
        return tuple(out)

    def mask(self, given: Tensor | None) -> Tensor:
        if self.tracing or self.at_once > 1:  # of several tokens :meth:`step_of` has looked at it
            return self.visible
        return super().mask(given)

    def check(self, given: Tensor | None) -> None:
        """What :meth:`mask` makes sure of, in as few launches as it takes: the host knows the columns held."""
        if self.at_once > 1:
            return
        if given is None:
            if self.padded:
                raise ValueError(f"no attention mask was given: {HIDES}")
            return
        length = self.layers[-1].num_columns + self.ahead + 1
        if given.shape != (len(self.positions), length):
            raise ValueError(f"attention mask of shape {list(given.shape)}: allowed is {[len(self.positions), length]}")
        torch._assert_async(self._agrees(given).all(), HIDES)  # nothing waits for the device, which stops with it

    def _agrees(self, given: Tensor) -> Tensor:
        """Where a mask ``[batch_size, columns]`` says of tokens and padding what the cache knows."""
        return given if self.tokens is None else given.bool() == self.tokens[:, : given.shape[1]]

    @property
    def _most_at_once(self) -> int:
        """Tokens a row that one step brings at the most."""
        return min(layer.store.most_at_once for layer in self.layers if layer.is_initialized)

    def step_of(self, ids: Tensor, mask: Tensor | None) -> int:
        """How many tokens a row ``ids [batch_size, L, ...]`` bring as one step: L where it takes as many and ``mask
        [batch_size, columns]`` shows them all, which the host waits for; else 1, and several are the host's to plan."""
        length = ids.shape[1] if ids.ndim > 1 else 1
        if length == 1 or self.exact or not self.started or len(ids) != len(self.positions):
            return 1
        if ids.device != self.positions.device or length > self._most_at_once:
            return 1
        if mask is None:
            return 1 if self.padded else length
        columns = self.layers[-1].num_columns + self.ahead + length
        if mask.shape != (len(ids), columns) or (self.tokens is not None and columns > self.tokens.shape[1]):
            return 1
        return length if bool(self._agrees(mask.to(ids.device)).all()) else 1

    def takes(self, key: Tensor) -> bool:
        """Whether ``key [batch_size, num_kv_heads, L, key_dim]`` is one step of each row held."""
        same = self.started and key.shape[2] == self.at_once and key.dtype == self.dtype
        return same and key.shape[0] == len(self.positions) and key.device == self.positions.device

    def settle(self) -> None:
        """Brings the layers' books up to date."""
        ahead, self.ahead = self.ahead, 0
        for layer in self.layers if ahead else ():
            layer.num_columns += ahead
            layer.advance_store(ahead)
        self.longest += ahead

    def make_room(self) -> None:
        """Provides for one more step.  Raises ``ValueError`` where ``max_seq_len`` does not, and for padding
        between the tokens of a packed window."""
        last = self.layers[-1]
        if self.is_split and last.window:
            last.columns.check_window(last.num_columns + self.ahead + self.at_once, last.window)
        needed = self.longest + self.ahead + self.at_once
        if needed <= self.max_seq_len:
            return
        self.settle()
        self.provide(needed)
        self.write(last.store, last.num_q_heads, last.num_columns, last.columns)

    def provide(self, needed: int) -> None:
        """Makes every layer provide for ``needed`` tokens a row, and for more that are to be expected."""
        with torch.inference_mode(False), torch.no_grad():
            for layer in self.layers:
                if layer.is_initialized:
                    layer.store.provide(self.capacity(needed, layer.num_columns - self.longest))

    def capacity(self, needed: int, padding: int = 0) -> int:
        """Tokens a row to provide for where ``needed`` are wanted now, of which ``padding`` columns are none."""
        if self.is_fixed:
            return needed
        if self.expected - padding >= needed:
            return min(self.expected - padding, needed + max(AHEAD, needed // 2))
        return needed + (max(GROWTH, needed // 4) if self.started else 0)

    def stepped(self) -> None:
        """Every layer has stored one more step."""
        if self.at_once == 1:
            self.counter.count_step(self.positions)
        else:
            self.positions.add_(self.at_once)
        self.num_columns.add_(self.at_once)
        for layer in self.partial:
            layer.under_way = 0
        self.partial = []
        if not self.tracing:
            self.ahead += self.at_once

    def replay(self) -> None:
        """A graph has stored one more step in every layer, and counted on the device alone."""
        self.ahead += self.at_once
        self.replayed += self.at_once

    def take_back(self, num_columns: int) -> None:
        """Every row's newest ``num_columns`` columns, all of them tokens, were taken back in the layers' books."""
        self.longest -= num_columns
        with torch.inference_mode(False), torch.no_grad():
            self.positions.sub_(num_columns)
            self.num_columns.sub_(num_columns)

    def end_partial(self, raised: bool) -> None:
        """A forward ended, or ``raised``, before its last layer: where it raised in a step of one token, that will be
        run again, which stores the token in the same place.  Of several each layer has counted its own."""
        partial, self.partial = self.partial, []
        if not raised:
            self.settle()
        for layer in partial:
            if not raised or layer.advanced or layer.under_way > 1:
                layer.num_columns += layer.under_way
                layer.advance_store(layer.under_way)
            layer.under_way = 0

    def reset(self) -> None:
        self.started, self.ahead, self.longest, self.partial = False, 0, 0, []
