"""Seconds of a decode step and of a prefill, with a band and with what bounds them.

A decode step over ``batch_size`` sequences of ``num_tokens`` tokens is

    weights        bytes of the weights that the step reads / (efficiency * bandwidth)
    compute        what the matrix products take beyond the weight stream: max(0, arithmetic - weights)
    kv             the attention of every layer (:mod:`kvsim.attention_curve`), and the constant state read and written
    dequantize     what unpacking codes takes beyond the stream: max(0, arithmetic - kv)
    overhead       a constant a layer, and one a step
    communication  two all-reduces a layer, where several cards share a layer

and their sum.  The constants are in :mod:`kvsim.catalog` (``timing.json``), each with its source; a measured
profile of a card (``kvsim calibrate``) takes their place where one is given.  See docs/time.md.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import log2
from pathlib import Path
from typing import Any, NamedTuple

from kvsim.attention_curve import DEFAULT_SMS, Curve, Kernel
from kvsim.hardware import Hardware
from kvsim.layout import LayerShape, Method
from kvsim.model import Model
from kvsim.traced import Vectorized

PARTS = ("weights", "compute", "kv", "dequantize", "overhead", "communication")


class Band(NamedTuple):
    """Seconds: the prediction, and the range that nine in ten measurements fell into."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Step:
    """One step: seconds with their band, the parts that add up to the value, and the part that is largest."""

    seconds: Band
    parts: dict[str, float]
    bound: str


class WeightBits(NamedTuple):
    """Bits a parameter as stored: always-read weights, routed experts, and the head."""

    dense: float
    routed: float
    head: float


@dataclass(frozen=True)
class Constants:
    """What the model of time rests on.  Efficiencies are shares of the card's stated peaks, times are seconds.

    ``weight_efficiency``: the weight stream.  ``expert_efficiency``: the stream of routed experts.
    ``layer_seconds`` and ``step_seconds``: what a layer and a step cost besides.  ``prefill_efficiency``:
    arithmetic of long products.  ``decode_band``, ``prefill_band``: factors (low, high) on a prediction.
    """

    weight_efficiency: float
    expert_efficiency: float
    layer_seconds: float
    step_seconds: float
    prefill_efficiency: float
    prefill_seconds: float
    vector_ops_per_code: float
    link_efficiency: float
    link_seconds: float
    decode_band: tuple[float, float]
    prefill_band: tuple[float, float]
    kernels: Mapping[str, Kernel]
    curve: Curve


@cache
def constants() -> Constants:
    """The fitted and stated constants of ``kvsim/catalog/timing.json``."""
    path = Path(__file__).with_name("catalog") / "timing.json"
    table = json.loads(path.read_text(encoding="utf-8"))
    values: dict[str, Any] = {name: entry["value"] for name, entry in table["constants"].items()}
    for name in ("decode_band", "prefill_band"):
        values[name] = tuple(values[name])
    kernels = {name: Kernel(**entry) for name, entry in table["kernels"].items()}
    return Constants(**values, kernels=kernels, curve=Curve(**table["curve"]))


def weight_storage(model: Model, weight_bits: float | None = None) -> WeightBits:
    """Bits a parameter by group.  A head keeps 16 bits where the layers are quantized below 8 or in 8 bits."""
    bits = weight_bits or model.weight_bits or 16.0
    return WeightBits(bits, bits, max(bits, 16.0))


def decode_step(
    model: Model,
    method: Method,
    hardware: Hardware,
    batch_size: int,
    num_tokens: int,
    *,
    weight_bits: float | None = None,
    tensor_parallel: int = 1,
    engine: str = "ideal",
    profile: Constants | None = None,
) -> Step:
    """One decode step: ``batch_size`` sequences with ``num_tokens`` tokens each in the cache.

    ``weight_bits``: bits a weight (default: the model's own, else 16).  ``engine``: whose attention kernel is
    taken, ``ideal`` or one without a measured kernel takes the mean of those measured.  Raises ``ValueError``
    where the card's bandwidth or the model's weights are not known.
    """
    _positive(batch_size=batch_size, num_tokens=num_tokens, tensor_parallel=tensor_parallel)
    fixed = profile or constants()
    parts = _decode_parts(
        fixed, model, method, hardware, batch_size, num_tokens, weight_bits, tensor_parallel, engine, max
    )
    return _step({name: float(value) for name, value in parts.items()}, fixed.decode_band)


