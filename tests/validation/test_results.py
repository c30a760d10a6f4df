"""Recorded rows against today's predictions: a change of layout breaks these until it is measured again."""

from __future__ import annotations

import json
from base64 import b64encode
from typing import Any

import pytest

from kvsim.methods import Full, Kivi
from kvsim.output.tables import compact
from validation import cli
from validation.claims import compare
from validation.claims.predict import measured_trace, predict, predicted_trace
from validation.claims.subjects import describe_method, rebuild_method
from validation.recorded import FOLDER, Results, read, read_all, slug

RECORDED = [
    pytest.param(row, id=f"{path.stem}-{index}")
    for path in sorted(FOLDER.glob("*.json"))
    for index, row in enumerate(read(path))
]

FIELDS = {"kind", "model", "method", "batch_size", "num_tokens", "predicted", "measured", "error"}
CIRCUMSTANCES = {"device_name", "driver", "versions", "commit", "command", "date"}


def test_something_is_recorded():
    assert {row["kind"] for row in read(FOLDER / "cpu.json")} >= {"memory", "held", "peak"}
    assert len(read_all()) >= 100


@pytest.mark.parametrize("row", RECORDED)
def test_a_recorded_row_holds_today(row):
    assert row.keys() >= FIELDS | CIRCUMSTANCES
    method = rebuild_method(row["method"])
    assert method.name == row["method"]["name"]
    predicted = predict(row)
    assert predicted == row["predicted"]
    if predicted is not None:
        assert row["error"] == pytest.approx(row["measured"] / predicted - 1, abs=1e-12)
    if row["kind"] == "memory":
        assert row["measured"] == predicted
        assert measured_trace(row) == predicted_trace(row)
    if row.get("counter") == "requested" and row["kind"] == "held":
        assert row["measured"] == predicted


def example(**changes: Any) -> dict[str, Any]:
    row = {
        "task": "example", "kind": "memory", "way": "layers", "model": "gpt2", "method": describe_method(Kivi(2)),
        "num_layers": 12, "batch_size": 1, "dtype": "float32", "device": "cpu", "provided": "exactly",
        "max_seq_len": 2048, "num_tokens": 2048, "trace": [[1, 37_056], [2048, 13_271_136]],
    }  # fmt: skip
    row |= changes
    row["predicted"] = predict(row)
    return {"measured": row["predicted"], "error": 0.0, **row}


def test_a_prediction_is_the_layouts_figure():
    """12 layers of 12 x 64 channels, 2048 tokens: 30 records of 64 at 3 bits a code, 128 exact tokens, 8 bytes more."""
    records = 30 * 64 * 2 * 12 * 64 * 3 // 8
    exact = 128 * 2 * 12 * 64 * 2
    assert example()["predicted"] == 12 * (records + exact + 8)
    assert example(rounding=512, kind="held")["predicted"] == 12 * (records + exact + 512)
    assert example(max_seq_len=None, num_tokens=257)["predicted"] == example(max_seq_len=512)["predicted"]


def test_a_changed_layout_is_noticed():
    good = example(trace=[[2048, example()["measured"]]])
    assert compare.stale([good]) == []
    moved = {**good, "method": describe_method(Kivi(2, residual_length=256))}
    assert "measure it again" in compare.stale([moved])[0]
    hidden = {**good, "trace": [[2048, good["measured"] + 8]]}
    assert "+8 B" in compare.stale([hidden])[0]


def test_a_trace_of_every_step_finds_one_wrong_step():
    row = example(max_seq_len=None, provided="grown", num_tokens=300, every_step=True, num_layers=1)
    small, large = (predict({**row, "num_tokens": count}) for count in (1, 300))
    row |= {"trace": [[1, small], [257, large]]}
    assert len(compare.deviations(row)) == 300
    assert set(compare.deviations(row)) == {0}
    row |= {"trace": [[1, small], [256, large]]}
    assert [off for off in compare.deviations(row) if off] == [large - small]


def test_rows_are_merged_by_key(tmp_path):
    path = tmp_path / "here" / "cpu.json"
    first = Results(path, {"commit": "a"})
    first.add([example(), example(kind="held"), example(task="other")])
    second = Results(path, {"commit": "b"})
    second.add([example(measured=1), example(task="new")])
    rows = read(path)
    assert [(row["task"], row["kind"], row["commit"]) for row in rows] == [
        ("example", "memory", "b"), ("example", "held", "a"), ("other", "memory", "a"), ("new", "memory", "b")
    ]  # fmt: skip
    assert rows[0]["measured"] == 1
    assert second.holds("new")
    assert not second.holds("newer")
    assert [file.name for file in path.parent.iterdir()] == ["cpu.json"]


HERE = {"device_name": "card", "driver": None, "versions": {"torch": "2"}, "code": "k", "commit": "c"}


