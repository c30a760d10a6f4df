"""Planners that pip installs, head to head: the cache of 24 modern models in bytes, against the exact figure.

    python tests/support/planner_rows.py FOLDER > newer.json
    python -m validation.planners --configs models.json --configs newer.json --peers FOLDER [--install]

``--configs`` is a JSON list of rows with ``id``, ``config`` (config.json as published) and the bytes that its keys and
values take, ``expected_ideal_kv.bytes_at_32768``, a figure that does not come from kvsim; for the newer shapes it is
what transformers' own cache holds (``planner_rows.py``).  ``--install`` puts each planner into a folder of its own
first.  What they answer is recorded in ``results/planners/kv-bytes.json``, and
:func:`table` makes the documents' table of it.

Planners differ in what they call the cache of a model with index keys or constant state: an answer counts as exact
where it is within 1 % of the keys and values, alone or with the index keys, or with the constant state too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kvsim import __version__
from kvsim.atomic import replace_file
from kvsim.finite_json import json_text
from kvsim.memory.estimate import estimate
from kvsim.methods import make_method
from kvsim.models.model import Model
from kvsim.output.tables import compact

SHAPES = (
    ("meta-llama/Meta-Llama-3.1-8B", "grouped queries"),
    ("Qwen/Qwen3-0.6B", "heads wider than hidden / heads"),
    ("Qwen/Qwen3-30B-A3B", "experts"),
    ("microsoft/Phi-4-mini-instruct", "grouped queries"),
    ("meta-llama/Llama-4-Scout-17B-16E-Instruct", "chunked attention"),
    ("google/gemma-3-27b-it", "sliding windows, 5 of 6 layers"),
    ("google/gemma-3n-E4B", "windows, layers that share a cache"),
    ("google/gemma-4-26B-A4B", "windows, other heads on them"),
    ("openai/gpt-oss-20b", "sliding windows, every other layer"),
    ("deepseek-ai/DeepSeek-V3", "latent (MLA)"),
    ("deepseek-ai/DeepSeek-V3.2", "latent, index keys"),
    ("deepseek-ai/DeepSeek-V4-Flash", "compressed attention, index keys"),
    ("moonshotai/Kimi-K2.5", "latent, nested config"),
    ("zai-org/GLM-5", "latent, index keys"),
    ("Qwen/Qwen3-Next-80B-A3B-Instruct", "gated delta net, 3 of 4 layers"),
    ("moonshotai/Kimi-Linear-48B-A3B-Instruct", "linear attention and latent"),
    ("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "Mamba, few attention layers"),
    ("nvidia/Llama-3_3-Nemotron-Super-49B-v1", "blocks that differ (NAS)"),
    ("deepseek-ai/DeepSeek-V4-Pro", "compressed attention, index keys"),
    ("zai-org/GLM-5.2", "latent, index keys on some layers"),
    ("Qwen/Qwen3.5-397B-A17B", "gated delta net, nested config"),
    ("nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16", "Mamba, few attention layers"),
    ("XiaomiMiMo/MiMo-V2-Flash", "windows, other heads on them, values narrower than keys"),
    ("Qwen/Qwen3-VL-30B-A3B-Instruct", "experts, nested config"),
)
CONTEXT = 32768
TOLERANCE = 0.01
SECONDS = 600
NAMES = (
    "kvfit",
    "ridgepoint",
    "hf-mem",
    "llm-d-planner",
    "vramcalc",
    "servcalc",
    "hf-vram-calc",
    "llm-analysis",
    "fitcheck-llm",
)
MORE: dict[str, tuple[str, ...]] = {
    "ridgepoint": ("huggingface_hub",),
    "servcalc": ("vramcalc",),
    "llm-analysis": ("fire", "termcolor"),
}
"""What else has to be there for a planner's own code to run."""

RECORD = Path(__file__).parents[1] / "results" / "planners" / "kv-bytes.json"


def weighed(config: dict[str, Any], name: str) -> dict[str, int]:
    """kvsim's own figures: bytes of keys and values, of index keys, and of constant state."""
    found = estimate(Model.from_config(config, name), make_method("bf16"), 1, CONTEXT)
    return {"kv": found.nbytes, "index": found.index_nbytes, "state": found.state_nbytes}


