"""``kvruntime compare``: frontier, recommendation and ablation come from rows; the command and its picture."""

import json
from math import log

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from runtime_tiny import tiny_directory  # noqa: E402

from kvruntime.bench.quality import comparison  # noqa: E402
from kvruntime.bench.quality.comparison import (  # noqa: E402
    ABLATION,
    GRID,
    ablation_methods,
    effects,
    entries,
    frontier,
    recommended,
)
from kvruntime.bench.quality.pictures import quality_panels  # noqa: E402
from kvruntime.cli import run  # noqa: E402


def row(method, bits, *nll, kind="windows", **more):
    """Windows of text with these mean losses."""
    return {
        "kind": kind, "method": method, "model": "m", "weights": "w", "dtype": "float16", "text": "t", "window": 64,
        "num_windows": len(nll), "chunk": 1, "bits": bits, "held_bits": bits + 1, "elements": 1000, "kl": 0.1,
        "window_nll": list(nll), **more,
    }  # fmt: skip


ROWS = [
    row("fp16", 16, 3.0, 3.1, 2.9),
    row("a", 2, 3.05, 3.15, 2.95),
    row("b", 3, 3.01, 3.11, 2.91),
    row("worse than b", 4, 3.02, 3.12, 2.92),
    row("wide", 1, 3.3, 2.9, 2.9),
    row("bounded", 0, 3.0005, 3.1005, 2.9005),
]
SPEEDS = [
    {"kind": "speed", "method": name, "tokens_per_second": [rate, rate, rate]}
    for name, rate in (("fp16", 100.0), ("b", 150.0))
]


def test_entries_are_bytes_changes_and_speeds():
    found = {entry.method: entry for entry in entries(ROWS, SPEEDS)}
    assert found["fp16"].token_nbytes == 2000
    assert found["a"].token_nbytes == 250
    assert found["bounded"].token_nbytes == 125  # held at the window: nothing further is kept
    assert found["b"].change == pytest.approx(0.01005, abs=1e-5)
    assert (found["b"].low, found["b"].high) == (pytest.approx(0.01005, abs=1e-5),) * 2
    assert found["b"].speed_ratio == 1.5
    assert found["a"].speed is None
    assert found["wide"].low < 0 < found["wide"].high


def test_the_frontier_leaves_out_what_another_beats():
    best = [entry.method for entry in frontier(entries(ROWS))]
    assert "worse than b" not in best
    assert "a" not in best  # as many bytes as `wide` or more, and a larger change than `bounded`
    assert {"bounded", "fp16"} <= set(best)


def test_the_recommendation_follows_the_rows():
    found = entries(ROWS[:-1])
    assert recommended(found, 0.001) is None
    assert recommended(found, 0.011).method == "b"
    assert recommended(found, 0.06).method == "a"  # `wide` has fewer bytes, but its interval ends beyond
    better = [*ROWS[:2], row("b", 1.5, 3.0001, 3.1001, 2.9001)]
    assert recommended(entries(better), 0.001).method == "b"
    said = comparison.recommendation(entries(ROWS[:-1], SPEEDS))
    assert "0.5%: none of these; the uncompressed cache" in said
    assert "3.0%: b (+1.01%, 5.33x fewer bytes than fp16, 1.50x its speed)" in said


def test_the_ablation_means_are_over_all_other_options():
    methods = ablation_methods()
    assert len(methods) == 16
    assert len({method.name for method in methods}) == 16
    base = row("fp16", 16, 2.0, 2.0, kind=ABLATION)
    loss = {method.name: 0.3 * (method.nbits == 2) + 0.1 * (method.sink_length == 0) for method in methods}
    rows = [base, *(row(name, 3, 2 + off, 2 + off, kind=ABLATION) for name, off in loss.items())]
    found = {(option, value): mean for option, value, _, mean in effects(rows)}
    assert found.keys() == {(option, value) for option, values in GRID.items() for value in values}
    assert found["nbits", 2] - found["nbits", 4] == pytest.approx(0.3)
    assert found["sink_length", 0] - found["sink_length", 4] == pytest.approx(0.1)
    assert found["group_size", 32] == pytest.approx(found["group_size", 64]) == pytest.approx(0.2)
    assert found["residual_length", 64] > log(1.1)
    assert "mean over all others" in comparison.tables(rows)
    assert effects(rows[:-1]) == []  # a combination is missing: its options' others are not alike
    half = [base, *(each for each in rows[1:] if "-r64" in each["method"])]
    few = {(option, value): mean for option, value, _, mean in effects(half)}
    assert few.keys() == {key for key in found if key[0] != "residual_length"}
    assert few["nbits", 2] - few["nbits", 4] == pytest.approx(0.3)
    assert "ablation: m" in comparison.tables(rows[:-1])
    assert "mean over all others" not in comparison.tables(rows[:-1])


def command(folder, out, *more):
    text = folder / "t.txt"
    text.write_text("abcdefghij klmno pqrs" * 20)
    words = ["compare", "--model", str(folder), "--text", str(text), "--window", "140", "--offline", "--device", "cpu"]
    words += ["--method", "kivi:nbits=2,residual_length=64", "--prompt-tokens", "16", "--decode-tokens", "2"]
    return run([*words, "--chunk", "70", "--repeats", "1", "--out", str(out), *more])


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(comparison, "GRID", {**GRID, "group_size": (64,), "residual_length": (64,)})
    folder, out, picture = tiny_directory(tmp_path), tmp_path / "rows.json", tmp_path / "compare.svg"
    more = ("--ablation", "--ablation-tokens", "280", "--picture", str(picture))
    assert command(folder, out, *more) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    rows = json.loads(out.read_text())["rows"]
    assert [row["kind"] for row in rows] == ["windows"] * 2 + ["speed"] * 2 + [ABLATION] * 5
    assert "kivi-2bit-g32-r64" in shown
    assert "fewest bytes whose interval ends within" in shown
    assert "sink_length" in shown
    drawn = picture.read_text()
    assert drawn.startswith("<?xml")
    assert "Ablation" in drawn or len(drawn) > 20_000
    assert set(quality_panels(rows)) == {"bits", "positions", "comparison", "ablation"}  # those of ``kvruntime plot``
    assert command(folder, out, "--picture", str(tmp_path / "x.pdf"), "--resume") == 2
    assert "x.pdf: allowed are names that end in .png or .svg" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert command(folder, tmp_path / "other.json", "--picture", str(tmp_path / "file" / "x.svg")) == 2
    assert "cannot write" in capsys.readouterr().err
    assert not (tmp_path / "other.json").exists()  # refused before anything is measured

    for of, change in ((0, {"elements": "x"}), (0, {"window_nll": [1.0]}), (2, {"tokens_per_second": []})):
        file = json.loads(out.read_text())
        file["rows"][of + 1].update(change)
        (tmp_path / "damaged.json").write_text(json.dumps(file))
        assert command(folder, tmp_path / "damaged.json", "--resume") == 2
        assert "damaged.json holds a row that no table can show" in capsys.readouterr().err
