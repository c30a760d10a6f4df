"""What users would otherwise pick: transformers' QuantizedCache (quanto, hqq) and tiny-turboquant, in the same harness.

None of them knows the final length, so ``max_seq_len`` is not used.  A missing package is one line and a recorded
row, never a failure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from kvruntime.bench.model.caches import Contender, plain_attention, stock

WIDTHS = (2, 4)
"""Bits of the peers that ``kvruntime eval`` judges; others time those of two bits alone."""
GROUP_SIZE, RESIDUAL_LENGTH = 64, 128
AXES = {"quanto": 0, "hqq": 1}
"""Backend -> the axis that transformers' guide names for it."""


def _quantized(backend: str, nbits: int, model: Any, max_seq_len: int) -> Any:
    from transformers import QuantizedCache

    axis = AXES[backend]
    shape = {"axis_key": axis, "axis_value": axis, "q_group_size": GROUP_SIZE, "residual_length": RESIDUAL_LENGTH}
    return QuantizedCache(backend, model.config, nbits=nbits, **shape)


def _turboquant(nbits: int, model: Any, max_seq_len: int) -> Any:
    from tiny_turboquant import TinyKVCache

    class Adapter(TinyKVCache):  # type: ignore[misc]
        """Under transformers 5.24, which gives ``update`` more than 0.18 takes; it makes no use of it."""

        def update(self, key: Any, value: Any, layer: int, *_: Any, **more: Any) -> Any:
            return super().update(key, value, layer)

    groups = {"block_size": 32, "value_group_size": 32, "residual_len": RESIDUAL_LENGTH}
    return Adapter(key_bits=nbits, value_bits=nbits, **groups)


@contextmanager
def _turboquant_attention(model: Any) -> Iterator[None]:
    """tiny-turboquant's fused decode where it can patch the model (Llama-like, float16, CUDA), else stock attention."""
    import torch
    from tiny_turboquant import patch_model, unpatch_model

    fused = model.device.type == "cuda" and model.dtype == torch.float16 and hasattr(model, "model")
    with plain_attention(model):
        if fused:
            patch_model(model)
        try:
            yield
        finally:
            if fused:
                unpatch_model(model)


def _of_transformers(backend: str, distribution: str, nbits: int) -> Contender:
    name = f"{backend}-{nbits}bit-g{GROUP_SIZE}-r{RESIDUAL_LENGTH}"
    return Contender(name, partial(_quantized, backend, nbits), package=distribution, around=plain_attention)


def _tiny_turboquant(nbits: int) -> Contender:
    name = f"tiny-turboquant-{nbits}bit-g32-r{RESIDUAL_LENGTH}"
    return Contender(name, partial(_turboquant, nbits), package="tiny-turboquant", around=_turboquant_attention)


PEERS: tuple[tuple[str, str, Callable[[int], Contender]], ...] = (
    ("transformers", "transformers", lambda nbits: stock()),
    ("optimum-quanto", "optimum.quanto", partial(_of_transformers, "quanto", "optimum-quanto")),
    ("hqq", "hqq", partial(_of_transformers, "hqq", "hqq")),
    ("tiny-turboquant", "tiny_turboquant", _tiny_turboquant),
)
"""Distribution, module, and how to make its cache of so many bits."""


def find_peers(widths: Sequence[int] = WIDTHS[:1]) -> tuple[list[Contender], list[dict[str, str]]]:
    """``(contenders that are installed, rows that say which are not)``: transformers' own uncompressed cache, then the
    others in each of ``widths`` bits."""
    there, missing = [], []
    for distribution, module, make in PEERS:
        try:
            installed = find_spec(module) is not None
        except ModuleNotFoundError:
            installed = False
        for name, one in {one.name: one for one in map(make, widths)}.items():
            if installed:
                there.append(one)
            else:
                missing.append({"kind": "missing", "method": name, "package": distribution})
    return there, missing


def package_version(distribution: str) -> str | None:
    """The installed version, None where there is none."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
