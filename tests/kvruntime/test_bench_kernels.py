"""``bench kernels`` without a GPU: everything but the CUDA graph and PyTorch's fused attention, on the reference."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from toy_room import Toy, move_in  # noqa: E402

from kvruntime.bench.engine import suite as engine_suite  # noqa: E402
from kvruntime.bench.harness import session, timing  # noqa: E402
from kvruntime.bench.harness.ceilings import copy_ceiling, read_ceiling  # noqa: E402
from kvruntime.bench.harness.results import Results  # noqa: E402
from kvruntime.bench.kernels import attention, packing, report, suite  # noqa: E402
from kvruntime.bench.kernels.precompile import Case, compile_group  # noqa: E402
from kvruntime.cli import run as command  # noqa: E402
from kvruntime.methods import LAYERS  # noqa: E402
from kvruntime.methods.kivi import benched  # noqa: E402
from kvruntime.methods.kivi.cache import KiviLayer  # noqa: E402
from kvsim.methods import Full  # noqa: E402
from kvsim.models.load import load_config  # noqa: E402
from kvsim.models.model import Model  # noqa: E402

BENCH = timing.cpu_bench()
SMALL = attention.Shape("llama-3-8b", 8, 2, 64, 2, 320)


@pytest.mark.parametrize("name", suite.HEADS)
def test_heads_are_the_catalogue_s(name: str) -> None:
    model = Model.from_config(load_config(name)[1])
    layer = model.layers[0]
    assert suite.HEADS[name] == (model.num_q_heads, layer.num_kv_heads, layer.key_dim)


def test_the_grid_is_the_table() -> None:
    shapes = [suite.make_shape(spec) for spec in suite.SHAPES]
    assert {(s.model, s.batch_size, s.num_tokens) for s in shapes} == {
        shape for ratios in report.layouts_asked().values() for shape in ratios
    }
    layouts = {method.name.rpartition("-r")[0] for method in benched.LAYOUTS}
    assert layouts == set(report.layouts_asked())
    assert all(suite.fits(shape, method) for shape in shapes for method in benched.LAYOUTS)
    gpt2 = next(shape for shape in shapes if shape.model == "gpt2")
    assert not suite.fits(gpt2, benched.kivi(2, 128, 128, value_group_size=128))  # its heads have 64 channels


@pytest.mark.parametrize("method", [*benched.LAYOUTS[:4], benched.LAYOUTS[5], benched.MIXED], ids=lambda m: m.name)
def test_a_row_knows_its_bytes_and_its_error(method) -> None:
    row = attention.measure_attend(BENCH, SMALL, method)
    assert row["nbytes_read"] == sum(method.read_parts(SMALL.layer, 2, 320).values())
    assert row["exact_tokens"] == 320 - method.num_packed(320)
    assert 0 < row["relative_error"] < 2e-3  # the reference rounds once, to float16
    assert row["bandwidth"] == pytest.approx(row["nbytes_read"] / row["seconds"][0])
    assert row["kernel"] == "reference"


@pytest.mark.parametrize("lengths", [None, (320, 75)])
def test_what_a_room_measures_besides_is_asked_of_it(monkeypatch, lengths) -> None:
    """With a tensor-core kernel pretended: its plan, other splits, and one line of work for uneven rows."""
    asked = []

    class Fast:
        STAGES = 3

        def plan_splits(self):
            return 8

        def attend(self, query, *stored, num_splits=None, arrivals=None, equal_shares=False):
            asked.append((num_splits, arrivals is not None, equal_shares))
            return query

    fast = Fast()
    real = KiviLayer.attend

    def attend(layer, query, scale, arrivals=None):
        if lengths is None:
            fast.plan_splits()
        return real(layer, query, scale)

    monkeypatch.setattr(benched, "fast_kernel", lambda layer, query: fast)
    monkeypatch.setattr(benched.cache, "_fast", lambda: fast)
    monkeypatch.setattr(KiviLayer, "attend", attend)
    row = attention.measure_attend(BENCH, replace(SMALL, lengths=lengths), benched.kivi(2, 64, 64), splits=True)
    assert row["launch"] == {"stages": 3}
    if lengths is None:
        assert row["splits"] == 8
        assert list(row["sweep"]) == ["4", "6", "10", "12", "16"]
        assert {splits for splits, *_ in asked} == {4, 6, 10, 12, 16}
        assert "equal_shares" not in row
    else:
        assert row["splits"] is None
        assert "sweep" not in row
        assert row["equal_shares"] > 0
        assert set(asked) == {(None, False, True)}


def test_an_error_in_attention_shows() -> None:
    tokens = attention.Tokens(BENCH, SMALL, torch.float16)
    layer = attention.filled_layer(benched.kivi(2, 32, 64), tokens)
    query = tokens.draw(8, 1)
    out = layer.attend(query, SMALL.scale)
    for head in (0, 1):
        assert attention.relative_error(layer, query, out, SMALL.scale, row=1, head=head) < 2e-3
    assert attention.relative_error(layer, query, out * 1.01, SMALL.scale) > 9e-3
    assert attention.relative_error(layer, query, out.roll(1, 1), SMALL.scale) > 0.1


def test_pieces_and_one_piece_store_the_same(monkeypatch) -> None:
    method = benched.kivi(2, 64, 64)
    monkeypatch.setattr(attention, "CHUNK_TOKENS", 100)
    ragged = replace(SMALL, lengths=(320, 75))
    layer = attention.filled_layer(method, attention.Tokens(BENCH, ragged, torch.float16))
    assert layer.row_lengths == [320, 75]
    assert layer.row_packed == [method.num_packed(320), method.num_packed(75)]
    assert ragged.nbytes_read(method) == sum(
        sum(method.read_parts(ragged.layer, 1, length).values()) for length in (320, 75)
    )
    assert attention.measure_attend(BENCH, ragged, method)["relative_error"] < 2e-3


def test_keys_have_large_channels_and_no_zeros() -> None:
    key, value = attention.Tokens(BENCH, replace(SMALL, head_dim=128), torch.float16).pair(200)
    assert (key != 0).float().mean() > 0.999
    spread = key.float().std(dim=(0, 2))
    assert spread.max() > 3.5 * spread.median()
    assert value.float().std() == pytest.approx(1, abs=0.05)


def test_packing_rows() -> None:
    method = benched.kivi(2, 64, 64)
    row = packing.measure_pack(BENCH, SMALL, method, compiled=False)
    assert row["nbytes"] == SMALL.nbytes_read(Full()) + SMALL.nbytes_read(method)
    assert row["eager_seconds"] > 0
    row = packing.measure_append(BENCH, SMALL, method)
    assert {"append_seconds", "flush_seconds", "append_launches", "flush_launches"} <= set(row)
    assert "CUDA only" in row["step_flush_seconds"]
    with pytest.raises(ValueError, match="whole records"):
        packing.measure_append(BENCH, replace(SMALL, num_tokens=330), method)


def test_rewinding_puts_a_flush_back() -> None:
    method = benched.kivi(2, 64, 64)
    tokens = attention.Tokens(BENCH, SMALL, torch.float16)
    layer = attention.filled_layer(method, tokens, room=128)
    rewind = benched.rewinder(layer)
    layer.append(*tokens.pair(1))
    assert layer.row_packed == [320, 320]
    rewind()
    assert (layer.row_lengths, layer.row_packed) == ([320, 320], [256, 256])
    assert layer.tensors["lengths"].tolist() == [[320, 320], [256, 256]]


def test_the_lean_packer_does_the_reference_s_arithmetic() -> None:
    """Its codes, unpacked, give what the cache reads back, up to rounding ties."""
    from kvruntime.methods.kivi import reference

    method = benched.kivi(2, 64, 64)
    shape = replace(SMALL, num_tokens=256)
    key, value = attention.Tokens(BENCH, shape, torch.float16).pair(256)
    key_words, value_words, *params = benched.lean_pack(key, value, 2, 64)
    shifts = torch.arange(0, 32, 2, dtype=torch.int32)

    def codes(words):
        return (words[..., None] >> shifts & 3).flatten(-2).float()

    record = method.record(shape.layer)
    want_key, want_value = reference.unpack_records(reference.pack_records(key, value, record), record)
    have_key = codes(key_words).unflatten(2, (-1, 64)) * params[0].float() + params[1].float()
    have_value = codes(value_words).unflatten(3, (-1, 64)) * params[2].float() + params[3].float()
    for have, want in ((have_key.flatten(2, 3), want_key), (have_value.flatten(3), want_value)):
        assert ((have - want).abs() > 1e-3).float().mean() < 1e-3


def test_the_layouts_of_any_room_are_timed(monkeypatch) -> None:
    """Attention and storing as every layer has them; what a room does not measure is refused by name."""
    toy = move_in(monkeypatch)
    monkeypatch.setitem(LAYERS, Toy, LAYERS[Toy]._replace(benched=(toy,)))
    assert suite.layouts() == (*benched.LAYOUTS, toy)
    assert suite.fits(SMALL, toy)
    assert suite.named_methods(["toy"]) == [toy]
    (task,) = suite.attend_tasks(BENCH, SMALL, [toy], splits=True)
    row = task.measure(lambda share: None)
    assert row["nbytes_held"] == row["nbytes_read"] == SMALL.nbytes_read(Full())
    assert 0 < row["relative_error"] < 2e-3
    assert row["kernel"].startswith("PyTorch")
    assert packing.measure_pack(BENCH, SMALL, toy).keys() == {"seconds", "nbytes", "bandwidth"}
    with pytest.raises(ValueError, match="method toy: its room does not say"):
        packing.measure_append(BENCH, SMALL, toy)
    assert not compile_group(([Case(SMALL, toy, steps=True)], "cpu"))
    assert toy in engine_suite.methods_of("float16")


def test_eviction_is_timed_over_what_is_left() -> None:
    """Its bytes are those of the method inside, of the tokens kept; what a step stores is refused by name."""
    shape = replace(SMALL, num_q_heads=4, num_kv_heads=1, batch_size=1)
    (method,) = suite.named_methods(["evict:policy=recent,budget=290,inner=kivi-boost"])
    row = attention.measure_attend(BENCH, shape, method)
    assert row["nbytes_read"] == sum(method.read_parts(shape.layer, 1, 320).values()) <= row["nbytes_held"]
    assert 132 < row["kept_tokens"] <= 290
    assert 0 < row["relative_error"] < 2e-3
    with pytest.raises(ValueError, match="a token is stored by its host"):
        packing.measure_append(BENCH, shape, method)


def test_ceilings_count_bytes() -> None:
    assert read_ceiling(BENCH, 1 << 16)["nbytes"] == 1 << 16
    assert copy_ceiling(BENCH, 1 << 16)["nbytes"] == 2 << 16


def test_the_summary_of_passes() -> None:
    found = timing.summary([float(n) for n in range(1, 12)], copies=2)
    assert found == timing.Timing(3.0, 1.0, 5.0, 11, 2)
    assert replace(BENCH, cold=220).copies(100) == 3
    assert replace(BENCH, cold=1 << 40).copies(1) == timing.MAX_COPIES


@pytest.mark.skipif(torch.cuda.is_available(), reason="a run on the CPU, for which Triton's interpreter is off here")
def test_rows_ratios_and_failures(tmp_path, monkeypatch, capsys) -> None:
    """A run on the CPU in the command's own order: what fails is a row, what is there is not measured again."""
    seconds = {"MATH": 1.0}

    def sdpa(bench, shape, backend, dtype):
        if backend == "FLASH_ATTENTION":
            raise RuntimeError("No available kernel.\nmore")
        size = shape.nbytes_read(Full(dtype))
        return {"seconds": [seconds["MATH"]] * 3, "bandwidth": size / seconds["MATH"], "nbytes_read": size}

    monkeypatch.setattr(attention, "measure_sdpa", sdpa)
    monkeypatch.setattr("kvruntime.bench.harness.ceilings.NBYTES", 1 << 16)
    methods = (benched.kivi(2, 64, 64), benched.kivi(2, 128, 128, value_group_size=128))
    results = Results(tmp_path / "k.json", {"device": {"name": "here"}})
    tasks = suite.kernel_tasks(BENCH, [SMALL, SMALL], methods, splits=True)
    tasks += suite.packing_tasks(BENCH, SMALL, [SMALL], methods[:1])
    assert session.carry_out(tasks, results, report.line, report.tables) == 0
    rows = results.rows
    assert [row["kind"] for row in rows] == ["sdpa", "sdpa", "full", "attend", "pack", "append"]
    assert rows[1]["failed"] == "RuntimeError: No available kernel."
    for row in rows[2:4]:
        assert report.speedup(row, rows) == pytest.approx(1.0 / row["seconds"][0])
    shown = capsys.readouterr()
    assert re.search(r"\dx against fp16", shown.err)
    assert "failed: RuntimeError: No available kernel." in shown.err
    assert "decode attention" in shown.out
    shown = report.tables([*rows, {"kind": "ceiling", "what": "read", "bandwidth": 3e12}])
    for words in (
        "measured ceilings: read 3,000 GB/s",
        "llama-3-8b 2 x 320",
        "fp16-engine",
        "failed: sdpa fp16-flash",
        "flush us",
    ):
        assert words in shown
    again = Results(tmp_path / "k.json", {"device": {"name": "here"}}, resume=True)
    monkeypatch.setattr(
        "kvruntime.bench.harness.tasks._measured", lambda task, tick: {"failed": "again: " + task.key["kind"]}
    )
    assert session.carry_out(tasks, again, report.line, report.tables) == 0
    assert [row["failed"] for row in again.rows if "failed" in row] == ["again: sdpa"]
    assert json.loads((tmp_path / "k.json").read_text())["schema"] == "kvruntime.bench/1"


