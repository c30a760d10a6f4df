"""Everything generate() does with a cache: padding, chunks, beams, samples, candidates, and a cache used again."""

from __future__ import annotations

import copy

import pytest
import torch
from hf_models import DEVICE, prompt, tiny
from hf_oracle import step
from transformers import DynamicCache, GPT2LMHeadModel

from kvruntime import make_cache
from kvruntime.hf.cache import argument
from kvruntime.methods.kivi.cache import KiviLayer
from kvsim.layout import LayerShape
from kvsim.methods import Kivi

FULL = ("fp32", {})
KIVI = ("kivi", {"nbits": 4, "residual_length": 32})
SEED = ("kivi-seed", {})
EXACT = ("kivi", {"nbits": 2, "residual_length": 256})  # nothing is packed before 256 tokens: must equal stock
SINK = ("kivi", {"nbits": 2, "key_nbits": 4, "residual_length": 64, "sink_length": 5})
BOOST = ("kivi-boost", {"residual_length": 64})
GREEDY = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}

both = pytest.mark.parametrize("family", ["GPT-2", "Llama"])
exact = pytest.mark.parametrize("method", [FULL, EXACT], ids=["fp32", "kivi-unpacked"])
all_methods = pytest.mark.parametrize(
    "method", [FULL, KIVI, SEED, SINK, BOOST], ids=["fp32", "kivi", "kivi-seed", "kivi-sink", "kivi-boost"]
)


def new_cache(model, method, **options):
    return make_cache(model, method[0], **method[1], **options)


def assert_same(ours, stock, atol=1e-5):
    assert torch.equal(ours.sequences, stock.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(stock.logits), atol=atol, rtol=1e-5)


@torch.no_grad()
def forced(model, cache, ids, mask=None, start=0):
    """Logits of ``ids[:, start:]`` fed one token at a time."""
    out = []
    for column in range(start, ids.shape[1]):
        seen = {} if mask is None else {"attention_mask": mask[:, : column + 1]}
        if mask is not None:
            seen["position_ids"] = (mask[:, : column + 1].sum(1, keepdim=True) - 1).clamp(min=0)
        out.append(model(ids[:, column : column + 1], **argument(cache), **seen).logits)
    return torch.cat(out, 1)


def close(ours: torch.Tensor, want: torch.Tensor) -> None:
    """Equal logits ``[tokens, vocabulary]``.

    A device multiplies batches of other sizes in another order; there a code on a rounding tie may flip, and what
    follows reads it: so near in norm is what can be asked.
    """
    if not ours.is_cuda:
        torch.testing.assert_close(ours, want, atol=1e-4, rtol=1e-4)
        return
    assert (ours - want).norm() <= 2e-2 * want.norm()


@both
@all_methods
def test_a_padded_row_equals_the_row_alone(family, method):
    """Rows are compacted, so a left-padded row is stored, packed and read exactly as if it were by itself."""
    model, padding = tiny(family), (0, 3, 40, 89)
    ids, mask = prompt(4, 150, padding).values()
    cache = new_cache(model, method)
    with torch.no_grad():
        position = (mask[:, :90].cumsum(1) - 1).clamp(min=0)
        first = model(ids[:, :90], attention_mask=mask[:, :90], position_ids=position, **argument(cache)).logits
    ours = torch.cat([first, forced(model, cache, ids, mask, start=90)], 1)
    for row, count in enumerate(padding):
        alone = new_cache(model, method)
        with torch.no_grad():
            want = model(ids[row : row + 1, count:90], **argument(alone)).logits
        want = torch.cat([want, forced(model, alone, ids[row : row + 1, count:], start=90 - count)], 1)
        close(ours[row, count:], want[0])
        assert alone.stores[0].row_lengths == [cache.stores[0].row_lengths[row]] == [150 - count]


