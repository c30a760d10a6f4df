"""KIVI on real tensors: reference, kernels, and the layer that uses them."""

from __future__ import annotations

import torch
from torch import Tensor

from kvruntime.kernels.fake_quantize import CHANNEL, TOKEN, fake_quantize
from kvruntime.methods.kivi import benched, transients
from kvruntime.methods.kivi.cache import KiviLayer
from kvruntime.methods.room import Room
from kvsim.methods.kivi import SEQUENCE, Kivi


def read_back(method: Kivi, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Older tokens through a quantizer of other code, the sink and the newest as they are.

    Raises ``ValueError`` for scales over a whole sequence, which depend on how its tokens came.
    """
    if method.k_group == SEQUENCE:
        raise ValueError(f"{method.name}: scales over a sequence are frozen at its first flush")
    sink = min(method.sink_length, key.shape[2])
    packed = sink + method.num_packed(key.shape[2])
    out = []
    for x, nbits, group, axis in (
        (key, method.k_bits, method.k_group, CHANNEL),
        (value, method.v_bits, method.value_group(value.shape[3]), TOKEN),
    ):
        old = fake_quantize(x[:, :, sink:packed].float(), nbits, int(group), axis)
        out.append(torch.cat([x[:, :, :sink].float(), old, x[:, :, packed:].float()], 2))
    return out[0], out[1]


ROOM = Room(
    layer=KiviLayer,
    read_back=read_back,
    examples=tuple(Kivi(nbits=bits, residual_length=64) for bits in (2, 4, 8)),
    transients=transients,
    benched=benched.LAYOUTS,
    measures=benched,
    splits=benched.splits,
)
