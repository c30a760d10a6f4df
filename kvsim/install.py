"""How this installation gets a package that is missing: the extra that holds it, and the command that installs it.

No package index has kvsim, so the command names where this one came from: its clone, or what pip recorded of it.
"""

from __future__ import annotations

import json
import shlex
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

EXTRA = {
    "matplotlib": "plot",
    "numpy": "plan",
    "pyarrow": "parquet",
    "starlette": "serve",
    "uvicorn": "serve",
    "torch": "runtime",
    "triton": "runtime",
    "transformers": "runtime",
    "huggingface_hub": "runtime",
    "tokenizers": "runtime",
    "tqdm": "runtime",
    "accelerate": "runtime",
    "gguf": "runtime",
    "safetensors": "runtime",
    "rich": "runtime",
    "scipy": "validation",
    "optimum": "peers",
    "hqq": "peers",
    "tiny_turboquant": "peers",
    "lm_eval": "harness",
    "vllm": "vllm",
    "distributed": "cluster",
}
"""Top-level module -> the smallest extra of pyproject.toml that installs it."""


def install_hint(extra: str) -> str:
    """The command that adds ``extra`` to this installation.

    >>> install_hint("plan").startswith("python -m pip install ")
    True
    """
    return f"python -m pip install {source(extra)}"


def missing_hint(module: str | None, whole: str | None = None) -> str:
    """``: install it with ...`` for a module of :data:`EXTRA` (or one inside it), else nothing.

    ``whole``: the extra of the command, which holds those of the planner and of the runtime.
    """
    extra = EXTRA.get((module or "").partition(".")[0])
    if whole and extra in ("plan", "plot", "runtime"):
        extra = whole
    return f": install it with {install_hint(extra)}" if extra else ""


def source(extra: str) -> str:
    """What ``pip install`` takes for this package with ``extra``, quoted for a shell."""
    root = Path(__file__).resolve().parents[1]
    if (root / "pyproject.toml").is_file():
        return f"-e {shlex.quote(f'{root}[{extra}]')}"
    try:
        recorded = json.loads(distribution("kvsim").read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        recorded = {}
    url = str(recorded.get("url", ""))
    version = recorded.get("vcs_info")
    if version:
        return shlex.quote(f"kvsim[{extra}] @ {version['vcs']}+{url}@{version['commit_id']}")
    if url:
        return shlex.quote(f"kvsim[{extra}] @ {url}")
    return f"-e {shlex.quote(f'.[{extra}]')} in a clone of kvsim"
