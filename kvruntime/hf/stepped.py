"""A cache whose decode step decides nothing on the host: the one that ``make_cache`` gives on a GPU.

One token a row is stored and attended to by kernels that read each row's length in device memory
(:meth:`Layer.step`), so that a CUDA graph may hold the model's whole step (:mod:`kvruntime.hf.graphs`).  So are the
few tokens a row that assisted decoding checks at once, where the method's step takes several.  The host keeps its
books by counting them.  Everything else (the prompt, longer chunks, beams, crops) is planned by the host, as
:mod:`kvruntime.hf.cache` does it, after its books were brought up to date.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionCacheLayerMixin, LinearAttentionLayer

from kvruntime.hf.cache import (
    UNCOMPILED,
    AppendQueue,
    Books,
    Cache,
    CacheLayer,
    HybridLayer,
    Length,
    PendingUpdate,
    filled,
    num_removed,
    told,
)
from kvruntime.hf.counts import StepCounts, StepLength
from kvruntime.hf.exact import PACKED, ExactPart, Kind, WindowLayer, made
from kvruntime.hf.graphs import Graphs
from kvruntime.kernels.reference import PLAIN, Scores
from kvruntime.methods import Layer
from kvsim.layout import LayerShape, Method
from kvsim.methods.evict import windowed


class SteppedLayer(CacheLayer):
    """One layer as transformers sees it, of which one token a row, or a few, are a step on the device."""

    heads = 0, 0, 0
    """Key and value heads, and the sizes of each."""
    under_way = 0
    """Tokens a row that this layer has stored of the step under way, which no book counts yet."""
    advanced = 0
    """Of these, what the host's books of ``store`` count all the same, because they were read."""

    def __init__(
        self, method: Method, books: Books, max_seq_len: int | None, counts: StepCounts, is_last: bool
    ) -> None:
        super().__init__(method, books, max_seq_len)
        self.counts, self.is_last = counts, is_last

    @property
    def ahead(self) -> int:  # type: ignore[override]
        return self.counts.ahead

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        run = _update_uncompiled if torch.compiler.is_compiling() else SteppedLayer._update
        return run(self, key_states, value_states)

    def _update(self, key_states: Tensor, value_states: Tensor) -> tuple[Any, Any]:
        counts, shape = self.counts, key_states.shape
        heads = shape[1], shape[3], value_states.shape[3]
        if self.forward.running and counts.takes(key_states) and heads == self.heads:
            counts.make_room()
            self.pending = True
            columns = self.num_columns + counts.ahead + counts.at_once
            return PendingUpdate(self, key_states, columns, counts), PendingUpdate(self, value_states, columns, counts)
        counts.settle()
        return super().update(key_states, value_states)

    def make_store(self, shape: LayerShape, batch_size: int, device: torch.device) -> None:
        super().make_store(shape, batch_size, device)
        self.heads = shape.num_kv_heads, shape.key_dim, shape.value_dim

    def append(self, key: Tensor, value: Tensor, lengths: list[int] | None, query: Tensor | None = None) -> None:
        counts = self.counts
        counts.settle()
        self.provide(key, lengths)
        super().append(key, value, lengths, query)
        if self.is_last and self.num_q_heads:  # of what no forward brought, the first step is the host's
            counts.dtype = self.dtype
            counts.write(self.store, self.num_q_heads, self.num_columns, self.columns)

    def append_first(self, key: Tensor, value: Tensor, lengths: list[int] | None, query: Tensor | None = None) -> None:
        self.provide(key, lengths)
        super().append_first(key, value, lengths, query)

    def provide(self, key: Tensor, lengths: list[int] | None) -> None:
        """Makes room for what a forward brings, and for what is to be expected after it."""
        if self.forward.running:
            needed = max(self.store.seq_lengths) + (key.shape[2] if lengths is None else max(lengths))
            padding = self.num_columns + key.shape[2] - needed
            with torch.inference_mode(False), torch.no_grad():
                self.store.provide(self.counts.capacity(needed, padding))

    def takes_mask(self, mask: Tensor | None) -> bool:
        """Whether a step was told all of ``mask``; a 4-D one of the caller's is the host's to read."""
        if mask is None or mask.shape[3] == 1:
            return True
        self.counts.settle()
        return False

    def step(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, steps: StepCounts, scores: Scores = PLAIN
    ) -> Tensor:
        if self.is_filled:
            shape = self.store.shape
            query = query if self.kind else filled(query, shape.key_dim)
            key, value = filled(key, shape.key_dim), filled(value, shape.value_dim)
        out = self.store.step(query, key, value, scale, steps.steps, scores=scores)
        if self.is_filled and not self.kind:
            assert self.shape is not None
            out = out[..., : self.shape.value_dim]
        self.pending = False
        if self.is_last:
            steps.stepped()
        elif not steps.tracing:
            self.under_way = steps.at_once
            steps.partial.append(self)
        return out

    def advance_store(self, num_tokens: int) -> None:
        """Enters so many tokens a row in the host's books of ``store``, where steps leave them behind."""
        if self.is_initialized and self.store.device.type == "cuda":
            self.store.advance(num_tokens - self.advanced)
        self.advanced = 0

    def settle(self) -> None:
        self.counts.settle()

    def read(self) -> tuple[Tensor, Tensor]:
        """As :meth:`CacheLayer.read`; between two layers of a forward what came in it too, as stock layers have it."""
        self.settle()
        if self.under_way and not self.advanced:
            self.advance_store(self.under_way)
            self.advanced = self.under_way
        self.num_columns += self.under_way
        try:
            return super().read()
        finally:
            self.num_columns -= self.under_way

    def get_seq_length(self) -> Any:
        """The columns held; while a graph is captured, a tensor."""
        counts = self.counts
        return counts.num_columns if counts.tracing else self.num_columns + counts.ahead

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        counts = self.counts
        length = self.num_columns + counts.ahead + query_length
        if torch.compiler.is_compiling():
            return length, 0
        if counts.started and query_length == counts.at_once and self.forward.running:
            counts.make_room()
            return StepLength.of(counts, length), 0
        own = Length(length)
        own.window = self.window
        return own, 0

    def reset(self) -> None:
        self.counts.reset()
        self.under_way = self.advanced = 0
        super().reset()


