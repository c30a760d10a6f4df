"""The cache that transformers is given: one kvruntime layer a model layer, and what becomes of new keys and values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from inspect import signature
from operator import attrgetter
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from transformers import GenerationMixin, cache_utils

from kvruntime.hf import exact
from kvruntime.hf.exact import PACKED, Kind, packed_methods
from kvruntime.hf.lengths import Lengths
from kvruntime.hf.padding import Columns
from kvruntime.hf.read_back import ReadBackTensor
from kvruntime.kernels.reference import PLAIN, Scores
from kvruntime.methods import Layer, Steps, changes_scores, make_layer, shared_tensors
from kvruntime.methods.rows import rows_of, too_many
from kvsim.engines.kvruntime import stored_shape
from kvsim.layout import LayerShape, Method
from kvsim.methods.evict import windowed

STATE_VERSION = 4
"""Of what a pickled cache holds."""

HELD_NBYTES = 64 * 2**20
"""Keys and values that wait to be stored with those of other layers, at most: more than that keep a GPU busy alone."""

PENDING = attrgetter("pending")
"""Of a layer: in a map, a third of a generator's time."""

TAKES_CACHE = "cache" in signature(GenerationMixin.prepare_inputs_for_generation).parameters
"""Models take a cache as ``cache``: transformers from 5.24 on, where ``past_key_values`` still works and warns."""


def argument(cache: Any) -> dict[str, Any]:
    """``cache``, this package's or any other, as the keyword argument that a model's forward and ``generate`` take."""
    return {"cache" if TAKES_CACHE else "past_key_values": cache}


UNCOMPILED = "a plain kvruntime cache runs uncompiled: make_cache(..., compiled=True) makes one that does not"


class Length(int):
    """A mask length that comes from this cache, so that the mask function can tell."""

    columns: Columns | None = None
    """The cache's, where the host plans the steps."""
    window: int | None = None
    """Of the layer, which sees to it itself."""


class AppendQueue:
    """What the layers of one forward were given, held back so that few launches store it all.

    A launch costs the host more than packing a short prompt costs the GPU.  Nothing is read from the layers before
    :meth:`store`; it stores ``HELD_NBYTES`` of keys and values at the latest, which bounds the memory held (a view
    keeps all that it is a view of).
    """

    def __init__(self) -> None:
        self._held: list[tuple[Layer, Tensor, Tensor, list[int] | None, Tensor | None]] = []
        self._nbytes = 0

    def append(self, layer: Layer, key: Tensor, value: Tensor, lengths: list[int] | None, query: Tensor | None) -> None:
        """``layer.append(key, value, lengths, query)``, now or later."""
        self._held.append((layer, key, value, lengths, query))
        self._nbytes += key.nbytes + value.nbytes
        self._nbytes += 0 if query is None else query.untyped_storage().nbytes()  # of which it may be a part
        if self._nbytes >= HELD_NBYTES:
            self.store()

    def store(self) -> None:
        """Store what is held."""
        held, self._held, self._nbytes = self._held, [], 0
        if held:
            with torch.inference_mode(False), torch.no_grad():
                held[0][0].append_all(held)


