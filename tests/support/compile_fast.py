"""Compile the Gluon kernel for several compute capabilities, without a GPU, and print what each build uses as JSON.

Run by ``test_fast.py`` in a process of its own, because the interpreter and the compiler exclude each other.
``--pairs``, as the tests have it, compiles some variants for every second layout: 266 builds for 293.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import triton
from compile_kernels import Task, chosen, unrounded
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from kvruntime.kernels import merge
from kvruntime.methods.kivi import fast, fast_plan
from kvsim.layout import LayerShape
from kvsim.methods import Kivi, kivi_boost

METHODS = {  # method, head_dim, q_per_kv, dtype of query and exact tokens
    "2-bit g32 d128": (Kivi(), 128, 4, "fp16"),
    "2-bit g64 d128": (Kivi(group_size=64), 128, 4, "fp16"),
    "2-bit g64 d128 bf16": (Kivi(group_size=64), 128, 4, "bf16"),
    "2-bit g64 d128 q8": (Kivi(group_size=64), 128, 8, "fp16"),
    "2-bit g128 d128": (Kivi(group_size=128), 128, 4, "fp16"),
    "4-bit g64 d128": (Kivi(nbits=4, group_size=64), 128, 4, "fp16"),
    "8-bit g64 d128": (Kivi(nbits=8, group_size=64), 128, 1, "fp16"),
    "k4v2 g64 d128": (Kivi(key_nbits=4, value_nbits=2, group_size=64), 128, 4, "fp16"),
    "2-bit g32 d64": (Kivi(), 64, 1, "fp16"),
    "2-bit g64 d64": (Kivi(group_size=64), 64, 1, "fp16"),
}
TWO_CHUNKS = {  # the kernels with most in them: all of them take minutes
    "2-bit g32 d96": (Kivi(), 96, 1, "fp16"),
    "4-bit g32 d96": (Kivi(nbits=4), 96, 4, "fp16"),
    "k4v2 g32 d96": (Kivi(key_nbits=4, value_nbits=2), 96, 8, "bf16"),
    "2-bit gv80 d80": (Kivi(group_size=64, value_group_size="head"), 80, 1, "fp16"),
    "4-bit gv80 d80": (Kivi(nbits=4, group_size=64, value_group_size="head"), 80, 4, "fp16"),
    "2-bit g32 gv16 d80": (Kivi(value_group_size=16), 80, 8, "bf16"),
    "k8v2 g32 gv16 d80": (Kivi(key_nbits=8, value_nbits=2, value_group_size=16), 80, 4, "fp16"),
}
TWO_CHUNKS_IN = ("attend", "attend_drawn", "attend_scores", "attend_queries_table_shares", "combine", "combine_few")
HEADS_256 = {  # one query, splits, groups of 64 and more
    "2-bit g64 d256": (Kivi(group_size=64), 256, 4, "fp16"),
    "2-bit g64 d256 bf16": (Kivi(group_size=64), 256, 8, "bf16"),
    "2-bit g128 d256": (Kivi(group_size=128), 256, 4, "fp16"),
    "4-bit g64 d256": (Kivi(nbits=4, group_size=64), 256, 4, "fp16"),
    "8-bit g64 d256": (Kivi(nbits=8, group_size=64), 256, 1, "bf16"),
    "k4v2 g64 d256": (Kivi(key_nbits=4, value_nbits=2, group_size=64), 256, 4, "fp16"),
    "k2v8 g64 d256": (Kivi(key_nbits=2, value_nbits=8, group_size=64), 256, 4, "fp16"),
}
HEADS_512 = {"2-bit g64 d512": (Kivi(group_size=64), 512, 4, "bf16")}
HEADS_512_IN = ("attend",)
BOOST = {
    "boost d128": (kivi_boost(), 128, 4, "fp16"),
    "boost d64": (kivi_boost(), 64, 3, "bf16"),
    "rotated g64 d128": (Kivi(group_size=64, rotate_values=True), 128, 4, "bf16"),
}
BOOST_IN = ("attend_drawn", "attend_queries_table_shares", "combine")
HEADS_256_IN = ("attend", "attend_table", "attend_scores", "combine", "combine_few")
METHODS |= TWO_CHUNKS | HEADS_256 | HEADS_512 | BOOST
CHANGED = ("2-bit g64 d128", "2-bit g64 d64", "2-bit g64 d128 q8", "2-bit g64 d256", "2-bit g32 d96")
POOLED = ("2-bit g64 d128", "2-bit g32 d128", "4-bit g64 d128")
EVERYWHERE = ("2-bit g64 d128", "2-bit g64 d64", "2-bit g64 d256", "2-bit g32 d96", "2-bit gv80 d80")
QUERIES = (
    *("num_queries", "stride_ql", "new_key_ptr", "new_value_ptr", "counts_ptr"),
    *(f"stride_{x}{axis}" for x in "kv" for axis in "bht"),
)
TABLE = ("table_ptr",)
PAGES = ("exact_table_ptr", "num_pages", *(f"stride_{x}{axis}" for x in "xy" for axis in "bht"))
MERGED = ("arrivals_ptr",)
DRAWN = ("draws_ptr",)
ORDER = ("order_ptr",)
SCORES = ("sinks_ptr", "softcap", "window")
OPTIONAL = {*QUERIES, *TABLE, *PAGES, *MERGED, *DRAWN, *ORDER, *SCORES}
POINTERS = dict.fromkeys(("partial_ptr", "lse_ptr"), "*fp32") | dict.fromkeys(
    ("records_ptr", "lengths_ptr", "packed_ptr", "counts_ptr", "table_ptr", "exact_table_ptr", *MERGED, *DRAWN), "*i32"
)
POINTERS |= {"order_ptr": "*u8"}


def arguments(kernel, dtype: str, given: tuple[str, ...] = ()) -> dict[str, str]:
    """Types of a kernel's arguments; of the optional ones those ``given``, the others are None."""
    names = [name for name in kernel.arg_names if not name.isupper() and (name in given or name not in OPTIONAL)]
    types = {name: POINTERS.get(name, f"*{dtype}") if name.endswith("_ptr") else "i32" for name in names}
    return types | {name: "fp32" for name in ("scale_log2", "softcap") if name in types}


