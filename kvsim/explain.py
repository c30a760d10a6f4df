"""Where every byte comes from: each section of each buffer as a product of named numbers.

The factors are written down here a second time, from what the method *means*, and a test holds their products
to the bytes of the buffers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from kvsim.layout import DTYPE_BITS, Buffer, LayerShape, Method
from kvsim.methods import Full, Kivi
from kvsim.methods.kivi import SEQUENCE
from kvsim.model import Model

Factor = tuple[int, str]


@dataclass(frozen=True)
class Formula:
    """One section's bytes: the product of ``factors``, over 8 where the last factor counts bits."""

    buffer: str
    section: str
    factors: tuple[Factor, ...]
    per_byte: int = 1

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
    """A method's numbers and formulas; the formulas' bytes add up to the cache."""

    method: Method
    numbers: tuple[Number, ...]
    formulas: tuple[Formula, ...]

    @property
    def nbytes(self) -> int:
        return sum(formula.nbytes for formula in self.formulas)


def model_numbers(model: Model, batch_size: int, num_tokens: int) -> list[Number]:
    """The numbers that every method shares."""
    layer = model.cache_layers[0]
    return [
        Number("layers", model.num_layers, model.source("num_layers")),
        Number("kv heads", layer.num_kv_heads, model.source("num_kv_heads")),
        Number("head dim", layer.key_dim, model.source("head_dim")),
        Number("batch", batch_size, "--batch"),
        Number("tokens", num_tokens, "--ctx"),
    ]


def explain(model: Model, method: Method, batch_size: int, num_tokens: int) -> Explanation:
    """The formulas of ``method``'s cache for every distinct layer of ``model``.

    Raises ``ValueError`` where the method cannot hold such a layer.
    """
    numbers: dict[str, Number] = {}
    formulas: list[Formula] = []
    for layer, count in Counter(model.cache_layers).items():
        rule = RULES.get(type(method), _any_method)
        more, written = rule(method, layer, count, batch_size, num_tokens)
        numbers |= {number.name: number for number in more}
        formulas += written
    return Explanation(method, tuple(numbers.values()), tuple(formulas))


Written = tuple[list[Number], list[Formula]]


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
    held = layer.num_tokens(num_tokens)
    rows = _rows(layer, count, batch_size)
    numbers = [_rows_number(layer, count, batch_size), Number("bytes", size, f"dtype {method.dtype}")]
    return numbers, [
        Formula(stream, stream, (rows, (held, "tokens"), (dim, "head dim"), (size, "bytes")))
        for stream, dim in (("key", layer.key_dim), ("value", layer.value_dim))
    ]


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
RULES: dict[type, Rule] = {Full: _full, Kivi: _kivi}
"""Method -> its formulas, one row a method; without a row the shapes themselves are shown."""
