"""A model from a GGUF header alone: layers from its metadata and tensor names, weights from the tensors themselves.

What a block leaves follows from the tensors that it has (keys and values, a latent, a state-space layer, a short
convolution); heads, widths and windows come from the metadata, and must agree with the tensors' shapes.  The one
thing that llama.cpp knows by heart, which layers slide, stands in :data:`WINDOWS`.  Whether llama.cpp itself applies
a window is its engine's rule (:data:`kvsim.models.gguf_windows.WINDOWED`).
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from kvsim.layout import LayerShape, StateShape
from kvsim.models.config import MAX_LAYERS
from kvsim.models.gguf import Header, Tensor, read_header
from kvsim.models.gguf_windows import WINDOWED
from kvsim.models.model import Model
from kvsim.models.parameters import Weights
from kvsim.nearest import hint

WINDOWS: dict[str, tuple[int, bool]] = {
    "gemma2": (2, False),
    "gemma3": (6, False),
    "gemma3n": (5, False),
    "cohere2": (4, False),
    "gpt-oss": (2, False),
    "olmo2": (4, False),
    "exaone4": (4, False),
    "exaone-moe": (4, False),
    "afmoe": (4, False),
    "llama4": (4, False),
    "smallthinker": (4, True),
    "phi3": (0, False),
    "phimoe": (0, False),
    "mistral3": (0, False),
    "starcoder2": (0, False),
    "lfm2": (0, False),
}
"""Architecture -> (period, whether it starts with the full layer): one full layer a period, 0: every layer slides.

