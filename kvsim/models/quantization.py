"""Names of stored types as engines spell them: bits a weight, and the cache method of ``--kv-cache-dtype``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import translate
from typing import Any

from kvsim.models.quantization_libraries import Groups, Layers, grouped, is_mlx, layers_of
from kvsim.nearest import hint

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
    "turboquant_k8v4": "turboquant_k8v4",
    "turboquant_4bit_nc": "turboquant_4bit_nc",
    "turboquant_k3v4_nc": "turboquant_k3v4_nc",
    "turboquant_3bit_nc": "turboquant_3bit_nc",
    "ultraquant_4bit": "ultraquant_4bit",
    "f16": "fp16",
    "f32": "fp32",
    "q8_0": "q8_0",
    "q5_1": "q5_1",
    "q5_0": "q5_0",
    "q4_1": "q4_1",
    "q4_0": "q4_0",
}
"""``--kv-cache-dtype`` -> method, in vLLM's and llama.cpp's spelling; ``auto`` is the checkpoint's own type of cache
(:func:`cache_dtype`), else the model's type."""


CONFIG_METHODS: dict[str, float] = {"fp8": 8, "fbgemm-fp8": 8, "mxfp4": 4.25}
"""``quant_method`` of a config -> bits a quantized weight, where the name alone tells."""

MODELOPT: dict[str, tuple[float, int, int]] = {
    "FP8": (8, 0, 0),
    "FP8_PER_CHANNEL_PER_TOKEN": (8, 0, 0),
    "FP8_PB_WO": (8, 0, 0),
    "W8A8_SQ_PER_CHANNEL": (8, 0, 0),
    "INT8_SQ": (8, 0, 0),
    "MXFP8": (8, 32, 8),
    "NVFP4": (4, 16, 8),
    "NVFP4_AWQ": (4, 16, 8),
    "W4A16_NVFP4": (4, 16, 8),
    "MXFP4": (4, 32, 8),
    "W4A8_MXFP4_FP8": (4, 32, 8),
    "W4A16": (4, 128, 16),
    "W4A16_AWQ": (4, 128, 16),
    "W4A8_AWQ": (4, 128, 16),
    "INT4_AWQ": (4, 128, 16),
}
"""``quant_algo`` -> bits of a code, weights that share a scale (0: a row or more), bits of the scale."""

SCALE_BITS = {"float8_e4m3fn": 8, "float8_e8m0fnu": 8, "uint8": 8, "float16": 16, "bfloat16": 16, "float32": 32}
"""``scale_dtype`` of compressed-tensors -> bits of a scale."""
BLOCK_SCALES = ("nvfp4", "mxfp4", "mxfp8")
"""Formats whose scales have 8 bits: fp8 (e4m3) of 16 weights, a power of two (e8m0) of 32."""
PLAIN_BITS = 16.0
"""Bits of a weight that a quantization leaves out."""

Module = tuple[tuple[str, ...], float]
"""A matrix of the model: its name, as families spell it, and its number of weights."""


def config_bits(
    quantization: Mapping[str, Any], modules: Sequence[Module] = (), expert_dtype: object = None
) -> float | None:
    """Bits a quantized weight of a config's ``quantization_config``; ``None`` where it does not tell.

    AWQ and GPTQ: ``bits``, with a 16-bit scale and a zero of ``bits`` a group; bitsandbytes by its switches.
    compressed-tensors, modelopt and :mod:`kvsim.models.quantization_libraries`: each group's codes and scales, of their
    own type.  Where groups differ, or some layers are left out, the mean over ``modules``, those left out at 16 bits;
    ``None`` where a group names none of them.  ``expert_dtype``: DeepSeek-V4's key for experts of another type.
    """
    method = quant_method(quantization)
    if method == "bitsandbytes":
        if quantization.get("load_in_8bit"):
            return 8.0
        double = quantization.get("bnb_4bit_use_double_quant") is not False
        return (4.127 if double else 4.5) if quantization.get("load_in_4bit") else None
    layers = _layers(quantization, expert_dtype)
    if layers is None:
        return None
    bits = _mean_bits(layers.groups, layers.left_out, modules)
    if bits is None or not layers.codebook_bits:
        return bits
    return bits + layers.codebook_bits * len(modules) / sum(count for _, count in modules) if modules else None


def expert_bits(
    quantization: Mapping[str, Any], modules: Sequence[Module], expert_dtype: object = None
) -> float | None:
    """Bits a weight of the routed experts alone, where :func:`config_bits` is a mean over them and others."""
    layers = _layers(quantization, expert_dtype)
    if layers is None or len(modules) > 16 * MOST_LAYERS:
        return None
    if not layers.groups or any(bits is None for _, bits in layers.groups):
        return None
    each = _bits_each(layers.groups, layers.left_out, modules)
    if each is None:
        return None
    routed = [any(".experts." in name for name in spellings) for spellings, _ in modules]
    chosen = [at for at, own in enumerate(routed) if own]
    return _mean(_summed([each[at] for at in chosen], [modules[at] for at in chosen]))


EXPERTS = ("re:.*[.]experts[.].*",)


