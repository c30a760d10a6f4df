"""``kvsim plan``: the command line of :mod:`kvsim.analysis.plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from kvsim.analysis.disaggregated import Disaggregation, apart
from kvsim.analysis.memory_risk import OCCUPANCIES
from kvsim.analysis.plan import MAX_BATCH, RISK, Demand, Plan, nearest, plan
from kvsim.analysis.request_lengths import Lengths, constant
from kvsim.analysis.shortcuts import Shortcuts
from kvsim.commandline import Command
from kvsim.commands.flags import TOKENS, WeightChoice, gathered, own_cache, show, weights_gathered
from kvsim.commands.model_choice import cards, model_option
from kvsim.engines import ENGINES, IDEAL, EngineChoice, engine_fields, owner
from kvsim.hardware import Hardware, Price, given, lowest
from kvsim.install import install_hint
from kvsim.layout import Method
from kvsim.memory.capacity import held_share
from kvsim.memory.sharding import Sharding
from kvsim.methods.defaults import DEFAULT_SPECS
from kvsim.models.load import load_model
from kvsim.models.model import Model
from kvsim.models.quantization import WEIGHT_DTYPES, kv_method
from kvsim.output import plan_screen, rows_file
from kvsim.output.plan_rows import cut, plan_object
from kvsim.specs import (
    choose_methods,
    parse_card,
    parse_engine_choice,
    parse_human,
    parse_lengths,
    parse_prefix_hits,
    parse_prices,
    parse_reserve,
    parse_seconds,
    parse_size,
    parse_speculation,
)

WEIGHED = DEFAULT_SPECS["plan"]
LAYOUT = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "data_parallel_size",
    "decode_context_parallel_size",
)
PAGED = owner("block_size")
"""The engine that --block-size chooses."""


@click.command("plan", cls=Command)
@model_option
@click.option(
    "--gpu",
    "gpus",
    multiple=True,
    required=True,
    help="CARD, or CARD:COUNT where COUNT cards share the model (else 1, 2, 4, 8 are tried, more where the weights do "
    "not fit). Repeatable.",
    shell_complete=cards,
)
@click.option("--users", type=int, required=True, help="Requests in flight at once.")
@click.option("--slo-tpot", metavar="TIME", help="Longest time per output token: 30ms.")
@click.option("--slo-ttft", metavar="TIME", help="Longest time to the first token, of 95 % of the requests: 2s.")
@click.option("--input-len", help="Tokens of a prompt.  [default: 2k]")
@click.option("--output-len", help="Tokens of an answer.  [default: 512]")
@click.option("--ctx", help="Tokens of both together, the answer's among them.")
@click.option(
    "--lengths",
    "spec",
    help="lognormal:mean=2000,sigma=0.8[,output_mean=300,output_sigma=0.6][,max=32k], or a CSV trace.",
)
@click.option(
    "--max-model-len",
    help="Tokens at which requests are cut, as vLLM reads it: 32k is 32000.  [default: the model's positions]",
)
@click.option("--method", "specs", multiple=True, help=f"Cache method; repeatable.  [default: {', '.join(WEIGHED)}]")
@click.option("--weight-bits", type=float, help="Bits a weight.  [default: the config's dtype, else 16]")
@click.option("--kv-cache-dtype", "--kv-dtype", help="As vLLM's: one more method, by an engine's name.")
@click.option("--weight-dtype", help=f"Type of the layers' weights: {', '.join(WEIGHT_DTYPES)}.")
@click.option("--quantization", "-q", help="The same by vLLM's name: fp8, awq, gptq, mxfp4 ...")
@click.option(
    "--price",
    "prices",
    multiple=True,
    help="Dollars a card-hour, 2.2, or of one card, mi300x=2.2. Repeatable.  [default: the lowest of the dated list "
    "prices]",
)
@click.option("--risk", type=float, default=RISK, show_default=True, help="Accepted probability of too little memory.")
@click.option(
    "--occupancy",
    type=click.Choice(OCCUPANCIES),
    default="full",
    show_default=True,
    help="Requests at the end of their answers, or at random moments.",
)
@click.option("--engine", help=f"Whose bytes: {', '.join(ENGINES)}.  [default: ideal, or {PAGED} with --block-size]")
@click.option("--block-size", type=TOKENS, help="As vLLM's: tokens a block.")
@click.option("--reserve", help="Share of a card's memory held back.  [default: the engine's, else 10%]")
@click.option("--gpu-memory-utilization", type=float, help="As vLLM's: 1 - reserve.")
@click.option("--tensor-parallel-size", "--tp", "-tp", type=click.IntRange(1), help="As vLLM's: share every layer.")
@click.option("--pipeline-parallel-size", "--pp", "-pp", type=click.IntRange(1), help="As vLLM's: stages of layers.")
@click.option(
    "--data-parallel-size",
    "--dp",
    "-dp",
    type=click.IntRange(1),
    help="As vLLM's: attention on so many, a mixture's experts shared.  [default of these four: all that suit]",
)
@click.option(
    "--decode-context-parallel-size", "--dcp", "-dcp", type=click.IntRange(1), help="As vLLM's: share tokens."
)
@click.option("--max-num-seqs", type=click.IntRange(1), default=MAX_BATCH, help="As vLLM's: largest batch.")
@click.option("--max-cards", type=click.IntRange(1), help="Refuse plans with more cards.")
@click.option(
    "--speculate",
    help="Drafts: mtp:tokens=1,acceptance=0.85; ngram:tokens=4,acceptance=0.5; draft:model=NAME,acceptance=0.8/0.6.",
)
@click.option("--prefix-hits", help="Share of a prompt found in the cache: 60%, or a trace (JSON Lines, Mooncake's).")
@click.option("--disaggregated", is_flag=True, help="Prefill and decode on cards of their own, too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Write the rows: .csv, or .json.")
@weights_gathered
@gathered("engine", lambda **given: _engine(**given), "engine", "block_size")
@gathered("layout", lambda **given: _layout(**given), *LAYOUT)
@gathered("lengths", lambda **given: _lengths(**given), "input_len", "output_len", "ctx", "spec")
@gathered("shortcuts", lambda **given: _shortcuts(**given), "speculate", "prefix_hits")
@gathered("held", lambda **given: _share(**given), "reserve", "gpu_memory_utilization")
def command(
    model_name: str,
    gpus: tuple[str, ...],
    users: int,
    slo_tpot: str | None,
    slo_ttft: str | None,
    lengths: tuple[Lengths, list[str]],
    max_model_len: str | None,
    specs: tuple[str, ...],
    kv_cache_dtype: str | None,
    weights: WeightChoice,
    prices: tuple[str, ...],
    risk: float,
    occupancy: str,
    engine: str,
    held: float | None,
    layout: Sharding | None,
    max_num_seqs: int,
    max_cards: int | None,
    shortcuts: Shortcuts,
    disaggregated: bool,
    as_json: bool,
    out: Path | None,
) -> int:
    """How many cards, which method and batch for so many users within these latencies, and at what price.

    Exit code 1 where no card and method meets the demand.
    """
    try:
        import numpy  # noqa: F401
    except ImportError:
        raise ValueError(f"plan needs numpy: {install_hint('plan')}") from None
    if out is not None:
        rows_file.check(out)
    serving, cards = parse_engine_choice(engine, {}), _cards(gpus, layout)
    own = parse_prices(prices, [card for card, _ in cards])
    model = load_model(model_name)
    longest = parse_human(max_model_len, "max-model-len") if max_model_len is not None else model.max_positions
    asked, untold = lengths
    lengths_cut, notes = cut(asked, longest)
    notes = untold + notes
    slos = _seconds(slo_tpot, "slo-tpot"), _seconds(slo_ttft, "slo-ttft")
    demand = Demand(users, lengths_cut, slos[0], slos[1], risk, occupancy)
    methods, said = _methods(model, specs, kv_cache_dtype, serving)
    notes += said
    if disaggregated and layout is not None:
        raise ValueError("--disaggregated weighs the layouts of both sides: give no parallel sizes")

    def price(card: Hardware, num_cards: int) -> Price | None:
        return given(card.id, own[card.id]) if card.id in own else lowest(card.id, num_cards)

    asked_of: dict[str, Any] = {"weight_bits": weights.bits, "quantized": weights.quantized, "reserve": held}
    asked_of |= {"engine": serving.on, "shortcuts": shortcuts}
    limits: dict[str, Any] = {"max_cards": max_cards, "max_num_seqs": max_num_seqs}

    def weigh(wanted: Demand) -> list[Plan]:
        return plan(model, methods, cards, wanted, price, **asked_of, **limits)

    ways = weigh(demand)
    notes += _spared(shortcuts, ways)
    counted = [(card, count) for card, count in cards if not isinstance(count, Sharding)]
    divided = apart(model, methods, counted, demand, price, **asked_of) if disaggregated else []
    met = bool(divided) or any(way.refusal is None for way in ways)
    near = [] if met else plan_screen.would_do(demand, nearest(ways, demand, weigh))
    told = {"max_model_len": longest, "weight_bits": weights.bits, "engine": engine, "reserve": held}
    found = plan_object(model, cards, layout, demand, told | _shortcuts_object(shortcuts), [*notes, *near], ways)
    if disaggregated:
        found["disaggregated"] = [_apart_row(way) for way in divided]
    if out is not None:
        rows_file.write(out, found)
        click.echo(f"wrote {out}: {len(ways):,} rows", err=True)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        shown = divided if disaggregated else None
        show(*plan_screen.blocks(model.name, demand, ways, notes, shown, near))
    return 0 if met else 1


def _engine(engine: str | None, block_size: int | None) -> str:
    """The engine's spec, of the one that has blocks where their size is given.

    Raises ``ValueError`` for a block size of another's.
    """
    if block_size is None:
        return engine or IDEAL.name
    name, colon, options = (engine or PAGED).partition(":")
    own = name.strip().lower()
    if own not in ENGINES or "block_size" not in engine_fields(own):
        raise ValueError(f"engine {name} has no --block-size: it is {PAGED}'s")
    return f"{own}:{options}{',' * bool(colon)}block_size={block_size}"


def _shortcuts(speculate: str | None, prefix_hits: str | None) -> Shortcuts:
    hits = parse_prefix_hits(prefix_hits) if prefix_hits is not None else None
    return Shortcuts(
        parse_speculation(speculate) if speculate is not None else None,
        tuple(hits) if isinstance(hits, list) else hits,
    )


def _shortcuts_object(shortcuts: Shortcuts) -> dict[str, Any]:
    drafts, hits = shortcuts.drafts, shortcuts.hits
    return {
        "speculate": None if drafts is None else {"kind": drafts.kind, "kept": drafts.kept},
        "prefix_hits": hits if hits is None or isinstance(hits, float) else "trace",
    }


def _spared(shortcuts: Shortcuts, ways: list[Plan]) -> list[str]:
    """Notes on what drafts and found prompts give."""
    out = []
    if shortcuts.drafts is not None:
        drafts = shortcuts.drafts
        out.append(f"drafts ({drafts.kind}): {drafts.num_tokens} proposed, {drafts.tokens_a_step:.2f} tokens a step")
    if shortcuts.hits is not None:
        found = sorted({way.cached_tokens for way in ways if way.refusal is None})
        span = f"{found[0]:,}" + (f" to {found[-1]:,}" if len(found) > 1 else "") if found else "no"
        out.append(f"prefix hits: {span} tokens of a mean prompt are found, by the engine's units and a replica's room")
    return out


def _seconds(text: str | None, what: str) -> float | None:
    return parse_seconds(text, what) if text is not None else None


def _lengths(
    input_len: str | None, output_len: str | None, ctx: str | None, spec: str | None
) -> tuple[Lengths, list[str]]:
    """The requests' lengths, and a note where none were given.  Raises ``ValueError`` for options that contradict."""
    given = [
        flag for flag, value in (("--input-len", input_len), ("--ctx", ctx), ("--lengths", spec)) if value is not None
    ]
    if len(given) > 1:
        raise ValueError(f"give one of {' and '.join(given)}: each sets the prompt's length")
    made = parse_size("512" if output_len is None else output_len, "output-len")
    if spec is not None:
        return parse_lengths(spec, made), []
    if ctx is not None:
        both = parse_size(ctx)
        if both <= made:
            raise ValueError(f"ctx {both:,}: allowed are more than the {made:,} tokens of an answer (--output-len)")
        return constant(both - made, made), []
    found = constant(parse_size("2k" if input_len is None else input_len, "input-len"), made)
    return found, [] if given else [f"lengths were not given: {found.label} are taken (--ctx, --input-len, --lengths)"]


