"""A prompt's keys and values: the layers of one forward are stored together, each as it would be alone.

On a CUDA device the kernels run there; elsewhere in Triton's interpreter (conftest.py), to which CPU tensors are passed
off as a device's.
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager

import pytest

torch = pytest.importorskip("torch", reason="the runtime extra (torch) is not installed")
pytest.importorskip("triton", reason="the runtime extra (triton) is not installed")
pytest.importorskip("transformers", reason="the runtime extra (transformers) is not installed")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel  # noqa: E402

from kvruntime import Engine, make_cache  # noqa: E402
from kvruntime.hf import cache as hf_cache  # noqa: E402
from kvruntime.hf.attention import attention  # noqa: E402
from kvruntime.hf.cache import AppendQueue, PendingUpdate  # noqa: E402
from kvruntime.methods.kivi import append, first_record  # noqa: E402
from kvruntime.methods.kivi.cache import KiviLayer  # noqa: E402
from kvsim.layout import LayerShape  # noqa: E402
from kvsim.methods import Kivi, kivi_boost, kivi_seed  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, ROWS, LAYERS = 2, 2, 2
KERNELS = {"freeze_kernel": first_record, "pack_kernel": append, "store_kernel": append}
"""The storing kernels, and where they are launched."""
BOOSTED = dict.fromkeys(("weigh_kernel", "order_kernel"), first_record) | {
    "pack_kernel": append,
    "store_kernel": append,
}
"""Those of boosted channels."""
METHODS = {
    "2-bit g32": (Kivi(residual_length=64), 64),
    "2-bit g64": (Kivi(group_size=64, residual_length=64), 128),
    "3-bit sink": (Kivi(nbits=3, residual_length=32, sink_length=3), 96),
    "seed": (kivi_seed(), 64),
}


@contextmanager
def as_device():
    """CPU tensors say that they lie on a CUDA device, so that the kernels run."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setattr(torch.Tensor, "is_cuda", property(lambda x: True), raising=False)
        yield


def layers(method: Kivi, dim: int) -> list[KiviLayer]:
    return [KiviLayer(method, LayerShape(HEADS, dim, dim), ROWS, 512, DEVICE) for _ in range(LAYERS)]


