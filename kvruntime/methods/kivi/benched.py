"""What ``bench kernels`` times of KIVI: its layouts, and what no other layer has to measure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvruntime.methods.kivi import cache, reference
from kvruntime.methods.kivi.cache import KiviLayer
from kvsim.methods.kivi import Kivi, kivi_boost


def kivi(nbits: int, group: int, residual: int, **options: Any) -> Kivi:
    return Kivi(nbits=nbits, group_size=group, residual_length=residual, **options)


LAYOUTS = (
    *(kivi(2, 32, residual) for residual in (64, 128)),
    *(kivi(2, 64, residual) for residual in (64, 128)),
    kivi(2, 128, 128),
    *(kivi(4, 64, residual) for residual in (64, 128)),
)
ENGINE = (kivi(2, 32, 128), kivi(2, 64, 64), kivi(4, 64, 64))
"""What ``bench engine`` takes, exact tokens in the model's type."""
PACKED = (kivi(2, 32, 128), kivi(2, 64, 128), kivi(4, 64, 128))
"""What storing is timed with."""
SMALL = tuple(f"llama-3-8b:{size}" for size in ("1x2k", "1x4k", "2x2k", "2x4k", "4x2k", "8x2k"))
"""From 2k tokens on nothing may be slower than float16: the small end."""
SHORT = ("llama-3-8b:1x512", "llama-3-8b:1x1k", "gpt2:1x128", "gpt2:1x512")
"""What a launch costs, for the time model: hardly anything is packed."""
MIXED = kivi(2, 64, 64, key_nbits=4, value_nbits=2)
BFLOAT16 = kivi(2, 64, 64, dtype="bfloat16")
MORE: tuple[tuple[str, tuple[Kivi, ...]], ...] = (
    *((spec, (kivi(2, 64, 64), kivi(2, 32, 128), kivi(4, 64, 64))) for spec in SMALL),
    *((spec, (kivi(2, 64, 64), kivi(4, 64, 64))) for spec in SHORT),
    ("llama-3-8b:8x32k", (kivi(8, 64, 64), MIXED, BFLOAT16, kivi_boost(), kivi_boost(3))),
    ("llama-3-8b:ragged", (kivi(2, 64, 64), kivi(2, 32, 128))),
    ("gemma-7b:8x4k", (kivi(2, 64, 64), kivi(4, 64, 64))),
    ("phi-3-mini-4k-instruct:8x4k", (kivi(2, 32, 64), kivi(4, 32, 64))),
)
"""Small batches and short contexts, other bits and types, rows of different lengths, heads of 256 and 96 channels."""
_ASKED = {
    ("llama-3-8b", 8, 32768): (4.8, 5.6, 6.1, 3.3),
    ("llama-3-8b", 1, 131072): (4.6, 5.4, 5.8, 3.2),
    ("llama-3-8b", 64, 4096): (4.6, 5.4, 5.8, 3.2),
    ("llama-3-8b", 1, 32768): (3.8, 4.2, 4.3, 2.5),
    ("llama-3-8b", 1, 8192): (2.3, 2.5, 2.6, 1.8),
    ("llama-2-7b", 8, 4096): (4.5, 5.2, 5.5, 2.9),
    ("gpt2", 64, 1024): (3.9, 4.4, None, 2.6),
    ("gpt2", 1, 1024): (1.5, 1.6, None, 1.4),
}
ASKED = {
    layout: {shape: ratios[place] for shape, ratios in _ASKED.items() if ratios[place] is not None}
    for place, layout in enumerate(("kivi-2bit-g32", "kivi-2bit-g64", "kivi-2bit-g128", "kivi-4bit-g64"))
}
"""What was set out for: layout -> (model, rows, tokens) -> ratio to float16 on an H100."""
PORTABLE = ("llama-3-8b:8x32k", (kivi(2, 64, 64), kivi(3, 64, 64)))
"""What the plain Triton kernel is timed on though another may take it."""


def packs(method: Kivi, num_tokens: int) -> bool:
    """Whether a row of so many tokens has any that are packed."""
    return method.num_packed(num_tokens) > 0


def scratch(layer: KiviLayer, num_q_heads: int) -> Tensor:
    """Of a step's scratch the part that attention wants."""
    return layer.scratch(num_q_heads)[layer.batch_size :]


def attend(layer: KiviLayer, query: Tensor, scale: float, scratch: Tensor) -> Tensor:
    """``KiviLayer.attend`` with a step's ``scratch``."""
    return layer.attend(query, scale, arrivals=scratch)


def portable(layer: KiviLayer, query: Tensor, scale: float, scratch: Tensor) -> Tensor:
    """The plain Triton kernel, whichever the layer would take."""
    return direct(cache._kernels("attention"), layer, query, scale)


def about(layer: KiviLayer, query: Tensor, plain: bool) -> dict[str, Any]:
    """How many of the first row's tokens are exact, which kernel attends (``plain``: the portable one),
    how launched."""
    fast = None if plain else fast_kernel(layer, query)
    row: dict[str, Any] = {"exact_tokens": layer.row_lengths[0] - layer.row_packed[0]}
    row["kernel"] = "reference" if layer.device.type == "cpu" else "portable" if fast is None else "fast"
    if fast is not None:
        row["launch"] = {
            name.lower(): getattr(fast, name) for name in ("STAGES", "PROGRAMS_PER_SM") if hasattr(fast, name)
        }
        with planned(fast) as answers:
            layer.attend(query, 1.0)
        row["splits"] = answers[-1] if answers else None  # rows of different lengths are not split by a plan
    return row


