"""Seconds of a step: physics that must hold, figures published elsewhere, recorded errors against their bars."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from math import isfinite
from pathlib import Path
from statistics import mean, median
from typing import Any

import pytest

from kvsim import catalog
from kvsim.cli import run
from kvsim.engines import make_engine
from kvsim.hardware import find_hardware
from kvsim.latency.attention_curve import Kernel
from kvsim.latency.constants import constants
from kvsim.latency.profile import Part, with_part
from kvsim.latency.roofline import Roofline, Serving, find_kernel, hit_share, seen
from kvsim.latency.steps import (
    MOST,
    PARTS,
    Step,
    decode_seconds,
    decode_step,
    first_token,
    prefill,
    running,
    token_step,
)
from kvsim.layout import LayerShape, Method, mean_read_nbytes
from kvsim.methods import Evict, Kivi, PerTokenHead, TurboQuant, make_method
from kvsim.models.load import load_model
from kvsim.models.model import Model
from kvsim.models.weight_storage import known_weights
from kvsim.specs import parse_method

ROOT = Path(__file__).parents[2]
MEASURED = ROOT.parent / "shared" / "measured"
needs_rows = pytest.mark.skipif(
    not MEASURED.is_dir(), reason="the measured rows (shared/measured) do not lie beside this checkout"
)
H100 = find_hardware("h100-sxm")
LLAMA = load_model("llama-3.1-8b")
FP16, FP8 = make_method("fp16"), make_method("fp8")
KIVI = make_method("kivi", nbits=2, group_size=64)
MODELS = ("llama-3.1-8b", "gpt2", "openai/gpt-oss-20b", "deepseek-ai/DeepSeek-V3", "google/gemma-3-27b-it")


def whole(step: Step) -> None:
    """The parts are known ones, not negative, and add up; the band is around the value; the bound is the largest."""
    assert set(step.parts) <= {*PARTS, "queue"}
    assert all(value >= 0 for value in step.parts.values())
    assert sum(step.parts.values()) == pytest.approx(step.seconds.value)
    assert 0 < step.seconds.low < step.seconds.value < step.seconds.high
    assert step.parts[step.bound] == max(step.parts.values())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("engine", ["ideal", "vllm", "sglang", "trtllm"])
def test_every_step_is_whole(name: str, engine: str) -> None:
    model, card = load_model(name), find_hardware("h200")
    for batch_size, num_tokens in ((1, 1), (7, 1000), (256, 8192)):
        whole(decode_step(model, FP16, card, batch_size, num_tokens, Serving(engine=engine)))
        whole(token_step(model, FP16, card, batch_size, num_tokens, 100, Serving(engine=engine)))
        whole(first_token(model, FP16, card, batch_size, num_tokens, 100, Serving(engine=engine)))
        whole(prefill(model, card, batch_size, num_tokens, Serving(engine=engine)))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ["fp16", "fp8", "int8", "paged"])
def test_arrays_are_the_scalar_form(name: str, method: str) -> None:
    numpy = pytest.importorskip("numpy", reason="numpy is not installed")
    model, stored = load_model(name), make_method(method)
    batch, tokens = numpy.array([[1], [3], [64], [300]]), numpy.array([1, 127, 128, 129, 5000, 131072])
    value, low, high = decode_seconds(model, stored, H100, batch, tokens)
    assert value.shape == low.shape == high.shape == (4, 6)
    for i, j in ((i, j) for i in range(4) for j in range(6)):
        one = decode_step(model, stored, H100, int(batch[i, 0]), int(tokens[j])).seconds
        assert (value[i, j], low[i, j], high[i, j]) == pytest.approx(tuple(one), rel=1e-12)


def test_more_work_takes_longer_and_a_better_card_less() -> None:
    times = [decode_step(LLAMA, FP16, H100, batch, 4096).seconds.value for batch in (1, 2, 8, 64, 256, 1024)]
    assert times == sorted(times)
    times = [decode_step(LLAMA, FP16, H100, 8, tokens).seconds.value for tokens in (1, 512, 4096, 32768, 131072)]
    assert times == sorted(times)
    times = [decode_step(LLAMA, FP16, find_hardware(card), 32, 8192).seconds.value for card in ("h100", "h200", "b200")]
    assert times == sorted(times, reverse=True)
    assert H100.num_sms is not None
    half = replace(H100, num_sms=H100.num_sms // 2)  # many short sequences take twice the waves
    assert (
        decode_step(LLAMA, FP16, half, 512, 64).parts["kv"] > 1.5 * decode_step(LLAMA, FP16, H100, 512, 64).parts["kv"]
    )


@pytest.mark.parametrize("engine", ["ideal", "vllm", "trtllm", "kvruntime"])
@pytest.mark.parametrize("name", ["llama-3.1-8b", "llama-2-7b", "Qwen1.5-MoE-A2.7B", "falcon-40b"])
def test_time_never_falls_as_a_batch_grows(name: str, engine: str) -> None:
    """Neither where attention stops splitting sequences (as many pieces as multiprocessors) nor where a server's step
    carries more than one prompt: the largest batch within a time limit is found by bisection."""
    model, batches = load_model(name), (1, 3, 4, 5, 8, 15, 16, 17, 18, 32, 33, 48, 64, 128, 129, 132, 133, 256)
    card = replace(H100, memory_nbytes=None)  # all of them run
    for tokens in (128, 1000, 4096, 32768):
        times = [
            decode_step(model, FP16, card, batch, tokens, Serving(engine=engine)).seconds.value for batch in batches
        ]
        assert times == sorted(times), tokens
        for output in (1, 16, 128):
            loads = [(model, FP16, card, batch, tokens, output) for batch in batches]
            times = [token_step(*load, Serving(engine=engine)).seconds.value for load in loads]
            assert times == sorted(times), (tokens, output)


@pytest.mark.parametrize(
    "spec",
    [
        *("kivi", "kivi-seed", "kivi:nbits=4,group_size=64", "kivi:nbits=2,sink_length=4,residual_length=64"),
        *("paged:block_size=16,inner=kivi", "evict:budget=700,inner=kivi", "evict:policy=h2o,ratio=40%", "mix"),
        *("fp16", "fp8", "int8", "int4", "nvfp4"),
    ],
)
def test_time_never_falls_as_a_context_grows(spec: str) -> None:
    """Token by token, whatever the method packs and when: a step is timed by the mean over a packing period."""
    numpy = pytest.importorskip("numpy", reason="numpy is not installed")
    stored, tokens = parse_method(spec, {}), numpy.arange(1, 1500)
    for name, engine in (("gpt2", "kvruntime"), ("gpt2", "ideal"), ("llama-3.1-8b", "vllm")):
        seconds, _, _ = decode_seconds(
            load_model(name), stored, H100, numpy.array([[1], [200]]), tokens, Serving(engine=engine)
        )
        assert (numpy.diff(seconds, axis=1) >= -1e-15).all(), (name, engine)


@pytest.mark.parametrize("spec", ["kivi", "kivi-seed", "kivi:nbits=4,group_size=64", "kivi:nbits=2,sink_length=4"])
def test_the_bytes_that_are_timed_are_the_mean_between_two_packings(spec: str) -> None:
    method, layer = parse_method(spec, {}), LLAMA.cache_layers[0]
    assert isinstance(method, Kivi)
    length = method.record_length
    for first in (4096, 4097, 5000):
        steps = range(first, first + length)
        read = [sum(method.read_parts(layer, 3, tokens).values()) for tokens in steps]
        assert max(read) > read[0] or min(read) < read[0]  # they do rise and fall
        assert mean(mean_read_nbytes(method, layer, 3, tokens) for tokens in steps) == pytest.approx(mean(read))
    for few in (1, method.residual_length, method.sink_length + method.residual_length):  # nothing is packed yet
        assert mean_read_nbytes(method, layer, 3, few) == sum(method.read_parts(layer, 3, few).values())


BESIDE = ROOT.parent / "shared" / "catalogue" / "models.json"


def blocks_of(config: dict[str, Any]) -> int:
    """What the config itself says, in the innermost object that holds the decoder."""
    for key in ("thinker_config", "text_config", "llm_config"):
        config = config.get(key, config)
    if "layers_block_type" in config:
        return len(config["layers_block_type"])
    return int(next(config[key] for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if key in config))


def test_every_models_blocks_are_its_configs_layers() -> None:
    """Linear attention, states, layers with another's cache and blocks that are an MLP alone among them."""
    rows = list(catalog.rows("models"))
    if BESIDE.is_file():  # the wider catalogue, where it lies beside the checkout
        rows += json.loads(BESIDE.read_text(encoding="utf-8"))
    for row in rows:
        assert Model.from_config(row["config"]).num_blocks == blocks_of(row["config"]), row["id"]


