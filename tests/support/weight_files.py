"""GGUF and safetensors files of small decoders, made up: headers that are real, data that is zeros."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from kvsim.models.gguf import BLOCKS

F32, F16, Q8_0 = 0, 1, 8


Tensors = dict[str, tuple[tuple[int, ...], int]]


def gguf(metadata: dict[str, Any], tensors: Tensors, data: bool = True) -> bytes:
    """A GGUF file, its data all zeros."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def typed(value: Any) -> bytes:
        if isinstance(value, bool):
            return struct.pack("<I?", 7, value)
        if isinstance(value, int):
            return struct.pack("<II", 4, value)
        if isinstance(value, str):
            return struct.pack("<I", 8) + text(value)
        inner = [typed(one) for one in value]
        kind = inner[0][:4] if inner else struct.pack("<I", 4)
        return struct.pack("<I", 9) + kind + struct.pack("<Q", len(inner)) + b"".join(one[4:] for one in inner)

    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for name, value in metadata.items():
        out += text(name) + typed(value)
    offset = 0
    for name, (shape, kind) in tensors.items():
        out += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
        out += struct.pack("<IQ", kind, offset)
        numbers = 1
        for size in shape:
            numbers *= size
        offset += -(-numbers // BLOCKS[kind][0] * BLOCKS[kind][1] // 32) * 32
    out += b"\0" * (-len(out) % 32)
    return out + (b"\0" * offset if data else b"")


def decoder(arch: str, layers: int = 4, **keys: Any) -> tuple[dict[str, Any], Tensors]:
    """Metadata and tensors of a small decoder: width 64, 8 query and 2 kv heads of 8, MLP 96, 128 words."""
    metadata: dict[str, Any] = {
        "general.architecture": arch,
        "general.name": "tiny",
        f"{arch}.block_count": layers,
        f"{arch}.context_length": 4096,
        f"{arch}.embedding_length": 64,
        f"{arch}.attention.head_count": 8,
        f"{arch}.attention.head_count_kv": 2,
    }
    metadata |= {f"{arch}.{key.replace('__', '.')}": value for key, value in keys.items()}
    tensors: Tensors = {"token_embd.weight": ((64, 128), Q8_0), "output_norm.weight": ((64,), F32)}
    for layer in range(layers):
        tensors |= {
            f"blk.{layer}.attn_norm.weight": ((64,), F32),
            f"blk.{layer}.attn_q.weight": ((64, 64), F16),
            f"blk.{layer}.attn_k.weight": ((64, 16), F16),
            f"blk.{layer}.attn_v.weight": ((64, 16), F16),
            f"blk.{layer}.attn_output.weight": ((64, 64), F16),
            f"blk.{layer}.ffn_norm.weight": ((64,), F32),
            f"blk.{layer}.ffn_gate.weight": ((64, 96), F16),
            f"blk.{layer}.ffn_up.weight": ((64, 96), F16),
            f"blk.{layer}.ffn_down.weight": ((96, 64), F16),
        }
    return metadata, tensors


def written(folder: Path, content: bytes, name: str = "tiny.gguf") -> str:
    (folder / name).write_bytes(content)
    return str(folder / name)


CONFIG = {
    "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 8,
    "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 128, "torch_dtype": "float16",
}  # fmt: skip


def safetensors(tensors: dict[str, tuple[list[int], str, int]]) -> bytes:
    header, at = {}, 0
    for name, (shape, dtype, nbytes) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    return len(text).to_bytes(8, "little") + text + b"\0" * at
