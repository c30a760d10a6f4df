"""``kvsim calibrate``: measures this card and writes a profile for ``--profile``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvsim.commandline import Command

if TYPE_CHECKING:
    from kvsim.latency.profile import Profile


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
    parts = "".join(
        f"{name}: {part.weight_bandwidth / 1e9:,.0f} GB/s of weights, {part.layer_seconds * 1e6:,.1f} us a layer, "
        f"{part.step_seconds * 1e6:,.0f} us a step; its steps within {part.low - 1:+.0%} to {part.high - 1:+.0%}\n"
        for name, part in profile.parts.items()
    )
    parts += "".join(f"lacks {line}\n" for line in profile.missing())
    click.echo(
        f"{profile.device}\n"
        f"  reads   {profile.read_bandwidth / 1e9:10,.1f} GB/s\n"
        f"  copies  {profile.copy_bandwidth / 1e9:10,.1f} GB/s, both ways\n"
        f"  weights {profile.weight_bandwidth / 1e9:10,.1f} GB/s\n"
        f"  cache   {profile.bandwidth / 1e9:10,.1f} GB/s, {profile.fixed * 1e6:,.1f} us a launch\n"
        f"  products{profile.flops / 1e12:10,.2f} TFLOP/s\n"
        f"  a layer {profile.layer_seconds * 1e6:10,.1f} us besides\n\n"
        f"measured with {profile.runtime}'s own kernels: for --engine {' and '.join(engines_of(profile.runtime))}\n"
        f"{parts}wrote {out}\n\n{text.not_modelled('calibrate')}\n\n{of_data_sheet(profile)}"
    )


def of_data_sheet(profile: Profile) -> str:
    """One sentence: what the card was measured to do of what its data sheet states."""
    from kvsim.hardware import find_hardware

    try:
        card = find_hardware(profile.device)
    except LookupError:
        return f"{profile.device} is not in kvsim hardware: there is no data sheet to hold it against"
    shares = []
    for what, measured, stated, unit in (
        ("bandwidth", profile.read_bandwidth, card.bandwidth, (1e9, "GB/s")),
        ("arithmetic", profile.flops, card.fp16_flops, (1e12, "TFLOP/s")),
    ):
        if stated:
            size, name = unit
            shares.append(
                f"{measured / stated:.0%} of the {what} ({measured / size:,.0f} of {stated / size:,.0f} {name})"
            )
    return f"this card does {' and '.join(shares)} of its data sheet ({card.id})"
