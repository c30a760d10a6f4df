"""10,000 mutated configs: each is read, and then weighs what its own layers say, or is refused by one line with a key.

Never another exception, never a hang.  Seeded, so that a failure repeats.
"""

from __future__ import annotations

import json
import random
import time
from functools import cache
from typing import Any

import pytest

from kvsim import catalog
from kvsim.engines.ideal import Ideal
from kvsim.engines.transformers import Transformers
from kvsim.layout import LayerShape, StateShape
from kvsim.methods import Full
from kvsim.models.families import FAMILIES
from kvsim.models.model import Model

COUNT = 10_000
CHUNKS = 20
SLOWEST = 1000
"""How many times what the slowest unhurt config takes one may take that is hurt, in processor time."""

CONFIGS = [row["config"] for row in catalog.rows("models")]
KEYS = sorted({key for config in CONFIGS for each in (config, config.get("text_config") or {}) for key in each})
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 64, 4096, 10**6, 10**9, 10**18, -(10**9), 0.5, float("nan"), float("inf"), "",
    "64", "auto", "full_attention", "LLLG", [], [0], [1, 2, 3], ["full_attention"], ["sliding_attention", 7], [None],
    [[]], [[["global", "local"], 10**9]], {}, {"a": 1}, {"num_heads": 4}, "M-*E", "x" * 10_000, [0] * 5000,
]  # fmt: skip


def mutated(rng: random.Random) -> Any:
    """A catalogue config, copied and hurt one to four times."""
    config = json.loads(json.dumps(rng.choice(CONFIGS)))
    for _ in range(rng.randint(1, 4)):
        part = config["text_config"] if isinstance(config.get("text_config"), dict) and rng.random() < 0.8 else config
        key = rng.choice(sorted(part) or ["model_type"])
        way = rng.randrange(10)
        if way == 0:
            part.pop(key, None)
        elif way == 1:
            part[rng.choice(KEYS)] = part.pop(key, None)
        elif way == 2:
            part[key] = rng.choice(VALUES)
        elif way == 3:
            value = part.get(key)
            part[key] = -value if isinstance(value, int | float) else value
        elif way == 4:
            part[key] = str(part.get(key))
        elif way == 5:
            value = part.get(key)
            part[key] = value * rng.choice((10**3, 10**9, 10**30)) if isinstance(value, int) else [value]
        elif way == 6:
            part["model_type"] = rng.choice(sorted(FAMILIES))
        elif way == 7:
            part[rng.choice(KEYS)] = rng.choice(VALUES)
        elif way == 8:
            value = part.get(key)
            if isinstance(value, list) and value:
                value[rng.randrange(len(value))] = rng.choice(VALUES)
            elif isinstance(value, int) and not isinstance(value, bool):
                part[key] = value + rng.choice((-1, 1))
        else:
            other = rng.choice(CONFIGS)
            other = other.get("text_config", other)
            name = rng.choice(sorted(other))
            part[name] = json.loads(json.dumps(other[name]))
    return config


def slow_bytes(model: Model, num_tokens: int) -> int:
    """What the layers hold after ``num_tokens`` tokens, counted entry by entry from their own kinds."""
    total = 0
    for layer in model.layers:
        if isinstance(layer, StateShape) or layer.kind == "indexer":
            continue
        if layer.kind in ("sliding", "chunked") or layer.window is not None:
            assert layer.window
            entries = sum(1 for token in range(num_tokens) if token >= num_tokens - layer.window)
        elif layer.kind == "compressed":
            entries = sum(1 for token in range(1, num_tokens + 1) if token % layer.stride == 0)
        else:
            assert layer.kind in ("full", "mla")
            entries = num_tokens
        for _ in range(layer.num_kv_heads if layer.num_kv_heads < 64 else 1):
            step = 1 if layer.num_kv_heads < 64 else layer.num_kv_heads
            total += step * entries * (layer.key_dim + layer.value_dim) * 2
    return total


@cache
def unhurt_seconds() -> float:
    """Processor time of the slowest config of the catalogue, on this machine."""

    def seconds(config: Any) -> float:
        start = time.process_time()
        Model.from_config(config)
        return time.process_time() - start

    return max(map(seconds, CONFIGS))


def check(config: Any) -> bool:
    """True where the config is read, False where it is refused; anything else raises."""
    model, refusal = None, None
    start = time.process_time()
    try:
        model = Model.from_config(config)
    except (ValueError, LookupError) as error:
        refusal = error
    assert time.process_time() - start < SLOWEST * unhurt_seconds()
    if model is None:
        message = str(refusal)
        assert type(refusal).__name__ in ("ValueError", "LookupError", "AbsentKeyError"), refusal
        assert "\n" not in message
        assert message.startswith(("config key ", "unknown ")), message
        assert len(message) < 6000
        return False
    for layer in model.layers:
        if isinstance(layer, LayerShape):
            assert min(layer.num_kv_heads, layer.key_dim) > 0
            assert layer.window is None or layer.window > 0
        else:
            assert all(size > 0 for _, shape, _ in layer.tensors for size in shape)
    for num_tokens in (1, 37):
        parts = Ideal().parts(model, Full(), 1, num_tokens)
        assert parts.get("key", 0) + parts.get("value", 0) == slow_bytes(model, num_tokens)
        stored = Transformers().parts(model, Full("bfloat16"), 1, num_tokens)
        assert all(size >= 0 for size in stored.values())
    if model.weights is not None:
        assert min(model.weights.embedding, model.weights.dense, model.weights.routed, model.weights.head) >= 0
        assert model.weights.active <= model.weights.total
    assert sum(count for _, count in model.kinds) >= 1
    return True


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_mutated_configs(chunk: int) -> None:
    rng = random.Random(chunk)
    outcomes = [check(mutated(rng)) for _ in range(COUNT // CHUNKS)]
    assert 0.05 < sum(outcomes) / len(outcomes) < 0.9  # both ways are met
