"""Steps that the host plans: one launch after the other, as they were recorded, and the mask held in two."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="the runtime extra (torch) is not installed")
pytest.importorskip("transformers", reason="the runtime extra (transformers) is not installed")
pytest.importorskip("triton", reason="the runtime extra (triton) is not installed")

from count_ops import Ops  # noqa: E402
from hf_models import DEVICE, prompt, tiny  # noqa: E402

from kvruntime import make_cache  # noqa: E402
from kvruntime.hf.attention import attention as attend_through_cache  # noqa: E402
from kvruntime.hf.cache import Cache, argument  # noqa: E402
from kvruntime.hf.padding import HIDES, Columns  # noqa: E402
from kvruntime.kernels import launch  # noqa: E402
from kvruntime.kernels.launch import LaunchRecord, launch_kernel, recorded  # noqa: E402
from kvruntime.kernels.reference import Scores  # noqa: E402
from kvruntime.methods import Steps, make_layer  # noqa: E402
from kvruntime.methods.kivi import attention, step  # noqa: E402
from kvruntime.methods.kivi import cache as kivi_cache  # noqa: E402
from kvruntime.methods.kivi.cache import KiviLayer  # noqa: E402
from kvsim.layout import LayerShape  # noqa: E402
from kvsim.methods import Kivi, kivi_boost  # noqa: E402

ON_CUDA = DEVICE.type == "cuda"


@pytest.fixture
def on_device(monkeypatch):
    """A layer on the CPU takes the kernels, which Triton's interpreter runs."""
    if not ON_CUDA:
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
        monkeypatch.setattr(attention, "num_multiprocessors", lambda _: 1)
        monkeypatch.setattr(kivi_cache, "_fast", lambda: None)


