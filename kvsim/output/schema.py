"""The answers as JSON objects: one envelope, one form a row, a version a command (docs/json.md, held by a test)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from kvsim.layout import LayerShape, Method, StateShape
from kvsim.output.not_modelled import NOT_MODELLED

if TYPE_CHECKING:
    from kvsim.analysis.explain import Explanation
    from kvsim.memory.capacity import Room
    from kvsim.memory.estimate import Estimate
    from kvsim.methods.formulas import Number
    from kvsim.models.model import Model

VERSIONS: dict[str, int] = dict.fromkeys(NOT_MODELLED, 1)
"""Schema -> its number.  A key that is added leaves it; one that changes its meaning raises it."""

NUMBER = (int, float)
NULLABLE = (int, float, type(None))
BAND = {"value": float, "low": float, "high": float}
ENVELOPE: dict[str, Any] = {"schema": str, "inputs": dict, "notes": list, "not_modelled": list, "rows": list}
ROW: dict[str, Any] = {
    "method": str,
    "options": dict,
    "engine": str,
    "batch": int,
    "ctx": int,
    "nbytes": int,
    "nbytes_per_token": NUMBER,
    "nbytes_per_sequence": NUMBER,
    "compression": float,
    "parts": dict,
    "split": dict,
    "state_nbytes": int,
    "state_parts": dict,
    "index_nbytes": int,
    "index_parts": dict,
    "total_nbytes": int,
    "read_nbytes": int,
    "read_nbytes_per_token": NUMBER,
    "read_parts": dict,
}
"""Keys and types of a row of estimate, compare, explain and plot."""
ESTIMATE_ROW: dict[str, Any] = ROW | {
    "rank_nbytes": int,
    "all_ranks_nbytes": int,
    "tpot_seconds": (dict, type(None)),
    "ttft_seconds": (dict, type(None)),
    "tokens_per_second": (dict, type(None)),
    "bound": (str, type(None)),
}
GPU_ROW: dict[str, Any] = {"fits": bool, "max_batch": NULLABLE, "max_ctx": NULLABLE}
"""Keys that a row of estimate has with ``--gpu``."""
POOL: dict[str, Any] = {
    "num_gpu_blocks": int,
    "block_size": int,
    "block_nbytes": int,
    "kv_cache_tokens": int,
    "max_model_len": int,
    "max_concurrency": float,
}
"""``pool`` of a row of estimate with ``--gpu`` and the vllm engine."""
GPU: dict[str, Any] = {
    "id": str,
    "count": int,
    "memory_nbytes": int,
    "memory_source": str,
    "reserve_nbytes": int,
    "weight_nbytes": int,
    "weight_bits": NUMBER,
    "overhead": dict,
    "overhead_band": dict,
    "cache_nbytes": int,
    "cache_band": dict,
    "bandwidth": NULLABLE,
    "source": str,
}
DOCTOR_ROW: dict[str, Any] = {
    "line": int,
    "what": str,
    "unit": str,
    "predicted": NULLABLE,
    "reported": NUMBER,
    "error": NULLABLE,
    "cause": str,
}


def envelope(command: str, inputs: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """``schema``, ``inputs``, ``notes`` and ``not_modelled``; ``rows`` are to be added."""
    return {
        "schema": f"kvsim.{command}/{VERSIONS[command]}",
        "inputs": dict(inputs),
        "notes": notes,
        "not_modelled": list(NOT_MODELLED[command]),
    }


def model_object(model: Model) -> dict[str, Any]:
    """What was understood of a model; ``layers`` lists every distinct layer with its count."""
    plain = model.cache_layers[0] if model.cache_layers else None
    kinds: dict[LayerShape | StateShape, int] = {}
    for layer in model.layers:
        kinds[layer] = kinds.get(layer, 0) + 1
    return {
        "model_type": model.model_type,
        "num_layers": model.num_layers,
        "num_blocks": model.num_blocks,
        "num_q_heads": model.num_q_heads,
        "num_kv_heads": plain.num_kv_heads if plain else None,
        "key_dim": plain.key_dim if plain else None,
        "value_dim": plain.value_dim if plain else None,
        "num_params": model.num_params,
        "max_positions": model.max_positions,
        "dtype": model.dtype,
        "layers": [{"count": count} | _layer(layer) for layer, count in kinds.items()],
        "sources": dict(model.sources),
        "notes": list(model.notes),
    }


def _layer(layer: LayerShape | StateShape) -> dict[str, Any]:
    if isinstance(layer, LayerShape):
        return asdict(layer)
    tensors = [{"name": name, "shape": list(shape), "dtype": dtype} for name, shape, dtype in layer.tensors]
    return {"kind": layer.kind, "tensors": tensors}


def options_object(method: Any) -> dict[str, Any]:
    """Every field of a method or engine; a method inside it by its name and fields."""
    out: dict[str, Any] = {}
    for field in fields(method):
        value = getattr(method, field.name)
        out[field.name] = {"method": value.name} | options_object(value) if isinstance(value, Method) else value
    return out


def row_object(row: Estimate) -> dict[str, Any]:
    """One :class:`~kvsim.memory.estimate.Estimate`; keys as in :data:`ROW`."""
    return {
        "method": row.method.name,
        "options": options_object(row.method),
        "engine": row.engine,
        "batch": row.batch_size,
        "ctx": row.num_tokens,
        "nbytes": row.nbytes,
        "nbytes_per_token": exact(row.nbytes_per_token),
        "nbytes_per_sequence": exact(row.nbytes / row.batch_size),
        "compression": row.compression,
        "parts": row.parts,
        "split": row.split,
        "state_nbytes": row.state_nbytes,
        "state_parts": row.state_parts,
        "index_nbytes": row.index_nbytes,
        "index_parts": row.index_parts,
        "total_nbytes": row.total_nbytes,
        "read_nbytes": row.read_nbytes,
        "read_nbytes_per_token": exact(row.read_nbytes_per_token),
        "read_parts": row.read_parts,
    }


def exact(number: float) -> int | float:
    """Whole numbers as such."""
    return int(number) if number.is_integer() else number


def formulas_object(row: Explanation) -> dict[str, Any]:
    """``numbers`` and ``formulas`` of an explanation."""
    return {
        "numbers": [asdict(number) for number in row.numbers],
        "formulas": [
            {
                "buffer": formula.buffer,
                "section": formula.section,
                "nbytes": formula.nbytes,
                "formula": formula.text,
                "layer": formula.layer,
                "apart": formula.apart,
                "factors": [{"value": value, "name": name} for value, name in formula.factors],
            }
            for formula in row.formulas
        ],
    }


def gpu_object(space: Room, count: int) -> dict[str, Any]:
    """One card's memory, divided; keys as in :data:`GPU`."""
    return {
        "id": space.hardware.id,
        "count": count,
        "memory_nbytes": space.memory_nbytes,
        "memory_source": space.hardware.memory_source,
        "reserve_nbytes": space.reserve_nbytes,
        "weight_nbytes": space.weight_nbytes,
        "weight_bits": space.weight_bits,
        "overhead": dict(space.overhead),
        "overhead_band": {
            name: {"low": int(size * band[0]), "high": int(size * band[1])}
            for name, size in space.overhead.items()
            for band in [space.overhead_band.get(name, (1.0, 1.0))]
        },
        "cache_nbytes": space.cache_nbytes,
        "cache_band": dict(zip(("low", "high"), space.cache_band, strict=True)),
        "bandwidth": space.hardware.bandwidth,
        "source": space.hardware.source,
    }


def explain_rows(
    numbers: Sequence[Number], weighed: Sequence[Estimate], explained: Sequence[Explanation]
) -> dict[str, Any]:
    """``numbers`` and ``rows`` of ``kvsim.explain/1``."""
    rows = [row_object(row) | formulas_object(text) for row, text in zip(weighed, explained, strict=True)]
    return {"numbers": [asdict(number) for number in numbers], "rows": rows}
