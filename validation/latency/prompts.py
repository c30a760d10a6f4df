"""Recorded prompts: how often a layer's activations pass through memory, and what the host takes to launch a layer.

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
from kvsim.models.load import load_model
from kvsim.models.model import Model
from validation.latency.held_out import errors
from validation.latency.ways import ENGINE, GENERATE, SEEN, prompt_way

RESULTS = Path(__file__).parents[1] / "results"
KINDS = ("engine", "generate", "again", "compiled")
"""The folders of results that hold prompts."""
HOSTS = {
    ENGINE: (ENGINE,),
    GENERATE: (GENERATE, "kvruntime:compiled"),
    SEEN: (SEEN, "transformers:new", "transformers:static"),
}
"""Whose forward runs a prompt, and the runtimes whose prompts are the same."""
START = {"passes": 180.0, "norm": 0.2, ENGINE: 4.7e-4, GENERATE: 1.9e-3, SEEN: 1e-3}


@dataclass(frozen=True)
class Prompt:
    """``seconds`` to the first token of ``batch_size`` prompts of ``num_tokens``."""

    runtime: str
    card: Hardware
    model: Model
    batch_size: int
    num_tokens: int
    seconds: float

    def parts(self, fixed: Constants) -> dict[str, float]:
        """kvsim's seconds by part."""
        load = (self.model, self.card, self.batch_size, self.num_tokens)
        return prefill(*load, Serving(engine=self.runtime, profile=fixed)).parts


def load(folder: Path = RESULTS) -> list[Prompt]:
    """Every recorded prompt of the engine and of stock ``generate()``, but those of models with constant states, whose
    mixers run in PyTorch's operators."""
    out = []
    for path in (path for kind in KINDS for path in sorted((folder / kind).glob("*.json"))):
        file = read_json(path, "record")
        card = find_hardware(file["device"]["name"])
        for row in file["rows"]:
            runtime, seconds = prompt_way(row)
            if runtime and not (model := load_model(row["model"])).state_layers:
                out.append(Prompt(runtime, card, model, row["batch_size"], row["num_tokens"], seconds[0]))
    return out


def fit(prompts: Sequence[Prompt], fixed: Constants) -> Constants:
    """The constants by least squares of the logarithms of the errors."""
    first = np.array(list(START.values()))

    def at(point: np.ndarray, digits: int = 15) -> Constants:
        values = (float(f"{value:.{digits}g}") for value in first * np.exp(point))
        return with_prompts(fixed, dict(zip(START, values, strict=True)))

    def residuals(point: np.ndarray) -> np.ndarray:
        found = at(point)
        return np.log([sum(each.parts(found).values()) / each.seconds for each in prompts])

    found = least_squares(residuals, np.zeros(len(first)), loss="soft_l1", f_scale=0.1, diff_step=1e-3)
    return at(found.x, 4)


def with_prompts(fixed: Constants, found: dict[str, float]) -> Constants:
    """``fixed`` with the numbers of prompts."""
    seconds = {runtime: found[host] for host, runtimes in HOSTS.items() for runtime in runtimes}
    return replace(
        fixed,
        engine_prompt_seconds={**fixed.engine_prompt_seconds, **seconds},
        engine_prompt_passes={**fixed.engine_prompt_passes, **dict.fromkeys(seconds, found["passes"])},
        engine_prompt_norms={**fixed.engine_prompt_norms, **dict.fromkeys(seconds, found["norm"])},
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