MAMBA = {"model_type": "mamba", "hidden_size": 4096, "num_hidden_layers": 64, "vocab_size": 50280, "state_size": 16,
         "intermediate_size": 8192, "conv_kernel": 4, "time_step_rank": 256, "use_bias": False, "use_conv_bias": True,
         "tie_word_embeddings": False}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("Qwen/Qwen3.5-397B-A17B", 60),  # 15 have keys and values
        ("nvidia/Nemotron-H-56B-Base-8K", 118),  # 10
        ("google/gemma-3n-E4B", 35),  # 20 have a cache of their own
        ("nvidia/Llama-3_3-Nemotron-Super-49B-v1", 80),  # 49 have attention
        ("deepseek-ai/DeepSeek-V4-Flash", 43),  # 84 streams
        ("mamba", 64),  # none
    ],
)
def test_every_block_takes_its_time(name: str, blocks: int) -> None:
    """A step's overhead, the all-reduces and a prefill's overhead are of all blocks, not of those with a cache."""
    model = Model.from_config(MAMBA) if name == "mamba" else load_model(name)
    fixed, card = constants(), find_hardware("b200")
    assert model.num_blocks == blocks
    step = decode_step(model, FP16, card, 1, 1024, Serving(engine="sglang"))
    more = Counter(layer.kind for layer in model.layers)
    each = fixed.layer_seconds + (fixed.expert_layer_seconds if known_weights(model).routed else 0.0)
    each += fixed.narrow_layer_seconds if (model.weight_bits or 16) <= 8 else 0.0
    wanted = blocks * each + fixed.latent_layer_seconds * more["mla"] + fixed.index_layer_seconds * more["indexer"]
    wanted += fixed.state_layer_seconds * len(model.state_layers)
    assert step.parts["overhead"] == pytest.approx(wanted + fixed.sequence_seconds)
    shared = Roofline(model, card, Serving(tensor_parallel=2)).communication(1)
    assert shared == pytest.approx(
        blocks / 32 * Roofline(wide_as(model), card, Serving(tensor_parallel=2)).communication(1)
    )
    own = prefill(model, card, 1, 1024).parts["overhead"] - fixed.prefill_seconds
    assert own == pytest.approx(wanted)


def wide_as(model: Model) -> Model:
    """Llama-3.1-8B, 32 blocks, with the hidden size of another."""
    return replace(LLAMA, hidden_size=model.hidden_size)


