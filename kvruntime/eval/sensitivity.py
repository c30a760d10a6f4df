"""Which layers mind few bits: what a method does to a layer's attention, and the divergence of a whole choice.

Everything is measured in plain forwards of the model: an attention function stands in that also attends to keys and
values as a method would give them back (its room's ``read_back``).  Every token sees its past as decoding one token at
a time would have stored it by then: of a method that packs records, newest tokens exact and older ones read back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from kvruntime.eval.bits import packed_bits
from kvruntime.hf.biases import LARGE, key_bias_ratios
from kvruntime.hf.models import layer_shapes
from kvruntime.methods import room_of
from kvsim.engines.kvruntime import stored_shape
from kvsim.layout import LayerShape, Method
from kvsim.methods.layer_mix import mixed

NAME = "kvruntime_sensitivity"
OUTLIER = 15.0
"""Times the median channel of a layer's keys: the largest channel from here on is an outlier."""
TRIES = 6
"""Choices by layer that are measured, each with errors scaled anew."""
Tick = Callable[[float], None]


@dataclass(frozen=True)
class LayerFinding:
    """A layer: ``bias``, the largest key bias over the keys' spread (0 without one); ``outlier``, the largest key
    channel's root mean square over the median channel's; ``errors``, of each method the squared error of the attention
    output as a share of its square."""

    index: int
    bias: float
    outlier: float
    errors: tuple[float, ...]

    @property
    def named(self) -> str:
        """What stands out, in words; empty where nothing does."""
        said = [f"key biases of {self.bias:,.0f} times their spread"] * (self.bias >= LARGE)
        said += [f"key channels of {self.outlier:,.0f} times the median"] * (self.outlier >= OUTLIER)
        return ", ".join(said)


@dataclass(frozen=True)
class Proposal:
    """A method for every layer, the divergence measured with it in nats a token, and the mean bits of an element."""

    methods: tuple[Method, ...]
    kl: float
    bits: float

    @property
    def method(self) -> Method:
        """The method that stores each layer so."""
        return mixed(self.methods)

    @property
    def ranges(self) -> list[tuple[int, int, Method]]:
        """Runs of layers with one method: ``(first, last, method)``."""
        out: list[tuple[int, int, Method]] = []
        for index, method in enumerate(self.methods):
            if out and out[-1][2] == method:
                out[-1] = (out[-1][0], index, method)
            else:
                out.append((index, index, method))
        return out


