"""Rows of one layer: the books of how many tokens each holds, and the tensors that provide for them.

Every method's layer is a :class:`Rows`, whose tensors are exactly what its method says; a layer adds how tokens are
stored and attended to.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from kvsim.engines.kvruntime import GROW_TOKENS
from kvsim.layout import Buffer, LayerShape, Method, leaving, nbytes

Fresh = tuple[Tensor, Tensor, list[int] | None]
"""Tokens not yet stored: key, value, lengths, as ``append`` takes them."""


class Steps(NamedTuple):
    """What one decode step is told in device memory, so that nothing about it is decided on the host.

    ``positions [batch_size]`` int32: each row's position, for the rotary embedding alone.  ``lengths [batch_size]``
    int32: the tokens that each row holds before the step, which say where the new one goes; the same tensor where a
    row holds all that it has seen.  ``scratch``: :meth:`Rows.scratch`.  ``num_tokens``: the most that a row will hold
    while the step is repeated; it plans the splits.
    """

    positions: Tensor
    lengths: Tensor
    scratch: Tensor
    num_tokens: int


class Rows:
    """Rows of one layer.

    ``max_seq_len``: tokens a row to provide for at once; ``None`` provides in blocks of ``GROW_TOKENS``.
    Rows may hold different numbers of tokens.  ``tensors`` are exactly
    ``method.buffers(shape, batch_size, num_provided)``; ``shared`` are those that a model's layers share.
    """

    ROW_AXES: ClassVar[dict[str, int]] = {}
    """The axis of the rows in a tensor, by name; the first in every other."""

    @property
    def is_croppable(self) -> bool:
        """Whether some newest tokens can always be taken back."""
        return True

    limit: int | None = None
    """Tokens a row that the tensors provide for at the most, where a wrapper keeps no more."""

    wants_query = False
    """Whether a prompt's queries decide what is kept: ``append`` is then given them."""

    last_queries: ClassVar[int | None] = None
    """Of how many of a prompt's last tokens ``append`` looks at the queries; None: of all."""

    scales_queries: ClassVar[bool] = True
    """Whether the scale of the model's scores matters to what ``append`` makes of queries."""

    again: Any = None
    """What :meth:`step` remembers of its launches, of this process alone."""

    num_layers = 1
    """Layers of the cache that this is one of, for what is said where memory ends."""

    has_steps = True
    """Whether :meth:`step` decides nothing on the host, so that a CUDA graph may hold it."""

    @property
    def most_at_once(self) -> int:
        """Tokens a row that :meth:`step` takes at the most."""
        return 1

    @classmethod
    def holds_latents(cls, method: Any, device: torch.device) -> bool:
        """Whether layers of ``method`` attend on ``device`` to latents of MLA, shapes of the kind ``mla``."""
        return False

    @classmethod
    def forgets_in_steps(cls, method: Any, window: int) -> bool:
        """Whether a step that decides nothing on the host may let the oldest tokens go behind a packed ``window``."""
        return False

    def forget_in_step(self, limit: int, steps: Steps) -> None:
        """After a step on CUDA: rows that hold ``limit`` tokens forget their :func:`kvsim.layout.leaving` oldest."""
        raise ValueError(f"{self.method.name} has no step that forgets tokens")

    @property
    def most_held(self) -> int:
        """Tokens that a row may hold in the buffers as they are: what a step plans for."""
        return self.num_provided

    def count_step(self, lengths: Tensor) -> None:
        """Enters a step of one token a row in ``lengths [batch_size]``, the tokens held, where the device counts."""
        lengths.add_(1)

    @property
    def prefers_steps(self) -> bool:
        """Whether :meth:`step` is the cheap way to one more token a row where the host plans every step."""
        return False

    @property
    def kernel(self) -> str:
        """What attends, in a word or two for people."""
        return "PyTorch"

    @classmethod
    def changes_scores(cls, device: torch.device) -> bool:
        """Whether ``attend`` takes ``scores`` on ``device``: attention sinks and softcaps."""
        return False

    def __init__(
        self,
        method: Any,
        shape: LayerShape,
        batch_size: int,
        max_seq_len: int | None = None,
        device: torch.device | str = "cpu",
        shared: Mapping[str, Tensor] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"a batch of {batch_size} rows: allowed are 1 and above")
        self.method, self.shape, self.batch_size = method, shape, batch_size
        self.max_seq_len, self.device = max_seq_len, torch.device(device)
        self.shared = dict(shared or {})
        self.row_lengths = [0] * batch_size
        """Tokens held, row by row."""
        self.num_provided = 0
        """Tokens a row that the buffers provide for now."""
        self.tensors: dict[str, Tensor] = {}
        self.provide(max_seq_len or 0)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "again"}

    @property
    def nbytes(self) -> int:
        """Bytes of the layer's own tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def seq_lengths(self) -> list[int]:
        """Tokens seen, row by row: more than those held where some were evicted."""
        return self.row_lengths

    def forget(self, counts: Sequence[int], sink: int) -> None:
        """Forgets row b's ``counts[b]`` oldest tokens after its first ``sink``; what is left keeps its order.

        ``counts``: multiples of :func:`kvsim.layout.leaving`, which raises ``ValueError`` where it cannot.
        """
        raise ValueError(f"{self.method.name} cannot forget its oldest tokens")

    def drop(self, blocks: Sequence[Tensor | None], sink: int) -> None:
        """Forgets of row b the ``blocks[b] [num_kv_heads, n]``, every head its own; None: nothing.

        Block i is the i-th :func:`kvsim.layout.leaving` tokens after the first ``sink``.  What is left keeps its order.
        This is for tensors ``[batch_size, num_kv_heads, slots, ...]``, a token a slot; another layout has its own.
        Raises ``ValueError`` for a method whose tokens do not leave one by one.
        """
        if leaving(self.method, sink) != 1:
            raise ValueError(f"{self.method.name} does not let each head forget tokens of its own")
        counts = [0 if each is None else each.shape[1] for each in blocks]
        alike = len(set(counts)) == 1  # then empty slots move up behind a shorter row's tokens
        groups = [slice(0, self.batch_size)] if alike else [slice(row, row + 1) for row in range(self.batch_size)]
        for rows in groups:
            longest, mine = max(self.row_lengths[rows]), [each for each in blocks[rows] if each is not None]
            if not mine or not mine[0].shape[1]:
                continue
            left = sink + staying(torch.stack(mine), longest - sink)
            for tensor in self.tensors.values():
                raw = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
                last = sink + left.shape[2]
                at = left.reshape(*left.shape, *(1 for _ in raw.shape[3:])).expand(*left.shape, *raw.shape[3:])
                raw[rows, :, sink:last] = raw[rows].gather(2, at)
                raw[rows, :, last:longest] = 0
        self.forgot(counts)

    def provide(self, num_tokens: int) -> None:
        """Makes the tensors provide for ``num_tokens`` tokens a row.  Raises ``ValueError`` beyond ``max_seq_len``, and
        ``torch.OutOfMemoryError`` that says what would have fitted; what the layer holds is then as it was."""
        if self.tensors and num_tokens <= self.num_provided:
            return
        provided = self.provided(num_tokens)
        before = {name: tensor.shape for name, tensor in self.tensors.items()}
        try:
            for buffer in self.method.buffers(self.shape, self.batch_size, provided):
                old = self.tensors.get(buffer.name)
                if old is None or old.shape != buffer.shape:
                    self.tensors[buffer.name] = grown(old, buffer, self.device)
        except torch.OutOfMemoryError as error:
            old = None
            self._shrink(before)
            raise torch.OutOfMemoryError(
                too_many(self.method, self.shape, self.batch_size, provided, self.device, self.num_layers, self.nbytes)
            ) from error
        self.num_provided = provided

    def _shrink(self, shapes: Mapping[str, torch.Size]) -> None:
        """Tensors that were grown already go back to these shapes: what they held fits where it was before."""
        for name, tensor in list(self.tensors.items()):
            if name not in shapes:
                del self.tensors[name]
            elif tensor.shape != shapes[name]:
                self.tensors[name] = tensor[tuple(slice(size) for size in shapes[name])].clone()

    def provided(self, num_tokens: int) -> int:
        """Tokens a row that the tensors provide for, so that ``num_tokens`` fit."""
        provided = tokens_to_provide(num_tokens, self.max_seq_len)
        return provided if self.limit is None else min(provided, self.limit)

    def make_room(self, key: Tensor, lengths: list[int] | None, value: Tensor | None = None) -> list[int]:
        """Provides for the tokens of an append; returns how many a row that is.  Raises ``ValueError`` for tokens that
        this layer cannot have."""
        counts = self.counts(key, lengths, value)
        self.provide(max(n + count for n, count in zip(self.row_lengths, counts, strict=True)))
        return counts

    def counts(self, key: Tensor, lengths: Sequence[int] | None, value: Tensor | None = None) -> list[int]:
        """How many tokens a row an append brings.  Raises ``ValueError`` for tensors of other shapes than the layer's,
        and lengths that they do not have."""
        length, shape = key.shape[2] if key.dim() == 4 else 0, self.shape
        for name, x, dim in (("keys", key, shape.key_dim), ("values", value, shape.value_dim)):
            allowed = (self.batch_size, shape.num_kv_heads, length, dim)
            if x is not None and x.shape != allowed:
                raise ValueError(
                    f"{name} {list(x.shape)}: allowed are {list(allowed)}, rows, kv heads, tokens, channels"
                )
        if lengths is None:
            return [length] * self.batch_size
        if len(lengths) != self.batch_size or not all(isinstance(n, int) and 0 <= n <= length for n in lengths):
            raise ValueError(f"lengths {list(lengths)!s:.80}: allowed are {self.batch_size}, each from 0 to {length}")
        return list(lengths)

    @staticmethod
    def check_fresh(query: Tensor, fresh: Fresh | None) -> None:
        """Raises ``ValueError`` for several queries ``[batch_size, num_q_heads, L, key_dim]`` without fresh tokens."""
        if fresh is None and query.shape[2] != 1:
            raise ValueError(
                f"{query.shape[2]} queries over stored tokens only: allowed is 1, or give the fresh tokens"
            )

    def counted(self, query: Tensor, fresh: Fresh | None) -> tuple[Tensor, Tensor, Tensor] | None:
        """``fresh`` with its lengths on the device, as kernels and references take it, once :meth:`check_fresh` allows
        it."""
        self.check_fresh(query, fresh)
        if fresh is None:
            return None
        key, value, lengths = fresh
        counts = [query.shape[2]] * self.batch_size if lengths is None else lengths
        return key, value, on_device(counts, query.device)

    @staticmethod
    def append_all(held: Sequence[tuple[Any, ...]]) -> None:
        """``append`` of each ``(layer, *arguments)``."""
        for layer, *arguments in held:
            layer.append(*arguments)

    def scratch(self, num_q_heads: int) -> Tensor:
        """Zeros that :meth:`step` wants and leaves as zeros, for one stream's work at a time; int32."""
        return torch.zeros(self.batch_size, dtype=torch.int32, device=self.device)

    def advance(self, num_steps: int) -> None:
        """Enters steps of one token a row in the host's books, which steps on a GPU left behind."""
        self.row_lengths = [length + num_steps for length in self.row_lengths]

    def forgot(self, counts: Sequence[int]) -> None:
        """Enters in the host's books how many tokens each row forgot."""
        self.row_lengths = [length - count for length, count in zip(self.row_lengths, counts, strict=True)]

    @staticmethod
    def crop_all(layers: Sequence[Any], num_tokens: int) -> None:
        """:meth:`crop` of each, which the first allows and all refuse alike."""
        for layer in layers:
            layer.crop(num_tokens)

    def catch_up(self, lengths: Tensor) -> None:
        """Takes the rows' lengths from the device, where steps have left the host's books behind."""
        self.row_lengths = lengths.tolist()

    def books(self) -> dict[str, Any]:
        """What the host knows of the rows besides the tensors, as lists of numbers: for a file."""
        return {"row_lengths": list(self.row_lengths)}

    def take_books(self, books: Mapping[str, Any]) -> None:
        """Takes over :meth:`books`, once the tensors are those that they are of."""
        self.catch_up(torch.tensor(books["row_lengths"], dtype=torch.int32))

    def check_crop(self, num_tokens: int) -> None:
        """Raises ``ValueError`` where ``crop(num_tokens)`` would, and changes nothing: a shorter row has too few."""
        drop = max(0, max(self.row_lengths) - num_tokens)
        if drop > min(self.row_lengths):
            least = max(self.row_lengths) - min(self.row_lengths)
            raise ValueError(f"cannot crop to {num_tokens} tokens: allowed are {least} and above (a shorter row)")

    def crop(self, num_tokens: int) -> None:
        """Cut the longest row to ``num_tokens``, and as many newest tokens from every other row, once
        :meth:`check_crop` allows it; in the books alone."""
        self.check_crop(num_tokens)
        drop = max(0, max(self.row_lengths) - num_tokens)
        self.row_lengths = [length - drop for length in self.row_lengths]

    def reset(self) -> None:
        """Forget every token; the buffers stay."""
        self.row_lengths = [0] * self.batch_size

    def reorder(self, index: Tensor) -> None:
        """Rows become ``index`` (int64, any number of rows from one on, repeats allowed)."""
        rows, there = rows_of(index, self.batch_size), index.to(self.device)
        for name, tensor in self.tensors.items():
            self.tensors[name] = tensor.index_select(self.ROW_AXES.get(name, 0), there)
        self.row_lengths = [self.row_lengths[row] for row in rows]
        self.batch_size = len(rows)