def test_rows_without_other_splits_do_not_stand_for_rows_with_them() -> None:
    with_splits, without = (suite.attend_tasks(BENCH, SMALL, METHODS, splits=splits) for splits in (True, False))
    assert with_splits[0].key != without[0].key


def test_a_lost_device_stops_the_run_and_what_failed_comes_last(tmp_path, capsys) -> None:
    done = []

    def measure(number: int):
        done.append(number)
        if number == 1:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return {"bandwidth": 1e9, "what": "read"}

    tasks = [session.task({"kind": "ceiling", "number": n}, lambda n=n: measure(n)) for n in range(4)]
    for resume, code in ((False, session.AGAIN), (True, session.AGAIN)):
        results = Results(tmp_path / "r.json", {"device": {"name": "here"}}, resume=resume)
        assert session.carry_out(tasks, results, report.line, report.tables) == code
    assert done == [0, 1, 2, 3, 1]
    assert "go on with --resume" in capsys.readouterr().err


def test_asked_ratios_stand_beside_the_rows_they_mean() -> None:
    row = {"model": "llama-3-8b", "batch_size": 1, "num_tokens": 8192, "dtype": "float16"}
    assert report.asked(row | {"method": "kivi-2bit-g64-r128"}) == 2.5
    assert report.asked(row | {"method": "kivi-8bit-g64-r64"}) is None
    assert report.asked(row | {"method": "kivi-2bit-g64-r128", "portable": True}) is None
    assert report.splits_cell({"splits": 8, "seconds": [2e-6], "sweep": {"12": 1e-6, "16": "failed"}}) == (
        "8 (best 12: 1.00 us)"
    )


