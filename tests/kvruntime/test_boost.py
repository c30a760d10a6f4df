"""Boosted key channels and rotated values in the PyTorch reference, against the room's other code (``read_back``)."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch", reason="the runtime extra (torch) is not installed")

from kvruntime.methods import make_layer, room_of  # noqa: E402
from kvruntime.methods.kivi import reference, turned  # noqa: E402
from kvruntime.methods.kivi.cache import KiviLayer  # noqa: E402
from kvsim.layout import LayerShape, nbytes  # noqa: E402
from kvsim.methods import Kivi, kivi_boost  # noqa: E402

SHAPE = LayerShape(2, 64, 64)
METHODS = {
    "2.6 bits": kivi_boost(dtype="float32"),
    "3 bits": kivi_boost(3, residual_length=64),
    "3.1 bits": kivi_boost(2, value_nbits=3, residual_length=64),
    "4 bits": kivi_boost(4, dtype="bfloat16"),
    "boosted keys alone": Kivi(boost_nbits=1, group_size=32, residual_length=64, dtype="float32"),
    "rotated values alone": Kivi(nbits=4, rotate_values=True, sink_length=2, dtype="float32"),
}


def normal(seed: int, *size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def keys(seed: int, rows: int, tokens: int, dim: int = 64) -> torch.Tensor:
    """Keys whose channels differ in range, by a factor of up to 20."""
    return normal(seed, rows, 2, tokens, dim) * torch.logspace(-1, 0.3, dim)[normal(9, dim).argsort()]


def new(method: Kivi, rows: int = 1, dim: int = 64) -> KiviLayer:
    return make_layer(method, LayerShape(2, dim, dim), rows, 600, torch.device("cpu"))


@pytest.mark.parametrize("dim", [32, 64, 80, 128])
@pytest.mark.parametrize("name", METHODS)
def test_what_is_stored_reads_back_and_takes_the_predicted_bytes(name: str, dim: int) -> None:
    method = METHODS[name]
    if dim == 32:
        method = Kivi(**{**vars(method), "value_group_size": None if method.rotate_values else 32})
    if dim == 80 and not method.rotate_values:
        method = Kivi(**{**vars(method), "value_group_size": 16})
    layer = new(method, 2, dim)
    dtype = getattr(torch, method.dtype)  # other values would be rounded where they are exact
    key, value = keys(1, 2, 330, dim).to(dtype).float(), normal(2, 2, 2, 330, dim).to(dtype).float()
    layer.append(key, value)
    want_key, want_value = room_of(method).read_back(method, key, value)
    for row in range(2):
        got_key, got_value = layer.tokens(row)
        assert torch.equal(got_key, want_key[row])
        near = (got_value - want_value[row]).abs().amax((0, 2)) < 1e-5
        assert near.float().mean() > 0.98  # a scale or a code on a rounding tie may differ
    assert layer.nbytes == nbytes(method.buffers(layer.shape, 2, 600))
    query = normal(3, 2, 4, 1, dim)
    held = [torch.stack(each) for each in zip(*(layer.tokens(row) for row in range(2)), strict=True)]
    key, value = (x.repeat_interleave(2, 1) for x in held)
    want = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(layer.attend(query, dim**-0.5), want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_how_tokens_come_does_not_matter(name: str) -> None:
    layer, pieces = new(METHODS[name]), new(METHODS[name])
    dtype = getattr(torch, METHODS[name].dtype)
    key, value = keys(1, 1, 300).to(dtype), normal(2, 1, 2, 300, 64).to(dtype)
    layer.append(key, value)
    for first in range(0, 300, 7):
        pieces.append(key[:, :, first : first + 7], value[:, :, first : first + 7])
    for one, other in zip(layer.tokens(0), pieces.tokens(0), strict=True):
        assert torch.equal(one, other)


def test_the_order_is_that_of_the_first_record_for_good() -> None:
    """Row by row and head by head; a reset begins anew."""
    method = kivi_boost(dtype="float32")
    layer = new(method, 2)
    key, value = keys(1, 2, 220), normal(2, 2, 2, 220, 64)
    layer.append(key, value, [220, 90])
    assert layer.row_packed == [128, 0]
    order = layer.tensors["key_order"].clone()
    first = key[0, :, 4 : 4 + 64]
    widest = (first.amax(1) - first.amin(1)).topk(16).indices
    assert torch.equal(order[0, :, :16].long(), widest.sort().values)
    assert torch.equal(order[0].long().sort(-1).values, torch.arange(64).expand(2, 64))
    assert not order[1].any()
    layer.append(keys(5, 2, 200), normal(6, 2, 2, 200, 64))
    assert torch.equal(layer.tensors["key_order"][0], order[0])
    assert layer.tensors["key_order"][1].any()
    layer.reorder(torch.tensor([1, 0]))
    assert torch.equal(layer.tensors["key_order"][1], order[0])
    layer.reset()
    layer.append(keys(7, 2, 220), normal(8, 2, 2, 220, 64))
    assert not torch.equal(layer.tensors["key_order"][1], order[0])


def test_of_equal_ranges_the_lower_channels_are_boosted() -> None:
    key = torch.zeros(1, 8, 64)
    key[0, 3, 40:50] = 1.0
    key[0, 2, 60] = math.nan
    order = reference.channel_order(key, 16)[0].tolist()
    assert order[:16] == [0, 1, 2, 3, 4, 5, *range(40, 50)]
    assert order[16:] == [*range(6, 40), *range(50, 64)]


def test_channels_that_queries_do_not_read_are_not_boosted() -> None:
    """A prompt's queries weigh ranges, each row's its own; not those of a token alone, nor after the first record."""
    method = kivi_boost(dtype="float32")
    layer, key, value = new(method, 2), normal(1, 2, 2, 220, 64), normal(2, 2, 2, 220, 64)
    query = normal(3, 2, 8, 220, 64)
    query[0, :4, :, 20:] *= 1e-3
    query[0, 4:, :, :40] *= 1e-3
    layer.append(key[:, :, :90], value[:, :, :90], [90, 0], query[:, :, :90])
    assert layer.tensors["key_order"][0].any()
    assert not layer.tensors["key_order"][1].any()
    layer.append(key[:, :, 90:91], value[:, :, 90:91], None, 1e3 * query[:, :, :1])
    layer.append(key, value, [129, 220])
    order = layer.tensors["key_order"].clone()
    assert (order[0, 0, :16] < 20).all()
    assert (order[0, 1, :16] >= 40).all()
    assert len({int(channel) // 20 for channel in order[1, 0, :16]}) > 1
    assert not layer.wants_query
    layer.append(key, value, None, query.flip(-1))
    assert torch.equal(layer.tensors["key_order"], order)


def test_an_order_whose_records_are_forgotten_weighs_nothing() -> None:
    """A row whose last record leaves chooses its channels anew, as a fresh one does."""
    method = kivi_boost(dtype="float32", sink_length=0)
    layer, key, value = new(method, 2), keys(1, 2, 220), normal(2, 2, 2, 220, 64)
    layer.append(key, value)
    packed = layer.row_packed[0]
    kept = layer.tensors["key_order"][1].clone()
    layer.forget([packed, 0], 0)
    assert layer.row_packed == [0, packed]
    assert not layer.tensors["key_order"][0].any()
    assert torch.equal(layer.tensors["key_order"][1], kept)
    layer.append(key, value)
    fresh = new(method, 2)
    fresh.append(torch.cat([key[:, :, packed:], key], 2), torch.cat([value[:, :, packed:], value], 2))
    assert torch.equal(layer.tensors["key_order"][0], fresh.tensors["key_order"][0])


def test_weights_are_in_proportion() -> None:
    query = torch.tensor([1.0, 0.5, 0.25, 1e-3, 0.0, 0.75]).expand(1, 2, 300, 6).clone()
    query[:, 1] *= 1e4
    query = query.transpose(1, 2).contiguous().transpose(1, 2)  # as models give them
    code = reference.channel_weights(query, 2)[0].int()
    weight = (8 + code % 8) * 2.0 ** (code // 8)
    assert torch.equal(code[0], code[1])
    torch.testing.assert_close((weight / weight[:, :1])[0, [1, 2, 5]], torch.tensor([0.5, 0.25, 0.75]))
    assert abs(float(weight[0, 3] / weight[0, 0]) - 1e-3) < 1e-4
    assert reference.channel_weights(query, 2, [0]).max() == 0


def test_queries_that_weigh_are_clamped() -> None:
    """As everything is: squares of more than float32 holds would compare to nothing."""
    query = torch.tensor([1e30, reference.LIMIT, math.inf, -math.inf, reference.LIMIT / 2, math.nan])
    code = reference.channel_weights(query.expand(1, 1, 3, 6), 1)[0, 0].tolist()
    assert code == [224, 224, 224, 224, 216, 0]


@pytest.mark.parametrize("dim", [16, 64, 80, 96, 256])
def test_the_rotation_is_sylvesters_and_its_own_inverse(dim: int) -> None:
    x = normal(1, 3, dim)
    size = dim & -dim
    torch.testing.assert_close(reference.rotated(x, size), turned(x))
    torch.testing.assert_close(reference.rotated(reference.rotated(x, size), size), x)


def test_numbers_at_the_edges() -> None:
    """No range, no values, a NaN, more than float16 holds."""
    method = kivi_boost(dtype="float32")
    key, value = keys(1, 1, 200), normal(2, 1, 2, 200, 64)
    key[0, 0, 4:68, 7] = 3.0
    key[0, 0, 70, 9] = math.nan
    value[0, 0, 10] = 0.0
    value[0, 1, 11, 5] = math.nan
    value[0, 1, 12] = 1e6
    layer = new(method)
    layer.append(key, value)
    got_key, got_value = layer.tokens(0)
    assert (got_key[0, 4:68, 7] == 3.0).all()
    assert got_key[0, 68:132, 9].isnan().all()
    assert got_key[0, :, :7].isfinite().all()
    assert not got_value[0, 10].any()
    assert got_value[1, 11].isnan().all()
    assert got_value[1, 12].isfinite().all()
    assert got_value[1, 12].abs().max() <= 8 * reference.LIMIT


def test_a_range_below_the_least_scale_has_code_zero() -> None:
    """Of a scale that float16 rounds to nothing there is no inverse: what it reads is its zero, whatever the code."""
    record = Kivi(nbits=2, boost_nbits=2, rotate_values=True, group_size=64).record(LayerShape(1, 64, 64))
    key = torch.zeros(1, 64, 64)
    key[:, ::2] = 1e-8
    codes, low, scale, zero = reference.pack_boosted(key, record)
    assert not codes.any()
    assert not low.any()
    assert not scale.any()
    assert not zero.any()


@pytest.mark.parametrize(
    ("channel", "width", "group", "whole"),
    [(0, 64, 32, True), (32, 64, 32, True), (0, 64, 48, False), (0, 32, 64, False), (16, 64, 32, False)],
)
def test_a_chunk_of_whole_value_groups(channel: int, width: int, group: int, whole: bool) -> None:
    words = pytest.importorskip("kvruntime.methods.kivi.words", reason="Triton is not installed")
    assert words.whole_groups(channel, width, group) is whole