@needs_rows
def test_published_rows_of_a_hybrid() -> None:
    """Qwen3.5-397B on 4 and 8 cards, 162 loads: 53 % with 15 of its 60 blocks, 24 % with one card's constants."""
    path = MEASURED / "multi_gpu_serving.csv"
    if not path.is_file():
        pytest.skip("the rows of several cards (shared/measured/multi_gpu_serving.csv) do not lie beside this checkout")
    bits, found = {"bf16": 16.0, "fp8": 8.0, "fp4": 4.5}, []
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            model = load_model(row["model_path"]) if row["model_path"].startswith("Qwen/Qwen3.5") else None
            if model is None or not model.state_layers:
                continue
            wide, card = bits[row["precision"]], find_hardware(row["system"].replace("_", "-"))
            loads = (int(row["batch_size"]), int(row["isl"]), int(row["osl"]))
            serving = Serving(wide, int(row["tp_size"]), row["backend"])
            step = token_step(model, FP8 if wide <= 8 else FP16, card, *loads, serving)
            found.append(abs(step.seconds.value / (float(row["silicon_tpot_ms"]) / 1e3) - 1))
    assert len(found) == 162
    assert mean(found) < 0.17


# Llama-3-8B's shape on an H200, this project's engine, one sequence: milliseconds a step as measured, and as they were
# predicted before with a profile of PyTorch's kernels.
H200_STEPS = [
    ("bf16", 2048, 4.265, 5.704),
    ("bf16", 32768, 5.269, 6.599),
    ("kivi:nbits=2,group_size=32", 32768, 4.534, 5.781),
    ("kivi:nbits=4,group_size=64", 32768, 4.624, 5.875),
]


@pytest.mark.parametrize(("spec", "tokens", "measured", "misled"), H200_STEPS)
def test_the_engine_on_a_card_that_was_not_fitted(spec: str, tokens: int, measured: float, misled: float) -> None:
    step = decode_step(
        load_model("llama-3-8b"), parse_method(spec, {}), find_hardware("h200"), 1, tokens, Serving(engine="kvruntime")
    )
    error = abs(step.seconds.value * 1e3 / measured - 1)
    assert error < 0.03 < abs(misled / measured - 1)
    assert step.seconds.low * 1e3 <= measured <= step.seconds.high * 1e3


def test_what_bounds_a_step() -> None:
    assert decode_step(LLAMA, FP16, H100, 1, 512).bound == "weights"
    assert decode_step(LLAMA, FP16, H100, 64, 32768).bound == "kv"
    assert decode_step(load_model("gpt2"), FP16, H100, 1, 1).bound == "overhead"
    assert decode_step(LLAMA, FP16, H100, 2048, 1).bound in ("compute", "kv")
    assert prefill(LLAMA, H100, 1, 8192).bound == "compute"
    assert token_step(LLAMA, FP16, H100, 128, 4096, 64).bound == "prefill"


def test_long_contexts_cost_what_others_measured() -> None:
    """Llama-3.1-8B on H100 under vLLM's FlashAttention-3: 4.37e-5 ms a token of context in bfloat16, 2.37e-5 in FP8
    (the published comparison of the two caches); neither figure was fitted on."""
    for method, published in ((make_method("bf16"), 4.37e-8), (FP8, 2.37e-8)):
        near, far = (decode_step(LLAMA, method, H100, 1, tokens, Serving(engine="vllm")) for tokens in (65536, 131072))
        assert (far.parts["kv"] - near.parts["kv"]) / 65536 == pytest.approx(published, rel=0.1)


@pytest.mark.parametrize(
    ("batch_size", "num_tokens", "measured"), [(8, 32768, 351e-6), (64, 4096, 350e-6), (1, 131072, 180e-6)]
)
def test_attention_of_a_kernel_that_was_not_fitted(batch_size: int, num_tokens: int, measured: float) -> None:
    """cuDNN's float16 on an H100, cache not in L2."""
    roofline = Roofline(LLAMA, H100)
    seconds, _ = roofline.layer_attention(FP16, LLAMA.cache_layers[0], batch_size, num_tokens)
    assert seconds == pytest.approx(measured, rel=0.15)


def test_a_compressed_cache_gains_less_than_its_bytes() -> None:
    """2 bits in groups of 64 hold 6.4 times fewer bytes; measured are 5.35 times the speed at 8 x 32k, 2.13 at 8k."""
    roofline, layer = Roofline(LLAMA, H100, Serving(engine="kvruntime")), LLAMA.cache_layers[0]
    for batch_size, num_tokens, low, high in ((8, 32768, 4.0, 6.4), (1, 8192, 1.5, 3.0)):
        plain, _ = roofline.layer_attention(FP16, layer, batch_size, num_tokens)
        packed, beyond = roofline.layer_attention(KIVI, layer, batch_size, num_tokens)
        assert beyond == 0
        assert low < plain / packed < high
    slow = Roofline(LLAMA, H100, Serving(profile=replace(constants(), vector_ops=50.0)))
    assert slow.layer_attention(KIVI, layer, 8, 32768)[1] > 0


def test_experts_are_read_as_tokens_hit_them() -> None:
    weights = known_weights(load_model("openai/gpt-oss-20b"))
    assert hit_share(weights, 1) == pytest.approx(4 / 32)
    assert hit_share(weights, 2) == pytest.approx(1 - (28 / 32) ** 2)
    assert hit_share(weights, 1000) == pytest.approx(1)
    model = load_model("openai/gpt-oss-20b")
    reads = [
        decode_step(model, FP16, H100, batch, 128, Serving(weight_bits=16)).parts["weights"] for batch in (1, 4, 64)
    ]
    assert 3 < reads[2] / reads[0] < 8
    assert known_weights(LLAMA).num_experts == 0
    assert hit_share(known_weights(LLAMA), 1) == 1
    assert model.weights is not None
    untold = replace(model, weights=replace(model.weights, experts_per_token=0))
    with pytest.raises(ValueError, match="how many experts"):
        decode_step(untold, FP16, H100, 1, 128)


