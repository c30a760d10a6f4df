"""What the plugin tells vLLM of its two caches a layer, from 0.26 on.

A block of the *records* is one record a head, of a full-attention cache.  A block of the *exact* tokens is as many as
fit that page, of a sliding window that keeps ``residual_length`` tokens before the next one: the oldest exact token of
a row of ``n`` tokens is ``n - residual_length``.  A layer with a sliding window has such a cache alone.

A request is admitted with a window and a record's exact tokens.  One chunk in all is kept free besides: a step's new
tokens are ``max_num_batched_tokens`` at most over all requests, and their blocks fall out of the window with the next
step (vLLM's own windows count a chunk for every request).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from vllm.config import cache
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, SlidingWindowManager
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from kvruntime.paged import PageShape
from kvruntime.vllm.settings import CACHE_DTYPES, NAME

STATES = "tokens_per_state" in getattr(AttentionSpec, "__dataclass_fields__", {})
"""From 0.29 on a spec says itself how many tokens share a state, and caches are viewed as [blocks, heads, n, content].
Before that a backend gives its shape, and a spec's page size is a property."""


@dataclass(frozen=True, kw_only=True)
class RecordSpec(FullAttentionSpec):
    """Before 0.29: a page is one record a head."""

    num_words: int = 0

    @property
    def real_page_size_bytes(self) -> int:
        return 4 * self.num_words * self.num_kv_heads

    @classmethod
    def merge(cls, specs: Any) -> Any:
        if any(spec != specs[0] for spec in specs):
            raise ValueError(f"{NAME}: layers of one group whose records differ: {specs[0]} and others")
        return specs[0]


