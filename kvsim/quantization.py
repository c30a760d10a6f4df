"""Names of stored types as engines spell them: bits a weight, and the cache method of ``--kv-cache-dtype``."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

WEIGHT_DTYPES: dict[str, float] = {
    "fp32": 32,
    "float32": 32,
    "fp16": 16,
    "float16": 16,
    "half": 16,
    "bf16": 16,
    "bfloat16": 16,
    "fp8": 8,
    "int8": 8,
    "fp4": 4.5,
    "nvfp4": 4.5,
    "mxfp4": 4.25,
    "int4": 4 + 16 / 128,
}
"""``--weight-dtype`` -> bits a quantized weight: 4-bit floats with their block scales (16 and 32 weights), int4 with a
16-bit scale for 128."""

QUANTIZATIONS: dict[str, float] = {
    "fp8": 8,
    "compressed-tensors-fp8": 8,
    "int8": 8,
    "experts_int8": 8,
    "modelopt": 8,
    "modelopt_fp4": 4.5,
    "nvfp4": 4.5,
    "mxfp4": 4.25,
    "gpt_oss_mxfp4": 4.25,
    "awq": 4 + 20 / 128,
    "awq_marlin": 4 + 20 / 128,
    "gptq": 4 + 20 / 128,
    "gptq_marlin": 4 + 20 / 128,
    "bitsandbytes": 4.127,
}
"""``--quantization`` -> bits a weight of the layers: groups of 128 with a 16-bit scale and a 4-bit zero (AWQ, GPTQ),
64 with a doubly quantized scale (bitsandbytes nf4).  Embedding and head keep 16."""

KV_DTYPES: dict[str, str] = {
    "fp16": "fp16",
    "float16": "fp16",
    "half": "fp16",
    "bf16": "bf16",
    "bfloat16": "bf16",
    "fp32": "fp32",
    "float32": "fp32",
    "fp8": "fp8",
    "fp8_e4m3": "fp8",
    "fp8_e5m2": "fp8-e5m2",
    "fp8_per_token_head": "fp8-token-head",
    "int8": "int8",
    "int8_per_token_head": "int8",
    "int4": "int4",
    "int4_per_token_head": "int4",
    "nvfp4": "nvfp4",
    "f16": "fp16",
    "f32": "fp32",
    "q8_0": "q8_0",
    "q5_1": "q5_1",
    "q5_0": "q5_0",
    "q4_1": "q4_1",
    "q4_0": "q4_0",
}
"""``--kv-cache-dtype`` -> method, in vLLM's and llama.cpp's spelling; ``auto`` is the model's own type."""


CONFIG_METHODS: dict[str, float] = {"fp8": 8, "fbgemm_fp8": 8, "mxfp4": 4.25}
"""``quant_method`` of a config -> bits a quantized weight, where the name alone tells."""


def config_bits(quantization: Mapping[str, Any]) -> float | None:
    """Bits a quantized weight of a config's ``quantization_config``; ``None`` where it does not tell.

    AWQ and GPTQ: ``bits``, with a 16-bit scale and a zero of ``bits`` a group; compressed-tensors: ``num_bits`` of the
    first group of weights, with a 16-bit scale a group; modelopt by its ``quant_algo``; bitsandbytes by its switches.
    """
    method = quantization.get("quant_method")
    if isinstance(method, str) and method in CONFIG_METHODS:
        return CONFIG_METHODS[method]
    if method in ("awq", "gptq"):
        bits, group = quantization.get("bits"), quantization.get("group_size")
        return _grouped(bits, group, zeros=True)
    if method == "compressed-tensors":
        groups = quantization.get("config_groups")
        first = next(iter(groups.values()), None) if isinstance(groups, Mapping) else None
        weights = first.get("weights") if isinstance(first, Mapping) else None
        if not isinstance(weights, Mapping):
            return None
        return _grouped(weights.get("num_bits"), weights.get("group_size"), zeros=False)
    if method == "modelopt":
        return {"FP8": 8.0, "NVFP4": 4.5}.get(str(quantization.get("quant_algo")))
    if method == "bitsandbytes":
        return 8.0 if quantization.get("load_in_8bit") else 4.127 if quantization.get("load_in_4bit") else None
    return None


def _grouped(bits: object, group: object, zeros: bool) -> float | None:
    """``bits`` and the share of a 16-bit scale and, with ``zeros``, of a zero; -1 or no group: a scale a channel."""
    if type(bits) is not int or not 1 <= bits <= 16:
        return None
    if type(group) is not int or group < 1:
        return float(bits)
    return bits + (16 + (bits if zeros else 0)) / group


def weight_bits_of(name: str, table: dict[str, float], flag: str) -> float:
    """Bits a weight.  Raises ``LookupError`` for a name that ``table`` lacks."""
    return table[_known(name, table, flag)]


def kv_method(name: str, model_dtype: str | None) -> str:
    """The method's name for ``--kv-cache-dtype``; ``auto`` is ``model_dtype``, else float16.

    Raises ``LookupError`` for an unknown name.
    """
    if name.lower() == "auto":
        return KV_DTYPES[model_dtype or "float16"]
    return KV_DTYPES[_known(name, {**KV_DTYPES, "auto": ""}, "kv-cache-dtype")]


def _known(name: str, table: dict[str, float] | dict[str, str], flag: str) -> str:
    key = name.lower()
    if key in table:
        return key
    near = get_close_matches(key, table, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    raise LookupError(f"unknown --{flag} {name!r}: {hint}allowed are {', '.join(table)}")
