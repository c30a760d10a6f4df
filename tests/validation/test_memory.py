"""The scales themselves, and a quick run of them: what they find must be what kvsim predicts, and what is hidden."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toy_room import move_in

from kvruntime.bench.harness.weigh import weigh
from kvruntime.methods import LAYERS, make_layer
from kvruntime.methods.room import Claims
from kvruntime.methods.rows import GROW_TOKENS
from kvsim.install import install_hint
from kvsim.layout import LayerShape
from kvsim.methods import Evict, Full, Kivi, kivi_seed
from validation import cli
from validation.claims import compare, predict
from validation.claims.memory import fits, layer_tasks
from validation.claims.peak import peak_tasks
from validation.claims.subjects import MODELS, claims, describe_method, grid_for, lengths, rebuild_method
from validation.claims.tasks import judged as judge
from validation.recorded import read
from validation.scales.allocator import Allocator
from validation.scales.live import LiveBytes

CPU = torch.device("cpu")
CLAIMS = claims()
GRID = (*CLAIMS.core, *CLAIMS.variants)


def test_the_scale_finds_what_is_hidden_and_counts_it_once():
    class Holder:
        __slots__ = ("kept", "view")

    holder, hidden = Holder(), torch.zeros(100)
    holder.kept = [{"a": (lambda: hidden)}]
    holder.view = torch.zeros(50, dtype=torch.float16)[3:4]
    assert weigh([holder, holder.view[:0], hidden[:2], (part for part in [hidden])]) == 400 + 100


def test_the_scale_does_not_weigh_a_models_weights():
    assert weigh([torch.nn.Linear(8, 8), torch.zeros(4)]) == 16


def test_live_bytes_are_those_of_storages_made_inside_and_still_held():
    outside = torch.zeros(1000)
    with LiveBytes() as live:
        view = outside[:10]
        kept = torch.ones(256)
        assert (live.now, live.peak) == (1024, 1024)
        temporary = kept + kept
        slice_of_it = temporary[:1]
        del temporary
        assert live.now == 2048  # a view keeps the whole storage
        del slice_of_it
        assert (live.now, live.peak) == (1024, 2048)
        live.restart()
        (kept * 2) + 1
        assert live.peak == 1024 * 3
        del kept, view
        assert live.now == 0


def test_the_allocator_sees_a_copy_that_a_layer_hides():
    layer = make_layer(Full(), LayerShape(2, 16, 16), 1, 64, CPU)
    key = torch.randn(1, 2, 64, 16)
    with Allocator(CPU) as held:
        layer.append(key, key)
        assert held.now == {"live": 0}
        layer.hidden = key.half()
        assert held.now == {"live": key.numel() * 2}
    assert weigh(layer) == layer.nbytes + key.numel() * 2


@pytest.mark.parametrize("method", GRID, ids=lambda method: f"{method.name}-{getattr(method, 'dtype', '')}")
def test_a_method_is_rebuilt_from_its_description(method):
    assert rebuild_method(json.loads(json.dumps(describe_method(method)))) == method


def test_the_grid_covers_what_it_claims():
    assert len(set(GRID)) == len(GRID)
    assert {method.nbits for method in GRID if isinstance(method, Kivi)} >= {2, 4, 8}
    assert all(fits(name, method) for name in MODELS for method in CLAIMS.core)
    assert all(fits(MODELS[0], method) for method in GRID)
    assert {1, 127, 128, 129, 191, 192, 193, 255, 256, 257, 1024, 2048} <= set(lengths(Kivi(2)))
    assert {19, 20, 21} <= set(lengths(Kivi(2, group_size=16, residual_length=16, sink_length=4)))
    assert {31, 32, 33, 63} <= set(lengths(kivi_seed()))
    assert predict.GROW_TOKENS == GROW_TOKENS


def test_a_room_brings_its_own_claims(monkeypatch):
    """What a room says is weighed, and no more of it: its other examples are not."""
    toy = move_in(monkeypatch)
    monkeypatch.setitem(LAYERS, type(toy), LAYERS[type(toy)]._replace(claims=Claims(core=(toy,), other=(toy,))))
    assert toy in claims().core
    assert toy not in {*claims().judged, *claims().few, *claims().one}
    grid = grid_for("cpu", quick=False)
    assert [run[0] for run in grid.generated if toy in run[3]] == ["gpt2-medium", "smollm2-135m"]
    assert toy not in grid_for("cpu", quick=True).grid


def test_every_room_is_weighed_and_no_method_is_taken_for_another(monkeypatch):
    toy = move_in(monkeypatch)
    assert toy in claims().judged
    assert toy not in claims().variants
    for quick, device in ((True, "cpu"), (False, "cpu"), (False, "cuda")):
        grid = grid_for(device, quick=quick)
        assert toy in {*grid.grid} & {*grid.core} & {*grid.step_methods}
        assert all(any(toy in run[3] for run in grid.generated if run[0] == name) for name in ("gpt2",))
    assert rebuild_method(describe_method(toy)) == toy
    grid = grid_for("cpu", quick=True, models=("gpt2",))
    (task,) = (task for task in layer_tasks(grid, CPU) if "toy" in task.name and "grown" in task.name)
    assert all(set(compare.deviations(row)) == {0} for row in judge(task))
    assert not [task for task in peak_tasks(grid, CPU) if "toy" in task.name]
    row = {"kind": "peak", "phase": "attend", "model": "gpt2", "method": describe_method(toy), "device": "cpu"}
    for phase in ("attend", "append", "grow", "prefill", "decode"):
        more = {"batch_size": 1, "num_tokens": 9, "prompt_tokens": 4, "dtype": "float32", "max_seq_len": None}
        with pytest.raises(ValueError, match="no peak is predicted for the method toy: allowed are those of type Full"):
            predict.predict(row | more | {"phase": phase, "num_layers": 1})


def test_a_wrapper_is_rebuilt_with_what_it_holds():
    method = Evict(inner=Kivi(2))
    assert rebuild_method(json.loads(json.dumps(describe_method(method)))) == method


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("validation") / "quick.json"
    assert cli.run(["memory", "--quick", "--device", "cpu", "--model", "gpt2", "--out", str(out)]) == 0
    return out


def test_a_quick_run_weighs_exactly_what_is_predicted(quick):
    rows = [row for row in read(quick) if row["kind"] in ("memory", "held")]
    assert {row["way"] for row in rows} == {"layers", "generate"}
    assert [(row["task"], row["kind"]) for row in rows if row["measured"] != row["predicted"]] == []
    assert all(set(compare.deviations(row)) == {0} for row in rows if row["kind"] == "memory")
    stepped = [row for row in rows if row.get("every_step") and row["way"] == "layers"]
    assert all(len(compare.deviations(row)) == 100 for row in stepped)
    assert len(stepped) == len(CLAIMS.few)


def test_a_quick_run_predicts_the_peaks_within_two_per_cent(quick):
    peaks = [row for row in read(quick) if row["kind"] == "peak"]
    assert {row["phase"] for row in peaks} == {"append", "attend", "grow", "prefill", "decode"}
    assert all(abs(row["error"]) < 0.02 for row in peaks), [(row["task"], row["phase"], row["error"]) for row in peaks]


def test_the_peaks_of_a_model_that_shares_heads(tmp_path):
    """Other counts, and a prompt long enough that the cache's own work is the worst moment."""
    from validation.claims.generated import generate_tasks
    from validation.claims.subjects import Grid
    from validation.claims.tasks import judged

    config = {
        "model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 300,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 2048,
    }  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    runs = ((str(path), 700, 70, (Full("float32"), Kivi(2), Kivi(8, sink_length=4, residual_length=64))),)
    grid = Grid((str(path),), 1, (), (), 1, 1, (), runs, (), ())
    for task in generate_tasks(grid, CPU):
        rows = judged(task)
        assert all(set(compare.deviations(row)) == {0} for row in rows if row["kind"] == "memory")
        found = {(row["task"].rpartition("/")[2], row.get("phase")): round(row["error"], 4) for row in rows}
        assert {name: error for name, error in found.items() if abs(error) >= 0.02} == {}