As llama.cpp's model loader sets them where the file has no ``sliding_window_pattern`` of its own; of phi3, phimoe,
mistral3 and starcoder2, which it runs whole, as the models' own classes do.
"""

CHUNKS = {"llama4": 8192}
"""Chunked attention that llama.cpp knows without a key, and whatever the key says but for 0."""

SET_WIDTHS = {"smallthinker": 4096}
"""Windows of this width wherever the key is not 0."""

ABSENT_WIDTHS = {"gemma2": 4096}
"""Windows where the key is absent."""

PLAIN = frozenset(
    {
        "apertus", "arcee", "baichuan", "bailingmoe", "bailingmoe2", "bitnet", "bloom", "chatglm", "codeshell",
        "command-r", "dbrx", "deci", "deepseek", "deepseek2", "dots1", "ernie4_5", "ernie4_5-moe", "exaone", "falcon",
        "falcon-h1", "gemma", "gemma4", "glm-dsa", "glm4", "glm4moe", "gpt2", "gptj", "gptneox", "granite",
        "granitehybrid", "granitemoe", "grok", "grovemoe", "hunyuan-dense", "hunyuan-moe", "internlm2", "jais", "jais2",
        "jamba", "kimi-linear", "lfm2moe", "llama", "mamba", "mamba2", "mimo2", "minicpm", "minicpm3",
        "minimax-m2", "mistral4", "mpt", "nemotron", "nemotron_h", "nemotron_h_moe", "olmo", "olmoe", "openelm",
        "orion", "pangu-embedded", "phi2", "plm", "qwen", "qwen2", "qwen2moe", "qwen2vl", "qwen3", "qwen35",
        "qwen35moe", "qwen3moe", "qwen3next", "qwen3vl", "qwen3vlmoe", "refact", "seed_oss", "smollm3", "stablelm",
        "starcoder", "xverse",
    }
)  # fmt: skip
"""Further architectures: no windows but those that the file itself describes."""

NO_WEIGHT = re.compile(r"rope_(freqs|factors)")
LOOKUP = re.compile(r"^(position_embd|token_types|per_layer_token_embd)\.")
BLOCK = re.compile(r"^blk\.(\d+)\.(.+)$")
MIXING = re.compile(r"^(attn_|ssm_|shortconv|time_mix|indexer|cross_attn)")
NOT_MIXING = re.compile(r"^attn_(norm|post_norm|output_norm)")


def read_gguf(file: Path) -> Model:
    """The model in ``file``.  Raises ``ValueError``, naming file and key, where it is not whole or not understood."""
    reader = _Reader(str(file), read_header(file))
    return reader.model(file.stem)


class _Reader:
    def __init__(self, file: str, header: Header) -> None:
        self.file, self.metadata, self.tensors = file, header.metadata, header.tensors
        self.sources: dict[str, str] = {}
        self.notes: list[str] = []
        self.arch = self.metadata.get("general.architecture")
        if not isinstance(self.arch, str) or (self.arch not in PLAIN and self.arch not in WINDOWS):
            known = sorted(PLAIN | set(WINDOWS))
            meant = hint(str(self.arch)[:40], known, cutoff=0.6)
            raise self.error("general.architecture", f"{meant}known are {', '.join(known)}", whole=True)
        self.num_layers = self.count("num_layers", "block_count")
        self.num_layers -= self.count("next", "nextn_predict_layers", 0)
        if not 0 < self.num_layers <= MAX_LAYERS:
            raise self.error("block_count", f"allowed are 1 to {MAX_LAYERS}")
        self.blocks: list[dict[str, Tensor]] = [{} for _ in range(self.num_layers)]
        self.next = 0
        for name, tensor in self.tensors.items():
            found = BLOCK.match(name)
            if found and len(found[1]) < 6 and int(found[1]) < self.num_layers:
                self.blocks[int(found[1])][found[2].removesuffix(".weight")] = tensor
            elif found:
                self.next += tensor.numel

    def error(self, key: str, why: str, whole: bool = False) -> ValueError:
        name = key if whole else f"{self.arch}.{key}"
        given = " ".join(str(self.metadata[name])[:60].split()) if name in self.metadata else "absent"
        return ValueError(f"{self.file}: GGUF key {name} is {given}: {why}")

    def get(self, key: str) -> Any:
        return self.metadata.get(f"{self.arch}.{key}")

    def count(self, name: str, key: str, default: int | None = None) -> int:
        """A whole number; ``default`` where it is absent.  Raises ``ValueError`` where there is none."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 10**9:
            raise self.error(key, "a whole number is needed")
        self.sources[name] = f"{self.arch}.{key}"
        return value

    def each(self, name: str, key: str, default: int | None = None) -> list[int]:
        """One number a layer: the file has one for all, or a list."""
        value = self.get(key)
        if not isinstance(value, list):
            return [self.count(name, key, default)] * self.num_layers
        if len(value) < self.num_layers or not all(type(one) is int and 0 <= one <= 10**6 for one in value):
            raise self.error(key, f"allowed are {self.num_layers} whole numbers")
        self.sources[name] = f"{self.arch}.{key}"
        return [int(one) for one in value[: self.num_layers]]

    def model(self, name: str) -> Model:
        hidden = self.count("hidden_size", "embedding_length")
        heads = self.each("num_q_heads", "attention.head_count", 0)
        layers, labels = self.layers(hidden, heads)
        weights, nbytes = self.weights()
        positions = self.count("max_positions", "context_length", 0)
        table = self.tensors.get("token_embd.weight")
        self.sources["weight_bits"] = "the types of the file's tensors"
        self.notes.append(f"weights of {nbytes:,} B in the file's own types")
        if self.next:
            self.notes.append(
                f"{self.arch}.nextn_predict_layers: {self.next:,} weights of further prediction not counted"
            )
        return Model(
            name=" ".join(str(self.metadata.get("general.name") or name)[:100].split()),
            model_type=str(self.arch),
            layers=tuple(layers),
            num_q_heads=max([*heads, 1]),
            hidden_size=hidden,
            vocab_size=table.shape[-1] if table else None,
            weights=weights,
            max_positions=positions or None,
            dtype=None,
            weight_bits=8 * nbytes / weights.total if weights.total else None,
            sources=tuple(self.sources.items()),
            notes=tuple(self.notes),
            kinds=tuple(Counter(labels).items()),
        )

    def layers(self, hidden: int, heads: list[int]) -> tuple[list[LayerShape | StateShape], list[str]]:
        """What every block leaves, and its label."""
        kv_heads = self.each("num_kv_heads", "attention.head_count_kv", -1)
        kv_heads = [given if given >= 0 else own for given, own in zip(kv_heads, heads, strict=True)]
        sliding, window, label = self.windows()
        shared = self.count("shared", "attention.shared_kv_layers", 0)
        if shared >= self.num_layers and shared:
            raise self.error("attention.shared_kv_layers", f"allowed are fewer than the {self.num_layers} layers")
        layers: list[LayerShape | StateShape] = []
        labels: list[str] = []
        for at, block in enumerate(self.blocks):
            if not block:
                raise ValueError(f"{self.file}: GGUF has no tensors of block {at} of {self.num_layers}")
            made: list[LayerShape | StateShape] = []
            if any(name.startswith("ssm_conv1d") for name in block):
                made.append(self.state(at, block))
            if "shortconv.conv" in block:
                made.append(StateShape((("conv", tuple(reversed(block["shortconv.conv"].shape)), "bfloat16"),), "conv"))
            if "attn_kv_a_mqa" in block:
                made += self.latent(at, block)
            elif "attn_k" in block or ("attn_qkv" in block and not made):
                if at < self.num_layers - shared:
                    slides = sliding[at]
                    made.append(
                        self.attention(at, block, hidden, heads[at], kv_heads[at], window if slides else None,
                                       slides, label)
                    )  # fmt: skip
                elif not made:
                    labels.append("shared")
                    continue
            if not made:
                odd = next((name for name in block if MIXING.match(name) and not NOT_MIXING.match(name)), None)
                if odd is not None and not (
                    odd in ("attn_q", "attn_output", "attn_q_norm") and at >= self.num_layers - shared
                ):
                    raise ValueError(f"{self.file}: GGUF tensor blk.{at}.{odd}: a layer of a kind that is not known")
            layers += made
            kinds = dict.fromkeys(shape.kind for shape in made)
            labels.append("+".join(kinds) or ("shared" if at >= self.num_layers - shared else "none"))
        return layers, labels

    def windows(self) -> tuple[list[bool], int | None, str]:
        """Which layers slide, the window, and the label of such a layer."""
        chunk = CHUNKS.get(str(self.arch))
        absent = chunk or ABSENT_WIDTHS.get(str(self.arch), 0)
        window = self.count("window", "attention.sliding_window", absent)
        none = [False] * self.num_layers
        if not window:
            return none, None, ""
        window = chunk or SET_WIDTHS.get(str(self.arch), window)
        pattern = self.get("attention.sliding_window_pattern")
        if isinstance(pattern, list):
            if len(pattern) < self.num_layers:
                raise self.error("attention.sliding_window_pattern", f"allowed are {self.num_layers} entries")
            which = [bool(entry) for entry in pattern[: self.num_layers]]
        else:
            if self.arch in WINDOWED and self.arch not in WINDOWS:
                raise self.error("attention.sliding_window_pattern", "this architecture must say which layers slide")
            if self.arch not in WINDOWS:
                self.notes.append(
                    f"{self.arch}.attention.sliding_window {window}: which layers slide is not known of this "
                    "architecture, which llama.cpp runs whole; full attention"
                )
                return none, None, ""
            period, first = WINDOWS[str(self.arch)]
            if pattern is not None:
                period = self.count("pattern", "attention.sliding_window_pattern")
            which = [
                not period or (at % period != 0 if first else at % period < period - 1) for at in range(self.num_layers)
            ]
        positions = self.count("max_positions", "context_length", 0)
        if positions and window >= positions:
            self.notes.append(f"the window {window} is no shorter than the {positions} positions: full attention")
            return none, None, ""
        return which, window, "chunked" if chunk else ""

    def attention(
        self, at: int, block: dict[str, Tensor], hidden: int, heads: int, kv_heads: int, window: int | None,
        slides: bool, label: str,
    ) -> LayerShape:  # fmt: skip
        """Keys and values of one block; the widths must be those of its tensors."""
        if not heads or not kv_heads or heads % kv_heads:
            raise self.error("attention.head_count_kv", f"block {at} has keys, {heads} query and {kv_heads} kv heads")
        suffix = "_swa" if slides and self.get("attention.key_length_swa") is not None else ""
        if self.get(f"attention.key_length{suffix}") is None and hidden % heads:
            raise self.error("attention.head_count", f"allowed are divisors of the width {hidden}")
        key = self.count("head_dim", f"attention.key_length{suffix}", hidden // heads)
        value = self.count("value_dim", f"attention.value_length{suffix}", key)
        self.sources.setdefault("head_dim", f"{self.arch}.embedding_length / attention.head_count")
        for name, width in (("attn_k", kv_heads * key), ("attn_v", kv_heads * value)):
            tensor = block.get(name)
            if tensor is not None and tensor.shape[-1] != width:
                raise ValueError(
                    f"{self.file}: GGUF tensor blk.{at}.{name}.weight has the shape {list(tensor.shape)}, "
                    f"the metadata says {kv_heads} heads of {width // kv_heads}"
                )
        tensor = block.get("attn_qkv")
        if tensor is not None and "attn_k" not in block and tensor.shape[-1] != heads * key + kv_heads * (key + value):
            raise ValueError(
                f"{self.file}: GGUF tensor blk.{at}.attn_qkv.weight has the shape {list(tensor.shape)}, the metadata "
                f"says {heads} query and {kv_heads} kv heads of {key}"
            )
        return LayerShape(kv_heads, key, value, window=window, kind=label if window else "")

    def latent(self, at: int, block: dict[str, Tensor]) -> list[LayerShape | StateShape]:
        rank = self.count("kv_lora_rank", "attention.kv_lora_rank")
        rope = self.count("rope", "rope.dimension_count")
        if block["attn_kv_a_mqa"].shape[-1] != rank + rope:
            raise ValueError(
                f"{self.file}: GGUF tensor blk.{at}.attn_kv_a_mqa.weight has the shape "
                f"{list(block['attn_kv_a_mqa'].shape)}, the metadata says a latent of {rank} and a rotary key of {rope}"
            )
        self.sources |= {
            "num_kv_heads": f"{self.arch}.attention.kv_lora_rank",
            "head_dim": f"{self.arch}.attention.kv_lora_rank + rope.dimension_count",
        }
        out: list[LayerShape | StateShape] = [LayerShape(1, rank + rope, 0, kind="mla", rope=rope)]
        if any(name.startswith("indexer.") for name in block):
            out.append(LayerShape(1, self.count("index", "attention.indexer.key_length"), 0, kind="indexer"))
        return out

    def state(self, at: int, block: dict[str, Tensor]) -> StateShape:
        """The convolution from its tensor, the recurrence from the metadata."""
        convolutions = [block[name] for name in block if name.startswith("ssm_conv1d") and not name.endswith("bias")]
        kernel = convolutions[0].shape[0]
        wide = sum(tensor.numel for tensor in convolutions) // kernel
        conv = ("conv", (wide, kernel), "bfloat16")
        if "ssm_f_a" in block:
            dim = self.count("kda", "kda.head_dim")
            if not dim or wide % (3 * dim):
                raise self.error("kda.head_dim", f"allowed are divisors of the width {wide // 3}")
            return StateShape((conv, ("recurrent", (wide // (3 * dim), dim, dim), "float32")), "kda")
        inner, size = self.count("inner", "ssm.inner_size"), self.count("state", "ssm.state_size")
        if "ssm_x" in block:
            return StateShape((conv, ("recurrent", (inner, size), "float32")), "mamba")
        heads = self.count("ssm_heads", "ssm.time_step_rank")
        if not heads or inner % heads or not size:
            raise self.error("ssm.time_step_rank", f"allowed are divisors of the inner width {inner}")
        if "ssm_ba" in block or "ssm_beta" in block or "ssm_alpha" in block:
            return StateShape((conv, ("recurrent", (heads, size, inner // heads), "float32")), "gated_delta_net")
        return StateShape((conv, ("recurrent", (heads, inner // heads, size), "float32")), "mamba2")

    def weights(self) -> tuple[Weights, int]:
        """Weights by how a step reads them, and the bytes of them all."""
        total = {"embedding": 0, "head": 0, "dense": 0, "routed": 0, "lookup": 0}
        nbytes = 0
        for name, tensor in self.tensors.items():
            found = BLOCK.match(name)
            if NO_WEIGHT.search(name) or (found and int(found[1][:6]) >= self.num_layers):
                continue
            kind = "dense"
            if name == "token_embd.weight":
                kind = "embedding"
            elif name == "output.weight":
                kind = "head"
            elif LOOKUP.match(name):
                kind = "lookup"
            elif re.search(r"_(ch)?exps\.", name):
                kind = "routed"
            total[kind] += tensor.numel
            nbytes += tensor.nbytes
        experts = self.count("num_experts", "expert_count", 0) if total["routed"] else 0
        used = self.count("experts_per_token", "expert_used_count", 0) if total["routed"] else 0
        return Weights(**total, num_experts=experts, experts_per_token=used), nbytes