@dataclass
class Study:
    """A model, token ids (int64 ``[rows, tokens]``) and methods, the fewest bits first."""

    model: Any
    ids: Tensor
    methods: tuple[Method, ...]
    shapes: list[LayerShape] = field(init=False)
    exact: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Raises ``ValueError`` for a model whose layers are not all plain full attention."""
        self.shapes = layer_shapes(self.model)
        self.methods = tuple(sorted(self.methods, key=lambda method: packed_bits(method, self.shapes)))

    def layers(self) -> list[LayerFinding]:
        """What stands out in each layer; one forward, after which ``exact`` holds its log probabilities."""
        errors: dict[int, tuple[float, ...]] = {}
        outliers: dict[int, float] = {}

        def look(index: int, attend: Callable[..., Tensor], key: Tensor, value: Tensor) -> Tensor:
            out = attend(key, value)
            found = []
            for method in self.methods:
                off = attend(*decoded(method, self.shapes[index], key, value)) - out
                found.append((off.double().square().sum() / out.double().square().sum().clamp(min=1e-30)).item())
            errors[index] = tuple(found)
            channels = key.float().square().mean((0, 2)).sqrt().flatten()
            outliers[index] = (channels.max() / channels.median().clamp(min=1e-30)).item()
            return out

        self.exact = self._log_probabilities(look)
        biases = key_bias_ratios(self.model)
        biases += [0.0] * (len(self.shapes) - len(biases))
        return [LayerFinding(index, biases[index], outliers[index], errors[index]) for index in sorted(errors)]

    def divergence(self, methods: Sequence[Method | None]) -> float:
        """KL divergence from the exact model, nats a token, with ``methods`` layer by layer (None: exact); one forward,
        after :meth:`layers`."""

        def simulate(index: int, attend: Callable[..., Tensor], key: Tensor, value: Tensor) -> Tensor:
            method = methods[index]
            return attend(key, value) if method is None else attend(*decoded(method, self.shapes[index], key, value))

        own = self._log_probabilities(simulate)
        kl = torch.nn.functional.kl_div(own, self.exact, reduction="none", log_target=True).sum(-1)
        return max(0.0, kl.double().mean().item())

    def uniform(self) -> list[Proposal]:
        """Each method for all layers, measured."""
        count = len(self.shapes)
        return [Proposal((m,) * count, self.divergence((m,) * count), self._bits((m,) * count)) for m in self.methods]

    def propose(self, findings: Sequence[LayerFinding], uniform: Sequence[Proposal], bound: float) -> Proposal | None:
        """The fewest bits by layer whose measured divergence is at most ``bound`` nats a token; None where even the
        most bits for all layers exceed it.

        Layers are raised by how much error a bit takes away; errors are scaled to divergences by what was measured.
        """
        if uniform[-1].kl > bound:
            return None
        if uniform[0].kl <= bound:
            return uniform[0]
        best, scale = uniform[-1], uniform[0].kl / max(1e-30, self._error(findings, [0] * len(findings)))
        seen: set[tuple[int, ...]] = set()
        for _ in range(TRIES):
            level = self._least(findings, bound / max(scale, 1e-30))
            if tuple(level) in seen:
                break
            seen.add(tuple(level))
            chosen = tuple(self.methods[index] for index in level)
            measured = Proposal(chosen, self.divergence(chosen), self._bits(chosen))
            if measured.kl <= bound:
                best = min(best, measured, key=lambda one: one.bits)
            scale = measured.kl / max(1e-30, self._error(findings, level))
        return min([best, *(one for one in uniform if one.kl <= bound)], key=lambda one: one.bits)

    def layer_alone(self, layer: int) -> tuple[float, ...]:
        """The divergence with this layer alone stored by each method, nats a token; a forward each."""
        row = []
        for method in self.methods:
            chosen: list[Method | None] = [None] * len(self.shapes)
            chosen[layer] = method
            row.append(self.divergence(chosen))
        return tuple(row)

    def propose_within(self, alone: Sequence[Sequence[float]], bits: float) -> Proposal:
        """The choice by layer of the least divergence together, where layers' divergences ``alone`` add up, within a
        mean of ``bits``: from the fewest bits on, the step that takes away the most a bit, as long as one fits.

        Raises ``ValueError`` for ``bits`` below those of the smallest method.
        """
        check_bits(bits, self.methods, self.shapes)
        each = [[self._bits([method], [shape]) for method in self.methods] for shape in self.shapes]
        sizes = [shape.num_kv_heads * (shape.key_dim + shape.value_dim) for shape in self.shapes]
        level, left = [0] * len(each), bits * sum(sizes)
        left -= sum(of[0] * size for of, size in zip(each, sizes, strict=True))
        while True:
            steps = [
                ((alone[i][at] - alone[i][to]) / more, i, to, more)
                for i, at in enumerate(level)
                for to in range(at + 1, len(self.methods))
                if 0 < (more := (each[i][to] - each[i][at]) * sizes[i]) <= left + 1e-9 * sum(sizes)
            ]
            gain, layer, to, more = max(steps, default=(0.0, 0, 0, 0.0))
            if gain <= 0:
                break
            level[layer], left = to, left - more
        chosen = tuple(self.methods[index] for index in level)
        return Proposal(chosen, self.divergence(chosen), self._bits(chosen))

    def _least(self, findings: Sequence[LayerFinding], error: float) -> list[int]:
        """The method of each layer, raised one by one until their errors are at most ``error`` together."""
        level = [0] * len(findings)
        while self._error(findings, level) > error and min(level) < len(self.methods) - 1:
            level[self._next(findings, level)] += 1
        return level

    def _next(self, findings: Sequence[LayerFinding], level: Sequence[int]) -> int:
        """The layer of which the next method takes away the most error a bit."""

        def gain(index: int) -> float:
            at, errors = level[index], findings[index].errors
            more = packed_bits(self.methods[at + 1], self.shapes) - packed_bits(self.methods[at], self.shapes)
            return (errors[at] - errors[at + 1]) / max(more, 1e-6)

        return max((index for index in range(len(level)) if level[index] < len(self.methods) - 1), key=gain)

    @staticmethod
    def _error(findings: Sequence[LayerFinding], level: Sequence[int]) -> float:
        return sum(finding.errors[at] for finding, at in zip(findings, level, strict=True))

    def _bits(self, methods: Sequence[Method], shapes: Sequence[LayerShape] | None = None) -> float:
        """The mean of an element, of ``shapes`` or of all layers."""
        return mean_bits(methods, self.shapes if shapes is None else shapes)

    def _log_probabilities(self, look: Callable[..., Tensor]) -> Tensor:
        with attending(self.model, look), torch.inference_mode():
            logits = self.model(input_ids=self.ids.to(self.model.device), use_cache=False).logits
        return torch.as_tensor(logits).float().log_softmax(-1)


def mean_bits(methods: Sequence[Method], shapes: Sequence[LayerShape]) -> float:
    """Bits of an element in the mean of layers of ``shapes``, each stored by its own of ``methods``."""
    sizes = [shape.num_kv_heads * (shape.key_dim + shape.value_dim) for shape in shapes]
    pairs = zip(methods, shapes, sizes, strict=True)
    return sum(packed_bits(method, [shape]) * size for method, shape, size in pairs) / sum(sizes)


def check_bits(bits: float, methods: Sequence[Method], shapes: Sequence[LayerShape]) -> None:
    """Raises ``ValueError`` for a mean of ``bits`` below those of the smallest of ``methods`` for all layers."""
    least, name = min((mean_bits([method] * len(shapes), shapes), method.name) for method in methods)
    if bits < least - 1e-9:
        raise ValueError(f"bits {bits:g}: allowed are {least:.3f} and above, those of {name}")


def read_back(method: Method, shape: LayerShape, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values ``[batch_size, num_kv_heads, tokens, dim]`` as ``method`` gives them back, in their own types."""
    stored = stored_shape(method, shape)
    sizes = (stored.key_dim, stored.value_dim)
    filled = [
        torch.nn.functional.pad(x.float(), (0, dim - x.shape[-1])) for x, dim in zip((key, value), sizes, strict=True)
    ]
    k, v = room_of(method).read_back(method, *filled)
    return k[..., : key.shape[-1]].to(key.dtype), v[..., : value.shape[-1]].to(value.dtype)


