"""Bits by layer at an equal mean: what each layer's keys and values cost in few bits, and the best choice.

``python bits-by-layer.py TEXT OUT`` measures on TEXT; ``--read OUT`` takes what an earlier run measured.  Everything is
a whole forward of a window in which each query sees what decoding one token at a time would show it: the first tokens
and the newest exact, those between as ``kivi-boost`` reads them back.  So a window costs one forward, not one a token.

A key option is ``2+2x16g64``: bits, bits more of so many channels, tokens a group; ``w12`` behind it puts the outer
levels of channels without more bits 12 hundredths of a step inside of the extremes, ``f1`` fits their step and zero to
the codes by least squares (once).  A value option is the bits of rotated values: ``3``; ``3l`` has Lloyd-Max levels and
``3f`` a scale of least squares for its codes.  ``e`` is exact.  A choice is ``KEY,VALUE``, for all layers alike.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from itertools import combinations
from math import exp
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from kvruntime.checkpoints.load import load, pick_device, resolve
from kvruntime.eval.text import load_text, token_windows
from kvruntime.methods.kivi.reference import STEPS, channel_order, channel_weights
from kvruntime.methods.token.levels import magnitudes
from kvruntime.methods.token.reference import rotated
from kvsim.layout import Method
from kvsim.methods import make_method
from kvsim.methods.defaults import COMPRESSED
from kvsim.methods.layer_mix import mixed
from kvsim.specs import method_spec

SINK, RESIDUAL, PROMPT = 4, 128, 128
KEY = re.compile(r"(\d)\+(\d)x(\d+)g(\d+)(?:w(\d+))?(?:f(\d))?")
EXACT = "e"
Choice = tuple[str, str]


def half(x: Tensor) -> Tensor:
    return x.half().float()


def key_bits(option: str) -> float:
    """Bits of a key element in heads of 64, scales and zeros in 16 bits."""
    if option == EXACT:
        return 16.0
    bits, boost, channels, group, *_ = _key(option)
    return bits + boost * channels / 64 + 32 / group


def value_bits(option: str) -> float:
    return 16.0 if option == EXACT else int(option[0]) + 0.25


def bits_of(choices: Sequence[Choice]) -> float:
    return sum(key_bits(key) + value_bits(value) for key, value in choices) / (2 * len(choices))


def _key(option: str) -> tuple[int, ...]:
    found = KEY.fullmatch(option)
    if found is None:
        raise ValueError(f"key option {option!r}: allowed are such as 2+2x16g64, and {EXACT!r}")
    return tuple(int(part or 0) for part in found.groups())


def stored_keys(key: Tensor, query: Tensor, option: str) -> Tensor:
    """Keys ``[B, H, T, D]`` read back; those of no whole record stay as they are."""
    bits, boost, channels, group, within, fits = _key(option)
    record = max(group, 64)
    count = (key.shape[2] - SINK) // record * record
    if count <= 0:
        return key
    x = key[:, :, SINK : SINK + count].float()
    order = channel_order(x[:, :, :record], channels, channel_weights(query[:, :, :PROMPT], key.shape[1]))
    chosen = torch.zeros(*key.shape[:2], key.shape[3], device=key.device)
    chosen = chosen.scatter(2, order[..., :channels].long(), 1.0)[:, :, None, None]
    x = x.unflatten(2, (-1, group))
    top = (1 + chosen * (2.0**boost - 1)) * 2**bits - 1
    inside = (1 - chosen) * within / 100
    low, high = x.amin(-2, keepdim=True), x.amax(-2, keepdim=True)
    step = (high - low) / (top + 2 * inside)
    step, zero = half(step), half(low + inside * step)

    def codes() -> Tensor:
        return torch.minimum(((x - zero) / torch.where(step > 0, step, 1.0)).round().clamp(min=0), top)

    for _ in range(fits):
        code = codes()
        mean, middle = x.mean(-2, keepdim=True), code.mean(-2, keepdim=True)
        spread = (code - middle).square().sum(-2, keepdim=True)
        fitted = half(((code - middle) * (x - mean)).sum(-2, keepdim=True) / spread.clamp(min=1e-6))
        few = chosen < 0.5
        step, zero = torch.where(few, fitted, step), torch.where(few, half(mean - fitted * middle), zero)
    out = key.clone()
    out[:, :, SINK : SINK + count] = (codes() * step + zero).flatten(2, 3).to(key.dtype)
    return out


def stored_values(value: Tensor, option: str) -> Tensor:
    bits, kind = int(option[0]), option[1:]
    y = rotated(value, value.shape[-1])
    rms = y.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-7)
    if kind == "l":
        positive = torch.tensor(magnitudes(y.shape[-1], bits), device=y.device, dtype=torch.float32)
        code = torch.bucketize((y / rms).abs(), (positive[1:] + positive[:-1]) / 2)
        level = positive[code] * torch.where(y < 0, -1.0, 1.0)
        scale = half((level * y).sum(-1, keepdim=True) / level.square().sum(-1, keepdim=True))
        return rotated(level * scale, value.shape[-1]).to(value.dtype)
    scale = half(rms * STEPS[bits])
    top = 2**bits - 1
    level = ((y / scale.clamp(min=1e-7)).floor() + 2 ** (bits - 1)).clamp(0, top) - top / 2
    if kind == "f":
        scale = half((level * y).sum(-1, keepdim=True) / level.square().sum(-1, keepdim=True))
    return rotated(level * scale, value.shape[-1]).to(value.dtype)


def seen_packed(length: int, record: int, device: torch.device) -> Tensor:
    """``[T, T]`` bool: which tokens lie in records when a token has been appended."""
    over = (torch.arange(1, length + 1, device=device) - SINK - RESIDUAL).clamp(min=0)
    packed = (over + record - 1) // record * record
    token = torch.arange(length, device=device) - SINK
    return (token >= 0) & (token < packed[:, None])


class Simulation:
    """PyTorch's attention over exact and stored tokens, as ``choices`` say layer by layer; None: all exact."""

    def __init__(self) -> None:
        self.choices: Sequence[Choice] | None = None
        self.masks: dict[tuple[int, int], Tensor] = {}

    def mask(self, length: int, record: int, device: torch.device) -> Tensor:
        """``[T, 2 T]``: exact tokens, then stored ones."""
        if (length, record) not in self.masks:
            packed = seen_packed(length, record, device)
            causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
            self.masks[length, record] = torch.cat([causal & ~packed, packed], 1)
        return self.masks[length, record]

    def __call__(self, module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **more: Any) -> Any:
        choice = (EXACT, EXACT) if self.choices is None else self.choices[module.layer_idx]
        groups = query.shape[1] // key.shape[1]
        if choice == (EXACT, EXACT):
            k, v = (x.repeat_interleave(groups, 1) for x in (key, value))
            out = torch.nn.functional.scaled_dot_product_attention(query, k, v, is_causal=True)
            return out.transpose(1, 2).contiguous(), None
        record = 64 if choice[0] == EXACT else max(64, _key(choice[0])[3])
        few_k = key if choice[0] == EXACT else stored_keys(key, query, choice[0])
        few_v = value if choice[1] == EXACT else stored_values(value, choice[1])
        k, v = (torch.cat(pair, 2).repeat_interleave(groups, 1) for pair in ((key, few_k), (value, few_v)))
        mask = self.mask(key.shape[2], record, key.device)
        out = torch.nn.functional.scaled_dot_product_attention(query, k, v, attn_mask=mask)
        return out.transpose(1, 2).contiguous(), None


