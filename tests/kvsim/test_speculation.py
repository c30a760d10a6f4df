"""Speculative decoding: tokens a step against published tables, and what a step and its draft cost."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from kvsim.cli import run
from kvsim.hardware import find_hardware
from kvsim.latency.roofline import Roofline, Serving
from kvsim.latency.speculation import Speculation, own_layer, rate_by_position, speculative_step, verify_parts
from kvsim.latency.steps import decode_step
from kvsim.methods import Full
from kvsim.models.load import load_model
from kvsim.specs import parse_speculation

LLAMA, V3 = load_model("llama-3-8b"), load_model("deepseek-v3")
H100 = find_hardware("h100-sxm")
COMMAND = ["estimate", "--model", "llama-3.1-8b", "--gpu", "h100-sxm", "--method", "fp16", "--ctx", "4k"]

LOGGED = [
    ((0.77, 0.45, 0.24), 1.0, 2.46),
    ((0.81, 0.74, 0.70, 0.68, 0.66), 1.0, 4.59),
    ((0.81, 0.74, 0.70, 0.68, 0.66), 993 / (993 + 821), 2.96),
]
"""Shares kept by position, share of the steps with a proposal, tokens a step: vllm-project/vllm pull request 24344,
EAGLE and n-gram on edits (821 steps found nothing to propose)."""


@pytest.mark.parametrize(("kept", "proposed", "published"), LOGGED)
def test_tokens_a_step_are_those_that_vllm_logged(kept: tuple[float, ...], proposed: float, published: float) -> None:
    assert Speculation("ngram", kept, proposed).tokens_a_step == pytest.approx(published, rel=0.01)


def test_one_rate_carries_a_length_to_another() -> None:
    """EAGLE of Llama-3-8B: 1.89 tokens a step of two proposed, 2.08 of four (vllm-project/vllm pull request 16035): a
    rate of 0.573 gives the first, and promises 2.20 of four, 6 % too many."""
    two, four = (Speculation("mtp", rate_by_position(0.573, count)).tokens_a_step for count in (2, 4))
    assert two == pytest.approx(1.89, rel=0.01)
    assert 1 < four / 2.08 < 1.07


def test_a_gain_is_inside_the_published_band() -> None:
    """There two proposed gained 36 % and four 29 % of one sequence's speed, with a host between all steps."""
    plain = decode_step(LLAMA, Full(), H100, 1, 256).seconds.value
    for kept, length, gain in (((0.573, 0.317), 1.89, 1.364), ((0.573, 0.317, 0.12, 0.07), 2.08, 1.288)):
        spec = Speculation("mtp", kept)
        assert spec.tokens_a_step == pytest.approx(length, rel=0.01)
        step = speculative_step(LLAMA, Full(), H100, 1, 256, spec)
        assert step.seconds.low < plain / gain < step.seconds.high


def test_a_step_reads_once_and_multiplies_for_all() -> None:
    spec = Speculation("ngram", (0.5, 0.25, 0.125))
    step, plain = speculative_step(LLAMA, Full(), H100, 1, 4096, spec), decode_step(LLAMA, Full(), H100, 1, 4096)
    assert step.parts["weights"] * spec.tokens_a_step == pytest.approx(plain.parts["weights"])
    assert step.parts["kv"] * spec.tokens_a_step == pytest.approx(plain.parts["kv"])
    assert step.parts["draft"] == 0
    assert sum(step.parts.values()) == pytest.approx(step.seconds.value)
    wide = verify_parts(Roofline(LLAMA, H100), Full(), 256, 64, 4)
    assert wide["compute"] > verify_parts(Roofline(LLAMA, H100), Full(), 256, 64, 1)["compute"]
    latent = Roofline(V3, find_hardware("h200-sxm"), Serving(tensor_parallel=8))
    assert verify_parts(latent, Full(), 8, 1 << 17, 9)["kv"] > 1.5 * verify_parts(latent, Full(), 8, 1 << 17, 1)["kv"]


def test_drafts_pay_at_small_batches_and_not_at_large() -> None:
    gains, small = [], load_model("llama-3.2-1b")
    for batch, rate in ((1, 0.8), (512, 0.6)):
        spec = Speculation("draft", rate_by_position(rate, 4), draft=small)
        plain = decode_step(LLAMA, Full(), H100, batch, 1024).seconds.value
        gains.append(plain / speculative_step(LLAMA, Full(), H100, batch, 1024, spec).seconds.value)
    assert gains[0] > 1.3
    assert gains[1] < 1


def test_a_prediction_layer_is_a_block_of_the_model() -> None:
    """DeepSeek-V3's weighs 11.5 billion parameters without table and head (its report: 14 with them)."""
    layer = own_layer(V3)
    assert len(layer.layers) == 1
    assert layer.num_blocks == 1
    assert layer.weights.dense + layer.weights.routed == pytest.approx(11.5e9, rel=0.06)
    assert len(Speculation("mtp", (0.8,)).with_draft(V3).layers) == len(V3.layers) + 1
    with pytest.raises(ValueError, match="does not tell the number of weights"):
        own_layer(replace(V3, weights=None))


def test_estimate_counts_a_draft(capsys) -> None:
    """Its weights and its cache come off the card, its time is in the token's."""
    rows = {}
    for spec in ("", "ngram:tokens=4,acceptance=0.5", "draft:model=llama-3.2-1b,tokens=4,acceptance=0.7"):
        assert run([*COMMAND, *(["--speculate", spec] if spec else []), "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        rows[spec[:5]] = document["rows"][0], document["gpu"]["overhead"].get("draft_weights", 0), document["notes"]
    assert rows["ngram"][1] == rows[""][1] == 0
    assert rows["draft"][1] == pytest.approx(2 * load_model("llama-3.2-1b").num_params, rel=1e-3)
    small = 16 * 8 * 64 * 2 * 2  # 16 layers of 8 heads of 64
    assert rows["draft"][0]["nbytes"] - rows[""][0]["nbytes"] == 4096 * small
    assert rows["draft"][0]["max_batch"] < rows[""][0]["max_batch"]
    assert rows["draft"][0]["tpot_seconds"]["value"] < rows[""][0]["tpot_seconds"]["value"]
    assert any("2.77 tokens come of a step" in note for note in rows["draft"][2])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mtp", "acceptance always"),
        ("mtp:acceptance=2", "shares from 0 to 1"),
        ("mtp:acceptance=0.5/0.7", "no higher"),
        ("mtp:tokens=3,acceptance=0.5/0.4", "2 shares for 3 tokens"),
        ("mtp:tokens=99,acceptance=0.5", "1 to 64"),
        ("mtp:acceptance=high", "is not a number"),
        ("mtp:acceptance=0.5,proposed=0.5", "allowed are draft:model"),
        ("draft:acceptance=0.5", "draft needs model=NAME"),
        ("medusa:acceptance=0.5", "allowed are draft:model"),
    ],
)
def test_what_is_no_speculation(text: str, message: str, capsys) -> None:
    with pytest.raises(ValueError, match=message):
        parse_speculation(text)
    assert run([*COMMAND, "--speculate", text]) == 2
    assert capsys.readouterr().err.count("\n") == 1
