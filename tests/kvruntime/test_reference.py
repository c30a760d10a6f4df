"""The PyTorch caches at their edges: NaN, padding, scales frozen over a sequence.

test_kernels.py holds the kernels to the reference bit for bit, so what the reference means is held here.
"""

from __future__ import annotations

import itertools
import math

import pytest

torch = pytest.importorskip("torch", reason="the runtime extra (torch) is not installed")

from kvruntime.methods import make_layer  # noqa: E402
from kvruntime.methods.full.cache import FullLayer  # noqa: E402
from kvruntime.methods.kivi import reference  # noqa: E402
from kvruntime.methods.kivi.cache import KiviLayer  # noqa: E402
from kvsim.layout import LayerShape  # noqa: E402
from kvsim.methods import Full, Kivi, kivi_boost, kivi_seed  # noqa: E402
from kvsim.methods.token import PerTokenHead  # noqa: E402

METHODS = {
    "full": Full("float32"),
    "full, float16": Full("float16"),
    "kivi": Kivi(residual_length=32, dtype="float32"),
    "sink": Kivi(nbits=4, residual_length=64, sink_length=5, dtype="float32"),
    "seed": kivi_seed(),
    "boost": kivi_boost(dtype="float32"),
}
SHAPE = LayerShape(2, 64, 64)
NAN_BITS = 0x7E00

methods = pytest.mark.parametrize("name", METHODS)
lengths = pytest.mark.parametrize("length", [1, 6])


