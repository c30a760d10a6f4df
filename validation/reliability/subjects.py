"""What the runs work on: a tiny Llama made where it runs, and the layouts of every method's room."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from kvruntime.methods import LAYERS
from kvsim.layout import Method
from kvsim.methods import Full


class Scale(NamedTuple):
    """How much a run does: on a card, and small for a CPU in CI."""

    decoded: int
    """Tokens that one row decodes."""
    sequences: int
    """Sequences of calls."""
    calls: int
    """Calls of each, at the most."""
    layers: int
    """Layers of the model."""
    nan_starts: tuple[int, ...] = (0, 170)
    """Tokens from which on a row is NaN."""
    shapes: tuple[tuple[int, int], ...] = ((1, 64), (2, 64), (1, 128), (2, 128))
    """Key/value heads and channels of the layers that are called at random."""
    batches: tuple[int, ...] = (1, 2, 3)
    weighed: int = 1
    """Models whose memory is weighed by phase on a card."""
    layouts: tuple[str, ...] = ()
    """Those that a run goes through, by name; none: all of its own."""
    models: tuple[str, ...] = ()
    """Likewise the models whose memory is weighed by phase."""


CARD = Scale(decoded=100_000, sequences=1_000, calls=12, layers=2, shapes=((2, 64),), batches=(3,), weighed=3)
"""One shape and batch of random calls: kernels are compiled for each, some seconds a layout."""
CI = Scale(decoded=64, sequences=21, calls=6, layers=2, nan_starts=(170,))


def config(scale: Scale, positions: int) -> Any:
    """A Llama of 64 channels a head, as small as the kernels take."""
    from transformers import LlamaConfig

    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": scale.layers, "vocab_size": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    return LlamaConfig(**sizes, **heads, max_position_embeddings=positions, initializer_range=0.1)


def model(device: torch.device, scale: Scale, positions: int = 1024, seed: int = 0) -> Any:
    """The model with random weights; bfloat16 on a GPU, float32 elsewhere."""
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = LlamaForCausalLM(config(scale, positions)).eval()
    made.generation_config.pad_token_id = 0
    made.generation_config.eos_token_id = None
    return made.to(device, dtype_of(device))


def dtype_of(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def layouts(device: torch.device, scale: Scale = CI) -> tuple[Method, ...]:
    """The uncompressed cache, and the first examples of every room that packs, exact tokens in the model's type."""
    from kvruntime.bench.engine.suite import with_dtype

    name = str(dtype_of(device)).removeprefix("torch.")
    rooms = [room for kind, room in LAYERS.items() if kind is not Full]
    own = [room.examples[0] for room in rooms if room.layer.has_steps]  # type: ignore[attr-defined]
    return _wanted((Full(name), *(with_dtype(method, name) for method in own)), scale)


def every_layout(scale: Scale = CI) -> tuple[Method, ...]:
    """Every example of every room."""
    return _wanted(tuple(example for room in LAYERS.values() for example in room.examples), scale)


def _wanted(methods: tuple[Method, ...], scale: Scale) -> tuple[Method, ...]:
    """Those that the scale is limited to.  Raises ``LookupError`` for a name that is none of theirs."""
    names = [method.name for method in methods]
    for name in scale.layouts:
        if name not in names:
            raise LookupError(f"unknown layout {name!r}: allowed are {', '.join(names)}")
    return tuple(method for method in methods if not scale.layouts or method.name in scale.layouts)
