"""Multi-head latent attention: latents and rotary keys coded a token at a time, attended to without expanding them."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch", reason="the runtime extra (torch) is not installed")
pytest.importorskip("transformers", reason="the runtime extra (transformers) is not installed")
pytest.importorskip("triton", reason="the runtime extra (triton) is not installed")

from hf_latents import LATENTS, latent  # noqa: E402
from hf_models import DEVICE, prompt  # noqa: E402
from transformers import DynamicCache  # noqa: E402

import kvruntime  # noqa: E402
from kvruntime import make_cache, restore  # noqa: E402
from kvruntime.bench.harness.weigh import weigh  # noqa: E402
from kvruntime.hf import empty  # noqa: E402
from kvruntime.hf.cache import argument  # noqa: E402
from kvruntime.hf.models import layer_shapes  # noqa: E402
from kvruntime.hf.stepped import SteppedCache  # noqa: E402
from kvruntime.methods import make_layer  # noqa: E402
from kvruntime.methods.token import latent as kernel  # noqa: E402
from kvruntime.methods.token import latent_reference  # noqa: E402
from kvsim.engines import Kvruntime  # noqa: E402
from kvsim.layout import LayerShape  # noqa: E402
from kvsim.methods import Kivi, LayerMix, PerTokenHead, TurboQuant  # noqa: E402
from kvsim.models.model import Model  # noqa: E402

METHODS = {
    "int8": PerTokenHead("int8"),
    "int4": PerTokenHead("int4"),
    "fp8": PerTokenHead("fp8"),
    "turboquant": TurboQuant(4),
    "turboquant 2": TurboQuant(2),
}
families = pytest.mark.parametrize("family", LATENTS)


@families
@pytest.mark.parametrize("name", ["int8", "turboquant"])
@torch.no_grad()
def test_attention_is_stock_over_what_is_stored(family, name):
    """After a prompt and chunks: the model's own attention over the latents read back, in a stock cache.  A single
    token is stored before it attends, so that it sees itself as coded.  All that is held is what kvsim says."""
    model, method, ids = latent(family), METHODS[name], prompt(2, 300)["input_ids"]
    read = Model.from_config(model.config.to_dict())
    cache, held = make_cache(model, method, compiled=False), 0
    for length in (250, 9, 1, 5):
        part = ids[:, held : held + length]
        past = DynamicCache(config=model.config)
        for index, layer in enumerate(cache.layers if held else ()):
            past.update(*layer.read(), index)
        want, got = (model(part, **argument(one)).logits for one in (past, cache))
        torch.testing.assert_close(got, want, atol=1e-4 if length > 1 else 0.05 * want.std().item(), rtol=1e-4)
        held += length
        predicted = Kvruntime().parts(read, method, 2, held)
        assert weigh(cache) - cache.step_nbytes == cache.nbytes == sum(predicted.values())
    assert {(layer.key_dim, layer.value_dim) for layer in Kvruntime().held(read).cache_layers} == {(64, 16)}  # as read
    assert set(predicted) >= {"key_codes", "key_scale", "value_codes", "value_scale"}


@families
def test_steps_give_the_tokens_of_the_planned_cache(family, monkeypatch):
    """Ragged rows, and a second turn."""
    monkeypatch.setattr(empty, "steps_on", lambda device: True)
    model, inputs, out = latent(family), prompt(2, 30, (0, 7)), []
    for compiled in (None, False):
        cache = make_cache(model, "int8", compiled=compiled)
        assert isinstance(cache, SteppedCache) == (compiled is None)
        options = {"pad_token_id": 0, "do_sample": False, **argument(cache)}
        first = model.generate(**inputs, max_new_tokens=12, **options)
        more = torch.cat([first, inputs["input_ids"][:, :5]], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(more[:, 30:])], 1)
        out.append(model.generate(more, attention_mask=mask, max_new_tokens=5, **options))
    assert torch.equal(*out)


KERNELS = [(name, torch.bfloat16) for name in METHODS] + [("int8", torch.float32), ("turboquant", torch.float32)]


@pytest.mark.parametrize(("name", "dtype"), KERNELS)
def test_the_kernel_is_the_reference(name, dtype):
    """Ragged rows, more heads than a program has, several splits; a rank that is no power of two."""
    torch.manual_seed(0)
    method, shape = METHODS[name], LayerShape(1, 192, 64, kind="mla")
    layer = make_layer(method, shape, 2, None, torch.device("cpu"))
    layer.append(torch.randn(2, 1, 70, 192), 3 * torch.randn(2, 1, 70, 64), [70, 9])
    query = torch.randn(2, 17, 1, 256).to(dtype)
    want = layer.attend(query, 0.1).float()
    moved = [None if x is None else x.to(DEVICE) for x in layer.stored()]
    got = kernel.attend(query.to(DEVICE), type(layer.stored())(*moved), layer.layout, 0.1, num_splits=2)
    assert got.dtype == dtype
    bound = {torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(got.cpu().float(), want, atol=bound, rtol=bound)


@torch.no_grad()
def test_saved_compressed_and_copied(tmp_path):
    model, ids = latent("DeepSeek-V3"), prompt(2, 40)["input_ids"]
    cache, past = make_cache(model, "int8"), DynamicCache(config=model.config)
    for one in (cache, past):
        model(ids[:, :30], **argument(one))
    kvruntime.save_cache(cache, tmp_path / "cache.pt")
    others = (
        kvruntime.load_cache(tmp_path / "cache.pt", model),
        kvruntime.compress(past, "int8", model=model),
        copy.deepcopy(cache),
    )
    want = model(ids[:, 30:], **argument(cache)).logits
    for other in others:
        torch.testing.assert_close(model(ids[:, 30:], **argument(other)).logits, want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_model_is_given_back():
    """After restore() it expands what a cache reads back, as it does a stock cache's."""
    model, ids = copy.deepcopy(latent("DeepSeek-V3")), prompt(1, 40)["input_ids"]
    cache = make_cache(model, "int8")
    model(ids[:, :30], **argument(cache))
    again = copy.deepcopy(cache)
    want = model(ids[:, 30:], **argument(again)).logits
    restore(model)
    assert not any("expand_kv" in module.__dict__ for module in model.modules())
    torch.testing.assert_close(model(ids[:, 30:], **argument(cache)).logits, want, atol=1e-4, rtol=1e-4)


