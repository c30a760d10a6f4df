"""Quantizers that have no kernels, judged by ``kvruntime eval``'s own harness: what they store is quantized and read
back in place, so that perplexity is theirs and memory is not.

``python simulated-caches.py TEXT OUT [--window N] [--chunk N] [--batch N] [--max-tokens N] SPEC...`` writes rows as
``kvruntime eval`` does and prints its tables.  ``bits`` are worked out from what each quantizer would store, scales and
zeros in 16 bits, as kvsim counts; ``held_bits`` are the same.  A SPEC is a name with options, ``kvarn:key=4,value=2``:

``boost`` stores what ``kivi-boost`` does, as a control: ``key``, ``boost`` and ``value`` bits, ``group``.
``shaped`` is ``boost`` where each key channel's rounding error is carried into the channels after it by the covariance
of the prompt's queries, as GPTQ does for weights; ``damp`` per cent of its mean are added to the diagonal.
``within``: hundredths of a step by which a channel's outer levels lie inside of its extremes; ``fits``: how often its
step and zero are then fitted to the codes by least squares.  ``exact=1``, ``exact=2``: keys, or values, in 16 bits.
``noise``: per cent of half the variance of a score's rounding error, by which the score is lessened: the mean of the
exponential of a score with an error of variance v is ``exp(v / 2)`` times too large.
``kvarn`` is KVarN (arXiv 2606.03458): tiles of 128 tokens, rotated, divided by deviations of tokens and of channels in
turns (16 times, the most even kept), then minima and maxima, keys a channel and values a token.
``turbo`` is TurboQuant: rotated, Lloyd-Max levels, a norm.  With ``qjl=1`` the keys' last bit is the sign of random
projections of what the others leave, whose length is kept (the paper's second stage).

``sink``: first tokens exact.  ``residual``: newest tokens exact; 0 under ``kvarn``: those of the tile that is not full,
as its authors have it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, Cache
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import AttentionMaskInterface

from kvruntime.bench.harness.results import Results, Row, describe
from kvruntime.bench.harness.tasks import Tick, run
from kvruntime.bench.model.caches import Contender, ours, stock
from kvruntime.bench.quality.report import tables
from kvruntime.bench.quality.suite import text_windows
from kvruntime.bench.quality.windows import Windows, window_tasks
from kvruntime.checkpoints.load import LoadedModel, load, pick_device, resolve
from kvruntime.eval.text import load_text
from kvruntime.eval.windows import score_windows
from kvruntime.methods.kivi.reference import STEPS, channel_order, channel_weights
from kvruntime.methods.token.levels import magnitudes, signs
from kvruntime.methods.token.reference import rotated
from kvsim.methods.full import Full

TILE = 128
TURNS = 16


def half(x: Tensor) -> Tensor:
    """``x`` as float16 holds it."""
    return x.half().float()


def between(x: Tensor, top: Any, axis: int, within: float = 0.0, fits: int = 0) -> Tensor:
    """``x`` in codes 0 to ``top`` between the minimum and the maximum along ``axis``, read back.

    ``within``: steps by which the outer levels lie inside of these.  ``fits``: how often step and zero are then those
    of least squares for the codes that they gave.
    """
    low, high = x.amin(axis, keepdim=True), x.amax(axis, keepdim=True)
    top = torch.as_tensor(top, device=x.device)
    step = (high - low) / (top + 2 * within)
    step, zero = half(step), half(low + within * step)

    def codes() -> Tensor:
        return torch.minimum(((x - zero) / torch.where(step > 0, step, 1.0)).round().clamp(min=0), top)

    for _ in range(fits):
        code = codes()
        mean, middle = x.mean(axis, keepdim=True), code.mean(axis, keepdim=True)
        spread = (code - middle).square().sum(axis, keepdim=True)
        step = half(((code - middle) * (x - mean)).sum(axis, keepdim=True) / spread.clamp(min=1e-6))
        zero = half(mean - step * middle)
    return codes() * step + zero


def even(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scales of tokens ``[..., tokens, 1]`` and channels ``[..., 1, channels]`` that make the deviations of both alike:
    logarithms divided in turns, the most even of all turns kept."""

    def unevenness(y: Tensor) -> Tensor:
        parts = [y.std(axis) for axis in (-1, -2)]
        return sum(part.amax(-1) / part.amin(-1).clamp(min=1e-8) for part in parts)[..., None, None]

    log_token, log_channel = x.new_zeros(*x.shape[:-1], 1), x.new_zeros(*x.shape[:-2], 1, x.shape[-1])
    best = (log_token, log_channel)
    least = unevenness(x)
    for _ in range(TURNS):
        for axis in (-1, -2):
            by = (x / log_token.exp() / log_channel.exp()).std(axis, keepdim=True).clamp(1e-3, 1e3).log()
            if axis == -1:
                log_token = (log_token + by).clamp(-0.3, 10)
            else:
                log_channel = (log_channel + by).clamp(-0.3, 10)
        now = unevenness(x / log_token.exp() / log_channel.exp())
        better = now <= least
        best = (torch.where(better, log_token, best[0]), torch.where(better, log_channel, best[1]))
        least = torch.where(better, now, least)
    return half(best[0].exp()), half(best[1].exp())


