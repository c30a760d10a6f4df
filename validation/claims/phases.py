"""kvsim's bytes for a figure of ``memory by phase``: what the allocator holds now, and held at the most, in a phase.

A figure names its model, method, phase and how many tokens the buffers provide for; nothing else is known of the run.
``now`` is weights and cache, and where a step was captured in a CUDA graph the ``workspace`` that its stream takes, as
another stream was seen to take it; ``peak`` has the tensors of :mod:`validation.claims.transients` besides.
"""

from __future__ import annotations

from typing import Any

from kvsim.engines import make_engine
from kvsim.engines.kvruntime import stored_shape
from kvsim.hardware import find_hardware
from kvsim.layout import DTYPE_BITS, LayerShape, Method, nbytes, shared_buffers
from kvsim.memory.capacity import largest_batch, room
from kvsim.memory.sharding import Deployment
from kvsim.models.load import load_model
from kvsim.models.model import Model
from validation.claims.subjects import rebuild_method
from validation.claims.transients import of, prefill, transient

Figure = dict[str, Any]

RESERVE, FIRST_RESERVE = 0.03, 0.02
"""Share of a card's memory that is held back for activations, graphs and the driver where the largest batch is asked
for: ``--reserve``; and in records that do not say."""
WITHIN = 0.01
"""Largest relative error of a phase's current or peak bytes on a GPU."""
QUEUE = 64 << 20
"""Bytes of keys and values that are stored as soon as so many wait: a pin."""
CHUNKS = 4
"""Pieces in which a prompt is read: a pin."""
GROW = 256
"""Tokens a row by which a cache grows: a pin."""


def predicted(figure: Figure, model: Model | None = None) -> float:
    """Bytes.  Raises ``ValueError`` for an unknown phase."""
    model = model or load_model(figure["model"])
    size = weights(figure, model)
    if figure["phase"] == "load":  # a head is made before it is tied to the embedding
        tied = model.weights is not None and not model.weights.head and figure["what"] == "peak"
        return size + tied * model.weights.embedding * DTYPE_BITS[figure["dtype"]] / 8  # type: ignore[union-attr]
    method = rebuild_method(figure["method"])
    layers = [stored_shape(method, layer) for layer in model.cache_layers]
    size += figure.get("workspace", 0)
    if figure["phase"] == "prefill" and figure["what"] == "peak":
        size += filling(figure, model, method, layers)
        return size + sum(transient(figure, model, method, layers[0]))
    size += held(method, layers, figure["batch_size"], figure["provided"])
    if figure["what"] == "now":
        return size
    return size + beside(figure, model, method, layers[0])


def own(figure: Figure) -> float:
    """The measured bytes without those that the cache says its steps count, check and work in."""
    return float(figure["measured"] - figure.get("step_nbytes", 0))


def weights(figure: Figure, model: Model) -> float:
    """Bytes of the model's parameters.  Raises ``ValueError`` where their number is not known."""
    if model.weights is None:
        raise ValueError(f"model {model.name}: its number of weights is not known")
    return model.weights.total * DTYPE_BITS[figure["dtype"]] / 8


def held(method: Method, layers: list[LayerShape], batch_size: int, provided: int) -> int:
    """Bytes of the cache with ``provided`` tokens a row."""
    own = sum(nbytes(method.buffers(layer, batch_size, provided)) for layer in layers)
    return own + nbytes(shared_buffers(method, layers))


def beside(figure: Figure, model: Model, method: Method, layer: LayerShape) -> int:
    """Bytes of the tensors that are there only at the worst moment of the phase."""
    phase, batch_size, provided = figure["phase"], figure["batch_size"], figure["provided"]
    if phase in ("prefill", "reuse", "chunked prefill"):
        first = sum(transient(figure | {"phase": "prefill"}, model, method, layer)) + queued(figure, model, layer)
        later = chunked(figure, model, method, layer) if phase == "chunked prefill" else 0
        return max(first, later)
    step = sum(transient(figure | {"phase": "decode"}, model, method, layer))
    if phase == "decode":
        return step
    if phase == "growth":  # the largest tensor that is still there while it is copied into a larger one
        before, after = (method.buffers(layer, batch_size, count) for count in (provided - GROW, provided))
        pairs = zip(before, after, strict=True)
        return max(step, max((old.nbytes for old, new in pairs if old.shape != new.shape), default=0))
    if phase == "beams":  # each tensor's rows are picked into a new one
        return max(step, max(buffer.nbytes for buffer in method.buffers(layer, batch_size, provided)))
    raise ValueError(f"phase {phase!r}: allowed are load, prefill, chunked prefill, decode, beams, growth and reuse")


