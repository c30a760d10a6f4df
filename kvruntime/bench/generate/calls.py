"""Calls of stock ``generate()`` whose tokens are timed: greedy, left-padded, sampled and drafted ones.

Beside each drafted one goes an undrafted one, greedy at the same prompt.
"""

from __future__ import annotations

from time import perf_counter
from typing import Any

GREEDY, PADDED, SAMPLED, CONVERSATION = "greedy", "padded", "sampled", "conversation"
UNDRAFTED, DRAFTED = "undrafted", "drafted"
CALLS = (GREEDY, PADDED, SAMPLED, UNDRAFTED, DRAFTED, CONVERSATION)
DRAFT = 4
"""Tokens that assisted decoding looks up in the prompt for one step."""
REPEATED = 64
"""Random tokens that a prompt repeats where there is no text, so that there is something to look up."""


class Times:
    """transformers' streamer protocol: when each token of a row came."""

    def __init__(self) -> None:
        self.batch_size = 0
        self.at: list[float] = []
        """Of every new token; those of one step have one time."""
        self.steps = 0

    def put(self, tokens: Any) -> None:
        now = perf_counter()
        if not self.batch_size:  # the prompt
            self.batch_size = len(tokens)
            return
        self.at += [now] * max(1, tokens.numel() // self.batch_size)
        self.steps += 1

    def end(self) -> None:
        """Nothing is left to be told."""


class Clock:
    """Runs ``generate()`` and tells when tokens came; ``device``: one that is to be waited for, if it is a GPU."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.steps = 0
        """Of the last call."""

    def wait(self) -> None:
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.synchronize()

    def __call__(self, model: Any, ids: Any, num_new: int, cache: Any, call: str = GREEDY) -> tuple[list[float], Any]:
        """Seconds after which each of exactly ``num_new`` tokens after ``ids`` was there, and all tokens."""
        import torch

        from kvruntime.hf.cache import argument

        model.generation_config.eos_token_id = None
        given = {"attention_mask": mask_of(ids, call), **options(call)}
        torch.manual_seed(0)
        self.wait()
        start, times = perf_counter(), Times()
        out = model.generate(ids, max_new_tokens=num_new, pad_token_id=0, streamer=times, **given, **argument(cache))
        self.wait()
        self.steps = times.steps
        return [at - start for at in times.at[:num_new]], out


def mask_of(ids: Any, call: str) -> Any:
    """``[batch_size, num_tokens]``; of a padded batch the rows begin evenly between the first column and the middle."""
    import torch

    mask = torch.ones_like(ids)
    if call == PADDED:
        for row in range(len(ids)):
            mask[row, : (row + 1) * ids.shape[1] // (2 * len(ids))] = 0
    return mask


def options(call: str) -> dict[str, Any]:
    """What ``generate()`` is told of how to choose tokens."""
    if call == SAMPLED:
        return {"do_sample": True, "temperature": 0.8, "top_k": 50}
    if call == DRAFTED:
        return {"do_sample": False, "prompt_lookup_num_tokens": DRAFT}
    return {"do_sample": False}


def prompt(
    model: Any, batch_size: int, num_tokens: int, seed: int, call: str = GREEDY, tokenizer: Any = None
) -> Any:
    """Random tokens ``[batch_size, num_tokens]`` on the model's device; where they are drafted, or are timed beside it,
    :mod:`kvruntime.bench.generate.grounded`'s with a ``tokenizer``, else ``REPEATED`` random ones again and again.

    Raises ``ValueError`` where the first are to be fewer than they can be.
    """
    import torch

    looked_up = call in (DRAFTED, UNDRAFTED)
    if looked_up and tokenizer is not None:
        from kvruntime.bench.generate.grounded import tokens

        return torch.tensor([tokens(tokenizer, num_tokens)] * batch_size, device=model.device)
    generator = torch.Generator().manual_seed(seed)
    vocab = model.config.get_text_config().vocab_size
    drawn = min(REPEATED, num_tokens) if looked_up else num_tokens
    ids = torch.randint(1, vocab, (batch_size, drawn), generator=generator)
    return ids.repeat(1, -(-num_tokens // drawn))[:, :num_tokens].to(model.device)


def prompt_name(call: str, tokenizer: Any) -> str:
    """What a row says of :func:`prompt`'s tokens; nothing of plain random ones."""
    if call not in (DRAFTED, UNDRAFTED):
        return ""
    if tokenizer is None:
        return f"{REPEATED} random tokens, repeated"
    from kvruntime.bench.generate.grounded import name

    return name()
