"""Tokens coded one by one: the kernels against the reference, the layer against codes read back by other code.

On a CUDA device the kernels run there; elsewhere in Triton's interpreter (conftest.py), which has no instructions of
NVIDIA's: there the portable lookup is tested, and the other by an emulation of what it is made of.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the runtime extra (torch) is not installed")
pytest.importorskip("triton", reason="the runtime extra (triton) is not installed")

from kvruntime.methods import make_layer, room_of  # noqa: E402
from kvruntime.methods.rows import Steps  # noqa: E402
from kvruntime.methods.token import attention, lookup, reference, store, transients, words  # noqa: E402
from kvruntime.methods.token.coding import num_bytes, sections  # noqa: E402
from kvruntime.methods.token.levels import lookup_table as lookup_of  # noqa: E402
from kvruntime.methods.token.levels import magnitudes, signs, thresholds  # noqa: E402
from kvruntime.methods.token.reference import Layout, Stored  # noqa: E402
from kvsim.layout import LayerShape, nbytes  # noqa: E402
from kvsim.methods import PerTokenHead, TurboQuant  # noqa: E402
from kvsim.methods.token import LOOKUP  # noqa: E402
from kvsim.models.load import load_model  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYOUTS = {
    "int8 int4": (Layout("int8", "int4", 48, 80), torch.float32),
    "int4 int8": (Layout("int4", "int8", 64, 32), torch.float16),
    "e4m3 e5m2": (Layout("e4m3", "e5m2", 80, 64), torch.float32),
    "lloyd4 lloyd3": (Layout("lloyd4", "lloyd3", 128, 64), torch.float16),
    "lloyd2 lloyd3.5": (Layout("lloyd2", "lloyd3.5", 64, 128, False), torch.float16),
    "lloyd2.5 lloyd2": (Layout("lloyd2.5", "lloyd2", 64, 128), torch.float16),
    "lloyd3 lloyd4": (Layout("lloyd3", "lloyd4", 192, 64), torch.float16),
}
HEADS, ROWS, SLOTS, PAGE = 2, 3, 80, 16
NOWHERE = -(1 << 30)
layouts = pytest.mark.parametrize("name", LAYOUTS)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).half().to(DEVICE)


def turn(coding: str, dim: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if not coding.startswith("lloyd"):
        return None, None
    looked = [lookup_of(dim, section[2], DEVICE) for section in sections(coding, dim)]
    return signs(dim, DEVICE), torch.cat(looked)


def empty(name: str, slots: int = SLOTS, rows: int = ROWS) -> tuple[Stored, Layout]:
    """Rows without tokens, their bytes poisoned."""
    layout, scale_dtype = LAYOUTS[name]
    held = []
    for coding, dim in ((layout.key, layout.key_dim), (layout.value, layout.value_dim)):
        held.append(torch.full((rows, HEADS, slots, num_bytes(coding, dim)), 0xA5, dtype=torch.uint8, device=DEVICE))
        held.append(torch.full((rows, HEADS, slots), torch.nan, dtype=scale_dtype, device=DEVICE))
    turns = zip(turn(layout.key, layout.key_dim), turn(layout.value, layout.value_dim), strict=True)
    lengths = torch.zeros(ROWS, dtype=torch.int32, device=DEVICE)
    return Stored(*held, lengths, *(each for pair in turns for each in pair)), layout


def tokens(layout: Layout, count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """With vectors of zeros, of wide ranges, and with infinities and NaN."""
    key, value = (
        normal(seed, ROWS, HEADS, count, layout.key_dim),
        normal(seed + 1, ROWS, HEADS, count, layout.value_dim),
    )
    key = (key * torch.exp(3 * normal(seed + 2, ROWS, HEADS, count, 1).float())).clamp(-6e4, 6e4).half()
    if count > 5:
        key[0, 0, -1], key[0, 1, -2, 3], value[0, 1, -3, 2] = 0, torch.nan, torch.inf
    return key, value


def same(a: Stored, b: Stored) -> bool:
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a[:4], b[:4], strict=True))


@layouts
def test_kernels_store_what_the_reference_stores(name: str) -> None:
    """Bit for bit: a prompt of ragged rows, then a step with the rotary embedding."""
    (mine, layout), (its, _) = empty(name), empty(name)
    key, value = tokens(layout, 19)
    counts = [19, 4, 0]
    store.append(key, value, counts, mine, layout)
    reference.append(key, value, counts, its, layout)
    assert same(mine, its)
    lengths = torch.tensor(counts, dtype=torch.int32, device=DEVICE)
    mine, its = mine._replace(lengths=lengths), its._replace(lengths=lengths)
    key, value = tokens(layout, 1, seed=7)
    query = normal(8, ROWS, 6, 1, layout.key_dim)
    angle = torch.arange(40.0)[:, None] * torch.rand(layout.key_dim, generator=torch.Generator().manual_seed(1))
    rotary = (angle.cos().half().to(DEVICE), angle.sin().half().to(DEVICE))
    positions = lengths + 3
    given = query.clone()
    turned = store.step(given, key, value, mine, layout, positions, rotary)
    reference.step(embedded := query.clone(), key, value, its, layout, positions, rotary)
    assert same(mine, its)
    if turned is None:
        assert torch.equal(given, embedded)
    else:
        assert torch.equal(given, query)
        assert torch.equal(turned, attention.rotated(embedded, mine.key_signs, layout.key_dim & -layout.key_dim))


@layouts
@pytest.mark.parametrize("fresh", [0, 5], ids=["one query", "fresh tokens"])
def test_attention_agrees_with_the_reference(name: str, fresh: int) -> None:
    """Ragged rows, one of them empty, in two splits and in as many as are planned; what no token holds is poisoned."""
    stored, layout = empty(name)
    key, value = normal(0, ROWS, HEADS, 75, layout.key_dim), normal(1, ROWS, HEADS, 75, layout.value_dim)
    counts = [75, 33, 0 if fresh else 1]
    reference.append(key, value, counts, stored, layout)
    stored = stored._replace(lengths=torch.tensor(counts, dtype=torch.int32, device=DEVICE))
    for dtype, off, splits in ((torch.float32, 1e-5, 2), (torch.float16, 4e-3, None)):
        query, new = normal(3, ROWS, 6, max(1, fresh), layout.key_dim).to(dtype), None
        if fresh:
            more = (normal(seed, ROWS, HEADS, fresh, dim) for seed, dim in ((4, layout.key_dim), (5, layout.value_dim)))
            new = (*(x.to(dtype) for x in more), torch.tensor([5, 2, 3], dtype=torch.int32, device=DEVICE))
        want = reference.attend(query, stored, layout, 0.1, new)
        have = attention.attend(query, stored, layout, 0.1, new, num_splits=splits)
        assert have.dtype == dtype
        torch.testing.assert_close(have, want, rtol=0, atol=off)


@pytest.mark.parametrize("name", ["int8 int4", "lloyd4 lloyd3", "lloyd3 lloyd4"])
def test_pools_and_lines(name: str) -> None:
    """Tokens by a block table, written and read; queries and fresh tokens in one line."""
    own, layout = empty(name)
    pages = SLOTS // PAGE
    pool, _ = empty(name, slots=PAGE, rows=ROWS * pages + 2)
    table = torch.randperm(ROWS * pages, generator=torch.Generator().manual_seed(0)).view(ROWS, pages).int().to(DEVICE)
    counts = [40, 0, 17]
    table[0, 3:], table[1, 1:], table[2, 2:] = NOWHERE, NOWHERE, NOWHERE
    starts = torch.tensor([0, 40, 40, 57], dtype=torch.int32, device=DEVICE)
    pool = pool._replace(block_table=table)
    line = tuple(normal(seed, 57, HEADS, dim) for seed, dim in ((1, layout.key_dim), (2, layout.value_dim)))
    store.append(*line, None, pool, layout, starts)
    reference.append(*line, None, own, layout, starts)
    lengths = torch.tensor(counts, dtype=torch.int32, device=DEVICE)
    own, pool = own._replace(lengths=lengths), pool._replace(lengths=lengths)
    query = normal(3, 9, 6, layout.key_dim)
    fresh = (*(normal(seed, 9, HEADS, dim) for seed, dim in ((4, layout.key_dim), (5, layout.value_dim))), None)
    starts = torch.tensor([0, 3, 8, 9], dtype=torch.int32, device=DEVICE)
    want = reference.attend(query, own, layout, 0.1, fresh, starts)
    torch.testing.assert_close(reference.attend(query, pool, layout, 0.1, fresh, starts), want, rtol=0, atol=1e-3)
    have = attention.attend(query, pool, layout, 0.1, fresh, starts, num_splits=2)
    torch.testing.assert_close(have, want, rtol=0, atol=4e-3)


def test_a_bad_block_table_is_refused() -> None:
    stored, layout = empty("int8 int4")
    stored = stored._replace(block_table=torch.zeros(2, 4, dtype=torch.int64, device=DEVICE))
    for run in (attention.attend, reference.attend):
        with pytest.raises(ValueError, match=r"block table \[2, 4\] of torch.int64: expected \[3, num_blocks\] int32"):
            run(normal(0, ROWS, 6, 1, 48), stored, layout, 1.0)


METHODS = (
    *(PerTokenHead(form, "float16") for form in ("int8", "int4", "fp8", "fp8-e5m2")),
    *(TurboQuant(bits) for bits in (2, 2.5, 4)),
    TurboQuant(key_nbits=3.5, value_nbits=3, norm_correction=False),
)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_layer_attends_to_what_its_codes_read_back(method) -> None:
    """In float64, by other code than the layer's, after each of its verbs; bytes as predicted."""
    shape = LayerShape(HEADS, 64, 128)
    layer = make_layer(method, shape, 2, 64, DEVICE)
    dtype = torch.float16 if DEVICE.type == "cuda" else torch.float32
    key, value = normal(0, 2, HEADS, 40, 64), normal(1, 2, HEADS, 40, 128)
    rows = [(key[0, :, :30], value[0, :, :30]), (key[1, :, 19:30], value[1, :, 19:30])]

    def check() -> None:
        query = normal(2, len(rows), 4, 1, 64)
        have = layer.attend(query.to(dtype), 0.2).double()
        for row, (k, v) in enumerate(rows):
            k, v = (x.double()[0].repeat_interleave(2, 0) for x in room_of(method).read_back(method, k[None], v[None]))
            want = (query[row].double() @ k.transpose(1, 2) * 0.2).softmax(-1) @ v
            off = 1e-5 if dtype == torch.float32 else 1e-2
            torch.testing.assert_close(have[row], want, rtol=0, atol=off)
        assert layer.row_lengths == [k.shape[1] for k, _ in rows]
        assert layer.nbytes == nbytes(method.buffers(shape, layer.batch_size, layer.num_provided))

    layer.append(key[:, :, :30].to(dtype), value[:, :, :30].to(dtype), [30, 11])
    check()
    lengths = torch.tensor(layer.row_lengths, dtype=torch.int32, device=DEVICE)
    steps = Steps(lengths, lengths, layer.scratch(4), 64)
    query, new = normal(3, 2, 4, 1, 64).to(dtype), (key[:, :, 30:31].to(dtype), value[:, :, 30:31].to(dtype))
    stepped = layer.step(query, *new, 0.2, steps)
    if DEVICE.type == "cuda":
        layer.advance(1)
    rows[:] = [
        tuple(torch.cat([x, more[row, :, 30:31]], 1) for x, more in zip(held, (key, value), strict=True))
        for row, held in enumerate(rows)
    ]
    torch.testing.assert_close(stepped, layer.attend(query, 0.2))
    check()
    layer.forget([5, 2], 3)
    rows[:] = [
        tuple(x[:, [*range(3), *range(3 + n, x.shape[1])]] for x in held) for n, held in zip((5, 2), rows, strict=True)
    ]
    check()
    layer.crop(20)
    rows[:] = [tuple(x[:, :-6] for x in held) for held in rows]
    check()
    layer.reorder(torch.tensor([1, 0, 1]))
    rows[:] = [rows[1], rows[0], rows[1]]
    check()
    with pytest.raises(ValueError, match="cannot crop to 14 tokens: allowed are 16 and above"):
        layer.crop(14)
    layer.reset()
    assert layer.row_lengths == [0, 0, 0]


