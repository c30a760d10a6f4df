"""transformers' own cache: ``DynamicCache`` (or ``StaticCache``), as version 5.24 allocates it for a model's classes.

The rules here are held, byte for byte, to the caches of transformers' own model classes on the ``meta`` device
(tests/kvsim/test_model_oracle.py) and to the recorded ones of the catalogue.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvsim.engines.engine import Engine
from kvsim.engines.states import in_transformers
from kvsim.layout import DTYPE_BITS, LayerShape, Method, parts
from kvsim.methods import Full

if TYPE_CHECKING:
    from kvsim.models.model import Model

IMPLEMENTATIONS = ("dynamic", "static")
LENGTHS = ("seen", "new")
POSITION_NBYTES = 3 * 8
"""Three positions of a token as int64, which Qwen4-Exp's first indexer keeps for all of them."""
GATE = "gate"
"""The last block's gates, which 5.24 keeps in float32 (its bias is), 5.23 in the activations' type."""


@dataclass(frozen=True)
class Transformers(Engine):
    """``cache_implementation``: ``dynamic`` grows token by token and keeps a window's last W - 1 tokens between steps;
    ``static`` provides for the final length, a window for W, and its steps are compiled.  ``lengths``: whether the
    process has run steps of these lengths before (``seen``) or each is its first (``new``), which changes the times of
    a dynamic cache and no bytes: PyTorch's attention is then planned at every step."""

    cache_methods = ()
    runtime = "pytorch"
    remainder_first = True

    cache_implementation: str = "dynamic"
    lengths: str = LENGTHS[0]

    def __post_init__(self) -> None:
        if self.cache_implementation not in IMPLEMENTATIONS:
            allowed = ", ".join(IMPLEMENTATIONS)
            raise ValueError(f"cache_implementation {self.cache_implementation!r}: allowed are {allowed}")
        if self.lengths not in LENGTHS:
            raise ValueError(f"transformers lengths {self.lengths!r}: allowed are {', '.join(LENGTHS)}")

    @property
    def name(self) -> str:
        return "transformers"

    @property
    def timed_as(self) -> str:
        way = "static" if self.cache_implementation == "static" else self.lengths
        return self.name if way == LENGTHS[0] else f"{self.name}:{way}"

    def parts(self, model: Model, method: Method, batch_size: int, num_tokens: int) -> dict[str, int]:
        """``key`` and ``value`` of all attention layers, ``compressed`` entries and their ``buffer``, ``index_key``,
        ``state_*``.  Raises ``ValueError`` for a method that its plain caches do not have."""
        if not isinstance(method, Full):
            raise ValueError(f"transformers' plain cache stores fp16, bf16 or fp32, not {method.name}")
        if self.cache_implementation == "static" and "compressed" in model.quirks:
            raise ValueError(f"transformers has no static cache for {model.model_type!r}")
        total = {"key": 0, "value": 0}
        for layer, count in Counter(layer for layer in model.layers if isinstance(layer, LayerShape)).items():
            for name, numbers in self._layer(model, layer, num_tokens):
                dtype, part = ("float32", "buffer") if name == GATE else (method.dtype, name)
                dtype = "float32" if name == "index_key" and "float32 index" in model.quirks else dtype
                total[part] = total.get(part, 0) + count * numbers * batch_size * DTYPE_BITS[dtype] // 8
        if "index positions" in model.quirks:
            total["index_position"] = POSITION_NBYTES * batch_size * num_tokens
        for state in model.state_layers:
            for name, size in parts(in_transformers(state, method.dtype).buffers(batch_size)).items():
                total[f"state_{name}"] = total.get(f"state_{name}", 0) + size
        return total

    def _layer(self, model: Model, layer: LayerShape, num_tokens: int) -> Iterator[tuple[str, int]]:
        """Numbers that one layer's stream holds for one sequence, by name."""
        if layer.kind == "indexer" and layer.stride == 1:
            yield "index_key", num_tokens * layer.key_dim
        elif layer.kind == "indexer":
            yield "index_compressed", layer.num_tokens(num_tokens) * layer.key_dim
            if "pooled once" not in model.quirks:
                yield from self._blocks(layer, num_tokens, width=2, overlap=True)
        elif layer.kind == "compressed":
            overlap = "pooled once" not in model.quirks and any(
                other.kind == "indexer" and other.stride == layer.stride for other in model.index_layers
            )
            yield "compressed", layer.num_tokens(num_tokens) * layer.key_dim
            yield from self._blocks(layer, num_tokens, width=2 if overlap else 1, overlap=overlap)
        else:
            held = self.num_held(model, layer, num_tokens)
            heads = model.num_q_heads if "broadcast" in model.quirks else layer.num_kv_heads
            value_dim = layer.key_dim if "two tensors" in model.quirks else layer.value_dim
            yield "key", heads * held * layer.key_dim
            yield "value", heads * held * value_dim

    def _blocks(self, layer: LayerShape, num_tokens: int, width: int, overlap: bool) -> Iterator[tuple[str, int]]:
        """The unfilled block's inputs and gates, at their most; and the last block's, which the next overlaps."""
        unfilled = min(num_tokens, layer.stride - 1)
        yield "buffer", 2 * unfilled * width * layer.key_dim
        if overlap and num_tokens >= layer.stride:
            yield "buffer", layer.stride * layer.key_dim
            yield GATE, layer.stride * layer.key_dim

    def num_held(self, model: Model, layer: LayerShape, num_tokens: int) -> int:
        """Tokens that an attention layer holds between two steps."""
        if layer.window is None or "whole" in model.quirks:
            return num_tokens
        if self.cache_implementation == "static":
            return min(num_tokens, layer.window)
        # the slice [-window + 1:] keeps everything where the window is a single token
        return num_tokens if layer.window == 1 else min(num_tokens, layer.window - 1)

    def notes(self, model: Model, method: Method) -> tuple[str, ...]:
        out = []
        windows = sorted({layer.window for layer in model.cache_layers if layer.window is not None})
        if windows and "whole" not in model.quirks and self.cache_implementation == "dynamic":
            what = ", ".join(f"{window:,}" for window in windows)
            out.append(f"a sliding or chunked layer keeps its last window - 1 tokens between steps (window {what})")
        if "whole" in model.quirks:
            out.append(f"{model.model_type}'s local layers keep every token: only the mask knows the window")
        if "broadcast" in model.quirks:
            ideal = model.cache_layers[0].num_kv_heads if model.cache_layers else 0
            out.append(
                f"{model.model_type}'s keys and values are broadcast to all {model.num_q_heads} query heads before "
                f"they are cached: {ideal} heads would do"
            )
        if "two tensors" in model.quirks:
            out.append(f"{model.model_type}'s one vector a token is kept twice, as key and as value")
        if "compressed" in model.quirks:
            out.append(
                "an unfilled block's inputs and gates are kept beside the compressed entries, here at their most"
            )
        if any(layer.kind == "mla" for layer in model.cache_layers):
            out.append("the latent is cached as key, the rotary key as value: nothing is expanded")
        if model.index_layers:
            what = "float32" if "float32 index" in model.quirks else "the activations' type"
            out.append(f"index keys are cached in {what}")
        if model.state_layers:
            out.append("convolutions keep their inputs in the activations' type, recurrent states float32")
        return tuple(out)
