"""Steps of several tokens a row, as assisted decoding checks them: on the device, in graphs, and taken back in part.

Without a GPU the steps run on the CPU, graphs are played by a forward that counts as a replay does, and what a graph
would hold runs in Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import copy
from functools import partial

import pytest

torch = pytest.importorskip("torch", reason="the runtime extra (torch) is not installed")
pytest.importorskip("transformers", reason="the runtime extra (transformers) is not installed")
pytest.importorskip("triton", reason="the runtime extra (triton) is not installed")

from count_ops import Ops  # noqa: E402
from hf_models import DEVICE, prompt, tiny  # noqa: E402
from hf_oracle import step  # noqa: E402
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator  # noqa: E402
from transformers.models.llama import modeling_llama  # noqa: E402

from kvruntime import make_cache, restore  # noqa: E402
from kvruntime.hf import empty, graphs  # noqa: E402
from kvruntime.hf.cache import argument  # noqa: E402
from kvruntime.hf.counts import StepCounts  # noqa: E402
from kvruntime.methods import Steps, make_layer  # noqa: E402
from kvruntime.methods.kivi import append, attention  # noqa: E402
from kvruntime.methods.kivi import cache as kivi_cache  # noqa: E402
from kvruntime.methods.kivi.cache import KiviLayer  # noqa: E402
from kvsim.layout import LayerShape  # noqa: E402
from kvsim.methods import Kivi, kivi_boost, kivi_seed  # noqa: E402

ON_CUDA = DEVICE.type == "cuda"
needs_cuda = pytest.mark.skipif(not ON_CUDA, reason="needs a CUDA device")
KIVI = ("kivi", {"nbits": 8, "residual_length": 96})
BOOST = ("kivi-boost", {"residual_length": 128})
LOOKUP = {"max_new_tokens": 40, "prompt_lookup_num_tokens": 4, "do_sample": False, "pad_token_id": 0}


@pytest.fixture
def stepping(monkeypatch):
    monkeypatch.setattr(empty, "steps_on", lambda device: True)


@pytest.fixture
def on_device(monkeypatch):
    """A layer on the CPU takes the kernels, which Triton's interpreter runs."""
    if not ON_CUDA:
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
        monkeypatch.setattr(attention, "num_multiprocessors", lambda _: 1)
        monkeypatch.setattr(kivi_cache, "_fast", lambda: None)


@pytest.fixture
def at_once(monkeypatch):
    """Tokens a row of every step of several."""
    seen: list[int] = []
    step = KiviLayer._step_of_several

    def counted(self, query, *more):
        seen.append(query.shape[2])
        return step(self, query, *more)

    monkeypatch.setattr(KiviLayer, "_step_of_several", counted)
    return seen