def chunked(figure: Figure, model: Model, method: Method, layer: LayerShape) -> int:
    """Bytes of the last chunk's attention over what is stored, beside what storing it takes; 0 of a method whose
    kernels attend without tensors of their own."""
    chunk = getattr(of(method), "chunk", None)
    if chunk is None or figure["device"] == "cpu":
        return 0
    stored = (CHUNKS - 1) * figure["prompt_tokens"]
    storing = prefill(figure, model, method, layer)[1]
    return sum(storing) + sum(chunk(figure, model, layer, stored))


def resident_nbytes(figure: Figure) -> int:
    """Bytes of ``layers`` filled layers of a model, made for ``num_tokens`` tokens."""
    layer, method = load_model(figure["model"]).cache_layers[0], rebuild_method(figure["method"])
    return figure["layers"] * nbytes(method.buffers(layer, 1, figure["num_tokens"]))


def filling(figure: Figure, model: Model, method: Method, layers: list[LayerShape]) -> int:
    """The most bytes of the cache and of what waits to be stored while a cache's first prompt is read: a layer's
    buffers are made when the prompt comes to it."""
    made = [held(method, layers[:count], figure["batch_size"], figure["provided"]) for count in range(len(layers) + 1)]
    each, together = waiting(figure, model, layers[0])
    return max(made[count] + count % together * each for count in range(1, len(made)))


def queued(figure: Figure, model: Model, layer: LayerShape) -> int:
    """The most bytes of a prompt's keys and values that wait, beside a layer's forward, to be stored together."""
    each, together = waiting(figure, model, layer)
    return min(len(model.cache_layers), together - 1) * each


def waiting(figure: Figure, model: Model, layer: LayerShape) -> tuple[int, int]:
    """Bytes of a layer's keys and values that wait on a GPU, of GPT-2 with their queries, which they are views of; and
    of how many layers they are stored together.  On a CPU none waits."""
    if figure["device"] == "cpu":
        return 0, 1
    tokens = figure["batch_size"] * figure["prompt_tokens"] * DTYPE_BITS[figure["dtype"]] // 8
    each = tokens * layer.num_kv_heads * (layer.key_dim + layer.value_dim)
    fused = model.weights is not None and model.weights.lookup > 0  # one product for queries, keys and values
    return int(3 * model.hidden_size * tokens if fused else each), -(-QUEUE // each)


def judged(row: dict[str, Any]) -> dict[str, Any]:
    """A recorded row of ``memory by phase`` by today's predictions: what was measured stands, ``holds`` and ``found``
    are this checkout's.  Other rows, and those of a model that was made for the run, as they are."""
    figures = row.get("figures", ())
    if row["run"] != "memory by phase" or not figures or any(figure["model"] == "tiny" for figure in figures):
        return row
    groups: dict[str, list[tuple[float, Figure]]] = {}
    for figure in figures:
        error = own(figure) / predicted(figure) - 1
        name = figure.get("method", {}).get("name", "load")
        groups.setdefault(f"{figure['model']} {name}", []).append((error, figure))
    said, fails = [], False
    for name, errors in groups.items():
        worst, figure = max(errors, key=lambda each: abs(each[0]))
        wrong = abs(worst) > WITHIN
        fails |= wrong
        verdict = "FAILS, " * wrong + f"{len(errors)} figures"
        said.append(f"{name}: {verdict}, worst {worst:+.3%} ({figure['phase']}, {figure['what']})")
    return row | {"holds": not fails, "found": "; ".join(said)}


def planned(model: Model, card: str, method: Method, num_tokens: int, reserve: float = RESERVE) -> int:
    """Rows of ``num_tokens`` tokens that ``kvsim plan --engine kvruntime --reserve`` says fit beside the weights.

    Raises ``LookupError`` for a card that kvsim does not know.
    """
    there = room(model, find_hardware(card), reserve=reserve).cache_nbytes
    engine = make_engine("kvruntime", max_seq_len=num_tokens)
    return largest_batch(Deployment(model, method, engine), num_tokens, there) or 0
