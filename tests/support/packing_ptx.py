"""Compile the packing kernel for sm_90, run its PTX in NumPy and count the words that differ from the reference's;
and so with what boosted channels weigh.

JSON lines ``[layout, warps, tokens stored before, [words that differ, by section], layers]``.  Run by
``test_packing_ptx.py`` in a process of its own, because the interpreter and the compiler exclude each other.
"""

from __future__ import annotations

import json

import compile_kernels
import numpy as np
import torch
import triton
from ptx_numpy import Program

from kvruntime.methods.kivi import first_record, kernel_arguments, pack, reference, step
from kvruntime.methods.kivi.words import MOST_CODES, record_constants
from kvsim.layout import LayerShape
from kvsim.methods import Kivi, kivi_boost, kivi_seed

HEADS = 2
LAYOUTS = {
    "2-bit g32 d64": (Kivi(), 64),
    "2-bit g32 d128": (Kivi(), 128),
    "2-bit g64 d128": (Kivi(group_size=64), 128),
    "2-bit g128 d128": (Kivi(group_size=128), 128),
    "4-bit g64 d128": (Kivi(nbits=4, group_size=64), 128),
    "8-bit g16 d128": (Kivi(nbits=8, group_size=16, residual_length=64), 128),
    "2-bit g16 sink d128": (Kivi(group_size=16, residual_length=64, sink_length=5), 128),
    "1-bit g64 d128": (Kivi(nbits=1, group_size=64, residual_length=64), 128),
    "k4v2 d256": (Kivi(key_nbits=4, value_nbits=2, residual_length=64), 256),
    "seed d64": (kivi_seed(), 64),
    "2-bit g32 d96": (Kivi(), 96),
    "3-bit gv40 d80": (Kivi(nbits=3, group_size=64, residual_length=64, value_group_size=40), 80),
}


