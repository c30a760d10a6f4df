"""A model's answers through a cache: greedy generation after a prompt, and the likelihood of a given continuation.

A prompt is stored after its own forward, in which its tokens see each other exactly; what follows reads it back as it
was stored.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

Tick = Callable[[float], None]
LOOKS = 8
"""Steps between two looks for a stop text."""


@dataclass(frozen=True)
class Answerer:
    """A model with a tokenizer, and ``make_cache(num_tokens)`` for one batch of at most ``batch`` rows.

    ``chunk``: tokens of a continuation that are fed at a time, 1 as in decoding.
    """

    model: Any
    tokenizer: Any
    make_cache: Callable[[int], Any]
    batch: int = 1
    chunk: int = 1

    def encode(self, prompt: str, chat: bool) -> list[int]:
        """Token ids of ``prompt``; with ``chat`` as a user's message in the model's own template."""
        if chat:
            messages = [{"role": "user", "content": prompt}]
            prompt = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids: list[int] = self.tokenizer(prompt, add_special_tokens=not chat)["input_ids"]
        if not ids:
            raise ValueError("a prompt has no tokens")
        return ids

    def generate(
        self,
        prompts: Sequence[list[int]],
        max_new_tokens: int,
        stop: Sequence[str] = (),
        tick: Tick = lambda _: None,
    ) -> list[str]:
        """The greedy answer to each prompt (token ids), cut before the first text of ``stop``.

        Raises ``ValueError`` where a prompt and its answer exceed the model's positions.
        """
        found = self.answer(prompts, max_new_tokens, stop, tick)
        return [before(self.tokenizer.decode(row, skip_special_tokens=True), stop) for row in found]

    def answer(
        self,
        prompts: Sequence[list[int]],
        max_new_tokens: int,
        stop: Sequence[str] = (),
        tick: Tick = lambda _: None,
    ) -> list[list[int]]:
        """The token ids of the greedy answer to each prompt, up to the token that ends it (the model's EOS), which is
        the last; an answer that a text of ``stop`` ended is padded where its batch went on.

        Raises ``ValueError`` where a prompt and its answer exceed the model's positions.
        """
        from kvruntime.hf.cache import argument

        answers: list[list[int]] = []
        ends = self._ends()
        for first in range(0, len(prompts), self.batch):
            rows = prompts[first : first + self.batch]
            ids, mask = self._left_padded(rows)
            length = ids.shape[1] + max_new_tokens
            self._check_positions(ids.shape[1], max_new_tokens)
            stops = [_StopTexts(self.tokenizer, ids.shape[1], stop)] if stop else None
            with torch.inference_mode():
                out = self.model.generate(
                    ids,
                    attention_mask=mask,
                    **argument(self.make_cache(length)),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    temperature=None,
                    top_p=None,
                    top_k=None,
                    stopping_criteria=stops,
                    pad_token_id=self._pad(),
                )
            answers += [ended(row, ends) for row in out[:, ids.shape[1] :].tolist()]
            tick(len(rows) / len(prompts))
        return answers

    def continuations(
        self, pairs: Sequence[tuple[list[int], list[int]]], tick: Tick = lambda _: None
    ) -> list[tuple[float, bool]]:
        """Of each ``(context, continuation)`` (token ids) the log-likelihood in nats, and whether it is the greedy one.

        All but the context's last token are stored first; that one and the continuation come ``chunk`` at a time, so
        that every prediction reads the cache.
        """
        from kvruntime.hf.cache import argument

        found: list[tuple[float, bool]] = []
        for first in range(0, len(pairs), self.batch):
            rows = pairs[first : first + self.batch]
            ids, mask = self._left_padded([context for context, _ in rows])
            most = max(len(target) for _, target in rows)
            for context, tokens in rows:  # columns that a short row leaves empty are no positions
                self._check_positions(len(context), len(tokens) - 1)
            target = torch.zeros(len(rows), most, dtype=torch.int64, device=ids.device)
            counted = torch.zeros_like(target, dtype=torch.bool)
            for index, (_, tokens) in enumerate(rows):
                target[index, : len(tokens)] = torch.tensor(tokens)
                counted[index, : len(tokens)] = True
            cache = self.make_cache(ids.shape[1] + most)
            total = torch.zeros(len(rows), dtype=torch.float64, device=ids.device)
            greedy = torch.ones(len(rows), dtype=torch.bool, device=ids.device)
            fed = torch.cat([ids, target[:, :-1]], 1)
            mask = torch.cat([mask, torch.ones_like(target[:, :-1])], 1)
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            with torch.inference_mode():
                start = ids.shape[1] - 1
                if start:
                    self.model(
                        ids[:, :start],
                        attention_mask=mask[:, :start],
                        position_ids=positions[:, :start],
                        **argument(cache),
                        use_cache=True,
                        logits_to_keep=1,
                    )
                for step in range(0, most, self.chunk):
                    here = slice(step, min(step + self.chunk, most))
                    at = slice(start + here.start, start + here.stop)
                    logits = self.model(
                        fed[:, at],
                        attention_mask=mask[:, : at.stop],
                        position_ids=positions[:, at],
                        **argument(cache),
                        use_cache=True,
                    ).logits
                    chosen = logits.float().log_softmax(-1).gather(2, target[:, here, None])[..., 0]
                    total += torch.where(counted[:, here], chosen.double(), 0.0).sum(1)
                    greedy &= (~counted[:, here] | (logits.argmax(-1) == target[:, here])).all(1)
            found += list(zip(total.tolist(), greedy.tolist(), strict=True))
            tick(len(rows) / len(pairs))
        return found

    def _left_padded(self, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask, int64 ``[rows, longest]`` each."""
        longest, device = max(map(len, rows)), self.model.device
        ids = torch.full((len(rows), longest), self._pad(), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            ids[index, longest - len(row) :] = torch.tensor(row)
            mask[index, longest - len(row) :] = 1
        return ids.to(device), mask.to(device)

    def _pad(self) -> int:
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0

    def _ends(self) -> set[int]:
        """The tokens at which ``generate()`` ends a row."""
        ends = self.model.generation_config.eos_token_id
        return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)

    def _check_positions(self, prompt: int, new: int) -> None:
        limit = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if limit is not None and prompt + new > limit:
            raise ValueError(f"a prompt of {prompt} tokens and {new} new ones exceed the model's {limit} positions")


class _StopTexts(StoppingCriteria):
    """Ends a row whose new text holds one of ``stop``, looked for every few steps."""

    def __init__(self, tokenizer: Any, start: int, stop: Sequence[str]) -> None:
        self.tokenizer, self.start, self.stop = tokenizer, start, tuple(stop)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        if (input_ids.shape[1] - self.start) % LOOKS == 0:
            for index, row in enumerate(input_ids[:, self.start :]):
                text = self.tokenizer.decode(row, skip_special_tokens=True)
                done[index] = any(word in text for word in self.stop)
        return done


def ended(row: Sequence[int], ends: Collection[int]) -> list[int]:
    """``row`` up to the first of ``ends`` in it, which stays; all of it where there is none."""
    return list(row[: next((index + 1 for index, token in enumerate(row) if token in ends), len(row))])


def before(text: str, stop: Sequence[str]) -> str:
    """``text`` up to the first of ``stop`` in it."""
    return text[: min([found for word in stop if (found := text.find(word)) >= 0], default=len(text))]
