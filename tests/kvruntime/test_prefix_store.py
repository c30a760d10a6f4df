"""Prefixes in files: what is read back is what was kept, in pages and under transformers, and nothing else is read."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch", reason="the runtime extra (torch) is not installed")
pytest.importorskip("transformers", reason="the runtime extra (transformers) is not installed")

from paged_engine import HEADS, ROWS, engine, modules, step  # noqa: E402
from runtime_tiny import tiny_model  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from kvruntime import get_prefix, make_cache, open_prefixes, paged, put_prefix  # noqa: E402
from kvruntime.hf import prefixes  # noqa: E402
from kvruntime.hf.cache import argument  # noqa: E402
from kvruntime.methods import room_of  # noqa: E402
from kvruntime.prefix_store import PrefixStore, from_pages, read, to_pages  # noqa: E402
from kvsim.layout import LayerShape  # noqa: E402
from kvsim.methods import Evict, Full, Kivi, PerTokenHead  # noqa: E402

SHORT = Kivi(residual_length=32, dtype="float32")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def ids(count: int, seed: int = 0) -> list[int]:
    return torch.randint(1, 128, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def logits(model, cache, *parts):
    with torch.no_grad():
        return [model(torch.tensor(part), use_cache=True, **argument(cache)).logits for part in parts]


@pytest.mark.parametrize(("method", "length"), [(SHORT, 101), (Full("float32"), 20), (PerTokenHead("int8"), 101)])
def test_a_prefix_under_transformers(model, method, length, tmp_path):
    """Two rows go on behind it as behind the prompt that was computed, to the bit; so does ``generate``."""
    prompt, store = ids(length + 40), open_prefixes(tmp_path, model, method)
    assert get_prefix(store, model, prompt) is None
    cache = make_cache(model, method)
    logits(model, cache, [prompt[:length]])
    path = put_prefix(store, cache, prompt[:length])
    again = get_prefix(open_prefixes(tmp_path, model, method), model, prompt, batch_size=2)
    assert again.get_seq_length() == length
    more = [[prompt[length : length + 30]], [prompt[length + 30 : length + 31]]]
    wanted = logits(model, cache, *more)
    for got, one in zip(logits(model, again, *(part * 2 for part in more)), wanted, strict=True):
        torch.testing.assert_close(got, one.expand(2, -1, -1), rtol=1e-5, atol=1e-5)
    assert [store.row_lengths for store in again.stores] == [[length + 31] * 2] * 2
    ids_, new = torch.tensor([prompt]), {"max_new_tokens": 2, "do_sample": False}
    exact = model.generate(ids_, **argument(get_prefix(store, model, prompt)), **new)
    cache = make_cache(model, method)
    logits(model, cache, [prompt[:length]])
    assert torch.equal(exact, model.generate(ids_, **argument(cache), **new))
    page, packed = paged.page_shape(method, LayerShape(2, 32, 32)), paged.num_packed(method, length)
    exact = (length - packed) * 2 * 64 * 4
    records = -(-packed // page.record_tokens) * page.record_nbytes if packed else 0
    assert sum(x.nbytes for x in read(path)[1].values()) == 2 * (records + exact)


def test_the_longest_prefix_is_found(model, tmp_path):
    prompt, store = ids(90), open_prefixes(tmp_path, model, SHORT)
    for length in (30, 60, 90):
        cache = make_cache(model, SHORT)
        logits(model, cache, [prompt[:length]])
        put_prefix(store, cache, prompt[:length])
    assert store.lengths == [90, 60, 30]
    other = [*prompt[:40], *ids(50, 1)]
    assert [store.find(tokens) for tokens in (prompt, [*prompt, 1], prompt[:60], other, other[1:])] == [
        60,
        90,
        30,
        30,
        0,
    ]
    elsewhere = PrefixStore(tmp_path, SHORT, store.shapes, "another model")
    assert elsewhere.get([*prompt, 1]) is None
    assert open_prefixes(tmp_path, model, Kivi(4, residual_length=32, dtype="float32")).get([*prompt, 1]) is None
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", ["2-bit g32", "fp16", "turboquant 3"])
def test_a_prefix_in_pages(name, tmp_path):
    """Another engine's row, whose pages lie elsewhere, attends as the one that stored it, to the bit."""
    first, second = engine(name), engine(name)
    reference, _ = modules(first.method)
    shape = LayerShape(HEADS, first.dim, first.dim)
    tokens, dtype = list(range(5, 138)), getattr(first.method, "dtype", "float16")
    store = PrefixStore(tmp_path, first.method, [shape], "a model")
    counts, before = (len(tokens), 0, 0), [0] * ROWS
    step(first, reference, first.batch(before, counts), 0)
    held = from_pages(first.method, first.pages, first.blocks[0], first.places[0], len(tokens))
    if name == "turboquant 3":  # the last page is the prefix's up to its last token, and then nobody's
        assert held.key is None
        assert (held.records[2].view(torch.uint8)[:, -2 * (64 - 5) : -1] == 0).all()
    else:
        assert held.key.dtype == getattr(torch, dtype)
    store.put(tokens, [held])
    found = store.get([*tokens, 1])
    assert found.num_tokens == len(tokens)
    second.blocks[0], second.places[0] = first.blocks[2], first.places[1]
    to_pages(second.method, found.layers[0], second.pages, second.blocks[0], second.places[0], len(tokens))
    before = [len(tokens), 0, 0]
    outs = [step(one, reference, one.batch(before, (3, 0, 0)), 9) for one in (first, second)]
    assert torch.equal(*outs)
    outs = [step(one, reference, one.batch([len(tokens) + 3, 0, 0], (40, 0, 0)), 19) for one in (first, second)]
    assert torch.equal(*outs)