def test_what_a_layer_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="int8 holds full-attention layers only, not a window of 64 tokens"):
        make_layer(PerTokenHead(), LayerShape(2, 64, 64, window=64), 1, 64, DEVICE)
    with pytest.raises(ValueError, match="latent"):
        make_layer(TurboQuant(), LayerShape(1, 576, 0), 1, 64, DEVICE)
    with pytest.raises(ValueError, match="scale_dtype bfloat16 cannot hold a zero point"):
        make_layer(PerTokenHead("int4", "bfloat16"), LayerShape(2, 64, 64), 1, 64, DEVICE)


@pytest.mark.parametrize(
    ("method", "num_tokens", "merged"),
    [
        (PerTokenHead("int8"), 33, True),
        (PerTokenHead("int4", "float16"), 32, True),
        (PerTokenHead("int4", "float16"), 33, False),
        (PerTokenHead("fp8"), 32, False),
        (TurboQuant(3), 33, True),
    ],
)
def test_a_kernel_s_parts_live_beside_its_output(method: Any, num_tokens: int, merged: bool) -> None:
    """Of one split too where the kernel in whole numbers attends, and where the merge rotates."""
    model = load_model("llama-3-8b")
    row = {"batch_size": 2, "dtype": "float16", "num_splits": 1, "max_seq_len": num_tokens}
    sizes = transients.attend(row, model, method, model.cache_layers[0])
    assert (2 * 32 * 128 * 4 in sizes) == merged


