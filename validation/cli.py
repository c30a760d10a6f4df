"""The command line: ``python -m validation run | memory | speed | quality | reliability | report | time`` and more.

A bad input is one line on stderr and exit code 2; a cache that does not weigh what was predicted is exit code 1.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from kvsim.commandline import Group, one_line, os_message
from kvsim.finite_json import json_text
from kvsim.install import missing_hint
from kvsim.methods.defaults import EXAMPLE
from kvsim.specs import parse_size, parse_sizes

MOST = (1 << 31) - 1
"""The largest count that an option takes."""
DAY = 24 * 60
"""Minutes that a run may be given."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command and exits."""
    sys.exit(run(argv))


def run(argv: Sequence[str] | None = None) -> int:
    """Runs a command; its exit code."""
    try:
        code = cli.main(args=argv, prog_name="validation", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, click.Abort):
        print("validation: interrupted; what was measured is recorded, --resume goes on", file=sys.stderr)
        return 130
    except (KeyError, IndexError):
        raise  # a fault of ours, though also a LookupError
    except click.ClickException as error:
        message = error.format_message()
    except OSError as error:
        message = os_message(error)
    except (ValueError, LookupError) as error:
        message = str(error)
    except ImportError as error:
        if (error.name or "").partition(".")[0] in ("validation", "kvruntime", "kvsim"):
            raise
        message = f"{error}{missing_hint(error.name, 'validation')}"
    print(f"validation: error: {one_line(message)}", file=sys.stderr)
    return 2


