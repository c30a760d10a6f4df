"""One attention layer that keeps at most ``budget`` tokens a row: the layer of the method inside, and who leaves it.

Kept tokens have the rotary embedding of the position at which they came, so attention over what is left needs no
positions.  Tokens leave the inner layer's own tensors: memory does not grow beyond ``budget``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from kvruntime.kernels.reference import PLAIN, Scores
from kvruntime.methods.rows import Fresh, Rows, Steps
from kvsim.layout import LayerShape, leaving
from kvsim.methods.evict import Evict


class EvictLayer(Rows):
    """The first ``sink_length`` tokens of a row and others, ``budget`` at most, in ``inner``.

    ``policy`` ``recent``: the newest.  ``snapkv``: of a prompt longer than the budget those that its last queries
    attend to most, then the newest.  ``make``: makes the layer of the method inside.
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
        self.leaving = leaving(method.inner, method.sink_length)
        self.seen = [0] * batch_size
        super().__init__(method, shape, batch_size, max_seq_len, device, shared)

    @property
    def wants_query(self) -> bool:  # type: ignore[override]
        """Whether a prompt's queries choose among its tokens."""
        return self.method.policy == "snapkv"

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
        provided, limit = self.provided(num_tokens), self.inner.limit
        self.inner.limit = min(provided, self.method.budget)
        self.inner.num_layers = self.num_layers
        try:
            self.inner.provide(self.inner.limit)
        except torch.OutOfMemoryError:
            self.inner.limit = limit
            raise
        self.num_provided = provided
        self._mirror()

    def append(self, key: Tensor, value: Tensor, lengths: list[int] | None = None, query: Tensor | None = None) -> None:
        """Stores ``key [batch_size, num_kv_heads, L, key_dim]`` and ``value`` alike, and evicts what is too much.

        ``lengths``: row b's real tokens are the last ``lengths[b]`` of the L.  ``query [batch_size, num_q_heads, L,
        key_dim]``: of these tokens, for a prompt under ``snapkv``.
        """
        counts = [key.shape[2]] * self.batch_size if lengths is None else list(lengths)
        self.provide(max(seen + count for seen, count in zip(self.seen, counts, strict=True)))
        self.seen = [seen + count for seen, count in zip(self.seen, counts, strict=True)]
        if max(counts, default=0) > self.method.budget and not any(self.inner.row_lengths):
            key, value, counts = self._kept_of_prompt(key, value, counts, query)
        granule = self.leaving
        step = max(1, min(granule, self.method.budget - self.method.sink_length - granule) if granule > 1 else 1)
        fits = all(
            length + count <= self.method.budget for length, count in zip(self.inner.row_lengths, counts, strict=True)
        )
        step = key.shape[2] if fits else step
        for first in range(0, key.shape[2], step):
            last = min(first + step, key.shape[2])
            # row b's tokens are the last counts[b]: those among the columns first to last
            mine = [max(0, min(last - first, last - (key.shape[2] - count))) for count in counts]
            self._make_room_inside(mine)
            self.inner.append(key[:, :, first:last], value[:, :, first:last], mine)
        self._mirror()

    def _make_room_inside(self, counts: list[int]) -> None:
        granule, budget = self.leaving, self.method.budget
        over = [max(0, length + count - budget) for length, count in zip(self.inner.row_lengths, counts, strict=True)]
        if any(over):
            self.inner.forget([-(-each // granule) * granule for each in over], self.method.sink_length)

    def _kept_of_prompt(
        self, key: Tensor, value: Tensor, counts: list[int], query: Tensor | None
    ) -> tuple[Tensor, Tensor, list[int]]:
        """A prompt's kept tokens, right-aligned: ``[batch_size, num_kv_heads, budget, dim]`` and how many a row."""
        budget, sink, length = self.method.budget, self.method.sink_length, key.shape[2]
        kept = [min(count, budget) for count in counts]
        index = torch.zeros(self.batch_size, key.shape[1], budget, dtype=torch.int64, device=key.device)
        for row, count in enumerate(counts):
            first = length - count
            if count <= budget:
                chosen = torch.arange(first, length, device=key.device).expand(key.shape[1], -1)
            elif self.method.policy == "recent":
                newest = torch.arange(length - (budget - sink), length, device=key.device)
                chosen = torch.cat([torch.arange(first, first + sink, device=key.device), newest])
                chosen = chosen.expand(key.shape[1], -1)
            else:
                if query is None:
                    raise ValueError(f"{self.method.name}: a prompt of {count} tokens came without its queries")
                chosen = first + self._attended(query[row, :, first:], key[row, :, first:])
            index[row, :, budget - min(count, budget) :] = chosen
        kept_key, kept_value = (x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[3])) for x in (key, value))
        return kept_key, kept_value, kept

    def _attended(self, query: Tensor, key: Tensor) -> Tensor:
        """Which tokens of ``key [num_kv_heads, L, dim]`` a head keeps, ascending: ``[num_kv_heads, budget]``.

        Its sink, its last ``observed``, and of the others those that the last ``observed`` queries, mean over the query
        heads that share the head, attend to most, pooled over ``kernel_size`` neighbours (arXiv 2404.14469).
        """
        method, (heads, length, dim) = self.method, key.shape
        observed = query[:, -method.observed :].float().reshape(heads, -1, method.observed, dim)
        score = torch.einsum("hgod,hld->hgol", observed, key.float()) * dim**-0.5
        at = torch.arange(length, device=key.device)
        score = score.masked_fill(at > at[-method.observed :, None], float("-inf")).softmax(-1).mean((1, 2))
        score = torch.nn.functional.max_pool1d(score[:, None], method.kernel_size, 1, method.kernel_size // 2)[:, 0]
        score[:, : method.sink_length] = float("inf")
        score[:, -method.observed :] = float("inf")
        return score.topk(method.budget, -1).indices.sort(-1).values

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
        """Not to be had: who leaves is decided on the host."""
        raise ValueError(f"{self.method.name} has no step that decides nothing on the host")

    def tokens(self, row: int) -> tuple[Tensor, Tensor]:
        """What is kept of a row, read back."""
        key, value = self.inner.tokens(row)
        return key, value

    def books(self) -> dict[str, Any]:
        """Those of the inner layer, and the tokens seen."""
        return {"seen": list(self.seen), "inner": self.inner.books()}

    def take_books(self, books: Mapping[str, Any]) -> None:
        """Takes over :meth:`books`."""
        self.seen = list(books["seen"])
        self.inner.take_books(books["inner"])
        self._mirror()

    def reset(self) -> None:
        """Forget every token; the buffers stay."""
        super().reset()
        self.inner.reset()
        self.seen = [0] * self.batch_size

    def reorder(self, index: Tensor) -> None:
        """Rows become ``index`` (int64, any number of rows, repeats allowed)."""
        self.inner.reorder(index)
        self.seen = [self.seen[row] for row in index.tolist()]
        self.batch_size = self.inner.batch_size
        self._mirror()

    def crop(self, num_tokens: int) -> None:
        """Cut the longest row to ``num_tokens`` of those seen.  Raises ``ValueError`` where a row has evicted some."""
        drop = max(self.seen) - num_tokens
        if drop <= 0:
            return
        if self.seen != self.inner.row_lengths:
            raise ValueError(f"cannot crop to {num_tokens} tokens: tokens that would come back are evicted")
        self.inner.crop(num_tokens)
        self.seen = [seen - drop for seen in self.seen]
        self._mirror()

    def _mirror(self) -> None:
        self.tensors, self.row_lengths = self.inner.tensors, list(self.inner.row_lengths)