SIMULATED = Simulation()
AttentionInterface.register("simulated", SIMULATED)
AttentionMaskInterface.register("simulated", lambda *args, **more: None)


LOGITS = 8192
"""Tokens whose probabilities are held at a time."""


class Job:
    """A choice whose divergence is asked for, layers before ``first`` exact, and the sums over the windows seen."""

    def __init__(self, name: str, choices: Sequence[Choice], first: int = 0) -> None:
        self.name, self.choices, self.first = name, choices, first
        self.nll: list[float] = []
        self.kl: list[float] = []
        """A window's mean each."""


class Judge:
    """A model whose attention is :class:`Simulation`, layer after layer."""

    def __init__(self, model: Any) -> None:
        model.set_attn_implementation("simulated")
        self.model = model
        self.exact: list[float] = []
        """A window's mean negative log-likelihood each."""

    def __call__(self, ids: Tensor, jobs: Sequence[Job]) -> None:
        """Adds what ``jobs`` cost on windows ``ids [N, T]``."""
        keep = sorted({job.first for job in jobs} - {0})
        SIMULATED.choices = None
        inputs: dict[int, Tensor] = {}
        theirs = self._run(ids, 0, None, inputs, keep)
        self.exact += self._against(theirs, theirs, ids)[0]
        for job in jobs:
            SIMULATED.choices = job.choices
            own = self._run(ids, job.first, inputs.get(job.first), {}, ())
            nll, kl = self._against(own, theirs, ids)
            job.nll += nll
            job.kl += kl

    def _run(
        self, ids: Tensor, first: int, states: Tensor | None, inputs: dict[int, Tensor], keep: Sequence[int]
    ) -> Tensor:
        """The last states; layers before ``first`` gave ``states``.  ``inputs``: where those of layers ``keep`` go."""
        inner = self.model.model
        if states is None:
            states = inner.embed_tokens(ids)
        position = torch.arange(ids.shape[1], device=ids.device)[None]
        rotary = inner.rotary_emb(states, position)
        for index, layer in enumerate(inner.layers):
            if index < first:
                continue
            if index in keep:
                inputs[index] = states
            states = layer(states, attention_mask=None, position_ids=position, position_embeddings=rotary)
            states = states[0] if isinstance(states, tuple) else states
        return torch.as_tensor(inner.norm(states))

    def _against(self, own: Tensor, theirs: Tensor, ids: Tensor) -> tuple[list[float], list[float]]:
        nll = kl = 0.0
        size = max(1, LOGITS // len(ids))
        for start in range(0, ids.shape[1] - 1, size):
            here = slice(start, min(start + size, ids.shape[1] - 1))
            mine, exact = (self.model.lm_head(x[:, here]).float().log_softmax(-1) for x in (own, theirs))
            target = ids[:, here.start + 1 : here.stop + 1, None]
            nll = nll - mine.gather(-1, target).double().sum((1, 2))
            kl = kl + (exact.exp() * (exact - mine)).sum(-1).double().sum(1)
        count = ids.shape[1] - 1
        return (nll / count).tolist(), (kl / count).tolist()


KEYS = ("2+1x16g64", "2+2x16g128", "2+2x16g64", "2+2x32g64", "3+1x16g128", "3+1x16g64", "3+2x16g128", "3+2x16g64")
VALUES = ("2", "3", "4")
SETS = {
    "three": (("2+2x16g64", "3+1x16g64", "3+2x16g64"), VALUES),
    "g128": (("2+1x16g64", "2+2x16g128", "2+2x16g64", "3+1x16g128", "3+1x16g64", "3+2x16g128", "3+2x16g64"), VALUES),
    "half": (("2+2x16g64", "2+2x32g64", "3+1x16g64", "3+2x16g64"), VALUES),
    "all": (KEYS, VALUES),
    "pairs": (("2+2x16g64", "3+1x16g64"), ("2", "3", "4")),
    "one": (("2+1x16g64", "2+2x16g64", "3+1x16g64", "3+2x16g64"), ("1", *VALUES)),
}
"""Options among which a choice is made: few are few kernels to build."""


def allocate(
    errors: dict[str, list[float]], options: tuple[Sequence[str], Sequence[str]], budget: float
) -> list[Choice]:
    """The choice by layer of least error together within ``budget`` mean bits, by steps along each side's convex hull.

    ``errors``: option -> its error in each layer, key options by name and values as ``v3``.
    """
    layers = len(next(iter(errors.values())))
    sides = []
    for layer in range(layers):
        for which, name, bits in ((0, "{}", key_bits), (1, "v{}", value_bits)):
            points = sorted((bits(o), errors[name.format(o)][layer], o) for o in options[which])
            hull: list[tuple[float, float, str]] = []
            for point in points:
                if hull and point[1] >= hull[-1][1]:
                    continue
                if hull and point[0] == hull[-1][0]:
                    hull.pop()
                while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-2], point):
                    hull.pop()
                hull.append(point)
            sides.append(hull)
    at = [0] * len(sides)
    left = 2 * layers * budget - sum(hull[0][0] for hull in sides)
    while True:
        steps = [
            (_slope(hull[i], hull[i + 1]), side)
            for side, (hull, i) in enumerate(zip(sides, at, strict=True))
            if i + 1 < len(hull) and hull[i + 1][0] - hull[i][0] <= left + 1e-9
        ]
        if not steps:
            break
        side = max(steps)[1]
        left -= sides[side][at[side] + 1][0] - sides[side][at[side]][0]
        at[side] += 1
    picked = [hull[i][2] for hull, i in zip(sides, at, strict=True)]
    return list(zip(picked[::2], picked[1::2], strict=True))


