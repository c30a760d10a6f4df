"""``python -m validation time``: refits the constants of kvsim's model of time and says what they are worth.

The measured rows are not part of this repository: three CSV files (:mod:`validation.latency.serving`,
:mod:`validation.latency.attention` say which columns), by default in a folder ``shared/measured`` beside the checkout.
Each is optional: what is not there is named, and not fitted or judged on.
What is recorded are the constants (``kvsim/catalog/timing.json``), the errors on rows held out, and the SHA-256 of
the files.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import kvsim.catalog
from kvsim.atomic import replace_file
from kvsim.finite_json import json_text
from kvsim.latency.attention_curve import Curve, Kernel
from kvsim.latency.constants import Constants, constants
from kvsim.output.tables import compact, plain
from validation.latency import attention as attention_time
from validation.latency import engine_steps, generated_steps, links, own, prompts, serving
from validation.latency.held_out import digest

MEASURED = Path(__file__).resolve().parents[3] / "shared" / "measured"
DECODE = (MEASURED / "single_gpu_decode.csv", MEASURED / "multi_gpu_serving.csv")
ATTENTION = MEASURED / "decode_attention_h100.csv"
RECORDED = Path(__file__).parents[1] / "results" / "time" / "errors.json"
CONSTANTS = Path(kvsim.catalog.__file__).with_name("timing.json")
SCHEMA = "validation.time/1"
FITTED_ON = "fitted on published rows of one card and of several, python -m validation time"
PUBLISHED = (
    ("peak roofline, published rows", 0.36),
    ("three global constants, published rows (not held out)", 0.193),
)
"""Mean errors that others found on a larger set of such rows, beside those found here on the same rows."""


def study(decode: Sequence[Path] = DECODE, attention: Path = ATTENTION) -> tuple[Constants, dict[str, Any]]:
    """All fits and errors of the files that are there: the attention curve first, which stays, then the loads, then
    this engine's steps.  Raises ``ValueError`` where no file of loads is there."""
    there = [path for path in decode if path.is_file()]
    if not there:
        raise ValueError(f"no measured loads: {', '.join(str(path) for path in decode)} are not there")
    fixed, found = constants(), {"schema": SCHEMA}
    more: dict[str, Any] = {}
    if attention.is_file():
        more["attention"] = curves = attention_time.study(attention)
        kernels = {name: Kernel(**entry) for name, entry in curves.pop("kernels").items()}
        fixed = replace(fixed, kernels=kernels, curve=Curve(**curves.pop("curve")))
        there.append(attention)
    fixed, more["loads"] = serving.study([path for path in there if path != attention], fixed)
    fixed = shortened(fixed)
    fixed, more["steps"] = steps_study(fixed)
    return fixed, found | more | {"sha256": {path.name: digest(path) for path in there}}


def own_study() -> tuple[Constants, dict[str, Any]]:
    """This project's kernels and steps alone, fitted to what is recorded here; everything else as it was recorded."""
    found, fixed = recorded(), constants()
    rows = own.recorded_attention()
    fixed = shortened(own.kernels(rows, fixed))
    attention = found["attention"]["recorded"] | own.judged(rows, fixed)
    apart = {"carried": own.carried(rows, fixed), "left_out": own.left_out(rows, fixed)}
    found["attention"] = found["attention"] | {"recorded": attention} | apart
    fixed, found["steps"] = steps_study(fixed)
    return fixed, found


def steps_study(fixed: Constants) -> tuple[Constants, dict[str, Any]]:
    """The recorded steps of this project's engine, and of stock ``generate()`` in all of its ways, and prompts."""
    fixed, engine = engine_steps.study(fixed)
    fixed, generated = generated_steps.study(fixed)
    fixed, read = prompts.study(fixed)
    fixed, split = links.study(fixed)
    return fixed, engine | generated | read | split


def tried(decode: Sequence[Path], attention: Path | None) -> dict[str, Any]:
    """The errors of kvsim's constants as they are on files that they need not have been fitted on."""
    fixed, found = constants(), {"schema": SCHEMA}
    more: dict[str, Any] = {}
    for path in decode:
        more.setdefault("loads", {})[path.name] = serving.tried(path, fixed)
    if attention is not None:
        more["attention"] = attention_time.tried(attention, dict(fixed.kernels), fixed.curve)
    return found | more


def absent(decode: Sequence[Path], attention: Path) -> list[str]:
    """What is not there, one line each."""
    missing = [path for path in (*decode, attention) if not path.is_file()]
    return [f"{path} is not there: nothing is fitted or judged on it" for path in missing]


def shortened(fixed: Constants) -> Constants:
    """The fitted constants as ``timing.json`` writes them: what is fitted after them is fitted on these."""

    def short(entry: Any) -> Any:
        return replace(
            entry, **{name: _short(value) for name, value in asdict(entry).items() if isinstance(value, float)}
        )

    constants: dict[str, Any] = {}
    for name in fitted_names():
        value = getattr(fixed, name)
        constants[name] = (
            {key: _short(each) for key, each in value.items()} if isinstance(value, dict) else _short(value)
        )
    kernels = {name: short(kernel) for name, kernel in fixed.kernels.items()}
    return replace(fixed, curve=short(fixed.curve), kernels=kernels, **constants)


