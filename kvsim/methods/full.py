"""The baseline: every key and value as it is, in one floating-point type (``fp16``, ``bf16``, ``fp32``)."""

from __future__ import annotations

from dataclasses import dataclass

from kvsim.layout import Buffer, LayerShape, parts

SHORT = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}


@dataclass(frozen=True)
class Full:
    """Keys ``[batch_size, num_kv_heads, num_tokens, key_dim]`` and values alike, uncompressed."""

    dtype: str = "float16"

    def __post_init__(self) -> None:
        if self.dtype not in SHORT:
            raise ValueError(f"dtype {self.dtype!r}: allowed are {', '.join(SHORT)}")

    @property
    def name(self) -> str:
        return SHORT[self.dtype]

    def buffers(self, layer: LayerShape, batch_size: int, num_tokens: int) -> list[Buffer]:
        held = layer.num_tokens(num_tokens)
        return [
            Buffer("key", (batch_size, layer.num_kv_heads, held, layer.key_dim), self.dtype),
            Buffer("value", (batch_size, layer.num_kv_heads, held, layer.value_dim), self.dtype),
        ]

    def read_parts(self, layer: LayerShape, batch_size: int, num_tokens: int) -> dict[str, int]:
        return parts(self.buffers(layer, batch_size, num_tokens))
