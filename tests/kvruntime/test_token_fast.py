"""The whole-number kernels of coded tokens: what they store and how they attend, against the reference.

On a CUDA device (sm_80 on) they run there, elsewhere in NumPy (gluon_numpy.py, inline PTX by ptx_numpy.py).
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the runtime extra (torch) is not installed")
pytest.importorskip("triton", reason="the runtime extra (triton) is not installed")

import gluon_numpy  # noqa: E402

from kvruntime.kernels import merge  # noqa: E402
from kvruntime.methods.token import (  # noqa: E402
    attention,
    fast,
    fast_copies,
    fast_instructions,
    fast_operands,
    fast_plan,
    fast_store,
    fast_words,
    paged,
    reference,
    store,
)
from kvruntime.methods.token.cache import layout_of  # noqa: E402
from kvruntime.methods.token.coding import num_bytes  # noqa: E402
from kvruntime.methods.token.levels import signs  # noqa: E402
from kvruntime.methods.token.reference import Layout, Stored  # noqa: E402
from kvsim.layout import LayerShape  # noqa: E402
from kvsim.methods import PerTokenHead, TurboQuant  # noqa: E402
from kvsim.methods.token import PAGE_TOKENS  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYOUTS = {
    "lloyd4 lloyd3": Layout("lloyd4", "lloyd3", 128, 128),
    "lloyd3 lloyd2": Layout("lloyd3", "lloyd2", 128, 128, False),
    "lloyd2 lloyd4": Layout("lloyd2", "lloyd4", 128, 128),
    "lloyd4 d64": Layout("lloyd4", "lloyd4", 64, 64),
    "int8 int4 d64": Layout("int8", "int4", 64, 64),
    "int4 int8": Layout("int4", "int8", 128, 128),
}
ON_CUDA = DEVICE.type == "cuda"
HEADS, SLOTS, COUNTS = (2, 400, [390, 129, 1]) if ON_CUDA else (1, 80, [75, 1])
layouts = pytest.mark.parametrize("name", LAYOUTS)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).half().to(DEVICE)


def empty(layout: Layout) -> Stored:
    """Rows without tokens, their bytes poisoned."""
    held, rows = [], len(COUNTS)
    lloyd = layout.key.startswith("lloyd")
    for coding, dim in ((layout.key, layout.key_dim), (layout.value, layout.value_dim)):
        held.append(torch.full((rows, HEADS, SLOTS, num_bytes(coding, dim)), 0xA5, dtype=torch.uint8, device=DEVICE))
        dtype = torch.float16 if lloyd else torch.float32
        held.append(torch.full((rows, HEADS, SLOTS), torch.nan, dtype=dtype, device=DEVICE))
    turn = signs(layout.key_dim, DEVICE) if lloyd else None
    return Stored(*held, torch.zeros(rows, dtype=torch.int32, device=DEVICE), turn, turn)


def filled(layout: Layout) -> Stored:
    stored = empty(layout)
    shape = (len(COUNTS), HEADS, max(COUNTS))
    spread = torch.exp(normal(2, *shape, 1).float()).half()
    reference.append(
        normal(0, *shape, layout.key_dim), normal(1, *shape, layout.value_dim) * spread, COUNTS, stored, layout
    )
    return stored._replace(lengths=torch.tensor(COUNTS, dtype=torch.int32, device=DEVICE))


def close(have: torch.Tensor, want: torch.Tensor, turned: bool) -> None:
    """Weights times scales are rounded to 16 bits of their tile's largest, and what is taken off for codes of no sign
    is not: all channels are off by that alike, which turned back is the first one, by the root of the channels."""
    wide = have.shape[-1] ** 0.5 if turned else 1.0
    torch.testing.assert_close(have[..., :1].float(), want[..., :1], rtol=1e-3, atol=max(2e-3, 4e-4 * wide))
    torch.testing.assert_close(have[..., 1:].float(), want[..., 1:], rtol=1e-3, atol=2e-3)


def numpy_attention(query, stored, layout, scale, num_splits):
    """``attention.attend`` of the calls that the kernel takes, its kernel in NumPy."""
    names = gluon_numpy.run_modules((fast_words, fast_instructions, fast_copies, fast_operands, fast))
    names |= {"overlaps": lambda x: True, "HIDDEN": merge.HIDDEN.value}
    if stored.key_signs is not None:
        query = reference.rotated(query * stored.key_signs, layout.key_dim).to(torch.float16)
    partial = torch.full((*query.shape[:3], num_splits, layout.value_dim), torch.nan)
    lse = torch.full((*query.shape[:3], num_splits), torch.nan)
    names["attend_parts"](query.contiguous(), stored, layout, scale, partial, lse, 0)
    weight = torch.softmax(lse.double() * 0.6931471805599453, -1)
    out = (partial.double() * weight[..., None]).sum(-2)
    if stored.value_signs is not None:
        out = reference.rotated(out, layout.value_dim) * stored.value_signs
    return out.to(query.dtype)


@layouts
def test_attention_agrees_with_the_reference(name: str) -> None:
    """Ragged rows, one of a token; what no token holds is poisoned."""
    layout, odd = LAYOUTS[name], list(LAYOUTS).index(name) % 2
    stored = filled(layout)
    for q_per_kv in (1, 3, 4) if ON_CUDA else (3 + odd,):
        query = normal(3, len(COUNTS), HEADS * q_per_kv, 1, layout.key_dim)
        assert not ON_CUDA or fast_plan.supports(query, stored, layout, None, None)
        want = reference.attend(query.float(), stored, layout, 0.1)
        for splits in (1, 3, None) if ON_CUDA else (1 + odd,):
            have = (attention.attend if ON_CUDA else numpy_attention)(query, stored, layout, 0.1, num_splits=splits)
            close(have, want, layout.value.startswith("lloyd"))


IN_PAGES = {
    "3 bits": TurboQuant(3),
    "2 and 4 bits": TurboQuant(key_nbits=2, value_nbits=4, norm_correction=False),
    "int4": PerTokenHead("int4"),
}


@pytest.mark.parametrize("name", IN_PAGES if ON_CUDA else ["3 bits", "int4"])
def test_attention_over_pages(name: str) -> None:
    """The rows in blocks of 64 tokens of a pool, in any order; what no token holds is poisoned, in tables too."""
    method, shape = IN_PAGES[name], LayerShape(HEADS, 128, 128)
    layout, blocks = layout_of(method, shape), -(-SLOTS // PAGE_TOKENS)
    stored = filled(layout)
    order = torch.randperm(len(COUNTS) * blocks + 2, generator=torch.Generator().manual_seed(5))[: len(COUNTS) * blocks]
    table = order.view(len(COUNTS), blocks).int().to(DEVICE)
    words = paged.page_shape(method, shape).record_nbytes // HEADS // 4
    records = torch.full((len(order) + 2, HEADS, words), -7, dtype=torch.int32, device=DEVICE)
    views = paged.sections(method, shape, records)
    for row, count in enumerate(COUNTS):
        token = torch.arange(count, device=DEVICE)
        place = table[row, token // PAGE_TOKENS].long()
        for view, held in zip(views, stored[:4], strict=True):
            view[place, :, token % PAGE_TOKENS] = held[row, :, :count].transpose(0, 1)
        table[row, -(-count // PAGE_TOKENS) :] = -(1 << 30)
    pool = Stored(*views, stored.lengths, *stored[5:9])._replace(block_table=table)
    query = normal(3, len(COUNTS), HEADS * 4, 1, 128)
    assert not ON_CUDA or fast_plan.supports(query, pool, layout, None, None)
    want = reference.attend(query.float(), stored, layout, 0.1)
    for splits in (1, 3, None) if ON_CUDA else (1,):
        have = (attention.attend if ON_CUDA else numpy_attention)(query, pool, layout, 0.1, num_splits=splits)
        close(have, want, layout.value.startswith("lloyd"))


@pytest.mark.parametrize("name", ["lloyd4 lloyd3", "int4 int8"])
def test_a_nan_reaches_the_output(name: str) -> None:
    """Of a key or a value that is not finite where it was stored: as the reference has it."""
    layout = LAYOUTS[name]
    stored = filled(layout)
    stored.key_scale[0, 0, 3] = stored.value_scale[1, 0, 0] = torch.nan
    query = normal(3, len(COUNTS), HEADS * 4, 1, layout.key_dim)
    have = (attention.attend if ON_CUDA else numpy_attention)(query, stored, layout, 0.1, num_splits=2)
    want = reference.attend(query.float(), stored, layout, 0.1)
    assert want.isnan().any()
    assert torch.equal(have.isnan(), want.isnan())


def numpy_append(key, value, counts, stored, layout):
    """``store.append`` of the tokens that the kernel takes, its kernel in NumPy."""
    names = gluon_numpy.run_modules((fast_words, fast_store))
    names["append"](key, value, torch.tensor(counts, dtype=torch.int32), stored, layout)


@pytest.mark.parametrize("name", list(LAYOUTS)[:3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16][: 1 + ON_CUDA], ids=str)
def test_prompts_are_stored_as_the_reference_stores_them(name: str, dtype: torch.dtype) -> None:
    """Bit for bit, ragged rows behind stored tokens: with vectors of zeros, of wide ranges, with infinities and NaN."""
    layout, counts = LAYOUTS[name], [19, 4, 0] if ON_CUDA else [19, 4]
    mine, its = (
        empty(layout)._replace(lengths=torch.full((len(COUNTS),), 3, dtype=torch.int32, device=DEVICE)) for _ in "ab"
    )
    key, value = (normal(seed, len(COUNTS), HEADS, 19, 128) for seed in (0, 1))
    key = (key * torch.exp(3 * normal(2, len(COUNTS), HEADS, 19, 1).float())).clamp(-6e4, 6e4).to(dtype)
    value = value.to(dtype)
    key[0, 0, -1], key[0, -1, -2, 3], value[0, -1, -3, 2] = 0, torch.nan, torch.inf
    assert not ON_CUDA or fast_store.supports(key, value, mine, layout, None)
    (store.append if ON_CUDA else numpy_append)(key, value, counts, mine, layout)
    reference.append(key, value, counts, its, layout)
    for a, b in zip(mine[:4], its[:4], strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
