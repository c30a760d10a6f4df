"""The uncompressed cache."""

from __future__ import annotations

from torch import Tensor

from kvruntime.methods.full import benched, paged, transients
from kvruntime.methods.full.cache import FullLayer
from kvruntime.methods.room import Claims, Room
from kvsim.methods.full import Full


def read_back(method: Full, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values rounded to the type that stores them."""
    import torch

    dtype = getattr(torch, method.dtype)
    return key.to(dtype).float(), value.to(dtype).float()


CLAIMS = Claims(core=(Full(),), judged=(Full(),), few=(Full(),), one=(Full(),))
ROOM = Room(
    layer=FullLayer,
    read_back=read_back,
    examples=(Full(),),
    transients=transients,
    measures=benched,
    claims=CLAIMS,
    paged=paged,
)