def decoded(method: Method, shape: LayerShape, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values, and which of them each token sees, ``[tokens, keys]`` bool (None: all up to its own).

    Of a method that packs records both kinds of every token: exact, then as :func:`read_back` has it.
    """
    k, v = read_back(method, shape, key, value)
    num_packed = getattr(method, "num_packed", None)
    if num_packed is None:
        return k, v, None
    tokens, sink = key.shape[2], int(getattr(method, "sink_length", 0))
    packed = torch.tensor([num_packed(count) for count in range(1, tokens + 1)], device=key.device)
    token = torch.arange(tokens, device=key.device)
    stored = (token >= sink) & (token < sink + packed[:, None])
    exact = ~stored & (token <= token[:, None])
    return torch.cat([key, k], 2), torch.cat([value, v], 2), torch.cat([exact, stored], 1)


@contextmanager
def attending(model: Any, look: Callable[..., Tensor]) -> Iterator[None]:
    """The model with an attention function whose output is ``look(layer, attend, key, value)``, where
    ``attend(key, value, seen)`` is the layer's own attention to what each token sees (:func:`decoded`); put back
    afterwards."""

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **named: Any
    ) -> tuple[Tensor, None]:
        def attend(k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
            mask = attention_mask if seen is None else seen[None, None]
            out: Tensor = sdpa_attention_forward(module, query, k, v, mask, **named)[0]
            return out

        return look(module.layer_idx, attend, key, value), None

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


__all__ = ["LayerFinding", "Proposal", "Study", "attending", "decoded", "read_back"]