def rows_of(index: Tensor, batch_size: int) -> list[int]:
    """``index`` as a list.  Raises ``ValueError`` where it names no row of ``batch_size``, or none at all."""
    rows: list[int] = index.tolist() if index.dim() == 1 else []
    if not rows or not all(isinstance(row, int) and 0 <= row < batch_size for row in rows):
        raise ValueError(
            f"rows {index.tolist()!s:.80}: allowed are whole numbers from 0 to {batch_size - 1}, at least one"
        )
    return rows


def on_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    """A number a row, int32; of rows that are alike, as a fill leaves them, without a copy from the host."""
    if len(set(numbers)) == 1:
        return torch.full((len(numbers),), numbers[0], dtype=torch.int32, device=device)
    return torch.tensor(numbers, dtype=torch.int32).to(device, non_blocking=True)


def staying(dropped: Tensor, count: int) -> Tensor:
    """Which of ``count`` stay where ``dropped [..., n]`` leave: ``[..., count - n]`` int64, ascending."""
    gone = torch.zeros(*dropped.shape[:-1], count, dtype=torch.uint8, device=dropped.device).scatter_(-1, dropped, 1)
    left: Tensor = gone.argsort(dim=-1, stable=True)[..., : count - dropped.shape[-1]]
    return left


def make_shared(method: Method, buffers: Sequence[Buffer], make: Any, device: torch.device) -> dict[str, Tensor]:
    """The tensors that a model's layers share: ``make(method, device)``, held to what the method says they are.

    Raises ``ValueError`` where they are others.
    """
    if not buffers:
        return {}
    tensors: dict[str, Tensor] = make(method, buffers, device)
    made = {name: (tuple(x.shape), str(x.dtype).removeprefix("torch.")) for name, x in tensors.items()}
    said = {buffer.name: (buffer.shape, buffer.dtype) for buffer in buffers}
    if made != said:
        raise ValueError(f"{method.name}: the layers' shared tensors are {made}, its layout says {said}")
    return tensors


