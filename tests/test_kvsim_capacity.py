"""What fits: the inverses are exact, the memory is divided as stated."""

from dataclasses import replace

import pytest

from kvsim.capacity import max_batch, max_context, room
from kvsim.estimate import cache_nbytes
from kvsim.hardware import find_hardware
from kvsim.load import load_model
from kvsim.methods import Full, Kivi, kivi_seed

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
