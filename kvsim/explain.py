"""Where every byte comes from: each section of each buffer as a product of named numbers.

The factors are written down here a second time, from what the method *means*, and a test holds their products
to the bytes of the buffers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

from kvsim.labels import layer_label
from kvsim.layout import DTYPE_BITS, Buffer, LayerShape, Method, StateShape
from kvsim.methods import Evict, Fp8, Full, Ggml, Kivi, Nvfp4, Paged, PerTokenHead, placed
from kvsim.methods.ggml import PLAIN as GGML_PLAIN
from kvsim.methods.kivi import SEQUENCE
from kvsim.model import Model

Factor = tuple[int, str]


@dataclass(frozen=True)
class Formula:
    """One section's bytes: the product of ``factors``, over 8 where the last factor counts bits.

    ``layer`` says which layers, where the model or the method has several kinds; ``apart`` marks bytes beside the
    cache that the method stores (constant state, index keys).
    """

    buffer: str
    section: str
    factors: tuple[Factor, ...]
    per_byte: int = 1
    layer: str = ""
    apart: bool = False

    @property
    def nbytes(self) -> int:
        return prod(number for number, _ in self.factors) // self.per_byte

    @property
    def text(self) -> str:
        """``256 rows x 960 packed x 64 head dim x 2 bits / 8``."""
        product = " x ".join(f"{number:,} {what}" for number, what in self.factors)
        return product + (f" / {self.per_byte}" if self.per_byte > 1 else "")


@dataclass(frozen=True)
class Number:
    """A number of the formulas: its value, and the config key, option or rule that it came from."""

    name: str
    value: int | str
    origin: str


@dataclass(frozen=True)
class Explanation:
    """A method's numbers and formulas; the bytes of those that do not stand apart add up to the cache."""

    method: Method
    numbers: tuple[Number, ...]
    formulas: tuple[Formula, ...]

    @property
    def nbytes(self) -> int:
        return sum(formula.nbytes for formula in self.formulas if not formula.apart)

    @property
    def apart_nbytes(self) -> int:
        """Constant state and index keys."""
        return sum(formula.nbytes for formula in self.formulas if formula.apart)


def model_numbers(model: Model, batch_size: int, num_tokens: int) -> list[Number]:
    """The numbers that every method shares; of each kind of layer its own where there are several."""
    kinds = Counter(model.layers)
    numbers = []
    for layer, count in kinds.items():
        label = f" ({layer.kind})" if len(kinds) > 1 else ""
        numbers.append(Number("layers" + label, count, model.source("num_layers")))
        if isinstance(layer, LayerShape):
            numbers += _shape_numbers(layer, label, model)
    numbers.append(Number("batch", batch_size, "--batch"))
    numbers.append(Number("tokens", num_tokens, "--ctx"))
    return list(dict.fromkeys(numbers))


def _shape_numbers(layer: LayerShape, label: str, model: Model) -> list[Number]:
    numbers = [Number("kv heads" + label, layer.num_kv_heads, model.source("num_kv_heads", layer.kind))]
    if not layer.value_dim:
        what = "one vector for keys and values" if layer.kind != "indexer" else "index key"
        numbers.append(Number("latent" + label, layer.key_dim, model.source("head_dim", layer.kind) or what))
    else:
        numbers.append(Number("head dim" + label, layer.key_dim, model.source("head_dim", layer.kind)))
        if layer.value_dim != layer.key_dim:
            numbers.append(Number("value dim" + label, layer.value_dim, model.source("value_dim", layer.kind)))
    if layer.window is not None:
        numbers.append(Number("window" + label, layer.window, model.source("window", layer.kind)))
    if layer.stride > 1:
        numbers.append(Number("stride" + label, layer.stride, "tokens an entry"))
    return numbers


