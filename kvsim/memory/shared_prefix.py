"""A prefix that all sequences share, stored once (a system prompt under prefix caching).

Sharing wants tokens that are stored each alone (:func:`kvsim.layout.tokens_alone`).  KIVI's ring and records, and an
evicting cache, depend on how long the row is, so their prefixes are not the same bytes.  How many tokens of a prefix
are stored once is the engine's to say (:meth:`kvsim.engines.engine.Engine.shared_tokens`): every token that a layer
still holds, or whole blocks.
"""

from __future__ import annotations

from dataclasses import replace

from kvsim.engines import ENGINES, Engine
from kvsim.layout import LayerShape, Method, parts, tokens_alone
from kvsim.methods import placed
from kvsim.models.model import Model


def without_copies(
    taken: dict[str, int],
    model: Model,
    method: Method,
    engine: Engine,
    batch_size: int,
    num_tokens: int,
    shared_prefix: int,
) -> dict[str, int]:
    """``taken`` (bytes by purpose of ``batch_size`` sequences) less the further copies of the shared prefix.

    Raises ``ValueError`` for a prefix longer than the sequences, or an engine or method that does not share.
    """
    if not 0 <= shared_prefix <= num_tokens:
        raise ValueError(f"shared prefix {shared_prefix:,}: allowed are 0 to the {num_tokens:,} tokens of a sequence")
    if not shares(type(engine)):
        allowed = " and ".join(name for name, kind in ENGINES.items() if shares(kind))
        raise ValueError(f"{engine.name} does not share prefixes: allowed are {allowed}")
    out = dict(taken)
    for (layer, chosen), count in placed(method, model.cache_layers).items():
        tokens = engine.shared_tokens(model, method, layer, chosen, _held_tokens(layer, num_tokens, shared_prefix))
        if not tokens_alone(chosen):
            raise ValueError(f"{method.name} does not share prefixes: it does not store each token alone")
        for name, size in parts(chosen.buffers(_whole(layer), batch_size - 1, tokens)).items():
            out[name] -= count * size
    return out


def shares(engine: type[Engine]) -> bool:
    """Whether an engine shares prefixes: whether it says how many tokens."""
    return engine.shared_tokens is not Engine.shared_tokens


def _held_tokens(layer: LayerShape, num_tokens: int, prefix: int) -> int:
    """Tokens of the prefix that one layer still holds: a window moves past them."""
    seen = num_tokens // layer.stride
    return max(0, min(prefix // layer.stride, seen) - (seen - layer.num_tokens(num_tokens)))


def _whole(layer: LayerShape) -> LayerShape:
    return replace(layer, window=None, stride=1, kind=layer.kind)
