"""A prefix that all sequences share, stored once (a system prompt under prefix caching).

Sharing wants tokens that are stored each alone (:func:`kvsim.layout.tokens_alone`).  KIVI's ring and records, and an
evicting cache, depend on how long the row is, so their prefixes are not the same bytes.

* ``ideal`` shares every token of the prefix that a layer still holds (a window moves past it).
* ``vllm`` shares whole blocks of full-attention layers; windows and states are counted a sequence.
"""

from __future__ import annotations

from dataclasses import replace

from kvsim.engines import Engine, Ideal, Vllm
from kvsim.layout import LayerShape, Method, parts, tokens_alone
from kvsim.methods import Paged, placed
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
    if not isinstance(engine, (Ideal, Vllm)):
        raise ValueError(f"{engine.name} does not share prefixes: allowed are ideal and vllm")
    out = dict(taken)
    for (layer, chosen), count in placed(method, model.cache_layers).items():
        tokens = _shared(layer, chosen, model, method, engine, num_tokens, shared_prefix)
        inner = chosen.inner if isinstance(chosen, Paged) else chosen
        if not tokens_alone(chosen):
            raise ValueError(f"{method.name} does not share prefixes: it does not store each token alone")
        for name, size in parts(inner.buffers(_whole(layer), batch_size - 1, tokens)).items():
            out[name] -= count * size
    return out


def _shared(
    layer: LayerShape, chosen: Method, model: Model, method: Method, engine: Ideal | Vllm, num_tokens: int, prefix: int
) -> int:
    """Tokens of the prefix that the sequences hold in common in one layer."""
    held = layer.num_tokens(num_tokens)
    shared = max(0, min(prefix // layer.stride, num_tokens // layer.stride) - (num_tokens // layer.stride - held))
    if isinstance(engine, Vllm):
        if layer.window is not None:
            return 0
        block = min(group.block_size for group in engine.groups(model, method) if group.kind == "full")
        return shared // block * block
    if isinstance(chosen, Paged):
        return 0 if layer.window is not None else shared // chosen.block_size * chosen.block_size
    return shared


def _whole(layer: LayerShape) -> LayerShape:
    return replace(layer, window=None, stride=1, kind=layer.kind)
