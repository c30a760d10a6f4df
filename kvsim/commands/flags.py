"""The options that commands share, in the names that vLLM's users know, and what they choose."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from functools import wraps
from typing import Any, NamedTuple, TypeVar, cast

import click

from kvsim.commandline import TextType
from kvsim.engines import ENGINES, IDEAL, Engine, engine_fields, label, own_flags, owner
from kvsim.hardware import Hardware
from kvsim.layout import Method
from kvsim.memory.estimate import Estimate, estimate
from kvsim.memory.sharding import Sharding
from kvsim.methods import METHODS
from kvsim.methods.defaults import EXAMPLE, NESTED
from kvsim.models.model import Model
from kvsim.models.quantization import KV_DTYPES, QUANTIZATIONS, WEIGHT_DTYPES, kv_method, weight_bits_of
from kvsim.models.weight_storage import check_weight_bits
from kvsim.output.tables import fitted
from kvsim.specs import (
    Value,
    choose_methods,
    parse_card,
    parse_dtype,
    parse_engine_choice,
    parse_human,
    parse_size,
    parse_tokens,
    parse_value,
    rows_of,
)

Command = TypeVar("Command", bound=Callable[..., Any])


class TokensType(click.ParamType):  # type: ignore[type-arg]
    """A number of tokens, ``4096``, ``128k`` or ``1M``, as every option of such numbers takes it."""

    name = "tokens"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return parse_tokens(value, max(param.opts, key=len).lstrip("-") if param else self.name)
        except ValueError as error:
            self.fail(str(error), param, ctx)


TOKENS = TokensType()


def options(*decorators: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several click options as one decorator."""

    def decorate(command: Command) -> Command:
        for option in reversed(decorators):
            command = option(command)
        return command

    return decorate


def gathered(argument: str, make: Callable[..., Any], *parameters: str) -> Callable[[Command], Command]:
    """The values of several options as one argument of the command: ``make(parameter=value, ...)``."""

    def decorate(command: Command) -> Command:
        @wraps(command)
        def collected(**given: Any) -> Any:
            given[argument] = make(**{name: given.pop(name) for name in parameters})
            return command(**given)

        return cast("Command", collected)

    return decorate


class MethodFlags(NamedTuple):
    """What the options say of methods: specs, and options that apply wherever a method has the field."""

    specs: tuple[str, ...] = ()
    dtype: str | None = None
    kv_cache_dtype: str | None = None
    shared: tuple[tuple[str, Value], ...] = ()


def method_flags(
    specs: tuple[str, ...], dtype: str | None, kv_cache_dtype: str | None, **shared: Value | None
) -> MethodFlags:
    """The values of :data:`method_options`."""
    given = tuple((key, value) for key, value in shared.items() if value is not None)
    return MethodFlags(specs, dtype, kv_cache_dtype, given)


LAYOUT_FLAGS = (
    click.option("--sink-length", type=TOKENS, help="First tokens kept exact."),
    click.option("--key-nbits", type=int, help="Bits a key code."),
    click.option("--value-nbits", type=int, help="Bits a value code."),
    click.option(
        "--key-group-size", type=TextType(parse_value), metavar="TOKENS", help="Tokens a key scale, or 'sequence'."
    ),
    click.option(
        "--value-group-size",
        type=TextType(parse_value),
        metavar="CHANNELS",
        help="Channels a value scale, or 'head'.",
    ),
    click.option("--dtype", help="Type of exact tokens: fp16, bf16 or fp32.  [default: fp16]"),
)
"""Of a method's layout, as both tools take them."""