def test_narrow_weights_are_unpacked_where_the_card_cannot_multiply_them() -> None:
    h200, b200 = find_hardware("h200"), find_hardware("b200")
    assert decode_step(LLAMA, FP16, b200, 1, 128, Serving(weight_bits=4.5)).parts["dequantize"] == 0
    assert decode_step(LLAMA, FP16, h200, 1, 128, Serving(weight_bits=4.5)).parts["dequantize"] > 0
    assert decode_step(LLAMA, FP16, h200, 1, 128, Serving(weight_bits=8)).parts["dequantize"] == 0
    assert decode_step(LLAMA, FP16, find_hardware("a100"), 1, 128, Serving(weight_bits=8)).parts["dequantize"] > 0


def test_several_cards_share_the_stream_and_talk() -> None:
    one, two = (decode_step(LLAMA, FP16, H100, 16, 8192, Serving(tensor_parallel=ranks)) for ranks in (1, 2))
    assert two.parts["weights"] == pytest.approx(one.parts["weights"] / 2)
    assert one.parts["communication"] == 0 < two.parts["communication"]
    assert two.parts["kv"] < one.parts["kv"]
    wide = [decode_step(LLAMA, FP16, H100, 16, 8192, Serving(tensor_parallel=ranks)).parts["kv"] for ranks in (8, 16)]
    assert wide[0] == pytest.approx(wide[1])  # 8 kv heads: more ranks hold copies
    with pytest.raises(ValueError, match="bandwidth between cards"):
        decode_step(LLAMA, FP16, replace(H100, link_bandwidth=None), 1, 128, Serving(tensor_parallel=2))


def test_a_prompt_behind_a_mask_multiplies_every_pair() -> None:
    serving, fixed = Serving(engine="transformers"), constants()
    gemma, tokens = load_model("gemma-3-4b-it"), 16384
    found = Roofline(gemma, H100, serving)
    causal = replace(fixed, engine_masked_efficiency={})
    within = Roofline(gemma, H100, Serving(engine="transformers", profile=causal)).prompt_attention(tokens, tokens)
    windows = [layer for layer in gemma.cache_layers if layer.window]
    width = 2 * 2 * 256 * gemma.num_q_heads * len(windows)  # a product of keys and one of values
    window = windows[0].window
    assert H100.fp16_flops
    assert window
    every = width * tokens**2 / (fixed.engine_masked_efficiency["transformers"] * H100.fp16_flops)
    hidden = width * seen(windows[0], tokens, tokens) / (fixed.attention_efficiency * H100.fp16_flops)
    assert found.prompt_attention(tokens, tokens) == pytest.approx(within - hidden + every)
    short = Roofline(gemma, H100, Serving(engine="transformers", profile=causal)).prompt_attention(window, window)
    assert found.prompt_attention(window, window) == pytest.approx(short)  # nothing has left the windows


def test_ordered_key_channels_delay_the_first_token_of_layers_that_are_packed() -> None:
    serving = Serving(engine=make_engine("kvruntime", steps="generate"))
    each = constants().engine_order_seconds["kvruntime:generate"]
    boost = make_method("kivi-boost")
    for name, packed in (("llama-3.1-8b", 32), ("gemma-3-4b-it", 5)):
        model = load_model(name)
        plain, ordered = (prefill(model, H100, 8, 2048, serving, method=method) for method in (KIVI, boost))
        assert ordered.parts == plain.parts | {"kv": pytest.approx(packed * each)}
        assert prefill(model, H100, 8, 2048, serving, method=boost, cached_tokens=1024).parts["kv"] == 0


def test_a_prefix_at_hand_shortens_the_prefill() -> None:
    whole_prompt, half = prefill(LLAMA, H100, 1, 16384), prefill(LLAMA, H100, 1, 16384, cached_tokens=8192)
    assert 0.45 < half.seconds.value / whole_prompt.seconds.value < 0.75  # the rest still looks at all of it
    for cached in (-1, 16384):
        with pytest.raises(ValueError, match="cached tokens"):
            prefill(LLAMA, H100, 1, 16384, cached_tokens=cached)


@pytest.mark.parametrize(("window", "num_tokens", "new"), [(None, 9, 9), (4, 9, 9), (4, 9, 2), (4, 3, 2), (4, 6, 4)])
def test_pairs_seen(window: int | None, num_tokens: int, new: int) -> None:
    by_hand = sum(min(at + 1, window or num_tokens) for at in range(num_tokens - new, num_tokens))
    assert seen(LayerShape(1, 8, 8, window), num_tokens, new) == by_hand


def test_a_busy_server() -> None:
    """Prompts of others cost a token's time; memory limits how many run; the rest wait."""
    alone, busy = token_step(LLAMA, FP16, H100, 1, 2048, 256), token_step(LLAMA, FP16, H100, 32, 2048, 256)
    assert alone.parts["prefill"] == 0 < busy.parts["prefill"]
    assert busy.parts["prefill"] > token_step(LLAMA, FP16, H100, 32, 2048, 1024).parts["prefill"]
    cached = token_step(LLAMA, FP16, H100, 32, 2048, 256, cached_tokens=2000)
    assert cached.parts["prefill"] < busy.parts["prefill"]
    qwen = load_model("Qwen/Qwen3-32B")
    assert running(LLAMA, FP16, H100, 8, 2048, 256) == 8
    assert 1 <= running(qwen, FP16, H100, 512, 2048, 256) < 60
    assert running(qwen, FP16, replace(H100, memory_nbytes=None), 512, 2048, 256) == 512
    assert first_token(qwen, FP16, H100, 512, 2048, 256).bound == "queue"