class Quantizer:
    """``keys`` and ``values`` of whole groups ``[..., tokens, channels]`` (float32), stored and read back."""

    def __init__(self, spec: str) -> None:
        self.name = spec
        kind, _, options = spec.partition(":")
        self.kind = kind
        given = dict(pair.split("=") for pair in filter(None, options.split(",")))
        number: Callable[..., int] = lambda name, default: int(given.pop(name, default))  # noqa: E731
        self.key, self.value, self.boost = number("key", 2), number("value", 2), number("boost", 2)
        self.group = TILE if kind == "kvarn" else 1 if kind == "turbo" else number("group", 64)
        self.sink = number("sink", 0 if kind == "turbo" else 4)
        self.residual = number("residual", 0 if kind == "turbo" else 128)
        self.qjl, self.damp = number("qjl", 0), number("damp", 10)
        self.within, self.fits = number("within", 0) / 100, number("fits", 0)
        self.exact, self.noise = number("exact", 0), number("noise", 0) / 100
        if given or kind not in ("boost", "kvarn", "turbo", "shaped"):
            raise ValueError(f"{spec}: not understood: {', '.join(given) or kind}")

    def bits(self, dim: int) -> float:
        """Bits of an element, the mean of keys and values."""
        if self.kind == "turbo":
            return (self.key + self.value + (32 if self.qjl else 16) / dim + 16 / dim) / 2
        if self.kind == "kvarn":
            tile = 16 * (2 * dim + TILE + dim + 2 * TILE) / (dim * TILE)
            return (self.key + self.value + tile) / 2
        return (self.key + self.boost / 4 + 32 / self.group + self.value + 16 / dim) / 2

    def num_packed(self, num_tokens: int) -> int:
        """Tokens after the sink that are stored in few bits."""
        over = max(0, num_tokens - self.sink - self.residual)
        rounds = over // self.group if not self.residual else -(-over // self.group)
        return int(rounds * self.group)


