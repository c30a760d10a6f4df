"""Layers stored in unlike ways, by their place in the model: under ``generate()``, in files, and what is refused."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch", reason="the runtime extra (torch) is not installed")
pytest.importorskip("transformers", reason="the runtime extra (transformers) is not installed")

from hf_mixed import GEMMA  # noqa: E402
from hf_models import DEVICE, prompt, tiny  # noqa: E402
from transformers import AutoModelForCausalLM, DynamicCache, Gemma3TextConfig  # noqa: E402

from kvruntime import Engine, compress, load_cache, make_cache, paged, save_cache  # noqa: E402
from kvruntime.bench.harness.weigh import weigh  # noqa: E402
from kvruntime.eval.bits import held_nbytes, packed_bits  # noqa: E402
from kvruntime.hf import empty  # noqa: E402
from kvruntime.hf.cache import argument  # noqa: E402
from kvruntime.hf.models import layer_shapes  # noqa: E402
from kvruntime.methods import spelled  # noqa: E402
from kvsim.engines import Kvruntime  # noqa: E402
from kvsim.methods import Evict, Full, Kivi, LayerMix, PerTokenHead, make_method  # noqa: E402
from kvsim.models.model import Model  # noqa: E402

FEW, MORE = (Kivi(2, sink_length=4, residual_length=64, dtype="float32", rotate_values=True, **bits)
             for bits in ({"boost_nbits": 2}, {"key_nbits": 3, "value_nbits": 3, "boost_nbits": 1}))  # fmt: skip
MIX = LayerMix(first=0, last=0, layers=1, exact=MORE, inner=FEW)
CLOSE = {"atol": 1e-4, "rtol": 1e-3} if DEVICE.type == "cuda" else {"atol": 0, "rtol": 0}
"""On a GPU the first step after a file is the host's, whose kernels add in another order."""
GREEDY = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 40}


def own(family="Llama"):
    return copy.deepcopy(tiny(family))


@torch.no_grad()
def filled(model, method, length=150):
    cache = make_cache(model, method)
    model(prompt(2, length)["input_ids"], **argument(cache))
    return cache


def test_each_layer_holds_what_its_own_method_stores():
    """Without attention's output no layer sees what another stored: each must hold a uniform cache's tensors."""
    model = own()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    mixed, few, more = (filled(model, method) for method in (MIX, FEW, MORE))
    for ours, theirs in zip(mixed.packed, (few.packed[0], more.packed[1]), strict=True):
        assert ours.store.tensors.keys() == theirs.store.tensors.keys()
        assert all(torch.equal(x, theirs.store.tensors[name]) for name, x in ours.store.tensors.items())
    assert few.packed[1].store.tensors["records"].shape != more.packed[1].store.tensors["records"].shape


def test_generate_steps_and_weighs_as_planned(monkeypatch):
    """Ragged rows: the tokens of the cache that the host plans, and the bytes of each layer's own method."""
    model, inputs, out = own(), prompt(2, 90, (0, 11)), []
    for steps in (True, False):
        monkeypatch.setattr(empty, "steps_on", lambda device, steps=steps: steps)
        cache = make_cache(model, MIX)
        out.append(model.generate(**inputs, **argument(cache), **GREEDY))
        assert [layer.store.method for layer in cache.packed] == [FEW, MORE]
    assert torch.equal(*out)
    weighed = make_cache(model, MIX, max_seq_len=256, compiled=False)
    with torch.no_grad():
        model(inputs["input_ids"][:1], **argument(weighed))
    assert weigh(weighed) == held_nbytes(MIX, layer_shapes(model), 256)


def test_bits_are_the_mean_of_the_layers():
    shapes = layer_shapes(tiny("Llama"))
    both = [packed_bits(method, shapes) for method in (FEW, MORE)]
    assert packed_bits(MIX, shapes) == sum(both) / 2
    assert packed_bits(LayerMix(first=0, last=0, exact=MORE, inner=FEW), shapes) == both[0]


def test_a_saved_mix_goes_on(tmp_path):
    model = own()
    nested = LayerMix(first=0, last=0, layers="0", exact=FEW, inner=LayerMix(first=0, last=1, exact=MORE, inner=FEW))
    cache = filled(model, nested)
    save_cache(cache, tmp_path / "mix")
    loaded = load_cache(tmp_path / "mix", model)
    assert loaded.method == nested
    assert [layer.method for layer in loaded.packed] == [FEW, MORE]
    token = prompt(2, 1)["input_ids"]
    with torch.no_grad():
        logits = [model(token, **argument(held)).logits for held in (cache, loaded)]
    torch.testing.assert_close(*logits, **CLOSE)


