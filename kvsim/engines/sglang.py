"""SGLang: one flat pool of tokens over all layers, in pages (srt/mem_cache, srt/server_args.py; read in 0.5.9).

* A slot is a token of every layer: keys and values, or one latent.  The pool has as many as ``mem_fraction_static`` of
  the memory (what is free before the weights) leaves beside the weights, in whole pages, and a spare page that padded
  rows write to.  A request takes whole pages.
* Models with windows beside full attention have a second pool for them of ``swa_full_tokens_ratio`` as many slots; a
  request holds a window and the chunk of a prompt there.  A model of windows alone keeps every token.
* Activations and CUDA graphs are outside the fraction.  By default it leaves for them 1.5 MiB a token of
  ``chunked_prefill_size``, 2 MiB a row of the largest CUDA graph, 0.5 GiB, and 128 MiB a card that shares the model; at
  least 10 GiB on cards of more than 60 GiB (``_handle_gpu_memory_settings``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvsim.engines.engine import Engine, Group, Pool
from kvsim.engines.ideal import Ideal
from kvsim.layout import LayerShape, Method, nbytes, parts
from kvsim.methods import Fp8, Full, Nvfp4, placed
from kvsim.whole_numbers import check_whole

if TYPE_CHECKING:
    from kvsim.hardware import Hardware
    from kvsim.models.model import Model

GIB = 1 << 30
HELD = (Full, Fp8, Nvfp4)
"""The methods that SGLang stores: --kv-cache-dtype auto, fp8_e4m3 or fp8_e5m2, nvfp4."""
INDEX_NBYTES = 132
"""Bytes a token of an index key of 128: fp8 codes and a float32 scale."""
CONTEXT, CONTEXT_PARALLEL = int(1.2 * GIB), int(2.1 * GIB)
"""Estimate of what is gone before the weights are loaded: the CUDA context on one card (1.2 GiB of an H100's 79.65 in a
boot log of 0.5.8), with NCCL's buffers on each of several (as vLLM's logs have them)."""
CHUNKS = ((35, 2048), (60, 4096), (160, 8192))
"""``chunked_prefill_size`` on cards below so many GiB; 16384 on larger ones."""
ROWS = ((20, (8, 8)), (35, (24, 80)), (60, (32, 160)), (90, (256, 512)), (160, (256, 512)))
"""Rows of the largest CUDA graph on cards below so many GiB, below and from 4 cards that share the model; else 512."""


@dataclass(frozen=True)
class Sglang(Engine):
    """SGLang's flags, as it names them.

    ``mem_fraction_static`` and ``chunked_prefill_size`` default to those of an H100 server of one card; others have
    their own (:func:`server_defaults`).  ``page_size``: 1, or what an attention backend asks for (64 for FlashMLA and
    TensorRT-LLM's latent kernels, 128 for CUTLASS').  Raises ``ValueError`` for a number out of range.
    """

    label = "SGLang"
    cache_methods = ("fp8", "nvfp4")
    checkpoint_cache = True

    mem_fraction_static: float = 0.836
    page_size: int = 1
    chunked_prefill_size: int = 8192
    swa_full_tokens_ratio: float = 0.8
    tensor_parallel_size: int = 1

    def __post_init__(self) -> None:
        for name in ("page_size", "chunked_prefill_size", "tensor_parallel_size"):
            check_whole(name.replace("_", "-"), getattr(self, name))
        for name in ("mem_fraction_static", "swa_full_tokens_ratio"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name.replace('_', '-')} {getattr(self, name):g}: allowed are above 0 to 1")

    @property
    def name(self) -> str:
        return "sglang"

    @property
    def gpu_memory_utilization(self) -> float:
        return self.mem_fraction_static

    @property
    def overhead_band(self) -> Mapping[str, tuple[float, float]]:
        return {"context": (0.5, 1.5)}

    def overhead(self, model: Model, hardware: Hardware) -> dict[str, int]:
        gone = CONTEXT_PARALLEL if self.tensor_parallel_size > 1 else CONTEXT
        return {"context": int(gone * self.mem_fraction_static)}  # the fraction is of what is free after it

    def parts(self, model: Model, method: Method, batch_size: int, num_tokens: int) -> dict[str, int]:
        full, window = self._slots(model, method)
        out = Ideal().parts(model, method, batch_size, num_tokens)
        if model.index_layers:
            out = {name: size for name, size in out.items() if not name.startswith("index_")}
            out["index_key"] = INDEX_NBYTES * batch_size * num_tokens * len(model.index_layers)
        states = sum(size for name, size in out.items() if name.startswith("state_"))
        pages = batch_size * self._pages(model, num_tokens, bool(window))
        slots = pages * self.page_size * full + int(pages * self.swa_full_tokens_ratio + 1) * self.page_size * window
        out["padding"] = max(0, slots + states - sum(out.values()))
        out["spare_page"] = self.page_size * (full + window)
        return out

    def _slots(self, model: Model, method: Method) -> tuple[int, int]:
        """Bytes of a slot over the layers that keep every token, and over those of the windows' pool."""
        full, window = INDEX_NBYTES * len(model.index_layers), 0
        hybrid = any(layer.window is None for layer in model.cache_layers)
        for (layer, chosen), count in placed(method, model.cache_layers).items():
            size = count * self._slot(layer, chosen)
            if layer.window is not None and hybrid:
                window += size
            else:
                full += size
        return full, window

    def _slot(self, layer: LayerShape, method: Method) -> int:
        if not isinstance(method, HELD):
            raise ValueError(f"sglang does not store {method.name}: allowed are fp16, bf16, fp32, fp8 and nvfp4")
        if layer.stride > 1:
            raise ValueError(f"sglang: layers of {layer.stride} tokens an entry are not modelled")
        held = 64  # whole scales of any method
        return -(-sum(parts(method.buffers(layer, 1, held)).values()) // held)

    def slot_nbytes(self, model: Model, method: Method) -> int:
        """Bytes of a token's slot over all layers."""
        return sum(self._slots(model, method))

    def _pages(self, model: Model, num_tokens: int, windows: bool) -> int:
        """Pages of the full pool that a request takes, or that the windows' pool, in proportion to it, has it take."""
        pages = -(-num_tokens // self.page_size)
        if not windows:
            return pages
        widest = max(layer.window for layer in model.cache_layers if layer.window is not None)
        reach = -(-min(num_tokens, widest + self.chunked_prefill_size) // self.page_size)
        return max(pages, -int(-reach // self.swa_full_tokens_ratio))

    def pool(self, model: Model, method: Method, available: int, max_model_len: int) -> Pool:
        """The pool in ``available`` bytes: pages (the spare one is not among them), of which requests take whole ones.
        ``max_total_num_tokens`` of the boot log is pages times ``page_size``; states share the room with it."""
        full, window = self._slots(model, method)
        page = int(self.page_size * (full + self.swa_full_tokens_ratio * window))
        if not page:
            raise ValueError("sglang: the model has no layer with a cache that grows")
        own = self._pages(model, max_model_len, bool(window))
        states = sum(nbytes(state.buffers(1)) for state in model.state_layers)
        each = page + states / own  # a request's states, over its pages
        pages = max(0, int(available / each) - 1)
        layers = len(model.cache_layers)
        return Pool(pages, page, max_model_len, own, (Group("full", layers, self.page_size, page),))

    def shared_tokens(self, model: Model, method: Method, layer: LayerShape, chosen: Method, shared: int) -> int:
        """Whole pages of layers that keep every token; windows are counted a sequence."""
        return 0 if layer.window is not None else shared // self.page_size * self.page_size

    @classmethod
    def on(cls, card: Hardware | None, num_cards: int) -> dict[str, Any]:
        flags: dict[str, Any] = {"tensor_parallel_size": num_cards}
        return flags if card is None or card.memory_nbytes is None else flags | server_defaults(card, num_cards)

    def notes(self, model: Model, method: Method) -> tuple[str, ...]:
        full, window = self._slots(model, method)
        out = [f"a slot a token over all layers, {full + window:,} B, in pages of {self.page_size}; a page is spare"]
        if window:
            share = f"{self.swa_full_tokens_ratio:g}"
            out.append(f"windows have a pool of their own, of {share} times as many slots as full attention")
        elif any(layer.window is not None for layer in model.cache_layers):
            out.append("a model of windows alone keeps every token")
        if model.state_layers:
            out.append("a state a sequence; the radix cache keeps further ones")
        return tuple(out)


def server_defaults(card: Hardware, num_cards: int) -> dict[str, Any]:
    """``chunked_prefill_size`` and ``mem_fraction_static`` of a server on ``num_cards`` of this card."""
    assert card.memory_nbytes is not None
    mib = card.memory_nbytes / (1 << 20)
    chunk = next((size for below, size in CHUNKS if mib < below * 1024), 16384)
    few, many = next((rows for below, rows in ROWS if mib < below * 1024), (512, 512))
    reserved = 512 + max(chunk, 2048) * 1.5 + 2 * (few if num_cards < 4 else many) + num_cards / 8 * 1024
    if mib > 60 * 1024:
        reserved = max(reserved, 10 * 1024)
    fraction = round((mib - reserved) / mib, 3)
    return {"chunked_prefill_size": chunk, "mem_fraction_static": max(0.05, fraction)}
