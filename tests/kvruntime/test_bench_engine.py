"""``bench engine`` without a GPU: a tiny model through the same tasks, the wall clock instead of events."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from runtime_tiny import tiny_directory  # noqa: E402

from kvruntime.bench.engine import report, suite  # noqa: E402
from kvruntime.bench.harness import session  # noqa: E402
from kvruntime.bench.harness.results import Results  # noqa: E402
from kvruntime.cli import run as command  # noqa: E402
from kvsim.layout import nbytes  # noqa: E402
from kvsim.methods import Full, Kivi  # noqa: E402
from kvsim.models.load import load_model  # noqa: E402


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    folder = tiny_directory(tmp_path_factory.mktemp("tiny") / "tiny")
    contexts = {1: (96, 160, 320), 2: (96,)}
    return suite.Subject(str(folder), "float32", contexts, prompts=(40,), positions=400, largest=True)


METHODS = (Full("float32"), Kivi(group_size=32, residual_length=32, dtype="float32"))


def test_the_subjects_are_what_was_set_out() -> None:
    llama, gpt2 = suite.SUBJECTS["llama-3-8b"], suite.SUBJECTS["gpt2"]
    assert llama.contexts[1][0] == 1024
    assert llama.contexts[1][-1] == 131072
    assert (llama.contexts[8], llama.contexts[64]) == ((32768,), (4096,))
    assert gpt2.contexts == {1: (128, 512, 1024), 64: (1024,)}
    assert [method.name for method in suite.methods_of("bfloat16")] == [
        "bf16",
        "kivi-2bit-g32-r128",
        "kivi-2bit-g64-r64",
        "kivi-4bit-g64-r64",
    ]
    models = suite.Models("cpu")
    assert models.config(llama)["max_position_embeddings"] == 131072
    assert models.config(gpt2)["n_positions"] == 1024
    for one in suite.SUBJECTS.values():
        longest = max(context for contexts in one.contexts.values() for context in contexts)
        assert suite.num_steps(longest) + suite.WARM < longest


def test_a_sitting_on_a_tiny_model(subject, tmp_path, capsys) -> None:
    models = suite.Models("cpu")
    free = suite.RESERVE + (1 << 20)
    small = replace(subject, largest=False)
    results = Results(tmp_path / "e.json", {"device": {"name": "here"}})
    tasks = suite.subject_tasks(models, small, METHODS, suite.wall_clock, 2, lambda: free)
    assert session.carry_out(tasks, results, report.line, report.tables) == 0
    rows = results.rows
    assert not [row for row in rows if "failed" in row]
    steps = [row for row in rows if row["kind"] == "step"]
    assert len(steps) == 2 * 4
    layers = load_model(subject.model).cache_layers
    for row in steps:
        method = next(method for method in METHODS if method.name == row["method"])
        provided = 320 if row["batch_size"] == 1 else 96
        assert row["nbytes"] == sum(nbytes(method.buffers(layer, row["batch_size"], provided)) for layer in layers)
        assert row["steps"] == suite.num_steps(row["num_tokens"])
        assert row["kernel"].startswith("PyTorch")
        middle, low, high = row["seconds_per_step"]
        assert 0 < low <= middle <= high
        assert row["tokens_per_second"][0] == pytest.approx(row["batch_size"] / middle)
    shown = capsys.readouterr().out
    for words in ("against 16-bit", "kernels: ", "slope ms/token", "break-even", "first token"):
        assert words in shown


def test_resumed_steps_are_of_the_same_room_repeats_and_shape(subject) -> None:
    """``--quick`` gives a shorter cache, ``--repeats`` another spread, raised positions another shape."""

    def keys(one, repeats):
        tasks = suite.subject_tasks(suite.Models("cpu"), one, METHODS, suite.wall_clock, repeats, lambda: 0)
        return {tuple(task.key.items()) for task in tasks if task.key["kind"] in ("step", "prefill")}

    contexts = {1: subject.contexts[1][:1]}
    first = keys(replace(subject, contexts=contexts), 2)
    assert not first & keys(replace(subject, contexts=contexts), 3)
    assert not first & keys(replace(subject, contexts={1: subject.contexts[1]}), 2)
    assert not first & keys(replace(subject, contexts=contexts, positions=500), 2)


def test_the_largest_batch_is_predicted_then_run(subject, monkeypatch) -> None:
    models = suite.Models("cpu")
    monkeypatch.setattr("kvruntime.engine.loop.FILL_TOKENS", 32)
    method, layers = METHODS[1], load_model(subject.model).cache_layers
    one = sum(nbytes(method.buffers(layer, 1, 96)) for layer in layers)
    filling = 4 * 32 * layers[0].num_kv_heads * 2 * layers[0].key_dim
    free = suite.RESERVE + 4 * one + 4 * filling
    row = suite.measure_largest(models, subject, method, suite.wall_clock, 96, free)
    assert row["predicted_batch"] >= row["batch_size"] >= 3
    assert row["nbytes"] == sum(nbytes(method.buffers(layer, row["batch_size"], 96)) for layer in layers)

    real = suite.measure_steps

    def scarce(built, *rest):
        if built.batch_size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(built, *rest)

    monkeypatch.setattr(suite, "measure_steps", scarce)
    with pytest.raises(ValueError, match="out of memory with"):
        suite.measure_largest(models, subject, method, suite.wall_clock, 96, free + 60 * (one + filling))


def test_an_engine_that_cannot_be_built_is_a_row_each_and_built_once(subject, tmp_path, monkeypatch) -> None:
    tries = []

    def broken(*given, **named):
        tries.append(named["batch_size"])
        raise RuntimeError("no such kernel")

    monkeypatch.setattr("kvruntime.engine.Engine", broken)
    models = suite.Models("cpu")
    small = replace(subject, contexts={1: (96, 160)}, prompts=(), largest=False)
    results = Results(tmp_path / "e.json", {"device": {"name": "here"}})
    tasks = suite.subject_tasks(models, small, METHODS[:1], suite.wall_clock, 1, lambda: 0)
    assert session.carry_out(tasks, results, report.line, report.tables) == 0
    assert ["no such kernel" in row["failed"] for row in results.rows] == [True, True]
    assert len(tries) == 1


def test_lines_and_break_even() -> None:
    base = [(1000, 5.0), (2000, 6.0), (4000, 8.0)]
    found = report.fitted(base)
    assert (found.start, found.slope) == (pytest.approx(4.0), pytest.approx(1e-3))
    assert report.fitted(base[:2]) is None
    ours = [(1000, 5.5), (2000, 5.7), (4000, 6.1)]
    assert report.break_even(ours, base) == pytest.approx(1000 + 1000 * 0.5 / 0.8)
    assert report.break_even([(x, y - 1) for x, y in base], base) == 1000
    assert report.break_even([(x, y + 1) for x, y in base], base) is None
    up_and_down = [(1000, 4.0), (2000, 6.5), (4000, 7.0)]  # slower again in between: counts from the last crossing
    assert report.break_even(up_and_down, base) == pytest.approx(2000 + 2000 * 0.5 / 1.5)


def test_peers_run_in_the_same_harness(subject, tmp_path, monkeypatch, capsys) -> None:
    from kvruntime.bench.model import peers

    monkeypatch.setattr(peers, "find_spec", lambda module: True if module == "transformers" else None)
    models = suite.Models("cpu")
    small = replace(subject, peers=((1, 48, 4),))
    tasks, missing = suite.peer_tasks(models, small)
    assert {row["package"] for row in missing} == {"optimum-quanto", "hqq", "tiny-turboquant"}
    results = Results(tmp_path / "e.json", {"device": {"name": "here"}})
    results.rows = list(missing)
    assert session.carry_out(tasks, results, report.line, report.tables) == 0
    row = next(row for row in results.rows if row["kind"] == "step")
    assert (row["method"], row["package"], row["steps"]) == ("transformers-dynamic", "transformers", 4)
    assert "missing: hqq" in capsys.readouterr().out


def test_peers_by_name_come_in_the_bits_that_they_have(monkeypatch) -> None:
    from kvruntime.bench.model import peers

    monkeypatch.setattr(peers, "find_spec", lambda module: None)
    there, missing = peers.find_peers(peers.WIDTHS, ["tiny-turboquant", "hqq", "hqq"])
    assert there == []
    assert [row["method"] for row in missing] == [
        *(f"tiny-turboquant-{nbits}bit-g32-r128" for nbits in (2, 3, 4)),
        *(f"hqq-{nbits}bit-g64-r128" for nbits in (2, 4)),
    ]
    assert [row["method"] for row in peers.find_peers(names=["hqq:nbits=4"])[1]] == ["hqq-4bit-g64-r128"]
    with pytest.raises(ValueError, match="peer 'hqq:nbits=3': allowed after the colon are nbits=2, nbits=4"):
        peers.find_peers(names=["hqq:nbits=3"])
    with pytest.raises(LookupError, match="unknown peer 'qanto': did you mean quanto"):
        peers.find_peers(names=["qanto"])


def test_a_peers_row_says_whether_it_was_fused(monkeypatch) -> None:
    """tiny-turboquant's fused decode takes tokens by ``ingest``, PyTorch's attention by ``update``."""
    from types import ModuleType

    from kvruntime.bench.harness.tables import of_kernel
    from kvruntime.bench.model import peers

    class TinyKVCache:
        def __init__(self, **options: int) -> None:
            self.taken: list[tuple] = []

        def update(self, *given: object) -> None:
            self.taken.append(given)

        ingest = update

    module = ModuleType("tiny_turboquant")
    module.TinyKVCache = TinyKVCache
    monkeypatch.setitem(sys.modules, "tiny_turboquant", module)
    cache = peers.PEERS["tiny-turboquant"].make(3).build(None, 8)
    cache.update("key", "value", 0, {"more": 1})
    assert cache.taken == [("key", "value", 0)]
    assert of_kernel(cache) == {"kernel": peers.UNFUSED}
    cache.ingest("key", "value", 0)
    assert of_kernel(cache) == {"kernel": peers.FUSED}


def test_the_whole_command(subject, tmp_path, monkeypatch, capsys) -> None:
    """On a machine that says it has a card, with the host's clock."""
    import json

    from kvruntime.bench.harness import results
    from kvruntime.bench.kernels import precompile
    from kvruntime.bench.model import peers
    from kvruntime.checkpoints import load

    monkeypatch.chdir(tmp_path)
    real = load.load
    monkeypatch.setattr(load, "pick_device", lambda device: device or "cuda:0")
    monkeypatch.setattr(load, "load", lambda source, device, dtype: real(source, "cpu", dtype))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (suite.RESERVE + (1 << 20), 1 << 34))
    monkeypatch.setattr(results, "_device", lambda device: {"name": "pretended"})
    monkeypatch.setattr(precompile, "compile_ahead", lambda cases, device, say: say(f"{len(cases)} cases"))
    monkeypatch.setattr(peers, "find_spec", lambda module: None)
    monkeypatch.setattr(suite, "cuda_clock", suite.wall_clock)
    monkeypatch.setattr(suite, "LARGEST_AT", 96)
    monkeypatch.setattr("kvruntime.engine.loop.FILL_TOKENS", 32)
    monkeypatch.setitem(suite.SUBJECTS, "tiny", replace(subject, positions=600, peers=((1, 48, 4),)))
    words = ["bench", "engine", "--model", "tiny", "--repeats", "1", "--peers"]
    assert command([*words, "--method", "kivi:residual_length=32"]) == 0
    rows = json.loads((tmp_path / "kvruntime-engine.json").read_text())["rows"]
    kinds = [row["kind"] for row in rows]
    assert [kinds.count(kind) for kind in ("step", "prefill", "largest")] == [8, 2, 2]
    assert [row["failed"] for row in rows if "failed" in row] == []
    assert kinds.count("missing") == 4
    shown = capsys.readouterr()
    assert "2 cases" in shown.err
    assert "predicted batch" in shown.out
    assert command([*words, "--method", "kivi:residual_length=32", "--resume"]) == 0
    again = json.loads((tmp_path / "kvruntime-engine.json").read_text())["rows"]
    assert [row for row in again if row["kind"] != "missing"] == [row for row in rows if row["kind"] != "missing"]
    assert sum(row["kind"] == "missing" for row in again) == 4


BAD = {
    "no GPU": ([], "needs a CUDA device"),
    "model": (["--model", "gpt5"], "unknown model 'gpt5': allowed are gpt2"),
    "repeats": (["--repeats", "0"], "repeats 0"),
    "method": (["--method", "kivvi"], "did you mean kivi"),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="refusals of a machine without a GPU")
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name: str, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    words, message = BAD[name]
    assert command(["bench", "engine", *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not list(tmp_path.iterdir())
