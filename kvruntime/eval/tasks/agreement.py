"""Long generation: how far a greedy continuation of prose goes as it does under the uncompressed cache."""

from __future__ import annotations

from kvruntime.eval.tasks.needle import stretch
from kvruntime.eval.tasks.task import EvalTask, Example, Part, TaskRequest, fitted

EXAMPLES = 16
MAX_NEW_TOKENS = 512
CAVEAT = (
    "one near tie ends the agreement: the uncompressed cache's own score, under other kernels, is the most that can be "
    "told; whether the text after it is worse is not judged"
)


def parts(asked: TaskRequest) -> list[Part]:
    """One a length of prompt."""
    return [part(asked, length) for length in asked.lengths]


def part(asked: TaskRequest, length: int) -> Part:
    """Prompts of ``length`` tokens from places of the prose, the answers left to the model."""
    new = MAX_NEW_TOKENS if asked.longest is None else min(MAX_NEW_TOKENS, asked.longest - length)
    if new < 1:
        raise ValueError(f"length {length}: allowed are 1 to {(asked.longest or 0) - 1}, with room for an answer")
    examples = []
    for index in range(asked.examples or EXAMPLES):
        offset = asked.random("agreement", length, index).randrange(max(1, len(asked.haystack)))

        def build(size: int, offset: int = offset) -> str:
            return stretch(asked.haystack, offset, max(1, 8 * size))

        examples.append(Example(fitted(build, asked.count, length), ()))
    return Part(f"{length:,}", tuple(examples), _unjudged, new, {"length": length}, follows=True, chat=False)


def _unjudged(answer: str, example: Example) -> float:
    raise TypeError("an answer that follows another is scored by its tokens")


TASK = EvalTask(
    "long generation: the share of the uncompressed cache's greedy tokens before the first other one",
    parts,
    caveat=CAVEAT,
)
