"""The sweep: exact against estimate(), resumable, whole, bounded, the same through every executor and file type."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import pytest

np = pytest.importorskip("numpy", reason="numpy is not installed")

from kvsim.analysis import sweep  # noqa: E402
from kvsim.analysis.sweep import Grid, chunks, evaluate  # noqa: E402
from kvsim.cli import run  # noqa: E402
from kvsim.engines import EngineChoice  # noqa: E402
from kvsim.hardware import find_hardware  # noqa: E402
from kvsim.install import install_hint  # noqa: E402
from kvsim.latency.steps import decode_step  # noqa: E402
from kvsim.memory.capacity import room  # noqa: E402
from kvsim.memory.estimate import estimate  # noqa: E402
from kvsim.methods import METHODS, make_method  # noqa: E402
from kvsim.models.load import load_model  # noqa: E402
from kvsim.output import sweep_file  # noqa: E402
from kvsim.specs import parse_axis  # noqa: E402

MODELS = ("gpt2", "llama-3-8b", "qwen3-next-80b-a3b-instruct")


def make(**axes) -> Grid:
    given = {
        "models": tuple(load_model(name) for name in MODELS),
        "methods": tuple(make_method(name) for name in ("fp16", "kivi")),
        "contexts": (1, 31, 128, 129, 500, 4096),
        "batches": (1, 2, 7),
        "cards": (find_hardware("h100-sxm"), find_hardware("l4")),
    }
    return Grid(**(given | axes))


def test_a_random_sample_is_exactly_what_estimate_says() -> None:
    rng = random.Random(4)
    axes = {
        "contexts": tuple(sorted(rng.sample(range(1, 200_000), 60))),
        "batches": tuple(sorted(rng.sample(range(1, 300), 9))),
        "methods": tuple(make_method(name) for name in METHODS),
    }
    grid = make(**axes)
    found = list(chunks(grid))
    assert sum(len(chunk.batch) for chunk in found) == grid.num_rows
    assert len(grid.cells) >= 2 * len(MODELS) * 12
    for chunk in found:
        cell = chunk.cell
        for row in rng.sample(range(len(chunk.batch)), 12):
            batch, ctx = int(chunk.batch[row]), int(chunk.ctx[row])
            one = estimate(cell.model, cell.method, batch, ctx)
            assert (chunk.nbytes[row], chunk.read_nbytes[row]) == (one.nbytes, one.read_nbytes)
            assert (chunk.state_nbytes[row], chunk.index_nbytes[row]) == (one.state_nbytes, one.index_nbytes)
            assert chunk.fits[row] == (one.total_nbytes <= room(cell.model, cell.card).cache_nbytes)
            if not cell.timed:
                assert chunk.seconds is None
                continue
            step = decode_step(cell.model, cell.method, cell.card, batch, ctx).seconds
            assert (chunk.seconds[row], chunk.low[row], chunk.high[row]) == pytest.approx(step, rel=1e-12)


def test_rows_are_every_combination_once() -> None:
    grid = make()
    rows = {
        (c.cell.model.name, c.cell.method.name, c.cell.card.id, int(n), int(b))
        for c in chunks(grid)
        for b, n in zip(c.batch, c.ctx, strict=True)
    }
    assert len(rows) == grid.num_rows == 3 * 2 * 2 * 6 * 3


def test_chunks_are_bounded_and_cover_long_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "CHUNK_ROWS", 100)
    for contexts, batches in ((range(1, 1001), range(1, 8)), ((5,), range(1, 1001)), (range(1, 30), range(1, 151))):
        grid = make(models=(load_model("gpt2"),), contexts=contexts, batches=batches, cards=())
        found = [(int(n), int(b)) for c in chunks(grid) for n, b in zip(c.ctx, c.batch, strict=True)]
        assert all(len(chunk.batch) <= 100 for chunk in chunks(grid))
        assert sorted(found) == sorted([(n, b) for n in contexts for b in batches] * 2)


def test_a_huge_grid_costs_nothing_until_it_is_evaluated() -> None:
    grid = make(contexts=range(1, 10**8), batches=range(1, 1025))
    assert grid.num_rows > 10**11
    assert len(evaluate(grid, grid.num_chunks - 1).batch) <= sweep.CHUNK_ROWS


class Counting(Executor):
    """Runs on submit; counts what is under way."""

    def __init__(self) -> None:
        self.submitted = 0

    def submit(self, task, /, *args, **kwargs) -> Future:
        self.submitted += 1
        future: Future = Future()
        future.set_result(task(*args, **kwargs))
        return future


def test_few_chunks_wait_at_a_time() -> None:
    executor = Counting()
    stream = sweep.spread(lambda index: index, range(100), executor, ahead=5)
    first, _ = next(stream)
    assert executor.submitted <= 5
    assert sorted([first, *(index for index, _ in stream)]) == list(range(100))


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_csv_and_json_say_the_same(tmp_path: Path) -> None:
    grid = make(cards=(find_hardware("h100-sxm"), find_hardware("apple-m1")))
    sweep_file.write(grid, tmp_path / "a.csv", {"a": 1})
    sweep_file.write(grid, tmp_path / "a.json", {"a": 1})
    text, document = read_csv(tmp_path / "a.csv"), json.loads((tmp_path / "a.json").read_text())
    assert document["schema"] == "kvsim.sweep/1"
    assert list(document) == ["schema", "inputs", "notes", "not_modelled", "rows"]
    assert document["inputs"] == {"a": 1}
    assert len(text) == len(document["rows"]) == grid.num_rows
    for line, row in zip(text, document["rows"], strict=True):
        assert list(line) == list(row) == list(sweep_file.COLUMNS)
        for name, value in row.items():
            assert line[name] == ("" if value is None else value if isinstance(value, str) else line[name])
            if isinstance(value, bool):
                assert line[name] == str(value).lower()
            elif isinstance(value, int | float):
                assert float(line[name]) == value
        one = estimate(load_model(row["model"]), _method(row["method"]), row["batch"], row["ctx"])
        assert row["nbytes"] == one.nbytes


def _method(name: str):
    return {method.name: method for method in (make_method("fp16"), make_method("kivi"))}[name]


def test_without_cards_columns_are_empty(tmp_path: Path) -> None:
    sweep_file.write(make(cards=()), tmp_path / "a.csv", {})
    for line in read_csv(tmp_path / "a.csv"):
        assert (line["gpu"], line["fits"], line["tpot_seconds"], line["tpot_high"]) == ("", "", "", "")


def test_parquet_holds_the_same(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow (the parquet extra) is not installed")
    grid = make()
    sweep_file.write(grid, tmp_path / "a.csv", {})
    sweep_file.write(grid, tmp_path / "a.parquet", {})
    rows = parquet.read_table(tmp_path / "a.parquet").to_pylist()
    for line, row in zip(read_csv(tmp_path / "a.csv"), rows, strict=True):
        assert (line["model"], int(line["nbytes"])) == (row["model"], row["nbytes"])
        seconds = float(line["tpot_seconds"]) if line["tpot_seconds"] else None
        assert seconds == (row["tpot_seconds"] and pytest.approx(row["tpot_seconds"], abs=1e-9))


def test_parquet_without_pyarrow_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    monkeypatch.setattr("kvsim.commands.sweep.load_model", lambda name: pytest.fail("work before the file's name"))
    assert run(["sweep", "--model", "gpt2", "--out", str(tmp_path / "a.parquet")]) == 2
    assert install_hint("parquet") in capfd.readouterr().err


class Stopped(Exception):
    pass


def interrupt(grid: Grid, out: Path, after: int = 1, inputs: dict | None = None) -> list[Path]:
    """Stops a sweep once ``after`` chunks are there; the parts."""

    def stop(done: int, total: int) -> None:
        if done == after:
            raise Stopped

    with pytest.raises(Stopped):
        sweep_file.write(grid, out, inputs or {}, progress=stop)
    assert not out.exists()
    return sorted(out.with_name(f"{out.name}.parts").glob("*.part"))


def test_an_interrupted_sweep_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "CHUNK_ROWS", 4)
    grid, whole, out = make(), tmp_path / "whole.csv", tmp_path / "a.csv"
    sweep_file.write(grid, whole, {})
    assert len(interrupt(grid, out, 5)) == 5
    seen: list[int] = []
    assert sweep_file.write(grid, out, {}, progress=lambda done, _: seen.append(done)) == 5
    assert seen == list(range(6, grid.num_chunks + 1))
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "whole.csv"]


ANOTHER = {
    "inputs": lambda grid: grid,
    "models": lambda grid: replace(grid, models=(replace(grid.models[0], hidden_size=7), *grid.models[1:])),
    "methods": lambda grid: replace(grid, methods=(make_method("fp16"), make_method("kivi", nbits=3))),
    "cards": lambda grid: replace(grid, cards=(replace(grid.cards[0], bandwidth=1e12), *grid.cards[1:])),
    "ctx": lambda grid: replace(grid, contexts=(1, 31, 128, 129, 500, 4097)),
    "batch": lambda grid: replace(grid, batches=(1, 2, 8)),
    "weights": lambda grid: replace(grid, weight_bits=8),
    "reserve": lambda grid: replace(grid, reserve=0.2),
    "engine": lambda grid: replace(grid, engine=EngineChoice("llama.cpp")),
}


@pytest.mark.parametrize("what", ANOTHER)
def test_parts_of_another_grid_are_refused(what: str, tmp_path: Path) -> None:
    grid, out = make(), tmp_path / "a.csv"
    interrupt(grid, out, inputs={"batch": "1"})
    with pytest.raises(ValueError, match=rf"a.csv.parts holds parts of another sweep \(.*{what}.* changed\)") as caught:
        sweep_file.write(ANOTHER[what](grid), out, {"batch": "2" if what == "inputs" else "1"})
    assert "\n" not in str(caught.value)
    assert sweep_file.write(grid, out, {"batch": "1"}) == 1


@pytest.mark.parametrize(
    ("what", "target", "value"),
    [
        ("kvsim", "kvsim.__version__", "0.0.0"),
        ("kvsim", "kvsim.analysis.sweep._digest_of_files", lambda: "other"),
        ("constants of time", "kvsim.analysis.sweep.constants", lambda: "other"),
        ("chunks", "kvsim.analysis.sweep.CHUNK_ROWS", 4),
    ],
)
def test_parts_of_another_kvsim_are_refused(
    what: str, target: str, value: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(make(), tmp_path / "a.csv")
    monkeypatch.setattr(target, value)
    with pytest.raises(ValueError, match=rf"another sweep \({what} changed\)"):
        sweep_file.write(make(), tmp_path / "a.csv", {})


def test_a_part_is_of_all_of_kvsims_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A layout, a model's parser or the catalogue changes rows as the sweep's own code does."""
    package = tmp_path / "kvsim"
    for name in ("__init__.py", "layout.py", "models/model.py", "catalog/models.json", "analysis/sweep.py"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("1")
    monkeypatch.setattr("kvsim.__file__", str(package / "__init__.py"))
    seen = {sweep._digest_of_files()}
    for name in ("layout.py", "models/model.py", "catalog/models.json"):
        (package / name).write_text("2")
        seen.add(sweep._digest_of_files())
    assert len(seen) == 4


def test_the_summary_is_of_its_schema(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sweep", "--model", "gpt2", "--ctx", "1", "--out", str(tmp_path / "a.csv"), "--quiet", "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["schema"] == "kvsim.sweep-summary/1"
    assert out["not_modelled"]


def test_a_model_file_that_changed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    config, out = tmp_path / "config.json", tmp_path / "a.csv"
    shape = {"model_type": "llama", "hidden_size": 512, "num_attention_heads": 8, "num_hidden_layers": 4}
    shape |= {"vocab_size": 1000, "intermediate_size": 2048}
    command = ["sweep", "--model", str(config), "--method", "fp16", "--method", "fp8", "--out", str(out)]
    config.write_text(json.dumps(shape))
    put = sweep_file.replace_file

    def once(path: Path, *rest, **named) -> None:
        put(path, *rest, **named)
        if path.suffix == ".part":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sweep_file, "replace_file", once)
        assert run(command) == 130
    assert "the same command goes on" in capsys.readouterr().err
    config.write_text(json.dumps(shape | {"num_hidden_layers": 5}))
    assert run(command) == 2
    err = capsys.readouterr().err
    assert "another sweep (models" in err
    assert err.count("\n") == 1
    config.write_text(json.dumps(shape))
    assert run(command) == 0
    assert {line["nbytes"] for line in read_csv(out) if line["ctx"] == "1024" and line["method"] == "fp16"} == {
        str(1024 * 4 * 2 * 512 * 2)
    }


def test_what_rows_are_computed_from_is_the_same_in_every_process() -> None:
    """No order of a set and no address of an object is in it."""
    script = (
        "from kvsim.engines import ENGINES, EngineChoice; from kvsim.hardware import find_hardware\n"
        "from kvsim.models.load import load_model; from kvsim.methods import METHODS, make_method\n"
        "from kvsim.analysis.sweep import Grid, origin\n"
        "methods = tuple(map(make_method, METHODS)); models = tuple(map(load_model, ('gpt2', 'gemma-2-2b')))\n"
        "for name in map(EngineChoice, ENGINES):\n"
        "    print(origin(Grid(models, methods, (1,), cards=(find_hardware('l4'),), engine=name)))"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[2],
            check=True,
            capture_output=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1


BROKEN = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "without its last byte": lambda content: content[:-1],
    "garbage": lambda content: b"\x00garbage" * 100,
    "garbage of the same length": lambda content: bytes(len(content)),
    "one bit": lambda content: content[:-5] + bytes([content[-5] ^ 1]) + content[-4:],
    "another's": lambda content: content + content,
}


@pytest.mark.parametrize("kind", ["csv", "json", "parquet"])
@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_part_is_computed_again(how: str, kind: str, tmp_path: Path) -> None:
    if kind == "parquet":
        pytest.importorskip("pyarrow", reason="pyarrow (the parquet extra) is not installed")
    grid = make(models=(load_model("gpt2"),), contexts=(1, 2), batches=(1,))
    whole, out = tmp_path / f"whole.{kind}", tmp_path / f"a.{kind}"
    sweep_file.write(grid, whole, {})
    parts = interrupt(grid, out, 3)
    parts[1].write_bytes(BROKEN[how](parts[1].read_bytes()))
    assert sweep_file.write(grid, out, {}) == 2
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("kind", ["csv", "json", "parquet"])
def test_a_part_that_breaks_while_the_sweep_runs_is_not_joined(kind: str, tmp_path: Path) -> None:
    if kind == "parquet":
        pytest.importorskip("pyarrow", reason="pyarrow (the parquet extra) is not installed")
    grid, out = make(), tmp_path / f"a.{kind}"

    def hurt(done: int, total: int) -> None:
        if done == total:
            (tmp_path / f"a.{kind}.parts" / "000000002.part").write_bytes(b"")

    with pytest.raises(ValueError, match=r"000000002.part was changed while the sweep ran: the same command"):
        sweep_file.write(grid, out, {}, progress=hurt)
    assert not out.exists()
    assert sweep_file.write(grid, out, {}) == grid.num_chunks - 1


@pytest.mark.parametrize("label", [None, "", "[]", '{"kind": '])
def test_parts_that_do_not_say_what_they_are_of_are_refused(label: str | None, tmp_path: Path) -> None:
    (part,) = interrupt(make(), tmp_path / "a.csv")
    origin = part.with_name("origin.json")
    origin.unlink() if label is None else origin.write_text(label)
    with pytest.raises(ValueError, match="does not say what its parts were computed from"):
        sweep_file.write(make(), tmp_path / "a.csv", {})


def test_parts_are_synced_before_they_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    sync = sweep_file.sync_files
    monkeypatch.setattr(
        sweep_file, "sync_files", lambda paths: (synced.extend(path.name for path in paths), sync(paths))
    )
    grid = make()
    sweep_file.write(grid, tmp_path / "a.csv", {})
    assert synced == [f"{index:09d}.part" for index in range(grid.num_chunks)]


def test_two_sweeps_into_one_file_are_refused(tmp_path: Path, capsys) -> None:
    grid, out = make(models=(load_model("gpt2"),)), tmp_path / "a.csv"
    said: list[str] = []

    def second(done: int, total: int) -> None:
        assert run(["sweep", "--model", "gpt2", "--out", str(out)]) == 2
        said.append(capsys.readouterr().err)

    sweep_file.write(grid, out, {}, progress=second)
    assert set(said) == {f"kvsim: error: another sweep writes {out}: let it end, or give another --out\n"}
    assert os.listdir(tmp_path) == ["a.csv"]
    assert sweep_file.write(grid, out, {}) == 0


def test_the_lock_ends_with_its_process(tmp_path: Path) -> None:
    grid, out = make(), tmp_path / "a.csv"
    script = (
        "import sys, time; sys.path.insert(0, 'tests/kvsim'); from pathlib import Path\n"
        "from test_sweep import make, sweep_file\n"
        "def stop(done, total): print('.', flush=True); time.sleep(600)\n"
        f"sweep_file.write(make(), Path({str(out)!r}), {{}}, progress=stop)"
    )
    child = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parents[2], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b".\n"
    with pytest.raises(ValueError, match="another sweep writes"):
        sweep_file.write(grid, out, {})
    child.kill()
    child.wait()
    child.stdout.close()
    assert sweep_file.write(grid, out, {}) == 1
    assert os.listdir(tmp_path) == ["a.csv"]


def test_a_sweep_that_could_not_begin_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given, **named) -> None:
        raise ValueError("no")

    monkeypatch.setattr(sweep_file, "replace_file", refuse)
    with pytest.raises(ValueError, match="no"):
        sweep_file.write(make(), tmp_path / "a.csv", {})
    assert os.listdir(tmp_path) == []


