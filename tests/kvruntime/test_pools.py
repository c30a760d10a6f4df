"""What a serving engine hands over: records, exact tokens and uncompressed blocks in pools, and queries in one line.

Pools are poisoned, tables have no place where none is needed, and keys lie beside their values.  On a CUDA device the
kernels run there; elsewhere in Triton's interpreter (conftest.py).
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the runtime extra (torch) is not installed")
pytest.importorskip("triton", reason="the runtime extra (triton) is not installed")

from kvruntime.methods.full import decode  # noqa: E402
from kvruntime.methods.full import reference as plain  # noqa: E402
from kvruntime.methods.kivi import append, attention, fast_plan, reference, step  # noqa: E402
from kvruntime.methods.kivi.reference import Layout, Stored, flush_plan  # noqa: E402
from kvsim.layout import LayerShape  # noqa: E402
from kvsim.methods import Kivi, kivi_seed  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, ROWS, PAGE, NOWHERE = 2, 3, 8, -(1 << 30)
METHODS = {
    "2-bit g32": (Kivi(residual_length=64), 64),
    "4-bit g64": (Kivi(nbits=4, group_size=64, residual_length=128), 64),
    "3-bit d96": (Kivi(nbits=3, residual_length=32), 96),
}
STEPS = ((150, 70, 5), (1, 1, 1), (40, 0, 130))
"""New tokens of each row."""


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).half()


def places(rows: int, each: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(rows * each + 2, generator=generator)[: rows * each].view(rows, each).int()


class Pool:
    """A layer in pools, and its books."""

    def __init__(self, name: str, most: int = 450) -> None:
        self.method, self.dim = METHODS[name]
        record = self.method.record(LayerShape(HEADS, self.dim, self.dim))
        self.layout = Layout(record, 0, self.method.residual_length)
        self.blocks, self.pages = places(ROWS, most // record.num_tokens, 1), places(ROWS, most // PAGE + 1, 2)
        self.records = torch.full((self.blocks.numel() + 2, HEADS, record.num_words), -7, dtype=torch.int32)
        self.exact = torch.full((self.pages.numel() + 2, HEADS, PAGE, 2 * self.dim), float("nan"), dtype=torch.float16)
        self.records, self.exact = self.records.to(DEVICE), self.exact.to(DEVICE)
        self.lengths, self.packed = [0] * ROWS, [0] * ROWS

    def after(self, counts) -> list[int]:
        plan = (self.layout.record.num_tokens, 0, self.layout.residual)
        return [flush_plan(n, p, count, *plan) for n, p, count in zip(self.lengths, self.packed, counts, strict=True)]

    def stored(self, counts=(0,) * ROWS) -> Stored:
        """Tables with the places alone that ``counts`` new tokens, or attention, need."""
        after, size = self.after(counts), self.layout.record.num_tokens
        blocks, pages = self.blocks.clone(), self.pages.clone()
        for row, (length, before, count) in enumerate(zip(self.lengths, self.packed, counts, strict=True)):
            held = {t // PAGE for t in range(before, length + count) if t < length or t >= after[row]}
            pages[row, [page for page in range(pages.shape[1]) if page not in held]] = NOWHERE
            blocks[row, after[row] // size :] = NOWHERE
        counted = torch.tensor([self.lengths, self.packed], dtype=torch.int32)
        tensors = (x.to(DEVICE) for x in (*counted, blocks, pages))
        lengths, packed, blocks, pages = tensors
        return Stored(self.records, *self.exact.split(self.dim, 3), lengths, packed, None, blocks, pages)

    def count(self, counts) -> None:
        self.packed = self.after(counts)
        self.lengths = [n + count for n, count in zip(self.lengths, counts, strict=True)]

    def same(self, other: Pool) -> bool:
        pairs = ((self.records, other.records), (self.exact, other.exact))
        return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in pairs)


def own_rows(pool: Pool, tokens: list[tuple[torch.Tensor, torch.Tensor, list[int]]]) -> Stored:
    """The same tokens where every row has records and slots of its own."""
    held = {
        buffer.name: torch.zeros(buffer.shape, dtype=getattr(torch, buffer.dtype))
        for buffer in pool.method.buffers(LayerShape(HEADS, pool.dim, pool.dim), ROWS, 450)
    }
    stored = Stored(held["records"], held["exact_key"], held["exact_value"], *held["lengths"])
    for key, value, counts in tokens:
        reference.append(key, value, counts, stored, pool.layout)
        stored.packed.copy_(torch.tensor(reference_packed(stored, counts, pool.layout)))
        stored.lengths.add_(torch.tensor(counts, dtype=torch.int32))
    return Stored(*(x if x is None else x.to(DEVICE) for x in stored))


def reference_packed(stored: Stored, counts: list[int], layout: Layout) -> list[int]:
    states = zip(stored.lengths.tolist(), stored.packed.tolist(), counts, strict=True)
    return [flush_plan(*state, layout.record.num_tokens, layout.sink, layout.residual) for state in states]


def in_line(x: torch.Tensor, counts) -> torch.Tensor:
    return torch.cat([row[:, row.shape[1] - n :].transpose(0, 1) for row, n in zip(x, counts, strict=True)])


def begin(counts) -> torch.Tensor:
    return torch.tensor([sum(counts[:row]) for row in range(len(counts) + 1)], dtype=torch.int32, device=DEVICE)


def filled(name: str) -> tuple[Pool, list]:
    pool, tokens = Pool(name), []
    for turn, counts in enumerate(STEPS):
        key, value = (normal(10 * turn + i, ROWS, HEADS, max(counts), pool.dim) for i in range(2))
        tokens.append((key, value, list(counts)))
        reference.append(key.to(DEVICE), value.to(DEVICE), counts, pool.stored(counts), pool.layout)
        pool.count(counts)
    return pool, tokens


APPENDS = [("2-bit g32", way) for way in ("rows", "books", "line")] + [("4-bit g64", "rows"), ("3-bit d96", "line")]


@pytest.mark.parametrize(("name", "way"), APPENDS)
def test_append(name: str, way: str) -> None:
    """Kernels write what the reference writes, to the same places, and nothing else."""
    wanted, got = Pool(name), Pool(name)
    for turn, counts in enumerate(STEPS):
        key, value = (normal(10 * turn + i, ROWS, HEADS, max(counts), wanted.dim).to(DEVICE) for i in range(2))
        reference.append(key, value, counts, wanted.stored(counts), wanted.layout)
        if way == "line":
            line, starts = [in_line(x, counts) for x in (key, value)], begin(counts)
            again = Pool(name)
            again.records, again.exact = wanted.records.clone(), wanted.exact.clone()
            again.lengths, again.packed = wanted.lengths, wanted.packed
            reference.append(*line, None, again.stored(counts), again.layout, None, starts)
            assert again.same(wanted)
            append.append(*line, None, got.stored(counts), got.layout, None, starts)
        else:
            books = (got.lengths, got.packed) if way == "books" else None
            number = counts if books else torch.tensor(counts, dtype=torch.int32, device=DEVICE)
            append.append(key, value, number, got.stored(counts), got.layout, books)
        for pool in (wanted, got):
            pool.count(counts)
        assert wanted.same(got), turn
    assert max(got.packed) > 0
    alone = own_rows(wanted, filled(name)[1])
    for row, packed in enumerate(wanted.packed):
        number = packed // wanted.layout.record.num_tokens
        assert torch.equal(wanted.records[wanted.blocks[row, :number].long().to(DEVICE)], alone.records[row, :number])


@pytest.mark.parametrize(("name", "spread"), [("2-bit g32", True), ("4-bit g64", False), ("3-bit d96", True)])
def test_step(name: str, spread: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "FEW_PROGRAMS", 264 if spread else 0)
    (wanted, _), (got, _) = filled(name), filled(name)
    ticket = torch.zeros(ROWS, dtype=torch.int32, device=DEVICE)
    flushed = 0
    one = (1,) * ROWS
    for pool in (wanted, got):  # to the brink
        states = zip(pool.lengths, pool.packed, strict=True)
        counts = [pool.layout.residual - 1 - row - length + packed for row, (length, packed) in enumerate(states)]
        key, value = (normal(i, ROWS, HEADS, max(counts), pool.dim).to(DEVICE) for i in range(2))
        reference.append(key, value, counts, pool.stored(counts), pool.layout)
        pool.count(counts)
    for turn in range(5):
        key, value, query = (normal(100 * turn + i, ROWS, HEADS, 1, wanted.dim).to(DEVICE) for i in range(3))
        stores = wanted.stored(one), got.stored(one)
        before = stores[0].lengths.clone()
        reference.step(query, key, value, stores[0], wanted.layout, before, before)
        step.step(query, key, value, stores[1], got.layout, before, before, ticket)
        flushed += wanted.after(one) != wanted.packed
        for pool, stored in zip((wanted, got), stores, strict=True):
            pool.count(one)
            assert stored.lengths.tolist() == pool.lengths
            assert stored.packed.tolist() == pool.packed
        assert wanted.same(got), turn
    assert flushed


def runs(record, query, fresh=None, starts=None):
    """The kernels that take such a call."""
    yield attention.attend
    if fast_plan.supports(record, query, fresh, starts):
        from kvruntime.methods.kivi import fast

        yield fast.attend


@pytest.mark.parametrize("fresh_length", [0, 5])
@pytest.mark.parametrize("name", METHODS)
def test_attend(name: str, fresh_length: int) -> None:
    """Over pools as over the same tokens in the rows' own slots."""
    pool, tokens = filled(name)
    alone, stored = own_rows(pool, tokens), pool.stored()
    query, fresh = normal(7, ROWS, 3 * HEADS, fresh_length or 1, pool.dim).to(DEVICE), None
    if fresh_length:
        new = [normal(8 + i, ROWS, HEADS, fresh_length, pool.dim).to(DEVICE) for i in range(2)]
        fresh = (*new, torch.tensor([5, 2, 0], dtype=torch.int32, device=DEVICE))
    wanted = reference.attend(query, alone, pool.layout, 0.125, fresh)
    own = reference.attend(query, stored, pool.layout, 0.125, fresh)
    assert ((own - wanted).float().norm() / wanted.float().norm()).item() < 1e-3
    for run in runs(pool.layout.record, query, fresh):
        for splits in (1, 3):
            out = run(query, stored, pool.layout, 0.125, fresh, num_splits=splits)
            assert ((out - wanted).float().norm() / wanted.float().norm()).item() < 2e-3, (run, splits)