def explain(model: Model, method: Method, batch_size: int, num_tokens: int) -> Explanation:
    """The formulas of ``method``'s cache for every distinct layer of ``model``, its index keys and its state last.

    Raises ``ValueError`` where the method cannot hold such a layer.
    """
    numbers: dict[tuple[str, str], Number] = {}
    formulas: list[Formula] = []
    pieces = placed(method, model.cache_layers)
    several = len(pieces) > 1
    for (layer, chosen), count in pieces.items():
        more, written = _written(chosen, layer, count, batch_size, num_tokens)
        label = layer_label(layer, count, chosen if chosen != method else None) if several else ""
        for number in more:
            shown = replace(number, name=f"{number.name} ({layer.kind})") if several else number
            numbers[shown.name, shown.origin] = shown
        formulas += [replace(formula, layer=label) for formula in written if _says_something(formula, several)]
    for layer, count in Counter(model.index_layers).items():
        _, written = _full(Full(), layer, count, batch_size, num_tokens)
        label = layer_label(layer, count, None)
        formulas += [
            replace(formula, layer=label, buffer="index", section=f"index_{formula.section}", apart=True)
            for formula in written
            if formula.nbytes
        ]
    for state, count in Counter(model.state_layers).items():
        formulas += _state(state, count, batch_size)
    return Explanation(method, tuple(numbers.values()), tuple(formulas))


def _says_something(formula: Formula, several: bool) -> bool:
    """Whether a formula is shown: not one of a stream that the layers lack, nor an empty one among several kinds."""
    return (0, "head dim") not in formula.factors and (bool(formula.nbytes) or not several)