@both
@exact
@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_chunked_prefill_of_ragged_rows(family, method, chunk):
    model, inputs = tiny(family), prompt(3, 41, (0, 12, 33))
    stock = model.generate(**inputs, **GREEDY, max_new_tokens=8)
    ours = model.generate(
        **inputs, **GREEDY, max_new_tokens=8, prefill_chunk_size=chunk, **argument(new_cache(model, method))
    )
    assert_same(ours, stock)


@both
@all_methods
def test_chunks_attend_to_what_is_stored(family, method):
    """Chunks of many sizes, one token among them, against stock attention over the cache's own contents."""
    model, ids = tiny(family), prompt(2, 420, seed=3)["input_ids"]
    cache, start = new_cache(model, method), 0
    for length in (3, 1, 40, 1, 64, 2, 1, 150, 33, 1, 1, 100):
        got, want = step(model, cache, ids[:, start : start + length])
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
        start += length


@both
@exact
@pytest.mark.parametrize(
    "arguments",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
        {"num_beams": 2, "do_sample": True},
        {"do_sample": True, "num_return_sequences": 3, "top_k": 20},
        {"prompt_lookup_num_tokens": 4},
        {"repetition_penalty": 1.3},
    ],
    ids=["beams", "beams-returned", "beam-sample", "sample", "prompt-lookup", "repetition-penalty"],
)
def test_generation_modes_equal_stock(family, method, arguments):
    model = tiny(family)
    rows = 1 if "prompt_lookup_num_tokens" in arguments else 2
    inputs = prompt(rows, 20, () if rows == 1 else (0, 6))
    inputs["input_ids"][:, 10:] = inputs["input_ids"][:, :10]  # something for the look-up to find
    torch.manual_seed(0)
    stock = model.generate(**inputs, max_new_tokens=16, **arguments)
    torch.manual_seed(0)
    ours = model.generate(**inputs, max_new_tokens=16, **arguments, **argument(new_cache(model, method)))
    assert torch.equal(ours, stock)


@both
@exact
def test_an_assistant_models_candidates(family, method):
    model, inputs = tiny(family), prompt(1, 20)
    stock = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    assistant = copy.deepcopy(model)  # every candidate is right, so several tokens are stored at a time
    assistant.set_attn_implementation("sdpa")
    cache = new_cache(model, method)
    ours = model.generate(**inputs, max_new_tokens=20, do_sample=False, assistant_model=assistant, **argument(cache))
    assert torch.equal(ours, stock)


@both
def test_candidates_are_taken_back_from_a_packed_cache(family):
    """Wrong candidates leave the exact tokens; a cache whose newest tokens may all be packed says so beforehand."""
    model, inputs = tiny(family), prompt(1, 150)
    assistant = copy.deepcopy(model)
    assistant.set_attn_implementation("sdpa")
    with torch.no_grad():
        for weight in assistant.parameters():
            weight.add_(weight.std() * torch.randn(weight.shape, device=DEVICE) / 4)
    cache = make_cache(model, "kivi", nbits=4, residual_length=128)
    calls = 0

    def crop(tokens_to_remove, crop=cache.crop):
        nonlocal calls
        calls += int(tokens_to_remove) < 0
        crop(tokens_to_remove)

    cache.crop = crop
    out = model.generate(**inputs, max_new_tokens=40, do_sample=False, assistant_model=assistant, **argument(cache))
    assert out.shape == (1, 190)
    assert calls > 10
    assert min(cache.stores[0].row_packed) > 0
    assert cache.get_seq_length() == cache.stores[0].row_lengths[0] == 189
    record = KiviLayer(Kivi(), LayerShape(1, 64, 64), 1).record.num_tokens
    for residual, croppable in ((record, False), (2 * record, True)):
        assert KiviLayer(Kivi(residual_length=residual), LayerShape(1, 64, 64), 1).is_croppable == croppable