COUNTS = ((1, 1, 1), (20, 1, 3), (0, 9, 0))
"""Queries of each row: single tokens, a chunk of a prompt, drafts, nothing."""
LINES = [*(("2-bit g32", counts) for counts in COUNTS), ("3-bit d96", (3, 1, 0))]


@pytest.mark.parametrize(("name", "counts"), LINES, ids=str)
def test_line(name: str, counts: tuple[int, ...]) -> None:
    """Queries and fresh tokens in one line: what each row alone would give."""
    pool, _ = filled(name)
    stored, most = pool.stored(), max(counts)
    query = normal(3, ROWS, 3 * HEADS, most, pool.dim).to(DEVICE)
    new = [normal(4 + i, ROWS, HEADS, most, pool.dim).to(DEVICE) for i in range(2)]
    fresh = (*new, torch.tensor(counts, dtype=torch.int32, device=DEVICE))
    wanted = in_line(reference.attend(query, stored, pool.layout, 0.125, fresh), counts)
    line, starts = in_line(query, counts), begin(counts)
    fresh = (*(in_line(x, counts) for x in new), None)
    got = reference.attend(line, stored, pool.layout, 0.125, fresh, starts)
    assert got.shape == (sum(counts), 3 * HEADS, pool.dim)
    torch.testing.assert_close(got, wanted, rtol=2e-3, atol=1e-4)
    for run in runs(pool.layout.record, line, fresh, starts):
        for splits in (1, 2):
            out = run(line, stored, pool.layout, 0.125, fresh, starts, num_splits=splits)
            assert ((out - wanted).float().norm() / wanted.float().norm()).item() < 2e-3, splits


