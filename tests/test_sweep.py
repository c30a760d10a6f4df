"""The sweep: exact against estimate(), resumable, atomic, bounded, the same through every executor and file type."""

from __future__ import annotations

import csv
import json
import multiprocessing
import random
import time
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from pathlib import Path

import pytest

np = pytest.importorskip("numpy", reason="numpy is not installed")

from kvsim import rowfile, sweep  # noqa: E402
from kvsim.capacity import room  # noqa: E402
from kvsim.cli import run  # noqa: E402
from kvsim.estimate import estimate  # noqa: E402
from kvsim.hardware import find_hardware  # noqa: E402
from kvsim.install import install_hint  # noqa: E402
from kvsim.load import load_model  # noqa: E402
from kvsim.methods import METHODS, make_method  # noqa: E402
from kvsim.sweep import Grid, chunks, evaluate, parse_axis  # noqa: E402
from kvsim.timing import decode_step  # noqa: E402

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
    rowfile.write(grid, tmp_path / "a.csv", {"a": 1})
    rowfile.write(grid, tmp_path / "a.json", {"a": 1})
    text, document = read_csv(tmp_path / "a.csv"), json.loads((tmp_path / "a.json").read_text())
    assert document["schema"] == "kvsim.sweep/1"
    assert list(document) == ["schema", "inputs", "notes", "not_modelled", "rows"]
    assert document["inputs"] == {"a": 1}
    assert len(text) == len(document["rows"]) == grid.num_rows
    for line, row in zip(text, document["rows"], strict=True):
        assert list(line) == list(row) == list(rowfile.COLUMNS)
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
    rowfile.write(make(cards=()), tmp_path / "a.csv", {})
    for line in read_csv(tmp_path / "a.csv"):
        assert (line["gpu"], line["fits"], line["tpot_seconds"], line["tpot_high"]) == ("", "", "", "")


def test_parquet_holds_the_same(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow (the parquet extra) is not installed")
    grid = make()
    rowfile.write(grid, tmp_path / "a.csv", {})
    rowfile.write(grid, tmp_path / "a.parquet", {})
    rows = parquet.read_table(tmp_path / "a.parquet").to_pylist()
    for line, row in zip(read_csv(tmp_path / "a.csv"), rows, strict=True):
        assert (line["model"], int(line["nbytes"])) == (row["model"], row["nbytes"])
        seconds = float(line["tpot_seconds"]) if line["tpot_seconds"] else None
        assert seconds == (row["tpot_seconds"] and pytest.approx(row["tpot_seconds"], abs=1e-9))


def test_parquet_without_pyarrow_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    assert run(["sweep", "--model", "gpt2", "--out", str(tmp_path / "a.parquet")]) == 2
    assert install_hint("parquet") in capfd.readouterr().err


class InterruptedError_(Exception):
    pass


def test_an_interrupted_sweep_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "CHUNK_ROWS", 4)
    grid, whole, out = make(), tmp_path / "whole.csv", tmp_path / "a.csv"
    rowfile.write(grid, whole, {})

    def stop(done: int, total: int) -> None:
        if done == 5:
            raise InterruptedError_

    with pytest.raises(InterruptedError_):
        rowfile.write(grid, out, {}, progress=stop)
    assert not out.exists()
    assert len(list((tmp_path / "a.csv.parts").glob("*.part"))) == 5
    seen: list[int] = []
    assert rowfile.write(grid, out, {}, progress=lambda done, _: seen.append(done)) == 5
    assert seen == list(range(6, grid.num_chunks + 1))
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "whole.csv"]


def test_parts_of_another_grid_are_refused(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise InterruptedError_

    with pytest.raises(InterruptedError_):
        rowfile.write(make(), tmp_path / "a.csv", {"batch": "1"}, progress=stop)
    with pytest.raises(ValueError, match="another sweep"):
        rowfile.write(make(), tmp_path / "a.csv", {"batch": "2"})


def test_a_process_pool_gives_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = make()
    rowfile.write(grid, tmp_path / "one.csv", {})
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        rowfile.write(grid, tmp_path / "two.csv", {}, executor=pool)
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()


@pytest.mark.filterwarnings("ignore")
def test_dask_gives_the_same_file(tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed", reason="dask.distributed is not installed")
    grid = make()
    rowfile.write(grid, tmp_path / "one.csv", {})
    cluster = distributed.LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None)
    with cluster, distributed.Client(cluster) as client:
        rowfile.write(grid, tmp_path / "two.csv", {}, executor=client.get_executor())
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()


@pytest.mark.parametrize("method", ["fp16", "kivi"])
def test_a_million_configurations_a_second(method: str) -> None:
    """Of one core's time: bytes, bytes read, what fits, seconds a token with their band, and CSV text of it all."""
    grid = Grid(
        (load_model("llama-3-8b"),),
        (make_method(method),),
        range(16, 16 * 1024, 16),
        range(1, 1025),
        (find_hardware("h100-sxm"),),
    )
    evaluate(grid, 0)
    rates = []
    for _ in range(3):
        start, rows = time.process_time(), 0
        for index in range(grid.num_chunks):
            chunk = evaluate(grid, index)
            rowfile._text(chunk, json_rows=False)
            rows += len(chunk.batch)
        rates.append(rows / (time.process_time() - start))
    assert rows == grid.num_rows > 1_000_000
    assert max(rates) >= 1_000_000


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
        make(models=(load_model("llama-3-8b"),), methods=(make_method("fp16"),), engine=name)
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
