"""The Triton kernels against the reference: words bit for bit, attention against float64.

On a CUDA device the kernels run there; elsewhere in Triton's interpreter (conftest.py), on the same points.
"""

from __future__ import annotations

import itertools
import os
from functools import partial

import pytest

torch = pytest.importorskip("torch", reason="the runtime extra (torch) is not installed")
triton = pytest.importorskip("triton", reason="the runtime extra (triton) is not installed")

from kvruntime.methods.kivi import append, attention, first_record, pack, reference, words  # noqa: E402
from kvruntime.methods.kivi.kernel_arguments import New  # noqa: E402
from kvruntime.methods.kivi.reference import Layout, Stored  # noqa: E402
from kvsim.layout import LayerShape  # noqa: E402
from kvsim.methods import Kivi, kivi_boost, kivi_seed  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS = 2


def poisoned(method: Kivi, shape: LayerShape, batch_size: int, num_tokens: int) -> dict[str, torch.Tensor]:
    """The method's buffers, every float NaN and every word -7, lengths zero; channels weigh what chance has it."""
    out = {}
    for buffer in method.buffers(shape, batch_size, num_tokens):
        fill = 0 if buffer.name in ("lengths", "key_order") else -7 if buffer.dtype == "int32" else float("nan")
        out[buffer.name] = torch.full(buffer.shape, fill, dtype=getattr(torch, buffer.dtype), device=DEVICE)
        if buffer.name == "key_order":
            random = torch.randint(200, 256, buffer.shape, generator=torch.Generator().manual_seed(1))
            out[buffer.name].copy_(random)
    return out


def stored(tensors: dict[str, torch.Tensor]) -> Stored:
    names = ("records", "exact_key", "exact_value")
    held = [tensors[name] for name in names]
    return Stored(*held, *tensors["lengths"], tensors.get("key_params"), key_order=tensors.get("key_order"))


def layout_of(method: Kivi, record) -> Layout:
    return Layout(record, method.sink_length, method.residual_length)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


PACK = {
    "2-bit g32": (Kivi(), 64),
    "2-bit g32 r32": (Kivi(residual_length=32), 64),
    "2-bit g16 r64": (Kivi(group_size=16, residual_length=64), 128),
    "2-bit g64": (Kivi(group_size=64), 128),
    "2-bit g128": (Kivi(group_size=128), 128),
    "2-bit g32 d256": (Kivi(residual_length=64), 256),
    "2-bit gk128 gv32": (Kivi(key_group_size=128), 96),
    "4-bit g64": (Kivi(nbits=4, group_size=64), 128),
    "4-bit g48 gv20 r96": (Kivi(nbits=4, group_size=48, residual_length=96, value_group_size=20), 80),
    "8-bit g16 sink": (Kivi(nbits=8, group_size=16, residual_length=64, sink_length=5), 80),
    "1-bit g64 head": (Kivi(nbits=1, group_size=64, residual_length=64, value_group_size="head"), 256),
    "3-bit g32": (Kivi(nbits=3, residual_length=64), 96),
    "3-bit g32 d512": (Kivi(nbits=3, residual_length=64), 512),
    "3-bit gv40": (Kivi(nbits=3, group_size=64, residual_length=64, value_group_size=40), 80),
    "k4v2 sink": (Kivi(key_nbits=4, value_nbits=2, residual_length=32, sink_length=3), 96),
    "seed": (kivi_seed(), 64),
    "seed sink 4-bit": (
        Kivi(nbits=4, key_group_size="sequence", residual_length=64, value_group_size="head", sink_length=4),
        128,
    ),
    "boost": (kivi_boost(), 64),
    "boost d128": (kivi_boost(3, residual_length=64), 128),
    "boost d256": (kivi_boost(residual_length=64), 256),
    "boost 3+1 g32 d80": (kivi_boost(4, group_size=32, residual_length=64), 80),
    "boost g128 d96": (kivi_boost(group_size=128), 96),
    "rotated values": (Kivi(nbits=4, rotate_values=True, residual_length=64), 256),
}
SLOW = [name for name, (method, dim) in PACK.items() if method.boost_nbits or method.rotate_values or dim > 256]
STEPS = (  # new tokens, and how many of them are real in each of two rows
    ((190, (190, 101)), (1, (1, 1)), (40, (40, 3)), (1, (1, 1))),
    ((33, (33, 32)), *[(1, (1, 1))] * 3, (130, (130, 129)), (129, (0, 129))),
    ((400, (400, 3)), (1, (1, 1)), (2, (1, 2))),
)


