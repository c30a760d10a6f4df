"""Windows of text scored through a cache: likelihood a window and by position, and how far from another cache's answer.

The *reference* is the same model with another cache, fed in larger chunks beside it.  Where that is uncompressed, the
divergence of a second uncompressed cache, fed as the judged ones are, is the floor: what other chunks, kernels and
roundings cost without any compression.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

Tick = Callable[[float], None]
Around = Callable[[], AbstractContextManager[None]]
FIRST_EDGE = 64
"""Where the first range of positions ends; each further one is as long as all before it."""
PROMPT_LENGTH = 128
"""Tokens of a window that are fed at once before the others, unless said otherwise: a residual of 128 is exact."""
REFERENCE_CHUNK = 128
"""Tokens that the reference is fed at a time, unless said otherwise."""
JUDGED = 16
"""Tokens whose logits are judged at a time: those of single steps wait for as many."""
CACHED_LOGITS = 1 << 32
"""Bytes of the reference's logits that are held at a time, at most: it is fed fewer tokens where they would be more."""


@dataclass(frozen=True)
class WindowScores:
    """Float64 sums over the predicted tokens, on the CPU: a window's, and a range of positions' over all windows.

    ``nll``, ``kl`` (nats; KL divergence from the reference's distribution to this cache's) and ``agreed`` (tokens whose
    most likely successor is the reference's): ``[num_windows]``.  ``by_position``: ``[ranges, 4]``, the tokens of a
    range and the three sums.  ``kl`` and ``agreed`` are 0 without a reference.
    """

    nll: Tensor
    kl: Tensor
    agreed: Tensor
    by_position: Tensor
    edges: tuple[int, ...]
    tokens_a_window: int

    @property
    def num_tokens(self) -> int:
        return len(self.nll) * self.tokens_a_window

    def figures(self, with_reference: bool = True) -> dict[str, Any]:
        """Means over tokens, as a row of results holds them.

        ``by_position`` has ``[first, last, nll, kl, agreement]`` a range, the last two left out without a reference.
        """
        count = self.num_tokens
        nll = self.nll.sum().item() / count
        out: dict[str, Any] = {"nll": nll, "ppl": torch.tensor(nll, dtype=torch.float64).exp().item()}
        if with_reference:
            out |= {"kl": self.kl.sum().item() / count, "agreement": self.agreed.sum().item() / count}
        ranges = []
        for (first, last), sums in zip(ranges_of(self.edges), self.by_position.tolist(), strict=True):
            means = [value / sums[0] for value in sums[1 : 4 if with_reference else 2]]
            ranges.append([first, last, *means])
        out |= {"num_tokens": count, "by_position": ranges}
        out["window_nll"] = (self.nll / self.tokens_a_window).tolist()
        if with_reference:
            out["window_kl"] = (self.kl / self.tokens_a_window).tolist()
        return out


def position_edges(window: int) -> tuple[int, ...]:
    """Where ranges of positions begin and end: 1, 64, 128, 256 ... ``window``; a token's position is the number of
    tokens before it, and the first token of a window is not predicted."""
    edges, edge = [1], FIRST_EDGE
    while edge < window:
        edges.append(edge)
        edge *= 2
    return (*edges, window)


def ranges_of(edges: Sequence[int]) -> list[tuple[int, int]]:
    """First and last position of each range."""
    return [(first, stop - 1) for first, stop in pairwise(edges)]


