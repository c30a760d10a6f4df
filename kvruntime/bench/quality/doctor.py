"""``kvruntime doctor``: which layers' keys stand out, and bits by layer: the fewest for a bound on the divergence, or
the least divergence for a mean of bits."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any

from kvruntime.bench.given import check_given, load_given, resolve_given, say
from kvruntime.bench.harness.progress import Progress
from kvruntime.bench.model.caches import ours
from kvruntime.bench.model.report import heading
from kvruntime.checkpoints.load import LoadedModel, pick_device
from kvruntime.eval.bits import packed_bits
from kvruntime.eval.sensitivity import LayerFinding, Proposal, Study, check_bits
from kvruntime.eval.text import load_text, token_windows
from kvruntime.hf.models import config_shapes
from kvsim.engines.kvruntime import check_runs
from kvsim.finite_json import json_text, not_finite
from kvsim.layout import Method
from kvsim.methods import Full
from kvsim.output.tables import plain
from kvsim.specs import method_spec

TOKENS = 512
ROWS = 1
MOST_SHOWN = 8
"""Layers in the table: those that stand out, and those whose attention suffers most."""


def doctor(methods: list[Method], **given: Any) -> int:
    """``kvruntime doctor``; its exit code."""
    import torch

    check_given(given)
    if not given["bound"] > 0:
        raise ValueError(f"bound {given['bound']:g}: allowed are numbers above 0, nats a token")
    if (bits := given["mean_bits"]) is not None:
        if not 0 < bits <= 16:
            raise ValueError(f"bits {bits:g}: allowed are numbers above 0, and no more than the 16 of a plain cache")
        methods = [method for method in methods if not isinstance(method, Full)] or methods  # no mix has both
    text = load_text(given["text_path"])
    device = pick_device(given["device"])
    start = perf_counter()
    source = resolve_given(given)

    def check(config: Any) -> None:
        if bits is not None and (shapes := config_shapes(source.name, config)):
            check_bits(bits, methods, shapes)

    loaded = load_given(source, device, given, [ours(method) for method in methods], check=check)
    tokens = min(given["tokens"] or TOKENS, loaded.max_positions or TOKENS)
    if loaded.tokenizer is None:
        say(f"{loaded.source.name} {loaded.no_tokenizer}: random tokens are looked at")
        generator = torch.Generator().manual_seed(given["seed"])
        ids = torch.randint(loaded.vocab_size, (ROWS, tokens), generator=generator)
    else:
        ids = token_windows(loaded.tokenizer, text, tokens, ROWS * tokens)
    study = Study(loaded.model, ids, tuple(methods))
    findings = study.layers()
    uniform = study.uniform()
    if bits is None:
        proposal = study.propose(findings, uniform, given["bound"])
    else:
        proposal = study.propose_within(alone(study), bits)
    seconds = perf_counter() - start
    whole = as_json(loaded, study, findings, uniform, proposal, given["bound"], bits)
    if (wrong := not_finite(whole)) is not None:
        raise ValueError(f"{wrong}: the weights, or what was computed with them, overflowed")
    if given["as_json"]:
        print(json_text(whole, indent=1))
    else:
        print(report(loaded, study, findings, uniform, proposal, given["bound"], bits, seconds))
    return 0


def alone(study: Study) -> list[tuple[float, ...]]:
    """Every layer alone under every method, with the time left: minutes on a CPU."""
    out = []
    with Progress([1.0] * len(study.shapes)) as progress:
        for layer in range(len(study.shapes)):
            progress.begin(f"layer {layer} alone")
            out.append(study.layer_alone(layer))
            progress.end()
    return out


def report(
    loaded: LoadedModel,
    study: Study,
    findings: Sequence[LayerFinding],
    uniform: Sequence[Proposal],
    proposal: Proposal | None,
    bound: float,
    bits: float | None,
    seconds: float,
) -> str:
    """Everything that was found, as text."""
    row = {"model": loaded.source.name, "weights": loaded.source.weights, "dtype": loaded.dtype}
    rows, tokens = study.ids.shape
    lines = [heading("doctor", row, f"{rows} x {tokens} tokens, {seconds:.0f} s")]
    named = [finding for finding in findings if finding.named]
    lines += [f"layer {finding.index}: {finding.named}" for finding in named]
    lines += ["" if named else "no layer's keys have large biases or outlying channels", layers_table(study, findings)]
    lines += ["", "every layer alike:", uniform_table(study, uniform, bound, bits)]
    lines += ["", proposal_text(proposal, uniform, bound, bits)]
    return "\n".join(lines)


def layers_table(study: Study, findings: Sequence[LayerFinding]) -> str:
    """The layers whose attention suffers most, and those that are named."""
    worst = sorted(findings, key=lambda finding: (not finding.named, -finding.errors[0]))[:MOST_SHOWN]
    head = ["layer", "key bias", "key outlier", *(f"error {method.name}" for method in study.methods)]
    body = []
    for finding in sorted(worst, key=lambda each: each.index):
        errors = [f"{100 * error:.3g} %" for error in finding.errors]
        body.append([f"{finding.index}", f"{finding.bias:.1f}x", f"{finding.outlier:.1f}x", *errors])
    note = f"{len(body)} of {len(findings)} layers; error: squared, of the attention output, as a share of its square"
    return f"{plain(head, body)}\n{note}"


def uniform_table(study: Study, uniform: Sequence[Proposal], bound: float, bits: float | None) -> str:
    body = []
    for one in uniform:
        fits = "within" if within(one, bound, bits) else "beyond"
        body.append([one.methods[0].name, f"{one.bits:.3f}", f"{one.kl:.5f}", fits])
    limit = f"the bound of {bound:g}" if bits is None else f"the mean of {bits:g} bits"
    return plain(["method", "bits", "KL, nats a token", limit], body)


def within(one: Proposal, bound: float, bits: float | None) -> bool:
    """Whether a choice is within the mean of ``bits``, or without one within the ``bound``."""
    return one.kl <= bound if bits is None else one.bits <= bits + 1e-9


def proposal_text(proposal: Proposal | None, uniform: Sequence[Proposal], bound: float, bits: float | None) -> str:
    """The bits by layer, and what they are not."""
    if proposal is None:
        return f"no choice among these methods is within {bound:g} nats a token: keep the cache uncompressed"
    lines = [f"proposed, {proposal.bits:.3f} bits an element in the mean, measured KL {proposal.kl:.5f} nats a token:"]
    for first, last, method in proposal.ranges:
        layers = f"layer {first}" if first == last else f"layers {first} to {last}"
        lines.append(f"  {layers}: {method.name} ({last - first + 1} of {len(proposal.methods)})")
    if len(set(proposal.methods)) > 1:
        lines.append(how_stored(proposal.method, uniform, bound, bits))
    lines.append("simulated: every token sees its past as decoding one token at a time stores it")
    return "\n".join(lines)


def how_stored(mix: Method, uniform: Sequence[Proposal], bound: float, bits: float | None) -> str:
    """How a choice by layer is asked for, or that it cannot be and which method for all layers comes next to it."""
    spec, why = stored_spec(mix)
    if spec is not None:
        return f"as a method: {spec}"
    fits = [one for one in uniform if within(one, bound, bits)]
    if bits is None:
        name, best = min(fits, key=lambda one: one.bits).methods[0].name, "the fewest bits"
    else:
        name, best = min(fits, key=lambda one: one.kl).methods[0].name, "the least divergence"
    return f"not stored so ({why}): take {name} for all layers, {best} of those within"


def stored_spec(method: Method) -> tuple[str | None, str]:
    """The spec of a method that caches store, else ``None`` and why there is none."""
    try:
        check_runs(method)
        return method_spec(method), ""
    except (LookupError, ValueError) as error:
        return None, str(error)


def as_json(
    loaded: LoadedModel,
    study: Study,
    findings: Sequence[LayerFinding],
    uniform: Sequence[Proposal],
    proposal: Proposal | None,
    bound: float,
    mean_bits: float | None,
) -> dict[str, Any]:
    """Everything that was found, as one object."""
    names = [method.name for method in study.methods]
    bits = [packed_bits(method, study.shapes) for method in study.methods]
    layers = [
        {"layer": f.index, "bias": f.bias, "outlier": f.outlier, "named": f.named, "errors": list(f.errors)}
        for f in findings
    ]
    chosen = None
    if proposal is not None:
        chosen = {"methods": [m.name for m in proposal.methods], "kl": proposal.kl, "bits": proposal.bits}
        chosen["spec"] = stored_spec(proposal.method)[0]
    return {
        "model": loaded.source.name, "weights": loaded.source.weights, "model_sha256": loaded.sha256,
        "dtype": loaded.dtype, "tokens": study.ids.numel(), "methods": names, "bits": bits, "layers": layers,
        "uniform_kl": [one.kl for one in uniform], "bound": bound, "mean_bits": mean_bits, "proposal": chosen,
    }  # fmt: skip