def test_compiling_ahead_reports_what_fails() -> None:
    method = benched.kivi(2, 64, 64)
    cases = [Case(SMALL, method, steps=True), Case(replace(SMALL, head_dim=72), method)]
    failures = compile_group((cases, "cpu"))
    assert len(failures) == 1
    assert "72" in failures[0]


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    """The commands on a machine that says it has a card, with the CPU's timer."""
    from kvruntime.bench.harness import results
    from kvruntime.bench.kernels import precompile
    from kvruntime.checkpoints import load

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load, "pick_device", lambda device: "cuda:0")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(timing, "cuda_bench", lambda device, seed: replace(BENCH, seed=seed))
    monkeypatch.setattr(results, "_device", lambda device: {"name": "pretended"})
    monkeypatch.setattr(precompile, "compile_ahead", lambda cases, device, say: say(f"{len(cases)} cases"))
    monkeypatch.setattr("kvruntime.bench.harness.ceilings.NBYTES", 1 << 16)
    monkeypatch.setitem(suite.HEADS, "llama-3-8b", (4, 2, 64))
    return tmp_path


@pytest.mark.long
def test_the_whole_command(pretended, monkeypatch, capsys) -> None:
    monkeypatch.setattr(suite, "RAGGED_BLOCKS", (3, 6))
    more = (("llama-3-8b:1x256", (benched.MIXED, benched.BFLOAT16)), ("llama-3-8b:ragged", METHODS))
    monkeypatch.setattr(benched, "MORE", more)
    monkeypatch.setattr(benched, "PORTABLE", ("llama-3-8b:1x256", ()))
    words = ["bench", "kernels", "--more", "--splits", "--method", "kivi:group_size=64,residual_length=64"]
    assert command([*words, "--part", "attend", "--shape", "llama-3-8b:2x320", "--seed", "3"]) == 0
    found = json.loads((pretended / "kvruntime-kernels.json").read_text())
    rows = found["rows"]
    assert found["device"] == {"name": "pretended"}
    assert [row["kind"] for row in rows[:2]] == ["ceiling", "ceiling"]  # before anything is compared with them
    attended = [row for row in rows if row["kind"] == "attend"]
    assert [(row["num_tokens"], row["dtype"], row["ragged"]) for row in attended] == [
        (320, "float16", False),
        (256, "float16", False),
        (256, "bfloat16", False),
        (288, "float16", True),
    ]
    assert not [row for row in attended if "failed" in row]
    assert all(row["seed"] == 3 for row in rows)
    sdpa = {(row["num_tokens"], row["dtype"]) for row in rows if row["kind"] == "sdpa"}
    assert sdpa == {(320, "float16"), (256, "float16"), (256, "bfloat16"), (288, "float16")}
    assert "4 cases" in capsys.readouterr().err
    assert command([*words, "--part", "attend", "--shape", "llama-3-8b:2x320", "--seed", "3", "--resume"]) == 0
    again = json.loads((pretended / "kvruntime-kernels.json").read_text())["rows"]
    assert [row for row in again if row["kind"] == "attend"] == attended


METHODS = (benched.kivi(2, 64, 64),)
BAD = {
    "no GPU": ([], "needs a CUDA device"),
    "model": (["--shape", "gpt5:1x1k"], "unknown shape 'gpt5:1x1k'"),
    "size": (["--shape", "gpt2:1k"], "expected MODEL:BATCHxTOKENS"),
    "tokens": (["--shape", "gpt2:1xk"], "tokens 'k'"),
    "method": (["--method", "fp16"], "float16 is its baseline"),
    "device": (["--device", "tpu"], "allowed here are"),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="refusals of a machine without a GPU")
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name: str, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    words, message = BAD[name]
    assert command(["bench", "kernels", *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not list(tmp_path.iterdir())


def test_options_before_the_command_are_refused(capsys) -> None:
    assert command(["bench", "--nbits", "2", "kernels"]) == 2
    assert "after the command" in capsys.readouterr().err
