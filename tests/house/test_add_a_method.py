"""A method is added by one file and one row in kvsim, one room and one row in kvruntime, and nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the runtime extra (torch) is not installed")
pytest.importorskip("transformers", reason="the runtime extra (transformers) is not installed")

from hf_models import prompt, tiny  # noqa: E402
from int6 import Int6  # noqa: E402
from int6_room import ROOM  # noqa: E402
from runtime_tiny import tiny_directory  # noqa: E402

import kvsim.commands.flags  # noqa: E402  # its help lists the methods as they are before the test's
from kvruntime import make_cache  # noqa: E402
from kvruntime.bench.harness.weigh import weigh  # noqa: E402
from kvruntime.hf.cache import argument  # noqa: E402
from kvruntime.hf.models import layer_shapes  # noqa: E402
from kvruntime.methods import LAYERS  # noqa: E402
from kvsim.cli import run as kvsim  # noqa: E402
from kvsim.layout import nbytes, shared_buffers  # noqa: E402
from kvsim.methods import METHODS, Evict, Kivi  # noqa: E402
from validation.claims.compare import deviations  # noqa: E402
from validation.claims.memory import layer_tasks  # noqa: E402
from validation.claims.subjects import grid_for  # noqa: E402
from validation.claims.tasks import judged  # noqa: E402

TOKEN = 32 * 8 * 2 * (128 * 6 // 8 + 2)
"""Bytes of a token of Llama-3-8B: 32 layers, 8 kv heads of 128, keys and values."""


@pytest.fixture(autouse=True)
def added(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two rows."""
    monkeypatch.setitem(METHODS, "int6", Int6)
    monkeypatch.setitem(LAYERS, Int6, ROOM)


def answer(capsys: pytest.CaptureFixture[str], command: str) -> str:
    assert kvsim(command.split()) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_kvsim_takes_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = "--model llama-3-8b --ctx 4k"
    row = json.loads(answer(capsys, f"estimate {model} --method int6 --json"))["rows"][0]
    assert row["nbytes"] == 4096 * TOKEN + 128
    explained = json.loads(answer(capsys, f"explain {model} --method int6 --json"))
    assert sum(formula["nbytes"] for formula in explained["rows"][0]["formulas"]) == 4096 * TOKEN + 128
    assert "int6" in answer(capsys, "compare --model llama-3-8b --ctx 1k,4k --method int6")
    assert "int6" in answer(capsys, f"estimate {model} --method int6 --engine kvruntime --gpu h100-sxm")
    assert "paged-16(int6)" in answer(capsys, f"estimate {model} --method paged:inner=int6")
    out = tmp_path / "rows.csv"
    answer(capsys, f"sweep {model} --method int6 --batch 1:4 --gpu h100-sxm --out {out}")
    assert f",{4096 * TOKEN + 128}," in out.read_text(encoding="utf-8")
    assert "int6" in answer(capsys, "plan --model llama-3-8b --gpu h100-sxm --users 20 --method int6 --engine ideal")
    assert kvsim(f"estimate {model} --method int6 --engine vllm".split()) == 2
    assert "vllm does not store int6" in capsys.readouterr().err


def test_a_cache_of_it_runs_under_generate() -> None:
    """Ragged rows, one token at a time and several; near the uncompressed logits, bytes as predicted, all weighed."""
    model, inputs = tiny("Llama"), prompt(3, 40, (0, 7, 33))
    cache = make_cache(model, "int6")
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "output_logits": True}
    settings["return_dict_in_generate"] = True
    want = model.generate(**inputs, **settings)
    have = model.generate(**inputs, **argument(cache), **settings)
    assert max((a - b).abs().max() for a, b in zip(want.logits[:2], have.logits[:2], strict=True)) < 0.3
    shapes = layer_shapes(model)
    size = sum(nbytes(Int6().buffers(shape, 3, cache.num_provided)) for shape in shapes)
    size += nbytes(shared_buffers(Int6(), shapes))
    assert weigh(cache) == cache.nbytes == size
    more = prompt(3, 5)
    with torch.no_grad():
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, 11 + 5, dtype=torch.int64)], 1)
        model(more["input_ids"], attention_mask=mask, **argument(cache))
    assert cache.get_seq_length() == 40 + 11 + 5
    assert "kernel=PyTorch" in repr(cache)


def test_what_cannot_serve_it_says_so() -> None:
    with pytest.raises(ValueError, match="int6 has no step that a compiled cache could run"):
        make_cache(tiny("Llama"), "int6", compiled=True, max_seq_len=64)
    with pytest.raises(ValueError, match="int6 cannot forget its oldest tokens"):
        make_cache(tiny("Llama"), Evict(inner=Int6()))


def test_selfcheck_exercises_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvruntime import selfcheck

    monkeypatch.setattr(selfcheck, "LAYERS", {Int6: ROOM})
    said: list[str] = []
    assert selfcheck.selfcheck("cpu", said.append), said
    assert sum("int6" in line for line in said) == 3


def test_bench_measures_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from kvruntime.cli import run

    out = tmp_path / "rows.json"
    size = "--ctx 48 --batch 1 --prompt-tokens 16 --decode-tokens 2 --warmup 0 --repeats 1"
    arguments = f"bench --model {tiny_directory(tmp_path)} --method int6 --only memory --only speed {size}"
    assert run([*arguments.split(), "--out", str(out)]) == 0, capsys.readouterr().err
    rows = [row for row in json.loads(out.read_text(encoding="utf-8"))["rows"] if row.get("method") == "int6"]
    assert {row["kind"] for row in rows} == {"memory", "speed"}
    assert all(row["nbytes"] == row["predicted_nbytes"] for row in rows if row["kind"] == "memory")


def test_validation_memory_weighs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At every length where something changes, after every token, under ``generate()``: as predicted, to the byte."""
    from validation.cli import run

    monkeypatch.delitem(LAYERS, Kivi)  # its rows take most of the time
    out = tmp_path / "rows.json"
    arguments = f"memory --quick --device cpu --model {tiny_directory(tmp_path)} --out {out}"
    assert run(arguments.split()) == 0, capsys.readouterr().err
    rows = [row for row in json.loads(out.read_text(encoding="utf-8"))["rows"] if row["method"]["name"] == "int6"]
    memory = [row for row in rows if row["kind"] == "memory"]
    assert [(row["way"], row.get("every_step", False)) for row in memory] == [
        *(("layers", False) for _ in ("exactly", "grown")),
        ("layers", True),
        ("generate", True),
    ]
    assert all(row["measured"] == row["predicted"] for row in memory)
    assert all(set(deviations(row)) == {0} for row in memory)
    assert not [row for row in rows if row["kind"] == "peak"]  # the room says no sizes of what is beside the cache


def test_validation_counts_what_layers_share_once(tmp_path: Path) -> None:
    grid = replace(grid_for("cpu", quick=True, models=(str(tiny_directory(tmp_path)),)), fill_layers=None)
    tasks = [task for task in layer_tasks(grid, torch.device("cpu")) if " int6 " in task.name]
    rows = [row for task in tasks for row in judged(task)]
    assert {row["num_layers"] for row in rows} == {1, 2}
    assert all(set(deviations(row)) == {0} for row in rows)
