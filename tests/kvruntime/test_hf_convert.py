"""Caches that come from elsewhere: one that stock ``generate()`` filled, packed, and one from a file."""

from __future__ import annotations

import copy
import errno
import pickle
import re

import pytest
import torch
import transformers
from hf_mixed import WINDOW, mixed
from hf_models import DEVICE, prompt, tiny
from transformers import DynamicCache, StaticCache

import kvruntime
from kvruntime import compress, load_cache, make_cache, save_cache
from kvruntime.bench.harness.weigh import weigh
from kvruntime.hf import empty
from kvruntime.hf.cache import argument
from kvruntime.hf.models import layer_kinds
from kvruntime.hf.stepped import SteppedCache
from kvsim.methods import Evict, Full, Kivi

pytestmark = pytest.mark.filterwarnings("ignore:kvruntime. every decode step of this model waits")
"""Outside generate() transformers runs a float32 model's experts so that no graph can hold them."""
FAMILIES = ["Llama", "Gemma 3", "gpt-oss", "Qwen3-Next", "LFM2", "Falcon-H1"]
METHODS = {
    "fp32": Full("float32"),
    "kivi": Kivi(nbits=4, residual_length=32, dtype="float32"),
    "sink": Kivi(nbits=2, residual_length=64, sink_length=5, dtype="float32"),
    "evict": Evict(budget=64, inner=Full("float32")),
}
CLOSE = {"atol": 1e-4, "rtol": 1e-3} if DEVICE.type == "cuda" else {"atol": 0, "rtol": 0}
"""On a GPU the first step after a file is the host's, whose kernels add in another order."""
families = pytest.mark.parametrize("family", FAMILIES)
methods = pytest.mark.parametrize("name", METHODS)


def model_of(family):
    return tiny(family) if family == "Llama" else mixed(family)


def filled(model, cache, length, padding=(0, 7), seed=0):
    """The cache with a left-padded prompt and its inputs."""
    inputs = prompt(2, length, padding, seed)
    position = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        model(**inputs, position_ids=position, **argument(cache))
    return inputs


@torch.no_grad()
def logits(model, cache, inputs, length):
    """Of ``length`` more tokens, one at a time and then two."""
    out, ids, mask = [], prompt(2, length, seed=9)["input_ids"], inputs["attention_mask"]
    for part in (*ids[:, :-2].split(1, 1), ids[:, -2:]):
        mask = torch.cat([mask, torch.ones_like(part)], 1)
        position = (mask.cumsum(1) - 1)[:, -part.shape[1] :]
        out.append(model(part, attention_mask=mask, position_ids=position, **argument(cache)).logits)
    return torch.cat(out, 1)


@methods
@families
def test_a_cache_that_stock_attention_filled_is_packed(family, name):
    """As if the prompt had come to a kvruntime cache: the same bytes and tensors, and the same answers."""
    model, method = model_of(family), METHODS[name]
    ours, stock = make_cache(model, method), DynamicCache(config=model.config)
    inputs = filled(model, ours, 90)
    filled(model, stock, 90)
    before = [None if layer is None else layer.clone() for layer in stock_tensors(stock)]
    cache = compress(stock, method, model=model, attention_mask=inputs["attention_mask"])
    assert weigh(cache) - cache.step_nbytes == cache.nbytes == ours.nbytes
    assert all(torch.equal(*pair) for pair in zip(before, stock_tensors(stock), strict=True))
    torch.testing.assert_close(logits(model, cache, inputs, 9), logits(model, ours, inputs, 9), atol=1e-4, rtol=1e-4)
    for mine, direct in zip(cache.stores, ours.stores, strict=True):
        assert mine.row_lengths == direct.row_lengths


def test_what_is_loaded_or_compressed_steps_as_what_was_made(monkeypatch, tmp_path):
    """Decode steps on the device, where ``make_cache`` would give them: from the second token on."""
    monkeypatch.setattr(empty, "steps_on", lambda device: True)
    model, path = tiny("Llama"), tmp_path / "cache.pt"
    stock, made = DynamicCache(config=model.config), make_cache(model, METHODS["kivi"])
    inputs = filled(model, stock, 70)
    filled(model, made, 70)
    save_cache(made, path)
    packed = compress(stock, METHODS["kivi"], model=model, attention_mask=inputs["attention_mask"])
    wanted = logits(model, made, inputs, 20)
    for cache in (load_cache(path, model), packed):
        assert isinstance(cache, SteppedCache)
        assert not cache.counts.started
        torch.testing.assert_close(logits(model, cache, inputs, 20), wanted, atol=1e-4, rtol=1e-4)
        assert cache.counts.started


