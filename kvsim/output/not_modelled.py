"""What a screen does not model: said at the end of every one."""

from __future__ import annotations

BYTES = (
    "the allocator's fragmentation and rounding (512 B to 2 MiB a tensor)",
    "draft models and multi-token prediction layers, LoRA adapters, vision encoders and their caches",
)
CARD = (
    "activations, workspaces and graphs beyond the share held back and the engine's estimates",
    "weights that an engine pads, replicates or keeps in a second layout",
)
TIME = (
    "bursts, arrival rates, scheduling policy, preemption (a steady number of requests is in flight)",
    "speculative decoding, power and thermal limits",
    "pipeline and context parallelism, and links between hosts, in the times",
)
NOT_MODELLED: dict[str, tuple[str, ...]] = {
    "estimate": (*BYTES, *CARD, *TIME),
    "compare": BYTES,
    "explain": BYTES,
    "plot": BYTES,
    "models": ("what a checkpoint adds to or leaves out of its config",),
    "hardware": ("memory that other processes hold; clocks below the stated peak",),
    "calibrate": ("other types of cache than 16-bit", "clocks that fall under load, other cards on the same link"),
    "doctor": (
        "what a log does not print; other processes on the card",
        BYTES[0],
        "a draft whose model is not in the catalogue, but for one layer more; LoRA adapters, vision encoders",
    ),
}
"""Command -> what its answer leaves out."""
