"""One attention layer's KIVI cache: the tensors of ``Kivi.buffers``, filled and read.

On CUDA the Triton kernels run, elsewhere the PyTorch reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvruntime.kernels.reference import PLAIN, Scores, embedded
from kvruntime.methods.kivi import reference
from kvruntime.methods.rows import Rows, Steps, staying
from kvsim.layout import LayerShape
from kvsim.methods.kivi import Kivi

MOST_AT_ONCE = 32
"""Tokens a row that a step takes: more than candidates that are drafted for one are."""
UNEVEN = 1.25
"""Rows whose lengths differ by more share one line of work (``fast.attend``'s ``equal_shares``)."""


class KiviLayer(Rows):
    """Keys and values of ``batch_size`` rows in one layer: packed records, and exact tokens beside them."""

    ROW_AXES: ClassVar[dict[str, int]] = {"lengths": 1, "key_params": 1}
    last_queries: ClassVar[int | None] = reference.WEIGHING
    scales_queries: ClassVar[bool] = False  # they are compared with each other

    method: Kivi

    def __init__(self, method: Kivi, shape: LayerShape, batch_size: int, *args: Any, **kwargs: Any) -> None:
        self.record = method.record(shape)
        self.row_packed = [0] * batch_size
        super().__init__(method, shape, batch_size, *args, **kwargs)

    @property
    def is_croppable(self) -> bool:
        """Some newest tokens are always exact, ``residual_length`` less a record: as many may be taken back."""
        return self.method.residual_length > self.record.num_tokens

    @property
    def kernel(self) -> str:
        """What attends to one query a row: the PyTorch reference, the portable Triton kernel,
        or the tensor-core one."""
        if self.device.type != "cuda":
            return "PyTorch reference"
        takes = _fast() is not None and _kernels("fast_plan").holds(self.record)
        return "Triton, tensor cores" if takes else "Triton, portable"

    def append(self, key: Tensor, value: Tensor, lengths: list[int] | None = None, query: Tensor | None = None) -> None:
        """Store ``key [batch_size, num_kv_heads, L, key_dim]`` and ``value`` alike.

        ``lengths``: row b's real tokens are the last ``lengths[b]`` of the L (the rest is left padding, which is
        not stored); ``None`` takes all.  ``query [batch_size, num_q_heads, N, key_dim]``: a prompt's of the last N of
        the L, where channels are boosted; those of the last :attr:`last_queries` are looked at.
        """
        counts = self.make_room(key, lengths, value)
        weighs = query is not None and query.shape[2] > 1 and self.wants_query
        self._store(key, value, counts, query=query if weighs else None)
        self._count(counts)

    @property
    def wants_query(self) -> bool:  # type: ignore[override]
        """Whether a prompt's queries say what key channels weigh: of boosted ones, before anything is packed."""
        return self.record.boosted > 0 and not any(self.row_packed)

    @staticmethod
    def append_all(held: Sequence[tuple[Any, ...]]) -> None:
        """:meth:`append` of each; on CUDA, layers that are alike in all but their contents share the launches."""
        addresses = _addresses(held)
        if addresses is None:
            Rows.append_all(held)
            return
        first, key, value, lengths, *_ = held[0]
        counts = first.make_room(key, lengths, value)
        first._store(key, value, counts, layers=addresses)
        first._count(counts)
        rest = [layer for layer, *_ in held[1:]]
        for layer in rest:
            layer.row_lengths, layer.row_packed = list(first.row_lengths), list(first.row_packed)
        torch._foreach_copy_([layer.tensors["lengths"] for layer in rest], [first.tensors["lengths"]] * len(rest))

    @property
    def layout(self) -> reference.Layout:
        return reference.Layout(self.record, self.method.sink_length, self.method.residual_length)

    def stored(self) -> reference.Stored:
        """What the kernels are told that this layer holds."""
        held = self.tensors
        lengths, packed = held["lengths"]
        exact_key, exact_value = held["exact_key"], held["exact_value"]
        return reference.Stored(
            held["records"],
            exact_key,
            exact_value,
            lengths,
            packed,
            held.get("key_params"),
            key_order=held.get("key_order"),
        )

    def _store(self, key: Tensor, value: Tensor, counts: list[int], **more: Tensor | None) -> None:
        store = _kernels("append").append if key.is_cuda else reference.append
        store(key, value, counts, self.stored(), self.layout, (self.row_lengths, self.row_packed), **more)

    def _count(self, counts: list[int]) -> None:
        """Enter ``counts`` stored tokens a row in the books, here and on the device."""
        states = list(zip(self.row_lengths, self.row_packed, counts, strict=True))
        plans = {state: self._flushed(*state) for state in set(states)}  # rows are mostly alike
        self.row_lengths = [n + count for n, count in zip(self.row_lengths, counts, strict=True)]
        self._write_lengths([plans[state] for state in states])

    def _flushed(self, length: int, packed: int, count: int) -> int:
        method = self.method
        return reference.flush_plan(
            length, packed, count, self.record.num_tokens, method.sink_length, method.residual_length
        )

    def _write_lengths(self, packed: list[int]) -> None:
        """Tell the device the rows' lengths, and their packed tokens where those changed."""
        lengths = self.tensors["lengths"]
        _write(lengths[0], self.row_lengths)
        if packed != self.row_packed:
            _write(lengths[1], packed)
            self._unweigh([row for row, count in enumerate(packed) if count == 0 < self.row_packed[row]])
        self.row_packed = packed

    def _unweigh(self, rows: list[int] | slice) -> None:
        """``rows`` hold no record any more: their order of channels is no weight of channels."""
        if rows and self.record.boosted:
            self.tensors["key_order"][rows] = 0

    def attend(
        self,
        query: Tensor,
        scale: float,
        fresh: tuple[Tensor, Tensor, list[int] | None] | None = None,
        arrivals: Tensor | None = None,
        scores: Scores = PLAIN,
    ) -> Tensor:
        """Attention of ``query [batch_size, num_q_heads, L, key_dim]`` over what is stored.

        ``fresh``: ``(key, value, lengths)`` of L tokens not yet stored, which query i sees up to and with its own;
        without it L must be 1.  ``arrivals [2 * batch_size * num_q_heads]``: int32 zeros, scratch of one stream's
        calls, with which the kernel shares out work as it goes and may need one launch instead of two.  Returns
        ``[batch_size, num_q_heads, L, value_dim]``; padding queries get zeros.
        """
        return self._attend(query, scale, fresh, None, arrivals, scores)

    @classmethod
    def changes_scores(cls, device: torch.device) -> bool:
        """Everywhere: the reference and the kernels take sinks and softcaps."""
        return True

    def _attend(
        self,
        query: Tensor,
        scale: float,
        fresh: tuple[Tensor, Tensor, list[int] | None] | None,
        num_tokens: int | None,
        arrivals: Tensor | None = None,
        scores: Scores = PLAIN,
    ) -> Tensor:
        new = self.counted(query, fresh)
        run: Any = reference.attend
        planned: dict[str, Any] = {}
        if query.is_cuda:
            fast = _fast()
            takes = fast and (new is None or scores.window is None) and fast.supports(self.record, query, new)
            kernels = fast if takes else _kernels("attention")
            run, planned = kernels.attend, {"num_tokens": num_tokens}
            if kernels is fast:
                planned["arrivals"] = arrivals
            if kernels is fast and num_tokens is None:  # a graph's lengths are not known here
                planned["equal_shares"] = max(self.row_lengths) > UNEVEN * min(self.row_lengths)
        return run(query, self.stored(), self.layout, scale, new, scores=scores, **planned)

    def step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        steps: Steps,
        rotary: tuple[Tensor, Tensor] | None = None,
        scores: Scores = PLAIN,
    ) -> Tensor:
        """One decode step with nothing decided on the host, so that a CUDA graph may hold it: store, then attend.

        ``query [batch_size, num_q_heads, L, key_dim]`` and L keys and values a row, up to :attr:`most_at_once`: of
        several each query sees what is stored and the new tokens up to its own, then they are stored.  ``rotary``, of
        one token: :func:`kvruntime.methods.kivi.step.step`; ``scores``: what the model does to them.  Returns
        ``[batch_size, num_q_heads, L, value_dim]``.  On CUDA the host's books (``row_lengths``, ``row_packed``) stay
        behind until :meth:`advance`, :meth:`catch_up` or :meth:`reset`.
        """
        if key.shape[2] > 1:
            if rotary is not None:
                raise ValueError(
                    f"{key.shape[2]} tokens a row and a rotary embedding: allowed is one, or embedded ones"
                )
            return self._step_of_several(query, key, value, scale, steps, scores)
        if not key.is_cuda:
            query, key = embedded(query, key, rotary, steps.positions)
            self.append(key, value)
            return self.attend(query, scale, scores=scores)
        if rotary is not None:
            return self._step(query, key, value, scale, steps, rotary, scores)
        shapes = (query.shape, query.stride(), key.stride(), value.stride(), query.dtype, key.dtype)
        alike = (shapes, scale, scores.softcap, scores.window, self.num_provided, steps.num_tokens, steps.scratch.shape)
        tensors = [query, key, value, *(() if scores.sinks is None else (scores.sinks,))]
        given, again = len(tensors), self.again
        tensors += [*self.tensors.values(), steps.lengths, steps.positions, steps.scratch]
        if again is None or again[0] != alike:
            self.again = alike, None
            return self._step(query, key, value, scale, steps, None, scores)
        if again[1] is not None and (out := again[1](tensors, given)) is not None:
            return out  # type: ignore[no-any-return]
        if not self._repeats(query, key, value):
            return self._step(query, key, value, scale, steps, None, scores)
        recorded = _launches().recorded  # the second that is like it: others may come
        out, launches = recorded(lambda: self._step(query, key, value, scale, steps, None, scores), tensors)
        self.again = alike, launches
        return out

    def _step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        steps: Steps,
        rotary: tuple[Tensor, Tensor] | None,
        scores: Scores,
    ) -> Tensor:
        """:meth:`step` by its kernels, planned anew."""
        ticket = steps.scratch[: self.batch_size]
        stored = (self.stored(), self.layout, steps.lengths, steps.positions)
        _kernels("step").step(query, key, value, *stored, ticket, rotary)
        return self._attend(query, scale, None, steps.num_tokens, steps.scratch[self.batch_size :], scores)

    def _step_of_several(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, steps: Steps, scores: Scores
    ) -> Tensor:
        """:meth:`step` of several tokens a row, by the kernels that store and attend to chunks of a prompt."""
        out = self._attend(query, scale, (key, value, None), steps.num_tokens if key.is_cuda else None, None, scores)
        if key.is_cuda:
            append, stored = _kernels("append"), self.stored()
            one = self.batch_size == 1  # which holds a record, where channels are boosted, or no step takes several
            append.append(key, value, None, stored, self.layout, is_ordered=one)
            append.count(stored, self.layout, key.shape[2])
        else:
            self.append(key, value)
        return out

    @property
    def most_at_once(self) -> int:
        """Several, but for boosted keys of which no record is packed: the queries say what their channels weigh."""
        return 1 if self.wants_query else MOST_AT_ONCE

    def _repeats(self, *given: Tensor) -> bool:
        """Whether a step's launches read nothing but what they are told: no copies, and no scale of a sequence."""
        return "key_params" not in self.tensors and all(x.stride(3) == 1 for x in given)

    @property
    def prefers_steps(self) -> bool:
        """On a GPU, where a full ring holds a record: three launches, which are made again as they were."""
        return self.device.type == "cuda" and self.record.num_tokens <= self.method.residual_length

    def scratch(self, num_q_heads: int) -> Tensor:
        """A count a row, and two a query head with which the attention shares out work and merges in one launch."""
        return torch.zeros(self.batch_size * (1 + 2 * num_q_heads), dtype=torch.int32, device=self.device)

    def advance(self, num_steps: int) -> None:
        """Enters steps of one token a row in the host's books, which steps on a GPU left behind."""
        lengths, packed = self.row_lengths, self.row_packed
        length, count = lengths[0], packed[0]
        if lengths.count(length) == packed.count(count) == len(lengths):  # rows are mostly alike
            method = self.method
            if length + num_steps - method.sink_length - count > method.residual_length:
                self.row_packed = [self._flushed(length, count, num_steps)] * len(packed)
        else:
            self.row_packed = [self._flushed(*state, num_steps) for state in zip(lengths, packed, strict=True)]
        super().advance(num_steps)

    def catch_up(self, lengths: Tensor) -> None:
        """Takes the rows' lengths from the device, where steps have left the host's books behind.

        ``lengths`` count those of every layer: a step that stored one here and then failed elsewhere is run again.
        """
        super().catch_up(lengths)
        self.row_packed = self.tensors["lengths"][1].tolist()

    def tokens(self, row: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a row as attention reads them, dequantized: ``[num_kv_heads, row_lengths[row], dim]``
        float32."""
        sink, packed = min(self.method.sink_length, self.row_lengths[row]), self.row_packed[row]
        params, order = self.tensors.get("key_params"), self.tensors.get("key_order")
        records = self.tensors["records"][row, : packed // self.record.num_tokens].transpose(0, 1)
        middle = reference.unpack_records(
            records,
            self.record,
            None if params is None else (params[0, row], params[1, row]),
            None if order is None else order[row],
        )
        token = torch.arange(sink + packed, self.row_lengths[row], device=self.device)
        slot = self.method.sink_length + (token - self.method.sink_length) % self.method.residual_length
        key, value = (
            torch.cat([exact[row, :, :sink].float(), tokens, exact[row][:, slot].float()], 1)
            for exact, tokens in zip((self.tensors["exact_key"], self.tensors["exact_value"]), middle, strict=True)
        )
        return key, reference.rotated(value, self.record.rotation) if self.record.rotation else value

    def forget(self, counts: Sequence[int], sink: int) -> None:
        """Forgets row b's ``counts[b]`` oldest tokens after its first ``sink``, whole records that are packed already.

        Raises ``ValueError`` for another sink than the method's own.
        """
        self.method.leaving(sink)
        records = self.tensors["records"]
        for row, (packed, count) in enumerate(zip(self.row_packed, counts, strict=True)):
            if count:
                first, last = count // self.record.num_tokens, packed // self.record.num_tokens
                records[row, : last - first] = records[row, first:last].clone()
        self.row_lengths = [length - count for length, count in zip(self.row_lengths, counts, strict=True)]
        self._write_lengths([packed - count for packed, count in zip(self.row_packed, counts, strict=True)])

    @classmethod
    def forgets_in_steps(cls, method: Any, window: int) -> bool:
        """Where a ring holds a record, and a row that has just forgotten still has one: its order of channels stays."""
        return method.record_length <= method.residual_length <= window - method.record_length

    def forget_in_step(self, limit: int, steps: Steps) -> None:
        """On CUDA, rows that hold ``limit`` tokens forget the residual's number of their oldest; the host's books stay
        behind until :meth:`forgot`."""
        count = self.method.leaving(self.method.sink_length)
        _kernels("forget").forget(self.stored(), self.record, limit, count, steps.scratch[: self.batch_size])

    def forgot(self, counts: Sequence[int]) -> None:
        """Enters in the host's books what rows forgot in steps on a GPU."""
        self.row_packed = [packed - count for packed, count in zip(self.row_packed, counts, strict=True)]
        super().forgot(counts)

    def drop(self, blocks: Sequence[Tensor | None], sink: int) -> None:
        """Forgets of row b the ``blocks[b] [num_kv_heads, n]``, every head its own: whole records, packed already.

        Raises ``ValueError`` for another sink than the method's own.
        """
        block, length = self.method.leaving(sink), self.record.num_tokens
        counts = [0 if each is None else each.shape[1] * block for each in blocks]
        records, within = self.tensors["records"], torch.arange(block // length, device=self.device)
        for row, (packed, each) in enumerate(zip(self.row_packed, blocks, strict=True)):
            if each is not None:
                gone = (each[..., None] * (block // length) + within).flatten(1)
                left = staying(gone, packed // length).T  # [records, heads]
                at = left[..., None].expand(-1, -1, records.shape[3])
                records[row, : left.shape[0]] = records[row].gather(0, at)
        self.row_lengths = [tokens - count for tokens, count in zip(self.row_lengths, counts, strict=True)]
        self._write_lengths([packed - count for packed, count in zip(self.row_packed, counts, strict=True)])

    def reset(self) -> None:
        """Forget every token; the buffers stay."""
        super().reset()
        self.row_packed = [0] * self.batch_size
        self.tensors["lengths"].zero_()
        self._unweigh(slice(None))

    def reorder(self, index: Tensor) -> None:
        """Rows become ``index`` (int64, any number of rows, repeats allowed)."""
        super().reorder(index)
        self.row_packed = [self.row_packed[row] for row in index.tolist()]

    def check_crop(self, num_tokens: int) -> None:
        """Raises ``ValueError`` where a row would lose tokens that are packed already."""
        drop = max(self.row_lengths) - num_tokens
        if drop <= 0:
            return
        sink, rows = self.method.sink_length, zip(self.row_lengths, self.row_packed, strict=True)
        exact = min(length - (sink + packed if packed else 0) for length, packed in rows)
        if drop > exact:
            least = max(self.row_lengths) - exact
            raise ValueError(f"cannot crop to {num_tokens} tokens: allowed are {least} and above, the rest is packed")

    def crop(self, num_tokens: int) -> None:
        """Cut the longest row to ``num_tokens``, and as many newest tokens from every other row, once
        :meth:`check_crop` allows it."""
        self.check_crop(num_tokens)
        drop = max(self.row_lengths) - num_tokens
        if drop <= 0:
            return
        self.row_lengths = [length - drop for length in self.row_lengths]
        self._write_lengths(self.row_packed)

    @staticmethod
    def crop_all(layers: Sequence[Any], num_tokens: int) -> None:
        """:meth:`crop` of each; layers that hold alike, as those of one model do, are told so in one launch."""
        first, *rest = layers
        books = first.row_lengths, first.row_packed
        if any(not isinstance(one, KiviLayer) or (one.row_lengths, one.row_packed) != books for one in rest):
            Rows.crop_all(layers, num_tokens)
            return
        first.check_crop(num_tokens)
        drop = max(first.row_lengths) - num_tokens
        if drop > 0:
            torch._foreach_sub_([layer.tensors["lengths"][0] for layer in layers], drop)
            for layer in layers:
                layer.row_lengths = [length - drop for length in layer.row_lengths]


def _addresses(held: Sequence[tuple[Any, ...]]) -> Tensor | None:
    """Where everything lies that one launch is to store; None where it cannot store it all."""
    first, key, value, lengths, *_ = held[0]
    if len(held) == 1 or not (key.is_cuda and key.stride(3) == value.stride(3) == 1) or first.record.boosted:
        return None
    kind = _kind(*held[0])
    if any(_kind(*one) != kind for one in held[1:]):
        return None
    first.make_room(key, lengths)
    for layer, *_ in held[1:]:
        layer.provide(first.num_provided)
    names = ("exact_key", "exact_value", "records", "key_params")
    return _kernels("append").addresses(
        [(key, value, *map(layer.tensors.get, names)) for layer, key, value, *_ in held]
    )


def _kind(layer: KiviLayer, key: Tensor, value: Tensor, lengths: list[int] | None, *_: Any) -> tuple[object, ...]:
    """All that a launch is told of a layer besides addresses."""
    held = (layer.method, layer.shape, layer.num_provided, layer.row_lengths, layer.row_packed, lengths)
    return (*held, key.shape, key.stride(), key.dtype, value.stride(), value.dtype)


def _write(target: Tensor, rows: list[int]) -> None:
    if min(rows, default=0) == max(rows, default=0):  # a fill needs no copy from the host
        target.fill_(rows[0] if rows else 0)
    else:
        target.copy_(torch.tensor(rows, dtype=torch.int32), non_blocking=True)


@cache
def _fast():  # type: ignore[no-untyped-def]
    """The tensor-core kernel, or None where Triton is without its Gluon language.

    Any other failure to import it is raised: the portable kernel takes eight times as long and would not say so.
    """
    try:
        return _kernels("fast")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("triton"):
            return None
        raise


@cache
def _launches():  # type: ignore[no-untyped-def]
    """:mod:`kvruntime.kernels.launch`, imported where a GPU wants it."""
    from kvruntime.kernels import launch

    return launch


@cache
def _kernels(name: str):  # type: ignore[no-untyped-def]
    """The Triton kernels, imported where a GPU wants them."""
    from importlib import import_module

    return import_module(f"kvruntime.methods.kivi.{name}")
