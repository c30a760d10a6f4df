"""Whole numbers (or fp8) with one scale a token and head: ``int8``, ``int4``, ``fp8-token-head`` (e4m3, e5m2).

As vLLM stores ``--kv-cache-dtype int8_per_token_head`` and its kin (0.32, ``TritonAttentionBackend.customize_spec``):
the codes of a token and head, then one float32 scale, for keys and values apart.  Four-bit codes are two a byte;
their zero point lies in the low bits of the scale.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvsim.layout import DTYPE_BITS, Buffer, LayerShape, parts
from kvsim.methods.formulas import Formula, Number, Written, held

CODES = {
    "int8": ("int8", 1),
    "int4": ("uint8", 2),
    "fp8": ("float8_e4m3fn", 1),
    "fp8-e5m2": ("float8_e5m2", 1),
}
"""Format -> the stored type, and codes an element of it."""
SCALES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class PerTokenHead:
    """Codes ``[batch_size, num_kv_heads, num_tokens, dim]`` and scales ``[batch_size, num_kv_heads, num_tokens]``.

    ``format``: ``int8``, ``int4``, ``fp8`` (e4m3) or ``fp8-e5m2``; ``scale_dtype``: type of a scale.  Raises ``ValueError`` for another.
    """

    format: str = "int8"
    scale_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.format not in CODES:
            raise ValueError(f"format {self.format!r}: allowed are {', '.join(CODES)}")
        if self.scale_dtype not in SCALES:
            raise ValueError(f"scale_dtype {self.scale_dtype!r}: allowed are {', '.join(SCALES)}")

    tokens_alone = True
    kvruntime = True
    head_multiple = 16

    def check_runs(self) -> None:
        """Raises ``ValueError`` where a scale's low bits, which are the zero point, would be most of it."""
        if self.format == "int4" and self.scale_dtype == "bfloat16":
            raise ValueError(
                f"{self.name}: scale_dtype bfloat16 cannot hold a zero point: allowed are float32, float16"
            )

    def leaving(self, sink: int) -> int:
        """Any number of tokens."""
        return 1

    @property
    def name(self) -> str:
        base = f"{self.format}-token-head" if self.format.startswith("fp8") else self.format
        bits = DTYPE_BITS[self.scale_dtype]
        return base if bits == 32 else f"{base}-s{bits}"

    def buffers(self, layer: LayerShape, batch_size: int, num_tokens: int) -> list[Buffer]:
        dtype, packed = CODES[self.format]
        out = []
        rows = (batch_size, layer.num_kv_heads, layer.num_tokens(num_tokens))
        for stream, dim in (("key", layer.key_dim), ("value", layer.value_dim)):
            if dim % packed:
                raise ValueError(f"{self.name} packs two codes a byte: head dimension {dim} is not even")
            if dim:
                out.append(Buffer(f"{stream}_codes", (*rows, dim // packed), dtype))
                out.append(Buffer(f"{stream}_scale", rows, self.scale_dtype))
        return out

    def formulas(self, layer: LayerShape, count: int, batch_size: int, num_tokens: int) -> Written:
        """The bytes of ``count`` layers as products (:mod:`kvsim.methods.formulas`)."""
        bits, scale = (4 if self.format == "int4" else 8), DTYPE_BITS[self.scale_dtype] // 8
        rows, tokens, numbers = held(layer, count, batch_size, num_tokens)
        numbers += [Number("bits", bits, f"format {self.format}"), Number("scale bytes", scale, "scale_dtype")]
        out = []
        for stream, dim in (("key", layer.key_dim), ("value", layer.value_dim)):
            if dim:
                codes = (rows, tokens, (dim, "head dim"), (bits, "bits"))
                out.append(Formula(f"{stream}_codes", f"{stream}_codes", codes, 8))
                out.append(Formula(f"{stream}_scale", f"{stream}_scale", (rows, tokens, (scale, "scale bytes"))))
        return numbers, out

    def read_parts(self, layer: LayerShape, batch_size: int, num_tokens: int) -> dict[str, int]:
        return parts(self.buffers(layer, batch_size, num_tokens))
