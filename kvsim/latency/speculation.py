"""Speculative decoding: tokens a step, what a step takes, and what the draft's cache and weights add.

A step verifies ``k`` proposed tokens of every sequence and one more: the weights are streamed once, the products are
of ``k + 1`` tokens, and the cache is read once for all their queries.  Before it the draft runs ``k`` steps of its own:
another model, a prediction layer of the model's (MTP, EAGLE: weighed as one of its blocks and its head), or a search
for the last tokens in the context (n-gram), whose time on the host is not counted.

A proposed token is kept where it and all before it are: with a rate ``a`` each, ``1 + a + ... + a^k`` tokens come of a
step (Leviathan et al. 2023, arXiv 2211.17192, equation 1).  Trained heads lose with every position, so the shares by
position that vLLM logs ("per-position acceptance rate") can be given in place of one rate.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvsim.hardware import Hardware
from kvsim.latency.roofline import Roofline, Serving
from kvsim.latency.steps import Band, Step, as_step, decode_step
from kvsim.layout import LayerShape, Method
from kvsim.memory.capacity import room
from kvsim.memory.sharding import Sharding
from kvsim.models.model import Model
from kvsim.models.parameters import Weights

KINDS = ("draft", "mtp", "ngram")
HOST_SECONDS = 1.2e-3
"""What the host added to every step of a draft in vLLM's first EAGLE, which had no CUDA graph: 3.0 ms of two, 4.8 of
four (vllm-project/vllm pull request 16035, Llama-3-8B, one sequence).  In the upper end of the band, not the value."""
MOST_TOKENS = 64


@dataclass(frozen=True)
class Speculation:
    """``num_tokens`` proposed a step; ``kept``: for each position the share of the drafts that keep it (they never
    rise); ``proposed``: the share of the steps that find a proposal at all (n-gram).  ``draft``: the model that drafts.

    Raises ``ValueError`` for shares or counts that cannot be.
    """

    kind: str
    kept: tuple[float, ...]
    proposed: float = 1.0
    draft: Model | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"speculate {self.kind!r}: allowed are {', '.join(KINDS)}")
        if not 1 <= len(self.kept) <= MOST_TOKENS:
            raise ValueError(f"speculate: {len(self.kept)} tokens: allowed are 1 to {MOST_TOKENS}")
        if not all(0 <= share <= 1 for share in (*self.kept, self.proposed)):
            raise ValueError("speculate: acceptance and proposed: allowed are shares from 0 to 1")
        if any(later > sooner for sooner, later in zip(self.kept, self.kept[1:], strict=False)):
            raise ValueError("speculate: a position is kept where all before it are: its share is no higher")
        if (self.draft is None) == (self.kind == "draft"):
            raise ValueError("speculate: draft needs model=NAME, mtp and ngram have none")

    @property
    def num_tokens(self) -> int:
        return len(self.kept)

    @property
    def tokens_a_step(self) -> float:
        """Tokens that a step adds to a sequence: 1, and those that are kept."""
        return 1 + self.proposed * sum(self.kept)

    def drafter(self, model: Model) -> Model | None:
        """What runs before a step of ``model``; ``None`` of n-grams."""
        return own_layer(model) if self.kind == "mtp" else self.draft

    def with_draft(self, model: Model) -> Model:
        """``model`` with the draft's layers beside its own, for bytes: they share an engine's pool."""
        drafter = self.drafter(model)
        return model if drafter is None else replace(model, layers=model.layers + drafter.layers)


def rate_by_position(rate: float, num_tokens: int) -> tuple[float, ...]:
    """Shares kept by position where every token is kept at one ``rate``."""
    return tuple(rate**place for place in range(1, num_tokens + 1))


def own_layer(model: Model) -> Model:
    """A prediction layer as one more block: the last layer with keys and values, a block's share of the weights, and
    the model's head, whose weights are not copied.

    Raises ``ValueError`` where the number of weights is not known.
    """
    weights = model.weights
    if weights is None:
        raise ValueError(f"{model.name}: the config does not tell the number of weights, no prediction layer")
    layer = next(layer for layer in reversed(model.layers) if isinstance(layer, LayerShape) and layer.kind != "indexer")
    blocks = model.num_blocks
    one = Weights(
        embedding=weights.embedding,
        head=weights.head,
        dense=round(weights.dense / blocks) + 2 * model.hidden_size**2,  # and the product that joins token and state
        routed=round(weights.routed / blocks),
        num_experts=weights.num_experts,
        experts_per_token=weights.experts_per_token,
    )
    return replace(model, name=f"{model.name} (prediction layer)", layers=(layer,), kinds=(("full", 1),), weights=one)


def own_weights(spec: Speculation, model: Model) -> Model | None:
    """The draft as its weights are stored beside the target's: a prediction layer shares table and head."""
    drafter = spec.drafter(model)
    if drafter is None or spec.kind == "draft" or drafter.weights is None:
        return drafter
    return replace(drafter, weights=replace(drafter.weights, embedding=0, head=0))


