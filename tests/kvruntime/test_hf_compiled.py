"""The compile-able cache: one graph for rows of any length, and the tokens of the uncompiled cache and the engine."""

from __future__ import annotations

import copy
import shutil
from types import SimpleNamespace

import pytest
import torch
from hf_models import DEVICE, prompt, tiny
from torch._dynamo.utils import counters
from transformers import CompileConfig

from kvruntime import Engine, make_cache
from kvruntime.hf.cache import argument
from kvruntime.hf.compiled import NAMED_METHODS, step
from kvruntime.methods.kivi.cache import KiviLayer

FULL = ("fp32", {})
HALF = ("fp16", {})
KIVI = ("kivi", {"nbits": 4, "residual_length": 32})
SEED = ("kivi-seed", {})
SINK = ("kivi", {"nbits": 2, "key_nbits": 4, "residual_length": 64, "sink_length": 5})
BOOST = ("kivi-boost", {"residual_length": 64})
PADDING = {1: (), 3: (0, 9, 3)}
ROOM = 140

# PyTorch's advice on any card that has TensorFloat32
pytestmark = [
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning"),  # PyTorch's own, to make its memory pool
]
families = pytest.mark.parametrize("family", ["GPT-2", "Llama", "Qwen3"])
methods = pytest.mark.parametrize(
    "method",
    [FULL, HALF, KIVI, SEED, SINK, BOOST],
    ids=["fp32", "fp16", "kivi", "kivi-seed", "kivi-sink", "kivi-boost"],
)


