"""The layouts of KIVI whose bytes, peaks, speed and quality are recorded."""

from __future__ import annotations

from kvruntime.methods.room import Claims
from kvsim.methods.kivi import Kivi, kivi_seed

GROUPS = ((32, 32, 32), (32, 32, 256), (64, 64, 128), (128, 64, 256))
"""(tokens a key scale, channels a value scale, residual) beside the default 32, 32, 128."""

CLAIMS = Claims(
    core=(Kivi(2), Kivi(4), Kivi(8), kivi_seed()),
    variants=(
        *(
            Kivi(nbits, key_group_size=key, value_group_size=value, residual_length=residual)
            for nbits in (2, 4, 8)
            for key, value, residual in GROUPS
        ),
        Kivi(2, sink_length=4),
        Kivi(key_nbits=4, value_nbits=2),
        Kivi(key_nbits=2, value_nbits=4, key_group_size=64, value_group_size=16),
        Kivi(2, dtype="float32"),
    ),
    judged=(Kivi(8), Kivi(4), Kivi(2)),
    few=(Kivi(2), kivi_seed()),
    one=(Kivi(2),),
    other=(Kivi(4),),
)