class Layer(DynamicLayer):
    """Keys and values of one layer; what is packed is overwritten by what would be read back."""

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        self.quantizer, self.packed = quantizer, 0
        self.order: Tensor | None = None
        self.shape: Tensor | None = None
        self.query: Tensor | None = None
        """The prompt's queries, which the attention leaves here."""
        self.variance: Tensor | None = None
        """Of every packed key's rounding error, ``[batch_size, num_kv_heads, tokens, dim]``."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **more: Any) -> tuple[Tensor, Tensor]:
        self._pack()  # the last call's attention has been; what comes now is seen exactly once
        key, value = super().update(key_states, value_states, *args, **more)
        return key, value

    def _pack(self) -> None:
        q = self.quantizer
        if not self.is_initialized or self.keys.numel() == 0:
            return
        first, last = q.sink + self.packed, q.sink + q.num_packed(self.keys.shape[2])
        if last <= first:
            return
        here = slice(first, last)
        key, value = (x[:, :, here].float().unflatten(2, (-1, q.group)) for x in (self.keys, self.values))
        if q.exact != 1:
            self.keys[:, :, here] = self._stored_keys(key).flatten(2, 3).to(self.keys.dtype)
        if q.exact != 2:
            self.values[:, :, here] = self._stored_values(value).flatten(2, 3).to(self.values.dtype)
        self.packed = last - q.sink

    def _stored_keys(self, key: Tensor) -> Tensor:
        q, dim = self.quantizer, key.shape[-1]
        if q.kind == "kvarn":
            y = rotated(key, dim)
            token, channel = even(y)
            return rotated(between(y / token / channel, 2**q.key - 1, -2) * token * channel, dim)
        if q.kind == "turbo":
            sign = signs(dim, key.device).float()
            y = rotated(key * sign, dim)
            seen = lloyd(y, q.key - q.qjl)
            if q.qjl:
                seen = seen + signs_of_projections(y - seen)
            return rotated(seen, dim) * sign
        if self.order is None:
            assert self.query is not None
            heads = key.shape[1]
            weights = channel_weights(self.query, heads)
            chosen = channel_order(key[:, :, 0], dim // 4, weights)[..., : dim // 4]
            self.order = torch.zeros(*key.shape[:2], dim, device=key.device).scatter(2, chosen.long(), 1.0)
            queries = self.query.float().reshape(len(key), heads, -1, dim)
            self.shape = queries.transpose(2, 3) @ queries / queries.shape[2]
        factor = 1 + self.order * (2.0**q.boost - 1)
        top = (factor * 2**q.key - 1)[:, :, None, None]
        if q.kind == "boost":
            if q.noise:
                step = (key.amax(-2, keepdim=True) - key.amin(-2, keepdim=True)) / (top + 2 * q.within)
                found = (step.square() / 12).expand_as(key).flatten(2, 3).to(self.keys.dtype)
                self.variance = found if self.variance is None else torch.cat([self.variance, found], 2)
            return between(key, top, -2, q.within, q.fits)
        return self._shaped(key, top)

    def _shaped(self, key: Tensor, top: Tensor) -> Tensor:
        """Channel after channel, those that weigh most first; each one's error moves the others so that the mean
        square of what a query sees of it is least."""
        assert self.shape is not None
        dim = key.shape[-1]
        low, high = key.amin(-2, keepdim=True), key.amax(-2, keepdim=True)
        step, zero = half((high - low) / top), half(low)
        diagonal = self.shape.diagonal(dim1=-2, dim2=-1)
        damp = self.quantizer.damp / 100 * diagonal.mean(-1, keepdim=True)
        by = diagonal.argsort(-1, descending=True)  # [B, H, D]
        index = by[..., None].expand(self.shape.shape)
        shape = self.shape.gather(2, index).gather(3, index.transpose(2, 3))
        shape = shape + torch.diag_embed(damp.expand_as(diagonal))
        upper = torch.linalg.cholesky(torch.linalg.inv(shape), upper=True)
        at = by[:, :, None, None]

        def ordered(x: Tensor) -> Tensor:
            return x.gather(-1, at.expand(*x.shape[:-1], dim))

        x, step, zero, top = (ordered(y.expand(*key.shape[:3], -1, dim)) for y in (key, step, zero, top))
        x, out = x.clone(), torch.empty_like(x)
        for channel in range(dim):
            s, z = step[..., channel], zero[..., channel]
            code = ((x[..., channel] - z) / torch.where(s > 0, s, 1.0)).round().clamp(min=0)
            out[..., channel] = torch.minimum(code, top[..., channel]) * s + z
            error = (x[..., channel] - out[..., channel]) / upper[:, :, None, None, channel, channel]
            x[..., channel:] -= error[..., None] * upper[:, :, None, None, channel, channel:]
        return torch.empty_like(out).scatter_(-1, at.expand_as(out), out)

    def _stored_values(self, value: Tensor) -> Tensor:
        q, dim = self.quantizer, value.shape[-1]
        if q.kind == "kvarn":
            y = rotated(value, dim)
            token, channel = even(y)
            return rotated(between(y / token / channel, 2**q.value - 1, -1) * token * channel, dim)
        if q.kind == "turbo":
            sign = signs(dim, value.device).float()
            return rotated(lloyd(rotated(value * sign, dim), q.value), dim) * sign
        y = rotated(value, dim)
        scale = half(y.square().mean(-1, keepdim=True).sqrt() * STEPS[q.value])
        level = (y / scale.clamp(min=1e-7)).floor() + 2 ** (q.value - 1)
        return rotated((level.clamp(0, 2**q.value - 1) - (2**q.value - 1) / 2) * scale, dim)


def lloyd(y: Tensor, nbits: int) -> Tensor:
    """Rotated vectors by Lloyd-Max levels, whose length is the vector's own."""
    positive = torch.tensor(magnitudes(y.shape[-1], nbits), device=y.device)
    rms = y.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-10)
    code = torch.bucketize((y / rms).abs(), (positive[1:] + positive[:-1]) / 2)
    level = positive[code] * torch.where(y < 0, -1.0, 1.0)
    return level * half(y.norm(dim=-1, keepdim=True) / level.norm(dim=-1, keepdim=True))


PROJECTIONS: dict[tuple[int, str], Tensor] = {}


