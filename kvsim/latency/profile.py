"""A card as it was measured: a profile file takes the place of the stated constants of the model of time.

``kvsim calibrate`` writes one (schema ``kvsim.profile/2``); every measured figure is an object with ``value`` in SI
units and ``low``, ``high``, the 10th and 90th percentile of its repeats.  A profile is of a card *and* of the runtimes
that were measured on it.  The figures of PyTorch's own kernels are those of no engine in particular (``ideal``); each
of ``parts`` is a runtime's, fitted to whole steps of it; ``lacks`` says why a runtime has none.  An engine that was not
measured is refused, because its launches, products and attention are not those measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from kvsim.engines import ENGINES
from kvsim.hardware import Hardware
from kvsim.latency.attention_curve import Kernel
from kvsim.latency.constants import Constants, constants
from kvsim.regular_files import read_text

SCHEMA = "kvsim.profile/2"
EARLIER = ("kvsim.profile/1",)
"""Schemas of profiles without parts, which are read too."""
FIGURES = ("read_bandwidth", "copy_bandwidth", "weight_bandwidth", "flops", "layer_seconds")
KERNEL = ("fixed", "item", "bandwidth")
RUNTIMES = ("pytorch",)
"""The runtimes that a profile may be measured with.  One that does not say was measured with the first."""
LARGEST = 1e30
"""No figure of a card is larger."""
PLAUSIBLE = (0.45, 1.15)
"""What a card's measured read bandwidth may be of its stated one, before the profile is another card's."""


ITEM = 1e-8
"""Seconds a multiprocessor takes for a piece in this project's kernels, which split every sequence."""
PARTS = ("kvruntime", "kvruntime:generate", "kvruntime:compiled", "transformers", "transformers:new")
"""Runtimes that a part may be of, by the names of their constants: this project's engine; stock ``generate()`` with a
cache of this project, whose steps are graphs, as it comes and compiled; and with transformers' own, whose kernels the
host launches, at lengths that the process has seen and at new ones."""
HOST_LAUNCHED = ("transformers", "transformers:new")


@dataclass(frozen=True)
class Rates:
    """An attention kernel: seconds a launch, bytes a second of the stream, and what else
    :class:`kvsim.latency.attention_curve.Kernel` has."""

    fixed: float
    bandwidth: float
    value: float = 0.0
    merge: float = 0.0
    half: float = 1.0
    code_ops: float = 0.0
    scale_ops: float = 0.0


@dataclass(frozen=True)
class Part:
    """What steps of one runtime take: bytes of weights a second, seconds a layer and a step besides, more above some
    rows (``wide``: ``rows``, ``layer_seconds``, ``row_seconds``) and up to them a lane's operations for a weight
    (``weight_ops``), attention by the kernel's name without its engine.

    ``low``, ``high``: the least and greatest measured / predicted of the steps that it was fitted to.
    """

    weight_bandwidth: float
    layer_seconds: float
    step_seconds: float = 0.0
    weight_ops: float = 0.0
    wide: Mapping[str, float] = field(default_factory=dict)
    kernels: Mapping[str, Rates] = field(default_factory=dict)
    low: float = 1.0
    high: float = 1.0

    @property
    def layouts(self) -> tuple[str, ...]:
        """The packed layouts that have rates of their own: ``2g64``."""
        return tuple(name.removeprefix("packed-") for name in self.kernels if name.startswith("packed-"))


