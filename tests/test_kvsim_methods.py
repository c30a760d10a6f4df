"""The methods' bytes: the seed's table, KIVI's published ratios, and properties over random settings."""

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from kvsim.estimate import estimate
from kvsim.layout import LayerShape, nbytes, parts
from kvsim.load import load_model
from kvsim.methods import METHODS, Full, Kivi, kivi_seed, make_method

MIB = 1 << 20


@pytest.mark.parametrize(
    ("num_tokens", "shown", "mebibytes"),
    [(128, "1.79", 1.793), (512, "3.69", 3.691), (1024, "6.22", 6.223), (2048, "11.29", 11.285)],
)
def test_the_seeds_table(num_tokens: int, shown: str, mebibytes: float) -> None:
    row = estimate(load_model("gpt2"), kivi_seed(), 1, num_tokens)
    assert f"{row.nbytes / MIB:.2f}" == shown
    assert row.nbytes / MIB == pytest.approx(mebibytes, abs=6e-4)
    assert row.parts["value_scale"] + row.parts["value_zero"] == 12 * 12 * num_tokens * 2 * 2
    assert row.parts["key_scale"] + row.parts["key_zero"] == 36864  # 0.0352 MiB, whatever the length
    assert row.parts["key_residual"] + row.parts["value_residual"] == 1.125 * MIB


def test_the_seeds_baseline() -> None:
    row = estimate(load_model("gpt2"), Full(), 1, 2048)
    assert row.nbytes == 72 * MIB
    assert row.nbytes_per_token == 36864


@pytest.mark.parametrize(("group_size", "bits"), [(32, 3.0), (64, 2.5), (128, 2.25)])
def test_bits_an_element_as_in_the_paper(group_size: int, bits: float) -> None:
    layer, num_tokens = LayerShape(8, 128, 128), 1 << 20
    method = Kivi(nbits=2, group_size=group_size, residual_length=128)
    packed = sum(size for name, size in parts(method.buffers(layer, 1, num_tokens)).items() if "residual" not in name)
    elements = 8 * 2 * 128 * method.num_packed(num_tokens)
    assert 8 * (packed - 8) / elements == bits  # 8: the row's two lengths
    row = estimate(load_model("llama-3-8b"), method, 1, num_tokens)
    assert row.compression == pytest.approx(16 / bits, rel=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_every_named_method_weighs_and_divides_its_bytes(name: str) -> None:
    layer, method = LayerShape(4, 64, 64), make_method(name)
    for num_tokens in (0, 1, 31, 32, 33, 127, 128, 129, 1000):
        buffers = method.buffers(layer, 3, num_tokens)
        assert all(sum(buffer.parts().values()) == buffer.nbytes for buffer in buffers)
        assert sum(parts(buffers).values()) == nbytes(buffers)
        assert len({buffer.name for buffer in buffers}) == len(buffers)


def test_values_and_keys_of_different_width() -> None:
    method = Kivi(key_nbits=4, value_nbits=2, key_group_size=64, value_group_size=16, residual_length=64)
    split = parts(method.buffers(LayerShape(1, 128, 64), 1, 64 + 64))
    assert split["key_codes"] == 64 * 128 * 4 // 8
    assert split["value_codes"] == 64 * 64 * 2 // 8
    assert split["key_scale"] == 1 * 128 * 2
    assert split["value_scale"] == 64 * 4 * 2


@st.composite
def kivis(draw: st.DrawFn) -> tuple[Kivi, LayerShape]:
    head_dim = draw(st.sampled_from([64, 80, 96, 128, 256]))
    key_group = draw(st.sampled_from([32, 64, 128, "sequence"]))
    unit = 32 if isinstance(key_group, str) else key_group
    method = Kivi(
        nbits=draw(st.sampled_from([2, 3, 4, 8])),
        key_nbits=draw(st.sampled_from([None, 2, 4, 8])),
        key_group_size=key_group,
        value_group_size=draw(st.sampled_from(["head", 8, 16, head_dim])),
        residual_length=unit * draw(st.integers(1, 6)),
        sink_length=draw(st.sampled_from([0, 1, 4, 64])),
        dtype=draw(st.sampled_from(["float16", "bfloat16", "float32"])),
    )
    # 1-bit planes of a 16-channel chunk (80 = 64 + 16) fill a warp's words only in records of 64 tokens
    assume(head_dim != 80 or method.record_length == 64 or 3 not in (method.k_bits, method.v_bits))
    return method, LayerShape(draw(st.integers(1, 8)), head_dim, head_dim)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(kivis(), st.integers(1, 5), st.integers(0, 3000), st.integers(0, 300))
def test_kivi_buffers(setting: tuple[Kivi, LayerShape], batch_size: int, num_tokens: int, more: int) -> None:
    method, layer = setting
    buffers = method.buffers(layer, batch_size, num_tokens)
    stored = parts(buffers)
    assert all(sum(buffer.parts().values()) == buffer.nbytes for buffer in buffers)
    assert nbytes(buffers) == batch_size * nbytes(method.buffers(layer, 1, num_tokens))
    assert nbytes(buffers) <= nbytes(method.buffers(layer, batch_size, num_tokens + more))
    read = method.read_parts(layer, batch_size, num_tokens)
    assert set(read) <= set(stored)
    assert all(0 <= size <= stored[name] for name, size in read.items())


@settings(max_examples=200, deadline=None)
@given(kivis(), st.integers(0, 3000))
def test_kivi_places_every_token_once(setting: tuple[Kivi, LayerShape], num_tokens: int) -> None:
    method, _ = setting
    packed, sink = method.num_packed(num_tokens), min(num_tokens, method.sink_length)
    newest = num_tokens - packed - sink
    assert 0 <= newest <= method.residual_length
    assert packed % method.record_length == 0
    assert method.num_records(num_tokens) * method.record_length >= packed
    assert method.num_exact(num_tokens) >= sink + newest
    if packed:
        assert newest > method.residual_length - method.record_length


@settings(max_examples=100, deadline=None)
@given(kivis(), st.integers(1, 20))
def test_a_full_ring_reads_all_that_is_stored(setting: tuple[Kivi, LayerShape], records: int) -> None:
    method, layer = setting
    if method.k_group == "sequence":  # provides records for every token, exact ones too
        return
    num_tokens = method.sink_length + method.residual_length + records * method.record_length
    assert method.read_parts(layer, 2, num_tokens) == parts(method.buffers(layer, 2, num_tokens))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nbits": 5}, "nbits 5: allowed are 1, 2, 3, 4, 8"),
        ({"key_nbits": 6}, "key_nbits 6"),
        ({"group_size": 24}, "key group size 24"),
        ({"residual_length": 100}, "residual_length 100 is not a multiple"),
        ({"residual_length": 0}, "residual_length 0"),
        ({"sink_length": -1}, "sink_length -1"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"key_group_size": "all"}, "key_group_size 'all'"),
        ({"value_group_size": "row"}, "value_group_size 'row'"),
        ({"value_group_size": 4}, "value group size 4"),
        ({"bits": 2}, "does not take bits"),
    ],
)
def test_bad_settings_are_one_clear_line(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_method("kivi", **options)


def test_a_group_that_does_not_divide_the_head() -> None:
    with pytest.raises(ValueError, match="value group size 48 does not divide head dimension 64"):
        Kivi(value_group_size=48).buffers(LayerShape(1, 64, 64), 1, 100)
    with pytest.raises(ValueError, match="head dimension 72 cannot be packed"):
        Kivi().buffers(LayerShape(1, 72, 72), 1, 100)
    with pytest.raises(LookupError, match="did you mean kivi"):
        make_method("kivy")
