"""Decode steps on the device of models that mix layers: windows keep their place once they are full, states always."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers", reason="the runtime extra (transformers) is not installed")
pytest.importorskip("triton", reason="the runtime extra (triton) is not installed")

from hf_mixed import MIXED, WINDOW, mixed
from hf_models import DEVICE, prompt
from transformers import DynamicCache

from kvruntime import make_cache, restore
from kvruntime.bench.harness.weigh import weigh
from kvruntime.hf import empty
from kvruntime.hf.cache import argument
from kvruntime.hf.stepped import SteppedCache, SteppedLayer
from kvsim.methods import Kivi

KIVI = Kivi(nbits=8, residual_length=32, dtype="float32")
STEPPED = [family for family in MIXED if family != "MiMo-V2-Flash"]  # gpt-oss' kinds
some = pytest.mark.parametrize("family", ["Gemma 3", "gpt-oss", "Llama 4", "Qwen3-Next", "LFM2", "Falcon-H1"])


@pytest.fixture(autouse=True)
def stepping(monkeypatch):
    monkeypatch.setattr(empty, "steps_on", lambda device: True)


@pytest.mark.parametrize("family", STEPPED)
def test_generate_gives_the_tokens_of_the_planned_cache(family):
    """Ragged rows from before the window is full to where it has let go of all padding, and a second turn."""
    model, inputs, out = mixed(family), prompt(2, 12, (0, 6)), []
    for compiled in (None, False):
        cache = make_cache(model, KIVI, compiled=compiled)
        assert isinstance(cache, SteppedCache) == (compiled is None)
        first = model.generate(**inputs, **argument(cache), pad_token_id=0, max_new_tokens=14, do_sample=False)
        more = torch.cat([first, inputs["input_ids"][:, :5]], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(more[:, 12:])], 1)
        again = {"attention_mask": mask, "pad_token_id": 0, "max_new_tokens": 5, "do_sample": False}
        out.append(model.generate(more, **again, **argument(cache)))
        assert weigh(cache) - cache.step_nbytes == cache.nbytes
    assert torch.equal(*out)


def replay(model, cache, ids, position):
    """One token a row as a replayed graph runs it: what the host counts meanwhile is not counted."""
    counts = cache.counts
    counts.make_room()
    counts.tracing = cache.graphs.busy = True  # no graph but this one
    try:
        out = model(ids, attention_mask=None, position_ids=position, **argument(cache)).logits
    finally:
        counts.tracing = cache.graphs.busy = False
    counts.replay()
    return out


@some
@torch.no_grad()
def test_replays_between_steps_of_the_host(family, monkeypatch):
    """Replays, a chunk that the host stores, replays again: the planned cache's logits, and memory that stays."""
    model, ids = mixed(family), prompt(2, 60)["input_ids"]
    cache, planned = make_cache(model, KIVI), make_cache(model, KIVI, compiled=False)
    at = 0
    for length in (WINDOW - 2, 1, 1, *["replay"] * 8, 5, 1, *["replay"] * 8, 9, *["replay"] * 3, 1):
        size = 1 if length == "replay" else length
        part, position = ids[:, at : at + size], torch.arange(at, at + size, device=DEVICE).expand(2, -1)
        want = model(part, position_ids=position, **argument(planned)).logits
        if length == "replay":
            assert cache.counts.is_fixed_beside
            before = cache.counts.addresses_beside
            got = replay(model, cache, part, position)
            assert cache.counts.addresses_beside == before
        else:
            got = model(part, position_ids=position, **argument(cache)).logits
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
        at += size
        assert cache.get_seq_length() == at
        assert weigh(cache) - cache.step_nbytes == cache.nbytes
    windows = [layer for layer in cache.layers if hasattr(layer, "rooms")]
    assert all(layer.cumulative_length == at and layer.is_full for layer in windows)
    cache.reset()
    assert cache.counts.addresses_beside == ()
    assert cache.counts.is_fixed_beside == (not windows)


