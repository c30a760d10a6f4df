"""docs/models.md: its table of families is what the parser's own table says.

``python tests/kvsim/test_models_doc.py`` writes it anew.
"""

import re
import sys
from pathlib import Path

from kvsim.models.attention import Attention, BlockSparse, Compressed, Latent, PooledIndex
from kvsim.models.families import FAMILIES, WRAPPERS
from kvsim.models.families.family import Family

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "models.md"
BLOCK = re.compile(r"(<!-- (families|wrappers) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
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
            elif isinstance(mixer, Compressed):
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


def regenerated(text: str) -> str:
    blocks = {"families": families(), "wrappers": ", ".join(f"`{name}`" for name in WRAPPERS) + "."}
    return BLOCK.sub(lambda match: f"{match[1]}{blocks[match[2]]}\n{match[4]}", text)


def test_the_tables_are_the_parsers() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert len(BLOCK.findall(text)) == 2
    assert text == regenerated(text)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", DOCUMENT.read_text(encoding="utf-8")):
        assert (DOCUMENT.parent / target).exists(), target


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT)]
    DOCUMENT.write_text(regenerated(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
