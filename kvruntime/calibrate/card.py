"""Measures a card for kvsim's model of time and writes a profile: the card's own figures, and a part for each runtime.

The figures are of PyTorch's kernels (:mod:`kvruntime.calibrate.pytorch`).  The parts are fitted to whole steps
(:mod:`kvruntime.calibrate.steps`), so that nothing is charged to a runtime that it does not run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from kvruntime.bench.harness.results import describe
from kvruntime.bench.harness.store import check_writable
from kvruntime.bench.kernels.attention import Shape as Attention
from kvruntime.bench.kernels.precompile import Case, compile_ahead
from kvruntime.calibrate import fit
from kvruntime.calibrate.pytorch import Clock, figures, scale_of
from kvruntime.calibrate.steps import CPU, CUDA, ENGINE, NEW, STOCK, Plan, Step, steps
from kvsim.atomic import replace_file
from kvsim.finite_json import json_text, read_json
from kvsim.latency.calibrate import DAY
from kvsim.latency.profile import PARTS, SCHEMA, Part, described, load_profile, with_part
from kvsim.methods import method_named
from kvsim.models.model import Model

CUT = "the calibration was cut"
RUNTIME = "pytorch"
"""Whose kernels the card's own figures are of."""


def calibrate(
    out: Path,
    device: str | None = None,
    seconds: float = 45.0,
    say: Callable[[str], None] = lambda line: None,
    plan: Plan | None = None,
    only: Sequence[str] = (),
    without: Sequence[str] = (),
) -> dict[str, Any]:
    """Measures, writes the profile to ``out`` in one step and gives it back.

    ``seconds`` is shared out between the card's own figures (each is repeated at least three times however short it
    is); the steps of the runtimes take about as long again.  ``plan``: which steps, by default the device's own.
    ``only``: the parts that are measured anew of a profile that is there, whose other figures stay: a host's day
    changes what it takes part in.  ``without``: parts that are not measured.  Raises ``ValueError`` for a device that
    is not there or not the profile's, too little memory, no part left, or a path that cannot be written, and
    ``LookupError`` for a part that there is not.
    """
    from kvruntime.checkpoints.load import pick_device

    if not 0 < seconds <= DAY:
        raise ValueError(f"seconds {seconds:g}: allowed are above 0 to {DAY:,}")
    check_writable(out)
    place = torch.device(pick_device(device))
    cuda = place.type == "cuda"
    plan = plan or (CUDA if cuda else CPU)
    started = time.perf_counter()
    scale = scale_of(place)
    torch.manual_seed(0)
    clock = Clock(place, seconds / (5 + len(scale.shapes)) * 0.8)
    command = ["kvruntime" if without else "kvsim", "calibrate", "--device", str(place), "--seconds", f"{seconds:g}"]
    command += [*(word for name in without for word in ("--without", name)), "--out", str(out)]
    profile: dict[str, Any] = {
        "schema": SCHEMA,
        "runtime": RUNTIME,
        "created": now(),
        **describe(str(place), command),
    }
    profile["device"] = profile["device"] | {"num_sms": multiprocessors(place)}
    wanted, kept = chosen(only, without), earlier(out, profile["device"]["name"]) if only else {}
    with ExitStack() as stack:  # streams and events are the current device's
        stack.enter_context(torch.cuda.device(place) if cuda else nullcontext())
        beside = out
        if not only:
            profile |= figures(clock, place, scale, say)
            if out.exists():  # which stays until this one is whole
                beside = Path(stack.enter_context(TemporaryDirectory())) / out.name
            write(beside, profile)  # what the parts are fitted beside

        def keep(so_far: dict[str, list[Step]]) -> None:
            if beside == out and not only:  # no profile was there: of one that is cut, what is known by then
                own, _ = fitted(out, so_far, lambda line: None, profile["code"])
                write(out, profile | {"parts": own, "lacks": dict.fromkeys(set(PARTS) - set(own), CUT)})

        measured, lacks = measure(plan, place, say, wanted, keep)
        parts, failed = fitted(beside, measured, say, profile["code"])
    if only:
        stay = {name: part for name, part in kept["parts"].items() if name not in wanted}
        for part in stay.values():
            part.setdefault("code", kept["code"])
            part.setdefault("created", kept["created"])
        failed = {name: why for name, why in kept["lacks"].items() if name not in wanted} | {
            name: why for name, why in failed.items() if name in wanted
        }
        parts, profile = stay | parts, kept
    left = dict.fromkeys(without, "it was left out")
    lacks = {name: why for name, why in (failed | lacks | left).items() if name not in parts}
    profile |= {"parts": {name: parts[name] for name in PARTS if name in parts}, "lacks": lacks}
    profile |= {"seconds": round(time.perf_counter() - started, 2)}
    write(out, profile)
    return profile


def chosen(only: Sequence[str], without: Sequence[str] = ()) -> tuple[str, ...]:
    """The parts that are measured: all, or these, and with transformers' own at new lengths those at seen ones, whose
    calls are the same; none of ``without``.  Raises ``LookupError`` for what is no part, ``ValueError`` where none is
    left."""
    for name in (*only, *without):
        if name not in PARTS:
            raise LookupError(f"unknown part {name!r}: allowed are {', '.join(PARTS)}")
    more = {STOCK, NEW} if {STOCK, NEW} & set(only) else set()
    found = tuple(name for name in PARTS if (not only or name in more or name in only) and name not in without)
    if not found:
        raise ValueError(f"no part is left to measure: {', '.join(without)} left out")
    return found


