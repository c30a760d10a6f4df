"""Every family of full attention alone: the uncompressed cache is stock, kivi is what it stores, read back."""

from __future__ import annotations

import pytest
import torch
from hf_latents import LATENTS
from hf_mixed import MIXED
from hf_models import MODELS, MORE, prompt, tiny
from hf_oracle import step
from hf_tables import counts, table
from hf_vision import VISIONS

from kvruntime import make_cache
from kvruntime.hf.cache import argument

GENERATE = {"max_new_tokens": 10, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}


@pytest.mark.filterwarnings("ignore:kvruntime. every decode step of this model waits for the host:RuntimeWarning")
@pytest.mark.parametrize("family", MODELS)
def test_greedy_generation_is_stock(family):
    """A left-padded ragged batch: the same tokens, logits within 1e-5.  On CUDA Phi-3.5-MoE waits for the host."""
    model, inputs = tiny(family), prompt(3, 24, (0, 5, 13))
    stock = model.generate(**inputs, **GENERATE)
    cache = make_cache(model, "fp32")
    ours = model.generate(**inputs, **GENERATE, **argument(cache))
    assert torch.equal(ours.sequences, stock.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(stock.logits), atol=1e-5, rtol=1e-5)
    assert cache.stores[0].row_lengths == [33, 28, 20]


@pytest.mark.filterwarnings("ignore:kvruntime. every decode step of this model waits for the host:RuntimeWarning")
@pytest.mark.parametrize("family", MODELS)
def test_kivi_is_what_it_stores_read_back(family):
    """Prefill, decoding over several flushes and a warm chunk, each against stock attention over the stored tokens.

    On CUDA experts in float32, and OPT without ``generate()``'s positions, wait for the host, and say so once."""
    model = tiny(family)
    cache = make_cache(model, "kivi", nbits=4, group_size=32, residual_length=64)
    ids = prompt(2, 250)["input_ids"]
    starts = [0, 100, *range(150, 202)]
    for start, stop in zip(starts, [*starts[1:], 250], strict=True):
        got, want = step(model, cache, ids[:, start:stop])
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
    assert cache.stores[0].row_packed == [192, 192]


@pytest.mark.parametrize("family", MORE)
def test_a_short_generation_is_stock(family):
    """Of a ragged batch, longer than a window where there is one: the same tokens, logits within 1e-5."""
    model, inputs, few = tiny(family), prompt(2, 20, (0, 3)), {**GENERATE, "max_new_tokens": 3}
    stock, cache = model.generate(**inputs, **few), make_cache(model, "fp32")
    ours = model.generate(**inputs, **few, **argument(cache))
    assert torch.equal(ours.sequences, stock.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(stock.logits), atol=1e-5, rtol=1e-5)
    assert cache.stores[0].row_lengths == [22, 19]


def test_the_tables_have_every_family():
    families = len(MODELS) + len(MIXED) + len(LATENTS)
    assert table().count("\n") == families + len(MORE) + len(VISIONS) + 1
    assert counts().startswith(f"{families} families: {len(MODELS)} of full attention alone")
