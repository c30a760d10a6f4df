"""What every command line here keeps to: an option of one value is given once, numbers are finite, errors one line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from math import isfinite
from typing import Any

import click

from kvsim.whole_numbers import LARGEST

BITS_64 = (1 << 63) - 1
LONGEST = 1000
"""Characters of an error's line; of a longer one the middle is left out."""

TAIL = 300
"""Characters kept at its end, where messages say what is allowed."""


def one_line(message: str) -> str:
    """A message as one line of at most about ``LONGEST`` printable characters, its beginning and its end kept."""
    text = "".join(each if each.isprintable() else "?" for each in " ".join(message.split()))
    if len(text) <= LONGEST:
        return text
    left_out = len(text) - LONGEST
    return f"{text[: LONGEST - TAIL]} [{left_out:,} characters left out] {text[-TAIL:]}"


def os_message(error: OSError) -> str:
    """Which file, where the system says it, and what was wrong: ``a.csv: No such file or directory``."""
    return ": ".join(str(each) for each in (error.filename, error.strerror or error) if each)


def refuse_repeated(command: click.Command, context: click.Context, args: list[str]) -> None:
    """Raises ``click.UsageError`` where an option that takes one value is given more than once.

    click by itself takes the last one and says nothing.  Flags without an opposite say the same twice and may.
    """
    parser = command.make_parser(context)
    _, _, order = parser.parse_args(list(args))
    for parameter, times in Counter(order).items():
        if times > 1 and isinstance(parameter, click.Option) and _takes_one(parameter):
            name = max(parameter.opts, key=len)
            raise click.UsageError(f"{name} is given {times} times: allowed is one", context)


def _takes_one(option: click.Option) -> bool:
    return not option.multiple and not option.count and bool(not option.is_flag or option.secondary_opts)


def refuse_boundless(command: click.Command, context: click.Context) -> None:
    """Raises ``click.UsageError`` for a number that is not finite, or beyond what anything here is counted in.

    What an option takes of the others, its command says.
    """
    for parameter in command.params:
        given = context.params.get(parameter.name or "")
        for value in given if isinstance(given, tuple) else (given,):
            most = BITS_64 if parameter.name == "seed" else LARGEST
            if isinstance(value, float) and not isfinite(value):
                raise click.UsageError(f"{_name(parameter)} {value}: allowed are finite numbers", context)
            if isinstance(value, int | float) and abs(value) > most:
                text = f"{value}"
                text = text if len(text) <= 30 else f"{text[:20]}... ({len(text)} digits)"
                raise click.UsageError(f"{_name(parameter)} {text}: allowed are numbers up to {most:,}", context)


def _name(parameter: click.Parameter) -> str:
    return max(parameter.opts, key=len).lstrip("-")


class TextType(click.ParamType):  # type: ignore[type-arg]
    """A type of options that ``parse`` makes of text; what its ``ValueError`` says is what the user reads, under every
    click: older ones drop what a bare function says."""

    name = "text"

    def __init__(self, parse: Callable[[str], Any]) -> None:
        self.parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self.parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Command(click.Command):
    """A command whose options of one value are given once, and whose numbers are finite."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        refuse_repeated(self, ctx, args)
        rest = super().parse_args(ctx, args)
        refuse_boundless(self, ctx)
        return rest


class Group(click.Group):
    """A group of such commands and groups, its own options included."""

    command_class = Command
    group_class = type

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The commands with their whole summaries, over several lines where one does not hold them."""
        found = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [(name, each.get_short_help_str(LONGEST)) for name, each in found if each and not each.hidden]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        refuse_repeated(self, ctx, args)
        rest = super().parse_args(ctx, args)
        refuse_boundless(self, ctx)
        return rest
