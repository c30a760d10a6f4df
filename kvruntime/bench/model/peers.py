"""What users would otherwise pick: transformers' QuantizedCache (quanto, hqq) and tiny-turboquant, in the same harness.

None of them knows the final length, so ``max_seq_len`` is not used.  A missing package is one line and a recorded
row, never a failure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, NamedTuple

from kvruntime.bench.model.caches import Contender, plain_attention, stock
from kvsim.nearest import hint

WIDTHS = (2, 3, 4)
"""Bits of the peers that ``kvruntime eval`` and ``compare`` judge, where they have them; others take two alone."""
GROUP_SIZE, RESIDUAL_LENGTH = 64, 128
AXES = {"quanto": 0, "hqq": 1}
"""Backend -> the axis that transformers' guide names for it."""
UNFUSED = "unfused: read back whole, then PyTorch's attention"
FUSED = "its own fused decode"


def _quantized(backend: str, nbits: int, model: Any, max_seq_len: int) -> Any:
    from transformers import QuantizedCache

    axis = AXES[backend]
    shape = {"axis_key": axis, "axis_value": axis, "q_group_size": GROUP_SIZE, "residual_length": RESIDUAL_LENGTH}
    cache = QuantizedCache(backend, model.config, nbits=nbits, **shape)
    cache.kernel = UNFUSED
    return cache


def _turboquant(nbits: int, model: Any, max_seq_len: int) -> Any:
    from tiny_turboquant import TinyKVCache

    class Adapter(TinyKVCache):  # type: ignore[misc]
        """Under transformers 5.24, which gives ``update`` more than 0.18 takes; it makes no use of it.

        ``kernel``: what attended to one query a row.  The fused decode takes tokens by ``ingest``, everything else by
        ``update`` alone.
        """

        kernel = UNFUSED

        def update(self, key: Any, value: Any, layer: int, *_: Any, **more: Any) -> Any:
            return super().update(key, value, layer)

        def ingest(self, *given: Any, **more: Any) -> Any:
            self.kernel = FUSED
            return super().ingest(*given, **more)

    groups = {"block_size": 32, "value_group_size": 32, "residual_len": RESIDUAL_LENGTH}
    return Adapter(key_bits=nbits, value_bits=nbits, **groups)


@contextmanager
def _turboquant_attention(model: Any) -> Iterator[None]:
    """tiny-turboquant's fused decode where it can patch the model (Llama-like, float16, CUDA), else stock attention."""
    import torch
    from tiny_turboquant import patch_model, unpatch_model

    fused = model.device.type == "cuda" and model.dtype == torch.float16 and hasattr(model, "model")
    with plain_attention(model):
        if fused:
            patch_model(model)
        try:
            yield
        finally:
            if fused:
                unpatch_model(model)


def _of_transformers(backend: str, distribution: str, nbits: int) -> Contender:
    name = f"{backend}-{nbits}bit-g{GROUP_SIZE}-r{RESIDUAL_LENGTH}"
    return Contender(name, partial(_quantized, backend, nbits), package=distribution, around=plain_attention)


def _tiny_turboquant(nbits: int) -> Contender:
    name = f"tiny-turboquant-{nbits}bit-g32-r{RESIDUAL_LENGTH}"
    return Contender(name, partial(_turboquant, nbits), package="tiny-turboquant", around=_turboquant_attention)


class Peer(NamedTuple):
    """A library: its distribution and module, and the bits for which ``make`` gives its cache."""

    distribution: str
    module: str
    widths: tuple[int, ...]
    make: Callable[[int], Contender]


PEERS: dict[str, Peer] = {
    "transformers": Peer("transformers", "transformers", WIDTHS, lambda nbits: stock()),
    "quanto": Peer("optimum-quanto", "optimum.quanto", (2, 4), partial(_of_transformers, "quanto", "optimum-quanto")),
    "hqq": Peer("hqq", "hqq", (2, 4), partial(_of_transformers, "hqq", "hqq")),
    "tiny-turboquant": Peer("tiny-turboquant", "tiny_turboquant", (2, 3, 4), _tiny_turboquant),
}
"""Name -> library; transformers' own cache is uncompressed."""


def find_peers(
    widths: Sequence[int] = WIDTHS[:1], names: Sequence[str] = ()
) -> tuple[list[Contender], list[dict[str, str]]]:
    """``(contenders that are installed, rows that say which are not)``: transformers' own uncompressed cache, then the
    others in those of ``widths`` bits that they have.

    ``names``: these alone, ``hqq`` or ``hqq:nbits=4``.  Raises ``LookupError`` for a name that is none, ``ValueError``
    for bits that it has not.
    """
    there, missing = [], []
    for peer, bits in [_named(name) for name in dict.fromkeys(names)] or [(peer, 0) for peer in PEERS.values()]:
        try:
            installed = find_spec(peer.module) is not None
        except ModuleNotFoundError:
            installed = False
        ways = map(peer.make, [bits] if bits else [width for width in widths if width in peer.widths])
        for name, one in {one.name: one for one in ways}.items():
            if installed:
                there.append(one)
            else:
                missing.append({"kind": "missing", "method": name, "package": peer.distribution})
    return there, missing


def _named(words: str) -> tuple[Peer, int]:
    """The library of ``hqq:nbits=4`` and its bits, 0 where none are given."""
    name, colon, option = words.partition(":")
    if name not in PEERS:
        raise LookupError(f"unknown peer {name!r}: {hint(name, PEERS)}allowed are {', '.join(PEERS)}")
    if not colon:
        return PEERS[name], 0
    allowed = {f"nbits={width}": width for width in PEERS[name].widths}
    if option not in allowed:
        raise ValueError(f"peer {words!r}: allowed after the colon are {', '.join(allowed)}")
    return PEERS[name], allowed[option]


def package_version(distribution: str) -> str | None:
    """The installed version, None where there is none."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
