"""Measurements over ranks, in one process: what is said without torchrun, the peak of a row after a failed one, and
the recorded rows, which kvsim's constants are fitted on and held against."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from kvsim.latency.constants import constants  # noqa: E402
from kvsim.methods import Full, Kivi  # noqa: E402
from validation.cli import run  # noqa: E402
from validation.documents import ranks_tables  # noqa: E402
from validation.latency import links  # noqa: E402
from validation.ranks.all_reduce import SIZES  # noqa: E402
from validation.ranks.steps import WAYS, Load  # noqa: E402
from validation.recorded import FOLDER  # noqa: E402
from validation.report.claims import CLAIMS  # noqa: E402
from validation.report.points import collect  # noqa: E402

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


def of(**wanted: Any) -> list[dict[str, Any]]:
    return [row for row in links.load() if all(row.get(name) == value for name, value in wanted.items())]


def test_what_is_recorded_says_how_it_was_measured() -> None:
    rows = links.load()
    assert rows
    for row in rows:
        assert row["ranks"] > 1
        assert len(row["commit"]) == 40
        assert {"torch", "transformers"} <= set(row["versions"])
        assert row["command"].startswith("python -m validation ")
        assert "/" not in row["command"]
    for way in ("eager", "graph"):
        assert {row["nbytes"] for row in of(kind="all_reduce", way=way, ranks=2)} == set(SIZES)


def test_ranks_agree_as_recorded_and_hold_what_kvsim_says() -> None:
    steps = of(kind="step")
    assert {row["way"] for row in steps} >= {"engine", "engine without all-reduces"}
    for row in steps:
        assert row["way"] == WAYS[2] or row["equal_tokens"]
        assert row["method"] == links.STOCK or row["nbytes"] == row["kvsim_nbytes"] == links.rank_nbytes(row)


def test_the_link_of_nccl_is_the_recorded_one() -> None:
    """And a step's predicted all-reduces are the curve's, two a layer."""
    stated = constants()
    fixed, found = links.study(stated)
    assert fixed.engine_link == stated.engine_link
    assert set(fixed.engine_link) == set(links.ENGINES)
    recorded = json.loads((FOLDER / "time" / "errors.json").read_text())["steps"]
    assert {name: recorded[name] for name in found} == found
    row = of(kind="step", way="engine")[0]
    hidden = 2 * row["batch_size"] * links.model_of(row).hidden_size
    one = links.all_reduce(row | {"nbytes": hidden})
    assert links.parts(row)["communication"] == pytest.approx(2 * row["num_layers"] * one)
    silent = {**row, "way": WAYS[2]}
    assert sum(links.parts(row).values()) - sum(links.parts(silent).values()) == pytest.approx(160 * one)


def test_a_record_of_ranks_makes_points(tmp_path: Path) -> None:
    """One a figure: bytes and seconds of a step, a graph's all-reduces; the rest is left with its reason."""
    step, silent = (of(kind="step", way=way, method="kivi-2bit-g64-r64", ranks=2)[0] for way in WAYS[1:])
    reduces = [of(kind="all_reduce", way=way, nbytes=2048, ranks=2)[0] for way in ("graph", "eager")]
    stock = {**step, "way": "model", "method": links.STOCK}
    rows = [*reduces, step, silent, stock, {**step, "failed": "RuntimeError: CUDA out of memory"}]
    (tmp_path / "ranks.json").write_text(json.dumps({"schema": "validation.ranks/1", "rows": rows}))
    found = collect([tmp_path / "ranks.json"], [])
    assert sorted(point.claim for point in found.points) == [
        *("all-reduces", "all-reduces of a step", "bytes of a rank", "bytes of a rank"),
        *("engine, several cards", "engine, several cards, silent"),
    ]
    assert {point.claim for point in found.points} <= {claim.name for claim in CLAIMS}  # or nothing judges them
    assert found.rows == 3
    assert sorted(each.reason for each in found.uncovered) == [
        "kvsim predicts those of a step's graph",
        "no claim is made of its time",
        "the measurement failed",
    ]
    taken = next(point for point in found.points if point.claim == "all-reduces of a step")
    assert taken.measured == step["seconds_per_step"][0] - silent["seconds_per_step"][0] > 0


def test_the_tables_of_ranks_have_every_row() -> None:
    steps = [row for row in of(kind="step") if row["way"] != WAYS[2]]
    text = ranks_tables.block("steps")
    assert sum(line.startswith("| llama") for line in text.splitlines()) == len(steps)
    assert all(f"{1e3 * row['seconds_per_step'][0]:.2f}" in text for row in steps)
    for row in of(kind="step", way=WAYS[2]):
        assert f"| {1e3 * row['seconds_per_step'][0]:.2f}; {1e3 * sum(links.parts(row).values()):.2f} |" in text
    assert len(ranks_tables.block("all-reduces").splitlines()) == len(of(kind="all_reduce", way="graph")) + 4 * len(
        {(row["ranks"], row["device"]) for row in links.load()}
    )
    with pytest.raises(ValueError, match="table of ranks 'x': allowed are all-reduces, steps"):
        ranks_tables.block("x")
