"""Mutants that the tests cannot notice, each with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        "kvruntime/hf/cache.py",
        "self.forward.states += 1",
        "self.forward.states -= 1",
    ): "only whether there were any is asked",
    (
        "kvsim/methods/kivi.py",
        "edge + more",
        "edge - more",
    ): "`more` is -1, 0 and 1",
    (
        "kvruntime/methods/token/levels.py",
        "POINTS + 1",
        "POINTS - 1",
    ): "the levels are the same to the last step on a grid of 65,535 points",
    (
        "kvruntime/methods/token/levels.py",
        "found - levels",
        "found + levels",
    ): "the iteration ends after 2,000 turns, at the same levels",
}
"""``(module, before, after)`` -> why nobody can tell them apart."""
ON_GPU: dict[tuple[str, str, str], str] = {
    (
        "kvruntime/hf/padding.py",
        "self._checked.device != given.device",
        "self._checked.device == given.device",
    ): "a mask on a GPU",
    (
        "kvruntime/methods/kivi/cache.py",
        "again is None or again[0] != alike or (not self._repeats(query, key, value))",
        "again is None and again[0] != alike and (not self._repeats(query, key, value))",
    ): "launches that are made again",
    (
        "kvruntime/methods/kivi/cache.py",
        "3",
        "4",
    ): "strides of CUDA tensors",
    (
        "kvruntime/methods/kivi/cache.py",
        "self.record.num_tokens <= self.method.residual_length",
        "self.record.num_tokens < self.method.residual_length",
    ): "whether a GPU prefers steps",
    (
        "kvruntime/hf/cache.py",
        "max(store.row_lengths) + 1",
        "max(store.row_lengths) - 1",
    ): "room for a step that the host plans on a GPU",
}
"""``(module, before, after)`` -> what only CUDA tensors reach: the tests notice it there, if any do."""


def reason(row: Mapping[str, Any]) -> str | None:
    """Why a survivor is none here; None where it is one."""
    key = (row["module"], row["before"], row["after"])
    return EQUIVALENT.get(key) or ON_GPU.get(key)
