"""Eviction over any method that can forget its oldest tokens."""

from __future__ import annotations

from torch import Tensor

from kvruntime.methods.evict import benched
from kvruntime.methods.evict.layer import EvictLayer
from kvruntime.methods.room import Claims, Room
from kvsim.layout import LayerShape
from kvsim.methods import make_method
from kvsim.methods.defaults import COMPRESSED
from kvsim.methods.evict import Evict
from kvsim.methods.full import Full


def read_back(method: Evict, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The sink and the newest tokens, where ``inner`` stores every token as it is and forgets any number.

    Raises ``ValueError`` for another policy or an inner method.
    """
    if method.policy != "recent" or not isinstance(method.inner, Full):
        raise ValueError(f"{method.name}: what is kept depends on queries or on how the tokens came")
    num_tokens, sink = key.shape[2], method.sink_length
    most = method.num_kept(LayerShape(key.shape[1], key.shape[3], value.shape[3]), num_tokens)
    if num_tokens <= most:
        return key.half().float(), value.half().float()
    newest = most - sink
    kept = [x[:, :, [*range(sink), *range(num_tokens - newest, num_tokens)]].half().float() for x in (key, value)]
    return kept[0], kept[1]


EXAMPLE = Evict(budget=96, sink_length=4)

CLAIMS = Claims(
    core=(EXAMPLE,),
    variants=(
        Evict(ratio=0.25, policy="snapkv"),
        Evict(budget=300, policy="h2o", observed=32),
        Evict(budget=300, policy="expected", inner=make_method(COMPRESSED, sink_length=4)),
    ),
    **dict.fromkeys(("judged", "few", "one", "other"), (EXAMPLE,)),
)
"""One policy is judged by perplexity: what eviction loses, a text read token by token hardly shows."""

ROOM = Room(
    layer=EvictLayer,
    read_back=read_back,
    examples=(EXAMPLE,),
    claims=CLAIMS,
    measures=benched,
    unpaged="what is kept moves to other slots, and a table holds tokens by their positions",
)