def prompts(dim: int, size: int, lengths: list[int] | None, seed: int) -> list[tuple]:
    """A layer's key, value and lengths each; keys are views, as a model splits them off."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(LAYERS):
        both = torch.randn(ROWS, size, 2 * HEADS, dim, generator=generator).half().to(DEVICE).transpose(1, 2)
        out.append((both[:, :HEADS], both[:, HEADS:], lengths))
    return out


def counted(monkeypatch: pytest.MonkeyPatch, run: bool = True, kernels: dict = KERNELS) -> Counter:
    """Launches of the storing kernels from now on."""
    count: Counter = Counter()

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(kernels[name], name)

        def __getitem__(self, grid: tuple[int, ...]):
            count[self.name] += 1
            return self.kernel[grid] if run else lambda *args, **kwargs: None

    for name in kernels:
        monkeypatch.setattr(kernels[name], name, Kernel(name))
    return count


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_layers_stored_together_hold_what_each_holds_alone(
    name: str, ragged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, dim = METHODS[name]
    together, alone = layers(method, dim), layers(method, dim)
    count = counted(monkeypatch)
    for turn, size in enumerate((140, 70)):
        new = prompts(dim, size, [size, size - 30] if ragged else None, turn)
        with as_device():
            KiviLayer.append_all([(layer, *one) for layer, one in zip(together, new, strict=True)])
        assert count == dict.fromkeys(list(KERNELS)[name != "seed" :], turn + 1)
    for turn, size in enumerate((140, 70)):
        for layer, one in zip(alone, prompts(dim, size, [size, size - 30] if ragged else None, turn), strict=True):
            layer.append(*one)  # the reference, without a device
    for one, other in zip(together, alone, strict=True):
        assert (one.row_lengths, one.row_packed) == (other.row_lengths, other.row_packed)
        assert min(one.row_packed) > 0
        for buffer in one.tensors:
            assert torch.equal(*(held.tensors[buffer].cpu().view(torch.uint8) for held in (one, other))), buffer
    assert not torch.equal(together[0].tensors["records"], together[1].tensors["records"])


def shifted(x: torch.Tensor) -> torch.Tensor:
    """``x`` where no 16 bytes begin."""
    whole = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    return whole[1:].view(x.shape).copy_(x)


@pytest.mark.parametrize("why", ["lengths", "strides", "alignment", "channels", "dtype"])
def test_layers_that_differ_are_stored_alone(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, dim = METHODS["2-bit g32"]
    together, alone = layers(method, dim), layers(method, dim)
    new = prompts(dim, 100, None, 0)
    key, value, _ = new[1]
    with as_device():
        if why == "lengths":
            for held in (together, alone):
                held[1].append(*prompts(dim, 5, None, 1)[0])
        elif why == "strides":
            new[1] = key.contiguous(), value, None
        elif why == "alignment":
            new[1:] = [(shifted(one[0].contiguous()), one[1], None) for one in new[1:]]
            new[0] = new[0][0].contiguous(), new[0][1], None
        elif why == "channels":
            new = [(one[0].mT.contiguous().mT, one[1], None) for one in new]
        else:
            new[1] = key.float(), value.float(), None
        count = counted(monkeypatch)
        KiviLayer.append_all([(layer, *one) for layer, one in zip(together, new, strict=True)])
    assert count == {"pack_kernel": LAYERS, "store_kernel": LAYERS}
    for layer, one in zip(alone, new, strict=True):
        layer.append(*one)
    for one, other in zip(together, alone, strict=True):
        for buffer in one.tensors:
            assert torch.equal(*(held.tensors[buffer].cpu().view(torch.uint8) for held in (one, other))), buffer


def engine(num_layers: int, method: str) -> Engine:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"vocab_size": 64, "n_embd": 128, "n_head": 2, "n_positions": 256}
        model = GPT2LMHeadModel(GPT2Config(**sizes, n_layer=num_layers, bos_token_id=0, eos_token_id=0))
    return Engine(model.to(DEVICE).eval(), method, batch_size=2, max_seq_len=200)


class Operators(TorchDispatchMode):
    """Counts the operators that are no views, and the tensors made of the host's numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.total, self.uploads = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.uploads += func is torch.ops.aten.lift_fresh.default
        self.total += not func.is_view
        return func(*args, **kwargs or {})


def work(num_layers: int, method: str, prompt: list[list[int]]) -> tuple[int, int, Counter]:
    """Operators, uploads and storing launches of a prefill; without a device its kernels are counted, not run."""
    one = engine(num_layers, method)
    one.prefill(prompt)  # captures its graphs
    with pytest.MonkeyPatch.context() as patch:
        count = counted(patch, run=DEVICE == "cuda")
        append_all = KiviLayer.append_all

        def on_device(held: list[tuple]) -> None:
            with as_device():
                append_all(held)

        patch.setattr(KiviLayer, "append_all", staticmethod(on_device))
        with Operators() as operators:
            one.prefill(prompt)
    return operators.total, operators.uploads, count


@pytest.mark.parametrize("prompt", [[[1] * 150] * 2, [[1] * 150, [1] * 90]], ids=["even", "ragged"])
@pytest.mark.parametrize("method", ["kivi", "kivi-seed"])
def test_a_layer_of_a_prompt_costs_the_host_no_more_than_uncompressed(method: str, prompt: list[list[int]]) -> None:
    """Time to first token of a small model is host time: launches and uploads do not grow with the layers."""
    (few, uploads, count), (many, more_uploads, more) = (work(layers, method, prompt) for layers in (2, 6))
    assert count == more == dict.fromkeys(list(KERNELS)[method != "kivi-seed" :], 1)
    assert uploads == more_uploads
    least, most = (work(layers, "fp32", prompt)[0] for layers in (2, 6))
    assert many - few < most - least


