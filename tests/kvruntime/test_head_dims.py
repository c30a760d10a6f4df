"""Heads of any dimension: value groups that divide by default, zeros where records want multiples of channels."""

from __future__ import annotations

from functools import cache

import pytest

torch = pytest.importorskip("torch", reason="the runtime extra (torch) is not installed")
pytest.importorskip("transformers", reason="the runtime extra (transformers) is not installed")

import transformers  # noqa: E402
from hf_models import DEVICE, GQA, prompt  # noqa: E402
from transformers import DynamicCache  # noqa: E402

from kvruntime import make_cache  # noqa: E402
from kvruntime.bench.harness.weigh import weigh  # noqa: E402
from kvruntime.engine import Engine  # noqa: E402
from kvruntime.hf import empty  # noqa: E402
from kvruntime.hf.cache import argument  # noqa: E402
from kvruntime.hf.stepped import SteppedCache  # noqa: E402
from kvruntime.methods import LAYERS  # noqa: E402
from kvsim.engines import Kvruntime  # noqa: E402
from kvsim.layout import LayerShape  # noqa: E402
from kvsim.methods import Evict, Full, Kivi, make_method  # noqa: E402
from kvsim.models.model import Model  # noqa: E402

GROUPS = {40: 16, 64: 32, 72: 16, 80: 16, 96: 32, 112: 16, 120: 32, 128: 32, 192: 32, 256: 32, 512: 32}
"""Head dimension -> the default value group, of the dimension that is stored."""
STORED = {40: 48, 72: 80, 120: 128}


@cache
def model(dim: int) -> torch.nn.Module:
    torch.manual_seed(5)
    config = transformers.LlamaConfig(**{**GQA, "num_hidden_layers": 1}, head_dim=dim)
    made = transformers.LlamaForCausalLM(config).eval().to(DEVICE)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "attn" in name:
                weight.mul_(4)
    made.generation_config.eos_token_id = None
    return made


@pytest.mark.parametrize("dim", GROUPS)
def test_default_options_run_every_head(dim):
    """Stock attention over what the cache says that it holds, one token at a time and several; as predicted to the
    byte."""
    cache = make_cache(model(dim), compiled=False)
    ids = prompt(2, 203)["input_ids"]
    with torch.no_grad():
        model(dim)(ids[:, :200], **argument(cache))
        for start, stop in ((200, 202), (202, 203)):
            past = DynamicCache()
            past.update(*cache.layers[0].read(), 0)
            got = model(dim)(ids[:, start:stop], **argument(cache)).logits
            want = model(dim)(ids[:, start:stop], **argument(past)).logits
            torch.testing.assert_close(got, want, atol=5e-5, rtol=1e-4)
    store = cache.stores[0]
    assert store.row_packed == [128, 128]
    assert store.record.value_group == GROUPS[dim] == cache.method.value_group(STORED.get(dim, dim))
    assert store.shape == LayerShape(2, STORED.get(dim, dim), STORED.get(dim, dim))
    predicted = Kvruntime().parts(Model.from_config(model(dim).config.to_dict()), cache.method, 2, cache.num_provided)
    assert weigh(cache) - cache.step_nbytes == cache.nbytes == sum(predicted.values())


@pytest.mark.parametrize("dim", STORED)
def test_filled_heads_step_on_the_device(dim, monkeypatch):
    """As the host plans it, past a record."""
    monkeypatch.setattr(empty, "steps_on", lambda device: True)
    ids = prompt(2, 110)["input_ids"]
    caches = [make_cache(model(dim), nbits=4, residual_length=64, compiled=compiled) for compiled in (None, False)]
    assert [isinstance(cache, SteppedCache) for cache in caches] == [True, False]
    with torch.no_grad():
        for start, stop in ((0, 60), *((at, at + 1) for at in range(60, 108)), (108, 110)):
            got, want = (model(dim)(ids[:, start:stop], **argument(cache)).logits for cache in caches)
            torch.testing.assert_close(got, want, atol=5e-5, rtol=1e-4)
    assert caches[0].counts.started


@pytest.mark.parametrize("dim", STORED)
@pytest.mark.parametrize(
    "method",
    [
        Full("float32"),
        Kivi(residual_length=256, dtype="float32"),
        Evict(budget=512, inner=Kivi(residual_length=128, sink_length=4, dtype="float32")),
        Evict(budget=256, policy="snapkv", inner=Full("float32")),
    ],
    ids=lambda method: method.name,
)
def test_heads_filled_up_with_zeros_attend_as_they_are(dim, method):
    """Generation of what is not packed yet equals stock's; the uncompressed cache is not filled up."""
    stock = model(dim).generate(**prompt(3, 24, (0, 5, 13)), max_new_tokens=12, do_sample=False)
    cache = make_cache(model(dim), method)
    ours = model(dim).generate(**prompt(3, 24, (0, 5, 13)), max_new_tokens=12, do_sample=False, **argument(cache))
    assert torch.equal(ours, stock)
    packs = isinstance(getattr(method, "inner", method), Kivi)
    assert cache.stores[0].shape.key_dim == (STORED[dim] if packs else dim)
    assert cache.layers[0].keys.shape == (3, 2, 35, dim)


def test_what_takes_heads_as_they_are_refuses_others_by_name():
    with pytest.raises(ValueError, match="has heads of 40, which a compiled cache does not run"):
        make_cache(model(40), compiled=True, max_seq_len=64)
    with pytest.raises(ValueError, match=r"^heads of 40: the engine takes those that kivi-2bit-g32-r128 packs as they"):
        Engine(model(40), batch_size=1, max_seq_len=64)


@pytest.mark.parametrize(("name", "dim"), [("kivi", 80), ("kivi", 112)])
def test_the_oracle_of_what_is_stored_takes_the_default_group(name, dim):
    """``read_back`` of the method's room, which is other code."""
    method = make_method(name, dtype="float32")
    torch.manual_seed(0)
    key, value = torch.randn(2, 2, 300, dim), torch.randn(2, 2, 300, dim)
    room = LAYERS[type(method)]
    layer = room.layer(method, LayerShape(2, dim, dim), 2)
    layer.append(key, value)
    want = room.read_back(method, key, value)
    for row in range(2):
        for got, right in zip(layer.tokens(row), want, strict=True):
            torch.testing.assert_close(got, right[row], atol=2e-3, rtol=1e-3)


def test_a_group_that_was_asked_for_is_not_changed():
    assert Kivi(group_size=64).value_group(96) == 32
    assert Kivi(group_size=128, residual_length=128).value_group(64) == 64
    for method in (Kivi(value_group_size=32), Kivi(value_group_size=64)):
        with pytest.raises(ValueError, match=r"value group size .* does not divide head dimension 80"):
            method.value_group(80)