def test_launches_made_again_are_those_of_a_step(on_device, monkeypatch):
    """Over records that are packed on the way and tensors that lie elsewhere each time; planned anew where shapes
    change, where buffers grow, and where a query begins at another place in a line of memory."""
    torch.manual_seed(0)
    scores = Scores(5.0, torch.linspace(-2, 3, 4).to(DEVICE))
    method = Kivi(nbits=2, residual_length=32, sink_length=3, value_group_size=32)
    layers = [make_layer(method, LayerShape(2, 32, 32), 2, None, DEVICE) for _ in range(2)]
    tokens = torch.randn(2, 2, 130, 32, device=DEVICE)
    lengths = torch.tensor([130, 61], dtype=torch.int32, device=DEVICE)
    scratch = [layer.scratch(4) for layer in layers]
    for layer in layers:
        layer.append(tokens, tokens, [130, 61])
    made: list[bool] = []
    again = LaunchRecord.__call__

    def counted(self, *given):
        out = again(self, *given)
        made.append(out is not None)
        return out

    monkeypatch.setattr(LaunchRecord, "__call__", counted)
    for turn in range(14):
        if turn == 10:
            for layer in layers:
                layer.provide(300)
        room = torch.randn(2, 8, 1, 33, device=DEVICE)
        query, key, value = (x[..., :32].contiguous() for x in room.split((4, 2, 2), 1))
        if turn == 6:  # 4 bytes further than before
            query = torch.empty(2 * 4 * 32 + 1, device=DEVICE)[1:].view(2, 4, 1, 32).copy_(query)
        out = []
        for layer, zeros, fresh in zip(layers, scratch, (True, False), strict=True):
            steps = Steps(lengths, lengths, zeros, layer.num_provided)
            if fresh:
                layer.again = None
            out.append(layer.step(query, key, value, 0.2, steps, scores=scores))
            layer.advance(1)
        assert torch.equal(*out)
        for name, tensor in layers[0].tensors.items():
            assert torch.equal(tensor, layers[1].tensors[name]), (turn, name)
        lengths += 1
    assert made == [True] * 4 + [False] * 2 + [True] * 2 + [True] * 2
    assert layers[0].row_lengths == lengths.tolist()
    assert layers[1].row_packed == layers[1].tensors["lengths"][1].tolist()
    assert copy.deepcopy(layers[1]).again is None


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("grid", [(5,), (5, 7), (5, 7, 2)], ids=str)
def test_a_compiled_kernel_is_given_three_sizes_of_a_grid(grid, direct, hooked, monkeypatch):
    """Triton 3.6 reads all three; what is compiled is played here, two addresses and a number are its values: of a
    tensor that a call is given, and of one that is held and moves once.  Where a hook is set, Triton's own launch
    tells it.  ``direct``: by what its launcher calls, of a kernel without scratch memory."""
    calls: list[object] = []
    told: list[object] = []
    if hooked:
        monkeypatch.setattr(launch.knobs.runtime, "launch_enter_hook", told.append)

    class Kernel:
        arg_names = ("x_ptr", "y_ptr", "n")

        @staticmethod
        def fn(x_ptr, y_ptr, n): ...

        def __getitem__(self, sizes):
            return lambda *_, **__: Compiled()

    class Launch:
        def __call__(self, x, y, z, stream, function, together, early, scratch, profile, *given):
            assert direct
            assert (stream, function, together, early, scratch, profile) == (7, "function", False, True, None, None)
            assert given[:4] == ("metadata", None, None, None)
            calls.append(((x, y, z), given[4:]))

    class Launcher:
        launch, launch_cooperative_grid, launch_pdl = Launch(), False, True
        global_scratch_size, profile_scratch_size = 0, 0

        def __call__(self, x, y, z, stream, function, metadata, metadata_for_hooks, enter, leave, *values):
            assert (stream, direct) == (7, False)
            assert (function, metadata, enter, leave) == ("function", "metadata", None, None)
            calls.append(((x, y, z), values))

    class Compiled:
        function, packed_metadata, run = "function", "metadata", Launcher()

        def __getitem__(self, sizes):
            x, y, z = sizes

            def runner(*values, stream=None):
                told.append(stream)
                calls.append(((x, y, z), values))

            return runner

    x, *elsewhere, y, moved = (torch.zeros(4) for _ in range(5))

    def call():
        launch_kernel(Kernel(), grid, x, y, n=3, num_warps=1)
        return torch.zeros(1)

    monkeypatch.setattr(launch, "driver", SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda _: 7)))
    monkeypatch.setattr(launch, "DIRECT", direct)
    _, record = recorded(call, [x, y])
    given = [(x, y), (elsewhere[0], y), (elsewhere[1], moved), (elsewhere[1], moved), (x, moved)]
    for each in given:
        record(each, 1)
    assert told == [7] * 5 * hooked
    sizes = (*grid, 1, 1)[:3]
    assert calls == [(sizes, (one.data_ptr(), held.data_ptr(), 3)) for one, held in given]


@pytest.mark.parametrize("way", [{}, {"num_beams": 2}, {"do_sample": True, "top_k": 9}], ids=str)
def test_a_step_is_an_append_and_an_attention(way, monkeypatch):
    """Ragged rows over several records, and a second turn."""
    model, inputs, out = tiny("Llama"), prompt(3, 50, (0, 7, 33)), []
    for prefers in (False, True):
        monkeypatch.setattr(KiviLayer, "prefers_steps", prefers)
        cache = make_cache(model, "kivi", nbits=8, residual_length=32, compiled=False)
        torch.manual_seed(3)
        first = model.generate(**inputs, **argument(cache), pad_token_id=0, max_new_tokens=40, **way)
        if "num_beams" not in way:
            more = torch.cat([first, inputs["input_ids"][:, :9]], 1)
            mask = torch.cat([inputs["attention_mask"], torch.ones_like(more[:, 50:])], 1)
            first = model.generate(
                more, attention_mask=mask, **argument(cache), pad_token_id=0, max_new_tokens=9, **way
            )
        out.append(first)
    assert torch.equal(*out)