@both
def test_beams_of_packed_tokens_score_as_the_sequence_by_itself(family):
    model, inputs = tiny(family), prompt(2, 70, (0, 9))
    cache = new_cache(model, KIVI)
    out = model.generate(
        **inputs,
        max_new_tokens=70,
        num_beams=3,
        **argument(cache),
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert min(cache.stores[0].row_packed) > 0
    for row, count in enumerate((0, 9)):
        alone, ids = new_cache(model, KIVI), out.sequences[row : row + 1, count:]
        with torch.no_grad():
            first = model(ids[:, : 70 - count], **argument(alone)).logits[:, -1:]
        logits = torch.cat([first, forced(model, alone, ids, start=70 - count)[:, :-1]], 1).log_softmax(-1)
        score = logits.gather(2, ids[:, 70 - count :, None]).mean()
        torch.testing.assert_close(out.sequences_scores[row], score, atol=1e-3, rtol=1e-3)


@both
@all_methods
def test_crop_within_the_residual_leaves_no_trace(family, method):
    model, ids = tiny(family), prompt(2, 140, seed=5)["input_ids"]
    wrong = prompt(2, 6, seed=6)["input_ids"]
    cache, plain = new_cache(model, method), new_cache(model, method)
    with torch.no_grad():
        for held in (cache, plain):
            model(ids[:, :100], **argument(held))
        model(wrong, **argument(cache))
        cache.crop(-6)
        cache.crop(0)
        assert cache.get_seq_length() == 100
        got, want = (model(ids[:, 100:], **argument(held)).logits for held in (cache, plain))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_crop_beyond_the_residual_is_refused_and_changes_nothing():
    model, ids = tiny("Llama"), prompt(1, 100)["input_ids"]
    cache = new_cache(model, KIVI)
    with torch.no_grad():
        model(ids, **argument(cache))
    with pytest.raises(ValueError, match="packed"):
        cache.crop(-60)
    assert cache.get_seq_length() == 100
    got, want = step(model, cache, ids[:, :1])
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"crop\(50\): allowed is 0 or below"):
        cache.crop(50)


def test_crop_of_padding_takes_tokens_only():
    model = tiny("Llama")
    ids, mask = prompt(2, 20, (0, 8)).values()
    cache = new_cache(model, FULL)
    with torch.no_grad():
        model(ids, attention_mask=mask, **argument(cache))
    cache.crop(-10)
    assert (cache.stores[0].row_lengths, cache.columns.row_lengths(10)) == ([10, 2], [10, 2])
    with pytest.raises(ValueError, match="cannot crop to 5 tokens: the rest is padding in some rows"):
        cache.crop(-5)


@both
@all_methods
def test_reset_and_use_again_with_another_batch(family, method):
    model, cache = tiny(family), new_cache(tiny(family), method)
    model.generate(**prompt(2, 50, (0, 9)), max_new_tokens=60, do_sample=False, **argument(cache))
    for inputs in (prompt(2, 45, (4, 0), seed=1), prompt(3, 45, (4, 0, 1), seed=2)):
        cache.reset()
        assert cache.get_seq_length() == 0
        again = model.generate(**inputs, **GREEDY, max_new_tokens=30, **argument(cache))
        fresh = model.generate(**inputs, **GREEDY, max_new_tokens=30, **argument(new_cache(model, method)))
        assert_same(again, fresh)


@both
@exact
def test_a_second_turn_continues_the_cache(family, method):
    """The first turn is left-padded, and so is what the user adds in the second: padding in the middle of a row."""
    model, cache, stock = tiny(family), new_cache(tiny(family), method), DynamicCache()
    first, more = prompt(2, 20, (0, 7)), prompt(2, 9, (5, 0), seed=4)
    for past in (cache, stock):
        out = model.generate(**first, max_new_tokens=6, do_sample=False, **argument(past))
        ids = torch.cat([out, more["input_ids"]], 1)
        mask = torch.cat(
            [first["attention_mask"], torch.ones(2, 6, dtype=torch.int64, device=DEVICE), more["attention_mask"]], 1
        )
        second = model.generate(ids, attention_mask=mask, **GREEDY, max_new_tokens=6, **argument(past))
        if past is cache:
            ours = second
    assert_same(ours, second)
    assert cache.get_seq_length() == 40
    assert cache.stores[0].row_lengths == [35, 33]


