"""kvsim offload: seconds are bytes over bandwidth, the break-even is tight, and the screen and JSON say so."""

from __future__ import annotations

import json

import pytest

from kvsim.analysis.offload import LATENCY, LINK_EFFICIENCY, Tier, offload, tier
from kvsim.cli import run
from kvsim.hardware import find_hardware
from kvsim.latency.roofline import Roofline
from kvsim.latency.steps import prefill
from kvsim.methods import make_method
from kvsim.models.load import load_model

LLAMA, V3 = load_model("llama-3.1-8b"), load_model("deepseek-v3")
H100, H200 = find_hardware("h100-sxm"), find_hardware("h200-sxm")
FP16, FP8 = make_method("fp16"), make_method("fp8")
COMMAND = ["offload", "--model", "llama-3.1-8b", "--gpu", "h100-sxm"]


def one(place: Tier, method=FP16, tokens: int = 32768, **more):
    (row,) = offload(LLAMA, method, H100, [place], tokens, **more)
    return row


def test_seconds_are_bytes_over_bandwidth() -> None:
    row = one(Tier("cpu", 50e9))
    nbytes = 32768 * 131072
    assert row.nbytes == nbytes
    assert row.load_seconds == pytest.approx(LATENCY["cpu"] + nbytes / 50e9)
    assert row.step_seconds == row.load_seconds  # a step reads all of it
    alone = prefill(LLAMA, H100, 1, 32768).seconds.value
    assert row.recompute.value == pytest.approx(alone - Roofline(LLAMA, H100).fixed.prefill_seconds, rel=1e-3)
    assert row.gain == pytest.approx(row.recompute.value / row.load_seconds)
    half = one(Tier("cpu", 50e9), FP8)
    assert half.nbytes == nbytes // 2
    two = one(Tier("cpu", 50e9), num_cards=2)
    assert two.nbytes == nbytes
    assert two.load_seconds == pytest.approx(LATENCY["cpu"] + nbytes / 2 / 50e9)


@pytest.mark.parametrize("bandwidth", [7e9, 5e9, 3e9])
def test_from_there_on_loading_takes_less_than_the_arithmetic(bandwidth: float) -> None:
    place = Tier("nvme", bandwidth)
    first = one(place).sooner_from
    assert first is not None
    roofline = Roofline(LLAMA, H100)
    for tokens, sooner in ((first, True), (first - 1, False)):
        if tokens:
            assert (place.seconds(tokens * 131072) < roofline.prompt(1, tokens, tokens)[0]) == sooner
    assert one(Tier("nvme", 1e6)).sooner_from is None


def test_a_latent_is_read_by_every_card() -> None:
    (row,) = offload(V3, FP16, H200, [Tier("cpu", 50e9)], 4096, num_cards=8)
    assert row.step_seconds == pytest.approx(row.load_seconds)
    assert row.load_seconds == pytest.approx(LATENCY["cpu"] + 4096 * 70272 / 50e9)


def test_tiers_are_those_of_the_card() -> None:
    assert tier("cpu", H100).bandwidth == 64e9 * LINK_EFFICIENCY
    assert tier("cpu", find_hardware("l4")).bandwidth == 32e9 * LINK_EFFICIENCY
    assert tier("cpu", find_hardware("gb200")).bandwidth == 450e9 * LINK_EFFICIENCY
    assert tier("cpu", H100, 1e9).bandwidth == 1e9
    with pytest.raises(ValueError, match="link of apple-m1 to its host is not known"):
        tier("cpu", find_hardware("apple-m1"))
    with pytest.raises(ValueError, match="allowed are cpu, nvme, remote"):
        tier("tape", H100)


def test_the_published_gain_is_within_reach() -> None:
    """vLLM's prompts come 2 to 22 times sooner from the host's memory (blog.vllm.ai 2026-01-08, an H100, by length)."""
    gains = [one(tier("cpu", H100), tokens=tokens).gain for tokens in (512, 4096, 65536)]
    assert 2 < gains[1] < 22
    assert gains[1] < gains[2] < 30


def test_the_command(capsys) -> None:
    assert run([*COMMAND, "--tier", "cpu", "--tier", "nvme=14", "--ctx", "8k"]) == 0
    out = capsys.readouterr().out
    assert "each card from cpu 51.2 GB/s, nvme 14 GB/s" in out
    assert out.strip().splitlines()[-1].startswith("Not modelled:")
    assert run([*COMMAND, "--json", "--price", "2"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "kvsim.offload/1"
    assert len(document["rows"]) == 2 * 3 * 3
    for row in document["rows"]:
        assert row["usd_saved"] == pytest.approx(row["recompute_seconds"]["value"] * 2 / 3600)
    assert run([*COMMAND[:2], "deepseek-v3", "--gpu", "h200:8", "--method", "kivi"]) == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tier", "tape"], "allowed are cpu, nvme, remote"),
        (["--tier", "nvme=fast"], "GB/s above 0"),
        (["--tier", "nvme=0"], "GB/s above 0"),
        (["--ctx", "0"], "allowed are whole numbers"),
        (["--price", "0"], "dollars a card-hour above 0"),
        (["--method", "fp15"], "unknown method"),
    ],
)
def test_bad_input_is_one_line(more: list[str], message: str, capsys) -> None:
    assert run([*COMMAND, *more]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert message in err
    assert "left out" not in err  # it is not the method that is wrong
    assert err.count("\n") == 1