def test_this_projects_engine_as_it_was_recorded() -> None:
    """Whole decode steps of two GPT-2s and Llama-3-8B, 16 bits and packed, of 1, 8 and 64 rows: within a tenth."""
    path = Path(__file__).parents[2] / "validation/results/engine/nvidia-h100-80gb-hbm3.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    steps = [row for row in rows if row["kind"] == "step" and row["package"] == "kvruntime"]
    errors = []
    for row in steps:
        packed = re.fullmatch(r"kivi-(\d)bit-g(\d+)-r(\d+)", row["method"])
        spec = "kivi:nbits={},group_size={},residual_length={}".format(*packed.groups()) if packed else row["method"]
        loads = (parse_method(spec, {}), H100, row["batch_size"], row["num_tokens"])
        predicted = decode_step(load_model(row["model"]), *loads, Serving(engine="kvruntime")).seconds
        measured = median(row["seconds_per_step"])
        errors.append(abs(measured / predicted.value - 1))
        assert predicted.low <= measured <= predicted.high
    assert len(steps) == 68
    assert mean(errors) < 0.03
    assert max(errors) < 0.1


def test_layers_of_other_kinds_take_their_share() -> None:
    """Of an engine whose layers' seconds are known: 29 of Gemma 3's 34 slide, 48 of Qwen3.5's 64 have a state.  Gemma's
    layers have four norms, and its queries and keys one each, as those of Qwen's other 16 layers."""
    shares = {"transformers": {"window": 1.5, "state": 3.0, "norm": 0.25}}
    fixed = replace(constants(), engine_layer_shares=shares, host_launched=())
    each, step = (getattr(fixed, f"engine_{name}_seconds")["transformers"] for name in ("layer", "step"))
    norms = {"gemma-3-4b-it": 4 * 34, "qwen3.5-27b": 2 * 16, "qwen3-0.6b": 2 * 28, "gpt2": 0}
    assert {name: load_model(name).more_norms for name in norms} == norms
    gemma, qwen = 5 + 1.5 * 29 + 34, 16 + 3 * 48 + 8
    for name, blocks in (("llama-3-8b", 32), ("gemma-3-4b-it", gemma), ("qwen3.5-27b", qwen)):
        parts = decode_step(load_model(name), FP16, H100, 1, 512, Serving(engine="transformers", profile=fixed)).parts
        assert parts["overhead"] == pytest.approx(each * blocks + step)


def test_a_profile_keeps_what_a_graph_takes_beside_its_layers() -> None:
    """Norms, windows and states are the card's in a graph, whatever a profile says of a layer; launches the host's."""
    model, stated = load_model("gemma-3-4b-it"), constants()
    for name, beside in (("kvruntime:generate", 1.0), ("transformers", 3.0)):
        layer = stated.engine_layer_seconds[name]
        fixed = with_part(stated, name, Part(1e12, 3 * layer), H100)
        alone, measured = (Roofline(model, H100, Serving(engine=name, profile=each)).blocks for each in (stated, fixed))
        more = (alone - model.num_blocks) * layer
        assert more > 0
        assert measured * 3 * layer == pytest.approx(model.num_blocks * 3 * layer + beside * more)


def test_states_are_read_and_written_as_often_as_an_engine_does() -> None:
    """Qwen3.5's of eight rows are eight times those of one, and a constant of the engine times that of one pass."""
    model, many = load_model("qwen3.5-27b"), {"kvruntime:generate": 10.0}
    kv = {
        (passes, rows): Roofline(
            model, H100, Serving(engine="kvruntime:generate", profile=replace(constants(), engine_state_passes=more))
        ).states(rows)
        for passes, more in (("one", {}), ("ten", many))
        for rows in (1, 8)
    }
    assert kv["ten", 1] == pytest.approx(10 * kv["one", 1])
    assert kv["ten", 8] == pytest.approx(8 * kv["ten", 1])


def test_the_engines_numbers_are_those_that_fit_its_recorded_steps() -> None:
    timing = pytest.importorskip("validation.latency.study", reason="numpy and scipy are not installed")
    from validation.latency.generated_steps import START

    fixed = constants()
    other = replace(fixed, engine_layer_seconds={"llama.cpp": 1.0}, engine_step_seconds={}, engine_table_share={})
    fitted, found = timing.steps_study(other)
    own = {name: pytest.approx(fixed.engine_layer_seconds[name], rel=2e-2) for name in ("kvruntime", *START)}
    assert fitted.engine_layer_seconds == {"llama.cpp": 1.0, **own}
    assert fitted.engine_step_seconds == pytest.approx(fixed.engine_step_seconds, rel=2e-2)
    assert fitted.engine_table_share == pytest.approx(fixed.engine_table_share, rel=2e-2)
    for name in ("kvruntime", "kvruntime:generate", "transformers:static"):
        assert fitted.engine_wide[name] == pytest.approx(fixed.engine_wide[name], rel=5e-2)
        assert fitted.overlapped[name] == pytest.approx(fixed.overlapped[name], rel=2e-2)
    recorded = timing.recorded()["steps"]
    assert list(found) == list(recorded)
    for name, each in found.items():  # those were of constants before they were rounded
        assert each == pytest.approx(recorded[name], abs=2e-3), name
    carried = [each for name, each in found.items() if "carried to" in name]
    assert len(carried) == 2
    assert all(each["mean"] < 0.06 for each in carried)  # one card's constants on the other's steps


