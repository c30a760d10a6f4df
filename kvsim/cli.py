"""The command line: one command a module of :mod:`kvsim.commands`, imported when it is called.

Everything prints a table for people, or with ``--json`` one object with ``schema``, ``inputs`` as understood and
``rows`` (docs/json.md).  A bad input is one line on stderr and exit code 2; what does not fit a card is exit code 1.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from kvsim import __version__
from kvsim.commandline import one_line, os_message
from kvsim.commands import LazyGroup


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command and exits: 0, 1 where nothing fits, or 2 after one line on stderr."""
    sys.exit(run(argv))


def run(argv: Sequence[str] | None = None) -> int:
    """Runs a command; its exit code."""
    try:
        code = cli.main(args=argv, prog_name="kvsim", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except (
        BrokenPipeError,
        SystemExit,
    ):  # the reader has gone (click exits with 1 there): no more to say, at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (KeyError, IndexError):
        raise  # a fault of ours, though also a LookupError
    except click.Abort:
        return 130
    except click.ClickException as error:
        message = error.format_message()
    except OSError as error:
        message = os_message(error)
    except OverflowError:
        message = "a number is too large: its bytes or seconds cannot be computed"
    except (ValueError, LookupError) as error:
        message = str(error)
    print(f"kvsim: error: {one_line(message)}", file=sys.stderr)
    return 2


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True)
@click.version_option(__version__, prog_name="kvsim")
@click.pass_context
def cli(context: click.Context) -> None:
    """What a key/value cache costs, before anything runs."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


if __name__ == "__main__":
    main()
