"""The cache as code outside a model uses it, and the model as it is with other caches, after ``make_cache``."""

from __future__ import annotations

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from hf_models import DEVICE, prompt, tiny
from transformers import DynamicCache

import kvruntime
from kvruntime import make_cache
from kvruntime.hf import empty
from kvruntime.hf.attention import NAME, Switch
from kvruntime.hf.cache import STATE_VERSION, Cache, argument
from kvruntime.hf.compiled import NAMED_METHODS
from kvruntime.hf.stepped import SteppedCache

CACHES = {
    "fp32": ("fp32", {}),
    "kivi": ("kivi", {"nbits": 8, "residual_length": 32}),
    "seed": ("kivi", {"nbits": 8, "key_group_size": "sequence", "value_group_size": "head", "residual_length": 64}),
    "sink": ("kivi", {"nbits": 8, "residual_length": 64, "sink_length": 5}),
    "compiled": ("kivi", {"nbits": 8, "residual_length": 32, "compiled": True, "max_seq_len": 220}),
    "compiled fp32": ("fp32", {"compiled": True, "max_seq_len": 220}),
}
caches = pytest.mark.parametrize("name", CACHES)


OF_TRANSFORMERS = {"_compiled_call", "_last_compile_config"}
"""What its generate() leaves in a model where it compiles, which cannot be pickled."""


@pytest.fixture
def model():
    """A model that no test before has given a cache, and of which transformers' generate() has compiled nothing."""
    model = copy.deepcopy(tiny("Llama"))
    for name in OF_TRANSFORMERS:
        vars(model).pop(name, None)
    return model


def new_cache(model, name):
    method, options = CACHES[name]
    return make_cache(model, method, **options)


@torch.no_grad()
def stock(model, ids, **more):
    past = DynamicCache()
    model(ids, **argument(past), **more)
    return past


def assert_near(name, got, want):
    """Within what 8 bits round; keys beyond scales that were frozen over the first tokens are clamped."""
    allowed = 1e-5 if "fp32" in name else 0.15 if name == "seed" else 0.02
    assert got.shape == want.shape
    assert (got - want).norm() <= allowed * want.norm()


@caches
def test_update_from_outside_a_model_stores(model, name):
    """A prompt computed elsewhere, in two parts and one token more; what comes back is what a stock cache's gives."""
    ids, cache = prompt(2, 202)["input_ids"], new_cache(model, name)
    past, want = stock(model, ids[:, :201]), DynamicCache()
    for part in (slice(150), slice(150, 200), slice(200, 201)):
        for index, layer in enumerate(past.layers):
            new = layer.keys[:, :, part], layer.values[:, :, part]
            for got, right in zip(cache.update(*new, index), want.update(*new, index), strict=True):
                assert_near(name, got, right)
                assert torch.equal(got[:, :, part.start or 0 :], right[:, :, part.start or 0 :])
    assert cache.get_seq_length() == len(cache.layers[1].keys[0, 0]) == 201
    with torch.no_grad():
        got, right = (model(ids[:, 201:], **argument(held)).logits for held in (cache, want))
    assert_near(name, got, right)
    assert cache.get_seq_length() == 202
    with pytest.raises(ValueError, match="layer 2 of a model for a cache of 2"):
        cache.update(*new, 2)
    alone = new_cache(model, name)
    for index in range(2):
        alone.update(*new, index)
    alone.crop(-1)
    assert alone.get_seq_length() == 0