def repeating(num_tokens=160):
    """A prompt with something to look up."""
    inputs = prompt(1, num_tokens)
    inputs["input_ids"][:, 16:] = inputs["input_ids"][:, :16].repeat(1, num_tokens // 16 - 1)
    return inputs


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal logits; on a device a code on a rounding tie may flip, and what follows reads it: near in norm."""
    if ON_CUDA:
        assert (got - want).norm() <= 2e-2 * want.norm()
    else:
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def agree(cache) -> None:
    """What the device counts is what the host does."""
    stores = cache.stores
    assert cache.counts.positions.tolist() == stores[0].row_lengths
    assert int(cache.counts.num_columns) == cache.get_seq_length()
    for store in stores:
        assert store.tensors["lengths"].tolist() == [store.row_lengths, store.row_packed]


@pytest.mark.parametrize(
    ("method", "dim"),
    [
        (Kivi(residual_length=64, sink_length=3), 32),
        (kivi_seed(), 64),
        (kivi_boost(residual_length=64), 64),
    ],
    ids=["sink", "seed", "boost"],
)
def test_a_step_of_several_is_an_attention_and_an_append(method, dim, on_device):
    """Bit for bit, over a record that is packed on the way and tokens that are taken back; boosted ones once a record
    says what their channels weigh."""
    torch.manual_seed(0)
    dtype = torch.float16
    layers = [make_layer(method, LayerShape(1, dim, dim), 2, 256, DEVICE) for _ in range(2)]
    tokens = torch.randn(2, 1, 126, dim, dtype=dtype, device=DEVICE)
    boosted = bool(method.boost_nbits)
    first = [126, 126] if boosted else [126, 60]
    for layer in layers:
        assert layer.most_at_once == (1 if boosted else kivi_cache.MOST_AT_ONCE)
        layer.append(tokens, tokens, first)
        assert layer.most_at_once == kivi_cache.MOST_AT_ONCE
    lengths = torch.tensor(first, dtype=torch.int32, device=DEVICE)
    steps = Steps(lengths, lengths, layers[0].scratch(2), layers[0].num_provided)
    packed = layers[0].row_packed
    for length in (2, 6):
        query, key, value = torch.randn(2, 4, length, dim, dtype=dtype, device=DEVICE).split((2, 1, 1), 1)
        got = layers[0].step(query, key, value, 0.2, steps)
        want = layers[1].attend(query, 0.2, (key, value, None))
        layers[1].append(key, value)
        layers[0].advance(length)
        if ON_CUDA:  # rows are shared out in another way
            torch.testing.assert_close(got, want, atol=2e-3, rtol=2e-3)
        else:
            assert torch.equal(got, want)
        assert got.transpose(1, 2).is_contiguous()  # as an output projection reads it, without a copy
        KiviLayer.crop_all(layers, max(layers[0].row_lengths) - 1)
        for name, tensor in layers[0].tensors.items():
            assert torch.equal(tensor, layers[1].tensors[name]), (length, name)
        assert (layers[0].row_lengths, layers[0].row_packed) == (layers[1].row_lengths, layers[1].row_packed)
        assert layers[0].tensors["lengths"].tolist() == [layers[0].row_lengths, layers[0].row_packed]
    assert layers[0].row_packed != packed


@pytest.mark.parametrize("rows", [1, 2])
def test_one_row_of_a_step_of_several_has_its_order_of_channels(rows, on_device, monkeypatch):
    """Of several rows one may hold no record yet."""
    begun, run = [], append.order
    monkeypatch.setattr(append, "order", lambda *given: begun.append(rows) or run(*given))
    layer = make_layer(kivi_boost(residual_length=64), LayerShape(1, 64, 64), rows, 256, DEVICE)
    tokens = torch.randn(rows, 1, 126, 64, dtype=torch.float16, device=DEVICE)
    layer.append(tokens, tokens, [126, 40][:rows])
    assert begun == [rows]
    assert layer.row_packed == [64, 0][:rows]
    lengths = torch.tensor(layer.row_lengths, dtype=torch.int32, device=DEVICE)
    fresh = tokens[:, :, :5]
    layer.step(fresh, fresh, fresh, 0.1, Steps(lengths, lengths, layer.scratch(1), layer.num_provided))
    assert begun == [rows] * rows


def test_a_step_of_several_takes_embedded_tokens():
    layer = make_layer(Kivi(residual_length=32), LayerShape(1, 32, 32), 1, 64, DEVICE)
    x = torch.zeros(1, 1, 2, 32, device=DEVICE)
    with pytest.raises(ValueError, match="2 tokens a row and a rotary embedding: allowed is one"):
        layer.step(x, x, x, 1.0, Steps(x, x, x, 64), rotary=(x, x))


@pytest.mark.parametrize("method", [KIVI, BOOST], ids=["kivi", "boost"])
def test_drafts_are_steps(stepping, at_once, method, monkeypatch):
    """Of the planned cache's tokens; the host's books are told to the device at the prompt, and where it is over."""
    told: list[int] = []
    write = StepCounts.write

    def counted(self, *more):
        told.append(1)
        return write(self, *more)

    monkeypatch.setattr(StepCounts, "write", counted)
    model, inputs, out = tiny("Llama"), repeating(), []
    for compiled in (None, False):
        cache = make_cache(model, method[0], compiled=compiled, **method[1])
        out.append(model.generate(**inputs, **argument(cache), **LOOKUP))
        if compiled is None:
            assert max(at_once) == 5
            assert len(told) <= 2
            agree(cache)
            at_once.clear()
    assert not at_once
    assert torch.equal(*out)


class Sizes:
    """transformers' streamer protocol: how many tokens each call of the model gave."""

    def __init__(self):
        self.sizes = []

    def put(self, tokens):
        self.sizes.append(tokens.numel())

    def end(self):
        self.sizes = self.sizes[1:]  # the prompt came first


@torch.no_grad()
def read_back_drafts(model, cache, ids, num_new, drafted):
    """``(tokens, tokens a call)`` of prompt lookup where every call is judged by stock attention over what ``cache``
    holds, read back; ``cache`` is given the same tokens, and its own logits must be those."""
    lookup = PromptLookupCandidateGenerator(num_output_tokens=drafted, max_length=ids.shape[1] + num_new)
    first, sizes = ids.shape[1], []
    while ids.shape[1] < first + num_new:
        candidates, _ = lookup.get_candidates(ids)
        got, want = step(model, cache, candidates[:, cache.get_seq_length() :])
        close(got, want)
        said = want[0, ids.shape[1] - 1 - candidates.shape[1] :].argmax(-1)
        same = int((candidates[0, ids.shape[1] :] == said[:-1]).long().cumprod(0).sum())
        cache.crop(ids.shape[1] + same - candidates.shape[1])
        kept = said[: min(same + 1, first + num_new - ids.shape[1])]
        ids = torch.cat([ids, kept[None]], 1)
        sizes.append(len(kept))
    return ids, sizes


@pytest.mark.parametrize("method", [KIVI, BOOST], ids=["kivi", "boost"])
def test_accepted_are_the_drafts_that_dequantized_tokens_accept(stepping, method):
    """As many a call, and the same tokens; past a record that is packed among them."""
    model, inputs = tiny("Llama"), repeating()
    oracle = make_cache(model, method[0], compiled=False, **method[1])
    want, sizes = read_back_drafts(model, oracle, inputs["input_ids"], 40, 4)
    assert min(sizes) < 5 == max(sizes)
    for compiled in (None, False):
        cache, streamer = make_cache(model, method[0], compiled=compiled, **method[1]), Sizes()
        got = model.generate(**inputs, **argument(cache), **LOOKUP, streamer=streamer)
        assert torch.equal(got, want)
        assert streamer.sizes == sizes
        assert cache.stores[0].row_packed == oracle.stores[0].row_packed == [128]


@pytest.mark.parametrize(
    ("compiled", "is_lookup"),
    [(None, True), (False, True), (True, True), (False, False)],
    ids=["steps", "planned", "compiled", "assistant"],
)
def test_drafts_fit_a_cache_of_just_the_tokens_that_are_kept(stepping, compiled, is_lookup):
    """Prompt lookup drafts beyond the last token: not into a cache without room for them.  Padding takes none."""
    model, inputs = tiny("Llama"), repeating()
    inputs["attention_mask"][:, :9] = 0
    more, out = {**LOOKUP, "max_new_tokens": 30}, []
    if not is_lookup:
        del more["prompt_lookup_num_tokens"]
        more |= {"assistant_model": tiny("Mistral"), "do_sample": True}
    for length in (181, 200):
        cache = make_cache(model, *KIVI[:1], max_seq_len=length, compiled=compiled, **KIVI[1])
        torch.manual_seed(3)
        out.append(model.generate(**inputs, **argument(cache), **more))
    assert torch.equal(*out)
    assert out[0].shape[1] == 190


def test_drafts_that_go_on_from_a_used_cache_fit_too():
    model, inputs = tiny("Llama"), repeating()
    whole, out = inputs["input_ids"], []
    for length in (190, 220):
        cache = make_cache(model, *KIVI[:1], max_seq_len=length, **KIVI[1])
        with torch.no_grad():
            model(whole[:, :120], **argument(cache))
        out.append(model.generate(**inputs, **argument(cache), **{**LOOKUP, "max_new_tokens": 30}))
    assert torch.equal(*out)


@torch.no_grad()
@pytest.mark.parametrize("method", [KIVI, BOOST], ids=["kivi", "boost"])
def test_refused_drafts_leave_no_trace_in_the_logits(stepping, method):
    """Tokens that come with drafts, most of them refused, have the logits of tokens that come one by one: between two
    records, because drafts may have the oldest tokens packed a few tokens earlier."""
    model, ids, out = tiny("Llama"), repeating()["input_ids"], []
    drafts = [(5, 4), (5, 1), (3, 2), (1, 0), (5, 0)]
    for compiled, schedule in ((None, drafts), (None, [(1, 0)] * 12), (False, drafts)):
        cache, at, logits = make_cache(model, method[0], compiled=compiled, **method[1]), 140, []
        model(ids[:, :at], **argument(cache))
        packed = cache.stores[0].row_packed
        for length, refused in schedule:
            new = ids[:, at : at + length].clone()
            new[:, length - refused :] = 5
            kept = length - refused
            logits.append(model(new, **argument(cache)).logits[:, :kept])
            cache.crop(-refused)
            at += kept
        assert cache.stores[0].row_packed == packed
        out.append(torch.cat(logits, 1))
    assert len({tuple(each.shape) for each in out}) == 1
    for each in out[1:]:
        close(out[0], each)


@torch.no_grad()
def test_padding_among_several_tokens_is_the_hosts(stepping, at_once):
    """Ragged rows: tokens without padding are a step, others no step; then tokens are taken back, padding too."""
    model, inputs = tiny("Llama"), prompt(2, 40, (0, 9))
    ids, mask = prompt(2, 66, seed=5)["input_ids"], torch.ones(2, 66, dtype=torch.long, device=DEVICE)
    ids[:, :40], mask[:, :40], mask[1, 46:49] = inputs["input_ids"], inputs["attention_mask"], 0
    place = (mask.cumsum(1) - 1).clamp(min=0)
    caches = [make_cache(model, *KIVI[:1], compiled=compiled, **KIVI[1]) for compiled in (None, False)]
    at = 0
    for length, is_step, taken in (
        (40, False, 0),
        (5, True, 2),
        (3, True, 0),
        (4, False, 0),
        (1, False, 1),
        (6, True, 6),
    ):
        part, seen = slice(at, at + length), {"attention_mask": mask[:, : at + length]}
        at_once.clear()
        got, want = (
            model(ids[:, part], **seen, position_ids=place[:, part], **argument(each)).logits for each in caches
        )
        real = mask[:, part].bool()
        close(got[real], want[real])
        assert bool(at_once) == is_step
        for each in caches:
            each.crop(-taken)
        at += length - taken
        assert caches[0].get_seq_length() == at
        agree(caches[0])
    for each in caches:
        with pytest.raises(ValueError, match="the rest is padding in some rows and tokens in others"):
            each.crop(-(at - 40))
    agree(caches[0])


@torch.no_grad()
def test_taking_tokens_back_reads_nothing_from_the_device(stepping):
    """And writes to it once for all layers, and to what steps count."""
    model, inputs = tiny("Llama"), prompt(2, 40, (0, 9))
    cache = make_cache(model, *KIVI[:1], **KIVI[1])
    model(**inputs, **argument(cache))
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(inputs["input_ids"][:, :5])], 1)
    model(inputs["input_ids"][:, :5], attention_mask=mask, **argument(cache))
    with Ops() as ops:
        cache.crop(-2)
    assert ops.counts == {"select": len(cache.layers), "_foreach_sub_": 1, "sub_": 2}
    agree(cache)


