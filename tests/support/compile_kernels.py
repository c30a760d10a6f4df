"""Compile every kernel for several compute capabilities, without a GPU, and print what each uses as JSON lines.

Run by ``test_kernels_compile.py`` in a process of its own, because the interpreter and the compiler exclude each other.
``--record`` notes how many instructions each takes, the ceilings of that test; a word compiles what it is a part of.
``--pairs``, as the tests have it, compiles a kernel for every layout and for every target, not for every layout on
every target: a quarter of the whole.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

from kvruntime.engine import hopper, norm, product
from kvruntime.engine import linear as narrow
from kvruntime.kernels import gated, merge, rotary, slots
from kvruntime.kernels import prompt as prompts
from kvruntime.kernels import rms_norm as norms
from kvruntime.methods.full import decode
from kvruntime.methods.kivi import append, attention, first_record, forget, paged_kernels, step, words
from kvruntime.methods.kivi import pack as quantize
from kvruntime.methods.token import attention as token
from kvruntime.methods.token import fast as token_fast
from kvruntime.methods.token import fast_plan as token_fast_plan
from kvruntime.methods.token import fast_store as token_fast_store
from kvruntime.methods.token import latent
from kvruntime.methods.token import paged_kernels as token_pages
from kvruntime.methods.token import store as token_store
from kvruntime.methods.token.reference import Layout
from kvruntime.methods.token.words import layout_constants
from kvsim.layout import LayerShape
from kvsim.methods import Kivi, kivi_boost, kivi_seed

TARGETS = (80, 89, 90, 100)
INSTRUCTIONS = Path(__file__).with_name("instructions.json")
METHODS = {
    "2-bit g32 d64": (Kivi(), 64),
    "2-bit g32 d128": (Kivi(), 128),
    "2-bit g64 d128": (Kivi(group_size=64), 128),
    "2-bit g128 d128": (Kivi(group_size=128), 128),
    "4-bit g64 d128": (Kivi(nbits=4, group_size=64), 128),
    "8-bit g32 d64": (Kivi(nbits=8), 64),
    "3-bit g32 d96": (Kivi(nbits=3), 96),
    "k4v2 gv16 d80": (Kivi(key_nbits=4, value_nbits=2, value_group_size=16), 80),
    "3-bit gv40 d80": (Kivi(nbits=3, group_size=64, residual_length=64, value_group_size=40), 80),
    "2-bit gv80 d80": (Kivi(value_group_size=80), 80),
    "2-bit g32 d256": (Kivi(), 256),
    "seed d64": (kivi_seed(), 64),
    "boost d128": (kivi_boost(), 128),
    "boost d256": (kivi_boost(), 256),
    "rotated d128": (Kivi(value_nbits=4, rotate_values=True), 128),
    "rotated d256": (Kivi(value_nbits=4, rotate_values=True), 256),
    "3-bit g32 d512": (Kivi(nbits=3), 512),
}
LAYERS = {  # rows, N, K, norm, bias, activation, dtype
    "gpt2 qkv": (1, 2304, 768, "layer", True, None, "fp16"),
    "gpt2 out": (1, 768, 768, None, True, None, "fp16"),
    "gpt2 up": (1, 3072, 768, "layer", True, "gelu", "fp16"),
    "gpt2 down": (1, 768, 3072, None, True, None, "fp16"),
    "gpt2 head": (1, 50257, 768, "layer", False, None, "fp16"),
    "gpt2 qkv x4": (4, 2304, 768, "layer", True, None, "fp16"),
    "gpt2-large up float32": (2, 5120, 1280, "layer", True, "gelu", "fp32"),
    "llama qkv": (1, 6144, 4096, "rms", False, None, "bf16"),
    "llama up": (1, 14336, 4096, "rms", False, "silu", "bf16"),
    "llama down": (1, 4096, 14336, None, False, None, "bf16"),
    "llama up x4": (4, 14336, 4096, "rms", False, "silu", "bf16"),
    "llama down x4": (4, 4096, 14336, None, False, None, "bf16"),
    "llama wide up": (2, 13824, 5120, "rms", False, "silu", "bf16"),
}
PRODUCTS = {  # rows, N, K, activation, in parts, dtype
    "gpt2 qkv x64": (64, 2304, 768, None, False, "fp16"),
    "gpt2 up x64": (64, 3072, 768, "gelu", False, "fp16"),
    "gpt2 down x64": (64, 768, 3072, None, True, "fp16"),
    "gpt2 head x64": (64, 50257, 768, None, False, "fp16"),
    "gpt2 down x8": (8, 768, 3072, None, True, "fp16"),
    "llama qkv x8": (8, 6144, 4096, None, False, "bf16"),
    "llama up x8": (8, 14336, 4096, "silu", False, "bf16"),
    "llama down x8": (8, 4096, 14336, None, True, "bf16"),
    "llama down x8 float32": (8, 4096, 14336, None, False, "fp32"),
    "llama head x32": (32, 128256, 4096, None, False, "bf16"),
    "llama up x64": (64, 14336, 4096, "silu", False, "bf16"),
}
STREAMS = {name: point for name, point in PRODUCTS.items() if point[-1] != "fp32"} | {
    "gpt2 qkv x1": (1, 2304, 768, None, False, "fp16"),
    "llama up x128": (128, 14336, 4096, "silu", False, "bf16"),
    "llama down x128": (128, 4096, 14336, None, True, "bf16"),
}
WHOLE = {  # head dimension, query heads a key/value head, dtype
    "gpt2": (64, 1, "fp16"),
    "llama": (128, 4, "bf16"),
    "llama fp32": (128, 4, "fp32"),
    "phi": (80, 1, "fp16"),
    "gemma": (256, 16, "bf16"),
    "gemma fp32": (256, 16, "fp32"),
    "gemma 512": (512, 8, "bf16"),
}
SHARED_BYTES = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}  # that a program may have
CODED = {  # coding of keys and of values, head dimension, type of scales
    "int8": ("int8", "int8", 128, "fp32"),
    "int4 d80": ("int4", "int4", 80, "fp16"),
    "e4m3 e5m2": ("e4m3", "e5m2", 128, "fp32"),
    "e4m3 e5m2 d256": ("e4m3", "e5m2", 256, "fp32"),
    "lloyd4": ("lloyd4", "lloyd4", 128, "fp16"),
    "lloyd3": ("lloyd3", "lloyd3", 128, "fp16"),
    "lloyd2 lloyd3 d64": ("lloyd2", "lloyd3", 64, "fp16"),
    "lloyd2.5 lloyd3.5": ("lloyd2.5", "lloyd3.5", 128, "fp16"),
    "lloyd4 d256": ("lloyd4", "lloyd4", 256, "fp16"),
}
WHOLE_NUMBERS = {name: CODED[name] for name in ("int8", "lloyd4", "lloyd3")} | {
    "int4": ("int4", "int4", 128, "fp32"),
    "lloyd2": ("lloyd2", "lloyd2", 128, "fp16"),
}
HIDDEN = {"llama": (4096, False, "bf16"), "gemma": (2560, True, "fp16"), "exact": (2048, False, "fp32")}
"""Hidden states of the fused parts of a model's step: channels, a weight that counts from one, type."""
NORMS = {"gpt2": (768, "layer", "fp16", 8), "llama": (4096, "rms", "bf16", 2), "wide": (8192, "rms", "bf16", 1)}
INTEGERS = dict.fromkeys(
    ("records_ptr", "lengths_ptr", "packed_ptr", "held_ptr", "counts_ptr", "positions_ptr"), "*i32"
)
INTEGERS |= dict.fromkeys(("table_ptr", "starts_ptr", "block_table_ptr", "exact_table_ptr"), "*i32")
INTEGERS |= {"layers_ptr": "*i64", "order_ptr": "*u8"}
INTEGERS |= {f"{stream}_{what}_ptr": type_ for stream in ("key", "value") for what, type_ in (
    ("codes", "*u8"), ("signs", "*i8"), ("lookup", "*i32"))} | {"signs_ptr": "*i8"}  # fmt: skip


