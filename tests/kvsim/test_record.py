"""The order of the codes inside a tile: a bijection, and the one that the module's text writes down."""

from itertools import product
from math import prod

import pytest

from kvsim.methods.kivi import Record
from kvsim.methods.packing import PLANES, TileOrder, tile_order

PLANE_BITS = sorted({bits for planes in PLANES.values() for bits in planes})


def orders() -> list[tuple[str, int, int, int, TileOrder]]:
    """Every (stream, tile, width, bits) that the layout accepts."""
    out = []
    for stream, tile, width, bits in product(("key", "value"), (16, 32, 64), (16, 32, 64, 128, 256), PLANE_BITS):
        if tile * width >= 32 * 32 // bits:  # a word for each of 32 lanes
            out.append((stream, tile, width, bits, tile_order(stream, tile, width, bits)))
    return out


def test_a_tile_with_fewer_codes_than_lanes_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="1-bit codes of 16 channels need at least 64 tokens a record, not 32"):
        tile_order("key", 32, 16, 1)
    with pytest.raises(ValueError, match="stream 'keys'"):
        tile_order("keys", 64, 64, 2)


ORDERS = orders()


def places(order: TileOrder, width: int) -> dict[int, tuple[int, int]]:
    """Memory index of a code -> its (token, channel)."""
    strides = [prod(order.logical_shape[axis + 1 :]) for axis in range(len(order.logical_shape))]
    out = {}
    for memory, digits in enumerate(product(*map(range, order.memory_shape))):
        logical = sum(digits[axis] * stride for axis, stride in zip(order.to_logical, strides, strict=True))
        out[memory] = divmod(logical, width)
    return out


def test_every_plane_and_stream_is_covered() -> None:
    assert {(stream, bits) for stream, _, _, bits, _ in ORDERS} == set(product(("key", "value"), PLANE_BITS))
    assert {(64, width) for width in (16, 32, 64, 128, 256)} <= {(tile, width) for _, tile, width, _, _ in ORDERS}


@pytest.mark.parametrize(
    ("stream", "tile", "width", "bits", "order"), [pytest.param(*row, id="-".join(map(str, row[:4]))) for row in ORDERS]
)
def test_the_order_is_the_one_written_down(stream: str, tile: int, width: int, bits: int, order: TileOrder) -> None:
    assert [order.to_logical[axis] for axis in order.from_logical] == list(range(len(order.to_logical)))
    assert order.codes_per_word * bits == 32
    assert order.num_words * order.codes_per_word == tile * width
    where = places(order, width)
    assert sorted(where.values()) == list(product(range(tile), range(width)))
    vector = min(4, order.num_words // 32)  # words in a lane's 16 bytes
    for memory, (token, channel) in where.items():
        word, position = divmod(memory, order.codes_per_word)
        lane = word // vector % 32
        half = position % 2
        if stream == "key":
            assert (lane // 4, lane % 4, half) == (token % 8, channel // (width // 4), channel % 2)
        else:
            assert (lane // 4, lane % 4, half) == (channel % 8, token % 8 // 2, token % 2)


@pytest.mark.parametrize("nbits", PLANES)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_chunks_and_planes_fill_a_tile_without_gap(nbits: int, head_dim: int) -> None:
    record = Record(64, head_dim, head_dim, nbits, nbits, key_group=32, value_group=16)
    for stream in ("key", "value"):
        orders = record.orders(stream)
        offset = 0
        for _, _, _, start, order in orders:
            assert start == offset
            offset += order.num_words
        assert offset == record.tile_words(stream)
        covered = {(channel + c, low) for channel, width, low, _, _ in orders for c in range(width)}
        assert len(covered) == head_dim * len(PLANES[nbits])
    assert record.num_words % 4 == 0
    assert sum(words for _, _, words in record.sections) == record.num_words
