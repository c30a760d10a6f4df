"""A toy method, as docs/next-owner.md adds one: kvsim's file. Codes of 6 bits, one float16 scale a token and head."""

from __future__ import annotations

from dataclasses import dataclass

from kvsim.layout import Buffer, LayerShape, parts


@dataclass(frozen=True)
class Int6:
    """Codes ``[batch_size, num_kv_heads, num_tokens, dim * 6 / 8]`` bytes and scales ``[..., num_tokens]``; a table of
    the 64 levels that all layers of a model share."""

    name = "int6"
    kvruntime = True

    def buffers(self, layer: LayerShape, batch_size: int, num_tokens: int) -> list[Buffer]:
        rows = (batch_size, layer.num_kv_heads, layer.num_tokens(num_tokens))
        out = []
        for stream, dim in (("key", layer.key_dim), ("value", layer.value_dim)):
            if dim % 4:
                raise ValueError(f"int6 packs four codes into three bytes: head dimension {dim} is no multiple of 4")
            if dim:
                out.append(Buffer(f"{stream}_codes", (*rows, dim * 6 // 8), "uint8"))
                out.append(Buffer(f"{stream}_scale", rows, "float16"))
        return out

    def shared_buffers(self, layers: object) -> list[Buffer]:
        return [Buffer("levels", (64,), "float16")]

    def read_parts(self, layer: LayerShape, batch_size: int, num_tokens: int) -> dict[str, int]:
        return parts(self.buffers(layer, batch_size, num_tokens))
