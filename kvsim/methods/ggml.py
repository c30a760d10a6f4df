"""llama.cpp's cache types: blocks of 32 elements with a float16 scale, and a float16 minimum in the ``_1`` types.

Bytes a block (ggml-common.h, ``block_q8_0`` ... ``block_q4_0``): q8_0 34 = 32 codes + 2, q5_1 24 = 16 + 4 high bits
+ 2 + 2, q5_0 22 = 16 + 4 + 2, q4_1 20 = 16 + 2 + 2, q4_0 and iq4_nl 18 = 16 + 2.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvsim.layout import DTYPE_BITS, Buffer, LayerShape, parts
from kvsim.methods.formulas import Formula, Number, Written, held

BLOCK = 32
TYPES: dict[str, tuple[int, int, int]] = {
    "q8_0": (32, 2, 0),
    "q5_1": (20, 2, 2),
    "q5_0": (20, 2, 0),
    "q4_1": (16, 2, 2),
    "q4_0": (16, 2, 0),
    "iq4_nl": (16, 2, 0),
}
"""Type -> bytes of codes, scale and minimum in a block of 32 elements."""
PLAIN = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Ggml:
    """Keys and values as ``--cache-type-k`` and ``--cache-type-v`` name them.

    A stream is ``[batch_size, num_tokens, num_kv_heads * dim / 32, bytes a block]``, or plain elements for ``f16``,
    ``bf16`` and ``f32``.  llama.cpp wants every head to be whole blocks.  Raises ``ValueError`` for another type.
    """

    key_type: str = "q8_0"
    value_type: str = "q8_0"

    def __post_init__(self) -> None:
        for label, given in (("key_type", self.key_type), ("value_type", self.value_type)):
            if given not in TYPES and given not in PLAIN:
                raise ValueError(f"{label} {given!r}: allowed are {', '.join((*TYPES, *PLAIN))}")

    tokens_alone = True

    @property
    def name(self) -> str:
        return self.key_type if self.key_type == self.value_type else f"{self.key_type}-{self.value_type}"

    def buffers(self, layer: LayerShape, batch_size: int, num_tokens: int) -> list[Buffer]:
        held = layer.num_tokens(num_tokens)
        return [
            _stream("key", self.key_type, layer.num_kv_heads, layer.key_dim, batch_size, held),
            _stream("value", self.value_type, layer.num_kv_heads, layer.value_dim, batch_size, held),
        ]

    def formulas(self, layer: LayerShape, count: int, batch_size: int, num_tokens: int) -> Written:
        """The bytes of ``count`` layers as products (:mod:`kvsim.methods.formulas`)."""
        rows, tokens, numbers = held(layer, count, batch_size, num_tokens)
        numbers.append(Number("block", 32, "channels, float16 scales (ggml-common.h)"))
        out = []
        sides = (("key", self.key_type, layer.key_dim), ("value", self.value_type, layer.value_dim))
        for stream, kind, dim in sides:
            if kind in PLAIN:
                size = DTYPE_BITS[PLAIN[kind]] // 8
                out.append(Formula(stream, stream, (rows, tokens, (dim, "head dim"), (size, "bytes"))))
                continue
            bits = {"q8_0": 8, "q5_1": 5, "q5_0": 5, "q4_1": 4, "q4_0": 4, "iq4_nl": 4}[kind]
            codes = (rows, tokens, (dim, "head dim"), (bits, "bits"))
            out.append(Formula(stream, f"{stream}_codes", codes, 8))
            halves = ("scale", "zero") if kind.endswith("_1") else ("scale",)
            for half in halves:
                out.append(Formula(stream, f"{stream}_{half}", (rows, tokens, (dim // 32, "blocks"), (2, "bytes"))))
        return numbers, out

    def read_parts(self, layer: LayerShape, batch_size: int, num_tokens: int) -> dict[str, int]:
        return parts(self.buffers(layer, batch_size, num_tokens))


def _stream(stream: str, kind: str, heads: int, dim: int, batch_size: int, held: int) -> Buffer:
    if kind in PLAIN:
        return Buffer(stream, (batch_size, held, heads, dim), PLAIN[kind])
    if dim % BLOCK:
        raise ValueError(f"{kind} has blocks of {BLOCK} channels: they do not divide head dimension {dim}")
    blocks, sizes = heads * dim // BLOCK, TYPES[kind]
    sections = tuple(
        (f"{stream}_{name}", batch_size * held * blocks * size)
        for name, size in zip(("codes", "scale", "zero"), sizes, strict=True)
        if size
    )
    return Buffer(stream, (batch_size, held, blocks, sum(sizes)), "uint8", sections)