@torch.no_grad()
def test_all_may_be_taken_back(stepping):
    model, inputs = tiny("Llama"), prompt(1, 20)
    cache = make_cache(model, "kivi", residual_length=64)
    model(**inputs, **argument(cache))
    with pytest.raises(ValueError, match=r"crop\(3\): allowed is 0 or below"):
        cache.crop(3)
    cache.crop(-20)
    assert (cache.get_seq_length(), cache.counts.started) == (0, False)
    want = model(**inputs, **argument(make_cache(model, "kivi", residual_length=64))).logits
    assert torch.equal(model(**inputs, **argument(cache)).logits, want)


@torch.no_grad()
def test_tokens_that_see_each_other_are_no_step(stepping, monkeypatch):
    """As an image's may: the host says what is wrong."""
    model, inputs = tiny("Llama"), prompt(1, 20)
    cache = make_cache(model, *KIVI[:1], **KIVI[1])
    model(**inputs, **argument(cache))
    both = partial(modeling_llama.create_causal_mask, or_mask_function=lambda b, h, q, k: k >= 0)
    monkeypatch.setattr(modeling_llama, "create_causal_mask", both)
    with pytest.raises(ValueError, match="the attention mask is not causal"):
        model(inputs["input_ids"][:, :3], **argument(cache))
    assert cache.counts.at_once == 1


