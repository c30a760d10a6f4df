"""vLLM's attention backend CUSTOM: :mod:`kvruntime.paged` over vLLM's pages.

A step's rows with one token come first (vLLM puts them there) and attend in one launch of the decode kernel.  Those of
prompts and drafts, behind them, attend in one line.  Tables, slots and lengths are vLLM's own tensors.  What is made
of them is made in the first layer's forward, so a full CUDA graph of a decode step holds that too.

Where vLLM has FlashAttention, prompts and drafts go there: a launch writes a row's packed tokens as numbers to a
workspace, one layer's at a time, with the exact and the new ones behind them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.distributed import get_pp_group
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, AttentionImpl, AttentionMetadataBuilder
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import SlidingWindowSpec

from kvruntime import paged
from kvruntime.vllm.settings import CACHE_DTYPES, NAME, check_block_size, check_pages, method_of, refuse, refuse_layer
from kvruntime.vllm.specs import ExactSpec, exact_spec, record_spec, window_spec
from kvruntime.vllm.windows import attend_window
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
    begins: list[int]
    """``starts`` on the host."""
    host_lengths: list[int] | None
    """``lengths`` on the host, or more; None: they are not known."""
    arrivals: Tensor
    parts: list[Part] | None = field(default=None)
    """Made with the other cache's tables, once a step."""

    @property
    def most(self) -> int:
        """Tokens that a row brings, at the most."""
        return max((b - a for a, b in pairwise(self.begins)), default=1)


class Part(NamedTuple):
    """Some rows of a step that attend in one launch."""

    tokens: slice
    """Of the line of all rows' tokens."""
    batch: paged.Batch
    begins: Tensor | None = None
    """Where each row's tokens begin in the workspace; None: it is not used."""
    total: int = 0
    longest: int = 0


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
        begins = meta.query_start_loc_cpu[: num_rows + 1].tolist()
        lengths = getattr(meta, "seq_lens_cpu_upper_bound", None)
        return Rows(
            meta.query_start_loc[: num_rows + 1],
            meta.seq_lens[:num_rows],
            meta.block_table_tensor,
            meta.slot_mapping,
            num_decodes,
            begins if num_decodes < num_rows else [],
            None if lengths is None or num_decodes == num_rows else lengths[:num_rows].tolist(),
            self.arrivals,
        )


