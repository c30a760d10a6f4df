"""KIVI on real tensors: reference, kernels, and the layer that uses them."""

from __future__ import annotations

import torch
from torch import Tensor

from kvruntime.kernels.fake_quantize import CHANNEL, TOKEN, fake_quantize
from kvruntime.methods.kivi import benched, paged, transients
from kvruntime.methods.kivi.cache import KiviLayer
from kvruntime.methods.kivi.claims import CLAIMS
from kvruntime.methods.kivi.reference import STEPS
from kvruntime.methods.room import Room
from kvsim.methods.kivi import SEQUENCE, Kivi, kivi_boost
from kvsim.methods.packing import boosted_channels


def read_back(method: Kivi, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Older tokens through a quantizer of other code, the sink and the newest as they are.

    Raises ``ValueError`` for scales over a whole sequence, which depend on how its tokens came.
    """
    if method.k_group == SEQUENCE:
        raise ValueError(f"{method.name}: scales over a sequence are frozen at its first flush")
    sink = min(method.sink_length, key.shape[2])
    packed = sink + method.num_packed(key.shape[2])
    if method.rotate_values:
        value = turned(value.float()).to(getattr(torch, method.dtype)).float()  # exact ones are stored rotated
    out = []
    for x, nbits, group, axis in (
        (key, method.k_bits, method.k_group, CHANNEL),
        (value, method.v_bits, method.value_group(value.shape[3]), TOKEN),
    ):
        size = int(group)
        old = x[:, :, sink:packed].float()
        if axis == TOKEN and method.rotate_values:
            old = midrise(old, nbits)
        elif axis == CHANNEL and method.boost_nbits and packed > sink:
            first = old[:, :, : method.record_length]
            span = first.amax(2) - first.amin(2)
            ahead = (span[..., None, :] > span[..., None]).sum(-1)  # of equals the lower channels come first
            ahead += (span[..., None, :] == span[..., None]).tril(-1).sum(-1)
            mask = (ahead < boosted_channels(x.shape[3]))[:, :, None]
            longer = fake_quantize(old, nbits + method.boost_nbits, size, axis)
            old = torch.where(mask, longer, fake_quantize(old, nbits, size, axis))
        else:
            old = fake_quantize(old, nbits, size, axis)
        out.append(torch.cat([x[:, :, :sink].float(), old, x[:, :, packed:].float()], 2))
    return out[0], turned(out[1]) if method.rotate_values else out[1]


def turned(x: Tensor) -> Tensor:
    """``x [..., channels]`` times a normalised Hadamard matrix by Sylvester's construction,
    one a power of two of channels."""
    block = x.shape[-1] & -x.shape[-1]
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < block:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    matrix = (matrix / block**0.5).to(x.device)
    return (x.double().unflatten(-1, (-1, block)) @ matrix).flatten(-2).to(x.dtype)


def midrise(x: Tensor, nbits: int) -> Tensor:
    """``x [..., channels]`` to the nearest of ``2**nbits`` levels around zero (of two the upper),
    a normal variable's best step apart."""
    step = (x.square().mean(-1, keepdim=True).sqrt() * STEPS[nbits]).half().float()
    most = (2**nbits - 1) / 2
    level = torch.where(step > 0, x * (1 / step), 0.0)  # as the layer has it: multiples of a step are no rare values
    return (level.floor() + 0.5).clamp(-most, most) * step


ROOM = Room(
    layer=KiviLayer,
    read_back=read_back,
    examples=(
        *(Kivi(nbits=bits, residual_length=64) for bits in (2, 4, 8)),
        *(kivi_boost(bits, residual_length=64) for bits in (2, 3)),
    ),
    transients=transients,
    benched=benched.LAYOUTS,
    measures=benched,
    splits=benched.splits,
    claims=CLAIMS,
    paged=paged,
)
