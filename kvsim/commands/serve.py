"""``kvsim serve``: the command line of :mod:`kvsim.output.serve`."""

from __future__ import annotations

import json
import socket
import sys
from functools import partial
from typing import Any

import click

from kvsim import catalog
from kvsim.commandline import Command
from kvsim.commands.model_choice import cards, model_option
from kvsim.install import install_hint
from kvsim.models.load import load_model
from kvsim.models.model import Model


@click.command("serve", cls=Command)
@partial(model_option, required=False)
@click.option("--gpu", help="Card to begin with.", shell_complete=cards)
@click.option("--port", type=click.IntRange(0, 65535), default=8765, show_default=True, help="Port; 0: any free one.")
@click.option("--json", "as_json", is_flag=True, help="Print the address as one JSON object.")
def command(model_name: str | None, gpu: str | None, port: int, as_json: bool) -> None:
    """The same as an interactive page on localhost.

    Only this machine can reach it.  Ctrl-C ends it.
    """
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise ValueError(f"serve needs starlette and uvicorn: {install_hint('serve')}") from None
    from kvsim.output.page.form import FormFields
    from kvsim.output.schema import envelope
    from kvsim.output.serve import app, serve
    from kvsim.specs import parse_card

    own: dict[str, Model] = {}
    given: dict[str, Any] = {}
    if model_name is not None:
        given["model"] = model_name
        if catalog.find("models", model_name) is None:
            own[model_name] = load_model(model_name)
    if gpu is not None:
        card, count = parse_card(gpu)
        given |= {"gpu": card.id, "cards": str(count or 1), "gpus": card.id}
    host = "127.0.0.1"
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(f"port {port}: {error.strerror}") from None
        port = probe.getsockname()[1]
    url = f"http://{host}:{port}/"
    if as_json:
        click.echo(json.dumps(envelope("serve", given, []) | {"rows": [{"url": url}]}))
    else:
        click.echo(f"kvsim serves on {url} (Ctrl-C ends it)")
    sys.stdout.flush()
    serve(app(FormFields(**given), own), host, port)
