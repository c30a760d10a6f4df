"""Prefix caching: what share of the prompts an engine finds in its cache, given or counted on a trace.

A trace (JSON Lines, as Mooncake publishes them) names every block of a request's prompt by a number that stands for
the block and all before it.  Requests are taken in turn: a prompt finds its leading blocks that are still there, then
all of its blocks are the newest; beyond ``capacity`` the block that was used longest ago goes, of one request the last
first, as in vLLM and SGLang.

A hit is rounded down to the unit that the engine can continue at: a block, and where groups of layers have blocks of
their own (windows, states) the least common multiple of these.  At least one token of a prompt is computed.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm
from pathlib import Path

from kvsim.engines import Engine
from kvsim.layout import Method
from kvsim.models.model import Model
from kvsim.regular_files import TRACE_NBYTES, read_text

TRACE_BLOCK = 512
"""Tokens of a block in Mooncake's traces."""


@dataclass(frozen=True)
class Prompt:
    """A prompt's tokens, and its blocks in order."""

    num_tokens: int
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class Hits:
    """Over a trace: requests, tokens of prompts, and those of them found."""

    num_requests: int
    num_tokens: int
    num_found: int

    @property
    def share(self) -> float:
        """Share of the prompts' tokens that is found."""
        return self.num_found / self.num_tokens


def unit(engine: Engine, model: Model, method: Method) -> int:
    """Tokens between two places at which ``engine`` can continue a cached prefix: 1 where it has no blocks."""
    pool = engine.pool(model, method, 1 << 50, 1)
    return 1 if pool is None else lcm(*(group.block_size for group in pool.groups))


def usable(num_found: int, num_tokens: int, step: int) -> int:
    """Of ``num_found`` leading tokens of a prompt those that need no prefill, in units of ``step``."""
    return max(0, min(num_found, num_tokens - 1)) // step * step


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a trace: objects with ``input_length`` and ``hash_ids``, one a line.

    Raises ``ValueError``, naming file and line.
    """
    try:
        lines = read_text(path, TRACE_NBYTES).splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"prefix hits {str(path)!r}: not UTF-8 text") from None
    except OSError as error:
        raise ValueError(f"prefix hits {str(path)!r}: neither a share nor a trace: {error.strerror}") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt = Prompt(int(row["input_length"]), tuple(int(each) for each in row["hash_ids"]))
        except (ValueError, TypeError, KeyError, RecursionError):
            raise ValueError(f"{path} line {number}: no object with input_length and hash_ids") from None
        if prompt.num_tokens < 1 or not 0 <= len(prompt.blocks) * TRACE_BLOCK - prompt.num_tokens < TRACE_BLOCK:
            raise ValueError(
                f"{path} line {number}: {len(prompt.blocks)} blocks of {TRACE_BLOCK} for {prompt.num_tokens} tokens"
            )
        found.append(prompt)
    if not found:
        raise ValueError(f"{path}: no requests")
    return found


def count_hits(prompts: Sequence[Prompt], capacity: int | None = None, step: int = 1) -> Hits:
    """What ``prompts`` in turn find in a cache of ``capacity`` tokens (``None``: no limit), in units of ``step``."""
    blocks = None if capacity is None else capacity // TRACE_BLOCK
    held: OrderedDict[int, None] = OrderedDict()
    total = found = 0
    for prompt in prompts:
        leading = 0
        for block in prompt.blocks:
            if block not in held:
                break
            leading += 1
        total += prompt.num_tokens
        found += usable(leading * TRACE_BLOCK, prompt.num_tokens, step)
        for block in reversed(prompt.blocks):  # the first is the newest, so the last goes first
            held[block] = None
            held.move_to_end(block)
        while blocks is not None and len(held) > blocks:
            held.popitem(last=False)
    return Hits(len(prompts), total, found)