@pytest.mark.parametrize("name", ["device_name", "driver", "versions", "code"])
def test_resume_takes_rows_of_this_machine_and_code_only(tmp_path, name):
    path = tmp_path / "cpu.json"
    Results(path, HERE).add([example()])
    assert Results(path, HERE | {"commit": "another with the same files"}).holds("example")
    assert not Results(path, HERE | {name: {"torch": "3"} if name == "versions" else "other"}).holds("example")
    assert not Results(path, HERE).holds("example", {"num_tokens": 7})
    assert Results(path, HERE).holds("example", {"num_tokens": 2048, "method": describe_method(Kivi(2))})
    assert not Results(path, HERE).holds("example", {"method": describe_method(Kivi(2, dtype="float32"))})


def test_quick_rows_do_not_stand_for_a_full_run(tmp_path):
    """The names are the same, the layers and lengths are not."""
    from validation.claims.workers import memory_tasks

    quick, full = ({task.name: task.about for task in memory_tasks("cpu", quick, ("gpt2",))} for quick in (True, False))
    both = [name for name in quick if name in full and name.startswith("layers")]
    assert both
    assert all(quick[name] != full[name] for name in both)


def test_a_models_file_that_changed_is_measured_again(tmp_path):
    from validation.claims.workers import memory_tasks

    path, found = tmp_path / "config.json", []
    for layers in (2, 3):
        config = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": layers, "num_attention_heads": 1}
        path.write_text(json.dumps(config | {"intermediate_size": 8, "vocab_size": 9, "max_position_embeddings": 4096}))
        found.append({task.name: task.about["model_sha256"] for task in memory_tasks("cpu", True, (str(path),))})
    assert found[0].keys() == found[1].keys()
    assert not set(found[0].values()) & set(found[1].values())


def test_a_figure_that_is_no_number_is_not_recorded():
    from validation.claims.tasks import Task, judged

    row = {"kind": "quality", "measured": float("nan")}
    with pytest.raises(ValueError, match="quality tiny: measured is nan: the weights"):
        judged(Task("quality tiny", 1, "quality", lambda: [row]))


def test_two_runs_into_one_file_are_refused(tmp_path):
    first, second = (Results(tmp_path / "cpu.json", {"commit": "a"}) for _ in range(2))
    first.add([example()])
    with pytest.raises(ValueError, match="changed by another run meanwhile"):
        second.add([example(task="other")])


@pytest.mark.parametrize("content", ["", "{}", '{"schema": "other", "rows": []}', "[1", '{"schema": "validation/1"}'])
def test_a_foreign_file_is_left_alone(tmp_path, content, capsys):
    path = tmp_path / "x.json"
    path.write_text(content)
    assert cli.run(["memory", "--quick", "--device", "cpu", "--out", str(path)]) == 2
    assert path.read_text() == content
    assert capsys.readouterr().err.count("\n") == 1


def test_a_device_has_one_file_name():
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_the_report_is_self_contained(tmp_path, capsys):
    facts = {
        "device_name": "<test>",
        "driver": None,
        "versions": {"torch": "2"},
        "commit": "c" * 40,
        "command": "",
        "date": "",
    }
    quality = {
        "kind": "quality",
        "weights": "real",
        "text": "t",
        "text_sha256": "0",
        "window": 8,
        "chunk": 1,
        "unit": "perplexity",
    }
    quality |= {"predicted": None, "error": None, "batch_size": 1}
    speed = {"kind": "speed", "weights": "random", "unit": "tokens/s", "phase": "decode", "low": 1.0, "high": 3.0}
    rows = [
        example(trace=[[2048, example()["measured"]]]),
        example(kind="peak", phase="append", counter="live", rounding=1, measured=10),
        example(**speed, measured=2.0) | {"predicted": None, "error": None},
        example(**quality, measured=20.0, method=describe_method(Full())),
        example(**quality, measured=21.0, task="2"),
    ]
    path = tmp_path / "rows.json"
    Results(path, facts).add(rows)
    assert cli.run(["report", str(path), "--out", str(tmp_path / "out")]) == 1  # a peak of 10 B is none
    names = {file.name for file in (tmp_path / "out").iterdir()}
    pictures = {f"{name}.png" for name in ("agreement", "lengths", "peaks", "speed", "quality")}
    assert {name for name in names if not name.startswith("parity-")} == {"report.md", "report.html", *pictures}
    page, text = ((tmp_path / "out" / name).read_text() for name in ("report.html", "report.md"))
    assert "&lt;test&gt;" in page
    assert "<test>" not in page
    assert "http" not in page
    for name in pictures:
        assert b64encode((tmp_path / "out" / name).read_bytes()).decode() in page
        assert f"]({name})" in text
    assert "+5 %" in text
    assert "| 0 |" in text
    assert "agree with today's predictions" in text


def test_tables_align_numbers_to_the_right():
    assert compact(["a", "b"], [["x", "1"], ["y", "+2 %"]]).splitlines()[1] == "| --- | ---: |"


def test_rows_survive_json():
    row = example()
    assert json.loads(json.dumps(row)) == row
