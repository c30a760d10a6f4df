"""docs/models.md: its table of families is what the parser's own table says.

``python tests/kvsim/test_models_doc.py`` writes it anew.
"""

import json
import re
import sys
from collections import Counter
from pathlib import Path

from kvsim.models.attention import Attention, BlockSparse, CompressedAttention, Latent, PooledIndex
from kvsim.models.families import FAMILIES, WRAPPERS
from kvsim.models.families.family import Family

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "models.md"
RECORD = ROOT / "tests" / "support" / "model_types.json"
VERDICTS = ("exact", "in part", "by its row", "refused", "not causal")
BLOCK = re.compile(r"(<!-- (families|wrappers|verdicts) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
STATES = {
    "Convolutions": "conv",
    "DelayedValue": "cca",
    "DeltaNet": "gated_delta_net",
    "Kda": "kda",
    "Lightning": "lightning",
    "Mamba": "mamba",
    "MLstm": "mlstm",
    "Mamba2": "mamba2",
    "NGramEmbedding": "ngram",
    "RgLru": "rg_lru",
    "Rwkv": "rwkv",
    "ShortConv": "conv",
}


def leaves(family: Family) -> str:
    """The kinds of a family's layers, as ``kvsim`` labels them."""
    out: list[str] = []
    for kind, mixers in family.mixers.items():
        for mixer in mixers:
            if isinstance(mixer, Attention):
                out.append("sliding" if kind in ("sliding", "hybrid_sliding") else "full")
                out += ["indexer"] if isinstance(mixer, BlockSparse | PooledIndex) else []
            elif isinstance(mixer, Latent):
                out.append("sliding" if kind == "sliding" else "mla")
                out += ["indexer"] if mixer.indexer else []
            elif isinstance(mixer, CompressedAttention):
                out += ["sliding", "compressed", "indexer"] if mixer.indexer else ["sliding"]
            else:
                out.append(STATES[type(mixer).__name__])
    out += ["chunked"] if family.chunk else []
    out += ["shared"] if family.sharing else []
    out += ["full", "none"] if family.layers else ["none"] if family.single else []
    return " + ".join(dict.fromkeys(out))


def families() -> str:
    rows: dict[str, list[str]] = {}
    for name, family in FAMILIES.items():
        rows.setdefault(leaves(family), []).append(f"`{name}`" + ("" if family.countable else " ¹"))
    lines = ["| layers | model types |", "| --- | --- |"]
    lines += [f"| {kinds} | {', '.join(sorted(names))} |" for kinds, names in rows.items()]
    return "\n".join(lines)


def verdicts() -> str:
    """What is said of every model type of transformers that generates text, and why, as it was recorded."""
    told = json.loads(RECORD.read_text(encoding="utf-8"))
    rows: dict[tuple[str, str], list[str]] = {}
    for name, row in told["types"].items():
        rows.setdefault((row["verdict"], row["reason"]), []).append(f"`{name}`")
    counts = Counter(row["verdict"] for row in told["types"].values())
    total = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS)
    lines = [f"transformers {told['transformers']}: {len(told['types'])} model types, {total}.", ""]
    lines += ["| verdict | reason | types |", "| --- | --- | --- |"]
    order = sorted(rows, key=lambda key: (VERDICTS.index(key[0]), -len(rows[key])))
    lines += [f"| {verdict} | {reason} | {', '.join(rows[verdict, reason])} |" for verdict, reason in order]
    return "\n".join(lines)


def regenerated(text: str) -> str:
    wrappers = ", ".join(f"`{name}`" for name in WRAPPERS) + "."
    blocks = {"families": families(), "wrappers": wrappers, "verdicts": verdicts()}
    return BLOCK.sub(lambda match: f"{match[1]}{blocks[match[2]]}\n{match[4]}", text)


def test_the_tables_are_the_parsers() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert len(BLOCK.findall(text)) == 3
    assert text == regenerated(text)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", DOCUMENT.read_text(encoding="utf-8")):
        assert (DOCUMENT.parent / target).exists(), target


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT)]
    DOCUMENT.write_text(regenerated(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
