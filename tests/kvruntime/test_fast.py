"""The Gluon decode kernel against float64 on the dequantized cache.

On a CUDA device (sm_80 on) the kernel runs there; elsewhere in NumPy (gluon_numpy.py), on the same points.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="the runtime extra (torch) is not installed")
triton = pytest.importorskip("triton", reason="the runtime extra (triton) is not installed")

import gluon_numpy  # noqa: E402

from kvruntime.kernels.reference import Scores  # noqa: E402
from kvruntime.methods.kivi import (  # noqa: E402
    fast,
    fast_copies,
    fast_exact,
    fast_merge,
    fast_operands,
    fast_plan,
    fast_split,
    reference,
)
from kvruntime.methods.kivi.reference import Layout, Stored  # noqa: E402
from kvsim.layout import LayerShape  # noqa: E402
from kvsim.methods import Kivi, kivi_boost, kivi_seed  # noqa: E402
from kvsim.methods.packing import boosted_channels  # noqa: E402

HERE = Path(__file__).parents[1] / "support"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
METHODS = {
    "2-bit g16 r64": Kivi(group_size=16, residual_length=64, value_group_size=32),
    "2-bit g32": Kivi(),
    "2-bit g64 sink": Kivi(group_size=64, sink_length=4),
    "2-bit gk128": Kivi(key_group_size=128, value_group_size=64),
    "2-bit g64 head": Kivi(group_size=64, value_group_size="head", residual_length=192),
    "4-bit g32": Kivi(nbits=4),
    "4-bit g64": Kivi(nbits=4, group_size=64, sink_length=1),
    "8-bit g64": Kivi(nbits=8, group_size=64),
    "k4v2": Kivi(key_nbits=4, value_nbits=2),
    "k2v8": Kivi(key_nbits=2, value_nbits=8, group_size=64),
}
Q_PER_KV = (1, 2, 4, 7, 8, 12)
SHARING = {"plan": {}, "one split": {"num_splits": 1}, "five": {"num_splits": 5}, "shares": {"equal_shares": True}}
MERGED = {"one split": 1, "five": 5}
"""Splits whose parts are merged by the last program too."""
POINTS = [(name, dim, sharing, "float16") for name in METHODS for dim in (64, 128) for sharing in SHARING]
WIDE = ("2-bit g64 sink", "4-bit g64", "8-bit g64", "k2v8")
POINTS += [(name, 256, sharing, "float16") for name in WIDE for sharing in SHARING]
POINTS += [("2-bit g64 sink", 512, "plan", "float16"), ("4-bit g64", 512, "five", "float16")]
POINTS += [(name, 64, "shares", dtype) for name in METHODS for dtype in ("bfloat16", "float32")]
MORE = {
    "8-bit g32 sink": Kivi(nbits=8, sink_length=4),
    "k2v8 gk128 gv32": Kivi(key_nbits=2, value_nbits=8, key_group_size=128, value_group_size=32),
}
THIRDS = ("2-bit g16 r64", "2-bit g32", "2-bit g64 head", "4-bit g32", "k4v2", *MORE)
"""Methods whose value groups divide the chunks of 64 and 32 channels that a head of 96 is, or are the head."""
POINTS += [(name, 96, sharing, "float16") for name in THIRDS for sharing in SHARING]
POINTS += [("k4v2", 96, "plan", dtype) for dtype in ("bfloat16", "float32")]
METHODS |= MORE
SIXTEENS = {
    "2-bit gv80": Kivi(group_size=64, value_group_size="head", residual_length=192, sink_length=4),
    "2-bit g32 gv16": Kivi(value_group_size=16),
    "2-bit g16 gv16 r64": Kivi(group_size=16, residual_length=64),
    "2-bit gk128 gv16": Kivi(key_group_size=128, value_group_size=16),
    "4-bit gv80": Kivi(nbits=4, group_size=64, value_group_size="head"),
    "4-bit g32 gv16": Kivi(nbits=4, value_group_size=16, sink_length=1),
    "8-bit g32 gv16": Kivi(nbits=8, value_group_size=16),
    "k4v2 gv16": Kivi(key_nbits=4, value_nbits=2, value_group_size=16),
    "k8v2 gv80": Kivi(key_nbits=8, value_nbits=2, value_group_size="head"),
    "k2v8 gv16": Kivi(key_nbits=2, value_nbits=8, key_group_size=64, value_group_size=16),
    "k2v4 gv80": Kivi(key_nbits=2, value_nbits=4, key_group_size=64, value_group_size="head"),
}
"""Methods of heads of 80 channels, whose value groups divide the chunks of 64 and 16 channels or are the head."""
POINTS += [(name, 80, sharing, "float16") for name in SIXTEENS for sharing in SHARING]
POINTS += [("k4v2 gv16", 80, "plan", dtype) for dtype in ("bfloat16", "float32")]
METHODS |= SIXTEENS


BOOSTED = {
    "boost": kivi_boost(),
    "boost v4 gk128": kivi_boost(value_nbits=4, group_size=128, sink_length=1),
}
"""Boosted key channels and rotated values, of 64 and 128 channels."""
POINTS += [("boost", dim, sharing, "float16") for dim in (64, 128) for sharing in SHARING]
POINTS += [("boost v4 gk128", 64, "five", "float16"), ("boost v4 gk128", 128, "shares", "float16")]
POINTS += [("boost", 128, "plan", dtype) for dtype in ("bfloat16", "float32")]
METHODS |= BOOSTED
ROTATED = {
    "rotated g32": Kivi(rotate_values=True),
    "rotated k2v4 g64": Kivi(value_nbits=4, group_size=64, sink_length=4, rotate_values=True),
}
"""Rotated values without boosted keys, as an engine's pages hold them."""
POINTS += [("rotated g32", 64, "shares", "float16"), ("rotated k2v4 g64", 64, "one split", "float16")]
POINTS += [("rotated g32", 128, "five", "float16"), ("rotated k2v4 g64", 128, "plan", "bfloat16")]
METHODS |= ROTATED


