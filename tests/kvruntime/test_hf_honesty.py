"""Memory is real: every tensor that can be reached from a cache, weighed after every step, is what kvsim predicts."""

from __future__ import annotations

import gc
import weakref
from types import ModuleType

import pytest
import torch
from hf_models import prompt, tiny
from torch.multiprocessing.reductions import StorageWeakRef

from kvruntime import make_cache
from kvruntime.hf import empty
from kvruntime.hf.cache import CacheLayer, argument
from kvsim.layout import LayerShape, nbytes
from kvsim.methods import kivi_boost

SHAPES = {"GPT-2": LayerShape(4, 32, 32), "Llama": LayerShape(2, 32, 32)}  # as their configs say (hf_models.py)
METHODS = {
    "fp16": ("fp16", {}),
    "fp32": ("fp32", {}),
    "kivi-2": ("kivi", {"nbits": 2}),
    "kivi-4-g64": ("kivi", {"nbits": 4, "group_size": 64, "value_group_size": 32, "residual_length": 64}),
    "kivi-8-r32": ("kivi", {"nbits": 8, "residual_length": 32, "dtype": "float16"}),
    "kivi-k4v2-sink": ("kivi", {"key_nbits": 4, "value_nbits": 2, "residual_length": 96, "sink_length": 4}),
    "kivi-seed": ("kivi-seed", {}),
    "kivi-boost": ("kivi-boost", {"nbits": 3, "residual_length": 64}),
    "h2o-ratio": ("evict", {"policy": "h2o", "ratio": 0.25}),
    "snapkv-kivi-boost": ("evict", {"policy": "snapkv", "budget": 150, "inner": kivi_boost(residual_length=64)}),
}


def reachable(root: object) -> list[torch.Tensor]:
    """Every tensor that can be reached through attributes, slots, closures, dicts and sequences."""
    found, seen, stack = [], set(), [root]
    while stack:
        item = stack.pop()
        if id(item) in seen or isinstance(
            item, (str, bytes, int, float, type, ModuleType, torch.dtype, torch.device, weakref.ref)
        ):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            found.append(item)
            stack += [item.grad, item._base]
        elif isinstance(item, dict):
            stack += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple, set, frozenset)):
            stack += item
        else:
            slots = [name for kind in type(item).__mro__ for name in getattr(kind, "__slots__", ())]
            stack += [getattr(item, name, None) for name in slots]
            stack += [*getattr(item, "__dict__", {}).values(), *(getattr(item, "__closure__", None) or ())]
            stack += [getattr(item, "cell_contents", None), getattr(item, "__self__", None)]
    return found


