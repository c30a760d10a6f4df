"""The methods' bytes: the seed's table, KIVI's published ratios, and properties over random settings."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from kvsim.layout import Buffer, LayerShape, edges, mean_read_nbytes, nbytes, part_kind, parts
from kvsim.memory.estimate import estimate
from kvsim.methods import (
    METHODS,
    Evict,
    Full,
    Kivi,
    LayerMix,
    Paged,
    TurboQuant,
    at,
    kivi_seed,
    make_method,
    method_named,
    placed,
)
from kvsim.methods.defaults import COMPRESSED, DEFAULT_SPECS
from kvsim.methods.layer_mix import mixed
from kvsim.models.load import load_model
from kvsim.specs import method_spec, parse_method

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
    layer = LayerShape(4, 64, 64)
    method = at(make_method(name), layer, 5, 12)
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
    rotated = draw(st.booleans())
    method = Kivi(
        nbits=draw(st.sampled_from([2, 3, 4, 8])),
        key_nbits=draw(st.sampled_from([None, 2, 4, 8])),
        key_group_size=key_group,
        value_group_size="head" if rotated else draw(st.sampled_from(["head", 8, 16, head_dim])),
        residual_length=unit * draw(st.integers(1, 6)),
        rotate_values=rotated,
        sink_length=draw(st.sampled_from([0, 1, 4, 64])),
        dtype=draw(st.sampled_from(["float16", "bfloat16", "float32"])),
    )
    if isinstance(key_group, int) and method.record_length == 64 and method.k_bits < 8:
        method = replace(method, boost_nbits=draw(st.sampled_from([0, 1, 2])))
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
        ({"boost_nbits": 3}, "boost_nbits 3: allowed are 0, 1, 2"),
        ({"boost_nbits": True}, "boost_nbits True"),
        ({"nbits": 8, "boost_nbits": 1}, "boost_nbits 1 besides 8 key bits: allowed are 8 bits in all"),
        ({"boost_nbits": 2, "key_group_size": "sequence"}, "allowed is a number of tokens"),
        ({"rotate_values": "yes"}, "rotate_values 'yes': allowed are 0 and 1"),
        ({"rotate_values": 1, "value_group_size": 32}, "value_group_size 32 of rotated values: allowed is 'head'"),
    ],
)
def test_bad_settings_are_one_clear_line(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_method("kivi", **options)


def test_boosted_channels_and_rotated_values_to_the_byte() -> None:
    """A record of 64 tokens and 64 channels: 16 channels with 2 bits more, a scale a token, no zeros."""
    layer = LayerShape(3, 64, 64)
    method = make_method("kivi-boost")
    assert (method.name, method.sink_length) == ("kivi-k2+2v2-rotv-g64-r128-s4", 4)
    split = parts(method.buffers(layer, 2, 4 + 128 + 64))
    rows = 2 * 3
    assert {name: size // rows for name, size in split.items()} == {
        "key_codes": 64 * 64 * 2 // 8,
        "value_codes": 64 * 64 * 2 // 8,
        "key_scale": 64 * 2,
        "key_zero": 64 * 2,
        "value_scale": 64 * 2,
        "key_boost_codes": 64 * 16 * 2 // 8,
        "key_sink": 4 * 64 * 2,
        "key_residual": 128 * 64 * 2,
        "value_sink": 4 * 64 * 2,
        "value_residual": 128 * 64 * 2,
        "lengths": 2 * 2 * 4 // rows,
        "key_order": 64,
    }
    widths = [make_method("kivi-boost", nbits=bits).record(layer).num_words / (64 * 64 * 2 / 32) for bits in (2, 3, 4)]
    assert widths == [2.625, 3.0, 4.0]
    wider = make_method("kivi-boost", nbits=3, value_nbits=3)
    assert wider.record(layer).num_words == 3.5 * 64 * 64 * 2 / 32
    dims = {32: (16, 32), 64: (16, 64), 80: (16, 16), 96: (16, 32), 128: (32, 128), 256: (64, 256)}
    for dim, found in dims.items():
        record = method.record(LayerShape(1, dim, dim))
        assert (record.boosted, record.rotation) == found
    with pytest.raises(ValueError, match="kivi-boost nbits 5: allowed are 2, 3, 4"):
        make_method("kivi-boost", nbits=5)
    with pytest.raises(ValueError, match="head dimension 512: allowed are up to 256"):
        method.record(LayerShape(1, 512, 512))


@given(st.integers(0, 1000))
def test_the_options_at_their_defaults_are_plain_kivi(num_tokens: int) -> None:
    layer = LayerShape(2, 64, 64)
    plain = [buffer.name for buffer in Kivi().buffers(layer, 1, num_tokens)]
    assert plain == ["records", "exact_key", "exact_value", "lengths"]
    assert Kivi(boost_nbits=0, rotate_values=False) == Kivi()
    assert [name for name, *_ in Kivi().record(layer).sections][-1] == "value_zero"


def test_a_group_that_does_not_divide_the_head() -> None:
    with pytest.raises(ValueError, match="value group size 48 does not divide head dimension 64"):
        Kivi(value_group_size=48).buffers(LayerShape(1, 64, 64), 1, 100)
    assert [Kivi(group_size=64).value_group(dim) for dim in (128, 96, 80)] == [64, 32, 16]  # the largest that does
    with pytest.raises(ValueError, match="head dimension 72 cannot be packed"):
        Kivi().buffers(LayerShape(1, 72, 72), 1, 100)
    with pytest.raises(LookupError, match="did you mean kivi"):
        make_method("kivy")


BITS = {
    "fp16": 16,
    "bf16": 16,
    "fp32": 32,
    "fp8": 8,
    "fp8-e5m2": 8,
    "fp8-token-head": 8 + 32 / 128,  # one float32 scale a token and head of 128
    "int8": 8 + 32 / 128,
    "int4": 4 + 32 / 128,
    "nvfp4": 4.5,  # one fp8 scale for 16
    "q8_0": 8.5,  # 34, 24, 22, 20 and 18 bytes for 32
    "q5_1": 6,
    "q5_0": 5.5,
    "q4_1": 5,
    "q4_0": 4.5,
    "ggml": 8.5,
}


@pytest.mark.parametrize("name", BITS)
def test_bits_an_element_as_published(name: str) -> None:
    layer, method = LayerShape(8, 128, 128), make_method(name)
    assert 8 * nbytes(method.buffers(layer, 3, 100)) == BITS[name] * 3 * 8 * 2 * 128 * 100
    windowed = LayerShape(8, 128, 128, window=64)
    assert nbytes(method.buffers(windowed, 3, 100)) == nbytes(method.buffers(layer, 3, 64))
    assert method.read_parts(layer, 3, 100) == parts(method.buffers(layer, 3, 100))
    latent = LayerShape(1, 576, 0)
    scales = 32 if "int" in name or "token" in name else 0
    expected = (BITS[name] - (scales / 128 if scales else 0)) * 576 + scales
    assert 8 * nbytes(method.buffers(latent, 1, 10)) == 10 * expected


def test_llama_cpp_keys_and_values_apart() -> None:
    model = load_model("llama-3.1-8b")
    assert estimate(model, make_method("q8_0"), 1, 8192).nbytes == 544 << 20  # llama.cpp prints 544.00 MiB for 8192
    assert estimate(model, make_method("q8_0", value_type="q4_0"), 1, 8192).nbytes == (272 + 144) << 20
    assert estimate(model, make_method("ggml", key_type="f16", value_type="q4_0"), 1, 8192).nbytes == (512 + 144) << 20
    with pytest.raises(ValueError, match="blocks of 32 channels"):
        make_method("q4_0").buffers(LayerShape(4, 80, 80), 1, 10)


def test_eviction_keeps_the_budget() -> None:
    layer, method = LayerShape(8, 128, 128), Evict(budget=256, sink_length=4)
    for num_tokens in (1, 255, 256, 257, 10_000):
        assert nbytes(method.buffers(layer, 2, num_tokens)) == nbytes(Full().buffers(layer, 2, min(num_tokens, 256)))
    narrow = LayerShape(8, 128, 128, window=64)
    assert nbytes(method.buffers(narrow, 2, 10_000)) == nbytes(Full().buffers(layer, 2, 64))
    composed = Evict(budget=256, inner=Kivi(nbits=2))
    assert nbytes(composed.buffers(layer, 2, 10_000)) == nbytes(Kivi(nbits=2).buffers(layer, 2, 256))
    with pytest.raises(ValueError, match="sink_length 300: allowed are 0 to the budget 256"):
        Evict(budget=256, sink_length=300)


@pytest.mark.parametrize("options", [{"ratio": 0.5}, {"sink_length": 4}, {"policy": "snapkv"}], ids=str)
def test_a_window_of_its_own_is_of_the_newest(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="window 8: allowed are a budget, with policy recent and no sink"):
        Evict(**{"budget": 64, "window": 8, "sink_length": 0} | options)  # type: ignore[arg-type]


def test_the_least_budget_is_one_beyond_the_sink() -> None:
    Evict(ratio=0.5).check_runs()
    Evict(budget=5, sink_length=4).check_runs()
    with pytest.raises(ValueError, match="budget 4: allowed are 5 and above over fp16"):
        Evict(budget=4, sink_length=4).check_runs()


def test_evictions_mean_read_has_the_scores() -> None:
    layer, method = LayerShape(2, 64, 64), Evict(budget=40, policy="h2o")
    assert mean_read_nbytes(method, layer, 3, 100) == sum(method.read_parts(layer, 3, 100).values())
    assert method.read_parts(layer, 3, 100)["scores"] == 3 * 2 * 36 * 4


def test_lengths_at_which_a_layout_changes() -> None:
    """Around the residual of 128, the exact 132, a record of 64 more; of what a method says, from 1 to the longest."""
    method = Kivi(nbits=2, group_size=32, residual_length=128, sink_length=4)
    assert edges(method, 1000) == [127, 128, 129, 131, 132, 133, 195, 196, 197, 255]

    class Says(Full):
        def edges(self, longest: int) -> list[int]:
            return [0, 1, 7, longest, longest + 1]

    assert edges(Says(), 9) == [1, 7, 9]


def test_eviction_by_scores_and_by_ratio() -> None:
    """A score of 4 bytes a head and token, or a block of those that leave together; a ratio follows the length."""
    layer = LayerShape(8, 128, 128)
    for policy in ("snapkv", "h2o", "expected"):
        plain = Evict(budget=256, policy=policy)
        assert nbytes(plain.buffers(layer, 2, 10_000)) == 2 * 8 * (256 * 2 * 128 * 2 + 252 * 4)
        assert plain.read_parts(layer, 2, 10_000)["scores"] == 2 * 8 * 252 * 4
        packed = Evict(budget=516, policy=policy, inner=Kivi(sink_length=4))
        inner = nbytes(Kivi(sink_length=4).buffers(layer, 2, 516))
        assert nbytes(packed.buffers(layer, 2, 10_000)) == inner + 2 * 8 * 4 * 4  # four blocks of 128
    quarter = Evict(ratio=0.25)
    for num_tokens, kept in ((1, 1), (5, 5), (6, 5), (20, 5), (24, 6), (4096, 1024), (131_072, 32_768)):
        assert quarter.num_kept(layer, num_tokens) == kept
        assert nbytes(quarter.buffers(layer, 2, num_tokens)) == nbytes(Full().buffers(layer, 2, kept))
    assert Evict(ratio="12.5%").name == "evict-12.5%-s4(fp16)"
    assert Evict(ratio=0.29).num_kept(layer, 100) == 29


def test_paging_rounds_to_blocks() -> None:
    layer, method = LayerShape(8, 128, 128), Paged(block_size=16)
    for num_tokens, provided in ((0, 0), (1, 16), (16, 16), (17, 32), (1000, 1008)):
        assert method.num_provided(layer, num_tokens) == provided
        assert nbytes(method.buffers(layer, 2, num_tokens)) == nbytes(Full().buffers(layer, 2, provided))
        assert method.read_parts(layer, 2, num_tokens) == Full().read_parts(layer, 2, num_tokens)
    narrow = LayerShape(8, 128, 128, window=64)
    touched = {start // 16 for start in range(9, 9 + 64)}  # 64 tokens that begin inside a block
    assert method.num_provided(narrow, 64) == 64
    assert method.num_provided(narrow, 65) == 16 * len(touched)


@pytest.mark.parametrize("name", ["paged", "evict", "ratio"])
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4000), st.sampled_from([None, 1, 17, 128, 1024]), st.integers(1, 64))
def test_wrappers_never_shrink(name: str, num_tokens: int, window: int | None, block: int) -> None:
    method = {
        "paged": Paged(block),
        "evict": Evict(budget=block * 16, sink_length=0),
        "ratio": Evict(ratio=block / 100, policy="h2o"),
    }[name]
    layer = LayerShape(2, 64, 64, window=window)
    assert nbytes(method.buffers(layer, 1, num_tokens)) <= nbytes(method.buffers(layer, 1, num_tokens + 1))


def test_a_mix_goes_by_place() -> None:
    model = load_model("gpt2")
    mix = LayerMix(first=1, last=2, exact=Full("bfloat16"), inner=make_method("int8"))
    weighed = estimate(model, mix, 2, 100)
    assert weighed.nbytes == 2 * 12 * 100 * (3 * 2 * 64 * 2 + 9 * 2 * (64 + 4))  # 12 heads
    assert dict(placed(mix, model.cache_layers)) == {
        (model.cache_layers[0], Full("bfloat16")): 3,
        (model.cache_layers[0], make_method("int8")): 9,
    }
    with pytest.raises(ValueError, match="place in the model"):
        mix.buffers(model.cache_layers[0], 1, 10)
    nested = Paged(16, LayerMix(first=12, inner=Kivi()))
    assert estimate(model, nested, 2, 100).nbytes == 2 * 12 * 12 * 112 * 2 * 64 * 2


def test_a_mix_names_layers() -> None:
    layer = LayerShape(2, 64, 64)
    mix = LayerMix(first=0, last=1, layers="1+3-4", exact=make_method("int8"), inner=Full())
    chosen = [at(mix, layer, index, 7) == make_method("int8") for index in range(7)]
    assert chosen == [False, True, False, True, True, False, True]
    with pytest.raises(ValueError, match=r"layers 1\+3-4: allowed are 0 to 3 of 4 with a cache"):
        at(mix, layer, 0, 4)
    for bad in ("3-", "1,2", "-1", "x", "1++2"):
        with pytest.raises(ValueError, match="allowed are numbers and ranges such as 3"):
            LayerMix(layers=bad)
    with pytest.raises(ValueError, match="from the lower number to the higher"):
        LayerMix(layers="5-3")


def test_methods_by_layer_are_a_mix_and_its_spec() -> None:
    layer, kinds = LayerShape(2, 64, 64), [Kivi(), Kivi(4, sink_length=4), Kivi(3, rotate_values=True)]
    methods = [kinds[i] for i in (0, 0, 1, 2, 2, 0, 1)]
    mix = mixed(methods)
    assert [at(mix, layer, index, 7) for index in range(7)] == methods
    assert parse_method(method_spec(mix), {}) == mix
    assert mixed(methods[:2]) == kinds[0]
    coded = mixed([make_method(name) for name in ("int8", "int4", "int4")])
    assert method_spec(coded) == "mix:first=0,last=0,exact=(int8),inner=(int4),layers=0"
    assert parse_method(method_spec(coded), {}) == coded


@pytest.mark.parametrize("name", METHODS)
def test_every_name_makes_a_method_that_has_a_spec(name: str) -> None:
    assert parse_method(method_spec(METHODS[name]()), {}) == METHODS[name]()


def test_a_spec_says_the_options_that_differ() -> None:
    for spec in ("fp8-token-head:scale_dtype=bfloat16", "q8_0:value_type=q4_0", "turboquant:norm_correction=0", "fp32"):
        assert method_spec(parse_method(spec, {})) == spec

    class Own(Kivi):
        """Of no name."""

    with pytest.raises(LookupError, match="kivi-2bit-g32-r128: no name makes it by its fields"):
        method_spec(Own())


def test_windows_may_stay_exact_in_a_mix() -> None:
    narrow, wide = LayerShape(2, 64, 64, window=32), LayerShape(2, 64, 64)
    mix = LayerMix(first=0, last=0, windows=1, inner=Kivi())
    assert dict(placed(mix, (narrow, wide, narrow))) == {(narrow, Full()): 2, (wide, Kivi()): 1}


@pytest.mark.parametrize(
    ("layer", "what"),
    [
        (LayerShape(1, 576, 0), "kivi holds full-attention layers only, not a latent"),
        (LayerShape(4, 64, 64, window=100), "not a window of 100 tokens"),
        (LayerShape(1, 512, 64, stride=4), "not a compressed layer"),
    ],
)
def test_kivi_names_what_it_cannot_hold(layer: LayerShape, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        Kivi().buffers(layer, 1, 1000)
    with pytest.raises(ValueError, match=what):
        Kivi().read_parts(layer, 1, 1000)


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("paged:block_size=16,inner=fp8", "paged-16(fp8)"),
        ("evict:budget=2048,sink_length=0,inner=(kivi:nbits=4,group_size=64)", "evict-2048(kivi-4bit-g64-r128)"),
        ("paged:inner=(evict:budget=64,inner=(q8_0:value_type=q4_0)),block_size=8", "paged-8(evict-64-s4(q8_0-q4_0))"),
        ("mix:first=1,last=1,exact=bf16,inner=nvfp4", "mix-1-1(bf16,nvfp4)"),
        ("(fp8)", "fp8"),
    ],
)
def test_specs_nest(spec: str, name: str) -> None:
    assert parse_method(spec, {}).name == name


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("paged:inner=(kivi:nbits=4", "parentheses do not pair"),
        ("paged:inner=fp9", "unknown method 'fp9'"),
        ("paged:block_size=0", "block_size 0: allowed"),
        ("evict:budget=many", "budget many: allowed are 1 and above, in whole numbers"),
        ("fp8:format=e3m4", "fp8 format 'e3m4'"),
        ("int8:scale_dtype=int8", "scale_dtype 'int8'"),
        ("ggml:key_type=q9", "key_type 'q9'"),
        ("mix:first=-1", "first -1"),
    ],
)
def test_bad_specs_are_one_clear_line(spec: str, message: str) -> None:
    with pytest.raises((ValueError, LookupError), match=message):
        parse_method(spec, {})


def test_nesting_has_an_end() -> None:
    with pytest.raises(ValueError, match="8 methods inside one another"):
        parse_method("paged:inner=(" * 5000 + "fp8" + ")" * 5000, {})


SPEC_PIECES = [
    "paged",
    "kivi",
    "evict",
    "mix",
    "ggml",
    "int8",
    ":",
    "=",
    ",",
    "(",
    ")",
    "inner",
    "exact",
    "budget",
    "4k",
]
SPEC_PIECES += ["nbits", "-1", "1e9", "fp8", "first", "block_size", " ", "q8_0", "value_type", "é", "dtype", "bf16"]


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(SPEC_PIECES), max_size=14))
def test_any_spec_is_a_method_or_one_line(pieces: list[str]) -> None:
    try:
        method = parse_method("".join(pieces), {})
    except (KeyError, IndexError):
        raise  # LookupErrors too, but faults
    except (ValueError, LookupError):
        pass
    else:
        assert method.name
        assert hash(method) == hash(parse_method("".join(pieces), {}))


def test_the_default_specs_are_methods() -> None:
    for specs in (*DEFAULT_SPECS.values(), (COMPRESSED,)):
        assert len({parse_method(spec, {}) for spec in specs}) == len(specs)


@dataclass(frozen=True)
class Words:
    """A method whose parts are named as nothing here is."""

    part: str = "key_int6"
    kinds: ClassVar[dict[str, str]] = {"key_int6": "codes"}

    @property
    def name(self) -> str:
        return "words"

    def buffers(self, layer: LayerShape, batch_size: int, num_tokens: int) -> list[Buffer]:
        return [Buffer(self.part, (batch_size, num_tokens), "uint8"), Buffer("value_book", (7,), "uint8")]

    def read_parts(self, layer: LayerShape, batch_size: int, num_tokens: int) -> dict[str, int]:
        return parts(self.buffers(layer, batch_size, num_tokens))


def test_parts_of_any_name_have_a_kind() -> None:
    """As the method says, a wrapper as its inner; else by the name's end; else ``other``."""
    model = load_model("gpt2")
    layers = len(model.cache_layers)
    for method in (Words(), Evict(64, 4, Words())):
        found = estimate(model, method, 2, 30)
        assert found.parts == {"key_int6": 60 * layers, "value_book": 7 * layers}
        assert found.split == {"codes": 60 * layers, "scales": 0, "zeros": 0, "residual": 0, "other": 7 * layers}
    assert part_kind(Words(), "key_scale") == "scales"
    wrong = Words()
    object.__setattr__(wrong, "kinds", {"key_int6": "bits"})
    with pytest.raises(ValueError, match="is of kind 'bits', not of codes, scales, zeros, residual, other"):
        part_kind(wrong, "key_int6")