def test_a_directory_is_refused_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.csv").mkdir()
    monkeypatch.setattr(sweep_file, "spread", None)
    with pytest.raises(ValueError, match=r"cannot write .*a.csv: Is a directory"):
        sweep_file.write(make(), tmp_path / "a.csv", {})


class Dying(Executor):
    """Its worker is killed at the third chunk."""

    def __init__(self, *given) -> None:
        self.submitted = 0

    def submit(self, task, /, *args, **kwargs) -> Future:
        self.submitted += 1
        future: Future = Future()
        if self.submitted < 3:
            future.set_result(task(*args, **kwargs))
        else:
            future.set_exception(BrokenProcessPool("A process in the process pool was terminated abruptly"))
        return future


def test_a_killed_worker_is_one_line_and_the_same_command_goes_on(tmp_path: Path, monkeypatch, capsys) -> None:
    out = tmp_path / "a.csv"
    command = ["sweep", "--model", "gpt2", "--out", str(out), "--quiet"]
    with monkeypatch.context() as patch:
        patch.setattr("kvsim.commands.sweep.ProcessPoolExecutor", Dying)
        assert run([*command, "--workers", "2"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("kvsim: error: a worker was killed (out of memory?): the same command goes on")
    assert err.count("\n") == 1
    assert run(command) == 0
    assert "chunks were there" in capsys.readouterr().out


def test_no_memory_is_one_line(tmp_path: Path, monkeypatch, capsys) -> None:
    def full(*given) -> None:
        raise MemoryError

    monkeypatch.setattr(sweep_file, "evaluate", full)
    assert run(["sweep", "--model", "gpt2", "--out", str(tmp_path / "a.csv")]) == 2
    assert capsys.readouterr().err.startswith("kvsim: error: out of memory: the same command goes on")


def test_a_process_pool_gives_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = make()
    sweep_file.write(grid, tmp_path / "one.csv", {})
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        sweep_file.write(grid, tmp_path / "two.csv", {}, executor=pool)
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()


@pytest.mark.filterwarnings("ignore")
def test_dask_gives_the_same_file(tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed", reason="dask.distributed is not installed")
    grid = make()
    sweep_file.write(grid, tmp_path / "one.csv", {})
    cluster = distributed.LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None)
    with cluster, distributed.Client(cluster) as client:
        sweep_file.write(grid, tmp_path / "two.csv", {}, executor=client.get_executor())
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()


@pytest.mark.filterwarnings("ignore")
def test_the_command_with_a_scheduler(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    distributed = pytest.importorskip("distributed", reason="dask.distributed is not installed")
    asked = ["sweep", "--model", "llama-3-8b", "--ctx", "1k:4k:*2", "--quiet"]
    assert run([*asked, "--out", str(tmp_path / "one.csv")]) == 0
    cluster = distributed.LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None)
    with cluster:
        told = ["--scheduler", cluster.scheduler_address]
        assert run([*asked, "--out", str(tmp_path / "two.csv"), *told]) == 0
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()
    capsys.readouterr()
    assert run([*asked, "--out", str(tmp_path / "three.csv"), "--workers", "2", *told]) == 2
    assert "--scheduler goes with --out FILE and without --workers" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_no_scheduler_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("distributed", reason="dask.distributed is not installed")
    monkeypatch.setattr("kvsim.commands.sweep.CONNECT_SECONDS", 0.2)
    asked = ["sweep", "--model", "llama-3-8b", "--ctx", "1k", "--out", str(tmp_path / "one.csv"), "--quiet"]
    assert run([*asked, "--scheduler", "tcp://127.0.0.1:9"]) == 2
    assert "--scheduler tcp://127.0.0.1:9: no dask scheduler answers there" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["fp16", "kivi"])
def test_rows_are_computed_together(method: str) -> None:
    """Beside one at a time, in the processor's time of the same moment: far more than the 20 times asked for here."""
    model, card = load_model("llama-3-8b"), find_hardware("h100-sxm")
    grid = Grid((model,), (make_method(method),), range(16, 16 * 128, 16), range(1, 513), (card,))
    evaluate(grid, 0)
    start = time.process_time()
    rows = len(evaluate(grid, 0).batch)
    together = (time.process_time() - start) / rows
    start = time.process_time()
    for ctx in range(1000, 1050):
        estimate(model, make_method(method), 8, ctx)
        decode_step(model, make_method(method), card, 8, ctx)
    assert rows > 50_000
    assert together * 20 < (time.process_time() - start) / 50


def test_seconds_are_rounded_to_the_nearest_nanosecond() -> None:
    seconds = [0.0123456786, 0.0123456784, 1.9999999996, 0.0000000006, 0.0000000004, 2.0]
    text = sweep_file._lines([np.array(seconds), b"\n"]).decode().split()
    assert text == ["0.012345679", "0.012345678", "2.000000000", "0.000000001", "0.000000000", "2.000000000"]


def test_seconds_in_a_file_are_those_of_decode_step_rounded(tmp_path: Path) -> None:
    grid = make(models=(load_model("llama-3-8b"),))
    sweep_file.write(grid, tmp_path / "a.csv", {})
    rows = read_csv(tmp_path / "a.csv")
    for line in rows:
        batch, ctx = int(line["batch"]), int(line["ctx"])
        step = decode_step(grid.models[0], _method(line["method"]), find_hardware(line["gpu"]), batch, ctx).seconds
        said = [float(line[name]) for name in ("tpot_seconds", "tpot_low", "tpot_high")]
        assert all(abs(one - exact) <= 0.5001e-9 for one, exact in zip(said, step, strict=True)), line
    assert len(rows) == grid.num_rows


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("1k,4k", [1024, 4096]),
        ("3", [3]),
        ("2:5", [2, 3, 4, 5]),
        ("16:64:16", [16, 32, 48, 64]),
        ("1k:9k:*2", [1024, 2048, 4096, 8192]),
    ],
)
def test_axes(text: str, sizes: list[int]) -> None:
    assert list(parse_axis(text, "ctx")) == sizes