def recording(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every command that measures."""
    for option in reversed(
        (
            click.option("--device", help="cpu, cuda, cuda:1.  [default: cuda where there is one]"),
            click.option("--record", is_flag=True, help="Write validation/results/<device>.json, merged by row."),
            click.option("--out", type=click.Path(path_type=Path), help="Write this file instead, merged by row."),
            click.option("--resume", is_flag=True, help="Leave out what the file holds already."),
            click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON."),
        )
    ):
        command = option(command)
    return command


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True)
@click.pass_context
def cli(context: click.Context) -> None:
    """What kvsim predicts beside what this machine says."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@cli.command()
@click.option("--model", "models", multiple=True, help="A catalogue name or a config.json. Repeatable.")
@click.option("--jobs", type=click.IntRange(1, MOST), help="Processes.  [default: 1 on CPU, most cores on CUDA]")
@click.option("--quick", is_flag=True, help="A small grid, some seconds.")
@recording
def memory(models: tuple[str, ...], jobs: int | None, quick: bool, **given: Any) -> int:
    """Bytes and peaks: predicted against allocated, at boundary lengths and after every step."""
    from validation.claims.predict import load_row_model

    for name in models:
        load_row_model(name)
    device = _device(given["device"])
    from validation.claims.workers import default_jobs, memory_tasks, run_tasks

    tasks = memory_tasks(device, quick, models)
    jobs = jobs or default_jobs(device.partition(":")[0])
    return _run(tasks, device, given, lambda todo: run_tasks(todo, jobs, device, quick, models))


@cli.command()
@click.option("--model", default="gpt2", show_default=True, help="A catalogue name, a directory, something pulled.")
@click.option("--batch", help="Batch sizes.  [default: 1,4 on CPU, 1,8,64 on CUDA]")
@click.option("--prompt-tokens", type=click.IntRange(1, MOST), help="[default: 128 on CPU, 512 on CUDA]")
@click.option("--decode-tokens", type=click.IntRange(1, MOST), help="[default: 16 on CPU, 128 on CUDA]")
@click.option("--repeats", type=click.IntRange(1, MOST), default=3, show_default=True)
@recording
def speed(
    model: str, batch: str | None, prompt_tokens: int | None, decode_tokens: int | None, repeats: int, **given: Any
) -> int:
    """Prefill and decode speed of each method, recorded."""
    device = _device(given["device"])
    cpu = device == "cpu"
    from kvruntime.checkpoints.load import resolve
    from validation.claims.speed import speed_tasks
    from validation.claims.subjects import claims

    resolve(model, offline=True, say=_say)  # refuses an unknown name before anything else
    settings = {
        "prompt_tokens": prompt_tokens or (128 if cpu else 512),
        "decode_tokens": decode_tokens or (16 if cpu else 128),
        "warmup": 1,
        "repeats": repeats,
    }
    batches = parse_sizes(batch or ("1,4" if cpu else "1,8,64"), "batch")
    return _run(speed_tasks(model, claims().judged, batches, device, settings, _say), device, given)


@cli.command()
@click.option(
    "--model", default="smollm2-135m", show_default=True, help="A directory with weights, or something pulled."
)
@click.option("--text", "text_path", help="A UTF-8 text file.  [default: Python's language reference]")
@click.option("--window", type=click.IntRange(2, MOST), default=1024, show_default=True, help="Tokens scored together.")
@click.option("--max-tokens", type=click.IntRange(0, MOST), help="0: all.  [default: 4096 on CPU, 32768 on CUDA]")
@click.option("--chunk", type=click.IntRange(1, MOST), help="Tokens a step.  [default: 16 on CPU, 1 on CUDA]")
@click.option("--batch", type=click.IntRange(1, MOST), default=4, show_default=True, help="Windows side by side.")
@click.option("--offline", is_flag=True, help="Never download.")
@recording
def quality(
    model: str,
    text_path: str | None,
    window: int,
    max_tokens: int | None,
    chunk: int | None,
    batch: int,
    offline: bool,
    **given: Any,
) -> int:
    """Perplexity of a real model through each cache, recorded."""
    from kvruntime.eval.text import load_text

    text = load_text(text_path)
    device = _device(given["device"])
    cpu = device == "cpu"
    from kvruntime.checkpoints.load import resolve
    from validation.claims.quality import quality_tasks
    from validation.claims.subjects import claims

    source = resolve(model, offline=offline, say=_say)
    if not source.real:
        raise ValueError(
            f"model {model} has {source.weights} weights here: quality needs real ones, such as smollm2-135m"
        )
    settings = {"window": window, "chunk": chunk or (16 if cpu else 1), "batch": batch}
    settings["max_tokens"] = (4096 if cpu else 32768) if max_tokens is None else max_tokens
    return _run(quality_tasks(source, text, claims().judged, device, settings), device, given)


@cli.command("run")
@click.option("--device", help="cpu, cuda, cuda:1.  [default: cuda where there is one]")
@click.option("--part", "names", multiple=True, help="One of them alone. Repeatable.")
@click.option("--minutes", type=click.FloatRange(0, DAY), default=15.0, show_default=True, help="At the most.")
@click.option("--record", is_flag=True, help="Write under validation/results, beside this project's cards.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out: leave out the parts that ended well.")
@click.option("--out", "folder", type=click.Path(path_type=Path), default=Path("validation-run"), show_default=True)
def run_(device: str | None, names: tuple[str, ...], minutes: float, record: bool, resume: bool, folder: Path) -> int:
    """Measures this card in under a quarter of an hour, part by part, and writes its report."""
    from kvsim.commands.calibrate import of_data_sheet
    from kvsim.latency.profile import load_profile
    from validation.recorded import FOLDER, circumstances, slug
    from validation.report import breakeven, pages
    from validation.report.claims import failures
    from validation.report.points import collect
    from validation.report.records import memory_rows, reliability_rows
    from validation.run import parts
    from validation.run.done import Done
    from validation.run.progress import RunProgress

    device = _device(device)
    wanted, left = parts.chosen(device, names)
    facts = circumstances(device, "")
    card = facts["device_name"] if device != "cpu" else "cpu"
    results = FOLDER if record else folder / "results"
    if resume and not (folder / "run.json").exists():
        raise ValueError(f"no run in {folder} (run.json): leave --resume out, or give the --out of the run")
    done = Done(folder / "run.json", facts | {"results": "recorded" if record else "beside"}, resume or bool(names))
    if not resume:
        done.forget(wanted)
    anew = [part.name for part in wanted if done.of(part, parts.file_of(part, results, slug(card))) is None]
    done.forget([part for part in parts.PARTS if part.extends in anew])
    todo = [part for part in wanted if part.name in anew or part.extends in anew]
    if not (resume or record or names):  # what an earlier run left is none of this one's
        for part in todo:
            parts.file_of(part, results, slug(card)).unlink(missing_ok=True)
    rounds = parts.rounds(wanted)
    costs = [max((part.seconds for part in each if part in todo), default=0.0) for each in rounds]
    before = f", {len(wanted) - len(todo)} done before" if len(todo) < len(wanted) else ""
    together = f" in {len(rounds)} rounds, some at once" if len(rounds) < len(wanted) else ""
    _say(f"{card}: {len(wanted)} parts{together}{before}, about {sum(costs) / 60:.0f} minutes, {minutes:g} at the most")
    if done.other:
        _say(f"the run in {folder} is of another {done.other}: every part runs anew")
    for line in left:
        _say(f"not here: {line}")
    outcomes, stopped = [], False
    progress = RunProgress(costs, most=60 * minutes)
    with progress:
        steps = parts.carry_out(
            wanted, results, slug(card), device, progress.passed_on, minutes, done.of if resume else None
        )
        try:
            for each in rounds:
                progress.begin(" and ".join(part.name for part in each))
                found = next(steps)
                progress.end()
                done.put(found)
                for outcome in found:
                    progress.say(outcome.line)
                outcomes += found
        except KeyboardInterrupt:
            progress.say(f"interrupted: here is the report of what there is; --resume --out {folder} goes on")
            stopped = True
    there = [parts.file_of(part, results, slug(card)) for part in wanted]
    files = [path for path in dict.fromkeys(there) if path.exists()]
    measured, profiles = ([path for path in files if (path.parent.name == "profiles") == it] for it in (False, True))
    points = collect(measured, profiles)
    for path in pages.write(folder, points, memory_rows(measured), reliability_rows(measured), title=card):
        if path.suffix in (".html", ".md"):
            click.echo(f"wrote {path}")
    for path in profiles:
        click.echo(of_data_sheet(load_profile(path)))
    click.echo(pages.summary(pages.verdicts(points.points)))
    if even := breakeven.breakevens(points.points):
        click.echo(breakeven.sentence(even))
    if stopped:
        return 130
    wrong = failures(points.points) or breakeven.beyond(even)
    return 1 if wrong or any(outcome.code for outcome in outcomes) else 0


@cli.command()
@click.option("--device", help="cpu, cuda, cuda:1.  [default: cuda where there is one]")
@click.option("--run", "names", multiple=True, help="One of them alone. Repeatable.")
@click.option("--quick", is_flag=True, help="Small, as in CI.  [default: on a CPU]")
@click.option("--layout", "layouts", multiple=True, help="These layouts alone, by name. Repeatable.")
@click.option("--model", "models", multiple=True, help="Of memory by phase, these models alone. Repeatable.")
@click.option("--record", is_flag=True, help="Write validation/results/reliability/<device>.json, merged by row.")
@click.option("--out", type=click.Path(path_type=Path), help="Write this file instead, merged by row.")
def reliability(
    device: str | None,
    names: tuple[str, ...],
    quick: bool,
    layouts: tuple[str, ...],
    models: tuple[str, ...],
    record: bool,
    out: Path | None,
) -> int:
    """Takes the cache to its limits: long, out of memory, killed, in company, beside NaN, in any order of calls."""
    from validation.reliability import record as runs

    unknown = [name for name in names if name not in runs.RUNS]
    if unknown:
        raise LookupError(f"unknown run {unknown[0]!r}: allowed are {', '.join(runs.RUNS)}")
    device = _device(device)
    path = out or (runs.default_path(device) if record else None)
    failed = 0
    for row in runs.rows(
        names or tuple(runs.RUNS),
        device,
        quick or device == "cpu",
        _say,
        " ".join(["python -m validation", *sys.argv[1:]]),
        layouts,
        models,
    ):
        failed += not row["holds"]
        click.echo(f"{'holds' if row['holds'] else 'FAILS'}  {row['run']}: {row['found']} ({row['seconds']:.1f} s)")
        if path:
            runs.keep(path, [row])
    return 1 if failed else 0


@cli.command()
@click.option("--out", "folder", type=click.Path(path_type=Path), default=Path("validation-report"), show_default=True)
@click.option("--check", is_flag=True, help="Write nothing: the verdicts alone.")
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
def report(folder: Path, check: bool, files: tuple[Path, ...]) -> int:
    """A verdict a claim over FILES, or all of validation/results, in one HTML file and Markdown; 1 where one fails."""
    from kvsim.output.tables import plain
    from validation.claims import quality_bars, serving
    from validation.report import breakeven, pages
    from validation.report.claims import failures, verdicts
    from validation.report.points import collect
    from validation.report.records import memory_rows, reliability_rows

    try:
        found = collect(files or None)
        judged = verdicts(found.points)
        quality = ([], []) if files else (quality_bars.bars(), quality_bars.besides())
        if not check:
            weighed, ran = memory_rows(files or None), reliability_rows(files or None)
            for path in pages.write(folder, found, weighed, ran, quality=quality):
                if path.suffix in (".html", ".md"):
                    click.echo(f"wrote {path}")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"a row cannot be reported: {type(error).__name__}: {error}") from error
    head, body = pages.verdict_table(judged)
    click.echo(plain([head[0], *head[2:]], [[line[0], *line[2:]] for line in body if line[2] != "0"]))
    click.echo(pages.summary(judged))
    if runs := reliability_rows(files or None):
        click.echo(pages.kept(runs))
    if served := serving.rows_of(files):
        click.echo(serving.kept(served))
    if even := breakeven.breakevens(found.points):
        click.echo(breakeven.sentence(even))
    if any(quality):
        click.echo(quality_bars.kept(*quality))
    wrong = failures(found.points), serving.broken(served), breakeven.beyond(even), quality_bars.broken(*quality)
    return 1 if any(wrong) else 0


