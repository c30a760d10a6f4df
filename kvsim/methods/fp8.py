"""Eight-bit floating point, one byte an element (``fp8``, ``fp8-e5m2``).

The scale of each stream is one float32 a layer: vLLM (0.32, ``Attention._k_scale``) and TensorRT-LLM keep it with the
module's parameters, not in the cache, so it is not counted here (8 bytes a layer).
"""

from __future__ import annotations

from dataclasses import dataclass

from kvsim.layout import Buffer, LayerShape, parts
from kvsim.methods.formulas import Formula, Written, held

FORMATS = {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}


@dataclass(frozen=True)
class Fp8:
    """Keys ``[batch_size, num_kv_heads, num_tokens, key_dim]`` and values alike, one byte an element.

    ``format``: ``e4m3`` or ``e5m2``; the bytes are the same.  Raises ``ValueError`` for another.
    """

    format: str = "e4m3"

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"fp8 format {self.format!r}: allowed are {', '.join(FORMATS)}")

    tokens_alone = True

    @property
    def name(self) -> str:
        return "fp8" if self.format == "e4m3" else f"fp8-{self.format}"

    def buffers(self, layer: LayerShape, batch_size: int, num_tokens: int) -> list[Buffer]:
        held, dtype = layer.num_tokens(num_tokens), FORMATS[self.format]
        return [
            Buffer("key_codes", (batch_size, layer.num_kv_heads, held, layer.key_dim), dtype),
            Buffer("value_codes", (batch_size, layer.num_kv_heads, held, layer.value_dim), dtype),
        ]

    def formulas(self, layer: LayerShape, count: int, batch_size: int, num_tokens: int) -> Written:
        """The bytes of ``count`` layers as products (:mod:`kvsim.methods.formulas`)."""
        rows, tokens, numbers = held(layer, count, batch_size, num_tokens)
        return numbers, [
            Formula(f"{stream}_codes", f"{stream}_codes", (rows, tokens, (dim, "head dim"), (1, "byte")))
            for stream, dim in (("key", layer.key_dim), ("value", layer.value_dim))
        ]

    def read_parts(self, layer: LayerShape, batch_size: int, num_tokens: int) -> dict[str, int]:
        return parts(self.buffers(layer, batch_size, num_tokens))