def _share(reserve: str | None, gpu_memory_utilization: float | None) -> float | None:
    """The share of a card's memory that is asked to be held back; ``None``: as the engine does."""
    held = parse_reserve(reserve) if reserve is not None else None
    return held if gpu_memory_utilization is None else held_share(None, held, gpu_memory_utilization)


def _layout(**sizes: int | None) -> Sharding | None:
    """The one layout that is weighed, where any size is given.  Raises ``ValueError`` for sizes that cannot be."""
    given: dict[str, Any] = {name: size for name, size in sizes.items() if size is not None}
    return Sharding(**given) if given else None


def _cards(gpus: tuple[str, ...], layout: Sharding | None) -> list[tuple[Hardware, int | Sharding | None]]:
    """The cards, and how many of each share the model or how.

    Raises ``ValueError`` where two options say otherwise.
    """
    cards = [parse_card(gpu) for gpu in gpus]
    if layout is None:
        return [(card, count) for card, count in cards]
    for gpu, (_, count) in zip(gpus, cards, strict=True):
        if count not in (None, layout.ranks):
            plain = layout == Sharding(layout.tensor_parallel_size)
            asked = f"--tensor-parallel-size is {layout.ranks}" if plain else f"the sizes ask for {layout.ranks}"
            raise ValueError(f"gpu {gpu!r}: {count} cards, but {asked}")
    return [(card, layout) for card, _ in cards]