def with_part(fixed: Constants, name: str, part: Part, card: Hardware, source: str = "measured") -> Constants:
    """``fixed`` with the constants of the runtime ``name`` in place of the stated ones, as shares of the peaks of
    ``card``.

    What windows, states and further norms take beside a layer is the card's in a graph and stays as stated; where the
    host launches every kernel it is a share of the layer's seconds.
    """
    peak = card.bandwidth or part.weight_bandwidth
    engine = name.partition(":")[0]
    kernels = {
        f"{engine}/{kernel}": Kernel(
            rates.fixed,
            ITEM,
            rates.bandwidth / peak,
            source,
            low=part.low,
            high=part.high,
            value=rates.value,
            merge=rates.merge,
            half=rates.half,
            code_ops=rates.code_ops,
            scale_ops=rates.scale_ops,
        )
        for kernel, rates in part.kernels.items()
    }
    shares = dict(fixed.engine_layer_shares.get(name, {}))
    if name not in HOST_LAUNCHED and part.layer_seconds:
        scale = constants().engine_layer_seconds.get(name, part.layer_seconds) / part.layer_seconds
        whole = {kind: float(kind != "norm") for kind in shares}  # of a layer: a norm is one more, others stand for one
        shares = {kind: whole[kind] + (share - whole[kind]) * scale for kind, share in shares.items()}
    own = {"weight_efficiency": part.weight_bandwidth / peak, "prefill_efficiency": fixed.prefill_efficiency}
    own |= {"weight_ops": part.weight_ops} if part.weight_ops else {}
    wide = {key: value for key, value in fixed.engine_wide.items() if key != name}
    return replace(
        fixed,
        engine_layer_seconds={**fixed.engine_layer_seconds, name: part.layer_seconds},
        engine_step_seconds={**fixed.engine_step_seconds, name: part.step_seconds},
        engine_layer_shares={**fixed.engine_layer_shares, **({name: shares} if shares else {})},
        engine_wide=wide | ({name: dict(part.wide)} if part.wide else {}),
        overlapped={**fixed.overlapped, name: own},
        host_launched=tuple(dict.fromkeys((*fixed.host_launched, *((name,) if name in HOST_LAUNCHED else ())))),
        kernels={**fixed.kernels, **kernels},
    )