def _slope(a: tuple[float, float, str], b: tuple[float, float, str]) -> float:
    """Error taken away a bit."""
    return (a[1] - b[1]) / max(b[0] - a[0], 1e-9)


def few(errors: dict[str, list[float]], budget: float, count: int) -> list[Choice]:
    """The choice by layer of least error together within ``budget`` mean bits, among the choices of at most ``count``
    pairs of measured options of groups of 64 and 16 channels with more bits, which today's kernels read."""
    keys = [name for name in errors if name.endswith("x16g64")]
    pairs = [(key, name[1:]) for key in keys for name in errors if name.startswith("v")]
    cost = np.array([[k + v for k, v in zip(errors[key], errors[f"v{value}"], strict=True)] for key, value in pairs])
    bits = np.array([bits_of([pair]) for pair in pairs])
    best: tuple[float, list[Choice]] = (float("inf"), [])
    for some in combinations(range(len(pairs)), count):
        c, b = cost[list(some)], bits[list(some)]
        if b.min() > budget:
            continue
        low, high = 1e-8, 1.0  # the price of a bit
        for _ in range(24):
            price = (low * high) ** 0.5
            fits = b[(c + price * b[:, None]).argmin(0)].mean() <= budget + 1e-9
            low, high = (low, price) if fits else (price, high)
        at = (c + high * b[:, None]).argmin(0)
        total = c[at, range(len(at))].sum()
        if total < best[0] + 1e-4 and b[at].mean() <= budget + 1e-9:  # what is left of the budget
            spend(at, c, b, budget)
            best = min(best, (c[at, range(len(at))].sum(), [pairs[some[i]] for i in at]))
    return best[1]


