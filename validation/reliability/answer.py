"""``python -m validation.reliability.answer``: what a process of its own answers; one line for each layout.

Two of them on one device at once must answer as one alone does.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator

import torch

from kvruntime.engine import Engine
from validation.reliability import subjects


def answers(device: torch.device, num_tokens: int) -> Iterator[str]:
    """``name sha256 nbytes``: of the greedy tokens after one prompt, and of the cache."""
    model = subjects.model(device, subjects.CI)
    prompt = torch.randint(1, 512, (3, 150), generator=torch.Generator().manual_seed(2)).tolist()
    for method in subjects.layouts(device):
        engine = Engine(model, method, batch_size=3, max_seq_len=150 + num_tokens)
        out = engine.generate(prompt, max_new_tokens=num_tokens)
        yield f"{method.name} {hashlib.sha256(repr(out).encode()).hexdigest()} {engine.nbytes}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m validation.reliability.answer")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=40)
    given = parser.parse_args()
    for line in answers(torch.device(given.device), given.tokens):
        print(line, flush=True)


if __name__ == "__main__":
    main()