def stock_tensors(cache):
    return [layer.keys for layer in cache.layers if getattr(layer, "keys", None) is not None]


def test_of_static_caches_and_without_a_model():
    """Only the columns that hold tokens; a model that was told nothing reads them back whole."""
    model = copy.deepcopy(tiny("Llama"))
    kvruntime.restore(model)
    stock = StaticCache(config=model.config, max_cache_len=64)
    inputs = filled(model, stock, 40, ())
    cache = compress(stock, "kivi", nbits=8, residual_length=32)
    assert cache.method == Kivi(nbits=8, residual_length=32, dtype="float32")
    assert (cache.get_seq_length(), cache.stores[0].row_lengths) == (40, [40, 40])
    got, want = logits(model, cache, inputs, 4), logits(model, stock, inputs, 4)
    assert (got - want).norm() < 0.02 * want.norm()
    assert not any(name in vars(model) for name in ("_prefill", "create_masks_for_generate"))


def test_generate_goes_on_with_it():
    model, ids = copy.deepcopy(tiny("Llama")), prompt(1, 30)["input_ids"]
    past = DynamicCache(config=model.config)
    first = model.generate(ids, max_new_tokens=5, do_sample=False, **argument(past))
    cache = compress(past, "fp32", model=model)
    got = model.generate(first, max_new_tokens=5, do_sample=False, **argument(cache))
    assert torch.equal(got, model.generate(first, max_new_tokens=5, do_sample=False))
    assert torch.equal(cache.layers[0].read()[0][:, :, :34], past.layers[0].keys)


