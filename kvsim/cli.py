"""The command line: ``kvsim estimate | compare | explain | plot | models | hardware``.

Everything prints a table for people, or with ``--json`` one object with ``schema``, ``inputs`` as understood and
``rows``.  A bad input is one line on stderr and exit code 2.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import click

from kvsim import __version__, catalog, report
from kvsim.capacity import Room, max_batch, max_context, room
from kvsim.commands import LazyGroup
from kvsim.estimate import Estimate, check_sizes, estimate
from kvsim.explain import Explanation, explain, model_numbers
from kvsim.hardware import Hardware, find_hardware
from kvsim.layout import Method
from kvsim.load import load_model
from kvsim.methods import METHODS
from kvsim.model import Model
from kvsim.options import (
    Value,
    choose_methods,
    parse_dtype,
    parse_reserve,
    parse_size,
    parse_sizes,
    parse_value,
)

PLOT_CONTEXTS = "128,256,512,1k,2k,4k,8k,16k,32k,64k,128k"
COMPARE_METHODS = ("kivi:nbits=8", "kivi:nbits=4", "kivi:nbits=2", "kivi:nbits=2,group_size=64", "kivi-seed")

Command = TypeVar("Command", bound=Callable[..., Any])


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command and exits: 0, or 2 after one line on stderr."""
    sys.exit(run(argv))


