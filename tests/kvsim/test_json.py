"""The JSON schema: every command's keys and types as kvsim/output/schema.py lists and docs/json.md documents them."""

import json
from pathlib import Path
from typing import Any

import pytest

from kvsim.cli import run
from kvsim.output.not_modelled import NOT_MODELLED
from kvsim.output.schema import (
    BAND,
    DOCTOR_ROW,
    ENVELOPE,
    ESTIMATE_ROW,
    GPU,
    GPU_ROW,
    POOL,
    ROW,
    VERSIONS,
)

DOCUMENT = Path(__file__).parents[2] / "docs" / "json.md"
LOG = "llama_kv_cache: size =  112.00 MiB ( 2048 cells, 28 layers,  1/1 seqs), K (f16): 56.00 MiB, V (f16): 56.00 MiB"

COMMANDS: dict[str, tuple[str, dict[str, Any]]] = {
    "estimate --model gpt2": ("estimate", ESTIMATE_ROW),
    "estimate --model gpt2 --gpu t4": ("estimate", ESTIMATE_ROW | GPU_ROW),
    "estimate --model llama-3.1-8b --gpu h100 --engine vllm": ("estimate", ESTIMATE_ROW | GPU_ROW | {"pool": dict}),
    "estimate --model llama-3.1-8b --gpu h100:2 --engine vllm --input-len 100 --output-len 10": (
        "estimate",
        ESTIMATE_ROW | GPU_ROW | {"pool": dict},
    ),
    "estimate --model Qwen/Qwen3-Next-80B-A3B-Instruct --method fp8": ("estimate", ESTIMATE_ROW),
    "compare --model gpt2": ("compare", ROW),
    "compare --model google/gemma-3-27b-it --engines": ("compare", ROW),
    "explain --model deepseek-ai/DeepSeek-V3.2 --method fp8": ("explain", ROW | {"numbers": list, "formulas": list}),
    "plot --model gpt2 -o {tmp}/picture.svg": ("plot", ROW),
    "models": ("models", {"id": str, "aliases": list, "source": str, "layers": list, "num_layers": int}),
    "hardware": ("hardware", {"id": str, "aliases": list, "source": str, "memory_source": str}),
    "doctor --log {tmp}/engine.log": ("doctor", DOCTOR_ROW),
}


def holds(value: dict[str, Any], schema: dict[str, Any], exactly: bool) -> None:
    """``value`` has every key of ``schema`` in its type, and where ``exactly`` no other."""
    assert not schema.keys() - value.keys()
    if exactly:
        assert not value.keys() - schema.keys()
    for key, kind in schema.items():
        assert isinstance(value[key], kind), (key, value[key])
        assert not (isinstance(value[key], bool) and kind is not bool), key


@pytest.mark.parametrize("command", COMMANDS)
def test_every_answer_has_its_keys_and_types(command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if command.startswith("plot"):
        pytest.importorskip("matplotlib", reason="the plot extra (matplotlib) is not installed")
    (tmp_path / "engine.log").write_text(LOG)
    name, row_schema = COMMANDS[command]
    assert run([*command.format(tmp=tmp_path).split(), "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    holds(out, ENVELOPE, exactly=False)
    assert out["schema"] == f"kvsim.{name}/{VERSIONS[name]}"
    assert out["not_modelled"] == list(NOT_MODELLED[name])
    assert out["rows"]
    for row in out["rows"]:
        holds(row, row_schema, exactly=name not in ("models", "hardware"))
        for key in ("tpot_seconds", "ttft_seconds"):
            if row.get(key) is not None:
                holds(row[key], BAND, exactly=True)
                assert row[key]["low"] <= row[key]["value"] <= row[key]["high"]
        if "pool" in row:
            holds(row["pool"], POOL, exactly=True)
        if "nbytes" in row and name != "doctor":
            assert row["nbytes"] == sum(row["parts"].values()) == sum(row["split"].values())
            assert row["total_nbytes"] == row["nbytes"] + row["state_nbytes"] + row["index_nbytes"]
    if "gpu" in out:
        holds(out["gpu"], GPU, exactly=True)


def test_every_command_has_a_version_and_says_what_it_leaves_out() -> None:
    others = {
        "calibrate",
        "plan",
        "breakeven",
        "goodput",
        "offload",
        "sweep",
        "sweep-summary",
        "page",
        "serve",
    }  # their own tests
    assert VERSIONS.keys() == NOT_MODELLED.keys() == {name for name, _ in COMMANDS.values()} | others


def test_every_key_is_documented() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    for schema in (ENVELOPE, ESTIMATE_ROW, GPU_ROW, POOL, GPU, DOCTOR_ROW, BAND):
        for key in schema:
            assert f"`{key}`" in text, key
    for name in VERSIONS:
        assert name in text