def build(
    kernel, source, types: dict[str, str], constants: dict[str, object], sm: int, **options: int
) -> dict[str, int]:
    """REG, STACK, ... as the binary states them; of its innermost loop that copies and multiplies, the number of
    instructions (``loop``) and of those that touch local memory (``loop_local``); and how many sums are
    ``unrounded``."""
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    constants = constants | {name: None for name in kernel.arg_names if name in OPTIONAL - types.keys()}
    aligned = [name for name in types if name.endswith("_ptr") or name.startswith("stride")]
    attrs = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    options = {"enable_fp_fusion": True, **options}
    binary = triton.compile(
        source(kernel, signature, constants, attrs), target=GPUTarget("cuda", sm, 32), options=options
    )
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary.asm["cubin"])
        dump = [tools / "cuobjdump", "-res-usage", "-sass", path]
        text = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    line = next(line for line in text.splitlines() if "REG:" in line)
    used = {key: int(value) for key, value in (pair.split(":") for pair in line.split() if pair.count(":") == 1)}
    code = [(int(at, 16), what) for at, what in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", text)]
    loops = []
    for at, what in code:
        jump = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", what)
        if jump and int(jump[1], 16) < at:
            body = [text for place, text in code if int(jump[1], 16) <= place <= at]
            if any("HMMA" in text for text in body) and any("LDGSTS" in text for text in body):
                loops.append(body)
    inner = min(loops, key=len, default=[])
    local = sum(bool(re.search(r"\b(LDL|STL)", text)) for text in inner)
    counts = {"instructions": len(code), "loop": len(inner), "loop_local": local}
    return used | counts | {"unrounded": unrounded(binary.asm["ptx"])}


def attend(
    name: str, sm: int, shares: bool = False, given: tuple[str, ...] = (), whole: bool = False
) -> dict[str, int]:
    method, dim, q_per_kv, dtype = METHODS[name]
    queries = 5 if "num_queries" in given else None
    constants = fast_plan.constants(method.record(LayerShape(8, dim, dim)), 0, 128, 8, q_per_kv, queries) | {
        "BLOCK_B": 32 if shares else 0, "AT_ONCE": not shares,
        "STAGES": fast_plan.STAGES, "SPARE": 0, "EARLY": sm >= 90,
        "WHOLE": whole, "PAGE": 16 if PAGES[0] in given else 0,
    }  # fmt: skip
    if constants["PAGE"]:
        constants["AT_ONCE"] = False
    if method.boost_nbits:
        types = arguments(fast.attend_kernel, dtype, given + ORDER)
    else:
        types = arguments(fast.attend_kernel, dtype, given if shares or queries or whole else given + MERGED)
    registers = fast_plan.REGISTERS if queries else fast_plan.MAX_REGISTERS[dim]
    used = build(fast.attend_kernel, GluonASTSource, types, constants, sm, num_warps=1, maxnreg=registers)
    return used | {"elements": 2 * 64 * dim // 32}


def attend_drawn(name: str, sm: int) -> dict[str, int]:
    return attend(name, sm, given=DRAWN)


def attend_whole(name: str, sm: int) -> dict[str, int]:
    return attend(name, sm, whole=True)


def attend_shares(name: str, sm: int) -> dict[str, int]:
    return attend(name, sm, shares=True)


def attend_queries(name: str, sm: int) -> dict[str, int]:
    return attend(name, sm, given=QUERIES)


def attend_queries_shares(name: str, sm: int) -> dict[str, int]:
    return attend(name, sm, shares=True, given=QUERIES)


def attend_table(name: str, sm: int) -> dict[str, int]:
    return attend(name, sm, given=TABLE)


def attend_queries_table_shares(name: str, sm: int) -> dict[str, int]:
    return attend(name, sm, shares=True, given=QUERIES + TABLE)


def attend_pool(name: str, sm: int) -> dict[str, int]:
    return attend(name, sm, given=TABLE + PAGES)


def attend_queries_pool(name: str, sm: int) -> dict[str, int]:
    return attend(name, sm, given=QUERIES + TABLE + PAGES)


def attend_scores(name: str, sm: int) -> dict[str, int]:
    """With sinks and a softcap."""
    return attend(name, sm, given=SCORES)


def attend_queries_scores(name: str, sm: int) -> dict[str, int]:
    return attend(name, sm, shares=True, given=QUERIES + SCORES)


def combine(name: str, sm: int, given: tuple[str, ...] = DRAWN, parts: int = 64, shares: bool = True) -> dict[str, int]:
    method, dim, q_per_kv, dtype = METHODS[name]
    block_d = dim & -dim
    warps = 4 if parts * block_d >= 1024 else 1
    if method.rotate_values:
        parts, block_d, warps = fast_plan.plan_merge(2 * parts, dim, block_d)
    constants = {
        "NUM_HEADS": 8, "Q_PER_KV": q_per_kv, "HEADS": q_per_kv, "DIM": dim, "BLOCK_B": 32 if shares else 0,
        "BLOCK_D": block_d, "BLOCK_S": parts, "EARLY": sm >= 90,
        "ROTATION": block_d if method.rotate_values else 0,
    }  # fmt: skip
    options = {"num_warps": warps, "enable_fp_fusion": merge.FUSED_MERGE}
    return build(fast.combine_kernel, ASTSource, arguments(fast.combine_kernel, dtype, given), constants, sm, **options)


def combine_few(name: str, sm: int) -> dict[str, int]:
    return combine(name, sm, parts=2, shares=False)


def combine_queries(name: str, sm: int) -> dict[str, int]:
    return combine(name, sm, given=QUERIES)


KERNELS = {
    function.__name__: function
    for function in (
        attend,
        attend_drawn,
        attend_whole,
        attend_shares,
        attend_queries,
        attend_queries_shares,
        attend_table,
        attend_queries_table_shares,
        attend_pool,
        attend_queries_pool,
        attend_scores,
        attend_queries_scores,
        combine,
        combine_few,
        combine_queries,
    )
}


HALVED = ("attend_whole", "attend_shares", "attend_queries", "attend_queries_shares", "attend_table", "combine_queries")
"""What ``--pairs`` compiles for every second layout, the odd and the even ones in turn: every layout has three of them,
and ``attend_queries_table_shares`` with all of it for every layout."""


def tasks(in_pairs: bool) -> list[Task]:
    """What is compiled: for sm_90 everything, for the other targets some layouts, ``in_pairs`` the one of
    them that came least."""
    out: list[Task] = []
    for kernel in KERNELS:
        names = POOLED if kernel.endswith("pool") else CHANGED if kernel.endswith("scores") else METHODS
        names = [
            name
            for name in names
            if (name not in HEADS_256 or kernel in HEADS_256_IN)
            and (name not in TWO_CHUNKS or kernel in TWO_CHUNKS_IN)
            and (name not in BOOST or kernel in BOOST_IN)
            and (name not in HEADS_512 or kernel in HEADS_512_IN)
        ]
        if in_pairs and kernel in HALVED:
            second = names[HALVED.index(kernel) % 2 :: 2]
            names = [name for name in names if name in second or name in EVERYWHERE]
        out += [(kernel, name, 90) for name in names]
        others = [name for name in names if name in EVERYWHERE]
        for sm in (80, 89, 100):
            seen = [name for _, name, target in out if target == sm]
            taken = [min(others, key=seen.count)] if in_pairs else others
            out += [(kernel, name, sm) for name in taken]
    return out


def one(task: Task) -> tuple[str, str, int, dict[str, int] | str]:
    kernel, name, sm = task
    try:
        return kernel, name, sm, KERNELS[kernel](name, sm)
    except Exception as error:
        return kernel, name, sm, f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    words = sys.argv[1:]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for row in pool.map(one, chosen(tasks("--pairs" in words), [word for word in words if word != "--pairs"])):
            print(json.dumps(row), flush=True)