def _state(state: StateShape, count: int, batch_size: int) -> list[Formula]:
    plural = "s" if count > 1 else ""
    out = []
    for name, shape, dtype in state.tensors:
        axes = tuple((size, f"[{axis}]") for axis, size in enumerate(shape))
        factors = ((count, "layers"), (batch_size, "batch"), *axes, (DTYPE_BITS[dtype] // 8, f"bytes ({dtype})"))
        label = f"{count} {state.kind} layer{plural}: constant state, whatever the tokens"
        out.append(Formula("state", f"state_{name}", factors, layer=label, apart=True))
    return out


Written = tuple[list[Number], list[Formula]]


def _written(method: Method, layer: LayerShape, count: int, batch_size: int, num_tokens: int) -> Written:
    return RULES.get(type(method), _any_method)(method, layer, count, batch_size, num_tokens)


def _any_method(method: Method, layer: LayerShape, count: int, batch_size: int, num_tokens: int) -> Written:
    """The shapes as they are, for a method that has no formulas of its own here."""
    out = []
    for buffer in method.buffers(layer, batch_size, num_tokens):
        if buffer.sections:
            out += [Formula(buffer.name, name, ((count, "layers"), (size, "B"))) for name, size in buffer.sections]
        else:
            out.append(_shaped(buffer, count))
    return [], out


def _shaped(buffer: Buffer, count: int) -> Formula:
    axes = tuple((size, f"[{axis}]") for axis, size in enumerate(buffer.shape))
    return Formula(buffer.name, buffer.name, ((count, "layers"), *axes, (DTYPE_BITS[buffer.dtype], "bits")), 8)


def _full(method: Method, layer: LayerShape, count: int, batch_size: int, num_tokens: int) -> Written:
    assert isinstance(method, Full)
    size = DTYPE_BITS[method.dtype] // 8
    rows, tokens, numbers = _held(layer, count, batch_size, num_tokens)
    numbers.append(Number("bytes", size, f"dtype {method.dtype}"))
    return numbers, [
        Formula(stream, stream, (rows, tokens, (dim, "head dim"), (size, "bytes")))
        for stream, dim in (("key", layer.key_dim), ("value", layer.value_dim))
    ]


def _held(layer: LayerShape, count: int, batch_size: int, num_tokens: int) -> tuple[Factor, Factor, list[Number]]:
    """The rows, the tokens that a row holds, and both as numbers."""
    held = layer.num_tokens(num_tokens)
    numbers = [_rows_number(layer, count, batch_size)]
    if held != num_tokens:
        entries = f"{num_tokens:,} // stride {layer.stride}" if layer.stride > 1 else f"{num_tokens:,}"
        origin = f"min({entries}, window {layer.window:,})" if layer.window is not None else entries
        numbers.append(Number("held", held, origin))
    return _rows(layer, count, batch_size), (held, "tokens"), numbers


def _fp8(method: Method, layer: LayerShape, count: int, batch_size: int, num_tokens: int) -> Written:
    rows, tokens, numbers = _held(layer, count, batch_size, num_tokens)
    return numbers, [
        Formula(f"{stream}_codes", f"{stream}_codes", (rows, tokens, (dim, "head dim"), (1, "byte")))
        for stream, dim in (("key", layer.key_dim), ("value", layer.value_dim))
    ]


def _per_token_head(method: Method, layer: LayerShape, count: int, batch_size: int, num_tokens: int) -> Written:
    assert isinstance(method, PerTokenHead)
    bits, scale = (4 if method.format == "int4" else 8), DTYPE_BITS[method.scale_dtype] // 8
    rows, tokens, numbers = _held(layer, count, batch_size, num_tokens)
    numbers += [Number("bits", bits, f"format {method.format}"), Number("scale bytes", scale, "scale_dtype")]
    out = []
    for stream, dim in (("key", layer.key_dim), ("value", layer.value_dim)):
        if dim:
            codes = (rows, tokens, (dim, "head dim"), (bits, "bits"))
            out.append(Formula(f"{stream}_codes", f"{stream}_codes", codes, 8))
            out.append(Formula(f"{stream}_scale", f"{stream}_scale", (rows, tokens, (scale, "scale bytes"))))
    return numbers, out


def _nvfp4(method: Method, layer: LayerShape, count: int, batch_size: int, num_tokens: int) -> Written:
    rows, tokens, numbers = _held(layer, count, batch_size, num_tokens)
    numbers.append(Number("block", 16, "channels that share an fp8 scale"))
    out = []
    for stream, dim in (("key", layer.key_dim), ("value", layer.value_dim)):
        out.append(Formula(f"{stream}_codes", f"{stream}_codes", (rows, tokens, (dim, "head dim"), (4, "bits")), 8))
        scales = (rows, tokens, (dim // 16, "blocks"), (1, "byte"))
        out.append(Formula(f"{stream}_scale", f"{stream}_scale", scales))
    return numbers, out


def _ggml(method: Method, layer: LayerShape, count: int, batch_size: int, num_tokens: int) -> Written:
    assert isinstance(method, Ggml)
    rows, tokens, numbers = _held(layer, count, batch_size, num_tokens)
    numbers.append(Number("block", 32, "channels, float16 scales (ggml-common.h)"))
    out = []
    sides = (("key", method.key_type, layer.key_dim), ("value", method.value_type, layer.value_dim))
    for stream, kind, dim in sides:
        if kind in GGML_PLAIN:
            size = DTYPE_BITS[GGML_PLAIN[kind]] // 8
            out.append(Formula(stream, stream, (rows, tokens, (dim, "head dim"), (size, "bytes"))))
            continue
        bits = {"q8_0": 8, "q5_1": 5, "q5_0": 5, "q4_1": 4, "q4_0": 4, "iq4_nl": 4}[kind]
        codes = (rows, tokens, (dim, "head dim"), (bits, "bits"))
        out.append(Formula(stream, f"{stream}_codes", codes, 8))
        halves = ("scale", "zero") if kind.endswith("_1") else ("scale",)
        for half in halves:
            out.append(Formula(stream, f"{stream}_{half}", (rows, tokens, (dim // 32, "blocks"), (2, "bytes"))))
    return numbers, out


def _evict(method: Method, layer: LayerShape, count: int, batch_size: int, num_tokens: int) -> Written:
    assert isinstance(method, Evict)
    kept = method.num_kept(layer, num_tokens)
    numbers, out = _written(method.inner, replace(layer, window=None, stride=1), count, batch_size, kept)
    return [Number("kept", kept, f"min({num_tokens:,} tokens, budget {method.budget:,})"), *numbers], out


def _paged(method: Method, layer: LayerShape, count: int, batch_size: int, num_tokens: int) -> Written:
    assert isinstance(method, Paged)
    provided = method.num_provided(layer, num_tokens)
    numbers, out = _written(method.inner, replace(layer, window=None, stride=1), count, batch_size, provided)
    rule = f"{provided // method.block_size:,} blocks of {method.block_size}"
    return [Number("provided", provided, rule), *numbers], out


def _rows(layer: LayerShape, count: int, batch_size: int) -> Factor:
    return (count * batch_size * layer.num_kv_heads, "rows")


def _rows_number(layer: LayerShape, count: int, batch_size: int) -> Number:
    origin = f"layers x batch x kv heads = {count:,} x {batch_size:,} x {layer.num_kv_heads:,}"
    return Number("rows", count * batch_size * layer.num_kv_heads, origin)


def _kivi(method: Method, layer: LayerShape, count: int, batch_size: int, num_tokens: int) -> Written:
    assert isinstance(method, Kivi)
    record = method.record(layer)
    length, records, exact = method.record_length, method.num_records(num_tokens), method.num_exact(num_tokens)
    sink = min(exact, method.sink_length)
    packed = length * records
    size = DTYPE_BITS[method.dtype] // 8
    whole = method.k_group == SEQUENCE
    rule = (
        f"{length} x ceil({num_tokens:,} / {length}), a record of {length} for every token"
        if whole
        else f"{length} x ceil(max(0, {num_tokens:,} - {method.sink_length} - {method.residual_length}) / {length})"
    )
    numbers = [
        _rows_number(layer, count, batch_size),
        Number("key bits", method.k_bits, "nbits" if method.key_nbits is None else "key_nbits"),
        Number("value bits", method.v_bits, "nbits" if method.value_nbits is None else "value_nbits"),
        Number("packed", packed, rule),
        Number(
            "residual", exact - sink, f"min({num_tokens:,} - {sink} sink, residual_length {method.residual_length})"
        ),
        Number("bytes", size, f"dtype {method.dtype}"),
    ]
    if sink:
        numbers.append(Number("sink", sink, "sink_length"))
    rows = _rows(layer, count, batch_size)
    tokens: Factor = (packed, "packed")
    if whole:
        key_groups: tuple[Factor, ...] = ()
        params = "key_params"
    else:
        groups = packed // record.key_group
        numbers.append(Number("key groups", groups, f"packed / key group of {record.key_group} tokens"))
        key_groups = ((groups, "key groups"),)
        params = "records"
    numbers.append(
        Number("value groups", record.num_value_groups, f"head dim / value group of {record.value_group} channels")
    )
    half: Factor = (2, "bytes")  # scales and zeros are float16
    key_params = (rows, *key_groups, (layer.key_dim, "head dim"), half)
    value_params = (rows, tokens, (record.num_value_groups, "value groups"), half)
    formulas = [
        Formula("records", "key_codes", (rows, tokens, (layer.key_dim, "head dim"), (method.k_bits, "bits")), 8),
        Formula("records", "value_codes", (rows, tokens, (layer.value_dim, "head dim"), (method.v_bits, "bits")), 8),
        Formula(params, "key_scale", key_params),
        Formula(params, "key_zero", key_params),
        Formula("records", "value_scale", value_params),
        Formula("records", "value_zero", value_params),
    ]
    for stream, dim in (("key", layer.key_dim), ("value", layer.value_dim)):
        tail = ((dim, "head dim"), (size, "bytes"))
        if sink:
            formulas.append(Formula(f"exact_{stream}", f"{stream}_sink", (rows, (sink, "sink"), *tail)))
        formulas.append(Formula(f"exact_{stream}", f"{stream}_residual", (rows, (exact - sink, "residual"), *tail)))
    formulas.append(
        Formula("lengths", "lengths", ((count, "layers"), (batch_size, "batch"), (2, "counts"), (4, "bytes")))
    )
    formulas.sort(key=lambda formula: formula.buffer == "key_params")  # a buffer's sections stay together
    return numbers, formulas


Rule = Callable[[Method, LayerShape, int, int, int], Written]
RULES: dict[type, Rule] = {
    Full: _full,
    Kivi: _kivi,
    Fp8: _fp8,
    PerTokenHead: _per_token_head,
    Nvfp4: _nvfp4,
    Ggml: _ggml,
    Evict: _evict,
    Paged: _paged,
}
"""Method -> its formulas, one row a method; without a row the shapes themselves are shown."""
