"""Attention layers: what a token leaves in one, and the weights that make it.

:class:`Attention` covers multi-head, grouped and multi-query attention, windowed or not; :class:`Latent` the
multi-head latent attention of DeepSeek-V2 and after (a latent and a rotary key shared by all heads), with the
index keys of V3.2; :class:`CompressedAttention` the one shared vector of DeepSeek-V4, windowed, with blocks compressed
into one entry beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvsim.layout import LayerShape
from kvsim.models.config import Body, Keys, Shapes, Switch

Extra = Callable[[int, int, int, int], int]
"""``(hidden, query heads, kv heads, head dim) -> parameters`` beside the projections."""


@dataclass(frozen=True)
class Attention:
    """Keys and values of their own for every kv head.  The defaults are Llama's."""

    num_kv_heads: Keys | None = "num_key_value_heads"  # None: as many as query heads
    kv_required: bool = True  # where no class is known; False: an absent key means as many as query heads
    head_dim: Keys | None = "head_dim"  # None: always hidden size / query heads
    head_dim_required: bool = False  # where no class is known; True: there is a number of its own
    value_dim: Keys | None = None  # None: as the keys
    num_q_heads: Keys | None = None  # where a kind of layer has a number of its own
    multi_query: str | None = None  # key of a switch (on where absent): one key/value head
    inner: Keys | None = None  # width that the projections read (None: hidden size)
    fixed_kv_heads: int | None = None
    fixed_head_dim: int | None = None  # where the class has a number and no key for it
    # What follows only serves the parameter count.
    qkv_bias: Switch = False
    out_bias: Switch = False
    qk_norm: str | None = None  # "head": over head_dim; "full": over all heads of a token
    qk_norm_if: Switch = True
    qk_norm_vectors: int | None = None  # None: as the family's norms
    q_width: int = 1  # 2: the query projection makes a gate as well
    shared_value: Switch = False  # the values are the keys: no projection of their own
    extra: Extra | None = None

    def heads(self, body: Body) -> tuple[int, int, int]:
        """``(kv heads, key dim, value dim)``.  Raises ``ValueError``, naming the key, where they do not fit."""
        reader = body.reader
        num_kv_heads = self._kv_heads(body)
        if self.num_kv_heads is None:
            self._equal(body, "num_key_value_heads", num_kv_heads)
        q_heads = self.q_heads(body)
        if q_heads % num_kv_heads:
            key = reader.sources["num_kv_heads"].removeprefix(reader.prefix)
            raise reader.error(key.split(" ")[0], f"allowed are divisors of the {q_heads} query heads")
        key_dim = self._head_dim(body)
        if self.head_dim is None:
            self._equal(body, "head_dim", key_dim)
        value_dim = key_dim
        if self.value_dim is not None:
            value_dim = reader.count_or_none("value_dim", self.value_dim, fill=True) or key_dim
        return num_kv_heads, key_dim, value_dim

    def q_heads(self, body: Body) -> int:
        """Query heads: the model's, unless this kind of layer has a key of its own."""
        if self.num_q_heads is None:
            return body.num_q_heads
        return body.reader.count_or_none("own_q_heads", self.num_q_heads) or body.num_q_heads

    def _equal(self, body: Body, key: str, number: int) -> None:
        """A key that the class does not read must not say otherwise."""
        if body.reader.get(key) not in (None, number):
            raise body.reader.error(key, f"this model type has {number}, whatever the key says")

    def _kv_heads(self, body: Body) -> int:
        reader = body.reader
        if self.fixed_kv_heads is not None:
            reader.sources["num_kv_heads"] = reader.label("model_type")
            return self.fixed_kv_heads
        if self.multi_query and reader.switch((self.multi_query, True)):
            reader.sources["num_kv_heads"] = reader.label(f"{self.multi_query} = true")
            return 1
        if self.num_kv_heads is not None:
            given = reader.count_or_none("num_kv_heads", self.num_kv_heads)
            if given is not None:
                return given
            key = reader.first(self.num_kv_heads)
            if key not in reader.config and (key in reader.defaults if reader.defaults else self.kv_required):
                raise reader.error(key, "this model type must say how many key/value heads it has")
        reader.sources["num_kv_heads"] = reader.sources.get("num_q_heads", "")
        return body.num_q_heads

    def _head_dim(self, body: Body) -> int:
        reader = body.reader
        if self.head_dim is not None:
            given = reader.count_or_none("head_dim", self.head_dim)
            if given is not None:
                return given
            if self.fixed_head_dim is not None:
                reader.sources["head_dim"] = reader.label("model_type")
                return self.fixed_head_dim
            key = reader.first(self.head_dim)
            if key not in reader.config and (key in reader.defaults if reader.defaults else self.head_dim_required):
                raise reader.error(key, "this model type must say its head dimension")
        q_heads, hidden = reader.sources["num_q_heads"], reader.sources["hidden_size"]
        if body.hidden % body.num_q_heads:
            raise reader.error(
                q_heads.removeprefix(reader.prefix).split(" ")[0],
                f"allowed are divisors of {hidden.removeprefix(reader.prefix)} {body.hidden}",
            )
        reader.sources["head_dim"] = f"{hidden} / {q_heads.removeprefix(reader.prefix)}"
        return body.hidden // body.num_q_heads

    def shapes(self, body: Body, window: int | None = None, kind: str = "") -> Shapes:
        """One entry: every kv head's keys and values, the newest ``window`` tokens of them."""
        return (LayerShape(*self.heads(body), window=window, kind=kind),)

    def params(self, body: Body) -> int:
        """Projections, their biases, and the norms of queries and keys."""
        reader, hidden = body.reader, body.hidden
        num_kv_heads, key_dim, value_dim = self.heads(body)
        reads = hidden if self.inner is None else reader.count("attention_inner", self.inner, fill=True)
        q_heads = self.q_heads(body)
        query, keys = q_heads * key_dim, num_kv_heads * key_dim
        values = 0 if reader.switch(self.shared_value) else num_kv_heads * value_dim
        total = reads * (self.q_width * query + keys + values) + q_heads * value_dim * hidden
        if reader.switch(self.qkv_bias):
            total += self.q_width * query + keys + values
        if reader.switch(self.out_bias):
            total += hidden
        if self.qk_norm and reader.switch(self.qk_norm_if):
            vectors = body.norm_vectors if self.qk_norm_vectors is None else self.qk_norm_vectors
            total += vectors * (2 * key_dim if self.qk_norm == "head" else query + keys)
        if self.extra:
            total += self.extra(hidden, q_heads, num_kv_heads, key_dim)
        return total

    def borrowed(self, body: Body) -> int:
        """The part of :meth:`params` that a layer lacks which uses another's keys and values."""
        num_kv_heads, key_dim, value_dim = self.heads(body)
        keys, values = num_kv_heads * key_dim, num_kv_heads * value_dim
        total = body.hidden * (keys + (0 if body.reader.switch(self.shared_value) else values))
        if body.reader.switch(self.qkv_bias):
            total += keys + values
        return total + (body.norm_vectors * key_dim if self.qk_norm == "head" else 0)