def test_this_projects_kernels_are_those_that_fit_the_records_of_both_cards() -> None:
    own = pytest.importorskip("validation.latency.own", reason="scipy is not installed")
    fixed, rows = constants(), own.recorded_attention()
    assert {row.card.id for row in rows} == {"h100-sxm", "h200-sxm"}
    fitted = own.kernels(rows, fixed)
    for name in ("kvruntime/fp16", "kvruntime/packed"):
        one, other = fitted.kernels[name], fixed.kernels[name]
        assert (one.fixed, one.efficiency) == pytest.approx((other.fixed, other.efficiency), rel=5e-3)
    assert own.judged(rows, fitted)["kvruntime/packed"]["mean"] < 0.06
    coded = own.widths_of_codes(rows)
    assert set(coded) == {"coded-int8", "coded-int4", "coded-fp8", *(f"coded-levels{bits}" for bits in (2, 3, 4))}
    for name in coded:
        one, other = fitted.kernels[f"kvruntime/{name}"], fixed.kernels[f"kvruntime/{name}"]
        assert (one.fixed, one.code_ops) == pytest.approx((other.fixed, other.code_ops), rel=2e-2)
    assert all(each["mean"] < 0.12 for each in own.left_out(rows, fitted).values())  # shapes not seen


def test_a_card_of_more_bandwidth_does_not_unpack_or_multiply_faster() -> None:
    """An H200 reads 1.43 times as fast as an H100, with as many multiprocessors: 2-bit codes gain next to nothing, the
    16-bit cache all of it, and one row's weights less than several rows', which take the matrix units."""
    h200, layer = find_hardware("h200"), LLAMA.cache_layers[0]

    def gain(method: Method) -> float:
        cards = (Roofline(LLAMA, card, Serving(engine="kvruntime")) for card in (H100, h200))
        slow, fast = (roofline.layer_attention(method, layer, 8, 32768)[0] for roofline in cards)
        return slow / fast

    assert gain(KIVI) < 1.1
    assert gain(FP16) > 1.35
    stream = [
        [Roofline(LLAMA, card, Serving(engine="kvruntime")).weights(rows)[0] for rows in (1, 2)]
        for card in (H100, h200)
    ]
    assert stream[0][0] / stream[1][0] < 1.35 < stream[0][1] / stream[1][1]


def test_an_engines_wide_steps_take_more() -> None:
    """Above one row, in the engine that was timed, and nowhere else."""
    more = constants().engine_wide["kvruntime"]
    for engine, rows, seconds in (("kvruntime", 1, 0), ("kvruntime", 2, 1), ("vllm", 64, 0)):
        roofline = Roofline(LLAMA, H100, Serving(engine=engine))
        parts = decode_step(LLAMA, FP16, H100, rows, 512, Serving(engine=engine)).parts
        each = more["layer_seconds"] + rows * more["row_seconds"]
        wanted = roofline.overhead(FP16) + roofline.sequences(rows) + seconds * each * LLAMA.num_blocks
        assert parts["overhead"] == pytest.approx(wanted)
        assert parts["weights"] == pytest.approx(roofline.weights(rows)[0])


def test_stock_generate_waits_for_the_host() -> None:
    """Whatever the card could do: as long at 8 rows as at one, and a plan longer at lengths that are new.  GPT-2's
    layers launch less than a Llama's.  A compiled step waits for no host, and copies keys for every query head."""
    gpt2, h200 = load_model("gpt2"), find_hardware("h200-sxm")

    def step(model: Model, rows: int, tokens: int, **options: Any) -> Step:
        return decode_step(model, FP16, h200, rows, tokens, Serving(engine=make_engine("transformers", **options)))

    seen, new = step(gpt2, 1, 512), step(gpt2, 1, 512, lengths="new")
    assert seen.bound == new.bound == "overhead"
    assert step(gpt2, 8, 512).seconds.value == pytest.approx(seen.seconds.value)
    assert seen.seconds.value == pytest.approx(6.6e-3, rel=0.1)  # validation/results/generate, its second call
    assert new.seconds.value - seen.seconds.value == pytest.approx(0.046, rel=0.1)
    assert step(LLAMA, 1, 512).seconds.value / LLAMA.num_blocks > 1.3 * seen.seconds.value / gpt2.num_blocks
    static = step(LLAMA, 8, 16384, cache_implementation="static")
    shared = LLAMA.num_q_heads // LLAMA.cache_layers[0].num_kv_heads
    once = decode_step(LLAMA, FP16, h200, 8, 16384, Serving(engine="kvruntime")).parts["kv"]
    assert static.bound == "kv"
    assert static.parts["kv"] > 1.5 * shared * once
    with pytest.raises(ValueError, match="lengths 'old': allowed are seen, new"):
        make_engine("transformers", lengths="old")


def test_an_engine_that_was_not_timed_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    for engine, said in (("llama.cpp", True), ("vllm", False), ("kvruntime", False), ("ideal", False)):
        assert run(["estimate", "--model", "gpt2", "--gpu", "h100", "--method", "fp16", "--engine", engine]) == 0
        assert (f"{engine} was not timed" in capsys.readouterr().out) is said