def run(argv: Sequence[str] | None = None) -> int:
    """Runs a command; its exit code."""
    try:
        code = cli.main(args=argv, prog_name="kvsim", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except BrokenPipeError:  # the reader has gone: nothing more to say, at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (KeyError, IndexError):
        raise  # a fault of ours, though also a LookupError
    except click.Abort:
        return 130
    except click.ClickException as error:
        message = error.format_message()
    except (ValueError, LookupError, OSError) as error:
        message = str(error)
    print("kvsim: error: " + " ".join(message.split()), file=sys.stderr)
    return 2


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True)
@click.version_option(__version__, prog_name="kvsim")
@click.pass_context
def cli(context: click.Context) -> None:
    """What a key/value cache costs, before anything runs."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


model_option = click.option(
    "--model", "model_name", required=True, help="Catalogue name or alias, config.json, model directory, or hub id."
)
batch_option = click.option("--batch", type=int, default=1, show_default=True, help="Sequences.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
method_options = _options(
    click.option(
        "--method",
        "specs",
        multiple=True,
        help=f"{', '.join(METHODS)}; or with its options, kivi:nbits=4,group_size=64. Repeatable.",
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
)


class Chosen:
    """The methods that the options name."""

    def __init__(self, specs: Sequence[str], dtype: str | None, shared: dict[str, Value | None]) -> None:
        self.dtype = parse_dtype(dtype) if dtype is not None else None
        given = {key: value for key, value in shared.items() if value is not None}
        self.methods, self.default = choose_methods(specs, given, self.dtype)

    def weigh(self, model: Model, batch: int, contexts: Iterable[int]) -> tuple[list[Estimate], list[str]]:
        """Rows and notes.  A method that was not asked for by name and cannot hold the model becomes a note."""
        rows: list[Estimate] = []
        notes: list[str] = []
        for method in self.methods:
            try:
                rows += [estimate(model, method, batch, ctx) for ctx in contexts]
            except ValueError as error:
                if not self.default:
                    raise
                notes.append(f"{method.name} left out: {error}")
        return rows, notes


@cli.command("estimate")
@model_option
@click.option("--ctx", default="4k", show_default=True, help="Tokens a sequence: 4096, 128k, 1M.")
@batch_option
@method_options
@click.option("--gpu", help="Say what fits beside the weights on this card.")
@click.option("--weight-bits", type=float, help="Bits a weight.  [default: the config's dtype, else 16]")
@click.option("--reserve", default="10%", show_default=True, help="Share of the card's memory held back.")
@json_option
def estimate_command(
    model_name: str,
    ctx: str,
    batch: int,
    specs: tuple[str, ...],
    dtype: str | None,
    gpu: str | None,
    weight_bits: float | None,
    reserve: str,
    as_json: bool,
    **shared: Value | None,
) -> None:
    """Bytes of the cache: stored, read per step, by purpose, and what fits on a card."""
    tokens = parse_size(ctx)
    check_sizes(batch, tokens)
    share = parse_reserve(reserve)
    chosen = Chosen(specs, dtype, shared)
    card = find_hardware(gpu) if gpu is not None else None
    model = load_model(model_name)
    rows, left_out = chosen.weigh(model, batch, [tokens])
    notes = [*_notes(model, [tokens]), *left_out]
    space = room(model, card, weight_bits, share) if card is not None else None
    largest: list[tuple[int | None, int | None]] = []
    if space is not None:
        notes += space.notes
        largest = [
            (
                max_batch(model, row.method, tokens, space.cache_nbytes),
                max_context(model, row.method, batch, space.cache_nbytes),
            )
            for row in rows
        ]
    if as_json:
        out = _json("estimate", model, _inputs(model, batch, chosen, ctx=tokens, gpu=card.id if card else None), notes)
        out["rows"] = [_row(row) for row in rows]
        if space is not None:
            out["gpu"] = _space(space)
            for entry, row, (most, longest) in zip(out["rows"], rows, largest, strict=True):
                entry["fits"] = row.nbytes <= space.cache_nbytes
                entry["max_batch"], entry["max_ctx"] = most, longest
        _print_json(out)
        return
    blocks = [report.heading(model), f"context {tokens:,} tokens, batch {batch:,}", report.estimates(rows)]
    if space is not None:
        blocks.append(report.fits(space, rows, largest))
    _print(*blocks, report.notes(notes))


@cli.command("compare")
@model_option
@click.option("--ctx", default="1k,8k,32k,128k", show_default=True, help="Tokens a sequence, commas between several.")
@batch_option
@method_options
@json_option
def compare_command(
    model_name: str,
    ctx: str,
    batch: int,
    specs: tuple[str, ...],
    dtype: str | None,
    as_json: bool,
    **shared: Value | None,
) -> None:
    """Methods down, contexts across: bytes and compression."""
    model, chosen, contexts, rows, notes = _grid(model_name, ctx, batch, specs, dtype, shared)
    if as_json:
        out = _json("compare", model, _inputs(model, batch, chosen, ctx=contexts), notes)
        _print_json(out | {"rows": [_row(row) for row in rows]})
        return
    _print(report.heading(model), f"batch {batch:,}", report.comparison(rows), report.notes(notes))


@cli.command("plot")
@model_option
@click.option("--ctx", default=PLOT_CONTEXTS, help="Tokens a sequence, commas between several.  [default: 128 to 128k]")
@batch_option
@method_options
@click.option("--output", "-o", default="kvsim.png", show_default=True, help="Picture to write: .png or .svg.")
@json_option
def plot_command(
    model_name: str,
    ctx: str,
    batch: int,
    specs: tuple[str, ...],
    dtype: str | None,
    output: str,
    as_json: bool,
    **shared: Value | None,
) -> None:
    """Bytes and compression over context, as PNG or SVG."""
    model, chosen, contexts, rows, notes = _grid(model_name, ctx, batch, specs, dtype, shared)
    from kvsim.plot import draw

    draw(rows, f"{model.name}, batch {batch:,}", Path(output))
    if as_json:
        out = _json("plot", model, _inputs(model, batch, chosen, ctx=contexts), notes)
        _print_json(out | {"path": output, "rows": [_row(row) for row in rows]})
        return
    _print(f"wrote {output}", report.notes(notes))


def _grid(
    model_name: str,
    ctx: str,
    batch: int,
    specs: tuple[str, ...],
    dtype: str | None,
    shared: dict[str, Value | None],
) -> tuple[Model, Chosen, list[int], list[Estimate], list[str]]:
    """Methods times contexts; without any option, the wider default set."""
    contexts = parse_sizes(ctx)
    check_sizes(batch, contexts[0])
    chosen = Chosen(specs, dtype, shared)
    if chosen.default:
        baseline = chosen.methods[0].name
        chosen = Chosen((baseline, *COMPARE_METHODS), dtype, {})
        chosen.default = True
    model = load_model(model_name)
    rows, left_out = chosen.weigh(model, batch, contexts)
    return model, chosen, contexts, rows, [*_notes(model, contexts), *left_out]


@cli.command("explain")
@model_option
@click.option("--ctx", default="4k", show_default=True, help="Tokens a sequence: 4096, 128k, 1M.")
@batch_option
@method_options
@json_option
def explain_command(
    model_name: str,
    ctx: str,
    batch: int,
    specs: tuple[str, ...],
    dtype: str | None,
    as_json: bool,
    **shared: Value | None,
) -> None:
    """Where every byte comes from: the formulas, with the numbers and their config keys."""
    tokens = parse_size(ctx)
    check_sizes(batch, tokens)
    chosen = Chosen(specs, dtype, shared)
    if chosen.default:
        chosen.methods = [chosen.methods[0], chosen.methods[-1]]
    model = load_model(model_name)
    weighed, left_out = chosen.weigh(model, batch, [tokens])
    rows = [explain(model, row.method, batch, tokens) for row in weighed]
    numbers = model_numbers(model, batch, tokens)
    notes = [*_notes(model, [tokens]), *left_out]
    if as_json:
        out = _json("explain", model, _inputs(model, batch, chosen, ctx=tokens), notes)
        out["numbers"] = [asdict(number) for number in numbers]
        out["rows"] = [_row(row) | _formulas(text) for row, text in zip(weighed, rows, strict=True)]
        _print_json(out)
        return
    _print(report.heading(model), report.explanations(numbers, rows), report.notes(notes))


@cli.command("models")
@click.argument("name", required=False)
@json_option
def models_command(name: str | None, as_json: bool) -> None:
    """The models that are known, with sources; with NAME all about one."""
    row = catalog.find("models", name) if name is not None else None
    if name is not None and row is None:
        raise LookupError(catalog.unknown("models", "model", name, "kvsim models"))
    found = [
        (each, Model.from_config(each["config"], each["id"])) for each in ([row] if row else catalog.rows("models"))
    ]
    if as_json:
        rows = [
            {key: each[key] for key in ("id", "aliases", "source", "note", "config")} | _model(m) for each, m in found
        ]
        _print_json({"schema": "kvsim.models/1", "inputs": {"name": name}, "rows": rows})
        return
    if row is not None:
        _print(report.model_detail(row, found[0][1]), report.notes(found[0][1].notes))
        return
    _print(report.model_list(found), "L x kv x dim: layers, key/value heads, head dimension.")


@cli.command("hardware")
@click.argument("name", required=False)
@json_option
def hardware_command(name: str | None, as_json: bool) -> None:
    """The cards that are known, with sources; with NAME all about one."""
    rows = catalog.rows("hardware")
    cards = [Hardware.from_row(row) for row in rows] if name is None else [find_hardware(name)]
    aliases = {row["id"]: row["aliases"] for row in rows}
    if as_json:
        listed = [{"id": card.id, "aliases": aliases[card.id]} | asdict(card) for card in cards]
        _print_json({"schema": "kvsim.hardware/1", "inputs": {"name": name}, "rows": listed})
    elif name is not None:
        _print(report.hardware_detail(cards[0], aliases[cards[0].id]))
    else:
        _print(report.hardware_list(cards), "Memory as a process sees it where known, else the marketed size.")


def _notes(model: Model, contexts: Sequence[int]) -> list[str]:
    notes = list(model.notes)
    if model.max_positions is not None and contexts[-1] > model.max_positions:
        key = model.source("max_positions")
        notes.append(f"a context of {contexts[-1]:,} is beyond the model's {model.max_positions:,} positions ({key})")
    return notes


def _inputs(model: Model, batch: int, chosen: Chosen, **more: Any) -> dict[str, Any]:
    methods = [method.name for method in chosen.methods]
    return {"model": model.name, "batch": batch, "dtype": chosen.dtype or "float16", "methods": methods, **more}


def _json(command: str, model: Model, inputs: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    return {"schema": f"kvsim.{command}/1", "inputs": inputs, "model": _model(model), "notes": notes}


def _model(model: Model) -> dict[str, Any]:
    layer = model.cache_layers[0]
    return {
        "model_type": model.model_type,
        "num_layers": model.num_layers,
        "num_q_heads": model.num_q_heads,
        "num_kv_heads": layer.num_kv_heads,
        "key_dim": layer.key_dim,
        "value_dim": layer.value_dim,
        "num_params": model.num_params,
        "max_positions": model.max_positions,
        "dtype": model.dtype,
        "sources": dict(model.sources),
        "notes": list(model.notes),
    }


def _method(method: Method) -> dict[str, Any]:
    return asdict(method)  # type: ignore[call-overload, no-any-return]  # every method is a dataclass


def _row(row: Estimate) -> dict[str, Any]:
    return {
        "method": row.method.name,
        "options": _method(row.method),
        "batch": row.batch_size,
        "ctx": row.num_tokens,
        "nbytes": row.nbytes,
        "nbytes_per_token": _exact(row.nbytes_per_token),
        "nbytes_per_sequence": _exact(row.nbytes / row.batch_size),
        "compression": row.compression,
        "parts": row.parts,
        "split": row.split,
        "read_nbytes": row.read_nbytes,
        "read_nbytes_per_token": _exact(row.read_nbytes_per_token),
        "read_parts": row.read_parts,
    }


def _exact(number: float) -> int | float:
    return int(number) if number.is_integer() else number


def _formulas(row: Explanation) -> dict[str, Any]:
    return {
        "numbers": [asdict(number) for number in row.numbers],
        "formulas": [
            {
                "buffer": formula.buffer,
                "section": formula.section,
                "nbytes": formula.nbytes,
                "formula": formula.text,
                "layer": formula.layer,
                "apart": formula.apart,
                "factors": [{"value": value, "name": name} for value, name in formula.factors],
            }
            for formula in row.formulas
        ],
    }


def _space(space: Room) -> dict[str, Any]:
    return {
        "id": space.hardware.id,
        "memory_nbytes": space.memory_nbytes,
        "memory_source": space.hardware.memory_source,
        "reserve_nbytes": space.reserve_nbytes,
        "weight_nbytes": space.weight_nbytes,
        "weight_bits": space.weight_bits,
        "cache_nbytes": space.cache_nbytes,
        "bandwidth": space.hardware.bandwidth,
        "source": space.hardware.source,
    }


def _print(*blocks: str) -> None:
    click.echo("\n\n".join(block for block in blocks if block))


def _print_json(out: dict[str, Any]) -> None:
    click.echo(json.dumps(out, indent=2))


if __name__ == "__main__":
    main()