def _layers(quantization: Mapping[str, Any], expert_dtype: object) -> Layers | None:
    """The groups of a method, and what it leaves out; ``None`` for one that is not known."""
    method = quant_method(quantization)
    if method in CONFIG_METHODS:
        groups: Groups = [(["Linear"], CONFIG_METHODS[method])]
        if expert_dtype == "fp4" and method == "fp8":
            groups.insert(0, (EXPERTS, WEIGHT_DTYPES["mxfp4"]))
        return Layers(groups)
    if method in ("awq", "gptq"):
        bits = next((quantization[key] for key in ("bits", "w_bit") if key in quantization), None)
        group = next((quantization[key] for key in ("group_size", "q_group_size") if key in quantization), None)
        return Layers([(["Linear"], grouped(bits, group, 16, zeros=True))])
    if method == "compressed-tensors":
        return Layers(_compressed_groups(quantization), quantization.get("ignore"))
    if method.startswith("modelopt"):
        inner = _inner(quantization)
        left_out = inner.get("exclude_modules") or inner.get("ignore") or quantization.get("ignore")
        return Layers(_modelopt_groups(inner), left_out)
    return layers_of(method, quantization)


def quant_method(quantization: Mapping[str, Any]) -> str:
    """``quant_method`` in one spelling; absent, what the other keys are of (an older ``compression_config``)."""
    method = quantization.get("quant_method")
    if method is None and isinstance(quantization.get("config_groups"), Mapping):
        return "compressed-tensors"
    if is_mlx(quantization):
        return "mlx"
    name = method.lower().replace("_", "-") if isinstance(method, str) else ""
    return {"sparseml": "compressed-tensors"}.get(name, name)


def cache_dtype(quantization: Mapping[str, Any]) -> tuple[str | None, str]:
    """The checkpoint's own type of cache, which ``--kv-cache-dtype auto`` means, and the key that says so.

    As vLLM reads it (``get_kv_cache_quant_algo_string``): ``kv_cache_scheme`` of compressed-tensors,
    ``kv_cache_scheme`` or ``kv_cache_quant_algo`` of modelopt.  ``None`` with a key: a type that vLLM does not have.
    """
    method = quant_method(quantization)
    if method == "compressed-tensors":
        scheme = quantization.get("kv_cache_scheme")
        if not isinstance(scheme, Mapping):
            return None, ""
        return ("fp8" if _is_float(scheme, 8) else None), "kv_cache_scheme"
    if not method.startswith("modelopt"):
        return None, ""
    for key in ("kv_cache_scheme", "kv_cache_quant_algo"):
        told = _inner(quantization).get(key) or quantization.get(key)
        if isinstance(told, Mapping):
            fp8 = _is_float(told, 8) and told.get("dynamic") is False
            return ("fp8" if fp8 else "nvfp4" if _is_float(told, 4) else None), key
        if isinstance(told, str) and told.lower() not in ("none", "auto", "mixed_precision"):
            return {"fp8": "fp8", "nvfp4": "nvfp4"}.get(told.lower()), key
    return None, ""


def _is_float(scheme: Mapping[str, Any], bits: int) -> bool:
    return scheme.get("num_bits") == bits and scheme.get("type") == "float"


def _inner(quantization: Mapping[str, Any]) -> Mapping[str, Any]:
    """modelopt's keys lie in ``quantization`` in its own file."""
    inner = quantization.get("quantization")
    return inner if isinstance(inner, Mapping) else quantization


def _compressed_groups(quantization: Mapping[str, Any]) -> Groups:
    groups = quantization.get("config_groups")
    out: Groups = []
    for group in groups.values() if isinstance(groups, Mapping) else ():
        if not isinstance(group, Mapping):
            return []
        targets, weights = group.get("targets"), group.get("weights")
        named = [str(target) for target in targets] if isinstance(targets, list) else ["Linear"]
        form = str(group.get("format") or quantization.get("format") or "")
        if weights is None:
            bits: float | None = PLAIN_BITS  # a group of activations alone
        else:
            bits = _scheme_bits(weights, form) if isinstance(weights, Mapping) else None
        out.append((named, bits))
    return out


def _scheme_bits(weights: Mapping[str, Any], form: str) -> float | None:
    """Bits a weight of one scheme: its codes, a scale a group (or block) and, not symmetric, a zero."""
    group, block = weights.get("group_size"), weights.get("block_structure")
    if isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block):
        group = block[0] * block[1]
    floats = weights.get("type") == "float"
    told = str(weights.get("scale_dtype") or "").removeprefix("torch.")
    small = form.startswith(BLOCK_SCALES) or (floats and (weights.get("num_bits") == 4 or group == 32))
    scale = SCALE_BITS.get(told, 8 if small else 16)
    return grouped(weights.get("num_bits"), group, scale, zeros=weights.get("symmetric") is False and not floats)


def _modelopt_groups(inner: Mapping[str, Any]) -> Groups:
    layers = inner.get("quantized_layers")
    if isinstance(layers, Mapping) and layers:
        rows = [(str(name), row if isinstance(row, Mapping) else {}) for name, row in layers.items()]
        return [([name], _algo_bits(row)) for name, row in rows]
    if inner.get("quant_algo") is None and isinstance(inner.get("config_groups"), Mapping):
        return _compressed_groups(inner)
    return [(["Linear"], _algo_bits(inner))]


