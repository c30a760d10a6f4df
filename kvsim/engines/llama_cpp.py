"""llama.cpp: one tensor a layer for keys and one for values, allocated whole when the context is made.

Read in src/llama-context.cpp, llama-kv-cache.cpp, llama-kv-cache-iswa.cpp and src/models/ (2026).

* ``n_ctx`` is padded to 256 cells.  Streams of their own (``kv_unified`` off) divide it among ``n_seq_max`` sequences
  and pad each to 256; a unified cache is one stream for all.  Both are counted here at what ``batch_size`` sequences
  of ``num_tokens`` tokens need.
* Which layers have a window is decided by architecture (:data:`kvsim.models.gguf_windows.WINDOWED`), whatever the
  config says: Mistral is of the ``llama`` architecture, which has none; ``phi3``'s is turned off.  Those layers hold
  the whole context.
* Layers with a window have a cache of their own: ``pad256(min(n_ctx, n_swa * (sequences if unified else 1) +
  n_ubatch))`` cells a stream.
* Latents (MLA) are stored once, as keys.  A quantized value type needs flash attention.
* States are float32, one cell a sequence, whatever the model's own type.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from kvsim.engines.engine import Engine
from kvsim.engines.ideal import Ideal
from kvsim.engines.states import served
from kvsim.layout import LayerShape, Method, nbytes
from kvsim.methods import Full, Ggml, placed
from kvsim.methods.ggml import PLAIN
from kvsim.models.gguf_windows import WINDOWED
from kvsim.whole_numbers import check_switch, check_whole

if TYPE_CHECKING:
    from kvsim.hardware import Hardware
    from kvsim.models.model import Model

EXAONE4_LAYERS = 64
"""exaone4 has its windows in the model of 64 layers alone."""

PAD = 256
MIB = 1 << 20
OVERHEAD_BAND: dict[str, tuple[float, float]] = {"compute": (0.9, 2.0), "runtime": (0.5, 1.6)}
"""Low and high over the estimate."""


@dataclass(frozen=True)
class LlamaCpp(Engine):
    """llama.cpp's ``--ubatch-size``, ``--flash-attn``, ``--kv-unified`` and ``--swa-full``, with its defaults.

    ``flash_attn``: without it a quantized value cache is refused, as llama.cpp refuses it.
    """

    cache_methods = ("q8_0", "q5_1", "q4_0")

    n_ubatch: int = 512
    flash_attn: bool = True
    kv_unified: bool = False
    swa_full: bool = False

    def __post_init__(self) -> None:
        check_whole("n_ubatch", self.n_ubatch)
        for name in ("flash_attn", "kv_unified", "swa_full"):
            check_switch(name, getattr(self, name))

    @property
    def name(self) -> str:
        return "llama.cpp"

    @property
    def overhead_band(self) -> dict[str, tuple[float, float]]:
        """Low and high of each overhead, over the estimate."""
        return OVERHEAD_BAND

    def cells(self, layer: LayerShape, batch_size: int, num_tokens: int) -> int:
        """Cells of one layer's cache over all streams."""
        streams = 1 if self.kv_unified else batch_size
        context = _padded(batch_size * num_tokens // streams)
        if layer.window is None or self.swa_full:
            return streams * context
        sequences = batch_size if self.kv_unified else 1
        return streams * _padded(min(context, layer.window * sequences + self.n_ubatch))

    def held(self, model: Model) -> Model:
        """``model`` with the windows that llama.cpp does not apply taken off its layers."""
        if windowed(model) or all(layer.window is None for layer in model.cache_layers):
            return model
        return _whole(model)

    def parts(self, model: Model, method: Method, batch_size: int, num_tokens: int) -> dict[str, int]:
        model, total = self.held(model), 0
        for (layer, chosen), count in placed(method, model.cache_layers).items():
            self._check(layer, chosen)
            cells = self.cells(layer, batch_size, num_tokens)
            total += count * nbytes(chosen.buffers(replace(layer, window=None, kind=""), 1, cells))
        out = Ideal().parts(model, method, batch_size, num_tokens)
        cache = sum(size for name, size in out.items() if not name.startswith(("state_", "index_")))
        out["padding"] = total - cache
        if model.state_layers:
            out = {name: size for name, size in out.items() if not name.startswith("state_")}
            for state, count in Counter(model.state_layers).items():
                for buffer in served(state, "float32", "float32").buffers(batch_size):
                    key = f"state_{buffer.name}"
                    out[key] = out.get(key, 0) + count * buffer.nbytes
        return out

    def _check(self, layer: LayerShape, method: Method) -> None:
        if not isinstance(method, (Full, Ggml)):
            allowed = "fp16, bf16, fp32, q8_0, q5_1, q5_0, q4_1, q4_0 and ggml"
            raise ValueError(f"llama.cpp does not store {method.name}: it has {allowed}")
        if layer.stride > 1:
            raise ValueError(f"llama.cpp: its cache for {layer.kind} layers is not modelled")
        if isinstance(method, Ggml) and method.value_type not in PLAIN and not self.flash_attn and layer.value_dim:
            raise ValueError(f"llama.cpp: values in {method.value_type} need flash attention (--flash-attn on)")

    def overhead(self, model: Model, hardware: Hardware) -> dict[str, int]:
        """``compute``: the graph's buffer, float32 logits and one hidden row of a micro-batch; ``runtime``: CUDA's own.

        With flash attention the first is what llama.cpp prints: 258.50 MiB for Llama-3-8B, 300.75 for Qwen2.5-3B.
        """
        widest = max(model.vocab_size or 0, 8 * model.hidden_size)
        return {"compute": 4 * self.n_ubatch * (widest + model.hidden_size), "runtime": 400 * MIB}

    def notes(self, model: Model, method: Method) -> tuple[str, ...]:
        out = [f"the context is padded to {PAD} cells and allocated whole"]
        held = self.held(model)
        if held is not model:
            windows = sorted({layer.window for layer in model.cache_layers if layer.window is not None})
            what = ", ".join(f"{window:,}" for window in windows)
            out.append(f"no window in its architecture of {model.model_type}: the window {what} is not applied")
            model = held
        if any(layer.window is not None for layer in model.cache_layers):
            out.append(
                "windows at the full context (--swa-full)"
                if self.swa_full
                else f"a window keeps its width and {self.n_ubatch} cells (n_ubatch), padded to {PAD}"
            )
        if model.state_layers:
            out.append("states in float32")
        if isinstance(method, Ggml) and method.value_type not in PLAIN:
            out.append("a quantized value cache needs flash attention")
        return tuple(out)


@lru_cache(maxsize=256)
def _whole(model: Model) -> Model:
    """``model`` without windows."""
    return replace(
        model,
        layers=tuple(
            replace(layer, window=None, kind="" if layer.kind == "chunked" else layer.kind)
            if isinstance(layer, LayerShape) and layer.window is not None
            else layer
            for layer in model.layers
        ),
    )


def windowed(model: Model) -> bool:
    """Whether llama.cpp applies the windows of such a model, named by ``model_type`` or by GGUF architecture."""
    name = model.model_type
    arch = next((arch for arch, types in WINDOWED.items() if name == arch or name in types), None)
    if arch == "exaone4":
        return sum(count for _, count in model.kinds) == EXAONE4_LAYERS
    return arch is not None


def _padded(cells: int) -> int:
    return -(-cells // PAD) * PAD