@dataclass(frozen=True, kw_only=True)
class ExactSpec(SlidingWindowSpec):
    """A window whose admission counts no chunk."""

    record_tokens: int = 0
    """Of the records beside it; 0: a layer's window, which packs nothing."""
    chunk_tokens: int = 0
    max_model_len: int = 0

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        tokens = min(self.sliding_window - 1 + self.record_tokens, max_model_len)
        return -(-tokens // self.block_size) + 1

    @property
    def chunk_blocks(self) -> int:
        return -(-self.chunk_tokens // self.block_size)

    @property
    def most_blocks(self) -> int:
        """What one request of ``max_model_len`` needs here, with its records and one chunk."""
        records = -(-self.max_model_len // self.record_tokens) if self.record_tokens else 0
        return self.max_admission_blocks_per_request(0, self.max_model_len) + records + self.chunk_blocks


class ExactManager(SlidingWindowManager):
    """Admits a request where the blocks of one chunk stay free besides its own."""

    most: ClassVar[WeakKeyDictionary[Any, int]] = WeakKeyDictionary()
    """Pools -> the blocks that the longest request needs of all groups: in a smaller pool it would wait for ever."""

    def __init__(self, kv_cache_spec: ExactSpec, *args: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, *args, **kwargs)
        self.chunk_blocks, pool = kv_cache_spec.chunk_blocks, self.block_pool
        self.most[pool] = self.most.get(pool, 1) + kv_cache_spec.most_blocks  # one block of a pool stays empty
        if pool.num_gpu_blocks < self.most[pool]:
            raise ValueError(
                f"{NAME}: {pool.num_gpu_blocks:,} blocks, a request of {kv_cache_spec.max_model_len:,} tokens and one "
                f"step's exact tokens take {self.most[pool]:,}: give more memory, or a smaller --max-model-len or "
                f"--max-num-batched-tokens"
            )

    def get_num_blocks_to_allocate(self, request_id: str, *args: Any, **kwargs: Any) -> int:
        wanted: int = super().get_num_blocks_to_allocate(request_id, *args, **kwargs)
        admitted = kwargs.get("apply_admission_cap", False) and request_id not in self.num_cached_block
        return wanted + self.chunk_blocks if admitted else wanted


def record_spec(spec: Any, shape: PageShape) -> Any:
    """A layer's full-attention spec with records for its content."""
    words = shape.record_nbytes // spec.num_kv_heads // 4
    if STATES:
        return replace(spec, tokens_per_state=shape.record_tokens, state_content_bytes=4 * words)
    return RecordSpec(
        block_size=spec.block_size,
        num_kv_heads=spec.num_kv_heads,
        head_size=spec.head_size,
        head_size_v=spec.head_size_v,
        dtype=torch.int32,
        num_words=words,
    )


def exact_spec(shape: PageShape, num_kv_heads: int, head_size: int, dtype: torch.dtype, config: Any) -> ExactSpec:
    """The window of a layer's exact tokens.  Its page is filled up to a record page."""
    return ExactSpec(
        block_size=shape.exact_tokens,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        head_size_v=head_size,
        dtype=dtype,
        sliding_window=shape.residual + 1,
        page_size_padded=shape.record_nbytes,
        record_tokens=shape.record_tokens,
        chunk_tokens=config.max_in_flight_tokens,
        max_model_len=longest(config.model_config),
    )


def longest(model_config: Any) -> int:
    """``max_model_len``; 0 where vLLM fits it to the memory later."""
    fitted = getattr(model_config, "original_max_model_len", None) == -1
    return 0 if fitted else int(model_config.max_model_len)


def window_spec(spec: Any, page_nbytes: int, dtype: torch.dtype, config: Any) -> ExactSpec:
    """A layer's sliding window, in pages of ``page_nbytes``, as many tokens in each as the largest power of two."""
    token = spec.num_kv_heads * (spec.head_size + spec.head_size_v) * dtype.itemsize
    if token > page_nbytes:
        raise ValueError(
            f"{NAME}: a window's token of {token:,} bytes in vLLM: allowed are up to a record's {page_nbytes:,}"
        )
    return ExactSpec(
        block_size=1 << (page_nbytes // token).bit_length() - 1,
        num_kv_heads=spec.num_kv_heads,
        head_size=spec.head_size,
        head_size_v=spec.head_size_v,
        dtype=dtype,
        sliding_window=spec.sliding_window,
        page_size_padded=page_nbytes,
        chunk_tokens=config.max_in_flight_tokens,
        max_model_len=longest(config.model_config),
    )


def take_cache_dtypes() -> None:
    """Enters the names of ``--kv-cache-dtype``, where vLLM takes any (0.33 on); plugins are loaded before they are
    checked."""
    register = getattr(cache, "register_kv_cache_dtype", None)
    if register is None:
        return
    from vllm.v1.kv_cache_interface import KVQuantMode

    class Words:
        """Of records: exact tokens are in the model's type."""

        name = ""

        def torch_dtype(self) -> torch.dtype:
            return torch.int32

        def quant_mode(self) -> Any:
            return KVQuantMode.CUSTOM

    for name in CACHE_DTYPES:
        if not cache.is_known_kv_cache_dtype(name):
            register(name)(type(name, (Words,), {"name": name}))


def take_specs() -> None:
    """Enters the managers of both, and has the plugin's layers give their own specs (before 0.29 of records too)."""
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(ExactSpec, ExactManager, SlidingWindowSpec)
    if not STATES:
        KVCacheSpecRegistry.register(RecordSpec, FullAttentionManager, FullAttentionSpec)
    from vllm.model_executor.layers.attention import Attention

    if getattr(Attention, NAME, False):
        return
    stock = Attention.get_kv_cache_spec

    def get_kv_cache_spec(self: Any, vllm_config: Any) -> Any:
        spec = stock(self, vllm_config)
        given = getattr(self.impl, "cache_spec", None)
        kinds = (SlidingWindowSpec,) if STATES else (SlidingWindowSpec, FullAttentionSpec)
        return spec if given is None or type(spec) not in kinds else given(spec, vllm_config)

    Attention.get_kv_cache_spec = get_kv_cache_spec
    setattr(Attention, NAME, True)
