"""Models that mix layers: full attention is packed, windows and states stay as transformers keeps them.

Every family of tests/support/hf_mixed.py against its own stock attention, and weighed against kvsim's kvruntime engine.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hf_mixed import MIXED, WINDOW, mixed
from hf_models import prompt
from hf_oracle import stored
from transformers import DynamicCache

from kvruntime import make_cache
from kvruntime.bench.harness.weigh import weigh
from kvruntime.engine import Engine
from kvruntime.hf.cache import CacheLayer, argument
from kvruntime.hf.exact import WindowLayer
from kvsim.engines import Kvruntime
from kvsim.methods import Full, Kivi
from kvsim.models.model import Model

pytestmark = pytest.mark.filterwarnings("ignore:kvruntime. every decode step of this model waits")
"""Outside generate() transformers runs a float32 model's experts so that no graph can hold them."""
GENERATE = {"max_new_tokens": 10, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
families = pytest.mark.parametrize("family", MIXED)
SLIDES = "Gemma 3"
STATES = "Qwen3-Next"
some = pytest.mark.parametrize("family", [SLIDES, "gpt-oss", STATES, "LFM2", "Falcon-H1"])


def same(ours, stock):
    assert torch.equal(ours.sequences, stock.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(stock.logits), atol=1e-4, rtol=1e-4)


@families
def test_greedy_generation_is_stock(family):
    """A left-padded ragged batch that outgrows the window: the same tokens, logits within 1e-4."""
    model, inputs = mixed(family), prompt(3, 24, (0, 5, 13))
    stock = model.generate(**inputs, **GENERATE)
    cache = make_cache(model, "fp32")
    same(model.generate(**inputs, **GENERATE, **argument(cache)), stock)
    assert cache.get_seq_length() == 33
    assert {tuple(store.row_lengths) for store in cache.stores} == {(33, 28, 20)}


def stock_past(cache, before: list[object], config, num_tokens: int) -> DynamicCache:
    """A stock cache with the packed layers' first ``num_tokens`` tokens read back, and ``before``, the others as they
    were."""
    past = DynamicCache(config=config)
    for index, (layer, other) in enumerate(zip(cache.layers, before, strict=True)):
        if other is not None:
            names = vars(past.layers[index]).keys() & vars(other).keys() - {"keys", "values"}
            for name in names if isinstance(layer, CacheLayer) else vars(other).keys():
                setattr(past.layers[index], name, copy.deepcopy(getattr(other, name)))
        if isinstance(layer, CacheLayer):
            key, value = (x[:, :, :num_tokens] for x in stored(layer.store))
            past.layers[index].is_initialized = False
            past.update(key, value, index)
    return past


@families
def test_kivi_is_what_it_stores_read_back(family):
    """Prefill, decoding over several flushes and a warm chunk, each against stock attention over the packed layers'
    tokens read back and the others' own."""
    model = mixed(family)
    cache = make_cache(model, "kivi", nbits=4, group_size=32, residual_length=64, compiled=False)
    ids = prompt(2, 250)["input_ids"]
    with torch.no_grad():
        model(ids[:, :100], **argument(cache))
        for start, stop in ((100, 150), *((at, at + 1) for at in range(150, 202)), (202, 250)):
            before = [None if type(layer) is CacheLayer else copy.deepcopy(layer) for layer in cache.layers]
            past = stock_past(cache, before, model.config, start)
            got = model(ids[:, start:stop], **argument(cache)).logits
            if stop == start + 1:
                past = stock_past(cache, before, model.config, start)
            want = model(ids[:, start:stop], **argument(past)).logits
            torch.testing.assert_close(got, want, atol=5e-5, rtol=1e-4)
    assert {tuple(store.row_packed) for store in cache.stores} == {(192, 192)}


@pytest.mark.parametrize("method", [Full("float32"), Kivi(dtype="float32", residual_length=32)], ids=["fp32", "kivi"])
@families
def test_every_step_weighs_what_is_predicted(family, method):
    """Shorter than the window, at it and beyond it; single tokens, chunks, and a growth of the packed layers."""
    model = mixed(family)
    read = Model.from_config(model.config.to_dict())
    cache, held = make_cache(model, method, compiled=False), 0
    for length in (WINDOW - 2, 1, 1, 1, 5, 240, 1):
        with torch.no_grad():
            model(prompt(2, length)["input_ids"], **argument(cache))
        held += length
        predicted = Kvruntime().parts(read, method, 2, held)
        assert weigh(cache) - cache.step_nbytes == cache.nbytes == sum(predicted.values())
    assert sum(size for name, size in predicted.items() if name.startswith(("window_", "state_"))) > 0


@some
@pytest.mark.parametrize("arguments", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}], ids=str)
def test_beams_and_samples(family, arguments):
    model, inputs = mixed(family), prompt(2, 20, (0, 6))
    caches = {}, argument(make_cache(model, "fp32"))
    out = []
    for cache in caches:
        torch.manual_seed(0)
        out.append(model.generate(**inputs, max_new_tokens=8, **arguments, **cache))
    assert torch.equal(*out)


