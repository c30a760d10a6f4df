"""Writes kvsim/catalog/defaults.json anew: what transformers' classes fill in for absent keys.

``python tests/support/model_defaults.py`` writes it; tests/kvsim/test_model_oracle.py holds it to the installed
transformers.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
NEVER = {"model_type", "dtype", "torch_dtype", "layer_types", "layers_block_type", "mlp_layer_types", "text_config"}
EXCEPT = {("mistral", "sliding_window")}
"""Published configs of full-attention Mistral models lack the key: it counts as null, and a note says so."""


def keys_read() -> set[str]:
    """Every string in the parser's rooms that could be a config key."""
    rooms = sorted((ROOT / "kvsim" / "models").rglob("*.py"))
    text = "".join(room.read_text(encoding="utf-8") for room in rooms)
    return set(re.findall(r'"([a-z_][a-z0-9_]+)"', text, re.IGNORECASE)) - NEVER


def class_defaults(model_type: str) -> dict[str, Any]:
    """The values that the class gives keys which are absent: numbers, names and lists; not null, not switches."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    known = CONFIG_MAPPING[model_type]
    out = {}
    for key in sorted(keys_read()):
        value = getattr(known, key, None)
        if isinstance(value, property) or callable(value) or isinstance(value, bool) or value is None:
            continue
        if isinstance(value, tuple):
            value = list(value)
        if isinstance(value, int | float | str | list) and (model_type, key) not in EXCEPT:
            out[key] = value
    return out


def defaults() -> dict[str, dict[str, Any]]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from kvsim.models.families import FAMILIES

    return {name: class_defaults(name) for name in sorted(FAMILIES) if name in CONFIG_MAPPING}


if __name__ == "__main__":
    import transformers

    sys.path[:0] = [str(ROOT)]
    lines = ",\n".join(f'"{name}": {json.dumps(row)}' for name, row in defaults().items())
    source = f"the configuration classes of transformers {transformers.__version__} (Apache-2.0)"
    text = f'{{"source": "{source}", "families": {{\n{lines}\n}}}}\n'
    (ROOT / "kvsim" / "catalog" / "defaults.json").write_text(text, encoding="utf-8")
