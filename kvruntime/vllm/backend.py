"""vLLM's attention backend CUSTOM: :mod:`kvruntime.paged` over vLLM's pages.

A step's rows with one token come first (vLLM puts them there) and attend in one launch of the decode kernel.  Those of
prompts and drafts, behind them, attend in one line.  Tables, slots and lengths are vLLM's own tensors.  What is made
of them is made in the first layer's forward, so a full CUDA graph of a decode step holds that too.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, AttentionImpl, AttentionMetadataBuilder
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from kvruntime import paged
from kvruntime.vllm.settings import NAME, check_block_size, method_of, refuse, refuse_layer
from kvruntime.vllm.specs import ExactSpec, exact_spec, record_spec
from kvsim.layout import LayerShape

ON_CPU = "KVRUNTIME_VLLM_CPU"
"""vLLM's CPU platform takes no other backend than its own: with this variable set, this one has that name there."""


@dataclass
class Rows:
    """What a cache of either kind is told of a step."""

    starts: Tensor
    lengths: Tensor
    table: Tensor
    slots: Tensor
    num_decodes: int
    most: int
    num_tokens: int
    arrivals: Tensor
    parts: list[tuple[slice, paged.Batch]] | None = field(default=None)
    """Made with the other cache's tables, once a step: the line's tokens of a part, and its batch."""


