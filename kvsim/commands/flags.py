"""The options that commands share, in the names that vLLM's users know, and what they choose."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import click

from kvsim.engines import ENGINES, Engine, engine_fields
from kvsim.engines.vllm import server_defaults
from kvsim.hardware import Hardware
from kvsim.memory.estimate import Estimate, estimate
from kvsim.memory.sharding import Sharding
from kvsim.methods import METHODS
from kvsim.models.model import Model
from kvsim.models.quantization import KV_DTYPES, QUANTIZATIONS, WEIGHT_DTYPES, kv_method, weight_bits_of
from kvsim.specs import (
    Value,
    check_weight_bits,
    choose_methods,
    left_out,
    parse_card,
    parse_dtype,
    parse_engine,
    parse_human,
    parse_size,
    parse_value,
)

Command = TypeVar("Command", bound=Callable[..., Any])

VLLM_ONLY = ("block_size", "max_num_batched_tokens")
DEFAULT_METHODS: dict[str, tuple[str, ...]] = {
    "vllm": ("fp8", "int8", "int4", "nvfp4"),
    "llama.cpp": ("q8_0", "q5_1", "q4_0"),
    "transformers": (),
}
"""Engine -> the methods that are shown beside the uncompressed cache; for the others KIVI at 8, 4 and 2 bits."""


def options(*decorators: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several click options as one decorator."""

    def decorate(command: Command) -> Command:
        for option in reversed(decorators):
            command = option(command)
        return command

    return decorate


