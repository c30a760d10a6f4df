"""Seconds of a decode step and of a prefill, alone and on a busy server, with a band and with what bounds them.

A decode step over ``batch_size`` sequences of ``num_tokens`` tokens is the sum of

    weights        bytes of the weights that the step reads / (efficiency * bandwidth)
    compute        the arithmetic of the matrix products, beside the weight stream
    kv             the attention of every layer (:mod:`kvsim.latency.attention_curve`); constant states read and written
    dequantize     unpacking weights that the card cannot multiply as stored, and cache codes beyond the stream
    overhead       constants a layer by what it is, one more where its cache is quantized, one a sequence
    communication  two all-reduces a block, where several cards share every layer
    prefill        on a server: what the other requests' prompts add to a step

The constants are in ``kvsim/catalog/timing.json``, each with its source; a measured profile of a card
(``kvsim calibrate``) takes their place where one is given.  docs/time.md has the equations and the errors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from kvsim.engines import IDEAL
from kvsim.hardware import Hardware
from kvsim.latency.constants import constants
from kvsim.latency.roofline import Roofline, Serving
from kvsim.layout import Method
from kvsim.memory.estimate import cache_nbytes
from kvsim.models.model import Model
from kvsim.models.weight_storage import weight_nbytes

DEFAULT = Serving()
PARTS = ("weights", "compute", "kv", "dequantize", "overhead", "communication", "prefill")


MOST_SHARE = 0.95
"""Share of the memory that an engine is given where its weights do not fit its default one (an estimate)."""
MOST = 10**15
"""The largest batch, length or number of cards that is timed; products of them stay finite."""


class Band(NamedTuple):
    """Seconds: the prediction, and the range that nine in ten measurements fell into."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Step:
    """Seconds with their band, the parts (of :data:`PARTS`) that add up to the value, and the largest of them."""

    seconds: Band
    parts: dict[str, float]
    bound: str


def decode_step(
    model: Model,
    method: Method,
    hardware: Hardware,
    batch_size: float,
    num_tokens: int,
    serving: Serving = DEFAULT,
) -> Step:
    """One decode step alone: ``batch_size`` sequences with ``num_tokens`` tokens each in the cache.

    Raises ``ValueError`` where the card's bandwidth or the model's number of weights is not known.
    """
    _positive(batch_size=batch_size, num_tokens=num_tokens, tensor_parallel=serving.tensor_parallel)
    roofline = Roofline(model, hardware, serving)
    return as_step(_decode_parts(roofline, method, batch_size, num_tokens), roofline.decode_band)


def decode_seconds(
    model: Model,
    method: Method,
    hardware: Hardware,
    batch_size: Any,
    num_tokens: Any,
    serving: Serving = DEFAULT,
) -> tuple[Any, Any, Any]:
    """:func:`decode_step` over integer arrays that broadcast together: seconds, low and high (float64 arrays)."""
    import numpy

    batch, tokens = numpy.asarray(batch_size), numpy.asarray(num_tokens)  # not broadcast yet: grids stay separable
    if (
        batch.size
        and tokens.size
        and not (min(batch.min(), tokens.min()) >= 1 and max(batch.max(), tokens.max()) <= MOST)
    ):
        raise ValueError(f"batch and context: allowed are 1 to {MOST:,}")
    roofline = Roofline(model, hardware, serving)
    parts = _decode_parts(roofline, method, batch, tokens, numpy.maximum)
    value = sum(parts.values(), numpy.zeros(numpy.broadcast_shapes(batch.shape, tokens.shape)))
    return value, value * roofline.decode_band[0], value * roofline.decode_band[1]


def prefill(
    model: Model,
    hardware: Hardware,
    batch_size: int,
    num_tokens: int,
    serving: Serving = DEFAULT,
    *,
    cached_tokens: int = 0,
    method: Method | None = None,
) -> Step:
    """The prefill of ``batch_size`` prompts of ``num_tokens`` tokens, the first ``cached_tokens`` of each at hand.

    ``method``: what stores their keys and values, where that is to be counted.

    Raises ``ValueError`` where the card's arithmetic or bandwidth or the model's number of weights is not known.
    """
    _positive(batch_size=batch_size, num_tokens=num_tokens, tensor_parallel=serving.tensor_parallel)
    _check_cached(cached_tokens, num_tokens)
    roofline = Roofline(model, hardware, serving)
    parts = _prefill_parts(roofline, batch_size, num_tokens, num_tokens - cached_tokens, method)
    return as_step(parts, roofline.fixed.prefill_band)


