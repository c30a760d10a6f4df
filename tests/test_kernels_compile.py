"""Every kernel compiles for sm_80, sm_89, sm_90 and sm_100 without a GPU, and none spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the runtime extra (triton) is not installed")

STACK = 8
"""Bytes of stack a thread: the assembler's own."""


def test_all_compile_without_spills() -> None:
    here = Path(__file__).parent
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(here.parent)
    run = subprocess.run(
        [sys.executable, here / "compile_kernels.py"], capture_output=True, text=True, env=environment, cwd=here.parent
    )
    assert run.returncode == 0, run.stderr[-3000:]
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert {sm for _, _, sm, _ in rows} == {80, 89, 90, 100}
    assert {kernel for kernel, *_ in rows} == {
        *("pack", "store", "freeze", "advance", "attend", "attend_fresh", "attend_table", "combine", "store_full"),
        *("attend_full", "pack_layers", "store_layers", "freeze_layers", "linear", "dense", "add_norm"),
    }
    bad = [row for row in rows if isinstance(row[3], str) or row[3]["STACK"] > STACK or row[3]["LOCAL"]]
    assert not bad, bad