@some
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "reorder", "repeat", "select"])
def test_copies_and_other_rows(family, how):
    """Rows of other numbers and orders attend as a stock cache's do."""
    model, ids = mixed(family), prompt(3, 40)["input_ids"]
    cache, rows = make_cache(model, "fp32"), [0, 1, 2]
    with torch.no_grad():
        model(ids[:, :30], **argument(cache))
        if how == "deepcopy":
            cache = copy.deepcopy(cache)
        elif how == "pickle":
            cache = pickle.loads(pickle.dumps(cache))
        elif how == "repeat":
            cache.batch_repeat_interleave(2)
            rows = [0, 0, 1, 1, 2, 2]
        else:
            rows = [2, 0]
            (cache.reorder_cache if how == "reorder" else cache.batch_select_indices)(torch.tensor(rows))
        assert cache.batch_size == len(rows)
        for start in range(30, 34):
            past = DynamicCache(config=model.config)
            model(ids[rows, :start], **argument(past))
            want = model(ids[rows, start : start + 1], **argument(past)).logits
            got = model(ids[rows, start : start + 1], **argument(cache)).logits
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@some
def test_a_used_cache_takes_another_prompt_after_a_reset(family):
    """Of another batch size; nothing of the last is seen."""
    model = mixed(family)
    cache = make_cache(model, "fp32")
    for rows, length in ((3, 30), (2, 21), (1, 5)):
        ids = prompt(rows, length, seed=rows)["input_ids"]
        with torch.no_grad():
            got = model(ids, **argument(cache)).logits
            want = model(ids, **argument(DynamicCache(config=model.config))).logits
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
        cache.reset()
        assert cache.get_seq_length() == 0


@pytest.mark.parametrize("family", [SLIDES, "gpt-oss", "LFM2"])
def test_candidates_are_taken_back(family):
    """Prompt look-up, within the window and beyond it: what was not accepted leaves windows and convolutions too."""
    model, inputs = mixed(family), prompt(1, 24)
    inputs["input_ids"][:, 12:] = inputs["input_ids"][:, :12]
    stock = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    cache = make_cache(model, "kivi", nbits=2, residual_length=256)
    ours = model.generate(**inputs, max_new_tokens=20, do_sample=False, prompt_lookup_num_tokens=4, **argument(cache))
    assert torch.equal(ours, stock)
    assert cache.get_seq_length() == len(stock[0]) - 1


def test_what_cannot_be_taken_back_is_refused():
    """Before any layer changes."""
    ids = prompt(1, WINDOW + 4)["input_ids"]
    for family, message in (
        (SLIDES, f"a window of {WINDOW} tokens has let go"),
        (STATES, "a recurrent state does not"),
    ):
        model = mixed(family)
        cache = make_cache(model, "fp32")
        with torch.no_grad():
            model(ids, **argument(cache))
        with pytest.raises(ValueError, match=rf"^cannot crop: {message}"):
            cache.crop(-1)
        assert {store.row_lengths[0] for store in cache.stores} == {WINDOW + 4}
        cache.crop(0)
    cache = make_cache(mixed(SLIDES), "fp32")
    with torch.no_grad():
        mixed(SLIDES)(ids[:, :9], **argument(cache))
        cache.crop(-2)
        got = mixed(SLIDES)(ids[:, 7:9], **argument(cache)).logits
        want = mixed(SLIDES)(ids[:, :9]).logits[:, 7:]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", [SLIDES, STATES])
def test_a_forward_that_ends_half_way_is_noticed(family, monkeypatch):
    """States have no count of tokens: that one was written tells."""
    model, ids = mixed(family), prompt(1, 20)["input_ids"]
    cache = make_cache(model, "fp32", compiled=False)
    with torch.no_grad():
        model(ids, **argument(cache))
        with monkeypatch.context() as patch:
            patch.setattr(CacheLayer, "pend", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(ids[:, :1], **argument(cache))
        with pytest.raises(ValueError, match=r"half-way, reset\(\) it$"):
            model(ids[:, :1], **argument(cache))
        cache.reset()
        model(ids, **argument(cache))


def test_what_a_mixed_cache_says_of_itself():
    cache = make_cache(mixed(SLIDES), "kivi", residual_length=32, compiled=False)
    with torch.no_grad():
        mixed(SLIDES)(prompt(1, 40)["input_ids"], **argument(cache))
    assert repr(cache).startswith("Cache(kivi-2bit-g32-r32, num_layers=2, packed=1, nbytes=")
    assert cache.is_sliding == [True, False]
    assert (cache.get_seq_length(0), cache.get_seq_length(1), cache.get_max_length()) == (40, 40, -1)
    assert cache.get_mask_sizes(3, 0) == (WINDOW - 1 + 3, 40 - WINDOW + 1)
    assert cache.get_mask_sizes(3, 1) == (43, 0)
    window = cache.layers[0]
    assert type(window) is WindowLayer
    assert window.keys.shape[2] == WINDOW - 1
    (keys, _, size), (read, _, none) = cache
    assert keys.shape[2] == WINDOW - 1
    assert (int(size), read.shape[2], none) == (WINDOW, 40, None)


@pytest.mark.parametrize(
    ("family", "what"),
    [
        (SLIDES, "sliding or chunked windows"),
        (STATES, "linear-attention or state-space layers"),
    ],
)
def test_what_runs_full_attention_alone_refuses_by_name(family, what):
    model = mixed(family)
    with pytest.raises(ValueError, match=f"{what}, which a compiled cache does not run"):
        make_cache(model, compiled=True, max_seq_len=64)
    with pytest.raises(ValueError, match=f"is not supported here: {what}"):
        Engine(model, batch_size=1, max_seq_len=64)


def test_the_uncompressed_window_holds_no_prompt():
    """transformers' own layer keeps a view of all that a prompt brought."""
    ids = prompt(1, 200)["input_ids"]
    model, stock = mixed(SLIDES), DynamicCache(config=mixed(SLIDES).config)
    cache = make_cache(model, "fp32")
    with torch.no_grad():
        model(ids, **argument(stock))
        model(ids, **argument(cache))
    assert stock.layers[0].keys.untyped_storage().nbytes() == 200 * 2 * 32 * 4
    assert cache.layers[0].keys.untyped_storage().nbytes() == WINDOW * 2 * 32 * 4
    assert torch.equal(cache.layers[0].keys, stock.layers[0].keys)
