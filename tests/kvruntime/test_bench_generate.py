"""``bench generate`` without a GPU: a tiny model through the same tasks and tables."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from runtime_tiny import tiny_directory  # noqa: E402

from kvruntime.bench.engine.suite import Models  # noqa: E402
from kvruntime.bench.generate import report, suite  # noqa: E402
from kvruntime.bench.harness import session  # noqa: E402
from kvruntime.bench.harness.results import Results  # noqa: E402
from kvruntime.cli import run as command  # noqa: E402
from kvsim.methods import Kivi  # noqa: E402


def test_a_sitting_on_a_tiny_model(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(suite, "LONG", 10)
    monkeypatch.setattr(suite, "TURNS", 2)
    folder = tiny_directory(tmp_path / "tiny")
    subject = suite.Subject(str(folder), "float32", ((1, 24), (2, 16)), conversation=20)
    parts = suite.contenders((Kivi(group_size=32, residual_length=32, dtype="float32"),), False, False)
    results = Results(tmp_path / "g.json", {"device": {"name": "here"}})
    tasks = suite.subject_tasks(Models("cpu"), subject, parts, suite.Clock("cpu"), 1)
    assert session.carry_out(tasks, results, report.line, report.tables) == 0
    assert not [row for row in results.rows if "failed" in row]
    steps = [row for row in results.rows if row["kind"] == "generate"]
    assert [(row["method"], row["batch_size"]) for row in steps] == [
        (name, batch) for batch in (1, 2) for name in (*report.STOCK, "kivi-2bit-g32-r32")
    ]
    assert all(row["first_token_seconds"][0] > 0 for row in steps)
    ours = [row for row in steps if row["method"] not in report.STOCK]
    assert [row["kernel"] for row in steps if "kernel" in row] == ["PyTorch reference"] * len(ours)
    talks = [row for row in results.rows if row["kind"] == "conversation"]
    assert [row["method"] for row in talks] == [report.STOCK[0], "kivi-2bit-g32-r32"]
    shown = capsys.readouterr().out
    assert "of best stock" in shown
    assert "2 turns on one cache" in shown


def test_ratios_are_to_the_faster_of_the_stock_caches() -> None:
    same = {
        "kind": "generate",
        "model": "m",
        "weights": "w",
        "dtype": "d",
        "batch_size": 1,
        "num_tokens": 8,
        "runs": "",
    }
    times = dict(zip(report.STOCK, (4e-3, 2e-3), strict=True))
    rows = [{**same, "method": name, "seconds_per_step": [time] * 3} for name, time in times.items()]
    ours = {**same, "method": "kivi-2bit-g64-r64", "seconds_per_step": [1e-3] * 3, "first_call_seconds": 1.0}
    assert report.best_stock(ours, rows) is rows[1]
    assert report.line(ours, rows).endswith("1.00 ms a step, first call 1.0 s, 2.00x")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "gpt3"], "unknown model 'gpt3'"),
        (["--repeats", "0"], "repeats 0"),
        (["--device", "cpu"], "needs a CUDA"),
    ],
)
def test_refused_in_one_line(arguments, words, capsys) -> None:
    assert command(["bench", "generate", *arguments]) == 2
    assert words in capsys.readouterr().err