def test_kernels_by_engine_and_width() -> None:
    fixed, layer = constants(), LLAMA.cache_layers[0]
    assert find_kernel(fixed, FP16, layer, "vllm", 4) == (fixed.kernels["vllm/fp16"], False)
    assert find_kernel(fixed, FP8, layer, "trtllm", 1) == (fixed.kernels["trtllm/fp8-mha"], False)
    assert find_kernel(fixed, FP8, layer, "trtllm", 4) == (fixed.kernels["trtllm/fp8"], False)
    assert find_kernel(fixed, FP16, layer, "never-heard-of", 4) == (fixed.kernels["fp16"], False)
    assert find_kernel(fixed, KIVI, layer, "vllm", 4) == (fixed.kernels["packed"], True)
    for method, name in ((TurboQuant(3), "levels3"), (PerTokenHead("fp8-e5m2"), "fp8"), (PerTokenHead("int4"), "int4")):
        own = fixed.kernels[f"kvruntime/coded-{name}"]
        assert find_kernel(fixed, method, layer, "kvruntime:generate", 4) == (own, True)
        assert find_kernel(fixed, Evict(64, inner=method), layer, "kvruntime", 4) == (own, True)
    assert find_kernel(fixed, TurboQuant(3.5), layer, "kvruntime", 4) == (fixed.kernels["kvruntime/packed"], True)
    assert fixed.kernels["trtllm/fp16"].item_is == "query_head"


def test_a_warm_cache_is_quicker_until_it_outgrows_l2() -> None:
    curve = constants().curve
    assert curve.miss(1e6, 50 << 20) == pytest.approx(curve.warm, rel=0.01)
    assert curve.miss(1e9, 50 << 20) == pytest.approx(1, rel=0.01)
    assert curve.miss(1e6, None) == 1
    kernel = Kernel(1e-6, 1e-6, 0.9, "")
    assert curve.seconds(kernel, 1, 1, 0.0, 132) < curve.seconds(kernel, 1, 100_000, 0.0, 132)
    own = replace(kernel, value=2e-9, merge=3e-6, half=500.0)
    assert curve.seconds(own, 1, 500, 0.0, 132, values=512) == pytest.approx(1e-6 + 1.024e-6 + 1.5e-6 + 1e-6)


@pytest.mark.parametrize(
    ("batch_size", "num_tokens", "said"),
    [
        *((0, 128, "batch size 0"), (1, 0, "num tokens 0"), (-3, 5, "batch size -3")),
        *((10**400, 128, "batch size 1000"), (1, 10**16, "num tokens 1000"), (float("nan"), 5, "batch size nan")),
        (1e300, 5, r"batch size 1e\+300"),
    ],
)
def test_bad_sizes_are_refused(batch_size: float, num_tokens: int, said: str) -> None:
    """Huge ones too, in one short line."""
    with pytest.raises(ValueError, match=said) as caught:
        decode_step(LLAMA, FP16, H100, batch_size, num_tokens)
    assert len(str(caught.value)) < 120


def test_the_largest_sizes_have_a_time() -> None:
    numpy = pytest.importorskip("numpy", reason="numpy is not installed")
    step = token_step(LLAMA, FP16, replace(H100, memory_nbytes=None), MOST, MOST, MOST, Serving(tensor_parallel=MOST))
    assert isfinite(step.seconds.value)
    assert isfinite(first_token(LLAMA, FP16, H100, MOST, MOST, 1).seconds.value)
    for batch in (MOST + 1, 0):
        with pytest.raises(ValueError, match="batch and context: allowed are 1 to"):
            decode_seconds(LLAMA, FP16, H100, numpy.array([1, batch]), numpy.array([1, 2]))


@pytest.mark.parametrize("bits", [0.0, -1.0, 65.0, float("nan"), float("inf")])
def test_weights_of_no_width_are_refused(bits: float) -> None:
    with pytest.raises(ValueError, match=r"weight bits .*: allowed are above 0 to 64"):
        decode_step(LLAMA, FP16, H100, 1, 128, Serving(weight_bits=bits))


def test_what_is_not_known_is_not_guessed() -> None:
    with pytest.raises(ValueError, match="bandwidth is not known"):
        decode_step(LLAMA, FP16, replace(H100, bandwidth=None), 1, 128)
    with pytest.raises(ValueError, match="arithmetic"):
        prefill(LLAMA, find_hardware("apple-m3-max"), 1, 128)
    whole(decode_step(LLAMA, FP16, find_hardware("apple-m3-max"), 1, 128))
    with pytest.raises(ValueError, match="number of weights"):
        decode_step(replace(LLAMA, weights=None), FP16, H100, 1, 128)