@torch.no_grad()
def test_a_mask_by_number_is_the_hosts(stepping, at_once):
    """What it hides among several new tokens is no token, and of those held it may hide none."""
    model, inputs = tiny("Llama"), prompt(2, 43)
    ids, mask, out = inputs["input_ids"], inputs["attention_mask"].clone(), []
    mask[1, 41] = 0
    place = (mask.cumsum(1) - 1)[:, 40:]
    for by_number in (True, False):
        cache = make_cache(model, *KIVI[:1], **KIVI[1])
        model(ids[:, :40], **argument(cache))
        given = ((mask,), {}) if by_number else ((), {"attention_mask": mask})
        out.append(model(ids[:, 40:], *given[0], **given[1], position_ids=place, **argument(cache)).logits)
        assert cache.stores[0].row_lengths == [43, 42]
        hides = torch.cat([mask, torch.ones_like(mask[:, :3])], 1)
        hides[0, 7] = 0
        with pytest.raises(ValueError, match="hides tokens that the cache holds"):
            model(ids[:, 40:], hides, **argument(cache))
    assert not at_once
    assert torch.equal(*out)


@torch.no_grad()
def test_a_shallow_copy_ends_before_its_cache(stepping):
    model, inputs = tiny("Llama"), prompt(1, 20)
    cache = make_cache(model, *KIVI[:1], **KIVI[1])
    model(**inputs, **argument(cache))
    counts, alias = cache.counts, copy.copy(cache)
    del alias
    model(inputs["input_ids"][:, :1], **argument(cache))
    assert cache.get_seq_length() == 21
    del cache
    assert not counts.layers


