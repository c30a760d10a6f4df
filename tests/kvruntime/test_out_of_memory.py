"""Memory that ends while a cache grows: one line that says what would have fitted, and a cache that goes on."""

from __future__ import annotations

import re

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from runtime_tiny import tiny_model  # noqa: E402

from kvruntime import make_cache  # noqa: E402
from kvruntime.hf.cache import argument  # noqa: E402
from kvruntime.methods import LAYERS, make_layer, rows  # noqa: E402
from kvsim.layout import LayerShape, nbytes  # noqa: E402
from kvsim.methods import Full  # noqa: E402

SHAPE = LayerShape(2, 32, 32)


def tokens(count: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(1, 2, count, 32, generator=generator) for _ in range(2))


class Ends:
    """``rows.grown``, of which the calls from ``first`` on find no memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, first: int, free: int = 0) -> None:
        self.calls, self.first, self.real = 0, first, rows.grown
        monkeypatch.setattr(rows, "grown", self)
        monkeypatch.setattr(rows, "free_nbytes", lambda device: free)

    def __call__(self, *given):
        self.calls += 1
        if self.calls >= self.first:
            raise torch.OutOfMemoryError("no memory")
        return self.real(*given)


def growing(method) -> int:
    """Tensors that take more room for 512 tokens than for 256."""
    few, many = (method.buffers(SHAPE, 1, count) for count in (256, 512))
    return sum(one.shape != other.shape for one, other in zip(few, many, strict=True))


CASES = [
    (example, first)
    for room in LAYERS.values()
    for example in room.examples[:1]
    for first in range(1, growing(example) + 1)
]


@pytest.mark.parametrize(("method", "first"), CASES, ids=lambda value: getattr(value, "name", value))
def test_a_layer_is_as_it_was(method, first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer(method, SHAPE, 1, None, torch.device("cpu"))
    layer.append(*tokens(200))
    held = {name: tensor.clone() for name, tensor in layer.tensors.items()}
    before, provided = layer.tokens(0), layer.num_provided
    with monkeypatch.context() as patch:
        Ends(patch, first)
        with pytest.raises(torch.OutOfMemoryError, match=r"out of memory: 512 tokens a row, batch 1, take .* of "):
            layer.append(*tokens(100, 1))
    assert layer.num_provided == provided
    assert {name: tensor.shape for name, tensor in layer.tensors.items()} == {n: t.shape for n, t in held.items()}
    for one, other in zip(layer.tokens(0), before, strict=True):
        assert torch.equal(one[:, :200], other)
    layer.append(*tokens(100, 1))
    assert layer.num_provided == 512


@pytest.mark.parametrize(
    ("num_layers", "held", "free"),
    [(1, 0, 10**6), (4, 0, 10**6), (4, 8192, 3 * 10**5), (2, 10**5, 4 * 10**5), (2, 0, 9)],
)
def test_what_would_have_fitted_fits_and_a_block_more_does_not(
    num_layers: int, held: int, free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = Full("float32")
    monkeypatch.setattr(rows, "free_nbytes", lambda device: free)
    said = rows.too_many(method, SHAPE, 1, 65536, torch.device("cpu"), num_layers, held)
    found = re.search(r"held: ([\d,]+) tokens a row would have fitted", said)
    assert found
    fits = int(found[1].replace(",", ""))

    def needed(count: int) -> int:
        return num_layers * nbytes(method.buffers(SHAPE, 1, count)) + held

    there = free + num_layers * held
    assert fits == 0 or needed(fits) <= there
    assert needed(fits + 256) > there
    assert f"in {num_layers} layer" in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(("method", "first"), [("fp32", 1), ("fp32", 4), ("kivi", 1), ("kivi", 2)])
def test_a_cache_goes_on_after_reset(method: str, first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In growth and in a prompt, in the first layer and in a later one."""
    model = tiny_model()
    options = {"dtype": "float32", "group_size": 32} if method == "kivi" else {}
    long, short = (torch.randint(1, 128, (1, count), generator=torch.Generator().manual_seed(1)) for count in (240, 24))

    def answer(cache):
        return model.generate(
            short, attention_mask=torch.ones_like(short), max_new_tokens=8, do_sample=False, **argument(cache)
        )

    want = answer(make_cache(model, method, **options))
    cache = make_cache(model, method, **options)
    with monkeypatch.context() as patch, torch.inference_mode():
        model(long[:, :200], **argument(cache))
        Ends(patch, first, free=10**6)
        with pytest.raises(torch.OutOfMemoryError, match="tokens a row would have fitted"):
            model(torch.cat([long, long], 1), position_ids=torch.arange(480)[None] % 256, **argument(cache))
    cache.reset()
    assert torch.equal(answer(cache), want)


def test_a_card_has_some_bytes_that_no_tensor_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last MiB that a driver calls free are in pieces, and what the allocator keeps lies between tensors: promised
    to a tensor, they were refused on an H200."""
    reserved, given = [340 << 20], 0

    def empty_cache() -> None:
        nonlocal given
        given += 1
        reserved[0] = 300 << 20

    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved[0])
    card = torch.device("cuda")
    for free, share, wanted in ((100 << 20, 1.0, 68 << 20), (0, 1.0, 0), (1 << 30, 0.5, 180 << 20)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 1 << 30))
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device, share=share: share)
        assert rows.free_nbytes(card) == wanted
    assert given == 3


def test_what_is_promised_on_a_card_is_counted_in_whole_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four tensors in 39 MiB: of 8 MiB each they would fit, but only two such are cut from a block of 20."""
    monkeypatch.setattr(rows, "free_nbytes", lambda device: 39 << 20)
    said = rows.too_many(Full("float16"), LayerShape(1, 4096, 4096), 1, 1 << 20, torch.device("cuda"), 2)
    found = re.search(r"held: ([\d,]+) tokens a row would have fitted", said)
    assert found
    assert int(found[1].replace(",", "")) == 768