batch_option = click.option("--batch", type=int, default=1, show_default=True, help="Sequences.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
method_options = options(
    click.option(
        "--method",
        "specs",
        multiple=True,
        help=f"{', '.join(METHODS)}; or with its options, {EXAMPLE}; one inside another in "
        f"parentheses, {NESTED}. Repeatable.",
    ),
    click.option("--nbits", type=int, help="Bits a code: 1, 2, 3, 4 or 8."),
    click.option("--group-size", type=int, help="Elements that share a scale."),
    click.option("--residual-length", type=TOKENS, help="Newest tokens kept exact."),
    *LAYOUT_FLAGS,
    click.option(
        "--kv-cache-dtype",
        "--kv-dtype",
        "kv_cache_dtype",
        help="The method by an engine's name: auto, fp8, int8_per_token_head, nvfp4, q8_0 ...",
    ),
    gathered(
        "asked",
        method_flags,
        *("specs", "dtype", "kv_cache_dtype", "nbits", "group_size", "residual_length", "sink_length"),
        *("key_nbits", "value_nbits", "key_group_size", "value_group_size"),
    ),
)
PAGED = owner("block_size")
"""The engine that a flag of blocks chooses."""
engine_option = click.option(
    "--engine",
    help=f"Whose bytes: {', '.join(ENGINES)}; or with its options, {PAGED}:block_size=32.  [default: ideal, or "
    f"{PAGED} where a flag is {label(PAGED)}'s alone]",
)
engine_options = options(
    click.option("--block-size", type=TOKENS, help=f"Tokens a block ({PAGED}).  [default: 16]"),
    click.option("--max-num-seqs", type=int, help="Most sequences at once."),
    click.option(
        "--max-num-batched-tokens",
        type=TextType(lambda text: parse_human(text, "max-num-batched-tokens")),
        metavar="TOKENS",
        help=f"Tokens a step ({owner('max_num_batched_tokens')}).  [default: by card]",
    ),
    gathered("flags", dict, "block_size", "max_num_seqs", "max_num_batched_tokens"),
)
sharding_options = options(
    click.option("--tensor-parallel-size", "--tp", "-tp", type=int, default=1, help="Cards that share every layer."),
    click.option("--pipeline-parallel-size", "--pp", "-pp", type=int, default=1, help="Cards that share the layers."),
    click.option(
        "--data-parallel-size", "--dp", "-dp", type=int, default=1, help="Replicas; a mixture's experts are shared."
    ),
    click.option(
        "--decode-context-parallel-size", "--dcp", "-dcp", type=int, default=1, help="Cards that share the tokens."
    ),
    click.option(
        "--prefill-context-parallel-size", "--pcp", "-pcp", type=int, default=1, help="Further cards that do."
    ),
    click.option(
        "--enable-expert-parallel", "--ep", "-ep", is_flag=True, help="Whole experts a card, not a slice of each."
    ),
    gathered("sharding", Sharding, *(field.name for field in fields(Sharding))),
)


class Selection:
    """The methods and the engine that the options name."""

    def __init__(self, model: Model, asked: MethodFlags, engine: Engine = IDEAL) -> None:
        self.dtype = parse_dtype(asked.dtype) if asked.dtype is not None else None
        self.engine = engine
        kv_cache_dtype, named = asked.kv_cache_dtype, list(asked.specs)
        own, self.notes = own_cache(model, engine)
        if kv_cache_dtype is not None:
            named.append(kv_method(kv_cache_dtype, own or self.dtype or model.dtype))
        self.methods, self.default = choose_methods(named, dict(asked.shared), self.dtype)
        if self.default and engine.cache_methods is not None:
            shown = [self.methods[0].name, *engine.cache_methods]
            shown = [KV_DTYPES[own], *shown] if own is not None else shown
            self.methods, _ = choose_methods(shown, {}, None)
        elif kv_cache_dtype is None or kv_cache_dtype.lower() != "auto":
            self.notes = []

    def weigh(
        self, model: Model, batch: int, contexts: Iterable[int], shared_prefix: int = 0
    ) -> tuple[list[Estimate], list[str]]:
        """Rows and notes.  A method that was not asked for by name and cannot hold the model becomes a note."""

        def weighed(method: Method) -> list[Estimate]:
            return [estimate(model, method, batch, ctx, self.engine, shared_prefix) for ctx in contexts]

        rows, notes = rows_of(self.methods, weighed, model.name, named=not self.default)
        return rows, [*self.notes, *notes]


def own_cache(model: Model, engine: Engine) -> tuple[str | None, list[str]]:
    """What ``--kv-cache-dtype auto`` means beyond the model's type: the checkpoint's own, under an engine that reads it
    (:attr:`kvsim.engines.engine.Engine.checkpoint_cache`); a note."""
    if model.cache_dtype is None or not engine.checkpoint_cache:
        return None, []
    return model.cache_dtype, [f"--kv-cache-dtype auto is {model.cache_dtype}: {model.source('cache_dtype')}"]


def choose_engine(
    spec: str | None, card: Hardware | None, given: dict[str, Any], num_cards: int = 1
) -> tuple[Engine, list[str]]:
    """The engine, with the flags that it has and its defaults on ``num_cards`` of ``card``; notes.

    Raises ``LookupError`` for an unknown engine, ``ValueError`` for a flag that it does not have.
    """
    flags = given_flags(given)
    own = [key for key in own_flags() if key in flags]
    notes = []
    if spec is None and own:
        spec = owner(own[0])
        notes.append(f"engine {spec}, since --{own[0].replace('_', '-')} is {label(spec)}'s")
    name = (spec or IDEAL.name).partition(":")[0].strip().lower()
    for key in own:
        if name in ENGINES and key not in engine_fields(name):
            raise ValueError(f"engine {name} has no --{key.replace('_', '-')}: it is {owner(key)}'s")
    return parse_engine_choice(spec or IDEAL.name, flags).on(card, num_cards), notes


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


class WeightChoice(NamedTuple):
    """Bits a weight (``None``: the model's own), and whether they are those of the layers only."""

    bits: float | None
    quantized: bool


def choose_weights(weight_bits: float | None, weight_dtype: str | None, quantization: str | None) -> WeightChoice:
    """Bits a weight as the options say.

    Raises ``LookupError`` for an unknown name, ``ValueError`` for more than one flag or bits that cannot be.
    """
    check_weight_bits(weight_bits)
    if sum(value is not None for value in (weight_bits, weight_dtype, quantization)) > 1:
        raise ValueError("give one of --weight-bits, --weight-dtype and --quantization")
    if weight_dtype is not None:
        return WeightChoice(weight_bits_of(weight_dtype, WEIGHT_DTYPES, "weight-dtype"), True)
    if quantization is not None:
        return WeightChoice(weight_bits_of(quantization, QUANTIZATIONS, "quantization"), True)
    return WeightChoice(weight_bits, False)


weights_gathered = gathered("weights", choose_weights, "weight_bits", "weight_dtype", "quantization")


class SequenceTokens(NamedTuple):
    """Tokens of a sequence: all of them, of the prompt, of the answer (where told), and the longest that is served."""

    context: int
    prompt: int
    output: int | None
    longest: int


def tokens_a_sequence(
    ctx: str | None, max_model_len: str | None, input_len: str | None, output_len: str | None
) -> SequenceTokens:
    """As the flags say: a context is an input and an output, or given.

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
    return SequenceTokens(tokens, given, out, longest or tokens)


def beyond(model: Model, contexts: Sequence[int]) -> list[str]:
    """The model's notes, and one where a context is beyond its positions."""
    notes = list(model.notes)
    if model.max_positions is not None and contexts[-1] > model.max_positions:
        key = model.source("max_positions")
        notes.append(f"a context of {contexts[-1]:,} is beyond the model's {model.max_positions:,} positions ({key})")
    return notes


def inputs_object(model: Model, batch: int, chosen: Selection, **more: Any) -> dict[str, Any]:
    """``inputs`` of a JSON answer."""
    methods = [method.name for method in chosen.methods]
    return {"model": model.name, "batch": batch, "dtype": chosen.dtype or "float16", "methods": methods, **more}


def show(*blocks: str) -> None:
    """Blocks of text with a blank line between, empty ones left out, no line wider than the terminal but a table's."""
    click.echo(fitted("\n\n".join(block for block in blocks if block)))


def show_json(out: dict[str, Any]) -> None:
    click.echo(json.dumps(out, indent=2))