class Forward:
    """Whether a model runs with the cache now, so that its attention function stores what ``update`` is given; and
    whether every layer has stored what the others have."""

    def __init__(self) -> None:
        self.running = False
        self.open = False
        """Whether a forward has not ended, or was interrupted."""
        self.before: list[int | None] = []
        """Columns that each layer held when it began."""
        self.unfinished = False
        """Whether it raised when some layers had stored its tokens: those not reached may not know their shape yet."""
        self.states = 0
        """States that were written since it began."""

    def begin(self, layers: Sequence[Any]) -> None:
        """Raises ``ValueError`` where a forward ended between layers, before another is silently wrong."""
        if torch.compiler.is_compiling():
            return
        columns = _columns_of(layers)
        if self.open:
            self._judge(columns)
        self._check(layers, columns)
        self.before, self.open, self.states = columns, True, 0

    def end(self, layers: Sequence[Any], raised: bool) -> None:
        """The forward ended."""
        if torch.compiler.is_compiling():
            return
        self.open = False
        if raised:
            self._judge(_columns_of(layers))
            for layer in packed(layers):
                layer.pending = False

    def _judge(self, held: list[int | None]) -> None:
        """Whether a forward ended half-way, whose layers hold ``held`` columns now."""
        if held == self.before and not self.states:
            return
        counts = {count for count in held if count is not None}
        self.unfinished = self.unfinished or (held != self.before and len(counts) > 1)
        if self.states and held == self.before:
            self.unfinished = True  # states went ahead of every count

    def check(self, layers: Sequence[Any]) -> None:
        """Raises ``ValueError`` where layers hold unlike numbers of tokens, or one never stored what it was given."""
        self._check(layers, _columns_of(layers))

    def _check(self, layers: Sequence[Any], columns: list[int | None]) -> None:
        """:meth:`check` of layers that hold ``columns``: without a graph at every step, so mostly they are alike."""
        if self.unfinished and self.states:
            raise ValueError("states of the cache went ahead of its tokens: a forward ended half-way, reset() it")
        if columns.count(columns[0]) < len(columns):
            seen = zip(layers, columns, strict=True)
            held = {n for layer, n in seen if n is not None and (layer.is_initialized or self.unfinished)}
            if len(held) > 1:
                counts = " and ".join(map(str, sorted(held)))
                raise ValueError(
                    f"layers of the cache hold {counts} tokens: a forward or update ended half-way, reset() it"
                )
        if any(map(PENDING, packed(layers))):
            raise ValueError("the cache was given tokens that it has not stored: a forward was interrupted, reset() it")


def packed(layers: Sequence[Any]) -> list[CacheLayer]:
    """Those of ``layers`` that are packed."""
    return [layer for layer in layers if getattr(layer, "is_packed", False)]  # a tenth of an isinstance's time


def _columns_of(layers: Sequence[Any]) -> list[int | None]:
    """Columns that each layer has seen; None where it does not count them."""
    return [
        layer.num_columns + layer.ahead
        if getattr(layer, "is_packed", False)
        else layer.cumulative_length
        if isinstance(layer, exact.WindowLayer)
        else None
        for layer in layers
    ]


class SharedTensors:
    """The tensors that the layers of one cache share (a rotation, a codebook), made once a device."""

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self.made: dict[tuple[Method, LayerShape, torch.device], Mapping[str, Tensor]] = {}

    def of(self, method: Method, shape: LayerShape, device: torch.device) -> Mapping[str, Tensor]:
        """Those of layers of ``shape`` under ``method`` on ``device``."""
        if (method, shape, device) not in self.made:
            self.made[method, shape, device] = shared_tensors(method, [shape] * self.num_layers, device)
        return self.made[method, shape, device]


class Books(NamedTuple):
    """What all layers of a cache have in common."""

    columns: Columns
    forward: Forward
    shared: SharedTensors
    lengths: Lengths


class PendingUpdate:
    """New keys or values between ``update`` and the attention function: no tensor, and never the past.

    ``fresh`` ``[batch_size, num_kv_heads, L, dim]``; ``shape`` counts the stored columns too, as stock caches do;
    ``steps``: what :meth:`CacheLayer.step` wants, None where the host plans.
    Anything else that touches it is refused with one clear error.
    """

    __slots__ = ("fresh", "layer", "num_columns", "steps")

    def __init__(self, layer: CacheLayer, fresh: Tensor, num_columns: int, steps: Any) -> None:
        self.layer, self.fresh, self.num_columns, self.steps = layer, fresh, num_columns, steps

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.fresh.shape[:2], self.num_columns, self.fresh.shape[3]))

    @property
    def dtype(self) -> torch.dtype:
        return self.fresh.dtype

    @property
    def device(self) -> torch.device:
        return self.fresh.device

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse(name)

    def __getitem__(self, index: object) -> NoReturn:
        self._refuse("[]")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        cls._refuse(getattr(function, "__name__", str(function)))

    @classmethod
    def _refuse(cls, name: str) -> NoReturn:
        raise ValueError(
            f"{name} touches cached keys or values outside the kvruntime attention interface: "
            "the model is not supported, or its attention implementation is set while it runs"
        )


