"""Formulas over arrays equal the function point by point: methods, arbitrary arithmetic, and what cannot be traced."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

np = pytest.importorskip("numpy", reason="numpy is not installed")

from kvsim.memory.estimate import estimate  # noqa: E402
from kvsim.methods import METHODS, make_method  # noqa: E402
from kvsim.models.load import load_model  # noqa: E402
from kvsim.vectorize import VectorFormula  # noqa: E402


def grid(batches: list[int], tokens: list[int]) -> tuple:
    return np.array(batches, np.int64)[None, :], np.array(tokens, np.int64)[:, None]


def check(function, batches: list[int], tokens: list[int]) -> VectorFormula:
    vectorized = VectorFormula(function)
    for _ in range(2):  # pieces found are kept
        found = vectorized(*grid(batches, tokens))
        assert found.tolist() == [[function(b, n) for b in batches] for n in tokens]
    return vectorized


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_traced_and_exact(name: str) -> None:
    model, method = load_model("llama-3-8b"), make_method(name)
    tokens = [1, 2, 31, 32, 33, 63, 64, 127, 128, 129, 160, 161, 255, 256, 257, 4096, 4097, 99999, 131072]
    for quantity in ("nbytes", "read_nbytes"):
        found = check(
            lambda b, n, quantity=quantity: getattr(estimate(model, method, b, n), quantity), [1, 3, 64], tokens
        )
        assert found.traceable
        assert 1 <= len(found.pieces) <= 16


def test_points_on_both_sides_of_a_condition_on_the_batch() -> None:
    check(lambda b, n: n if b < 3 else b * n // 2, [1, 2, 3, 4], [1, 5, 9])


def test_a_constant_and_a_plain_input() -> None:
    check(lambda b, n: 7, [1, 2], [1, 2])
    check(lambda b, n: n, [1, 2], [1, 2])


@pytest.mark.parametrize(
    "function",
    [
        lambda b, n: math.ceil(n / 3),
        lambda b, n: len(range(n)),
        lambda b, n: {1: 2}.get(n, 3),
        lambda b, n: n.bit_length(),
    ],
)
def test_what_cannot_be_traced_is_called_point_by_point(function) -> None:
    assert not check(function, [1, 2], [1, 2, 3, 4, 7]).traceable


def test_many_pieces_end_in_calls() -> None:
    def stairs(batch: int, tokens: int) -> int:
        steps = 0
        while steps < tokens:
            steps += 1
        return steps * batch

    check(stairs, [1, 2], list(range(1, 150)))


def test_errors_pass_through() -> None:
    def refuse(batch: int, tokens: int) -> int:
        if tokens > 4:
            raise ValueError("too long")
        return tokens

    with pytest.raises(ValueError, match="too long"):
        VectorFormula(refuse)(*grid([1], [1, 5]))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 500), min_size=1, max_size=6),
    st.lists(st.integers(1, 10**6), min_size=1, max_size=12),
    st.integers(1, 300),
    st.integers(1, 64),
)
def test_arbitrary_arithmetic(batches: list[int], tokens: list[int], window: int, block: int) -> None:
    def weigh(batch: int, n: int) -> int:
        held = min(n, window)
        packed = -(-max(0, n - window) // block) * block
        whole, rest = divmod(packed, 7)
        return batch * (held * 16 + whole * 3 - rest % 5 + (11 if rest else 0)) + (-n + 2 * n)

    assert check(weigh, batches, tokens).traceable
