"""Memory by phase: the allocator's current and peak bytes of every phase of a model's life, against the prediction.

Loading, a prompt whole and in chunks, decoding (on a GPU by a CUDA graph), reuse, beams and growth; each a figure that
:mod:`validation.claims.phases` predicts from its fields alone.
"""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from kvruntime import make_cache
from kvruntime.checkpoints.load import Source, load
from kvruntime.hf.cache import argument
from kvsim.layout import Method
from kvsim.models.load import load_config, load_model
from kvsim.models.model import Model
from validation.claims.peak import splits
from validation.claims.phases import GROW, WITHIN, Figure, own, predicted
from validation.claims.subjects import describe_method, rebuild_method
from validation.claims.transients import predicts
from validation.reliability import subjects
from validation.reliability.findings import Broken, Findings
from validation.reliability.subjects import Scale
from validation.scales.allocator import Allocator

BAR = {"cuda": WITHIN, "cpu": 0.06}
"""Largest relative error of a phase's current or peak bytes; on a CPU the model is so small that a peak is mostly what
PyTorch's operators make inside themselves, and its current bytes are held to a thousandth."""
EXACT = 0.001
MODELS = {"llama-3.2-1b": 2048, "gpt2-large": 512, "qwen3-0.6b": 2048}
"""Models that are weighed on a GPU, and the tokens of their prompts."""
PROMPT, NEW = {"cuda": 0, "cpu": 96}, {"cuda": 24, "cpu": 6}
TINY = "tiny"
"""What the model that is made for a run on a CPU is called in the record."""
CHUNKS = 4
BEAMS = [0, 0, 1]
"""The row that each of three goes on from."""


def phases(device: torch.device, scale: Scale) -> Findings:
    """Current and peak bytes of the allocator while a model is loaded, a prompt is read whole and in chunks, tokens
    are decoded (on a GPU by a CUDA graph), the cache is used again, reorders beams, and grows; each within :func:`bar`
    (a hundredth on a GPU) of weights, buffers, the transients of the claims, and what a graph holds."""
    figures: list[Figure] = []
    said = []
    with tempfile.TemporaryDirectory() as folder:
        names = {_tiny(Path(folder), scale): PROMPT["cpu"]}
        if device.type == "cuda":
            names = chosen(device, scale)
        for name, prompt in names.items():
            with ModelPhases(name, prompt, device) as weighing:
                weighing.load()
                for method in subjects.layouts(device, scale):
                    if predicts(method, device.type):
                        weighing.run(method)
                    else:
                        said.append(f"{called(name)} {method.name}: no peak is predicted")
                figures += weighing.figures
                said += weighing.said
    wrong = [figure for figure in figures if abs(figure["error"]) > bar(figure)]
    if wrong:
        told = ", ".join(told_of(figure) for figure in wrong)
        raise Broken(f"{len(wrong)} of {len(figures)} figures: {told}", measured(figures))
    return Findings("; ".join(said), measured(figures))


def chosen(device: torch.device, scale: Scale) -> dict[str, int]:
    """The catalogue's models that a run weighs on ``device``, and the tokens of their prompts."""
    if device.type != "cuda":
        return {}
    wanted = scale.models or tuple(MODELS)[: scale.weighed]
    return {name: prompt for name, prompt in MODELS.items() if name in wanted}


def measured(figures: Sequence[Figure]) -> list[Figure]:
    """Without what was predicted: that is made anew from the other fields.  A model of this run has no file to name."""
    kept = [{name: value for name, value in each.items() if name not in ("predicted", "error")} for each in figures]
    return [each | {"model": called(each["model"])} for each in kept]


def told_of(figure: Figure) -> str:
    """Whose figure it is, what was measured, and how far that is off."""
    of = " ".join(filter(None, (called(figure["model"]), figure.get("method", {}).get("name"))))
    return f"{of} {figure['phase']} {figure['what']} {figure['measured']:,} B, {figure['error']:+.2%}"


def called(model: str) -> str:
    """A model's name, dots and all; the tiny one's is the path of its configuration."""
    return TINY if "/" in model else model


def bar(figure: Figure) -> float:
    """The largest error that a figure may have."""
    return EXACT if figure["device"] == "cpu" and figure["what"] == "now" else BAR[figure["device"]]


