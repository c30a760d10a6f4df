"""The decode kernel with parts left out, whose results are then wrong: what masks and the softmax cost.

``python masks-softmax.py``, in a copy of the tree at fe589e0, whose ``fast.py`` was one file: a copy of that for each
variant is written beside it.
"""

from __future__ import annotations

import importlib
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kvruntime.bench.harness.timing import cuda_bench
from kvruntime.bench.kernels.attention import Shape, Tokens, filled_layers
from kvruntime.methods.kivi import fast, fast_plan
from kvruntime.methods.kivi.benched import LAYOUTS, direct, scratch

Change = tuple[str, str]
FOLDER = Path(fast.__file__).parent
SOURCE = (
    'source = word if field < step else "high"\n        mask = (2**nbits - 1) * 0x00010001 << nbits * (field % step)'
)
HALF: Change = (SOURCE, "source = word\n        mask = (2**nbits - 1) * 0x00010001 << nbits * (field % step)")
EIGHTH: Change = (SOURCE, "source = word\n        mask = (2**nbits - 1) * 0x00010001")
LARGEST = "gl.maximum(peak, gl.convert_layout(gl.max(score, axis=1), PER_HEAD) * factor + margin)"
PEAK: Change = (LARGEST, "gl.maximum(peak, 12.0 + margin)")
HALVES: Change = ("score += swap_halves(score)\n        score += start", "score += start")
VARIANTS: dict[str, list[Change]] = {
    "as it is": [],
    "half of the masks, no shifts": [HALF],
    "an eighth of the masks": [EIGHTH],
    "no largest score": [PEAK],
    "half of the masks, no largest score": [HALF, PEAK],
    "no exchange of halves": [HALVES],
}


def variant(name: str) -> Any:
    """``fast.py`` with its changes, as a module."""
    text = (FOLDER / "fast.py").read_text()
    for old, new in VARIANTS[name]:
        if text.count(old) != 1:
            raise ValueError(f"{name}: fast.py has {old!r} {text.count(old)} times")
        text = text.replace(old, new)
    module = "fast_" + re.sub(r"\W", "_", name)
    (FOLDER / f"{module}.py").write_text(text)
    return importlib.import_module(f"kvruntime.methods.kivi.{module}")


def main() -> None:
    shape, bench = Shape("llama-3-8b", 32, 8, 128, 8, 32768), cuda_bench(torch.device("cuda"))
    tokens = Tokens(bench, shape, torch.float16)
    layers = filled_layers(bench, LAYOUTS[2], tokens)
    query, zeros = tokens.draw(shape.num_q_heads, 1), scratch(layers[0], shape.num_q_heads)
    for name in VARIANTS:
        kernels = variant(name)
        for registers, programs, merged in ((248, 8, 16), (168, 12, 32)):
            fast_plan.MAX_REGISTERS[128], fast_plan.PROGRAMS_PER_SM[128] = registers, programs
            fast_plan.MERGED_PARTS = merged
            calls = [partial(direct, kernels, layer, query, shape.scale, arrivals=zeros) for layer in layers]
            us = [round(1e6 * seconds, 2) for seconds in bench.timer(calls).spread]
            print(json.dumps({"variant": name, "registers": registers, "programs": programs, "us": us}), flush=True)


if __name__ == "__main__":
    main()
