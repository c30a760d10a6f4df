"""Stateless pages: store, attend and pack as an engine calls them, beside a layer that keeps its own books.

Kernels run in Triton's interpreter where there is no CUDA device (conftest.py).
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the runtime extra (torch) is not installed")
pytest.importorskip("triton", reason="the runtime extra (triton) is not installed")

from paged_engine import DEVICE, GROUP, HEADS, METHODS, ROWS, Engine, engine, line, modules, step  # noqa: E402

from kvruntime import paged  # noqa: E402
from kvruntime.kernels import slots  # noqa: E402
from kvruntime.methods import make_layer  # noqa: E402
from kvsim.layout import LayerShape  # noqa: E402
from kvsim.methods import Evict, Kivi, PerTokenHead, TurboQuant, kivi_boost  # noqa: E402

STEPS = ((64, 40, 5), (1, 33, 4), (1, 1, 1), (70, 1, 0))
"""Tokens that each row brings: prompts; a token, a chunk and drafts; tokens; a chunk, a token, and a row rests."""


CODED = [name for name, (method, _) in METHODS.items() if isinstance(method, PerTokenHead | TurboQuant)]
"""Methods whose tokens are all coded."""
FEW = ["turboquant 3", "int4"]
"""Those that the interpreter runs; a GPU runs all."""


def near(out: torch.Tensor, wanted: torch.Tensor) -> None:
    assert ((out - wanted).float().norm() / wanted.float().norm()).item() < 2e-3


def same(one: Engine, other: Engine) -> bool:
    pairs = [(x, y) for x, y in zip(one.pages, other.pages, strict=True) if x is not None]
    return all(torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8)) for x, y in pairs)


AT_LENGTH = [name for name in METHODS if name != "3-bit d96"]  # its packing: test_pools.py


@pytest.mark.parametrize("name", AT_LENGTH if DEVICE.type == "cuda" else [x for x in AT_LENGTH if x not in CODED])
def test_kernels_agree_with_the_reference(name: str) -> None:
    """They write the same words and tokens to the same places and nothing else, and read the same."""
    wanted, got = engine(name), engine(name)
    reference, kernels = modules(wanted.method)
    before = [0] * ROWS
    short = name == "rotated values" and DEVICE.type == "cpu"  # prompts, and tokens of which one packs
    for turn, counts in enumerate(STEPS[::2][:2] if short else STEPS):
        batches = [one.batch(before, counts) for one in (wanted, got)]
        outs = [step(one, run, batch, 10 * turn) for one, run, batch in
                zip((wanted, got), (reference, kernels), batches, strict=True)]  # fmt: skip
        assert same(wanted, got), turn
        near(outs[1], outs[0])
        before = batches[0].lengths.tolist()
    if wanted.pages.records is not None:
        assert (wanted.pages.records != -7).any()


@pytest.mark.parametrize("name", CODED if DEVICE.type == "cuda" else FEW)
def test_kernels_of_coded_tokens(name: str) -> None:
    """Over a page's end, a single token between others, and a token alone: the same words, outputs and numbers."""
    wanted, got = engine(name), engine(name)
    reference, kernels = modules(wanted.method)
    for one in (wanted, got):
        step(one, reference, one.batch([0] * ROWS, (62, 3, 0)), 0)
    batches = [one.batch([62, 3, 0], (3, 1, 0)) for one in (wanted, got)]
    outs = [step(one, run, batch, 10) for one, run, batch in
            zip((wanted, got), (reference, kernels), batches, strict=True)]  # fmt: skip
    assert same(wanted, got)
    near(outs[1], outs[0])
    key, value = (line(10 + i, 4, HEADS, wanted.dim) for i in range(2))
    begins = torch.tensor([0, 65, 69, 69], dtype=torch.int32, device=DEVICE)
    into = [[torch.full((70, HEADS, wanted.dim), 7.0, device=DEVICE).half() for _ in range(2)] for _ in range(2)]
    reference.gather(wanted.method, key, value, wanted.pages, batches[0], begins, tuple(into[0]))
    kernels.gather(got.method, key, value, got.pages, batches[1], begins, tuple(into[1]))
    for x, y, new in zip(*into, (key, value), strict=True):
        torch.testing.assert_close(x, y, rtol=2e-3, atol=2e-3)
        assert (y[69:] == 7).all()
        assert torch.equal(y[62:65], new[:3])
        assert not torch.equal(y[68], new[3])  # a token that comes alone is read as it is stored
    outs = [step(one, run, one.batch([65, 4, 0], (1, 1, 1)), 20) for one, run in
            ((wanted, reference), (got, kernels))]  # fmt: skip
    assert same(wanted, got)
    near(outs[1], outs[0])


