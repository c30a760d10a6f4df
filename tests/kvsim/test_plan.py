"""kvsim plan: every limit it reports is tight, every cost adds up, and bad input is one line."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from datetime import date

import pytest

pytest.importorskip("numpy", reason="numpy is not installed")

from kvsim import catalog
from kvsim.analysis.plan import Clock, Demand, plan, site
from kvsim.analysis.request_lengths import constant
from kvsim.cli import run
from kvsim.hardware import find_hardware, given, lowest, prices
from kvsim.latency.steps import first_token, token_step
from kvsim.memory.sharding import Deployment, Sharding
from kvsim.methods import make_method
from kvsim.models.load import load_model
from kvsim.search import largest
from kvsim.specs import parse_card, parse_lengths, parse_seconds

LLAMA, H100 = load_model("llama-3-8b"), find_hardware("h100-sxm")
METHODS = [make_method(name) for name in ("fp16", "fp8", "kivi")]
COMMAND = ["plan", "--model", "llama-3-8b", "--users", "200", "--slo-tpot", "30ms", "--slo-ttft", "2s"]


def ways(**more):
    demand = {"users": 200, "lengths": constant(2048, 512), "slo_tpot": 0.03, "slo_ttft": 2.0}
    demand |= {key: more.pop(key) for key in list(more) if key in Demand.__dataclass_fields__}
    cards = more.pop("cards", [(H100, None)])
    model = more.pop("model", LLAMA)
    return plan(model, METHODS, cards, Demand(**demand), lambda card, count: lowest(card.id, count), **more)


def test_what_fits_is_tight() -> None:
    """One request more, or one token more, breaks a limit: nothing was left on the table, nothing overdrawn."""
    demand = Demand(200, constant(2048, 512), 0.03, 2.0)
    good = [way for way in ways() if way.refusal is None]
    assert len(good) >= 8
    for way in good:
        place = site(LLAMA, H100, way.cards_per_replica)
        cache = Deployment(LLAMA, way.method, sharding=Sharding(way.cards_per_replica))
        clock = Clock(LLAMA, way.method, place, demand.lengths)

        def fits(batch: int, tokens: int, cache=cache, place=place) -> bool:
            return cache.rank_nbytes(batch, tokens) <= place.cache_nbytes

        assert fits(way.max_batch, 2560)
        assert clock.within(way.max_batch, demand)
        assert not (fits(way.max_batch + 1, 2560) and clock.within(way.max_batch + 1, demand))
        assert fits(way.batch_size, way.max_context)
        assert not fits(way.batch_size, way.max_context + 1)
        assert way.batch_size <= way.max_batch
        assert (way.num_replicas - 1) * way.max_batch < 200 <= way.num_replicas * way.batch_size
        assert way.tpot.value <= 0.03
        assert way.ttft.value <= 2
        assert way.tpot.low < way.tpot.value < way.tpot.high
        assert way.runs_out == 0


def test_money_and_tokens_add_up() -> None:
    for way in ways():
        if way.refusal is None:
            assert way.tokens_per_second == pytest.approx(200 / way.tpot.value)
            hourly = way.num_cards * way.price.usd_per_hour
            assert way.usd_per_mtok == pytest.approx(hourly / (way.tokens_per_second * 3600 / 1e6))
    costs = [way.usd_per_mtok for way in ways() if way.refusal is None]
    assert costs == sorted(costs)


def test_times_are_those_of_the_time_model() -> None:
    place, lengths, card = site(LLAMA, H100, 1), constant(2048, 512), replace(H100, memory_nbytes=None)
    clock = Clock(LLAMA, METHODS[0], place, lengths)
    assert clock.tpot(50) == token_step(LLAMA, METHODS[0], card, 50, 2048, 512).seconds
    assert clock.ttft(50) == first_token(LLAMA, METHODS[0], card, 50, 2048, 512).seconds
    long = Clock(LLAMA, METHODS[0], place, parse_lengths("lognormal:mean=2048,sigma=1", 512))
    assert long.tpot(50).value == pytest.approx(clock.tpot(50).value, rel=0.01)
    assert long.ttft(50).value > 1.2 * clock.ttft(50).value


def test_risk_limits_the_batch() -> None:
    lengths = parse_lengths("lognormal:mean=4000,sigma=1", 512)
    strict, loose = (
        next(
            way
            for way in ways(lengths=lengths, risk=risk, slo_tpot=None, users=5000, cards=[(H100, 1)])
            if way.method == METHODS[0]
        )
        for risk in (1e-6, 0.1)
    )
    assert strict.max_batch < loose.max_batch
    assert strict.runs_out <= 1e-6 < loose.runs_out <= 0.1
    assert strict.batch_bound == loose.batch_bound == "memory"


def test_steady_moments_leave_room() -> None:
    lengths = parse_lengths("lognormal:mean=1000,sigma=1", 4000)
    full, steady = (
        max(way.max_batch for way in ways(lengths=lengths, occupancy=kind, slo_tpot=None, cards=[(H100, 1)]))
        for kind in ("full", "steady")
    )
    assert full < steady


def test_refusals_say_why() -> None:
    big = {way.cards_per_replica: way for way in ways(model=load_model("llama-3-70b")) if way.method == METHODS[0]}
    assert "the weights leave no room for a cache on one card" in big[1].refusal
    assert big[8].refusal is None
    assert all("a token even alone" in way.refusal for way in ways(slo_tpot=1e-4))
    assert all("first token" in way.refusal for way in ways(slo_ttft=1e-3))
    assert all("no request of" in way.refusal for way in ways(lengths=constant(10**9, 1), slo_ttft=None))
    assert all("more than 1" in way.refusal for way in ways(users=10**5, max_cards=1))
    assert all("does not divide" in way.refusal for way in ways(cards=[(H100, 5)]))


@pytest.mark.parametrize("answer", [0, 1, 2, 3, 7, 8, 9, 999, 1000])
def test_largest(answer: int) -> None:
    calls = []
    assert largest(lambda n: calls.append(n) or n <= answer, 1000) == answer
    assert len(calls) <= 2 * 11


def test_prices_are_dated_known_and_lowest() -> None:
    assert len(prices()) >= 15
    for price in prices():
        assert catalog.find("hardware", price.card)["id"] == price.card
        assert date(2026, 1, 1) <= date.fromisoformat(price.date)
        assert 0.1 < price.usd_per_hour < 20
        assert price.source.startswith("https://")
    assert lowest("h100-sxm").usd_per_hour == min(
        p.usd_per_hour for p in prices() if p.card == "h100-sxm" and p.min_cards == 1
    )
    assert lowest("a100-sxm-40gb", 1).provider == "Lambda"
    assert lowest("rtx-a6000", 1) is None
    assert lowest("rtx-a6000", 4) is not None
    assert lowest("tpu-v4") is None


def test_a_price_of_each_card(capsys) -> None:
    """The headline is of the cards with a price; what the others need is said."""
    command = [*COMMAND, "--gpu", "h100-sxm:1", "--gpu", "mi300x:1", "--gpu", "mi355x:1", "--method", "fp16"]
    assert run([*command, "--price", "mi300x=0.5", "--price", "h100=9"]) == 0
    out = capsys.readouterr().out
    assert re.search("^cheapest of the cards with a price: [0-9]+ x mi300x with fp16", out, re.MULTILINE)
    assert "price of mi300x: $0.5 a card-hour" in out
    assert "no price of mi355x is listed: 1 would do it (1 x mi355x, fp16); give --price mi355x=DOLLARS" in out
    assert run([*command, "--price", "3", "--price", "mi355x=1", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["gpu"]: row["price"]["usd_per_hour"] for row in rows} == {"h100-sxm": 3, "mi300x": 3, "mi355x": 1}
    assert run(command) == 0  # the list has AMD's
    assert "TensorWave" in capsys.readouterr().out
    for wrong, said in (
        (["--price", "l4=1"], "asks about h100-sxm, mi300x, mi355x"),
        (["--price", "1", "--price", "2"], "give one for every card"),
        (["--price", "mi300x=1", "--price", "mi300x=2"], "two prices of mi300x"),
        (["--price", "mi300x=free"], "dollars a card-hour above 0"),
        (["--price", "mi301x=1"], "unknown GPU"),
    ):
        assert run([*command, *wrong]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("price", [0.0, -1.0, float("nan"), float("inf")])
def test_a_price_is_above_zero(price: float) -> None:
    with pytest.raises(ValueError, match="price"):
        given("h100-sxm", price)


@pytest.mark.parametrize(("text", "seconds"), [("30ms", 0.03), ("2s", 2), ("2", 2), ("1.5 min", 90), ("250us", 2.5e-4)])
def test_seconds(text: str, seconds: float) -> None:
    assert parse_seconds(text, "slo") == pytest.approx(seconds)


def test_a_bare_number_that_looks_like_milliseconds_is_asked_about() -> None:
    with pytest.raises(ValueError, match="write 30s or 30ms"):
        parse_seconds("30", "slo-tpot")


def test_cards() -> None:
    assert parse_card("h100-sxm") == (H100, None)
    assert parse_card("H100-SXM:2") == (H100, 2)


def test_the_screen(capsys) -> None:
    assert run([*COMMAND, "--gpu", "h100-sxm:2"]) == 0
    out = capsys.readouterr().out
    assert "$/Mtok" in out
    assert "RunPod" in out
    assert out.strip().splitlines()[-1].startswith("Not modelled:")


def test_json(capsys) -> None:
    assert run([*COMMAND, "--gpu", "h100-sxm", "--price", "2.5", "--json", "--tensor-parallel-size", "2"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["schema"], document["inputs"]["users"]) == ("kvsim.plan/1", 200)
    assert {row["cards_per_replica"] for row in document["rows"]} == {2}
    for row in document["rows"]:
        assert row["price"]["usd_per_hour"] == 2.5
        assert row["tpot_seconds"]["low"] <= row["tpot_seconds"]["value"] <= row["tpot_seconds"]["high"]


def test_exit_1_where_nothing_meets_the_demand(capsys) -> None:
    assert run([*COMMAND, "--gpu", "t4:1"]) == 1
    assert "nothing meets this demand" in capsys.readouterr().out
    assert run([*COMMAND, "--gpu", "t4:1", "--json"]) == 1
    assert not any(row["fits"] for row in json.loads(capsys.readouterr().out)["rows"])


@pytest.mark.parametrize(
    "more",
    [
        ["--gpu", "h100-sxm:0"],
        ["--gpu", "h100-sxm:x"],
        ["--gpu", "h1000"],
        ["--gpu", "h100-sxm", "--slo-tpot", "fast"],
        ["--gpu", "h100-sxm", "--users", "0"],
        ["--gpu", "h100-sxm", "--price", "-3"],
        ["--gpu", "h100-sxm", "--risk", "1.5"],
        ["--gpu", "h100-sxm", "--weight-bits", "-1"],
        ["--gpu", "h100-sxm", "--lengths", "lognormal:mean=3"],
        ["--gpu", "h100-sxm", "--gpu-memory-utilization", "1.2"],
        ["--gpu", "h100-sxm", "--engine", "vlm"],
        ["--gpu", "h100-sxm", "--method", "kiwi"],
        ["--gpu", "h100-sxm", "--max-model-len", "1"],
    ],
)
def test_bad_input_is_one_line(more: list[str], capsys) -> None:
    assert run([*COMMAND, *more]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("kvsim: error: ")
    assert err.count("\n") == 1


def test_long_requests_are_cut_and_said(capsys) -> None:
    assert run([*COMMAND, "--gpu", "h100-sxm:1", "--lengths", "lognormal:mean=4000,sigma=1"]) == 0
    assert "cut there" in capsys.readouterr().out


def test_an_engine_takes_its_own_share(capsys) -> None:
    """vLLM holds graphs and activations beside the cache and fills less of the card: fewer requests fit."""
    rows = {}
    for engine in ("ideal", "vllm", "vllm:gpu_memory_utilization=0.7"):
        arguments = ["--gpu", "h100-sxm:1", "--method", "fp16", "--engine", engine, "--json"]
        assert run([*COMMAND, *arguments]) == 0
        rows[engine] = json.loads(capsys.readouterr().out)["rows"][0]["max_ctx"]
    assert rows["ideal"] > rows["vllm"] > rows["vllm:gpu_memory_utilization=0.7"] > 0


def test_weights_in_fp8_leave_more_room(capsys) -> None:
    found = []
    for more in ([], ["--weight-dtype", "fp8"], ["--weight-bits", "8"]):
        assert run([*COMMAND, "--gpu", "h100-sxm:1", "--method", "fp16", "--json", *more]) == 0
        found.append(json.loads(capsys.readouterr().out)["rows"][0])
    assert found[0]["max_ctx"] * found[0]["batch_per_replica"] < found[1]["max_ctx"] * found[1]["batch_per_replica"]
    assert found[1]["max_ctx"] * found[1]["batch_per_replica"] < found[2]["max_ctx"] * found[2]["batch_per_replica"]
    assert run([*COMMAND, "--gpu", "h100-sxm:1", "--weight-dtype", "fp8", "--weight-bits", "8"]) == 2


def test_lengths_are_given_or_said_not_to_be(capsys) -> None:
    plain = [*COMMAND, "--gpu", "h100-sxm:1", "--method", "fp16"]
    for more, label in (
        ([], "2,048 input and 512 output tokens"),
        (["--ctx", "8k"], "7,680 input and 512 output tokens"),
        (["--ctx", "8k", "--output-len", "1k"], "7,168 input and 1,024 output tokens"),
    ):
        assert run([*plain, *more]) in (0, 1)
        out = capsys.readouterr().out
        assert label in out
        assert ("lengths were not given" in out) == (not more)
    assert run([*plain, "--max-model-len", "8k"]) == 0  # a limit, no length
    assert "lengths were not given" in capsys.readouterr().out
    for wrong, said in (
        (["--ctx", "8k", "--input-len", "4k"], "give one of --input-len and --ctx"),
        (["--ctx", "512"], "more than the 512 tokens of an answer"),
    ):
        assert run([*plain, *wrong]) == 2
        assert said in capsys.readouterr().err


MTP = "mtp:tokens=1,acceptance=0.85"


def planned(capsys, *more: str, model: str = "deepseek-v3") -> dict[tuple[str, str], dict]:
    command = ["plan", "--model", model, "--gpu", "h200-sxm:8", "--method", "fp8", "--engine", "vllm", "--json"]
    load = more if "--ctx" in more else ("--users", "400", "--slo-tpot", "100ms", "--ctx", "8k", *more)
    assert run([*command, "--output-len", "1k", *load]) == 0
    document = json.loads(capsys.readouterr().out)
    return {(row["gpu"], row["layout"]): row for row in document["rows"] if row["fits"]} | {("", ""): document}


def test_drafts_take_room_and_give_tokens(capsys) -> None:
    """A prediction layer's weights and cache come off the card; a step gives 1.85 tokens, and prompts cost as much."""
    plain, drafted = planned(capsys), planned(capsys, "--speculate", MTP)
    best = ("h200-sxm", "dp8 ep")
    assert drafted[best]["max_ctx"] < plain[best]["max_ctx"] or drafted[best]["batch_per_replica"] < 400
    gain = plain[best]["tpot_seconds"]["value"] / drafted[best]["tpot_seconds"]["value"]
    assert 1.1 < gain < 1.85
    assert drafted[best]["num_cards"] <= plain[best]["num_cards"]
    assert any("1.85 tokens a step" in note for note in drafted["", ""]["notes"])
    assert drafted["", ""]["inputs"]["speculate"]["kind"] == "mtp"


