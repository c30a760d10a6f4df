"""What ``generate()`` does with a cache that it is given, where that would be wrong or drop the cache without a word.

A prompt that does not go on from what the cache holds is refused; a model that gives up its cache to compute a sequence
anew (rotary scaling that switches at a length) computes it into the same cache; assisted decoding drafts no more tokens
than a cache of ``max_seq_len`` has room for.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kvruntime.hf.cache import TAKES_CACHE, Cache

CACHE = "cache" if TAKES_CACHE else "past_key_values"
DRAFTS = "_get_candidate_generator"
"""The method by which ``generate()`` makes what drafts."""
METHODS = ("prepare_inputs_for_generation", "_prefill", DRAFTS)
"""The methods of ``generate()`` that are watched."""


class PromptIds:
    """The token ids that each cache was last generated with, which a cache of keys and values does not know."""

    def __init__(self) -> None:
        self._ids: WeakKeyDictionary[Cache, tuple[Tensor, int]] = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._ids = WeakKeyDictionary()

    def put(self, cache: Cache, ids: Tensor | None) -> None:
        """``ids [batch_size, columns]`` are all that came; None: not known."""
        if ids is None:
            self._ids.pop(cache, None)
        else:
            self._ids[cache] = ids, cache.edits

    def knows(self, cache: Cache) -> bool:
        """Whether what the cache holds began with ids that are known."""
        return cache in self._ids

    def check(self, cache: Cache, ids: Tensor) -> None:
        """Raises ``ValueError`` where a prompt ``ids [batch_size, columns]`` does not go on from what it holds."""
        held = cache.get_seq_length()
        if ids.shape[1] <= held:
            raise ValueError(
                f"a prompt of {ids.shape[1]} tokens for a cache that holds {held}: reset() it for another prompt, or "
                "give all of the conversation"
            )
        known, edits = self._ids.get(cache, (None, 0))
        if known is None or edits != cache.edits or len(known) != len(ids):
            return
        shared = min(known.shape[1], held)
        if not torch.equal(known[:, :shared].to(ids.device), ids[:, :shared]):
            raise ValueError(
                f"the prompt does not begin with the {held} tokens that the cache holds: reset() it for another "
                "prompt, or give all of the conversation"
            )


class MethodWrapper:
    """A method of a model's ``generate()`` that a :class:`PromptIds` watches."""

    def __init__(self, name: str, original: Any, seen: PromptIds) -> None:
        self.name, self.original, self.seen = name, original, seen
        bare = [each.replace(annotation=each.empty) for each in inspect.signature(original).parameters.values()]
        self.__signature__ = inspect.Signature(bare)  # some annotations cannot be pickled, and a model can

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = self._given(args, kwargs)
        more = given.get("model_kwargs") or given.get("kwargs") or {}
        cache = given.get(CACHE, more.get(CACHE))
        if not isinstance(cache, Cache):
            return self.original(*args, **kwargs)
        if self.name == "_prefill":
            if given.get("is_first_iteration", True):
                self._begin(cache, given["input_ids"], more, given.get("generation_config"))
            return self.original(*args, **kwargs)
        if self.name == DRAFTS:
            drafts = self.original(*args, **kwargs)
            if cache.max_seq_len is not None:
                fit(drafts, cache.max_seq_len - _elsewhere(cache, given["input_ids"], more.get("attention_mask")))
            return drafts
        if given.get("is_first_iteration") and kwargs.get("next_sequence_length") is None:
            kwargs |= self._after_held(cache, given.get("input_ids"), given.get("attention_mask"), more)
        out = self.original(*args, **kwargs)
        if out.get(CACHE) is None and out.get("use_cache") is not False:
            cache.reset()  # the model computes the whole sequence anew, without its cache; 5.17 slices it all the same
            if kwargs.get("next_sequence_length") is not None:
                out = self.original(*args, **{**kwargs, "next_sequence_length": None})
            out[CACHE] = cache
        ids = given.get("input_ids")
        if ids is not None and self.seen.knows(cache):
            self.seen.put(cache, ids)
        return out

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments by name.  A step's, as ``generate()`` gives them, need no binding, which takes the host longer
        than all else here."""
        if self.name == METHODS[0] and len(args) == 1 and CACHE in kwargs and not kwargs.get("is_first_iteration"):
            return {"input_ids": args[0], **kwargs}
        return self.__signature__.bind_partial(*args, **kwargs).arguments

    def _after_held(
        self, cache: Cache, ids: Tensor | None, mask: Tensor | None, more: dict[str, Any]
    ) -> dict[str, Any]:
        """What assisted decoding leaves out of its first call: that a used cache holds the sequence's beginning."""
        held = cache.get_seq_length()
        if ids is None or not held or more.get("inputs_embeds") is not None:
            return {}
        if ids.shape[1] < (cache.prompt_columns if mask is None else mask.shape[1]):
            return {}  # its end alone
        self.seen.check(cache, ids)
        return {"next_sequence_length": ids.shape[1] - held}

    def _begin(self, cache: Cache, ids: Tensor, more: dict[str, Any], config: Any) -> None:
        """Of a call of ``generate()``: its ids are the whole sequence, or its end where the mask is longer."""
        held, mask = cache.get_seq_length(), more.get("attention_mask")
        columns = getattr(config, "_mask_length", None) if mask is None else mask.shape[1]  # a mask of ones is dropped
        whole = more.get("inputs_embeds") is None and columns in (None, ids.shape[1])
        if whole and held:
            self.seen.check(cache, ids)
        if not whole or (held and not self.seen.knows(cache)):
            self.seen.put(cache, None)
        else:
            self.seen.put(cache, ids)


def _elsewhere(cache: Cache, ids: Tensor, mask: Tensor | None) -> int:
    """How many more tokens a cache holds than ``ids [1, columns]`` has columns, whose ``mask`` says what is padding."""
    columns = cache.prompt_columns if mask is None else int(mask.count_nonzero())
    return (columns or ids.shape[1]) - ids.shape[1]


def fit(drafts: Any, room: int) -> None:
    """Lets ``drafts``, a candidate generator of transformers, draft up to ``room`` columns of ids: prompt lookup drafts
    beyond the last token that ``generate()`` may keep."""
    get = drafts.get_candidates

    def get_candidates(input_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        ids, logits = get(input_ids, *args, **kwargs)
        count = max(0, min(ids.shape[1], room) - input_ids.shape[1])
        return ids[:, : input_ids.shape[1] + count], None if logits is None or not count else logits[:, :count]

    drafts.get_candidates = get_candidates


def watch(model: Any) -> None:
    """Watches ``generate()`` of ``model``, where it has one."""
    seen = PromptIds()
    for name in METHODS:
        if hasattr(model, name) and not isinstance(model.__dict__.get(name), MethodWrapper):
            setattr(model, name, MethodWrapper(name, getattr(model, name), seen))


def let_go(model: Any) -> None:
    """Takes back what :func:`watch` did."""
    for name in list(_watched(model)):
        delattr(model, name)


def _watched(model: Any) -> Iterator[str]:
    yield from (name for name in METHODS if isinstance(model.__dict__.get(name), MethodWrapper))
