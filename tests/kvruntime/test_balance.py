"""Keys rescaled by powers of two: the same logits to the bit, other boosted channels, less error of the cache."""

from copy import deepcopy

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from hf_models import tiny  # noqa: E402
from runtime_tiny import tiny_model  # noqa: E402

from kvruntime.eval.windows import score_windows  # noqa: E402
from kvruntime.hf import make_cache  # noqa: E402
from kvruntime.hf.balance import balance_keys  # noqa: E402
from kvsim.methods import kivi_boost  # noqa: E402


def lopsided():
    """Half of the wide key channels meet queries that hold next to nothing there, as in real models."""
    model = tiny_model()
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            query = attention.q_proj.weight.view(2, 2, 32, 64)  # key heads, their query heads, channels
            key = attention.k_proj.weight.view(2, 32, 64)
            for start in (0, 16):  # a pair of channels turns together
                query[:, :, start : start + 4] /= 64
                key[:, start : start + 4] *= 8
    return model


@pytest.fixture(scope="module")
def ids():
    return torch.randint(128, (4, 200), generator=torch.Generator().manual_seed(5))


def divergence(model, ids):
    from transformers import DynamicCache

    method = kivi_boost(residual_length=64, dtype="float32")
    scores = score_windows(
        model,
        ids,
        lambda n: make_cache(model, method, max_seq_len=n),
        make_reference=lambda n: DynamicCache(config=model.config),
        chunk=40,
        batch=4,
    )
    return scores.figures()["kl"]


def test_the_model_computes_the_same_and_the_cache_errs_less(ids):
    model = lopsided()
    with torch.inference_mode():
        before = model(ids).logits
    lost = divergence(model, ids)
    assert balance_keys(model, ids[:1]) == 2
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, before)
    assert divergence(model, ids) < 0.8 * lost
    weights = model.model.layers[0].self_attn.k_proj.weight.clone()
    balance_keys(model, ids[:1])
    assert torch.equal(weights, model.model.layers[0].self_attn.k_proj.weight)  # it is balanced already


def test_biases_are_scaled_too(ids):
    model = deepcopy(tiny("Qwen2"))
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias.data.normal_()
        layer.self_attn.q_proj.bias.data.normal_()
        layer.self_attn.q_proj.weight.data[::3] *= 9
    size = model.config.vocab_size
    with torch.inference_mode():
        before = model(ids % size).logits
    balance_keys(model, ids % size)
    with torch.inference_mode():
        assert torch.equal(model(ids % size).logits, before)


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("Qwen3", "answers otherwise with rescaled keys"),
        ("Cohere", "answers otherwise with rescaled keys"),
        ("GPT-2", "has no query and key projections"),
    ],
)
def test_other_models_are_refused(family, said, ids):
    model = deepcopy(tiny(family))
    if family != "GPT-2":  # Cohere turns channels 2 i and 2 i + 1 together, Qwen3 norms its queries
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.data[::3] *= 9
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match=said):
        balance_keys(model, ids % model.config.vocab_size)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
