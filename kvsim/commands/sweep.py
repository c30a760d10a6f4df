"""``kvsim sweep``: the command line of :mod:`kvsim.analysis.sweep`."""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvsim import catalog
from kvsim.commandline import Command
from kvsim.commands.flags import show
from kvsim.commands.model_choice import cards
from kvsim.engines import ENGINES
from kvsim.hardware import find_hardware
from kvsim.install import install_hint
from kvsim.methods.defaults import DEFAULT_SPECS
from kvsim.models.load import load_model
from kvsim.specs import choose_methods, parse_reserve

if TYPE_CHECKING:
    from kvsim.analysis.sweep import Grid

REPORT_SECONDS = 2.0
MAX_WORKERS = 1024
CONNECT_SECONDS = 10
GOES_ON = "the same command goes on from the chunks that are there"


class Meter:
    """Progress on stderr: a line that overwrites itself on a terminal, a line now and then elsewhere."""

    def __init__(self, rows_per_chunk: float, quiet: bool) -> None:
        self.rows_per_chunk, self.quiet = rows_per_chunk, quiet
        self.start = self.last = time.monotonic()
        self.first: int | None = None

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first = done - 1
        if self.quiet or (now - self.last < (0.1 if sys.stderr.isatty() else REPORT_SECONDS) and done < total):
            return
        self.last = now
        rate = (done - self.first) * self.rows_per_chunk / max(1e-9, now - self.start)
        line = f"{done:,} of {total:,} chunks, {rate:,.0f} rows/s"
        print(f"\r{line}" if sys.stderr.isatty() else line, end="\n" if done == total else "", file=sys.stderr)
        if not sys.stderr.isatty() and done < total:
            print(file=sys.stderr)
        sys.stderr.flush()


