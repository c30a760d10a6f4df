"""What a run found: a sentence, and the figures that it was drawn from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from kvsim.layout import Method


class Findings(NamedTuple):
    """``said``: in a sentence.  ``figures``: what was measured, each with the fields that a prediction needs."""

    said: str
    figures: Sequence[dict[str, Any]] = ()


class Broken(Exception):
    """A promise that a run found broken, with the figures it was found in."""

    def __init__(self, said: str, figures: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__(said)
        self.figures = figures


def each(methods: Iterable[Method], work: Callable[[Method], Findings]) -> Findings:
    """``work`` of every layout, put together; one that fails stops none of the others.

    Raises ``Broken`` that says of each layout what was found, where one of them failed.
    """
    said: list[str] = []
    figures: list[dict[str, Any]] = []
    failed = 0
    for method in methods:
        try:
            found = work(method)
        except Exception as error:  # whatever it is, the promise is not kept
            found = Findings(f"FAILS, {type(error).__name__}: {error}", getattr(error, "figures", ()))
            failed += 1
        said.append(f"{method.name}: {found.said}")
        figures += found.figures
    told = "; ".join(said)
    if failed:
        raise Broken(told, figures)
    return Findings(told, figures)
