"""A card as it was measured: a profile file takes the place of the stated constants of the model of time.

``kvsim calibrate`` writes one (schema ``kvsim.profile/1``); every measured figure is an object with ``value`` in SI
units and ``low``, ``high``, the 10th and 90th percentile of its repeats.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

from kvsim.attention_curve import Kernel
from kvsim.hardware import Hardware
from kvsim.roofline import Constants, constants

SCHEMA = "kvsim.profile/1"
FIGURES = ("read_bandwidth", "copy_bandwidth", "weight_bandwidth", "flops", "layer_seconds")
KERNEL = ("fixed", "item", "bandwidth")
PLAUSIBLE = (0.45, 1.15)
"""What a card's measured read bandwidth may be of its stated one, before the profile is another card's."""


@dataclass(frozen=True)
class Profile:
    """What was measured: bytes a second read, copied and streamed as weights, products a second, seconds a layer
    costs besides, and the attention kernel (``fixed`` and ``item`` seconds, ``bandwidth`` when it streams)."""

    device: str
    memory_nbytes: int | None
    read_bandwidth: float
    copy_bandwidth: float
    weight_bandwidth: float
    flops: float
    layer_seconds: float
    fixed: float
    item: float
    bandwidth: float
    low: float
    high: float
    source: str

    @property
    def hardware(self) -> Hardware:
        """The measured device as a card of its own, named by its device name."""
        return Hardware(
            id=self.device,
            vendor="measured",
            arch="measured",
            memory_nbytes=self.memory_nbytes,
            memory_source="measured",
            bandwidth=self.read_bandwidth,
            fp16_flops=self.flops,
            fp8_flops=None,
            fp4_flops=None,
            int8_ops=None,
            link_bandwidth=None,
            source=self.source,
        )

    def constants(self, hardware: Hardware | None = None) -> Constants:
        """The stated constants with what was measured in their place, as shares of ``hardware``'s peaks (default:
        of the measured ones).

        Raises ``ValueError`` where the measured bandwidth is not that of such a card.
        """
        card, stated = hardware or self.hardware, constants()
        peak = card.bandwidth or self.read_bandwidth
        share = self.read_bandwidth / peak
        if not PLAUSIBLE[0] <= share <= PLAUSIBLE[1]:
            raise ValueError(
                f"the profile of {self.device} reads {self.read_bandwidth / 1e9:,.0f} GB/s, "
                f"{card.id} has {peak / 1e9:,.0f} GB/s: not a profile of this card"
            )
        kernel = Kernel(
            self.fixed, self.item, self.bandwidth / peak, self.source, merges=False, low=self.low, high=self.high
        )
        kernels = {name: each for name, each in stated.kernels.items() if not name.endswith(("fp16", "fp16-mha"))}
        return replace(
            stated,
            weight_efficiency=self.weight_bandwidth / peak,
            layer_seconds=self.layer_seconds,
            engine_layer_seconds={},
            engine_wide={},
            prefill_efficiency=self.flops / (card.fp16_flops or self.flops),
            kernels={**kernels, "fp16": kernel},
        )


def load_profile(path: Path) -> Profile:
    """Reads a profile.  Raises ``ValueError``, naming the field, for a file that is missing, broken or no profile."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read profile {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"profile {path} is not valid JSON: {error}") from None
    if not isinstance(found, Mapping) or found.get("schema") != SCHEMA:
        raise ValueError(f"{path} is not a profile (schema {SCHEMA!r}): kvsim calibrate writes one")
    values: dict[str, Any] = {name: _positive(found, path, name, "value") for name in FIGURES}
    values |= {name: _positive(found, path, "attention", name) for name in (*KERNEL, "low", "high")}
    device = found.get("device")
    if not isinstance(device, Mapping) or not isinstance(device.get("name"), str):
        raise ValueError(f"profile {path}: device.name is missing")
    memory = device.get("total_nbytes")
    return Profile(
        device=device["name"],
        memory_nbytes=memory if isinstance(memory, int) else None,
        source=f"measured on {device['name']}, {found.get('created', 'date unknown')}",
        **values,
    )


def _positive(found: Mapping[str, Any], path: Path, name: str, field: str) -> float:
    """A number above zero at ``found[name][field]``."""
    holder = found.get(name)
    value = holder.get(field) if isinstance(holder, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value) or value <= 0:
        raise ValueError(f"profile {path}: {name}.{field} is {value!r}, allowed are numbers above 0")
    return float(value)
