"""``kvsim estimate``: bytes, what fits on a card, and the time of a token."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from kvsim.commandline import Command
from kvsim.commands.flags import (
    MethodFlags,
    Selection,
    SequenceTokens,
    WeightChoice,
    batch_option,
    beyond,
    choose_card,
    choose_engine,
    engine_option,
    engine_options,
    gathered,
    inputs_object,
    json_option,
    method_options,
    sharding_options,
    show,
    show_json,
    tokens_a_sequence,
    weights_gathered,
)
from kvsim.commands.model_choice import cards, model_option
from kvsim.commands.request_times import Load, draft_weights, request_times
from kvsim.engines import ENGINES, Engine, Pool
from kvsim.hardware import Hardware
from kvsim.layout import Method
from kvsim.memory.capacity import RESERVE, Room, held_share, largest_batch, largest_context, room
from kvsim.memory.estimate import Estimate, check_sizes
from kvsim.memory.sharding import Deployment, Sharding, stages
from kvsim.models.load import load_model
from kvsim.models.model import Model
from kvsim.output import estimate_screen, text
from kvsim.output.estimate_screen import Times
from kvsim.output.schema import envelope, gpu_object, model_object, options_object, row_object
from kvsim.specs import parse_prefix_hits, parse_reserve, parse_size, parse_speculation

if TYPE_CHECKING:
    from kvsim.analysis.prefix_hits import Prompt
    from kvsim.latency.constants import Constants
    from kvsim.latency.speculation import Speculation


class Answer(NamedTuple):
    """What is shown, a row a method; ``space`` and what follows where a card is given."""

    model: Model
    chosen: Selection
    load: Load
    prefix: int
    rows: list[Estimate]
    ranks: list[tuple[int, int]]
    times: list[Times | None]
    space: Room | None
    limits: list[tuple[int | None, int | None]]
    pools: list[Pool | None]
    notes: list[str]

    @property
    def fits(self) -> list[bool]:
        return [self.space is not None and own <= self.space.cache_nbytes for own, _ in self.ranks]


def _used() -> str:
    """The shares of a card's memory that are used by default: ``0.9; vllm 0.92``."""
    own = ((name, kind().gpu_memory_utilization) for name, kind in ENGINES.items())
    return "; ".join([f"{1 - RESERVE:g}", *(f"{name} {share:g}" for name, share in own if share is not None)])


@click.command("estimate", cls=Command)
@model_option
@click.option("--ctx", help="Tokens a sequence: 4096, 128k, 1M.  [default: --max-model-len, else 4k]")
@click.option("--max-model-len", help="Longest sequence, as vLLM reads it: 32k is 32000, 32K 32768.")
@click.option("--input-len", help="Tokens of a prompt.")
@click.option("--output-len", help="Tokens generated.")
@batch_option
@method_options
@engine_option
@engine_options
@click.option(
    "--gpu",
    help="Say what fits beside the weights on this card, and seconds: h100-sxm, h100-sxm:2.",
    shell_complete=cards,
)
@click.option(
    "--weight-bits", type=float, help="Bits a weight, of every weight.  [default: the config's dtype, else 16]"
)
@click.option(
    "--weight-dtype", help="Type of the layers' weights: fp16, fp8, int4 ...; embedding and head keep 16 bits."
)
@click.option("--quantization", "-q", help="The same by vLLM's name: fp8, awq, gptq, mxfp4 ...")
@click.option("--reserve", help="Share of the card's memory held back.  [default: 10%]")
@click.option("--gpu-memory-utilization", type=float, help=f"Share of it that is used.  [default: {_used()}]")
@sharding_options
@click.option(
    "--profile",
    type=click.Path(path_type=Path),
    help="What kvsim calibrate measured on this card, in place of stated constants of time.",
)
@click.option(
    "--speculate",
    help="Drafts: mtp:tokens=1,acceptance=0.85; ngram:tokens=4,acceptance=0.5; draft:model=NAME,acceptance=0.8/0.6.",
)
@click.option("--prefix-hits", help="Share of a prompt found in the cache: 60%, or a trace (JSON Lines, Mooncake's).")
@click.option("--shared-prefix", help="First tokens that all sequences share, stored once.")
@json_option
@gathered("tokens", tokens_a_sequence, "ctx", "max_model_len", "input_len", "output_len")
@weights_gathered
def command(
    model_name: str,
    tokens: SequenceTokens,
    batch: int,
    asked: MethodFlags,
    engine: str | None,
    flags: dict[str, Any],
    gpu: str | None,
    weights: WeightChoice,
    reserve: str | None,
    gpu_memory_utilization: float | None,
    sharding: Sharding,
    profile: Path | None,
    shared_prefix: str | None,
    speculate: str | None,
    prefix_hits: str | None,
    as_json: bool,
) -> int:
    """Bytes of the cache: stored, read per step, by purpose; what fits on a card, and the time of a token.

    Exit code 1 where nothing that was asked for fits the card.
    """
    check_sizes(batch, tokens.context)
    card, sharding = choose_card(gpu, sharding)
    flags["gpu_memory_utilization"] = gpu_memory_utilization
    serving, notes = choose_engine(engine, card, flags, sharding.tensor_parallel_size)
    fixed = _constants(profile, card, serving, sharding, notes)
    share = held_share(serving, parse_reserve(reserve) if reserve is not None else None, gpu_memory_utilization)
    prefix = _prefix(shared_prefix, tokens.context)
    told = reserve is not None or gpu_memory_utilization is not None
    load = Load(
        batch, tokens, sharding, weights, flags["max_num_seqs"], told, fixed, _drafts(speculate), _hits(prefix_hits)
    )
    model = load_model(model_name)
    chosen = Selection(model, asked, serving)
    answer = _answer(model, chosen, load, prefix, card, share, notes)
    if as_json:
        show_json(_json(answer))
    else:
        flag = "--gpu-memory-utilization"
        if reserve is not None or serving.gpu_memory_utilization is None:
            flag = "--reserve"
        show(*_blocks(answer, model_name, gpu, flag))
    return 1 if answer.space is not None and not any(answer.fits) else 0