@pytest.mark.parametrize("text", ["", "0", "a", "1:2:3:4", "5:2", "1:9:*1", "1:9:0", "1:9:-1", "-1", "1.5"])
def test_bad_axes_are_one_line(text: str, capfd) -> None:
    assert run(["sweep", "--model", "gpt2", f"--ctx={text}", "--json"]) == 2
    out, err = capfd.readouterr()
    assert not out
    assert err.startswith("kvsim: error: ctx ")
    assert err.count("\n") == 1


def test_the_command(tmp_path: Path, capfd) -> None:
    out = tmp_path / "a.csv"
    assert run(["sweep", "--model", "gpt2", "--gpu", "h100-sxm", "--batch", "1:4", "--out", str(out)]) == 0
    stdout, stderr = capfd.readouterr()
    assert "128 rows" in stdout
    assert stdout.strip().splitlines()[-1].startswith("Not modelled:")
    assert "chunks" in stderr
    assert len(read_csv(out)) == 128
    assert run(["sweep", "--model", "gpt2", "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert len(document["rows"]) == 32
    assert document["inputs"]["models"] == ["openai-community/gpt2"]


def test_bytes_beyond_int64_are_refused() -> None:
    with pytest.raises(ValueError, match="too many to count"):
        make(contexts=(10**12,), batches=(10**6,)).cells


def test_weights_that_do_not_fit_leave_nothing_that_does() -> None:
    grid = make(models=(load_model("llama-3-70b"),), cards=(find_hardware("l4"),))
    assert not any(chunk.fits.any() for chunk in chunks(grid))


def test_an_engine_rounds() -> None:
    ideal, vllm = (
        make(models=(load_model("llama-3-8b"),), methods=(make_method("fp16"),), engine=EngineChoice(name))
        for name in ("ideal", "vllm")
    )
    pairs = zip(chunks(ideal), chunks(vllm), strict=True)
    for one, other in pairs:
        assert (one.nbytes <= other.nbytes).all()
        assert (one.nbytes < other.nbytes).any()
        for row in (0, len(one.batch) - 1):
            size = (int(other.batch[row]), int(other.ctx[row]))
            assert other.nbytes[row] == estimate(other.cell.model, other.cell.method, *size, other.cell.engine).nbytes


def test_a_path_that_cannot_be_written_is_one_line(tmp_path: Path, capsys) -> None:
    path = tmp_path / "missing" / "grid.csv"
    assert run(["sweep", "--model", "gpt2", "--method", "fp16", "--out", str(path)]) == 2
    assert capsys.readouterr().err == f"kvsim: error: cannot write {path}: No such file or directory\n"


def test_what_is_left_out_is_said_once_a_reason() -> None:
    models = tuple(load_model(name) for name in ("gemma-2-2b", "gemma-2-9b", "gpt2"))
    methods = tuple(make_method("kivi", nbits=nbits) for nbits in (2, 4))
    (line,) = Grid(models, methods, [1024], [1]).left_out
    assert line.startswith(
        "google/gemma-2-2b, google/gemma-2-9b with kivi-2bit-g32-r128, kivi-4bit-g32-r128 left out: "
    )