class ModelPhases:
    """One model on a device, and the figures that were taken of it."""

    def __init__(self, name: str, prompt: int, device: torch.device) -> None:
        self.name, self.prompt, self.device = name, prompt, device
        self.cuda, self.counter = device.type == "cuda", "requested" if device.type == "cuda" else "live"
        self.new = NEW[device.type]
        self.dtype = str(subjects.dtype_of(device)).removeprefix("torch.")
        self.shape: Model = load_model(name)
        self.figures: list[Figure] = []
        self.said: list[str] = []
        self.model: Any = None
        self.workspace = 0
        """Bytes that a stream takes once it multiplies."""
        self.held = Allocator(device)

    def __enter__(self) -> ModelPhases:
        if self.cuda:
            self.workspace = workspace(self.device)
            self._first_product()
        self.held.__enter__()
        return self

    def __exit__(self, *given: Any) -> None:
        self.held.__exit__(None, None, None)
        self.model = None
        gc.collect()

    def load(self) -> None:
        """The model with random weights."""
        source = Source("measured", "random (seed 0)", config=load_config(self.name)[1])
        self.model = load(source, str(self.device), self.dtype, lambda line: None).model
        for what in ("now", "peak") if self.cuda else ("now",):  # live tensors have the outline's too, on no device
            self._note({"phase": "load"}, what, 0)
        self._say("", self.figures)

    def run(self, method: Method) -> None:
        """The phases of a layout."""
        before = len(self.figures)
        self._warm(method)
        base = {"method": describe_method(method), "batch_size": 1, "prompt_tokens": self.prompt}
        for phases in (self._generation, self._beams, self._growth):
            phases(method, base)
            self._forget_workspaces()
        self._say(method.name, self.figures[before:])

    def _generation(self, method: Method, base: Figure) -> None:
        """A prompt, tokens after it, and on the same cache the prompt again, whole and in chunks."""
        longest = self.prompt + self.new
        known = base | {"num_tokens": longest, "provided": longest}
        cache, ids = make_cache(self.model, method, max_seq_len=longest), self._ids(self.prompt)
        self._phase(known | {"phase": "prefill"}, lambda: self._forward(cache, ids), ids.nbytes, cache)
        graph: Figure = {}
        self._phase(known | {"phase": "decode"}, lambda: self._decode(cache, graph), ids.nbytes, cache, graph)
        cache.reset()
        self._phase(known | graph | {"phase": "reuse"}, lambda: self._forward(cache, ids), ids.nbytes, cache)
        cache.reset()
        if self.cuda:  # on a CPU the reference reads a warm cache back, which no transient predicts
            chunk = {"phase": "chunked prefill", "prompt_tokens": max(1, self.prompt // CHUNKS)}
            self._phase(known | graph | chunk, lambda: self._chunks(cache, ids), ids.nbytes, cache)

    def _beams(self, method: Method, base: Figure) -> None:
        rows, longest = len(BEAMS), self.prompt + self.new
        known = base | {"batch_size": rows, "num_tokens": longest, "provided": longest}
        cache = make_cache(self.model, method, max_seq_len=longest, compiled=False)
        self._forward(cache, self._ids(self.prompt).expand(rows, -1))
        ids = self._ids(1).expand(rows, -1).contiguous()

        def search() -> None:
            for token in range(self.prompt, longest - 1):
                self._forward(cache, ids, token)
                cache.reorder_cache(torch.tensor(BEAMS, device=self.device))

        self._phase(known | {"phase": "beams"}, search, ids.nbytes, cache)

    def _growth(self, method: Method, base: Figure) -> None:
        provided = -(-self.prompt // GROW) * GROW
        cache = make_cache(self.model, method, compiled=False)
        self._forward(cache, self._ids(self.prompt))
        self._steps(cache, self.prompt, provided)
        known = base | {"num_tokens": provided + 1, "provided": provided + GROW, "phase": "growth"}
        self._phase(known, lambda: self._steps(cache, provided, provided + 1), 0, cache)

    def _phase(
        self, fields: Figure, work: Callable[[], object], beside: int, cache: Any, found: Figure | None = None
    ) -> None:
        """Notes what is held after ``work`` and the most that was meanwhile.

        ``beside``: bytes of prompts that the measurement itself holds.  ``found``: fields that ``work`` fills.
        ``cache``: tells what its steps count and work in, and its kernel how many parts it splits the tokens into.
        """
        self.held.restart()
        work()
        now, peak = self.held.now[self.counter], self.held.peak[self.counter]
        fields = fields | (found or {}) | {"step_nbytes": cache.step_nbytes}
        fields |= splits(rebuild_method(fields["method"]), cache.stores[0], self._query(cache, fields["batch_size"]))
        for what, measured in (("now", now - beside), ("peak", peak)):
            self._note(fields, what, measured)

    def _note(self, fields: Figure, what: str, measured: int) -> None:
        measured = measured or (self.held.now if what == "now" else self.held.peak)[self.counter]
        figure = {"model": self.name, "dtype": self.dtype, "device": self.device.type} | fields
        figure |= {"what": what, "measured": measured}
        want = predicted(figure, self.shape)
        self.figures.append(figure | {"predicted": want, "error": own(figure) / want - 1})

    def _say(self, name: str, figures: list[Figure]) -> None:
        worst = max(figures, key=lambda each: abs(each["error"]))
        where = f"{worst['error']:+.3%} ({worst['phase']}, {worst['what']})"
        self.said.append(f"{called(self.name)} {name or 'load'}: {len(figures)} figures, worst {where}")

    def _warm(self, method: Method) -> None:
        """Kernels are compiled and the default stream's workspaces are there before anything is weighed."""
        longest = self.prompt + 4
        for given in ({"max_seq_len": longest}, {}, {"compiled": False}):
            cache = make_cache(self.model, method, **given)
            self._forward(cache, self._ids(self.prompt))
            self._steps(cache, self.prompt, longest)
            cache.reset()
            if self.cuda:
                self._chunks(cache, self._ids(self.prompt))
            del cache
        self._forget_workspaces()

    def _forget_workspaces(self) -> None:
        """A graph's stream has a workspace of its own, which stays with the process: here each cache's is its own."""
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize(self.device)
            torch._C._cuda_clearCublasWorkspaces()
            self._first_product()

    def _first_product(self) -> None:
        """The default stream's workspace is there before anything is weighed."""
        square = torch.ones(64, 64, dtype=subjects.dtype_of(self.device), device=self.device)
        torch.mm(square, square)

    def _ids(self, count: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(1, self.model.config.vocab_size, (1, count), generator=generator).to(self.device)

    @torch.inference_mode()
    def _forward(self, cache: Any, ids: torch.Tensor, start: int = 0) -> None:
        at = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
        out = self.model(ids, position_ids=at, **argument(cache), use_cache=True, logits_to_keep=1)
        out.logits.float()  # as generate() takes them

    def _chunks(self, cache: Any, ids: torch.Tensor) -> None:
        size = max(1, self.prompt // CHUNKS)
        for start in range(0, self.prompt, size):
            self._forward(cache, ids[:, start : start + size], start)

    def _steps(self, cache: Any, start: int, stop: int) -> None:
        ids = self._ids(1)
        for token in range(start, stop):
            self._forward(cache, ids, token)

    def _decode(self, cache: Any, graph: Figure) -> None:
        self._steps(cache, self.prompt, self.prompt + self.new - 1)
        if getattr(cache, "steps", "") == "CUDA graph":
            graph["workspace"] = self.workspace

    def _query(self, cache: Any, batch_size: int) -> torch.Tensor:
        heads, dim = self.model.config.num_attention_heads, cache.stores[0].shape.key_dim
        return torch.zeros(batch_size, heads, 1, dim, dtype=self.model.dtype, device=self.device)


def workspace(device: torch.device) -> int:
    """Bytes that PyTorch gives cuBLAS for a stream's first product, asked of the allocator."""
    square = torch.ones(64, 64, dtype=subjects.dtype_of(device), device=device)
    out = torch.empty_like(square)
    torch.mm(square, square, out=out)  # the library itself
    torch.cuda.synchronize(device)
    with Allocator(device) as held, torch.cuda.stream(torch.cuda.Stream(device)):
        torch.mm(square, square, out=out)
        torch.cuda.synchronize(device)
        found = held.now["requested"]
    torch._C._cuda_clearCublasWorkspaces()
    return found


def _tiny(folder: Path, scale: Scale) -> str:
    """A config.json of the tiny model, whose name is its path."""
    path = folder / "config.json"
    path.write_text(json.dumps(subjects.config(scale, 1024).to_dict()), encoding="utf-8")
    return str(path)
