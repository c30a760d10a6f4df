"""Methods that store every token and head alone: codes, and one scale beside them.

``int8``, ``int4``, ``fp8-token-head``, ``fp8-e5m2-token-head``: numbers, as vLLM stores ``--kv-cache-dtype
int8_per_token_head`` and its kin (0.32, ``TritonAttentionBackend.customize_spec``): the codes of a token and head, then
one float32 scale, for keys and values apart.  Four-bit codes are two a byte; their zero point lies in the low bits of
the scale.  vLLM has no e5m2 among them.

``turboquant`` (arXiv 2504.19874): a head's vector is rotated by a Hadamard matrix with random signs, after which its
coordinates are distributed as those of a random point on a sphere.  For that distribution one table of levels is best
(Lloyd-Max), whatever the data.  The norm is a float16 a token and head, stored as the root mean square.  Half a bit:
the first half of a head's rotated channels has one bit more than the second.  Three bits are stored in two planes, two
bits and one, so that they take three.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from kvsim.layout import DTYPE_BITS, Buffer, LayerShape, nbytes, parts
from kvsim.methods.formulas import Formula, Number, Written, held

CODES = {
    "int8": ("int8", 1),
    "int4": ("uint8", 2),
    "fp8": ("float8_e4m3fn", 1),
    "fp8-e5m2": ("float8_e5m2", 1),
}
"""Format -> the stored type, and codes an element of it."""
SCALES = ("float32", "float16", "bfloat16")
PAGE_TOKENS = 64
"""Tokens of a page of an engine's pool, where kvruntime stores these methods."""


def page(method: PerTokenHead | TurboQuant, layer: LayerShape) -> tuple[int, int, int, int]:
    """A page of an engine's pool: its tokens, their bytes of all heads, and no exact tokens beside (0, 0).

    Raises ``ValueError`` for a layer that is not full attention, and for heads that kernels do not take as they are.
    """
    latent = layer.kind == "mla" or not layer.value_dim
    if layer.window is not None or layer.stride > 1 or latent:
        what = "latent (MLA)" if latent else layer.kind or "sliding"
        raise ValueError(f"{method.name} in pages: a {what} layer, allowed is full attention")
    for dim in (layer.key_dim, layer.value_dim):
        if dim % method.head_multiple:
            raise ValueError(
                f"{method.name} in pages: head dimension {dim}, allowed are multiples of {method.head_multiple}"
            )
    return PAGE_TOKENS, nbytes(method.buffers(layer, 1, PAGE_TOKENS)), 0, 0


@dataclass(frozen=True)
class PerTokenHead:
    """Codes ``[batch_size, num_kv_heads, num_tokens, dim]`` and scales ``[batch_size, num_kv_heads, num_tokens]``.

    ``format``: ``int8``, ``int4``, ``fp8`` (e4m3) or ``fp8-e5m2``; ``scale_dtype``: type of a scale.  Raises
    ``ValueError`` for another.
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
    latents = True
    """kvruntime stores latents of MLA under it, and the rotary keys beside them with scales of their own."""
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
    def kernel(self) -> str:
        """What its attention reads, by which a model of time knows its kernel: all fp8 alike, whatever the scales."""
        return self.format.partition("-")[0]

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


WIDTHS = (2, 2.5, 3, 3.5, 4)
"""Bits an element."""
LOOKUP = 36
"""Numbers that a kernel looks one width's levels up in (kvruntime/methods/token/levels.py)."""
UNIT = 16
"""Channels of a head come in multiples of this."""