@dataclass(frozen=True)
class BlockSparse(Attention):
    """MiniMax-M3's attention (arXiv:2606.13392): keys and values are kept whole, and one index key a token picks the
    blocks that a query sees."""

    index_dim: Keys = ("index_head_dim", "sparse_attention_config.sparse_index_dim")
    index_heads: Keys = ("index_n_heads", "sparse_attention_config.sparse_num_index_heads")

    def shapes(self, body: Body, window: int | None = None, kind: str = "") -> Shapes:
        body.reader.used |= set(self.index_heads)
        index = LayerShape(1, body.reader.count("index_head_dim", self.index_dim), 0, kind="indexer")
        return (LayerShape(*self.heads(body), window=window), index)

    def params(self, body: Body) -> int:
        """With the index queries' and key's projections and norms."""
        dim = body.reader.count("index_head_dim", self.index_dim)
        heads = body.reader.count("index_heads", self.index_heads)
        return super().params(body) + body.hidden * (heads + 1) * dim + 2 * dim


@dataclass(frozen=True)
class PooledIndex(Attention):
    """Qwen4-Exp's: keys and values are kept whole, and one index key a token, of which blocks are pooled at each step
    to pick what a query sees."""

    def shapes(self, body: Body, window: int | None = None, kind: str = "") -> Shapes:
        body.reader.used |= {"indexer_n_heads", "indexer_kv_heads", "indexer_budget", "indexer_compress_ratio"}
        heads = body.reader.count_or_none("index_kv_heads", "indexer_kv_heads")
        if heads not in (None, 1):
            raise body.reader.error("indexer_kv_heads", "allowed is 1")
        index = LayerShape(1, body.reader.count("index_head_dim", "indexer_head_dim"), 0, kind="indexer")
        return (LayerShape(*self.heads(body), window=window), index)

    def params(self, body: Body) -> int:
        """With the index queries' and key's projection and norms."""
        dim = body.reader.count("index_head_dim", "indexer_head_dim")
        heads = body.reader.count("index_heads", "indexer_n_heads")
        return super().params(body) + body.hidden * (heads + 1) * dim + 2 * dim


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (arXiv:2405.04434): one latent and one rotary key a token, whatever the heads."""

    indexer: bool = False  # DeepSeek sparse attention: index keys beside it
    rotary: bool = True  # False: the layer has no rotary key, its queries are as wide
    own: bool = True  # False: it reads an earlier layer's latents
    prefix: str = ""  # of the keys of its sizes: "swa_" in window layers that have sizes of their own
    nope: bool = False  # a rotary width of 0 is one
    packed: bool = False  # the indexer keeps a key, a gate and a sign of validity of every token, to pool them
    bias: Switch = ("attention_bias", False)
    gate: Switch = False  # a gate as wide as the values
    extra: Extra | None = None

    def sizes(self, body: Body) -> tuple[int, int]:
        """``(rank, rotary width)`` of what a token leaves."""
        reader = body.reader
        reader.used |= {"num_key_value_heads", "head_dim"}
        reader.used |= {self.prefix + key for key in ("q_lora_rank", "qk_nope_head_dim", "v_head_dim", "head_dim")}
        rank_key, rope_key = f"{self.prefix}kv_lora_rank", f"{self.prefix}qk_rope_head_dim"
        rank = reader.count(rank_key, rank_key)
        rope = reader.count(rope_key, rope_key, zero=self.nope)
        return rank, rope

    def shapes(self, body: Body, window: int | None = None, kind: str = "") -> Shapes:
        """The latent with the rotary key behind it, no values; then the index keys."""
        reader = body.reader
        rank, rope = self.sizes(body)
        rank_label = reader.label(f"{self.prefix}kv_lora_rank")
        reader.sources |= {
            "num_kv_heads": rank_label,
            "head_dim": f"{rank_label} + {reader.label(f'{self.prefix}qk_rope_head_dim')}"
            if self.rotary
            else rank_label,
        }
        label = "mla" if window is None else "sliding"
        rope = rope if self.rotary else 0
        main = (LayerShape(1, rank + rope, 0, window=window, kind=label, rope=rope),) if self.own else ()
        return (*main, self.index(body)) if self.indexer else main

    def index(self, body: Body) -> LayerShape:
        body.reader.used |= {"index_n_heads", "index_topk"}
        dim = body.reader.count("index_head_dim", "index_head_dim")
        return LayerShape(1, 2 * dim + 1 if self.packed else dim, 0, kind="indexer")

    def q_heads(self, body: Body) -> int:
        if not self.prefix:
            return body.num_q_heads
        return body.reader.count_or_none("own_q_heads", f"{self.prefix}num_attention_heads") or body.num_q_heads

    def head_sizes(self, body: Body) -> tuple[int, int, int | None]:
        """A head's ``(key width without the rotary part, value width)``, and the queries' rank where they have one."""
        reader = body.reader
        nope = reader.count("nope", f"{self.prefix}qk_nope_head_dim")
        value = reader.count("value", f"{self.prefix}v_head_dim")
        return nope, value, reader.count_or_none("q_lora_rank", f"{self.prefix}q_lora_rank", fill=True)

    def matrices(self, body: Body) -> dict[str, int]:
        """Weights of its projections, by DeepSeek's names for them."""
        reader, hidden, heads = body.reader, body.hidden, self.q_heads(body)
        (rank, rope), (nope, value, low) = self.sizes(body), self.head_sizes(body)
        query = heads * (nope + rope)
        out = {"q_proj": hidden * query} if low is None else {"q_a_proj": hidden * low, "q_b_proj": low * query}
        if self.own:
            out["kv_a_proj_with_mqa"] = hidden * (rank + rope)
        out |= {"kv_b_proj": rank * heads * (nope + value), "o_proj": heads * value * hidden}
        if reader.switch(self.gate):
            out["g_proj"] = hidden * heads * value
        return out

    def params(self, body: Body) -> int:
        reader, hidden, heads = body.reader, body.hidden, self.q_heads(body)
        (rank, rope), (nope, value, low) = self.sizes(body), self.head_sizes(body)
        query = heads * (nope + rope)
        total = hidden * query if low is None else (hidden + 1 + query) * low
        if not self.rotary:
            nope, rope = nope + rope, 0
        total += rank * heads * (nope + value) + heads * value * hidden
        if self.own:
            total += hidden * (rank + rope) + rank
        if reader.switch(self.bias):
            total += (low or 0) + rank + rope + hidden
        if reader.switch(self.gate):
            total += hidden * heads * value
        if self.indexer:
            index, count = reader.count("index", "index_head_dim"), reader.count("index_heads", "index_n_heads")
            total += index * count * (low or hidden) + index * hidden + 2 * index + hidden * count
            if self.packed:
                total += index * (reader.count("index_pool", "index_kpool", fill=True) + hidden)
        if self.extra:
            total += self.extra(hidden, heads, heads, nope + rope)
        return total