@pytest.mark.parametrize("name", ["2-bit g32", "fp16"])
def test_what_pages_held_before_does_not_matter(name: str) -> None:
    """An engine hands pages on as they are: another request's NaN, in exact tokens and in scales, reaches no answer."""
    for run in modules(engine(name).method):
        outs = []
        for is_dirty in (False, True):
            one, before = engine(name), [0] * ROWS
            if is_dirty:
                for pool in one.pages:
                    if pool is not None:
                        pool.fill_(float("nan") if pool.dtype.is_floating_point else -1)
            for turn, counts in enumerate(STEPS[:2]):
                batch = one.batch(before, counts)
                outs.append(step(one, run, batch, 10 * turn))
                before = batch.lengths.tolist()
        assert all(torch.equal(x, y) for x, y in zip(outs[:2], outs[2:], strict=True))
        assert all(x.isfinite().all() for x in outs)


@pytest.mark.parametrize("name", METHODS)
def test_as_a_layer_that_keeps_its_books(name: str) -> None:
    """Row by row the outputs of the layer under transformers, given the same chunks, and the same packed tokens."""
    one = engine(name)
    reference, _ = modules(one.method)
    shape = LayerShape(HEADS, one.dim, one.dim)
    layers = [make_layer(one.method, shape, 1, None, torch.device("cpu")) for _ in range(ROWS)]
    before = [0] * ROWS
    for turn, counts in enumerate(STEPS):
        batch = one.batch(before, counts)
        out = step(one, reference, batch, 10 * turn).cpu()
        tokens = sum(counts)
        key, value = (line(10 * turn + i, tokens, HEADS, one.dim).cpu() for i in range(2))
        query = line(10 * turn + 2, tokens, HEADS * GROUP, one.dim).cpu()
        begin = 0
        for layer, count in zip(layers, counts, strict=True):
            q, k, v = (x[begin : begin + count].transpose(0, 1)[None] for x in (query, key, value))
            wanted = None
            if count == 1:
                layer.append(k, v)
                wanted = layer.attend(q, 0.125)
            elif count:
                wanted = layer.attend(q, 0.125, (k, v, None))
                layer.append(k, v)
            if wanted is not None:
                near(out[begin : begin + count], wanted[0].transpose(0, 1))
            begin += count
        before = batch.lengths.tolist()
        for layer, length in zip(layers, before, strict=True):
            assert layer.row_lengths == [length]
            packed = [length] if name in CODED else [0]
            assert getattr(layer, "row_packed", packed) == [paged.num_packed(one.method, length)]


@pytest.mark.parametrize("name", [name for name in METHODS if name != "fp16" and name not in CODED])
def test_gather(name: str) -> None:
    """What another attention may read: packed tokens as numbers, exact ones, and those of the step."""
    one = engine(name)
    reference, kernels = modules(one.method)
    step(one, reference, one.batch([0] * ROWS, (70, 64, 5)), 0)
    batch = one.batch([70, 64, 5], (20, 2, 0))
    key, value = (line(20 + i, 22, HEADS, one.dim) for i in range(2))
    begins = torch.tensor([0, 90, 156, 161], dtype=torch.int32, device=DEVICE)
    outs = []
    for run in (reference, kernels):
        into = [torch.full((170, HEADS, one.dim), 7.0, device=DEVICE).half() for _ in range(2)]
        run.gather(one.method, key, value, one.pages, batch, begins, tuple(into))
        outs.append(into)
    for got, wanted, new in zip(outs[1], outs[0], (key, value), strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-3, atol=2e-3)
        assert (got[161:] == 7).all()
        assert torch.equal(got[70:90], new[:20])
    query = line(30, 22, HEADS * GROUP, one.dim)
    out = reference.attend(one.method, query, key, value, one.pages, batch, 0.125)
    heads = [x[:90].repeat_interleave(GROUP, 1).transpose(0, 1).float() for x in outs[0]]
    mask = torch.arange(90)[None] <= torch.arange(70, 90)[:, None]
    score = (query[:20].transpose(0, 1).float() @ heads[0].mT * 0.125).masked_fill(~mask.to(DEVICE), float("-inf"))
    near(out[:20], (score.softmax(-1) @ heads[1]).transpose(0, 1))


