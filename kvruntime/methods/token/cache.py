"""One attention layer's cache of tokens that are coded one by one: the method's buffers, filled and read.

On CUDA the Triton kernels run, elsewhere the PyTorch reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvruntime.kernels.reference import PLAIN, Scores, embedded
from kvruntime.methods.rows import Fresh, Rows, Steps, on_device
from kvruntime.methods.token import latent_reference, reference
from kvruntime.methods.token.coding import sections
from kvruntime.methods.token.levels import lookup_table, signs
from kvsim.layout import Buffer, LayerShape

FORMATS = {"int8": "int8", "int4": "int4", "fp8": "e4m3", "fp8-e5m2": "e5m2"}
"""The formats of ``PerTokenHead`` by coding."""


def layout_of(method: Any, shape: LayerShape) -> reference.Layout:
    """The codings of a method's keys and values."""
    dims = (shape.key_dim, shape.value_dim)
    if hasattr(method, "format"):
        return reference.Layout(FORMATS[method.format], FORMATS[method.format], *dims)
    return reference.Layout(f"lloyd{method.k_bits:g}", f"lloyd{method.v_bits:g}", *dims, method.norm_correction)


def shared(method: Any, buffers: Sequence[Buffer], device: torch.device) -> dict[str, Tensor]:
    """The signs of the rotations, and what kernels look levels up in."""
    made = {}
    for buffer in buffers:
        what, dim, *bits = buffer.name.removesuffix("bit").split("_")
        if what == "signs":
            made[buffer.name] = signs(int(dim), device)
        else:
            widths = [nbits for _, _, nbits, _ in sections(f"lloyd{bits[0]}", int(dim))]
            made[buffer.name] = torch.cat([lookup_table(int(dim), width, device) for width in widths])
    return made


def shared_names(layout: reference.Layout) -> list[str]:
    """The names of the tensors that layers share: the signs of keys and of values, and what their levels are looked up
    in.  Those of codings without are no tensor's."""
    streams = ((layout.key, layout.key_dim), (layout.value, layout.value_dim))
    names = [f"signs_{dim}" for _, dim in streams]
    return names + [f"lookup_{dim}_{coding.removeprefix('lloyd')}bit" for coding, dim in streams]


