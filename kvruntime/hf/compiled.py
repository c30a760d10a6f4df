"""A cache whose decode step ``torch.compile`` takes whole, so that stock ``generate()`` compiles it by itself.

What a step counts lies in device memory (:mod:`kvruntime.hf.counts`), its sizes never change, and storing and
attending are one custom operator over :meth:`Layer.step`: no graph breaks, and nothing to compile anew as rows grow.
Everything else (the prompt, several tokens at once, beams, crops) runs uncompiled, as :mod:`kvruntime.hf.cache` does
it, after the host has caught up with the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kvruntime.hf.cache import Books, Cache, CacheLayer, Length, PendingUpdate
from kvruntime.hf.counts import FULL, Counts, StepLength
from kvruntime.kernels.reference import PLAIN, Scores
from kvruntime.methods import Steps, make_layer
from kvsim.layout import LayerShape, Method

NAMED_METHODS: dict[str, Method] = {}
"""The methods of the compiled caches made so far by their ``repr``: an operator takes text, not objects."""


@torch.library.custom_op("kvruntime::step", mutates_args=("tensors", "scratch"))
def step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tensors: list[Tensor],
    shared: list[Tensor],
    lengths: Tensor,
    scratch: Tensor,
    method: str,
    scale: float,
    max_seq_len: int,
) -> Tensor:
    """:meth:`Layer.step` over a layer's ``tensors``, in the order of ``method.buffers``, and what layers share.

    ``method`` is its ``repr``; the query and the key have their rotary embedding already.
    """
    shape = LayerShape(key.shape[1], key.shape[3], value.shape[3])
    layer = make_layer(NAMED_METHODS[method], shape, key.shape[0], max_seq_len, torch.device("meta"))
    layer.tensors, layer.device = dict(zip(layer.tensors, tensors, strict=True)), query.device
    layer.shared = dict(zip(layer.shared, shared, strict=True))
    if not query.is_cuda:  # there the host plans the step
        layer.catch_up(lengths)
    steps = Steps(lengths, lengths, scratch, max_seq_len)
    return layer.step(query, key, value, scale, steps).contiguous()


@step.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *args: object) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[3])


class CompiledLayer(CacheLayer):
    """One layer as transformers sees it, of which one token a row is a step on the device."""

    is_compileable = True
    max_seq_len: int
    turn = -1
    """Of the step that was last stored here, by ``Counts.turn``."""

    def __init__(self, method: Method, books: Books, max_seq_len: int, counts: Counts, is_last: bool) -> None:
        super().__init__(method, books, max_seq_len)
        self.counts, self.is_last = counts, is_last
        self.step_length = StepLength(max_seq_len)
        self.step_length.counts = counts

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.mark()

    def mark(self) -> None:
        """The buffers stay where they are: a CUDA graph need not copy them."""
        self.tensors, self.constants = list(self.store.tensors.values()), list(self.store.shared.values())
        for tensor in (*self.tensors, *self.constants):
            torch._dynamo.mark_static_address(tensor, guard=False)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if not args:  # from outside a model
            return self._update(key_states, value_states)
        steps: Counts = args[0]  # not self.counts: torch.compile would check for each layer that they are the same
        if not steps.started or key_states.shape[2] > 1 or key_states.shape[0] != len(steps.positions):
            return self._update(key_states, value_states)
        if key_states.dtype != steps.dtype:
            return self._update(key_states, value_states)  # says what is wrong
        longest = steps.max_seq_len
        return PendingUpdate(self, key_states, longest, steps), PendingUpdate(self, value_states, longest, steps)

    @torch.compiler.disable
    def _update(self, key_states: Tensor, value_states: Tensor) -> tuple[Any, Any]:
        if self.counts.started:
            self.catch_up()
        return super().update(key_states, value_states)

    def catch_up(self) -> None:
        """The host's books become the device's counts."""
        self.num_columns = int(self.counts.num_columns)
        self.store.catch_up(self.counts.positions)

    def settle(self) -> None:
        if self.counts.started:
            self.catch_up()

    def read(self) -> tuple[Tensor, Tensor]:
        """As :meth:`CacheLayer.read`; between two layers of a step its token too.  The host's count of columns stays
        behind, as that of every other layer does."""
        held, counts = self.num_columns, self.counts
        if counts.started and held <= int(counts.num_columns):  # else in the middle of a forward that the host plans
            under_way = int(self.turn == counts.turn)
            self.num_columns = int(counts.num_columns) + under_way
            self.store.catch_up(counts.positions + under_way)
        try:
            return super().read()
        finally:
            self.num_columns = held

    def append(self, key: Tensor, value: Tensor, lengths: list[int] | None, query: Tensor | None = None) -> None:
        super().append(key, value, lengths, query)
        self.turn = -1  # a step that was cut before its last layer is none of the next ones
        if self.is_last:
            self.counts.dtype = self.dtype
            self.counts.write(self.store, self.num_q_heads, self.num_columns, self.columns)

    def step(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, steps: Counts, scores: Scores = PLAIN
    ) -> Tensor:
        if not scores.is_plain:
            raise ValueError("attention with sinks or a softcap: allowed without compiled=True")
        longest = steps.max_seq_len
        held = self.tensors, self.constants, steps.positions, steps.scratch
        out = step(query, key, value, *held, steps.method, scale, longest)
        if self.is_last:
            torch._assert_async((steps.positions < longest).all(), FULL)
            steps.positions.add_(1)
            steps.num_columns.add_(1)
        if not torch.compiler.is_compiling():
            self.turn = steps.turn
            steps.turn += self.is_last
        return out

    def get_seq_length(self) -> Any:
        """The columns held; where ``torch.compile`` traces, a tensor."""
        if not self.counts.started:
            return self.num_columns
        return self.counts.num_columns if torch.compiler.is_compiling() else int(self.counts.num_columns)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.counts.started and query_length == 1 and self.forward.running:
            return self.step_length, 0
        length = self.get_seq_length() + query_length
        return Length(length) if query_length == 1 else length, 0  # PyTorch 2.11 cannot trace the making of a Length

    def reset(self) -> None:
        self.counts.started = False
        super().reset()


class CompiledCache(Cache):
    """The cache that ``make_cache(..., compiled=True)`` returns."""

    layers: list[CompiledLayer]  # type: ignore[assignment]
    max_seq_len: int

    def __init__(self, method: Method, num_layers: int, max_seq_len: int) -> None:
        self.counts = Counts(method, max_seq_len)
        NAMED_METHODS[self.counts.method] = method
        super().__init__(method, num_layers, max_seq_len)

    def _make_layers(self, num_layers: int) -> list[CacheLayer]:
        last = num_layers - 1
        return [
            CompiledLayer(self.method, self._books, self.max_seq_len, self.counts, index == last)
            for index in range(num_layers)
        ]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        counts = (self.counts,) if self.forward.running else ()
        out: tuple[Any, Any] = super().update(key_states, value_states, layer_idx, *counts)
        return out

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        NAMED_METHODS[self.counts.method] = self.method

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
        started = self.counts.started
        if started:
            for layer in self.layers:
                layer.catch_up()
        yield
        if started:
            for layer in self.layers:
                layer.mark()
            last = self.layers[-1]
            self.counts.write(last.store, last.num_q_heads, last.num_columns, self.columns)