class RowsBuilder(AttentionMetadataBuilder[Rows]):
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    reorder_batch_threshold: int = 1

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        rows = vllm_config.scheduler_config.max_num_seqs
        heads = vllm_config.model_config.get_num_attention_heads(vllm_config.parallel_config)
        self.arrivals = torch.zeros(2 * rows * heads, dtype=torch.int32, device=device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Rows:
        meta = common_attn_metadata
        num_decodes, *_ = split_decodes_and_prefills(meta, decode_threshold=1)
        num_rows = meta.num_reqs
        return Rows(
            meta.query_start_loc[: num_rows + 1],
            meta.seq_lens[:num_rows],
            meta.block_table_tensor,
            meta.slot_mapping,
            num_decodes,
            meta.max_query_len,
            int(meta.query_start_loc_cpu[num_rows]),
            self.arrivals,
        )


class Backend(AttentionBackend):
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto"]

    @staticmethod
    def get_builder_cls() -> type[RowsBuilder]:
        return RowsBuilder

    @staticmethod
    def get_impl_cls() -> type[PagedImpl]:
        return PagedImpl

    @classmethod
    def indexes_kv_by_block_stride(cls) -> bool:
        return True


class RecordBackend(Backend):
    """The layer's own cache: records."""

    @staticmethod
    def get_name() -> str:
        return "CPU_ATTN" if current_platform.is_cpu() else "CUSTOM"

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        """Before 0.29: ``[pool_size, num_kv_heads, words]``."""
        words = PagedImpl.pages[num_kv_heads, head_size].record_nbytes // num_kv_heads // 4
        return (num_blocks, num_kv_heads, words)

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """From 0.29 on."""
        return record_spec(spec, PagedImpl.pages[spec.num_kv_heads, spec.head_size])


class ExactBackend(Backend):
    """The window beside it: exact tokens, keys beside their values."""

    @staticmethod
    def get_name() -> str:
        return "KVRUNTIME_EXACT"

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        return (num_blocks, num_kv_heads, block_size, 2 * head_size)


class ExactCache(torch.nn.Module, AttentionLayerBase):
    """A layer's window: a cache without weights, which vLLM finds beside the attention layers."""

    def __init__(self, spec: ExactSpec) -> None:
        super().__init__()
        self.spec, self.kv_cache = spec, torch.tensor([])

    def get_attn_backend(self) -> type[ExactBackend]:
        return ExactBackend

    def get_kv_cache_spec(self, vllm_config: Any) -> ExactSpec:
        return self.spec


class PagedImpl(AttentionImpl[Rows]):
    """One attention layer."""

    pages: ClassVar[dict[tuple[int, int], paged.PageShape]] = {}
    """Heads and head dimension -> the pages of such layers: vLLM asks a class for them."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: Any = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        *,
        sinks: Tensor | None = None,
        **more: Any,
    ) -> None:
        config = get_current_vllm_config()
        refuse(config)
        refuse_layer(
            alibi_slopes=alibi_slopes,
            sliding_window=sliding_window,
            logits_soft_cap=logits_soft_cap,
            shared_cache_of=kv_sharing_target_layer_name,
            attention_sinks=sinks is not None,
            attention_type="" if attn_type == "decoder" else attn_type,
        )
        dtype = torch.get_default_dtype()
        heads = num_kv_heads or num_heads
        self.num_heads, self.num_kv_heads, self.head_size, self.scale = num_heads, heads, head_size, scale
        self.kv_cache_dtype = kv_cache_dtype
        self.method = method_of(config.additional_config, str(dtype).removeprefix("torch."))
        self.shape = check_block_size(
            self.method, LayerShape(heads, head_size, head_size), config.cache_config.block_size
        )
        self.pages[heads, head_size] = self.shape
        layers = config.compilation_config.static_forward_context
        number = sum(isinstance(layer, ExactCache) for layer in layers.values())
        self.exact_name = f"{NAME}_exact.{number}"
        self.exact = ExactCache(exact_spec(self.shape, heads, head_size, dtype, config))
        layers[self.exact_name] = self.exact

    def record_spec(self, spec: Any) -> Any:
        return record_spec(spec, self.shape)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Rows | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """``query [tokens, num_heads, head_size]``, ``key`` and ``value`` alike, and ``output``, which is returned."""
        if attn_metadata is None:  # the profiling run
            return output.fill_(0)
        rows = attn_metadata
        if rows.parts is None:
            rows.parts = self.parts(rows, get_forward_context().attn_metadata[self.exact_name])
        records = kv_cache.view(kv_cache.shape[0], self.num_kv_heads, -1).view(torch.int32)
        exact = self.exact.kv_cache  # [blocks, num_kv_heads, n, 2 * head_size]
        pages = paged.Pages(records, *exact.split(self.head_size, -1))
        out = output.view(-1, self.num_heads, self.head_size)
        query, key, value = (x.view(x.shape[0], -1, self.head_size) for x in (query, key, value))
        for tokens, batch in rows.parts:
            q, k, v, into = (x[tokens] for x in (query, key, value, out))
            paged.store(self.method, k, v, pages, batch)
            if q.is_cuda:
                paged.attend(self.method, q, k, v, pages, batch, self.scale, out=into, arrivals=rows.arrivals)
            else:
                into[: len(q)] = paged.attend(self.method, q, k, v, pages, batch, self.scale)
            paged.pack(self.method, pages, batch)
        return output

    def parts(self, rows: Rows, exact: Rows) -> list[tuple[slice, paged.Batch]]:
        """The step's rows of one token, and the others."""
        total, first = len(rows.lengths), rows.num_decodes
        out = []
        for start, end, most in ((0, first, 1), (first, total, rows.most)):
            if start == end:
                continue
            tokens = slice(start, end if most == 1 else rows.num_tokens)
            starts = rows.starts[start : end + 1]
            batch = paged.batch(
                self.method,
                starts - start if start else starts,
                rows.lengths[start:end],
                rows.table[start:end],
                exact.table[start:end],
                exact.slots[tokens],
                most,
            )
            out.append((tokens, batch))
        return out


def take_name() -> None:
    """This backend as CUSTOM, and where ``KVRUNTIME_VLLM_CPU`` is set as the CPU platform's."""
    path = f"{RecordBackend.__module__}.{RecordBackend.__qualname__}"
    register_backend(AttentionBackendEnum.CUSTOM, path)
    if current_platform.is_cpu() and os.environ.get(ON_CPU):
        register_backend(AttentionBackendEnum.CPU_ATTN, path)
