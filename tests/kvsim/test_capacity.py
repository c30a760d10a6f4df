"""What fits: the inverses are exact, the memory is divided as stated."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsim.engines import Engine, Kvruntime, LlamaCpp, Vllm
from kvsim.hardware import find_hardware
from kvsim.layout import LayerShape, Method, layer_label
from kvsim.memory.capacity import (
    SEARCH_LIMIT,
    largest_batch,
    largest_context,
    largest_within,
    max_batch,
    max_context,
    room,
)
from kvsim.memory.estimate import cache_nbytes, estimate
from kvsim.memory.sharding import Deployment, Sharding
from kvsim.methods import Evict, Fp8, Full, Kivi, kivi_seed
from kvsim.models.load import load_model
from kvsim.models.weight_storage import weight_nbytes

LLAMA = load_model("llama-3-8b")
METHODS = [Full(), Kivi(), Kivi(nbits=4, sink_length=4), kivi_seed()]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("available", [10**9, 56 << 30, 10**12 + 7])
def test_the_largest_fits_and_the_next_does_not(method: Full | Kivi, available: int) -> None:
    batch = max_batch(LLAMA, method, 8192, available)
    assert batch is not None
    assert cache_nbytes(LLAMA, method, batch, 8192) <= available < cache_nbytes(LLAMA, method, batch + 1, 8192)
    ctx = max_context(LLAMA, method, 3, available)
    assert ctx is not None
    assert cache_nbytes(LLAMA, method, 3, ctx) <= available < cache_nbytes(LLAMA, method, 3, ctx + 1)


def test_exact_edges() -> None:
    one = cache_nbytes(LLAMA, Full(), 1, 1000)
    assert max_batch(LLAMA, Full(), 1000, 7 * one) == 7
    assert max_batch(LLAMA, Full(), 1000, 7 * one - 1) == 6
    assert max_context(LLAMA, Full(), 1, one) == 1000
    assert max_batch(LLAMA, Full(), 1000, one - 1) == 0
    assert max_context(LLAMA, Full(), 1, -5) == 0


def test_no_limit_is_said_and_ends() -> None:
    assert max_context(replace(LLAMA, layers=()), Full(), 1, 10) is None


def test_a_card_divided() -> None:
    space = room(LLAMA, find_hardware("h100-sxm"))
    assert space.memory_nbytes == 81559 << 20
    assert space.reserve_nbytes == (81559 << 20) // 10
    assert space.weight_nbytes == 8030261248 * 2
    assert space.cache_nbytes == space.memory_nbytes - space.reserve_nbytes - space.weight_nbytes
    assert "no dtype" in space.notes[0]
    assert room(LLAMA, find_hardware("h100"), weight_bits=4, reserve=0).weight_nbytes == 8030261248 // 2


@pytest.mark.parametrize(
    ("model", "card", "options", "message"),
    [
        ("gpt2", "apple-m5-pro", {}, "apple-m5-pro: its memory is not known"),
        ("gpt2", "t4", {"reserve": 1.0}, "reserve 1: allowed"),
        ("gpt2", "t4", {"weight_bits": 0.0}, "weight-bits 0: allowed"),
    ],
)
def test_what_cannot_be_said(model: str, card: str, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        room(load_model(model), find_hardware(card), **options)


def test_an_unknown_number_of_parameters() -> None:
    with pytest.raises(ValueError, match="number of parameters"):
        room(replace(LLAMA, weights=None), find_hardware("b200"))


def test_unknown_quantization_needs_the_bits() -> None:
    model = replace(LLAMA, weight_bits=None, sources=(*LLAMA.sources, ("weight_bits", "quantization_config")))
    with pytest.raises(ValueError, match="--weight-bits"):
        room(model, find_hardware("t4"))
    assert room(model, find_hardware("t4"), weight_bits=4.5).weight_nbytes == int(8030261248 * 4.5 / 8)


def test_weights_that_do_not_fit_are_said() -> None:
    space = room(load_model("llama-3-70b"), find_hardware("t4"))
    assert space.cache_nbytes < 0
    assert space.notes[-1] == "the weights leave no room for a cache on one t4"
    assert max_batch(LLAMA, Full(), 1, space.cache_nbytes) == 0


@given(
    st.integers(0, 300),
    st.integers(0, 50),
    st.integers(1, 64),
    st.one_of(st.none(), st.integers(1, 400)),
    st.integers(-5, 20_000),
)
def test_the_largest_is_a_scans(fixed: int, slope: int, block: int, end: int | None, available: int) -> None:
    """Blocks, a constant, a window that ends the growth: the answer of trying every number, within few evaluations."""
    calls = []

    def weigh(n: int) -> int:
        calls.append(n)
        held = n if end is None else min(n, end)
        return fixed + slope * -(-held // block) * block

    found = largest_within(weigh, available)
    assert len(calls) <= 130
    if weigh(SEARCH_LIMIT) <= available:
        assert found is None
    else:
        assert found == next(n for n in range(1, 30_000) if weigh(n) > available) - 1


@pytest.mark.parametrize("available", [1, 10**3, 7 * 10**9, 10**12 + 7])
def test_what_grows_in_proportion_takes_three_evaluations(available: int) -> None:
    calls: list[int] = []
    assert largest_within(lambda n: calls.append(n) or 1000 * n, available) == available // 1000
    assert len(calls) <= 3


@pytest.mark.parametrize(
    ("engine", "method"),
    [
        (None, Full()),
        (None, Kivi(nbits=4, sink_length=4)),
        (None, Evict(budget=300)),
        (Vllm(), Fp8()),
        (LlamaCpp(kv_unified=True), Full()),
        (Kvruntime(), Kivi()),
    ],
    ids=lambda one: getattr(one, "name", None),
)
@pytest.mark.parametrize("ranks", [1, 4])
def test_inverses_are_a_scans(engine: Engine | None, method: Method, ranks: int) -> None:
    """Against trying every batch and every context, one after the other, in a small room."""
    few = replace(LLAMA, layers=LLAMA.layers[:2])
    cache = Deployment(few, method, *([engine] if engine else []), sharding=Sharding(tensor_parallel_size=ranks))
    for room_nbytes in (cache.rank_nbytes(1, 1) - 1, cache.rank_nbytes(1, 700), cache.rank_nbytes(2, 400) + 999):
        batches = [batch for batch in range(1, 60) if cache.rank_nbytes(batch, 200) <= room_nbytes]
        assert largest_batch(cache, 200, room_nbytes) == len(batches) < 59
        contexts = [tokens for tokens in range(1, 2000) if cache.rank_nbytes(1, tokens) <= room_nbytes]
        assert largest_context(cache, 1, room_nbytes) == (None if len(contexts) == 1999 else len(contexts))


def test_an_engine_that_allocates_at_once_holds_what_it_allocates() -> None:
    cache = Deployment(LLAMA, Full(), Kvruntime(max_seq_len=4096))
    assert largest_context(cache, 3, cache.rank_nbytes(3, 1)) == 4096
    assert largest_context(cache, 3, cache.rank_nbytes(3, 1) - 1) == 0
    assert largest_batch(cache, 100, 7 * cache.rank_nbytes(1, 4096)) == 7


@pytest.mark.parametrize("name", ["llama-3.1-8b", "openai/gpt-oss-20b", "Qwen/Qwen3-30B-A3B"])
@pytest.mark.parametrize("bits", [4.25, 8.0, 16.0])
def test_weights_are_weighed_one_way_for_memory_and_time(name: str, bits: float) -> None:
    model = load_model(name)
    card = replace(find_hardware("h100"), memory_nbytes=1 << 50)
    assert room(model, card, bits, quantized=True).weight_nbytes == int(weight_nbytes(model, bits))


def test_the_band_of_the_room_is_that_of_every_overhead() -> None:
    """The least room is left where every overhead is at the high end of its band, the most at the low end."""
    model, card = load_model("gpt2"), find_hardware("h100-sxm")
    overhead = {"graphs": 1000, "workspace": 300, "exact": 7}
    space = room(model, card, overhead=overhead, overhead_band={"graphs": (0.5, 1.5), "workspace": (1.0, 3.0)})
    assert space.cache_band == (space.cache_nbytes - 500 - 600, space.cache_nbytes + 500)


def test_a_total_has_state_and_index_keys_in_it() -> None:
    one = estimate(load_model("deepseek-v3.2"), Full(), 1, 4096)
    assert one.index_nbytes > 0
    assert one.total_nbytes == one.nbytes + one.state_nbytes + one.index_nbytes
    mixed = estimate(load_model("qwen3-next-80b-a3b-instruct"), Full(), 1, 4096)
    assert mixed.state_nbytes > 0
    assert mixed.total_nbytes == mixed.nbytes + mixed.state_nbytes


def test_a_layer_is_labelled_with_a_stride_only_where_it_has_one() -> None:
    assert layer_label(LayerShape(8, 128, 128), 2, None) == "2 full layers: 8 kv heads of 128"
    assert layer_label(LayerShape(8, 128, 128, stride=4), 1, None).endswith("of 128, one entry a 4 tokens")
