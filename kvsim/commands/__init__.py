"""Commands that are imported only when called: one module each, so that `kvsim --help` stays as light as `estimate`."""

from __future__ import annotations

from importlib import import_module

import click

from kvsim.commandline import Command, Group
from kvsim.nearest import hint

LAZY: dict[str, str] = {
    "estimate": "Bytes of the cache: stored, read per step; what fits on a card; the time of a token.",
    "compare": "Methods down, contexts across; with --engines what each engine takes, and why.",
    "explain": "Where every byte comes from: the formulas, with the numbers and their config keys.",
    "plot": "Bytes and compression over context, as PNG or SVG.",
    "models": "The models that are known, with sources; with NAME all about one, or those whose names hold it.",
    "hardware": "The cards that are known, with sources; with NAME all about one.",
    "doctor": "An engine's boot log against prediction, line by line, with causes.",
    "calibrate": "Measures this card (needs the runtime): a profile that takes the place of stated constants.",
    "breakeven": "From which context and batch a method pays, in tokens a second and in money.",
    "goodput": "The rate of random arrivals that a server takes within these latencies, by simulation.",
    "offload": "A cache in the host's memory, on a drive or another host: loading it, against computing it again.",
    "plan": "How many cards, which method and batch for so many users within these latencies, and at what price.",
    "report": "One self-contained HTML file: plots, and the tables behind them.",
    "serve": "The same as an interactive page on localhost.",
    "sweep": "Grids over models, methods, contexts, batches and cards, as CSV, Parquet or JSON.",
}
"""Name -> one-line help.  ``kvsim.commands.<name>`` holds the command itself, as ``command``."""


class LazyGroup(Group):
    """A group that knows the commands of :data:`LAZY` by name and help, and imports one only to run it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *LAZY})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in LAZY:
            return super().get_command(ctx, cmd_name)
        command = import_module(f"kvsim.commands.{cmd_name}").command
        if not isinstance(command, Command):
            raise TypeError(f"kvsim.commands.{cmd_name}.command is no {Command.__module__}.Command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            meant = hint(args[0], LAZY, cutoff=0.5)
            ctx.fail(f"unknown command {args[0]!r}: {meant}allowed are {', '.join(self.list_commands(ctx))}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        names = self.list_commands(ctx)
        rows = []
        for name in names:
            here = None if name in LAZY else super().get_command(ctx, name)
            if here is None or not here.hidden:
                rows.append((name, LAZY[name] if here is None else here.get_short_help_str(200)))
        with formatter.section("Commands"):
            formatter.write_dl(rows)
