"""Eviction over any method that can forget its oldest tokens."""

from __future__ import annotations

from torch import Tensor

from kvruntime.methods.evict.layer import EvictLayer
from kvruntime.methods.room import Room
from kvsim.methods.evict import Evict
from kvsim.methods.full import Full


def read_back(method: Evict, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The sink and the newest tokens, where ``inner`` stores every token as it is and forgets any number.

    Raises ``ValueError`` for another policy or an inner method.
    """
    if method.policy != "recent" or not isinstance(method.inner, Full):
        raise ValueError(f"{method.name}: what is kept depends on queries or on how the tokens came")
    num_tokens, sink = key.shape[2], method.sink_length
    if num_tokens <= method.budget:
        return key.half().float(), value.half().float()
    newest = method.budget - sink
    kept = [x[:, :, [*range(sink), *range(num_tokens - newest, num_tokens)]].half().float() for x in (key, value)]
    return kept[0], kept[1]


ROOM = Room(layer=EvictLayer, read_back=read_back, examples=(Evict(budget=96, sink_length=4),))
