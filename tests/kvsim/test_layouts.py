"""How several cards share a model: data-parallel attention, experts, context, pipelines, hosts; published times."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

pytest.importorskip("numpy", reason="numpy is not installed")

from kvsim.analysis.plan import layouts
from kvsim.cli import run
from kvsim.hardware import find_hardware
from kvsim.latency.constants import Constants, constants
from kvsim.latency.exchange import Wires
from kvsim.latency.roofline import Roofline, Serving
from kvsim.latency.steps import decode_step, prefill
from kvsim.memory.capacity import room
from kvsim.memory.sharding import Deployment, Sharding, copies
from kvsim.methods import Full
from kvsim.models.load import load_model

V3, LLAMA = load_model("deepseek-v3"), load_model("llama-3.1-8b")
H100, H200, GB200 = map(find_hardware, ("h100-sxm", "h200-sxm", "gb200"))
GIB = 1 << 30
ATTENTION = Sharding(data_parallel_size=8, enable_expert_parallel=True)
DEEPEP = {8: (77, 114), 16: (118, 195), 32: (155, 273), 64: (173, 314), 128: (192, 369), 256: (194, 360)}
"""Cards -> microseconds of dispatch and combine: deepseek-ai/DeepEP@dd758ca docs/legacy.md, low latency, H800."""


@pytest.mark.parametrize("ranks", DEEPEP)
def test_sending_to_experts_takes_what_deepep_published(ranks: int) -> None:
    wires, nbytes = Wires(0.7 * 200e9, 8), 128 * 7168 * 8
    dispatch, combine = (us * 1e-6 for us in DEEPEP[ranks])
    assert wires.send(nbytes, ranks) == pytest.approx(dispatch, rel=0.15)
    assert wires.send(2 * nbytes, ranks) == pytest.approx(combine, rel=0.15)


def test_published_throughput_of_wide_expert_parallel() -> None:
    """DeepSeek-V3 on hosts of 8 H100: 72 cards decode 22,282 tokens a second and host with 256 requests of 2,000 tokens
    a card, 32 cards prefill 57,674, 54,543 and 50,302 in batches of 16,384
    (lm-sys/lm-sys.github.io blog/2025-05-05-large-scale-ep.md).  No constant was fitted on them."""
    serving = Serving(sharding=Sharding(data_parallel_size=72, enable_expert_parallel=True))
    step = decode_step(V3, Full(), H100, 256, 2000, serving)
    assert 8 * 256 / step.seconds.value == pytest.approx(22282, rel=0.15)
    serving = Serving(sharding=Sharding(data_parallel_size=32, enable_expert_parallel=True))
    for tokens, published in ((1024, 57674), (2048, 54543), (4096, 50302)):
        found = 8 * 16384 / prefill(V3, H100, 16384 // tokens, tokens, serving).seconds.value
        assert found == pytest.approx(published, rel=0.12)


def test_experts_are_shared_by_replicas_and_not_copied() -> None:
    """671 GB of weights: 19 GB of attention, dense layers and tables on every card, and 1/8 of the experts."""
    one, eight = (room(V3, H200, sharding=sharding).weight_nbytes for sharding in (Sharding(), ATTENTION))
    weights = V3.weights
    assert one - eight == pytest.approx(weights.routed * 7 / 8, rel=1e-6)
    assert eight == pytest.approx(100.7e9, rel=1e-3)
    sliced = room(V3, H200, sharding=Sharding(data_parallel_size=8)).weight_nbytes
    assert sliced == eight  # 256 experts on 8 cards: slices weigh what whole ones do
    uneven = room(V3, H200, sharding=replace(ATTENTION, data_parallel_size=24)).weight_nbytes
    rest = eight - weights.routed / 8
    assert uneven - rest == pytest.approx(weights.routed * 11 / 256, rel=1e-6)
    dense = room(LLAMA, H200, sharding=Sharding(data_parallel_size=8)).weight_nbytes
    assert dense == pytest.approx(room(LLAMA, H200).weight_nbytes, rel=1e-6)


@pytest.mark.parametrize(
    ("model", "ranks", "message"), [(LLAMA, 8, "has no routed experts"), (V3, 512, "512 ranks for 256 experts")]
)
def test_experts_that_are_not_there(model, ranks: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        room(model, H200, sharding=Sharding(data_parallel_size=ranks, enable_expert_parallel=True))


def test_a_latent_is_copied_by_tensor_parallel_alone() -> None:
    assert copies(V3, Sharding(8)) == 8
    assert copies(V3, Sharding(8, decode_context_parallel_size=8)) == 1
    assert copies(V3, ATTENTION) == copies(LLAMA, Sharding(8)) == 1
    assert copies(LLAMA, Sharding(16)) == 2
    tensor, attention = (Deployment(V3, Full(), sharding=sharding) for sharding in (Sharding(8), ATTENTION))
    assert tensor.rank_nbytes(64, 4096) == 8 * attention.rank_nbytes(64, 4096)


def test_a_step_of_a_layout_reads_its_share() -> None:
    """Of the experts, and of a latent whose tokens are shared, a card of 8 reads an eighth; of the attention's weights
    all.  The arithmetic of shared tokens stays: all queries attend to them."""
    tensor, attention, context = (
        Roofline(V3, H200, Serving(sharding=sharding))
        for sharding in (Sharding(8), ATTENTION, Sharding(8, decode_context_parallel_size=8))
    )
    assert attention.sharing == 8
    assert tensor.sharing == 1
    plain = replace(V3, weights=replace(V3.weights, routed=0))
    dense, whole = (Roofline(each, H200, Serving()).weights(10**6)[0] for each in (plain, V3))
    assert attention.weights(10**6)[0] == pytest.approx(dense + (whole - dense) / 8, rel=1e-6)
    long = 1 << 20
    spread, whole = context.attention(Full(), 4, long)[0], tensor.attention(Full(), 4, long)[0]
    assert whole / 8 < spread < whole / 4
    assert context.communication(4) > tensor.communication(4)
    assert Roofline(LLAMA, H100, Serving(sharding=Sharding(data_parallel_size=4))).communication(4) == 0


def test_a_pipeline_takes_a_prompts_chunks_at_once() -> None:
    one, two = (Serving(sharding=Sharding(4, pipeline_parallel_size=stages)) for stages in (1, 2))
    alone, staged = (prefill(LLAMA, H100, 1, 8 * 8192, serving).parts["compute"] for serving in (one, two))
    assert staged == pytest.approx(alone * 9 / 16)
    short = [prefill(LLAMA, H100, 1, 1000, serving).seconds.value for serving in (one, two)]
    assert short[0] < short[1] < 1.05 * short[0]
    steps = [decode_step(LLAMA, Full(), H100, 8, 4096, serving) for serving in (one, two)]
    assert 0 < steps[1].seconds.value - steps[0].seconds.value < 1e-4


def test_an_engine_of_nccl_has_an_all_reduce_of_its_own() -> None:
    """In all of its ways; servers keep theirs."""
    own = replace(constants(), engine_link={"kvruntime": {"seconds": 1e-5, "efficiency": 0.5}})

    def seconds(engine: str, profile: Constants, tokens: int = 8) -> float:
        serving = Serving(engine=engine, sharding=Sharding(tensor_parallel_size=4), profile=profile)
        return float(Roofline(LLAMA, H100, serving).all_reduces(tokens))

    assert H100.link_bandwidth is not None
    ring = 2 * 3 / 4 * 2 * 8 * LLAMA.hidden_size / (0.5 * H100.link_bandwidth / 2)
    assert seconds("kvruntime:compiled", own) == pytest.approx(2 * LLAMA.num_blocks * (3e-5 + ring))
    assert seconds("kvruntime", own) == seconds("kvruntime:compiled", own) != seconds("kvruntime", constants())
    assert seconds("vllm", own) == seconds("vllm", constants())


def test_a_split_model_is_timed_as_its_own_modules() -> None:
    """``kvruntime.Engine``'s fused kernels take whole models; what else is split is timed as it was."""

    def parts(engine: str, cards: int) -> dict[str, float]:
        serving = Serving(engine=engine, sharding=Sharding(cards))
        return decode_step(LLAMA, Full(), H100, 8, 4096, serving).parts

    assert parts("kvruntime", 2) == parts("kvruntime:generate", 2)
    assert parts("kvruntime", 1)["overhead"] < parts("kvruntime:generate", 1)["overhead"]
    assert Serving(engine="kvruntime:compiled", tensor_parallel=2).timed_as == "kvruntime:compiled"
    assert Serving(engine="vllm", tensor_parallel=2).timed_as == "vllm"
    only = replace(constants(), engines=("kvruntime",))
    with pytest.raises(ValueError, match=r"engine kvruntime:generate, whose .*: the profile was not measured with"):
        Serving(engine="kvruntime", tensor_parallel=2, profile=only)


