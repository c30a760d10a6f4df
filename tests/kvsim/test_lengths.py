"""Request lengths keep their means; the probability that memory runs out agrees with drawing requests."""

from __future__ import annotations

from math import exp
from pathlib import Path

import pytest

np = pytest.importorskip("numpy", reason="numpy is not installed")

from kvsim.analysis.memory_risk import MemoryRisk  # noqa: E402
from kvsim.analysis.request_lengths import Lengths, constant, lognormal, read_trace  # noqa: E402
from kvsim.memory.estimate import cache_nbytes  # noqa: E402
from kvsim.methods import make_method  # noqa: E402
from kvsim.models.load import load_model  # noqa: E402
from kvsim.specs import parse_lengths  # noqa: E402


def test_constants() -> None:
    lengths = constant(2048, 512)
    assert (lengths.mean_input, lengths.mean_output, lengths.mean_context) == (2048, 512, 2304)
    assert (lengths.longest, lengths.input_quantile(0.95)) == (2560, 2048)


@pytest.mark.parametrize(("mean", "sigma"), [(2000, 0.8), (500, 1.5), (30, 0.3)])
def test_a_lognormal_keeps_mean_spread_and_quantiles(mean: float, sigma: float) -> None:
    lengths = lognormal(mean, sigma, 100)
    assert sum(weight for *_, weight in lengths.points) == pytest.approx(1)
    assert lengths.mean_input == pytest.approx(mean, rel=0.005)
    second = sum(weight * given**2 for given, _, weight in lengths.points)
    assert second / mean**2 == pytest.approx(exp(sigma**2), rel=0.02)  # the tail beyond 1e-7 is left out
    assert lengths.input_quantile(0.95) == pytest.approx(mean * exp(-(sigma**2) / 2 + 1.6449 * sigma), rel=0.08)


def test_outputs_of_their_own() -> None:
    lengths = parse_lengths("lognormal:mean=2k,sigma=0.8,output_mean=300,output_sigma=0.6,max=16k", 1)
    assert lengths.mean_input == pytest.approx(2048, rel=0.01)
    assert lengths.mean_output == pytest.approx(300, rel=0.01)
    assert max(given for given, *_ in lengths.points) <= 16384


@pytest.mark.parametrize(
    "text",
    [
        "lognormal",
        "lognormal:mean=2000",
        "lognormal:mean=2000,sigma=0",
        "lognormal:mean=x,sigma=1",
        "lognormal:mean=2000,sigma=1,shape=3",
        "lognormal:mean=2000,sigma=1,output_mean=4",
        "lognormal:mean=nan,sigma=1",
        "lognormal:mean=2000,sigma=nan",
        "no-such-file.csv",
        "uniform:1,2",
    ],
)
def test_bad_lengths_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"lengths|lognormal"):
        parse_lengths(text, 10)


def test_a_trace(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n1,100,10\n2,300,30\n3,100,10\n4,0,5\n")
    lengths = read_trace(file, 7)
    assert {(given, made): weight for given, made, weight in lengths.points} == {
        (100, 10): 0.5,
        (300, 30): 0.25,
        (1, 5): 0.25,
    }
    file.write_text("prompt_tokens\n12\n")
    assert read_trace(file, 7).points == ((12, 7, 1.0),)


@pytest.mark.parametrize(
    "text", ["", "a,b\n1,2\n", "input_len,output_len\n1,x\n", "input_len,output_len\n1\n", "input_len\n"]
)
def test_bad_traces_name_the_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"trace\.csv"):
        read_trace(file, 7)


def test_cutting_keeps_the_weight() -> None:
    lengths, share = Lengths(((100, 10, 0.5), (3000, 100, 0.25), (50, 4000, 0.25)), "").cut(1000)
    assert share == 0.5
    assert sorted(lengths.points) == [(50, 950, 0.25), (100, 10, 0.5), (999, 1, 0.25)]
    assert constant(5, 5).cut(10) == (constant(5, 5), 0.0)


def weigh(name: str):
    model, method = load_model("llama-3-8b"), make_method(name)
    return lambda batch, tokens: cache_nbytes(model, method, batch, tokens)


def draw(lengths: Lengths, occupancy: str, count: int, rng) -> np.ndarray:
    """Tokens that ``count`` requests are found with."""
    given, made, weight = (np.array(column) for column in zip(*lengths.points, strict=True))
    if occupancy == "full":
        pick = rng.choice(len(given), count, p=weight / weight.sum())
        return given[pick] + made[pick]
    pick = rng.choice(len(given), count, p=weight * made / (weight * made).sum())
    return given[pick] + np.floor(rng.random(count) * made[pick]).astype(np.int64)


@pytest.mark.parametrize("occupancy", ["full", "steady"])
@pytest.mark.parametrize("method", ["fp16", "kivi"])
@pytest.mark.parametrize(
    "text", ["lognormal:mean=2000,sigma=0.8", "lognormal:mean=800,sigma=1.4,output_mean=300,output_sigma=0.7"]
)
def test_the_probability_agrees_with_drawing(text: str, method: str, occupancy: str) -> None:
    rng = np.random.default_rng(7)
    lengths, formula, requests, draws = parse_lengths(text, 400), weigh(method), 40, 20_000
    tokens = draw(lengths, occupancy, requests * draws, rng)
    distinct, place = np.unique(tokens, return_inverse=True)
    sizes = np.array([formula(1, int(n)) for n in distinct])[place].reshape(draws, requests).sum(axis=1)
    for share in (0.5, 0.9, 0.99):
        available = int(np.quantile(sizes, share))
        drawn = float((sizes > available).mean())
        risk = MemoryRisk(formula, lengths, available, occupancy).runs_out(requests)
        assert risk == pytest.approx(drawn, abs=4 * (drawn * (1 - drawn) / draws) ** 0.5 + 0.002)


def test_the_most_requests_at_a_risk_is_the_inverse() -> None:
    risk = MemoryRisk(weigh("fp16"), parse_lengths("lognormal:mean=2000,sigma=1", 400), 50 << 30)
    for allowed in (0.5, 1e-2, 1e-3, 1e-6):
        most = risk.most(allowed)
        assert risk.runs_out(most) <= allowed < risk.runs_out(most + 1)


def test_constants_need_no_chance() -> None:
    formula = weigh("fp16")
    one = formula(1, 2560)
    risk = MemoryRisk(formula, constant(2048, 512), 10 * one)
    assert (risk.most(1e-3), risk.runs_out(10), risk.runs_out(11)) == (10, 0.0, 1.0)
    assert MemoryRisk(formula, constant(2048, 512), 10 * one - 1).most(1e-3) == 9


def test_no_room_at_all() -> None:
    risk = MemoryRisk(weigh("fp16"), parse_lengths("lognormal:mean=2000,sigma=1", 400), -5)
    assert (risk.most(0.01), risk.runs_out(1)) == (0, 1.0)


def test_a_trace_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        read_trace(tmp_path / "none.csv", 100)