@pytest.mark.parametrize("dim", [64, 128, 576])
@pytest.mark.parametrize("nbits", [2, 3, 4])
def test_levels_are_means_of_their_cells(dim: int, nbits: int) -> None:
    """Lloyd's and Max's conditions on the sphere's coordinate, by SciPy's quadrature; at 576 near the normal's."""
    integrate = pytest.importorskip("scipy.integrate", reason="the validation extra (scipy) is not installed")
    levels, edges = magnitudes(dim, nbits), (0.0, *thresholds(dim, nbits), dim**0.5)
    assert len(levels) == 2 ** (nbits - 1)

    def density(x: float) -> float:
        return (1 - x * x / dim) ** ((dim - 3) / 2)

    for level, low, high in zip(levels, edges, edges[1:], strict=False):
        high = min(high, low + 8)
        mass = integrate.quad(density, low, high)[0]
        mean = integrate.quad(lambda x: x * density(x), low, high)[0] / mass
        assert abs(mean - level) < (2.5e-2 if nbits == 4 else 5e-3)  # half a step, and what that moves the thresholds
    if dim == 576 and nbits == 2:
        assert np.allclose(levels, (0.4528, 1.5104), atol=5e-3)  # Max (1960), of the normal distribution


def test_signs_are_the_same_everywhere() -> None:
    drawn = signs(256, torch.device("cpu"))
    assert set(drawn.tolist()) == {-1, 1}
    assert drawn[:12].tolist() == [1, -1, 1, 1, 1, 1, 1, -1, *drawn[8:12].tolist()]
    assert torch.equal(signs(64, torch.device("cpu")), drawn[:64])
    assert abs(int(drawn.sum())) < 64