def running(
    model: Model,
    method: Method,
    hardware: Hardware,
    batch_size: int,
    input_len: int,
    output_len: int,
    serving: Serving = DEFAULT,
) -> float:
    """Of ``batch_size`` requests in flight, how many the engine's share of the memory can hold at once (mean context).

    At least 1 (whether that one fits is another question); all of them where the card's memory is not known.
    """
    if hardware.memory_nbytes is None:
        return float(batch_size)
    fixed, model = serving.constants, serving.held(model)
    context, weights = _mean_context(input_len, output_len), weight_nbytes(model, serving.weight_bits)
    for share in (fixed.memory_share.get(serving.engine_name, fixed.memory_share[IDEAL.name]), MOST_SHARE):
        room = serving.tensor_parallel * (share * hardware.memory_nbytes - fixed.reserve_nbytes) - weights
        if room > 0:
            break
    states = sum(buffer.nbytes for layer in model.state_layers for buffer in layer.buffers(1))
    each = cache_nbytes(model, method, 1, context) + states
    return min(float(batch_size), max(1.0, room / each)) if each else float(batch_size)


def token_step(
    model: Model,
    method: Method,
    hardware: Hardware,
    batch_size: int,
    input_len: int,
    output_len: int,
    serving: Serving = DEFAULT,
    *,
    cached_tokens: int = 0,
    num_running: float | None = None,
) -> Step:
    """Time per output token of a server that keeps ``batch_size`` requests of these lengths in flight.

    The decode step of the requests that are :func:`running` at the mean context, ``input_len + output_len / 2``, and
    the prompts that arrive meanwhile, ``(running - 1) / output_len`` a step.  ``num_running``: how many run at once,
    where that is known.
    """
    _positive(
        batch_size=batch_size, input_len=input_len, output_len=output_len, tensor_parallel=serving.tensor_parallel
    )
    _check_cached(cached_tokens, input_len)
    roofline = Roofline(model, hardware, serving)
    held = num_running or running(model, method, hardware, batch_size, input_len, output_len, serving)
    parts = token_parts(roofline, method, held, input_len, output_len, input_len - cached_tokens)
    return as_step(parts, roofline.decode_band)


def token_parts(
    roofline: Roofline,
    method: Method,
    held: Any,
    input_len: Any,
    output_len: Any,
    new: Any,
    maximum: Any = max,
    attention: tuple[Any, Any] | None = None,
    prompt_attention: Any = None,
) -> dict[str, Any]:
    """Seconds by part of :func:`token_step` with ``held`` requests running, ``new`` tokens of a prompt not at hand.

    Numbers, or arrays that broadcast together with ``maximum`` as ``numpy.maximum`` and both attentions given.
    """
    context = _mean_context(input_len, output_len)
    parts = _decode_parts(roofline, method, held, context, maximum, attention)
    if roofline.hardware.fp16_flops:
        if prompt_attention is None:
            prompt_attention = roofline.prompt_attention(input_len, new)
        parts["prefill"] = _arrivals(roofline, held, output_len, new, prompt_attention, maximum)
    return parts


def _arrivals(
    roofline: Roofline, held: Any, output_len: Any, new: Any, prompt_attention: Any, maximum: Any = max
) -> Any:
    """Seconds that the prompts of other requests add to a step, in the mean over the steps.

    While a request writes ``output_len`` tokens, each of the others is replaced once: ``(held - 1) / output_len``
    prompts a step.  A step that carries some of them takes what their tokens add to its stream, products and
    all-reduces; an engine of ``prompt_steps`` runs them in a step of their own.
    """
    fixed = roofline.fixed
    prompts, chunks = maximum(0.0, held - 1) / output_len, roofline.chunks(new, maximum)
    carrying = -maximum(-1.0, -(prompts * chunks))  # share of the steps that carry a prompt, or a piece of one
    share = maximum(prompts, 1 / chunks)  # of a prompt, in such a step
    tokens = share * new
    waits = fixed.prompt_steps.get(roofline.engine)
    beside = held if waits is None else 0.0 * held
    seconds = sum(roofline.work(beside + tokens, beside + share, maximum)) + share * prompt_attention
    seconds = seconds + roofline.all_reduces(beside + tokens) + roofline.exchanges(tokens, prompt=True)
    if waits is None:
        seconds = seconds - sum(roofline.work(held, held, maximum)) - roofline.all_reduces(held)
    else:
        seconds = waits * (seconds + roofline.block_seconds)
    return carrying * maximum(0.0, seconds)