model_option = click.option(
    "--model", "model_name", required=True, help="Catalogue name or alias, config.json, model directory, or hub id."
)
batch_option = click.option("--batch", type=int, default=1, show_default=True, help="Sequences.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
method_options = options(
    click.option(
        "--method",
        "specs",
        multiple=True,
        help=f"{', '.join(METHODS)}; or with its options, kivi:nbits=4,group_size=64; one inside another in "
        "parentheses, paged:block_size=16,inner=(kivi:nbits=4). Repeatable.",
    ),
    click.option("--nbits", type=int, help="Bits a code: 1, 2, 3, 4 or 8."),
    click.option("--group-size", type=int, help="Elements that share a scale."),
    click.option("--residual-length", type=int, help="Newest tokens kept exact."),
    click.option("--sink-length", type=int, help="First tokens kept exact."),
    click.option("--key-nbits", type=int, help="Bits a key code."),
    click.option("--value-nbits", type=int, help="Bits a value code."),
    click.option("--key-group-size", type=parse_value, metavar="TOKENS", help="Tokens a key scale, or 'sequence'."),
    click.option("--value-group-size", type=parse_value, metavar="CHANNELS", help="Channels a value scale, or 'head'."),
    click.option("--dtype", help="Type of exact tokens: fp16, bf16 or fp32.  [default: fp16]"),
    click.option(
        "--kv-cache-dtype",
        "--kv-dtype",
        "kv_cache_dtype",
        help="The method by an engine's name: auto, fp8, int8_per_token_head, nvfp4, q8_0 ...",
    ),
)
engine_option = click.option(
    "--engine",
    help=f"Whose bytes: {', '.join(ENGINES)}; or with its options, vllm:concurrent_batches=2.  [default: ideal, or "
    "vllm where a flag is vLLM's alone]",
)
engine_options = options(
    click.option("--block-size", type=int, help="Tokens a block (vllm).  [default: 16]"),
    click.option("--max-num-seqs", type=int, help="Most sequences at once."),
    click.option(
        "--max-num-batched-tokens",
        type=lambda text: parse_human(text, "max-num-batched-tokens"),
        metavar="TOKENS",
        help="Tokens a step (vllm).  [default: by card]",
    ),
)
sharding_options = options(
    click.option("--tensor-parallel-size", "-tp", type=int, default=1, help="Cards that share every layer."),
    click.option("--pipeline-parallel-size", "-pp", type=int, default=1, help="Cards that share the layers."),
    click.option("--data-parallel-size", "-dp", type=int, default=1, help="Replicas."),
    click.option("--decode-context-parallel-size", "-dcp", type=int, default=1, help="Cards that share the tokens."),
    click.option("--prefill-context-parallel-size", "-pcp", type=int, default=1, help="Further cards that do."),
)


class Chosen:
    """The methods and the engine that the options name."""

    def __init__(
        self,
        model: Model,
        specs: Sequence[str],
        dtype: str | None,
        shared: dict[str, Value | None],
        kv_cache_dtype: str | None = None,
        engine: Engine | None = None,
    ) -> None:
        self.dtype = parse_dtype(dtype) if dtype is not None else None
        self.engine = engine or ENGINES["ideal"]()
        given = {key: value for key, value in shared.items() if value is not None}
        named = list(specs)
        own, self.notes = own_cache(model, self.engine.name)
        if kv_cache_dtype is not None:
            named.append(kv_method(kv_cache_dtype, own or self.dtype or model.dtype))
        self.methods, self.default = choose_methods(named, given, self.dtype)
        if self.default and self.engine.name in DEFAULT_METHODS:
            shown = [self.methods[0].name, *DEFAULT_METHODS[self.engine.name]]
            shown = [KV_DTYPES[own], *shown] if own is not None else shown
            self.methods, _ = choose_methods(shown, {}, None)
        elif kv_cache_dtype is None or kv_cache_dtype.lower() != "auto":
            self.notes = []

    def weigh(
        self, model: Model, batch: int, contexts: Iterable[int], shared_prefix: int = 0
    ) -> tuple[list[Estimate], list[str]]:
        """Rows and notes.  A method that was not asked for by name and cannot hold the model becomes a note."""
        rows: list[Estimate] = []
        reasons: dict[str, str] = {}
        for method in self.methods:
            try:
                rows += [estimate(model, method, batch, ctx, self.engine, shared_prefix) for ctx in contexts]
            except ValueError as error:
                if not self.default:
                    raise
                reasons[method.name] = str(error)
        notes = left_out(reasons)
        if not rows:
            raise ValueError(f"{model.name}: {'; '.join(notes)}")
        return rows, [*self.notes, *notes]


def own_cache(model: Model, engine: str) -> tuple[str | None, list[str]]:
    """What ``--kv-cache-dtype auto`` means beyond the model's type: the checkpoint's own, under vLLM, whose flag it is
    (and under no engine); a note."""
    if model.cache_dtype is None or engine not in ("vllm", "ideal"):
        return None, []
    return model.cache_dtype, [f"--kv-cache-dtype auto is {model.cache_dtype}: {model.source('cache_dtype')}"]


def choose_engine(spec: str | None, card: Hardware | None, given: dict[str, Any]) -> tuple[Engine, list[str]]:
    """The engine, with the flags that it has and the defaults of ``card``; notes.

    Raises ``LookupError`` for an unknown engine, ``ValueError`` for a flag that it does not have.
    """
    flags = given_flags(given)
    own = [key for key in VLLM_ONLY if key in flags]
    notes = []
    if spec is None and own:
        spec = "vllm"
        notes.append(f"engine vllm, since --{own[0].replace('_', '-')} is vLLM's")
    name = (spec or "ideal").partition(":")[0].strip().lower()
    if name == "vllm" and card is not None:
        flags = dict(server_defaults(card.memory_nbytes, card.id)) | flags
    for key in own:
        if name in ENGINES and key not in engine_fields(name):
            raise ValueError(f"engine {name} has no --{key.replace('_', '-')}: it is vllm's")
    return parse_engine(spec or "ideal", flags), notes


def given_flags(given: dict[str, Any]) -> dict[str, Any]:
    """The engine's flags that are given.  Raises ``ValueError`` for a count below 1, of any engine."""
    for key, value in given.items():
        if isinstance(value, int) and value < 1:
            raise ValueError(f"{key.replace('_', '-')} {value}: allowed are 1 and above")
    return {key: value for key, value in given.items() if value is not None}


def choose_card(spec: str | None, sharding: Sharding) -> tuple[Hardware | None, Sharding]:
    """``h100-sxm`` or ``h100-sxm:2``: the card, and the sharding over that many (tensor parallel where none is given).

    Raises ``LookupError`` for an unknown card, ``ValueError`` for a count that is not the ranks'.
    """
    if spec is None:
        return None, sharding
    card, cards = parse_card(spec)
    if cards is None:
        return card, sharding
    if sharding == Sharding():
        sharding = Sharding(tensor_parallel_size=cards)
    if sharding.ranks != cards:
        raise ValueError(f"GPU {spec!r}: {cards} cards, but the parallel sizes ask for {sharding.ranks}")
    return card, sharding


def choose_weights(bits: float | None, dtype: str | None, quantization: str | None) -> tuple[float | None, bool]:
    """Bits a weight, and whether they are those of the layers only.

    Raises ``LookupError`` for an unknown name, ``ValueError`` for more than one flag or bits that cannot be.
    """
    check_weight_bits(bits)
    given = [
        name for name, value in (("bits", bits), ("dtype", dtype), ("quantization", quantization)) if value is not None
    ]
    if len(given) > 1:
        raise ValueError("give one of --weight-bits, --weight-dtype and --quantization")
    if dtype is not None:
        return weight_bits_of(dtype, WEIGHT_DTYPES, "weight-dtype"), True
    if quantization is not None:
        return weight_bits_of(quantization, QUANTIZATIONS, "quantization"), True
    return bits, False


def tokens_a_sequence(
    ctx: str | None, max_model_len: str | None, input_len: str | None, output_len: str | None
) -> tuple[int, int, int | None, int]:
    """``(context, input, output, max_model_len)`` as the flags say: a context is an input and an output, or given.

    Raises ``ValueError`` for flags that contradict each other.
    """
    longest = parse_human(max_model_len, "max-model-len") if max_model_len is not None else None
    if input_len is not None or output_len is not None:
        if ctx is not None:
            raise ValueError("give --ctx, or --input-len and --output-len, not both")
        given = parse_size(input_len, "input-len") if input_len is not None else None
        out = parse_size(output_len, "output-len") if output_len is not None else None
        if given is None:
            raise ValueError("--output-len needs --input-len")
        tokens = given + (out or 0)
    else:
        tokens = parse_size(ctx) if ctx is not None else longest or parse_size("4k")
        given, out = tokens, None
    if longest is not None and tokens > longest:
        raise ValueError(f"a sequence of {tokens:,} tokens is beyond --max-model-len {longest:,}")
    return tokens, given, out, longest or tokens


def beyond(model: Model, contexts: Sequence[int]) -> list[str]:
    """The model's notes, and one where a context is beyond its positions."""
    notes = list(model.notes)
    if model.max_positions is not None and contexts[-1] > model.max_positions:
        key = model.source("max_positions")
        notes.append(f"a context of {contexts[-1]:,} is beyond the model's {model.max_positions:,} positions ({key})")
    return notes


def inputs_object(model: Model, batch: int, chosen: Chosen, **more: Any) -> dict[str, Any]:
    """``inputs`` of a JSON answer."""
    methods = [method.name for method in chosen.methods]
    return {"model": model.name, "batch": batch, "dtype": chosen.dtype or "float16", "methods": methods, **more}


def show(*blocks: str) -> None:
    """Blocks of text with a blank line between, empty ones left out."""
    click.echo("\n\n".join(block for block in blocks if block))


def show_json(out: dict[str, Any]) -> None:
    click.echo(json.dumps(out, indent=2))
