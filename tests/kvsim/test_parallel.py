"""Sharding and shared prefixes: bytes per rank, copies of heads, what does not divide."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsim.engines import Engine, Ideal, Kvruntime, LlamaCpp, Vllm
from kvsim.engines.transformers import Transformers
from kvsim.hardware import find_hardware
from kvsim.layout import LayerShape, Method, StateShape
from kvsim.memory.capacity import largest_batch, largest_context, room
from kvsim.memory.estimate import estimate
from kvsim.memory.sharding import Deployment, Sharding, pipeline_layers, stages
from kvsim.methods import Evict, Fp8, Full, Kivi, Paged, Slot, make_method
from kvsim.methods.layer_mix import LayerMix
from kvsim.models.load import load_model
from kvsim.models.model import Model
from kvsim.models.quantization import config_bits

GIB = 1 << 30
LLAMA = load_model("llama-3.1-8b")  # 32 layers, 8 kv heads of 128
LATENT = replace(LLAMA, layers=(LayerShape(1, 576, 0, kind="mla"),) * 61, num_q_heads=128)


def rank(model: Model, tokens: int = 4096, batch: int = 1, **sizes: int) -> int:
    return Deployment(model, Full(), sharding=Sharding(**sizes)).rank_nbytes(batch, tokens)


def test_heads_are_split_then_copied() -> None:
    whole = rank(LLAMA)
    for ranks, share in ((1, 1), (2, 2), (4, 4), (8, 8), (16, 8), (32, 8)):
        assert rank(LLAMA, tensor_parallel_size=ranks) == whole // share
        deployment = Deployment(LLAMA, Full(), sharding=Sharding(tensor_parallel_size=ranks))
        assert deployment.all_nbytes(1, 4096) == whole * ranks // share


def test_a_latent_is_on_every_rank() -> None:
    assert rank(LATENT, tensor_parallel_size=8) == rank(LATENT) == 4096 * 61 * 576 * 2
    assert rank(LATENT, tensor_parallel_size=8, decode_context_parallel_size=8) == rank(LATENT) // 8


def test_context_parallel_spreads_tokens() -> None:
    a_token = rank(LLAMA, 1) // 4
    sizes = {"tensor_parallel_size": 16, "decode_context_parallel_size": 2}
    assert rank(LLAMA, 1001, **sizes) == 501 * a_token // 2
    assert rank(LLAMA, 1000, prefill_context_parallel_size=4) == 250 * a_token * 4
    assert Sharding(tensor_parallel_size=2, pipeline_parallel_size=3, prefill_context_parallel_size=2).ranks == 12


@pytest.mark.parametrize(
    ("layers", "ranks", "counts"),
    [(32, 1, (32,)), (32, 4, (8, 8, 8, 8)), (61, 2, (31, 30)), (62, 4, (15, 16, 16, 15)), (23, 4, (6, 6, 6, 5))],
)
def test_pipeline_layers_as_vllm_splits_them(layers: int, ranks: int, counts: tuple[int, ...]) -> None:
    assert pipeline_layers(layers, ranks) == counts
    assert sum(counts) == layers


def test_pipeline_layers_as_transformers_splits_them() -> None:
    """7 layers over 3 stages: 3, 2 and 2, where vLLM has 2, 3 and 2."""
    assert pipeline_layers(7, 3, first=True) == (3, 2, 2)
    assert pipeline_layers(7, 3) == (2, 3, 2)
    seven, sharding = replace(LLAMA, layers=LLAMA.layers[:7]), Sharding(pipeline_parallel_size=3)
    sizes = {}
    for engine in (Kvruntime(), Transformers(), Vllm()):
        sizes[engine.name] = Deployment(seven, Full(), engine, sharding).stage_nbytes(1, 4096)
    assert sizes["kvruntime"][0] > sizes["kvruntime"][1] == sizes["kvruntime"][2]
    assert sizes["transformers"][0] > sizes["transformers"][1]
    assert sizes["vllm"][1] > sizes["vllm"][0] == sizes["vllm"][2]


def test_stages_hold_their_layers() -> None:
    sizes = {"pipeline_parallel_size": 4, "tensor_parallel_size": 2}
    parts = stages(LLAMA, Sharding(**sizes))
    assert [len(stage.layers) for stage in parts] == [8, 8, 8, 8]
    assert {stage.cache_layers[0].num_kv_heads for stage in parts} == {4}
    assert rank(LLAMA, **sizes) == rank(LLAMA) // 8
    index = LayerShape(1, 128, 0, kind="indexer")
    sparse = replace(LATENT, layers=LATENT.layers + (index,) * 61)
    assert [(len(s.cache_layers), len(s.index_layers)) for s in stages(sparse, Sharding(pipeline_parallel_size=2))] == [
        (31, 31),
        (30, 30),
    ]


NESTED = LayerMix(0, 0, exact=Kivi(8), inner=LayerMix(1, 2, inner=Kivi(2)), layers="3+7-9+30")


@pytest.mark.parametrize(
    ("model", "method"),
    [
        ("llama-3.1-8b", LayerMix()),
        ("llama-3.1-8b", NESTED),
        ("llama-3.1-8b", Evict(64, inner=NESTED)),
        ("llama-3.1-8b", Paged(inner=LayerMix())),
        ("gemma-3-12b", LayerMix(1, 1, windows=1)),
        ("llama-3.1-8b", Slot("turboquant_3bit_nc")),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_a_mix_goes_by_places_in_the_whole_model(model: str, method: Method) -> None:
    """Its stages hold together what one card holds, as do those of vLLM's presets, which leave the ends as they are; a
    number that no layer has is refused there too."""
    whole = load_model(model)
    one = Deployment(whole, method).all_nbytes(2, 700)
    for ranks in (2, 3, 5, 16):
        assert Deployment(whole, method, sharding=Sharding(pipeline_parallel_size=ranks)).all_nbytes(2, 700) == one
    with pytest.raises(ValueError, match="layers 99: allowed are 0 to "):
        Deployment(whole, LayerMix(layers="99"), sharding=Sharding(pipeline_parallel_size=2)).rank_nbytes(1, 9)


def test_data_parallel_splits_sequences() -> None:
    assert rank(LLAMA, batch=9, data_parallel_size=4) == 3 * rank(LLAMA)


def test_states_are_split() -> None:
    state = StateShape((("conv", (10240, 3), "bfloat16"), ("ssm", (48, 128, 128), "float32")))
    hybrid = replace(LLAMA, layers=(state,) * 3 + LLAMA.layers[:1])
    deployment = Deployment(hybrid, Full(), sharding=Sharding(tensor_parallel_size=8))
    assert deployment.rank_nbytes(2, 100) == Deployment(hybrid, Full()).rank_nbytes(2, 100) // 8


@pytest.mark.parametrize(
    ("model", "sizes", "message"),
    [
        (LLAMA, {"tensor_parallel_size": 3}, "does not divide the 32 query heads"),
        (LLAMA, {"tensor_parallel_size": 0}, "tensor-parallel-size 0: allowed"),
        (LLAMA, {"tensor_parallel_size": 4, "decode_context_parallel_size": 3}, "divisors of the tensor-parallel"),
        (LLAMA, {"tensor_parallel_size": 8, "decode_context_parallel_size": 2}, "keeps 1 copy of a kv head"),
        (LLAMA, {"pipeline_parallel_size": 33}, "allowed are 1 to the 32 layers"),
        (replace(LLAMA, layers=(LayerShape(6, 64, 64),), num_q_heads=24), {"tensor_parallel_size": 4}, "6 kv heads"),
        (replace(LLAMA, layers=(LayerShape(6, 64, 64),), num_q_heads=24), {"tensor_parallel_size": 8}, "6 kv heads"),
        (
            replace(LLAMA, layers=(LayerShape(8, 64, 64, window=10),)),
            {"prefill_context_parallel_size": 2},
            "layers with a window",
        ),
    ],
)
def test_what_does_not_divide(model: Model, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rank(model, **sizes)


def test_engines_round_a_ranks_share() -> None:
    """Llama-3.1-8B in 63.76 GiB of each of two H100s: 1,044,688 tokens (vLLM 0.19.0, as in test_kvsim_engines)."""
    (stage,) = stages(LLAMA, Sharding(tensor_parallel_size=2))
    tokens = [Vllm().pool(stage, Full(), int((63.76 + step) * GIB), 8192).num_tokens_before for step in (-5e-3, 5e-3)]
    assert tokens[0] <= 1_044_688 <= tokens[1]


def test_the_weights_of_a_rank() -> None:
    """GiB that vLLM 0.19.0 printed for Llama-3.1-8B: 14.99, 7.51 on two ranks, 4.26 on four stages, 8.49 with fp8."""
    card = find_hardware("h100-sxm")
    for printed, sharding, bits in (
        (14.99, Sharding(), 16),
        (7.51, Sharding(tensor_parallel_size=2), 16),
        (3.77, Sharding(tensor_parallel_size=4), 16),
        (4.26, Sharding(pipeline_parallel_size=4), 16),
        (8.49, Sharding(), 8),
    ):
        space = room(LLAMA, card, bits, quantized=True, sharding=sharding)
        assert space.weight_nbytes / GIB == pytest.approx(printed, rel=0.01)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([Ideal(), Vllm(), LlamaCpp()]),
    st.sampled_from([Full(), Fp8()]),
    st.sampled_from([1, 2, 8]),
    st.integers(10**8, 10**11),
)
def test_inverses_are_exact_with_an_engines_rounding(engine: Engine, method: Full, ranks: int, available: int) -> None:
    if isinstance(engine, LlamaCpp):
        method = Full()
    deployment = Deployment(LLAMA, method, engine, Sharding(tensor_parallel_size=ranks))
    batch = largest_batch(deployment, 3000, available)
    assert batch is not None
    assert not batch or deployment.rank_nbytes(batch, 3000) <= available
    assert available < deployment.rank_nbytes(batch + 1, 3000)
    tokens = largest_context(deployment, 3, available)
    assert tokens is not None
    assert not tokens or deployment.rank_nbytes(3, tokens) <= available
    assert available < deployment.rank_nbytes(3, tokens + 1)


def test_a_shared_prefix_is_stored_once() -> None:
    a_token = 131072
    for method, token in ((Full(), a_token), (Fp8(), a_token // 2)):
        row = estimate(LLAMA, method, 10, 1000, shared_prefix=300)
        assert row.nbytes == token * (300 + 10 * 700)
    vllm = estimate(LLAMA, Full(), 10, 1000, Vllm(), shared_prefix=300)
    alone = estimate(LLAMA, Full(), 10, 1000, Vllm())
    assert alone.nbytes - vllm.nbytes == 9 * 288 * a_token  # 18 whole blocks of 16
    paged = estimate(LLAMA, Paged(64), 10, 1000, shared_prefix=300)
    assert paged.nbytes == a_token * (256 + 10 * (1024 - 256))
    deployment = Deployment(LLAMA, Full(), shared_prefix=300)
    assert deployment.rank_nbytes(10, 1000) == a_token * (300 + 10 * 700)
    assert largest_batch(deployment, 1000, a_token * (300 + 10 * 700)) == 10
    assert largest_context(deployment, 10, a_token * (300 + 10 * 700)) == 1000
    assert largest_context(deployment, 10, a_token * 299) == 0


def test_a_window_moves_past_the_prefix() -> None:
    layer = LayerShape(8, 128, 128, window=512)
    model = replace(LLAMA, layers=(layer,))
    a_token = 8 * 2 * 128 * 2
    assert estimate(model, Full(), 4, 1000, shared_prefix=600).nbytes == a_token * (112 + 4 * 400)
    assert estimate(model, Full(), 4, 2000, shared_prefix=600).nbytes == a_token * 4 * 512


@pytest.mark.parametrize(
    ("method", "engine", "prefix", "message"),
    [
        (Kivi(), Ideal(), 10, "kivi-2bit-g32-r128 does not share prefixes"),
        (Evict(), Ideal(), 10, "does not share prefixes"),
        (Full(), LlamaCpp(), 10, "llama.cpp does not share prefixes: allowed are ideal and vllm"),
        (Full(), Ideal(), 101, "shared prefix 101: allowed are 0 to the 100 tokens"),
        (make_method("int8"), Ideal(), -1, "shared prefix -1"),
    ],
)
def test_what_does_not_share(method: Full, engine: Engine, prefix: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate(LLAMA, method, 2, 100, engine, shared_prefix=prefix)


@pytest.mark.parametrize(
    ("config", "bits"),
    [
        ({"quant_method": "fp8"}, 8),
        ({"quant_method": "mxfp4"}, 4.25),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, 4 + 20 / 128),
        ({"quant_method": "gptq", "bits": 4, "group_size": -1}, 4),
        ({"quant_method": "gptq"}, None),
        ({"quant_method": "gptq", "bits": "4"}, None),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, 4.5),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4.127),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"a": {"weights": {"num_bits": 4, "group_size": 32}}},
            },
            4.5,
        ),
        ({"quant_method": "compressed-tensors"}, None),
        ({"quant_method": "compressed-tensors", "config_groups": [1]}, None),
        ({"quant_method": ["fp8"]}, None),
        ({}, None),
    ],
)
def test_bits_of_a_quantized_checkpoint(config: dict[str, object], bits: float | None) -> None:
    assert config_bits(config) == bits


def test_experts_alone_are_quantized_where_the_family_does_so() -> None:
    """gpt-oss-20b: 12.8 GiB of weights as published (13.76 GB checkpoint), 7.01 on each of two in vLLM, padded."""
    model = load_model("openai/gpt-oss-20b")
    space = room(model, find_hardware("h100-sxm"))
    assert space.weight_bits == 4.25
    assert space.weight_nbytes / 1e9 == pytest.approx(13.76, rel=0.01)
