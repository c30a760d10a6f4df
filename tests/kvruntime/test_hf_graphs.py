"""Decode steps whose counts lie on the device, and CUDA graphs of them: the tokens of the cache that the host plans.

Without a GPU the steps run uncaptured on the CPU; what a graph holds then runs in Triton's interpreter.
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest

torch = pytest.importorskip("torch", reason="the runtime extra (torch) is not installed")
pytest.importorskip("transformers", reason="the runtime extra (transformers) is not installed")
pytest.importorskip("triton", reason="the runtime extra (triton) is not installed")

from hf_models import DEVICE, prompt, tiny  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm  # noqa: E402
from transformers.models.llama import modeling_llama  # noqa: E402

from kvruntime import make_cache, restore  # noqa: E402
from kvruntime.bench.harness.weigh import weigh  # noqa: E402
from kvruntime.hf import empty, fused  # noqa: E402
from kvruntime.hf.attention import is_own  # noqa: E402
from kvruntime.hf.cache import argument  # noqa: E402
from kvruntime.hf.counts import AHEAD, GROWTH, StepCounts  # noqa: E402
from kvruntime.hf.graphs import Graph, Weights, flattened, rebuilt  # noqa: E402
from kvruntime.hf.lengths import Lengths  # noqa: E402
from kvruntime.hf.padding import Columns  # noqa: E402
from kvruntime.hf.stepped import SteppedCache  # noqa: E402
from kvruntime.kernels.gated import silu_product  # noqa: E402
from kvruntime.kernels.rms_norm import rms_norm  # noqa: E402
from kvruntime.kernels.rotary import rotate  # noqa: E402
from kvruntime.methods import make_layer  # noqa: E402
from kvsim.layout import LayerShape  # noqa: E402
from kvsim.methods import Full, Kivi  # noqa: E402

ON_CUDA = DEVICE.type == "cuda"
needs_cuda = pytest.mark.skipif(not ON_CUDA, reason="needs a CUDA device")
METHODS = {
    "fp32": ("fp32", {}),
    "kivi": ("kivi", {"nbits": 8, "residual_length": 96}),
    "sink": ("kivi", {"nbits": 4, "residual_length": 96, "sink_length": 4}),
}
WAYS = {
    "greedy": {"max_new_tokens": 70},
    "samples": {"max_new_tokens": 40, "do_sample": True, "top_k": 20},
    "beams": {"max_new_tokens": 20, "num_beams": 3},
    "drafts": {"max_new_tokens": 30, "prompt_lookup_num_tokens": 4},
}


@pytest.fixture
def stepping(monkeypatch):
    monkeypatch.setattr(empty, "steps_on", lambda device: True)


def own(family="Llama"):
    """A model of this test's alone."""
    model = copy.deepcopy(tiny(family))
    restore(model)
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", METHODS)
def test_generate_gives_the_tokens_of_the_planned_cache(stepping, name, way):
    """Ragged rows, and a second turn of those that are neither drafted nor searched for."""
    method, options = METHODS[name]
    model, inputs = tiny("Llama"), prompt(1 if way == "drafts" else 3, 50, (0, 7, 33)[: 1 if way == "drafts" else 3])
    out = []
    for compiled in (None, False):
        cache = make_cache(model, method, compiled=compiled, **options)
        assert isinstance(cache, SteppedCache) == (compiled is None)
        torch.manual_seed(3)
        first = model.generate(**inputs, **argument(cache), pad_token_id=0, **WAYS[way])
        if way in ("greedy", "samples"):
            more = torch.cat([first, inputs["input_ids"][:, :9]], 1)
            mask = torch.cat([inputs["attention_mask"], torch.ones_like(more[:, 50:])], 1)
            first = model.generate(more, attention_mask=mask, **argument(cache), pad_token_id=0, **WAYS[way])
        out.append(first)
    assert torch.equal(*out)


@pytest.mark.parametrize("family", ["GPT-2", "OPT", "GPT-NeoX", "Qwen3-MoE", "Gemma", "Cohere"])
def test_families_step_alike(stepping, family):
    model, inputs = tiny(family), prompt(2, 40, (0, 5))
    out = [
        model.generate(
            **inputs,
            **argument(make_cache(model, "kivi", nbits=8, compiled=compiled)),
            pad_token_id=0,
            max_new_tokens=12,
        )
        for compiled in (None, False)
    ]
    assert torch.equal(*out)