def halves_of(pair: np.ndarray) -> int:
    return int(pair.view(np.uint32)[0])


OPERATIONS = {
    "mov": lambda a: a,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "shl": lambda a, b: a << min(b, 32) & 0xFFFFFFFF,
    "shr": lambda a, b: a >> min(b, 32),
    "prmt": lambda a, b, c: sum((b << 32 | a) >> 8 * (c >> 4 * i & 7) << 8 * i & 255 << 8 * i for i in range(4)),
    "sub.rn": lambda a, b: halves_of(np.subtract(*(np.array([x], np.uint32).view(np.float16) for x in (a, b)))),
    "mul.rn": lambda a, b: halves_of(np.multiply(*(np.array([x], np.uint32).view(np.float16) for x in (a, b)))),
    "cvt.rn.f16x2.e4m3x2": lambda a: halves_of(
        torch.tensor([a & 255, a >> 8], dtype=torch.uint8).view(torch.float8_e4m3fn).half().numpy()
    ),
}  # fmt: skip


def emulated(asm: str, operands: list[int]) -> list[int]:
    """The two results of a pair's PTX."""
    held = {f"${2 + place}": value for place, value in enumerate(operands)}
    for line in asm.strip("{} ").split(";"):
        if not line.strip() or line.strip().startswith(".reg"):
            continue
        operation, _, given = line.strip().partition(" ")
        if given.startswith("{"):  # both halves of a register
            low, high, source = (each.strip(" {}") for each in given.split(","))
            held[low], held[high] = held[source] & 0xFFFF, held[source] >> 16
            continue
        target, *sources = (each.strip() for each in given.split(","))
        values = [held[each] if each in held else int(each, 0) for each in sources]
        held[target] = OPERATIONS[re.sub(r"\.(b32|f16x2)$", "", operation)](*values)
    return [held["$0"], held["$1"]]


