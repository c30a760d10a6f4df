"""The shared vocabulary: what a token leaves in a layer, and the tensors that hold it.

A *layer* says what a token leaves behind (:class:`LayerShape`), a *method* says how tokens are
stored (:class:`Method`), and the answer is a list of *buffers* (:class:`Buffer`), each exactly one
tensor as ``torch.empty`` would make it.  Nothing here knows any method, model or engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Protocol, runtime_checkable

DTYPE_BITS: dict[str, int] = {
    "float32": 32,
    "float16": 16,
    "bfloat16": 16,
    "float8_e4m3fn": 8,
    "float8_e5m2": 8,
    "int8": 8,
    "uint8": 8,
    "int32": 32,
    "int64": 64,
}


@dataclass(frozen=True)
class Buffer:
    """One tensor.

    ``sections`` divides its bytes by purpose, ``((name, nbytes), ...)`` in memory order; empty means
    one section that carries the buffer's own name.  Their sum is ``nbytes``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    sections: tuple[tuple[str, int], ...] = ()

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BITS[self.dtype] // 8

    def parts(self) -> dict[str, int]:
        """Bytes by purpose: name -> bytes."""
        return dict(self.sections) if self.sections else {self.name: self.nbytes}


@dataclass(frozen=True)
class LayerShape:
    """What one token leaves in one layer: ``num_kv_heads`` keys of ``key_dim`` and values of ``value_dim``.

    ``window`` is the number of newest tokens that the layer still needs (``None``: all of them), ``stride`` the
    number of tokens that share one entry (compressed attention; an unfilled block has none).  ``kind`` labels the
    stream: ``full``, ``sliding``, ``chunked``, ``mla``, ``compressed``, ``indexer`` ...; empty means ``sliding``
    where there is a window, ``compressed`` where there is a stride, else ``full``.  ``rope``: of a key of kind ``mla``
    the channels of the rotary key behind the latent; 0 where nobody says.
    """

    num_kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None
    stride: int = 1
    kind: str = ""
    rope: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        if not self.kind:
            kind = "compressed" if self.stride > 1 else "full" if self.window is None else "sliding"
            object.__setattr__(self, "kind", kind)

    def num_tokens(self, seq_len: int) -> int:
        """Entries the layer really holds after ``seq_len`` tokens were seen (window and stride applied once, here)."""
        entries = seq_len // self.stride
        return entries if self.window is None else min(entries, self.window)


class Layers(tuple[LayerShape, ...]):
    """A model's layers in order, hashed once: they are looked up at every batch and context that is weighed."""

    @cached_property
    def _hash(self) -> int:
        return super().__hash__()

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[type[Layers], tuple[tuple[LayerShape, ...]]]:
        return Layers, (tuple(self),)  # without the hash, which another process would not find


@dataclass(frozen=True)
class StateShape:
    """The constant-size state of one layer (Mamba, gated delta net, KDA ...): what a sequence leaves, however long.

    ``tensors``: ``(name, shape without the batch, dtype)`` each.  No method stores it otherwise.
    """

    tensors: tuple[tuple[str, tuple[int, ...], str], ...]
    kind: str = "state"

    def buffers(self, batch_size: int) -> list[Buffer]:
        """The tensors for ``batch_size`` sequences: ``[batch_size, *shape]`` each."""
        return [Buffer(name, (batch_size, *shape), dtype) for name, shape, dtype in self.tensors]


@runtime_checkable
class Method(Protocol):
    """How tokens are stored.  Implementations are frozen dataclasses, one file each in ``kvsim/methods/``.

    A method may say more of itself, and what it does not say has a default:

    * ``formulas(layer, count, batch_size, num_tokens)``: the bytes as products (:mod:`kvsim.methods.formulas`; by
      default the buffers' shapes);
    * ``edges(longest)``: the lengths at which its layout changes (:func:`edges`; none);
    * ``leaving(sink)``: how many of its oldest tokens leave at a time (:func:`leaving`; none can);
    * ``tokens_alone``: whether a token's bytes depend on that token alone (:func:`tokens_alone`; False);
    * ``shared_buffers(layers)``: tensors that a model's layers share (:func:`shared_buffers`; none);
    * ``at(layer, index, num_layers)``: the method of one place, where layers are stored differently
      (:func:`kvsim.methods.by_layer.at`; itself);
    * ``shared_tokens(layer, shared)``: of ``shared`` first tokens of a layer those that sequences can store once
      (:func:`shared_tokens`; all);
    * ``kinds``: the kind of bytes that a part is (:func:`part_kind`; by the part's name);
    * ``head_multiple``: what a head's channels must be a multiple of (1); kvruntime fills up with zeros;
    * ``kvruntime``: whether kvruntime has a room for it (False);
    * ``inner``: the method that stores what a wrapper keeps.
    """

    @property
    def name(self) -> str:
        """Short name for tables: ``fp16``, ``kivi-2bit-g32-r128``."""

    def buffers(self, layer: LayerShape, batch_size: int, num_tokens: int) -> list[Buffer]:
        """The tensors that provide for ``num_tokens`` tokens of ``batch_size`` sequences in one layer.

        Raises ``ValueError`` where the method cannot hold such a layer.
        """

    def read_parts(self, layer: LayerShape, batch_size: int, num_tokens: int) -> dict[str, int]:
        """Bytes that one decode step reads with ``num_tokens`` tokens present, by purpose (name -> bytes)."""