def test_nothing_waits_for_the_device_while_several_tokens_are_captured(stepping, monkeypatch):
    model, inputs = tiny("Llama"), prompt(1, 20)
    cache = make_cache(model, *KIVI[:1], **KIVI[1])
    with torch.no_grad():
        model(**inputs, **argument(cache))
        before = cache.counts.ahead
        cache.counts.tracing, cache.counts.at_once, cache.graphs.busy = True, 3, True
        monkeypatch.setattr(KiviLayer, "_step_of_several", lambda self, query, *_: torch.zeros_like(query))

        def read(self):
            raise AssertionError("a capture would wait for the device here")

        for name in ("__bool__", "__int__", "__index__", "item", "tolist"):
            monkeypatch.setattr(torch.Tensor, name, read)
        place = {"position_ids": torch.arange(20, 23, device=DEVICE)[None]}
        model(inputs["input_ids"][:, :3], attention_mask=None, **place, **argument(cache))
    monkeypatch.undo()
    assert cache.counts.ahead == before
    assert int(cache.counts.num_columns) == 23


@pytest.fixture
def played(stepping, monkeypatch):
    """Graphs that are no graphs: a replay runs the forward that was captured and counts as a replay does.

    The sizes that were captured, in turn.
    """
    captured: list[int] = []
    inputs = graphs.Graphs._inputs

    def seen(self, *more):
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "is_cuda", property(lambda each: True))
            return inputs(self, *more)

    def capture(self, given, addresses, forward, args, kwargs):
        captured.append(self.counts.at_once)
        return graphs.Graph((forward, args, kwargs), given.like, addresses, [], None, [], None)

    def replay(self, graph, given):
        (forward, args, kwargs), there = graph.graph, iter(given.tensors)
        args = [next(there) if isinstance(value, torch.Tensor) else value for value in args]
        tensors = [name for name, value in kwargs.items() if isinstance(value, torch.Tensor)]
        kwargs = kwargs | {name: None if name == "attention_mask" else next(there) for name in tensors}
        self.counts.check(given.mask)
        self.counts.tracing = True
        out = forward(*args, **kwargs)
        self.counts.tracing = False
        self.counts.replay()
        return out

    monkeypatch.setattr(graphs.Graphs, "_inputs", seen)
    monkeypatch.setattr(graphs.Graphs, "_capture", capture)
    monkeypatch.setattr(graphs.Graphs, "_replay", replay)
    monkeypatch.setattr(graphs, "fused", lambda model: contextlib.nullcontext())
    return captured


