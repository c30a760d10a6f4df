"""A cache whose decode step ``torch.compile`` takes whole, so that stock ``generate()`` compiles it by itself.

What a step counts lies in device memory (:class:`Counts`), its sizes never change, and storing and attending are one
custom operator over :meth:`Layer.step`: no graph breaks, and nothing to compile anew as rows grow.  Everything else
(the prompt, several tokens at once, beams, crops) runs uncompiled, as :mod:`kvruntime.hf.cache` does it, after the
host has caught up with the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kvruntime.hf.cache import Books, Cache, CacheLayer, Length, Pending
from kvruntime.hf.padding import HIDES, Columns
from kvruntime.methods import Layer, Steps, make_layer
from kvsim.layout import LayerShape, Method

FULL = "a row of the compiled cache is full"

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
    tokens: Tensor
    """``[batch_size, columns]`` bool: which columns hold a token, up to where the longest row is full."""

    def __init__(self, method: Method, max_seq_len: int) -> None:
        self.method, self.max_seq_len = repr(method), max_seq_len
        NAMED_METHODS[self.method] = method
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
            self.positions.copy_(torch.tensor(lengths, dtype=torch.int32))
            self.num_columns.fill_(num_columns)
            self.tokens = columns.tokens(num_columns + self.max_seq_len - max(lengths), device)
        self.padded, self.started = any(columns.padding), True

    def mask(self, given: Tensor | None) -> Tensor:
        """The mask of a step, for ``given`` ``[batch_size, columns]`` bool, which says the same or is refused."""
        if given is None:
            if self.padded:
                raise ValueError(f"no attention mask was given: {HIDES}")
            return self.visible
        if len(given) != len(self.tokens):
            return self.visible  # update() says what is wrong
        length = given.shape[1]
        if length > self.tokens.shape[1]:
            raise ValueError(f"{FULL}: it was made for max_seq_len {self.max_seq_len}")
        other = (given != self.tokens[:, :length]).any() | (self.num_columns != length - 1)
        if given.is_cuda or torch.compiler.is_compiling():
            torch._assert_async(~other, HIDES)  # without waiting for the device, which stops with the message
        elif other:
            raise ValueError(HIDES)
        return self.visible


class StepLength(Length):
    """The mask length of a step: always that of a full cache.  The mask function finds ``counts`` here."""

    counts: Counts


class CompiledLayer(CacheLayer):
    """One layer as transformers sees it, of which one token a row is a step on the device."""

    is_compileable = True
    max_seq_len: int

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
        return Pending(self, key_states, longest, steps), Pending(self, value_states, longest, steps)

    @torch.compiler.disable
    def _update(self, key_states: Tensor, value_states: Tensor) -> tuple[Any, Any]:
        if self.counts.started:
            self.catch_up()
        return super().update(key_states, value_states)

    def catch_up(self) -> None:
        """The host's books become the device's counts."""
        self.num_columns = int(self.counts.num_columns)
        self.store.catch_up(self.counts.positions)

    def read(self) -> tuple[Tensor, Tensor]:
        if self.counts.started:
            self.catch_up()
        return super().read()

    def append(self, key: Tensor, value: Tensor, lengths: list[int] | None, query: Tensor | None = None) -> None:
        super().append(key, value, lengths, query)
        if self.is_last:
            self.counts.dtype = self.dtype
            self.counts.write(self.store, self.num_q_heads, self.num_columns, self.columns)

    def step(self, query: Tensor, key: Tensor, value: Tensor, scale: float, steps: Counts) -> Tensor:
        longest = steps.max_seq_len
        held = self.tensors, self.constants, steps.positions, steps.scratch
        out = step(query, key, value, *held, steps.method, scale, longest)
        if self.is_last:
            torch._assert_async((steps.positions < longest).all(), FULL)
            steps.positions.add_(1)
            steps.num_columns.add_(1)
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