def test_rows_share_what_lies_in_a_pool() -> None:
    """Two rows of the same tokens and places write the same words twice, and read them."""
    shared, alone = Pool("2-bit g32"), Pool("2-bit g32")
    shared.blocks[1], shared.pages[1] = shared.blocks[0], shared.pages[0]
    counts = [190, 190, 20]
    key, value = (normal(i, ROWS, HEADS, 190, 64).to(DEVICE) for i in range(2))
    key[1], value[1] = key[0], value[0]
    for pool in (shared, alone):
        append.append(key, value, counts, pool.stored(counts), pool.layout)
        pool.count(counts)
    query = normal(5, ROWS, HEADS, 1, 64).to(DEVICE)
    outs = [attention.attend(query, pool.stored(), pool.layout, 0.125) for pool in (shared, alone)]
    assert torch.equal(*outs)


def test_what_no_pool_holds() -> None:
    pool, _ = filled("2-bit g32")
    stored, query = pool.stored(), normal(1, ROWS, HEADS, 1, 64).to(DEVICE)
    key_params = torch.zeros(2, ROWS, HEADS, 64, dtype=torch.float16, device=DEVICE)
    refused = [
        (stored, pool.layout._replace(sink=4), "sink_length 4"),
        (stored._replace(key_params=key_params), pool.layout, "key_group_size 'sequence'"),
        (stored._replace(exact_table=stored.exact_table.long()), pool.layout, "exact table .* torch.int64: expected"),
        (
            stored._replace(block_table=stored.block_table[:2]),
            pool.layout,
            "block table .*: expected \\[3, num_blocks\\]",
        ),
        (stored._replace(exact_key=stored.exact_key.mT), pool.layout, "channels do not lie next to each other"),
    ]
    new, before = (query, query), stored.lengths
    for bad, layout, why in refused:
        for call in (
            lambda bad, layout: reference.attend(query, bad, layout, 1.0),
            lambda bad, layout: attention.attend(query, bad, layout, 1.0),
            lambda bad, layout: reference.append(*new, None, bad, layout),
            lambda bad, layout: append.append(*new, None, bad, layout),
            lambda bad, layout: step.step(query, *new, bad, layout, before, before, before),
        ):
            with pytest.raises(ValueError, match=why):
                call(bad, layout)
    assert kivi_seed().sink_length == 0


