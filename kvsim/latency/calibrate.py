"""``kvsim calibrate``: has the runtime measure this card and write a profile (:mod:`kvsim.latency.profile`)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from kvsim.install import install_hint
from kvsim.latency.profile import Profile, load_profile

NEEDED = ("kvruntime", "torch")
DAY = 86_400
"""Longest measurement, in seconds."""

FAILED = "kvruntime: error: "


def calibrate(
    out: Path, device: str | None = None, seconds: float = 45.0, say: Callable[[str], None] = lambda line: None
) -> Profile:
    """Measures ``device`` (default: cuda where there is one) in about ``seconds`` seconds; the profile written.

    Runs ``python -m kvruntime calibrate`` and hands its progress to ``say``.  Raises ``ValueError`` where the runtime
    is not installed or fails.
    """
    if not 0 < seconds <= DAY:
        raise ValueError(f"seconds {seconds:g}: allowed are above 0 to {DAY:,}")
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ValueError(f"calibrate needs the runtime, {' and '.join(missing)} not found: {install_hint('runtime')}")
    command = [sys.executable, "-m", "kvruntime", "calibrate", "--out", str(out), "--seconds", str(seconds)]
    command += ["--device", device] if device else []
    failure = ""
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
    ) as run:
        for line in run.stderr or ():
            if line.startswith(FAILED):
                failure = line.removeprefix(FAILED).strip()
            else:
                say(line.rstrip())
    if run.returncode:
        raise ValueError(failure or f"python -m kvruntime calibrate ended with exit code {run.returncode}")
    return load_profile(out)