def test_beyond_a_host_the_network_carries() -> None:
    wide = Serving(sharding=Sharding(16))
    within = Roofline(LLAMA, GB200, wide).all_reduces(4096)
    between = Roofline(LLAMA, replace(GB200, host_cards=8), wide).all_reduces(4096)
    assert between > 5 * within
    assert Roofline(LLAMA, GB200, wide).wires.host_cards == 72
    with pytest.raises(ValueError, match="between cards is not known"):
        Wires(None, 8).send(1.0, 2)


def test_plan_finds_data_parallel_attention(capsys) -> None:
    """1,000 users at 8k: tensor parallelism alone has the latents eight times and needs several times the cards."""
    command = ["plan", "--model", "deepseek-v3", "--gpu", "h200-sxm", "--users", "1000", "--slo-tpot", "100ms"]
    command += ["--input-len", "4k", "--output-len", "4k", "--engine", "vllm"]
    assert run([*command, "--json"]) == 0
    rows = [row for row in json.loads(capsys.readouterr().out)["rows"] if row["fits"]]
    best = {layout: min(r["num_cards"] for r in rows if r["layout"] == layout) for layout in ("tp8", "dp8 ep")}
    assert best["tp8"] >= 2 * best["dp8 ep"]
    assert rows[0]["copies"] == 1
    assert "dp" in rows[0]["layout"]
    assert run(command) == 0
    out = capsys.readouterr().out
    assert "(dp8 ep)" in out
    assert "tensor parallelism alone (tp8) puts the same keys and values (a latent, or a head) on 8 cards" in out
    assert run([*command, "-tp", "8"]) == 0
    assert "-dp or -dcp copies none" in capsys.readouterr().out