class SteppedHybrid(HybridLayer, SteppedLayer):  # type: ignore[misc]
    """A packed layer of steps beside a state, which transformers' layer writes in place."""

    def __init__(
        self, method: Method, books: Books, max_seq_len: int | None, counts: StepCounts, is_last: bool, num_states: int
    ) -> None:
        SteppedLayer.__init__(self, method, books, max_seq_len, counts, is_last)
        LinearAttentionLayer.__init__(self, number_of_states=num_states)

    def reset(self) -> None:
        SteppedLayer.reset(self)
        LinearAttentionLayer.__init__(self, number_of_states=self.number_of_states)


class SteppedWindow(WindowLayer):
    """A window that stays as it is, whose memory keeps its place once it is full, so that a graph may hold its step.

    ``rooms``: keys and values ``[batch_size, num_kv_heads, window, dim]`` of a full window, of which ``keys`` and
    ``values`` are all but the first token.
    """

    def __init__(self, window: int, counts: StepCounts, chunked: bool = False) -> None:
        self.counts, self.chunk = counts, window if chunked else 0
        self.rooms: dict[str, Tensor] = {}
        super().__init__(window)

    @property
    def cumulative_length(self) -> int:
        """Columns seen: those that came through ``update``, and those of replayed graphs."""
        return self._seen + self.counts.replayed

    @cumulative_length.setter
    def cumulative_length(self, to: int) -> None:
        self._seen = to - self.counts.replayed

    @property
    def is_full(self) -> bool:
        """Whether a step writes to memory that stays where it is."""
        return bool(self.rooms)

    @property
    def addresses(self) -> list[int]:
        """Of that memory."""
        return [room.data_ptr() for room in self.rooms.values()]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if not self.counts.tracing:
            if self.record_past:
                self.rooms = {}
            return super().update(key_states, value_states, *args, **kwargs)
        for name, new in (("keys", key_states), ("values", value_states)):
            room = self.rooms[name]
            room.copy_(torch.cat([room[:, :, 1:], new], 2))
        return self.rooms["keys"], self.rooms["values"]

    def _let_go(self) -> None:
        """Of the memory of tokens that have left the window: what a full one keeps goes to its room."""
        assert self.keys is not None
        if self.keys.shape[2] != self.sliding_window - 1 or self.sliding_window < 2:
            self.rooms = {}
            super()._let_go()
            return
        for name in ("keys", "values"):
            kept = getattr(self, name)
            shape = (*kept.shape[:2], self.sliding_window, kept.shape[3])
            room = self.rooms.get(name)
            if room is None or (room.shape, room.dtype, room.device) != (shape, kept.dtype, kept.device):
                with torch.inference_mode(False):  # a graph writes to it whatever the mode
                    room = self.rooms[name] = torch.empty(shape, dtype=kept.dtype, device=kept.device)
            room[:, :, 1:].copy_(kept)
            setattr(self, name, room[:, :, 1:])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        length, offset = super().get_mask_sizes(query_length)
        if torch.compiler.is_compiling() or not self.counts.layers[-1].forward.running:
            return length, offset
        if query_length == 1 and self.counts.started and self.counts.is_fixed_beside:
            return StepLength.of(self.counts, length, self.chunk), 0
        return length, offset

    def reset(self) -> None:
        self.rooms = {}
        super().reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.rooms = {}
        super().reorder_cache(beam_idx)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "rooms": {}}


_update_uncompiled = torch.compiler.disable(SteppedLayer._update, reason=UNCOMPILED)