def _drafts(given: str | None) -> Speculation | None:
    return None if given is None else parse_speculation(given)


def _hits(given: str | None) -> float | list[Prompt] | None:
    return None if given is None else parse_prefix_hits(given)


def _prefix(given: str | None, tokens: int) -> int:
    """Tokens of a shared prefix.  Raises ``ValueError`` for more than a sequence has."""
    prefix = parse_size(given, "shared-prefix") if given is not None else 0
    if prefix > tokens:
        raise ValueError(f"shared prefix {prefix:,}: allowed are 0 to the {tokens:,} tokens of a sequence")
    return prefix


def _answer(
    model: Model, chosen: Selection, load: Load, prefix: int, card: Hardware | None, share: float, said: list[str]
) -> Answer:
    """Weighs and times every method.  ``share``: of the card's memory, held back; ``said``: notes so far."""
    serving, sharding, tokens = chosen.engine, load.sharding, load.tokens
    held = model if load.drafts is None else load.drafts.with_draft(model)
    rows, left_out = chosen.weigh(held, load.batch, [tokens.context], prefix)
    notes = [*beyond(model, [tokens.context]), *said, *left_out]
    if load.constants is not None:
        notes += _not_calibrated(load.constants, serving.name, [row.method for row in rows])
    deployments = [Deployment(held, row.method, serving, sharding, prefix) for row in rows]
    rank = stages(model, sharding)[0] if sharding != Sharding() else model
    notes += [f"{serving.name}: {line}" for line in serving.notes(rank, rows[0].method)]
    space: Room | None = None
    limits: list[tuple[int | None, int | None]] = []
    pools: list[Pool | None] = [None] * len(rows)
    if card is not None:
        space = room(
            model,
            card,
            load.weights.bits,
            share,
            quantized=load.weights.quantized,
            overhead=serving.overhead(model, card) | draft_weights(model, card, load),
            overhead_band=serving.overhead_band,
            kept_free=serving.kept_free,
            sharding=sharding,
        )
        notes += space.notes
        limits = [_limits(each, load, space) for each in deployments]
        notes += _close(deployments, load, space)
        pools = [_pool(each, space, tokens.longest) for each in deployments]
    most = load.max_num_seqs
    if most is not None and load.batch > most * sharding.data_parallel_size:
        notes.append(f"a batch of {load.batch:,} is beyond --max-num-seqs {most:,}: the others wait")
    times = [None if space is None else request_times(model, each, space, load, notes) for each in deployments]
    ranks = [
        (each.rank_nbytes(load.batch, tokens.context), each.all_nbytes(load.batch, tokens.context))
        for each in deployments
    ]
    notes = list(dict.fromkeys(notes))
    return Answer(model, chosen, load, prefix, rows, ranks, times, space, limits, pools, notes)


def _json(answer: Answer) -> dict[str, Any]:
    load, space, serving = answer.load, answer.space, answer.chosen.engine
    inputs = inputs_object(
        answer.model,
        load.batch,
        answer.chosen,
        ctx=load.tokens.context,
        gpu=space.hardware.id if space else None,
        engine=serving.name,
        engine_options=options_object(serving),
        input_len=load.tokens.prompt,
        output_len=load.tokens.output,
        shared_prefix=answer.prefix,
        speculate=None if load.drafts is None else {"kind": load.drafts.kind, "kept": load.drafts.kept},
        prefix_hits=load.hits if load.hits is None or isinstance(load.hits, float) else "trace",
        **asdict(load.sharding),
    )
    out = envelope("estimate", inputs, answer.notes) | {"model": model_object(answer.model)}
    out["rows"] = [
        row_object(row) | {"rank_nbytes": own, "all_ranks_nbytes": total} | _times_object(time)
        for row, (own, total), time in zip(answer.rows, answer.ranks, answer.times, strict=True)
    ]
    if space is not None:
        out["gpu"] = gpu_object(space, load.sharding.ranks)
        for entry, fit, (most, far), pool in zip(out["rows"], answer.fits, answer.limits, answer.pools, strict=True):
            entry |= {"fits": fit, "max_batch": most, "max_ctx": far}
            if pool is not None:
                entry["pool"] = _pool_object(pool, load.tokens.longest)
    return out


