"""What a task is: parts, each of examples with prompts, the answers that are right, and how an answer is judged."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from kvsim.regular_files import read_named

NEEDLES_SAY_LITTLE = (
    "needles discriminate little: they tell a cache that loses much from one that loses little, hardly two that lose "
    "little; perplexity by position and long generation carry the verdict"
)


class Example(NamedTuple):
    """One question: the prompt and the right answers."""

    prompt: str
    answers: tuple[str, ...]


Score = Callable[[str, Example], float]
"""``(answer, example)`` -> 0 to 1."""


@dataclass(frozen=True)
class Part:
    """The examples that one row of results is of.

    ``about``: what tells it from the task's other parts (``depth``, ``length``).  ``continues``: the answer is scored
    as a continuation of the prompt instead of generated.  ``follows``: the right answer is the one that the model gives
    under transformers' own uncompressed cache, and the score is the share of its tokens before the first other one.
    ``chat``: whether prompts go into the model's chat template
    where it has one.  ``stop``: texts that end an answer.
    """

    name: str
    examples: tuple[Example, ...]
    score: Score
    max_new_tokens: int
    about: Mapping[str, Any] = field(default_factory=dict)
    continues: bool = False
    follows: bool = False
    chat: bool = True
    stop: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """Of every prompt and answer: two parts with the same are the same questions."""
        digest = hashlib.sha256()
        for prompt, answers in self.examples:
            for text in (prompt, *answers):
                digest.update(f"{len(text)} ".encode() + text.encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


@dataclass(frozen=True)
class TaskRequest:
    """What a user asked of a task.

    ``count(text)``: the tokens that a text costs, templates included; ``lengths``: of prompts, in tokens; ``depths``:
    how many places from the start to the end of a prompt; ``examples``: how many a part, None for the task's own
    number; ``haystack``: prose that fills prompts; ``data``: the user's file or folder; ``longest``: the most tokens of
    a prompt with its answer, None without a limit; ``cut(text, most)`` leaves out the middle of a text of more tokens.
    """

    count: Callable[[str], int]
    lengths: tuple[int, ...]
    haystack: str
    depths: int = 5
    examples: int | None = None
    data: Path | None = None
    longest: int | None = None
    cut: Callable[[str, int], str] = lambda text, most: text
    seed: int = 0

    def random(self, *names: object) -> random.Random:
        """A generator of its own for what ``names`` say, the same in every run with this seed."""
        return random.Random(f"{self.seed} {' '.join(map(str, names))}")


class EvalTask(NamedTuple):
    """A row of :data:`kvruntime.eval.tasks.TASKS`."""

    what: str
    """In one line."""
    parts: Callable[[TaskRequest], list[Part]]
    needs: str = ""
    """What ``TaskRequest.data`` has to be; empty where nothing is needed."""
    caveat: str = ""
    """What is said wherever its scores are shown."""
    grid: bool = False
    """Whether parts lie on a grid of depth and length, which has a picture."""


def fitted(build: Callable[[int], str], count: Callable[[str], int], length: int) -> str:
    """``build(n)`` with the largest ``n`` whose text costs at most ``length`` tokens; texts grow with ``n``.

    Raises ``ValueError`` where ``build(0)`` is longer already.
    """
    least = count(build(0))
    if least > length:
        raise ValueError(f"length {length}: allowed are {least} and above for this task and tokenizer")
    low, high = 0, 1
    while count(build(high)) <= length:
        low, high = high, 2 * high
        if high > 1 << 24:
            raise ValueError(f"length {length}: no filling reaches it")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(build(middle)) <= length else (low, middle)
    return build(low)


def share_found(answer: str, example: Example) -> float:
    """The share of the right answers that the answer holds, whatever the case."""
    return sum(right.lower() in answer.lower() for right in example.answers) / len(example.answers)


def read_examples(path: Path, fields: Sequence[str], what: str) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, each with ``fields``.

    Raises ``ValueError`` for a file that is missing or empty, and for a line that is no JSON or lacks one of them.
    """
    rows = []
    for number, line in enumerate(read_named(path, what).decode("utf-8", "replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{what} {path}, line {number} is not valid JSON: {error}") from None
        lacking = [name for name in fields if not isinstance(row, dict) or name not in row]
        if lacking:
            raise ValueError(f"{what} {path}, line {number}: no {lacking[0]!r}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{what} {path} is empty")
    return rows


def in_blocks(examples: Sequence[Example], size: int) -> list[tuple[str, tuple[Example, ...]]]:
    """``examples`` in blocks that are recorded one by one, each with its name: ``0 to 63``."""
    return [
        (f"{first} to {min(first + size, len(examples)) - 1}", tuple(examples[first : first + size]))
        for first in range(0, len(examples), size)
    ]
