"""vLLM: one pool of equal blocks, shared by groups of layers (v1/core/kv_cache_utils.py and v1/kv_cache_interface.py).

Read in vLLM 0.32.0; what differs in earlier releases is said where it does.

* A *page* is a block's bytes in one layer, ``block_size`` tokens of it.
* Layers of one kind form a bucket: full attention, each window, each chunk, states.  One bucket is one group, and a
  block is the pages of all its layers.  Several buckets are cut into groups of as many layers as the smallest bucket
  has (or as the largest has, where that is not 1.5 times more), the last one padded: the pages of every group are
  made equal, by longer blocks where one size divides the other, else by padding.
* A request takes, of every group, ``ceil(n / block_size)`` blocks for full attention;
  ``ceil(min(W - 1 + batched, n) / block_size) + 1`` for a window of W, since a step computes up to
  ``max_num_batched_tokens`` before old blocks are freed; ``ceil(min(C + batched, n) / block_size)`` for chunks of C;
  one for a state.  Block 0 of the pool stays empty (the null block).
* Models with states lengthen the block until a page of keys and values holds a state
  (``Platform._align_hybrid_block_size``).
* KIVI and kvruntime's TurboQuant are stored by its plugin (docs/serving.md).  A layer of KIVI has two caches of equal
  pages: records, a block of which is one record a head, and exact tokens, as many a block as fit there.  A request of
  ``n`` tokens takes ``ceil(n / record)`` and ``ceil(min(residual + record, n) / exact) + 1`` blocks.  TurboQuant has
  records alone, of 64 tokens.  A layer with a window of W keeps its
  tokens exact in such pages: ``ceil(min(W - 1, n) / exact) + 1`` blocks.

The pool is what ``gpu_memory_utilization`` of the card leaves beside weights, peak activations and what is not
PyTorch's; those three are estimates, fitted to 59 boot logs of vLLM 0.19.0 on an H100
(llm-d-incubation/llm-d-planner, accuracy/results/v0.19.0).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kvsim.engines.engine import Engine, Group, Pool
from kvsim.engines.ideal import Ideal
from kvsim.engines.states import served
from kvsim.layout import LayerShape, Method, StateShape, nbytes
from kvsim.methods import Fp8, Full, LayerMix, Nvfp4, PerTokenHead, Slot, placed
from kvsim.methods.by_layer import at
from kvsim.methods.full import SHORT
from kvsim.whole_numbers import check_switch, check_whole

if TYPE_CHECKING:
    from kvsim.hardware import Hardware
    from kvsim.models.model import Model

GIB = 1 << 30
HELD = (Full, Fp8, PerTokenHead, Nvfp4, Slot)
"""The methods that vLLM stores: --kv-cache-dtype auto, fp8, {int8,int4,fp8}_per_token_head, nvfp4, turboquant_*,
ultraquant_4bit."""

INDEX_NBYTES = 132
"""Bytes a token of an index key of 128: fp8 codes and a float32 scale (DeepseekV32IndexerCache)."""
FP8_DS_MLA_NBYTES = 656
"""Bytes a token of a latent of 576 under --kv-cache-dtype fp8 beside an indexer (``fp8_ds_mla``)."""
FLOAT32_STATES = ("nemotron_h", "qwen3_5")
"""Families whose config asks vLLM for float32 states (--mamba-ssm-cache-dtype auto); KDA has them always."""
SPARSE_BLOCK = 64
MLA_ALIGNMENT = 128

WHOLE = (
    "block_size",
    "max_num_batched_tokens",
    "max_num_seqs",
    "concurrent_batches",
    "state_blocks",
    "tensor_parallel_size",
)
"""The fields that are whole numbers from 1."""

PADDING_RATIO = 1.5
"""Largest bucket over smallest up to which vLLM pads the smaller ones instead of cutting the larger."""

LOGIT_NBYTES = 15
"""Peak bytes a logit of the profiling run: fitted, 15 x max_num_seqs x vocabulary (3.6 GiB at 256,000)."""
ACTIVATION_NBYTES = 24
"""Peak bytes a token and hidden channel, where that is more: fitted (0.77 GiB at 8,192 tokens of 4,096)."""
EXPERT_NBYTES = int(0.35 * GIB)
"""More of it in a model of experts."""
NON_TORCH = int(0.25 * GIB)
NON_TORCH_PARALLEL = int(2.1 * GIB)
"""What is not PyTorch's: one card, and each of several that share layers (NCCL buffers)."""
GRAPH_BASE, GRAPH_LAYER = int(0.35 * GIB), int(0.0175 * GIB)
"""CUDA graphs: 0.51 to 1.85 GiB were seen.  Inside the budget since 0.21."""

