"""What a command was given, made into what it works with: options checked, the results file, the model, the caches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvruntime.bench.harness.results import Results, Row, describe
from kvruntime.bench.harness.tasks import Interruption, Task, run
from kvruntime.bench.model.caches import Contender, ours
from kvruntime.bench.model.peers import WIDTHS, find_peers, package_version
from kvruntime.bench.model.tasks import check_methods, went_wrong
from kvruntime.checkpoints.load import LoadedModel, Source, config_of, load, resolve
from kvsim.engines.kvruntime import MOST
from kvsim.install import install_hint
from kvsim.layout import Method
from kvsim.regular_files import read_named
from kvsim.specs import parse_dtype

MOST_TEMPERATURE = 100.0
LEAST = {"window": 2, "chunk": 1, "quality_batch": 1, "prompt_tokens": 1, "decode_tokens": 1, "repeats": 1}
LEAST |= {
    "reference_chunk": 1,
    "prompt_length": 0,
    "warmup": 0,
    "max_tokens": 0,
    "max_new_tokens": 1,
    "batch": 1,
    "depths": 1,
    "tokens": 2,
    "speed_batch": 1,
    "ablation_tokens": 2,
    "examples": 1,
}
"""Counts that options give, and their least values."""


def say(line: str) -> None:
    """A line on stderr."""
    print(line, file=sys.stderr, flush=True)


def given_or(value: Any, default: Any) -> Any:
    """``value`` unless it is None."""
    return default if value is None else value


def check_given(given: dict[str, Any]) -> None:
    """Raises ``ValueError`` for options that are wrong whatever the machine or model; ``weights_dtype`` gets its long
    name."""
    if given["weights_dtype"] is not None:
        given["weights_dtype"] = parse_dtype(given["weights_dtype"])
    for name, low in LEAST.items():
        if isinstance(given.get(name), int) and not low <= given[name] <= MOST:
            raise ValueError(f"{name.replace('_', ' ')} {given[name]}: allowed are {low} to {MOST:,}")
    if "temperature" in given and not 0 <= given["temperature"] <= MOST_TEMPERATURE:
        raise ValueError(f"temperature {given['temperature']:g}: allowed are 0 (greedy) to {MOST_TEMPERATURE:g}")


MOST_PROMPT = 64 << 20
"""Bytes of a prompt."""


def prompt_given(prompt: str | None, file: Path | None) -> str:
    """The prompt: the argument, or the text of ``file`` (``-``: standard input) or of a pipe, less a last newline.

    Raises ``ValueError`` for none, for two, for an empty one and for bytes that are not UTF-8.
    """
    if prompt is not None and file is not None:
        raise ValueError(f"give a prompt or --prompt-file {file}, not both")
    if prompt is None:
        if file is None and (sys.stdin is None or sys.stdin.isatty()):
            raise ValueError("give a prompt, --prompt-file FILE, or a text on standard input")
        if file is None or str(file) == "-":
            content = sys.stdin.buffer.read(MOST_PROMPT + 1)
        else:
            content = read_named(file, "prompt file", MOST_PROMPT)
        if len(content) > MOST_PROMPT:
            raise ValueError(f"the prompt has more than {MOST_PROMPT:,} bytes")
        try:
            prompt = content.decode("utf-8").removesuffix("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"the prompt is not UTF-8 (byte {error.start})") from None
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    return prompt


def open_results(given: dict[str, Any], device: str, default: Path) -> Results:
    """The file that ``--out`` names, ``default`` without it."""
    header = describe(device, ["kvruntime", *sys.argv[1:]]) | {"seed": given["seed"]}
    return Results(given["out"] or default, header, resume=given["resume"], anew=given["anew"])


def resolve_given(given: dict[str, Any]) -> Source:
    """Where ``--model`` comes from."""
    return resolve(given["model_name"], seed=given["seed"], offline=given["offline"], say=say)


def load_given(
    source: Source,
    device: str,
    given: dict[str, Any],
    contenders: list[Contender],
    ranks: int = 1,
    check: Callable[[Any], None] | None = None,
) -> LoadedModel:
    """The model, or its part in one of ``ranks``, once all ``contenders`` were found to hold its layers.

    ``check`` raises ``ValueError`` where the model's transformers config does not go with an option: before its weights
    are read.
    """
    if check is not None:
        check(config_of(source))
    say(f"loading {source.name}, weights: {source.weights}")
    loaded = load(source, device, given["weights_dtype"], say, ranks)
    if contenders:
        check_methods(loaded, contenders)
    return loaded


def contenders_given(
    methods: list[Method], peers: bool, widths: Sequence[int] = WIDTHS[:1], names: Sequence[str] = ()
) -> tuple[list[Contender], list[Row]]:
    """The caches of ``methods``, with ``peers`` those of other libraries in ``widths`` bits, or of the libraries
    ``names`` alone, and rows that say which are not installed."""
    contenders = [ours(method) for method in methods]
    missing: list[dict[str, str]] = []
    if peers or names:
        there, missing = find_peers(widths, names)
        contenders += there
        for row in missing:
            say(f"{row['method']} is left out: {row['package']} is not installed: {install_hint('peers')}")
        for peer in there:
            say(f"{peer.name}: {peer.package} {package_version(peer.package)}")
    return contenders, list(missing)


def check_window(window: int, limit: int | None) -> None:
    """Raises ``ValueError`` for a window beyond the ``limit`` of positions that a model has, None where it has none."""
    if limit is not None and window > limit:
        raise ValueError(f"window {window} exceeds the model's {limit} positions")


def check_reads(loaded: LoadedModel) -> None:
    """Raises ``ValueError`` for a model without a tokenizer."""
    if loaded.tokenizer is None:
        raise ValueError(f"{loaded.source.name} {loaded.no_tokenizer}: text cannot be scored")


def text_given(
    methods: list[Method],
    device: str,
    given: dict[str, Any],
    default: Path,
    widths: Sequence[int] = WIDTHS[:1],
    windows: Sequence[int] = (),
) -> tuple[Results, list[Contender], LoadedModel]:
    """What a command needs that scores text alone: its results file, with rows that say which peers are missing, the
    caches, and the model.  Raises ``ValueError`` where :func:`check_reads` does, and for a window of ``windows`` that
    is longer than the model's positions."""

    def check(config: Any) -> None:
        for window in windows:
            check_window(window, getattr(config, "max_position_embeddings", None))

    results = open_results(given, device, default)
    contenders, missing = contenders_given(methods, given["peers"], widths, given.get("peer", ()))
    results.rows = [row for row in results.rows if row["kind"] != "missing"] + missing
    loaded = load_given(resolve_given(given), device, given, contenders, check=check if windows else None)
    check_reads(loaded)
    return results, contenders, loaded


def finish(
    tasks: list[Task],
    results: Results,
    tables: Callable[[Sequence[Row]], str],
    figures: Callable[[Row], str] | None = None,
) -> int:
    """Measures, says each row's ``figures`` as it ends, prints the tables.

    1 where a measurement of our own failed otherwise than for want of memory.
    """
    try:
        rows = run(tasks, results, figures=figures)
    except Interruption as stop:
        words = [word for word in sys.argv[1:] if word != "--resume"]
        again = " ".join(["kvruntime", *words, *([] if results.anew else ["--resume"])])
        say(f"interrupted: {stop.done} of {stop.total} measurements are in {results.path}; go on with: {again}")
        return 130
    rows += [row for row in results.rows if row["kind"] in ("missing", "skipped")]
    with results.shown():
        print(tables(rows))
    print(f"\nrecorded in {results.path}")
    return 1 if went_wrong(rows) else 0