@pytest.mark.parametrize("residuals", [(128, 32), (32, 128)])
def test_a_crop_that_one_layer_refuses_changes_none(residuals):
    """Of 200 tokens one layer has 128 packed, the other 192: that one refuses, first or last, and the cache goes on."""
    first, second = (Kivi(bits, residual_length=n, dtype="float32") for bits, n in zip((4, 2), residuals, strict=True))
    model, mix = own(), LayerMix(first=1, last=0, exact=first, inner=second)
    cache, untouched = (filled(model, mix, 200) for _ in range(2))
    with pytest.raises(ValueError, match="cannot crop to 180 tokens: allowed are 192 and above"):
        cache.crop(-20)
    assert [layer.store.row_lengths for layer in cache.packed] == [[200, 200]] * 2
    token = prompt(2, 1)["input_ids"]
    with torch.no_grad():
        assert torch.equal(*(model(token, **argument(held)).logits for held in (cache, untouched)))
    cache.crop(-9)
    assert [layer.store.row_lengths for layer in cache.packed] == [[192, 192]] * 2
    assert cache.get_seq_length() == 192


def refusal(call, *arguments):
    try:
        return call(*arguments)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("method", [Full("float32"), PerTokenHead("int8"), FEW, Evict(budget=256, inner=FEW)])
def test_a_check_refuses_what_crop_refuses_and_changes_nothing(method):
    """Rows of 150 and 110 tokens."""
    model = own()
    cache = make_cache(model, method)
    with torch.no_grad():
        model(**prompt(2, 150, (0, 40)), **argument(cache))
    store, refused = cache.packed[0].store, []
    for keep in (20, 39, 40, 131, 132, 149, 150):
        said = refusal(store.check_crop, keep)
        assert store.row_lengths == [150, 110]
        assert said == refusal(copy.deepcopy(store).crop, keep)
        refused.append(said is not None)
    assert refused[0]
    assert not refused[-1]


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the engine's graphs: tests/kvruntime/test_engine.py")
def test_the_engine_runs_a_mix():
    model, inputs = own(), prompt(1, 80)
    cache = make_cache(model, MIX)
    want = model.generate(**inputs, **argument(cache), **GREEDY)[0, 80:].tolist()
    engine = Engine(model, MIX, batch_size=1, max_seq_len=256, lean=False)
    assert engine.generate(inputs["input_ids"].tolist(), max_new_tokens=40)[0] == want


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        (LayerMix(first=1, last=0, exact=Full(), inner=Kivi()), "mixes one kind of method"),
        (LayerMix(exact=Evict(budget=256), inner=Evict(budget=512)), "methods that hold no other"),
        (LayerMix(exact=make_method("turboquant"), inner=make_method("turboquant")), "share nothing"),
        (LayerMix(first=0, last=0, layers="1+2", exact=MORE, inner=FEW), r"layers 1\+2: allowed are 0 to 1 of 2"),
        (LayerMix(exact=make_method("q8_0"), inner=FEW), "does not run the method q8_0"),
    ],
)
def test_what_is_no_mix_is_refused_in_one_line(mix, message):
    with pytest.raises(ValueError, match=message):
        make_cache(tiny("Llama"), mix)


@torch.no_grad()
def test_beside_windows_a_mix_is_refused_wherever_a_cache_comes_from(tmp_path):
    """Made, packed with a model or without, read from a file, predicted: in the same words."""
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    config = Gemma3TextConfig(**{**GEMMA, "num_hidden_layers": 3, "layer_types": kinds})
    model, stock, path = (
        AutoModelForCausalLM.from_config(config).to(DEVICE),
        DynamicCache(config=config),
        tmp_path / "c",
    )
    model(prompt(1, 20)["input_ids"], **argument(stock))
    save_cache(compress(stock, FEW, model=model), path)
    saved = torch.load(path, weights_only=True)
    torch.save({**saved, "method": spelled(MIX)}, path)
    for refused in (
        lambda: make_cache(model, MIX),
        lambda: compress(stock, MIX, model=model),
        lambda: compress(stock, MIX),
        lambda: load_cache(path, model),
        lambda: Kvruntime().parts(Model.from_config(config.to_dict()), MIX, 1, 20),
    ):
        with pytest.raises(ValueError, match=r"^mix-l1\(.*: allowed is a choice by layer where all layers are full"):
            refused()
    torch.save({**saved, "method": spelled(LayerMix(first=0, last=0, exact=Full(), inner=FEW))}, path)
    with pytest.raises(ValueError, match="mixes one kind of method"):
        load_cache(path, model)


def test_a_mix_may_be_a_spec():
    spec = "mix:first=0,last=0,layers=1,exact=(kivi:nbits=4),inner=kivi"
    cache = make_cache(tiny("Llama"), spec)
    assert [layer.method for layer in cache.packed] == [Kivi(dtype="float32"), Kivi(nbits=4, dtype="float32")]
    with pytest.raises(ValueError, match="options nbits: allowed with a method's name only, not with a spec"):
        make_cache(tiny("Llama"), spec, nbits=2)
    with pytest.raises(ValueError, match="option 'layer=1' is not one of"):
        make_cache(tiny("Llama"), "mix:layer=1")


def test_what_takes_no_mix_says_so():
    for refused in (lambda: paged.check(MIX), lambda: make_cache(tiny("Llama"), Evict(budget=256, inner=MIX))):
        with pytest.raises(ValueError, match=r"the method .*mix-l1"):
            refused()


def test_no_compiled_step_holds_a_mix():
    with pytest.raises(ValueError, match="stores layers in unlike ways"):
        make_cache(tiny("Llama"), MIX, max_seq_len=256, compiled=True)
