"""A card as it was measured: a profile file takes the place of the stated constants of the model of time.

``kvsim calibrate`` writes one (schema ``kvsim.profile/1``); every measured figure is an object with ``value`` in SI
units and ``low``, ``high``, the 10th and 90th percentile of its repeats.  A profile is of a card *and* of the runtime
whose kernels ran (:func:`engines_of`): an engine that runs others is refused, because their launches, products and
attention are not those measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvsim.engines import ENGINES
from kvsim.hardware import Hardware
from kvsim.latency.attention_curve import Kernel
from kvsim.latency.constants import Constants, constants
from kvsim.regular_files import read_text

SCHEMA = "kvsim.profile/1"
FIGURES = ("read_bandwidth", "copy_bandwidth", "weight_bandwidth", "flops", "layer_seconds")
KERNEL = ("fixed", "item", "bandwidth")
RUNTIMES = ("pytorch",)
"""The runtimes that a profile may be measured with.  One that does not say was measured with the first."""
LARGEST = 1e30
"""No figure of a card is larger."""
PLAUSIBLE = (0.45, 1.15)
"""What a card's measured read bandwidth may be of its stated one, before the profile is another card's."""


@dataclass(frozen=True)
class Profile:
    """What was measured: bytes a second read, copied and streamed as weights, products a second, seconds a layer
    costs besides, and the attention kernel (``fixed`` and ``item`` seconds, ``bandwidth`` when it streams).

    ``runtime``: whose kernels these are, a key of :data:`RUNTIMES`.
    """

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
    runtime: str = "pytorch"

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

    def note(self, engine: str) -> str:
        """Whose times ``engine`` has with this profile."""
        kept = ", the host's launches a layer as stated" if engine in constants().engine_layer_seconds else ""
        return (
            f"times are those of {self.runtime}'s 16-bit kernels, measured on {self.device}, and of no other engine's"
            f"{kept}; quantized caches and links as stated"
        )

    def constants(self, hardware: Hardware | None = None) -> Constants:
        """The stated constants with what was measured in their place, as shares of ``hardware``'s peaks (default:
        of the measured ones), for the engines of the profile's runtime alone.

        What a layer costs stock ``generate()`` stays as stated: there the host launches every kernel, and a card's
        figures are measured in CUDA graphs.

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
            engine_layer_seconds={
                name: max(seconds, self.layer_seconds)
                for name, seconds in stated.engine_layer_seconds.items()
                if name in engines_of(self.runtime)
            },
            engine_wide={},
            overlapped={},
            sequence_seconds=0.0,  # no server's host
            expert_efficiency=self.weight_bandwidth / peak,
            prefill_efficiency=self.flops / (card.fp16_flops or self.flops),
            kernels={**kernels, "fp16": kernel},
            engines=engines_of(self.runtime),
        )


def engines_of(runtime: str) -> tuple[str, ...]:
    """The engines that a profile measured with ``runtime`` is for, ``ideal`` among those of the first."""
    return tuple(name for name, kind in ENGINES.items() if kind.runtime == runtime)


def load_profile(path: Path) -> Profile:
    """Reads a profile.  Raises ``ValueError``, naming the field, for a file that is missing, broken or no profile."""
    try:
        text = read_text(path)
    except OSError as error:
        raise ValueError(f"cannot read profile {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"profile {path} is not UTF-8 text") from None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"profile {path} is not valid JSON: {error}") from None
    if not isinstance(found, Mapping) or found.get("schema") != SCHEMA:
        raise ValueError(f"{path} is not a profile (schema {SCHEMA!r}): kvsim calibrate writes one")
    values: dict[str, Any] = {name: _positive(found, path, name, "value") for name in FIGURES}
    values |= {name: _positive(found, path, "attention", name) for name in (*KERNEL, "low", "high")}
    device = found.get("device")
    if not isinstance(device, Mapping) or not isinstance(device.get("name"), str):
        raise ValueError(f"profile {path}: device.name is missing")
    runtime = found.get("runtime", RUNTIMES[0])
    if not isinstance(runtime, str) or runtime not in RUNTIMES:
        raise ValueError(f"profile {path}: runtime is {str(runtime)[:40]!r}, allowed are {', '.join(RUNTIMES)}")
    memory = device.get("total_nbytes")
    return Profile(
        device=device["name"],
        memory_nbytes=memory if isinstance(memory, int) and 0 < memory <= LARGEST else None,
        source=f"measured on {device['name']}, {found.get('created', 'date unknown')}",
        runtime=runtime,
        **values,
    )


def _positive(found: Mapping[str, Any], path: Path, name: str, field: str) -> float:
    """A number above zero at ``found[name][field]``."""
    holder = found.get(name)
    value = holder.get(field) if isinstance(holder, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= LARGEST:
        given = repr(value)[:40]
        raise ValueError(f"profile {path}: {name}.{field} is {given}, allowed are numbers above 0 to {LARGEST:g}")
    return float(value)