def install(name: str, folder: Path) -> None:
    """``pip install --target``; what the planner needs of transformers and NumPy comes from this environment."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder / name), name]
    subprocess.run(command, check=False)
    for more in MORE.get(name, ()):
        deep = [part for part in command[:-1] if part != "--no-deps" or name != "ridgepoint"]
        subprocess.run([*deep, more], check=False)


def ask(name: str, folder: Path, configs: dict[str, Any]) -> dict[str, Any]:
    """What one planner says of every config, or why it could not be asked."""
    if not (folder / name).is_dir():
        return {"could_not_run": "not installed"}
    script = Path(__file__).with_name("subject.py")
    environment = os.environ | {"PYTHONPATH": str(folder / name), "HF_HUB_OFFLINE": "1"}
    try:
        run = subprocess.run(
            [sys.executable, str(script), name],
            input=json.dumps({"ctx": CONTEXT, "configs": configs}),
            capture_output=True,
            text=True,
            errors="replace",
            env=environment,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"could_not_run": f"no answer within {SECONDS} s"}
    if run.returncode:
        return {"could_not_run": (run.stderr.strip().splitlines() or ["no message"])[-1][:160]}
    return {"version": _version(folder / name, name), "answers": json.loads(run.stdout)}


def _version(folder: Path, name: str) -> str:
    found = sorted(folder.glob(f"{name.replace('-', '_')}-*.dist-info"))
    return found[-1].name.removesuffix(".dist-info").rsplit("-", 1)[-1] if found else ""


def measure(rows: Sequence[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """The whole record."""
    by_id = {row["id"]: row for row in rows}
    missing = [name for name, _ in SHAPES if name not in by_id]
    if missing:
        raise ValueError(f"no config of {', '.join(missing)}")
    configs = {name: by_id[name]["config"] for name, _ in SHAPES}
    own = {name: weighed(config, name) for name, config in configs.items()}
    exact = {name: one | {"kv": by_id[name]["expected_ideal_kv"]["bytes_at_32768"]} for name, one in own.items()}
    answers = {name: {"nbytes": one["kv"]} for name, one in own.items()}
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "ctx": CONTEXT,
        "exact": exact,
        "planners": {"kvsim": {"version": __version__, "answers": answers}}
        | {name: ask(name, folder, configs) for name in NAMES},
    }


def recorded() -> dict[str, Any]:
    """What ``results/planners/kv-bytes.json`` holds."""
    found: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
    return found


def ratio(answer: dict[str, Any], truth: dict[str, int]) -> float | None:
    """The answer over the nearest of the figures that count as exact; ``None`` where the planner refused."""
    if "nbytes" not in answer:
        return None
    kv, index, state = truth["kv"], truth["index"], truth["state"]
    ratios = [answer["nbytes"] / figure for figure in (kv, kv + index, kv + index + state, kv + state)]
    return min(ratios, key=lambda one: abs(one - 1))


def score(record: dict[str, Any], name: str) -> tuple[int, int, int, float] | None:
    """Exact, wrong and refused of all shapes, and the worst factor either way; ``None`` where it could not be run."""
    answers = record["planners"][name].get("answers")
    if answers is None:
        return None
    ratios = [ratio(answers[shape], record["exact"][shape]) for shape, _ in SHAPES]
    given = [one for one in ratios if one is not None]
    right = sum(abs(one - 1) <= TOLERANCE for one in given)
    worst = max((max(one, 1 / one) for one in given), default=1.0)
    return right, len(given) - right, len(ratios) - len(given), worst


def table(record: dict[str, Any] | None = None, short: bool = False) -> str:
    """Two Markdown tables: the score of every planner (``short``: this one alone), and every answer as a factor."""
    record = record or recorded()
    names = list(record["planners"])
    scores, failed = [], []
    for name in names:
        found = score(record, name)
        if found is None:
            failed.append(f"{name} could not be run: {record['planners'][name]['could_not_run']}.")
            continue
        right, wrong, refused, worst = found
        version = record["planners"][name]["version"]
        scores.append([f"{name} {version}", f"{right}", f"{wrong}", f"{refused}", f"{worst:.2f}"])
    parts = [compact(["planner", "within 1 %", "wrong", "refused", "worst factor"], scores, left=(0,))]
    if not short:
        ran = [name for name in names if "answers" in record["planners"][name]]
        parts.append(compact(["model", "what is particular", "exact, MiB", *ran], _answers(record, ran), left=(0, 1)))
    return "\n\n".join([*parts, *(["\n".join(failed)] if failed else [])])


def _answers(record: dict[str, Any], ran: Sequence[str]) -> list[list[str]]:
    """A line a shape: the exact figure, and every answer as a factor of it."""
    out = []
    for shape, what in SHAPES:
        truth = record["exact"][shape]
        cells = [_cell(ratio(record["planners"][name]["answers"][shape], truth)) for name in ran]
        out.append([shape.split("/")[-1], what, f"{truth['kv'] / 2**20:,.1f}", *cells])
    return out


def _cell(factor: float | None) -> str:
    if factor is None:
        return "–"
    return "1" if abs(factor - 1) <= TOLERANCE else f"**{factor:.2f}**"


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask pip-installed planners for 24 caches, and record the answers.")
    parser.add_argument(
        "--configs", type=Path, required=True, action="append", help="JSON list of rows with id and config"
    )
    parser.add_argument("--peers", type=Path, required=True, help="folder with one folder a planner")
    parser.add_argument("--install", action="store_true", help="pip install each planner into its folder first")
    arguments = parser.parse_args()
    if arguments.install:
        for name in NAMES:
            install(name, arguments.peers)
    try:
        # published configs hold numbers that JSON has not, such as Nemotron's Infinity
        rows = [row for path in arguments.configs for row in json.loads(path.read_text(encoding="utf-8"))]
        record = measure(rows, arguments.peers)
        RECORD.parent.mkdir(parents=True, exist_ok=True)
        replace_file(RECORD, json_text(record, indent=1) + "\n")
    except (ValueError, OSError) as error:
        print(f"validation.planners.compare: error: {error}", file=sys.stderr)
        sys.exit(2)
    print(table(record))
