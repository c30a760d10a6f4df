"""Methods that code every token and head alone: whole numbers, fp8, and TurboQuant's Lloyd-Max levels."""

from __future__ import annotations

import torch
from torch import Tensor

from kvruntime.methods.room import Room
from kvruntime.methods.token import benched, paged, transients
from kvruntime.methods.token.cache import TokenLayer, shared
from kvruntime.methods.token.levels import magnitudes, signs
from kvsim.methods.token import PerTokenHead, TurboQuant


def read_back_numbers(method: PerTokenHead, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values as multiples of each token's scale."""
    dtype = getattr(torch, method.scale_dtype)
    out = []
    for x in (key.float(), value.float()):
        if method.format == "int4":
            low, high = x.min(-1, keepdim=True).values.clamp(max=0), x.max(-1, keepdim=True).values.clamp(min=0)
            raised = [bits + 15 - (bits + 15) % 16 for bits in _bits(((high - low) / 15).to(dtype))]
            scale = torch.stack(raised).to(_bits_type(dtype)).view(dtype).float()
            inverse = torch.where(scale > 0, 1 / scale, 0.0)
            zero = (-low * inverse).round().clamp(0, 15)
            out.append(((x * inverse).round() + zero).clamp(0, 15).sub(zero) * scale)
            continue
        largest = {"int8": 127.0, "fp8": 448.0, "fp8-e5m2": 57344.0}[method.format]
        scale = (x.abs().max(-1, keepdim=True).values / largest).to(dtype).float()
        level = (x * torch.where(scale > 0, 1 / scale, 0.0)).clamp(-largest, largest)
        if method.format == "int8":
            out.append(level.round() * scale)
        else:
            bits, least = (4, -5) if method.format == "fp8" else (3, -13)  # of a mantissa; the exponent of subnormals
            exponent = torch.frexp(level).exponent.clamp(min=least)
            step = torch.ldexp(torch.ones_like(level), exponent - bits)
            out.append((level / step).round() * step * scale)
    return out[0], out[1]


def _bits_type(dtype: torch.dtype) -> torch.dtype:
    return {4: torch.int32, 2: torch.int16}[dtype.itemsize]


def _bits(scale: Tensor) -> Tensor:
    return scale.contiguous().view(_bits_type(scale.dtype)).long()


def read_back_levels(method: TurboQuant, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values turned by a matrix, each coordinate to the level that is nearest, and turned back."""
    out = []
    for x, bits in ((key, method.k_bits), (value, method.v_bits)):
        dim = x.shape[-1]
        turn = torch.ones(1, 1, dtype=torch.float64, device=x.device)
        pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64, device=x.device)
        for _ in range((dim & -dim).bit_length() - 1):
            turn = torch.kron(turn, pair)
        turn = torch.block_diag(*[turn * len(turn) ** -0.5] * (dim // len(turn))) * signs(dim, x.device).double()
        y = x.double() @ turn.T
        rms = y.square().mean(-1, keepdim=True).sqrt()
        near = torch.empty_like(y)
        for part, width in ((slice(None, dim // 2), -(-bits // 1)), (slice(dim // 2, None), bits // 1)):
            levels = torch.tensor(magnitudes(dim, int(width)), dtype=torch.float64, device=x.device)
            levels = torch.cat((-levels.flip(0), levels))
            unit = torch.where(rms > 0, y[..., part] / rms, 0.0)
            near[..., part] = levels[torch.bucketize(unit, (levels[1:] + levels[:-1]) / 2)]
        scale = rms / near.square().mean(-1, keepdim=True).sqrt() if method.norm_correction else rms
        out.append((near * scale.half().double() @ turn).float())
    return out[0], out[1]


ROOM = Room(
    layer=TokenLayer,
    read_back=read_back_numbers,
    examples=tuple(map(PerTokenHead, ("int8", "int4", "fp8"))),
    transients=transients,
    measures=benched,
    splits=benched.splits,
    paged=paged,
)
TURBOQUANT_ROOM = Room(
    layer=TokenLayer,
    read_back=read_back_levels,
    examples=tuple(map(TurboQuant, (2.5, 3, 4))),
    shared=shared,
    transients=transients,
    measures=benched,
    splits=benched.splits,
    paged=paged,
)
