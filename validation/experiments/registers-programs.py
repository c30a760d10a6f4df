"""The decode kernel with fewer registers a thread, more programs a multiprocessor, and more parts merged by one.

``python registers-programs.py OUT.json [SHAPE ...]``, or ``--once REGISTERS,PROGRAMS,MERGED SHAPE`` in the place of the
file: one variant a few times, for a profiler or to compile it.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import Any

import torch

from kvruntime.bench.harness.timing import cuda_bench
from kvruntime.bench.kernels.attention import Shape, Tokens, filled_layers, relative_error
from kvruntime.methods.kivi import fast, fast_plan
from kvruntime.methods.kivi.benched import LAYOUTS, attend, scratch

SHAPES = {
    "8x32k": Shape("llama-3-8b", 32, 8, 128, 8, 32768),
    "64x4k": Shape("llama-3-8b", 32, 8, 128, 64, 4096),
    "1x32k": Shape("llama-3-8b", 32, 8, 128, 1, 32768),
    "1x128k": Shape("llama-3-8b", 32, 8, 128, 1, 131072),
}
METHODS = {f"{method.nbits}-bit g64": method for method in (LAYOUTS[2], LAYOUTS[5])}
VARIANTS = (  # registers a thread, programs a multiprocessor, parts that one program merges
    (248, 8, 16),
    (200, 10, 16),
    (168, 12, 16),
    (168, 12, 32),
    (160, 12, 32),
    (144, 14, 32),
    (128, 16, 32),
)


def take(registers: int, programs: int, merged: int) -> None:
    """The plan's figures for heads of 128."""
    fast_plan.MAX_REGISTERS[128], fast_plan.PROGRAMS_PER_SM[128] = registers, programs
    fast_plan.MERGED_PARTS = merged


def main(out: str, names: list[str]) -> None:
    bench, rows = cuda_bench(torch.device("cuda")), []
    for name in names:
        shape = SHAPES[name]
        for method_name, method in METHODS.items():
            tokens = Tokens(bench, shape, torch.float16)
            layers = filled_layers(bench, method, tokens)
            query, zeros = tokens.draw(shape.num_q_heads, 1), scratch(layers[0], shape.num_q_heads)
            calls = [partial(attend, layer, query, shape.scale, zeros) for layer in layers]
            for variant in VARIANTS:
                take(*variant)
                row: dict[str, Any] = {"shape": name, "method": method_name, "variant": variant}
                try:
                    row["error"] = relative_error(layers[0], query, calls[0](), shape.scale)
                    row["us"] = [round(1e6 * seconds, 2) for seconds in bench.timer(calls).spread]
                    row["reading"] = shape.nbytes_read(method) / row["us"][0] * 1e6
                except Exception as error:
                    row["failed"] = f"{type(error).__name__}: {error}"[:200]
                rows.append(row)
                print(json.dumps(row), flush=True)
            del layers, calls
    with open(out, "w") as file:
        json.dump({"device": torch.cuda.get_device_name(), "rows": rows}, file, indent=1)


def once(variant: str, name: str) -> None:
    take(*map(int, variant.split(",")))
    bench, shape = cuda_bench(torch.device("cuda")), SHAPES[name]
    tokens = Tokens(bench, shape, torch.float16)
    for method in METHODS.values():
        layer = filled_layers(bench, method, tokens)[0]
        query, zeros = tokens.draw(shape.num_q_heads, 1), scratch(layer, shape.num_q_heads)
        for _ in range(3):
            attend(layer, query, shape.scale, zeros)
        torch.cuda.synchronize()


if __name__ == "__main__":
    assert fast.MAX_REGISTERS is fast_plan.MAX_REGISTERS
    if sys.argv[1] == "--once":
        once(*sys.argv[2:4])
    else:
        main(sys.argv[1], sys.argv[2:] or list(SHAPES))