@caches
def test_what_is_held_can_be_read(model, name):
    """``layers[i].keys`` and iteration, with padding; copies that nobody can write through."""
    inputs, cache = prompt(2, 90, (0, 7)), new_cache(model, name)
    assert all(keys is None and values is None for keys, values, _ in cache)
    assert cache.layers[0].keys is None
    assert len(cache) == 2
    position = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    past = stock(model, ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], position_ids=position)
    with torch.no_grad():
        model(**inputs, position_ids=position, **argument(cache))
    real = inputs["attention_mask"].bool()
    for (keys, values, _), layer in zip(cache, past.layers, strict=True):
        for got, want in ((keys, layer.keys), (values, layer.values)):
            assert_near(name, got.transpose(1, 2)[real], want.transpose(1, 2)[real])
            assert not got.transpose(1, 2)[~real].any()
    with pytest.raises(ValueError, match="copies, read back, and zero_ would change nothing"):
        cache.layers[0].keys.zero_()
    with pytest.raises(ValueError, match="are read only: update"):
        cache.layers[0].values = values
    for call in ("reorder_cache", "crop", "batch_repeat_interleave", "batch_select_indices"):
        with pytest.raises(ValueError, match="call this on the cache, not on its layer"):
            getattr(cache.layers[0], call)(torch.tensor([0]))
    assert cache.get_mask_sizes(5, 0) == (95, 0)
    assert cache.is_compileable == ("compiled" in name)
    assert cache.get_max_length() == (220 if "compiled" in name else -1)
    assert (cache.is_initialized, cache.batch_size, cache.is_sliding) == (True, 2, [False, False])
    if name == "fp32":  # data of a stock cache's own kind
        again = DynamicCache(cache)
        assert torch.equal(again.layers[1].values, cache.layers[1].values)


@pytest.mark.parametrize("name", ["fp32", "kivi", "compiled"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "restored", "another"])
def test_a_model_that_was_not_given_it_attends_to_it_too(model, name, implementation):
    """Another implementation set afterwards, none of ours any more, or a model that ``make_cache`` never saw."""
    inputs, more = prompt(2, 60, (0, 9)), prompt(2, 3, seed=2)["input_ids"]
    cache, past = new_cache(model, name), DynamicCache()
    if implementation == "restored":
        kvruntime.restore(model)
    elif implementation == "another":
        model = copy.deepcopy(tiny("Llama"))
        kvruntime.restore(model)
    else:
        model.set_attn_implementation(implementation)
    with torch.no_grad():
        for held in (cache, past):
            model(**inputs, **argument(held))
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1)
        for stop in (61, 63):
            now = more[:, : stop - 60] if stop == 61 else more[:, 1:]
            got, want = (model(now, attention_mask=mask[:, :stop], **argument(held)).logits for held in (cache, past))
            assert_near(name, got, want)


def states(model):
    return [
        getattr(module, "config", SimpleNamespace(_attn_implementation=""))._attn_implementation
        for module in model.modules()
    ]


def switches(model):
    """The hooks that ``make_cache`` put in (transformers has its own, where attention weights were asked for)."""
    hooks = [
        hook for m in model.modules() for kind in (m._forward_hooks, m._forward_pre_hooks) for hook in kind.values()
    ]
    return [hook for hook in hooks if isinstance(getattr(hook, "__self__", None), Switch)]


@pytest.mark.filterwarnings("ignore:TensorFloat32", "ignore:The CUDA Graph is empty")  # generate() compiles on CUDA
@pytest.mark.parametrize("before", ["sdpa", "eager"])
def test_with_other_caches_the_model_is_as_it_was(model, before):
    """Attention weights, ``generate_batch``'s check and its tokens, forwards in between that fail, and the way back."""
    kvruntime.restore(model)
    model.set_attn_implementation(before)
    fresh, inputs = copy.deepcopy(model), prompt(2, 20, (0, 5))
    assert not switches(model)
    was, names = states(model), set(vars(model))
    for compiled in (False, True):
        cache = make_cache(model, "kivi", max_seq_len=64, compiled=compiled)
        with torch.no_grad():
            ours = model.generate(**inputs, max_new_tokens=4, do_sample=False, **argument(cache))
            with pytest.raises(ValueError, match="a batch of 1 rows"):
                model(inputs["input_ids"][:1], **argument(cache))
        assert states(model) == was
        assert torch.equal(ours, fresh.generate(**inputs, max_new_tokens=4, do_sample=False))
    with torch.no_grad():
        seen = [
            one(**inputs, output_attentions=before == "eager", **argument(DynamicCache())) for one in (model, fresh)
        ]
        assert torch.equal(seen[0].logits, seen[1].logits)
        if before == "eager":
            assert all(torch.equal(*pair) for pair in zip(seen[0].attentions, seen[1].attentions, strict=True))
            model.config.output_attentions = True
            model.config.output_attentions = False
    other = copy.deepcopy(model)  # its hooks are its own
    kvruntime.restore(model)
    kvruntime.restore(model)
    assert not switches(model)
    assert (states(model), set(vars(model)) - OF_TRANSFORMERS) == (was, names - OF_TRANSFORMERS)
    assert torch.equal(
        ours, other.generate(**inputs, max_new_tokens=4, do_sample=False, **argument(make_cache(other, "kivi")))
    )
    assert states(other) == was
    if before == "sdpa":  # with attention weights asked for, transformers' own hooks are in the way
        new = type(model)(copy.deepcopy(model.config))  # none that was compiled: that holds PyTorch's own functions
        make_cache(new, "kivi")
        torch.save(new, io.BytesIO())