@pytest.mark.parametrize("name", METHODS)
def test_books_that_advance_are_books_that_were_kept(name):
    """After steps on a device the host knows what it would have counted itself."""
    method = Full("float32") if name == "fp32" else Kivi(**METHODS[name][1], dtype="float32")
    shape, device = LayerShape(1, 32, 32), torch.device("cpu")
    layers = [make_layer(method, shape, 2, 512, device) for _ in range(2)]
    tokens = torch.randn(2, 1, 37, 32)
    for layer in layers:
        layer.append(tokens, tokens, [37, 20])
    for count in (1, 31, 2, 150):
        for _ in range(count):
            layers[0].append(tokens[:, :, :1], tokens[:, :, :1])
        layers[1].advance(count)
        names = ("row_lengths", "row_packed") if name != "fp32" else ("row_lengths",)
        assert [getattr(layers[0], one) for one in names] == [getattr(layers[1], one) for one in names]


def test_what_is_provided_for():
    counts = StepCounts(Full(), None)
    assert counts.capacity(300) == 300
    counts.started = True
    assert (counts.capacity(300), counts.capacity(40_000)) == (300 + GROWTH, 50_000)
    counts.expected = 700
    assert (counts.capacity(300), counts.capacity(300, padding=50)) == (700, 650)
    counts.expected = 100_000
    assert (counts.capacity(300), counts.capacity(40_000)) == (300 + AHEAD, 60_000)
    assert StepCounts(Full(), 512).capacity(300) == 300


def test_what_a_prompt_leaves_for_steps_is_told_without_a_wait():
    """A copy from the host that waits ends only when the device has done all that was launched before."""
    waited = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.copy_.default and not (*args, False)[2]:
                waited.append(args[0].shape)
            return function(*args, **(kwargs or {}))

    store = make_layer(Full("float32"), LayerShape(2, 32, 32), 2, 64, torch.device("cpu"))
    store.row_lengths = [5, 7]
    columns, lengths = Columns(), Lengths()
    columns.padding = [[range(2)], []]
    lengths.before(store, 2)
    store.row_lengths = [25, 27]
    with Copies():
        StepCounts(Full("float32"), 64).write(store, 2, 27, columns)
        steps = lengths.before(store, 2)
    assert steps.lengths.tolist() == [25, 27]
    assert waited == []


def test_growth_in_a_loop_of_ones_own(stepping):
    model, inputs = tiny("Llama"), prompt(1, 30)
    out = []
    for compiled in (None, False):
        cache, ids, tokens = make_cache(model, "kivi", nbits=8, compiled=compiled), inputs["input_ids"], []
        with torch.no_grad():
            for _ in range(260):
                ids = model(ids, **argument(cache)).logits[:, -1:].argmax(-1)
                tokens.append(ids)
        out.append(torch.cat(tokens, 1))
        assert cache.get_seq_length() == 289
    assert torch.equal(*out)


def test_a_cache_is_copied_and_saved_between_steps(stepping):
    model, inputs = tiny("Llama"), prompt(2, 40, (0, 5))
    cache = make_cache(model, "kivi", nbits=8, residual_length=32)
    out = model.generate(**inputs, **argument(cache), pad_token_id=0, max_new_tokens=20)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(out[:, 40:])], 1)
    copies = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), cache]
    runs = [
        model.generate(out, attention_mask=mask, **argument(one), pad_token_id=0, max_new_tokens=9) for one in copies
    ]
    assert torch.equal(runs[0], runs[2])
    assert torch.equal(runs[1], runs[2])


def test_a_model_is_given_back(stepping):
    model = own()
    before = set(vars(model)) | set(vars(model.model))
    make_cache(model, "kivi")
    again = copy.deepcopy(model)
    assert again.forward.model is again  # a copy runs its own weights
    assert "forward" in vars(model)
    restore(model)
    assert set(vars(model)) | set(vars(model.model)) == before


def test_nothing_waits_for_the_device_while_a_graph_is_captured(stepping, monkeypatch):
    """What a capture runs on the host reads no number of the device."""
    model, inputs = tiny("Llama"), prompt(2, 20, (0, 5))
    cache = make_cache(model, "fp32")
    with torch.no_grad():
        model(**inputs, **argument(cache))
        cache.counts.tracing = True

        def read(self):
            raise AssertionError("a capture would wait for the device here")

        for name in ("__bool__", "__int__", "__index__", "item", "tolist"):
            monkeypatch.setattr(torch.Tensor, name, read)
        place = {"position_ids": torch.full((2, 1), 20, device=DEVICE)}
        model(inputs["input_ids"][:, :1], attention_mask=None, **place, **argument(cache))
    monkeypatch.undo()
    assert cache.counts.ahead == 0


