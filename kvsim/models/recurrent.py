"""Layers of constant state: what a sequence leaves in one, however long it is, and the weights that make it.

Shapes and types as transformers' own classes keep them in a 16-bit model: convolutions in the activations' type,
recurrent states in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvsim.layout import StateShape
from kvsim.models.config import Body, Keys, Shapes, Switch


def _state(kind: str, body: Body, conv: tuple[int, ...] | None, recurrent: tuple[int, ...] | None) -> Shapes:
    tensors = []
    if conv:
        tensors.append(("conv", conv, body.dtype))
    if recurrent:
        tensors.append(("recurrent", recurrent, "float32"))
    return (StateShape(tuple(tensors), kind),)


@dataclass(frozen=True)
class Mamba:
    """Mamba (arXiv:2312.00752): a state of ``[inner, state]`` and the newest inputs of a convolution."""

    inner: Keys | None = None  # None: expand x hidden size
    expand: str = "expand"
    state: str = "state_size"
    kernel: str = "conv_kernel"
    rank: str = "time_step_rank"
    heads: str | None = None  # Zamba splits the inner width
    bias: Switch = ("use_bias", False)
    conv_bias: Switch = ("use_conv_bias", True)
    normed: bool = False  # norms of the time step, B and C

    def sizes(self, body: Body) -> tuple[int, int, int]:
        reader = body.reader
        inner = None if self.inner is None else reader.count_or_none("mamba_inner", self.inner)
        if inner is None:
            inner = reader.count("expand", self.expand, fill=True) * body.hidden
        return inner, reader.count("state_size", self.state, fill=True), reader.count("conv", self.kernel, fill=True)

    def shapes(self, body: Body, window: int | None = None, kind: str = "") -> Shapes:
        inner, state, kernel = self.sizes(body)
        recurrent: tuple[int, ...] = (inner, state)
        if self.heads:
            heads = body.reader.count("mamba_heads", self.heads, fill=True)
            if inner % heads:
                raise body.reader.error(self.heads, f"allowed are divisors of the inner width {inner}")
            recurrent = (heads, inner // heads, state)
        return _state("mamba", body, (inner, kernel), recurrent)

    def params(self, body: Body) -> int:
        inner, state, kernel = self.sizes(body)
        reader, hidden = body.reader, body.hidden
        rank = reader.value(self.rank)
        rank = -(-hidden // 16) if rank in ("auto", None) else reader.count("rank", self.rank, fill=True)
        heads = reader.count("mamba_heads", self.heads, fill=True) if self.heads else 1
        total = hidden * 2 * inner + inner * kernel + inner * (rank + 2 * state) + rank * inner + inner
        total += inner * state + inner + inner * hidden
        if reader.switch(self.bias):
            total += 2 * inner + hidden
        if reader.switch(self.conv_bias):
            total += inner
        if heads > 1:  # x_proj reads a head's share, makes each head's own
            total += 0
        return total + (rank + 2 * state if self.normed else 0)


@dataclass(frozen=True)
class Mamba2:
    """Mamba-2 (arXiv:2405.21060): a state of ``[heads, head dim, state]``, and a convolution over inputs, B and C."""

    heads: str = "mamba_num_heads"
    head_dim: str = "mamba_head_dim"  # "auto": inner / heads
    groups: Keys = "n_groups"
    state: Keys = "ssm_state_size"
    kernel: Keys = "conv_kernel"
    expand: Keys = "expand"
    inner: str | None = None  # key of the inner width, where it has one
    derived: bool = False  # the head dim is always inner / heads
    bias: Switch = ("use_bias", False)
    out_bias: Switch | None = None  # None: as bias
    conv_bias: Switch = ("use_conv_bias", True)
    norm: Switch = True

    def sizes(self, body: Body) -> tuple[int, int, int, int, int]:
        """``(heads, head dim, groups, state, kernel)``."""
        reader = body.reader
        heads = reader.count("mamba_heads", self.heads, fill=True)
        given = None if self.derived else reader.value(self.head_dim)
        inner = None if self.inner is None else reader.count_or_none("mamba_inner", self.inner, fill=True)
        if inner is not None or given in (None, "auto"):
            if inner is None:
                inner = self._expanded(body)
            if inner % heads:
                raise reader.error(self.heads, f"allowed are divisors of the inner width {inner}")
            head_dim = inner // heads
        else:
            head_dim = reader.count("mamba_head_dim", self.head_dim, fill=True)
        return (
            heads,
            head_dim,
            reader.count("groups", self.groups, fill=True),
            reader.count("state_size", self.state, fill=True),
            reader.count("conv", self.kernel, fill=True),
        )

    def _expanded(self, body: Body) -> int:
        reader = body.reader
        key = reader.first(self.expand)
        value = reader.value(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
            raise reader.error(key, "allowed are numbers above 0")
        return int(value * body.hidden)

    def shapes(self, body: Body, window: int | None = None, kind: str = "") -> Shapes:
        heads, head_dim, groups, state, kernel = self.sizes(body)
        return _state("mamba2", body, (heads * head_dim + 2 * groups * state, kernel), (heads, head_dim, state))

    def params(self, body: Body) -> int:
        heads, head_dim, groups, state, kernel = self.sizes(body)
        reader, hidden, inner = body.reader, body.hidden, heads * head_dim
        conv = inner + 2 * groups * state
        total = hidden * (inner + conv + heads) + conv * kernel + 3 * heads + inner * hidden
        if reader.switch(self.bias):
            total += inner + conv + heads
        if reader.switch(self.bias if self.out_bias is None else self.out_bias):
            total += hidden
        if reader.switch(self.conv_bias):
            total += conv
        return total + (inner if reader.switch(self.norm) else 0)


@dataclass(frozen=True)
class DeltaNet:
    """The gated delta rule (arXiv:2412.06464): a state of ``[value heads, key dim, value dim]``."""

    def sizes(self, body: Body) -> tuple[int, int, int, int, int]:
        """``(key heads, key dim, value heads, value dim, kernel)``."""
        reader = body.reader
        key_heads = reader.count_or_none("linear_key_heads", "linear_num_key_heads", fill=True) or body.num_q_heads
        value_heads = reader.count_or_none("linear_value_heads", "linear_num_value_heads", fill=True)
        key_dim = reader.count_or_none("linear_key_dim", "linear_key_head_dim", fill=True)
        key_dim = key_dim or int(0.75 * body.hidden / key_heads)
        value_dim = reader.count_or_none("linear_value_dim", "linear_value_head_dim", fill=True) or 2 * key_dim
        kernel = reader.count("linear_conv", "linear_conv_kernel_dim", fill=True)
        return key_heads, key_dim, value_heads or body.num_q_heads, value_dim, kernel

    def shapes(self, body: Body, window: int | None = None, kind: str = "") -> Shapes:
        key_heads, key_dim, value_heads, value_dim, kernel = self.sizes(body)
        conv = (2 * key_heads * key_dim + value_heads * value_dim, kernel)
        return _state("gated_delta_net", body, conv, (value_heads, key_dim, value_dim))

    def params(self, body: Body) -> int:
        key_heads, key_dim, value_heads, value_dim, kernel = self.sizes(body)
        keys, values, hidden = key_heads * key_dim, value_heads * value_dim, body.hidden
        total = hidden * (2 * keys + 2 * values + 2 * value_heads) + (2 * keys + values) * kernel
        return total + 2 * value_heads + value_dim + values * hidden


@dataclass(frozen=True)
class Kda:
    """Kimi delta attention (arXiv:2510.26692): a state of ``[heads, head dim, head dim]``."""

    low_rank: bool = True  # the gates go through head_dim; False: straight

    def sizes(self, body: Body) -> tuple[int, int, int]:
        """``(heads, head dim, kernel)``: keys of their own, or one object ``linear_attn_config``."""
        reader = body.reader
        nested = reader.child("linear_attn_config")
        if nested is not None:
            out = tuple(nested.count(key, key) for key in ("num_heads", "head_dim", "short_conv_kernel_size"))
            reader.sources |= nested.sources
            return out[0], out[1], out[2]
        keys = ("linear_num_heads", "linear_head_dim", "linear_conv_kernel_dim")
        return tuple(reader.count(key, key, fill=True) for key in keys)  # type: ignore[return-value]

    def shapes(self, body: Body, window: int | None = None, kind: str = "") -> Shapes:
        heads, dim, kernel = self.sizes(body)
        return _state("kda", body, (3 * heads * dim, kernel), (heads, dim, dim))

    def params(self, body: Body) -> int:
        heads, dim, kernel = self.sizes(body)
        hidden, width = body.hidden, heads * dim
        narrow, wide = hidden * dim + dim * width, hidden * width
        nested = body.reader.child("linear_attn_config")
        full_rank = nested is not None and nested.switch(("use_full_rank_gate", False))  # Kimi K3's, of the output
        gates = (narrow if self.low_rank else wide) + (narrow if self.low_rank and not full_rank else wide)
        return 4 * hidden * width + 3 * width * kernel + heads + width + gates + hidden * heads + dim


@dataclass(frozen=True)
class Lightning:
    """MiniMax's lightning attention (arXiv:2501.08313): a state of ``[heads, head dim, head dim]``."""

    def sizes(self, body: Body) -> tuple[int, int]:
        given = body.reader.count_or_none("head_dim", "head_dim")
        return body.num_q_heads, given or body.hidden // body.num_q_heads

    def shapes(self, body: Body, window: int | None = None, kind: str = "") -> Shapes:
        heads, dim = self.sizes(body)
        return (StateShape((("recurrent", (heads, dim, dim), body.dtype),), "lightning"),)

    def params(self, body: Body) -> int:
        heads, dim = self.sizes(body)
        return heads * dim * (1 + 5 * body.hidden)


