"""Rows for the head-to-head of planners: published configs with what transformers' own cache holds of them.

    python tests/support/planner_rows.py FOLDER > newer.json

``FOLDER`` has a ``OWNER--NAME_config.json`` for each of the newer shapes, as ai-dynamo/aiconfigurator keeps them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from oracle import cache_of, meta_model

from validation.planners.compare import CONTEXT

NEWER = (
    "deepseek-ai/DeepSeek-V4-Pro",
    "zai-org/GLM-5.2",
    "Qwen/Qwen3.5-397B-A17B",
    "nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16",
    "XiaomiMiMo/MiMo-V2-Flash",
    "Qwen/Qwen3-VL-30B-A3B-Instruct",
)
ASIDE = ("quantization_config", "auto_map", "architectures", "transformers_version")


def row(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """Keys and values of a prompt of 32,768 tokens; one vector that is both keys and values counts once."""
    plain = {key: value for key, value in config.items() if key not in ASIDE}
    held = cache_of(meta_model(plain), CONTEXT)
    both = "compressed" in held and held["key"] == held["value"]
    nbytes = held["key"] + (0 if both else held["value"]) + held.get("compressed", 0)
    return {"id": name, "config": config, "expected_ideal_kv": {"bytes_at_32768": nbytes}}


def main() -> None:
    folder = Path(sys.argv[1])
    files = {name: folder / f"{name.replace('/', '--')}_config.json" for name in NEWER}
    json.dump([row(name, json.loads(file.read_text(encoding="utf-8"))) for name, file in files.items()], sys.stdout)


if __name__ == "__main__":
    main()