def _algo_bits(row: Mapping[str, Any]) -> float | None:
    known = MODELOPT.get(str(row.get("quant_algo")).upper())
    if known is None:
        return None
    bits, group, scale = known
    told = row.get("group_size")
    return grouped(int(bits), told if group and type(told) is int else group, scale, zeros=False)


MOST_LAYERS, MOST_LOOPS = 256, 5
"""Of patterns over names: layers that are matched one by one, and repeats in one pattern, which bound its time."""


def _mean_bits(groups: Groups, left_out: object, modules: Sequence[Module]) -> float | None:
    """The mean bits a weight over ``modules``; where all groups are alike and none is left out, theirs."""
    each = {bits for _, bits in groups}
    if not groups or None in each:
        return None
    named = bool(isinstance(left_out, list) and left_out)
    if not modules:
        return each.pop() if len(each) == 1 else None
    if len(modules) > 16 * MOST_LAYERS:
        return each.pop() if len(each) == 1 and not named else None
    sums = _summed(_bits_each(groups, left_out, modules), modules)
    return _mean(sums)


def _mean(sums: Mapping[float, float]) -> float | None:
    """The mean of ``bits -> weights``; exactly the bits where there is one."""
    if len(sums) < 2:
        return next(iter(sums), None)
    return sum(bits * count for bits, count in sums.items()) / sum(sums.values())


def _summed(each: Sequence[float] | None, modules: Sequence[Module]) -> dict[float, float]:
    sums: dict[float, float] = {}
    for bits, (_, count) in zip(each or (), modules, strict=False):
        sums[bits] = sums.get(bits, 0.0) + count
    return sums


def _bits_each(groups: Groups, left_out: object, modules: Sequence[Module]) -> list[float] | None:
    """Bits a weight of every module; ``None`` where a group names layers as this family is not known to."""
    named = [str(name) for name in left_out] if isinstance(left_out, list) else []
    try:
        ignored = _Names(named)
        matches = [(_Names(targets), bits or PLAIN_BITS) for targets, bits in groups]
    except ValueError:
        return None
    used: set[int] = set()
    whole = False
    out = []
    for spellings, _ in modules:
        bits = PLAIN_BITS
        if not ignored.match(spellings):
            found = next((at for at, (names, _) in enumerate(matches) if names.match(spellings)), None)
            if found is None:
                found = next((at for at, (names, _) in enumerate(matches) if names.linear), None)
            whole = whole or found is None
            if found is not None:
                used.add(found)
                bits = matches[found][1]
        out.append(bits)
    if not used or (whole and len(used) < len(matches)):
        return None
    return out


class _Names:
    """Targets of a quantization: names, patterns (``re:``), wildcards, or the class of all matrices (``Linear``).

    Raises ``ValueError`` for a pattern that is none, or could take too long.
    """

    def __init__(self, targets: Sequence[str]) -> None:
        self.linear = "Linear" in targets
        self.exact = {target for target in targets if not target.startswith("re:") and "*" not in target}
        self.patterns = []
        for target in targets:
            if not target.startswith("re:") and "*" not in target:
                continue
            pattern = target[3:] if target.startswith("re:") else translate(target)
            if len(pattern) > 1000 or len(re.findall(r"[*+{]", pattern)) > MOST_LOOPS or re.search(r"\)[*+{]", pattern):
                raise ValueError(f"pattern {target[:60]!r}")
            try:
                self.patterns.append(re.compile(pattern))
            except (re.error, OverflowError, RecursionError):
                raise ValueError(f"pattern {target[:60]!r}") from None

    def match(self, spellings: Sequence[str]) -> bool:
        """Whether a matrix, or a module that it lies in, is named."""
        for name in spellings:
            parts = name.split(".")
            if any(".".join(parts[:size]) in self.exact for size in range(1, len(parts) + 1)):
                return True
            if any(pattern.match(name) for pattern in self.patterns):
                return True
        return False


def weight_bits_of(name: str, table: dict[str, float], flag: str) -> float:
    """Bits a weight.  Raises ``LookupError`` for a name that ``table`` lacks."""
    return table[_known(name, table, flag)]


def kv_method(name: str, model_dtype: str | None) -> str:
    """The method's name for ``--kv-cache-dtype``; ``auto`` is ``model_dtype``, else float16.

    A checkpoint's own type of cache (:func:`cache_dtype`) may stand for ``model_dtype``.

    Raises ``LookupError`` for an unknown name.
    """
    if name.lower() == "auto":
        return KV_DTYPES[model_dtype or "float16"]
    return KV_DTYPES[_known(name, {**KV_DTYPES, "auto": ""}, "kv-cache-dtype")]


def _known(name: str, table: dict[str, float] | dict[str, str], flag: str) -> str:
    key = name.lower()
    if key in table:
        return key
    meant = hint(key, table, cutoff=0.5)
    raise LookupError(f"unknown --{flag} {name!r}: {meant}allowed are {', '.join(table)}")