@dataclass(frozen=True)
class TurboQuant:
    """Codes ``[batch_size, num_kv_heads, num_tokens, dim * nbits / 8]`` (uint8), scales ``[..., num_tokens]``.

    ``nbits``: 2, 2.5, 3, 3.5 or 4, of keys and values unless ``key_nbits`` or ``value_nbits`` says otherwise.
    ``norm_correction`` (1 or 0): the scale gives the levels the vector's own norm (vLLM's ``nc``), or is the norm alone
    (the paper's).  Layers share the signs of the rotation.  Raises ``ValueError`` for another width.
    """

    nbits: float = 4
    key_nbits: float | None = None
    value_nbits: float | None = None
    norm_correction: bool = True

    tokens_alone = True
    kvruntime = True
    latents = True
    """kvruntime stores latents of MLA under it, and the rotary keys beside them with scales of their own."""
    head_multiple = 64

    def __post_init__(self) -> None:
        for label in ("nbits", "key_nbits", "value_nbits"):
            bits = getattr(self, label)
            bits = {str(width): width for width in WIDTHS}.get(bits, bits) if isinstance(bits, str) else bits
            object.__setattr__(self, label, bits)
            if (bits is None and label != "nbits") or (type(bits) in (int, float) and bits in WIDTHS):
                continue
            raise ValueError(f"{label} {repr(bits)[:40]}: allowed are {', '.join(map(str, WIDTHS))}")
        if self.norm_correction not in (0, 1):
            raise ValueError(f"norm_correction {repr(self.norm_correction)[:40]}: allowed are 0 and 1")
        object.__setattr__(self, "norm_correction", bool(self.norm_correction))

    @property
    def kernel(self) -> str:
        """As :attr:`PerTokenHead.kernel`; of keys and values that differ, the mean of their bits."""
        return f"levels{(self.k_bits + self.v_bits) / 2:g}"

    @property
    def k_bits(self) -> float:
        return self.nbits if self.key_nbits is None else self.key_nbits

    @property
    def v_bits(self) -> float:
        return self.nbits if self.value_nbits is None else self.value_nbits

    @property
    def name(self) -> str:
        bits = f"{self.k_bits:g}bit" if self.k_bits == self.v_bits else f"k{self.k_bits:g}v{self.v_bits:g}"
        return f"turboquant-{bits}" + ("" if self.norm_correction else "-norm")

    @classmethod
    def named(cls, name: str) -> TurboQuant | None:
        """The method of a table's ``turboquant-2.5bit`` or ``turboquant-k4v3-norm``, a name as it is written; ``None``
        for another."""
        width = r"(\d(?:\.5)?)"
        found = re.fullmatch(rf"turboquant-(?:{width}bit|k{width}v{width})(-norm)?", name)
        if found is None:
            return None
        both, key, value = (float(each) if each else None for each in found.groups()[:3])
        try:
            method = cls(4 if both is None else both, key, value, not found[4])
        except ValueError:  # a width that there is not
            return None
        return method if method.name == name else None

    def leaving(self, sink: int) -> int:
        """Any number of tokens."""
        return 1

    def page(self, layer: LayerShape) -> tuple[int, int, int, int]:
        """A page of an engine's pool (:func:`page`)."""
        return page(self, layer)

    def streams(self, layer: LayerShape) -> list[tuple[str, int, float]]:
        """``(stream, channels, bits)`` of what a token leaves.  Raises ``ValueError`` for channels that do not pack."""
        found = []
        for stream, dim, bits in (("key", layer.key_dim, self.k_bits), ("value", layer.value_dim, self.v_bits)):
            if dim % UNIT:
                raise ValueError(f"{self.name} packs multiples of {UNIT} channels: head dimension {dim} is none")
            if dim and bits % 1 and dim & (dim - 1):
                raise ValueError(f"{bits:g} bits halve a head: head dimension {dim} is no power of two")
            if dim:
                found.append((stream, dim, bits))
        return found

    def buffers(self, layer: LayerShape, batch_size: int, num_tokens: int) -> list[Buffer]:
        rows = (batch_size, layer.num_kv_heads, layer.num_tokens(num_tokens))
        out = []
        for stream, dim, bits in self.streams(layer):
            out.append(Buffer(f"{stream}_codes", (*rows, int(dim * bits) // 8), "uint8"))
            out.append(Buffer(f"{stream}_scale", rows, "float16"))
        return out

    def shared_buffers(self, layers: Sequence[LayerShape]) -> list[Buffer]:
        """The signs of the rotation, one a channel, for each head dimension that there is, and for each width what its
        levels are looked up in."""
        kept = {(dim, bits) for layer in layers for _, dim, bits in self.streams(layer)}
        out = [Buffer(f"signs_{dim}", (dim,), "int8") for dim in sorted({dim for dim, _ in kept})]
        for dim, bits in sorted(kept):
            out.append(Buffer(f"lookup_{dim}_{bits:g}bit", (LOOKUP * (1 if bits % 1 == 0 else 2),), "int32"))
        return out

    def formulas(self, layer: LayerShape, count: int, batch_size: int, num_tokens: int) -> Written:
        """The bytes of ``count`` layers as products (:mod:`kvsim.methods.formulas`)."""
        rows, tokens, numbers = held(layer, count, batch_size, num_tokens)
        out = []
        for stream, dim, bits in self.streams(layer):
            own = self.key_nbits if stream == "key" else self.value_nbits
            numbers.append(Number(f"{stream} bits", f"{bits:g}", "nbits" if own is None else f"{stream}_nbits"))
            codes = (rows, tokens, (dim, "head dim"), (int(2 * bits), "half bits"))
            out.append(Formula(f"{stream}_codes", f"{stream}_codes", codes, 16))
            out.append(Formula(f"{stream}_scale", f"{stream}_scale", (rows, tokens, (2, "bytes"))))
        return numbers, out

    def read_parts(self, layer: LayerShape, batch_size: int, num_tokens: int) -> dict[str, int]:
        return parts(self.buffers(layer, batch_size, num_tokens))