def test_attention_weights_are_not_to_be_had_from_this_cache(model):
    model.set_attn_implementation("eager")
    cache = make_cache(model)
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="output_attentions, which a kvruntime cache does not support"),
    ):
        model(prompt(1, 8)["input_ids"], output_attentions=True, **argument(cache))


@torch.no_grad()
def test_what_is_read_back_is_not_written_to(model):
    """A copy, and every view of it; what is made of it is a tensor like any other."""
    cache = new_cache(model, "kivi")
    model(prompt(2, 40)["input_ids"], **argument(cache))
    held = cache.layers[0].keys
    for write in (
        lambda: held.__setitem__((0, 0), 0),
        lambda: held[:, :, :5].zero_(),
        lambda: held.transpose(1, 2).mul_(2),
        lambda: held.__iadd__(1),
        lambda: torch.add(held, 1, out=held),
    ):
        with pytest.raises(ValueError, match=r"keys and values are copies, read back, and \w+ would change nothing"):
            write()
    assert torch.equal(held, cache.layers[0].read()[0])
    for made in (held + 1, held.clone(), torch.cat([held, held], 2), copy.deepcopy(held), held.norm(dim=-1)):
        assert type(made) is torch.Tensor
        made.zero_()
    assert all(type(key) is type(value) is torch.Tensor for key, value, _ in cache)
    assert cache.get_seq_length(7) == DynamicCache().get_seq_length(7) == 0


def test_without_use_cache_a_cache_is_refused(model):
    cache = new_cache(model, "kivi")
    with pytest.raises(ValueError, match="use_cache=False with a kvruntime cache"):
        model.generate(**prompt(1, 20), use_cache=False, max_new_tokens=2, **argument(cache))
    assert cache.get_seq_length() == 0


def test_two_threads_with_one_model(model):
    """The first to end does not take the implementation from the other; a stock cache meanwhile is served too."""
    make_cache(model)
    one, two = make_cache(model, "fp32"), make_cache(model, "fp32")
    ids, run = prompt(1, 12)["input_ids"], type(model.model.layers[0]).forward

    def other_thread(layer, *args, **kwargs):
        model.model.layers[0].forward = run.__get__(model.model.layers[0])
        assert model.config._attn_implementation == NAME
        with ThreadPoolExecutor(1) as pool:
            found.extend(pool.submit(forward, past).result() for past in (two, DynamicCache()))
        assert model.config._attn_implementation == NAME
        return run(layer, *args, **kwargs)

    @torch.no_grad()
    def forward(past):
        return model(ids, **argument(past)).logits

    found = []
    model.model.layers[0].forward = other_thread.__get__(model.model.layers[0])
    with torch.no_grad():
        found.append(model(ids, **argument(one)).logits)
    assert not switches(model)[0].__self__.active
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])


@pytest.mark.parametrize("how", ["pickle", "torch.save", "deepcopy"])
@caches
def test_a_cache_is_saved_and_goes_on(model, name, how):
    """After a forward with a mask; what comes back stands alone, and the lengths of both go on."""
    inputs, cache = prompt(2, 70, (0, 9)), new_cache(model, name)
    empty = pickle.loads(pickle.dumps(cache))
    with torch.no_grad():
        for held in (cache, empty):
            model(**inputs, **argument(held))
    if "compiled" in name:  # as in a new process
        kept = NAMED_METHODS.pop(repr(cache.method))
    if how == "pickle":
        again = pickle.loads(pickle.dumps(cache))
    elif how == "torch.save":
        torch.save(cache, file := io.BytesIO())
        file.seek(0)
        again = torch.load(file, weights_only=False)
    else:
        again = copy.deepcopy(cache)
    if "compiled" in name:
        assert NAMED_METHODS[repr(cache.method)] == kept
    assert (again.nbytes, again.get_seq_length()) == (cache.nbytes, 70)
    more = prompt(2, 3, seed=4)["input_ids"]
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1)
    with torch.no_grad():
        for start, stop in ((0, 1), (1, 3)):
            out = [
                model(more[:, start:stop], attention_mask=mask[:, : 70 + stop], **argument(held)).logits
                for held in (again, cache, empty)
            ]
            assert torch.equal(out[0], out[1])
            assert torch.equal(out[0], out[2])


