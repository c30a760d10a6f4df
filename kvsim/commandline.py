"""What every command line here keeps to: an option that takes one value is given once, and an error is one line."""

from __future__ import annotations

from collections import Counter

import click

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


class Command(click.Command):
    """A command whose options that take one value are given once."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        refuse_repeated(self, ctx, args)
        return super().parse_args(ctx, args)


class Group(click.Group):
    """A group of such commands and groups, its own options included."""

    command_class = Command
    group_class = type

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        refuse_repeated(self, ctx, args)
        return super().parse_args(ctx, args)
