"""The text part of vision-language models, an image in the prompt: the uncompressed cache is stock."""

from __future__ import annotations

import pytest
import torch
from hf_vision import VISIONS, image_prompt, vision
from transformers import DynamicCache

from kvruntime import compress, make_cache
from kvruntime.bench.harness.weigh import weigh
from kvruntime.hf.cache import TAKES_CACHE, argument
from kvsim.engines import Kvruntime
from kvsim.models.model import Model

GENERATE = {"max_new_tokens": 10, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
names = pytest.mark.parametrize("name", VISIONS)


@pytest.fixture(autouse=True)
def stock_runs(request):
    """Llama4ForConditionalGeneration of transformers 5.24 asks its text model's output for image_outputs, and fails."""
    if request.getfixturevalue("name") == "Llama 4" and TAKES_CACHE:
        pytest.skip("transformers' own Llama4ForConditionalGeneration fails without any cache of ours")


@names
def test_greedy_generation_is_stock(name):
    model, inputs = vision(name), image_prompt(name)
    stock = model.generate(**inputs, **GENERATE)
    cache = make_cache(model, "fp32")
    ours = model.generate(**inputs, **GENERATE, **argument(cache))
    assert torch.equal(ours.sequences, stock.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(stock.logits), atol=1e-5, rtol=1e-4)
    assert cache.get_seq_length() == 21
    assert {tuple(store.row_lengths) for store in cache.stores} == {(21, 21)}


@names
def test_kivi_packs_the_image_too(name):
    """Bytes as predicted of the text config; after the prompt the stores are what a packed stock cache's are."""
    model, inputs = vision(name), image_prompt(name)
    options = {"nbits": 4, "group_size": 16, "residual_length": 16, "value_group_size": 16}
    past, cache = DynamicCache(config=model.config), make_cache(model, "kivi", **options)
    with torch.no_grad():
        for held in (past, cache):
            model(**inputs, **argument(held))
            model(inputs["input_ids"][:, :9] % 97, **argument(held))
    direct = compress(past, "kivi", **options)
    for mine, other in zip(cache.stores, direct.stores, strict=True):
        assert mine.row_packed == other.row_packed == [16, 16]
    predicted = Kvruntime().parts(Model.from_config(model.config.to_dict()), cache.method, 2, cache.num_provided)
    assert weigh(cache) - cache.step_nbytes == cache.nbytes == sum(predicted.values())