def test_a_prefix_goes_where_its_layer_lies(model, tmp_path, monkeypatch):
    """The store's tensors are the host's, a layer's on its own device."""
    prompt, store, seen = ids(60), open_prefixes(tmp_path, model, SHORT), []
    cache = make_cache(model, SHORT)
    logits(model, cache, [prompt[:50]])
    put_prefix(store, cache, prompt[:50])
    monkeypatch.setattr(prefixes, "devices", lambda model, count: [torch.device("meta")] * count)
    monkeypatch.setattr(
        room_of(SHORT).paged, "write_rows", lambda layer, count, *held: seen.append((layer.device, held))
    )
    get_prefix(store, model, prompt)
    assert len(seen) == 2
    assert all(x.device == device == torch.device("meta") for device, held in seen for x in held)


def test_files_that_are_not_read(model, tmp_path):
    prompt, store = ids(80), open_prefixes(tmp_path, model, SHORT)
    cache = make_cache(model, SHORT)
    logits(model, cache, [prompt[:70]])
    path = put_prefix(store, cache, prompt[:70])
    whole, (about, tensors) = path.read_bytes(), read(path)

    def refused(why: str, **more) -> None:
        with pytest.raises(ValueError, match=why):
            store.get(prompt, **more)

    path.write_bytes(whole[:-9] + b"\0" + whole[-8:])
    refused("is damaged: (keys|values|records).1")
    assert store.get(prompt, check=False) is not None
    path.write_bytes(whole[:-40])
    refused("is damaged: ")
    for change, why in (
        ({"version": 2}, "is a prefix of version 2: this kvruntime reads 1"),
        ({"format": "else"}, "is no prefix that kvruntime kept"),
        ({"sha256": "0"}, "is a prefix of another sha256 than its name says"),
        ({"model": "x"}, "is a prefix of another model than its name says"),
    ):
        save_file(tensors, path, {"kvruntime": json.dumps(about | change)})
        refused(why)
    for value in (None, [], 7):
        save_file(tensors, path, {"kvruntime": json.dumps(about | {"crc32": value})})
        refused("is damaged: ")
    save_file(tensors, path, {"kvruntime": "[1]"})
    refused("is no prefix that kvruntime kept")
    save_file(tensors, path)
    refused("is no prefix that kvruntime kept")
    save_file(tensors | {"keys.0": tensors["keys.0"][1:].clone()}, path, {"kvruntime": json.dumps(about)})
    refused(r"of 70 tokens has keys.0 \(\(\d+, 2, 32\), torch.float32\), kivi-2bit-g32-r32 says")
    assert set(load_file(path)) == set(tensors)


def test_what_is_not_kept(model, tmp_path):
    store, prompt = open_prefixes(tmp_path, model, SHORT), ids(40)
    cache = make_cache(model, SHORT)
    with pytest.raises(ValueError, match="row 0 of the cache holds 0 tokens: allowed are the 40 given"):
        put_prefix(store, cache, prompt)
    logits(model, cache, [prompt])
    with pytest.raises(ValueError, match="row 0 of the cache holds 40 tokens: allowed are the 39 given"):
        put_prefix(store, cache, prompt[:39])
    with pytest.raises(ValueError, match=r"a cache of kivi-2bit-g32-r128 for a store of kivi-2bit-g32-r32"):
        put_prefix(store, make_cache(model), prompt)
    padded, mask = make_cache(model, SHORT), torch.ones(1, 45, dtype=torch.long)
    mask[:, :5] = 0
    with torch.no_grad():
        model(torch.tensor([[0] * 5 + prompt]), attention_mask=mask, **argument(padded))
    with pytest.raises(ValueError, match="row 0 of the cache has padding"):
        put_prefix(store, padded, prompt)
    with pytest.raises(ValueError, match="does not fit an engine's pages"):
        open_prefixes(tmp_path, model, Evict(budget=64))
    with pytest.raises(ValueError, match="in pages: sink_length 4, allowed is 0"):
        open_prefixes(tmp_path, model, "kivi", sink_length=4)
    with pytest.raises(ValueError, match="a store of prefixes of another model than this LlamaForCausalLM"):
        get_prefix(PrefixStore(tmp_path, SHORT, store.shapes, "another"), model, prompt)