def decode_seconds(
    model: Model,
    method: Method,
    hardware: Hardware,
    batch_size: Any,
    num_tokens: Any,
    *,
    weight_bits: float | None = None,
    tensor_parallel: int = 1,
    engine: str = "ideal",
    profile: Constants | None = None,
) -> tuple[Any, Any, Any]:
    """:func:`decode_step` over integer arrays that broadcast together: seconds, low and high (float64 arrays)."""
    import numpy

    batch, tokens = numpy.asarray(batch_size), numpy.asarray(num_tokens)  # not broadcast yet: grids stay separable
    if batch.size and (batch.min() < 1 or tokens.min() < 1):
        raise ValueError("batch and context: allowed are 1 and above")
    fixed = profile or constants()
    parts = _decode_parts(
        fixed, model, method, hardware, batch, tokens, weight_bits, tensor_parallel, engine, numpy.maximum
    )
    value = sum(parts.values(), numpy.zeros(numpy.broadcast_shapes(batch.shape, tokens.shape)))
    return value, value * fixed.decode_band[0], value * fixed.decode_band[1]


def prefill(
    model: Model,
    hardware: Hardware,
    batch_size: int,
    num_tokens: int,
    *,
    weight_bits: float | None = None,
    tensor_parallel: int = 1,
    cached_tokens: int = 0,
    engine: str = "ideal",
    profile: Constants | None = None,
) -> Step:
    """The prefill of ``batch_size`` prompts of ``num_tokens`` tokens, the first ``cached_tokens`` of each at hand.

    Raises ``ValueError`` where the card's arithmetic or bandwidth or the model's weights are not known.
    """
    _positive(batch_size=batch_size, num_tokens=num_tokens, tensor_parallel=tensor_parallel)
    if not 0 <= cached_tokens < num_tokens:
        raise ValueError(f"cached tokens {cached_tokens}: allowed are 0 to {num_tokens - 1}")
    fixed = profile or constants()
    new = num_tokens - cached_tokens
    parts = _prefill_parts(fixed, model, hardware, batch_size, num_tokens, new, weight_bits, tensor_parallel)
    return _step(parts, fixed.prefill_band)


def token_step(
    model: Model,
    method: Method,
    hardware: Hardware,
    batch_size: int,
    input_len: int,
    output_len: int,
    *,
    weight_bits: float | None = None,
    tensor_parallel: int = 1,
    engine: str = "ideal",
    profile: Constants | None = None,
) -> Step:
    """Time per output token of a server that keeps ``batch_size`` requests of these lengths in flight.

    The decode step at the mean context, ``input_len + output_len / 2``.
    """
    _positive(input_len=input_len, output_len=output_len)
    context = input_len + output_len // 2
    return decode_step(
        model,
        method,
        hardware,
        batch_size,
        context,
        weight_bits=weight_bits,
        tensor_parallel=tensor_parallel,
        engine=engine,
        profile=profile,
    )


def first_token(
    model: Model,
    method: Method,
    hardware: Hardware,
    batch_size: int,
    input_len: int,
    output_len: int,
    *,
    weight_bits: float | None = None,
    tensor_parallel: int = 1,
    cached_tokens: int = 0,
    engine: str = "ideal",
    profile: Constants | None = None,
) -> Step:
    """Time to the first token on the server of :func:`token_step`: the prefill of one prompt."""
    _positive(batch_size=batch_size, output_len=output_len)
    return prefill(
        model,
        hardware,
        1,
        input_len,
        weight_bits=weight_bits,
        tensor_parallel=tensor_parallel,
        cached_tokens=cached_tokens,
        engine=engine,
        profile=profile,
    )


def _step(parts: dict[str, float], band: tuple[float, float]) -> Step:
    seconds = sum(parts.values())
    bound = max(parts, key=lambda name: parts[name])
    return Step(Band(seconds, seconds * band[0], seconds * band[1]), parts, bound)


