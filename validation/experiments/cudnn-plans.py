"""A step of stock generate() with transformers' own cache, the first time a length is seen and again, with and without
cuDNN's attention, which PyTorch prefers on Hopper and which plans anew for every length.

    python validation/experiments/cudnn-plans.py [MODEL]...
"""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from statistics import median

import torch

from kvruntime.bench.engine.suite import Models
from kvruntime.bench.generate.suite import SUBJECTS, Clock, _dynamic, prompt

NEW = 48
"""New tokens of a call; the first four are left out."""


def main() -> None:
    """A line of JSON a model, size and way: milliseconds a step of three calls of the same lengths."""
    clock, models = Clock("cuda"), Models("cuda")
    for name in sys.argv[1:] or ("gpt2", "llama-3.2-1b"):
        model = models.loaded(SUBJECTS[name].shape).model
        for number, (batch_size, way) in enumerate((b, w) for b in (1, 8) for w in ("default", "without cuDNN")):
            torch.backends.cuda.enable_cudnn_sdp(way == "default")
            ids = prompt(model, batch_size, 256 + 128 * number, number)
            steps = []
            for _ in range(3):
                times = clock(model, ids, NEW, _dynamic(model, 0))[0]
                each = [after - before for before, after in pairwise(times[4:])]
                steps.append(round(1e3 * median(each), 2))
            print(json.dumps({"model": name, "batch_size": batch_size, "way": way, "ms": steps}), flush=True)


if __name__ == "__main__":
    main()