def first_token(
    model: Model,
    method: Method,
    hardware: Hardware,
    batch_size: int,
    input_len: int,
    output_len: int,
    serving: Serving = DEFAULT,
    *,
    cached_tokens: int = 0,
    num_running: float | None = None,
) -> Step:
    """Time to the first token on the server of :func:`token_step`.

    The prefill of the prompt, a constant share of a prefill for each further request in flight, and where the
    memory does not hold them all, the wait for a place: ``(batch_size / running - 1)`` whole answers.
    """
    load = (model, method, hardware, batch_size, input_len, output_len, serving)
    held = num_running or running(*load)
    step = token_step(*load, cached_tokens=cached_tokens, num_running=held)
    roofline = Roofline(model, hardware, serving)
    fixed = roofline.fixed
    parts = _prefill_parts(roofline, 1, input_len, input_len - cached_tokens, method)
    own = sum(parts.values()) - fixed.prefill_seconds
    parts["queue"] = fixed.prefill_queue * (batch_size - 1) * own
    parts["queue"] += (batch_size / held - 1) * output_len * step.seconds.value
    return as_step(parts, fixed.prefill_band)


def timed_engines() -> tuple[str, ...]:
    """The engines whose published loads the model of time was fitted on."""
    return tuple(name for name in constants().routed_efficiency if name != IDEAL.name)


def was_timed(engine: str) -> bool:
    """Whether anything of this engine was measured; the times of another are those of the engines that were."""
    fixed = constants()
    if engine in fixed.estimated:
        return False
    return engine == IDEAL.name or engine in {
        name.partition("/")[0] for name in (*fixed.kernels, *fixed.engine_layer_seconds)
    }


def as_step(parts: dict[str, Any], band: tuple[float, float]) -> Step:
    """``parts`` added up, with their band and the largest of them."""
    values = {name: float(value) for name, value in parts.items()}
    seconds = sum(values.values())
    return Step(Band(seconds, seconds * band[0], seconds * band[1]), values, max(values, key=lambda name: values[name]))


def _decode_parts(
    roofline: Roofline,
    method: Method,
    batch_size: Any,
    num_tokens: Any,
    maximum: Any = max,
    attention: tuple[Any, Any] | None = None,
) -> dict[str, Any]:
    weights, widen, compute = roofline.work(batch_size, batch_size, maximum)
    stream, unpack = attention or roofline.attention(method, batch_size, num_tokens, maximum)
    parts = {
        "weights": weights,
        "compute": compute,
        "kv": stream + roofline.states(batch_size) + roofline.copies(method, batch_size, num_tokens),
        "dequantize": widen + unpack,
        "overhead": roofline.overhead(method) + roofline.wide(batch_size) + roofline.sequences(batch_size),
        "communication": roofline.communication(batch_size),
    }
    if roofline.engine in roofline.fixed.host_launched:  # the card works while the host launches what follows
        device = sum(seconds for name, seconds in parts.items() if name != "overhead")
        parts["overhead"] = maximum(parts["overhead"] - device, 0.0 * device)
    return parts


def _prefill_parts(
    roofline: Roofline, batch_size: int, num_tokens: int, new: int, method: Method | None = None
) -> dict[str, Any]:
    chunks = roofline.chunks(batch_size * new)
    share = roofline.pipelined(chunks)
    compute, stream = roofline.prompt(batch_size, num_tokens, new)
    compute, stream, fixed = compute * share, stream * share, roofline.fixed
    launches = fixed.engine_prompt_seconds.get(roofline.engine)
    overhead = fixed.prefill_seconds + chunks * roofline.block_seconds
    if launches is not None:  # one forward of the model, launched while the card works; no server before it
        overhead = max(0.0, launches * roofline.model.num_blocks - max(compute, stream))
    return {
        "weights": stream,
        "compute": max(0.0, compute - stream),
        "kv": 0.0 if method is None or new < num_tokens else roofline.ordering(method),
        "overhead": overhead,
        "communication": roofline.communication(batch_size * new, prompt=True),
    }


def _mean_context(input_len: int, output_len: int) -> int:
    return input_len + output_len // 2


def _check_cached(cached_tokens: int, num_tokens: int) -> None:
    if not 0 <= cached_tokens < num_tokens:
        raise ValueError(f"cached tokens {cached_tokens}: allowed are 0 to {num_tokens - 1}")


def _positive(**numbers: float) -> None:
    for name, value in numbers.items():
        if not 1 <= value <= MOST:
            given = f"{value:.3g}" if isinstance(value, float) else str(value)[:40]
            raise ValueError(f"{name.replace('_', ' ')} {given}: allowed are 1 to {MOST:,}")
