"""Masks, and calls, that the cache cannot follow are refused with one clear error; nothing is silently wrong."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hf_models import DEVICE, prompt, tiny
from transformers import DynamicCache

from kvruntime import make_cache
from kvruntime.hf import padding
from kvruntime.hf.cache import argument
from kvruntime.hf.padding import Columns

# On a GPU one decoded token is checked without waiting: a wrong mask stops the device, which no test could survive.
lengths = pytest.mark.parametrize("length", [1, 3] if DEVICE.type == "cpu" else [3])


def causal(rows: torch.Tensor, start: int) -> torch.Tensor:
    """The mask that stock transformers makes: ``rows [batch_size, num_columns]`` says which columns are tokens."""
    column = torch.arange(rows.shape[1], device=rows.device)
    return (rows[:, None] & (column <= column[start:, None]))[:, None]


@pytest.fixture
def warm():
    """A cache of 10 columns, of which row 1 has 4 of padding."""
    model, inputs = tiny("Llama"), prompt(2, 10, (0, 4))
    cache = make_cache(model, "fp32")
    with torch.no_grad():
        model(**inputs, **argument(cache))
    return model, cache, inputs["attention_mask"]


@lengths
@pytest.mark.parametrize(
    ("hidden", "shown"),
    [([(0, 2)], []), ([], [(1, 1)]), ([(1, 7)], [(1, 1)])],
    ids=["a-stored-token-hidden", "dropped-padding-shown", "both-at-once"],
)
def test_a_mask_unlike_what_was_cached(warm, length, hidden, shown):
    model, cache, mask = warm
    mask = torch.cat([mask, torch.ones(2, length, dtype=torch.int64, device=DEVICE)], 1)
    for spots, value in ((hidden, 0), (shown, 1)):
        for row, column in spots:
            mask[row, column] = value
    with pytest.raises(ValueError, match="hides tokens that the cache holds or shows padding"), torch.no_grad():
        model(prompt(2, length)["input_ids"], attention_mask=mask, **argument(cache))
    assert cache.get_seq_length() == 10


@lengths
def test_padding_without_a_mask(warm, length):
    model, cache, _ = warm
    with pytest.raises(ValueError, match=r"hides tokens|no attention mask was given"), torch.no_grad():
        model(prompt(2, length)["input_ids"], **argument(cache))


def test_masks_of_ones_own():
    """4-D masks, bool or additive, are followed where causal and refused where not; tokens may see later ones in
    a first prompt, not on a used cache."""
    model, ids = tiny("Qwen2"), prompt(2, 12)["input_ids"]
    rows = torch.ones(2, 12, dtype=torch.bool, device=DEVICE)
    rows[1, :3] = False
    good = causal(rows, 0)
    position = (rows.long().cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        want = model(ids, attention_mask=rows.long(), position_ids=position, **argument(make_cache(model, "fp32")))
        additive = torch.where(good, 0.0, torch.finfo(torch.float32).min)
        for mask in (good, additive):
            got = model(ids, attention_mask=mask, position_ids=position, **argument(make_cache(model, "fp32")))
            torch.testing.assert_close(got.logits[rows], want.logits[rows], atol=1e-5, rtol=1e-5)
        window, ahead, bias = good.clone(), good.clone(), additive.clone()
        window[0, 0, 9, 2], ahead[0, 0, 5, 8], bias[0, 0, 9, 2] = False, True, -1.5
        hidden = good.clone()
        hidden[1, 0, 8, 1] = True  # padding
        for mask in (window, bias, hidden):
            with pytest.raises(ValueError, match="not causal over the tokens"):
                model(ids, attention_mask=mask, **argument(make_cache(model, "fp32")))
        cache, stock = make_cache(model, "fp32"), DynamicCache()
        got, want = (model(ids, attention_mask=ahead, **argument(held)).logits for held in (cache, stock))
        assert torch.equal(got[rows], want[rows])
        assert cache.stores[0].row_lengths == [12, 9]
        ahead = torch.ones(2, 1, 3, 15, dtype=torch.bool, device=DEVICE)
        ahead[1, 0, :, :3] = False
        with pytest.raises(ValueError, match="not causal over the tokens"):
            model(ids[:, :3], attention_mask=ahead, **argument(cache))
        with pytest.raises(ValueError, match=r"shape \[2, 4, 12, 12\]: allowed is \[batch_size, 1, 12, 12\]"):
            model(ids, attention_mask=good.expand(2, 4, 12, 12), **argument(make_cache(model, "fp32")))


def test_right_padding_is_not_stored_either():
    """Padding after a prompt: the tokens that follow see what they would see without it."""
    model, ids = tiny("Llama"), prompt(2, 20)["input_ids"]
    mask = torch.ones(2, 14, dtype=torch.int64, device=DEVICE)
    mask[1, 6:10] = 0
    position = (mask.cumsum(1) - 1).clamp(min=0)
    cache, alone = make_cache(model, "kivi"), make_cache(model, "kivi")
    with torch.no_grad():
        model(ids[:, :10], attention_mask=mask[:, :10], position_ids=position[:, :10], **argument(cache))
        got = model(ids[:, 10:14], attention_mask=mask, position_ids=position[:, 10:], **argument(cache)).logits
        model(ids[1:, :6], **argument(alone))
        want = model(ids[1:, 10:14], **argument(alone)).logits
    assert cache.stores[0].row_lengths == [14, 10]
    torch.testing.assert_close(got[1:], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("block", [1, 3, 64])
def test_a_long_mask_is_checked_in_blocks(monkeypatch, block):
    monkeypatch.setattr(padding, "QUERY_BLOCK", block)
    rows = torch.ones(3, 20, dtype=torch.bool)
    rows[1, :8], rows[2, 2:5] = False, False
    for start in (0, 5):
        seen = _after(rows, start)
        counts = rows[:, start:].sum(1).tolist()
        assert seen.read(causal(rows, start), start, 20 - start, 3) == counts
        assert seen.row_lengths(20) == [20, 12, 17]
        assert torch.equal(seen.tokens(20, torch.device("cpu")), rows)
        for query in range(20 - start):
            wrong = causal(rows, start)
            wrong[0, 0, query, 0] = False
            with pytest.raises(ValueError, match=r"not causal|hides tokens"):
                _after(rows, start).read(wrong, start, 20 - start, 3)


def _after(rows: torch.Tensor, start: int) -> Columns:
    seen = Columns()
    if start:
        seen.read(causal(rows[:, :start], 0), 0, start, 3)
    return seen


def test_every_layer_reads_the_mask_once_and_nobody_keeps_it():
    seen, rows = Columns(), torch.ones(2, 9, dtype=torch.bool)
    rows[0, :4] = False
    mask = causal(rows, 0)
    first = seen.read(mask, 0, 9, 2)
    assert first == [5, 9]
    assert seen.read(mask, 0, 9, 2) is first
    gone = weakref.ref(mask)
    del mask
    gc.collect()
    assert gone() is None
    assert seen.read(causal(torch.ones(2, 9, dtype=torch.bool), 0), 0, 9, 2) is None
    assert seen.padding == [[], []]  # read again: what the same columns were before is gone


def test_calls_that_are_refused(warm):
    model, cache, mask = warm
    more = {
        "input_ids": prompt(2, 2)["input_ids"],
        "attention_mask": torch.cat([mask, torch.ones_like(mask[:, :2])], 1),
    }
    with pytest.raises(ValueError, match=r"run the model under torch\.no_grad"):
        model(**more, **argument(cache))
    with torch.no_grad():
        with pytest.raises(ValueError, match="a batch of 1 rows for a cache that holds 2"):
            model(more["input_ids"][:1], **argument(cache))
        with pytest.raises(ValueError, match="max_seq_len 16"):
            model(prompt(1, 17)["input_ids"], **argument(make_cache(model, "kivi", max_seq_len=16)))
    with pytest.raises(ValueError, match="offloading is not supported"):
        cache.layers[0].offload()
    with torch.no_grad():
        assert model(**more, **argument(cache)).logits.isfinite().all()


def test_dropout_is_refused():
    model = tiny("GPT-2")
    cache = make_cache(model)
    model.train()
    try:
        with torch.no_grad(), pytest.raises(ValueError, match=r"attention dropout 0.1: .* call model.eval\(\)"):
            model(prompt(1, 4)["input_ids"], **argument(cache))
    finally:
        model.eval()


def test_the_check_that_does_not_wait(monkeypatch):
    """The path that a GPU takes for each decoded token, taken here by a mask that says it lies on one."""
    rows = torch.ones(2, 7, dtype=torch.bool)
    rows[0, :2] = False

    class OnGpu(torch.Tensor):
        is_cuda = True

    waits = []
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: waits.append(tensor))
    for last, fails in ((rows, False), (torch.ones_like(rows), True), (rows & (torch.arange(7) < 6), True)):
        seen = Columns()
        seen.padding = [[range(2)], []]
        mask = causal(last, 6).as_subclass(OnGpu)
        if fails:
            with pytest.raises(RuntimeError, match="hides tokens that the cache holds"):
                seen.read(mask, 6, 1, 2)
        else:
            assert seen.read(mask, 6, 1, 2) is None
    assert not waits


def test_a_pipeline_stage_without_the_first_layer():
    """transformers asks layer 0 for the length; a stage that never updates it answers with a layer of its own."""
    cache = make_cache(tiny("Llama"), "fp32")
    cache.layers[1].update(*[torch.ones(2, 2, 7, 32, device=DEVICE)] * 2)
    assert cache.get_seq_length() == cache.get_seq_length(0) == 7
    assert cache.get_mask_sizes(3, 0) == (10, 0)
    cache.columns.read(None, 0, 7, 2)
    cache.crop(-2)
    assert cache.stores[0].row_lengths == [5, 5]
