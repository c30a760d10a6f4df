"""Prefill and decode apart: flows balance, limits hold, a simulated queue waits as long, and the command shows it."""

from __future__ import annotations

import json
import random
from statistics import fmean

import pytest

pytest.importorskip("numpy", reason="numpy is not installed")

from kvsim.analysis.disaggregated import LOAD, _Prefill, apart
from kvsim.analysis.plan import Demand, plan
from kvsim.analysis.request_lengths import constant
from kvsim.cli import run
from kvsim.hardware import find_hardware, lowest
from kvsim.latency.exchange import NETWORK_BANDWIDTH, NETWORK_EFFICIENCY
from kvsim.latency.roofline import Serving
from kvsim.latency.steps import Band, decode_step
from kvsim.memory.sharding import Sharding
from kvsim.methods import make_method
from kvsim.models.load import load_model
from kvsim.specs import parse_lengths

LLAMA, V3 = load_model("llama-3.1-70b"), load_model("deepseek-v3")
H100, H200 = find_hardware("h100-sxm"), find_hardware("h200-sxm")
FP8 = make_method("fp8")
COMMAND = ["plan", "--model", "llama-3.1-8b", "--gpu", "h100-sxm:1", "--users", "100", "--input-len", "4k"]


def ways(model=LLAMA, card=H100, users=200, lengths=None, **limits):
    demand = Demand(users, lengths or constant(8000, 300), **limits)
    return apart(model, [FP8], [(card, 8)], demand, lambda each, count: lowest(each.id, count))


def test_what_goes_in_comes_out() -> None:
    """As many requests as users are between their start and their last token (Little's law), and none is late."""
    (way,) = ways(slo_tpot=0.05, slo_ttft=5.0)
    inside = way.requests_per_second * (300 * way.tpot.value + way.ttft.value - way.tpot.value)
    assert inside == pytest.approx(200, rel=0.01)
    assert way.tokens_per_second == pytest.approx(300 * way.requests_per_second)
    assert way.tpot.value <= 0.05
    assert way.ttft.value <= 5
    assert way.load <= LOAD
    assert way.num_cards == way.num_prefill_cards + way.num_decode_cards
    assert way.usd_per_mtok == pytest.approx(
        way.price.usd_per_hour * way.num_cards / 3600 / way.tokens_per_second * 1e6
    )
    step = decode_step(LLAMA, FP8, H100, way.batch_size, 8150, Serving(sharding=way.decode)).seconds
    assert way.tpot == step


def test_the_transfer_is_the_prompts_cache_over_the_network() -> None:
    (way,) = ways()
    nbytes = 8000 * 80 * 2 * 8 * 128
    assert way.transfer_nbytes == nbytes
    each = nbytes / 8 / (NETWORK_BANDWIDTH * NETWORK_EFFICIENCY)
    assert way.transfer_seconds == pytest.approx(each)


def test_a_shorter_limit_takes_more_prefill() -> None:
    (loose,) = ways(slo_ttft=20.0)
    limit = 0.97 * loose.ttft.value
    (tight,) = ways(slo_ttft=limit)
    assert tight.num_prefill_cards > loose.num_prefill_cards
    assert tight.ttft.value <= limit
    assert ways(slo_ttft=0.1) == []
    assert ways(slo_tpot=1e-4) == []


def test_a_mixture_is_decoded_over_all_cards() -> None:
    (way,) = ways(V3, H200, 1000, constant(4096, 1024), slo_tpot=0.05)
    assert way.decode.enable_expert_parallel
    together = plan(
        V3, [FP8], [(H200, 8)], Demand(1000, constant(4096, 1024), 0.05), lambda card, count: lowest(card.id, count)
    )
    best = next(each for each in together if each.refusal is None)
    assert way.num_cards <= best.num_cards


def test_lengths_that_vary_wait_longer() -> None:
    steady, varied = ways()[0], ways(lengths=parse_lengths("lognormal:mean=8000,sigma=0.8", 300))[0]
    assert varied.ttft.value > 1.5 * steady.ttft.value


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_a_simulated_queue_waits_as_long(load: float) -> None:
    """One replica, random arrivals, prompts of two lengths: the mean of 40,000 waits is that of the formula."""
    draw, services = random.Random(7), (0.1, 0.4)
    mean, squared = fmean(services), fmean(each**2 for each in services)
    side = _Prefill(Sharding(), Band(mean, mean, mean), Band(mean, mean, mean), 1 / mean, squared, 0)
    rate = load / mean
    clock = free = 0.0
    waits = []
    for _ in range(40_000):
        clock += draw.expovariate(rate)
        waits.append(max(0.0, free - clock))
        free = max(free, clock) + draw.choice(services)
    assert fmean(waits) == pytest.approx(side.wait(rate), rel=0.15)
    assert side.wait(rate=1 / mean) == float("inf")


def test_the_command(capsys) -> None:
    assert run([*COMMAND, "--disaggregated"]) == 0
    assert "Prefill and decode on cards of their own:" in capsys.readouterr().out
    assert run([*COMMAND, "--disaggregated", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["disaggregated"]
    assert rows
    for row in rows:
        assert row["num_cards"] == row["prefill"]["cards"] + row["decode"]["cards"]
        assert row["ttft_seconds"]["low"] <= row["ttft_seconds"]["value"] <= row["ttft_seconds"]["high"]
    assert run([*COMMAND, "--json"]) == 0
    assert "disaggregated" not in json.loads(capsys.readouterr().out)
    assert run([*COMMAND, "--disaggregated", "-tp", "1"]) == 2
    assert "give no parallel sizes" in capsys.readouterr().err