def test_resuming_leaves_out_what_is_there(quick, capsys):
    before = quick.read_text()
    assert (
        cli.run(["memory", "--quick", "--device", "cpu", "--model", "gpt2", "--out", str(quick), "--resume", "--json"])
        == 0
    )
    assert quick.read_text() == before
    assert json.loads(capsys.readouterr().out)["rows"] == read(quick)


def test_two_processes_find_the_same(quick, tmp_path):
    from validation.claims.workers import memory_tasks, run_tasks

    tasks = [task for task in memory_tasks("cpu", True, ("gpt2",)) if task.name.startswith("layers gpt2 kivi")][:4]
    found = {task.name: [row["measured"] for row in rows] for task, rows in run_tasks(tasks, 2, "cpu", True, ("gpt2",))}
    assert len(found) == 4
    for name, measured in found.items():
        assert measured == [row["measured"] for row in read(quick) if row["task"] == name]


def test_help_needs_no_torch():
    code = "import sys; from validation import cli; c = cli.run(['--help']); sys.exit(c or ('torch' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "memory" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["memory", "--model", "gpt3"], "gpt2"),
        (["memory", "--device", "tpu"], "allowed here are"),
        (["memory", "--device", "cuda:99"], "allowed here are"),
        (["memory", "--out", "/proc/none/x.json"], "cannot write"),
        (["memory", "--jobs", "0"], "0"),
        (["speed", "--model", "gpt3"], "gpt2"),
        (["speed", "--batch", "x"], "batch 'x'"),
        (["quality", "--text", "/none"], "cannot read"),
        (["report", "/none.json"], "cannot read"),
        (["nothing"], "nothing"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(words, said, capsys):
    assert cli.run([*words, *(["--quick"] if words[0] == "memory" else [])]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert err.startswith("validation: error: ")


def test_no_command_is_the_help(capsys):
    assert cli.run([]) == 0
    out = capsys.readouterr()
    assert out.out.startswith("Usage: validation")
    assert not out.err


def test_a_missing_package_is_one_line(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert cli.run(["speed"]) == 2
    err = capsys.readouterr().err
    assert "torch" in err
    assert install_hint("validation") in err
    assert err.count("\n") == 1
