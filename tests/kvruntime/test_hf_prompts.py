"""A used cache under ``generate()``: a conversation goes on, another prompt is refused, nothing is dropped."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from hf_mixed import mixed
from hf_models import DEVICE, GQA, prompt, tiny

import kvruntime
from kvruntime import make_cache
from kvruntime.hf.cache import Cache, argument

GREEDY = {"max_new_tokens": 8, "do_sample": False}
ANOTHER = r"reset\(\) it for another prompt, or give all of the conversation$"


@pytest.fixture(params=["Llama", "Gemma 3", "Qwen3-Next"])
def model(request):
    return copy.deepcopy(tiny("Llama") if request.param == "Llama" else mixed(request.param))


def test_a_conversation_goes_on(model):
    """Ragged rows, whose second turn has padding in the middle, and then a third."""
    inputs = prompt(2, 20, (0, 6))
    cache, ids, mask = make_cache(model, "fp32"), *inputs.values()
    for turn in range(3):
        got = model.generate(ids, attention_mask=mask, **GREEDY, **argument(cache))
        assert torch.equal(got, model.generate(ids, attention_mask=mask, **GREEDY))
        ids = torch.cat([got, prompt(2, 5, seed=turn)["input_ids"]], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :13])], 1)


@pytest.mark.parametrize("length", [12, 40])
def test_another_prompt_is_refused_in_one_line(model, length):
    """Shorter, which stock caches answer with a shape, and longer, which they answer wrongly."""
    cache = make_cache(model, "fp32")
    model.generate(**prompt(1, 20), **GREEDY, **argument(cache))
    other = prompt(1, length, seed=5)
    with pytest.raises(ValueError, match=ANOTHER) as error:
        model.generate(**other, **GREEDY, **argument(cache))
    assert "\n" not in str(error.value)
    cache.reset()
    assert torch.equal(model.generate(**other, **GREEDY, **argument(cache)), model.generate(**other, **GREEDY))


@pytest.mark.parametrize("family", ["Llama", "Gemma 3"])
def test_drafts_on_a_used_cache(family):
    """Stock assisted decoding gives a used cache the whole prompt again."""
    model = tiny(family) if family == "Llama" else mixed(family)
    cache, ids = make_cache(model, "fp32"), prompt(1, 20)["input_ids"]
    for options in ({}, {"prompt_lookup_num_tokens": 3}, {"prompt_lookup_num_tokens": 2}):
        mask = torch.ones_like(ids)
        got = model.generate(ids, attention_mask=mask, **GREEDY, **options, **argument(cache))
        assert torch.equal(got, model.generate(ids, attention_mask=mask, **GREEDY))
        assert cache.get_seq_length() == got.shape[1] - 1
        ids = torch.cat([got, prompt(1, 5)["input_ids"]], 1)
    cache.reset()
    model.generate(**prompt(1, 20), **GREEDY, **argument(cache))
    with pytest.raises(ValueError, match=ANOTHER):
        model.generate(**prompt(1, 60, seed=5), **GREEDY, prompt_lookup_num_tokens=3, **argument(cache))


def test_what_was_taken_back_or_came_elsewhere_is_not_remembered():
    """After a crop, rows of another order, or tokens from outside the cache says nothing of their ids."""
    model = copy.deepcopy(tiny("Llama"))
    first, other = prompt(1, 20), prompt(1, 30, seed=5)
    for change in ("crop", "reorder", "forward"):
        cache = make_cache(model, "fp32")
        if change == "forward":
            with torch.no_grad():
                model(other["input_ids"][:, :25], **argument(cache))
        else:
            out = model.generate(**first, **GREEDY, **argument(cache))
            assert out.shape == (1, 28)
            if change == "crop":
                cache.crop(-27)
                with torch.no_grad():
                    model(other["input_ids"][:, :25], **argument(cache))
            else:
                cache.reorder_cache(torch.tensor([0]))
                continue
        got = model.generate(**other, **GREEDY, **argument(cache))
        assert torch.equal(got, model.generate(**other, **GREEDY))


def test_new_tokens_alone_with_the_whole_mask():
    """As ``generate()`` takes them on a used cache."""
    model = copy.deepcopy(tiny("Llama"))
    ids = prompt(1, 30)["input_ids"]
    cache = make_cache(model, "fp32")
    with torch.no_grad():
        model(ids[:, :20], **argument(cache))
    got = model.generate(ids[:, 20:], attention_mask=torch.ones_like(ids), **GREEDY, **argument(cache))
    assert torch.equal(got[:, 10:], model.generate(ids, **GREEDY)[:, 30:])


def test_what_watches_goes_with_restore_and_copies():
    model = copy.deepcopy(tiny("Llama"))
    kvruntime.restore(model)
    names = set(vars(model))
    make_cache(model)
    assert {"_prefill", "prepare_inputs_for_generation"} <= set(vars(model)) - names
    other = copy.deepcopy(model)
    assert other._prefill.original.__self__ is other
    pickle.loads(pickle.dumps(model._prefill.seen))
    kvruntime.restore(model)
    assert set(vars(model)) == names


def longrope() -> torch.nn.Module:
    """A Phi-3 whose rotary factors switch at 32 tokens."""
    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [4.0] * 16, "rope_theta": 1e4}
    config = transformers.Phi3Config(
        **{**GQA, "max_position_embeddings": 128},
        original_max_position_embeddings=32,
        rope_parameters={**rope, "original_max_position_embeddings": 32},
    )
    model = transformers.Phi3ForCausalLM(config).eval().to(DEVICE)
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(4)
    return model


@pytest.mark.filterwarnings("ignore:kvruntime. every decode step")  # before 5.24
def test_rotary_scaling_that_switches_computes_into_the_same_cache():
    """transformers drops the cache there and goes on with one of its own."""
    model, inputs = longrope(), prompt(2, 20, (0, 6))
    want = model.generate(**inputs, max_new_tokens=30, do_sample=False, use_cache=False)
    cache = make_cache(model, "fp32")
    out = model.generate(**inputs, max_new_tokens=30, do_sample=False, return_dict_in_generate=True, **argument(cache))
    assert torch.equal(out.sequences, want)
    assert cache.get_seq_length() == 49
    held = out.cache if "cache" in out else out.past_key_values
    assert held is cache
    assert isinstance(held, Cache)
    packed = make_cache(model, "kivi", residual_length=32)
    model.generate(**inputs, max_new_tokens=30, do_sample=False, **argument(packed))
    assert packed.get_seq_length() == 49
    assert packed.stores[0].row_packed == [32, 32]


def test_one_cache_over_a_list_of_prompts_is_refused():
    """As a pipeline runs its list: one prompt after the other on the cache of the first."""
    model = copy.deepcopy(tiny("Llama"))
    cache = make_cache(model, "fp32")
    prompts = [prompt(1, 9, seed=seed) for seed in range(2)]
    model.generate(**prompts[0], **GREEDY, **argument(cache))
    with pytest.raises(ValueError, match=ANOTHER):
        model.generate(**prompts[1], **GREEDY, **argument(cache))
