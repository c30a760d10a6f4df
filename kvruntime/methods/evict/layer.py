"""One attention layer that keeps at most a budget of tokens a row: the layer of the method inside, and who leaves it.

Kept tokens have the rotary embedding of the position at which they came, so attention over what is left needs no
positions, and slots no order.  Tokens leave the inner layer's own tensors: memory does not grow beyond the budget.
Heads keep different tokens, as many each: the tensors of a row have one length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from kvruntime.kernels.reference import PLAIN, Scores
from kvruntime.methods.evict.scores import ADDED, SCORES
from kvruntime.methods.rows import Fresh, Rows, Steps, grown, staying
from kvsim.layout import LayerShape
from kvsim.methods.evict import Evict

LOCAL = 32
"""Newest tokens of a prompt that ``expected`` keeps unscored (the paper keeps none; ``snapkv`` its ``observed``)."""


class EvictLayer(Rows):
    """The first ``sink_length`` tokens of a row and others, no more than ``method.num_kept`` says, in ``inner``.

    Policy ``recent`` keeps the newest.  Under the others each head has a score a token, or a block of those that leave
    ``inner`` together; the lowest leave first, but none of the newest ``method.num_recent``.  Tokens that no query has
    scored yet have 0: what a prompt chose leaves after what was generated since and is no longer new.
    ``make``: makes the layer of the method inside.
    """

    method: Evict
    has_steps = False

    def __init__(
        self,
        method: Evict,
        shape: LayerShape,
        batch_size: int,
        max_seq_len: int | None = None,
        device: torch.device | str = "cpu",
        shared: Mapping[str, Tensor] | None = None,
        *,
        make: Callable[..., Any],
    ) -> None:
        self.inner = make(method.inner, shape, batch_size, None, torch.device(device), shared)
        method.check_runs()
        self.block = method.block
        self.steps_alone = bool(method.window) and self.inner.forgets_in_steps(method.inner, method.window)
        """Whether :meth:`step` decides nothing on the host."""
        self.seen = [0] * batch_size
        self.newest = [0] * batch_size
        """Tokens at a row's end that came one after the other."""
        self.scores: Tensor | None = None
        """``[batch_size, num_kv_heads, blocks]`` float32; the first block begins after the sink."""
        super().__init__(method, shape, batch_size, max_seq_len, device, shared)

    @property
    def wants_query(self) -> bool:  # type: ignore[override]
        """Whether queries choose among the tokens."""
        return self.method.scores

    @property
    def is_croppable(self) -> bool:
        """Not where tokens that would have to come back may be gone."""
        return False

    @property
    def kernel(self) -> str:
        """That of the method inside."""
        return str(self.inner.kernel)

    @property
    def seq_lengths(self) -> list[int]:
        """Tokens seen, row by row."""
        return self.seen

    def provide(self, num_tokens: int) -> None:
        """Makes the inner layer provide for what is kept of ``num_tokens`` tokens a row."""
        if self.tensors and num_tokens <= self.num_provided:
            return
        provided, limit, scores = self.provided(num_tokens), self.inner.limit, self.scores
        self.inner.limit = self.method.num_kept(self.shape, provided)
        self.inner.num_layers = self.num_layers
        try:
            for buffer in self.method.score_buffers(self.shape, self.batch_size, self.inner.limit):
                scores = grown(self.scores, buffer, self.device)
            self.inner.provide(self.inner.limit)
        except torch.OutOfMemoryError:
            self.inner.limit = limit
            raise
        self.num_provided, self.scores = provided, scores
        self._mirror()

    def append(self, key: Tensor, value: Tensor, lengths: list[int] | None = None, query: Tensor | None = None) -> None:
        """Stores ``key [batch_size, num_kv_heads, L, key_dim]`` and ``value`` alike, and evicts what is too much.

        ``lengths``: row b's real tokens are the last ``lengths[b]`` of the L.  ``query [batch_size, num_q_heads, L,
        key_dim]``: of these tokens, for policies that score.  Raises ``ValueError`` where they are missing.
        """
        counts = self.counts(key, lengths, value)
        if not any(counts):
            return
        seen = [seen + count for seen, count in zip(self.seen, counts, strict=True)]
        self.provide(max(seen))
        before, self.seen = self.seen, seen
        budgets = [self.method.num_kept(self.shape, seen) for seen in self.seen]
        fresh: list[Tensor | None] = [None] * self.batch_size
        if self.method.scores:
            fresh = [self._score(row, key, value, counts[row], query, before[row]) for row in range(self.batch_size)]
        if not any(self.inner.row_lengths) and any(n > most for n, most in zip(counts, budgets, strict=True)):
            key, value, counts, fresh = self._chosen(key, value, counts, budgets, fresh)
        step = key.shape[2]
        if any(n + c > most for n, c, most in zip(self.inner.row_lengths, counts, budgets, strict=True)):
            step = min(map(self._step, budgets))
        for first in range(0, key.shape[2], step):
            last = min(first + step, key.shape[2])
            # row b's tokens are the last counts[b]: those among the columns first to last
            skipped = [key.shape[2] - count for count in counts]
            mine = [max(0, min(last - first, last - skip)) for skip in skipped]
            self._make_room_inside(mine, budgets)
            self.inner.append(key[:, :, first:last], value[:, :, first:last], mine)
            for row, (count, skip, scores) in enumerate(zip(mine, skipped, fresh, strict=True)):
                if scores is not None and count:
                    self._add(row, scores[:, last - skip - count : last - skip])
            self.newest = [n + count for n, count in zip(self.newest, mine, strict=True)]
        if self.method.window and any(leaving := self._leaving(self.inner.row_lengths)):
            self.inner.forget(leaving, 0)
        self._mirror()

    def _leaving(self, lengths: list[int]) -> list[int]:
        """Of rows of ``lengths`` tokens, how many leave behind a window, so that each has room for one more."""
        budget = self.method.budget or 0
        return [max(0, (n - budget) // self.block + 1) * self.block for n in lengths]

    def _step(self, budget: int) -> int:
        """Tokens that may come at a time where others leave for them: few of those among which scores choose, and over
        records no more than have left the exact ring."""
        after = budget - self.method.sink_length
        if self.block > 1:
            return max(1, min(self.block, after - 2 * self.block + 1))
        return max(1, (after - self.method.num_recent(budget)) // (8 if self.method.scores else 1))

    def _make_room_inside(self, counts: list[int], budgets: list[int]) -> None:
        """Evicts what ``counts`` more tokens a row have no room for."""
        method, sink, unit = self.method, self.method.sink_length, -(-(self.method.interval or 1) // self.block)
        lengths = self.inner.row_lengths
        over = [max(0, n + count - most) for n, count, most in zip(lengths, counts, budgets, strict=True)]
        if not any(over):
            return
        if not method.scores and unit == 1:
            self.inner.forget([-(-each // self.block) * self.block for each in over], sink)
            return
        dropped: list[Tensor | None] = []
        for row, (length, each, budget) in enumerate(zip(lengths, over, budgets, strict=True)):
            needed = -(-each // self.block)
            stored = (length - sink - (self.block if self.block > 1 else 0)) // self.block  # of these none is in a ring
            new = min(self.newest[row], method.num_recent(budget))
            most = max(needed, min(stored, (length - sink - new) // self.block))
            count = min(-(-needed // unit) * unit, most)
            dropped.append(self._lowest(row, count, most) if count else None)
        self.inner.drop(dropped, sink)

    def _lowest(self, row: int, count: int, most: int) -> Tensor:
        """The ``count`` blocks of the first ``most`` that leave row ``row``, ``[num_kv_heads, count]``, and with them
        their scores."""
        if self.scores is None:
            return torch.arange(count, device=self.device).expand(self.shape.num_kv_heads, -1)
        scores = self.scores[row]
        chosen = scores[:, :most].topk(count, -1, largest=False).indices
        left = staying(chosen, scores.shape[1])
        scores[:, : left.shape[1]] = scores.gather(1, left)
        scores[:, left.shape[1] :] = 0
        return chosen

    def _score(
        self, row: int, key: Tensor, value: Tensor, count: int, query: Tensor | None, seen: int
    ) -> Tensor | None:
        """The scores of a row's ``count`` new tokens, ``[num_kv_heads, count]``; those of held ones are brought up to
        date.  None where these queries score nothing: of a single token every ``interval``-th under ``h2o``."""
        method, weight = self.method, 1
        if key.shape[2] == 1 and seen:
            weight = method.interval or 1
            if method.policy not in ADDED or seen // weight == (seen + count) // weight:
                return None
        if not count:
            return None
        if query is None:
            if method.policy in ADDED or count > method.num_kept(self.shape, count):
                raise ValueError(f"{method.name}: a prompt of {count} tokens came without its queries")
            return None
        keys, values = key[row, :, key.shape[2] - count :], value[row, :, key.shape[2] - count :]
        held = self.inner.row_lengths[row]
        if held:
            stored = zip(self.inner.tokens(row), (keys, values), strict=True)
            keys, values = (torch.cat([old.to(x.dtype), x], 1) for old, x in stored)
        scores = SCORES[method.policy](method, query[row, :, key.shape[2] - count :], keys, values) * weight
        if held:
            assert self.scores is not None
            if method.policy not in ADDED:
                self.scores[row] = 0
            self._add(row, scores[:, :held], 0)
        return scores[:, held:]

    def _add(self, row: int, scores: Tensor, first: int | None = None) -> None:
        """Adds ``scores [num_kv_heads, n]`` of the tokens from slot ``first`` on, or of the newest n."""
        assert self.scores is not None
        first = self.inner.row_lengths[row] - scores.shape[1] if first is None else first
        skip = min(scores.shape[1], max(0, self.method.sink_length - first))
        slot = torch.arange(first + skip, first + scores.shape[1], device=self.device) - self.method.sink_length
        self.scores[row].index_add_(1, slot // self.block, scores[:, skip:].to(self.scores.dtype))

    def _chosen(
        self, key: Tensor, value: Tensor, counts: list[int], budgets: list[int], scores: list[Tensor | None]
    ) -> tuple[Tensor, Tensor, list[int], list[Tensor | None]]:
        """A prompt's kept tokens, right-aligned: ``[batch_size, num_kv_heads, most, dim]``, how many a row, and their
        scores."""
        length, heads = key.shape[2], key.shape[1]
        kept = [min(count, budget) for count, budget in zip(counts, budgets, strict=True)]
        index = torch.zeros(self.batch_size, heads, max(kept), dtype=torch.int64, device=key.device)
        out: list[Tensor | None] = []
        for row, (count, most, own) in enumerate(zip(counts, kept, scores, strict=True)):
            if count <= most:
                chosen = torch.arange(count, device=key.device).expand(heads, -1)
            elif own is None:
                sink = self.method.sink_length
                newest = torch.arange(count - (most - sink), count, device=key.device)
                chosen = torch.cat([torch.arange(sink, device=key.device), newest]).expand(heads, -1)
            else:
                chosen = self._highest(row, own, most)
            index[row, :, max(kept) - most :] = chosen + length - count
            out.append(None if own is None else own.gather(1, chosen))
        kept_key, kept_value = (x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[3])) for x in (key, value))
        return kept_key, kept_value, kept, out

    def _highest(self, row: int, scores: Tensor, budget: int) -> Tensor:
        """Which tokens of a row's prompt a head keeps by ``scores [num_kv_heads, L]``: ``[num_kv_heads, budget]``.

        Its sink, then those that score most, then the newest.  Tokens that leave together were chosen together: the
        blocks between are in the order of their scores, the tokens of one in that of their positions.
        """
        method, sink, length = self.method, self.method.sink_length, scores.shape[1]
        forced = {"snapkv": method.observed or 0, "h2o": method.num_recent(budget)}
        newest = min(forced.get(method.policy, min(LOCAL, method.num_recent(budget))), budget - sink)
        between = budget - sink - newest
        chosen = sink + scores[:, sink : length - newest].topk(between, -1).indices.flip(-1)
        size = self.block if self.block > 1 else max(1, between)
        blocks = [part.sort(-1).values for part in chosen.split(size, -1)]
        self.newest[row] = newest - budget  # of the budget that append is about to count
        at = torch.arange(length, device=scores.device).expand(scores.shape[0], -1)
        return torch.cat([at[:, :sink], *blocks, at[:, length - newest :]], 1)

    def attend(self, query: Tensor, scale: float, fresh: Fresh | None = None, **more: Any) -> Tensor:
        """Attention over what is kept, or over the window of it: the inner layer's, with what it takes of
        ``scores``."""
        if self.method.window:
            more = {"scores": more.get("scores", PLAIN)._replace(window=self.method.window)}
        out: Tensor = self.inner.attend(query, scale, fresh, **more)
        return out

    def step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        steps: Steps,
        rotary: tuple[Tensor, Tensor] | None = None,
        scores: Scores = PLAIN,
    ) -> Tensor:
        """One decode step over a packed window with nothing decided on the host: the inner layer's, then the oldest
        tokens leave where the next one would find no room.  On CUDA the host's books stay behind until :meth:`advance`.

        Raises ``ValueError`` where who leaves is decided on the host, and for rotary embeddings.
        """
        if not self.steps_alone or rotary is not None:
            raise ValueError(f"{self.method.name} has no step that decides nothing on the host")
        if not key.is_cuda:
            self.append(key, value)
            return self.attend(query, scale, scores=scores)
        scores = scores._replace(window=self.method.window)
        out: Tensor = self.inner.step(query, key, value, scale, steps, scores=scores)
        self.inner.forget_in_step(self.method.budget, steps)
        return out

    @property
    def prefers_steps(self) -> bool:
        """Where the inner layer does, over a packed window."""
        return self.steps_alone and bool(self.inner.prefers_steps)

    @property
    def most_held(self) -> int:
        """That of the inner layer."""
        return int(self.inner.most_held)

    def scratch(self, num_q_heads: int) -> Tensor:
        """That of the inner layer."""
        out: Tensor = self.inner.scratch(num_q_heads)
        return out

    def count_step(self, lengths: Tensor) -> None:
        """Enters a step in ``lengths``, from which go the tokens that left."""
        lengths.add_(1)
        if self.method.window:
            lengths.sub_((lengths >= self.method.budget) * self.block)

    def advance(self, num_steps: int) -> None:
        """Enters steps of one token a row, and what left meanwhile, in the host's books."""
        self.seen, self.newest = ([n + num_steps for n in each] for each in (self.seen, self.newest))
        self.inner.advance(num_steps)
        self.inner.forgot(self._leaving(self.inner.row_lengths))
        self._mirror()

    def tokens(self, row: int) -> tuple[Tensor, Tensor]:
        """What is kept of a row, read back."""
        key, value = self.inner.tokens(row)
        return key, value

    def books(self) -> dict[str, Any]:
        """Those of the inner layer, the tokens seen, and the newest that came one after the other."""
        return {"seen": list(self.seen), "newest": list(self.newest), "inner": self.inner.books()}

    def take_books(self, books: Mapping[str, Any]) -> None:
        """Takes over :meth:`books`."""
        self.seen = list(books["seen"])
        self.inner.take_books(books["inner"])
        self.newest = list(books.get("newest", self.inner.row_lengths))
        self._mirror()

    def reset(self) -> None:
        """Forget every token; the buffers stay."""
        super().reset()
        self.inner.reset()
        self.seen, self.newest = [0] * self.batch_size, [0] * self.batch_size
        if self.scores is not None:
            self.scores.zero_()

    def reorder(self, index: Tensor) -> None:
        """Rows become ``index`` (int64, any number of rows, repeats allowed)."""
        self.inner.reorder(index)
        self.seen, self.newest = ([each[row] for row in index.tolist()] for each in (self.seen, self.newest))
        if self.scores is not None:
            self.scores = self.scores.index_select(0, index.to(self.device))
        self.batch_size = self.inner.batch_size
        self._mirror()

    def check_crop(self, num_tokens: int) -> None:
        """Raises ``ValueError`` where a row has evicted some of its tokens, or the inner layer refuses."""
        if num_tokens >= max(self.seen):
            return
        if self.seen != self.inner.row_lengths:
            raise ValueError(f"cannot crop to {num_tokens} tokens: tokens that would come back are evicted")
        self.inner.check_crop(num_tokens)

    def crop(self, num_tokens: int) -> None:
        """Cut the longest row to ``num_tokens`` of those seen, once :meth:`check_crop` allows it."""
        self.check_crop(num_tokens)
        drop = max(self.seen) - num_tokens
        if drop <= 0:
            return
        self.inner.crop(num_tokens)
        self.seen = [seen - drop for seen in self.seen]
        self.newest = [max(0, newest - drop) for newest in self.newest]
        if self.scores is not None:  # a block that keeps a token keeps its score
            for row, length in enumerate(self.inner.row_lengths):
                self.scores[row, :, -(-max(0, length - self.method.sink_length) // self.block) :] = 0
        self._mirror()

    def _mirror(self) -> None:
        own = {} if self.scores is None else {"scores": self.scores}
        self.tensors, self.row_lengths = {**self.inner.tensors, **own}, list(self.inner.row_lengths)
