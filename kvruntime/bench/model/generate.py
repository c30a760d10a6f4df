"""Text as it is generated, and what the cache weighed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

from kvruntime.bench.harness.weigh import weigh
from kvruntime.bench.model.caches import Contender
from kvruntime.bench.model.memory import layer_shapes
from kvruntime.checkpoints.load import LoadedModel, first_not_finite
from kvsim.layout import Method, nbytes, part_kind, parts
from kvsim.methods import Full, placed


@dataclass(frozen=True)
class Generation:
    """``num_tokens`` held by the cache at the end, room for ``num_provided``; ``num_new`` generated in ``seconds``.

    ``nbytes`` is measured; ``fp16_nbytes`` is what an uncompressed float16 cache with the same room holds.
    ``text``, ``ids``: what was generated.  ``quantized``: whether the cache holds codes; ``exact_alone``: it would of
    a longer text, and holds exact tokens alone of this one.
    """

    num_tokens: int
    num_provided: int
    num_new: int
    seconds: float
    nbytes: int
    fp16_nbytes: int
    text: str = ""
    ids: tuple[int, ...] = ()
    quantized: bool = False
    exact_alone: bool = False


def generate(
    loaded: LoadedModel,
    contender: Contender,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    write: Callable[[str], None] = lambda text: print(text, end="", flush=True),
) -> Generation:
    """Runs ``model.generate`` on ``prompt`` with the contender's cache, handing text to ``write`` as it comes.

    Greedy at ``temperature`` 0.  Without a tokenizer the prompt's bytes are its token ids, and ids are written.
    Raises ``ValueError`` for an empty prompt or more tokens than the model has positions for.
    """
    from kvruntime.hf.cache import argument

    ids = _encode(loaded, prompt)
    wrong = first_not_finite(loaded.model)
    if wrong is not None:
        raise ValueError(f"{loaded.source.name}: weight {wrong} holds NaN or infinity as {loaded.dtype}")
    length = ids.shape[1] + max_new_tokens
    if max_new_tokens < 1:
        raise ValueError(f"max new tokens {max_new_tokens}: allowed are 1 and above")
    if loaded.max_positions is not None and length > loaded.max_positions:
        raise ValueError(
            f"{ids.shape[1]} prompt + {max_new_tokens} new tokens exceed the model's {loaded.max_positions} positions"
        )
    pieces: list[str] = []

    def tell(text: str) -> None:
        pieces.append(text)
        write(text)

    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    with torch.inference_mode(), contender.around(loaded.model):
        cache = contender.build(loaded.model, length)
        start = perf_counter()
        out = loaded.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **argument(cache),
            max_new_tokens=max_new_tokens,
            streamer=_Stream(loaded.tokenizer, tell),
            pad_token_id=0,
            **sampling,
        )
        seconds = perf_counter() - start
    held = out.shape[1] - 1  # the newest token was never fed back
    full = sum(nbytes(Full().buffers(shape, 1, length)) for shape in layer_shapes(loaded.model))
    own = [(*store.tensors.values(), *store.shared.values()) for store in getattr(cache, "stores", ())]
    new = tuple(out[0, ids.shape[1] :].tolist())
    quantized = _holds_codes(loaded, contender.method, held)
    return Generation(
        held,
        length,
        len(new),
        seconds,
        weigh(own or cache),
        full,
        "".join(pieces).removesuffix("\n"),
        new,
        quantized,
        not quantized and _holds_codes(loaded, contender.method, LONG),
    )


LONG = 1 << 16
"""Tokens that are beyond every residual."""


def _holds_codes(loaded: LoadedModel, method: Method | None, num_tokens: int) -> bool:
    if method is None:
        return False
    return any(
        size and part_kind(chosen, part) == "codes"
        for shape, chosen in placed(method, tuple(layer_shapes(loaded.model)))
        for part, size in parts(chosen.buffers(shape, 1, num_tokens)).items()
    )


def _encode(loaded: LoadedModel, prompt: str) -> torch.Tensor:
    if not prompt:
        raise ValueError("the prompt is empty")
    if loaded.tokenizer is None and loaded.no_tokenizer.startswith("has"):
        raise ValueError(f"{loaded.source.name} {loaded.no_tokenizer}")
    if loaded.tokenizer is None:
        ids = [byte % loaded.vocab_size for byte in prompt.encode()]
    elif getattr(loaded.tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt}]
        text = loaded.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = loaded.tokenizer(prompt)["input_ids"]
    return torch.tensor([ids], device=loaded.device)


class _Stream:
    """transformers' streamer protocol: whole characters are written as soon as their last byte is there."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        self.tokenizer, self.write = tokenizer, write
        self.ids: list[int] = []
        self.written = 0
        self.prompt = True

    def put(self, ids: torch.Tensor) -> None:
        if self.prompt:
            self.prompt = False
            return
        self.ids += ids.flatten().tolist()
        if self.tokenizer is None:
            self.write(f"{self.ids[-1]} ")
            return
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):
            self.write(text[self.written :])
            self.written = len(text)

    def end(self) -> None:
        if self.tokenizer is not None:
            self.write(self.tokenizer.decode(self.ids, skip_special_tokens=True)[self.written :])
        self.write("\n")
