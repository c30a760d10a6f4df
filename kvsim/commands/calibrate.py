"""``kvsim calibrate``: measures this card and writes a profile for ``--profile``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from kvsim.commandline import Command


@click.command("calibrate", cls=Command)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("profile.json"), show_default=True, help="Profile to write."
)
@click.option("--device", help="cpu, cuda, cuda:1.  [default: cuda where there is one]")
@click.option("--seconds", type=float, default=45.0, show_default=True, help="About how long to measure.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(out: Path, device: str | None, seconds: float, as_json: bool) -> None:
    """Measures this card (needs the runtime): bandwidths, products, attention, what a layer costs."""
    from dataclasses import asdict

    from kvsim.latency.calibrate import calibrate
    from kvsim.latency.profile import engines_of
    from kvsim.output import text
    from kvsim.output.schema import envelope

    profile = calibrate(out, device, seconds, say=lambda line: click.echo(line, err=True))
    if as_json:
        answer = envelope("calibrate", {"device": device, "seconds": seconds}, [])
        click.echo(json.dumps(answer | {"path": str(out), "rows": [asdict(profile)]}, indent=2))
        return
    click.echo(
        f"{profile.device}\n"
        f"  reads   {profile.read_bandwidth / 1e9:10,.1f} GB/s\n"
        f"  copies  {profile.copy_bandwidth / 1e9:10,.1f} GB/s, both ways\n"
        f"  weights {profile.weight_bandwidth / 1e9:10,.1f} GB/s\n"
        f"  cache   {profile.bandwidth / 1e9:10,.1f} GB/s, {profile.fixed * 1e6:,.1f} us a launch\n"
        f"  products{profile.flops / 1e12:10,.2f} TFLOP/s\n"
        f"  a layer {profile.layer_seconds * 1e6:10,.1f} us besides\n\n"
        f"measured with {profile.runtime}'s own kernels: for --engine {' and '.join(engines_of(profile.runtime))}\n"
        f"wrote {out}\n\n{text.not_modelled('calibrate')}"
    )
