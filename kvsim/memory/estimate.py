"""The prediction: a model, a method, a batch and a context give bytes, by purpose."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvsim.engines import IDEAL, Engine
from kvsim.layout import APART, KINDS, Method, nbytes, part_kind, shared_buffers
from kvsim.methods import Full, placed
from kvsim.models.model import Model


@dataclass(frozen=True)
class Estimate:
    """What one method's cache weighs under one engine.

    ``parts``: bytes taken for keys and values by purpose, over all layers and the batch, the engine's rounding among
    them.  ``read_parts``: bytes that one decode step reads.  ``fp16_nbytes``: the float16 cache of the same shape,
    rounded by nobody.  ``state_parts`` and ``index_parts``: the constant state of hybrid models and the index keys of
    sparse attention, which no method stores and which are not in ``nbytes``.
    """

    method: Method
    batch_size: int
    num_tokens: int
    parts: dict[str, int]
    read_parts: dict[str, int]
    fp16_nbytes: int
    state_parts: dict[str, int] = field(default_factory=dict)
    index_parts: dict[str, int] = field(default_factory=dict)
    engine: str = "ideal"

    @property
    def nbytes(self) -> int:
        return sum(self.parts.values())

    @property
    def state_nbytes(self) -> int:
        return sum(self.state_parts.values())

    @property
    def index_nbytes(self) -> int:
        return sum(self.index_parts.values())

    @property
    def total_nbytes(self) -> int:
        """Cache, state and index keys: what must fit."""
        return self.nbytes + self.state_nbytes + self.index_nbytes

    @property
    def read_nbytes(self) -> int:
        return sum(self.read_parts.values())

    @property
    def nbytes_per_token(self) -> float:
        return self.nbytes / (self.batch_size * self.num_tokens)

    @property
    def read_nbytes_per_token(self) -> float:
        return self.read_nbytes / (self.batch_size * self.num_tokens)

    @property
    def compression(self) -> float:
        return self.fp16_nbytes / self.nbytes if self.nbytes else 1.0

    @property
    def split(self) -> dict[str, int]:
        """Stored bytes by kind (:data:`kvsim.layout.KINDS`)."""
        out = dict.fromkeys(KINDS, 0)
        for part, size in self.parts.items():
            out[part_kind(self.method, part)] += size
        return out


def estimate(
    model: Model, method: Method, batch_size: int, num_tokens: int, engine: Engine = IDEAL, shared_prefix: int = 0
) -> Estimate:
    """Weighs ``method`` on every layer of ``model``, as ``engine`` takes it.

    ``shared_prefix``: first tokens that all sequences have in common, stored once (:mod:`kvsim.memory.shared_prefix`).
    Raises ``ValueError`` for a batch or context below 1, a layer that the method cannot hold, or a method that the
    engine does not have.
    """
    check_sizes(batch_size, num_tokens)
    read: dict[str, int] = {}
    for (layer, chosen), count in placed(engine.stored(model, method), engine.held(model).cache_layers).items():
        for name, size in chosen.read_parts(layer, batch_size, num_tokens).items():
            read[name] = read.get(name, 0) + count * size
    taken = engine.parts(model, method, batch_size, num_tokens)
    if shared_prefix:
        from kvsim.memory.shared_prefix import without_copies

        taken = without_copies(taken, model, method, engine, batch_size, num_tokens, shared_prefix)
    groups: dict[str, dict[str, int]] = {prefix: {} for prefix in (*APART, "")}
    for name, size in taken.items():
        groups[next((prefix for prefix in APART if name.startswith(prefix)), "")][name] = size
    return Estimate(
        method,
        batch_size,
        num_tokens,
        parts=groups[""],
        read_parts=read,
        fp16_nbytes=cache_nbytes(model, Full(), batch_size, num_tokens),
        state_parts=groups["state_"],
        index_parts=groups["index_"],
        engine=engine.name,
    )


def cache_nbytes(model: Model, method: Method, batch_size: int, num_tokens: int) -> int:
    """Bytes of the keys and values: every buffer of every layer and what the layers share, rounded by nobody."""
    return nbytes(shared_buffers(method, model.cache_layers)) + sum(
        count * nbytes(chosen.buffers(layer, batch_size, num_tokens))
        for (layer, chosen), count in placed(method, model.cache_layers).items()
    )


def check_sizes(batch_size: int, num_tokens: int) -> None:
    """Raises ``ValueError`` for a batch or context below 1."""
    if batch_size < 1:
        raise ValueError(f"batch {batch_size}: allowed are 1 and above")
    if num_tokens < 1:
        raise ValueError(f"ctx {num_tokens}: allowed are 1 token and above")