def normal(seed: int, *size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def filled(name: str, counts: list[int]) -> FullLayer | KiviLayer:
    layer = make_layer(METHODS[name], SHAPE, len(counts), 300, torch.device("cpu"))
    most = max(counts)
    layer.append(normal(1, len(counts), 2, most, 64), normal(2, len(counts), 2, most, 64), counts)
    return layer


def attend(layer, length: int, padding: float = 0.0, counts=None) -> torch.Tensor:
    """``length`` queries; several bring keys and values of their own, row b's last ``counts[b]`` are no padding."""
    rows = layer.batch_size
    query = normal(3, rows, 4, length, 64)
    if length == 1:
        return layer.attend(query, 0.125)
    fresh = [normal(seed, rows, 2, length, 64) for seed in (4, 5)]
    for x in (query, *fresh):
        for row, count in enumerate(counts or [length] * rows):
            x[row, :, : length - count] = padding
    return layer.attend(query, 0.125, (*fresh, counts))


def poison_unused(layer) -> None:
    """NaN, infinity and NaN as scales wherever no row has a token."""
    for row, length in enumerate(layer.row_lengths):
        if isinstance(layer, FullLayer):
            continue
        packed, sink, ring = layer.row_packed[row], layer.method.sink_length, layer.method.residual_length
        layer.tensors["records"][row, packed // layer.record.num_tokens :] = 0x7FFF7FFF
        used = {t if t < sink else sink + (t - sink) % ring for t in range(length) if t < sink or t >= sink + packed}
        free = [slot for slot in range(layer.tensors["exact_key"].shape[2]) if slot not in used]
        layer.tensors["exact_key"][row, :, free] = math.nan
        layer.tensors["exact_value"][row, :, free] = math.inf
        if packed == 0 and "key_params" in layer.tensors:
            layer.tensors["key_params"][:, row] = math.nan


@methods
@lengths
@pytest.mark.parametrize("counts", [[200, 3, 90], [70, 70, 70], [0, 40, 1]], ids=str)
def test_what_no_query_sees_may_be_anything(name, length, counts):
    layer = filled(name, counts)
    clean = attend(layer, length)
    poison_unused(layer)
    assert torch.equal(attend(layer, length), clean)


@methods
@lengths
def test_nan_that_was_forgotten_or_taken_back_is_gone(name, length):
    """By reset, by crop where rows are ragged, and in rows that trade places."""
    counts = [60, 3, 33]
    layer, clean = filled(name, [200, 100, 150]), attend(filled(name, counts), length)
    layer.append(*[torch.full((3, 2, 90, 64), math.nan)] * 2)
    layer.reset()
    layer.append(normal(1, 3, 2, 60, 64), normal(2, 3, 2, 60, 64), counts)
    assert torch.equal(attend(layer, length), clean)
    if name == "kivi":
        return  # a record of all that is exact: nothing can be taken back
    layer.append(*[torch.full((3, 2, 2, 64), math.nan)] * 2)
    layer.append(*[torch.full((3, 2, 1, 64), math.inf)] * 2)
    layer.crop(60)
    assert layer.row_lengths == counts
    assert torch.equal(attend(layer, length), clean)
    layer.reorder(torch.tensor([1, 0, 2]))
    layer.reorder(torch.tensor([1, 0, 2]))
    assert torch.equal(attend(layer, length), clean)


@methods
@pytest.mark.parametrize("padding", [0.5, math.nan])
def test_padding_queries_are_zero_and_their_keys_unseen(name, padding):
    layer, counts = filled(name, [80, 3, 0]), [6, 2, 0]
    out = attend(layer, 6, padding, counts)
    for row, count in enumerate(counts):
        assert not out[row, :, : 6 - count].any()
        assert out[row, :, 6 - count :].isfinite().all()
        assert count == 0 or out[row, :, 6 - count :].any(-1).all()
    assert torch.equal(out, attend(layer, 6, 0.0, counts))


@pytest.mark.parametrize("bits", [0x7FC00000, -0x400000, 0x7F800001, 0x7FFFFFFF, -1], ids=hex)
def test_a_group_with_a_nan_has_one_bit_pattern(bits):
    """Whatever NaN it is, of either sign, wherever it stands: the words are the same everywhere."""
    nan = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    assert nan.isnan()
    for place, width in itertools.product((0, 17, 31), (8, 64)):  # vector instructions make NaN of their own
        x = normal(6, 32, width)
        x[place, 3] = nan
        ranges = (x.amin(0), x.amax(0)), (x[place], x[place])
        for params in (
            reference.group_params(x, 0, 2),
            reference.sequence_params([x[:9], x[9:]], 2),
            *(reference.range_params(*each, 2) for each in ranges),
        ):
            for param in params:
                assert (param.view(torch.int16) == NAN_BITS).nonzero().tolist() == [[3]]
    record = METHODS["kivi"].record(SHAPE)
    key, value = (normal(seed, 2, record.num_tokens, 64) for seed in (7, 8))
    words = []
    for each in (nan, torch.tensor(math.nan)):
        key[1, 5, 2] = value[0, 7, 9] = each
        words.append(reference.pack_records(key, value, record))
    assert torch.equal(*words)


def test_scales_over_a_sequence_are_frozen_at_the_first_flush():
    """Row by row, whatever comes later; a reset begins anew."""
    layer = KiviLayer(kivi_seed(), SHAPE, 2, 600)
    most = METHODS["seed"].residual_length
    layer.append(normal(1, 2, 2, most + 40, 64), normal(2, 2, 2, most + 40, 64), [most + 40, 9])
    assert layer.row_packed[0] > layer.row_packed[1] == 0
    first, packed = layer.tensors["key_params"].clone(), layer.row_packed[0]
    words = layer.tensors["records"][0, : packed // layer.record.num_tokens].clone()
    layer.append(100 * normal(3, 2, 2, 200, 64), normal(4, 2, 2, 200, 64))
    assert layer.row_packed[0] > packed
    assert torch.equal(layer.tensors["key_params"][:, 0], first[:, 0])
    assert not torch.equal(layer.tensors["key_params"][:, 1], first[:, 1])
    assert torch.equal(layer.tensors["records"][0, : packed // layer.record.num_tokens], words)
    layer.reset()
    layer.append(100 * normal(5, 2, 2, most + 40, 64), normal(6, 2, 2, most + 40, 64))
    assert (layer.tensors["key_params"][0] > 5 * first[0, 0]).all()


def test_a_check_of_what_is_stored_runs_nothing():
    """Kernels ask at every step, and what PyTorch launches between two kernels keeps the second from starting early."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from kvruntime.methods.full import reference as full
    from kvruntime.methods.token import reference as token

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(function)
            return function(*args, **(kwargs or {}))

    called, layers = [], {}
    for name, method in (("full", Full("float32")), ("token", PerTokenHead("int8")), ("kivi", METHODS["kivi"])):
        layers[name] = make_layer(method, SHAPE, 2, 64, torch.device("cpu"))
        layers[name].append(normal(1, 2, 2, 5, 64), normal(2, 2, 2, 5, 64))
    held, codes, kivi = (layers[name] for name in ("full", "token", "kivi"))
    stored = full.Stored(held.tensors["key"], held.tensors["value"], torch.tensor([5, 5], dtype=torch.int32))
    coded, packed = codes.stored(), kivi.stored()
    with Recorder():
        full.check(stored)
        token.check(coded)
        reference.check(packed, kivi.layout, 2)
    assert called == []