class CacheLayer(cache_utils.CacheLayerMixin):  # type: ignore[misc]
    """One layer as transformers sees it.  ``store`` is made at the first update, which tells batch size and device."""

    is_sliding = False
    is_packed = True
    store: Layer
    steps: Steps | None = None
    window: int | None = None
    """Tokens that a query sees, where the layer packs a window."""
    kind = ""
    """Of what a token brings: ``mla`` where that is a latent and a rotary key."""
    scale: float | None = None
    """What the model's attention scales scores by, once it was seen."""
    held: AppendQueue | None = None
    """Where new tokens wait, during a forward that reads none of them back."""
    ahead = 0
    """Columns held that ``num_columns`` does not count yet."""

    def __init__(self, method: Method, books: Books, max_seq_len: int | None) -> None:
        super().__init__()
        self.method, self.max_seq_len = method, max_seq_len
        self.columns, self.forward, self.shared, self.lengths = books
        self.num_columns = 0
        self.pending = False
        """Whether tokens came that the attention function has not stored."""
        self.dtype: torch.dtype | None = None
        """Of the keys and values that came, whatever they are stored as."""
        self.num_q_heads = 0
        """Of the model's attention, once it was seen."""
        self.shape: LayerShape | None = None
        """What a token brings."""
        self.accepted: tuple[object, ...] = ()
        """Of the tokens that came last: rows, heads, channels, type and device."""
        self.is_filled = False
        """Whether ``store.shape`` has more channels, zeros: where the method packs multiples."""

    @property
    def is_croppable(self) -> bool:
        """Whether candidates that were not accepted can be taken back (``crop`` refuses where they are packed)."""
        return not self.is_initialized or self.store.is_croppable

    @property
    def keys(self) -> Tensor | None:
        """A copy of the keys held, read back (:meth:`read`), not to be written to; None before the first."""
        return self.read()[0].as_subclass(ReadBackTensor) if self.is_initialized else None

    @keys.setter
    def keys(self, to: None) -> None:
        _refuse_assignment(to)

    @property
    def values(self) -> Tensor | None:
        """A copy of the values held, read back (:meth:`read`), not to be written to; None before the first."""
        return self.read()[1].as_subclass(ReadBackTensor) if self.is_initialized else None

    @values.setter
    def values(self, to: None) -> None:
        _refuse_assignment(to)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        shape = self._shape_of(key_states, value_states)
        batch_size, device = key_states.shape[0], key_states.device
        with torch.inference_mode(False):  # tensors made under inference_mode could not be written outside it
            self.make_store(shape, batch_size, device)

    def make_store(self, shape: LayerShape, batch_size: int, device: torch.device) -> None:
        """Makes the kvruntime layer, beside the tensors that all layers share on this device."""
        shape = replace(shape, kind=self.kind)
        self.shape, held = shape, stored_shape(self.method, shape)
        self.is_filled = held != shape
        shared, num_layers = self.shared.of(self.method, held, device), self.shared.num_layers
        try:
            self.store = make_layer(self.method, held, batch_size, self.max_seq_len, device, shared)
        except torch.OutOfMemoryError as error:
            what = (self.method, held, batch_size, self.max_seq_len or 0, device, num_layers)
            raise torch.OutOfMemoryError(too_many(*what)) from error
        self.store.num_layers = num_layers
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Stores new tokens ``[batch_size, num_kv_heads, L, dim]``, every column a token of its row.

        Returns ``(keys, values)`` ``[batch_size, num_kv_heads, columns held, dim]`` in their type: a copy of what was
        held before, read back (dequantized), then what came, as it is.  While a model runs with the cache, instead what
        its attention function is given in place of them, which stores them.
        """
        if self.forward.running:
            pend = _pend_uncompiled if torch.compiler.is_compiling() else CacheLayer.pend
            return pend(self, key_states, value_states)
        self._accept(key_states, value_states)
        held = self.read() if self.num_columns else None
        self.columns.all_tokens(self.store.batch_size)
        self.append(key_states, value_states, None)
        if held is None:
            return key_states, value_states
        return torch.cat([held[0], key_states], 2), torch.cat([held[1], value_states], 2)

    def pend(self, key_states: Tensor, value_states: Tensor) -> tuple[Any, Any]:
        """What the attention function is given in place of the full keys and values."""
        self._accept(key_states, value_states)
        self.pending = True
        given = self.num_columns + key_states.shape[2], self.steps
        return PendingUpdate(self, key_states, *given), PendingUpdate(self, value_states, *given)

    def _accept(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes the store at first, and raises ``ValueError`` for tokens that are none of the sequence held."""
        batch_size, num_kv_heads, _, key_dim = key_states.shape
        kind = (batch_size, num_kv_heads, key_dim, value_states.shape[3], key_states.dtype, key_states.device)
        if self.num_columns and kind == self.accepted and batch_size == self.store.batch_size:
            return
        shape = self._shape_of(key_states, value_states)
        same = self.is_initialized and (self.store.batch_size, self.shape) == (batch_size, shape)
        same = same and self.store.device == key_states.device
        if not self.is_initialized or not (self.num_columns or same):
            self.lazy_initialization(key_states, value_states)
        elif batch_size != self.store.batch_size:
            raise ValueError(f"a batch of {batch_size} rows for a cache that holds {self.store.batch_size}: reset() it")
        elif self.shape is not None and self.shape != shape:
            raise ValueError(f"{_heads(shape)} for a cache that holds {_heads(self.shape)}: reset() it")
        elif not same:
            raise ValueError(f"tokens on {key_states.device} for a cache that lies on {self.store.device}: reset() it")
        if self.num_columns and self.dtype is not None and key_states.dtype != self.dtype:
            names = [str(dtype).removeprefix("torch.") for dtype in (key_states.dtype, self.dtype)]
            raise ValueError(f"tokens of {names[0]} for a cache that was given {names[1]}: reset() it")
        self.dtype, self.accepted = key_states.dtype, kind

    def _shape_of(self, key: Tensor, value: Tensor) -> LayerShape:
        return LayerShape(key.shape[1], key.shape[3], value.shape[3], kind=self.kind)

    def settle(self) -> None:
        """Brings the host's books up to date, where steps on the device leave them behind: here they never are."""

    def read(self) -> tuple[Tensor, Tensor]:
        """``(keys, values)`` held, each ``[batch_size, num_kv_heads, num_columns, dim]``: as they would be attended to,
        dequantized, in the type that they came in; zeros where a row has padding."""
        if self.shape is None:
            raise ValueError("the layer was given no tokens yet: there is nothing to read")
        if self.held is not None:
            self.held.store()
        store, shape = self.store, self.shape
        size = store.batch_size, shape.num_kv_heads, self.num_columns
        out = [
            torch.zeros(*size, dim, dtype=self.dtype, device=store.device) for dim in (shape.key_dim, shape.value_dim)
        ]
        if self.num_columns:
            self.columns.all_tokens(store.batch_size)
            real = self.columns.tokens(self.num_columns, store.device)
            if store.seq_lengths != store.row_lengths:
                raise ValueError(f"{store.method.name} has evicted tokens: they cannot be read back")
            for row in range(store.batch_size):
                for whole, tokens in zip(out, store.tokens(row), strict=True):
                    whole[row, :, real[row]] = tokens[..., : whole.shape[3]].to(whole.dtype)
        return out[0], out[1]

    def read_mask(self, mask: Tensor | None, length: int) -> list[int] | None:
        """Each row's tokens among the ``length`` new columns: ``Columns.read``."""
        return self.columns.read(mask, self.num_columns, length, self.store.batch_size)

    def order(self, mask: Tensor | None) -> Tensor | None:
        """How to bring the new columns' padding before their tokens; None where it is there already."""
        return self.columns.order(mask, self.num_columns) if self.columns.scattered and mask is not None else None

    def append(self, key: Tensor, value: Tensor, lengths: list[int] | None, query: Tensor | None = None) -> None:
        """Stores what an update brought, once the attention function has seen the mask.  ``query``: the queries of
        these tokens, for a method that keeps tokens by them."""
        with torch.inference_mode(False), torch.no_grad():
            self.store.append(*self._filled(key, value), lengths, self._observed(query))
        self.num_columns += key.shape[2]
        self.pending = False

    def append_first(self, key: Tensor, value: Tensor, lengths: list[int] | None, query: Tensor | None = None) -> None:
        """:meth:`append` to an empty layer, which may be held back."""
        if self.held is None:
            self.append(key, value, lengths, query)
        else:
            self.held.append(self.store, *self._filled(key, value), lengths, self._observed(query))
            self.num_columns += key.shape[2]
            self.pending = False

    def takes_mask(self, mask: Tensor | None) -> bool:
        """Whether a step was told all of ``mask``.  Raises ``ValueError`` for a 4-D one that is not this cache's."""
        if mask is not None and mask.shape[3] > 1:
            raise ValueError(f"attention mask of shape {list(mask.shape)}: a step takes a 2-D one or none")
        return True

    def attend(self, query: Tensor, scale: float, fresh: Any = None, scores: Scores = PLAIN) -> Tensor:
        """``Layer.attend``; heads that were filled up with zeros come back as they are."""
        assert self.shape is not None
        more = {} if scores.is_plain else {"scores": scores}
        if more and not changes_scores(self.method, query.device):
            raise ValueError(f"{self.method.name} does not attend with sinks or softcaps on {query.device.type}")
        if fresh is not None:
            fresh = (*self._filled(*fresh[:2]), fresh[2])
        if self.kind:  # a query of latents comes as they are stored
            return self.store.attend(query, scale, fresh, **more)
        query = filled(query, self.store.shape.key_dim)
        out = self.store.attend(query, scale, fresh, **more)
        return out[..., : self.shape.value_dim]

    def _filled(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return filled(key, self.store.shape.key_dim), filled(value, self.store.shape.value_dim)

    def _observed(self, query: Tensor | None) -> Tensor | None:
        """Queries, for a method that asks for them: as many as it looks at, such that the root of the channels that it
        sees scales them, if that matters to it."""
        store = self.store
        if query is None or not store.wants_query:
            return None
        if store.last_queries is not None:
            query = query[:, :, -store.last_queries :]
        dim = store.shape.key_dim
        factor = dim**0.5 * (query.shape[3] ** -0.5 if self.scale is None else self.scale)
        query = filled(query, dim)
        return query * factor if store.scales_queries and abs(factor - 1) >= 1e-6 else query

    def step(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, steps: Any, scores: Scores = PLAIN
    ) -> Tensor:
        """Stores one token a row and attends to all, ``[batch_size, num_q_heads, 1, value_dim]``: ``Layer.step``."""
        out = self.store.step(query, key, value, scale, steps, scores=scores)
        self.pending = False
        return out

    def advance(self, query: Tensor, key: Tensor, value: Tensor, scale: float, scores: Scores) -> Tensor:
        """:meth:`step` where the host keeps the books: for a layer that prefers it to an append and an attention."""
        store = self.store
        assert self.shape is not None
        needed = max(store.seq_lengths) + 1
        if needed > store.num_provided:
            with torch.inference_mode(False), torch.no_grad():
                store.provide(needed)
        if self.is_filled:
            query = query if self.kind else filled(query, store.shape.key_dim)
            key, value = self._filled(key, value)
        out = store.step(query, key, value, scale, self.lengths.before(store, query.shape[1]), scores=scores)
        if store.device.type == "cuda":  # elsewhere a step keeps the books
            store.advance(1)
        self.num_columns += 1
        self.pending = False
        return out[..., : self.shape.value_dim] if self.is_filled and not self.kind else out

    def get_seq_length(self) -> int:
        return self.num_columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        length = self.num_columns + query_length
        if torch.compiler.is_compiling():  # torch.compile cannot make a Length
            return length, 0
        own = Length(length)
        own.columns, own.window = self.columns, self.window
        return own, 0

    def get_max_length(self) -> int:
        return -1 if self.max_seq_len is None else self.max_seq_len

    get_max_cache_shape = get_max_length

    @property
    def batch_size(self) -> int:
        if not self.is_initialized:
            raise AttributeError("batch_size")  # as stock layers before their first update
        return self.store.batch_size

    def reset(self) -> None:
        self.num_columns, self.pending = 0, False
        if self.is_initialized:
            self.store.reset()

    def offload(self) -> NoReturn:
        raise ValueError("offloading is not supported: the cache stays on the model's device")

    prefetch = offload

    def _together(self, *args: object) -> NoReturn:
        raise ValueError("the layers of a kvruntime cache change together: call this on the cache, not on its layer")

    reorder_cache = crop = batch_repeat_interleave = batch_select_indices = _together


def told(layer: Any, kind: Kind) -> Any:
    """``layer``, told what ``kind`` says of it."""
    layer.window = kind.window or None
    layer.kind = kind.shape.kind if kind.shape is not None and kind.shape.kind != "full" else ""
    return layer


_pend_uncompiled = torch.compiler.disable(CacheLayer.pend, reason=UNCOMPILED)


def _refuse_assignment(to: object) -> None:
    if to is not None:  # the base class begins with None
        raise ValueError("keys and values of a kvruntime cache are read only: update() stores more of them")


def num_removed(given: Any) -> int:
    """How many tokens ``crop(given)`` takes back; transformers 5.17 hands over a tensor.  Raises ``ValueError``."""
    count = -int(given)
    if count != -given:
        raise ValueError(f"crop({given}): allowed are whole numbers")
    if count < 0:
        raise ValueError(f"crop({given}): allowed is 0 or below, minus the number of tokens to remove")
    return count


def filled(x: Tensor, dim: int) -> Tensor:
    """``x [..., channels]`` with zeros up to ``dim`` channels."""
    return x if x.shape[-1] == dim else torch.nn.functional.pad(x, (0, dim - x.shape[-1]))


def _heads(shape: LayerShape) -> str:
    return f"{shape.num_kv_heads} kv heads of {shape.key_dim}"


class HybridLayer(cache_utils.LinearAttentionLayer, CacheLayer):  # type: ignore[misc]
    """A layer with full attention, packed, beside a state, which stays as it is."""

    is_compileable = False

    def __init__(self, method: Method, books: Books, max_seq_len: int | None, num_states: int) -> None:
        CacheLayer.__init__(self, method, books, max_seq_len)
        cache_utils.LinearAttentionLayer.__init__(self, number_of_states=num_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Of keys and values, which come by position, or of a state, which comes by name."""
        kind = CacheLayer if args else cache_utils.LinearAttentionLayer
        kind.lazy_initialization(self, *args, **kwargs)

    @property
    def is_croppable(self) -> bool:
        """Whether both are."""
        state: bool = cache_utils.LinearAttentionLayer.is_croppable.fget(self)
        return state and bool(CacheLayer.is_croppable.fget(self))  # type: ignore[attr-defined]

    def reset(self) -> None:
        CacheLayer.reset(self)
        cache_utils.LinearAttentionLayer.__init__(self, number_of_states=self.number_of_states)

    get_max_length = CacheLayer.get_max_length
    offload = prefetch = CacheLayer.offload
    reorder_cache = crop = CacheLayer._together


class Cache(cache_utils.Cache):  # type: ignore[misc]
    """The cache that ``make_cache`` returns.

    ``method`` is kvsim's object.  Its ``buffers(shape, batch_size, num_provided)`` over the packed layers, and windows
    and states as transformers keeps them, are exactly the tensors held.  Left padding is never stored in packed layers;
    ``get_seq_length`` counts it all the same, as transformers expects.  ``layers``: how many packed ones, or each one's
    kind.
    """

    layers: list[Any]
    recorded_drafts = False
    """Whether ``generate()`` had windows and states record what could come back, for drafts."""
    prompt_columns = 0
    """Columns of the prompt that ``generate()`` was last given, by its mask; 0 where it did not say."""

    def __init__(self, method: Method, layers: int | Sequence[Kind], max_seq_len: int | None = None) -> None:
        self.method, self.max_seq_len = method, max_seq_len
        self.kinds = None if isinstance(layers, int) else list(layers)
        num_packed = layers if isinstance(layers, int) else sum(kind.shape is not None for kind in layers)
        self.columns, self.forward, self.lengths = Columns(), Forward(), Lengths()
        self.shared = SharedTensors(num_packed)
        self.edits = 0
        """How often tokens were taken back or rows changed."""
        super().__init__(layers=self._make_layers(layers if isinstance(layers, int) else len(layers)))

    @property
    def _books(self) -> Books:
        return Books(self.columns, self.forward, self.shared, self.lengths)

    def _methods(self, kinds: Sequence[Kind]) -> list[Method]:
        """What stores each layer of ``kinds``; of one that is not packed, any."""
        chosen = iter(packed_methods(self.method, kinds))
        return [self.method if kind.shape is None and kind.keeps else next(chosen) for kind in kinds]

    def _make_layers(self, num_layers: int) -> list[Any]:
        kinds = self.kinds or [PACKED] * num_layers
        return [self._make_layer(*each) for each in zip(kinds, self._methods(kinds), strict=True)]

    def _make_layer(self, kind: Kind, method: Method) -> Any:
        if not kind.keeps:
            layer = CacheLayer(windowed(method, kind.window) if kind.window else method, self._books, self.max_seq_len)
            return told(layer, kind)
        if kind.shape is None:
            return exact.made(kind)
        return HybridLayer(method, self._books, self.max_seq_len, kind.num_states)

    @property
    def packed(self) -> list[CacheLayer]:
        """The layers that are packed."""
        return packed(self.layers)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """One layer's new keys and values: :meth:`CacheLayer.update`."""
        if layer_idx >= len(self.layers):
            raise ValueError(f"layer {layer_idx} of a model for a cache of {len(self.layers)}: make one for this model")
        return self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Any:
        """A layer's convolution state, in transformers' own layer."""
        self.forward.states += 1
        return super().update_conv_state(conv_states, layer_idx, state_idx, **kwargs)

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **more: Any) -> Any:
        """A layer's recurrent state, in transformers' own layer."""
        self.forward.states += 1
        return super().update_recurrent_state(recurrent_states, layer_idx, state_idx, **more)

    def __getstate__(self) -> dict[str, Any]:
        """For ``pickle``, ``torch.save`` and ``copy``."""
        return {"version": STATE_VERSION, **self.__dict__}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        version = state.pop("version", None)
        if version != STATE_VERSION:
            raise ValueError(f"a saved cache of version {version}: this kvruntime reads version {STATE_VERSION}")
        self.__dict__.update(state)

    def hold(self) -> None:
        """A forward begins: layers may keep a first prompt until :meth:`let_go`."""

    def let_go(self, raised: bool = False) -> None:
        """It ended, or ``raised``."""

    def begin(self, drafts: bool, prompt_columns: int) -> None:
        """``generate()`` begins, with ``drafts`` or without: for these it has windows and states record what could come
        back, and never ends that."""
        self.prompt_columns = prompt_columns
        records = [layer for layer in self.layers if getattr(layer, "record_past", False)]
        if self.recorded_drafts and not drafts:
            for layer in records:
                exact.stop_recording(layer)
        self.recorded_drafts = drafts and (self.recorded_drafts or not records)

    def expect(self, num_columns: int) -> None:
        """Columns that ``generate()`` may need: this cache grows as tokens come."""

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor | None, None]]:
        """Each layer's ``(keys, values, window or None)``, as ``DynamicCache`` gives them: copies, read back, of packed
        ones.  A layer with states alone has neither."""
        for layer in self.layers:
            window = getattr(layer, "_sliding_window_tensor", None)
            if isinstance(layer, CacheLayer) and layer.is_initialized:
                yield *layer.read(), window
            else:
                yield getattr(layer, "keys", None), getattr(layer, "values", None), window

    def __repr__(self) -> str:
        runs = f", kernel={self.kernel}" if self.stores else ""
        mixed = f", packed={len(self.packed)}" if len(self.packed) < len(self.layers) else ""
        return f"Cache({self.method.name}, num_layers={len(self.layers)}{mixed}, nbytes={self.nbytes}{runs})"

    @property
    def kernel(self) -> str:
        """What attends to one query a row, in words; empty before the first forward."""
        return " and ".join(sorted({store.kernel for store in self.stores}))

    @property
    def stores(self) -> list[Layer]:
        """The layers' kvruntime objects, those that have been used."""
        return [layer.store for layer in self.packed if layer.is_initialized]

    @property
    def nbytes(self) -> int:
        """Bytes of every storage held: the layers' own, packed or not, and once a device what they share."""
        tensors = [tensor for store in self.stores for tensor in (*store.tensors.values(), *store.shared.values())]
        tensors += [tensor for layer in self.layers for tensor in exact.tensors(layer).values()]
        storages = [tensor.untyped_storage() for tensor in tensors]
        return sum({(storage.device, storage.data_ptr()): storage.nbytes() for storage in storages}.values())

    @property
    def step_nbytes(self) -> int:
        """Bytes, beside ``nbytes``, of what steps count, check and work in."""
        parts = (self.lengths, self.columns, getattr(self, "counts", None), getattr(self, "graphs", None))
        return sum(int(part.nbytes) for part in parts if part is not None)

    @property
    def num_provided(self) -> int:
        """Tokens a row that the buffers provide for now."""
        return max((store.num_provided for store in self.stores), default=0)

    def _owner(self, layer_idx: int) -> int:
        """``layer_idx``; in a pipeline stage that lacks it the first layer of its kind that is here; where it counts no
        tokens the first that does."""
        layer = self.layers[layer_idx]
        counts = getattr(layer, "is_packed", False) or isinstance(layer, exact.WindowLayer)
        if counts and layer.is_initialized:
            return layer_idx
        if isinstance(layer, exact.WindowLayer):
            alike = [index for index, other in enumerate(self.layers) if isinstance(other, exact.WindowLayer)]
        else:
            alike = [index for index, other in enumerate(self.layers) if isinstance(other, CacheLayer)]
        here = [index for index in alike if self.layers[index].is_initialized]
        if counts and not here:
            return layer_idx
        return here[0] if here else alike[0]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        if layer_idx >= len(self.layers):
            return 0  # as a stock cache says of a layer that nothing came to
        return self.layers[self._owner(layer_idx)].get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.layers[self._owner(layer_idx)].get_mask_sizes(query_length)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """``max_seq_len``, -1 where the packed layers grow: a window's length is no bound of the cache."""
        if layer_idx is not None and layer_idx < len(self.layers):
            return int(self.layers[layer_idx].get_max_length())
        return -1 if self.max_seq_len is None else self.max_seq_len

    def reset(self) -> None:
        """Forget every token; the packed layers' buffers stay for the next sequence."""
        self.edits += 1
        self.columns.reset()
        self.forward.running = self.forward.open = self.forward.unfinished = False
        self.forward.states = 0
        self.recorded_drafts = False  # no layer records after it
        for index, layer in enumerate(self.layers):
            if isinstance(layer, CacheLayer):
                layer.reset()
            elif self.kinds:
                self.layers[index] = self._make_layer(self.kinds[index], self.method)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows become ``beam_idx`` (int64, any number of rows from one on, repeats allowed).  Raises ``ValueError`` for
        rows that are not there, before anything changes."""
        index = beam_idx.cpu()  # once, for the host's books of every layer
        rows = rows_of(index, self.batch_size) if self.stores else index.tolist()
        self.edits += 1
        self.columns.reorder(rows)
        for store in self.stores:
            store.reorder(index)
        for layer in self.layers:
            if isinstance(layer, HybridLayer):
                cache_utils.LinearAttentionLayer.reorder_cache(layer, index)
            elif not isinstance(layer, CacheLayer):
                layer.reorder_cache(index)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times."""
        if self.stores:
            self.reorder_cache(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor | Sequence[int] | slice) -> None:
        """Keep the rows ``indices``: int64 or bool, a list or a slice."""
        if self.stores:
            chosen = indices.cpu() if isinstance(indices, Tensor) else indices
            self.reorder_cache(torch.arange(self.batch_size)[chosen])

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest ``-tokens_to_remove`` columns.

        Raises ``ValueError`` when one of their tokens is packed already, or a window or a state cannot take it
        back, and for a positive number.
        """
        tokens_to_remove = -num_removed(tokens_to_remove)
        self.forward.check(self.layers)
        num_columns = self.get_seq_length()
        keep = max(0, num_columns + tokens_to_remove)
        for layer in self.layers:
            exact.check_crop(layer, keep - num_columns)
        self.edits += keep < num_columns
        if keep < num_columns:
            self._crop_packed(num_columns, keep)
        for layer in self.layers:
            exact.crop(layer, keep - num_columns)

    def _crop_packed(self, num_columns: int, keep: int) -> None:
        longest = max(self.columns.row_lengths(num_columns))
        drop = self.columns.lost(num_columns, keep)
        layers = [layer for layer in self.packed if layer.is_initialized]
        one_each = {id(layer.method): layer.store for layer in layers}
        if len(one_each) > 1:  # layers of one method refuse alike, in the first and before it changes
            for store in one_each.values():
                store.check_crop(longest - drop)
        if layers:
            layers[0].store.crop_all([layer.store for layer in layers], longest - drop)
        for layer in layers:
            layer.num_columns = keep
        self.columns.crop(keep)