def signs_of_projections(rest: Tensor) -> Tensor:
    """What one bit a channel says of ``rest [..., channels]``: ``sqrt(pi / 2) / D |rest| S^T sign(S rest)``, of random
    normal ``S``; its product with a query is the right one in the mean."""
    dim, device = rest.shape[-1], str(rest.device)
    if (dim, device) not in PROJECTIONS:
        drawn = torch.randn(dim, dim, generator=torch.Generator().manual_seed(0))
        PROJECTIONS[dim, device] = drawn.to(rest.device)
    s = PROJECTIONS[dim, device]
    bits = torch.where(rest @ s.T < 0, -1.0, 1.0)
    return (torch.pi / 2) ** 0.5 / dim * half(rest.norm(dim=-1, keepdim=True)) * (bits @ s)


class Watcher:
    """PyTorch's own attention that leaves a prompt's queries with the cache's layers."""

    def __init__(self) -> None:
        self.layers: list[Layer] = []

    def __call__(self, module: Any, query: Tensor, key: Tensor, *args: Any, **more: Any) -> Any:
        if self.layers:
            layer = self.layers[module.layer_idx]
            if layer.query is None:
                layer.query = query
            if layer.variance is not None:  # as further channels of query and key
                scale, sink = query.shape[-1] ** -0.5, layer.quantizer.sink
                less = torch.zeros_like(key)
                less[:, :, sink : sink + layer.packed] = layer.variance * (-scale / 2 * layer.quantizer.noise)
                query, key = torch.cat([query, query.square()], -1), torch.cat([key, less], -1)
                more["scaling"] = scale
        return AttentionInterface()["sdpa"](module, query, key, *args, **more)


WATCHER = Watcher()
AttentionInterface.register("watching", WATCHER)
AttentionMaskInterface.register("watching", AttentionMaskInterface()["sdpa"])


def contender(quantizer: Quantizer) -> Contender:
    """A cache of such layers under the model's own attention."""

    def build(model: Any, max_seq_len: int) -> Cache:
        layers = [Layer(quantizer) for _ in range(model.config.num_hidden_layers)]
        WATCHER.layers = layers
        return Cache(layers=layers)

    @contextmanager
    def around(model: Any) -> Iterator[None]:
        before = model.config._attn_implementation
        model.set_attn_implementation("watching")
        try:
            yield
        finally:
            model.set_attn_implementation(before)

    return Contender(quantizer.name, build, package="simulated", around=around)


def measured(loaded: LoadedModel, one: Contender, windows: Windows, bits: float, tick: Tick) -> Row:
    """The row's figures, as ``kvruntime.bench.quality.windows`` measures them, with what the quantizer would store."""
    plain = stock()
    scores = score_windows(
        loaded.model,
        windows.ids,
        lambda window: one.build(loaded.model, window),
        chunk=windows.chunk,
        prompt_length=windows.prompt_length,
        batch=windows.batch,
        make_reference=lambda window: plain.build(loaded.model, window),
        reference_chunk=windows.reference_chunk,
        around=partial(one.around, loaded.model),
        around_reference=partial(plain.around, loaded.model),
        tick=tick,
    )
    return {**scores.figures(), "bits": bits, "held_bits": bits, "simulated": True}


def main() -> None:
    words = argparse.ArgumentParser()
    words.add_argument("text", type=Path)
    words.add_argument("out", type=Path)
    for name, default in (("window", 1024), ("chunk", 16), ("batch", 296), ("max-tokens", 0), ("prompt-length", 128)):
        words.add_argument(f"--{name}", type=int, default=default)
    words.add_argument("--model", default="smollm2-135m")
    words.add_argument("specs", nargs="+")
    given = vars(words.parse_args())
    device = pick_device(None)
    source = resolve(given["model"], offline=True, say=print)
    loaded = load(source, device, None, print)
    quantizers = [Quantizer(spec) for spec in given["specs"]]
    sizes = {**given, "window": [given["window"]], "reference_chunk": None}
    windows = text_windows(loaded, load_text(given["text"]), sizes)
    tasks = window_tasks(loaded, [ours(Full("float16"))], windows, 0)
    dim = loaded.model.config.hidden_size // loaded.model.config.num_attention_heads
    for quantizer in quantizers:
        one = contender(quantizer)
        for task, each in zip(window_tasks(loaded, [one], windows, 0), windows, strict=True):
            tasks.append(replace(task, measure=partial(measured, loaded, one, each, quantizer.bits(dim))))
    rows = run(tasks, Results(given["out"], describe(device, sys.argv), resume=True))
    print(tables(rows))


if __name__ == "__main__":
    main()
