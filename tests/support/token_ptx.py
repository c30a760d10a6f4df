"""Compile the kernel that stores coded tokens for sm_90, run its PTX in NumPy, count what differs from the reference.

JSON lines ``[layout, [bytes that differ of key codes, key scales, value codes, value scales]]``.  Run by
``test_packing_ptx.py`` in a process of its own, because the interpreter and the compiler exclude each other.
"""

from __future__ import annotations

import json
import sys

import compile_kernels
import torch
import triton
from packing_ptx import Memory
from ptx_numpy import Program

from kvruntime.methods.token import reference, store
from kvruntime.methods.token.coding import num_bytes
from kvruntime.methods.token.levels import signs
from kvruntime.methods.token.words import layout_constants

HEADS, TOKENS, SLOTS = 2, 21, 24
CODED = ("int4 d80", "lloyd3", "lloyd2.5 lloyd3.5")


def differing(name: str) -> list[int]:
    """Bytes that differ after ragged rows are appended to rows that hold tokens."""
    key_coding, value_coding, dim, scale = compile_kernels.CODED[name]
    layout = reference.Layout(key_coding, value_coding, dim, dim)
    dtype = {"fp16": torch.float16, "fp32": torch.float32}[scale]
    held = []
    for coding in (key_coding, value_coding):
        held.append(torch.zeros(2, HEADS, SLOTS, num_bytes(coding, dim), dtype=torch.uint8))
        held.append(torch.zeros(2, HEADS, SLOTS, dtype=dtype))
    sign = signs(dim, torch.device("cpu"))
    lengths = torch.tensor([2, 1], dtype=torch.int32)
    generator = torch.Generator().manual_seed(dim)
    key, value = (torch.randn(2, HEADS, TOKENS, dim, generator=generator).half() for _ in range(2))
    key[0, 0, 1, 5], value[1, 1, -1, 3], key[1, 0, -2] = torch.nan, torch.inf, 0
    memory, counts = Memory(), [TOKENS, 9]
    names = ("key_codes_ptr", "key_scale_ptr", "value_codes_ptr", "value_scale_ptr")
    values = {name: memory.place(tensor) for name, tensor in zip(names, held, strict=True)}
    values |= {"key_ptr": memory.place(key), "value_ptr": memory.place(value), "lengths_ptr": memory.place(lengths)}
    values |= {"key_signs_ptr": memory.place(sign), "value_signs_ptr": values["key_ptr"]}
    values["value_signs_ptr"] = values["key_signs_ptr"]
    values["counts_ptr"] = memory.place(torch.tensor(counts, dtype=torch.int32))
    stored = reference.Stored(*held, lengths, sign, sign)
    values |= zip((f"stride_{x}{axis}" for x in "kv" for axis in "bht"), key.stride()[:3] * 2, strict=True)
    values |= zip((f"stride_{x}{axis}" for x in "xsyz" for axis in "bht"), store.strides_of(stored), strict=True)
    values |= {"new_length": TOKENS, "batch_size": 2}
    block = max(1, store.TILE_ELEMENTS // triton.next_power_of_2(dim))
    more = {"CORRECTED": True, "BLOCK_T": block, "PAGE": 0, "BLOCK_B": 0}
    kernel = store.append_kernel
    types, _ = compile_kernels.coded(name, kernel, "fp16", more, ("table_ptr", "starts_ptr", "num_blocks"))
    constants = layout_constants(layout) | {"NUM_HEADS": HEADS} | more
    constants = {key: constants[key] for key in constants if key in kernel.arg_names}
    options = {"num_warps": store.NUM_WARPS, "enable_fp_fusion": False}
    ptx = compile_kernels.compiled(kernel, types, constants, 90, **options)["ptx"]
    arguments = [values[each] for each in kernel.arg_names if each in types] + [0, 0]
    for first in range(triton.cdiv(TOKENS, block)):
        for row in range(2 * HEADS):
            for stream in range(2):
                Program(ptx, memory.cells, arguments, (first, row, stream)).run()
    reference.append(key, value, counts, stored, layout)
    out = []
    for each, tensor in zip(names, held, strict=True):
        raw = tensor.view(torch.uint8).numpy().ravel()
        out.append(int((memory.cells[values[each] : values[each] + raw.size] != raw).sum()))
    return out


if __name__ == "__main__":
    for name in sys.argv[1:] or CODED:
        print(json.dumps([name, differing(name)]), flush=True)
