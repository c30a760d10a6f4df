"""What a layer of any method is given that it cannot have: one line, and what it holds is as it was."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the runtime extra (torch) is not installed")
pytest.importorskip("transformers", reason="the runtime extra (transformers) is not installed")

from kvruntime.hf.cache import Cache  # noqa: E402
from kvruntime.methods import make_layer  # noqa: E402
from kvsim.layout import LayerShape  # noqa: E402
from kvsim.specs import parse_method  # noqa: E402

SHAPE = LayerShape(2, 64, 64)
METHODS = (
    *("fp16", "kivi", "kivi-boost", "int8", "int4", "fp8-token-head", "turboquant"),
    *("evict:policy=recent,budget=40,inner=fp16", "evict:policy=h2o,budget=40,inner=fp16"),
)
every_method = pytest.mark.parametrize("spec", METHODS)
KEY, VALUE, QUERY = torch.randn(3, 2, 4, 5, 64, generator=torch.Generator().manual_seed(0))
KEY, VALUE = KEY[:, :2], VALUE[:, :2]


def filled(spec: str) -> Any:
    layer = make_layer(parse_method(spec, {}), SHAPE, 2, None, torch.device("cpu"))
    layer.append(KEY, VALUE, [5, 3], QUERY)
    return layer


@every_method
def test_tokens_that_a_layer_cannot_have(spec: str) -> None:
    layer = filled(spec)
    held = [tensor.clone() for tensor in layer.tensors.values()]
    bad: list[tuple[Any, Any, Any, str]] = [
        (KEY[:, :1], VALUE, None, r"keys \[2, 1, 5, 64\]: allowed are \[2, 2, 5, 64\]"),
        (KEY[..., :32], VALUE, None, r"keys \[2, 2, 5, 32\]"),
        (KEY[0], VALUE, None, r"keys \[2, 5, 64\]"),
        (KEY[:1], VALUE[:1], None, r"keys \[1, 2, 5, 64\]"),
        (KEY, VALUE[:, :, 1:], None, r"values \[2, 2, 4, 64\]: allowed are \[2, 2, 5, 64\]"),
        *((KEY, VALUE, lengths, "lengths .* allowed are 2, each from 0 to 5")
          for lengths in ([6, 5], [-1, 5], [5], [5, 5, 5], [2.5, 5])),
    ]  # fmt: skip
    for key, value, lengths, why in bad:
        with pytest.raises(ValueError, match=why):
            layer.append(key, value, lengths, QUERY)
    assert layer.row_lengths == [5, 3]
    assert all(torch.equal(before, now) for before, now in zip(held, layer.tensors.values(), strict=True))


@every_method
def test_no_tokens_and_no_rows(spec: str) -> None:
    layer = filled(spec)
    layer.append(KEY[:, :, :0], VALUE[:, :, :0], None, QUERY[:, :, :0])
    layer.append(KEY, VALUE, [0, 0], QUERY)
    assert layer.row_lengths == [5, 3]
    for index in ([], [2], [-1], [[0, 1]]):
        with pytest.raises(ValueError, match="allowed are whole numbers from 0 to 1, at least one"):
            layer.reorder(torch.tensor(index, dtype=torch.int64))
    assert (layer.batch_size, layer.row_lengths) == (2, [5, 3])
    with pytest.raises(ValueError, match="a batch of 0 rows: allowed are 1 and above"):
        make_layer(parse_method(spec, {}), SHAPE, 0, None, torch.device("cpu"))


@every_method
def test_fresh_tokens_without_lengths_are_all_of_them(spec: str) -> None:
    layer = filled(spec)
    some, every = (layer.attend(QUERY, 0.125, (KEY, VALUE, lengths)) for lengths in ([5, 5], None))
    assert torch.equal(some, every)


def test_the_least_length_of_a_crop_is_said_and_allowed() -> None:
    """Of the longest row, where another has fewer exact tokens after what is packed: 34 of 290, 44 of 300."""
    layer = make_layer(parse_method("kivi:residual_length=64", {}), SHAPE, 2, None, torch.device("cpu"))
    key = torch.randn(2, 2, 300, 64, generator=torch.Generator().manual_seed(1))
    layer.append(key, key, [300, 290])
    with pytest.raises(ValueError, match="cannot crop to 0 tokens: allowed are 266 and above") as refused:
        layer.crop(0)
    least = int(str(refused.value).split("allowed are ")[1].split()[0])
    with pytest.raises(ValueError, match="the rest is packed"):
        layer.crop(least - 1)
    layer.crop(least)
    assert max(layer.row_lengths) == least


def test_rows_that_a_cache_does_not_have_change_nothing() -> None:
    cache = Cache(parse_method("int8", {}), 2)
    for index in range(2):
        cache.update(KEY, VALUE, index)
    before = cache.layers[0].keys
    with pytest.raises(ValueError, match=r"rows \[0, 2\]: allowed are whole numbers from 0 to 1"):
        cache.reorder_cache(torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="at least one"):
        cache.batch_select_indices(torch.zeros(2, dtype=torch.bool))
    assert torch.equal(before, cache.layers[0].keys)
    cache.update(KEY[:, :, :1], VALUE[:, :, :1], 0)
    assert cache.get_seq_length() == 6


@pytest.mark.parametrize("spec", METHODS[:-2])
def test_memory_that_ends_on_a_cpu_says_so(spec: str) -> None:
    layer = filled(spec)
    with pytest.raises(torch.OutOfMemoryError, match=r"10,000,000,000,000,000 tokens a row.* would have fitted"):
        layer.provide(10**16)
    layer.append(KEY, VALUE, None, QUERY)
    assert layer.row_lengths == [10, 8]