def mean_read_nbytes(method: Method, layer: LayerShape, batch_size: int, num_tokens: int) -> int:
    """Bytes that a decode step reads near ``num_tokens`` tokens; these never fall as tokens are added.

    Of a method whose reads rise and fall as it packs, its own ``mean_read_nbytes``: the mean over the steps between
    two packings.  Of every other method those of ``read_parts``.
    """
    mean = getattr(method, "mean_read_nbytes", None)
    if mean is None:
        return sum(method.read_parts(layer, batch_size, num_tokens).values())
    found: int = mean(layer, batch_size, num_tokens)
    return found


def nbytes(buffers: list[Buffer]) -> int:
    """Total bytes of a list of buffers."""
    return sum(buffer.nbytes for buffer in buffers)


def parts(buffers: list[Buffer]) -> dict[str, int]:
    """Bytes by purpose over a list of buffers: name -> bytes, in first-seen order."""
    total: dict[str, int] = {}
    for buffer in buffers:
        for name, size in buffer.parts().items():
            total[name] = total.get(name, 0) + size
    return total


def shared_buffers(method: Method, layers: Sequence[LayerShape]) -> list[Buffer]:
    """Tensors that ``layers`` share under ``method`` (a rotation, a codebook, a channel order), counted once a model.

    A wrapper without any of its own has those of the method that it holds.
    """
    own = getattr(method, "shared_buffers", None)
    if own is not None:
        out: list[Buffer] = own(layers)
        return out
    inner = getattr(method, "inner", None)
    return [] if inner is None else shared_buffers(inner, layers)


def edges(method: Method, longest: int) -> list[int]:
    """The lengths of 1 to ``longest`` tokens at which the method's layout changes, ascending."""
    own = getattr(method, "edges", None)
    inner = getattr(method, "inner", None)
    found = own(longest) if own is not None else [] if inner is None else edges(inner, longest)
    return sorted({edge for edge in found if 1 <= edge <= longest})


def tokens_alone(method: Method) -> bool:
    """Whether the bytes of a stored token depend on that token alone, so that sequences may share a prefix's."""
    return bool(getattr(method, "tokens_alone", False))


def leaving(method: Method, sink: int) -> int:
    """Tokens that leave at a time where eviction over ``method`` keeps the first ``sink`` and forgets the oldest.

    Raises ``ValueError`` where they cannot leave, or not with that sink.
    """
    own = getattr(method, "leaving", None)
    if own is None:
        raise ValueError(f"{method.name} cannot forget its oldest tokens")
    return int(own(sink))


def shared_tokens(method: Method, layer: LayerShape, shared: int) -> int:
    """Of ``shared`` tokens of a prefix that one layer still holds, those that sequences can store once."""
    own = getattr(method, "shared_tokens", None)
    return shared if own is None else int(own(layer, shared))


APART = ("state_", "index_")
"""How the names of parts begin that no method stores: constant state and index keys."""

KINDS = ("codes", "scales", "zeros", "residual", "other")
"""The kinds of bytes in the tables: packed codes, scales, zeros, exact tokens, bookkeeping."""

ENDINGS = {
    "codes": "codes",
    "scale": "scales",
    "zero": "zeros",
    **dict.fromkeys(("key", "value", "residual", "sink"), "residual"),
}
"""The last word of a part's name -> its kind; of another word ``other``."""


def part_kind(method: Method, part: str) -> str:
    """The kind in :data:`KINDS` of a part's bytes: as the method's ``kinds`` say (a wrapper's, its inner's), else by
    the last word of its name, ``key_codes`` -> ``codes``.  Raises ``ValueError`` for a kind that there is not."""
    own: dict[str, str] = getattr(method, "kinds", {})
    if part in own:
        if own[part] not in KINDS:
            raise ValueError(f"method {method.name}: part {part!r} is of kind {own[part]!r}, not of {', '.join(KINDS)}")
        return own[part]
    inner = getattr(method, "inner", None)
    return ENDINGS.get(part.rpartition("_")[2], "other") if inner is None else part_kind(inner, part)


def check_parts(method: Method, found: dict[str, int]) -> dict[str, int]:
    """``found``, bytes by part.  Raises ``ValueError`` for a name that would be taken for one of :data:`APART`."""
    for part in found:
        if f"{part}_".startswith(APART):
            raise ValueError(f"method {method.name}: part {part!r} is named like constant state or index keys")
    return found


def layer_label(layer: LayerShape, count: int, method: Method | None) -> str:
    """``52 sliding layers: 16 kv heads of 128, window 1,024`` and, where given, the method of these layers."""
    dims = f"{layer.key_dim}" if layer.key_dim == layer.value_dim else f"{layer.key_dim}+{layer.value_dim}"
    window = f", window {layer.window:,}" if layer.window is not None else ""
    stride = f", one entry a {layer.stride} tokens" if layer.stride > 1 else ""
    named = f", {method.name}" if method is not None else ""
    plural = "s" if count > 1 else ""
    return f"{count} {layer.kind} layer{plural}: {layer.num_kv_heads} kv heads of {dims}{window}{stride}{named}"
