"""Steps that nothing on the host decides: words and slots are the reference's, attention is float64's.

On a CUDA device the kernels run there; elsewhere in Triton's interpreter (conftest.py).
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="the runtime extra (torch) is not installed")
pytest.importorskip("triton", reason="the runtime extra (triton) is not installed")

from count_ops import Ops  # noqa: E402

from kvruntime.kernels.reference import embedded  # noqa: E402
from kvruntime.methods import Steps, make_layer  # noqa: E402
from kvruntime.methods.full import decode  # noqa: E402
from kvruntime.methods.kivi import reference, step  # noqa: E402
from kvruntime.methods.kivi.reference import Layout, Stored  # noqa: E402
from kvsim.layout import LayerShape  # noqa: E402
from kvsim.methods import Kivi, kivi_boost, kivi_seed, make_method  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, ROWS = 2, 3
METHODS = {
    "2-bit g32": (Kivi(residual_length=64), 64),
    "2-bit g64": (Kivi(group_size=64, residual_length=64), 128),
    "k4v2 sink": (Kivi(key_nbits=4, value_nbits=2, residual_length=64, sink_length=5), 64),
    "3-bit d96": (Kivi(nbits=3, residual_length=32), 96),
    "seed": (kivi_seed(), 64),
    "boost": (kivi_boost(residual_length=64), 64),
    "boost d96": (kivi_boost(4, residual_length=128, group_size=32), 96),
    "rotated values": (Kivi(rotate_values=True, residual_length=64), 128),
}


def tensors(method: Kivi, shape: LayerShape, num_tokens: int) -> dict[str, torch.Tensor]:
    """On the CPU, as all that is not a kernel's: a sanitizer instruments every kernel, and PyTorch's are many."""
    return {
        buffer.name: torch.zeros(buffer.shape, dtype=getattr(torch, buffer.dtype))
        for buffer in method.buffers(shape, ROWS, num_tokens)
    }


def stored(held: dict[str, torch.Tensor]) -> Stored:
    names = ("records", "exact_key", "exact_value")
    tensors = [held[name] for name in names]
    return Stored(*tensors, *held["lengths"], held.get("key_params"), key_order=held.get("key_order"))


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_steps_store_and_pack_as_the_reference_does(name: str, spread: bool, monkeypatch) -> None:
    monkeypatch.setattr(step, "FEW_PROGRAMS", 264 if spread else 0)
    method, dim = METHODS[name]
    shape = LayerShape(HEADS, dim, dim)
    record = method.record(shape)
    sink, residual = method.sink_length, method.residual_length
    layout = Layout(record, sink, residual)
    lengths = [0, residual + sink - 1, residual + sink + 2 * record.num_tokens]
    held = max(lengths)
    wanted = tensors(method, shape, held + 2 * record.num_tokens + 8)
    generator = torch.Generator().manual_seed(1)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).half()

    reference.append(*(randn(ROWS, HEADS, held, dim) for _ in range(2)), lengths, stored(wanted), layout)
    packed = [reference.flush_plan(0, 0, n, record.num_tokens, sink, residual) for n in lengths]
    lengths[2] -= record.num_tokens  # taken back: more is packed than so many tokens would have
    wanted["lengths"].copy_(torch.tensor([lengths, packed]))
    got = {key: tensor.clone().to(DEVICE) for key, tensor in wanted.items()}
    ticket = torch.zeros(ROWS, dtype=torch.int32, device=DEVICE)
    flushed = 0
    own = method.boost_nbits or method.rotate_values  # of which the interpreter takes a second a step
    for _ in range(4 if own else record.num_tokens + 3):
        key, value, query = (randn(ROWS, heads, 1, dim) for heads in (HEADS, HEADS, 2 * HEADS))
        on_device = query.clone().to(DEVICE)
        reference.append(key, value, None, stored(wanted), layout)
        after = [
            reference.flush_plan(n, p, 1, record.num_tokens, sink, residual)
            for n, p in zip(lengths, packed, strict=True)
        ]
        flushed += after != packed
        positions = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
        lengths, packed = [n + 1 for n in lengths], after
        wanted["lengths"].copy_(torch.tensor([lengths, packed]))
        step.step(on_device, key.to(DEVICE), value.to(DEVICE), stored(got), layout, positions, positions, ticket)
        assert torch.equal(query, on_device.cpu())
        assert not ticket.cpu().any()
        for buffer in wanted:
            there = got[buffer].cpu()
            assert torch.equal(wanted[buffer].view(torch.uint8), there.view(torch.uint8)), (buffer, lengths)
    assert flushed


def tables(num_positions: int, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.arange(num_positions)[:, None] / 50.0 ** (torch.arange(dim // 2) / (dim // 2))
    angle = torch.cat((angle, angle), 1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rotary_embedding_on_the_way(dtype: torch.dtype, spread: bool, monkeypatch) -> None:
    monkeypatch.setattr(step, "FEW_PROGRAMS", 264 if spread else 0)
    method, dim = Kivi(residual_length=32, dtype={torch.float16: "float16", torch.float32: "float32"}[dtype]), 64
    shape = LayerShape(HEADS, dim, dim)
    held = tensors(method, shape, 64)
    lengths = torch.tensor([0, 7, 31], dtype=torch.int32)
    angles = torch.tensor(
        [40, 7, 3], dtype=torch.int32
    )  # a token's position is not its slot: tokens were evicted, or added
    held["lengths"][0] = lengths
    held = {name: tensor.to(DEVICE) for name, tensor in held.items()}
    generator = torch.Generator().manual_seed(2)
    qkv = torch.randn(ROWS, 4 * HEADS + 2 * HEADS, 1, dim, generator=generator).to(dtype)
    rotary = tables(64, dim, dtype)
    parts = [4 * HEADS, HEADS, HEADS]
    query, key, wanted_value = qkv.clone().split(parts, 1)
    wanted_query, wanted_key = embedded(query, key, rotary, angles)
    rotary, positions, before = tuple(table.to(DEVICE) for table in rotary), angles.to(DEVICE), lengths.to(DEVICE)
    full_key, full_value = (torch.zeros(ROWS, HEADS, 40, dim, dtype=dtype).to(DEVICE) for _ in range(2))
    spare, key, value = qkv.clone().to(DEVICE).split(parts, 1)
    decode.step(spare, key, value, decode.Stored(full_key, full_value, before), positions, rotary)
    query = qkv.to(DEVICE).split(parts, 1)[0]
    ticket = torch.zeros(ROWS, dtype=torch.int32).to(DEVICE)
    layout = Layout(method.record(shape), 0, 32)
    step.step(query, key, value, stored(held), layout, before, positions, ticket, rotary)
    assert torch.equal(query.cpu(), wanted_query)
    assert torch.equal(spare.cpu(), wanted_query)
    held = {name: tensor.cpu() for name, tensor in held.items()}
    full_key, full_value = full_key.cpu(), full_value.cpu()
    for row, slot in enumerate(lengths.tolist()):
        assert torch.equal(held["exact_key"][row, :, slot], wanted_key[row, :, 0])
        assert torch.equal(full_key[row, :, slot], wanted_key[row, :, 0])
        assert torch.equal(held["exact_value"][row, :, slot], wanted_value[row, :, 0])
        assert torch.equal(full_value[row, :, slot], wanted_value[row, :, 0])
    assert held["lengths"][0].tolist() == [1, 8, 32]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32] + ([torch.bfloat16] if DEVICE == "cuda" else []))
@pytest.mark.parametrize(("dim", "q_per_kv"), [(64, 1), (128, 4), (96, 2), (80, 7), (256, 16)])
def test_uncompressed_attention_with_lengths_on_the_device(dim, q_per_kv, dtype, monkeypatch) -> None:
    generator = torch.Generator().manual_seed(dim)
    key, value = (torch.randn(ROWS, HEADS, 300, dim, generator=generator).to(dtype) for _ in range(2))
    query = torch.randn(ROWS, HEADS * q_per_kv, 1, dim, generator=generator).to(dtype)
    positions = torch.tensor([0, 130, 299], dtype=torch.int32)
    for row, position in enumerate(positions.tolist()):  # what no query sees may be anything
        key[row, :, position + 1 :], value[row, :, position + 1 :] = float("nan"), float("nan")
    there = [x.to(DEVICE) for x in (query, key, value, positions)]
    for splits in (1, 3):
        monkeypatch.setattr(decode, "plan_splits", lambda *_, splits=splits: splits)
        out = decode.attend(there[0], decode.Stored(*there[1:]), dim**-0.5, stepped=True, num_tokens=300).cpu()
        for row, position in enumerate(positions.tolist()):
            seen = slice(0, position + 1)
            q = query[row].view(HEADS, q_per_kv, dim).double()
            score = q @ key[row, :, seen].double().transpose(1, 2) * dim**-0.5
            exact = (score.softmax(-1) @ value[row, :, seen].double()).view(HEADS * q_per_kv, 1, dim)
            error = (out[row].double() - exact).norm() / exact.norm()
            assert error < {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 2e-6}[dtype]


def test_what_a_step_does_not_support() -> None:
    record = Kivi(group_size=64, residual_length=64).record(LayerShape(HEADS, 64, 64))
    empty, slots = torch.zeros(1, 17, 1, 64), torch.zeros(1, 1, 4, 64)
    with pytest.raises(ValueError, match="packs from the residual alone"):
        step.step(empty, empty, empty, Stored(*[empty] * 5), Layout(record, 0, 32), empty, empty, empty)
    with pytest.raises(ValueError, match="17 query heads"):
        decode.attend(empty, decode.Stored(slots, slots, torch.zeros(1)), 1.0)


FREE = {"detach", "device", "empty", "new_empty", "view", "slice", "transpose", "split_with_sizes", "unbind", "select"}
"""Operators of PyTorch that launch nothing."""


class Scratch:
    """Of a step, on a GPU that is not there: PyTorch asks for the device where it cuts a tensor."""

    shape = torch.Size([1])

    def __getitem__(self, at: slice) -> torch.Tensor:
        return torch.empty(ROWS if at.stop else 2 * ROWS * HEADS, dtype=torch.int32, device="cuda")


@pytest.mark.skipif(DEVICE == "cuda", reason="what it remembers of a GPU that is not there would be another's")
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("name", ["bf16", "kivi", "kivi-seed", "kivi-boost", "fp8-token-head", "int4", "turboquant"])
def test_a_step_on_a_gpu_launches_this_packages_kernels_alone(name: str, rotary: bool, monkeypatch) -> None:
    """What PyTorch launched between two would cost its own time and keep the second from starting early."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from triton.runtime.jit import KernelInterface

    launched: list[str] = []
    monkeypatch.setattr(
        KernelInterface, "__getitem__", lambda kernel, grid: lambda *args, **more: launched.append(kernel.fn.__name__)
    )
    memory = {"shared_memory_per_block_optin": 227 << 10, "shared_memory_per_multiprocessor": 228 << 10}
    h200 = SimpleNamespace(major=9, minor=0, multi_processor_count=132, **memory)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: h200)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda")

    with FakeTensorMode():
        layer = make_layer(make_method(name), LayerShape(HEADS, 128, 128), ROWS, 1024, torch.device("cuda", 0))
        layer.row_lengths = [600] * ROWS
        if hasattr(layer, "row_packed"):
            layer.row_packed = [256] * ROWS
        query, key, value = new(ROWS, 4 * HEADS, 1, 128).split([2 * HEADS, HEADS, HEADS], 1)
        steps = Steps(new(ROWS, dtype=torch.int32), new(ROWS, dtype=torch.int32), Scratch(), 1024)
        embedding = (new(1024, 128), new(1024, 128)) if rotary else None
        with Ops() as ops:
            out = layer.step(query, key, value, 0.1, steps, embedding)
    assert out.shape == (ROWS, 2 * HEADS, 1, 128)
    assert set(ops.counts) <= FREE
    assert "attend_kernel" in launched
