"""Progress with an estimate of the time left: a bar on a terminal, plain lines elsewhere, always on stderr."""

from __future__ import annotations

import sys
from time import monotonic as clock
from types import TracebackType

CAUTION = 1.2
"""The time left is said to be so many times what the finished share tells, since it may not rise later."""


class Progress:
    """``with Progress(costs) as progress``: for each piece of work ``begin(label)``, ``tick(share)``..., ``end()``.

    ``costs`` are the expected relative durations of the pieces, in order. The time left is taken from how long the
    finished share took; what is shown never rises, nor is it beyond ``most`` seconds in all. Off a terminal a piece
    is a line: when it begins, or with ``told_at_end`` when it ends, with what it found.
    """

    def __init__(self, costs: list[float], told_at_end: bool = False, most: float = float("inf")) -> None:
        self.costs, self.total = costs, sum(costs) or 1.0
        self.told_at_end, self.most = told_at_end, most
        self.least = float("inf")
        self.index, self.finished, self.share = -1, 0.0, 0.0
        self.label = ""
        self.start = clock()
        self.bar = self.task = None
        if sys.stderr.isatty():
            from rich import progress as rich
            from rich.console import Console

            self.bar = rich.Progress(
                rich.TextColumn("{task.description}", markup=False),
                rich.BarColumn(),
                rich.TaskProgressColumn(),
                rich.TextColumn("{task.fields[left]}"),
                console=Console(stderr=True),
                transient=True,
            )
            self.task = self.bar.add_task("", total=1.0, left="")

    def __enter__(self) -> Progress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()

    def begin(self, label: str) -> None:
        """The next piece of work starts."""
        self.index, self.share, self.label = self.index + 1, 0.0, label
        if self.bar:
            self._show()
        elif not self.told_at_end:
            self.say(f"[{self.index + 1}/{len(self.costs)}] {label}{self._left()}")

    def tick(self, share: float) -> None:
        """A share of the current piece is done."""
        self.share = min(1.0, self.share + share)
        if self.bar:
            self._show()

    def end(self, found: str = "") -> None:
        """The current piece is done; ``found``: its figures."""
        self.finished += self.costs[self.index]
        self.share = 0.0
        if self.told_at_end:
            left = "" if self.bar or self.index + 1 == len(self.costs) else self._left()
            self.say(f"[{self.index + 1}/{len(self.costs)}] {self.label}: {found}{left}")

    def say(self, line: str) -> None:
        """A line beside the bar."""
        if self.bar:
            self.bar.console.print(line, highlight=False, markup=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def _left(self) -> str:
        done = (self.finished + self.share * self.costs[self.index]) / self.total
        if done < 0.02:
            return ""
        taken = clock() - self.start
        self.least = seconds = min(self.least, CAUTION * taken * (1 - done) / done, max(0.0, self.most - taken))
        return f"  about {seconds / 60:.0f} min left" if seconds > 90 else f"  about {seconds:.0f} s left"

    def _show(self) -> None:
        assert self.bar is not None
        assert self.task is not None
        done = (self.finished + self.share * self.costs[self.index]) / self.total
        self.bar.update(self.task, description=self.label, completed=done, left=self._left())