@pytest.fixture(autouse=True)
def anew():
    """No graph of another test, and an error instead of a second one."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def by(backend, *, fullgraph=True):
    """How ``generate()`` is told to compile on any device."""
    config = CompileConfig(fullgraph=fullgraph, backend=backend, mode=None)
    config._compile_all_devices = True
    return config


def new_cache(model, method, *, compiled=True, max_seq_len=ROOM):
    return make_cache(model, method[0], max_seq_len=max_seq_len, compiled=compiled, **method[1])


def generate(model, inputs, cache, config=None, new=45, **options):
    how = {"do_sample": False, "max_new_tokens": new, "compile_config": config, "disable_compile": config is None}
    return model.generate(**inputs, **argument(cache), **(how | options))


def rows_of(inputs):
    return [row[mask.bool()].tolist() for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]


CASES = [(family, method, rows) for family in ("GPT-2", "Llama") for method in (FULL, KIVI) for rows in (1, 3)]
CASES += [("Qwen3", SINK, 3), ("GPT-2", SEED, 3), ("Llama", HALF, 1)]


@pytest.mark.parametrize(("family", "method", "rows"), CASES)
def test_one_graph_for_every_length_prompt_and_cache(family, method, rows):
    """Prompts of other lengths, over flushes, and a second cache: both others' tokens, the stock cache's bytes."""
    model, config = tiny(family), by("aot_eager")
    first, stock = new_cache(model, method), new_cache(model, method, compiled=False)
    engine = Engine(model, method[0], batch_size=rows, max_seq_len=ROOM, **method[1])
    for length, cache in ((50, first), (17, first), (31, new_cache(model, method))):
        inputs = prompt(rows, length, PADDING[rows], seed=length)
        cache.reset()
        stock.reset()
        ours = generate(model, inputs, cache, config)
        assert torch.equal(ours, generate(model, inputs, stock))
        assert ours[:, length:].tolist() == engine.generate(rows_of(inputs), max_new_tokens=45)
        assert cache.nbytes == stock.nbytes > 0
        assert cache.get_seq_length() == length + 44
        assert cache.counts.positions.tolist() == engine.lengths
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize("whole", [True, False], ids=["model", "its forward"])
@families
def test_a_compiled_model_without_generate(family, whole):
    if not whole and torch.__version__ < "2.12":
        pytest.skip("PyTorch 2.11 compiles a forward without what the hooks of the modules inside it set")
    model, ids = tiny(family), prompt(2, 100)["input_ids"]
    compiled = torch.compile(model if whole else model.forward, fullgraph=True, backend="aot_eager")
    cache, stock = new_cache(model, KIVI), new_cache(model, KIVI, compiled=False)
    with torch.no_grad():
        for held in (cache, stock):
            model(ids[:, :20], **argument(held))
        for column in range(20, 100):
            got, want = (run(ids[:, column : column + 1], **argument(held)).logits
                         for run, held in ((compiled, cache), (model, stock)))  # fmt: skip
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert cache.stores[0].tensors["lengths"].tolist() == stock.stores[0].tensors["lengths"].tolist()


@pytest.mark.skipif(DEVICE.type == "cpu" and not shutil.which("g++"), reason="inductor wants a C++ compiler")
def test_inductor_copies_no_buffer(monkeypatch):
    model, cache = tiny("GPT-2"), new_cache(tiny("GPT-2"), KIVI)
    seen = set()
    original = KiviLayer.step

    def spy(layer, *args):
        seen.add(tuple(tensor.data_ptr() for tensor in layer.tensors.values()))
        return original(layer, *args)

    inputs = prompt(3, 40, PADDING[3])
    want = generate(model, inputs, new_cache(model, KIVI, compiled=False))
    monkeypatch.setattr(KiviLayer, "step", spy)
    ours = generate(model, inputs, cache, by("inductor"))
    assert seen == {tuple(tensor.data_ptr() for tensor in store.tensors.values()) for store in cache.stores}
    if DEVICE.type == "cpu":  # on a GPU fused kernels round otherwise
        assert torch.equal(ours, want)


def test_what_a_step_writes_has_a_static_address():
    """Or CUDA graphs would be skipped, or copy every buffer at every step."""
    model, cache = tiny("Llama"), new_cache(tiny("Llama"), KIVI)
    static = []

    def backend(graph, inputs):
        marks = [node.meta["tensor_dict"] for node in graph.graph.nodes if node.op == "placeholder"]
        pairs = zip(inputs, marks, strict=True)
        static.extend(x.data_ptr() for x, mark in pairs if "_dynamo_static_input_type" in mark)
        return graph

    generate(model, prompt(2, 20), cache, by(backend), new=2)
    counts = cache.counts
    written = [tensor for store in cache.stores for tensor in store.tensors.values()]
    written += [counts.positions, counts.scratch, counts.num_columns]
    assert {tensor.data_ptr() for tensor in written} <= set(static)


@methods
def test_the_operator_is_well_made(method):
    model, cache = tiny("Llama"), new_cache(tiny("Llama"), method)
    with torch.no_grad():
        model(**prompt(2, 70, (0, 8)), **argument(cache))
    layer, counts = cache.layers[0], cache.counts
    query, key, value = (torch.randn(2, heads, 1, 32, device=DEVICE) for heads in (4, 2, 2))
    held = layer.tensors, layer.constants, counts.positions, counts.scratch
    arguments = query, key, value, *held, counts.method, 32**-0.5, ROOM
    assert NAMED_METHODS[counts.method] == cache.method
    torch.library.opcheck(step, copy.deepcopy(arguments))


@pytest.mark.parametrize("method", [FULL, KIVI], ids=["fp32", "kivi"])
def test_beams_run_uncompiled_and_samples_compiled(method):
    model, inputs = tiny("Llama"), prompt(2, 40, (0, 6))
    for options, graphs in (({"num_beams": 3}, 0), ({"do_sample": True, "top_k": 5}, 1)):
        caches, out = [new_cache(model, method, compiled=compiled) for compiled in (True, False)], []
        for cache in caches:
            torch.manual_seed(0)
            out.append(generate(model, inputs, cache, by("aot_eager") if cache is caches[0] else None, 40, **options))
        assert torch.equal(*out)
        assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 4}, {"prefill_chunk_size": 16}], ids=str)
def test_several_tokens_at_once_run_uncompiled(options):
    model, inputs = tiny("GPT-2"), prompt(1, 40)
    inputs["input_ids"][:, 20:] = inputs["input_ids"][:, :20]  # something for the look-up to find
    want = generate(model, inputs, new_cache(model, FULL, compiled=False), new=20, **options)
    with torch._dynamo.config.patch(error_on_recompile=False):
        ours = generate(model, inputs, new_cache(model, FULL), by("eager", fullgraph=False), 20, **options)
    assert torch.equal(ours, want)


@methods
def test_turns_crops_and_copies(method):
    """Steps, then several tokens, then steps, each time with the host behind; a copy goes on by itself."""
    model, config, out = tiny("Llama"), by("aot_eager"), {}
    first, more = prompt(2, 20, (0, 7)), prompt(2, 9, (5, 0), seed=4)
    for compiled in (True, False):
        cache = new_cache(model, method, compiled=compiled)
        ids = generate(model, first, cache, config if compiled else None, 6)
        cache.crop(-2)
        copied = copy.deepcopy(cache)
        kept, mask = ids[:, :-3], torch.ones_like(ids[:, 20:-3])
        second = {
            "input_ids": torch.cat([kept, more["input_ids"]], 1),
            "attention_mask": torch.cat([first["attention_mask"], mask, more["attention_mask"]], 1),
        }
        out[compiled] = [generate(model, second, held, config if compiled else None, 40) for held in (cache, copied)]
        assert torch.equal(*out[compiled])
        assert cache.get_seq_length() == 23 + 9 + 39
    assert torch.equal(out[True][0], out[False][0])
    assert counters["stats"]["unique_graphs"] == 1


def test_another_batch_after_reset():
    model, cache = tiny("GPT-2"), new_cache(tiny("GPT-2"), KIVI)
    with torch._dynamo.config.patch(error_on_recompile=False):
        for rows in (3, 1):
            inputs = prompt(rows, 30, PADDING[rows])
            cache.reset()
            ours = generate(model, inputs, cache, by("aot_eager"), 20)
            assert torch.equal(ours, generate(model, inputs, new_cache(model, KIVI, compiled=False), new=20))
            assert cache.batch_size == rows


def test_refused():
    model, inputs = tiny("Llama"), prompt(2, 20, (0, 4))
    with pytest.raises(ValueError, match="max_seq_len None: a compiled cache's buffers do not grow"):
        make_cache(model, "kivi", compiled=True)
    spread = copy.deepcopy(model)
    spread.lm_head.to("meta")
    with pytest.raises(
        ValueError, match=rf"the model lies on {DEVICE.type}.*, meta: a compiled cache's steps run on one"
    ):
        new_cache(spread, KIVI)
    for method, config in ((FULL, by("aot_eager")), (KIVI, None)):
        cache = new_cache(model, method, max_seq_len=30)
        with pytest.raises(ValueError, match="is full: it was made for max_seq_len 30"):
            generate(model, inputs, cache, config, 20)
        assert cache.counts.positions.tolist() == [30, 26]
    ids, mask = inputs.values()
    one = SimpleNamespace(ids=ids[:, :1], mask=torch.cat([mask, mask[:, -1:]], 1))
    cache = new_cache(model, FULL)
    with torch.no_grad():
        model(**inputs, **argument(cache))
        with pytest.raises(ValueError, match="no attention mask was given"):
            model(one.ids, **argument(cache))
        with pytest.raises(ValueError, match="a batch of 1 rows for a cache that holds 2"):
            model(one.ids[:1], attention_mask=one.mask[:1], **argument(cache))
        with pytest.raises(ValueError, match=r"shape \[2, 1, 1, 21\]: a step takes a 2-D one or none"):
            model(one.ids, attention_mask=one.mask[:, None, None].bool(), **argument(cache))
        if DEVICE.type == "cpu":  # a GPU would stop
            for wrong in (one.mask[:, 1:], one.mask.flip(0), torch.cat([one.mask, one.mask[:, -1:]], 1)):
                with pytest.raises(ValueError, match="hides tokens that the cache holds or shows padding"):
                    model(one.ids, attention_mask=wrong, **argument(cache))
        assert cache.get_seq_length() == 20


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
class TestOnCuda:
    """``generate()`` compiles by itself there, with CUDA graphs."""

    @pytest.mark.parametrize(
        ("family", "method", "rows", "dtype"),
        [(*case, torch.float16) for case in CASES] + [(*case, torch.float32) for case in CASES[1:7:2]],
    )
    def test_the_engines_tokens(self, family, method, rows, dtype):
        model = tiny(family, dtype)
        engine = Engine(model, method[0], batch_size=rows, max_seq_len=ROOM, **method[1])
        cache = new_cache(model, method)
        for length in (50, 17):
            inputs = prompt(rows, length, PADDING[rows], seed=length)
            cache.reset()
            out = model.generate(
                **inputs, **argument(cache), max_new_tokens=60, do_sample=False, output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
            logits = torch.stack(out.logits, 1).float()
            ours, theirs = out.sequences[:, length:].tolist(), engine.generate(rows_of(inputs), max_new_tokens=60)
            for row, (got, want) in enumerate(zip(ours, theirs, strict=True)):
                if got != want:  # fused kernels round otherwise: only where two tokens are as good as equal
                    at = next(index for index, pair in enumerate(zip(got, want, strict=True)) if pair[0] != pair[1])
                    gap = float(logits[row, at, got[at]] - logits[row, at, want[at]])
                    peak = float(logits[row, at].abs().max())
                    assert gap < (0.02 if dtype == torch.float16 else 1e-3) * peak, (row, at, gap, peak)
        assert counters["stats"]["unique_graphs"] == 1
        assert counters["inductor"]["cudagraph_skips"] == 0
        assert cache.counts.positions.tolist() == engine.lengths

    def test_a_row_that_is_full_writes_nowhere_else(self):
        """generate() stops with the error before the step, not after it."""
        model, cache = tiny("Llama", torch.float16), new_cache(tiny("Llama", torch.float16), KIVI, max_seq_len=70)
        with pytest.raises(ValueError, match="is full: it was made for max_seq_len 70"):
            model.generate(**prompt(2, 50), **argument(cache), max_new_tokens=60, do_sample=False)
        assert cache.counts.positions.tolist() == [70, 70]
