"""What the model of time rests on: the fitted and stated constants of ``kvsim/catalog/timing.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from kvsim.latency.attention_curve import Curve, Kernel


@dataclass(frozen=True)
class Constants:
    """Efficiencies are shares of the card's stated peaks, times are seconds.  Each has its source in ``timing.json``.

    Weights: ``weight_efficiency``, ``expert_efficiency``: the stream of those that every step reads, and of the routed
    experts.  ``routing_spread``: ``n`` tokens hit as many experts as ``n ** routing_spread`` tokens would that are
    routed independently and uniformly (1: they are).

    Layers: ``layer_seconds``: what a block costs a step besides bytes and arithmetic, and more
    ``expert_layer_seconds`` in a mixture of experts (routing, sorting, gathering), ``latent_layer_seconds`` with latent
    attention, ``state_layer_seconds`` with a constant state (a gated-delta or Mamba mixer in place of attention),
    ``index_layer_seconds`` with an indexer, ``narrow_layer_seconds`` where its dense weights have 8 bits or fewer
    (activations are quantized).  ``sequence_seconds``: a sequence of a step (scheduling, sampling, detokenizing).
    ``engine_layer_seconds``: in place of all of these, by engine, and ``engine_step_seconds`` a step besides;
    ``engine_table_share``: by engine, of ``engine_layer_seconds`` what a layer takes of a model that adds a table of
    positions and rotates nothing (GPT-2), where the host launches every operation;
    ``engine_layer_shares``: by engine, how many times as long as another a layer with a constant ``state`` or a
    ``window`` takes, and what share of a layer each ``norm`` beyond two a layer takes;
    ``engine_state_passes``: by engine, how often a step reads and writes a constant state (PyTorch's operators do it
    one after the other);
    ``engine_copies``: by engine, what of the cache a step copies before attention reads it: ``cache``, all of it once
    (a cache that grows by concatenation), or ``heads``, once for every query head where these share keys and values;
    ``engine_wide``: by engine, above how many ``rows`` a step takes ``layer_seconds`` a layer more, and
    ``row_seconds`` a layer and row, ``channel_seconds`` a layer, row and channel of the hidden state;
    ``host_launched``: engines whose layers' seconds are the host's launches, behind
    which the card's work hides; ``overlapped``: by engine, own efficiencies where arithmetic hides behind the weight
    stream, and ``weight_ops``, a lane's operations for a weight, where products multiply without matrix units.
    ``quantize_seconds``: more a layer whose cache is quantized, by width or engine and width as ``kernels``.

    Arithmetic: ``prefill_efficiency`` of dense products, ``routed_efficiency`` of the experts', by engine;
    ``attention_efficiency`` of attention's.  ``vector_ops``: operations to unpack a code.

    Cards: ``link_seconds``: an all-reduce however short, times log2(2 x cards); ``link_efficiency``: share of a link's
    one direction; ``engine_link``: both (``seconds``, ``efficiency``) by engine that reduces by NCCL.

    Prompts: ``engine_prompt_seconds``, by engine: what the host takes a layer to launch a prompt's kernels, behind
    which the card works, in place of ``prefill_seconds``, which are a server's; ``engine_prompt_passes``: how often a
    token's hidden state, in 16 bits, goes through memory in a layer, element by element, and ``engine_prompt_norms``:
    the share of these that each norm beyond two a layer adds; ``engine_masked_efficiency``: by engine that gives
    attention a mask where a window is shorter than the prompt, the share of the FLOP/s at which it multiplies every
    pair, those hidden too; ``engine_order_seconds``: by engine, what a layer takes more whose key channels are stored
    in an order that the prompt tells.

    Servers: ``chunk_tokens``: prompt tokens a step.  ``prompt_steps``: by engine that runs prompts in steps of their
    own, the share of them that a request waits for.  ``prefill_seconds``, ``prefill_queue``: what a first token waits
    besides its prefill, and the share of a prefill that each further request in flight adds.  ``memory_share``: share
    of the card's memory that an engine uses, ``reserve_nbytes`` of it for neither weights nor cache.

    ``decode_band``, ``parallel_band``, ``prefill_band``: factors (low, high) on a prediction: a token's time on one
    card and on several, a first token's.  ``kernels``, ``curve``: :mod:`kvsim.latency.attention_curve`.  ``engines``:
    the only ones that these were measured for (``None``: any); ``estimated``: engines of which nothing was measured.
    """

    weight_efficiency: float
    expert_efficiency: float
    routing_spread: float
    layer_seconds: float
    expert_layer_seconds: float
    latent_layer_seconds: float
    state_layer_seconds: float
    index_layer_seconds: float
    narrow_layer_seconds: float
    sequence_seconds: float
    engine_layer_seconds: Mapping[str, float]
    engine_wide: Mapping[str, Mapping[str, float]]
    overlapped: Mapping[str, Mapping[str, float]]
    quantize_seconds: Mapping[str, float]
    prefill_efficiency: float
    routed_efficiency: Mapping[str, float]
    attention_efficiency: float
    vector_ops: float
    link_efficiency: float
    link_seconds: float
    chunk_tokens: int
    prompt_steps: Mapping[str, float]
    prefill_seconds: float
    prefill_queue: float
    reserve_nbytes: float
    memory_share: Mapping[str, float]
    decode_band: tuple[float, float]
    parallel_band: tuple[float, float]
    prefill_band: tuple[float, float]
    kernels: Mapping[str, Kernel]
    curve: Curve
    engine_step_seconds: Mapping[str, float] = field(default_factory=dict)
    engine_prompt_seconds: Mapping[str, float] = field(default_factory=dict)
    engine_prompt_passes: Mapping[str, float] = field(default_factory=dict)
    engine_prompt_norms: Mapping[str, float] = field(default_factory=dict)
    engine_masked_efficiency: Mapping[str, float] = field(default_factory=dict)
    engine_order_seconds: Mapping[str, float] = field(default_factory=dict)
    engine_table_share: Mapping[str, float] = field(default_factory=dict)
    engine_layer_shares: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    engine_state_passes: Mapping[str, float] = field(default_factory=dict)
    engine_copies: Mapping[str, str] = field(default_factory=dict)
    engine_link: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    host_launched: tuple[str, ...] = ()
    engines: tuple[str, ...] | None = None
    estimated: tuple[str, ...] = ()

    def check_engine(self, engine: str, why: str = "") -> None:
        """Raises ``ValueError`` for an engine that these constants were not measured for; ``why`` it was asked for."""
        if self.engines is not None and engine not in self.engines:
            raise ValueError(
                f"engine {engine}{why}: the profile was not measured with its kernels; allowed with this profile are "
                f"{', '.join(self.engines)}, without one every engine"
            )


TUPLES = ("decode_band", "parallel_band", "prefill_band", "estimated", "host_launched")


@cache
def constants() -> Constants:
    """The constants of ``kvsim/catalog/timing.json``."""
    path = Path(__file__).parents[1] / "catalog" / "timing.json"
    table = json.loads(path.read_text(encoding="utf-8"))
    values: dict[str, Any] = {name: entry["value"] for name, entry in table["constants"].items()}
    for name in TUPLES:
        values[name] = tuple(values.get(name, ()))
    kernels = {name: Kernel(**entry) for name, entry in table["kernels"].items()}
    return Constants(**values, kernels=kernels, curve=Curve(**table["curve"]["value"]))
