"""The command line: JSON, tables, one-line errors, and how fast it starts."""

import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import Any

import pytest

from kvsim.cli import run
from kvsim.engines import ENGINES
from kvsim.methods import METHODS
from kvsim.models.load import load_model
from kvsim.specs import parse_human, parse_size

MIB = 1 << 20
CHILD = (sys.executable, "-m", "kvsim")
ROOT = Path(__file__).parents[2]


def answer(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> dict[str, Any]:
    assert run([*argv, "--json"]) == code
    out: dict[str, Any] = json.loads(capsys.readouterr().out)
    return out


def test_estimate_json(capsys: pytest.CaptureFixture[str]) -> None:
    out = answer(capsys, "estimate", "--model", "llama-3-8b", "--ctx", "128k", "--batch", "2", "--gpu", "h100-sxm")
    assert out["schema"] == "kvsim.estimate/1"
    assert (
        out["inputs"].items()
        >= {
            "model": "meta-llama/Meta-Llama-3-8B",
            "batch": 2,
            "dtype": "float16",
            "methods": ["fp16", "kivi-8bit-g32-r128", "kivi-4bit-g32-r128", "kivi-2bit-g32-r128"],
            "ctx": 131072,
            "gpu": "h100-sxm",
            "engine": "ideal",
            "tensor_parallel_size": 1,
        }.items()
    )
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
        assert run(command.split()) == (1 if "405b --ctx 1M" in command and "--gpu" in command else 0)
        block: list[str] = []
        for line in [*capsys.readouterr().out.splitlines(), ""]:
            assert len(line) < 100, line
            if line.startswith("|"):
                block.append(line)
                continue
            assert len({tuple(at for at, char in enumerate(row) if char == "|") for row in block}) <= 1
            block = []


def test_a_picture_names_its_lines_in_colours_of_its_own(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plot extra (matplotlib) is not installed")
    out = tmp_path / "a.svg"
    assert run(["plot", "gpt2", "--method", "fp16", "--method", "fp8", "-o", str(out)]) == 0
    svg = out.read_text(encoding="utf-8")
    assert svg.count("<!-- fp16 -->") == svg.count("<!-- fp8 -->") == 2  # at the line's end, in both halves
    assert "legend" not in svg
    assert "#0072b2" in svg
    assert "#1f77b4" not in svg


def test_compare_and_plot_agree_with_estimate(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    compared = answer(capsys, "compare", "--model", "qwen2.5-7b", "--ctx", "4k,1k", "--method", "kivi")
    assert compared["schema"] == "kvsim.compare/1"
    assert [row["ctx"] for row in compared["rows"]] == [1024, 4096]
    single = answer(capsys, "estimate", "--model", "qwen2.5-7b", "--ctx", "4k", "--method", "kivi")
    assert compared["rows"][1].items() <= single["rows"][0].items()
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
    "guess": "unknown command 'guess': allowed are breakeven, ",
    "estimat --model gpt2": "unknown command 'estimat': did you mean estimate?",
    "estimate --model= --ctx 1k": "model '': allowed are a name",
    "estimate --model /dev/null": "model /dev/null: neither a file nor a directory",
    "estimate --model gpt2 --gpu t4:x": "gpu 't4:x': allowed is CARD:COUNT",
    "plan --model gpt2 --gpu t4 --users 1 --lengths {tmp}/latin.json": "latin.json': not UTF-8 text",
    "plan --model gpt2 --gpu t4:2 --users 1 -tp 1": "2 cards, but --tensor-parallel-size is 1",
    "plan --model gpt2 --gpu t4 --users 1 --engine ideal --block-size 16": "engine ideal has no --block-size",
    "plan --model gpt2 --gpu t4 --users 1 --weight-bits 8 -q awq": "give one of --weight-bits, --weight-dtype and",
    "models nope": "unknown model 'nope'",
    "hardware nope": "unknown GPU 'nope'",
    "plot --model gpt2 -o {tmp}/none/x.png": "no directory",
    "plot --model gpt2 -o {tmp}/x.pdf": "allowed are names that end in .png or .svg",
    "plot --model gpt2 -o {tmp}/folder.png": "cannot write",
    "estimate --model {tmp}": "has no config.json",
    "estimate --model {tmp}/none.json": "no such file",
    "estimate --model {tmp}/broken.json": "is not valid JSON",
    "estimate --model {tmp}/list.json": "holds a JSON list",
    "estimate --model {tmp}/latin.json": "is not UTF-8",
    "estimate --model {tmp}/alien.json": "config key model_type is 'alien'",
    "estimate --model gpt2 --engine vlm": "unknown engine 'vlm': did you mean vllm",
    "estimate --model gpt2 --engine vllm:blocks=2": "option 'blocks=2' is not one of",
    "estimate --model gpt2 --engine vllm:block_size=many": "option 'block_size=many' is not a number",
    "estimate --model gpt2 --engine ideal --block-size 16": "engine ideal has no --block-size: it is vllm's",
    "estimate --model gpt2 --engine vllm --method q8_0": "vllm does not store q8_0",
    "estimate --model gpt2 --block-size 0": "block-size 0: allowed are 1 and above",
    "estimate --model gpt2 --kv-cache-dtype fp9": "unknown --kv-cache-dtype 'fp9': did you mean fp8",
    "estimate --model gpt2 --gpu t4 --weight-dtype fp9": "unknown --weight-dtype 'fp9': did you mean",
    "estimate --model gpt2 --gpu t4 --quantization awk": "unknown --quantization 'awk': did you mean awq",
    "estimate --model gpt2 --gpu t4 --weight-bits 8 --quantization fp8": "give one of --weight-bits, --weight-dtype",
    "estimate --model gpt2 --gpu t4 --gpu-memory-utilization 1.2": "gpu-memory-utilization 1.2: allowed",
    "estimate --model gpt2 --gpu t4 --gpu-memory-utilization 0.9 --reserve 10%": "not both",
    "estimate --model gpt2 --gpu t4:0": "allowed is CARD:COUNT with a count of 1 to",
    "estimate --model gpt2 --gpu t4:3 -tp 2": "3 cards, but the parallel sizes ask for 2",
    "estimate --model gpt2 -tp 5": "tensor-parallel-size 5 does not divide the 12 query heads",
    "estimate --model gpt2 --ctx 1k --input-len 5": "give --ctx, or --input-len and --output-len, not both",
    "estimate --model gpt2 --output-len 5": "--output-len needs --input-len",
    "estimate --model gpt2 --max-model-len 1k --input-len 1000 --output-len 1": "beyond --max-model-len 1,000",
    "estimate --model gpt2 --max-model-len long": "max-model-len 'long': allowed are whole numbers from 1",
    "estimate --model gpt2 --max-num-batched-tokens 0": "max-num-batched-tokens '0': allowed",
    "estimate --model gpt2 --max-num-seqs 0": "max-num-seqs 0: allowed are 1 and above",
    "estimate --model gpt2 --shared-prefix 5k": "error: shared prefix 5,120: allowed are 0 to the 4,096 tokens",
    "estimate --model gpt2 --method paged:inner=(fp8": "parentheses do not pair",
    "compare --model gpt2 --engine vllm --engines": "give --engine or --engines, not both",
    "compare --model gpt2 --engines vllm,none": "unknown engine 'none'",
}


@pytest.mark.parametrize("command", BAD)
def test_bad_input_is_one_line_and_exit_2(command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text('{"model_type": ')
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "latin.json").write_bytes(b'{"model_type": "\xe9"}')
    (tmp_path / "alien.json").write_text('{"model_type": "alien", "hidden_size": 512}')
    (tmp_path / "folder.png").mkdir()
    assert run(command.format(tmp=tmp_path).split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("kvsim: error: ")
    assert captured.err.count("\n") == 1
    assert BAD[command] in captured.err


def test_a_hub_that_cannot_be_reached_is_one_line() -> None:
    pytest.importorskip("huggingface_hub")
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


@pytest.mark.parametrize("reachable", [True, False])
def test_a_hub_that_cannot_be_reached_is_not_asked_again(reachable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client would try for half a minute."""
    hub = pytest.importorskip("huggingface_hub")
    asked: list[bool] = []

    def download(name: str, file: str, local_files_only: bool) -> str:
        asked.append(local_files_only)
        raise OSError("no")

    monkeypatch.setattr(hub, "hf_hub_download", download)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("kvsim.models.load._reachable", lambda endpoint: reachable)
    with pytest.raises(LookupError, match="unknown model 'no-one/no-model'"):
        load_model("no-one/no-model")
    assert asked == [not reachable]


def test_a_fault_of_ours_is_not_dressed_up_as_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise KeyError(name)

    monkeypatch.setattr("kvsim.commands.estimate.load_model", broken)
    with pytest.raises(KeyError):
        run(["estimate", "--model", "gpt2"])


@pytest.mark.parametrize("command", ["models --json", "sweep --model gpt2 --ctx 1:200k:1 --json"])
def test_a_reader_that_goes_away_is_no_traceback(command: str) -> None:
    """Nor exit code 1, which says that nothing fits."""
    if command.startswith("sweep"):
        pytest.importorskip("numpy", reason="numpy is not installed")
    child = subprocess.Popen([*CHILD, *command.split()], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.read(10)
    child.stdout.close()
    assert child.stderr.read() == b""
    child.stderr.close()
    assert child.wait() == 0


def seconds(command: Sequence[str], times: int) -> float:
    """Processor time of the quickest of several runs."""

    def spent() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    best = inf
    for _ in range(times):
        before = spent()
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        best = min(best, spent() - before)
    return best


def test_start_is_quick_and_light() -> None:
    """Beside Python's own start, in the same moment: five and a half times was measured."""
    command = [*CHILD, "estimate", "--model", "llama-3-8b", "--ctx", "128k", "--gpu", "h100"]
    assert seconds(command, 8) < 12 * seconds([sys.executable, "-c", "pass"], 8)
    script = "import sys; from kvsim.cli import run; run(sys.argv[1:]); print(*sys.modules)"
    child = subprocess.run([sys.executable, "-c", script, *command[3:]], cwd=ROOT, check=True, capture_output=True)
    loaded = {name.split(".")[0] for name in child.stdout.decode().splitlines()[-1].split()}
    assert not loaded & {"torch", "transformers", "matplotlib", "numpy", "scipy", "rich", "huggingface_hub", "triton"}


def test_vllms_own_words(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--max-model-len 8192 --gpu-memory-utilization 0.95 --max-num-seqs 64 --kv-cache-dtype fp8 --batch 100"
    out = answer(capsys, "estimate", "--model", "llama-3.1-8b", "--gpu", "h100", "--block-size", "32", *flags.split())
    (row,) = out["rows"]
    assert (row["engine"], row["method"], row["ctx"]) == ("vllm", "fp8", 8192)
    assert out["inputs"]["engine_options"].items() >= {"block_size": 32, "max_num_seqs": 64}.items()
    assert out["gpu"]["reserve_nbytes"] == int(out["gpu"]["memory_nbytes"] * (1 - 0.95))
    assert set(out["gpu"]["overhead"]) == {"activation", "non_torch", "cuda_graphs"}
    assert row["max_batch"] == 64
    pool = row["pool"]
    assert pool["num_gpu_blocks"] == out["gpu"]["cache_nbytes"] // pool["block_nbytes"]
    assert pool["block_nbytes"] == 32 * 65536
    assert pool["max_concurrency"] == pool["num_gpu_blocks"] / 256
    assert pool["kv_cache_tokens"] == int(pool["max_concurrency"] * 8192)
    assert "engine vllm, since --block-size is vLLM's" in out["notes"]
    assert any("beyond --max-num-seqs 64" in note for note in out["notes"])
    assert row["tpot_seconds"]["low"] <= row["tpot_seconds"]["value"] <= row["tpot_seconds"]["high"]
    assert row["ttft_seconds"]["low"] <= row["ttft_seconds"]["value"] <= row["ttft_seconds"]["high"]
    assert row["bound"]


def test_the_issues_own_command(capsys: pytest.CaptureFixture[str]) -> None:
    argv = "--batch 8 --input-len 1024 --output-len 128 --weight-dtype fp8 --kv-dtype fp8 --engine vllm"
    out = answer(capsys, "estimate", "--model", "llama-3.1-8b", "--gpu", "h100-sxm", *argv.split())
    (row,) = out["rows"]
    assert (row["ctx"], row["state_nbytes"], row["fits"]) == (1152, 0, True)
    assert row["nbytes"] == (8 * 72 + 1) * 16 * 65536
    assert out["gpu"]["weight_nbytes"] == 8030261248 + 2 * 128256 * 4096  # embedding and head keep 16 bits
    assert {"tpot_seconds", "ttft_seconds", "bound"} <= row.keys()


def test_plan_in_vllms_own_words(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("numpy", reason="numpy is not installed")
    flags = "--block-size 32 --kv-cache-dtype fp8 -q fp8 -tp 1 --max-model-len 32k --users 4"
    out = answer(capsys, "plan", "--model", "llama-3.1-8b", "--gpu", "h100", *flags.split())
    assert [row["method"] for row in out["rows"]] == ["fp8"]
    told = out["inputs"]
    assert (told["engine"], told["max_model_len"], told["weight_bits"]) == ("vllm:block_size=32", 32000, 8)
    out = answer(
        capsys, "plan", "--model=gpt2", "--gpu=t4", "--users=4", "--engine=vllm:max_num_seqs=8", "--block-size=32"
    )
    assert out["inputs"]["engine"] == "vllm:max_num_seqs=8,block_size=32"


def test_requests_that_wait_for_memory_make_no_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    argv = "--model llama-3.1-8b --gpu h100 --input-len 8k --output-len 512 --method fp16"
    few = answer(capsys, "estimate", *argv.split(), "--batch", "53")
    many = answer(capsys, "estimate", *argv.split(), "--batch", "512", code=1)
    (few_row,), (many_row,) = few["rows"], many["rows"]
    assert many_row["tpot_seconds"]["value"] == pytest.approx(few_row["tpot_seconds"]["value"], rel=0.05)
    assert many_row["tokens_per_second"]["value"] == pytest.approx(few_row["tokens_per_second"]["value"], rel=0.05)
    assert any("of 512 requests run at once, the others wait" in note for note in many["notes"])
    assert not any("wait" in note for note in few["notes"])


@pytest.mark.parametrize("flags", ["--max-num-seqs 16", "--gpu-memory-utilization 0.27", "--reserve 73%"])
def test_a_server_that_is_told_to_hold_less_runs_fewer(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = "--model llama-3.1-8b --gpu h100 --engine vllm --method fp16 --input-len 2000 --output-len 500 --batch 64"
    (free,) = answer(capsys, "estimate", *argv.split())["rows"]
    out = answer(capsys, "estimate", *argv.split(), *flags.split(), code=0 if "seqs" in flags else 1)
    (row,) = out["rows"]
    (waiting,) = (note for note in out["notes"] if note.endswith("of 64 requests run at once, the others wait"))
    most = int(waiting.split()[1])
    assert most == 16 if "seqs" in flags else row["max_batch"] <= most < 64  # of requests halfway through
    assert row["tpot_seconds"]["value"] < 0.7 * free["tpot_seconds"]["value"]
    assert row["ttft_seconds"]["value"] > 10 * free["ttft_seconds"]["value"]
    assert row["tokens_per_second"]["value"] == pytest.approx(most / row["tpot_seconds"]["value"])


def test_a_sweep_that_is_stopped_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("numpy", reason="numpy is not installed")

    def stopped(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("kvsim.output.sweep_file.write", stopped)
    assert run(["sweep", "--model", "gpt2", "--out", str(tmp_path / "grid.csv")]) == 130
    assert "stopped: the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["breakeven", "report"])
def test_weights_that_do_not_fit_are_an_answer(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1, and the reason on standard output, in JSON too."""
    out = answer(capsys, command, "--model", "llama-3-70b", "--gpu", "t4", code=1)
    assert out["rows"] == []
    (note,) = out["notes"]
    assert note.startswith("meta-llama/Meta-Llama-3-70B on 1 x t4: the weights leave no room for a cache on one card: ")
    assert "117.92 GiB are missing" in note
    assert run([command, "--model", "llama-3-70b", "--gpu", "t4"]) == 1
    captured = capsys.readouterr()
    assert captured.out.startswith(out["notes"][0])
    assert "Not modelled: " in captured.out
    assert captured.err == ""


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no such device here")
def test_a_report_does_not_replace_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report", "--model", "gpt2", "--gpu", "t4", "--out", "/dev/full"]) == 2
    assert capsys.readouterr().err == "kvsim: error: cannot write /dev/full: No space left on device\n"
    assert Path("/dev/full").is_char_device()


def test_what_does_not_fit_is_exit_1(capsys: pytest.CaptureFixture[str]) -> None:
    out = answer(capsys, "estimate", "--model", "llama-3-70b", "--gpu", "t4", code=1)
    assert not any(row["fits"] for row in out["rows"])
    llama = ("estimate", "--model", "llama-3.1-8b", "--ctx", "128k")
    assert run([*llama, "--gpu", "l4", "--batch", "64", "--method", "fp16"]) == 1
    capsys.readouterr()
    assert run([*llama, "--gpu", "h100", "--batch", "8"]) == 0  # kivi fits, fp16 does not
    shown = capsys.readouterr().out
    assert shown.startswith("8 sequences of 131,072 tokens do not fit h100 with fp16 (71.27 GiB are missing), but with")
    assert "| fp16               | 128.000 |   1.00 | 3 of 8 |" in shown


def test_cards_by_count_and_sharding(capsys: pytest.CaptureFixture[str]) -> None:
    out = answer(capsys, "estimate", "--model", "llama-3.1-8b", "--gpu", "h100-sxm:2", "--method", "fp16")
    assert out["inputs"]["tensor_parallel_size"] == 2
    assert out["gpu"]["count"] == 2
    (row,) = out["rows"]
    assert row["rank_nbytes"] == row["nbytes"] // 2
    assert row["all_ranks_nbytes"] == row["nbytes"]
    one = answer(capsys, "estimate", "--model", "llama-3.1-8b", "--gpu", "h100-sxm", "--method", "fp16")
    assert out["gpu"]["weight_nbytes"] == one["gpu"]["weight_nbytes"] // 2
    ranks = ("-tp", "2", "-pp", "4", "-dp", "2", "--gpu", "h100-sxm:16")
    argv = ("--model", "llama-3.1-8b", "--batch", "6", "--method", "fp16", *ranks)
    assert answer(capsys, "estimate", *argv)["rows"][0]["rank_nbytes"] == 3 * 4096 * 131072 // 8


def test_engines_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    out = answer(capsys, "compare", "--model", "llama-3.1-8b", "--ctx", "1000", "--engines")
    sizes = {row["engine"]: row["total_nbytes"] for row in out["rows"]}
    assert sizes["ideal"] == 1000 * 131072
    assert sizes["vllm"] == (63 + 1) * 16 * 131072
    assert sizes["llama.cpp"] == sizes["kvruntime"] == 1024 * 131072
    assert {reason["engine"] for reason in out["engines"]} == set(ENGINES)
    methods = ("--method", "fp16", "--method", "q8_0")
    assert run(["compare", "--model", "llama-3.1-8b", "--engines", "ideal,vllm,llama.cpp", *methods]) == 0
    text = capsys.readouterr().out
    assert "Why they differ" in text
    assert "vllm: not possible: vllm does not store q8_0" in text


def test_a_shared_prefix_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("--model", "llama-3.1-8b", "--method", "fp16", "--batch", "10", "--ctx", "1000", "--shared-prefix", "600")
    assert answer(capsys, "estimate", *argv)["rows"][0]["nbytes"] == 131072 * (600 + 10 * 400)


@pytest.mark.parametrize(
    "command",
    [
        "estimate --model gpt2",
        "estimate --model gpt2 --gpu t4",
        "compare --model gpt2",
        "compare --model gpt2 --engines",
        "explain --model gpt2",
        "models",
        "models gpt2",
        "hardware",
        "hardware t4",
    ],
)
def test_every_screen_ends_with_what_is_not_modelled(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command.split()) == 0
    *_, last = capsys.readouterr().out.strip().split("\n\n")
    assert last.startswith("Not modelled:\n  ")
    assert run([*command.split(), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["not_modelled"]


@pytest.mark.parametrize(
    ("text", "size"), [("131072", 131072), ("128k", 131072), ("128K", 131072), ("1M", 1 << 20), ("1m", 1 << 20)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "size"),
    [("32k", 32000), ("32K", 32768), ("25.6k", 25600), ("4096", 4096), ("1M", 1 << 20), ("2m", 2 * 10**6)],
)
def test_sizes_as_vllm_reads_them(text: str, size: int) -> None:
    assert parse_human(text, "max-model-len") == size


@pytest.mark.parametrize("text", ["", "k", "0", "-1", "1.5K", "1e3", "k32", "9" * 40])
def test_what_is_no_size_to_vllm(text: str) -> None:
    with pytest.raises(ValueError, match="max-model-len"):
        parse_human(text, "max-model-len")


@pytest.mark.parametrize("text", ["", "k", "1.5k", "1e3", "-1", "0", "0k", "4096 tokens", "1kk", "9" * 40])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="allowed are whole numbers from 1"):
        parse_size(text)


def test_the_model_may_be_the_first_word(capsys: pytest.CaptureFixture[str]) -> None:
    flag = answer(capsys, "estimate", "--model", "qwen3-8b", "--ctx", "1k")
    assert answer(capsys, "estimate", "qwen3-8b", "--ctx", "1k") == flag
    assert answer(capsys, "estimate", "--ctx", "1k", "qwen3-8b") == flag
    assert run(["explain", "gpt2", "--model", "gpt2-xl"]) == 2
    assert capsys.readouterr().err == "kvsim: error: the model is given twice: gpt2 and --model gpt2-xl\n"
    assert run(["breakeven", "--gpu", "h100"]) == 2
    assert "Missing option '--model': kvsim breakeven qwen3-8b, for one" in capsys.readouterr().err


def test_a_count_stuck_to_a_card_is_answered_with_the_form(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["estimate", "qwen3-8b", "--gpu", "2h100"]) == 2
    assert capsys.readouterr().err == "kvsim: error: gpu '2h100': 2 of them are 2xh100 or h100:2\n"
    assert run(["estimate", "qwen3-8b", "--gpu", "4090"]) == 0


@pytest.mark.parametrize("spelling", ["h100-sxm:2", "2xh100", "2 x H100", "h100x2", "h100-sxm x2", "2*h100"])
def test_cards_as_people_write_them(spelling: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = answer(capsys, "estimate", "gpt2", "--gpu", spelling, "--method", "fp16")
    assert (out["gpu"]["id"], out["inputs"]["tensor_parallel_size"]) == ("h100-sxm", 2)


def test_a_card_whose_name_looks_like_a_count_is_that_card() -> None:
    from kvsim.specs import parse_card

    assert [(parse_card(name)[0].id, parse_card(name)[1]) for name in ("mi300x", "8xmi300x", "mi250x:4", "a100x8")] == [
        ("mi300x", None),
        ("mi300x", 8),
        ("mi250x", 4),
        ("a100-sxm-80gb", 8),
    ]
    with pytest.raises(LookupError, match="unknown GPU 'h1000'"):
        parse_card("2xh1000")
    with pytest.raises(ValueError, match="allowed is CARD:COUNT"):
        parse_card("0xh100")


def test_parallel_sizes_as_people_write_them(capsys: pytest.CaptureFixture[str]) -> None:
    short = answer(capsys, "estimate", "gpt2", "--tp", "2", "--pp", "2", "--dp", "3")
    assert short == answer(capsys, "estimate", "gpt2", "-tp", "2", "-pp", "2", "-dp", "3")
    assert short["inputs"]["data_parallel_size"] == 3


def test_models_by_a_part_of_their_names(capsys: pytest.CaptureFixture[str]) -> None:
    found = {row["id"] for row in answer(capsys, "models", "qwen")["rows"]}
    assert "Qwen/Qwen3-8B" in found
    assert all("qwen" in each.lower() for each in found)
    assert [row["id"] for row in answer(capsys, "models", "qwen3-8b")["rows"]] == ["Qwen/Qwen3-8B"]
    assert run(["models", "coder"]) == 0
    assert "Qwen3-Coder-480B-A35B-Instruct" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("estimate qwen3-8", "qwen3-8b"),
        ("estimate --model meta-llama/", "meta-llama/llama-3.1-8b"),
        ("plan gpt2 --gpu h200", "h200-sxm"),
        ("hardware mi3", "mi300x"),
        ("models llama-3.1", "llama-3.1-8b"),
        ("est", "estimate"),
    ],
)
def test_a_shell_completes_commands_models_and_cards(words: str, found: str) -> None:
    from click.shell_completion import ShellComplete

    from kvsim.cli import cli

    *before, begun = words.split()
    offered = [each.value for each in ShellComplete(cli, {}, "kvsim", "_KVSIM_COMPLETE").get_completions(before, begun)]
    assert found in offered
    assert all(each.startswith(begun) for each in offered)


def test_one_sentence_says_what_fits_and_what_to_ask_next(capsys: pytest.CaptureFixture[str]) -> None:
    """What it says is what the rows say; the command that it names is understood."""
    command = ["estimate", "qwen3-8b", "--gpu", "2xh100", "--ctx", "32k", "--batch", "8", "--method", "fp16"]
    row = answer(capsys, *command)["rows"][0]
    assert run(command) == 0
    said, *_ = capsys.readouterr().out.split("\n\n")
    first, further = " ".join(said.split()).split(" Next: ")
    rate, token = row["tokens_per_second"]["value"], 1e3 * row["tpot_seconds"]["value"]
    most = f"at most {row['max_batch']:,} of them, {rate:,.0f} tokens/s ({token:.3g} ms a token)."
    assert first == f"8 sequences of 32,768 tokens fit 2xh100 with fp16, {most}"
    assert further.startswith("kvsim plan qwen3-8b --gpu h100-sxm --users 8 (")
    assert run(["plan", "qwen3-8b", "--gpu", "h100-sxm", "--users", "8"]) == 0


def test_a_sentence_says_how_much_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["estimate", "llama-3-70b", "--gpu", "t4"]) == 1
    assert "The weights leave no room for a cache on t4: " in capsys.readouterr().out
    assert run(["estimate", "llama-3.1-8b", "--gpu", "l4", "--ctx", "128k", "--batch", "64", "--method", "fp16"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("64 sequences of 131,072 tokens do not fit l4: fp16 lacks the least, 1,01")