OVERHEAD_BAND: dict[str, tuple[float, float]] = {
    "activation": (0.8, 1.6),
    "non_torch": (0.25, 1.3),
    "cuda_graphs": (0.6, 2.0),
}
"""Low and high over the estimate: nine in ten of the 59 logs lie between."""


@dataclass(frozen=True)
class Vllm(Engine):
    """vLLM's flags, as it names them.

    ``max_num_batched_tokens`` and ``max_num_seqs`` default to those of an H100 API server (8192, 1024); smaller cards
    have 2048 and 256 (:func:`server_defaults`).  ``concurrent_batches``: steps in flight whose tokens a window keeps;
    2 where asynchronous scheduling reserves for two (0.32).  ``state_blocks``: blocks of a state a request, 2 with
    prefix caching.  ``tensor_parallel_size`` enters the estimate of what is not PyTorch's, not the cache.
    Raises ``ValueError`` for a number out of range.
    """

    label = "vLLM"
    own_flags = ("block_size", "max_num_batched_tokens")
    cache_methods = ("fp8", "int8", "int4", "nvfp4")
    checkpoint_cache = True

    block_size: int = 16
    gpu_memory_utilization: float = 0.92
    max_num_batched_tokens: int = 8192
    max_num_seqs: int = 1024
    concurrent_batches: int = 1
    state_blocks: int = 1
    disable_hybrid_kv_cache_manager: bool = False
    tensor_parallel_size: int = 1

    def __post_init__(self) -> None:
        for name in WHOLE:
            check_whole(name.replace("_", "-"), getattr(self, name))
        check_switch("disable-hybrid-kv-cache-manager", self.disable_hybrid_kv_cache_manager)
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(f"gpu-memory-utilization {self.gpu_memory_utilization:g}: allowed are above 0 to 1")

    @property
    def name(self) -> str:
        return "vllm"

    @property
    def overhead_band(self) -> dict[str, tuple[float, float]]:
        """Low and high of each overhead, over the estimate."""
        return OVERHEAD_BAND

    def parts(self, model: Model, method: Method, batch_size: int, num_tokens: int) -> dict[str, int]:
        groups = self.groups(model, method)
        block = block_nbytes(groups)
        total = batch_size * self.blocks(groups, num_tokens) * block
        out = Ideal().parts(model, self.stored(model, method), batch_size, num_tokens)
        if model.index_layers:
            out = {name: size for name, size in out.items() if not name.startswith("index_")}
            out["index_key"] = INDEX_NBYTES * batch_size * num_tokens * len(model.index_layers)
        if model.state_layers:
            out = {name: size for name, size in out.items() if not name.startswith("state_")}
            for state, count in Counter(model.state_layers).items():
                for buffer in _state(state, model).buffers(batch_size):
                    key = f"state_{buffer.name}"
                    out[key] = out.get(key, 0) + count * buffer.nbytes
        out["padding"] = total - sum(out.values())
        out["null_block"] = block
        return out

    def groups(self, model: Model, method: Method) -> tuple[Group, ...]:
        """The groups of layers; raises ``ValueError`` for a method or layer that vLLM does not have."""
        kinds = placed(method, model.cache_layers)
        if any(hasattr(chosen, "page") for _, chosen in kinds):
            return _plugin_groups(model, list(kinds), self.disable_hybrid_kv_cache_manager)
        block_size = self._block_size(model, method)
        pages = [
            (self._bucket(layer), self._page(model, layer, chosen, block_size), count)
            for (layer, chosen), count in placed(method, model.cache_layers).items()
        ]
        pages += [(("full", None), INDEX_NBYTES * block_size, count) for count in [len(model.index_layers)] if count]
        states = [
            (("state", None), nbytes(_state(state, model).buffers(1)), count)
            for state, count in Counter(model.state_layers).items()
        ]
        if states and pages:
            widest = max(max(page for _, page, _ in pages), max(page for _, page, _ in states))
            states = [(bucket, widest, count) for bucket, _, count in states]
        return _grouped([*pages, *states], block_size)

    def stored(self, model: Model, method: Method) -> Method:
        """Windows stay exact beside what the plugin packs."""
        if not hasattr(method, "page") or all(layer.window is None for layer in model.cache_layers):
            return method
        exact = _exact(model, method)
        return LayerMix(first=0, last=0, windows=1, exact=exact, inner=method)

    def _block_size(self, model: Model, method: Method) -> int:
        """Tokens a block, after vLLM has fitted it to sparse attention and to states."""
        size = max(self.block_size, SPARSE_BLOCK) if model.index_layers else self.block_size
        states = [nbytes(_state(state, model).buffers(1)) for state in set(model.state_layers)]
        full = [layer for layer in model.cache_layers if layer.window is None]
        if not states or not full:
            return size
        layer = full[0]
        chosen = at(method, layer, model.cache_layers.index(layer), len(model.cache_layers))
        token = self._page(model, layer, chosen, 1)
        align = max(size, MLA_ALIGNMENT) if not layer.value_dim else size
        return max(size, align * -(-max(states) // (align * token)))

    def _bucket(self, layer: LayerShape) -> tuple[str, int | None]:
        if layer.stride > 1 or layer.kind == "compressed":
            raise ValueError(f"vllm: its packed pages for {layer.kind} layers are not modelled")
        if layer.window is None or self.disable_hybrid_kv_cache_manager:
            return "full", None
        return ("chunk" if layer.kind == "chunked" else "window"), layer.window

    def _page(self, model: Model, layer: LayerShape, method: Method, block_size: int) -> int:
        if not isinstance(method, HELD) or getattr(method, "format", "") == "fp8-e5m2":
            raise ValueError(
                f"vllm does not store {method.name}: it has fp16, bf16, fp32, fp8, fp8-token-head, int8, int4, nvfp4, "
                f"turboquant_k8v4 and its kin, and ultraquant_4bit"
            )
        if not layer.value_dim and isinstance(method, PerTokenHead):
            extra = 4  # a scale pair beside a latent, though it is one vector
        else:
            extra = 0
        if not layer.value_dim and isinstance(method, Fp8) and model.index_layers:
            return FP8_DS_MLA_NBYTES * block_size
        whole = replace(layer, window=None, kind="")
        return nbytes(method.buffers(whole, 1, block_size)) + extra * block_size

    def blocks(self, groups: tuple[Group, ...], num_tokens: int) -> int:
        """Blocks that one request of ``num_tokens`` tokens takes of the pool, at its most."""
        batched = self.concurrent_batches * self.max_num_batched_tokens
        total = 0
        for group in groups:
            if group.kind == "state":
                total += self.state_blocks
            elif group.kind == "window":
                assert group.reach is not None
                total += -(-min(group.reach - 1 + batched, num_tokens) // group.block_size) + 1
            elif group.kind in ("exact", "exact window"):
                assert group.reach is not None
                total += -(-min(group.reach, num_tokens) // group.block_size) + 1
            elif group.kind == "chunk":
                assert group.reach is not None
                total += -(-min(group.reach + batched, num_tokens) // group.block_size)
            else:
                total += -(-num_tokens // group.block_size)
        return total

    def pool(self, model: Model, method: Method, available: int, max_model_len: int) -> Pool:
        """The pool in ``available`` bytes: blocks, tokens, and how many requests of ``max_model_len`` fit.

        Its first block stays empty.  "GPU KV cache size" is :attr:`Pool.num_tokens` as 0.21 and later print it,
        ``num_tokens_before`` as earlier ones did.
        """
        groups = self.groups(model, method)
        block = block_nbytes(groups)
        return Pool(max(0, available) // block, block, max_model_len, self.blocks(groups, max_model_len), groups)

    def shared_tokens(self, model: Model, method: Method, layer: LayerShape, chosen: Method, shared: int) -> int:
        """Whole blocks of full-attention layers; windows are counted a sequence."""
        if layer.window is not None:
            return 0
        block = min(group.block_size for group in self.groups(model, method) if group.kind == "full")
        return shared // block * block

    @classmethod
    def on(cls, card: Hardware | None, num_cards: int) -> dict[str, Any]:
        flags: dict[str, Any] = {"tensor_parallel_size": num_cards}
        return flags if card is None else flags | dict(server_defaults(card.memory_nbytes, card.id))

    def overhead(self, model: Model, hardware: Hardware) -> dict[str, int]:
        hidden = ACTIVATION_NBYTES * self.max_num_batched_tokens * model.hidden_size
        logits = LOGIT_NBYTES * self.max_num_seqs * (model.vocab_size or 0)
        experts = EXPERT_NBYTES if model.weights is not None and model.weights.routed else 0
        parallel = self.tensor_parallel_size > 1
        return {
            "activation": max(hidden, logits) + experts,
            "non_torch": NON_TORCH_PARALLEL if parallel else NON_TORCH,
            "cuda_graphs": GRAPH_BASE + GRAPH_LAYER * len(model.layers),
        }

    def notes(self, model: Model, method: Method) -> tuple[str, ...]:
        groups = self.groups(model, method)
        block_size = max(group.block_size for group in groups)
        out = [f"blocks of {block_size:,} tokens, {block_nbytes(groups):,} B each over all layers; one stays empty"]
        if model.state_layers and block_size != self.block_size:
            out.append(f"block lengthened from {self.block_size} so that a page holds a layer's state")
        kinds = Counter(group.kind for group in groups)
        if len(groups) > 1:
            listed = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
            out.append(f"{len(groups)} groups of {groups[0].num_layers} layers share the pool: {listed}")
            padded = padding_layers(model, groups)
            if padded > 0:
                out.append(f"{padded} padding layers make the groups equal")
        if hasattr(method, "page"):
            out.append("by kvruntime's plugin: --attention-backend CUSTOM, a block is one record a head")
        if kinds["exact"]:
            exact = next(group for group in groups if group.kind == "exact")
            out.append(
                f"a request is admitted with {exact.reach} exact tokens in blocks of {exact.block_size} and one more; "
                f"one chunk of {self.concurrent_batches * self.max_num_batched_tokens:,} tokens is kept free for all"
            )
        if kinds["exact window"]:
            out.append("windows are not packed: a window of W keeps W - 1 exact tokens and one more block")
        if kinds["window"]:
            batched = self.concurrent_batches * self.max_num_batched_tokens
            out.append(f"a window of W keeps W - 1 + {batched:,} tokens (max_num_batched_tokens) and one more block")
        if model.index_layers:
            out.append(f"index keys in fp8 with a scale: {INDEX_NBYTES} B a token and layer")
            if isinstance(method, Fp8):
                out.append(f"fp8 latents as fp8_ds_mla: {FP8_DS_MLA_NBYTES} B a token and layer")
        return tuple(out)


def _exact(model: Model, method: Method) -> Full:
    """What the plugin stores a window by: the type of the method's exact tokens, of one without the model's."""
    dtype = getattr(method, "dtype", model.dtype)
    return Full(dtype if dtype in SHORT else "float16")


def _plugin_groups(model: Model, kinds: Sequence[tuple[LayerShape, Method]], no_windows: bool) -> tuple[Group, ...]:
    """Of methods that kvruntime's plugin stores (docs/serving.md): records, the exact tokens of the same layers, and
    windows."""
    first = next(chosen for _, chosen in kinds if hasattr(chosen, "page"))
    name, exact = first.name, _exact(model, first)
    others = [chosen for layer, chosen in kinds if chosen != first and (layer.window is None or chosen != exact)]
    if model.state_layers or model.index_layers or others:
        raise ValueError(f"vllm: kvruntime's plugin stores one method in attention layers alone, {name} in all of them")
    if no_windows:
        raise ValueError("vllm: kvruntime's plugin holds exact tokens as windows: they are disabled")
    packed = [layer for layer in model.cache_layers if layer.window is None]
    pages = {first.page(layer) for layer in packed}
    if len(pages) != 1:
        raise ValueError(f"vllm: kvruntime's plugin has pages of one size, {name} of these layers has {len(pages)}")
    tokens, page, exact_tokens, residual = pages.pop()
    counts: dict[tuple[str, int, int], int] = {("full", tokens, 0): len(packed)}
    if exact_tokens:
        counts["exact", exact_tokens, residual + tokens] = len(packed)
    for layer in model.cache_layers:
        if layer.window is not None:
            token = nbytes(exact.buffers(replace(layer, window=None), 1, 1))
            if layer.kind == "chunked" or token > page:
                raise ValueError(f"vllm: kvruntime's plugin holds no {layer.kind} layer of {token:,} B a token")
            key = "exact window", 1 << (page // token).bit_length() - 1, layer.window - 1
            counts[key] = counts.get(key, 0) + 1
    size = _group_size(counts.values())
    return tuple(
        Group(kind, size, block, size * page, reach or None)
        for (kind, block, reach), count in counts.items()
        for _ in range(-(-count // size))
    )


def padding_layers(model: Model, groups: Sequence[Group]) -> int:
    """Layers of groups that stand for none of the model's; those that are packed stand in two groups."""
    twice = sum(layer.window is None for layer in model.cache_layers) if any(g.kind == "exact" for g in groups) else 0
    return sum(group.num_layers for group in groups) - len(model.cache_layers) - len(model.state_layers) - twice


def _group_size(counts: Iterable[int]) -> int:
    """Layers a group, of as many of each kind."""
    fewest, most = min(counts := list(counts)), max(counts)
    return most if most < fewest * PADDING_RATIO else fewest


def _state(state: StateShape, model: Model) -> StateShape:
    """A state as vLLM types it: recurrent ones as the model's activations, unless the family asks for float32."""
    conv = next((dtype for name, _, dtype in state.tensors if name == "conv"), None)
    wide = state.kind == "kda" or model.model_type.startswith(FLOAT32_STATES)
    return served(state, recurrent_dtype="float32" if wide else conv)


def _grouped(pages: list[tuple[tuple[str, int | None], int, int]], block_size: int) -> tuple[Group, ...]:
    """``(bucket, page, layers)`` as groups of equal blocks (``get_kv_cache_groups``)."""
    buckets: dict[tuple[str, int | None], Counter[int]] = {}
    for bucket, page, count in pages:
        buckets.setdefault(bucket, Counter())[page] += count
    if not buckets:
        raise ValueError("vllm: the model has no layer with a cache")
    if len(buckets) == 1:
        ((kind, reach), sizes), *_ = buckets.items()
        total = sum(page * count for page, count in sizes.items())
        return (Group(kind, sum(sizes.values()), block_size, total, reach),)
    widest = max(max(sizes) for sizes in buckets.values())
    equal: dict[tuple[str, int | None, int], int] = {}
    for (kind, reach), sizes in buckets.items():
        for page, count in sizes.items():
            longer = widest // page if kind != "state" and widest % page == 0 else 1
            key = (kind, reach, block_size * longer)
            equal[key] = equal.get(key, 0) + count
    size = _group_size(equal.values())
    return tuple(
        Group(kind, size, block, size * widest, reach)
        for (kind, reach, block), count in equal.items()
        for _ in range(-(-count // size))
    )


def block_nbytes(groups: tuple[Group, ...]) -> int:
    """Bytes of one block of the pool."""
    return max(group.page_nbytes for group in groups)


def server_defaults(memory_nbytes: int | None, card: str = "") -> Mapping[str, int]:
    """``max_num_batched_tokens`` and ``max_num_seqs`` of the API server (``EngineArgs.get_batch_defaults``)."""
    memory = memory_nbytes or 0
    if memory >= 160 * GIB:
        return {"max_num_batched_tokens": 16384, "max_num_seqs": 1024}
    if memory >= 70 * GIB and "a100" not in card.lower():
        return {"max_num_batched_tokens": 8192, "max_num_seqs": 1024}
    return {"max_num_batched_tokens": 2048, "max_num_seqs": 256}
