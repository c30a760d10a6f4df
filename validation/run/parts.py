"""The parts of a run: a command each, in a process of its own, all of them within a quarter of an hour.

Parts that time run alone, one by one; those that weigh share the device and run at once.  A part that fails or runs
out of its time leaves what it recorded until then; the others go on.  What a device cannot run (a CPU has no CUDA
graphs) is no part of its run, and is said.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic as clock
from typing import NamedTuple

MINUTES = 15.0
STEPS = (
    *("--model", "llama-3.2-1b", "--size", "1x2k", "--size", "1x8k", "--size", "1x32k", "--size", "8x8k"),
    *("--size", "64x2k"),
)
SHAPES = (
    *("--shape", "llama-3-8b:1x8k", "--shape", "llama-3-8b:1x32k", "--shape", "llama-3-8b:8x8k"),
    *("--shape", "gpt2:8x1k"),
)
GENERATED = ("--model", "llama-3.2-1b", "--size", "1x1k", "--size", "8x2k", "--repeats", "2")
"""Prompts of lengths that calibrating does not see, of a model whose shape it does not see."""
OTHERS = ("--model", "qwen3-0.6b", "--model", "gemma-3-1b-it")
"""Further models, the last one with windows in most of its layers."""
COMPILED = "kvruntime:compiled"


@dataclass(frozen=True)
class Part:
    """``words`` after ``python -m``, with ``{file}`` where it records, in ``folder``.  ``seconds``: what it should
    take on a card where Triton compiles from nothing, and may not exceed by more than half unless what comes after it
    leaves more.  ``cuda``: it needs a GPU;
    ``cpu``: it is of a CPU alone.  ``together``: it times nothing.  ``again``: words with which it goes on where it
    was stopped.  ``extends``: the part whose file it adds to, which begins that file anew where it runs."""

    name: str
    words: tuple[str, ...]
    seconds: float
    folder: str
    cuda: bool = False
    cpu: bool = False
    together: bool = False
    again: tuple[str, ...] = ()
    extends: str = ""

    def refuses(self, cuda: bool, device: str) -> str:
        """Why it does not run on ``device``; empty where it does."""
        if self.cuda and not cuda:
            return f"it times CUDA graphs, and {device} has none"
        return f"it weighs a process's pages, and caches lie in the memory of {device}" if self.cpu and cuda else ""


RELIABILITY = ("validation", "reliability", "--quick", "--out", "{file}", "--run")
"""Those of its runs that have figures; all of them take a card five minutes."""
PARTS = (
    Part(
        "calibrate",
        ("kvruntime", "calibrate", "--seconds", "8", "--without", COMPILED, "--out", "{file}"),
        145,
        "profiles",
    ),
    Part(
        "generate",
        (
            *("kvruntime", "bench", "generate", *GENERATED, *OTHERS),
            *("--cache", "dynamic", "--cache", "ours", "--anew", "--out", "{file}"),
        ),
        145,
        "generate",
        cuda=True,
    ),
    Part(
        "steps",
        ("kvruntime", "bench", "engine", *STEPS, "--repeats", "2", "--anew", "--out", "{file}"),
        50,
        "engine",
        cuda=True,
    ),
    Part(
        "attention",
        ("kvruntime", "bench", "kernels", "--part", "attend", *SHAPES, "--anew", "--out", "{file}"),
        45,
        "kernels",
        cuda=True,
    ),
    Part(
        "memory",
        ("validation", "memory", "--quick", "--out", "{file}"),
        110,
        "",
        together=True,
        again=("--resume",),
    ),
    Part("phases", (*RELIABILITY, "memory by phase"), 110, "reliability", together=True),
    Part("resident", (*RELIABILITY, "resident memory"), 30, "reliability", cpu=True),
    Part("largest", (*RELIABILITY, "the largest batch"), 25, "reliability"),
    Part(
        "calibrate compiled",
        ("kvruntime", "calibrate", "--seconds", "8", "--part", COMPILED, "--out", "{file}"),
        90,
        "profiles",
        cuda=True,
        extends="calibrate",
    ),
    Part(
        "compiled",
        ("kvruntime", "bench", "generate", *GENERATED, "--cache", "ours", "--compiled", "--anew", "--out", "{file}"),
        90,
        "generate",
        cuda=True,
    ),
)
"""In this order, so that a run that is cut has what says most: the profile, what it predicts, what is weighed; what
takes longest for what it says is last."""
OWN_ESTIMATE = re.compile(r"  about \d+ (min|s) left$")
"""What a part says of its own end, beside what is said of the whole."""
MOST = 1.5
"""What a part may take of its own seconds; more where the parts after it leave that."""


class Outcome(NamedTuple):
    """How a part ended: ``code`` of its process, None where it was stopped or not begun; its file where it left one.
    ``before``: it did in an earlier run."""

    part: Part
    code: int | None
    seconds: float
    file: Path
    said: str
    before: bool = False

    @property
    def line(self) -> str:
        if self.before:
            return f"{self.part.name}: done before, in {self.seconds:.0f} s"
        if not self.seconds:
            return f"{self.part.name}: no time was left for it"
        ended = "stopped" if self.code is None else "done" if not self.code else f"exit code {self.code}"
        held = "" if self.file.exists() else ", nothing recorded"
        why = f": {self.said}" if self.code and self.said else ""
        return f"{self.part.name}: {ended} in {self.seconds:.0f} s{held}{why}"


def chosen(device: str, names: Sequence[str] = ()) -> tuple[list[Part], list[str]]:
    """The parts that ``device`` runs, and a line for each that it does not.  Raises ``LookupError`` for a name that is
    none's."""
    known = {part.name: part for part in PARTS}
    for name in names:
        if name not in known:
            raise LookupError(f"unknown part {name!r}: allowed are {', '.join(known)}")
    wanted = [part for part in PARTS if part.name in names] or list(PARTS)
    cuda = device.startswith("cuda")
    reasons = {part.name: reason for part in wanted if (reason := part.refuses(cuda, device))}
    left = [f"{name}: {reason}" for name, reason in reasons.items()]
    return [part for part in wanted if part.name not in reasons], left