def _blocks(answer: Answer, name: str, gpu: str | None, flag: str) -> list[str]:
    """What a screen shows; ``name``, ``gpu``: as typed; ``flag`` sets the share held back."""
    load, rows, space = answer.load, answer.rows, answer.space
    request = text.request(load.tokens.context, load.batch, answer.chosen.engine.name, answer.prefix)
    about = [text.heading(answer.model), request]
    if load.sharding != Sharding():
        about.append(estimate_screen.shares(rows, answer.ranks, load.sharding))
    if space is None:
        found = [estimate_screen.weighed(name, rows), estimate_screen.methods(rows)]
    else:
        needs = [own for own, _ in answer.ranks]
        where = gpu or space.hardware.id
        found = [
            estimate_screen.answered(name, where, space, rows, needs, answer.limits, answer.times),
            estimate_screen.methods_on_a_card(rows, answer.limits, answer.times),
        ]
        about.append(estimate_screen.memory(space, load.sharding.ranks, flag))
        about.append(estimate_screen.pools(rows, answer.pools, load.tokens.longest))
    return [*found, *about, text.notes(answer.notes), text.not_modelled("estimate")]


def _limits(deployment: Deployment, load: Load, space: Room) -> tuple[int | None, int | None]:
    """The largest batch and context."""
    most = largest_batch(deployment, load.tokens.context, space.cache_nbytes)
    if load.max_num_seqs is not None:
        cap = load.max_num_seqs * deployment.sharding.data_parallel_size
        most = cap if most is None else min(most, cap)
    return most, largest_context(deployment, load.batch, space.cache_nbytes)


def _close(deployments: list[Deployment], load: Load, space: Room) -> list[str]:
    """A note on what fits by the engine's estimates, and does not where these are at the ends of their bands."""
    least = space.cache_band[0]
    needs = [(each.method.name, each.rank_nbytes(load.batch, load.tokens.context)) for each in deployments]
    names = [name for name, nbytes in needs if least < nbytes <= space.cache_nbytes]
    if not names:
        return []
    return [f"{', '.join(names)}: fits, but not where the engine's estimates are at the ends of their bands"]


def _pool(deployment: Deployment, space: Room, max_model_len: int) -> Pool | None:
    """The engine's pool on the rank with the fewest blocks; ``None`` where it has none."""
    engine, sharding = deployment.engine, deployment.sharding
    length = sharding.rank_tokens(max_model_len)
    pools = [engine.pool(stage, method, space.cache_nbytes, length) for stage, method in deployment.placed]
    return min((pool for pool in pools if pool is not None), key=lambda pool: pool.num_gpu_blocks, default=None)


def _pool_object(pool: Pool, request: int) -> dict[str, Any]:
    """``request``: tokens of a whole one, of which cards that share tokens hold a part each."""
    return {
        "num_gpu_blocks": pool.num_gpu_blocks,
        "block_size": max(group.block_size for group in pool.groups),
        "block_nbytes": pool.block_nbytes,
        "kv_cache_tokens": int(pool.concurrency * request),
        "max_model_len": request,
        "max_concurrency": pool.concurrency,
    }


def _constants(
    profile: Path | None, card: Hardware | None, engine: Engine, sharding: Sharding, notes: list[str]
) -> Constants | None:
    """The constants that a profile measured on ``card`` for ``engine``, and a note of whose times they are; ``None``
    without one.

    Raises ``ValueError`` for a profile of another card or of a runtime that is not the engine's.
    """
    if profile is None:
        return None
    if card is None:
        raise ValueError("--profile is of a card: give --gpu too")
    from kvsim.latency.profile import load_profile
    from kvsim.latency.roofline import Serving

    measured = load_profile(profile)
    fixed = measured.constants(card)
    timed_as = Serving(engine=engine, profile=fixed, sharding=sharding).timed_as
    notes.append(measured.note(timed_as))
    return fixed


def _not_calibrated(fixed: Constants, engine: str, methods: Iterable[Method]) -> list[str]:
    """A note of the methods whose attention a profile does not measure, where there are any."""
    from kvsim.latency.roofline import coded

    names = [method.name for method in methods if f"{engine}/{coded(method)}" in fixed.kernels]
    return [f"{', '.join(names)}: attention over tokens coded one by one is as stated, no profile has it"] * bool(names)


def _times_object(times: Times | None) -> dict[str, Any]:
    """``tpot_seconds``, ``ttft_seconds`` and ``tokens_per_second`` with ``value``, ``low`` and ``high``; ``bound``."""
    if times is None:
        return dict.fromkeys(("tpot_seconds", "ttft_seconds", "tokens_per_second", "bound"))
    value, low, high = times.token
    rates = {"value": times.running / value, "low": times.running / high, "high": times.running / low}
    return {
        "tpot_seconds": {"value": value, "low": low, "high": high},
        "ttft_seconds": dict(zip(("value", "low", "high"), times.first, strict=True)) if times.first else None,
        "tokens_per_second": rates,
        "bound": times.bound,
    }
