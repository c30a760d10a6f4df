"""Models whose layers all slide over a long window: packed, what has left it forgotten a record at a time."""

from __future__ import annotations

import copy
import warnings

import pytest

torch = pytest.importorskip("torch", reason="the runtime extra (torch) is not installed")
pytest.importorskip("transformers", reason="the runtime extra (transformers) is not installed")

import transformers  # noqa: E402
from hf_models import DEVICE, GQA, prompt  # noqa: E402

from kvruntime import make_cache  # noqa: E402
from kvruntime.bench.harness.weigh import weigh  # noqa: E402
from kvruntime.engine import Engine  # noqa: E402
from kvruntime.hf import empty  # noqa: E402
from kvruntime.hf.cache import argument  # noqa: E402
from kvruntime.hf.stepped import SteppedCache  # noqa: E402
from kvruntime.methods import make_layer  # noqa: E402
from kvsim.engines import Kvruntime  # noqa: E402
from kvsim.engines.kvruntime import LONG_WINDOW  # noqa: E402
from kvsim.layout import LayerShape  # noqa: E402
from kvsim.methods import Full, Kivi  # noqa: E402
from kvsim.methods.evict import windowed  # noqa: E402
from kvsim.models.model import Model  # noqa: E402

FAMILIES = {"Mistral": "MistralConfig", "Phi-3": "Phi3Config"}
CLASSES = {**FAMILIES, "Cohere 2": "Cohere2Config"}
SLIDES = {
    **GQA,
    "num_hidden_layers": 1,
    "sliding_window": LONG_WINDOW,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
}


def sliding(family, **options):
    torch.manual_seed(3)
    config = getattr(transformers, CLASSES[family])(**SLIDES | options)
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
    assert max(cache.stores[0].row_lengths) == min(length + 23, LONG_WINDOW)


def test_chunks_and_single_tokens_are_stock():
    model, ids, outs = sliding("Mistral"), prompt(2, 1300)["input_ids"], []
    cache = make_cache(model, "fp32")
    with torch.no_grad():
        for start, stop in ((0, 600), (600, 601), (601, 1250), (1250, 1251), (1251, 1300)):
            outs.append(model(ids[:, start:stop], **argument(cache)).logits)
        torch.testing.assert_close(torch.cat(outs, 1), model(ids).logits, atol=1e-4, rtol=1e-4)