def compiled(
    kernel, types: dict[str, str], constants: dict[str, object], sm: int, num_warps: int, **options: int
) -> dict[str, object]:
    """What the compiler makes of a kernel for compute capability ``sm`` (90 = sm_90): ``ptx``, ``cubin``, ...

    Pointers and strides are 16-byte aligned, as PyTorch's are.  Raises ``ValueError`` where the device has less
    shared memory.
    """
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    constants = constants | {name: None for name in kernel.arg_names if name not in types and name not in constants}
    attrs = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if types.get(name, "").startswith("*") or (name in types and name.startswith("stride"))
    }
    kind = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    source = kind(kernel, signature, constants, attrs)
    options = {"enable_fp_fusion": True, "num_warps": num_warps, **options}
    made = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    if made.metadata.shared > SHARED_BYTES[sm]:
        raise ValueError(f"{made.metadata.shared} bytes of shared memory: sm_{sm} has {SHARED_BYTES[sm]}")
    return made.asm


def resources(
    kernel, types: dict[str, str], constants: dict[str, object], sm: int, num_warps: int, **options: int
) -> dict[str, int]:
    """REG, STACK, SHARED, ... as the binary states them, ``instructions`` and ``unrounded`` sums."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        built = compiled(kernel, types, constants, sm, num_warps, **options)
        path.write_bytes(built["cubin"])
        dump = [tools / "cuobjdump", "-res-usage", "-sass", path]
        text = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    line = next(line for line in text.splitlines() if "REG:" in line)
    used = {key: int(value) for key, value in (pair.split(":") for pair in line.split() if pair.count(":") == 1)}
    count = sum(line.lstrip().startswith("/*") and ";" in line for line in text.splitlines())
    return used | {"instructions": count, "unrounded": unrounded(built["ptx"])}


def unrounded(ptx: str) -> int:
    """Sums over threads in PTX that add a product, not rounded, to what came from another thread: each of the threads
    ends with a sum of its own, and where all write it to one place of shared memory that is a race."""
    came = set(re.findall(r"shfl\.sync\.bfly\.b32\s+(%\w+)", ptx))
    came |= {to for to, source in re.findall(r"mov\.b32\s+(%\w+), (%\w+);", ptx) if source in came}
    return sum(summand in came for summand in re.findall(r"fma\.rn\.f32\s+%\w+, %\w+, %\w+, (%\w+);", ptx))


def arguments(kernel, dtype: str, **fixed: str) -> dict[str, str]:
    """Argument types: pointers to ``dtype`` unless ``fixed`` or ``INTEGERS`` says otherwise, scalars i32."""
    known = INTEGERS | fixed
    names = (name for name in kernel.arg_names if not name.isupper())
    return {name: known.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32") for name in names}


PAGES = ("exact_table_ptr", "num_pages", *(f"stride_{x}{axis}" for x in "xy" for axis in "bht"))
SCORES = {"sinks_ptr", "softcap", "window"}
POOL = {"table_ptr", "block_table_ptr", "starts_ptr", *PAGES}


def plain(types: dict[str, str]) -> dict[str, str]:
    """Argument types of a kernel that attends without sinks and softcap."""
    return {name: type_ for name, type_ in types.items() if name not in SCORES}


def own_rows(types: dict[str, str]) -> dict[str, str]:
    """Argument types of a kernel whose rows have records and slots of their own: no pool, no line."""
    return {name: type_ for name, type_ in types.items() if name not in POOL}


def ordered(types: dict[str, str], record) -> dict[str, str]:
    """Argument types of a kernel, without the order of channels where none are boosted."""
    return {name: type_ for name, type_ in types.items() if name != "order_ptr" or record.boosted}


def one_layer(types: dict[str, str]) -> dict[str, str]:
    """Argument types of a kernel that stores one layer, without the table of layers."""
    return {name: type_ for name, type_ in types.items() if name != "layers_ptr"}


def pack(name: str, sm: int, layers: bool = False, pool: bool = False) -> dict[str, int]:
    method, dim = METHODS[name]
    record = method.record(LayerShape(8, dim, dim))
    constants = words.record_constants(record) | {
        "NUM_HEADS": 8, "NEW": True, "SINK": method.sink_length, "RESIDUAL": method.residual_length,
        "PAGE": 16 if pool else 0, "BLOCK_B": 32 if pool else 0,
    }  # fmt: skip
    types = arguments(quantize.pack_kernel, "fp16", params_ptr="*fp16")
    types = ordered(types if pool else own_rows(types), record)
    launch = dict(quantize.pack_launch(record))
    num_warps = launch.pop("num_warps")
    types = types if layers else one_layer(types)
    options = quantize.permuting(record) if pool else {}
    return resources(quantize.pack_kernel, types, constants | launch, sm, num_warps, **options)


def pack_pool(name: str, sm: int) -> dict[str, int]:
    return pack(name, sm, pool=True)


def pages(name: str, sm: int, single: bool = False) -> dict[str, int]:
    """An engine's pages: records of rows that bring several tokens, or (``single``) one, which is stored too."""
    method, dim = METHODS[name]
    record = method.record(LayerShape(8, dim, dim))
    constants = words.record_constants(record) | {
        "NUM_HEADS": 8, "RESIDUAL": method.residual_length, "PAGE": 8, "SINGLE": single, "EARLY": single and sm >= 90,
        "BLOCK_D": triton.next_power_of_2(dim),
    }  # fmt: skip
    launch = dict(quantize.pack_launch(record))
    num_warps = launch.pop("num_warps")
    types = arguments(paged_kernels.pages_kernel, "bf16", slots_ptr="*i64")
    options = quantize.permuting(record)
    return resources(paged_kernels.pages_kernel, types, constants | launch, sm, num_warps, **options)