@dataclass(frozen=True)
class CompressedAttention:
    """DeepSeek-V4: one vector a token that is key and value at once, the newest ``sliding_window`` of them, and
    beside it one entry a block of ``stride`` tokens (0: none), picked by index keys where ``indexer``."""

    stride: int = 0
    indexer: bool = False
    """``stride`` 1 is a stream of its own for every token, beside the window (V4.1's decoder half)."""

    def shapes(self, body: Body, window: int | None = None, kind: str = "") -> Shapes:
        reader = body.reader
        reader.used |= {"num_key_value_heads", "q_lora_rank", "o_lora_rank", "qk_rope_head_dim", "o_groups"}
        reader.used |= {"index_n_heads", "index_topk", "index_head_dim"}
        dim = reader.count("head_dim", "head_dim")
        reader.sources["num_kv_heads"] = reader.label("model_type")
        out = [LayerShape(1, dim, 0, window=window)]
        if self.stride:
            out.append(LayerShape(1, dim, 0, stride=self.stride, kind="compressed"))
        if self.indexer:
            index = reader.count("index_head_dim", "index_head_dim")
            out.append(LayerShape(1, index, 0, stride=self.stride, kind="indexer"))
        return tuple(out)

    def params(self, body: Body) -> int:
        reader, hidden, heads = body.reader, body.hidden, body.num_q_heads
        dim, low = reader.count("head_dim", "head_dim"), reader.count("q_lora_rank", "q_lora_rank")
        out, groups = reader.count("o_lora_rank", "o_lora_rank"), reader.count("o_groups", "o_groups")
        total = (hidden + 1 + heads * dim) * low + (hidden + 1) * dim + heads
        total += out * heads * dim + hidden * groups * out
        if self.stride:
            width = dim * (2 if self.indexer else 1)
            total += (self.stride + 2 * hidden) * width + dim
        if self.indexer:
            index, count = reader.count("index", "index_head_dim"), reader.count("index_heads", "index_n_heads")
            total += (self.stride + 2 * hidden) * 2 * index + index + low * count * index + count * hidden
        return total
