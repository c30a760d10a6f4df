"""What kvruntime runs, as the README counts it and docs/models.md lists it."""

from __future__ import annotations

from hf_latents import LATENTS
from hf_mixed import MIXED
from hf_models import MODELS, MORE
from hf_refused import REFUSED, refused_table
from hf_vision import VISIONS


def counts() -> str:
    """One sentence."""
    return (
        f"{len(MODELS) + len(MIXED) + len(LATENTS)} families: {len(MODELS)} of full attention alone, {len(MIXED)} that "
        f"mix layers or change scores and {len(LATENTS)} of latents; {len(MORE)} more by one short generation each; "
        f"{len(VISIONS)} vision-language classes; {len(REFUSED)} kinds that are refused by name."
    )


def table() -> str:
    """Every row that runs."""
    lines = ["| family | transformers class | packed | exact, in transformers' own layers |", "|---|---|---|---|"]
    for family, (config_class, _, note) in MODELS.items():
        lines.append(f"| {family} | `{config_class.removesuffix('Config')}` | every layer: {note} | |")
    for family, (config_class, _, packed, exact) in MIXED.items():
        lines.append(f"| {family} | `{config_class.removesuffix('Config')}` | {packed} | {exact} |")
    for family, (config_class, _, packed, exact) in MORE.items():
        lines.append(f"| {family} ² | `{config_class.removesuffix('Config')}` | {packed} | {exact} |")
    for family, (config_class, _, note) in LATENTS.items():
        name = config_class.removesuffix("Config")
        lines.append(f"| {family} | `{name}` | every layer's latents and rotary keys; {note} | |")
    for family, (kind, arguments, _, _) in VISIONS.items():
        slides = arguments["text_config"].get("layer_types")
        packed = "the text part's full attention" if slides else "the text part, every layer"
        lines.append(f"| {family}, with images | `{kind}ForConditionalGeneration` | {packed} | {_exact(slides)} |")
    return "\n".join(lines)


def _exact(kinds: list[str] | None) -> str:
    names = {"sliding_attention": "windows", "chunked_attention": "chunks"}
    return " and ".join(names[kind] for kind in dict.fromkeys(kinds or ()) if kind in names)


def block(arguments: str) -> str:
    """What documents show: ``counts``, ``table`` or ``refused``."""
    return {"counts": counts, "table": table, "refused": refused_table}[arguments.strip()]()
