"""Any calls of the cache in any order, against an oracle that keeps every token and dequantizes what KIVI packs.

150 sequences of verbs that hypothesis draws, the same ones every time: prompts, steps, several tokens at once, padding
anywhere, tokens from outside a model, NaN that is taken back, crops, beams, copies, a reset.
"""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="the runtime extra (torch) is not installed")
pytest.importorskip("transformers", reason="the runtime extra (transformers) is not installed")

from hypothesis import HealthCheck, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule  # noqa: E402

from kvruntime.hf.attention import attention  # noqa: E402
from kvruntime.hf.cache import Cache  # noqa: E402
from kvruntime.hf.compiled import CompiledCache  # noqa: E402
from kvsim.layout import LayerShape  # noqa: E402
from kvsim.methods import Full, Kivi  # noqa: E402

HEADS, Q_HEADS, DIM, LAYERS, ROOM = 1, 2, 32, 2, 260
METHODS = {
    "full": Full("float32"),
    "2-bit": Kivi(group_size=16, residual_length=32, value_group_size=16, dtype="float32"),
    "2-bit, no token croppable": Kivi(residual_length=32, dtype="float32"),
    "4-bit sink": Kivi(nbits=4, group_size=16, residual_length=48, value_group_size=16, sink_length=3, dtype="float32"),
    "8-bit sink": Kivi(nbits=8, group_size=16, residual_length=64, sink_length=5, dtype="float32"),
    "k4v2": Kivi(key_nbits=4, value_nbits=2, residual_length=64, dtype="float32"),
    "sequence": Kivi(nbits=4, key_group_size="sequence", value_group_size="head", residual_length=64, sink_length=2,
                     dtype="float32"),
}  # fmt: skip


def half_range(x: torch.Tensor, dim: int, nbits: int) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    return ((high - low) / (2**nbits - 1)).half().float(), low.half().float()


def rounded(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, nbits: int) -> torch.Tensor:
    code = torch.where(scale > 0, (x - zero) * (1 / scale), 0.0).clamp(0, 2**nbits - 1).round()
    return code * scale + zero


class Row:
    """One row of one layer: ``key`` and ``value`` ``[HEADS, tokens, DIM]`` as they are read, packed ones rounded."""

    def __init__(self) -> None:
        self.key = self.value = torch.zeros(HEADS, 0, DIM)
        self.packed, self.frozen = 0, None

    def append(self, method, key: torch.Tensor, value: torch.Tensor) -> None:
        self.key, self.value = torch.cat([self.key, key], 1), torch.cat([self.value, value], 1)
        if isinstance(method, Full) or not key.shape[1]:
            return
        record, sink = method.record(LayerShape(HEADS, DIM, DIM)), method.sink_length
        end = self.packed
        while self.key.shape[1] - sink - end > method.residual_length:
            end += record.num_tokens
        span = slice(sink + self.packed, sink + end)
        if end == self.packed:
            return
        new_key, new_value = self.key[:, span], self.value[:, span]
        if record.key_group:
            new_key = new_key.unflatten(1, (-1, record.key_group))
            new_key = rounded(new_key, *half_range(new_key, 2, record.key_nbits), record.key_nbits).flatten(1, 2)
        else:
            self.frozen = self.frozen if self.packed else half_range(new_key, 1, record.key_nbits)
            new_key = rounded(new_key, *self.frozen, record.key_nbits)
        new_value = new_value.unflatten(2, (-1, record.value_group))
        new_value = rounded(new_value, *half_range(new_value, 3, record.value_nbits), record.value_nbits).flatten(2, 3)
        self.key, self.value = self.key.clone(), self.value.clone()
        self.key[:, span], self.value[:, span] = new_key, new_value
        self.packed = end


