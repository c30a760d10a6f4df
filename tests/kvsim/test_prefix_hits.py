"""Prefix caching: hits on a trace, the units of engines, and what they leave of a prefill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvsim.analysis.prefix_hits import Prompt, count_hits, read_prompts, unit, usable
from kvsim.cli import run
from kvsim.engines import Ideal, Vllm
from kvsim.methods import Full
from kvsim.models.load import load_model

COMMAND = ["estimate", "--model", "llama-3.1-8b", "--gpu", "h100-sxm", "--method", "fp16", "--batch", "16"]
COMMAND += ["--input-len", "12000", "--output-len", "300", "--engine", "vllm"]


def prompt(*blocks: int, short: int = 0) -> Prompt:
    return Prompt(512 * len(blocks) - short, blocks)


def test_hits_by_hand() -> None:
    """The first of each is new; the second finds two blocks, the third all of its own but one token."""
    trace = [prompt(1, 2, 3, short=100), prompt(1, 2, 4), prompt(1, 2, 4)]
    found = count_hits(trace)
    assert found.num_tokens == 3 * 1536 - 100
    assert found.num_found == 1024 + 1535
    assert count_hits(trace, step=16).num_found == 1024 + 1520
    assert count_hits(trace, step=784).num_found == 784 + 784
    assert found.share == pytest.approx((1024 + 1535) / (3 * 1536 - 100))


def test_a_small_cache_forgets_the_oldest_and_of_a_prompt_the_last() -> None:
    trace = [prompt(1, 2, 3), prompt(7, 8), prompt(1, 2, 3)]
    assert count_hits(trace).num_found == 1535
    assert count_hits(trace, 4 * 512).num_found == 1024  # block 3 went first
    assert count_hits(trace, 3 * 512).num_found == 512
    assert count_hits(trace, 2 * 512).num_found == 0
    assert count_hits(trace, 0).num_found == 0
    shares = [count_hits(trace, blocks * 512).share for blocks in range(7)]
    assert shares == sorted(shares)


def test_what_is_usable() -> None:
    assert [usable(found, 100, 16) for found in (0, 15, 16, 99, 100)] == [0, 0, 16, 96, 96]
    assert usable(128, 128, 16) == 112  # one token at least is computed
    assert usable(5, 1, 1) == 0


def test_units_are_the_engines_own() -> None:
    """A block of 16; a hybrid's 784, which a page of states needs (vLLM 0.19 logs it of Qwen3.5-27B)."""
    llama, hybrid = load_model("llama-3.1-8b"), load_model("qwen3.5-27b")
    assert unit(Ideal(), llama, Full()) == 1
    assert unit(Vllm(), llama, Full()) == 16
    assert unit(Vllm(block_size=64), llama, Full()) == 64
    assert unit(Vllm(), hybrid, Full()) == 784


def test_a_share_is_left_out_of_the_prefill(capsys) -> None:
    rows = {}
    for share in ("0%", "60%", "0.9"):
        assert run([*COMMAND, "--prefix-hits", share, "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        rows[share] = document["rows"][0]
    first = [rows[share]["ttft_seconds"]["value"] for share in rows]
    token = [rows[share]["tpot_seconds"]["value"] for share in rows]
    assert first == sorted(first, reverse=True)
    assert token == sorted(token, reverse=True)
    assert first[1] < 0.6 * first[0]
    assert any("10,800 of 12,000 tokens of a prompt found, in units of 16" in note for note in document["notes"])


def test_a_trace_is_counted_in_the_room_of_the_card(tmp_path: Path, capsys) -> None:
    path = tmp_path / "trace.jsonl"
    rows = [{"input_length": 1000, "hash_ids": [0, number], "output_length": 5} for number in (1, 2, 3, 4)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert len(read_prompts(path)) == 4
    assert run([*COMMAND, "--prefix-hits", str(path)]) == 0
    assert "38.4% of the trace's prompts found (4 requests in turn, a cache of 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no requests"),
        ("{}", "line 1: no object with input_length"),
        ("[1]", "line 1: no object"),
        ('{"input_length": 600, "hash_ids": [1]}', "1 blocks of 512 for 600 tokens"),
        ('{"input_length": 0, "hash_ids": []}', "0 blocks of 512 for 0 tokens"),
    ],
)
def test_what_is_no_trace(text: str, message: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    assert run([*COMMAND, "--prefix-hits", str(path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("given", ["100%", "1.5", "none.jsonl", "."])
def test_what_is_no_share(given: str, capsys) -> None:
    assert run([*COMMAND, "--prefix-hits", given]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert run([*COMMAND, "--prefix-hits", "50%", "--shared-prefix", "1k"]) == 2
    assert "not both" in capsys.readouterr().err
