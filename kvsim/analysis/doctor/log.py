"""The lines of a boot log, the numbers in them, and what a diagnosis holds."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from kvsim.hardware import Hardware
from kvsim.models.model import Model

GIB, MIB = 1 << 30, 1 << 20
LONGEST_LINE = 1 << 16
"""Characters of a line that are looked at: an engine's configuration is a few thousand."""

NUMBER = r"(-?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+))"
"""A number as logs write it; a full stop or comma behind it is not of it."""
QUANTITY = NUMBER + r"[ \t]*([GMK]i?[Bb]|[Bb]ytes|B)\b"
"""A number and its unit: two groups."""
UNITS = {"g": GIB, "m": MIB, "k": 1 << 10, "b": 1}

ESCAPES = re.compile(r"(?:\x1b|\\x1b|\\u001b|#033)\[[0-9;?]*[A-Za-z]")
"""Terminal colours, also as JSON and syslog spell the escape character."""
RANK = re.compile(r"\((?:[A-Za-z]*Worker\w*|EngineCore\w*)[^()]*\)")
"""The process that a line of vLLM comes from."""
KEPT = re.compile(
    r"LLM engine|API server|args|Namespace|KV cache(?! usage)|kv cache|kv_cache|[GM]i?[Bb]\b|blocks|block size|layers"
    r"|model|max_num|concurrency|max seq len|out of memory|print_info|print_meta|llama|general\.name|n_ctx|draft|build"
    r"|memory|kv_size|failed|buffer"
)
"""Every line with a figure or a setting has one of these; a server's log of requests mostly has none."""

Found = tuple[int, "re.Match[str]"]


def number(text: str) -> float:
    """``189,945`` as 189945.0."""
    return float(text.replace(",", ""))


def gib(match: re.Match[str], group: int = 1) -> float:
    """GiB of the quantity whose number is ``group``.  vLLM's ``GB`` are GiB (before 0.8)."""
    return number(match[group]) * UNITS[match[group + 1][0].lower()] / GIB


@dataclass(frozen=True)
class Finding:
    """One figure of the log: line number, what it is, its unit, predicted (``None``: not predicted) and reported.

    ``cause`` says why they differ, or what the prediction rests on.
    """

    line: int
    what: str
    unit: str
    predicted: float | None
    reported: float
    cause: str = ""

    @property
    def error(self) -> float | None:
        """``reported / predicted - 1``."""
        return None if not self.predicted else self.reported / self.predicted - 1


@dataclass(frozen=True)
class Diagnosis:
    """What a log says: the engine, its version, the model's name, its settings, and every figure found."""

    engine: str
    version: str
    model: str
    settings: Mapping[str, str]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()


CLOSE = 0.01
"""Errors within this share need no cause."""


@dataclass(frozen=True)
class Reader:
    """One engine's room: what its boot logs look like, and who reads them.

    ``label``: the engine in a sentence.  ``signs``: patterns that only its logs have.  ``diagnosis(log, model,
    hardware, draft)``: the reconciled log, ``ValueError`` where it has no figure.  ``model_name`` and ``draft_name``:
    the model's and the draft model's name as a log gives them; an engine whose logs hold their model's shape has none
    and needs no model.
    """

    label: str
    signs: Sequence[str]
    diagnosis: Callable[[Log, Model | None, Hardware | None, Model | None], Diagnosis]
    model_name: Callable[[Log], str | None] = lambda log: None
    draft_name: Callable[[Log], str | None] = lambda log: None
    needs_model: bool = False


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


@dataclass(frozen=True)
class Log:
    """Numbered lines of a log: those that may hold a figure or a setting."""

    lines: Sequence[tuple[int, str]]

    @classmethod
    def of(cls, text: str | Log) -> Log:
        """The log in ``text``, without colours and carriage returns."""
        if isinstance(text, Log):
            return text
        lines = ((at, line[:LONGEST_LINE]) for at, line in enumerate(text.split("\n"), 1) if KEPT.search(line))
        return cls([(at, ESCAPES.sub("", line).replace("\r", " ").rstrip()) for at, line in lines])

    def find(self, *patterns: str) -> Found | None:
        """Line number and match of the first line that has the first of ``patterns`` that any line has."""
        for pattern in patterns:
            found = next(self.all(pattern), None)
            if found is not None:
                return found
        return None

    def all(self, pattern: str) -> Iterator[Found]:
        """Of every line that has it."""
        compiled = _compiled(pattern)
        for at, line in self.lines:
            match = compiled.search(line)
            if match is not None:
                yield at, match

    def value(self, *patterns: str) -> str | None:
        """The first group of the first pattern that is found."""
        found = self.find(*patterns)
        return None if found is None else found[1][1]

    def number(self, *patterns: str) -> float | None:
        """The same as a number."""
        value = self.value(*patterns)
        return None if value is None else number(value)

    def between(self, first: int, last: float) -> Log:
        """The lines numbered from ``first`` to before ``last``."""
        return Log([(at, line) for at, line in self.lines if first <= at < last])


def rank_of(match: re.Match[str]) -> str:
    """The process that printed the line, empty where the line does not say."""
    found = RANK.search(match.string)
    return "" if found is None else found[0]