@pytest.mark.parametrize("name", ["index_table", "state_rows", "index", "state"])
def test_parts_named_like_what_no_method_stores_are_refused(name: str) -> None:
    """They would be left out of the cache's bytes."""
    with pytest.raises(ValueError, match=f"method words: part '{name}' is named like constant state or index keys"):
        estimate(load_model("gpt2"), Words(name), 1, 10)


def test_a_name_of_a_table_is_a_method_again() -> None:
    boosts = [make_method("kivi-boost", nbits=nbits) for nbits in (2, 4)]
    mixed = Kivi(4, group_size=64, residual_length=64, key_nbits=4, value_nbits=2, sink_length=4)
    turbo = TurboQuant(2.5), TurboQuant(3), TurboQuant(4, key_nbits=3.5, value_nbits=2, norm_correction=False)
    plain = Kivi(4, group_size=64, residual_length=64), Kivi(), Full("bfloat16"), kivi_seed()
    for method in (*plain, mixed, *boosts, *turbo):
        assert method_named(method.name) == method
    kivis = "2bit-g32", "7bit-g32-r32", "k2v2-g32-r32", "2bit-g032-r128", "2bit-g32-r128-s0"
    turbos = "5bit", "3", "0bit", "k4v4"
    for name in (*(f"kivi-{each}" for each in kivis), *(f"turboquant-{each}" for each in turbos)):
        with pytest.raises(LookupError, match=f"no method is named '{name}'"):
            method_named(name)


