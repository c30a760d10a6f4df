"""One attention layer's KIVI cache: the tensors of ``Kivi.buffers``, filled and read.

On CUDA the Triton kernels run, elsewhere the PyTorch reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from kvruntime.kernels.reference import embedded
from kvruntime.methods.kivi import reference
from kvruntime.methods.rows import grown, tokens_to_provide
from kvsim.layout import LayerShape
from kvsim.methods.kivi import Kivi

UNEVEN = 1.25
"""Rows whose lengths differ by more share one line of work (``fast.attend``'s ``equal_shares``)."""


class KiviLayer:
    """Keys and values of ``batch_size`` rows in one layer.

    ``max_seq_len``: tokens a row to provide for at once; ``None`` provides in blocks of ``GROW_TOKENS``.
    Rows may hold different numbers of tokens.  ``tensors`` are exactly
    ``method.buffers(shape, batch_size, num_provided)``.
    """

    def __init__(
        self,
        method: Kivi,
        shape: LayerShape,
        batch_size: int,
        max_seq_len: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.method, self.shape, self.batch_size = method, shape, batch_size
        self.record = method.record(shape)
        self.max_seq_len, self.device = max_seq_len, torch.device(device)
        self.row_lengths = [0] * batch_size
        self.row_packed = [0] * batch_size
        self.num_provided = 0
        self.tensors: dict[str, Tensor] = {}
        self._provide(max_seq_len or 0)

    @property
    def nbytes(self) -> int:
        """Bytes of the layer's tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def is_croppable(self) -> bool:
        """Some newest tokens are always exact, ``residual_length`` less a record: as many may be taken back."""
        return self.method.residual_length > self.record.num_tokens

    def _provide(self, num_tokens: int) -> None:
        if self.tensors and num_tokens <= self.num_provided:
            return
        provided = tokens_to_provide(num_tokens, self.max_seq_len)
        for buffer in self.method.buffers(self.shape, self.batch_size, provided):
            old = self.tensors.get(buffer.name)
            if old is None or old.shape != buffer.shape:
                self.tensors[buffer.name] = grown(old, buffer, self.device)
        self.num_provided = provided

    def append(self, key: Tensor, value: Tensor, lengths: list[int] | None = None) -> None:
        """Store ``key [batch_size, num_kv_heads, L, key_dim]`` and ``value`` alike.

        ``lengths``: row b's real tokens are the last ``lengths[b]`` of the L (the rest is left padding, which is
        not stored); ``None`` takes all.
        """
        counts = self._make_room(key, lengths)
        self._store(key, value, counts)
        self._count(counts)

    @staticmethod
    def append_all(held: Sequence[Fresh]) -> None:
        """:meth:`append` of each; on CUDA, layers that are alike in all but their contents share the launches."""
        addresses = _addresses(held)
        if addresses is None:
            for layer, key, value, lengths in held:
                layer.append(key, value, lengths)
            return
        first, key, value, lengths = held[0]
        counts = first._make_room(key, lengths)
        first._store(key, value, counts, layers=addresses)
        first._count(counts)
        rest = [layer for layer, *_ in held[1:]]
        for layer in rest:
            layer.row_lengths, layer.row_packed = list(first.row_lengths), list(first.row_packed)
        torch._foreach_copy_([layer.tensors["lengths"] for layer in rest], [first.tensors["lengths"]] * len(rest))

    def _make_room(self, key: Tensor, lengths: list[int] | None) -> list[int]:
        """Provide for the tokens of an append; returns how many a row that is."""
        counts = [key.shape[2]] * self.batch_size if lengths is None else lengths
        self._provide(max(n + count for n, count in zip(self.row_lengths, counts, strict=True)))
        return counts

    def _store(self, key: Tensor, value: Tensor, counts: list[int], **layers: Tensor) -> None:
        store = _kernels("quantize").append if key.is_cuda else reference.append
        store(
            key,
            value,
            counts,
            self.row_lengths,
            self.row_packed,
            record=self.record,
            sink=self.method.sink_length,
            residual=self.method.residual_length,
            **self._stores(key.is_cuda),
            **layers,
        )

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
        self.row_packed = packed

    def _stores(self, kernels: bool) -> dict[str, Tensor | None]:
        names = ("records", "exact_key", "exact_value", "key_params") + (("lengths_ptr",) if kernels else ())
        return {name: self.tensors.get(name.removesuffix("_ptr")) for name in names}

    def attend(
        self,
        query: Tensor,
        scale: float,
        fresh: tuple[Tensor, Tensor, list[int] | None] | None = None,
        arrivals: Tensor | None = None,
    ) -> Tensor:
        """Attention of ``query [batch_size, num_q_heads, L, key_dim]`` over what is stored.

        ``fresh``: ``(key, value, lengths)`` of L tokens not yet stored, which query i sees up to and with its own;
        without it L must be 1.  ``arrivals [2 * batch_size * num_q_heads]``: int32 zeros, scratch of one stream's
        calls, with which the kernel shares out work as it goes and may need one launch instead of two.  Returns
        ``[batch_size, num_q_heads, L, value_dim]``; padding queries get zeros.
        """
        if fresh is None and query.shape[2] != 1:
            raise ValueError(
                f"{query.shape[2]} queries over stored tokens only: allowed is 1, or give the fresh tokens"
            )
        return self._attend(query, scale, fresh, None, arrivals)

    def _attend(
        self,
        query: Tensor,
        scale: float,
        fresh: tuple[Tensor, Tensor, list[int] | None] | None,
        num_tokens: int | None,
        arrivals: Tensor | None = None,
    ) -> Tensor:
        lengths, packed = self.tensors["lengths"]
        new = None
        if fresh is not None:
            counts = [query.shape[2]] * self.batch_size if fresh[2] is None else fresh[2]
            new = (fresh[0], fresh[1], torch.tensor(counts, dtype=torch.int32, device=query.device))
        run, planned = reference.attend, {}
        if query.is_cuda:
            fast = _fast()
            kernels = fast if fast and fast.supports(self.record, query, new) else _kernels("attention")
            run, planned = kernels.attend, {"num_tokens": num_tokens}
            if kernels is fast:
                planned["arrivals"] = arrivals
            if kernels is fast and num_tokens is None:  # a graph's lengths are not known here
                planned["equal_shares"] = max(self.row_lengths) > UNEVEN * min(self.row_lengths)
        return run(
            query,
            self.tensors["records"],
            self.tensors["exact_key"],
            self.tensors["exact_value"],
            lengths,
            packed,
            self.record,
            self.method.sink_length,
            self.method.residual_length,
            scale,
            self.tensors.get("key_params"),
            new,
            **planned,
        )

    def step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        positions: Tensor,
        ticket: Tensor,
        num_tokens: int,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """One decode step with nothing decided on the host, so that a CUDA graph may hold it: store, then attend.

        ``query [batch_size, num_q_heads, 1, key_dim]`` and one key and value a row; ``positions [batch_size]`` int32,
        the tokens each row holds before; ``num_tokens``, the most a row will hold while this step is repeated (it plans
        the splits); ``ticket`` int32 zeros, scratch that is zeros again after every launch, for one stream's work at a
        time: ``[batch_size]``, or ``[batch_size * (1 + 2 * num_q_heads)]`` for faster ones.  ``rotary``:
        :func:`kvruntime.methods.kivi.step.step`.
        Returns ``[batch_size, num_q_heads, 1, value_dim]``.  On CUDA the host's books (``row_lengths``, ``row_packed``)
        stay behind until :meth:`reset`.
        """
        if not key.is_cuda:
            query, key = embedded(query, key, rotary, positions)
            self.append(key, value)
            return self.attend(query, scale)
        _kernels("step").step(
            query,
            key,
            value,
            rotary,
            **self._stores(False),
            positions=positions,
            lengths=self.tensors["lengths"],
            ticket=ticket,
            record=self.record,
            sink=self.method.sink_length,
            residual=self.method.residual_length,
        )
        return self._attend(query, scale, None, num_tokens, ticket[self.batch_size :])

    def catch_up(self, positions: Tensor) -> None:
        """Reads back how many tokens each row holds, where steps have left the host's books behind.

        ``positions`` count those of every layer: a step that stored one here and then failed elsewhere is run again.
        """
        self.row_lengths, self.row_packed = positions.tolist(), self.tensors["lengths"][1].tolist()

    def tokens(self, row: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a row as attention reads them, dequantized: ``[num_kv_heads, row_lengths[row], dim]``
        float32."""
        sink, packed = min(self.method.sink_length, self.row_lengths[row]), self.row_packed[row]
        params = self.tensors.get("key_params")
        records = self.tensors["records"][row, : packed // self.record.num_tokens].transpose(0, 1)
        middle = reference.unpack_records(
            records, self.record, None if params is None else (params[0, row], params[1, row])
        )
        token = torch.arange(sink + packed, self.row_lengths[row], device=self.device)
        slot = self.method.sink_length + (token - self.method.sink_length) % self.method.residual_length
        key, value = (
            torch.cat([exact[row, :, :sink].float(), tokens, exact[row][:, slot].float()], 1)
            for exact, tokens in zip((self.tensors["exact_key"], self.tensors["exact_value"]), middle, strict=True)
        )
        return key, value

    def reset(self) -> None:
        """Forget every token; the buffers stay."""
        self.row_lengths, self.row_packed = [0] * self.batch_size, [0] * self.batch_size
        self.tensors["lengths"].zero_()

    def reorder(self, index: Tensor) -> None:
        """Rows become ``index`` (int64, any number of rows, repeats allowed)."""
        rows = index.tolist()
        for name, tensor in self.tensors.items():
            dim = 1 if name in ("lengths", "key_params") else 0
            self.tensors[name] = tensor.index_select(dim, index.to(self.device))
        self.row_lengths = [self.row_lengths[row] for row in rows]
        self.row_packed = [self.row_packed[row] for row in rows]
        self.batch_size = len(rows)

    def crop(self, num_tokens: int) -> None:
        """Cut the longest row to ``num_tokens``, and as many newest tokens from every other row.

        Raises ``ValueError`` when a row would lose tokens that are packed already.
        """
        drop = max(self.row_lengths) - num_tokens
        if drop <= 0:
            return
        sink = self.method.sink_length
        for length, packed in zip(self.row_lengths, self.row_packed, strict=True):
            if length - drop < (sink + packed if packed else 0):
                least = max(self.row_lengths) - (length - sink - packed if packed else length)
                raise ValueError(
                    f"cannot crop to {num_tokens} tokens: allowed are {least} and above, the rest is packed"
                )
        self.row_lengths = [length - drop for length in self.row_lengths]
        self._write_lengths(self.row_packed)


Fresh = tuple[KiviLayer, Tensor, Tensor, list[int] | None]
"""A layer, and what its :meth:`KiviLayer.append` takes."""


def _addresses(held: Sequence[Fresh]) -> Tensor | None:
    """Where everything lies that one launch is to store; None where it cannot store it all."""
    first, key, value, lengths = held[0]
    if len(held) == 1 or not (key.is_cuda and key.stride(3) == value.stride(3) == 1):
        return None
    kind = _kind(*held[0])
    if any(_kind(*one) != kind for one in held[1:]):
        return None
    first._make_room(key, lengths)
    for layer, *_ in held[1:]:
        layer._provide(first.num_provided)
    names = ("exact_key", "exact_value", "records", "key_params")
    return _kernels("quantize").addresses(
        [(key, value, *map(layer.tensors.get, names)) for layer, key, value, _ in held]
    )


def _kind(layer: KiviLayer, key: Tensor, value: Tensor, lengths: list[int] | None) -> tuple[object, ...]:
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
    """The tensor-core kernel, or None under a Triton whose Gluon language has moved on."""
    try:
        return _kernels("fast")
    except (ImportError, AttributeError):
        return None


@cache
def _kernels(name: str):  # type: ignore[no-untyped-def]
    """The Triton kernels, imported where a GPU wants them."""
    from importlib import import_module

    return import_module(f"kvruntime.methods.kivi.{name}")