def own():
    """A model of this test's alone."""
    model = copy.deepcopy(tiny("Llama"))
    restore(model)
    model.generation_config.eos_token_id = None
    return model


@torch.no_grad()
def test_every_number_of_tokens_has_a_graph(played, monkeypatch):
    """After two steps of it in a process's first cache, at once in the next one's; not all at once have one."""
    model, ids = own(), prompt(1, 600)["input_ids"]
    planned = make_cache(model, *KIVI[:1], compiled=False, **KIVI[1])
    place = torch.arange(600, device=DEVICE)[None]
    sizes = [100, *[1, 2, 3] * 4, *range(4, 12), *[3, 1] * 2]
    for caches in range(2):
        cache, at = make_cache(model, *KIVI[:1], max_seq_len=600, **KIVI[1]), 0
        for length in sizes:
            part = {"input_ids": ids[:, at : at + length], "position_ids": place[:, at : at + length]}
            got = model(**part, **argument(cache)).logits
            if not caches:
                want = model(**part, **argument(planned)).logits
                close(got, want)
            at += length
        agree_on_cpu = [store.row_lengths for store in cache.stores]
        assert agree_on_cpu == [[at]] * len(cache.stores)
        if not caches:
            assert played == [1, 2, 3]
            assert list(cache.graphs.held) == [1, 2, 3]
            assert cache.steps == "CUDA graphs of 1, 2, 3 tokens a row"
            played.clear()
    assert played == [1, 2, 3]  # of the others one step was made: they run as they are
    monkeypatch.setattr(graphs, "WARM", 0)
    del cache.graphs.held[1]
    played.clear()
    for length in (*range(2, 6 + graphs.HELD), 1):
        model(input_ids=ids[:, :length], position_ids=place[:, at : at + length], **argument(cache))
        at += length
    assert played == [*range(4, 2 + graphs.HELD), 1]
    assert list(cache.graphs.held) == [*range(2, 2 + graphs.HELD), 1]


@torch.no_grad()
def test_a_mask_that_is_more_than_causal_is_never_captured(played, monkeypatch):
    """The host plans what several tokens see by it; a capture ends before a layer is given anything."""
    model, ids = own(), prompt(1, 200)["input_ids"]
    cache, place = make_cache(model, *KIVI[:1], **KIVI[1]), torch.arange(200, device=DEVICE)[None]
    model(ids[:, :100], position_ids=place[:, :100], **argument(cache))
    both = partial(modeling_llama.create_causal_mask, and_mask_function=lambda b, h, q, k: k >= 0)
    monkeypatch.setattr(modeling_llama, "create_causal_mask", both)
    for at in range(100, 118, 3):
        model(ids[:, at : at + 3], position_ids=place[:, at : at + 3], **argument(cache))
    assert not played
    cache.counts.tracing, cache.counts.at_once, cache.graphs.busy = True, 3, True
    with pytest.raises(ValueError, match="a mask of 3 tokens that is more than causal"):
        model(ids[:, :3], position_ids=place[:, 118:121], **argument(cache))
    assert (cache.counts.at_once, cache.stores[0].row_lengths) == (3, [118])


