"""Sharding: what one card of several holds of a cache.

* **Tensor parallel** splits the key/value heads of every layer.  With more ranks than heads each head is held by
  ``ranks / heads`` of them; one latent (MLA), and one head (multi-query), by all.  States are split evenly.
* **Pipeline parallel** gives each stage a run of layers, as many as ``get_pp_indices`` of vLLM 0.32 does: the
  remainder goes to the stages before the last, one each.  transformers, and kvruntime under it, gives it to the first.
* **Context parallel** spreads tokens over ranks in turn: each holds ``ceil(n / ranks)``.  Decode context parallel
  (DCP) uses ranks of the tensor-parallel group that would hold replicas; prefill context parallel (PCP) adds ranks.
* **Data parallel** gives each replica ``ceil(batch / replicas)`` sequences.  The routed experts of a mixture are not
  copied: all ranks of all replicas share them (vLLM: the expert layers form a group of DP x TP; SGLang: DP attention),
  a slice of every expert each, or whole experts (expert parallel), ``ceil(experts / ranks)`` on the fullest.

Ranks that do not divide heads, or heads that do not divide ranks, are refused, as the engines refuse them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

from kvsim.engines import IDEAL, Engine
from kvsim.layout import LayerShape, Method, StateShape
from kvsim.methods.by_layer import within
from kvsim.models.model import Model
from kvsim.whole_numbers import check_switch, check_whole


@dataclass(frozen=True)
class Sharding:
    """How many ranks share what, in vLLM's names.  Raises ``ValueError`` for a number below 1."""

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    decode_context_parallel_size: int = 1
    prefill_context_parallel_size: int = 1
    enable_expert_parallel: bool = False

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check = check_switch if name == "enable_expert_parallel" else check_whole
            check(name.replace("_", "-"), value)
        if self.tensor_parallel_size % self.decode_context_parallel_size:
            raise ValueError(
                f"decode-context-parallel-size {self.decode_context_parallel_size}: "
                f"allowed are divisors of the tensor-parallel size {self.tensor_parallel_size}"
            )

    @property
    def replica_ranks(self) -> int:
        """Cards of one replica."""
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.prefill_context_parallel_size

    @property
    def ranks(self) -> int:
        """Cards in all."""
        return self.replica_ranks * self.data_parallel_size

    @property
    def expert_ranks(self) -> int:
        """Cards that share a mixture's routed experts, of one stage."""
        return self.tensor_parallel_size * self.prefill_context_parallel_size * self.data_parallel_size

    @property
    def label(self) -> str:
        """The sizes above 1 in short: ``tp8``, ``dp8 ep``, ``tp8 dcp8``, ``tp8 pp2``; ``""`` of one card."""
        sizes = zip(("tp", "pp", "dp", "dcp", "pcp"), tuple(vars(self).values()), strict=False)
        return " ".join([*(f"{name}{size}" for name, size in sizes if size > 1), *["ep"] * self.enable_expert_parallel])

    @property
    def context_ranks(self) -> int:
        return self.decode_context_parallel_size * self.prefill_context_parallel_size

    def rank_tokens(self, num_tokens: int) -> int:
        """Tokens of a sequence that one rank holds at the most."""
        return -(-num_tokens // self.context_ranks)

    def rank_batch(self, batch_size: int) -> int:
        """Sequences of the fullest replica."""
        return -(-batch_size // self.data_parallel_size)


SINGLE = Sharding()


def pipeline_layers(num_layers: int, stages: int, first: bool = False) -> tuple[int, ...]:
    """Layers of each stage (vLLM 0.32, distributed/utils.py ``get_pp_indices``), or with the remainder in the ``first``
    ones (transformers 5.24, distributed/pipeline_parallel.py ``PipelineStage``).

    Raises ``ValueError`` for more stages than layers.
    """
    if stages > num_layers:
        raise ValueError(f"pipeline-parallel-size {stages}: allowed are 1 to the {num_layers} layers")
    counts = [num_layers // stages] * stages
    for place in range(num_layers % stages):
        counts[place if first else -2 - place] += 1
    return tuple(counts)


def stages(model: Model, sharding: Sharding, first: bool = False) -> tuple[Model, ...]:
    """The model as one rank of each pipeline stage sees it: its layers, with its share of the heads.

    ``first``: as :func:`pipeline_layers`.
    Raises ``ValueError`` where heads and ranks do not divide each other.
    """
    ranks = sharding.tensor_parallel_size
    if model.num_q_heads % ranks:
        raise ValueError(
            f"tensor-parallel-size {ranks} does not divide the {model.num_q_heads} query heads of {model.name}"
        )
    if sharding.context_ranks > 1 and any(layer.window is not None for layer in model.cache_layers):
        raise ValueError("context parallel is for full attention: this model has layers with a window")
    held = [layer for layer in model.layers if not _is_index(layer)]
    index = [layer for layer in model.layers if _is_index(layer)]
    counts = pipeline_layers(len(held), sharding.pipeline_parallel_size, first)
    out = []
    for stop, count in zip(accumulate(counts), counts, strict=True):
        own = held[stop - count : stop]
        beside = index[stop - count : stop] if len(index) == len(held) else index if count == len(held) else []
        shards = tuple(_shard(layer, sharding, model.name) for layer in (*own, *beside))
        out.append(replace(model, layers=shards, num_q_heads=model.num_q_heads // ranks))
    if index and len(index) != len(held) and sharding.pipeline_parallel_size > 1:
        raise ValueError("pipeline parallel: the stages of index keys are not known where not every layer has them")
    return tuple(out)


def copies(model: Model, sharding: Sharding) -> int:
    """On how many cards of a replica the same tokens of a layer's keys and values lie, at the most: a head, or a latent
    (MLA), is on every card where tensor parallel has more ranks than there are heads."""
    heads = min((layer.num_kv_heads for layer in model.cache_layers), default=sharding.tensor_parallel_size)
    each = max(1, sharding.tensor_parallel_size // max(1, heads))
    return max(1, each // sharding.decode_context_parallel_size)


def _is_index(layer: LayerShape | StateShape) -> bool:
    return isinstance(layer, LayerShape) and layer.kind == "indexer"


def _shard(layer: LayerShape | StateShape, sharding: Sharding, name: str) -> LayerShape | StateShape:
    ranks = sharding.tensor_parallel_size
    if isinstance(layer, StateShape):
        return _shard_state(layer, ranks, name)
    heads = layer.num_kv_heads
    if heads >= ranks and heads % ranks:
        raise ValueError(f"tensor-parallel-size {ranks} does not divide the {heads} kv heads of {name}")
    if heads < ranks and ranks % heads:
        raise ValueError(f"tensor-parallel-size {ranks}: the {heads} kv heads of {name} do not divide it")
    copies = max(1, ranks // heads)
    if copies % sharding.decode_context_parallel_size:
        raise ValueError(
            f"decode-context-parallel-size {sharding.decode_context_parallel_size}: {name} keeps {copies} "
            f"cop{'y' if copies == 1 else 'ies'} of a kv head on {ranks} ranks, allowed are divisors of that"
        )
    return replace(layer, num_kv_heads=max(1, heads // ranks))


def _shard_state(state: StateShape, ranks: int, name: str) -> StateShape:
    tensors = []
    for label, shape, dtype in state.tensors:
        axis = next((axis for axis, size in enumerate(shape) if size % ranks == 0), None)
        if axis is None:
            raise ValueError(f"tensor-parallel-size {ranks} does not divide the {label} state {shape} of {name}")
        tensors.append((label, (*shape[:axis], shape[axis] // ranks, *shape[axis + 1 :]), dtype))
    return replace(state, tensors=tuple(tensors))


@dataclass(frozen=True)
class Deployment:
    """A model under a method, an engine and a sharding: what each rank's cache takes.

    ``shared_prefix``: first tokens that all sequences have in common, stored once a replica.
    """

    model: Model
    method: Method
    engine: Engine = IDEAL
    sharding: Sharding = SINGLE
    shared_prefix: int = 0

    def stage_nbytes(self, batch_size: int, num_tokens: int) -> tuple[int, ...]:
        """Bytes (cache, states, index keys) of one rank of each stage, for ``batch_size`` sequences over all replicas.

        Raises ``ValueError`` as :func:`stages` and the engine do.
        """
        from kvsim.memory.shared_prefix import without_copies

        batch, tokens = self.sharding.rank_batch(batch_size), self.sharding.rank_tokens(num_tokens)
        prefix = self.shared_prefix // self.sharding.context_ranks
        out = []
        for stage, method in self.placed:
            taken = self.engine.parts(stage, method, batch, tokens)
            if prefix:
                taken = without_copies(taken, stage, method, self.engine, batch, tokens, prefix)
            out.append(sum(taken.values()))
        return tuple(out)

    @cached_property
    def placed(self) -> tuple[tuple[Model, Method], ...]:
        """Each stage's share of the model, and the method there: a mix goes by a layer's place in the whole model."""
        if self.sharding == SINGLE:
            return ((self.model, self.method),)
        held = stages(self.model, self.sharding, self.engine.remainder_first)
        counts = [stage.num_layers for stage in held]
        firsts = accumulate(counts, initial=0)
        return tuple(
            (stage, within(self.method, first, count, sum(counts)))
            for stage, first, count in zip(held, firsts, counts, strict=False)
        )

    def rank_nbytes(self, batch_size: int, num_tokens: int) -> int:
        """Bytes of the fullest rank."""
        return max(self.stage_nbytes(batch_size, num_tokens))

    def all_nbytes(self, batch_size: int, num_tokens: int) -> int:
        """Bytes over all ranks, copies of heads among them, with every replica as full as the fullest."""
        a_stage = self.sharding.ranks // self.sharding.pipeline_parallel_size
        return sum(self.stage_nbytes(batch_size, num_tokens)) * a_stage