def test_a_saved_cache_of_another_version_is_refused(model):
    cache = make_cache(model)
    assert cache.__getstate__()["version"] == STATE_VERSION
    for version in (None, STATE_VERSION + 1):
        state = cache.__getstate__() | {"version": version}
        with pytest.raises(ValueError, match=rf"of version {version}: this kvruntime reads version {STATE_VERSION}$"):
            Cache.__new__(Cache).__setstate__(state)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(("held", "length"), [(0, 1), (0, 5), (40, 1), (40, 5)])
@caches
def test_a_forward_that_ended_between_layers_is_noticed(model, name, held, length, error):
    """Or, where a step runs on the device's counts, its second run stores in the first one's place."""
    ids, cache, whole = prompt(2, 80)["input_ids"], new_cache(model, name), new_cache(model, name)
    layer, now = model.model.layers[1], ids[:, held : held + length]

    def fails(*args, **kwargs):
        raise error

    with torch.no_grad():
        for one in (cache, whole) if held else ():
            model(ids[:, :held], **argument(one))
        layer.forward = fails
        with pytest.raises(error):
            model(now, **argument(cache))
        del layer.forward
        if ("compiled" in name or isinstance(cache, SteppedCache)) and held and length == 1:
            got, want = (model(now, **argument(one)).logits for one in (cache, whole))
            assert torch.equal(got, want)
        else:
            for call in (lambda: model(now, **argument(cache)), lambda: cache.crop(-1)):
                with pytest.raises(
                    ValueError, match=rf"layers of the cache hold {held} and {held + length} tokens: .* reset"
                ):
                    call()
        cache.reset()
        got, want = (model(ids, **argument(one)).logits for one in (cache, new_cache(model, name)))
        assert torch.equal(got, want)


@torch.no_grad()
def test_a_step_of_several_that_ended_between_layers_is_noticed(model, monkeypatch):
    """Each layer counts its own tokens of such a step: run again, it would store them twice."""
    monkeypatch.setattr(empty, "steps_on", lambda device: True)
    ids, cache, layer = prompt(1, 45)["input_ids"], make_cache(model), model.model.layers[1]
    model(ids[:, :40], **argument(cache))

    def fails(*args, **kwargs):
        raise RuntimeError

    layer.forward = fails
    with pytest.raises(RuntimeError):
        model(ids[:, 40:], **argument(cache))
    del layer.forward
    with pytest.raises(ValueError, match="hold 40 and 45 tokens: a forward or update ended half-way"):
        model(ids[:, 40:], **argument(cache))


def test_an_interrupt_leaves_neither_model_nor_cache_as_during_a_forward(model):
    """No hook runs after one: the next forward, or update, finds out."""
    ids, cache = prompt(1, 20)["input_ids"], make_cache(model)
    attention, new = model.model.layers[0].self_attn, [torch.ones(1, 2, 3, 32, device=DEVICE)] * 2

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    def run(past, times=1):
        with torch.no_grad():
            return [model(ids, **argument(past)) for _ in range(times)]

    for again in (lambda: run(DynamicCache()), lambda: make_cache(model), lambda: kvruntime.restore(model)):
        run(cache)
        attention.forward = interrupted
        with pytest.raises(KeyboardInterrupt):
            run(cache)
        del attention.forward
        assert model.config._attn_implementation == NAME
        again()
        assert model.config._attn_implementation == "sdpa"
        for index in range(2):  # a stock cache would take these
            cache.update(*new, index)
        with pytest.raises(ValueError, match="given tokens that it has not stored: a forward was interrupted"):
            cache.crop(0)
        make_cache(model)
        with pytest.raises(ValueError, match="given tokens that it has not stored: a forward was interrupted"):
            run(cache)
        cache.reset()