class LastReference:
    """The layers and their counts hold each other: their memory goes with the cache, not at a collection.  Only a cache
    holds this, or a cache and its shallow copies, whose layers are the same."""

    def __init__(self, counts: StepCounts) -> None:
        self.counts = counts

    def __del__(self) -> None:
        counts = self.__dict__.get("counts")
        if counts is not None:
            counts.layers = counts.exact = ()


class SteppedCache(Cache):
    """The cache that ``make_cache`` returns for a model on a GPU."""

    def __init__(self, method: Method, layers: int | Sequence[Kind], max_seq_len: int | None = None) -> None:
        self.counts = StepCounts(method, max_seq_len)
        self.graphs = Graphs(self.counts)
        super().__init__(method, layers, max_seq_len)
        self.counts.layers = self.packed
        self.last = LastReference(self.counts)
        self._find_exact()

    def _find_exact(self) -> None:
        kinds = SteppedWindow, LinearAttentionCacheLayerMixin
        self.counts.exact = [layer for layer in self.layers if isinstance(layer, kinds)]

    def _make_layers(self, num_layers: int) -> list[Any]:
        kinds = self.kinds or [PACKED] * num_layers
        last = max(index for index, kind in enumerate(kinds) if kind is PACKED or kind.shape is not None)
        methods = self._methods(kinds)
        return [
            self._make_layer(kind, method, index == last)
            for index, (kind, method) in enumerate(zip(kinds, methods, strict=True))
        ]

    def _make_layer(self, kind: Kind, method: Method, is_last: bool = False) -> Any:
        more = method, self._books, self.max_seq_len, self.counts, is_last
        if kind is PACKED or not kind.keeps:
            method = windowed(method, kind.window) if kind.window else method
            return told(SteppedLayer(method, *more[1:]), kind)
        if kind.keeps is ExactPart.WINDOW:
            return SteppedWindow(kind.window, self.counts, kind.chunked)
        return made(kind) if kind.shape is None else SteppedHybrid(*more, kind.num_states)

    def hold(self) -> None:
        """A first prompt's keys and values are stored together: a launch of each layer's own costs the host more."""
        self.let_go(True)  # what an interrupt left
        if torch.compiler.is_compiling() or self.counts.tracing or self.counts.started:
            return
        packed = self.counts.layers
        if any(layer.num_columns or layer.pending for layer in packed):
            return
        held = AppendQueue()
        for layer in packed:
            layer.held = held

    def let_go(self, raised: bool = False) -> None:
        if self.counts.partial:
            self.counts.end_partial(raised)
        last = self.counts.layers[-1]
        held = last.held
        if held is None:
            return
        for layer in self.counts.layers:
            layer.held = None
        held.store()
        if last.num_columns:
            self.counts.dtype = last.dtype
            self.counts.write(last.store, last.num_q_heads, last.num_columns, self.columns)

    def expect(self, num_columns: int) -> None:
        """Columns that the next tokens will need at the most, as ``generate()`` knows."""
        self.counts.expected = int(num_columns)

    @property
    def stores(self) -> list[Layer]:
        """The layers' kvruntime objects, those that have been used, their books up to date."""
        self.counts.settle()
        return super().stores

    @property
    def steps(self) -> str:
        """How decode steps run, in a word or two for people."""
        return self.graphs.state

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, steps={self.steps})"

    def __getstate__(self) -> dict[str, Any]:
        self.counts.settle()
        return super().__getstate__()

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """The columns held, which every layer has seen; while a graph is captured, a tensor."""
        first = self.counts.layers[0]
        if layer_idx >= len(self.layers):
            return 0
        return first.get_seq_length() if first.is_initialized else super().get_seq_length(layer_idx)

    def reset(self) -> None:
        super().reset()
        self._find_exact()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        with self._host():
            super().reorder_cache(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """As :meth:`Cache.crop`.  Assisted decoding calls it after every step: of packed layers alone the device's
        counts are told in few launches, and nothing where no token is taken back."""
        count = num_removed(tokens_to_remove)
        if not self.counts.exact and not count:
            self.forward.check(self.layers)
        elif self._are_tokens(count):
            super().crop(-count)
            self.counts.take_back(count)
        else:
            with self._host():
                super().crop(-count)

    def _are_tokens(self, count: int) -> bool:
        """Whether the newest ``count`` columns are tokens of every row, and of none all; only packed layers have any.
        The host's books are right afterwards."""
        counts = self.counts
        if counts.exact or not counts.started or count < 0:
            return False
        counts.settle()
        last = counts.layers[-1]
        padded_to = max((row[-1].stop for row in self.columns.padding if row), default=0)
        return count < min(last.store.row_lengths) and padded_to <= last.num_columns - count

    @contextmanager
    def _host(self) -> Iterator[None]:
        """The host's books are right inside, and the device's afterwards."""
        self.forward.check(self.layers)
        self.counts.settle()
        yield
        if self.counts.started:
            last = self.counts.layers[-1]
            self.counts.write(last.store, last.num_q_heads, last.num_columns, self.columns)
