"""The methods by name: one table row a method, one file each."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature

from kvsim.layout import Method
from kvsim.methods.by_layer import at, in_order, placed
from kvsim.methods.evict import Evict
from kvsim.methods.fp8 import Fp8
from kvsim.methods.full import Full
from kvsim.methods.ggml import Ggml
from kvsim.methods.kivi import Kivi, kivi_boost, kivi_seed
from kvsim.methods.layer_mix import LayerMix
from kvsim.methods.nvfp4 import Nvfp4
from kvsim.methods.paged import Paged
from kvsim.methods.slot import Slot
from kvsim.methods.token import PerTokenHead, TurboQuant
from kvsim.nearest import hint

METHODS: dict[str, Callable[..., Method]] = {
    "fp16": lambda: Full("float16"),
    "bf16": lambda: Full("bfloat16"),
    "fp32": lambda: Full("float32"),
    "kivi": Kivi,
    "kivi-seed": kivi_seed,
    "kivi-boost": kivi_boost,
    "fp8": Fp8,
    "fp8-e5m2": lambda: Fp8("e5m2"),
    "fp8-token-head": lambda scale_dtype="float32": PerTokenHead("fp8", scale_dtype),
    "fp8-e5m2-token-head": lambda scale_dtype="float32": PerTokenHead("fp8-e5m2", scale_dtype),
    "int8": lambda scale_dtype="float32": PerTokenHead("int8", scale_dtype),
    "int4": lambda scale_dtype="float32": PerTokenHead("int4", scale_dtype),
    "nvfp4": Nvfp4,
    "turboquant": TurboQuant,
    "turboquant_k8v4": lambda: Slot("turboquant_k8v4"),
    "turboquant_4bit_nc": lambda: Slot("turboquant_4bit_nc"),
    "turboquant_k3v4_nc": lambda: Slot("turboquant_k3v4_nc"),
    "turboquant_3bit_nc": lambda: Slot("turboquant_3bit_nc"),
    "ultraquant_4bit": lambda: Slot("ultraquant_4bit"),
    "q8_0": lambda value_type="q8_0": Ggml("q8_0", value_type),
    "q5_1": lambda value_type="q5_1": Ggml("q5_1", value_type),
    "q5_0": lambda value_type="q5_0": Ggml("q5_0", value_type),
    "q4_1": lambda value_type="q4_1": Ggml("q4_1", value_type),
    "q4_0": lambda value_type="q4_0": Ggml("q4_0", value_type),
    "ggml": Ggml,
    "evict": Evict,
    "paged": Paged,
    "mix": LayerMix,
}
"""Name -> factory; keyword arguments are the method's own fields."""


def method_named(name: str) -> Method:
    """The method of a name in a table: one of :data:`METHODS` without options, or what a method makes of its own
    ``name`` (``named``).  Raises ``LookupError`` for any other."""
    if name in METHODS:
        return METHODS[name]()
    for kind in dict.fromkeys(make for make in METHODS.values() if hasattr(make, "named")):
        found: Method | None = kind.named(name)
        if found is not None:
            return found
    raise LookupError(f"no method is named {name[:60]!r}")


def make_method(name: str, **options: object) -> Method:
    """The named method with its options; an ``inner`` method may be a name too.

    Raises ``LookupError`` for an unknown name and ``ValueError`` for an option the method does not have.
    """
    if name not in METHODS:
        meant = hint(name, METHODS, cutoff=0.4)
        raise LookupError(f"unknown method {name!r}: {meant}allowed are {', '.join(METHODS)}")
    if isinstance(options.get("inner"), str):
        options["inner"] = make_method(str(options["inner"]))
    try:
        return METHODS[name](**options)
    except TypeError:
        unknown = sorted(options.keys() - signature(METHODS[name]).parameters.keys())
        if unknown:
            raise ValueError(f"method {name!r} does not take {', '.join(unknown)}") from None
        given = ", ".join(f"{key}={value!r}" for key, value in options.items())
        raise ValueError(f"method {name!r}: a value of the wrong kind among {given}") from None


__all__ = [
    "METHODS",
    "Evict",
    "Fp8",
    "Full",
    "Ggml",
    "Kivi",
    "LayerMix",
    "Nvfp4",
    "Paged",
    "PerTokenHead",
    "Slot",
    "TurboQuant",
    "at",
    "in_order",
    "kivi_boost",
    "kivi_seed",
    "make_method",
    "method_named",
    "placed",
]
