"""Bits a weight of what quantization libraries write into a config by keys of their own.

quark, torchao, HQQ, AutoRound, AQLM, BitNet, ExLlama (exl2, exl3), quanto, EETQ, MLX.  Each becomes groups (what they
are for, and bits a weight with the share of scales and zeros) and the layers that it leaves out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Groups = list[tuple[Sequence[str], float | None]]
"""What a group is for (``targets``), and its bits (``None``: not told)."""
Quantization = Mapping[str, Any]
HALF = 16
"""Bits of a scale or a zero in float16 or bfloat16."""
WIDE = 16
"""Bits from which on a layer of AutoRound's is left as it is."""


class Layers(NamedTuple):
    """``groups``, the names ``left_out``, and the bits of a codebook that every matrix has of its own."""

    groups: Groups
    left_out: Any = None
    codebook_bits: float = 0.0


def grouped(bits: object, group: object, scale: int, zeros: float | bool) -> float | None:
    """``bits`` and the share of a scale and of a zero (``True``: of ``bits``, else so many); -1 or no group: a scale
    a channel.  ``None`` for bits that are not 1 to 16."""
    if type(bits) is not int or not 1 <= bits <= 16:
        return None
    if type(group) is not int or group < 1:
        return float(bits)
    return bits + (scale + (bits if zeros is True else zeros)) / group


def layers_of(method: str, quantization: Quantization) -> Layers | None:
    """What ``quant_method`` says of the layers; ``None`` for a method that is none of these."""
    read = LIBRARIES.get(method)
    return read(quantization) if read is not None else None


def is_mlx(quantization: Quantization) -> bool:
    """MLX names no method: it writes ``group_size`` and ``bits`` alone."""
    return "quant_method" not in quantization and {"group_size", "bits"} <= quantization.keys()


def _all(bits: float | None, left_out: object = None) -> Layers:
    return Layers([(["Linear"], bits)], left_out)


def _listed(bits_of: Callable[[Mapping[str, Any]], float | None], layers: object) -> Groups:
    """A group for each layer that is named with settings of its own."""
    named = layers.items() if isinstance(layers, Mapping) else ()
    return [([str(name)], bits_of(row) if isinstance(row, Mapping) else None) for name, row in named]


QUARK = {"fp8_e4m3": 8, "fp8_e5m2": 8, "int8": 8, "uint8": 8, "int4": 4, "uint4": 4, "fp4": 4, "fp6_e2m3": 6,
         "fp6_e3m2": 6, "int3": 3, "int2": 2}  # fmt: skip
"""``dtype`` of a weight -> bits of a code."""


def _quark_bits(row: Mapping[str, Any]) -> float | None:
    """A list names the stages of one quantization: the last is what is stored."""
    told = row.get("weight")
    weight = told[-1] if isinstance(told, list) and told else told
    if weight is None:
        return float(WIDE)  # activations alone
    if not isinstance(weight, Mapping):
        return None
    bits = QUARK.get(str(weight.get("dtype")))
    group = weight.get("group_size") if weight.get("qscheme") == "per_group" else None
    zeros = weight.get("symmetric") is False
    return grouped(bits, group, 8 if weight.get("scale_format") == "e8m0" else HALF, zeros)


def _quark(quantization: Quantization) -> Layers:
    whole = quantization.get("global_quant_config")
    groups = _listed(_quark_bits, quantization.get("layer_quant_config"))
    if isinstance(whole, Mapping) and (whole or not groups):
        groups.append((["Linear"], _quark_bits(whole)))
    return Layers(groups, quantization.get("exclude"))


TORCHAO: dict[str, tuple[int, int | None, int, float]] = {
    "int4weightonly": (4, 128, HALF, HALF),
    "int8weightonly": (8, None, HALF, 0),
    "int8dynamicactivationint8weight": (8, None, HALF, 0),
    "int8dynamicactivationint4weight": (4, 32, HALF, 0),
    "float8weightonly": (8, None, HALF, 0),
    "float8dynamicactivationfloat8weight": (8, None, HALF, 0),
    "float8dynamicactivationint4weight": (4, 128, HALF, 0),
    "nvfp4weightonly": (4, 16, 8, 0),
    "nvfp4dynamicactivationnvfp4weight": (4, 16, 8, 0),
}
"""Its configs -> bits of a code, the group by default, bits of a scale and of a zero."""


def _torchao(quantization: Quantization) -> Layers:
    """``quant_type``: a name with ``quant_type_kwargs``, or the object of a config class."""
    told = quantization.get("quant_type")
    name, data = told, quantization.get("quant_type_kwargs")
    if isinstance(told, Mapping):
        one = told.get("default")
        name, data = (one.get("_type"), one.get("_data")) if isinstance(one, Mapping) else (None, None)
    known = TORCHAO.get(str(name).lower().replace("_", "").removesuffix("config"))
    if known is None:
        return _all(None)
    bits, group, scale, zero = known
    given = data.get("group_size") if isinstance(data, Mapping) else None
    return _all(grouped(bits, given if given is not None else group, scale, zero), _skipped(quantization))


