"""KIVI: keys quantized per channel, values per token, the newest tokens in full precision (arXiv 2402.02750).

Order of a row's tokens: the first ``sink_length`` stay exact; the newest lie in a ring of
``residual_length`` exact slots; everything between is packed into records (:mod:`kvsim.methods.packing`).  A record
is written when the ring is full and a further token needs its oldest slots, so after appending

    num_packed = record_length * ceil(max(0, num_tokens - sink_length - residual_length) / record_length)

and between ``residual_length - record_length + 1`` and ``residual_length`` newest tokens are exact.  (KIVI's
own code flushes the whole key residual at once, so that at times no newest key is exact, and moves values
one token at a time; the bytes at full residual are the same.)

Two options are not KIVI's.  *Boosted key channels* (``boost_nbits``; dynamic channel-wise precision boost, Kitty): a
quarter of a head's key channels hold ``boost_nbits`` more bits, in a plane of their own beside the codes that all
channels have: those with the largest product of their range in the row's first record and of the prompt's queries.
*Rotated values* (``rotate_values``; QuaRot, arXiv
2404.00456, RotateKV): values are multiplied by a normalised Hadamard matrix, and packed with one symmetric scale a
token and head, without zeros.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property, lru_cache

from kvsim.layout import DTYPE_BITS, Buffer, LayerShape
from kvsim.methods.formulas import Factor, Formula, Number, Written, kv_rows, rows_number
from kvsim.methods.full import SHORT
from kvsim.methods.packing import (
    HEAD_MULTIPLE,
    MAX_TILE,
    MIN_TOKENS,
    PLANES,
    TileOrder,
    boosted_channels,
    channel_chunks,
    tile_order,
)
from kvsim.whole_numbers import check_whole

SEQUENCE = "sequence"
HEAD = "head"
PARAM_DTYPE = "float16"
BOOSTS = (0, 1, 2)
"""Bits that the boosted key channels may have besides."""
MAX_BOOSTED_DIM = 256
"""Channels of a head whose order bytes can number."""


@dataclass(frozen=True)
class Kivi:
    """KIVI's parameters, spelled as KIVI and transformers spell them.

    ``nbits`` and ``group_size`` serve both streams unless ``key_*`` / ``value_*`` says otherwise.
    ``key_group_size`` counts tokens, or is ``"sequence"``: one scale a channel for the whole row, frozen at
    the first flush (later tokens are clamped), records provided for every token.  ``value_group_size``
    counts channels, or is ``"head"``: all of a token's channels; where it is not given and ``group_size`` does
    not divide the head dimension, it is the largest power of two below that does (:meth:`value_group`).
    ``dtype`` is that of the exact tokens; scales and zeros are float16.
    ``boost_nbits``: more bits for a quarter of the key channels.  ``rotate_values`` (0 or 1): values rotated, one
    symmetric scale a token and head.

    Raises ``ValueError`` for a width, group or residual that the layout cannot hold.
    """

    nbits: int = 2
    group_size: int = 32
    residual_length: int = 128
    key_nbits: int | None = None
    value_nbits: int | None = None
    key_group_size: int | str | None = None
    value_group_size: int | str | None = None
    sink_length: int = 0
    dtype: str = "float16"
    boost_nbits: int = 0
    rotate_values: bool = False

    kvruntime = True
    head_multiple = HEAD_MULTIPLE

    def leaving(self, sink: int) -> int:
        """The residual: with it a token's place in the ring of exact slots stays what it was.

        Raises ``ValueError`` where scales are those of a whole sequence, or for another sink than the method's own.
        """
        if self.key_group_size == SEQUENCE:
            raise ValueError(f"{self.name} cannot forget its oldest tokens")
        if sink != self.sink_length:
            raise ValueError(f"{self.name} keeps its first {self.sink_length} tokens, not {sink}")
        return self.residual_length

    def __post_init__(self) -> None:
        if self.dtype not in SHORT:
            raise ValueError(f"dtype {self.dtype!r}: allowed are {', '.join(SHORT)}")
        for label, bits in (("nbits", self.nbits), ("key_nbits", self.k_bits), ("value_nbits", self.v_bits)):
            if type(bits) is not int or bits not in PLANES:
                raise ValueError(f"{label} {repr(bits)[:40]}: allowed are {', '.join(map(str, PLANES))}")
        for label in ("group_size", "residual_length", "key_group_size", "value_group_size", "sink_length"):
            count = getattr(self, label)
            words = label in ("key_group_size", "value_group_size")
            if not (words and isinstance(count, str | None)):
                check_whole(label, count, least=0)
        self._check_options()
        group = self.k_group
        if isinstance(group, str):
            if group != SEQUENCE:
                raise ValueError(f"key_group_size {group!r}: allowed are a number of tokens and {SEQUENCE!r}")
            group = MIN_TOKENS
        elif group < MIN_TOKENS or group % MIN_TOKENS:
            raise ValueError(f"key group size {group}: allowed are multiples of {MIN_TOKENS} tokens")
        if self.residual_length < group or self.residual_length % group:
            raise ValueError(
                f"residual_length {self.residual_length} is not a multiple of the key group: "
                f"allowed are {group}, {2 * group}, {3 * group}, ..."
            )
        if isinstance(self.v_group, str):
            if self.v_group != HEAD:
                raise ValueError(f"value_group_size {self.v_group!r}: allowed are a number of channels and {HEAD!r}")
        elif self.v_group < 8:
            raise ValueError(f"value group size {self.v_group}: allowed are 8 and above")

    def _check_options(self) -> None:
        boost = self.boost_nbits
        if type(boost) is not int or boost not in BOOSTS:
            raise ValueError(f"boost_nbits {repr(boost)[:40]}: allowed are {', '.join(map(str, BOOSTS))}")
        if boost and self.k_bits + boost > max(PLANES):
            raise ValueError(
                f"boost_nbits {boost} besides {self.k_bits} key bits: allowed are {max(PLANES)} bits in all"
            )
        if boost and isinstance(self.k_group, str):
            raise ValueError(f"boost_nbits {boost} with key_group_size {self.k_group!r}: allowed is a number of tokens")
        if self.rotate_values not in (0, 1):
            raise ValueError(f"rotate_values {repr(self.rotate_values)[:40]}: allowed are 0 and 1")
        object.__setattr__(self, "rotate_values", bool(self.rotate_values))
        if self.rotate_values and self.value_group_size not in (None, HEAD):
            raise ValueError(
                f"value_group_size {self.value_group_size!r} of rotated values: allowed is {HEAD!r}, one scale a head"
            )

    @property
    def k_bits(self) -> int:
        return self.nbits if self.key_nbits is None else self.key_nbits

    @property
    def v_bits(self) -> int:
        return self.nbits if self.value_nbits is None else self.value_nbits

    @property
    def k_group(self) -> int | str:
        return self.group_size if self.key_group_size is None else self.key_group_size

    @property
    def v_group(self) -> int | str:
        if self.rotate_values:
            return HEAD
        return self.group_size if self.value_group_size is None else self.value_group_size

    def value_group(self, dim: int) -> int:
        """Channels that share a value scale in a head of ``dim``.  Raises ``ValueError`` where none fit."""
        group = dim if isinstance(self.v_group, str) else self.v_group
        if dim % group and self.value_group_size is None:
            group = next((1 << bit for bit in range(group.bit_length() - 1, 2, -1) if dim % (1 << bit) == 0), group)
        if dim % group:
            allowed = [size for size in range(8, dim + 1) if dim % size == 0]
            raise ValueError(
                f"value group size {group} does not divide head dimension {dim}: "
                f"allowed are {', '.join(map(str, allowed))} (or {HEAD!r})"
            )
        return group

    @property
    def name(self) -> str:
        if self == kivi_seed(self.dtype):
            return "kivi-seed"
        bits = f"{self.k_bits}bit" if self.k_bits == self.v_bits else f"k{self.k_bits}v{self.v_bits}"
        groups = f"g{self.k_group}" if self.k_group == self.v_group else f"gk{self.k_group}-gv{self.v_group}"
        if self.boost_nbits:
            bits = f"k{self.k_bits}+{self.boost_nbits}v{self.v_bits}"
        if self.rotate_values:
            groups = f"rotv-g{self.k_group}"
        sink = f"-s{self.sink_length}" if self.sink_length else ""
        return f"kivi-{bits}-{groups}-r{self.residual_length}{sink}"

    @classmethod
    def named(cls, name: str) -> Kivi | None:
        """The plain layout of a table's ``kivi-2bit-g32-r128`` or ``kivi-k4v2-g64-r64-s4``, or ``kivi-boost``'s;
        ``None`` for another name."""
        boosted = next((one for one in map(kivi_boost, BOOSTED) if one.name == name), None)
        if boosted is not None:
            return boosted
        found = re.fullmatch(r"kivi-(?:(\d)bit|k(\d)v(\d))-g(\d{1,6})-r(\d{1,6})(?:-s(\d{1,6}))?", name)
        if found is None:
            return None
        both, key, value, group, residual, sink = (int(each or 0) for each in found.groups())
        try:
            method = cls(both or key, group, residual, key or None, value or None, sink_length=sink)
        except ValueError:  # bits or lengths that there are not
            return None
        return method if method.name == name else None

    @property
    def record_length(self) -> int:
        """Tokens a record: the key group, doubled while it stays within 64 and divides the residual."""
        length = MIN_TOKENS if isinstance(self.k_group, str) else self.k_group
        while 2 * length <= MAX_TILE and self.residual_length % (2 * length) == 0:
            length *= 2
        return length

    @lru_cache(maxsize=256)  # noqa: B019  # bounded, and methods are frozen
    def record(self, layer: LayerShape) -> Record:
        """The packed record of one head of ``layer``.

        Raises ``ValueError`` for a head dimension or value group that does not fit it.
        """
        if layer.window is not None or layer.stride > 1 or not layer.value_dim:
            what = "latent (MLA) layer" if not layer.value_dim else "compressed layer"
            what = what if layer.window is None else f"window of {layer.window} tokens"
            raise ValueError(f"kivi holds full-attention layers only, not a {what}")
        for dim in (layer.key_dim, layer.value_dim):
            channel_chunks(dim)
        record = Record(
            num_tokens=self.record_length,
            key_dim=layer.key_dim,
            value_dim=layer.value_dim,
            key_nbits=self.k_bits,
            value_nbits=self.v_bits,
            key_group=0 if isinstance(self.k_group, str) else self.k_group,
            value_group=self.value_group(layer.value_dim),
            boost_nbits=self.boost_nbits,
            rotated_values=self.rotate_values,
        )
        if self.boost_nbits and layer.key_dim > MAX_BOOSTED_DIM:
            raise ValueError(
                f"boosted key channels of head dimension {layer.key_dim}: allowed are up to {MAX_BOOSTED_DIM}"
            )
        (
            record.orders("key"),
            record.orders("value"),
            record.orders("boost"),
        )  # refuse a record too small for its lanes here, not later
        return record

    def num_packed(self, num_tokens: int) -> int:
        """Tokens that lie in records once ``num_tokens`` were appended."""
        over = max(0, num_tokens - self.sink_length - self.residual_length)
        return -(-over // self.record_length) * self.record_length

    def check_pages(self) -> None:
        """Raises ``ValueError`` for an option whose rows lie in no engine's pages."""
        if self.sink_length:
            raise ValueError(f"{self.name} in pages: sink_length {self.sink_length}, allowed is 0")
        if self.k_group == SEQUENCE:
            raise ValueError(f"{self.name} in pages: key_group_size 'sequence', allowed is a number of tokens")
        if self.boost_nbits:
            raise ValueError(
                f"{self.name} in pages: boost_nbits {self.boost_nbits}, allowed is 0: a row's order is no page's"
            )

    def page(self, layer: LayerShape) -> tuple[int, int, int, int]:
        """A page of an engine's pool: tokens a record, bytes of one record a head, tokens of a page of exact ones (the
        largest power of two that fits those bytes), and the exact tokens that a row keeps at most between steps.

        Raises ``ValueError`` where :meth:`check_pages` does, or a page has no room for an exact token.
        """
        self.check_pages()
        nbytes = 4 * self.record(layer).num_words * layer.num_kv_heads
        token = layer.num_kv_heads * (layer.key_dim + layer.value_dim) * (DTYPE_BITS[self.dtype] // 8)
        if token > nbytes:
            raise ValueError(f"{self.name} in pages: a record's {nbytes} B have no room for an exact token's {token} B")
        return self.record_length, nbytes, 1 << ((nbytes // token).bit_length() - 1), self.residual_length

    def num_exact(self, num_tokens: int) -> int:
        """Exact slots provided for ``num_tokens`` tokens: sink and residual, never more than the tokens."""
        return min(num_tokens, self.sink_length + self.residual_length)

    def num_records(self, num_tokens: int) -> int:
        """Records provided for ``num_tokens`` tokens of a row."""
        if self.k_group == SEQUENCE:
            return -(-num_tokens // self.record_length)
        return self.num_packed(num_tokens) // self.record_length

    def buffers(self, layer: LayerShape, batch_size: int, num_tokens: int) -> list[Buffer]:
        record, heads = self.record(layer), layer.num_kv_heads
        count, exact = self.num_records(num_tokens), self.num_exact(num_tokens)
        sections = tuple((name, 4 * words * batch_size * heads * count) for name, _, words in record.sections)
        out = [
            Buffer("records", (batch_size, count, heads, record.num_words), "int32", sections),
            self._exact("key", batch_size, heads, exact, layer.key_dim),
            self._exact("value", batch_size, heads, exact, layer.value_dim),
            Buffer("lengths", (2, batch_size), "int32"),  # tokens held, and those of them in records
        ]
        if not record.key_group:
            shape = (2, batch_size, heads, layer.key_dim)
            half = batch_size * heads * layer.key_dim * 2
            out.append(Buffer("key_params", shape, PARAM_DTYPE, (("key_scale", half), ("key_zero", half))))
        if record.boosted:  # which channels a row's records hold, the boosted ones first
            out.append(Buffer("key_order", (batch_size, heads, layer.key_dim), "uint8"))
        return out

    def _exact(self, stream: str, batch_size: int, heads: int, slots: int, dim: int) -> Buffer:
        slot = batch_size * heads * dim * DTYPE_BITS[self.dtype] // 8
        sink = min(slots, self.sink_length)
        sections = ((f"{stream}_sink", sink * slot), (f"{stream}_residual", (slots - sink) * slot))
        return Buffer(f"exact_{stream}", (batch_size, heads, slots, dim), self.dtype, sections)

    def edges(self, longest: int) -> list[int]:
        """Around the exact tokens, the residual, and a record."""
        exact, residual, record = self.sink_length + self.residual_length, self.residual_length, self.record_length
        around = (exact, exact + record, residual)
        return [2 * residual - 1, *(edge + more for edge in around for more in (-1, 0, 1))]

    def formulas(self, layer: LayerShape, count: int, batch_size: int, num_tokens: int) -> Written:
        """The bytes of ``count`` layers as products (:mod:`kvsim.methods.formulas`)."""
        record = self.record(layer)
        length, records, exact = self.record_length, self.num_records(num_tokens), self.num_exact(num_tokens)
        sink = min(exact, self.sink_length)
        packed = length * records
        size = DTYPE_BITS[self.dtype] // 8
        whole = self.k_group == SEQUENCE
        rule = (
            f"{length} x ceil({num_tokens:,} / {length}), a record of {length} for every token"
            if whole
            else f"{length} x ceil(max(0, {num_tokens:,} - {self.sink_length} - {self.residual_length}) / {length})"
        )
        numbers = [
            rows_number(layer, count, batch_size),
            Number("key bits", self.k_bits, "nbits" if self.key_nbits is None else "key_nbits"),
            Number("value bits", self.v_bits, "nbits" if self.value_nbits is None else "value_nbits"),
            Number("packed", packed, rule),
            Number(
                "residual", exact - sink, f"min({num_tokens:,} - {sink} sink, residual_length {self.residual_length})"
            ),
            Number("bytes", size, f"dtype {self.dtype}"),
        ]
        if sink:
            numbers.append(Number("sink", sink, "sink_length"))
        rows = kv_rows(layer, count, batch_size)
        tokens: Factor = (packed, "packed")
        if whole:
            key_groups: tuple[Factor, ...] = ()
            params = "key_params"
        else:
            groups = packed // record.key_group
            numbers.append(Number("key groups", groups, f"packed / key group of {record.key_group} tokens"))
            key_groups = ((groups, "key groups"),)
            params = "records"
        numbers.append(
            Number("value groups", record.num_value_groups, f"head dim / value group of {record.value_group} channels")
        )
        half: Factor = (2, "bytes")  # scales and zeros are float16
        key_params = (rows, *key_groups, (layer.key_dim, "head dim"), half)
        value_params = (rows, tokens, (record.num_value_groups, "value groups"), half)
        formulas = [
            Formula("records", "key_codes", (rows, tokens, (layer.key_dim, "head dim"), (self.k_bits, "bits")), 8),
            Formula("records", "value_codes", (rows, tokens, (layer.value_dim, "head dim"), (self.v_bits, "bits")), 8),
            Formula(params, "key_scale", key_params),
            Formula(params, "key_zero", key_params),
            Formula("records", "value_scale", value_params),
        ]
        if not record.rotated_values:
            formulas.append(Formula("records", "value_zero", value_params))
        if record.boosted:
            numbers.append(Number("boosted", record.boosted, "a quarter of the head dim, to a power of two"))
            numbers.append(Number("boost bits", self.boost_nbits, "boost_nbits"))
            boost = (rows, tokens, (record.boosted, "boosted"), (self.boost_nbits, "boost bits"))
            formulas.append(Formula("records", "key_boost_codes", boost, 8))
        for stream, dim in (("key", layer.key_dim), ("value", layer.value_dim)):
            tail = ((dim, "head dim"), (size, "bytes"))
            if sink:
                formulas.append(Formula(f"exact_{stream}", f"{stream}_sink", (rows, (sink, "sink"), *tail)))
            formulas.append(Formula(f"exact_{stream}", f"{stream}_residual", (rows, (exact - sink, "residual"), *tail)))
        formulas.append(
            Formula("lengths", "lengths", ((count, "layers"), (batch_size, "batch"), (2, "counts"), (4, "bytes")))
        )
        formulas.sort(key=lambda formula: formula.buffer == "key_params")  # a buffer's sections stay together
        if record.boosted:
            formulas.append(Formula("key_order", "key_order", (rows, (layer.key_dim, "head dim"), (1, "bytes"))))
        return numbers, formulas

    def read_parts(self, layer: LayerShape, batch_size: int, num_tokens: int) -> dict[str, int]:
        packed, record = self.num_packed(num_tokens), self.record(layer)
        rows = batch_size * layer.num_kv_heads
        count = packed // self.record_length
        out = {name: 4 * words * rows * count for name, _, words in record.sections}
        if not record.key_group and packed:
            out |= dict.fromkeys(("key_scale", "key_zero"), rows * layer.key_dim * 2)
        if record.boosted and packed:
            out["key_order"] = rows * layer.key_dim
        sink = min(num_tokens, self.sink_length)
        for stream, dim in (("key", layer.key_dim), ("value", layer.value_dim)):
            token = rows * dim * DTYPE_BITS[self.dtype] // 8
            out[f"{stream}_sink"] = sink * token
            out[f"{stream}_residual"] = (num_tokens - packed - sink) * token
        out["lengths"] = 8 * batch_size
        return out

    def mean_read_nbytes(self, layer: LayerShape, batch_size: int, num_tokens: int) -> int:
        """The mean of :meth:`read_parts` over the ``record_length`` steps between two flushes; never falls.

        Between ``record_length - 1`` tokens fewer than sink and residual hold and none fewer are exact, on average
        half of that.  Up to the first flush every token is; after it the bytes stay until the mean has caught up.
        """
        record, rows = self.record(layer), batch_size * layer.num_kv_heads
        token = rows * (layer.key_dim + layer.value_dim) * DTYPE_BITS[self.dtype] // 8
        lengths, held = 8 * batch_size, self.sink_length + self.residual_length
        if num_tokens <= held:
            return num_tokens * token + lengths
        exact = 2 * held - (self.record_length - 1)  # twice the tokens
        nbytes = (2 * num_tokens - exact) * rows * 4 * record.num_words // (2 * self.record_length)
        nbytes += exact * token // 2
        if not record.key_group:
            nbytes += 2 * rows * layer.key_dim * 2
        if record.boosted:
            nbytes += rows * layer.key_dim
        return max(held * token, nbytes) + lengths


def kivi_seed(dtype: str = "float16") -> Kivi:
    """The seed's layout: 2 bits, key scales over the whole sequence, value scales a head, 32 exact tokens besides."""
    return Kivi(nbits=2, key_group_size=SEQUENCE, value_group_size=HEAD, residual_length=32, dtype=dtype)


BOOSTED: dict[int, tuple[int, int, int]] = {2: (2, 2, 2), 3: (3, 1, 2), 4: (3, 1, 4)}
"""``nbits`` of :func:`kivi_boost` -> key bits, boost bits, value bits."""


def kivi_boost(
    nbits: int = 2,
    group_size: int = 64,
    residual_length: int = 128,
    key_nbits: int | None = None,
    boost_nbits: int | None = None,
    value_nbits: int | None = None,
    sink_length: int = 4,
    dtype: str = "float16",
) -> Kivi:
    """KIVI with boosted key channels, rotated values and four exact first tokens: about 2.6, 3 and 4 bits an element.

    ``nbits`` chooses key, boost and value bits, which may be given instead.  Raises ``ValueError`` for other ``nbits``.
    """
    if nbits not in BOOSTED:
        raise ValueError(f"kivi-boost nbits {repr(nbits)[:40]}: allowed are {', '.join(map(str, BOOSTED))}")
    key, boost, value = BOOSTED[nbits]
    return Kivi(
        nbits=key if key_nbits is None else key_nbits,
        group_size=group_size,
        residual_length=residual_length,
        value_nbits=value if value_nbits is None else value_nbits,
        sink_length=sink_length,
        dtype=dtype,
        boost_nbits=boost if boost_nbits is None else boost_nbits,
        rotate_values=True,
    )


@dataclass(frozen=True)
class Record:
    """The packed record of one key/value head: sizes and offsets, in 32-bit words unless named otherwise.

    ``key_group`` is the number of tokens that share a key scale; 0 means that the scales are kept
    outside the record (one a channel over the whole sequence).  ``value_group`` is the number of
    channels that share a value scale.  ``boost_nbits`` are the bits that the first ``boosted`` key channels have
    besides; ``rotated_values`` have a scale and no zero.
    """

    num_tokens: int
    key_dim: int
    value_dim: int
    key_nbits: int
    value_nbits: int
    key_group: int
    value_group: int
    boost_nbits: int = 0
    rotated_values: bool = False

    @cached_property
    def boosted(self) -> int:
        """Key channels with more bits, the first of the row's order; 0 without any."""
        return boosted_channels(self.key_dim) if self.boost_nbits else 0

    @cached_property
    def rotation(self) -> int:
        """Channels that one Hadamard matrix mixes: the largest power of two that divides the head; 0 without any."""
        return self.value_dim & -self.value_dim if self.rotated_values else 0

    @cached_property
    def tile(self) -> int:
        """Tokens a tile."""
        return min(MAX_TILE, self.num_tokens & -self.num_tokens)

    def dim(self, stream: str) -> int:
        """Channels of ``key`` and ``value`` codes, and of the ``boost`` plane."""
        return {"key": self.key_dim, "value": self.value_dim, "boost": self.boosted}[stream]

    def nbits(self, stream: str) -> int:
        return {"key": self.key_nbits, "value": self.value_nbits, "boost": self.boost_nbits}[stream]

    def orders(self, stream: str) -> tuple[tuple[int, int, int, int, TileOrder], ...]:
        """``(first channel, width, lowest bit, word offset in the tile, order)`` of every chunk and plane."""
        out: list[tuple[int, int, int, int, TileOrder]] = []
        offset = channel = 0
        for width in channel_chunks(self.dim(stream)) if self.dim(stream) else ():
            low = 0
            for bits in PLANES[self.nbits(stream)]:
                order = tile_order("value" if stream == "value" else "key", self.tile, width, bits)
                out.append((channel, width, low, offset, order))
                offset += order.num_words
                low += bits
            channel += width
        return tuple(out)

    def tile_words(self, stream: str) -> int:
        """Words of one tile's codes."""
        return self.tile * self.dim(stream) * self.nbits(stream) // 32

    @cached_property
    def num_key_groups(self) -> int:
        return self.num_tokens // self.key_group if self.key_group else 0

    @cached_property
    def num_value_groups(self) -> int:
        """Value groups a token."""
        return self.value_dim // self.value_group

    @cached_property
    def sections(self) -> tuple[tuple[str, int, int], ...]:
        """``(name, offset, words)`` of every section, in memory order."""
        key_params = self.num_key_groups * self.key_dim // 2
        value_params = self.num_tokens * self.num_value_groups // 2
        sizes = (
            ("key_codes", self.num_tokens * self.key_dim * self.key_nbits // 32),
            ("value_codes", self.num_tokens * self.value_dim * self.value_nbits // 32),
            ("key_scale", key_params),
            ("key_zero", key_params),
            ("value_scale", value_params),
            *(() if self.rotated_values else (("value_zero", value_params),)),
            *((("key_boost_codes", self.num_tokens * self.boosted * self.boost_nbits // 32),) if self.boosted else ()),
        )
        out, offset = [], 0
        for name, words in sizes:
            out.append((name, offset, words))
            offset += words
        return tuple(out)

    def offset(self, name: str) -> int:
        """First word of a section."""
        return next(offset for section, offset, _ in self.sections if section == name)

    @cached_property
    def num_words(self) -> int:
        """Words of the whole record: a multiple of 4, so that every record starts on 16 bytes."""
        return sum(words for _, _, words in self.sections)