def softmax64(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """One query ``[Q_HEADS, DIM]`` over ``[HEADS, n, DIM]``."""
    query, key, value = query.double(), *(x.double().repeat_interleave(Q_HEADS // HEADS, 0) for x in (key, value))
    return ((query[:, None] @ key.transpose(1, 2) * DIM**-0.5).softmax(-1) @ value)[:, 0]


class CacheMachine(RuleBasedStateMachine):
    @initialize(
        name=st.sampled_from(sorted(METHODS)), batch=st.integers(1, 3), compiled=st.booleans(), seed=st.integers(0, 99)
    )
    def start(self, name, batch, compiled, seed):
        self.method, self.batch, self.compiled = METHODS[name], batch, compiled
        kind = CompiledCache if compiled else Cache
        self.cache = kind(self.method, LAYERS, ROOM if compiled or seed % 2 else None)
        self.generator = torch.Generator().manual_seed(seed)
        self.empty()

    def empty(self):
        self.columns = [[] for _ in range(self.batch)]
        self.rows = [[Row() for _ in range(self.batch)] for _ in range(LAYERS)]

    def room(self, length: int) -> bool:
        return len(self.columns[0]) + length <= ROOM

    def normal(self, heads: int, length: int) -> torch.Tensor:
        return torch.randn(self.batch, length, heads, DIM, generator=self.generator).transpose(1, 2)

    def forward(self, length: int, padding: int) -> None:
        """``length`` new columns: ``padding`` 0 none, 1 left, 2 right, 3 anywhere."""
        held = len(self.columns[0])
        step = self.compiled and held and length == 1
        real = torch.ones(self.batch, length, dtype=torch.bool)
        if padding and not step:
            real = torch.rand(self.batch, length, generator=self.generator) > 0.3
            if padding < 3:
                real = real.sort(1, descending=padding == 2).values
        columns = torch.cat([torch.tensor(self.columns, dtype=torch.bool), real], 1)
        index = torch.arange(held + length)
        mask = (columns[:, None] & (index <= index[held:, None]))[:, None]
        if columns.all() and padding == 0:
            mask = None
        if step:
            mask = self.cache.counts.mask(None if mask is None else columns)
        forward = self.cache.forward
        forward.running = True
        forward.begin(self.cache.layers)
        for layer in range(LAYERS):
            query, key, value = self.normal(Q_HEADS, length), self.normal(HEADS, length), self.normal(HEADS, length)
            pending = self.cache.update(key, value, layer)
            out, _ = attention(MODULE, query, *pending, mask)
            for b in range(self.batch):
                self.check(out[b], query[b], key[b], value[b], real[b], self.rows[layer][b], not held)
        forward.running = False
        forward.end(self.cache.layers, False)
        self.columns = columns.tolist()

    def check(self, out, query, key, value, real, row, first):
        """The row's attention, and its tokens stored; a padding query gives zeros but for the first columns."""
        length = key.shape[1]
        before = (row.key, row.value)
        row.append(self.method, key[:, real], value[:, real])
        for i in range(length):
            if not real[i]:
                assert first or length == 1 or not out[i].any()
                continue
            seen = real[: i + 1]
            new = key[:, : i + 1][:, seen], value[:, : i + 1][:, seen]
            held = (
                (row.key, row.value)
                if length == 1 and not first
                else [torch.cat(x, 1) for x in zip(before, new, strict=True)]
            )
            torch.testing.assert_close(out[i].double(), softmax64(query[:, i], *held), atol=1e-4, rtol=1e-4)

    @precondition(lambda self: self.room(90))
    @rule(length=st.integers(2, 90), padding=st.integers(0, 3))
    def several(self, length, padding):
        self.forward(length, padding)

    @precondition(lambda self: self.room(3))
    @rule(steps=st.integers(1, 3), padding=st.sampled_from([0, 0, 0, 1]))
    def steps(self, steps, padding):
        for _ in range(steps):
            self.forward(1, padding)

    @precondition(lambda self: self.room(40))
    @rule(length=st.integers(1, 40))
    def update(self, length):
        """From outside a model: every column is a token; what comes back is what is held."""
        held = len(self.columns[0])
        for layer in range(LAYERS):
            new = self.normal(HEADS, length), self.normal(HEADS, length)
            past = self.expected(layer)
            got = self.cache.update(*new, layer)
            for mine, old, now in zip(got, past, new, strict=True):
                torch.testing.assert_close(mine[:, :, :held], old, atol=1e-5, rtol=1e-5)
                assert torch.equal(mine[:, :, held:], now)
            for b in range(self.batch):
                self.rows[layer][b].append(self.method, new[0][b], new[1][b])
        self.columns = [row + [True] * length for row in self.columns]

    def can_crop(self, count: int) -> bool:
        keep = max(0, len(self.columns[0]) - count)
        lost = [sum(row[keep:]) for row in self.columns]
        sink = getattr(self.method, "sink_length", 0)
        fits = all(
            lost[b] == 0 or not row.packed or row.key.shape[1] - lost[b] >= sink + row.packed
            for b, row in enumerate(self.rows[0])
        )
        return len(set(lost)) == 1 and fits

    @rule(count=st.integers(0, 70), near=st.booleans())
    def crop(self, count, near):
        count = count % 5 if near else count
        keep = max(0, len(self.columns[0]) - count)
        if keep == len(self.columns[0]):
            self.cache.crop(-0)
            return
        if not self.can_crop(count):
            with pytest.raises(ValueError, match="cannot crop to"):
                self.cache.crop(-count)
            return
        self.cache.crop(-count)
        lost = sum(self.columns[0][keep:])
        self.columns = [row[:keep] for row in self.columns]
        for row in (row for layer in self.rows for row in layer):
            row.key, row.value = (x[:, : x.shape[1] - lost] for x in (row.key, row.value))

    @precondition(lambda self: self.room(2))
    @rule(length=st.integers(1, 2))
    def nan_and_back(self, length):
        """What was not a number and is taken back is seen by nobody, whichever rows are longer."""
        method, rows = self.method, [row for layer in self.rows for row in layer]
        if not isinstance(method, Full) and method.residual_length - method.record_length < length:
            return
        for layer in range(LAYERS):
            self.cache.update(*[torch.full((self.batch, HEADS, length, DIM), torch.nan)] * 2, layer)
        for row in rows:
            row.append(method, *[torch.full((HEADS, length, DIM), torch.nan)] * 2)
        self.columns = [row + [True] * length for row in self.columns]
        self.crop(length, False)

    def reordered(self, index: list[int]) -> None:
        self.batch = len(index)
        self.columns = [list(self.columns[i]) for i in index]
        self.rows = [[copy.copy(layer[i]) for i in index] for layer in self.rows]

    @precondition(lambda self: self.columns[0])
    @rule(data=st.data(), how=st.sampled_from(["reorder", "repeat", "select", "mask"]))
    def rows_change(self, data, how):
        if how == "repeat":
            if self.batch > 2:
                return
            self.cache.batch_repeat_interleave(2)
            self.reordered([i for i in range(self.batch) for _ in range(2)])
            return
        index = data.draw(st.lists(st.integers(0, self.batch - 1), min_size=1, max_size=3))
        if how == "mask":
            chosen = torch.zeros(self.batch, dtype=torch.bool)
            chosen[index] = True
            self.cache.batch_select_indices(chosen)
            index = chosen.nonzero()[:, 0].tolist()
        else:
            (self.cache.reorder_cache if how == "reorder" else self.cache.batch_select_indices)(torch.tensor(index))
        self.reordered(index)

    @rule(how=st.sampled_from(["deepcopy", "pickle", "reset"]))
    def again(self, how):
        if how == "reset":
            self.cache.reset()
            self.empty()
        else:
            self.cache = copy.deepcopy(self.cache) if how == "deepcopy" else pickle.loads(pickle.dumps(self.cache))

    def expected(self, layer: int) -> list[torch.Tensor]:
        """``(keys, values)`` of a layer, zeros where a row has padding."""
        out = [torch.zeros(self.batch, HEADS, len(self.columns[0]), DIM) for _ in range(2)]
        for b, row in enumerate(self.rows[layer]):
            out[0][b][:, torch.tensor(self.columns[b], dtype=torch.bool)] = row.key
            out[1][b][:, torch.tensor(self.columns[b], dtype=torch.bool)] = row.value
        return out

    @invariant()
    def holds(self):
        assert self.cache.get_seq_length() == len(self.columns[0])
        if not self.columns[0]:
            return
        for layer, held in enumerate(self.cache.layers):
            for got, want in zip((held.keys, held.values), self.expected(layer), strict=True):
                torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
            assert held.store.row_lengths == [sum(row) for row in self.columns]


MODULE = SimpleNamespace(is_causal=True, num_key_value_groups=Q_HEADS // HEADS)
TestCache = CacheMachine.TestCase
TestCache.settings = settings(
    max_examples=150, stateful_step_count=12, derandomize=True, deadline=None, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
