"""Arrivals: the simulation against the steady state's formulas, what is conserved, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from statistics import fmean

import pytest

pytest.importorskip("numpy", reason="numpy is not installed")

from kvsim.analysis.arrivals import Request, Server, at_rate, drawn, most_at, simulate
from kvsim.analysis.plan import site
from kvsim.analysis.request_lengths import constant
from kvsim.cli import run
from kvsim.hardware import find_hardware
from kvsim.latency.roofline import Serving
from kvsim.latency.steps import decode_step, prefill, token_step
from kvsim.memory.sharding import Sharding
from kvsim.methods import Full
from kvsim.models.load import load_model
from kvsim.specs import parse_lengths

LLAMA, V3 = load_model("llama-3.1-8b"), load_model("deepseek-v3")
H100, H200 = find_hardware("h100-sxm"), find_hardware("h200-sxm")
PLACE = site(LLAMA, H100, 1)
SERVER = Server(LLAMA, Full(), PLACE)
COMMAND = ["goodput", "--model", "llama-3.1-8b", "--gpu", "h100-sxm", "--method", "fp16", "--requests", "40"]
COMMAND += ["--output-len", "64"]


@pytest.mark.parametrize(
    ("users", "given", "made"), [(1, 1024, 256), (16, 1024, 256), (64, 1024, 256), (128, 512, 512), (32, 4096, 128)]
)
def test_a_full_server_takes_what_the_formulas_say(users: int, given: int, made: int) -> None:
    """So many users always in flight: seconds a token within 8 % of the steady state's."""
    seen = simulate(SERVER, [Request(0.0, given, made) for _ in range(8 * users)], users)
    token = fmean(request.per_token for request in seen.counted)
    card = replace(H100, memory_nbytes=None)
    assert token == pytest.approx(token_step(LLAMA, Full(), card, users, given, made).seconds.value, rel=0.08)
    assert seen.mean_decoding <= users


def test_attention_replicas_too() -> None:
    """An eighth of DeepSeek-V3's users on each of 8 cards that share the experts."""
    sharding = Sharding(data_parallel_size=8, enable_expert_parallel=True)
    server = Server(V3, Full(), site(V3, H200, 8, sharding=sharding))
    seen = simulate(server, [Request(0.0, 1000, 200) for _ in range(128)], 16)
    token = fmean(request.per_token for request in seen.counted)
    card, serving = replace(H200, memory_nbytes=None), Serving(sharding=sharding)
    assert token == pytest.approx(token_step(V3, Full(), card, 16, 1000, 200, serving).seconds.value, rel=0.1)


def test_one_at_a_time_waits_for_nobody() -> None:
    served = at_rate(SERVER, drawn(constant(2048, 128), 60, 1), 0.01, None, None)
    assert served.first[0] == pytest.approx(prefill(LLAMA, H100, 1, 2048).seconds.value, rel=0.06)
    assert served.token[0] == pytest.approx(decode_step(LLAMA, Full(), H100, 1, 2112).seconds.value, rel=0.02)
    assert served.first == pytest.approx((served.first[0],) * 2, rel=0.2)
    assert served.mean_decoding == pytest.approx(1, rel=0.02)


def test_every_token_is_written_once() -> None:
    lengths = parse_lengths("lognormal:mean=1500,sigma=1", 100)
    draws = drawn(lengths, 150, 3)
    seen = simulate(SERVER, [Request(at / 20, given, made) for at, given, made in draws])
    for request in seen.requests:
        assert request.written == request.made
        assert request.arrival < request.first <= request.end
        assert request.computed == request.to_compute + request.made - 1
    assert fmean(given for _, given, _ in draws) == pytest.approx(lengths.mean_input, rel=0.25)
    assert draws[-1][0] / len(draws) == pytest.approx(1, rel=0.2)


def test_the_newest_goes_where_memory_runs_out() -> None:
    """Room for 6,000 tokens: answers outgrow it, prompts are computed again, and all end."""
    small = Server(LLAMA, Full(), replace(PLACE, cache_nbytes=6000 * 131072))
    seen = simulate(small, [Request(0.0, 500, 1500) for _ in range(12)])
    assert sum(request.preempted for request in seen.requests) > 0
    assert all(request.written == 1500 for request in seen.requests)
    assert seen.seconds > simulate(SERVER, [Request(0.0, 500, 1500) for _ in range(12)]).seconds
    few = simulate(Server(LLAMA, Full(), PLACE, max_num_seqs=3), [Request(0.0, 500, 100) for _ in range(12)])
    assert few.mean_decoding <= 3
    with pytest.raises(ValueError, match="does not fit beside the weights"):
        simulate(small, [Request(0.0, 7000, 10)])


def test_the_highest_rate_is_one() -> None:
    draws = drawn(constant(2048, 64), 80, 0)
    best = most_at(SERVER, draws, 1.0, 0.03)
    assert best.share >= 0.9
    assert at_rate(SERVER, draws, best.rate * 1.3, 1.0, 0.03).share < 0.9
    assert best.first[0] <= 1
    assert best.token[0] <= 0.03
    strict = most_at(SERVER, draws, 0.2, 0.03)
    assert strict.rate < best.rate
    assert most_at(SERVER, draws, 0.01, None) is None


def test_the_command(capsys) -> None:
    assert run([*COMMAND, "--slo-ttft", "1s", "--slo-tpot", "25ms", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "kvsim.goodput/1"
    rates = [row["requests_per_second"] for row in document["rows"]]
    assert rates == sorted(rates)
    assert [row["highest"] for row in document["rows"]].count(True) == 1
    assert run([*COMMAND, "--rate", "1,4"]) == 0
    out = capsys.readouterr().out
    assert "no limits" in out
    assert "40 requests a rate, seed 0" in out
    assert run([*COMMAND, "--slo-ttft", "1ms"]) == 1
    assert run(["goodput", "--model", "gpt2", "--gpu", "t4", "--requests", "20", "--rate", "5"]) == 0
    assert "beyond the model's 1,024 positions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--rate", "fast"], "requests a second"),
        (["--rate", "0"], "requests a second"),
        (["--share", "0%"], "above 0% to 100%"),
        (["--slo-ttft", "soon"], "allowed are times"),
        (["-dp", "2", "--gpu", "h100-sxm"], "given 2 times"),
        (["--seed", "x"], "not a valid integer"),
        (["--input-len", "10M", "--rate", "1"], "does not fit"),
    ],
)
def test_bad_input_is_one_line(more: list[str], message: str, capsys) -> None:
    assert run([*COMMAND, *more]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert message in err
    assert err.count("\n") == 1
