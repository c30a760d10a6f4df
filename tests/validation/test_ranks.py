"""Measurements over ranks, in one process: what is said without torchrun, and the peak of a row after a failed one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from kvsim.methods import Full, Kivi  # noqa: E402
from validation.cli import run  # noqa: E402
from validation.ranks.steps import WAYS, Load  # noqa: E402

START = "start 2 or more, `torchrun --nproc-per-node 2 -m validation ...`"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "1 process"),
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, "1 process"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2, RANK=, LOCAL_RANK=: allowed are the numbers that torchrun sets"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE=2, RANK=0, LOCAL_RANK=: allowed are the numbers"),
        ({"WORLD_SIZE": "x", "RANK": "0", "LOCAL_RANK": "0"}, "WORLD_SIZE=x, RANK=0, LOCAL_RANK=0: allowed are"),
        ({"WORLD_SIZE": "0", "RANK": "0", "LOCAL_RANK": "0"}, "WORLD_SIZE=0, RANK=0, LOCAL_RANK=0: allowed are"),
    ],
)
def test_without_torchrun_one_line_says_how_to_start(
    given: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert run(["all-reduce", "--size", "2k"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"validation: error: {said}")
    assert error.endswith(f": {START}\n")
    assert error.count("\n") == 1


def test_a_failed_row_leaves_no_peak_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that counts as CUDA's allocator does: the peak stays until it is reset."""
    device = SimpleNamespace(type="cuda", peak=0)
    group: Any = SimpleNamespace(device=device, ranks=1, wait=lambda: None, slowest=list, equal=lambda tensor: True)
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=8))
    load = Load(group, model, batch_size=1, num_tokens=60)

    def engine_step(method: Any) -> Any:
        device.peak = max(device.peak, 1000 if isinstance(method, Full) else 10)
        if isinstance(method, Full):
            raise RuntimeError("CUDA out of memory\nmore")
        return lambda: None, lambda: None, SimpleNamespace(nbytes=5)

    monkeypatch.setattr(load, "engine_step", engine_step)
    monkeypatch.setattr(load, "timed", lambda step: [1.0])
    monkeypatch.setattr(load, "nbytes", lambda method: 5)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: device.peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: setattr(device, "peak", 0))
    failed, next_one = load.rows(WAYS[1], [Full(), Kivi()])
    assert failed["failed"] == "RuntimeError: CUDA out of memory"
    assert next_one["peak_nbytes"] == 10
