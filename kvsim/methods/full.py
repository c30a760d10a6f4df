"""The baseline: every key and value as it is, in one floating-point type (``fp16``, ``bf16``, ``fp32``)."""

from __future__ import annotations

from dataclasses import dataclass

from kvsim.layout import DTYPE_BITS, Buffer, LayerShape, parts
from kvsim.methods.formulas import Formula, Number, Written, held

SHORT = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}


@dataclass(frozen=True)
class Full:
    """Keys ``[batch_size, num_kv_heads, num_tokens, key_dim]`` and values alike, uncompressed."""

    dtype: str = "float16"

    def __post_init__(self) -> None:
        if self.dtype not in SHORT:
            raise ValueError(f"dtype {self.dtype!r}: allowed are {', '.join(SHORT)}")

    tokens_alone = True
    kvruntime = True

    @property
    def name(self) -> str:
        return SHORT[self.dtype]

    def buffers(self, layer: LayerShape, batch_size: int, num_tokens: int) -> list[Buffer]:
        held = layer.num_tokens(num_tokens)
        return [
            Buffer("key", (batch_size, layer.num_kv_heads, held, layer.key_dim), self.dtype),
            Buffer("value", (batch_size, layer.num_kv_heads, held, layer.value_dim), self.dtype),
        ]

    def formulas(self, layer: LayerShape, count: int, batch_size: int, num_tokens: int) -> Written:
        """The bytes of ``count`` layers as products (:mod:`kvsim.methods.formulas`)."""
        size = DTYPE_BITS[self.dtype] // 8
        rows, tokens, numbers = held(layer, count, batch_size, num_tokens)
        numbers.append(Number("bytes", size, f"dtype {self.dtype}"))
        return numbers, [
            Formula(stream, stream, (rows, tokens, (dim, "head dim"), (size, "bytes")))
            for stream, dim in (("key", layer.key_dim), ("value", layer.value_dim))
        ]

    def leaving(self, sink: int) -> int:
        """Any number of tokens."""
        return 1

    def read_parts(self, layer: LayerShape, batch_size: int, num_tokens: int) -> dict[str, int]:
        return parts(self.buffers(layer, batch_size, num_tokens))
