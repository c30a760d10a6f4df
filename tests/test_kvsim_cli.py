"""The command line: JSON, tables, one-line errors, and how fast it starts."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kvsim.cli import run
from kvsim.methods import METHODS
from kvsim.options import parse_size

MIB = 1 << 20
CHILD = (sys.executable, "-m", "kvsim")
ROOT = Path(__file__).parents[1]


def answer(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert run([*argv, "--json"]) == 0
    out: dict[str, Any] = json.loads(capsys.readouterr().out)
    return out


def test_estimate_json(capsys: pytest.CaptureFixture[str]) -> None:
    out = answer(capsys, "estimate", "--model", "llama-3-8b", "--ctx", "128k", "--batch", "2", "--gpu", "h100-sxm")
    assert out["schema"] == "kvsim.estimate/1"
    assert out["inputs"] == {
        "model": "meta-llama/Meta-Llama-3-8B",
        "batch": 2,
        "dtype": "float16",
        "methods": ["fp16", "kivi-8bit-g32-r128", "kivi-4bit-g32-r128", "kivi-2bit-g32-r128"],
        "ctx": 131072,
        "gpu": "h100-sxm",
    }
    assert [row["method"] for row in out["rows"]] == out["inputs"]["methods"]
    for row in out["rows"]:
        assert row["nbytes"] == sum(row["parts"].values()) == sum(row["split"].values())
        assert row["nbytes_per_token"] == pytest.approx(row["nbytes"] / (2 * 131072))
        assert row["compression"] == pytest.approx(out["rows"][0]["nbytes"] / row["nbytes"])
        assert row["read_nbytes"] == sum(row["read_parts"].values()) <= row["nbytes"]
        assert row["max_batch"] >= 2 or not row["fits"]
    assert out["rows"][0]["nbytes"] == 2 * 131072 * 131072
    assert out["rows"][0]["nbytes_per_token"] == 131072
    assert out["gpu"]["cache_nbytes"] == sum(
        sign * out["gpu"][key] for key, sign in (("memory_nbytes", 1), ("reserve_nbytes", -1), ("weight_nbytes", -1))
    )
    assert "8,192 positions (max_position_embeddings)" in out["notes"][0]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_by_name(capsys: pytest.CaptureFixture[str], name: str) -> None:
    out = answer(capsys, "estimate", "--model", "gpt2", "--method", name)
    assert len(out["rows"]) == 1
    assert out["rows"][0]["nbytes"] > 0


def test_method_options_reach_the_method(capsys: pytest.CaptureFixture[str]) -> None:
    argv = "--nbits 4 --group-size 64 --residual-length 192 --sink-length 4 --value-nbits 2 --value-group-size head"
    out = answer(capsys, "estimate", "--model", "gpt2", "--dtype", "bf16", *argv.split())
    assert [row["method"] for row in out["rows"]] == ["bf16", "kivi-k4v2-gk64-gvhead-r192-s4"]
    assert out["rows"][1]["options"]["dtype"] == "bfloat16"
    specs = ("--method", "kivi:nbits=8", "--method", "kivi:group_size=64,dtype=fp32", "--method", "fp16")
    out = answer(capsys, "estimate", "--model", "gpt2", *specs)
    assert [row["options"]["dtype"] for row in out["rows"]] == ["float16", "float32", "float16"]
    assert [row["method"] for row in out["rows"]] == ["kivi-8bit-g32-r128", "kivi-2bit-g64-r128", "fp16"]


@pytest.mark.parametrize(("ctx", "mebibytes"), [("2k", "11.29"), ("1024", "6.22"), ("512", "3.69"), ("128", "1.79")])
def test_the_seeds_table_as_printed(capsys: pytest.CaptureFixture[str], ctx: str, mebibytes: str) -> None:
    assert run(["estimate", "--model", "gpt2", "--ctx", ctx, "--method", "kivi-seed", "--method", "fp16"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| kivi-seed"))
    assert line.split("|")[5].strip() == mebibytes


def test_beyond_the_models_limit_is_computed_with_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    out = answer(capsys, "estimate", "--model", "gpt2", "--ctx", "2048")
    assert out["rows"][0]["nbytes"] == 72 * MIB
    assert out["notes"] == ["a context of 2,048 is beyond the model's 1,024 positions (n_positions)"]
    assert answer(capsys, "estimate", "--model", "gpt2", "--ctx", "1024")["notes"] == []


def test_tables_are_aligned_and_narrow(capsys: pytest.CaptureFixture[str]) -> None:
    commands = (
        "estimate --model llama-3.1-405b --ctx 1M --batch 64 --gpu b300",
        "explain --model llama-3.1-405b --ctx 1M --batch 64",
        "compare --model gpt2-xl",
        "models",
        "hardware",
    )
    for command in commands:
        assert run(command.split()) == 0
        block: list[str] = []
        for line in [*capsys.readouterr().out.splitlines(), ""]:
            assert len(line) < 100, line
            if line.startswith("|"):
                block.append(line)
                continue
            assert len({tuple(at for at, char in enumerate(row) if char == "|") for row in block}) <= 1
            block = []


def test_compare_and_plot_agree_with_estimate(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    compared = answer(capsys, "compare", "--model", "qwen2.5-7b", "--ctx", "4k,1k", "--method", "kivi")
    assert compared["schema"] == "kvsim.compare/1"
    assert [row["ctx"] for row in compared["rows"]] == [1024, 4096]
    single = answer(capsys, "estimate", "--model", "qwen2.5-7b", "--ctx", "4k", "--method", "kivi")
    assert compared["rows"][1] == single["rows"][0]
    picture = tmp_path / "picture.svg"
    drawn = answer(capsys, "plot", "--model", "qwen2.5-7b", "--ctx", "4k,1k", "--method", "kivi", "-o", str(picture))
    assert drawn["schema"] == "kvsim.plot/1"
    assert drawn["path"] == str(picture)
    assert drawn["rows"] == compared["rows"]
    assert picture.read_text().startswith("<?xml")
    assert run(["plot", "--model", "gpt2", "-o", str(tmp_path / "picture.png")]) == 0
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_explain_accounts_for_every_byte(capsys: pytest.CaptureFixture[str]) -> None:
    out = answer(capsys, "explain", "--model", "mistral-7b", "--ctx", "8k", "--batch", "3", "--method", "kivi")
    row = out["rows"][0]
    assert sum(formula["nbytes"] for formula in row["formulas"]) == row["nbytes"]
    assert {"name": "kv heads", "value": 8, "origin": "num_key_value_heads"} in out["numbers"]
    assert run(["explain", "--model", "mistral-7b"]) == 0
    assert "x 2 bits / 8" in capsys.readouterr().out


def test_models_and_hardware_list_sources(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("models", "hardware"):
        rows = answer(capsys, command)["rows"]
        assert all(row["source"] for row in rows)
        assert run([command, rows[0]["id"]]) == 0
        assert rows[0]["source"] in capsys.readouterr().out


def test_a_default_method_that_cannot_hold_the_model_is_left_out_with_a_note(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = {"model_type": "gpt2", "n_layer": 2, "n_embd": 80, "n_head": 10, "n_positions": 64, "vocab_size": 10}
    (tmp_path / "config.json").write_text(json.dumps(config))
    out = answer(capsys, "estimate", "--model", str(tmp_path))
    assert [row["method"] for row in out["rows"]] == ["fp16"]
    assert "head dimension 8 cannot be packed" in out["notes"][1]
    assert out["inputs"]["model"] == tmp_path.name
    assert answer(capsys, "estimate", "--model", str(tmp_path / "config.json"))["rows"] == out["rows"]


BAD = {
    "estimate --model gtp2": "unknown model 'gtp2': did you mean gpt2",
    "estimate --model gpt2 --gpu h1000": "unknown GPU 'h1000': did you mean h100",
    "estimate --model gpt2 --method kivy": "unknown method 'kivy': did you mean kivi",
    "estimate --model gpt2 --method kivi:bits=2": "option 'bits=2' is not one of",
    "estimate --model gpt2 --method fp16 --nbits 2": "no method of fp16 takes --nbits",
    "estimate --model gpt2 --method fp16 --dtype bf16": "takes --dtype",
    "estimate --model gpt2 --nbits 5": "nbits 5: allowed are 1, 2, 3, 4, 8",
    "estimate --model gpt2 --nbits two": "'two' is not a valid integer",
    "estimate --model gpt2 --value-group-size 48": "value group size 48 does not divide head dimension 64",
    "estimate --model gpt2 --residual-length 100": "residual_length 100 is not a multiple",
    "estimate --model gpt2 --dtype int4": "dtype 'int4': allowed are",
    "estimate --model gpt2 --ctx 0": "ctx '0': allowed are whole numbers from 1",
    "estimate --model gpt2 --ctx -5": "ctx '-5'",
    "estimate --model gpt2 --ctx 12q": "ctx '12q'",
    "estimate --model gpt2 --ctx 1k,2k": "ctx '1k,2k'",
    "compare --model gpt2 --ctx 1k,,2k": "ctx ''",
    "estimate --model gpt2 --batch 0": "batch 0: allowed are 1 and above",
    "estimate --model gpt2 --gpu t4 --reserve 2": "reserve '2': allowed are",
    "estimate --model gpt2 --gpu apple-m5-max": "its memory is not known",
    "estimate": "Missing option '--model'",
    "estimate --model gpt2 --bogus": "No such option",
    "guess": "No such command 'guess'",
    "models nope": "unknown model 'nope'",
    "hardware nope": "unknown GPU 'nope'",
    "plot --model gpt2 -o {tmp}/none/x.png": "no directory",
    "plot --model gpt2 -o {tmp}/x.pdf": "allowed are names that end in .png or .svg",
    "plot --model gpt2 -o {tmp}/folder.png": "cannot be written",
    "estimate --model {tmp}": "has no config.json",
    "estimate --model {tmp}/none.json": "no such file",
    "estimate --model {tmp}/broken.json": "is not valid JSON",
    "estimate --model {tmp}/list.json": "holds a JSON list",
    "estimate --model {tmp}/latin.json": "is not UTF-8",
    "estimate --model {tmp}/mla.json": "config key kv_lora_rank is 512",
}


@pytest.mark.parametrize("command", BAD)
def test_bad_input_is_one_line_and_exit_2(command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text('{"model_type": ')
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "latin.json").write_bytes(b'{"model_type": "\xe9"}')
    (tmp_path / "mla.json").write_text('{"model_type": "deepseek_v3", "kv_lora_rank": 512}')
    (tmp_path / "folder.png").mkdir()
    assert run(command.format(tmp=tmp_path).split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("kvsim: error: ")
    assert captured.err.count("\n") == 1
    assert BAD[command] in captured.err


def test_a_hub_that_cannot_be_reached_is_one_quick_line() -> None:
    pytest.importorskip("huggingface_hub")
    began = time.monotonic()
    child = subprocess.run(
        [*CHILD, "estimate", "--model", "no-one/no-model"],
        cwd=ROOT,
        env={"HF_ENDPOINT": "http://127.0.0.1:9", "PATH": "", "HF_HOME": "/nonexistent"},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 2
    assert child.stderr.count("\n") == 1
    assert "http://127.0.0.1:9 is not reachable" in child.stderr
    assert time.monotonic() - began < 10


def test_a_fault_of_ours_is_not_dressed_up_as_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise KeyError(name)

    monkeypatch.setattr("kvsim.cli.load_model", broken)
    with pytest.raises(KeyError):
        run(["estimate", "--model", "gpt2"])


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    child = subprocess.Popen([*CHILD, "models", "--json"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.read(10)
    child.stdout.close()
    assert child.stderr.read() == b""
    child.stderr.close()
    assert child.wait() == 0


def test_start_is_quick_and_light() -> None:
    command = [*CHILD, "estimate", "--model", "llama-3-8b", "--ctx", "128k", "--gpu", "h100"]
    best = 10.0
    for _ in range(7):
        began = time.perf_counter()
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        best = min(best, time.perf_counter() - began)
    assert best < 0.5  # some 0.07 s on two cores; the bound leaves room for a busy machine
    script = "import sys; from kvsim.cli import run; run(sys.argv[1:]); print(*sys.modules)"
    child = subprocess.run([sys.executable, "-c", script, *command[3:]], cwd=ROOT, check=True, capture_output=True)
    loaded = {name.split(".")[0] for name in child.stdout.decode().splitlines()[-1].split()}
    assert not loaded & {"torch", "transformers", "matplotlib", "numpy", "scipy", "rich", "huggingface_hub", "triton"}


@pytest.mark.parametrize(
    ("text", "size"), [("131072", 131072), ("128k", 131072), ("128K", 131072), ("1M", 1 << 20), ("1m", 1 << 20)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "k", "1.5k", "1e3", "-1", "0", "0k", "4096 tokens", "1kk", "9" * 40])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="allowed are whole numbers from 1"):
        parse_size(text)