def test_what_cannot_be_compressed():
    model, other = tiny("Llama"), mixed("Gemma 3")
    stock = DynamicCache(config=model.config)
    for given, options, message in (
        ([], {}, r"^compress\(list\): allowed is a DynamicCache or StaticCache that holds tokens"),
        (DynamicCache(), {}, r"^compress\(DynamicCache\): allowed"),
        (make_cache(model), {}, r"^compress\((Stepped)?Cache\): allowed"),
        (stock, {}, "^compress: the cache holds no tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            compress(given, **options)
    inputs = filled(model, stock, 20)
    with pytest.raises(ValueError, match=r"attention mask of shape \[2, 19\]: allowed is \[2, 20\]"):
        compress(stock, attention_mask=inputs["attention_mask"][:, 1:])
    with pytest.raises(ValueError, match="the cache is not one of Gemma3ForCausalLM: its layers are of other kinds"):
        compress(stock, model=other)
    with pytest.raises(ValueError, match="options nbits: allowed with a method's name only"):
        compress(stock, Kivi(), nbits=2)
    with pytest.raises(LookupError, match="unknown method"):
        compress(stock, "kiwi")
    windows = transformers.MistralConfig(num_hidden_layers=1, sliding_window=WINDOW)
    with pytest.raises(ValueError, match="none of the cache's layers is full attention"):
        compress(DynamicCache(config=windows))


@methods
@families
def test_a_cache_from_a_file_goes_on(family, name, tmp_path):
    """Ragged rows with padding in the middle too: the same answers, to the bit on a CPU, and the same bytes."""
    model, path = model_of(family), tmp_path / "cache.pt"
    cache = make_cache(model, METHODS[name], max_seq_len=None if name == "kivi" else 300)
    inputs = filled(model, cache, 90)
    save_cache(cache, path)
    state = torch.load(path, weights_only=True)
    assert {type(each) for each in flat(state)} <= {str, int, torch.Tensor, type(None), bool}
    again = load_cache(path, model)
    assert (again.method, again.nbytes, again.get_seq_length()) == (cache.method, cache.nbytes, 90)
    assert weigh(again) - again.step_nbytes == weigh(cache) - cache.step_nbytes
    assert type(again) is type(cache)  # no step is slower than before it was saved
    torch.testing.assert_close(logits(model, again, inputs, 40), logits(model, cache, inputs, 40), **CLOSE)


def flat(state):
    if isinstance(state, dict):
        assert all(type(key) is str for key in state)
        state = list(state.values())
    if not isinstance(state, list):
        return [state]
    return [leaf for each in state for leaf in flat(each)]


def test_a_compiled_cache_is_saved_where_its_steps_have_come(tmp_path):
    model, path = tiny("Llama"), tmp_path / "cache.pt"
    cache = make_cache(model, METHODS["kivi"], compiled=True, max_seq_len=150)
    inputs = filled(model, cache, 90)
    logits(model, cache, inputs, 12)
    save_cache(cache, path)
    again = load_cache(path, model)
    assert again.get_seq_length() == cache.get_seq_length() == 102
    for mine, theirs in zip(again.layers, cache.layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys)


def test_what_a_file_cannot_be(tmp_path):
    model, path = tiny("Llama"), tmp_path / "cache.pt"
    cache = make_cache(model)
    with pytest.raises(ValueError, match="save_cache: the cache holds no tokens"):
        save_cache(cache, path)
    with pytest.raises(ValueError, match=r"save_cache\(DynamicCache\): allowed is a cache that make_cache made"):
        save_cache(DynamicCache(), path)
    filled(model, cache, 20)
    save_cache(cache, path)
    with pytest.raises(ValueError, match="is not a cache of Gemma3ForCausalLM: its layers are of other kinds"):
        load_cache(path, mixed("Gemma 3"))
    state = torch.load(path, weights_only=True)
    for change, message in (
        ({"version": 9}, "is a saved cache of version 9: this kvruntime reads 2"),
        ({"format": "else"}, "is no cache that kvruntime saved"),
        (
            {"method": {"type": "Popen", "fields": {}}},
            "of the method Popen: allowed are Full, Kivi, ",
        ),
    ):
        torch.save(state | change, path)
        with pytest.raises(ValueError, match=re.escape(message)):
            load_cache(path, model)
    state["layers"][0]["packed"]["tensors"]["lengths"] = torch.zeros(3)
    torch.save(state, path)
    with pytest.raises(ValueError, match="the file's tensors of a layer are"):
        load_cache(path, model)


def damaged(state):
    """The state with one field gone or of another kind, each field in turn, a name and what became of it."""
    for path, holder, key in list(fields_of(state)):
        kept = holder[key]
        for other in (None, -1, 10**12, "x", [1, 2, 3], 1.5):
            if type(other) is not type(kept) or other != kept:
                holder[key] = other
                yield (*path, key), other
        del holder[key]
        yield (*path, key), "gone"
        holder.insert(key, kept) if isinstance(holder, list) else holder.__setitem__(key, kept)


def fields_of(node, path=()):
    for key in list(node) if isinstance(node, dict) else range(len(node)):
        yield path, node, key
        if isinstance(node[key], dict | list):
            yield from fields_of(node[key], (*path, key))


def test_a_damaged_file_is_one_line_or_loads_as_it_was(tmp_path, monkeypatch):
    """Every field of a file, changed or gone; a file that loads all the same holds the rows that it held."""
    model, path = tiny("Llama"), tmp_path / "cache.pt"
    cache = make_cache(model, METHODS["evict"])
    filled(model, cache, 20)
    save_cache(cache, path)
    state = torch.load(path, weights_only=True)
    state["layers"] = state["layers"][:1]  # the others are alike
    monkeypatch.setattr("kvruntime.hf.saved.layer_kinds", lambda model: layer_kinds(model)[:1])
    monkeypatch.setattr(torch, "load", lambda *_, **__: state)
    said, whole = [], load_cache(path, model).layers[0]
    for where, other in damaged(state):
        try:
            layer = load_cache(path, model).layers[0]
        except ValueError as error:
            said.append(str(error))
            continue
        same = (layer.num_columns, layer.store.seq_lengths) == (whole.num_columns, whole.store.seq_lengths)
        assert same, (where, other)
    assert len(said) > 150
    assert not [each for each in said if "\n" in each or len(each) > 400]


def test_a_file_that_is_cut_or_garbage_is_one_line(tmp_path):
    model, path = tiny("Llama"), tmp_path / "cache.pt"
    cache = make_cache(model)
    filled(model, cache, 20)
    save_cache(cache, path)
    whole = path.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for content in (b"", b"hello", whole[:middle], whole[:-9], flipped, pickle.dumps({"format": "kvruntime cache"})):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"^[^\n]+ a damaged one [^\n]+$"):
            load_cache(path, model)
    with pytest.raises(FileNotFoundError):
        load_cache(tmp_path / "none.pt", model)


def test_a_save_that_fails_leaves_the_file_of_before(tmp_path, monkeypatch):
    model, path = tiny("Llama"), tmp_path / "cache.pt"
    cache = make_cache(model)
    filled(model, cache, 20)
    save_cache(cache, path)
    before = path.read_bytes()

    def full(state, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ValueError, match=r"cannot write .*: No space left on device"):
        save_cache(cache, path)
    assert (path.read_bytes(), [each.name for each in tmp_path.iterdir()]) == (before, ["cache.pt"])


def test_all_of_it_is_public():
    assert {"compress", "load_cache", "save_cache", "make_cache", "restore"} <= set(kvruntime.__all__)
