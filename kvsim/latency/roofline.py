"""What one step over a model's layers takes, part by part, from bytes, operations and a few constants.

Every function takes numbers, or numpy arrays that broadcast together with ``maximum`` as ``numpy.maximum``.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from math import log2
from typing import Any

from kvsim.engines import ENGINES, IDEAL, Engine, make_engine
from kvsim.hardware import Hardware
from kvsim.latency.attention_curve import DEFAULT_SMS, Kernel, streamed
from kvsim.latency.constants import Constants, constants
from kvsim.latency.exchange import (
    LINK_EFFICIENCY,
    NETWORK_BANDWIDTH,
    NETWORK_EFFICIENCY,
    Wires,
    context_merge,
    dispatch_combine,
    pipeline_sends,
)
from kvsim.layout import LayerShape, Method, mean_read_nbytes, part_kind
from kvsim.memory.sharding import SINGLE, Sharding
from kvsim.methods.by_layer import placed
from kvsim.models.model import Model
from kvsim.models.parameters import Weights
from kvsim.models.weight_storage import check_weight_bits, known_weights, weight_storage
from kvsim.vectorize import VectorFormula

PROMPT_WIDTH = 128 + 64 + 128
"""Channels that a query head multiplies with an entry of a latent's prompt, for which engines make keys and values of
their own: qk_nope_head_dim + qk_rope_head_dim + v_head_dim of DeepSeek and Kimi (a decode step absorbs them)."""

LANE_OPS = 128 * 1.7e9
"""Vector operations a second of one multiprocessor: 128 lanes at 1.7 GHz (an H100 SXM's)."""

FLOAT4_BITS = 4.25
"""Bits a weight from which 4-bit ones are floats, with a scale for 32 or 16 of them, that some cards multiply; below
are integers (AWQ, GPTQ, int4: a scale for 128), which every card unpacks."""


SPLIT_AS = {"kvruntime": "kvruntime:generate"}
"""Whose times an engine has where cards share every layer: ``kvruntime.Engine``'s fused kernels take whole models, so a
split one's own modules run, in one graph, as they do under ``generate()``."""


@dataclass(frozen=True)
class Serving:
    """How a model is served: what the times of a step depend on beside model, method, card and load.

    ``weight_bits``: bits a weight (``None``: the model's own, else 16).  ``tensor_parallel``: cards that share every
    layer.  ``engine``: whose windows and attention kernel are taken; ``ideal``, or one that was not measured, takes the
    mean of those that were.  It may be given by name, with its defaults.  ``profile``: constants in place of the stated
    ones.  ``sharding``: every size, where cards share more than layers (``tensor_parallel`` is then its own).  Raises
    ``ValueError`` for bits that cannot be and for an engine that the profile was not measured with.
    """

    weight_bits: float | None = None
    tensor_parallel: int = 1
    engine: Engine | str = IDEAL
    profile: Constants | None = None
    sharding: Sharding = SINGLE

    def __post_init__(self) -> None:
        if self.sharding != SINGLE:
            object.__setattr__(self, "tensor_parallel", self.sharding.tensor_parallel_size)
        check_weight_bits(self.weight_bits, "weight bits")
        if isinstance(self.engine, str) and self.engine in ENGINES:
            object.__setattr__(self, "engine", make_engine(self.engine))
        name = self.timed_as
        whole = self.engine if isinstance(self.engine, str) else self.engine.timed_as
        split = "" if name == whole else f", whose times {whole} has where cards share every layer"
        self.constants.check_engine(name, split)

    @property
    def constants(self) -> Constants:
        """The profile's, else those stated."""
        return self.profile or constants()

    @property
    def engine_name(self) -> str:
        return self.engine if isinstance(self.engine, str) else self.engine.name

    @property
    def timed_as(self) -> str:
        """The name under which the constants have this engine's times, of a model split as this one is."""
        name = self.engine if isinstance(self.engine, str) else self.engine.timed_as
        return SPLIT_AS.get(name, name) if self.tensor_parallel > 1 else name

    def held(self, model: Model) -> Model:
        """``model`` with the windows that the engine applies."""
        return model if isinstance(self.engine, str) else self.engine.held(model)

    def stored(self, model: Model, method: Method) -> Method:
        """How the engine stores ``model`` under ``method``."""
        return method if isinstance(self.engine, str) else self.engine.stored(model, method)


class Roofline:
    """One model on one card, or on several that share every layer, as ``serving`` says.

    ``model`` has the windows that the engine applies.  A step's tokens are those of one replica (data parallel) and
    of one batch in the pipeline.
    """

    def __init__(self, model: Model, hardware: Hardware, serving: Serving | None = None) -> None:
        serving = serving or Serving()
        self.model, self.hardware, self.serving = serving.held(model), hardware, serving
        self.fixed, self.engine = serving.constants, serving.timed_as
        self.weight_bits, self.ranks = serving.weight_bits, serving.tensor_parallel
        self.sharding = serving.sharding
        link = hardware.link_bandwidth and LINK_EFFICIENCY * hardware.link_bandwidth / 2
        self.wires = Wires(link, hardware.host_cards)

    @property
    def bandwidth(self) -> float:
        """Bytes a second of one card's memory.  Raises ``ValueError`` where it is not known."""
        if not self.hardware.bandwidth:
            raise ValueError(f"{self.hardware.id}: its memory bandwidth is not known, no time without it")
        return self.hardware.bandwidth

    @property
    def sharing(self) -> int:
        """Replicas that share the routed experts, each with tokens of its own; 1 in a model without."""
        mixture = self.model.weights is not None and self.model.weights.routed
        return self.sharding.expert_ranks // self.sharding.tensor_parallel_size if mixture else 1

    @property
    def lanes(self) -> float:
        """Vector operations a second of one card."""
        return (self.hardware.num_sms or DEFAULT_SMS) * LANE_OPS

    @property
    def block_seconds(self) -> float:
        """Seconds of a step that its blocks cost besides bytes and arithmetic."""
        fixed, model = self.fixed, self.model
        if self.engine in fixed.engine_layer_seconds:
            each = fixed.engine_layer_seconds[self.engine]
            each *= self.table_share
            return each * self.blocks + fixed.engine_step_seconds.get(self.engine, 0.0)
        each = fixed.layer_seconds
        each += fixed.expert_layer_seconds if known_weights(model).routed else 0.0
        each += fixed.narrow_layer_seconds if weight_storage(model, self.weight_bits).dense <= 8.5 else 0.0
        latent = sum(layer.kind == "mla" for layer in model.cache_layers)
        total = each * model.num_blocks + fixed.latent_layer_seconds * latent
        total += fixed.state_layer_seconds * len(model.state_layers)
        return total + fixed.index_layer_seconds * len(model.index_layers)

    @property
    def blocks(self) -> float:
        """The model's blocks, each counted as often as it takes a full layer's seconds of the engine."""
        shares, model = self.fixed.engine_layer_shares.get(self.engine, {}), self.model
        windows = sum(layer.window is not None for layer in model.cache_layers)
        more = (shares.get("state", 1.0) - 1) * len(model.state_layers) + (shares.get("window", 1.0) - 1) * windows
        return model.num_blocks + more + shares.get("norm", 0.0) * model.more_norms

    @property
    def table_share(self) -> float:
        """Of a layer's launches those that it has in this model: fewer where positions are a table."""
        weights = known_weights(self.model)
        has_table = 0 < weights.lookup < weights.embedding  # of positions, which are fewer than words
        return self.fixed.engine_table_share.get(self.engine, 1.0) if has_table else 1.0

    @property
    def weight_efficiency(self) -> float:
        """Share of the bandwidth at which the weights stream that every step reads."""
        own = self.fixed.overlapped.get(self.engine)
        return own["weight_efficiency"] if own else self.fixed.weight_efficiency

    def weights(self, num_tokens: Any) -> tuple[Any, Any]:
        """Seconds of the weight stream of a step over ``num_tokens`` tokens, and of unpacking what a card cannot
        multiply as stored."""
        weights, bits = known_weights(self.model), weight_storage(self.model, self.weight_bits)
        head = weights.head or weights.embedding
        own = self.engine in self.fixed.overlapped
        spread = 1.0 if own else self.fixed.routing_spread
        share = hit_share(weights, num_tokens * self.sharing, spread) / self.sharing
        nbytes = (weights.dense * bits.dense + head * bits.head) / 8
        routed = weights.routed * share * bits.routed / 8
        codes = weights.dense * self._unpacked(bits.dense) + weights.routed * share * self._unpacked(bits.routed)
        stream = nbytes / self.weight_efficiency + routed / (
            self.weight_efficiency if own else self.fixed.expert_efficiency
        )
        stream = stream / self.bandwidth / self.ranks
        ops = self.fixed.overlapped[self.engine].get("weight_ops", 0.0) if own else 0.0
        if ops:  # the lanes multiply what comes: a card with more bandwidth has no more of them
            few = num_tokens <= self.fixed.engine_wide.get(self.engine, {}).get("rows", 0)  # more take matrix units
            multiplied = (weights.dense + head + weights.routed * share) * ops / self.lanes / self.ranks
            stream = streamed(stream, multiplied * few)
        return stream, self.fixed.vector_ops * codes / self.lanes / self.ranks

    def products(self, num_tokens: Any, num_logits: Any) -> Any:
        """Seconds of the matrix products of ``num_tokens`` tokens, the head for ``num_logits`` of them; 0 where the
        card's arithmetic is not known."""
        weights, bits = known_weights(self.model), weight_storage(self.model, self.weight_bits)
        dense, routed, half = self._flops(bits.dense), self._flops(bits.routed), self._flops(16)
        if dense is None or routed is None or half is None:
            return 0.0 * num_tokens
        chosen: float = weights.routed
        if weights.num_experts:
            chosen = chosen * min(1.0, weights.experts_per_token / weights.num_experts)
        own, shares = self.fixed.overlapped.get(self.engine), self.fixed.routed_efficiency
        efficiency = own["prefill_efficiency"] if own else self.fixed.prefill_efficiency
        alike = own or self.sharing > 1  # whole experts, all replicas' tokens: as dense products
        experts = efficiency if alike else shares.get(self.engine, shares[IDEAL.name])
        each_token = 2 * (weights.dense / dense / efficiency + chosen / routed / experts)
        head = 2 * (weights.head or weights.embedding) / half / efficiency
        return (each_token * num_tokens + head * num_logits) / self.ranks

    def work(self, num_tokens: Any, num_logits: Any, maximum: Any = max) -> tuple[Any, Any, Any]:
        """Seconds of a step's matrix products: the weight stream, unpacking, and the arithmetic beside both.

        Engines of ``overlapped`` hide the arithmetic behind the stream; with the others' kernels, whose tiles a
        decode step does not fill, it was found to add up."""
        stream, widen = self.weights(num_tokens)
        return stream, widen, self.beside(stream + widen, self.products(num_tokens, num_logits), maximum)

    def beside(self, stream: Any, compute: Any, maximum: Any = max) -> Any:
        """Of the seconds of arithmetic those that a step takes beside its stream."""
        return maximum(0.0, compute - stream) if self.engine in self.fixed.overlapped else compute

    def attention(self, method: Method, batch_size: Any, num_tokens: Any, maximum: Any = max) -> tuple[Any, Any]:
        """Seconds of a decode step's attention over all layers, and of unpacking codes beyond it."""
        if self.sharding.context_ranks > 1:  # each card attends over its share of the tokens
            num_tokens = -(-num_tokens // self.sharding.context_ranks)
        total: Any = 0.0
        beyond: Any = 0.0
        for (layer, chosen), count in placed(self.serving.stored(self.model, method), self.model.cache_layers).items():
            seconds, unpack = self.layer_attention(chosen, layer, batch_size, num_tokens, maximum)
            total, beyond = total + count * seconds, beyond + count * unpack
        return total, beyond

    def copies(self, method: Method, batch_size: Any, num_tokens: Any) -> Any:
        """Seconds of copying the cache before attention reads it: each copy is written and read again."""
        what, total = self.fixed.engine_copies.get(self.engine), 0.0
        if what is None:
            return 0.0 * batch_size * num_tokens
        for layer, count in Counter(self.model.cache_layers).items():
            shared = self.model.num_q_heads // layer.num_kv_heads
            times = 1 if what == "cache" else shared if shared > 1 else 0
            total = total + count * 2 * times * read_nbytes(method, layer, num_tokens) * batch_size
        return total / self.ranks / (self.weight_efficiency * self.bandwidth)

    def pairs(self, num_queries: Any, num_tokens: Any) -> Any:
        """Seconds of the attention's arithmetic alone, over all layers: so many queries and what each of them sees; 0
        where the card's arithmetic is not known."""
        half = self._flops(16)
        if half is None:
            return 0.0
        seen = sum(
            count * entries(layer, num_tokens) * _width(layer)
            for layer, count in Counter(self.model.cache_layers).items()
            if layer.kind != "indexer"
        )
        rank = self.model.num_q_heads / self.ranks / self.sharding.prefill_context_parallel_size
        return 2 * num_queries * seen * rank / (self.fixed.attention_efficiency * half)

    def layer_attention(
        self,
        method: Method,
        layer: LayerShape,
        batch_size: Any,
        num_tokens: Any,
        maximum: Any = max,
        *,
        warm: bool = False,
    ) -> tuple[Any, Any]:
        """One layer's attention, and its unpacking beyond that.  ``warm``: the same cache is read again and again."""
        q_per_kv = max(1, self.model.num_q_heads // layer.num_kv_heads)
        kernel, packed = find_kernel(self.fixed, method, layer, self.engine, q_per_kv)
        own = packed and kernel.code_ops > 0
        kv_heads = max(1.0, layer.num_kv_heads / self.ranks)
        items = batch_size * kv_heads * (q_per_kv if kernel.item_is == "query_head" else 1)
        held = entries(layer, num_tokens, maximum)
        nbytes = read_nbytes(method, layer, num_tokens) * batch_size * (kv_heads / layer.num_kv_heads)
        stream = nbytes / (kernel.efficiency * self.bandwidth)
        if warm:
            stream = stream * self.fixed.curve.miss(nbytes, self.hardware.l2_nbytes)
        codes = held * batch_size * kv_heads * (layer.key_dim + layer.value_dim)
        if own:
            a_code = kernel.code_ops + kernel.scale_ops * scales_a_code(method, layer)
            stream = streamed(stream, codes * a_code / self.lanes)
        half = self._flops(16)
        if half is not None and layer.kind != "indexer":
            pairs = held * batch_size * (self.model.num_q_heads / self.ranks)
            pairs = pairs * self.sharding.decode_context_parallel_size  # for the queries of all that share the tokens
            stream = maximum(stream, 2 * pairs * _width(layer) / (self.fixed.attention_efficiency * half))
        values = layer.value_dim * (1 if kernel.item_is == "query_head" else q_per_kv)
        seconds = self.fixed.curve.seconds(kernel, items, held, stream, self.hardware.num_sms, maximum, values)
        if own or not packed:
            return seconds, 0.0
        return seconds, maximum(0.0, codes * self.fixed.vector_ops / self.lanes - seconds)

    def wide(self, batch_size: Any) -> Any:
        """Seconds that a step of so many rows takes more than one of few."""
        more = self.fixed.engine_wide.get(self.engine)
        if more is None:
            return 0.0
        a_row = more.get("row_seconds", 0.0) + more.get("channel_seconds", 0.0) * self.model.hidden_size
        each = more["layer_seconds"] + a_row * batch_size
        return (batch_size > more["rows"]) * (each * self.model.num_blocks)  # of a bool, or an array

    def overhead(self, method: Method) -> float:
        """Seconds of a decode step that neither bytes nor arithmetic explain: those of its blocks, and more where
        a layer's new keys and values and its query are quantized."""
        total = self.block_seconds
        for (layer, chosen), count in placed(self.serving.stored(self.model, method), self.model.cache_layers).items():
            # every method is frozen
            names = kernel_names(method_width(chosen, layer), self.engine.partition(":")[0])  # type: ignore[arg-type]
            total += count * next(
                (self.fixed.quantize_seconds[n] for n in names if n in self.fixed.quantize_seconds), 0.0
            )
        return total

    def sequences(self, batch_size: Any) -> Any:
        """Seconds that the engine's host takes for the sequences of a step: scheduling, sampling, detokenizing."""
        own = self.engine in self.fixed.engine_layer_seconds
        return 0.0 if own else self.fixed.sequence_seconds * batch_size

    def states(self, batch_size: Any) -> Any:
        """Seconds to read and write the constant states of the layers that have one, as often as the engine does."""
        nbytes = sum(buffer.nbytes for layer in self.model.state_layers for buffer in layer.buffers(1))
        passes = 2 * self.fixed.engine_state_passes.get(self.engine, 1.0)
        return passes * nbytes * batch_size / self.ranks / (self.weight_efficiency * self.bandwidth)

    def communication(self, num_tokens: Any, prompt: bool = False) -> Any:
        """Two all-reduces a layer of the 16-bit hidden states: a ring over each link's one direction, or over the
        network where the ring leaves a host.  And what :mod:`kvsim.latency.exchange` has."""
        return self.all_reduces(num_tokens) + self.exchanges(num_tokens, prompt)

    def all_reduces(self, num_tokens: Any) -> Any:
        """Seconds of tensor parallel's all-reduces."""
        if self.ranks == 1:
            return 0.0
        if not self.hardware.link_bandwidth:
            raise ValueError(f"{self.hardware.id}: the bandwidth between cards is not known, no tensor parallelism")
        nbytes = 2 * num_tokens * self.model.hidden_size
        ring = 2 * (self.ranks - 1) / self.ranks * nbytes
        far = self.ranks > self.wires.host_cards
        own = self.fixed.engine_link.get(self.engine.partition(":")[0], {})
        near = own.get("efficiency", self.fixed.link_efficiency) * self.hardware.link_bandwidth / 2
        ring = ring / (NETWORK_EFFICIENCY * NETWORK_BANDWIDTH if far else near)
        short = own.get("seconds", self.fixed.link_seconds) * log2(2 * self.ranks)
        return 2 * self.model.num_blocks * (short + ring)

    def exchanges(self, num_tokens: Any, prompt: bool = False) -> Any:
        """Seconds of sending tokens to experts on other replicas' cards, queries to those that share their tokens,
        hidden states to the next stage; ``num_tokens`` of one replica, of ``prompt``s or decoded."""
        total: Any = 0.0
        sizes, weights, hidden = self.sharding, self.model.weights, self.model.hidden_size
        if self.sharing > 1 and weights is not None:
            element = 1 if weight_storage(self.model, self.weight_bits).routed <= 8.5 else 2
            chosen, a_card = weights.experts_per_token, num_tokens / self.ranks
            layer = dispatch_combine(self.wires, sizes.expert_ranks, a_card, hidden, chosen, element, prompt)
            total = total + self.model.num_blocks * layer
        if sizes.decode_context_parallel_size > 1 and not prompt:
            for layer, count in Counter(self.model.cache_layers).items():
                channels = self.model.num_q_heads // self.ranks * layer.key_dim
                total += count * context_merge(self.wires, sizes.decode_context_parallel_size, num_tokens, channels)
        if sizes.pipeline_parallel_size > 1:
            total += pipeline_sends(self.wires, sizes.pipeline_parallel_size, self.ranks, num_tokens, hidden)
        return total

    def prompt_attention(self, num_tokens: int, new: int) -> float:
        """Seconds of the attention of a prompt's last ``new`` tokens.

        Engines of ``engine_masked_efficiency`` hide what has left a window by a mask: every pair is multiplied."""
        half = self._flops(16)
        if half is None:
            raise ValueError(f"{self.hardware.id}: its arithmetic (FLOP/s) is not known, no prefill time")
        masked, total = self.fixed.engine_masked_efficiency.get(self.engine), 0.0
        for layer, count in Counter(self.model.cache_layers).items():
            width = count * (PROMPT_WIDTH if layer.kind == "mla" else _width(layer))
            if masked and layer.window is not None and layer.window < num_tokens:
                total += width * num_tokens * new / masked
            else:
                total += width * seen(layer, num_tokens, new) / self.fixed.attention_efficiency
        return 2 * total * self.model.num_q_heads / half / self.ranks

    def ordering(self, method: Method) -> float:
        """Seconds that prompts take more where ``method`` stores key channels in an order that they tell."""
        chosen = placed(self.serving.stored(self.model, method), self.model.cache_layers).items()
        ordered = sum(count for (_, own), count in chosen if getattr(own, "boost_nbits", 0))
        return ordered * self.fixed.engine_order_seconds.get(self.engine, 0.0)

    def prompt(self, num_prompts: Any, num_tokens: int, new: int) -> tuple[float, float]:
        """Seconds of the arithmetic and of the weight stream of ``num_prompts`` prompts' last ``new`` tokens, alone."""
        compute = self.products(num_prompts * new, num_prompts) + num_prompts * self.prompt_attention(num_tokens, new)
        passes = self.fixed.engine_prompt_passes.get(self.engine, 0.0)
        norms = self.fixed.engine_prompt_norms.get(self.engine, 0.0) * self.model.more_norms
        states = num_prompts * new * (self.model.num_blocks + norms) * self.model.hidden_size * 2
        compute = (compute + passes * states / self.bandwidth) / self.sharding.prefill_context_parallel_size
        stream, unpack = self.weights(num_prompts * new)
        return float(compute), float(self.chunks(num_prompts * new) * (stream + unpack))

    def chunks(self, num_tokens: Any, maximum: Any = max) -> Any:
        """Steps that so many prompt tokens take."""
        return maximum(1.0, num_tokens / self.fixed.chunk_tokens)

    @property
    def decode_band(self) -> tuple[float, float]:
        """Factors (low, high) on the seconds of a token."""
        several = self.ranks > 1 or self.sharding.replica_ranks > 1 or self.sharing > 1
        return self.fixed.parallel_band if several else self.fixed.decode_band

    def pipelined(self, chunks: float) -> float:
        """The share of a prompt's seconds over all layers that it takes in a pipeline, whose stages work on its chunks
        at the same time."""
        stages = self.sharding.pipeline_parallel_size
        return (max(1.0, chunks) + stages - 1) / (max(1.0, chunks) * stages) if chunks > 1 else 1.0

    def _flops(self, bits: float) -> float | None:
        """FLOP/s for weights of so many bits: narrower ones than a card multiplies are widened to 16."""
        card = self.hardware
        if bits < 6:
            return (card.fp4_flops if bits >= FLOAT4_BITS else None) or card.fp16_flops
        return (card.fp8_flops or card.fp16_flops) if bits <= 8.5 else card.fp16_flops

    def _unpacked(self, bits: float) -> bool:
        """Whether weights of so many bits are unpacked before they are multiplied."""
        if bits < 6:
            return bits < FLOAT4_BITS or not self.hardware.fp4_flops
        return bits <= 8.5 and not self.hardware.fp8_flops


def hit_share(weights: Weights, num_tokens: Any, spread: float = 1.0) -> Any:
    """Share of the routed experts that ``num_tokens`` tokens hit: as many as ``num_tokens ** spread`` tokens routed
    uniformly."""
    if not weights.num_experts:
        return 1.0
    return 1 - (1 - min(1.0, weights.experts_per_token / weights.num_experts)) ** num_tokens**spread


def find_kernel(fixed: Constants, method: Method, layer: LayerShape, engine: str, q_per_kv: int) -> tuple[Kernel, bool]:
    """The measured kernel nearest to what ``engine`` runs on ``method``, and whether it unpacks codes.

    A kernel is looked up as ``engine/coded-kernel`` where the method names its ``kernel``, ``engine/width-layout``
    (:func:`packed_layout`), ``engine/width-mha`` (one query head a kv head), ``engine/width``, then ``width``; widths
    are ``fp16``, ``fp8`` (one byte an element and no scales) and ``packed``.
    """
    width = method_width(method, layer)  # type: ignore[arg-type]  # every method is frozen
    layout = packed_layout(method, layer) if width == "packed" else ""
    engine = engine.partition(":")[0]
    for name in (f"{engine}/{coded(method)}", *kernel_names(width, engine, q_per_kv == 1, layout)):
        if name in fixed.kernels:
            return fixed.kernels[name], width == "packed" or fixed.kernels[name].code_ops > 0
    raise LookupError(f"no attention kernel for {width}: timing.json has {', '.join(fixed.kernels)}")


def kernel_names(width: str, engine: str, mha: bool = False, layout: str = "") -> list[str]:
    """Names of a kernel or constant, the most particular first."""
    particular = [f"{engine}/{width}-{layout}"] * bool(layout) + [f"{engine}/{width}-mha"] * mha
    return [*particular, f"{engine}/{width}", width]


def coded(method: Method) -> str:
    """``coded-`` and the kernel of a method whose tokens are coded one by one; its ``inner``'s where it has one."""
    kernel = getattr(getattr(method, "inner", method), "kernel", "")
    return f"coded-{kernel}" if kernel else ""


def packed_layout(method: Method, layer: LayerShape) -> str:
    """Bits a packed number and numbers a scale: ``2g64``; of keys and values that differ, the means."""
    bits, scales = _packed(method, layer)  # type: ignore[arg-type]  # every method is frozen
    return f"{round(bits, 1):g}g{round(2 / scales) if scales else 0}"


@lru_cache(maxsize=1024)
def method_width(method: Method, layer: LayerShape) -> str:
    """By the type of most bytes: ``fp16`` for floats of 16 bits and more, ``fp8`` of 8 bits, else ``packed``."""
    sizes: Counter[str] = Counter()
    for buffer in method.buffers(layer, 1, 65536):
        sizes[buffer.dtype] += buffer.nbytes
    most = max(sizes, key=lambda dtype: sizes[dtype])
    return "fp16" if most in ("float16", "bfloat16", "float32") else "fp8" if most.startswith("float8") else "packed"


def scales_a_code(method: Method, layer: LayerShape) -> float:
    """Scales and zeros, of 16 bits each, that a packed number has its share of: 2/64 in groups of 64 with both."""
    return _packed(method, layer)[1]  # type: ignore[arg-type]  # every method is frozen


@lru_cache(maxsize=1024)
def _packed(method: Method, layer: LayerShape) -> tuple[float, float]:
    """Bits of codes, and scales and zeros of 16 bits, for each number of a long sequence."""
    numbers = 65536 * layer.num_kv_heads * (layer.key_dim + layer.value_dim)
    sizes: Counter[str] = Counter()
    for name, size in method.read_parts(layer, 1, 65536).items():
        sizes[part_kind(method, name)] += size
    return 8 * sizes["codes"] / numbers, (sizes["scales"] + sizes["zeros"]) / 2 / numbers


def read_nbytes(method: Method, layer: LayerShape, num_tokens: Any) -> Any:
    """Bytes that a step reads of one layer and sequence (:func:`mean_read_nbytes`), for numbers and arrays alike."""
    if isinstance(num_tokens, int | float):
        return mean_read_nbytes(method, layer, 1, int(num_tokens))
    import numpy

    tokens = num_tokens.astype(numpy.int64).reshape(-1, 1)
    # every method is frozen
    read = _read_formula(method, layer)(numpy.ones((1, 1), numpy.int64), tokens)  # type: ignore[arg-type]
    return read.reshape(num_tokens.shape).astype(numpy.float64)


@lru_cache(maxsize=1024)
def _read_formula(method: Method, layer: LayerShape) -> VectorFormula:
    return VectorFormula(lambda batch_size, num_tokens: mean_read_nbytes(method, layer, batch_size, num_tokens))


def entries(layer: LayerShape, num_tokens: Any, maximum: Any = max) -> Any:
    """Entries that a layer holds, for numbers and arrays alike."""
    held = num_tokens // layer.stride
    return held if layer.window is None else -maximum(-held, -layer.window)


def seen(layer: LayerShape, num_tokens: int, new: int) -> float:
    """Pairs of a new token and an entry it sees, causality and window applied."""
    first = num_tokens - new
    if layer.window is None:
        return (num_tokens * (num_tokens + 1) - first * (first + 1)) / 2 / layer.stride
    ramp = max(0, min(num_tokens, layer.window) - first)
    return ramp * (first + (ramp + 1) / 2) + (new - ramp) * min(layer.window, num_tokens)


def _width(layer: LayerShape) -> int:
    """Channels that a query head multiplies with an entry: keys, and values (the latent again where shared)."""
    if layer.kind == "mla" and layer.value_dim:  # the rotary key apart
        return 2 * layer.key_dim + layer.value_dim
    return layer.key_dim + (layer.value_dim or (layer.key_dim if layer.kind == "mla" else 0))