def earlier(path: Path, device: str) -> dict[str, Any]:
    """The profile at ``path``.  Raises ``ValueError`` where it is another device's, or none."""
    if load_profile(path).device != device:
        raise ValueError(f"profile {path} is of {load_profile(path).device}, this is {device}")
    found: dict[str, Any] = {"parts": {}, "lacks": {}} | read_json(path, "profile")
    return found


def refit(path: Path, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Fits the parts of a profile again to the steps that it holds, as this version does; nothing is measured.

    Raises ``ValueError`` for a file that is no profile, and for steps of a shape that this version does not measure.
    """
    profile = read_json(path, "profile")
    load_profile(path)  # refuses what is none
    known = {name: (plan, subject) for plan in (CPU, CUDA) for name, subject in plan.subjects.items()}
    known |= {
        name: (CPU, subject) for name, subject in CPU.subjects.items() if profile["device"].get("num_sms") is None
    }
    measured: dict[str, list[Step]] = {}
    for runtime, part in profile.get("parts", {}).items():
        for row in part.get("rows", ()):
            if row["shape"] not in known:
                raise ValueError(f"profile {path}: shape {row['shape']!r}, allowed are {', '.join(known)}")
            plan, subject = known[row["shape"]]
            model, method = Model.from_config(subject.shape.config(plan.positions)), method_named(row["method"])
            size = row["batch_size"], row["num_tokens"], row["value"], row["low"], row["high"]
            measured.setdefault(runtime, []).append(Step(runtime, row["shape"], model, method, *size))
    before = profile.get("parts", {})
    parts, failed = fitted(path, measured, say, profile.get("code") or "")
    for name, part in parts.items():  # what measured it, and when
        part |= {key: before[name][key] for key in ("code", "created", "same_run") if key in before.get(name, {})}
    profile |= {"parts": parts, "lacks": {**profile.get("lacks", {}), **failed}}
    profile["lacks"] = {name: why for name, why in profile["lacks"].items() if name not in parts}
    write(path, profile)
    return profile


def measure(
    plan: Plan,
    place: torch.device,
    say: Callable[[str], None],
    wanted: Collection[str] = PARTS,
    keep: Callable[[dict[str, list[Step]]], None] = lambda found: None,
) -> tuple[dict[str, list[Step]], dict[str, str]]:
    """The steps of every runtime, and why one has none or fewer; ``keep`` is given those of the shapes so far where
    another shape begins."""
    if place.type == "cuda" and ENGINE in wanted:
        compile_ahead(cases(plan), str(place), say)
    found: dict[str, list[Step]] = {}
    lacks: dict[str, str] = {}
    shape = ""
    for step in steps(plan, place, say, wanted):
        if isinstance(step, Step):
            if shape not in ("", step.shape):
                keep(found)
            shape = step.shape
            found.setdefault(step.runtime, []).append(step)
            size = f"{step.batch_size} x {step.num_tokens:,}"
            say(f"{step.runtime}, {step.shape} {step.method.name} {size}: {step.seconds * 1e3:.3f} ms")
        else:
            lacks.setdefault(*step)
            say("{}: not measured: {}".format(*step))
    return found, lacks


def fitted(
    path: Path, measured: dict[str, list[Step]], say: Callable[[str], None], code: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """The parts as the profile has them, of what ``code`` measured, each fitted beside the profile of the card at
    ``path``, and why one was not fitted."""
    card = load_profile(path)
    hardware = card.hardware
    base = replace(card.constants(), engines=None)  # each runtime is fitted beside the others, those kept too
    start = fit.first_guess(card.read_bandwidth)
    own = Part(card.weight_bandwidth, card.layer_seconds)
    parts: dict[str, Any] = {}
    lacks: dict[str, str] = {}
    for name in PARTS:
        rows = measured.get(name, [])
        try:
            part = fit.fit(name, rows, base, hardware, start if name == ENGINE else fit.guess_of(name, own))
        except ValueError as error:
            lacks[name] = str(error)
            continue
        base = with_part(base, name, part, hardware)
        taken = fit.predicted(name, part, rows, base, hardware)
        steps_of = [{**row.row, "predicted": each} for row, each in zip(rows, taken.tolist(), strict=True)]
        parts[name] = described(part) | {"rows": steps_of, "code": code, "created": now()}
        say(f"{name}: {len(rows)} steps, predicted within {part.low - 1:+.1%} to {part.high - 1:+.1%}")
    return parts, lacks


def cases(plan: Plan) -> list[Case]:
    """What is compiled beforehand: the kernels of every layout at every shape."""
    out = []
    for name, subject in plan.subjects.items():
        shape = subject.shape
        heads = (shape.q_heads, shape.kv_heads, shape.hidden // shape.q_heads)
        for batch_size in {min(batch, 2) for batch, _ in subject.packed}:
            out += [Case(Attention(name, *heads, batch_size, 1024), method, steps=True) for method in plan.packed]
    return out


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def multiprocessors(place: torch.device) -> int | None:
    """Of a CUDA device."""
    if place.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(place).multi_processor_count)


def write(path: Path, profile: dict[str, Any]) -> None:
    """Replaces the file in one step.  Raises ``ValueError`` where it cannot be written or a figure is not finite."""
    replace_file(path, json_text(profile, indent=1) + "\n")