def with_splits(layer: KiviLayer, query: Tensor, scale: float, scratch: Tensor, number: int) -> Tensor:
    """The tensor-core kernel with another number of splits than it plans."""
    return direct(cache._fast(), layer, query, scale, num_splits=number, arrivals=scratch)


def equal_shares(layer: KiviLayer, query: Tensor, scale: float) -> Tensor:
    """The tensor-core kernel with one line of work for rows of different lengths."""
    return direct(cache._fast(), layer, query, scale, equal_shares=True)


def direct(kernels: Any, layer: KiviLayer, query: Tensor, scale: float, **options: Any) -> Tensor:
    """``attend`` of a kernel room on what a layer stores, as ``KiviLayer.attend`` calls it."""
    out: Tensor = kernels.attend(query, layer.stored(), layer.layout, scale, **options)
    return out


def fast_kernel(layer: KiviLayer, query: Tensor) -> Any:
    """The tensor-core kernel's room where it takes this call, else None."""
    fast = cache._fast() if query.is_cuda else None
    return fast if fast is not None and fast.supports(layer.record, query) else None


def splits(layer: KiviLayer, query: Tensor) -> int:
    """How many ways the kernel that attends ``query`` over ``layer`` splits the tokens, as it plans it itself."""
    with planned(fast_kernel(layer, query) or cache._kernels("attention")) as answers:
        layer.attend(query, 1.0)
    return answers[-1]


@contextmanager
def planned(kernels: Any) -> Iterator[list[int]]:
    """The answers of ``kernels.plan_splits`` while it holds."""
    answers: list[int] = []
    real = kernels.plan_splits

    def listening(*given: Any, **named: Any) -> int:
        answers.append(real(*given, **named))
        return answers[-1]

    kernels.plan_splits = listening
    try:
        yield answers
    finally:
        kernels.plan_splits = real


def packers(layer: KiviLayer, key: Tensor, value: Tensor) -> dict[str, Callable[[], Any]]:
    """Other code that quantizes the tokens of ``key`` and ``value`` that ``layer`` packed.

    ``eager``: the PyTorch reference.  ``compiled``: :func:`lean_pack` under ``torch.compile``, which writes as many
    words in an order that asks for no shuffling.
    """
    old = [x[:, :, : layer.row_packed[0]] for x in (key, value)]
    method = layer.method
    pack = torch.compile(lean_pack, dynamic=False)
    return {
        "eager": partial(reference.pack_records, old[0], old[1], layer.record),
        "compiled": lambda: pack(*old, method.k_bits, int(method.k_group)),
    }


def lean_pack(key: Tensor, value: Tensor, nbits: int, group: int) -> tuple[Tensor, ...]:
    """KIVI's arithmetic as few lines as it takes, for a compiler: words in natural order, nothing guarded.

    ``key``, ``value`` ``[batch_size, num_kv_heads, tokens, dim]``, whole groups; words hold neighbouring channels.
    """

    def quantized(x: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
        zero, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
        scale = ((high.float() - zero.float()) / (2**nbits - 1)).half()
        codes = ((x.float() - zero.float()) / scale.float()).round().clamp(0, 2**nbits - 1).int()
        return codes, scale, zero

    def words(codes: Tensor) -> Tensor:
        shifts = torch.arange(0, 32, nbits, dtype=torch.int32, device=codes.device)
        return (codes.unflatten(-1, (-1, 32 // nbits)) << shifts).sum(-1, dtype=torch.int32)

    key_codes, key_scale, key_zero = quantized(key.unflatten(2, (-1, group)), 3)
    value_codes, value_scale, value_zero = quantized(value.unflatten(3, (-1, min(group, value.shape[3]))), 4)
    return words(key_codes.flatten(2, 3)), words(value_codes.flatten(3)), key_scale, key_zero, value_scale, value_zero


def room_beside(method: Kivi) -> int:
    """Tokens a row that a layer provides for besides, so that one more may pack a record."""
    return 2 * method.record_length


def check_flushes(method: Kivi, num_tokens: int) -> None:
    """Raises ``ValueError`` unless one token more than ``num_tokens`` packs a record."""
    if method.num_packed(num_tokens) + method.residual_length != num_tokens:
        raise ValueError(f"{num_tokens} tokens do not fill the ring of {method.name}: allowed are whole records")


def rewinder(layer: KiviLayer) -> Callable[[], None]:
    """Puts the layer's lengths back to what they are now, on the device and here."""
    lengths, rows, packed = layer.tensors["lengths"].clone(), list(layer.row_lengths), list(layer.row_packed)

    def rewind() -> None:
        layer.tensors["lengths"].copy_(lengths)
        layer.row_lengths, layer.row_packed = list(rows), list(packed)

    return rewind


def storer(layer: KiviLayer, num_q_heads: int) -> Callable[..., None]:
    """``store(layer, query, key, value)``: the engine's storing kernel alone, without the rotary embedding.

    Raises ``ValueError`` elsewhere than on CUDA.
    """
    if layer.device.type != "cuda":
        raise ValueError("the engine's kernel runs on CUDA only")
    kernel = cache._kernels("step").step
    ticket = layer.scratch(num_q_heads)[: layer.batch_size]
    lengths = layer.tensors["lengths"][0].clone()

    def store(layer: KiviLayer, query: Tensor, key: Tensor, value: Tensor) -> None:
        kernel(query, key, value, layer.stored(), layer.layout, lengths, lengths, ticket)

    return store


def filling(method: Kivi) -> int:
    """Tokens after which one more packs a record: what compiles every kernel of the layer."""
    return method.residual_length + 2 * method.record_length