def _hqq(quantization: Quantization) -> Layers:
    """``weight_quant_params`` for all layers, or for each by its name; scales and zeros of 16 bits a group."""
    told = quantization.get("quant_config")
    rows = told if isinstance(told, Mapping) else {}

    def bits_of(row: Mapping[str, Any]) -> float | None:
        params = row.get("weight_quant_params")
        own = params if isinstance(params, Mapping) else row
        return grouped(own.get("nbits"), own.get("group_size"), HALF, HALF)

    if "weight_quant_params" in rows:
        return _all(bits_of(rows), quantization.get("skip_modules"))
    return Layers([([f"re:.*{name}$"], bits) for (name,), bits in _listed(bits_of, rows)])


def _auto_round(quantization: Quantization) -> Layers:
    """``extra_config`` names the layers with bits of their own, of 16 those that are left as they are."""
    floats = str(quantization.get("data_type", "int")).startswith(("mx", "nv"))
    group = quantization.get("group_size", 128)

    def bits_of(row: Mapping[str, Any]) -> float | None:
        bits, own = row.get("bits", quantization.get("bits")), row.get("group_size", group)
        if type(bits) is int and bits >= WIDE:
            return float(WIDE)
        return grouped(bits, own, 8, 0) if floats else grouped(bits, own, HALF, zeros=True)

    return Layers([*_listed(bits_of, quantization.get("extra_config")), (["Linear"], bits_of({}))])


def _aqlm(quantization: Quantization) -> Layers:
    """Vectors of ``in_group_size`` x ``out_group_size`` weights, each the sum of an entry of every codebook."""
    keys = ("in_group_size", "out_group_size", "num_codebooks", "nbits_per_codebook")
    sizes = [quantization.get(key) for key in keys]
    if not all(type(size) is int and 0 < size <= 64 for size in sizes):
        return _all(None)
    wide, high, books, bits = (int(size or 0) for size in sizes)
    left = quantization.get("linear_weights_not_to_quantize")
    plain = [str(name).removesuffix(".weight") for name in left] if isinstance(left, list) else None
    return Layers([(["Linear"], books * bits / (wide * high))], plain, books * 2.0**bits * wide * high * HALF)


def _bitnet(quantization: Quantization) -> Layers:
    """Four ternary weights a byte, unless they are packed when they are loaded (``online``)."""
    packed = quantization.get("quantization_mode", "offline") == "offline"
    return _all(2.0 if packed else float(WIDE), _skipped(quantization))


def _exllama(quantization: Quantization) -> Layers:
    """The mean over the layers, scales among them, as its quantizer aimed at it."""
    bits = quantization.get("bits")
    number = isinstance(bits, int | float) and not isinstance(bits, bool) and 1 <= bits <= 16
    return _all(float(bits) if number else None)  # type: ignore[arg-type]


def _quanto(quantization: Quantization) -> Layers:
    """A scale a channel of 8 bits, of 4 and 2 a scale and a shift for 128."""
    bits = {"int8": 8, "float8": 8, "int4": 4, "int2": 2}.get(str(quantization.get("weights")))
    small = bits is not None and bits < 8
    return _all(grouped(bits, 128 if small else None, HALF, HALF if small else 0), _skipped(quantization))


def _eetq(quantization: Quantization) -> Layers:
    return _all(8.0 if quantization.get("weights", "int8") == "int8" else None, _skipped(quantization))


def _mlx(quantization: Quantization) -> Layers:
    """A scale and a bias of 16 bits a group (``affine``), or a block float's; layers with settings of their own are
    named beside, ``false`` for those left as they are."""
    small = {"mxfp4": 8, "mxfp8": 8, "nvfp4": 8}.get(str(quantization.get("mode")))

    def bits_of(row: Mapping[str, Any]) -> float | None:
        bits, group = (row.get(key, quantization.get(key)) for key in ("bits", "group_size"))
        return grouped(bits, group, small, 0) if small else grouped(bits, group, HALF, HALF)

    own = {name: row for name, row in quantization.items() if isinstance(row, Mapping)}
    left = [name for name, row in quantization.items() if row is False]
    return Layers([*_listed(bits_of, own), (["Linear"], bits_of({}))], left)


def _skipped(quantization: Quantization) -> Any:
    """transformers' list: a name stands for every module that has it in its path."""
    left = quantization.get("modules_to_not_convert")
    return [f"*{name}*" for name in left] if isinstance(left, list) else None


LIBRARIES: dict[str, Callable[[Quantization], Layers]] = {
    "quark": _quark,
    "torchao": _torchao,
    "hqq": _hqq,
    "auto-round": _auto_round,
    "autoround": _auto_round,
    "intel/auto-round": _auto_round,
    "aqlm": _aqlm,
    "bitnet": _bitnet,
    "exl2": _exllama,
    "exl3": _exllama,
    "quanto": _quanto,
    "eetq": _eetq,
    "mlx": _mlx,
}
"""``quant_method``, dashes for underscores -> how its keys are read."""
