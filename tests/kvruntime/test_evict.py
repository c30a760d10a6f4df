"""Eviction over another method: which tokens are kept, the bytes they take, and the whole path under generate()."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the runtime extra (torch) is not installed")
pytest.importorskip("transformers", reason="the runtime extra (transformers) is not installed")

from hf_models import DEVICE, prompt, tiny  # noqa: E402

from kvruntime import Engine, make_cache  # noqa: E402
from kvruntime.bench.harness.weigh import weigh  # noqa: E402
from kvruntime.hf.cache import argument  # noqa: E402
from kvruntime.hf.models import layer_shapes  # noqa: E402
from kvruntime.methods import make_layer  # noqa: E402
from kvsim.engines.kvruntime import Kvruntime  # noqa: E402
from kvsim.layout import LayerShape, nbytes  # noqa: E402
from kvsim.methods import Evict, Full, Kivi, kivi_seed  # noqa: E402
from kvsim.models.load import load_model  # noqa: E402

SHAPE = LayerShape(2, 32, 32)
KIVI = Kivi(8, group_size=16, residual_length=32)
PLAIN = Evict(budget=24, sink_length=3, inner=Full("float32"))


def tokens(count: int, batch_size: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value; the first channel of a value tells its token's number."""
    generator = torch.Generator().manual_seed(seed)
    key, value = (torch.randn(batch_size, 2, count, 32, generator=generator) for _ in range(2))
    value[..., 0] = torch.arange(count)
    return key, value


def numbers(layer, row: int, head: int = 0) -> list[int]:
    """Which tokens a row of the layer holds."""
    return layer.tokens(row)[1][head, :, 0].round().int().tolist()


@pytest.mark.parametrize("chunks", [[40], [10, 30], [1] * 40, [24, 1, 15], [30, 2, 2, 2, 2, 2]])
def test_the_sink_and_the_newest_are_kept(chunks: list[int]) -> None:
    key, value = tokens(40)
    layer = make_layer(PLAIN, SHAPE, 2, None, torch.device("cpu"))
    done = 0
    for count in chunks:
        layer.append(key[:, :, done : done + count], value[:, :, done : done + count])
        done += count
        assert max(layer.row_lengths) <= 24
    assert numbers(layer, 0) == numbers(layer, 1) == [0, 1, 2, *range(19, 40)]
    assert layer.seq_lengths == [40, 40]
    query = torch.randn(2, 4, 1, 32, generator=torch.Generator().manual_seed(1))
    kept = [x[:, :, [0, 1, 2, *range(19, 40)]].repeat_interleave(2, 1) for x in (key, value)]
    want = ((query @ kept[0].transpose(2, 3)) * 32**-0.5).softmax(-1) @ kept[1]
    assert torch.allclose(layer.attend(query, 32**-0.5), want, atol=1e-4)


def test_rows_of_their_own_lengths() -> None:
    """Left padding is no token: a row evicts when it is full itself."""
    key, value = tokens(40)
    layer = make_layer(PLAIN, SHAPE, 2, None, torch.device("cpu"))
    layer.append(key[:, :, :30], value[:, :, :30], [30, 8])
    assert numbers(layer, 0) == [0, 1, 2, *range(9, 30)]
    assert numbers(layer, 1) == list(range(22, 30))
    layer.append(key[:, :, 30:], value[:, :, 30:])
    assert numbers(layer, 0) == [0, 1, 2, *range(19, 40)]
    assert numbers(layer, 1) == list(range(22, 40))
    layer.reorder(torch.tensor([1, 1, 0]))
    assert (numbers(layer, 0), layer.seq_lengths) == (list(range(22, 40)), [18, 18, 40])
    layer.reset()
    assert layer.seq_lengths == [0, 0, 0]


@pytest.mark.parametrize("chunks", [[400], [100, 300], [150, *[1] * 250], [90, 40, 7, 263]])
@pytest.mark.parametrize("sink", [0, 4])
def test_packed_records_leave_and_are_not_packed_again(chunks: list[int], sink: int) -> None:
    """What is kept reads back as it would had nothing left: no token is quantized twice."""
    inner = Kivi(8, group_size=16, residual_length=32, sink_length=sink, dtype="float32")
    method = Evict(budget=128, sink_length=sink, inner=inner)
    layer, whole = (make_layer(each, SHAPE, 2, None, torch.device("cpu")) for each in (method, inner))
    key, value = tokens(400)
    done = 0
    for count in chunks:
        for one in (layer, whole):
            one.append(key[:, :, done : done + count], value[:, :, done : done + count])
        done += count
        assert max(layer.row_lengths) <= 128
        assert {b.name: b.shape for b in method.buffers(SHAPE, 2, layer.num_provided)} == {
            name: tuple(tensor.shape) for name, tensor in layer.tensors.items()
        }
    held = layer.row_lengths[0]
    assert held > 128 - 32 - sink
    for mine, its in zip(layer.tokens(0), whole.tokens(0), strict=True):
        assert torch.equal(mine[:, :sink], its[:, :sink])
        if len(chunks) > 1 and chunks[0] <= 128:  # of a longer prompt the newest are packed from another start
            assert torch.equal(mine[:, sink:], its[:, 400 - (held - sink) :])
    assert layer.attend(torch.randn(2, 4, 1, 32), 1.0).isfinite().all()


