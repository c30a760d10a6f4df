"""The times that ``kvsim estimate`` says of a load: a token and the first, with drafts and prompts found in a cache."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from kvsim.commands.flags import SequenceTokens, WeightChoice
from kvsim.hardware import Hardware
from kvsim.layout import Method
from kvsim.memory.capacity import Room, largest_batch, largest_context
from kvsim.memory.sharding import Deployment, Sharding
from kvsim.models.model import Model
from kvsim.output.estimate_screen import Times

if TYPE_CHECKING:
    from kvsim.analysis.prefix_hits import Prompt
    from kvsim.latency.constants import Constants
    from kvsim.latency.roofline import Serving
    from kvsim.latency.speculation import Speculation
    from kvsim.latency.steps import Step

NETWORK = "between hosts 400 Gb/s a card are taken"
"""What the times of several hosts rest on (:mod:`kvsim.latency.exchange`)."""


TIMED = "nvidia"
"""The vendor whose cards the model of time was fitted on."""


class Load(NamedTuple):
    """What is weighed: sequences of so many tokens, at most ``max_num_seqs`` at once, under one sharding.

    ``told``: the share of the memory was, so that as many run as fit in it.
    """

    batch: int
    tokens: SequenceTokens
    sharding: Sharding
    weights: WeightChoice
    max_num_seqs: int | None
    told: bool
    constants: Constants | None
    drafts: Speculation | None = None
    hits: float | list[Prompt] | None = None


def carried_over(card: Hardware) -> list[str]:
    """A note where nothing was timed on cards of this vendor."""
    if card.vendor == TIMED:
        return []
    return [f"{card.id}: no card of {card.vendor}'s was timed: times take the shares of its peaks that {TIMED}'s reach"]


def draft_weights(model: Model, card: Hardware, load: Load) -> dict[str, int]:
    """Bytes of a draft's weights on one card."""
    if load.drafts is None:
        return {}
    from kvsim.latency.speculation import draft_weight_nbytes

    bits = load.weights
    nbytes = draft_weight_nbytes(load.drafts, model, card, bits.bits, bits.quantized, load.sharding)
    return {"draft_weights": nbytes} if nbytes else {}


def cached_tokens(deployment: Deployment, space: Room, load: Load, notes: list[str]) -> int:
    """Tokens of a prompt that are at hand: of a shared prefix, or as :attr:`Load.hits` says.

    Raises ``ValueError`` where both are given.
    """
    prompt, prefix = load.tokens.prompt, deployment.shared_prefix
    if load.hits is None:
        return prefix if prefix < prompt else 0
    if prefix:
        raise ValueError("give --shared-prefix or --prefix-hits, not both")
    from kvsim.analysis.prefix_hits import count_hits, unit, usable

    step = unit(deployment.engine, deployment.model, deployment.method)
    if isinstance(load.hits, float):
        found = usable(round(load.hits * prompt), prompt, step)
        notes.append(
            f"{deployment.method.name}: {found:,} of {prompt:,} tokens of a prompt found, in units of {step:,}"
        )
        return found
    one = replace(deployment, sharding=replace(load.sharding, data_parallel_size=1))
    held = largest_context(one, 1, space.cache_nbytes)
    counted = count_hits(load.hits, held, step)
    notes.append(
        f"{deployment.method.name}: {counted.share:.1%} of the trace's prompts found ({counted.num_requests:,} "
        f"requests in turn, a cache of {'any' if held is None else f'{held:,}'} tokens, units of {step:,})"
    )
    return min(prompt - 1, round(counted.share * prompt))


def request_times(model: Model, deployment: Deployment, space: Room, load: Load, notes: list[str]) -> Times | None:
    """Seconds of a token and to the first, where the card's figures are known; ``deployment`` has a draft's layers too.

    Without an output length those of one step at the context, and of one prompt alone; else a busy server's.
    """
    from kvsim.latency.roofline import Serving
    from kvsim.latency.steps import decode_step, first_token, prefill, running, timed_engines, token_step, was_timed

    sharding, (_, prompt, output, _) = deployment.sharding, load.tokens
    batch, replica = load.batch, sharding.rank_batch(load.batch)
    stages = sharding.pipeline_parallel_size
    method, card = deployment.method, space.hardware
    cached = cached_tokens(deployment, space, load, notes)
    try:
        serving = Serving(load.weights.bits, engine=deployment.engine, profile=load.constants, sharding=sharding)
        if output is None:
            token = decode_step(model, method, card, max(1.0, replica / stages), prompt, serving)
            held = float(replica)
            if card.fp16_flops:
                first = prefill(model, card, 1, prompt, serving, cached_tokens=cached, method=method)
            else:
                first = None
        else:
            plain = sharding == Sharding(tensor_parallel_size=sharding.tensor_parallel_size)
            if load.told or not plain:
                one = replace(deployment, sharding=replace(sharding, data_parallel_size=1))
                room_for = largest_batch(one, prompt + output // 2, space.cache_nbytes)
                held = float(replica if room_for is None else min(replica, max(1, room_for)))
            else:
                held = running(model, method, card, replica, prompt, output, serving)
            held = min(held, load.max_num_seqs or held)
            served = (model, method, card, -(-replica // stages), prompt, output, serving)
            in_step = max(1.0, held / stages)
            token = token_step(*served, cached_tokens=cached, num_running=in_step)
            first = first_token(*served, cached_tokens=cached, num_running=in_step) if card.fp16_flops else None
        if load.drafts is not None:
            in_step = max(1.0, held / stages)
            mean = prompt if output is None else prompt + output // 2
            token = speculative(model, method, card, in_step, mean, serving, load.drafts, token, notes)
    except ValueError as error:
        notes.append(f"no times: {error}")
        return None
    if sharding.ranks > card.host_cards:
        notes.append(f"{sharding.ranks} cards are more than the {card.host_cards} of a host: {NETWORK}")
    if not was_timed(deployment.engine.name):
        *others, last = timed_engines()
        notes.append(f"{deployment.engine.name} was not timed: the times are those of {', '.join(others)} and {last}")
    if held < replica:
        notes.append(f"{method.name}: {held:,.0f} of {replica:,} requests run at once, the others wait")
    if first is None:
        notes.append(f"{card.id}: its arithmetic (FLOP/s) is not known: no time to the first token")
    notes += carried_over(card)
    return Times(token.seconds, first.seconds if first else None, token.bound, batch * held / replica)


def speculative(
    model: Model,
    method: Method,
    card: Hardware,
    batch: float,
    tokens: int,
    serving: Serving,
    drafts: Speculation,
    plain: Step,
    notes: list[str],
) -> Step:
    """The step with drafts in place of ``plain``, and a note on what they gain; prompts cost as much."""
    from kvsim.latency.speculation import busy, speculative_step

    found = busy(plain, speculative_step(model, method, card, batch, tokens, drafts, serving))
    notes.append(
        f"{method.name}: {drafts.num_tokens} proposed, {drafts.tokens_a_step:.2f} tokens come of a step; without "
        f"{plain.seconds.value * 1e3:.3g} ms a token, {plain.seconds.value / found.seconds.value:.2f} times as long"
    )
    return found