@pytest.mark.parametrize("lengths", [None, [150, 150], [220, 140], [0, 220]], ids=str)
def test_a_boosted_prompt_is_stored_in_four_launches(lengths: list[int] | None, monkeypatch) -> None:
    """Beside them the layer's lengths are filled in, or where rows differ copied to the device with the tokens' counts.
    """
    key, value, _ = prompts(64, 220, None, 0)[0]
    query = torch.randint(-9, 10, (ROWS, 220, 4 * HEADS, 64), generator=torch.Generator().manual_seed(1)).half()
    query = (query * torch.linspace(0, 2, 64).round().half()).to(DEVICE).transpose(1, 2)
    shape = LayerShape(HEADS, 64, 64)
    method = kivi_boost(residual_length=64)
    stored, alone, launched = (KiviLayer(method, shape, ROWS, 512, device) for device in (DEVICE, "cpu", DEVICE))
    for layer in (stored, alone, launched):
        layer.tensors["key_order"][:] = 200
    with as_device():
        stored.append(key, value, lengths, query)
    alone.append(key.cpu(), value.cpu(), lengths, query.cpu())
    assert max(stored.row_packed) > 0
    for name, tensor in stored.tensors.items():
        assert torch.equal(tensor.cpu().view(torch.uint8), alone.tensors[name].view(torch.uint8)), name
    count = counted(monkeypatch, run=DEVICE == "cuda", kernels=BOOSTED)
    with as_device(), Operators() as operators:
        launched.append(key, value, lengths, query)
    assert count == dict.fromkeys(BOOSTED, 1)
    ragged = lengths is not None and len(set(lengths)) > 1
    assert operators.uploads == 3 * ragged
    assert ragged or operators.total == 2 + (lengths is not None)


@pytest.mark.parametrize(("method", "kept"), [("kivi-boost", 256), ("evict:policy=snapkv,budget=128", 300)])
def test_queries_come_as_methods_look_at_them(method: str, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Boosted channels are told the last queries and nothing of a scale, by a view; who compares scores with others'
    is told it all."""
    layer = make_cache(engine(1, "kivi").model, method, max_seq_len=400).layers[0]
    query, key, value = torch.randn(3, 2, 2, 300, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    layer.scale = 1.0  # 64**-0.5 is usual
    layer.pend(key, value)
    given = []
    monkeypatch.setattr(layer.store, "append", lambda *args: given.append(args[3]))
    with Operators() as operators:
        layer.append_first(key, value, None, query)
    assert given[0].shape == (2, 2, kept, 64)
    if method == "kivi-boost":
        assert torch.equal(given[0], query[:, :, -256:])
        assert not operators.total
    else:
        torch.testing.assert_close(given[0], 8 * query)


def test_what_is_held_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = engine(5, "kivi")
    plain.prefill([[1] * 150] * 2)
    monkeypatch.setattr(hf_cache, "HELD_NBYTES", 2 * (2 * 2 * 150 * 128 * 4))  # two layers' keys and values, float32
    sizes = []
    append_all = KiviLayer.append_all

    def sized(held: list[tuple]) -> None:
        sizes.append(len(held))
        append_all(held)

    monkeypatch.setattr(KiviLayer, "append_all", staticmethod(sized))
    bounded = engine(5, "kivi")
    bounded.prefill([[1] * 150] * 2)
    assert sizes == [2, 2, 1]
    for one, other in zip(plain.cache.stores, bounded.cache.stores, strict=True):
        assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)
    assert all(layer.held is None for layer in bounded.cache.layers)


def test_a_layer_that_runs_twice_in_a_forward_reads_what_it_stored() -> None:
    model = engine(1, "kivi").model
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 2, 100, 64, generator=generator).to(DEVICE) for _ in range(3))
    found = []
    for held in (None, AppendQueue()):
        layer = make_cache(model, "kivi", max_seq_len=200).layers[0]
        layer.held = held
        for part in (slice(70), slice(70, 100)):
            new = query[:, :, part], key[:, :, part], value[:, :, part]
            pending = layer.pend(*new[1:])
            assert all(isinstance(x, PendingUpdate) for x in pending)
            found.append(attention(model, new[0], *pending, None)[0])
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])