def spend(at: Any, cost: Any, bits: Any, budget: float) -> None:
    """Raises layers of ``at`` in place, the largest gain first, while the budget lets it."""
    while True:
        left = budget * len(at) - bits[at].sum() + 1e-9
        gain = np.where(bits[:, None] - bits[at] <= left, cost[at, range(len(at))] - cost, 0.0)
        to, layer = np.unravel_index(gain.argmax(), gain.shape)
        if gain[to, layer] <= 0:
            return
        at[layer] = to


def spec_of(choices: Sequence[Choice]) -> str:
    """What kvruntime's commands take as ``--method``."""
    return method_spec(mixed([boost_of(*choice) for choice in choices]))


def boost_of(key: str, value: str) -> Method:
    bits, boost, _, group, *_ = _key(key)
    widths = {"nbits": bits, "boost_nbits": boost, "value_nbits": int(value)}
    return make_method(
        COMPRESSED, **widths, group_size=group, residual_length=RESIDUAL, sink_length=SINK, rotate_values=1
    )


def main() -> None:
    words = argparse.ArgumentParser()
    words.add_argument("text", type=Path)
    words.add_argument("out", type=Path)
    for name, default in (("window", 2048), ("max-tokens", 32768), ("rows", 32), ("skip-tokens", 0)):
        words.add_argument(f"--{name}", type=int, default=default)
    words.add_argument("--read", type=Path, action="append", default=[])
    words.add_argument("--sensitivity", action="store_true")
    words.add_argument("--budget", type=float, action="append", default=[])
    words.add_argument("--set", action="append", default=[])
    words.add_argument("--choice", action="append", default=[])
    words.add_argument("--count", type=int, action="append", default=[], help="so many methods in all layers")
    words.add_argument("--key", action="append", default=[], help="of --sensitivity, in place of all")
    words.add_argument("--value", action="append", default=[], help="of --sensitivity, in place of all")
    words.add_argument("--specs", action="store_true", help="only the choices of what was read, as methods")
    words.add_argument("--seconds", type=float, default=1e9, help="after which no further windows are begun")
    given = words.parse_args()
    errors: dict[str, list[float]] = {}
    for path in given.read:
        errors |= json.loads(path.read_text())["errors"]
    if given.specs:
        for budget in given.budget:
            for count in given.count:
                choices = few(errors, budget, count)
                print(f"{budget} {count} {bits_of(choices):.4f} {spec_of(choices)}")
        return
    start = perf_counter()
    device = torch.device(pick_device(None))
    loaded = load(resolve("smollm2-135m", offline=True, say=print), str(device), None, print)
    most = given.skip_tokens + given.max_tokens if given.max_tokens else None
    ids = token_windows(loaded.tokenizer, load_text(given.text), given.window, most)
    ids = ids[given.skip_tokens // given.window :].to(device)
    layers = loaded.model.config.num_hidden_layers
    jobs: list[Job] = []
    if given.sensitivity:
        exact = (EXACT, EXACT)
        keys, values = (given.key, given.value) if given.key or given.value else (KEYS, VALUES)
        for name, option in (*((k, (k, EXACT)) for k in keys), *((f"v{v}", (EXACT, v)) for v in values)):
            for layer in range(layers):
                jobs.append(Job(name, [exact] * layer + [option] + [exact] * (layers - layer - 1), layer))
    for text in given.choice:
        key, _, value = text.partition(",")
        jobs.append(Job(text, [(key, value)] * layers))
    for budget in given.budget:
        measured = [name for name, (_, values) in SETS.items() if {f"v{value}" for value in values} <= errors.keys()]
        sets = given.set if given.set or given.count else measured
        jobs += [Job(f"{name} {budget}", allocate(errors, SETS[name], budget)) for name in sets]
        jobs += [Job(f"{count} methods {budget}", few(errors, budget, count)) for count in given.count]
    judge = Judge(loaded.model)
    with torch.inference_mode():
        for some in ids.split(max(1, given.rows * 1024 // given.window)):
            judge(some, jobs)
            print(f"{len(judge.exact)} of {len(ids)} windows, {perf_counter() - start:.0f} s", flush=True)
            given.out.write_text(json.dumps(figures(given, device, ids, judge, jobs), indent=None))
            if perf_counter() - start > given.seconds:
                break
    for row in figures(given, device, ids, judge, jobs)["choices"]:
        print(f"{row['name']:34s} {row['bits']:.4f} bits {row['loss_percent']:+.3f} % KL {row['kl']:.5f}")


def figures(given: argparse.Namespace, device: torch.device, ids: Tensor, judge: Judge, jobs: Sequence[Job]) -> Any:
    """What is kept: ``errors`` of single layers, and ``choices`` for all."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    nll = sum(judge.exact) / len(judge.exact)
    out: dict[str, Any] = {"device": name, "torch": torch.__version__, "argv": sys.argv[1:], "text": given.text.name}
    out |= {"windows": list(ids.shape), "windows_seen": len(judge.exact), "exact_ppl": exp(nll)}
    out |= {"errors": {}, "choices": []}
    for job in jobs:
        kl = sum(job.kl) / len(job.kl)
        if any(choice == (EXACT, EXACT) for choice in job.choices):
            out["errors"].setdefault(job.name, []).append(kl)
            continue
        loss = 100 * (exp(sum(job.nll) / len(job.nll) - nll) - 1)
        row = {"name": job.name, "bits": bits_of(job.choices), "loss_percent": loss, "kl": kl}
        row |= {"choices": job.choices} if len(set(job.choices)) > 1 else {}
        out["choices"].append(row)
    return out


if __name__ == "__main__":
    main()