def test_a_wrong_mask_is_refused(stepping):
    model, inputs = tiny("Llama"), prompt(2, 20, (0, 5))
    cache = make_cache(model, "kivi")
    with torch.no_grad():
        model(**inputs, **argument(cache))
        wrong = torch.ones(2, 21, dtype=torch.long, device=DEVICE)
        if not ON_CUDA:  # there the device stops
            with pytest.raises(ValueError, match="shows padding that it dropped"):
                model(inputs["input_ids"][:, :1], attention_mask=wrong, **argument(cache))
        with pytest.raises(ValueError, match="no attention mask was given"):
            model(inputs["input_ids"][:, :1], **argument(cache))


def test_what_is_fused_is_what_models_do():
    """Norms, rotary embeddings and gates: equal but for the order of sums."""
    torch.manual_seed(0)
    dtype = torch.float16
    x = torch.randn(3, 1, 96, dtype=dtype, device=DEVICE)
    llama = modeling_llama.LlamaRMSNorm(96).to(DEVICE, dtype)
    gemma = Gemma3RMSNorm(96).to(DEVICE, dtype)
    for norm, eps, from_one in ((llama, llama.variance_epsilon, False), (gemma, gemma.eps, True)):
        norm.weight.data.normal_()
        with torch.no_grad():
            want = norm(x)
            got = rms_norm(x, norm.weight, eps, from_one)
        assert (got.float() - want.float()).abs().max() <= 2**-9 * want.float().abs().max()
        assert (got == want).float().mean() > 0.98
    query, key = (torch.randn(3, 1, heads, 40, dtype=dtype, device=DEVICE).transpose(1, 2) for heads in (4, 2))
    cos, sin = torch.randn(2, 3, 1, 40, dtype=dtype, device=DEVICE)
    want = modeling_llama.apply_rotary_pos_emb(query, key, cos, sin)
    assert all(map(torch.equal, rotate(query, key, cos, sin), want))
    alone = modeling_llama.apply_rotary_pos_emb(query, key, cos[:1], sin[:1])
    assert all(map(torch.equal, rotate(query, key, cos[:1], sin[:1]), alone))
    several = [x.expand(-1, -1, 5, -1) * torch.rand(5, 1, dtype=dtype, device=DEVICE) for x in (query, key)]
    cos, sin = torch.randn(2, 3, 5, 40, dtype=dtype, device=DEVICE)
    want = modeling_llama.apply_rotary_pos_emb(*several, cos, sin)
    assert all(map(torch.equal, rotate(*several, cos, sin), want))
    want = torch.nn.functional.silu(x) * query.reshape(-1)[: x.numel()].view_as(x)
    got = silu_product(x, query.reshape(-1)[: x.numel()].view_as(x))
    assert (got.float() - want.float()).abs().max() <= 2**-9 * want.float().abs().max()


def test_what_is_fused_is_known_statement_for_statement(monkeypatch):
    model = own()
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    rotary = modeling_llama.apply_rotary_pos_emb
    kinds = {"LlamaRMSNorm": 2 * 2 + 1, "LlamaMLP": 2}
    with fused.fused(model):
        replaced = [type(module).__name__ for module in model.modules() if "forward" in vars(module)]
        assert {name: replaced.count(name) for name in set(replaced)} == kinds
        assert modeling_llama.apply_rotary_pos_emb is not rotary
    assert not [module for module in model.modules() if "forward" in vars(module)]
    assert modeling_llama.apply_rotary_pos_emb is rotary

    class Other(modeling_llama.LlamaRMSNorm):
        def forward(self, hidden_states):
            return 2 * super().forward(hidden_states)

    assert fused._norm(Other(8)) is None


def test_what_a_graph_would_not_see_is_looked_for(stepping):
    """Other weights, a hook on any module, one more on a module that has the cache's own."""
    model = own()
    make_cache(model, "kivi")
    seen = Weights(model, is_own)
    assert not seen.moved
    assert not seen.hooked
    for module in (model, model.model, model.model.layers[1].mlp):
        hook = module.register_forward_hook(lambda *_: None)
        assert seen.hooked
        assert Weights(model, is_own).hooked  # one that was there before, too
        hook.remove()
    assert not seen.hooked
    assert weigh(seen) == 0
    model.lm_head.weight.data = model.lm_head.weight.data.clone()
    assert seen.moved
    assert Weights(model, is_own).addresses != seen.addresses
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None  # what is seen of a model does not keep it
    assert seen.moved