class TokenLayer(Rows):
    """Keys and values of ``batch_size`` rows in one layer, each token and head coded alone."""

    def __init__(self, method: Any, shape: LayerShape, *args: Any, **kwargs: Any) -> None:
        if shape.window is not None or shape.stride > 1 or not shape.value_dim:
            what = "latent (MLA) layer" if not shape.value_dim else "compressed layer"
            what = what if shape.window is None else f"window of {shape.window} tokens"
            raise ValueError(f"{method.name} holds full-attention layers only, not a {what}")
        self.layout = layout_of(method, shape)
        self.is_latent = shape.kind == "mla"
        """Whether keys are latents of MLA, which are values too, and values the rotary keys beside them."""
        self._shared_names = shared_names(self.layout)
        super().__init__(method, shape, *args, **kwargs)

    @property
    def kernel(self) -> str:
        """What attends to one query a row of up to four query heads a key: the PyTorch reference, the kernel in whole
        numbers, or the other one, and of a layout that the first would read why."""
        if self.device.type != "cuda":
            return "PyTorch reference"
        plan = _kernels("fast_plan")
        if not plan.holds(self.layout, 1, torch.float16):
            return "Triton"
        if not plan.aligned(self.num_provided, self.tensors["key_scale"].element_size()):
            return f"Triton (rows of {self.num_provided:,} tokens: whole numbers take an even number)"
        return "Triton, whole numbers"

    @classmethod
    def changes_scores(cls, device: torch.device) -> bool:
        """Whether ``attend`` takes sinks and softcaps there: the reference does, the kernels do not."""
        return device.type != "cuda"

    @classmethod
    def holds_latents(cls, method: Any, device: torch.device) -> bool:
        """Whether layers of ``method`` attend to latents there: everywhere in PyTorch, on a GPU those that the kernel
        reads."""
        return device.type != "cuda" or _kernels("latent").supports(layout_of(method, LayerShape(1, 16, 16)))

    def stored(self, lengths: Tensor | None = None) -> reference.Stored:
        """What the kernels are told that this layer holds; ``lengths``: those on the device, where steps count."""
        held = self.tensors
        return reference.Stored(
            held["key_codes"].view(torch.uint8),
            held["key_scale"],
            held["value_codes"].view(torch.uint8),
            held["value_scale"],
            on_device(self.row_lengths, self.device) if lengths is None else lengths,
            *(self.shared.get(name) for name in self._shared_names),
        )

    def append(self, key: Tensor, value: Tensor, lengths: list[int] | None = None, query: Tensor | None = None) -> None:
        """Store ``key [batch_size, num_kv_heads, L, key_dim]`` and ``value`` alike.

        ``lengths``: row b's real tokens are the last ``lengths[b]`` of the L (the rest is left padding, which is
        not stored); ``None`` takes all.
        """
        counts = self.make_room(key, lengths, value)
        run = _kernels("store").append if key.is_cuda else reference.append
        run(key.detach(), value.detach(), counts, self.stored(), self.layout)
        self.row_lengths = [start + count for start, count in zip(self.row_lengths, counts, strict=True)]

    def attend(self, query: Tensor, scale: float, fresh: Fresh | None = None, *, scores: Scores = PLAIN) -> Tensor:
        """Attention of ``query [batch_size, num_q_heads, L, key_dim]`` over what is stored.

        ``fresh``: ``(key, value, lengths)`` of L tokens not yet stored, which query i sees up to and with its own;
        without it L must be 1.  ``scores``: what the model does to them.  Returns
        ``[batch_size, num_q_heads, L, value_dim]`` in the query's type; padding queries get zeros.
        """
        new = self.counted(query, fresh)
        self._check(scores, query.device)
        if self.is_latent:
            if query.is_cuda and new is None:
                return self._latent(query, self.stored(), scale, max(self.row_lengths), stepped=False)
            return latent_reference.attend(query, self.stored(), self.layout, scale, new, scores=scores)
        if query.is_cuda:
            out: Tensor = _kernels("attention").attend(
                query, self.stored(), self.layout, scale, new, num_tokens=max(self.row_lengths)
            )
            return out
        return reference.attend(query, self.stored(), self.layout, scale, new, scores=scores)

    def _check(self, scores: Scores, device: torch.device) -> None:
        if not scores.is_plain and not self.changes_scores(device):
            raise ValueError(f"{self.method.name} on CUDA attends without sinks and softcaps")

    def step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        steps: Steps,
        rotary: tuple[Tensor, Tensor] | None = None,
        scores: Scores = PLAIN,
    ) -> Tensor:
        """One decode step with nothing decided on the host, so that a CUDA graph may hold it: store, then attend.

        ``query [batch_size, num_q_heads, 1, key_dim]`` and one key and value a row.  ``rotary``: (cos, sin), each
        ``[positions, key_dim]``; None: already embedded.  Returns ``[batch_size, num_q_heads, 1, value_dim]``.  On CUDA
        the host's books stay behind until :meth:`catch_up` or :meth:`reset`.
        """
        if not key.is_cuda:
            query, key = embedded(query, key, rotary, steps.positions)
            self.append(key, value)
            return self.attend(query, scale, scores=scores)
        self._check(scores, query.device)
        stored = self.stored(steps.lengths)
        if self.is_latent:
            _kernels("store").step(key, key, value, stored, self.layout, steps.positions)
            return self._latent(query, stored, scale, steps.num_tokens, stepped=True)
        turned = _kernels("store").step(query, key, value, stored, self.layout, steps.positions, rotary)
        out: Tensor = _kernels("attention").attend(
            query, stored, self.layout, scale, stepped=True, num_tokens=steps.num_tokens, turned=turned
        )
        return out

    def _latent(self, query: Tensor, stored: reference.Stored, scale: float, num_tokens: int, stepped: bool) -> Tensor:
        out: Tensor = _kernels("latent").attend(query, stored, self.layout, scale, stepped, num_tokens)
        return out

    def tokens(self, row: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a row as attention reads them: ``[num_kv_heads, row_lengths[row], dim]`` float32."""
        slot = torch.arange(self.row_lengths[row], device=self.device)[None]
        key, value = reference.read(self.stored(), self.layout, torch.full_like(slot, row), slot)
        return key[0], value[0]

    def forget(self, counts: Sequence[int], sink: int) -> None:
        """Forgets row b's ``counts[b]`` oldest tokens after its first ``sink``."""
        for tensor in self.tensors.values():
            raw = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
            for row, (length, count) in enumerate(zip(self.row_lengths, counts, strict=True)):
                if count:
                    raw[row, :, sink : length - count] = raw[row, :, sink + count : length].clone()
        self.forgot(counts)


def _kernels(name: str) -> Any:
    """``kvruntime.methods.token.<name>``, where Triton is."""
    from importlib import import_module

    return import_module(f"kvruntime.methods.token.{name}")
