"""The methods that a command weighs where none is asked for, as specs: one table, a row a command."""

from __future__ import annotations

COMPRESSED = "kivi"
"""What options such as ``--nbits`` are of, where no method is named; kvruntime's cache, unless another is asked for."""

EXAMPLE = "kivi:nbits=4,group_size=64"
"""A method with options, as help texts show one."""
EXAMPLES = (EXAMPLE, "evict:budget=4096")
"""Several, as the page's field shows them."""
NESTED = "paged:block_size=16,inner=(kivi:nbits=4)"
"""One inside another."""

_THREE = ("fp8", "kivi:nbits=4", "kivi:nbits=2")

DEFAULT_SPECS: dict[str, tuple[str, ...]] = {
    "estimate": ("kivi:nbits=8", "kivi:nbits=4", "kivi:nbits=2"),
    "compare": ("kivi:nbits=8", "kivi:nbits=4", "kivi:nbits=2", "kivi:nbits=2,group_size=64", "kivi-seed"),
    "breakeven": _THREE,
    "breakeven against": ("fp16", "fp8"),
    "plan": ("fp16", *_THREE),
    "page": ("fp16", *_THREE),
    "kvruntime": ("kivi:nbits=2",),
    "kvruntime doctor": (
        *("kivi-boost:nbits=2", "kivi-boost:nbits=2,value_nbits=3", "kivi-boost:nbits=3,value_nbits=3"),
        *("kivi:nbits=4,sink_length=4", "kivi:nbits=8,sink_length=4"),
    ),
    "kvruntime compare": (
        *("kivi-boost:nbits=2", "kivi-boost:nbits=2,value_nbits=3", "kivi-boost:nbits=3,value_nbits=3"),
        *("kivi:nbits=2", "kivi:nbits=2,group_size=64", "kivi:nbits=4,group_size=64", "kivi:nbits=8"),
    ),
    "page offers": ("fp16", "fp8", "int8", "int4", "nvfp4", "q8_0", "q4_0", "kivi:nbits=4", "kivi:nbits=2"),
}
"""Command -> specs.  ``estimate`` (and ``explain``, ``sweep``) and ``compare`` (and ``plot``) show them beside the
uncompressed cache; an engine of its own methods shows those (:attr:`kvsim.engines.engine.Engine.cache_methods`)."""