@dataclass(frozen=True)
class ShortConv:
    """LFM2's gated short convolution: the newest ``conv_L_cache`` inputs."""

    def shapes(self, body: Body, window: int | None = None, kind: str = "") -> Shapes:
        return _state("conv", body, (body.hidden, body.reader.count("conv", "conv_L_cache", fill=True)), None)

    def params(self, body: Body) -> int:
        hidden, kernel = body.hidden, body.reader.count("conv", "conv_L_cache", fill=True)
        return hidden * (kernel + 4 * hidden) + (5 * hidden if body.reader.switch(("conv_bias", False)) else 0)


@dataclass(frozen=True)
class RgLru:
    """RecurrentGemma's recurrent block (arXiv:2402.19427): a state of ``[width]`` and a convolution."""

    def sizes(self, body: Body) -> tuple[int, int]:
        width = body.reader.count_or_none("lru_width", "lru_width") or body.hidden
        return width, body.reader.count("conv", "conv1d_width", fill=True)

    def shapes(self, body: Body, window: int | None = None, kind: str = "") -> Shapes:
        width, kernel = self.sizes(body)
        return _state("rg_lru", body, (width, kernel - 1), (width,))

    def params(self, body: Body) -> int:
        width, kernel = self.sizes(body)
        hidden, heads = body.hidden, body.num_q_heads
        gates = 2 * (width * (width // heads) + width) + width
        return 2 * (hidden + 1) * width + (width + 1) * hidden + width * (kernel + 1) + gates


@dataclass(frozen=True)
class Rwkv:
    """RWKV-4 (arXiv:2305.13048): two shifted inputs and a numerator, a denominator and a maximum."""

    def sizes(self, body: Body) -> int:
        return body.reader.count_or_none("attention_hidden", "attention_hidden_size") or body.hidden

    def shapes(self, body: Body, window: int | None = None, kind: str = "") -> Shapes:
        wide = self.sizes(body)
        shifted = tuple((name, (body.hidden,), body.dtype) for name in ("shift_mlp", "shift_attention"))
        sums = tuple((name, (wide,), "float32") for name in ("numerator", "denominator", "maximum"))
        return (StateShape(shifted + sums, "rwkv"),)

    def params(self, body: Body) -> int:
        wide, hidden = self.sizes(body), body.hidden
        inner = body.reader.count_or_none("intermediate_size", "intermediate_size") or 4 * hidden
        attention = 2 * wide + 3 * hidden + 4 * hidden * wide
        return attention + 2 * hidden + 2 * hidden * inner + hidden * hidden


@dataclass(frozen=True)
class Convolutions:
    """Inkling's four short convolutions of a layer, in float32: over keys, values, and both outputs."""

    heads: Keys = "num_key_value_heads"
    head_dim: Keys = "head_dim"

    def sizes(self, body: Body) -> tuple[int, int]:
        """``(width of the keys, kernel)``."""
        reader = body.reader
        heads, dim = reader.count("num_kv_heads", self.heads), reader.count("head_dim", self.head_dim)
        return heads * dim, reader.count("conv", ("conv_kernel_size", "sconv_kernel_size"), fill=True)

    def shapes(self, body: Body, window: int | None = None, kind: str = "") -> Shapes:
        width, kernel = self.sizes(body)
        widths = {"key_conv": width, "value_conv": width, "attention_conv": body.hidden, "mlp_conv": body.hidden}
        return (StateShape(tuple((name, (wide, kernel), "float32") for name, wide in widths.items()), "conv"),)

    def params(self, body: Body) -> int:
        width, kernel = self.sizes(body)
        return 2 * (width + body.hidden) * kernel


@dataclass(frozen=True)
class DelayedValue:
    """ZAYA's compressed convolutional attention (arXiv:2510.04476), beside its keys and values: the newest inputs of
    two convolutions over queries and keys, and the half of the values that comes a token late."""

    def sizes(self, body: Body) -> tuple[int, int, int, int]:
        """``(query width, key width, both kernels)``."""
        reader = body.reader
        dim = reader.count("head_dim", "head_dim")
        keys = dim * reader.count("num_kv_heads", "num_key_value_heads")
        first, second = (reader.count(key, key, fill=True) for key in ("cca_time0", "cca_time1"))
        return dim * body.num_q_heads, keys, first, second

    def shapes(self, body: Body, window: int | None = None, kind: str = "") -> Shapes:
        query, keys, first, second = self.sizes(body)
        late = ("late_value", (keys // 2,), body.dtype)
        return (StateShape((("qk_conv", (query + keys, first + second - 2), body.dtype), late), "cca"),)

    def params(self, body: Body) -> int:
        query, keys, first, second = self.sizes(body)
        dim, heads = body.reader.count("head_dim", "head_dim"), body.reader.count("heads", "num_key_value_heads")
        return (query + keys) * (first + 1 + dim * second + 1) + heads


@dataclass(frozen=True)
class NGramEmbedding:
    """Qwen4-Exp's per-layer embedding of hashed n-grams: the newest inputs of a dilated convolution, and tokens."""

    def sizes(self, body: Body) -> tuple[int, int, int, int]:
        """``(width of all residual streams, kernel, n, width of the embedding)``."""
        reader = body.reader
        streams, kernel, order = (
            reader.count(key, key, fill=True) for key in ("hc_count", "ple_conv_kernel_size", "ngram_size")
        )
        width = reader.count_or_none("ple_embed_dim", "ple_embed_dim") or body.hidden
        return streams * body.hidden, kernel, order, width

    def shapes(self, body: Body, window: int | None = None, kind: str = "") -> Shapes:
        wide, kernel, order, _ = self.sizes(body)
        inputs = ("ngram_conv", (wide, (kernel - 1) * order), body.dtype)
        return (StateShape((inputs, ("ngram_tokens", (order - 1,), "int64")), "ngram"),)

    def params(self, body: Body) -> int:
        wide, kernel, _, width = self.sizes(body)
        return width * (wide + body.hidden) + 3 * wide + wide * kernel


@dataclass(frozen=True)
class MLstm:
    """xLSTM's matrix memory (arXiv:2405.04517): a state of ``[heads, key dim, value dim]``, its norm and maximum."""

    def sizes(self, body: Body) -> tuple[int, int, int]:
        """``(heads, query width, value width)``."""
        reader = body.reader
        out = []
        for key, default in (("qk_dim_factor", 0.5), ("v_dim_factor", 1.0)):
            factor = reader.value(key)
            factor = default if factor is None else factor
            if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < 1000:
                raise reader.error(key, "allowed are numbers above 0")
            out.append(-(-int(body.hidden * factor) // 64) * 64)
        heads = reader.count("num_heads", "num_heads", fill=True)
        return heads, out[0], out[1]

    def shapes(self, body: Body, window: int | None = None, kind: str = "") -> Shapes:
        heads, query, value = self.sizes(body)
        key_dim, value_dim = query // heads, value // heads
        tensors = (
            ("memory", (heads, key_dim, value_dim), body.dtype),
            ("normalizer", (heads, key_dim), body.dtype),
            ("maximum", (heads, 1), body.dtype),
        )
        return (StateShape(tensors, "mlstm"),)

    def params(self, body: Body) -> int:
        heads, query, value = self.sizes(body)
        hidden = body.hidden
        return hidden * (2 * query + 2 * value) + 2 * heads * (hidden + 1) + value + value * hidden