def score_windows(
    model: Any,
    windows: Tensor,
    make_cache: Callable[[int], Any],
    *,
    chunk: int = 1,
    prompt_length: int = 0,
    batch: int = 1,
    make_reference: Callable[[int], Any] | None = None,
    reference_chunk: int = REFERENCE_CHUNK,
    around: Around = nullcontext,
    around_reference: Around = nullcontext,
    tick: Tick = lambda _: None,
) -> WindowScores:
    """Scores ``windows`` (int64 ``[num_windows, window]``) ``batch`` at a time: a prompt of ``prompt_length`` tokens,
    then ``chunk`` a forward.

    ``make_cache(window)`` and ``make_reference(window)`` give empty caches for one batch; ``around()`` and
    ``around_reference()`` hold while the model runs with the one and the other.  Log probabilities are taken in
    float32 and summed in float64.  ``tick`` is told the share of the work just done.  Raises ``ValueError`` for a chunk
    or batch below 1, or windows of fewer than two tokens.
    """
    for name, value in (("chunk", chunk), ("batch", batch), ("reference chunk", reference_chunk)):
        if value < 1:
            raise ValueError(f"{name} {value}: allowed are 1 and above")
    num_windows, window = windows.shape
    if window < 2:
        raise ValueError(f"windows of {window} tokens: allowed are 2 and above")
    edges = position_edges(window)
    sums = torch.zeros(3, num_windows, dtype=torch.float64, device=model.device)
    by_position = torch.zeros(len(edges) - 1, 4, dtype=torch.float64, device=model.device)
    ranges = torch.bucketize(torch.arange(1, window), torch.tensor(edges[1:-1]), right=True).to(model.device)
    with torch.inference_mode():
        for first in range(0, num_windows, batch):
            ids = windows[first : first + batch].to(model.device)
            fed = _Feeder(model, ids, make_cache(window), around)
            reference, few = None, max(chunk, JUDGED)  # tokens whose float32 probabilities are held at a time
            if make_reference is not None:
                wide = _reference_chunk(model, len(ids), chunk, reference_chunk)
                few = max(chunk, min(JUDGED, wide))
                reference = _Lead(_Feeder(model, ids, make_reference(window), around_reference), wide)
            held: list[Tensor] = []  # logits of small forwards wait for each other: judging launches many kernels
            judged = 0
            for start, stop in pieces(window - 1, chunk, prompt_length):  # the last token has nothing to predict
                held.append(fed(start, stop))
                if stop - judged < few and stop < window - 1:
                    continue
                logits = held[0] if len(held) == 1 else torch.cat(held, 1)
                held = []
                for begin in range(judged, stop, few):
                    end = min(begin + few, stop)
                    theirs = None if reference is None else reference(begin, end)
                    own = logits[:, begin - judged : end - judged]
                    tokens = _token_scores(own, ids[:, begin + 1 : end + 1], theirs)
                    sums[:, first : first + len(ids)] += tokens.sum(2)
                    counts = torch.full_like(tokens[0].sum(0), len(ids))
                    added = torch.stack([counts, *tokens.sum(1)], 1)  # [tokens, 4]
                    by_position.index_add_(0, ranges[begin:end], added)
                tick(len(ids) * (stop - judged) / (num_windows * (window - 1)))
                judged = stop
    nll, kl, agreed = sums.cpu()
    return WindowScores(nll, kl, agreed, by_position.cpu(), edges, window - 1)


def pieces(length: int, chunk: int, prompt_length: int) -> list[tuple[int, int]]:
    """``(start, stop)`` of every forward: a prompt's, where ``prompt_length`` is above ``chunk``, then of ``chunk``."""
    first = min(prompt_length, length) if prompt_length > chunk else 0
    starts = [*([0] if first else []), *range(first, length, chunk)]
    return list(pairwise([*starts, length]))


def _token_scores(logits: Tensor, target: Tensor, reference: Tensor | None) -> Tensor:
    """Negative log-likelihood, divergence and agreement of each token: float64 ``[3, rows, tokens]``."""
    own = logits.float().log_softmax(-1)
    nll = -own.gather(-1, target[..., None])[..., 0].double()
    if reference is None:
        return torch.stack([nll, torch.zeros_like(nll), torch.zeros_like(nll)])
    theirs = reference.float().log_softmax(-1)
    kl = torch.nn.functional.kl_div(own, theirs, reduction="none", log_target=True).sum(-1).double()
    agreed = (logits.argmax(-1) == reference.argmax(-1)).double()
    return torch.stack([nll, kl, agreed])


def _reference_chunk(model: Any, rows: int, chunk: int, asked: int) -> int:
    """``asked`` as a multiple of ``chunk``, less where the logits of ``rows`` windows would be too many."""
    token = rows * model.config.get_text_config(decoder=True).vocab_size * model.dtype.itemsize
    return max(1, min(asked, CACHED_LOGITS // token) // chunk) * chunk


class _Feeder:
    """A model and one cache that holds ever more of ``ids``."""

    def __init__(self, model: Any, ids: Tensor, cache: Any, around: Around) -> None:
        self.model, self.ids, self.cache, self.around = model, ids, cache, around

    def __call__(self, start: int, stop: int) -> Tensor:
        """Logits ``[rows, stop - start, vocabulary]`` after the tokens ``start`` to ``stop``, which come next."""
        from kvruntime.hf.cache import argument

        with self.around():
            out = self.model(input_ids=self.ids[:, start:stop], **argument(self.cache), use_cache=True)
        logits: Tensor = out.logits
        return logits


class _Lead:
    """The reference's logits, computed for ``chunk`` tokens at a time and handed out in smaller pieces."""

    def __init__(self, fed: _Feeder, chunk: int) -> None:
        self.fed, self.chunk = fed, chunk
        self.start = self.stop = 0
        self.logits: Tensor | None = None

    def __call__(self, start: int, stop: int) -> Tensor:
        if stop > self.stop:
            old, kept = self.logits, None
            if old is not None and start < self.stop:
                kept = old[:, start - self.start :].clone()
            old = self.logits = None  # the old ones go before the new ones come
            more = min(max(stop, self.stop + self.chunk), self.fed.ids.shape[1] - 1)
            fresh = self.fed(self.stop, more)
            self.start, self.stop = start, more
            self.logits = fresh if kept is None else torch.cat([kept, fresh], 1)
        assert self.logits is not None
        return self.logits[:, start - self.start : stop - self.start]
