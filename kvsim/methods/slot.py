"""vLLM's packed slots, by the names of ``--kv-cache-dtype``: a token's key and value of a head in one slot.

Read in vLLM's ``TurboQuantConfig.slot_size`` and in the test of ``ultraquant_4bit``'s backend (2026).

``turboquant_k8v4``: fp8 keys.  ``turboquant_4bit_nc``, ``turboquant_k3v4_nc``, ``turboquant_3bit_nc``: keys rotated,
codes of Lloyd-Max levels and a float16 norm.  Values are not rotated: uniform codes, a float16 scale and zero a token
and head.  Slots have an even number of bytes.  Of a dense model vLLM leaves the first and the last two layers as they
are.
``ultraquant_4bit``: e2m1 codes, and a power of two for every 32 of them.

They differ from ``turboquant``, which stores values as it stores keys and leaves no layer out.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvsim.layout import Buffer, LayerShape, Method, parts
from kvsim.methods.full import Full

TURBOQUANT = {
    "turboquant_k8v4": (8, 4),
    "turboquant_4bit_nc": (4, 4),
    "turboquant_k3v4_nc": (3, 4),
    "turboquant_3bit_nc": (3, 3),
}
"""Preset -> bits of keys and of values."""
ULTRAQUANT = "ultraquant_4bit"
PRESETS = (*TURBOQUANT, ULTRAQUANT)
ULTRAQUANT_BLOCK = 32
BOUNDARY = 2
"""First layers, and last ones, that stay uncompressed."""


@dataclass(frozen=True)
class Slot:
    """One slot ``[batch_size, num_kv_heads, num_tokens, bytes]``.  Raises ``ValueError`` for a preset unknown."""

    preset: str = "turboquant_4bit_nc"

    tokens_alone = True

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset {self.preset[:40]!r}: allowed are {', '.join(PRESETS)}")

    @property
    def name(self) -> str:
        return self.preset

    def at(self, layer: LayerShape | None, index: int, num_layers: int) -> Method:
        """The uncompressed type at the model's ends."""
        ends = min(BOUNDARY, num_layers // 2) if self.preset in TURBOQUANT else 0
        return Full("bfloat16") if index < ends or index >= num_layers - ends else self

    def within(self, first: int, count: int, num_layers: int) -> Method:
        """A pipeline stage's share: the ends are the whole model's (:func:`kvsim.methods.by_layer.within`)."""
        kinds = [self.at(None, index, num_layers) for index in range(first, first + count)]
        return SlotStage(self.preset, frozenset(index for index, kind in enumerate(kinds) if kind is not self))

    def sections(self, layer: LayerShape) -> list[tuple[str, int]]:
        """``(part, bytes)`` of one slot.  Raises ``ValueError`` for a layer that has no value beside the key."""
        if not layer.value_dim:
            raise ValueError(f"{self.preset} holds a key and a value a token and head, not a latent")
        dims = {"key": layer.key_dim, "value": layer.value_dim}
        if self.preset == ULTRAQUANT:
            out = [(f"{stream}_codes", dim // 2) for stream, dim in dims.items()]
            return out + [(f"{stream}_scale", dim // ULTRAQUANT_BLOCK) for stream, dim in dims.items()]
        key_bits, value_bits = TURBOQUANT[self.preset]
        out = [("key_codes", -(-layer.key_dim * key_bits // 8)), ("value_codes", -(-layer.value_dim * value_bits // 8))]
        out += [("key_scale", 2)] if key_bits < 8 else []
        out += [("value_scale", 2), ("value_zero", 2)]
        odd = sum(size for _, size in out) % 2
        return [*out, ("padding", 1)] if odd else out

    def buffers(self, layer: LayerShape, batch_size: int, num_tokens: int) -> list[Buffer]:
        rows = (batch_size, layer.num_kv_heads, layer.num_tokens(num_tokens))
        count = rows[0] * rows[1] * rows[2]
        sections = self.sections(layer)
        held = tuple((name, size * count) for name, size in sections)
        return [Buffer("slots", (*rows, sum(size for _, size in sections)), "uint8", held)]

    def read_parts(self, layer: LayerShape, batch_size: int, num_tokens: int) -> dict[str, int]:
        return parts(self.buffers(layer, batch_size, num_tokens))


@dataclass(frozen=True)
class SlotStage(Slot):
    """Of a pipeline stage, whose layers ``ends`` are at the whole model's."""

    ends: frozenset[int] = frozenset()

    def at(self, layer: LayerShape | None, index: int, num_layers: int) -> Method:
        return Full("bfloat16") if index in self.ends else self