def tokens_to_provide(num_tokens: int, max_seq_len: int | None) -> int:
    """Tokens a row to provide for so that ``num_tokens`` fit.

    Raises ``ValueError`` when they exceed ``max_seq_len``.
    """
    if max_seq_len is None:
        return -(-num_tokens // GROW_TOKENS) * GROW_TOKENS
    if num_tokens > max_seq_len:
        raise ValueError(f"{num_tokens} tokens do not fit: the cache was made for max_seq_len {max_seq_len}")
    return max_seq_len


def too_many(
    method: Method,
    shape: LayerShape,
    batch_size: int,
    num_tokens: int,
    device: torch.device,
    num_layers: int = 1,
    held: int = 0,
) -> str:
    """What memory for ``num_tokens`` tokens a row lacked, and how many would have fitted.

    ``held``: bytes of a layer before it grew, taken to be those of each of ``num_layers``.
    """

    def size(tokens: int) -> int:
        return nbytes(method.buffers(shape, batch_size, tokens))

    def taken(tokens: int) -> int:
        return sum(block_nbytes(buffer.nbytes, device) for buffer in method.buffers(shape, batch_size, tokens))

    there = free_nbytes(device)
    least, most = 0, num_tokens // GROW_TOKENS
    while least < most:  # blocks that fit: all layers', and the one that grows beside what it holds
        middle = (least + most + 1) // 2
        fits = num_layers * taken(middle * GROW_TOKENS) + held <= there + num_layers * held
        least, most = (middle, most) if fits else (least, middle - 1)
    return (
        f"out of memory: {num_tokens:,} tokens a row, batch {batch_size}, take "
        f"{num_layers * size(num_tokens) / 2**20:,.1f} MiB of {method.name} in {num_layers} "
        f"layer{'s' if num_layers > 1 else ''}, {there / 2**20:,.1f} MiB are free and {num_layers * held / 2**20:,.1f} "
        f"held: {least * GROW_TOKENS:,} tokens a row would have fitted; reset() the cache, or give it fewer"
    )


ROUNDING = 32 << 20
"""Bytes of a card that no tensor gets, though they are free: blocks are whole, and in one piece; and a kernel that runs
for the first time takes some (14 MiB went so on an H200, and of the last 3 none could be had)."""
MIB = 1 << 20


def block_nbytes(size: int, device: torch.device) -> int:
    """Bytes of a card that PyTorch's allocator takes for a tensor of ``size``: whole 2 MiB from 10 MiB on, and of 1 MiB
    to 10 its share of the 20 MiB that such tensors are cut from.  As many as it has elsewhere.

    >>> [block_nbytes(size << 20, torch.device("cuda")) >> 20 for size in (1, 3, 7, 11)]
    [1, 3, 10, 12]
    """
    if device.type != "cuda" or size <= MIB:
        return size
    return 20 * MIB // (20 * MIB // size) if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB


def free_nbytes(device: torch.device) -> int:
    """Bytes that the device has free in whole pieces; 0 where nobody says.

    What PyTorch's allocator holds unused is given back first.  What is left of it then lies between tensors that are
    used, where a large one does not fit.
    """
    if device.type == "cpu" and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    share = torch.cuda.get_per_process_memory_fraction(device)
    there = min(free, int(share * total) - torch.cuda.memory_reserved(device))
    return max(0, there - ROUNDING)


def grown(old: Tensor | None, buffer: Buffer, device: torch.device) -> Tensor:
    """``buffer`` as a zeroed tensor on ``device`` that begins, in every dimension, with what ``old`` held.

    Raises ``torch.OutOfMemoryError`` where memory ends, on a CPU too.
    """
    try:
        new = torch.zeros(buffer.shape, dtype=getattr(torch, buffer.dtype), device=device)
    except RuntimeError as error:  # what PyTorch raises on a CPU
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" not in str(error):
            raise
        raise torch.OutOfMemoryError(f"{buffer.name}: {buffer.nbytes:,} B cannot be had") from error
    if old is not None:
        new[tuple(slice(size) for size in old.shape)] = old
    return new