def pages_single(name: str, sm: int) -> dict[str, int]:
    return pages(name, sm, single=True)


def gather(name: str, sm: int) -> dict[str, int]:
    method, dim = METHODS[name]
    record = method.record(LayerShape(8, dim, dim))
    constants = words.record_constants(record) | {"NUM_HEADS": 8, "PAGE": 8, "DOT": tl.float16, "BLOCK_B": 32}
    types = arguments(paged_kernels.gather_kernel, "bf16", begins_ptr="*i32", before_ptr="*i32")
    return resources(paged_kernels.gather_kernel, types, constants, sm, paged_kernels.gather_warps(record))


def store_slots(name: str, sm: int) -> dict[str, int]:
    dim, _, dtype = WHOLE[name]
    constants = {"KEY_DIM": dim, "VALUE_DIM": dim, "PAGE": 8, "BLOCK_T": 16, "BLOCK_D": triton.next_power_of_2(dim)}
    return resources(
        slots.store_slots_kernel, arguments(slots.store_slots_kernel, dtype, slots_ptr="*i64"), constants, sm, 4
    )


def pack_layers(name: str, sm: int) -> dict[str, int]:
    return pack(name, sm, layers=True)


def store(name: str, sm: int, layers: bool = False, pool: bool = False) -> dict[str, int]:
    method, dim = METHODS[name]
    constants = {
        "NUM_HEADS": 8, "KEY_DIM": dim, "VALUE_DIM": dim, "RECORD": method.record_length, "BLOCK_T": 16,
        "SINK": method.sink_length, "RESIDUAL": method.residual_length, "BLOCK_D": triton.next_power_of_2(dim),
        "PAGE": 16 if pool else 0, "BLOCK_B": 32 if pool else 0, "ROTATION": dim & -dim if method.rotate_values else 0,
    }  # fmt: skip
    types = arguments(append.store_kernel, "bf16")
    types = types if pool else own_rows(types)
    return resources(append.store_kernel, types if layers else one_layer(types), constants, sm, 4)


def store_pool(name: str, sm: int) -> dict[str, int]:
    return store(name, sm, pool=True)


def store_layers(name: str, sm: int) -> dict[str, int]:
    return store(name, sm, layers=True)


def attend(
    name: str, sm: int, rows: int = 4, dtype: str = "fp16", table: bool = False, pool: bool = False,
    scores: bool = False,
) -> dict[str, int]:  # fmt: skip
    method, dim = METHODS[name]
    record = method.record(LayerShape(8, dim, dim))
    fixed = {"params_ptr": "*fp16", "out_ptr": "*fp32", "lse_ptr": "*fp32", "scale_log2": "fp32", "softcap": "fp32"}
    types = arguments(attention.attend_kernel, dtype, **fixed)
    types = types if scores else plain(types)
    for absent in ("new_key_ptr", "new_value_ptr", "counts_ptr") * (rows == 4):
        del types[absent]
    if not pool:
        types = own_rows(types) | ({"table_ptr": "*i32"} if table else {})
    types = ordered(types, record)
    wide = 2 * dim > attention.WIDE
    block_m = 16 if wide else attention.block_rows(rows, dim)
    options = attention.launch(record, block_m, wide)
    constants = words.record_constants(record) | {
        "NUM_HEADS": 8, "Q_PER_KV": 4, "SINK": method.sink_length, "RESIDUAL": method.residual_length,
        "BLOCK_M": block_m, "BLOCK_N": options["BLOCK_N"], "DOT": tl.float16, "NUM_STAGES": options["NUM_STAGES"],
        "PAGE": 16 if pool else 0, "BLOCK_B": 32 if pool else 0,
    }  # fmt: skip
    own = {"maxnreg": attention.REGISTERS} if table or pool else {}
    return resources(attention.attend_kernel, types, constants, sm, options["num_warps"], **own)


def attend_fresh(name: str, sm: int) -> dict[str, int]:
    return attend(name, sm, rows=64, dtype="bf16")


def attend_scores(name: str, sm: int) -> dict[str, int]:
    """Several queries with fresh tokens, sinks and a softcap."""
    return attend(name, sm, rows=64, dtype="bf16", scores=True)