@pytest.mark.parametrize("family", ["Gemma 3", "Qwen3-Next"])
@torch.no_grad()
def test_a_step_that_ends_half_way_is_noticed(family, monkeypatch):
    model, ids = mixed(family), prompt(1, 20)["input_ids"]
    cache = make_cache(model, KIVI)
    model(ids, **argument(cache))
    with monkeypatch.context() as patch:
        patch.setattr(SteppedLayer, "step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(ids[:, :1], **argument(cache))
    with pytest.raises(ValueError, match=r"half-way, reset\(\) it$"):
        model(ids[:, :1], **argument(cache))


@torch.no_grad()
def test_a_window_with_padding_in_it_is_no_graph():
    model, inputs = mixed("Gemma 3"), prompt(2, WINDOW + 4, (0, 9))
    cache = make_cache(model, KIVI)
    model(**inputs, **argument(cache))
    fixed = []
    for _ in range(WINDOW):
        fixed.append(cache.counts.is_fixed_beside)
        inputs = {"attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)}
        step = {"input_ids": torch.ones(2, 1, dtype=torch.long, device=DEVICE), **inputs}
        model(**step, **argument(cache))
    clear = 9 + WINDOW - (WINDOW + 4) - 1  # steps until the window holds none of the nine columns of padding
    assert fixed == [False] * clear + [True] * (WINDOW - clear)


@some
@torch.no_grad()
def test_nothing_waits_for_the_device_while_a_graph_is_captured(family, monkeypatch):
    if DEVICE.type != "cpu":
        pytest.skip("what a GPU would wait for is looked for without one")
    model, ids = mixed(family), prompt(2, 24)["input_ids"]
    cache = make_cache(model, "fp32")
    model(ids[:, :20], **argument(cache))
    model(ids[:, 20:21], **argument(cache))

    def read(self):
        raise AssertionError("a capture would wait for the device here")

    for name in ("__bool__", "__int__", "__index__", "item", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, read)
    replay(model, cache, ids[:, 21:22], torch.full((2, 1), 21))


@torch.no_grad()
def test_a_window_that_was_cropped_keeps_no_place():
    """A graph would read the tokens that were taken back."""
    model, ids = mixed("Gemma 3"), prompt(2, WINDOW + 4)["input_ids"]
    cache = make_cache(model, KIVI)
    model(ids[:, : WINDOW - 1], **argument(cache))
    assert cache.counts.is_fixed_beside
    cache.crop(-3)
    assert not cache.counts.is_fixed_beside
    planned = make_cache(model, KIVI, compiled=False)
    model(ids[:, : WINDOW - 4], **argument(planned))
    for at in range(WINDOW - 4, WINDOW + 4):
        got, want = (model(ids[:, at : at + 1], **argument(one)).logits for one in (cache, planned))
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert cache.counts.is_fixed_beside


@torch.no_grad()
def test_a_model_without_our_attention_reads_a_full_window():
    """After restore() its own masks count the window's columns as transformers' own layer says."""
    model = copy.deepcopy(mixed("Gemma 3"))
    ids = prompt(2, 3 * WINDOW)["input_ids"]
    cache, past = make_cache(model, KIVI), DynamicCache(config=model.config)
    for one in (cache, past):
        model(ids[:, : 2 * WINDOW + 3], **argument(one))
        model(ids[:, 2 * WINDOW + 3 : 2 * WINDOW + 4], **argument(one))
    restore(model)
    got, want = (model(ids[:, 2 * WINDOW + 4 : 2 * WINDOW + 5], **argument(one)).logits for one in (cache, past))
    assert (got - want).abs().max() < 0.05  # of 8 bits; a masked window is off by far more


@pytest.mark.parametrize("family", ["Gemma 3", "Qwen3-Next"])
@torch.no_grad()
def test_a_capture_that_fails_leaves_the_books_alone(family, monkeypatch):
    """What it wrote to states and lengths has not run."""
    model, ids = mixed(family), prompt(2, 30)["input_ids"]
    cache = make_cache(model, KIVI)
    model(ids[:, :20], **argument(cache))
    with monkeypatch.context() as patch:
        patch.setattr(SteppedLayer, "step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            replay(model, cache, ids[:, 20:21], torch.full((2, 1), 20, device=DEVICE))
    cache.graphs.took_back()
    assert model(ids[:, 20:21], **argument(cache)).logits.isfinite().all()


@pytest.mark.parametrize("family", ["Gemma 3", "LFM2"])
def test_steps_after_drafts_are_graphs_again(family):
    """``generate()`` has windows and convolutions record what drafts may take back, and never ends that."""
    model, inputs, out = mixed(family), prompt(1, WINDOW + 4), []
    method = Kivi(nbits=8, residual_length=96, dtype="float32")
    for compiled in (None, False):
        cache, ids = make_cache(model, method, compiled=compiled), inputs["input_ids"]
        for options in ({"prompt_lookup_num_tokens": 3}, {}, {"prompt_lookup_num_tokens": 3}, {}):
            given = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **argument(cache), **options}
            ids = torch.cat([model.generate(ids, **given), inputs["input_ids"][:, :4]], 1)
            assert any(layer.record_past for layer in cache.layers if hasattr(layer, "record_past")) == bool(options)
            if compiled is None and options:
                assert "record what could come back" in repr(cache)
            elif compiled is None:
                assert cache.counts.is_fixed_beside
                assert weigh(cache) - cache.step_nbytes == cache.nbytes
        out.append(ids)
    assert torch.equal(*out)
    cache.layers[0].activate_past_recording()  # a caller's own stays
    model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, **argument(cache))
    assert cache.layers[0].record_past
    cache.reset()
    ids, given = inputs["input_ids"], {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, **argument(cache)}
    model.generate(ids, prompt_lookup_num_tokens=3, **given)
    cache.reset()
    assert not any(getattr(layer, "record_past", False) for layer in cache.layers)
    cache.layers[0].activate_past_recording()  # after a reset too
    model.generate(ids, **given)
    assert cache.layers[0].record_past