def _decode_parts(
    fixed: Constants,
    model: Model,
    method: Method,
    hardware: Hardware,
    batch_size: Any,
    num_tokens: Any,
    weight_bits: float | None,
    ranks: int,
    engine: str,
    maximum: Any,
) -> dict[str, Any]:
    bandwidth = _bandwidth(hardware)
    weights, products = _products(fixed, model, hardware, batch_size, weight_bits, ranks)
    stream, unpack = _attention(fixed, model, method, hardware, batch_size, num_tokens, ranks, engine, maximum)
    states = sum(buffer.nbytes for layer in model.state_layers for buffer in layer.buffers(1))
    kv = stream + 2 * states * batch_size / ranks / (fixed.weight_efficiency * bandwidth)
    return {
        "weights": weights,
        "compute": maximum(0.0, products - weights),
        "kv": kv,
        "dequantize": unpack,
        "overhead": fixed.step_seconds + fixed.layer_seconds * len(model.layers),
        "communication": _communication(fixed, model, hardware, batch_size, ranks),
    }


def _products(
    fixed: Constants, model: Model, hardware: Hardware, num_tokens: Any, weight_bits: float | None, ranks: int
) -> tuple[Any, Any]:
    """Seconds of the weight stream and of the arithmetic of one step over ``num_tokens`` tokens."""
    weights = _weights(model)
    bits = weight_storage(model, weight_bits)
    head = weights.head or weights.embedding
    routed = weights.routed * _share(weights, num_tokens)
    plain = (weights.dense * bits.dense + head * bits.head) / fixed.weight_efficiency
    stream = (plain + routed * bits.routed / fixed.expert_efficiency) / 8 / _bandwidth(hardware) / ranks
    rate = _flops(hardware, bits.dense)
    if rate is None:
        return stream, 0.0 * stream
    return stream, 2 * weights.active * num_tokens / (fixed.prefill_efficiency * rate) / ranks


def _share(weights: Any, num_tokens: Any) -> Any:
    """Share of the routed experts that ``num_tokens`` tokens hit, routing taken as uniform."""
    if not weights.num_experts:
        return 1.0
    return 1 - (1 - min(1.0, weights.experts_per_token / weights.num_experts)) ** num_tokens


def _attention(
    fixed: Constants,
    model: Model,
    method: Method,
    hardware: Hardware,
    batch_size: Any,
    num_tokens: Any,
    ranks: int,
    engine: str,
    maximum: Any,
) -> tuple[Any, Any]:
    """Seconds of all layers' attention: the stream, and what unpacking takes beyond it."""
    bandwidth, total, beyond = _bandwidth(hardware), 0.0, 0.0
    lanes = (hardware.num_sms or DEFAULT_SMS) * LANE_OPS
    for layer, count in Counter(model.cache_layers).items():
        kernel, packed = _kernel(fixed, method, layer, engine)
        heads = max(1.0, layer.num_kv_heads / ranks)
        share = heads / layer.num_kv_heads
        nbytes = _read_nbytes(method, layer, num_tokens) * batch_size * share
        seconds = fixed.curve.seconds(kernel, batch_size * heads, nbytes, bandwidth, hardware.num_sms, maximum)
        total = total + count * seconds
        if packed:
            held = _held(layer, num_tokens, maximum)
            codes = held * batch_size * heads * (layer.key_dim + layer.value_dim)
            beyond = beyond + count * maximum(0.0, codes * fixed.vector_ops_per_code / lanes - seconds)
    return total, beyond


LANE_OPS = 128 * 1.7e9
"""Vector operations a second of one multiprocessor: 128 lanes at 1.7 GHz (an H100 SXM's)."""


def _kernel(fixed: Constants, method: Method, layer: LayerShape, engine: str) -> tuple[Kernel, bool]:
    """The measured kernel nearest to what ``engine`` runs on ``method``, and whether it unpacks codes."""
    token = 2 * (layer.key_dim + layer.value_dim) * layer.num_kv_heads
    bits = 16 * _read_nbytes(method, layer, 65536) / 65536 / token if layer.window is None and layer.stride == 1 else 16
    width = "fp16" if bits > 12 else "fp8" if bits > 7.9 and "fp8" in method.name else "packed"
    kernels = fixed.kernels
    return kernels.get(f"{engine}/{width}") or kernels[width], width == "packed"