def attend_table(name: str, sm: int) -> dict[str, int]:
    return attend(name, sm, table=True)


def attend_pool(name: str, sm: int) -> dict[str, int]:
    """A line of queries with fresh tokens, records and exact tokens in pools."""
    return attend(name, sm, rows=64, dtype="bf16", pool=True)


def freeze(name: str, sm: int, layers: bool = False) -> dict[str, int]:
    method, dim = METHODS[name]
    constants = {
        "NUM_HEADS": 8, "KEY_DIM": dim, "KEY_NBITS": method.nbits, "RECORD": method.record_length, "BLOCK_T": 64,
        "SINK": method.sink_length, "RESIDUAL": method.residual_length, "NEW": True, "BLOCK_D": min(64, dim),
    }  # fmt: skip
    types = own_rows(arguments(first_record.freeze_kernel, "bf16", params_ptr="*fp16"))
    return resources(first_record.freeze_kernel, types if layers else one_layer(types), constants, sm, 4)


def choose(name: str, sm: int) -> dict[str, int]:
    """The order of a prompt's boosted channels."""
    method, dim = METHODS[name]
    constants = {
        "NUM_HEADS": 8, "KEY_DIM": dim, "RECORD": method.record_length, "SINK": method.sink_length,
        "RESIDUAL": method.residual_length, "NEW": True, "BLOCK_D": triton.next_power_of_2(dim),
    }  # fmt: skip
    return resources(
        first_record.order_kernel, own_rows(arguments(first_record.order_kernel, "bf16")), constants, sm, 4
    )