@dataclass(frozen=True)
class Profile:
    """What was measured: bytes a second read, copied and streamed as weights, products a second, seconds a layer
    costs besides, and the attention kernel (``fixed`` and ``item`` seconds, ``bandwidth`` when it streams).

    ``runtime``: whose kernels these are, a key of :data:`RUNTIMES`.  ``parts``: the runtimes that were measured by
    whole steps, keys of :data:`PARTS`; ``lacks``: why others were not.  ``codes``: by part, the hashes of the code
    that measured it, and rows in the same minutes on the same machine.
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
    parts: Mapping[str, Part] = field(default_factory=dict)
    lacks: Mapping[str, str] = field(default_factory=dict)
    num_sms: int | None = None
    codes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

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
            num_sms=self.num_sms,
        )

    @property
    def engines(self) -> tuple[str, ...]:
        """The names of constants that this profile has: of what runs PyTorch's kernels, and of its parts."""
        return tuple(dict.fromkeys((*engines_of(self.runtime), *self.parts)))

    def missing(self) -> list[str]:
        """The runtimes that it says nothing of, a line each."""
        return [
            f"{name}: {self.lacks.get(name, 'measured before profiles had it')}"
            for name in PARTS
            if name not in self.parts
        ]

    def note(self, engine: str) -> str:
        """Whose times ``engine`` has with this profile; by the name of its constants."""
        part = self.parts.get(engine)
        if part is not None:
            packed = f"; packed layouts {', '.join(part.layouts)}, others by their scales" if part.layouts else ""
            return (
                f"times are those of whole steps of {engine} measured on {self.device}, within "
                f"{part.low - 1:+.0%} to {part.high - 1:+.0%} there{packed}; prefill by PyTorch's products"
            )
        kept = ", the host's launches a layer as stated" if engine in constants().engine_layer_seconds else ""
        return (
            f"times are those of {self.runtime}'s 16-bit kernels, measured on {self.device}, and of no other engine's"
            f"{kept}; quantized caches and links as stated"
        )

    def constants(self, hardware: Hardware | None = None) -> Constants:
        """The stated constants with what was measured in their place, as shares of ``hardware``'s peaks (default:
        of the measured ones), for the engines of the profile's runtime and of its parts alone.

        Without a part of its own, what a layer and a step cost stock ``generate()`` stays as stated: there the host
        launches every kernel, and a card's figures are measured in CUDA graphs.

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
        fixed = replace(
            stated,
            weight_efficiency=self.weight_bandwidth / peak,
            layer_seconds=self.layer_seconds,
            engine_layer_seconds={
                name: max(seconds, self.layer_seconds)
                for name, seconds in stated.engine_layer_seconds.items()
                if name in engines_of(self.runtime)
            },
            engine_wide={},
            engine_step_seconds={
                name: seconds
                for name, seconds in stated.engine_step_seconds.items()
                if name in engines_of(self.runtime)
            },
            overlapped={},
            sequence_seconds=0.0,  # no server's host
            expert_efficiency=self.weight_bandwidth / peak,
            prefill_efficiency=self.flops / (card.fp16_flops or self.flops),
            kernels={**kernels, "fp16": kernel},
            engines=self.engines,
        )
        for name, part in self.parts.items():
            fixed = with_part(fixed, name, part, card, self.source)
        return fixed


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
    if not isinstance(found, Mapping) or found.get("schema") not in (SCHEMA, *EARLIER):
        raise ValueError(f"{path} is not a profile (schema {SCHEMA!r}): kvsim calibrate writes one")
    values: dict[str, Any] = {name: _positive(found, path, name, "value") for name in FIGURES}
    values |= {name: _positive(found, path, "attention", name) for name in (*KERNEL, "low", "high")}
    device = found.get("device")
    if not isinstance(device, Mapping) or not isinstance(device.get("name"), str):
        raise ValueError(f"profile {path}: device.name is missing")
    runtime = found.get("runtime", RUNTIMES[0])
    if not isinstance(runtime, str) or runtime not in RUNTIMES:
        raise ValueError(f"profile {path}: runtime is {str(runtime)[:40]!r}, allowed are {', '.join(RUNTIMES)}")
    memory, entries = device.get("total_nbytes"), _mapping(found, path, "parts")
    return Profile(
        device=device["name"],
        memory_nbytes=memory if isinstance(memory, int) and 0 < memory <= LARGEST else None,
        source=f"measured on {device['name']}, {found.get('created', 'date unknown')}",
        runtime=runtime,
        parts=_parts(found, path),
        lacks={str(name): str(why) for name, why in _mapping(found, path, "lacks").items()},
        codes={name: _codes(entry, found) for name, entry in entries.items()},
        num_sms=sms if isinstance(sms := device.get("num_sms"), int) and 0 < sms < 10**6 else None,
        **values,
    )


def _codes(entry: Mapping[str, Any], found: Mapping[str, Any]) -> tuple[str, ...]:
    """What measured a part, and the rows that a file says were measured beside it (``same_run``)."""
    beside = entry.get("same_run")
    own = str(entry.get("code") or found.get("code") or "")
    return (own, *map(str, beside if isinstance(beside, list) else ()))


def described(part: Part) -> dict[str, Any]:
    """A part as a profile file has it."""
    return {"fitted": asdict(part)}


def _parts(found: Mapping[str, Any], path: Path) -> dict[str, Part]:
    """The parts of a profile.  Raises ``ValueError``, naming the field, for what is no part."""
    out = {}
    for name, entry in _mapping(found, path, "parts").items():
        if name not in PARTS:
            raise ValueError(f"profile {path}: part {name[:40]!r}, allowed are {', '.join(PARTS)}")
        held = _mapping(_mapping({name: entry}, path, name), path, "fitted")
        kernels = _mapping(held, path, "kernels")
        rates = {kernel: _numbers(_mapping(kernels, path, kernel), path, f"{name}.{kernel}") for kernel in kernels}
        own = {key: value for key, value in held.items() if key not in ("wide", "kernels")}
        numbers = _numbers(own, path, name)
        try:
            out[name] = Part(
                **numbers,
                wide=_numbers(_mapping(held, path, "wide"), path, f"{name}.wide"),
                kernels={kernel: Rates(**each) for kernel, each in rates.items()},
            )
        except TypeError as error:
            raise ValueError(f"profile {path}: part {name}: {str(error).partition(' ')[2]}") from None
    return out


def _mapping(holder: Mapping[str, Any], path: Path, name: str) -> Mapping[str, Any]:
    """``holder[name]``, empty where there is none."""
    value = holder.get(name, {})
    if not isinstance(value, Mapping):
        raise ValueError(f"profile {path}: {name} is {repr(value)[:40]}, not an object")
    return value


def _numbers(holder: Mapping[str, Any], path: Path, where: str) -> dict[str, float]:
    """Numbers from zero up by name."""
    out = {}
    for name, value in holder.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= LARGEST:
            raise ValueError(
                f"profile {path}: {where}.{name} is {repr(value)[:40]}, allowed are numbers from 0 to {LARGEST:g}"
            )
        out[name] = float(value)
    return out


def _positive(found: Mapping[str, Any], path: Path, name: str, field: str) -> float:
    """A number above zero at ``found[name][field]``."""
    holder = found.get(name)
    value = holder.get(field) if isinstance(holder, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= LARGEST:
        given = repr(value)[:40]
        raise ValueError(f"profile {path}: {name}.{field} is {given}, allowed are numbers above 0 to {LARGEST:g}")
    return float(value)
