"""Recorded prompts: how often a layer's activations pass through memory, and what the host takes to launch a layer.

Of stock ``generate()`` it is fitted, too, at what rate attention multiplies all pairs beside a mask, which layers with
a window have and left-padded batches; and what a layer takes more that orders its key channels by the prompt, on
prompts of one run with such a cache and with another of this project's, in which the day's host cancels.

A prompt is products, attention, and all that a layer does to its activations one element after the other, which the
memory's bandwidth bounds: ``engine_prompt_passes`` times a token's hidden state.  Short ones wait for the host, which
launches a layer's kernels in ``engine_prompt_seconds``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from kvsim.finite_json import read_json
from kvsim.hardware import Hardware, find_hardware
from kvsim.latency.constants import Constants
from kvsim.latency.roofline import Serving
from kvsim.latency.steps import prefill
from kvsim.layout import Method
from kvsim.methods import method_named
from kvsim.models.load import load_model
from kvsim.models.model import Model
from validation.latency.held_out import errors
from validation.latency.ways import ENGINE, GENERATE, SEEN, prompt_way, served

RESULTS = Path(__file__).parents[1] / "results"
KINDS = ("engine", "generate", "again", "compiled")
"""The folders of results that hold prompts."""
HOSTS = {
    ENGINE: (ENGINE,),
    GENERATE: (GENERATE, "kvruntime:compiled"),
    SEEN: (SEEN, "transformers:new", "transformers:static"),
}
"""Whose forward runs a prompt, and the runtimes whose prompts are the same."""
START = {"passes": 180.0, "norm": 0.2, "masked": 0.3, ENGINE: 4.7e-4, GENERATE: 1.3e-3, SEEN: 1e-3}
MASKS = (GENERATE, SEEN)
"""Whose prompts attend by a mask where a window is shorter."""


@dataclass(frozen=True)
class Prompt:
    """``seconds`` to the first token of ``batch_size`` prompts of ``num_tokens``."""

    runtime: str
    card: Hardware
    model: Model
    method: Method
    batch_size: int
    num_tokens: int
    seconds: float
    run: str = ""
    """The hash of the code that was timed."""

    def parts(self, fixed: Constants) -> dict[str, float]:
        """kvsim's seconds by part."""
        load = (self.model, self.card, self.batch_size, self.num_tokens)
        serving = Serving(engine=served(self.runtime), profile=fixed)
        return prefill(*load, serving, method=self.method).parts


def load(folder: Path = RESULTS) -> list[Prompt]:
    """Every recorded prompt of the engine and of stock ``generate()``, but those of models with constant states, whose
    mixers run in PyTorch's operators.  Left-padded batches of stock caches are among them: their mask is that of a
    window, one token short of the prompt, in every layer."""
    out = []
    for path in (path for kind in KINDS for path in sorted((folder / kind).glob("*.json"))):
        file = read_json(path, "record")
        card = find_hardware(file["device"]["name"])
        for row in file["rows"]:
            padded = row.get("call") == "padded" and row["package"] == "transformers"
            runtime, seconds = prompt_way(row | {"call": "greedy"} if padded else row)
            if runtime and not (model := load_model(row["model"])).state_layers:
                if padded:
                    windows = (replace(layer, window=row["num_tokens"] - 1) for layer in model.cache_layers)
                    model = replace(model, layers=tuple(windows))
                method = method_named(row["method"] if row["package"] == "kvruntime" else "bf16")
                size = row["batch_size"], row["num_tokens"]
                out.append(Prompt(runtime, card, model, method, *size, seconds[0], row.get("code") or ""))
    return out


def fit(prompts: Sequence[Prompt], fixed: Constants) -> Constants:
    """The constants by least squares of the logarithms of the errors."""
    fixed = fit_ordering(prompts, fixed)
    first = np.array(list(START.values()))

    def at(point: np.ndarray, digits: int = 15) -> Constants:
        values = (float(f"{value:.{digits}g}") for value in first * np.exp(point))
        return with_prompts(fixed, dict(zip(START, values, strict=True)))

    def residuals(point: np.ndarray) -> np.ndarray:
        found = at(point)
        return np.log([sum(each.parts(found).values()) / each.seconds for each in prompts])

    found = least_squares(residuals, np.zeros(len(first)), loss="soft_l1", f_scale=0.1, diff_step=1e-3)
    return at(found.x, 4)


def in_turns(prompts: Sequence[Prompt]) -> list[tuple[Prompt, Prompt]]:
    """Prompts whose key channels were ordered, each with one of the same run, model and size whose were not."""
    own = [each for each in prompts if each.runtime == GENERATE and each.run]
    ordered = [bool(getattr(each.method, "boost_nbits", 0)) for each in own]

    def about(each: Prompt) -> tuple[Any, ...]:
        return each.run, each.card.id, each.model.name, each.batch_size, each.num_tokens

    plain = {about(each): each for each, has in zip(own, ordered, strict=True) if not has}
    found = [each for each, has in zip(own, ordered, strict=True) if has and about(each) in plain]
    return [(each, plain[about(each)]) for each in found]


def fit_ordering(prompts: Sequence[Prompt], fixed: Constants) -> Constants:
    """``engine_order_seconds`` by least squares of the logarithms of what ordered prompts take and what the plain ones
    :func:`in_turns` would with it; as it is where there are none."""
    pairs, start = in_turns(prompts), 6e-4
    if not pairs:
        return fixed
    alone = replace(fixed, engine_order_seconds=dict.fromkeys(HOSTS[GENERATE], 1.0))
    layers = np.array([each.parts(alone)["kv"] for each, _ in pairs])
    ordered, plain = (np.array([each.seconds for each in own]) for own in zip(*pairs, strict=True))

    def residuals(point: np.ndarray) -> np.ndarray:
        return np.log((plain + start * np.exp(point[0]) * layers) / ordered)

    found = least_squares(residuals, np.zeros(1), loss="soft_l1", f_scale=0.1, diff_step=1e-3)
    seconds = float(f"{start * np.exp(found.x[0]):.4g}")
    return replace(fixed, engine_order_seconds=dict.fromkeys(HOSTS[GENERATE], seconds))


def with_prompts(fixed: Constants, found: dict[str, float]) -> Constants:
    """``fixed`` with the numbers of prompts."""
    seconds = {runtime: found[host] for host, runtimes in HOSTS.items() for runtime in runtimes}
    masked = {runtime: found["masked"] for host in MASKS for runtime in HOSTS[host]}
    return replace(
        fixed,
        engine_prompt_seconds={**fixed.engine_prompt_seconds, **seconds},
        engine_prompt_passes={**fixed.engine_prompt_passes, **dict.fromkeys(seconds, found["passes"])},
        engine_prompt_norms={**fixed.engine_prompt_norms, **dict.fromkeys(seconds, found["norm"])},
        engine_masked_efficiency={**fixed.engine_masked_efficiency, **masked},
    )


def study(fixed: Constants, folder: Path = RESULTS) -> tuple[Constants, dict[str, Any]]:
    """The fit, and its errors where the card bounds a prompt and where the host does."""
    prompts = load(folder)
    fitted = fit(prompts, fixed)
    found = {}
    for name, host in (("prompts bound by the card", False), ("prompts bound by the host", True)):
        own = [
            (sum(parts.values()), each.seconds)
            for each in prompts
            if bool((parts := each.parts(fitted))["overhead"]) == host
        ]
        if own:
            found[name] = errors(*np.array(own).T)
    return fitted, found