@torch.no_grad()
def test_taking_no_token_back_leaves_the_steps_alone(model, monkeypatch):
    """Assisted decoding calls ``crop(0)`` after every step that drafted nothing."""
    monkeypatch.setattr(empty, "steps_on", lambda device: True)
    ids, cache = prompt(2, 41)["input_ids"], make_cache(model, "kivi", nbits=8, residual_length=128)
    for part in (ids[:, :40], ids[:, 40:]):
        model(part, **argument(cache))
    assert isinstance(cache, SteppedCache)
    assert cache.counts.ahead == 1
    cache.crop(0)
    assert (cache.counts.ahead, cache.get_seq_length()) == (1, 41)
    cache.crop(-1)
    assert (cache.counts.ahead, cache.get_seq_length()) == (0, 40)


def test_an_update_that_reached_some_layers_only_is_noticed(model):
    cache, ids = make_cache(model), prompt(1, 9)["input_ids"]
    with torch.no_grad():
        model(ids, **argument(cache))
        cache.update(*[torch.ones(1, 2, 3, 32, device=DEVICE)] * 2, 0)
        with pytest.raises(ValueError, match="hold 9 and 12 tokens"):
            model(ids, **argument(cache))
        cache.update(*[torch.ones(1, 2, 3, 32, device=DEVICE)] * 2, 1)
        assert model(ids, **argument(cache)).logits.isfinite().all()


@caches
def test_a_forward_that_failed_before_it_stored_changes_nothing(model, name):
    ids, cache = prompt(1, 50)["input_ids"], new_cache(model, name)
    with torch.no_grad():
        model(ids, **argument(cache))
        with pytest.raises(ValueError, match=r"."):
            model(ids[:, :2], attention_mask=torch.zeros(1, 52, dtype=torch.int64, device=DEVICE), **argument(cache))
        assert model(ids, **argument(cache)).logits.isfinite().all()


@caches
@pytest.mark.parametrize("length", [1, 4])
def test_another_dtype_within_a_sequence_is_refused(model, name, length):
    ids, cache = prompt(1, 50)["input_ids"], new_cache(model, name)
    with torch.no_grad():
        model(ids, **argument(cache))
        model.to(torch.float64)
        with pytest.raises(ValueError, match=r"tokens of float64 for a cache that was given float32: reset\(\) it"):
            model(ids[:, :length], **argument(cache))
        cache.reset()
        assert model(ids, **argument(cache)).logits.dtype == torch.float64