def test_snapkv_keeps_what_the_last_queries_attend_to() -> None:
    method = Evict(budget=16, sink_length=2, inner=Full("float32"), policy="snapkv", observed=4, kernel_size=1)
    key, value = tokens(60, 1)
    query = torch.randn(1, 4, 60, 32, generator=torch.Generator().manual_seed(2))
    wanted = {0: [11, 25, 40], 1: [7, 30, 50]}  # a head its own
    for head, places in wanted.items():
        for place in places:
            key[:, head, place] = 6 * query[:, 2 * head : 2 * head + 2, -4:].mean((1, 2))
    layer = make_layer(method, SHAPE, 1, None, torch.device("cpu"))
    assert layer.wants_query
    layer.append(key, value, None, query)
    for head, places in wanted.items():
        kept = numbers(layer, 0, head)
        assert len(kept) == 16
        assert {0, 1, 56, 57, 58, 59, *places} <= set(kept)
    layer.append(*(x[:, :, :1] for x in tokens(1, 1)))
    assert layer.row_lengths == [16]
    with pytest.raises(ValueError, match="came without its queries"):
        make_layer(method, SHAPE, 1, None, torch.device("cpu")).append(key, value)


@pytest.mark.parametrize(
    "method",
    [
        Evict(budget=48, sink_length=4),
        Evict(budget=96, sink_length=0, inner=KIVI),
        Evict(budget=48, sink_length=4, policy="snapkv", observed=8),
        Evict(budget=96, sink_length=0, inner=KIVI, policy="snapkv", observed=8),
    ],
    ids=lambda method: method.name,
)
def test_under_generate(method: Evict) -> None:
    """Ragged prompts longer than the budget, then more tokens than it: bytes as predicted; the first tokens as stock
    where the prompt fits."""
    model, inputs = tiny("Llama"), prompt(3, 130, (0, 60, 120))
    cache = make_cache(model, method)
    settings = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False}
    out = model.generate(**inputs, **argument(cache), **settings)
    assert out.shape == (3, 170)
    assert cache.get_seq_length() == 169
    shapes = layer_shapes(model)
    size = sum(nbytes(method.buffers(shape, 3, cache.num_provided)) for shape in shapes)
    assert weigh(cache) - cache.step_nbytes == cache.nbytes == size
    assert size == sum(nbytes(method.buffers(shape, 3, 10_000)) for shape in shapes)  # bounded
    with pytest.raises(ValueError, match=r"has evicted tokens: they cannot be read back"):
        cache.layers[0].keys
    cache.reset()
    short = prompt(1, 20)
    want = model.generate(**short, **settings)
    have = model.generate(**short, **argument(cache), **settings)
    assert torch.equal(want[:, :24], have[:, :24])


def test_what_cannot_be_evicted_is_refused() -> None:
    model = tiny("Llama")
    with pytest.raises(ValueError, match="no step that a compiled cache could run"):
        make_cache(model, PLAIN, compiled=True, max_seq_len=64)
    if DEVICE == "cuda":
        with pytest.raises(ValueError, match="no step that the engine could capture"):
            Engine(model, PLAIN, batch_size=1, max_seq_len=64)
    for method, message in (
        (Evict(budget=100, inner=kivi_seed()), "cannot forget its oldest tokens"),
        (Evict(budget=40, sink_length=0, inner=KIVI), "budget 40: allowed are 64 and above"),
        (Evict(budget=200, sink_length=4, inner=KIVI), "keeps its first 0 tokens, not 4"),
    ):
        with pytest.raises(ValueError, match=message):
            make_layer(method, SHAPE, 1, None, torch.device("cpu"))
        with pytest.raises(ValueError, match=message):  # the planner of the same cache says the same
            Kvruntime().parts(load_model("gpt2"), method, 1, 512)
    layer = make_layer(PLAIN, SHAPE, 1, None, torch.device("cpu"))
    key, value = tokens(30, 1)
    layer.append(key[:, :, :20], value[:, :, :20])
    layer.crop(18)
    assert layer.row_lengths == layer.seq_lengths == [18]
    layer.append(key[:, :, 18:], value[:, :, 18:])
    with pytest.raises(ValueError, match="tokens that would come back are evicted"):
        layer.crop(29)
