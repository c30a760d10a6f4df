"""Caches that are timed in turns at one size: a host is now faster, now slower, and every cache meets both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from kvruntime.bench.generate.calls import DRAFTED, Clock, prompt, prompt_name
from kvruntime.bench.generate.report import FIRST_CALL, STOCK
from kvruntime.bench.harness.results import Row
from kvruntime.bench.harness.session import release, say
from kvruntime.bench.harness.tables import of_kernel

SHORT, LONG = FIRST_CALL, 72
"""The new tokens between which steps are timed, unless more or fewer are asked for."""


class Turns:
    """Several of these commands on one device: their first calls run side by side, their timed ones alone.

    ``path``: a file that all of them lock, shared while first calls run, exclusively while calls are timed; None
    where this command has the device to itself.  A process that ends lets go of it, however it ends.
    """

    def __init__(self, path: Path | None) -> None:
        self.file = None if path is None else path.open("ab")
        self.shared = False
        self.together()

    def together(self) -> None:
        """Side by side with the others, once none of them times."""
        if self.file is not None and not self.shared:
            import fcntl

            self._take(fcntl.LOCK_SH, "times")
            self.shared = True

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Once no other process runs first calls or times."""
        if self.file is None:
            yield
            return
        import fcntl

        fcntl.flock(self.file, fcntl.LOCK_UN)  # or two that share it would wait for each other
        self._take(fcntl.LOCK_EX, "runs first calls or times")
        self.shared = False
        try:
            yield
        finally:
            fcntl.flock(self.file, fcntl.LOCK_UN)

    def _take(self, kind: int, others: str) -> None:
        """Locks the file, and says so where it has to wait, and how long it did."""
        import fcntl

        assert self.file is not None
        try:
            fcntl.flock(self.file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting: another process {others} ({self.file.name})")
            start = perf_counter()
            fcntl.flock(self.file, kind)
            say(f"waited {perf_counter() - start:.0f} s for others")

    def close(self) -> None:
        """Others need not wait any longer."""
        if self.file is not None:
            self.file.close()
            self.file = None


class Entrant:
    """One cache at one size under one kind of call: what its calls took."""

    def __init__(
        self, one: Any, call: str, size: tuple[int, int], repeats: int, num_new: int | None = None
    ) -> None:
        self.one, self.call, self.size, self.repeats = one, call, size, repeats
        self.num_new = LONG if num_new is None else num_new
        """New tokens of a timed call."""
        self.starts: list[float] = []
        self.steps: list[float] = []
        self.middles: list[float] = []
        """Of each timed call the median step, where every step is one token a row."""
        self.said: Row = {}
        self.held = 0
        """Bytes of the device that stay between its calls: a static cache and what was compiled for it."""
        self.peak: int | None = None
        self.failure: Exception | None = None

    @property
    def is_dynamic(self) -> bool:
        return bool(self.one.name == STOCK[0])

    def run(self, clock: Clock, model: Any, num_new: int, asks: Prompt) -> list[float]:
        """One call with an empty cache; what it leaves behind is given back."""
        with self.one.around(model):
            ids = asks(self)
            cache = self.one.cache(model, self.size[1] + self.num_new)
            times, _ = clock(model, ids, num_new, cache, self.call)
        if len(times) < num_new:
            raise RuntimeError(f"{len(times)} of {num_new} tokens came")
        self.said |= of_kernel(cache)
        if steps := getattr(cache, "steps", ""):
            self.said["steps"] = steps
        if num_new == self.num_new:
            self.said["calls_of_model"] = clock.steps
        return times

    def first(self, clock: Clock, model: Any, asks: Prompt) -> None:
        """The call in which all compiling and capturing is; of the dynamic cache a long one, whose lengths are new to
        the process."""
        before = allocated(clock)
        long = self.is_dynamic or self.call == DRAFTED  # whose steps are not of one length
        times = self.run(clock, model, self.num_new if long else SHORT, asks)
        self.said["first_call_seconds"] = times[SHORT - 1]
        if self.is_dynamic:
            self.steps.append(per_token(times))
            self.said["new_length_seconds"] = middle_step(times)
        release()
        self.held = max(0, allocated(clock) - before)

    def again(self, clock: Clock, model: Any, asks: Prompt, weights: int, kept: int) -> None:
        """A timed call.  ``weights``: bytes on the device before any cache; ``kept``: after all first calls."""
        if allocated(clock) > kept:  # a cache that an earlier call left in a cycle
            release()
        before = allocated(clock, anew=True)
        times = self.run(clock, model, self.num_new, asks)
        self.starts.append(times[0])
        self.steps.append(per_token(times))
        if self.call != DRAFTED:
            self.middles.append(middle_step(times))
        self.peak = max(self.peak or 0, allocated(clock, peak=True) - before + self.held + weights)

    def row(self) -> Row:
        """The figures of :func:`kvruntime.bench.generate.suite.subject_tasks`, of the calls made so far."""
        out: Row = {
            **self.said,
            "first_token_seconds": [median(self.starts), min(self.starts), max(self.starts)],
            "seconds_per_step": [median(self.steps), min(self.steps), max(self.steps)],
            "calls": list(self.steps),
            "tokens_per_second": self.size[0] / median(self.steps),
        }
        if self.middles:
            out["middle_steps"] = list(self.middles)
        if self.peak:
            out["peak_nbytes"] = self.peak
        return out


def per_token(times: Sequence[float]) -> float:
    """Seconds between two tokens after the first ``SHORT``."""
    return (times[-1] - times[SHORT - 1]) / (len(times) - SHORT)


def middle_step(times: Sequence[float]) -> float:
    """The median of the seconds between one token and the next after the first ``SHORT``: at new lengths one of 64 may
    take six times as long as the others."""
    return median(after - before for before, after in pairwise(times[SHORT - 1 :]))


def allocated(clock: Clock, *, peak: bool = False, anew: bool = False) -> int:
    """Bytes that PyTorch's allocator holds on the device, or held at the most since it was asked ``anew``."""
    if not clock.device.startswith("cuda"):
        return 0
    import torch

    if anew:
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()


Prompt = Callable[[Entrant], Any]
"""Tokens of an entrant's calls."""


class Group:
    """What takes part at one size; measured together, when the first row of it is asked for.

    ``load()``: the model, and the tokenizer by which drafted calls are given a text, or None.
    ``record(entrant, row)``: is told of every row as it stands after each round, so that a run that is stopped keeps
    what it has.  Each entrant's failure is its own.
    """

    def __init__(
        self,
        clock: Clock,
        load: Callable[[], tuple[Any, Any]],
        turns: Turns,
        seed: int,
        record: Callable[[Entrant, Row], None],
    ) -> None:
        self.clock, self.load, self.turns, self.seed, self.record = clock, load, turns, seed, record
        self.entrants: list[Entrant] = []
        self.measured = False

    def row(self, entrant: Entrant) -> Row:
        """Its figures.  Raises what its calls raised."""
        if not self.measured:
            self.measured = True
            try:
                self._measure()
            except Exception as error:  # no model, or no device
                for one in self.entrants:
                    one.failure = one.failure or error
        if entrant.failure is not None:
            raise entrant.failure
        return entrant.row()

    def _measure(self) -> None:
        self.turns.together()
        model, tokenizer = self.load()
        asks = partial(self._prompt, model, tokenizer)
        release()
        weights = allocated(self.clock)
        for entrant in self.entrants:
            self._try(entrant, lambda one: one.first(self.clock, model, asks))
        kept = allocated(self.clock)
        with self.turns.alone():
            for turn in range(max(entrant.repeats for entrant in self.entrants)):
                for entrant in self.entrants:
                    if entrant.failure is None and turn < entrant.repeats:
                        self._try(entrant, lambda one: one.again(self.clock, model, asks, weights, kept))
                        if entrant.failure is None:
                            self.record(entrant, entrant.row())
        for one in {id(entrant.one): entrant.one for entrant in self.entrants}.values():
            getattr(one.cache, "free", int)()

    def _prompt(self, model: Any, tokenizer: Any, entrant: Entrant) -> Any:
        """The tokens of an entrant's calls, whose row says what they are."""
        if said := prompt_name(entrant.call, tokenizer):
            entrant.said["prompt"] = said
        return prompt(model, *entrant.size, self.seed, entrant.call, tokenizer)

    def _try(self, entrant: Entrant, work: Callable[[Entrant], None]) -> None:
        try:
            work(entrant)
        except Exception as error:
            error.__traceback__ = None  # whose frames hold tensors
            entrant.failure = error
            release()