def rounds(parts: Sequence[Part]) -> list[list[Part]]:
    """The parts that run at once: neighbours that share the device, and each other one alone."""
    out: list[list[Part]] = []
    for part in parts:
        if part.together and out and out[-1][-1].together:
            out[-1].append(part)
        else:
            out.append([part])
    return out


def file_of(part: Part, folder: Path, name: str) -> Path:
    """Where a part records in ``folder``, of the card of this name."""
    return folder / part.folder / f"{name}.json"


def carry_out(
    parts: Sequence[Part],
    folder: Path,
    name: str,
    device: str,
    say: Callable[[str], None],
    minutes: float = MINUTES,
    earlier: Callable[[Part, Path], Outcome | None] | None = None,
) -> Iterator[list[Outcome]]:
    """The outcomes of each of the :func:`rounds` as it ends; what is begun later than after ``minutes`` is left out.

    ``name``: of the card, for file names; ``say``: told what the parts say; ``earlier``: how a part with this file
    ended in the run that this one goes on with, None where it has to run.
    """
    end, begun = clock() + 60 * minutes, list[subprocess.Popen[str]]()

    def work(part: Part) -> Outcome:
        file = file_of(part, folder, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        if earlier is not None and (found := earlier(part, file)) is not None:
            return found
        started = clock()
        if started >= end:
            return Outcome(part, None, 0.0, file, "")
        there = file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file  # as a record tells it
        words = [word.format(file=there) for word in (*part.words, *(part.again if earlier is not None else ()))]
        limit = min(end - started, max(MOST * part.seconds, end - started - sum(later)))
        code, said = _process([sys.executable, "-m", *words, "--device", device], limit, say, begun)
        return Outcome(part, code, clock() - started, file, said)

    queue = rounds(parts)
    later = [max(part.seconds for part in each) for each in queue]
    for each in queue:
        later.pop(0)
        with ThreadPoolExecutor(len(each)) as pool:
            try:
                found = list(pool.map(work, each))
            except BaseException:  # Ctrl-C, which a session of its own does not hear
                for process in list(begun):
                    _kill(process)
                raise
        yield found


def _process(
    command: Sequence[str], seconds: float, say: Callable[[str], None], begun: list[subprocess.Popen[str]]
) -> tuple[int | None, str]:
    """Exit code, None where it was stopped after ``seconds`` with all that it had begun, and the last line that it
    said.  ``begun``: holds the process meanwhile."""
    last, stopped = "", threading.Event()
    with subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        begun.append(process)

        def stop() -> None:
            stopped.set()
            _kill(process)

        timer = threading.Timer(seconds, stop)
        timer.start()
        try:
            for line in process.stderr or ():
                if line.strip():
                    last = OWN_ESTIMATE.sub("", line.strip())
                    say(last)
        except BaseException:
            _kill(process)
            raise
        finally:
            timer.cancel()
            begun.remove(process)
    return (None if stopped.is_set() else process.returncode), last


def _kill(process: subprocess.Popen[str]) -> None:
    """Ends a process and those that it began: what compiles or weighs in others would go on, and hold the card."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