def rotate_rows(x, n, width, size):
    return gluon_numpy.Value(reference.rotated(torch.from_numpy(x.a), size).numpy())


def numpy_kernels(copies=None, **replaced):
    """The names of ``fast.py``, its kernels and those that it takes from the files beside it in NumPy."""
    modules = (fast_plan, fast_operands, fast_copies, fast_exact, fast_merge, fast_split, fast)
    names = gluon_numpy.run_modules(
        modules, fast_plan=replaced, fast_copies=copies or {}, fast_merge={"rotate_rows": rotate_rows}
    )
    names |= replaced
    names["supports"] = lambda *_: True
    properties = SimpleNamespace(multi_processor_count=2, shared_memory_per_multiprocessor=228 << 10, major=9)
    cuda = SimpleNamespace(get_device_properties=lambda _: properties, get_device_capability=lambda _: (9, 0))
    names["torch"] = SimpleNamespace(cuda=cuda, float32=torch.float32)
    return names


@pytest.fixture(scope="module")
def attend():
    if DEVICE == "cuda":
        if torch.cuda.get_device_capability() < (8, 0):
            pytest.skip("the kernel needs a device of compute capability 8.0 or higher")
        return fast.attend
    return numpy_kernels()["attend"]


class Filled:
    """Buffers of ``method``, poisoned and then filled, rows of ``lengths`` tokens, and what they hold in float64.

    All of it is made and judged on the CPU: a sanitizer instruments every kernel, and PyTorch's are many."""

    def __init__(self, method, dim, heads, lengths, key, value):
        self.method, self.lengths, self.record = method, lengths, method.record(LayerShape(heads, dim, dim))
        self.tensors = {}
        for buffer in method.buffers(LayerShape(heads, dim, dim), len(lengths), max(lengths)):
            fill = 0 if buffer.name in ("lengths", "key_order") else -7 if buffer.dtype == "int32" else float("nan")
            dtype = key.dtype if buffer.name.startswith("exact") else getattr(torch, buffer.dtype)
            self.tensors[buffer.name] = torch.full(buffer.shape, fill, dtype=dtype)
        self.fill(key.cpu(), value.cpu(), lengths)

    def fill(self, key, value, lengths):
        """Its first tokens: the rows' last ``lengths`` of ``key`` and ``value``."""
        stores = [self.tensors[name] for name in ("records", "exact_key", "exact_value")]
        layout = Layout(self.record, self.method.sink_length, self.method.residual_length)
        none = torch.zeros(2, len(lengths), dtype=torch.int32)
        order = self.tensors.get("key_order")
        reference.append(key, value, list(lengths), Stored(*stores, *none, key_order=order), layout)
        self.lengths, self.packed = lengths, [self.method.num_packed(n) for n in lengths]
        self.tensors["lengths"].copy_(torch.tensor([lengths, self.packed]))
        self.stores = [tensor.to(DEVICE) for tensor in stores]
        order = order if order is None else order.to(DEVICE)
        self.held = Stored(*self.stores, *self.tensors["lengths"].to(DEVICE), key_order=order)
        self.layout = layout
        self.arguments = (self.held, layout)
        self.new = key, value

    def truth(self, row):
        sink, packed = self.method.sink_length, self.packed[row]
        words = self.tensors["records"][row, : packed // self.record.num_tokens].transpose(0, 1)
        out = []
        order = self.tensors["key_order"][row] if self.record.boosted else None
        olds = reference.unpack_records(words, self.record, key_order=order)
        if self.record.rotation:
            olds = olds[0], reference.rotated(olds[1], self.record.rotation)
        for old, new in zip(olds, self.new, strict=True):
            own = new[row, :, new.shape[2] - self.lengths[row] :].double()
            out.append(torch.cat([own[:, :sink], old.double(), own[:, sink + packed :]], 1))
        return out

    def error(self, out, query, scale, row, fresh=None):
        """Relative to float64 attention; the largest value of queries that are padding or see nothing."""
        out, query = out.cpu(), query.cpu()
        fresh = fresh and [x.cpu() for x in fresh]
        count = query.shape[2] if fresh is None else int(fresh[2][row])
        nothing = out[row, :, : query.shape[2] - count if self.lengths[row] or fresh else None]
        worst = nothing.abs().max().item() if nothing.numel() else 0.0
        if not count or nothing.shape[1] == query.shape[2]:
            return worst
        key, value = self.truth(row)
        seen = None
        if fresh is not None:
            new = [x[row, :, x.shape[2] - count :].double() for x in fresh[:2]]
            key, value = torch.cat([key, new[0]], 1), torch.cat([value, new[1]], 1)
            last = key.shape[1] - count + torch.arange(count)
            seen = torch.arange(key.shape[1]) <= last[:, None]
        rows = query[row, :, query.shape[2] - count :].double().unflatten(0, (key.shape[0], -1))
        score = scale * rows @ key[:, None].transpose(2, 3)
        truth = (score if seen is None else score.masked_fill(~seen, -torch.inf)).softmax(-1) @ value[:, None]
        own = out[row, :, query.shape[2] - count :].double().view_as(truth)
        return max(worst, ((own - truth).norm() / truth.norm()).nan_to_num(torch.inf).item())  # max() drops a NaN


def normal(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def sized(x, dtype=torch.float16):
    return x.to(dtype).to(DEVICE)


@pytest.mark.parametrize(("name", "dim", "sharing", "dtype"), POINTS)
def test_error(attend, name, dim, sharing, dtype) -> None:
    """Rows of many lengths, the ring's boundaries too; ``dtype`` is the exact tokens' (float32: float16 query)."""
    if dtype == "bfloat16" and DEVICE == "cpu":
        pytest.skip("NumPy has no bfloat16")
    method = METHODS[name]
    point = (list(METHODS).index(name) + 3 * list(SHARING).index(sharing) + dim // 64) % len(Q_PER_KV)
    q_per_kv, heads, full = Q_PER_KV[point], 2, method.residual_length
    choices = [0, 1, full - 1, full, full + 1, 2 * full - 1, 517, 300, 3 * full + 5]
    lengths = [choices[(point + 3 * row) % len(choices)] + method.sink_length * (row % 2) for row in range(3)]
    most = max(lengths)
    key, value, query = normal(point, (3, heads, most, dim), (3, heads, most, dim), (3, heads * q_per_kv, 1, dim))
    cache = Filled(method, dim, heads, lengths, sized(key, getattr(torch, dtype)), sized(value, getattr(torch, dtype)))
    query = sized(query, torch.bfloat16 if dtype == "bfloat16" else torch.float16)
    out = attend(query, *cache.arguments, dim**-0.5, **SHARING[sharing])
    assert out.dtype == query.dtype
    allowed = 4e-3 if dtype == "bfloat16" else 2e-3  # rounding the result to bfloat16 alone makes 1.7e-3
    errors = [cache.error(out, query, dim**-0.5, row) for row in range(3)]
    assert max(errors) <= allowed, (lengths, q_per_kv, errors)
    if sharing in MERGED:
        arrivals = torch.zeros(2 * 3 * heads * q_per_kv, dtype=torch.int32, device=DEVICE)
        for _ in range(2):  # the counts are left as they were found
            again = attend(query, *cache.arguments, dim**-0.5, num_splits=MERGED[sharing], arrivals=arrivals)
            torch.testing.assert_close(again.cpu(), out.cpu(), rtol=2 * torch.finfo(out.dtype).eps, atol=1e-6)
        assert not arrivals.cpu().any()


QUERIES = ((2, 1), (1, 4), (3, 7), (5, 4), (16, 2), (4, 12), (33, 1), (2, 2), (64, 1), (17, 3))
"""Queries a row and heads that share a key/value head."""
OLD = [name for name in METHODS if name not in MORE and name not in SIXTEENS]
MANY = [(name, dim, sharing) for name in OLD for dim in (64, 128) for sharing in SHARING]
MANY += [(name, 96, sharing) for name in ("2-bit g32", "2-bit g64 head", "k4v2") for sharing in SHARING]
MANY += [
    (name, 80, sharing) for name in ("2-bit gv80", "2-bit g32 gv16", "k4v2 gv16", "k2v8 gv16") for sharing in SHARING
]


@pytest.mark.parametrize(("name", "dim", "sharing"), MANY)
def test_several_queries(attend, name, dim, sharing) -> None:
    """Each sees what is stored and the fresh tokens up to its own; some rows are padded on the left."""
    method, index = METHODS[name], MANY.index((name, dim, sharing))
    count, q_per_kv = QUERIES[index % len(QUERIES)]
    heads, full = 1 + (count < 16), method.residual_length
    choices = [0, 1, full - 1, full, full + 1, 2 * full - 1, 517, 300]
    lengths = [choices[(index // 4 + 3 * row) % len(choices)] + method.sink_length * (row % 2) for row in range(3)]
    most = max(lengths)
    sizes = [(3, heads, most, dim)] * 2 + [(3, heads * q_per_kv, count, dim)]
    key, value, query, *new = normal(index, *sizes, (3, heads, count, dim), (3, count, heads, dim))
    cache = Filled(method, dim, heads, lengths, sized(key), sized(value))
    counts = torch.tensor([count, (count + 1) // 2, index % 2], dtype=torch.int32, device=DEVICE)
    new[1] = new[1].transpose(1, 2)
    for x in new:
        x[1, :, : count // 2] = float("nan")
    fresh = (*(sized(x) for x in new), counts)
    out = attend(sized(query), *cache.arguments, dim**-0.5, fresh, **SHARING[sharing])
    assert out.shape == query.shape
    assert out.transpose(1, 2).is_contiguous()  # as an output projection reads it, without a copy
    errors = [cache.error(out, sized(query), dim**-0.5, row, fresh) for row in range(3)]
    assert max(errors) <= 2e-3, (lengths, count, q_per_kv, errors)


def pooled(records, packed, record, seed):
    """A pool with the rows' records in random places, and where: the first two of row 1 are row 0's."""
    generator = torch.Generator().manual_seed(seed)
    batch, blocks = records.shape[:2]
    place = torch.randperm(batch * blocks + 3, generator=generator)[: batch * blocks].view(batch, blocks)
    pool = torch.full((batch * blocks + 3, *records.shape[2:]), -7, dtype=torch.int32)
    pool[place] = records.cpu()
    held = torch.arange(blocks) < torch.tensor(packed)[:, None] // record.num_tokens
    pool[place[1, :2]] = -7
    place[1, :2] = place[0, :2]
    return pool.to(DEVICE), torch.where(held, place, -(1 << 30)).to(torch.int32).to(DEVICE)


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize(
    ("name", "dim", "count"),
    [
        *[("2-bit g64 sink", 128, None), ("2-bit gk128", 64, None), ("k4v2", 64, 5)],
        *[("8-bit g32 sink", 96, None), ("k4v2", 96, 5)],
        *[("2-bit gv80", 80, None), ("k4v2 gv16", 80, 5)],
    ],
)
def test_block_table(attend, name, dim, sharing, count) -> None:
    """Records anywhere in a pool give the same bits as row after row; two rows share records; -2**30 is no place."""
    method = METHODS[name]
    lengths = [900, 700, 70]
    sizes = [(3, 2, 900, dim)] * 2 + [(3, 8, count or 1, dim)] + [(3, 2, count or 1, dim)] * 2
    key, value, query, *new = normal(2, *sizes)
    for x in (key, value):  # the first tokens of row 1, which lie to the right, are those of row 0
        x[1, :, 200 : 200 + 400] = x[0, :, :400]
    query, *new = (sized(x) for x in (query, *new))
    cache = Filled(method, dim, 2, lengths, key.half(), value.half())
    pool, table = pooled(cache.stores[0], cache.packed, cache.record, 4)
    fresh = None if count is None else (*new, torch.tensor([count, 2, 1], dtype=torch.int32, device=DEVICE))
    options = {"fresh": fresh, **SHARING[sharing]}
    out = attend(query, *cache.arguments, dim**-0.5, **options)
    assert max(cache.error(out, query, dim**-0.5, row, fresh) for row in range(3)) <= 2e-3
    wide = torch.cat([table.cpu(), table.cpu()], 1).to(DEVICE)[:, : table.shape[1]]  # rows not next to each other
    for places in (table, wide):
        again = attend(query, cache.held._replace(records=pool, block_table=places), cache.layout, dim**-0.5, **options)
        assert torch.equal(again.cpu(), out.cpu())
    with pytest.raises(ValueError, match="expected \\[3, num_blocks\\] int32 over"):
        attend(query, cache.held._replace(records=pool, block_table=table[:2]), cache.layout, dim**-0.5, **options)


def paged(cache, page, seed):
    """The exact tokens in a pool of pages, keys beside values, and where; pages without one have no place."""
    heads, _, dim = cache.stores[1].shape[1:]
    each = max(cache.lengths) // page + 1
    generator = torch.Generator().manual_seed(seed)
    place = torch.randperm(len(cache.lengths) * each + 2, generator=generator)[: len(cache.lengths) * each]
    table = place.view(len(cache.lengths), each).int()
    pool = torch.full((place.numel() + 2, heads, page, 2 * dim), float("nan"), dtype=cache.stores[1].dtype)
    for row, (length, packed) in enumerate(zip(cache.lengths, cache.packed, strict=True)):
        own = [x[row, :, x.shape[2] - length :] for x in cache.new]
        own[1] = reference.stored_values(own[1], cache.record, pool.dtype)
        for t in range(packed, length):
            pool[table[row, t // page], :, t % page] = torch.cat([x[:, t] for x in own], 1)
        table[row, : packed // page] = table[row, -(-length // page) :] = -(1 << 30)
    key, value = pool.to(DEVICE).split(dim, 3)
    return cache.held._replace(exact_key=key, exact_value=value, exact_table=table.to(DEVICE))


@pytest.mark.parametrize(
    ("name", "dim", "page"), [("2-bit g32", 64, 8), ("8-bit g64", 128, 16), ("k4v2", 96, 64), ("rotated g32", 64, 16)]
)
@pytest.mark.parametrize("sharing", SHARING)
def test_exact_tokens_in_a_pool(attend, name, dim, page, sharing) -> None:
    """By a table of pages, with a block table too; one row, several, several queries."""
    method = METHODS[name]
    for lengths, count in (([300, 700, 5], None), ([450], None), ([130, 0, 260], 5)):
        rows, most = len(lengths), max(lengths)
        sizes = [(rows, 2, most, dim)] * 2 + [(rows, 4, count or 1, dim)] + [(rows, 2, count or 1, dim)] * 2
        key, value, query, *new = (sized(x) for x in normal(page, *sizes))
        cache = Filled(method, dim, 2, lengths, key, value)
        stored, fresh = paged(cache, page, 4), None
        if count:
            fresh = (*new, torch.tensor([count, 2, 0], dtype=torch.int32, device=DEVICE))
        pool, table = (cache.stores[0], None) if rows < 2 else pooled_apart(cache)
        for held in (stored, stored._replace(records=pool, block_table=table)):
            out = attend(query, held, cache.layout, dim**-0.5, fresh, **SHARING[sharing])
            assert max(cache.error(out, query, dim**-0.5, row, fresh) for row in range(rows)) <= 2e-3


def pooled_apart(cache):
    """Records in random places of a pool, no two rows' the same."""
    records = cache.stores[0].cpu()
    place = torch.randperm(records.shape[0] * records.shape[1], generator=torch.Generator().manual_seed(1))
    pool = torch.empty_like(records.flatten(0, 1))
    pool[place] = records.flatten(0, 1)
    return pool.to(DEVICE), place.view(records.shape[:2]).int().to(DEVICE)


def test_fresh_alone(attend) -> None:
    """Nothing stored, and no slot provided for."""
    method = Kivi(residual_length=64)
    record = method.record(LayerShape(1, 64, 64))
    query, key, value = (sized(x) for x in normal(5, (2, 2, 20, 64), (2, 1, 20, 64), (2, 1, 20, 64)))
    none = torch.zeros(2, 2, dtype=torch.int32, device=DEVICE)
    empty = [query.new_empty(2, 1, 0, 64) for _ in range(2)]
    records = torch.empty(2, 0, 1, record.num_words, dtype=torch.int32, device=DEVICE)
    counts = torch.tensor([20, 7], dtype=torch.int32, device=DEVICE)
    held = Stored(records, *empty, *none)
    arguments = (query, held, Layout(record, 0, 64), 0.125, (key, value, counts))
    truth = reference.attend(query.float(), *arguments[1:])
    for sharing in SHARING.values():
        assert ((attend(*arguments, **sharing).float() - truth).norm() / truth.norm()).item() <= 2e-3


def test_one_row(attend) -> None:
    """A single row's programs read ahead of its lengths: records and slots that hold nothing must not show."""
    method = METHODS["2-bit g64 sink"]
    for length in (1, 3, 70, 131, 197, 460):
        key, value, query = normal(length, (1, 2, 700, 64), (1, 2, 700, 64), (1, 8, 1, 64))
        cache = Filled(method, 64, 2, [700], sized(key), sized(value))
        for name in ("records", "exact_key", "exact_value"):
            tensor = cache.tensors[name]
            tensor.fill_(float("nan") if tensor.is_floating_point() else -7)
        cache.fill(*(x.half()[:, :, :length] for x in (key, value)), [length])
        out = attend(sized(query), *cache.arguments, 0.125)
        assert cache.error(out, sized(query), 0.125, 0) <= 2e-3, length


@pytest.mark.skipif(DEVICE == "cuda", reason="what another launch does meanwhile is played in NumPy")
@pytest.mark.parametrize(("name", "length"), [("2-bit g64 sink", 133), ("2-bit gk128", 129)])
def test_record_packed_while_it_starts(name, length) -> None:
    """Launched early, a program asks for tiles before the step that packs the newest record has ended."""
    method = METHODS[name]
    key, value, query = normal(length, (1, 1, length, 64), (1, 1, length, 64), (1, 4, 1, 64))
    cache = Filled(method, 64, 1, [length], sized(key), sized(value))
    records = cache.stores[0]
    true = records.clone()
    records.fill_(0x7FFF7FFF)  # NaN as a scale

    def step_ends() -> None:
        records.copy_(true)

    names = numpy_kernels(gdc_wait=step_ends)
    out = names["attend"](sized(query), *cache.arguments, 0.125, num_splits=1)
    assert cache.error(out, sized(query), 0.125, 0) <= 2e-3


@pytest.mark.skipif(DEVICE == "cuda", reason="whether a kernel waits for another is seen in NumPy")
def test_early_start_can_be_switched_off() -> None:
    """Behind a kernel that lets its dependents start before it has packed: then this is an ordinary launch."""
    key, value, query = normal(1, (2, 1, 300, 64), (2, 1, 300, 64), (2, 4, 1, 64))
    cache = Filled(METHODS["2-bit gk128"], 64, 1, [300, 129], sized(key), sized(value))
    waits = []
    attend = numpy_kernels(gdc_wait=lambda: waits.append(1), gdc_launch_dependents=lambda: waits.append(1))["attend"]
    outs = [attend(sized(query), *cache.arguments, 0.125, early=early) for early in (False, True)]
    assert torch.equal(*outs)
    assert waits
    waits.clear()
    attend(sized(query), *cache.arguments, 0.125, early=False)
    assert not waits


@pytest.mark.parametrize("kind", ["flat", "sharp", "limit", "sink"])
@pytest.mark.parametrize(
    ("name", "dim", "q_per_kv"),
    [
        *[("2-bit g64 sink", 64, 4), ("2-bit gk128", 128, 4), ("4-bit g64", 128, 8), ("2-bit g64 sink", 256, 7)],
        *[("2-bit g32", 96, 1), ("4-bit g32", 96, 8)],
        *[("2-bit gv80", 80, 1), ("2-bit g32 gv16", 80, 8), ("4-bit g32 gv16", 80, 4)],
    ],
)
def test_hard_cases(attend, name, dim, q_per_kv, kind) -> None:
    """Near-flat weights over 65,536 tokens (2,048 in NumPy), a sharp softmax over outlier channels, values that reach
    ``reference.LIMIT``, and a first token that takes most of the weight and adds nothing."""
    length = 65536 if kind == "flat" and DEVICE == "cuda" else 2048
    key, value, query = normal(7, (1, 1, length, dim), (1, 1, length, dim), (1, q_per_kv, 1, dim))
    if kind == "flat":
        query *= 0.05
    elif kind == "sharp":
        key[..., ::23] *= 20
        query *= 4
    elif kind == "limit":
        key, value, query = (2e4 * key).clamp(-6e4, 6e4), (2e4 * value).clamp(-6e4, 6e4), 2e-5 * query
    else:
        key[:, :, 0], value[:, :, 0] = 1.4 * query[:, 0], 0
    cache = Filled(METHODS[name], dim, 1, [length], sized(key), sized(value))
    query = sized(query)
    for sharing in ({}, {"equal_shares": True}):
        out = attend(query, *cache.arguments, dim**-0.5, **sharing)
        assert cache.error(out, query, dim**-0.5, 0) <= 2e-3


@pytest.mark.parametrize("large", ["first", "last"])
@pytest.mark.parametrize(
    ("name", "dim"), [("2-bit g32", 96), ("8-bit g32 sink", 96), ("2-bit g32 gv16", 80), ("2-bit gv80", 80)]
)
def test_chunks_have_one_range(attend, name, dim, large) -> None:
    """A head of two chunks, one of which alone has what sets the query's scale and the weights'."""
    key, value, query = normal(11, (1, 2, 700, dim), (1, 2, 700, dim), (1, 8, 1, dim))
    channels = slice(0, 64) if large == "first" else slice(64, dim)
    key, query = 4 * key, query / 1024
    query[..., channels] *= 1024
    value[..., channels] = (3e4 * value[..., channels]).clamp(-6e4, 6e4)
    cache = Filled(METHODS[name], dim, 2, [700], sized(key), sized(value))
    for sharing in SHARING.values():
        out = attend(sized(query), *cache.arguments, dim**-0.5, **sharing)
        assert cache.error(out, sized(query), dim**-0.5, 0) <= 2e-3


CHANGES = {"sinks": (None, True), "softcap": (4.0, False), "both": (4.0, True)}
CHANGED = [
    ("2-bit g64 sink", 64, 4, None, "both"), ("2-bit gk128", 128, 8, None, "both"), ("4-bit g32", 128, 4, 5, "both"),
    ("k4v2", 96, 1, None, "softcap"), ("2-bit g32 gv16", 80, 8, 3, "sinks"), ("4-bit g64", 256, 7, None, "both"),
    ("boost", 64, 4, 2, "both"), ("2-bit g32", 64, 8, None, "sinks"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "dim", "q_per_kv", "count", "change"), CHANGED)
def test_sinks_and_softcaps(attend, name, dim, q_per_kv, count, change) -> None:
    """Against the reference in float32: rows that hold nothing too, each way to share out the work, and one launch."""
    method, (softcap, has_sinks) = METHODS[name], CHANGES[change]
    lengths = [0, 77, 300]
    sizes = [(3, 2, 300, dim)] * 2 + [(3, 2 * q_per_kv, count or 1, dim)] + [(3, 2, count or 1, dim)] * 2
    key, value, query, *new = (sized(x) for x in normal(4, *sizes))
    query, sinks = 3 * query, None
    if has_sinks:
        sinks = torch.linspace(-2, 9, 2 * q_per_kv).to(torch.bfloat16 if DEVICE == "cuda" else torch.float16).to(DEVICE)
    scores = Scores(softcap, sinks, window=150 if count is None and not method.sink_length else None)
    cache = Filled(method, dim, 2, lengths, key, value)
    fresh = None if count is None else (*new, torch.tensor([count, 1, 0], dtype=torch.int32, device=DEVICE))
    truth = reference.attend(query.float(), *cache.arguments, dim**-0.5, fresh, scores=scores).cpu()
    plain = reference.attend(query.float(), *cache.arguments, dim**-0.5, fresh).cpu()
    assert (truth - plain).norm() > 0.05 * truth.norm()
    arrivals = torch.zeros(12 * q_per_kv * (count or 1), dtype=torch.int32, device=DEVICE)
    for sharing in (*SHARING.values(), {"num_splits": 3, "arrivals": arrivals}):
        out = attend(query, *cache.arguments, dim**-0.5, fresh, **sharing, scores=scores).float().cpu()
        assert (out - truth).norm() <= 2e-3 * truth.norm(), sharing
        if count is None:
            assert not out[0].any()


def test_nan_shows(attend) -> None:
    """A NaN that was packed reaches the output of its head, and of no other."""
    key, value, query = normal(3, (1, 2, 400, 64), (1, 2, 400, 64), (1, 4, 1, 64))
    key[0, 1, 10, 5] = float("nan")
    cache = Filled(METHODS["2-bit g32"], 64, 2, [400], sized(key), sized(value))
    out = attend(sized(query), *cache.arguments, 0.125)
    assert out[0, 2:].cpu().isnan().all()
    assert not out[0, :2].cpu().isnan().any()


def test_supports() -> None:
    """What the kernel takes, and that anything else is refused with the record's name."""
    for name, method in METHODS.items():
        for dim in (64, 128) if name not in SIXTEENS else (80,):
            assert fast_plan.holds(method.record(LayerShape(2, dim, dim)))
    assert all(fast_plan.holds(METHODS[name].record(LayerShape(2, 256, 256))) for name in WIDE)
    assert all(fast_plan.holds(METHODS[name].record(LayerShape(2, 96, 96))) for name in THIRDS)
    refused = [
        (Kivi(residual_length=32), 64, 64), (Kivi(nbits=3, residual_length=64), 64, 64), (kivi_seed(), 64, 64),
        (Kivi(group_size=96, residual_length=96, value_group_size=32), 64, 64), (Kivi(), 256, 256),
        (Kivi(value_group_size=16), 96, 96), (Kivi(value_group_size=48), 96, 96), (Kivi(nbits=3), 96, 96),
        (Kivi(value_group_size=40), 80, 80), (Kivi(nbits=3, value_group_size=16), 80, 80), (Kivi(), 160, 160),
        (Kivi(key_group_size=64, value_group_size=32), 256, 256),
        (Kivi(), 128, 64), (Kivi(value_group_size=16), 64, 64),
    ]  # fmt: skip
    for method, key_dim, value_dim in refused:
        assert not fast_plan.holds(method.record(LayerShape(2, key_dim, value_dim))), method
    record = Kivi().record(LayerShape(2, 64, 64))
    query = torch.zeros(1, 4, fast_plan.MAX_QUERIES + 1, 64, dtype=torch.float16, device=DEVICE)
    able, fresh = DEVICE == "cuda" and torch.cuda.get_device_capability() >= (8, 0), (query, query, None)
    assert fast_plan.supports(record, query[:, :, :1]) == fast_plan.supports(record, query[:, :, 1:], fresh) == able
    assert not fast_plan.supports(record, query, fresh)
    assert not fast_plan.supports(record, query[:, :, :2])
    with pytest.raises(ValueError, match="65 queries"):
        fast.attend(query, None, Layout(record, 0, 128), 0.125)


def test_plan() -> None:
    """Programs fill the device, or its schedulers where none then has more than a few units."""
    assert fast_plan.plan_splits(64, 520, 8, 132) == 16
    assert fast_plan.plan_splits(8, 520, 8, 132) == 132
    assert fast_plan.plan_splits(8, 260, 8, 132) == 66
    assert fast_plan.plan_splits(8, 132, 8, 132) == 66
    assert fast_plan.plan_splits(8, 134, 8, 132) == 45
    assert fast_plan.plan_splits(8, 68, 8, 132) == 34
    assert fast_plan.plan_splits(8, 36, 8, 132) == 36
    assert fast_plan.plan_splits(12, 20, 12, 132) == 20
    assert fast_plan.plan_splits(12, 5, 12, 132) == 5
    assert fast_plan.plan_splits(768, 22, 12, 132) == 2
    assert fast_plan.plan_splits(5000, 22, 12, 132) == 1


def test_large_tiles_have_half_the_programs() -> None:
    held = {
        (nbits, dim): fast_plan.programs_per_sm(
            fast_plan.constants(Kivi(nbits=nbits, group_size=64).record(LayerShape(8, dim, dim)), 0, 64, 8, 4)
        )
        for nbits in (2, 4, 8)
        for dim in (64, 128, 256)
    }
    half = {(8, 128), (4, 256), (8, 256)}
    assert held == {key: (12 if key[1] == 64 else 8) // (2 if key in half else 1) for key in held}


def test_merges() -> None:
    """In the last program where parts are small or the device is full, and never very many of them."""
    assert fast_plan.merges(12, 12, 64, 132)
    assert not fast_plan.merges(12, 8, 512, 132)
    assert fast_plan.merges(16, 64, 512, 132)
    assert not fast_plan.merges(17, 64, 512, 132)


@pytest.mark.parametrize("merged", [True, False], ids=["one launch", "two launches"])
@pytest.mark.parametrize(
    ("name", "dim", "splits"),
    [
        *[("2-bit g64 sink", 64, 3), ("4-bit g32", 128, 2), ("2-bit gk128", 64, 4)],
        *[("2-bit g32", 96, 3), ("2-bit gv80", 80, 3)],
    ],
)
def test_drawn(attend, name, dim, splits, merged, monkeypatch) -> None:
    """The end of a long row is whoever's comes first: every tile is somebody's, and the counts are zero again."""
    method = METHODS[name]
    lengths = [64 * (9 * splits + 20), 64 * 7 * splits + 70, 5]
    key, value, query = normal(9, (3, 2, max(lengths), dim), (3, 2, max(lengths), dim), (3, 8, 1, dim))
    cache = Filled(method, dim, 2, lengths, sized(key), sized(value))
    run, drawn = attend, []
    if DEVICE == "cuda":
        monkeypatch.setattr(fast_plan, "MERGED_PARTS", 16 if merged else 0)
    else:
        draw = gluon_numpy.run_modules((fast_plan, fast_operands, fast_copies))["draw"]

        def counted(pointer, wanted):
            drawn.append(bool(wanted))
            return draw(pointer, wanted)

        run = numpy_kernels({"draw": counted}, MERGED_PARTS=16 if merged else 0)["attend"]
    arrivals = torch.zeros(2 * 3 * 8, dtype=torch.int32, device=DEVICE)
    for _ in range(2):
        out = run(sized(query), *cache.arguments, dim**-0.5, num_splits=splits, arrivals=arrivals)
        assert max(cache.error(out, sized(query), dim**-0.5, row) for row in range(3)) <= 2e-3
        assert not arrivals.cpu().any()
    assert DEVICE == "cuda" or any(drawn)


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_as_many_programs_share_a_multiprocessor_as_planned(dim) -> None:
    """Not more, and not fewer where there is room for them: an H100 has 228 KiB, an A100 164."""
    for name, method in METHODS.items():
        if name not in {80: SIXTEENS, 96: THIRDS}.get(dim, METHODS):  # groups that do not divide the head
            continue
        record = method.record(LayerShape(2, dim, dim))
        if not fast_plan.holds(record):
            continue
        fixed = fast_plan.constants(record, 0, 128, 2, 4)
        tile, stage = 64 * dim * max(record.key_nbits, record.value_nbits) // 4, 4 * fixed["KEY_GROUPS"] * dim
        plane = 64 * boosted_channels(dim) // 4 if record.boosted else 0
        own = 2 * (tile + stage + plane + 4 * triton.next_power_of_2(fixed["VALUE_GROUPS"]) * 64) + 1024
        for nbytes in (228 << 10, 164 << 10):
            programs = nbytes // (own + stage * fast_plan.spare(fixed, nbytes))
            assert programs == min(nbytes // own, fast_plan.PROGRAMS_PER_SM[dim]), (method, nbytes)


CEILINGS = {
    "2-bit g32 d128": 2.15,
    "8-bit g64 d128": 2.2,
    "8-bit g64 d256": 1.95,
    "2-bit g32 d64": 2.25,
    "2-bit g64 d64": 1.95,
    "boost d64": 2.2,
    "2-bit g32 d96": 2.1,
    "4-bit g32 d96": 2.2,
    "k4v2 g32 d96": 2.25,
    "2-bit gv80 d80": 1.95,
    "4-bit gv80 d80": 2.05,
    "2-bit g32 gv16 d80": 2.5,
    "k8v2 g32 gv16 d80": 2.85,
}
"""Instructions of the tile loop per code and lane; 1.75 for all others."""
SPILLS_256 = (24, 3) if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8) else (0, 0)
"""Bytes of stack, and local loads in the loop, that heads of 256 channels may take: none under the Tritons that CUDA
builds of PyTorch 2.11 to 2.13 bring (3.6 and 3.7); in all 255 registers, 3.9 arranges five of their layouts worse."""


SPILLS_512 = (800, 300)
"""Those of heads of 512: a tenth of the loop at most."""


@pytest.mark.long
def test_compiles() -> None:
    """For sm_80, sm_89, sm_90 and sm_100, without a GPU: nothing spilled in the loop over tiles, and its length; and
    threads that share a sum agree on it."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parents[1]), environment.get("PYTHONPATH")]))
    run = subprocess.run(
        [sys.executable, HERE / "compile_fast.py", *([] if os.environ.get("EVERY_POINT") else ["--pairs"])],
        capture_output=True,
        text=True,
        env=environment,
        cwd=HERE.parents[1],
    )
    assert run.returncode == 0, run.stderr[-3000:]
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert {sm for _, _, sm, _ in rows} == {80, 89, 90, 100}
    failed = [row for row in rows if isinstance(row[3], str)]
    assert not failed, failed
    for kernel, name, sm, used in rows:
        assert not used["LOCAL"], (kernel, name, sm, used)
        assert not used["unrounded"], (kernel, name, sm, used)
        wide = {"d256": SPILLS_256, "d512": SPILLS_512}.get(name.rpartition(" ")[2])
        stack, local = wide or (32 if kernel.endswith("shares") else 0, 0)
        assert used["STACK"] <= stack, (kernel, name, sm, used)
        if not kernel.startswith("combine"):
            assert used["loop"], (kernel, name, sm, used)
            assert used["loop_local"] <= local, (kernel, name, sm, used)
            ceiling = CEILINGS.get(name, 1.75)
            ceiling += 0.05 * ("queries" in kernel)  # 8 columns: two products of the keys
            ceiling += 0.05 * ("table" in kernel or "pool" in kernel)  # places looked up
            ceiling += 0.05 * ("drawn" in kernel)  # tiles drawn
            ceiling += 190 / used["elements"] * ("scores" in kernel)  # 16 scores a lane, capped and in a window
            assert used["loop"] / used["elements"] <= ceiling, (kernel, name, sm, used)
