"""What a screen does not model: said at the end of every one."""

from __future__ import annotations

BYTES = (
    "the allocator's fragmentation and rounding (512 B to 2 MiB a tensor)",
    "drafts but for those of --speculate, LoRA adapters, vision encoders and their caches",
)
IMBALANCE = "several cards: experts that some have more work for, waiting for the fullest, overlapped sending"
CARD = (
    "activations, workspaces and graphs beyond the share held back and the engine's estimates",
    "weights that an engine pads, replicates or keeps in a second layout",
)
TIME = (
    "arrivals, scheduling, preemption (a steady number is in flight; kvsim goodput simulates them)",
    "power and thermal limits",
    IMBALANCE,
)
QUALITY = "what a method costs in quality"
PAGE = (
    "prefill and time to the first token (kvsim plan has them)",
    "arrivals and waiting (all sequences are in flight), an engine's scheduler and preemption",
    "workspaces beyond the share held back",
    QUALITY,
)
SWEEP = (
    "what an engine holds beside weights and cache, but for the share held back",
    "prefill, arrivals and waiting (all sequences are in flight), scheduling",
    "several cards, and the network",
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
    "plan": (
        "arrivals, scheduling, preemption (every user always has one request in flight; kvsim goodput simulates them)",
        "the room of prefixes kept between requests; drafts and hits but for those of --speculate and --prefix-hits",
        IMBALANCE,
        "the network between replicas and users",
        QUALITY,
    ),
    "breakeven": (
        "prefill, arrivals and waiting (decode steps alone are compared), an engine's scheduler",
        "kernels other than those measured: packed codes are this project's kernel, in another engine carried over "
        "from it",
        "layouts that this project's portable kernel reads (3 bits, odd groups): slower than these times",
        "kernels for half bits, coded a token at a time: those of packed records stand for them",
        "fixed costs of a layer that grow with the batch (measured for one request: early break-evens are optimistic)",
        QUALITY,
    ),
    "goodput": (
        "arrivals in bursts beyond random ones, and users who wait for an answer before they ask again",
        "priorities, other orders than first come first served; prefix hits and drafts",
        "what a band says of every time: a simulation of predicted steps is no more certain than they are",
        "routing between replicas; the host's share of a step beyond the fitted one",
        IMBALANCE,
        QUALITY,
    ),
    "offload": (
        "loading that overlaps with computing, and links that several cards or requests share",
        "writing a cache out; the room, the price and the wear of the tier",
        "small blocks, which take the link's bandwidth away",
        "waiting for a place on the card",
    ),
    "sweep": SWEEP,
    "sweep-summary": SWEEP,
    "page": PAGE,
    "serve": PAGE,
}
"""Schema (a command's name; ``page`` of ``report``) -> what the answer leaves out."""