def draft_weight_nbytes(
    spec: Speculation, model: Model, card: Hardware, weight_bits: float | None, quantized: bool, sharding: Sharding
) -> int:
    """Bytes of the draft's weights on one card, which holds all of its layers; 0 of n-grams.

    ``weight_bits``, ``quantized``: the target's, which a prediction layer has too; another model has its own.
    """
    drafter = own_weights(spec, model)
    if drafter is None:
        return 0
    if spec.kind != "mtp":
        weight_bits, quantized = None, False
    whole = replace(sharding, pipeline_parallel_size=1)
    return room(drafter, card, weight_bits, 0.0, quantized=quantized, sharding=whole).weight_nbytes


def busy(plain: Step, drafted: Step) -> Step:
    """``drafted`` steps on a server whose other prompts add to a token what they do in ``plain`` ones, as surely."""
    prompts = plain.parts.get("prefill", 0.0) / plain.seconds.value
    both = zip(drafted.seconds, plain.seconds, strict=True)
    return replace(drafted, seconds=Band(*(seconds + prompts * other for seconds, other in both)))


def verify_parts(
    roofline: Roofline, method: Method, batch_size: float, num_tokens: int, queries: int
) -> dict[str, float]:
    """Seconds of a step over ``batch_size`` sequences with ``queries`` tokens each, by part."""
    tokens = batch_size * queries
    weights, widen, compute = roofline.work(tokens, tokens)
    stream, unpack = roofline.attention(method, batch_size, num_tokens)
    return {
        "weights": weights,
        "compute": compute,
        "kv": max(stream, roofline.pairs(tokens, num_tokens)) + roofline.states(batch_size),
        "dequantize": widen + unpack,
        "overhead": roofline.overhead(method) + roofline.wide(tokens) + roofline.sequences(batch_size),
        "communication": roofline.communication(tokens),
    }


def speculative_step(
    model: Model,
    method: Method,
    hardware: Hardware,
    batch_size: float,
    num_tokens: int,
    spec: Speculation,
    serving: Serving | None = None,
) -> Step:
    """Seconds an output token of ``batch_size`` sequences with ``num_tokens`` tokens in the cache, decode steps alone.

    ``parts`` has the draft's time as ``draft``.  Every step is taken to carry a proposal of all its sequences.  The
    band's upper end has :data:`HOST_SECONDS` a draft step besides.
    Raises ``ValueError`` as :func:`kvsim.latency.steps.decode_step` does, for the draft too.
    """
    serving = serving or Serving()
    roofline = Roofline(model, hardware, serving)
    parts = verify_parts(roofline, method, batch_size, num_tokens, spec.num_tokens + 1)
    drafter = spec.drafter(model)
    parts["draft"] = 0.0
    if drafter is not None:
        own = serving if spec.kind == "mtp" else replace(serving, weight_bits=None)
        parts["draft"] = (
            spec.num_tokens * decode_step(drafter, method, hardware, batch_size, num_tokens, own).seconds[0]
        )
    each = {name: seconds / spec.tokens_a_step for name, seconds in parts.items()}
    step = as_step(each, roofline.decode_band)
    host = 0.0 if drafter is None else spec.num_tokens * HOST_SECONDS / spec.tokens_a_step
    return replace(step, seconds=step.seconds._replace(high=step.seconds.high + host))
