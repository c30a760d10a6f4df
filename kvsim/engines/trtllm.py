"""TensorRT-LLM: pools of blocks in a share of what is free (PyTorch backend; read in 1.1).

* A block is ``tokens_per_block`` tokens of every layer of one window; a request takes whole blocks.
* The cache gets ``free_gpu_memory_fraction`` of what weights, the CUDA context and a trial run's activations leave, not
  of the card: the rest stays free.
* A layer with a window holds the window's tokens and one more block (a pool for each width); states one a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvsim.engines.engine import Engine, Group, Pool
from kvsim.engines.ideal import Ideal
from kvsim.layout import LayerShape, Method, parts
from kvsim.methods import Fp8, Full, Nvfp4, placed
from kvsim.whole_numbers import check_whole

if TYPE_CHECKING:
    from kvsim.hardware import Hardware
    from kvsim.models.model import Model

GIB = 1 << 30
HELD = (Full, Fp8, Nvfp4)
"""The methods that TensorRT-LLM stores: kv_cache_config.dtype auto, fp8, nvfp4."""
INDEX_NBYTES = 132
"""Bytes a token of an index key of 128: fp8 codes and a float32 scale."""
ACTIVATION_NBYTES = 24
"""Estimate of a trial run's bytes a token and hidden channel: what vLLM's boot logs have for theirs."""
NON_TORCH, NON_TORCH_PARALLEL = int(0.6 * GIB), int(2.1 * GIB)
"""Estimate of the CUDA context on one card, with NCCL's buffers on each of several."""


@dataclass(frozen=True)
class Trtllm(Engine):
    """TensorRT-LLM's options, as it names them.

    ``max_num_tokens``: of a step, which the trial run fills.  Raises ``ValueError`` for a number out of range.
    """

    label = "TensorRT-LLM"
    cache_methods = ("fp8", "nvfp4")
    checkpoint_cache = True

    tokens_per_block: int = 32
    free_gpu_memory_fraction: float = 0.9
    max_num_tokens: int = 8192
    tensor_parallel_size: int = 1

    def __post_init__(self) -> None:
        for name in ("tokens_per_block", "max_num_tokens", "tensor_parallel_size"):
            check_whole(name.replace("_", "-"), getattr(self, name))
        if not 0 < self.free_gpu_memory_fraction <= 1:
            given = f"{self.free_gpu_memory_fraction:g}"
            raise ValueError(f"free-gpu-memory-fraction {given}: allowed are above 0 to 1")

    @property
    def name(self) -> str:
        return "trtllm"

    @property
    def gpu_memory_utilization(self) -> float:
        return 1.0

    @property
    def kept_free(self) -> float:
        return round(1 - self.free_gpu_memory_fraction, 12)

    @property
    def overhead_band(self) -> Mapping[str, tuple[float, float]]:
        return {"activation": (0.5, 2.0), "non_torch": (0.25, 1.5)}

    def overhead(self, model: Model, hardware: Hardware) -> dict[str, int]:
        return {
            "activation": ACTIVATION_NBYTES * self.max_num_tokens * model.hidden_size,
            "non_torch": NON_TORCH_PARALLEL if self.tensor_parallel_size > 1 else NON_TORCH,
        }

    def parts(self, model: Model, method: Method, batch_size: int, num_tokens: int) -> dict[str, int]:
        out = Ideal().parts(model, method, batch_size, num_tokens)
        if model.index_layers:
            out = {name: size for name, size in out.items() if not name.startswith("index_")}
            out["index_key"] = INDEX_NBYTES * batch_size * num_tokens * len(model.index_layers)
        states = sum(size for name, size in out.items() if name.startswith("state_"))
        groups = self.groups(model, method)
        taken = batch_size * sum(self._blocks(group, num_tokens) * group.page_nbytes for group in groups)
        out["padding"] = max(0, taken + states - sum(out.values()))
        return out

    def groups(self, model: Model, method: Method) -> tuple[Group, ...]:
        """The layers of each window, widest first: bytes of a block of theirs.

        Raises ``ValueError`` for a method or layer that TensorRT-LLM does not have."""
        sizes: dict[int | None, tuple[int, int]] = {}
        if model.index_layers:
            sizes[None] = (0, INDEX_NBYTES * self.tokens_per_block * len(model.index_layers))
        for (layer, chosen), count in placed(method, model.cache_layers).items():
            layers, size = sizes.get(layer.window, (0, 0))
            sizes[layer.window] = (layers + count, size + count * self._page(layer, chosen))
        ordered = sorted(sizes.items(), key=lambda item: item[0] is not None and -item[0])
        return tuple(
            Group("full" if reach is None else "window", layers, self.tokens_per_block, size, reach)
            for reach, (layers, size) in ordered
        )

    def _page(self, layer: LayerShape, method: Method) -> int:
        if not isinstance(method, HELD):
            raise ValueError(f"trtllm does not store {method.name}: allowed are fp16, bf16, fp32, fp8 and nvfp4")
        if layer.stride > 1:
            raise ValueError(f"trtllm: layers of {layer.stride} tokens an entry are not modelled")
        whole = layer if layer.window is None else LayerShape(layer.num_kv_heads, layer.key_dim, layer.value_dim)
        return sum(parts(method.buffers(whole, 1, self.tokens_per_block)).values())

    def _blocks(self, group: Group, num_tokens: int) -> int:
        """Blocks of a group that a request of so many tokens takes."""
        blocks = -(-num_tokens // group.block_size)
        return blocks if group.reach is None else min(blocks, -(-group.reach // group.block_size) + 1)

    def pool(self, model: Model, method: Method, available: int, max_model_len: int) -> Pool | None:
        """The blocks in ``available`` bytes; ``None`` where windows have pools of their own, or states share the room
        (the boot log has a line for each)."""
        groups = self.groups(model, method)
        if len(groups) != 1 or model.state_layers:
            return None
        block = groups[0].page_nbytes
        return Pool(max(0, available) // block, block, max_model_len, self._blocks(groups[0], max_model_len), groups)

    def shared_tokens(self, model: Model, method: Method, layer: LayerShape, chosen: Method, shared: int) -> int:
        """Whole blocks of layers that keep every token (block reuse); windows are counted a sequence."""
        return 0 if layer.window is not None else shared // self.tokens_per_block * self.tokens_per_block

    @classmethod
    def on(cls, card: Hardware | None, num_cards: int) -> dict[str, Any]:
        return {"tensor_parallel_size": num_cards}

    def notes(self, model: Model, method: Method) -> tuple[str, ...]:
        block = sum(group.page_nbytes for group in self.groups(model, method))
        out = [f"blocks of {self.tokens_per_block} tokens, {block:,} B each over all layers"]
        out.append(f"the cache gets {self.free_gpu_memory_fraction:.0%} of what is free (free_gpu_memory_fraction)")
        if any(layer.window is not None for layer in model.cache_layers):
            out.append("a window holds its tokens and one more block")
        return tuple(out)