@both
@all_methods
def test_a_shared_prefix_is_copied_and_spread_over_rows(family, method):
    """deepcopy, batch_repeat_interleave, batch_select_indices: each row goes on as a cache of its own would."""
    model, prefix = tiny(family), prompt(2, 70, (0, 9))
    cache = new_cache(model, method)
    with torch.no_grad():
        model(**prefix, **argument(cache))
    spread = copy.deepcopy(cache)
    spread.batch_repeat_interleave(2)
    assert spread.batch_size == 4
    spread.batch_select_indices(torch.tensor([True, False, True, True], device=DEVICE))
    tails = prompt(3, 5, seed=9)
    ids, mask = (torch.cat([prefix[name][[0, 1, 1]], tails[name]], 1) for name in prefix)
    got = forced(model, spread, ids, mask, start=70)
    for row, source in enumerate((0, 1, 1)):
        alone = copy.deepcopy(cache)
        alone.batch_select_indices(torch.tensor([source]))
        want = forced(model, alone, ids[row : row + 1], mask[row : row + 1], start=70)
        torch.testing.assert_close(got[row], want[0], atol=1e-5, rtol=1e-5)
    assert cache.batch_size == 2
    assert cache.get_seq_length() == 70


@pytest.mark.parametrize(("dtype", "name"), [(torch.float16, "fp16"), (torch.bfloat16, "bf16")])
@both
def test_half_precision_is_stock(family, dtype, name):
    model, inputs = tiny(family, dtype), prompt(2, 30, (0, 4))
    stock = model.generate(**inputs, **GREEDY, max_new_tokens=12)
    ours = model.generate(**inputs, **GREEDY, max_new_tokens=12, **argument(make_cache(model, name)))
    assert_same(ours, stock, atol=2e-2 if name == "bf16" else 2e-3)


@both
def test_a_cache_of_another_type_rounds_what_it_stores(family):
    model, ids = tiny(family), prompt(2, 90)["input_ids"]
    cache = make_cache(model, "fp16", max_seq_len=96)
    for start, stop in ((0, 60), (60, 61), (61, 90)):
        got, want = step(model, cache, ids[:, start:stop])
        atol = 2e-3 if stop - start == 1 else 1e-5  # one token attends to itself as stored, several as they are
        torch.testing.assert_close(got, want, atol=atol, rtol=1e-5)
    assert cache.stores[0].tensors["key"].dtype == torch.float16


def test_the_model_still_takes_stock_caches_exactly():
    model, inputs = tiny("Qwen2"), prompt(2, 20, (0, 5))
    fresh = copy.deepcopy(model)
    fresh.set_attn_implementation("sdpa")
    make_cache(model, "kivi")
    for past in ({}, argument(DynamicCache()), {"use_cache": False}):
        want = fresh.generate(**inputs, **GREEDY, max_new_tokens=6, **copy.deepcopy(past))
        assert_same(model.generate(**inputs, **GREEDY, max_new_tokens=6, **past), want, atol=0)


@all_methods
def test_inference_mode_in_between(method):
    model, ids = tiny("Llama"), prompt(1, 300)["input_ids"]
    cache = new_cache(model, method)
    with torch.inference_mode():
        model(ids[:, :40], **argument(cache))
    with torch.no_grad():
        model(ids[:, 40:41], **argument(cache))
    with torch.inference_mode():
        model(ids[:, 41:], **argument(cache))
    cache.reset()
    assert cache.get_seq_length() == 0


def test_generation_stops_rows_that_are_done():
    """generate() feeds padding to a finished row with its mask left at 1: to the cache that is a token like any."""
    model, inputs = tiny("GPT-2"), prompt(2, 12)
    plain = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    stop = {"eos_token_id": int(plain[0, 14]), "max_new_tokens": 12, "do_sample": False}
    stock = model.generate(**inputs, **stop)
    assert torch.equal(model.generate(**inputs, **stop, **argument(make_cache(model, "fp32"))), stock)
    assert isinstance(model, GPT2LMHeadModel)