@pytest.mark.parametrize(
    ("preset", "dim", "size"),
    [
        ("turboquant_k8v4", 128, 128 + 64 + 4),
        ("turboquant_4bit_nc", 128, 64 + 2 + 64 + 4),
        ("turboquant_k3v4_nc", 128, 48 + 2 + 64 + 4),
        ("turboquant_3bit_nc", 96, 36 + 2 + 36 + 4),
        ("ultraquant_4bit", 256, 272),
    ],
)
def test_slots_of_vllm(preset: str, dim: int, size: int) -> None:
    """Bytes of a token and head by hand; the ends of a model uncompressed under turboquant's presets alone."""
    layer, method = LayerShape(2, dim, dim), make_method(preset)
    assert nbytes(method.buffers(layer, 3, 5)) == 3 * 2 * 5 * size
    ends = [at(method, layer, index, 6) != method for index in range(6)]
    assert ends == ([False] * 6 if preset == "ultraquant_4bit" else [True, True, False, False, True, True])
    with pytest.raises(ValueError, match="not a latent"):
        method.buffers(LayerShape(1, 576, 0), 1, 1)


def test_turboquant_counts_its_planes_and_what_layers_share() -> None:
    layer = LayerShape(8, 128, 64)
    method = make_method("turboquant", nbits="2.5", value_nbits=3)
    assert method.name == "turboquant-k2.5v3"
    assert parts(method.buffers(layer, 1, 10)) == {
        "key_codes": 80 * 40, "key_scale": 80 * 2, "value_codes": 80 * 24, "value_scale": 80 * 2,
    }  # fmt: skip
    shared = {buffer.name: buffer.nbytes for buffer in method.shared_buffers([layer, layer])}
    assert shared == {"signs_64": 64, "signs_128": 128, "lookup_64_3bit": 144, "lookup_128_2.5bit": 288}
    with pytest.raises(ValueError, match=r"nbits 5: allowed are 2, 2\.5, 3, 3\.5, 4"):
        make_method("turboquant", nbits=5)
    with pytest.raises(ValueError, match=r"2\.5 bits halve a head: head dimension 96 is no power of two"):
        method.buffers(LayerShape(1, 96, 96), 1, 1)