def test_the_mask_of_a_step_is_held_against_what_was_cached(on_device):
    columns = Columns()
    columns.padding = [[], [range(2), range(5, 6)]]
    real = torch.ones(2, 9, dtype=torch.bool, device=DEVICE)
    real[1, [0, 1, 5]] = False
    checked = columns.step_mask(real)
    assert checked.shape == (2, 1, 1, 1)
    assert columns.step_mask(torch.cat([real, real[:, -1:]], 1)) is checked
    assert columns.read(checked, 8, 1, 2) is None
    assert columns.padding == [[], [range(2), range(5, 6)]]
    if not ON_CUDA:  # there the device stops
        for wrong in (torch.ones_like(real), real & (torch.arange(9) < 8), real & (torch.arange(9) != 4)):
            with pytest.raises(RuntimeError, match=HIDES[:40]):
                columns.step_mask(wrong)
    assert columns.step_mask(real[:1]) is None  # another batch
    assert columns.step_mask(real[:, :6]) is None  # a row whose newest column was padding
    columns.padding = [[], [range(8)]]
    assert columns.step_mask(real) is None  # a row without a token may be given padding


def test_a_generation_never_looks_at_its_masks(on_device, monkeypatch):
    """After the prompt's: looking costs the host a dozen launches a token."""
    model, inputs = tiny("Llama"), prompt(2, 20, (0, 5))
    looked: list[int] = []
    count = Columns._count

    def counted(self, mask, start, *more):
        looked.append(0 if mask is None or mask.shape[3] == 1 else start)
        return count(self, mask, start, *more)

    monkeypatch.setattr(Columns, "_count", counted)
    cache = make_cache(model, "fp32", compiled=False)
    out = model.generate(**inputs, **argument(cache), pad_token_id=0, max_new_tokens=12)
    assert not any(looked)
    assert torch.equal(out, model.generate(**inputs, pad_token_id=0, max_new_tokens=12))


@pytest.mark.parametrize("method", [Kivi(residual_length=32), kivi_boost(residual_length=64)], ids=["kivi", "boost"])
def test_what_a_step_of_a_layer_costs_the_host(on_device, method, monkeypatch):
    """Beside its launches, which are played: torch's operators, and functions of Python."""
    launched: list[int] = []

    class Played:
        function = packed_metadata = None

        def run(self, *values):
            launched.append(len(values))

        def __getitem__(self, sizes):
            return self.run

    def played(kernel, grid, *args, **options):
        calls = getattr(launch._recording, "calls", None)
        if calls is not None:
            calls.append((kernel, Played(), grid, args, options))

    for module in (step, attention):
        monkeypatch.setattr(module, "launch_kernel", played)
    monkeypatch.setattr(launch, "driver", SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda _: 0)))
    monkeypatch.setattr(KiviLayer, "prefers_steps", True)
    cache = Cache(replace(method, dtype="float32"), 1)
    shape = (1, 1, 40, 64)
    cache.update(torch.randn(shape, device=DEVICE), torch.randn(shape, device=DEVICE), 0)
    module, cache.forward.running = torch.nn.Module(), True
    x = torch.randn(1, 1, 1, 64, device=DEVICE)

    def one():
        key, value = cache.update(x, x, 0)
        attend_through_cache(module, x, key, value, None, scaling=0.125)

    for _ in range(3):
        one()
    assert launched
    launched.clear()
    with torch.no_grad(), Ops() as ops:
        one()
    counted = {"add_": 1} if ON_CUDA else {}  # of the rows' lengths, by the first layer; elsewhere the step counts
    assert ops.counts == {"new_empty": 2, "transpose": 1} | counted  # its output, what is temporary
    assert len(launched) == 3
    calls: list[str] = []
    sys.setprofile(lambda frame, event, _: calls.append(frame.f_code.co_qualname) if event == "call" else None)
    try:
        one()
    finally:
        sys.setprofile(None)
    assert len([name for name in calls if not name.startswith("on_device")]) <= 35 + 10 * ON_CUDA, calls
