"""The words that the compiled packing kernel writes, and the weights of boosted channels, without a GPU.

The interpreter proves the source, not what becomes of it: Triton 3.6's fault that an H100 found
(validation/experiments) shows in this run, and not in the interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the runtime extra (torch) is not installed")
pytest.importorskip("triton", reason="the runtime extra (triton) is not installed")


@pytest.mark.long
def test_compiled_packing_writes_the_words_of_the_reference() -> None:
    here = Path(__file__).parents[1] / "support"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(here.parents[1]), os.environ.get("PYTHONPATH"))))
    run = subprocess.run([sys.executable, here / "packing_ptx.py"], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(rows) == 47
    assert {warps for _, warps, *_ in rows} == {1, 4, 8}
    assert {(layers, stored) for _, _, stored, _, layers in rows} == {(1, 0), (1, 37), (3, 0)}
    assert not [row for row in rows if any(row[3])]