def test_found_prompts_cost_no_prefill(capsys, tmp_path) -> None:
    """In units of a block; a trace's share is what a replica's room lets it find."""
    best = ("h200-sxm", "dp8 ep")
    plain, found = planned(capsys), planned(capsys, "--prefix-hits", "60%")
    assert found[best]["cached_tokens"] == 16 * round(0.6 * 7168 // 16)
    assert found[best]["ttft_seconds"]["value"] < plain[best]["ttft_seconds"]["value"]
    assert found[best]["tpot_seconds"]["value"] < plain[best]["tpot_seconds"]["value"]
    row = json.dumps({"input_length": 1024, "hash_ids": [1, 2]})
    trace = tmp_path / "trace.jsonl"
    trace.write_text(f"{row}\n{row}\n")
    counted = planned(capsys, "--prefix-hits", str(trace))
    assert counted[best]["cached_tokens"] == round(7168 * 1008 / 2048)  # the second finds its blocks but one token's
    assert counted["", ""]["inputs"]["prefix_hits"] == "trace"


def test_apart_takes_both(capsys) -> None:
    def cards(*more: str) -> tuple[int, float]:
        load = ("--users", "2000", "--slo-tpot", "100ms", "--ctx", "8k")
        one = planned(capsys, "--disaggregated", *load, *more)["", ""]["disaggregated"][0]
        return one["prefill"]["cards"], one["tpot_seconds"]["value"]

    (most, slow), (fewer, same), (_, fast) = cards(), cards("--prefix-hits", "0.9"), cards("--speculate", MTP)
    assert fewer < most
    assert same == pytest.approx(slow, rel=0.3)
    assert fast < slow


def test_tokens_are_shared_where_latents_would_be_copied(capsys) -> None:
    """Where memory limits the batch the decode-context layout needs fewer cards, and is weighed unasked."""
    rows = planned(capsys, "--users", "100", "--ctx", "128k")
    assert {"tp8", "tp8 dcp8", "dp8 ep"} <= {layout for _, layout in rows}
    copied, shared = rows["h200-sxm", "tp8"], rows["h200-sxm", "tp8 dcp8"]
    assert (copied["copies"], shared["copies"]) == (8, 1)
    assert shared["num_cards"] < copied["num_cards"]


def test_the_rows_as_a_file(tmp_path, capsys, monkeypatch) -> None:
    """CSV has a line a row and a column a figure, JSON the whole answer; another name is refused before any work."""
    command = ["plan", "qwen3-8b", "--gpu", "h100-sxm", "--gpu", "l4", "--users", "8"]
    assert run([*command, "--out", str(tmp_path / "rows.csv")]) == 0
    captured = capsys.readouterr()
    assert captured.err == f"wrote {tmp_path / 'rows.csv'}: {len(csv_rows(tmp_path))} rows\n"
    assert run([*command, "--json", "--out", str(tmp_path / "rows.json")]) == 0
    out = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "rows.json").read_text()) == out
    for line, row in zip(csv_rows(tmp_path), out["rows"], strict=True):
        assert (line["method"], line["gpu"], line["refusal"]) == (row["method"], row["gpu"], row["refusal"] or "")
        assert line["tpot_seconds_high"] == (str(row["tpot_seconds"]["high"]) if row["tpot_seconds"] else "")
        assert line["fits"] == json.dumps(row["fits"])
        assert "tpot_seconds" not in line
    monkeypatch.setattr("kvsim.commands.plan.load_model", lambda name: pytest.fail("work before the file's name"))
    for name, wrong in (
        ("rows.parquet", "allowed are names that end in .csv or .json"),
        ("no/rows.csv", "no directory"),
    ):
        assert run([*command, "--out", str(tmp_path / name)]) == 2
        assert wrong in capsys.readouterr().err


def csv_rows(folder):
    with open(folder / "rows.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