def fitted_names() -> tuple[str, ...]:
    """The constants that are fitted on loads."""
    return tuple(dict.fromkeys(name.partition("/")[0] for name in (*serving.FITTED, *serving.FITTED_FIRST)))


def table_of(fixed: Constants) -> dict[str, Any]:
    """``timing.json`` with the fitted constants in it; stated ones and sources stay."""
    table: dict[str, Any] = json.loads(CONSTANTS.read_text(encoding="utf-8"))
    for name in fitted_names():
        table["constants"][name] = {"value": getattr(fixed, name), "source": FITTED_ON}
    for name in BY_ENGINE:
        value = dict(getattr(fixed, name))
        if value or name in table["constants"]:  # nothing may be recorded of it yet
            table["constants"][name]["value"] = value  # its source is said where it is entered
    for name in ("decode_band", "parallel_band", "prefill_band"):
        source = f"what {serving.NUM_CONSTANTS} constants left over on groups held out, python -m validation time"
        table["constants"][name] = {"value": list(getattr(fixed, name)), "source": source}
    table["curve"] = {"value": asdict(fixed.curve), "source": attention_time.FITTED_ON}
    table["kernels"] = {name: asdict(kernel) for name, kernel in fixed.kernels.items()}
    return table


BY_ENGINE = (
    *("engine_layer_seconds", "engine_step_seconds", "engine_table_share", "engine_wide", "overlapped"),
    *("engine_prompt_seconds", "engine_prompt_passes", "engine_prompt_norms", "engine_link", "engine_layer_shares"),
    *("engine_state_passes", "engine_masked_efficiency", "engine_order_seconds"),
)
"""The constants by engine that are fitted on this project's own records."""


def record(fixed: Constants, found: dict[str, Any]) -> list[Path]:
    """Writes constants and errors, each file in one step."""
    table = table_of(fixed)
    found = found | {"constants": {name: entry["value"] for name, entry in table["constants"].items()}}
    lines = ",\n".join(
        f"{json.dumps(part)}: " + (_rows(table[part]) if part in ("constants", "kernels") else json_text(table[part]))
        for part in ("units", "constants", "curve", "kernels")
    )
    errors = json_text(found, indent=1)
    RECORDED.parent.mkdir(exist_ok=True)
    replace_file(CONSTANTS, f"{{{lines}}}\n")
    replace_file(RECORDED, errors + "\n")
    return [CONSTANTS, RECORDED]


def recorded() -> dict[str, Any]:
    """The recorded errors."""
    found: dict[str, Any] = json.loads(RECORDED.read_text(encoding="utf-8"))
    return found


