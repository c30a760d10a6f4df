"""A cache whose decode step decides nothing on the host: the one that ``make_cache`` gives on a GPU.

One token a row is stored and attended to by kernels that read each row's length in device memory
(:meth:`Layer.step`), so that a CUDA graph may hold the model's whole step (:mod:`kvruntime.hf.graphs`).  The host keeps
its books by counting steps.  Everything else (the prompt, several tokens at once, beams, crops) is planned by the host,
as :mod:`kvruntime.hf.cache` does it, after its books were brought up to date.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kvruntime.hf.cache import UNCOMPILED, AppendQueue, Books, Cache, CacheLayer, Length, PendingUpdate
from kvruntime.hf.counts import StepCounts, StepLength
from kvruntime.hf.graphs import Graphs
from kvruntime.kernels.reference import PLAIN, Scores
from kvruntime.methods import Layer
from kvsim.layout import LayerShape, Method


class SteppedLayer(CacheLayer):
    """One layer as transformers sees it, of which one token a row is a step on the device."""

    heads = 0, 0, 0
    """Key and value heads, and the sizes of each."""

    def __init__(
        self, method: Method, books: Books, max_seq_len: int | None, counts: StepCounts, is_last: bool
    ) -> None:
        super().__init__(method, books, max_seq_len)
        self.counts, self.is_last = counts, is_last

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        run = _update_uncompiled if torch.compiler.is_compiling() else SteppedLayer._update
        return run(self, key_states, value_states)

    def _update(self, key_states: Tensor, value_states: Tensor) -> tuple[Any, Any]:
        counts, shape = self.counts, key_states.shape
        heads = shape[1], shape[3], value_states.shape[3]
        if self.forward.running and counts.takes(key_states) and heads == self.heads:
            counts.make_room()
            self.pending = True
            columns = self.num_columns + counts.ahead + 1
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
            needed = max(self.store.row_lengths) + (key.shape[2] if lengths is None else max(lengths))
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
        out = self.store.step(query, key, value, scale, steps.steps, scores=scores)
        self.pending = False
        if self.is_last:
            steps.stepped()
        return out

    def settle(self) -> None:
        self.counts.settle()

    def read(self) -> tuple[Tensor, Tensor]:
        self.settle()
        return super().read()

    def get_seq_length(self) -> Any:
        """The columns held; while a graph is captured, a tensor."""
        counts = self.counts
        return counts.num_columns if counts.tracing else self.num_columns + counts.ahead

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        counts = self.counts
        length = self.num_columns + counts.ahead + query_length
        if torch.compiler.is_compiling():
            return length, 0
        if counts.started and query_length == 1 and self.forward.running:
            counts.make_room()
            step_length = StepLength(length)
            step_length.counts = counts
            return step_length, 0
        return Length(length), 0

    def reset(self) -> None:
        self.counts.reset()
        super().reset()


_update_uncompiled = torch.compiler.disable(SteppedLayer._update, reason=UNCOMPILED)


class SteppedCache(Cache):
    """The cache that ``make_cache`` returns for a model on a GPU."""

    layers: list[SteppedLayer]  # type: ignore[assignment]

    def __init__(self, method: Method, num_layers: int, max_seq_len: int | None = None) -> None:
        self.counts = StepCounts(method, max_seq_len)
        self.graphs = Graphs(self.counts)
        super().__init__(method, num_layers, max_seq_len)
        self.counts.layers = self.layers

    def _make_layers(self, num_layers: int) -> list[CacheLayer]:
        last = num_layers - 1
        return [
            SteppedLayer(self.method, self._books, self.max_seq_len, self.counts, index == last)
            for index in range(num_layers)
        ]

    def hold(self) -> None:
        """A first prompt's keys and values are stored together: a launch of each layer's own costs the host more."""
        self.let_go()  # what an interrupt left
        if torch.compiler.is_compiling() or self.counts.tracing or self.counts.started:
            return
        if any(layer.num_columns or layer.pending for layer in self.layers):
            return
        held = AppendQueue()
        for layer in self.layers:
            layer.held = held

    def let_go(self) -> None:
        last = self.layers[-1]
        held = last.held
        if held is None:
            return
        for layer in self.layers:
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

    def reorder_cache(self, beam_idx: Tensor) -> None:
        with self._host():
            super().reorder_cache(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        with self._host():
            super().crop(tokens_to_remove)

    @contextmanager
    def _host(self) -> Iterator[None]:
        """The host's books are right inside, and the device's afterwards."""
        self.forward.check(self.layers)
        self.counts.settle()
        yield
        if self.counts.started:
            last = self.layers[-1]
            self.counts.write(last.store, last.num_q_heads, last.num_columns, self.columns)