def weigh(root: object) -> int:
    """Bytes of the distinct storages behind every reachable tensor."""
    storages = [tensor.untyped_storage() for tensor in reachable(root)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_the_scale_finds_what_is_hidden():
    class Holder:
        __slots__ = ("kept",)

    holder, hidden = Holder(), torch.zeros(100)
    holder.kept = [{"a": (lambda: hidden)}]
    view = torch.zeros(50, dtype=torch.float16)[3:4]
    assert weigh([holder, view, view[:0], hidden[:2]]) == 400 + 100


@pytest.mark.parametrize("max_seq_len", [None, 300])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", SHAPES)
def test_every_step_weighs_what_is_predicted(family, name, batch_size, max_seq_len):
    """A ragged prompt, 150 single tokens (many flushes, one growth) and a chunk of several."""
    model, shape = tiny(family), SHAPES[family]
    method, options = METHODS[name]
    cache = make_cache(model, method, **options, max_seq_len=max_seq_len, compiled=False)
    steps = [130, *[1] * 150, 20]
    ids, mask = prompt(batch_size, sum(steps), (0, 7, 40)[:batch_size]).values()
    stop = 0
    for length in steps:
        start, stop = stop, stop + length
        with torch.no_grad():
            model(ids[:, start:stop], attention_mask=mask[:, :stop], **argument(cache))
        provided = max_seq_len or -(-stop // 256) * 256
        assert cache.num_provided == provided
        predicted = model.config.num_hidden_layers * nbytes(cache.method.buffers(shape, batch_size, provided))
        assert weigh(cache) - cache.step_nbytes == cache.nbytes == predicted
        names = {tensor_name for store in cache.stores for tensor_name in store.tensors}
        assert names == {buffer.name for buffer in cache.method.buffers(shape, batch_size, provided)}
    cache.reset()
    assert weigh(cache) - cache.step_nbytes == cache.nbytes == predicted


def test_steps_on_the_device_weigh_what_they_say(monkeypatch):
    """What they count and work in lies beside the cache's bytes, which are those of the tokens provided for."""
    monkeypatch.setattr(empty, "steps_on", lambda device: True)
    model = tiny("Llama")
    cache = make_cache(model, "kivi", nbits=2)
    ids, mask = prompt(2, 300, (0, 7)).values()
    with torch.no_grad():
        model(ids[:, :250], attention_mask=mask[:, :250], **argument(cache))
        for stop in range(251, 301):
            model(ids[:, stop - 1 : stop], attention_mask=mask[:, :stop], **argument(cache))
    assert cache.step_nbytes > 0
    assert cache.num_provided >= 300
    predicted = model.config.num_hidden_layers * nbytes(cache.method.buffers(SHAPES["Llama"], 2, cache.num_provided))
    assert weigh(cache) - cache.step_nbytes == cache.nbytes == predicted
    assert make_cache(model, "kivi", compiled=False).step_nbytes == 0


def test_what_host_planned_steps_read_on_a_device_is_weighed():
    """The rows' lengths, and what stands for a mask that was checked: beside the cache's bytes, and counted."""
    model = tiny("Llama")
    cache = make_cache(model, "kivi", nbits=2, compiled=False)
    with torch.no_grad():
        model(**prompt(2, 30, (0, 7)), **argument(cache))
    before = cache.step_nbytes
    cache.lengths.before(cache.stores[0], 4)
    cache.columns._checked = torch.ones(2, 1, 1, 1, dtype=torch.bool)
    cache.columns._expected = cache.columns.tokens(61, torch.device("cpu"))
    assert cache.step_nbytes > before
    assert weigh(cache) - cache.step_nbytes == cache.nbytes


@pytest.mark.parametrize("name", METHODS)
def test_no_token_survives_outside_the_buffers(name, monkeypatch):
    """What a forward brings to the cache is gone when it returns, and the buffers with the cache's last name."""
    model, fresh, append, advance = tiny("Llama"), [], CacheLayer.append, CacheLayer.advance

    def spy(layer, key, value, lengths, query=None):
        fresh.extend(StorageWeakRef(tensor.untyped_storage()) for tensor in (key, value))
        append(layer, key, value, lengths, query)

    def spy_step(layer, query, key, value, *more):  # what a single token takes on a GPU
        fresh.extend(StorageWeakRef(tensor.untyped_storage()) for tensor in (key, value))
        return advance(layer, query, key, value, *more)

    monkeypatch.setattr(CacheLayer, "append", spy)
    monkeypatch.setattr(CacheLayer, "advance", spy_step)
    cache = make_cache(model, METHODS[name][0], **METHODS[name][1], compiled=False)
    gc.disable()
    try:
        with torch.no_grad():
            for length in (200, 1, 5):
                model(prompt(1, length)["input_ids"], **argument(cache))
        assert len(fresh) == 3 * 2 * model.config.num_hidden_layers
        assert all(storage.expired() for storage in fresh)
        held = [StorageWeakRef(tensor.untyped_storage()) for tensor in reachable(cache)]
        assert not any(storage.expired() for storage in held)
        del cache
        assert all(storage.expired() for storage in held)
    finally:
        gc.enable()
