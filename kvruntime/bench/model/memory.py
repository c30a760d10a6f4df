"""What a cache really weighs: real tensors filled by the real model, unique storages counted, the allocator asked."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from kvruntime.bench.harness.weigh import weigh
from kvruntime.bench.model.caches import Contender
from kvruntime.checkpoints.load import LoadedModel
from kvsim.layout import LayerShape, nbytes, parts, shared_buffers
from kvsim.methods import in_order

FORWARD, FILLED = "forward", "filled"


def how_weighed(max_positions: int | None, num_tokens: int) -> str:
    """``forward`` where the model has positions for the tokens, else ``filled``: random keys and values, no forward."""
    return FORWARD if max_positions is None or num_tokens <= max_positions else FILLED


def measure_memory(
    loaded: LoadedModel, contender: Contender, num_tokens: int, batch_size: int, seed: int
) -> dict[str, Any]:
    """Bytes that ``contender``'s cache holds after ``num_tokens`` random tokens of ``batch_size`` sequences.

    All but the last token are prefilled at once (and weighed), the last is decoded (and weighed again).  On CUDA the
    allocator's own figures stand beside: bytes allocated for the cache, and the peak above the weights in prefill
    and in decode, activations included.
    """
    if num_tokens < 2:
        raise ValueError(f"{num_tokens} tokens: allowed are 2 and above")
    how = how_weighed(loaded.max_positions, num_tokens)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(loaded.vocab_size, (batch_size, num_tokens), generator=generator).to(loaded.device)
    with torch.inference_mode(), contender.around(loaded.model):
        if loaded.device.type == "cuda":  # the first matrix product allocates workspaces that stay
            loaded.model(ids[:, :2], use_cache=False, logits_to_keep=1)
        allocator = _Allocator(loaded.device)
        cache = (contender.weighed or contender.build)(loaded.model, num_tokens)
        step = _forward(loaded, cache, ids) if how == FORWARD else _fill(loaded, cache, batch_size)
        step(num_tokens - 1)
        after_prefill = weigh(cache)
        row: dict[str, Any] = dict(allocator.read("prefill"))
        step(1)
        row |= {"how": how, "nbytes_after_prefill": after_prefill, "nbytes": weigh(cache)} | allocator.read("decode")
    if contender.method is not None:
        shapes = layer_shapes(loaded.model)
        methods = zip(in_order(contender.method, shapes), shapes, strict=True)
        predicted = [method.buffers(shape, batch_size, num_tokens) for method, shape in methods]
        predicted.append(shared_buffers(contender.method, shapes))
        row["predicted_nbytes"] = sum(nbytes(buffers) for buffers in predicted)
        row["error"] = row["nbytes"] / row["predicted_nbytes"] - 1
        row["parts"] = parts([buffer for buffers in predicted for buffer in buffers])
    return row


def layer_shapes(model: Any) -> list[LayerShape]:
    """The model's layers as kvruntime sees them."""
    from kvruntime.hf.models import layer_shapes

    return layer_shapes(model)


def _forward(loaded: LoadedModel, cache: Any, ids: torch.Tensor) -> Callable[[int], None]:
    from kvruntime.hf.cache import argument

    done = 0

    def step(count: int) -> None:
        nonlocal done
        loaded.model(ids[:, done : done + count], **argument(cache), use_cache=True, logits_to_keep=1)
        done += count

    return step


def _fill(loaded: LoadedModel, cache: Any, batch_size: int) -> Callable[[int], None]:
    shapes = layer_shapes(loaded.model)

    def step(count: int) -> None:
        for index, shape in enumerate(shapes):
            key, value = (
                torch.randn(batch_size, shape.num_kv_heads, count, dim, device=loaded.device, dtype=loaded.model.dtype)
                for dim in (shape.key_dim, shape.value_dim)
            )
            fill_layer(cache, index, key, value)

    return step


def fill_layer(cache: Any, index: int, key: torch.Tensor, value: torch.Tensor) -> None:
    """Puts tokens into one layer of any transformers cache: both ``[batch_size, num_kv_heads, L, dim]``."""
    layer: Any = cache.layers[index] if index < len(cache.layers) else None
    if hasattr(layer, "pend"):  # ours, as its attention function has it store: without a copy of the past
        layer.pend(key, value)
        layer.append(key, value, None)
    else:
        cache.update(key, value, index)


class _Allocator:
    """CUDA's allocated bytes and their peak since the start; nothing elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.device = device if device.type == "cuda" else None
        if self.device is not None:
            gc.collect()
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.start = torch.cuda.memory_allocated(self.device)

    def read(self, phase: str) -> dict[str, int]:
        """``{phase}_allocated_nbytes`` and ``{phase}_peak_nbytes`` above the start; the peak starts anew."""
        if self.device is None:
            return {}
        torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device) - self.start
        held = torch.cuda.memory_allocated(self.device) - self.start
        torch.cuda.reset_peak_memory_stats(self.device)
        return {f"{phase}_allocated_nbytes": held, f"{phase}_peak_nbytes": peak}