DTYPES = ("float16", "bfloat16", "float32")
EVERY_POINT = DEVICE == "cuda" or bool(os.environ.get("EVERY_POINT"))
"""Whether words are compared for every layout, steps and dtype together, or for every two of them."""
WORDS = [
    (name, steps, dtype)
    for place, name in enumerate(PACK)
    for steps in range(len(STEPS))
    for turn, dtype in enumerate(DTYPES)
    if EVERY_POINT or ((place + steps + turn) % 3 == 0 and (name not in SLOW or steps == place % 2))
]
"""Of boosted, rotated and wide layouts one each: the interpreter takes seconds for it."""


def test_every_two_of_layout_steps_and_dtype_meet() -> None:
    points = [point for point in WORDS if point[0] not in SLOW]
    sizes = len(PACK) - len(SLOW), len(STEPS), len(DTYPES)
    for a, b in itertools.combinations(range(3), 2):
        assert len({(point[a], point[b]) for point in points}) == sizes[a] * sizes[b]


@pytest.mark.parametrize(("name", "steps", "dtype"), WORDS)
def test_words_bit_exact(name: str, steps: int, dtype: str) -> None:
    method, dim = PACK[name]
    same_words(method, dim, dtype, STEPS[steps], steps > 0, len(name) + steps)


TURNED = {
    "boost": (kivi_boost(residual_length=64), "float16"),
    "rotated values": (Kivi(value_nbits=4, rotate_values=True, residual_length=64), "float32"),
    "3-bit g32": (Kivi(nbits=3, residual_length=64), "float16"),
}
"""Layouts whose heads of 128 are packed whole or, with fewer codes at once, in turns."""


@pytest.mark.parametrize("name", TURNED)
def test_words_in_turns_bit_exact(name: str, monkeypatch) -> None:
    method, dtype = TURNED[name]
    turned = {words.at_once(stream, 64, 128, bits, 4096) for stream, bits in (("key", 2), ("value", 2), ("value", 4))}
    assert turned == {16}
    for most in (4096, 8192):
        monkeypatch.setattr(append, "pack_launch", partial(pack.pack_launch, most=most))
        same_words(method, 128, dtype, STEPS[1][:1] + STEPS[1][4:5], True, 7)