@pytest.mark.parametrize("page", [None, 8, 64])
@pytest.mark.parametrize(("dim", "q_per_kv"), [(64, 1), (96, 3)])
def test_uncompressed(dim: int, q_per_kv: int, page: int | None) -> None:
    """Append, step and attend, in rows' own slots and in a pool, row by row and in one line."""
    if page is None:
        slots = [torch.full((ROWS, HEADS, 320, dim), float("nan")).half().to(DEVICE) for _ in range(4)]
        table = None
    else:
        table = places(ROWS, 320 // page, 3)
        shape = (table.numel() + 2, HEADS, page, 2 * dim)
        slots = [x for _ in range(2) for x in torch.full(shape, float("nan")).half().to(DEVICE).split(dim, 3)]
        table = table.to(DEVICE)
    lengths = torch.zeros(ROWS, dtype=torch.int32, device=DEVICE)

    def stores() -> list[plain.Stored]:
        return [plain.Stored(*slots[i : i + 2], lengths, table) for i in (0, 2)]

    for turn, counts in enumerate(STEPS[:3]):
        key, value = (normal(turn + i, ROWS, HEADS, max(counts), dim).to(DEVICE) for i in range(2))
        wanted, got = stores()
        plain.append(key, value, counts, wanted)
        if turn == 1:
            decode.step(normal(0, ROWS, HEADS, 1, dim).to(DEVICE), key, value, got, lengths)
        elif turn:
            decode.append(*(in_line(x, counts) for x in (key, value)), None, got, begin(counts))
        else:
            decode.append(key, value, list(counts), got)
        for ours, theirs in zip(got[:2], wanted[:2], strict=True):
            assert torch.equal(ours.contiguous().view(torch.int16), theirs.contiguous().view(torch.int16))
        if turn == 1:
            query = normal(6, ROWS, HEADS * q_per_kv, 1, dim).to(DEVICE)
            near(decode.attend(query, got, 0.1, stepped=True), plain.attend(query, wanted, 0.1, stepped=True))
        lengths += torch.tensor(counts, dtype=torch.int32, device=DEVICE)
    wanted, got = stores()
    counts = (33, 1, 3)
    query = normal(7, ROWS, HEADS * q_per_kv, 33, dim).to(DEVICE)
    new = [normal(8 + i, ROWS, HEADS, 33, dim).to(DEVICE) for i in range(2)]
    fresh = (*new, torch.tensor(counts, dtype=torch.int32, device=DEVICE))
    truth = plain.attend(query, wanted, 0.1, fresh)
    near(decode.attend(query, got, 0.1, fresh), truth)
    line, starts = in_line(query, counts), begin(counts)
    fresh = (*(in_line(x, counts) for x in new), None)
    near(plain.attend(line, wanted, 0.1, fresh, starts), in_line(truth, counts))
    for num_tokens in (None, 16):  # planned in splits, and not
        near(decode.attend(line, got, 0.1, fresh, starts, num_tokens=num_tokens), in_line(truth, counts))


def near(out: torch.Tensor, wanted: torch.Tensor) -> None:
    assert ((out - wanted).float().norm() / wanted.float().norm()).item() < 2e-3