class Backend(AttentionBackend):
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", *CACHE_DTYPES]

    @staticmethod
    def get_builder_cls() -> type[RowsBuilder]:
        return RowsBuilder

    @staticmethod
    def get_impl_cls() -> type[PagedImpl]:
        return PagedImpl

    @classmethod
    def indexes_kv_by_block_stride(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True


class RecordBackend(Backend):
    """The layer's own cache: records, or in a layer with a sliding window its exact tokens."""

    @staticmethod
    def get_name() -> str:
        return "CPU_ATTN" if current_platform.is_cpu() else "CUSTOM"

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        """Before 0.29: ``[pool_size, num_kv_heads, words]``; a window's block is no record."""
        shape = PagedImpl.pages.get((num_kv_heads, head_size))
        if shape is None or block_size != shape.record_tokens:
            return ExactBackend.get_kv_cache_shape(num_blocks, block_size, num_kv_heads, head_size)
        return (num_blocks, num_kv_heads, shape.record_nbytes // num_kv_heads // 4)

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """From 0.29 on."""
        if isinstance(spec, SlidingWindowSpec):
            return spec
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
    workspaces: ClassVar[dict[tuple[Any, ...], Tensor]] = {}
    compiled: ClassVar[set[tuple[Any, ...]]] = set()
    """Of which layers a step's kernels were compiled."""

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
            logits_soft_cap=logits_soft_cap,
            shared_cache_of=kv_sharing_target_layer_name,
            attention_sinks=sinks is not None,
            attention_type="" if attn_type == "decoder" else attn_type,
        )
        dtype = self.dtype = torch.get_default_dtype()
        heads = num_kv_heads or num_heads
        self.num_heads, self.num_kv_heads, self.head_size, self.scale = num_heads, heads, head_size, scale
        self.kv_cache_dtype = kv_cache_dtype
        asked = config.cache_config.cache_dtype
        self.method = method_of(config.additional_config, str(dtype).removeprefix("torch."), asked)
        self.flash, self.window = flash_attention(dtype), sliding_window
        if sliding_window is not None:
            return
        self.shape = check_block_size(
            self.method, LayerShape(heads, head_size, head_size), config.cache_config.block_size
        )
        layers = config.compilation_config.static_forward_context
        others = [getattr(layer, "impl", None) for layer in layers.values()]
        number = sum(isinstance(impl, PagedImpl) and impl.window is None for impl in others)
        if not number:  # the first of an engine: what another of this process had is none of it
            self.pages.clear()
        self.pages[heads, head_size] = self.shape
        self.exact: ExactCache | None = None
        if self.shape.exact_tokens:
            stage = get_pp_group().rank_in_group * config.model_config.get_total_num_hidden_layers()
            self.exact_name = f"{NAME}_exact.{stage + number}"  # vLLM merges what stages name alike
            self.exact = ExactCache(exact_spec(self.shape, heads, head_size, dtype, config))
            layers[self.exact_name] = self.exact
        self.longest, self.most_rows = config.model_config.max_model_len, config.scheduler_config.max_num_seqs
        self.room = max(self.longest, config.scheduler_config.max_num_batched_tokens)

    def cache_spec(self, spec: Any, config: Any) -> Any:
        """This layer's own cache in place of what vLLM would keep for it."""
        if self.window is None:
            return record_spec(spec, self.shape)
        return window_spec(spec, check_pages(self.pages.values()), self.dtype, config)

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
        if attn_metadata is None:  # the profiling run, in whose peak the workspace is counted
            if self.window is None:
                self.workspace(output)
                self.compile_step(query)
            return output.fill_(0)
        rows = attn_metadata
        out = output.view(-1, self.num_heads, self.head_size)
        query, key, value = (x.view(x.shape[0], -1, self.head_size) for x in (query, key, value))
        if self.window is not None:
            attend_window(query, key, value, out, kv_cache, rows, self.window, self.scale)
            return output
        if rows.parts is None:
            metadata = get_forward_context().attn_metadata
            rows.parts = self.parts(rows, None if self.exact is None else metadata[self.exact_name])
        records = kv_cache.view(kv_cache.shape[0], self.num_kv_heads, -1).view(torch.int32)
        nothing = 0, self.num_kv_heads, 0, 2 * self.head_size
        exact = key.new_empty(nothing) if self.exact is None else self.exact.kv_cache  # [blocks, heads, n, 2 * dim]
        self.step(query, key, value, out, paged.Pages(records, *exact.split(self.head_size, -1)), rows)
        return output

    def step(self, query: Tensor, key: Tensor, value: Tensor, out: Tensor, pages: paged.Pages, rows: Rows) -> None:
        """Stores, packs and attends, ``rows.parts`` one by one."""
        assert rows.parts is not None
        for part in rows.parts:  # a row may read what another stores in this step: a prefix that both have
            paged.store(self.method, key[part.tokens], value[part.tokens], pages, part.batch)
            paged.pack(self.method, pages, part.batch)
        for part in rows.parts:
            q, k, v, into = (x[part.tokens] for x in (query, key, value, out))
            batch = part.batch
            if part.begins is not None:
                self.attend_by_flash(q, k, v, into, pages, part)
            elif q.is_cuda:
                paged.attend(self.method, q, k, v, pages, batch, self.scale, out=into, arrivals=rows.arrivals)
            else:
                into[: len(q)] = paged.attend(self.method, q, k, v, pages, batch, self.scale)

    def compile_step(self, like: Tensor) -> None:
        """A step of a row that brings a token and one that brings several, in a page of its own, and on a GPU attention
        of single tokens of every number of rows, whose work is split by other plans: kernels are compiled at start, and
        no request waits for them."""
        heads, dim = self.num_kv_heads, self.head_size
        kind = (like.device, like.dtype, self.num_heads, heads, dim, self.method, self.longest, self.most_rows)
        if kind in self.compiled or (like.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        self.compiled.add(kind)
        record, page = self.shape.record_tokens, self.shape.exact_tokens
        many = min(2 * record, self.longest)
        begins, lengths = [0, 1, 1 + many], [1, many]

        def rows(size: int) -> Rows:
            starts, held = (torch.tensor(each, dtype=torch.int32, device=like.device) for each in (begins, lengths))
            table = torch.zeros(2, -(-self.longest // size), dtype=torch.int32, device=like.device)
            slots = torch.full((1 + many,), -1, dtype=torch.int64, device=like.device)
            arrivals = torch.zeros(4 * self.num_heads, dtype=torch.int32, device=like.device)
            return Rows(starts, held, table, slots, 1, begins, lengths, arrivals)

        both = rows(record)
        both.parts = self.parts(both, rows(page) if page else None)
        words = self.shape.record_nbytes // heads // 4
        records = torch.zeros(1, heads, words, dtype=torch.int32, device=like.device)
        exact = torch.zeros(1, heads, page, 2 * dim, dtype=self.dtype, device=like.device)
        query, key, value, out = (
            like.new_zeros(1 + many, n, dim) for n in (self.num_heads, heads, heads, self.num_heads)
        )
        pages = paged.Pages(records, *exact.split(dim, -1))
        self.step(query, key, value, out, pages, both)
        if like.is_cuda:
            self.compile_rows(like, pages)

    def compile_rows(self, like: Tensor, pages: paged.Pages) -> None:
        """Attention of single tokens, of two rows, three, and so on to the most that a step has: of one token each."""
        most, heads, page = self.most_rows, self.num_kv_heads, self.shape.exact_tokens
        counted = torch.arange(most + 1, dtype=torch.int32, device=like.device)
        ones = torch.ones(most, dtype=torch.int32, device=like.device)
        table, places = (
            torch.zeros(most, -(-self.longest // size) if size else 0, dtype=torch.int32, device=like.device)
            for size in (self.shape.record_tokens, page)
        )
        slots = torch.full((most,), -1, dtype=torch.int64, device=like.device)
        query, new = (like.new_zeros(most, n, self.head_size) for n in (self.num_heads, heads))
        arrivals = torch.zeros(2 * most * self.num_heads, dtype=torch.int32, device=like.device)
        for n in range(2, most + 1):
            batch = paged.batch(self.method, counted[: n + 1], ones[:n], table[:n], places[:n], slots[:n], 1)
            paged.attend(
                self.method, query[:n], new[:n], new[:n], pages, batch, self.scale,
                out=torch.empty_like(query[:n]), arrivals=arrivals,
            )  # fmt: skip

    def workspace(self, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """Keys and values of one layer's rows, ``[room, num_kv_heads, head_size]`` each; None where no one reads it."""
        if self.flash is None:
            return None
        kind = (like.device, like.dtype, self.num_kv_heads, self.head_size)
        if kind not in self.workspaces:
            made = torch.empty(2, self.room, self.num_kv_heads, self.head_size, dtype=like.dtype, device=like.device)
            self.workspaces[kind] = made
        return tuple(self.workspaces[kind])  # type: ignore[return-value]

    def attend_by_flash(self, query: Tensor, key: Tensor, value: Tensor, out: Tensor, pages: Any, part: Part) -> None:
        room = self.workspace(query)
        assert room is not None
        assert self.flash is not None
        both = (room[0][: part.total], room[1][: part.total])
        paged.gather(self.method, key, value, pages, part.batch, part.begins, both)
        attend, version = self.flash
        attend(
            q=query,
            k=both[0],
            v=both[1],
            max_seqlen_q=part.batch.most,
            cu_seqlens_q=part.batch.starts,
            max_seqlen_k=part.longest,
            cu_seqlens_k=part.begins,
            softmax_scale=self.scale,
            causal=True,
            fa_version=version,
            out=out,
        )

    def parts(self, rows: Rows, exact: Rows | None) -> list[Part]:
        """The step's rows of one token, and the others: in one line, or as many as the workspace has room for.

        ``exact``: what the cache of exact tokens is told; None: the method has none, and slots are places of records.
        """
        total, first, by_flash = len(rows.lengths), rows.num_decodes, False
        runs = [(0, first)] if first else []
        if first < total:
            by_flash = self.flash is not None and rows.host_lengths is not None
            runs += self.fitting(rows, first, total) if by_flash else [(first, total)]
        out = []
        for start, end in runs:
            single = end <= first
            tokens = slice(start, end) if single else slice(rows.begins[start], rows.begins[end])
            starts = rows.starts[start : end + 1]
            batch = paged.batch(
                self.method,
                starts if single else starts - rows.begins[start],
                rows.lengths[start:end],
                rows.table[start:end],
                rows.table[start:end, :0] if exact is None else exact.table[start:end],
                (rows if exact is None else exact).slots[tokens],
                1 if single else max(b - a for a, b in pairwise(rows.begins[start : end + 1])),
            )
            part = Part(tokens, batch)
            if by_flash and not single:
                assert rows.host_lengths is not None
                begins = torch.nn.functional.pad(batch.lengths.cumsum(0, dtype=torch.int32), (1, 0))
                lengths = rows.host_lengths[start:end]
                part = part._replace(begins=begins, total=sum(lengths), longest=max(lengths))
            out.append(part)
        return out

    def fitting(self, rows: Rows, first: int, total: int) -> list[tuple[int, int]]:
        """Runs of rows whose tokens the workspace has room for."""
        assert rows.host_lengths is not None
        out, start, held = [], first, 0
        for row in range(first, total):
            if held + rows.host_lengths[row] > self.room and row > start:
                out.append((start, row))
                start, held = row, 0
            held += rows.host_lengths[row]
        return [*out, (start, total)]


def flash_attention(dtype: torch.dtype) -> tuple[Any, int] | None:
    """vLLM's FlashAttention and its version; None where there is none for ``dtype``."""
    if not current_platform.is_cuda() or dtype == torch.float32:
        return None
    try:
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version
    except ImportError:
        return None
    version = get_flash_attn_version()
    return None if version is None else (flash_attn_varlen_func, version)


def take_name() -> None:
    """This backend as CUSTOM, and where ``KVRUNTIME_VLLM_CPU`` is set as the CPU platform's."""
    path = f"{RecordBackend.__module__}.{RecordBackend.__qualname__}"
    register_backend(AttentionBackendEnum.CUSTOM, path)
    if current_platform.is_cpu() and os.environ.get(ON_CPU):
        register_backend(AttentionBackendEnum.CPU_ATTN, path)