class Memory:
    """Device memory: tensors one after the other, at addresses that are indices."""

    def __init__(self) -> None:
        self.cells, self.end = np.zeros(1 << 23, np.uint8), 4096

    def place(self, tensor: torch.Tensor) -> int:
        """Copies ``tensor`` there; its address."""
        raw = tensor.contiguous().view(torch.uint8).numpy().ravel()
        start, self.end = self.end, self.end + -(-raw.size // 256) * 256 + 256
        self.cells[start : start + raw.size] = raw
        return start


def launches(record: pack.Record) -> list[dict[str, int]]:
    """How :func:`quantize.append` packs the record, and how a decode step does: whole, and in parts."""
    count = pack.num_parts(record, step.WHOLE)
    whole = {"PARTS": count, "SIZE": step.WHOLE, "MOST": MOST_CODES, "num_warps": pack.pack_warps(record)}
    parts = dict(zip(("PARTS", "SIZE", "num_warps"), step.parts_launch(record), strict=True)) | {"MOST": MOST_CODES}
    out: list[dict[str, int]] = []
    for launch in (pack.pack_launch(record), whole, parts):
        alike = [one for one in out if (one["PARTS"], one["num_warps"]) == (launch["PARTS"], launch["num_warps"])]
        out += [] if alike else [launch]
    return out


def differing(method: Kivi, dim: int, stored: int, launch: dict[str, int], layers: int) -> list[int]:
    """Words of two packed records that differ from the reference's, by section of the record.

    ``layers``: of more than one the kernel is told where the last lies; nothing lies where the others are said to.
    """
    shape = LayerShape(HEADS, dim, dim)
    record, sink, residual = method.record(shape), method.sink_length, method.residual_length
    generator = torch.Generator().manual_seed(dim + stored)

    def randn(num_tokens: int) -> torch.Tensor:
        return torch.randn(1, HEADS, num_tokens, dim, generator=generator).half()

    length = sink + residual + 2 * record.num_tokens - stored
    key, value = randn(length), randn(length)
    for x in (key, value):
        x[0, 0, length // 3, 5], x[0, 0, 1, 2], x[0, 1, 2, 17] = float("nan"), float("inf"), -float("inf")
        x[0, 0, :, 9], x[0, 1, 4] = 1.5, 0.25
    buffers = method.buffers(shape, 1, stored + length)
    held = {buffer.name: torch.zeros(buffer.shape, dtype=getattr(torch, buffer.dtype)) for buffer in buffers}
    stores = [held[name] for name in ("records", "exact_key", "exact_value")]
    lengths = torch.zeros(2, 1, dtype=torch.int32)
    store = reference.Stored(*stores, *lengths, held.get("key_params"), key_order=held.get("key_order"))
    layout = reference.Layout(record, sink, residual)
    if stored:
        reference.append(randn(stored), randn(stored), None, store, layout)
    memory = Memory()
    names = ("records_ptr", "exact_key_ptr", "exact_value_ptr")
    values = {name: memory.place(tensor) for name, tensor in zip(names, stores, strict=True)}
    reference.append(key, value, None, store, layout, ([stored], [0]))
    values |= {"key_ptr": memory.place(key), "value_ptr": memory.place(value)}
    values["params_ptr"] = memory.place(held.get("key_params", torch.zeros(1)))
    values["order_ptr"] = memory.place(held.get("key_order", torch.zeros(1)))
    values["lengths_ptr"] = memory.place(torch.tensor([stored], dtype=torch.int32))
    values["packed_ptr"] = memory.place(torch.tensor([0], dtype=torch.int32))
    values["counts_ptr"] = memory.place(torch.tensor([length], dtype=torch.int32))
    values |= zip(
        ("stride_kb", "stride_kh", "stride_kt", "stride_vb", "stride_vh", "stride_vt"),
        key.stride()[:3] * 2,
        strict=True,
    )
    values |= {
        "new_length": length,
        "num_slots": stores[1].shape[2],
        "num_records": stores[0].shape[1],
        "batch_size": 1,
    }
    constants = (
        record_constants(record)
        | launch
        | {"NUM_HEADS": HEADS, "NEW": True, "SINK": sink, "RESIDUAL": residual, "PAGE": 0, "BLOCK_B": 0}
    )
    num_warps = constants.pop("num_warps")
    kernel = pack.pack_kernel
    types = compile_kernels.own_rows(compile_kernels.arguments(kernel, "fp16", params_ptr="*fp16"))
    types = compile_kernels.ordered(types, record)
    start = values["records_ptr"]
    if layers == 1:
        types = compile_kernels.one_layer(types)
    else:
        columns = ("key_ptr", "value_ptr", "exact_key_ptr", "exact_value_ptr", "records_ptr", "params_ptr")
        table = torch.zeros(layers, kernel_arguments.COLUMNS.value, dtype=torch.int64)
        table[-1] = torch.tensor([values[name] for name in columns])
        values["layers_ptr"] = memory.place(table)
        values |= dict.fromkeys(columns, 0)
    ptx = compile_kernels.compiled(kernel, types, constants, 90, num_warps)["ptx"]
    for block in range(2 * launch["PARTS"]):
        for head in range(HEADS):
            arguments = [values[name] for name in kernel.arg_names if name in types and name in values] + [0, 0]
            Program(ptx, memory.cells, arguments, (block, head, layers - 1)).run()
    words = held["records"].numpy()
    wrong = memory.cells[start : start + words.nbytes].view(np.int32).reshape(words.shape) != words
    return [int(wrong[..., offset : offset + size].sum()) for _, offset, size in record.sections]


def differing_weights(dim: int) -> int:
    """Channels of three rows, one without new tokens, whose weights differ from the reference's."""
    q_per_kv, counts, kernel = 3, [300, 0, 17], first_record.weigh_kernel
    query = torch.randint(-3, 4, (3, 300, HEADS * q_per_kv, dim), generator=torch.Generator().manual_seed(dim)).half()
    query[0, 299, 0, 3], query[0, 298, 0, 5] = float("nan"), float("inf")
    query[2, :, :q_per_kv] = 0
    memory, block = Memory(), triton.next_power_of_2(dim)
    values = {
        "query_ptr": memory.place(query),
        "order_ptr": memory.place(torch.full((3, HEADS, dim), 77, dtype=torch.uint8)),
        "counts_ptr": memory.place(torch.tensor(counts, dtype=torch.int32)),
    }
    query = query.transpose(1, 2)
    values |= zip(("stride_qb", "stride_qh", "stride_qt"), query.stride()[:3], strict=True)
    values["num_queries"] = 300
    constants = {"NUM_HEADS": HEADS, "Q_PER_KV": q_per_kv, "KEY_DIM": dim, "BLOCK_D": block}
    constants["BLOCK_N"] = first_record.WEIGHED_AT_ONCE // block
    ptx = compile_kernels.compiled(kernel, compile_kernels.arguments(kernel, "fp16"), constants, 90, 8)["ptx"]
    arguments = [values[name] for name in kernel.arg_names if name in values] + [0, 0]
    for program in range(3 * HEADS):
        Program(ptx, memory.cells, arguments, (program, 0, 0)).run()
    want = reference.channel_weights(query, HEADS, counts)
    want[1] = 77
    start = values["order_ptr"]
    return int((memory.cells[start : start + want.nbytes].reshape(want.shape) != want.numpy()).sum())


if __name__ == "__main__":
    for name, (method, dim) in LAYOUTS.items():
        for turn, launch in enumerate(launches(method.record(LayerShape(HEADS, dim, dim)))):
            points = ((37 * (turn % 2), 1),) if turn else ((37, 1), (0, 3))  # a step stores one layer
            for stored, layers in points:
                wrong = differing(method, dim, stored, launch, layers)
                print(json.dumps([name, launch["num_warps"], stored, wrong, layers]), flush=True)
    for nbits, dim in ((2, 128), (2, 64), (3, 128)):  # boosted keys, and values in turns
        method = kivi_boost(nbits, residual_length=64)
        launch = pack.pack_launch(method.record(LayerShape(HEADS, dim, dim)))
        wrong = differing(method, dim, 37, launch, 1)
        print(json.dumps([f"boost {nbits} d{dim}", launch["num_warps"], 37, wrong, 1]), flush=True)
    for dim in (96, 128):
        print(json.dumps([f"weights d{dim}", 8, 0, [differing_weights(dim)], 1]), flush=True)