def weigh(name: str, sm: int) -> dict[str, int]:
    """What a prompt's queries say of boosted channels."""
    dim = METHODS[name][1]
    block = triton.next_power_of_2(dim)
    constants = {"NUM_HEADS": 8, "Q_PER_KV": 4, "KEY_DIM": dim, "BLOCK_N": first_record.WEIGHED_AT_ONCE // block}
    types = arguments(first_record.weigh_kernel, "bf16")
    return resources(first_record.weigh_kernel, types, constants | {"BLOCK_D": block}, sm, 8)


def freeze_layers(name: str, sm: int) -> dict[str, int]:
    return freeze(name, sm, layers=True)


def advance(name: str, sm: int, spread: bool = False, pool: bool = False) -> dict[str, int]:
    """A step's new token, with rotary embedding and a record to pack, by one program, or by one a part."""
    method, dim = METHODS[name]
    record = method.record(LayerShape(8, dim, dim))
    block = triton.next_power_of_2(dim)
    _, size, warps = step.parts_launch(record) if spread else (1, step.WHOLE, quantize.pack_warps(record))
    constants = words.record_constants(record) | {
        "NUM_HEADS": 8, "Q_PER_KV": 4, "SINK": method.sink_length, "RESIDUAL": method.residual_length,
        "BLOCK_Q": 4, "BLOCK_K": block, "BLOCK_V": block, "SIZE": size,
        "SPREAD": spread, "ROTARY": True, "EARLY": sm >= 90, "PAGE": 16 if pool else 0, "MOST": words.MOST_CODES,
    }  # fmt: skip
    types = arguments(step.step_kernel, "bf16", params_ptr="*fp16", ticket_ptr="*i32")
    types = ordered(types if pool else own_rows(types), record)
    own = {} if spread else quantize.permuting(record)
    return resources(step.step_kernel, types, constants, sm, warps, enable_fp_fusion=False, **own)


def advance_spread(name: str, sm: int) -> dict[str, int]:
    return advance(name, sm, spread=True)


def advance_pool(name: str, sm: int) -> dict[str, int]:
    return advance(name, sm, spread=True, pool=True)


def store_full(name: str, sm: int) -> dict[str, int]:
    dim = METHODS[name][1]
    block = triton.next_power_of_2(dim)
    constants = {
        "NUM_HEADS": 8, "Q_PER_KV": 4, "KEY_DIM": dim, "VALUE_DIM": dim, "BLOCK_Q": 4, "BLOCK_K": block,
        "BLOCK_V": block, "ROTARY": True, "EARLY": sm >= 90, "PAGE": 0,
    }  # fmt: skip
    types = own_rows(arguments(decode.store_kernel, "bf16"))
    return resources(decode.store_kernel, types, constants, sm, 1, enable_fp_fusion=False)


def attend_full(name: str, sm: int, pool: bool = False, scores: bool = False) -> dict[str, int]:
    dim, q_per_kv, dtype = WHOLE[name]
    block = triton.next_power_of_2(dim)
    size = 4 if dtype == "fp32" else 2
    fixed = {"partial_ptr": "*fp32", "lse_ptr": "*fp32", "scale_log2": "fp32", "softcap": "fp32"}
    tile = decode.plan_tile(2 * block, size, SHARED_BYTES[sm])[0]
    constants = {
        "NUM_HEADS": 8, "Q_PER_KV": q_per_kv, "KEY_DIM": dim, "VALUE_DIM": dim,
        "BLOCK_M": 32 if pool and dim <= 128 else 16, "BLOCK_N": min(tile, decode.POOL_TILE) if pool else tile,
        "BLOCK_K": block, "BLOCK_V": block,
        "DOT": getattr(tl, {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}[dtype]),
        "NUM_STAGES": decode.NUM_STAGES, "EARLY": sm >= 90, "MORE": 0 if pool else 1,
        "PAGE": 16 if pool else 0, "BLOCK_B": 32 if pool else 0,
    }  # fmt: skip
    types = arguments(decode.attend_kernel, dtype, **fixed)
    types = types if scores else plain(types)
    if pool:
        del types["counts_ptr"]
    else:
        one = {"num_queries", "stride_ql", "new_key_ptr", "new_value_ptr", "counts_ptr"}
        one |= {f"stride_{x}{axis}" for x in "kv" for axis in "bht"} | {"num_blocks", "batch_size"}
        types = {name: type_ for name, type_ in own_rows(types).items() if name not in one}
    return resources(decode.attend_kernel, types, constants, sm, 4)


def attend_full_pool(name: str, sm: int) -> dict[str, int]:
    """A line of queries with fresh tokens over a pool."""
    return attend_full(name, sm, pool=True)


def attend_full_scores(name: str, sm: int) -> dict[str, int]:
    return attend_full(name, sm, scores=True)


def prompt(name: str, sm: int, masked: bool = False) -> dict[str, int]:
    """A prompt's queries with sinks and a softcap."""
    dim, q_per_kv, dtype = WHOLE[name]
    fixed = dict(prompts.plan(1024, dim, dim, 4 if dtype == "fp32" else 2))
    options = {name: fixed.pop(name) for name in list(fixed) if name.islower()}
    block = triton.next_power_of_2(dim)
    dot = getattr(tl, {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}[dtype])
    constants = {
        "NUM_HEADS": 8, "Q_PER_KV": q_per_kv, "KEY_DIM": dim, "VALUE_DIM": dim, "BLOCK_K": block, "BLOCK_V": block,
        "DOT": dot,
    }  # fmt: skip
    types = arguments(prompts.prompt_kernel, dtype, scale_log2="fp32", softcap="fp32", mask_ptr="*i1")
    if not masked:
        types = {name: type_ for name, type_ in types.items() if not name.startswith(("mask", "stride_m"))}
    return resources(prompts.prompt_kernel, types, constants | fixed, sm, **options)


def prompt_masked(name: str, sm: int) -> dict[str, int]:
    return prompt(name, sm, masked=True)


def append_full_pool(name: str, sm: int) -> dict[str, int]:
    dim, _, dtype = WHOLE[name]
    constants = {
        "NUM_HEADS": 8, "KEY_DIM": dim, "VALUE_DIM": dim, "BLOCK_T": 16, "BLOCK_D": triton.next_power_of_2(dim),
        "PAGE": 16, "BLOCK_B": 32,
    }  # fmt: skip
    types = arguments(decode.append_kernel, dtype)
    del types["counts_ptr"]
    return resources(decode.append_kernel, types, constants, sm, 4)


def combine(name: str, sm: int, parts: int = attention.MAX_SPLITS) -> dict[str, int]:
    dim = METHODS[name][1]
    types = {"partial_ptr": "*fp32", "lse_ptr": "*fp32", "out_ptr": "*bf16", "num_splits": "i32"}
    rotation = dim & -dim if METHODS[name][0].rotate_values else 0
    constants = {"VALUE_DIM": dim, "BLOCK_S": parts, "EARLY": sm >= 90, "ROTATION": rotation}
    constants["BLOCK_D"] = rotation or merge.COMBINE_D
    warps = 8 if constants["BLOCK_D"] > 64 else 4
    return resources(merge.combine_kernel, types, constants, sm, warps, enable_fp_fusion=merge.FUSED_MERGE)


def combine_few(name: str, sm: int) -> dict[str, int]:
    return combine(name, sm, parts=16)


def linear(name: str, sm: int) -> dict[str, int]:
    rows, width, k, kind, bias, activation, dtype = LAYERS[name]
    chosen = narrow.plan(width, k, rows, activation == "silu", 4 if dtype == "fp32" else 2)
    constants = {
        "K": k, "ROWS": rows, "BLOCK_N": chosen.block_n, "BLOCK_K": chosen.block_k, "NORM": kind,
        "ACTIVATION": activation, "PERSISTENT": chosen.num_programs < chosen.num_tiles, "EARLY": sm >= 90,
    }  # fmt: skip
    types = arguments(narrow.linear_kernel, dtype, eps="fp32")
    absent = {None: ["norm_weight_ptr", "norm_bias_ptr"], "rms": ["norm_bias_ptr"], "layer": []}[kind]
    absent += ["residual_ptr"] * (kind is not None) + ["bias_ptr"] * (not bias)
    types = {argument: type_ for argument, type_ in types.items() if argument not in absent}
    return resources(narrow.linear_kernel, types, constants, sm, chosen.num_warps)


def dense(name: str, sm: int) -> dict[str, int]:
    rows, width, k, activation, partial, dtype = PRODUCTS[name]
    chosen = product.plan(rows, width, k, activation == "silu", partial, 4 if dtype == "fp32" else 2)
    constants = {
        "K": k, "BLOCK_M": chosen.block_m, "BLOCK_N": chosen.block_n, "BLOCK_K": chosen.block_k, "SHARE": chosen.share,
        "SUMS": chosen.sums, "ACTIVATION": activation, "PARTIAL": partial, "STAGES": chosen.stages, "EARLY": sm >= 90,
    }  # fmt: skip
    types = arguments(product.product_kernel, dtype, **({"out_ptr": "*fp32"} if partial else {}))
    return resources(product.product_kernel, types, constants, sm, chosen.num_warps)


def stream(name: str, sm: int) -> dict[str, int]:
    rows, width, k, activation, partial, dtype = STREAMS[name]
    chosen = hopper.plan(rows, width, k, activation == "silu", partial)
    constants = {
        "BLOCK_M": chosen.block_m, "BLOCK_N": hopper.BLOCK_N, "BLOCK_K": hopper.BLOCK_K, "STEPS": chosen.steps,
        "STAGES": chosen.stages, "ACTIVATION": activation, "PARTIAL": partial, "EARLY": True,
    }  # fmt: skip
    fixed = {"x_desc": tiles(chosen.block_m, dtype), "weight_desc": tiles(hopper.BLOCK_N, dtype)}
    fixed |= {"out_ptr": "*fp32"} if partial else {}
    types = arguments(hopper.stream_kernel, dtype, **fixed)
    return resources(hopper.stream_kernel, types, constants, sm, hopper.NUM_WARPS)


def tiles(num_rows: int, dtype: str) -> str:
    """The type of the copy engine's view of a matrix."""
    block = [num_rows, hopper.BLOCK_K]
    layout = gl.NVMMASharedLayout.get_default_for(block, {"fp16": gl.float16, "bf16": gl.bfloat16}[dtype])
    return f"tensordesc<{dtype}{block},{layout!r}>"


def add_norm(name: str, sm: int) -> dict[str, int]:
    k, kind, dtype, parts = NORMS[name]
    constants = {"K": k, "BLOCK_K": triton.next_power_of_2(k), "PARTS": parts, "NORM": kind, "EARLY": sm >= 90}
    types = arguments(norm.add_norm_kernel, dtype, partial_ptr="*fp32", eps="fp32")
    if kind == "rms":
        del types["norm_bias_ptr"]
    return resources(norm.add_norm_kernel, types, constants, sm, norm.num_warps(k))


def rms_norm(name: str, sm: int) -> dict[str, int]:
    width, from_one, dtype = HIDDEN[name]
    block = triton.next_power_of_2(width)
    constants = {"K": width, "BLOCK_K": block, "FROM_ONE": from_one}
    types = arguments(norms.rms_norm_kernel, dtype, eps="fp32")
    warps = norms.num_warps(block)
    return resources(norms.rms_norm_kernel, types, constants, sm, warps, enable_fp_fusion=False)


def rotate(name: str, sm: int) -> dict[str, int]:
    dim, _, dtype = HIDDEN[name]
    constants = {"NUM_Q_HEADS": 32, "NUM_KV_HEADS": 8, "DIM": dim // 32, "BLOCK": triton.next_power_of_2(dim // 32)}
    types = arguments(rotary.rotate_kernel, dtype)
    return resources(rotary.rotate_kernel, types, constants, sm, 1, enable_fp_fusion=False)


def silu_product(name: str, sm: int) -> dict[str, int]:
    types = arguments(gated.silu_product_kernel, HIDDEN[name][2])
    constants = {"BLOCK": gated.BLOCK}
    return resources(gated.silu_product_kernel, types, constants, sm, 4, enable_fp_fusion=False)


def coded(name: str, kernel, dtype: str, more: dict[str, object], absent: Sequence[str] = (), **fixed: str):
    """Argument types and constants of a kernel of tokens that are coded one by one."""
    key, value, dim, scale = CODED[name]
    types = arguments(kernel, dtype, key_scale_ptr=f"*{scale}", value_scale_ptr=f"*{scale}", **fixed)
    unused = {*absent, *(f"{x}_{what}_ptr" for x, each in (("key", key), ("value", value))
                         for what in ("signs", "lookup") if not each.startswith("lloyd"))}  # fmt: skip
    constants = layout_constants(Layout(key, value, dim, dim)) | {"NUM_HEADS": 8} | more
    return {argument: type_ for argument, type_ in types.items() if argument not in unused}, {
        argument: constants[argument] for argument in constants if argument in kernel.arg_names
    }


def append_token(name: str, sm: int, pool: bool = False) -> dict[str, int]:
    block = max(1, token_store.TILE_ELEMENTS // triton.next_power_of_2(CODED[name][2]))
    more = {"CORRECTED": True, "BLOCK_T": block, "PAGE": 16 if pool else 0, "BLOCK_B": 32 if pool else 0}
    absent = ("counts_ptr",) if pool else ("table_ptr", "starts_ptr", "num_blocks")
    types, constants = coded(name, token_store.append_kernel, "bf16", more, absent)
    options = {"num_warps": token_store.NUM_WARPS, "enable_fp_fusion": False}
    return resources(token_store.append_kernel, types, constants, sm, **options)


def step_token(name: str, sm: int) -> dict[str, int]:
    more = {"CORRECTED": True, "Q_PER_KV": 4, "BLOCK_Q": 4, "ROTARY": True, "EARLY": sm >= 90, "PAGE": 0}
    absent = ("table_ptr", "num_blocks") + (() if CODED[name][0].startswith("lloyd") else ("turned_ptr",))
    types, constants = coded(name, token_store.step_kernel, "bf16", more, absent, turned_ptr="*fp16")
    return resources(token_store.step_kernel, types, constants, sm, 1, enable_fp_fusion=False)


def attend_token(name: str, sm: int, dtype: str = "fp16", pool: bool = False) -> dict[str, int]:
    """One query a row; over a pool a line of queries, with fresh tokens."""
    layout = Layout(*CODED[name][:2], CODED[name][2], CODED[name][2])
    kernel, block_m = token.attend_kernel, token.MOST_M[token.few_bits(layout)] if pool else token.LEAST_M
    more = {
        "Q_PER_KV": 4, "BLOCK_M": block_m, "TILE": token.plan_tile(layout, block_m), "DOT": tl.float16,
        "NUM_STAGES": token.NUM_STAGES, "EARLY": sm >= 90, "MORE": 0 if pool else 1, "PAGE": 16 if pool else 0,
        "BLOCK_B": 32 if pool else 0, "FAST": 2 if sm >= 89 else 1, "LONE": pool,
    }  # fmt: skip
    absent = {"counts_ptr"} if pool else {"num_queries", "stride_ql", "new_key_ptr", "new_value_ptr", "counts_ptr"}
    if not pool:
        absent |= {f"stride_{x}{axis}" for x in "kv" for axis in "bht"}
        absent |= {"num_blocks", "batch_size", "table_ptr", "starts_ptr"}
    fixed = {"partial_ptr": "*fp32", "lse_ptr": "*fp32", "scale_log2": "fp32"}
    types, constants = coded(name, kernel, dtype, more, tuple(absent), **fixed)
    return resources(kernel, types, constants, sm, token.NUM_WARPS)


def store_token_pages(name: str, sm: int, block: int | None = None) -> dict[str, int]:
    """An engine's pages: tokens to their slots, of prompts or (``block`` 1) one a row."""
    size = block or max(1, token_store.TILE_ELEMENTS // triton.next_power_of_2(CODED[name][2]))
    more = {"CORRECTED": True, "BLOCK_T": size, "PAGE": 64, "EARLY": size == 1 and sm >= 90}
    types, constants = coded(name, token_pages.store_kernel, "bf16", more, slots_ptr="*i64")
    warps = 1 if size == 1 else token_store.NUM_WARPS
    return resources(token_pages.store_kernel, types, constants, sm, warps, enable_fp_fusion=False)


def store_token_page(name: str, sm: int) -> dict[str, int]:
    return store_token_pages(name, sm, block=1)


def gather_token(name: str, sm: int) -> dict[str, int]:
    tile = max(1, token_store.TILE_ELEMENTS // triton.next_power_of_2(CODED[name][2]))
    more = {"PAGE": 64, "TILE": tile, "BLOCK_B": 32}
    fixed = {"begins_ptr": "*i32", "before_ptr": "*i32"}
    types, constants = coded(name, token_pages.gather_kernel, "bf16", more, **fixed)
    return resources(token_pages.gather_kernel, types, constants, sm, token_store.NUM_WARPS, enable_fp_fusion=False)


def attend_token_pool(name: str, sm: int) -> dict[str, int]:
    return attend_token(name, sm, pool=True)


def append_token_pool(name: str, sm: int) -> dict[str, int]:
    return append_token(name, sm, pool=True)


def attend_token_whole(name: str, sm: int, page: int = 0) -> dict[str, int]:
    """In whole numbers."""
    key, value, dim, scale = WHOLE_NUMBERS[name]
    layout = Layout(key, value, dim, dim)
    own = token_fast_plan.plan(layout, page)
    types = arguments(
        token_fast.attend_kernel, "fp16", key_scale_ptr=f"*{scale}", value_scale_ptr=f"*{scale}", partial_ptr="*fp32",
        lse_ptr="*fp32", scale_log2="fp32",
    )  # fmt: skip
    constants = token_fast_plan.constants(layout) | {
        "NUM_HEADS": 8, "Q_PER_KV": 4, "TILE": own.tile, "STAGES": own.stages, "EARLY": sm >= 90, "MORE": 1,
        "PAGE": page,
    }  # fmt: skip
    if not page:
        del types["table_ptr"], types["num_blocks"]
    return resources(token_fast.attend_kernel, types, constants, sm, 1, maxnreg=own.registers)


def attend_token_pages(name: str, sm: int) -> dict[str, int]:
    return attend_token_whole(name, sm, page=64)


def append_token_whole(name: str, sm: int) -> dict[str, int]:
    """Lloyd-Max codes of many tokens, in registers."""
    key, value, dim, scale = WHOLE_NUMBERS[name]
    types = arguments(
        token_fast_store.append_kernel, "bf16", key_scale_ptr=f"*{scale}", value_scale_ptr=f"*{scale}"
    )  # fmt: skip
    constants = token_fast_store.constants(Layout(key, value, dim, dim))
    constants |= {"NUM_HEADS": 8, "CORRECTED": True, "G": token_fast_store.GROUPS}
    types.pop("counts_ptr")
    return resources(token_fast_store.append_kernel, types, constants, sm, 1, enable_fp_fusion=False)


def rotate_token(name: str, sm: int) -> dict[str, int]:
    dim = CODED[name][2]
    constants = {"DIM": dim, "SIZE": dim & -dim, "N": token.ROTATED_ROWS, "EARLY": sm >= 90}
    types = arguments(token.rotate_kernel, "bf16", out_ptr="*fp16")
    return resources(token.rotate_kernel, types, constants, sm, 1, enable_fp_fusion=False)


def attend_latent(name: str, sm: int) -> dict[str, int]:
    """Attention over latents of 512 channels and rotary keys of 64."""
    constants = {
        "RANK": 512, "ROPE": 64, "CODING": name, "NBITS": 8, "LEVELS": (), "ROPE_LEVELS": (), "BLOCK_R": 512,
        "BLOCK_P": 64, "BLOCK_M": latent.BLOCK_M, "TILE": latent.TILE, "DOT": tl.float16, "MORE": 1, "STAGES": 2,
    }  # fmt: skip
    scales = {"scale_ptr": "*fp32", "rope_scale_ptr": "*fp32", "scale_log2": "fp32"}
    own = {"codes_ptr": "*u8", "rope_codes_ptr": "*u8", "lengths_ptr": "*i32", "partial_ptr": "*fp32"}
    types = arguments(latent.latent_kernel, "bf16", lse_ptr="*fp32", **scales, **own)
    return resources(latent.latent_kernel, types, constants, sm, 8, enable_fp_fusion=True)


def leave(name: str, sm: int) -> dict[str, int]:
    """Records that leave a packed window in a step."""
    record = METHODS[name][0].record(LayerShape(8, METHODS[name][1], METHODS[name][1]))
    words = 8 * record.num_words
    constants = {"WORDS": words, "MOVE": 2, "RECORD": record.num_tokens, "CHUNKS": -(-words // forget.WORDS)}
    types = arguments(forget.forget_kernel, "i32", packed_ptr="*i32", ticket_ptr="*i32", lengths_ptr="*i32")
    constants |= {"BLOCK": forget.WORDS, "AT_ONCE": forget.AT_ONCE}
    return resources(forget.forget_kernel, types, constants, sm, 4)


def count(name: str, sm: int) -> dict[str, int]:
    """What a step of several tokens a row counts."""
    constants = {"RECORD": 64, "SINK": 4, "RESIDUAL": 128, "BLOCK": 8}
    types = arguments(append.count_kernel, "i32")
    return resources(append.count_kernel, types, constants, sm, 1)


KERNELS = {
    function.__name__: function
    for function in (pack, store, freeze, advance, attend, attend_fresh, attend_table, combine, combine_few, store_full)
} | {function.__name__: function for function in (advance_spread, pack_layers, store_layers, freeze_layers)}
DIFFERING = {
    "boost d128": (pack, store, choose, weigh, attend, attend_fresh, combine, advance, advance_spread),
    "boost d256": (pack, choose, weigh, advance, advance_spread),
    "rotated d128": (pages, pages_single, gather),
    "rotated d256": (pack, advance, gather),
    "3-bit g32 d512": (pack, advance, attend_fresh),
}
"""Layouts whose kernels are compiled where they differ from others'."""
KERNELS |= {function.__name__: function for function in (choose, weigh)}
BOOSTED = ("choose", "weigh")
"""Kernels of layouts with boosted channels alone."""
HEADS = (
    "2-bit g32 d64",
    "2-bit g64 d128",
    "3-bit g32 d96",
    "k4v2 gv16 d80",
    "2-bit g32 d256",
    "seed d64",
    "boost d128",
)
PER_HEAD = {function.__name__: HEADS for function in (store, store_layers, freeze, freeze_layers, store_full, combine)}
PER_HEAD |= {"combine_few": HEADS}
"""Kernels that layouts of as many channels and tokens have in common."""
IN_POOLS = {function.__name__: function for function in (pack_pool, store_pool, attend_pool, advance_pool)}
IN_POOLS |= {function.__name__: function for function in (pages, pages_single, gather)}
POOLED = ("2-bit g32 d128", "3-bit g32 d96", "rotated d128", "rotated d256")
"""Layouts whose kernels over pools are compiled: word order, not, and values that are rotated."""
KERNELS |= IN_POOLS
CHANGED = {name: METHODS[name] for name in ("2-bit g32 d64", "2-bit g64 d128", "2-bit g32 d256")}
"""Layouts that are compiled with sinks and a softcap."""
FULL_POOLS = {"llama": WHOLE["llama"]}
ENGINE = {
    attend_full: WHOLE,
    attend_full_pool: FULL_POOLS,
    attend_full_scores: FULL_POOLS,
    attend_scores: CHANGED,
    attend_latent: {"int8": None},
    leave: {name: METHODS[name] for name in ("2-bit g64 d128",)},
    count: {"2-bit g64 d128": None},
    prompt: WHOLE,
    prompt_masked: FULL_POOLS,
    append_full_pool: FULL_POOLS,
    store_slots: FULL_POOLS,
    linear: LAYERS,
    dense: PRODUCTS,
    stream: STREAMS,
    add_norm: NORMS,
    rms_norm: HIDDEN,
    rotate: HIDDEN,
    silu_product: HIDDEN,
    append_token: CODED,
    step_token: CODED,
    attend_token: CODED,
    attend_token_whole: WHOLE_NUMBERS,
    attend_token_pages: WHOLE_NUMBERS,
    append_token_whole: {name: WHOLE_NUMBERS[name] for name in ("lloyd4", "lloyd3", "lloyd2")},
    rotate_token: {name: CODED[name] for name in ("lloyd4", "lloyd4 d256")},
    append_token_pool: {name: CODED[name] for name in ("int8", "lloyd3")},
    attend_token_pool: {name: CODED[name] for name in ("int8", "lloyd3")},
    store_token_pages: {name: CODED[name] for name in ("int4 d80", "lloyd3")},
    store_token_page: {name: CODED[name] for name in ("e4m3 e5m2", "lloyd3")},
    gather_token: {name: CODED[name] for name in ("int4 d80", "lloyd3", "lloyd2.5 lloyd3.5", "e4m3 e5m2")},
}
KERNELS |= {function.__name__: function for function in ENGINE}


Task = tuple[str, str, int]
"""Kernel, layout, compute capability."""


def chosen(tasks: Sequence[Task], words: Sequence[str]) -> list[Task]:
    """The tasks that the words of the command line leave: ``--pairs``, and a part of ``kernel layout sm_90``."""
    tasks = pairs(tasks) if "--pairs" in words else list(tasks)
    parts = [word for word in words if not word.startswith("--")]
    return [task for task in tasks if all(part in f"{task[0]} {task[1]} sm_{task[2]}" for part in parts)]


def pairs(tasks: Sequence[Task]) -> list[Task]:
    """Of each kernel's tasks so many that every layout and every target comes: both in turn, from another target on for
    the next kernel."""
    out = []
    for turn, kernel in enumerate(dict.fromkeys(kernel for kernel, *_ in tasks)):
        own = [(name, sm) for each, name, sm in tasks if each == kernel]
        names, targets = (list(dict.fromkeys(axis)) for axis in zip(*own, strict=True))
        for k in range(max(len(names), len(targets))):
            out.append((kernel, names[k % len(names)], targets[(k + turn) % len(targets)]))
    return out


def one(task: Task) -> tuple[str, str, int, dict[str, int] | str]:
    kernel, name, sm = task
    try:
        return kernel, name, sm, KERNELS[kernel](name, sm)
    except Exception as error:
        return kernel, name, sm, f"{type(error).__name__}: {error}"


def record(rows: Iterable[tuple[str, str, int, dict[str, int] | str]]) -> None:
    """Notes the most instructions that a kernel takes of any target, and of any Triton that noted them before."""
    known = json.loads(INSTRUCTIONS.read_text()) if INSTRUCTIONS.exists() else {}
    for kernel, name, _, used in rows:
        if isinstance(used, dict):
            points = known.setdefault(kernel, {})
            points[name] = max(points.get(name, 0), used["instructions"])
    INSTRUCTIONS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    names = {function.__name__: points for function, points in ENGINE.items()}
    targets = {"stream": (90,), "attend_latent": (90,)}
    tasks = [
        (kernel, name, sm)
        for kernel in KERNELS
        for name in names.get(kernel, POOLED if kernel in IN_POOLS else PER_HEAD.get(kernel, METHODS))
        for sm in targets.get(kernel, TARGETS)
        if (KERNELS[kernel] in DIFFERING[name] if name in DIFFERING else kernel not in BOOSTED)
    ]
    rows = []
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for row in pool.map(one, chosen(tasks, sys.argv[1:])):
            rows.append(row)
            print(json.dumps(row), flush=True)
    if "--record" in sys.argv:
        record(rows)
