"""The command line: the whole benchmark on a tiny model, and every bad input in one line."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from runtime_tiny import tiny_directory  # noqa: E402

from kvruntime import selfcheck as checking  # noqa: E402
from kvruntime.bench import given  # noqa: E402
from kvruntime.bench.harness import progress, tasks  # noqa: E402
from kvruntime.cli import run  # noqa: E402
from kvsim.install import install_hint  # noqa: E402
from kvsim.layout import nbytes  # noqa: E402
from kvsim.methods import make_method  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_directory(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def bench(folder, *words):
    small = ["--ctx", "32,128,300", "--batch", "1,2", "--prompt-tokens", "24", "--decode-tokens", "3", "--repeats", "2"]
    return [
        "bench",
        "--model",
        str(folder),
        "--device",
        "cpu",
        *small,
        "--window",
        "96",
        "--max-tokens",
        "400",
        "--no-plots",
        *words,
    ]


def test_bench_resume_and_plot(folder, here, capsys, monkeypatch):
    words = bench(folder, "--nbits", "2", "--nbits", "4", "--residual-length", "32", "--out", "r.json")
    assert run(words) == 0
    shown = capsys.readouterr()
    assert "weights: directory tiny" in shown.out
    told = [line for line in shown.err.splitlines() if line.startswith("[")]
    assert [line.split("]")[0] for line in told] == [f"[{number}/18" for number in range(1, 19)]  # a line a row
    assert all("MiB" in line or "tokens/s" in line or "perplexity" in line for line in told)
    assert not (here / "r-plots").exists()
    found = json.loads((here / "r.json").read_text())
    assert {"schema", "device", "versions", "commit", "seed", "command", "updated", "rows"} <= set(found)
    rows = found["rows"]
    kinds = [row["kind"] for row in rows]
    assert [kinds.count(kind) for kind in ("memory", "speed", "quality")] == [9, 6, 3]
    assert all(row["weights"] == "directory tiny" and row["dtype"] == "float32" for row in rows)
    names = {"fp16", "kivi-2bit-g32-r32", "kivi-4bit-g32-r32"}
    assert {row["method"] for row in rows} == names
    for row in rows:
        if row["kind"] == "memory":
            assert row["nbytes"] == row["predicted_nbytes"] == sum(row["parts"].values())
            assert row["how"] == ("filled" if row["num_tokens"] > 256 else "forward")
        if row["kind"] == "speed":
            middle, low, high = row["tokens_per_second"]
            assert 0 < low <= middle <= high
            assert len(row["decode_runs"]) == 2
        if row["kind"] == "quality":
            assert row["num_tokens"] == 4 * 95
            assert (row["text"], row["window"], row["chunk"]) == ("pydoc", 96, 16)
    nll = {row["method"]: row["nll"] for row in rows if row["kind"] == "quality"}
    assert len(set(nll.values())) == 3

    work = []
    monkeypatch.setattr(tasks, "_measured", lambda task, tick: work.append(task.label) or {"failed": "not again"})
    assert run([*words, "--resume"]) == 0
    assert work == []
    assert json.loads((here / "r.json").read_text())["rows"] == rows

    assert run(["plot", "r.json", "--out", "p"]) == 0
    assert run(["plot", "r.json", "--out", "p", "--format", "svg"]) == 0
    pictures = {path.name for path in (here / "p").iterdir()}
    assert pictures == {
        f"{n}.{s}" for n in ("memory", "compression", "speed", "quality", "summary") for s in ("png", "svg")
    }
    assert all(path.stat().st_size > 5000 for path in (here / "p").iterdir())


def test_bench_draws_unless_told_not_to(folder, here, capsys):
    words = [word for word in bench(folder, "--only", "memory", "--out", "m.json") if word != "--no-plots"]
    assert run(words) == 0
    assert "pictures: m-plots/summary.png and 2 more" in capsys.readouterr().out
    assert {path.name for path in (here / "m-plots").iterdir()} == {"memory.png", "compression.png", "summary.png"}


def test_the_time_left_never_rises(monkeypatch, capsys):
    """Pieces that take longer than their costs say: the time left waits, and does not go up."""
    now = [0.0]
    monkeypatch.setattr(progress, "clock", lambda: now[0])
    shown = []
    with progress.Progress([1.0] * 20, told_at_end=True) as meter:
        for piece in range(20):
            meter.begin(f"piece {piece}")
            now[0] += 10.0 if piece < 5 else 90.0
            meter.end("done")
            shown += [meter.least]
    assert shown == sorted(shown, reverse=True)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 20
    assert lines[0] == "[1/20] piece 0: done  about 4 min left"
    assert "left" not in lines[-1]


def test_interrupted_bench_says_how_to_go_on(folder, here, capsys, monkeypatch):
    real, calls = tasks._measured, []

    def measured(task, tick):
        calls.append(task.label)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(task, tick)

    monkeypatch.setattr(tasks, "_measured", measured)
    words = bench(folder, "--only", "memory", "--residual-length", "32")
    assert run(words) == 130
    assert "2 of 6 measurements are in kvruntime-bench.json; go on with: kvruntime" in capsys.readouterr().err
    assert len(json.loads((here / "kvruntime-bench.json").read_text())["rows"]) == 2
    assert run([*words, "--resume"]) == 0
    assert len(calls) == 3 + 4


def test_a_directory_without_a_tokenizer_is_measured_all_the_same(folder, here, capsys, monkeypatch):
    """Quality then falls back on the real model, as it does for random weights; here there is none."""
    monkeypatch.setenv("KVRUNTIME_CACHE", str(here / "cache"))
    shutil.copytree(folder, here / "mute", ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    words = ["--ctx", "32", "--only", "memory", "--only", "quality", "--offline", "--out", "m.json"]
    assert run(["bench", "--model", str(here / "mute"), "--device", "cpu", *words]) == 0
    rows = json.loads((here / "m.json").read_text())["rows"]
    assert [row["kind"] for row in rows] == ["skipped", "memory", "memory"]
    assert "`kvruntime pull smollm2-135m`" in capsys.readouterr().err
    assert run(["perplexity", "--model", str(here / "mute"), "--device", "cpu", "--offline"]) == 2
    assert "mute comes without a tokenizer: text cannot be scored" in capsys.readouterr().err


def test_quality_is_skipped_without_a_real_model(here, capsys, monkeypatch):
    monkeypatch.setenv("KVRUNTIME_CACHE", str(here / "cache"))
    assert run(["bench", "--offline", "--only", "quality", "--device", "cpu"]) == 0
    shown = capsys.readouterr()
    assert "kvruntime pull smollm2-135m" in shown.out
    rows = json.loads((here / "kvruntime-bench.json").read_text())["rows"]
    assert [(row["kind"], row["what"]) for row in rows] == [("skipped", "quality")]


def test_peers_that_are_missing_are_recorded(folder, here, capsys, monkeypatch):
    from kvruntime.bench.model import peers

    monkeypatch.setattr(peers, "find_spec", lambda module: None)
    monkeypatch.setattr(given, "find_peers", peers.find_peers)
    assert run(bench(folder, "--only", "memory", "--peers", "--residual-length", "32")) == 0
    assert install_hint("peers") in capsys.readouterr().out
    rows = json.loads((here / "kvruntime-bench.json").read_text())["rows"]
    assert {row["package"] for row in rows if row["kind"] == "missing"} >= {"optimum-quanto", "hqq", "tiny-turboquant"}


def test_perplexity_and_axes(folder, here, capsys):
    (here / "t.txt").write_text("the cat sat on the mat. " * 40)
    words = ["--model", str(folder), "--text", "t.txt", "--window", "120", "--chunk", "1", "--device", "cpu"]
    words += ["--residual-length", "32"]
    assert run(["perplexity", *words]) == 0
    assert run(["axes", *words]) == 0
    assert "error only, no memory" in capsys.readouterr().out
    quality = json.loads((here / "kvruntime-perplexity.json").read_text())["rows"]
    axes = json.loads((here / "kvruntime-axes.json").read_text())["rows"]
    assert [row["method"] for row in quality] == ["fp16", "kivi-2bit-g32-r32"]
    assert len(axes) == 5
    assert axes[0]["nll"] == pytest.approx(quality[0]["nll"], abs=1e-2)


def test_generate_streams_and_weighs(folder, here, capsys):
    words = ["--model", str(folder), "--max-new-tokens", "40", "--residual-length", "32", "--device", "cpu"]
    assert run(["generate", "Once upon a time, there was", *words]) == 0
    shown = capsys.readouterr()
    assert len(shown.out) > 30
    method = make_method("kivi", residual_length=32)
    from kvsim.layout import LayerShape

    size = 2 * nbytes(method.buffers(LayerShape(2, 32, 32), 1, 27 + 40))
    assert f"weighed {size:,} B" in shown.err


def generate(folder, *words):
    tiny = ["--model", str(folder), "--device", "cpu", "--max-new-tokens", "4", "--residual-length", "32"]
    return ["generate", *words, *tiny]


def test_generate_takes_a_prompt_from_a_file_or_a_pipe(folder, here, capsys, monkeypatch):
    (here / "prompt.txt").write_text("the cat sat on the mat\n", encoding="utf-8")
    assert run(generate(folder, "--prompt-file", "prompt.txt", "--json")) == 0
    of_file = json.loads(capsys.readouterr().out)
    assert (of_file["schema"], of_file["prompt"]) == ("kvruntime.generate/1", "the cat sat on the mat")
    pipe = io.TextIOWrapper(io.BytesIO(b"the cat sat on the mat\n"))
    monkeypatch.setattr(sys, "stdin", pipe)
    assert run(generate(folder, "--json")) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["text"] == of_file["rows"][0]["text"]


def test_generate_says_where_nothing_was_quantized(folder, here, capsys):
    """Of 22 prompt and 4 new tokens the last was never fed back; 32 fit the residual."""
    assert run(generate(folder, "the cat sat on the mat")) == 0
    assert "25 tokens fit the residual: nothing was quantized" in capsys.readouterr().err
    assert run(generate(folder, "the cat sat on the mat " * 3)) == 0
    said = capsys.readouterr().err
    assert "x smaller" in said
    assert "nothing was quantized" not in said
    assert run(generate(folder, "x", "--method", "fp16")[:-2]) == 0
    assert "nothing was quantized" not in capsys.readouterr().err


def test_generate_compares_two_caches(folder, here, capsys):
    prompt = "the cat sat on the mat " * 3
    assert run(generate(folder, prompt, "--compare", "fp16", "--json")) == 0
    ours, full = json.loads(capsys.readouterr().out)["rows"]
    assert [ours["method"], full["method"]] == ["kivi-2bit-g32-r32", "fp16"]
    assert (ours["quantized"], full["quantized"]) == (True, False)
    assert ours["nbytes"] < full["nbytes"] == full["fp16_nbytes"] == ours["fp16_nbytes"]
    assert run(generate(folder, prompt, "--compare", "fp16")) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[0].split(" | ")[1] == "fp16"
    assert f"| {full['nbytes'] / 2**20:.2f} |" in shown
    assert "The texts part at new token" in shown or "The same 4 tokens." in shown
    assert run(generate(folder, prompt, "--method", "fp16", "--compare", "fp16")[:-2]) == 2
    assert "compare fp16: it is what it would be compared with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        ([""], "the prompt is empty"),
        (["--prompt-file", "empty.txt"], "the prompt is empty"),
        (["x", "--prompt-file", "empty.txt"], "give a prompt or --prompt-file empty.txt, not both"),
        (["--prompt-file", "none.txt"], "cannot read prompt file none.txt: No such file"),
        (["--prompt-file", "latin.txt"], "the prompt is not UTF-8 (byte 0)"),
        (["x", "--compare", "nope"], "unknown method 'nope'"),
    ],
)
def test_a_wrong_prompt_is_refused_before_a_model_is_loaded(words, wrong, folder, here, capsys, monkeypatch):
    (here / "empty.txt").write_text("\n", encoding="utf-8")
    (here / "latin.txt").write_bytes(b"\xff\xfe")
    monkeypatch.setattr("kvruntime.commands.load_given", lambda *_: pytest.fail("a model was loaded"))
    assert run(generate(folder, *words)) == 2
    assert wrong in capsys.readouterr().err


def test_selfcheck(capsys, monkeypatch):
    assert run(["selfcheck", "--device", "cpu"]) == 0
    assert "PyTorch reference" in capsys.readouterr().out
    monkeypatch.setattr(checking, "SHAPES", checking.SHAPES[:1])
    monkeypatch.setattr("kvruntime.methods.kivi.fake_quantize", lambda x, *rest: x)  # an oracle that disagrees
    assert run(["selfcheck", "--device", "cpu"]) == 1
    assert "FAIL  kivi-2bit" in capsys.readouterr().out


BAD = {
    "unknown model": (["bench", "--model", "gpt2-larg"], "gpt2-large"),
    "no such directory": (["bench", "--model", "./none"], "is not a directory"),
    "no weights": (["bench", "--model", "{empty}"], "holds no weights"),
    "broken config": (["bench", "--model", "{broken}"], "not valid JSON"),
    "unsupported": (["bench", "--model", "{strange}", "--device", "cpu"], "unsupported architecture"),
    "encoder-decoder": (["bench", "--model", "{t5}", "--device", "cpu"], "architecture"),
    "nbits": (["bench", "--nbits", "5"], "nbits 5: allowed are 1, 2, 3, 4, 8"),
    "group": (["bench", "--model", "{tiny}", "--value-group-size", "24", "--device", "cpu"], "does not divide"),
    "residual": (["perplexity", "--residual-length", "33"], "not a multiple"),
    "ctx": (["bench", "--ctx", "0"], "ctx '0'"),
    "ctx of one": (["bench", "--ctx", "1", "--model", "{tiny}", "--device", "cpu"], "ctx 1: allowed are 2"),
    "method": (["generate", "x", "--method", "kivvi"], "did you mean kivi"),
    "two methods": (["generate", "x", "--nbits", "2", "--nbits", "4"], "one method at a time"),
    "empty text": (["perplexity", "--text", "{text}"], "is empty"),
    "binary text": (["bench", "--text", "{binary}"], "not UTF-8"),
    "out": (["bench", "--out", "{text}/below/r.json", "--device", "cpu"], "cannot write"),
    "device": (["bench", "--device", "tpu"], "allowed here are cpu"),
    "positions": (
        ["bench", "--model", "{tiny}", "--prompt-tokens", "300", "--device", "cpu", "--only", "speed"],
        "256 positions",
    ),
    "window": (["perplexity", "--model", "{tiny}", "--window", "300", "--device", "cpu"], "256 positions"),
    "empty prompt": (["generate", "", "--model", "{tiny}", "--device", "cpu"], "prompt is empty"),
    "weights dtype": (["bench", "--weights-dtype", "int3"], "dtype 'int3'"),
    "pull": (["pull", "gpt5"], "allowed are smollm2-135m"),
    "results": (["plot", "{text}"], "not valid JSON"),
    "option": (["bench", "--colour"], "No such option"),
    "axes of fp16": (["axes", "--method", "fp16", "--model", "{tiny}"], "takes kivi only"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name, folder, here, capsys):
    configs = {"empty": "{}", "broken": "{", "strange": '{"model_type": "nothing-known"}', "t5": '{"model_type": "t5"}'}
    for directory, config in configs.items():
        (here / directory).mkdir()
        (here / directory / "config.json").write_text(config)
        if directory != "empty":
            (here / directory / "model.safetensors").write_bytes(b"")
    (here / "text").write_text("")
    (here / "binary").write_bytes(b"\xff\xfe\x00")
    places = {name: str(here / name) for name in (*configs, "text", "binary")} | {"tiny": str(folder)}
    words, message = BAD[name]
    assert run([word.format(**places) for word in words]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("kvruntime: error: ")]
    assert len(lines) == 1
    assert message in lines[0]


BEFORE_LOADING = {
    "eval --window 300": "window 300 exceeds the model's 256 positions",
    "eval --window 100q": "window '100q': allowed are whole numbers up to",
    "eval --window 1M": "window 1048576 exceeds the model's 256 positions",
    "compare --window 1k": "window 1024 exceeds the model's 256 positions",
    "compare --max-tokens 1G": "max-tokens '1G': allowed are whole numbers up to",
    "eval --task lambada --data none.txt": "data none.txt: there is no none.txt",
    "eval --task lambada --data .": "cannot read LAMBADA file: . is not a regular file",
    "eval --task longbench --data .": "cannot read LongBench config config/dataset2prompt.json",
    "doctor --bits 1": "bits 1: allowed are 3.000 and above",
    "doctor --text none.txt": "cannot read text file none.txt",
}


@pytest.mark.parametrize("command", BEFORE_LOADING)
def test_a_wrong_value_is_named_before_a_model_is_loaded(command, folder, here, capsys):
    assert run([*command.split(), "--model", str(folder), "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert BEFORE_LOADING[command] in line


@pytest.mark.parametrize(
    ("command", "wrong"),
    [("generate --size 1by4k", "size '1by4k'"), ("generate --out .", "cannot write ."), ("engine --out .", "cannot")],
)
def test_a_wrong_value_is_named_before_a_missing_device(command, wrong, here, capsys):
    assert run(["bench", *command.split(), "--device", "cpu"]) == 2
    assert wrong in capsys.readouterr().err


COUNTS = {
    "bench": ("--prompt-tokens", "--decode-tokens", "--repeats", "--warmup", "--quality-batch", "--window", "--chunk"),
    "perplexity": ("--batch", "--max-tokens", "--group-size", "--residual-length", "--sink-length", "--nbits"),
    "generate x": ("--max-new-tokens", "--temperature", "--key-nbits", "--key-group-size"),
    "bench kernels": ("--seed",),
    "bench engine": ("--seed", "--repeats"),
    "calibrate": ("--seconds",),
}


@pytest.mark.parametrize("command", COUNTS)
def test_numbers_that_are_none_or_too_large_are_one_line(command, folder, here, capsys):
    words = [*command.split(), "--device", "cpu"]
    words += [] if command in ("bench kernels", "bench engine", "calibrate") else ["--model", str(folder)]
    for option in COUNTS[command]:
        for value in ("nan", "inf", "-inf", "-1", "9" * 400, ""):
            assert run([*words, option, value]) == 2, (option, value)
            lines = capsys.readouterr().err.splitlines()
            assert [line for line in lines if line.startswith("kvruntime: error: ")] == lines[-1:], (option, value)
    for option, value in (("--ctx", "9" * 400), ("--batch", "9" * 20), ("--ctx", "0")) if command == "bench" else ():
        assert run([*words, option, value]) == 2
    assert not list(here.iterdir())


@pytest.mark.parametrize("option", ["--part", "--without"])
def test_fitting_again_takes_no_parts(option, here, capsys):
    assert run(["calibrate", "--refit", option, "kvruntime"]) == 2
    assert "--refit measures no part" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["pipe", "/dev/null", "/dev/zero"])
def test_only_regular_files_are_read_and_written(place, folder, here, capsys):
    if place == "pipe":
        os.mkfifo(here / "pipe")
    for words in (
        ["perplexity", "--text", place, "--model", str(folder)],
        ["bench", "--out", place, "--model", str(folder)],
        ["calibrate", "--device", "cpu", "--out", place],
        ["plot", place],
    ):
        assert run(words) == 2
        assert "is not a regular file" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "content", ["[1]", "[" * 100_000, '{"schema": "kvruntime.bench/1"}', '{"schema": "kvruntime.bench/1", "rows": [1]}']
)
def test_results_that_are_none_are_one_line(content, here, capsys):
    (here / "r.json").write_text(content)
    assert run(["plot", "r.json"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_row_that_cannot_be_drawn_is_one_line(here, capsys):
    rows = [{"kind": "memory", "method": "fp16"}]
    (here / "r.json").write_text(json.dumps({"schema": "kvruntime.bench/1", "rows": rows}))
    assert run(["plot", "r.json"]) == 2
    assert "r.json holds a row that cannot be drawn: KeyError" in capsys.readouterr().err


def test_help_is_quick_and_imports_no_torch():
    script = "import sys; from kvruntime.cli import run; run(['bench', '--help'])"
    script += "; print('torch' in sys.modules, file=sys.stderr)"
    out = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stderr.strip() == "False"
    assert "--residual-length" in out.stdout
