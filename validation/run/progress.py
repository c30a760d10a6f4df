"""The progress of a run: what its parts say, and every quarter of a minute what is left of the whole."""

from __future__ import annotations

from time import monotonic as clock

from kvruntime.bench.harness.progress import Progress

EVERY = 15.0
"""Seconds between two lines that say how long the rest takes."""
MOST = 0.95
"""The share of a part that is not over."""


class RunProgress(Progress):
    """Progress of pieces whose costs are seconds: the share of a piece that is done is what has passed of them."""

    begun = told = 0.0

    def begin(self, label: str) -> None:
        self.begun = self.told = clock()
        super().begin(label)

    def passed_on(self, line: str) -> None:
        """A line of a part's own."""
        now = clock()
        if now - self.told >= EVERY:
            self.told = now
            self.share = min(MOST, (now - self.begun) / self.costs[self.index])
            line += self._left()
        self.say(line)
