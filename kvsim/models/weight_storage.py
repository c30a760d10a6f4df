"""How many bits a weight is stored with, and what all of them weigh: the one way, for memory and for time."""

from __future__ import annotations

from typing import NamedTuple

from kvsim.models.model import Model
from kvsim.models.parameters import Weights

DEFAULT_BITS: float = 16
"""Bits a weight where neither an option nor the config says."""
HEAD_BITS: float = 16
"""Bits a weight that embedding and head keep where the layers are quantized."""
MAX_WEIGHT_BITS = 64
EXPERTS_ONLY = ("gpt_oss",)
"""Families whose published checkpoints quantize the routed experts alone (``modules_to_not_convert``)."""


class WeightBits(NamedTuple):
    """Bits a parameter as stored: weights that every step reads, routed experts, head and tables."""

    dense: float
    routed: float
    head: float

    def nbytes(self, weights: Weights) -> float:
        """Bytes of all weights."""
        tables = weights.embedding + weights.head + weights.lookup
        return (weights.dense * self.dense + weights.routed * self.routed + tables * self.head) / 8


def check_weight_bits(bits: float | None, what: str = "weight-bits") -> None:
    """Raises ``ValueError`` for bits a weight that cannot be; ``None`` stands for the model's own."""
    if bits is not None and not 0 < bits <= MAX_WEIGHT_BITS:
        raise ValueError(f"{what} {bits:g}: allowed are above 0 to {MAX_WEIGHT_BITS}")


def weight_storage(model: Model, weight_bits: float | None = None, quantized: bool = True) -> WeightBits:
    """Bits a parameter by group: ``weight_bits``, else the model's own, else 16.

    Where the layers are ``quantized``, head and tables keep 16 bits, in families of :data:`EXPERTS_ONLY` attention too;
    else every weight has the same bits.  Bits that are the model's own are divided as its config says
    (``Model.expert_bits``).
    """
    bits = weight_bits or model.weight_bits or DEFAULT_BITS
    wide = max(bits, HEAD_BITS) if quantized else bits
    routed, weights = model.expert_bits, model.weights
    if routed is not None and bits == model.weight_bits and weights is not None and weights.dense:
        rest = (bits * (weights.dense + weights.routed) - routed * weights.routed) / weights.dense
        return WeightBits(min(DEFAULT_BITS, max(0.0, rest)), routed, wide)
    return WeightBits(wide if model.model_type in EXPERTS_ONLY else bits, bits, wide)


def known_weights(model: Model) -> Weights:
    """The model's weights.  Raises ``ValueError`` where the config does not tell their number or how they are used."""
    if model.weights is None:
        raise ValueError(f"{model.name}: the config does not tell the number of weights, no time without it")
    if model.weights.routed and not model.weights.experts_per_token:
        raise ValueError(f"{model.name}: the config does not tell how many experts a token uses, no time without it")
    return model.weights


def weight_nbytes(model: Model, weight_bits: float | None = None) -> float:
    """Bytes of all weights as stored (:func:`weight_storage`)."""
    return weight_storage(model, weight_bits).nbytes(known_weights(model))