def same_words(method: Kivi, dim: int, dtype: str, steps, has_books: bool, seed: int) -> None:
    """The kernels' buffers after ``steps``, new tokens and how many of them are real in each of two rows, are the
    reference's to the bit.  Without books, as many programs start as any lengths need."""
    shape = LayerShape(HEADS, dim, dim)
    record = method.record(shape)
    generator = torch.Generator().manual_seed(seed)
    wanted, got = (poisoned(method, shape, 2, 460) for _ in range(2))
    layout = layout_of(method, record)
    lengths, packed = [0, 0], [0, 0]
    for size, counts in steps:
        key = torch.randn(2, size, HEADS, dim, generator=generator).to(getattr(torch, dtype)).transpose(1, 2)
        value = torch.randn(2, HEADS, size, dim, generator=generator).to(getattr(torch, dtype))
        key[..., 3] = 1.5  # channels and tokens without range
        value[:, :, size // 3] = 0.25
        key[0, 0, size // 2, 1] = float("inf")
        key[1, 1, -1, 2] = float("nan")
        value[1, 0, -1, 7] = float("nan")
        value[0, 1, 0, 5] = -float("inf")
        key, value = key.to(DEVICE), value.to(DEVICE)
        for tensors in (wanted, got):
            tensors["lengths"].copy_(torch.tensor([lengths, packed]))
        books = (lengths, packed) if has_books else None
        reference.append(key, value, list(counts), stored(wanted), layout, books)
        append.append(key, value, list(counts), stored(got), layout, books)
        states = list(zip(lengths, packed, counts, strict=True))
        packed = [
            reference.flush_plan(n, p, count, record.num_tokens, method.sink_length, method.residual_length)
            for n, p, count in states
        ]
        lengths = [n + count for n, _, count in states]
        for buffer in wanted:
            assert torch.equal(bits(wanted[buffer]), bits(got[buffer])), (buffer, size)
    assert max(packed) > 0


WEIGHED = {
    dim: ((1, 4, 7)[place % 3], DTYPES[(place + place // 3) % 3])
    for place, dim in enumerate((40, 72, 80, 96, 112, 120, 128, 192, 256))
}
"""Query heads a key/value head and dtype by head dimension: every two of these two meet."""


@pytest.mark.parametrize("dim", WEIGHED)
def test_boosted_channels_weigh_what_queries_say(dim: int) -> None:
    """Integers have exact sums, so that the codes are the reference's; of other numbers a sum may round another way,
    by which a code moves one step at the most."""
    q_per_kv, name = WEIGHED[dim]
    dtype, counts = getattr(torch, name), [300, 0, 17]
    generator = torch.Generator().manual_seed(dim)
    whole = torch.randint(-3, 4, (3, 300, HEADS * q_per_kv, dim), generator=generator).to(dtype)
    whole[0, :, 0] *= torch.arange(300)[:, None] < 44  # not among the last 256
    whole[0, 290, 0, 3], whole[0, 291, 0, 5], whole[0, 292, -1, 7] = float("nan"), float("inf"), -float("inf")
    whole[2, :, :q_per_kv] = 0
    whole[2, : 300 - 17] = float("nan")  # padding
    whole = whole.to(DEVICE).transpose(1, 2)
    other = torch.randn(3, HEADS * q_per_kv, 300, dim, generator=generator) * torch.logspace(-4, 1, dim)
    other = other.to(DEVICE, dtype)
    for query, lengths, most in ((whole, counts, 0), (whole[:, :, -40:], counts, 0), (other, None, 1)):
        given = None if lengths is None else torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
        order = torch.full((3, HEADS, dim), 77, dtype=torch.uint8, device=DEVICE)
        held = Stored(*[torch.empty(0, device=DEVICE)] * 5, key_order=order)
        first_record.weigh(query, New(query, query, HEADS, 300, given, None), held)
        want = reference.channel_weights(query.cpu(), HEADS, lengths)
        if lengths:
            want[1] = 77  # a row without new tokens keeps its own
            assert not want[2, 0].any()
            assert want[0].float().std() > 0
        assert (order.cpu().int() - want.int()).abs().max() <= most
    weighed = order.clone()
    first_record.weigh(query.mT.contiguous().mT, New(query, query, HEADS, 300, None, None), held)
    assert torch.equal(order, weighed)  # channels that do not lie next to each other


METHODS = {
    "2-bit g32": Kivi(residual_length=64),
    "2-bit g16": Kivi(group_size=16, residual_length=64, sink_length=4),
    "2-bit g64": Kivi(group_size=64, value_group_size=16, residual_length=128),
    "2-bit g128": Kivi(group_size=128, value_group_size="head", residual_length=128),
    "1-bit g32": Kivi(nbits=1, value_group_size=16, residual_length=64),
    "3-bit g32": Kivi(nbits=3, value_group_size=16, residual_length=64),
    "4-bit g32": Kivi(nbits=4, value_group_size=16, residual_length=32),
    "4-bit g48": Kivi(nbits=4, group_size=48, value_group_size="head", residual_length=96),
    "8-bit g64": Kivi(nbits=8, group_size=64, value_group_size=8, residual_length=64, sink_length=1),
    "k4v2": Kivi(key_nbits=4, value_nbits=2, value_group_size=16, residual_length=64),
    "k2v4": Kivi(key_nbits=2, value_nbits=4, value_group_size="head", residual_length=64, sink_length=2),
    "seed": kivi_seed(),
    "seed-4": Kivi(nbits=4, key_group_size="sequence", residual_length=64, value_group_size="head"),
}
BOOST = {
    "boost-2": kivi_boost(residual_length=64),
    "boost-3": kivi_boost(3, residual_length=64),
    "boost-4 g32": kivi_boost(4, group_size=32, residual_length=64),
    "rotated values": Kivi(nbits=4, rotate_values=True, residual_length=64),
}
METHODS |= BOOST
DIMS = (64, 80, 96, 128, 256)
Q_PER_KV = (1, 2, 4, 7, 8)
POINTS = [
    (name, dim, q_per_kv)
    for name, dim, q_per_kv in itertools.product(METHODS, DIMS, Q_PER_KV)
    if (name != "2-bit g32" or dim % 32 == 0)
    and (name not in BOOST or (DIMS.index(dim) + Q_PER_KV.index(q_per_kv) + list(BOOST).index(name)) % 5 == 0)
]


ROUNDS_ONCE = DEVICE == "cuda" or tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)
"""Whether a fused multiply-add is one: the interpreters before 3.9 round the product too."""
FLOOR = {
    torch.float16: 1e-4 if ROUNDS_ONCE else 1e-3,
    torch.bfloat16: 1e-4 if DEVICE == "cuda" else 5e-4,  # the interpreter truncates where a device rounds
    torch.float32: 2e-6,
}


def boundary_lengths(method: Kivi, index: int) -> list[int]:
    """Three rows' lengths: 0, 1, R-1, R, R+1, 2R-1 and longer ones in turn, the sink counted on top."""
    full, record = method.residual_length, method.record_length
    choices = [0, 1, full - 1, full, full + 1, 2 * full - 1, full + record, full + record + 1, 3 * full + 5, 7]
    return [choices[(index + 3 * row) % len(choices)] + (method.sink_length if row else 0) for row in range(3)]


def attention64(query, key, value, scale, visible=None):
    """Attention in float64: query [heads, q_per_kv, L, dim], key and value [heads, n, dim]."""
    score = scale * query.double() @ key.double()[:, None].transpose(-1, -2)
    if visible is not None:
        score = score.masked_fill(~visible, float("-inf"))
    return score.softmax(-1) @ value.double()[:, None]


@pytest.mark.parametrize(("name", "dim", "q_per_kv"), POINTS)
def test_attention_error(name: str, dim: int, q_per_kv: int) -> None:
    """Within 2x of the error that PyTorch's own attention makes in that dtype on the dequantized cache."""
    index = POINTS.index((name, dim, q_per_kv))
    method = METHODS[name]
    shape = LayerShape(HEADS, dim, dim)
    try:
        record = method.record(shape)
    except ValueError:
        method = Kivi(nbits=method.nbits, group_size=64, value_group_size="head", residual_length=64)
        record = method.record(shape)
    dtype = (torch.float16, torch.bfloat16, torch.float32)[index % 3]
    generator = torch.Generator().manual_seed(index)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    lengths = boundary_lengths(method, index)
    fresh_length = (0, 0, 0, 5)[index % 4]
    most = max(*lengths, 1)
    tensors = poisoned(method, shape, 3, most)
    outliers = 1 + 4 * (randn(1, 1, 1, dim) > 1.6) + 0.0
    key = ((randn(3, HEADS, most, dim) + 0.5 * randn(1, HEADS, 1, dim)) * outliers).to(dtype).to(DEVICE)
    value = randn(3, HEADS, most, dim).to(dtype).to(DEVICE)
    layout = layout_of(method, record)
    reference.append(key, value, lengths, stored(tensors), layout)
    packed = [
        reference.flush_plan(0, 0, n, record.num_tokens, method.sink_length, method.residual_length) for n in lengths
    ]
    tensors["lengths"].copy_(torch.tensor([lengths, packed]))
    query = randn(3, HEADS * q_per_kv, fresh_length or 1, dim).to(dtype).to(DEVICE)
    fresh, counts = None, [1] * 3
    if fresh_length:
        counts = [5, 3, 0]
        new = [randn(3, HEADS, fresh_length, dim).to(dtype).to(DEVICE) for _ in range(2)]
        fresh = (*new, torch.tensor(counts, dtype=torch.int32, device=DEVICE))
    scale = dim**-0.5
    runs = [attention.attend]
    if DEVICE == "cuda":
        from kvruntime.methods.kivi import fast, fast_plan

        runs += [fast.attend] if fast_plan.supports(record, query, fresh) else []
    for run in runs:
        out = run(query, stored(tensors), layout, scale, fresh, num_splits=1 + index % 4)
        assert out.dtype == dtype
        assert torch.isfinite(out).all()
        hold_to_float64(out, query, key, value, tensors, method, record, lengths, packed, counts, fresh, scale)


def hold_to_float64(out, query, key, value, tensors, method, record, lengths, packed, counts, fresh, scale):
    """Each row of ``out`` against float64 on its dequantized cache: at most twice PyTorch's own error."""
    dtype, exact, most = query.dtype, getattr(torch, method.dtype), key.shape[2]
    q_per_kv, fresh_length = query.shape[1] // HEADS, query.shape[2]
    params, order = tensors.get("key_params"), tensors.get("key_order")
    for row, (length, size) in enumerate(zip(lengths, packed, strict=True)):
        sink = min(method.sink_length, length)
        own_key, own_value = (x[row, :, most - length :] for x in (key, value))
        own_key = own_key.to(exact).float()
        if not record.rotation:  # those are rotated first
            own_value = own_value.to(exact).float()
        words = tensors["records"][row, : size // record.num_tokens].transpose(0, 1)
        parts = [
            reference.unpack_records(
                words,
                record,
                None if params is None else (params[0, row], params[1, row]),
                None if order is None else order[row],
            ),
            (own_key[:, :sink], own_value[:, :sink]),
            (own_key[:, sink + size :], own_value[:, sink + size :]),
        ]
        visible = None
        if fresh is not None:
            real = fresh_length - counts[row]
            parts.append((fresh[0][row, :, real:].float(), fresh[1][row, :, real:].float()))
            assert not out[row, :, :real].any()
        if record.rotation:  # records hold rotated values, exact slots rotated ones in their own type
            types = [torch.float32, exact, exact, reference.fresh_type(dtype)]
            for i, (held_key, held_value) in enumerate(parts):
                turned = reference.stored_values(held_value, record, types[i]).float() if i else held_value
                parts[i] = held_key, reference.rotated(turned, record.rotation)
        held_key, held_value = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        if not held_key.shape[1]:
            assert not out[row].any()
            continue
        new_queries = counts[row] if fresh is not None else 1
        if not new_queries:
            continue
        rows = query[row, :, query.shape[2] - new_queries :].unflatten(0, (HEADS, q_per_kv))
        if fresh is not None:
            age = held_key.shape[1] - new_queries + torch.arange(new_queries, device=DEVICE)
            visible = torch.arange(held_key.shape[1], device=DEVICE) <= age[:, None]
        truth = attention64(rows, held_key, held_value, scale, visible)
        torch_out = torch.nn.functional.scaled_dot_product_attention(
            rows, *(x.to(dtype)[:, None].expand(-1, q_per_kv, -1, -1) for x in (held_key, held_value)),
            attn_mask=visible, scale=scale,
        )  # fmt: skip
        mine = out[row, :, query.shape[2] - new_queries :].unflatten(0, (HEADS, q_per_kv))
        norm = truth.norm()
        error, allowed = (mine.double() - truth).norm() / norm, (torch_out.double() - truth).norm() / norm
        floor = FLOOR[dtype]
        assert error <= 2 * allowed + floor, (row, length, size, error.item(), allowed.item())


def test_enough_points() -> None:
    assert len(POINTS) >= 300


@pytest.mark.parametrize("nbits", [2, 4])
def test_flat_attention_over_many_tokens(nbits: int) -> None:
    """Almost flat weights over zero-mean values: the sum cancels, and accumulation errors would show.

    65,536 tokens on a device, 4,096 in the interpreter.
    """
    length = 65536 if DEVICE == "cuda" else 4096
    method, shape = Kivi(nbits=nbits, group_size=64), LayerShape(1, 64, 64)
    record = method.record(shape)
    tensors = poisoned(method, shape, 1, length)
    generator = torch.Generator().manual_seed(nbits)
    key, value = (torch.randn(1, 1, length, 64, generator=generator).half().to(DEVICE) for _ in range(2))
    query = 0.05 * torch.randn(1, 4, 1, 64, generator=generator).half().to(DEVICE)
    layout = Layout(record, 0, 128)
    reference.append(key, value, [length], stored(tensors), layout)
    packed = method.num_packed(length)
    tensors["lengths"].copy_(torch.tensor([[length], [packed]]))
    out = attention.attend(query, stored(tensors), layout, 0.125)
    held = reference.unpack_records(tensors["records"][0].transpose(0, 1), record)
    held_key, held_value = (
        torch.cat([old, new[0, :, packed:].float()], 1) for old, new in zip(held, (key, value), strict=True)
    )
    truth = attention64(query[0].unflatten(0, (1, 4)), held_key, held_value, 0.125)
    assert (out[0].double() - truth[0]).norm() / truth.norm() <= 2e-3


@pytest.mark.parametrize("fresh_length", [0, 3])
def test_block_table(fresh_length: int) -> None:
    """Records anywhere in a pool, one of them two rows': the same bits as row after row, and -2**30 is no place."""
    method, shape, lengths = Kivi(residual_length=64), LayerShape(HEADS, 64, 64), [300, 200, 20]
    record = method.record(shape)
    generator = torch.Generator().manual_seed(1)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).half().to(DEVICE)

    key, value = (randn(3, HEADS, 300, 64) for _ in range(2))
    for x in (key, value):
        x[1, :, 100:164] = x[0, :, :64]
    tensors = poisoned(method, shape, 3, 300)
    layout = Layout(record, 0, 64)
    reference.append(key, value, lengths, stored(tensors), layout)
    packed = [reference.flush_plan(0, 0, n, record.num_tokens, 0, 64) for n in lengths]
    tensors["lengths"].copy_(torch.tensor([lengths, packed]))
    query, fresh = randn(3, 2 * HEADS, fresh_length or 1, 64), None
    if fresh_length:
        new = [randn(3, HEADS, fresh_length, 64) for _ in range(2)]
        fresh = (*new, torch.tensor([3, 2, 0], dtype=torch.int32, device=DEVICE))
    records = tensors["records"]
    place = torch.randperm(records.shape[0] * records.shape[1], generator=generator).view(records.shape[:2]).to(DEVICE)
    pool = torch.empty_like(records.flatten(0, 1))
    pool[place] = records
    pool[place[1, 0]] = -7
    place[1, 0] = place[0, 0]
    held = torch.arange(records.shape[1], device=DEVICE) < tensors["lengths"][1][:, None] // record.num_tokens
    table = torch.where(held, place, -(1 << 30)).to(torch.int32)
    alone = stored(tensors)
    pooled = alone._replace(records=pool, block_table=table)
    for run in (attention.attend, reference.attend):
        assert torch.equal(run(query, pooled, layout, 0.125, fresh), run(query, alone, layout, 0.125, fresh))
        with pytest.raises(ValueError, match="expected \\[3, num_blocks\\] int32 over"):
            run(query, pooled._replace(block_table=table.long()), layout, 0.125, fresh)