@pytest.mark.parametrize(
    ("coding", "dim", "fp8"),
    [(f"lloyd{bits}", dim, False) for bits, dim in ((4, 128), (3, 128), (2, 128), (3, 64), (2, 64), (4, 64))]
    + [(name, 64, False) for name in ("int8", "int4", "e4m3", "e5m2")]
    + [("e4m3", 64, True)],
)
def test_pairs_are_looked_up_as_the_reference_reads_them(coding: str, dim: int, fp8: bool) -> None:
    """NVIDIA's instructions, emulated: every field of every word of random codes gives the reference's level."""
    raw = np.random.Generator(np.random.PCG64(0)).integers(0, 256, num_bytes(coding, dim), dtype=np.uint8)
    scale = torch.tensor(8, dtype=torch.int32).view(torch.float32) if coding == "int4" else torch.tensor(1.0)
    if coding == "int4":
        want = (reference.unpacked(torch.from_numpy(raw), coding, dim) - 8).float()
    elif coding.startswith("lloyd"):
        want = reference.levels_of(reference.unpacked(torch.from_numpy(raw), coding, dim), coding)
    else:
        want = reference.decode(torch.from_numpy(raw), scale, coding, dim)
    first, section, nbits, fields, count = (words.pieces(coding, dim))[0]
    planes, sizes = words.piece_planes(coding, dim, 0), words.word_sizes(coding, dim, 0)
    looked = [int(x) & 0xFFFFFFFF for x in lookup_of(dim, nbits, torch.device("cpu"))] if "lloyd" in coding else []
    assert not looked or len(looked) == LOOKUP
    got = torch.full((dim,), torch.nan)
    for k in range(0, count, 2):  # a register holds two words: of a key two neighbours
        held = []
        for size, (_, at) in zip(sizes, planes, strict=True):
            plane = raw[at:].view(np.uint8)
            here = [each % size if size < 16 else each for each in (k, k + 1)]
            pair = [int.from_bytes(plane[2 * word :][:2].tobytes(), "little") for word in here]
            held.append(pair[0] | pair[1] << 16)
        for p, size in enumerate(sizes):
            if size < 16:
                shift = looked[(4 if size == 8 else 20) + k]
                held += [shift // 4 if p and size == 8 else shift] * 2
        held += [each for table in looked[:4] for each in (table, table)]
        for j in range((fields + 1) // 2):
            asm = lookup.pair_asm(coding, nbits, fields, sizes, j, fp8)
            assert asm is not None
            assert len(held) + 2 == lookup.operands(coding, sizes).count(",") + 1
            for field, result in zip((j, j + fields // 2), emulated(asm, held), strict=True):
                for each, number in zip((k, k + 1), np.array([result], np.uint32).view(np.float16), strict=True):
                    bits = planes[0][0]
                    channel = each * fields + field
                    if sizes[0] < 16:
                        channel = 16 // bits * (each % sizes[0]) + each // sizes[0] * fields + field
                    got[first + channel] = float(number) * lookup.unit_of(coding)
    assert section == 0
    real = want.isfinite()  # no token has a code that is NaN or infinite
    torch.testing.assert_close(got[real], want[real].half().float(), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["int8", "fp8-token-head", "turboquant"])
def test_generate_takes_ragged_rows_on_both_paths(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps planned on the host and steps that decide nothing there: the same tokens, near those of stock attention,
    bytes as predicted and all weighed, a rotation's shared tensors too."""
    pytest.importorskip("transformers", reason="the runtime extra (transformers) is not installed")
    from hf_models import prompt, tiny

    from kvruntime import make_cache
    from kvruntime.bench.harness.weigh import weigh
    from kvruntime.hf import empty
    from kvruntime.hf.cache import argument
    from kvruntime.hf.models import layer_shapes
    from kvsim.engines.kvruntime import stored_shape
    from kvsim.layout import shared_buffers

    monkeypatch.setattr(empty, "steps_on", lambda device: True)
    model, inputs = tiny("Llama"), prompt(3, 30, (0, 7, 22))
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}
    settings |= {"output_logits": True, "pad_token_id": 0}
    want = model.generate(**inputs, **settings)
    have = []
    for compiled in (None, False):
        cache = make_cache(model, name, compiled=compiled)
        have.append(model.generate(**inputs, **argument(cache), **settings))
        shapes = [stored_shape(cache.method, shape) for shape in layer_shapes(model)]
        size = sum(nbytes(cache.method.buffers(shape, 3, cache.num_provided)) for shape in shapes)
        assert cache.nbytes == size + nbytes(shared_buffers(cache.method, shapes))
    assert weigh(cache) - cache.step_nbytes == cache.nbytes
    assert torch.equal(have[0].sequences, have[1].sequences)
    off = max((a - b).abs().max().item() for a, b in zip(want.logits[:2], have[0].logits[:2], strict=True))
    assert 0 < off < 0.4