def test_a_model_that_makes_a_full_mask_too_is_stock():
    """Cohere 2 makes a mask of each kind, whichever its layers take."""
    model, ids = sliding("Cohere 2", layer_types=["sliding_attention"]), prompt(1, LONG_WINDOW + 9)["input_ids"]
    cache = make_cache(model, "fp32")
    with torch.no_grad():
        parts = [model(part, **argument(cache)).logits for part in ids.split((LONG_WINDOW + 8, 1), 1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits, atol=1e-4, rtol=1e-4)


def test_a_window_that_no_layer_attends_by_is_refused(monkeypatch):
    """Its config alone names one: the layers see all, and a packed window would not."""
    model = sliding("Cohere 2", layer_types=["sliding_attention"])
    module = transformers.models.cohere2.modeling_cohere2
    monkeypatch.setattr(module, "create_sliding_window_causal_mask", module.create_causal_mask)
    model.model.layers[0].self_attn.sliding_window = None
    cache = make_cache(model, "fp32")
    with torch.no_grad(), pytest.raises(ValueError, match="Cohere2Attention attends without the window of 1024"):
        model(prompt(1, 8)["input_ids"], **argument(cache))


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
    """Where the host plans: a cache of steps provides for tokens to come."""
    model, held = sliding(family), 0
    cache, read = make_cache(model, method, compiled=False), Model.from_config(model.config.to_dict())
    for length in (100, 1, 900, 20, 1, 1, 300, 1):
        with torch.no_grad():
            model(prompt(2, length)["input_ids"], **argument(cache))
        held += length
        predicted = Kvruntime().parts(read, method, 2, held)
        assert weigh(cache) - cache.step_nbytes == cache.nbytes == sum(predicted.values())
    assert Kvruntime().stored(read, method).name == f"window-1024({method.name})"
    assert Kvruntime().notes(read, method)[1].startswith("windows of 1,024 tokens are packed")


@pytest.fixture
def stepping(monkeypatch):
    monkeypatch.setattr(empty, "steps_on", lambda device: True)


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_give_the_tokens_of_the_planned_cache(stepping, family):
    """Ragged rows from before the window is full to where each has let tokens go several times, and a second turn."""
    model, inputs, out = sliding(family), prompt(2, LONG_WINDOW - 30, (0, 9)), []
    method = Kivi(8, residual_length=32, dtype="float32")
    for compiled in (None, False):
        cache = make_cache(model, method, compiled=compiled)
        assert isinstance(cache, SteppedCache) == (compiled is None)
        ids = inputs["input_ids"]
        for more in (104, 6):
            mask = torch.nn.functional.pad(inputs["attention_mask"], (0, ids.shape[1] - LONG_WINDOW + 30), value=1)
            given = {"attention_mask": mask, "max_new_tokens": more, "do_sample": False, **argument(cache)}
            ids = torch.cat([model.generate(ids, **given), inputs["input_ids"][:, :5]], 1)
        out.append(ids)
        lengths = cache.stores[0].row_lengths
        assert all(LONG_WINDOW <= length < LONG_WINDOW + 32 for length in lengths)
        if compiled is None:
            assert cache.counts.positions.tolist() == lengths
            predicted = Kvruntime().parts(Model.from_config(model.config.to_dict()), method, 2, cache.num_provided)
            assert weigh(cache) - cache.step_nbytes == cache.nbytes == sum(predicted.values())
    assert torch.equal(*out)


def test_steps_forget_what_the_host_would():
    """The kernels of a step and the host's layer, bit for bit: rows of which records leave, and one that is short."""
    from kvruntime.methods.kivi import forget, step

    torch.manual_seed(1)
    method, window, shape, lengths = Kivi(2, 32, 64, dtype="float32"), 320, LayerShape(2, 64, 64), [382, 379, 60]
    host = make_layer(windowed(method, window), shape, 3, None, torch.device("cpu"))
    host.append(*torch.randn(2, 3, 2, 382, 64), lengths)
    host.provide(400)
    ours = make_layer(method, shape, 3, None, DEVICE)
    ours.tensors = {name: tensor.to(DEVICE, copy=True) for name, tensor in host.tensors.items()}
    positions = torch.tensor(host.row_lengths, dtype=torch.int32, device=DEVICE)
    ticket, forgot = torch.zeros(3, dtype=torch.int32, device=DEVICE), 0
    for _ in range(6):
        before = host.row_lengths
        key, value = torch.randn(2, 3, 2, 1, 64)
        host.append(key, value)
        query, key, value = (x.to(DEVICE) for x in (torch.randn(3, 4, 1, 64), key, value))
        step.step(query, key, value, ours.stored(), ours.layout, positions, positions, ticket)
        forget.forget(ours.stored(), ours.record, host.method.budget, 64, ticket)
        host.count_step(positions)
        forgot += sum(now < old for now, old in zip(host.row_lengths, before, strict=True))
        assert positions.tolist() == host.row_lengths == ours.tensors["lengths"][0].tolist()
        assert not ticket.any()
        for name, tensor in host.tensors.items():
            assert torch.equal(tensor.view(torch.uint8), ours.tensors[name].cpu().view(torch.uint8)), name
    assert forgot == 2
    books = copy.deepcopy(host)
    for count in (1, 63, 64, 150):
        books.advance(count)
        for _ in range(count):
            host.append(*torch.randn(2, 3, 2, 1, 64))
        assert books.inner.row_packed == host.inner.row_packed
        assert (books.row_lengths, books.seen) == (host.row_lengths, host.seen)


def test_padding_between_tokens_of_a_window_is_refused_in_steps(stepping):
    model, cache = sliding("Mistral"), None
    cache = make_cache(model, "kivi", nbits=8)
    mask = torch.ones(1, LONG_WINDOW - 1, dtype=torch.long, device=DEVICE)
    mask[:, 10:12] = 0
    with torch.no_grad():
        model(prompt(1, LONG_WINDOW - 1)["input_ids"], attention_mask=mask, **argument(cache))
        for turn in range(2):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            step = {"input_ids": mask[:, :1], "attention_mask": mask, **argument(cache)}
            if turn:
                with pytest.raises(ValueError, match="padding between tokens and a packed window of 1024"):
                    model(**step)
            else:
                model(**step)


def test_what_waits_for_the_host_is_said_once(stepping):
    model = sliding("Mistral")
    with pytest.warns(RuntimeWarning, match=r"no CUDA graph holds window-1024\(fp32\)"):
        assert not isinstance(make_cache(model, "fp32"), SteppedCache)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_cache(model, "fp32")
        make_cache(model, "kivi")
        make_cache(model, "int8", compiled=False)


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