def _read_nbytes(method: Method, layer: LayerShape, num_tokens: Any) -> Any:
    """Bytes that a step reads of one layer and sequence, for numbers and arrays alike."""
    if isinstance(num_tokens, int):
        return sum(method.read_parts(layer, 1, num_tokens).values())
    import numpy

    tokens = num_tokens.astype(numpy.int64).reshape(-1, 1)
    read = _read_formula(method, layer)(numpy.ones((1, 1), numpy.int64), tokens)  # type: ignore[arg-type]  # every method is frozen
    return read.reshape(num_tokens.shape).astype(numpy.float64)


@cache
def _read_formula(method: Method, layer: LayerShape) -> Vectorized:
    return Vectorized(lambda batch_size, num_tokens: sum(method.read_parts(layer, batch_size, num_tokens).values()))


def _held(layer: LayerShape, num_tokens: Any, maximum: Any) -> Any:
    """Entries of a layer, for numbers and arrays alike."""
    entries = num_tokens // layer.stride
    return entries if layer.window is None else -maximum(-entries, -layer.window)


def _communication(fixed: Constants, model: Model, hardware: Hardware, num_tokens: Any, ranks: int) -> Any:
    """Two all-reduces a layer of the 16-bit hidden states, ring bytes over the link's one direction."""
    if ranks == 1:
        return 0.0
    if hardware.link_bandwidth is None:
        raise ValueError(f"{hardware.id}: the bandwidth between cards is not known, no tensor parallelism")
    nbytes = 2 * num_tokens * model.hidden_size
    ring = 2 * (ranks - 1) / ranks * nbytes / (fixed.link_efficiency * hardware.link_bandwidth / 2)
    return 2 * len(model.layers) * (fixed.link_seconds * log2(2 * ranks) + ring)


def _prefill_parts(
    fixed: Constants,
    model: Model,
    hardware: Hardware,
    batch_size: int,
    num_tokens: int,
    new: int,
    weight_bits: float | None,
    ranks: int,
) -> dict[str, float]:
    weights = _weights(model)
    bits = weight_storage(model, weight_bits)
    rate, half = _flops(hardware, bits.dense), _flops(hardware, 16)
    if rate is None or half is None:
        raise ValueError(f"{hardware.id}: its arithmetic (FLOP/s) is not known, no prefill time")
    head = weights.head or weights.embedding
    stream, _ = _products(fixed, model, hardware, batch_size * new, weight_bits, ranks)
    each_token = 2 * (weights.active - head)
    products = batch_size * (each_token * new + 2 * head) / (fixed.prefill_efficiency * rate) / ranks
    attention = 0.0
    for layer, count in Counter(model.cache_layers).items():
        seen = _seen(layer, num_tokens, new)
        attention += count * 2 * model.num_q_heads * (layer.key_dim + (layer.value_dim or layer.key_dim)) * seen
    compute = products + batch_size * attention / (fixed.prefill_efficiency * half) / ranks
    return {
        "weights": stream,
        "compute": max(0.0, compute - stream),
        "overhead": fixed.prefill_seconds + fixed.layer_seconds * len(model.layers),
        "communication": float(_communication(fixed, model, hardware, batch_size * new, ranks)),
    }


def _seen(layer: LayerShape, num_tokens: int, new: int) -> float:
    """Pairs of a new token and an entry it sees, causality and window applied."""
    first = num_tokens - new
    if layer.window is None:
        return (num_tokens * (num_tokens + 1) - first * (first + 1)) / 2 / layer.stride
    ramp = max(0, min(num_tokens, layer.window) - first)
    return ramp * (first + (ramp + 1) / 2) + (new - ramp) * min(layer.window, num_tokens)


def _weights(model: Model) -> Any:
    if model.weights is None:
        raise ValueError(f"{model.name}: the config does not tell the number of weights, no time without it")
    return model.weights


def _bandwidth(hardware: Hardware) -> float:
    if not hardware.bandwidth:
        raise ValueError(f"{hardware.id}: its memory bandwidth is not known, no time without it")
    return hardware.bandwidth


def _flops(hardware: Hardware, bits: float) -> float | None:
    """FLOP/s for weights of so many bits: 4-bit weights on a card without 4-bit products are widened to 16."""
    if bits < 6:
        return hardware.fp4_flops or hardware.fp16_flops
    return hardware.fp8_flops or hardware.fp16_flops if bits <= 8 else hardware.fp16_flops


def _positive(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name.replace('_', ' ')} {value}: allowed are 1 and above")
