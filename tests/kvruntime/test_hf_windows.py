"""Models whose layers all slide over a long window: packed, what has left it forgotten a record at a time."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the runtime extra (torch) is not installed")
pytest.importorskip("transformers", reason="the runtime extra (transformers) is not installed")

import transformers  # noqa: E402
from hf_models import DEVICE, GQA, prompt  # noqa: E402

from kvruntime import make_cache  # noqa: E402
from kvruntime.bench.harness.weigh import weigh  # noqa: E402
from kvruntime.engine import Engine  # noqa: E402
from kvruntime.hf.cache import argument  # noqa: E402
from kvruntime.methods import make_layer  # noqa: E402
from kvsim.engines import Kvruntime  # noqa: E402
from kvsim.engines.kvruntime import LONG_WINDOW  # noqa: E402
from kvsim.layout import LayerShape  # noqa: E402
from kvsim.methods import Full, Kivi  # noqa: E402
from kvsim.methods.evict import windowed  # noqa: E402
from kvsim.models.model import Model  # noqa: E402

FAMILIES = {"Mistral": "MistralConfig", "Phi-3": "Phi3Config"}
SLIDES = {
    **GQA,
    "num_hidden_layers": 1,
    "sliding_window": LONG_WINDOW,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
}


def sliding(family, **options):
    torch.manual_seed(3)
    config = getattr(transformers, FAMILIES[family])(**SLIDES | options)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().to(DEVICE)
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and "attn" in name:
            weight.data.mul_(8)
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [LONG_WINDOW - 8, LONG_WINDOW + 70])
def test_generation_is_stock(family, length):
    """Ragged rows that reach the window and pass it; the tokens' logits within 1e-4."""
    model, inputs = sliding(family), prompt(2, length, (0, 9))
    options = {"max_new_tokens": 24, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    stock = model.generate(**inputs, **options)
    cache = make_cache(model, "fp32")
    ours = model.generate(**inputs, **options, **argument(cache))
    assert torch.equal(ours.sequences, stock.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(stock.logits), atol=1e-4, rtol=1e-4)
    assert cache.get_seq_length() == length + 23
    assert max(cache.stores[0].row_lengths) == min(length + 23, LONG_WINDOW + 1)


def test_chunks_and_single_tokens_are_stock():
    model, ids, outs = sliding("Mistral"), prompt(2, 1300)["input_ids"], []
    cache = make_cache(model, "fp32")
    with torch.no_grad():
        for start, stop in ((0, 600), (600, 601), (601, 1250), (1250, 1251), (1251, 1300)):
            outs.append(model(ids[:, start:stop], **argument(cache)).logits)
        torch.testing.assert_close(torch.cat(outs, 1), model(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", [Full("float32"), Kivi(2, 32, 64, dtype="float32")], ids=["full", "packed"])
def test_a_layer_attends_to_the_newest_of_what_it_stores(method):
    """Its tokens read back, of which a query sees the window; rows of three lengths, one query and several."""
    torch.manual_seed(0)
    window, lengths = 200, [500, 200, 31]
    layer = make_layer(windowed(method, window), LayerShape(2, 32, 32), 3, None, torch.device("cpu"))
    key, value = torch.randn(2, 3, 2, 500, 32)
    layer.append(key, value, lengths)
    for count, turns in ((1, 40), (5, 3), (250, 1)):
        for _ in range(turns):
            query, (key, value) = 2 * torch.randn(3, 4, count, 32), torch.randn(2, 3, 2, count, 32)
            before = [tuple(x.clone() for x in layer.tokens(row)) for row in range(3)]
            if count == 1:
                layer.append(key, value)
                out = layer.attend(query, 0.2)
                before = [tuple(x[:, :-1] for x in layer.tokens(row)) for row in range(3)]
            else:
                out = layer.attend(query, 0.2, (key, value, None))
                layer.append(key, value)
            for row, held in enumerate(before):
                keys, values = (
                    torch.cat([x, new[row].to(x.dtype)], 1).double().repeat_interleave(2, 0)
                    for x, new in zip(held, (key, value), strict=True)
                )
                at = torch.arange(keys.shape[1])
                own = at[-count:, None]
                hidden = (at > own) | (at <= own - window)
                weight = (query[row].double() @ keys.transpose(1, 2) * 0.2).masked_fill(hidden, float("-inf"))
                torch.testing.assert_close(out[row].double(), weight.softmax(-1) @ values, atol=1e-5, rtol=1e-4)
    most = window + (64 if isinstance(method, Kivi) else 1)
    assert all(window <= length <= most for length in layer.row_lengths), layer.row_lengths


@pytest.mark.parametrize("method", [Full("float32"), Kivi(dtype="float32", residual_length=64)], ids=["fp32", "kivi"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_step_weighs_what_is_predicted(family, method):
    model, held = sliding(family), 0
    cache, read = make_cache(model, method), Model.from_config(model.config.to_dict())
    for length in (100, 1, 900, 20, 1, 1, 300, 1):
        with torch.no_grad():
            model(prompt(2, length)["input_ids"], **argument(cache))
        held += length
        predicted = Kvruntime().parts(read, method, 2, held)
        assert weigh(cache) == cache.nbytes == sum(predicted.values())
    assert Kvruntime().stored(read, method).name == f"window-1024({method.name})"
    assert Kvruntime().notes(read, method)[1].startswith("windows of 1,024 tokens are packed")


def test_what_a_packed_window_refuses():
    model, ids = sliding("Mistral"), prompt(2, LONG_WINDOW + 140)["input_ids"]
    with pytest.raises(ValueError, match="sink_length 4: allowed is 0 where the first tokens leave a window of 1024"):
        make_cache(model, "kivi", sink_length=4)
    with pytest.raises(ValueError, match="residual_length 2048: allowed are up to the window of 1024 tokens"):
        make_cache(model, "kivi", residual_length=2048)
    with pytest.raises(ValueError, match="windows that are packed, which a compiled cache does not run"):
        make_cache(model, compiled=True, max_seq_len=64)
    with pytest.raises(ValueError, match="is not supported here: sliding"):
        Engine(model, batch_size=1, max_seq_len=64)
    with pytest.raises(ValueError, match=r"nothing to pack, its layers are .* of fewer than 1,024 tokens"):
        make_cache(sliding("Mistral", sliding_window=1000))
    cache = make_cache(model, "kivi")
    with torch.no_grad():
        model(ids, **argument(cache))
        with pytest.raises(ValueError, match="tokens that would come back are evicted"):
            cache.crop(-1)
        mask = torch.ones(2, LONG_WINDOW + 143, dtype=torch.long, device=DEVICE)
        mask[1, -3] = 0
        with pytest.raises(ValueError, match="padding between tokens and a packed window of 1024"):
            model(ids[:, :3], attention_mask=mask, **argument(cache))