class QuantizedLinear(torch.nn.Linear):
    """As libraries that quantize weights have them."""


@torch.no_grad()
def test_a_mix_holds_latents_as_predicted():
    model, mix = latent("DeepSeek-V2"), LayerMix(first=1, last=0, exact=METHODS["int8"], inner=METHODS["int4"])
    cache = make_cache(model, mix)
    model(prompt(1, 60)["input_ids"], **argument(cache))
    assert [layer.store.method for layer in cache.packed] == [METHODS["int8"], METHODS["int4"]]
    read = Model.from_config(model.config.to_dict())
    assert cache.nbytes == sum(Kvruntime().parts(read, mix, 1, 60).values())
    kivis = LayerMix(first=1, last=0, exact=Kivi(4), inner=Kivi())
    with pytest.raises(ValueError, match="kvruntime does not hold latents under kivi-4bit-"):
        Kvruntime().parts(read, kivis, 1, 60)


def test_what_is_refused():
    model = latent("DeepSeek-V3")
    with pytest.raises(ValueError, match=r"kv_lora_rank = 64\), whose latents kivi-2bit-g32-r128 does not hold on"):
        make_cache(model, "kivi")
    with pytest.raises(ValueError, match="multi-head latent attention, which a compiled cache does not run"):
        make_cache(model, "int8", compiled=True, max_seq_len=64)
    with pytest.raises(ValueError, match="is not supported here: multi-head latent attention"):
        layer_shapes(model)
    with pytest.raises(ValueError, match=r"kvruntime does not hold latents under kivi-.*: allowed are .*int8, int4"):
        Kvruntime().parts(Model.from_config(model.config.to_dict()), Kivi(), 1, 64)
    quantized = copy.deepcopy(model)
    quantized.model.layers[1].self_attn.kv_b_proj.__class__ = QuantizedLinear
    with pytest.raises(ValueError, match=r"with kv_b_proj in QuantizedLinear of torch.float32, allowed are plain ones"):
        make_cache(quantized, "int8")


@torch.no_grad()
def test_a_cache_packed_without_the_model_is_refused():
    """By a model whose attention is given latents; one that was given none reads them back."""
    model, ids = copy.deepcopy(latent("DeepSeek-V3")), prompt(1, 40)["input_ids"]
    restore(model)
    past = DynamicCache(config=model.config)
    model(ids[:, :30], **argument(past))
    cache = kvruntime.compress(past, "int8")
    read = model(ids[:, 30:35], **argument(cache)).logits
    make_cache(model, "int8")
    with pytest.raises(ValueError, match=r"takes its latents for plain keys and values: give compress\(\) model=$"):
        model(ids[:, 35:], **argument(cache))
    given = kvruntime.compress(past, "int8", model=model)
    torch.testing.assert_close(model(ids[:, 30:35], **argument(given)).logits, read, atol=1e-4, rtol=1e-4)


def test_many_queries_hold_few_scores(monkeypatch):
    """Blocks of queries and of tokens, stored and fresh: what one block gives."""
    torch.manual_seed(0)
    layer = make_layer(METHODS["int8"], LayerShape(1, 64, 16, kind="mla"), 2, None, torch.device("cpu"))
    layer.append(torch.randn(2, 1, 50, 64), torch.randn(2, 1, 50, 16), [50, 21])
    query, (key, value) = torch.randn(2, 3, 40, 80), (torch.randn(2, 1, 40, dim) for dim in (64, 16))
    key[1, :, :13] = torch.nan  # padding
    fresh, sizes = (key, value, [40, 27]), []
    want = layer.attend(query, 0.1, fresh)
    assert want.isfinite().all()
    assert not want[1, :, :13].any()

    class Watched(latent_reference.Partial):
        def add(self, key, value, visible):
            sizes.append((self.query.shape[2] * key.shape[2] * len(key), key.shape[2]))
            super().add(key, value, visible)

    monkeypatch.setattr(latent_reference, "Partial", Watched)
    monkeypatch.setattr(latent_reference, "BLOCK_TOKENS", 16)
    monkeypatch.setattr(latent_reference, "BLOCK_SCORES", 700)
    torch.testing.assert_close(layer.attend(query, 0.1, fresh), want, atol=1e-6, rtol=1e-5)
    assert max(scores for scores, _ in sizes) <= 700
    assert max(tokens for _, tokens in sizes) == 16