@pytest.mark.filterwarnings("ignore:.*functools.lru_cache:UserWarning")  # PyTorch 2.11 tells that it ignores one
def test_torch_compile_of_a_whole_model_with_a_plain_cache(model):
    """The tokens of generate(), past the limit of compilations too; whole graphs are what ``compiled=True`` is for."""
    torch._dynamo.reset()
    ids = prompt(1, 40)["input_ids"]
    right = model.generate(ids, max_new_tokens=4, do_sample=False, **argument(new_cache(model, "kivi")))
    compiled, cache, out = torch.compile(model, backend="eager"), new_cache(model, "kivi"), ids
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=2):
        logits = compiled(ids, **argument(cache)).logits
        for _ in range(4):
            out = torch.cat([out, logits[:, -1:].argmax(-1)], 1)
            logits = compiled(out[:, -1:], **argument(cache)).logits
        assert torch.equal(out, right)
        assert cache.get_seq_length() == 44
        torch._dynamo.reset()
        with pytest.raises(Exception, match=r"make_cache\(\.\.\., compiled=True\)"):
            torch.compile(model, backend="eager", fullgraph=True)(ids, **argument(new_cache(model, "kivi")))
    assert model.config._attn_implementation == "sdpa"
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize("way", ["planned", "steps", "compiled"])
def test_a_hook_between_layers_reads_what_the_layer_has_just_stored(model, way, monkeypatch):
    """As pruning code does: also of a first prompt, whose layers are stored together, and in the middle of a step."""
    monkeypatch.setattr(empty, "steps_on", lambda device: way == "steps")
    ids, read = prompt(2, 46)["input_ids"], {}
    options = {"compiled": True, "max_seq_len": 50} if way == "compiled" else {}

    def hook(module, args, kwargs, output):
        (past,) = (given for given in kwargs.values() if hasattr(given, "get_seq_length"))
        layer = past.layers[module.layer_idx]
        read[past] += [torch.Tensor.clone(layer.keys), torch.Tensor.clone(layer.values)]

    for each in model.model.layers:
        each.self_attn.register_forward_hook(hook, with_kwargs=True)
    kivi = make_cache(model, "kivi", nbits=8, residual_length=32, **options)
    caches = [make_cache(model, "fp32", **options), kivi, DynamicCache()]
    for cache in caches:
        read[cache] = []
        for start, stop in ((0, 40), (40, 41), (41, 42), (42, 45), (45, 46)):
            model(ids[:, start:stop], **argument(cache))
            cache.layers[0].keys.sum()  # of one layer alone
        assert cache.get_seq_length() == 46
    assert isinstance(kivi, SteppedCache) == (way == "steps")
    for cache, kind in ((caches[0], "fp32"), (kivi, "kivi")):
        for got, want in zip(read[cache], read[caches[-1]], strict=True):
            assert_near(kind, got, want)
        cache.crop(-1)
        assert set(map(tuple, (store.row_lengths for store in cache.stores))) == {(45, 45)}


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 3])
def test_a_forward_over_some_layers_is_noticed(model, length, monkeypatch):
    """In a step as well, whose tokens are counted after the last layer."""
    monkeypatch.setattr(empty, "steps_on", lambda device: True)
    ids, cache, layers = prompt(1, 24)["input_ids"], make_cache(model, "fp32"), model.model.layers
    model(ids[:, :20], **argument(cache))
    model.model.layers = layers[:1]
    model(ids[:, :length], **argument(cache))
    model.model.layers = layers
    with pytest.raises(ValueError, match=f"hold 20 and {20 + length} tokens: a forward or update ended half-way"):
        model(ids[:, :1], **argument(cache))
    cache.reset()
    assert torch.equal(model(ids, **argument(cache)).logits, model(ids).logits)


@torch.no_grad()
def test_a_step_that_was_cut_leaves_nothing_to_read(model):
    """Of a compiled cache, whose layers had stored it, in the sequence after ``reset()``."""
    cache, ids = make_cache(model, "fp32", compiled=True, max_seq_len=60), prompt(1, 24)["input_ids"]
    model(ids[:, :20], **argument(cache))
    layers, model.model.layers = model.model.layers, model.model.layers[:1]
    model(ids[:, :1], **argument(cache))
    model.model.layers = layers
    cache.reset()
    for start, stop in ((0, 20), (20, 21), (21, 24)):
        model(ids[:, start:stop], **argument(cache))
        assert [layer.keys.shape[2] for layer in cache.layers] == [stop] * len(cache.layers)


@torch.no_grad()
def test_a_model_is_saved_with_what_make_cache_added(model):
    cache, ids = make_cache(model, "fp32"), prompt(1, 20)["input_ids"]
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(again(ids, **argument(make_cache(again, "fp32"))).logits, model(ids).logits)
        assert torch.equal(again(ids, **argument(cache)).logits, model(ids).logits)
        cache.reset()


@torch.no_grad()
def test_rows_are_chosen_as_of_a_stock_cache(model):
    ids, cache = prompt(3, 20)["input_ids"], make_cache(model, "fp32")
    cache.reorder_cache(torch.tensor([0, 0]))  # nothing is held
    for rows in ([0, 2], slice(1, 3), torch.tensor([True, False, True])):
        past = DynamicCache()
        for one in (cache, past):
            model(ids, **argument(one))
            one.batch_select_indices(rows)
        assert torch.equal(cache.layers[1].read()[0], past.layers[1].keys)
        cache.reset()
    for given, message in ((-2.5, "allowed are whole numbers"), (2, "allowed is 0 or below")):
        for one in (cache, SteppedCache(cache.method, 2)):
            with pytest.raises(ValueError, match=message):
                one.crop(given)
