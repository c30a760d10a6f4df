"""What a method's room offers: its layer, and what the rest of the house asks of a method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from kvruntime.kernels.reference import PLAIN, Scores
from kvruntime.methods.rows import Fresh, Steps
from kvsim.layout import LayerShape, Method


class Layer(Protocol):
    """One attention layer's cache: what ``method.buffers(shape, batch_size, num_provided)`` lists, filled and read.

    :class:`kvruntime.methods.rows.Rows` has the books and the defaults; a method's layer adds ``append``, ``attend``,
    ``step`` and ``tokens``.
    """

    method: Any
    shape: LayerShape
    batch_size: int
    device: torch.device
    row_lengths: list[int]
    num_provided: int
    tensors: dict[str, Tensor]
    shared: dict[str, Tensor]
    num_layers: int
    last_queries: ClassVar[int | None]
    scales_queries: ClassVar[bool]

    @property
    def is_croppable(self) -> bool: ...
    @property
    def wants_query(self) -> bool: ...
    @property
    def has_steps(self) -> bool: ...
    @property
    def most_at_once(self) -> int: ...
    @property
    def prefers_steps(self) -> bool: ...
    @property
    def kernel(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def seq_lengths(self) -> list[int]: ...
    def append(
        self, key: Tensor, value: Tensor, lengths: list[int] | None = None, query: Tensor | None = None
    ) -> None: ...
    @staticmethod
    def append_all(held: Sequence[Any]) -> None: ...
    @classmethod
    def changes_scores(cls, device: torch.device) -> bool: ...
    def attend(self, query: Tensor, scale: float, fresh: Fresh | None = None, *, scores: Scores = PLAIN) -> Tensor: ...
    def step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        steps: Steps,
        rotary: tuple[Tensor, Tensor] | None = None,
        scores: Scores = PLAIN,
    ) -> Tensor: ...
    @property
    def most_held(self) -> int: ...
    def count_step(self, lengths: Tensor) -> None: ...
    def books(self) -> dict[str, Any]: ...
    def take_books(self, books: Mapping[str, Any]) -> None: ...
    def scratch(self, num_q_heads: int) -> Tensor: ...
    def advance(self, num_steps: int) -> None: ...
    def catch_up(self, lengths: Tensor) -> None: ...
    def tokens(self, row: int) -> tuple[Tensor, Tensor]: ...
    def forget(self, counts: Sequence[int], sink: int) -> None: ...
    def drop(self, blocks: Sequence[Tensor | None], sink: int) -> None: ...
    def provide(self, num_tokens: int) -> None: ...
    def reset(self) -> None: ...
    def reorder(self, index: Tensor) -> None: ...
    def check_crop(self, num_tokens: int) -> None: ...
    @staticmethod
    def crop_all(layers: Sequence[Any], num_tokens: int) -> None: ...
    def crop(self, num_tokens: int) -> None: ...


class Claims(NamedTuple):
    """The layouts of a method whose figures ``python -m validation`` records."""

    core: tuple[Method, ...]
    """Weighed on every model."""
    variants: tuple[Method, ...] = ()
    """Weighed besides on the first model."""
    judged: tuple[Method, ...] = ()
    """Timed, and scored on a text."""
    few: tuple[Method, ...] = ()
    """Fed token by token in a quick run; on a CPU run through ``generate()`` with the first model."""
    one: tuple[Method, ...] = ()
    """A quick run's ``core``; on CUDA run through ``generate()`` with every model after the first."""
    other: tuple[Method, ...] = ()
    """On a CPU run through ``generate()`` with further models."""


class PageShape(NamedTuple):
    """What one page of an engine's pool holds of one layer.

    A page of records holds one record a head, and a page of exact tokens keys and values of all heads.  Both lie in
    one pool, so the second has room for the most tokens, a power of two, that fit the first.  A method has records
    alone (each token is coded when it is stored), exact tokens alone, or both.
    """

    record_tokens: int
    """Tokens a record; 0 of a method whose tokens are all exact."""
    record_nbytes: int
    """Bytes of a page of records, all heads; 0 of a method whose tokens are all exact."""
    exact_tokens: int
    """Tokens a page of exact ones; 0 of a method that keeps none."""
    exact_nbytes: int
    """Bytes of those, all heads."""
    residual: int
    """Newest tokens that are exact at most; 0 of a method whose tokens all are, or none."""


class Pages(NamedTuple):
    """The pools of one layer.

    | tensor | shape |
    |---|---|
    | records | [pool_size, num_kv_heads, words] int32; None of a method whose tokens are all exact |
    | key, value | [pool_size, num_kv_heads, n, dim] of any strides but the last, 1: n exact tokens a page, n = 0 of a
    method that keeps none |
    """

    records: Tensor | None
    key: Tensor
    value: Tensor


class Batch(NamedTuple):
    """What one step of an engine brings, the same for every layer (:func:`kvruntime.paged.batch` makes it).

    | tensor | shape |
    |---|---|
    | starts | [batch_size + 1] int32: row b's tokens begin at starts[b] of the line of all rows' tokens |
    | lengths | [batch_size] int32: tokens of each row, those of this step among them |
    | before | [batch_size] int32: tokens of each row without them |
    | packed | [batch_size] int32: tokens in records that this step reads |
    | block_table | [batch_size, num_blocks] int32, or None: which page holds each record of a row |
    | exact_table | [batch_size, num_pages] int32: which page holds each n of a row's tokens; no pages where n = 0 |
    | slots | [tokens] int64: where each token of the line goes, page * n + place in it; below 0: nowhere |

    Of a method that keeps no exact tokens ``slots`` are places in pages of records, ``record_tokens`` for n.
    """

    starts: Tensor
    lengths: Tensor
    before: Tensor
    packed: Tensor
    block_table: Tensor | None
    exact_table: Tensor
    slots: Tensor
    most: int
    """The most tokens that a row brings, as the host knows it.  Where it is 1, token b of the line is row b's, and
    rows that bring none come last."""


class Room(NamedTuple):
    """What the rest of the house asks of a method; what a room lacks is refused by name where it is asked."""

    layer: Callable[..., Layer]
    """``layer(method, shape, batch_size, max_seq_len, device, shared)``; of a method that holds another also
    ``make=make_layer``, which makes the layer inside."""
    read_back: Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]
    """``(method, key, value)``, ``[batch_size, num_kv_heads, tokens, dim]`` each, to what attention should see of
    them, float32: by other code than the layer's, so that the one can judge the other."""
    examples: tuple[Method, ...]
    """The layouts that ``selfcheck`` exercises."""
    shared: Callable[[Any, Sequence[Any], torch.device], Mapping[str, Tensor]] | None = None
    """``(method, buffers, device)``: the tensors of ``method.shared_buffers``."""
    transients: Any = None
    """Sizes of the tensors beside the cache (:mod:`validation.claims.transients`)."""
    benched: tuple[Method, ...] = ()
    """The layouts that ``bench kernels`` times."""
    measures: Any = None
    """What the benchmarks measure besides (:mod:`kvruntime.methods.kivi.benched` has all of it)."""
    splits: Callable[[Any, Tensor], int] | None = None
    """``(layer, query)``: how many ways the kernel splits the tokens."""
    claims: Claims | None = None
    """The layouts whose figures are recorded; ``None``: the examples, in every run."""
    paged: Any = None
    """``page_shape``, ``packed_tokens`` and the reference and kernels of :mod:`kvruntime.paged`; None: it fits no pages
    (:func:`kvruntime.paged.check` says why)."""
    unpaged: str = "what a row holds is no function of its length"
    """Why it fits no pages, where ``paged`` is None."""
