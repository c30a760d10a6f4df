"""NVFP4: four-bit floating point (e2m1) in blocks of 16 channels with an fp8 (e4m3) scale each: 4.5 bits an element.

The second scale, one float32 a layer and stream, lies with the module's parameters (vLLM 0.32, ``Attention._k_scale``;
``nvfp4_kv_cache_full_dim`` gives ``head_size // 2 + head_size // 16`` bytes a token and head), so it is not counted
here (8 bytes a layer).
"""

from __future__ import annotations

from dataclasses import dataclass

from kvsim.layout import Buffer, LayerShape, parts
from kvsim.methods.formulas import Formula, Number, Written, held

BLOCK = 16


@dataclass(frozen=True)
class Nvfp4:
    """Codes ``[batch_size, num_kv_heads, num_tokens, dim / 2]`` and block scales ``[..., dim / 16]``."""

    tokens_alone = True

    @property
    def name(self) -> str:
        return "nvfp4"

    def buffers(self, layer: LayerShape, batch_size: int, num_tokens: int) -> list[Buffer]:
        out = []
        rows = (batch_size, layer.num_kv_heads, layer.num_tokens(num_tokens))
        for stream, dim in (("key", layer.key_dim), ("value", layer.value_dim)):
            if dim % BLOCK:
                raise ValueError(f"nvfp4 has blocks of {BLOCK} channels: they do not divide head dimension {dim}")
            out.append(Buffer(f"{stream}_codes", (*rows, dim // 2), "uint8"))
            out.append(Buffer(f"{stream}_scale", (*rows, dim // BLOCK), "float8_e4m3fn"))
        return out

    def formulas(self, layer: LayerShape, count: int, batch_size: int, num_tokens: int) -> Written:
        """The bytes of ``count`` layers as products (:mod:`kvsim.methods.formulas`)."""
        rows, tokens, numbers = held(layer, count, batch_size, num_tokens)
        numbers.append(Number("block", 16, "channels that share an fp8 scale"))
        out = []
        for stream, dim in (("key", layer.key_dim), ("value", layer.value_dim)):
            out.append(Formula(f"{stream}_codes", f"{stream}_codes", (rows, tokens, (dim, "head dim"), (4, "bits")), 8))
            scales = (rows, tokens, (dim // 16, "blocks"), (1, "byte"))
            out.append(Formula(f"{stream}_scale", f"{stream}_scale", scales))
        return numbers, out

    def read_parts(self, layer: LayerShape, batch_size: int, num_tokens: int) -> dict[str, int]:
        return parts(self.buffers(layer, batch_size, num_tokens))