def _methods(
    model: Model, specs: tuple[str, ...], kv_cache_dtype: str | None, engine: EngineChoice
) -> tuple[list[Method], list[str]]:
    """The methods that are weighed, and notes."""
    named, notes = list(specs), []
    if kv_cache_dtype is not None:
        own, said = own_cache(model, engine.on(None))
        named.append(kv_method(kv_cache_dtype, own or model.dtype))
        notes = said if kv_cache_dtype.lower() == "auto" else []
    return choose_methods(named or WEIGHED, {}, None)[0], notes


def _apart_row(way: Disaggregation) -> dict[str, Any]:
    return {
        "method": way.method.name,
        "gpu": way.card.id,
        "prefill": {"layout": way.prefill.label, "cards": way.num_prefill_cards, "replicas": way.num_prefill},
        "decode": {"layout": way.decode.label, "cards": way.num_decode_cards, "replicas": way.num_decode},
        "num_cards": way.num_cards,
        "batch_per_replica": way.batch_size,
        "prefill_load": way.load,
        "transfer_nbytes": way.transfer_nbytes,
        "transfer_seconds": way.transfer_seconds,
        "tpot_seconds": way.tpot._asdict(),
        "ttft_seconds": way.ttft._asdict(),
        "requests_per_second": way.requests_per_second,
        "tokens_per_second": way.tokens_per_second,
        "usd_per_mtok": way.usd_per_mtok,
    }
