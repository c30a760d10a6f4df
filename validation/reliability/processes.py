"""The runs that take processes of their own: a benchmark that is killed goes on, and two share one device."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from validation.reliability import subjects
from validation.reliability.findings import Broken, Findings
from validation.reliability.subjects import Scale

PATIENCE = 300.0
"""Seconds after which a process counts as stuck."""
ROOT = Path(__file__).parents[2]


def killed(device: torch.device, scale: Scale) -> Findings:
    """A benchmark is killed once its file holds a row; ``--resume`` keeps what was there and does the rest."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bench.json"
        command = _benchmark(device, scale, Path(folder), out)
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
        )
        try:
            before = _wait_for_rows(process, out)
            process.send_signal(signal.SIGKILL)
        finally:
            process.kill()
            process.communicate()
        if process.returncode != -signal.SIGKILL:
            raise Broken(f"the benchmark ended with {process.returncode} before it was killed")
        held = json.loads(out.read_text(encoding="utf-8"))["rows"]  # whole, whenever it was killed
        run = subprocess.run(
            [*command, "--resume"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PATIENCE,
            check=False,
        )
        if run.returncode:
            raise Broken(f"--resume ended with {run.returncode}: {run.stderr.strip().splitlines()[-1:]}")
        rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
        lost = [row for row in held if row not in rows]
        if lost:
            raise Broken(f"--resume changed {len(lost)} of {len(held)} rows that were there")
        if len(rows) <= len(held):
            raise Broken(f"killed with {len(held)} rows and resumed to {len(rows)}: nothing was left to do")
        others = sorted(path.name for path in out.parent.iterdir() if path.name.startswith("bench") and path != out)
        others = [name for name in others if not name.endswith(".lock")]
        if others:
            raise Broken(f"left beside the file: {', '.join(others)}")
        return Findings(f"killed with {before} of {len(rows)} rows in the file, which --resume kept, and did the rest")


def _benchmark(device: torch.device, scale: Scale, folder: Path, out: Path) -> list[str]:
    """One with several rows, of which none takes long."""
    start = [sys.executable, "-m", "kvruntime", "bench"]
    if device.type == "cuda":
        sizes = [word for context in (128, 256, 512, 768, 1024) for word in ("--size", f"1x{context}")]
        return [*start, "engine", "--model", "gpt2", *sizes, "--no-compile-ahead", "--out", str(out)]
    model = folder / "model"
    subjects.model(device, scale).save_pretrained(model)
    contexts = ",".join(str(context) for context in range(64, 320, 16))
    given = [
        "--model",
        str(model),
        "--only",
        "memory",
        "--ctx",
        contexts,
        "--device",
        str(device),
        "--offline",
        "--no-plots",
    ]
    return [*start, *given, "--out", str(out)]


def _wait_for_rows(process: subprocess.Popen[Any], out: Path) -> int:
    """Until the file holds a row; how many it held."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if process.poll() is not None:
            _, said = process.communicate()
            raise Broken(f"the benchmark ended with {process.returncode}: {(said or '').strip().splitlines()[-1:]}")
        try:
            rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
        except (OSError, ValueError):
            rows = []
        if rows:
            return len(rows)
        time.sleep(0.01)
    raise Broken(f"no row after {PATIENCE:.0f} s")


def together(device: torch.device, scale: Scale) -> Findings:
    """Two processes decode on one device at once, and answer as one alone does, to the token and the byte."""
    tokens = max(24, min(400, scale.decoded // 100))
    command = [sys.executable, "-m", "validation.reliability.answer", "--device", str(device), "--tokens", f"{tokens}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join((str(ROOT), *_paths()))}

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )

    alone, error = start().communicate(timeout=PATIENCE)
    want = alone.splitlines()
    if not want:
        raise Broken(f"a process alone answered nothing: {error.strip().splitlines()[-1:]}")
    both = [start() for _ in range(2)]
    try:
        said = [process.communicate(timeout=PATIENCE) for process in both]
    finally:
        for process in both:
            process.kill()
    for process, (found, error) in zip(both, said, strict=True):
        if process.returncode:
            raise Broken(f"a process ended with {process.returncode}: {error.strip().splitlines()[-1:]}")
        if found.split() != " ".join(want).split():
            raise Broken(f"a process answered {_differing(found.splitlines(), want)} otherwise than this one")
    return Findings(f"3 processes, {len(want)} layouts, {3 * tokens} tokens each: the same tokens and bytes")


def _differing(found: Sequence[str], want: Sequence[str]) -> str:
    return ", ".join(line.split()[0] for line in want if line not in found)


def _paths() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