@torch.no_grad()
def test_steps_with_other_arguments_in_turn_are_not_captured_again_and_again(played):
    model, ids = own(), prompt(1, 400)["input_ids"]
    cache, place = make_cache(model, *KIVI[:1], **KIVI[1]), torch.arange(400, device=DEVICE)[None]
    model(ids[:, :100], position_ids=place[:, :100], **argument(cache))
    for at in range(100, 124):
        kind = {"output_hidden_states": True} if at > 104 and at % 2 else {}
        out = model(ids[:, at : at + 1], position_ids=place[:, at : at + 1], **kind, **argument(cache))
        assert bool(out.hidden_states) == bool(kind)
    assert len(played) <= 6
    assert cache.stores[0].row_lengths == [124]


@pytest.mark.parametrize("family", ["GPT-2", "OPT", "GPT-NeoX", "Qwen3-MoE", "Gemma", "Cohere"])
def test_families_draft_alike(played, at_once, family):
    model, inputs, out = tiny(family), repeating(96), []
    for compiled in (None, False):
        cache = make_cache(model, *KIVI[:1], compiled=compiled, **KIVI[1])
        out.append(model.generate(**inputs, **argument(cache), **LOOKUP))
        assert bool(cache.stores[0].row_packed[0])
        assert (max(at_once, default=0) > 1) == (compiled is None)
        at_once.clear()
    assert played
    assert torch.equal(*out)


@torch.no_grad()
def test_several_tokens_that_cannot_be_captured_leave_steps_of_one(played, monkeypatch):
    model, ids = own(), prompt(1, 400)["input_ids"]
    cache, capture = make_cache(model, *KIVI[:1], **KIVI[1]), graphs.Graphs._capture
    place, at = torch.arange(400, device=DEVICE)[None], 100

    def fails(self, *more):
        if self.counts.at_once == 1:
            return capture(self, *more)
        return self._fail(RuntimeError("no such capture"))

    monkeypatch.setattr(graphs.Graphs, "_capture", fails)
    model(ids[:, :100], position_ids=place[:, :100], **argument(cache))
    for turn, length in enumerate([1, 3] * 4):
        with (
            pytest.warns(RuntimeWarning, match="several tokens of this model waits")
            if turn == 5
            else contextlib.nullcontext()
        ):
            model(ids[:, at : at + length], position_ids=place[:, at : at + length], **argument(cache))
        at += length
    why = "of several tokens plain, its step cannot be captured (no such capture)"
    assert f"steps=CUDA graph; {why})" in str(cache)
    assert played == [1]
    assert cache.stores[0].row_lengths == [at]


@needs_cuda
@pytest.mark.parametrize("method", [KIVI, BOOST], ids=["kivi", "boost"])
def test_drafts_are_graphs(method, recwarn):
    """Of the same tokens as steps that the host plans; a second cache has them from the first step on."""
    model, inputs = own(), repeating()
    plain = make_cache(model, method[0], compiled=False, **method[1])
    want = model.generate(**inputs, **argument(plain), **LOOKUP)
    for _ in range(2):
        cache = make_cache(model, method[0], **method[1])
        assert torch.equal(model.generate(**inputs, **argument(cache), **LOOKUP), want)
        agree(cache)
        assert max(cache.graphs.held) == 5
    assert not recwarn.list


@needs_cuda
@torch.no_grad()
def test_replays_of_several_tokens_are_steps_of_the_host():
    """Over records that are packed and tokens that are taken back, in float32: the planned cache's logits."""
    model, ids = own(), prompt(2, 400)["input_ids"]
    caches = [make_cache(model, *KIVI[:1], compiled=compiled, **KIVI[1]) for compiled in (None, False)]
    place, at = torch.arange(400, device=DEVICE).expand(2, -1), 0
    for length in [100, *[3, 1, 5] * 20]:
        part = slice(at, at + length)
        got, want = (model(ids[:, part], position_ids=place[:, part], **argument(each)).logits for each in caches)
        close(got, want)
        taken = length // 2 if length < 100 else 0
        for each in caches:
            each.crop(-taken)
        at += length - taken
        agree(caches[0])
    assert set(caches[0].graphs.held) == {1, 3, 5}