def test_a_padded_graph_stores_nothing() -> None:
    """Rows that bring nothing come last: no slot, no length, and no place in the tables that may be looked at."""
    wanted, got = engine("2-bit g32"), engine("2-bit g32")
    reference, kernels = modules(wanted.method)
    for one in (wanted, got):
        step(one, reference, one.batch([0] * ROWS, (64, 0, 0)), 0)
    batch = got.batch([64, 0, 0], (1, 0, 0))
    slots = torch.cat([batch.slots, torch.full((2,), -1, device=DEVICE)])
    padded = batch._replace(slots=slots)
    key, value = (line(1 + i, ROWS, HEADS, 64) for i in range(2))
    query = line(3, ROWS, HEADS * GROUP, 64)
    kernels.store(got.method, key, value, got.pages, padded)
    out = kernels.attend(got.method, query, key, value, got.pages, padded, 0.125)
    reference.store(wanted.method, key[:1], value[:1], wanted.pages, wanted.batch([64, 0, 0], (1, 0, 0)))
    assert same(wanted, got)
    assert padded.packed.tolist() == [64, 0, 0]
    assert not out[1:].any()


def test_shared_pages_are_written_twice_with_the_same_words() -> None:
    """Two rows of one prompt and the same places: as one row alone, to the bit."""
    shared, alone = engine("2-bit g32"), engine("2-bit g32")
    _, kernels = modules(shared.method)
    shared.blocks[1], shared.places[1] = shared.blocks[0], shared.places[0]
    prompt = [line(i, 70, HEADS, 64) for i in range(2)]
    for one, counts in ((shared, (70, 70, 0)), (alone, (70, 0, 0))):
        batch = one.batch([0] * ROWS, counts)
        key, value = (torch.cat([x] * (sum(counts) // 70)) for x in prompt)
        kernels.store(one.method, key, value, one.pages, batch)
        kernels.pack(one.method, one.pages, batch)
    assert same(shared, alone)


def test_a_prefix_that_another_row_stores_in_the_same_step() -> None:
    """Row 1 begins behind the 128 tokens that row 0 brings: as in a step after it, on a CPU to the bit."""
    tokens = [line(i, 133, HEADS, 64) for i in range(2)]
    query = line(2, 133, HEADS * GROUP, 64)
    outs = []
    for at_once in (True, False):
        one = engine("2-bit g32")
        _, kernels = modules(one.method)
        one.blocks[1], one.places[1] = one.blocks[0], one.places[0]
        one.places[1, 128 // one.pages.key.shape[2] :] = one.places[
            2, : one.places.shape[1] - 128 // one.pages.key.shape[2]
        ]
        steps = [((0, 128, 0), (128, 5, 0))] if at_once else [((0, 0, 0), (128, 0, 0)), ((128, 128, 0), (0, 5, 0))]
        begin = 0
        for before, counts in steps:
            batch = one.batch(list(before), counts)
            end = begin + sum(counts)
            key, value, asked = (x[begin:end] for x in (*tokens, query))
            kernels.store(one.method, key, value, one.pages, batch)
            kernels.pack(one.method, one.pages, batch)
            out = kernels.attend(one.method, asked, key, value, one.pages, batch, 0.125)
            begin = end
        outs.append(out[-5:])
    assert paged.num_packed(METHODS["2-bit g32"][0], 128) == 64
    if DEVICE.type == "cpu":
        assert torch.equal(*outs)
    near(*outs)  # a GPU's kernels take tiles by the longest chunk


def test_tables_and_lengths_are_read_on_the_device() -> None:
    """The same tensors with other numbers in them, as a CUDA graph replays: what a batch of those numbers gives."""
    wanted, got = engine("2-bit g32"), engine("2-bit g32")
    for one in (wanted, got):
        for pool in one.pages:
            pool.zero_()
    _, kernels = modules(wanted.method)
    counted = torch.zeros(ROWS, dtype=torch.int32, device=DEVICE), torch.zeros(ROWS, dtype=torch.int32, device=DEVICE)
    kept = got.batch([64, 0, 0], (1, 1, 1))
    kept = kept._replace(before=counted[0], packed=counted[1])
    for before in ([64, 30, 128], [65, 31, 129]):
        new = wanted.batch(before, (1, 1, 1))
        for target, source in zip(kept[:7], new[:7], strict=True):
            target.copy_(source)
        again = paged.batch(
            got.method, kept.starts, kept.lengths, kept.block_table, kept.exact_table, kept.slots, 1, counted
        )
        assert again.packed is counted[1]
        outs = [step(one, kernels, batch, 5) for one, batch in ((wanted, new), (got, kept))]
        assert torch.equal(*outs)
        assert same(wanted, got)


def test_pages_of_an_8b_model() -> None:
    shape = paged.page_shape(Kivi(dtype="bfloat16"), LayerShape(8, 128, 128))
    assert shape == (64, 49152, 8, 32768, 128)
    assert 64 * 8 * 256 * 2 / shape.record_nbytes == pytest.approx(5.33, abs=0.01)
    assert paged.page_shape(Kivi(nbits=4, dtype="bfloat16"), LayerShape(8, 128, 128)).exact_tokens == 16
    lengths = torch.arange(400)
    assert paged.num_packed(Kivi(), lengths).tolist() == [paged.num_packed(Kivi(), n) for n in range(400)]


@pytest.mark.parametrize(
    ("method", "why"),
    [
        (Kivi(sink_length=4), "kivi-2bit-g32-r128-s4 in pages: sink_length 4, allowed is 0"),
        (Kivi(key_group_size="sequence"), "in pages: key_group_size 'sequence', allowed is a number of tokens"),
        (kivi_boost(sink_length=0), "in pages: boost_nbits 2, allowed is 0"),
        (TurboQuant(3), "turboquant-3bit in pages: head dimension 80, allowed are multiples of 64"),
        (Evict(budget=64), "does not fit an engine's pages: what is kept moves to other slots"),
        (Evict(budget=300, policy="h2o", inner=Kivi(sink_length=4)), "a table holds tokens by their positions"),
    ],
)
def test_refused_by_name(method: object, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        paged.page_shape(method, LayerShape(8, 80 if method == TurboQuant(3) else 128, 128))


@pytest.mark.skipif(DEVICE.type != "cuda", reason="kernels are compiled on a CUDA device alone")
def test_no_step_compiles_a_kernel_anew() -> None:
    """Of rows wherever an engine slices them, and of any number: what the first step compiled is all there is."""
    method, heads, dim, most = Kivi(), 2, 128, 130
    shape = paged.page_shape(method, LayerShape(heads, dim, dim))
    records = torch.zeros(1, heads, shape.record_nbytes // heads // 4, dtype=torch.int32, device=DEVICE)
    exact = torch.zeros(1, heads, shape.exact_tokens, 2 * dim, dtype=torch.float16, device=DEVICE)
    pages = paged.Pages(records, *exact.split(dim, 3))
    _, run = modules(method)
    kernels = (run.pages_kernel, run.gather_kernel, slots.store_slots_kernel)

    def compiled(first: int, counts: list[int]) -> list[int]:
        """A step of rows behind ``first`` that bring a token each: kernels there are after it."""
        begins = torch.tensor([*range(first), *(first + sum(counts[:i]) for i in range(len(counts) + 1))])
        starts, total = begins.int().to(DEVICE), first + sum(counts)
        lengths = torch.tensor([1] * first + counts, dtype=torch.int32, device=DEVICE)
        tables = (torch.zeros(len(lengths), -(-most // n), dtype=torch.int32, device=DEVICE) for n in (64, 8))
        places = torch.full((total,), -1, dtype=torch.int64, device=DEVICE)
        line = torch.zeros(total, heads, dim, dtype=torch.float16, device=DEVICE)
        given = (starts[first:] - first, lengths[first:], *(table[first:] for table in tables), places[first:])
        batch = paged.batch(method, *given, max(counts))
        paged.store(method, line[first:], line[first:], pages, batch)
        paged.pack(method, pages, batch)
        if max(counts) > 1:
            into = tuple(torch.zeros(sum(counts), heads, dim, dtype=torch.float16, device=DEVICE) for _ in range(2))
            paged.gather(method, line[first:], line[first:], pages, batch, batch.starts, into)
        else:
            query = torch.zeros(len(counts), 4 * heads, dim, dtype=torch.float16, device=DEVICE)
            arrivals = torch.zeros(2 * len(counts) * 4 * heads, dtype=torch.int32, device=DEVICE)
            more = {"out": torch.empty_like(query), "arrivals": arrivals}
            paged.attend(method, query, line[first:], line[first:], pages, batch, 0.1, **more)
            assert not more["out"].any()
        return [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels]

    compiled(0, [1])
    first = compiled(1, [most])
    for count in (1, 2, 3, 16):
        for ahead in (0, 1, 2, 4):
            assert compiled(ahead, [most] * count) == first, (ahead, count)
            assert compiled(ahead, [1] * count) == first, (ahead, count)
