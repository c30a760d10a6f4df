"""What spares a server work: drafts that give several tokens a step, and prompts whose beginning is in the cache.

A draft's layers keep keys and values in the pool and its weights lie on the card; prompts cost as much as without.
A share of the prompts that is found costs no prefill.  The room that found prefixes take is the requests' own: each is
weighed whole, and what is kept between requests is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvsim.analysis.prefix_hits import Prompt, count_hits, unit, usable
from kvsim.hardware import Hardware
from kvsim.latency.speculation import Speculation, draft_weight_nbytes
from kvsim.memory.capacity import largest_context
from kvsim.memory.sharding import Deployment, Sharding
from kvsim.models.model import Model


@dataclass(frozen=True)
class Shortcuts:
    """``drafts``, and ``hits``: the share of a prompt that is found, or a trace on which it is counted."""

    drafts: Speculation | None = None
    hits: float | tuple[Prompt, ...] | None = None

    def held(self, model: Model) -> Model:
        """The model with what the draft keeps beside it, for bytes."""
        return model if self.drafts is None else self.drafts.with_draft(model)

    def overhead(
        self, model: Model, card: Hardware, weight_bits: float | None, quantized: bool, sharding: Sharding
    ) -> dict[str, int]:
        """Bytes of a draft's weights on one card."""
        if self.drafts is None:
            return {}
        nbytes = draft_weight_nbytes(self.drafts, model, card, weight_bits, quantized, sharding)
        return {"draft_weights": nbytes} if nbytes else {}

    def found(self, cache: Deployment, cache_nbytes: int) -> PrefixShare:
        """What a prompt finds in a cache of ``cache_nbytes`` a rank."""
        if self.hits is None:
            return PrefixShare()
        step = unit(cache.engine, cache.model, cache.method)
        if isinstance(self.hits, float):
            return PrefixShare(self.hits, step)
        one = replace(cache, sharding=replace(cache.sharding, data_parallel_size=1, enable_expert_parallel=False))
        return PrefixShare(count_hits(self.hits, largest_context(one, 1, cache_nbytes), step).share, 1)


@dataclass(frozen=True)
class PrefixShare:
    """The ``share`` of a prompt that is found, in units of ``step`` tokens."""

    share: float = 0.0
    step: int = 1

    def tokens(self, prompt: int) -> int:
        """Of a prompt of so many tokens those that need no prefill."""
        return usable(round(self.share * prompt), prompt, self.step)


NONE = Shortcuts()
"""Neither."""