def test_the_scalar_form_needs_no_numpy() -> None:
    code = (
        "import sys; from kvsim.latency.steps import decode_step; from kvsim.models.load import load_model;"
        "from kvsim.hardware import find_hardware; from kvsim.methods import make_method;"
        "decode_step(load_model('gpt2'), make_method('fp16'), find_hardware('h100'), 1, 128);"
        "assert not {'numpy', 'scipy', 'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_recorded_errors_meet_their_bars() -> None:
    timing = pytest.importorskip("validation.latency.study", reason="numpy and scipy are not installed")
    found = timing.recorded()
    assert timing.fails(found) == []
    assert found["loads"]["num_constants"] <= 19
    assert found["loads"]["covered"] == 1
    loads = found["loads"]
    for name, baselines, rows in (("token", "baselines", 141), ("parallel", "parallel_baselines", 1295)):
        part = loads[name]
        assert part["in_band_of_other_groups"] >= 0.9
        assert part["held_out"]["mean"] < 1.3 * part["in_sample"]["mean"]  # few constants: no group is learnt by heart
        assert all(part["held_out"]["mean"] < baseline["mean"] for baseline in loads[baselines].values())
        assert sum(group["num_rows"] for group in part["by_group"].values()) == part["held_out"]["num_rows"] == rows
    for name, cards, bar in (("token", "one card", "12.0%"), ("parallel", "several cards", "15.0%")):
        part = loads[name]
        broken = {**found, "loads": {**loads, name: {**part, "held_out": {**part["held_out"], "mean": 0.2}}}}
        assert timing.fails(broken) == [f"time per output token, {cards}, mean: 20.0%, at most {bar}"]


def test_the_recorded_constants_are_those_in_use() -> None:
    timing = pytest.importorskip("validation.latency.study", reason="numpy and scipy are not installed")
    recorded, fixed = timing.recorded()["constants"], constants()
    for name, value in recorded.items():
        used = getattr(fixed, name)
        assert (list(used) if isinstance(used, tuple) else used) == value, name


def test_recorded_kernels_replace_the_study(tmp_path: Path) -> None:
    pytest.importorskip("scipy", reason="scipy is not installed")
    from validation.latency import attention

    assert attention.recorded_rows(H100, folder=tmp_path) is None
    shape = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128, "kernel": "fast", "ragged": False, "kind": "attend"}
    rows = [
        {**shape, "batch_size": batch, "num_tokens": tokens, "nbytes_read": nbytes, "seconds": [seconds, 0, 0]}
        for batch, tokens, nbytes, seconds in ((8, 32768, 1.7e8, 66e-6), (1, 8192, 5.2e6, 8e-6))
    ]
    rows += [{**rows[0], "kernel": "portable"}, {**rows[0], "ragged": True}, {"kind": "ceiling"}]
    rows += [{"kind": "attend", "ragged": False, "failed": "out of memory"}]
    rows += [
        {**rows[0], "kind": "sdpa", "kernel": None, "seconds": [seconds, 0, 0]} for seconds in (350e-6, 344e-6, 345e-6)
    ]
    for name, device in (("a.json", "NVIDIA H100 80GB HBM3"), ("b.json", "NVIDIA A100-SXM4-80GB")):
        (tmp_path / name).write_text(json.dumps({"device": {"name": device}, "rows": rows}), encoding="utf-8")
    fastest = attention.recorded_rows(H100, "fp16", tmp_path)
    assert fastest is not None
    assert fastest.seconds.tolist() == [344e-6]
    assert attention.recorded_rows(H100, "engine", tmp_path) is None
    rows.append({**rows[0], "kind": "full", "kernel": None})
    (tmp_path / "a.json").write_text(json.dumps({"device": {"name": "NVIDIA H100"}, "rows": rows}), encoding="utf-8")
    own = attention.recorded_rows(H100, "engine", tmp_path)
    assert own is not None
    assert own.seconds.tolist() == [66e-6]
    found = attention.recorded_rows(H100, folder=tmp_path)
    assert found is not None
    assert found.items.tolist() == [64, 8]
    assert found.values.tolist() == [512, 512]
    assert found.seconds.tolist() == [66e-6, 8e-6]
    assert found.source.endswith("a.json")
    assert attention.study_rows().seconds[0] == pytest.approx(351e-6 / 4.54)


@needs_rows
def test_a_refit_gives_the_constants_in_use() -> None:
    timing = pytest.importorskip("validation.latency.study", reason="numpy and scipy are not installed")
    import numpy as np

    from validation.latency import attention, serving
    from validation.latency.held_out import digest

    for path in (*timing.DECODE, timing.ATTENTION):
        assert digest(path) == timing.recorded()["sha256"][path.name]
    fixed, rows = constants(), attention.load(timing.ATTENTION)
    kernels, curve = attention.fit(rows, np.ones(len(rows), dtype=bool))
    for name, kernel in kernels.items():
        used = fixed.kernels[name]
        found = (kernel.fixed, kernel.item, kernel.efficiency)
        assert (used.fixed, used.item, used.efficiency) == pytest.approx(found, rel=2e-3), name
    assert (curve.power, curve.merge, curve.half) == pytest.approx(
        (fixed.curve.power, fixed.curve.merge, fixed.curve.half), rel=2e-3
    )
    recorded, _ = attention.recorded_kernels(curve, rows.card, fixed.kernels["fp16"])
    assert set(recorded) == {"packed", *(name for name in fixed.kernels if name.startswith("kvruntime/"))}
    for name, kernel in recorded.items():
        assert kernel.efficiency == pytest.approx(fixed.kernels[name].efficiency, rel=2e-3), name
        assert kernel.code_ops == pytest.approx(fixed.kernels[name].code_ops, rel=2e-2), name
    loads = [row for path in timing.DECODE for row in serving.load(path)]
    assert len(loads) == 1436
    again = serving.fit_first(loads, serving.fit_tokens(loads, fixed))
    for name in timing.fitted_names():
        assert getattr(again, name) == pytest.approx(getattr(fixed, name), rel=5e-3), name


@needs_rows
def test_rows_of_another_file_are_tried_without_a_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("validation.latency.study", reason="numpy and scipy are not installed")
    from validation.cli import run as validate

    lines = (MEASURED / "decode_attention_h100.csv").read_text(encoding="utf-8").splitlines()
    path = tmp_path / "other.csv"
    path.write_text("\n".join([lines[0], *lines[1:200:5]]) + "\n", encoding="utf-8")
    assert validate(["time", "--try", "--attention", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)["attention"]["errors"]["mean"] < 0.25
    path.write_text("gpu,latency_ms\nh100_sxm,1\n", encoding="utf-8")
    assert validate(["time", "--try", "--attention", str(path)]) == 2
    assert "lacks the columns" in capsys.readouterr().err