def test_plan_takes_one_layout_where_it_is_given(capsys) -> None:
    command = ["plan", "--model", "deepseek-v3", "--users", "100", "--method", "fp16", "--json"]
    for flags, layout in (
        (["-tp", "8", "-dcp", "8"], "tp8 dcp8"),
        (["-dp", "16"], "dp16"),
        (["-tp", "8", "-pp", "2"], "tp8 pp2"),
    ):
        assert run([*command, "--gpu", "h200-sxm", *flags]) == 0
        document = json.loads(capsys.readouterr().out)
        assert document["inputs"]["layout"] == layout
        assert [row["layout"] for row in document["rows"]] == [layout]
    assert run([*command, "--gpu", "h200-sxm:8", "-tp", "4"]) == 2
    assert "8 cards, but --tensor-parallel-size is 4" in capsys.readouterr().err


def test_more_cards_are_tried_where_the_weights_do_not_fit(capsys) -> None:
    command = ["plan", "--model", "deepseek-v3", "--users", "100", "--method", "fp16", "--json"]
    assert run([*command, "--gpu", "h100-sxm"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["cards_per_replica"] for row in rows} == {1, 2, 4, 8, 16}
    assert all(row["cards_per_replica"] == 16 for row in rows if row["fits"])


def test_layouts_that_suit() -> None:
    assert [each.label for each in layouts(LLAMA, 8)] == ["tp8"]
    assert [each.label for each in layouts(LLAMA, 16)] == ["tp8 pp2"]
    assert [each.label for each in layouts(LLAMA, 5)] == ["tp5"]
    assert [each.label for each in layouts(LLAMA, 1)] == [""]
    assert [each.label for each in layouts(V3, 8)] == ["tp8", "tp8 dcp8", "dp8 ep"]
    assert [each.label for each in layouts(V3, 16)] == ["tp8 pp2", "tp8 pp2 dcp8", "dp16 ep"]
    assert [each.label for each in layouts(V3, 72, 72)] == ["tp72", "tp72 dcp72", "dp72 ep"]
    grouped = load_model("qwen3-235b-a22b")  # 4 kv heads
    assert [each.label for each in layouts(grouped, 8)] == ["tp8", "tp8 dcp2", "tp4 dp2 ep", "tp2 dp4 ep", "dp8 ep"]
    narrow = load_model("qwen2.5-1.5b")  # 2 kv heads, no experts
    assert [each.label for each in layouts(narrow, 4)] == ["tp4", "tp4 dcp2"]


def test_estimate_times_what_it_shards(capsys) -> None:
    """Pipeline and context are in the times, and no note says otherwise; experts are on all cards."""
    command = ["estimate", "--model", "deepseek-v3", "--gpu", "h200-sxm", "--batch", "4", "--ctx", "128k"]
    command += ["--method", "fp16", "--json"]
    found = {}
    for flags in ("-tp 8", "-tp 8 -dcp 8", "-dp 8 -ep", "-tp 8 -pp 2", "-dp 8"):
        assert run([*command, *flags.split()]) == 0
        document = json.loads(capsys.readouterr().out)
        found[flags] = document["rows"][0]["tpot_seconds"]["value"]
        assert not any("stage" in note for note in document["notes"])
    assert found["-tp 8 -dcp 8"] < found["-tp 8"]
    assert found["-dp 8 -ep"] == found["-dp 8"]
    assert found["-tp 8 -pp 2"] < found["-tp 8"]  # a step of half the batch
    assert run([*command[:-1], "-tp", "8", "-pp", "2"]) == 0
    assert "between hosts 400 Gb/s a card are taken" in capsys.readouterr().out


def test_a_pool_of_shared_tokens_shows_whole_requests(capsys) -> None:
    """Eight cards with an eighth of a request each: 4,096 tokens are asked for, and eight pools hold them."""
    command = ["estimate", "--model", "deepseek-v3", "--gpu", "h200-sxm", "--engine", "vllm", "--method", "fp16"]
    pools = []
    for flags in (["-tp", "8"], ["-tp", "8", "-dcp", "8"]):
        assert run([*command, *flags, "--json"]) == 0
        pools.append(json.loads(capsys.readouterr().out)["rows"][0]["pool"])
    assert [pool["max_model_len"] for pool in pools] == [4096, 4096]
    assert pools[1]["num_gpu_blocks"] == pools[0]["num_gpu_blocks"]
    assert pools[1]["kv_cache_tokens"] == pytest.approx(8 * pools[0]["kv_cache_tokens"], rel=1e-3)
    assert run([*command, "-tp", "8", "-dcp", "8"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "GPU blocks" in line)
    assert "request tokens" in row


def test_what_fits_only_by_an_estimate_is_said(capsys) -> None:
    command = ["estimate", "--model", "llama-3.1-8b", "--gpu", "h100-sxm", "--engine", "vllm", "--method", "fp16"]
    assert run([*command, "--ctx", "4k", "--batch", "8"]) == 0
    assert "ends of their bands" not in capsys.readouterr().out
    assert run([*command, "--ctx", "4k", "--batch", "108"]) == 0
    assert "fp16: fits, but not where the engine's estimates are at the ends of their bands" in capsys.readouterr().out


def test_a_card_without_arithmetic_has_the_time_of_a_token(capsys) -> None:
    command = ["estimate", "--model", "llama-3.2-1b", "--gpu", "apple-m2", "--engine", "llama.cpp", "--method", "fp16"]
    for more in ([], ["--input-len", "1k", "--output-len", "100"]):
        assert run([*command, *more, "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert document["rows"][0]["tpot_seconds"]["value"] > 0
        assert document["rows"][0]["ttft_seconds"] is None
        assert any("no time to the first token" in note for note in document["notes"])
        assert any("no card of apple's was timed" in note for note in document["notes"])
    assert run([*command[:4], "h100-sxm", "--json"]) == 0
    assert not any("was timed" in note for note in json.loads(capsys.readouterr().out)["notes"])
