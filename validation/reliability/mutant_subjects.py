"""What is mutated, in groups, and the tests that are asked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Group(NamedTuple):
    """Modules of one kind, and test files of which every test that reaches a changed line is run."""

    modules: tuple[str, ...]
    tests: tuple[str, ...]


def _files(folder: str, *patterns: str, without: Sequence[str] = ()) -> tuple[str, ...]:
    found = {path for pattern in patterns for path in (ROOT / folder).glob(pattern)}
    return tuple(path.relative_to(ROOT).as_posix() for path in sorted(found) if path.name not in without)


def _tests(folder: str, *names: str) -> tuple[str, ...]:
    return tuple(f"tests/{folder}/test_{name}.py" for name in names)


CACHES = _tests(
    "kvruntime",
    *("boost", "evict", "evict_scores", "full", "head_dims", "hf_convert", "hf_honesty", "hf_interface", "hf_masks"),
    *("hf_mixed", "hf_prompts", "hf_stateful", "hf_windows", "out_of_memory", "paged", "reference", "token"),
)
PACKERS = _tests("kvruntime", "boost", "reference", "token", "paged")
GROUPS = {
    "formulas": Group(
        (*_files("kvsim/methods", "*.py"), "kvsim/layout.py", "kvsim/memory/estimate.py", "kvsim/memory/capacity.py"),
        _tests("kvsim", "methods", "record", "layouts", "explain", "timing", "capacity", "parallel", "page"),
    ),
    "caches": Group(
        (
            *_files("kvruntime/methods", "*/cache.py", "*/layer.py", "*/scores.py", "rows.py"),
            *("kvruntime/hf/cache.py", "kvruntime/hf/padding.py", "kvruntime/hf/prompts.py", "kvruntime/paged.py"),
            *_files("kvruntime/methods", "*/paged.py"),
        ),
        (*CACHES, *_tests("validation", "reliability")),
    ),
    "packers": Group(
        (
            *_files("kvruntime/methods", "*/reference.py", "*/words.py", "*/coding.py", "*/levels.py"),
            *("kvruntime/kernels/reference.py", "kvruntime/kernels/slot_reference.py"),
        ),
        PACKERS,
    ),
}
"""Triton kernels are not among them: their tests take minutes in the interpreter, a mutant each."""
