"""What users would otherwise pick: transformers' QuantizedCache (quanto, hqq) and tiny-turboquant, in the same harness.

None of them knows the final length, so ``max_seq_len`` is not used.  A missing package is one line and a recorded
row, never a failure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from kvruntime.bench.model.caches import Contender, plain_attention, stock

NBITS, GROUP_SIZE, RESIDUAL_LENGTH = 2, 64, 128


def _quantized(backend: str, model: Any, max_seq_len: int) -> Any:
    from transformers import QuantizedCache

    return QuantizedCache(backend, model.config, nbits=NBITS, q_group_size=GROUP_SIZE, residual_length=RESIDUAL_LENGTH)


def _turboquant(model: Any, max_seq_len: int) -> Any:
    from tiny_turboquant import TinyKVCache

    return TinyKVCache(key_bits=2, value_bits=2, block_size=32, value_group_size=32, residual_len=RESIDUAL_LENGTH)


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


PEERS: dict[str, tuple[str, str, Callable[[], Contender]]] = {
    "transformers-dynamic": ("transformers", "transformers", stock),
    "quanto-2bit-g64-r128": (
        "optimum-quanto",
        "optimum.quanto",
        lambda: Contender(
            "quanto-2bit-g64-r128",
            lambda model, n: _quantized("quanto", model, n),
            package="optimum-quanto",
            around=plain_attention,
        ),
    ),
    "hqq-2bit-g64-r128": (
        "hqq",
        "hqq",
        lambda: Contender(
            "hqq-2bit-g64-r128", lambda model, n: _quantized("hqq", model, n), package="hqq", around=plain_attention
        ),
    ),
    "tiny-turboquant-2bit-g32-r128": (
        "tiny-turboquant",
        "tiny_turboquant",
        lambda: Contender(
            "tiny-turboquant-2bit-g32-r128", _turboquant, package="tiny-turboquant", around=_turboquant_attention
        ),
    ),
}
"""Name -> (distribution, module, how to make it)."""


def find_peers() -> tuple[list[Contender], list[dict[str, str]]]:
    """``(contenders that are installed, rows that say which are not)``."""
    there, missing = [], []
    for name, (distribution, module, make) in PEERS.items():
        try:
            installed = find_spec(module) is not None
        except ModuleNotFoundError:
            installed = False
        if installed:
            there.append(make())
        else:
            missing.append({"kind": "missing", "method": name, "package": distribution})
    return there, missing


def package_version(distribution: str) -> str | None:
    """The installed version, None where there is none."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
