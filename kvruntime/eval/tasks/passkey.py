"""Passkey retrieval: a number among sentences that repeat (arXiv 2305.16300), asked for at the end (depth x length)."""

from __future__ import annotations

from kvruntime.eval.tasks.needle import depths
from kvruntime.eval.tasks.task import NEEDLES_SAY_LITTLE, EvalTask, Example, Part, TaskRequest, fitted, share_found

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
EXAMPLES = 4


def parts(asked: TaskRequest) -> list[Part]:
    """One a length and depth."""
    return [part(asked, length, depth) for length in asked.lengths for depth in depths(asked)]


def part(asked: TaskRequest, length: int, depth: float) -> Part:
    """The cell of one length and depth."""
    examples = []
    for index in range(asked.examples or EXAMPLES):
        key = str(asked.random("passkey", length, depth, index).randint(10_000, 99_999))

        def build(count: int, key: str = key) -> str:
            lines = [FILLER] * count
            lines.insert(round(depth * count), f"The pass key is {key}. Remember it. {key} is the pass key.")
            head = "A pass key is hidden in a lot of irrelevant text. Find it and remember it."
            return "\n".join([head, *lines, "What is the pass key? The pass key is"])

        examples.append(Example(fitted(build, asked.count, length), (key,)))
    about = {"length": length, "depth": round(depth, 4)}
    return Part(f"{length:,} at {depth:.0%}", tuple(examples), share_found, 12, about, chat=False)


TASK = EvalTask("a number among repeated sentences, by depth and length", parts, caveat=NEEDLES_SAY_LITTLE, grid=True)