def test_what_a_graph_holds_is_weighed_beside_the_cache(stepping):
    model, inputs = tiny("Llama"), prompt(2, 20, (0, 5))
    cache = make_cache(model, "kivi", nbits=8)
    with torch.no_grad():
        model(**inputs, **argument(cache))
    outputs = torch.zeros(4, 5, device=DEVICE)
    graph = Graph(None, (), (), [torch.zeros(3, device=DEVICE)], None, [outputs, outputs[:1], cache], None)
    cache.graphs.held = {1: graph}
    assert cache.graphs.nbytes == 12 + 80
    assert weigh(cache) - cache.step_nbytes == cache.nbytes


def test_a_caches_memory_and_graph_end_with_it(stepping):
    """Not first where garbage is collected: a graph's all-reduces keep ``destroy_process_group()`` waiting."""
    model, inputs = tiny("Llama"), prompt(2, 20, (0, 5))
    cache = make_cache(model, "kivi", nbits=8)
    with torch.no_grad():
        out = model(**inputs, **argument(cache))
    again = rebuilt(*flattened(out))
    assert next(value for value in again.values() if isinstance(value, SteppedCache)) is cache
    assert torch.equal(again.logits, out.logits)
    assert again.logits.data_ptr() != out.logits.data_ptr()
    held = torch.nn.Identity()  # stands for a CUDA graph
    cache.graphs.held = Graph(held, (), (), [], None, *flattened(out))
    tensors = [tensor for store in cache.stores for tensor in store.tensors.values()]
    gone = [weakref.ref(each) for each in (held, *tensors, *cache.layers)]
    assert len(tensors) > 2
    gc.disable()
    try:
        del held, out, again, cache, tensors
        assert not any(each() is not None for each in gone)
    finally:
        gc.enable()


@needs_cuda
def test_steps_are_graphs(recwarn):
    """With the same logits as uncaptured; a hook is called at every step; moved weights are seen."""
    model, inputs = own(), prompt(2, 50, (0, 7))
    cache = make_cache(model, "kivi", nbits=8)
    out = model.generate(**inputs, **argument(cache), pad_token_id=0, max_new_tokens=40)
    assert cache.steps == "CUDA graph"
    calls: list[int] = []
    hook = model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    hooked = make_cache(model, "kivi", nbits=8)
    assert torch.equal(model.generate(**inputs, **argument(hooked), pad_token_id=0, max_new_tokens=40), out)
    assert len(calls) == 40
    hook.remove()
    model.lm_head.weight.data = model.lm_head.weight.data.flip(0)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(out[:, 50:])], 1)
    plain = make_cache(model, "kivi", nbits=8, compiled=False)
    with torch.no_grad():
        place = (mask[:, :-1].cumsum(1) - 1).clamp(min=0)
        model(out[:, :-1], attention_mask=mask[:, :-1], position_ids=place, **argument(plain))
    both = [
        model.generate(out, attention_mask=mask, **argument(one), pad_token_id=0, max_new_tokens=1)
        for one in (cache, plain)
    ]
    assert torch.equal(*both)
    assert not recwarn.list


@needs_cuda
def test_the_end_of_another_graph_breaks_off_no_capture(recwarn):
    """Garbage that holds a graph is there while the next one is captured, and a collection is due at every object."""
    model, inputs = own(), prompt(2, 50, (0, 7))
    thresholds = gc.get_threshold()
    for _ in range(3):
        cache = make_cache(model, "kivi", nbits=8)
        cache.itself = cache
        gc.set_threshold(1)
        try:
            model.generate(**inputs, **argument(cache), pad_token_id=0, max_new_tokens=9)
        finally:
            gc.set_threshold(*thresholds)
        assert cache.steps == "CUDA graph"
        del cache
    assert not recwarn.list


@needs_cuda
def test_a_step_that_cannot_be_captured_is_named_and_runs():
    model, inputs = own(), prompt(2, 50, (0, 7))
    inner = model.model.layers[1].mlp.forward

    def waits(x):
        return inner(x) if float(x.sum()) == float(x.sum()) else x

    model.model.layers[1].mlp.forward = waits
    sampled = {"max_new_tokens": 30, "do_sample": True, "pad_token_id": 0}
    out = []
    for compiled in (None, False):
        cache = make_cache(model, "kivi", nbits=8, compiled=compiled)
        torch.manual_seed(5)
        if compiled is None:
            with pytest.warns(RuntimeWarning, match="its step cannot be captured"):
                out.append(model.generate(**inputs, **argument(cache), **sampled))
            assert cache.steps.startswith("plain, its step cannot be captured")
        else:
            out.append(model.generate(**inputs, **argument(cache), **sampled))
    assert torch.equal(*out)