def token_table(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and body: time per output token of one card by group, held out, and what others reach."""
    loads = found["loads"]
    body = _judged(loads["token"], loads["baselines"])
    body += [[name, "329", f"{mean:.1%}", "", "", ""] for name, mean in PUBLISHED]
    return ["time per output token, one card", "rows", "mean", "median", "bias", "worst"], body


def parallel_table(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and body: the same of several cards."""
    loads = found["loads"]
    body = _judged(loads["parallel"], loads["parallel_baselines"])
    return ["time per output token, 2 to 8 cards", "rows", "mean", "median", "bias", "worst"], body


def totals_table(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and body: time per output token over all groups, held out, beside what others reach."""
    loads = found["loads"]
    body = []
    for part, others, cards in (("token", "baselines", "1"), ("parallel", "parallel_baselines", "2 to 8")):
        body.append([cards, *_line("groups held out", loads[part]["held_out"])])
        body += [[cards, *_line(name, each)] for name, each in loads[others].items()]
    return ["cards", "time per output token", "rows", "mean", "median", "bias", "worst"], body


def _judged(part: dict[str, Any], baselines: dict[str, Any]) -> list[list[str]]:
    body = [_line(name, each) for name, each in part["by_group"].items()]
    body += [_line("all, held out", part["held_out"]), _line("all, in sample", part["in_sample"])]
    return body + [_line(name, each) for name, each in baselines.items()]


def first_table(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and body: time to the first token by group, held out."""
    first = found["loads"]["first"]
    body = [_line(name, each) for name, each in first["by_group"].items()]
    return ["time to the first token", "rows", "mean", "median", "bias", "worst"], [
        *body,
        _line("all, held out", first["held_out"]),
    ]


def attention_table(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and body: decode attention by what is held out, and by kernel with batch sizes held out."""
    curves = found["attention"]
    body = [_line(f"held out: {name}", each) for name, each in curves["held_out"].items()]
    body += [_line(f"{name}, batch held out", each) for name, each in curves["by_kernel"].items()]
    body += [_line(f"{name}, in sample", each) for name, each in curves["recorded"].items()]
    body += [_line(f"{name}, each row by its others", each) for name, each in curves.get("left_out", {}).items()]
    for cards, kernels in curves.get("carried", {}).items():
        body += [_line(f"{name}, {cards}", each) for name, each in kernels.items()]
    body += [_line("in sample", curves["in_sample"]), _line("bytes over peak bandwidth", curves["peak"])]
    return [f"decode attention, {curves['card']}", "rows", "mean", "median", "bias", "worst"], body


def step_table(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and body: whole steps that were recorded, in sample and from one card to another."""
    body = [_line(name, each) for name, each in found["steps"].items()]
    return ["recorded steps, in sample and carried", "rows", "mean", "median", "bias", "worst"], body


def bands(found: dict[str, Any]) -> str:
    """One sentence a band."""
    lines = []
    for name, cards in (("token", "one card"), ("parallel", "several cards")):
        if name in found["loads"]:
            part = found["loads"][name]
            lines.append(
                f"Band of the time per output token, {cards}: {part['band'][0]} to {part['band'][1]} times the "
                f"prediction; {part['in_band']:.1%} of the held-out rows lie in it, "
                f"{part['in_band_of_other_groups']:.1%} in the band that the other groups' residuals give."
            )
    first = found["loads"]["first"]
    low, high = first["band"]
    return " ".join([*lines, f"Time to the first token: {low} to {high} times, {first['in_band']:.1%}."])


def text(found: dict[str, Any]) -> str:
    """The tables for a terminal."""
    return "\n\n".join([*(plain(*table) for table in every_table(found)), bands(found)])


def every_table(found: dict[str, Any]) -> tuple[tuple[list[str], list[list[str]]], ...]:
    tables = [token_table(found)] if "token" in found["loads"] else []
    tables += [parallel_table(found)] if "parallel" in found["loads"] else []
    tables += [first_table(found)] + ([attention_table(found)] if "attention" in found else [])
    return (*tables, step_table(found))


def markdown(found: dict[str, Any], short: bool = False) -> str:
    """The tables for a document; ``short``: per output token over all groups only."""
    tables = (totals_table(found),) if short else every_table(found)
    return "\n\n".join([*(compact(*table, left=(0, 1) if short else (0,)) for table in tables), bands(found)])


def constants_table() -> str:
    """The constants of ``timing.json`` in Markdown, with their sources."""
    table = json.loads(CONSTANTS.read_text(encoding="utf-8"))
    fitted = [[f"`{name}`", json.dumps(entry["value"]), entry["source"]] for name, entry in table["constants"].items()]
    for name, value in table["curve"]["value"].items():
        fitted.append([f"curve `{name}`", f"{value}", table["curve"]["source"]])
    kernels = []
    for name, entry in table["kernels"].items():
        numbers = [f"{entry['fixed'] * 1e6:.2f}", f"{entry['item'] * 1e6:.2f}", f"{entry['efficiency']:.3f}"]
        kernels.append([f"`{name}`", *numbers, f"{entry['low']} to {entry['high']}", entry["source"]])
    heads = ["kernel", "fixed, µs", "item, µs", "efficiency", "band", "source"]
    return "\n\n".join(
        [compact(["constant", "value", "source"], fitted, left=(0, 1, 2)), compact(heads, kernels, left=(0, 4, 5))]
    )


def fails(found: dict[str, Any]) -> list[str]:
    """What of the errors is above its bar, one line each."""
    loads, bars = found["loads"], []
    judged = (
        ("token", "one card", serving.MEAN_BAR, serving.MEDIAN_BAR),
        ("parallel", "several cards", serving.PARALLEL_MEAN_BAR, serving.PARALLEL_MEDIAN_BAR),
    )
    for part, cards, mean, median in judged:
        if part in loads:
            held_out = loads[part]["held_out"]
            bars.append((f"time per output token, {cards}, mean", held_out["mean"], mean))
            bars.append((f"time per output token, {cards}, median", held_out["median"], median))
            outside = round(1 - loads[part]["in_band_of_other_groups"], 4)
            bars.append((f"outside the band of the other groups, {cards}", outside, 1 - serving.BAND_BAR))
    bars.append(("rows not covered", round(1 - loads["covered"], 4), 0.0))
    if "attention" in found:
        attention = found["attention"]["held_out"]
        bars += [(f"attention, {name} held out", attention[name]["mean"], attention_time.BAR) for name in JUDGED_FOLDS]
    return [f"{name}: {value:.1%}, at most {bar:.1%}" for name, value, bar in bars if value > bar + 1e-9]


JUDGED_FOLDS = ("batch", "context", "kernel and octave of bytes")
"""The kinds of folds that the bar is for; a shape or an engine never seen is reported beside them."""


def _line(name: str, each: dict[str, Any]) -> list[str]:
    shown = [f"{each[key]:.1%}" for key in ("mean", "median")]
    return [name, str(each["num_rows"]), *shown, f"{each['bias']:+.1%}", f"{each['worst']:.0%}"]


def _short(value: float) -> float:
    """Five significant digits."""
    return float(f"{value:.5g}")


def _rows(entries: dict[str, Any]) -> str:
    """One entry a line."""
    return "{\n" + ",\n".join(f"{json.dumps(name)}: {json_text(entry)}" for name, entry in entries.items()) + "\n}"