@cli.command("serving")
@click.option("--about", default="{}", help="JSON: what the logs do not say of device_name, versions, commit, command.")
@click.option("--run", "run_", required=True, help="A name for what ran on one card, one engine after another.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The record, merged by row.")
@click.argument("logs", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
def serving_(about: str, run_: str, out: Path, logs: tuple[Path, ...]) -> int:
    """Takes LOGS of validation/experiments/vllm-decode.py into a record of serving."""
    from kvruntime.bench.harness.store import Store, rows_as_lines
    from validation.claims.serving import KEY, SCHEMA, read_log

    try:
        known = {"run": run_, **json.loads(about)}
    except (ValueError, TypeError):
        raise ValueError(f"--about {about!r:.60}: allowed is a JSON object") from None
    store = Store(out, SCHEMA, "kind")
    for log in logs:
        rows = read_log(log, known)
        store.put(rows, lambda one, other: all(one.get(name) == other.get(name) for name in KEY))
        _say(f"{log.name}: {len(rows)} rows")
    store.write(rows_as_lines(SCHEMA, store.rows))
    return 0


@cli.command("time")
@click.option(
    "--decode",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Published loads, CSV; repeatable.  [default: shared/measured]",
)
@click.option("--attention", type=click.Path(path_type=Path), help="Measured attention, CSV.  [default: likewise]")
@click.option("--record", "recording_", is_flag=True, help="Write the constants and the errors into the checkout.")
@click.option("--own", is_flag=True, help="This project's kernels and steps alone, from the records: seconds.")
@click.option("--try", "tried", is_flag=True, help="No refit: kvsim's constants as they are on the files given.")
@click.option("--json", "as_json", is_flag=True, help="Print the errors as JSON.")
def time_(
    decode: tuple[Path, ...], attention: Path | None, recording_: bool, own: bool, tried: bool, as_json: bool
) -> int:
    """The model of time: refits it, holds groups out, prints the errors; 1 where one is above its bar."""
    from validation.latency import study

    if tried:
        if recording_ or not (decode or attention):
            raise ValueError("--try takes --decode or --attention or both, and records nothing")
        print(json_text(study.tried(decode, attention), indent=1))
        return 0
    files = decode or study.DECODE, attention or study.ATTENTION
    absent = [] if own else study.absent(*files)
    for line in absent:
        _say(line)
    if absent and recording_:
        raise ValueError("--record takes all three files: what is not there would be lost")
    fixed, found = study.own_study() if own else study.study(*files)
    print(json_text(found, indent=1) if as_json else study.text(found))
    if recording_:
        for path in study.record(fixed, found):
            _say(f"recorded in {path}")
    wrong = study.fails(found)
    for line in wrong:
        _say(line)
    return 1 if wrong else 0


@cli.command("all-reduce")
@click.option("--size", "sizes", multiple=True, help="Bytes: 2k, 64M. Repeatable.  [default: 2 KiB to 64 MiB]")
@click.option("--record", is_flag=True, help="Write validation/results/ranks/<device>.json, merged by row.")
@click.option("--out", type=click.Path(path_type=Path), help="Write this file instead, merged by row.")
def all_reduce_(sizes: tuple[str, ...], record: bool, out: Path | None) -> int:
    """Seconds of an all-reduce by size, under torchrun: a process a device, of any number."""
    from validation.ranks.runs import all_reduces

    return all_reduces([parse_size(size, "size") for size in sizes], record, out)


@cli.command("tensor-parallel")
@click.option("--model", default="llama-3-70b", show_default=True, help="A catalogue name or a config.json.")
@click.option("--layers", type=click.IntRange(1, MOST), help="Of its layers so many.  [default: all]")
@click.option("--size", default="8x32k", show_default=True, help="BATCHxTOKENS.")
@click.option("--dtype", default="bf16", show_default=True, help="Of weights and exact tokens: fp16, bf16 or fp32.")
@click.option("--method", "specs", multiple=True, help=f"{EXAMPLE}; the exact cache always takes part.")
@click.option("--way", "ways", multiple=True, help="model, engine, silent. Repeatable.  [default: all]")
@click.option("--record", is_flag=True, help="Write validation/results/ranks/<device>.json, merged by row.")
@click.option("--out", type=click.Path(path_type=Path), help="Write this file instead, merged by row.")
def tensor_parallel_(record: bool, out: Path | None, **given: Any) -> int:
    """Decode steps of a shape split over ranks, under torchrun: equal tokens, bytes a rank, seconds a step."""
    from validation.ranks.runs import tensor_parallel

    return tensor_parallel(given, record, out)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _device(asked: str | None) -> str:
    from kvruntime.checkpoints.load import pick_device

    return pick_device(asked)


def _one_by_one(tasks: list[Any]) -> Any:
    from validation.claims.tasks import judged

    for task in tasks:
        yield task, judged(task)


def _run(
    tasks: list[Any], device: str, given: dict[str, Any], measure: Callable[[list[Any]], Any] = _one_by_one
) -> int:
    """Measures what the file does not hold yet, writes after every task, prints; 1 where a cache weighs otherwise."""
    from kvruntime.bench.harness.progress import Progress
    from kvsim.output.tables import plain
    from validation.claims import compare
    from validation.documents import tables
    from validation.recorded import FOLDER, Results, circumstances, slug

    facts = circumstances(device, " ".join(["python -m validation", *sys.argv[1:]]))
    recorded = FOLDER / f"{slug(facts['device_name']) if device != 'cpu' else 'cpu'}.json"
    results = Results(given["out"] or (recorded if given["record"] else None), facts)
    todo = [task for task in tasks if not (given["resume"] and results.holds(task.name, task.about))]
    names = {task.name for task in tasks}
    with Progress([task.cost for task in todo]) as progress:
        for task, rows in measure(todo):
            progress.begin(task.name)
            results.add(rows)
            progress.end()
    rows = [row for row in results.rows if row["task"] in names]
    if given["as_json"]:
        print(json_text({"schema": "validation/1", "rows": rows}, indent=1))
    else:
        made = (
            tables.claims_table(rows),
            tables.peak_table(rows),
            tables.speed_table(rows),
            tables.quality_table(rows),
        )
        print("\n\n".join(plain(*table) for table in made if table[1]))
    if results.path:
        _say(f"recorded in {results.path}")
    wrong = compare.stale(rows)
    for line in wrong:
        _say(line)
    return 1 if wrong else 0