@click.command("sweep", cls=Command)
@click.option("--model", "names", multiple=True, required=True, help="Model; repeatable; 'all': the whole catalogue.")
@click.option(
    "--method",
    "specs",
    multiple=True,
    help=f"Method, as in estimate; repeatable.  [default: fp16, {', '.join(DEFAULT_SPECS['estimate'])}]",
)
@click.option(
    "--ctx",
    default="1k:128k:*2",
    show_default=True,
    metavar="AXIS",
    help="Tokens: 1k,8k; 16:4k:16 (from:to:step); 1k:1M:*2 (a factor).",
)
@click.option("--batch", default="1", show_default=True, metavar="AXIS", help="Sequences, like --ctx.")
@click.option(
    "--gpu", "gpus", multiple=True, help="Card: what fits, and seconds a token; repeatable.", shell_complete=cards
)
@click.option("--engine", default="ideal", show_default=True, help=f"Whose bytes: {', '.join(ENGINES)}.")
@click.option("--weight-bits", type=float, help="Bits a weight.  [default: the config's dtype, else 16]")
@click.option("--reserve", help="Share of a card's memory held back.  [default: the engine's, else 10%]")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="File to write: .csv, .parquet or .json.")
@click.option("--workers", type=click.IntRange(1, MAX_WORKERS), default=1, show_default=True, help="Processes.")
@click.option("--scheduler", metavar="ADDRESS", help="A dask cluster instead of --workers, tcp://host:port.")
@click.option("--quiet", is_flag=True, help="No progress.")
@click.option("--json", "as_json", is_flag=True, help="Without --out the rows as one JSON object, else a summary.")
def command(
    names: tuple[str, ...],
    specs: tuple[str, ...],
    ctx: str,
    batch: str,
    gpus: tuple[str, ...],
    engine: str,
    weight_bits: float | None,
    reserve: str | None,
    out: Path | None,
    workers: int,
    scheduler: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Grids over models, methods, contexts, batches and cards, as CSV, Parquet or JSON.

    Bytes are those of `kvsim estimate`, to the byte.  An interrupted sweep goes on where it stopped when the same
    command is given again; the file appears only when it is whole.
    """
    try:
        import numpy  # noqa: F401
    except ImportError:
        raise ValueError(f"sweep needs numpy: {install_hint('plan')}") from None
    from kvsim.analysis.sweep import Grid
    from kvsim.output import sweep_file
    from kvsim.specs import parse_axis, parse_engine_choice

    if scheduler is not None and (workers > 1 or out is None):
        raise ValueError("--scheduler goes with --out FILE and without --workers")
    if out is None and not as_json:
        raise ValueError("give --out FILE (.csv, .parquet or .json), or --json for standard output")
    if out is not None:
        sweep_file.suffix(out)
    everything = [row["id"] for row in catalog.rows("models")] if "all" in names else list(names)
    methods, _ = choose_methods(specs, {}, None)
    chosen = parse_engine_choice(engine, {})
    grid = Grid(
        models=tuple(dict.fromkeys(load_model(name) for name in everything)),
        methods=tuple(methods),
        contexts=parse_axis(ctx, "ctx"),
        batches=parse_axis(batch, "batch"),
        cards=tuple(dict.fromkeys(find_hardware(name) for name in gpus)),
        weight_bits=weight_bits,
        reserve=parse_reserve(reserve) if reserve is not None else None,
        engine=chosen,
    )
    if not grid.cells:
        raise ValueError("; ".join(grid.left_out))
    inputs: dict[str, Any] = {
        "models": [model.name for model in grid.models],
        "methods": [method.name for method in grid.methods],
        "ctx": ctx,
        "batch": batch,
        "gpus": [card.id for card in grid.cards],
        "engine": engine,
        "weight_bits": weight_bits,
        "reserve": grid.reserve,
    }
    for note in grid.notes:
        print(f"note: {note}", file=sys.stderr)
    if out is None:
        sweep_file.stream(grid, inputs, sys.stdout.buffer)
        return
    _write(grid, inputs, out, workers, scheduler, quiet, as_json)


@contextmanager
def _cluster(address: str) -> Iterator[tuple[Executor, int]]:
    """A dask cluster's executor, and how many chunks it has under way at once.  Raises ``ValueError`` without one."""
    try:
        from distributed import Client
    except ImportError:
        raise ValueError(f"--scheduler needs dask's distributed: {install_hint('cluster')}") from None
    try:
        client: Any = Client(address, timeout=CONNECT_SECONDS)  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:
        raise ValueError(f"--scheduler {address}: no dask scheduler answers there ({type(error).__name__})") from None
    with client:
        yield client.get_executor(), max(1, sum(client.nthreads().values()))


@contextmanager
def _processes(workers: int) -> Iterator[tuple[Executor | None, int]]:
    """As many processes, or none besides this one."""
    if workers == 1:
        yield None, 1
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield pool, workers


def _write(
    grid: Grid, inputs: dict[str, Any], out: Path, workers: int, scheduler: str | None, quiet: bool, as_json: bool
) -> None:
    """Sweeps into a file, and says what was written."""
    from kvsim.output import sweep_file, text
    from kvsim.output.schema import envelope

    start = time.monotonic()
    pool = _processes(workers) if scheduler is None else _cluster(scheduler)
    meter = Meter(grid.num_rows / grid.num_chunks, quiet)
    try:
        with pool as (executor, number):
            there = sweep_file.write(grid, out, inputs, executor, meter, 4 * number)
    except KeyboardInterrupt:
        print(f"\nstopped: {GOES_ON}", file=sys.stderr)
        raise
    except BrokenExecutor:
        raise ValueError(f"a worker was killed (out of memory?): {GOES_ON}, and fewer --workers need less") from None
    except MemoryError:
        raise ValueError(f"out of memory: {GOES_ON}") from None
    seconds = time.monotonic() - start
    fresh = grid.num_rows * (grid.num_chunks - there) / grid.num_chunks
    if as_json:
        summary = {"path": str(out), "num_rows": grid.num_rows, "seconds": seconds, "chunks_resumed": there}
        rows = [
            {"model": cell.model.name, "method": cell.method.name, "gpu": cell.card.id if cell.card else None}
            for cell in grid.cells
        ]
        click.echo(json.dumps(envelope("sweep-summary", inputs, grid.notes) | summary | {"rows": rows}, indent=2))
        return
    resumed = f", {there} of {grid.num_chunks} chunks were there" if there else ""
    click.echo(f"wrote {out}: {grid.num_rows:,} rows, {fresh / seconds:,.0f} rows/s{resumed}")
    show(text.not_modelled_line("sweep"))
